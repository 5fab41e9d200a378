"""Workers that die, callers who give up, and the end of a pool."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lorastack.errors import Reason, UnavailableError
from lorastack.sandbox.pool import JobError, Pool
from lorastack.sandbox.tasks import TEMPLATE, template_body
from lorastack.sandbox.wire import Job, Outcome
from lorastack.service.calls.call import Chat
from lorastack.service.calls.untrusted import TEMPLATE_LIMITS
from tests.sandbox.workers import CHAT, PATIENCE, Sandbox, endless, started


def test_whoever_gives_up_frees_the_worker(sandbox: Sandbox) -> None:
    pool = sandbox.untrusted.pool

    async def check() -> None:
        jobs = [asyncio.create_task(pool.run(endless(), "caller")) for _ in range(4)]
        await started(pool, 2)
        children = [child for pid in pool.pids for child in psutil.Process(pid).children()]
        assert pool.num_waiting == 2
        for job in jobs:
            job.cancel()
        await asyncio.wait(jobs)
        assert pool.num_waiting == 0
        # The workers serve the next caller, and none was replaced.
        pids = pool.pids
        texts = [sandbox.untrusted.render("x", Chat(CHAT), "caller") for _ in range(4)]
        assert await asyncio.gather(*texts) == ["x"] * 4
        assert pool.pids == pids
        assert pool.num_running == 0
        assert not any(child.is_running() for child in children)

    sandbox.run(check())


def test_a_worker_that_dies_is_replaced(sandbox: Sandbox) -> None:
    pool = sandbox.untrusted.pool

    async def kill_all() -> list[psutil.Process]:
        """Waits for a child, kills all workers and returns their children."""
        await started(pool, 1)
        workers = [psutil.Process(pid) for pid in pool.pids]
        children = [child for worker in workers for child in worker.children()]
        for worker in workers:
            worker.kill()
        return children

    async def check() -> None:
        job = asyncio.create_task(pool.run(endless(), "caller"))
        children = await kill_all()
        # A job is tried once more; no caller hears of a worker that died idle.
        texts = [sandbox.untrusted.render("x", Chat(CHAT), "caller") for _ in range(3)]
        assert await asyncio.gather(*texts) == ["x"] * 3
        children += await kill_all()
        with pytest.raises(UnavailableError) as lost:
            await job
        assert lost.value.reason is Reason.WORKER_ENDED
        assert await sandbox.untrusted.render("x", Chat(CHAT), "caller") == "x"
        while any(child.is_running() for child in children):
            await asyncio.sleep(0.001)

    sandbox.run(check())


def test_a_job_that_gets_no_processor_is_not_the_callers_fault(sandbox: Sandbox) -> None:
    job = replace(endless(), limits=replace(endless().limits, wall=0.01))
    with pytest.raises(JobError) as late:
        sandbox.run(sandbox.untrusted.pool.run(job, "caller"))
    assert late.value.outcome is Outcome.TOO_LATE


def test_closing_while_a_worker_is_told_its_task() -> None:
    """Every caller hears that the server ends, and nothing else."""
    asked, go_on = threading.Event(), threading.Event()

    def setup() -> dict[str, object]:
        asked.set()
        assert go_on.wait(PATIENCE)
        return {"variables": {}}

    async def check() -> None:
        pool = Pool({TEMPLATE: setup}, num_workers=1)
        job = Job(task=TEMPLATE, body=template_body("", None), limits=TEMPLATE_LIMITS)
        running = asyncio.create_task(pool.run(job, "caller"))
        assert await asyncio.to_thread(asked.wait, PATIENCE)
        closing = asyncio.create_task(pool.close())
        while not pool._closed:
            await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(UnavailableError):
            await running
        await closing
        assert pool.pids == []

    asyncio.run(asyncio.wait_for(check(), PATIENCE))


def test_closing_ends_the_workers_and_whoever_waits() -> None:
    async def check() -> None:
        pool = Pool({TEMPLATE: lambda: {"variables": {}}}, num_workers=1)
        jobs = [asyncio.create_task(pool.run(endless(), "caller")) for _ in range(2)]
        await started(pool, 1)
        (worker,) = map(psutil.Process, pool.pids)
        (child,) = worker.children()
        await pool.close()
        for job in jobs:
            with pytest.raises(UnavailableError):
                await job
        with pytest.raises(UnavailableError):
            await pool.run(endless(), "caller")
        assert not worker.is_running()
        while child.is_running():
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(check(), PATIENCE))


SERVER = """
import asyncio, sys
from lorastack.sandbox.pool import Pool
from lorastack.sandbox.tasks import TEMPLATE
from tests.sandbox.workers import endless, started

async def main():
    pool = Pool({TEMPLATE: lambda: {"variables": {}}}, num_workers=1)
    job = asyncio.create_task(pool.run(endless(), "caller"))
    await started(pool, 1)
    print(pool.pids[0], flush=True)
    await job

asyncio.run(main())
"""


def test_workers_end_with_a_server_that_is_killed() -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    with server:
        assert server.stdout is not None
        worker = psutil.Process(int(server.stdout.readline()))
        (child,) = worker.children()
        server.kill()
    _, alive = psutil.wait_procs([worker, child], timeout=PATIENCE)
    assert not alive
