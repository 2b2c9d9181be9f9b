"""Spectral distances: textbook transforms in extended precision, and what spectra are blind to."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.fft
import torch

import lsim
from lsim.metrics import spectral
from lsim.testing import check_metric

NAMES = ("spectral", "fft")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def load(name: str, size: int | None = None, **options: float) -> lsim.Metric:
    return lsim.load_metric(name, device="cpu", size=size, **options)


def fields(rng: np.random.Generator, n: int, y: int, x: int) -> np.ndarray:
    """Smooth fields with some noise on [0, 255], which they span together."""
    rows, columns = np.meshgrid(np.linspace(0, 1, y), np.linspace(0, 1, x), indexing="ij")
    waves = np.stack([np.sin(7 * (1 + k / 10) * (rows + 2 * columns)) for k in range(n)])[..., None]
    frames = 120 + 90 * waves + 2 * rng.standard_normal((n, y, x, 3))
    frames = np.clip(frames, 1, 254).astype(np.float32)
    frames[:, 0, 0], frames[:, -1, -1] = 0, 255
    return as_prepared(frames)


def as_prepared(frames: np.ndarray) -> np.ndarray:
    """Frames on [0, 255] with the rounding that preparing them for the range (0, 255) leaves."""
    return lsim.preprocess(frames, None, scope=(0, 255))


def by_definition(a: np.ndarray, b: np.ndarray, floor: float = 1e-6) -> dict[str, float]:
    """The whole plane of coefficients, shell by shell, in extended precision."""
    y, x, channels = a.shape
    side = max(y, x)
    ky, kx = np.meshgrid(np.fft.fftfreq(y) * side, np.fft.fftfreq(x) * side, indexing="ij")
    radius = np.round(np.hypot(ky, kx))
    amplitudes, shells = [], []
    for c in range(channels):
        energies = []
        for frame in (a, b):
            plane = frame[..., c].astype(np.longdouble) / 255
            energies.append(np.abs(scipy.fft.fft2(plane, norm="forward")) ** 2)
        first, second = (np.log10(energy + np.longdouble(floor) ** 2) for energy in energies)
        amplitudes.append((first - second) / 2)
        for k in range(side // 2 + 1):
            left, right = (np.log10(energy[radius == k].mean() + floor**2) for energy in energies)
            shells.append(left - right)
    return {
        "spectral": float(np.sqrt(np.mean(np.square(shells)))),
        "fft": float(np.sqrt(np.mean(np.square(amplitudes)))),
    }


@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str) -> None:
    check_metric(load(name, size=64))
    check_metric(load(name), frame_size=33, seed=2)
    check_metric(load(name, floor=1e-3), frame_size=16)


@pytest.mark.parametrize(
    ("y", "x"), [(64, 64), (128, 128), (224, 224), (512, 512), (48, 80), (51, 33), (1, 7)]
)
def test_parity_with_definition(rng: np.random.Generator, y: int, x: int) -> None:
    a, b = fields(rng, 2, y, x)
    expected = by_definition(a, b)
    for name in NAMES:
        found = load(name).distance(a, b, scope=(0, 255))
        np.testing.assert_allclose(found, expected[name], rtol=1e-9, err_msg=name)


def test_parity_after_resizing(rng: np.random.Generator) -> None:
    frames = rng.normal(size=(3, 70, 90, 3)).cumsum(axis=1)
    prepared = lsim.preprocess(frames, 64, order=1)
    for name in NAMES:
        matrix = lsim.load_metric(name, device="cpu", size=64, order=1).pairwise(frames)
        for i, j in itertools.combinations(range(3), 2):
            expected = by_definition(prepared[i], prepared[j])[name]
            assert matrix[i, j] == pytest.approx(expected, rel=1e-9), name


@pytest.mark.parametrize("kind", ["noise", "smooth", "constant"])
@pytest.mark.parametrize("step", [1.0, 1e-3])
def test_one_pixel_is_measured(rng: np.random.Generator, kind: str, step: float) -> None:
    """One grey level or a thousandth of it; single precision of the logarithms would leave nothing."""
    a = {
        "noise": lambda: rng.integers(0, 256, (224, 224, 3)).astype(np.float32),
        "smooth": lambda: fields(rng, 1, 224, 224)[0],
        "constant": lambda: np.full((224, 224, 3), 90, np.float32),
    }[kind]()
    a[100, 100, 1] = 90
    b = a.copy()
    b[100, 100, 1] += np.float32(step)
    a, b = as_prepared(np.stack([a, b]))
    expected = by_definition(a, b)
    for name in NAMES:
        found = load(name).distance(a, b, scope=(0, 255))[0]
        assert found == pytest.approx(expected[name], rel=1e-7), name


def test_a_wave_of_twice_the_amplitude() -> None:
    """By hand: one pair of coefficients of 64², in one shell of 33, doubles; energy fourfold."""
    x = np.arange(64) / 64
    wave = np.broadcast_to(np.cos(2 * np.pi * 5 * x), (64, 64))
    frames = np.stack([128 + 30 * wave, 128 + 60 * wave]).astype(np.float32)[..., None]
    found = {name: load(name).pairwise(frames, scope=(0, 255))[0, 1] for name in NAMES}
    assert found["fft"] == pytest.approx(np.sqrt(2 / 64**2) * np.log10(2), rel=1e-4)
    assert found["spectral"] == pytest.approx(np.sqrt(1 / 33) * np.log10(4), rel=1e-4)


def test_what_spectra_do_not_see(rng: np.random.Generator) -> None:
    """A shift around the edges; for the radial spectrum also a quarter turn."""
    frame, other = fields(rng, 2, 64, 64)
    shifted = np.roll(frame, (11, 23), axis=(0, 1))
    for name in NAMES:
        assert load(name).distance(frame, shifted) < 1e-9
        assert load(name).distance(frame, other) > 1e-2
    turned = np.rot90(frame)
    assert load("spectral").distance(frame, turned) < 1e-9
    assert load("fft").distance(frame, turned) > 1e-2


def test_an_offset_counts_as_one_coefficient() -> None:
    frames = np.stack([np.full((32, 32), 40.0), np.full((32, 32), 80.0)])[..., None]
    assert load("fft").pairwise(frames, scope=(0, 255))[0, 1] == pytest.approx(np.log10(2) / 32, rel=1e-9)
    assert load("spectral").pairwise(frames, scope=(0, 255))[0, 1] == pytest.approx(
        np.log10(4) / np.sqrt(17), rel=1e-9
    )


def test_energy_below_the_floor_fades_out(rng: np.random.Generator) -> None:
    """Rounding of a smooth field is no structure; a lower floor would call it one."""
    noise = rng.standard_normal((2, 64, 64, 1))
    frames = 128 + 1e-4 * noise
    for name in NAMES:
        distances = [
            load(name, floor=floor).distance(frames[0], frames[1], scope=(0, 255))[0]
            for floor in (1e-10, 1e-6, 1e-4)
        ]
        assert distances[0] > 0.05
        assert distances[1] < 1e-3 * distances[0]
        assert distances[2] < 1e-3 * distances[1]
        expected = by_definition(*as_prepared(frames)[..., :1], floor=1e-10)[name]
        assert distances[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("floor", [0, -1e-6, 1, float("nan"), "x"])
def test_floors_that_are_none(floor: float) -> None:
    with pytest.raises(ValueError, match="'floor' of metric 'spectral'"):
        load("spectral", floor=floor)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_right_and_finite_without_any_energy(rng: np.random.Generator, name: str) -> None:
    metric = load(name)
    flat = torch.zeros(2, 1, 8, 8)
    flat[1] = 100
    flat.requires_grad_()
    (gradient,) = torch.autograd.grad(metric(flat, flat.detach().flip(0)).sum(), flat)
    assert torch.isfinite(gradient).all()

    other = torch.from_numpy(rng.uniform(0, 255, (1, 1, 6, 7)))
    point = torch.from_numpy(rng.uniform(0, 255, (1, 1, 6, 7))).requires_grad_()
    assert torch.autograd.gradcheck(lambda frame: metric(frame, other), point, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_in_torch_as_compiled(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    frames = fields(rng, 4, 40, 50)
    frames[3] = frames[0]
    frames[3, 20, 20] += 1
    compiled = load(name).pairwise(frames)
    monkeypatch.setattr(spectral, "has_kernel", lambda *tensors: False)
    np.testing.assert_allclose(load(name).pairwise(frames), compiled, rtol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_gpu_as_on_cpu(rng: np.random.Generator, name: str) -> None:
    frames = fields(rng, 4, 64, 80)
    on_gpu = lsim.load_metric(name, device="cuda", size=None)
    np.testing.assert_allclose(on_gpu.pairwise(frames), load(name).pairwise(frames), rtol=1e-9)


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
    np.testing.assert_allclose(load(name).pairwise(scalar), load(name).pairwise(three), rtol=1e-12)


def test_a_run_transforms_each_frame_once_for_one_floor(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = fields(rng, 3, 32, 32)
    expected = {name: load(name).pairwise(frames) for name in NAMES}
    coarse = load("fft", floor=1e-2).pairwise(frames)
    transformed = []
    log_spectra = spectral._log_spectra
    monkeypatch.setattr(
        spectral, "_log_spectra", lambda f, **k: transformed.append(len(f)) or log_spectra(f, **k)
    )
    prepared = load("fft").prepare(frames, "sequence")
    for name in NAMES:
        assert np.array_equal(load(name).all_pairs(prepared), expected[name])
    assert sum(transformed) == 3
    assert np.array_equal(load("fft", floor=1e-2).all_pairs(prepared), coarse)
    assert not np.array_equal(coarse, expected["fft"])
