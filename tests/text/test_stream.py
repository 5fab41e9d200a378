import base64
import functools
import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from lorastack.errors import InvalidArgumentError
from lorastack.text import joiner
from lorastack.text.joiner import MAX_RUN
from lorastack.text.stream import Detokenizer, StopMatcher, TextStream
from lorastack.text.tokenizer import Tokenizer
from tests.helpers.lines import lines_run
from tests.helpers.tiny import build_tokenizer

MISTRAL_COMMON = Path(str(files("mistral_common"))) / "data"
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
        "mistral v1": mistral_backend,
        "tekken": tekken_backend,
    }[name]()
    backend.add_tokens([AddedToken("a tool▁", special=False), AddedToken("<0xE4>x", special=False)])
    backend.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<s>", special=True)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), frozenset(), "")


def mistral_backend() -> Backend:
    """The SentencePiece vocabulary of Mistral 7B. Merges are left out: nothing here encodes."""
    pieces = SentencePieceProcessor(model_file=str(MISTRAL_COMMON / "tokenizer.model.v1"))
    vocab = {pieces.id_to_piece(index): index for index in range(len(pieces))}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)])
    return backend


def tekken_backend() -> Backend:
    """The byte-level vocabulary of Mistral Nemo, its special tokens and merges left out."""
    entries = json.loads((MISTRAL_COMMON / "tekken_240718.json").read_text())["vocab"]
    tokens = (base64.b64decode(entry["token_bytes"]) for entry in entries[:30_000])
    vocab = {"".join(map(byte_char, token)): index for index, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab, []))
    backend.decoder = decoders.ByteLevel()
    return backend


NAMES = ["bytes", "llama", "strip two", "no strip", "metaspace", "metaspace never"]
REAL = ["mistral v1", "tekken"]


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[slice]:
    """Slices that cover range(length), empty ones included."""
    points = sorted(draw(st.lists(st.integers(0, length), max_size=6)))
    return [slice(a, b) for a, b in zip([0, *points], [*points, length], strict=True)]


def id_of(tokenizer: Tokenizer, token: str) -> int:
    index = tokenizer._backend.token_to_id(token)
    assert index is not None, token
    return index


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


@functools.cache
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


