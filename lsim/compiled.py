"""Compile kernels with Numba, into a cache that several processes may fill at the same time."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import numba


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function when it is first called; the lock of the interpreter is released while it runs.

    Parameters
    ----------
    **options
        Of :func:`numba.njit`, besides ``nogil`` and ``cache``. Without ``fastmath`` it is off: Numba (0.68.1)
        would take over that of the first kernel that calls this one, for all later calls and processes.

    Examples
    --------
    >>> @compiled()
    ... def twice(value):
    ...     return 2 * value
    >>> twice(4)
    8
    """

    def compile_kernel(function: Callable[..., Any]) -> Any:
        kernel = numba.njit(nogil=True, cache=True, **{"fastmath": False, **options})(function)
        _name_files_apart(kernel)
        return kernel

    return compile_kernel


def _name_files_apart(kernel: Any) -> None:
    """Give each compiled signature a file of its own name.

    Numba (0.68.1 and before) numbers these files. Two processes that compile two signatures of a kernel at
    the same time both take number 1, and the index of one then names the code of the other. From then on
    every process that loads it fails: "can't unbox array from PyObject into native value".
    """
    cache_file = getattr(kernel._cache, "_cache_file", None)
    if cache_file is not None:
        base = cache_file._index_name.removesuffix(".nbi")
        cache_file._data_name = lambda number: f"{base}.{uuid.uuid4().hex}.nbc"
