"""Scores of ensembles and spectra: equal to other packages, fair, proper, and what is missing is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from commands import run_lsim
from matrices import smooth_sequence, write_archive

import lsim
from pipeline.rollouts import RolloutSettings, compare
from pipeline.rollouts.ranking import rank
from pipeline.rollouts.scores import score_energy, score_pixels
from pipeline.rollouts.spectra import bands_of, choose_frames, measure_energy, wavenumbers
from pipeline.storage import store
from pipeline.verify import verify
from pipeline.verify.repair import repair
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

KEY = "A/density"
SIZE = 24


@pytest.fixture
def here():
    """This process."""
    with Cluster(Profile(kind="none")) as cluster:
        yield cluster


def reference_of(count: int = 3, frames: int = 5) -> dict[str, np.ndarray]:
    return {f"s{k}": smooth_sequence(k, frames, SIZE) for k in range(count)}


def members_of(
    reference: dict[str, np.ndarray], count: int, noise: float = 0.1, seed: int = 0
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        f"run{k}/{name}": (frames + noise * rng.standard_normal(frames.shape)).astype(np.float32)
        for k in range(count)
        for name, frames in reference.items()
    }


def results_of(path: Path, part: str) -> xr.Dataset:
    return store.open_dataset(path, f"{KEY}/{part}").load()


def embedded(metric: lsim.Metric, frames: np.ndarray) -> lsim.Embedding:
    return metric.embed_prepared(metric.prepare(frames, "none"))


# ---------------------------------------------------------------- the scores themselves


def example() -> tuple[np.ndarray, np.ndarray]:
    """Four members and their truth, (4, 5)."""
    y, x = np.mgrid[:4, :5].astype(float)
    truth = np.sin(y + 2 * x)
    return np.stack([truth + 0.3 * np.cos(m + y * x) + 0.1 * m for m in range(4)]), truth


def test_scores_are_those_of_other_packages():
    """scores 2.7.0, crps_for_ensemble(method="fair"); scoringrules 0.10.0, es_ensemble(estimator="fair").

    properscoring 0.1 and xskillscore 0.0.29 have the form that isn't fair: it counts the distance of each
    member to itself, and improves with the number of members.
    """
    members, truth = example()
    scores = score_pixels(members[:, None, :, :, None], truth[None, :, :, None])
    np.testing.assert_allclose(scores["crps"], 0.07534521349764871, rtol=1e-12)
    spread = np.abs(members[:, None] - members).sum(axis=(0, 1)).mean() / 2
    unfair = scores["crps"] + spread * (1 / (4 * 3) - 1 / 4**2)
    np.testing.assert_allclose(unfair, 0.1081882429130295, rtol=1e-12)
    rmse = lsim.load_metric("rmse", size=None, precision="double")
    energy = score_energy(
        rmse, [embedded(rmse, m[None, :, :, None]) for m in members], embedded(rmse, truth[None, :, :, None])
    )
    # Twice the score of vectors, by a distance that is divided by the root of their length.
    np.testing.assert_allclose(energy * np.sqrt(truth.size) / 2, 0.44730569205102844, rtol=1e-12)


def test_spread_and_skill_by_hand():
    members, truth = example()
    scores = score_pixels(members[:, None, :, :, None], truth[None, :, :, None])
    np.testing.assert_allclose(scores["spread"], np.sqrt(members.var(axis=0, ddof=1).mean()), rtol=1e-12)
    skill = np.sqrt(np.square(members.mean(axis=0) - truth).mean())
    np.testing.assert_allclose(scores["skill"], skill, rtol=1e-12)


def test_a_point_forecast_has_its_mean_error_and_no_spread():
    members, truth = example()
    scores = score_pixels(members[:1, None, :, :, None], truth[None, :, :, None])
    np.testing.assert_allclose(scores["crps"], np.abs(members[0] - truth).mean())
    assert scores["spread"] == 0


def test_small_differences_of_large_values_keep_their_digits():
    members, truth = example()
    near = score_pixels(members[:, None, :, :, None], truth[None, :, :, None])
    far = score_pixels(members[:, None, :, :, None] + 2.0**20, truth[None, :, :, None] + 2.0**20)
    for name, values in near.items():
        np.testing.assert_allclose(far[name], values, rtol=1e-8)


def test_fair_scores_do_not_depend_on_the_number_of_members():
    """Means over 400 draws of 2 and of 16 members agree within their noise; the plain form's do not."""
    rng = np.random.default_rng(0)
    rmse = lsim.load_metric("rmse", size=None)
    means: dict[int, list[float]] = {}
    for count in (2, 16):
        draws = rng.standard_normal((count, 400, 4, 4, 1))
        truth = rng.standard_normal((400, 4, 4, 1))
        crps = score_pixels(draws, truth)["crps"].mean()
        energy = score_energy(rmse, [embedded(rmse, of) for of in draws], embedded(rmse, truth)).mean()
        means[count] = [crps, energy]
    np.testing.assert_allclose(means[2], means[16], rtol=0.03)


