"""What rounding leaves of distances: marked where it matters, left out where there is nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import write_archive
from synthetic import parameters, write_field

from lsim import Embedding, Metric, MetricInfo
from lsim.preprocess import Preprocessing
from lsim.ranking import differ_by_rounding, may_be_constant, pooled_spearman
from pipeline.cli.display import show_distances
from pipeline.correlate import correlate
from pipeline.distances import compute_distances
from pipeline.matrix import compute_matrix
from pipeline.matrix.neighbours import find_neighbours
from pipeline.metrics.resolution import Resolution, count_unresolved, from_text, resolution_of, to_text
from pipeline.metrics.settings import Settings
from pipeline.report import write_matrix_report, write_report
from pipeline.storage import schema, store
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

BOUND = 1e-3


class Corner(Metric):
    """Difference of the upper left pixels, which rounding may have changed by a known bound."""

    info = MetricInfo(title="difference of one pixel", source="this test")

    def embed(self, frames):
        return Embedding({"corner": frames[:, 0, 0, :1].double() / 255})

    def compare(self, a, b):
        return (a.parts["corner"] - b.parts["corner"].T).abs()

    def rounding(self, a, b, distances):
        return torch.full_like(distances, BOUND)


def sequence(step: float, frames: int = 6) -> np.ndarray:
    """Frames over [0, 1] whose upper left pixel rises by ``step`` from one to the next."""
    values = np.zeros((frames, 8, 8, 1))
    values[:, -1, -1] = 1
    values[:, 0, 0, 0] = step * np.arange(frames)
    return values


def test_a_value_that_agrees_with_all_distances_makes_them_a_constant():
    distances = np.array([0.0, 1.0, 2.0])
    assert not may_be_constant(distances, np.full(3, 0.99))
    assert may_be_constant(distances, np.full(3, 2.0))
    assert may_be_constant(10 + distances, np.ones(3))
    assert not may_be_constant(10 + distances, np.full(3, 0.99))
    assert may_be_constant(np.full(3, 7.0), np.zeros(3))
    assert not may_be_constant(distances, np.zeros(3))


@given(st.floats(1, 2, exclude_min=True), st.integers(2, 12), st.booleans())
def test_a_signal_between_once_and_twice_its_rounding_is_none_of_a_constant(largest, count, falling):
    distances = np.linspace(largest, 0, count) if falling else np.linspace(0.9, largest, count)
    assert not may_be_constant(distances, np.ones(count))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9), st.floats(0, 1), st.integers(0, 99))
def test_rounded_constants_are_always_seen(errors, constant, seed):
    bound = np.array(errors) + 1e-12
    signs = np.random.default_rng(seed).uniform(-1, 1, len(errors))
    assert may_be_constant(np.abs(signs) * bound, bound)
    above = 3 * bound.max() + constant
    assert may_be_constant(above + 0.999 * signs * bound, bound)


def test_unresolved_distances_are_those_whose_rounding_shows():
    distances = np.array([0.0, 0.0, 1.0, 1.0, -40.0, np.nan, np.inf, 1.0])
    rounding = np.array([0.0, 1e-9, 1e-4, 2e-3, 0.03, 1.0, 1.0, np.nan])
    assert count_unresolved(distances, rounding) == 3


def test_a_resolution_survives_being_written():
    matrix = np.abs(np.subtract.outer(np.arange(4.0), np.arange(4.0)))
    found = resolution_of(matrix, np.full((4, 4), 0.7), "all", "double")
    assert found == Resolution(0.7, 6, 6, (), "double")
    assert from_text(to_text(found)) == found
    of_reference = resolution_of(matrix, np.full((4, 4), 9.0), "reference")
    assert of_reference.constant == ("reference",)
    assert of_reference.distances == 3


def test_sequences_of_rounding_are_left_out_of_a_ranking_too():
    truth = np.linspace(0.1, 1, 10)
    noise = 1e-9 * np.random.default_rng(0).uniform(size=10)
    assert pooled_spearman([truth, noise], truth, [1e-9, 1e-9]) == pytest.approx(1)
    assert pooled_spearman([truth, noise], truth) < 1
    assert np.isnan(pooled_spearman([noise], truth, [1e-9]))


def test_frames_that_differ_by_rounding_alone_are_told_from_others():
    rng = np.random.default_rng(0)
    base = rng.random((1, 32, 32, 1))
    alike = base + 1e-9 * rng.standard_normal((5, 32, 32, 1))
    assert differ_by_rounding(alike, None)
    assert not differ_by_rounding(base + 1e-5 * np.arange(5).reshape(-1, 1, 1, 1) * base[:, ::-1], None)


def test_each_pair_is_bounded_where_it_is_normalised_for_itself():
    metric = Corner("corner", Preprocessing(size=None), torch.device("cpu"))
    frames = sequence(0.1)
    distances, rounding = metric.each_pair_with_rounding(frames)
    np.testing.assert_array_equal(distances, metric.pairwise(frames, "pair"))
    np.testing.assert_array_equal(rounding, BOUND * (1 - np.eye(6)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Distances of sequences of nothing but rounding, of a signal just above it, and of one far above."""
    folder = tmp_path_factory.mktemp("made")
    # Five steps from the reference: 0.95 and 1.5 times the rounding.
    steps = {"below": 0.19 * BOUND, "above": 0.3 * BOUND, "far": 0.15}
    archive = {"A/x": {f"{name}{k}": sequence(step) for name, step in steps.items() for k in range(3)}}
    write_archive(folder / "frames.zarr", archive)
    settings = Settings(metrics=("test_resolution:Corner", "l1"), size=None)
    with Cluster(Profile(kind="none")) as cluster:
        for name, changes in {"all": {}, "pair": {"scope": "pair"}, "ref": {"pairs": "reference"}}.items():
            told = settings.model_copy(update=changes)
            compute_distances(folder / "frames.zarr", folder / f"{name}.zarr", told, cluster=cluster)
        told = settings.model_copy(update={"scope": "dataset", "metrics": ("test_resolution:Corner",)})
        compute_matrix(folder / "frames.zarr", folder / "matrix.zarr", told, cluster=cluster)
    return folder


