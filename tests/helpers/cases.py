"""Random requests of every kind, and the adapters that they name, for a tiny float64 model."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch

from lorastack.adapters.formats.parse import parse
from lorastack.adapters.memory.device import DeviceAdapter
from lorastack.engine.views import AdapterViews
from lorastack.layout import EMBED, LAYER_TARGETS, LM_HEAD
from lorastack.lora.weights import LoraWeights
from lorastack.model.backends.base import Backend
from lorastack.model.backends.load import load_backend
from lorastack.request import (
    Grammar,
    HeadsUse,
    LoraUse,
    Request,
    SamplingParams,
    SpeculationParams,
    StopParams,
    TypicalAcceptance,
)
from lorastack.text.grammar import GrammarCompiler, JsonSchema, Regex
from lorastack.text.tokenizer import Tokenizer
from tests.helpers.adapters import write_lora
from tests.helpers.packed import pack, read_tensors
from tests.helpers.scripted import Bench, scripted_heads

BUNDLE = "bundle"  # a LoRA and two heads under one digest
HEADS = {"heads-1": 1, "heads-3": 3, "heads-5": 5, BUNDLE: 2}
LORAS = ("lora-2", "lora-7", "lora-16", BUNDLE)
SCALES = (1.0, 1.0, 0.5, -0.7, 1.3)
GRAMMARS = (
    Regex("The answer is (yes|no|not known), and [a-z]{2,8} says so\\."),
    Regex("[a-c]{3,30}"),
    Regex("(ab|abc|b+c){2,9}"),
    JsonSchema('{"type": "object", "properties": {"name": {"enum": ["owl", "owlet", "bat"]},'
               ' "legs": {"type": "integer"}, "wise": {"type": "boolean"}},'
               ' "required": ["name", "legs", "wise"], "additionalProperties": false}'),
    JsonSchema('{"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 6}'),
)  # fmt: skip
WORDS = [
    "the",
    "owl",
    "and",
    "the",
    "bat",
    "sat",
    "by",
    "the",
    "fjord",
    "naïve",
    "日本",
    "1",
    "2",
    "3",
]


def build_bench(model: Path, folder: Path, decoder: Backend | None = None) -> Bench:
    """model: a folder; folder: where the adapters are written. decoder: its backend, or None for
    plain torch in float64."""
    if decoder is None:
        decoder = load_backend(
            model, device=torch.device("cpu"), dtype=torch.float64, max_context=None, native=False
        )
    shapes = decoder.shapes
    everything = (*LAYER_TARGETS, EMBED, LM_HEAD)
    folders = {
        "lora-2": write_lora(folder / "2", shapes, seed=1, rank=2, targets=everything),
        "lora-7": write_lora(folder / "7", shapes, seed=2, rank=7, layers=[shapes.num_layers - 1]),
        "lora-16": write_lora(folder / "16", shapes, seed=3, rank=16, targets=("q_proj", LM_HEAD)),
        BUNDLE: write_lora(folder / BUNDLE, shapes, seed=4, rank=3, strength=0.8),
    }
    adapters = {}
    for digest, path in folders.items():
        parsed = parse({file.name: file for file in path.iterdir()}, shapes)
        heads = HEADS.get(digest, 0)
        layout, buffer = pack(read_tensors(parsed), parsed.scales, heads, decoder.dtype)
        buffer = buffer.to(decoder.device)
        views = AdapterViews(LoraWeights.from_buffer(buffer, layout, digest), None)
        adapters[digest] = DeviceAdapter(digest=digest, buffer=buffer, layout=layout, views=views)
    for digest, heads in HEADS.items():
        adapters.setdefault(digest, scripted_heads(digest, heads))
    return Bench(decoder, Tokenizer.load(model), adapters)


class Cases:
    """Requests for a bench."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._tokenizer = bench.tokenizer
        self._vocab_size = bench.decoder.shapes.vocab_size
        compiler = GrammarCompiler(bench.tokenizer, self._vocab_size)
        self._grammars: list[Grammar] = [compiler.compile(each) for each in GRAMMARS]

    def request(self, name: str, chance: random.Random) -> Request:
        loras = sorted(chance.sample(LORAS, chance.choice((0, 0, 1, 1, 2, 3))))
        heads = chance.choice((None, *3 * (*HEADS,)))
        return Request(
            request_id=name,
            prompt_ids=tuple(self._prompt(chance)),
            sampling=self._sampling(chance),
            stop=self._stop(chance),
            speculation=self._speculation(chance),
            loras=tuple(
                LoraUse(lora_id=digest, digest=digest, scale=chance.choice(SCALES))
                for digest in loras
            ),
            heads=HeadsUse(medusa_id=heads, digest=heads) if heads else None,
            num_logprobs=chance.choice((None, None, 0, 1, 5)),
            grammar=chance.choice(self._grammars) if chance.random() < 0.2 else None,
        )

    def _prompt(self, chance: random.Random) -> list[int]:
        """Some begin alike, so that they share pages; some repeat themselves."""
        words = [WORDS[index % len(WORDS)] for index in range(chance.choice((0, 3, 9, 9, 20)))]
        words += chance.choices(WORDS, k=chance.randrange(6)) * chance.choice((1, 1, 3))
        return self._tokenizer.encode(" ".join(words))

    def _sampling(self, chance: random.Random) -> SamplingParams:
        def at_times(value: float, otherwise: float) -> float:
            return value if chance.random() < 0.25 else otherwise

        biased = chance.sample(range(self._vocab_size), chance.choice((0, 0, 0, 1, 8)))
        return SamplingParams(
            temperature=at_times(0.0, chance.uniform(0.2, 2.0)),
            top_k=int(at_times(chance.choice((1, 5, 40, 500)), 0)),
            top_p=at_times(chance.uniform(0.2, 1.0), 1.0),
            min_p=at_times(chance.uniform(0.0, 0.3), 0.0),
            typical_p=at_times(chance.uniform(0.2, 1.0), 1.0),
            repetition_penalty=at_times(chance.uniform(0.5, 2.0), 1.0),
            frequency_penalty=at_times(chance.uniform(-2.0, 2.0), 0.0),
            presence_penalty=at_times(chance.uniform(-2.0, 2.0), 0.0),
            logit_bias=tuple((token, chance.uniform(-100.0, 8.0)) for token in biased),
            seed=chance.getrandbits(64),
        )

    def _stop(self, chance: random.Random) -> StopParams:
        stop_ids = chance.sample(range(self._vocab_size), chance.choice((0, 0, 0, 6)))
        return StopParams(
            max_new_tokens=chance.randint(1, 36),
            stop_token_ids=frozenset(stop_ids),
            ignore_eos=chance.random() < 0.5,
            time_limit=chance.uniform(5.0, 40.0) if chance.random() < 0.05 else None,
        )

    @staticmethod
    def _speculation(chance: random.Random) -> SpeculationParams:
        typical = TypicalAcceptance(epsilon=chance.uniform(0.01, 1.0), delta=chance.uniform(0.1, 2))
        return SpeculationParams(
            enabled=chance.random() < 0.95,
            max_nodes=chance.choice((None, None, None, None, 0, 1, 2, 4, 16, 64)),
            typical=typical if chance.random() < 0.06 else None,
        )


def off(request: Request) -> Request:
    """The same without drafts and without haste."""
    stop = replace(request.stop, time_limit=None)
    return replace(request, stop=stop, speculation=SpeculationParams(enabled=False))


def stopping(request: Request, text: str, chance: random.Random) -> Request:
    """With stop sequences, one of them out of its own text."""
    start = chance.randrange(len(text))
    sequences = ("qqq", text[start : start + chance.randint(1, 6)])
    return replace(request, stop=replace(request.stop, stop_sequences=sequences))
