"""What heads are worth in service: the engine's own trees, one row at a time, greedy.

Each prompt is answered without drafts first, and then with each of the heads, so that whatever else
the machine does meanwhile slows all of them down alike. Tokens never differ; if they do, the model
runs in a form that is not lossless (`LoadedModel.lossless`), and the difference is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from lorastack.request import (
    HeadsUse,
    LoraUse,
    Request,
    SamplingParams,
    SpeculationParams,
    StopParams,
)
from lorastack.train.local import LocalEngine, Reply

OFF, AUTO = SpeculationParams(enabled=False), SpeculationParams()


@dataclass(slots=True, kw_only=True)
class Decoding:
    """What some replies took, the steps of their prompts left out.

    accepted_K: accepted tokens of each head. num_different: replies whose tokens are not those of
    decoding without drafts.
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


@dataclass(frozen=True, slots=True)
class Served:
    """Decoding of the same prompts without drafts, and with each of the heads."""

    off: Decoding
    auto: tuple[Decoding, ...]

    def speedup(self, heads: int) -> float:
        """Tokens a second with these heads over those without drafts; 0 if nothing was decoded."""
        slow = self.off.tokens_per_second
        return self.auto[heads].tokens_per_second / slow if slow else 0.0


def serve(
    engine: LocalEngine,
    prompts: Sequence[tuple[int, ...]],
    loras: tuple[LoraUse, ...],
    heads: Sequence[HeadsUse],
    *,
    max_new_tokens: int,
    on_plain: Callable[[int, Reply], None] = lambda index, reply: None,
    progress: Callable[[int], None] = lambda done: None,
) -> Served:
    """Answers every prompt, without drafts and with each of the heads.

    on_plain: gets each prompt's reply without drafts, which captures its states. progress: gets the
    number of prompts that are done. The first prompt is answered once more before, with everything,
    and does not count then: heads come to the device, and memory is touched for the first time.
    """
    for each in heads:
        engine.load(each.digest)
    numbers = count()

    def ask(prompt_ids: tuple[int, ...], use: HeadsUse | None) -> Reply:
        request = Request(
            request_id=f"served-{next(numbers)}",
            prompt_ids=prompt_ids,
            sampling=SamplingParams(),
            stop=StopParams(max_new_tokens=max_new_tokens),
            speculation=OFF if use is None else AUTO,
            loras=loras,
            heads=use,
            capture_states=use is None,
        )
        (reply,) = engine.run([request])
        return reply

    served = Served(Decoding(), tuple(Decoding() for _ in heads))
    for index, prompt_ids in enumerate([*prompts[:1], *prompts], start=-1):
        plain = ask(prompt_ids, None)
        drafted = [ask(prompt_ids, use) for use in heads]
        if index < 0:
            continue
        served.off.add(plain)
        on_plain(index, plain)
        for decoding, reply in zip(served.auto, drafted, strict=True):
            decoding.add(reply)
            decoding.num_different += _ids(reply) != _ids(plain)
        progress(index + 1)
    return served


def _ids(reply: Reply) -> list[int]:
    return [token.id for token in reply.tokens]
