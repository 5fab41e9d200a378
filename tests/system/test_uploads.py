"""What a server takes in by its own rules: base models under other names, heads of version 1."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorastack.config import AdapterConfig
from lorastack.errors import FailedPreconditionError, InvalidArgumentError, Reason
from lorastack.layout import ModelShapes
from tests.helpers.adapters import write_heads, write_lora
from tests.helpers.live import ROOMY, LiveServer, ask, wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[LiveServer]:
    store = tmp_path_factory.mktemp("uploads") / "store"
    config = AdapterConfig(store=store, base_names=("org/alias",))
    with LiveServer(tiny_llama, engine=ROOMY, adapters=config) as server:
        yield server


@pytest.mark.parametrize("named", ["org/alias", "mirror/Alias", "tiny-llama", ""])
def test_names_of_the_base_model(
    server: LiveServer, tmp_path: Path, tiny_llama_shapes: ModelShapes, named: str
) -> None:
    folder = write_lora(tmp_path / "lora", tiny_llama_shapes, base_model_name_or_path=named)
    adapter = server.client.upload(folder, "lora")
    assert (adapter.base_model, adapter.compatible) == (named, True)


def test_other_base_models_are_a_decision(
    server: LiveServer, tmp_path: Path, tiny_llama_shapes: ModelShapes
) -> None:
    folder = write_lora(tmp_path / "lora", tiny_llama_shapes, base_model_name_or_path="org/other")
    with pytest.raises(FailedPreconditionError, match="--base-name org/other") as refusal:
        server.client.upload(folder, "other")
    assert refusal.value.reason is Reason.BASE_MODEL_DIFFERS
    server.client.upload(folder, "other", accept_base=True)
    request = ask(stack=[("other", 1.0)], max_new_tokens=4, ignore_eos=True)
    assert len(server.client.generate(request).token_ids) == 4


@pytest.mark.parametrize(
    "named", ["someone/Tiny-Llama-bnb-4bit", "C:\\models\\tiny-llama", "/data/run/checkpoint-500"]
)
def test_names_that_trainers_write(
    server: LiveServer, tmp_path: Path, tiny_llama_shapes: ModelShapes, named: str
) -> None:
    folder = write_lora(tmp_path / "lora", tiny_llama_shapes, base_model_name_or_path=named)
    warnings = server.client.upload(folder, "lora").warnings
    assert [named in warning for warning in warnings] == ([True] if "checkpoint" in named else [])


def test_tokens_that_the_base_does_not_know(
    server: LiveServer, tmp_path: Path, tiny_llama: Path, tiny_llama_shapes: ModelShapes
) -> None:
    """A copy of the base's tokenizer is no matter; what it adds is said wherever it is shown."""
    folder = write_lora(tmp_path / "lora", tiny_llama_shapes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, folder)
    assert not server.client.upload(folder, "tokens").warnings
    added = folder / "added_tokens.json"
    added.write_text(json.dumps({"<tool>": tiny_llama_shapes.vocab_size}))
    reply = server.client.upload(folder, "tokens")
    assert ["'<tool>'" in warning for warning in reply.warnings] == [True]
    assert server.client.get_adapter("tokens").warnings == reply.warnings
    (listed,) = (each for each in server.client.list_adapters() if each.id == "tokens")
    assert listed.warnings == reply.warnings
    (known, *_) = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    added.write_text(json.dumps({known["content"]: known["id"] + 1}))
    with pytest.raises(InvalidArgumentError, match=r"added_tokens\.json gives token"):
        server.client.upload(folder, "tokens")


def test_version_one_heads_are_counted_with_their_outputs(
    server: LiveServer, tmp_path: Path, tiny_llama_shapes: ModelShapes
) -> None:
    hidden, vocab = tiny_llama_shapes.hidden_size, tiny_llama_shapes.vocab_size
    folder = write_heads(tmp_path / "heads", hidden, num_heads=2, num_blocks=2, vocab_size=vocab)
    adapter = server.client.upload(folder, "own")
    assert (adapter.num_heads, adapter.num_layers, adapter.medusa_version) == (2, 2, 1)

    def drafted() -> bool:
        request = ask(heads="own", max_new_tokens=8, ignore_eos=True)
        return server.client.generate(request).speculation.drafted_tokens > 0

    wait_until(drafted, "the heads draft")
    values = 2 * (2 * (hidden * hidden + hidden) + vocab * hidden)
    assert server.client.get_adapter("own").device_bytes == values * 4
