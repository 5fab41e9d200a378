"""A model folder's tokenizer: text to ids and back, and its chat template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.modelfiles import check, invalid, is_int, is_number, read_object, token_ids
from lorastack.printable import error_line
from lorastack.text.joiner import Joiner, joiner_factory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Every file that may change ids, text or prompts.
FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
# Names of the class that takes tokenizer.json as it is.
PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
TEXTS_KEPT = 1 << 15  # tokens whose `token_text` is remembered
# What fields of tokenizer_config.json may hold; transformers fails on other values, or takes them
# for something else.
_SWITCH = (lambda value: isinstance(value, bool), "true, false or null")
_TOKEN = (
    lambda value: isinstance(value, str) or _is_added_token(value),
    "a token, an object with its content, or null",
)
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tokenizer_class": (lambda value: isinstance(value, str), "a name or null"),
    "auto_map": (lambda value: isinstance(value, dict), "an object or null"),
    "model_max_length": (
        lambda value: is_number(value) or (is_int(value) and value > 0),  # 10**30: no limit
        "a number or null",
    ),
    "chat_template": (lambda value: _is_template(value), "a template, named templates or null"),
    "added_tokens_decoder": (
        lambda value: (
            isinstance(value, dict)
            and all(key.isdecimal() and _is_added_token(token) for key, token in value.items())
        ),
        "an object of token ids and tokens, or null",
    ),
    "additional_special_tokens": (
        lambda value: isinstance(value, list) and all(map(_TOKEN[0], value)),
        "a list of tokens or null",
    ),
    "extra_special_tokens": (
        lambda value: isinstance(value, list | dict),
        "a list, an object, or null",
    ),
    **{f"{name}_token": _TOKEN for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")},
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "legacy"), _SWITCH),
    **dict.fromkeys(("clean_up_tokenization_spaces", "use_default_system_prompt"), _SWITCH),
}


def _is_added_token(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str)


def _is_template(value: object) -> bool:
    """True for a template, or a list of {name, template}."""
    if not isinstance(value, list):
        return isinstance(value, str)
    texts = [
        entry.get(key) if isinstance(entry, dict) else None
        for entry in value
        for key in ("name", "template")
    ]
    return all(isinstance(text, str) for text in texts)


class Tokenizer:
    """Immutable once loaded; every method may be called from any thread.

    eos_ids: ids that end a text, by generation_config.json, config.json and the tokenizer.
    digest: "sha256:..." over the tokenizer's files. vocab_size: ids below it may have a token.
    longest_token: bytes of text that one token stands for, at most.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, eos_ids: frozenset[int], digest: str
    ) -> None:
        self.eos_ids = eos_ids
        self.digest = digest
        self._hf = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._special_ids = frozenset(
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        )
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocab.values()) + 1
        self.longest_token = max(len(token.encode()) for token in vocab)
        self._make_joiner = joiner_factory(json.loads(self._backend.to_str())["decoder"])
        self._text_of = lru_cache(TEXTS_KEPT)(self._alone)

    @staticmethod
    def load(folder: Path) -> Tokenizer:
        """Loads a Hugging Face model folder's tokenizer; downloads nothing, runs none of its code.

        Raises InvalidArgumentError if there is none, or none with a tokenizer.json form.
        """
        # Deferred: the import takes half a second, in which the weights are read. A call, because a
        # statement gives a module that is about to be replaced if another thread is importing it.
        kind = import_module("transformers").PreTrainedTokenizerFast
        config, eos_ids = _configured(folder)
        declared = _declared(folder)
        try:
            tokenizer = _from_files(folder, config, declared)
        except Exception as error:  # whatever a foreign file makes the loader raise
            present = ", ".join(name for name in FILES if (folder / name).exists())
            raise invalid(
                f"No tokenizer could be loaded from {folder}: {error_line(error)}. The folder "
                f"needs a sound tokenizer.json or tokenizer.model; it has {present or 'neither'}."
            ) from error
        if not isinstance(tokenizer, kind):
            raise InvalidArgumentError(
                f"The tokenizer in {folder} ({type(tokenizer).__name__}) has no tokenizer.json "
                "form: convert it with transformers and add the file.",
                reason=Reason.UNSUPPORTED_MODEL,
            )
        if not len(tokenizer):
            raise invalid(f"{folder / 'tokenizer.json'} has no tokens")
        # An end token beyond the model's vocabulary never comes.
        own = tokenizer.eos_token_id
        size = config.get("vocab_size")
        if own is not None and not (is_int(size) and own >= size):
            eos_ids |= {own}
        return Tokenizer(tokenizer, frozenset(eos_ids), _digest(folder))

    def encode(self, text: str) -> list[int]:
        """Ids with the special tokens (<s>, ...) that the model's tokenizer adds."""
        return self._encode(text, add_special_tokens=True)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The characters (from, up to) that each token of `encode` stands for; (0, 0) if none."""
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=True)
        return [(int(start), int(stop)) for start, stop in encoding.offsets]

    def encode_part(self, text: str) -> list[int]:
        """Ids with nothing added but what the tokenizer puts before every text."""
        return self._encode(text, add_special_tokens=False)

    @property
    def chat_template(self) -> str | None:
        """The model's own chat template, Jinja; None without one."""
        template = self._hf.chat_template
        return template.get("default") if isinstance(template, dict) else template

    def template(self, *, with_tools: bool) -> str:
        """The model's own chat template for such chats; some have another one for tools.

        Raises InvalidArgumentError if there is none.
        """
        if not self._hf.chat_template:
            raise _no_template()
        try:
            return str(self._hf.get_chat_template(tools=[] if with_tools else None))
        except ValueError as error:  # several templates, none of which is the default
            raise InvalidArgumentError(template_refusal(str(error))) from error

    @property
    def template_variables(self) -> dict[str, str]:
        """What templates may use beside the messages: the special tokens by name."""
        return dict(self._hf.special_tokens_map)

    def to_json(self) -> str:
        """The whole tokenizer in the `tokenizers` library's form."""
        return str(self._backend.to_str())

    def chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Ids of a conversation, (role, content) each, ready for the assistant's next message.

        Raises InvalidArgumentError as `render` does.
        """
        return self.encode_part(self.render(messages))

    def render(self, messages: Sequence[tuple[str, str]], template: str | None = None) -> str:
        """A conversation as text. template: None for the model's own; either is trusted.

        Raises InvalidArgumentError if there is none or it fails, as many do on roles out of order.
        """
        if not messages:
            raise InvalidArgumentError("The chat has no messages: send at least one.")
        if template is None and not self._hf.chat_template:
            raise _no_template()
        conversation = [{"role": role, "content": content} for role, content in messages]
        try:
            text = self._hf.apply_chat_template(
                conversation,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # whatever a template makes Jinja raise
            raise InvalidArgumentError(template_refusal(str(error))) from error
        return str(text)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # The batch form releases the interpreter lock, the single one does not.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens; ids without a token give nothing."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=True))

    def token(self, token_id: int) -> str | None:
        """The vocabulary's entry; None for ids that give no text: special or without an entry."""
        if token_id in self._special_ids:
            return None
        entry: str | None = self._backend.id_to_token(token_id)
        return entry

    def joiner(self, prompt_ids: Sequence[int] = ()) -> Joiner:
        """A fresh joiner of `token` entries, behind a prompt; reads only the prompt's end."""
        joiner = self._make_joiner()
        before = map(self.token, reversed(prompt_ids))
        joiner.follow(token for token in before if token is not None)
        return joiner

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary entry or added token; None if there is none."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def token_text(self, token_id: int) -> str:
        """A token by itself, special ones by name, for display; "" for ids without an entry."""
        return self._text_of(token_id)

    def _alone(self, token_id: int) -> str:
        entry: str | None = self._backend.id_to_token(token_id)
        if entry is None or token_id in self._special_ids:
            return entry or ""
        return self._make_joiner().alone(entry)

    def is_special(self, token_id: int) -> bool:
        """True for special tokens (<s>, ...), which give no text."""
        return token_id in self._special_ids


