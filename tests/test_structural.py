"""SSIM and MS-SSIM against scikit-image and pytorch-msssim in double precision, and with missing pixels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import pytorch_msssim
import torch
from skimage.metrics import structural_similarity

import lsim
from lsim.testing import check_metric

NAMES = ("ssim", "ssim-gaussian", "ms-ssim")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def load(name: str, **settings: object) -> lsim.Metric:
    return lsim.load_metric(name, device="cpu", **({"size": None} | settings))  # type: ignore[arg-type]


# --- references, in double precision, on (y, x, channel) --------------------------------------------------


def uniform(a: np.ndarray, b: np.ndarray, data_range: float = 255) -> float:
    return 1 - structural_similarity(a, b, data_range=data_range, channel_axis=-1)


def gaussian(a: np.ndarray, b: np.ndarray, data_range: float = 255) -> float:
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return 1 - structural_similarity(a, b, data_range=data_range, channel_axis=-1, **options)


def multi_scale(a: np.ndarray, b: np.ndarray, data_range: float = 255) -> float:
    x, y = (torch.from_numpy(frame).permute(2, 0, 1)[None] for frame in (a, b))
    return 1 - pytorch_msssim.ms_ssim(x, y, data_range, win=window(x.shape[1])).item()


def window(channels: int) -> torch.Tensor:
    """Theirs is rounded to single precision."""
    taps = torch.exp(-((torch.arange(11).double() - 5) ** 2) / (2 * 1.5**2))
    return (taps / taps.sum()).repeat(channels, 1, 1, 1)


REFERENCES: dict[str, Callable[..., float]] = {
    "ssim": uniform,
    "ssim-gaussian": gaussian,
    "ms-ssim": multi_scale,
}


def by_hand(name: str, a: np.ndarray, b: np.ndarray) -> float:
    """In difference form, about windows' means, over windows without NaN; scales without any are dropped."""
    if name != "ms-ssim":
        p, q = terms(a, b, 7 if name == "ssim" else 11)
        return float(np.nanmean(p + q - p * q))
    pairs = [(a, b)]
    for _ in range(4):
        pairs.append(tuple(halved(frame) for frame in pairs[-1]))  # type: ignore[arg-type]
    scales = [terms(x, y, 11) for x, y in pairs]
    scales = [(p, q) for p, q in scales if not np.isnan(q).all()]
    exponents = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])
    exponents *= exponents.sum() / exponents[: len(scales)].sum()
    means = [np.nanmean(q, (0, 1)) for _, q in scales[:-1]]
    p, q = scales[-1]
    means.append(np.nanmean(p + q - p * q, (0, 1)))
    logarithm = sum(w * np.log1p(-mean) for w, mean in zip(exponents, means, strict=False))
    return float(-np.expm1(logarithm).mean())


def terms(a: np.ndarray, b: np.ndarray, taps: int) -> tuple[np.ndarray, np.ndarray]:
    """P and Q of every window: (y, x, channel)."""
    compared = (a, b, a.astype(float) - b)
    (mu, xx), (nu, yy), (apart, square) = (
        moments(frame.astype(float).tobytes(), frame.shape, taps) for frame in compared
    )
    return apart**2 / (mu**2 + nu**2 + 2.55**2), square / (xx + yy + 7.65**2)


@functools.lru_cache(maxsize=128)
def moments(content: bytes, shape: tuple[int, ...], taps: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of every window of a frame; kept, since each frame is in many pairs."""
    bell = np.ones(7) if taps == 7 else np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(bell, bell) / bell.sum() ** 2
    frame = np.frombuffer(content).reshape(shape)
    windows = np.lib.stride_tricks.sliding_window_view(frame, (taps, taps), (0, 1))
    mean = np.einsum("...ij,ij", windows, weights)
    variance = np.einsum("...ij,ij", (windows - mean[..., None, None]) ** 2, weights)
    return mean, (49 / 48 if taps == 7 else 1) * variance


def halved(frame: np.ndarray) -> np.ndarray:
    """Averages of 2×2, an odd side with a rim of zeros."""
    odd = [(side % 2, side % 2) for side in frame.shape[:2]]
    padded = np.pad(frame.astype(float), [*odd, (0, 0)])
    return sum(padded[i : i - 1 or None, j : j - 1 or None][::2, ::2] for i in (0, 1) for j in (0, 1)) / 4


def check(name: str, frames: np.ndarray, **options: float) -> None:
    """All pairs of frames that span [0, 255] and so aren't changed by normalising."""
    frames = frames.astype(np.float32)
    found = load(name, **options).pairwise(frames, scope=(0, 255))
    for i, j in itertools.combinations(range(len(frames)), 2):
        expected = REFERENCES[name](frames[i].astype(float), frames[j].astype(float), **options)
        # The references are 1 less a number near 1: exact to some 1e-15.
        np.testing.assert_allclose(found[i, j], expected, rtol=1e-5, atol=3e-15, err_msg=f"{name} {i} {j}")


def waves(n: int, y: int, x: int) -> np.ndarray:
    rows, columns = np.indices((y, x)) / 9
    return np.stack([np.sin(rows + k / 5) * np.cos(columns - k / 3) for k in range(n)])[..., None]


# --- parity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *itertools.product(NAMES, [(161, 161), (224, 224), (177, 230), (163, 401)]),
        *itertools.product(("ssim", "ssim-gaussian"), [(128, 128)]),
        # Five scales of windows that are those of "ssim-gaussian".
        *itertools.product(("ssim", "ms-ssim"), [(512, 512)]),
    ],
)
def test_parity(rng: np.random.Generator, name: str, shape: tuple[int, int]) -> None:
    smooth = 128 + 60 * waves(2, *shape) * np.ones(3)
    noisy = (smooth[0] + rng.normal(0, 20, (*shape, 3))).clip(0, 255)
    check(name, np.concatenate([smooth, noisy[None]]))


