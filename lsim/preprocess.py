"""Preparation of a field for metrics: channels, size, and the range [0, 255].

The published evaluation of LSiM resizes frames with :func:`scipy.ndimage.zoom`, then maps minimum and
maximum of each channel, taken jointly over a *scope* of frames, to [0, 255]. This module does the same
for whole stacks, each frame once. An array goes through compiled kernels in one thread, a tensor through
plain torch on its own device; the rules are the same lines for both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from lsim.exact_frames import ExactFrames, hold_exactly, move_scope
from lsim.frames import (
    WHOLE_IN_DOUBLE,
    Frames,
    FramesError,
    as_array,
    as_frames,
    drop_alpha,
    finite_frames,
    integer_limits,
    loadable,
    missing_as_nan,
    unmasked,
)
from lsim.normalise import find_rest, normalise, truncate_to_8bit
from lsim.preprocessing_settings import Compat, Preprocessing
from lsim.resampling import resample
from lsim.rounding import FrameRounding, bound_of_frames, half_ulp_of
from lsim.scope import (
    SCOPES,
    Extremes,
    Scope,
    find_extremes,
    fixed_range,
    range_over,
    scope_identity,
    value_range,
)

__all__ = [
    "Compat",
    "FramesError",
    "Preprocessing",
    "Scope",
    "apply",
    "apply_to_pairs",
    "apply_with_rounding",
    "as_array",
    "as_frames",
    "drop_alpha",
    "finite_frames",
    "normalise",
    "preprocess",
    "range_of",
    "resize",
    "scope_identity",
    "truncate_to_8bit",
    "unmasked",
    "value_range",
]


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
        times the values, in double precision.
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

    Examples
    --------
    >>> preprocess([[1.0, 2.0], [2.0, 3.0]], size=None)[0, :, :, 0]
    array([[  0. , 127.5],
           [127.5, 255. ]], dtype=float32)
    """
    settings = Preprocessing(size, order, compat)
    array = as_array(frames)
    if array.ndim == 5 and array.size:
        if isinstance(scope, str) and scope == "sequence":
            return np.stack([_three_channels(apply(settings, sequence, scope)) for sequence in array])
        flat = _three_channels(apply(settings, array.reshape(-1, *array.shape[2:]), scope))
        return flat.reshape(*array.shape[:2], *flat.shape[1:])
    return _three_channels(apply(settings, as_frames(array), scope))


def apply(settings: Preprocessing, frames: Frames, scope: Scope) -> Frames:
    """Preprocess one stack over one scope, by settings; a single channel stays single.

    Parameters
    ----------
    settings : Preprocessing
    frames : ndarray or Tensor of shape (n, y, x, channel)
        Any dtype; a tensor on any device that has double precision.
    scope : str or (lo, hi)

    Returns
    -------
    ndarray or Tensor of shape (n, y', x', 1 or 3), float32, or float64 in double precision
        New memory, on the device of ``frames``. Arrays and tensors give the same within 1e-6 of 255, at
        orders 0 and 1 the same bits where divisions are IEEE's.
    """
    return apply_with_rounding(settings, frames, scope).values


SMALLEST = 1e-140
"""Least magnitude of frames in their own units; one over it is the largest."""


MOST_RANGES = 1e15
"""Distance of values from a fixed range, in ranges, whose squares single precision can hold."""


class Applied(NamedTuple):
    """Prepared frames with bounds on their rounding.

    Attributes
    ----------
    values : ndarray or Tensor
    rest : callable or None
        Computes what double precision has rounded off ``values`` in normalising them, in their shape; None in
        single precision, and for values that are rounded down.
    rounding : FrameRounding
    """

    values: Any
    rest: Callable[[], Any] | None
    rounding: FrameRounding


def apply_with_rounding(settings: Preprocessing, frames: Frames, scope: Scope) -> Applied:
    """Preprocess as :func:`apply`, with the rest of values and bounds on their rounding."""
    frames = drop_alpha(frames)
    if not isinstance(scope, str | tuple):
        raise ValueError(f"scope must be one of {SCOPES} or a tuple (lo, hi), got {scope!r}")
    if scope == "pair" and len(frames) != 2:
        raise ValueError(
            f"scope 'pair' is taken over two frames, got {len(frames)}; use 'sequence', 'batch' or (lo, hi)"
        )
    if scope == "none":
        settings = replace(settings, precision="double")
    exact = hold_exactly(settings, frames)
    resized = _resize_exact(settings, exact)
    if scope == "none":
        _check_magnitude(resized, exact.factor)
    normalised = _normalise_over(
        settings,
        resized.frames,
        resized.complete,
        move_scope(scope, exact),
        integer_limits(frames) is not None,
    )
    if isinstance(scope, tuple):
        _check_reach(settings, resized, normalised)
    rounding = _bound_rounding(settings, frames, resized, normalised)
    return Applied(normalised.values, normalised.rest, rounding)


