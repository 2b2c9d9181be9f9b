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
from pipeline.workers.cluster_kinds import LOOPBACK, OF_THIS_MACHINE, check_options, keeps_logs, settings
from pipeline.workers.departure import PassOnSignal, leave_when_told
from pipeline.workers.profiles import BATCH, ClusterError, Profile
from pipeline.workers.starting import running
from pipeline.workers.stopping import allow_grace
from pipeline.workers.tls import credentials, wants_tls, warn_if_open
from pipeline.workers.worker_metrics import choose_device, register_plugin, set_device, set_up_process


class Cluster:
    """Workers that start when they are first needed: a run with nothing to do starts none.

    A context manager; :attr:`client` starts them, and is None for the profile ``none``.

    Raises
    ------
    ClusterError
        For options that the library doesn't have, and for a package that is absent; the profile's file is
        named, then as when workers start.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._stack = contextlib.ExitStack()
        self._client: Client | None = None
        with profile.naming():
            check_options(profile)
        self._stack.callback(allow_grace, allow_grace(profile.grace))
        if profile.kind == "none":
            self._stack.callback(set_device, choose_device(profile.device, 0))

    @property
    def client(self) -> Client | None:
        """The Dask client, started on first use; None where tasks run in this process."""
        if self.profile.kind != "none" and self._client is None:
            warn_if_open(self.profile)
            with self.profile.naming():
                self._client = self._stack.enter_context(_connect(self.profile))
        return self._client

    @property
    def dashboard(self) -> str | None:
        """Address of the dashboard; None before workers have started."""
        if self._client is None:
            return None
        if self.profile.kind in BATCH:
            # On loopback here, though the scheduler is known by another address.
            port = self._client.scheduler_info(n_workers=0)["services"]["dashboard"]
            return f"http://{LOOPBACK}:{port}/status"
        return self._client.dashboard_link

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._client = None

    def describe(self) -> dict[str, Any]:
        """What results record of the cluster."""
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
        dask.config.set(settings(profile)),
        _quiet_client(),
        credentials(profile) as security,
    ):
        if profile.address is not None:
            with _reach(profile.address, security) as client:
                _set_up(client, profile)
                yield client
            return
        with running(profile, security, lambda client: _set_up(client, profile)) as client:
            yield client


@contextlib.contextmanager
def _environment_as_before() -> Iterator[None]:
    """Take back variables that Dask sets for the workers that it starts, such as ``OMP_NUM_THREADS``."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _quiet_client() -> contextlib.AbstractContextManager[None]:
    """Without what a client logs of a scheduler that is lost: our error says so."""
    if keeps_logs():
        return contextlib.nullcontext()
    return silence_logging_cmgr(logging.CRITICAL, "distributed.client")


def _reach(address: str, security: Security | None) -> Client:
    """A client of a scheduler that runs already."""
    try:
        return Client(address, security=security, timeout="15s")
    except OSError as error:
        hint = "" if security is None else " to these certificates"
        raise ClusterError(f"no scheduler answers{hint} at {address}: {error}") from error


def _set_up(client: Client, profile: Profile) -> None:
    """Wait for a first worker, and give it and all that follow what they need."""
    owned = profile.kind in OF_THIS_MACHINE
    register_plugin(client, WorkerSetup(profile.device, owned, profile.grace))
    if not owned:
        register_plugin(client, PassOnSignal(profile.grace))
    try:
        client.wait_for_workers(1, timeout=profile.wait_s)
    except TimeoutError as error:
        where = f"the scheduler at {profile.address}" if profile.address else f"the cluster {profile.kind!r}"
        raise ClusterError(
            f"{where} has no workers, {profile.wait_s:g} s long; start_timeout of the profile says how long"
        ) from error


class WorkerSetup(WorkerPlugin):
    """One thread in the numerical libraries, a device, and a way to leave in good order.

    Workers that are ``owned`` leave Ctrl-C to the driver: the terminal sends it to them as well, and the
    driver is the one to stop them.
    """

    name = "lsim-worker-setup"

    def __init__(self, device: str, owned: bool, grace: float) -> None:
        self.device = device
        self.owned = owned
        self.grace = grace

    def setup(self, worker: Worker) -> None:
        set_up_process(self.device, worker.name)
        leave_when_told(worker, self.grace)
        if self.owned and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
