"""From a validated call to the engine's Request: ids to digests, text to tokens.

Everything here blocks (tokeniser, registry files, grammars) and runs in a worker thread, once a
request. Nothing here runs what a caller wrote: `service.intake` has that done before.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, replace

from lorastack.adapters.store.ids import NO_HEADS, RESERVED_IDS
from lorastack.adapters.store.manifest import Record
from lorastack.adapters.store.registry import Registry
from lorastack.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    LorastackError,
    Reason,
    ResourceExhaustedError,
)
from lorastack.request import (
    Grammar,
    HeadsUse,
    LoraUse,
    Request,
    SamplingParams,
    SpeculationParams,
    StopParams,
)
from lorastack.service.templates import OwnTemplates
from lorastack.text.grammar import GrammarCompiler, JsonSchema, Regex
from lorastack.text.tokenizer import Tokenizer

TEXT_SLACK = 1024  # bytes beyond what fills the context: a tokenizer may drop some

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt as plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class Ids:
    """A prompt as token ids, run as they are."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation: (role, content) pairs for a chat template."""

    messages: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation that an adapter's own chat template has made text of."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """A GenerateRequest whose fields are each valid; filled by service.convert."""

    request_id: str
    input: Text | Ids | Chat | Rendered
    loras: tuple[tuple[str, float], ...]  # (id, scale)
    medusa_id: str
    sampling: SamplingParams
    seeded: bool  # False: the server draws the seed
    max_new_tokens: int | None  # None: up to the context limit
    stop: StopParams  # its max_new_tokens still open
    speculation: SpeculationParams
    num_logprobs: int | None
    return_prompt: bool
    response_format: JsonSchema | Regex | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What the edge knows of the base model."""

    name: str
    fingerprint: str
    tokenizer: Tokenizer
    vocab_size: int
    max_context: int
    device: str
    dtype: str
    quantization: str
    backend: str
    kv_memory: int  # bytes
    threads: int = 0  # of the CPU, in a step; 0: unknown

    @property
    def max_text(self) -> int:
        """Bytes of text: more cannot fit the context, however long its tokens are."""
        return self.max_context * self.tokenizer.longest_token + TEXT_SLACK


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request for the engine and, when asked for, its prompt's text."""

    request: Request
    prompt: str


