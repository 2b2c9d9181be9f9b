"""What the command does to its process: nothing that stays, and which ``pipeline`` it is that starts."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tomllib
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import torch
from matrices import archive_of, write_archive
from threadpoolctl import threadpool_info

from pipeline import cli
from pipeline.workers import sigterm, worker_metrics

ROOT = Path(__file__).parents[1]


def process_state(known: Collection[str] = ()) -> dict[str, Any]:
    """All that is the process's, and that other code in it relies on."""
    loggers = [logging.getLogger(), *map(logging.getLogger, sorted(logging.Logger.manager.loggerDict))]
    # A library that is imported only now brings loggers of its own; those that were there count.
    known = known or [g.name for g in loggers]
    loggers = [g for g in loggers if g.name in known]
    return {
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "timer": signal.getitimer(signal.ITIMER_REAL)[0] > 0,
        "show warning": warnings.showwarning,
        "warning filters": list(warnings.filters),
        "warning options": list(sys.warnoptions),
        "environment": dict(os.environ),
        "path": list(sys.path),
        "arguments": list(sys.argv),
        "folder": os.getcwd(),
        "hooks": (sys.excepthook, sys.displayhook, sys.unraisablehook, threading.excepthook),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "recursion": sys.getrecursionlimit(),
        "loggers": {g.name: (g.level, g.propagate, handlers_of(g)) for g in loggers},
        "dask": repr(dask.config.config),
        "threads": (torch.get_num_threads(), [p["num_threads"] for p in threadpool_info()]),
        "torch": (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
        ),
        "denormals": float(torch.full((8,), 1e-40).mul(1.0).sum()),
        "random": (random.getstate(), torch.get_rng_state().tolist(), repr(np.random.get_state())),
        "numpy": (np.geterr(), repr(np.get_printoptions())),
        "grace": (vars(sigterm._state)["grace"], sigterm.requested(), sigterm._state.deferring),
        "device": worker_metrics._device,
    }


def handlers_of(logger: logging.Logger) -> list[tuple[logging.Handler, int]]:
    """List handlers with their levels, without those that Dask's nannies keep for themselves."""
    return [(h, h.level) for h in logger.handlers if type(h).__name__ != "DequeHandler"]


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    """Exit code of a command in this process, or the exception that left it."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["lsim", *map(str, arguments)])
        before = list(sys.argv)
        try:
            cli.main()
        except SystemExit as end:
            return end.code
        except BaseException as error:
            return error
        finally:
            assert sys.argv == before


METRIC = """
import torch
from lsim import Embedding, Metric, MetricInfo

class Half(Metric):
    info = MetricInfo(title="half the difference", source="this test")

    def embed(self, frames):
        return Embedding({"frames": frames})

    def compare(self, a, b):
        x, y = a.parts["frames"].flatten(1), b.parts["frames"].flatten(1)
        return FACTOR * torch.cdist(x, y, p=1).double()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_archive(tmp_path / "frames.zarr", archive_of(2, size=32))
    (tmp_path / "own_half.py").write_text("FACTOR = 0.5\n" + METRIC)
    (tmp_path / "c.yaml").write_text("name: c\ndatasets:\n- {name: A, source: {path: data}, reader: stack}\n")
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "s.npz", frames=np.ones((2, 8, 8), "f4"), parameter=[0.0, 1.0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


DISTANCES = ("distances", "frames.zarr", "--size", 0, "--metrics", "l1")
COMMANDS: dict[str, tuple[tuple[object, ...], Any]] = {
    "version": (("--version",), 0),
    "wrong usage": (("distances", "--nonsense"), 2),
    "nothing there": (("distances", "absent.zarr", "--out", "d.zarr"), 1),
    "convert": (("convert", "c.yaml", "--out", "f.zarr", "--cluster", "none"), 0),
    "no cluster": ((*DISTANCES, "--out", "d1.zarr", "--cluster", "none"), 0),
    "workers": ((*DISTANCES, "--out", "d2.zarr", "--workers", 1), 0),
    "own metric": (
        (*DISTANCES, "--metric", "own_half:Half", "--out", "d3.zarr", "--cluster", "none"),
        0,
    ),
    "correlate": (("correlate", "d1.zarr", "--out", "results", "--replicates", 20), 0),
    "report": (("report", "results"), 0),
    "simulate": (
        ("simulate", "waves", "--out", "sim", "--families", 1, "--size", 32, "--cluster", "none"),
        0,
    ),
}


def test_commands_leave_the_process_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch):
    # What importing libraries does to a process stays, so everything is imported by a first round. Starting
    # workers imports nothing more.
    for commands in ({name: how for name, how in COMMANDS.items() if name != "workers"}, COMMANDS):
        for out in ("d1.zarr", "d2.zarr", "d3.zarr", "f.zarr", "results", "sim"):
            subprocess.run(["rm", "-rf", out], check=True)
        changed: dict[str, list[str]] = {}
        for name, (arguments, expected) in commands.items():
            before = process_state()
            assert run_here(monkeypatch, *arguments) == expected, name
            after = process_state(known=before["loggers"])
            if different := [key for key, value in before.items() if after[key] != value]:
                changed[name] = different
    assert changed == {}


