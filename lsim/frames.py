"""Arrays and tensors of frames: their shape, dtype and channels, and values that are missing."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

Frames = TypeVar("Frames", np.ndarray, Tensor)
"""(n, y, x, channel): an array, for compiled kernels, or a tensor on any device."""

WHOLE_IN_DOUBLE = 2**53
"""Up to which double precision holds every integer."""


class FramesError(ValueError):
    """Frames that a metric cannot take: their shape, channels or size, whatever their values are."""


def as_array(values: ArrayLike, name: str = "frames") -> np.ndarray:
    """Make an array of anything that NumPy reads, with NaN where a masked array is masked.

    Integers with masked values become float64; tensors come to the CPU and lose their gradient.

    Parameters
    ----------
    values : array_like, masked array or Tensor
    name : str
        What error messages call it.

    Raises
    ------
    FramesError
        For masked integers that float64 cannot hold, and for tensors of other classes.

    Examples
    --------
    >>> as_array(np.ma.masked_greater([1, 2, 3], 2))
    array([ 1.,  2., nan])
    """
    if isinstance(values, list | tuple) and _holds_masked(values):
        return np.stack([as_array(part, name) for part in values])
    if isinstance(values, Tensor):
        if type(values) not in (Tensor, torch.nn.Parameter):
            raise FramesError(f"{name}: expected a plain tensor, found {type(values).__name__}")
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
                f"{name}: masked integers beyond 2**53 do not fit into float64, whose NaN stands for "
                "missing values; subtract an offset"
            )
    dtype = data.dtype if data.dtype.kind == "f" else np.dtype(np.float64)
    return np.where(missing, np.array(np.nan, dtype), data.astype(dtype, copy=False))


def unmasked(frames: Frames) -> Frames:
    """Replace masked values by NaN (:func:`as_array`); return other frames as they are."""
    return as_array(frames) if isinstance(frames, np.ma.MaskedArray) else frames


def _holds_masked(values: Any) -> bool:
    """Tell whether nested lists hold masked arrays or tensors, which NumPy would read without their mask."""
    return any(
        _holds_masked(part)
        if isinstance(part, list | tuple)
        else isinstance(part, np.ma.MaskedArray | Tensor)
        for part in values
    )


def as_frames(array: ArrayLike, name: str = "frames") -> np.ndarray:
    """Give an array the shape (n, y, x, channel).

    (y, x) becomes one frame of one channel, (n, y, x) frames of one channel. A three-dimensional array
    whose last axis could be channels is refused.

    Raises
    ------
    FramesError
        For other shapes, empty arrays, and dtypes that are not real numbers of 64 bits at most.

    Examples
    --------
    >>> as_frames(np.zeros((5, 8, 9))).shape
    (5, 8, 9, 1)
    """
    array = as_array(array, name)
    if array.size == 0:
        raise FramesError(f"{name}: no frames, or empty ones: shape {array.shape}")
    if array.dtype.kind not in "biuf":
        raise FramesError(f"{name}: expected an integer or floating dtype, found {array.dtype}")
    if array.dtype.itemsize > 8:
        raise FramesError(
            f"{name}: {array.dtype} has more digits than double precision, in which frames are normalised; "
            "subtract an offset and pass astype(np.float64)"
        )
    if array.ndim == 2:
        return array[None, ..., None]
    if array.ndim == 3:
        if array.shape[-1] <= 4:
            raise FramesError(
                f"{name}: shape {array.shape} is ambiguous: for one frame with channels pass array[None], "
                "for a stack of frames without channels array[..., None]"
            )
        return array[..., None]
    if array.ndim == 4:
        return array
    raise FramesError(f"{name}: expected (y, x), (n, y, x) or (n, y, x, channel), found shape {array.shape}")


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


def finite_frames(frames: np.ndarray) -> np.ndarray:
    """Tell which frames of (n, …) hold neither NaN nor infinity: bool (n,).

    Examples
    --------
    >>> finite_frames(np.array([[1.0, 2.0], [np.nan, 0.0]]))
    array([ True, False])
    """
    frames = unmasked(frames)
    if frames.dtype.kind != "f":
        return np.ones(len(frames), dtype=bool)
    with np.errstate(invalid="ignore", over="ignore"):
        # A sum is finite only if all its terms are; the exact test is needed only where it overflowed.
        finite = np.isfinite(frames.reshape(len(frames), -1).sum(axis=1))
    for index in np.flatnonzero(~finite):
        finite[index] = np.isfinite(frames[index]).all()
    return finite


def missing_as_nan(frames: Frames) -> Frames:
    """Put NaN into all channels of pixels that are NaN or infinite in one."""
    if isinstance(frames, Tensor):
        return frames.masked_fill(~frames.isfinite().all(-1, keepdim=True), torch.nan)
    finite = np.isfinite(frames)
    # Channel by channel: NumPy is slow along an axis of three.
    whole = np.logical_and.reduce([finite[..., c] for c in range(frames.shape[-1])])
    out = frames.copy()
    out[~whole] = np.nan
    return out


def loadable(frames: Frames) -> Frames:
    """Make frames contiguous, in a dtype that kernels take; no number changes.

    Arrays become uint8, float32 or float64, for which kernels are compiled.
    """
    if isinstance(frames, Tensor):
        if frames.dtype in (torch.uint16, torch.uint32, torch.uint64):
            return frames.double()  # torch has few operations on these
        if frames.dtype == torch.bool:
            return frames.byte()
        return frames.float() if frames.dtype == torch.float16 else frames
    if frames.dtype == np.bool_:
        frames = frames.view(np.uint8)
    native = frames.dtype.newbyteorder("=")
    kind: dict[Any, Any] = {
        np.dtype(np.uint8): native,
        np.dtype(np.float32): native,
        np.dtype(np.float16): np.float32,
    }
    # Writable, as well: kernels would be compiled once more for arrays that aren't.
    return np.require(frames, kind.get(native, np.float64), ["C", "W"])


def integer_limits(frames: Frames) -> tuple[float, float] | None:
    """Return the smallest and largest value of an integer dtype; None for floating point."""
    if isinstance(frames, Tensor):
        if frames.dtype.is_floating_point:
            return None
        info: Any = torch.iinfo(torch.uint8 if frames.dtype == torch.bool else frames.dtype)
    else:
        if frames.dtype.kind == "f":
            return None
        info = np.iinfo(np.uint8 if frames.dtype == np.bool_ else frames.dtype)
    return float(info.min), float(info.max)
