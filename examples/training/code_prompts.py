"""Python prompts to train the code heads on: no benchmark task is among them.

Two sources: documented functions of Python's standard library (signature and docstring), and small
list and text tasks composed here, whose examples are computed by running them.
"""

import importlib
import inspect
import pkgutil
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

_WORDINGS = (
    "{stub}",
    "{stub}",
    "{stub}\n",
    "{stub}",
    "Complete the following Python function.\n\n{stub}",
    "Complete the following Python function:\n\n```python\n{stub}\n```",
    "Write the body of this Python function.\n\n```python\n{stub}```",
    "Please implement this function in Python:\n{stub}",
    "Here is a function signature with its docstring. Finish the code.\n\n{stub}",
    "Write a Python function `{name}` that does the following: {doc}",
    "Write a Python program with a function called {name}. {doc} Show an example of its use.",
)
_LISTS = ("numbers", "values", "items", "arr", "lst", "nums", "l")
_WORDS = (
    "the", "river", "stone", "orange", "apple", "window", "seven", "little", "garden", "music",
    "level", "noon",
)  # fmt: skip
_TEXTS = ("text", "s", "string", "sentence", "message")
# Opening these on import talks to the screen, the network or a browser, or prints.
_SKIPPED = {"antigravity", "this", "idlelib", "tkinter", "turtle", "turtledemo", "test", "lib2to3"}


def _functions(module: Any) -> Iterator[tuple[str, Any]]:
    """Public functions and methods that are defined in this module."""
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isroutine(value):
            yield name, value
        elif inspect.isclass(value):
            for method, function in sorted(vars(value).items()):
                if not method.startswith("_") and inspect.isfunction(function):
                    yield method, function


def _stub(name: str, signature: str, doc: str, quotes: str = '"""') -> str:
    """The text of a function without its body, as code benchmarks print it."""
    body = doc.strip().replace("\n", "\n    ")
    return f"def {name}{signature}:\n    {quotes} {body}\n    {quotes}\n"


def library_tasks(limit: int = 500) -> Iterator[tuple[str, str, str]]:
    """Yield (name, stub, first sentence) for documented functions of the standard library."""
    seen: set[str] = set()
    for info in sorted(pkgutil.iter_modules(), key=lambda module: module.name):
        if info.name not in sys.stdlib_module_names or info.name in _SKIPPED:
            continue
        if info.name.startswith("_"):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # deprecated modules say so on import
                module = importlib.import_module(info.name)
        except ImportError:  # parts of the library exist on other systems only
            continue
        for name, function in _functions(module):
            doc = inspect.getdoc(function) or ""
            if len(doc) < 25 or doc in seen:
                continue
            try:
                signature = str(inspect.signature(function))
            except (TypeError, ValueError):  # some built-in functions tell no signature
                continue
            seen.add(doc)
            short = doc if len(doc) <= limit else doc.split("\n\n")[0][:limit]
            if len(signature) <= 90 and " at 0x" not in signature:  # an address changes every run
                first = " ".join(doc.split("\n\n")[0].split())
                yield name, _stub(name, signature.replace("self, ", ""), short), first


def _list_task(rng: random.Random) -> tuple[str, str, str, Callable[[list[int]], Any]]:
    k = rng.randint(2, 9)
    keeps: list[tuple[str, str, Callable[[int], bool]]] = [
        ("even", "even numbers", lambda v: v % 2 == 0),
        ("odd", "odd numbers", lambda v: v % 2 == 1),
        ("positive", "positive numbers", lambda v: v > 0),
        ("negative", "negative numbers", lambda v: v < 0),
        ("large", f"numbers greater than {k}", lambda v: v > k),
        ("multiple", f"numbers that are divisible by {k}", lambda v: v % k == 0),
        ("square", "squares of the numbers", lambda v: True),
        ("small", f"numbers whose absolute value is below {k}", lambda v: abs(v) < k),
    ]
    ends: list[tuple[str, str, str, Callable[[list[int]], Any]]] = [
        ("sum", "the sum of all", "int", sum),
        ("count", "how many there are of the", "int", len),
        ("max", "the largest of the", "int", lambda v: max(v, default=None)),
        ("min", "the smallest of the", "int", lambda v: min(v, default=None)),
        ("sorted", "a sorted list of the", "List[int]", sorted),
        ("unique", "a list without duplicates of the", "List[int]", lambda v: sorted(set(v))),
        ("reversed", "in reverse order the", "List[int]", lambda v: v[::-1]),
        ("mean", "the average of the", "float", lambda v: sum(v) / len(v) if v else 0.0),
        ("running", "the running totals of the", "List[int]",
         lambda v: [sum(v[: i + 1]) for i in range(len(v))]),
    ]  # fmt: skip
    what, noun, keep = rng.choice(keeps)
    end, lead, returns, function = rng.choice(ends)

    def run(values: list[int]) -> Any:
        mapped = [v * v for v in values] if what == "square" else values
        return function([v for v in mapped if keep(v)])

    return f"{end}_{what}_{rng.choice(_LISTS)}", f"{lead} {noun}", returns, run


