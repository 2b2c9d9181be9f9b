"""Precision of sums over pairs of frames, as results record it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

PROMISE = 1e-5
"""Largest relative error of a sum."""

CONFIDENCE = 5.0
"""λ of Higham & Mary (SIAM J. Sci. Comput. 41, 2019): the bound fails with a probability of 2 exp(−λ²/2)."""

HALF_ULP = 2.0**-24
"""Relative rounding error of single precision."""

HALF_ULP_OF_DOUBLE = 2.0**-53


NetworkPrecision: TypeAlias = Literal["exact", "ranking"]
"""Precision that networks run in: that of the frames, or bfloat16."""


class PrecisionError(ValueError):
    """A precision that a metric doesn't have."""


def check_network_precision(metric: str, precision: str, *, double: bool) -> None:
    """Raise :class:`ValueError` for an unknown precision of networks, and for bfloat16 on double frames."""
    if precision not in get_args(NetworkPrecision):
        raise ValueError(f"precision must be 'exact' or 'ranking', got {precision!r}")
    if double and precision == "ranking":
        raise PrecisionError(
            f"metric {metric!r}: option precision='ranking' is bfloat16, its frames are in double precision; "
            "ask for one of the two"
        )


def half_ulp(dtype: torch.dtype) -> float:
    """Return the relative rounding error of single or double precision."""
    return HALF_ULP_OF_DOUBLE if dtype == torch.float64 else HALF_ULP


def as_floats(values: Tensor) -> Tensor:
    """Convert values to single precision, unless they are double."""
    return values if values.dtype == torch.float64 else values.float()


DIRECTLY = "direct differences"
BY_PRODUCT = "centred product"


@dataclass(frozen=True)
class PairPrecision:
    """Record of how sums over pairs were computed, with a bound on their error; records add up.

    Attributes
    ----------
    method : str
        ``"direct differences"``, ``"centred product"``, or several, joined by ``" + "``. ``"… of a network's
        features"`` for features that the network has rounded; the bound is then about their differences.
    promise : float
        The relative error that a sum may have.
    bound : float
        Bound on the relative error of all sums; not above ``promise``.
    pairs : int
        Number of sums.
    recomputed : int
        Number of sums that were computed again by differences, since the product exceeded ``promise``.

    Examples
    --------
    >>> record = PairPrecision(DIRECTLY, PROMISE, bound=1e-7, pairs=3)
    >>> (record + record).pairs
    6
    """

    method: str
    promise: float
    bound: float
    pairs: int
    recomputed: int = 0

    def __add__(self, other: PairPrecision) -> PairPrecision:
        methods = {*self.method.split(" + "), *other.method.split(" + ")}
        return PairPrecision(
            " + ".join(sorted(methods)),
            max(self.promise, other.promise),
            max(self.bound, other.bound),
            self.pairs + other.pairs,
            self.recomputed + other.recomputed,
        )


def of_features(record: PairPrecision) -> PairPrecision:
    """Mark a record as one of a network's features, whose own rounding is not in the bound."""
    methods = sorted({f"{method} of a network's features" for method in record.method.split(" + ")})
    return replace(record, method=" + ".join(methods))


class ReportsPrecision:
    """Base class of metrics that record the precision of their sums until the record is taken."""

    pair_precision: PairPrecision | None = None
    """Record of all sums since the last :meth:`take_precision`; None without any."""

    def note_precision(self, record: PairPrecision) -> None:
        """Add a record to :attr:`pair_precision`."""
        with _noting:
            self.pair_precision = record if self.pair_precision is None else self.pair_precision + record

    def take_precision(self) -> PairPrecision | None:
        """Return :attr:`pair_precision` and clear it."""
        with _noting:
            record, self.pair_precision = self.pair_precision, None
        return record


_noting = threading.Lock()


def number_of_pairs(n: int, m: int, *, symmetric: bool) -> int:
    """Count the sums of n rows and m others: the pairs i < j if both sides are the same.

    Examples
    --------
    >>> number_of_pairs(3, 3, symmetric=True), number_of_pairs(3, 4, symmetric=False)
    (3, 12)
    """
    return n * (n - 1) // 2 if symmetric else n * m
