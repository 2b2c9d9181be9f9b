"""What a metric is: an embedding of each frame, and a comparison of embeddings.

Every metric splits into work per frame, done once, and work per pair. ``embed`` and ``compare`` are all
that a metric defines; ``distance``, ``pairwise`` and the call on tensors are derived from them here, once.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import inspect
import json
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, Self, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.masked import MaskedTensor

from lsim.claims import Claims, OthersCode, other_random_numbers, versions
from lsim.embedding import Embedding
from lsim.pairs import is_plain
from lsim.prepared import Prepared, prepare, prepare_pairs
from lsim.preprocess import FramesError, Preprocessing, Scope, as_array, as_frames
from lsim.units import raised

Mask: TypeAlias = Literal["nan"] | ArrayLike | None
"""What is left out of comparisons: pixels that are NaN in either frame, or where an array is false."""


_Bounds: TypeAlias = Callable[[], np.ndarray]

_NOTHING = contextlib.nullcontext()

Change: TypeAlias = Literal[
    "offset", "scale", "shift", "half turn", "quarter turn", "reflection", "permutation", "relabelling"
]
"""What can be done to a frame: a number added; values multiplied by a positive number; pixels moved around a
periodic frame; turned by 180°, or by 90° (a square); mirrored; in any other order; every level of 8 bit
replaced by another, no two by the same."""

CHANGES: tuple[Change, ...] = get_args(Change)


PROBES = 4
"""How many times more than one probe shows rounding may do: once for each frame of a pair, and twice that for
errors that are less random than the probe's."""


class SizeWarning(UserWarning):
    """Frames of a size that the metric was not made for."""


class RangeWarning(UserWarning):
    """Frames that seem to be in another range than the metric takes."""


