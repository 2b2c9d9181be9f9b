"""From a field to what a metric takes: channels, size, and the range [0, 255].

The published evaluation of LSiM resizes frames with :func:`scipy.ndimage.zoom`, then maps minimum and
maximum of each channel, taken jointly over a *scope* of frames, to [0, 255]. This module does the same
for whole stacks at once: order 0 by indexing, higher orders by one small matrix per axis.
"""

from __future__ import annotations

import functools
import operator
import warnings
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numba
import numpy as np
import scipy.ndimage
from numpy.typing import ArrayLike

Compat: TypeAlias = Literal["default", "published"]
Scope: TypeAlias = str | tuple[Any, Any]
"""Over which frames minimum and maximum are taken: ``"pair"``, ``"batch"``, ``"sequence"``, ``"dataset"``,
or a fixed ``(lo, hi)``, each a number or one number per channel."""

SCOPES = ("pair", "batch", "sequence", "dataset")
ORDERS = (0, 1, 2, 3, 4, 5)


class FramesError(ValueError):
    """Frames that a metric cannot take: their shape, channels or size, whatever their values are."""


@dataclass(frozen=True)
class Preprocessing:
    """What a metric wants done to frames; equal ones are done once.

    Attributes
    ----------
    size : int or None
        Both frame axes are resized to it; None keeps the frame's own size.
    order : int
        Order of the spline used to resize, 0 (nearest) to 5.
    compat : {"default", "published"}
        ``"published"`` keeps the rim of zeros that scipy writes at some sizes (see :func:`resize`), and
        whole numbers where the input is integers of which some, but not all channels are constant.
    mask : bool
        Keep single pixels that are missing (NaN or infinite) as NaN, out of minimum and maximum, instead
        of giving up their frame. For orders 0 and 1.
    """

    size: int | None = 224
    order: int = 0
    compat: Compat = "default"
    mask: bool = False

    def __post_init__(self) -> None:
        # Equal settings have to hash alike: NumPy's integers become Python's, and True is not 1.
        if self.size is not None:
            object.__setattr__(self, "size", _integer(self.size, "size must be a positive integer or None"))
            if self.size < 1:
                raise ValueError(f"size must be a positive integer or None, got {self.size!r}")
        object.__setattr__(self, "order", _integer(self.order, f"order must be one of {ORDERS}"))
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, got {self.order!r}")
        if self.mask and self.order > 1:
            raise ValueError(
                f"a mask goes with order 0 or 1, got {self.order}: splines spread a missing pixel everywhere"
            )
        if self.compat not in ("default", "published"):
            raise ValueError(f"compat must be 'default' or 'published', got {self.compat!r}")


def _integer(value: Any, message: str) -> int:
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise ValueError(f"{message}, got {value!r}")
    return operator.index(value)


def preprocess(
    frames: ArrayLike,
    size: int | None = 224,
    order: int = 0,
    scope: Scope = "sequence",
    compat: Compat = "default",
) -> np.ndarray:
    """Resize frames and map them to three channels in [0, 255], as the metrics take them.

    Parameters
    ----------
    frames : array_like
        (y, x) one frame; (n, y, x) or (n, y, x, channel) a sequence; (sequence, frame, y, x, channel)
        a data set. Any integer, half, single or double precision; 1, 3 or 4 channels: one is repeated
        to three, of four the last (alpha) is dropped.
    size : int or None, default 224
        Both axes are resized to it; None keeps the size.
    order : int, default 0
        Spline order, as :func:`scipy.ndimage.zoom` takes it.
    scope : str or (lo, hi), default "sequence"
        Over which frames minimum and maximum are taken. ``"sequence"``: over all frames of each
        sequence; ``"batch"`` and ``"dataset"``: over everything passed; ``"pair"``: as ``"batch"``,
        for exactly two frames; ``(lo, hi)``: fixed, values outside map outside [0, 255].
    compat : {"default", "published"}, default "default"
        ``"published"`` reproduces the published evaluation to its rim of zeros, see :func:`resize`.

    Returns
    -------
    ndarray of shape (n, size, size, 3), or (sequence, frame, size, size, 3)
        float32. A channel that is constant over the scope is 0. A frame with NaN or infinity is all NaN
        and is not counted in the scope.

    Raises
    ------
    ValueError
        When shape, dtype, channels, scope, size or order are not as described.

    References
    ----------
    Kohl, Um, Thuerey: Learning Similarity Metrics for Numerical Simulations, ICML 2020, section 4.
    """
    settings = Preprocessing(size, order, compat)
    array = np.asarray(frames)
    if array.ndim == 5 and array.size:
        if isinstance(scope, str) and scope == "sequence":
            return np.stack([_repeated(apply(settings, sequence, scope)) for sequence in array])
        flat = _repeated(apply(settings, array.reshape(-1, *array.shape[2:]), scope))
        return flat.reshape(*array.shape[:2], *flat.shape[1:])
    return _repeated(apply(settings, as_frames(array), scope))


