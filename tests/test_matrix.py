"""One matrix over an archive: equal to the library, the same bytes whoever computes, planned and bounded."""

from __future__ import annotations

import contextlib
import errno
import os
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from commands import run_lsim
from matrices import archive_of, smooth_sequence, write_archive

import lsim
from lsim.embedding import Embedding
from lsim.metrics.pixel import L2
from lsim.metrics.structural import SSIM
from pipeline.matrix import MatrixRequest, compute_matrix, job
from pipeline.matrix.embedding_cache import EmbeddedBlock, EmbeddingCache
from pipeline.matrix.frame_blocks import list_frames
from pipeline.matrix.machines import shared_memory_profile
from pipeline.matrix.measuring import Device, share_of_device
from pipeline.matrix.plan import PlanError, order_squares, simulate_embeddings
from pipeline.matrix.tiles import TileTask, _Record, compare_blocks
from pipeline.metrics.settings import Settings
from pipeline.stage import run
from pipeline.storage import schema, store
from pipeline.workers import sigterm
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile, WorkerRange

SETTINGS = Settings(metrics=("l2", "ssim"), size=None, scope="dataset")
RANGE = (-1.5, 1.5)


def compute(
    frames: Path, out: Path, settings: Settings = SETTINGS, matrix: MatrixRequest | None = None, **options
):
    """In this process, without workers."""
    with Cluster(Profile(kind="none")) as cluster:
        return compute_matrix(
            frames, out, settings, matrix or MatrixRequest(tile=8), cluster=cluster, **options
        )


def matrices(path: Path, key: str = "A/density") -> dict[str, np.ndarray]:
    dataset = store.open_dataset(path, key)
    return {name: dataset[name].values for name in schema.matrix_metric_names(map(str, dataset.variables))}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, values in a.items():
        np.testing.assert_array_equal(values, b[name], err_msg=name)


def all_frames(archive: dict[str, dict[str, np.ndarray]], key: str = "A/density") -> np.ndarray:
    return np.concatenate(list(archive[key].values()))


def written(path: Path, key: str = "A/density", metric: str = "l2") -> dict[str, tuple[int, int]]:
    """Inode and time of every chunk of a matrix."""
    found = {}
    for chunk in (path / key / metric / "c").rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a chunk in the making, renamed in the meantime
            if chunk.is_file() and not chunk.name.endswith(".partial"):
                status = chunk.stat()
                found[str(chunk.relative_to(path / key / metric / "c"))] = (status.st_ino, status.st_mtime_ns)
    return found


def flip_a_bit(frames: Path, row: int) -> None:
    """Damage a sequence of A/density."""
    chunk = next(p for p in sorted((frames / f"A/density/frames/c/{row}").rglob("*")) if p.is_file())
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)


# ---------------------------------------------------------------- values


def test_distances_are_those_of_the_library_and_the_store_is_valid(tmp_path):
    archive = archive_of(3, frames=4)  # blocks of 8 and 4
    frames = write_archive(tmp_path / "frames.zarr", archive)
    metrics = ("l1", "l2", "correlation", "psnr", "ssim", "vi", "fft", "wasserstein", "lsim-open")
    settings = Settings(metrics=metrics, size=48, scope=RANGE)
    report = compute(frames, tmp_path / "a.zarr", settings)
    assert not report.failures
    with xr.open_datatree(tmp_path / "a.zarr", engine="zarr") as tree:
        group = tree["A/density"].to_dataset()
        schema.validate_matrix(group, "A/density")
        assert list(group["sequence"].values[::4]) == ["s0", "s1", "s2"]
        assert list(group["number"].values[:6]) == [0, 1, 2, 3, 0, 1]
        assert set(group["field"].values) == {"A/density"}
        np.testing.assert_array_equal(group["parameter"].values[:4], np.linspace(0, 1, 4))
        assert set(tree["A/density/provenance"]["metric"].values) == set(metrics)
        for name in metrics:
            expected = (
                lsim.load_metric(name, size=48).symmetrised().pairwise(all_frames(archive), scope=RANGE)
            )
            np.fill_diagonal(expected, 0)
            np.testing.assert_array_equal(group[name].values, expected.astype(np.float32), err_msg=name)
    assert tree.attrs["kind"] == schema.MATRIX_STORE
    assert "12 frames" in tree.attrs["plan"][0]


def test_same_bytes_whatever_the_tile_and_the_memory(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(3, frames=4))
    settings = Settings(metrics=("l2", "ssim", "lsim-open"), size=48, scope="dataset")
    expected = compute(frames, tmp_path / "8.zarr", settings)
    assert expected.embeddings == 2 * 12 + 12  # each family once
    for tile in (3, 64):
        compute(frames, tmp_path / f"{tile}.zarr", settings, MatrixRequest(tile=tile))
        same(matrices(tmp_path / "8.zarr"), matrices(tmp_path / f"{tile}.zarr"))


