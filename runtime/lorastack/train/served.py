"""What heads are worth in service: the engine's own trees, one row at a time, greedy.

Each prompt is answered without drafts first, and then with each of the heads, so that whatever else
the machine does slows all of them down alike. Tokens differ only where the model runs in a form
that is not lossless (`LoadedModel.lossless`); then the replies are counted that do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from lorastack.request import (
    HeadsUse,
    LoraUse,
    Request,
    SamplingParams,
    SpeculationParams,
    StopParams,
)
from lorastack.speculation.calibration import Calibration
from lorastack.train.local import LocalEngine, Reply

OFF, AUTO = SpeculationParams(enabled=False), SpeculationParams()


@dataclass(slots=True, kw_only=True)
class Decoding:
    """What some replies took, the steps of their prompts left out.

    num_different: replies whose tokens are not those of decoding without drafts.
    """

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    num_different: int = 0

    def add(self, reply: Reply) -> None:
        """Count a reply. Its first token comes from its prompt's own step."""
        final = reply.final
        self.tokens += final.generated_tokens - 1
        self.steps += final.speculation.steps
        self.seconds += final.timings.total - final.timings.time_to_first_token

    @property
    def tokens_per_step(self) -> float:
        """1 without drafts; 0 if nothing was decoded."""
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """0 if nothing was decoded."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Decoding of the same prompts without drafts, and with some heads.

    learnt: what the engine knows about the heads now, a calibration's JSON; "" if nothing.
    """

    num_prompts: int
    off: Decoding
    auto: Decoding
    learnt: str

    def to_json(self) -> dict[str, Any]:
        """Numbers rounded to four places; without what was learnt."""
        slow, fast = self.off.tokens_per_second, self.auto.tokens_per_second
        return {
            "prompts": self.num_prompts,
            "tokens": self.auto.tokens,
            "tokens_a_step": round(self.auto.tokens_per_step, 4),
            "tokens_a_second": round(fast, 4),
            "tokens_a_second_without_drafts": round(slow, 4),
            "speed_up": round(fast / slow, 4) if slow else 0.0,
            "different_replies": self.auto.num_different,
        }


def serve(
    engine: LocalEngine,
    prompts: Sequence[Sequence[int]],
    loras: tuple[LoraUse, ...],
    heads: Sequence[HeadsUse],
    *,
    max_new_tokens: int,
    on_plain: Callable[[int, Reply], None] = lambda index, reply: None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Served]:
    """Answers every prompt, without drafts and with each of the heads; a result for each of these.

    on_plain: gets each prompt's reply without drafts, which captures its states. progress: gets the
    number of prompts that are done. The first prompt is answered once more before, with everything,
    and does not count then: heads come to the device, and memory is touched for the first time.
    """
    for each in heads:
        engine.load(each)
    numbers = count()

    def ask(prompt_ids: Sequence[int], use: HeadsUse | None) -> Reply:
        request = Request(
            request_id=f"served-{next(numbers)}",
            prompt_ids=tuple(prompt_ids),
            sampling=SamplingParams(),
            stop=StopParams(
                max_new_tokens=min(max_new_tokens, engine.max_context - len(prompt_ids))
            ),
            speculation=OFF if use is None else AUTO,
            loras=loras,
            heads=use,
            capture_states=use is None,
        )
        (reply,) = engine.run([request])
        return reply

    off, auto = Decoding(), [Decoding() for _ in heads]
    for index, prompt_ids in enumerate([*prompts[:1], *prompts], start=-1):
        plain = ask(prompt_ids, None)
        drafted = [ask(prompt_ids, use) for use in heads]
        if index < 0:
            continue
        off.add(plain)
        on_plain(index, plain)
        for decoding, reply in zip(auto, drafted, strict=True):
            decoding.add(reply)
            decoding.num_different += _ids(reply) != _ids(plain)
        progress(index + 1)
    learnt = engine.learned()
    return [
        Served(num_prompts=len(prompts), off=off, auto=decoding, learnt=_json(learnt, use))
        for decoding, use in zip(auto, heads, strict=True)
    ]


def _ids(reply: Reply) -> list[int]:
    return [token.id for token in reply.tokens]


def _json(learnt: Mapping[str, Calibration], use: HeadsUse) -> str:
    known = learnt.get(use.digest)
    return "" if known is None else known.to_json()
