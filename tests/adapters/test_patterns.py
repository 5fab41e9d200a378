"""Patterns match what `re` matches, in a number of steps that is the same everywhere."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lorastack.adapters.formats.patterns import MAX_DEPTH, MAX_STEPS, Names
from lorastack.errors import InvalidArgumentError, Reason

NAMES = ["lm_head", "model.embed_tokens", "model.norm"] + [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1, 11)
    for name in ("self_attn.q_proj", "mlp.up_proj")
]
ATOMS = st.sampled_from(
    [
        *("a", "l", "m", "model", "layers", "q_proj", "_", "1", "\u0131", "\u212a", "\u017f"),
        *(r"\.", ".", r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", "[a-m]", r"[^.\d]", r"[\W\d]"),
        *("[a-zA-Z_]", "^", "$", r"\A", r"\Z", r"\b", r"\B", "(?i:MLP)", "(?ai:K)", "", r"\n"),
        *(r"[^\n]", "[^a]", r"(?:\.\w+)", "{e<=3}", "[[:alpha:]]"),
    ]
)
REPEATS = st.sampled_from(["*", "+", "?", "*?", "??", "{2}", "{1,3}", "{0,2}?", "{900}"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        # Repeated atoms only: `re` itself would take years for more.
        st.tuples(ATOMS, REPEATS).map(lambda pair: f"({pair[0]}){pair[1]}"),
        st.tuples(st.sampled_from(["(?=", "(?!", "(?:.*?", "(?i:"]), inner).map(
            lambda pair: f"{pair[0]}{pair[1]})"
        ),
        st.tuples(st.sampled_from(["(?<=", "(?<!"]), ATOMS).map(lambda p: f"{p[0]}{p[1]})"),
    ),
    max_leaves=6,
)


def full(pattern: str, names: list[str] = NAMES) -> set[str]:
    text = Names(names)
    return set(text.listed(text.full_matches(pattern, "field")))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@settings(max_examples=400, deadline=None)
@given(PATTERNS)
@example(
    r"(?:.*?(?:layers).*?(?:attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.)"
)
@example(r"^(model)(?!.*(lm_head|embed|norm)).*")
@example(r".*(?<!layers)\.1\..*")
@example(r"(?i)MODEL\..*")
@example(r"(?x) model \. norm # a comment")
@example(r"((a{999}){999}){999}|lm_head")
def test_as_re_matches(pattern: str) -> None:
    try:
        compiled = re.compile(pattern)
    except re.error:
        assume(False)
    assert full(pattern) == {name for name in NAMES if compiled.fullmatch(name)}
    try:
        keyed = re.compile(rf"(.*\.)?({pattern})$")
    except re.error:
        return
    names = Names(NAMES)
    found = set(names.listed(names.suffix_matches(pattern, "field")))
    assert found == {name for name in NAMES if keyed.match(name)}


@pytest.mark.parametrize(
    "pattern",
    [
        *("(", ")", "*", "a{2,1}", "[b-a]", "m(?<=m+)o", "(?R)*", "(?1)", r"(?P>x)", r"\p{L}"),
        *("a{99999999999}", "(?L)a", "(?P<x>a)(?P<x>b)", r"\8", "[", "\\", "a++b++*", r"\N{no}"),
    ],
)
def test_bad_patterns_are_refused_by_name(pattern: str) -> None:
    with pytest.raises(InvalidArgumentError, match="the_field") as refusal:
        Names(NAMES).full_matches(pattern, "the_field")
    assert refusal.value.reason is Reason.INVALID_ADAPTER
    assert refusal.value.message.isprintable()


@pytest.mark.parametrize(
    "pattern", [r"(m)\1", "(?P<x>l|m)(?P=x)", "(m)?(?(1)m|l)", "(?>m+)", "l*+m"]
)
def test_what_depends_on_the_order_of_trying_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidArgumentError, match="the_field") as refusal:
        Names(["lm", "mm"]).full_matches(pattern + "|.*", "the_field")
    assert refusal.value.reason is Reason.UNSUPPORTED_ADAPTER


@pytest.mark.parametrize("key", ["a)|(b", "q_proj)(x", "(?i)q_proj"])
def test_keys_that_leave_their_parentheses_are_refused(key: str) -> None:
    with pytest.raises(InvalidArgumentError, match="rank_pattern"):
        Names(NAMES).suffix_matches(key, "rank_pattern")


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"(?:(?:.*)*)*(?:(?:.*)*)*(?=x)x(\w|\w\w|\w+)*Z", "(((a{999}){999}){999})*", "(.*)*x"),
        *("(?:a|aa|a?)*" * 50, "(?:.*.*.*.*.*.*.*.*)*x", "(?=(?=(?=(.*)*)*)*)*" * 100),
        "(" * MAX_DEPTH + "a" + "*)" * MAX_DEPTH,
    ],
)
def test_patterns_that_never_end_elsewhere_end(pattern: str) -> None:
    """What makes other engines try for years is a few thousand steps here."""
    names = Names(NAMES)
    names.full_matches(pattern, "field")
    assert names._left > MAX_STEPS * 0.9


def test_the_number_of_steps_is_bounded() -> None:
    names = Names(NAMES)
    for _ in range(MAX_STEPS):
        before = names._left
        try:
            names.full_matches("(?:[a-z.]|[b-z.]|[c-z])*" * 20, "field")
        except InvalidArgumentError as refusal:
            assert "field: the patterns take more than" in refusal.message
            break
        assert names._left < before
    with pytest.raises(InvalidArgumentError, match="more than"):
        names.full_matches("(?:[a-z.]|[b-z.]|[c-z])*" * 20, "field")
    with pytest.raises(InvalidArgumentError, match="parentheses in each other"):
        Names(NAMES).full_matches("(" * 65 + "a" + ")" * 65, "field")
    with pytest.raises(InvalidArgumentError, match="longer than"):
        Names(NAMES).full_matches("a" * 5000, "field")


def test_the_steps_do_not_depend_on_the_number_of_names() -> None:
    few, many = Names(NAMES), Names([f"{name}.{n:03}" for name in NAMES for n in range(100)])
    for names in (few, many):
        names.full_matches(r"model\.layers\.(0|1)\..*_proj.*", "field")
    assert many._left > few._left - 50
