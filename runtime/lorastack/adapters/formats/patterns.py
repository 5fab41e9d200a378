"""Patterns of uploads, matched against all module names together, in counted steps.

Engines that backtrack (`re`, `regex`) can take years or gigabytes for a pattern of ten characters,
and a time limit accepts on one machine what it refuses on another. So only the parser of `re` is
used, as PEFT's patterns are written for `re`. Its syntax tree is run here on sets of positions:
from the set where matches start to the set where they can end. A set is one integer with a bit for
each position in the text of all names, so a step takes about a microsecond whatever the pattern,
and a pattern takes the same number of steps everywhere. What depends on the order of trying (back
references, conditions, possessive and atomic groups) cannot be run so, and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from lorastack.adapters.formats.refusal import invalid, unsupported

MAX_PATTERN = 4096  # characters
MAX_DEPTH = 64  # parentheses in each other
# For all patterns of a config together; each character counts as a step too. 1,024 full names in
# rank_pattern and again in alpha_pattern take 160,000.
MAX_STEPS = 1 << 18
_CLASS_STEPS = 16  # for a class of characters

_CATEGORIES = {
    ops.CATEGORY_DIGIT: r"\d",
    ops.CATEGORY_NOT_DIGIT: r"\D",
    ops.CATEGORY_SPACE: r"\s",
    ops.CATEGORY_NOT_SPACE: r"\S",
    ops.CATEGORY_WORD: r"\w",
    ops.CATEGORY_NOT_WORD: r"\W",
}

Tree = Sequence[tuple[Any, Any]]  # operations of `re`'s parser, each with its arguments


class Names:
    """Module names to match. A set of them is an integer that only these methods read."""

    def __init__(self, names: Iterable[str]) -> None:
        """names: printable, none twice."""
        self.everything = 0
        self._starts = self._suffixes = self._inside = self._word = 0
        self._characters: dict[str, int] = {}
        self._names: dict[int, str] = {}  # by the position of their end
        self._left = MAX_STEPS
        position = 0
        for name in names:
            self._starts |= 1 << position
            self._suffixes |= 1 << position
            for character in name:
                bit = 1 << position
                self._characters[character] = self._characters.get(character, 0) | bit
                self._inside |= bit
                if character == ".":
                    self._suffixes |= bit << 1
                if character == "_" or character.isalnum():
                    self._word |= bit
                position += 1
            self.everything |= 1 << position
            self._names[position] = name
            position += 1  # nothing matches the place between two names
        self._positions = self._inside | self.everything

    def full_matches(self, pattern: str, field: str) -> int:
        """The names that the whole pattern matches, as `re.fullmatch` does.

        field: of the config. Raises InvalidArgumentError naming it for a pattern that is bad or not
        supported, and for too many steps in all.
        """
        tree, flags = self._parse(pattern, pattern, field)
        return self._run(tree, flags, self._starts, field)

    def suffix_matches(self, pattern: str, field: str) -> int:
        """The names that match whole or from behind a dot. Raises as `full_matches`."""
        tree, flags = self._parse(f"({pattern})", pattern, field)
        if len(tree) != 1 or tree[0][0] is not ops.SUBPATTERN:
            raise invalid(f"{field} has the bad pattern {pattern[:64]!r}: its parentheses differ")
        return self._run(tree, flags, self._suffixes, field)

    def listed(self, chosen: int) -> Iterator[str]:
        """The names of a set."""
        while chosen:
            last = chosen.bit_length() - 1
            chosen ^= 1 << last
            yield self._names[last]

    def chosen(self, names: Iterable[str]) -> int:
        """The set of these names, without those that are not among the modules."""
        wanted = frozenset(names)
        return sum(1 << end for end, name in self._names.items() if name in wanted)

    def _parse(self, text: str, shown: str, field: str) -> tuple[Tree, int]:
        if len(text) > MAX_PATTERN or _depth(text) > MAX_DEPTH:
            raise invalid(
                f"{field} has a pattern longer than {MAX_PATTERN} characters or with more than "
                f"{MAX_DEPTH} parentheses in each other"
            )
        self._spend(len(text), field)
        try:
            parsed = _parser.parse(text)
        except (re.error, ValueError, OverflowError, RecursionError, FutureWarning) as error:
            raise invalid(f"{field} has the bad pattern {shown[:64]!r}: {error}") from error
        return parsed.data, parsed.state.flags

    def _run(self, tree: Tree, flags: int, starts: int, field: str) -> int:
        return _Run(self, field).image(tree, flags, starts, forward=True) & self.everything

    def _spend(self, steps: int, field: str) -> None:
        self._left -= steps
        if self._left < 0:
            raise invalid(
                f"{field}: the patterns take more than {MAX_STEPS} steps to match: use fewer or "
                "simpler ones, or plain names"
            )


class _Run:
    """One pattern over all names."""

    def __init__(self, names: Names, field: str) -> None:
        self._names = names
        self._field = field
        self._classes: dict[tuple[Any, ...], int] = {}

    def image(self, tree: Tree, flags: int, positions: int, *, forward: bool) -> int:
        """Ends of matches that start at the positions; backward: starts of those that end there."""
        for operation, arguments in tree if forward else reversed(tree):
            if not positions:
                break
            self._names._spend(1, self._field)
            positions = self._step(operation, arguments, flags, positions, forward)
        return positions

    def _step(
        self, operation: Any, arguments: Any, flags: int, positions: int, forward: bool
    ) -> int:
        """One operation's `image`."""
        if operation in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN):
            matching = self._class(operation, arguments, flags)
            return (positions & matching) << 1 if forward else positions >> 1 & matching
        if operation is ops.BRANCH:
            ends = 0
            for branch in arguments[1]:
                ends |= self.image(branch, flags, positions, forward=forward)
            return ends
        if operation is ops.SUBPATTERN:
            _, added, removed, tree = arguments
            return self.image(tree, (flags | added) & ~removed, positions, forward=forward)
        if operation in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            least, most, tree = arguments
            return self._repeat(least, most, tree, flags, positions, forward)
        if operation is ops.AT:
            return positions & self._anchor(arguments)
        if operation in (ops.ASSERT, ops.ASSERT_NOT):
            direction, tree = arguments
            shortest, longest = tree.getwidth()
            if direction < 0 and shortest != longest:
                raise invalid(f"{self._field} has a bad pattern: it looks behind for any length")
            everywhere = self._names._positions
            # A match follows exactly the positions that a backward run from everywhere reaches.
            holds = self.image(tree, flags, everywhere, forward=direction < 0)
            return positions & (holds if operation is ops.ASSERT else ~holds)
        if operation is ops.FAILURE:
            return 0
        raise unsupported(
            f"{self._field} has a pattern with {str(operation).lower()}, which is not supported"
        )

    def _repeat(
        self, least: int, most: int, tree: Tree, flags: int, positions: int, forward: bool
    ) -> int:
        """Ends soon: a round moves positions on or adds none, and names are short."""
        for _ in range(least):
            before, positions = positions, self.image(tree, flags, positions, forward=forward)
            if positions == before:
                break
        reached = latest = positions
        for _ in range(int(most) - least):
            latest = self.image(tree, flags, latest, forward=forward) & ~reached
            if not latest:
                break
            reached |= latest
        return reached

    def _anchor(self, kind: Any) -> int:
        names = self._names
        if kind in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
            return names._starts
        if kind in (ops.AT_END, ops.AT_END_STRING):
            return names.everything
        before = names._word << 1  # after a character of a word
        boundary = (names._word ^ before) & names._positions
        return boundary if kind is ops.AT_BOUNDARY else names._positions & ~boundary

    def _class(self, operation: Any, arguments: Any, flags: int) -> int:
        """The positions of the characters that a class of one character matches."""
        if operation is ops.ANY:
            return self._names._inside
        if operation is ops.LITERAL and not flags & re.IGNORECASE:
            return self._names._characters.get(chr(arguments), 0)
        key = (operation, str(arguments), flags)
        if key not in self._classes:
            self._names._spend(_CLASS_STEPS, self._field)
            one = re.compile(_class_text(operation, arguments), flags & (re.IGNORECASE | re.ASCII))
            self._classes[key] = sum(
                places
                for character, places in self._names._characters.items()
                if one.fullmatch(character)
            )
        return self._classes[key]


def _class_text(operation: Any, arguments: Any) -> str:
    """The class as a pattern again: `re` itself decides which characters differ in case alone."""
    if operation is ops.LITERAL:
        return re.escape(chr(arguments))
    if operation is ops.NOT_LITERAL:
        return f"[^{re.escape(chr(arguments))}]"
    text = ""
    for kind, value in arguments:
        if kind is ops.NEGATE:
            text += "^"
        elif kind is ops.LITERAL:
            text += re.escape(chr(value))
        elif kind is ops.RANGE:
            text += f"{re.escape(chr(value[0]))}-{re.escape(chr(value[1]))}"
        else:
            text += _CATEGORIES[value]
    return f"[{text}]"


def _depth(text: str) -> int:
    """The deepest nesting of parentheses; escaped ones count too."""
    deepest = depth = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest
