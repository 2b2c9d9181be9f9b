"""Start a cluster and set up its workers; on this machine again, where one is lost before all are ready.

A process that dies fails the start at once. One that is stopped, or waits for a disk, would be waited for
without end: it is killed when its time is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import threading
from collections.abc import Callable, Iterator

from distributed import Client, Security

from pipeline.workers.cluster_kinds import OF_THIS_MACHINE, start_cluster
from pipeline.workers.profiles import ClusterError, Profile

logger = logging.getLogger(__name__)

START_ATTEMPTS = 3
"""How often workers of this machine are started, where one dies or falls silent before it is ready."""
SAID_OF_LOST_WORKERS = ("Nanny failed to start worker process", "Stream is closed")
"""What Dask says where a worker's process was lost before it had joined."""
WORKER_PROCESS = "Dask Worker process (from Nanny)"
"""The name that Dask gives to processes of workers."""


@contextlib.contextmanager
def running(
    profile: Profile, security: Security | None, set_up: Callable[[Client], None]
) -> Iterator[Client]:
    """Run a cluster whose workers are set up.

    Parameters
    ----------
    profile : Profile
    security : Security, optional
    set_up : callable
        Waits for a worker, and gives it what it needs.

    Yields
    ------
    Client

    Raises
    ------
    ClusterError
        With what the batch system, a host, Kubernetes or the library said.
    """
    attempts = START_ATTEMPTS if profile.kind in OF_THIS_MACHINE else 1
    with contextlib.ExitStack() as stack:
        for attempt in itertools.count(1):
            try:
                client = _attempt(profile, security, set_up, stack)
                break
            except (Exception, asyncio.CancelledError) as error:
                if profile.kind not in OF_THIS_MACHINE or not is_lost_worker(error):
                    raise
                if attempt == attempts:
                    raise _lost_too_often(error, attempts) from error
                logger.warning("a worker was lost while it started (%s): starting again", _reason(error))
        yield client


def _attempt(
    profile: Profile,
    security: Security | None,
    set_up: Callable[[Client], None],
    stack: contextlib.ExitStack,
) -> Client:
    """Start a cluster once; ``stack`` closes it."""
    own = profile.kind in OF_THIS_MACHINE
    limit = _killing_silent_workers(profile.wait_s) if own else contextlib.nullcontext()
    with limit, contextlib.ExitStack() as attempt:
        try:
            cluster = attempt.enter_context(start_cluster(profile, security))
        except ClusterError:
            raise
        except Exception as error:  # libraries raise anything, and wrap the reason several times
            if own and is_lost_worker(error):
                raise
            raise _not_started(profile, error) from error
        client: Client = attempt.enter_context(Client(cluster, security=security))
        set_up(client)
        stack.push(attempt.pop_all())
    return client


@contextlib.contextmanager
def _killing_silent_workers(seconds: float) -> Iterator[None]:
    """Kill workers that were started in here and aren't ready in time: the start then fails, or goes on."""
    others = set(_worker_processes())

    def kill() -> None:
        for process in set(_worker_processes()) - others:
            with contextlib.suppress(ValueError):  # it is closed meanwhile
                process.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _worker_processes() -> list[multiprocessing.process.BaseProcess]:
    return [process for process in multiprocessing.active_children() if process.name == WORKER_PROCESS]


def is_lost_worker(error: BaseException) -> bool:
    """Tell whether a start failed since a process died or fell silent, which may go well the next time."""
    return any(
        isinstance(cause, TimeoutError | asyncio.CancelledError)
        or (isinstance(cause, OSError) and cause.errno is None)  # of a connection; the system's have a number
        or (isinstance(cause, RuntimeError) and any(said in str(cause) for said in SAID_OF_LOST_WORKERS))
        for cause in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, and what it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _reason(error: BaseException) -> str:
    """Give the first reason that the library had, in one line."""
    *_, reason = _causes(error)
    return f"{type(reason).__name__}: {' '.join(str(reason).split())}"


def _lost_too_often(error: BaseException, attempts: int) -> ClusterError:
    return ClusterError(
        f"no workers on this machine: in {attempts} attempts a process died, or gave no answer, while it "
        f"started ({_reason(error)}). Memory may be short, or something stops these processes; fewer of them "
        "(--workers), or none (--cluster none), may do; start_timeout of a profile gives them more time"
    )


def _not_started(profile: Profile, error: Exception) -> ClusterError:
    options = f", with options {', '.join(profile.options)}" if profile.options else ""
    return ClusterError(f"a cluster of kind {profile.kind!r} has not started{options}: {_reason(error)}")
