"""Information that the values of one frame hold on another's: its variation, and mutual information.

All three metrics come from the joint histogram of two frames' 8-bit values, or of equal bins over each
frame's own range, and its entropies, in bits:

    vi                  ½ (H(x|y) + H(y|x))          Meilă 2007, halved
    mutual-information  max(H(x), H(y)) − I(x; y)     Kraskov et al. 2005
    nmi                 1 − I(x; y) / H(x, y)         Rajski 1961

Entropies of near-identical frames differ in their last digits only: with c values in a cell and N in all,
N·H = N log₂ N − Σ c log₂ c. The terms are therefore whole numbers, c log₂ c in fixed point. Sums are then
exact, whatever their order, and the same bits on every device.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsim.compiled import compiled
from lsim.metric import Embedding, Metric, MetricInfo
from lsim.pairs import FAST, all_pairs, has_kernel, rows_in_torch
from lsim.preprocess import Preprocessing
from lsim.rounding import of_each
from lsim.threads import in_threads

LEVELS = 256

BITS_PER_MOVE = 6
"""Bits that the sum of entropies changes by where all pixels move to the next level: measured, 5 at most."""

SMALL_COUNT = 65_535
"""Largest count of the small cells: a table of those stays in the second-level cache, beside the frames."""

AT_ONCE = 1 << 25
"""Values counted at once in torch: 256 MB of indices."""


class _JointHistogram(Metric):
    """A metric of the joint histogram of two frames; a run computes it once for all three.

    Parameters
    ----------
    name, preprocessing, device
        As :class:`~lsim.metric.Metric` takes them.
    bins : int, optional
        Equal bins between minimum and maximum of each frame, as scikit-image takes them: 2 to 256. Default:
        the 256 levels of values truncated to 8 bit, in every mode.
    """

    copies_to_compare = False

    shares_embedding = "joint histogram"

    def __init__(
        self, name: str, preprocessing: Preprocessing, device: torch.device, *, bins: int | None = None
    ) -> None:
        if bins is None:
            super().__init__(name, preprocessing, device)
        elif isinstance(bins, bool) or not isinstance(bins, int) or not 2 <= bins <= LEVELS:
            raise ValueError(f"option 'bins' of metric {name!r} is 2 to {LEVELS}, got {bins!r}")
        else:
            super().__init__(name, preprocessing, device, bins=bins)
        self._bins = bins

    @classmethod
    def needs_double(cls, options: Mapping[str, Any]) -> bool:
        """Ask for double precision with bins: single would put values at an edge into the wrong bin."""
        return options.get("bins") is not None

    @property
    def quantised(self) -> bool:
        """True if entropies are those of 8-bit values: without ``bins``."""
        return self._bins is None

    @property
    def shared_as(self) -> tuple[object, ...]:
        """Key of metrics with the same bins."""
        return (self.shares_embedding, self._bins)

    def embed(self, frames: Tensor) -> Embedding:
        """Find levels or bins (n, pixels), N·H in fixed point, the largest count, and finite frames."""
        flat = frames.detach().flatten(1)
        if self._bins is not None:
            values, counts, finite = (
                torch.from_numpy(np.stack(part)).to(flat.device)
                for part in zip(*(_binned(row, self._bins) for row in flat.cpu().numpy()), strict=True)
            )
        elif has_kernel(flat):
            values, counts, finite = (
                torch.from_numpy(np.stack(part))
                for part in zip(*in_threads(levels, flat.float().numpy()), strict=True)
            )
        else:
            values = flat.to(torch.uint8)
            counts = _histogram(values.long(), LEVELS)
            # A sum of values in [0, 255] is finite exactly if all of them are.
            finite = flat.sum(1).isfinite()
        logs = _count_logs(flat.shape[1], flat.device)
        entropy = logs[-1] - logs[counts].sum(1)
        return Embedding({"values": values, "entropy": entropy, "peak": counts.amax(1), "finite": finite})

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound entropies in bits, where errors may have put some pixels on another level."""
        pixels = a.parts["values"].shape[1]
        shares = [_share_on_other_level(side, pixels) for side in (a, b)]
        share = shares[0][:, None] + shares[1]
        # An error moves a pixel to the next level, which is about as full: each entropy then changes by the
        # logarithm of a ratio of counts, not by that of a count.
        return BITS_PER_MOVE * share + 4 * LEVELS**2 * _unit(a)

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        conditional = a.once("conditional", lambda: _conditional(a, a)) if a is b else _conditional(a, b)
        return self._from_entropies(conditional, a.parts["entropy"][:, None], b.parts["entropy"], _unit(a))

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        conditional = _conditional_paired(a, b)
        return self._from_entropies(conditional, a.parts["entropy"], b.parts["entropy"], _unit(a))

    @abstractmethod
    def _from_entropies(self, conditional: Tensor, x: Tensor, y: Tensor, unit: float) -> Tensor:
        """Compute the distance from N (H(x|y) + H(y|x)), N·H(x) and N·H(y), all in fixed point.

        ``unit`` = 2⁻ᵏ / N converts them to bits.
        """


