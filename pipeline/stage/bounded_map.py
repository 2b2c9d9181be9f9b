"""Run many tasks on few workers, with a bounded number of them in flight.

Tasks are taken from their iterator as others finish, so a run of 10⁵ tasks begins at once and holds few of
them. A task whose worker is lost runs again on another, so a task may be run twice, also at the same time.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from distributed import Client, Future, KilledWorker, as_completed

from pipeline.storage import locks
from pipeline.workers import sigterm
from pipeline.workers.pickled_task import EndedError, pack, run_guarded, run_packed
from pipeline.workers.profiles import ClusterError
from pipeline.workers.worker_metrics import single_threaded

logger = logging.getLogger(__name__)

IN_FLIGHT_PER_THREAD = 4
"""Tasks submitted ahead per worker thread: enough to keep it busy, few enough to bound the scheduler."""
IN_FLIGHT = 32
"""Least number of tasks in flight: messages to the scheduler then hold several, which halves the cost of
each."""
RETRIES = 2
"""How often a task that raises is tried again."""

HUNG_FACTOR = 10.0
HUNG_SECONDS = 60.0
"""A task that runs longer than this, and than this many times the median, is reported as possibly hung. While
there is no median yet, the limit is ten times as long."""

POLL_S = 0.005, 0.1
"""Pause before the driver polls again: short after a task has finished, longer while none does."""
COUNT_THREADS_S = 2.0
"""How often threads are counted: workers join and leave."""
NO_WORKERS_S = 180.0
"""Seconds without any worker after which the driver warns: no batch system reports jobs that have ended in
its queue."""
OUTCOME_S = 5.0
"""Longest wait for one answer before the driver checks whether it was asked to end."""

Task: TypeAlias = tuple[Any, ...]
Outcome: TypeAlias = tuple[Task, Any, Exception | None]


def run_bounded(
    client: Client | None, function: Callable[..., Any], tasks: Iterable[Task]
) -> Iterator[Outcome]:
    """Run ``function(*task)`` for every task, keeping only a few in flight.

    Parameters
    ----------
    client : Client or None
        None runs in this process, one after the other, with one thread in the numerical libraries as on
        a worker: the same bytes.
    function : callable
        Of an installed module. It may be called again for the same task, also while the first call is
        still running on a worker that was taken for lost.
    tasks : iterable of tuple
        Taken as others finish.

    Yields
    ------
    task, result, error : tuple
        As they finish; ``error`` is the exception of a task that failed every time it was tried, or
        ``distributed.KilledWorker`` of one that took its workers with it, and the other tasks go on.

    Raises
    ------
    ClusterError
        When the scheduler is lost.
    pipeline.storage.locks.LockedError
        When another run has taken over a store that this process writes.
    pipeline.workers.sigterm.Stopped
        When the process was asked to end, once running tasks have finished or their time is over.
    """
    with sigterm.deferred():
        if client is None:
            yield from _run_in_process(function, tasks)
        else:
            flight = _Flight(client, function, iter(tasks))
            try:
                yield from flight.run()
            finally:
                flight.leave()


def reason_of(error: Exception) -> str:
    """Describe in one line why a task failed; recorded, so it names no worker and no address."""
    if isinstance(error, KilledWorker):
        return f"KilledWorker: {1 + error.allowed_failures} workers died while they computed it"
    return str(error) if isinstance(error, EndedError) else f"{type(error).__name__}: {error}"


def _run_in_process(function: Callable[..., Any], tasks: Iterable[Task]) -> Iterator[Outcome]:
    with single_threaded():
        for task in tasks:
            locks.check_all()
            if sigterm.requested():
                raise sigterm.Stopped
            result, error = None, None
            try:
                result = run_guarded(function, task)
            except Exception as raised:
                error = raised
            yield task, result, error
    if sigterm.requested():  # while the last one ran
        raise sigterm.Stopped


@dataclass(eq=False)
class _Attempt:
    """A task in flight."""

    task: Task
    start: float = 0.0
    reported: bool = False

    @property
    def label(self) -> str:
        """The ``label`` of the task's first argument that has one, and how many more have."""
        labels = [str(argument.label) for argument in self.task if hasattr(argument, "label")]
        return (labels or ["a task"])[0] + (f" and {len(labels) - 1} more" if len(labels) > 1 else "")


