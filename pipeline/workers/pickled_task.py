"""A task as bytes: a scheduler passes them on, and need not have what is in them.

Dask's scheduler unpickles what is submitted, so it imports whatever modules a task names: torch, for tasks of
this project. It imports this module instead.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

from pipeline.workers.stopping import Stopped


class EndedError(Exception):
    """A task asked its process to end, or raised what is no Exception: it fails, and the process stays."""


def pack(function: Callable[..., Any], task: tuple[Any, ...]) -> bytes:
    """``function(*task)`` as bytes for :func:`run_packed`; the function is one of an installed module."""
    return pickle.dumps((function, task), protocol=pickle.HIGHEST_PROTOCOL)


def run_packed(packed: bytes) -> Any:
    """Call what was packed. Runs on a worker."""
    function, task = pickle.loads(packed)
    return run_guarded(function, task)


def run_guarded(function: Callable[..., Any], task: tuple[Any, ...]) -> Any:
    """``function(*task)``, of which only an Exception comes; and Ctrl-C or SIGTERM, in a main thread."""
    try:
        return function(*task)
    except (Exception, Stopped):
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        raise EndedError(f"{type(error).__name__}: {error}".removesuffix(": ")) from error
