"""Which of a folder's files are an adapter, told by their names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from lorastack.errors import InvalidArgumentError, LorastackError, Reason
from lorastack.printable import printable

# What an adapter is made of: weights, configs, tokenizer files and templates, and words about it.
_KEPT = (".json", ".jinja", ".md", ".safetensors")
_PICKLES = (".pt", ".bin", ".pth")
# What trainers save beside the weights, by the start of its name; an adapter does not need it.
_TRAINER_STATE = (
    *("optimizer", "scheduler", "scaler", "rng_state", "random_states", "training_args"),
    "trainer_state",
)
_RESULTS = "_results.json"  # train_results.json, all_results.json
_CONFIG = "adapter_config.json"
_HEADS = "medusa_lm_head.safetensors"
_MAX_NAMED = 64  # files that were left out; the others are counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The names in a folder. files: what belongs to the adapter. left_out: all else, to be named.

    Both are sorted; names of folders end in a slash.
    """

    files: tuple[str, ...]
    left_out: tuple[str, ...]


def choose(names: Iterable[str], where: str, files_in: Callable[[str], Collection[str]]) -> Choice:
    """Tells an adapter's files from what trainers, tools and systems leave beside them.

    names: a folder's, those of its own folders with a slash at their end; files_in: what one of
    those holds, so that a refusal can say which hold adapters. Raises InvalidArgumentError if no
    weights are there that may be sent.
    """
    shown = sorted(names)
    files = [name for name in shown if belongs(name)]
    left_out = [name for name in shown if not belongs(name)]
    if not any(name.endswith(".safetensors") for name in files):
        remedy = _remedy(left_out, files_in) or _has(files, left_out)
        raise InvalidArgumentError(
            f"{where} holds no *.safetensors file{remedy}", reason=Reason.INVALID_ADAPTER
        )
    return Choice(files=tuple(files), left_out=named(left_out))


def named(names: Sequence[str]) -> tuple[str, ...]:
    """The names that fit into a message."""
    shown = tuple(map(printable, names[:_MAX_NAMED]))
    return shown if len(names) <= _MAX_NAMED else (*shown, f"and {len(names) - _MAX_NAMED} more")


def belongs(name: str) -> bool:
    """Whether a file is part of an adapter, by its name."""
    return (
        name.endswith(_KEPT)
        and not name.startswith((".", *_TRAINER_STATE))
        and not name.endswith(_RESULTS)
    )


def is_pickled_weights(name: str) -> bool:
    """Whether a file holds an adapter's weights in a form that is never sent, by its name."""
    return name.endswith(_PICKLES) and not name.startswith((".", *_TRAINER_STATE))


def _remedy(left_out: Sequence[str], files_in: Callable[[str], Collection[str]]) -> str:
    """What to do about a folder without weights; "" if nothing in it tells."""
    pickles = [name for name in left_out if is_pickled_weights(name)]
    if pickles:
        shown = ", ".join(map(printable, pickles[:4]))
        return (
            f" but {shown}: pickles are never sent; `lorastack adapters convert DIR NEW` writes "
            "them as safetensors into a new folder, upload that"
        )
    folders = [name for name in left_out if name.endswith("/") and not name.startswith(".")]
    inner = [name.rstrip("/") for name in folders[:_MAX_NAMED] if _is_adapter(name, files_in)]
    if inner:
        shown = ", ".join(map(printable, inner[:8]))
        return f" itself, but folders that look like adapters: name one of them ({shown})"
    return ""


def _is_adapter(name: str, files_in: Callable[[str], Collection[str]]) -> bool:
    """Whether a folder in the folder is probably an adapter's."""
    try:
        return not {_CONFIG, _HEADS}.isdisjoint(files_in(name))
    except (OSError, LorastackError):
        return False


def _has(files: Sequence[str], left_out: Sequence[str]) -> str:
    shown = ", ".join(map(printable, sorted([*files, *left_out])[:8]))
    return f" (it has: {shown or 'no files'}); name the folder that holds an adapter's weights"
