"""Double precision keeps the promise of 1e-5 for frames that hardly differ, against 50 digits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from mpmath import mp, mpf
from torch.nn import functional as F

import lsim
from lsim.error_bounds import PROMISE, PrecisionError
from lsim.metric import Metric
from lsim.metrics.optimal_transport import directions_and_weights
from pipeline.metrics.resolution import UNRESOLVED_FROM, resolution_of

SIDE = 24
WITH_REST = 1e-9
"""Relative error of metrics that take what double precision rounds off normalised values."""

Plane = list[list[Any]]


def load(name: str, **settings: Any) -> Metric:
    return lsim.load_metric(name, device="cpu", **{"size": None, "precision": "double"} | settings)


def twins(change: float, side: int = SIDE, offset: float = 0.0, seed: int = 0) -> np.ndarray:
    """Two fields in float64 that differ by noise of ``change`` of their range: (2, side, side)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    field = np.sin(5 * x + 1) * np.cos(7 * y) + 0.3 * rng.standard_normal((side, side))
    other = field + change * np.ptp(field) * rng.standard_normal((side, side))
    return np.stack([field, other]) + offset


def exactly(frames: np.ndarray) -> tuple[Plane, Plane]:
    """Both frames normalised to [0, 1] over their common range, in 50 digits."""
    lo, hi = mpf(frames.min().item()), mpf(frames.max().item())
    first, second = ([[(mpf(v) - lo) / (hi - lo) for v in row] for row in plane] for plane in frames.tolist())
    return first, second


def flat(plane: Plane) -> list[Any]:
    return [value for row in plane for value in row]


def mean(values: list[Any]) -> Any:
    return mpmath.fsum(values) / len(values)


def mse(a: Plane, b: Plane) -> Any:
    return mean([(p - q) ** 2 for p, q in zip(flat(a), flat(b), strict=True)])


def differences(a: Plane, b: Plane) -> list[Any]:
    return [abs(p - q) for p, q in zip(flat(a), flat(b), strict=True)]


def rim(plane: Plane) -> list[Any]:
    return [*plane[0], *plane[-1], *(row[0] for row in plane), *(row[-1] for row in plane)]


def one_minus_cosine(a: list[Any], b: list[Any]) -> Any:
    product = mpmath.fsum(p * q for p, q in zip(a, b, strict=True))
    return 1 - product / mpmath.sqrt(mpmath.fsum(p * p for p in a) * mpmath.fsum(q * q for q in b))


def centred(values: list[Any]) -> list[Any]:
    middle = mean(values)
    return [value - middle for value in values]


def ssim(a: Plane, b: Plane) -> Any:
    """Return 1 − SSIM by its definition, over uniform windows of 7×7 with the sample covariance."""
    c1, c2 = mpf("0.01") ** 2, mpf("0.03") ** 2
    found = []
    for r in range(len(a) - 6):
        for k in range(len(a) - 6):
            p = [v for row in a[r : r + 7] for v in row[k : k + 7]]
            q = [v for row in b[r : r + 7] for v in row[k : k + 7]]
            mean_p, mean_q = mean(p), mean(q)
            dp, dq = [v - mean_p for v in p], [v - mean_q for v in q]
            covariance = mpmath.fsum(s * t for s, t in zip(dp, dq, strict=True)) / 48
            variances = (mpmath.fsum(s * s for s in dp) + mpmath.fsum(t * t for t in dq)) / 48
            luminance = (2 * mean_p * mean_q + c1) / (mean_p**2 + mean_q**2 + c1)
            found.append(1 - luminance * (2 * covariance + c2) / (variances + c2))
    return mean(found)


def gradient(a: Plane, b: Plane) -> Any:
    d = [[p - q for p, q in zip(left, right, strict=True)] for left, right in zip(a, b, strict=True)]
    n = len(d)
    along_x = [abs(d[r][k + 1] - d[r][k]) for r in range(n) for k in range(n - 1)]
    along_y = [abs(d[r + 1][k] - d[r][k]) for r in range(n - 1) for k in range(n)]
    return mean(along_x + along_y)


