"""Stop in good order when a batch system says so: what runs is finished, and nothing else begins.

A batch system sends SIGTERM to a job that it is about to end, and kills it a while later. While tasks are
running (:func:`in_good_order`) the signal only asks for an end; otherwise it ends the process as Ctrl-C does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM
"""Of a process that was stopped: 143, as shells have it."""

GRACE_S = 30.0
"""How long running tasks may go on, where neither the environment nor a profile says otherwise."""
GRACE_VARIABLE = "LSIM_GRACE"
"""Environment variable of those seconds; a profile of a cluster has them, too."""


class Stopped(SystemExit):
    """The process was asked to end; what is finished is kept."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class _State:
    """Of this process: signals are the process's, too."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.deferring = 0
        self.grace = GRACE_S
        self.from_environment: float | None = None


_state = _State()


def stop_on_sigterm() -> None:
    """From now on SIGTERM raises :class:`Stopped`, or asks what is in good order to do so.

    Raises
    ------
    ValueError
        When ``LSIM_GRACE`` is no number of seconds.
    """
    if text := os.environ.get(GRACE_VARIABLE):
        try:
            _state.from_environment = float(text)
        except ValueError as error:
            raise ValueError(f"{GRACE_VARIABLE}: expected seconds, found {text!r}") from error
    if threading.current_thread() is threading.main_thread():  # no other gets signals, nor may it say where
        signal.signal(signal.SIGTERM, _on_signal)


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Give a function that is :func:`stop_on_sigterm`, and undo it: handler and state are those of before.

    A SIGTERM that came meanwhile was meant for the whole process. Where something else than the command may
    run in it, whoever leaves has to pass the signal on.
    """
    global _state
    before, _state = _state, _State()
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if in_main_thread else None
    try:
        yield stop_on_sigterm
    finally:
        if in_main_thread:
            # None stands for a handler that isn't Python's: it cannot be set again.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)
        _state = before


def allow_grace(seconds: float) -> float:
    """Set how long running tasks may go on once the process was asked to end, and return what it was.

    The environment knows better.
    """
    before, _state.grace = _state.grace, seconds
    return before


def grace() -> float:
    """Seconds that running tasks may go on."""
    return _state.grace if _state.from_environment is None else _state.from_environment


def asked() -> bool:
    """Whether the process was asked to end."""
    return _state.asked.is_set()


@contextlib.contextmanager
def in_good_order() -> Iterator[None]:
    """Here SIGTERM only sets :func:`asked`: whoever enters looks at it often, and raises :class:`Stopped`."""
    _state.deferring += 1
    try:
        yield
    finally:
        _state.deferring -= 1


def _on_signal(number: int, frame: FrameType | None) -> None:
    # A second one changes nothing: the end is on its way, and SIGKILL is for those who can't wait.
    first = not _state.asked.is_set()
    _state.asked.set()
    if first and not _state.deferring:
        raise Stopped
