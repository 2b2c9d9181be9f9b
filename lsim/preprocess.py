"""From a field to what a metric takes: channels, size, and the range [0, 255].

The published evaluation of LSiM resizes frames with :func:`scipy.ndimage.zoom`, then maps minimum and
maximum of each channel, taken jointly over a *scope* of frames, to [0, 255]. This module does the same
for whole stacks, each frame once. An array goes through compiled kernels in one thread, a tensor through
plain torch on the device where it is; the rules are the same lines for both.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, NamedTuple, TypeAlias

import numba
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lsim.doubles import rest_of_normalised
from lsim.resampling import Frames, beyond, resample
from lsim.rounding import FrameRounding, bound_of_frames, half_ulp_of

Compat: TypeAlias = Literal["default", "published"]
Floats: TypeAlias = Literal["single", "double"]
Scope: TypeAlias = str | tuple[Any, Any]
"""Over which frames minimum and maximum are taken: ``"pair"``, ``"batch"``, ``"sequence"``, ``"dataset"``,
or a fixed ``(lo, hi)``, each a number or one number per channel. ``"none"`` is the fixed range (0, 1) in
double precision: metrics, which measure on [0, 1], then see the values as they are, in their own units."""

SCOPES = ("pair", "batch", "sequence", "dataset", "none")
ORDERS = (0, 1, 2, 3, 4, 5)

WHOLE_IN_DOUBLE = 2**53
"""Up to which double precision holds every integer."""


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
    precision : {"single", "double"}
        Floating point of the prepared frames, and of all that is computed on them. In ``"double"`` frames are
        resized and normalised in double precision too, whatever dtype they come in.
    """

    size: int | None = 224
    order: int = 0
    compat: Compat = "default"
    mask: bool = False
    precision: Floats = "single"

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
        if self.precision not in ("single", "double"):
            raise ValueError(f"precision must be 'single' or 'double', got {self.precision!r}")


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
        for exactly two frames; ``(lo, hi)``: fixed, values outside map outside [0, 255]; ``"none"``: 255
        times the values as they are, in double precision.
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
    array = as_array(frames)
    if array.ndim == 5 and array.size:
        if isinstance(scope, str) and scope == "sequence":
            return np.stack([_repeated(apply(settings, sequence, scope)) for sequence in array])
        flat = _repeated(apply(settings, array.reshape(-1, *array.shape[2:]), scope))
        return flat.reshape(*array.shape[:2], *flat.shape[1:])
    return _repeated(apply(settings, as_frames(array), scope))


def apply(settings: Preprocessing, frames: Frames, scope: Scope) -> Frames:
    """:func:`preprocess` for one stack over one scope, with the settings bundled; a channel stays one.

    Parameters
    ----------
    settings : Preprocessing
    frames : ndarray or Tensor of shape (n, y, x, channel)
        In the precision that they come in; a tensor on any device that has double precision.
    scope : str or (lo, hi)

    Returns
    -------
    ndarray or Tensor of shape (n, y', x', 1 or 3), float32, or float64 in double precision
        New memory, on the device of ``frames``. Arrays and tensors give the same within 1e-6 of 255, at
        orders 0 and 1 the same bits where divisions are IEEE's.
    """
    return apply_with_rounding(settings, frames, scope).values


class Applied(NamedTuple):
    """Prepared frames, and what is known of their rounding.

    ``rest`` is what double precision has rounded off ``values`` when they were normalised, in their shape;
    None in single precision and of values that are rounded down.
    """

    values: Any
    rest: Any
    rounding: FrameRounding


def apply_with_rounding(settings: Preprocessing, frames: Frames, scope: Scope) -> Applied:
    """Do as :func:`apply`, and say what that has rounded."""
    frames = drop_alpha(frames)
    if not isinstance(scope, str | tuple):
        raise ValueError(f"scope must be one of {SCOPES} or a tuple (lo, hi), got {scope!r}")
    if scope == "pair" and len(frames) != 2:
        raise ValueError(
            f"scope 'pair' is taken over two frames, got {len(frames)}; use 'sequence', 'batch' or (lo, hi)"
        )
    if scope == "none":
        settings = replace(settings, precision="double")
    held = _held(settings, frames)
    resized = _resized(settings, held)
    normalised = _over_scope(
        settings, resized.frames, resized.complete, _within(scope, held), _limits(frames) is not None
    )
    rounding = _rounding(settings, frames, resized, normalised)
    return Applied(normalised.values, normalised.rest, rounding)


