"""Pages never leak or alias, and equal hashes mean equal prefixes."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lorastack.engine.pages import Pages, chain_hash, root_hash
from lorastack.request import LoraUse

PAGE_SIZE = 4
ROOTS = [root_hash(()), root_hash([LoraUse(lora_id="a", digest="sha256:a")])]


class PagesMachine(RuleBasedStateMachine):
    """Rows come, share prefixes, publish full pages and go; a model of each page's text watches."""

    @initialize(num_pages=st.integers(1, 12))
    def setup(self, num_pages: int) -> None:
        self.pages = Pages(num_pages, PAGE_SIZE)
        self.rows: list[tuple[list[int], set[int]]] = []  # pages, those published or matched
        self.text: dict[int, tuple[bytes, tuple[int, ...]]] = {}  # page -> root, prefix

    @rule(root=st.sampled_from(ROOTS), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=30))
    def admit(self, root: bytes, tokens: list[int]) -> None:
        cached, hashes = self.pages.match(root, tokens)
        assert len(cached) == len(hashes) <= (len(tokens) - 1) // PAGE_SIZE
        for index, page in enumerate(cached):
            assert self.text[page] == (root, tuple(tokens[: (index + 1) * PAGE_SIZE]))
        before = self.pages.num_available
        fresh = self.pages.allocate(self.pages.pages_for(len(tokens)) - len(cached))
        if fresh is None:
            assert self.pages.num_available == before
            self.pages.free(cached)
            return
        assert not set(fresh) & {page for pages, _ in self.rows for page in pages}
        for page in fresh:
            self.text.pop(page, None)
        table = cached + fresh
        shared = set(cached)
        parent = hashes[-1] if hashes else root
        for index in range(len(cached), len(tokens) // PAGE_SIZE):
            parent = chain_hash(parent, tokens[index * PAGE_SIZE : (index + 1) * PAGE_SIZE])
            self.pages.publish(table[index], parent)
            self.text[table[index]] = (root, tuple(tokens[: (index + 1) * PAGE_SIZE]))
            shared.add(table[index])
        self.rows.append((table, shared))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        table, _ = self.rows.pop(data.draw(st.integers(0, len(self.rows) - 1)))
        self.pages.free(table)

    @invariant()
    def private_pages_have_one_owner(self) -> None:
        private = [page for table, shared in self.rows for page in table if page not in shared]
        assert len(private) == len(set(private))

    @invariant()
    def nothing_leaks(self) -> None:
        held = {page for table, _ in self.rows for page in table}
        assert self.pages.num_held == len(held)


TestPages = PagesMachine.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_last_token_is_never_taken_from_the_cache() -> None:
    pages = Pages(4, PAGE_SIZE)
    table = pages.allocate(2)
    assert table is not None
    pages.publish(table[0], chain_hash(ROOTS[0], [1, 2, 3, 4]))
    assert pages.match(ROOTS[0], [1, 2, 3, 4])[0] == []
    assert pages.match(ROOTS[0], [1, 2, 3, 4, 5])[0] == [table[0]]


def test_other_adapters_other_scale_other_hash() -> None:
    def use(digest: str, scale: float = 1.0) -> LoraUse:
        return LoraUse(lora_id="x", digest=digest, scale=scale)

    stacks = [(), (use("a"),), (use("b"),), (use("a", 0.5),), (use("a"), use("b"))]
    assert len({root_hash(stack) for stack in stacks}) == len(stacks)
    assert len({root_hash(stack, length) for stack in stacks for length in (0, 40, 41)}) == 3 * len(
        stacks
    )


def test_cached_pages_go_least_recently_used_first() -> None:
    pages = Pages(2, PAGE_SIZE)
    first, second = pages.allocate(1), pages.allocate(1)
    assert first is not None and second is not None
    for table, tokens in ((first, [1] * 4), (second, [2] * 4)):
        pages.publish(table[0], chain_hash(ROOTS[0], tokens))
        pages.free(table)
    assert pages.num_held == 0
    hit, _ = pages.match(ROOTS[0], [1] * 5)
    pages.free(hit)
    assert pages.allocate(1) == second
    assert pages.match(ROOTS[0], [1] * 5)[0] == first


def test_pages_of_a_forgotten_lora_are_never_found_again() -> None:
    pages = Pages(4, 4)
    held, cached, other = pages.allocate(3) or []
    root = root_hash(())
    first = chain_hash(root, [1] * 4)
    second = chain_hash(first, [1] * 4)
    pages.publish(held, first, ("a",))
    pages.publish(cached, second, ("a", "b"))
    pages.publish(other, b"other", ("b",))
    pages.free([cached, other])
    pages.forget("a")
    assert pages.num_cached == 1
    assert pages.match(root, [1] * 9) == ([], [])
    pages.free([held])
    assert pages.num_cached == 1
    assert pages.num_available == 4
