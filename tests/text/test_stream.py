import functools
import time
from collections.abc import Iterator, Sequence
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from lorastack.errors import InvalidArgumentError
from lorastack.text.stream import Detokenizer, StopMatcher, TextStream
from lorastack.text.tokenizer import Tokenizer
from tests.helpers.tiny import build_tokenizer

LLAMA = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse())
WORDS = ["▁", "▁▁", "▁a", "a", "b", "▁the", "é", "中", "▁中", "<", "0", "a▁b", "▁▁x"]


def spaces_backend(decoder: decoders.Decoder) -> Backend:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoder
    return backend


@functools.cache
def make_tokenizer(name: str) -> Tokenizer:
    backend = {
        "bytes": build_tokenizer,
        "llama": lambda: spaces_backend(decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)])),
        "strip two": lambda: spaces_backend(decoders.Sequence([*LLAMA, decoders.Strip(" ", 2, 0)])),
        "no strip": lambda: spaces_backend(decoders.Sequence([*LLAMA])),
        "metaspace": lambda: spaces_backend(decoders.Metaspace()),
        "metaspace never": lambda: spaces_backend(decoders.Metaspace(prepend_scheme="never")),
    }[name]()
    backend.add_tokens([AddedToken("a tool▁", special=False), AddedToken("<0xE4>x", special=False)])
    backend.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<s>", special=True)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), frozenset(), "")


NAMES = ["bytes", "llama", "strip two", "no strip", "metaspace", "metaspace never"]


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[slice]:
    """Slices that cover range(length), empty ones included."""
    points = sorted(draw(st.lists(st.integers(0, length), max_size=6)))
    return [slice(a, b) for a, b in zip([0, *points], [*points, length], strict=True)]


