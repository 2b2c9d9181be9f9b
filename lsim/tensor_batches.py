"""Batches of tensors in a known range, as a call of a metric and of a loss takes them."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from torch import Tensor
from torch.masked import MaskedTensor

from lsim.pairs import is_plain


class RangeWarning(UserWarning):
    """Frames that seem to be in another range than the metric takes."""


def check_tensors(*batches: Tensor) -> None:
    """Refuse batches that are not tensors, and masked tensors.

    Raises
    ------
    ValueError
        With the type that was passed, and the function that takes it.
    """
    for batch in batches:
        if not isinstance(batch, Tensor) or isinstance(batch, MaskedTensor):
            raise ValueError(
                f"expected plain tensors (batch, channel, y, x), found {type(batch).__name__}: "
                "Metric.distance takes arrays, and masked ones with mask='nan'"
            )


def check_batches(reference: Tensor, other: Tensor) -> None:
    """Refuse batches that are not two tensors of one shape (batch, 1 or 3, y, x).

    Raises
    ------
    ValueError
    """
    check_tensors(reference, other)
    if reference.ndim != 4 or reference.shape != other.shape:
        raise ValueError(
            "expected two tensors of equal shape (batch, channel, y, x), "
            f"found {tuple(reference.shape)} and {tuple(other.shape)}"
        )
    if reference.shape[1] not in (1, 3):
        raise ValueError(f"expected 1 or 3 channels on axis 1, found {reference.shape[1]}")


def check_range(name: str, remedy: str, a: Tensor, b: Tensor, stacklevel: int) -> bool:
    """Warn if all values of two batches are in [0, 1] where [0, 255] is expected.

    Returns
    -------
    bool
        Whether their range could be judged. It cannot for frames of zeros, and for tensors whose values
        cannot be read, as under ``torch.func`` and ``torch.compile``.
    """
    if not is_plain(a, b) or not a.numel():
        return False
    with torch.no_grad():
        extremes = [values.aminmax() for values in (a, b)]
        lo = min(float(extreme.min) for extreme in extremes)
        hi = max(float(extreme.max) for extreme in extremes)
    if lo == hi == 0 or math.isnan(lo + hi):
        return False
    if a.is_floating_point() and lo >= 0 and hi <= 1:
        warnings.warn(
            f"metric {name!r} takes values in [0, 255], and these are all in [0, 1]: pass {remedy} "
            "if that is their range; as they are, they are nearly black frames",
            RangeWarning,
            stacklevel=stacklevel,
        )
    return True


def map_range(values: Tensor, data_range: float | tuple[float, float], target: tuple[float, float]) -> Tensor:
    """Map values linearly from ``data_range``, [0, ``data_range``] or [lo, hi], to another range.

    Raises
    ------
    ValueError
        For a range that is empty or infinite.

    Examples
    --------
    >>> map_range(torch.tensor([0.0, 0.5, 1.0]), 1.0, (0.0, 255.0))
    tensor([  0.0000, 127.5000, 255.0000])
    """
    ends = data_range if isinstance(data_range, tuple) else (0.0, data_range)
    numbers = [end for end in ends if isinstance(end, int | float | np.number) and math.isfinite(end)]
    lo, hi = numbers if len(ends) == len(numbers) == 2 else (0.0, 0.0)
    if not lo < hi:
        raise ValueError(f"data_range must be a positive number or (lo, hi), got {data_range!r}")
    first, last = target
    values = values if values.is_floating_point() else values.double()
    return (values - lo) * ((last - first) / (hi - lo)) + first
