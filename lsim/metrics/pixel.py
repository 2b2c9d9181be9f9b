"""Metrics of pixel differences, on [0, 1] after the common normalisation; every pixel counts alike.

Those of squared differences share one matrix of them in a run. With a mask, pixels missing in either frame
of a pair are left out of all that is summed for it: differences, normalisers and means.
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

from lsim.metric import Embedding, Metric, MetricInfo, safe_sqrt
from lsim.pairs import (
    FAST,
    absolute_differences,
    all_pairs,
    directly,
    has_kernel,
    known_absolute_differences,
    known_squared_differences,
    rows_in_torch,
    squared_differences,
    squared_distances,
)
from lsim.precision import (
    CONFIDENCE,
    DIRECTLY,
    PROMISE,
    PairPrecision,
    ReportsPrecision,
    number_of_pairs,
)
from lsim.products import VALUES_TOGETHER, known_in_both

FULL_SCALE = 255.0

EPSILON = 1e-7
"""What The Well adds to what it divides a mean square by; here of values on [0, 1]."""

NOISE = 1e-25
"""A smaller ½ |û − v̂|² is rounding of unit vectors; in one value, single precision can differ by 1e-20."""

# A mean by a reciprocal is off by a rounding, and a constant frame then not constant.
WITH_DIVISION = FAST - {"arcp"}

SYMMETRIC = frozenset({"non-negative", "symmetric", "zero-on-itself"})


class _PixelMetric(ReportsPrecision, Metric):
    """The frame is its own embedding, flattened."""

    copies_to_compare = False

    shares_embedding = "pixels"

    def embed(self, frames: Tensor) -> Embedding:
        values = frames.flatten(1)
        return Embedding({"values": values if values.dtype == torch.float64 else values.float()})

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
        one_channel_suffices=True,
        takes_physical_values=True,
        power_of_units=1,
    )
    algorithm_version = 2

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        x, y = a.parts["values"], b.parts["values"]
        self.note_precision(directly(len(x), len(y), symmetric=a is b))
        if not has_kernel(x, y):
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
        mean, record = _shared(a, b, "mean squared differences", lambda: self._mean_squared_anew(a, b))
        self.note_precision(record)
        return mean

    def _mean_squared_anew(self, a: Embedding, b: Embedding) -> tuple[Tensor, PairPrecision]:
        x = a.parts["values"]
        y = x if a is b else b.parts["values"]
        masked = self.preprocessing.mask
        if not (masked or _carries_gradients(x, y)):
            sums, record = squared_distances(x, y)
            return sums / (x.shape[1] * FULL_SCALE**2), record
        record = directly(len(x), len(y), symmetric=a is b)
        if not has_kernel(x, y):
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
        one_channel_suffices=True,
        takes_physical_values=True,
        power_of_units=2,
    )
    algorithm_version = 2
    published_on_8bit = True

    def _from(self, squared: Tensor, divisor: Tensor | float) -> Tensor:
        return squared


class RMSE(_OfSquares):
    """Root of the mean squared difference, on [0, 1]."""

    info = MetricInfo(
        title="root mean squared difference",
        source="√(1/N Σ (a − b)²)",
        axioms=SYMMETRIC | {"triangle"},
        takes_mask=True,
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
        one_channel_suffices=True,
        takes_physical_values=True,
    )
    centred: ClassVar[bool] = False

    def _divisor(self, a: Embedding, b: Embedding) -> Tensor:
        x, y = a.parts["values"], b.parts["values"]
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

    def _divisor_paired(self, a: Embedding, b: Embedding) -> Tensor:
        known = _known(self, a, b)
        values = a.parts["values"].expand(len(b), -1).double()
        centred = _centred(values, known) if self.centred else _where_known(values, known)
        squares = _where_known(centred.square(), known).sum(1)
        count = values.shape[1] if known is None else known.sum(1)
        return squares / _degrees_of_freedom(count, self.centred) / FULL_SCALE**2 + EPSILON


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
        one_channel_suffices=True,
        takes_physical_values=True,
    )
    centred: ClassVar[bool] = False

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        x, y = a.parts["values"], b.parts["values"]
        if not self.preprocessing.mask:
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
        u = _unit_vectors(x, self.centred)
        v = u if a is b else _unit_vectors(y, self.centred)
        if has_kernel(u, v):
            sides = (u.numpy(), v.numpy())
            squared = all_pairs(
                squared_differences, len(u), len(v), *sides, symmetric=a is b, operations=2 * u.shape[1]
            )
        else:
            squared = _in_rows(lambda left, right: (left - right).square().sum(1), u, v)
        flat = _is_flat(v)
        return _from_units(squared, (flat if u is v else _is_flat(u))[:, None], flat)

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        known = _known(self, a, b)
        x, y = torch.broadcast_tensors(a.parts["values"], b.parts["values"])
        u, v = _units(x, known, self.centred), _units(y, known, self.centred)
        distances = _from_units((u - v).square().sum(1), _is_flat(u), _is_flat(v))
        return distances if known is None else torch.where(known.any(1), distances, math.nan)


class Correlation(Cosine):
    """One minus Pearson's correlation of two frames' values: the cosine between them less their means.

    A constant frame has no pattern: it is at 1 from frames that have one, and at 0 from another constant.
    """

    info = MetricInfo(
        title="one minus Pearson's correlation",
        source="1 − cov(a, b) / (σ_a σ_b); scipy correlation",
        axioms=SYMMETRIC,
        takes_mask=True,
        one_channel_suffices=True,
        takes_physical_values=True,
    )
    centred = True


# --- sums over what is known --------------------------------------------------------------------------------


def _known(metric: Metric, a: Embedding, b: Embedding) -> Tensor | None:
    """Where neither frame is missing; None stands for everywhere."""
    if not metric.preprocessing.mask:
        return None
    return ~(a.parts["values"].isnan() | b.parts["values"].isnan())


def _where_known(values: Tensor, known: Tensor | None) -> Tensor:
    """Zero elsewhere, with gradients of zero."""
    return values if known is None else torch.where(known, values, 0)


def _mean(values: Tensor, known: Tensor | None) -> Tensor:
    """(rows, 1), of values that are zero where unknown."""
    return values.mean(1, keepdim=True) if known is None else values.sum(1, True) / known.sum(1, True)


def _centred(values: Tensor, known: Tensor | None) -> Tensor:
    """Less the mean of the known."""
    values = _where_known(values, known)
    return _where_known(values - _mean(values, known), known)


def _units(values: Tensor, known: Tensor | None, centred: bool) -> Tensor:
    """Rows of length 1 in double, those of length 0 left so: (rows, columns)."""
    values = values.double()
    values = _centred(values, known) if centred else _where_known(values, known)
    squares = values.square().sum(1, keepdim=True)
    flat = squares == 0
    return torch.where(flat, 0, values / torch.where(flat, 1, squares).sqrt())


def _is_flat(units: Tensor) -> Tensor:
    """Rows of zeros: (rows,)."""
    return torch.linalg.vector_norm(units, dim=1) == 0


def _from_units(squared: Tensor, left_is_flat: Tensor, right_is_flat: Tensor) -> Tensor:
    """½ |u − v|²; 0 for frames that are multiples of one another; 1 where one alone has length 0."""
    distances = torch.where(squared < 2 * NOISE, 0, squared / 2)
    return torch.where((left_is_flat ^ right_is_flat) & ~squared.isnan(), 1, distances)


def _degrees_of_freedom(count: Any, centred: bool) -> Any:
    """What a sum of squares of ``count`` values is divided by: one less about their own mean."""
    if not centred:
        return count
    return (count - 1).clamp(min=1) if isinstance(count, Tensor) else max(count - 1, 1)


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
            out[p] = squares / 2 if squares >= 2 * NOISE else 0.0


@numba.njit(nogil=True, cache=True, fastmath=WITH_DIVISION, error_model="numpy")
def _to_units(x, out, centred):  # type: ignore[no-untyped-def]
    """Rows of length 1, those of length 0 left so."""
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
        scale = 1 / np.sqrt(squares) if squares != 0 else 0.0
        for k in range(x.shape[1]):
            out[i, k] = (np.float64(x[i, k]) - mean) * scale


def _unit_vectors(values: Tensor, centred: bool) -> Tensor:
    """:func:`_units` of whole rows; on the CPU the same bits whatever the other rows."""
    if not has_kernel(values):
        return _units(values, None, centred)
    units = np.empty(values.shape)
    _to_units(values.numpy(), units, centred)
    return torch.from_numpy(units)


def _powers(values: Tensor, centred: bool) -> Tensor:
    """Mean square of each row, or its variance if ``centred``: (rows,) float64."""
    if not has_kernel(values):
        rows = [_centred(row.double(), None) if centred else row.double() for row in values.split(1)]
        return torch.cat([row.square().sum(1) for row in rows]) / _degrees_of_freedom(
            values.shape[1], centred
        )
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


def _carries_gradients(x: Tensor, y: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)


def _rows(paired: Callable[[Embedding, Embedding], Tensor], a: Embedding, b: Embedding) -> Tensor:
    """The block of distances on a device without kernels, in bounded memory."""
    return rows_in_torch(paired, a, b, together=max(1, VALUES_TOGETHER // a.parts["values"].shape[1]))


def _in_rows(paired: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return rows_in_torch(paired, x, y, together=max(1, VALUES_TOGETHER // x.shape[1]))
