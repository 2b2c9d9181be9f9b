"""Wasserstein distances: SciPy's and POT's numbers, and shifts that are known by hand."""

from __future__ import annotations

import itertools

import numpy as np
import ot
import pytest
import torch
from scipy.stats import wasserstein_distance

import lsim
from lsim.metrics import optimal_transport
from lsim.metrics.optimal_transport import directions_and_weights
from lsim.testing import check_metric

NAMES = ("wasserstein", "sliced-wasserstein")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def load(name: str, size: int | None = None, **options: int) -> lsim.Metric:
    return lsim.load_metric(name, device="cpu", size=size, **options)


def as_prepared(frames: np.ndarray) -> np.ndarray:
    """Frames on [0, 255] with the rounding that preparing them for the range (0, 255) leaves."""
    return lsim.preprocess(frames, None, scope=(0, 255))


def fields(rng: np.random.Generator, n: int, y: int, x: int) -> np.ndarray:
    """Smooth fields with some noise on [0, 255]."""
    rows, columns = np.meshgrid(np.linspace(0, 1, y), np.linspace(0, 1, x), indexing="ij")
    waves = np.stack([np.sin(7 * (1 + k / 10) * (rows + 2 * columns)) for k in range(n)])[..., None]
    return as_prepared(np.clip(120 + 90 * waves + 9 * rng.standard_normal((n, y, x, 3)), 0, 255))


def values_by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    return float(wasserstein_distance(a.astype(np.float64).ravel() / 255, b.astype(np.float64).ravel() / 255))


def sliced_by_scipy(a: np.ndarray, b: np.ndarray, count: int = 12) -> float:
    """Along every direction the distance of two weighted samples: of pixel centres, in sides of the frame."""
    y, x, channels = a.shape
    centres = (np.indices((y, x)) + 0.5).reshape(2, -1) / max(y, x)
    total = 0.0
    for (q, p), weight in zip(*directions_and_weights(count), strict=True):
        position = (q * centres[1] + p * centres[0]) / np.hypot(q, p)
        for c in range(channels):
            masses = [frame[..., c].astype(np.float64).ravel() for frame in (a, b)]
            masses = [mass if mass.any() else np.ones_like(mass) for mass in masses]
            total += weight / channels * wasserstein_distance(position, position, *masses)
    return total


BY_SCIPY = {"wasserstein": values_by_scipy, "sliced-wasserstein": sliced_by_scipy}


@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str) -> None:
    check_metric(load(name, size=64))
    check_metric(load(name), frame_size=21, seed=2)


@pytest.mark.parametrize(("y", "x"), [(64, 64), (40, 70), (33, 17), (1, 9)])
@pytest.mark.parametrize("name", NAMES)
def test_parity_with_scipy(rng: np.random.Generator, name: str, y: int, x: int) -> None:
    frames = fields(rng, 3, y, x)
    matrix = load(name).pairwise(frames, scope=(0, 255))
    for i, j in itertools.combinations(range(3), 2):
        assert matrix[i, j] == pytest.approx(BY_SCIPY[name](frames[i], frames[j]), rel=1e-6)


@pytest.mark.parametrize("size", [128, 224, 512])
def test_parity_with_scipy_for_large_frames(rng: np.random.Generator, size: int) -> None:
    a, b = fields(rng, 2, size, size)
    for name in NAMES:
        found = load(name).distance(a[..., :1], b[..., :1], scope=(0, 255))[0]
        assert found == pytest.approx(BY_SCIPY[name](a[..., :1], b[..., :1]), rel=1e-6), name


@pytest.mark.parametrize("count", [1, 2, 1000, 100_003])
def test_values_are_sorted_as_numpy_does(rng: np.random.Generator, count: int) -> None:
    values = (rng.standard_normal(count) * 10.0 ** rng.integers(-44, 38, count)).astype(np.float32)
    values[:6] = np.array([np.inf, -np.inf, 0, -0.0, 1, 1], np.float32)[:count]
    assert np.array_equal(optimal_transport.sorted_values(values), np.sort(values))


