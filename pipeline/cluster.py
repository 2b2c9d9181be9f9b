"""A Dask client from a profile, bounded task submission, and metrics that stay on their worker.

Metrics are loaded by :func:`get_metric`, inside the task, from this installed module, under a lock: a
cache in ``__main__`` would be pickled by value with every task, ``lru_cache`` lets two threads load the
same weights twice, and an actor is lost with its worker. A thin plugin only picks the worker's device and
loads ahead; a worker that is restarted simply loads again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import signal
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import dask
import pydantic
import torch
import yaml
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster, Worker, WorkerPlugin, as_completed
from threadpoolctl import threadpool_limits

from lsim.metric import Metric
from lsim.preprocess import Compat
from lsim.registry import UnknownMetricError, load_metric
from lsim.weights import WeightsError
from pipeline.resources import ResourceError, find_resource

IN_FLIGHT_PER_THREAD = 4
"""Tasks submitted ahead per worker thread: enough to keep it busy, few enough to bound the scheduler."""
RETRIES = 2
WAIT_FOR_WORKERS_S = 60
"""How long to wait for a running scheduler's first worker."""
ALLOWED_FAILURES = 3
"""How many workers may die with a task before the task is given up."""


class ClusterError(RuntimeError):
    """A profile that cannot be read, or a cluster that cannot be reached."""


class Profile(pydantic.BaseModel):
    """How to get workers. Unknown keys are errors.

    Attributes
    ----------
    kind : {"local", "none", "address"}
        Worker processes on this machine; the calling process alone; a scheduler that runs already.
    workers : int, optional
        Worker processes of ``local``; default one per core.
    threads : int
        Threads per worker. More than one share the worker's metrics.
    memory_limit : str
        Per worker, as Dask takes it.
    device : str
        ``"auto"``: the worker's GPU when it has one, workers taking turns where there are several.
    address : str, optional
        Of the scheduler, ``tls://…`` or ``tcp://…``.
    host : str
        Where a local scheduler and its workers listen; loopback unless told otherwise.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    kind: Literal["local", "none", "address"] = "local"
    workers: int | None = pydantic.Field(default=None, ge=1)
    threads: int = pydantic.Field(default=1, ge=1)
    memory_limit: str = "auto"
    device: str = "auto"
    address: str | None = None
    host: str = "127.0.0.1"

    @pydantic.model_validator(mode="after")
    def _address_where_needed(self) -> Profile:
        if (self.kind == "address") != (self.address is not None):
            raise ValueError("kind 'address' and the key 'address' need each other")
        return self


def load_profile(name: str, workers: int | None = None) -> Profile:
    """A profile by name (``local``, ``none``), path of a YAML file, or address of a scheduler.

    Raises
    ------
    ClusterError
        When there is no such profile or it holds unknown keys or wrong values.
    """
    if name.startswith(("tcp://", "tls://")):
        profile = Profile(kind="address", address=name)
    else:
        profile = _read_profile(name)
    if workers is None:
        return profile
    if profile.kind != "local":
        raise ClusterError(f"--workers is for clusters of kind local; {name!r} is of kind {profile.kind}")
    if workers < 1:
        raise ClusterError(f"expected at least one worker, got {workers}")
    return profile.model_copy(update={"workers": workers})


def _read_profile(name: str) -> Profile:
    try:
        content = yaml.safe_load(find_resource("workflows/clusters", name).read_text()) or {}
        return Profile(**content)
    except (ResourceError, TypeError, yaml.YAMLError, pydantic.ValidationError) as error:
        raise ClusterError(f"cluster profile {name!r}: {error}") from error


class Cluster:
    """Workers that start when they are first needed: a run with nothing to do starts none.

    A context manager; :attr:`client` starts them, and is None for the profile ``none``.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._stack = contextlib.ExitStack()
        self._client: Client | None = None
        if profile.kind == "none":
            choose_device(profile.device, 0)

    @property
    def client(self) -> Client | None:
        """The Dask client, started on first use; None where tasks run in this process."""
        if self.profile.kind != "none" and self._client is None:
            self._client = self._stack.enter_context(_connect(self.profile))
        return self._client

    @property
    def dashboard(self) -> str | None:
        """Address of the dashboard; None before workers have started."""
        return self._client.dashboard_link if self._client is not None else None

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._client = None

    def describe(self) -> dict[str, Any]:
        """What results record of the cluster."""
        description: dict[str, Any] = {"profile": self.profile.kind, "threads": self.profile.threads}
        if self._client is not None:
            description["workers"] = len(self._client.scheduler_info(n_workers=-1)["workers"])
        return description


