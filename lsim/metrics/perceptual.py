"""LPIPS, the learned perceptual image patch similarity, on three networks for images.

For feature maps f_l of a network trained on ImageNet, f̂ = f/(|f| + 1e-10) with the norm over channels, and
weights w_lc ≥ 0 per channel (Zhang et al. 2018, version 0.1 with linear heads),

    d(a, b) = Σ_l mean_yx Σ_c w_lc (f̂_lc(a) − f̂_lc(b))².

With z_l = f̂_l √w_l / √(H_l W_l) it is the squared Euclidean distance of the vectors z: a frame is embedded
once, a pair is one pass over two vectors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lsim.error_bounds import NetworkPrecision, ReportsPrecision, check_network_precision, of_features
from lsim.metric import Embedding, Metric, MetricInfo
from lsim.networks import AlexTrunk, ImageTrunk, SqueezeTrunk, VggTrunk
from lsim.no_tf32 import ieee_convolutions
from lsim.pairs import has_kernel, squared_distances
from lsim.preprocess import Preprocessing
from lsim.rounding import of_features_difference, of_sum
from lsim.threads import in_threads
from lsim.weights import PerceptualWeights, find_head_and_backbone, load_perceptual, why_missing

FRAMES_TOGETHER = 16
"""Frames in one pass of the network on a GPU, or with gradients: VGG's maps are 60 MB a frame."""

TINY = 1e-10
"""Added to norms over channels, as published."""

SOURCE = "Zhang et al., CVPR 2018, version 0.1; https://github.com/richzhang/PerceptualSimilarity"