def apply(settings: Preprocessing, frames: np.ndarray, scope: Scope) -> np.ndarray:
    """:func:`preprocess` for one stack over one scope, with the settings bundled; a channel stays one.

    Parameters
    ----------
    settings : Preprocessing
    frames : ndarray of shape (n, y, x, channel)
    scope : str or (lo, hi)

    Returns
    -------
    ndarray of shape (n, y', x', 1 or 3), float32
    """
    frames = drop_alpha(frames)
    if not isinstance(scope, str | tuple):
        raise ValueError(f"scope must be one of {SCOPES} or a tuple (lo, hi), got {scope!r}")
    if scope == "pair" and len(frames) != 2:
        raise ValueError(
            f"scope 'pair' is taken over two frames, got {len(frames)}; use 'sequence', 'batch' or (lo, hi)"
        )
    if settings.mask:
        frames = _missing_as_nan(frames)
    finite = finite_frames(frames)
    if settings.size is not None:
        frames = resize(frames, settings.size, settings.order, zero_rim=settings.compat == "published")
    if not settings.mask and not finite.all():
        # Order 0 may step over the very pixel that is missing.
        frames = np.where(finite[:, None, None, None], frames, np.nan)
    whole_numbers = frames.dtype.kind in "iu"
    frames = _working_precision(frames)
    lo, hi = (
        _fixed_range(scope, frames.shape[-1])
        if isinstance(scope, tuple)
        else value_range(frames, scope, masked=settings.mask)
    )
    result = normalise(frames, lo, hi, masked=settings.mask)
    if settings.compat == "published" and whole_numbers and (lo == hi).any() and not (lo == hi).all():
        # Where some channels are constant, the published code writes each channel back into the array of
        # integers that it came from.
        np.floor(result, out=result)
    # The published code, too, rounds to single precision before it truncates to 8 bit.
    return result.astype(np.float32, copy=False)


def _repeated(frames: np.ndarray) -> np.ndarray:
    """One channel as three equal ones."""
    return np.repeat(frames, 3, axis=-1) if frames.shape[-1] == 1 else frames


def _missing_as_nan(frames: np.ndarray) -> np.ndarray:
    """Infinite values are missing, too; a pixel is missing in all channels or in none."""
    if frames.dtype.kind != "f":
        return frames
    missing = ~np.isfinite(frames).all(axis=-1, keepdims=True)
    return np.where(missing, np.array(np.nan, frames.dtype), frames) if missing.any() else frames


