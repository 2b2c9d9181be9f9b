"""Forecast errors that benchmarks of learned solvers report: over pixels, along the rim, by wavenumber.

    max-error                       max |a − b|                                    PDEBench, The Well
    nmae                            mean |a − b| / (mean |a| + 1e-7)                The Well
    crmse                           |mean a − mean b|                              PDEBench
    brmse                           root mean square along the rim                 PDEBench
    frmse-low, -mid, -high          amplitudes of the error by wavenumber          PDEBench
    spectral-mse-low, -mid, -high   share of bands of waves in the mean square     The Well
    h1                              error, and errors of both derivatives          APEBench

Values are on [0, 1], or in their own units with the scope "none". Benchmarks report each channel: here the
distance is the mean over channels, or for ``max-error`` and ``nmae`` over all values.

A Fourier transform is linear, so each frame is transformed once, in double precision. û are coefficients
divided by the number of pixels; frames are taken as periodic, without a window.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lsim.compiled import compiled
from lsim.embedding import difference_of
from lsim.error_bounds import CONFIDENCE, HALF_ULP_OF_DOUBLE
from lsim.metric import Embedding, Metric, MetricInfo, positive_number, safe_sqrt
from lsim.pairs import (
    FAST,
    all_pairs,
    compare_in_torch,
    has_kernel,
    rows_in_torch,
    squared_differences,
    sums_of_differences,
)
from lsim.pixel_means import PixelMeans, in_rows, mean_of, where_counted
from lsim.preprocess import Preprocessing
from lsim.rounding import FULL_SCALE, of_difference, of_each, of_sum, size_of_difference
from lsim.threads import in_threads

EPSILON = 1e-7
"""Number that The Well adds to a mean that it divides by."""

LOW_BELOW = 4
"""First wavenumber of PDEBench's middle band (its ``iLow``)."""

HIGH_FROM = 12
"""First wavenumber of PDEBench's high band (its ``iHigh``)."""

TRANSFORM = 2.0**-47
"""Rounding of a transform of values on [0, 1], as an error of the values."""

PLAIN = frozenset({"non-negative", "symmetric", "zero-on-itself"})
NORM = PLAIN | {"triangle"}


# --- over pixels --------------------------------------------------------------------------------------------


class MaxError(PixelMeans):
    """Largest absolute difference of any value, on [0, 1]: the L∞ norm of the error.

    Examples
    --------
    >>> import lsim
    >>> lsim.load_metric("max-error", size=None).distance([[0.0, 0.0]], [[1.0, 3.0]], scope="none")
    array([3.])
    """

    info = MetricInfo(
        title="largest absolute difference",
        source="max |a − b|; PDEBench max error (Takamoto et al., NeurIPS 2022), The Well LInfinity",
        axioms=NORM,
        takes_mask=True,
        one_channel_suffices=True,
        takes_physical_values=True,
        power_of_units=1,
    )

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        if not self._has_kernel(a, b):
            return compare_in_torch(self.paired, a, b)
        x, y = (side.parts["values"].flatten(1).numpy() for side in (a, b))
        return all_pairs(
            largest_difference, len(x), len(y), x, y, symmetric=a is b, operations=2 * x.shape[1]
        )

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        difference, weights = _errors(self, a, b)
        largest = difference.abs().flatten(1).amax(1) / FULL_SCALE
        return largest if weights is None else torch.where(weights.flatten(1).any(1), largest, math.nan)

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound a norm of the difference: by the largest error of a value, and by the rounding of the sum."""
        return of_difference(a, b) + of_sum(distances, a.parts["values"].dtype)


class NMAE(PixelMeans):
    """Mean absolute difference over the mean magnitude of the reference, the first argument.

    Not symmetric, as ``nrmse``: mean |a − b| / (mean |a| + 1e-7).
    """

    info = MetricInfo(
        title="mean absolute difference, over the mean magnitude of the reference",
        source="The Well (Ohana et al., NeurIPS 2024), NMAE",
        axioms=PLAIN - {"symmetric"},
        takes_mask=True,
        takes_weights=True,
        one_channel_suffices=True,
        takes_physical_values=True,
    )

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        if not self._has_kernel(a, b, with_rest=True):
            return rows_in_torch(self.paired, a, b)
        x = a.parts["values"].flatten(1)
        y = x if a is b else b.parts["values"].flatten(1)
        rests = (a.parts["rest"].flatten(1), b.parts["rest"].flatten(1)) if "rest" in a.parts else None
        columns = x.shape[1]
        sums = sums_of_differences(x, y, rests)
        return sums / (_sums_of_magnitudes(a)[:, None] + EPSILON * FULL_SCALE * columns)

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        difference, weights = _errors(self, a, b)
        error = mean_of(difference.abs().flatten(1), in_rows(weights))[:, 0] / FULL_SCALE
        return error / self._divisor_paired(a, b)

    def _divisor_paired(self, a: Embedding, b: Embedding) -> Tensor:
        """Add 1e-7 to the mean magnitude of the reference on [0, 1], over pixels that count: (len(b),)."""
        weights = in_rows(self.find_counted(a, b))
        reference = a.parts["values"].flatten(1).double().abs().expand(len(b), -1)
        return mean_of(where_counted(reference, weights), weights)[:, 0] / FULL_SCALE + EPSILON

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound a norm over another norm."""
        error = of_difference(a, b, mean=True) + distances * of_each(a, mean=True)[:, None] / FULL_SCALE
        if self.preprocessing.mask:
            sizes = rows_in_torch(self._divisor_paired, a, b)
        elif self._has_kernel(a, b, with_rest=True):
            values = a.parts["values"][0].numel() * FULL_SCALE
            sizes = _sums_of_magnitudes(a)[:, None] / values + EPSILON
        else:
            sizes = torch.cat([self._divisor_paired(frame, frame) for frame in a])[:, None]
        return error / sizes + of_sum(distances, a.parts["values"].dtype)


