"""Drivers, schedulers and workers as processes of their own, for tests that kill them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
from commands import run_lsim
from paced import FOLDER, WHO, Pace

from pipeline.storage import schema, store

HERE = Path(__file__).parent
LSIM = (sys.executable, "-c", "from pipeline.cli import main; main()")
DASK = (sys.executable, "-m", "dask")
PATIENCE_S = 240
"""How long to wait for what is bound to come, on a machine that others use, too."""


class Processes:
    """What a test has started; each writes what it says to a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pace = Pace(folder)
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, *command: object, **variables: str) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own; ``variables`` are added to its environment."""
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
            "COLUMNS": "400",
            FOLDER: str(self.folder),
            **variables,
        }
        with self.log(len(self.started)).open("wb") as log:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        self.started.append(process)
        return process

    def lsim(self, *arguments: object, **variables: str) -> subprocess.Popen[bytes]:
        return self.start(*LSIM, *arguments, **variables)

    def lsim_here(self, *arguments: object) -> tuple[int, str]:
        """Exit code and output of a command in this process, which tells the others how fast it goes."""
        with mock.patch.dict(os.environ, {FOLDER: str(self.folder)}):
            return run_lsim(*arguments)

    def scheduler(self, port: int = 0) -> tuple[subprocess.Popen[bytes], str]:
        """A scheduler on loopback, and its address."""
        file = self.folder / f"scheduler{len(self.started)}.json"
        options = ("--host", "127.0.0.1", "--port", port, "--dashboard-address", "127.0.0.1:0")
        process = self.start(*DASK, "scheduler", *options, "--scheduler-file", file)
        self.wait("a scheduler", lambda: file.exists() and '"address"' in file.read_text(), process)
        return process, file.read_text().split('"address": "')[1].split('"')[0]

    def worker(
        self, address: str, name: str, nanny: bool = True, **variables: str
    ) -> subprocess.Popen[bytes]:
        """One worker of one thread, in a process of its nanny unless there is to be none."""
        options = ("--name", name, "--nthreads", "1", "--memory-limit", "0", "--no-dashboard")
        options += ("--nanny" if nanny else "--no-nanny",)
        where = ("--host", "127.0.0.1", "--local-directory", self.folder)
        return self.start(*DASK, "worker", address, *options, *where, **{WHO: name, **variables})

    def log(self, number: int) -> Path:
        return self.folder / f"log{number}.txt"

    def said(self, process: subprocess.Popen[bytes]) -> str:
        return self.log(self.started.index(process)).read_text(errors="replace")

    def wait(
        self, what: str, condition: Callable[[], bool], *alive: subprocess.Popen[bytes], seconds: float = 0
    ) -> None:
        """Wait for something; processes ``alive`` must not end before."""
        deadline = time.monotonic() + (seconds or PATIENCE_S)
        while not condition():
            for process in alive:
                assert process.poll() is None, f"waiting for {what}: {self.said(process)}"
            assert time.monotonic() < deadline, f"waited in vain for {what}: " + "".join(
                f"\n{self.said(process)[-2000:]}" for process in self.started
            )
            time.sleep(0.05)

    def end(self, process: subprocess.Popen[bytes], seconds: float = PATIENCE_S) -> tuple[int, str]:
        """Exit code, and all that a process said, once it has ended."""
        self.wait("the end of a process", lambda: process.poll() is not None, seconds=seconds)
        return process.wait(), self.said(process)

    def kill(self, process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
        os.killpg(process.pid, number)
        process.wait(PATIENCE_S)


@contextmanager
def processes(folder: Path) -> Iterator[Processes]:
    """What is started in here has ended after it."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Processes(folder)
    made.pace.seconds = 0
    try:
        yield made
    finally:
        for process in made.started:
            if process.poll() is None:
                made.kill(process)


def children(pid: int) -> list[int]:
    """Processes that ``pid`` has started: Dask's workers, without its resource tracker."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (entry / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        if parent == pid and b"spawn_main" in command:
            found.append(int(entry.name))
    return sorted(found)


def fingerprints(out: Path, key: str = "A/density") -> np.ndarray:
    """Recorded fingerprints (metric, sequence), empty before the store is laid out."""
    try:
        group = store.get_group(store.open_store(out), f"{key}/{schema.PROVENANCE}")
        return store.read(store.get_array(group, schema.FINGERPRINT))
    except store.StoreError:
        return np.empty((0, 0), dtype=object)


def done(out: Path) -> int:
    """How many matrices have a fingerprint."""
    return int((fingerprints(out) != "").sum())