def id_of(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer._backend.token_to_id(token)
    assert found is not None, token
    return found


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Lists that mix all ids with bytes of one character, words and ids that have no token."""
    anything = st.integers(0, tokenizer.vocab_size + 3)
    forms = byte_char if tokenizer._backend.token_to_id("<0x00>") is None else "<0x{:02X}>".format
    character = st.sampled_from("aé中😀\ufffd ").map(
        lambda char: [id_of(tokenizer, forms(byte)) for byte in char.encode()]
    )
    words = [i for word in WORDS if (i := tokenizer._backend.token_to_id(word)) is not None]
    parts = [anything.map(lambda token: [token]), character]
    if words:
        parts.append(st.sampled_from(words).map(lambda token: [token]))
    return st.lists(st.one_of(parts), max_size=10).map(lambda lists: list(chain(*lists)))


def byte_char(byte: int) -> str:
    from lorastack.text.joiner import _BYTE_OF

    return next(char for char, value in _BYTE_OF.items() if value == byte)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_joined_pushes_are_the_decoded_whole(name: str, data: st.DataObject) -> None:
    tokenizer = make_tokenizer(name)
    ids = data.draw(ids_of(tokenizer))
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(ids[cut]) for cut in data.draw(cuts(len(ids)))]
    whole = tokenizer.decode(ids)
    assert "".join(pieces) + detokenizer.flush() == whole
    hf = tokenizer._hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert hf == whole


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=20))
def test_byte_level_text_comes_as_soon_as_its_characters_are_whole(text: str) -> None:
    tokenizer = make_tokenizer("bytes")
    detokenizer = Detokenizer(tokenizer)
    arrived, ids = "", tokenizer.encode(text)
    for place, token in enumerate(ids):
        arrived += detokenizer.push([token])
        assert arrived == tokenizer.decode(ids[: place + 1]).rstrip("\ufffd")
    assert (arrived, detokenizer.flush()) == (text, "")


def test_half_a_character_waits_and_ends_as_a_mark() -> None:
    tokenizer = make_tokenizer("bytes")
    ids = tokenizer.encode("é😀")[1:]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([token]) for token in ids[:-1]] == ["é", "", "", ""]
    assert detokenizer.flush() == "\ufffd"


def test_a_push_costs_the_same_at_any_length() -> None:
    """100,000 lone continuation bytes: quadratic work would take minutes."""
    for name, token in (("bytes", byte_char(0x80)), ("llama", "<0x80>")):
        tokenizer = make_tokenizer(name)
        token_id = id_of(tokenizer, token)
        detokenizer = Detokenizer(tokenizer)
        start = time.thread_time()
        text = "".join(detokenizer.push([token_id]) for _ in range(100_000)) + detokenizer.flush()
        assert text == "\ufffd" * 100_000
        assert time.thread_time() - start < 10


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.Sequence([decoders.ByteFallback(), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip("x", 1, 0)]),
        None,
    ],
    ids=str,
)
def test_unknown_decoders_are_refused(decoder: decoders.Decoder | None) -> None:
    backend = spaces_backend(decoders.Fuse())
    backend.decoder = decoder
    with pytest.raises(InvalidArgumentError, match="decoder"):
        Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), frozenset(), "")


def match_reference(text: str, sequences: Sequence[str]) -> tuple[str, str | None]:
    """Look for a sequence at the end of every prefix of the text, shortest prefix first."""
    for end in range(len(text) + 1):
        complete = [sequence for sequence in sequences if text[:end].endswith(sequence)]
        if complete:
            match = max(complete, key=len)
            return text[: end - len(match)], match
    return text, None


letters = st.text("ab", max_size=12)
stop_sequences = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4, unique=True)


@settings(max_examples=500)
@given(letters, stop_sequences, st.data())
def test_matches_equal_the_reference_however_the_text_is_cut(
    text: str, sequences: list[str], data: st.DataObject
) -> None:
    matcher = StopMatcher(sequences)
    emitted, match = "", None
    for cut in data.draw(cuts(len(text))):
        piece, match = matcher.push(text[cut])
        emitted += piece
        if match is not None:
            break
        seen = text[: cut.stop]
        assert seen.startswith(emitted)
        held = seen[len(emitted) :]
        assert held == max(
            (s[:n] for s in [*sequences, ""] for n in range(len(s) + 1) if seen.endswith(s[:n])),
            key=len,
        )
    assert (emitted + ("" if match else matcher.flush()), match) == match_reference(text, sequences)


def test_the_sequence_that_is_complete_first_wins() -> None:
    assert StopMatcher(["abcd", "bc"]).push("xabcd") == ("xa", "bc")
    assert StopMatcher(["ab", "abc"]).push("abc") == ("", "ab")
    assert StopMatcher(["b", "aab"]).push("xaab") == ("x", "aab")


def test_long_sequences_cost_no_more() -> None:
    matcher = StopMatcher(["a" * 20_000 + "b"] * 4)
    start = time.thread_time()
    for _ in range(20_000):
        assert matcher.push("a") == ("", None)
    assert time.thread_time() - start < 10


def stream(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str]) -> Iterator[str]:
    text = TextStream(tokenizer, stops)
    for token in ids:
        yield text.push(token)
        if text.match is not None:
            return
    yield text.flush()


def test_a_row_never_shows_part_of_a_stop_sequence() -> None:
    tokenizer = make_tokenizer("bytes")
    ids = tokenizer.encode("one é END two")
    assert "".join(stream(tokenizer, ids, ["END"])) == "one é "
    assert "".join(stream(tokenizer, ids, ["two!"])) == "one é END two"
    assert all("E" not in piece for piece in stream(tokenizer, ids, ["END"]))


def test_a_stop_sequence_may_be_complete_only_at_the_end() -> None:
    tokenizer = make_tokenizer("llama")
    ids = [id_of(tokenizer, token) for token in ("a", "<0x62>")]
    text = TextStream(tokenizer, ["ab"])
    assert [text.push(token) for token in ids] == ["", ""]
    assert (text.match, text.flush(), text.match) == (None, "", "ab")