def _text_task(rng: random.Random) -> tuple[str, str, str, Callable[[str], Any]]:
    k, letter = rng.randint(2, 6), rng.choice("aeiost")
    tasks: list[tuple[str, str, str, Callable[[str], Any]]] = [
        ("count_vowels", "the number of vowels", "int", lambda s: sum(c in "aeiou" for c in s)),
        ("remove_letter", f"a copy without the letter {letter!r}", "str",
         lambda s: s.replace(letter, "")),
        ("long_words", f"the words with more than {k} letters", "List[str]",
         lambda s: [w for w in s.split() if len(w) > k]),
        ("reverse_words", "the words in reverse order", "str", lambda s: " ".join(s.split()[::-1])),
        ("capitalize_all", "a copy where every word starts with a capital letter", "str",
         str.title),
        ("letter_counts", "a dictionary of how often each letter occurs", "Dict[str, int]",
         lambda s: {c: s.count(c) for c in sorted(set(s)) if c.isalpha()}),
        ("longest_word", "the longest word", "str", lambda s: max(s.split(), key=len)),
        ("is_mirror", "True if it reads the same backwards", "bool", lambda s: s == s[::-1]),
        ("every_nth", f"every {k}th character", "str", lambda s: s[::k]),
        ("word_lengths", "the length of each word", "List[int]",
         lambda s: [len(w) for w in s.split()]),
    ]  # fmt: skip
    return rng.choice(tasks)


def composed_task(rng: random.Random) -> tuple[str, str, str]:
    """One small task as (name, stub with computed examples, description)."""
    if rng.random() < 0.6:
        name, what, returns, run = _list_task(rng)
        argument, kind = rng.choice(_LISTS), "List[int]"
        inputs: list[Any] = [
            [rng.randint(-9, 20) for _ in range(rng.randint(3, 7))] for _ in range(2)
        ]
        source = "in the list"
    else:
        name, what, returns, run = _text_task(rng)
        argument, kind = rng.choice(_TEXTS), "str"
        inputs = [" ".join(rng.sample(_WORDS, rng.randint(2, 4))) for _ in range(2)]
        source = "of the given string"
    doc = rng.choice(("Return {} {}.", "Given an input, return {} {}.", "Find {} {}."))
    doc = doc.format(what, source)
    shown = rng.choice((">>> {}({!r})\n{!r}", "{}({!r}) == {!r}", "{}({!r}) ➞ {!r}", ""))
    examples = "\n".join(shown.format(name, value, run(value)) for value in inputs if shown)
    lead = "For example:\n" if shown and not shown.startswith(">>>") else ""
    full = f"{doc}\n{lead}{examples}" if examples else doc
    typed = rng.random() < 0.5
    signature = f"({argument}: {kind}) -> {returns}" if typed else f"({argument})"
    stub = _stub(name, signature, full, rng.choice(('"""', '"""', "'''")))
    if typed and "List" in signature + returns:
        stub = f"from typing import List\n\n\n{stub}"
    return name, stub, doc


def code_prompts(count: int, seed: int = 0) -> list[str]:
    """User messages: about three in five from the library, the others composed."""
    rng = random.Random(seed)
    library = list(library_tasks())
    rng.shuffle(library)
    prompts = []
    for index in range(count):
        from_library = index % 5 < 3 and index // 5 * 3 + index % 5 < len(library)
        task = library[index // 5 * 3 + index % 5] if from_library else composed_task(rng)
        name, stub, doc = task
        prompts.append(rng.choice(_WORDINGS).format(stub=stub, name=name, doc=doc))
    return prompts
