"""A peer's process, its protocol, and the file that peers read instead of ours."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.peers import process
from benchmarks.peers.gguf_file import interleaved, write_gguf
from benchmarks.peers.process import PeerError
from benchmarks.peers.protocol import About, Done, Job, Load
from tests.helpers import peer_scripts
from tests.test_layering import ROOT

JOB = Job([[1, 2], [3]], 5, [(), ("a",)])
LOADS = {
    "def loaded(): raise ValueError('no such CPU')": "exit status 1: ValueError: no such CPU",
    "def loaded(): os.abort()": "SIGABRT",
    "def loaded(): sys.exit()": "exit status 0",
    "print('rubbish', flush=True)": "wrong output: 'rubbish'",
    "print('[1]', flush=True)": "wrong output: '\\[1\\]'",
    'print(\'{"name": "no more"}\', flush=True)': "wrong output",
}
ANSWERS = {
    "def generated(job): raise ValueError('no room')": "exit status 1: ValueError: no room",
    "def generated(job): os.abort()": "SIGABRT",
    "def generated(job): return Done(1.0, 2.0, 3, [])": "wrong output: 0 rows",
    "def generated(job): return Done(1.0, 2.0, 3, [[1], [3] * 5])": "of \\[1, 5\\] tokens",
    "def generated(job): return Done(1.0, 0.0, 3, [[1] * 5, [3] * 5])": "wrong output: it counts",
}


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # where -m would look
    monkeypatch.delenv("LORASTACK_ISA", raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)


def test_a_peer_answers_line_by_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = peer_scripts.write(tmp_path / "python")
    with process.peer("echo", script, Load("model", threads=3), log) as peer:
        assert peer.about == About("peer with 3 threads", "float32", "all", mixed_loras=True)
        assert peer.generate(JOB) == Done(1.0, 2.0, 3, [[1] * 5, [3] * 5])
    assert "a library's words" in log.read_text()


@pytest.mark.parametrize("lines", LOADS)
def test_a_peer_that_does_not_load_says_why(tmp_path: Path, lines: str) -> None:
    script = peer_scripts.write(tmp_path / "python", lines)
    with (
        pytest.raises(PeerError, match=LOADS[lines]) as error,
        process.peer("echo", script, Load("model"), tmp_path / "log"),
    ):
        pass
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lines", ANSWERS)
def test_a_peer_that_cannot_answer_says_why(tmp_path: Path, lines: str) -> None:
    script = peer_scripts.write(tmp_path / "python", lines)
    with process.peer("echo", script, Load("model"), tmp_path / "log") as peer:
        with pytest.raises(PeerError, match=ANSWERS[lines]) as error:
            peer.generate(JOB)
        assert "\n" not in str(error.value)


def test_a_silent_peer_is_ended(tmp_path: Path) -> None:
    script = peer_scripts.write(tmp_path / "python", "time.sleep(3600)")
    with (
        pytest.raises(PeerError, match=r"silent for 0.5 s"),
        process.peer("echo", script, Load("model"), tmp_path / "log", patience=0.5),
    ):
        pass


def test_an_environment_without_its_interpreter_is_a_reason(tmp_path: Path) -> None:
    with (
        pytest.raises(PeerError, match="No such file"),
        process.peer("echo", tmp_path / "gone", Load("model"), tmp_path / "log"),
    ):
        pass


def test_peers_are_limited_as_our_server_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = peer_scripts.write(tmp_path / "python")
    seen = {}
    for isa in ("avx2", "avx512-bf16", "plain"):
        monkeypatch.setenv("LORASTACK_ISA", isa)
        with process.peer("echo", script, Load("model"), tmp_path / "log") as peer:
            seen[isa] = peer.about.instructions
    assert seen == {"avx2": "AVX2", "avx512-bf16": "AVX512_CORE_BF16", "plain": "all"}


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