class VariationOfInformation(_JointHistogram):
    """½ (H(x|y) + H(y|x)) of 8-bit values, in bits; 0 also where one frame is a recolouring of the other."""

    info = MetricInfo(
        title="variation of information of 8-bit values, mean of both conditional entropies, in bits",
        source="Meilă 2007; skimage variation_of_information",
        differentiable=False,
        axioms=frozenset({"non-negative", "symmetric", "zero-on-itself", "triangle"}),
        one_channel_suffices=True,
        blind_to=("relabelling",),
        units="bit",
    )
    algorithm_version = 2
    published_on_8bit = True

    def _from_entropies(self, conditional: Tensor, x: Tensor, y: Tensor, unit: float) -> Tensor:
        return conditional * (unit / 2)


class MutualInformation(_JointHistogram):
    """max(H(x), H(y)) − I(x; y) of 8-bit values, in bits.

    −I alone, as registration minimises it, is −H(x) for a frame and itself, another value for each frame;
    counted from the larger entropy it is 0 there, and a metric. It is the larger of both conditional
    entropies, in bits.
    """

    info = MetricInfo(
        title="larger entropy minus mutual information of 8-bit values, in bits",
        source="max(H(x), H(y)) − I(x; y): Kraskov, Stögbauer, Andrzejak, Grassberger 2005",
        differentiable=False,
        axioms=frozenset({"non-negative", "symmetric", "zero-on-itself", "triangle"}),
        one_channel_suffices=True,
        blind_to=("relabelling",),
        units="bit",
    )

    def _from_entropies(self, conditional: Tensor, x: Tensor, y: Tensor, unit: float) -> Tensor:
        return (conditional + (x - y).abs()) * (unit / 2)


