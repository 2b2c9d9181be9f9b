"""Threads that each compute single-threaded: frames and pairs are independent, so nobody waits for anybody.

Splitting one frame's convolutions over OpenMP threads instead is a fifth slower, collapses where another
program takes a core (the others spin for the descheduled one), and rounds differently with every number
of threads.
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
    """``[function(task) for task in tasks]``, on as many threads as torch uses, one torch thread each.

    The results are the same bits whatever :func:`torch.get_num_threads` says.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [function(task) for task in tasks]
    return list(_pool(threads, os.getpid()).map(function, tasks))


def batches(n: int, most: int) -> list[slice]:
    """Cut ``n`` into slices of about equal length for :func:`in_threads`.

    They are at most ``most`` long (3 or more) and, where ``n`` is, at least 2: some algorithms take a single
    row otherwise than the same row among others, and round it otherwise.
    """
    threads = torch.get_num_threads()
    count = max(1, min(threads * -(-n // (threads * most)), n // 2))
    bounds = (n * k // count for k in range(count + 1))
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that stay: to start one takes longer than a sequence's pixel differences.

    Those of one process are of no use in a fork of it, hence ``process``.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="lsim", initializer=_compute_alone)
    # All of them start now, since each one's setting is also taken for the default of threads to come.
    everybody = threading.Barrier(threads)
    list(pool.map(lambda _: everybody.wait(), range(threads)))
    torch.set_num_threads(threads)
    return pool


def _compute_alone() -> None:
    torch.get_num_threads()  # a thread's first look makes it take the default; only then can it differ
    torch.set_num_threads(1)