class ConservedError(PixelMeans):
    """Difference of the means of each channel, and the mean of all channels, on [0, 1].

    Shows how much a solver gains or loses of a conserved quantity; blind to its place.
    """

    info = MetricInfo(
        title="absolute difference of the means",
        source="PDEBench (Takamoto et al., NeurIPS 2022), cRMSE",
        axioms=NORM,
        takes_mask=True,
        takes_weights=True,
        one_channel_suffices=True,
        takes_physical_values=True,
        power_of_units=1,
    )

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        if not self._has_kernel(a, b):
            return compare_in_torch(self.paired, a, b)
        x, y = (side.once("channel means", functools.partial(_channel_means, side)) for side in (a, b))
        return (x[:, None] - y).abs().mean(2) / FULL_SCALE

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        return mean_of(*_errors(self, a, b))[:, 0].abs().mean(1) / FULL_SCALE

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound by the error of one value: errors that are alike in all pixels don't cancel in their mean.

        Sums of values, most of which cancels, add their own rounding in double precision.
        """
        partly = self.preprocessing.mask or self.pixel_weights is not None
        if "rest" in a.parts:
            sizes = self._mean_size(a, b)
        else:
            x = _sizes(a, partly)
            sizes = x[:, None] + (x if a is b else _sizes(b, partly))
        terms = CONFIDENCE * math.sqrt(a.parts["values"].shape[1]) + 4
        rounding_of_sums = terms * HALF_ULP_OF_DOUBLE * sizes / FULL_SCALE
        return (
            of_difference(a, b, stored=True, mean=True) + of_sum(distances, torch.float64) + rounding_of_sums
        )


class BoundaryError(PixelMeans):
    """Root mean square difference along the rim of each channel, and the mean of all channels, on [0, 1].

    Over the first and last row and the first and last column: corners count twice, as in PDEBench's code.
    """

    info = MetricInfo(
        title="root mean squared difference along the rim",
        source="PDEBench (Takamoto et al., NeurIPS 2022), bRMSE",
        axioms=NORM,
        takes_mask=True,
        takes_weights=True,
        one_channel_suffices=True,
        takes_physical_values=True,
        power_of_units=1,
    )
    shares_embedding = ""

    def _select_pixels(self, frames: Tensor) -> Tensor:
        """Select the rim: (n, y, x, channel) → (n, pixel, channel)."""
        return torch.cat([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], 1)

    def weighted(self, weights: ArrayLike) -> Self:
        """Return the metric with weighted means, see :meth:`~lsim.Metric.weighted`; not all 0 on the rim."""
        metric = super().weighted(weights)
        pixels = metric.pixel_weights
        if pixels is not None and not self._select_pixels(pixels[None, ..., None]).any():
            raise ValueError(
                f"metric {self.name!r} is a mean along the rim, where all weights of pixels are 0: give "
                "weights with some above 0 there, or leave this metric out"
            )
        return metric

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        if not self._has_kernel(a, b):
            return compare_in_torch(self.paired, a, b)
        x, y = (side.parts["values"].double().transpose(1, 2).contiguous().numpy() for side in (a, b))
        sums = all_pairs(sum_of_norms, len(x), len(y), x, y, symmetric=a is b, operations=x[0].size)
        return sums / (x.shape[2] ** 0.5 * x.shape[1] * FULL_SCALE)

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        difference, weights = _errors(self, a, b)
        return safe_sqrt(mean_of(difference.square(), weights)[:, 0]).mean(1) / FULL_SCALE

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound by the largest error of a value, since the rim may have the largest ones."""
        return of_difference(a, b) + of_sum(distances, a.parts["values"].dtype)