@contextlib.contextmanager
def _connect(profile: Profile) -> Iterator[Client]:
    with dask.config.set({"distributed.scheduler.allowed-failures": ALLOWED_FAILURES}):
        if profile.kind == "address":
            try:
                client = Client(profile.address, timeout="15s")
            except OSError as error:
                raise ClusterError(f"no scheduler answers at {profile.address}: {error}") from error
            with client:
                try:
                    client.wait_for_workers(1, timeout=WAIT_FOR_WORKERS_S)
                except TimeoutError as error:
                    raise ClusterError(
                        f"the scheduler at {profile.address} has no workers, {WAIT_FOR_WORKERS_S} s long"
                    ) from error
                client.register_plugin(WorkerSetup(profile.device, owned=False))
                yield client
            return
        with (
            LocalCluster(
                n_workers=profile.workers or CPU_COUNT,
                threads_per_worker=profile.threads,
                memory_limit=profile.memory_limit,
                host=profile.host,
                dashboard_address=f"{profile.host}:0",
                silence_logs=40,
            ) as cluster,
            Client(cluster) as client,
        ):
            client.register_plugin(WorkerSetup(profile.device, owned=True))
            yield client


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


# ---------------------------------------------------------------- metrics, once per worker process


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
    options: tuple[tuple[str, Option], ...] = ()
    specification_hash: str = ""

    def load(self, device: str) -> Metric:
        """Load the metric, whatever its specification."""
        options: dict[str, Any] = dict(self.options)
        settings = (self.size, self.order, self.compat)
        return load_metric(
            self.name, self.weights, device, *settings, mask=self.mask, symmetrise=self.symmetrise, **options
        )

    def of(self, metric: Metric) -> MetricRequest:
        """The request of this very metric, as it was loaded."""
        return replace(self, specification_hash=metric.specification_hash)


_lock = threading.Lock()
_metrics: dict[tuple[MetricRequest, str], Metric] = {}
_loads: Counter[str] = Counter()
_device: str = "auto"


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
        When this worker cannot import a metric of one's own.
    lsim.WeightsError
        When this worker's weights, or its version of the metric, are not the driver's.
    """
    with _lock:
        key = (request, device or _device)
        if key not in _metrics:
            try:
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
    """Have every worker, also those that join later, load metrics ahead of their first task."""
    client.register_plugin(MetricLoader(requests))


def check_own_metrics(client: Client, requests: Sequence[MetricRequest]) -> None:
    """Have every worker of now load the metrics that are given by reference.

    Raises
    ------
    ClusterError
        Naming a worker that cannot, and what to do: rather than once for every block.
    """
    for request in requests:
        if ":" in request.name:
            client.run(get_metric_here, request)


def get_metric_here(request: MetricRequest) -> None:
    """:func:`get_metric` for :meth:`distributed.Client.run`: the metric itself doesn't travel."""
    get_metric(request)


class WorkerSetup(WorkerPlugin):
    """One thread in the numerical libraries, and a device.

    Workers that are ``owned`` leave Ctrl-C to the driver: the terminal sends it to them as well, and the
    driver is the one to stop them.
    """

    name = "lsim-worker-setup"

    def __init__(self, device: str, owned: bool) -> None:
        self.device = device
        self.owned = owned

    def setup(self, worker: Worker) -> None:
        set_up_process(self.device, worker.name)
        if self.owned and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)


class MetricLoader(WorkerPlugin):
    """Loads metrics in a thread: a blocking setup would stop the worker's heartbeat."""

    name = "lsim-metrics"

    def __init__(self, requests: list[MetricRequest]) -> None:
        self.requests = requests

    async def setup(self, worker: Worker) -> None:
        for request in self.requests:
            # A worker whose setup fails joins all the same; the task that loads again raises.
            with contextlib.suppress(WeightsError, UnknownMetricError, ClusterError):
                await asyncio.to_thread(get_metric, request)


def set_up_process(device: str, worker_name: object) -> None:
    """Choose this process's device and limit its numerical libraries to one thread."""
    torch.set_num_threads(1)
    threadpool_limits(limits=1)
    # Local workers are numbered; others have names, that spread them well enough.
    choose_device(
        device, worker_name if isinstance(worker_name, int) else zlib.crc32(str(worker_name).encode())
    )


def choose_device(device: str, number: int) -> None:
    """The device that this process loads metrics on; ``"auto"`` takes turns where there are several GPUs."""
    global _device
    if device == "auto" and torch.cuda.is_available() and torch.cuda.device_count() > 1:
        device = f"cuda:{number % torch.cuda.device_count()}"
    _device = device
