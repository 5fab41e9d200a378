"""Reading safetensors in place; files that are missing, truncated or lie."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lorastack.errors import InvalidArgumentError
from lorastack.model import checkpoint
from lorastack.model.backends.load import load_backend
from lorastack.model.checkpoint import Checkpoint
from tests.helpers.isas import needs_native
from tests.helpers.tiny import build_llama

SINGLE = "model.safetensors"


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def refused(folder: Path, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        load_backend(folder, device=torch.device("cpu"), dtype=torch.float32, max_context=None)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [8, checkpoint.PIECE])
def test_reads_into_rows_of_a_larger_tensor(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    stored: torch.dtype,
    wanted: torch.dtype,
    piece: int,
):
    """piece: bytes that are read and converted at once."""
    monkeypatch.setattr(checkpoint, "PIECE", piece)
    weight = torch.randn(3, 5).to(stored)
    save_file({"other": torch.zeros(7), "weight": weight}, tmp_path / SINGLE)
    joined = torch.zeros(8, 5, dtype=wanted)
    read: list[tuple[int, int]] = []
    checkpoint_ = Checkpoint(tmp_path).reporting(lambda done, total: read.append((done, total)))
    checkpoint_.read_into("weight", joined[2:5])
    assert torch.equal(joined[2:5], weight.to(wanted))
    assert not joined[:2].any() and not joined[5:].any()
    nbytes = 15 * stored.itemsize
    assert read == [(min(end, nbytes), nbytes + 28) for end in range(piece, nbytes + piece, piece)]


@pytest.mark.parametrize("wanted", [torch.float64, torch.bfloat16])
def test_a_piece_is_filled_again_only_when_its_copy_has_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wanted: torch.dtype
):
    """Copies that begin as late as they may, as on a device, read what was sent."""
    weight = torch.randn(25, 7)
    save_file({"weight": weight}, tmp_path / SINGLE)
    late: list[Callable[[], object]] = []
    ahead: list[int] = []

    def turns(device: torch.device, count: int, dtype: torch.dtype):
        return deque((torch.empty(count, dtype=dtype), int) for _ in range(2))

    def send(piece_X: Tensor, part_X: Tensor) -> Callable[[], object]:
        late.append(lambda: part_X.copy_(piece_X))
        ahead.append(len(late))
        return lambda: late.pop(0)()

    monkeypatch.setattr(checkpoint, "PIECE", 64)
    monkeypatch.setattr(checkpoint, "_turns", turns)
    monkeypatch.setattr(checkpoint, "_send", send)
    out = torch.full((25, 7), torch.nan, dtype=wanted)
    Checkpoint(tmp_path).read_into("weight", out)
    while late:
        late.pop(0)()
    assert torch.equal(out, weight.to(out.dtype))
    assert max(ahead) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_weights_on_a_gpu_are_those_of_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wanted: torch.dtype
):
    monkeypatch.setattr(checkpoint, "PIECE", 4096)
    weight = torch.randn(1000, 37)
    save_file({"weight": weight}, tmp_path / SINGLE)
    out = torch.empty(1000, 37, dtype=wanted, device="cuda")
    Checkpoint(tmp_path).read_into("weight", out)
    assert torch.equal(out.cpu(), weight.to(wanted))


def test_unknown_missing_and_misshapen_tensors_are_named(folder: Path):
    norm = "model.layers.1.input_layernorm.weight"
    rewrite(folder, lambda tensors: tensors.update({norm: torch.ones(63)}))
    refused(folder, rf"{re.escape(norm)} has shape \(63,\), config.json wants \(64,\)")
    rewrite(folder, lambda tensors: tensors.pop(norm))
    refused(folder, f"no tensor {re.escape(norm)}")
    rewrite(folder, lambda tensors: tensors.update({norm: torch.ones(64)}))
    rewrite(folder, lambda tensors: tensors.update({"medusa_head.0.weight": torch.ones(2)}))
    refused(folder, "medusa_head.0.weight is not known")


def test_old_rotary_buffers_and_a_tied_copy_are_ignored(folder: Path):
    rewrite(
        folder,
        lambda tensors: tensors.update(
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
                "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
            }
        ),
    )
    load_backend(folder, device=torch.device("cpu"), dtype=torch.float32, max_context=None)


def test_heads_beside_the_backbone_are_read_by_others(folder: Path):
    """A Medusa-2 checkpoint, which says so in its config.json."""
    head = "medusa_head.0.0.linear.weight"
    rewrite(folder, lambda tensors: tensors.update({head: torch.ones(64, 64)}))
    refused(folder, f"{re.escape(head)} is not known")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"medusa_num_heads": 1}))
    load_backend(folder, device=torch.device("cpu"), dtype=torch.float32, max_context=None)


def test_weights_of_gptq_and_awq_are_refused(folder: Path):
    name = "model.layers.0.self_attn.q_proj.qweight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(2, 2, dtype=torch.int32)}))
    refused(folder, rf"GPTQ or AWQ \({re.escape(name)}\).*--quantize int8")


PEAK = """
import sys
from pathlib import Path
import torch
from lorastack.model.backends.load import load_backend