class _Flight:
    """The tasks of one call that are in flight.

    Tasks begin in the order of their submission, so the first of those in flight, as many as there are
    threads, are taken to be the ones that run.
    """

    def __init__(self, client: Client, function: Callable[..., Any], remaining: Iterator[Task]) -> None:
        self.client = client
        self.address = client.scheduler.address if client.scheduler is not None else "?"
        self.function = function
        self.remaining = remaining
        self.exhausted = False
        self.completed = as_completed([], loop=client.loop)
        self.waiting: dict[Future, _Attempt] = {}
        self.running: dict[Future, _Attempt] = {}
        self.seconds: deque[float] = deque(maxlen=1000)
        self.threads = 0
        self.count_time = -COUNT_THREADS_S
        self.had_workers = time.monotonic()
        self.warned = False
        self.has_lost_scheduler = False

    def run(self) -> Iterator[Outcome]:
        """Yield all outcomes, as they come."""
        pause, deadline = POLL_S[0], None
        while True:
            locks.check_all()
            self._count_threads()
            if deadline is None and sigterm.requested():
                self._cancel_waiting()
                deadline = time.monotonic() + sigterm.grace()
            if deadline is None:
                self._fill()
                self._report_hung()
            idle = not self.waiting and not self.running
            if idle or (deadline is not None and time.monotonic() > deadline):
                break
            if outcomes := self._outcomes():
                pause = POLL_S[0]
                yield from outcomes
            else:
                time.sleep(pause)
                pause = min(2 * pause, POLL_S[1])
        if deadline is not None or sigterm.requested():
            raise sigterm.Stopped

    def leave(self) -> None:
        """Cancel what is still in flight."""
        futures = [*self.waiting, *self.running]
        self.waiting.clear()
        self.running.clear()
        self.completed.clear()
        if futures and not self.has_lost_scheduler:
            self._ask(lambda: self.client.cancel(futures))

    # ---------------------------------------------------------------- submitting

    def _fill(self) -> None:
        """Submit as many tasks as fit the window, all in one message."""
        free = max(IN_FLIGHT, IN_FLIGHT_PER_THREAD * self.threads) - len(self.waiting) - len(self.running)
        if free <= 0 or self.exhausted:
            return
        attempts = [_Attempt(task) for task in itertools.islice(self.remaining, free)]
        self.exhausted = len(attempts) < free
        if attempts:
            futures = self._submit([pack(self.function, attempt.task) for attempt in attempts])
            self.waiting.update(zip(futures, attempts, strict=True))
            self.completed.update(futures)
        self._note_starts()

    def _submit(self, packed: list[bytes]) -> list[Future]:
        name = getattr(self.function, "__name__", "task")
        return self._ask(lambda: self.client.map(run_packed, packed, key=name, pure=False, retries=RETRIES))

    def _note_starts(self) -> None:
        time_s = time.monotonic()
        for future in list(itertools.islice(self.waiting, max(0, self.threads - len(self.running)))):
            self.running[future] = self.waiting.pop(future)
            self.running[future].start = time_s

    def _count_threads(self) -> None:
        """Adapt the window to workers that have joined or left; warn when there has long been none."""
        if time.monotonic() - self.count_time < COUNT_THREADS_S:
            return
        self.threads = sum(self._ask(self.client.nthreads).values())
        self.count_time = time.monotonic()
        if self.threads:
            self.had_workers = self.count_time
        elif not self.warned and self.count_time - self.had_workers > NO_WORKERS_S:
            self.warned = True
            logger.warning(
                "no worker for %.3g min: waiting for one. Jobs may be queued, or have ended before their "
                "worker joined, and those are not replaced: see squeue or qstat; if none is there, stop this "
                "command",
                (self.count_time - self.had_workers) / 60,
            )
        self._note_starts()

    def _report_hung(self) -> None:
        """Warn once of each task that has run far too long; nothing ends it, as it may be right."""
        median = statistics.median(self.seconds) if self.seconds else None
        limit = max(HUNG_SECONDS, HUNG_FACTOR * (HUNG_SECONDS if median is None else median))
        time_s = time.monotonic()
        late = [
            (future, attempt)
            for future, attempt in self.running.items()
            if not attempt.reported and time_s - attempt.start > limit
        ]
        if not late:
            return
        keys_by_worker = self._ask(self.client.processing)
        for future, attempt in late:
            workers = [address for address, keys in keys_by_worker.items() if future.key in keys]
            if workers:
                attempt.reported = True
                logger.warning(
                    "%s: has run for %.0f s on worker %s%s, and may hang; it is waited for. What is finished "
                    "is kept if you end this command (Ctrl-C or SIGTERM)",
                    attempt.label,
                    time_s - attempt.start,
                    " and on worker ".join(workers),
                    "" if median is None else f", where others take {median:.2g} s",
                )

    def _cancel_waiting(self) -> None:
        """Let nothing begin any more: only running tasks are waited for."""
        self.exhausted = True
        futures = list(self.waiting)
        self.waiting.clear()
        self._ask(lambda: self.client.cancel(futures))

    # ---------------------------------------------------------------- outcomes

    def _outcomes(self) -> list[Outcome]:
        """Collect the outcomes of tasks that have finished since the last call."""
        futures = [
            future
            for future in self.completed.next_batch(block=False)
            if future in self.running or future in self.waiting
        ]
        if not futures:
            return []
        if any(future.status == "cancelled" for future in futures):
            raise self._lost_scheduler()
        results = self._results([future for future in futures if future.status == "finished"])
        outcomes: list[Outcome] = []
        for future in futures:
            outcome = results[future] if future in results else self._ask(partial(_outcome, future))
            if outcome is None:  # its result was lost, and is computed again
                self.completed.add(future)
                continue
            if future in self.running:
                attempt = self.running.pop(future)
                self.seconds.append(time.monotonic() - attempt.start)
            else:
                attempt = self.waiting.pop(future)
            outcomes.append((attempt.task, *outcome))
        self._note_starts()
        return outcomes

    def _results(self, futures: list[Future]) -> dict[Future, tuple[Any, Exception | None]]:
        """Gather results of finished tasks in one message; nothing where one was lost."""
        if not futures:
            return {}
        results = self._ask(lambda: self.client.gather(futures, errors="skip"))
        if len(results) != len(futures):
            return {}
        return {future: (result, None) for future, result in zip(futures, results, strict=True)}

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Ask the scheduler; without an answer raise an error that says so."""
        try:
            return question()
        except (OSError, CancelledError) as error:
            raise self._lost_scheduler() from error

    def _lost_scheduler(self) -> ClusterError:
        self.has_lost_scheduler = True
        return ClusterError(
            f"lost the scheduler at {self.address}: it has ended, or the network is down. What is finished "
            "is kept: run the same command again to go on"
        )


def _outcome(future: Future) -> tuple[Any, Exception | None] | None:
    """Get the result or exception of a finished task; None while a lost result is computed again.

    Raises
    ------
    CancelledError
        When the scheduler was lost meanwhile.
    """
    try:
        error = future.exception(timeout=OUTCOME_S)
        if error is not None and future.status != "cancelled":
            return None, error
        return future.result(timeout=OUTCOME_S), None
    except TimeoutError:
        return None