def apply_to_pairs(settings: Preprocessing, frames: Frames) -> Iterator[tuple[int, int, Applied]]:
    """:func:`apply` to each pair i <= j over the pair's own scope; every frame is resized once.

    Yields
    ------
    i, j : int
    Applied
        Of the two.
    """
    frames = drop_alpha(frames)
    resized = _resized(settings, _held(settings, frames))
    whole_numbers = _limits(frames) is not None
    for i in range(len(frames)):
        for j in range(i, len(frames)):
            both = [i, j]
            normalised = _over_scope(
                settings, resized.frames[both], resized.complete[both], "pair", whole_numbers
            )
            rounding = _rounding(settings, frames, resized, normalised).of(both)
            yield i, j, Applied(normalised.values, normalised.rest, rounding)


class _Normalised(NamedTuple):
    """Normalised frames and their rest, see :class:`Applied`, and the range (channel,) they were over."""

    values: Any
    rest: Any
    lo: np.ndarray
    hi: np.ndarray


def _over_scope(
    settings: Preprocessing, resized: Frames, complete: np.ndarray, scope: Scope, whole_numbers: bool
) -> _Normalised:
    """Normalise frames of the final size over one scope."""
    if scope == "none":
        scope = (0, 1)
    lo, hi = (
        _fixed_range(scope, resized.shape[-1])
        if isinstance(scope, tuple)
        else _range(resized, scope, None if settings.mask else complete)
    )
    partly_constant = bool((lo == hi).any() and not (lo == hi).all())
    # Where some channels are constant, the published code writes each channel back into the array of integers
    # that it came from.
    floor = settings.compat == "published" and whole_numbers and partly_constant
    double = settings.precision == "double"
    known = None if settings.mask else complete
    values = normalise(resized, lo, hi, floor=floor, complete=known, double=double)
    rest = _rest(values, resized, lo, hi) if double and not floor else None
    return _Normalised(values, rest, lo, hi)


def _rest(values: Frames, frames: Frames, lo: np.ndarray, hi: np.ndarray) -> Frames:
    """Compute what double precision has rounded off normalised values; 0 in constant channels."""
    constant = ~(lo < hi)
    if constant.all():
        return values * 0
    low, high = np.where(constant, 0, lo), np.where(constant, 1, hi)
    if isinstance(frames, Tensor):
        smallest, largest = (torch.from_numpy(part).to(frames.device) for part in (low, high))
        rest = rest_of_normalised(values, frames, smallest, largest, 255.0)
        return rest.masked_fill(torch.from_numpy(constant).to(frames.device), 0)
    with np.errstate(invalid="ignore", over="ignore"):
        rest = rest_of_normalised(values, frames, low, high, 255.0)
    return np.where(constant, 0, rest)


def _rounding(
    settings: Preprocessing, frames: Frames, resized: _Resized, normalised: _Normalised
) -> FrameRounding:
    """Bound what is rounded of frames, given as they came and as they were resized."""
    known = resized.known
    lowest, highest = known.lo, known.hi
    changes = settings.size is not None and frames.shape[1:3] != (settings.size, settings.size)
    if changes and settings.compat == "published":  # its rim of zeros
        lowest, highest = np.minimum(lowest, 0), np.maximum(highest, 0)
    whole_numbers = _limits(frames) is not None
    return bound_of_frames(
        lowest,
        highest,
        normalised.lo,
        normalised.hi,
        units=(
            half_ulp_of(frames.dtype),
            max(half_ulp_of(resized.frames.dtype), 2.0**-53),
            2.0**-53 if settings.precision == "double" else 2.0**-24,
        ),
        # Whole numbers are resized to whole numbers, the same ones in any precision.
        splines=settings.order if changes and not whole_numbers else 0,
    )


