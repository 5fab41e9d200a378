"""The id syntax of the public contract."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorastack.adapters.store.ids import check_id, file_name, is_digest, split_reference
from lorastack.errors import InvalidArgumentError

ALPHABET = "abzABZ019._-"


@pytest.mark.parametrize("good", ["a", "A9", "lora-gsm8k", "team/lora_1.2", "a" * 96, "base/x"])
def test_good_ids(good: str) -> None:
    check_id(good)


@pytest.mark.parametrize(
    "bad",
    [
        *("", "-a", ".a", "a/", "/a", "a/b/c", "a b", "a%2Fb", "ä", "a\n", "a" * 97, ".."),
        *("a/../b", "a@sha256:0", "none", "base", "default"),
    ],
)
def test_bad_ids(bad: str) -> None:
    with pytest.raises(InvalidArgumentError):
        check_id(bad)


@given(st.lists(st.text(ALPHABET + "/", min_size=1, max_size=6), unique=True))
def test_no_two_ids_share_a_file(ids: list[str]) -> None:
    names = [file_name(adapter_id) for adapter_id in ids]
    assert len(set(names)) == len(names)
    assert not any("/" in name for name in names)


def test_references() -> None:
    digest = "sha256:" + "0" * 64
    assert split_reference("ns/a") == ("ns/a", None)
    assert split_reference(f"ns/a@{digest}") == ("ns/a", digest)
    assert is_digest(digest)
    assert not is_digest(digest[:-1])
    assert not is_digest(digest.upper())
