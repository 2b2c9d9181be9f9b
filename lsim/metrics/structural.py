"""Structural similarity (SSIM), at one scale and at five, computed as a difference.

1 − SSIM is what ranks simulations, and on frames that hardly differ SSIM is 1 to all digits. With window
means µ, variances σ² and constants C₁, C₂ (Wang et al. 2004, eq. 13)

    1 − SSIM = P + Q − P·Q,   P = (µx − µy)² / (µx² + µy² + C₁),   Q = var(x − y) / (σx² + σy² + C₂),

which loses nothing. µ² + C₁/2 and σ² + C₂/2 are computed once per frame; a pair costs the moments of x − y.

Where two bright frames differ by a nearly constant offset, var(x − y) is far below the offset's square:
E[d²] − E[d]² would leave rounding, and running sums would keep that of values which have left the window.
So squares are taken about means throughout: merged two groups at a time for the uniform window (Chan, Golub,
LeVeque 1983), about the centre for the Gaussian one. Single precision then is exact to 1e-6 of the distance.
Frames in double precision are compared point by point in each window, which is slower by far.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lsim.compiled import compiled
from lsim.doubles import add
from lsim.error_bounds import as_floats
from lsim.metric import Embedding, Metric, MetricInfo, positive_number
from lsim.pairs import FAST, PairKernel, all_pairs, has_kernel, is_plain, rows_in_torch
from lsim.preprocess import Preprocessing
from lsim.rounding import FULL_SCALE, of_difference, of_sum
from lsim.threads import in_threads

Window: TypeAlias = Literal["uniform", "gaussian"]

TAPS = {"uniform": 7, "gaussian": 11}
TITLES: dict[Window, str] = {
    "uniform": "1 − SSIM, uniform 7×7 window",
    "gaussian": "1 − SSIM, Gaussian window, σ 1.5",
}
SAMPLE = 49 / 48
"""Ratio of the sample covariance, skimage's default, to the variance of a uniform window's 49 values."""

SIGMA = 1.5
"""Standard deviation of the Gaussian window, in pixels."""

_BELL = np.exp(-(np.arange(6) ** 2) / (2 * SIGMA**2))
_BELL /= _BELL[0] + 2 * _BELL[1:].sum()
"""The Gaussian window from its centre outward; it adds to 1 over the eleven taps."""

_BELL_TAPS = [float(_BELL[abs(k)]) for k in range(-5, 6)]
"""All taps, as Python's numbers: torch.compile traces NumPy, and reversed slices wrongly."""

CONTRAST = 0.7
"""Share of an error of values that remains in a window's deviation: 0.4 of errors without a pattern, which
add up as squares over both frames."""

HALVING = 1.5
"""Bound on errors against half of those of the next finer scale, from the second scale on: averages of 2×2
halve errors without a pattern."""

SAMPLES = 2048
"""Windows of a frame that its divisors are averaged over for bounds."""

SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the five scales, the finest first (Wang et al. 2003, section 3.2)."""


class _Structural(Metric):
    """Means over the windows of one scale, which SSIM and MS-SSIM share."""

    copies_to_compare = False
    takes_rest = True

    def __init__(
        self,
        name: str,
        preprocessing: Preprocessing,
        device: torch.device,
        averaged_by: Window,
        data_range: float,
        **options: Any,
    ) -> None:
        if averaged_by not in TAPS:
            raise ValueError(f"window must be one of {', '.join(map(repr, TAPS))}, got {averaged_by!r}")
        data_range = positive_number(name, "data_range", data_range)
        super().__init__(name, preprocessing, device, **options, data_range=data_range)
        self._window = averaged_by
        self._c1 = (0.01 * data_range) ** 2
        self._c2 = (0.03 * data_range) ** 2

    def _parts(self, planes: Tensor, scale: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Keep planes (n, channel, y, x), and compute µ² + C₁/2 and σ² + C₂/2 of their windows."""
        if has_kernel(planes) and dtype is torch.float32:
            moments = window_moments(planes.float().numpy(), self._window == "gaussian")
            mean, variance = map(torch.from_numpy, moments)
            luminance, contrast = mean.square_().add_(self._c1 / 2), variance.add_(self._c2 / 2)
        else:
            # Windows with missing pixels are left out later, by the differences of a pair.
            mean, variance = _moments(torch.where(planes.isnan(), 0, planes).double(), self._window)
            luminance, contrast = mean.square() + self._c1 / 2, variance + self._c2 / 2
        return {
            f"frames{scale}": planes,
            f"luminance{scale}": luminance.to(dtype),
            f"contrast{scale}": contrast.to(dtype),
        }

    def _error(self, a: Embedding, b: Embedding, part: str) -> Tensor:
        """Bound the error of the root of a square over the sum of a part of both frames: (len(a), len(b))."""
        x, y = (
            side.once(f"mean of 1 / {part}", functools.partial(_mean_reciprocal, side.parts[part]))
            for side in (a, b)
        )
        # Of a harmonic mean, 1 / (x + y) is a quarter at most.
        return FULL_SCALE * of_difference(a, b) * ((x[:, None] + y) / 4).sqrt()

    def _all_pairs(self, a: Embedding, b: Embedding, channels: range, scale: int, luminance: bool) -> Tensor:
        """Average 1 − SSIM, or without ``luminance`` Q, over the channels: (len(a), len(b)) float64."""
        bright = "luminance" if luminance else "contrast"
        parts = [f"{part}{scale}" for part in ("frames", bright, "contrast")]
        gaussian = self._window == "gaussian"
        # Without a rest, the kernel ignores the array in its place.
        parts.insert(1, f"rest{scale}" if f"rest{scale}" in a.parts else parts[0])
        arrays = [side.parts[part].numpy() for side in (a, b) for part in parts]
        rough = a.parts[f"contrast{scale}"]
        double = rough.dtype is torch.float64
        return all_pairs(
            structural_difference(
                gaussian, luminance, self.preprocessing.mask, double, f"rest{scale}" in a.parts
            ),
            len(a),
            len(b),
            channels.start,
            channels.stop,
            *arrays,
            symmetric=a is b,
            operations=(1000 if double else 100) * rough[0, 0].numel() * len(channels),
        )

    def _paired(self, a: Embedding, b: Embedding, scale: int, luminance: bool) -> Tensor:
        """Average 1 − SSIM, or Q, of a[k] and b[k] in each channel, in torch: (n, channel)."""
        x, y = a.parts, b.parts
        difference = (x[f"frames{scale}"] - y[f"frames{scale}"]).double()
        if f"rest{scale}" in x:
            difference = difference + (x[f"rest{scale}"] - y[f"rest{scale}"])
        rough = x[f"contrast{scale}"].double() + y[f"contrast{scale}"].double()
        if self.preprocessing.mask:
            missing = difference.isnan()
            difference = torch.where(missing, 0, difference)
            missing = F.max_pool2d(missing.float(), TAPS[self._window], 1) > 0
            rough = torch.where(missing, 1, rough)
        mean, variance = _moments(difference, self._window)
        value = variance / rough
        if luminance:
            bright = x[f"luminance{scale}"].double() + y[f"luminance{scale}"].double()
            if self.preprocessing.mask:
                bright = torch.where(missing, 1, bright)
            p = mean.square() / bright
            value = p + value - p * value
        if self.preprocessing.mask:
            return torch.where(missing, 0, value).sum((2, 3)) / (~missing).sum((2, 3))
        return value.mean((2, 3))


