"""Two tokens through the whole engine, before the server says that it serves."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor

from lorastack.request import SamplingParams, SpeculationParams, StopParams
from lorastack.service.calls.call import GenerateCall, Ids
from lorastack.service.calls.dispatch import Dispatcher
from lorastack.service.calls.prepare import Preparer
from lorastack.service.edge.status import new_request_id


async def probe(preparer: Preparer, dispatcher: Dispatcher, workers: Executor) -> None:
    """Generates two tokens, with the default heads if there are any. Raises what went wrong."""
    call = GenerateCall(
        request_id=new_request_id(),
        input=Ids((0,)),
        loras=(),
        medusa_id="",
        sampling=SamplingParams(),
        seeded=False,
        max_new_tokens=2,
        stop=StopParams(max_new_tokens=2, ignore_eos=True),
        speculation=SpeculationParams(),
        num_logprobs=None,
        return_prompt=False,
    )
    async with dispatcher.open(call.request_id) as stream:
        prepared = await asyncio.get_running_loop().run_in_executor(
            workers, preparer.prepare, call, None
        )
        stream.submit(prepared.request)
        while True:
            last = (await stream.take())[-1]
            if last.error is not None:
                raise last.error
            if last.final is not None:
                return
