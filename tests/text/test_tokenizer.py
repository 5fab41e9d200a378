import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.text.stream import Detokenizer
from lorastack.text.tokenizer import Tokenizer
from tests.helpers.tiny import EOS, IM_END, SPECIALS, VOCAB_SIZE, write_json, write_tokenizer

TEXTS = ["", "the thing", "  two  spaces\n", "é 中 😀 �", "<|im_start|>x</s>", "a" * 500]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


@pytest.fixture
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.mark.parametrize("model_type", [None, "llama"])
def test_ids_and_text_equal_transformers(folder: Path, model_type: str | None) -> None:
    if model_type is not None:  # then tokenizer.json is read without AutoTokenizer
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = Tokenizer.load(folder)
    hf = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == hf(text).input_ids
        assert tokenizer.decode(ids) == hf.decode(ids, skip_special_tokens=True)
    assert tokenizer.vocab_size == VOCAB_SIZE


def test_chat_equals_transformers(folder: Path, tokenizer: Tokenizer) -> None:
    hf = AutoTokenizer.from_pretrained(folder)
    messages = [("system", "be brief"), ("user", "hi é")]
    conversation = [{"role": role, "content": content} for role, content in messages]
    text = hf.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    assert tokenizer.chat(messages) == hf(text, add_special_tokens=False).input_ids


def test_the_models_template_that_fails_is_the_callers_error(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ raise_exception('roles must alternate') }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidArgumentError, match=r"chat template.*roles must alternate"):
        Tokenizer.load(folder).chat([("user", "hi")])


def test_a_chat_needs_messages_and_a_template(folder: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidArgumentError, match="no messages"):
        tokenizer.chat([])
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidArgumentError, match="send a prompt"):
        Tokenizer.load(folder).chat([("user", "hi")])


def test_end_tokens_come_from_all_three_files(folder: Path) -> None:
    end, im_end = SPECIALS.index(EOS), SPECIALS.index(IM_END)
    assert Tokenizer.load(folder).eos_ids == {end, im_end}
    (folder / "generation_config.json").unlink()
    assert Tokenizer.load(folder).eos_ids == {end}
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 9}')
    assert Tokenizer.load(folder).eos_ids == {end, 9}


def test_display_text_of_tokens(tokenizer: Tokenizer) -> None:
    bos, the, *rest = tokenizer.encode("the é")
    assert (tokenizer.token_text(bos), tokenizer.is_special(bos)) == ("<s>", True)
    assert (tokenizer.token_text(the), tokenizer.is_special(the)) == ("the", False)
    assert [tokenizer.token_text(token) for token in rest] == [" ", "é"]
    assert tokenizer.token_text(VOCAB_SIZE + 5) == ""


def test_the_digest_follows_the_files(folder: Path, tmp_path: Path) -> None:
    first = Tokenizer.load(folder).digest
    assert first.startswith("sha256:")
    assert Tokenizer.load(folder).digest == first
    (folder / "model.safetensors").write_bytes(b"other")
    assert Tokenizer.load(folder).digest == first
    (folder / "chat_template.jinja").write_text("x")
    assert Tokenizer.load(folder).digest != first


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="No tokenizer") as raised:
        Tokenizer.load(tmp_path)
    assert raised.value.reason is Reason.INVALID_MODEL


def test_broken_json_is_refused(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(InvalidArgumentError, match="JSON"):
        Tokenizer.load(folder)


ODD: list[Any] = [None, [], [[1]], {}, {"a": [1]}, "x", "", "2", -1, 0, 1.5, 10**30, True]
ODD += [float("nan"), float("inf"), [None], {"content": 1}, ["x"], [True], [-1], VOCAB_SIZE, [1, 2]]


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", ODD, ids=repr)
def test_an_odd_end_token_is_refused_by_file_and_field(folder: Path, name: str, value: Any) -> None:
    (folder / "generation_config.json").unlink()
    write_json(folder / "config.json", {"model_type": "llama", "vocab_size": VOCAB_SIZE})
    if name != "config.json":
        write_json(folder / name, {})
    edit(folder / name, eos_token_id=value)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if all(type(index) is int and 0 <= index < VOCAB_SIZE for index in ids):
        assert Tokenizer.load(folder).eos_ids == {SPECIALS.index(EOS), *ids}
        return
    with pytest.raises(InvalidArgumentError, match=f"{name}: eos_token_id must be") as refusal:
        Tokenizer.load(folder)
    assert refusal.value.reason is Reason.INVALID_MODEL
    assert "\n" not in refusal.value.message


@pytest.mark.parametrize("name", ["generation_config.json", "config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[]", "3", '"x"', "{", "\ufeff{}", "[" * 100_000, "\udcff"])
def test_files_that_hold_no_json_object_are_refused_by_name(
    folder: Path, name: str, text: str
) -> None:
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InvalidArgumentError, match=name) as refusal:
        Tokenizer.load(folder)
    assert len(refusal.value.message) < 500


@pytest.mark.parametrize("model_type", ["", "llama"])
@pytest.mark.parametrize(
    "field",
    [
        *("tokenizer_class", "bos_token", "eos_token", "unk_token", "pad_token", "chat_template"),
        *("additional_special_tokens", "added_tokens_decoder", "model_max_length", "auto_map"),
        *("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "padding_side"),
        *("clean_up_tokenization_spaces", "extra_special_tokens", "truncation_side", "no_such"),
    ],
)
def test_an_odd_value_of_the_tokenizer_is_refused_or_means_what_it_does_to_transformers(
    folder: Path, field: str, model_type: str
) -> None:
    path = folder / "tokenizer_config.json"
    if model_type:  # then tokenizer.json is read without AutoTokenizer
        write_json(folder / "config.json", {"model_type": model_type})
    before = path.read_text()
    for value in [value for value in ODD if value != VOCAB_SIZE]:
        path.write_text(before)
        edit(path, **{field: value})
        try:
            tokenizer = Tokenizer.load(folder)
        except InvalidArgumentError as error:
            assert str(folder) in error.message and "\n" not in error.message
            assert f"{path}: {field} must be" in error.message or "No tokenizer" in error.message
            continue
        hf = AutoTokenizer.from_pretrained(folder)
        for text in TEXTS:
            assert tokenizer.encode(text) == hf(text).input_ids, (field, value)


def test_an_end_token_of_the_tokenizer_that_the_model_lacks_is_none(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    write_json(folder / "config.json", {"model_type": "llama", "vocab_size": 1})
    assert SPECIALS.index(EOS) == 1
    assert Tokenizer.load(folder).eos_ids == set()


def test_threads_may_encode_together(tokenizer: Tokenizer) -> None:
    expected = [tokenizer.encode(text * 20) for text in TEXTS]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(10):
            assert list(threads.map(lambda text: tokenizer.encode(text * 20), TEXTS)) == expected


@pytest.mark.real
def test_the_default_models_tokenizer(smollm: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(smollm)
    ids = tokenizer.chat([("user", "What is 2 + 2? 😀")])
    assert tokenizer.eos_ids == {2}
    assert tokenizer.decode(ids).endswith("user\nWhat is 2 + 2? 😀\nassistant\n")
    detokenizer = Detokenizer(tokenizer)
    everything = range(tokenizer.vocab_size)
    text = "".join(detokenizer.push([token]) for token in everything) + detokenizer.flush()
    assert text == tokenizer.decode(list(everything))
    shutil.copy(smollm / "tokenizer.json", tmp_path)
    shutil.copy(smollm / "tokenizer_config.json", tmp_path)
    assert Tokenizer.load(tmp_path).encode("x") == tokenizer.encode("x")
