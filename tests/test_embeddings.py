"""Embeddings of an archive: the metric's own, in whole chunks, resumed, and the same on any workers."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from commands import run_lsim
from matrices import archive_of, smooth_sequence, write_archive
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist, squareform

import lsim
from pipeline.matrix import embeddings
from pipeline.matrix.embeddings import compute_embeddings
from pipeline.metrics.settings import Settings
from pipeline.storage import schema, store
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

SETTINGS = Settings(metrics=("lsim-open",), size=64, scope="dataset")
pytestmark = pytest.mark.filterwarnings("ignore::lsim.SizeWarning")


@pytest.fixture
def here():
    """A cluster of this process alone."""
    with Cluster(Profile(kind="none")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with frames and their embeddings, to be read alone."""
    folder = tmp_path_factory.mktemp("made")
    frames = write_archive(folder / "frames.zarr", archive_of(5) | archive_of(2, key="B/rgb", channels=3))
    with Cluster(Profile(kind="none")) as cluster:
        report = compute_embeddings(frames, folder / "embeddings.zarr", SETTINGS, cluster=cluster)
    assert (report.computed, report.failures) == (35, [])
    return folder


@pytest.fixture
def frames(tmp_path: Path, made: Path) -> Path:
    return shutil.copytree(made / "frames.zarr", tmp_path / "frames.zarr")


def features(path: Path, key: str = "A/density") -> np.ndarray:
    return store.read(store.get_array(store.open_store(path), f"{key}/features"))


def all_frames(path: Path, key: str = "A/density") -> np.ndarray:
    """(sequence · frame, y, x, channel)."""
    values = store.read(store.get_array(store.open_store(path), f"{key}/frames"))
    return values.reshape(-1, *values.shape[2:])


@pytest.mark.parametrize("key", ["A/density", "B/rgb"])
def test_their_euclidean_distance_is_the_metric(made, frames, key):
    found = features(made / "embeddings.zarr", key)
    assert found.dtype == np.float32
    distances = squareform(pdist(found.astype(float)))
    wanted = lsim.load_metric("lsim-open", size=64).pairwise(all_frames(frames, key), scope="dataset")
    np.testing.assert_allclose(distances, wanted, rtol=1e-6, atol=1e-12)


def test_a_fixed_scope_is_taken_as_it_is(frames, tmp_path, here):
    settings = SETTINGS.model_copy(update={"scope": (-2.0, 3.0)})
    compute_embeddings(frames, tmp_path / "embeddings.zarr", settings, groups=["A/*"], cluster=here)
    distances = squareform(pdist(features(tmp_path / "embeddings.zarr").astype(float)))
    wanted = lsim.load_metric("lsim-open", size=64).pairwise(all_frames(frames), scope=(-2.0, 3.0))
    np.testing.assert_allclose(distances, wanted, rtol=1e-6, atol=1e-12)


def test_a_search_tree_finds_what_the_metric_finds(made, frames):
    found = features(made / "embeddings.zarr")
    distances, nearest = cKDTree(found).query(found[7], k=4)
    row = lsim.load_metric("lsim-open", size=64).pairwise(all_frames(frames), scope="dataset")[7]
    assert nearest.tolist() == np.argsort(row)[:4].tolist()
    np.testing.assert_allclose(distances, np.sort(row)[:4], rtol=1e-6, atol=1e-12)


def test_frames_are_named_and_the_store_says_what_it_holds(made):
    tree = xr.open_datatree(made / "embeddings.zarr", engine="zarr")
    assert tree.attrs["kind"] == "embeddings"
    group = tree["A/density"]
    assert group["features"].dims == ("frame", "feature")
    assert group["sequence"].values.tolist() == [f"s{k}" for k in range(5) for _ in range(5)]
    assert group["number"].values.tolist() == [*range(5)] * 5
    assert group["field"].values.tolist() == ["A/density"] * 25
    assert group["parameter"].values.tolist() == [*np.linspace(0, 1, 5)] * 5
    assert group.attrs["metric"] == "lsim-open"
    assert group.attrs["euclidean"] is True
    assert group.attrs["specification"]["weights_sha256"]
    lo, hi = group.attrs["scope"]
    assert lo[0] < hi[0]


