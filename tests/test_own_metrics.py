"""Metrics of one's own in whole runs: by reference, with options, with masks, symmetric or not."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import run_lsim
from distributed import LocalCluster
from matrices import archive_of, matrices_of, smooth_sequence, write_archive

import lsim
from pipeline.cli import main
from pipeline.correlate import correlate
from pipeline.distances import compute_distances
from pipeline.metrics.settings import Settings
from pipeline.report import write_report
from pipeline.storage import schema, store
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import ClusterError, Profile

SHIPPED = Path(lsim.__file__).parent / "shipped_weights" / "lsim-open.safetensors"

SOURCE = '''
import dataclasses

import torch
from lsim import Embedding, Metric, MetricInfo


class Energy(Metric):
    """Difference of mean squared values."""

    info = MetricInfo(title="difference of energies", source="this test")
    factor = 1.0

    def embed(self, frames):
        return Embedding({"energy": self.factor * frames.double().square().flatten(1).mean(1)})

    def compare(self, a, b):
        return (a.parts["energy"][:, None] - b.parts["energy"][None, :]).abs()


class MeanPower(Energy):
    """Difference of mean powers."""

    def __init__(self, name, preprocessing, device, *, exponent=2.0, precision="exact"):
        super().__init__(name, preprocessing, device, exponent=exponent, precision=precision)
        self.exponent = exponent

    def embed(self, frames):
        return Embedding({"energy": frames.double().pow(self.exponent).flatten(1).mean(1)})


class Rise(Energy):
    """How much more energy the second frame has: of no use the other way round."""

    info = MetricInfo(
        title="rise of energy", source="this test", axioms=frozenset({"non-negative"}), units="levels²"
    )

    def compare(self, a, b):
        return (b.parts["energy"][None, :] - a.parts["energy"][:, None]).clamp(min=0)


class CommonMean(Metric):
    """Mean absolute difference over the pixels that both frames have."""

    info = MetricInfo(title="masked mean", source="this test", takes_mask=True)

    def embed(self, frames):
        return Embedding({"frames": frames.double()})

    def compare(self, a, b):
        return (a.parts["frames"][:, None] - b.parts["frames"][None]).abs().flatten(2).nanmean(2)


@dataclasses.dataclass
class Kept:
    method: str
    promise: float
    bound: float
    pairs: int
    recomputed: int

    def __add__(self, other):
        bound = max(self.bound, other.bound)
        pairs, recomputed = self.pairs + other.pairs, self.recomputed + other.recomputed
        return Kept(self.method, self.promise, bound, pairs, recomputed)


class Promising(Energy):
    """Says how precise it was."""

    def take_precision(self):
        return Kept("by hand", 1e-5, 2e-6, 8, 2)


class Unsure(Energy):
    """Fails where it is asked how precise it was."""

    def take_precision(self):
        return {"bound": 1e-6}


class Sequence(Energy):
    """Named as a variable of the store."""


class Halfway(Metric):
    """Compares nothing yet."""

    info = MetricInfo(title="nothing yet", source="this test")

    def embed(self, frames):
        return Embedding({"frames": frames})


class Nameless(Metric):
    """Says nothing of itself."""

    embed, compare = CommonMean.embed, CommonMean.compare
'''


@pytest.fixture
def own(tmp_path, monkeypatch) -> Iterator[str]:
    """Name of a module with metrics of one's own in the current folder, where nothing is imported from."""
    name = f"own_{tmp_path.name}".replace("-", "_").replace("[", "_").replace("]", "_")
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def imported(own, tmp_path, monkeypatch) -> str:
    """The same module, importable here."""
    monkeypatch.syspath_prepend(tmp_path)
    return own


def compute(frames: Path, out: Path, **settings):
    with Cluster(Profile(kind="none")) as cluster:
        return compute_distances(frames, out, Settings(**({"size": None} | settings)), cluster=cluster)


def energies(sequence: np.ndarray, exponent: float = 2.0) -> np.ndarray:
    """The matrix of :class:`Energy`, by NumPy."""
    mean = (lsim.preprocess(sequence, size=None).astype(float) ** exponent).mean(axis=(1, 2, 3))
    matrix = np.abs(mean[:, None] - mean[None, :])
    np.fill_diagonal(matrix, 0)
    return matrix


