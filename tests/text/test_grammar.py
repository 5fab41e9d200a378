"""Grammars over small vocabularies of both families: masks allow what was wanted, and all of it."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from lorastack.errors import FailedPreconditionError, InvalidArgumentError, Reason
from lorastack.request import Grammar, Matcher
from lorastack.text import grammar as grammar_module
from lorastack.text.grammar import GrammarCompiler, JsonSchema, Regex
from lorastack.text.tokenizer import Tokenizer
from tests.helpers.tiny import EOS, IM_END, SPECIALS, build_tokenizer

FAMILIES = ("bytes", "spaces", "spaces, no prompt")
NUM_PADDING = 37  # outputs of the model without a token
PIECES = ["▁", "▁▁", "▁a", "ab", '"', '{"', '":', ",", ":", "▁[", "]", "}", "é", "▁tr", "ue", "<"]


def spaces_backend() -> Backend:
    """Like Llama 2's: a space before every text, characters without a token as bytes."""
    letters = [chr(code) for code in range(0x61, 0x7B)] + list("0123456789.-+eE[{")
    tokens = [*("<unk>", "<s>", "</s>"), *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += dict.fromkeys([*PIECES, *letters])
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [("▁", "▁"), ("▁", "a"), ("a", "b"), ("{", '"'), ('"', ":"), ("▁", "["), ("u", "e")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    spaces = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse())
    backend.decoder = decoders.Sequence([*spaces, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    return backend


@functools.cache
def tokenizer_of(family: str) -> Tokenizer:
    backend = build_tokenizer() if family == "bytes" else spaces_backend()
    ends = {SPECIALS.index(EOS), SPECIALS.index(IM_END)} if family == "bytes" else {2}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    return Tokenizer(fast, frozenset(ends), "")


def text_of(family: str, tokens: list[int]) -> str:
    """The text of an output, behind a prompt with text or without."""
    tokenizer = tokenizer_of(family)
    before = [] if family == "spaces, no prompt" else tokenizer.encode_part("x")
    return tokenizer.decode([*before, *tokens]).removeprefix("x" if before else "")


@functools.cache
def compiler_of(family: str) -> GrammarCompiler:
    tokenizer = tokenizer_of(family)
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + NUM_PADDING)


def compiled(wanted: JsonSchema | Regex, family: str = "bytes") -> Grammar:
    return compiler_of(family).compile(wanted, int(family == "spaces, no prompt"))


def schema(value: dict[str, Any]) -> JsonSchema:
    return JsonSchema(json.dumps(value))


def allowed(matcher: Matcher) -> list[int]:
    mask = matcher.mask()
    return [index for index in range(len(mask) * 8) if mask[index // 8] >> index % 8 & 1]


def fresh(grammar: Grammar, tokens: Iterable[int]) -> Matcher:
    """A matcher that went to its place token by token, with nothing in between."""
    matcher = grammar.matcher()
    for token in tokens:
        matcher.commit([token])
    return matcher


def walk(data: st.DataObject, grammar: Grammar, ends: frozenset[int]) -> list[int]:
    """Random allowed tokens up to an end token, which is left out."""
    matcher, tokens = grammar.matcher(), []
    for _ in range(300):
        choices = allowed(matcher)
        if matcher.finished:
            assert set(choices) == ends
        token = data.draw(st.sampled_from(choices))
        if token in ends:
            return tokens
        tokens.append(token)
        matcher.commit([token])
    assume(False)
    raise AssertionError


LEAVES = st.sampled_from(
    ["a", "b", "th", "é", "中", "[a-c]", "[^x]", "[0-9]", r"\.", " ", "<", "."]
)
PATTERNS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format),
        inner.map("(?:{})?".format),
        inner.map("(?:{}){{0,3}}".format),
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(pattern=PATTERNS, data=st.data())
def test_whatever_is_allowed_matches_the_expression(
    family: str, pattern: str, data: st.DataObject
) -> None:
    tokenizer = tokenizer_of(family)
    tokens = walk(data, compiled(Regex(pattern), family), tokenizer.eos_ids)
    assert re.fullmatch(pattern, text_of(family, tokens))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(pattern=PATTERNS, data=st.data())
def test_every_text_that_matches_is_allowed(family: str, pattern: str, data: st.DataObject) -> None:
    """In the tokens in which the model mostly sees it."""
    tokenizer = tokenizer_of(family)
    text = data.draw(st.from_regex(pattern, fullmatch=True))
    ids = tokenizer.encode_part(text)
    assume(ids and tokenizer.decode(ids) == text)
    matcher = compiled(Regex(pattern), family).matcher()
    if family == "spaces" or (family != "bytes" and ids[0] not in allowed(matcher)):
        # The space before every text belongs to the prompt. Without a prompt it is asked for only
        # if texts may begin with a space of their own.
        assume(tokenizer.token(ids[0]) == "▁")
        del ids[0]
    for token in ids:
        assert token in allowed(matcher)
        matcher.commit([token])
    assert tokenizer.eos_ids <= set(allowed(matcher))


def objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    keys = st.sampled_from(["a", "name", "th e", "é"])
    return st.dictionaries(keys, inner, max_size=3).map(
        lambda fields: {
            "type": "object",
            "properties": fields,
            "required": list(fields)[:1],
            "additionalProperties": False,
        }
    )


SCHEMAS = st.recursive(
    st.one_of(
        st.integers(0, 4).map(lambda size: {"type": "string", "maxLength": size}),
        st.tuples(st.integers(-20, 5), st.integers(5, 40)).map(
            lambda ends: {"type": "integer", "minimum": ends[0], "maximum": ends[1]}
        ),
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": {"a": [1, "</s>"]}}]),
        st.lists(st.sampled_from(["a", 1, None, "é\n"]), min_size=1).map(lambda e: {"enum": e}),
    ),
    lambda inner: st.one_of(
        objects(inner),
        st.tuples(inner, st.integers(0, 2)).map(
            lambda of: {"type": "array", "items": of[0], "minItems": of[1], "maxItems": 2}
        ),
        st.tuples(inner, inner).map(lambda of: {"anyOf": list(of)}),
    ),
    max_leaves=4,
)


def follows(value: Any, wanted: dict[str, Any]) -> bool:
    match wanted:
        case {"anyOf": several}:
            return any(follows(value, one) for one in several)
        case {"const": constant}:
            return value == constant
        case {"enum": constants}:
            return value in constants
        case {"type": "string"}:
            return isinstance(value, str) and len(value) <= wanted["maxLength"]
        case {"type": "integer"}:
            return type(value) is int and wanted["minimum"] <= value <= wanted["maximum"]
        case {"type": "array"}:
            fits = isinstance(value, list) and wanted["minItems"] <= len(value) <= 2
            return fits and all(follows(item, wanted["items"]) for item in value)
        case {"type": "object"}:
            fields = wanted["properties"]
            fits = isinstance(value, dict) and set(wanted["required"]) <= set(value) <= set(fields)
            return fits and all(follows(item, fields[key]) for key, item in value.items())
        case {"type": "boolean"}:
            return isinstance(value, bool)
    return value is None


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(wanted=SCHEMAS, data=st.data())
def test_whatever_is_allowed_is_json_that_follows_the_schema(
    family: str, wanted: dict[str, Any], data: st.DataObject
) -> None:
    tokenizer = tokenizer_of(family)
    tokens = walk(data, compiled(schema(wanted), family), tokenizer.eos_ids)
    text = text_of(family, tokens)
    assert follows(json.loads(text), wanted), text


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(wanted=st.one_of(SCHEMAS.map(schema), PATTERNS.map(Regex)), data=st.data())
def test_any_order_of_places_gives_what_a_fresh_matcher_gives(
    family: str, wanted: JsonSchema | Regex, data: st.DataObject
) -> None:
    grammar, matcher = compiled(wanted, family), compiled(wanted, family).matcher()
    committed: list[int] = []
    for _ in range(3):
        paths: list[list[int]] = [[]]
        for _ in range(data.draw(st.integers(0, 5))):  # nodes of a tree, end tokens too
            parent = data.draw(st.sampled_from(paths))
            choices = allowed(fresh(grammar, [*committed, *parent]))
            paths.append([*parent, data.draw(st.sampled_from(choices))])
        for path in data.draw(st.lists(st.sampled_from(paths), max_size=8)):
            if data.draw(st.booleans()):
                assert matcher.forced(3) == fresh(grammar, committed).forced(3)
            matcher.seek(path)
            other = fresh(grammar, [*committed, *path])
            assert (matcher.mask(), matcher.finished) == (other.mask(), other.finished)
        chosen = data.draw(st.sampled_from(paths))
        matcher.commit(chosen)
        committed += chosen
        assert matcher.mask() == fresh(grammar, committed).mask()


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(wanted=st.one_of(SCHEMAS.map(schema), PATTERNS.map(Regex)), data=st.data())
def test_forced_tokens_are_the_only_ones_allowed(
    family: str, wanted: JsonSchema | Regex, data: st.DataObject
) -> None:
    # llguidance cuts text that spells a special token differently when it forces it than in its
    # masks (docs/log.md): such a draft is merely rejected.
    assume("</s>" not in wanted.text)
    matcher = compiled(wanted, family).matcher()
    for _ in range(4):
        forced = matcher.forced(50)
        assert matcher.forced(2) == forced[:2]
        for place, token in enumerate(forced):
            matcher.seek(forced[:place])
            assert allowed(matcher) == [token]
        matcher.commit(forced)
        matcher.commit([data.draw(st.sampled_from(allowed(matcher)))])


@pytest.mark.parametrize("family", FAMILIES)
def test_forced_text_is_cut_as_the_model_is_used_to(family: str) -> None:
    tokenizer = tokenizer_of(family)
    text = '{"name": [true, "the ab"], "é": 12}'
    forced = compiled(schema({"const": json.loads(text)}), family).matcher().forced(99)
    usual = tokenizer.encode_part(text)
    assert list(forced) == (usual if family == "bytes" else usual[1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_and_padding_are_never_text(family: str) -> None:
    tokenizer = tokenizer_of(family)
    matcher = compiled(Regex("(?s:.)*"), family).matcher()
    specials = {i for i in range(tokenizer.vocab_size) if tokenizer.token(i) is None}
    assert not set(allowed(matcher)) & (specials - tokenizer.eos_ids)
    assert max(allowed(matcher)) < tokenizer.vocab_size
    assert len(matcher.mask()) == -(-(tokenizer.vocab_size + NUM_PADDING) // 32) * 4
    named = compiled(schema({"const": "x</s><s>"}), family).matcher().forced(99)
    assert not set(named) & specials
    assert text_of(family, named) == '"x</s><s>"'


def test_end_tokens_stay_allowed_once_one_was_taken() -> None:
    ends = sorted(tokenizer_of("bytes").eos_ids)
    a, b = tokenizer_of("bytes").encode_part("ab")
    matcher = compiled(Regex("a|ab")).matcher()
    assert allowed(matcher) != ends
    matcher.seek([a])
    assert (allowed(matcher), matcher.finished) == (sorted([*ends, b]), False)
    for path in ([a, ends[0]], [a, ends[0], ends[1]], [a, b], [a, b, ends[1], 9]):
        matcher.seek(path)
        assert (allowed(matcher), matcher.finished) == (ends, True)
    matcher.commit([a, ends[1]])
    for path in ([], [ends[0]], [ends[1], ends[1]]):
        matcher.seek(path)
        assert (allowed(matcher), matcher.finished, matcher.forced(9)) == (ends, True, ())


def test_a_path_that_is_not_allowed_is_refused_and_does_no_harm() -> None:
    a, b = tokenizer_of("bytes").encode_part("ab")
    matcher = compiled(Regex("aab")).matcher()
    matcher.commit([a])
    with pytest.raises(ValueError, match=str(b)):
        matcher.seek([a, b, b])
    assert not matcher.error
    matcher.seek([a])
    assert allowed(matcher) == [b]


def test_a_grammar_that_grows_too_complex_ends_its_row() -> None:
    fields = [f"p{i}" for i in range(5)]
    several = [
        {"type": "object", "properties": {f: {"type": "integer"} for f in fields}, "required": [f]}
        for f in fields * 60
    ]
    matcher = compiled(schema({"anyOf": several})).matcher()
    (brace,) = tokenizer_of("bytes").encode_part("{")
    matcher.commit([brace])
    assert "items" in matcher.error
    assert allowed(matcher) == []
    assert matcher.finished
    assert matcher.forced(3) == ()


@pytest.mark.parametrize(
    ("wanted", "cause"),
    [
        (Regex("(yes"), "unclosed group at character 1"),
        (Regex("a/\n\\d\\d(?=a)"), "look-ahead and look-behind, is not supported at character 8"),
        (Regex("ab[z-a]"), "at character 4"),
        (Regex("ab\\"), "at character 3"),
        (Regex("a$b"), "lookarounds not supported yet"),
        (Regex(r"[^\s\S]"), "no text"),
        (Regex("(" * 5000), "at character 5000"),
        (JsonSchema("{"), "line 1 column 1"),
        (JsonSchema("[1]"), "object"),
        (JsonSchema('{"items":' * 200 + "{}" + "}" * 200), "recursion limit"),
        (schema({"type": "strin"}), "strin"),
        (schema({"not": {"type": "string"}}), '"not"'),
        (schema({"$ref": "#"}), "no text"),
        (schema({"$ref": "http://127.0.0.1:1/x.json"}), "x.json"),
        (schema({"enum": []}), "Unsatisfiable"),
        (schema({"type": "string", "pattern": "a("}), "at character 2 of the pattern a("),
    ],
    ids=lambda value: getattr(value, "text", value)[:20],
)
def test_what_cannot_be_compiled_is_refused_with_its_cause(
    wanted: JsonSchema | Regex, cause: str
) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        compiled(wanted)
    assert refusal.value.reason is Reason.INVALID_GRAMMAR
    assert refusal.value.metadata == {"field": wanted.field}
    assert cause in refusal.value.message
    assert wanted.field in refusal.value.message
    assert len(refusal.value.message) < 450
    assert "\n" not in refusal.value.message


def test_a_model_that_cannot_end_a_text_is_refused() -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer())
    compiler = GrammarCompiler(Tokenizer(fast, frozenset(), ""), 300)
    with pytest.raises(FailedPreconditionError, match="end token"):
        compiler.compile(Regex("a"))


def test_text_without_tokens_is_refused() -> None:
    backend = Backend(models.BPE({"a": 0, "</s>": 1}, []))
    backend.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    compiler = GrammarCompiler(Tokenizer(fast, frozenset({1}), ""), 2)
    with pytest.raises(InvalidArgumentError, match="tokens"):
        compiler.compile(Regex("b"))
    matcher = compiler.compile(Regex("a?[ab]b")).matcher()
    matcher.commit([0])
    assert (allowed(matcher), matcher.finished) == ([0], False)
    matcher.commit([0])
    assert (allowed(matcher), matcher.finished) == ([], True)
    assert matcher.error


def test_the_last_grammars_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(tokenizer_of("bytes"), 300)
    first = compiler.compile(Regex("a"))
    assert compiler.compile(Regex("a")) is first
    assert compiler.compile(JsonSchema('{"const": "a"}')) is not first
    monkeypatch.setattr(grammar_module, "MAX_KEPT", 2)
    compiler.compile(Regex("a"))
    second = compiler.compile(Regex("b"))
    assert compiler.compile(Regex("a")) is first  # the schema was the least recently used
    monkeypatch.setattr(grammar_module, "MAX_KEPT", 9)
    monkeypatch.setattr(grammar_module, "MAX_KEPT_CHARS", 3)
    compiler.compile(Regex("cc"))
    assert compiler.compile(Regex("a")) is first
    assert compiler.compile(Regex("b")) is not second


def test_threads_may_share_a_grammar() -> None:
    compiler = GrammarCompiler(tokenizer_of("bytes"), 300)
    wanted = schema({"type": "object", "properties": {"a": {"type": "string"}}})

    def masks(_: int) -> list[bytes]:
        matcher, taken = compiler.compile(wanted).matcher(), []
        for _ in range(20):
            taken.append(matcher.mask())
            matcher.commit(allowed(matcher)[-1:])
        return taken

    with ThreadPoolExecutor(4) as threads:
        assert len({tuple(found) for found in threads.map(masks, range(16))}) == 1
