"""Correlations of distances with ground truth and their uncertainty, as plain functions on arrays.

The functions know no store, file or name. Arrays have the axes ``(sequence, pair)`` until sequences are
pooled; pooled values are flat, with a ``unit`` index beside them: pairs of one unit are resampled together.
Pairs within one sequence are dependent (they share frames), so uncertainty comes from a cluster bootstrap:
whole units are drawn with replacement, never single pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numba
import numpy as np
import scipy.stats

Pairs: TypeAlias = tuple[np.ndarray, np.ndarray]
Protocol = Literal["published", "all-pairs"]

POOLED = ("pearson", "spearman", "kendall")
"""Statistics of the pooled pairs of many sequences."""

PER_SEQUENCE = ("pearson", "spearman")
"""Statistics that are also taken per sequence, as mean and standard deviation."""

SMALLEST_SPREAD = 1e-3
"""Smallest standard error of a difference between correlations: the last digit that tables show. Metrics that
hardly differ have mostly replicates of zero, and would widen the intervals of all."""

MINIMUM_UNITS = 3
"""With fewer units there is no interval: two units show no spread to resample."""


def reference_pairs(frames: int) -> Pairs:
    """List the pairs ``(0, j)``, ``j = 1 … frames - 1``: the reference against every other frame.

    Parameters
    ----------
    frames : int

    Returns
    -------
    tuple of two ndarrays of shape (pair,)
    """
    columns = np.arange(1, frames)
    return np.zeros_like(columns), columns


def all_pairs(frames: int) -> Pairs:
    """List the pairs ``(i, j)``, ``i < j``, row by row; the diagonal is not among them.

    Parameters
    ----------
    frames : int

    Returns
    -------
    tuple of two ndarrays of shape (pair,)
    """
    return np.triu_indices(frames, k=1)


PAIRS: dict[str, Callable[[int], Pairs]] = {"published": reference_pairs, "all-pairs": all_pairs}
"""Function that lists the pairs of a protocol."""


def select_pairs(matrices: np.ndarray, pairs: Pairs) -> np.ndarray:
    """Take the pairs of distance matrices.

    Parameters
    ----------
    matrices : ndarray of shape (sequence, frame, frame)
    pairs : pair of ndarrays of shape (pair,)

    Returns
    -------
    ndarray of shape (sequence, pair), float64
    """
    return matrices[:, pairs[0], pairs[1]].astype(np.float64)


def ground_truth(parameter: np.ndarray, pairs: Pairs) -> np.ndarray:
    """Compute differences of the parameter, ``|p_j − p_i|``, rounded to single precision.

    The published evaluation holds them in single precision. That matters for ranks: 0.3 − 0.2 and
    0.1 − 0 are the same step of the parameter, yet differ in the last bit of a double.

    Parameters
    ----------
    parameter : ndarray of shape (sequence, frame)
    pairs : pair of ndarrays of shape (pair,)

    Returns
    -------
    ndarray of shape (sequence, pair), float64
    """
    difference = np.abs(parameter[:, pairs[1]] - parameter[:, pairs[0]])
    return difference.astype(np.float32).astype(np.float64)


def reasons_to_leave_out(distances: np.ndarray, pairs: Pairs) -> list[str]:
    """Give the reason why each sequence cannot be correlated; an empty string where it can.

    Parameters
    ----------
    distances : ndarray of shape (sequence, pair)
    pairs : pair of ndarrays of shape (pair,)
        Named in the reason.

    Returns
    -------
    list of str, one a sequence
    """
    reasons = []
    for row in distances:
        non_finite = np.flatnonzero(~np.isfinite(row))
        if row.size == 0:
            reasons.append("has no pairs: a single frame")
        elif non_finite.size:
            first = non_finite[0]
            count = f" ({non_finite.size} of {row.size} pairs are not finite)" if non_finite.size > 1 else ""
            reasons.append(
                f"distance of frames {pairs[0][first]} and {pairs[1][first]} is {row[first]:g}{count}"
            )
        elif row.max() == row.min():
            reasons.append(f"all {row.size} distances are {row[0]:g}: a constant has no correlation")
        else:
            reasons.append("")
    return reasons


def scale(distances: np.ndarray) -> np.ndarray:
    """Scale each sequence's distances to [0.1, 1], its smallest to 0.1 and its largest to 1.

    Distances of different sequences can be pooled only when scaled. The formula and the order of its
    operations are those of the published evaluation (Kohl et al. 2020), so that ties are the same.

    Parameters
    ----------
    distances : ndarray of shape (sequence, pair)
        Finite and not constant along the pairs.

    Returns
    -------
    ndarray of shape (sequence, pair), float64
    """
    low = distances.min(axis=1, keepdims=True)
    high = distances.max(axis=1, keepdims=True)
    return 0.9 * ((distances - low) / (high - low)) + 0.1


def pooled_inputs(matrices: np.ndarray, parameter: np.ndarray, protocol: str) -> tuple[np.ndarray, ...]:
    """Compute scaled distances and ground truth of sequences, ready to be pooled.

    Parameters
    ----------
    matrices : ndarray of shape (sequence, frame, frame)
        Distance matrices of one metric; every sequence must be usable, see :func:`reasons_to_leave_out`.
    parameter : ndarray of shape (sequence, frame)
    protocol : {"published", "all-pairs"}

    Returns
    -------
    predictions, targets : ndarrays of shape (sequence, pair), float64
    """
    pairs = PAIRS[protocol](matrices.shape[1])
    return scale(select_pairs(matrices, pairs)), ground_truth(parameter, pairs)


def correlation(x: np.ndarray, y: np.ndarray, statistic: str) -> float:
    """Correlate two flat arrays.

    Ties share their mean rank (Spearman) or count as in tau-b (Kendall).

    Parameters
    ----------
    x, y : ndarrays of shape (pair,)
    statistic : {"pearson", "spearman", "kendall"}

    Returns
    -------
    float
        NaN where either array is constant or has fewer than two values.

    Raises
    ------
    ValueError
        For any other statistic.
    """
    if statistic not in POOLED:
        raise ValueError(f"unknown statistic {statistic!r}; expected one of {', '.join(POOLED)}")
    if x.size < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    if statistic == "pearson":
        return float(np.corrcoef(x, y)[0, 1])
    if statistic == "spearman":
        return float(scipy.stats.spearmanr(x, y).statistic)
    return float(scipy.stats.kendalltau(x, y).statistic)


def sequence_correlations(x: np.ndarray, y: np.ndarray, statistic: str) -> np.ndarray:
    """Correlate each row of ``x`` with the same row of ``y``.

    Parameters
    ----------
    x, y : ndarrays of shape (sequence, pair)
    statistic : {"pearson", "spearman"}

    Returns
    -------
    ndarray of shape (sequence,), float64
        NaN where a row is constant.
    """
    if statistic not in PER_SEQUENCE:
        raise ValueError(f"unknown statistic {statistic!r}; expected one of {', '.join(PER_SEQUENCE)}")
    if x.size == 0:
        return np.full(len(x), np.nan)
    if statistic == "spearman":
        x, y = scipy.stats.rankdata(x, axis=1), scipy.stats.rankdata(y, axis=1)
    x = x - x.mean(axis=1, keepdims=True)
    y = y - y.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.clip((x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1)), -1, 1)


def collapse_strata(strata: np.ndarray) -> np.ndarray:
    """Merge strata of fewer than :data:`MINIMUM_UNITS` units with one another.

    A stratum of one unit would be drawn unchanged every time and feign certainty. Small strata are
    merged, as is usual in stratified surveys, which errs on the side of too wide an interval. If the merged
    stratum is still too small, it joins the smallest of the others.

    Parameters
    ----------
    strata : ndarray of shape (unit,), int

    Returns
    -------
    ndarray of shape (unit,), int
        Labels 0, 1, …
    """
    labels, sizes = np.unique(strata, return_counts=True)
    small = sizes < MINIMUM_UNITS
    if small.any() and not small.all() and sizes[small].sum() < MINIMUM_UNITS:
        small[np.flatnonzero(~small)[np.argmin(sizes[~small])]] = True
    collapsed = np.where(np.isin(strata, labels[small]), labels[small][0], strata) if small.any() else strata
    return np.unique(collapsed, return_inverse=True)[1]


def draw_weights(strata: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    """Draw how often each unit counts in each bootstrap replicate.

    From each stratum as many units are drawn, with replacement, as it has. The same strata and seed
    give the same draws, so that two metrics are compared on the same resamples.

    Parameters
    ----------
    strata : ndarray of shape (unit,), int
    replicates : int
    seed : int

    Returns
    -------
    ndarray of shape (replicate, unit), int32
    """
    rng = np.random.default_rng(seed)
    weights = np.empty((replicates, strata.size), np.int32)
    for label in np.unique(strata):
        members = np.flatnonzero(strata == label)
        weights[:, members] = rng.multinomial(
            members.size, np.full(members.size, 1 / members.size), size=replicates
        )
    return weights


def bootstrap_pearson(x: np.ndarray, y: np.ndarray, unit: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Compute the Pearson correlation of every replicate, exactly, from sums per unit.

    Parameters
    ----------
    x, y : ndarrays of shape (pair,)
    unit : ndarray of shape (pair,), int
        Column of ``weights`` that each pair belongs to.
    weights : ndarray of shape (replicate, unit)
        From :func:`draw_weights`.

    Returns
    -------
    ndarray of shape (replicate,), float64
    """
    x, y = x - x.mean(), y - y.mean()
    terms = (np.ones_like(x), x, y, x * x, y * y, x * y)
    sums = np.stack([np.bincount(unit, term, minlength=weights.shape[1]) for term in terms], axis=1)
    n, sx, sy, sxx, syy, sxy = (weights.astype(np.float64) @ sums).T
    with np.errstate(invalid="ignore", divide="ignore"):
        return (n * sxy - sx * sy) / np.sqrt((n * sxx - sx * sx) * (n * syy - sy * sy))