class LPIPS(ReportsPrecision, Metric):
    """Learned perceptual image patch similarity on AlexNet's five maps.

    Single-precision features leave a relative error of 2e-6 in distances, and of up to 2e-3 where frames
    differ by one grey level in one pixel.

    Parameters
    ----------
    precision : {"exact", "ranking"}
        ``"ranking"`` runs the network in bfloat16: the order of distances that differ stays, and those of
        nearly equal frames are noise.
    """

    copies_to_compare = False

    info = MetricInfo(
        title="learned perceptual image patch similarity, AlexNet",
        source=SOURCE,
        minimum_size=31,
        one_channel_suffices=True,
        feature_distance="squared euclidean",
    )
    trunk_class: ClassVar[type[ImageTrunk]] = AlexTrunk
    published: ClassVar[str] = "lpips-alex"
    """Name of the head among published weights."""

    def __init__(
        self,
        name: str,
        preprocessing: Preprocessing,
        device: torch.device,
        weights: PerceptualWeights,
        *,
        precision: NetworkPrecision = "exact",
    ) -> None:
        check_network_precision(name, precision, double=preprocessing.precision == "double")
        # Stored results of the exact metric carry no precision.
        super().__init__(
            name, preprocessing, device, **({} if precision == "exact" else {"precision": precision})
        )
        self.precision = precision
        self.weights_sha256 = weights.sha256
        trunk = self.trunk_class()
        trunk.load_state_dict(weights.trunk)
        trunk = trunk.to(self.dtype)
        if preprocessing.compat == "published":
            # The publication of LSiM passes frames in [0, 255] where the network expects [−1, 1].
            trunk.mean.div_(127.5).sub_(1)
            trunk.deviation.div_(127.5)
        trunk = trunk.requires_grad_(False).eval()
        self.trunk: nn.Module = trunk.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._roots = [w.to(device, self.dtype).sqrt() for w in weights.channel_weights]
        self._lengths: dict[tuple[int, int], int] = {}
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
        """Load the metric; ``weights`` are those of the network for images, with the published head."""
        files = find_head_and_backbone(cls.published, weights)
        return cls(name, preprocessing, device, load_perceptual(*files, cls.trunk_class), **options)

    @classmethod
    def why_unavailable(cls, name: str, weights: str | os.PathLike[str] | None = None) -> str:
        return why_missing(cls.published, weights)

    def specification(self) -> dict[str, Any]:
        return super().specification() | {"weights_sha256": self.weights_sha256}

    def embed(self, frames: Tensor) -> Embedding:
        """Compute z of every frame, (n, Σ_l C_l H_l W_l); with gradients if ``frames`` carry them."""
        planes = frames.permute(0, 3, 1, 2).to(self.dtype).expand(-1, 3, -1, -1)
        if not has_kernel(planes):
            with ieee_convolutions():
                parts = [torch.cat(self._scaled(part), 1) for part in planes.split(FRAMES_TOGETHER)]
            return Embedding({"features": torch.cat(parts)})
        # One frame at a time, so that no bit depends on the rest of the batch. Written in place, since VGG's
        # features of a few frames are larger than everything else.
        features = planes.new_empty(len(planes), self._length(planes.shape[2], planes.shape[3]))

        def fill(k: int) -> None:
            torch.cat(self._scaled(planes[k : k + 1]), 1, out=features[k : k + 1])

        with ieee_convolutions():
            in_threads(fill, range(len(planes)))
        return Embedding({"features": features})

    def features(self, planes: Tensor) -> Sequence[Tensor]:
        """Compute the trunk's feature maps of (batch, 3, y, x) in [0, 255], in the metric's precision."""
        ranking = self.precision == "ranking"
        with torch.autocast(planes.device.type, torch.bfloat16, enabled=ranking):
            maps: Sequence[Tensor] = self.trunk(planes.contiguous(memory_format=torch.channels_last))
        return maps

    def _scaled(self, planes: Tensor) -> list[Tensor]:
        """Compute z_l of (batch, 3, y, x): (batch, C_l H_l W_l) for each feature map."""
        parts = []
        for features, root in zip(self.features(planes), self._roots, strict=True):
            f = features.to(self.dtype).permute(0, 2, 3, 1)  # (batch, y', x', channel), as it lies in memory
            # The gradient of this norm is 0 where it is 0.
            unit = f / (torch.linalg.vector_norm(f, dim=3, keepdim=True) + TINY)
            scale = root / (f.shape[1] * f.shape[2]) ** 0.5
            parts.append((unit.mul_(scale) if has_kernel(unit) else unit * scale).flatten(1))
        return parts

    def _length(self, y: int, x: int) -> int:
        """Count the features of a frame of this size."""
        if (y, x) not in self._lengths:
            with torch.device("meta"):
                maps = self.trunk_class()(torch.empty(1, 3, y, x))
            self._lengths[y, x] = sum(m.numel() for m in maps)
        return self._lengths[y, x]

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        x = a.parts["features"]
        squared, record = squared_distances(x, x if a is b else b.parts["features"])
        self.note_precision(of_features(record))
        return squared

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound the square of a norm of features, which the network has rounded."""
        error = of_features_difference(a, b)
        return error * (2 * distances.sqrt() + error) + of_sum(distances, a.parts["features"].dtype)

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        return (a.parts["features"] - b.parts["features"]).square().sum(1, dtype=torch.float64)


class LPIPSVgg(LPIPS):
    """Learned perceptual image patch similarity on five maps of VGG16."""

    info = MetricInfo(
        title="learned perceptual image patch similarity, VGG16",
        source=SOURCE,
        minimum_size=16,
        one_channel_suffices=True,
        feature_distance="squared euclidean",
    )
    trunk_class = VggTrunk
    published = "lpips-vgg"


class LPIPSSqueeze(LPIPS):
    """Learned perceptual image patch similarity on seven maps of SqueezeNet 1.1."""

    info = MetricInfo(
        title="learned perceptual image patch similarity, SqueezeNet 1.1",
        source=SOURCE,
        minimum_size=17,
        one_channel_suffices=True,
        feature_distance="squared euclidean",
    )
    trunk_class = SqueezeTrunk
    published = "lpips-squeeze"
