"""A Mistral-7B server's life: uploads, mixed batches, drafts, eviction, a restart, deletes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorastack.client import Adapter
from lorastack.errors import NotFoundError
from lorastack.v1 import generation_pb2 as pb
from tests.helpers.live import ask
from tests.integration.mistral_7b.adapters import BUNDLE, HEADS, OWN_HEADS, RANKS, REAL
from tests.integration.mistral_7b.requests import NUM_TOKENS, batch_of_8, mixed, together
from tests.integration.mistral_7b.serving import Deployment

REAL_HEADS = "heads-real"


def said(reply: pb.GenerateResponse) -> tuple[object, ...]:
    """What no company, draft, eviction or restart may change."""
    return list(reply.token_ids), reply.text, reply.finish_reason, reply.stop_match


def test_loading_takes_little_more_than_the_weights(deployment: Deployment) -> None:
    assert deployment.peak_bytes <= 1.1 * deployment.loaded_bytes


def test_uploads_are_listed_for_what_they_are(
    deployment: Deployment, folders: dict[str, Path]
) -> None:
    listed = {each["id"]: each for each in deployment.adapters("list")["adapters"]}
    assert listed.keys() == folders.keys()
    assert all(each["compatible"] for each in listed.values())
    assert {name: listed[name]["rank"] for name in RANKS} == RANKS
    assert all(len(listed[name]["target_modules"]) == 7 for name in RANKS)
    kinds = {HEADS: "MEDUSA", OWN_HEADS: "MEDUSA", BUNDLE: "LORA_WITH_MEDUSA", "lora-r8": "LORA"}
    assert {name: listed[name]["kind"] for name in kinds} == kinds
    assert [listed[name]["num_heads"] for name in (HEADS, OWN_HEADS, BUNDLE)] == [3, 3, 3]
    assert [str(listed[name]["medusa_version"]) for name in (HEADS, OWN_HEADS)] == ["2", "1"]


def test_a_row_in_a_batch_equals_itself_alone(deployment: Deployment) -> None:
    requests = batch_of_8()
    replies = together(deployment.client, requests)
    assert all(len(reply.token_ids) == NUM_TOKENS for reply in replies)
    assert len({tuple(reply.token_ids) for reply in replies}) == len(replies)
    for request, reply in zip(requests, replies, strict=True):
        named = {request.lora_id} if request.lora_id else {lora.lora_id for lora in request.loras}
        assert {used.lora_id for used in reply.adapters.loras} == named
        alone = deployment.client.generate(request)
        assert said(alone) == said(reply)
        assert alone.adapters == reply.adapters
    drafted_by = [reply.adapters.medusa_id for reply in replies]
    assert drafted_by == ["", HEADS, "", HEADS, OWN_HEADS, HEADS, BUNDLE, HEADS]


def test_drafts_change_no_token(deployment: Deployment) -> None:
    """32 rows with guesses of which half are accepted: more tokens a step, the same ones."""
    plain = together(deployment.client, mixed(32, off=True))
    deployment.knows({str(index): reply.token_ids for index, reply in enumerate(plain)})
    drafted = together(deployment.client, mixed(32, off=False))
    deployment.knows({})
    for index, (expected, reply) in enumerate(zip(plain, drafted, strict=True)):
        assert said(reply) == said(expected), index
    assert sum(reply.speculation.drafted_tokens for reply in plain) == 0
    tokens = sum(len(reply.token_ids) for reply in drafted)
    accepted = sum(sum(reply.speculation.accepted_by_head) for reply in drafted)
    share = accepted / sum(reply.speculation.drafted_tokens for reply in drafted)
    assert 0.3 < share < 0.7
    assert tokens >= 1.5 * sum(reply.speculation.steps for reply in drafted)


def test_what_was_evicted_comes_back(deployment: Deployment, folders: dict[str, Path]) -> None:
    """One after the other, so that not all of them fit; then again, the first ones first."""

    def answers() -> dict[str, tuple[object, ...]]:
        replies = {}
        for name in folders:
            is_lora = name.startswith("lora") or name == BUNDLE
            loaded = deployment.client.load(name)
            assert loaded.residency == Adapter.DEVICE
            request = ask(
                stack=[(name, 1.0)] if is_lora else [],
                heads="none" if is_lora else name,
                max_new_tokens=6,
            )
            replies[name] = said(deployment.client.generate(request))
        return replies

    first = answers()
    places = [each.residency for each in deployment.client.list_adapters()]
    assert Adapter.DEVICE in places
    assert any(place != Adapter.DEVICE for place in places), "everything fitted"
    assert answers() == first


def test_a_restart_serves_everything_again(deployment: Deployment) -> None:
    """By `lorastack serve` as it is, without a script."""
    requests = batch_of_8()
    before = together(deployment.client, requests)
    digests = {each.id: each.digest for each in deployment.client.list_adapters()}
    deployment.stop()
    deployment.start(scripted=False)
    assert {each.id: each.digest for each in deployment.client.list_adapters()} == digests
    after = together(deployment.client, requests)
    assert list(map(said, after)) == list(map(said, before))
    assert [reply.adapters for reply in after] == [reply.adapters for reply in before]


def test_what_is_deleted_is_gone(deployment: Deployment, folders: dict[str, Path]) -> None:
    request = ask(stack=[("lora-r8", 1.0)], heads=HEADS, max_new_tokens=6)
    before = deployment.client.generate(request)
    deployment.adapters("delete", "lora-r8")
    listed = {each["id"] for each in deployment.adapters("list")["adapters"]}
    assert listed == folders.keys() - {"lora-r8"}
    with pytest.raises(NotFoundError):
        deployment.client.generate(request)
    deployment.adapters("upload", str(folders["lora-r8"]), "--id", "lora-r8")
    again = deployment.client.generate(request)
    assert said(again) == said(before)
    assert again.adapters == before.adapters


@pytest.mark.skipif(REAL[REAL_HEADS] not in os.environ, reason=f"without {REAL[REAL_HEADS]}")
def test_real_heads_guess(deployment: Deployment, folders: dict[str, Path]) -> None:
    stack = [(name, 1.0) for name in folders if name == "lora-real"]
    deployment.client.load(REAL_HEADS)
    request = ask("Write a short story about a fox.", stack=stack, heads=REAL_HEADS)
    drafted = deployment.client.generate(request)
    request.speculation.mode = pb.OFF
    assert said(drafted) == said(deployment.client.generate(request))
    assert sum(drafted.speculation.accepted_by_head) > 0
