"""Tasks as bytes, which a scheduler passes on without importing what they contain.

Dask's scheduler unpickles what is submitted, so it would import the modules of every task: torch, in this
project. It imports only this module instead.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

from pipeline.workers.sigterm import Stopped


class EndedError(Exception):
    """A task tried to end its process, or raised something that is no Exception; the process goes on."""


def pack(function: Callable[..., Any], task: tuple[Any, ...]) -> bytes:
    """Pickle the call ``function(*task)`` for :func:`run_packed`; the function's module must be installed."""
    return pickle.dumps((function, task), protocol=pickle.HIGHEST_PROTOCOL)


def run_packed(packed: bytes) -> Any:
    """Run a call that :func:`pack` pickled. Runs on a worker."""
    function, task = pickle.loads(packed)
    return run_guarded(function, task)


def run_guarded(function: Callable[..., Any], task: tuple[Any, ...]) -> Any:
    """Call ``function(*task)``, and turn what is no Exception into :class:`EndedError`.

    SIGTERM, and Ctrl-C in the main thread, pass.
    """
    try:
        return function(*task)
    except (Exception, Stopped):
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        raise EndedError(f"{type(error).__name__}: {error}".removesuffix(": ")) from error
