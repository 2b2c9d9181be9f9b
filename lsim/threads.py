"""Parallel computation on threads that each compute single-threaded, since frames and pairs are independent.

Splitting one frame's convolutions over OpenMP threads instead is a fifth slower. It stalls when another
program takes a core, since the other threads spin for the descheduled one. It also rounds differently for
each number of threads.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def in_threads(function: Callable[..., T], tasks: Iterable[Any]) -> list[T]:
    """Compute ``[function(task) for task in tasks]`` on as many threads as torch uses.

    Each has one torch thread, so that results are bit-identical for any :func:`torch.get_num_threads`.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [function(task) for task in tasks]
    return list(_pool(threads, os.getpid()).map(function, tasks))


def batches(n: int, maximum: int) -> list[slice]:
    """Cut ``n`` into slices of about equal length for :func:`in_threads`.

    Each is at most ``maximum`` long (3 or more) and, if ``n`` allows it, at least 2: some algorithms round a
    single row differently from the same row among others.
    """
    threads = torch.get_num_threads()
    count = max(1, min(threads * -(-n // (threads * maximum)), n // 2))
    bounds = (n * k // count for k in range(count + 1))
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Start threads and keep them: a start takes longer than a sequence's pixel differences.

    Threads don't survive a fork, hence the key ``process``.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="lsim", initializer=_compute_alone)
    # All start at once: each one's setting also becomes the default of later threads.
    barrier = threading.Barrier(threads)
    list(pool.map(lambda _: barrier.wait(), range(threads)))
    torch.set_num_threads(threads)
    return pool


def _compute_alone() -> None:
    """Give the current thread a single torch thread."""
    torch.get_num_threads()  # the first call takes over the default, which can be changed only then
    torch.set_num_threads(1)
