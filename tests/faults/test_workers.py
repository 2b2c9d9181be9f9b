"""Workers, schedulers and drivers that die: the run ends with the bytes of an undisturbed one.

Attempts are counted on disk: a metric of the test's own writes down each sequence that it begins and ends.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hindered import BROKEN
from matrices import archive_of, matrices_of, write_archive
from processes import Processes, children, done, processes

SEQUENCES = 16
KEY = "A/density"


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    return write_archive(folder / "frames.zarr", archive_of(SEQUENCES, frames=4, size=16))


@pytest.fixture(scope="module")
def undisturbed(frames: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """What a run in one process gives, whichever of the tests' metrics it is."""
    with processes(tmp_path_factory.mktemp("undisturbed")) as run:
        out = run.folder / "d.zarr"
        code, text = run.lsim_here(*arguments(frames, out), "--cluster", "none")
        assert code == 0, text
        return matrices_of(out)["paced"]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Processes]:
    with processes(tmp_path / "run") as made:
        yield made


def arguments(frames: Path, out: Path, metric: str = "paced:Paced") -> tuple[object, ...]:
    few = ("--metrics", metric, "--size", 0, "--block", 1)
    return ("distances", frames, "--out", out, *few)


def assert_as_undisturbed(out: Path, undisturbed: np.ndarray, metric: str = "paced") -> None:
    np.testing.assert_array_equal(matrices_of(out)[metric], undisturbed)


def attempts(run: Processes) -> list[int]:
    """How often each sequence was begun, sorted."""
    return sorted(Counter(sequence for sequence, _ in run.pace.lines("begin")).values())


def test_a_metric_that_cannot_be_set_up_on_one_worker_is_computed_by_the_others(run, frames, undisturbed):
    _, address = run.scheduler()
    broken = run.worker(address, "broken", **{BROKEN: "1"})
    run.worker(address, "sound", nanny=False)
    run.wait("two workers", lambda: run.said(broken).count("Registered to") == 1, broken)
    run.wait("two workers", lambda: "Registered to" in run.said(run.started[-1]))
    out = run.folder / "d.zarr"
    code, text = run.lsim_here(*arguments(frames, out, "hindered:Unfit"), "--cluster", address)
    assert code == 0, text
    assert "left out: worker" in text
    assert "cannot load metric 'hindered:Unfit': RuntimeError: no such device on this machine" in text
    assert run.pace.workers() == {"sound"}
    assert attempts(run) == [1] * SEQUENCES
    assert_as_undisturbed(out, undisturbed, "unfit")
    run.end(broken)  # sent away, and not started again by its nanny


def test_a_metric_that_no_worker_can_set_up_is_an_error(run, frames):
    _, address = run.scheduler()
    run.worker(address, "broken", nanny=False, **{BROKEN: "1"})
    out = run.folder / "d.zarr"
    code, text = run.lsim_here(*arguments(frames, out, "hindered:Unfit"), "--cluster", address)
    assert code == 1, text
    assert "error: worker" in text
    assert "no such device on this machine" in text
    assert "Traceback" not in text


def test_a_second_driver_is_refused_and_the_first_ends_right(run, frames, undisturbed):
    out = run.folder / "d.zarr"
    run.pace.seconds = 0.5
    first = run.lsim(*arguments(frames, out), "--cluster", "none")
    run.wait("some matrices", lambda: done(out) > 0, first)
    code, text = run.lsim_here(*arguments(frames, out), "--cluster", "none")
    assert code == 1, text
    assert "another run" in text
    assert "Traceback" not in text
    run.pace.seconds = 0
    code, text = run.end(first)
    assert code == 0, text
    assert attempts(run) == [1] * SEQUENCES
    assert_as_undisturbed(out, undisturbed)


def test_a_driver_that_a_batch_system_ends_finishes_what_runs(run, frames, undisturbed):
    out = run.folder / "d.zarr"
    run.pace.seconds = 0.5
    first = run.lsim(*arguments(frames, out), "--workers", "1")
    run.wait("some matrices", lambda: done(out) > 2, first)
    os.kill(first.pid, signal.SIGTERM)
    code, text = run.end(first)
    assert code == 143, text
    assert "run the same command again" in text
    assert "Traceback" not in text
    assert not set(run.pace.lines("begin")) - set(run.pace.lines("end"))
    there, ended = done(out), len(run.pace.lines("end"))
    # A task that begins in the moment of the signal may be let go.
    assert ended - 1 <= there <= ended < SEQUENCES
    run.pace.seconds = 0
    code, text = run.lsim_here(*arguments(frames, out), "--cluster", "none")
    assert code == 0, text
    assert f"{SEQUENCES - there} distance matrices computed, {there} up to date" in text
    assert sum(attempts(run)) == SEQUENCES + ended - there
    assert_as_undisturbed(out, undisturbed)


