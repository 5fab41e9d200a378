"""Self-distillation: a model's own answers to a file of prompts, into a corpus.

Heads must predict what their model says, not what a data set says, so the text that they learn from
is the model's own, LoRAs included. It comes from the engine that serves: many rows at once, drafts
where they pay, and each token with the state that predicted it.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lorastack.errors import InvalidArgumentError
from lorastack.request import Request, SamplingParams, SpeculationParams, StopParams
from lorastack.train.corpus import CorpusWriter, Sample
from lorastack.train.local import LocalEngine, Reply, Selection
from lorastack.train.prompts import Prompt, PromptFile

MOST_NAMED = 5  # skipped prompts that the log names; the rest are counted

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillOptions:
    """How answers are made. sampling.seed: each prompt's own seed comes from it and its number.

    num_top: of the model's best tokens to store with each token, for soft targets. drafts: False
    for no speculation; it changes no token.
    """

    max_new_tokens: int = 256
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_top: int = 0
    drafts: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """num_samples: in the corpus. num_skipped: prompts that fit no context or template. num_tokens:
    of all answers. tokens_per_second: of this run.
    """

    num_prompts: int
    num_samples: int
    num_skipped: int
    num_tokens: int
    tokens_per_second: float


def distill(
    engine: LocalEngine,
    prompts: PromptFile,
    selection: Selection,
    folder: Path,
    options: DistillOptions,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Progress:
    """Makes the corpus in `folder` (`train.corpus`), or goes on with it; the last progress.

    The same prompts, selection and options give the same corpus, whatever runs beside a row and
    however often it was interrupted. progress: called after every sample. Raises
    FailedPreconditionError where the folder holds another corpus, ResourceExhaustedError STORE_FULL
    (what is there stays, and the next call goes on), InvalidArgumentError if no prompt can be
    answered, and what a row fails with.
    """
    backend = engine.model.backend
    with CorpusWriter(
        folder,
        settings=_settings(engine, prompts, selection, options),
        hidden_size=backend.shapes.hidden_size,
        dtype=backend.dtype,
        num_top=options.num_top,
    ) as writer:
        asked = _Asked(engine, prompts, selection, options)
        watch = _Watch(prompts.num_prompts, writer, asked)
        with closing(engine.run(asked.requests(writer.numbers))) as replies:
            for reply in replies:
                writer.append(asked.sample(reply))
                progress(watch.look())
        if not writer.num_samples:
            raise InvalidArgumentError(
                f"{prompts.path}: none of its {prompts.num_prompts} prompts can be answered within "
                f"the context of {engine.max_context} tokens: shorten them; {asked.why_skipped}"
            )
        return watch.look()


class _Asked:
    """The requests of a file's prompts, made as they are taken, and samples of their replies."""

    def __init__(
        self,
        engine: LocalEngine,
        prompts: PromptFile,
        selection: Selection,
        options: DistillOptions,
    ) -> None:
        self.num_skipped = 0
        self.why_skipped = ""  # the last one
        self._engine = engine
        self._prompts = prompts
        self._selection = selection
        self._options = options
        self._running: dict[str, Prompt] = {}

    def requests(self, done: Collection[int]) -> Iterator[Request]:
        """Of all prompts but those whose numbers are in `done`, which may grow meanwhile."""
        for prompt in self._prompts:
            if prompt.number in done:
                continue
            try:
                request = self._request(prompt)
            except InvalidArgumentError as error:
                self.num_skipped += 1
                self.why_skipped = f"line {prompt.line}: {error.message}"
                level = logging.WARNING if self.num_skipped <= MOST_NAMED else logging.DEBUG
                log.log(level, "%s: skipped, %s", self._prompts.path, self.why_skipped)
                continue
            self._running[request.request_id] = prompt
            yield request

    def sample(self, reply: Reply) -> Sample:
        """The sample of a reply to one of the requests."""
        return sample_of(self._running.pop(reply.request.request_id), reply)

    def _request(self, prompt: Prompt) -> Request:
        """Raises InvalidArgumentError for a prompt that cannot be answered."""
        options, selection = self._options, self._selection
        prompt_ids = self._engine.encode(prompt, selection, room=1)
        room = self._engine.max_context - len(prompt_ids)
        seed = own_seed(options.sampling.seed, prompt.number)
        return Request(
            request_id=str(prompt.number),
            prompt_ids=prompt_ids,
            sampling=replace(options.sampling, seed=seed),
            stop=StopParams(max_new_tokens=min(options.max_new_tokens, room)),
            speculation=SpeculationParams(enabled=options.drafts),
            loras=selection.loras,
            heads=selection.heads if options.drafts else None,
            num_logprobs=options.num_top or None,
            capture_states=True,
        )


class _Watch:
    """How far a run has come."""

    def __init__(self, num_prompts: int, writer: CorpusWriter, asked: _Asked) -> None:
        self._num_prompts = num_prompts
        self._writer = writer
        self._asked = asked
        self._began = time.monotonic()
        self._tokens_before = writer.num_tokens

    def look(self) -> Progress:
        writer = self._writer
        seconds = max(time.monotonic() - self._began, 1e-6)
        return Progress(
            num_prompts=self._num_prompts,
            num_samples=writer.num_samples,
            num_skipped=self._asked.num_skipped,
            num_tokens=writer.num_tokens,
            tokens_per_second=(writer.num_tokens - self._tokens_before) / seconds,
        )


def sample_of(prompt: Prompt, reply: Reply) -> Sample:
    """What a corpus keeps of a prompt and its reply, which has captured its states."""
    assert reply.states_TH is not None
    top_ids_TN = top_logprobs_TN = None
    if reply.request.num_logprobs:
        tops = [token.logprobs.top for token in reply.tokens if token.logprobs is not None]
        top_ids_TN = torch.tensor([[token for token, _ in top] for top in tops])
        top_logprobs_TN = torch.tensor([[logprob for _, logprob in top] for top in tops])
    return Sample(
        number=prompt.number,
        prompt_key=prompt.key,
        prompt_ids=reply.request.prompt_ids,
        answer_ids=[token.id for token in reply.tokens],
        hidden_TH=reply.states_TH,
        top_ids_TN=top_ids_TN,
        top_logprobs_TN=top_logprobs_TN,
    )


def own_seed(seed: int, number: int) -> int:
    """The seed of a prompt's answer: 64 bits."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _settings(
    engine: LocalEngine, prompts: PromptFile, selection: Selection, options: DistillOptions
) -> dict[str, Any]:
    """All that decides what a corpus holds, and what it is of."""
    model = engine.model
    return {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "tokenizer": model.tokenizer.digest,
        "quantization": model.backend.quantization,
        "loras": [{"digest": use.digest, "scale": use.scale} for use in selection.loras],
        "prompts_sha256": prompts.sha256,
        "num_prompts": prompts.num_prompts,
        "max_new_tokens": options.max_new_tokens,
        "sampling": {
            **asdict(options.sampling),
            "logit_bias": [list(each) for each in options.sampling.logit_bias],
        },
    }
