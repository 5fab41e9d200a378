"""What `make demo` says at the end, and its exit code, by what its runs came to."""

from __future__ import annotations

import pytest

from examples import demo


@pytest.mark.parametrize(
    ("chosen", "equal", "in_float32", "code", "words"),
    [
        ("float32", True, None, 0, "float32: every row's tokens are equal"),
        ("float32", False, None, 1, "float32: speculation changed tokens"),
        ("bfloat16", True, True, 0, "bfloat16 and float32: every row's tokens are equal"),
        ("bfloat16", False, True, 1, "bfloat16: speculation changed tokens"),
        ("bfloat16", None, True, 0, "\nfloat32: every row's tokens are equal"),
    ],
)
def test_every_run_that_is_shown_counts(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    chosen: str,
    equal: bool | None,
    in_float32: bool | None,
    code: int,
    words: str,
) -> None:
    runs = {"auto": (chosen, equal), "float32": ("float32", in_float32)}
    asked: list[str] = []

    def run(wanted: str, console: object) -> tuple[str, bool | None]:
        asked.append(wanted)
        return runs[wanted]

    monkeypatch.setattr(demo, "run", run)
    assert demo.main() == code
    printed = capsys.readouterr().out
    assert words in printed
    alone = chosen == "float32"
    assert asked == (["auto"] if alone else ["auto", "float32"])
    assert ("bfloat16 is left out" in printed) == alone
