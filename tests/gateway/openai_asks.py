"""What tests ask of the OpenAI API, and gRPC's replies to the same."""

from __future__ import annotations

from typing import Any

from lorastack.v1 import generation_pb2 as pb
from tests.helpers.live import LiveServer, ask

PROMPT = "hello there"
CHAT: Any = [{"role": "user", "content": "hello there"}]
LIMIT = 12
GREEDY: Any = {"temperature": 0, "max_tokens": LIMIT}


def direct(served: LiveServer, **asked: Any) -> pb.GenerateResponse:
    """gRPC's reply to PROMPT at temperature 0."""
    fields: dict[str, Any] = {"heads": "", "max_new_tokens": LIMIT, **asked}
    return served.client.generate(ask(**{"prompt": PROMPT, **fields}))


def direct_chat(served: LiveServer, lora_id: str = "") -> pb.GenerateResponse:
    request = pb.GenerateRequest(lora_id=lora_id, stop=pb.StopParams(max_new_tokens=LIMIT))
    request.chat.messages.add(role="user", content="hello there")
    return served.client.generate(request)
