"""Values of frames mapped to [0, 255] over a range, and truncated to 8 bit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lsim.compiled import compiled
from lsim.doubles import rest_of_normalised
from lsim.frames import Frames, unmasked
from lsim.scope import representable


def normalise(
    frames: Frames,
    lo: np.ndarray,
    hi: np.ndarray,
    *,
    floor: bool,
    complete: np.ndarray | None,
    double: bool = False,
) -> Frames:
    """Compute 255·((frames − lo)/(hi − lo)) per channel; 0 where lo equals hi.

    Like the published code, it computes in single precision for float32, else in double precision:
    truncating to 8 bit shows the difference.

    Parameters
    ----------
    frames : ndarray or Tensor of shape (n, y, x, channel)
    lo, hi : ndarray of shape (channel,), float64
    floor : bool
        Round down to whole numbers.
    complete : ndarray of shape (n,), bool, or None
        Frames to normalise; others become NaN. None: all, with NaN for missing values.
    double : bool, default False
        Keep the result in double precision; ``frames`` are double, too.

    Returns
    -------
    ndarray or Tensor of shape (n, y, x, channel), float32, or float64 if ``double``
        New memory. The published code, too, rounds to single precision before it truncates to 8 bit.

    Examples
    --------
    >>> frames = np.array([[[[1.0], [3.0]]]])
    >>> normalise(frames, np.array([1.0]), np.array([3.0]), floor=False, complete=None).ravel()
    array([  0., 255.], dtype=float32)
    """
    frames = unmasked(frames)
    single = frames.dtype == (torch.float32 if isinstance(frames, Tensor) else np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = lo.astype(np.float32), hi.astype(np.float32)
        spread = high - low
    if not single or not _comfortable(spread) or not representable(lo, hi):
        # Also where the range over- or underflows single precision.
        low, spread = lo, hi - lo
    constant = spread == 0
    divisor = np.where(constant, 1, spread).astype(spread.dtype)
    usable = np.ones(len(frames), bool) if complete is None else complete
    if isinstance(frames, Tensor):
        out = _normalise_tensor(frames, low, divisor, constant, floor)
        out = out.to(torch.float64 if double else torch.float32)
        if not usable.all():
            out[torch.from_numpy(~usable).to(out.device)] = torch.nan
        return out
    n, y, x, channels = frames.shape
    low, divisor, constant = (np.tile(values, x) for values in (low, divisor, constant))
    rows = np.empty((n, y, x * channels), np.float64 if double else np.float32)
    _normalise_rows(
        frames.reshape(rows.shape), low, divisor, constant, spread.dtype.type(255), floor, usable, rows
    )
    return rows.reshape(frames.shape)


def _normalise_tensor(
    frames: Tensor, lo: np.ndarray, divisor: np.ndarray, constant: np.ndarray, floor: bool
) -> Tensor:
    low, scale, flat = (torch.tensor(values, device=frames.device) for values in (lo, divisor, constant))
    exact = frames.to(low.dtype)
    out = torch.where(flat, exact - exact, (exact - low).div_(scale).mul_(255))  # NaN stays NaN in both
    return out.floor_() if floor else out


# A check for divisions by zero would keep loops from being vectorised: five times slower.
@compiled(error_model="numpy")
def _normalise_rows(frames, lo, divisor, constant, full, floor, usable, out):  # type: ignore[no-untyped-def]
    for f in range(out.shape[0]):
        for r in range(out.shape[1]):
            row = frames[f, r]
            target = out[f, r]
            if not usable[f]:
                target[:] = np.nan
                continue
            for k in range(target.shape[0]):
                value = (row[k] - lo[k]) / divisor[k] * full
                value = row[k] - row[k] if constant[k] else value  # NaN stays NaN
                target[k] = np.floor(value) if floor else value


def find_rest(values: Frames, frames: Frames, lo: np.ndarray, hi: np.ndarray) -> Frames:
    """Compute what double precision has rounded off normalised values; 0 in constant channels.

    Also 0 for missing values, and for those beyond 1e300, whose products overflow.
    """
    constant = ~(lo < hi)
    if constant.all():
        return values * 0
    low, high = np.where(constant, 0, lo), np.where(constant, 1, hi)
    if isinstance(frames, Tensor):
        smallest, largest = (torch.from_numpy(part).to(frames.device) for part in (low, high))
        rest = rest_of_normalised(values, frames, smallest, largest, 255.0)
        return rest.masked_fill(torch.from_numpy(constant).to(frames.device) | ~rest.isfinite(), 0)
    with np.errstate(invalid="ignore", over="ignore"):
        rest = rest_of_normalised(values, frames, low, high, 255.0)
    return np.where(constant | ~np.isfinite(rest), 0, rest)


def truncate_to_8bit(frames: np.ndarray) -> np.ndarray:
    """Round values down to whole numbers in 0 … 255, as the published evaluation does, and clip others.

    Returns
    -------
    ndarray of the same shape, float32
        NaN stays NaN.

    Examples
    --------
    >>> truncate_to_8bit(np.array([-3.0, 1.9, 300.0]))
    array([  0.,   1., 255.], dtype=float32)
    """
    # In one pass and one thread: this is half the time of the metrics of pixel differences, and waiting
    # for a second thread on a busy machine is more than the other half.
    frames = unmasked(frames)
    out = np.empty(frames.shape, np.float32)
    floats = np.float64 if frames.dtype == np.float64 else np.float32
    _floor_within(np.ascontiguousarray(frames, floats).reshape(-1), out.reshape(-1))
    return out


@compiled()
def _floor_within(values, out):  # type: ignore[no-untyped-def]
    for k in range(values.shape[0]):
        value = values[k]
        value = np.float32(0) if value < 0 else value
        value = np.float32(255) if value > 255 else value
        out[k] = np.floor(value)


def _comfortable(spread: np.ndarray) -> bool:
    """Tell whether single precision can divide by a range without overflow or underflow."""
    nonzero = spread[spread != 0]
    return bool(np.isfinite(spread).all() and (nonzero > 1e-30).all() and (nonzero < 1e37).all())
