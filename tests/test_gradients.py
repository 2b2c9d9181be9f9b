"""GMSD and the difference of gradients against scipy in double precision, and with missing pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

import lsim
from lsim.testing import check_metric

NAMES = ("gmsd", "gradient")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def load(name: str, **settings: object) -> lsim.Metric:
    return lsim.load_metric(name, device="cpu", **({"size": None} | settings))  # type: ignore[arg-type]


# --- references on (y, x, channel), in double precision; NaN is left out -----------------------------------


def gmsd(a: np.ndarray, b: np.ndarray, downsample: bool = True, data_range: float = 255) -> float:
    """As the authors' code: similarity of magnitudes, its deviation over the pixels of each channel."""
    found = []
    for channel in range(a.shape[2]):
        x, y = (magnitude(frame[..., channel].astype(float), downsample) for frame in (a, b))
        stabiliser = 170 * (data_range / 255) ** 2
        similar = (2 * x * y + stabiliser) / (x**2 + y**2 + stabiliser)
        if (distance := np.nanstd(similar)) < 1e-3:
            # Similarities this near 1 have lost digits that their difference from 1 keeps.
            distance = np.nanstd((x - y) ** 2 / (x**2 + y**2 + stabiliser))
        found.append(distance)
    return float(np.mean(found))


def magnitude(plane: np.ndarray, downsample: bool) -> np.ndarray:
    missing = np.isnan(plane)
    plane = np.where(missing, 0, plane)
    if downsample:
        plane, missing = (
            np.pad(values, [(0, side % 2) for side in plane.shape]) for values in (plane, missing)
        )
        quarters = [np.s_[i::2, j::2] for i in (0, 1) for j in (0, 1)]
        plane = sum(plane[quarter] for quarter in quarters) / 4
        missing = np.any([missing[quarter] for quarter in quarters], axis=0)
    by_x, by_y = (
        correlate1d(
            correlate1d(plane, [-1, 0, 1], axis, mode="constant"), np.ones(3) / 3, other, mode="constant"
        )
        for axis, other in ((1, 0), (0, 1))
    )
    around = np.pad(missing, 1)
    touched = np.lib.stride_tricks.sliding_window_view(around, (3, 3)).any((-1, -2))
    return np.where(touched, np.nan, np.hypot(by_x, by_y))


def gradient(a: np.ndarray, b: np.ndarray) -> float:
    difference = a.astype(float) - b.astype(float)
    steps = [np.abs(np.diff(difference, axis=axis)).ravel() for axis in (0, 1)]
    return float(np.nanmean(np.concatenate(steps)) / 255)


REFERENCES = {"gmsd": gmsd, "gradient": gradient}


def check(name: str, frames: np.ndarray, **options: object) -> None:
    """All pairs, by ``pairwise`` and by the call on tensors, of frames in [0, 255]."""
    frames = frames.astype(np.float32)
    metric = load(name, mask=bool(np.isnan(frames).any()), **options)
    i, j = np.triu_indices(len(frames), 1)
    expected = [REFERENCES[name](frames[p], frames[q], **options) for p, q in zip(i, j, strict=True)]  # type: ignore[operator]
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2)
    np.testing.assert_allclose(metric.pairwise(frames, scope=(0, 255))[i, j], expected, rtol=1e-6)
    np.testing.assert_allclose(metric(planes[i], planes[j]), expected, rtol=1e-6)


def fields(rng: np.random.Generator, y: int, x: int) -> np.ndarray:
    rows, columns = np.indices((y, x)) / 9
    waves = [np.sin(rows + k / 5) * np.cos(columns - k / 3) for k in range(3)]
    return 128 + 60 * np.stack(waves)[..., None] + rng.normal(0, 5, (3, y, x, 3))


# --- parity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(128, 128), (224, 224), (512, 512), (60, 77), (61, 90), (31, 43), (3, 3)])
def test_parity(rng: np.random.Generator, name: str, shape: tuple[int, int]) -> None:
    check(name, fields(rng, *shape))


@pytest.mark.parametrize("options", [{"downsample": False}, {"data_range": 20.0}])
def test_parity_with_options(rng: np.random.Generator, options: dict[str, object]) -> None:
    check("gmsd", fields(rng, 50, 61), **options)


@pytest.mark.parametrize("name", NAMES)
def test_parity_on_frames_that_hardly_differ(rng: np.random.Generator, name: str) -> None:
    """From one grey level in one pixel, and a slope far smaller than the offset that it lies on."""
    base = rng.uniform(0, 255, (90, 90, 3))
    base[20:40, 20:40] = base[20:40, 20:40] / 4 + 100
    frames = np.stack([base] * 3)
    frames[1, 30, 30, 0] += 1
    frames[2, 25:30, 35:40] -= 3
    slope = np.broadcast_to(np.linspace(0, 1e-3, 90)[:, None, None], base.shape)
    check(name, frames)
    check(name, np.stack([slope + 200, slope * 3 + 10, slope[::-1] * 1e3 + 250]))


