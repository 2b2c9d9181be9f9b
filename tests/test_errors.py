"""Errors that benchmarks report equal the benchmarks' own, and their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest

import lsim
from lsim.metric import Metric
from lsim.testing import check_metric

NAMES = (
    *("max-error", "nmae", "crmse", "brmse", "frmse-low", "frmse-mid", "frmse-high"),
    *("spectral-mse-low", "spectral-mse-mid", "spectral-mse-high", "h1"),
)


def load(name: str, **settings: object) -> Metric:
    return lsim.load_metric(name, device="cpu", **{"size": None} | settings)  # type: ignore[arg-type]


def fields(height: int = 24, width: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """A temperature around 300 K, and a forecast of it."""
    y, x = np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")
    reference = 300 + 2 * np.sin(2 * np.pi * (2 * x + y)) + np.cos(2 * np.pi * (3 * x - 5 * y))
    error = 0.3 * np.cos(2 * np.pi * (x + 4 * y)) + 0.05 * np.sin(2 * np.pi * (11 * x + 9 * y)) + 0.1
    return reference, reference + error


# Shells of wavenumbers are others on an odd side than on an even one; pixels are not.
@pytest.mark.parametrize(
    ("name", "side"), [*((name, 26) for name in NAMES), *((name, 45) for name in NAMES[4:])]
)
def test_contract(name: str, side: int) -> None:
    check_metric(load(name), frame_size=side)


@pytest.mark.parametrize("name", ["max-error", "nmae", "crmse", "brmse"])
def test_contract_with_a_mask(name: str) -> None:
    check_metric(load(name, mask=True), frame_size=33)


BY_OTHERS = {
    "max-error": 0.4500000000000455,
    "nmae": 0.0006770313194010737,
    "spectral-mse-low": 0.010000000000004563,
    "spectral-mse-mid": 0.04499999999999927,
    "spectral-mse-high": 0.0012499999999997411,
}
"""Of :func:`fields` by the_well 1.2.0: LInfinity, NMAE and binned_spectral_mse of (forecast, reference)."""


@pytest.mark.parametrize("name", BY_OTHERS)
def test_equals_the_well(name: str) -> None:
    assert load(name).distance(*fields(), "none")[0] == pytest.approx(BY_OTHERS[name], rel=1e-6)


@pytest.mark.parametrize(("extent", "expected"), [(1.0, 8.714630276759728), (2.5, 9.070386513528689)])
def test_h1_equals_apebench(extent: float, expected: float) -> None:
    """Values of exponax 0.2.0, H1_RMSE in double precision with that domain_extent."""
    found = load("h1", extent=extent).distance(*fields(24, 24), "none")[0]
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("extent", "expected"), [(1.0, 40.22553991242991), (2.5, 40.520852412429946)])
def test_h1_as_a_root_is_the_norm_whose_square_apebench_gives(extent: float, expected: float) -> None:
    """Values of exponax 0.2.0, H1_MSE."""
    found = load("h1", extent=extent, combine="root").distance(*fields(24, 24), "none")[0]
    assert found**2 == pytest.approx(expected, rel=1e-9)


def fourier_error(error: np.ndarray, start: int, stop: int | None) -> float:
    """PDEBench's definition, coefficient by coefficient."""
    height, width = error.shape
    energy = np.abs(np.fft.fft2(error)) ** 2
    shells = np.zeros(min(height // 2, width // 2))
    for i in range(height // 2):
        for j in range(width // 2):
            if (shell := math.floor(math.sqrt(i**2 + j**2))) < len(shells):
                shells[shell] += energy[i, j]
    return float(np.mean(np.sqrt(shells[start:stop]) / (height * width)))


def by_formula(name: str, a: np.ndarray, b: np.ndarray) -> float:
    """Of fields (y, x, channel)."""
    errors = list(np.moveaxis(b - a, -1, 0))
    bands = {"low": (0, 4), "mid": (4, 12), "high": (12, None)}
    if name == "max-error":
        return float(np.abs(b - a).max())
    if name == "crmse":
        return float(np.mean([abs(error.mean()) for error in errors]))
    if name == "brmse":
        rims = [np.concatenate([e[0], e[-1], e[:, 0], e[:, -1]]) for e in errors]
        return float(np.mean([np.sqrt(np.mean(rim**2)) for rim in rims]))
    return float(np.mean([fourier_error(e, *bands[name.removeprefix("frmse-")]) for e in errors]))


@pytest.mark.parametrize("name", ["max-error", "crmse", "brmse", "frmse-low", "frmse-mid", "frmse-high"])
@pytest.mark.parametrize("shape", [(30, 44, 1), (33, 27, 3)])
def test_equals_the_definition_of_pdebench(
    rng: np.random.Generator, name: str, shape: tuple[int, ...]
) -> None:
    frames = 300 + 2 * rng.standard_normal((3, *shape))
    matrix = load(name).pairwise(frames, "none")
    for i, j in ((0, 1), (0, 2), (2, 1)):
        expected = by_formula(name, frames[i], frames[j])
        assert matrix[i, j] == pytest.approx(expected, rel=1e-9)
        assert load(name).distance(frames[i], frames[j], "none")[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(32, 32), (31, 20), (8, 64)])
def test_bands_add_up_to_the_mean_square(rng: np.random.Generator, shape: tuple[int, int]) -> None:
    a, b = rng.standard_normal((2, *shape))
    bands = [load(f"spectral-mse-{band}").distance(a, b, "none")[0] for band in ("low", "mid", "high")]
    assert sum(bands) == pytest.approx(load("l2").distance(a, b, "none")[0], rel=1e-9)


def test_masked_errors_are_those_of_what_is_known(rng: np.random.Generator) -> None:
    frames = rng.standard_normal((2, 20, 24, 3))
    kept = rng.random((20, 24)) < 0.7
    a, b = (frame[kept] for frame in frames)
    expected = {
        "max-error": np.abs(a - b).max(),
        "nmae": np.abs(a - b).mean() / (np.abs(a).mean() + 1e-7),
        "crmse": np.abs((a - b).mean(0)).mean(),
    }
    for name, value in expected.items():
        assert load(name).distance(*frames, "none", mask=kept)[0] == pytest.approx(value, rel=1e-9), name


def test_a_wave_has_its_error_in_its_band_alone() -> None:
    reference = np.zeros((64, 64))
    wave = np.cos(2 * np.pi * 8 * np.arange(64) / 64)[None] + reference
    found = {
        band: load(f"frmse-{band}").distance(reference, wave, "none")[0] for band in ("low", "mid", "high")
    }
    assert found["mid"] == pytest.approx(0.5 / 8)
    assert max(found["low"], found["high"]) < 1e-15
    assert load("crmse").distance(reference, wave, "none")[0] < 1e-15


def test_too_small_frames_are_refused() -> None:
    with pytest.raises(lsim.FramesError, match="'frmse-high' cannot take frames of 24×24"):
        load("frmse-high").pairwise(np.zeros((2, 24, 24)))


@pytest.mark.parametrize("options", [{"extent": 0}, {"combine": "max"}])
def test_wrong_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        load("h1", **options)