def _check_reach(settings: Preprocessing, resized: _Resized, normalised: _Normalised) -> None:
    """Refuse values so far beyond a fixed range that their squares overflow."""
    limit = 1 / SMALLEST if settings.precision == "double" else MOST_RANGES
    spread = normalised.hi - normalised.lo
    with np.errstate(all="ignore"):
        ends = np.stack([resized.extremes.lo, resized.extremes.hi]) - normalised.lo
        reach = np.abs(ends) / np.where(spread > 0, spread, np.inf)
    largest = float(reach[np.isfinite(reach)].max(initial=0))
    if largest > limit:
        raise FramesError(
            f"values are up to {largest:.3g} times the range of the scope away from it; expected {limit:g} "
            "at most: frames that diverge, or another field's range"
        )


def _check_magnitude(resized: _Resized, factor: float) -> None:
    """Refuse values in their own units whose squares double precision cannot hold."""
    ends = np.concatenate([np.asarray(side).ravel() for side in (resized.extremes.lo, resized.extremes.hi)])
    with np.errstate(over="ignore"):
        largest = float(np.abs(ends[np.isfinite(ends)]).max(initial=0)) / factor
    if largest > 1 / SMALLEST or 0 < largest < SMALLEST:
        raise FramesError(
            f"values up to {largest:.3g} with scope 'none'; expected {SMALLEST:g} to {1 / SMALLEST:g}, whose "
            "squares double precision can hold: change their units, or take another scope"
        )


def apply_to_pairs(settings: Preprocessing, frames: Frames) -> Iterator[tuple[int, int, Applied]]:
    """Preprocess each pair i <= j of frames over its own scope; every frame is resized once.

    Yields
    ------
    i, j : int
    Applied
        The two frames.
    """
    frames = drop_alpha(frames)
    resized = _resize_exact(settings, hold_exactly(settings, frames))
    whole_numbers = integer_limits(frames) is not None
    for i in range(len(frames)):
        for j in range(i, len(frames)):
            pair = [i, j]
            normalised = _normalise_over(
                settings, resized.frames[pair], resized.complete[pair], "pair", whole_numbers
            )
            rounding = _bound_rounding(settings, frames, resized, normalised).of(pair)
            yield i, j, Applied(normalised.values, normalised.rest, rounding)


class _Normalised(NamedTuple):
    """Normalised frames, their rest (see :class:`Applied`), and the range (channel,) they were over."""

    values: Any
    rest: Callable[[], Any] | None
    lo: np.ndarray
    hi: np.ndarray


def _normalise_over(
    settings: Preprocessing, resized: Frames, complete: np.ndarray, scope: Scope, whole_numbers: bool
) -> _Normalised:
    """Normalise frames of the final size over one scope."""
    if scope == "none":
        scope = (0, 1)
    lo, hi = (
        fixed_range(scope, resized.shape[-1])
        if isinstance(scope, tuple)
        else range_over(resized, scope, None if settings.mask else complete)
    )
    partly_constant = bool((lo == hi).any() and not (lo == hi).all())
    # Where some channels are constant, the published code writes each channel back into the array of integers
    # that it came from.
    floor = settings.compat == "published" and whole_numbers and partly_constant
    double = settings.precision == "double"
    values = normalise(
        resized, lo, hi, floor=floor, complete=None if settings.mask else complete, double=double
    )
    # It takes longer than all else, and most metrics don't ask for it.
    rest = functools.partial(find_rest, values, resized, lo, hi) if double and not floor else None
    return _Normalised(values, rest, lo, hi)


def _bound_rounding(
    settings: Preprocessing, frames: Frames, resized: _Resized, normalised: _Normalised
) -> FrameRounding:
    """Bound the rounding of prepared frames, from the frames as they came and as they were resized."""
    lowest, highest = resized.extremes.lo, resized.extremes.hi
    changes = settings.size is not None and frames.shape[1:3] != (settings.size, settings.size)
    if changes and settings.compat == "published":  # its rim of zeros
        lowest, highest = np.minimum(lowest, 0), np.maximum(highest, 0)
    whole_numbers = integer_limits(frames) is not None
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
        rounded=whole_numbers and bool((np.maximum(-lowest, highest) > WHOLE_IN_DOUBLE).any()),
        # Whole numbers are resized to the same whole numbers in any precision.
        splines=settings.order if changes and not whole_numbers else 0,
    )