def test_from_the_command_line_on_any_cluster_and_again_when_its_source_changes(tmp_path, own):
    archive = archive_of(3, size=16)
    archive["A/density"]["s0"][3, 1, 1] = np.nan
    frames = write_archive(tmp_path / "frames.zarr", archive)

    def run(*cluster: str) -> str:
        metrics = ("--metrics", f"l2,{own}:CommonMean,{own}:Rise", "--metric", f"{own}:Energy")
        metrics += ("--metric", f"{own}:MeanPower", "--option", "mean-power.exponent=3", "--mask", "nan")
        code, text = run_lsim(
            "distances", frames, "--out", "d.zarr", *metrics, "--size", "0", "--block", "1", *cluster
        )
        assert code == 3, text
        assert "takes no mask" in text
        return text

    def check(factor: float) -> None:
        found = matrices_of(tmp_path / "d.zarr")
        assert found.keys() == {"l2", "common-mean", "rise", "energy", "mean-power"}
        for row, sequence in enumerate(archive["A/density"].values()):
            np.testing.assert_allclose(found["energy"][row], factor * energies(sequence), rtol=1e-9)
            np.testing.assert_allclose(found["mean-power"][row], energies(sequence, 3), rtol=1e-9)
            np.testing.assert_allclose(found["rise"][row], factor * energies(sequence) / 2, rtol=1e-9)
        assert np.isnan(found["energy"][0, 3, :3]).all()
        assert np.isfinite(found["common-mean"]).all()

    text = run("--cluster", "none")
    assert "15 distance matrices computed" in text
    assert "not symmetric, stored as ½ (d(a, b) + d(b, a)): rise" in text
    check(1)
    specification = dict(store.specifications(tmp_path / "d.zarr"))["mean-power"]
    assert specification["options"] == {"exponent": 3, "precision": "exact"}

    # All metrics of a file that has changed: only l2 is as it was.
    (tmp_path / f"{own}.py").write_text(SOURCE.replace("factor = 1.0", "factor = 10.0"))
    assert "12 distance matrices computed, 3 up to date" in run("--workers", "1")
    check(10)


def test_a_check_of_a_cluster_takes_what_distances_takes(tmp_path, own):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(2, frames=4, size=64))
    metrics = ("--metrics", f"l2,{own}:Energy", "--metric", f"{own}:MeanPower")
    told = ("--option", "mean-power.exponent=3", "--weights", f"mine={SHIPPED}")
    code, text = run_lsim("cluster", "check", "local", frames, "--workers", "1", *metrics, *told)
    assert code == 0, text
    assert "metrics: l2, energy, mean-power, mine\n" in text
    assert "A/density: a sequence of 4 frames takes" in text
    code, text = run_lsim("cluster", "check", "none", frames, *metrics, "--option", "mean-power.exponnent=3")
    assert code == 1
    assert "has no option exponnent" in text


def test_beside_a_workflow_and_besides_its_metrics(tmp_path, own):
    folder = tmp_path / "study"
    folder.mkdir()
    (tmp_path / f"{own}.py").rename(folder / f"{own}.py")
    np.savez(folder / "s1.npz", frames=smooth_sequence(1, frames=4, size=16), parameter=np.arange(4))
    (folder / "catalog.yaml").write_text(
        "name: study\ndatasets:\n"
        "- {name: A, source: {path: s1.npz}, reader: stack, options: {field: density}}\n"
    )
    (folder / "study.yaml").write_text(
        f"catalog: catalog.yaml\nout: unused\ndistances:\n  size: null\n  metrics: [l1, '{own}:Energy']\n"
        "  options: {mean-power: {exponent: 3}}\ncorrelate: {replicates: 0}\n"
    )
    besides = ("--metric", f"{own}:MeanPower", "--option", "mean-power.precision=ranking")
    code, text = run_lsim("run", folder / "study.yaml", "--out", "out", *besides, "--cluster", "none")
    assert code == 0, text
    assert matrices_of(tmp_path / "out/distances.zarr").keys() == {"l1", "energy", "mean-power"}
    specification = dict(store.specifications(tmp_path / "out/distances.zarr"))["mean-power"]
    assert specification["options"] == {"exponent": 3, "precision": "ranking"}


