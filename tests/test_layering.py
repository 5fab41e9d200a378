"""The import table of docs/architecture.md, held for every import, deferred ones included."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "runtime" / "lorastack"
MAX_LINES = 400

LEAVES = {
    "codes",
    "config",
    "errors",
    "folders",
    "request",
    "layout",
    "modelfiles",
    "printable",
    "tensorheader",
}
# Which packages a package imports, beside itself and the leaves: no more and no fewer.
ALLOWED: dict[str, set[str]] = {
    "cli": {"service", "startup", "client", "gateway", "adapters", "text", "train"},
    "client": {"v1"},
    "gateway": {"client"},
    "service": {"startup", "gateway", "engine", "adapters", "sandbox", "text", "v1"},
    "sandbox": {"text"},
    "startup": {"engine", "model", "adapters", "kernels", "speculation", "text"},
    "engine": {"model", "adapters", "lora", "kernels", "speculation", "sampling", "text"},
    "model": {"lora", "kernels", "speculation"},
    "speculation": {"kernels"},
    "lora": {"kernels"},
    "train": {"startup", "engine", "adapters", "model", "kernels", "speculation", "client"},
    "adapters": set(),
    "sampling": {"kernels"},
    "text": set(),
    "kernels": set(),
    "v1": set(),
    "__init__": set(),
    "__main__": {"cli"},
    **{leaf: set() for leaf in LEAVES},
}
# The rooms of a package, likewise.
ROOMS: dict[str, set[str]] = {
    "adapters.sources": {"adapters.store"},
    "adapters.memory": {"adapters.store", "adapters.formats"},
    "adapters.store": {"adapters.formats"},
    "adapters.formats": set(),
    "service.adapters": {"service.calls", "service.edge"},
    "service.calls": {"service.edge", "service.watch"},
    "service.edge": set(),
    "service.watch": set(),
}
# What a top-level package of ours must not import from outside.
FORBIDDEN_FOREIGN: dict[str, set[str]] = {
    "layout": {"torch"},
    "request": {"torch"},
    "engine": {"asyncio", "grpc", "google"},
    "client": {"torch", "transformers"},
}
PURE = (
    "speculation/accept.py",
    "speculation/budget.py",
    "speculation/calibration.py",
    "speculation/candidates.py",
    "speculation/cost.py",
    "speculation/tree.py",
    "speculation/lookup.py",
    "engine/pages.py",
    "engine/scheduler.py",
)


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "v1")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    """`lorastack.engine.pages` -> `engine`; the package's own top is `__init__`."""
    return [*module.split("."), "__init__"][1]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import statement anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            yield node.lineno, node.module
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def our_modules() -> set[str]:
    return {module_name(path) for path in PACKAGE.rglob("*.py")}


def module_graph() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports (deferred ones too)."""
    modules = our_modules()
    return {
        module_name(path): {name for _, name in imports(path) if name in modules}
        - {module_name(path)}
        for path in sources()
    }


def strongly_connected(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that reach each other (more than one module each)."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for name in graph.get(todo.pop(), set()):
                if name not in seen:
                    seen.add(name)
                    todo.append(name)
        return seen

    reached = {name: reach(name) for name in graph}
    groups = {frozenset(b for b in reached[a] if a in reached.get(b, ())) for a in graph}
    return [set(group) for group in groups if len(group) > 1]


def test_every_package_is_in_the_table() -> None:
    assert {package_of(module) for module in our_modules()} <= set(ALLOWED)


def imported_packages() -> dict[str, set[str]]:
    """Package -> packages of ours that its modules import, itself left out."""
    imported: dict[str, set[str]] = {package: set() for package in ALLOWED}
    for module, names in module_graph().items():
        package = package_of(module)
        imported[package] |= {package_of(name) for name in names} - {package}
    return imported


def imported_rooms() -> dict[str, set[str]]:
    """Room -> other rooms of its package that its modules import."""
    imported: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module, names in module_graph().items():
        room = room_of(module)
        if room in ROOMS:
            package = room.split(".")[0]
            others = {room_of(name) for name in names if package_of(name) == package}
            imported[room] |= others - {room, package}
    return imported


def room_of(module: str) -> str:
    """`lorastack.adapters.store.blobs` -> `adapters.store`; of a package's own top, the package."""
    return ".".join(module.split(".")[1:3])