class _SSIM(_Structural):
    def __init__(
        self, name: str, preprocessing: Preprocessing, device: torch.device, window: Window, data_range: float
    ) -> None:
        super().__init__(name, preprocessing, device, window, data_range, window=window)
        self.info = replace(self.info, title=TITLES[window], minimum_size=TAPS[window])  # type: ignore[misc]

    def embed(self, frames: Tensor) -> Embedding:
        """Keep frames channel-first, and compute the denominators of windows that lie within the frame."""
        planes = _channel_first(frames)
        return Embedding(self._parts(planes, 0, planes.dtype))

    def embed_with_rest(self, frames: Tensor, rest: Tensor) -> Embedding:
        """Add the rest, channel-first."""
        return Embedding(self.embed(frames).parts | {"rest0": _channel_first(rest)})

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound squares P and Q: errors move their roots by as much, over the roots of the divisors."""
        error = self._error(a, b, "luminance0") + CONTRAST * self._error(a, b, "contrast0")
        return _of_squares(distances.clamp(min=0), error) + of_sum(distances, a.parts["contrast0"].dtype)

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        if not has_kernel(*a.parts.values(), *b.parts.values()):
            return rows_in_torch(self.paired, a, b)
        return self._all_pairs(a, b, range(a.parts["frames0"].shape[1]), 0, True)

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        return self._paired(a, b, 0, True).mean(1)


class SSIM(_SSIM):
    """1 − mean SSIM of all channels.

    Parameters
    ----------
    window : {"uniform", "gaussian"}
        ``"uniform"``: 7×7, sample covariance, as skimage by default. ``"gaussian"``: 11×11, σ 1.5,
        covariance of the population, as Wang et al. 2004, pytorch-msssim, and skimage with
        ``gaussian_weights=True, use_sample_covariance=False``.
    data_range : float, default 255
        L in C₁ = (0.01 L)² and C₂ = (0.03 L)².

    Examples
    --------
    >>> import lsim, numpy as np
    >>> float(lsim.load_metric("ssim", size=None).pairwise(np.stack([np.eye(8), np.eye(8)]))[0, 1])
    0.0
    """

    info = MetricInfo(
        title=TITLES["uniform"],
        source="Wang, Bovik, Sheikh, Simoncelli 2004, eq. 13; skimage structural_similarity",
        minimum_size=TAPS["uniform"],
        takes_mask=True,
        one_channel_suffices=True,
    )
    published_on_8bit = True
    algorithm_version = 2

    def __init__(
        self,
        name: str,
        preprocessing: Preprocessing,
        device: torch.device,
        *,
        window: Window = "uniform",
        data_range: float = 255.0,
    ) -> None:
        super().__init__(name, preprocessing, device, window, data_range)


class GaussianSSIM(_SSIM):
    """1 − mean SSIM of all channels with a Gaussian window: :class:`SSIM` under a name of its own."""

    info = replace(
        SSIM.info,
        title=TITLES["gaussian"],
        source="Wang, Bovik, Sheikh, Simoncelli 2004, eq. 13; pytorch-msssim ssim",
        minimum_size=TAPS["gaussian"],
    )

    def __init__(
        self,
        name: str,
        preprocessing: Preprocessing,
        device: torch.device,
        *,
        data_range: float = 255.0,
    ) -> None:
        super().__init__(name, preprocessing, device, "gaussian", data_range)


class MultiScaleSSIM(_Structural):
    """1 − MS-SSIM: contrast and structure at five scales, luminance at the coarsest; mean over channels.

    Frames are halved by averages of 2×2 from scale to scale, an odd side with a rim of zeros, as
    pytorch-msssim does. Of the mean Q at the finer scales and the mean 1 − SSIM at the coarsest,
    1 − Π (1 − Q)^w is taken through logarithms, which keep all digits of small ones.

    With a mask, an average that a missing pixel enters is missing. Scales at which no window of a pair is
    left are dropped: the coarsest of the others takes the luminance, and the exponents are scaled to the same
    sum.

    Parameters
    ----------
    data_range : float, default 255
        L in C₁ = (0.01 L)² and C₂ = (0.03 L)².
    """

    info = MetricInfo(
        title="1 − MS-SSIM, five scales, Gaussian window",
        source="Wang, Simoncelli, Bovik 2003, eq. 7; pytorch-msssim ms_ssim",
        minimum_size=161,
        saturates_at=1.0,
        takes_mask=True,
        one_channel_suffices=True,
    )
    algorithm_version = 2

    def __init__(
        self,
        name: str,
        preprocessing: Preprocessing,
        device: torch.device,
        *,
        data_range: float = 255.0,
    ) -> None:
        super().__init__(name, preprocessing, device, "gaussian", data_range)

    def embed(self, frames: Tensor) -> Embedding:
        """Keep for each scale the parts that SSIM keeps.

        Coarser frames are float64, since they are subtracted; so are all parts of the coarsest, since its
        SSIM is small where a bright frame meets a dark one.
        """
        planes = _channel_first(frames)
        rough = planes.dtype
        parts = self._parts(planes, 0, rough)
        for scale in range(1, len(SCALES)):
            planes = _halved(planes)
            last = scale == len(SCALES) - 1
            parts |= self._parts(planes, scale, torch.float64 if last else rough)
        if not self.preprocessing.mask:
            for scale in range(len(SCALES) - 1):
                del parts[f"luminance{scale}"]
        return Embedding(parts)

    def embed_with_rest(self, frames: Tensor, rest: Tensor) -> Embedding:
        """Halve frames with their rest."""
        parts = self.embed(frames).parts
        planes, remainder = _channel_first(frames), _channel_first(rest)
        parts["rest0"] = remainder
        for scale in range(1, len(SCALES)):
            planes, remainder = _halved_with_rest(planes, remainder)
            parts |= {f"frames{scale}": planes, f"rest{scale}": remainder}
        return Embedding(parts)

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound each scale like :class:`SSIM`, by at most the whole similarity.

        An error that is the same in a whole region passes averages, but has no contrast.
        """
        logarithm = -torch.log1p(-distances.clamp(0, 1 - 1e-9))
        last = len(SCALES) - 1
        bound = of_sum(distances, a.parts["contrast0"].dtype)
        for scale, weight in enumerate(SCALES):
            share = CONTRAST * (HALVING / 2**scale if scale else 1)
            error = share * self._error(a, b, f"contrast{scale}")
            if scale == last:
                error = error + self._error(a, b, f"luminance{scale}")
            bound = bound + weight * _of_squares((logarithm / weight).clamp(max=1), error)
        # The derivative of a power below 1, where little is left of it.
        return (bound / (1 - distances).clamp(min=0.05)).clamp(max=1)

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        if not has_kernel(*a.parts.values(), *b.parts.values()):
            return rows_in_torch(self.paired, a, b)
        channels = range(a.parts["frames0"].shape[1])
        means = (functools.partial(self._all_pairs, a, b, channels[k : k + 1]) for k in channels)
        return torch.stack([self._over_scales(functools.cache(mean)) for mean in means]).mean(0)

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        mean: Callable[[int, bool], Tensor] = functools.partial(self._paired, a, b)
        # Each scale is asked for once, but with a mask; torch.compile takes no cache.
        return self._over_scales(functools.cache(mean) if self.preprocessing.mask else mean).mean(1)

    def _over_scales(self, mean: Callable[[int, bool], Tensor], coarsest: int = len(SCALES) - 1) -> Tensor:
        """Combine the mean differences d at the scales, ``mean(scale, luminance)``: 1 − Π max(1 − d, 0)^w."""
        terms = [mean(scale, False) for scale in range(coarsest)] + [mean(coarsest, True)]
        differences = torch.stack(terms)
        missing = differences.isnan().any(0)
        # Infinity and NaN are kept out of the sums, so that they stay out of gradients.
        opposite = differences >= 1
        logarithms = torch.log1p(-torch.where(opposite | missing, 0, differences))
        weights = [weight * sum(SCALES) / sum(SCALES[: coarsest + 1]) for weight in SCALES[: coarsest + 1]]
        # One after another: torch's own sum adds in an order that depends on how many pairs there are.
        total = sum(weight * term for weight, term in zip(weights, logarithms, strict=True))
        distance = torch.where(opposite.any(0), 1, -torch.expm1(total))
        masked = self.preprocessing.mask
        if not masked or not coarsest or (is_plain(missing) and not missing.any()):
            return torch.where(missing, math.nan, distance)
        return torch.where(missing, self._over_scales(mean, coarsest - 1), distance)