def test_sliced_parity_with_pot(rng: np.random.Generator) -> None:
    """Both its exact solver on the line and its sliced distance, which takes points with weights."""
    frames = fields(rng, 2, 24, 32)[..., :1]
    found = load("sliced-wasserstein").distance(frames[0], frames[1], scope=(0, 255))[0]
    points = (np.indices((24, 32))[::-1].reshape(2, -1).T + 0.5) / 32
    a, b = (frame.astype(np.float64).ravel() / frame.sum(dtype=np.float64) for frame in frames)
    vectors, weights = directions_and_weights(12)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    exact = [ot.emd2_1d(points @ unit, points @ unit, a, b, metric="euclidean") for unit in units]
    assert found == pytest.approx(weights @ exact, rel=1e-6)
    sliced = [
        ot.sliced_wasserstein_distance(points, points, a, b, projections=unit[:, None], p=1) for unit in units
    ]
    assert found == pytest.approx(weights @ sliced, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", [1.0, 1e-3])
def test_one_pixel_is_measured(rng: np.random.Generator, name: str, step: float) -> None:
    """One grey level or a thousandth of it; against SciPy in double precision."""
    a = rng.integers(0, 256, (224, 224, 1)).astype(np.float32)
    a[0, 0] = 90
    b = a.copy()
    b[0, 0] += np.float32(step)
    a, b = as_prepared(np.stack([a, b]))[..., :1]
    found = load(name).distance(a, b, scope=(0, 255))[0]
    assert found == pytest.approx(BY_SCIPY[name](a, b), rel=1e-5)


def test_values_move_as_far_as_they_are_offset(rng: np.random.Generator) -> None:
    frame = rng.uniform(0, 200, (32, 32, 3)).astype(np.float32)
    found = load("wasserstein").distance(frame, frame[::-1, ::-1] + 51, scope=(0, 255))
    assert found == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize("side", [32, 64, 128])
@pytest.mark.parametrize("angle", [0, 17, 45, 74, 90, 133])
def test_mass_moves_as_far_as_it_is_shifted(side: int, angle: float) -> None:
    """By s in any direction: 2/π·s in the mean over angles, and the same at every resolution."""
    y, x = (np.indices((side, side)) + 0.5) / side
    along = np.array([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))]) * 0.1

    def blob(shift: np.ndarray) -> np.ndarray:
        return 255 * np.exp(-((x - 0.45 - shift[0]) ** 2 + (y - 0.45 - shift[1]) ** 2) / 0.08**2)[..., None]

    found = load("sliced-wasserstein").distance(blob(0 * along), blob(along), scope=(0, 255))[0]
    assert found == pytest.approx(0.1 * 2 / np.pi, rel=8e-3)


def test_direction_sets() -> None:
    """Closed under mirror images and quarter turns; the mean of |cos| over angles within 0.8 % for 12."""
    for count, within in ((4, 0.06), (8, 0.02), (12, 0.008), (20, 0.005), (64, 0.003)):
        vectors, weights = directions_and_weights(count)
        lines = {tuple(v) for v in vectors} | {tuple(-v) for v in vectors}
        assert len(lines) == 2 * count
        assert lines == {(p, q) for q, p in lines} == {(q, -p) for q, p in lines}
        assert weights.sum() == pytest.approx(1, rel=1e-12)
        angles = np.arctan2(vectors[:, 1], vectors[:, 0])
        for turn in np.linspace(0, np.pi, 181):
            mean = weights @ np.abs(np.cos(angles - turn))
            assert mean == pytest.approx(2 / np.pi, rel=within), (count, turn)


@pytest.mark.parametrize("directions", [0, 2, 6, 16.0, True])
def test_directions_that_are_none(directions: int) -> None:
    with pytest.raises(ValueError, match="'directions' of metric 'sliced-wasserstein' is a multiple of 4"):
        load("sliced-wasserstein", directions=directions)


