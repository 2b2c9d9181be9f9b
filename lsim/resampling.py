"""Resizing of whole stacks of frames as :func:`scipy.ndimage.zoom` does.

A resize is separable and, but for rounding, linear. Indices and weights depend on the lengths alone, and are
cached. Arrays go through compiled kernels, frame by frame in one thread; tensors on any device through plain
torch. Orders 0 and 1 are scipy's to the last bit in both; splines
agree with it to 1e-12 of the values, in double precision throughout.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.interpolate
import scipy.ndimage
import torch
from torch import Tensor

from lsim.compiled import compiled
from lsim.frames import Frames
from lsim.pairs import FAST

POLES = {
    2: (math.sqrt(8) - 3,),
    3: (math.sqrt(3) - 2,),
    4: (
        math.sqrt(664 - math.sqrt(438976)) + math.sqrt(304) - 19,
        math.sqrt(664 + math.sqrt(438976)) - math.sqrt(304) - 19,
    ),
    5: (
        math.sqrt(67.5 - math.sqrt(4436.25)) + math.sqrt(26.25) - 6.5,
        math.sqrt(67.5 + math.sqrt(4436.25)) - math.sqrt(26.25) - 6.5,
    ),
}
"""Poles of the recursive filters from samples to spline coefficients (Unser et al. 1993, table 1)."""

LANES = 192
"""Columns filtered along y together: with 256 rows of them, as much as the second-level cache holds."""

ROWS = 32
"""Rows filtered along x together."""


def resample(
    frames: Frames, size: int, order: int, *, zero_rim: bool, limits: tuple[float, float] | None = None
) -> Frames:
    """Sample both axes of (n, y, x, channel) at ``size`` positions, see :func:`lsim.preprocess.resize`.

    Parameters
    ----------
    frames : ndarray or Tensor of shape (n, y, x, channel)
        An array is contiguous; for orders above 0 it is uint8, float32 or float64.
    size, order : int
    zero_rim : bool
        Write zeros where rounding puts the last position beyond the last sample, as scipy does; NaN stays.
    limits : (float, float), optional
        Round to whole numbers, halves away from zero, and clip to these; order 0 does not need it.

    Returns
    -------
    ndarray or Tensor of shape (n, size, size, channel)
        New memory, dtype of ``frames``; tensors of integers become float64 for orders above 0.
    """
    y, x = frames.shape[1:3]
    if isinstance(frames, np.ndarray):
        out: Any = _compiled(frames, size, order, limits)
    elif order == 0:
        rows, columns = (_on_device(_nearest, frames.device, n, size)[0] for n in (y, x))
        out = frames.index_select(1, rows).index_select(2, columns)
    else:
        exact = (_bilinear if order == 1 else _by_matrix)(frames.double(), size, order)
        if limits is not None:
            exact = (exact + exact.sign() / 2).trunc().clamp(*limits)
        out = exact.to(frames.dtype) if frames.dtype.is_floating_point else exact
    if zero_rim:
        for rim in (out[:, size - count_beyond(y, size) :], out[:, :, size - count_beyond(x, size) :]):
            rim[rim == rim] = 0  # NaN stays NaN
    return out


# --- indices and weights ----------------------------------------------------------------------------------


def _positions(n: int, m: int) -> np.ndarray:
    """Compute where scipy's zoom samples an axis of length ``n``, with its rounding in double precision."""
    step = (n - 1) / (m - 1) if m > 1 else 1.0
    return np.arange(m) * step


def count_beyond(n: int, m: int) -> int:
    """Count the last positions that scipy takes to be outside, because of that rounding."""
    return int((_positions(n, m) > n - 1).sum())


@functools.lru_cache(maxsize=64)
def _nearest(n: int, m: int) -> tuple[np.ndarray]:
    return (np.minimum(np.floor(_positions(n, m) + 0.5).astype(np.intp), n - 1),)


