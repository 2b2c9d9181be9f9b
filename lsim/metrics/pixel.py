"""Metrics of pixel differences, on [0, 1] after the common normalisation.

Metrics of squared differences share one matrix of these in a run. With a mask, pixels that are missing in
either frame of a pair are left out of all sums: differences, normalisers and means. Pixels count alike in all
of these, or by their weights.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lsim.compiled import compiled
from lsim.embedding import difference_of
from lsim.error_bounds import (
    CONFIDENCE,
    DIRECTLY,
    PROMISE,
    PairPrecision,
    ReportsPrecision,
    number_of_pairs,
)
from lsim.gram import VALUES_TOGETHER, known_in_both
from lsim.metric import Embedding, MetricInfo, safe_sqrt
from lsim.pairs import (
    FAST,
    all_pairs,
    carries_gradients,
    compare_in_torch,
    directly,
    has_kernel,
    rows_in_torch,
    squared_distances,
    sums_of_differences,
)
from lsim.pixel_means import PixelMeans, in_rows, is_weighted, mean_of, sum_of, where_counted
from lsim.rounding import FULL_SCALE, of_difference, of_each, of_sum
from lsim.threads import in_threads

ROUNDING_OF_UNITS = (32 * 2.0**-53) ** 2
"""|û − v̂|² up to which unit vectors in double precision have the same direction, but for rounding."""

NEAR = 1e-4
"""|a − b|² / (|a| |b|) below which the angle between two frames with rests is taken from their difference."""

ROUNDING_OF_VALUES = 2.0**-50
"""Rounding of a frame's values and of their mean, without rests, as a share of the largest value."""

EPSILON = 1e-7
"""Number that The Well adds to the divisor of a mean square; here for values on [0, 1]."""

# A mean by a reciprocal is rounded once more, and a constant frame then not constant.
WITH_DIVISION = FAST - {"arcp"}

SYMMETRIC = frozenset({"non-negative", "symmetric", "zero-on-itself"})


class _PixelMetric(ReportsPrecision, PixelMeans):
    """A mean over pixels whose sums are recorded with their precision."""

    def _compute_mean_squared(self, a: Embedding, b: Embedding) -> tuple[Tensor, PairPrecision]:
        x, y = _row_pair(a, b)
        masked, rests = self.preprocessing.mask, _rest_pair(a, b)
        plain = not masked and self.pixel_weights is None and rests is None
        if plain and not carries_gradients(x, y):
            sums, record = squared_distances(x, y)
            return sums / (x.shape[1] * FULL_SCALE**2), record
        record = directly(x, y)
        if not self._has_kernel(a, b, masked=True, with_rest=True):
            return _block_in_torch(self._mean_squared_paired, a, b), record
        sums = sums_of_differences(x, y, rests, squared=True, skip_nan=masked)
        return sums / ((known_in_both(x, y) if masked else x.shape[1]) * FULL_SCALE**2), record

    def _mean_squared_paired(self, a: Embedding, b: Embedding) -> Tensor:
        weights = in_rows(self.find_counted(a, b))
        difference = where_counted(difference_of(a, b, "values").flatten(1), weights)
        return mean_of(difference.square().double(), weights)[:, 0] / FULL_SCALE**2


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
        x, y = _row_pair(a, b)
        self.note_precision(directly(x, y))
        if not self._has_kernel(a, b, masked=True, with_rest=True):
            return _block_in_torch(self.paired, a, b)
        masked = self.preprocessing.mask
        sums = sums_of_differences(x, y, _rest_pair(a, b), skip_nan=masked)
        return sums / ((known_in_both(x, y) if masked else x.shape[1]) * FULL_SCALE)

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        weights = in_rows(self.find_counted(a, b))
        difference = where_counted(difference_of(a, b, "values").flatten(1), weights)
        return mean_of(difference.abs().double(), weights)[:, 0] / FULL_SCALE