@pytest.fixture
def two_threads() -> Iterator[Cluster]:
    """One worker process with two threads, which share what is embedded."""
    with Cluster(Profile(workers=1, threads=2)) as cluster:
        yield cluster


@pytest.mark.parametrize("workers", ["two_threads", "two_workers"])
def test_same_bytes_whatever_the_workers(tmp_path, request, workers):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(4, frames=4))
    settings = Settings(metrics=("l2", "lsim-open"), size=48, scope="dataset")
    compute(frames, tmp_path / "alone.zarr", settings)
    cluster = request.getfixturevalue(workers)
    report = compute_matrix(frames, tmp_path / "many.zarr", settings, MatrixRequest(tile=4), cluster=cluster)
    same(matrices(tmp_path / "alone.zarr"), matrices(tmp_path / "many.zarr"))
    assert report.embeddings == 32 if workers == "two_threads" else report.embeddings <= 64
    again = compute_matrix(frames, tmp_path / "many.zarr", settings, cluster=cluster)
    assert (again.tiles, again.up_to_date, again.plans) == (0, 2 * 10, [])


def test_fields_together_are_one_matrix(tmp_path):
    archive = archive_of(2) | archive_of(2, key="B/pressure", start=5) | archive_of(1, key="B/velocity")
    frames = write_archive(tmp_path / "frames.zarr", archive)
    chosen = MatrixRequest(("A/*", "B/pressure"), together="both", tile=8)
    compute(frames, tmp_path / "a.zarr", matrix=chosen)
    every = np.concatenate([all_frames(archive), all_frames(archive, "B/pressure")])
    fixed = (float(every.min()), float(every.max()))
    found = store.open_dataset(tmp_path / "a.zarr", "together/both")
    assert list(found["field"].values) == ["A/density"] * 10 + ["B/pressure"] * 10
    expected = lsim.load_metric("l2", size=None).pairwise(every, scope=fixed)
    np.testing.assert_array_equal(found["l2"].values, expected.astype(np.float32))
    root = store.open_store(tmp_path / "a.zarr")
    assert store.field_keys(root, schema.NUMBER) == ["together/both"]


def test_distances_keep_their_promise_of_precision(tmp_path):
    """Against differences in double of the same features; within 1e-5 above a thousandth of the median."""
    near = np.concatenate([smooth_sequence(k, frames=6) for k in range(6)])
    near[1::2] = near[::2] * (1 + 1e-5)
    frames = write_archive(
        tmp_path / "frames.zarr", {"A/density": dict(zip("abc", near.reshape(3, 12, 40, 40, 1), strict=True))}
    )
    settings = Settings(metrics=("lsim-open", "l2"), size=64, scope=RANGE)
    compute(frames, tmp_path / "a.zarr", settings)
    found = matrices(tmp_path / "a.zarr")
    metric = lsim.load_metric("lsim-open", size=64)
    with torch.no_grad():
        features = metric.embed_prepared(metric.prepare(near, RANGE)).parts["features"].double().numpy()
    expected = np.sqrt(np.stack([np.square(features - row).sum(1) for row in features]))
    off = np.abs(found["lsim-open"] - expected) / np.where(expected > 0, expected, 1)
    judged = expected > 1e-3 * np.median(expected[expected > 0])
    assert judged.sum() > 36 * 30
    assert off[judged].max() < 1e-5
    assert off.max() < 1e-6  # differences, not products: near frames, too


def test_products_of_matrices_keep_the_promise_too(monkeypatch):
    """The way of a GPU, taken on the CPU."""
    metric = lsim.load_metric("lsim-open", size=64, device="cpu")
    near = np.concatenate([smooth_sequence(k, frames=6) for k in range(6)])
    near[1::2] = near[::2] * (1 + 1e-5)
    with torch.no_grad():
        features = metric.embed_prepared(metric.prepare(near, RANGE)).parts["features"]
    halves = [
        EmbeddedBlock(Embedding({"features": part.clone()}), np.ones(18, bool)) for part in features.split(18)
    ]
    direct = compare_blocks(metric, *halves)
    monkeypatch.setattr("lsim.pairs.has_kernel", lambda *tensors: False)
    products = compare_blocks(metric, *halves)
    itself = compare_blocks(metric, halves[0], halves[0])
    np.testing.assert_allclose(products, direct, rtol=1e-5)
    np.testing.assert_array_equal(itself, itself.T)
    assert metric.take_precision().bound <= 1e-5


# ---------------------------------------------------------------- up to date


