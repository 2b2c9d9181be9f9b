"""Lose workers while they start: they preload this, and kill or stop themselves when a test says so.

Who was lost is written down, so that a test can wake those that stopped, and so that only so many are lost.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from distributed import Worker
from hindered import Paced

from lsim import MetricInfo

FOLDER, MOMENT, HOW, TIMES = "LOST_FOLDER", "LOST_MOMENT", "LOST_HOW", "LOST_TIMES"
"""Environment: where to write, when and by which signal (its number) workers are lost, and how many are."""
MOMENTS = ("import", "setup", "joined", "later", "loading")
"""As it begins; before it has joined the scheduler; as soon as it has; a moment later; as metrics load."""


def lose(moment: str) -> None:
    """Lose this process, where it is a worker's and its turn."""
    if os.environ.get(MOMENT) != moment or "spawn_main" not in Path("/proc/self/cmdline").read_text():
        return
    if len(lost(folder := Path(os.environ[FOLDER]))) < int(os.environ[TIMES]):
        with (folder / "lost.txt").open("a") as log:
            log.write(f"{os.getpid()}\n")
        os.kill(os.getpid(), int(os.environ[HOW]))


def lost(folder: Path) -> list[int]:
    """List the processes that were lost, in order."""
    log = folder / "lost.txt"
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def dask_setup(worker: Worker) -> None:
    """Let a worker go on starting, and lose it on the way."""
    lose("setup")
    worker.loop.add_callback(_lose_once_joined, worker)


async def _lose_once_joined(worker: Worker) -> None:
    while worker.status.name != "running":
        await asyncio.sleep(0.005)
    lose("joined")
    await asyncio.sleep(0.5)
    lose("later")


class Loading(Paced):
    """Loses the worker that loads it."""

    info = MetricInfo(title="loses its worker", source="this test")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        lose("loading")
        super().__init__(*arguments, **options)


lose("import")
