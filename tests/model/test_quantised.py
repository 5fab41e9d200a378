"""Models whose weights are quantised as they are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorastack.errors import InvalidArgumentError
from lorastack.kernels.native.library import library
from lorastack.kernels.quantize import Kind, dequantise, quantise_torch
from lorastack.model.backends.load import load_backend
from tests.helpers.tiny import VOCAB_SIZE, build_llama

CPU = torch.device("cpu")
KINDS = list(Kind)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("model"), tie_word_embeddings=request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_head_rows_are_those_that_are_multiplied(
    folder: Path, dtype: torch.dtype, native: bool, kind: Kind
) -> None:
    decoder = load_backend(
        folder, device=CPU, dtype=dtype, max_context=None, native=native, quantize=kind
    )
    tensors = load_file(folder / "model.safetensors")
    weight = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).to(dtype)
    ids = [0, 1, 15, 16, 40, VOCAB_SIZE - 1]
    out_NH = torch.full((len(ids), weight.shape[1]), torch.nan, dtype=dtype)
    decoder.head_rows(ids, out_NH)
    assert torch.equal(out_NH, dequantise(quantise_torch(weight, Kind.INT8))[ids].to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_native_runs_bfloat16_and_torch_the_rest(folder: Path, kind: Kind) -> None:
    def backend(dtype: torch.dtype | None) -> str:
        decoder = load_backend(folder, device=CPU, dtype=dtype, max_context=None, quantize=kind)
        assert decoder.quantization == kind
        return decoder.name.partition(" ")[0]

    assert backend(torch.float32) == "torch"
    assert backend(None) == backend(torch.bfloat16) == ("native" if library() else "torch")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.embed_tokens.weight",
    ],
)
def test_what_is_not_finite_is_refused_by_name(
    tmp_path: Path, name: str, bad: float, native: bool, kind: Kind
) -> None:
    folder = build_llama(tmp_path / "model", attention_bias=True)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][-1, 3] = bad
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidArgumentError, match=f"{name} holds NaN or infinity.*--quantize"):
        load_backend(
            folder,
            device=CPU,
            dtype=torch.bfloat16,
            max_context=None,
            native=native,
            quantize=kind,
        )
