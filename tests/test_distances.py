"""The distances stage: equal to the library, incremental, and the same bytes whoever computes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from commands import run_lsim
from matrices import archive_of, matrices_of, smooth_sequence, write_archive

import lsim
from lsim.metrics.pixel import L1, L2
from lsim.networks import LsimTrunk
from lsim.prepared import Prepared
from lsim.testing import write_random_checkpoint
from lsim.weights import load_checkpoint, save_checkpoint
from pipeline.correlate import CorrelationError, correlate
from pipeline.distances import compute_distances
from pipeline.distances.blocks import fingerprint
from pipeline.matrix import MatrixRequest, compute_matrix, mds
from pipeline.matrix.neighbours import find_neighbours
from pipeline.metrics import value_range
from pipeline.metrics.resolution import list_unresolved
from pipeline.metrics.settings import Settings, UnavailableMetricError
from pipeline.report import write_matrix_report, write_report
from pipeline.report.matrix import gather_matrices
from pipeline.storage import schema, store, versions
from pipeline.verify import verify
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

CLASSIC = ("l1", "l2", "psnr", "ssim", "vi")
QUICK = Settings(metrics=("l1", "l2"), size=None, block=2)


def compute(frames: Path, out: Path, settings: Settings = QUICK, **changes):
    """In this process, without workers."""
    with Cluster(Profile(kind="none")) as cluster:
        return compute_distances(frames, out, settings.model_copy(update=changes), cluster=cluster)


def test_matrices_are_those_of_the_library_and_the_store_is_valid(tmp_path):
    archive = archive_of(3)
    frames = write_archive(tmp_path / "frames.zarr", archive)
    compute(frames, tmp_path / "d.zarr", metrics=CLASSIC, size=64)
    with xr.open_datatree(tmp_path / "d.zarr", engine="zarr") as tree:
        schema.validate_distances(tree["A/density"].to_dataset(), "A/density")
        assert list(tree["A/density"]["sequence"].values) == ["s0", "s1", "s2"]
        assert set(tree["A/density/provenance"]["metric"].values) == set(CLASSIC)
        for name in CLASSIC:
            metric = lsim.load_metric(name, size=64)
            for row, sequence in enumerate(archive["A/density"].values()):
                expected = metric.pairwise(sequence)
                np.fill_diagonal(expected, 0)
                np.testing.assert_array_equal(tree["A/density"][name].values[row], expected)


@pytest.mark.usefixtures("published_weights")
def test_same_bytes_whatever_the_workers_and_the_block(tmp_path, shared, two_workers):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(5, frames=4))
    weights = {"lsim": str(shared / "reference" / "weights" / "LSiM.pth")}
    settings = Settings(metrics=(*CLASSIC, "lsim"), weights=weights, size=64, block=1)
    compute(frames, tmp_path / "alone.zarr", settings, block=3)
    report = compute_distances(frames, tmp_path / "many.zarr", settings, cluster=two_workers)
    assert report.cluster["workers"] == 2
    alone, many = matrices_of(tmp_path / "alone.zarr"), matrices_of(tmp_path / "many.zarr")
    assert alone.keys() == many.keys() == {*CLASSIC, "lsim"}
    for name, matrices in alone.items():
        np.testing.assert_array_equal(matrices, many[name], err_msg=name)


def test_blocks_are_chosen_by_what_a_sequence_takes_and_no_value_depends_on_them(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(20, frames=4, size=16))
    report = compute(frames, tmp_path / "measured.zarr", metrics=CLASSIC, block=None)
    size = report.sizes["A/density"]
    assert size.seconds_per_sequence > 0
    assert size.sequences in (1, 2, 4, 8, 16)
    group = store.get_group(store.open_store(tmp_path / "measured.zarr"), "A/density")
    assert store.get_array(group, "l2").chunks[0] == size.sequences
    (run,) = store.open_store(tmp_path / "measured.zarr").attrs["runs"]
    assert run["new_blocks"]["A/density"]["sequences"] == size.sequences
    assert run["matrices"] == 20 * len(CLASSIC)
    single = compute(frames, tmp_path / "single.zarr", metrics=CLASSIC, block=1)
    assert (single.blocks, single.sizes) == (20, {})
    expected = matrices_of(tmp_path / "single.zarr")
    for name, matrices in matrices_of(tmp_path / "measured.zarr").items():
        np.testing.assert_array_equal(matrices, expected[name], err_msg=name)
    again = compute(frames, tmp_path / "measured.zarr", metrics=CLASSIC, block=None)
    assert (again.up_to_date, again.blocks, again.sizes) == (20 * len(CLASSIC), 0, {})


def test_an_interrupted_run_has_recorded_what_it_computed(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(40, frames=3, size=16))

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with Cluster(Profile(kind="none")) as cluster, pytest.raises(KeyboardInterrupt):
        compute_distances(frames, tmp_path / "d.zarr", QUICK, cluster=cluster, progress=interrupt)
    report = compute(frames, tmp_path / "d.zarr")
    assert report.computed > 0
    assert report.up_to_date > 0


def test_records_that_were_not_written_yet_cost_a_computation(tmp_path, monkeypatch):
    """As after a kill: values are there, and nothing says that they are done."""
    frames = write_archive(tmp_path / "frames.zarr", archive_of(4, frames=3, size=16))
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.stage.row_records.RowRecords.flush", lambda records: None)
        compute(frames, tmp_path / "d.zarr")
    assert np.isfinite(matrices_of(tmp_path / "d.zarr")["l2"]).all()
    report = compute(frames, tmp_path / "d.zarr")
    assert (report.computed, report.up_to_date) == (8, 0)
    compute(frames, tmp_path / "e.zarr")
    np.testing.assert_array_equal(
        matrices_of(tmp_path / "e.zarr")["l2"], matrices_of(tmp_path / "d.zarr")["l2"]
    )


def test_fingerprints_of_stores_of_before_still_hold():
    made_of = {"content": "c0ffee", "specification": "5pec", "scope": (0.0, 2.5), "pairs": "all"}
    expected = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]
    assert fingerprint("c0ffee", "5pec", (0.0, 2.5), "all") == expected


def test_a_second_run_has_nothing_to_do_and_starts_no_worker(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(3))
    compute(frames, tmp_path / "d.zarr")
    with Cluster(Profile(workers=1)) as cluster:
        report = compute_distances(frames, tmp_path / "d.zarr", QUICK, cluster=cluster)
        assert cluster.dashboard is None
    assert (report.computed, report.up_to_date, report.blocks) == (0, 6, 0)


def test_adding_a_metric_computes_that_metric_alone(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(3))
    compute(frames, tmp_path / "d.zarr")
    before = matrices_of(tmp_path / "d.zarr")
    report = compute(frames, tmp_path / "d.zarr", metrics=("l1", "l2", "ssim"))
    assert (report.computed, report.up_to_date) == (3, 6)
    after = matrices_of(tmp_path / "d.zarr")
    assert not np.isnan(after["ssim"]).any()
    np.testing.assert_array_equal(after["l2"], before["l2"])


def test_adding_sequences_computes_those_alone(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(3))
    compute(frames, tmp_path / "d.zarr")
    before = matrices_of(tmp_path / "d.zarr")
    write_archive(frames, archive_of(5))
    report = compute(frames, tmp_path / "d.zarr")
    assert (report.computed, report.up_to_date) == (4, 6)
    after = matrices_of(tmp_path / "d.zarr")
    np.testing.assert_array_equal(after["l1"][:3], before["l1"])
    assert after["l1"].shape[0] == 5
    assert not np.isnan(after["l1"]).any()


def test_removed_and_reordered_sequences_keep_their_distances_without_computing(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(5))
    compute(frames, tmp_path / "d.zarr")
    before = matrices_of(tmp_path / "d.zarr")
    kept = [4, 2, 0]
    sequences = archive_of(5)["A/density"]
    write_archive(frames, {"A/density": {f"s{k}": sequences[f"s{k}"] for k in kept}})
    report = compute(frames, tmp_path / "d.zarr")
    assert (report.computed, report.up_to_date) == (0, 6)
    after = matrices_of(tmp_path / "d.zarr")
    np.testing.assert_array_equal(after["l2"], before["l2"][kept])


def test_changed_content_is_computed_again_and_nothing_else(tmp_path):
    archive = archive_of(4)
    frames = write_archive(tmp_path / "frames.zarr", archive)
    compute(frames, tmp_path / "d.zarr")
    before = matrices_of(tmp_path / "d.zarr")
    archive["A/density"]["s1"] = smooth_sequence(99)
    write_archive(frames, archive)
    report = compute(frames, tmp_path / "d.zarr")
    assert (report.computed, report.up_to_date) == (2, 6)
    after = matrices_of(tmp_path / "d.zarr")
    assert not np.array_equal(after["l2"][1], before["l2"][1])
    np.testing.assert_array_equal(after["l2"][[0, 2, 3]], before["l2"][[0, 2, 3]])


def test_a_new_version_of_a_metric_or_other_settings_are_computed_again(tmp_path, monkeypatch):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(2))
    compute(frames, tmp_path / "d.zarr")
    monkeypatch.setattr(L2, "algorithm_version", L2.algorithm_version + 1)
    assert compute(frames, tmp_path / "d.zarr").computed == 2
    assert compute(frames, tmp_path / "d.zarr", scope="dataset").computed == 4
    assert compute(frames, tmp_path / "d.zarr", scope="dataset").computed == 0


def test_ranges_read_before_a_run_was_stopped_are_not_read_again(tmp_path, monkeypatch):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(4))
    read, rows = value_range.sequence_range, []

    def stopped_at_the_third(path, key, row, *others):
        if len(rows) == 2:
            raise KeyboardInterrupt
        rows.append(row)
        return read(path, key, row, *others)

    monkeypatch.setattr(value_range, "sequence_range", stopped_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        compute(frames, tmp_path / "d.zarr", scope="dataset")

    def read_and_counted(path, key, row, *others):
        rows.append(row)
        return read(path, key, row, *others)

    monkeypatch.setattr(value_range, "sequence_range", read_and_counted)
    compute(frames, tmp_path / "d.zarr", scope="dataset")
    assert sorted(rows) == [0, 1, 2, 3]
    compute(frames, tmp_path / "whole.zarr", scope="dataset")
    for name, matrices in matrices_of(tmp_path / "whole.zarr").items():
        np.testing.assert_array_equal(matrices_of(tmp_path / "d.zarr")[name], matrices)


def test_vanished_fields_vanish_from_the_distances(tmp_path):
    both = archive_of(2) | archive_of(2, key="B/pressure")
    frames = write_archive(tmp_path / "frames.zarr", both)
    compute(frames, tmp_path / "d.zarr")
    write_archive(frames, archive_of(2))
    compute(frames, tmp_path / "d.zarr")  # not consolidated: frames that are being converted
    assert store.field_keys(store.open_store(tmp_path / "d.zarr"), schema.PARAMETER) == [*both]
    store.consolidate(frames)
    compute(frames, tmp_path / "d.zarr")
    assert store.field_keys(store.open_store(tmp_path / "d.zarr"), schema.PARAMETER) == ["A/density"]


@pytest.mark.parametrize("lost", ["B", "B/density", "B/density/frames", "B/density/content"])
@pytest.mark.parametrize("cut", [False, True])
def test_frames_that_lost_metadata_are_refused_and_cost_no_distances(tmp_path, lost, cut):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(1) | archive_of(1, key="B/density"))
    store.consolidate(frames)
    compute(frames, tmp_path / "d.zarr", metrics=("l2",))
    document = frames / lost / "zarr.json"
    if cut:
        document.write_bytes(document.read_bytes()[:-9])
    else:
        document.unlink()
    with pytest.raises(store.DamagedError, match=f"{lost}/zarr.json: {'no metadata' if cut else 'missing'}"):
        compute(frames, tmp_path / "d.zarr", metrics=("l2",))
    kept = matrices_of(tmp_path / "d.zarr", "B/density")
    assert np.isfinite(kept["l2"]).all()
    settings = Settings(metrics=("l2",), size=None, scope="dataset")
    with pytest.raises(store.DamagedError, match=f"{lost}/zarr.json"), Cluster(Profile(kind="none")) as own:
        compute_matrix(frames, tmp_path / "a.zarr", settings, MatrixRequest(tile=8), cluster=own)


def test_reference_pairs_alone_and_all_pairs_will_do_for_them(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(2))
    compute(frames, tmp_path / "r.zarr", metrics=CLASSIC, pairs="reference")
    compute(frames, tmp_path / "a.zarr", metrics=CLASSIC)
    some, every = matrices_of(tmp_path / "r.zarr"), matrices_of(tmp_path / "a.zarr")
    for name in CLASSIC:
        np.testing.assert_array_equal(some[name][:, 0], every[name][:, 0])
        assert np.isnan(some[name][:, 1, 2]).all()
    assert compute(frames, tmp_path / "a.zarr", metrics=CLASSIC, pairs="reference").computed == 0
    assert compute(frames, tmp_path / "r.zarr", metrics=CLASSIC).computed == 2 * len(CLASSIC)


@pytest.mark.parametrize(("size", "channels"), [(None, 1), (24, 3), (24, 4)])
def test_dataset_scope_is_that_of_the_library(tmp_path, size, channels):
    archive = archive_of(2, channels=channels)
    archive["A/density"]["s1"] *= 10
    frames = write_archive(tmp_path / "frames.zarr", archive)
    compute(frames, tmp_path / "d.zarr", scope="dataset", size=size)
    metric = lsim.load_metric("l2", size=size)
    prepared = lsim.preprocess(np.stack(list(archive["A/density"].values())), size=size, scope="dataset")
    found = matrices_of(tmp_path / "d.zarr")["l2"]
    for row in range(2):
        frames_of_row = Prepared(torch.from_numpy(prepared[row]), np.ones(len(prepared[row]), bool))
        np.testing.assert_allclose(found[row], metric.all_pairs(frames_of_row), rtol=1e-6)


def test_a_frame_with_nan_is_named_and_costs_only_its_own_pairs(tmp_path):
    archive = archive_of(3)
    archive["A/density"]["s1"][2, 5, 5] = np.nan
    frames = write_archive(tmp_path / "frames.zarr", archive)
    report = compute(frames, tmp_path / "d.zarr", metrics=CLASSIC)
    assert {(f.sequence, f.metric) for f in report.failures} == {("s1", name) for name in CLASSIC}
    assert all("2" in failure.reason and "NaN" in failure.reason for failure in report.failures)
    for name, matrices in matrices_of(tmp_path / "d.zarr").items():
        assert np.isnan(matrices[1, 2, [0, 1, 3, 4]]).all(), name
        assert not np.isnan(matrices[1, 0, [1, 3, 4]]).any(), name
        assert not np.isnan(matrices[[0, 2]]).any(), name
    # It stays in the report of a run that had nothing to do.
    assert len(compute(frames, tmp_path / "d.zarr", metrics=CLASSIC).failures) == len(CLASSIC)


@pytest.mark.parametrize("scope", ["sequence", "dataset"])
def test_a_field_no_metric_can_take_fails_with_the_way_out_and_the_others_go_on(tmp_path, scope):
    both = archive_of(2) | archive_of(2, key="A/velocity", channels=2)
    frames = write_archive(tmp_path / "frames.zarr", both)
    report = compute(frames, tmp_path / "d.zarr", scope=scope)
    assert {(f.field, f.sequence) for f in report.failures} == {("velocity", "s0"), ("velocity", "s1")}
    assert all("separate fields" in failure.reason for failure in report.failures)
    assert not np.isnan(matrices_of(tmp_path / "d.zarr")["l1"]).any()


def test_an_unavailable_metric_is_an_error_by_name_and_left_out_of_all(tmp_path, monkeypatch):
    monkeypatch.setenv("LSIM_WEIGHTS", str(tmp_path / "nowhere"))
    monkeypatch.setattr("lsim.weights.cache_folder", lambda: tmp_path / "no-cache")
    monkeypatch.setitem(sys.modules, "cv2", None)
    frames = write_archive(tmp_path / "frames.zarr", archive_of(1, frames=3))
    for wrong, message in (
        ("lsim", "lsim weights fetch lsim"),
        ("flow", "OpenCV"),
        ("lpips-vgg", "lsim weights"),
    ):
        with pytest.raises(UnavailableMetricError, match=message):
            compute(frames, tmp_path / "d.zarr", metrics=("l1", wrong))
        with pytest.raises(UnavailableMetricError, match=message):
            compute(frames, tmp_path / "d.zarr", metrics=("all", wrong))
    with pytest.raises(UnavailableMetricError):
        compute(frames, tmp_path / "d.zarr", metrics="all", strict=True)
    assert not (tmp_path / "d.zarr").exists()
    report = compute(frames, tmp_path / "d.zarr", metrics="all", size=176)
    missing = {"flow", "lpips-alex", "lpips-vgg", "lpips-squeeze", "lsim", "lsim-noiseless", "lsim-skip"}
    assert missing <= report.unavailable.keys()
    assert "lsim weights fetch lsim-skip" in report.unavailable["lsim-skip"]
    assert "OpenCV" in report.unavailable["flow"]
    root = store.open_store(tmp_path / "d.zarr")
    assert root.attrs["unavailable"] == report.unavailable
    found = matrices_of(tmp_path / "d.zarr")
    assert found.keys() == set(lsim.list_metrics()) - report.unavailable.keys()
    assert {*CLASSIC, "lsim-open"} <= found.keys()
    assert not report.failures
    assert all(np.isfinite(matrices).all() for matrices in found.values())
    correlate(tmp_path / "d.zarr", tmp_path / "results", replicates=0)
    page = write_report(tmp_path / "results").read_text()
    assert all(name in page[page.index("Metrics that were left out") :] for name in missing)


def test_an_unknown_metric_suggests_near_names(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(1))
    with pytest.raises(lsim.UnknownMetricError, match="ssim"):
        compute(frames, tmp_path / "d.zarr", metrics=("sim",))


def test_interrupted_and_run_again_computes_only_what_is_left(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(8))

    def stop_after_one(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with Cluster(Profile(kind="none")) as cluster, pytest.raises(KeyboardInterrupt):
        compute_distances(frames, tmp_path / "d.zarr", QUICK, cluster=cluster, progress=stop_after_one)
    report = compute(frames, tmp_path / "d.zarr")
    assert (report.computed, report.up_to_date) == (12, 4)
    compute(frames, tmp_path / "undisturbed.zarr")
    expected = matrices_of(tmp_path / "undisturbed.zarr")
    for name, matrices in matrices_of(tmp_path / "d.zarr").items():
        np.testing.assert_array_equal(matrices, expected[name])


def test_a_metric_named_but_not_described_yet_breaks_no_reader_of_the_store(tmp_path, monkeypatch):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(3))
    compute(frames, tmp_path / "d.zarr", metrics=("l1",))

    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.distances.record_specifications", stopped)
    with pytest.raises(KeyboardInterrupt):
        compute(frames, tmp_path / "d.zarr", metrics=("l1", "l2"))
    assert [name for name, _ in store.specifications(tmp_path / "d.zarr")] == ["l1"]
    left_out = correlate(tmp_path / "d.zarr", tmp_path / "results", replicates=0).left_out
    assert set(left_out["metric"]) == {"l2"}
    assert write_report(tmp_path / "results").exists()


def test_every_store_says_what_made_it(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(2))
    compute(frames, tmp_path / "d.zarr")
    attributes = store.open_store(tmp_path / "d.zarr").attrs
    assert (tmp_path / "d.zarr" / str(attributes["frames"])).resolve() == frames
    assert attributes["runs"][-1]["versions"]["lsim"] == lsim.__version__
    provenance = store.open_dataset(tmp_path / "d.zarr", "A/density/provenance")
    assert f'"algorithm_version": {L1.algorithm_version}' in str(provenance["specification"].values[0])


def test_arrays_say_what_their_values_are_in(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(1, frames=3, size=16))
    compute(frames, tmp_path / "d.zarr", metrics=("l1", "psnr", "vi"))
    with xr.open_datatree(tmp_path / "d.zarr", engine="zarr") as tree:
        units = {name: tree["A/density"][name].attrs["units"] for name in ("l1", "psnr", "vi")}
    assert units == {"l1": "1", "psnr": "dB", "vi": "bit"}


def test_the_version_of_opencv_is_recorded_where_it_is_installed():
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV")
    name = next(name for name in versions.OPENCV if name in versions.versions())
    assert versions.versions()[name].startswith(cv2.__version__)


def test_distances_of_changed_frames_are_not_correlated_though_their_metric_was_not_computed(tmp_path):
    archive = archive_of(6)
    frames = write_archive(tmp_path / "frames.zarr", archive)
    compute(frames, tmp_path / "d.zarr")
    archive["A/density"]["s1"] = smooth_sequence(99)
    write_archive(frames, archive)
    compute(frames, tmp_path / "d.zarr", metrics=("l1",))
    report = correlate(tmp_path / "d.zarr", tmp_path / "results", replicates=0)
    left_out = {(row.sequence, row.metric) for row in report.left_out.itertuples()}
    assert left_out == {("s1", "l2")}


def test_an_interrupted_run_with_other_settings_leaves_no_mixture(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(6))
    compute(frames, tmp_path / "d.zarr", size=64)

    def stop_after_one(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    other = QUICK.model_copy(update={"size": 48})
    with Cluster(Profile(kind="none")) as cluster, pytest.raises(KeyboardInterrupt):
        compute_distances(frames, tmp_path / "d.zarr", other, cluster=cluster, progress=stop_after_one)
    report = correlate(tmp_path / "d.zarr", tmp_path / "results", replicates=0)
    computed = {"s0", "s1"}
    left_out = {(row.sequence, row.metric) for row in report.left_out.itertuples()}
    assert left_out == {(f"s{k}", m) for k in range(6) for m in ("l1", "l2") if f"s{k}" not in computed}


def test_metrics_of_unlike_settings_are_ranked_with_a_note(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(4))
    compute(frames, tmp_path / "d.zarr", metrics=("l1",))
    assert correlate(tmp_path / "d.zarr", tmp_path / "results", replicates=0).notes == []
    compute(frames, tmp_path / "d.zarr", metrics=("l2",), scope="pair")
    notes = correlate(tmp_path / "d.zarr", tmp_path / "results", replicates=0).notes
    assert any("scope" in note and "pair for l2" in note for note in notes)
    store.open_output(tmp_path / "f.zarr", schema.FRAMES_STORE)
    with pytest.raises(CorrelationError, match="one of frames"):
        correlate(tmp_path / "f.zarr", tmp_path / "other")


@pytest.mark.parametrize(
    "changes", [{"scope": (5.0, 1.0)}, {"metrics": ()}, {"pairs": "some"}, {"block": 0}, {"sise": 3}]
)
def test_wrong_settings_are_refused_before_anything_starts(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        Settings(**changes)


def test_wrong_stores_are_refused_and_left_as_they_are(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(2))
    with pytest.raises(store.StoreError, match="another path"):
        compute(frames, frames)
    compute(frames, tmp_path / "d.zarr")
    before = matrices_of(tmp_path / "d.zarr")
    others = write_archive(tmp_path / "others.zarr", archive_of(2, key="B/pressure"))
    with pytest.raises(store.StoreError, match="A/density"):
        compute(others, tmp_path / "d.zarr")
    with pytest.raises(store.StoreError, match="expected a store of frames"):
        compute(tmp_path / "d.zarr", tmp_path / "e.zarr")
    np.testing.assert_array_equal(matrices_of(tmp_path / "d.zarr")["l2"], before["l2"])


def test_two_runs_on_one_store_keep_out_of_each_others_way(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(2))
    with store.locked(tmp_path / "d.zarr"):
        code, text = run_lsim(
            "distances", frames, "--out", tmp_path / "d.zarr", "--metrics", "l1", "--cluster", "none"
        )
    assert code == 1
    assert "another run is writing" in text
    assert compute(frames, tmp_path / "d.zarr").computed == 4


def test_relative_paths_hold_for_workers_in_another_folder(tmp_path, monkeypatch, two_workers):
    write_archive(tmp_path / "frames.zarr", archive_of(2))
    folders = set(two_workers.client.run(os.getcwd).values())
    monkeypatch.chdir(tmp_path)
    report = compute_distances("frames.zarr", "d.zarr", QUICK, cluster=two_workers)
    assert (report.computed, report.failures) == (4, [])
    assert len(matrices_of(tmp_path / "d.zarr")["l2"]) == 2
    assert str(tmp_path) not in folders
    assert not any(Path(folder, "d.zarr").exists() for folder in folders)


@pytest.mark.parametrize("change", ["removed", "reordered", "added"])
def test_killed_at_any_write_of_an_alignment_the_next_run_is_right(tmp_path, monkeypatch, change):
    """Whatever the frames are then: those that were being aligned to, or the old ones again."""
    old = archive_of(4, frames=3, size=8)["A/density"]
    new = {
        "removed": {name: old[name] for name in ("s3", "s1")},
        "reordered": {name: old[name] for name in ("s3", "s1", "s0", "s2")},  # not its own inverse
        "added": archive_of(7, frames=3, size=8)["A/density"],
    }[change]
    settings = QUICK.model_copy(update={"metrics": ("l2",)})
    expected = {}

    def take_frames(label: str) -> None:
        shutil.rmtree(tmp_path / "frames.zarr", ignore_errors=True)
        shutil.copytree(tmp_path / f"{label}-frames.zarr", tmp_path / "frames.zarr")

    for label, sequences in (("old", old), ("new", new)):
        write_archive(tmp_path / f"{label}-frames.zarr", {"A/density": sequences})
        take_frames(label)
        compute(tmp_path / "frames.zarr", tmp_path / f"{label}.zarr", settings)
        expected[label] = matrices_of(tmp_path / f"{label}.zarr")["l2"]

    # What a kill leaves is what is on the disk: each write of one run is preceded by a copy of that.
    out, left = tmp_path / "d.zarr", []

    def copied_before(function):
        def call(*arguments, **options):
            left.append(shutil.copytree(out, tmp_path / f"killed-{len(left)}.zarr"))
            return function(*arguments, **options)

        return call

    shutil.copytree(tmp_path / "old.zarr", out)
    take_frames("new")
    with monkeypatch.context() as patch:
        for name in ("write_block", "resize_rows"):
            patch.setattr(store, name, copied_before(getattr(store, name)))
        compute(tmp_path / "frames.zarr", out, settings)
    assert len(left) > 10
    for survived, state in enumerate([*left, shutil.copytree(out, tmp_path / "finished.zarr")]):
        shutil.rmtree(out)
        state.rename(out)
        now = "new" if survived % 2 else "old"
        take_frames(now)
        compute(tmp_path / "frames.zarr", out, settings)
        np.testing.assert_array_equal(matrices_of(out)["l2"], expected[now])


def test_frames_whose_conversion_was_interrupted_are_refused(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(3))
    content = store.get_array(store.open_store(frames, "r+"), "A/density/content")
    store.write_rows(content, 0, np.array(["x", "", "y"], dtype=object))
    with pytest.raises(store.StoreError, match=r"1 of 3 sequences of A/density"):
        compute(frames, tmp_path / "d.zarr")


def test_frames_that_are_no_store_are_named(tmp_path):
    with pytest.raises(store.StoreError, match="nothing-here"):
        compute(tmp_path / "nothing-here.zarr", tmp_path / "d.zarr")


# --- weights of one's own -------------------------------------------------------------------------------


def own_weights(path: Path, seed: int = 0) -> Path:
    pickled = write_random_checkpoint(path.with_suffix(".pth"), seed=seed, size=64)
    save_checkpoint(path, load_checkpoint(pickled, LsimTrunk), "lsim", {})
    return path


def test_weights_of_ones_own_are_a_metric_of_any_name(tmp_path, monkeypatch, two_workers):
    archive = archive_of(2, frames=4)
    frames = write_archive(tmp_path / "frames.zarr", archive)
    file = own_weights(tmp_path / "mine.safetensors")
    monkeypatch.chdir(tmp_path)
    settings = Settings(metrics=("l2", "smoke-only"), weights={"smoke-only": "mine.safetensors"}, size=64)
    # A worker runs elsewhere, and must find the file all the same.
    report = compute_distances(frames, tmp_path / "d.zarr", settings, cluster=two_workers)
    assert (report.computed, report.failures) == (4, [])
    found = matrices_of(tmp_path / "d.zarr")["smoke-only"]
    metric = lsim.load_metric("smoke-only", file, "cpu", size=64)
    for matrix, sequence in zip(found, archive["A/density"].values(), strict=True):
        np.testing.assert_allclose(matrix, metric.pairwise(sequence), rtol=1e-6, atol=1e-9)
    specifications = dict(store.specifications(tmp_path / "d.zarr"))
    assert specifications["smoke-only"]["weights_sha256"] == metric.weights_sha256


def test_other_weights_under_a_name_are_computed_again(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(2, frames=4))
    changes = {"metrics": ("l2", "mine"), "size": 64}
    for seed in (0, 1):
        file = own_weights(tmp_path / f"{seed}.safetensors", seed)
        report = compute(frames, tmp_path / "d.zarr", weights={"mine": str(file)}, **changes)
    assert (report.computed, report.up_to_date) == (2, 2)


def test_weights_that_are_not_there_are_an_error_before_anything_starts(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(1))
    with pytest.raises(UnavailableMetricError, match=r"no weights at absent\.safetensors"):
        compute(frames, tmp_path / "d.zarr", metrics=("mine",), weights={"mine": "absent.safetensors"})
    assert not (tmp_path / "d.zarr").exists()


def test_weights_are_wanted_by_name_whatever_metrics_are_listed(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(2, frames=4))
    weights = {"mine": str(own_weights(tmp_path / "mine.safetensors"))}
    report = compute(frames, tmp_path / "d.zarr", metrics=("l2",), weights=weights, size=64)
    assert report.computed == 4
    weights["lost"] = "absent.safetensors"
    with pytest.raises(UnavailableMetricError, match=r"'lost' is not available: no weights at absent"):
        compute(frames, tmp_path / "d.zarr", metrics="all", weights=weights, size=64)


def test_metrics_that_cannot_take_the_size_are_left_out_of_all_with_the_reason(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(1, frames=3))
    report = compute(frames, tmp_path / "d.zarr", metrics="all", size=5)
    too_small = {"ssim", "ssim-gaussian", "ms-ssim", "flow", "lsim-open"}
    assert too_small <= report.unavailable.keys()
    assert "cannot take frames of 5×5; the smallest that works is 7×7" in report.unavailable["ssim"]
    assert report.failures == []
    found = matrices_of(tmp_path / "d.zarr").keys()
    assert {"l1", "gmsd", "vi"} <= found
    assert not too_small & found
    recorded = store.open_store(tmp_path / "d.zarr").attrs["unavailable"]
    assert recorded == report.unavailable


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"metrics": ("all", "ms-ssim")}, "ms-ssim"),
        ({"metrics": "all", "weights": {"mine": "mine.safetensors"}, "size": 40}, "mine"),
        ({"metrics": ("l1", "all"), "strict": True}, "ms-ssim"),
    ],
)
def test_a_size_that_a_metric_asked_for_cannot_take_is_an_error_before_anything_starts(
    tmp_path, monkeypatch, changes, culprit
):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(1, frames=3))
    own_weights(tmp_path / "mine.safetensors")
    monkeypatch.chdir(tmp_path)
    # Whatever is not here for another reason.
    monkeypatch.setattr("pipeline.metrics.settings.list_metrics", lambda: ["l1", "ssim", "ms-ssim"])
    with pytest.raises(lsim.FramesError, match=f"metric '{culprit}' cannot take frames of"):
        compute(frames, tmp_path / "d.zarr", **({"size": 100} | changes))
    assert not (tmp_path / "d.zarr").exists()


@pytest.mark.parametrize("name", ["sequence", "parameter", "provenance", "frame"])
def test_a_metric_named_as_a_variable_of_the_store_is_refused(tmp_path, name):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(1, frames=4))
    weights = {name: str(own_weights(tmp_path / "mine.safetensors"))}
    with pytest.raises(ValueError, match=f"cannot be named {name}"):
        compute(frames, tmp_path / "d.zarr", weights=weights)
    assert not (tmp_path / "d.zarr").exists()


# --- physical values, directions --------------------------------------------------------------------------


def warm(path: Path) -> Path:
    """A frames.zarr of a field around 300 K."""
    fields = {key: {s: v + 300 for s, v in of.items()} for key, of in archive_of(2, frames=4).items()}
    write_archive(path, fields)
    store.get_array(store.open_store(path, "a"), "A/density/frames").update_attributes({"units": "K"})
    return path


def test_distances_in_the_units_of_the_field(tmp_path):
    frames, out = warm(tmp_path / "frames.zarr"), tmp_path / "d.zarr"
    report = compute(frames, out, metrics=("all",), size=None, scope="none")
    assert {"ssim", "psnr", "nmi"} <= report.unavailable.keys()
    assert "scope 'none' leaves them in their own units" in report.unavailable["ssim"]
    group = store.get_group(store.open_store(out), "A/density")
    units = {name: store.get_array(group, name).attrs["units"] for name in ("l1", "l2", "crmse")}
    assert units == {"l1": "K", "l2": "K2", "crmse": "K"}
    values = archive_of(2, frames=4)["A/density"]["s1"] + 300
    expected = lsim.load_metric("l1", size=None).pairwise(values, "none")
    np.testing.assert_array_equal(matrices_of(out)["l1"][1], expected)
    assert compute(frames, out, metrics=("l1",), size=None, scope="none").computed == 0
    compute(frames, out, metrics=("l1",), size=None)
    assert store.get_array(store.open_store(out), "A/density/l1").attrs["units"] == "1"
    with pytest.raises(ValueError, match=r"'ssim' .* give the range"):
        compute(frames, out, metrics=("ssim",), size=None, scope="none")


def test_directions_are_kept_where_asked_for(tmp_path):
    frames, out = warm(tmp_path / "frames.zarr"), tmp_path / "d.zarr"
    asked = {"metrics": ("l1", "vrmse"), "size": None, "scope": "none"}
    assert compute(frames, out, **asked).symmetrised == ["vrmse"]
    mean = matrices_of(out)["vrmse"]
    report = compute(frames, out, **asked, directed=True)
    assert (report.computed, report.up_to_date, report.symmetrised) == (2, 2, [])
    found = matrices_of(out)["vrmse"]
    metric = lsim.load_metric("vrmse", size=None)
    for row, values in enumerate(archive_of(2, frames=4)["A/density"].values()):
        np.testing.assert_array_equal(found[row], metric.pairwise(values + 300, "none"))
    assert not np.array_equal(found, found.swapaxes(1, 2))
    np.testing.assert_allclose(mean, (found + found.swapaxes(1, 2)) / 2, rtol=1e-12)
    with xr.open_datatree(out, engine="zarr") as tree:
        schema.validate_distances(tree["A/density"].to_dataset(), "A/density")
    assert verify(out).damages == []
    notes = correlate(out, tmp_path / "c").notes
    assert any("earlier frame of a pair is the reference: vrmse" in note for note in notes)
    compute(frames, tmp_path / "r.zarr", **asked, directed=True, pairs="reference")
    alone = matrices_of(tmp_path / "r.zarr")["vrmse"]
    np.testing.assert_array_equal(alone[:, 0], found[:, 0])
    assert np.isnan(alone[:, 1:]).all()
    assert verify(tmp_path / "r.zarr").damages == []


def test_an_archive_keeps_directions_across_tiles(tmp_path):
    frames, out = warm(tmp_path / "frames.zarr"), tmp_path / "a.zarr"
    settings = Settings(metrics=("nrmse", "l1"), size=None, scope="none", directed=True)
    with Cluster(Profile(kind="none")) as cluster:
        compute_matrix(frames, out, settings, MatrixRequest(tile=3), cluster=cluster)
    values = np.concatenate([v + 300 for v in archive_of(2, frames=4)["A/density"].values()])
    dataset = store.open_dataset(out, "A/density")
    for name in ("nrmse", "l1"):
        expected = lsim.load_metric(name, size=None).pairwise(values, "none").astype(np.float32)
        np.testing.assert_array_equal(dataset[name].values, expected)
    assert dataset["l1"].attrs["units"] == "K"
    schema.validate_matrix(dataset.load(), "A/density")
    assert verify(out).damages == []


def test_readers_of_a_directed_matrix_take_both_halves_or_name_the_reference(tmp_path, monkeypatch):
    frames, out = warm(tmp_path / "frames.zarr"), tmp_path / "a.zarr"
    settings = Settings(metrics=("nrmse", "l1"), size=None, scope="none", directed=True)
    with Cluster(Profile(kind="none")) as cluster:
        compute_matrix(frames, out, settings, MatrixRequest(tile=3), cluster=cluster)
    values = store.open_dataset(out, "A/density")["nrmse"].values.astype(np.float64)
    np.fill_diagonal(values, 0)
    assert not np.array_equal(values, values.T)
    (matrix,) = gather_matrices(out).matrices
    mean = mds.classical_map((values + values.T) / 2)
    assert matrix.directed == ["nrmse"]
    drawn = {one.metric: one.frame_map for one in matrix.maps}
    np.testing.assert_array_equal(drawn["nrmse"].positions, mean.positions)
    monkeypatch.setattr(mds, "CLASSICAL_UP_TO", 0)
    (matrix,) = gather_matrices(out).matrices
    drawn = {one.metric: one.frame_map for one in matrix.maps}
    np.testing.assert_allclose(np.abs(drawn["nrmse"].positions), np.abs(mean.positions), atol=1e-9)
    write_matrix_report(out, tmp_path / "page")
    assert "½ (d(a, b) + d(b, a))" in (tmp_path / "page/index.html").read_text()

    found = find_neighbours(out, "s1:2", 7, "nrmse")
    assert found.directed == ["nrmse"]
    assert [near.distances["nrmse"] for near in found.nearest] == sorted(np.delete(values[6], 6))
    code, text = run_lsim("neighbours", out, "--of", "s1:2", "--metric", "nrmse")
    assert code == 0
    assert "with A/density/s1:2 as the reference: nrmse" in " ".join(text.split())


def test_unresolved_distances_of_an_archive_count_in_both_directions_where_both_are_kept(tmp_path):
    archive = archive_of(2, frames=4)
    for frames in archive["A/density"].values():
        frames *= 1e-6
    frames = write_archive(tmp_path / "frames.zarr", archive)
    counts = {}
    for directed in (False, True):
        settings = Settings(metrics=("nrmse",), size=None, scope=(-100.0, 100.0), directed=directed)
        with Cluster(Profile(kind="none")) as cluster:
            out = tmp_path / f"{directed}.zarr"
            compute_matrix(frames, out, settings, MatrixRequest(tile=3), cluster=cluster)
        (counts[directed],) = list_unresolved(store.open_store(out))
    assert counts[True].distances == 2 * counts[False].distances == 8 * 7
    assert counts[True].unresolved == 2 * counts[False].unresolved > 0
