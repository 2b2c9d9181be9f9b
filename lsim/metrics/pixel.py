"""Metrics of pixel differences, on [0, 1] after the common normalisation.

Those of squared differences share one matrix of them in a run. With a mask, pixels missing in either frame
of a pair are left out of all that is summed for it: differences, normalisers and means. Every pixel counts
alike, or by its weight in all of these.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numba
import numpy as np
import torch
from torch import Tensor

from lsim.error_bounds import (
    CONFIDENCE,
    DIRECTLY,
    PROMISE,
    PairPrecision,
    ReportsPrecision,
    as_floats,
    number_of_pairs,
)
from lsim.gram import VALUES_TOGETHER, known_in_both
from lsim.metric import Embedding, Metric, MetricInfo, safe_sqrt
from lsim.pairs import (
    FAST,
    absolute_differences,
    all_pairs,
    carries_gradients,
    directly,
    has_kernel,
    known_absolute_differences,
    known_squared_differences,
    rows_in_torch,
    squared_differences,
    squared_distances,
)
from lsim.rounding import of_difference, of_each, of_sum

FULL_SCALE = 255.0

ROUNDING_OF_UNITS = (32 * 2.0**-53) ** 2
"""|û − v̂|² that is rounding of unit vectors in double precision, of the same direction."""

EPSILON = 1e-7
"""What The Well adds to what it divides a mean square by; here of values on [0, 1]."""

# A mean by a reciprocal is off by a rounding, and a constant frame then not constant.
WITH_DIVISION = FAST - {"arcp"}

SYMMETRIC = frozenset({"non-negative", "symmetric", "zero-on-itself"})


class _PixelMetric(ReportsPrecision, Metric):
    """The frame is its own embedding, flattened."""

    copies_to_compare = False

    shares_embedding = "pixels"

    def embed(self, frames: Tensor) -> Embedding:
        return Embedding({"values": as_floats(frames.flatten(1))})

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """As of a norm of the difference: off by that of the errors, and by the sum's own."""
        return of_difference(a, b, mean=True) + of_sum(distances, a.parts["values"].dtype)

    def _has_kernel(self, x: Tensor, y: Tensor) -> bool:
        return self.pixel_weights is None and has_kernel(x, y)

    @property
    def axioms(self) -> frozenset[str]:
        """Without the triangle inequality where every pair leaves out pixels of its own."""
        return super().axioms - {"triangle"} if self.preprocessing.mask else super().axioms


class L1(_PixelMetric):
    """Mean absolute difference, on [0, 1]."""

    info = MetricInfo(
        title="mean absolute difference",
        source="1/N Σ |a − b|",
        axioms=SYMMETRIC | {"triangle"},
        takes_mask=True,
        takes_weights=True,
        one_channel_suffices=True,
        takes_physical_values=True,
        power_of_units=1,
    )
    algorithm_version = 2

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        x, y = a.parts["values"], b.parts["values"]
        self.note_precision(directly(x, x if a is b else y))
        if not self._has_kernel(x, y):
            return _rows(self.paired, a, b)
        masked = self.preprocessing.mask
        kernel = known_absolute_differences if masked else absolute_differences
        sides = (x.numpy(), y.numpy())
        sums = all_pairs(kernel, len(x), len(y), *sides, symmetric=a is b, operations=x.shape[1])
        return sums / ((known_in_both(x, x if a is b else y) if masked else x.shape[1]) * FULL_SCALE)

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        known = _known(self, a, b)
        difference = _where_known(a.parts["values"] - b.parts["values"], known)
        return _mean(difference.abs().double(), known)[:, 0] / FULL_SCALE


