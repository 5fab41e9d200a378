"""`lorastack gateway` as a process, and `serve --http-port`."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.service.fakes import RunningServer

COMMAND = (sys.executable, "-m", "lorastack")
SECONDS = 200  # a process starts slowly on a busy machine; this only bounds a hang
URL = re.compile(r"http://\S+:\d+")


@contextmanager
def started(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and the first line that it prints; killed if the block leaves it running."""
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.communicate()


def url(line: str) -> str:
    found = URL.search(line)
    assert found is not None, line
    return found.group()


def stop(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(SECONDS)


def test_it_serves_until_it_is_told_to_stop(fake: RunningServer) -> None:
    with started("gateway", "--target", fake.address, "--port", "0") as (process, line):
        assert fake.address in line
        assert httpx.get(f"{url(line)}/health", timeout=SECONDS).status_code == 200
        assert httpx.post(f"{url(line)}/v1/load_lora_adapter", json={}).status_code == 404
        assert stop(process) == 0


def test_it_starts_before_its_server(fake: RunningServer) -> None:
    with socket.socket() as nobody:  # bound, and nobody listens
        nobody.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{nobody.getsockname()[1]}"
        options = ("--target", target, "--port", "0", "--adapter-management")
        with started("gateway", *options) as (process, line):
            reply = httpx.get(f"{url(line)}/health", timeout=SECONDS)
            assert reply.status_code == 503
            assert "lorastack serve" in reply.json()["error"]
            body = {"lora_name": "a", "lora_path": "a"}
            reply = httpx.post(f"{url(line)}/v1/load_lora_adapter", json=body, timeout=SECONDS)
            assert reply.status_code == 503
            assert stop(process) == 0


def test_a_taken_port_is_one_line(fake: RunningServer) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*COMMAND, "gateway", "--target", fake.address, "--port", port],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert port in line and "another port" in line


def test_serve_prints_both_addresses(tiny_llama: Path, tmp_path: Path) -> None:
    options = ("--model", str(tiny_llama), "--store", str(tmp_path / "store"), "--port", "0")
    options += ("--http-port", "0", "--kv-memory", "64MiB", "--dtype", "float32")
    with started("serve", *options) as (process, line):
        assert re.search(r" on 127\.0\.0\.1:\d+ and http://127\.0\.0\.1:\d+ ", line), line
        assert httpx.get(f"{url(line)}/health", timeout=SECONDS).status_code == 200
        assert stop(process) == 0