class _OfSquares(_PixelMetric):
    """A function of the mean squared difference, on [0, 1]."""

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        return self._from_mean_square(self._mean_squared(a, b), self._divisor(a, b))

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        return self._from_mean_square(self._mean_squared_paired(a, b), self._divisor_paired(a, b))

    @abstractmethod
    def _from_mean_square(self, squared: Tensor, divisor: Tensor | float) -> Tensor:
        """Compute distances from mean squared differences and their divisors."""

    def _divisor(self, a: Embedding, b: Embedding) -> Tensor | float:
        return 1.0

    def _divisor_paired(self, a: Embedding, b: Embedding) -> Tensor | float:
        return 1.0

    def _mean_squared(self, a: Embedding, b: Embedding) -> Tensor:
        if self.pixel_weights is not None:  # metrics that share these embeddings may have other weights
            mean, record = self._compute_mean_squared(a, b)
        else:
            mean, record = _shared(a, b, "mean squared differences", lambda: self._compute_mean_squared(a, b))
        self.note_precision(record)
        return mean


class L2(_OfSquares):
    """Mean squared difference, on [0, 1]; the publications around LSiM call it L2.

    Examples
    --------
    >>> import lsim
    >>> lsim.load_metric("l2", size=None).distance([[0.0, 0.0]], [[1.0, 3.0]], scope="none")
    array([5.])
    """

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

    def _from_mean_square(self, squared: Tensor, divisor: Tensor | float) -> Tensor:
        return squared

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound the square of a norm."""
        error = of_difference(a, b, mean=True)
        return error * (2 * distances.sqrt() + error) + of_sum(distances, a.parts["values"].dtype)


class RMSE(_OfSquares):
    """Root of the mean squared difference, on [0, 1]."""

    info = MetricInfo(
        title="root mean squared difference",
        source="√(1/N Σ (a − b)²)",
        axioms=SYMMETRIC | {"triangle", "euclidean"},
        takes_mask=True,
        takes_weights=True,
        one_channel_suffices=True,
        takes_physical_values=True,
        power_of_units=1,
    )

    def _from_mean_square(self, squared: Tensor, divisor: Tensor | float) -> Tensor:
        return safe_sqrt(squared / divisor)


class NRMSE(RMSE):
    """Root of the mean squared difference over the mean square of the reference, the first argument.

    Not symmetric; ``symmetrise=True`` gives ½ (d(a, b) + d(b, a)). Both means are over all values of the
    frame on [0, 1], whose zero the normalisation sets: √(MSE / (mean a² + 1e-7)).
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
        if self.pixel_weights is None and not self.preprocessing.mask:
            powers = a.once(f"mean squares, {self.centred}", lambda: _powers(_rows(a), self.centred))[:, None]
        elif self._has_kernel(a, b, masked=True, with_rest=True):
            powers = _powers_of_pairs(a, b, self.centred)
        else:
            return _block_in_torch(self._divisor_paired, a, b)
        return powers / FULL_SCALE**2 + EPSILON

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound a norm over another norm, which is computed without rests."""
        error_of_norm = of_each(a, mean=True) / FULL_SCALE
        if "rest" in a.parts:
            error_of_norm = error_of_norm + ROUNDING_OF_VALUES * _largest(a) / FULL_SCALE
        error = of_difference(a, b, mean=True) + distances * error_of_norm[:, None]
        return error / self._divisor(a, b).sqrt() + of_sum(distances, a.parts["values"].dtype)

    def _divisor_paired(self, a: Embedding, b: Embedding) -> Tensor:
        weights = in_rows(self.find_counted(a, b))
        values = _rows(a).expand(len(b), -1).double()
        centred = _centred(values, weights) if self.centred else where_counted(values, weights)
        count = values.shape[1] if weights is None else weights.sum(1)
        if self.centred:
            count = _degrees_of_freedom(count, weights)
        return sum_of(centred.square(), weights)[:, 0] / count / FULL_SCALE**2 + EPSILON


class VRMSE(NRMSE):
    """Root of the mean squared difference over the variance of the reference, the first argument.

    Not symmetric, like :class:`NRMSE`: √(MSE / (var a + 1e-7)), with the variance of all values of the frame,
    over N − 1 as in The Well's code. A frame of the reference's mean is at √(1 − 1/N), up to the 1e-7.
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

    def _from_mean_square(self, squared: Tensor, divisor: Tensor | float) -> Tensor:
        positive = squared > 0
        logarithm = 10 * torch.log10(torch.where(positive, squared, 1))
        # Through `where`, the gradient at identical frames is 0 instead of infinite; NaN stays NaN.
        return torch.where(squared.isnan(), squared, torch.where(positive, logarithm, -float("inf")))

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound a logarithm: infinite where the root of the mean square may be 0."""
        root = 10 ** (distances / 20)
        error = of_difference(a, b, mean=True) + of_sum(root, a.parts["values"].dtype)
        decibels = torch.where(root > error, -20 * torch.log10(1 - error / root), math.inf)
        # Without an error, no difference means equal frames.
        return torch.where(error == 0, 0, decibels) + 2.0**-50 * distances.abs().nan_to_num(posinf=0)


class Cosine(_PixelMetric):
    """One minus the cosine between two frames as vectors: ½ |a/|a| − b/|b||².

    Computed from differences of unit vectors in double precision, since one minus a cosine close to one is
    noise. A frame of zeros has no direction: it is at 1 from all others, and at 0 from another of zeros.

    Examples
    --------
    >>> import lsim
    >>> lsim.load_metric("cosine", size=None).distance([[3.0, 0.0]], [[0.0, 2.0]], scope="none")
    array([1.])
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
        x, y = _row_pair(a, b)
        if self.pixel_weights is None and not self.preprocessing.mask:
            distances = self._compare_unit_vectors(a, b)
        elif self._has_kernel(a, b, masked=True):
            distances = all_pairs(
                _known_angles,
                len(x),
                len(y),
                x.numpy(),
                y.numpy(),
                self.centred,
                symmetric=a is b,
                operations=8 * x.shape[1],
            )
        else:
            distances = compare_in_torch(self.paired, a, b)
        record = _precision_of_angles(
            distances.detach(), x.shape[1], symmetric=a is b, with_rest="rest" in a.parts
        )
        self.note_precision(record)
        return distances

    def _compare_unit_vectors(self, a: Embedding, b: Embedding) -> Tensor:
        u = self._scale_to_units(a)
        v = u if a is b else self._scale_to_units(b)
        if has_kernel(u, v):
            squared = sums_of_differences(u, v, squared=True)
        else:
            batch_size = max(1, VALUES_TOGETHER // u.shape[1])
            squared = rows_in_torch(
                lambda left, right: (left - right).square().sum(1), u, v, batch_size=batch_size
            )
        squared = _drop_rounding(squared)
        if "rest" in a.parts:
            self._refine(squared, a, b)
        flat = self._is_flat(b, v)
        return _from_units(squared, (flat if u is v else self._is_flat(a, u))[:, None], flat)

    def _refine(self, squared: Tensor, a: Embedding, b: Embedding) -> None:
        """Compute |û − v̂|² of frames that may be near by :meth:`_from_difference`, in place."""
        near = squared < NEAR
        pairs = (near.triu(1) if a is b else near).nonzero().tolist()

        def refined(pair: list[int]) -> Tensor:
            i, j = pair
            return self._from_difference(a[i : i + 1], b[j : j + 1], squared[i, j : j + 1])

        for (i, j), value in zip(pairs, in_threads(refined, pairs), strict=True):
            squared[i, j] = value[0]
            if a is b:
                squared[j, i] = value[0]

    def _from_difference(self, a: Embedding, b: Embedding, squared: Tensor) -> Tensor:
        """Compute |û − v̂|² of near pairs with rests from their difference; of others, ``squared`` as it is.

        With d = u − v and lengths p and q, û − v̂ is (d (p + q) − (u + v) (p − q)) / 2pq, and p² − q² the
        product of d and u + v.
        """
        weights = in_rows(self.find_counted(a, b))
        u, v = (_vectors(_rows(side), weights, self.centred) for side in (a, b))
        change = difference_of(a, b, "values").flatten(1)
        d = _vectors(change, weights, self.centred, is_difference=True)
        p, q = (torch.linalg.vector_norm(side, dim=1, keepdim=True) for side in (u, v))
        product = torch.where(p * q > 0, p * q, 1)
        total = u + v
        along = (total * d).sum(1, keepdim=True) / torch.where(p + q > 0, p + q, 1)
        difference = (d * (p + q) - total * along) / (2 * product)
        apart = d.square().sum(1) / product[:, 0]
        is_near = (apart < NEAR) & (p * q > 0)[:, 0]
        return torch.where(is_near, _drop_rounding(difference.square().sum(1), apart), squared)

    def _scale_to_units(self, embedding: Embedding) -> Tensor:
        """Scale frames to unit vectors in double, and remember their lengths, which bounds need."""
        values = _rows(embedding)
        if not has_kernel(values):
            return _units(values, None, self.centred)
        units, lengths = np.empty(values.shape), np.empty((2, len(values)))
        _to_units(values.numpy(), units, lengths, self.centred)
        embedding.once(f"lengths, {self.centred}", lambda: tuple(torch.from_numpy(lengths)))
        return torch.from_numpy(units)

    def _is_flat(self, embedding: Embedding, units: Tensor) -> Tensor:
        """Find rows without a direction, which are zeros or nothing but rounding: (rows,)."""
        zero = _is_zero(units)
        if embedding.rounding is None:
            return zero
        return zero | (self._lengths(embedding) <= of_each(embedding, stored=True))

    def _lengths(self, embedding: Embedding) -> Tensor:
        """Compute the root mean square of each frame's values, or of their deviations: (n,)."""
        return self._lengths_and_sizes(embedding)[0]

    def _lengths_and_sizes(self, embedding: Embedding) -> tuple[Tensor, Tensor]:
        """Compute :meth:`_lengths`, and the root mean square of the values: (n,) both."""

        def compute() -> tuple[Tensor, Tensor]:
            spread, size = _spreads_and_sizes(embedding)
            return (spread if self.centred else size), size

        return embedding.once(f"lengths, {self.centred}", compute)

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound ½ |û − v̂|² for directions that are off by the angle between a frame with and without errors.

        A frame without a direction may have any within its errors, and then any distance. Where it has no
        error, its distances, 0 or 1, are exact.
        """
        if self.preprocessing.mask or self.pixel_weights is not None:
            x, y = self._masked_lengths(a, b), self._masked_lengths(b, a).T
        else:
            x, y = self._lengths(a)[:, None], self._lengths(b)
        # Weights may be all on the largest value.
        weighted = self.pixel_weights is not None
        sizes = [_largest(side) if weighted else self._lengths_and_sizes(side)[1] for side in (a, b)]
        roundings = 4 + math.sqrt(_rows(a).shape[1]) / 2
        share = self._share_of_rounding(a, b, x, y) if "rest" in a.parts else 1.0
        errors = of_each(a, stored=True, mean=True)[:, None], of_each(b, stored=True, mean=True)
        angle = _angle(errors[0], sizes[0][:, None], x, roundings, share)
        angle = angle + _angle(errors[1], sizes[1], y, roundings, share)
        bound = angle * (2 * distances).sqrt() + angle.square() / 2 + of_sum(distances, torch.float64)
        unknown = torch.where(((x == 0) & (errors[0] > 0)) | ((y == 0) & (errors[1] > 0)), 2.0, 0.0)
        return torch.where((x == 0) | (y == 0), unknown, bound.clamp(max=2))

    def _share_of_rounding(self, a: Embedding, b: Embedding, x: Tensor, y: Tensor) -> Tensor:
        """Compute the share of a direction's rounding that :meth:`_from_difference` leaves: (len(a), len(b)).

        Of frames with root mean squares x and y. Twice, since lengths are those of values without rests.
        """
        product = x * y
        apart = self._compute_mean_squared(a, b)[0] * FULL_SCALE**2 / torch.where(product > 0, product, 1)
        return 2 * torch.where(apart < NEAR, apart.sqrt(), 1)

    def _masked_lengths(self, a: Embedding, b: Embedding) -> Tensor:
        """Compute :meth:`_lengths` of the first of each pair, over pixels that count: (len(a), len(b))."""
        if not self._has_kernel(a, b, masked=True, with_rest=True):
            return _block_in_torch(self._masked_lengths_paired, a, b)
        return _powers_of_pairs(a, b, self.centred).sqrt()

    def _masked_lengths_paired(self, a: Embedding, b: Embedding) -> Tensor:
        weights = in_rows(self.find_counted(a, b))
        values = _rows(a).expand(len(b), -1).double()
        centred = _centred(values, weights) if self.centred else where_counted(values, weights)
        return mean_of(centred.square(), weights)[:, 0].sqrt()

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        weights = in_rows(self.find_counted(a, b))
        x, y = torch.broadcast_tensors(_rows(a), _rows(b))
        u, v = _units(x, weights, self.centred), _units(y, weights, self.centred)
        squared = _drop_rounding((u - v).square().sum(1))
        if "rest" in a.parts:
            squared = self._from_difference(a, b, squared)
        if weights is None:
            return _from_units(squared, self._is_flat(a, u), self._is_flat(b, v))
        distances = _from_units(squared, _is_zero(u), _is_zero(v))
        return torch.where(weights.bool().any(1), distances, math.nan)


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


# --- centred values and unit vectors ------------------------------------------------------------------------


def _rows(embedding: Embedding) -> Tensor:
    """Flatten each frame to a row: (n, value)."""
    return embedding.parts["values"].flatten(1)


def _row_pair(a: Embedding, b: Embedding) -> tuple[Tensor, Tensor]:
    """Flatten the frames of both sides, to one tensor where ``a is b``."""
    x = _rows(a)
    return x, x if a is b else _rows(b)


def _rest_pair(a: Embedding, b: Embedding) -> tuple[Tensor, Tensor] | None:
    """Flatten the rests of the frames of both sides, if they have any."""
    if "rest" not in a.parts:
        return None
    return a.parts["rest"].flatten(1), b.parts["rest"].flatten(1)


def _centred(values: Tensor, weights: Tensor | None, *, is_difference: bool = False) -> Tensor:
    """Subtract from values the mean of those that count; opposite differences stay opposite in all bits."""
    if is_weighted(weights):
        # A weighted mean of equal values is not quite their value; the mean of zeros is 0.
        if is_difference:
            start = values.gather(1, weights.bool().int().argmax(1, keepdim=True))
        else:
            start = torch.where(weights.bool(), values, math.inf).amin(1, keepdim=True)
        values = values - start.detach()
    values = where_counted(values, weights)
    return where_counted(values - mean_of(values, weights), weights)


def _vectors(values: Tensor, weights: Tensor | None, centred: bool, *, is_difference: bool = False) -> Tensor:
    """Convert rows, or differences of rows, to vectors in double: (rows, columns)."""
    values = values.double()
    if centred:
        values = _centred(values, weights, is_difference=is_difference)
    else:
        values = where_counted(values, weights)
    return values * weights.sqrt() if is_weighted(weights) else values


def _units(values: Tensor, weights: Tensor | None, centred: bool) -> Tensor:
    """Scale rows to the length 1 in double, but for rows of length 0: (rows, columns)."""
    values = _vectors(values, weights, centred)
    squares = values.square().sum(1, keepdim=True)
    flat = squares == 0
    return torch.where(flat, 0, values / torch.where(flat, 1, squares).sqrt())


def _spreads_and_sizes(embedding: Embedding) -> tuple[Tensor, Tensor]:
    """Compute standard deviation and root mean square of each frame's values but NaN: (n,) both."""

    def compute() -> tuple[Tensor, Tensor]:
        values = _rows(embedding)
        if has_kernel(values):
            spreads, sizes = np.empty((2, len(values)))
            _to_spreads_and_sizes(values.numpy(), spreads, sizes)
            return torch.from_numpy(spreads), torch.from_numpy(sizes)
        doubles = [row.double() for row in values.split(1)]
        means = torch.cat([row.nanmean(1, keepdim=True) for row in doubles])
        powers = [(row - mean).square().nanmean() for row, mean in zip(doubles, means, strict=True)]
        return torch.stack(powers).sqrt(), (torch.stack(powers) + means[:, 0].square()).sqrt()

    return embedding.once("spreads and sizes", compute)


def _largest(embedding: Embedding) -> Tensor:
    """Find the largest magnitude of each frame's values but NaN: (n,)."""
    return _rows(embedding).nan_to_num().abs().amax(1).double()


def _angle(error: Tensor, size: Tensor, length: Tensor, roundings: float, share: Tensor | float) -> Tensor:
    """Bound the angle by which a direction is off: by errors of values, and of a mean in double."""
    return error / length + 2.0**-53 * (4 + roundings * size / length) * share


def _is_zero(units: Tensor) -> Tensor:
    """Find rows of zeros: (rows,)."""
    return torch.linalg.vector_norm(units, dim=1) == 0


def _drop_rounding(squared: Tensor, share: Tensor | float = 1.0) -> Tensor:
    """Put 0 for |û − v̂|² that is nothing but rounding, or a share of it."""
    return torch.where(squared < share * ROUNDING_OF_UNITS, 0, squared)


def _from_units(squared: Tensor, left_is_flat: Tensor, right_is_flat: Tensor) -> Tensor:
    """Compute ½ |u − v|²; 1 if only one of the two has no direction, 0 if neither has one."""
    distances = torch.where(left_is_flat & right_is_flat & ~squared.isnan(), 0, squared / 2)
    return torch.where((left_is_flat ^ right_is_flat) & ~squared.isnan(), 1, distances)


def _degrees_of_freedom(count: Any, weights: Tensor | None = None) -> Any:
    """Return the divisor of a sum of squares about the mean of ``count`` values: one less.

    With weights, Σ w − Σ w² / Σ w: unbiased for weights of any scale, as GSL's ``gsl_stats_wvariance``.
    """
    if not isinstance(count, Tensor):
        return max(count - 1, 1)
    if weights is None or not is_weighted(weights):
        return (count - 1).clamp(min=1)
    weighted = count - weights.square().sum(1) / count
    return torch.where(weights.bool().sum(1) > 1, weighted, count)


@compiled(fastmath=WITH_DIVISION, error_model="numpy")
def _known_mean(a, b):  # type: ignore[no-untyped-def]
    """Average a where neither a nor b is NaN, and count these values."""
    total = 0.0
    count = 0
    for k in range(a.shape[0]):
        valid = a[k] == a[k] and b[k] == b[k]
        total += np.float64(a[k]) if valid else 0.0
        count += valid
    return total / count, count


@compiled(fastmath=WITH_DIVISION, error_model="numpy")
def _known_power(a, b, mean):  # type: ignore[no-untyped-def]
    """Add up squares of a − mean where neither a nor b is NaN."""
    squares = 0.0
    for k in range(a.shape[0]):
        valid = a[k] == a[k] and b[k] == b[k]
        deviation = np.float64(a[k]) - mean
        squares += deviation * deviation if valid else 0.0
    return squares


@compiled(fastmath=WITH_DIVISION, error_model="numpy")
def _known_powers(i, j, out, x, y, centred):  # type: ignore[no-untyped-def]
    """Add the mean square of the first of a pair, or its variance if ``centred``, where neither is NaN."""
    for p in range(i.shape[0]):
        a = x[i[p]]
        b = y[j[p]]
        mean, count = _known_mean(a, b)
        degrees = max(count - 1, 1) if centred else count
        out[p] += _known_power(a, b, mean if centred else 0.0) / degrees


@compiled(fastmath=WITH_DIVISION, error_model="numpy")
def _known_angles(i, j, out, x, y, centred):  # type: ignore[no-untyped-def]
    """Add ½ |û − v̂|² of a pair where neither is NaN; 1 if only one of the two has length 0."""
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
                valid = a[k] == a[k] and b[k] == b[k]
                difference = (a[k] - mean_a) * scale_a - (b[k] - mean_b) * scale_b
                squares += difference * difference if valid else 0.0
            out[p] = squares / 2 if squares >= ROUNDING_OF_UNITS else 0.0


@compiled(fastmath=WITH_DIVISION, error_model="numpy")
def _to_spreads_and_sizes(x, spreads, sizes):  # type: ignore[no-untyped-def]
    """Write standard deviation and root mean square of each row's values but NaN."""
    for i in range(x.shape[0]):
        mean, count = _known_mean(x[i], x[i])
        squares = _known_power(x[i], x[i], mean)
        spreads[i] = np.sqrt(squares / count)
        sizes[i] = np.sqrt(squares / count + mean * mean)


@compiled(fastmath=WITH_DIVISION, error_model="numpy")
def _to_units(x, out, lengths, centred):  # type: ignore[no-untyped-def]
    """Scale rows to length 1, but for rows of length 0; write lengths and sizes as root mean squares."""
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
    """Compute the mean square of each row, or its variance if ``centred``: (rows,) float64."""
    if not has_kernel(values):
        rows = [_centred(row.double(), None) if centred else row.double() for row in values.split(1)]
        count = _degrees_of_freedom(values.shape[1]) if centred else values.shape[1]
        return torch.cat([row.square().sum(1) for row in rows]) / count
    indices, powers = np.arange(len(values)), np.zeros(len(values))
    _known_powers(indices, indices, powers, values.numpy(), values.numpy(), centred)
    return torch.from_numpy(powers)


def _powers_of_pairs(a: Embedding, b: Embedding, centred: bool) -> Tensor:
    """Compute the mean square, or variance, of each first frame where neither is NaN: (len(a), len(b))."""
    x, y = _row_pair(a, b)
    return all_pairs(
        _known_powers,
        len(x),
        len(y),
        x.numpy(),
        y.numpy(),
        centred,
        symmetric=False,
        operations=4 * x.shape[1],
    )


def _precision_of_angles(
    distances: Tensor, columns: int, *, symmetric: bool, with_rest: bool
) -> PairPrecision:
    """Bound the rounding of unit vectors, in double, against the smallest distance above 0 or NEAR."""
    n, m = distances.shape
    positive = distances[distances > (NEAR / 4 if with_rest else 0)]
    bound = CONFIDENCE * math.sqrt(columns) * 2.0**-53
    if len(positive):
        bound += 2.0**-51 / math.sqrt(2 * positive.min().item())
    return PairPrecision(DIRECTLY, PROMISE, bound, number_of_pairs(n, m, symmetric=symmetric))


# --- all pairs ---------------------------------------------------------------------------------------------


def _shared(
    a: Embedding, b: Embedding, name: str, compute: Callable[[], tuple[Tensor, PairPrecision]]
) -> tuple[Tensor, PairPrecision]:
    """Compute a result of all pairs, or of the first frame against all, once for metrics of one embedding."""
    if a is b:
        return b.once(name, compute)
    if len(a) == 1 and a.parts["values"].data_ptr() == b.parts["values"].data_ptr():
        return b.once(f"{name} of the first", compute)
    return compute()


def _block_in_torch(paired: Callable[[Embedding, Embedding], Tensor], a: Embedding, b: Embedding) -> Tensor:
    """Compute a block of distances without kernels, in bounded memory."""
    return rows_in_torch(paired, a, b, batch_size=max(1, VALUES_TOGETHER // _rows(a).shape[1]))
