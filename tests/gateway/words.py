"""LoRAX's and TGI's words for what gRPC's replies say."""

from __future__ import annotations

from lorastack.v1.generation_pb2 import GenerateResponse

END_REASONS = {
    GenerateResponse.LENGTH: "length",
    GenerateResponse.EOS: "eos_token",
    GenerateResponse.STOP_SEQUENCE: "stop_sequence",
}


def in_text(reply: GenerateResponse) -> str:
    """generated_text: with them it ends with the stop sequence."""
    return reply.text + reply.stop_match