class Preparer:
    """Turns calls into requests. Thread-safe; it keeps grammars and templates only."""

    def __init__(self, model: ServedModel, registry: Registry, fixed_default: str) -> None:
        """fixed_default: --medusa, an id or NO_HEADS, which wins over what the store says; "" if
        not given."""
        self._model = model
        self._registry = registry
        self._fixed_default = fixed_default
        self._templates = OwnTemplates(registry, model.tokenizer.chat_template)
        self.grammars = GrammarCompiler(model.tokenizer, model.vocab_size)

    def prepare(
        self, call: GenerateCall, deadline: float | None, grammar_bytes: int = 0
    ) -> Prepared:
        """deadline: time.monotonic() seconds. grammar_bytes: as the grammar's trial found.

        Raises the user's errors.
        """
        records = [self.lora(lora_id) for lora_id, _ in call.loras]
        heads = self._heads(call.medusa_id, records)
        prompt_ids = self.encode(call.input)
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
            loras=_stack(call.loras, records),
            # Heads that may not draft are checked like all others, but neither loaded nor reported.
            heads=heads if call.speculation.enabled else None,
            num_logprobs=call.num_logprobs,
            deadline=deadline,
            grammar=None if wanted is None else self._grammar(wanted, prompt_ids, grammar_bytes),
        )
        return Prepared(request, self._prompt_text(call, prompt_ids) if call.return_prompt else "")

    def lora(self, lora_id: str) -> Record:
        """The record of a LoRA or bundle. Raises NotFoundError; InvalidArgumentError for heads."""
        record = self._record(lora_id, "lora_id")
        if not record.manifest.facts.kind.has_lora:
            raise InvalidArgumentError(
                f"{lora_id!r} holds Medusa heads, not a LoRA; name it as medusa_id",
                reason=Reason.WRONG_ADAPTER_KIND,
                adapter_id=lora_id,
            )
        return record

    def heads(self, medusa_id: str) -> HeadsUse:
        """The heads of an id. Raises NotFoundError; InvalidArgumentError for a plain LoRA."""
        record = self._record(medusa_id, "medusa_id")
        if not record.manifest.facts.kind.has_heads:
            raise InvalidArgumentError(
                f"{medusa_id!r} holds a LoRA without Medusa heads; name it as lora_id",
                reason=Reason.WRONG_ADAPTER_KIND,
                adapter_id=medusa_id,
            )
        return HeadsUse(medusa_id=medusa_id, digest=record.digest)

    @property
    def default_medusa(self) -> str:
        """The id of the server's default heads; "" if there are none."""
        if self._fixed_default == NO_HEADS:
            return ""
        return self._fixed_default or self._registry.default_medusa()

    def default_heads(self) -> HeadsUse | None:
        """The server's default heads as of now: an upload under their id changes them.

        Those of --medusa must be there. Those that the store remembers may have been made for
        another base model; then requests go without.
        """
        if self._fixed_default == NO_HEADS:
            return None
        if self._fixed_default:
            return self.heads(self._fixed_default)
        stored = self._registry.default_medusa()
        try:
            return self.heads(stored) if stored else None
        except LorastackError as error:
            logger.warning("no default heads: %s", error.message)
            return None

    def set_default_medusa(self, medusa_id: str) -> HeadsUse | None:
        """Makes heads the default, for good; "": none. Raises what keeps them from being that."""
        if self._fixed_default:
            raise FailedPreconditionError(
                f"the server was started with --medusa {self._fixed_default}, which wins; restart "
                "it without to choose default heads here",
                reason=Reason.DEFAULT_IS_FIXED,
                adapter_id=self._fixed_default,
            )
        heads = self.heads(medusa_id) if medusa_id else None
        self._registry.set_default_medusa(medusa_id)
        return heads

    def is_compatible(self, record: Record) -> bool:
        """It was validated against the base model that this server runs."""
        return record.manifest.base_fingerprint == self._model.fingerprint

    def servable(self, adapter_id: str) -> Record:
        """The record of any adapter for this base model. Raises NotFoundError and the like."""
        record = self._registry.resolve(adapter_id)
        if not self.is_compatible(record):
            raise FailedPreconditionError(
                f"{adapter_id!r} was stored for another base model than {self._model.name}, which "
                "this server runs; upload it again",
                reason=Reason.BASE_MODEL_DIFFERS,
                adapter_id=adapter_id,
            )
        return record

    def with_ids(self, error: LorastackError) -> LorastackError:
        """What an error about pinned memory means to a caller, who knows ids rather than digests.

        Any other error stays what it is.
        """
        if error.reason is not Reason.DEVICE_MEMORY_PINNED:
            return error
        digests = error.metadata["digests"].split(",")
        ids = {record.digest: record.id for record in self._registry.list()}
        names = ", ".join(sorted(ids.get(digest, digest) for digest in digests))
        return ResourceExhaustedError(
            f"{error.message} (pinned: {names})",
            reason=error.reason,
            adapter_ids=names,
            digests=error.metadata["digests"],
        )

    def own_template(self, lora_id: str) -> str | None:
        """A LoRA's own chat template; None if the model's serves for it too.

        Raises NotFoundError and the like.
        """
        return self._templates.of(self.lora(lora_id).digest)

    def check_num_messages(self, num_messages: int) -> None:
        """Raises InvalidArgumentError for more than there can be tokens, unread."""
        if num_messages > self._model.max_context:
            raise InvalidArgumentError(
                f"chat holds {num_messages} messages, the context {self._model.max_context} "
                "tokens; send fewer",
                reason=Reason.REQUEST_TOO_LARGE,
                field="chat",
                max_context=str(self._model.max_context),
            )

    def check_length(self, num_bytes: int, field: str) -> None:
        """Raises InvalidArgumentError for text that cannot fit the context, unread."""
        if num_bytes > self._model.max_text:
            raise InvalidArgumentError(
                f"{field} holds {num_bytes} bytes of text, and more than {self._model.max_text} "
                f"never fit the context of {self._model.max_context} tokens; shorten it",
                reason=Reason.REQUEST_TOO_LARGE,
                field=field,
                max_context=str(self._model.max_context),
            )

    def encode(self, given: Text | Ids | Chat | Rendered) -> tuple[int, ...]:
        """The ids that the model runs. A chat becomes text by the model's own template here."""
        tokenizer = self._model.tokenizer
        match given:
            case Ids(ids):
                prompt_ids = ids
            case Text(text):
                self.check_length(len(text.encode()), "prompt")
                prompt_ids = tuple(tokenizer.encode(text))
            case Chat(messages):
                return self.encode(Rendered(tokenizer.render(messages)))
            case Rendered(text):
                self.check_length(len(text.encode()), "chat")
                prompt_ids = tuple(tokenizer.encode_part(text))
        if not prompt_ids:
            raise InvalidArgumentError("the prompt holds no tokens; send at least one")
        self._check_known(prompt_ids)
        return prompt_ids

    def _check_known(self, prompt_ids: tuple[int, ...]) -> None:
        """Tokenizers may have tokens behind the model's last one, which no row can run."""
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

    def _record(self, adapter_id: str, field: str) -> Record:
        if adapter_id in RESERVED_IDS:
            raise InvalidArgumentError(
                f"{adapter_id!r} is a reserved word, not an adapter; leave {field} empty for the "
                "default" + (f", or say {NO_HEADS!r} for no heads" if field == "medusa_id" else ""),
                field=field,
            )
        return self.servable(adapter_id)

    def _heads(self, medusa_id: str, records: list[Record]) -> HeadsUse | None:
        if medusa_id == NO_HEADS:
            return None
        if medusa_id:
            return self.heads(medusa_id)
        if len(records) == 1 and records[0].manifest.facts.kind.has_heads:
            return HeadsUse(medusa_id=records[0].id, digest=records[0].digest)
        return self.default_heads()

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


def _stack(loras: tuple[tuple[str, float], ...], records: list[Record]) -> tuple[LoraUse, ...]:
    uses = [
        LoraUse(lora_id=lora_id, digest=record.digest, scale=scale)
        for (lora_id, scale), record in zip(loras, records, strict=True)
    ]
    by_digest: dict[str, LoraUse] = {}
    for use in uses:
        if (other := by_digest.setdefault(use.digest, use)) is not use:
            raise InvalidArgumentError(
                f"loras names the same adapter twice: {other.lora_id!r} and {use.lora_id!r}; "
                "name it once and add the scales",
                field="loras",
            )
    return tuple(by_digest[digest] for digest in sorted(by_digest))
