"""A Dask client from a profile: workers that start when they are first needed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import dask
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster, Worker, WorkerPlugin

from pipeline.profiles import ClusterError, Profile
from pipeline.resident import choose_device, set_up_process

WAIT_FOR_WORKERS_S = 60
"""How long to wait for a running scheduler's first worker."""
ALLOWED_FAILURES = 3
"""How many workers may die with a task before the task is given up."""


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