@pytest.mark.parametrize("name", ["rmse", "lsim-open"])
def test_the_truth_itself_has_the_least_energy_score(name: str):
    """Members from the truth's distribution score better than too sure, too unsure and biased ones."""
    metric = lsim.load_metric(name, size=None)
    size, count = 48, 12
    rng = np.random.default_rng(1)
    base = smooth_sequence(0, 1, size)
    scope = (-4.0, 5.0)

    def embed(spread: float, shift: float = 0.0) -> lsim.Embedding:
        frames = base + shift + spread * rng.standard_normal((count, size, size, 1))
        return metric.embed_prepared(metric.prepare(frames.astype(np.float32), scope))

    truth = embed(0.4)
    means = {
        kind: score_energy(metric, [embed(*settings) for _ in range(6)], truth).mean()
        for kind, settings in {"true": (0.4,), "sure": (0.1,), "unsure": (1.0,), "biased": (0.4, 0.5)}.items()
    }
    assert min(means, key=lambda kind: means[kind]) == "true", means


# ---------------------------------------------------------------- in a comparison


def test_the_store_has_the_scores_of_the_frames(tmp_path, here):
    reference = reference_of()
    members = members_of(reference, 4)
    source = write_archive(tmp_path / "reference.zarr", {KEY: reference})
    model = write_archive(tmp_path / "m.zarr", {KEY: members})
    settings = RolloutSettings(metrics=("rmse", "ssim", "spectral"), scope={"spectral": "each"})
    report = compare(source, {"m": model}, tmp_path / "r.zarr", settings, cluster=here)
    assert (report.scored, report.failures) == (3 * 5, [])
    stored = results_of(tmp_path / "r.zarr", "ensemble")
    assert "energy-ssim" not in stored, "it is not Euclidean"
    assert stored["crps"].dims == ("model", "member", "sequence", "frame")
    rmse = lsim.load_metric("rmse", size=None)
    spectral = lsim.load_metric("spectral", size=None)
    for row, (name, truth) in enumerate(reference.items()):
        frames = [members[f"run{k}/{name}"] for k in range(4)]
        expected = score_pixels(np.stack(frames), truth)
        for score, values in expected.items():
            np.testing.assert_allclose(stored[score].values[0, 0, row], values, rtol=1e-12)
        to_truth = np.mean([rmse.distance(truth, of, scope="none") for of in frames], axis=0)
        pairs = [(a, b) for k, a in enumerate(frames) for b in frames[k + 1 :]]
        between = np.mean([rmse.distance(a, b, scope="none") for a, b in pairs], axis=0)
        energy = stored["energy-rmse"].values[0, 0, row]
        np.testing.assert_allclose(energy, 2 * to_truth - between, rtol=1e-6)
        own = [(of.astype(np.float64) - of.min()) / (of.max() - of.min()) for of in (truth, *frames)]
        distances = np.array([[spectral.distance(a, b, scope=(0.0, 1.0)) for b in own] for a in own])
        expected_energy = 2 * distances[0, 1:].mean(axis=0) - distances[1:, 1:].sum(axis=(0, 1)) / 12
        np.testing.assert_allclose(
            stored["energy-spectral"].values[0, 0, row], expected_energy, rtol=1e-4, atol=1e-6
        )


