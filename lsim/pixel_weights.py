"""Pixels that count in a comparison, and how much: masks and weights as users pass them."""

from __future__ import annotations

import hashlib
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

Mask: TypeAlias = Literal["nan"] | ArrayLike | None
"""Pixels to leave out of comparisons: those that are NaN in either frame, or where an array is false."""

WEIGHTS_OF_PIXELS = "weights_of_pixels"
"""Key of a specification for the result of :func:`describe_weights`."""


def describe_weights(weights: ArrayLike) -> dict[str, Any]:
    """Describe weights of pixels as specifications do: by their shape, and a hash of their ratios.

    Parameters
    ----------
    weights : array_like of shape (y, x)
        As :meth:`Metric.weighted` takes them.

    Returns
    -------
    dict of JSON values

    Raises
    ------
    ValueError
        When they are no weights.

    Examples
    --------
    >>> import numpy as np
    >>> weights = np.array([[1.0, 1.0], [3.0, 3.0]])
    >>> describe_weights(weights) == describe_weights(2 * weights)
    True
    """
    values = scale_weights(weights)
    return {"shape": list(values.shape), "sha256": hashlib.sha256(values.tobytes()).hexdigest()}


def scale_weights(weights: ArrayLike) -> np.ndarray:
    """Check weights of pixels (y, x) and divide them by the largest, in float64.

    Raises
    ------
    ValueError
        When they are not real, finite, non-negative numbers of shape (y, x), or all 0.

    Examples
    --------
    >>> scale_weights([[1, 2], [4, 0]]).tolist()
    [[0.25, 0.5], [1.0, 0.0]]
    """
    array = np.ma.asanyarray(weights) if isinstance(weights, np.ma.MaskedArray) else np.asarray(weights)
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise ValueError(
            "weights of pixels must be real numbers of shape (y, x), "
            f"got {array.dtype} of shape {array.shape}"
        )
    doubles = array.astype(np.float64)
    values = doubles.filled(np.nan) if isinstance(doubles, np.ma.MaskedArray) else doubles
    usable = np.isfinite(values) & (values >= 0)
    if not usable.all():
        raise ValueError(
            "weights of pixels must be finite and not negative; "
            f"{np.count_nonzero(~usable)} of {values.size} are not: give such pixels the weight 0"
        )
    if not values.any():
        raise ValueError("weights of pixels are all 0; expected some above 0")
    return np.ascontiguousarray(values / values.max())


def mask_frames(frames: np.ndarray, mask: Mask) -> np.ndarray:
    """Put NaN into frames (n, y, x, channel) where a mask leaves pixels out; integers become float64.

    Raises
    ------
    ValueError
        For a mask of another dtype or shape.

    Examples
    --------
    >>> mask_frames(np.array([[[[1], [2]]]]), [[True, False]]).ravel()
    array([ 1., nan])
    """
    if isinstance(mask, str):
        if mask != "nan":
            raise ValueError(f"mask must be 'nan' or an array of bool, got {mask!r}")
        return frames
    present = mask.filled(False) if isinstance(mask, np.ma.MaskedArray) else np.asarray(mask)
    if present.dtype != np.bool_:
        raise ValueError(f"mask must be 'nan' or an array of bool, got one of {present.dtype}")
    # The shapes that a mask may have, each with the mask as it broadcasts against frames.
    masks = {
        frames.shape[1:3]: present[None, ..., None],
        frames.shape[:3]: present[..., None],
        frames.shape: present,
    }
    if present.shape not in masks:
        raise ValueError(
            f"mask has shape {present.shape}; "
            f"expected {' or '.join(map(str, masks))} for frames {frames.shape}"
        )
    dtype = frames.dtype if frames.dtype.kind == "f" else np.float64
    return np.where(masks[present.shape], frames.astype(dtype, copy=False), np.array(np.nan, dtype))
