"""Frames that floating point holds exactly: integers beyond 2⁵³ shifted, extreme floats scaled.

Differences are what counts, so that a shift changes nothing, and neither does a scale by a power of two.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lsim.frames import WHOLE_IN_DOUBLE, FramesError, integer_limits, loadable
from lsim.preprocessing_settings import Preprocessing
from lsim.resampling import count_beyond
from lsim.scope import Scope, find_extremes


class ExactFrames(NamedTuple):
    """Frames as (values − offset) · factor, without any rounding.

    Attributes
    ----------
    frames : ndarray or Tensor
    limits : (float, float) or None
        Those of the integers that the frames came from, see :func:`~lsim.frames.integer_limits`.
    offset : int
    factor : float
    """

    frames: Any
    limits: tuple[float, float] | None
    offset: int = 0
    factor: float = 1.0

    def place(self, bound: Any) -> float:
        """Shift and scale a bound like the frames, rounded once."""
        exact = bound if isinstance(bound, int) else float(bound)
        return float((Fraction(exact) - self.offset) * Fraction(self.factor))


def hold_exactly(settings: Preprocessing, frames: Any) -> ExactFrames:
    """Shift integers beyond 2⁵³ and scale floats near the ends of their exponents; leave all others."""
    limits = integer_limits(frames)
    array = isinstance(frames, np.ndarray)
    if limits is not None:
        wide = frames.dtype.itemsize == 8 if array else frames.dtype in (torch.int64, torch.uint64)
        return _shift(settings, frames, limits) if wide else ExactFrames(frames, limits)
    double = frames.dtype == (np.float64 if array else torch.float64)
    if not double and settings.order < 2:
        return ExactFrames(frames, limits)  # single precision is normalised in double where it has to be
    largest = _largest_magnitude(frames)
    if largest > (1e290 if double else 1e37):
        # For rests, doubles are multiplied by 2^27, besides 255 and their range (:mod:`lsim.doubles`).
        factor = 2.0**-64 if double else 2.0**-16
    elif double and settings.order > 0 and 0 < largest < 1e-290:
        factor = 2.0**200
    else:
        return ExactFrames(frames, limits)
    return ExactFrames(frames * frames.dtype.type(factor) if array else frames * factor, limits, 0, factor)


def _largest_magnitude(frames: Any) -> float:
    """Find the largest finite magnitude; 0 where there is none."""
    if isinstance(frames, Tensor):
        finite = frames[frames.isfinite()]
        return finite.abs().max().item() if len(finite) else 0.0
    extremes = find_extremes(loadable(frames))
    if extremes.finite.all():
        return float(max(np.abs(extremes.lo).max(), np.abs(extremes.hi).max()))
    finite = frames[np.isfinite(frames)]
    return float(np.abs(finite).max(initial=0))


def _shift(settings: Preprocessing, frames: Any, limits: tuple[float, float]) -> ExactFrames:
    """Subtract the smallest of 64-bit integers where some are beyond 2⁵³."""
    lowest, highest = _integer_extremes(frames)
    if max(-lowest, highest) <= WHOLE_IN_DOUBLE:
        return ExactFrames(frames, limits)
    published = settings.compat == "published" and settings.size is not None
    if published and any(count_beyond(n, settings.size or n) for n in frames.shape[1:3]):
        return ExactFrames(frames, limits)  # the rim of zeros then sets the range
    shifted: Any
    if isinstance(frames, np.ndarray):
        # Modulo 2⁶⁴, which the differences don't exceed.
        shifted = (frames.astype(np.uint64) - np.uint64(lowest % 2**64)).astype(np.float64)
    else:
        smallest = torch.tensor([lowest], dtype=frames.dtype, device=frames.device)
        shifted = _signed(frames) - _signed(smallest)
        shifted = torch.where(shifted < 0, shifted.double() + 2.0**64, shifted.double())
    return ExactFrames(shifted, (float(int(limits[0]) - lowest), float(int(limits[1]) - lowest)), lowest)


def _integer_extremes(frames: Any) -> tuple[int, int]:
    """Find the smallest and largest of 64-bit integers, as Python's."""
    if isinstance(frames, np.ndarray):
        return int(frames.min()), int(frames.max())
    shift = 2**63 if frames.dtype == torch.uint64 else 0
    signed = _signed(frames)
    return int(signed.min().item()) + shift, int(signed.max().item()) + shift


def _signed(frames: Tensor) -> Tensor:
    """Map 64-bit integers to int64 in the same order, and with the same differences modulo 2⁶⁴."""
    return frames.view(torch.int64) ^ torch.iinfo(torch.int64).min if frames.dtype == torch.uint64 else frames


def move_scope(scope: Scope, frames: ExactFrames) -> Scope:
    """Shift and scale a fixed range like the frames, rounded once."""
    if scope == "none" and frames.offset:
        raise FramesError(
            "64-bit integers beyond 2^53 can't be compared as they are, since double precision rounds them: "
            "subtract an offset, or choose another scope than 'none'"
        )
    if isinstance(scope, str) or len(scope) != 2 or (frames.offset == 0 and frames.factor == 1):
        return (0.0, frames.factor) if scope == "none" and frames.factor != 1 else scope
    try:
        lo, hi = ([frames.place(b) for b in np.asarray(bound, object).reshape(-1)] for bound in scope)
    except (TypeError, ValueError, OverflowError):
        return scope  # no numbers: fixed_range reports it
    return lo, hi
