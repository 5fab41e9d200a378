"""What `lorastack adapters verify` does; imports torch, so it is imported when it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

from lorastack.adapters.formats.validate import Validator
from lorastack.adapters.store.manifest import adapter_digest, file_spec
from lorastack.folders import adapter_files
from lorastack.startup.base import base_weight, model_shapes
from lorastack.startup.folder import model_folder
from lorastack.text.tokenizer import Tokenizer


def verify_folder(
    folder: Path,
    model: str | None,
    progress: Callable[[int, int], None],
    *,
    base_names: Sequence[str] = (),
    accept_base: bool = False,
) -> dict[str, object]:
    """The checks of an upload, against the base model's folder. What the adapter is, by field.

    base_names: what else adapters may call the model; accept_base: they may call it anything.
    Raises InvalidArgumentError or FailedPreconditionError as an upload would.
    """
    paths, left_out = adapter_files(folder)
    base, name = model_folder(model, progress)
    tokenizer = cache(lambda: Tokenizer.load(base))  # few folders bring tokens to compare
    validate = Validator(
        shapes=model_shapes(base),
        base_names=(name, base.name, *base_names),
        base_weight=partial(base_weight, base),
        base_token=lambda token: tokenizer().token_id(token),
    )
    parsed = validate({path.name: path for path in paths}, accept_base=accept_base)
    specs = [file_spec(path) for path in paths]
    return {
        "digest": adapter_digest(specs),
        **parsed.facts.to_json(),
        "checked_against": name,
        "draft_vocabulary": len(parsed.draft_vocabulary),
        "own_chat_template": parsed.chat_template is not None,
        "size_bytes": sum(spec.size for spec in specs),
        "left_out": left_out,
    }
