"""What a worker does when it is told to go (SIGTERM): finish its running blocks, hand back the rest, leave.

Dask's own worker dies at once, and its nanny gives it eight seconds; the tasks of a worker that goes like
that are computed again, and count as ones that may have killed it. Batch systems signal every process of a
job, or the first alone: the worker acts on its own signal, and its nanny passes one on and waits.

Nothing of the project is imported here, so that nannies stay small.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time

from distributed import Nanny, NannyPlugin, Worker
from distributed.core import Status

logger = logging.getLogger("distributed.worker")

HANDING_OVER_S = 2
"""For what comes after the blocks: results on their way to the client, word to the scheduler."""
POLL_S = 0.05
AHEAD_S = 1
"""A worker leaves so long before the end of its lifetime, at which Dask takes running tasks away from it."""


def leave_when_told(worker: Worker, grace: float) -> None:
    """Have SIGTERM and the end of the worker's lifetime mean: finish within ``grace`` seconds.

    Only a main thread can; a worker with a nanny has one.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()
    leaving: list[asyncio.Task[None]] = []

    def start(with_nanny: bool) -> None:
        if not leaving:
            leaving.append(loop.create_task(_leave(worker, grace, with_nanny)))

    # The nanny, too, is told by SIGTERM: it only sees that its process has ended.
    signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(start, False))
    if worker.lifetime:
        age = time.time() - worker.monitor.proc.create_time()
        loop.call_later(max(0.0, worker.lifetime - AHEAD_S - age), start, True)


async def _leave(worker: Worker, grace: float, with_nanny: bool) -> None:
    """Take no new tasks, finish the running ones, and go in good order: nothing is lost or suspected."""
    logger.info("Told to go: finishing %d tasks within %g s", worker.state.executing_count, grace)
    deadline = time.monotonic() + grace
    # The scheduler gives no more tasks to a worker of this state, and this worker starts none that it has.
    worker.status = Status.closing_gracefully
    while worker.state.executing_count and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)
    unfinished = worker.state.executing_count
    delivered = time.monotonic() + HANDING_OVER_S
    while worker.data and time.monotonic() < delivered:  # results that the client fetches and then releases
        await asyncio.sleep(POLL_S)
    # Its tasks go back unsuspected, and results that nobody has fetched to other workers where there are
    # some. A scheduler that is gone needs no word.
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        await asyncio.wait_for(
            worker.scheduler.retire_workers(workers=[worker.address], remove=True, close_workers=False),
            timeout=HANDING_OVER_S,
        )
    await worker.close(nanny=with_nanny, executor_wait=not unfinished, timeout=1, reason="told-to-go")


class PassOnSignal(NannyPlugin):
    """A nanny that closes tells its worker to go, and waits until it has gone."""

    name = "lsim-departure"

    def __init__(self, grace: float) -> None:
        self.grace = grace

    async def teardown(self, nanny: Nanny) -> None:
        process = nanny.process
        if process is None or process.pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + self.grace + 2 * HANDING_OVER_S
        while process.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
