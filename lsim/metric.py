"""What a metric is: an embedding of each frame, and a comparison of embeddings.

Every metric splits into work per frame, done once, and work per pair. ``embed`` and ``compare`` are all
that a metric defines; ``distance``, ``pairwise`` and the call on tensors are derived from them here, once.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lsim.preprocess import FramesError, Preprocessing, Scope, apply, as_frames, truncate_to_8bit


class SizeWarning(UserWarning):
    """Frames of a size that the metric was not made for."""


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
        The value for identical frames.
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
    lower_is_more_similar: bool = True


@dataclass(frozen=True)
class Embedding:
    """A metric's state per frame: named tensors that share their first axis, one entry a frame."""

    parts: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def __getitem__(self, frames: slice) -> Embedding:
        return Embedding({name: part[frames] for name, part in self.parts.items()})

    def __iter__(self) -> Iterator[Embedding]:
        return (self[k : k + 1] for k in range(len(self)))


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

    def __init__(self, name: str, preprocessing: Preprocessing, device: torch.device) -> None:
        self.name = name
        self.preprocessing = preprocessing
        self.device = device
        self._warned = False

    @abstractmethod
    def embed(self, frames: Tensor) -> Embedding:
        """Per-frame state of frames (n, y, x, channel) in the metric's :attr:`~MetricInfo.value_range`."""

    @abstractmethod
    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        """The (len(a), len(b)) block of distances, float64.

        Where ``a is b`` the diagonal need not be computed.
        """

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        """Distances of a[k] and b[k]: (len(a),). Metrics with a formula for all at once override it."""
        return torch.cat([self.compare(left, right).reshape(1) for left, right in zip(a, b, strict=True)])

    def specification(self) -> dict[str, Any]:
        """All that determines the metric's values, as JSON: what results record and fingerprints hash."""
        return {
            "metric": self.name,
            "algorithm_version": self.algorithm_version,
            "preprocessing": asdict(self.preprocessing),
            "quantised": self.quantised,
        }

    @property
    def specification_hash(self) -> str:
        """Hash of :meth:`specification`: equal where the metric's values are."""
        document = json.dumps(self.specification(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(document.encode()).hexdigest()[:32]

    @property
    def quantised(self) -> bool:
        """Whether frames are truncated to 8 bit first."""
        return self._follows_8bit_publication

    @property
    def _follows_8bit_publication(self) -> bool:
        return self.published_on_8bit and self.preprocessing.compat == "published"

    def distance(self, a: ArrayLike, b: ArrayLike, scope: Scope = "batch") -> np.ndarray:
        """Distances between two arrays, frame by frame.

        Parameters
        ----------
        a, b : array_like of equal shape
            (y, x), (y, x, channel) or (batch, y, x, channel), any integer or floating dtype.
        scope : str or (lo, hi), default "batch"
            Over which frames minimum and maximum are taken: ``"batch"``, jointly over both arguments
            and the whole batch, as published; ``"pair"``, over each pair alone; ``(lo, hi)``, fixed.

        Returns
        -------
        ndarray of shape (batch,), float64
            NaN where a frame holds NaN or infinity.

        Raises
        ------
        ValueError
            When shapes differ, or frames, channels or size are none that the metric takes.
        """
        first, second = _as_batch(a, "a"), _as_batch(b, "b")
        if first.shape != second.shape:
            raise ValueError(f"a and b differ in shape: {np.shape(a)} and {np.shape(b)}")
        if scope == "pair":
            pairs = zip(first, second, strict=True)
            return np.concatenate([self.distance(left[None], right[None], "batch") for left, right in pairs])
        prepared = self.prepare(
            np.concatenate([first, second]), scope, resized=not self._follows_8bit_publication
        )
        with torch.no_grad():
            embedding = self.embed(self._tensor(prepared))
            left, right = embedding[slice(0, len(first))], embedding[slice(len(first), None)]
            values = torch.cat([self.compare(x, y).reshape(1) for x, y in zip(left, right, strict=True)])
        comparable = _comparable(prepared)
        distances = values.double().cpu().numpy()
        distances[~(comparable[: len(first)] & comparable[len(first) :])] = np.nan
        return distances

    def pairwise(self, frames: ArrayLike, scope: Scope = "sequence") -> np.ndarray:
        """All distances among the frames of a sequence; each frame is embedded once.

        Parameters
        ----------
        frames : array_like of shape (n, y, x, channel) or (n, y, x)
        scope : str or (lo, hi), default "sequence"
            Over which frames minimum and maximum are taken. ``"pair"`` normalises every pair for itself,
            and so has to embed each frame n−1 times.

        Returns
        -------
        ndarray of shape (n, n), float64
            Symmetric; NaN in row and column of a frame that holds NaN or infinity. The diagonal is the
            metric's distance of a frame to itself: 0, and −inf for PSNR.
        """
        array = as_frames(np.asarray(frames))
        if scope != "pair":
            return self.all_pairs(self.prepare(array, scope))
        matrix = np.empty((len(array), len(array)))
        for i in range(len(array)):
            for j in range(i, len(array)):
                matrix[i, j] = matrix[j, i] = self.all_pairs(self.prepare(array[[i, j]], "pair"))[0, 1]
        np.fill_diagonal(matrix, np.where(np.isnan(matrix.diagonal()), np.nan, self.info.distance_to_itself))
        return matrix

    def __call__(self, reference: Tensor, other: Tensor) -> Tensor:
        """Distances between two batches that already are in the metric's own range; differentiable.

        Parameters
        ----------
        reference, other : Tensor of shape (batch, channel, y, x)
            Values in [0, 255], see :attr:`MetricInfo.value_range`; 1 or 3 channels. Nothing is resized
            or normalised.

        Returns
        -------
        Tensor of shape (batch,)
            On the metric's device. Gradients are finite, 0 for identical frames, where the metric is
            differentiable; see :attr:`MetricInfo.differentiable`. Metrics that truncate to 8 bit
            (:attr:`quantised`) have the gradient 0 everywhere.
        """
        if reference.ndim != 4 or reference.shape != other.shape:
            raise ValueError(
                "expected two tensors of equal shape (batch, channel, y, x), "
                f"found {tuple(reference.shape)} and {tuple(other.shape)}"
            )
        if reference.shape[1] not in (1, 3):
            raise ValueError(f"expected 1 or 3 channels on axis 1, found {reference.shape[1]}")
        self.check_size(reference.shape[2], reference.shape[3])
        self._warn_of_size(reference.shape[2], reference.shape[3])
        stacked = torch.cat([reference, other]).to(self.device).permute(0, 2, 3, 1)
        if stacked.shape[-1] == 1:
            stacked = stacked.expand(*stacked.shape[:-1], 3)
        if self.quantised:
            stacked = stacked.clamp(0, 255).floor()
        embedding = self.embed(stacked)
        return self.paired(embedding[slice(0, len(reference))], embedding[slice(len(reference), None)])

    def prepare(self, frames: np.ndarray, scope: Scope, *, resized: bool = True) -> np.ndarray:
        """Apply the metric's preprocessing to (n, y, x, channel), and check the resulting size.

        What it returns depends on :attr:`preprocessing` alone, so metrics with equal ones can share it.
        """
        settings = self.preprocessing
        if not resized:
            settings = Preprocessing(None, settings.order, settings.compat)
        size = settings.size
        y, x = (size, size) if size is not None else frames.shape[1:3]
        self.check_size(int(y), int(x))
        self._warn_of_size(frames.shape[1], frames.shape[2])
        self._warn_of_size(int(y), int(x))
        return apply(settings, frames, scope)

    def all_pairs(self, prepared: np.ndarray) -> np.ndarray:
        """:meth:`pairwise` for frames that :meth:`prepare` made: (n, y, x, 3) → (n, n) float64."""
        self.check_size(prepared.shape[1], prepared.shape[2])
        with torch.no_grad():
            embedding = self.embed(self._tensor(prepared))
            matrix = self.compare(embedding, embedding).double().cpu().numpy()
        if "symmetric" in self.info.axioms:
            # To the last bit: some devices add d(i, j) and d(j, i) in another order.
            below = np.tril_indices(len(matrix), -1)
            matrix[below] = matrix.T[below]
        np.fill_diagonal(matrix, self.info.distance_to_itself)
        comparable = _comparable(prepared)
        matrix[~comparable] = np.nan
        matrix[:, ~comparable] = np.nan
        return matrix

    def from_reference(self, prepared: np.ndarray) -> np.ndarray:
        """Row 0 of :meth:`all_pairs` alone: distances of the first frame to all, (n,) float64."""
        self.check_size(prepared.shape[1], prepared.shape[2])
        with torch.no_grad():
            embedding = self.embed(self._tensor(prepared))
            row = self.compare(embedding[slice(0, 1)], embedding)[0].double().cpu().numpy()
        row[0] = self.info.distance_to_itself
        comparable = _comparable(prepared)
        row[~(comparable & comparable[0])] = np.nan
        return row

    def check_size(self, y: int, x: int) -> None:
        """Raise :class:`ValueError` for frames of a size that the metric cannot take."""
        smallest = self.info.minimum_size
        if min(y, x) < smallest:
            raise FramesError(
                f"metric {self.name!r} cannot take frames of {y}×{x}; the smallest that works is "
                f"{smallest}×{smallest}"
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
                stacklevel=4,
            )

    def _tensor(self, prepared: np.ndarray) -> Tensor:
        values = truncate_to_8bit(prepared) if self.quantised else prepared
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(self.device)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {json.dumps(self.specification(), default=str)} on {self.device}>"


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
    values = np.asarray(array)
    return as_frames(values[None] if values.ndim == 3 else values, what)


def _comparable(prepared: np.ndarray) -> np.ndarray:
    """Frames that hold no NaN; preparing makes a frame with NaN or infinity all NaN."""
    return np.isfinite(prepared[:, 0, 0, 0])