def bootstrap_ranks(
    x: np.ndarray, y: np.ndarray, unit: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the Spearman and Kendall (tau-b) correlations of every replicate.

    They are exactly those of the resampled pairs: every replicate is ranked anew, ties included. The pairs
    are sorted only once, and a unit that is drawn k times gives its pairs the weight k.

    Parameters
    ----------
    x, y : ndarrays of shape (pair,)
    unit : ndarray of shape (pair,), int
    weights : ndarray of shape (replicate, unit), int

    Returns
    -------
    spearman, kendall : ndarrays of shape (replicate,), float64
    """
    order = np.argsort(x, kind="stable")
    levels, y_level = np.unique(y[order], return_inverse=True)
    ties_end = np.append(np.flatnonzero(np.diff(x[order])) + 1, x.size)
    return _rank_statistics(
        np.ascontiguousarray(weights, dtype=np.int32),
        unit[order].astype(np.int64),
        ties_end.astype(np.int64),
        y_level.astype(np.int64),
        levels.size,
    )


@numba.njit(nogil=True, cache=True)
def _rank_levels(count: np.ndarray, total: float) -> tuple[np.ndarray, float, float]:
    """Rank levels that occur ``count`` times; return mean ranks, the sum of their squares, and that of ties.

    Ranks are centred: their mean over all pairs is (total + 1) / 2.
    """
    rank = np.empty(count.size)
    start = 0.0
    squares = 0.0
    ties = 0.0
    for level in range(count.size):
        rank[level] = start + (count[level] - total) / 2
        start += count[level]
        squares += count[level] * rank[level] ** 2
        ties += count[level] ** 2
    return rank, squares, ties


@numba.njit(nogil=True, cache=True)
def _sum_below(tree: np.ndarray, level: int) -> float:
    """Sum what a Fenwick tree holds below a level."""
    total = 0.0
    while level > 0:
        total += tree[level]
        level -= level & -level
    return total


@numba.njit(nogil=True, cache=True)
def _rank_statistics(
    weights: np.ndarray, unit: np.ndarray, ties_end: np.ndarray, y_level: np.ndarray, levels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compute weighted Spearman and tau-b of pairs in rising x, where runs of equal x end at ``ties_end``."""
    replicates = weights.shape[0]
    spearman = np.full(replicates, np.nan)
    kendall = np.full(replicates, np.nan)
    for replicate in range(replicates):
        weight = weights[replicate]
        count = np.zeros(levels)
        for p in range(unit.size):
            count[y_level[p]] += weight[unit[p]]
        total = count.sum()
        y_rank, y_squares, y_ties = _rank_levels(count, total)

        # Walk through the pairs in rising x. `tree` (Fenwick) counts the passed pairs by their level of y.
        tree = np.zeros(levels + 1)
        visits = 0.0
        x_squares = 0.0
        x_ties = 0.0
        product = 0.0
        concordance = 0.0
        start = 0
        for end in ties_end:
            tied = 0.0
            ranks = 0.0
            for p in range(start, end):
                w = weight[unit[p]]
                if w == 0:
                    continue
                level = y_level[p]
                lower, not_higher = _sum_below(tree, level), _sum_below(tree, level + 1)
                concordance += w * (lower - (visits - not_higher))
                tied += w
                ranks += w * y_rank[level]
            for p in range(start, end):
                w = weight[unit[p]]
                if w == 0:
                    continue
                k = y_level[p] + 1
                while k <= levels:
                    tree[k] += w
                    k += k & -k
            x_rank = visits + (tied - total) / 2
            x_squares += tied * x_rank**2
            x_ties += tied**2
            product += x_rank * ranks
            visits += tied
            start = end

        if x_squares > 0 and y_squares > 0:
            spearman[replicate] = product / np.sqrt(x_squares * y_squares)
            kendall[replicate] = 2 * concordance / np.sqrt((total**2 - x_ties) * (total**2 - y_ties))
    return spearman, kendall


def bootstrap_mean_std(
    values: np.ndarray, unit: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compute mean and standard deviation (of the population, as published) of every replicate.

    Parameters
    ----------
    values : ndarray of shape (sequence,)
    unit : ndarray of shape (sequence,), int
    weights : ndarray of shape (replicate, unit)

    Returns
    -------
    mean, std : ndarrays of shape (replicate,), float64
    """
    centre = values.mean()
    deviation = values - centre
    terms = (np.ones_like(deviation), deviation, deviation**2)
    sums = np.stack([np.bincount(unit, term, minlength=weights.shape[1]) for term in terms], axis=1)
    n, first, second = (weights.astype(np.float64) @ sums).T
    mean = first / n
    return centre + mean, np.sqrt(np.maximum(second / n - mean**2, 0))


def interval(replicates: np.ndarray, value: float, level: float = 0.95) -> tuple[float, float]:
    """Compute the percentile interval of bootstrap replicates, widened to hold the value itself.

    Resampling can shift a statistic by more than it spreads: a unit that is drawn twice ties with itself,
    which lifts a rank correlation near 1 a little, and lowers a standard deviation.

    Parameters
    ----------
    replicates : ndarray of shape (replicate,)
    value : float
        The statistic of the original sample.
    level : float
        Share of the replicates inside.

    Returns
    -------
    low, high : float
        Both NaN where the value or any replicate is NaN, or there are none.
    """
    if replicates.size == 0 or np.isnan(value) or np.isnan(replicates).any():
        return float("nan"), float("nan")
    tail = (1 - level) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return min(float(low), value), max(float(high), value)


@dataclass(frozen=True)
class Comparisons:
    """Differences between metrics on the same sequences, with their bootstrap replicates.

    Attributes
    ----------
    differences : ndarray of shape (comparison,)
    replicates : ndarray of shape (comparison, replicate)
        All comparisons have the same draws.
    strata : ndarray of shape (unit,), int
        Strata of the draws, see :func:`draw_weights`.
    """

    differences: np.ndarray
    replicates: np.ndarray
    strata: np.ndarray


def simultaneous_intervals(families: Sequence[Comparisons], level: float = 0.95) -> list[np.ndarray]:
    """Give intervals that hold all true differences at once, with probability ``level``.

    So they hold as well for a comparison that the data pick, such as that of the best metric with the next.
    An interval is the difference ± c standard errors of its replicates. c is the quantile of the largest
    studentised deviation of any comparison in a replicate (max-T; Romano & Wolf 2005,
    doi:10.1111/j.1468-0262.2005.00615.x; Montiel Olea & Plagborg-Møller 2019, doi:10.1002/jae.2656). As
    replicates of few units spread too little, c is widened by the ratio of Student's quantile to the normal
    one (Hesterberg 2015, doi:10.1080/00031305.2015.1089789).

    Parameters
    ----------
    families : sequence of Comparisons
        One for every set of sequences that metrics are compared on. Families have different draws, so the
        chance of an error is divided among them by their number of comparisons (Bonferroni).
    level : float

    Returns
    -------
    list of ndarray of shape (comparison, 2)
        Low and high, by family. NaN where a comparison or any of its replicates is NaN, or there are none;
        such comparisons don't widen the intervals of others. [0, 0] for metrics that are equal in all
        replicates.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> differences = np.array([0.0, 0.2, 0.9])
    >>> replicates = differences[:, None] + 0.1 * rng.normal(size=(3, 2000))
    >>> family = Comparisons(differences, replicates, np.zeros(40, int))
    >>> intervals = simultaneous_intervals([family])[0]
    >>> [bool(low > 0) for low, high in intervals]
    [False, False, True]
    """
    finite = [_is_finite(family) for family in families]
    count = sum(int(is_finite.sum()) for is_finite in finite)
    by_family = []
    for family, is_finite in zip(families, finite, strict=True):
        intervals = np.full((len(family.differences), 2), np.nan)
        if is_finite.any():
            share = is_finite.sum() / count
            intervals[is_finite] = _within_family(family, is_finite, 1 - (1 - level) * share)
        by_family.append(intervals)
    return by_family


def _is_finite(family: Comparisons) -> np.ndarray:
    """Flag comparisons whose difference and replicates are all finite; none without replicates."""
    if family.replicates.shape[1] == 0:
        return np.zeros(len(family.differences), bool)
    return np.isfinite(family.differences) & np.isfinite(family.replicates).all(axis=1)


def _within_family(family: Comparisons, mask: np.ndarray, level: float) -> np.ndarray:
    """Compute the simultaneous intervals of the selected comparisons of one family."""
    differences, replicates = family.differences[mask], family.replicates[mask]
    units = family.strata.size
    freedom = max(units - np.unique(family.strata).size, 1)
    errors = np.maximum(replicates.std(axis=1), SMALLEST_SPREAD)
    largest = (np.abs(replicates - differences[:, None]) / errors[:, None]).max(axis=0)
    quantile = float(np.quantile(largest, level, method="higher"))
    tail = scipy.stats.norm.sf(quantile)
    widened = max(quantile, float(np.sqrt(units / freedom) * scipy.stats.t.isf(tail, freedom)))
    half = np.where((replicates == 0).all(axis=1) & (differences == 0), 0.0, widened * errors)
    return np.stack([differences - half, differences + half], axis=1)