def _errors(metric: PixelMeans, a: Embedding, b: Embedding) -> tuple[Tensor, Tensor | None]:
    """Subtract pairs in double, with 0 for pixels that don't count, and find those that do."""
    weights = metric.find_counted(a, b)
    if "rest" in a.parts:
        return where_counted(difference_of(a, b, "values"), weights), weights
    difference = a.parts["values"].double() - b.parts["values"].double()
    return where_counted(difference, weights), weights


def _sizes(embedding: Embedding, masked: bool) -> Tensor:
    """Bound the mean magnitude of each frame's values: (n,) float64."""
    rows = embedding.parts["values"].flatten(1)
    if masked:  # the mean may be over any of the pixels
        return rows.nan_to_num().abs().amax(1).double()
    return torch.linalg.vector_norm(rows, dim=1).double() / rows.shape[1] ** 0.5


def _sums_of_magnitudes(embedding: Embedding) -> Tensor:
    """Add up the magnitudes of each frame's values by a kernel: (n,) float64."""
    rows = embedding.parts["values"].flatten(1)

    def add_up() -> Tensor:
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        return torch.tensor([_sum_of_magnitudes(row) for row in rows.numpy()], dtype=dtype)

    return embedding.once("sums of magnitudes", add_up)


def _channel_means(embedding: Embedding) -> Tensor:
    """Average each channel by a kernel: (n, channel) float64."""
    values = embedding.parts["values"].numpy()
    return torch.from_numpy(np.stack([channel_means(frame) for frame in values]))


# --- by wavenumber ------------------------------------------------------------------------------------------


