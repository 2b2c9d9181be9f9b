"""Weighted means over pixels: plain formulas, repeated pixels, xarray's, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import xarray as xr

import lsim
import pipeline.accessor  # noqa: F401  registers .lsim
from lsim.metric import Metric

EPSILON = 1e-7
Formula = Callable[[np.ndarray, np.ndarray, np.ndarray], float]


def mean(x: np.ndarray, w: np.ndarray) -> float:
    return float((w * x).sum() / w.sum())


def variance(x: np.ndarray, w: np.ndarray) -> float:
    """GSL's: unbiased for weights of any scale."""
    return float((w * (x - mean(x, w)) ** 2).sum() / (w.sum() - (w**2).sum() / w.sum()))


def cosine(a: np.ndarray, b: np.ndarray, w: np.ndarray) -> float:
    return 1 - mean(a * b, w) / (mean(a * a, w) * mean(b * b, w)) ** 0.5


FORMULAS: dict[str, Formula] = {
    "l1": lambda a, b, w: mean(abs(a - b), w),
    "l2": lambda a, b, w: mean((a - b) ** 2, w),
    "rmse": lambda a, b, w: mean((a - b) ** 2, w) ** 0.5,
    "nrmse": lambda a, b, w: (mean((a - b) ** 2, w) / (mean(a**2, w) + EPSILON)) ** 0.5,
    "vrmse": lambda a, b, w: (mean((a - b) ** 2, w) / (variance(a, w) + EPSILON)) ** 0.5,
    "psnr": lambda a, b, w: 10 * np.log10(mean((a - b) ** 2, w) or np.nan),
    "cosine": cosine,
    "correlation": lambda a, b, w: cosine(a - mean(a, w), b - mean(b, w), w),
    "nmae": lambda a, b, w: mean(abs(a - b), w) / (mean(abs(a), w) + EPSILON),
    "crmse": lambda a, b, w: abs(mean(a, w) - mean(b, w)),
    "brmse": lambda a, b, w: mean((rim(a) - rim(b)) ** 2, rim(w)) ** 0.5,
}
"""Of frames (y, x) on [0, 1], of flat values where a mask leaves some out."""

NAMES = list(FORMULAS)
FIXED = (0.0, 1.0)


def rim(x: np.ndarray) -> np.ndarray:
    """First and last row and column, corners twice."""
    return np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])


def load(name: str, **settings: object) -> Metric:
    return lsim.load_metric(name, device="cpu", **{"size": None} | settings)  # type: ignore[arg-type]


@pytest.fixture
def frames(rng: np.random.Generator) -> np.ndarray:
    return rng.random((4, 11, 14))


@pytest.fixture
def weights(rng: np.random.Generator) -> np.ndarray:
    """Of very unlike size, some 0."""
    return rng.exponential(1, (11, 14)) ** 3 * (rng.random((11, 14)) > 0.2)


def test_metrics_that_say_so_are_those_with_a_formula_here() -> None:
    assert {m.name for m in lsim.describe_metrics() if m.info.takes_weights} == set(NAMES)


@pytest.mark.parametrize("precision", ["exact", "double"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_plain_formula(name: str, precision: str, frames: np.ndarray, weights: np.ndarray) -> None:
    metric = load(name, precision=precision)
    expected = np.array([[FORMULAS[name](a, b, weights) for b in frames] for a in frames])
    np.fill_diagonal(expected, metric.info.distance_to_itself)
    rtol = 1e-5 if precision == "exact" else 1e-10
    np.testing.assert_allclose(metric.pairwise(frames, FIXED, weights=weights), expected, rtol=rtol)
    pairs = metric.distance(frames[:2, ..., None], frames[2:, ..., None], FIXED, weights=weights)
    np.testing.assert_allclose(pairs, [expected[0, 2], expected[1, 3]], rtol=rtol)
    tensors = torch.from_numpy(frames)[:, None]
    called = metric.weighted(weights)(tensors[:2], tensors[2:], data_range=1)
    np.testing.assert_allclose(called, [expected[0, 2], expected[1, 3]], rtol=rtol)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "brmse"])