def test_a_worker_that_cannot_import_it_is_named_before_anything_is_computed(tmp_path, own, monkeypatch):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(2))
    with LocalCluster(n_workers=1, dashboard_address=None, silence_logs=40) as far:
        monkeypatch.syspath_prepend(tmp_path)  # here, and not where the worker runs already
        settings = Settings(metrics=("l1", f"{own}:Energy"), size=None)
        message = f"worker .* the module '{own}' must be installed there"
        profile = Profile(kind="address", address=far.scheduler_address)
        with Cluster(profile) as cluster, pytest.raises(ClusterError, match=message):
            compute_distances(frames, tmp_path / "d.zarr", settings, cluster=cluster)
    assert np.isnan(matrices_of(tmp_path / "d.zarr")["l1"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mean-power": {"exponnent": 3}},
            "'mean-power' has no option exponnent; it has: exponent, precision",
        ),
        ({"l1": {"window": 3}}, "'l1' has no option window; it has: none"),
        ({"men-power": {"exponent": 3}}, "'men-power', which is no metric; there are l1, l2, .*mean-power"),
    ],
)
def test_unknown_options_are_errors_before_anything_starts(tmp_path, imported, options, message):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(1))
    with pytest.raises(ValueError, match=message):
        compute(frames, tmp_path / "d.zarr", metrics=("all", f"{imported}:MeanPower"), options=options)
    assert not (tmp_path / "d.zarr").exists()


def test_ranking_is_asked_of_metrics_that_know_it_alone(tmp_path, imported):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(2))
    metrics = ("l1", f"{imported}:MeanPower")
    compute(frames, tmp_path / "d.zarr", metrics=metrics)
    report = compute(frames, tmp_path / "d.zarr", metrics=metrics, precision="ranking")
    assert (report.computed, report.up_to_date) == (2, 2)
    specifications = dict(store.specifications(tmp_path / "d.zarr"))
    assert specifications["mean-power"]["options"]["precision"] == "ranking"
    told = {"mean-power": {"precision": "exact"}}
    report = compute(frames, tmp_path / "d.zarr", metrics=metrics, precision="ranking", options=told)
    assert report.computed == 2


@pytest.mark.parametrize("scope", ["sequence", "pair", "dataset"])
def test_missing_pixels_are_left_out_where_a_metric_can_and_their_frames_where_not(tmp_path, imported, scope):
    archive = archive_of(2)
    archive["A/density"]["s1"][2, 5:9, 5] = np.nan
    frames = write_archive(tmp_path / "frames.zarr", archive)
    metrics = (f"{imported}:CommonMean", f"{imported}:Energy")
    report = compute(frames, tmp_path / "d.zarr", metrics=metrics, mask="nan", scope=scope)
    assert {(f.sequence, f.metric) for f in report.failures} == {("s1", "energy")}
    assert report.failures[0].reason == "frames 2 hold NaN or infinity, and this metric takes no mask"
    found = matrices_of(tmp_path / "d.zarr")
    assert np.isfinite(found["common-mean"]).all()
    assert np.isnan(found["energy"][1, 2, [0, 1, 3, 4]]).all()
    if scope == "sequence":
        metric = lsim.load_metric(f"{imported}:CommonMean", size=None)
        expected = metric.pairwise(archive["A/density"]["s1"], mask="nan")
        np.testing.assert_array_equal(found["common-mean"][1], expected)
        without = compute(frames, tmp_path / "d.zarr", metrics=metrics)
        assert (without.computed, without.up_to_date) == (2, 2)  # the mask is another specification
        assert {f.metric for f in without.failures} == {"energy", "common-mean"}


def test_what_is_known_of_it_is_shown(own, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["lsim", "metrics", f"{own}:Rise"])
    with pytest.raises(SystemExit, match="0"):
        main()
    shown = capsys.readouterr().out
    assert "½ (d(a, b) + d(b, a))" in shown
    assert re.search(r"units: +levels²", shown)