@pytest.mark.slow_faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_leaves_costs_the_block_that_it_held_at_most(run, frames, undisturbed, number):
    """Killed with its nanny, or told to go by a batch system: then it finishes its block first."""
    _, address = run.scheduler()
    first, second = run.worker(address, "first"), run.worker(address, "second")
    out = run.folder / "d.zarr"
    run.pace.seconds = 0.5
    driver = run.lsim(*arguments(frames, out), "--cluster", address)
    run.wait("both workers' work", lambda: run.pace.workers() == {"first", "second"}, driver)
    if number == signal.SIGKILL:
        # The nanny first: it would start another worker.
        workers = children(first.pid)
        assert workers
        os.kill(first.pid, number)
        for worker in workers:
            os.kill(worker, number)
    else:
        os.killpg(first.pid, number)
        run.end(first)
    run.pace.seconds = 0
    code, text = run.end(driver)
    assert code == 0, text
    assert_as_undisturbed(out, undisturbed)
    again = sum(attempts(run)) - SEQUENCES
    assert again == 0 if number == signal.SIGTERM else again <= 1
    assert second.poll() is None


@pytest.mark.slow_faults
def test_a_scheduler_that_dies_ends_the_run_and_a_new_one_goes_on(run, frames, undisturbed):
    scheduler, address = run.scheduler()
    run.worker(address, "first")
    out = run.folder / "d.zarr"
    run.pace.seconds = 0.5
    driver = run.lsim(*arguments(frames, out), "--cluster", address)
    run.wait("some matrices", lambda: done(out) > 2, driver)
    run.kill(scheduler)
    code, text = run.end(driver)
    assert code == 1, text
    last = text.splitlines()[-1]  # Dask's client has logged what it saw before
    assert last.startswith("error: lost the scheduler"), text
    assert "run the same command again" in last
    for process in run.started[1:2]:
        if process.poll() is None:
            run.kill(process)
    there = done(out)
    run.pace.seconds = 0
    _, address = run.scheduler()
    run.worker(address, "second")
    code, text = run.end(run.lsim(*arguments(frames, out), "--cluster", address))
    assert code == 0, text
    assert f"{SEQUENCES - there} distance matrices computed, {there} up to date" in text
    assert_as_undisturbed(out, undisturbed)
    assert sum(attempts(run)) <= SEQUENCES + 1


@pytest.mark.slow_faults
def test_a_driver_that_is_killed_twice_in_a_row(run, frames, undisturbed):
    out = run.folder / "d.zarr"
    for wanted in (3, 6):
        run.pace.seconds = 0.5
        driver = run.lsim(*arguments(frames, out), "--workers", "2")
        run.wait("some matrices", lambda wanted=wanted: done(out) >= wanted, driver)
        run.kill(driver)
        run.wait("its workers' end", lambda pid=driver.pid: not _in_session(pid))
    run.pace.seconds = 0
    there = done(out)
    code, text = run.end(run.lsim(*arguments(frames, out), "--workers", "2"))
    assert code == 0, text
    assert f"{SEQUENCES - there} distance matrices computed, {there} up to date" in text
    assert_as_undisturbed(out, undisturbed)
    # Two workers held a block each, twice.
    assert sum(attempts(run)) <= SEQUENCES + 4


def _in_session(session: int) -> bool:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, found = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            except OSError:
                continue
            if int(found) == session and state != "Z":
                return True
    return False


@pytest.mark.slow_faults
def test_a_block_that_kills_every_worker_is_reported_and_all_else_is_done(run, tmp_path):
    archive = archive_of(6, frames=4, size=16)
    archive[KEY]["s2"][:] = 1
    frames = write_archive(tmp_path / "frames.zarr", archive)
    out = run.folder / "d.zarr"
    command = (*arguments(frames, out, "hindered:Deadly"), "--workers", "2")
    code, text = run.end(run.lsim(*command))
    assert code == 3, text
    assert "workers died while they computed it" in text
    assert "Traceback" not in text
    assert len(run.pace.lines("deadly")) == 4  # allowed failures, and one more
    found = matrices_of(out)["deadly"]
    assert np.isnan(found[2]).all()
    assert not np.isnan(np.delete(found, 2, axis=0)).any()
    assert done(out) == 5
