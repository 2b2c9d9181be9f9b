"""Metrics that stay on their worker, and the process that they are in.

Metrics are loaded by :func:`get_metric`, inside the task, from this installed module, under a lock: a
cache in ``__main__`` would be pickled by value with every task, ``lru_cache`` lets two threads load the
same weights twice, and an actor is lost with its worker. A thin plugin only loads ahead; a worker that is
restarted simply loads again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from distributed import Client, NannyPlugin, Worker, WorkerPlugin
from distributed.worker import thread_state
from threadpoolctl import threadpool_limits

from lsim.metric import Metric, resolve_device
from lsim.preprocess import Compat
from lsim.registry import Precision, UnknownMetricError, load_metric
from lsim.weights import WeightsError
from pipeline.workers.profiles import ClusterError

Option: TypeAlias = bool | int | float | str | None
"""The value of a metric's option: one that YAML and a command line can write."""


@dataclass(frozen=True)
class MetricRequest:
    """All that a worker needs to load a metric as the driver meant it, as :func:`lsim.load_metric` takes it.

    ``name`` may be a reference, ``"module:Class"``. ``specification_hash`` is checked after loading: a worker
    whose weights, version or source differ must not mix its distances with the others'.
    """

    name: str
    weights: str | None
    size: int | None
    order: int
    compat: Compat
    mask: bool = False
    symmetrise: bool = False
    precision: Precision = "exact"
    options: tuple[tuple[str, Option], ...] = ()
    specification_hash: str = ""

    def load(self, device: str) -> Metric:
        """Load the metric, whatever its specification."""
        options: dict[str, Any] = dict(self.options)
        settings = (self.size, self.order, self.compat)
        return load_metric(
            self.name,
            self.weights,
            device,
            *settings,
            mask=self.mask,
            symmetrise=self.symmetrise,
            # Stored settings may ask for bfloat16 through the metric's own option.
            precision=options.pop("precision", self.precision),
            **options,
        )

    def of(self, metric: Metric) -> MetricRequest:
        """The request of this very metric, as it was loaded."""
        return replace(self, specification_hash=metric.specification_hash)


logger = logging.getLogger(__name__)

REGISTRATIONS, REGISTERED_AGAIN_AFTER_S = 5, 1.0
"""How often workers are given a plugin, and the pause in which the scheduler notices that one is gone."""

_lock = threading.Lock()
_metrics: dict[tuple[MetricRequest, str], Metric] = {}
_loads: Counter[str] = Counter()


def get_metric(request: MetricRequest, device: str | None = None) -> Metric:
    """This process's instance of a metric, loaded on first use.

    Parameters
    ----------
    request : MetricRequest
    device : str, optional
        Default: the one that this process was told to use.

    Raises
    ------
    ClusterError
        When this worker cannot import a metric of one's own, or has no such device.
    lsim.WeightsError
        When this worker's weights, or its version of the metric, are not the driver's.
    """
    with _lock:
        key = (request, device or _device)
        if key not in _metrics:
            try:
                _check_device(key[1])
                metric = request.load(key[1])
            except UnknownMetricError as error:
                if ":" not in request.name:
                    raise
                module = request.name.partition(":")[0]
                raise ClusterError(
                    f"{_this_worker()} cannot load metric {request.name!r} ({error}): the module {module!r} "
                    "must be installed there, or lie in a folder of its PYTHONPATH"
                ) from error
            _loads[metric.name] += 1
            found = metric.specification_hash
            if found != request.specification_hash:
                raise WeightsError(
                    f"{_this_worker()} has another version, other weights or another source file of metric "
                    f"{metric.name!r}: specification {found}, expected {request.specification_hash}"
                )
            _metrics[key] = metric
        return _metrics[key]


def _this_worker() -> str:
    return f"worker {platform.node()} (process {os.getpid()})"


def load_counts() -> dict[str, int]:
    """How many times this process has loaded each metric."""
    return dict(_loads)


def prewarm(client: Client, requests: list[MetricRequest]) -> None:
    """Have every worker, also those that join later, load metrics ahead of their first task, or leave."""
    register_plugin(client, MetricLoader(requests))


def register_plugin(client: Client, plugin: WorkerPlugin | NannyPlugin) -> None:
    """Give a plugin to all workers; once more, where one is lost meanwhile: what replaces it gets it, too.

    Raises
    ------
    ClusterError
        Where workers are lost again and again.
    """
    for attempt in range(REGISTRATIONS):
        try:
            client.register_plugin(plugin)
        except OSError as error:  # of a connection: what a plugin raises has another kind
            if attempt == REGISTRATIONS - 1:
                raise ClusterError(
                    f"workers were lost while they started, {REGISTRATIONS} times ({error}): memory may be "
                    "short, or something ends these processes"
                ) from error
            time.sleep(REGISTERED_AGAIN_AFTER_S)
        else:
            return