def test_a_member_that_changes_costs_its_model_alone(tmp_path, here):
    reference = reference_of()
    source = write_archive(tmp_path / "reference.zarr", {KEY: reference})
    members = members_of(reference, 3)
    models = {
        "a": write_archive(tmp_path / "a.zarr", {KEY: members}),
        "b": write_archive(tmp_path / "b.zarr", {KEY: members_of(reference, 2, seed=5)}),
    }
    out, settings = tmp_path / "r.zarr", RolloutSettings(metrics=("rmse",))
    first = compare(source, models, out, settings, cluster=here)
    assert first.scored == 2 * 3 * 4
    assert compare(source, models, out, settings, cluster=here).blocks == 0
    members["run1/s2"] = members["run1/s2"] + 1
    write_archive(models["a"], {KEY: members})
    report = compare(source, models, out, settings, cluster=here)
    assert (report.computed, report.scored) == (1, 4)
    added = {"c": write_archive(tmp_path / "c.zarr", {KEY: members_of(reference, 2, seed=9)})}
    report = compare(source, models | added, out, settings, cluster=here)
    assert (report.computed, report.scored, report.up_to_date) == (6, 3 * 4, 15)
    compare(source, models | added, tmp_path / "anew.zarr", settings, cluster=here)
    for part in ("ensemble", "spectra"):
        grown, anew = (results_of(path, part) for path in (out, tmp_path / "anew.zarr"))
        xr.testing.assert_identical(grown.sel(model=anew["model"]), anew)


def test_an_ensemble_without_one_of_its_members_has_no_score(tmp_path, here):
    """What is left of an ensemble, some of whose members blew up, would look better than it is."""
    reference = reference_of()
    members = members_of(reference, 3)
    members["run1/s0"][3:] = np.nan
    del members["run2/s1"]
    source = write_archive(tmp_path / "reference.zarr", {KEY: reference})
    model = write_archive(tmp_path / "m.zarr", {KEY: members})
    settings = RolloutSettings(metrics=("rmse",))
    report = compare(source, {"m": model}, tmp_path / "r.zarr", settings, cluster=here)
    reasons = {(f.sequence, f.metric): f.reason for f in report.failures if not f.member}
    stored = results_of(tmp_path / "r.zarr", "ensemble")
    for score in ("crps", "spread", "skill", "energy-rmse"):
        values = stored[score].values[0, 0]
        assert np.isfinite(values[0]).tolist() == [True, True, True, False, False]
        assert np.isnan(values[1]).all()
        assert np.isfinite(values[2]).all()
        assert reasons["s0", score] == "2 of 5 frames of the reference or a member have NaN"
        assert reasons["s1", score] == "no rollout of member run2"
    page = rank(tmp_path / "r.zarr", tmp_path / "results", replicates=50)
    overall = page.errors.query("frame == -1 and metric == 'crps'").iloc[0]
    assert (overall["members"], overall["incomplete"]) == (3, 2)


def test_masked_pixels_are_left_out_of_scores(tmp_path, here):
    reference = {
        name: np.where(np.arange(SIZE)[None, :, None, None] < 6, np.nan, frames).astype(np.float32)
        for name, frames in reference_of(2).items()
    }
    members = members_of(reference, 2)
    source = write_archive(tmp_path / "reference.zarr", {KEY: reference})
    model = write_archive(tmp_path / "m.zarr", {KEY: members})
    settings = RolloutSettings(metrics=("l2",), mask="nan", spectra=0)
    compare(source, {"m": model}, tmp_path / "r.zarr", settings, cluster=here)
    stored = results_of(tmp_path / "r.zarr", "ensemble")
    inner = np.stack([members[f"run{k}/s1"][:, 6:] for k in range(2)])
    expected = score_pixels(inner, reference["s1"][:, 6:])
    for score, values in expected.items():
        np.testing.assert_allclose(stored[score].values[0, 0, 1], values, rtol=1e-12)


def test_the_ratio_of_a_reliable_ensemble_is_one(tmp_path, here):
    """Truth and members are drawn alike; one that is too sure of itself is found."""
    rng = np.random.default_rng(4)
    base = reference_of(8, 3)

    def drawn(spread: float) -> dict[str, np.ndarray]:
        return {
            name: (frames + spread * rng.standard_normal(frames.shape)).astype(np.float32)
            for name, frames in base.items()
        }

    def ensemble(spread: float) -> dict[str, np.ndarray]:
        return {f"{k}/{name}": frames for k in range(3) for name, frames in drawn(spread).items()}

    source = write_archive(tmp_path / "reference.zarr", {KEY: drawn(0.3)})
    models = {
        name: write_archive(tmp_path / f"{name}.zarr", {KEY: ensemble(spread)})
        for name, spread in (("reliable", 0.3), ("sure", 0.1))
    }
    compare(source, models, tmp_path / "r.zarr", RolloutSettings(metrics=("l2",)), cluster=here)
    table = rank(tmp_path / "r.zarr", tmp_path / "results", replicates=200).spread
    overall = table.query("frame == -1").set_index("model")
    assert overall.loc["reliable", "low"] - 0.02 < 1 < overall.loc["reliable", "high"] + 0.02
    assert overall.loc["sure", "high"] < 0.5
    assert set(table["frame"]) == {-1, 0, 1, 2}


