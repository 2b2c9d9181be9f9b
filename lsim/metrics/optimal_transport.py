"""Wasserstein-1 distances: how far values or mass must move to turn one frame into the other.

On a line, W₁ is the L1 distance of sorted samples, or of cumulative distributions. Both depend on one frame
alone, and are its embedding; a pair costs a sum of absolute differences.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lsim.compiled import compiled
from lsim.doubles import sum_of
from lsim.embedding import difference_of
from lsim.error_bounds import as_floats
from lsim.metric import Embedding, Metric, MetricInfo
from lsim.pairs import FAST, all_pairs, has_kernel, rows_in_torch, sums_of_differences
from lsim.preprocess import Preprocessing
from lsim.rounding import FULL_SCALE, of_difference, of_each, of_sum, share_of_equals
from lsim.threads import in_threads

DIRECTIONS = 12

ALONG_LINES = 2.0
"""Bound on cumulated errors, against the root of the sum of their squares; measured, 0.3."""

AXIOMS = frozenset({"non-negative", "symmetric", "zero-on-itself", "triangle"})


class Wasserstein(Metric):
    """W₁ between the values of two frames, on [0, 1], whatever their places, and of all channels together.

    From all values, not from a histogram: mean |a₍ₖ₎ − b₍ₖ₎| of sorted values.

    Examples
    --------
    >>> import lsim
    >>> lsim.load_metric("wasserstein", size=None).distance([[0.0, 2.0]], [[3.0, 0.0]], scope="none")
    array([0.5])
    """

    copies_to_compare = False

    info = MetricInfo(
        title="Wasserstein-1 distance of the values",
        source="1/N Σ |a₍ₖ₎ − b₍ₖ₎| of sorted values; scipy wasserstein_distance",
        axioms=AXIOMS,
        one_channel_suffices=True,
        blind_to=("shift", "half turn", "quarter turn", "reflection", "permutation"),
        takes_physical_values=True,
        power_of_units=1,
    )
    takes_rest = True
    rest_of_units = False

    def embed(self, frames: Tensor) -> Embedding:
        """Sort the values of each frame: (n, value)."""
        flat = as_floats(frames.flatten(1))
        if not has_kernel(flat) or flat.dtype == torch.float64:
            return Embedding({"values": flat.sort(1).values})
        rows = in_threads(sorted_values, flat.numpy())
        return Embedding({"values": torch.from_numpy(np.stack(rows))})

    def embed_with_rest(self, frames: Tensor, rest: Tensor) -> Embedding:
        """Sort values with their rest: by the rest, and then by value, where equal ones keep their order."""
        values, remainder = sum_of(frames.flatten(1), rest.flatten(1))
        by_rest = remainder.argsort(1)
        values, order = values.gather(1, by_rest).sort(dim=1, stable=True)
        return Embedding({"values": values, "rest": remainder.gather(1, by_rest).gather(1, order)})

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        x, y = a.parts["values"], b.parts["values"]
        if not has_kernel(x, y):
            return rows_in_torch(self.paired, a, b)
        rests = (a.parts["rest"], b.parts["rest"]) if "rest" in a.parts else None
        return sums_of_differences(x, y, rests) / (x.shape[1] * FULL_SCALE)

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound a mean of differences: errors of sorted values are no larger than those of values."""
        return of_difference(a, b, mean=True) + of_sum(distances, a.parts["values"].dtype)

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        return difference_of(a, b, "values").abs().double().mean(1) / FULL_SCALE


