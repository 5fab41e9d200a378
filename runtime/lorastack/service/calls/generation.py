"""GenerationService: a request in, its tokens out, and nothing slow on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor

from lorastack.adapters.catalogue import Catalogue
from lorastack.service.calls import convert
from lorastack.service.calls.call import Text
from lorastack.service.calls.dispatch import Dispatcher
from lorastack.service.calls.intake import Intake
from lorastack.service.calls.served import ServedModel
from lorastack.service.edge import limits
from lorastack.service.edge.status import CallGuard, Context, Notes, new_request_id
from lorastack.service.watch.exposition import Exposition
from lorastack.service.watch.metrics import RequestMetrics
from lorastack.v1 import generation_pb2, generation_pb2_grpc

LONGEST_DEADLINE = 366 * 86_400.0  # seconds; a later one counts as none

Write = Callable[[generation_pb2.GenerateStreamResponse], Awaitable[None]]


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """info: GetModelInfo's reply without default heads. workers: threads for what blocks."""

    def __init__(
        self,
        *,
        model: ServedModel,
        info: generation_pb2.GetModelInfoResponse,
        catalogue: Catalogue,
        intake: Intake,
        dispatcher: Dispatcher,
        guard: CallGuard,
        metrics: RequestMetrics,
        exposition: Exposition,
        workers: Executor,
    ) -> None:
        self._model = model
        self._info = info
        self._catalogue = catalogue
        self._intake = intake
        self._dispatcher = dispatcher
        self._guard = guard
        self._metrics = metrics
        self._exposition = exposition
        self._workers = workers

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> generation_pb2.GenerateResponse:
        parts: list[generation_pb2.GenerateStreamResponse] = []

        async def keep(part: generation_pb2.GenerateStreamResponse) -> None:
            parts.append(part)

        request_id = _request_id(request)
        async with self._guard("Generate", context, request_id) as notes:
            final = await self._run(request, request_id, context, notes, keep, whole=True)
        return convert.joined(parts, final)

    async def GenerateStream(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> None:
        request_id = _request_id(request)
        async with self._guard("GenerateStream", context, request_id) as notes:
            final = await self._run(request, request_id, context, notes, context.write)
            await context.write(generation_pb2.GenerateStreamResponse(final=final))

    async def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: Context
    ) -> generation_pb2.TokenizeResponse:
        async with self._guard("Tokenize", context, new_request_id()):
            given = convert.prompt_input(request, self._model)
            limits.check(not request.spans or isinstance(given, Text), "spans", "for a prompt only")
            ids = await self._intake.encode(given, request.lora_id, context.peer())
            reply = generation_pb2.TokenizeResponse(token_ids=ids)
            if request.spans:
                spans = await self._intake.spans(request.prompt, context.peer())
                for token_id, (start, stop) in zip(ids, spans, strict=True):
                    text = self._model.tokenizer.token_text(token_id)
                    reply.spans.add(text=text, start=start, stop=stop)
        return reply

    async def GetModelInfo(
        self, request: generation_pb2.GetModelInfoRequest, context: Context
    ) -> generation_pb2.GetModelInfoResponse:
        info = generation_pb2.GetModelInfoResponse()
        info.CopyFrom(self._info)
        async with self._guard("GetModelInfo", context, new_request_id()):
            loop = asyncio.get_running_loop()
            heads = await loop.run_in_executor(self._workers, self._catalogue.default_heads)
            if heads is not None:
                info.default_medusa_id, info.default_medusa_digest = heads.medusa_id, heads.digest
        return info

    async def GetMetrics(
        self, request: generation_pb2.GetMetricsRequest, context: Context
    ) -> generation_pb2.GetMetricsResponse:
        async with self._guard("GetMetrics", context, new_request_id()):
            # Not in the workers: a scrape must not wait behind long prompts.
            part = convert.metrics_part(request)
            render = self._exposition.render
            content_type, body = await asyncio.to_thread(render, request.accept, part)
        return generation_pb2.GetMetricsResponse(content_type=content_type, body=body)

    async def _run(
        self,
        message: generation_pb2.GenerateRequest,
        request_id: str,
        context: Context,
        notes: Notes,
        write: Write,
        *,
        whole: bool = False,
    ) -> generation_pb2.GenerateResponse:
        """Runs one request to its end. Leaving early, by any exception, cancels its row.

        whole: everything is written at once, at the end.
        """
        deadline = _deadline(context.time_remaining())
        call = convert.generate_call(message, request_id, self._model)
        notes["loras"] = ",".join(lora_id for lora_id, _ in call.loras)
        notes["heads"] = call.medusa_id
        async with self._dispatcher.open(request_id, whole=whole) as stream:
            prepared = await self._intake.prepare(call, deadline, context.peer())
            heads = prepared.request.heads
            notes["heads"] = "" if heads is None else heads.medusa_id
            stream.submit(prepared.request)
            while True:
                events = await stream.take()
                for piece in convert.in_pieces(events):
                    part = convert.stream_part(piece, self._model.tokenizer)
                    self._metrics.generated(len(part.token_ids))
                    if part.token_ids or part.text or part.prompt_tokens:
                        await stream.hand_over(write(part))
                    if piece[-1] is not events[-1]:
                        await asyncio.sleep(0)  # others' turn
                if (error := events[-1].error) is not None:
                    raise self._catalogue.with_ids(error)
                if (final := events[-1].final) is not None:
                    break
        self._metrics.row_ended(prepared.request, final)
        notes["finish"] = final.finish_reason
        notes["prompt_tokens"] = final.prompt_tokens
        notes["cached_tokens"] = final.cached_prompt_tokens
        notes["tokens"] = final.generated_tokens
        return convert.final_response(final, prepared)


def _deadline(remaining: float | None) -> float | None:
    """time.monotonic() seconds, from how many remain; None: the caller waits for ever."""
    if remaining is None or not remaining < LONGEST_DEADLINE:  # NaN counts as none too
        return None
    return time.monotonic() + remaining


def _request_id(message: generation_pb2.GenerateRequest) -> str:
    """The caller's id if it may be logged as it is, else ours."""
    given = message.request_id
    return given if limits.REQUEST_ID.fullmatch(given) else new_request_id()
