"""Typed clients: generate, stream, upload. They need neither torch nor transformers.

    with Client() as client:
        print(client.generate(GenerateRequest(prompt="Hello", lora_id="lora-gsm8k")).text)

Requests and replies are the messages of lorastack.v1; the most used ones are names of this module
too. A failed call raises the class of lorastack.errors for its status, with the server's reason
and metadata. `AsyncClient` has the generation calls and merges for asyncio.
"""

from __future__ import annotations

from lorastack.client.asynchronous import AsyncClient
from lorastack.client.calls import DEFAULT_SERVER, ERRORS, check_server, to_error
from lorastack.client.merging import MajoritySign, Strategy
from lorastack.client.synchronous import Client
from lorastack.client.uploading import folder_files
from lorastack.v1.adapters_pb2 import Adapter
from lorastack.v1.generation_pb2 import (
    OFF,
    ChatMessage,
    ChatMessages,
    GenerateRequest,
    GenerateResponse,
    GenerateStreamResponse,
    GetMetricsRequest,
    GetModelInfoResponse,
    LoraRef,
    OutputParams,
    ResponseFormat,
    SamplingParams,
    Speculation,
    StopParams,
    Token,
    TokenIds,
    TokenizeRequest,
)

__all__ = [
    "DEFAULT_SERVER",
    "ERRORS",
    "OFF",
    "Adapter",
    "AsyncClient",
    "ChatMessage",
    "ChatMessages",
    "Client",
    "GenerateRequest",
    "GenerateResponse",
    "GenerateStreamResponse",
    "GetMetricsRequest",
    "GetModelInfoResponse",
    "LoraRef",
    "MajoritySign",
    "OutputParams",
    "ResponseFormat",
    "SamplingParams",
    "Speculation",
    "StopParams",
    "Strategy",
    "Token",
    "TokenIds",
    "TokenizeRequest",
    "check_server",
    "folder_files",
    "to_error",
]