def test_other_numbers_of_directions(rng: np.random.Generator) -> None:
    a, b = fields(rng, 2, 20, 30)
    for directions in (4, 20):
        metric = load("sliced-wasserstein", directions=directions)
        assert metric.specification()["options"] == {"directions": directions}
        found = metric.distance(a, b, scope=(0, 255))[0]
        assert found == pytest.approx(sliced_by_scipy(a, b, directions), rel=1e-6)


def test_constant_and_empty_frames_are_evenly_spread(rng: np.random.Generator) -> None:
    a = fields(rng, 1, 24, 24)[0]
    frames = np.stack([np.zeros_like(a), np.full_like(a, 0.1), np.full_like(a, 200), a])
    matrix = load("sliced-wasserstein").pairwise(frames, scope=(0, 255))
    assert (matrix[:3, :3] == 0).all()
    np.testing.assert_allclose(matrix[3, :3], sliced_by_scipy(a, frames[0]), rtol=1e-6)


def test_negative_values_carry_no_mass(rng: np.random.Generator) -> None:
    """A fixed range may leave values outside of it."""
    frames = 300 * rng.standard_normal((2, 20, 20, 1))
    metric = load("sliced-wasserstein")
    expected = metric.pairwise(frames.clip(min=0), scope=(0, 255))
    assert np.array_equal(metric.pairwise(frames, scope=(0, 255)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(rng: np.random.Generator, name: str) -> None:
    """Right where frames differ, finite where there is no mass at all."""
    metric = load(name)
    other = torch.from_numpy(rng.uniform(0, 255, (1, 1, 5, 6)).astype(np.float32))
    point = torch.from_numpy(rng.uniform(0, 255, (1, 1, 5, 6)).astype(np.float32)).requires_grad_()
    (gradient,) = torch.autograd.grad(metric(point, other).sum(), point)
    step = torch.from_numpy(rng.standard_normal((1, 1, 5, 6)).astype(np.float32)) / 64
    with torch.no_grad():
        ahead, behind = metric(point + step, other), metric(point - step, other)
    assert (gradient * step).sum().item() == pytest.approx(((ahead - behind) / 2).item(), rel=1e-3)
    empty = torch.zeros(1, 1, 5, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(metric(empty, other).sum(), empty)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", NAMES)
def test_in_torch_as_compiled(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    frames = fields(rng, 4, 40, 50)
    frames[2] = 0
    frames[3] = frames[0]
    frames[3, 20, 20] += 1
    compiled = load(name).pairwise(frames, scope=(0, 255))
    monkeypatch.setattr(optimal_transport, "has_kernel", lambda *tensors: False)
    np.testing.assert_allclose(load(name).pairwise(frames, scope=(0, 255)), compiled, rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_gpu_as_on_cpu(rng: np.random.Generator, name: str) -> None:
    frames = fields(rng, 4, 64, 80)
    on_gpu = lsim.load_metric(name, device="cuda", size=None)
    np.testing.assert_allclose(on_gpu.pairwise(frames), load(name).pairwise(frames), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_bits_do_not_depend_on_threads_or_other_frames(rng: np.random.Generator, name: str) -> None:
    frames = fields(rng, 7, 128, 128)
    metric = load(name)
    whole = metric.pairwise(frames, scope=(0, 255))
    assert np.array_equal(whole[2:6, 2:6], metric.pairwise(frames[2:6], scope=(0, 255)))
    torch.set_num_threads(3)
    assert np.array_equal(whole, metric.pairwise(frames, scope=(0, 255)))
    assert np.array_equal(whole[0, 1:], metric.distance(frames[[0] * 6], frames[1:], scope=(0, 255)))


@pytest.mark.parametrize("name", NAMES)
def test_one_channel_is_three_equal_ones(rng: np.random.Generator, name: str) -> None:
    scalar = fields(rng, 3, 40, 40)[..., :1]
    three = np.repeat(scalar, 3, axis=-1)
    np.testing.assert_allclose(load(name).pairwise(scalar), load(name).pairwise(three), rtol=1e-6)
