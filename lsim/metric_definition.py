"""The part of a metric that its author defines, and the settings that it is loaded with.

``embed`` turns frames into per-frame state, ``compare`` turns two embeddings into a block of distances; a
metric has to define no more. :class:`lsim.metric.Metric` derives everything else from these two.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import asdict, replace
from typing import Any, ClassVar, Self

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lsim.embedding import Embedding
from lsim.frames import FramesError
from lsim.metric_info import MetricInfo
from lsim.pixel_weights import WEIGHTS_OF_PIXELS, describe_weights, scale_weights
from lsim.preprocess import Preprocessing
from lsim.scope import Scope
from lsim.units import raise_units


class SizeWarning(UserWarning):
    """Frames of a size that the metric was not made for."""


class MetricDefinition(ABC):
    """The part of a metric that its author writes: see :class:`lsim.Metric`, the class to derive from."""

    info: ClassVar[MetricInfo]
    algorithm_version: ClassVar[int] = 1
    published_on_8bit: ClassVar[bool] = False
    """True if the published evaluation truncates to 8 bit for this metric; its ``computeDistance`` then
    doesn't resize either."""

    shares_embedding: ClassVar[str] = ""
    """Name of a group of metrics that embed alike: a run embeds each frame once for the whole group."""

    takes_rest: bool = False
    """True if :meth:`embed_with_rest` uses what double precision has rounded off frames."""

    rest_of_units: ClassVar[bool] = True
    """True if frames in their own units, which are in double in any precision, are embedded with a rest."""

    copies_to_compare: ClassVar[bool] = True
    """True if :meth:`compare` on a CPU may copy both embeddings, in double: plans of memory count it."""

    def __init__(self, name: str, preprocessing: Preprocessing, device: torch.device, **options: Any) -> None:
        if preprocessing.mask and not self.info.takes_mask:
            raise ValueError(f"metric {name!r} cannot leave out single pixels: it takes no mask")
        self.name = name
        self.preprocessing = preprocessing
        self.device = device
        self.options = options
        self.source_sha256 = ""
        """Hash of the file of a metric that is loaded by reference: another file gives other distances."""
        self.pixel_weights: Tensor | None = None
        """Weights of the pixels (y, x) in means, float64, the largest 1; see :meth:`weighted`."""
        self._described_weights: dict[str, Any] | None = None
        self._symmetrised = False
        self._warned = False
        self._range_known = False

    # --- defined by the author ----------------------------------------------------------------------------

    @abstractmethod
    def embed(self, frames: Tensor) -> Embedding:
        """Compute the state of frames (n, y, x, channel) in the metric's :attr:`~MetricInfo.value_range`.

        Frames have three channels, or one if :attr:`MetricInfo.one_channel_suffices`. Metrics that take a
        mask are given NaN for missing pixels; others never see NaN from a mask.
        """

    @abstractmethod
    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        """Compute the (len(a), len(b)) block of distances, float64.

        Where ``a is b`` the diagonal need not be computed, unless ``distance_to_itself`` is NaN.
        """

    def embed_with_rest(self, frames: Tensor, rest: Tensor) -> Embedding:
        """Embed ``frames + rest``, frames in double precision and what that has rounded off them.

        Metrics with :attr:`takes_rest` override it.
        """
        return self.embed(frames)

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        """Compute the distances of a[k] and b[k], (len(a),), differentiable where the metric is.

        Metrics with a formula for all pairs at once override it.
        """
        return torch.cat([self.compare(left, right).reshape(1) for left, right in zip(a, b, strict=True)])

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound the absolute error that rounding can have given each distance.

        Metrics override it with what their arithmetic does to errors of these frames, see
        :attr:`~lsim.Embedding.rounding`. A metric that is blind to a change which sources round
        (:attr:`MetricInfo.blind_to`) adds :attr:`~lsim.Embedding.stored`. Zero where nothing is known.

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
        """Explain why the metric cannot be loaded, with the command that changes that; empty if it can."""
        return ""

    @classmethod
    def needs_double(cls, options: Mapping[str, Any]) -> bool:
        """Tell whether frames have to be prepared in double precision under these options."""
        return False

    # --- settings -----------------------------------------------------------------------------------------

    @classmethod
    def option_names(cls) -> list[str]:
        """List the metric's own options: the keyword-only arguments of its ``__init__``."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point dtype that the metric computes in."""
        return torch.float64 if self.preprocessing.precision == "double" else torch.float32

    def specification(self) -> dict[str, Any]:
        """Describe all that determines the metric's values, as JSON, for results and fingerprints."""
        settings = asdict(self.preprocessing)
        if not settings["mask"]:
            del settings["mask"]
        if settings["precision"] == "single":
            del settings["precision"]  # stored results from before this setting don't have it
        elif self.takes_rest:
            settings["rest"] = "kept"  # stored results without it were computed without the rest
        specification = {
            "metric": self.name,
            "algorithm_version": self.algorithm_version,
            "preprocessing": settings,
            "quantised": self.quantised,
        }
        if self.options:
            specification["options"] = self.options
        if self._symmetrised:
            specification["symmetrised"] = True
        if self.source_sha256:
            specification["source_sha256"] = self.source_sha256
        if self._described_weights is not None:
            specification[WEIGHTS_OF_PIXELS] = self._described_weights
        return specification

    @property
    def specification_hash(self) -> str:
        """Hash of :meth:`specification`: equal for metrics that give equal values."""
        return hash_specification(self.specification())

    @property
    def axioms(self) -> frozenset[str]:
        """Axioms of :attr:`MetricInfo.axioms`, and symmetry if the metric is :meth:`symmetrised`."""
        return self.info.axioms | {"symmetric"} if self._symmetrised else self.info.axioms

    @property
    def quantised(self) -> bool:
        """True if frames are truncated to 8 bit first."""
        return self._follows_8bit_publication

    @property
    def _follows_8bit_publication(self) -> bool:
        return self.published_on_8bit and self.preprocessing.compat == "published"

    @property
    def shared_as(self) -> Hashable:
        """Key that metrics share if they embed the same prepared frames alike; None if no other does."""
        return (self.shares_embedding, self.quantised) if self.shares_embedding else None

    @property
    def family(self) -> Hashable:
        """Key that a run shares under: :attr:`shared_as` with the package and its very :meth:`embed`.

        A derived class with an ``embed`` of its own shares nothing, whatever name it inherits, and no
        package gets embeddings that another package's metrics use.
        """
        if self.shared_as is None:
            return None
        cls = type(self)
        return (self.shared_as, cls.__module__.partition(".")[0], cls.embed)

    # --- the same metric with other settings --------------------------------------------------------------

    def symmetrised(self) -> Self:
        """Return the metric as ½ (d(a, b) + d(b, a)); a symmetric metric is returned as it is."""
        if "symmetric" in self.axioms:
            return self
        both_ways = copy.copy(self)
        both_ways._symmetrised = True
        return both_ways

    def weighted(self, weights: ArrayLike) -> Self:
        """Return the metric with weighted means over pixels.

        Parameters
        ----------
        weights : array_like of shape (y, x)
            Weight of each pixel, in all channels: cell areas, or the cosine of latitude. Finite, not
            negative, and not all 0; only their ratios count. Pixels of weight 0 count in no mean. With a
            mask, the means of each pair are over the pixels that both frames have.

        Returns
        -------
        Metric
            For frames (y, x), which must keep their size (``size=None``). The :meth:`specification` has the
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
        clone = copy.copy(self)
        clone.pixel_weights = torch.from_numpy(scale_weights(weights))
        # Once: specifications are often asked for, and hashing a million weights takes milliseconds.
        clone._described_weights = describe_weights(weights)
        return clone

    def _masked(self) -> Self:
        """Return the metric with single missing pixels left out."""
        if self.preprocessing.mask:
            return self
        if not self.info.takes_mask:
            raise ValueError(f"metric {self.name!r} cannot leave out single pixels: it takes no mask")
        masked = copy.copy(self)
        masked.preprocessing = replace(self.preprocessing, mask=True)
        return masked

    # --- scopes, units, sizes -----------------------------------------------------------------------------

    def why_not_scope(self, scope: Scope) -> str:
        """Explain why the metric cannot measure frames of a scope, and the remedy; empty if it can."""
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
        """Return the units of distances.

        Parameters
        ----------
        scope : str or (lo, hi)
            Frames that are normalised have lost their units; with ``"none"`` they keep them.
        field_units : str
            Units of the frames.

        Returns
        -------
        str
            In the notation of UDUNITS; empty for those of a field whose units are unknown.

        Examples
        --------
        >>> import lsim
        >>> lsim.load_metric("l2").units("none", "m s-1"), lsim.load_metric("l2").units("sequence", "m s-1")
        ('m2 s-2', '1')
        """
        if not (self.info.power_of_units and isinstance(scope, str) and scope == "none"):
            return self.info.units
        return raise_units(field_units, self.info.power_of_units)

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
        """Warn of frames outside the sizes that the metric was made for, once in its life."""
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


def hash_specification(specification: Mapping[str, Any]) -> str:
    """Hash a metric's specification, from the metric or as it was recorded; keys in any order.

    Examples
    --------
    >>> hash_specification({"a": 1, "b": 2}) == hash_specification({"b": 2, "a": 1})
    True
    """
    document = json.dumps(specification, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(document.encode()).hexdigest()[:32]


def positive_number(metric: str, option: str, value: Any) -> float:
    """Return an option's value as a float; raise :class:`ValueError`, naming both, if it isn't above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"option {option!r} of metric {metric!r} must be a positive number, got {value!r}")
    return float(value)


def safe_sqrt(squared: Tensor) -> Tensor:
    """Take the square root with the gradient 0 at 0, rather than an infinite one."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1).sqrt(), squared)


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device of a name; ``"auto"`` is the GPU if there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)
