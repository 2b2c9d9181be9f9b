"""Prepared frames on a metric's device, shared by metrics with the same settings.

A family of metrics that embeds alike shares the embedding, too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsim.embedding import Embedding
from lsim.preprocess import (
    Applied,
    Preprocessing,
    Scope,
    apply_to_pairs,
    apply_with_rounding,
    drop_alpha,
    truncate_to_8bit,
)
from lsim.rounding import FrameRounding, move_bound, of_mean_square


@dataclass(eq=False)
class Prepared:
    """A sequence's frames in [0, 255], ready for every metric with the same preprocessing.

    Attributes
    ----------
    values : Tensor of shape (n, y, x, channel)
        float32, or float64 in double precision, on the metrics' device. One channel stands for three equal
        ones. A frame that cannot be compared is all NaN; in ``masked`` frames single missing pixels are NaN.
    comparable : ndarray of shape (n,), bool
        Frames that have values to compare.
    masked : bool
        Whether missing pixels (NaN) are left out of comparisons, instead of their frames.
    rounding : Tensor of shape (n,), float64
        Bound on the error that preparing may have given a frame's values, in their units. None if unknown.
    stored : Tensor of shape (n,), float64
        Bound on the error that the source's floating-point dtype may have given them before.
    bounds : FrameRounding
        The bounds that both come from.
    find_rest : callable, optional
        Computes :attr:`rest`.
    rounding_with_rest : Tensor of shape (n,), float64
        ``rounding`` for metrics that take the rest.
    """

    values: Tensor
    comparable: np.ndarray
    masked: bool = False
    rounding: Tensor | None = None
    stored: Tensor | None = None
    find_rest: Callable[[], Tensor] | None = field(default=None, repr=False)
    rounding_with_rest: Tensor | None = None
    bounds: FrameRounding | None = field(default=None, repr=False)
    _embeddings: dict[Hashable, Embedding] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def truncated(self) -> Tensor:
        """The values rounded down to whole numbers of 0 … 255."""
        if self.values.device.type == "cpu":
            return torch.from_numpy(truncate_to_8bit(self.values.numpy())).to(self.values.dtype)
        return self.values.clamp(0, 255).floor()

    @cached_property
    def rest(self) -> Tensor | None:
        """Rest that double precision has rounded off ``values``, float64; None in single precision."""
        return None if self.find_rest is None else self.find_rest()

    @cached_property
    def mean_rounding(self) -> Tensor | None:
        """Bound on the root mean square of a frame's errors, ``rounding`` being the largest: (n,) float64."""
        if self.bounds is None:
            return self.rounding
        return move_bound(self.values.device, of_mean_square(self.values, self.bounds))

    def frames(self, *, quantised: bool, one_channel: bool, copied: bool = False) -> Tensor:
        """Return the frames as a metric takes them: truncated or not, a single channel as one or as three.

        ``copied`` frames are new memory, for code that may write into them.
        """
        values = self.truncated if quantised else self.values
        if copied:
            values = values.clone()
        if one_channel or values.shape[-1] != 1:
            return values
        return values.expand(*values.shape[:-1], 3)

    def anew(self) -> Prepared:
        """Copy the frames without any embedding of them."""
        return replace(self, _embeddings={})

    def select(self, rows: np.ndarray) -> Prepared:
        """Select frames by their numbers; no embedding is shared with them."""
        parts = (self.rounding, self.stored, self.rounding_with_rest)
        rounding, stored, with_rest = (None if part is None else part[rows] for part in parts)

        def find_rest() -> Tensor:
            assert self.rest is not None
            return self.rest[rows]

        return Prepared(
            self.values[rows],
            self.comparable[rows],
            self.masked,
            rounding=rounding,
            stored=stored,
            find_rest=None if self.find_rest is None else find_rest,
            rounding_with_rest=with_rest,
        )

    def embedding(self, shared_as: Hashable, embed: Callable[[], Embedding]) -> Embedding:
        """Return ``embed()``, computed once for all metrics that share it under a key other than None."""
        if shared_as is None:
            return embed()
        if shared_as not in self._embeddings:
            self._embeddings[shared_as] = embed()
        return self._embeddings[shared_as]


def prepare(frames: np.ndarray, settings: Preprocessing, scope: Scope, device: torch.device) -> Prepared:
    """Resize and normalise a sequence, once for all metrics with the same settings.

    An NVIDIA or AMD GPU does all of it, on frames that were moved in their own dtype. Otherwise the CPU does
    it, since other devices lack double precision. Both give the same within 1e-6 of 255.

    Parameters
    ----------
    frames : ndarray of shape (n, y, x, channel)
    settings : Preprocessing
    scope : str or (lo, hi)
    device : torch.device

    Raises
    ------
    lsim.FramesError
        For shapes and channels that no metric takes.
    """
    if device.type == "cuda":
        return _as_prepared(apply_with_rounding(settings, move_to(frames, device), scope), settings, device)
    return _as_prepared(apply_with_rounding(settings, frames, scope), settings, device)


def prepare_pairs(
    frames: np.ndarray, settings: Preprocessing, device: torch.device
) -> Iterator[tuple[int, int, Prepared]]:
    """Prepare each pair i <= j by itself and yield i, j and the two frames; every frame is resized once."""
    if device.type == "cuda":
        for i, j, pair in apply_to_pairs(settings, move_to(frames, device)):
            yield i, j, _as_prepared(pair, settings, device)
        return
    for i, j, pair in apply_to_pairs(settings, frames):
        yield i, j, _as_prepared(pair, settings, device)


def _as_prepared(applied: Applied, settings: Preprocessing, device: torch.device) -> Prepared:
    def on_device(part: Any) -> Tensor:
        moved: Tensor = torch.from_numpy(part).to(device) if isinstance(part, np.ndarray) else part
        return moved

    values, rest = on_device(applied.values), applied.rest
    # Without a mask, preparing makes a frame with NaN or infinity all NaN.
    decisive = values if settings.mask else values[:, :1, :1, :1]
    comparable = decisive.isfinite().flatten(1).any(1).cpu().numpy()
    bounds = applied.rounding
    prepared, stored, with_rest = (
        move_bound(values.device, bound) for bound in (bounds.prepared, bounds.stored, bounds.with_rest)
    )
    return Prepared(
        values,
        comparable,
        settings.mask,
        rounding=prepared,
        stored=stored,
        find_rest=None if rest is None else lambda: on_device(rest()),
        rounding_with_rest=with_rest,
        bounds=bounds,
    )


def move_to(frames: np.ndarray, device: torch.device) -> Tensor:
    """Move frames (n, y, x, channel) to a device, in their own dtype and without alpha."""
    opaque = drop_alpha(frames)
    tensor = torch.from_numpy(np.require(opaque, opaque.dtype.newbyteorder("="), ["C", "W"]))
    # From pinned memory the copy is faster and does not block this thread.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
