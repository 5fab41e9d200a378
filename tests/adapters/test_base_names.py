"""Names of base models as trainers write them."""

from __future__ import annotations

import pytest

from lorastack.adapters.formats.base_names import Same, same_model

SERVED = "meta-llama/Llama-3.1-8B-Instruct"
MISTRAL = "mistralai/Mistral-7B-Instruct-v0.2"
HASH = "7e27bd9f" * 5


@pytest.mark.parametrize(
    ("named", "served"),
    [
        *((f"unsloth/Llama-3.1-8B-Instruct-{mark}", SERVED) for mark in ("bnb-4bit", "GGUF")),
        ("unsloth/Llama-3.1-8B-Instruct-unsloth-bnb-4bit", SERVED),
        ("hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4", SERVED),
        ("hugging-quants/Meta-Llama-3.1-8B-Instruct-GPTQ-INT4", SERVED),
        ("neuralmagic/Meta-Llama-3.1-8B-Instruct-FP8-dynamic", SERVED),
        ("neuralmagic/Meta-Llama-3.1-8B-Instruct-quantized.w8a8", SERVED),
        ("mlx-community/llama-3.1-8b-instruct-8bit-mlx", SERVED),
        ("someone/Llama-3.1-8B-Instruct-Q4_K_M-GGUF", SERVED),
        ("someone/Llama-3.1-8B-Instruct-4-bit", SERVED),
        ("LLM-Research/Meta-Llama-3___1-8B-Instruct", SERVED),
        ("META-LLAMA/LLAMA-3.1-8B-INSTRUCT", SERVED),
        ("Llama-3.1-8B-Instruct", SERVED),
        (SERVED + "@main", SERVED),
        (" " + SERVED + "/ ", SERVED),
        (f"https://huggingface.co/{SERVED}", SERVED),
        (f"https://huggingface.co/{SERVED}/tree/main", SERVED),
        ("/mnt/models/Llama-3.1-8B-Instruct/", SERVED),
        ("C:\\models\\Llama-3.1-8B-Instruct\\", SERVED),
        (f"/c/hub/models--meta-llama--Llama-3.1-8B-Instruct/snapshots/{HASH}", SERVED),
        (f"C:\\hub\\models--meta-llama--Llama-3.1-8B-Instruct\\snapshots\\{HASH}\\", SERVED),
        ("models--x--Llama-3.1-8B-Instruct", SERVED),
        ("NousResearch/Llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("unsloth/mistral-7b-instruct-v0.2-bnb-4bit", MISTRAL),
        (MISTRAL, "TheBloke/Mistral-7B-Instruct-v0.2-GPTQ"),
        ("4bit", "4bit"),
    ],
)
def test_the_same_model(named: str, served: str) -> None:
    assert same_model(named, ["another", served]) is Same.YES


@pytest.mark.parametrize(
    "named",
    [
        *("/data/out/run-7", "/data/out/checkpoint-500/", "checkpoint-500", "out/checkpoint-500"),
        *("./llama", "../llama", "~/llama", "D:\\llm\\base", "model", "models/final", "base_model"),
        *("saves/llama3-8b/lora", "runs/Some-7B", "org/checkpoint-7"),
        *(f"/x/{HASH}", HASH, "/mnt/data/Some-Other-7B", "s3://bucket/key/name"),
    ],
)
def test_paths_say_nothing(named: str) -> None:
    assert same_model(named, [SERVED]) is Same.PERHAPS


@pytest.mark.parametrize(
    ("named", "served"),
    [
        ("mistralai/Mistral-7B-v0.1", MISTRAL),
        ("mistralai/Mistral-7B-Instruct-v0.1", MISTRAL),
        ("unsloth/mistral-7b-v0.2-bnb-4bit", MISTRAL),
        ("meta-llama/Llama-3.1-8B", SERVED),
        ("meta-llama/Meta-Llama-3-8B-Instruct", SERVED),
        ("meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf"),
        (f"/c/models--meta-llama--Llama-3.1-8B/snapshots/{HASH}", SERVED),
        ("https://huggingface.co/meta-llama/Llama-3.1-8B", SERVED),
        ("other", "tiny"),
        ("other/base", "tiny"),
    ],
)
def test_another_model_of_the_same_shapes(named: str, served: str) -> None:
    assert same_model(named, ["another", served]) is Same.NO