@functools.lru_cache(maxsize=64)
def _linear(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Find both neighbours of each of ``m`` positions, and their weights."""
    positions = np.minimum(_positions(n, m), n - 1)
    first = np.floor(positions).astype(np.intp)
    weight = 1.0 - (positions - first)
    # Where all weight is on the first, the second is the first: a NaN next to it must not spread.
    return first, np.where(weight < 1, first + 1, first), weight, 1.0 - weight


@functools.lru_cache(maxsize=64)
def _spline(n: int, m: int, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the first coefficient of each of ``m`` positions (m,) and the weights from there on (m, taps).

    Coefficients are mirrored about both ends.
    """
    positions = np.minimum(_positions(n, m), n - 1)[:, None]
    knots = np.arange(order + 2) - (order + 1) / 2
    index = np.floor(positions - (order - 1) / 2).astype(np.intp) + np.arange(order + 1)
    values = scipy.interpolate.BSpline.basis_element(knots, extrapolate=False)(positions - index)
    period = max(2 * (n - 1), 1)
    mirrored = np.abs(index) % period
    mirrored = np.minimum(mirrored, period - mirrored) if n > 1 else np.zeros_like(index)
    taps = min(order + 1, n)
    first = np.clip(index[:, 0], 0, n - taps)
    weights = np.zeros((m, taps))
    np.add.at(weights, (np.arange(m)[:, None], mirrored - first[:, None]), np.nan_to_num(values))
    return first, weights


@functools.lru_cache(maxsize=64)
def _spline_matrix(n: int, m: int, order: int) -> tuple[np.ndarray]:
    """Combine filter and weights into one linear map along an axis: (m, n), float64."""
    first, weights = _spline(n, m, order)
    matrix = np.zeros((m, n))
    np.put_along_axis(matrix, first[:, None] + np.arange(weights.shape[1]), weights, 1)
    filtered = scipy.ndimage.spline_filter1d(np.eye(n), order, axis=0, mode="mirror")
    return (matrix @ filtered,)


@functools.lru_cache(maxsize=256)
def _on_device(
    table: Callable[..., tuple[np.ndarray, ...]], device: torch.device, *arguments: int
) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(part).to(device) for part in table(*arguments))


# --- in torch ---------------------------------------------------------------------------------------------


def _bilinear(exact: Tensor, size: int, order: int) -> Tensor:
    """Add the four terms up in scipy's own order."""
    y0, y1, above, below = _on_device(_linear, exact.device, exact.shape[1], size)
    x0, x1, left, right = _on_device(_linear, exact.device, exact.shape[2], size)
    terms = (
        (exact.index_select(1, y) * weight_y[:, None, None]).index_select(2, x) * weight_x[:, None]
        for y, weight_y in ((y0, above), (y1, below))
        for x, weight_x in ((x0, left), (x1, right))
    )
    out = next(terms)
    for term in terms:
        out += term
    return out


def _by_matrix(exact: Tensor, size: int, order: int) -> Tensor:
    along_y, along_x = (_on_device(_spline_matrix, exact.device, n, size, order)[0] for n in exact.shape[1:3])
    half = torch.einsum("yY,nYXc->nyXc", along_y, exact)
    return torch.einsum("xX,nyXc->nyxc", along_x, half)


# --- compiled ---------------------------------------------------------------------------------------------


def _compiled(frames: np.ndarray, size: int, order: int, limits: tuple[float, float] | None) -> np.ndarray:
    n, y, x, channels = frames.shape
    source = frames.reshape(n, y, x * channels)
    out = np.empty((n, size, size * channels), frames.dtype)
    whole = limits is not None
    lowest, highest = limits or (0.0, 0.0)
    if order == 0:
        # Only bytes are moved: one kernel for all dtypes of a size.
        unsigned = f"u{frames.dtype.itemsize}"
        (rows,), (columns,) = _nearest(y, size), _nearest(x, size)
        _gather(source.view(unsigned), out.view(unsigned), rows, _every_channel(columns, channels))
    elif order == 1:
        y0, y1, above, below = _linear(y, size)
        x0, x1 = (_every_channel(columns, channels) for columns in _linear(x, size)[:2])
        left, right = (np.repeat(weight, channels) for weight in _linear(x, size)[2:])
        _interpolate(source, out, y0, y1, above, below, x0, x1, left, right, whole, lowest, highest)
    else:
        poles = np.array(POLES[order])
        tables = (*_spline(y, size, order), *_spline(x, size, order))
        _evaluate_spline(source, out, channels, poles, *tables, whole, lowest, highest)
    return out.reshape(n, size, size, channels)


def _every_channel(columns: np.ndarray, channels: int) -> np.ndarray:
    """Turn indices along x into indices into the flattened (x, channel)."""
    return (columns[:, None] * channels + np.arange(channels)).ravel()


@compiled()
def _gather(frames, out, rows, columns):  # type: ignore[no-untyped-def]
    for f in range(out.shape[0]):
        for r in range(out.shape[1]):
            source = frames[f, rows[r]]
            target = out[f, r]
            for k in range(target.shape[0]):
                target[k] = source[columns[k]]