def dismiss_unfit_workers(client: Client, requests: Sequence[MetricRequest]) -> None:
    """Have every worker of now load the metrics, and send away those that cannot: others do their work.

    They are named in a warning. A worker that stayed would fail at once whatever it is given, and so be
    given more than the others.

    Raises
    ------
    ClusterError
        Naming a worker and what to do, where none can.
    """
    outcomes = client.run(load_metrics, list(requests), on_error="return")
    # Of what metrics raise there is no OSError left; one that is here is of the connection, and passes.
    unfit = {
        address: error
        for address, error in outcomes.items()
        if isinstance(error, Exception) and not isinstance(error, OSError)
    }
    if unfit and len(unfit) == len(outcomes):
        error = next(iter(unfit.values()))
        raise ClusterError(str(error)) from error
    for error in unfit.values():
        logger.warning("left out: %s", error)
    if unfit:
        client.retire_workers(list(unfit), close_workers=True)


async def load_metrics(requests: Sequence[MetricRequest]) -> None:
    """:func:`get_metric` for :meth:`distributed.Client.run`: the metrics themselves don't travel."""
    for request in requests:
        try:
            await asyncio.to_thread(get_metric, request)
        except (ClusterError, WeightsError):
            raise
        except Exception as error:  # of a metric of one's own, that may raise anything
            raise ClusterError(
                f"{_this_worker()} cannot load metric {request.name!r}: {type(error).__name__}: {error}"
            ) from error


class MetricLoader(WorkerPlugin):
    """Loads metrics in a thread: a blocking setup would stop the worker's heartbeat.

    A worker that cannot leaves, for the reason that :func:`dismiss_unfit_workers` gives; whoever joins after
    the start is met by nobody else.
    """

    name = "lsim-metrics"

    def __init__(self, requests: list[MetricRequest]) -> None:
        self.requests = requests

    async def setup(self, worker: Worker) -> None:
        try:
            await load_metrics(self.requests)
        except (ClusterError, WeightsError) as error:
            logger.error("left out: %s", error)
            # Not awaited: a worker that joins has not begun yet to hear the scheduler, nor can it leave.
            self.leaving = asyncio.create_task(self._leave(worker))

    async def _leave(self, worker: Worker) -> None:
        await worker.start()  # returns once it has started
        await worker.close_gracefully(restart=False, reason="cannot load a metric")


# ---------------------------------------------------------------- the process


_device: str = "auto"


def set_up_process(device: str, worker_name: object) -> None:
    """Choose this process's device and limit its numerical libraries to one thread."""
    torch.set_num_threads(1)
    threadpool_limits(limits=1)
    # Local workers are numbered; others have names, that spread them well enough.
    choose_device(
        device, worker_name if isinstance(worker_name, int) else zlib.crc32(str(worker_name).encode())
    )


def choose_device(device: str, number: int) -> str:
    """Choose the device that this process loads metrics on, and return the one before.

    ``"auto"`` takes turns where there are several GPUs.
    """
    if device == "auto" and torch.cuda.is_available() and torch.cuda.device_count() > 1:
        device = f"cuda:{number % torch.cuda.device_count()}"
    return set_device(device)


def set_device(device: str) -> str:
    """Set the device that this process loads metrics on, and return the one before."""
    global _device
    before, _device = _device, device
    return before


def _check_device(device: str) -> None:
    wanted, count = resolve_device(device), torch.cuda.device_count()
    if wanted.type == "cuda" and (wanted.index or 0) >= count:
        raise ClusterError(
            f"device: expected one that {_this_worker()} has, found {device!r} and {count} GPUs"
        )


def this_device() -> torch.device:
    """The device that this process loads metrics on."""
    return resolve_device(_device)


def still_wanted() -> bool:
    """Whether anybody waits for the task that runs in this thread; always so outside of a Dask worker.

    Dask cannot stop a thread: a task goes on when its run is over, or when another copy of it was faster.
    """
    worker = getattr(thread_state, "execution_state", {}).get("worker")
    if worker is None:
        return True
    state = worker.state.tasks.get(thread_state.key)
    return state is not None and state.state not in ("cancelled", "resumed", "released", "forgotten")


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """One thread in torch and BLAS: sums then add in one order, whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(threads)
