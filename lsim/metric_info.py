"""Facts about a metric that are known without computing anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Change: TypeAlias = Literal[
    "offset", "scale", "shift", "half turn", "quarter turn", "reflection", "permutation", "relabelling"
]
"""Changes of a frame: a number added; values multiplied by a positive number; pixels moved around a periodic
frame; a turn by 180°, or by 90° (of a square); a mirror image; pixels in any other order; every 8-bit level
replaced by another, no two by the same."""

CHANGES: tuple[Change, ...] = get_args(Change)


@dataclass(frozen=True)
class MetricInfo:
    """Description of a metric; lower is always more similar.

    Attributes
    ----------
    title : str
        The metric in a few words.
    source : str
        Paper, equation or reference implementation.
    differentiable : bool
        Whether gradients flow through ``metric(reference, other)``.
    axioms : frozenset of {"non-negative", "symmetric", "zero-on-itself", "triangle", "euclidean"}
        What the metric claims, up to rounding; :mod:`lsim.testing` checks it. One that is Euclidean is the
        distance of some vectors, one for each frame: energy scores by it are proper.
    value_range : tuple of float
        Range of the values that ``metric(reference, other)`` takes: that of the common normalisation.
    minimum_size : int
        Smallest length of a frame axis, after resizing.
    advised_sizes : tuple of int or None
        Frame sizes, before and after resizing, outside of which the metric warns once.
    distance_to_itself : float
        Distance of identical frames; NaN if it differs from frame to frame, and so has to be computed.
    saturates_at : float
        The largest possible value, if many frames reach it: gradients are 0 there.
    takes_mask : bool
        Whether missing pixels can be left out of both frames, see :meth:`Metric.pairwise`.
    takes_weights : bool
        Whether its means over pixels can be weighted, see :meth:`Metric.weighted`.
    one_channel_suffices : bool
        Whether one channel gives the same distance as three equal ones. A scalar field then comes to
        :meth:`Metric.embed` with one channel instead of three.
    feature_distance : {"", "euclidean", "squared euclidean"}
        The distance of the embeddings' ``features`` (flat vectors) that equals the metric, if there is one.
        An index over these vectors then finds neighbours by the metric.
    blind_to : tuple of str
        Changes of one frame of a pair that leave the distance as it is, but for rounding: see
        :data:`CHANGES`.
    units : str
        Units of the distance: "dB", "bit", "pixel", "decade"; "1" for numbers without a unit.
    takes_physical_values : bool
        Whether frames may keep their own units (scope ``"none"``): no constant of the metric assumes a range.
    power_of_units : int
        Power of the field's units in a distance of physical values: 1 for a difference, 2 for its square,
        0 if the distance has :attr:`units` of its own.
    lower_is_more_similar : bool
        Always true: similarities are negated or subtracted from one.

    Examples
    --------
    >>> MetricInfo(title="difference of the means", source="example", blind_to=("permutation",)).units
    '1'
    """

    title: str
    source: str
    differentiable: bool = True
    axioms: frozenset[str] = frozenset({"non-negative", "symmetric", "zero-on-itself"})
    value_range: tuple[float, float] = (0.0, 255.0)
    minimum_size: int = 1
    advised_sizes: tuple[int, int] | None = None
    distance_to_itself: float = 0.0
    saturates_at: float = float("inf")
    takes_mask: bool = False
    takes_weights: bool = False
    one_channel_suffices: bool = False
    feature_distance: Literal["", "euclidean", "squared euclidean"] = ""
    blind_to: tuple[Change, ...] = ()
    units: str = "1"
    takes_physical_values: bool = False
    power_of_units: int = 0
    lower_is_more_similar: bool = True
