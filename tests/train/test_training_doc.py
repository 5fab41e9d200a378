"""The commands of docs/training.md run as they are written, in their order, on the tiny model."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorastack.cli.main import commands, main
from lorastack.config import MIB, AdapterConfig, EngineConfig
from lorastack.service.watch import logs
from tests.helpers.canary import train_layer_canary
from tests.helpers.costs import cheap_drafts
from tests.helpers.live import LiveServer
from tests.test_layering import ROOT

PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
(EXAMPLE,) = re.findall(r"^```json\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Path,
    store: Path,
    adapter_folders: dict[str, Path],
) -> Iterator[LiveServer]:
    """Serves what the page names; the commands run in a folder with its files of prompts."""
    folder = tmp_path_factory.mktemp("page")
    root = shutil.copytree(store, folder / "store")
    topics = ("apples", "a train", "the baker", "two clocks", "rain", "a garden")
    for name in ("questions", "held-out"):
        lines = [json.dumps({"prompt": f"How many {name} of {topic}?"}) + "\n" for topic in topics]
        (folder / f"{name}.jsonl").write_text(EXAMPLE + "".join(lines))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for name, value in (
            *(("MODEL", tiny_llama), ("STORE", root), ("DTYPE", "float32"), ("THREADS", "1")),
            *(("KV_MEMORY", "64MiB"), ("DEVICE", "cpu")),
        ):
            monkeypatch.setenv(f"LORASTACK_{name}", str(value))
        monkeypatch.setattr(logs, "configure_logging", lambda log_format, level: None)
        engine = EngineConfig(kv_memory=16 * MIB, max_rows=8, max_nodes=6)
        with LiveServer(tiny_llama, engine=engine, adapters=AdapterConfig(store=root)) as server:
            lora = train_layer_canary(folder / "lora-gsm8k", tiny_llama, "elk")
            server.upload("lora-gsm8k", lora)
            server.upload("heads-general", adapter_folders["heads"])
            monkeypatch.setenv("LORASTACK_SERVER", server.server.address)
            with cheap_drafts():
                yield server


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_as_it_is_written(
    command: str, server: LiveServer, capsys: pytest.CaptureFixture[str]
) -> None:
    program, *words = shlex.split(command)
    assert program == "lorastack"
    with pytest.raises(SystemExit) as end:
        main(words)
    out, err = capsys.readouterr()
    assert not end.value.code, err
    if words[:2] in (["train", "heads"], ["train", "joint"]):
        adapter_id = words[words.index("--id") + 1]
        assert f"is in lorastack-train/{adapter_id}/adapter" in out
        if "--upload" in words:
            assert server.client.get_adapter(adapter_id).digest in out
    if words[:2] == ["train", "eval"]:
        assert "times the speed without drafts" in out
    if words[0] == "generate" and "lora-gsm8k" in words:
        assert out.startswith("elkelk")


def test_the_pages_options_exist() -> None:
    group = commands().commands["train"]  # type: ignore[attr-defined]
    known = {name for each in group.commands.values() for p in each.params for name in p.opts}
    known |= {"--store", "--chat"}
    assert set(re.findall(r"`(--[a-z-]+)", PAGE)) <= known
