"""A metric that takes its time and writes down who computed what: for tests of clusters of other processes.

It is given by reference, ``paced:Paced``, and finds this file through PYTHONPATH.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from lsim import Embedding, Metric, MetricInfo

FOLDER, WHO = "PACED_FOLDER", "PACED_WHO"
"""Environment: a folder that test and workers share, and the worker's name (default: its SLURM job)."""


TRIED = 3
"""Most frames that are embedded only to try the metric, which is no attempt at a sequence."""


class Paced(Metric):
    """Mean absolute difference, not before its time."""

    info = MetricInfo(title="paced mean difference", source="this test")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.itself = id(self)  # a copy is tried, once a run and worker, for the same result twice

    def embed(self, frames: Tensor) -> Embedding:
        if FOLDER in os.environ and len(frames) > TRIED and id(self) == self.itself:
            pace = Pace(Path(os.environ[FOLDER]))
            sequence = f"{zlib.crc32(frames.numpy().tobytes()):08x}"
            pace.note("begin", sequence)
            time.sleep(pace.seconds)
            pace.note("end", sequence)
        return Embedding({"frames": frames.double().flatten(1)})

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        return (a.parts["frames"][:, None] - b.parts["frames"][None]).abs().mean(2)


class Pace:
    """How long a sequence takes, and what workers have written down so far.

    The pace may change in mid-run: a run goes slowly until what is tested has happened, whatever the load of
    the machine, and then ends soon.
    """

    def __init__(self, folder: Path) -> None:
        self.log, self.pace = folder / "attempts.txt", folder / "pace.txt"

    @property
    def seconds(self) -> float:
        return float(self.pace.read_text())

    @seconds.setter
    def seconds(self, seconds: float) -> None:
        new = self.pace.with_suffix(".new")
        new.write_text(str(seconds))
        new.replace(self.pace)

    def note(self, what: str, sequence: str) -> None:
        who = os.environ.get(WHO) or os.environ.get("SLURM_JOB_ID", "driver")
        with self.log.open("a") as log:
            log.write(f"{what} {sequence} {who}\n")

    def lines(self, what: str) -> list[tuple[str, str]]:
        """(sequence, who) of all that was noted of ``begin`` or ``end``, in order."""
        text = self.log.read_text() if self.log.exists() else ""
        lines = [line.split() for line in text.splitlines()]
        return [(sequence, who) for kind, sequence, who in lines if kind == what]

    def workers(self, after: int = 0) -> set[str]:
        """Who has finished a sequence, the first ``after`` of all left out."""
        return {who for _, who in self.lines("end")[after:]}

    def assert_begun_once(self, sequences: int) -> None:
        """Every sequence was begun once and ended."""
        begun, ended = self.lines("begin"), self.lines("end")
        assert len({sequence for sequence, _ in ended}) == sequences
        assert len(begun) <= sequences, f"{len(begun) - sequences} begun again"
        assert set(begun) == set(ended), "given up by their worker"


def wait_until(what: str, condition: Callable[[], bool], seconds: float, trouble: Callable[[], str]) -> float:
    """Poll until ``condition()``; after how many seconds that was.

    ``trouble`` says what has happened that makes waiting useless, and nothing as long as all is well.
    """
    began = time.monotonic()
    while not condition():
        assert not (found := trouble()), f"waiting for {what}: {found}"
        assert time.monotonic() - began < seconds, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return time.monotonic() - began
