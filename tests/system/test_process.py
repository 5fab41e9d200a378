"""The server as a process: ready line, drain on SIGTERM, kill -9 and restart, a dead engine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorastack.client import Client
from lorastack.engine.loop import MAX_FAULTS
from lorastack.errors import InternalError, UnavailableError
from lorastack.kernels.native import build
from tests.helpers.isas import needs_native
from tests.helpers.live import ask

ADDRESS = re.compile(r"127\.0\.0\.1:\d+")
Serve = Callable[..., "Process"]


class Process:
    """`lorastack serve` on the tiny model, any free port."""

    def __init__(self, model: Path, store: Path, *options: str, code: str = "") -> None:
        run = ["-c", code] if code else ["-m", "lorastack.cli.main"]
        command = [*run, "serve", "--model", str(model)]
        self._process = subprocess.Popen(
            [
                *(sys.executable, *command, "--store", str(store), "--port", "0"),
                *("--kv-memory", "8MiB", "--device", "cpu", *options),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        match = ADDRESS.search(line)
        assert match is not None, (line, self._process.communicate()[1])
        self.address = match.group()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def files(self) -> set[Path]:
        """The files mapped into its memory, code included."""
        lines = Path(f"/proc/{self._process.pid}/maps").read_text().splitlines()
        return {Path(line.split(maxsplit=5)[5]) for line in lines if "/" in line}

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> tuple[int, str]:
        """Exit code and stderr."""
        _, errors = self._process.communicate(timeout=240)
        return self._process.returncode, errors

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    def health(self) -> int:
        with grpc.insecure_channel(self.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            return int(stub.Check(health_pb2.HealthCheckRequest(), timeout=120).status)


@pytest.fixture
def serve(tmp_path: Path, tiny_llama: Path) -> Iterator[Serve]:
    processes: list[Process] = []

    def build(*options: str, code: str = "") -> Process:
        processes.append(Process(tiny_llama, tmp_path / "store", *options, code=code))
        return processes[-1]

    yield build
    for process in processes:
        process.end()


def test_sigterm_drains(serve: Serve) -> None:
    process = serve("--drain-timeout", "240")
    with Client(process.address) as client:
        assert process.health() == health_pb2.HealthCheckResponse.SERVING
        request = ask("hello", ignore_eos=True, max_new_tokens=900)
        running = client.stream(request)
        tokens = list(next(running).token_ids)
        process.signal(signal.SIGTERM)
        refused = False
        for part in running:
            tokens += part.token_ids
            if not refused:
                try:
                    client.generate(ask("too late", max_new_tokens=1))
                except UnavailableError:
                    refused = True
        assert refused
        assert len(tokens) == 900
    code, errors = process.wait()
    assert code == 0, errors
    assert "Traceback" not in errors


def test_a_second_signal_ends_at_once(serve: Serve) -> None:
    process = serve("--drain-timeout", "240")
    with Client(process.address) as client:
        running = client.stream(ask("hello", ignore_eos=True, max_new_tokens=8000))
        next(running)
        process.signal(signal.SIGTERM)
        while process.health() == health_pb2.HealthCheckResponse.SERVING:
            pass
        process.signal(signal.SIGINT)
        with pytest.raises(UnavailableError):
            list(running)
    assert process.wait()[0] == -signal.SIGINT


def test_sigterm_ends_what_outlives_the_drain(serve: Serve) -> None:
    process = serve("--drain-timeout", "0")
    with Client(process.address) as client:
        running = client.stream(ask("hello", ignore_eos=True, max_new_tokens=900))
        next(running)
        process.signal(signal.SIGTERM)
        with pytest.raises(UnavailableError):
            list(running)
    code, errors = process.wait()
    assert code == 0, errors


def test_the_store_survives_kill_9(serve: Serve, zoo: dict[str, Path]) -> None:
    """Adapters acknowledged before the kill serve the same bytes afterwards."""
    first = serve()
    with Client(first.address) as client:
        digests = {
            name: client.upload(zoo[name], name).digest
            for name in ("say-owl", "heads-owl", "random-a")
        }
        with ThreadPoolExecutor(1) as pool:
            request = ask("hello", ignore_eos=True, max_new_tokens=900)
            pool.submit(lambda: list(client.stream(request)))
            before = client.generate(ask(stack=[("say-owl", 1.0)], heads="heads-owl"))
            first.signal(signal.SIGKILL)
    first.wait()
    second = serve()
    with Client(second.address) as client:
        assert {adapter.id: adapter.digest for adapter in client.list_adapters()} == digests
        after = client.generate(ask(stack=[("say-owl", 1.0)], heads="heads-owl"))
    assert after.text == before.text == "owl" * 8
    assert after.adapters == before.adapters


BROKEN_LOOP = """
from lorastack.cli.main import main
from lorastack.engine.scheduler import Scheduler

