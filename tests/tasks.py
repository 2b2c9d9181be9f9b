"""Tasks of tests, in a module that imports next to nothing: a worker that starts for them is soon there."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def double(value: int) -> int:
    return 2 * value


@dataclass(frozen=True)
class Nap:
    """A task that can say what it is of."""

    seconds: float
    label: str = "A/density, sequences 8 to 11"


def take(*naps: Nap) -> float:
    return nap(naps[0].seconds)


def raise_as_told(kind: str) -> None:
    raise {"exit": SystemExit(7), "interrupt": KeyboardInterrupt(), "bare": BaseException("bare")}[kind]


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def die(number: int) -> int:
    """Take the worker along for one number."""
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def watch_whether_it_is_wanted(folder: str) -> None:
    """Says when it has begun, and when nobody waits for it any more; nothing in a minute."""
    from pipeline.workers.worker_metrics import still_wanted

    Path(folder, f"wanted {still_wanted()}").touch()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not still_wanted():
            Path(folder, "given up").touch()
            return
        time.sleep(0.02)


def nap_or_watch(seconds: float, folder: str) -> None:
    if folder:
        watch_whether_it_is_wanted(folder)
    time.sleep(seconds)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name}: not within a minute"
        time.sleep(0.02)


def squared_or_fail(value: int) -> int:
    """Fails for 3, whoever runs it."""
    if value == 3:
        raise ValueError("three is not squared here")
    return value**2


def where_it_runs() -> int:
    return os.getpid()


def slow_task(number: int, log: str) -> int:
    """Says when it begins and ends; half a second in between."""
    with open(log, "a") as file:
        file.write(f"begin {number} {os.getpid()}\n")
    time.sleep(0.5)
    with open(log, "a") as file:
        file.write(f"end {number} {os.getpid()}\n")
    return number


def suspicions(dask_scheduler: Any) -> int:
    """How often the scheduler suspects a task of having killed its worker."""
    return sum(prefix.suspicious for prefix in dask_scheduler.task_prefixes.values())