class _ByWavenumber(Metric):
    """A sum of norms of parts of the error's Fourier transform; a frame's coefficients are its embedding."""

    copies_to_compare = False
    takes_rest = True
    rest_of_units = False

    def embed(self, frames: Tensor) -> Embedding:
        """Compute coefficients, scaled such that norms add up to the distance: (n, part, value) float64."""
        run = in_threads if has_kernel(frames) else map
        values = torch.cat(list(run(self._transformed, frames.split(1))))
        gain = self._gain(frames.shape[1], frames.shape[2])
        return Embedding({"values": values, "gain": values.new_full((len(values),), gain)})

    def embed_with_rest(self, frames: Tensor, rest: Tensor) -> Embedding:
        """Keep frames with their rest: the transform of a pair is that of their difference."""
        gain = frames.new_full((len(frames),), self._gain(frames.shape[1], frames.shape[2]))
        return Embedding({"frames": frames, "rest": rest, "gain": gain})

    @abstractmethod
    def _transformed(self, frames: Tensor) -> Tensor:
        """Transform frames (n, y, x, channel) into scaled coefficients (n, part, value), float64."""

    @abstractmethod
    def _gain(self, y: int, x: int) -> float:
        """Bound how far errors of values with the root mean square 1 move the sum of norms.

        By Parseval's theorem: the squares of coefficients add up to the mean square of the values.
        """

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound a sum of norms; the transform's own rounding counts as an error of values.

        With the rest of frames, it is the rounding of their difference's transform.
        """
        return self._bound_norms(a, b) + of_sum(distances, torch.float64)

    def _bound_norms(self, a: Embedding, b: Embedding) -> Tensor:
        """Bound the error of the sum of norms by that of the values: (len(a), len(b))."""
        size = rows_in_torch(size_of_difference, a, b) if "rest" in a.parts else 1.0
        return (of_difference(a, b, mean=True) + TRANSFORM * size) * a.parts["gain"][:, None]

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        if "rest" in a.parts or not has_kernel(a.parts["values"], b.parts["values"]):
            return compare_in_torch(self.paired, a, b)
        x, y = a.parts["values"], b.parts["values"]
        return all_pairs(
            sum_of_norms,
            len(x),
            len(y),
            x.numpy(),
            y.numpy(),
            symmetric=a is b,
            operations=x[0].numel(),
        )

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        return safe_sqrt(self._difference(a, b).square().sum(2)).sum(1)

    def _difference(self, a: Embedding, b: Embedding) -> Tensor:
        """Subtract coefficients, or transform the difference of frames with their rest."""
        if "rest" in a.parts:
            return self._transformed(difference_of(a, b, "frames"))
        return difference_of(a, b, "values")


class _FourierError(_ByWavenumber):
    """Mean over a band of wavenumbers k of √(Σ |û_a − û_b|²), the sum over ⌊|(ky, kx)|⌋ = k.

    As in PDEBench's code: over the quarter of coefficients with 0 <= ky < ⌊y/2⌋ and 0 <= kx < ⌊x/2⌋, k up to
    the smaller of these, and the mean over those wavenumbers of the band that exist.
    """

    band: ClassVar[slice]

    def _transformed(self, frames: Tensor) -> Tensor:
        _, y, x, channels = frames.shape
        transform = torch.fft.fft2(frames.permute(0, 3, 1, 2).double() / FULL_SCALE, norm="forward")
        quarter = transform[..., : y // 2, : x // 2].flatten(2)
        members, present = _quarter_shells(y // 2, x // 2, self.band.start, self.band.stop, frames.device)
        shells = quarter[:, :, members] * (present / (len(members) * channels))
        return torch.cat([shells.real, shells.imag], -1).flatten(1, 2)

    def _gain(self, y: int, x: int) -> float:
        return 1 / math.sqrt(len(range(min(y, x) // 2)[self.band]))


def _fourier_info(band: str, smallest: int) -> MetricInfo:
    return MetricInfo(
        title=f"root mean squared difference of {band} wavenumbers",
        source="PDEBench (Takamoto et al., NeurIPS 2022), fRMSE",
        axioms=NORM,
        minimum_size=smallest,
        one_channel_suffices=True,
        takes_physical_values=True,
        power_of_units=1,
    )


class LowFourierError(_FourierError):
    """Error of PDEBench's low wavenumbers, 0 to 3: see :class:`_FourierError`."""

    info = _fourier_info("low", 2)
    band = slice(0, LOW_BELOW)


class MidFourierError(_FourierError):
    """Error of PDEBench's middle wavenumbers, 4 to 11: see :class:`_FourierError`."""

    info = _fourier_info("middle", 2 * (LOW_BELOW + 1))
    band = slice(LOW_BELOW, HIGH_FROM)


class HighFourierError(_FourierError):
    """Error of PDEBench's high wavenumbers, from 12 on: see :class:`_FourierError`."""

    info = _fourier_info("high", 2 * (HIGH_FROM + 1))
    band = slice(HIGH_FROM, None)


class _BandError(_ByWavenumber):
    """Share of a band of waves in the mean squared difference: all three shares add up to ``l2``.

    Edges are The Well's: 0, then evenly spaced on a logarithmic scale from 2π / side to π √2, in single
    precision.
    """

    band: ClassVar[int]

    def _transformed(self, frames: Tensor) -> Tensor:
        _, y, x, channels = frames.shape
        transform = torch.fft.rfft2(frames.permute(0, 3, 1, 2).double() / FULL_SCALE, norm="forward")
        members, weights = _band_members(y, x, self.band, frames.device)
        band = transform.flatten(2)[:, :, members] * (weights / channels).sqrt()
        return torch.cat([band.real, band.imag], -1).flatten(1)[:, None]

    def _gain(self, y: int, x: int) -> float:
        return 1.0

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound the square of a norm."""
        error = self._bound_norms(a, b)
        return error * (2 * distances.sqrt() + error) + of_sum(distances, torch.float64)

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        if "rest" in a.parts or not has_kernel(a.parts["values"], b.parts["values"]):
            return compare_in_torch(self.paired, a, b)
        x, y = a.parts["values"].flatten(1), b.parts["values"].flatten(1)
        return all_pairs(
            squared_differences,
            len(x),
            len(y),
            x.numpy(),
            y.numpy(),
            symmetric=a is b,
            operations=x.shape[1],
        )

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        return self._difference(a, b).square().sum((1, 2))


def _band_info(band: str) -> MetricInfo:
    return MetricInfo(
        title=f"mean squared difference of {band} wavenumbers",
        source="The Well (Ohana et al., NeurIPS 2024), binned spectral MSE",
        axioms=PLAIN,
        minimum_size=8,
        one_channel_suffices=True,
        takes_physical_values=True,
        power_of_units=2,
    )


class LowBandError(_BandError):
    """Share of The Well's lowest band: see :class:`_BandError`."""

    info = _band_info("low")
    band = 0


