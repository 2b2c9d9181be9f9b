"""Bounds of rounding hold what they promise, and what metrics are blind to is nothing but rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lsim
from lsim.embedding import Embedding
from lsim.metric import CHANGES, Metric, MetricInfo, SizeWarning
from lsim.preprocess import Preprocessing
from lsim.ranking import may_be_constant

SIDE = 48
CLASSIC = [
    "l1",
    "l2",
    "rmse",
    "nrmse",
    "vrmse",
    "psnr",
    "correlation",
    "cosine",
    "ssim",
    "ssim-gaussian",
    "gmsd",
    "gradient",
    "spectral",
    "fft",
    "wasserstein",
    "sliced-wasserstein",
]
FOURIER = ["frmse-low", "frmse-mid", "frmse-high", "spectral-mse-low", "spectral-mse-high", "h1"]
HISTOGRAMS = ["vi", "mutual-information", "nmi"]
LARGE = ["ms-ssim", "lsim-open"]

pytestmark = pytest.mark.filterwarnings(f"ignore::{SizeWarning.__module__}.{SizeWarning.__name__}")


def load(name: str, **settings: Any) -> Metric:
    return lsim.load_metric(name, device="cpu", **{"size": None} | settings)


def measured(metric: Metric, frames: np.ndarray, scope: Any = "sequence") -> tuple[np.ndarray, np.ndarray]:
    """Distances and bounds of all pairs of different frames, flat."""
    distances, bounds = metric.all_pairs_with_rounding(metric.prepare(frames[..., None], scope))
    off = ~np.eye(len(frames), dtype=bool)
    return distances[off], bounds[off]


def is_constant(distances: np.ndarray, bounds: np.ndarray) -> bool:
    """Whether the distances cannot be told from one number."""
    return may_be_constant(distances, bounds)


def field(side: int = SIDE) -> np.ndarray:
    y, x = np.mgrid[:side, :side] / side
    return np.sin(4 * np.pi * x + 1) * np.cos(2 * np.pi * y) + 1.3 * np.sin(17 * x * y) + 0.5 * x + 3


def sequences(change: str) -> np.ndarray:
    """Six frames made of one by what the change says, none of them the same again."""
    rng = np.random.default_rng(1)
    base, steps = field(), range(6)
    levels = np.floor(255 * (base - base.min()) / np.ptp(base))

    def relabelled(t: int) -> np.ndarray:
        return np.concatenate([[0], 1 + rng.permutation(254), [255]])[levels.astype(int)] if t else levels

    makers: dict[str, Callable[[int], np.ndarray]] = {
        "offset": lambda t: base + 0.8274 * t,
        "scale": lambda t: np.exp(-0.4 * t) * base,
        "shift": lambda t: np.roll(base, (3 * t, 5 * t), (0, 1)),
        "half turn": lambda t: np.rot90(base, 2 * t),
        "quarter turn": lambda t: np.rot90(base, t),
        "reflection": lambda t: base[:: -1 if t % 2 else 1],
        "permutation": lambda t: rng.permutation(base.ravel()).reshape(base.shape),
        "relabelling": relabelled,
    }
    return np.stack([makers[change](t) for t in steps])


@pytest.mark.parametrize("name", CLASSIC + HISTOGRAMS)
@pytest.mark.parametrize("change", CHANGES)
def test_metrics_are_blind_to_what_they_say_and_to_nothing_else(name: str, change: str) -> None:
    blind = change in load(name).info.blind_to
    ways = [(np.float64, "double"), (np.float32, "exact")]
    # Where a distance is nothing but rounding, each input and arithmetic has a rounding of its own.
    ways += [(np.float64, "exact"), (np.float32, "double")] if blind else []
    for dtype, precision in ways:
        frames = sequences(change).astype(dtype)
        scope: Any = (0.0, float(frames.max())) if change == "scale" else "sequence"
        distances, bounds = measured(load(name, precision=precision), frames, scope)
        if blind:
            assert (distances <= bounds).all(), (dtype, precision, distances.max(), bounds.max())
        elif name == "psnr":  # the logarithm of what may be nothing has no bound
            assert np.isfinite(bounds).any()
        else:
            assert (distances > bounds).any()


@pytest.mark.parametrize("name", LARGE)
def test_what_is_blind_to_nothing_says_so(name: str) -> None:
    assert load(name).info.blind_to == ()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([np.float16, np.float32, np.float64, np.uint8, np.int32]),
    apart=st.sampled_from([1.0, 1e-2, 1e-5, 1e-8]),
    offset=st.sampled_from([0.0, 1.0, 300.0, 30000.0]),
    order=st.sampled_from([None, 0, 1, 3]),
    scope=st.sampled_from(["sequence", "pair"]),
    masked=st.booleans(),
)
def test_single_precision_is_within_its_bound_of_double(
    seed: int, dtype: Any, apart: float, offset: float, order: int | None, scope: str, masked: bool
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.random((32, 32)) + apart * rng.standard_normal((2, 32, 32))
    frames = ((values * 60 if np.dtype(dtype).kind in "iu" else values + offset).clip(0)).astype(dtype)
    masked = masked and np.dtype(dtype).kind == "f" and (order or 0) < 2
    if masked:
        frames[1, 3:9, 4:11] = np.nan
    how = {"size": None if order is None else 40, "order": order or 0, "mask": masked}
    for name in CLASSIC:
        metric = load(name)
        if masked and not metric.info.takes_mask:
            continue
        found, bounds = measured(load(name, **how), frames, scope)
        exact, _ = measured(load(name, precision="double", **how), frames, scope)
        with np.errstate(invalid="ignore"):
            error = np.where(found == exact, 0, np.abs(found - exact))
        assert ((error <= bounds) | (np.isnan(found) & np.isnan(exact))).all(), (name, error, bounds)


def structured(kind: str, side: int = SIDE) -> np.ndarray:
    """A frame with repeated values, edges, or waves whose period gradients and windows pass."""
    y, x = np.mgrid[:side, :side] / side
    levels = np.random.default_rng(0).integers(0, 7, (side // 8, side // 8)) / 7
    return {
        "ramp": x + 0 * y,
        "levels": np.kron(levels, np.ones((8, 8))),
        "three levels": (x > 0.3) / 3 + (x > 0.6) / 3 + (y > 0.9) / 3,
        "disc": (np.hypot(x - 0.5, y - 0.5) < 0.3) + 0.1 * x,
        "short wave": np.sin(2 * np.pi * x * side / 8 + 0.3) + 0 * y,
        "shortest waves": np.sin(np.pi * x * side / 2 + 0.3) + 0.5 * np.sin(np.pi * y * side / 2 + 0.1),
        "spot": np.exp(-((x - 0.5) ** 2 + (y - 0.3) ** 2) * 80),
        "bright rim": 3 + 0.01 * np.sin(30 * x * y) + (x > 0.97),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["ramp", "levels", "three levels", "disc", "short wave", "shortest waves", "spot", "bright rim"]
)
def test_frames_with_a_structure_are_within_their_bounds_too(kind: str) -> None:
    base = structured(kind)
    apart = [base + size * np.ptp(base) * np.roll(base, 5, 1) for size in (1, 1e-2, 1e-5, 1e-8)]
    frames = np.stack([base, base.T, 0.87 * base + 0.01, *apart])
    for name in CLASSIC + FOURIER:
        for dtype in (np.float64, np.float32):
            found, bounds = measured(load(name), frames.astype(dtype))
            exact, _ = measured(load(name, precision="double"), frames.astype(dtype))
            with np.errstate(invalid="ignore"):
                error = np.where(found == exact, 0, np.abs(found - exact))
            assert (error <= bounds).all(), (name, dtype, error.max(), bounds.max())


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("apart", [1.0, 1e-4, 1e-8])
def test_features_and_scales_are_within_their_bounds_of_double(name: str, apart: float) -> None:
    rng = np.random.default_rng(0)
    frames = rng.random((176, 176)) + apart * rng.standard_normal((3, 176, 176))
    found, bounds = measured(load(name), frames)
    exact, _ = measured(load(name, precision="double"), frames)
    assert (np.abs(found - exact) <= bounds).all()
    assert (bounds < 1e-4).all()


@pytest.mark.parametrize(
    ("name", "times"),
    [
        *(
            (name, 50)
            for name in ("l2", "rmse", "correlation", "cosine", "ssim", "gradient", "spectral", "fft")
        ),
        *((name, 50) for name in ("sliced-wasserstein", "frmse-high", "h1")),
        *((name, 300) for name in ("l1", "wasserstein", "gmsd", "crmse")),
    ],
)
def test_bounds_are_not_far_above_the_noise_that_there_is(name: str, times: float) -> None:
    rng = np.random.default_rng(0)
    # Frames that single precision cannot tell apart, but by its rounding.
    frames = rng.random((SIDE, SIDE)) + 1e-8 * rng.standard_normal((8, SIDE, SIDE))
    found, bounds = measured(load(name), frames)
    exact, _ = measured(load(name, precision="double"), frames)
    assert bounds.max() < times * np.abs(found - exact).max()


def test_a_plain_matrix_computes_no_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("bounds were computed that nobody asked for")

    monkeypatch.setattr(Metric, "bound_rounding", fail)
    frames = field()[None, ..., None] + np.arange(3)[:, None, None, None]
    for name in ("l2", "correlation", "ssim"):
        metric = load(name)
        assert np.isfinite(metric.pairwise(frames)).all()
        assert np.isfinite(metric.pairwise(frames, "pair")).all()
        assert np.isfinite(metric.from_reference(metric.prepare(frames, "sequence"))).all()


def modes(growing: float = 0.0) -> np.ndarray:
    """A decaying mode with another one that grows up to an amplitude: (11, 64, 64)."""
    y, x = np.mgrid[:64, :64] / 64
    mode, other = np.sin(4 * np.pi * x) * np.sin(2 * np.pi * y), np.sin(6 * np.pi * y)
    return np.stack([np.exp(-0.2 * t) * (mode + growing * t / 10 * other) for t in range(11)])


@pytest.mark.parametrize("precision", ["exact", "double"])
@pytest.mark.parametrize(
    "settings", [{}, {"size": 224}, {"size": 224, "order": 1}, {"size": 224, "order": 3}]
)
def test_multiples_of_a_mode_are_constant_and_a_growing_mode_is_not(
    precision: str, settings: dict[str, Any]
) -> None:
    metric = load("correlation", precision=precision, **settings)
    for scope in ("sequence", (-1.0, 1.0)):
        assert is_constant(*measured(metric, modes(), scope))
        _, bounds = measured(metric, modes(), scope)
        # ½ (a σ′/σ)² is the distance of a mode of amplitude a, and σ′/σ is √2 here.
        amplitude = 5 * float(bounds.max()) ** 0.5
        assert not is_constant(*measured(metric, modes(amplitude), scope))


@pytest.mark.parametrize("size", [None, 224])
@pytest.mark.parametrize("offset", [0, 1, 10])
def test_a_changing_mean_of_a_wave_counts_for_its_spectrum(offset: float, size: int | None) -> None:
    # All other coefficients are zero, but for the rounding of single precision.
    wave = np.sin(4 * np.pi * np.arange(64) / 64) + np.zeros((64, 1))
    frames = (wave + offset + 0.02 * np.arange(11)[:, None, None]).astype(np.float32)
    assert not is_constant(*measured(load("fft", size=size), frames))


def test_a_frame_that_is_constant_but_for_rounding_has_no_pattern() -> None:
    rng = np.random.default_rng(0)
    ripple = rng.random((SIDE, SIDE)) * np.spacing(np.float32(300)) * 0.2
    frames = np.stack([300 + ripple, 310 + ripple[::-1], field()])
    distances, _ = measured(load("correlation"), frames)
    assert distances.reshape(3, 2)[0].tolist() == [0, 1]


def test_bounds_are_nan_where_distances_are_and_zero_on_the_diagonal() -> None:
    frames = field()[None] + np.arange(4)[:, None, None]
    frames[2, 0, 0] = np.nan
    metric = load("l1")
    prepared = metric.prepare(frames[..., None], "sequence")
    distances, bounds = metric.all_pairs_with_rounding(prepared)
    np.testing.assert_array_equal(np.isnan(distances), np.isnan(bounds))
    assert (np.diag(bounds)[[0, 1, 3]] == 0).all()
    row, bound_of_row = metric.from_reference_with_rounding(prepared)
    np.testing.assert_array_equal(row, distances[0])
    np.testing.assert_array_equal(bound_of_row, bounds[0])


def test_a_metric_without_a_formula_is_tried() -> None:
    class Mean(Metric):
        info = MetricInfo(title="mean difference", source="this test")

        def embed(self, frames: torch.Tensor) -> Embedding:
            return Embedding({"values": frames.flatten(1).double()})

        def compare(self, a: Embedding, b: Embedding) -> torch.Tensor:
            return (a.parts["values"][:, None] - b.parts["values"]).abs().mean(2) / 255

    metric = Mean("mean", Preprocessing(None), torch.device("cpu"))
    _, bounds = measured(metric, field()[None] + np.arange(3)[:, None, None])
    _, formula = measured(load("l1"), field()[None] + np.arange(3)[:, None, None])
    assert (bounds > formula / 50).all()
    assert (bounds < formula).all()


def test_docs_name_what_metrics_are_blind_to() -> None:
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    for name in CLASSIC + HISTOGRAMS:
        blind = load(name).info.blind_to
        rows = [line for line in page.splitlines() if f"`{name}`" in line and line.count("|") == 3]
        assert [line.split("|")[2].strip() for line in rows] == ([", ".join(blind)] if blind else [])


def test_frames_that_are_flat_within_their_rounding_have_any_direction() -> None:
    """A mode decays below what single precision resolves: its distance, 1, is no more than a guess."""
    y, x = np.mgrid[:16, :16] / 16
    mode = np.sin(2 * np.pi * x) * np.cos(2 * np.pi * y)
    frames = np.stack([np.exp(-2.5 * t) * mode for t in range(11)])[..., None]
    metric = lsim.load_metric("correlation", size=None)
    distances, bounds = metric.all_pairs_with_rounding(metric.prepare(frames, "sequence"))
    assert distances[0, -1] == 1, "single precision leaves nothing of the last frame"
    assert (distances <= bounds).all(), "multiples of one mode are at distance 0"


@pytest.mark.parametrize("name", ["correlation", "cosine"])
def test_zeros_have_no_error_and_no_direction(name: str) -> None:
    frames = np.zeros((2, 16, 16, 1))
    frames[1] = np.random.default_rng(0).random((16, 16, 1))
    metric = lsim.load_metric(name, size=None)
    distances, bounds = metric.all_pairs_with_rounding(metric.prepare(frames, "none"))
    assert (distances[0, 1], bounds[0, 1]) == (1, 0)