def _declared(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json. Raises InvalidArgumentError naming a field of the wrong type."""
    path = folder / "tokenizer_config.json"
    declared = read_object(path)
    for name, (is_valid, rule) in _RULES.items():
        value = declared.get(name)
        check(value is None or is_valid(value), path, name, rule, value)
    return declared


def _no_template() -> InvalidArgumentError:
    return InvalidArgumentError(
        "The model has no chat template: send a prompt instead of chat messages, or use a LoRA "
        "whose folder has chat_template.jinja."
    )


def template_refusal(cause: str) -> str:
    """The message for a caller whose messages a chat template refuses."""
    return (
        f"The chat template refused the messages: {cause}. Check the order of the roles, or send a "
        "prompt."
    )


def _from_files(folder: Path, config: Mapping[str, Any], declared: Mapping[str, Any]) -> Any:
    """What AutoTokenizer loads. Its imports take a second: it is left out if it has no choice."""
    from transformers import PreTrainedTokenizerFast

    plain = declared.get("tokenizer_class") in PLAIN_CLASSES and "auto_map" not in declared
    if plain and config.get("model_type") == "llama":
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _configured(folder: Path) -> tuple[dict[str, Any], set[int]]:
    """config.json, and the end ids that it and generation_config.json name."""
    config = read_object(folder / "config.json")
    size = config.get("vocab_size")
    eos_ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        ids = token_ids(path, read_object(path), "eos_token_id")
        if is_int(size):
            rule = f"below vocab_size, {size}"
            check(all(index < size for index in ids), path, "eos_token_id", rule, ids)
        eos_ids |= set(ids)
    return config, eos_ids


def _digest(folder: Path) -> str:
    sha256 = hashlib.sha256()
    for name in FILES:
        path = folder / name
        if path.exists():
            content = path.read_bytes()
            sha256.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return f"sha256:{sha256.hexdigest()}"
