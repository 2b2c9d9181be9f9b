"""Metrics that fail, disks that are full, writers that died: what is sound is kept, the rest is said."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import run_lsim
from matrices import archive_of, matrices_of, write_archive

from pipeline.distances import DistancesReport, compute_distances
from pipeline.metrics.settings import Settings
from pipeline.storage import store
from pipeline.verify import verify
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

KEY = "A/density"


def compute(frames: Path, out: Path, *metrics: str, block: int = 2) -> DistancesReport:
    settings = Settings(metrics=metrics, size=None, block=block)
    with Cluster(Profile(kind="none")) as cluster:
        return compute_distances(frames, out, settings, cluster=cluster)


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """Four sequences, the third of which is constant."""
    archive = archive_of(4, frames=4, size=16)
    archive[KEY]["s2"][:] = 1
    return write_archive(tmp_path / "frames.zarr", archive)


@pytest.mark.parametrize(
    ("metric", "reason", "tried_again"),
    [
        ("raising", "ArithmeticError: no distances of these frames", 1),
        ("void", "the metric gave NaN for 12 of 16 distances of finite frames", 0),
    ],
)
def test_a_metric_that_fails_at_some_frames_fails_there_alone(tmp_path, frames, metric, reason, tried_again):
    out = tmp_path / "d.zarr"
    report = compute(frames, out, f"hindered:{metric.title()}", "l2")
    (failure,) = report.failures
    assert (failure.sequence, failure.metric, failure.reason) == ("s2", metric, reason)
    others = np.delete(matrices_of(out)[metric], 2, axis=0)
    compute(frames, tmp_path / "sound.zarr", "paced:Paced")
    np.testing.assert_array_equal(others, np.delete(matrices_of(tmp_path / "sound.zarr")["paced"], 2, axis=0))
    again = compute(frames, out, f"hindered:{metric.title()}", "l2")
    # NaN is what the metric says of these frames; an exception may have been the machine's.
    assert (again.blocks, again.failures) == (tried_again, report.failures)
    assert verify(out).whole


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own in memory; only root can mount one."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("workers", ["none", "local"])
def test_a_full_disk_is_said_and_the_same_command_goes_on_when_there_is_space(tmp_path, workers):
    if os.geteuid() != 0:
        pytest.skip("a small file system is mounted by root alone")
    frames = write_archive(tmp_path / "frames.zarr", archive_of(12, frames=24, size=16))
    compute(frames, tmp_path / "undisturbed.zarr", "l2", "l1")
    where = ("--cluster", "none") if workers == "none" else ("--workers", "1")
    arguments = ("--metrics", "l2,l1", "--size", "0", "--block", "2")
    with small_disk(tmp_path / "disk", "1m") as disk:
        filler = disk / "other_data"
        filler.write_bytes(bytes(860 * 1024))
        out = disk / "d.zarr"
        code, text = run_lsim("distances", frames, "--out", out, *arguments, *where)
        assert code == 1, text
        assert f"error: {out}: No space left on device" in text
        assert "run the same command again" in text
        assert workers == "local" or "Traceback" not in text  # Dask's workers log what a task raised
        with contextlib.suppress(store.StoreError):  # it may have been full before there was a store
            assert verify(out).whole, verify(out).damages

        filler.unlink()
        code, text = run_lsim("distances", frames, "--out", out, *arguments, "--cluster", "none")
        assert code == 0, text
        for name, matrices in matrices_of(tmp_path / "undisturbed.zarr").items():
            np.testing.assert_array_equal(matrices_of(out)[name], matrices)
        assert verify(out).whole


def test_what_a_writer_left_half_written_is_nobodys_distances(tmp_path, frames):
    """A left-over of an atomic write is no chunk; a chunk that is cut short is no distance."""
    out = tmp_path / "d.zarr"
    compute(frames, out, "l2")
    undisturbed = matrices_of(out)["l2"]
    chunk = out / KEY / "l2" / "c" / "1" / "0" / "0"
    (chunk.parent / "0.1f2e3d.partial").write_bytes(chunk.read_bytes()[:40])
    report = compute(frames, out, "l2", "l1")
    assert (report.computed, report.up_to_date, report.failures) == (4, 4, [])
    np.testing.assert_array_equal(matrices_of(out)["l2"], undisturbed)
    assert verify(out).whole

    chunk.write_bytes(chunk.read_bytes()[:40])
    assert [damage.chunk for damage in verify(out).damages] == ["c/1/0/0"]
    code, text = run_lsim("verify", out, "--repair")
    assert code == 1, text
    assert compute(frames, out, "l2", "l1").computed == 2
    np.testing.assert_array_equal(matrices_of(out)["l2"], undisturbed)
    assert verify(out).whole