@pytest.mark.parametrize("name", NAMES)
def test_constant_frames(name: str) -> None:
    """A constant has no gradient; only the zeros around a frame of GMSD make an edge of it."""
    frames = np.stack([np.full((32, 32, 1), level) for level in (0.0, 3.0, 250.0)])
    check(name, frames)
    if name == "gradient":
        assert (load(name).pairwise(frames, scope=(0, 255)) == 0).all()


# --- missing pixels ---------------------------------------------------------------------------------------


def with_holes(rng: np.random.Generator) -> np.ndarray:
    """Each frame with a hole of its own, and one that they share."""
    frames = fields(rng, 41, 50)
    frames[0, 2:9, 3:5] = np.nan
    frames[1, 30, 20] = np.nan
    frames[:, 20, 10:15] = np.nan
    return frames.astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_pixels_whose_stencil_touches_a_missing_one_are_left_out(rng: np.random.Generator, name: str) -> None:
    check(name, with_holes(rng))
    if name == "gmsd":
        check(name, with_holes(rng), downsample=False)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_0_under_the_mask_and_finite_elsewhere(rng: np.random.Generator, name: str) -> None:
    planes = torch.from_numpy(with_holes(rng)).permute(0, 3, 1, 2).requires_grad_()
    load(name, mask=True)(planes[[0, 0]], planes[[1, 0]]).sum().backward()
    assert planes.grad is not None
    assert planes.grad.isfinite().all()
    assert (planes.grad[planes.isnan()] == 0).all()
    assert (planes.grad[:2].abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_pixel_left_is_nan(rng: np.random.Generator, name: str) -> None:
    frames = fields(rng, 30, 30)
    frames[2, ::2, ::2] = np.nan
    frames[2, 1::2, 1::2] = np.nan
    distances = load(name, mask=True).pairwise(frames, scope=(0, 255))
    assert np.isnan(distances).tolist() == [[False, False, True], [False, False, True], [True, True, False]]


# --- the contract -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [("gmsd", {}), ("gmsd", {"downsample": False, "data_range": 100.0}), ("gradient", {})],
)
def test_contract(name: str, options: dict[str, object]) -> None:
    check_metric(load(name, size=64, **options))


@pytest.mark.parametrize("name", NAMES)
def test_bits_depend_on_neither_threads_nor_other_frames(rng: np.random.Generator, name: str) -> None:
    frames = rng.uniform(size=(9, 170, 180, 3))
    metric = load(name)
    whole = metric.pairwise(frames, scope=(0, 1))
    assert np.array_equal(metric.pairwise(frames[1:3], scope=(0, 1)), whole[1:3, 1:3])
    assert metric.distance(frames[0], frames[8], scope=(0, 1)) == whole[0, 8]
    assert metric.distance(frames[8], frames[0], scope=(0, 1)) == whole[0, 8]
    torch.set_num_threads(3)
    assert np.array_equal(metric.pairwise(frames, scope=(0, 1)), whole)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((32, 40), 0.19493070552950353), ((33, 40), 0.19274343852848863), ((31, 29), 0.1884015526939441)],
)
def test_luminance_of_colours_is_what_piq_compares(shape: tuple[int, int], expected: float) -> None:
    """Values of piq 0.8.0, gmsd(a, b, data_range=255)."""
    row, column = (index[..., None] for index in np.indices(shape))
    k = np.arange(3)
    a = ((37 * row + 91 * column + 53 * k + row * column * (k + 1)) % 256).astype(float)
    b = (a + 40 * np.sin(row / 3 + k) + 20 * np.cos(column / 5)).clip(0, 255)
    metric = lsim.load_metric("gmsd", size=None, device="cpu", channels="luminance")
    assert metric.distance(a, b, (0, 255))[0] == pytest.approx(expected, rel=1e-6)
    assert lsim.load_metric("gmsd", size=None).distance(a, b, (0, 255))[0] < 0.95 * expected
    grey = a[..., :1]
    np.testing.assert_array_equal(
        metric.pairwise(np.stack([grey, b[..., :1]])),
        lsim.load_metric("gmsd", size=None, device="cpu").pairwise(np.stack([grey, b[..., :1]])),
    )


def test_contract_of_luminance() -> None:
    check_metric(lsim.load_metric("gmsd", size=None, device="cpu", channels="luminance"), frame_size=32)
    assert "channels" not in lsim.load_metric("gmsd").specification()["options"]
    with pytest.raises(ValueError, match="'channels' of metric 'gmsd' is 'each' or 'luminance'"):
        lsim.load_metric("gmsd", channels="grey")
