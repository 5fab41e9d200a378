"""What `lorastack adapters verify` does. It imports torch, so only that command imports it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from lorastack.adapters.formats.validate import Validator
from lorastack.adapters.store.manifest import adapter_digest, file_spec
from lorastack.client.uploading import adapter_files
from lorastack.startup.files import ModelFiles
from lorastack.startup.folder import model_folder
from lorastack.startup.prior import check_acceptance
from lorastack.text.tokenizer import Tokenizer


def verify_folder(
    folder: Path,
    model: str | None,
    progress: Callable[[int, int], None],
    *,
    base_names: Sequence[str] = (),
    accept_base: bool = False,
) -> dict[str, object]:
    """Checks a folder as an upload would, against the base model's folder. Facts by field.

    base_names: other names that adapters may give the model; accept_base: any name will do.
    Raises InvalidArgumentError or FailedPreconditionError as an upload would.
    """
    paths, left_out = adapter_files(folder)
    base, name = model_folder(model, progress)
    files = ModelFiles(base)
    tokenizer = cache(lambda: Tokenizer.load(base))  # few folders bring tokens to compare
    validate = Validator(
        shapes=files.config.shapes,
        base_names=(name, base.name, *base_names),
        base_weight=files.base_weight,
        base_token=lambda token: tokenizer().token_id(token),
        check_acceptance=check_acceptance,
    )
    parsed = validate({path.name: path for path in paths}, accept_base=accept_base)
    specs = [file_spec(path) for path in paths]
    return {
        "digest": adapter_digest(specs),
        **parsed.facts.to_json(),
        "acceptance": bool(parsed.facts.acceptance),
        "checked_against": name,
        "draft_vocabulary": len(parsed.draft_vocabulary),
        "own_chat_template": parsed.chat_template is not None,
        "size_bytes": sum(spec.size for spec in specs),
        "left_out": left_out,
    }