def as_frames(array: ArrayLike, what: str = "frames") -> np.ndarray:
    """Give an array the shape (n, y, x, channel).

    (y, x) becomes one frame of one channel, (n, y, x) one channel each. A three-dimensional array whose
    last axis could be channels is refused rather than guessed at.
    """
    array = np.asarray(array)
    if array.size == 0:
        raise FramesError(f"{what}: no frames, or empty ones: shape {array.shape}")
    if array.dtype.kind not in "biuf":
        raise FramesError(f"{what}: expected an integer or floating dtype, found {array.dtype}")
    if array.ndim == 2:
        return array[None, ..., None]
    if array.ndim == 3:
        if array.shape[-1] <= 4:
            raise FramesError(
                f"{what}: shape {array.shape} is ambiguous: for one frame with channels pass array[None], "
                "for a stack of frames without channels array[..., None]"
            )
        return array[..., None]
    if array.ndim == 4:
        return array
    raise FramesError(f"{what}: expected (y, x), (n, y, x) or (n, y, x, channel), found shape {array.shape}")


def drop_alpha(frames: np.ndarray) -> np.ndarray:
    """Check the channels of (n, y, x, channel) and drop the fourth.

    Raises
    ------
    ValueError
        For 2 or more than 4 channels, for which no metric here is defined, and for empty frames.
    """
    if 0 in frames.shape:
        raise FramesError(f"frames are empty: shape {frames.shape}")
    channels = frames.shape[-1]
    if channels in (1, 3):
        return frames
    if channels == 4:
        return frames[..., :3]
    raise FramesError(
        f"frames have {channels} channels; metrics take 1, 3 or 4 (alpha is dropped). Evaluate the channels "
        "as separate fields: frames[..., [i]] for each channel i, or in a catalog "
        "'fields: {velocity-x: {channel: 0}, velocity-y: {channel: 1}, …}'"
    )


def resize(frames: np.ndarray, size: int, order: int = 0, *, zero_rim: bool = False) -> np.ndarray:
    """Resize both axes of (n, y, x, channel) to ``size`` as :func:`scipy.ndimage.zoom` does.

    Sample i of m lies at i·((n−1)/(m−1)) of an axis of length n; order 0 takes the nearest sample,
    halves rounded up. Integer dtypes are kept: rounded half away from zero and clipped. Where rounding
    puts the last position beyond n−1 (512 → 224 for one), scipy writes zeros into the last row or
    column; ``zero_rim=True`` reproduces that, the default takes the last sample, as is meant.

    Parameters
    ----------
    frames : ndarray of shape (n, y, x, channel)
    size : int
    order : int, default 0
    zero_rim : bool, default False

    Returns
    -------
    ndarray of shape (n, size, size, channel), dtype of ``frames`` (half becomes single precision)
    """
    if frames.dtype == np.float16:
        frames = frames.astype(np.float32)
    if frames.dtype == np.bool_:
        frames = frames.astype(np.uint8)
    if frames.shape[1:3] == (size, size):
        return frames
    if order == 0:
        rows, rows_lost = _nearest(frames.shape[1], size)
        columns, columns_lost = _nearest(frames.shape[2], size)
        out = frames.take(rows, axis=1).take(columns, axis=2)
        if zero_rim:
            out[:, rows_lost] = 0
            out[:, :, columns_lost] = 0
        return out
    # NaN times a weight of zero is NaN: a frame with one NaN becomes all NaN, which it would anyway.
    with np.errstate(invalid="ignore"):
        exact = _bilinear(frames, size, zero_rim) if order == 1 else _spline(frames, size, order, zero_rim)
    if order > 1 or not zero_rim:
        # A constant stays that constant: rounding would pass for a range, and be stretched to [0, 255], as
        # it is by the published code. At order 1 that can be reproduced.
        first = frames[:, :1, :1]
        constant = (frames == first).all(axis=(1, 2), keepdims=True)
        exact = np.where(constant & (exact != 0), first, exact) if constant.any() else exact
    if frames.dtype.kind == "f":
        return exact.astype(frames.dtype)
    limits = np.iinfo(frames.dtype)
    rounded = np.trunc(exact + np.copysign(0.5, exact))
    return np.clip(rounded, limits.min, limits.max).astype(frames.dtype)