def test_a_mask_leaves_pixels_out_of_the_sum_of_weights(
    name: str, frames: np.ndarray, weights: np.ndarray, rng: np.random.Generator
) -> None:
    frames[rng.random(frames.shape) < 0.2] = np.nan
    found = load(name).pairwise(frames, FIXED, "nan", weights)
    for i, j in [(0, 1), (2, 0), (3, 2)]:
        known = np.isfinite(frames[i]) & np.isfinite(frames[j])
        expected = FORMULAS[name](frames[i][known], frames[j][known], weights[known])
        assert found[i, j] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_pairs_without_a_pixel_of_weight_in_common_have_no_distance(name: str, frames: np.ndarray) -> None:
    frames[0, 0] = np.nan
    weights = np.zeros(frames.shape[1:])
    weights[0] = 1
    frames[0, :, [0, -1]] = np.nan
    found = load(name).pairwise(frames, FIXED, "nan", weights)
    assert np.isnan(found[0, 1:]).all()
    assert np.isfinite(found[1, 2:]).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("vrmse", "brmse")])
@pytest.mark.parametrize("channels", [1, 3])
def test_whole_weights_equal_repeated_pixels(name: str, channels: int, rng: np.random.Generator) -> None:
    frames = rng.random((3, 6, 7, channels))
    counts = rng.integers(0, 5, (6, 7))
    repeated = np.stack([np.repeat(frame.reshape(-1, channels), counts.ravel(), axis=0) for frame in frames])
    metric = load(name)
    expected = metric.pairwise(repeated[:, None], FIXED)
    np.testing.assert_allclose(metric.pairwise(frames, FIXED, weights=counts), expected, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scope", ["sequence", "pair"])
def test_equal_weights_change_nothing(name: str, scope: str, rng: np.random.Generator) -> None:
    frames = rng.random((3, 9, 8, 3))
    metric = load(name)
    for weight in (True, 7, 1e-300, 1e300):
        found = metric.pairwise(frames, scope, weights=np.full((9, 8), weight))
        np.testing.assert_allclose(found, metric.pairwise(frames, scope), rtol=1e-5)


@pytest.mark.parametrize("name", ["correlation", "cosine", "vrmse"])
@pytest.mark.parametrize("mask", [None, "nan"])
@pytest.mark.parametrize("precision", ["exact", "double"])
def test_a_constant_frame_stays_constant_under_weights(
    name: str, mask: str | None, precision: str, frames: np.ndarray, weights: np.ndarray
) -> None:
    frames[0], frames[1] = 0.1, 0.7
    metric = load(name, precision=precision)
    found, expected = (metric.pairwise(frames, FIXED, mask, w) for w in (weights, np.ones_like(weights)))
    if name == "cosine":
        assert found[0, 1] < 1e-12
    elif name == "correlation":
        np.testing.assert_array_equal(found[:2, :2], 0)
        np.testing.assert_array_equal(found[:2, 2:], 1)
    else:
        assert found[0, 1] == pytest.approx(expected[0, 1], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_rounding_is_below_its_bound(name: str, frames: np.ndarray, weights: np.ndarray) -> None:
    frames = (101325 + frames).astype(np.float32)
    frames[1] = 2 * frames[0]
    distances, bounds = [], []
    for precision in ("exact", "double"):
        metric = load(name, precision=precision).weighted(weights)
        scope = (101000.0, 103000.0) if name != "cosine" else (0.0, 103000.0)
        values, rounding = metric.all_pairs_with_rounding(metric.prepare(frames[..., None], scope))
        apart = ~np.eye(len(frames), dtype=bool)
        distances.append(values[apart])
        bounds.append(rounding[apart])
    assert (abs(distances[0] - distances[1]) <= bounds[0] + bounds[1]).all()
    if name not in (
        "cosine",
        "correlation",
        "crmse",
    ):  # which count what the source rounded, in any precision
        assert (bounds[1] < bounds[0] / 100).all()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_weighted_mean(name: str, weights: np.ndarray) -> None:
    generator, weights = torch.Generator().manual_seed(3), weights[:5, :6]
    reference, other = torch.rand((2, 2, 1, 5, 6), generator=generator, dtype=torch.float64)
    metric = load(name, precision="double").weighted(weights)
    other.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: metric(reference, x, data_range=1), other)
    (gradient,) = torch.autograd.grad(metric(reference, other, data_range=1).sum(), other)
    assert (weights == 0).any()
    assert not gradient[..., torch.from_numpy(weights == 0)].any()


def test_the_specification_holds_the_weights(frames: np.ndarray, weights: np.ndarray) -> None:
    metric = load("l1")
    assert "weights_of_pixels" not in metric.specification()
    hashes = {
        metric.weighted(w).specification_hash for w in (weights, weights.T, weights[::-1], weights + 1)
    } | {metric.specification_hash}
    assert len(hashes) == 5
    assert metric.weighted(2 * weights).specification() == metric.weighted(weights).specification()
    assert metric.pixel_weights is None


def test_weighted_and_plain_metrics_share_frames_but_no_sums(frames: np.ndarray, weights: np.ndarray) -> None:
    plain = load("l2")
    prepared = plain.prepare(frames[..., None], FIXED)
    for name in ("rmse", "nrmse", "vrmse", "correlation", "nmae", "crmse"):
        unweighted, weighted = load(name), load(name).weighted(weights)
        for metric in (unweighted, weighted, unweighted):
            expected = metric.pairwise(frames, FIXED)
            np.testing.assert_array_equal(metric.all_pairs(prepared), expected)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(14), "shape"),
        (np.ones((11, 14), complex), "complex"),
        (np.full((11, 14), -1.0), "154 of 154"),
        (np.where(np.eye(11, 14), np.nan, 1), "11 of 154"),
        (np.where(np.eye(11, 14), np.inf, 1), "11 of 154"),
        (np.ma.masked_equal(np.eye(11, 14), 1), "11 of 154"),
        (np.zeros((11, 14)), "all 0"),
        (np.ones((14, 11)), "11×14"),
        (np.ones((1, 1)), "11×14"),
    ],
)
def test_weights_that_are_none_are_refused(weights: np.ndarray, message: str, frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match=message):
        load("l1").pairwise(frames, weights=weights)
    with pytest.raises(ValueError, match=message):
        load("rmse").distance(frames[0], frames[1], weights=weights)