class NormalizedMutualInformation(_JointHistogram):
    """2 − (H(x) + H(y)) / H(x, y) of 8-bit values: 0 for equal frames, 1 for independent ones.

    It equals 1 − I(x; y) / H(x, y), a metric. Two constant frames have no entropy to share: their distance
    is 0, like that of any two frames that determine each other.
    """

    info = MetricInfo(
        title="2 − normalised mutual information of 8-bit values",
        source="Studholme, Hill, Hawkes 1999; skimage normalized_mutual_information; Rajski 1961",
        differentiable=False,
        axioms=frozenset({"non-negative", "symmetric", "zero-on-itself", "triangle"}),
        one_channel_suffices=True,
        blind_to=("relabelling",),
    )

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound entropies over the joint one, which is at least that of either frame."""
        joint = torch.maximum(a.parts["entropy"][:, None], b.parts["entropy"]) * _unit(a)
        bits = super().rounding(a, b, distances)
        return torch.where(joint > 0, 2 * bits / torch.where(joint > 0, joint, 1), bits).clamp(max=1)

    def _from_entropies(self, conditional: Tensor, x: Tensor, y: Tensor, unit: float) -> Tensor:
        twice_joint = conditional + (x + y)
        # Not in place of the zero: NaN stays NaN.
        return 2 * conditional / torch.where(twice_joint == 0, 1, twice_joint)


def _share_on_other_level(embedding: Embedding, pixels: int) -> Tensor:
    """Bound the share of a frame's pixels that errors may have put on another level: (n,).

    These are pixels within an error of a level's end: their expected number and three deviations more. The
    same whole number is on the same level everywhere, so sources of integers have none.
    """
    stored = of_each(embedding, stored=True)
    error = torch.where(stored > of_each(embedding), 2 * stored, 0).clamp(max=1)
    return (error + 3 * (error / pixels).sqrt()).clamp(max=1)


def _binned(row: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.bool_]:
    """Find the bin of each value of a frame (pixels,), counts of bins (256,), and whether all are finite.

    As :func:`numpy.histogramdd`: the last bin includes its upper edge.
    """
    finite = np.isfinite(row).all()
    if not finite:
        row = np.zeros_like(row)
    lo, hi = row.min(), row.max()
    edges = np.linspace(lo, hi, bins + 1)
    values = np.minimum(np.searchsorted(edges, row, side="right") - 1, bins - 1) if lo < hi else row * 0
    values = values.astype(np.uint8)
    return values, np.bincount(values, minlength=LEVELS), finite


def _histogram(cells: Tensor, size: int) -> Tensor:
    """Count how often each of 0 … size − 1 occurs in each row: (n, size)."""
    rows = torch.arange(len(cells), device=cells.device)[:, None]
    return torch.bincount((cells + size * rows).flatten(), minlength=size * len(cells)).view(-1, size)


def _conditional(a: Embedding, b: Embedding) -> Tensor:
    """Compute N (H(x|y) + H(y|x)) in fixed point, for all pairs: (len(a), len(b)) float64."""
    if not has_kernel(a.parts["values"], b.parts["values"]):
        return rows_in_torch(_conditional_paired, a, b)
    pixels = a.parts["values"].shape[1]
    # No cell of a joint histogram holds more than the fullest of either side.
    peak = min(int(a.parts["peak"].max()), int(b.parts["peak"].max()))
    counter = np.ones(1, np.uint16 if peak <= SMALL_COUNT else np.int32)
    parts = [side.parts[name].numpy() for side in (a, b) for name in ("values", "entropy")]
    conditional = all_pairs(
        conditional_entropies,
        len(a),
        len(b),
        *parts,
        _count_logs(pixels, torch.device("cpu")).numpy(),
        counter,
        symmetric=a is b,
        operations=6 * pixels,
    )
    return conditional.masked_fill_(~(a.parts["finite"][:, None] & b.parts["finite"]), math.nan)


def _conditional_paired(a: Embedding, b: Embedding) -> Tensor:
    """Compute N (H(x|y) + H(y|x)) in fixed point for a[k] or a[0] and b[k]: (len(b),) float64."""
    n, pixels = b.parts["values"].shape
    logs = _count_logs(pixels, b.parts["values"].device)
    x = a.parts["values"].expand(n, pixels)
    chunk = max(1, AT_ONCE // (pixels + LEVELS**2))
    joint = [
        logs[-1] - logs[_histogram(left.long() * LEVELS + right, LEVELS**2)].sum(1)
        for left, right in zip(x.split(chunk), b.parts["values"].split(chunk), strict=True)
    ]
    conditional = (2 * torch.cat(joint) - a.parts["entropy"] - b.parts["entropy"]).double()
    return conditional.masked_fill(~(a.parts["finite"] & b.parts["finite"]), math.nan)


def _unit(embedding: Embedding) -> float:
    """Return bits per unit of the fixed point, divided by the number of values."""
    pixels = embedding.parts["values"].shape[1]
    return math.ldexp(1 / pixels, -_binary_places(pixels))


def _binary_places(pixels: int) -> int:
    """Return as many binary places behind the point as keep N log₂ N below 2⁶²."""
    return 62 - math.ceil(pixels * math.log2(pixels)).bit_length()


@functools.lru_cache(maxsize=4)
def _count_logs(pixels: int, device: torch.device) -> Tensor:
    """Tabulate c log₂ c in fixed point for every count c up to the number of pixels: (pixels + 1,) int64."""
    counts = np.arange(pixels + 1, dtype=np.float64)
    counts[1:] *= np.log2(counts[1:])
    fixed = np.rint(np.ldexp(counts, _binary_places(pixels))).astype(np.int64)
    return torch.from_numpy(fixed).to(device)


@compiled(fastmath=FAST)
def levels(frame):  # type: ignore[no-untyped-def]
    """Truncate a frame (pixels,) float32 to 8 bit, count levels (256,), and tell whether all are finite."""
    values = np.empty(frame.size, np.uint8)
    finite = True
    for k in range(frame.size):
        finite &= not np.isnan(frame[k])
        values[k] = np.uint8(frame[k]) if finite else 0
    # Four tables, since neighbours are often equal, and an increment waits for the last one's store.
    counts = np.zeros((4, LEVELS), np.int64)
    for k in range(frame.size):
        counts[k & 3, values[k]] += 1
    return values, counts.sum(axis=0), finite


@compiled(fastmath=FAST)
def conditional_entropies(i, j, out, x, x_entropy, y, y_entropy, count_logs, counter):  # type: ignore[no-untyped-def]
    """Add N (H(x|y) + H(y|x)) to out[p], for frames i[p] of x and j[p] of y, each (n, pixels) uint8.

    Entropies are N·H in the fixed point of ``count_logs``; the dtype of ``counter``, a 1, holds every count.
    Two pairs that share their first frame are counted together: no increment waits for the last one's store.
    """
    pixels = x.shape[1]
    first = np.zeros(LEVELS * LEVELS, counter.dtype)
    second = np.zeros(LEVELS * LEVELS, counter.dtype)
    whole = count_logs[pixels]
    p = 0
    while p < i.shape[0]:
        a = x[i[p]]
        b = y[j[p]]
        is_double = p + 1 < i.shape[0] and i[p + 1] == i[p]
        if is_double:
            c = y[j[p + 1]]
            for k in range(pixels):
                row = np.int64(a[k]) << 8
                first[row | np.int64(b[k])] += counter[0]
                second[row | np.int64(c[k])] += counter[0]
            joint = whole - _sum_and_clear(second, count_logs)
            out[p + 1] += 2 * joint - x_entropy[i[p]] - y_entropy[j[p + 1]]
        else:
            for k in range(pixels):
                first[(np.int64(a[k]) << 8) | np.int64(b[k])] += counter[0]
        joint = whole - _sum_and_clear(first, count_logs)
        out[p] += 2 * joint - x_entropy[i[p]] - y_entropy[j[p]]
        p += 2 if is_double else 1


@compiled(fastmath=FAST)
def _sum_and_clear(table, count_logs):  # type: ignore[no-untyped-def]
    """Compute Σ c log₂ c over the cells of a histogram, and empty it. For 0 and 1, c log₂ c is 0."""
    total = 0
    for level in range(table.shape[0]):
        count = table[level]
        if count > 1:
            total += count_logs[count]
    table[:] = 0
    return total
