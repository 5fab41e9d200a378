"""What the package imports is what pyproject.toml asks for: nothing comes by luck."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import packages_distributions

from tests.test_layering import ROOT, imports, sources

# Names by which packages that share a namespace are imported.
SHARED = {"google.protobuf": "protobuf", "google.rpc": "googleapis-common-protos"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def distributions(module: str) -> set[str]:
    for prefix, name in SHARED.items():
        if module.startswith(prefix):
            return {name}
    top = module.split(".")[0]
    return {normal(name) for name in packages_distributions().get(top, [top])}


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted_somewhere = project["dependencies"] + extras["cuda"] + extras["train"]
    declared = {normal(re.split(r"[<>=!~\[; ]", wanted)[0]) for wanted in wanted_somewhere}
    modules = {module for path in sources() for _, module in imports(path)}
    foreign = {
        module
        for module in modules
        if module.split(".")[0] not in (*sys.stdlib_module_names, "lorastack", "__future__")
        and module != "google"
    }
    missing = {module for module in foreign if not distributions(module) & declared}
    assert not missing
    assert len(foreign) > 10


def test_triton_is_the_one_that_torch_for_cuda_asks_for() -> None:
    """With another one nothing can be installed where there is a GPU. A torch for CPUs asks for
    none: whoever changes either reads what the metadata of the CUDA wheel says."""
    pins = dict(re.findall(r"^(torch|triton)==(.+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert pins == {"torch": "2.13.0", "triton": "3.7.1"}
