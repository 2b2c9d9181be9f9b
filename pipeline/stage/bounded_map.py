"""Many tasks on few workers: a bounded number in flight, whatever their number.

Tasks are taken from their iterator as others finish, so a run of 10⁵ begins at once and holds few of them.
At the end, when nothing waits any more, a task that runs far longer than the others gets a second copy on
another worker, and the first result counts: tasks may be run twice, at once or one after the other.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from distributed import Client, Future, KilledWorker, as_completed

from pipeline.workers import sigterm
from pipeline.workers.pickled_task import EndedError, pack, run_guarded, run_packed
from pipeline.workers.profiles import ClusterError
from pipeline.workers.worker_metrics import single_threaded

logger = logging.getLogger(__name__)

IN_FLIGHT_PER_THREAD = 4
"""Tasks submitted ahead per worker thread: enough to keep it busy, few enough to bound the scheduler."""
IN_FLIGHT = 32
"""In flight at least: messages to the scheduler then hold several tasks, which halves the cost of each."""
RETRIES = 2
"""How often a task that raises is tried again."""

STRAGGLER_FACTOR = 3.0
STRAGGLER_SECONDS = 5.0
"""A straggler has run for longer than either: this many times the median task, and this long."""
HUNG_FACTOR = 10.0
HUNG_SECONDS = 60.0
"""What has run for longer than either may hang, and is told of; without any median, ten times as long."""

LOOK_S = 0.005, 0.1
"""How soon the driver looks again when nothing has finished: soon after something has, later otherwise."""
COUNT_THREADS_S = 2.0
"""How often threads are counted: workers join and leave."""
NO_WORKERS_S = 180.0
"""Without any worker for so long the driver says so: nothing tells it of jobs that have ended in a queue."""
OUTCOME_S = 5.0
"""How long one answer is waited for before the driver looks whether it was asked to end."""

Task: TypeAlias = tuple[Any, ...]
Outcome: TypeAlias = tuple[Task, Any, Exception | None]


def run_bounded(
    client: Client | None,
    function: Callable[..., Any],
    tasks: Iterable[Task],
    *,
    tally: Counter[str] | None = None,
) -> Iterator[Outcome]:
    """Run ``function(*task)`` for every task, keeping only a few in flight.

    Parameters
    ----------
    client : Client or None
        None runs in this process, one after the other, with one thread in the numerical libraries as on
        a worker: the same bytes.
    function : callable
        Of an installed module. It may be called again for the same task, also while the first call is
        still running.
    tasks : iterable of tuple
        Taken as others finish.
    tally : Counter, optional
        Counts ``copies``, the second copies of stragglers.

    Yields
    ------
    task, result, error : tuple
        As they finish; ``error`` is the exception of a task that failed every time it was tried, or
        ``distributed.KilledWorker`` of one that took its workers with it, and the other tasks go on.

    Raises
    ------
    ClusterError
        When the scheduler is lost.
    pipeline.workers.sigterm.Stopped
        When the process was asked to end, once running tasks have finished or their time is over.
    """
    with sigterm.deferred():
        if client is None:
            yield from _run_here(function, tasks)
        else:
            flight = _Flight(client, function, iter(tasks), Counter() if tally is None else tally)
            try:
                yield from flight.run()
            finally:
                flight.leave()


def reason_of(error: Exception) -> str:
    """Why a task was given up, in one line that says nothing of where workers ran: it is recorded."""
    if isinstance(error, KilledWorker):
        return f"KilledWorker: {1 + error.allowed_failures} workers died while they computed it"
    return str(error) if isinstance(error, EndedError) else f"{type(error).__name__}: {error}"


def _run_here(function: Callable[..., Any], tasks: Iterable[Task]) -> Iterator[Outcome]:
    with single_threaded():
        for task in tasks:
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
    """A task in flight: its future, or two of them when a second copy was sent."""

    task: Task
    packed: bytes
    futures: list[Future] = field(default_factory=list)
    began: float = 0.0
    copied: bool = False
    told: bool = False

    @property
    def label(self) -> str:
        """What the task is of, where an argument has a ``label``; of several the first, and how many more."""
        parts = [part for argument in self.task for part in _parts(argument)]
        labels = [str(part.label) for part in parts if hasattr(part, "label")]
        return (labels or ["a task"])[0] + (f" and {len(labels) - 1} more" if len(labels) > 1 else "")


class _Flight:
    """The tasks of one call that are in flight.

    Tasks begin in the order of their submission, so the first of those in flight, as many as there are
    threads, are taken to be the ones that run.
    """

    def __init__(
        self, client: Client, function: Callable[..., Any], remaining: Iterator[Task], tally: Counter[str]
    ) -> None:
        self.client = client
        self.address = client.scheduler.address if client.scheduler is not None else "?"
        self.function = function
        self.remaining = remaining
        self.exhausted = False
        self.tally = tally
        self.completed = as_completed([], loop=client.loop)
        self.of_future: dict[Future, _Attempt] = {}
        self.waiting: dict[_Attempt, None] = {}
        self.running: dict[_Attempt, None] = {}
        self.seconds: deque[float] = deque(maxlen=1000)
        self.threads_of: dict[str, int] = {}
        self.counted = -COUNT_THREADS_S
        self.had_workers = time.monotonic()
        self.warned = False
        self.lost = False

    @property
    def threads(self) -> int:
        """Of all workers, as they were last counted."""
        return sum(self.threads_of.values())

    def run(self) -> Iterator[Outcome]:
        """All outcomes, as they come."""
        pause, deadline = LOOK_S[0], None
        while True:
            self._count_threads()
            if deadline is None and sigterm.requested():
                self._drop_waiting()
                deadline = time.monotonic() + sigterm.grace()
            if deadline is None:
                self._fill()
                self._copy_stragglers()
                self._tell_of_the_hung()
            if not self.of_future or (deadline is not None and time.monotonic() > deadline):
                break
            if outcomes := self._outcomes():
                pause = LOOK_S[0]
                yield from outcomes
            else:
                time.sleep(pause)
                pause = min(2 * pause, LOOK_S[1])
        if deadline is not None or sigterm.requested():
            raise sigterm.Stopped

    def leave(self) -> None:
        """Let go of what is still in flight."""
        futures, self.of_future = list(self.of_future), {}
        self.completed.clear()
        if futures and not self.lost:
            self._ask(lambda: self.client.cancel(futures))

    # ---------------------------------------------------------------- submitting

    def _fill(self) -> None:
        """Submit as many as fit the window, all in one message."""
        free = max(IN_FLIGHT, IN_FLIGHT_PER_THREAD * self.threads) - len(self.waiting) - len(self.running)
        if free <= 0 or self.exhausted:
            return
        attempts = [
            _Attempt(task, pack(self.function, task)) for task in itertools.islice(self.remaining, free)
        ]
        self.exhausted = len(attempts) < free
        if attempts:
            futures = self._submit([attempt.packed for attempt in attempts])
            for attempt, future in zip(attempts, futures, strict=True):
                self.waiting[attempt] = None
                self._follow(attempt, future)
        self._note_what_runs()

    def _follow(self, attempt: _Attempt, future: Future) -> None:
        attempt.futures.append(future)
        self.of_future[future] = attempt
        self.completed.add(future)

    def _note_what_runs(self) -> None:
        now = time.monotonic()
        for attempt in list(itertools.islice(self.waiting, max(0, self.threads - len(self.running)))):
            del self.waiting[attempt]
            self.running[attempt] = None
            attempt.began = now

    def _count_threads(self) -> None:
        """Workers come and go: the window follows them."""
        if time.monotonic() - self.counted < COUNT_THREADS_S:
            return
        self.threads_of = self._ask(self.client.nthreads)
        self.counted = time.monotonic()
        if self.threads_of:
            self.had_workers = self.counted
        elif not self.warned and self.counted - self.had_workers > NO_WORKERS_S:
            self.warned = True
            logger.warning(
                "no worker for %.3g min: waiting for one. Jobs may be queued, or have ended before their "
                "worker joined, and those are not replaced: see squeue or qstat; if none is there, stop this "
                "command",
                (self.counted - self.had_workers) / 60,
            )
        self._note_what_runs()

    def _copy_stragglers(self) -> None:
        """Once nothing waits, send a second copy of what runs far too long to a worker that is free."""
        if not self.exhausted or self.waiting or not self.running or not self.seconds:
            return
        limit = max(STRAGGLER_SECONDS, STRAGGLER_FACTOR * statistics.median(self.seconds))
        now = time.monotonic()
        # One copy each: where it fails at once, so would the next.
        late = [a for a in self.running if not a.copied and now - a.began > limit]
        if not late:
            return
        on = {address: list(keys) for address, keys in self._ask(self.client.processing).items()}
        for attempt in late:
            mine = [address for address, keys in on.items() if attempt.futures[0].key in keys]
            free = [a for a, keys in on.items() if len(keys) < self.threads_of.get(a, 0) and a not in mine]
            if mine and free:
                copy = self._submit([attempt.packed], workers=free[:1])[0]
                self._follow(attempt, copy)
                attempt.copied = True
                on[free[0]].append(copy.key)
                self.tally["copies"] += 1

    def _tell_of_the_hung(self) -> None:
        """Say of each task that has run far too long, once: nothing ends it, for it may be right."""
        median = statistics.median(self.seconds) if self.seconds else None
        limit = max(HUNG_SECONDS, HUNG_FACTOR * (HUNG_SECONDS if median is None else median))
        now = time.monotonic()
        late = [a for a in self.running if not a.told and now - a.began > limit]
        if not late:
            return
        on = self._ask(self.client.processing)
        for attempt in late:
            keys = {future.key for future in attempt.futures}
            if where := [address for address, theirs in on.items() if not keys.isdisjoint(theirs)]:
                attempt.told = True
                logger.warning(
                    "%s: has run for %.0f s on worker %s%s, and may hang; it is waited for. What is finished "
                    "is kept if you end this command (Ctrl-C or SIGTERM)",
                    attempt.label,
                    now - attempt.began,
                    " and on worker ".join(where),
                    "" if median is None else f", where others take {median:.2g} s",
                )

    def _submit(self, packed: list[bytes], **options: Any) -> list[Future]:
        name = getattr(self.function, "__name__", "task")
        return self._ask(
            lambda: self.client.map(run_packed, packed, key=name, pure=False, retries=RETRIES, **options)
        )

    def _drop_waiting(self) -> None:
        """Nothing begins any more: only what runs is waited for."""
        self.exhausted = True
        futures = [future for attempt in self.waiting for future in attempt.futures]
        for future in futures:
            del self.of_future[future]
        self.waiting.clear()
        self._ask(lambda: self.client.cancel(futures))

    # ---------------------------------------------------------------- outcomes

    def _outcomes(self) -> list[Outcome]:
        """Of the tasks that have finished since the last look."""
        done = [future for future in self.completed.next_batch(block=False) if future in self.of_future]
        if not done:
            return []
        if any(future.status == "cancelled" for future in done):
            raise self._lost_scheduler()
        results = self._results([future for future in done if future.status == "finished"])
        outcomes: list[Outcome] = []
        for future in done:
            attempt = self.of_future.get(future)
            if attempt is None:  # its other copy was in this batch, too
                continue
            outcome = results[future] if future in results else self._ask(partial(_outcome, future))
            if outcome is None:
                self.completed.add(future)
                continue
            del self.of_future[future]
            attempt.futures.remove(future)
            result, error = outcome
            if error is not None and attempt.futures:
                continue  # the other copy may do better
            for copy in attempt.futures:
                self.of_future.pop(copy, None)
            if attempt.futures:
                # Released, it writes nothing any more if it has not begun to.
                self._ask(partial(self.client.cancel, attempt.futures))
            if attempt in self.running:
                self.seconds.append(time.monotonic() - attempt.began)
            self.waiting.pop(attempt, None)
            self.running.pop(attempt, None)
            outcomes.append((attempt.task, result, error))
        self._note_what_runs()
        return outcomes

    def _results(self, futures: list[Future]) -> dict[Future, tuple[Any, Exception | None]]:
        """Results of finished tasks in one message; those whose results were lost are asked one by one."""
        if not futures:
            return {}
        results = self._ask(lambda: self.client.gather(futures, errors="skip"))
        if len(results) != len(futures):
            return {}
        return {future: (result, None) for future, result in zip(futures, results, strict=True)}

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Ask the scheduler; no answer is an error that says so."""
        try:
            return question()
        except (OSError, CancelledError) as error:
            raise self._lost_scheduler() from error

    def _lost_scheduler(self) -> ClusterError:
        self.lost = True
        return ClusterError(
            f"lost the scheduler at {self.address}: it has ended, or the network is down. What is finished "
            "is kept: run the same command again to go on"
        )


def _parts(argument: Any) -> Iterable[Any]:
    return argument if isinstance(argument, tuple | list) else (argument,)


def _outcome(future: Future) -> tuple[Any, Exception | None] | None:
    """Result or exception of a task that has finished; None while its lost result is computed again.

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