@pytest.mark.parametrize("name", NAMES)
def test_parity_on_frames_that_hardly_differ(rng: np.random.Generator, name: str) -> None:
    """From one grey level in one pixel on; and where frames aren't whole numbers."""
    for base in (rng.integers(0, 256, (176, 176, 3)), rng.uniform(0, 255, (176, 176, 3))):
        base[50:90, 50:90] = base[50:90, 50:90] / 4 + 100
        frames = np.stack([base] * 4)
        frames[1, 70, 70, 0] += 1
        frames[2, 75, 60, 1] -= 1
        frames[3, 60:70, 60:70] += 3
        check(name, frames)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("background", [0.0, 100.3, 250.7])
def test_parity_where_an_offset_is_nearly_constant(
    rng: np.random.Generator, name: str, background: float
) -> None:
    """There the variance of differences is far below their square: E[d²] − E[d]² leaves no digit of it."""
    size = 176 if name == "ms-ssim" else 60
    ramp = np.broadcast_to(np.linspace(0, 1, size)[:, None, None], (size, size, 1))
    noise = rng.normal(0, 1e-3, ramp.shape)
    still = np.full_like(ramp, background)
    tilted = [still + slope * ramp for slope in (1e-3, 0.1, 4.3)]
    frames = [still, still + 4.1 - noise, *tilted, still / 3 + ramp + noise, tilted[-1] / 2 + noise]
    frames = np.stack(frames).clip(0, 255).astype(np.float32)
    found = load(name).pairwise(frames, scope=(0, 255))
    for i, j in itertools.combinations(range(len(frames)), 2):
        np.testing.assert_allclose(found[i, j], by_hand(name, frames[i], frames[j]), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_constant_frames_differ_by_luminance_alone(name: str) -> None:
    frames = np.stack([np.full((176, 176, 1), level) for level in (0.0, 3.0, 200.0, 203.0, 255.0)])
    check(name, frames)


@pytest.mark.parametrize("name", NAMES)
def test_data_range_sets_the_constants(rng: np.random.Generator, name: str) -> None:
    check(name, 128 + 5 * waves(3, 176, 176) + rng.normal(0, 1, (3, 176, 176, 3)), data_range=20)


def test_window_of_ssim_makes_it_ssim_gaussian(rng: np.random.Generator) -> None:
    frames = rng.uniform(size=(3, 40, 40, 3))
    chosen, named = load("ssim", window="gaussian"), load("ssim-gaussian")
    assert np.array_equal(chosen.pairwise(frames), named.pairwise(frames))
    assert chosen.specification()["options"] == named.specification()["options"]
    with pytest.raises(ValueError, match="smallest that works is 11×11"):
        chosen.pairwise(frames[:, :10])


def test_ms_ssim_of_opposite_frames_is_1() -> None:
    """Where contrast correlates negatively at some scale: the product of no negative factors."""
    frame = 128 + 100 * waves(1, 176, 176)
    assert load("ms-ssim").pairwise(np.concatenate([frame, 255 - frame]), scope=(0, 255))[0, 1] == 1


@pytest.mark.parametrize("name", NAMES)
def test_tensors_with_gradients_give_the_same(rng: np.random.Generator, name: str) -> None:
    frames = (128 + 60 * waves(3, 170, 190) + rng.normal(0, 9, (3, 170, 190, 3))).astype(np.float32)
    metric = load(name)
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2).requires_grad_()
    distances = metric(planes[[0, 0, 1]], planes[[1, 2, 2]])
    expected = metric.pairwise(frames, scope=(0, 255))[[0, 0, 1], [1, 2, 2]]
    np.testing.assert_allclose(distances.detach().numpy(), expected, rtol=1e-5)