class SlicedWasserstein(Metric):
    """W₁ between two frames as mass on the plane, along fixed directions, in sides of the frame.

    Every channel is scaled to the mass 1, at the centres of pixels; negative values carry no mass.
    A channel without any mass counts as constant, and all constant channels are the same: evenly spread.
    The frame's longer side is 1. The result is the mean over channels and over all angles, each direction
    weighted by the angles that it is nearest to: a shift by s is 2/π·s, to 0.8 % for 12 directions.

    Directions are the shortest integer vectors (q, p), from (1, 0) to (3, ±1) and (1, ±3) for 12: the
    positions q·x + p·y of pixels on them are whole numbers, so that nothing is rounded to a bin.

    Parameters
    ----------
    name, preprocessing, device
        As :class:`~lsim.metric.Metric` takes them.
    directions : int, default 12
        A multiple of 4. Both axes are among them.
    """

    copies_to_compare = False

    info = MetricInfo(
        title="sliced Wasserstein-1 distance of the frame as mass on the plane",
        source="Bonneel, Rabin, Peyré, Pfister 2015; Kolouri, Zou, Rohde 2016; POT emd2_1d",
        axioms=AXIOMS,
        one_channel_suffices=True,
        blind_to=("scale",),
        takes_physical_values=True,
    )
    takes_rest = True

    def __init__(
        self, name: str, preprocessing: Preprocessing, device: torch.device, *, directions: int = DIRECTIONS
    ) -> None:
        if (
            isinstance(directions, bool)
            or not isinstance(directions, int)
            or directions < 4
            or directions % 4
        ):
            raise ValueError(
                f"option 'directions' of metric {name!r} is a multiple of 4, 4 or more, got {directions!r}"
            )
        super().__init__(name, preprocessing, device, directions=directions)
        self._vectors, self._weights = directions_and_weights(directions)
        # Python's numbers, for torch.compile.
        self._directions = [
            (int(q), int(p), float(weight))
            for (q, p), weight in zip(self._vectors, self._weights, strict=True)
        ]

    def embed(self, frames: Tensor) -> Embedding:
        """Accumulate mass along each direction: (n, channel · position) float64.

        Scaled such that the distance is the L1 distance. Near 1, single precision would round away a
        difference of one grey level. Double precision would round away most of a difference of 1e-12 between
        frames in double precision: their embedding is the mass of pixels, accumulated pair by pair.
        """
        if frames.dtype == torch.float64 and self.preprocessing.precision == "double":
            return self.embed_with_rest(frames, torch.zeros_like(frames))
        planes = frames.permute(0, 3, 1, 2)
        if not has_kernel(planes):
            cumulative = _cumulative(*_mass_and_total(planes.double()), self._directions)
            return Embedding(self._parts(cumulative, planes))
        project = functools.partial(cumulative_masses, vectors=self._vectors, weights=self._weights)
        rows = in_threads(project, as_floats(planes).contiguous().numpy())
        return Embedding(self._parts(torch.from_numpy(np.stack(rows)), planes))

    @staticmethod
    def _parts(cumulative: Tensor, planes: Tensor) -> dict[str, Tensor]:
        return {"cumulative": cumulative, "share": _share(planes), "repeated": share_of_equals(planes)}

    def embed_with_rest(self, frames: Tensor, rest: Tensor) -> Embedding:
        """Compute the mass of pixels and its rest (n, channel, y, x), and its sum (n, channel)."""
        planes, remainder = (part.permute(0, 3, 1, 2).contiguous() for part in (frames, rest))
        mass, total = _mass_and_total(planes)
        remainder = torch.where(mass == planes, remainder, 0)
        parts = {"mass": mass, "rest": remainder, "total": total, "share": _share(planes)}
        return Embedding(parts | {"repeated": share_of_equals(planes)})

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        if "mass" in a.parts:
            return self._compare_masses(a, b)
        x, y = a.parts["cumulative"], b.parts["cumulative"]
        return sums_of_differences(x, y) if has_kernel(x, y) else rows_in_torch(self.paired, a, b)

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        if "mass" not in a.parts:
            return (a.parts["cumulative"] - b.parts["cumulative"]).abs().sum(1)
        difference = _mass_difference(a, b)
        total = difference.new_ones(difference.shape[:2])
        return _cumulative(difference, total, self._directions).abs().sum(1)

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound cumulated mass by the share of it that errors of values can move.

        Equal values have equal errors, and errors of different values are independent: cumulated, they grow
        like the root of the sum of their squares.
        """
        x, y = (self._moved_share(side) for side in (a, b))
        share = x[:, None] + y
        if "mass" in a.parts:
            # The correction for unequal totals is rounded in proportion to their difference.
            first, second = a.parts["total"][:, None], b.parts["total"]
            surplus = ((first - second).abs() / (first + second)).mean(2)
            share = share + 2.0**-46 * surplus
        else:
            share = share + 2.0**-48
        return share.clamp(max=1) + of_sum(distances, torch.float64)

    def _moved_share(self, embedding: Embedding) -> Tensor:
        """Bound the share of each frame's mass that errors of its values move: (n,)."""
        error = of_each(embedding, stored=True, mean=True) * embedding.parts["share"]
        return error * (ALONG_LINES * embedding.parts["repeated"].sqrt()).clamp(max=0.5)

    def _compare_masses(self, a: Embedding, b: Embedding) -> Tensor:
        if not has_kernel(a.parts["mass"], b.parts["mass"]):
            return rows_in_torch(self.paired, a, b)
        sides = [side.parts[name].numpy() for side in (a, b) for name in ("mass", "rest", "total")]
        return all_pairs(
            moved_masses,
            len(a),
            len(b),
            *sides,
            self._vectors,
            self._weights,
            symmetric=a is b,
            operations=2 * self.options["directions"] * a.parts["mass"][0].numel(),
        )


