"""Runs on a real SLURM of two virtual nodes: jobs that are cancelled, told to go, or run out of time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paced
import pytest
import yaml
from commands import run_lsim, skip_or_fail
from matrices import archive_of, matrices_of, write_archive

from pipeline.storage import schema, store

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

SCRIPT = Path(__file__).parent / "slurm.sh"
TESTS = Path(paced.__file__).parent
SEQUENCES = 100
COMMANDS = ("slurmctld", "slurmd", "munged", "munge", "sbatch", "squeue", "scancel")


def why_no_slurm() -> str:
    """Why SLURM cannot be started here; empty where it can."""
    if os.geteuid() != 0:
        return "starting a SLURM needs root"
    if missing := [name for name in COMMANDS if shutil.which(name) is None]:
        return f"{', '.join(missing)} not here: make test-slurm installs them"
    return ""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[None]:
    """A SLURM of this module; its commands find it through the environment."""
    if reason := why_no_slurm():
        skip_or_fail(reason)
    folder = tmp_path_factory.mktemp("slurm")
    try:
        started = subprocess.run([SCRIPT, "start", folder], capture_output=True, text=True, timeout=120)
        assert started.returncode == 0, started.stdout + started.stderr
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            patch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
            yield
    finally:
        subprocess.run([SCRIPT, "stop", folder], check=True, timeout=120)


def jobs() -> dict[str, str]:
    """States of the jobs that are queued or running, by job id."""
    listed = subprocess.run(
        ["squeue", "--noheader", "--format=%i %T"], capture_output=True, text=True, check=True
    )
    return dict(line.split() for line in listed.stdout.splitlines())


@dataclass
class Run:
    """A run of the command on two jobs, each a worker of one thread."""

    folder: Path
    process: subprocess.Popen[str]
    pace: paced.Pace

    @property
    def output(self) -> str:
        return (self.folder / "run.log").read_text()

    def trouble(self) -> str:
        """What was printed, once the run is over."""
        return "" if self.process.poll() is None else f"the run is over:\n{self.output}"

    def wait_until(self, what: str, condition: Callable[[], bool]) -> float:
        return paced.wait_until(what, condition, 240, self.trouble)

    def finish(self) -> str:
        """Let the run end; what it printed."""
        self.pace.seconds = 0
        assert self.process.wait(timeout=120) == 0, self.output
        return self.output


@pytest.fixture
def start(slurm, tmp_path) -> Iterator[Callable[..., Run]]:
    """Start a command on this SLURM, by a profile in a file."""
    runs: list[Run] = []

    def start(*arguments: object, **changes: object) -> Run:
        pace = paced.Pace(tmp_path)
        pace.seconds = 1
        profile = {
            "kind": "slurm",
            "workers": 2,
            "threads": 1,
            "memory_limit": "2GB",
            "interface": "lo",
            "walltime": "00:10:00",
            "resources": {"GPU": 1},
            "environment": {paced.FOLDER: str(tmp_path)},
            "shared_folder": str(tmp_path / "shared"),
            "options": {
                "queue": "debug",
                "python": sys.executable,
                "log_directory": str(tmp_path / "jobs"),
                "local_directory": str(tmp_path / "scratch"),
                "job_extra_directives": ["--gres=gpu:1"],
            },
        }
        (tmp_path / "slurm.yaml").write_text(yaml.safe_dump(profile | changes))
        command = [sys.executable, "-c", "from pipeline.cli import main; main()", *map(str, arguments)]
        with (tmp_path / "run.log").open("w") as output:
            process = subprocess.Popen(
                [*command, "--cluster", str(tmp_path / "slurm.yaml")],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                cwd=tmp_path,
                env=os.environ | {"COLUMNS": "400"},
                start_new_session=True,
            )
        runs.append(Run(tmp_path, process, pace))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()
    subprocess.run(["scancel", "--user=root"], check=True)
    paced.wait_until("jobs to end", lambda: not jobs(), 60, str)


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    return write_archive(tmp_path_factory.mktemp("archive") / "frames.zarr", archive_of(SEQUENCES, frames=4))


SETTINGS = ("--metrics", "l2,paced:Paced", "--size", "0", "--block", "1")
IN_ONE = (*SETTINGS[:-1], "20", "--cluster", "none")


@pytest.fixture(scope="module")
def undisturbed(slurm, frames, tmp_path_factory) -> dict[str, np.ndarray]:
    out = tmp_path_factory.mktemp("undisturbed") / "d.zarr"
    code, text = run_lsim("distances", frames, "--out", out, *IN_ONE)
    assert code == 0, text
    return matrices_of(out)


def test_the_demo_while_a_job_is_cancelled_and_replaced(start, tmp_path, capsys):
    catalog = yaml.safe_load((TESTS.parent / "catalogs" / "demo.yaml").read_text())
    for dataset in catalog["datasets"]:
        dataset["source"]["simulate"] |= {"families": 3, "size": 96}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(catalog))
    workflow = yaml.safe_load((TESTS.parent / "workflows" / "demo.yaml").read_text())
    settings = {"metrics": ["l2", "ssim", "vi", "paced:Paced"], "block": 1}
    workflow |= {"catalog": str(tmp_path / "small.yaml"), "distances": settings}
    (tmp_path / "workflow.yaml").write_text(yaml.safe_dump(workflow))
    command = ("run", tmp_path / "workflow.yaml", "--data-dir", tmp_path / "data", "--out")

    run = start(*command, tmp_path / "out")
    run.wait_until("two jobs compute", lambda: len(run.pace.workers()) == 2)
    run.pace.seconds = 4
    first = set(jobs())
    assert run.pace.workers() == first
    cancelled = min(first)
    subprocess.run(["scancel", cancelled], check=True)
    queued = run.wait_until("another job is queued", lambda: bool(jobs().keys() - first))
    computed = run.wait_until("the other job computes", lambda: bool(run.pace.workers() - first))
    text = run.finish()
    with capsys.disabled():
        print(
            f"\na job was cancelled: another queued {queued:.1f} s later, and at work {computed:.1f} s later"
        )
    assert "48 distance matrices computed" in text
    assert cancelled not in jobs()

    code, text = run_lsim(*command, tmp_path / "alone", "--cluster", "none")
    assert code == 0, text
    for name, metric in (("distances.zarr", "paced"), ("matrix.zarr", "lsim-open")):
        keys = store.field_keys(store.open_store(tmp_path / "alone" / name), schema.PARAMETER)
        assert keys
        for key in keys:
            found, alone = (matrices_of(tmp_path / folder / name, key) for folder in ("out", "alone"))
            assert metric in found
            np.testing.assert_equal(found, alone)
    table = (tmp_path / "out" / "results" / "correlation.csv").read_text()
    assert table == (tmp_path / "alone" / "results" / "correlation.csv").read_text()


def test_jobs_told_to_go_or_at_the_end_of_their_lifetime_finish_their_blocks(
    start, frames, undisturbed, tmp_path
):
    short = {"walltime": "00:02:00", "lifetime": "15s", "lifetime_stagger": "2s"}
    run = start("distances", frames, "--out", tmp_path / "d.zarr", *SETTINGS, **short)
    run.wait_until("two jobs compute", lambda: len(run.pace.workers()) == 2)
    told, other = sorted(jobs())[:2]
    shown = subprocess.run(["scontrol", "show", "job", other], capture_output=True, text=True, check=True)
    assert "TimeLimit=00:02:00" in shown.stdout
    # To the job's script and all its processes, as SLURM itself does ahead of the end.
    subprocess.run(["scancel", "--signal=TERM", "--full", told], check=True)
    run.wait_until("the job that was told leaves", lambda: told not in jobs())
    run.wait_until("the other leaves by itself", lambda: other not in jobs())
    run.wait_until("a third job computes", lambda: len(run.pace.workers()) > 2)
    run.finish()
    np.testing.assert_equal(matrices_of(tmp_path / "d.zarr"), undisturbed)
    run.pace.assert_begun_once(SEQUENCES)