def test_new_sequences_metrics_and_contents_are_computed_alone(tmp_path):
    archive = archive_of(4)  # 20 frames, blocks of 8, 8 and 4
    frames = write_archive(tmp_path / "frames.zarr", archive)
    out = tmp_path / "a.zarr"
    compute(frames, out)
    assert compute(frames, out).tiles == 0
    report = compute(frames, out, SETTINGS.model_copy(update={"metrics": ("l2", "ssim", "l1")}))
    assert (report.tiles, report.up_to_date) == (6, 12)
    # A sequence in the last block alone, within the range that is there: only that block's tiles.
    before = written(out)
    archive["A/density"]["s3"] = np.clip(smooth_sequence(9), -1.0, 1.0)
    write_archive(frames, archive)
    report = compute(frames, out, SETTINGS.model_copy(update={"scope": RANGE}))
    assert report.tiles == 12  # another scope is another distance
    before = written(out)
    archive["A/density"]["s3"] = np.clip(smooth_sequence(11), -1.0, 1.0)
    write_archive(frames, archive)
    report = compute(frames, out, SETTINGS.model_copy(update={"scope": RANGE}))
    assert (report.tiles, report.up_to_date) == (2 * 5, 2 * 1)  # frames 15 to 19: blocks 1 and 2
    after = written(out)
    assert {name for name in after if after[name] == before[name]} == {"0/0"}
    # The metric that was not computed has lost its claim to those tiles, and only to those.
    recorded = store.read(store.get_array(store.open_store(out), "A/density/provenance/fingerprint"))
    names = list(store.read(store.get_array(store.open_store(out), "A/density/provenance/metric")))
    assert (recorded[names.index("l1")] != "").sum() == 1
    archive |= {"A/density": archive["A/density"] | {"s4": smooth_sequence(12)}}
    write_archive(frames, archive)
    fresh = SETTINGS.model_copy(update={"scope": RANGE})
    report = compute(frames, out, fresh)
    assert report.up_to_date == 2 * 3
    compute(frames, tmp_path / "anew.zarr", fresh)
    found, expected = matrices(out), matrices(tmp_path / "anew.zarr")
    assert found.pop("l1").shape == (25, 25)
    same(found, expected)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(5))  # 25 frames: 4 blocks
    compute(frames, tmp_path / "whole.zarr")

    def stop_at_two(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute(frames, tmp_path / "a.zarr", progress=stop_at_two)
    before = written(tmp_path / "a.zarr")
    report = compute(frames, tmp_path / "a.zarr")
    assert report.up_to_date
    assert report.tiles + report.up_to_date == 2 * 10
    after = written(tmp_path / "a.zarr")
    kept = [name for name in before if before[name] == after[name]]
    assert len(kept) == len(before)  # nothing was computed twice
    same(matrices(tmp_path / "whole.zarr"), matrices(tmp_path / "a.zarr"))


def test_a_run_in_this_process_that_is_told_to_end_does_so_between_tiles(tmp_path, monkeypatch):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(4))
    out = tmp_path / "a.zarr"
    monkeypatch.setattr("pipeline.workers.sigterm.requested", lambda: len(written(out)) >= 3)
    with pytest.raises(sigterm.Stopped):
        compute(frames, out, matrix=MatrixRequest(tile=4))
    monkeypatch.undo()
    assert len(written(out)) == 3  # a tile on the diagonal, and one with its mirror image
    report = compute(frames, out, matrix=MatrixRequest())
    assert report.up_to_date == 2
    assert report.tiles == 2 * 15 - 2
    compute(frames, tmp_path / "whole.zarr", matrix=MatrixRequest(tile=4))
    same(matrices(tmp_path / "whole.zarr"), matrices(out))