class _OfSquares(_PixelMetric):
    """A function of the mean squared difference, on [0, 1]."""

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        return self._from(self._mean_squared(a, b), self._divisor(a, b))

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        return self._from(self._mean_squared_paired(a, b), self._divisor_paired(a, b))

    @abstractmethod
    def _from(self, squared: Tensor, divisor: Tensor | float) -> Tensor:
        """Distances from mean squared differences, and from what they are to be divided by."""

    def _divisor(self, a: Embedding, b: Embedding) -> Tensor | float:
        return 1.0

    def _divisor_paired(self, a: Embedding, b: Embedding) -> Tensor | float:
        return 1.0

    def _mean_squared(self, a: Embedding, b: Embedding) -> Tensor:
        if self.pixel_weights is not None:  # other metrics of these embeddings may have others
            mean, record = self._mean_squared_anew(a, b)
        else:
            mean, record = _shared(a, b, "mean squared differences", lambda: self._mean_squared_anew(a, b))
        self.note_precision(record)
        return mean

    def _mean_squared_anew(self, a: Embedding, b: Embedding) -> tuple[Tensor, PairPrecision]:
        x = a.parts["values"]
        y = x if a is b else b.parts["values"]
        masked = self.preprocessing.mask
        if not (masked or self.pixel_weights is not None or carries_gradients(x, y)):
            sums, record = squared_distances(x, y)
            return sums / (x.shape[1] * FULL_SCALE**2), record
        record = directly(x, y)
        if not self._has_kernel(x, y):
            return _rows(self._mean_squared_paired, a, b), record
        sides = (x.numpy(), y.numpy())
        sums = all_pairs(
            known_squared_differences, len(x), len(y), *sides, symmetric=a is b, operations=x.shape[1]
        )
        return sums / (known_in_both(x, y) * FULL_SCALE**2), record

    def _mean_squared_paired(self, a: Embedding, b: Embedding) -> Tensor:
        known = _known(self, a, b)
        difference = _where_known(a.parts["values"] - b.parts["values"], known)
        return _mean(difference.square().double(), known)[:, 0] / FULL_SCALE**2


class L2(_OfSquares):
    """Mean squared difference, on [0, 1]; the publications around LSiM call it L2."""

    info = MetricInfo(
        title="mean squared difference",
        source="1/N Σ (a − b)²; skimage mean_squared_error",
        takes_mask=True,
        takes_weights=True,
        one_channel_suffices=True,
        takes_physical_values=True,
        power_of_units=2,
    )
    algorithm_version = 2
    published_on_8bit = True

    def _from(self, squared: Tensor, divisor: Tensor | float) -> Tensor:
        return squared

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """As of the square of a norm."""
        error = of_difference(a, b, mean=True)
        return error * (2 * distances.sqrt() + error) + of_sum(distances, a.parts["values"].dtype)


class RMSE(_OfSquares):
    """Root of the mean squared difference, on [0, 1]."""

    info = MetricInfo(
        title="root mean squared difference",
        source="√(1/N Σ (a − b)²)",
        axioms=SYMMETRIC | {"triangle"},
        takes_mask=True,
        takes_weights=True,
        one_channel_suffices=True,
        takes_physical_values=True,
        power_of_units=1,
    )

    def _from(self, squared: Tensor, divisor: Tensor | float) -> Tensor:
        return safe_sqrt(squared / divisor)


class NRMSE(RMSE):
    """Root of the mean squared difference over the mean square of the reference, the first argument.

    Not symmetric: ``symmetrise=True`` makes ½ (d(a, b) + d(b, a)) of it. Both means are over all values of
    the frame on [0, 1], whose zero the normalisation has set: √(MSE / (mean a² + 1e-7)).
    """

    info = MetricInfo(
        title="root mean squared difference, over the root mean square of the reference",
        source="The Well (Ohana et al., NeurIPS 2024), NRMSE; skimage normalized_root_mse, euclidean",
        axioms=SYMMETRIC - {"symmetric"},
        takes_mask=True,
        takes_weights=True,
        one_channel_suffices=True,
        takes_physical_values=True,
    )
    centred: ClassVar[bool] = False

    def _divisor(self, a: Embedding, b: Embedding) -> Tensor:
        x, y = a.parts["values"], b.parts["values"]
        if self.pixel_weights is not None:
            return _rows(self._divisor_paired, a, b)
        if not self.preprocessing.mask:
            powers = a.once(f"mean squares, {self.centred}", lambda: _powers(x, self.centred))[:, None]
        elif has_kernel(x, y):
            sides = (x.numpy(), y.numpy(), self.centred)
            powers = all_pairs(
                _known_powers, len(x), len(y), *sides, symmetric=False, operations=4 * x.shape[1]
            )
        else:
            return _rows(self._divisor_paired, a, b)
        return powers / FULL_SCALE**2 + EPSILON

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """As of a norm over another norm."""
        error = of_difference(a, b, mean=True) + distances * of_each(a, mean=True)[:, None] / FULL_SCALE
        return error / self._divisor(a, b).sqrt() + of_sum(distances, a.parts["values"].dtype)

    def _divisor_paired(self, a: Embedding, b: Embedding) -> Tensor:
        known = _known(self, a, b)
        values = a.parts["values"].expand(len(b), -1).double()
        centred = _centred(values, known) if self.centred else _where_known(values, known)
        count = values.shape[1] if known is None else known.sum(1)
        if self.centred:
            count = _degrees_of_freedom(count, known)
        return _sum(centred.square(), known)[:, 0] / count / FULL_SCALE**2 + EPSILON


