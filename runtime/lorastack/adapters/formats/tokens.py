"""Tokens that an adapter folder's tokenizer files add to the base model's.

Most folders hold a copy of the base's tokenizer, which is fine. The base's tokenizer splits the
prompts, so a token that only the folder knows falls to pieces: a folder that needs such a token is
refused, any other gets a warning. Only added tokens are compared, not the rest of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lorastack.adapters.formats.jsonfile import parse_first, read_object
from lorastack.adapters.formats.refusal import invalid, unsupported
from lorastack.printable import printable

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
ADDED_NAME = "added_tokens.json"
# The added tokens come first in tokenizer.json, megabytes of vocabulary follow: the 256 of Llama 3
# take 50 KB, the 6,000 of Gemma 3 one MB.
_HEAD = 4 << 20  # bytes of tokenizer.json that are read
_MAX_FILE = 4 << 20  # bytes of each other file
_SHOWN = 3  # tokens in a message
_REMEDY = "if they do not belong to the adapter, leave its tokenizer files out"

TokenId = Callable[[str], int | None]


def check_tokens(
    files: Mapping[str, Path],
    base_id: TokenId,
    *,
    template: str | None,
    trained_rows: int,
) -> tuple[str, ...]:
    """Warnings about tokens that the base's tokenizer does not have.

    files: file name -> path; base_id: a token's id in the base's tokenizer, None if it has none;
    template: the folder's own; trained_rows: how many rows of the embedding or the lm_head the LoRA
    adapts, from token 0 on. Raises InvalidArgumentError for malformed files, for a token that has
    another id than in the base, and for added ones that the template or the LoRA uses.
    """
    added: dict[str, int] = {}
    for file, token, token_id in _declared(files):
        known = base_id(token)
        if known is None:
            added[token] = token_id
        elif known != token_id:
            raise unsupported(
                f"{file} gives token {_quoted(token)} the id {token_id}, but the base model's "
                f"tokenizer, which splits the prompts, gives it {known}: {_REMEDY}"
            )
    for token, token_id in added.items():
        if template is not None and token in template:
            raise unsupported(
                f"the folder's chat template uses token {_quoted(token)}, which the base model's "
                f"tokenizer does not have and would split: {_REMEDY}, and the template"
            )
        if token_id < trained_rows:
            raise unsupported(
                f"the LoRA adapts the embedding or lm_head of token {_quoted(token)}, id "
                f"{token_id}, which the base model's tokenizer does not have: {_REMEDY}"
            )
    if not added:
        return ()
    shown = ", ".join(_quoted(token) for token in list(added)[:_SHOWN])
    more = f" and {len(added) - _SHOWN} more" if len(added) > _SHOWN else ""
    return (
        f"its tokenizer adds {shown}{more}: the base model's tokenizer, which splits the prompts, "
        "does not know them",
    )


def _declared(files: Mapping[str, Path]) -> Iterator[tuple[str, str, int]]:
    """(file, token, id) of every added token, maybe more than once."""
    if TOKENIZER_NAME in files:
        with files[TOKENIZER_NAME].open("rb") as file:
            head = file.read(_HEAD).decode("utf-8", "ignore")
        entries = parse_first(head, "added_tokens", TOKENIZER_NAME)
        if not isinstance(entries, list | None):
            raise _malformed(TOKENIZER_NAME, "added_tokens")
        for entry in entries or ():
            fields = entry if isinstance(entry, dict) else {}
            yield _token(TOKENIZER_NAME, fields.get("content"), fields.get("id"))
    if CONFIG_NAME in files:
        config = read_object(files[CONFIG_NAME], CONFIG_NAME, _MAX_FILE)
        entries = config.get("added_tokens_decoder")
        if not isinstance(entries, dict | None):
            raise _malformed(CONFIG_NAME, "added_tokens_decoder")
        for key, entry in (entries or {}).items():
            content = entry.get("content") if isinstance(entry, dict) else entry
            number = int(key) if key.isascii() and key.isdecimal() and len(key) < 16 else None
            yield _token(CONFIG_NAME, content, number)
    if ADDED_NAME in files:
        for token, token_id in read_object(files[ADDED_NAME], ADDED_NAME, _MAX_FILE).items():
            yield _token(ADDED_NAME, token, token_id)


def _token(file: str, token: object, token_id: object) -> tuple[str, str, int]:
    if not isinstance(token, str) or type(token_id) is not int or token_id < 0:
        raise _malformed(file, "the list of added tokens")
    return file, token, token_id


def _malformed(file: str, what: str) -> Exception:
    return invalid(f"{file}: {what} is malformed: each token needs its text and its id")


def _quoted(token: str) -> str:
    return repr(printable(token[:64]))
