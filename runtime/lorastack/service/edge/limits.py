"""The rules that the values of a request must follow; each refusal names its field.

Documented caps: 63 drafted tokens a step, 20 top logprobs, 16 LoRAs, 16 stop sequences of 256
characters, 1,024 stop token ids, 1,024 biased ids, 1,024 chat messages, repetition_penalty 0.01 to
100, LoRA scales of up to a million either way. Lengths come first: they are checked in the bytes
(`service.edge.wire`), and again before a list is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence, Sized
from dataclasses import dataclass

from lorastack.config import KIB, MIB
from lorastack.errors import InvalidArgumentError, Reason
from lorastack.request import (
    MAX_LORA_SCALE,
    MAX_LORAS,
    SamplingParams,
    StopParams,
    TypicalAcceptance,
)
from lorastack.text.grammar import JsonSchema, Regex

MAX_NODES = 63  # drafted tokens a step
MAX_TOP_LOGPROBS = 20
MAX_PROMPT_LOGPROBS = 1 << 18  # of a prompt's tokens and likely ones, in one reply
MAX_STOP_SEQUENCES = 16
MAX_STOP_SEQUENCE_CHARS = 256
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_MESSAGES = 1024  # in a chat
MAX_PENALTY = 2.0  # either way; frequency and presence
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
MAX_SCHEMA_CHARS = 65_536
MAX_REGEX_CHARS = 8_192
MAX_CHUNK = MIB  # bytes of one message of an upload
# No text has so many bytes a token on average; message_bytes also bounds what a call may cost.
TEXT_BYTES_A_TOKEN = 64
MIN_MESSAGE_BYTES = 4 * MIB
NAMES_BYTES = 16 * KIB  # bytes of a request that holds ids, digests, paths and numbers
FILE_SPEC_BYTES = KIB  # bytes of one FileSpec
REQUEST_ID = re.compile(r"[!-~]{1,128}")  # printable ASCII: it goes into logs and trailers


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long a request and its lists may be."""

    max_context: int  # tokens
    max_files: int

    @property
    def message_bytes(self) -> int:
        """The most bytes that the server receives in one message of any kind."""
        return max(MIN_MESSAGE_BYTES, TEXT_BYTES_A_TOKEN * self.max_context)

    def request_bytes(self, name: str) -> int:
        """The most bytes of one message, by its protobuf name."""
        header = NAMES_BYTES + FILE_SPEC_BYTES * self.max_files
        match name:
            case "GenerateRequest" | "TokenizeRequest":
                return self.message_bytes
            case "UploadAdapterRequest":
                return max(MAX_CHUNK + KIB, header)
            case "PlanUploadRequest":
                return header
        return NAMES_BYTES

    def longest(self, path: str) -> int:
        """The most entries of a list, by its path in a request. Raises KeyError without a bound."""
        return {
            "chat.messages": MAX_MESSAGES,
            "files": self.max_files,
            "header.files": self.max_files,
            "loras": MAX_LORAS,
            "sampling.logit_bias": MAX_LOGIT_BIASES,
            "stop.stop_sequences": MAX_STOP_SEQUENCES,
            "stop.stop_token_ids": MAX_STOP_TOKEN_IDS,
            "token_ids.ids": self.max_context,
        }[path]


def too_long(path: str, longest: int) -> InvalidArgumentError:
    """The error for a list that is longer than `Lengths.longest` says."""
    if path == "token_ids.ids":
        return InvalidArgumentError(
            f"token_ids holds more ids than the context, {longest}; shorten it",
            reason=Reason.REQUEST_TOO_LARGE,
            field="token_ids",
        )
    if path in ("files", "header.files"):
        return InvalidArgumentError(f"an adapter has 1 to {longest} files, not more", field=path)
    return InvalidArgumentError(f"{path} must be at most {longest} long", field=path)


def check_length(given: Sized, path: str, longest: int) -> None:
    """Refuses a list that is too long, before anything is made of it."""
    if len(given) > longest:
        raise too_long(path, longest)


