"""Every option and argument of every command with values that nobody should write.

The command tree is walked, so a new option is tried without being named here.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorastack.cli.main import commands as tree
from lorastack.client import Client
from lorastack.config import GatewayConfig, ModelConfig
from lorastack.errors import UnavailableError
from lorastack.service import build as build_module
from lorastack.service.watch import logs
from lorastack.train import local
from tests.cli.conftest import Outcome, Run
from tests.service.fakes import RunningServer

VALUES = (
    *("", " ", "-", "--", "-1", "0", "0.5", "1e400", "nan", "inf", "True"),
    *(str(1 << 31), str(1 << 32), str(1 << 64), "9" * 5000, "1" + "0" * 400 + "GiB"),
    *("caf\udce9", "\x00", "a\nb", "\x1b[31m", "x" * 10_000, "[", "{", '{"a": 1}', "[[[1]]]"),
    *("/dev/null/x", "/dev/null", "/proc/nothing", "/proc/self/mem", "../..", "none", "a/b/c"),
    *("FOLDER", "FILE", "BINARY"),  # paths of the test
)
# What a command needs beside the parameter that is tried.
GOOD: dict[str, tuple[str, ...]] = {
    "serve": ("--port", "0", "--store", "STORE", "--threads", "1"),
    "gateway": ("--port", "0"),
    "generate": ("--max-new-tokens", "2"),
    "bench": ("--concurrency", "1", "--requests", "1", "--max-new-tokens", "2"),
    "verify": ("--model", "MODEL"),
    "upload": ("--id", "new"),
    "pull": ("--folder", "/nowhere"),
    "heads": ("--id", "new", "--prompts", "PROMPTS", "--work", "WORK"),
    "eval": ("--heads", "HEADS", "--prompts", "PROMPTS"),
}
ARGUMENTS = {
    "prompt": "hi", "adapter_id": "known", "digest": "sha256:00", "folder": "NEW", "source": "LORA",
    "hub_id": "org/name", "medusa_id": "none", "upload folder": "LORA", "verify folder": "LORA",
    "alias_id": "new",
}  # fmt: skip


def parameters() -> Iterator[tuple[tuple[str, ...], Any]]:
    """(command, parameter) for every parameter that takes a value."""
    todo: list[tuple[tuple[str, ...], Any]] = [((), tree())]
    while todo:
        path, command = todo.pop()
        todo.extend(((*path, name), inner) for name, inner in commands(command).items())
        for parameter in command.params if path else ():
            if not getattr(parameter, "is_flag", False):
                yield path, parameter


def commands(command: Any) -> dict[str, Any]:
    return getattr(command, "commands", {})


WALK = [pytest.param(*case, id=f"{' '.join(case[0])} {case[1].name}") for case in parameters()]


@pytest.fixture
def places(
    tmp_path: Path, folders: dict[str, Path], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """Names in VALUES, GOOD and ARGUMENTS -> paths. Relative paths stay in the test's folder."""
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b" / "c")
    for name in ("folder", "file", "binary"):
        (tmp_path / name).mkdir() if name == "folder" else (tmp_path / name).write_bytes(b"x")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00{")
    (tmp_path / "prompts").write_text('{"prompt": "hi"}\n')
    names = ("folder", "file", "binary", "store", "new", "prompts", "work")
    paths = {name.upper(): tmp_path / name for name in names}
    adapters = {"LORA": folders["lora"], "HEADS": folders["heads"]}
    return {k: str(v) for k, v in {**paths, **adapters, "MODEL": tiny_llama}.items()}


@pytest.fixture(autouse=True)
def nothing_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub is asked and no server runs: commands end where they would load the default model."""
    load = build_module.load_model

    def stop(config: ModelConfig, *rest: Any) -> Any:
        if config.model is not None:
            return load(config, *rest)
        raise UnavailableError("this is where a model would be loaded")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_DATA_HOME", "/nowhere")
    monkeypatch.setattr(build_module, "load_model", stop)
    monkeypatch.setattr(local, "load_model", stop)
    monkeypatch.setattr("lorastack.gateway.serving.serve", listening)
    monkeypatch.setattr(logs, "configure_logging", lambda log_format, level: None)


def listening(config: GatewayConfig, bound: socket.socket, on_ready: object) -> None:
    bound.close()
    raise UnavailableError("this is where HTTP would be served")


def line(path: tuple[str, ...], parameter: Any, value: str, address: str) -> list[str]:
    """A command line in which only `value` is odd. Values are glued on, as some begin with -."""

    def wanted(name: str) -> str:
        return ARGUMENTS.get(f"{path[-1]} {name}") or ARGUMENTS[name]

    command: Any = tree()
    for name in path:
        command = commands(command)[name]
    options = [*GOOD.get(path[-1], ())]
    if "--server" in {opt for known in command.params for opt in known.opts}:
        options += ["--server", address]
    arguments = [
        value if known is parameter else wanted(known.name)
        for known in command.params
        if known.param_type_name == "argument" and (known.required or known is parameter)
    ]
    if path[-1] == "generate" and parameter.name not in ("prompt", "messages", "token_ids"):
        arguments = ["hi"]
    if parameter.param_type_name != "argument":
        options.append(f"{parameter.opts[0]}={value}")
    return [*path, *options, "--", *arguments]


@pytest.mark.parametrize(("path", "parameter"), WALK)
def test_an_odd_value_is_one_line(
    path: tuple[str, ...],
    parameter: Any,
    run: Run,
    fake: RunningServer,
    client: Client,
    places: dict[str, str],
) -> None:
    client.upload(Path(places["LORA"]), "known")
    for odd in VALUES:
        value = places.get(odd, odd)
        words = [places.get(word, word) for word in line(path, parameter, value, fake.address)]
        assert_one_line(run(*words), words)


def assert_one_line(done: Outcome, words: list[str]) -> None:
    shown = f"{words}: {done}"
    assert done.code in (0, 1, 2), shown
    assert "Traceback" not in done.err, shown
    if done.code:
        assert done.err.startswith("lorastack: "), shown
        assert done.err.count("\n") == 1, shown
        assert done.err[:-1].isprintable(), shown
