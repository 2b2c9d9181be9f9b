"""Exit of a worker on SIGTERM: finish running blocks, hand back the rest, leave. For the driver: ``sigterm``.

Without this a Dask worker dies at once, and its nanny allows it eight seconds. Its tasks are then computed
again, and count as tasks that may have killed it. A batch system signals every process of a job, or the first
alone: the worker acts on its own signal, and its nanny forwards one and waits.

This module imports nothing of the project, so that nannies stay small.
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
"""Seconds to send results to the client, and then to deregister from the scheduler."""
POLL_S = 0.05
AHEAD_S = 1
"""Seconds before the end of its lifetime at which a worker leaves: at the end Dask takes its tasks away."""


def exit_on_sigterm(worker: Worker, grace: float) -> None:
    """Make the worker finish its tasks within ``grace`` seconds on SIGTERM, or when its lifetime ends.

    Only the main thread can handle signals; in a worker with a nanny this runs there.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()
    exits: list[asyncio.Task[None]] = []

    def start(with_nanny: bool) -> None:
        if not exits:
            exits.append(loop.create_task(_exit(worker, grace, with_nanny)))

    # SIGTERM goes to the nanny as well: it needs no message, and sees that its process has ended.
    signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(start, False))
    if worker.lifetime:
        age = time.time() - worker.monitor.proc.create_time()
        loop.call_later(max(0.0, worker.lifetime - AHEAD_S - age), start, True)


async def _exit(worker: Worker, grace: float, with_nanny: bool) -> None:
    """Accept no new tasks, finish the running ones, and leave without losing a result."""
    logger.info("Leaving: finishing %d tasks within %g s", worker.state.executing_count, grace)
    deadline = time.monotonic() + grace
    # In this state the scheduler sends the worker no tasks, and the worker starts none of its queue.
    worker.status = Status.closing_gracefully
    while worker.state.executing_count and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)
    unfinished = worker.state.executing_count
    # The client fetches results and then releases them.
    handing_over_until = time.monotonic() + HANDING_OVER_S
    while worker.data and time.monotonic() < handing_over_until:
        await asyncio.sleep(POLL_S)
    # Retiring hands back tasks without suspicion, and moves unfetched results to other workers if there are
    # any. Errors mean that the scheduler is gone and needs no message.
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        await asyncio.wait_for(
            worker.scheduler.retire_workers(workers=[worker.address], remove=True, close_workers=False),
            timeout=HANDING_OVER_S,
        )
    await worker.close(nanny=with_nanny, executor_wait=not unfinished, timeout=1, reason="worker-exit")


class ForwardSigterm(NannyPlugin):
    """Plugin of a nanny that closes: it sends SIGTERM to its worker and waits until the worker has exited."""

    name = "lsim-worker-exit"

    def __init__(self, grace: float) -> None:
        self.grace = grace

    async def teardown(self, nanny: Nanny) -> None:
        """Send SIGTERM to the worker of a nanny that closes, and wait for its end."""
        process = nanny.process
        if process is None or process.pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + self.grace + 2 * HANDING_OVER_S
        while process.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