@pytest.mark.parametrize("name", ["all", "pair", "ref"])
def test_sequences_of_rounding_are_left_out_for_every_protocol(made: Path, tmp_path: Path, name: str):
    protocols = ["published"] if name == "ref" else ["published", "all-pairs"]
    report = correlate(made / f"{name}.zarr", tmp_path, protocol=protocols, replicates=50)
    out = report.left_out[report.left_out.metric.str.contains("Corner|corner")]
    assert set(out.sequence) == {"below0", "below1", "below2"}
    assert set(out.protocol) == set(protocols)
    for reason in out.reason:
        assert "rounding alone makes up to 0.001" in reason
        assert "--precision double" in reason
    rows = report.correlations[report.correlations.metric == out.metric.iloc[0]]
    assert set(rows.left_out) == {3}
    assert set(rows.sequences) == {6}
    assert set(report.differences.sequences) == {6}


def test_unresolved_distances_stand_in_provenance_notes_and_terminal(made: Path, tmp_path: Path, capsys):
    settings = Settings(metrics=("test_resolution:Corner", "l1"), size=None)
    with Cluster(Profile(kind="none")) as cluster:
        again = compute_distances(made / "frames.zarr", made / "all.zarr", settings, cluster=cluster)
    assert again.blocks == 0
    (one,) = (entry for entry in again.unresolved if entry.metric != "l1")
    expected = f"{one.metric}: {one.unresolved} of 135 distances are below what single precision resolves"
    assert one.unresolved == 135  # rounding of a thousandth of the range is above 0.1 % of all of them
    show_distances(again)
    assert expected in " ".join(capsys.readouterr().err.split())
    group = store.get_group(store.open_store(made / "all.zarr"), "A/x/provenance")
    assert group.attrs["resolution"][one.metric]["unresolved"] == 135
    texts = store.read(store.get_array(group, schema.RESOLUTION))
    assert json.loads(str(texts[0, 0]))["rounding"] == pytest.approx(BOUND)
    report = correlate(made / "all.zarr", tmp_path, replicates=20)
    assert any(note.startswith(expected) for note in report.notes)
    assert expected in write_report(tmp_path).read_text()