@dataclass(frozen=True)
class MetricInfo:
    """What is known of a metric without computing anything; lower is always more similar.

    Attributes
    ----------
    title : str
        The metric in a few words.
    source : str
        Paper, equation or reference implementation.
    differentiable : bool
        Whether gradients flow through ``metric(reference, other)``.
    axioms : frozenset of {"non-negative", "symmetric", "zero-on-itself", "triangle"}
        What the metric claims, up to rounding; :mod:`lsim.testing` checks it.
    value_range : tuple of float
        The range that ``metric(reference, other)`` takes values in: that of the common normalisation.
    minimum_size : int
        Smallest length of a frame axis, after resizing.
    advised_sizes : tuple of int or None
        Frame sizes, before and after resizing, outside of which it warns once.
    distance_to_itself : float
        The value for identical frames; NaN where it isn't the same for all of them, and so is computed.
    saturates_at : float
        The largest value there is, reached by frames that differ in many ways: gradients are 0 there.
    takes_mask : bool
        Whether missing pixels can be left out of both frames, see :meth:`Metric.pairwise`.
    takes_weights : bool
        Whether its means over pixels can be weighted, see :meth:`Metric.weighted`.
    one_channel_suffices : bool
        Whether one channel gives the distance that three equal ones do: a scalar field then comes to
        :meth:`Metric.embed` with one channel instead of three.
    feature_distance : str
        What the metric is of its embeddings' ``features``, flat vectors, where it is that: "euclidean", or
        "squared euclidean". An index over these vectors then finds by the metric.
    blind_to : tuple of str
        What can be done to one frame of a pair without any change, but for rounding: see :data:`CHANGES`.
    units : str
        What the values are in: "dB", "bit", "pixel", "decade"; "1" of numbers without a unit.
    takes_physical_values : bool
        Whether frames may come as they are, in their own units (scope ``"none"``): no constant of the metric
        is made for a range of values.
    power_of_units : int
        Of the field's units in a distance of physical values: 1 of a difference, 2 of its square, 0 where the
        distance has :attr:`units` of its own.
    lower_is_more_similar : bool
        Always true: similarities are negated or taken from one.
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


class Metric(ABC):
    """A distance between frames; lower is more similar.

    Subclasses set :attr:`info` and :attr:`algorithm_version` and define :meth:`embed` and
    :meth:`compare`. ``algorithm_version`` is raised whenever the values change, so that stored distances
    are known to be out of date.

    Parameters
    ----------
    name : str
    preprocessing : Preprocessing
    device : torch.device
    """

    info: ClassVar[MetricInfo]
    algorithm_version: ClassVar[int] = 1
    published_on_8bit: ClassVar[bool] = False
    """Whether the published evaluation truncates to 8 bit for this metric; its ``computeDistance`` then
    doesn't resize either."""

    shares_embedding: ClassVar[str] = ""
    """Metrics with the same name here embed alike, so that a run embeds each frame once for all of them."""

    takes_rest: bool = False
    """Whether :meth:`embed_with_rest` makes something of what double precision has rounded off frames."""

    copies_to_compare: ClassVar[bool] = True
    """Whether :meth:`compare` on a CPU may copy both embeddings, in double: what plans of memory count."""

    def __init__(self, name: str, preprocessing: Preprocessing, device: torch.device, **options: Any) -> None:
        if preprocessing.mask and not self.info.takes_mask:
            raise ValueError(f"metric {name!r} cannot leave out single pixels: it takes no mask")
        self.name = name
        self.preprocessing = preprocessing
        self.device = device
        self.options = options
        self.source_sha256 = ""
        """Of the file of a metric of one's own that is loaded by reference: another file, other distances."""
        self.pixel_weights: Tensor | None = None
        """Weights of the pixels (y, x) in means, float64, the largest 1; see :meth:`weighted`."""
        self._described_weights: dict[str, Any] | None = None
        self._symmetrised = False
        self._warned = False
        self._range_known = False

    @classmethod
    def load(
        cls,
        name: str,
        preprocessing: Preprocessing,
        device: torch.device,
        weights: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Self:
        """Make the metric. Metrics with weights override it; see :func:`lsim.load_metric`."""
        if weights is not None:
            raise ValueError(f"metric {name!r} has no weights; got weights={os.fspath(weights)!r}")
        return cls(name, preprocessing, device, **options)

    @classmethod
    def why_unavailable(cls, name: str, weights: str | os.PathLike[str] | None = None) -> str:
        """Empty when it can be loaded here, else the reason with the command that changes that."""
        return ""

    @classmethod
    def needs_double(cls, options: Mapping[str, Any]) -> bool:
        """Tell whether frames have to be prepared in double precision under these options."""
        return False

    @classmethod
    def option_names(cls) -> list[str]:
        """What the metric can be told besides the common settings: keyword-only arguments of its own."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]

    @abstractmethod
    def embed(self, frames: Tensor) -> Embedding:
        """Per-frame state of frames (n, y, x, channel) in the metric's :attr:`~MetricInfo.value_range`.

        Three channels; or one, where :attr:`MetricInfo.one_channel_suffices`. Metrics that take a mask are
        given NaN for missing pixels, and no others are.
        """

    def embed_with_rest(self, frames: Tensor, rest: Tensor) -> Embedding:
        """Embed frames in double precision with what that has rounded off them, ``frames + rest`` exactly.

        Metrics with :attr:`takes_rest` override it.
        """
        return self.embed(frames)

    @abstractmethod
    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        """The (len(a), len(b)) block of distances, float64.

        Where ``a is b`` the diagonal need not be computed, unless ``distance_to_itself`` is NaN.
        """

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        """Distances of a[k] and b[k]: (len(a),). Metrics with a formula for all at once override it."""
        return torch.cat([self.compare(left, right).reshape(1) for left, right in zip(a, b, strict=True)])

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound the absolute error that rounding can have given each distance.

        Metrics override it with what their arithmetic can do to these frames, from
        :attr:`~lsim.Embedding.rounding` on, and with :attr:`~lsim.Embedding.stored` where they are blind to
        something that sources round (:attr:`MetricInfo.blind_to`). Zero where nothing is known.

        Parameters
        ----------
        a, b : Embedding
        distances : Tensor of shape (len(a), len(b)), float64
            As :meth:`compare` gave them.

        Returns
        -------
        Tensor of shape (len(a), len(b)), float64
        """
        return torch.zeros_like(distances)

    @property
    def dtype(self) -> torch.dtype:
        """Floating point that the metric is asked to compute in."""
        return torch.float64 if self.preprocessing.precision == "double" else torch.float32

    def specification(self) -> dict[str, Any]:
        """All that determines the metric's values, as JSON: what results record and fingerprints hash."""
        settings = asdict(self.preprocessing)
        if not settings["mask"]:
            del settings["mask"]
        if settings["precision"] == "single":
            del settings["precision"]  # results of before say nothing of it
        elif self.takes_rest:
            settings["rest"] = "kept"  # results of before had lost it
        found = {
            "metric": self.name,
            "algorithm_version": self.algorithm_version,
            "preprocessing": settings,
            "quantised": self.quantised,
        }
        if self.options:
            found["options"] = self.options
        if self._symmetrised:
            found["symmetrised"] = True
        if self.source_sha256:
            found["source_sha256"] = self.source_sha256
        if self._described_weights is not None:
            found[WEIGHTS_OF_PIXELS] = self._described_weights
        return found

    def symmetrised(self) -> Self:
        """The metric as ½ (d(a, b) + d(b, a)); one that is symmetric as it is stays so."""
        if "symmetric" in self.axioms:
            return self
        both_ways = copy.copy(self)
        both_ways._symmetrised = True
        return both_ways

    def weighted(self, weights: ArrayLike) -> Self:
        """Give the metric with weighted means over pixels.

        Parameters
        ----------
        weights : array_like of shape (y, x)
            Of each pixel, in all channels: areas of cells, or the cosine of latitude. Finite, not negative,
            and not all 0; only their ratios count. Pixels of weight 0 count in no mean. With a mask, the
            means of each pair are over the pixels that both frames have.

        Returns
        -------
        Metric
            For frames (y, x), which must keep their size: of ``size=None``. The :meth:`specification` has the
            weights' hash. Computed in torch, without the compiled kernels.

        Raises
        ------
        ValueError
            When the metric isn't a mean over pixels (:attr:`MetricInfo.takes_weights`), when it resizes
            frames, or when weights are not as described.

        Examples
        --------
        >>> import lsim, numpy as np
        >>> weights = np.array([[1.0, 1.0], [3.0, 3.0]])
        >>> metric = lsim.load_metric("l1", size=None).weighted(weights)
        >>> metric.distance([[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [2.0, 2.0]], scope="none")
        array([1.5])
        """
        if not self.info.takes_weights:
            raise ValueError(
                f"metric {self.name!r} takes no weights of pixels: it is no mean over single pixels, as "
                "'l1', 'rmse', 'vrmse' and 'correlation' are; leave the weights out, or take one of these"
            )
        if self.preprocessing.size is not None:
            raise ValueError(
                f"metric {self.name!r} resizes frames to {self.preprocessing.size}², and weights are those "
                "of the frames' own pixels: load it with size=None"
            )
        copied = copy.copy(self)
        copied.pixel_weights = torch.from_numpy(_checked_weights(weights))
        # Once: specifications are asked for often, and hashing a million weights takes milliseconds.
        copied._described_weights = describe_weights(weights)
        return copied

    @property
    def axioms(self) -> frozenset[str]:
        """Those of :attr:`MetricInfo.axioms`, and symmetry where the metric is :meth:`symmetrised`."""
        return self.info.axioms | {"symmetric"} if self._symmetrised else self.info.axioms

    @property
    def specification_hash(self) -> str:
        """Hash of :meth:`specification`: equal where the metric's values are."""
        return hash_specification(self.specification())

    @property
    def quantised(self) -> bool:
        """Whether frames are truncated to 8 bit first."""
        return self._follows_8bit_publication

    @property
    def _follows_8bit_publication(self) -> bool:
        return self.published_on_8bit and self.preprocessing.compat == "published"

    def why_not_scope(self, scope: Scope) -> str:
        """Say why the metric cannot measure frames of a scope, and what to do; empty when it can."""
        if not (isinstance(scope, str) and scope == "none"):
            return ""
        if not self.info.takes_physical_values:
            return (
                f"metric {self.name!r} measures values within a known range, and scope 'none' leaves them in "
                "their own units: give the range, scope (lo, hi), or another scope"
            )
        if self.quantised:
            return (
                f"metric {self.name!r} truncates values of [0, 255] to 8 bit with compat 'published', and "
                "scope 'none' leaves them in their own units: use compat 'default'"
            )
        return ""

    def units(self, scope: Scope, field_units: str = "") -> str:
        """Give the units of distances.

        Parameters
        ----------
        scope : str or (lo, hi)
            Frames that are normalised have lost their units; with ``"none"`` they keep them.
        field_units : str
            Of the frames.

        Returns
        -------
        str
            In the notation of UDUNITS; empty where they are those of a field whose units aren't known.
        """
        if not (self.info.power_of_units and isinstance(scope, str) and scope == "none"):
            return self.info.units
        return raised(field_units, self.info.power_of_units)

    def distance(
        self,
        a: ArrayLike,
        b: ArrayLike,
        scope: Scope = "batch",
        mask: Mask = None,
        weights: ArrayLike | None = None,
    ) -> np.ndarray:
        """Distances between two arrays, frame by frame.

        Parameters
        ----------
        a, b : array_like of equal shape
            (y, x), (y, x, channel) or (batch, y, x, channel), any integer or floating dtype. Of a metric that
            isn't symmetric, ``a`` is the reference, and ``b`` what is compared with it.
        scope : str or (lo, hi), default "batch"
            Over which frames minimum and maximum are taken: ``"batch"``, jointly over both arguments
            and the whole batch, as published; ``"pair"``, over each pair alone; ``(lo, hi)``, fixed;
            ``"none"``, over none: the values as they are, in their own units, for metrics that take them
            (:attr:`MetricInfo.takes_physical_values`).
        mask : "nan" or array_like of bool, optional
            Leave missing pixels out of both frames, rather than their frames out of everything, for metrics
            that take it (:attr:`MetricInfo.takes_mask`). ``"nan"``: those that are NaN or infinite in either
            frame. An array (y, x), or of the frames' shape with or without the channel: besides those, where
            it is false, in both.
        weights : array_like of shape (y, x), optional
            Weights of the pixels in means, for metrics that take them (:attr:`MetricInfo.takes_weights`), as
            :meth:`weighted` takes them.

        Returns
        -------
        ndarray of shape (batch,), float64
            NaN where a frame holds NaN or infinity; with a mask, where no pixel is left.

        Raises
        ------
        ValueError
            When shapes differ, or frames, channels, size or scope are none that the metric takes.

        Examples
        --------
        >>> import lsim
        >>> reference = [[290.0, 310.0], [300.0, 300.0]]  # K
        >>> metric = lsim.load_metric("rmse", size=None)
        >>> metric.distance(reference, [[291.0, 309.0], [301.0, 299.0]], scope="none")
        array([1.])
        """
        first, second = _as_batch(a, "a"), _as_batch(b, "b")
        if first.shape != second.shape:
            raise ValueError(f"a and b differ in shape: {np.shape(a)} and {np.shape(b)}")
        if weights is not None:
            return self.weighted(weights).distance(first, second, scope, mask)
        if mask is not None:
            metric = self._masking()
            return metric.distance(_where(first, mask), _where(second, mask), scope)
        if scope == "pair":
            pairs = zip(first, second, strict=True)
            return np.concatenate([self.distance(left[None], right[None], "batch") for left, right in pairs])
        prepared = self.prepare(
            np.concatenate([first, second]), scope, resized=not self._follows_8bit_publication
        )
        with torch.no_grad():
            embedding = self._bounded(self._embed_prepared(prepared), prepared)
            left, right = embedding[slice(0, len(first))], embedding[slice(len(first), None)]
            if self.device.type == "cpu":
                values = torch.cat([self.between(x, y).reshape(1) for x, y in zip(left, right, strict=True)])
            else:  # where each pair by itself would be as many launches
                values = self._elementwise(left, right)
        single = values.dtype == torch.float32
        distances = values.detach().double().cpu().numpy()
        comparable = prepared.comparable
        distances[~(comparable[: len(first)] & comparable[len(first) :])] = np.nan
        self.claims.check_distances(distances, square=False, single=single)
        return distances

    def pairwise(
        self,
        frames: ArrayLike,
        scope: Scope = "sequence",
        mask: Mask = None,
        weights: ArrayLike | None = None,
    ) -> np.ndarray:
        """All distances among the frames of a sequence; each frame is embedded once.

        Parameters
        ----------
        frames : array_like of shape (n, y, x, channel) or (n, y, x)
        scope : str or (lo, hi), default "sequence"
            Over which frames minimum and maximum are taken. ``"pair"`` normalises every pair for itself,
            and so has to embed each frame n−1 times; frames are resized once all the same. ``"none"`` as
            :meth:`distance` takes it.
        mask : "nan" or array_like of bool, optional
            As :meth:`distance` takes it.
        weights : array_like of shape (y, x), optional
            As :meth:`distance` takes them.

        Returns
        -------
        ndarray of shape (n, n), float64
            At [i, j] the distance with frame i as the reference; symmetric where the metric is. NaN in row
            and column of a frame that holds NaN or infinity. The diagonal is the metric's distance of a frame
            to itself: 0, and −inf for PSNR.
        """
        array = as_frames(frames)
        if weights is not None:
            return self.weighted(weights).pairwise(array, scope, mask)
        if mask is not None:
            return self._masking().pairwise(_where(array, mask), scope)
        if scope != "pair":
            return self.all_pairs(self.prepare(array, scope))
        return self._each_pair(array, bounded=False)[0]

    def __call__(
        self, reference: Tensor, other: Tensor, *, data_range: float | tuple[float, float] | None = None
    ) -> Tensor:
        """Measure distances between two batches that are in a known range; differentiable.

        Parameters
        ----------
        reference, other : Tensor of shape (batch, channel, y, x)
            Values in [0, 255], see :attr:`MetricInfo.value_range`, or in ``data_range``; 1 or 3 channels.
            Nothing is resized, nor normalised by what the frames hold.
        data_range : float or (lo, hi), optional
            What the values are in: [0, ``data_range``], or [lo, hi]. 1 for values in [0, 1]. Default: the
            metric's own range; values that all are in [0, 1] are then warned of, once.

        Returns
        -------
        Tensor of shape (batch,)
            On the metric's device, of the dtype that the frames have, torch's default one for integers.
            Half precision is computed in single. Gradients are finite, 0 for identical frames, where the
            metric is differentiable; see :attr:`MetricInfo.differentiable`. Metrics that truncate to 8 bit
            (:attr:`quantised`) have the gradient 0 everywhere.
        """
        check_tensors(reference, other)
        if reference.ndim != 4 or reference.shape != other.shape:
            raise ValueError(
                "expected two tensors of equal shape (batch, channel, y, x), "
                f"found {tuple(reference.shape)} and {tuple(other.shape)}"
            )
        if reference.shape[1] not in (1, 3):
            raise ValueError(f"expected 1 or 3 channels on axis 1, found {reference.shape[1]}")
        self.check_size(reference.shape[2], reference.shape[3])
        self._warn_of_size(reference.shape[2], reference.shape[3])
        if data_range is None and not self._range_known and self.info.value_range == (0.0, 255.0):
            self._range_known = check_range(self.name, "data_range=1", reference, other, stacklevel=3)
        dtype = torch.promote_types(reference.dtype, other.dtype)
        dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
        stacked = torch.cat([reference, other]).to(self.device).permute(0, 2, 3, 1)
        if stacked.dtype in (torch.float16, torch.bfloat16):
            stacked = stacked.float()
        if data_range is not None:
            stacked = self._from_range(stacked, data_range)
        if stacked.shape[-1] == 1 and not self.info.one_channel_suffices:
            stacked = stacked.expand(*stacked.shape[:-1], 3)
        if self.dtype == torch.float64:
            stacked = stacked.double()
        if self.quantised:
            stacked = stacked.clamp(0, 255).floor()
        embedding = self.embed(stacked)
        self.claims.check_embedding(embedding, len(stacked))
        first, second = embedding[slice(0, len(reference))], embedding[slice(len(reference), None)]
        return self._elementwise(first, second).to(dtype)

    def _from_range(self, values: Tensor, data_range: float | tuple[float, float]) -> Tensor:
        """Map values in ``data_range`` to :attr:`MetricInfo.value_range`."""
        lo, hi = data_range if isinstance(data_range, tuple) else (0.0, data_range)
        if not -math.inf < lo < hi < math.inf:
            raise ValueError(f"data_range must be a positive number or (lo, hi), got {data_range!r}")
        first, last = self.info.value_range
        values = values if values.is_floating_point() else values.double()
        return (values - lo) * ((last - first) / (hi - lo)) + first

    def prepare(self, frames: np.ndarray, scope: Scope, *, resized: bool = True) -> Prepared:
        """Apply the metric's preprocessing to (n, y, x, channel), and check the resulting size.

        What it returns depends on :attr:`preprocessing` and the device alone, so metrics with equal ones can
        share it.
        """
        if reason := self.why_not_scope(scope):
            raise ValueError(reason)
        settings = self.preprocessing if resized else replace(self.preprocessing, size=None)
        self._check_sizes(settings, frames)
        return prepare(frames, settings, scope, self.device)

    def _check_sizes(self, settings: Preprocessing, frames: np.ndarray) -> None:
        size = settings.size
        y, x = (size, size) if size is not None else frames.shape[1:3]
        self.check_size(int(y), int(x))
        self._warn_of_size(frames.shape[1], frames.shape[2])
        self._warn_of_size(int(y), int(x))

    def all_pairs(self, prepared: Prepared) -> np.ndarray:
        """:meth:`pairwise` for frames that :meth:`prepare` made: (n, n) float64."""
        return self._matrix_and_bounds(prepared)[0]

    def all_pairs_with_rounding(self, prepared: Prepared) -> tuple[np.ndarray, np.ndarray]:
        """Compute :meth:`all_pairs`, and bound what rounding can have done to each: (n, n) both."""
        matrix, bounds = self._matrix_and_bounds(prepared)
        rounding = bounds()
        np.fill_diagonal(rounding, 0)
        rounding[np.isnan(matrix)] = np.nan
        return matrix, rounding

    def _matrix_and_bounds(self, prepared: Prepared) -> tuple[np.ndarray, _Bounds]:
        """Compute :meth:`all_pairs`, and give what bounds its rounding where somebody asks."""
        with torch.no_grad():
            embedding = self.embedded(prepared)
            block = self.between(embedding, embedding)
        single, block = block.dtype == torch.float32, block.double()
        bounds = functools.cache(lambda: self.bounded(embedding, embedding, block, prepared))
        matrix = block.cpu().numpy().copy()
        if not prepared.comparable.all():
            matrix[~prepared.comparable] = np.nan
            matrix[:, ~prepared.comparable] = np.nan
        self.claims.check_distances(matrix, square=True, single=single, rounding=bounds)
        if "symmetric" in self.axioms and not (matrix == matrix.T).all():
            # To the last bit: some devices add d(i, j) and d(j, i) in another order.
            below = np.tril_indices(len(matrix), -1)
            matrix[below] = matrix.T[below]
        itself = np.where(prepared.comparable, self._to_itself(matrix.diagonal()), np.nan)
        np.fill_diagonal(matrix, itself)
        return matrix, bounds

    def each_pair_with_rounding(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute :meth:`pairwise` with every pair normalised for itself, and bound its rounding.

        Parameters
        ----------
        frames : ndarray of shape (n, y, x, channel)

        Returns
        -------
        distances, rounding : ndarrays of shape (n, n), float64
            As :meth:`all_pairs_with_rounding` gives them.
        """
        return self._each_pair(frames, bounded=True)

    def _each_pair(self, frames: np.ndarray, *, bounded: bool) -> tuple[np.ndarray, np.ndarray]:
        """Compute :meth:`each_pair_with_rounding`, with bounds of 0 unless they are asked for."""
        self._check_sizes(self.preprocessing, frames)
        matrix = np.empty((len(frames), len(frames)))
        rounding = np.zeros_like(matrix)
        for i, j, prepared in prepare_pairs(frames, self.preprocessing, self.device):
            both, bounds = self._matrix_and_bounds(prepared)
            matrix[i, j], matrix[j, i] = both[0, 1], both[1, 0]
            if bounded and i != j:
                rounding[i, j], rounding[j, i] = bounds()[[0, 1], [1, 0]]
        diagonal = matrix.diagonal()
        np.fill_diagonal(matrix, np.where(np.isnan(diagonal), np.nan, self._to_itself(diagonal)))
        rounding[np.isnan(matrix)] = np.nan
        return matrix, rounding

    def from_reference(self, prepared: Prepared) -> np.ndarray:
        """Row 0 of :meth:`all_pairs` alone, the first frame as the reference of all: (n,) float64."""
        return self._row_and_bounds(prepared)[0]

    def from_reference_with_rounding(self, prepared: Prepared) -> tuple[np.ndarray, np.ndarray]:
        """Compute :meth:`from_reference`, and bound what rounding can have done to each: (n,) both."""
        row, bounds = self._row_and_bounds(prepared)
        rounding = bounds()[0]
        rounding[:1] = 0
        rounding[np.isnan(row)] = np.nan
        return row, rounding

    def _row_and_bounds(self, prepared: Prepared) -> tuple[np.ndarray, _Bounds]:
        """Compute :meth:`from_reference`, and give what bounds its rounding, (1, n), where somebody asks."""
        with torch.no_grad():
            embedding = self.embedded(prepared)
            reference = embedding[slice(0, 1)]
            block = self.between(reference, embedding)
        single, block = block.dtype == torch.float32, block.double()
        bounds = functools.cache(lambda: self.bounded(reference, embedding, block, prepared))
        row = block[0].cpu().numpy().copy()
        comparable = prepared.comparable
        row[~(comparable & comparable[0])] = np.nan
        self.claims.check_distances(row, square=False, single=single, rounding=lambda: bounds()[0])
        if comparable[0]:
            row[:1] = self._to_itself(row[:1])
        return row, bounds

    def _to_itself(self, computed: np.ndarray) -> np.ndarray:
        """Distances of frames to themselves, given what was computed for them."""
        known = self.info.distance_to_itself
        return computed.copy() if np.isnan(known) else np.full_like(computed, known)

    def _elementwise(self, a: Embedding, b: Embedding) -> Tensor:
        values = self._checked_pairs(a, b)
        return (values + self._checked_pairs(b, a)) / 2 if self._symmetrised else values

    def _checked_pairs(self, a: Embedding, b: Embedding) -> Tensor:
        values = self.paired(a, b)
        self.claims.check_block(values, (len(b),), "paired")
        return values

    def between(self, a: Embedding, b: Embedding) -> Tensor:
        """:meth:`compare`, checked; both ways where the metric is :meth:`symmetrised`: (len(a), len(b)).

        Raises
        ------
        lsim.ClaimError
            When what comes back is no block of distances, or the embeddings were written into.
        """
        block = self._compare(a, b)
        if not self._symmetrised:
            return block
        return (block + (block if a is b else self._compare(b, a)).T) / 2

    def _probed_rounding(self, prepared: Prepared) -> float:
        """Try what errors of the first frame that can be compared do: how far they move it from itself.

        Of frames in 8 bit, those errors that may put a value on another level: the same whole number is on
        the same level everywhere, so sources of integers have none.
        """
        first = np.flatnonzero(prepared.comparable)[:1]
        if prepared.rounding is None or not len(first):
            return 0.0
        frame = prepared.values[first]
        size = prepared.rounding[first]
        if self.quantised:
            stored = torch.zeros_like(size) if prepared.stored is None else prepared.stored[first]
            size = torch.where(stored > 0, size + stored, 0)
        signs = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], frame.shape)).to(frame)
        error = size.to(frame)[:, None, None, None]
        moved = Prepared(
            torch.cat([frame, frame + error * signs]), prepared.comparable[first].repeat(2), prepared.masked
        )
        embedding = self._embed_prepared(moved)
        itself, other = self.between(embedding[slice(0, 1)], embedding)[0].double().tolist()
        known = self.info.distance_to_itself
        change = abs(other - (itself if math.isnan(known) else known))
        return PROBES * change if math.isfinite(change) else 0.0

    def rounding_between(self, a: Embedding, b: Embedding, block: Tensor) -> Tensor:
        """:meth:`rounding` of what :meth:`between` gave, both ways where that was: float64."""
        bound = self.rounding(a, b, block).double()
        if self._symmetrised:
            bound = (bound + self.rounding(b, a, block.T).double().T) / 2
        return bound.broadcast_to(block.shape)

    def embedded(self, prepared: Prepared) -> Embedding:
        """:meth:`embed` for frames that :meth:`prepare` made; a family that embeds alike does so once."""
        self.check_size(prepared.values.shape[1], prepared.values.shape[2])
        embedding = prepared.embedding(self.family, lambda: self._embed_prepared(prepared))
        if self.of_others and self.family is not None:
            embedding = embedding.copy()
        return self._bounded(embedding, prepared)

    def _embed_prepared(self, prepared: Prepared) -> Embedding:
        frames = self._frames(prepared)
        rest = self._rest(prepared)
        return self._embed(frames, None if rest is None else rest.expand(frames.shape))

    def _rest(self, prepared: Prepared) -> Tensor | None:
        """Give what the metric takes of the frames' rest: nothing of frames that are truncated."""
        return prepared.rest if self.takes_rest and not self.quantised else None

    def _bounded(self, embedding: Embedding, prepared: Prepared) -> Embedding:
        """Let an embedding know what preparing may have rounded of its frames."""
        if prepared.rounding is None:
            return embedding
        rounding = prepared.rounding if self._rest(prepared) is None else prepared.rounding_with_rest
        return replace(embedding, rounding=rounding, stored=prepared.stored)

    def _embed(self, frames: Tensor, rest: Tensor | None = None) -> Embedding:
        """:meth:`embed`, checked; frames of which nobody else has a copy are given to code of others."""
        before = versions([frames])
        with self._running("embed"):
            embedding = self.embed(frames) if rest is None else self.embed_with_rest(frames, rest)
        self.claims.check_embedding(embedding, len(frames))
        self.claims.check_unwritten(before, versions([frames]), "embed wrote into the frames")
        return embedding

    def _compare(self, a: Embedding, b: Embedding) -> Tensor:
        parts = [*a.parts.values(), *b.parts.values()]
        before = versions(parts)
        with self._running("compare"):
            block = self.compare(a, b)
        self.claims.check_block(block, (len(a), len(b)))
        self.claims.check_unwritten(before, versions(parts), "compare wrote into the embeddings")
        return block if torch.is_grad_enabled() else block.detach()

    def bounded(
        self, a: Embedding, b: Embedding, distances: Tensor, prepared: Prepared | None = None
    ) -> np.ndarray:
        """:meth:`rounding`, as an array of its own; tried on ``prepared`` where the metric has no formula.

        ``prepared`` are the frames of ``b``, of which ``a`` is the first, or all.
        """
        # A mean over some of the pixels, or by weight, may be larger than that over all.
        if prepared is not None and not self.preprocessing.mask and self.pixel_weights is None:
            both = a is b
            mean = prepared.mean_rounding if self._rest(prepared) is None else None
            b = replace(b, mean_rounding=mean)
            a = b if both else b[: len(a)]
        with torch.no_grad(), self._running("rounding"):
            rounding = self.rounding_between(a, b, distances)
            if prepared is not None and type(self).rounding is Metric.rounding:
                rounding = rounding + self._probed_rounding(prepared)
        self.claims.check_block(rounding, tuple(distances.shape), "rounding")
        return rounding.detach().double().cpu().numpy().copy()

    @property
    def claims(self) -> Claims:
        """Give what the metric says of its distances, with the checks of it."""
        return Claims(self.name, self.axioms, self.info.distance_to_itself)

    @property
    def of_others(self) -> bool:
        """Tell whether the class is another package's, which no test here holds to the contract."""
        return not type(self).__module__.startswith("lsim.")

    def _running(self, what: str) -> contextlib.AbstractContextManager[None]:
        return OthersCode(self.name, what) if self.of_others else _NOTHING

    def check_claims(self, prepared: Prepared) -> np.ndarray:
        """Check what computing distances doesn't show: frames left alone, zero on itself, both directions.

        Distances of the first frame that can be compared and of two others are taken, and taken again from
        copies, with other random numbers: a handful of pairs, and two embeddings of these frames.

        Parameters
        ----------
        prepared : Prepared
            Of the kind of frames that the metric is to compare.

        Returns
        -------
        ndarray of shape (n, n), float64
            Distances among the first frames that can be compared, three at most.

        Raises
        ------
        lsim.ClaimError
        """
        rows = np.flatnonzero(prepared.comparable)[:3]
        if not len(rows):
            return np.empty((0, 0))
        some = replace(prepared, values=prepared.values[rows], comparable=prepared.comparable[rows])
        parts = (some.rest, some.rounding, some.stored, some.rounding_with_rest)
        rest, rounding, stored, with_rest = (None if part is None else part[rows] for part in parts)
        some = replace(
            some, rest=rest, rounding=rounding, stored=stored, rounding_with_rest=with_rest, bounds=None
        ).anew()
        claims = self.claims
        with torch.no_grad():
            frames = self._frames(some)
            kept = frames.clone()
            embedding = self._embed(frames, self._rest(some))
            if not torch.equal(frames.nan_to_num(), kept.nan_to_num()):
                claims.refuse(
                    "embed wrote into the frames that it was given; it has to work on a copy (clone)"
                )
            apart = embedding.copy()
            block = self.between(embedding, apart)
            with other_random_numbers():
                again = self.between(self._embed_prepared(some), apart)
        single = block.dtype == torch.float32
        first, second = (values.double().cpu().numpy() for values in (block, again))
        claims.check_repeated(first, second, "d", exact=self.device.type == "cpu")
        claims.check_distances(first, square=True, single=single)
        return first

    def _frames(self, prepared: Prepared) -> Tensor:
        return prepared.frames(
            quantised=self.quantised,
            one_channel=self.info.one_channel_suffices,
            copied=self.of_others,
        )

    @property
    def shared_as(self) -> Hashable:
        """Equal for metrics whose embeddings of the same prepared frames are; None where no other's is."""
        return (self.shares_embedding, self.quantised) if self.shares_embedding else None

    @property
    def family(self) -> Hashable:
        """:attr:`shared_as`, of metrics of one package that have the very same :meth:`embed`; else None.

        A class that derives from another and embeds otherwise shares nothing, whatever name it inherits; and
        nobody's code is given what metrics of somebody else go on with.
        """
        if self.shared_as is None:
            return None
        cls = type(self)
        return (self.shared_as, cls.__module__.partition(".")[0], cls.embed)

    def _masking(self) -> Self:
        """This metric, told to leave out what is missing."""
        if self.preprocessing.mask:
            return self
        if not self.info.takes_mask:
            raise ValueError(f"metric {self.name!r} cannot leave out single pixels: it takes no mask")
        masking = copy.copy(self)
        masking.preprocessing = replace(self.preprocessing, mask=True)
        return masking

    def check_size(self, y: int, x: int) -> None:
        """Raise :class:`ValueError` for frames of a size that the metric cannot take."""
        smallest = self.info.minimum_size
        if min(y, x) < smallest:
            raise FramesError(
                f"metric {self.name!r} cannot take frames of {y}×{x}; the smallest that works is "
                f"{smallest}×{smallest}"
            )
        if self.pixel_weights is not None and (y, x) != self.pixel_weights.shape:
            raise FramesError(
                f"metric {self.name!r} has weights of pixels of shape {tuple(self.pixel_weights.shape)}, and "
                f"the frames are of {y}×{x}: give weights (y, x) of these frames, such as "
                "np.broadcast_to(np.cos(latitude)[:, None], (y, x))"
            )

    def _warn_of_size(self, y: int, x: int) -> None:
        """Warn, once in the metric's life, of frames outside the sizes it was made for."""
        advised = self.info.advised_sizes
        if advised is None or self._warned:
            return
        if min(y, x) < advised[0] or max(y, x) > advised[1]:
            self._warned = True
            warnings.warn(
                f"metric {self.name!r} was made for frames of {advised[0]} to {advised[1]} pixels a side, "
                f"not {y}×{x}: its distances may rank worse",
                SizeWarning,
                stacklevel=5,
            )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {json.dumps(self.specification(), default=str)} on {self.device}>"


WEIGHTS_OF_PIXELS = "weights_of_pixels"
"""Key of a specification for what :func:`describe_weights` gives."""


def describe_weights(weights: ArrayLike) -> dict[str, Any]:
    """Describe weights of pixels as specifications do: by their shape, and a hash of their ratios.

    Parameters
    ----------
    weights : array_like of shape (y, x)
        As :meth:`Metric.weighted` takes them.

    Returns
    -------
    dict of JSON values

    Raises
    ------
    ValueError
        When they are none.

    Examples
    --------
    >>> import numpy as np
    >>> weights = np.array([[1.0, 1.0], [3.0, 3.0]])
    >>> describe_weights(weights) == describe_weights(2 * weights)
    True
    """
    values = _checked_weights(weights)
    return {"shape": list(values.shape), "sha256": hashlib.sha256(values.tobytes()).hexdigest()}


def hash_specification(specification: Mapping[str, Any]) -> str:
    """Hash of a metric's specification, as the metric gives it or as it was recorded; keys in any order."""
    document = json.dumps(specification, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(document.encode()).hexdigest()[:32]


def check_tensors(*batches: Tensor) -> None:
    """Refuse batches that are no tensors, and masked ones.

    Raises
    ------
    ValueError
        Naming what was found, and what to do.
    """
    for batch in batches:
        if not isinstance(batch, Tensor) or isinstance(batch, MaskedTensor):
            raise ValueError(
                f"expected plain tensors (batch, channel, y, x), found {type(batch).__name__}: "
                "Metric.distance takes arrays, and masked ones with mask='nan'"
            )


def check_range(name: str, remedy: str, a: Tensor, b: Tensor, stacklevel: int) -> bool:
    """Warn where all of two batches is in [0, 1] and [0, 255] is expected.

    Returns
    -------
    bool
        Whether their range is known now. It isn't for frames of zeros, and for tensors whose values cannot
        be looked at, as under ``torch.func`` and ``torch.compile``.
    """
    if not is_plain(a, b) or not a.numel():
        return False
    with torch.no_grad():
        extremes = [values.aminmax() for values in (a, b)]
        lo = min(float(extreme.min) for extreme in extremes)
        hi = max(float(extreme.max) for extreme in extremes)
    if lo == hi == 0 or math.isnan(lo + hi):
        return False
    if a.is_floating_point() and lo >= 0 and hi <= 1:
        warnings.warn(
            f"metric {name!r} takes values in [0, 255], and these are all in [0, 1]: pass {remedy} "
            "if that is their range; as they are, they are nearly black frames",
            RangeWarning,
            stacklevel=stacklevel,
        )
    return True


def positive_number(metric: str, option: str, value: Any) -> float:
    """An option's value as a float; :class:`ValueError`, naming both, unless it is a number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"option {option!r} of metric {metric!r} must be a positive number, got {value!r}")
    return float(value)


def safe_sqrt(squared: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 rather than infinite."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1).sqrt(), squared)


def resolve_device(device: str | torch.device) -> torch.device:
    """``"auto"`` is the GPU when there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def _as_batch(array: ArrayLike, what: str) -> np.ndarray:
    """(y, x), (y, x, channel) or (batch, y, x, channel) → (batch, y, x, channel)."""
    values = as_array(array, what)
    return as_frames(values[None] if values.ndim == 3 else values, what)


def _checked_weights(weights: ArrayLike) -> np.ndarray:
    """Divide weights of pixels (y, x) by the largest, in float64; :class:`ValueError` where they are none."""
    array = np.ma.asanyarray(weights) if isinstance(weights, np.ma.MaskedArray) else np.asarray(weights)
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise ValueError(
            "weights of pixels must be real numbers of shape (y, x), "
            f"got {array.dtype} of shape {array.shape}"
        )
    doubles = array.astype(np.float64)
    values = doubles.filled(np.nan) if isinstance(doubles, np.ma.MaskedArray) else doubles
    usable = np.isfinite(values) & (values >= 0)
    if not usable.all():
        raise ValueError(
            "weights of pixels must be finite and not negative; "
            f"{np.count_nonzero(~usable)} of {values.size} are not: give such pixels the weight 0"
        )
    if not values.any():
        raise ValueError("weights of pixels are all 0; expected some above 0")
    return np.ascontiguousarray(values / values.max())


def _where(frames: np.ndarray, mask: Mask) -> np.ndarray:
    """Frames (n, y, x, channel) in floating point, NaN where a mask leaves them out."""
    if isinstance(mask, str):
        if mask != "nan":
            raise ValueError(f"mask must be 'nan' or an array of bool, got {mask!r}")
        return frames
    kept = mask.filled(False) if isinstance(mask, np.ma.MaskedArray) else np.asarray(mask)
    if kept.dtype != np.bool_:
        raise ValueError(f"mask must be 'nan' or an array of bool, got one of {kept.dtype}")
    wanted = {frames.shape[1:3]: kept[None, ..., None], frames.shape[:3]: kept[..., None], frames.shape: kept}
    if kept.shape not in wanted:
        raise ValueError(
            f"mask has shape {kept.shape}; expected {' or '.join(map(str, wanted))} for frames {frames.shape}"
        )
    dtype = frames.dtype if frames.dtype.kind == "f" else np.float64
    return np.where(wanted[kept.shape], frames.astype(dtype, copy=False), np.array(np.nan, dtype))
