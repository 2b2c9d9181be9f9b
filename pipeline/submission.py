"""Many tasks on few workers: a bounded number in flight, whatever their number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distributed import Client, as_completed

from pipeline.resident import single_threaded

IN_FLIGHT_PER_THREAD = 4
"""Tasks submitted ahead per worker thread: enough to keep it busy, few enough to bound the scheduler."""
RETRIES = 2


def run_bounded(
    client: Client | None, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]
) -> Iterator[tuple[tuple[Any, ...], Any, Exception | None]]:
    """Run ``function(*task)`` for every task, keeping only a few in flight.

    Parameters
    ----------
    client : Client or None
        None runs in this process, one after the other, with one thread in the numerical libraries as on
        a worker: the same bytes.
    function : callable
        Of an installed module.
    tasks : iterable of tuple

    Yields
    ------
    task, result, error : tuple
        As they finish; ``error`` is the exception of a task that failed every time it was tried, and
        the other tasks go on.
    """
    if client is None:
        with single_threaded():
            for task in tasks:
                yield task, *_outcome(function, task)
        return

    remaining = iter(tasks)
    of_future: dict[Any, tuple[Any, ...]] = {}

    def submit(count: int) -> list[Any]:
        futures = []
        for task in remaining:
            future = client.submit(function, *task, pure=False, retries=RETRIES)
            of_future[future] = task
            futures.append(future)
            if len(futures) == count:
                break
        return futures

    # Threads may join later (a restarted worker, an adaptive cluster); the window is for now's.
    window = IN_FLIGHT_PER_THREAD * max(1, sum(client.nthreads().values()))
    try:
        completed = as_completed(submit(window))
        for future in completed:
            task = of_future.pop(future)
            error = future.exception()
            result = None if error is not None else future.result()
            future.release()
            for following in submit(1):
                completed.add(following)
            yield task, result, error
    finally:
        client.cancel(list(of_future))


def _outcome(function: Callable[..., Any], task: tuple[Any, ...]) -> tuple[Any, Exception | None]:
    """Result or exception of a task in this process, as a future would hold it."""
    try:
        return function(*task), None
    except Exception as error:
        return None, error
