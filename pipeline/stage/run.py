"""Run the blocks of a stage: one loop for failures, full disks, progress and cancellation."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeAlias, TypeVar

from distributed import Client

from pipeline.stage.bounded_map import reason_of, run_bounded
from pipeline.storage import store
from pipeline.workers.cluster import Cluster
from pipeline.workers.worker_metrics import MetricRequest, dismiss_unfit_workers, prewarm

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the number of blocks that are done, and the number of all."""

Block = TypeVar("Block")
Result = TypeVar("Result")


class MetricWorkers:
    """The workers of a run, started when the first block is to be computed.

    Attributes
    ----------
    description : dict
        What results record of the cluster; empty before workers have started.
    threads : int
        Of all workers, as they start.
    """

    def __init__(self, cluster: Cluster, requests: Iterable[MetricRequest]) -> None:
        self.cluster = cluster
        self.requests = list(requests)
        self.description: dict[str, Any] = {}
        self.threads = 1

    def start(self) -> Client | None:
        """Start the workers and load the metrics on each; workers that cannot are named and sent away.

        Returns
        -------
        Client or None
            None where blocks are computed in this process.
        """
        client = self.cluster.client
        if not self.description:
            if client is not None:
                dismiss_unfit_workers(client, self.requests)
                prewarm(client, self.requests)
                self.threads = max(1, sum(client.nthreads().values()))
            self.description = self.cluster.describe()
        return client


def run_blocks(
    client: Client | None,
    function: Callable[..., Result],
    batches: Iterable[tuple[Block, ...]],
    count: int,
    progress: Progress | None = None,
) -> contextlib.closing[Generator[tuple[tuple[Block, ...], Result | None, str], None, None]]:
    """Make a context of an iterator that computes blocks; leaving it early cancels the others.

    Parameters
    ----------
    client : Client or None
        None computes in this process.
    function : callable
        ``function(*batch)`` computes the blocks of a batch and writes them.
    batches : iterable of tuple
        Blocks that are computed by one task; taken as others finish. The blocks of a batch that fails are run
        again one by one, as one of them is to blame.
    count : int
        Number of blocks in all batches.
    progress : callable, optional

    Returns
    -------
    context of an iterator of (batch, result, reason)
        ``result`` is None where the block failed every time, and ``reason`` says why. The block's task is
        over then, and nobody else writes what belongs to it.

    Raises
    ------
    OSError
        When a disk is full: it would be so for all other blocks.
    ClusterError
        When the scheduler is lost.
    pipeline.workers.sigterm.Stopped
        When the process was asked to end.
    """
    return contextlib.closing(_outcomes(client, function, batches, count, progress))


def _outcomes(
    client: Client | None,
    function: Callable[..., Result],
    batches: Iterable[tuple[Block, ...]],
    count: int,
    progress: Progress | None,
) -> Generator[tuple[tuple[Block, ...], Result | None, str], None, None]:
    """Yield the outcomes of :func:`run_blocks`."""
    if progress is not None and count:
        progress(0, count)
    finished, failures = 0, list[tuple[Block, ...]]()

    def run_singly() -> Iterator[Any]:
        if failures:
            yield from run_bounded(client, function, ((block,) for batch in failures for block in batch))

    for batch, result, error in itertools.chain(run_bounded(client, function, batches), run_singly()):
        if error is not None and store.is_full_disk(error):
            raise error
        if error is not None and len(batch) > 1:
            failures.append(batch)
            continue
        yield batch, result, "" if error is None else reason_of(error)
        finished += len(batch)
        if progress is not None:
            progress(finished, count)
