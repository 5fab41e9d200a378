"""The command as a process: exit codes, one line, quiet ends."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lorastack import __main__ as script
from tests.service.fakes import RunningServer

COMMAND = (sys.executable, "-m", "lorastack")
SECONDS = 100  # a process starts slowly on a busy machine; this only bounds a hang


def run(*arguments: str | bytes, stdin: bytes = b"", code: int, **environment: str) -> list[str]:
    """Runs the command, which must end with `code`; the lines of its stderr."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        timeout=SECONDS,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == code, done.stderr
    return done.stderr.decode().splitlines()


def test_wrong_use_is_one_line(fake: RunningServer) -> None:
    at = ("--server", fake.address)
    for arguments, words in (
        (("generate", b"caf\xe9", *at), r"\udce9"),
        (("generate", "hi", "--seed", str(1 << 64), *at), "--seed"),
        (("generate", "hi", "--server", ""), "HOST:PORT"),
    ):
        (line,) = run(*arguments, code=2)
        assert line.startswith("lorastack: ")
        assert words in line
    (line,) = run("generate", "-", *at, stdin=b"caf\xe9", code=2)
    assert "stdin" in line and "UTF-8" in line


def test_nobody_there_is_one_line_with_the_address() -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        (line,) = run("generate", "hi", "--server", address, code=1)
    assert address in line


def test_a_taken_port_is_told_before_anything_loads(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        store, model = tmp_path / "store", tmp_path / "no-model"
        options = ("--port", port, "--store", str(store), "--model", str(model))
        (line,) = run("serve", *options, code=1)
    assert f"127.0.0.1:{port}" in line and "--port" in line
    assert not store.exists()


def test_an_error_that_nobody_foresaw_is_one_line(tmp_path: Path) -> None:
    program = (
        "import sys; from lorastack.cli import main as m; "
        "m.commands = lambda: lambda **_: 1 / 0; sys.argv = ['lorastack']; m.main()"
    )
    for environment, num_lines in (({}, 1), ({"LORASTACK_TRACEBACK": "1"}, 2)):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            env={**os.environ, **environment},
        )
        assert done.returncode == 1
        assert "ZeroDivisionError" in done.stderr
        assert (len(done.stderr.splitlines()) == 1) is (num_lines == 1)


def test_a_closed_pipe_is_quiet(fake: RunningServer) -> None:
    fake.engine.hold(1)
    with started("generate", "hello", "--max-new-tokens", "0", "--server", fake.address) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(3) == b"<s>"
        process.stdout.close()
        fake.engine.go_on()
        assert process.stderr.read() == b""
        assert process.wait(SECONDS) == 1


@pytest.mark.parametrize(
    "command", [("generate", "hello"), ("bench", "--concurrency", "2")], ids=str
)
def test_ctrl_c_ends_without_a_word(fake: RunningServer, command: tuple[str, ...]) -> None:
    fake.engine.hold(1)
    with started(*command, "--server", fake.address) as process:
        with fake.engine.changed:
            assert fake.engine.changed.wait_for(lambda: fake.engine.submitted, SECONDS)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (130, b"")


def test_ctrl_c_while_grpc_begins_a_call_is_quiet(fake: RunningServer) -> None:
    """Without the thread that ends calls, closing the channel never returns."""
    program = (
        "import grpc._channel as gc\n"
        "def interrupted(state): raise KeyboardInterrupt\n"
        "assert gc._run_channel_spin_thread\n"
        "gc._run_channel_spin_thread = interrupted\n"
        "from lorastack.__main__ import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "generate", "hello", "--server", fake.address],
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, b"")


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that Ctrl-C reaches, even where the tests run in the background and ignore it.

    It sees to that itself: `preexec_fn` forks this process, in which gRPC's threads run, and now
    and then the child aborts before it is the command.
    """
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from lorastack.__main__ import main; main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # one that hangs fails its own test only


def test_a_terminal_gets_no_control_characters(fake: RunningServer) -> None:
    """The engine echoes the prompt, whose escape would clear the screen; a pipe gets it as is."""
    arguments = ["generate", "a\x1b[2Jb\n\tc", "--max-new-tokens", "12", "--server", fake.address]
    piped = subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=SECONDS, check=True)
    assert b"a\x1b[2Jb\n\tc" in piped.stdout
    ours, theirs = pty.openpty()
    subprocess.run([*COMMAND, *arguments], stdout=theirs, stderr=subprocess.DEVNULL, check=True)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert b"\x1b" not in shown
    assert rb"a\x1b[2Jb" in shown
    assert b"\r\n" in shown and b"c" in shown


@pytest.mark.parametrize("words", [("lorastack",), ("lorastack.cli.main",)], ids=str)
def test_both_modules_are_the_command(words: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *words, "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("lorastack ")


def test_ctrl_c_while_the_command_is_imported_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "lorastack.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "lorastack.cli.main", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 130
