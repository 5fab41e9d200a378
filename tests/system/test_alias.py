"""Aliases on a running engine: the same tokens as what they stand for, and never the base's."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorastack.errors import InvalidArgumentError, NotFoundError
from lorastack.layout import ModelShapes
from lorastack.v1 import generation_pb2 as pb
from lorastack.v1.adapters_pb2 import Adapter
from tests.helpers.adapters import write_lora
from tests.helpers.canary import write_canary, write_canary_heads
from tests.helpers.live import LiveServer, ask
from tests.system.conftest import StartServer


@pytest.fixture
def server(
    start: StartServer, tmp_path: Path, tiny_llama: Path, tiny_llama_shapes: ModelShapes
) -> LiveServer:
    """Canaries of two words with heads, and a LoRA without a word."""
    server, shapes = start(), tiny_llama_shapes
    for word in ("owl", "bat"):
        server.upload(f"say-{word}", write_canary(tmp_path / word, tiny_llama, shapes, word))
        heads = write_canary_heads(tmp_path / f"{word}-heads", tiny_llama, shapes, word)
        server.upload(f"heads-{word}", heads)
    server.upload("random", write_lora(tmp_path / "random", shapes))
    return server


def answer(server: LiveServer, *stack: tuple[str, float], heads: str = "") -> pb.GenerateResponse:
    return server.client.generate(ask(stack=stack, heads=heads, ignore_eos=True))


def test_an_alias_says_what_its_parts_say(server: LiveServer) -> None:
    server.client.alias("owl", [("say-owl", 1.0)], "heads-owl")
    parts = (("random", 0.3), ("say-bat", 1.0))
    server.client.alias("mixed", parts, "heads-bat")
    for alias, stack, heads in (
        ("owl", (("say-owl", 1.0),), "heads-owl"),
        ("mixed", parts, "heads-bat"),
    ):
        server.load_heads(heads)
        by_alias, by_parts = answer(server, (alias, 1.0)), answer(server, *stack, heads=heads)
        assert by_alias.token_ids == by_parts.token_ids
        assert by_alias.adapters == by_parts.adapters
        assert [use.digest for use in by_alias.adapters.loras] == sorted(
            server.digests[name] for name, _ in stack
        )
        assert by_alias.adapters.medusa_id == heads
    assert "owlowl" in answer(server, ("owl", 1.0)).text
    assert answer(server, ("owl", 1.0), heads="none").adapters.medusa_id == ""
    assert answer(server, ("say-owl", 1.0), heads="owl").adapters.medusa_id == "heads-owl"
    assert server.client.get_adapter("mixed").residency == Adapter.DISK
    with pytest.raises(InvalidArgumentError, match="'owl' is an alias"):
        answer(server, ("owl", 1.0), ("random", 1.0))


def test_an_alias_follows_its_parts_and_its_own_revisions(server: LiveServer) -> None:
    first = server.client.alias("who", [("say-owl", 1.0)], "none")
    server.client.alias("who", [("say-bat", 1.0)], "none")
    assert "batbat" in answer(server, ("who", 1.0)).text
    assert "owlowl" in answer(server, (f"who@{first.digest}", 1.0)).text
    server.client.rollback("who", first.digest)
    assert "owlowl" in answer(server, ("who", 1.0)).text
    server.client.delete_adapter("say-owl")
    with pytest.raises(NotFoundError, match="alias 'who': no adapter 'say-owl'"):
        answer(server, ("who", 1.0))
    server.client.delete_adapter("who")
    with pytest.raises(NotFoundError, match="no adapter 'who'"):
        answer(server, ("who", 1.0))


def test_a_pinned_part_outlives_prunes(server: LiveServer, tmp_path: Path) -> None:
    """The digest that an alias names stays and is loaded again, whatever its id is now."""
    name = f"say-owl@{server.digests['say-owl']}"
    server.client.alias("owl", [(name, 1.0)], "none")
    server.client.upload(tmp_path / "bat", "say-owl")
    server.client.prune_revisions(keep=1)
    assert "batbat" in answer(server, ("say-owl", 1.0), heads="none").text
    assert "owlowl" in answer(server, ("owl", 1.0)).text