@pytest.mark.filterwarnings("ignore::lsim.metric.SizeWarning")
def test_networks_are_marked_in_double_precision_too(tmp_path: Path, capsys):
    rng = np.random.default_rng(0)
    frames = rng.random((64, 64, 1)) + 1e-12 * rng.standard_normal((11, 64, 64, 1))
    write_archive(tmp_path / "frames.zarr", {"A/x": {"close": frames}})
    settings = Settings(metrics=("lsim-open", "l1", "h1"), size=None, precision="double")
    dataset = settings.model_copy(update={"scope": "dataset"})
    with Cluster(Profile(kind="none")) as cluster:
        report = compute_distances(tmp_path / "frames.zarr", tmp_path / "d.zarr", settings, cluster=cluster)
        matrix = compute_matrix(tmp_path / "frames.zarr", tmp_path / "m.zarr", dataset, cluster=cluster)
    expected = "lsim-open: 55 of 55 distances are below what double precision resolves (rounding above 0.1%)"
    assert [str(entry) for entry in report.unresolved] == [expected]
    assert [str(entry) for entry in matrix.unresolved] == [expected]
    show_distances(report)
    assert expected in " ".join(capsys.readouterr().err.split())


def test_unresolved_distances_of_a_matrix_are_counted_once_a_pair(made: Path, tmp_path: Path):
    settings = Settings(metrics=("test_resolution:Corner",), size=None, scope="dataset")
    with Cluster(Profile(kind="none")) as cluster:
        report = compute_matrix(made / "frames.zarr", made / "matrix.zarr", settings, cluster=cluster)
    assert report.tiles == 0
    (one,) = report.unresolved
    assert (one.unresolved, one.distances) == (54 * 53 // 2, 54 * 53 // 2)
    root = store.open_store(made / "matrix.zarr")
    assert root.attrs["runs"][0]["unresolved"] == {one.metric: one.unresolved}
    assert str(one) in write_matrix_report(made / "matrix.zarr", tmp_path).read_text()
    assert find_neighbours(made / "matrix.zarr", "far0:3").unresolved > 0


def test_results_of_before_are_computed_again(made: Path, tmp_path: Path):
    settings = Settings(metrics=("l1",), size=None)
    with Cluster(Profile(kind="none")) as cluster:
        compute_distances(made / "frames.zarr", tmp_path / "d.zarr", settings, cluster=cluster)
        root = store.open_store(tmp_path / "d.zarr", "r+")
        del root["A/x/provenance/resolution"]
        store.consolidate(tmp_path / "d.zarr")
        notes = correlate(tmp_path / "d.zarr", tmp_path / "r", replicates=0).notes
        assert any("not recorded" in note for note in notes)
        assert compute_distances(
            made / "frames.zarr", tmp_path / "d.zarr", settings, cluster=cluster
        ).computed


def test_a_row_without_its_resolution_is_left_out(tmp_path: Path):
    root, parameter = store.open_store(tmp_path / "d.zarr", "a"), parameters(3)
    matrices = np.abs(parameter[:, :, None] - parameter[:, None, :])
    fine = to_text(Resolution(0.0, 55, 0, ()))
    write_field(root, "A/x", list("abc"), parameter, {"m": matrices}, resolutions={"m": [fine, "", fine]})
    report = correlate(tmp_path / "d.zarr", tmp_path / "r", replicates=0)
    assert report.left_out.sequence.tolist() == ["b"]
    assert "not recorded" in report.left_out.reason[0]
