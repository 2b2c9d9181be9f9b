"""The fractions skill score: events above a threshold, compared by neighbourhoods."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsim.metric import Embedding, Metric, MetricInfo
from lsim.pairs import all_pairs, has_kernel, rows_in_torch, squared_differences
from lsim.preprocess import FramesError, Preprocessing


class FractionsSkill(Metric):
    """One minus the fractions skill score of events, values above a threshold.

    Each frame becomes the fractions p of events in all windows that lie within it; the distance is
    Σ (p_a − p_b)² / (Σ p_a² + Σ p_b²), over windows and channels. Frames without any event are at 0 from one
    another (the package ``scores`` gives them the skill 0), and at 1 from others.

    Parameters
    ----------
    name, preprocessing, device
        As :class:`~lsim.metric.Metric` takes them.
    threshold : float, default 0.5
        On [0, 1]; with the scope ``"none"``, in the field's units.
    window : int, default 5
        Side of the neighbourhood in pixels.

    Examples
    --------
    >>> import lsim, numpy as np
    >>> frames = np.stack([np.eye(8), np.eye(8)[::-1]])
    >>> float(lsim.load_metric("fss", size=None, window=8).pairwise(frames)[0, 1])
    0.0
    """

    copies_to_compare = False

    info = MetricInfo(
        title="one minus the fractions skill score",
        source="Roberts, Lean 2008; scores fss_2d",
        differentiable=False,
        axioms=frozenset({"non-negative", "symmetric", "zero-on-itself"}),
        saturates_at=1.0,
        one_channel_suffices=True,
        takes_physical_values=True,
    )

    def __init__(
        self,
        name: str,
        preprocessing: Preprocessing,
        device: torch.device,
        *,
        threshold: float = 0.5,
        window: int = 5,
    ) -> None:
        if (
            isinstance(threshold, bool)
            or not isinstance(threshold, int | float)
            or not math.isfinite(threshold)
        ):
            raise ValueError(f"option 'threshold' of metric {name!r} must be a number, got {threshold!r}")
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(f"option 'window' of metric {name!r} must be 1 or more, got {window!r}")
        super().__init__(name, preprocessing, device, threshold=float(threshold), window=window)

    def check_size(self, y: int, x: int) -> None:
        """Raise :class:`~lsim.FramesError` for frames that no window fits into."""
        if (window := self.options["window"]) > min(y, x):
            raise FramesError(
                f"metric {self.name!r} cannot take frames of {y}×{x}; the smallest that works is "
                f"{window}×{window}, the option 'window'"
            )

    def embed(self, frames: Tensor) -> Embedding:
        """Compute fractions of events in each window, and the sum of their squares: float64."""
        window = self.options["window"]
        # Both in double and times 255: a value that equals the threshold is not above it.
        events = (frames.detach().double() > self.options["threshold"] * 255.0).permute(0, 3, 1, 2)
        counts = torch.nn.functional.pad(events.double().cumsum(2).cumsum(3), (1, 0, 1, 0))
        inside = counts[..., window:, window:] - counts[..., :-window, window:]
        inside = inside - counts[..., window:, :-window] + counts[..., :-window, :-window]
        fractions = inside.flatten(1) / window**2
        return Embedding({"fractions": fractions, "power": fractions.square().sum(1)})

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        x, y = a.parts["fractions"], b.parts["fractions"]
        if not has_kernel(x, y):
            return rows_in_torch(self.paired, a, b)
        squared = all_pairs(
            squared_differences,
            len(x),
            len(y),
            x.numpy(),
            y.numpy(),
            symmetric=a is b,
            operations=x.shape[1],
        )
        return _share(squared, a.parts["power"][:, None] + b.parts["power"])

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        squared = (a.parts["fractions"] - b.parts["fractions"]).square().sum(1)
        return _share(squared, a.parts["power"] + b.parts["power"])


def _share(squared: Tensor, power: Tensor) -> Tensor:
    return squared / torch.where(power == 0, 1, power)