@pytest.mark.parametrize("block_bytes", [1, 4 * 12448 * 3, 4 * 12448 * 12])
def test_bits_do_not_depend_on_blocks_or_workers(made, frames, tmp_path, here, monkeypatch, block_bytes):
    monkeypatch.setattr(embeddings, "BLOCK_BYTES", block_bytes)
    report = compute_embeddings(frames, tmp_path / "parts.zarr", SETTINGS, cluster=here)
    assert report.blocks > 2
    for key in ("A/density", "B/rgb"):
        assert np.array_equal(features(made / "embeddings.zarr", key), features(tmp_path / "parts.zarr", key))


def test_workers_give_the_same_bits(made, frames, tmp_path, two_workers, monkeypatch):
    monkeypatch.setattr(embeddings, "BLOCK_BYTES", 4 * 20000 * 5)
    report = compute_embeddings(frames, tmp_path / "workers.zarr", SETTINGS, cluster=two_workers)
    assert report.cluster["workers"] == 2
    for key in ("A/density", "B/rgb"):
        assert np.array_equal(
            features(made / "embeddings.zarr", key), features(tmp_path / "workers.zarr", key)
        )


@pytest.mark.parametrize(
    ("length", "room", "blocks", "chunk"), [(6, 20, 1, 18), (6, 4, 3, 3), (7, 4, 3, 1), (6, 0.1, 3, 1)]
)
def test_chunks_are_whole_frames_of_a_block(tmp_path, here, monkeypatch, length, room, blocks, chunk):
    """Three sequences of some length, where a block has room for so many frames of 24 × 24 values."""
    frames = write_archive(tmp_path / "frames.zarr", archive_of(3, frames=length, size=24))
    settings = Settings(metrics=("mutual-information",), size=24, scope="dataset")
    compute_embeddings(frames, tmp_path / "whole.zarr", settings, cluster=here)
    values = store.get_array(store.open_store(tmp_path / "whole.zarr"), "A/density/values")
    entropy = store.get_array(store.open_store(tmp_path / "whole.zarr"), "A/density/entropy")
    frame_bytes = sum(a.nbytes // len(a) for a in map(store.read, (values, entropy)))
    monkeypatch.setattr(embeddings, "BLOCK_BYTES", int(room * frame_bytes))
    report = compute_embeddings(frames, tmp_path / "parts.zarr", settings, cluster=here)
    assert report.blocks == blocks
    array = store.get_array(store.open_store(tmp_path / "parts.zarr"), "A/density/values")
    assert array.chunks[0] == chunk


def test_what_is_up_to_date_is_not_computed_again(frames, tmp_path, here, monkeypatch):
    monkeypatch.setattr(embeddings, "BLOCK_BYTES", 1)
    out = tmp_path / "embeddings.zarr"
    compute_embeddings(frames, out, SETTINGS, cluster=here)
    again = compute_embeddings(frames, out, SETTINGS, cluster=here)
    assert (again.computed, again.up_to_date, again.blocks) == (0, 35, 0)
    assert not again.cluster

    # One more sequence, and one that has changed; the range stays the same, as it is fixed.
    fixed = SETTINGS.model_copy(update={"scope": (-3.0, 3.0)})
    everything = compute_embeddings(frames, out, fixed, cluster=here)
    assert everything.computed == 35
    fields = archive_of(6) | archive_of(2, key="B/rgb", channels=3)
    fields["A/density"]["s2"] = smooth_sequence(77)
    write_archive(frames, fields)
    report = compute_embeddings(frames, out, fixed, cluster=here)
    assert (report.computed, report.up_to_date) == (10, 30)
    compute_embeddings(frames, tmp_path / "new.zarr", fixed, cluster=here)
    assert np.array_equal(features(out), features(tmp_path / "new.zarr"))


def test_other_weights_or_sizes_are_computed_again(frames, tmp_path, here):
    out = tmp_path / "embeddings.zarr"
    compute_embeddings(frames, out, SETTINGS, cluster=here)
    longer = SETTINGS.model_copy(update={"size": 96})
    assert compute_embeddings(frames, out, longer, cluster=here).computed == 35
    assert features(out).shape[1] > 12448
    with pytest.raises(
        store.StoreError, match="holds embeddings by lsim-open, not by l2: choose another path"
    ):
        compute_embeddings(frames, out, Settings(metrics=("l2",), scope="dataset"), cluster=here)


def test_a_run_that_died_goes_on(frames, tmp_path, here, monkeypatch):
    monkeypatch.setattr(embeddings, "BLOCK_BYTES", 1)
    out = tmp_path / "embeddings.zarr"
    blocks = []

    def stop_after_three(done: int, total: int) -> None:
        blocks.append(total)
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_embeddings(frames, out, SETTINGS, cluster=here, progress=stop_after_three)
    report = compute_embeddings(frames, out, SETTINGS, cluster=here)
    assert (report.up_to_date, report.computed) == (15, 20)
    compute_embeddings(frames, tmp_path / "undisturbed.zarr", SETTINGS, cluster=here)
    assert np.array_equal(features(out), features(tmp_path / "undisturbed.zarr"))
    assert len(store.open_store(out).attrs["runs"]) == 2


def test_a_block_that_nobody_waits_for_writes_nothing(frames, tmp_path, here, monkeypatch):
    monkeypatch.setattr(embeddings, "still_wanted", lambda: False)
    report = compute_embeddings(frames, tmp_path / "embeddings.zarr", SETTINGS, cluster=here)
    assert report.computed == 0
    assert all("is not waited for any more" in failure.reason for failure in report.failures)
    assert not (features(tmp_path / "embeddings.zarr") > 0).any()


def test_a_full_disk_stops_the_run(frames, tmp_path, here, monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(embeddings._Writer, "flush", full)
    with pytest.raises(store.StoreError, match="No space left on device; finished work is kept"):
        compute_embeddings(frames, tmp_path / "embeddings.zarr", SETTINGS, cluster=here)


def test_frames_that_cannot_be_embedded_are_named(tmp_path, here):
    fields = archive_of(3)
    fields["A/density"]["s1"][[2, 4], 0, 0] = np.nan
    frames = write_archive(tmp_path / "frames.zarr", fields)
    out = tmp_path / "embeddings.zarr"
    report = compute_embeddings(frames, out, SETTINGS, cluster=here)
    (failure,) = report.failures
    assert (failure.field, failure.sequence, failure.numbers) == ("A/density", "s1", (2, 4))
    assert failure.reason == "the frame holds NaN or infinity"
    missing = np.isnan(features(out)).all(axis=1)
    assert np.flatnonzero(missing).tolist() == [7, 9]
    assert np.isfinite(features(out)[~missing]).all()
    # It is known, and nothing to be tried again.
    again = compute_embeddings(frames, out, SETTINGS, cluster=here)
    assert (again.computed, again.failures) == (0, [failure])


def test_a_damaged_sequence_is_named_and_tried_again(tmp_path, here):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(3))
    good = store.read(store.get_array(store.open_store(frames), "A/density/frames"), 1)
    array = store.get_array(store.open_store(frames, "r+"), "A/density/frames")
    store.write_rows(array, 1, good[None] + 1)
    out = tmp_path / "embeddings.zarr"
    fixed = SETTINGS.model_copy(update={"scope": (-3.0, 3.0)})
    report = compute_embeddings(frames, out, fixed, cluster=here)
    (failure,) = report.failures
    assert (failure.sequence, failure.numbers) == ("s1", (0, 1, 2, 3, 4))
    assert failure.reason.startswith("damaged frames: ")
    assert np.isnan(features(out)[5:10]).all()
    assert np.isfinite(features(out)[[0, 14]]).all()

    store.write_rows(array, 1, good[None])
    healed = compute_embeddings(frames, out, fixed, cluster=here)
    assert healed.failures == []
    assert np.isfinite(features(out)).all()


def test_fields_that_are_gone_are_dropped_and_those_not_chosen_stay(frames, tmp_path, here):
    out = tmp_path / "embeddings.zarr"
    compute_embeddings(frames, out, SETTINGS, cluster=here)
    assert compute_embeddings(frames, out, SETTINGS, groups=["A/density"], cluster=here).up_to_date == 25
    assert store.field_keys(store.open_store(out), schema.NUMBER) == ["A/density", "B/rgb"]
    write_archive(frames, archive_of(5))
    store.consolidate(frames)
    compute_embeddings(frames, out, SETTINGS, cluster=here)
    assert store.field_keys(store.open_store(out), schema.NUMBER) == ["A/density"]


def test_embeddings_of_other_frames_are_not_touched(frames, tmp_path, here):
    out = tmp_path / "embeddings.zarr"
    compute_embeddings(frames, out, SETTINGS, cluster=here)
    other = write_archive(tmp_path / "other.zarr", archive_of(1, key="C/density"))
    with pytest.raises(store.StoreError, match="results of A/density, B/rgb, and none of C/density"):
        compute_embeddings(other, out, SETTINGS, cluster=here)
    write_archive(frames, archive_of(5))  # not consolidated: being converted
    compute_embeddings(frames, out, SETTINGS, cluster=here)
    assert store.field_keys(store.open_store(out), schema.NUMBER) == ["A/density", "B/rgb"]


def test_a_frame_at_which_the_metric_raises_costs_no_other(made, frames, tmp_path, here, monkeypatch):
    out, whole = tmp_path / "embeddings.zarr", made / "embeddings.zarr"
    prepare, bad = lsim.Metric.prepare, all_frames(frames)[7]

    def raising(metric, some, *arguments, **options):
        if any(np.array_equal(frame, bad) for frame in some):
            raise ArithmeticError("not this one")
        return prepare(metric, some, *arguments, **options)

    monkeypatch.setattr(lsim.Metric, "prepare", raising)
    for _ in range(2):  # the next run tries again
        report = compute_embeddings(frames, out, SETTINGS, groups=["A/*"], cluster=here)
        failure = report.failures[0]
        assert (failure.sequence, failure.numbers) == ("s1", (2,))
        assert failure.reason == "ArithmeticError: not this one"
        assert np.isnan(features(out)[7]).all()
        np.testing.assert_array_equal(*(np.delete(features(p), 7, 0) for p in (out, whole)))
    monkeypatch.undo()
    assert compute_embeddings(frames, out, SETTINGS, groups=["A/*"], cluster=here).failures == []
    np.testing.assert_array_equal(features(out), features(whole))


def test_metrics_of_several_parts_keep_each(frames, tmp_path, here):
    settings = Settings(metrics=("mutual-information",), size=32, scope="dataset")
    compute_embeddings(frames, tmp_path / "embeddings.zarr", settings, groups=["A/*"], cluster=here)
    group = xr.open_datatree(tmp_path / "embeddings.zarr", engine="zarr")["A/density"]
    assert group.attrs["euclidean"] is False
    assert group["entropy"].dims == ("frame",)
    assert group["values"].shape == (25, 32 * 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scope": "sequence"}, "scope 'sequence': embeddings can be compared only where all frames are"),
        ({"scope": "pair"}, "scope 'pair'"),
        ({"metrics": ("l1", "l2")}, "those of one metric, expected its name; got l1, l2"),
        ({"metrics": "all"}, "those of one metric"),
    ],
)
def test_wrong_settings_are_errors_before_anything_is_made(frames, tmp_path, here, changes, message):
    with pytest.raises(ValueError, match=message):
        compute_embeddings(frames, tmp_path / "out.zarr", SETTINGS.model_copy(update=changes), cluster=here)
    assert not (tmp_path / "out.zarr").exists()


def test_groups_that_are_not_there_are_errors(frames, tmp_path, here):
    with pytest.raises(store.StoreError, match=r"no group 'Q/\*'; there are A/density, B/rgb"):
        compute_embeddings(frames, tmp_path / "out.zarr", SETTINGS, groups=["A/*", "Q/*"], cluster=here)


def test_the_command(tmp_path):
    fields = archive_of(2) | archive_of(1, key="B/density")
    fields["A/density"]["s1"][3] = np.nan
    frames = write_archive(tmp_path / "frames.zarr", fields)
    told = ("--metric", "lsim-open", "--size", 64, "--groups", "A/*", "--cluster", "none")
    code, text = run_lsim("embed", frames, "--out", tmp_path / "embeddings.zarr", *told)
    assert code == 3, text
    assert "10 embeddings of 12448 values computed" in text
    assert "the Euclidean distance of two embeddings is lsim-open" in text
    assert "the frame holds NaN or infinity" in text
    assert features(tmp_path / "embeddings.zarr").shape == (10, 12448)