# --- missing pixels ---------------------------------------------------------------------------------------


def with_holes(rng: np.random.Generator, size: int) -> np.ndarray:
    """Each frame with a hole of its own, and one that they share."""
    frames = 128 + 60 * waves(3, size, size) + rng.normal(0, 9, (3, size, size, 1))
    frames[0, 2:9, 3:5] = np.nan
    frames[1, size - 30 : size - 24, 8:20] = np.nan
    frames[:, size // 2, 40:43] = np.nan
    return frames.astype(np.float32)


@pytest.mark.parametrize(
    ("name", "size"), [("ssim", 90), ("ssim-gaussian", 90), ("ms-ssim", 177), ("ms-ssim", 256)]
)
def test_windows_that_touch_a_missing_pixel_are_left_out(
    rng: np.random.Generator, name: str, size: int
) -> None:
    """At 177, none of the coarsest scale is left to any pair; at 256, some are."""
    frames = with_holes(rng, size)
    metric = load(name, mask=True)
    found = metric.pairwise(frames, scope=(0, 255))
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2)
    called = metric(planes[[0, 0, 1]], planes[[1, 2, 2]])
    for p, (i, j) in enumerate([(0, 1), (0, 2), (1, 2)]):
        expected = by_hand(name, frames[i], frames[j])
        np.testing.assert_allclose([found[i, j], called[p]], expected, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_0_under_the_mask_and_finite_elsewhere(rng: np.random.Generator, name: str) -> None:
    frames = with_holes(rng, 176)
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2).requires_grad_()
    distances = load(name, mask=True)(planes[[0, 0]], planes[[1, 0]])
    distances.sum().backward()
    assert planes.grad is not None
    assert planes.grad.isfinite().all()
    assert (planes.grad[planes.isnan()] == 0).all()
    assert (planes.grad[:2].abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_window_left_is_nan(rng: np.random.Generator, name: str) -> None:
    frames = rng.uniform(0, 255, (3, 176, 176, 1))
    frames[2, ::5, ::5] = np.nan
    distances = load(name, mask=True).pairwise(frames, scope=(0, 255))
    assert np.isnan(distances).tolist() == [[False, False, True], [False, False, True], [True, True, False]]


# --- the contract -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ssim", {"window": "gaussian", "data_range": 100.0}),
        ("ssim-gaussian", {}),
        ("ms-ssim", {}),
    ],
)
def test_contract(name: str, options: dict[str, object]) -> None:
    check_metric(load(name, size=161 if name == "ms-ssim" else 48, **options))


@pytest.mark.parametrize("name", NAMES)
def test_bits_depend_on_neither_threads_nor_other_frames(rng: np.random.Generator, name: str) -> None:
    frames = rng.uniform(size=(5, 170, 180, 3))
    metric = load(name)
    whole = metric.pairwise(frames, scope=(0, 1))
    assert np.array_equal(metric.pairwise(frames[1:3], scope=(0, 1)), whole[1:3, 1:3])
    assert metric.distance(frames[0], frames[4], scope=(0, 1)) == whole[0, 4]
    assert metric.distance(frames[4], frames[0], scope=(0, 1)) == whole[0, 4]
    torch.set_num_threads(3)
    assert np.array_equal(metric.pairwise(frames, scope=(0, 1)), whole)


def test_what_options_must_be() -> None:
    with pytest.raises(ValueError, match="window must be one of 'uniform', 'gaussian', got 'gauss'"):
        load("ssim", window="gauss")
    for value in (0.0, -1.0, float("inf"), float("nan"), "abc", True):
        with pytest.raises(ValueError, match="'data_range' of metric 'ms-ssim' must be a positive number"):
            load("ms-ssim", data_range=value)
    with pytest.raises(ValueError, match="'ssim-gaussian' has no option window"):
        load("ssim-gaussian", window="uniform")


def test_the_title_says_which_window() -> None:
    assert "Gaussian" in load("ssim", window="gaussian").info.title
    assert "uniform" in load("ssim").info.title


def test_ms_ssim_names_its_smallest_size(rng: np.random.Generator) -> None:
    assert np.isfinite(load("ms-ssim").pairwise(rng.uniform(size=(2, 161, 170, 3)))).all()
    with pytest.raises(ValueError, match="smallest that works is 161×161"):
        load("ms-ssim").pairwise(rng.uniform(size=(2, 160, 170, 3)))
