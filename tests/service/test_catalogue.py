"""Ids to digests, heads by rule, whose chat template is whose, and what may not be served."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from lorastack.adapters.catalogue import Catalogue
from lorastack.adapters.store.registry import Registry
from lorastack.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    LorastackError,
    NotFoundError,
    Reason,
)
from lorastack.layout import ModelShapes
from lorastack.text.tokenizer import Tokenizer
from tests.helpers.tiny import CHATML
from tests.service.fakes import served_model, store


@pytest.fixture(scope="module")
def catalogue(registry: Registry, tokenizer: Tokenizer, shapes: ModelShapes) -> Catalogue:
    return Catalogue(served_model(tokenizer, shapes), registry, "")


def heads_of(
    catalogue: Catalogue, loras: Sequence[tuple[str, float]] = (), medusa_id: str = ""
) -> str | None:
    _, heads = catalogue.resolve(loras, medusa_id)
    return None if heads is None else heads.medusa_id


def test_which_heads_a_request_gets(
    catalogue: Catalogue, registry: Registry, tokenizer: Tokenizer, shapes: ModelShapes
) -> None:
    with_default = Catalogue(served_model(tokenizer, shapes), registry, "heads")
    lora, bundle, both = (("lora", 1.0),), (("bundle", 1.0),), (("bundle", 1.0), ("lora", 1.0))
    assert heads_of(catalogue) is None
    assert heads_of(with_default) == "heads"
    assert heads_of(catalogue, loras=lora) is None
    assert heads_of(with_default, loras=lora) == "heads"
    assert heads_of(catalogue, loras=bundle) == "bundle"
    assert heads_of(with_default, loras=bundle) == "bundle"
    assert heads_of(catalogue, loras=both) is None  # only the request's only LoRA brings its heads
    assert heads_of(with_default, loras=both) == "heads"
    assert heads_of(with_default, loras=bundle, medusa_id="none") is None
    assert heads_of(with_default, loras=bundle, medusa_id="heads") == "heads"
    assert heads_of(catalogue, medusa_id="bundle") == "bundle"


@pytest.mark.parametrize(
    ("loras", "medusa_id", "kind", "reason"),
    [
        ((("no", 1.0),), "", NotFoundError, Reason.ADAPTER_NOT_FOUND),
        ((), "no", NotFoundError, Reason.ADAPTER_NOT_FOUND),
        ((("heads", 1.0),), "", InvalidArgumentError, Reason.WRONG_ADAPTER_KIND),
        ((), "lora", InvalidArgumentError, Reason.WRONG_ADAPTER_KIND),
        ((("none", 1.0),), "", InvalidArgumentError, Reason.INVALID_REQUEST),
        ((("base", 1.0),), "", InvalidArgumentError, Reason.INVALID_REQUEST),
        ((), "default", InvalidArgumentError, Reason.INVALID_REQUEST),
        (
            (("lora", 1.0), ("copy-of-lora", 1.0)),
            "",
            InvalidArgumentError,
            Reason.INVALID_REQUEST,
        ),
    ],
)
def test_wrong_adapters_are_refused_by_name(
    catalogue: Catalogue,
    loras: tuple[tuple[str, float], ...],
    medusa_id: str,
    kind: type[LorastackError],
    reason: Reason,
) -> None:
    with pytest.raises(kind) as caught:
        catalogue.resolve(loras, medusa_id)
    assert caught.value.reason is reason
    name = medusa_id or loras[-1][0]
    assert name in str(caught.value)


def test_an_adapter_of_another_base_model_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, shapes: ModelShapes, folders: Mapping[str, Path]
) -> None:
    registry = Registry(tmp_path / "store")
    store(registry, "old", folders["lora"], shapes, fingerprint="sha256:" + "00" * 32)
    catalogue = Catalogue(served_model(tokenizer, shapes), registry, "")
    with pytest.raises(FailedPreconditionError, match="old") as caught:
        catalogue.resolve((("old", 1.0),), "")
    assert caught.value.reason is Reason.BASE_MODEL_DIFFERS


def test_a_stack_is_sorted_by_digest_whatever_its_order(
    catalogue: Catalogue, registry: Registry
) -> None:
    one, _ = catalogue.resolve((("lora", 0.5), ("other", 2.0)), "")
    two, _ = catalogue.resolve((("other", 2.0), ("lora", 0.5)), "")
    assert one == two
    assert [use.digest for use in one] == sorted(use.digest for use in one)
    assert {(use.lora_id, use.scale) for use in one} == {("lora", 0.5), ("other", 2.0)}
    assert {use.digest for use in one} == {
        registry.resolve("lora").digest,
        registry.resolve("other").digest,
    }


def test_a_revision_can_be_named(catalogue: Catalogue, registry: Registry) -> None:
    name = f"lora@{registry.resolve('lora').digest}"
    (use,), _ = catalogue.resolve(((name, 1.0),), "")
    assert (use.lora_id, use.digest) == (name, registry.resolve("lora").digest)


def test_which_chats_need_a_loras_own_template(
    catalogue: Catalogue, registry: Registry, tokenizer: Tokenizer, folders: Mapping[str, Path]
) -> None:
    assert catalogue.own_template("chatty") == "{{ messages[-1]['content'] | upper }}"
    assert catalogue.own_template("lora") is None
    with pytest.raises(NotFoundError):
        catalogue.own_template("no")
    # Read once: the store's files may be as slow as they like.
    files = registry.files(registry.resolve("chatty").digest)
    files["chat_template.jinja"].rename(files["chat_template.jinja"].with_suffix(".away"))
    try:
        assert catalogue.own_template("chatty") is not None
    finally:
        files["chat_template.jinja"].with_suffix(".away").rename(files["chat_template.jinja"])


def test_a_loras_template_that_is_the_models_needs_no_worker(
    catalogue: Catalogue,
    registry: Registry,
    shapes: ModelShapes,
    folders: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    for name, files in {
        "same": {"chat_template.jinja": CHATML},
        "same-in-config": {"tokenizer_config.json": json.dumps({"chat_template": CHATML})},
        "named": {
            "tokenizer_config.json": json.dumps(
                {"chat_template": [{"name": "default", "template": "mine"}]}
            )
        },
    }.items():
        folder = tmp_path / name
        shutil.copytree(folders["lora"], folder)
        for file, text in files.items():
            (folder / file).write_text(text)
        store(registry, name, folder, shapes)
    assert catalogue.own_template("same") is None
    assert catalogue.own_template("same-in-config") is None
    assert catalogue.own_template("named") == "mine"
