"""Which of a folder's files are an adapter, told by their names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from lorastack.errors import InvalidArgumentError, LorastackError, Reason
from lorastack.printable import printable

# Weights, configs, tokenizer files, templates and model cards.
_KEPT = (".json", ".jinja", ".md", ".safetensors")
_PICKLES = (".pt", ".bin", ".pth")
# Prefixes of files that trainers save beside the weights; an adapter does not need them.
_TRAINER_STATE = (
    *("optimizer", "scheduler", "scaler", "rng_state", "random_states", "training_args"),
    "trainer_state",
)
_RESULTS = "_results.json"  # train_results.json, all_results.json
_CONFIG = "adapter_config.json"
HEADS_WEIGHTS = "medusa_lm_head.safetensors"  # a private part names other heads by its sha256
ALIAS_NAME = "alias.json"  # all of a folder that names other adapters
_MAX_NAMED = 64  # left-out files that a message names; the rest are counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A folder's names. files: the adapter's; left_out: the others, as a message shows them.

    Both are sorted; names of folders end in a slash.
    """

    files: tuple[str, ...]
    left_out: tuple[str, ...]


def choose(names: Iterable[str], where: str, files_in: Callable[[str], Collection[str]]) -> Choice:
    """Tells an adapter's files from what trainers, tools and systems leave beside them.

    names: the folder's, inner folders with a slash at the end; where: the folder, for messages;
    files_in: lists an inner folder, so that a refusal can say which hold adapters. Raises
    InvalidArgumentError if there are neither weights that may be sent nor an alias.json.
    """
    shown = sorted(names)
    files = [name for name in shown if belongs(name)]
    left_out = [name for name in shown if not belongs(name)]
    if ALIAS_NAME not in files and not any(name.endswith(".safetensors") for name in files):
        remedy = _remedy(left_out, files_in) or _has(files, left_out)
        raise InvalidArgumentError(
            f"{where} holds no *.safetensors file{remedy}", reason=Reason.INVALID_ADAPTER
        )
    return Choice(files=tuple(files), left_out=named(left_out))


def named(names: Sequence[str]) -> tuple[str, ...]:
    """As many names as fit into a message, and the number of the others."""
    shown = tuple(map(printable, names[:_MAX_NAMED]))
    return shown if len(names) <= _MAX_NAMED else (*shown, f"and {len(names) - _MAX_NAMED} more")


def belongs(name: str) -> bool:
    """True if a file of this name is part of an adapter."""
    return (
        name.endswith(_KEPT)
        and not name.startswith((".", *_TRAINER_STATE))
        and not name.endswith(_RESULTS)
    )


def is_pickled_weights(name: str) -> bool:
    """True if a file of this name holds pickled weights, which are never sent."""
    return name.endswith(_PICKLES) and not name.startswith((".", *_TRAINER_STATE))


def _remedy(left_out: Sequence[str], files_in: Callable[[str], Collection[str]]) -> str:
    """What to do about a folder without weights; "" if its names give no hint."""
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
    """True if an inner folder seems to hold an adapter."""
    try:
        return not {_CONFIG, HEADS_WEIGHTS}.isdisjoint(files_in(name))
    except (OSError, LorastackError):
        return False


def _has(files: Sequence[str], left_out: Sequence[str]) -> str:
    shown = ", ".join(map(printable, sorted([*files, *left_out])[:8]))
    return f" (it has: {shown or 'no files'}); name the folder that holds an adapter's weights"