def _share(planes: Tensor) -> Tensor:
    """Compute the share that an error of 1 everywhere has in the mass of (n, channel, y, x): (n,)."""
    mean = planes.detach().clamp(min=0).mean((2, 3)).double()
    return torch.where(mean > 0, 1 / torch.where(mean > 0, mean, 1), 0).mean(1)


def _mass_difference(a: Embedding, b: Embedding) -> Tensor:
    """Subtract masses that are scaled to 1 as :func:`moved_masses` does, in torch: (n, channel, y, x)."""
    x, y = a.parts, b.parts
    difference = (x["mass"] - y["mass"]) + (x["rest"] - y["rest"])
    first, second = (part["total"][..., None, None] for part in (x, y))
    surplus = difference.sum((2, 3), keepdim=True) / (first + second)
    scale = (first + second) / (2 * first * second)
    near = (difference - surplus * (x["mass"] + y["mass"])) * scale
    unequal = torch.maximum(first, second) > UNEQUAL * torch.minimum(first, second)
    return torch.where(unequal, x["mass"] / first - y["mass"] / second, near)


UNEQUAL = 4.0
"""Ratio of totals from which on masses are scaled to 1 before they are subtracted."""


@compiled()
def sorted_values(values):  # type: ignore[no-untyped-def]
    """Sort float32 (n,), by three digits of eleven bits from the last to the first; NaN at either end.

    NumPy's sort is as fast on some processors, and five times slower on others: AMD's Zen 4 stores the
    results of its AVX-512 sort one by one.
    """
    sign, digit = np.uint32(1 << 31), np.uint32(2047)
    keys = np.empty(values.shape[0], np.uint32)
    keys_out = np.empty_like(keys)
    counts = np.zeros((3, 2048), np.uint32)
    bits = values.view(np.uint32)
    for k in range(bits.shape[0]):
        # As whole numbers, positive ones rise with their bits, and negative ones fall.
        key = ~bits[k] if bits[k] & sign else bits[k] | sign
        keys[k] = key
        for d in range(3):
            counts[d, key >> np.uint32(11 * d) & digit] += np.uint32(1)
    for d in range(3):
        following = np.cumsum(counts[d]) - counts[d]
        for k in range(keys.shape[0]):
            at = keys[k] >> np.uint32(11 * d) & digit
            keys_out[following[at]] = keys[k]
            following[at] += 1
        keys, keys_out = keys_out, keys
    for k in range(keys.shape[0]):
        keys[k] = keys[k] & ~sign if keys[k] & sign else ~keys[k]
    return keys.view(np.float32)


