import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.text.stream import Detokenizer
from lorastack.text.tokenizer import Tokenizer
from tests.helpers.tiny import EOS, IM_END, SPECIALS, VOCAB_SIZE, write_tokenizer

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
