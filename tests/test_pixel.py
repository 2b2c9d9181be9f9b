"""Metrics of pixel differences equal their formulas in double precision, whole or masked, far or near."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.spatial import distance as scipy_distance
from skimage.metrics import normalized_root_mse

import lsim
from lsim.error_bounds import PROMISE
from lsim.metric import Metric
from lsim.testing import check_metric

EPSILON = 1e-7


def mse(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean(((a - b) / 255) ** 2))


def variance(a: np.ndarray) -> float:
    """Over N − 1; 0 of one value."""
    return float(np.sum((a - a.mean()) ** 2) / max(a.size - 1, 1))


def angle(a: np.ndarray, b: np.ndarray) -> float:
    """½ |â − b̂|² in extended precision."""
    lengths = [np.sqrt(np.sum(v * v)) for v in (a, b)]
    if 0 in lengths:
        return float(max(lengths) > 0)
    return float(np.sum((a / lengths[0] - b / lengths[1]) ** 2) / 2)


FORMULAS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "l1": lambda a, b: float(np.mean(np.abs(a - b)) / 255),
    "l2": mse,
    "rmse": lambda a, b: mse(a, b) ** 0.5,
    "nrmse": lambda a, b: (mse(a, b) / (mse(a, np.zeros_like(a)) + EPSILON)) ** 0.5,
    "vrmse": lambda a, b: (mse(a, b) / (variance(a / 255) + EPSILON)) ** 0.5,
    "psnr": lambda a, b: 10 * float(np.log10(mse(a, b))),
    "correlation": lambda a, b: angle(a - a.mean(), b - b.mean()),
    "cosine": angle,
}
"""Of the values that are compared, in [0, 255] and extended precision."""

NAMES = list(FORMULAS)
ONE_WAY = ("nrmse", "vrmse")


def load(name: str, **settings: object) -> Metric:
    return lsim.load_metric(name, device="cpu", **{"size": None} | settings)  # type: ignore[arg-type]


def by_formula(name: str, frames: np.ndarray) -> np.ndarray:
    """All pairs of frames in [0, 255], over what is known in both; NaN where that is nothing."""
    flat = frames.reshape(len(frames), -1).astype(np.longdouble)
    matrix = np.full((len(flat), len(flat)), np.nan)
    for i, a in enumerate(flat):
        for j, b in enumerate(flat):
            known = ~(np.isnan(a) | np.isnan(b))
            if i != j and known.any():
                matrix[i, j] = FORMULAS[name](a[known], b[known])
    return matrix


def assert_pairs_agree(found: np.ndarray, expected: np.ndarray, rtol: float = PROMISE) -> None:
    apart = ~np.eye(len(expected), dtype=bool)
    np.testing.assert_allclose(found[apart], expected[apart], rtol=rtol, atol=0)


def waves(rng: np.random.Generator, n: int, side: int, channels: int = 3) -> np.ndarray:
    """Frames that are alike, spanning [0, 255] so that normalising leaves them."""
    y, x = np.indices((side, side)) / side
    frames = np.stack([np.sin(7 * x + 3 * y + k / n) for k in range(n)])[..., None]
    frames = 127 + 90 * frames + rng.normal(0, 5, (n, side, side, channels))
    frames[:, 0, 0], frames[:, -1, -1] = 0, 255
    return np.clip(frames, 0, 255).astype(np.float32)


def holes(rng: np.random.Generator, frames: np.ndarray) -> np.ndarray:
    """With pixels missing, others in every frame; the last frame has one pixel left."""
    missing = rng.random(frames.shape[:3]) < 0.25
    missing[-1] = True
    missing[-1, 1, 1] = False
    missing[:, [0, -1], [0, -1]] = False
    missing[-1, [0, -1], [0, -1]] = True
    missing[0, 1, 1] = False
    return np.where(missing[..., None], np.float32(np.nan), frames)


# --- formulas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_equals_its_formula(rng: np.random.Generator, name: str, channels: int) -> None:
    frames = waves(rng, 6, 24, channels)
    metric = load(name)
    expected = by_formula(name, frames)
    assert_pairs_agree(metric.pairwise(frames), expected, rtol=1e-6)
    assert_pairs_agree(metric.symmetrised().pairwise(frames), (expected + expected.T) / 2, rtol=1e-6)
    row = metric.from_reference(metric.prepare(frames, "sequence"))
    np.testing.assert_allclose(row[1:], expected[0, 1:], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_leaves_pixels_out_of_all_sums(rng: np.random.Generator, name: str) -> None:
    frames = holes(rng, waves(rng, 6, 24))
    expected = by_formula(name, frames)
    assert np.isfinite(expected[:-1, :-1][~np.eye(5, dtype=bool)]).all()
    assert np.isnan(expected[-1]).any(), "some pair has no pixel in common"
    metric = load(name, mask=True)
    assert_pairs_agree(metric.pairwise(frames, (0, 255)), expected, rtol=1e-6)
    prepared = torch.from_numpy(frames).permute(0, 3, 1, 2)
    i, j = (torch.from_numpy(k) for k in np.nonzero(~np.eye(len(frames), dtype=bool)))
    called = metric(prepared[i], prepared[j]).numpy()
    np.testing.assert_allclose(called, expected[i, j], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", [False, True])
def test_formula_in_torch_equals_the_kernels(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str, mask: bool
) -> None:
    """What runs on other devices, run here."""
    frames = waves(rng, 6, 24)
    if mask:
        frames = holes(rng, frames)
    metric = load(name, mask=mask)
    expected = metric.pairwise(frames, (0, 255))
    for module in ("lsim.pairs", "lsim.metrics.pixel"):
        monkeypatch.setattr(f"{module}.has_kernel", lambda *tensors: False)
    monkeypatch.setattr("lsim.metrics.pixel.VALUES_TOGETHER", 4000)
    assert_pairs_agree(metric.pairwise(frames, (0, 255)), expected, rtol=1e-6)


def test_normalised_errors_agree_with_scikit_image_and_scipy(rng: np.random.Generator) -> None:
    frames = waves(rng, 3, 32)
    exact = frames.astype(np.float64) / 255
    for i, j in ((0, 1), (1, 0), (2, 0)):
        nrmse = normalized_root_mse(exact[i], exact[j], normalization="euclidean")
        assert load("nrmse").pairwise(frames)[i, j] == pytest.approx(nrmse, rel=1e-6)
        a, b = exact[i].ravel(), exact[j].ravel()
        assert load("correlation").pairwise(frames)[i, j] == pytest.approx(scipy_distance.correlation(a, b))
        assert load("cosine").pairwise(frames)[i, j] == pytest.approx(scipy_distance.cosine(a, b))


def test_the_reference_is_the_first_argument(rng: np.random.Generator) -> None:
    """A frame of half the amplitude is half its own power away from the other, or all of it."""
    frame = waves(rng, 1, 32)[0]
    both = np.stack([frame, frame / 2])
    for name in ONE_WAY:
        matrix = load(name).pairwise(both, (0, 255))
        assert matrix[1, 0] == pytest.approx(2 * matrix[0, 1], rel=1e-4)
        assert "symmetric" not in load(name).axioms
        assert load(name, symmetrise=True).pairwise(both, (0, 255))[0, 1] == pytest.approx(matrix.sum() / 2)
    assert load("nrmse").distance(both[0], both[1], (0, 255))[0] == pytest.approx(0.5, rel=1e-4)


def test_mean_of_the_reference_is_about_one_vrmse_away(rng: np.random.Generator) -> None:
    frame = waves(rng, 1, 32)[0]
    mean = np.full_like(frame, frame.mean())
    expected = (1 - 1 / frame.size) ** 0.5
    assert load("vrmse").distance(frame, mean, (0, 255))[0] == pytest.approx(expected, abs=1e-5)


# --- near-duplicates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_one_grey_level_in_one_pixel_of_a_whole_frame(
    rng: np.random.Generator, name: str, channels: int
) -> None:
    frames = np.repeat(rng.integers(0, 256, (1, 224, 224, channels)), 3, axis=0).astype(np.float32)
    frames[:, 0, 0], frames[:, -1, -1], frames[:, 100, 50] = 0, 255, 100
    frames[1, 100, 50, 0] += 1
    frames[2] = frames[0] + np.where(frames[0] < 128, 1, -1) * np.float32(1e-3)
    prepared = load(name).prepare(frames, (0, 255))
    expected = by_formula(name, prepared.values.numpy())
    assert_pairs_agree(load(name).all_pairs(prepared), expected)
    assert_pairs_agree(load(name, mask=True).pairwise(frames, (0, 255)), expected)


@pytest.mark.parametrize("name", ["correlation", "cosine"])
def test_scaled_copies_with_one_value_changed(rng: np.random.Generator, name: str) -> None:
    """Blind to the scale, and no less exact for it: |x − y|² is large here, and the distance 1e-9."""
    frame = np.floor(waves(rng, 1, 64)[0] / 2)
    frames = np.stack([frame, frame * 2, frame * 2])
    frames[2, 30, 30, 0] += 1
    matrix = load(name).pairwise(frames, (0, 255))
    assert matrix[0, 1] == 0
    assert 0 < matrix[0, 2] < 1e-7
    assert_pairs_agree(matrix, by_formula(name, frames) * (by_formula(name, frames) > 1e-25))


# --- frames without norm ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [False, True])
def test_constant_frames(rng: np.random.Generator, mask: bool) -> None:
    varied = waves(rng, 1, 24)
    constants = [np.full_like(varied, value) for value in (0, 0, 77.7, 200)]
    frames = np.concatenate([*constants, varied])
    found = {name: load(name, mask=mask).pairwise(frames, (0, 255)) for name in NAMES}
    for name in set(NAMES) - {"psnr"}:
        assert np.isfinite(found[name]).all()
        assert found[name][0, 1] == 0
    correlation, cosine = found["correlation"], found["cosine"]
    assert (correlation[:4, :4] == 0).all()
    assert (correlation[:4, 4] == 1).all()
    assert (cosine[:2, 2:] == 1).all()
    assert cosine[2, 3] == 0
    assert 0 < cosine[3, 4] < 1
    # Only the 1e-7 is left to divide by.
    assert found["nrmse"][0, 2] == pytest.approx(77.7 / 255 / 1e-7**0.5, rel=1e-6)
    assert found["vrmse"][2, 3] == pytest.approx(122.3 / 255 / 1e-7**0.5, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", [False, True])
def test_gradients_are_finite_where_there_is_no_norm_and_no_pixel(
    rng: np.random.Generator, name: str, mask: bool
) -> None:
    frames = waves(rng, 5, 12)
    frames[1], frames[2] = 30, 0
    if mask:
        frames[3, :6] = np.nan
        frames[4] = np.nan
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
    reference = planes[[0, 1, 2, 2, 0, 1, 0, 1]].clone().requires_grad_()
    other = planes[[1, 0, 0, 2, 3, 1, 4, 2]].clone().requires_grad_()
    distances = load(name, mask=mask)(reference, other)
    assert torch.isnan(distances).tolist() == [False] * 6 + [mask, False]
    distances[torch.isfinite(distances)].sum().backward()
    for argument in (reference, other):
        gradient = argument.grad
        assert gradient is not None
        assert torch.isfinite(gradient).all()
        assert (gradient[[3, 5]] == 0).all(), "at equal frames"
        assert gradient[4].abs().max() > 0
        assert not mask or (gradient[4, :, :6] == 0).all(), "where pixels are missing"


# --- what metrics share -----------------------------------------------------------------------------------


def test_one_matrix_of_squared_differences_a_run(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lsim.metrics.pixel as pixel

    calls = []
    whole = pixel.squared_distances
    monkeypatch.setattr(pixel, "squared_distances", lambda x, y: (calls.append(len(x)), whole(x, y))[1])
    frames = waves(rng, 5, 16)
    metrics = [load(name) for name in ("l2", "rmse", "nrmse", "vrmse", "psnr", "l1")]
    prepared = metrics[0].prepare(frames, "sequence")
    together = [metric.all_pairs(prepared) for metric in metrics]
    assert calls == [5]
    rows = [metric.from_reference(prepared) for metric in metrics]
    assert calls == [5, 1]
    for metric, matrix, row in zip(metrics, together, rows, strict=True):
        assert np.array_equal(matrix, metric.pairwise(frames))
        assert np.array_equal(matrix[0], row)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", [False, True])
def test_bits_do_not_depend_on_threads_or_the_other_frames(
    rng: np.random.Generator, name: str, mask: bool
) -> None:
    frames = waves(rng, 7, 160)
    if mask:
        frames = holes(rng, frames)
    metric = load(name, mask=mask)
    torch.set_num_threads(1)
    one = metric.pairwise(frames, (0, 255))
    pairs = metric.distance(frames[[0, 4]], frames[[3, 2]], (0, 255))
    assert np.array_equal(pairs, one[[0, 4], [3, 2]])
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert np.array_equal(metric.pairwise(frames, (0, 255)), one, equal_nan=True)
        few = metric.pairwise(frames[1:4], (0, 255))
        assert np.array_equal(few, one[1:4, 1:4], equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_says_how_precise_its_sums_are(rng: np.random.Generator, name: str) -> None:
    frames = waves(rng, 5, 16)
    metric = load(name)
    assert metric.take_precision() is None  # type: ignore[attr-defined]
    prepared = metric.prepare(frames, "sequence")
    metric.all_pairs(prepared)
    metric.from_reference(prepared)
    record = metric.take_precision()  # type: ignore[attr-defined]
    assert (record.method, record.promise, record.pairs, record.recomputed) == (
        "direct differences",
        PROMISE,
        10 + 5,
        0,
    )
    assert 0 < record.bound <= PROMISE
    assert metric.take_precision() is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["rmse", "nrmse", "vrmse", "correlation", "cosine"])
@pytest.mark.parametrize("settings", [{}, {"compat": "published"}, {"symmetrise": True}])
def test_contract(name: str, settings: dict[str, object]) -> None:
    check_metric(load(name, **settings), frame_size=24)


# --- physical values --------------------------------------------------------------------------------------


def physical_fields() -> tuple[np.ndarray, np.ndarray]:
    """A temperature around 300 K, and a forecast of it."""
    y, x = np.meshgrid(np.arange(24) / 24, np.arange(32) / 32, indexing="ij")
    reference = 300 + 2 * np.sin(2 * np.pi * (2 * x + y)) + np.cos(2 * np.pi * (3 * x - 5 * y))
    error = 0.3 * np.cos(2 * np.pi * (x + 4 * y)) + 0.05 * np.sin(2 * np.pi * (11 * x + 9 * y)) + 0.1
    return reference, reference + error


BY_THE_WELL = {
    "l1": 0.20310939588802523,
    "l2": 0.056250000000003575,
    "rmse": 0.237170824512636,
    "nrmse": 0.0007905584351396637,
    "vrmse": 0.14990230894600506,
}
"""Of :func:`physical_fields` by the_well 1.2.0: MAE, MSE, RMSE, NRMSE and VRMSE of (forecast, reference)."""


@pytest.mark.parametrize("name", BY_THE_WELL)
def test_physical_values_have_the_errors_that_the_well_gives(name: str) -> None:
    reference, forecast = physical_fields()
    metric = load(name)
    assert metric.distance(reference, forecast, "none")[0] == pytest.approx(BY_THE_WELL[name], rel=1e-9)
    matrix = metric.pairwise(np.stack([reference, forecast]), "none")
    assert matrix[0, 1] == pytest.approx(BY_THE_WELL[name], rel=1e-9)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    ("offset", "amplitude"), [(300.0, 2.0), (0.0, 1.0), (101325.0, 5.0), (1e-3, 1e-4), (-40.0, 0.1)]
)
def test_physical_values_have_the_errors_of_formulas_in_their_units(
    rng: np.random.Generator, offset: float, amplitude: float, dtype: type
) -> None:
    a, b = (offset + amplitude * rng.standard_normal((2, 40, 32))).astype(dtype)
    x, y = a.astype(np.float64), b.astype(np.float64)
    squared = np.mean((x - y) ** 2)
    expected = {
        "l1": np.mean(np.abs(x - y)),
        "l2": squared,
        "rmse": squared**0.5,
        "nrmse": (squared / (np.mean(x**2) + EPSILON)) ** 0.5,
        "vrmse": (squared / (np.var(x, ddof=1) + EPSILON)) ** 0.5,
        "correlation": 1 - np.corrcoef(x.ravel(), y.ravel())[0, 1],
        "cosine": scipy_distance.cosine(x.ravel(), y.ravel()),
    }
    for name, value in expected.items():
        found = load(name).distance(a, b, "none")[0]
        assert found == pytest.approx(value, rel=1e-6, abs=1e-15 if name == "cosine" else 0), name
    if abs(offset) > 1e-2:
        assert load("nrmse").distance(a, b, "none")[0] == pytest.approx(normalized_root_mse(x, y), rel=1e-6)


def test_units_are_those_of_the_field_and_of_its_square() -> None:
    assert load("l1").units("none", "K") == "K"
    assert load("l2").units("none", "m s-1") == "m2 s-2"
    assert load("l2").units("none", "g/kg") == "(g/kg)2"
    assert load("l2").units("none") == ""
    assert load("l2").units("sequence", "K") == load("nrmse").units("none", "K") == "1"


def test_metrics_made_for_a_range_refuse_physical_values_by_name(rng: np.random.Generator) -> None:
    frames = rng.random((3, 24, 24))
    for name in ("psnr", "ssim", "gmsd", "vi", "nmi", "lsim-open"):
        metric = load(name, **({"size": 224} if name == "lsim-open" else {}))
        for measure in (
            lambda metric=metric: metric.pairwise(frames, "none"),
            lambda metric=metric: metric.distance(frames, frames, "none"),
        ):
            with pytest.raises(ValueError, match=rf"metric '{name}' .* give the range, scope \(lo, hi\)"):
                measure()
    with pytest.raises(ValueError, match=r"'l2' truncates .* use compat 'default'"):
        load("l2", compat="published").distance(frames, frames, "none")


@pytest.mark.parametrize("name", [n for n in lsim.list_metrics() if not lsim.registry.why_unavailable(n)])
def test_every_metric_takes_physical_values_or_refuses(rng: np.random.Generator, name: str) -> None:
    """One that takes them follows a change of units: by the power it says, or not at all."""
    metric = load(name, size=None if not name.startswith("lsim") else 224)
    frames = 300 + 2 * rng.standard_normal((3, 48, 48))
    if not metric.info.takes_physical_values:
        with pytest.raises(ValueError, match=f"'{name}'"):
            metric.pairwise(frames, "none")
        return
    bigger = load(name, threshold=300e3) if name == "fss" else metric
    metric = load(name, threshold=300.0) if name == "fss" else metric
    found, scaled = metric.pairwise(frames, "none"), bigger.pairwise(frames * 1000, "none")
    assert np.isfinite(found).all()
    assert (found[0, 1:] > 0).all()
    factor = 1000**metric.info.power_of_units
    # Constants, such as the 1e-7 of nrmse and the floor of spectra, are in the field's units.
    np.testing.assert_allclose(scaled, found * factor, rtol=1e-5)