def prewitt(plane: Plane) -> list[Any]:
    """Gradient magnitudes of averages of 2×2 with zeros around, in units of 255."""
    n = len(plane) // 2
    small = [[mpf(0)] * (n + 2) for _ in range(n + 2)]
    for r in range(n):
        for k in range(n):
            block = [plane[2 * r + i][2 * k + j] for i in (0, 1) for j in (0, 1)]
            small[r + 1][k + 1] = 255 * mean(block)
    found = []
    for r in range(1, n + 1):
        for k in range(1, n + 1):
            by_x = mpmath.fsum(small[r + i][k + 1] - small[r + i][k - 1] for i in (-1, 0, 1)) / 3
            by_y = mpmath.fsum(small[r + 1][k + i] - small[r - 1][k + i] for i in (-1, 0, 1)) / 3
            found.append(mpmath.sqrt(by_x**2 + by_y**2))
    return found


def gmsd(a: Plane, b: Plane) -> Any:
    pairs = zip(prewitt(a), prewitt(b), strict=True)
    similarity = [(2 * p * q + 170) / (p * p + q * q + 170) for p, q in pairs]
    return mpmath.sqrt(mean([value**2 for value in centred(similarity)]))


def amplitudes(plane: Plane) -> Plane:
    """Squares of the amplitudes of the Fourier transform, divided by the number of pixels: (ky, kx)."""
    n = len(plane)
    roots = [mpmath.expjpi(mpf(-2 * k) / n) for k in range(n)]

    def transform(row: list[Any]) -> list[Any]:
        return [mpmath.fsum(v * roots[j * k % n] for j, v in enumerate(row)) / n for k in range(n)]

    columns = list(zip(*map(transform, plane), strict=True))
    return [[abs(value) ** 2 for value in row] for row in zip(*map(transform, columns), strict=True)]


def fft(a: Plane, b: Plane) -> Any:
    pairs = zip(flat(amplitudes(a)), flat(amplitudes(b)), strict=True)
    floor = mpf("1e-6") ** 2
    return mpmath.sqrt(mean([(mpmath.log10((p + floor) / (q + floor)) / 2) ** 2 for p, q in pairs]))


