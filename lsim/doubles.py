"""Pairs of doubles: a value, and the rest that its rounding drops, about 106 bits together.

A frame on [0, 255] in double precision is off by 1e-16 of its range, which is 1e-4 of a difference of 1e-12.
Metrics that take the rest subtract the values of a pair, which is exact for nearly equal ones, and then their
rests.

The functions take arrays and tensors alike. They rely on arithmetic that is neither reordered nor fused.
"""

from __future__ import annotations

from typing import Any, TypeAlias

Pair: TypeAlias = tuple[Any, Any]

UNIT = 2.0**-98
"""Bound on the error of a normalised value with its rest, as a share of the value."""

_SPLITTER = 2.0**27 + 1


def sum_of(a: Any, b: Any) -> Pair:
    """Add doubles: the sum, and the rest that it rounds off (Knuth, TAOCP 2, section 4.2.2).

    Examples
    --------
    >>> sum_of(1.0, 1e-20)
    (1.0, 1e-20)
    """
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def product_of(a: Any, b: Any) -> Pair:
    """Multiply doubles: the product, and the rest that it rounds off (Dekker 1971); for values below 1e300.

    Examples
    --------
    >>> product_of(1 + 2.0**-30, 1 + 2.0**-30) == (1 + 2.0**-29, 2.0**-60)
    True
    """
    product = a * b
    (high, low), (other_high, other_low) = _halves(a), _halves(b)
    return product, ((high * other_high - product) + high * other_low + low * other_high) + low * other_low


def add(x: Pair, y: Pair) -> Pair:
    """Add pairs of doubles.

    Examples
    --------
    >>> add((1.0, 1e-20), (2.0, 1e-20))
    (3.0, 2e-20)
    """
    total, rest = sum_of(x[0], y[0])
    return sum_of(total, rest + (x[1] + y[1]))


def subtract(x: Pair, y: Pair) -> Pair:
    """Subtract pairs of doubles.

    Examples
    --------
    >>> subtract((1.0, 1e-20), (1.0, 0.0))
    (1e-20, 0.0)
    """
    return add(x, (-y[0], -y[1]))


def rest_of_normalised(values: Any, frames: Any, lo: Any, hi: Any, full: float) -> Any:
    """Compute the rest that rounding drops from ``values`` = full · (frames − lo) / (hi − lo).

    Parameters
    ----------
    values, frames : ndarray or Tensor of shape (…, channel), float64
    lo, hi : ndarray or Tensor of shape (channel,), float64
        With lo < hi.
    full : float

    Returns
    -------
    ndarray or Tensor of the same shape, float64
    """
    shifted, shifted_rest = sum_of(frames, -lo)
    spread, spread_rest = sum_of(hi, -lo)
    scaled, scaled_rest = product_of(shifted, full)
    product, product_rest = product_of(values, spread)
    difference = (scaled - product) + (scaled_rest - product_rest)
    return (difference + (full * shifted_rest - values * spread_rest)) / spread


def _halves(a: Any) -> Pair:
    """Split doubles into two of 26 bits each."""
    scaled = _SPLITTER * a
    high = scaled - (scaled - a)
    return high, a - high
