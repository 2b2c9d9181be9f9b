"""The range that frames are normalised over: minimum and maximum per channel, over a scope of frames."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from lsim.compiled import compiled
from lsim.frames import Frames, FramesError, integer_limits, loadable, unmasked

Scope: TypeAlias = str | tuple[Any, Any]
"""Frames over which minimum and maximum are taken: ``"pair"``, ``"batch"``, ``"sequence"``, ``"dataset"``,
or a fixed ``(lo, hi)``, each a number or one number per channel. ``"none"`` is the fixed range (0, 1) in
double precision: metrics, which measure on [0, 1], then see values in their own units."""

SCOPES = ("pair", "batch", "sequence", "dataset", "none")


def value_range(
    frames: np.ndarray, scope: str = "sequence", *, masked: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Find minimum and maximum per channel over all frames without NaN and infinity.

    Parameters
    ----------
    frames : ndarray of shape (n, y, x, channel)
    scope : str
        Name of the scope, one of :data:`SCOPES`.
    masked : bool, default False
        Over all values but NaN instead.

    Returns
    -------
    lo, hi : ndarray of shape (channel,), float64
        NaN where no frame is finite.

    Examples
    --------
    >>> value_range(np.array([[[[1.0], [5.0]]], [[[3.0], [np.nan]]]]))
    (array([1.]), array([5.]))
    """
    array = loadable(unmasked(frames))
    return range_over(array, scope, None if masked else find_extremes(array).finite)


def range_over(frames: Frames, scope: str, complete: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Find the :func:`value_range` of the ``complete`` frames (n,), or with None of all values but NaN."""
    if not isinstance(scope, str) or scope not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES} or (lo, hi), got {scope!r}")
    extremes = find_extremes(frames)
    selection = slice(None) if complete is None else complete
    lo = extremes.lo[selection].min(axis=0, initial=np.inf)
    hi = extremes.hi[selection].max(axis=0, initial=-np.inf)
    return np.where(lo <= hi, lo, np.nan), np.where(lo <= hi, hi, np.nan)


def fixed_range(scope: tuple[Any, Any], channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Read a fixed scope (lo, hi): one value per channel, float64, on either side."""
    if len(scope) != 2:
        raise ValueError(f"a fixed scope is a pair (lo, hi), got {scope!r}")
    try:
        lo, hi = (np.asarray(bound, dtype=np.float64).reshape(-1) for bound in scope)
    except (TypeError, ValueError) as error:
        raise ValueError(f"fixed scope {scope!r}: expected numbers (lo, hi)") from error
    if {lo.size, hi.size} - {1, channels}:
        raise FramesError(f"fixed scope {scope!r}: expected one value or {channels}, one per channel")
    lo, hi = np.broadcast_to(lo, channels), np.broadcast_to(hi, channels)
    if not (np.isfinite(lo).all() and np.isfinite(hi).all() and (lo <= hi).all()):
        raise ValueError(f"fixed scope {scope!r}: expected finite lo <= hi")
    return lo, hi


def scope_identity(scope: Scope) -> Any:
    """Name a scope in a fingerprint, as JSON takes it.

    Bounds that single precision cannot hold used to be rounded. Results by exact ones have another name, so
    that the two are never mistaken.

    Examples
    --------
    >>> scope_identity((0.0, 0.5)), scope_identity((0.0, 0.1))
    ((0.0, 0.5), {'bounds': 'exact', 'range': (0.0, 0.1)})
    """
    if not isinstance(scope, tuple) or representable(*(np.asarray(b, np.float64) for b in scope)):
        return scope
    return {"bounds": "exact", "range": scope}


def representable(*bounds: np.ndarray) -> bool:
    """Tell whether single precision holds these bounds exactly; NaN counts as held."""
    with np.errstate(over="ignore"):
        return all(np.array_equal(b.astype(np.float32), b, equal_nan=True) for b in bounds)


class Extremes(NamedTuple):
    """Minimum and maximum of each frame but for NaN.

    Attributes
    ----------
    lo, hi : ndarray of shape (n, channel), float64
        Without any value, infinity and −infinity.
    finite : ndarray of shape (n,), bool
        True where all values are finite.
    """

    lo: np.ndarray
    hi: np.ndarray
    finite: np.ndarray


def find_extremes(frames: Frames) -> Extremes:
    """Find the extremes of frames as :func:`~lsim.frames.loadable` gives them."""
    n, y, x, channels = frames.shape
    if isinstance(frames, np.ndarray):
        lowest, highest = np.array(integer_limits(frames) or (-np.inf, np.inf), frames.dtype)
        return Extremes(*_extremes_of_rows(frames.reshape(n, y, x * channels), channels, lowest, highest))
    pixels = frames.flatten(1, 2)
    if frames.dtype.is_floating_point:
        missing = pixels.isnan()
        lo, hi = (
            pixels.masked_fill(missing, torch.inf).amin(1),
            pixels.masked_fill(missing, -torch.inf).amax(1),
        )
        finite = pixels.isfinite().all(2).all(1)
    else:
        lo, hi = pixels.amin(1), pixels.amax(1)
        finite = torch.ones(n, dtype=torch.bool)
    return Extremes(lo.double().cpu().numpy(), hi.double().cpu().numpy(), finite.cpu().numpy())


@compiled()
def _extremes_of_rows(frames, channels, lowest, highest):  # type: ignore[no-untyped-def]
    n, y, wide = frames.shape
    lo = np.empty((n, channels))
    hi = np.empty((n, channels))
    finite = np.ones(n, np.bool_)
    # Whole rows: channel by channel there would be nothing to vectorise.
    low = np.empty(wide, frames.dtype)
    high = np.empty(wide, frames.dtype)
    not_finite = np.empty(wide, frames.dtype)
    for f in range(n):
        low[:] = highest
        high[:] = lowest
        not_finite[:] = 0
        for r in range(y):
            row = frames[f, r]
            for k in range(wide):
                value = row[k]
                low[k] = value if value < low[k] else low[k]
                high[k] = value if value > high[k] else high[k]
                not_finite[k] += value - value
        for c in range(channels):
            lo[f, c] = low[c::channels].min()
            hi[f, c] = high[c::channels].max()
        finite[f] = (not_finite == 0).all()
    return lo, hi, finite
