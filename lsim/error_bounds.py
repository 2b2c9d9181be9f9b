"""How right sums over pairs of frames are, as results say it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

PROMISE = 1e-5
"""Largest relative error of a sum."""

CONFIDENCE = 5.0
"""λ of Higham & Mary (SIAM J. Sci. Comput. 41, 2019): a rounding is beyond the bound with 2 exp(−λ²/2)."""

HALF_ULP = 2.0**-24
"""Relative rounding error of single precision."""

HALF_ULP_OF_DOUBLE = 2.0**-53


NetworkPrecision: TypeAlias = Literal["exact", "ranking"]
"""In what networks run: the precision of the frames, or bfloat16."""


class PrecisionError(ValueError):
    """A precision that a metric doesn't have."""


def check_network_precision(metric: str, precision: str, *, double: bool) -> None:
    """Raise :class:`ValueError` for a precision that no network has, and for bfloat16 on double frames."""
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
    """Keep double precision; make all else single."""
    return values if values.dtype == torch.float64 else values.float()


DIRECTLY = "direct differences"
BY_PRODUCT = "centred product"


@dataclass(frozen=True)
class PairPrecision:
    """How the sums over pairs were computed, and how right they are for sure; records add up.

    Attributes
    ----------
    method : str
        ``"direct differences"``, ``"centred product"``, or several, joined by ``" + "``; ``"… of a network's
        features"`` where it is features, rounded by the network, whose differences are as right as that.
    promise : float
        The relative error of a sum that is allowed.
    bound : float
        The largest relative error that a sum can have: not above ``promise``.
    pairs : int
        How many sums there are.
    recomputed : int
        How many of them were taken again by differences, since the product could not keep the promise.
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
    """The record of sums over a network's features, whose own rounding is not in its bound."""
    methods = sorted({f"{method} of a network's features" for method in record.method.split(" + ")})
    return replace(record, method=" + ".join(methods))


class ReportsPrecision:
    """For metrics: keeps count of the precision of their sums, until somebody takes the record."""

    pair_precision: PairPrecision | None = None
    """Of all sums since the last :meth:`take_precision`; None where there were none."""

    def note_precision(self, record: PairPrecision) -> None:
        """Add a record to :attr:`pair_precision`."""
        with _noting:
            self.pair_precision = record if self.pair_precision is None else self.pair_precision + record

    def take_precision(self) -> PairPrecision | None:
        """:attr:`pair_precision`, and start anew."""
        with _noting:
            record, self.pair_precision = self.pair_precision, None
        return record


_noting = threading.Lock()


def number_of_pairs(n: int, m: int, *, symmetric: bool) -> int:
    """How many sums n rows and m others have: those i < j where both sides are the same."""
    return n * (n - 1) // 2 if symmetric else n * m
