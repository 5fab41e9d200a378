"""In which memory weights are read, and which lm_head is used."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorastack.errors import InvalidArgumentError
from lorastack.model.backends.load import load_backend
from lorastack.model.checkpoint import Checkpoint
from lorastack.model.config import load_config
from lorastack.model.context import ForwardBatch, RowSpan
from lorastack.model.weights import Packing, load_weights


@pytest.mark.parametrize("copies", [True, False])
def test_only_backends_that_copy_get_one_memory_for_all(tiny_mistral: Path, copies: bool) -> None:
    seen: list[Tensor] = []

    def pack(weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        seen.append(weight_OI)
        return weight_OI.clone()

    weights = load_weights(
        Checkpoint(tiny_mistral),
        load_config(tiny_mistral, None),
        device=torch.device("cpu"),
        dtype=torch.float32,
        packing=Packing(pack, pair=pack, head=pack, copies=copies),
    )
    memories = {tensor.data_ptr() for tensor in seen}
    if (
        copies
    ):  # it grows with the largest matrix so far: q, k and v, then gate and up, then lm_head
        assert len(memories) <= 3 < len(seen)
    else:
        assert len(memories) == len(seen)
    layer = weights.layers[0]
    for name, rows in (("gate_proj", slice(0, 96)), ("up_proj", slice(96, 192))):
        stored = torch.empty(96, 64)
        Checkpoint(tiny_mistral).read_into(f"model.layers.0.mlp.{name}.weight", stored)
        assert torch.equal(layer.gate_up[rows], stored)


CPU, EMBED, HEAD = torch.device("cpu"), "model.embed_tokens.weight", "lm_head.weight"
IDS = [9, 30, 200, 77, 8]


def stored(source: Path, folder: Path, *, tie: bool, embed: str, head: str) -> Path:
    """A copy of a tied model. embed, head: "same", "other" numbers or "" for not stored."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tie}))
    tensors = load_file(folder / "model.safetensors")
    weight = tensors.pop(EMBED)
    for name, kind in ((EMBED, embed), (HEAD, head)):
        if kind:
            tensors[name] = weight.clone() if kind == "same" else weight.flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logits_of(folder: Path) -> Tensor:
    decoder = load_backend(folder, device=CPU, dtype=torch.float32, max_context=64)
    kv = decoder.make_kv(2, 16)
    batch = ForwardBatch(IDS, (RowSpan(0, 5, [0], 0),), range(5))
    rows = torch.empty(3, decoder.shapes.hidden_size)
    decoder.head_rows([5, 6, 7], rows)
    outputs = decoder.forward(batch, kv)
    # What heads with a draft vocabulary read is the lm_head that the model uses.
    torch.testing.assert_close(outputs.hidden_XH @ rows.T, outputs.logits_XV[:, 5:8])
    return outputs.logits_XV


@pytest.mark.parametrize(
    ("tie", "embed", "head"),
    [
        *((True, "same", head) for head in ("", "same", "other")),
        (True, "", "same"),  # the embedding is the lm_head then
        *((False, "same", head) for head in ("same", "other")),
    ],
)
def test_the_lm_head_is_the_one_that_transformers_uses(
    tiny_llama: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    tie: bool,
    embed: str,
    head: str,
) -> None:
    folder = stored(tiny_llama, tmp_path / "model", tie=tie, embed=embed, head=head)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0]
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(logits_of(folder), expected, atol=3e-4, rtol=1e-4)
    assert ("lm_head differs" in caplog.text) == (tie and head == "other")


def test_an_untied_head_must_be_stored(tiny_llama: Path, tmp_path: Path) -> None:
    folder = stored(tiny_llama, tmp_path / "model", tie=False, embed="same", head="")
    with pytest.raises(InvalidArgumentError, match=r"no tensor lm_head\.weight"):
        logits_of(folder)


def test_stored_copies_of_any_dtype_and_shape(tiny_llama: Path, tmp_path: Path) -> None:
    folder = stored(tiny_llama, tmp_path / "model", tie=True, embed="same", head="same")
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors[HEAD].to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits_of(folder), expected, atol=3e-4, rtol=1e-4)
    tensors[HEAD] = tensors[HEAD][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InvalidArgumentError, match=r"lm_head\.weight has shape"):
        logits_of(folder)
