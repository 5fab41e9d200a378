"""A model folder's tokenizer: text to ids and back, and its chat template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.text.joiner import Joiner, joiner_factory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Whatever changes ids, text or prompts.
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

    @staticmethod
    def load(folder: Path) -> Tokenizer:
        """From a Hugging Face model folder; nothing is downloaded and none of its code is run.

        Raises InvalidArgumentError if there is none, or one that has no fast form.
        """
        # Deferred: importing it takes half a second, which the weights are read in. By a call, as a
        # statement gives the module that it then replaces, where another thread is importing it.
        kind = import_module("transformers").PreTrainedTokenizerFast
        try:
            tokenizer = _from_files(folder)
        except Exception as error:  # whatever a foreign file makes the loader raise
            raise InvalidArgumentError(
                f"No tokenizer could be loaded from {folder}: {error}. The folder needs "
                "tokenizer.json or tokenizer.model.",
                reason=Reason.INVALID_MODEL,
            ) from error
        if not isinstance(tokenizer, kind):
            raise InvalidArgumentError(
                f"The tokenizer in {folder} ({type(tokenizer).__name__}) has no tokenizer.json "
                "form: convert it with transformers and add the file.",
                reason=Reason.UNSUPPORTED_MODEL,
            )
        eos_ids = set(_configured_eos(folder))
        if tokenizer.eos_token_id is not None:
            eos_ids.add(tokenizer.eos_token_id)
        return Tokenizer(tokenizer, frozenset(eos_ids), _digest(folder))

    def encode(self, text: str) -> list[int]:
        """Ids with the special tokens (<s>, ...) that the model's tokenizer adds."""
        return self._encode(text, add_special_tokens=True)

    def encode_part(self, text: str) -> list[int]:
        """Ids with nothing added but what the tokenizer puts before every text."""
        return self._encode(text, add_special_tokens=False)

    @property
    def chat_template(self) -> str | None:
        """The model's own, Jinja."""
        template = self._hf.chat_template
        return template.get("default") if isinstance(template, dict) else template

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

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """A conversation as text, by the model's own template, which is trusted.

        Raises InvalidArgumentError if there is none or it fails, as many do on roles out of order.
        """
        if not messages:
            raise InvalidArgumentError("The chat has no messages: send at least one.")
        if not self._hf.chat_template:
            raise InvalidArgumentError(
                "The model has no chat template: send a prompt instead of chat messages, or use a "
                "LoRA whose folder has chat_template.jinja."
            )
        conversation = [{"role": role, "content": content} for role, content in messages]
        try:
            text = self._hf.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
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

    def joiner(self) -> Joiner:
        """A fresh joiner of `token` entries."""
        return self._make_joiner()

    def token_text(self, token_id: int) -> str:
        """A token by itself, special ones by name, for display."""
        entry: str | None = self._backend.id_to_token(token_id)
        if entry is None or token_id in self._special_ids:
            return entry or ""
        return self._make_joiner().alone(entry)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids


def template_refusal(cause: str) -> str:
    """What a caller hears whose messages a chat template does not take."""
    return (
        f"The chat template refused the messages: {cause}. Check the order of the roles, or send a "
        "prompt."
    )


def _from_files(folder: Path) -> Any:
    """What AutoTokenizer gives. Its imports take a second, so it is asked only if it may choose."""
    from transformers import PreTrainedTokenizerFast

    declared = _json_object(folder / "tokenizer_config.json")
    plain = declared.get("tokenizer_class") in PLAIN_CLASSES and "auto_map" not in declared
    if plain and _json_object(folder / "config.json").get("model_type") == "llama":
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _json_object(path: Path) -> dict[str, Any]:
    """Empty for a file that is missing."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _configured_eos(folder: Path) -> Iterator[int]:
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.exists():
            continue
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InvalidArgumentError(
                f"{path} is not JSON: {error}", reason=Reason.INVALID_MODEL
            ) from error
        eos = config.get("eos_token_id")
        yield from eos if isinstance(eos, list) else [] if eos is None else [eos]


def _digest(folder: Path) -> str:
    sha256 = hashlib.sha256()
    for name in FILES:
        path = folder / name
        if path.exists():
            content = path.read_bytes()
            sha256.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return f"sha256:{sha256.hexdigest()}"