class MidBandError(_BandError):
    """Share of The Well's middle band: see :class:`_BandError`."""

    info = _band_info("middle")
    band = 1


class HighBandError(_BandError):
    """Share of The Well's highest band: see :class:`_BandError`."""

    info = _band_info("high")
    band = 2


class SobolevError(_ByWavenumber):
    """Root mean square difference of values and of both spectral derivatives: the error in H¹.

    APEBench adds the three roots up: RMS(d) + RMS(∂d/∂x) + RMS(∂d/∂y). The textbook's norm, which is
    equivalent, is the root of the sum of their squares.

    Parameters
    ----------
    name, preprocessing, device
        As :class:`~lsim.metric.Metric` takes them.
    extent : float, default 1
        Length of the frame's longer side, in which derivatives are taken; pixels are squares. As in APEBench
        (``domain_extent``) means are integrals over the domain: other extents scale with √(area), too.
    combine : {"sum", "root"}, default "sum"
        APEBench's or the textbook's norm.

    Examples
    --------
    >>> import lsim
    >>> lsim.load_metric("h1", size=None).distance([[0.0, 0.0]] * 2, [[1.0, 1.0]] * 2, scope="none")
    array([1.])
    """

    info = MetricInfo(
        title="root mean squared difference of values and first derivatives",
        source="Sobolev norm H¹; APEBench (Koehler et al., NeurIPS 2024), exponax H1_RMSE",
        axioms=NORM,
        minimum_size=2,
        one_channel_suffices=True,
        takes_physical_values=True,
        power_of_units=1,
    )

    def __init__(
        self,
        name: str,
        preprocessing: Preprocessing,
        device: torch.device,
        *,
        extent: float = 1.0,
        combine: str = "sum",
    ) -> None:
        extent = positive_number(name, "extent", extent)
        if combine not in ("sum", "root"):
            raise ValueError(f"option 'combine' of metric {name!r} is 'sum' or 'root', got {combine!r}")
        super().__init__(name, preprocessing, device, extent=extent, combine=combine)

    def _transformed(self, frames: Tensor) -> Tensor:
        _, y, x, channels = frames.shape
        transform = torch.fft.rfft2(frames.permute(0, 3, 1, 2).double() / FULL_SCALE, norm="forward")
        factors = _derivative_factors(y, x, self.options["extent"], frames.device) / channels
        parts = torch.stack([transform.real, transform.imag], 2).flatten(3)[:, :, None] * factors[:, None]
        # (1, channel, part, real and imaginary, coefficient)
        parts = parts.flatten(3)
        return parts.flatten(1, 2) if self.options["combine"] == "sum" else parts.flatten(2)

    def _gain(self, y: int, x: int) -> float:
        extent = self.options["extent"]
        largest = 2 * math.pi * (max(y, x) // 2) / extent
        area = math.sqrt(y * x) / max(y, x) * extent
        return area * (
            1 + 2 * largest if self.options["combine"] == "sum" else math.hypot(1, largest, largest)
        )


@functools.lru_cache(maxsize=16)
def _quarter_shells(
    y: int, x: int, start: int, stop: int | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """List the members of each shell of a quarter plane (y, x), padded with 0, and mark them by 1, else 0."""
    # Floating point first: torch.compile has no hypot of integers.
    shell = np.floor(np.hypot(*np.indices((y, x)).astype(np.float64))).astype(np.int64).ravel()
    rows = [np.flatnonzero(shell == k) for k in range(min(y, x))[start:stop]]
    members = np.zeros((len(rows), max(map(len, rows))), np.int64)
    present = np.zeros(members.shape)
    for k, row in enumerate(rows):
        members[k, : len(row)], present[k, : len(row)] = row, 1
    return torch.from_numpy(members).to(device), torch.from_numpy(present).to(device)


def _multiplicity(y: int, x: int) -> np.ndarray:
    """Count how often each coefficient of a real transform of (y, x) stands in the whole plane: 1 or 2."""
    column = np.broadcast_to(np.arange(x // 2 + 1), (y, x // 2 + 1))
    return np.where((column > 0) & (2 * column != x), 2.0, 1.0)


@functools.lru_cache(maxsize=16)
def _band_members(y: int, x: int, band: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """List coefficients of the half plane in one of The Well's bands, and how often each occurs."""
    # In single precision and in The Well's order: some edges lie on wavenumbers, up to rounding.
    first, last = np.log10(2 * np.pi / max(y, x)), np.log10(np.pi * np.sqrt(2) + 1e-6)
    edges = torch.logspace(first, last, 4, dtype=torch.float32)
    edges[0] = 0
    squares = torch.zeros(y, x, dtype=torch.float32)
    squares += (2 * np.pi * torch.fft.fftfreq(y, dtype=torch.float32))[:, None] ** 2
    squares += (2 * np.pi * torch.fft.fftfreq(x, dtype=torch.float32))[None] ** 2
    index = torch.bucketize(squares.sqrt()[:, : x // 2 + 1].contiguous(), edges, right=True) - 1
    members = torch.from_numpy(np.flatnonzero(index.numpy().ravel() == band))
    weights = torch.from_numpy(_multiplicity(y, x).ravel())[members]
    return members.to(device), weights.to(device)


@functools.lru_cache(maxsize=16)
def _derivative_factors(y: int, x: int, extent: float, device: torch.device) -> Tensor:
    """Compute factors of coefficients for the value and its derivatives along x and y: (3, coefficient)."""
    height, width = (extent * side / max(y, x) for side in (y, x))
    ky, kx = np.fft.fftfreq(y, height / y)[:, None], np.fft.rfftfreq(x, width / x)[None]
    shape = np.broadcast_shapes(ky.shape, kx.shape)
    scale = np.sqrt(_multiplicity(y, x) * height * width)
    factors = np.stack([np.ones(shape), *(2 * np.pi * np.broadcast_to(np.abs(k), shape) for k in (kx, ky))])
    return torch.from_numpy((factors * scale).reshape(3, -1)).to(device)


# --- kernels ------------------------------------------------------------------------------------------------


@compiled(fastmath=FAST)
def largest_difference(i, j, out, x, y):  # type: ignore[no-untyped-def]
    """Add max_k |x[i[p], k] − y[j[p], k]|, on [0, 1], to out[p]."""
    for p in range(i.shape[0]):
        a = x[i[p]]
        b = y[j[p]]
        largest = 0.0
        for k in range(a.shape[0]):
            difference = abs(np.float64(a[k]) - np.float64(b[k]))
            largest = difference if difference > largest else largest
        out[p] += largest / 255


@compiled(fastmath=FAST)
def sum_of_norms(i, j, out, x, y):  # type: ignore[no-untyped-def]
    """Add Σ_s √(Σ_k (x[i[p], s, k] − y[j[p], s, k])²) to out[p]."""
    for p in range(i.shape[0]):
        total = 0.0
        for s in range(x.shape[1]):
            a = x[i[p], s]
            b = y[j[p], s]
            squares = 0.0
            for k in range(a.shape[0]):
                difference = a[k] - b[k]
                squares += difference * difference
            total += np.sqrt(squares)
        out[p] += total


@compiled(fastmath=FAST)
def channel_means(frame):  # type: ignore[no-untyped-def]
    """Average each column of (pixel, channel), in double."""
    pixels, channels = frame.shape
    sums = np.zeros(channels)
    for k in range(pixels):
        for c in range(channels):
            sums[c] += np.float64(frame[k, c])
    return sums / pixels


@compiled(fastmath=FAST)
def _sum_of_magnitudes(row):  # type: ignore[no-untyped-def]
    total = 0.0
    for k in range(row.shape[0]):
        total += abs(np.float64(row[k]))
    return total