class VRMSE(NRMSE):
    """Root of the mean squared difference over the variance of the reference, the first argument.

    Not symmetric, as :class:`NRMSE`: √(MSE / (var a + 1e-7)), the variance that of all values of the frame,
    over N − 1 as in The Well's code. The mean of the reference is √(1 − 1/N) away from it, up to the 1e-7.
    """

    info = MetricInfo(
        title="root mean squared difference, over the standard deviation of the reference",
        source="The Well (Ohana et al., NeurIPS 2024), VRMSE",
        axioms=SYMMETRIC - {"symmetric"},
        takes_mask=True,
        takes_weights=True,
        one_channel_suffices=True,
        takes_physical_values=True,
    )
    algorithm_version = 2
    centred = True


class PSNR(_OfSquares):
    """Negated peak signal-to-noise ratio in dB for a data range of 255; −inf for identical frames."""

    info = MetricInfo(
        title="negated peak signal-to-noise ratio, data range 255",
        source="10 log₁₀ MSE for values on [0, 1]; skimage peak_signal_noise_ratio",
        axioms=frozenset({"symmetric"}),
        distance_to_itself=-float("inf"),
        takes_mask=True,
        takes_weights=True,
        one_channel_suffices=True,
        units="dB",
    )
    algorithm_version = 2
    published_on_8bit = True

    def _from(self, squared: Tensor, divisor: Tensor | float) -> Tensor:
        positive = squared > 0
        logarithm = 10 * torch.log10(torch.where(positive, squared, 1))
        # Through `where`, the gradient at identical frames is 0 instead of infinite; NaN stays NaN.
        return torch.where(squared.isnan(), squared, torch.where(positive, logarithm, -float("inf")))

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Infinite where the root of the mean square may be 0."""
        root = 10 ** (distances / 20)
        error = of_difference(a, b, mean=True) + of_sum(root, a.parts["values"].dtype)
        lost = torch.where(root > error, -20 * torch.log10(1 - error / root), math.inf)
        # No error and no difference: equal for sure.
        return torch.where(error == 0, 0, lost) + 2.0**-50 * distances.abs().nan_to_num(posinf=0)


class Cosine(_PixelMetric):
    """One minus the cosine between two frames as vectors: ½ |a/|a| − b/|b||².

    As differences of unit vectors, in double precision: one minus a cosine close to one is noise. A frame of
    zeros has no direction: it is at 1 from all others, and at 0 from another of zeros.
    """

    copies_to_compare = True

    info = MetricInfo(
        title="one minus the cosine of the angle between frames",
        source="1 − Σ ab / √(Σ a² Σ b²); scipy cosine",
        axioms=SYMMETRIC,
        takes_mask=True,
        takes_weights=True,
        one_channel_suffices=True,
        blind_to=("scale",),
        takes_physical_values=True,
    )
    algorithm_version = 2
    centred: ClassVar[bool] = False

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        x, y = a.parts["values"], b.parts["values"]
        if self.pixel_weights is not None:
            distances = _rows(self.paired, a, b)
        elif not self.preprocessing.mask:
            distances = self._of_unit_vectors(a, b)
        elif has_kernel(x, y):
            sides = (x.numpy(), y.numpy(), self.centred)
            distances = all_pairs(
                _known_angles, len(x), len(y), *sides, symmetric=a is b, operations=8 * x.shape[1]
            )
        else:
            distances = _rows(self.paired, a, b)
        self.note_precision(_precision_of_angles(distances.detach(), x.shape[1], symmetric=a is b))
        return distances

    def _of_unit_vectors(self, a: Embedding, b: Embedding) -> Tensor:
        x = a.parts["values"]
        y = x if a is b else b.parts["values"]
        u = self._units_of(a, x)
        v = u if a is b else self._units_of(b, y)
        if has_kernel(u, v):
            sides = (u.numpy(), v.numpy())
            squared = all_pairs(
                squared_differences, len(u), len(v), *sides, symmetric=a is b, operations=2 * u.shape[1]
            )
        else:
            squared = _in_rows(lambda left, right: (left - right).square().sum(1), u, v)
        flat = self._is_flat(b, v)
        return _from_units(squared, (flat if u is v else self._is_flat(a, u))[:, None], flat)

    def _units_of(self, embedding: Embedding, values: Tensor) -> Tensor:
        """Unit vectors of the rows of an embedding, whose lengths are kept: they are needed anyway."""
        if not has_kernel(values):
            return _units(values, None, self.centred)
        units, lengths = np.empty(values.shape), np.empty((2, len(values)))
        _to_units(values.numpy(), units, lengths, self.centred)
        embedding.once(f"lengths, {self.centred}", lambda: tuple(torch.from_numpy(lengths)))
        return torch.from_numpy(units)

    def _is_flat(self, embedding: Embedding, units: Tensor) -> Tensor:
        """Rows without a direction: of zeros, or of nothing but rounding: (rows,)."""
        zero = _is_zero(units)
        if embedding.rounding is None:
            return zero
        return zero | (self._lengths(embedding) <= of_each(embedding, stored=True))

    def _lengths(self, embedding: Embedding) -> Tensor:
        """Root mean square of each frame's values, or of their deviations: (n,)."""
        return self._lengths_and_sizes(embedding)[0]

    def _lengths_and_sizes(self, embedding: Embedding) -> tuple[Tensor, Tensor]:
        """:meth:`_lengths`, and the root mean square of the values: (n,) both."""

        def compute() -> tuple[Tensor, Tensor]:
            spread, size = _spreads_and_sizes(embedding)
            return (spread if self.centred else size), size

        return embedding.once(f"lengths, {self.centred}", compute)

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """½ |û − v̂|² of directions that are off by the angle that errors make with frames of their lengths.

        A frame that is exactly constant has no direction, and its distances are what they are said to be.
        """
        if self.preprocessing.mask or self.pixel_weights is not None:
            x, y = self._masked_lengths(a, b), self._masked_lengths(b, a).T
        else:
            x, y = self._lengths(a)[:, None], self._lengths(b)
        # Weights may be all on the largest value.
        weighted = self.pixel_weights is not None
        sizes = [_largest(side) if weighted else self._lengths_and_sizes(side)[1] for side in (a, b)]
        roundings = 4 + math.sqrt(a.parts["values"].shape[1]) / 2
        angle = _angle(of_each(a, stored=True, mean=True)[:, None], sizes[0][:, None], x, roundings)
        angle = angle + _angle(of_each(b, stored=True, mean=True), sizes[1], y, roundings)
        bound = angle * (2 * distances).sqrt() + angle.square() / 2 + of_sum(distances, torch.float64)
        return torch.where((x == 0) | (y == 0), 0, bound.clamp(max=2))

    def _masked_lengths(self, a: Embedding, b: Embedding) -> Tensor:
        """:meth:`_lengths` of the first of each pair, over what is known in both: (len(a), len(b))."""
        x, y = a.parts["values"], b.parts["values"]
        if not self._has_kernel(x, y):
            return _rows(self._masked_lengths_paired, a, b)
        sides = (x.numpy(), y.numpy(), self.centred)
        powers = all_pairs(_known_powers, len(x), len(y), *sides, symmetric=False, operations=4 * x.shape[1])
        return powers.sqrt()

    def _masked_lengths_paired(self, a: Embedding, b: Embedding) -> Tensor:
        known = _known(self, a, b)
        values = a.parts["values"].expand(len(b), -1).double()
        centred = _centred(values, known) if self.centred else _where_known(values, known)
        return _mean(centred.square(), known)[:, 0].sqrt()

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        known = _known(self, a, b)
        x, y = torch.broadcast_tensors(a.parts["values"], b.parts["values"])
        u, v = _units(x, known, self.centred), _units(y, known, self.centred)
        flat = self._is_flat(a, u) if known is None else _is_zero(u)
        distances = _from_units(
            (u - v).square().sum(1), flat, self._is_flat(b, v) if known is None else _is_zero(v)
        )
        return distances if known is None else torch.where(known.bool().any(1), distances, math.nan)


