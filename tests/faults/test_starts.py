"""Workers of this machine that are killed or stopped while they start: the run goes on, or says why not."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import lost
import numpy as np
import pytest
from matrices import archive_of, matrices_of, write_archive
from processes import Processes, processes

from pipeline.distances import compute_distances
from pipeline.metrics.settings import Settings
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

pytestmark = pytest.mark.slow_faults

STOPPED_S = 20


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    return write_archive(folder / "frames.zarr", archive_of(4, frames=4, size=16))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Processes]:
    with processes(tmp_path / "run") as made:
        yield made


def start(run: Processes, frames: Path, moment: str, number: int, times: int, timeout: int = 180) -> Path:
    """Start a run whose first workers are lost at a moment, by a signal; returns where its distances go."""
    profile, out = run.folder / "mine.yaml", run.folder / "d.zarr"
    preload = "{preload: [lost, pipeline.workers.cluster]}"
    profile.write_text(f"workers: 1\nstart_timeout: {timeout}\noptions: {preload}\n")
    how = {lost.FOLDER: run.folder, lost.MOMENT: moment, lost.HOW: int(number), lost.TIMES: times}
    command = ("distances", frames, "--out", out, "--metrics", "lost:Loading", "--size", 0)
    run.lsim(*command, "--cluster", profile, **{name: str(value) for name, value in how.items()})
    return out


def assert_whole(run: Processes, frames: Path, out: Path, times: int) -> None:
    """Expect an end in good order, with the bytes of a run that nothing happened to."""
    code, text = run.end(run.started[0])
    assert code == 0, text
    assert "Traceback" not in text
    assert len(lost.lost(run.folder)) == times
    settings, calm = Settings(metrics=("lost:Loading",), size=None), run.folder / "calm.zarr"
    with Cluster(Profile(kind="none")) as cluster:
        compute_distances(frames, calm, settings, cluster=cluster)
    np.testing.assert_array_equal(matrices_of(out)["loading"], matrices_of(calm)["loading"])


@pytest.mark.parametrize("moment", lost.MOMENTS)
def test_a_worker_that_is_killed_while_it_starts_is_started_again(run, frames, moment):
    out = start(run, frames, moment, signal.SIGKILL, 1)
    assert_whole(run, frames, out, 1)


@pytest.mark.parametrize("moment", lost.MOMENTS)
def test_a_worker_that_is_stopped_for_a_while_as_it_starts_goes_on(run, frames, moment):
    out = start(run, frames, moment, signal.SIGSTOP, 1)
    run.wait("a worker that stops", lambda: bool(lost.lost(run.folder)), run.started[0])
    time.sleep(STOPPED_S)
    assert run.started[0].poll() is None, run.said(run.started[0])
    os.kill(lost.lost(run.folder)[0], signal.SIGCONT)
    assert_whole(run, frames, out, 1)


@pytest.mark.parametrize("moment", ["setup", "later", "loading"])
def test_a_worker_that_stops_for_good_as_it_starts_is_replaced(run, frames, moment):
    out = start(run, frames, moment, signal.SIGSTOP, 1, timeout=30)
    assert_whole(run, frames, out, 1)


@pytest.mark.parametrize(("number", "timeout"), [(signal.SIGKILL, 180), (signal.SIGSTOP, 40)])
def test_a_worker_that_is_lost_at_every_start_is_an_error_in_plain_words(run, frames, number, timeout):
    start(run, frames, "setup", number, 9, timeout)
    code, text = run.end(run.started[0])
    assert code == 1, text
    assert "Traceback" not in text
    last = text.splitlines()[-1]
    assert "no workers on this machine: in 3 attempts a process died or did not answer" in last
    assert "--cluster none" in last
    assert len(lost.lost(run.folder)) == 3
