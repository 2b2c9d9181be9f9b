"""Start a cluster and set up its workers; on this machine, retry if one is lost before all are ready.

A process that dies fails the start at once. A process that is suspended, or blocked by a disk, would block
the start for ever: it is killed after the profile's ``start_timeout``.
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

from pipeline.workers.cluster_kinds import ON_THIS_MACHINE, start_cluster
from pipeline.workers.profiles import ClusterError, Profile

logger = logging.getLogger(__name__)

START_ATTEMPTS = 3
"""Attempts to start workers on this machine, if one dies or falls silent before it is ready."""
LOST_WORKER_MESSAGES = ("Nanny failed to start worker process", "Stream is closed")
"""Parts of Dask's messages when a worker's process was lost before it had joined."""
WORKER_PROCESS = "Dask Worker process (from Nanny)"
"""Dask's name for a worker's process."""


@contextlib.contextmanager
def running_cluster(
    profile: Profile, security: Security | None, set_up: Callable[[Client], None]
) -> Iterator[Client]:
    """Run a cluster, with its workers set up, for the time of a context.

    Parameters
    ----------
    profile : Profile
    security : Security, optional
    set_up : callable
        Registers plugins, and waits for the first worker.

    Yields
    ------
    Client

    Raises
    ------
    ClusterError
        With the reason of the batch system, the host, Kubernetes or the library.
    """
    attempts = START_ATTEMPTS if profile.kind in ON_THIS_MACHINE else 1
    with contextlib.ExitStack() as stack:
        for attempt in itertools.count(1):
            try:
                client = _attempt(profile, security, set_up, stack)
                break
            except (Exception, asyncio.CancelledError) as error:
                if profile.kind not in ON_THIS_MACHINE or not is_lost_worker(error):
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
    """Start a cluster once; closing ``stack`` closes it."""
    owned = profile.kind in ON_THIS_MACHINE
    limit = _killing_silent_workers(profile.wait_s) if owned else contextlib.nullcontext()
    with limit, contextlib.ExitStack() as attempt:
        try:
            cluster = attempt.enter_context(start_cluster(profile, security))
        except ClusterError:
            raise
        except Exception as error:  # libraries raise any class, and wrap the reason several times
            if owned and is_lost_worker(error):
                raise
            raise _not_started(profile, error) from error
        client: Client = attempt.enter_context(Client(cluster, security=security))
        set_up(client)
        stack.push(attempt.pop_all())
    return client


@contextlib.contextmanager
def _killing_silent_workers(seconds: float) -> Iterator[None]:
    """Kill worker processes that were started in this context, if it takes longer than ``seconds``.

    The start then fails, or goes on without them.
    """
    processes_before = set(_worker_processes())

    def kill() -> None:
        for process in set(_worker_processes()) - processes_before:
            with contextlib.suppress(ValueError):  # closed in the meantime
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
    """Tell whether a start failed because a process died or fell silent, so that a retry may succeed."""
    return any(
        isinstance(cause, TimeoutError | asyncio.CancelledError)
        or (
            isinstance(cause, OSError) and cause.errno is None
        )  # connection errors; system errors have a number
        or (isinstance(cause, RuntimeError) and any(text in str(cause) for text in LOST_WORKER_MESSAGES))
        for cause in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and the exceptions that caused it."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _reason(error: BaseException) -> str:
    """Format the original cause of an error in one line."""
    *_, reason = _causes(error)
    return f"{type(reason).__name__}: {' '.join(str(reason).split())}"


def _lost_too_often(error: BaseException, attempts: int) -> ClusterError:
    return ClusterError(
        f"no workers on this machine: in {attempts} attempts a process died or did not answer while it "
        f"started ({_reason(error)}). Memory may be short, or something kills these processes: try fewer "
        "workers (--workers) or none (--cluster none), or give them more time (start_timeout in a profile)"
    )


def _not_started(profile: Profile, error: Exception) -> ClusterError:
    options = f", with options {', '.join(profile.options)}" if profile.options else ""
    return ClusterError(f"a cluster of kind {profile.kind!r} did not start{options}: {_reason(error)}")
