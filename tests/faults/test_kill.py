"""kill -9 in mid-run: a second run ends with the bytes of an undisturbed one, and computes no block twice.

Attempts are counted on disk: a chunk that the first run finished keeps its time of writing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import run_lsim
from matrices import archive_of, matrices_of, write_archive

from pipeline.distances import compute_distances
from pipeline.metrics.settings import Settings
from pipeline.storage import schema, store
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

METRICS = ("l2", "ssim", "vi")
SEQUENCES = 40
SIZE = 40
SETTINGS = Settings(metrics=METRICS, size=SIZE, block=1)
TOTAL = SEQUENCES * len(METRICS)


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    return write_archive(tmp_path_factory.mktemp("archive") / "frames.zarr", archive_of(SEQUENCES, frames=8))


@pytest.fixture(scope="module")
def undisturbed(frames, tmp_path_factory) -> dict[str, np.ndarray]:
    out = tmp_path_factory.mktemp("undisturbed") / "d.zarr"
    with Cluster(Profile(kind="none")) as cluster:
        compute_distances(frames, out, SETTINGS, cluster=cluster)
    return matrices_of(out)


def arguments(frames: Path, out: Path) -> list[str]:
    command = ["distances", frames, "--out", out, "--metrics", ",".join(METRICS), "--size", SIZE]
    return [*map(str, command), "--block", "1"]


def go_on(frames: Path, out: Path) -> str:
    """What the same command says, run again without workers."""
    code, text = run_lsim(*arguments(frames, out), "--cluster", "none")
    assert code == 0, text
    return text


def start(frames: Path, out: Path, workers: int = 2) -> subprocess.Popen:
    # Records are written often, so that some are there long before the run is over.
    command = "from pipeline.stage import row_records; row_records.FLUSH_S = 0.1"
    command = f"{command}; from pipeline.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", command, *arguments(frames, out), "--workers", str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # What a shell starts in the background ignores Ctrl-C, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def fingerprints(out: Path) -> np.ndarray:
    """Recorded fingerprints (metric, sequence), empty before the store is laid out."""
    try:
        group = store.get_group(store.open_store(out), "A/density/provenance")
        return store.read(store.get_array(group, schema.FINGERPRINT))
    except store.StoreError:
        return np.empty((0, 0), dtype=object)


def wait_until_some_are_done(out: Path, process: subprocess.Popen, share: float = 0.15) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (fingerprints(out) != "").sum() > share * TOTAL:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError("nothing was computed in two minutes")


def chunk_times(out: Path) -> dict[str, int]:
    """Modification time of every chunk of every metric, by path."""
    folder = out / "A" / "density"
    return {
        str(chunk.relative_to(folder)): chunk.stat().st_mtime_ns
        for name in METRICS
        for chunk in (folder / name / "c").rglob("*")
        if chunk.is_file() and chunk.name.isdigit()
    }


def assert_identical(out: Path, undisturbed: dict[str, np.ndarray]) -> None:
    found = matrices_of(out)
    assert found.keys() == undisturbed.keys()
    for name, matrices in undisturbed.items():
        np.testing.assert_array_equal(found[name], matrices, err_msg=name)


def test_driver_killed_then_run_again(tmp_path, frames, undisturbed):
    out = tmp_path / "d.zarr"
    process = start(frames, out, workers=1)
    wait_until_some_are_done(out, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = fingerprints(out) != ""
    times = chunk_times(out)
    assert 0 < done.sum() < TOTAL, "the run was over before it was killed: nothing was tested"

    text = go_on(frames, out)
    assert f"{TOTAL - done.sum()} distance matrices computed, {done.sum()} up to date" in text
    later = chunk_times(out)
    names = [str(name) for name in store.open_dataset(out, "A/density/provenance")["metric"].values]
    for index, name in enumerate(names):
        for row in np.flatnonzero(done[index]):
            path = f"{name}/c/{row}/0/0"
            assert later[path] == times[path], f"{path} was finished and computed again"
    assert_identical(out, undisturbed)


def test_worker_killed_in_mid_run(tmp_path, frames, undisturbed):
    out = tmp_path / "d.zarr"
    process = start(frames, out)
    wait_until_some_are_done(out, process)
    workers = children(process.pid)
    assert workers, "no worker processes found"
    os.kill(workers[0], signal.SIGKILL)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    assert_identical(out, undisturbed)

    times = chunk_times(out)
    assert "nothing to do" in go_on(frames, out)
    assert chunk_times(out) == times


def test_interrupt_stops_cleanly_and_says_how_to_go_on(tmp_path, frames, undisturbed):
    out = tmp_path / "d.zarr"
    process = start(frames, out, workers=1)
    wait_until_some_are_done(out, process)
    os.killpg(process.pid, signal.SIGINT)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 130, text
    assert "run the same command again" in text
    assert "Traceback" not in text
    go_on(frames, out)
    assert_identical(out, undisturbed)


def children(pid: int) -> list[int]:
    """Processes started by ``pid`` that compute: Dask's spawned workers, not its resource tracker."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (entry / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid and b"spawn_main" in command:
            found.append(int(entry.name))
    return sorted(found)
