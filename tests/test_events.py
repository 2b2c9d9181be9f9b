"""The fractions skill score equals that of the package scores."""

from __future__ import annotations

import numpy as np
import pytest
from test_errors import fields

import lsim
from lsim.testing import check_metric


def load(**options: object) -> lsim.Metric:
    return lsim.load_metric("fss", device="cpu", size=None, **options)  # type: ignore[arg-type]


def test_contract() -> None:
    check_metric(load(), frame_size=32)


@pytest.mark.parametrize(
    ("threshold", "window", "expected"),
    [
        (300.0, 3, 0.9940587796778638),
        (300.5, 5, 0.9972806700098227),
        (301.0, 1, 0.9259259259259259),
        (300.0, 24, 0.9994377064722806),
    ],
)
def test_equals_scores(threshold: float, window: int, expected: float) -> None:
    """Values of scores 2.7.0, fss_2d(forecast, reference)."""
    found = load(threshold=threshold, window=window).distance(*fields(), "none")[0]
    assert 1 - found == pytest.approx(expected, rel=1e-12)


def test_equals_its_definition_window_by_window(rng: np.random.Generator) -> None:
    a, b = rng.random((2, 9, 11))
    p, q = (
        np.array([np.mean(f[i : i + 4, j : j + 4] > 0.6) for i in range(6) for j in range(8)]) for f in (a, b)
    )
    expected = ((p - q) ** 2).sum() / (p**2 + q**2).sum()
    assert load(threshold=0.6, window=4).distance(a, b, "none")[0] == pytest.approx(expected, rel=1e-12)


def test_a_value_at_the_threshold_is_no_event(rng: np.random.Generator) -> None:
    """Whatever rounding does to physical values on the way: 0.1 is not above 0.1."""
    for threshold in rng.random(100):
        frames = np.stack([np.zeros((6, 6)), np.full((6, 6), threshold)])
        assert load(threshold=float(threshold), window=2).pairwise(frames, "none")[0, 1] == 0


def test_frames_without_events_are_equal_and_unlike_others() -> None:
    frames = np.zeros((3, 8, 8))
    frames[1] = 0.2
    frames[2] = 1
    matrix = load().pairwise(frames, "none")
    assert matrix[0, 1] == 0
    assert matrix[0, 2] == matrix[2, 0] == 1


@pytest.mark.parametrize("options", [{"window": 0}, {"window": 2.5}, {"threshold": float("nan")}])
def test_wrong_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        load(**options)


def test_a_window_larger_than_the_frame_is_refused() -> None:
    with pytest.raises(lsim.FramesError, match="the smallest that works is 9×9, the option 'window'"):
        load(window=9).pairwise(np.zeros((2, 8, 20)))