def spectral(a: Plane, b: Plane) -> Any:
    n, floor = len(a), mpf("1e-6") ** 2
    wave = np.fft.fftfreq(n, 1 / n)
    shell = np.rint(np.hypot(wave[:, None], wave[None])).astype(int)
    energies = []
    for plane in (amplitudes(a), amplitudes(b)):
        inside = [[plane[r][k] for r, k in np.argwhere(shell == s)] for s in range(n // 2 + 1)]
        energies.append([mean(values) + floor for values in inside])
    return mpmath.sqrt(mean([mpmath.log10(p / q) ** 2 for p, q in zip(*energies, strict=True)]))


def wasserstein(a: Plane, b: Plane) -> Any:
    return mean([abs(p - q) for p, q in zip(sorted(flat(a)), sorted(flat(b)), strict=True)])


def sliced_wasserstein(a: Plane, b: Plane) -> Any:
    n = len(a)
    totals = [mpmath.fsum(flat(plane)) for plane in (a, b)]
    distance = mpf(0)
    for (q, p), weight in zip(*(part.tolist() for part in directions_and_weights(12)), strict=True):
        moved: dict[int, Any] = {}
        for r in range(n):
            for k in range(n):
                at = q * k + p * r
                moved[at] = moved.get(at, 0) + a[r][k] / totals[0] - b[r][k] / totals[1]
        places = sorted(moved)
        behind, cost = mpf(0), mpf(0)
        for place, following in itertools.pairwise(places):
            behind += moved[place]
            cost += abs(behind) * (following - place)
        distance += weight * cost / (mpmath.sqrt(q * q + p * p) * n)
    return distance


FORMULAS: dict[str, Callable[[Plane, Plane], Any]] = {
    "l1": lambda a, b: mean(differences(a, b)),
    "l2": mse,
    "rmse": lambda a, b: mpmath.sqrt(mse(a, b)),
    "nrmse": lambda a, b: mpmath.sqrt(mse(a, b) / (mean([v * v for v in flat(a)]) + mpf("1e-7"))),
    "vrmse": lambda a, b: mpmath.sqrt(
        mse(a, b) / (sum(v * v for v in centred(flat(a))) / (len(flat(a)) - 1) + mpf("1e-7"))
    ),
    "psnr": lambda a, b: 10 * mpmath.log10(mse(a, b)),
    "max-error": lambda a, b: max(differences(a, b)),
    "nmae": lambda a, b: mean(differences(a, b)) / (mean(flat(a)) + mpf("1e-7")),
    "crmse": lambda a, b: abs(mean(flat(a)) - mean(flat(b))),
    "brmse": lambda a, b: mpmath.sqrt(mse([rim(a)], [rim(b)])),
    "cosine": lambda a, b: one_minus_cosine(flat(a), flat(b)),
    "correlation": lambda a, b: one_minus_cosine(centred(flat(a)), centred(flat(b))),
    "ssim": ssim,
    "gmsd": gmsd,
    "gradient": gradient,
    "wasserstein": wasserstein,
    "sliced-wasserstein": sliced_wasserstein,
    "fft": fft,
    "spectral": spectral,
}


BY_PIXEL = ["l1", "l2", "rmse", "nrmse", "psnr", "nmae", "crmse", "cosine", "correlation"]
"""Metrics of which a pixel of weight 2 is two pixels."""

BY_WAVENUMBER = [f"{kind}-{band}" for kind in ("frmse", "spectral-mse") for band in ("low", "mid", "high")]


@pytest.fixture(autouse=True)
def fifty_digits() -> Any:
    with mp.workdps(50):
        yield


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("name", FORMULAS)
def test_the_promise_holds_down_to_one_part_in_1e12(name: str, offset: float) -> None:
    for change in (1e-4, 1e-8, 1e-10, 1e-12):
        frames = twins(change, offset=offset)
        exact = float(FORMULAS[name](*exactly(frames)))
        assert load(name).pairwise(frames)[0, 1] == pytest.approx(exact, rel=WITH_REST, abs=0)
        assert load(name).distance(*frames)[0] == pytest.approx(exact, rel=WITH_REST, abs=0)


@pytest.mark.parametrize("name", BY_PIXEL)
@pytest.mark.parametrize("how", ["weights", "mask"])
def test_the_promise_holds_with_weights_and_masks(name: str, how: str) -> None:
    frames = twins(1e-12, offset=300.0)
    weights = np.random.default_rng(2).integers(0, 3, frames.shape[1:])
    if how == "mask":
        weights = (weights > 0).astype(int)
        frames[1][weights == 0] = np.nan
    told: dict[str, Any] = {"mask": "nan"} if how == "mask" else {"weights": weights}
    found = load(name).pairwise(frames, **told)
    known = np.where(np.isnan(frames), np.nanmin(frames), frames)
    counted = [np.repeat(flat(plane), weights.ravel()).tolist() for plane in exactly(known)]
    exact = float(FORMULAS[name](*([values] for values in counted)))
    assert found[0, 1] == pytest.approx(exact, rel=WITH_REST, abs=0)
    if "symmetric" in load(name).axioms:
        np.testing.assert_array_equal(load(name).pairwise(frames[::-1], **told)[0, 1], found[0, 1])


@pytest.mark.parametrize("name", [*BY_WAVENUMBER, "h1", "gradient"])
def test_a_difference_of_one_part_in_1e12_is_that_difference_magnified(name: str) -> None:
    side = 28  # of which PDEBench has a high band
    frames = twins(1e-12, side, offset=300.0)
    first, second = exactly(frames)
    magnified = [
        [float((p - q) * 2**40) for p, q in zip(*rows, strict=True)]
        for rows in zip(first, second, strict=True)
    ]
    power = load(name).info.power_of_units
    expected = load(name).distance(magnified, np.zeros((side, side)), scope="none")[0] * 2.0 ** (-40 * power)
    assert load(name).pairwise(frames)[0, 1] == pytest.approx(expected, rel=WITH_REST, abs=0)


@pytest.mark.parametrize("name", FORMULAS)
def test_bounds_of_frames_with_a_rest_hold_and_are_tight(name: str) -> None:
    # Of whole numbers, the source has rounded none, which is all that a metric blind to a change doubts.
    frames = np.round(1e12 * twins(1e-11)).astype(np.int64)
    metric = load(name)
    found, bounds = metric.all_pairs_with_rounding(metric.prepare(frames[..., None], "sequence"))
    exact = FORMULAS[name](*exactly(frames))
    assert abs(mpf(float(found[0, 1])) - exact) <= bounds[0, 1]
    assert bounds[0, 1] < 1e-8 * abs(exact)


def test_bits_do_not_depend_on_other_frames_or_their_order() -> None:
    close = twins(1e-9, offset=300.0)
    frames = np.stack([*close, close[1] + 1e-12, 2 * close[0], *(close + np.array([[[1.0]], [[1e-4]]]))])[
        ..., None
    ]
    weights = np.random.default_rng(1).random((SIDE, SIDE))
    order = [4, 1, 3, 0]
    for name in (*BY_PIXEL, "vrmse", "max-error", "brmse", "frmse-low", "h1", "gradient", "wasserstein"):
        for told in ({}, {"weights": weights}) if load(name).info.takes_weights else ({},):
            metric = load(name)
            distances = metric.pairwise(frames, scope=(299.0, 303.0), **told)
            some = metric.pairwise(frames[order], scope=(299.0, 303.0), **told)
            np.testing.assert_array_equal(some, distances[np.ix_(order, order)])
            singles = metric.distance(frames[order], frames[order[::-1]], scope=(299.0, 303.0), **told)
            np.testing.assert_array_equal(singles, distances[order, order[::-1]])
            assert metric.distance(frames[:1], frames[:1], **told)[0] == metric.info.distance_to_itself


@pytest.mark.parametrize("name", ["l1", "correlation", "ssim", "gradient", "wasserstein", "spectral", "h1"])
def test_frames_of_the_largest_doubles_keep_their_rests(name: str) -> None:
    frames = twins(1e-10)
    expected = load(name).pairwise(frames)[0, 1]
    found = load(name).pairwise(frames * 2.0**1022)[0, 1]  # those of 2^1023 and more have no range
    assert found == pytest.approx(expected, rel=WITH_REST)


@pytest.mark.parametrize("name", ["l2", "h1", "gradient", "wasserstein"])
def test_frames_in_their_own_units_have_a_rest_in_double_precision_alone(name: str) -> None:
    frames = twins(1e-9, offset=300.0)[..., None]
    for precision, has_rest in (("exact", False), ("double", True)):
        metric = load(name, precision=precision)
        assert ("rest" in metric.embed_prepared(metric.prepare(frames, "none")).parts) == has_rest


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_frames_with_their_rest_are_normalised_exactly(offset: float) -> None:
    frames = twins(1e-3, offset=offset)
    prepared = load("ssim").prepare(frames[..., None], "sequence")
    assert prepared.rest is not None
    found = [(values, rest) for values, rest in zip(prepared.values, prepared.rest, strict=True)]
    for (values, rest), exact in zip(found, exactly(frames), strict=True):
        for value, left, expected in zip(values.flatten(), rest.flatten(), flat(exact), strict=True):
            assert abs(mpf(value.item()) + mpf(left.item()) - 255 * expected) < 255 * mpf(2) ** -98


def test_ms_ssim_sees_one_part_in_1e12_at_every_scale() -> None:
    """Its differences of a smooth change go with the square of it."""
    rng = np.random.default_rng(1)
    field, change = rng.random((2, 161, 161))
    change[0, :2] = field[0, :2] = (0, 1)  # the range stays
    distances = [
        load("ms-ssim").distance(field, field + step * (change - field))[0] for step in (2.0**-20, 2.0**-40)
    ]
    assert distances[1] * 2.0**40 == pytest.approx(distances[0], rel=1e-5)


def test_tensors_and_masks_and_resized_frames_are_compared_in_double_too() -> None:
    frames = twins(1e-12, side=48)
    prepared = torch.from_numpy(255 * (frames - frames.min()) / np.ptp(frames))[:, None]
    for name in ("l1", "l2", "correlation", "ssim", "gradient", "wasserstein", "lsim-open"):
        expected = load(name).pairwise(frames)[0, 1]
        assert load(name)(prepared[:1], prepared[1:]).item() == pytest.approx(expected, rel=1e-3)
        assert load(name, size=48, order=1).pairwise(frames)[0, 1] == expected
    for name in ("l1", "l2", "correlation", "ssim", "gradient"):
        known = load(name, mask=True).pairwise(frames, mask="nan")[0, 1]
        assert known == pytest.approx(load(name).pairwise(frames)[0, 1], rel=1e-5)


def test_each_pair_of_a_scope_is_compared_in_double() -> None:
    frames = twins(1e-11)
    expected = load("l2").pairwise(frames)[0, 1]
    assert load("l2").pairwise(frames, scope="pair")[0, 1] == expected


def test_lsim_in_double_is_its_network_in_double() -> None:
    metric: Any = load("lsim-open")
    single: Any = load("lsim-open", precision="exact")
    for change in (1e-3, 1e-8, 1e-12):
        frames = twins(change, side=64)
        planes = torch.from_numpy(255 * ((frames - frames.min()) / np.ptp(frames)))[:, None]
        planes = planes.expand(-1, 3, -1, -1)
        state = {name: value.double() for name, value in single.trunk.state_dict().items()}
        squared = 0.0
        x = planes
        paddings = {"conv1": 2, "conv2": 2, "conv3": 1, "conv4": 1, "conv5": 1}
        for part, (layer, padding) in zip(single.scale_parts(), paddings.items(), strict=True):
            if layer in ("conv2", "conv3"):
                x = F.max_pool2d(x, 4, 2)
            stride = 4 if layer == "conv1" else 1
            x = F.relu(F.conv2d(x, state[f"{layer}.weight"], state[f"{layer}.bias"], stride, padding))
            weight, squares, count = part
            size = x.shape[2:]
            deviation = F.interpolate(
                squares.double()[None, None], size, mode="bilinear", align_corners=True
            )[0, 0]
            deviation = (deviation / (count - 1)).sqrt() + 1e-10
            scaled = x / deviation / (math.sqrt(x.shape[1]) - 1)
            per_channel = (scaled[0] - scaled[1]).square().mean((1, 2))
            squared += (weight.double() * per_channel).sum().item()
        # The network's own rounding, 1e-16 of features, is 1e-4 of what a change of 1e-12 makes of them.
        tolerance = max(PROMISE, 5e-16 / change)
        assert metric.pairwise(frames)[0, 1] == pytest.approx(math.sqrt(squared), rel=tolerance)


def test_networks_are_marked_where_double_precision_does_not_resolve_them() -> None:
    for name, change, is_resolved in (
        ("lsim-open", 1e-12, False),
        ("lsim-open", 1e-10, True),
        ("l2", 1e-12, True),
        ("h1", 1e-12, True),
    ):
        metric = load(name)
        frames = twins(change, side=64)[..., None]
        matrix, rounding = metric.all_pairs_with_rounding(metric.prepare(frames, "sequence"))
        resolution = resolution_of(matrix, rounding, "all", metric.preprocessing.precision)
        assert (resolution.unresolved == 0) == is_resolved, name
        assert (rounding[0, 1] > UNRESOLVED_FROM * matrix[0, 1]) == (not is_resolved)


def test_the_precision_is_recorded_only_where_it_is_not_single() -> None:
    assert load("l2").specification()["preprocessing"]["precision"] == "double"
    assert "precision" not in load("l2", precision="exact").specification()["preprocessing"]
    assert "precision" not in load("lsim-open").specification().get("options", {})


def test_what_has_no_double_precision_says_why() -> None:
    with pytest.raises(PrecisionError, match="OpenCV takes 8-bit"):
        load("flow")
    with pytest.raises(ValueError, match="precision must be one of exact, double, ranking"):
        load("l2", precision="half")
    with pytest.raises(ValueError, match="has no option precision"):
        load("l2", precision="ranking")


@pytest.mark.parametrize("name", ["l2", "ssim", "vi"])
def test_published_truncation_is_that_of_double_values(name: str) -> None:
    frames = twins(1e-3)
    levels = np.floor(255 * ((frames - frames.min()) / np.ptp(frames)))
    found = load(name, compat="published").pairwise(frames)[0, 1]
    assert found == pytest.approx(load(name).pairwise(levels, scope=(0, 255))[0, 1], rel=1e-9)


def test_masses_of_very_different_totals_keep_their_digits() -> None:
    """Multiples of one mass are at distance 0, whatever the factor."""
    y, x = np.mgrid[:16, :16] / 16
    mass = np.sin(np.pi * x) ** 2 * np.sin(np.pi * y) ** 2 + 0.5 * (x > 0.7)
    frames = np.stack([10.0**-k * np.roll(mass, 3 * (k % 2), 1) for k in range(14)])[..., None]
    metric = lsim.load_metric("sliced-wasserstein", size=None, precision="double")
    distances, bounds = metric.all_pairs_with_rounding(metric.prepare(frames, "sequence"))
    same = np.add.outer(np.arange(14), np.arange(14)) % 2 == 0
    assert (distances[same] <= bounds[same]).all()
    np.testing.assert_allclose(distances[~same], distances[0, 1], rtol=1e-12)
    pairs = metric.distance(frames[:1].repeat(13, 0), frames[1:], scope=(0.0, float(frames.max())))
    np.testing.assert_allclose(pairs[::2], distances[0, 1], rtol=1e-9)