def hf_decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    text = tokenizer._hf.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def check_output_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Any prompt, any output, any cut of it: transformers' text of both without the prompt's."""
    ids = data.draw(ids_of(tokenizer))
    seam = data.draw(st.integers(0, len(ids)))
    prompt, output = ids[:seam], ids[seam:]
    detokenizer = Detokenizer(tokenizer, prompt)
    pieces = [detokenizer.push(output[cut]) for cut in data.draw(cuts(len(output)))]
    text = "".join(pieces) + detokenizer.flush()
    before, whole = hf_decode(tokenizer, prompt), hf_decode(tokenizer, ids)
    if whole.startswith(before):
        assert text == whole[len(before) :]
        return
    # The output completes the prompt's last character, or breaks its last run of byte tokens.
    assert whole.endswith(text)
    one = tokenizer.joiner()
    entries = [entry for index in output if (entry := tokenizer.token(index)) is not None]
    assert len(text) <= sum(len(one.raw(entry)) for entry in entries)
    finished = before.rstrip("\ufffd")
    if whole.startswith(finished):
        assert len(whole) - len(text) >= len(finished)


@pytest.mark.parametrize("name", NAMES + REAL)
@settings(max_examples=150)
@given(data=st.data())
def test_the_text_of_an_output_is_that_of_all_less_the_prompts(
    name: str, data: st.DataObject
) -> None:
    check_output_text(make_tokenizer(name), data)


@pytest.mark.real
@settings(max_examples=150)
@given(data=st.data())
def test_the_text_of_an_output_of_the_default_model(smollm: Path, data: st.DataObject) -> None:
    check_output_text(_loaded(smollm), data)


_loaded = functools.cache(Tokenizer.load)


@pytest.mark.parametrize(
    ("name", "prompt", "output", "text"),
    [
        ("llama", ["▁a"], ["▁the"], " the"),
        ("llama", ["<s>"], ["▁the"], "the"),  # nothing stands before it
        ("llama", ["▁a", "</s>", "<s>"], ["▁the"], " the"),
        ("llama", ["▁"], ["▁the"], " the"),
        ("strip two", ["▁"], ["▁▁x"], " x"),
        ("llama", ["<0x20>"], ["▁the"], " the"),
        ("llama", ["▁a"], [], ""),
        ("llama", ["b", "<0xE4>", "<0xB8>"], ["<0xAD>", "a"], "中a"),
        ("llama", ["b", "<0x61>", "<0xE4>", "<0xB8>"], ["<0xAD>"], "中"),
        ("llama", ["b", "<0xE4>", "<0xB8>"], ["▁the"], " the"),
        ("llama", ["b", "<0xE4>"], ["<0xB8>", "a"], "\ufffda"),
        ("llama", ["b", "<0x61>"], ["<0xE4>", "a"], "\ufffda"),
        ("metaspace", ["▁a"], ["▁the"], " the"),
        ("metaspace", ["<s>"], ["▁the"], "the"),
    ],
)
def test_what_stands_at_the_seam(
    name: str, prompt: list[str], output: list[str], text: str
) -> None:
    tokenizer = make_tokenizer(name)
    prompt_ids, ids = ([id_of(tokenizer, token) for token in side] for side in (prompt, output))
    assert "".join(stream(tokenizer, ids, [], prompt_ids)) == text


def test_a_byte_level_prompt_that_ends_inside_a_character() -> None:
    tokenizer = make_tokenizer("bytes")
    *prompt, last = tokenizer.encode("secret 中")
    (a,) = tokenizer.encode_part("a")
    assert "".join(stream(tokenizer, [last, a], [], prompt)) == "中a"
    assert "".join(stream(tokenizer, [a, a], [], prompt)) == "aa"
    assert "".join(stream(tokenizer, [], [], prompt)) == ""


def test_a_stop_sequence_may_begin_the_output_and_never_in_the_prompt() -> None:
    tokenizer = make_tokenizer("llama")
    a, the = (id_of(tokenizer, token) for token in ("▁a", "▁the"))
    text = TextStream(tokenizer, [" the"], [a])
    assert (text.push(the), text.match) == ("", " the")
    text = TextStream(tokenizer, ["a the"], [a])
    assert (text.push(the) + text.flush(), text.match) == (" the", None)


def test_only_the_end_of_a_prompt_is_read() -> None:
    read: list[int] = []

    class Prompt(tuple[int, ...]):
        def __reversed__(self) -> Iterator[int]:
            for token in self[::-1]:
                read.append(token)
                yield token

    for name, token in (("bytes", "a"), ("llama", "▁a"), ("metaspace", "▁a"), ("llama", "<0x80>")):
        tokenizer = make_tokenizer(name)
        read.clear()
        Detokenizer(tokenizer, Prompt([id_of(tokenizer, token)] * 10_000))
        assert len(read) <= (MAX_RUN if token == "<0x80>" else 3)


def test_a_prompt_may_end_in_many_bytes() -> None:
    tokenizer = make_tokenizer("llama")
    prompt = tokenizer.encode_part("é" * 5000 + "日" * 3000)  # characters without a token
    *prompt, last = [index for index in prompt if index != id_of(tokenizer, "▁")]
    a, lead = id_of(tokenizer, "a"), id_of(tokenizer, "<0xE4>")
    for before, output, text in (
        ([*prompt, last], [a], "a"),
        (prompt, [last, a], "日a"),
        (prompt, [a], "a"),
        ([*prompt, last], [lead, a], "\ufffda"),
    ):
        assert "".join(stream(tokenizer, output, [], before)) == text


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


def test_a_push_costs_the_same_at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lone continuation bytes never become a character; those that are held are read at the end."""
    reads: list[int] = []

    def record(run: bytearray) -> str:
        reads.append(len(run))
        return run_text(run)

    run_text = joiner._run_text
    monkeypatch.setattr(joiner, "_run_text", record)
    for name, token in (("bytes", byte_char(0x80)), ("llama", "<0x80>")):
        tokenizer = make_tokenizer(name)
        token_id = id_of(tokenizer, token)
        detokenizer = Detokenizer(tokenizer)
        text, costs = "", set()
        for _ in range(1000):
            piece, cost = lines_run(lambda: detokenizer.push([token_id]))  # noqa: B023
            text += piece
            costs.add(cost)
        assert len(costs) == 1
        assert not any(reads), "the run is read at its end"
        assert text + detokenizer.flush() == "\ufffd" * 1000


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
    """Each push past the first 500 is a mismatch that keeps 499 matched characters."""
    costs = []
    for length in (5, 500):
        matcher = StopMatcher(["a" * length + "b"] * 4)
        matcher.push("a" * length)
        pushed, cost = lines_run(lambda: [matcher.push("a") for _ in range(100)])  # noqa: B023
        assert pushed == [("a", None)] * 100
        costs.append(cost)
    assert costs[0] == costs[1]


def stream(
    tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str], prompt: Sequence[int] = ()
) -> Iterator[str]:
    text = TextStream(tokenizer, stops, prompt)
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
