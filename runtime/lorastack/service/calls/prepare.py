"""From a validated call to the engine's Request: ids to digests, text to tokens.

Everything here blocks (tokeniser, registry files, grammars) and runs in a worker thread, once a
request. Nothing here runs what a caller wrote: `service.calls.intake` has that done before.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

from lorastack.adapters.catalogue import Catalogue
from lorastack.errors import InvalidArgumentError, Reason
from lorastack.request import Grammar, Request, StopParams
from lorastack.service.calls.call import Chat, GenerateCall, Given, Ids, Rendered, Text
from lorastack.service.calls.served import ServedModel
from lorastack.service.edge import limits
from lorastack.text.grammar import GrammarCompiler, JsonSchema, Regex


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request for the engine and, when asked for, its prompt's text."""

    request: Request
    prompt: str


class Preparer:
    """Turns calls into requests. Thread-safe; it keeps grammars only."""

    def __init__(self, model: ServedModel, catalogue: Catalogue) -> None:
        self._model = model
        self._catalogue = catalogue
        self.grammars = GrammarCompiler(model.tokenizer, model.vocab_size)

    def prepare(
        self, call: GenerateCall, deadline: float | None, grammar_bytes: int = 0
    ) -> Prepared:
        """The request of a call. deadline: time.monotonic() seconds.

        grammar_bytes: what the grammar takes, as its trial measured. Raises LorastackError.
        """
        loras, heads = self._catalogue.resolve(call.loras, call.medusa_id)
        prompt_ids = self.encode(call.input)
        if call.num_prompt_logprobs is not None:
            limits.check_prompt_logprobs(len(prompt_ids), call.num_prompt_logprobs)
        sampling = call.sampling
        if not call.seeded and not sampling.greedy:
            sampling = replace(sampling, seed=secrets.randbits(64))
        wanted = call.response_format
        request = Request(
            request_id=call.request_id,
            prompt_ids=prompt_ids,
            sampling=sampling,
            stop=self._stop(call, len(prompt_ids)),
            speculation=call.speculation,
            loras=loras,
            # Heads that may not draft are checked like all others, but neither loaded nor reported.
            heads=heads if call.speculation.enabled else None,
            num_logprobs=call.num_logprobs,
            num_prompt_logprobs=call.num_prompt_logprobs,
            deadline=deadline,
            grammar=None if wanted is None else self._grammar(wanted, prompt_ids, grammar_bytes),
        )
        return Prepared(request, self._prompt_text(call, prompt_ids) if call.return_prompt else "")

    def check_num_messages(self, num_messages: int) -> None:
        """Raises InvalidArgumentError for a chat of more messages than the context has tokens."""
        if num_messages > self._model.max_context:
            raise InvalidArgumentError(
                f"chat holds {num_messages} messages, the context {self._model.max_context} "
                "tokens; send fewer",
                reason=Reason.REQUEST_TOO_LARGE,
                field="chat",
                max_context=str(self._model.max_context),
            )

    def check_length(self, num_bytes: int, field: str) -> None:
        """Raises InvalidArgumentError for text of more bytes than can fit the context."""
        if num_bytes > self._model.max_text:
            raise InvalidArgumentError(
                f"{field} holds {num_bytes} bytes of text, and more than {self._model.max_text} "
                f"never fit the context of {self._model.max_context} tokens; shorten it",
                reason=Reason.REQUEST_TOO_LARGE,
                field=field,
                max_context=str(self._model.max_context),
            )

    def spans(self, prompt: str) -> list[tuple[int, int]]:
        """The characters (from, up to) of each token that `encode` gives for a prompt."""
        return self._model.tokenizer.spans(prompt)

    def encode(self, given: Given) -> tuple[int, ...]:
        """The token ids of a prompt; the model's own template makes text of a chat.

        Raises InvalidArgumentError if it is empty, too long, or has a token that the model lacks.
        """
        tokenizer = self._model.tokenizer
        match given:
            case Ids(ids):
                prompt_ids = ids
            case Text(text):
                self.check_length(len(text.encode()), "prompt")
                prompt_ids = tuple(tokenizer.encode(text))
            case Chat(messages):
                assert given.is_plain, "the rest is rendered before, in a worker process"
                return self.encode(Rendered(tokenizer.render(messages)))
            case Rendered(text):
                self.check_length(len(text.encode()), "chat")
                prompt_ids = tuple(tokenizer.encode_part(text))
        if not prompt_ids:
            raise InvalidArgumentError("the prompt holds no tokens; send at least one")
        self._check_known(prompt_ids)
        return prompt_ids

    def _check_known(self, prompt_ids: tuple[int, ...]) -> None:
        """Tokenizers may have tokens behind the model's last one, which the model cannot run."""
        if (last := max(prompt_ids)) >= self._model.vocab_size:
            text = self._model.tokenizer.token_text(last)
            raise InvalidArgumentError(
                f"the prompt holds the token {text!r} (id {last}), which the model does not have: "
                f"it has {self._model.vocab_size} tokens; leave it out",
                field="input",
            )

    def _grammar(
        self, wanted: JsonSchema | Regex, prompt_ids: tuple[int, ...], num_bytes: int
    ) -> Grammar:
        joiner = self._model.tokenizer.joiner(prompt_ids)
        if joiner.has_broken_bytes:
            raise InvalidArgumentError(
                "token_ids ends inside a character, in byte tokens: behind those no text is sure "
                "to follow a response_format; end it with a whole character",
                field="token_ids",
            )
        return self.grammars.compile(wanted, joiner.num_dropped, num_bytes)

    def _stop(self, call: GenerateCall, num_prompt: int) -> StopParams:
        limit, asked = self._model.max_context, call.max_new_tokens
        if num_prompt + (asked or 1) > limit:
            output = "" if asked is None else f" and max_new_tokens {asked}"
            raise InvalidArgumentError(
                f"a prompt of {num_prompt} tokens{output} does not fit the context of {limit} "
                "tokens; shorten one of them",
                reason=Reason.REQUEST_TOO_LARGE,
                prompt_tokens=str(num_prompt),
                max_context=str(limit),
            )
        return replace(call.stop, max_new_tokens=asked or limit - num_prompt)

    def _prompt_text(self, call: GenerateCall, prompt_ids: tuple[int, ...]) -> str:
        if isinstance(call.input, Text):
            return call.input.text
        return self._model.tokenizer.decode(prompt_ids)
