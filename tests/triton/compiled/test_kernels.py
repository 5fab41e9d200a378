"""Every kernel as each architecture gets it: `tests.helpers.kernel_cases` has the table."""

from __future__ import annotations

import pytest
from triton import JITFunction

from tests.helpers.compiled import ARCHITECTURES, MAX_SHARED
from tests.helpers.kernel_cases import CASES, Products
from tests.helpers.launches import KERNELS


def test_no_kernel_is_missing() -> None:
    """A kernel is a compiled function that no other one calls."""
    found = [each for module in KERNELS for each in vars(module).values()]
    functions = [each.fn for each in found if isinstance(each, JITFunction)]
    called = {name for each in functions for name in each.__code__.co_names}
    kernels = {each.__name__ for each in functions} - called
    assert kernels == {case.kernel.fn.__name__ for case in CASES.values()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", CASES)
def test_kernels(name: str, architecture: int) -> None:
    case = CASES[name]
    found = case.compiled(architecture)
    assert found.spills == 0 or case.local
    assert found.registers <= case.registers
    assert found.shared <= (case.shared or MAX_SHARED[architecture])
    single, grouped = found.instructions["HMMA"], found.instructions["HGMMA"]
    if case.products is Products.NONE:
        assert single + grouped == 0
    elif case.products is Products.GROUP and architecture == 90:
        assert grouped > 0
    else:
        assert single + grouped > 0
    assert found.wide_loads > 0 or not case.wide
    if case.ahead:
        fetched = found.instructions["LDGSTS"]
        assert fetched > 0
        assert found.wide_loads >= fetched or case.narrow