def test_a_driver_that_is_killed_costs_the_tiles_in_hand(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(6, frames=4, size=16))
    out = tmp_path / "a.zarr"
    code = f"""
    from pipeline.matrix import MatrixRequest, compute_matrix
    from pipeline.metrics.settings import Settings
    from pipeline.workers.cluster import Cluster
    from pipeline.workers.profiles import Profile
    settings = Settings(metrics=("l2", "ssim"), size=None, scope="dataset")
    with Cluster(Profile(kind="none")) as cluster:
        compute_matrix({str(frames)!r}, {str(out)!r}, settings, MatrixRequest(tile=2), cluster=cluster)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (out / "A/density/l2").is_dir() and len(written(out)) > 8:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    report = compute(frames, out, matrix=MatrixRequest())
    assert report.up_to_date
    assert report.tiles
    compute(frames, tmp_path / "whole.zarr", matrix=MatrixRequest(tile=2))
    same(matrices(tmp_path / "whole.zarr"), matrices(out))


# ---------------------------------------------------------------- what cannot be compared


def test_an_archive_that_shrinks_and_grows_again_has_all_its_distances(tmp_path):
    four = archive_of(4, frames=4, size=16)
    three = {"A/density": {name: frames for name, frames in four["A/density"].items() if name != "s3"}}
    for archive in (four, three, four):
        frames = write_archive(tmp_path / "frames.zarr", archive)
        compute(frames, tmp_path / "a.zarr", matrix=MatrixRequest(tile=4))
    compute(frames, tmp_path / "new.zarr", matrix=MatrixRequest(tile=4))
    same(matrices(tmp_path / "a.zarr"), matrices(tmp_path / "new.zarr"))


def test_equal_sequences_are_as_far_apart_in_one_tile_as_in_two(tmp_path):
    twice = smooth_sequence(0, frames=4)
    frames = write_archive(tmp_path / "frames.zarr", {"A/density": {"s0": twice, "s1": twice.copy()}})
    settings = SETTINGS.model_copy(update={"metrics": ("psnr",)})
    for tile in (4, 8):
        compute(frames, tmp_path / f"{tile}.zarr", settings, MatrixRequest(tile=tile))
    same(matrices(tmp_path / "4.zarr"), matrices(tmp_path / "8.zarr"))
    assert matrices(tmp_path / "4.zarr")["psnr"][0, 4] == -np.inf


def test_a_frame_at_which_a_metric_raises_costs_its_own_distances_alone(tmp_path, monkeypatch):
    archive = archive_of(4, frames=8, size=16)
    archive["A/density"]["s2"][3] = 0.5
    frames = write_archive(tmp_path / "frames.zarr", archive)
    settings = SETTINGS.model_copy(update={"metrics": ("l2",), "scope": RANGE})
    compute(frames, tmp_path / "whole.zarr", settings)
    embed = L2.embed

    def raising(self, frames):
        if (frames.flatten(1).std(1) == 0).any():
            raise ArithmeticError("no contrast")
        return embed(self, frames)

    monkeypatch.setattr(L2, "embed", raising)
    for _ in range(2):  # the next run tries again, and is no worse
        report = compute(frames, tmp_path / "a.zarr", settings)
        assert report.tiles + report.up_to_date == 6
        assert any("s2: frame 3" in one.what and "no contrast" in one.reason for one in report.failures)
        found, whole = (matrices(tmp_path / name)["l2"] for name in ("a.zarr", "whole.zarr"))
        bad = 2 * 8 + 3
        assert np.isnan(np.delete(found[bad], bad)).all()
        np.testing.assert_array_equal(
            *(np.delete(np.delete(one, bad, 0), bad, 1) for one in (found, whole)),
        )
    monkeypatch.undo()
    assert compute(frames, tmp_path / "a.zarr", settings).failures == []
    same(matrices(tmp_path / "a.zarr"), matrices(tmp_path / "whole.zarr"))


def test_a_metric_that_always_raises_costs_no_other(tmp_path, monkeypatch):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(2, frames=4))

    def raising(self, frames):
        raise ArithmeticError("never")

    compute(frames, tmp_path / "l2.zarr", SETTINGS.model_copy(update={"metrics": ("l2",)}))
    monkeypatch.setattr(SSIM, "embed", raising)
    told: list[str] = []
    report = compute(frames, tmp_path / "a.zarr", announce=told.append)
    assert "could not be measured, and counts as nothing: ssim: ArithmeticError: never" in told[0]
    assert {one.metric for one in report.failures} == {"ssim"}
    np.testing.assert_array_equal(matrices(tmp_path / "a.zarr")["l2"], matrices(tmp_path / "l2.zarr")["l2"])


def test_frames_that_fail_together_and_not_alone_are_compared_and_a_warning_says_so(
    tmp_path, monkeypatch, caplog
):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(2, frames=4))
    settings = SETTINGS.model_copy(update={"metrics": ("l2",)})
    compute(frames, tmp_path / "whole.zarr", settings)
    embed = L2.embed

    def one_at_a_time(self, frames):
        if len(frames) > 1:
            raise RuntimeError("no room for so many")
        return embed(self, frames)

    monkeypatch.setattr(L2, "embed", one_at_a_time)
    assert compute(frames, tmp_path / "a.zarr", settings).failures == []
    same(matrices(tmp_path / "a.zarr"), matrices(tmp_path / "whole.zarr"))
    because = "l2: 8 frames at once failed (RuntimeError: no room for so many)"
    assert f"{because}, and went well one by one" in caplog.text
    assert f"{because}, so the metric is tried on one of them" in caplog.text


def test_frames_with_nan_are_said_and_the_others_compared(tmp_path):
    archive = archive_of(3)
    archive["A/density"]["s1"][2, 3, 4] = np.nan
    frames = write_archive(tmp_path / "frames.zarr", archive)
    arguments = ("--metrics", "l2", "--scope=-2,2", "--size", 0, "--cluster", "none")
    code, text = run_lsim("matrix", frames, "--out", tmp_path / "a.zarr", *arguments)
    assert code == 3
    assert "15 frames" in text
    assert "A/density/s1: frame 2" in text
    assert "NaN" in text
    found = matrices(tmp_path / "a.zarr")["l2"]
    bad = np.isnan(found)
    assert bad[7].all()
    assert bad[:, 7].all()
    assert bad.sum() == 15 + 14
    schema.validate_matrix(store.open_dataset(tmp_path / "a.zarr", "A/density"), "A/density")


def test_a_damaged_sequence_is_left_out_until_it_is_mended(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(4))
    settings = SETTINGS.model_copy(update={"scope": RANGE})
    compute(frames, tmp_path / "whole.zarr", settings)
    shutil.copytree(frames, tmp_path / "sound.zarr")
    flip_a_bit(frames, 1)
    report = compute(frames, tmp_path / "a.zarr", settings)
    assert {entry.metric for entry in report.failures} == {"l2", "ssim"}
    assert all("A/density/s1" in entry.what for entry in report.failures)
    assert report.tiles == 2  # of blocks 0, 1, 2 only the last holds nothing of frames 5 to 9
    found = matrices(tmp_path / "a.zarr")["l2"]
    assert np.isnan(found[5:10]).all()
    assert not np.isnan(np.delete(np.delete(found, range(5, 10), 0), range(5, 10), 1)).any()
    shutil.rmtree(frames)
    shutil.copytree(tmp_path / "sound.zarr", frames)
    report = compute(frames, tmp_path / "a.zarr", settings)
    assert not report.failures
    assert report.tiles == 10
    same(matrices(tmp_path / "whole.zarr"), matrices(tmp_path / "a.zarr"))


def test_a_damaged_frame_is_said_where_the_tiles_of_its_block_alone_were_done(tmp_path):
    """The tile of a block with itself, which tells of its frames, is up to date."""
    archive = archive_of(3, frames=8)
    frames = write_archive(tmp_path / "frames.zarr", archive)
    settings = Settings(metrics=("l2",), size=None, scope=RANGE)
    compute(frames, tmp_path / "a.zarr", settings)
    archive["A/density"]["s3"] = smooth_sequence(3, frames=8)
    write_archive(frames, archive)
    flip_a_bit(frames, 0)
    report = compute(frames, tmp_path / "a.zarr", settings)
    assert (report.tiles, report.up_to_date) == (3, 6)
    assert np.isnan(matrices(tmp_path / "a.zarr")["l2"][:8, 24:]).all()
    (failure,) = report.failures
    assert failure.what.endswith(": 1 tiles")
    assert "frames" in failure.reason


def test_two_attempts_at_a_task_that_write_at_once_leave_what_each_has_done(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(8, frames=8))
    compute(frames, tmp_path / "a.zarr")
    group = store.get_group(store.open_store(tmp_path / "a.zarr", "r+"), "A/density")
    fingerprints = store.get_array(group, "provenance/fingerprint")
    before = store.read(fingerprints)
    record = _Record(group, 0, [(0, 0), (0, 1)])
    record.write((0, 0), "first", "one", 1)
    store.write_rows(fingerprints, 0, before)  # by an attempt that read before
    record.write((0, 1), "second", "two", 2)
    assert store.read(fingerprints)[0, 0, :2].tolist() == ["first", "second"]
    assert store.read(store.get_array(group, "provenance/missing"))[0, 0, :2].tolist() == [1, 2]


def test_a_task_that_nobody_waits_for_writes_nothing(tmp_path, monkeypatch):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(1))
    compared = []
    monkeypatch.setattr(
        "pipeline.matrix.tiles.compare_blocks",
        lambda *given: (compared.append(given), compare_blocks(*given))[1],
    )
    monkeypatch.setattr("pipeline.matrix.tiles.still_wanted", lambda: not compared)
    report = compute(frames, tmp_path / "a.zarr")
    assert compared
    assert "tile 0,0 of A/density is not waited for any more" in report.failures[0].reason
    assert written(tmp_path / "a.zarr") == {}


def test_a_full_disk_stops_the_run(tmp_path, monkeypatch):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(4))
    tried = []

    def full(*given):
        tried.append(given)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipeline.matrix.tiles._write_tile", full)
    with pytest.raises(store.StoreError, match="No space left on device; finished work is kept"):
        compute(frames, tmp_path / "a.zarr", matrix=MatrixRequest(tile=2))
    assert len(tried) == 1


def test_reasons_of_frames_that_have_changed_are_forgotten_also_of_other_metrics(tmp_path):
    archive = archive_of(2, frames=8)
    archive["A/density"]["s1"][2] = np.nan
    frames = write_archive(tmp_path / "frames.zarr", archive)
    both = Settings(metrics=("l1", "l2"), size=None, scope=RANGE)
    out = tmp_path / "a.zarr"
    assert {entry.metric for entry in compute(frames, out, both).failures} == {"l1", "l2"}
    group = store.get_group(store.open_store(out, "r+"), "A/density")
    missing = store.get_array(group, "provenance/missing")
    store.write_rows(missing, 0, np.triu(np.ones(missing.shape, "int32")))
    archive["A/density"]["s1"] = smooth_sequence(1, frames=8)
    write_archive(frames, archive)
    report = compute(frames, out, both.model_copy(update={"metrics": ("l2",)}))
    # Numbers that no run has written are damage, and named where they still count.
    assert [(entry.metric, entry.what) for entry in report.failures] == [("l1", "tile 0, 0")]
    # Of the tile that is up to date what was found stays; of a metric that is asked for, if it was recorded.
    np.testing.assert_array_equal(store.read(missing), [[[1, 0], [0, 0]], [[0, 0], [0, 0]]])


def test_a_metric_that_fails_on_some_tiles_leaves_them_to_the_next_run(tmp_path, monkeypatch):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(4))
    settings = Settings(metrics=("l2",), size=None, scope=RANGE)
    compute(frames, tmp_path / "whole.zarr", settings)
    compared = L2.compare

    def fails(self, a, b):
        if a is b and len(a) == 4:
            raise RuntimeError("no distances today")
        values = compared(self, a, b)
        if a is not b and len(b) == 8:
            values[0, 0] = torch.nan
        return values

    monkeypatch.setattr(L2, "compare", fails)
    report = compute(frames, tmp_path / "a.zarr", settings)
    assert report.tiles == 5
    reasons = [entry.reason for entry in report.failures]
    assert reasons == [
        "the metric gave NaN or infinity for 1 distances of frames that it takes",
        "RuntimeError: no distances today",
    ]
    monkeypatch.undo()
    report = compute(frames, tmp_path / "a.zarr", settings)
    assert report.tiles == 1
    found, expected = matrices(tmp_path / "a.zarr")["l2"], matrices(tmp_path / "whole.zarr")["l2"]
    assert np.isnan(found).sum() == 2
    np.testing.assert_array_equal(np.where(np.isnan(found), expected, found), expected)


def test_the_table_of_the_page_is_the_planners(capsys):
    folder = Path(__file__).parents[1]
    runpy.run_path(str(folder / "benchmarks/forecast.py"), run_name="__main__")
    made = capsys.readouterr().out
    assert len(made.splitlines()) > 3
    assert made in (folder / "docs/matrix.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scope": "sequence"}, "use scope 'dataset'"),
        ({"scope": "pair"}, "use scope 'dataset'"),
        ({"pairs": "reference"}, "all pairs"),
    ],
)
def test_settings_that_a_matrix_cannot_have_are_refused(tmp_path, changes, message):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(1))
    with pytest.raises(ValueError, match=message):
        compute(frames, tmp_path / "a.zarr", SETTINGS.model_copy(update=changes))
    assert not (tmp_path / "a.zarr").exists()


def test_stores_and_fields_that_do_not_go_together_are_refused(tmp_path):
    archive = archive_of(1) | archive_of(1, key="B/velocity", channels=3)
    frames = write_archive(tmp_path / "frames.zarr", archive)
    with pytest.raises(ValueError, match="different channels"):
        compute(frames, tmp_path / "a.zarr", matrix=MatrixRequest(together="all"))
    with pytest.raises(store.StoreError, match="no group 'C/"):
        compute(frames, tmp_path / "a.zarr", matrix=MatrixRequest(("C/*",)))
    with pytest.raises(store.StoreError, match="another path"):
        compute(frames, frames)
    compute(frames, tmp_path / "a.zarr", matrix=MatrixRequest(("A/*",), tile=4))
    with pytest.raises(ValueError, match="tiles of 4 frames"):
        compute(
            frames, tmp_path / "a.zarr", SETTINGS.model_copy(update={"scope": RANGE}), MatrixRequest(tile=8)
        )
    others = write_archive(tmp_path / "others.zarr", archive_of(1, key="Z/pressure"))
    with pytest.raises(store.StoreError, match="A/density"):
        compute(others, tmp_path / "a.zarr")


# ---------------------------------------------------------------- plans


def test_a_plan_is_shown_and_writes_nothing(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(4))
    shown: list[str] = []
    report = compute(frames, tmp_path / "a.zarr", announce=shown.append, plan_only=True)
    assert not (tmp_path / "a.zarr").exists()
    plan = report.plans[0]
    assert [family.tiles for family in plan.families] == [6, 6]
    assert "20 frames, 3 blocks of 8" in shown[0]
    assert "20 embeddings (1.00 a frame)" in shown[0]
    assert "memory of a worker" in shown[0]
    assert plan.families[0].written == 4 * 20 * 20


def test_a_plan_that_does_not_fit_is_an_error_with_the_numbers_before_any_work(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(4))
    with pytest.raises(PlanError, match=r"a worker has 1 MB of memory, and .* needs .*--memory"):
        compute(frames, tmp_path / "a.zarr", matrix=MatrixRequest(memory=10**6))
    with pytest.raises(PlanError, match=r"tiles of 100000000 frames .* blocks of .*--tile"):
        compute(frames, tmp_path / "a.zarr", matrix=MatrixRequest(tile=10**8))
    assert not (tmp_path / "a.zarr").exists()


def test_a_plan_costs_few_pairs_where_each_takes_long(tmp_path, monkeypatch):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(2, frames=4))
    pairs, compare = [], L2.distance_block

    def slow(self, a, b):
        pairs.append(len(a) * len(b))
        time.sleep(0.001 * len(a) * len(b))
        return compare(self, a, b)

    monkeypatch.setattr(L2, "distance_block", slow)
    settings = SETTINGS.model_copy(update={"metrics": ("l2",)})
    report = compute(frames, tmp_path / "a.zarr", settings, plan_only=True)
    assert sum(pairs) == 2 * 64
    assert report.plans[0].seconds >= 0.001 * 8 * 9 / 2


def test_embeddings_are_as_many_as_planned_where_memory_holds_a_part(tmp_path, monkeypatch):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(8, frames=8, size=16))  # 8 blocks of 8
    settings = Settings(metrics=("l2",), size=None, scope=RANGE)
    block = 8 * 4 * 16 * 16
    # What a process holds differs from one moment to the next.
    monkeypatch.setattr("pipeline.matrix.job.room_for", lambda *given: 5 * block)
    monkeypatch.setattr("pipeline.matrix.plan.room_for", lambda *given: 5 * block)
    report = compute(frames, tmp_path / "a.zarr", settings)
    planned = report.plans[0].families[0]
    assert planned.cache == 5 * block
    assert report.embeddings == planned.embeddings > 64
    assert planned.factor == planned.embeddings / 64
    monkeypatch.undo()
    assert compute(frames, tmp_path / "b.zarr", settings).embeddings == 64
    same(matrices(tmp_path / "a.zarr"), matrices(tmp_path / "b.zarr"))


def test_frames_that_cannot_be_embedded_come_first_and_the_plan_counts_the_others(tmp_path):
    archive = archive_of(8, frames=8)
    for k in range(5):
        archive["A/density"][f"s{k}"][:] = np.nan
    frames = write_archive(tmp_path / "frames.zarr", archive)
    with pytest.raises(PlanError, match="--memory"):
        compute(frames, tmp_path / "a.zarr", matrix=MatrixRequest(memory=10**6), plan_only=True)
    planned = compute(frames, tmp_path / "a.zarr", plan_only=True).plans[0].families[0]
    assert planned.cache == 64 * 4 * 40 * 40
    for k in range(5, 8):
        archive["A/density"][f"s{k}"][:] = np.nan
    write_archive(frames, archive)
    noise = compute(frames, tmp_path / "a.zarr", plan_only=True).plans[0].families[0]
    assert noise.cache == planned.cache


def test_workers_that_share_a_gpu_share_its_memory():
    devices = [Device("cuda", "a 1", 60), Device("cuda", "a 1", 50), Device("cuda", "b 1", 40)]
    assert share_of_device([*devices, Device("cpu", "c", 0)], "cuda") == 25


@pytest.mark.parametrize(("device", "workers"), [("auto", 3), ("cuda:1", 1)])
def test_an_archive_has_a_process_for_each_gpu(monkeypatch, device, workers):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    profile = shared_memory_profile(Profile(device=device))
    assert (profile.workers, profile.threads) == (workers, 1)
    assert shared_memory_profile(Profile(device="cpu")).workers == 1


def test_plans_are_made_for_all_workers_that_a_profile_asks_for_and_after_unfit_ones_have_left(
    tmp_path, monkeypatch, two_workers
):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(1))
    calls = []
    more = two_workers.profile.model_copy(update={"workers": WorkerRange(minimum=2, maximum=7)})
    monkeypatch.setattr(two_workers, "profile", more)
    for module, name in ((run, "dismiss_unfit_workers"), (job, "run_bounded")):
        whole = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *given, name=name, whole=whole, **told: (calls.append(name), whole(*given, **told))[1],
        )
    report = compute_matrix(frames, tmp_path / "a.zarr", SETTINGS, cluster=two_workers, plan_only=True)
    assert report.plans[0].workers.workers == 7
    assert calls[0] == "dismiss_unfit_workers"


def test_tasks_are_made_as_they_are_asked_for(tmp_path, monkeypatch):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(4))
    made = []

    class Counted(TileTask):
        def __init__(self, *given):
            made.append(self)
            super().__init__(*given)

    seen = []
    monkeypatch.setattr(job, "TileTask", Counted)
    compute(frames, tmp_path / "a.zarr", progress=lambda done, total: seen.append((done, total, len(made))))
    total = seen[0][1]
    assert total > 2
    assert seen == [(done, total, done) for done in range(total + 1)]


def test_embeddings_are_counted_as_workers_keep_them():
    squares = list(order_squares(np.triu(np.ones((12, 12), bool)), 2))
    assert simulate_embeddings(squares, 12, 2, workers=1, capacity=12).tolist() == [1] * 12
    assert 12 < simulate_embeddings(squares, 12, 2, workers=2, capacity=12).sum() <= 24
    assert 12 < simulate_embeddings(squares, 12, 2, workers=1, capacity=5).sum() < 72


def test_squares_hold_every_tile_once_and_follow_one_another():
    stale = np.triu(np.ones((11, 11), bool))
    squares = list(order_squares(stale, 3))
    assert len(squares) == len(set(squares)) == 10
    for first, second, third in zip(squares, squares[1:], squares[2:], strict=False):
        assert {*third} & {*first, *second}
    stale[:] = False
    stale[2, 9] = True
    assert list(order_squares(stale, 3)) == [(0, 3)]


def test_blocks_hold_every_frame_once(tmp_path):
    archive = archive_of(3, frames=5) | archive_of(2, key="B/pressure", frames=7)
    frames = list_frames(
        store.open_store(write_archive(tmp_path / "f.zarr", archive)), ["A/density", "B/pressure"]
    )
    for length in (1, 4, 5, 64):
        blocks = frames.blocks(length)
        pieces = [
            (piece.key, piece.row, number)
            for block in blocks
            for piece in block.pieces
            for number in range(piece.start, piece.stop)
        ]
        expected = [("A/density", row, k) for row in range(3) for k in range(5)]
        expected += [("B/pressure", row, k) for row in range(2) for k in range(7)]
        assert pieces == expected
        assert [len(block) for block in blocks] == [sum(map(len, block.pieces)) for block in blocks]
        assert len({block.content for block in blocks}) == len(blocks)


# ---------------------------------------------------------------- the cache


def block_of(number: int) -> EmbeddedBlock:
    return EmbeddedBlock(Embedding({"values": torch.full((4, 25), float(number))}), np.ones(4, bool))


def test_the_cache_keeps_what_was_used_last_and_never_more_than_its_room():
    cache, computed = EmbeddingCache(), []

    def wanted(*numbers):
        return {k: (400, lambda k=k: (computed.append(k), block_of(k))[1]) for k in numbers}

    for numbers in [(0, 1), (0, 2), (0, 3), (1, 3), (0, 3), (2, 3)]:
        with cache.hold(wanted(*numbers), room=1200) as blocks:
            assert [block.embedding.parts["values"][0, 0].item() for block in blocks] == list(numbers)
            assert cache.nbytes <= 1200
    assert computed == [0, 1, 2, 3, 1, 2]
    with pytest.raises(MemoryError, match="need 800 bytes"), cache.hold(wanted(8, 9), room=799):
        pass
    cache.clear()
    assert cache.nbytes == 0


def test_threads_share_the_cache_and_wait_for_room_without_a_deadlock():
    cache, computed, most = EmbeddingCache(), [], []
    rng = np.random.default_rng(0)
    failures = set(rng.choice(400, 40, replace=False).tolist())

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for turn in range(100):
            i, j = sorted(rng.choice(6, 2, replace=False).tolist())

            def compute_one(k, turn=turn):
                if 100 * seed + turn in failures:
                    raise ValueError("a block that cannot be computed")
                computed.append(k)
                return block_of(k)

            wanted = {k: (400, lambda k=k, f=compute_one: f(k)) for k in (i, j)}
            try:
                with cache.hold(wanted, room=1300) as blocks:
                    most.append(cache.nbytes)
                    assert [block.embedding.parts["values"][0, 0].item() for block in blocks] == [i, j]
            except ValueError:
                continue

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert max(most) <= 1300
    assert len(computed) < 800


# ---------------------------------------------------------------- memory


BOUNDED = """
import resource, sys
import numpy as np
from pipeline.matrix import MatrixRequest, compute_matrix
from pipeline.metrics.settings import Settings
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