def range_of(frames: np.ndarray, settings: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
    """Minimum and maximum per channel that :func:`apply` takes over all frames: the range of a scope.

    Over several sequences it is the smallest ``lo`` and the largest ``hi`` that aren't NaN.

    Parameters
    ----------
    frames : ndarray of shape (n, y, x, channel)
    settings : Preprocessing
        Of a mask, too: then single missing pixels don't count, rather than their frames.

    Returns
    -------
    lo, hi : ndarray of shape (channel,), float64
        NaN where nothing counts.
    """
    held = _held(settings, drop_alpha(frames))
    resized = _resized(settings, held)
    lo, hi = _range(resized.frames, "sequence", None if settings.mask else resized.complete)
    return lo / held.factor + held.offset, hi / held.factor + held.offset


class _Held(NamedTuple):
    """Frames as floating point can hold them: (values − offset) · factor, both exact.

    ``limits`` are those of the integers that they were, as :func:`_limits` gives them.
    """

    frames: Any
    limits: tuple[float, float] | None
    offset: int = 0
    factor: float = 1.0

    def place(self, bound: Any) -> float:
        """Give a bound's place among the frames, rounded once."""
        exact = bound if isinstance(bound, int) else float(bound)
        return float((Fraction(exact) - self.offset) * Fraction(self.factor))


def _held(settings: Preprocessing, frames: Any) -> _Held:
    """Shift integers beyond 2⁵³ and scale floats near the ends of their exponents; leave all others."""
    limits = _limits(frames)
    array = isinstance(frames, np.ndarray)
    if limits is not None:
        wide = frames.dtype.itemsize == 8 if array else frames.dtype in (torch.int64, torch.uint64)
        return _shifted(settings, frames, limits) if wide else _Held(frames, limits)
    double = frames.dtype == (np.float64 if array else torch.float64)
    if not double and settings.order < 2:
        return _Held(frames, limits)  # what is single is normalised in double where it has to be
    largest = _largest(frames)
    if largest > (1e300 if double else 1e37):
        factor = 2.0**-16
    elif double and settings.order > 0 and 0 < largest < 1e-290:
        factor = 2.0**200
    else:
        return _Held(frames, limits)
    return _Held(frames * frames.dtype.type(factor) if array else frames * factor, limits, 0, factor)


def _largest(frames: Any) -> float:
    """Find the largest finite magnitude; 0 where there is none."""
    if isinstance(frames, Tensor):
        finite = frames[frames.isfinite()]
        return finite.abs().max().item() if len(finite) else 0.0
    known = _extremes(_loadable(frames))
    if known.finite.all():
        return float(max(np.abs(known.lo).max(), np.abs(known.hi).max()))
    finite = frames[np.isfinite(frames)]
    return float(np.abs(finite).max(initial=0))


def _shifted(settings: Preprocessing, frames: Any, limits: tuple[float, float]) -> _Held:
    """Subtract the smallest of 64-bit integers where some are beyond 2⁵³: differences are what counts."""
    lowest, highest = _whole_extremes(frames)
    if max(-lowest, highest) <= WHOLE_IN_DOUBLE:
        return _Held(frames, limits)
    published = settings.compat == "published" and settings.size is not None
    if published and any(beyond(n, settings.size or n) for n in frames.shape[1:3]):
        return _Held(frames, limits)  # its rim of zeros is then what the range is of
    moved: Any
    if isinstance(frames, np.ndarray):
        # Modulo 2⁶⁴, which the differences don't exceed.
        moved = (frames.astype(np.uint64) - np.uint64(lowest % 2**64)).astype(np.float64)
    else:
        smallest = torch.tensor([lowest], dtype=frames.dtype, device=frames.device)
        moved = _signed(frames) - _signed(smallest)
        moved = torch.where(moved < 0, moved.double() + 2.0**64, moved.double())
    return _Held(moved, (float(int(limits[0]) - lowest), float(int(limits[1]) - lowest)), lowest)


def _whole_extremes(frames: Any) -> tuple[int, int]:
    if isinstance(frames, np.ndarray):
        return int(frames.min()), int(frames.max())
    shift = 2**63 if frames.dtype == torch.uint64 else 0
    ordered = _signed(frames)
    return int(ordered.min().item()) + shift, int(ordered.max().item()) + shift


def _signed(frames: Tensor) -> Tensor:
    """Map 64-bit integers to int64 in the same order, and with the same differences modulo 2⁶⁴."""
    return frames.view(torch.int64) ^ torch.iinfo(torch.int64).min if frames.dtype == torch.uint64 else frames


def _within(scope: Scope, held: _Held) -> Scope:
    """Take a fixed range to where frames are held, without a rounding in between."""
    if scope == "none" and held.offset:
        raise FramesError(
            "64-bit integers beyond 2^53 can't be compared as they are, since double precision rounds them: "
            "subtract an offset, or choose another scope than 'none'"
        )
    if isinstance(scope, str) or len(scope) != 2 or (held.offset == 0 and held.factor == 1):
        return (0.0, held.factor) if scope == "none" and held.factor != 1 else scope
    try:
        lo, hi = ([held.place(b) for b in np.asarray(bound, object).reshape(-1)] for bound in scope)
    except (TypeError, ValueError, OverflowError):
        return scope  # no numbers: said where ranges are read
    return lo, hi


class _Resized(NamedTuple):
    """Frames as they are to be normalised; which hold neither NaN nor infinity (n,); extremes before."""

    frames: Any
    complete: np.ndarray
    known: _Extremes


def _resized(settings: Preprocessing, held: _Held) -> _Resized:
    """Bring frames to their final size, in the precision that they are normalised in."""
    limits = held.limits
    loaded = _loadable(held.frames)
    if settings.precision == "double":
        loaded = loaded.double() if isinstance(loaded, Tensor) else loaded.astype(np.float64, copy=False)
    known = _extremes(loaded)
    complete = known.finite
    if settings.mask and not complete.all():
        loaded = _missing_as_nan(loaded)
        known = _extremes(loaded)
    if settings.size is not None:
        zero_rim = settings.compat == "published"
        loaded = _resize(loaded, settings.size, settings.order, zero_rim, limits, known)
    return _Resized(loaded, complete, known)


def _repeated(frames: np.ndarray) -> np.ndarray:
    """One channel as three equal ones."""
    return np.repeat(frames, 3, axis=-1) if frames.shape[-1] == 1 else frames


def _missing_as_nan(frames: Frames) -> Frames:
    """Infinite values are missing, too; a pixel is missing in all channels or in none."""
    if isinstance(frames, Tensor):
        return frames.masked_fill(~frames.isfinite().all(-1, keepdim=True), torch.nan)
    known = np.isfinite(frames)
    # Channel by channel: NumPy is slow along an axis of three.
    everywhere = np.logical_and.reduce([known[..., c] for c in range(frames.shape[-1])])
    out = frames.copy()
    out[~everywhere] = np.nan
    return out


def as_array(values: ArrayLike, what: str = "frames") -> np.ndarray:
    """Make an array of what NumPy can read, with NaN where a masked array is masked.

    Integers that are masked somewhere become float64; tensors come to the CPU and lose their gradient.

    Raises
    ------
    FramesError
        For masked integers that float64 cannot hold, and for tensors that aren't plain ones.
    """
    if isinstance(values, list | tuple) and _holds_masked(values):
        return np.stack([as_array(part, what) for part in values])
    if isinstance(values, Tensor):
        if type(values) not in (Tensor, torch.nn.Parameter):
            raise FramesError(f"{what}: expected a plain tensor, found {type(values).__name__}")
        plain = values.detach().cpu()
        return plain.float().numpy() if plain.dtype == torch.bfloat16 else plain.numpy()
    if not isinstance(values, np.ma.MaskedArray):
        return np.asarray(values)
    data, missing = values.data, np.ma.getmaskarray(values)
    if data.dtype.kind not in "biuf" or not missing.any():
        return np.asarray(data)
    if data.dtype.kind in "iu" and data.dtype.itemsize == 8:
        present = data[~missing]
        if len(present) and max(abs(int(present.min())), abs(int(present.max()))) > WHOLE_IN_DOUBLE:
            raise FramesError(
                f"{what}: masked integers beyond 2**53 have no place in float64, which has NaN for what is "
                "missing; subtract an offset"
            )
    dtype = data.dtype if data.dtype.kind == "f" else np.dtype(np.float64)
    return np.where(missing, np.array(np.nan, dtype), data.astype(dtype, copy=False))


def unmasked(frames: Frames) -> Frames:
    """Give frames with NaN where they are masked (:func:`as_array`); others are returned as they are."""
    return as_array(frames) if isinstance(frames, np.ma.MaskedArray) else frames


def _holds_masked(values: Any) -> bool:
    """Tell whether nested lists hold masked arrays or tensors, which NumPy would read without their mask."""
    return any(
        _holds_masked(part)
        if isinstance(part, list | tuple)
        else isinstance(part, np.ma.MaskedArray | Tensor)
        for part in values
    )


def as_frames(array: ArrayLike, what: str = "frames") -> np.ndarray:
    """Give an array the shape (n, y, x, channel).

    (y, x) becomes one frame of one channel, (n, y, x) one channel each. A three-dimensional array whose
    last axis could be channels is refused rather than guessed at.
    """
    array = as_array(array, what)
    if array.size == 0:
        raise FramesError(f"{what}: no frames, or empty ones: shape {array.shape}")
    if array.dtype.kind not in "biuf":
        raise FramesError(f"{what}: expected an integer or floating dtype, found {array.dtype}")
    if array.dtype.itemsize > 8:
        raise FramesError(
            f"{what}: {array.dtype} has more digits than double precision, in which frames are normalised; "
            "subtract an offset and pass astype(np.float64)"
        )
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


def drop_alpha(frames: Frames) -> Frames:
    """Check the channels of (n, y, x, channel) and drop the fourth.

    Raises
    ------
    ValueError
        For 2 or more than 4 channels, for which no metric here is defined, and for empty frames.
    """
    if 0 in frames.shape:
        raise FramesError(f"frames are empty: shape {frames.shape}")
    frames = unmasked(frames)
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
    frames = unmasked(frames)
    if frames.dtype == np.float16:
        frames = frames.astype(np.float32)
    if frames.dtype == np.bool_:
        frames = frames.astype(np.uint8)
    if frames.shape[1:3] == (size, size):
        return frames
    if order == 0:
        # Without a detour by another dtype: not all integers of 64 bits are there in double precision.
        return resample(np.ascontiguousarray(frames), size, 0, zero_rim=zero_rim)
    loaded = _loadable(frames)
    resized = _resize(loaded, size, order, zero_rim, _limits(frames), _extremes(loaded))
    return resized.astype(frames.dtype, copy=False)


def _resize(
    frames: Frames,
    size: int,
    order: int,
    zero_rim: bool,
    limits: tuple[float, float] | None,
    known: _Extremes,
) -> Frames:
    """:func:`resize` for frames as :func:`_loadable` gives them; with ``limits`` they are whole numbers."""
    if frames.shape[1:3] == (size, size):
        return frames
    resized = resample(frames, size, order, zero_rim=zero_rim, limits=limits)
    if order > 1 or (order == 1 and not zero_rim):
        # A constant stays that constant: rounding would pass for a range, and be stretched to [0, 255], as
        # it is by the published code. At order 1 that can be reproduced.
        for f, c in np.argwhere((known.lo == known.hi) & np.isfinite(known.lo)):
            plane = resized[f, ..., c]
            resized[f, ..., c] = (plane - plane + known.lo.item(f, c)) * (plane != 0)  # NaN and the rim stay
    return resized


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
    loaded = _loadable(unmasked(frames))
    return _range(loaded, where, None if masked else _extremes(loaded).finite)


def _range(frames: Frames, where: str, complete: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """:func:`value_range` over the ``complete`` frames, or over all values but NaN."""
    if not isinstance(where, str) or where not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES} or (lo, hi), got {where!r}")
    known = _extremes(frames)
    counted = slice(None) if complete is None else complete
    lo = known.lo[counted].min(axis=0, initial=np.inf)
    hi = known.hi[counted].max(axis=0, initial=-np.inf)
    return np.where(lo <= hi, lo, np.nan), np.where(lo <= hi, hi, np.nan)


class _Extremes(NamedTuple):
    """Of every frame: minimum and maximum of all but NaN, (n, channel) float64; whether all is finite, (n,).

    Without any value, infinity and −infinity.
    """

    lo: np.ndarray
    hi: np.ndarray
    finite: np.ndarray


def _extremes(frames: Frames) -> _Extremes:
    n, y, x, channels = frames.shape
    if isinstance(frames, np.ndarray):
        lowest, highest = np.array(_limits(frames) or (-np.inf, np.inf), frames.dtype)
        return _Extremes(*_walk_extremes(frames.reshape(n, y, x * channels), channels, lowest, highest))
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
    return _Extremes(lo.double().cpu().numpy(), hi.double().cpu().numpy(), finite.cpu().numpy())


@numba.njit(nogil=True, cache=True)
def _walk_extremes(frames, channels, lowest, highest):  # type: ignore[no-untyped-def]
    n, y, wide = frames.shape
    lo = np.empty((n, channels))
    hi = np.empty((n, channels))
    finite = np.ones(n, np.bool_)
    # Whole rows: walked channel by channel, there would be nothing to vectorise.
    low = np.empty(wide, frames.dtype)
    high = np.empty(wide, frames.dtype)
    spoilt = np.empty(wide, frames.dtype)
    for f in range(n):
        low[:] = highest
        high[:] = lowest
        spoilt[:] = 0
        for r in range(y):
            row = frames[f, r]
            for k in range(wide):
                value = row[k]
                low[k] = value if value < low[k] else low[k]
                high[k] = value if value > high[k] else high[k]
                spoilt[k] += value - value
        for c in range(channels):
            lo[f, c] = low[c::channels].min()
            hi[f, c] = high[c::channels].max()
        finite[f] = (spoilt == 0).all()
    return lo, hi, finite


def finite_frames(frames: np.ndarray) -> np.ndarray:
    """Tell which frames of (n, …) hold neither NaN nor infinity: bool (n,)."""
    frames = unmasked(frames)
    if frames.dtype.kind != "f":
        return np.ones(len(frames), dtype=bool)
    with np.errstate(invalid="ignore", over="ignore"):
        # A sum is finite only if all its terms are; the exact test is needed only where it overflowed.
        sums = np.isfinite(frames.reshape(len(frames), -1).sum(axis=1))
    for index in np.flatnonzero(~sums):
        sums[index] = np.isfinite(frames[index]).all()
    return sums


def normalise(
    frames: Frames,
    lo: np.ndarray,
    hi: np.ndarray,
    *,
    floor: bool,
    complete: np.ndarray | None,
    double: bool = False,
) -> Frames:
    """255·((frames − lo)/(hi − lo)) per channel; 0 where lo equals hi.

    Computed in single precision for float32 and, as by the published code, in double precision for
    others: truncating to 8 bit shows the difference.

    Parameters
    ----------
    frames : ndarray or Tensor of shape (n, y, x, channel)
    lo, hi : ndarray of shape (channel,), float64
    floor : bool
        Round down to whole numbers.
    complete : ndarray of shape (n,), bool, or None
        All other frames become NaN. None: missing values are NaN, and stay so.
    double : bool, default False
        Keep the result in double precision; ``frames`` are double, too.

    Returns
    -------
    ndarray or Tensor of shape (n, y, x, channel), float32, or float64 if ``double``
        New memory. The published code, too, rounds to single precision before it truncates to 8 bit.
    """
    frames = unmasked(frames)
    single = frames.dtype == (torch.float32 if isinstance(frames, Tensor) else np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = lo.astype(np.float32), hi.astype(np.float32)
        spread = high - low
    if not single or not _comfortable(spread) or not _representable(lo, hi):
        # Also where the range over- or underflows single precision.
        low, spread = lo, hi - lo
    constant = spread == 0
    divisor = np.where(constant, 1, spread).astype(spread.dtype)
    kept = np.ones(len(frames), bool) if complete is None else complete
    if isinstance(frames, Tensor):
        return _normalised(frames, low, divisor, constant, floor, kept, double=double)
    n, y, x, channels = frames.shape
    low, divisor, constant = (np.tile(values, x) for values in (low, divisor, constant))
    out = np.empty((n, y, x * channels), np.float64 if double else np.float32)
    _normalise_rows(
        frames.reshape(out.shape), low, divisor, constant, spread.dtype.type(255), floor, kept, out
    )
    return out.reshape(frames.shape)


def _normalised(
    frames: Tensor,
    lo: np.ndarray,
    divisor: np.ndarray,
    constant: np.ndarray,
    floor: bool,
    kept: np.ndarray,
    *,
    double: bool,
) -> Tensor:
    low, by, flat = (torch.tensor(values, device=frames.device) for values in (lo, divisor, constant))
    exact = frames.to(low.dtype)
    out = torch.where(flat, exact - exact, (exact - low).div_(by).mul_(255))  # NaN stays NaN in both
    out = (out.floor_() if floor else out).to(torch.float64 if double else torch.float32)
    if not kept.all():
        out[torch.from_numpy(~kept).to(out.device)] = torch.nan
    return out


# Looking for divisions by zero would keep it from being vectorised: five times slower.
@numba.njit(nogil=True, cache=True, error_model="numpy")
def _normalise_rows(frames, lo, divisor, constant, full, floor, kept, out):  # type: ignore[no-untyped-def]
    for f in range(out.shape[0]):
        for r in range(out.shape[1]):
            row = frames[f, r]
            target = out[f, r]
            if not kept[f]:
                target[:] = np.nan
                continue
            for k in range(target.shape[0]):
                value = (row[k] - lo[k]) / divisor[k] * full
                value = row[k] - row[k] if constant[k] else value  # NaN stays NaN
                target[k] = np.floor(value) if floor else value


def truncate_to_8bit(frames: np.ndarray) -> np.ndarray:
    """Whole numbers in 0 … 255, rounded down as the published evaluation does; outside is clipped.

    Returns
    -------
    ndarray of the same shape, float32
        NaN stays NaN.
    """
    # In one pass and one thread: this is half the time of the metrics of pixel differences, and waiting
    # for a second thread on a busy machine is more than the other half.
    frames = unmasked(frames)
    out = np.empty(frames.shape, np.float32)
    floats = np.float64 if frames.dtype == np.float64 else np.float32
    _floor_within(np.ascontiguousarray(frames, floats).reshape(-1), out.reshape(-1))
    return out


@numba.njit(nogil=True, cache=True)
def _floor_within(values, out):  # type: ignore[no-untyped-def]
    for k in range(values.shape[0]):
        value = values[k]
        value = np.float32(0) if value < 0 else value
        value = np.float32(255) if value > 255 else value
        out[k] = np.floor(value)


def _loadable(frames: Frames) -> Frames:
    """Contiguous, and of a dtype that kernels take; numbers stay what they are.

    Arrays become uint8, float32 or float64, for which kernels are compiled.
    """
    if isinstance(frames, Tensor):
        if frames.dtype in (torch.uint16, torch.uint32, torch.uint64):
            return frames.double()  # torch knows little more of these
        if frames.dtype == torch.bool:
            return frames.byte()
        return frames.float() if frames.dtype == torch.float16 else frames
    if frames.dtype == np.bool_:
        frames = frames.view(np.uint8)
    own = frames.dtype.newbyteorder("=")
    kind: dict[Any, Any] = {
        np.dtype(np.uint8): own,
        np.dtype(np.float32): own,
        np.dtype(np.float16): np.float32,
    }
    # Writable, as well: kernels would be compiled once more for arrays that aren't.
    return np.require(frames, kind.get(own, np.float64), ["C", "W"])


def _limits(frames: Frames) -> tuple[float, float] | None:
    """Of an integer dtype; None for floating point."""
    if isinstance(frames, Tensor):
        if frames.dtype.is_floating_point:
            return None
        info: Any = torch.iinfo(torch.uint8 if frames.dtype == torch.bool else frames.dtype)
    else:
        if frames.dtype.kind == "f":
            return None
        info = np.iinfo(np.uint8 if frames.dtype == np.bool_ else frames.dtype)
    return float(info.min), float(info.max)


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


def _representable(*bounds: np.ndarray) -> bool:
    """Tell whether single precision holds these bounds exactly; NaN counts as held."""
    with np.errstate(over="ignore"):
        return all(np.array_equal(b.astype(np.float32), b, equal_nan=True) for b in bounds)


def scope_identity(scope: Scope) -> Any:
    """Name a scope in a fingerprint, as JSON takes it.

    Results by bounds that single precision doesn't hold were once normalised by rounded ones: these go by
    another name than they did.

    >>> scope_identity((0.0, 0.5)), scope_identity((0.0, 0.1))
    ((0.0, 0.5), {'bounds': 'exact', 'range': (0.0, 0.1)})
    """
    if not isinstance(scope, tuple) or _representable(*(np.asarray(b, np.float64) for b in scope)):
        return scope
    return {"bounds": "exact", "range": scope}


def _comfortable(spread: np.ndarray) -> bool:
    nonzero = spread[spread != 0]
    return bool(np.isfinite(spread).all() and (nonzero > 1e-30).all() and (nonzero < 1e37).all())
