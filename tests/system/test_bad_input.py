"""Bad input is refused with a status, a stable reason and a remedy, and disturbs nobody."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorastack.errors import (
    InvalidArgumentError,
    LorastackError,
    NotFoundError,
    Reason,
    UnimplementedError,
)
from lorastack.layout import ModelShapes
from lorastack.v1 import generation_pb2 as pb
from tests.helpers.adapters import write_heads, write_lora
from tests.helpers.live import LiveServer, ask
from tests.helpers.tiny import VOCAB_SIZE

Refusal = tuple[pb.GenerateRequest, type[LorastackError], Reason, str]


def sampling(**fields: Any) -> pb.GenerateRequest:
    return ask(sampling=fields)


def speculation(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="x", speculation=pb.Speculation(**fields))


REQUESTS: dict[str, Refusal] = {
    "unknown lora": (
        ask(stack=[("nobody", 1.0)]),
        NotFoundError,
        Reason.ADAPTER_NOT_FOUND,
        "nobody",
    ),
    "unknown lora in a stack": (
        ask(stack=[("random-a", 1.0), ("nobody", 0.5)]),
        NotFoundError,
        Reason.ADAPTER_NOT_FOUND,
        "nobody",
    ),
    "unknown heads": (ask(heads="nobody"), NotFoundError, Reason.ADAPTER_NOT_FOUND, "nobody"),
    "heads as a lora": (
        ask(stack=[("heads-2", 1.0)]),
        InvalidArgumentError,
        Reason.WRONG_ADAPTER_KIND,
        "heads-2",
    ),
    "a lora as heads": (
        ask(heads="random-a"),
        InvalidArgumentError,
        Reason.WRONG_ADAPTER_KIND,
        "random-a",
    ),
    **{
        name: (request, InvalidArgumentError, Reason.INVALID_REQUEST, word)
        for name, request, word in (
            ("empty prompt", ask(""), "prompt"),
            ("no input", pb.GenerateRequest(), "input"),
            ("no token ids", pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids"),
            ("unknown token id", ask([1, VOCAB_SIZE]), "token"),
            ("no messages", pb.GenerateRequest(chat=pb.ChatMessages()), "chat"),
            ("max_new_tokens 0", ask(max_new_tokens=0), "max_new_tokens"),
            ("negative temperature", sampling(temperature=-0.1), "temperature"),
            ("temperature nan", sampling(temperature=float("nan")), "temperature"),
            ("top_p 0", sampling(top_p=0.0), "top_p"),
            ("top_p above 1", sampling(top_p=1.1), "top_p"),
            ("min_p above 1", sampling(min_p=1.5), "min_p"),
            ("typical_p 0", sampling(typical_p=0.0), "typical_p"),
            ("repetition_penalty 0", sampling(repetition_penalty=0.0), "repetition_penalty"),
            ("frequency_penalty 3", sampling(frequency_penalty=3.0), "frequency_penalty"),
            ("presence_penalty -3", sampling(presence_penalty=-3.0), "presence_penalty"),
            ("unknown biased id", sampling(logit_bias={VOCAB_SIZE: 1.0}), "logit_bias"),
            (
                "epsilon 0",
                speculation(acceptance=pb.TYPICAL, typical_epsilon=0.0),
                "typical_epsilon",
            ),
            ("delta without TYPICAL", speculation(typical_delta=0.3), "typical_delta"),
            ("lora_id and loras", ask(stack=[("random-a", 1.0)], loras=[pb.LoraRef()]), "lora"),
            ("twice the same lora", ask(stack=[("random-a", 1.0), ("random-a", 1.0)]), "random-a"),
            ("scale inf", ask(stack=[("random-a", float("inf"))]), "scale"),
            (
                "unknown stop id",
                pb.GenerateRequest(prompt="x", stop=pb.StopParams(stop_token_ids=[VOCAB_SIZE])),
                "stop_token_ids",
            ),
            ("empty stop sequence", ask(stop=[""]), "stop_sequences"),
            ("bad request id", ask(request_id="has spaces"), "request_id"),
        )
    },
    "prompt beyond the context": (
        ask([5] * 16_384),
        InvalidArgumentError,
        Reason.REQUEST_TOO_LARGE,
        "16384",
    ),
    "output beyond the context": (
        ask([5] * 16_000, max_new_tokens=1000),
        InvalidArgumentError,
        Reason.REQUEST_TOO_LARGE,
        "1000",
    ),
    "expression that does not parse": (
        ask(response_format=pb.ResponseFormat(regex="ab(")),
        InvalidArgumentError,
        Reason.INVALID_GRAMMAR,
        "character 3",
    ),
    "schema that is no JSON": (
        ask(response_format=pb.ResponseFormat(json_schema='{"type"')),
        InvalidArgumentError,
        Reason.INVALID_GRAMMAR,
        "line 1 column 7",
    ),
    "schema that cannot be compiled": (
        ask(response_format=pb.ResponseFormat(json_schema='{"not": {}}')),
        InvalidArgumentError,
        Reason.INVALID_GRAMMAR,
        "not",
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_bad_requests_are_refused(live: LiveServer, name: str) -> None:
    request, kind, reason, word = REQUESTS[name]
    for call in (live.client.generate, live.stream):
        with pytest.raises(kind) as refusal:
            call(request)
        assert type(refusal.value) is kind
        assert refusal.value.reason is reason
        assert word in refusal.value.message
        assert refusal.value.metadata["request_id"]


def test_bad_requests_disturb_no_running_row(live: LiveServer, zoo: dict[str, Path]) -> None:
    request = ask("steady", stack=[("random-b", 1.0)], heads="heads-5", ignore_eos=True)
    request.stop.max_new_tokens = 400
    alone = live.client.generate(request)
    running = live.client.stream(request)
    tokens = list(next(running).token_ids)
    for bad, kind, _, _ in REQUESTS.values():
        with pytest.raises(kind):
            live.client.generate(bad)
        tokens += next(running).token_ids
    tokens += [token for part in running for token in part.token_ids]
    assert tokens == list(alone.token_ids)


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _configure(folder: Path, **fields: object) -> None:
    path = next(folder.glob("*config.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def bad_folders(root: Path, shapes: ModelShapes) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Folder and words that the refusal must contain."""
    hidden = shapes.hidden_size
    cases: dict[str, tuple[Path, tuple[str, ...]]] = {}

    def lora(name: str, *words: str) -> Path:
        folder = write_lora(root / name, shapes, targets=("q_proj",))
        cases[name] = (folder, words)
        return folder

    def heads(name: str, size: int, *words: str) -> Path:
        folder = write_heads(root / name, size)
        cases[name] = (folder, words)
        return folder

    heads("heads of another size", 48, "0.0.linear", "48", f"{hidden}")
    _configure(heads("heads of another version", hidden, "version"), version="1")
    _configure(heads("heads of another number", hidden, "medusa_num_heads"), medusa_num_heads=4)

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("lora_A.weight")]:
            tensors[name] = torch.zeros(8, hidden + 16)

    _rewrite(lora("lora of another base", "q_proj", str(hidden + 16), str(hidden)), widen)

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values()))[0, 0] = float("nan")

    _rewrite(lora("nan", "q_proj"), poison)
    truncated = lora("truncated", "adapter_model.safetensors") / "adapter_model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-100])
    lying = lora("lying header", "adapter_model.safetensors") / "adapter_model.safetensors"
    lying.write_bytes((1 << 40).to_bytes(8, "little") + lying.read_bytes()[8:])
    pickled = lora("pickle", "adapter_model.bin")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    (lora("broken json", "adapter_config.json") / "adapter_config.json").write_text("{")
    _configure(lora("dora", "use_dora"), use_dora=True)
    _configure(lora("modules_to_save", "modules_to_save"), modules_to_save=["lm_head"])
    _configure(lora("pissa", "init_lora_weights"), init_lora_weights="pissa")
    _configure(lora("unknown field", "use_telepathy"), use_telepathy=True)
    _configure(lora("rank lies", "q_proj"), r=4)
    _configure(lora("another method", "peft_type"), peft_type="IA3")
    return cases


