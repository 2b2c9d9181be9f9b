"""A task as bytes: a scheduler passes them on, and need not have what is in them.

Dask's scheduler unpickles what is submitted, so it imports whatever modules a task names: torch, for tasks of
this project. It imports this module instead.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any


def pack(function: Callable[..., Any], task: tuple[Any, ...]) -> bytes:
    """``function(*task)`` as bytes for :func:`run_packed`; the function is one of an installed module."""
    return pickle.dumps((function, task), protocol=pickle.HIGHEST_PROTOCOL)


def run_packed(packed: bytes) -> Any:
    """Call what was packed. Runs on a worker."""
    function, task = pickle.loads(packed)
    return function(*task)