@pytest.mark.parametrize(
    "changes", [{}, {"pairs": "reference"}, {"scope": "pair"}], ids=["all", "row", "pair"]
)
def test_a_metric_that_is_not_symmetric_is_stored_as_the_mean_of_both_ways(tmp_path, imported, changes):
    archive = archive_of(3)
    frames = write_archive(tmp_path / "frames.zarr", archive)
    report = compute(frames, tmp_path / "d.zarr", metrics=(f"{imported}:Rise", "l1"), **changes)
    assert report.symmetrised == ["rise"]
    schema.validate_distances(store.open_dataset(tmp_path / "d.zarr", "A/density").load(), "d")
    metric = lsim.load_metric(f"{imported}:Rise", size=None)
    for found, sequence in zip(
        matrices_of(tmp_path / "d.zarr")["rise"], archive["A/density"].values(), strict=True
    ):
        one_way = metric.pairwise(sequence, changes.get("scope", "sequence"))
        assert not np.allclose(one_way, one_way.T)
        expected = (one_way + one_way.T) / 2
        np.fill_diagonal(expected, 0)
        if "pairs" in changes:
            found, expected = found[0], expected[0]
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    specifications = dict(store.specifications(tmp_path / "d.zarr"))
    assert specifications["rise"]["symmetrised"] is True
    assert "symmetrised" not in specifications["l1"]
    correlate(tmp_path / "d.zarr", tmp_path / "results", replicates=0)
    page = write_report(tmp_path / "results").read_text()
    assert "not symmetric" in page
    assert "rise" in page[page.index("not symmetric") :][:200]


def test_a_source_that_changes_under_a_running_process_is_not_taken_for_what_it_computes(tmp_path, imported):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(2))
    compute(frames, tmp_path / "d.zarr", metrics=(f"{imported}:Energy",))
    before = matrices_of(tmp_path / "d.zarr")["energy"]
    (tmp_path / f"{imported}.py").write_text(SOURCE.replace("factor = 1.0", "factor = 10.0"))
    # This process has the old class; the new file's distances are for a new one to compute.
    report = compute(frames, tmp_path / "d.zarr", metrics=(f"{imported}:Energy",))
    assert (report.computed, report.up_to_date) == (0, 2)
    np.testing.assert_array_equal(matrices_of(tmp_path / "d.zarr")["energy"], before)


def test_names_that_are_taken_and_classes_that_are_no_metrics_are_errors_before_anything_starts(
    tmp_path, imported, monkeypatch
):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(1))
    (tmp_path / f"{imported}_b.py").write_text(SOURCE)
    (tmp_path / f"{imported}_c.py").write_text(
        SOURCE.replace("class Energy", "class L2").replace("(Energy)", "(L2)")
    )
    wrong = {
        "would both be called 'energy'": (f"{imported}:Energy", f"{imported}_b:Energy"),
        "cannot be named sequence": (f"{imported}:Sequence",),
        "called 'l2', as a metric that is there": (f"{imported}_c:L2",),
        "no metric at 'nowhere_at_all:Energy'": ("l1", "nowhere_at_all:Energy"),
        "no metric at .*:Enrgy": (f"{imported}:Enrgy",),
        "Halfway' is incomplete: missing compare$": (f"{imported}:Halfway",),
        "Nameless' is incomplete: missing info": (f"{imported}:Nameless",),
        "lsim:Metric' is incomplete: missing compare, embed, info": ("l1", "lsim:Metric"),
    }
    for message, metrics in wrong.items():
        with pytest.raises((ValueError, lsim.UnknownMetricError), match=message):
            compute(frames, tmp_path / "d.zarr", metrics=metrics)
    assert not (tmp_path / "d.zarr").exists()


def test_a_run_says_where_its_time_went_and_how_precise_its_metrics_were(tmp_path, imported):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(3))
    compute(
        frames, tmp_path / "d.zarr", metrics=("l1", f"{imported}:Promising", f"{imported}:Unsure"), block=1
    )
    root = store.open_store(tmp_path / "d.zarr")
    (run,) = root.attrs["runs"]
    assert run["seconds_by_stage"].keys() == {"load", "read", "prepare", "metrics", "write"}
    assert run["seconds_by_metric"].keys() == {"l1", "promising", "unsure"}
    assert sum(run["seconds_by_stage"].values()) <= run["seconds"]
    kept = store.get_group(root, "A/density/provenance").attrs["precision"]
    assert kept.keys() == {"l1", "promising", "unsure"}
    assert re.match(r"not stated \(TypeError: .* found \{'bound': 1e-06\}", kept["unsure"]["method"])
    assert (kept["unsure"]["promise"], kept["unsure"]["pairs"]) == (1, 0)
    assert 0 <= kept["l1"]["bound"] <= kept["l1"]["promise"]
    expected = {"method": "by hand", "promise": 1e-5, "bound": 2e-6, "pairs": 24, "recomputed": 6}
    assert expected.items() <= kept["promising"].items()
    assert kept["promising"]["share_recomputed"] == 0.25
    assert kept["promising"]["device"] == "cpu"