def test_weights_of_other_frames_are_refused_by_the_call_on_tensors(weights: np.ndarray) -> None:
    tensors = torch.rand(2, 1, 14, 11)
    with pytest.raises(ValueError, match="14×11"):
        load("l1").weighted(weights)(tensors, tensors, data_range=1)


def test_metrics_that_are_no_means_refuse_by_name(frames: np.ndarray) -> None:
    for name in ("max-error", "ssim", "wasserstein", "spectral", "h1"):
        with pytest.raises(ValueError, match=f"'{name}' takes no weights"):
            load(name).pairwise(frames, weights=np.ones((11, 14)))
    with pytest.raises(ValueError, match="size=None"):
        load("l1", size=11).pairwise(frames, weights=np.ones((11, 14)))
    inner = np.pad(np.ones((9, 12)), 1)
    with pytest.raises(ValueError, match=r"'brmse'.*rim"):
        load("brmse").pairwise(frames, weights=inner)


# --- labelled ---------------------------------------------------------------------------------------------


@pytest.fixture
def globe(rng: np.random.Generator) -> xr.DataArray:
    return xr.DataArray(
        280 + rng.normal(0, 10, (2, 4, 11, 14)),
        dims=("member", "time", "lat", "lon"),
        coords={"lat": np.linspace(-90, 90, 11), "time": np.arange(4)},
        attrs={"units": "K"},
        name="t2m",
    )


@pytest.mark.parametrize("lazily", [False, True])
def test_equals_the_weighted_mean_of_xarray(globe: xr.DataArray, lazily: bool) -> None:
    area = np.cos(np.deg2rad(globe["lat"]))
    array = globe.transpose("lat", "time", "lon", "member")
    array = array.chunk(member=1) if lazily else array
    how = {"spatial": ("lat", "lon"), "scope": "none", "size": None, "weights": area}
    reference = globe.isel(time=0, drop=True)
    difference = globe - reference
    for name, of in (("l1", abs), ("l2", np.square)):
        expected = of(difference).weighted(area).mean(("lat", "lon"))
        found = array.lsim.distance(reference, name, **how).transpose("member", "time")
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        assert found.attrs["units"] == ("K" if name == "l1" else "K2")
        matrix = array.lsim.pairwise("time", name, **how)
        np.testing.assert_allclose(matrix.isel(time=0), expected, rtol=1e-9)
        assert "weights_of_pixels" in matrix.attrs["specification"]


def test_arrays_along_both_dimensions_in_any_order_are_weights(globe: xr.DataArray) -> None:
    area = xr.DataArray(np.arange(154.0).reshape(14, 11), dims=("lon", "lat"))
    how = {"scope": "none", "size": None}
    found = globe.lsim.pairwise("time", "rmse", weights=area, **how)
    xr.testing.assert_identical(found, globe.lsim.pairwise("time", "rmse", weights=area.values.T, **how))
    flipped = area.transpose().assign_coords(lat=globe["lat"][::-1].values)
    with pytest.raises(ValueError, match="lat"):
        globe.lsim.pairwise("time", "rmse", weights=flipped, **how)
    with pytest.raises(ValueError, match="'time'"):
        globe.lsim.pairwise("time", "rmse", weights=globe["time"], **how)
    with pytest.raises(ValueError, match="size=None"):
        globe.lsim.pairwise("time", "rmse", weights=area)
