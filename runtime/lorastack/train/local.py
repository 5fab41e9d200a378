"""A model with its engine in this process, without a server: what distils and measures.

The store is opened read-only, if there is one. What is used of it is copied into a store of the
process' own, beside heads that come from folders: a server may go on writing the first one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lorastack.config import AdapterConfig, EngineConfig, ModelConfig
from lorastack.request import Final, GeneratedToken, HeadsUse, LoraUse, Request
from lorastack.startup.model import LoadedModel, StartupProgress
from lorastack.train.prompts import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """LoRAs and heads of requests. template: the chat template that the only LoRA brings."""

    loras: tuple[LoraUse, ...] = ()
    heads: HeadsUse | None = None
    template: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A request that has ended. states_TH: on the host, if the request captures them; else None."""

    request: Request
    tokens: tuple[GeneratedToken, ...]
    states_TH: Tensor | None
    final: Final


class LocalEngine:
    """See the module; `open_engine` makes it. Used by one thread."""

    model: LoadedModel
    max_context: int

    def select(self, loras: Sequence[tuple[str, float]] = (), medusa_id: str = "") -> Selection:
        """LoRAs by (id, scale), or one alias; heads as a request of a server gets them.

        medusa_id: "" for those that an alias or the only LoRA brings, or the store's default;
        NO_HEADS for none. Raises NotFoundError, FailedPreconditionError for an adapter of another
        base model, InvalidArgumentError for one of the wrong kind.
        """
        raise NotImplementedError

    def add_folder(self, folder: Path) -> HeadsUse:
        """Heads from a folder that no store has. Raises what an upload of it would raise."""
        raise NotImplementedError

    def encode(self, prompt: Prompt, selection: Selection) -> tuple[int, ...]:
        """The prompt's tokens: through the chat template, the selection's own or the model's.

        Without one, a text goes as it is; InvalidArgumentError for a conversation.
        """
        raise NotImplementedError

    def run(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Replies as they end. Takes requests as the engine has room for rows: few more than run.

        Raises what a request fails with; then, and where the iterator is closed early, the others
        are cancelled. request_id must be unique among those that run.
        """
        raise NotImplementedError


@contextmanager
def open_engine(
    model: ModelConfig,
    engine: EngineConfig,
    adapters: AdapterConfig | None = None,
    progress: StartupProgress = lambda label, done, total: None,
) -> Iterator[LocalEngine]:
    """A model, ready to run. adapters: the store and its limits; None: there is no store.

    Raises what `load_model` and opening a store raise.
    """
    raise NotImplementedError
