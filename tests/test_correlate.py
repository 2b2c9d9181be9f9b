"""Correlations: as the published evaluation has them, with intervals, and nothing left out in silence."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import NOISE, make_distances, parameters, random_distances, write_field

from pipeline.correlate import CorrelationError, correlate, statistics
from pipeline.storage import store

MODES = ("spearman", "pearson", "pearsonMean", "spearmanMean")


def values(report) -> pd.Series:
    columns = ["protocol", "dataset", "field", "metric", "statistic"]
    return report.correlations.set_index(columns).sort_index()["value"]


# -- Statistics on arrays ------------------------------------------------------------------------------


def test_ground_truth_has_ties_where_steps_are_equal():
    truth = statistics.ground_truth(parameters(1), statistics.all_pairs(11))
    assert len(np.unique(truth)) == 10


def test_pairs_never_hold_the_diagonal():
    for protocol, pairs in statistics.PAIRS.items():
        i, j = pairs(11)
        assert (i < j).all(), protocol
        assert len(i) == {"published": 10, "all-pairs": 55}[protocol]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 6).flatmap(
        lambda units: st.tuples(
            st.lists(st.integers(0, 4), min_size=3 * units, max_size=3 * units),
            st.lists(st.integers(0, 3), min_size=3 * units, max_size=3 * units),
            st.lists(st.integers(0, 3), min_size=units, max_size=units).filter(any),
        )
    )
)
def test_weighted_statistics_equal_those_of_repeated_pairs(drawn):
    x, y, weights = (np.array(part, dtype=float) for part in drawn)
    unit = np.repeat(np.arange(weights.size), 3)
    repeated = np.repeat(np.arange(x.size), weights.astype(int)[unit])
    w = weights.astype(np.int32)[None]
    spearman, kendall = statistics.bootstrap_ranks(x, y, unit, w)
    found = {"spearman": spearman, "kendall": kendall}
    varies = np.ptp(x[repeated]) > 0 and np.ptp(y[repeated]) > 0
    if varies:
        found["pearson"] = statistics.bootstrap_pearson(x, y, unit, w)
    for name, value in found.items():
        expected = statistics.correlation(x[repeated], y[repeated], name)
        np.testing.assert_allclose(value[0], expected, atol=1e-10, err_msg=name)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_collapsed_strata_are_never_small_when_there_are_enough_units(labels):
    strata = statistics.collapse_strata(np.array(labels))
    _, sizes = np.unique(strata, return_counts=True)
    assert sizes.min() >= min(statistics.MINIMUM_UNITS, len(labels))
    large = [k for k in set(labels) if labels.count(k) >= statistics.MINIMUM_UNITS]
    assert len(sizes) >= len(large) - 1  # large strata stay apart, but one that takes up the small


def test_draws_keep_the_size_of_each_stratum():
    strata = np.array([0, 0, 0, 1, 1, 1, 1])
    weights = statistics.draw_weights(strata, 50, seed=3)
    assert (weights[:, :3].sum(axis=1) == 3).all()
    assert (weights[:, 3:].sum(axis=1) == 4).all()
    assert np.unique(weights, axis=0).shape[0] > 10


def test_interval_covers_the_truth_about_as_often_as_it_says():
    # Clusters with their own offset: an interval over pairs would be far too narrow here.
    rng = np.random.default_rng(1)
    covered, replicates = 0, 120
    y = np.tile(np.linspace(0.1, 1, 10), 30)
    unit = np.repeat(np.arange(30), 10)

    def draw(clusters: int) -> np.ndarray:
        slope = np.repeat(rng.normal(1, 0.8, clusters), 10)
        return slope * np.tile(np.linspace(0.1, 1, 10), clusters) + rng.normal(0, 0.3, clusters * 10)

    truth = np.corrcoef(draw(20000), np.tile(np.linspace(0.1, 1, 10), 20000))[0, 1]
    for k in range(replicates):
        weights, x = statistics.draw_weights(np.zeros(30, int), 400, seed=k), draw(30)
        replicated = statistics.bootstrap_pearson(x, y, unit, weights)
        low, high = statistics.interval(replicated, statistics.correlation(x, y, "pearson"))
        covered += low <= truth <= high
    assert 0.85 <= covered / replicates <= 0.99


def test_sequence_correlations_equal_scipy():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, (2, 8, 12)).astype(float)
    for name, reference in (("pearson", scipy.stats.pearsonr), ("spearman", scipy.stats.spearmanr)):
        expected = [reference(a, b).statistic for a, b in zip(x, y, strict=True)]
        np.testing.assert_allclose(statistics.sequence_correlations(x, y, name), expected)


# -- The stage -----------------------------------------------------------------------------------------


def test_golden_evaluation(shared: Path, tmp_path: Path):
    distances = np.load(shared / "reference/golden/distances.npz")
    expected = np.load(shared / "reference/golden/evaluation.npz")
    metrics, sets = [str(m) for m in expected["names"]], [str(s) for s in expected["sets"]]
    root = store.open_store(tmp_path / "distances.zarr", "a")
    i, j = np.triu_indices(11, k=1)
    for name in sets[:4]:
        matrices = {metric: np.zeros((1, 11, 11)) for metric in metrics}
        for metric, matrix in matrices.items():
            matrix[0, i, j] = matrix[0, j, i] = distances[f"{name}/{metric}"]
        write_field(root, f"{name}/field", ["sequence"], parameters(1), matrices)
    pools = {sets[4]: ["scal256", "vec224"], sets[5]: sets[:4]}
    store.set_attributes(root, {"datasets": sets[:4], "pools": pools})

    report = correlate(tmp_path / "distances.zarr", tmp_path / "out", protocol=["published", "all-pairs"])
    found = values(report)
    assert report.left_out.empty
    for cut, protocol in (("cut10", "published"), ("cut55", "all-pairs")):
        for mode in MODES:
            table = expected[f"{cut}/{mode}"]
            for s, name in enumerate(sets):
                for m, metric in enumerate(metrics):
                    key = (protocol, name, "all", metric)
                    if mode.endswith("Mean"):
                        mean, std = found[(*key, mode)], found[(*key, mode.replace("Mean", "Std"))]
                        np.testing.assert_allclose([mean, std], table[s, :, m], atol=1e-6)
                    else:
                        np.testing.assert_allclose(found[(*key, mode)], table[s, m], atol=1e-6)


def test_published_inputs_are_the_authors(shared: Path):
    distances = np.load(shared / "reference/golden/distances.npz")
    expected = np.load(shared / "reference/golden/evaluation.npz")
    i, j = np.triu_indices(11, k=1)
    for cut, protocol in (("cut10", "published"), ("cut55", "all-pairs")):
        for m, metric in enumerate(expected["names"]):
            matrices = np.zeros((4, 11, 11))
            for s, name in enumerate(expected["sets"][:4]):
                matrices[s, i, j] = distances[f"{name}/{metric}"]
            predictions, targets = statistics.pooled_inputs(matrices, parameters(4), protocol)
            np.testing.assert_allclose(predictions.ravel(), expected[f"{cut}/predictions_all"][m], atol=1e-12)
            np.testing.assert_array_equal(targets.ravel(), expected[f"{cut}/targets_all"][0])


def test_intervals_contain_the_value_and_better_metrics_rank_higher(tmp_path: Path):
    fields, attributes = {"A/scalar": 12, "B/scalar": 9}, {"pools": {"All": ["A", "B"]}}
    path = make_distances(tmp_path / "d.zarr", fields, attributes=attributes)
    report = correlate(path, tmp_path / "out", protocol=["published", "all-pairs"], replicates=500)
    table = report.correlations
    assert (table.low <= table.value).all()
    assert (table.value <= table.high).all()
    found = values(report)
    for dataset in ("A", "B", "All"):
        ranked = [found["published", dataset, "all", m, "spearman"] for m in ("good", "fair", "poor")]
        assert ranked == sorted(ranked, reverse=True)
    pool = table[(table.dataset == "All") & (table.protocol == "published")]
    assert set(pool.sequences) == {21}
    assert set(pool.pairs) == {210}


def test_equal_metrics_differ_by_exactly_nothing(tmp_path: Path):
    root = store.open_store(tmp_path / "d.zarr", "a")
    parameter = parameters(8)
    matrices = random_distances(parameter, 0.3, seed=5)
    other = random_distances(parameter, 0.01, seed=6)
    metrics = {"one": matrices, "same": matrices, "other": other}
    write_field(root, "A/scalar", list("abcdefgh"), parameter, metrics)
    report = correlate(tmp_path / "d.zarr", tmp_path / "out", replicates=300)
    table = report.differences.set_index(["metric", "metric_other"])
    same = table.loc[("one", "same")]
    assert (same[["difference", "low", "high"]].to_numpy() == 0).all()
    apart = table.loc[("one", "other")].set_index("statistic").loc["spearman"]
    assert apart.high < 0  # "other" is certainly better


def test_unusable_sequences_are_left_out_of_that_metric_and_named(tmp_path: Path):
    parameter, root = parameters(6), store.open_store(tmp_path / "d.zarr", "a")
    names = ["fine0", "fine1", "fine2", "nan", "constant", "identical"]
    matrices = random_distances(parameter, 0.1, seed=0)
    broken = matrices.copy()
    broken[3, 0, 4] = broken[3, 4, 0] = np.nan
    broken[4] = 2.0 * (1 - np.eye(11))
    broken[5, 0, 2] = broken[5, 2, 0] = -np.inf  # PSNR of identical frames, negated
    write_field(
        root,
        "A/scalar",
        names,
        parameter,
        {"psnr": broken, "l2": matrices},
        {("psnr", "nan"): "GPU fell off"},
    )
    report = correlate(tmp_path / "d.zarr", tmp_path / "out", replicates=200)

    left = pd.read_csv(report.out / "left_out.csv", keep_default_na=False).set_index("sequence")
    assert set(left.index) == {"nan", "constant", "identical"}
    assert set(left.metric) == {"psnr"}
    assert "frames 0 and 4 is nan: GPU fell off" in left.reason["nan"]
    assert "constant" in left.reason["constant"]
    assert "frames 0 and 2 is -inf" in left.reason["identical"]

    rows = report.correlations[report.correlations.statistic == "spearman"].set_index("metric")
    assert rows.sequences.to_dict() == {"psnr": 3, "l2": 6}
    assert rows.left_out.to_dict() == {"psnr": 3, "l2": 0}
    # The rest counts as if the broken ones had never been there.
    predictions, targets = statistics.pooled_inputs(matrices[:3], parameter[:3], "published")
    expected = scipy.stats.spearmanr(predictions.ravel(), targets.ravel()).statistic
    assert rows.value["psnr"] == pytest.approx(expected)
    # A difference is judged on the sequences in common alone, where these two metrics are the same.
    assert (report.differences[["difference", "low", "high"]].to_numpy() == 0).all()
    assert set(report.differences.sequences) == {3}


def test_a_sequence_may_be_usable_in_one_protocol_only(tmp_path: Path):
    root, parameter = store.open_store(tmp_path / "d.zarr", "a"), parameters(4)
    matrices = random_distances(parameter, 0.1, seed=0)
    matrices[2, 5, 6] = matrices[2, 6, 5] = np.inf
    write_field(root, "A/scalar", list("abcd"), parameter, {"m": matrices})
    report = correlate(
        tmp_path / "d.zarr", tmp_path / "o", protocol=["published", "all-pairs"], replicates=50
    )
    assert report.left_out[["sequence", "protocol"]].to_numpy().tolist() == [["c", "all-pairs"]]


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_sequences_have_no_interval_and_say_so(tmp_path: Path, count: int):
    path = make_distances(tmp_path / "d.zarr", {"A/scalar": count})
    report = correlate(path, tmp_path / "out", replicates=100)
    assert report.correlations.value.notna().all()
    assert report.correlations[["low", "high"]].isna().all(axis=None)
    assert report.differences[["low", "high"]].isna().all(axis=None)
    assert any("no intervals" in note and str(count) in note for note in report.notes)


def test_a_metric_without_any_usable_sequence(tmp_path: Path):
    root, parameter = store.open_store(tmp_path / "d.zarr", "a"), parameters(4)
    matrices = {"fine": random_distances(parameter, 0.1, 0), "void": np.full((4, 11, 11), np.nan)}
    write_field(root, "A/scalar", list("abcd"), parameter, matrices)
    report = correlate(tmp_path / "d.zarr", tmp_path / "out", replicates=100)
    void = report.correlations[report.correlations.metric == "void"]
    assert void[["value", "low", "high"]].isna().all(axis=None)
    assert set(void.sequences) == {0}
    assert set(void.left_out) == {4}
    table = pd.read_csv(report.out / "correlation.csv", index_col="Metric")
    assert np.isnan(table.A["void"])
    assert table.A["fine"] > 0.5


def test_fields_are_pooled_and_split_and_resampled_by_simulation(tmp_path: Path):
    root, parameter = store.open_store(tmp_path / "d.zarr", "a"), parameters(5)
    matrices = random_distances(parameter, 0.4, seed=2)
    for field in ("density", "vel"):
        write_field(root, f"A/{field}", [f"plume{k}.{field}" for k in range(5)], parameter, {"m": matrices})
    report = correlate(tmp_path / "d.zarr", tmp_path / "out", replicates=300)
    table = report.correlations[report.correlations.statistic == "pearson"].set_index("field")
    assert list(table.index) == ["all", "density", "vel"]
    assert table.sequences.to_dict() == {"all": 10, "density": 5, "vel": 5}
    # The second field adds nothing new, so the interval must not become narrower for it.
    bounds = table[["value", "low", "high"]].to_numpy()
    np.testing.assert_allclose(bounds[0], bounds[1], atol=1e-12)


def test_a_metric_missing_from_one_field_is_left_out_there(tmp_path: Path):
    root, parameter = store.open_store(tmp_path / "d.zarr", "a"), parameters(4)
    matrices = random_distances(parameter, 0.1, 0)
    write_field(root, "A/rgb", list("abcd"), parameter, {"m": matrices, "colour": matrices})
    write_field(root, "B/scalar", list("efgh"), parameter, {"m": matrices})
    store.set_attributes(root, {"pools": {"All": ["A", "B", "C"]}})
    report = correlate(tmp_path / "d.zarr", tmp_path / "out", replicates=50)
    assert set(report.left_out.sequence) == set("efgh")
    assert report.left_out.reason.str.contains("not computed").all()
    pooled = report.correlations[(report.correlations.dataset == "All")].set_index(["metric", "statistic"])
    assert pooled.sequences["colour", "pearson"] == 4
    assert pooled.sequences["m", "pearson"] == 8
    assert any("All" in note and "C" in note for note in report.notes)


def test_published_layout(tmp_path: Path, shared: Path):
    attributes = {"pools": {"All": ["AdvD", "Vid"]}}
    path = make_distances(tmp_path / "d.zarr", {"Vid/rgb": 4, "AdvD/density": 4}, attributes=attributes)
    report = correlate(path, tmp_path / "out", replicates=50)
    text = (report.out / "correlation.csv").read_bytes()
    reference = (shared / "reference/table1_correlations.csv").read_bytes()
    assert text.endswith(b"\r\n") == reference.endswith(b"\r\n")
    rows = list(csv.reader(text.decode().splitlines()))
    assert rows[0] == ["Metric", "Vid", "AdvD", "All"]  # the catalog's order, then pools
    assert [row[0] for row in rows[1:]] == list(NOISE)
    found = values(report)
    for row in rows[1:]:
        for name, cell in zip(rows[0][1:], row[1:], strict=True):
            assert float(cell) == round(found["published", name, "all", row[0], "spearman"], 3)


def test_run_again_computes_only_what_is_out_of_date(tmp_path: Path):
    path = make_distances(tmp_path / "d.zarr", {"A/scalar": 5})
    first = correlate(path, tmp_path / "out", replicates=200)
    assert not first.up_to_date
    again = correlate(path, tmp_path / "out", replicates=200)
    assert again.up_to_date
    pd.testing.assert_frame_equal(first.correlations, again.correlations, check_dtype=False)
    pd.testing.assert_frame_equal(first.differences, again.differences, check_dtype=False)

    assert not correlate(path, tmp_path / "out", replicates=201).up_to_date  # other settings
    assert not correlate(path, tmp_path / "out", replicates=201, seed=1).up_to_date
    (tmp_path / "out/differences.parquet").write_bytes(b"damaged")
    assert not correlate(path, tmp_path / "out", replicates=201, seed=1).up_to_date
    root = store.open_store(path, "r+")
    changed = store.read(store.get_array(root, "A/scalar/good"))
    changed[0, 0, 1] = changed[0, 1, 0] = 0.987
    store.write_rows(store.get_array(root, "A/scalar/good"), 0, changed)
    assert not correlate(path, tmp_path / "out", replicates=201, seed=1).up_to_date  # other distances
    assert correlate(path, tmp_path / "out", replicates=201, seed=1).up_to_date


def test_same_seed_same_bytes(tmp_path: Path):
    path = make_distances(tmp_path / "d.zarr", {"A/scalar": 6})
    tables = [correlate(path, tmp_path / f"out{k}", replicates=100, seed=k // 2) for k in range(3)]
    pd.testing.assert_frame_equal(tables[0].correlations, tables[1].correlations)
    assert not tables[0].correlations.low.equals(tables[2].correlations.low)


def test_record_tells_what_made_it(tmp_path: Path):
    path = make_distances(tmp_path / "d.zarr", {"A/scalar": 3})
    correlate(path, tmp_path / "results/nested", replicates=20, seed=7)
    record = json.loads((tmp_path / "results/nested/correlations.json").read_text())
    assert (tmp_path / "results/nested" / record["distances"]).resolve() == path.resolve()
    assert record["identity"]["seed"] == 7
    assert record["identity"]["replicates"] == 20
    assert record["versions"]["numpy"] == np.__version__
    assert record["seconds"] > 0


def test_values_that_are_out_of_date_do_not_count(tmp_path: Path):
    root, parameter = store.open_store(tmp_path / "d.zarr", "a"), parameters(5)
    matrices = random_distances(parameter, 0.1, 0)
    gone = {("m", "b"): "WorkerDied: three times"}  # the distances there are those of the data before
    write_field(root, "A/scalar", list("abcde"), parameter, {"m": matrices}, gone)
    marks = store.get_array(root, "A/scalar/provenance/fingerprint")
    kept = store.read(marks)
    kept[0, 3] = ""
    store.write_rows(marks, 0, kept)
    report = correlate(tmp_path / "d.zarr", tmp_path / "out", replicates=20)
    left = report.left_out.set_index("sequence").reason
    assert left["b"] == "WorkerDied: three times"
    assert "run distances again" in left["d"]
    assert set(report.correlations.sequences) == {3}


def test_all_pairs_of_a_store_with_reference_pairs_is_refused(tmp_path: Path):
    root, parameter = store.open_store(tmp_path / "d.zarr", "a"), parameters(4)
    matrices = random_distances(parameter, 0.1, 0)
    matrices[:, 1:, 1:] = np.where(np.eye(10, dtype=bool), 0, np.nan)
    write_field(root, "A/scalar", list("abcd"), parameter, {"m": matrices})
    store.set_attributes(root, {"pairs": "reference"})
    with pytest.raises(CorrelationError, match=r"all-pairs.*--pairs all"):
        correlate(tmp_path / "d.zarr", tmp_path / "out", protocol=["published", "all-pairs"])
    assert correlate(tmp_path / "d.zarr", tmp_path / "out", replicates=20).correlations.value.notna().all()


def test_faults_are_told_plainly(tmp_path: Path):
    path = make_distances(tmp_path / "d.zarr", {"A/scalar": 3})
    with pytest.raises(CorrelationError, match=r"'publshed'.*published, all-pairs"):
        correlate(path, tmp_path / "out", protocol="publshed")
    with pytest.raises(store.StoreError, match="no Zarr store here"):
        correlate(tmp_path / "absent.zarr", tmp_path / "out")
    store.open_store(tmp_path / "empty.zarr", "a")
    with pytest.raises(CorrelationError, match="no distances here"):
        correlate(tmp_path / "empty.zarr", tmp_path / "out")


# -- Claims --------------------------------------------------------------------------------------------


def noisy_metrics(count: int, sequences: int, noise: float, seed: int) -> list[np.ndarray]:
    """Scaled distances (sequence, pair) by metrics that are equally good, with noise in part in common."""
    rng = np.random.default_rng(seed)
    steps, common = np.linspace(0.1, 1, 10), rng.normal(size=(sequences, 10))
    own = rng.normal(size=(count, sequences, 10))
    return [statistics.scale(steps + noise * (0.55 * common + 0.83 * one)) for one in own]


def told_apart(predictions: list[np.ndarray], seed: int, replicates: int = 300) -> tuple[bool, bool, int]:
    """Whether the best is told apart from any other, by intervals of all at once and of one; which it is."""
    sequences = len(predictions[0])
    strata = np.zeros(sequences, int)
    weights = statistics.draw_weights(strata, replicates, seed)
    y = np.tile(np.linspace(0.1, 1, 10), sequences)
    unit = np.repeat(np.arange(sequences), 10)
    values = np.array([statistics.correlation(x.ravel(), y, "spearman") for x in predictions])
    drawn = np.array([statistics.bootstrap_ranks(x.ravel(), y, unit, weights)[0] for x in predictions])
    i, j = np.triu_indices(len(values), 1)
    family = statistics.Comparisons(values[i] - values[j], drawn[i] - drawn[j], strata)
    at_once = statistics.simultaneous_intervals([family])[0]
    alone = np.array(
        [statistics.interval(r, d) for r, d in zip(family.replicates, family.differences, strict=True)]
    )
    best = int(values.argmax())
    with_best = (i == best) | (j == best)
    apart = [((ends[:, 0] > 0) | (ends[:, 1] < 0))[with_best] for ends in (at_once, alone)]
    return bool(apart[0].any()), bool(apart[1].any()), best


@pytest.mark.parametrize(("metrics", "sequences"), [(22, 16), (6, 24)])
def test_the_best_of_equals_is_seldom_told_apart_from_any(metrics: int, sequences: int):
    found = [told_apart(noisy_metrics(metrics, sequences, 0.6, seed), seed) for seed in range(100)]
    at_once, alone = np.mean([pair[:2] for pair in found], axis=0)
    assert at_once <= 0.12  # 5 %, and three standard errors of a hundred reports
    assert alone > 0.35


def test_a_metric_that_is_better_is_told_apart():
    for seed in range(8):
        predictions = noisy_metrics(10, 32, 0.6, seed)
        predictions[3] = noisy_metrics(1, 32, 0.2, 100 + seed)[0]
        apart, _, best = told_apart(predictions, seed)
        assert apart
        assert best == 3


def test_simultaneous_intervals_of_what_has_none_leave_others_as_they_are():
    rng = np.random.default_rng(0)
    differences = np.array([0.3, 0.0, np.nan, 0.2])
    replicates = differences[:, None] + 0.05 * rng.normal(size=(4, 400))
    replicates[1] = 0
    replicates[3, 7] = np.nan
    strata = np.zeros(20, int)
    (found,) = statistics.simultaneous_intervals([statistics.Comparisons(differences, replicates, strata)])
    (alone,) = statistics.simultaneous_intervals(
        [statistics.Comparisons(differences[:1], replicates[:1], strata)]
    )
    np.testing.assert_array_equal(found[:1], alone)
    assert found[1].tolist() == [0, 0]
    assert np.isnan(found[2:]).all()
    none = statistics.Comparisons(differences, np.empty((4, 0)), strata)
    assert np.isnan(statistics.simultaneous_intervals([none])[0]).all()


def test_families_share_out_the_chance_of_an_error():
    rng = np.random.default_rng(0)
    family = statistics.Comparisons(np.zeros(5), rng.normal(size=(5, 2000)), np.zeros(20, int))
    (alone,) = statistics.simultaneous_intervals([family])
    both = statistics.simultaneous_intervals([family, family])
    np.testing.assert_array_equal(both[0], both[1])
    assert (both[0][:, 1] > alone[:, 1]).all()


def test_simultaneous_intervals_hold_those_of_each_difference(tmp_path: Path):
    path = make_distances(tmp_path / "d.zarr", {"A/scalar": 9})
    table = correlate(path, tmp_path / "out", replicates=300).differences
    assert (table.low_simultaneous <= table.low).all()
    assert (table.high_simultaneous >= table.high).all()


def test_metrics_judged_on_other_sequences_are_families_of_their_own_and_a_note_says_so(tmp_path: Path):
    root, parameter = store.open_store(tmp_path / "d.zarr", "a"), parameters(8)
    matrices = {name: random_distances(parameter, 0.2, seed) for seed, name in enumerate("abc")}
    matrices["c"][0] = np.nan
    write_field(root, "A/scalar", list("stuvwxyz"), parameter, matrices)
    report = correlate(tmp_path / "d.zarr", tmp_path / "out", replicates=200)
    assert any("taken on 2 sets of sequences" in note for note in report.notes)
    assert report.differences.low_simultaneous.notna().all()