@pytest.mark.parametrize(
    "error", [RuntimeError("a fault of ours"), KeyboardInterrupt(), ValueError("theirs")]
)
def test_commands_that_raise_leave_the_process_as_it_was(error: BaseException, monkeypatch):
    def fail() -> None:
        warnings.warn("said once", stacklevel=2)
        os.environ["LEFT_BEHIND"] = "1"
        sys.path.append("/nowhere")
        raise error

    monkeypatch.setattr("pipeline.storage.versions.versions", fail)
    run_here(monkeypatch, "--version")
    before = process_state()
    ended = run_here(monkeypatch, "--version")
    assert ended in (1, 130, error)
    after = process_state(known=before["loggers"])
    assert [key for key, value in before.items() if after[key] != value] == []


def test_a_metric_of_the_same_name_in_another_folder_is_another(folder: Path, monkeypatch):
    from pipeline.storage import store

    first = (*DISTANCES[:-1], "own_half:Half", "--out", folder / "one.zarr", "--cluster", "none")
    assert run_here(monkeypatch, *first) == 0
    other = folder / "other"
    other.mkdir()
    (other / "own_half.py").write_text("FACTOR = 5.0\n" + METRIC)
    monkeypatch.chdir(other)
    second = ("distances", "../frames.zarr", "--size", 0, "--metrics", "own_half:Half")
    assert run_here(monkeypatch, *second, "--out", folder / "two.zarr", "--cluster", "none") == 0

    def largest(name: str) -> float:
        root = store.open_store(folder / name)
        key = store.field_keys(root, "half")[0]
        return float(store.read(store.get_array(store.get_group(root, key), "half")).max())

    assert largest("two.zarr") == pytest.approx(10 * largest("one.zarr"), rel=1e-6)


def test_a_command_in_a_thread_asks_for_no_signals(monkeypatch: pytest.MonkeyPatch):
    codes: list[Any] = []
    thread = threading.Thread(target=lambda: codes.append(run_here(monkeypatch, "--version")))
    thread.start()
    thread.join()
    assert codes == [0]


# ---------------------------------------------------------------- SIGTERM

IN_PROCESS = """
import sys, time
from pipeline import cli

def test_in_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lsim", "--version"])
    MEANWHILE
    try:
        cli.main()
    except SystemExit:
        pass
    print("after", flush=True)
    time.sleep(60)
"""
WAITING = """
    def wait():
        print("during", flush=True)
        time.sleep(60)
    monkeypatch.setattr("pipeline.storage.versions.versions", wait)
"""


@pytest.mark.parametrize(("meanwhile", "when"), [("pass", "after"), (WAITING, "during")])
def test_pytest_ends_when_it_is_told_to(tmp_path: Path, meanwhile: str, when: str):
    (tmp_path / "test_one.py").write_text(IN_PROCESS.replace("MEANWHILE", meanwhile))
    command = [sys.executable, "-m", "pytest", "-s", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    assert any(when in line for line in process.stdout)
    time.sleep(0.2)
    process.terminate()
    try:
        assert process.wait(30) == -signal.SIGTERM
    finally:
        process.kill()
        process.stdout.close()


# ---------------------------------------------------------------- another pipeline


def with_file(folder: Path) -> Path:
    path = folder / "pipeline.py"
    path.write_text("print('the file of somebody')\n")
    return path


def with_package(folder: Path) -> Path:
    path = folder / "pipeline" / "__init__.py"
    path.parent.mkdir()
    path.write_text("print('the package of somebody')\n")
    return path


def python(*arguments: str, folder: Path, first: tuple[Path, ...] = ()) -> tuple[int, str]:
    path = os.pathsep.join(map(str, (*first, ROOT)))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


AS_THE_SCRIPT = "import sys; del sys.path[0]; from lsim_command import main; main()"


@pytest.mark.parametrize("put", [with_file, with_package])
def test_the_command_starts_in_a_folder_with_another_pipeline(put: Callable[[Path], Path], tmp_path: Path):
    other = put(tmp_path)
    started = python("-m", "lsim", "--version", folder=tmp_path)
    assert started == (0, "lsim 0.1.0\n")
    # Told to look there first, Python does.
    code, text = python("-c", AS_THE_SCRIPT, "--version", folder=tmp_path, first=(tmp_path,))
    assert code == 1
    assert text.startswith(f"error: {other} is in the way: Python looks in {tmp_path} before")
    assert f"Rename it, or take {tmp_path} out of PYTHONPATH" in text
    assert text.count("\n") == 1


def test_a_folder_called_pipeline_is_not_in_the_way(tmp_path: Path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "notes.txt").touch()
    started = python("-c", AS_THE_SCRIPT, "--version", folder=tmp_path, first=(tmp_path,))
    assert started == (0, "lsim 0.1.0\n")


def test_the_script_starts_a_module_that_needs_neither_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"lsim": "lsim_command:main"}
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    assert "lsim_command.py" in included


def test_both_packages_ship_the_mark_that_they_are_typed():
    """Type checkers read the annotations of an installed package only where it has a file ``py.typed``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for package in ("lsim", "pipeline"):
        assert package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
        assert (ROOT / package / "py.typed").is_file()