@functools.cache
def directions_and_weights(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the shortest integer vectors (q, p) along (x, y), and the share of angles nearest to each.

    Parameters
    ----------
    count : int
        A multiple of 4.

    Returns
    -------
    vectors : ndarray of shape (count, 2), int64
        By rising angle in (−π/2, π/2].
    weights : ndarray of shape (count,), float64
        Sum 1.

    Examples
    --------
    >>> directions_and_weights(4)[0].tolist()
    [[1, -1], [1, 0], [1, 1], [0, 1]]
    """
    reach = math.isqrt(count) + 3
    half_plane = [(q, p) for q in range(reach) for p in range(1 - reach, reach) if q > 0 or p == 1]
    shortest = sorted(
        (vector for vector in half_plane if math.gcd(*vector) == 1),
        key=lambda vector: (vector[0] ** 2 + vector[1] ** 2, max(map(abs, vector))),
    )[:count]
    vectors = np.array(sorted(shortest, key=lambda vector: math.atan2(vector[1], vector[0])))
    angles = np.arctan2(vectors[:, 1], vectors[:, 0])
    circle = np.concatenate([angles[-1:] - np.pi, angles, angles[:1] + np.pi])
    return vectors, (circle[2:] - circle[:-2]) / (2 * np.pi)


@compiled()  # fast mathematics would not divide exactly
def cumulative_masses(planes, vectors, weights):  # type: ignore[no-untyped-def]
    """Accumulate and scale the mass of one frame (channel, y, x) float32: (channel · position,) float64.

    At every position of every direction but the last, where it is 1. Values in single precision mostly add up
    without rounding; dividing after the sum makes all constant channels equal.
    """
    channels, height, width = planes.shape
    length = 0
    for q, p in vectors:
        length += q * (width - 1) + abs(p) * (height - 1)
    out = np.zeros(channels * length)
    mass = np.empty((height, width))
    line = np.empty(np.abs(vectors).sum(axis=1).max() * max(height, width))
    start = 0
    for c in range(channels):
        total = 0.0
        for r in range(height):
            for k in range(width):
                value = np.float64(planes[c, r, k])
                mass[r, k] = 0.0 if value < 0 else value
            total += _sum(mass[r])
        if total == 0:
            mass[:] = 1
            total = np.float64(height * width)
        for d in range(vectors.shape[0]):
            q, p = vectors[d]
            positions = q * (width - 1) + abs(p) * (height - 1)
            line[: positions + 1] = 0
            _project(mass, q, p, line)
            scale = weights[d] / (math.sqrt(q * q + p * p) * max(height, width) * channels)
            sum_so_far = 0.0
            for t in range(positions):
                sum_so_far += line[t]
                out[start + t] = sum_so_far / total * scale
            start += positions
    return out


@compiled()
def _project(mass, q, p, line):  # type: ignore[no-untyped-def]
    """Add the mass (y, x) up in the positions q·x + p·y, which begin at 0, of a line of zeros."""
    height, width = mass.shape
    for r in range(height):
        # The corner with the smallest position has 0.
        along_row = line[p * r if p >= 0 else -p * (height - 1 - r) :]
        if q == 0:
            along_row[0] += _sum(mass[r])
        elif q == 1:  # the same as below, but vectorised
            for k in range(width):
                along_row[k] += mass[r, k]
        else:
            for k in range(width):
                along_row[q * k] += mass[r, k]


@compiled()
def moved_masses(  # type: ignore[no-untyped-def]
    i, j, out, x, x_rest, x_total, y, y_rest, y_total, vectors, weights
):
    """Add to out[p] the sliced W₁ of the masses i[p] of x and j[p] of y, (n, channel, y, x), scaled to 1.

    What is accumulated is their difference: it is as small as the distance, and so is its rounding. With
    d = x − y and totals X and Y, x/X − y/Y = (d − (x + y) Σd / (X + Y)) (X + Y) / (2 X Y). Where one total is
    :data:`UNEQUAL` times the other, most of that cancels, and each mass is divided by its own.
    """
    channels, height, width = x.shape[1:]
    line = np.empty(np.abs(vectors).sum(axis=1).max() * max(height, width))
    difference = np.empty((height, width))
    for p in range(i.shape[0]):
        for c in range(channels):
            surplus = 0.0
            for r in range(height):
                for k in range(width):
                    rest = x_rest[i[p], c, r, k] - y_rest[j[p], c, r, k]
                    difference[r, k] = (x[i[p], c, r, k] - y[j[p], c, r, k]) + rest
                surplus += _sum(difference[r])
            first, second = x_total[i[p], c], y_total[j[p], c]
            surplus /= first + second
            scaled = (first + second) / (2 * first * second)
            unequal = max(first, second) > UNEQUAL * min(first, second)
            if unequal:
                scaled = 1.0
            for r in range(height):
                for k in range(width):
                    if unequal:
                        difference[r, k] = x[i[p], c, r, k] / first - y[j[p], c, r, k] / second
                    else:
                        difference[r, k] -= surplus * (x[i[p], c, r, k] + y[j[p], c, r, k])
            for d in range(vectors.shape[0]):
                q, step = vectors[d]
                positions = q * (width - 1) + abs(step) * (height - 1)
                line[: positions + 1] = 0
                _project(difference, q, step, line)
                scale = weights[d] / (math.sqrt(q * q + step * step) * max(height, width) * channels)
                scale *= scaled
                sum_so_far = 0.0
                total = 0.0
                for t in range(positions):
                    sum_so_far += line[t]
                    total += abs(sum_so_far)
                out[p] += total * scale


@compiled(fastmath=FAST)
def _sum(values):  # type: ignore[no-untyped-def]
    total = 0.0
    for k in range(values.shape[0]):
        total += values[k]
    return total


def _mass_and_total(planes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mass in every pixel, spread evenly where there is none, and its sum (n, channel)."""
    mass = planes.clamp(min=0)
    total = mass.sum((2, 3), keepdim=True)
    height, width = planes.shape[2:]
    return torch.where(total == 0, 1, mass), torch.where(total == 0, height * width, total)[..., 0, 0]


def _cumulative(mass: Tensor, total: Tensor, directions: Sequence[tuple[int, int, float]]) -> Tensor:
    """Accumulate mass as :func:`cumulative_masses` does, in torch: (n, channel · position) float64.

    Parameters
    ----------
    mass : Tensor of shape (n, channel, y, x), float64
    total : Tensor of shape (n, channel), float64
        What it is divided by.
    directions : sequence of (q, p, weight)
        As :func:`directions_and_weights` gives them, in Python's numbers.
    """
    n, channels, height, width = mass.shape
    mass, total = mass.flatten(2), total[..., None]
    parts = []
    for q, p, weight in directions:
        order, last = _order_along(q, p, height, width, mass.device)
        scale = weight / (math.hypot(q, p) * max(height, width) * channels)
        parts.append(mass[:, :, order].cumsum(2)[:, :, last] / total * scale)
    return torch.cat(parts, 2).reshape(n, -1)


@functools.lru_cache(maxsize=64)
def _order_along(q: int, p: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sort pixels by their position along (q, p); find the last at or before each position but the last.

    To gather and accumulate in one order is the same to the last bit on a CPU; a GPU may add in another.
    """
    y, x = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    position = (q * x + p * y - min(p, 0) * (height - 1)).flatten()  # the smallest is 0
    order = position.argsort(stable=True)
    steps = torch.arange(q * (width - 1) + abs(p) * (height - 1), device=device)
    return order, torch.searchsorted(position[order], steps, right=True) - 1