def range_of(frames: np.ndarray, settings: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
    """Find the range (minimum and maximum per channel) that :func:`apply` normalises all frames over.

    The range of several sequences is the smallest ``lo`` and the largest ``hi`` but for NaN.

    Parameters
    ----------
    frames : ndarray of shape (n, y, x, channel)
    settings : Preprocessing
        With a mask, single missing pixels don't count, instead of their whole frames.

    Returns
    -------
    lo, hi : ndarray of shape (channel,), float64
        NaN where nothing counts.

    Examples
    --------
    >>> range_of(np.arange(8.0).reshape(2, 2, 2, 1), Preprocessing(size=None))
    (array([0.]), array([7.]))
    """
    exact = hold_exactly(settings, drop_alpha(frames))
    resized = _resize_exact(settings, exact)
    lo, hi = range_over(resized.frames, "sequence", None if settings.mask else resized.complete)
    return lo / exact.factor + exact.offset, hi / exact.factor + exact.offset


class _Resized(NamedTuple):
    """Frames of the final size, whether each is finite throughout (n,), and the extremes before resizing."""

    frames: Any
    complete: np.ndarray
    extremes: Extremes


def _resize_exact(settings: Preprocessing, exact: ExactFrames) -> _Resized:
    """Resize frames to their final size, in the precision in which they are normalised."""
    limits = exact.limits
    values = loadable(exact.frames)
    if settings.precision == "double":
        values = values.double() if isinstance(values, Tensor) else values.astype(np.float64, copy=False)
    extremes = find_extremes(values)
    complete = extremes.finite
    if settings.mask and not complete.all():
        values = missing_as_nan(values)
        extremes = find_extremes(values)
    if settings.size is not None:
        zero_rim = settings.compat == "published"
        values = _resize(values, settings.size, settings.order, zero_rim, limits, extremes)
    return _Resized(values, complete, extremes)


def _three_channels(frames: np.ndarray) -> np.ndarray:
    """Repeat a single channel to three."""
    return np.repeat(frames, 3, axis=-1) if frames.shape[-1] == 1 else frames


def resize(frames: np.ndarray, size: int, order: int = 0, *, zero_rim: bool = False) -> np.ndarray:
    """Resize both axes of (n, y, x, channel) to ``size`` as :func:`scipy.ndimage.zoom` does.

    Sample i of m lies at i·((n−1)/(m−1)) of an axis of length n; order 0 takes the nearest sample,
    halves rounded up. Integer dtypes are kept: rounded half away from zero and clipped. Where rounding
    puts the last position beyond n−1 (for example 512 → 224), scipy writes zeros into the last row or
    column; ``zero_rim=True`` reproduces that; the default takes the last sample.

    Parameters
    ----------
    frames : ndarray of shape (n, y, x, channel)
    size : int
    order : int, default 0
    zero_rim : bool, default False

    Returns
    -------
    ndarray of shape (n, size, size, channel), dtype of ``frames`` (half becomes single precision)

    Examples
    --------
    >>> resize(np.arange(16).reshape(1, 4, 4, 1), 2)[0, ..., 0]
    array([[ 0,  3],
           [12, 15]])
    """
    frames = unmasked(frames)
    if frames.dtype == np.float16:
        frames = frames.astype(np.float32)
    if frames.dtype == np.bool_:
        frames = frames.astype(np.uint8)
    if frames.shape[1:3] == (size, size):
        return frames
    if order == 0:
        # In its own dtype: double precision doesn't hold all 64-bit integers.
        return resample(np.ascontiguousarray(frames), size, 0, zero_rim=zero_rim)
    array = loadable(frames)
    resized = _resize(array, size, order, zero_rim, integer_limits(frames), find_extremes(array))
    return resized.astype(frames.dtype, copy=False)


def _resize(
    frames: Frames,
    size: int,
    order: int,
    zero_rim: bool,
    limits: tuple[float, float] | None,
    extremes: Extremes,
) -> Frames:
    """Resize frames as :func:`~lsim.frames.loadable` gives them; with ``limits``, to whole numbers."""
    if frames.shape[1:3] == (size, size):
        return frames
    resized = resample(frames, size, order, zero_rim=zero_rim, limits=limits)
    if order > 1 or (order == 1 and not zero_rim):
        # A constant stays constant: its rounding would be stretched to [0, 255], as the published code does.
        # At order 1 that can be reproduced.
        for f, c in np.argwhere((extremes.lo == extremes.hi) & np.isfinite(extremes.lo)):
            plane = resized[f, ..., c]
            resized[f, ..., c] = (plane - plane + extremes.lo.item(f, c)) * (
                plane != 0
            )  # NaN and the rim stay
    return resized