def test_bad_adapters_are_refused_and_nothing_is_stored(
    live: LiveServer, tmp_path: Path, tiny_llama_shapes: ModelShapes
) -> None:
    before = [adapter.id for adapter in live.client.list_adapters()]
    running = live.client.stream(ask("steady", ignore_eos=True, max_new_tokens=400))
    tokens = list(next(running).token_ids)
    for name, (folder, words) in bad_folders(tmp_path, tiny_llama_shapes).items():
        with pytest.raises((InvalidArgumentError, UnimplementedError)) as refusal:
            live.client.upload(folder, "broken")
        for word in words:
            assert word in refusal.value.message, (name, refusal.value.message)
        with pytest.raises(NotFoundError):
            live.client.get_adapter("broken")
    assert [adapter.id for adapter in live.client.list_adapters()] == before
    tokens += [token for part in running for token in part.token_ids]
    alone = live.client.generate(ask("steady", ignore_eos=True, max_new_tokens=400))
    assert tokens == list(alone.token_ids)


@pytest.mark.parametrize("name", ["../up", "a b", "", "none", "base", "x/../y", "a/b/c", "é"])
def test_bad_ids_are_refused(live: LiveServer, zoo: dict[str, Path], name: str) -> None:
    with pytest.raises(InvalidArgumentError):
        live.client.upload(zoo["say-owl"], name)
