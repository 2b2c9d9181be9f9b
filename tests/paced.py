"""A metric that takes its time and writes down who computed what: for tests of clusters in other processes.

It is given by reference, ``paced:Paced``, and finds this file through PYTHONPATH.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from lsim import Embedding, Metric, MetricInfo

PACE, LOG, WHO = "PACED_SECONDS", "PACED_LOG", "PACED_WHO"
"""Environment variables: seconds per sequence, a file that all workers append to, and the worker's name."""


class Paced(Metric):
    """Mean absolute difference, not before its time."""

    info = MetricInfo(title="paced mean difference", source="this test")

    def embed(self, frames: Tensor) -> Embedding:
        sequence = f"{zlib.crc32(frames.numpy().tobytes()):08x}"
        _note("begin", sequence)
        time.sleep(float(os.environ.get(PACE, "0")))
        _note("end", sequence)
        return Embedding({"frames": frames.double().flatten(1)})

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        return (a.parts["frames"][:, None] - b.parts["frames"][None]).abs().mean(2)


def _note(what: str, sequence: str) -> None:
    if LOG in os.environ:
        with open(os.environ[LOG], "a") as log:
            who = os.environ.get(WHO) or os.environ.get("SLURM_JOB_ID", "driver")
            log.write(f"{what} {sequence} {who} {time.time():.3f}\n")


class Attempts:
    """What workers have written down so far."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self, what: str) -> list[tuple[str, str, float]]:
        """(sequence, who, time) of all lines ``begin`` or ``end``."""
        text = self.path.read_text() if self.path.exists() else ""
        lines = [line.split() for line in text.splitlines()]
        return [(sequence, who, float(when)) for kind, sequence, who, when in lines if kind == what]

    def workers(self, since: float = 0.0) -> set[str]:
        """Who has finished a sequence after that time."""
        return {who for _, who, when in self.lines("end") if when > since}

    def unfinished(self) -> list[tuple[str, str]]:
        """(sequence, who) that were begun and never ended."""
        ended = [(sequence, who) for sequence, who, _ in self.lines("end")]
        return [pair for sequence, who, _ in self.lines("begin") if (pair := (sequence, who)) not in ended]


def wait_until(what: str, condition: Callable[[], bool], seconds: float, alive: Callable[[], str]) -> float:
    """Poll until ``condition()``, and return after how many seconds that was; ``alive`` tells of a premature end."""
    began = time.monotonic()
    while not condition():
        if trouble := alive():
            raise AssertionError(f"{what}: {trouble}")
        if time.monotonic() - began > seconds:
            raise AssertionError(f"{what}: not after {seconds} s")
        time.sleep(0.1)
    return time.monotonic() - began