def test_imports_are_those_of_the_table() -> None:
    without_leaves = {
        package: names - LEAVES - {"__init__"} for package, names in imported_packages().items()
    }
    assert without_leaves == ALLOWED


def test_rooms_import_those_of_their_table() -> None:
    assert imported_rooms() == ROOMS
    assert {room.rsplit(".", 1)[0] for room in ROOMS} == {"adapters", "service"}
    folders = {
        f"{path.parent.name}.{path.name}"
        for name in ("adapters", "service")
        for path in (PACKAGE / name).iterdir()
        if (path / "__init__.py").exists()
    }
    assert folders == set(ROOMS)


def test_leaves_import_leaves_alone() -> None:
    imported = imported_packages()
    assert {leaf: imported[leaf] - LEAVES for leaf in LEAVES} == {leaf: set() for leaf in LEAVES}


def test_the_page_shows_the_same_table() -> None:
    shown = {package: names for package, names in block_tables() if package in ALLOWED}
    hidden = {"v1", "__init__", "__main__", *LEAVES}
    assert shown == {package: names for package, names in ALLOWED.items() if package not in hidden}
    rooms = {room: names for room, names in block_tables() if room in ROOMS}
    assert rooms == ROOMS


def block_tables() -> Iterator[tuple[str, set[str]]]:
    """Every row `a`, `b` | c d | under "Who may import whom", a package at a time."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.split("## Who may import whom")[1].split("\n## ")[0]
    for line in section.splitlines():
        if line.startswith("| `"):
            packages, names = line.strip("| ").split(" | ")
            for package in packages.replace("`", "").split(", "):
                yield package, set(names.split()) - {"nothing"}


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_foreign_imports(path: Path) -> None:
    package = package_of(module_name(path))
    for line, name in imports(path):
        top = name.split(".")[0]
        forbidden = FORBIDDEN_FOREIGN.get(package, set())
        assert top not in forbidden, f"{path}:{line}: {package} may not import {name}"


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_know_no_tensors(name: str) -> None:
    path = PACKAGE / name
    if not path.exists():
        pytest.fail(f"{name} is gone: take it out of PURE")
    assert not {imported.split(".")[0] for _, imported in imports(path)} & {"torch", "numpy"}


def test_no_import_cycles() -> None:
    assert strongly_connected(module_graph()) == []


def test_cycles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert strongly_connected(graph) == [{"a", "b", "c"}]


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_only_convert_knows_protobuf_and_our_types() -> None:
    """Protobuf stops at the service's own files; convert alone makes calls of it, and replies."""
    both = [
        module_name(path)
        for path in sources()
        if package_of(module_name(path)) == "service"
        and {name for _, name in imports(path) if name.startswith("lorastack.v1")}
        and {name for _, name in imports(path) if name.startswith("lorastack.request")}
    ]
    assert both in ([], ["lorastack.service.calls.convert"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "import lorastack.client"],
        ["-m", "lorastack.cli.main", "--help"],
        ["-m", "lorastack.cli.main", "serve", "--help"],
        ["-m", "lorastack", "generate", "--help"],
        ["-m", "lorastack", "train", "heads", "--help"],
        ["-m", "lorastack.cli.main", "adapters", "list", "--server", "127.0.0.1:1"],
        ["-m", "lorastack.cli.main", "generate", "hello", "--server", "127.0.0.1:1"],
        ["-m", "lorastack.cli.main", "bench", "--server", "127.0.0.1:1"],
    ],
    ids=lambda arguments: " ".join(arguments[1:]),
)
def test_client_commands_import_no_torch(arguments: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    loaded = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert any(name.startswith("lorastack.c") for name in loaded), result.stderr[-2000:]
    assert "Traceback" not in result.stderr, result.stderr[-2000:]
    assert not {name for name in loaded if name.split(".")[0] in {"torch", "transformers"}}
