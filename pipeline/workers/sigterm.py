"""SIGTERM of the driver: finish running tasks, start no others, end. For workers: ``worker_exit``.

A batch system sends SIGTERM to a job that it is about to end, and kills it a while later. While tasks are
running (:func:`deferred`) the signal only requests an end; otherwise it ends the process as Ctrl-C does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM
"""Exit code of a process that SIGTERM ended: 143, as in shells."""

GRACE_S = 30.0
"""Seconds that running tasks get to finish, unless the environment or a profile sets another time."""
GRACE_VARIABLE = "LSIM_GRACE"
"""Environment variable for these seconds; it takes precedence over a cluster profile."""


class Stopped(SystemExit):
    """End of the process on request; finished work is kept."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class _State:
    """State of the process: signals belong to the whole process, too."""

    def __init__(self) -> None:
        self.requested = threading.Event()
        self.deferring = 0
        self.grace = GRACE_S
        self.from_environment: float | None = None


_state = _State()


def stop_on_sigterm() -> None:
    """Handle SIGTERM from now on: raise :class:`Stopped`, or within :func:`deferred` only set a flag.

    Raises
    ------
    ValueError
        When ``LSIM_GRACE`` is not a number of seconds.
    """
    if text := os.environ.get(GRACE_VARIABLE):
        try:
            _state.from_environment = float(text)
        except ValueError as error:
            raise ValueError(f"{GRACE_VARIABLE}: expected seconds, found {text!r}") from error
    if threading.current_thread() is threading.main_thread():  # only this thread may set handlers
        signal.signal(signal.SIGTERM, _on_signal)


@contextlib.contextmanager
def restoring_handler() -> Iterator[Callable[[], None]]:
    """Yield :func:`stop_on_sigterm`, and restore the previous handler and state on leaving.

    A SIGTERM that arrived meanwhile was meant for the whole process. A caller in whose process other code
    may run has to raise the signal again afterwards.
    """
    global _state
    original, _state = _state, _State()
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if in_main_thread else None
    try:
        yield stop_on_sigterm
    finally:
        if in_main_thread:
            # None stands for a handler that isn't Python's: it cannot be set again.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)
        _state = original


def allow_grace(seconds: float) -> float:
    """Set how long running tasks may go on after a request to stop, and return the previous value.

    ``$LSIM_GRACE`` takes precedence.
    """
    original, _state.grace = _state.grace, seconds
    return original


def grace() -> float:
    """Return the seconds that running tasks may go on after a request to stop."""
    return _state.grace if _state.from_environment is None else _state.from_environment


def requested() -> bool:
    """Tell whether the process was asked to end."""
    return _state.requested.is_set()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Make SIGTERM only set :func:`requested`; the caller polls it and raises :class:`Stopped`."""
    _state.deferring += 1
    try:
        yield
    finally:
        _state.deferring -= 1


def _on_signal(number: int, frame: FrameType | None) -> None:
    # A second signal changes nothing: the end is on its way, and SIGKILL is for those who can't wait.
    first = not _state.requested.is_set()
    _state.requested.set()
    if first and not _state.deferring:
        raise Stopped