class Correlation(Cosine):
    """One minus Pearson's correlation of two frames' values: the cosine between them less their means.

    A constant frame has no pattern: it is at 1 from frames that have one, and at 0 from another constant.
    """

    info = MetricInfo(
        title="one minus Pearson's correlation",
        source="1 − cov(a, b) / (σ_a σ_b); scipy correlation",
        axioms=SYMMETRIC,
        takes_mask=True,
        takes_weights=True,
        one_channel_suffices=True,
        blind_to=("offset", "scale"),
        takes_physical_values=True,
    )
    centred = True


# --- sums over what is known --------------------------------------------------------------------------------


def _known(metric: Metric, a: Embedding, b: Embedding) -> Tensor | None:
    """Where neither frame is missing, true or a weight in double; None stands for everywhere."""
    x, y = a.parts["values"], b.parts["values"]
    known = ~(x.isnan() | y.isnan()) if metric.preprocessing.mask else None
    if metric.pixel_weights is None:
        return known
    pixels = metric.pixel_weights.to(x.device).flatten()
    weights = pixels.repeat_interleave(x.shape[1] // len(pixels))  # channels of a pixel are neighbours
    return weights.expand(max(len(x), len(y)), -1) if known is None else torch.where(known, weights, 0)


def _where_known(values: Tensor, known: Tensor | None) -> Tensor:
    """Zero elsewhere, with gradients of zero."""
    return values if known is None else torch.where(known.bool(), values, 0)


def _sum(values: Tensor, known: Tensor | None) -> Tensor:
    """(rows, 1), by weight, of values that are zero where unknown."""
    if known is not None and known.dtype != torch.bool:
        values = values * known
    return values.sum(1, True)


def _mean(values: Tensor, known: Tensor | None) -> Tensor:
    """(rows, 1), by weight, of values that are zero where unknown."""
    return values.mean(1, keepdim=True) if known is None else _sum(values, known) / known.sum(1, True)


def _centred(values: Tensor, known: Tensor | None) -> Tensor:
    """Less the mean of the known."""
    if known is not None and known.dtype != torch.bool:
        # A weighted mean of equal values is not quite their value; that of zeros is.
        smallest = torch.where(known.bool(), values, math.inf).amin(1, keepdim=True)
        values = values - smallest.detach()
    values = _where_known(values, known)
    return _where_known(values - _mean(values, known), known)


def _units(values: Tensor, known: Tensor | None, centred: bool) -> Tensor:
    """Rows of length 1 in double, those of length 0 left so: (rows, columns)."""
    values = values.double()
    values = _centred(values, known) if centred else _where_known(values, known)
    if known is not None and known.dtype != torch.bool:
        values = values * known.sqrt()
    squares = values.square().sum(1, keepdim=True)
    flat = squares == 0
    return torch.where(flat, 0, values / torch.where(flat, 1, squares).sqrt())


def _spreads_and_sizes(embedding: Embedding) -> tuple[Tensor, Tensor]:
    """Standard deviation and root mean square of the values of each frame that are known: (n,) both."""

    def compute() -> tuple[Tensor, Tensor]:
        values = embedding.parts["values"]
        if has_kernel(values):
            found = np.empty((2, len(values)))
            _to_spreads_and_sizes(values.numpy(), found)
            return torch.from_numpy(found[0]), torch.from_numpy(found[1])
        doubles = [row.double() for row in values.split(1)]
        means = torch.cat([row.nanmean(1, keepdim=True) for row in doubles])
        powers = [(row - mean).square().nanmean() for row, mean in zip(doubles, means, strict=True)]
        return torch.stack(powers).sqrt(), (torch.stack(powers) + means[:, 0].square()).sqrt()

    return embedding.once("spreads and sizes", compute)


def _largest(embedding: Embedding) -> Tensor:
    """Largest magnitude of each frame's values that are known: (n,)."""
    return embedding.parts["values"].nan_to_num().abs().amax(1).double()


def _angle(error: Tensor, size: Tensor, length: Tensor, roundings: float) -> Tensor:
    """Bound the angle by which a direction is off: errors of values, and that of a mean, in double."""
    return error / length + 2.0**-53 * (4 + roundings * size / length)


def _is_zero(units: Tensor) -> Tensor:
    """Rows of zeros: (rows,)."""
    return torch.linalg.vector_norm(units, dim=1) == 0


def _from_units(squared: Tensor, left_is_flat: Tensor, right_is_flat: Tensor) -> Tensor:
    """½ |u − v|²; 1 where one alone has no direction, 0 where neither has."""
    same = (left_is_flat & right_is_flat & ~squared.isnan()) | (squared < ROUNDING_OF_UNITS)
    distances = torch.where(same, 0, squared / 2)
    return torch.where((left_is_flat ^ right_is_flat) & ~squared.isnan(), 1, distances)


def _degrees_of_freedom(count: Any, known: Tensor | None = None) -> Any:
    """Give what a sum of squares about the mean of ``count`` values is divided by: one less.

    By weights, Σ w − Σ w² / Σ w: unbiased for weights of any scale, as GSL's ``gsl_stats_wvariance``.
    """
    if not isinstance(count, Tensor):
        return max(count - 1, 1)
    if known is None or known.dtype == torch.bool:
        return (count - 1).clamp(min=1)
    left = count - known.square().sum(1) / count
    return torch.where(known.bool().sum(1) > 1, left, count)


@numba.njit(nogil=True, cache=True, fastmath=WITH_DIVISION, error_model="numpy")
def _known_mean(a, b):  # type: ignore[no-untyped-def]
    """Mean of a where neither is NaN, and how many those are."""
    total = 0.0
    count = 0
    for k in range(a.shape[0]):
        known = a[k] == a[k] and b[k] == b[k]
        total += np.float64(a[k]) if known else 0.0
        count += known
    return total / count, count


@numba.njit(nogil=True, cache=True, fastmath=WITH_DIVISION, error_model="numpy")
def _known_power(a, b, mean):  # type: ignore[no-untyped-def]
    """Sum of squares of a − mean where neither is NaN."""
    squares = 0.0
    for k in range(a.shape[0]):
        known = a[k] == a[k] and b[k] == b[k]
        deviation = np.float64(a[k]) - mean
        squares += deviation * deviation if known else 0.0
    return squares


@numba.njit(nogil=True, cache=True, fastmath=WITH_DIVISION, error_model="numpy")
def _known_powers(i, j, out, x, y, centred):  # type: ignore[no-untyped-def]
    """Mean square of the first of a pair, or its variance if ``centred``, where both are known."""
    for p in range(i.shape[0]):
        a = x[i[p]]
        b = y[j[p]]
        mean, count = _known_mean(a, b)
        degrees = max(count - 1, 1) if centred else count
        out[p] += _known_power(a, b, mean if centred else 0.0) / degrees


@numba.njit(nogil=True, cache=True, fastmath=WITH_DIVISION, error_model="numpy")
def _known_angles(i, j, out, x, y, centred):  # type: ignore[no-untyped-def]
    """½ |û − v̂|² of a pair where both are known; 1 where one alone has length 0."""
    for p in range(i.shape[0]):
        a = x[i[p]]
        b = y[j[p]]
        mean_a, count = _known_mean(a, b)
        mean_b, _ = _known_mean(b, a)
        if not centred:
            mean_a = mean_b = 0.0
        length_a = np.sqrt(_known_power(a, b, mean_a))
        length_b = np.sqrt(_known_power(b, a, mean_b))
        if count == 0:
            out[p] = np.nan
        elif length_a == 0 or length_b == 0:
            out[p] = 0.0 if length_a == length_b else 1.0
        else:
            squares = 0.0
            scale_a, scale_b = 1 / length_a, 1 / length_b
            for k in range(a.shape[0]):
                known = a[k] == a[k] and b[k] == b[k]
                difference = (a[k] - mean_a) * scale_a - (b[k] - mean_b) * scale_b
                squares += difference * difference if known else 0.0
            out[p] = squares / 2 if squares >= ROUNDING_OF_UNITS else 0.0


@numba.njit(nogil=True, cache=True, fastmath=WITH_DIVISION, error_model="numpy")
def _to_spreads_and_sizes(x, out):  # type: ignore[no-untyped-def]
    """Standard deviation and root mean square of each row's values but NaN: into out (2, rows)."""
    for i in range(x.shape[0]):
        mean, count = _known_mean(x[i], x[i])
        squares = _known_power(x[i], x[i], mean)
        out[0, i] = np.sqrt(squares / count)
        out[1, i] = np.sqrt(squares / count + mean * mean)


@numba.njit(nogil=True, cache=True, fastmath=WITH_DIVISION, error_model="numpy")
def _to_units(x, out, lengths, centred):  # type: ignore[no-untyped-def]
    """Rows of length 1, those of length 0 left so; what the lengths were, and sizes, as root mean squares."""
    for i in range(x.shape[0]):
        mean = 0.0
        if centred:
            for k in range(x.shape[1]):
                mean += np.float64(x[i, k])
            mean /= x.shape[1]
        squares = 0.0
        for k in range(x.shape[1]):
            deviation = np.float64(x[i, k]) - mean
            squares += deviation * deviation
        power = squares / x.shape[1]
        lengths[0, i] = np.sqrt(power)
        lengths[1, i] = np.sqrt(power + mean * mean)
        scale = 1 / np.sqrt(squares) if squares != 0 else 0.0
        for k in range(x.shape[1]):
            out[i, k] = (np.float64(x[i, k]) - mean) * scale


def _powers(values: Tensor, centred: bool) -> Tensor:
    """Mean square of each row, or its variance if ``centred``: (rows,) float64."""
    if not has_kernel(values):
        rows = [_centred(row.double(), None) if centred else row.double() for row in values.split(1)]
        count = _degrees_of_freedom(values.shape[1]) if centred else values.shape[1]
        return torch.cat([row.square().sum(1) for row in rows]) / count
    every, powers = np.arange(len(values)), np.zeros(len(values))
    _known_powers(every, every, powers, values.numpy(), values.numpy(), centred)
    return torch.from_numpy(powers)


def _precision_of_angles(distances: Tensor, columns: int, *, symmetric: bool) -> PairPrecision:
    """Rounding of unit vectors, in double, against the smallest distance between two that differ."""
    n, m = distances.shape
    apart = distances[distances > 0]
    bound = CONFIDENCE * math.sqrt(columns) * 2.0**-53
    if len(apart):
        bound += 2.0**-51 / math.sqrt(2 * apart.min().item())
    return PairPrecision(DIRECTLY, PROMISE, bound, number_of_pairs(n, m, symmetric=symmetric))


# --- all pairs ---------------------------------------------------------------------------------------------


def _shared(
    a: Embedding, b: Embedding, what: str, compute: Callable[[], tuple[Tensor, PairPrecision]]
) -> tuple[Tensor, PairPrecision]:
    """What metrics of one embedding take of all pairs, or of its first frame against all, once for them."""
    x, y = a.parts["values"], b.parts["values"]
    if a is b:
        return b.once(what, compute)
    if len(a) == 1 and x.data_ptr() == y.data_ptr():
        return b.once(f"{what} of the first", compute)
    return compute()


def _rows(paired: Callable[[Embedding, Embedding], Tensor], a: Embedding, b: Embedding) -> Tensor:
    """The block of distances on a device without kernels, in bounded memory."""
    return rows_in_torch(paired, a, b, together=max(1, VALUES_TOGETHER // a.parts["values"].shape[1]))


def _in_rows(paired: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return rows_in_torch(paired, x, y, together=max(1, VALUES_TOGETHER // x.shape[1]))