# ---------------------------------------------------------------- spectra


@pytest.mark.parametrize("shape", [(8, 8), (9, 7), (12, 5), (16, 32)])
def test_energies_add_up_to_the_mean_square(shape: tuple[int, int]):
    """Of waves without the corners, which are in no shell."""
    rng = np.random.default_rng(0)
    y, x = shape
    coefficients = np.fft.rfft2(rng.standard_normal((*shape, 2)), axes=(0, 1))
    side = max(shape)
    ky, kx = np.fft.fftfreq(y, 1 / side)[:, None], np.fft.rfftfreq(x, 1 / side)[None]
    coefficients[np.rint(np.hypot(ky, kx)) > side // 2] = 0
    frame = np.fft.irfft2(coefficients, shape, axes=(0, 1))
    energy = measure_energy(frame[None])
    assert energy.shape == (1, len(wavenumbers(y, x)))
    np.testing.assert_allclose(energy.sum(), np.square(frame).sum(axis=2).mean(), rtol=1e-12)


def test_a_wave_is_at_its_wavenumber_whatever_its_direction():
    """In cycles along the longer side: four along a side of half the length are eight."""
    y, x = np.mgrid[:32, :64]
    for phase in (8 * x / 64, 4 * y / 32, 6 * x / 64 + 3 * y / 32):
        (energy,) = measure_energy(np.sin(2 * np.pi * phase)[None, :, :, None])
        np.testing.assert_allclose(energy[8], 0.5 if phase is not None else 0, atol=1e-12)


def test_bands_hold_every_wavenumber_once():
    for count in (2, 3, 5, 33, 65, 513):
        numbers = np.concatenate(bands_of(np.arange(float(count))))
        assert sorted(numbers.tolist()) == list(range(1, count))


def test_a_model_that_lacks_small_scales_is_found(tmp_path, here):
    rng = np.random.default_rng(0)
    reference = {f"s{k}": rng.standard_normal((4, SIZE, SIZE, 1)).astype(np.float32) for k in range(6)}

    def smoothed(frames: np.ndarray) -> np.ndarray:
        coefficients = np.fft.rfft2(frames, axes=(1, 2))
        coefficients[:, np.abs(np.fft.fftfreq(SIZE, 1 / SIZE)) > 5] = 0
        coefficients[:, :, 6:] = 0
        return np.fft.irfft2(coefficients, (SIZE, SIZE), axes=(1, 2)).astype(np.float32)

    source = write_archive(tmp_path / "reference.zarr", {KEY: reference})
    smooth = {name: smoothed(frames) for name, frames in reference.items()}
    model = write_archive(tmp_path / "m.zarr", {KEY: smooth})
    settings = RolloutSettings(metrics=("l2",), spectra=2)
    compare(source, {"m": model}, tmp_path / "r.zarr", settings, cluster=here)
    stored = results_of(tmp_path / "r.zarr", "spectra")
    assert stored["energy"].dims == ("model", "member", "sequence", "frame", "wavenumber")
    assert stored["model"].values.tolist() == ["m", "reference"]
    np.testing.assert_array_equal(stored["energy"].values[1, 0, 2], measure_energy(reference["s2"][[0, 3]]))
    tables = rank(tmp_path / "r.zarr", tmp_path / "results", replicates=200).spectra
    bands = tables["bands"].query("time == 1").set_index("band")
    assert bands.loc["high", "high"] < -0.9
    np.testing.assert_allclose(bands.loc["low", ["low", "high"]].astype(float), 0, atol=1e-5)
    mean = tables["spectra"].query("model == 'reference' and time == 0 and wavenumber == 3")
    expected = np.mean([measure_energy(frames[:1])[0, 3] for frames in reference.values()])
    np.testing.assert_allclose(mean["energy"], expected)


def test_frames_of_spectra_are_the_nearest_to_given_times(tmp_path, here):
    times = np.linspace(0, 1, 5)
    assert choose_frames(times, (0.9, 0.3)).tolist() == [1, 4]
    reference = reference_of(2)
    source = write_archive(tmp_path / "reference.zarr", {KEY: reference})
    model = write_archive(tmp_path / "m.zarr", {KEY: reference})
    out = tmp_path / "r.zarr"
    for chosen, expected in (((0.3,), [0.25]), (3, [0, 0.5, 1]), (1, [0])):
        settings = RolloutSettings(metrics=("l2",), spectra=chosen)
        compare(source, {"m": model}, out, settings, cluster=here)
        stored = results_of(out, "spectra")
        assert stored["time"].values[0].tolist() == expected
        assert np.isfinite(stored["energy"].values[:, 0]).all()


@pytest.mark.parametrize(("text", "message"), [("many", "COUNT"), ("1,x", "COUNT"), ("-1", "spectra")])
def test_times_that_mean_nothing_are_refused(tmp_path, text: str, message: str):
    arguments: list[Any] = ["compare", tmp_path / "a", f"m={tmp_path / 'b'}", "--out", tmp_path / "r.zarr"]
    code, output = run_lsim(*arguments, "--spectra", text)
    assert code == 2
    assert message in output


@pytest.mark.parametrize("name", ["ensemble/crps", "ensemble/provenance/metric", "spectra/energy"])
def test_damaged_scores_and_spectra_are_named_left_out_and_mended(tmp_path, here, name: str):
    reference = reference_of(2, 3)
    source = write_archive(tmp_path / "reference.zarr", {KEY: reference})
    model = write_archive(tmp_path / "m.zarr", {KEY: members_of(reference, 2)})
    out, settings = tmp_path / "r.zarr", RolloutSettings(metrics=("l2",), spectra=1)
    compare(source, {"m": model}, out, settings, cluster=here)
    expected = {part: results_of(out, part) for part in ("ensemble", "spectra")}
    chunk = next(path for path in sorted((out / KEY / name / "c").rglob("*")) if path.is_file())
    chunk.unlink()
    found = verify(out)
    assert not found.whole
    if "provenance" not in name:
        assert rank(out, tmp_path / "results", replicates=20).damaged
    repair(out, found)
    compare(source, {"m": model}, out, settings, cluster=here)
    for part, dataset in expected.items():
        xr.testing.assert_identical(results_of(out, part), dataset)
    assert verify(out).whole


def test_a_perfect_ensemble_that_lacks_a_member_adds_and_lacks_no_energy(tmp_path, here):
    reference = {name: of * (10 if name == "s2" else 1) for name, of in reference_of(4).items()}
    members = {f"run{k}/{name}": of for k in range(2) for name, of in reference.items()}
    del members["run1/s2"]
    source = write_archive(tmp_path / "reference.zarr", {KEY: reference})
    model = write_archive(tmp_path / "m.zarr", {KEY: members})
    compare(source, {"m": model}, tmp_path / "r.zarr", RolloutSettings(metrics=("l2",)), cluster=here)
    bands = rank(tmp_path / "r.zarr", tmp_path / "results", replicates=50).spectra["bands"]
    np.testing.assert_allclose(bands["relative_error"], 0, atol=1e-12)


def test_times_beyond_the_reference_are_refused_and_equal_ones_merged(tmp_path, here):
    reference = reference_of(2)
    source = write_archive(tmp_path / "reference.zarr", {KEY: reference})
    model = write_archive(tmp_path / "m.zarr", {KEY: reference})
    with pytest.raises(ValueError, match="finite"):
        RolloutSettings(metrics=("l2",), spectra=(float("nan"),))
    late = RolloutSettings(metrics=("l2",), spectra=(1000.0,))
    with pytest.raises(ValueError, match="expected times of the reference"):
        compare(source, {"m": model}, tmp_path / "r.zarr", late, cluster=here)
    settings = RolloutSettings(metrics=("l2",), spectra=(0.24, 0.26, 1.0))
    compare(source, {"m": model}, tmp_path / "r.zarr", settings, cluster=here)
    assert results_of(tmp_path / "r.zarr", "spectra")["time"].values[0].tolist() == [0.25, 1]
