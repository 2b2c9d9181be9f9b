"""A Dask client from a profile: workers that start when they are first needed."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import dask
from distributed import Client, Security, Worker, WorkerPlugin
from distributed.utils import silence_logging_cmgr

from pipeline.workers.cluster_kinds import FAULT_TOLERANCE as FAULT_TOLERANCE
from pipeline.workers.cluster_kinds import (
    LOOPBACK,
    ON_THIS_MACHINE,
    check_options,
    dask_settings,
    keeps_logs,
)
from pipeline.workers.profiles import BATCH, ClusterError, Profile
from pipeline.workers.sigterm import allow_grace
from pipeline.workers.starting import running_cluster
from pipeline.workers.tls import credentials, wants_tls, warn_if_open
from pipeline.workers.worker_exit import ForwardSigterm, exit_on_sigterm
from pipeline.workers.worker_metrics import choose_device, register_plugin, set_device, set_up_process


class Cluster:
    """Workers that start when they are first needed: a run with nothing to do starts none.

    A context manager; :attr:`client` starts them, and is None for the profile ``none``.

    Raises
    ------
    ClusterError
        For options that the library doesn't have, and for a missing package; and, from :attr:`client`, when
        workers cannot be started. The error names the profile's file.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._stack = contextlib.ExitStack()
        self._client: Client | None = None
        with profile.named_in_errors():
            check_options(profile)
        self._stack.callback(allow_grace, allow_grace(profile.grace))
        if profile.kind == "none":
            self._stack.callback(set_device, choose_device(profile.device, 0))

    @property
    def client(self) -> Client | None:
        """The Dask client, started on first use; None where tasks run in this process."""
        if self.profile.kind != "none" and self._client is None:
            warn_if_open(self.profile)
            with self.profile.named_in_errors():
                self._client = self._stack.enter_context(_connect(self.profile))
        return self._client

    @property
    def dashboard(self) -> str | None:
        """Address of the dashboard; None before workers have started."""
        if self._client is None:
            return None
        if self.profile.kind in BATCH:
            # It listens on loopback, unlike the scheduler.
            port = self._client.scheduler_info(n_workers=0)["services"]["dashboard"]
            return f"http://{LOOPBACK}:{port}/status"
        return self._client.dashboard_link

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._client = None

    def describe(self) -> dict[str, Any]:
        """Describe the cluster for the provenance of results."""
        description: dict[str, Any] = {"profile": self.profile.kind, "threads": self.profile.threads}
        if self.profile.kind != "none":
            description["tls"] = wants_tls(self.profile)
        if self._client is not None:
            description["workers"] = len(self._client.scheduler_info(n_workers=-1)["workers"])
        return description


@contextlib.contextmanager
def _connect(profile: Profile) -> Iterator[Client]:
    with (
        _environment_as_before(),
        dask.config.set(dask_settings(profile)),
        _silence_client(),
        credentials(profile) as security,
    ):
        if profile.address is not None:
            with _connect_to(profile.address, security) as client:
                _set_up(client, profile)
                yield client
            return
        with running_cluster(profile, security, lambda client: _set_up(client, profile)) as client:
            yield client


@contextlib.contextmanager
def _environment_as_before() -> Iterator[None]:
    """Restore environment variables that Dask changes for its workers, such as ``OMP_NUM_THREADS``."""
    original = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - original.keys():
            del os.environ[name]
        os.environ.update(original)


def _silence_client() -> contextlib.AbstractContextManager[None]:
    """Silence what a client logs about a lost scheduler: our error reports it."""
    if keeps_logs():
        return contextlib.nullcontext()
    return silence_logging_cmgr(logging.CRITICAL, "distributed.client")


def _connect_to(address: str, security: Security | None) -> Client:
    """Connect to a scheduler that is already running."""
    try:
        return Client(address, security=security, timeout="15s")
    except OSError as error:
        hint = "" if security is None else " to these certificates"
        raise ClusterError(f"no scheduler answers{hint} at {address}: {error}") from error


def _set_up(client: Client, profile: Profile) -> None:
    """Register the plugins that all workers need, and wait for the first worker."""
    owned = profile.kind in ON_THIS_MACHINE
    register_plugin(client, WorkerSetup(profile.device, owned, profile.grace))
    if not owned:
        register_plugin(client, ForwardSigterm(profile.grace))
    try:
        client.wait_for_workers(1, timeout=profile.wait_s)
    except TimeoutError as error:
        label = f"the scheduler at {profile.address}" if profile.address else f"the cluster {profile.kind!r}"
        raise ClusterError(
            f"{label} has had no workers for {profile.wait_s:g} s, the start_timeout of the profile"
        ) from error


class WorkerSetup(WorkerPlugin):
    """Plugin that sets up a worker: one thread in numerical libraries, a device, an orderly exit on SIGTERM.

    Workers that are ``owned`` by the driver ignore Ctrl-C: the terminal sends it to them as well, but it is
    the driver that stops them.
    """

    name = "lsim-worker-setup"

    def __init__(self, device: str, owned: bool, grace: float) -> None:
        self.device = device
        self.owned = owned
        self.grace = grace

    def setup(self, worker: Worker) -> None:
        """Set up the worker's process."""
        set_up_process(self.device, worker.name)
        exit_on_sigterm(worker, self.grace)
        if self.owned and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
