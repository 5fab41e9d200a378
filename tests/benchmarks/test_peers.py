"""A peer's process, its protocol, and the file that peers read instead of ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.peers import process
from benchmarks.peers.gguf_file import interleaved, write_gguf
from benchmarks.peers.protocol import Done, Job, Load
from tests.test_layering import ROOT

ECHO = """
from benchmarks.peers.protocol import Done, serve

class Echo:
    mixed_loras = True
    def __init__(self, load):
        self.name = f"echo with {load.threads} threads"
        print("a library's words")  # not part of the reply
    def generate(self, job):
        if not job.prompts:
            raise ValueError("no prompts")
        return Done(1.0, 2.0, job.new_tokens, [list(prompt) for prompt in job.prompts])

serve(Echo)
"""


def test_a_peer_answers_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # where -m would look
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\n{ECHO}")
    script.chmod(0o755)
    log = tmp_path / "log"
    with process.peer("echo", script, Load("model", threads=3), log) as peer:
        assert (peer.name, peer.mixed_loras) == ("echo with 3 threads", True)
        done = peer.generate(Job([[1, 2], [3]], 5, [(), ("a",)]))
        assert done == Done(1.0, 2.0, 5, [[1, 2], [3]])
        with pytest.raises(RuntimeError, match="no prompts"):
            peer.generate(Job([], 5, []))
    assert "a library's words" in log.read_text()


def test_only_finished_environments_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "FOLDER", tmp_path)
    python = tmp_path / "one" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    assert process.python_of("one") is None
    (tmp_path / "one" / ".venv" / ".installed").touch()
    assert process.python_of("one") == python


def test_interleaving_makes_neighbours_of_what_rope_turns() -> None:
    weight = np.arange(2 * 6, dtype=np.float32).reshape(12, 1)  # two heads of six
    assert interleaved(weight, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_gguf_holds_every_weight(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(tiny_llama, path, gguf.GGMLQuantizationType.F16)
    reader = gguf.GGUFReader(path)
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    weights = load_file(tiny_llama / "model.safetensors")
    config = json.loads((tiny_llama / "config.json").read_text())
    assert len(by_name) == len(weights)
    q = weights["model.layers.1.self_attn.q_proj.weight"]
    wanted = interleaved(q, config["num_attention_heads"]).astype(np.float16)
    assert np.array_equal(by_name["blk.1.attn_q.weight"].data, wanted)
    down = weights["model.layers.0.mlp.down_proj.weight"].astype(np.float16)
    assert np.array_equal(by_name["blk.0.ffn_down.weight"].data, down)
    assert by_name["output_norm.weight"].tensor_type is gguf.GGMLQuantizationType.F32
    tokens = reader.get_field("tokenizer.ggml.tokens")
    assert tokens is not None and len(tokens.data) == config["vocab_size"]
