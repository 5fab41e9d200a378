"""The Dockerfile's stages and its run line, as far as text shows them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from lorastack.cli.serve import serve
from tests.test_layering import ROOT

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def stages() -> dict[str, list[str]]:
    """Stage -> its instructions, those of the stages it is made from first."""
    stages: dict[str, list[str]] = {}
    lines = re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    for line in filter(None, lines):
        if line.startswith("FROM "):
            _, parent, _, name = line.split()
            stages[name] = list(stages.get(parent, []))
        else:
            stages[name].append(line)
    return stages


def test_both_images_serve_as_an_ordinary_user_with_a_data_volume() -> None:
    assert list(stages())[-1] == "cpu"  # what is built without --target
    for name in ("cpu", "cuda"):
        lines = stages()[name]
        assert 'ENTRYPOINT ["lorastack", "serve"]' in lines
        assert "USER 10001" in lines[-1]
        assert "VOLUME /data" in lines
        assert f"COPY --from=build-{name} /opt/lorastack /opt/lorastack" in lines
        environment = " ".join(line for line in lines if line.startswith("ENV "))
        for variable in ("LORASTACK_STORE", "LORASTACK_CACHE", "HF_HOME"):
            assert f"{variable}=/data/" in environment
    assert "NVIDIA_VISIBLE_DEVICES" in " ".join(stages()["cuda"])


def test_the_run_line_has_options_that_serve_knows() -> None:
    line = re.search(r"docker run (?:.*\\\n)+.*", TEXT)
    assert line is not None
    words = shlex.split(line[0].replace("\\\n#", " ").replace("\\\n", " "))
    options = [word for word in words[words.index("lorastack:cuda") :] if word.startswith("--")]
    assert options == ["--model", "--medusa", "--pull-org"]
    known = {name.replace("_", "-") for name in serve.__annotations__}
    assert {option.removeprefix("--") for option in options} <= known


def test_the_cuda_image_can_compile_what_triton_launches() -> None:
    """And keeps it with the data, which the user may write."""
    lines = " ".join(stages()["cuda"])
    assert re.search(r"apt-get install \S+ -y .*\bgcc=", lines) and "libc6-dev=" in lines
    assert "TRITON_CACHE_DIR=/data/cache/" in lines
    assert "gcc" not in " ".join(stages()["cpu"])


def build(folder: Path, daemon: bool, *names: str) -> tuple[int, list[str]]:
    """What `docker/build.sh` ends with, and what it asks of a docker that is made up."""
    fake, log = folder / "docker", folder / "log"
    fake.write_text(f'#!/bin/sh\necho "$1 $2 $3" >> {log}\nexit {0 if daemon else 1}\n')
    fake.chmod(0o755)
    environment = {**os.environ, "DOCKER": str(fake)}
    script = [str(ROOT / "docker" / "build.sh"), *names]
    done = subprocess.run(script, env=environment, capture_output=True, check=False, timeout=60)
    return done.returncode, log.read_text().splitlines()


@pytest.mark.parametrize(
    ("names", "built"), [((), ["cpu", "cuda"]), (("cuda",), ["cuda"]), (("cpu",), ["cpu"])]
)
def test_images_are_built_and_tried(
    tmp_path: Path, names: tuple[str, ...], built: list[str]
) -> None:
    code, asked = build(tmp_path, True, *names)
    assert code == 0
    wanted = [(f"build --target {name}", "run --rm --entrypoint") for name in built]
    assert asked[1:] == [line for pair in wanted for line in pair]
    assert set(built) <= stages().keys()


def test_without_a_daemon_or_an_image_of_that_name_nothing_is_built(tmp_path: Path) -> None:
    code, asked = build(tmp_path, False)
    assert (code, len(asked)) == (1, 1)
    code, asked = build(tmp_path, True, "gpu")
    assert (code, len(asked)) == (2, 2)