def now(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

frames, small, out, budget, needed = *sys.argv[1:4], *map(int, sys.argv[4:])
settings = Settings(metrics=("l2",), size=224, scope=(0.0, 255.0))
with Cluster(Profile(kind="none")) as cluster:
    # Loads and compiles all there is, and starts the threads that read and write.
    compute_matrix(small, out + ".small", settings, cluster=cluster)
    resource.setrlimit(resource.RLIMIT_DATA, (now("VmData") + budget, resource.RLIM_INFINITY))
    try:
        np.zeros(needed, np.uint8)
    except MemoryError:
        print("all at once: no")
    report = compute_matrix(
        frames, out, settings, MatrixRequest(memory=now("VmRSS") + budget), cluster=cluster, announce=print
    )
    print("tiles", report.tiles, "embeddings", report.embeddings)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory as Linux has them")
def test_memory_is_bounded_where_all_embeddings_would_not_fit(tmp_path):
    rng = np.random.default_rng(0)
    sequences = {f"s{k}": rng.integers(0, 255, (10, 32, 32, 3), dtype=np.uint8) for k in range(38)}
    frames = write_archive(tmp_path / "frames.zarr", {"A/noise": sequences})
    small = write_archive(tmp_path / "small.zarr", {"A/noise": {"s0": sequences["s0"]}})
    needed = 380 * 224 * 224 * 3 * 4  # 229 MB
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, frames, small, tmp_path / "a.zarr", str(200 * 2**20), str(needed)],
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_ARENA_MAX": "2"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "all at once: no" in done.stdout
    found = matrices(tmp_path / "a.zarr", "A/noise")["l2"]
    every = np.concatenate(list(sequences.values()))[::37]
    expected = lsim.load_metric("l2").pairwise(every, scope=(0.0, 255.0)).astype(np.float32)
    np.testing.assert_array_equal(found[::37, ::37], expected)
