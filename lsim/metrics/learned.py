"""LSiM, the learned simulation metric, and its published variants.

For feature maps f_l of a convolutional trunk, with per-pixel mean and standard deviation maps µ_l, σ_l of
the training data and non-negative weights w_lc per channel (Kohl, Um, Thuerey 2020, section 4.2),

    d(a, b)² = Σ_l mean_yx Σ_c w_lc (g_lc(a) − g_lc(b))²,   g = (f − µ)/(σ + 1e-10)/(√C − 1).

The mean cancels in the difference, so with z_l = f_l √w_l / ((σ_l + 1e-10)(√C_l − 1) √(H_l W_l)) it is the
Euclidean distance of the vectors z: a frame is embedded once, a pair is one pass over two vectors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsim.metric import Embedding, Metric, MetricInfo, safe_sqrt
from lsim.networks import AlexTrunk, LsimTrunk, SkipTrunk
from lsim.pairs import all_pairs, has_kernel, rows_in_torch, squared_differences
from lsim.preprocess import FramesError, Preprocessing
from lsim.threads import in_threads
from lsim.weights import Checkpoint, find_weights, load_checkpoint, why_missing

FRAMES_TOGETHER = 64
"""Frames in one pass of the network on a GPU, or where gradients are wanted."""

AXIOMS = frozenset({"non-negative", "symmetric", "zero-on-itself", "triangle"})


class LSiM(Metric):
    """The learned simulation metric on the five maps of :class:`~lsim.networks.LsimTrunk`."""

    info = MetricInfo(
        title="learned simulation metric",
        source="Kohl, Um, Thuerey, ICML 2020; https://github.com/tum-pbs/LSIM",
        axioms=AXIOMS,
        minimum_size=44,
        advised_sizes=(128, 512),
    )
    trunk_class: ClassVar[type[LsimTrunk] | type[SkipTrunk] | type[AlexTrunk]] = LsimTrunk

    def __init__(
        self, name: str, preprocessing: Preprocessing, device: torch.device, checkpoint: Checkpoint
    ) -> None:
        super().__init__(name, preprocessing, device)
        self.weights_sha256 = checkpoint.sha256
        trunk = self.trunk_class()
        trunk.load_state_dict(checkpoint.trunk)
        self.trunk: nn.Module = trunk.to(device).requires_grad_(False).eval()
        self._weights = [w.clamp(min=0).to(device) for w in checkpoint.channel_weights]
        self._squares = [m2.to(device) for m2 in checkpoint.deviation_squares]
        self._counts = checkpoint.counts
        self._scales: dict[tuple[tuple[int, int], ...], list[Tensor]] = {}
        if preprocessing.size is not None:
            self.check_size(preprocessing.size, preprocessing.size)

    @classmethod
    def load(
        cls,
        name: str,
        preprocessing: Preprocessing,
        device: torch.device,
        weights: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Self:
        checkpoint = load_checkpoint(find_weights(name, weights), cls.trunk_class)
        return cls(name, preprocessing, device, checkpoint, **options)

    @classmethod
    def why_unavailable(cls, name: str, weights: str | os.PathLike[str] | None = None) -> str:
        return why_missing(name, weights)

    def specification(self) -> dict[str, Any]:
        return super().specification() | {"weights_sha256": self.weights_sha256}

    def check_size(self, y: int, x: int) -> None:
        super().check_size(y, x)
        if not (self.trunk_class.takes(y) and self.trunk_class.takes(x)):
            near = max(self.info.minimum_size, 16 * round(max(y, x) / 16))
            raise FramesError(
                f"metric {self.name!r} cannot take frames of {y}×{x}: its decoder does not meet its encoder "
                f"again; the smallest that works is {self.info.minimum_size}×{self.info.minimum_size}, and "
                f"multiples of 16 always do: pass size={near}"
            )

    def features(self, frames: Tensor) -> Sequence[Tensor]:
        """The trunk's feature maps of (batch, 3, y, x) in [0, 255], in IEEE single precision."""
        # TF32, torch's default for convolutions on GPUs, is wrong by 11 % on nearly equal frames.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            maps: Sequence[Tensor] = self.trunk(frames.contiguous(memory_format=torch.channels_last))
        return maps

    def embed(self, frames: Tensor) -> Embedding:
        """z of every frame, (n, Σ_l C_l H_l W_l) float32; with gradients where ``frames`` carry them."""
        planes = frames.permute(0, 3, 1, 2).float()
        if planes.shape[1] == 1:
            planes = planes.expand(-1, 3, -1, -1)
        # On a CPU one frame at a time: then a frame's features are the same bits whatever the batch around
        # it, and a larger batch is no faster. Elsewhere as many as keep a device busy in bounded memory.
        if has_kernel(planes):
            parts = in_threads(self._scaled, planes.split(1))
        else:
            parts = [self._scaled(part) for part in planes.split(FRAMES_TOGETHER)]
        return Embedding({"features": torch.cat(parts)})

    def _scaled(self, planes: Tensor) -> Tensor:
        maps = self.features(planes)
        scaled = zip(maps, self._scales_for(maps), strict=True)
        return torch.cat([(f * scale).flatten(1) for f, scale in scaled], 1)

    def _scales_for(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """z_l / f_l for maps of these sizes: (channel, y', x') each."""
        sizes = tuple((m.shape[2], m.shape[3]) for m in maps)
        if sizes not in self._scales:
            parts = zip(self.scale_parts(), sizes, strict=True)
            self._scales[sizes] = [feature_scale(*part, size) for part, size in parts]
        return self._scales[sizes]

    def scale_parts(self) -> list[tuple[Tensor, Tensor, int]]:
        """What :func:`feature_scale` takes of each feature map: channel weights, squares, and their count."""
        return list(zip(self._weights, self._squares, self._counts, strict=True))

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        x, y = a.parts["features"], b.parts["features"]
        if not has_kernel(x, y):
            return rows_in_torch(self.paired, a, b)
        sides = (x.numpy(), y.numpy())
        squared = all_pairs(
            squared_differences, len(x), len(y), *sides, symmetric=a is b, operations=x.shape[1]
        )
        return squared.sqrt()

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        squared = (a.parts["features"] - b.parts["features"]).square().sum(1, dtype=torch.float64)
        return safe_sqrt(squared)


class LSiMSkip(LSiM):
    """The published variant with skip connections, trained from scratch: eight maps."""

    info = MetricInfo(
        title="learned simulation metric, encoder/decoder with skip connections",
        source="Kohl, Um, Thuerey, ICML 2020, table 1 (Skip from scratch)",
        axioms=AXIOMS,
        minimum_size=48,
        advised_sizes=(128, 512),
    )
    trunk_class = SkipTrunk


class LSiMAlex(LSiM):
    """The learned simulation metric on AlexNet's five maps: for weights of one's own, none are published."""

    info = MetricInfo(
        title="learned simulation metric on AlexNet",
        source="Kohl, Um, Thuerey, ICML 2020, table 2; trained by lsim.training",
        axioms=AXIOMS,
        minimum_size=31,
        advised_sizes=(128, 512),
    )
    trunk_class = AlexTrunk


def feature_scale(weight: Tensor, squares: Tensor, count: int, size: tuple[int, int]) -> Tensor:
    """z_l / f_l for feature maps of one size.

    Parameters
    ----------
    weight : Tensor of shape (channel,)
        Not negative.
    squares : Tensor of shape (y, x)
        Sum of squared deviations over ``count`` frames; resized bilinearly, corners aligned, as published.
    count : int
    size : (int, int)
        y', x' of the feature maps.

    Returns
    -------
    Tensor of shape (channel, y', x')
    """
    # To the size that they have, to the bit as they are; a branch could not be exported for any size.
    squares = F.interpolate(squares[None, None], size, mode="bilinear", align_corners=True)[0, 0]
    deviation = (squares / (count - 1)).sqrt()
    channels = len(weight)
    # Not math.sqrt of the size: an exporter makes a constant of it.
    divisor = (deviation + 1e-10) * (math.sqrt(channels) - 1) * (size[0] * size[1]) ** 0.5
    return weight.sqrt()[:, None, None] / divisor