def check(ok: bool, field: str, rule: str, value: object = None) -> None:
    """Raises InvalidArgumentError unless ok: `field` must be `rule`, got `value`."""
    if not ok:
        got = "" if value is None else f", got {value}"
        raise InvalidArgumentError(f"{field} must be {rule}{got}", field=field)


def check_request_id(request_id: str) -> None:
    """Refuses an id that may not be logged as it is; "" passes: we choose one."""
    check(
        not request_id or REQUEST_ID.fullmatch(request_id) is not None,
        "request_id",
        "1 to 128 printable ASCII characters without spaces",
    )


def check_prompt_ids(ids: Sequence[int], vocab_size: int, max_context: int) -> None:
    """Checks the length first: a list of millions is refused before it is read."""
    check(len(ids) > 0, "token_ids", "at least one id")
    if len(ids) > max_context:
        raise InvalidArgumentError(
            f"token_ids holds {len(ids)} ids, the context {max_context}; shorten it",
            reason=Reason.REQUEST_TOO_LARGE,
            field="token_ids",
        )
    _check_ids(ids, "token_ids", vocab_size)


def check_messages(messages: Sequence[tuple[str, str]]) -> None:
    """(role, content) pairs; which roles may follow each other is the template's business."""
    check(len(messages) > 0, "chat.messages", "at least one message")
    check_length(messages, "chat.messages", MAX_MESSAGES)
    check(all(role for role, _ in messages), "chat.messages.role", "set on every message")


def check_loras(loras: Sequence[tuple[str, float]]) -> None:
    """(id, scale) pairs. Two names of one adapter are found later, by digest."""
    check(len(loras) <= MAX_LORAS, "loras", f"at most {MAX_LORAS} long", len(loras))
    for lora_id, scale in loras:
        check(lora_id != "", "loras.lora_id", "set in every entry")
        rule = f"between {-MAX_LORA_SCALE:.0f} and {MAX_LORA_SCALE:.0f}"
        check(abs(scale) <= MAX_LORA_SCALE, "loras.scale", rule, scale)
    names = [lora_id for lora_id, _ in loras]
    check(len(set(names)) == len(names), "loras", "without duplicates", ", ".join(names))