update = Scheduler.update
crashed = []

def fail(self, results):
    if crashed or self.rows.find("crash") is not None:
        crashed.append(True)
        raise RuntimeError("boom")
    update(self, results)

Scheduler.update = fail
main()
"""


def test_a_dead_engine_ends_every_request_and_the_process(serve: Serve) -> None:
    process = serve(code=BROKEN_LOOP)
    with Client(process.address) as client:
        running = client.stream(ask("hello", ignore_eos=True, max_new_tokens=900))
        next(running)
        with pytest.raises(InternalError):
            client.generate(ask(request_id="crash"))
        with pytest.raises(InternalError) as failure:
            list(running)
        assert "boom" not in failure.value.message
        for _ in range(MAX_FAULTS):  # all rows end, and it tries again, so many times
            with pytest.raises(InternalError):
                client.generate(ask())
    code, errors = process.wait()
    assert code == 1
    assert "RuntimeError: boom" in errors


WITHOUT_LIBRARY = """
from pathlib import Path

from lorastack.cli.main import main
from lorastack.startup import engine as startup_engine
from lorastack.kernels.native import build
from tests.helpers.costs import CheapHeads

build.LIBRARY = Path("/nowhere.so")
startup_engine.measure = lambda *_: CheapHeads()
main()
"""


def test_without_the_native_library_everything_runs_and_says_so(
    serve: Serve, zoo: dict[str, Path]
) -> None:
    process = serve(code=WITHOUT_LIBRARY)
    with Client(process.address) as client:
        info = client.model_info()
        assert (info.backend, info.dtype) == ("torch", "float32")
        for name in ("say-owl", "heads-owl"):
            client.upload(zoo[name], name)
        client.load("heads-owl")
        reply = client.generate(ask(stack=[("say-owl", 1.0)], heads="heads-owl"))
    assert reply.text == "owl" * 8
    assert reply.speculation.accepted_tokens
    process.signal(signal.SIGTERM)
    _, errors = process.wait()
    assert "WARNING lorastack.kernels.native.library: no native kernels" in errors
    assert "python -m lorastack.kernels.native.build" in errors


@needs_native
def test_torch_and_the_native_library_share_one_openmp(serve: Serve) -> None:
    process = serve()
    with Client(process.address) as client:
        assert client.model_info().backend.startswith("native")
        client.generate(ask())
    names = {path.name for path in process.files}
    assert build.LIBRARY.name in names
    assert len({path for path in process.files if "omp" in path.name and ".so" in path.name}) == 1


@needs_native
def test_lower_instructions_may_be_asked_for(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASTACK_ISA", "plain")
    with Client(serve().address) as client:
        info = client.model_info()
        assert (info.backend, info.dtype) == ("native plain", "bfloat16")
        assert client.generate(ask(max_new_tokens=4, ignore_eos=True)).token_ids


def test_an_unknown_model_is_one_line_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    result = subprocess.run(
        [
            *(sys.executable, "-m", "lorastack.cli.main", "serve", "--model", str(tmp_path)),
            *("--port", "0", "--store", str(tmp_path / "store")),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 1
    assert "BertModel" in result.stderr
    assert "Traceback" not in result.stderr


TALKATIVE = """
from lorastack.cli import output
from lorastack.cli.main import main

output.NEWS_SECONDS = 0
main()
"""


def test_a_start_says_in_the_log_how_far_it_is(serve: Serve) -> None:
    """Every line of a JSON log stays JSON."""
    process = serve("--log-format", "json", code=TALKATIVE)
    process.signal(signal.SIGTERM)
    _, errors = process.wait()
    messages = [json.loads(line)["message"] for line in errors.splitlines()]
    news = [message for message in messages if message.startswith("loading the weights: ")]
    assert len(news) > 10
    done, total = news[-1].removeprefix("loading the weights: ").split(" of ")
    assert done == total
