"""Values that don't fit where they are put: what is measured is the values, or they are refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import lsim
from lsim.loss import SimulationLoss
from lsim.preprocess import Preprocessing, apply, preprocess, scope_identity


@pytest.fixture
def l2() -> lsim.Metric:
    return lsim.load_metric("l2", size=None, device="cpu")


def mean_squared(a: np.ndarray, b: np.ndarray, lo: float, hi: float) -> float:
    return float((((a.astype(float) - b.astype(float)) / (hi - lo)) ** 2).mean())


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.int64])
def test_what_a_masked_array_masks_is_missing(l2: lsim.Metric, rng: np.random.Generator, dtype: type) -> None:
    values = (100 * rng.random((2, 16, 16, 1))).astype(dtype)
    missing = rng.random(values.shape) < 0.1
    filled = np.where(missing, 1e4, values).astype(dtype)
    masked = np.ma.masked_array(filled, missing)
    plain = np.where(missing, np.nan, values)
    other = values[::-1]
    assert np.isnan(l2.distance(masked, other)).all()
    expected = l2.distance(plain, other, mask="nan")
    for given in (masked, [masked[0], masked[1]], list(map(list, masked))):
        np.testing.assert_allclose(l2.distance(given, other, mask="nan"), expected, rtol=1e-6)
    np.testing.assert_allclose(l2.pairwise(masked, mask="nan"), l2.pairwise(plain, mask="nan"), rtol=1e-6)
    np.testing.assert_array_equal(preprocess(masked, 8), preprocess(plain.astype(np.float64), 8))


@pytest.mark.parametrize("dtype", [np.longdouble, np.complex128, object, "M8[s]", "U3"])
def test_dtypes_that_would_be_rounded_are_refused(l2: lsim.Metric, dtype: object) -> None:
    frames = np.zeros((2, 8, 8, 1)).astype("i8").astype(dtype)  # type: ignore[call-overload]
    with pytest.raises(lsim.FramesError, match="frames"):
        l2.pairwise(frames)


def test_tensors_are_arrays(l2: lsim.Metric, rng: np.random.Generator) -> None:
    a, b = rng.random((2, 1, 8, 8, 1))
    expected = l2.distance(a, b)
    assert l2.distance(torch.tensor(a, requires_grad=True), torch.tensor(b)) == expected


@pytest.mark.parametrize("width", [1.3, 0.3, 0.05])
def test_a_fixed_scope_is_not_rounded_to_the_frames(
    l2: lsim.Metric, rng: np.random.Generator, width: float
) -> None:
    a, b = (101325 + width * rng.random((2, 1, 16, 16, 1))).astype(np.float32)
    lo, hi = 101325.003, 101325.003 + width
    expected = mean_squared(a, b, lo, hi)
    np.testing.assert_allclose(l2.distance(a, b, scope=(lo, hi)), expected, rtol=1e-6)
    tensors = [torch.from_numpy(x).permute(0, 3, 1, 2) for x in (a, b)]
    loss = SimulationLoss(l2, normalisation=(lo, hi))
    np.testing.assert_allclose(loss(*tensors), expected, rtol=1e-5)
    on_tensors = apply(Preprocessing(None), torch.from_numpy(a), (lo, hi))
    np.testing.assert_array_equal(on_tensors, apply(Preprocessing(None), a, (lo, hi)))


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize(
    ("dtype", "offset"), [("i8", 2**60), ("i8", 2**63 - 600), ("i8", 500 - 2**63), ("u8", 2**64 - 600)]
)
def test_integers_beyond_double_precision_keep_their_differences(
    rng: np.random.Generator, dtype: str, offset: int, order: int
) -> None:
    levels = rng.integers(0, 218, (2, 16, 16, 1))
    frames = np.array([offset + int(v) for v in levels.ravel()], dtype).reshape(levels.shape)
    settings = Preprocessing(20, order)
    expected = apply(settings, levels, "batch")
    np.testing.assert_allclose(apply(settings, frames, "batch"), expected, atol=1e-3)
    np.testing.assert_allclose(apply(settings, torch.from_numpy(frames), "batch"), expected, atol=1e-3)
    fixed = apply(settings, frames, (offset, offset + 299))
    np.testing.assert_allclose(fixed, apply(settings, levels, (0, 299)), atol=1e-3)


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize(
    ("dtype", "largest", "rtol"),
    [("f4", 3.4e38, 1e-4), ("f8", 1.79e308, 1e-5), ("f8", 1e-305, 1e-5), ("f8", 1e-316, 1e-4)],
)
def test_ranges_at_the_ends_of_floating_point(
    rng: np.random.Generator, order: int, dtype: str, largest: float, rtol: float
) -> None:
    l2 = lsim.load_metric("l2", size=20, order=order, device="cpu")
    unit = 2 * rng.random((2, 16, 16, 1)) - 1
    a, b = (unit * largest).astype(dtype)[:, None]
    np.testing.assert_allclose(l2.distance(a, b), l2.distance(*unit[:, None]), rtol=rtol)


@pytest.mark.parametrize("normalisation", ["pair", "fixed"])
@pytest.mark.parametrize("name", ["l2", "ssim", "lsim-open"])
@pytest.mark.parametrize("offset", [0.0, 101325.0, 1e9])
@pytest.mark.filterwarnings("ignore::lsim.SizeWarning")
def test_a_loss_in_double_keeps_its_promise_at_any_offset(
    rng: np.random.Generator, name: str, offset: float, normalisation: str
) -> None:
    metric = lsim.load_metric(name, size=None, device="cpu")
    a, b = offset + 0.01 * rng.random((2, 48, 48))
    fixed = (offset, offset + 0.011)
    scope, settings = ("pair", {}) if normalisation == "pair" else (fixed, {"normalisation": fixed})
    tensors = [torch.from_numpy(x)[None, None] for x in (a, b)]
    loss = SimulationLoss(metric, **settings)(*tensors)  # type: ignore[arg-type]
    np.testing.assert_allclose(loss, metric.distance(a, b, scope=scope)[0], rtol=1e-5)


def test_frames_in_0_to_1_are_warned_of_once_and_take_a_data_range() -> None:
    ssim = lsim.load_metric("ssim", size=None, device="cpu")
    a, b = torch.rand(2, 2, 1, 16, 16)
    expected = ssim(a * 255, b * 255)
    fresh = lsim.load_metric("ssim", size=None, device="cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fresh(torch.zeros_like(a), torch.zeros_like(a))
        assert not caught
        fresh(a, b)
        fresh(a, b)
    assert [w.category for w in caught] == [lsim.RangeWarning]
    assert "data_range=1" in str(caught[0].message)
    assert caught[0].filename == __file__
    for data_range, x, y in ((1, a, b), ((-1.0, 1.0), 2 * a - 1, 2 * b - 1)):
        torch.testing.assert_close(fresh(x, y, data_range=data_range), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="data_range"):
        fresh(a, b, data_range=0)
    with pytest.warns(lsim.RangeWarning, match=r"normalisation=\(0, 1\)"):
        SimulationLoss("ssim", normalisation=None)(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_distances_have_the_dtype_of_the_frames(dtype: torch.dtype) -> None:
    metric = lsim.load_metric("ssim", size=None, device="cpu")
    a, b = (255 * torch.rand(2, 2, 1, 16, 16)).to(dtype)
    assert metric(a, b).dtype == dtype
    assert metric(a.to(torch.uint8), b.to(torch.uint8)).dtype == torch.get_default_dtype()


def test_results_of_fixed_scopes_that_were_rounded_are_out_of_date() -> None:
    assert scope_identity((0.0, 255.0)) == (0.0, 255.0)
    assert scope_identity("sequence") == "sequence"
    assert scope_identity((101325.3, 101326.6)) != (101325.3, 101326.6)


@pytest.mark.parametrize("factor", [1e-200, 1e160, 1e300])
@pytest.mark.parametrize("name", ["l2", "cosine", "sliced-wasserstein"])
def test_units_in_which_squares_overflow_are_refused(name: str, factor: float) -> None:
    frames = np.random.default_rng(0).random((2, 8, 8)) * factor
    metric = lsim.load_metric(name, size=None)
    with pytest.raises(lsim.FramesError, match="change their units"):
        metric.pairwise(frames, scope="none")
    assert np.isfinite(metric.pairwise(frames)).all(), "normalised, they are as any others"


@pytest.mark.parametrize("data_range", ["1", (1,), (0.0, "1"), float("nan"), 0, (2.0, 1.0)])
def test_a_range_of_data_that_is_none_is_named(data_range: object) -> None:
    frames = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="data_range must be a positive number"):
        lsim.load_metric("l1")(frames, frames, data_range=data_range)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["l1", "l2", "lsim-open"])
def test_values_far_beyond_a_fixed_range_are_refused_before_their_squares_overflow(name: str) -> None:
    rng = np.random.default_rng(0)
    frames = rng.random((2, 48, 48))
    metric = lsim.load_metric(name, size=None)
    frames[1] *= 1e12
    assert np.isfinite(metric.pairwise(frames, scope=(0.0, 1.0))).all()
    assert metric.pairwise(frames, scope=(0.0, 1.0))[0, 1] != 0
    frames[1] *= 1e13
    with pytest.raises(lsim.FramesError, match="times the range of the scope"):
        metric.pairwise(frames, scope=(0.0, 1.0))