@compiled()
def _interpolate(  # type: ignore[no-untyped-def]
    frames, out, y0, y1, above, below, x0, x1, left, right, whole, lowest, highest
):
    # Not fastmath: every product is rounded, and they are added, in scipy's order.
    upper = np.empty(frames.shape[2])
    lower = np.empty(frames.shape[2])
    row = np.empty(out.shape[2])
    for f in range(out.shape[0]):
        for r in range(out.shape[1]):
            a = frames[f, y0[r]]
            b = frames[f, y1[r]]
            for k in range(upper.shape[0]):
                upper[k] = a[k] * above[r]
                lower[k] = b[k] * below[r]
            for k in range(row.shape[0]):
                value = upper[x0[k]] * left[k]
                value += upper[x1[k]] * right[k]
                value += lower[x0[k]] * left[k]
                value += lower[x1[k]] * right[k]
                row[k] = value
            _store(row, out[f, r], whole, lowest, highest)


@compiled()
def _evaluate_spline(  # type: ignore[no-untyped-def]
    frames, out, channels, poles, first_y, weights_y, first_x, weights_x, whole, lowest, highest
):
    """Resize along y in blocks of columns, then along x in blocks of rows, which are transposed for it."""
    n, y, wide = frames.shape
    m = out.shape[1]
    x, m_x = wide // channels, out.shape[2] // channels
    half = np.empty((m, wide))
    columns = np.empty((y, min(LANES, wide)))
    rows = np.empty((x, min(ROWS, m) * channels))
    weighted = np.empty(rows.shape[1])
    resized = np.empty((ROWS, out.shape[2]))
    for f in range(n):
        for start in range(0, wide, LANES):
            width = min(LANES, wide - start)
            for i in range(y):
                for k in range(width):
                    columns[i, k] = frames[f, i, start + k]
            _to_coefficients(columns, poles)
            for r in range(m):
                _weigh(columns, first_y[r], weights_y[r], half[r, start : start + width])
        for start in range(0, m, ROWS):
            height = min(ROWS, m - start)
            for r in range(height):
                for i in range(x):
                    for c in range(channels):
                        rows[i, r * channels + c] = half[start + r, i * channels + c]
            _to_coefficients(rows, poles)
            for s in range(m_x):
                _weigh(rows, first_x[s], weights_x[s], weighted)
                for r in range(height):
                    for c in range(channels):
                        resized[r, s * channels + c] = weighted[r * channels + c]
            for r in range(height):
                _store(resized[r], out[f, start + r], whole, lowest, highest)


@compiled(fastmath=FAST)
def _to_coefficients(samples, poles):  # type: ignore[no-untyped-def]
    """Turn samples (n, lane) into spline coefficients along the first axis, in place, mirrored at both ends.

    Unser, Aldroubi, Eden: B-spline signal processing, part II, IEEE Trans. Signal Processing 41(2), 1993.
    """
    n, lanes = samples.shape
    if n == 1:
        return
    gain = 1.0
    for z in poles:
        gain *= (1 - z) * (1 - 1 / z)
    for i in range(n):
        for k in range(lanes):
            samples[i, k] *= gain
    for z in poles:
        last = z ** (n - 1)
        power = z
        for k in range(lanes):
            samples[0, k] += last * samples[n - 1, k]
        for i in range(1, n - 1):
            if abs(power) < 1e-18:
                break
            for k in range(lanes):
                samples[0, k] += power * (samples[i, k] + last * samples[n - 1 - i, k])
            power *= z
        for k in range(lanes):
            samples[0, k] /= 1 - last * last
        for i in range(1, n):
            for k in range(lanes):
                samples[i, k] += z * samples[i - 1, k]
        for k in range(lanes):
            samples[n - 1, k] = (z * samples[n - 2, k] + samples[n - 1, k]) * (z / (z * z - 1))
        for i in range(n - 2, -1, -1):
            for k in range(lanes):
                samples[i, k] = z * (samples[i + 1, k] - samples[i, k])


@compiled(fastmath=FAST)
def _weigh(coefficients, first, weights, out):  # type: ignore[no-untyped-def]
    for k in range(out.shape[0]):
        out[k] = weights[0] * coefficients[first, k]
    for tap in range(1, weights.shape[0]):
        for k in range(out.shape[0]):
            out[k] += weights[tap] * coefficients[first + tap, k]


@compiled()
def _store(row, out, whole, lowest, highest):  # type: ignore[no-untyped-def]
    if whole:
        for k in range(out.shape[0]):
            out[k] = min(max(np.trunc(row[k] + math.copysign(0.5, row[k])), lowest), highest)
    else:
        for k in range(out.shape[0]):
            out[k] = row[k]
