"""LoRAs on the embedding and on lm_head of models that tie the two, or say so: as PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorastack.config import AdapterConfig
from lorastack.layout import EMBED, LM_HEAD
from tests.helpers.adapters import write_lora
from tests.helpers.live import ROOMY, LiveServer, ask
from tests.helpers.reference import Reference, assert_greedy
from tests.helpers.tiny import shapes_of
from tests.model.test_weights import stored


@pytest.mark.parametrize("head", ["", "same", "other"])
def test_loras_on_both_ends_equal_pefts(tiny_llama: Path, tmp_path: Path, head: str) -> None:
    model = stored(tiny_llama, tmp_path / "model", tie=True, embed="same", head=head)
    loras = {
        name: write_lora(tmp_path / name, shapes_of(model), seed=seed, targets=(target,))
        for seed, (name, target) in enumerate({"in": EMBED, "out": LM_HEAD}.items(), 5)
    }
    reference = Reference(model, loras)
    with LiveServer(
        model, engine=ROOMY, adapters=AdapterConfig(store=tmp_path / "store")
    ) as server:
        server.upload_all(loras)
        outputs = []
        for stack in ((), (("in", 1.0),), (("out", 1.0),), (("in", 1.0), ("out", 0.5))):
            request = ask("hello there", stack=stack, max_new_tokens=16, ignore_eos=True)
            reply = server.client.generate(request)
            assert len(reply.token_ids) == 16
            outputs.append((server.tokenize("hello there"), stack, reply.token_ids))
    assert_greedy(reference, outputs)