def check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Ranges; NaN fails every comparison."""
    temperature, top_p, min_p = params.temperature, params.top_p, params.min_p
    check(
        math.isfinite(temperature) and temperature >= 0,
        "sampling.temperature",
        "a finite number of at least 0 (0: greedy)",
        temperature,
    )
    check(0 < top_p <= 1, "sampling.top_p", "above 0 and at most 1 (unset: no limit)", top_p)
    check(0 <= min_p <= 1, "sampling.min_p", "between 0 and 1", min_p)
    typical_p, rule = params.typical_p, "above 0 and at most 1 (unset: no limit)"
    check(0 < typical_p <= 1, "sampling.typical_p", rule, typical_p)
    penalty, rule = params.repetition_penalty, "between 0.01 and 100 (1: none)"
    sane = MIN_REPETITION_PENALTY <= penalty <= MAX_REPETITION_PENALTY
    check(sane, "sampling.repetition_penalty", rule, penalty)
    for name in ("frequency_penalty", "presence_penalty"):
        penalty = getattr(params, name)
        rule = f"between {-MAX_PENALTY:g} and {MAX_PENALTY:g}"
        check(abs(penalty) <= MAX_PENALTY, f"sampling.{name}", rule, penalty)
    field, biases = "sampling.logit_bias", params.logit_bias
    check(len(biases) <= MAX_LOGIT_BIASES, field, f"at most {MAX_LOGIT_BIASES} long", len(biases))
    _check_ids([token for token, _ in biases], field, vocab_size)
    for token, bias in biases:
        rule = f"between {-MAX_LOGIT_BIAS:g} and {MAX_LOGIT_BIAS:g} for every id"
        check(abs(bias) <= MAX_LOGIT_BIAS, field, rule, f"{bias} for {token}")


def check_max_new_tokens(num_new: int, max_context: int) -> None:
    """Checks the number alone; `prepare` checks it with the prompt, once that is tokenised."""
    check(
        1 <= num_new <= max_context,
        "stop.max_new_tokens",
        f"between 1 and the context of {max_context} tokens (unset: up to the context)",
        num_new,
    )


def check_stop(params: StopParams, vocab_size: int) -> None:
    """Checks everything but max_new_tokens."""
    field, sequences = "stop.stop_sequences", params.stop_sequences
    check(
        len(sequences) <= MAX_STOP_SEQUENCES, field, f"at most {MAX_STOP_SEQUENCES}", len(sequences)
    )
    for sequence in sequences:
        rule = f"of 1 to {MAX_STOP_SEQUENCE_CHARS} characters each"
        check(1 <= len(sequence) <= MAX_STOP_SEQUENCE_CHARS, field, rule, len(sequence))
    field, ids = "stop.stop_token_ids", params.stop_token_ids
    check(len(ids) <= MAX_STOP_TOKEN_IDS, field, f"at most {MAX_STOP_TOKEN_IDS}", len(ids))
    _check_ids(ids, field, vocab_size)
    limited = params.time_limit is not None
    check(not limited or params.time_limit != 0, "stop.time_limit_ms", "above 0 (unset: none)", 0)


def check_max_nodes(num_nodes: int | None) -> None:
    """num_nodes: drafted tokens a step; 0 drafts nothing, None sets no limit."""
    field = "speculation.max_nodes"
    check(num_nodes is None or num_nodes <= MAX_NODES, field, f"at most {MAX_NODES}", num_nodes)


def check_typical(rule: TypicalAcceptance) -> None:
    """Ranges, as in `check_sampling`."""
    field, epsilon = "speculation.typical_epsilon", rule.epsilon
    check(0 < epsilon <= 1, field, "above 0 and at most 1", epsilon)
    field, delta = "speculation.typical_delta", rule.delta
    check(0 < delta < math.inf, field, "a finite number above 0", delta)


def check_format(wanted: JsonSchema | Regex) -> None:
    """Checks the length alone; the text is compiled off the event loop."""
    largest = MAX_SCHEMA_CHARS if isinstance(wanted, JsonSchema) else MAX_REGEX_CHARS
    length, rule = len(wanted.text), f"of 1 to {largest} characters"
    check(1 <= length <= largest, wanted.field, rule, length)


def check_logprobs(wanted: bool, num_top: int) -> None:
    """wanted: output.logprobs or output.prompt_logprobs; num_top: output.top_logprobs."""
    field = "output.top_logprobs"
    check(num_top <= MAX_TOP_LOGPROBS, field, f"at most {MAX_TOP_LOGPROBS}", num_top)
    rule = "0 unless logprobs or prompt_logprobs is set"
    check(wanted or num_top == 0, field, rule, num_top)


def check_prompt_logprobs(num_prompt: int, num_top: int) -> None:
    """Bounds the list of a prompt's tokens and their `num_top` likely ones."""
    num_listed = num_prompt * (1 + num_top)
    if num_listed > MAX_PROMPT_LOGPROBS:
        raise InvalidArgumentError(
            f"output.prompt_logprobs of {num_prompt} tokens with top_logprobs {num_top} makes "
            f"{num_listed} log-probabilities, and a reply lists {MAX_PROMPT_LOGPROBS} of a prompt "
            "at most; lower top_logprobs or shorten the prompt",
            reason=Reason.REQUEST_TOO_LARGE,
            field="output.top_logprobs" if num_top else "output.prompt_logprobs",
        )


def _check_ids(ids: Collection[int], field: str, vocab_size: int) -> None:
    largest = max(ids, default=0)
    rule = f"known token ids, below the vocabulary size {vocab_size}"
    check(largest < vocab_size, field, rule, largest)
