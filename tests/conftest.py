"""Fixtures that several packages share: tiny model folders, the real model."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections import Counter
from pathlib import Path

import hypothesis
import pytest

from lorastack.kernels.native import build, library
from lorastack.layout import ModelShapes
from tests.helpers import emulated

MAX_WORKERS = 8  # processes of up to 2 GiB each

# How long an example takes says more about the machine's load than about the code.
hypothesis.settings.register_profile("lorastack", deadline=None)
hypothesis.settings.register_profile("emulated", deadline=None, max_examples=8)
hypothesis.settings.load_profile("lorastack")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--native-library", metavar="FILE", help="test this build of the kernels")
    parser.addoption("--emulated", metavar="COMMAND", help="test kernels of this process too")
    parser.addoption("--fuzz-cases", type=int, default=500, help="of tests/system/test_speculation")
    parser.addoption("--fuzz-seed", type=int, default=0, help="of the first batch of these cases")
    parser.addoption("--full-size", action="store_true", help="tests/integration/mistral_7b at 7B")


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module asks what the library supports."""
    if other := config.getoption("--native-library"):
        build.LIBRARY = Path(other).resolve()
        if library.library() is None:
            raise pytest.UsageError(f"{other}: {library.problem()}")
    if command := config.getoption("--emulated"):
        emulated.install(command)
        hypothesis.settings.load_profile("emulated")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Workers of `-n auto`: a core each, but no more than memory and gain allow."""
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which native kernels were tested, and what was skipped, each reason once."""
    # Deferred: it asks what the library supports, and --native-library may name another one.
    from tests.helpers.isas import count_tested, summary

    stats = terminalreporter.stats
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in stats.get("skipped", [])
    )
    ran = [report.nodeid for kind in ("passed", "failed") for report in stats.get(kind, [])]
    for line in summary(count_tested(ran), reasons):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LlamaForCausalLM folder: 2 layers, hidden 64, tied embeddings."""
    from tests.helpers.tiny import build_llama

    return build_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MistralForCausalLM folder: 3 layers, untied head, sliding window of 24."""
    from tests.helpers.tiny import build_mistral

    return build_mistral(tmp_path_factory.mktemp("models") / "tiny-mistral")


@pytest.fixture(scope="session")
def tiny_llama_shapes(tiny_llama: Path) -> ModelShapes:
    from tests.helpers.tiny import shapes_of

    return shapes_of(tiny_llama)


@pytest.fixture(scope="session")
def tiny_mistral_shapes(tiny_mistral: Path) -> ModelShapes:
    from tests.helpers.tiny import shapes_of

    return shapes_of(tiny_mistral)


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The default model's folder (for tests marked `real`); made once a machine."""
    from lorastack.model.fetch.default import default_model

    return default_model()


@pytest.fixture(scope="session")
def example_adapters() -> Path:
    """The folder of trained adapters (for tests marked `real`)."""
    return Path(__file__).parents[1] / "examples" / "adapters"