def _mean_reciprocal(part: Tensor) -> Tensor:
    """Average 1 / part, which is nowhere 0, over some windows of each frame: (n,) float64."""
    windows = part.flatten(1)
    step = windows.shape[1] // SAMPLES | 1  # odd, so that it walks through all columns
    return windows[:, ::step].double().reciprocal().nanmean(1)


def _of_squares(squares: Tensor, error: Tensor) -> Tensor:
    """Bound what an error of the root does to the mean of squares, and the divisors' own."""
    return error * (2 * squares.sqrt() + 3 * squares + error)


def _channel_first(frames: Tensor) -> Tensor:
    return as_floats(frames.permute(0, 3, 1, 2)).contiguous()


def _halved(planes: Tensor) -> Tensor:
    """Average 2×2 of (n, channel, y, x), an odd side beginning with a zero: float64."""
    if has_kernel(planes):
        return torch.from_numpy(np.stack(in_threads(averages, planes.numpy())))
    y, x = planes.shape[2:]
    return F.avg_pool2d(planes.double(), 2, padding=(y % 2, x % 2))


def _halved_with_rest(planes: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Average 2×2 of pairs of doubles as :func:`_halved` does."""
    y, x = planes.shape[2:]
    padded = [F.pad(part / 4, (x % 2, 0, y % 2, 0)) for part in (planes, rest)]
    corners = [(padded[0][:, :, r::2, k::2], padded[1][:, :, r::2, k::2]) for r in (0, 1) for k in (0, 1)]
    halved, remainder = functools.reduce(add, corners)
    return halved.contiguous(), remainder.contiguous()


def _moments(planes: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Compute mean and variance in the windows of (n, channel, y, x) float64: in torch, with gradients."""
    if window == "uniform":
        mean, square = (F.avg_pool2d(values, TAPS[window], 1) for values in (planes, planes.square()))
        return mean, SAMPLE * (square - mean.square()).clamp(min=0)
    taps = torch.tensor(_BELL_TAPS, dtype=planes.dtype, device=planes.device)
    filters = taps[None, None, :, None].expand(planes.shape[1], 1, -1, 1)
    mean, square = (
        F.conv2d(F.conv2d(values, filters, groups=len(filters)), filters.mT, groups=len(filters))
        for values in (planes, planes.square())
    )
    return mean, (square - mean.square()).clamp(min=0)


# --- compiled: single precision, one plane at a time ------------------------------------------------------
#
# Small functions over a row, each with few arrays: LLVM vectorises a loop when it can tell at run time that
# the arrays don't overlap. Constants are single: a Python number would make the arithmetic double.

_f = np.float32
_HALF, _QUARTER, _TWO, _SIX = _f(1 / 2), _f(1 / 4), _f(2), _f(6)
_TWELFTH, _42ND, _14TH, _28TH, _84TH, _294TH = (_f(1 / k) for k in (12, 42, 14, 28, 84, 294))
_48TH, _49TH = _f(1 / 48), _f(1 / 49)
_W0, _W1, _W2, _W3, _W4, _W5 = map(_f, _BELL)
_H1, _H2, _H3, _H4, _H5 = map(_f, _BELL[1:] / 2)


def _compiled(function: Callable[..., Any]) -> Any:
    # Division as NumPy does it: a check for zero would keep loops from being vectorised.
    return compiled(fastmath=FAST, error_model="numpy")(function)


@functools.cache
def structural_difference(
    gaussian: bool, luminance: bool, masked: bool, double: bool, with_rest: bool
) -> PairKernel:
    """Compile a kernel that adds the mean of 1 − SSIM, or of Q alone, over windows to out[p].

    For frames i[p] of x and j[p] of y, (n, channel, y, x), over the channels from ``start`` to before
    ``stop``; ``bright`` is µ² + C₁/2 and ``rough`` σ² + C₂/2. If ``masked``, windows with NaN are left out,
    of all channels alike. The loop over channels is outside of that over pairs, so that one frame stays in
    the second-level cache. ``double`` is slow. The ``rest`` of frames is read if ``with_rest``.
    """
    dtype = np.float64 if double else np.float32

    @_compiled
    def kernel(  # type: ignore[no-untyped-def]
        i, j, out, start, stop, x, x_rest, x_bright, x_rough, y, y_rest, y_bright, y_rough
    ):
        rows, columns = x.shape[2:]
        height, width = x_bright.shape[2:]
        difference = np.empty((rows, columns), dtype)
        sums = np.empty(columns, dtype)
        squares = np.empty(columns, dtype)
        mean = np.empty(width, dtype)
        value = np.empty(width, dtype)
        for c in range(start, stop):
            for p in range(i.shape[0]):
                _subtract(x[i[p], c], y[j[p], c], difference)
                if with_rest:
                    _add_difference(x_rest[i[p], c], y_rest[j[p], c], difference)
                a_bright, b_bright = x_bright[i[p], c], y_bright[j[p], c]
                a_rough, b_rough = x_rough[i[p], c], y_rough[j[p], c]
                total = 0.0
                count = 0
                for r in range(height):
                    if double and gaussian:
                        _gaussian_windows_in_double(difference, r, mean, value)
                    elif double:
                        _uniform_windows_in_double(difference, r, mean, value)
                    elif gaussian:
                        _gaussian_columns(difference, r, sums, squares)
                        _gaussian_windows(sums, squares, mean, value)
                    else:
                        _uniform_columns(difference, r, sums, squares)
                        _uniform_windows(sums, squares, mean, value)
                    if luminance:
                        _one_minus_ssim(mean, value, r, a_bright, b_bright, a_rough, b_rough)
                    else:
                        _contrast(value, r, a_rough, b_rough)
                    if masked:
                        count += _drop_missing(value)
                    else:
                        count += width
                    total += _sum(value)
                out[p] += total / (count * (stop - start))

    return kernel


@_compiled
def window_moments(planes, gaussian):  # type: ignore[no-untyped-def]
    """Compute mean and variance in every window of (n, channel, y, x) float32, both float32."""
    n, channels, rows, columns = planes.shape
    rim = 10 if gaussian else 6
    mean = np.empty((n, channels, rows - rim, columns - rim), np.float32)
    variance = np.empty_like(mean)
    sums = np.empty(columns, np.float32)
    squares = np.empty(columns, np.float32)
    for f in range(n):
        for c in range(channels):
            for r in range(rows - rim):
                if gaussian:
                    _gaussian_columns(planes[f, c], r, sums, squares)
                    _gaussian_windows(sums, squares, mean[f, c, r], variance[f, c, r])
                else:
                    _uniform_columns(planes[f, c], r, sums, squares)
                    _uniform_windows(sums, squares, mean[f, c, r], variance[f, c, r])
    return mean, variance


@_compiled
def averages(planes):  # type: ignore[no-untyped-def]
    """Average 2×2 pixels of a frame (channel, y, x), an odd side padded with a zero first: float64."""
    channels, rows, columns = planes.shape
    odd = columns % 2
    out = np.zeros((channels, (rows + 1) // 2, (columns + 1) // 2))
    for c in range(channels):
        for r in range(rows):
            row = planes[c, r]
            into = out[c, (r + rows % 2) // 2]
            if odd:
                into[0] += row[0] / 4
            for k in range(columns // 2):
                into[odd + k] += (np.float64(row[odd + 2 * k]) + np.float64(row[odd + 2 * k + 1])) / 4
    return out


@_compiled
def _uniform_columns(plane, r, sums, squares):  # type: ignore[no-untyped-def]
    """Compute each column's sum and sum of squares about its mean over seven rows: pairs, four, six, seven.

    Groups of m and n values with sums S and T merge to M + N + (n S − m T)² / (m n (m + n)).
    """
    for k in range(sums.shape[0]):
        first = plane[r, k] + plane[r + 1, k]
        second = plane[r + 2, k] + plane[r + 3, k]
        third = plane[r + 4, k] + plane[r + 5, k]
        step = plane[r, k] - plane[r + 1, k]
        square = step * step
        step = plane[r + 2, k] - plane[r + 3, k]
        square += step * step
        step = plane[r + 4, k] - plane[r + 5, k]
        square = (square + step * step) * _HALF
        total = first + second
        difference = first - second
        square += difference * difference * _QUARTER
        difference = total - _TWO * third
        total += third
        square += difference * difference * _TWELFTH
        difference = total - _SIX * plane[r + 6, k]
        sums[k] = total + plane[r + 6, k]
        squares[k] = square + difference * difference * _42ND


@_compiled
def _uniform_windows(sums, squares, mean, variance):  # type: ignore[no-untyped-def]
    """Merge seven columns of seven values likewise, into mean and sample variance."""
    for k in range(mean.shape[0]):
        first = sums[k] + sums[k + 1]
        second = sums[k + 2] + sums[k + 3]
        third = sums[k + 4] + sums[k + 5]
        step = sums[k] - sums[k + 1]
        steps = step * step
        step = sums[k + 2] - sums[k + 3]
        steps += step * step
        step = sums[k + 4] - sums[k + 5]
        square = (steps + step * step) * _14TH
        total = first + second
        difference = first - second
        square += difference * difference * _28TH
        difference = total - _TWO * third
        total += third
        square += difference * difference * _84TH
        difference = total - _SIX * sums[k + 6]
        square += difference * difference * _294TH
        for q in range(7):
            square += squares[k + q]
        mean[k] = (total + sums[k + 6]) * _49TH
        variance[k] = square * _48TH


@_compiled
def _gaussian_columns(plane, r, mean, variance):  # type: ignore[no-untyped-def]
    """Compute the weighted mean and variance of each column's eleven rows, about the middle one.

    For values at equal weight above and below, s = a + b − 2c and t = a − b: their offsets from c add to s,
    and the squares of these to (s² + t²) / 2.
    """
    for k in range(mean.shape[0]):
        double = plane[r + 5, k] + plane[r + 5, k]
        s, t = plane[r + 4, k] + plane[r + 6, k] - double, plane[r + 4, k] - plane[r + 6, k]
        offset, square = _W1 * s, _H1 * (s * s + t * t)
        s, t = plane[r + 3, k] + plane[r + 7, k] - double, plane[r + 3, k] - plane[r + 7, k]
        offset, square = offset + _W2 * s, square + _H2 * (s * s + t * t)
        s, t = plane[r + 2, k] + plane[r + 8, k] - double, plane[r + 2, k] - plane[r + 8, k]
        offset, square = offset + _W3 * s, square + _H3 * (s * s + t * t)
        s, t = plane[r + 1, k] + plane[r + 9, k] - double, plane[r + 1, k] - plane[r + 9, k]
        offset, square = offset + _W4 * s, square + _H4 * (s * s + t * t)
        s, t = plane[r, k] + plane[r + 10, k] - double, plane[r, k] - plane[r + 10, k]
        offset, square = offset + _W5 * s, square + _H5 * (s * s + t * t)
        mean[k] = plane[r + 5, k] + offset
        variance[k] = square - offset * offset


@_compiled
def _gaussian_windows(m, v, mean, variance):  # type: ignore[no-untyped-def]
    """Merge eleven columns likewise, and add the variance within each."""
    for k in range(mean.shape[0]):
        double = m[k + 5] + m[k + 5]
        s, t = m[k + 4] + m[k + 6] - double, m[k + 4] - m[k + 6]
        offset, square = _W1 * s, _H1 * (s * s + t * t) + _W1 * (v[k + 4] + v[k + 6])
        s, t = m[k + 3] + m[k + 7] - double, m[k + 3] - m[k + 7]
        offset, square = offset + _W2 * s, square + _H2 * (s * s + t * t) + _W2 * (v[k + 3] + v[k + 7])
        s, t = m[k + 2] + m[k + 8] - double, m[k + 2] - m[k + 8]
        offset, square = offset + _W3 * s, square + _H3 * (s * s + t * t) + _W3 * (v[k + 2] + v[k + 8])
        s, t = m[k + 1] + m[k + 9] - double, m[k + 1] - m[k + 9]
        offset, square = offset + _W4 * s, square + _H4 * (s * s + t * t) + _W4 * (v[k + 1] + v[k + 9])
        s, t = m[k] + m[k + 10] - double, m[k] - m[k + 10]
        offset, square = offset + _W5 * s, square + _H5 * (s * s + t * t) + _W5 * (v[k] + v[k + 10])
        mean[k] = m[k + 5] + offset
        variance[k] = square + _W0 * v[k + 5] - offset * offset


@_compiled
def _gaussian_windows_in_double(plane, r, mean, variance):  # type: ignore[no-untyped-def]
    """Compute mean and variance in the Gaussian windows whose first row is r, point by point."""
    for k in range(mean.shape[0]):
        average = 0.0
        for q in range(11):
            for p in range(11):
                average += _BELL[abs(q - 5)] * _BELL[abs(p - 5)] * plane[r + q, k + p]
        square = 0.0
        for q in range(11):
            for p in range(11):
                deviation = plane[r + q, k + p] - average
                square += _BELL[abs(q - 5)] * _BELL[abs(p - 5)] * deviation * deviation
        mean[k] = average
        variance[k] = square


@_compiled
def _uniform_windows_in_double(plane, r, mean, variance):  # type: ignore[no-untyped-def]
    """Compute mean and sample variance in the uniform windows whose first row is r, point by point."""
    for k in range(mean.shape[0]):
        total = 0.0
        for q in range(7):
            for p in range(7):
                total += plane[r + q, k + p]
        average = total / 49
        square = 0.0
        for q in range(7):
            for p in range(7):
                deviation = plane[r + q, k + p] - average
                square += deviation * deviation
        mean[k] = average
        variance[k] = square / 48


@_compiled
def _one_minus_ssim(mean, value, r, x_bright, y_bright, x_rough, y_rough):  # type: ignore[no-untyped-def]
    """Turn the variance of differences in ``value`` into P + Q − P·Q, with one division."""
    for k in range(value.shape[0]):
        square = mean[k] * mean[k]
        bright = x_bright[r, k] + y_bright[r, k]
        rough = x_rough[r, k] + y_rough[r, k]
        value[k] = (square * rough + value[k] * (bright - square)) / (bright * rough)


@_compiled
def _contrast(value, r, x_rough, y_rough):  # type: ignore[no-untyped-def]
    """Turn the variance of differences in ``value`` into Q."""
    for k in range(value.shape[0]):
        value[k] /= x_rough[r, k] + y_rough[r, k]


@_compiled
def _subtract(x, y, difference):  # type: ignore[no-untyped-def]
    for r in range(difference.shape[0]):
        for k in range(difference.shape[1]):
            difference[r, k] = x[r, k] - y[r, k]


@_compiled
def _add_difference(x, y, difference):  # type: ignore[no-untyped-def]
    for r in range(difference.shape[0]):
        for k in range(difference.shape[1]):
            difference[r, k] += x[r, k] - y[r, k]


@_compiled
def _sum(values):  # type: ignore[no-untyped-def]
    total = values.dtype.type(0)
    for k in range(values.shape[0]):
        total += values[k]
    return total


@_compiled
def _drop_missing(values):  # type: ignore[no-untyped-def]
    """Replace NaN by 0, and count the other values."""
    count = 0
    for k in range(values.shape[0]):
        present = values[k] == values[k]
        values[k] = values[k] if present else values.dtype.type(0)
        count += present
    return count
