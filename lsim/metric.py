"""Distances between frames by a metric: arrays, sequences, prepared frames and batches of tensors.

The methods of a metric have three kinds of readers; each row is built on the row above.

    the author defines   ``embed``, ``compare``; perhaps ``paired``, ``rounding``, ``embed_with_rest``
    stages call          ``prepare``, then ``embed_prepared``, ``distance_block``, ``distance_pairs`` and
                         ``bound_rounding``: the author's code, checked (:mod:`lsim.checked_metric`). Or
                         all at once, ``all_pairs`` and ``from_reference``
    users call           ``distance`` of two arrays, ``pairwise`` of a sequence, the metric itself on tensors
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lsim.checked_metric import CheckedMetric
from lsim.embedding import Embedding
from lsim.frames import as_array, as_frames
from lsim.metric_definition import (
    SizeWarning,
    hash_specification,
    positive_number,
    resolve_device,
    safe_sqrt,
)
from lsim.metric_info import CHANGES, Change, MetricInfo
from lsim.pixel_weights import WEIGHTS_OF_PIXELS, Mask, describe_weights, mask_frames
from lsim.prepared import Prepared, prepare, prepare_pairs
from lsim.preprocess import Preprocessing
from lsim.scope import Scope
from lsim.tensor_batches import RangeWarning, check_batches, check_range, check_tensors, map_range

__all__ = [
    "CHANGES",
    "WEIGHTS_OF_PIXELS",
    "Change",
    "Embedding",
    "Mask",
    "Metric",
    "MetricInfo",
    "RangeWarning",
    "SizeWarning",
    "check_range",
    "check_tensors",
    "describe_weights",
    "hash_specification",
    "positive_number",
    "resolve_device",
    "safe_sqrt",
]

_Bounds: TypeAlias = Callable[[], np.ndarray]


class Metric(CheckedMetric):
    """A distance between frames; lower is more similar.

    Subclasses set :attr:`info` and :attr:`algorithm_version` and define :meth:`embed` and
    :meth:`compare`. ``algorithm_version`` is raised whenever the values change, so that stored distances
    are known to be out of date.

    Parameters
    ----------
    name : str
    preprocessing : Preprocessing
    device : torch.device

    Examples
    --------
    >>> import lsim
    >>> class MeanError(lsim.Metric):
    ...     info = lsim.MetricInfo(title="difference of the means", source="example")
    ...
    ...     def embed(self, frames):
    ...         return lsim.Embedding({"mean": frames.double().mean((1, 2, 3))})
    ...
    ...     def compare(self, a, b):
    ...         return (a.parts["mean"][:, None] - b.parts["mean"]).abs()
    >>> metric = MeanError("mean-error", lsim.Preprocessing(size=None), torch.device("cpu"))
    >>> metric.pairwise([[[0.0] * 5], [[0.0, 1.0, 1.0, 1.0, 2.0]]])
    array([[  0. , 127.5],
           [127.5,   0. ]])
    """

    def distance(
        self,
        a: ArrayLike,
        b: ArrayLike,
        scope: Scope = "batch",
        mask: Mask = None,
        weights: ArrayLike | None = None,
    ) -> np.ndarray:
        """Measure distances between two arrays, frame by frame.

        Parameters
        ----------
        a, b : array_like of equal shape
            (y, x), (y, x, channel) or (batch, y, x, channel), any integer or floating dtype. If the
            metric isn't symmetric, ``a`` is the reference.
        scope : str or (lo, hi), default "batch"
            Over which frames minimum and maximum are taken: ``"batch"``, jointly over both arguments
            and the whole batch, as published; ``"pair"``, over each pair alone; ``(lo, hi)``, fixed;
            ``"none"``, none at all: values keep their own units, for metrics that take them
            (:attr:`MetricInfo.takes_physical_values`).
        mask : "nan" or array_like of bool, optional
            Leave missing pixels out of both frames, instead of giving up their frames, for metrics that take
            a mask (:attr:`MetricInfo.takes_mask`). ``"nan"``: pixels that are NaN or infinite in either of
            the frames. An array (y, x), or of the frames' shape with or without the channel: also pixels
            where it is false, in both frames.
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
            When shapes differ, or when the metric cannot take the frames, channels, size or scope.

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
            metric = self._masked()
            return metric.distance(mask_frames(first, mask), mask_frames(second, mask), scope)
        if scope == "pair":
            pairs = zip(first, second, strict=True)
            return np.concatenate(
                [self.distance(frame_a[None], frame_b[None], "batch") for frame_a, frame_b in pairs]
            )
        prepared = self.prepare(
            np.concatenate([first, second]), scope, resized=not self._follows_8bit_publication
        )
        with torch.no_grad():
            embedding = self._with_rounding(self._embed_anew(prepared), prepared)
            frame_a, frame_b = embedding[slice(0, len(first))], embedding[slice(len(first), None)]
            if self.device.type == "cpu":
                values = torch.cat(
                    [self.distance_block(x, y).reshape(1) for x, y in zip(frame_a, frame_b, strict=True)]
                )
            else:  # pair by pair would launch as many kernels
                values = self.distance_pairs(frame_a, frame_b)
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
        """Measure all distances among the frames of a sequence; each frame is embedded once.

        Parameters
        ----------
        frames : array_like of shape (n, y, x, channel) or (n, y, x)
        scope : str or (lo, hi), default "sequence"
            Over which frames minimum and maximum are taken. ``"pair"`` normalises every pair by itself,
            and so embeds each frame n−1 times, but resizes it once. ``"none"`` as :meth:`distance` takes it.
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

        Examples
        --------
        >>> import lsim, numpy as np
        >>> frames = np.stack([np.zeros((8, 8)), np.full((8, 8), 0.5), np.ones((8, 8))])
        >>> lsim.load_metric("l1", size=None).pairwise(frames)
        array([[0. , 0.5, 1. ],
               [0.5, 0. , 0.5],
               [1. , 0.5, 0. ]])
        """
        array = as_frames(frames)
        if weights is not None:
            return self.weighted(weights).pairwise(array, scope, mask)
        if mask is not None:
            return self._masked().pairwise(mask_frames(array, mask), scope)
        if scope != "pair":
            return self.all_pairs(self.prepare(array, scope))
        return self._each_pair(array, with_rounding=False)[0]

    def __call__(
        self, reference: Tensor, other: Tensor, *, data_range: float | tuple[float, float] | None = None
    ) -> Tensor:
        """Measure distances between two batches in a known range, with gradients.

        Parameters
        ----------
        reference, other : Tensor of shape (batch, channel, y, x)
            Values in [0, 255], see :attr:`MetricInfo.value_range`, or in ``data_range``; 1 or 3 channels.
            They are neither resized nor normalised by their own values.
        data_range : float or (lo, hi), optional
            Range of the values: [0, ``data_range``], or [lo, hi]; 1 for values in [0, 1]. Default: the
            metric's own range, with one warning if all values are in [0, 1].

        Returns
        -------
        Tensor of shape (batch,)
            On the metric's device, in the dtype of the frames, or torch's default dtype for integers. Half
            precision is computed in single. If the metric is differentiable
            (:attr:`MetricInfo.differentiable`), gradients are finite, and 0 for identical frames. Metrics
            that truncate to 8 bit (:attr:`quantised`) have the gradient 0 everywhere.

        Examples
        --------
        >>> import lsim
        >>> lsim.load_metric("l1")(torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8), data_range=2)
        tensor([0.5000])
        """
        check_batches(reference, other)
        self.check_size(reference.shape[2], reference.shape[3])
        self._warn_of_size(reference.shape[2], reference.shape[3])
        if data_range is None and not self._range_known and self.info.value_range == (0.0, 255.0):
            self._range_known = check_range(self.name, "data_range=1", reference, other, stacklevel=3)
        dtype = torch.promote_types(reference.dtype, other.dtype)
        dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
        stacked = self._as_embedded(torch.cat([reference, other]), data_range)
        # With gradients, and under torch.compile, code runs unguarded.
        embedding = self.embed(stacked)
        self.claims.check_embedding(embedding, len(stacked))
        first, second = embedding[slice(0, len(reference))], embedding[slice(len(reference), None)]
        return self.distance_pairs(first, second).to(dtype)

    def _as_embedded(self, frames: Tensor, data_range: float | tuple[float, float] | None) -> Tensor:
        """Bring frames (batch, channel, y, x) into the layout, range and dtype that :meth:`embed` takes."""
        frames = frames.to(self.device).permute(0, 2, 3, 1)
        if frames.dtype in (torch.float16, torch.bfloat16):
            frames = frames.float()
        if data_range is not None:
            frames = map_range(frames, data_range, self.info.value_range)
        if frames.shape[-1] == 1 and not self.info.one_channel_suffices:
            frames = frames.expand(*frames.shape[:-1], 3)
        if self.dtype == torch.float64:
            frames = frames.double()
        return frames.clamp(0, 255).floor() if self.quantised else frames

    def prepare(self, frames: np.ndarray, scope: Scope, *, resized: bool = True) -> Prepared:
        """Apply the metric's preprocessing to (n, y, x, channel), and check the resulting size.

        The result depends on :attr:`preprocessing` and the device alone, so metrics with equal settings can
        share it.

        Parameters
        ----------
        frames : ndarray of shape (n, y, x, channel)
        scope : str or (lo, hi)
        resized : bool, default True
            Resize as the settings say; else keep the size.
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
        """Measure distances among prepared frames, as :meth:`pairwise` of arrays: (n, n) float64."""
        return self._matrix_and_bounds(prepared)[0]

    def all_pairs_with_rounding(self, prepared: Prepared) -> tuple[np.ndarray, np.ndarray]:
        """Compute :meth:`all_pairs`, and a bound on the rounding of each distance: (n, n) both."""
        matrix, bounds = self._matrix_and_bounds(prepared)
        rounding = bounds()
        np.fill_diagonal(rounding, 0)
        rounding[np.isnan(matrix)] = np.nan
        return matrix, rounding

    def _matrix_and_bounds(self, prepared: Prepared) -> tuple[np.ndarray, _Bounds]:
        """Compute :meth:`all_pairs`, and return a function that bounds its rounding."""
        with torch.no_grad():
            embedding = self.embed_prepared(prepared)
            block = self.distance_block(embedding, embedding)
        single, block = block.dtype == torch.float32, block.double()
        bounds = functools.cache(lambda: self.bound_rounding(embedding, embedding, block, prepared))
        matrix = block.cpu().numpy().copy()
        if not prepared.comparable.all():
            matrix[~prepared.comparable] = np.nan
            matrix[:, ~prepared.comparable] = np.nan
        self.claims.check_distances(matrix, square=True, single=single, rounding=bounds)
        if "symmetric" in self.axioms and not (matrix == matrix.T).all():
            # To the last bit: some devices add d(i, j) and d(j, i) in another order.
            lower_triangle = np.tril_indices(len(matrix), -1)
            matrix[lower_triangle] = matrix.T[lower_triangle]
        itself = np.where(prepared.comparable, self._to_itself(matrix.diagonal()), np.nan)
        np.fill_diagonal(matrix, itself)
        return matrix, bounds

    def each_pair_with_rounding(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute :meth:`pairwise` with every pair normalised by itself, and bounds on its rounding.

        Parameters
        ----------
        frames : ndarray of shape (n, y, x, channel)

        Returns
        -------
        distances, rounding : ndarrays of shape (n, n), float64
            As :meth:`all_pairs_with_rounding` gives them.
        """
        return self._each_pair(frames, with_rounding=True)

    def _each_pair(self, frames: np.ndarray, *, with_rounding: bool) -> tuple[np.ndarray, np.ndarray]:
        """Compute :meth:`each_pair_with_rounding`, with bounds of 0 unless ``with_rounding``."""
        self._check_sizes(self.preprocessing, frames)
        matrix = np.empty((len(frames), len(frames)))
        rounding = np.zeros_like(matrix)
        for i, j, prepared in prepare_pairs(frames, self.preprocessing, self.device):
            pair, bounds = self._matrix_and_bounds(prepared)
            matrix[i, j], matrix[j, i] = pair[0, 1], pair[1, 0]
            if with_rounding and i != j:
                rounding[i, j], rounding[j, i] = bounds()[[0, 1], [1, 0]]
        diagonal = matrix.diagonal()
        np.fill_diagonal(matrix, np.where(np.isnan(diagonal), np.nan, self._to_itself(diagonal)))
        rounding[np.isnan(matrix)] = np.nan
        return matrix, rounding

    def from_reference(self, prepared: Prepared) -> np.ndarray:
        """Compute row 0 of :meth:`all_pairs` alone, the first frame being the reference: (n,) float64."""
        return self._row_and_bounds(prepared)[0]

    def from_reference_with_rounding(self, prepared: Prepared) -> tuple[np.ndarray, np.ndarray]:
        """Compute :meth:`from_reference`, and a bound on the rounding of each distance: (n,) both."""
        row, bounds = self._row_and_bounds(prepared)
        rounding = bounds()[0]
        rounding[:1] = 0
        rounding[np.isnan(row)] = np.nan
        return row, rounding

    def _row_and_bounds(self, prepared: Prepared) -> tuple[np.ndarray, _Bounds]:
        """Compute :meth:`from_reference`, and return a function that bounds its rounding, (1, n)."""
        with torch.no_grad():
            embedding = self.embed_prepared(prepared)
            reference = embedding[slice(0, 1)]
            block = self.distance_block(reference, embedding)
        single, block = block.dtype == torch.float32, block.double()
        bounds = functools.cache(lambda: self.bound_rounding(reference, embedding, block, prepared))
        row = block[0].cpu().numpy().copy()
        comparable = prepared.comparable
        row[~(comparable & comparable[0])] = np.nan
        self.claims.check_distances(row, square=False, single=single, rounding=lambda: bounds()[0])
        if comparable[0]:
            row[:1] = self._to_itself(row[:1])
        return row, bounds

    def _to_itself(self, diagonal: np.ndarray) -> np.ndarray:
        """Replace computed distances of frames to themselves by the claimed value, if there is one."""
        claimed = self.info.distance_to_itself
        return diagonal.copy() if np.isnan(claimed) else np.full_like(diagonal, claimed)


def _as_batch(array: ArrayLike, name: str) -> np.ndarray:
    """Give (y, x), (y, x, channel) or (batch, y, x, channel) the shape (batch, y, x, channel)."""
    values = as_array(array, name)
    return as_frames(values[None] if values.ndim == 3 else values, name)
