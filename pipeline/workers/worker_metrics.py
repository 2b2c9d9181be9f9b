"""Metrics held by a worker, and settings of the worker's process.

Tasks load a metric with :func:`get_metric`, which caches it in this installed module, under a lock. The
alternatives fail: a cache in ``__main__`` would be pickled by value with every task, ``lru_cache`` lets two
threads load the same weights twice, and an actor is lost with its worker. A small plugin only loads metrics
ahead of time; a restarted worker loads them again.
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
"""Value of a metric's option, as YAML and a command line can write it."""


@dataclass(frozen=True)
class MetricRequest:
    """Arguments of :func:`lsim.load_metric` with which a worker loads the same metric as the driver.

    Attributes
    ----------
    name : str
        May be a reference, ``"module:Class"``.
    weights : str or None
    size : int or None
    order : int
    compat : str
    mask, symmetrise : bool
    precision : str
    options : tuple of (str, Option)
    specification_hash : str
        Checked after loading: a worker with other weights, another version or another source must not mix its
        distances with the others'.
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
        """Load the metric, without a check of its specification."""
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

    def for_metric(self, metric: Metric) -> MetricRequest:
        """Require the specification of a metric that was loaded from this request."""
        return replace(self, specification_hash=metric.specification_hash)


logger = logging.getLogger(__name__)

REGISTRATIONS, REGISTERED_AGAIN_AFTER_S = 5, 1.0
"""Attempts to register a plugin, and the pause in which the scheduler notices that a worker is gone."""

_lock = threading.Lock()
_metrics: dict[tuple[MetricRequest, str], Metric] = {}
_loads: Counter[str] = Counter()


def get_metric(request: MetricRequest, device: str | None = None) -> Metric:
    """Get the process's instance of a metric, and load it on first use.

    Parameters
    ----------
    request : MetricRequest
    device : str, optional
        Default: the device of this process, see :func:`choose_device`.

    Raises
    ------
    ClusterError
        When this worker cannot import a custom metric, or has no such device.
    lsim.WeightsError
        When this worker's weights, or its version of the metric, differ from the driver's.
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
                    f"{_worker_name()} cannot load metric {request.name!r} ({error}): the module {module!r} "
                    "must be installed there, or lie in a folder of its PYTHONPATH"
                ) from error
            _loads[metric.name] += 1
            if metric.specification_hash != request.specification_hash:
                raise WeightsError(
                    f"{_worker_name()} has another version, other weights or another source file of metric "
                    f"{metric.name!r}: expected specification {request.specification_hash}, found "
                    f"{metric.specification_hash}"
                )
            _metrics[key] = metric
        return _metrics[key]


def _worker_name() -> str:
    return f"worker {platform.node()} (process {os.getpid()})"


def load_counts() -> dict[str, int]:
    """Count how many times this process has loaded each metric."""
    return dict(_loads)


def prewarm(client: Client, requests: list[MetricRequest]) -> None:
    """Make all workers, including later ones, load metrics ahead of their first task, or leave."""
    register_plugin(client, MetricLoader(requests))


def register_plugin(client: Client, plugin: WorkerPlugin | NannyPlugin) -> None:
    """Register a plugin on all workers; retry if a worker is lost meanwhile, for the one that replaces it.

    Raises
    ------
    ClusterError
        When workers are lost in every attempt.
    """
    for attempt in range(REGISTRATIONS):
        try:
            client.register_plugin(plugin)
        except OSError as error:  # a lost connection: plugins raise other errors
            if attempt == REGISTRATIONS - 1:
                raise ClusterError(
                    f"workers were lost while they started, {REGISTRATIONS} times ({error}): memory may be "
                    "short, or something kills these processes"
                ) from error
            time.sleep(REGISTERED_AGAIN_AFTER_S)
        else:
            return


def dismiss_unfit_workers(client: Client, requests: Sequence[MetricRequest]) -> None:
    """Load the metrics on all current workers, and retire those that cannot, with a warning.

    A worker without the metrics would fail each task at once, and so attract more tasks than the others.

    Raises
    ------
    ClusterError
        When no worker can load them; names a worker and the remedy.
    """
    outcomes = client.run(load_metrics, list(requests), on_error="return")
    # load_metrics raises no OSError; one that arrives is a lost connection, which is no fault of the worker.
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
    """Load metrics on a worker and return nothing, so that :meth:`distributed.Client.run` sends none back."""
    for request in requests:
        try:
            await asyncio.to_thread(get_metric, request)
        except (ClusterError, WeightsError):
            raise
        except Exception as error:  # a custom metric may raise any error
            raise ClusterError(
                f"{_worker_name()} cannot load metric {request.name!r}: {type(error).__name__}: {error}"
            ) from error


class MetricLoader(WorkerPlugin):
    """Plugin that loads metrics in a thread: a blocking setup would stop the worker's heartbeat.

    A worker that cannot load them leaves, for the reason in :func:`dismiss_unfit_workers`, which only sees
    the workers of the start.
    """

    name = "lsim-metrics"

    def __init__(self, requests: list[MetricRequest]) -> None:
        self.requests = requests

    async def setup(self, worker: Worker) -> None:
        """Load the metrics, or make the worker leave."""
        try:
            await load_metrics(self.requests)
        except (ClusterError, WeightsError) as error:
            logger.error("left out: %s", error)
            # Not awaited: a worker that is joining doesn't listen to the scheduler yet, and cannot leave.
            self.leaving = asyncio.create_task(self._leave(worker))

    async def _leave(self, worker: Worker) -> None:
        await worker.start()  # waits until it has started
        await worker.close_gracefully(restart=False, reason="cannot load a metric")


# ---------------------------------------------------------------- the process


_device: str = "auto"


def set_up_process(device: str, worker_name: object) -> None:
    """Choose this process's device and limit its numerical libraries to one thread."""
    torch.set_num_threads(1)
    threadpool_limits(limits=1)
    # Local workers are numbered; a hash of the name spreads the others over GPUs well enough.
    choose_device(
        device, worker_name if isinstance(worker_name, int) else zlib.crc32(str(worker_name).encode())
    )


def choose_device(device: str, number: int) -> str:
    """Choose the device on which this process loads metrics, and return the previous one.

    With ``"auto"`` and several GPUs, worker ``number`` gets GPU ``number`` modulo their count.
    """
    if device == "auto" and torch.cuda.is_available() and torch.cuda.device_count() > 1:
        device = f"cuda:{number % torch.cuda.device_count()}"
    return set_device(device)


def set_device(device: str) -> str:
    """Set the device on which this process loads metrics, and return the previous one."""
    global _device
    original, _device = _device, device
    return original


def _check_device(device: str) -> None:
    resolved, count = resolve_device(device), torch.cuda.device_count()
    if resolved.type == "cuda" and (resolved.index or 0) >= count:
        raise ClusterError(
            f"device: expected one that {_worker_name()} has, found {device!r} and {count} GPUs"
        )


def process_device() -> torch.device:
    """Return the device on which this process loads metrics."""
    return resolve_device(_device)


def still_wanted() -> bool:
    """Tell whether the result of this thread's task is still needed; always true outside of a Dask worker.

    Dask cannot stop a thread: a task continues after its run has ended, or after another copy has finished.
    """
    worker = getattr(thread_state, "execution_state", {}).get("worker")
    if worker is None:
        return True
    state = worker.state.tasks.get(thread_state.key)
    return state is not None and state.state not in ("cancelled", "resumed", "released", "forgotten")


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Limit torch and BLAS to one thread, so that sums are added in the same order on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(threads)