def kib(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
decoder = load_backend(
    Path(sys.argv[1]), device=torch.device("cpu"), dtype=torch.bfloat16, max_context=None,
    quantize=sys.argv[2] or None,
)
print(kib("VmHWM") - kib("VmRSS"))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@needs_native
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", ["", "int8", "int4"])
def test_loading_takes_one_matrix_more_than_the_weights(
    tmp_path: Path, stored: torch.dtype, quantize: str
):
    """In the dtype that is wanted: not a second copy of it, and none in the stored dtype."""
    hidden, vocabulary, mebibyte = 1024, 24 * 1024, 1 << 20
    write_sparse(tmp_path, hidden, vocabulary, stored)
    command = [sys.executable, "-c", PEAK, str(tmp_path), quantize]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    matrix = hidden * vocabulary * 2
    assert int(run.stdout) * 1024 < matrix + 32 * mebibyte  # a second copy is 48


def write_sparse(folder: Path, hidden: int, vocabulary: int, dtype: torch.dtype) -> None:
    """A model of one layer, all zeros, that hardly takes room on the disk."""
    config = LlamaConfig(
        **{"hidden_size": hidden, "intermediate_size": hidden, "num_hidden_layers": 1},
        **{"vocab_size": vocabulary, "num_attention_heads": 8, "tie_word_embeddings": False},
        architectures=["LlamaForCausalLM"],
    )
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in LlamaForCausalLM(config).state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / SINGLE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def test_other_weight_types_are_refused(folder: Path):
    name = "model.norm.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    refused(folder, f"{name} is I8")


def test_a_truncated_file_is_refused(folder: Path):
    data = (folder / SINGLE).read_bytes()
    for length in (len(data) - 1, len(data) // 2, 100, 4, 0):
        (folder / SINGLE).write_bytes(data[:length])
        refused(folder, SINGLE)


def test_a_header_that_lies_is_refused(folder: Path):
    data = (folder / SINGLE).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["model.norm.weight"]["shape"] = [65]
    lie = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(len(lie).to_bytes(8, "little") + lie + data[8 + size :])
    refused(folder, "model.norm.weight")
    (folder / SINGLE).write_bytes((1 << 60).to_bytes(8, "little") + data[8:])
    refused(folder, "not a safetensors file")


def test_pickles_and_missing_files_are_refused(folder: Path):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin is a pickle: convert it to safetensors")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "neither model.safetensors nor")


def test_a_shard_that_is_missing_or_outside_is_refused(tmp_path: Path):
    folder = build_llama(tmp_path / "sharded", max_shard_size="100KB")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())
    shard = next(iter(weight_map["weight_map"].values()))
    for name in ("../model.safetensors", "gone.safetensors"):
        changed = {k: name if v == shard else v for k, v in weight_map["weight_map"].items()}
        index.write_text(json.dumps({"weight_map": changed}))
        refused(folder, re.escape(name))
    index.write_text("{}")
    refused(folder, "index.json")


@pytest.mark.parametrize(
    "text",
    [
        *('{"weight_map": ' + value + "}" for value in ("null", "[]", '"x"', "{}", "5", "NaN")),
        *('{"weight_map": {"a": ' + value + "}}" for value in ("null", "5", '["x"]', "{}", '""')),
        *('{"weight_map": {"a": "' + name + '"}}' for name in ("x" * 5000, "\\u0000", ".", "..")),
        *("[]", "null", "", "{", "[" * 100_000, '{"weight_map": {"a": "\\udc00"}}'),
    ],
    ids=lambda text: text[:40],
)
def test_an_odd_index_is_refused_by_file_and_field(folder: Path, text: str):
    (folder / SINGLE).unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InvalidArgumentError, match=r"model\.safetensors\.index\.json") as refusal:
        Checkpoint(folder)
    assert len(refusal.value.message) < 600 and "\n" not in refusal.value.message