def _bilinear(frames: np.ndarray, size: int, zero_rim: bool) -> np.ndarray:
    """Order 1, term by term in scipy's own order: equal to the last bit. (n, size, size, channel) float64."""

    def along(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        positions = _positions(n, size)
        beyond = positions > n - 1
        positions = np.minimum(positions, n - 1)
        first = np.minimum(np.floor(positions).astype(np.intp), n - 1)
        weight = 1.0 - (positions - first)
        return first, np.minimum(first + 1, n - 1), weight, 1.0 - weight, beyond

    y0, y1, above, below, beyond_y = along(frames.shape[1])
    x0, x1, left, right, beyond_x = along(frames.shape[2])
    exact = frames.astype(np.float64)
    rows = ((exact.take(y0, axis=1), above), (exact.take(y1, axis=1), below))
    columns = ((x0, left), (x1, right))
    terms = (
        values.take(x, axis=2) * weight_y[:, None, None] * weight_x[:, None]
        for values, weight_y in rows
        for x, weight_x in columns
    )
    out = next(terms)
    for term in terms:
        out += term
    if zero_rim:
        out[:, beyond_y] = 0
        out[:, :, beyond_x] = 0
    return out


def _spline(frames: np.ndarray, size: int, order: int, zero_rim: bool) -> np.ndarray:
    """Orders 2 to 5 by one matrix per axis: (n, size, size, channel) float64."""
    along_y = _spline_matrix(frames.shape[1], size, order, zero_rim)
    along_x = _spline_matrix(frames.shape[2], size, order, zero_rim)
    half = np.einsum("yY,nYXc->nyXc", along_y, frames.astype(np.float64), optimize=True)
    exact: np.ndarray = np.einsum("xX,nyXc->nyxc", along_x, half, optimize=True)
    return exact


def value_range(
    frames: np.ndarray, where: str = "sequence", *, masked: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Minimum and maximum per channel over all frames that are finite throughout.

    Parameters
    ----------
    frames : ndarray of shape (n, y, x, channel)
    where : str
        The scope's name, checked to be a known one.
    masked : bool, default False
        Over all values but NaN instead.

    Returns
    -------
    lo, hi : ndarray of shape (channel,), float64
        NaN where no frame is finite.
    """
    if not isinstance(where, str) or where not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES} or (lo, hi), got {where!r}")
    if masked:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All-NaN")
            lo, hi = (extreme(frames, axis=(0, 1, 2)) for extreme in (np.nanmin, np.nanmax))
        return lo.astype(np.float64), hi.astype(np.float64)
    finite = finite_frames(frames)
    if not finite.any():
        return np.full(frames.shape[-1], np.nan), np.full(frames.shape[-1], np.nan)
    chosen = frames if finite.all() else frames[finite]
    rows = _as_rows(chosen)
    lo, hi = (extreme(axis=0).reshape(-1, frames.shape[-1]) for extreme in (rows.min, rows.max))
    return lo.min(axis=0).astype(np.float64), hi.max(axis=0).astype(np.float64)


def finite_frames(frames: np.ndarray) -> np.ndarray:
    """Which frames of (n, …) hold neither NaN nor infinity: bool (n,)."""
    if frames.dtype.kind != "f":
        return np.ones(len(frames), dtype=bool)
    with np.errstate(invalid="ignore", over="ignore"):
        # A sum is finite only if all its terms are; the exact test is needed only where it overflowed.
        sums = np.isfinite(frames.reshape(len(frames), -1).sum(axis=1))
    for index in np.flatnonzero(~sums):
        sums[index] = np.isfinite(frames[index]).all()
    return sums


def normalise(frames: np.ndarray, lo: np.ndarray, hi: np.ndarray, *, masked: bool = False) -> np.ndarray:
    """255·((frames − lo)/(hi − lo)) per channel, in the precision of ``frames``; 0 where lo equals hi.

    Parameters
    ----------
    frames : ndarray of shape (n, y, x, channel), float32 or float64
    lo, hi : ndarray of shape (channel,), float64

    Returns
    -------
    ndarray of shape (n, y, x, channel), dtype of ``frames``
        Frames that are not finite throughout are all NaN; ``masked`` ones, only where they are NaN.
    """
    dtype = frames.dtype
    finite = finite_frames(frames)
    with np.errstate(over="ignore", invalid="ignore"):
        spread = hi.astype(dtype) - lo.astype(dtype)
    if dtype == np.float32 and not _comfortable(spread):
        # The range over- or underflows single precision.
        return normalise(frames.astype(np.float64), lo, hi, masked=masked).astype(np.float32)
    constant = spread == 0
    x = frames.shape[2]
    with np.errstate(over="ignore", invalid="ignore"):
        out = _as_rows(frames) - np.tile(lo.astype(dtype), x)
        out /= np.tile(np.where(constant, dtype.type(1), spread), x)
        out *= dtype.type(255)
    out = out.reshape(frames.shape)
    if constant.any():
        out[..., constant] = 0
    if masked:
        out[np.isnan(frames)] = np.nan
    elif not finite.all():
        out[~finite] = np.nan
    return out


def truncate_to_8bit(frames: np.ndarray) -> np.ndarray:
    """Whole numbers in 0 … 255, rounded down as the published evaluation does; outside is clipped.

    Returns
    -------
    ndarray of the same shape, float32
        NaN stays NaN.
    """
    # In one pass and one thread: this is half the time of the metrics of pixel differences, and waiting
    # for a second thread on a busy machine is more than the other half.
    out = np.empty(frames.shape, np.float32)
    _floor_within(np.ascontiguousarray(frames, np.float32).reshape(-1), out.reshape(-1))
    return out


@numba.njit(nogil=True, cache=True)
def _floor_within(values, out):  # type: ignore[no-untyped-def]
    for k in range(values.shape[0]):
        value = values[k]
        value = np.float32(0) if value < 0 else value
        value = np.float32(255) if value > 255 else value
        out[k] = np.floor(value)


def _working_precision(frames: np.ndarray) -> np.ndarray:
    if frames.dtype == np.float32:
        return frames
    # Half precision, and short integers, are exact in single; but the published code divides integers
    # in double precision, and truncating to 8 bit shows the difference.
    return frames.astype(np.float32 if frames.dtype == np.float16 else np.float64)


def _fixed_range(scope: tuple[Any, Any], channels: int) -> tuple[np.ndarray, np.ndarray]:
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


def _as_rows(frames: np.ndarray) -> np.ndarray:
    """(n, y, x, channel) → (n·y, x·channel): NumPy walks long rows ten times faster than short ones."""
    return frames.reshape(-1, frames.shape[2] * frames.shape[3])


def _comfortable(spread: np.ndarray) -> bool:
    nonzero = spread[spread != 0]
    return bool(np.isfinite(spread).all() and (nonzero > 1e-30).all() and (nonzero < 1e37).all())


def _positions(n: int, m: int) -> np.ndarray:
    """Where scipy's zoom samples an axis of length ``n``, in double precision and its rounding."""
    step = (n - 1) / (m - 1) if m > 1 else 1.0
    return np.arange(m) * step


@functools.lru_cache(maxsize=64)
def _nearest(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Nearest sample for each of ``m`` positions, and which positions scipy takes to be outside."""
    positions = _positions(n, m)
    return np.minimum(np.floor(positions + 0.5).astype(np.intp), n - 1), positions > n - 1


@functools.lru_cache(maxsize=64)
def _spline_matrix(n: int, m: int, order: int, zero_rim: bool) -> np.ndarray:
    """The linear map of :func:`scipy.ndimage.zoom` along one axis: (m, n), float64."""
    if n == m:
        return np.eye(n)
    matrix = scipy.ndimage.zoom(np.eye(n), (m / n, 1), order=order)
    beyond = _positions(n, m) > n - 1
    matrix[beyond] = 0
    if not zero_rim:
        # A spline interpolates: at the last sample it is the last sample.
        matrix[beyond, n - 1] = 1
    return matrix
