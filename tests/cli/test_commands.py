"""Client commands against a fake engine: what they send, print and return."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from lorastack.cli.output import human_size, to_dict
from lorastack.layout import ModelShapes
from lorastack.v1 import adapters_pb2 as ab
from lorastack.v1 import generation_pb2 as pb
from tests.adapters.folders import edit_json
from tests.cli.conftest import Run
from tests.helpers.tiny import shapes_of
from tests.service.fakes import RunningServer

Folders = dict[str, Path]


@pytest.fixture
def at(fake: RunningServer) -> tuple[str, str]:
    return "--server", fake.address


def test_generate_streams_text_and_sums_up(run: Run, at: tuple[str, str]) -> None:
    done = run("generate", "hello", "--max-new-tokens", "5", *at)
    assert done.code == 0
    assert done.out.startswith("<s>hell")
    assert done.out.endswith("\n")
    assert "5 tokens" in done.err
    assert "LENGTH" in done.err


def test_generate_json_is_the_whole_reply(run: Run, at: tuple[str, str]) -> None:
    options = ("--max-new-tokens", "5", "--temperature", "0.5", "--seed", str((1 << 64) - 1))
    reply = json.loads(run("generate", "hello", "--json", *options, *at).out)
    assert reply["finish_reason"] == "LENGTH"
    assert reply["seed"] == (1 << 64) - 1  # a number, not a string
    assert reply["usage"]["cached_prompt_tokens"] == 0  # zeros are there
    assert len(reply["token_ids"]) == len(reply["tokens"]) == 5


def test_generate_sends_what_was_asked(
    run: Run, at: tuple[str, str], fake: RunningServer, folders: Folders
) -> None:
    for name in ("lora", "other", "heads"):
        assert run("adapters", "upload", str(folders[name]), "--id", name, *at).code == 0
    digest = fake.registry.resolve("other").digest
    arguments = ("--lora", "lora:0.5", "--lora", f"other@{digest}:-2e0", "--medusa", "heads")
    sampling = ("--temperature", "0.7", "--top-k", "5", "--top-p", "0.5", "--seed", "3")
    stops = ("--max-new-tokens", "4", "--stop", "x", "--stop", "yy", "--max-nodes", "7")
    done = run("generate", "hi", *arguments, *sampling, *stops, *at)
    assert done.code == 0, done.err
    request = fake.engine.submitted[-1]
    assert {(use.lora_id, use.scale) for use in request.loras} == {
        ("lora", 0.5),
        (f"other@{digest}", -2.0),
    }
    assert request.heads is not None
    assert request.heads.medusa_id == "heads"
    assert request.sampling.temperature == pytest.approx(0.7)
    assert (request.sampling.top_k, request.sampling.top_p, request.sampling.seed) == (5, 0.5, 3)
    assert request.stop.stop_sequences == ("x", "yy")
    assert request.stop.max_new_tokens == 4
    assert request.speculation.max_nodes == 7
    assert "lora lora sha256:" in done.err
    assert "heads heads sha256:" in done.err
    run("generate", "hi", "--no-speculation", "--max-new-tokens", "1", *at)
    assert not fake.engine.submitted[-1].speculation.enabled


def test_generate_chat_and_stdin(
    run: Run, at: tuple[str, str], fake: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = fake.engine.tokenizer
    run("generate", "hi", "--chat", "--max-new-tokens", "1", *at)
    assert fake.engine.submitted[-1].prompt_ids == tuple(tokenizer.chat([("user", "hi")]))
    run("generate", "hi", "--system", "be brief", "--max-new-tokens", "1", *at)
    chat = [("system", "be brief"), ("user", "hi")]
    assert fake.engine.submitted[-1].prompt_ids == tuple(tokenizer.chat(chat))
    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin"))
    run("generate", "-", "--max-new-tokens", "1", *at)
    assert fake.engine.submitted[-1].prompt_ids == tuple(tokenizer.encode("from stdin"))


def test_adapters_from_upload_to_delete(run: Run, at: tuple[str, str], folders: Folders) -> None:
    assert json.loads(run("adapters", "list", "--json", *at).out) == {"adapters": []}
    shown = json.loads(
        run("adapters", "upload", str(folders["lora"]), "--id", "l", "--json", *at).out
    )
    assert (shown["id"], shown["kind"], shown["rank"], shown["num_heads"]) == ("l", "LORA", 8, 0)
    assert isinstance(shown["size_bytes"], int)
    assert shown["created_at"].endswith("Z")
    listed = json.loads(run("adapters", "list", "--json", *at).out)
    assert listed == {"adapters": [shown]}
    table = run("adapters", "list", *at).out
    assert shown["digest"][:19] in table
    assert json.loads(run("adapters", "show", "l", "--json", *at).out) == shown
    text = run("adapters", "show", "l", *at).out
    assert shown["digest"] in text
    assert "num_heads" not in text
    assert run("adapters", "delete", "l", *at).out == "deleted l\n"
    gone = run("adapters", "show", "l", *at)
    assert gone.code == 1


def test_failures_are_one_line_with_a_remedy(
    run: Run, at: tuple[str, str], folders: Folders, tmp_path: Path
) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    for arguments, words in (
        (("adapters", "show", "nobody", *at), "nobody"),
        (("generate", "hi", "--lora", "nobody", *at), "nobody"),
        (("generate", "hi", "--top-p", "0", *at), "top_p"),
        (("adapters", "upload", str(tmp_path / "no"), "--id", "x", *at), "no"),
        (("adapters", "upload", str(tmp_path), "--id", "x", *at), "pickle"),
        (("generate", "hi", "--server", "127.0.0.1:1"), "lorastack serve"),
    ):
        done = run(*arguments)
        assert done.code == 1
        assert words in done.err
        assert done.err.startswith("lorastack: ")
        assert len(done.err.splitlines()) == 1
        assert done.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "hi", "--temprature", "1"),
        ("generate",),
        ("generate", "hi", "--lora", ":2"),
        ("generate", "hi", "--lora", "a:b"),
        ("generate", "hi", "--lora", "a:1:2"),
        ("generate", "hi", "--max-new-tokens", "many"),
        ("serve", "--kv-memory", "4GB"),
        ("serve", "--kv-memory", "0"),
        ("serve", "--kv-memory", "infGiB"),
        ("serve", "--device", "tpu"),
        ("serve", "--quantize", "int3"),
        ("serve", "--htp-port", "80"),
        ("serve", "--port", "70000"),
        ("adapters", "upload", "x"),
        ("nothing",),
    ],
)
def test_wrong_usage_exits_2(run: Run, arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert "Traceback" not in done.err


def test_the_server_comes_from_the_environment(
    run: Run, fake: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORASTACK_SERVER", fake.address)
    assert run("adapters", "list", "--json").code == 0


def test_version_and_help(run: Run) -> None:
    assert run("--version").out.startswith("lorastack ")
    for command in ((), ("serve",), ("generate",), ("adapters",), ("adapters", "upload")):
        assert run(*command, "--help").code == 0


def test_verify_says_what_a_folder_holds(run: Run, folders: Folders, tiny_llama: Path) -> None:
    model = ("--model", str(tiny_llama))
    facts = json.loads(run("adapters", "verify", str(folders["bundle"]), "--json", *model).out)
    assert (facts["kind"], facts["rank"], facts["num_heads"]) == ("lora_with_medusa", 8, 3)
    text = run("adapters", "verify", str(folders["lora"]), *model)
    assert text.code == 0
    assert facts["digest"] not in text.out
    assert "lora" in text.out


def test_warnings_are_for_people_too(
    run: Run, at: tuple[str, str], folders: Folders, tiny_llama: Path, tmp_path: Path
) -> None:
    """An upload prints them on stderr; `show` and `verify` list them."""
    for path in folders["lora"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    edit_json(tmp_path / "adapter_config.json", base_model_name_or_path="/data/checkpoint-7")
    (tmp_path / "added_tokens.json").write_text('{"<tool>": 99999}')
    done = run("adapters", "upload", str(tmp_path), "--id", "w", *at)
    assert "warning: its config calls the base model /data/checkpoint-7" in done.err
    assert "/data/checkpoint-7, which" in run("adapters", "show", "w", *at).out
    verified = run("adapters", "verify", str(tmp_path), "--json", "--model", str(tiny_llama))
    first, second = json.loads(verified.out)["warnings"]
    assert "/data/checkpoint-7" in first and "'<tool>'" in second


def test_verify_refuses_as_an_upload_would(
    run: Run, folders: Folders, tiny_llama: Path, tmp_path: Path
) -> None:
    model = ("--model", str(tiny_llama))
    for path in folders["lora"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    done = run("adapters", "verify", str(tmp_path), *model)
    assert done.code == 1
    assert "use_dora" in done.err


def test_verify_takes_other_names_of_the_base(
    run: Run, folders: Folders, tiny_llama: Path, tmp_path: Path
) -> None:
    for path in folders["lora"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    edit_json(tmp_path / "adapter_config.json", base_model_name_or_path="org/other")
    command = ("adapters", "verify", str(tmp_path), "--model", str(tiny_llama))
    for flags in ((), ("--base-name", "another")):
        refused = run(*command, *flags)
        assert refused.code == 1
        assert "org/other" in refused.err
    for flags in (("--accept-base",), ("--base-name", "another", "--base-name", "org/other")):
        assert run(*command, *flags).code == 0


def test_verify_digest_is_the_servers(
    run: Run, at: tuple[str, str], folders: Folders, tiny_llama: Path, shapes: ModelShapes
) -> None:
    assert shapes_of(tiny_llama) == shapes
    uploaded = json.loads(
        run("adapters", "upload", str(folders["lora"]), "--id", "l", "--json", *at).out
    )
    facts = json.loads(
        run("adapters", "verify", str(folders["lora"]), "--json", "--model", str(tiny_llama)).out
    )
    assert facts["digest"] == uploaded["digest"]


def test_json_has_numbers_and_zeros() -> None:
    adapter = to_dict(ab.Adapter(id="x", size_bytes=1 << 40))
    assert adapter["size_bytes"] == 1 << 40
    assert (adapter["device_bytes"], adapter["pinned"], adapter["target_modules"]) == (0, False, [])
    plan = to_dict(ab.PlanUploadResponse(needed=[ab.NeededBlob(sha256="a", offset=1 << 33)]))
    assert plan == {"needed": [{"sha256": "a", "offset": 1 << 33}]}
    token = to_dict(pb.Token(id=1))
    assert "logprob" not in token  # unset, which is not zero
    assert to_dict(pb.Token(id=1, logprob=0))["logprob"] == 0
    info = to_dict(pb.GetModelInfoResponse(limits=pb.Limits(kv_bytes=1 << 35)))
    assert info["limits"]["kv_bytes"] == 1 << 35


def test_sizes_for_people() -> None:
    assert [human_size(size) for size in (5, 1536, 3 << 20, 5 << 30)] == [
        "5 B",
        "1.5 KiB",
        "3.0 MiB",
        "5.0 GiB",
    ]


def test_fsck_needs_no_server(
    run: Run, at: tuple[str, str], folders: Folders, fake: RunningServer
) -> None:
    run("adapters", "upload", str(folders["lora"]), "--id", "l", *at)
    record = fake.registry.resolve("l")
    path = fake.registry.files(record.digest)["adapter_model.safetensors"]
    store = ("--store", str(path.parents[2]))
    sound = run("adapters", "fsck", *store)
    assert sound.code == 0
    assert "1 adapters" in sound.out
    assert "0 damaged" in sound.out
    path.write_bytes(path.read_bytes()[:-1])
    damaged = run("adapters", "fsck", *store)
    assert damaged.code == 1
    assert f"blobs/sha256/{path.name}" in damaged.out
    assert f"adapter_model.safetensors of l@{record.digest}" in damaged.out
    report = run("adapters", "fsck", "--json", *store)
    assert report.code == 1
    (damage,) = json.loads(report.out)["damaged"]
    assert damage["used_by"] == [
        {"id": "l", "digest": record.digest, "file": "adapter_model.safetensors"}
    ]
