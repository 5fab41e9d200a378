"""The Dockerfile's stages and its run line, as far as text shows them."""

from __future__ import annotations

import re
import shlex

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
