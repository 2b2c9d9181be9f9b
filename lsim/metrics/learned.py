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
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsim.error_bounds import NetworkPrecision, ReportsPrecision, check_network_precision, of_features
from lsim.metric import Embedding, Metric, MetricInfo, safe_sqrt
from lsim.networks import AlexTrunk, LsimTrunk, NonSiamese, SkipTrunk, for_one_channel
from lsim.no_tf32 import ieee_convolutions, ieee_products
from lsim.pairs import each_pair, has_kernel, squared_distances
from lsim.preprocess import FramesError, Preprocessing
from lsim.rounding import of_features_difference, of_sum
from lsim.threads import batches, in_threads
from lsim.weights import (
    Checkpoint,
    MissingWeightsError,
    WeightsError,
    find_weights,
    load_checkpoint,
    read_metadata,
    verified_bytes,
    why_missing,
)

Network = TypeVar("Network", bound=nn.Module)

FRAMES_TOGETHER = 64
"""Frames, or pairs, in one pass of a network on a GPU, or with gradients."""

FRAMES_A_TASK = 8
"""Frames, or pairs, in one pass of a thread on a CPU: more are no faster."""

AXIOMS = frozenset({"non-negative", "symmetric", "zero-on-itself", "triangle", "euclidean"})


class LSiM(ReportsPrecision, Metric):
    """The learned simulation metric on the five maps of :class:`~lsim.networks.LsimTrunk`.

    Parameters
    ----------
    precision : {"exact", "ranking"}
        ``"exact"``: the network runs in IEEE single precision, whatever torch's settings of TF32 or autocast;
        in double if frames are prepared in double.
        ``"ranking"``: in bfloat16, if only the order of distances matters. It ranks alike, but distances of
        nearly equal frames are noise, wrong by up to 580 %; by 11 % in TF32, the default of GPUs.
    """

    copies_to_compare = False

    info = MetricInfo(
        title="learned simulation metric",
        source="Kohl, Um, Thuerey, ICML 2020; https://github.com/tum-pbs/LSIM",
        axioms=AXIOMS,
        minimum_size=44,
        advised_sizes=(128, 512),
        one_channel_suffices=True,
        feature_distance="euclidean",
    )
    algorithm_version = 2
    trunk_class: ClassVar[type[LsimTrunk] | type[SkipTrunk] | type[AlexTrunk]] = LsimTrunk

    def __init__(
        self,
        name: str,
        preprocessing: Preprocessing,
        device: torch.device,
        checkpoint: Checkpoint,
        *,
        precision: NetworkPrecision = "exact",
    ) -> None:
        check_network_precision(name, precision, double=preprocessing.precision == "double")
        # Stored results of the exact metric carry no precision.
        super().__init__(
            name, preprocessing, device, **({} if precision == "exact" else {"precision": precision})
        )
        self.precision = precision
        self.weights_sha256 = checkpoint.sha256
        trunk = self.trunk_class().float()  # whatever torch takes by default
        trunk.load_state_dict(checkpoint.trunk)
        trunk = trunk.to(self.dtype)
        trunk.requires_grad_(False).eval()
        self.trunk = _move(device, trunk)
        self._grey = None if isinstance(trunk, AlexTrunk) else _move(device, for_one_channel(trunk))
        self._weights = [w.clamp(min=0).to(device, self.dtype) for w in checkpoint.channel_weights]
        self._squares = [m2.to(device, self.dtype) for m2 in checkpoint.deviation_squares]
        self._counts = checkpoint.counts
        self._scales: dict[tuple[int, int], list[Tensor]] = {}
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
        """Add the weights' hash and, in bfloat16, the size of the batches, which the last bits depend on."""
        batches = {"frames_together": FRAMES_A_TASK} if self.precision == "ranking" else {}
        return super().specification() | {"weights_sha256": self.weights_sha256} | batches

    def check_size(self, y: int, x: int) -> None:
        super().check_size(y, x)
        if not (self.trunk_class.takes(y) and self.trunk_class.takes(x)):
            near = max(self.info.minimum_size, 16 * round(max(y, x) / 16))
            raise FramesError(
                f"metric {self.name!r} cannot take frames of {y}×{x}: its decoder does not meet its encoder "
                f"again; the smallest that works is {self.info.minimum_size}×{self.info.minimum_size}, and "
                f"multiples of 16 always do: pass size={near}"
            )

    def features(self, planes: Tensor) -> Sequence[Tensor]:
        """Compute the trunk's feature maps of (batch, 3 or 1, y, x) in [0, 255], in its precision."""
        trunk = self.trunk
        if planes.shape[1] == 1:
            if self._grey is None:
                planes = planes.expand(-1, 3, -1, -1)
            else:
                trunk = self._grey
        ranking = self.precision == "ranking"
        with torch.autocast(planes.device.type, torch.bfloat16, enabled=ranking):
            maps: Sequence[Tensor] = trunk(planes.contiguous(memory_format=torch.channels_last))
        return maps

    def embed(self, frames: Tensor) -> Embedding:
        """Compute z of every frame, (n, Σ_l C_l H_l W_l); with gradients if ``frames`` carry them."""
        planes = frames.permute(0, 3, 1, 2).to(self.dtype)
        scales = self._scales_for(*planes.shape[2:])
        with ieee_convolutions():
            if not has_kernel(planes):
                parts = [self._scaled(part, scales) for part in planes.split(FRAMES_TOGETHER)]
                return Embedding({"features": torch.cat(parts)})
            features = _empty(len(planes), sum(scale.numel() for scale in scales), self.dtype)

            tasks, size = self._batches(planes)

            def fill(part: slice) -> None:
                start = 0
                for f, scale in zip(self.features(_pad_batch(planes[part], size)), scales, strict=True):
                    into = features[part, start : start + scale.numel()].view(-1, *scale.shape)
                    torch.mul(f[: len(into)], scale, out=into)
                    start += scale.numel()

            in_threads(fill, tasks)
        return Embedding({"features": features})

    def _batches(self, planes: Tensor) -> tuple[list[slice], int]:
        """Cut planes into batches for the calls of threads, and choose the size that each is padded to."""
        if self.precision == "exact":
            return _tasks(planes), 2
        # In bfloat16, convolutions of large batches use the processor's matrix units, which add up in another
        # order than those of small ones. With batches of one size, no frame's bits depend on others.
        size = _frames_a_task(planes)
        return [slice(start, start + size) for start in range(0, len(planes), size)], size

    def _scaled(self, planes: Tensor, scales: Sequence[Tensor]) -> Tensor:
        scaled = zip(self.features(planes), scales, strict=True)
        return torch.cat([(f * scale).flatten(1) for f, scale in scaled], 1)

    def _scales_for(self, y: int, x: int) -> list[Tensor]:
        """Compute z_l / f_l for frames of a size, once: (channel, y', x') each."""
        if (y, x) not in self._scales:
            with torch.device("meta"):
                maps = self.trunk_class()(torch.empty(1, 3, y, x))
            # They are reused, also by passes with gradients.
            with torch.inference_mode(False):
                self._scales[y, x] = [
                    feature_scale(*part, (m.shape[2], m.shape[3]))
                    for part, m in zip(self.scale_parts(), maps, strict=True)
                ]
        return self._scales[y, x]

    def scale_parts(self) -> list[tuple[Tensor, Tensor, int]]:
        """List for each feature map the arguments of :func:`feature_scale`: weights, squares, count."""
        return list(zip(self._weights, self._squares, self._counts, strict=True))

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        x = a.parts["features"]
        squared, record = squared_distances(x, x if a is b else b.parts["features"])
        self.note_precision(of_features(record))
        return safe_sqrt(squared)

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound a norm of the difference of features, which the network has rounded."""
        return of_features_difference(a, b) + of_sum(distances, a.parts["features"].dtype)

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        x, y = a.parts["features"], b.parts["features"]
        if has_kernel(x, y) and {x.dtype, y.dtype} <= {torch.float32, torch.float64}:
            return safe_sqrt(each_pair(x, y, squared=True))
        return safe_sqrt((x - y).square().sum(1, dtype=torch.float64))


class LSiMSkip(LSiM):
    """The published variant with skip connections, trained from scratch: eight maps."""

    info = MetricInfo(
        title="learned simulation metric, encoder/decoder with skip connections",
        source="Kohl, Um, Thuerey, ICML 2020, table 1 (Skip from scratch)",
        axioms=AXIOMS,
        minimum_size=48,
        advised_sizes=(128, 512),
        one_channel_suffices=True,
        feature_distance="euclidean",
    )
    trunk_class = SkipTrunk


class LSiMAlex(LSiM):
    """The learned simulation metric on AlexNet's five maps, for your own weights: none are published."""

    info = MetricInfo(
        title="learned simulation metric on AlexNet",
        source="Kohl, Um, Thuerey, ICML 2020, table 2; trained by lsim.training",
        axioms=AXIOMS,
        minimum_size=31,
        advised_sizes=(128, 512),
        one_channel_suffices=True,
        feature_distance="euclidean",
    )
    trunk_class = AlexTrunk


def feature_scale(weight: Tensor, squares: Tensor, count: int, size: tuple[int, int]) -> Tensor:
    """Compute z_l / f_l for feature maps of one size.

    Parameters
    ----------
    weight : Tensor of shape (channel,)
        Channel weights, not negative.
    squares : Tensor of shape (y, x)
        Sum of squared deviations over ``count`` frames; resized bilinearly, corners aligned, as published.
    count : int
    size : (int, int)
        y', x' of the feature maps.

    Returns
    -------
    Tensor of shape (channel, y', x')
    """
    # A resize to the same size changes no bit, and a branch could not be exported for any size.
    squares = F.interpolate(squares[None, None], size, mode="bilinear", align_corners=True)[0, 0]
    deviation = (squares / (count - 1)).sqrt()
    channels = len(weight)
    # Not math.sqrt of the size, which an exporter turns into a constant.
    divisor = (deviation + 1e-10) * (math.sqrt(channels) - 1) * (size[0] * size[1]) ** 0.5
    return weight.sqrt()[:, None, None] / divisor


NO_WEIGHTS = (
    "its weights are published nowhere: train some with 'lsim train' and trunk: non-siamese, and pass them "
    "as --weights non-siamese=FILE"
)


class NonSiameseMetric(Metric):
    """The publication's baseline: one network that takes both frames of a pair, the reference first.

    Not symmetric, and not 0 for identical frames. Its first convolution is linear, so it is computed once per
    frame in either role; the rest of the network runs for every pair.
    """

    copies_to_compare = False

    info = MetricInfo(
        title="non-siamese network, the reference first",
        source="Kohl, Um, Thuerey, ICML 2020, table 2 (Non-Siamese); trained by lsim.training",
        axioms=frozenset({"non-negative"}),
        minimum_size=44,
        advised_sizes=(128, 512),
        distance_to_itself=math.nan,
    )

    def __init__(
        self,
        name: str,
        preprocessing: Preprocessing,
        device: torch.device,
        state: dict[str, Tensor],
        sha256: str,
    ) -> None:
        super().__init__(name, preprocessing, device)
        self.weights_sha256 = sha256
        network = NonSiamese()
        network.load_state_dict(state)
        self.network = _move(device, network.to(self.dtype).requires_grad_(False).eval())
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
        if weights is None:
            raise MissingWeightsError(f"no weights for {name!r}: {NO_WEIGHTS}")
        return cls(name, preprocessing, device, *load_non_siamese(find_weights(name, weights)), **options)

    @classmethod
    def why_unavailable(cls, name: str, weights: str | os.PathLike[str] | None = None) -> str:
        return NO_WEIGHTS if weights is None else why_missing(name, weights)

    def specification(self) -> dict[str, Any]:
        return super().specification() | {"weights_sha256": self.weights_sha256}

    def embed(self, frames: Tensor) -> Embedding:
        """Compute the first convolution of every frame in either role, (n, y', x', 32), channels last."""
        planes = frames.permute(0, 3, 1, 2).to(self.dtype)
        first = self.network.conv1
        sides = (first.weight[:, :3], first.bias), (first.weight[:, 3:], None)

        def convolved(planes: Tensor) -> list[Tensor]:
            scaled = (planes / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            with torch.autocast(planes.device.type, enabled=False):
                maps = [F.conv2d(scaled, *side, first.stride, first.padding) for side in sides]
            return [m.permute(0, 2, 3, 1) for m in maps]

        with ieee_convolutions():
            if has_kernel(planes):
                parts = in_threads(
                    lambda part: [m[: len(planes[part])] for m in convolved(_pad_batch(planes[part]))],
                    _tasks(planes),
                )
            else:
                parts = [convolved(part) for part in planes.split(FRAMES_TOGETHER)]
        reference, other = (torch.cat(side) for side in zip(*parts, strict=True))
        return Embedding({"reference": reference, "other": other})

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        i, j = (index.flatten() for index in torch.meshgrid(*map(_numbers, (a, b)), indexing="ij"))
        return self._distances(a, b, i, j).view(len(a), len(b))

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        return self._distances(a, b, _numbers(a), _numbers(b))

    def _distances(self, a: Embedding, b: Embedding, i: Tensor, j: Tensor) -> Tensor:
        """Compute the distances of the frames a[i] and b[j], float64."""
        reference, other = a.parts["reference"], b.parts["other"]
        on_threads = has_kernel(reference, other)

        def distances(part: slice) -> Tensor:
            first = (reference[i[part]] + other[j[part]]).permute(0, 3, 1, 2)
            with torch.autocast(first.device.type, enabled=False):
                if not on_threads:
                    return self.network.judged(self.network.pooled(first))
                features = self.network.pooled(_pad_batch(first))[: len(first)]
                # The rounding of a product of matrices depends on the number of rows: one at a time.
                return torch.cat([self.network.judged(row) for row in features.split(1)])

        with ieee_convolutions(), ieee_products(reference.device):
            if on_threads:
                parts = in_threads(distances, batches(len(i), FRAMES_A_TASK))
            else:
                starts = range(0, len(i), FRAMES_TOGETHER)
                parts = [distances(slice(start, start + FRAMES_TOGETHER)) for start in starts]
        return torch.cat(parts).double()


def load_non_siamese(path: Path) -> tuple[dict[str, Tensor], str]:
    """Load the state of a :class:`~lsim.networks.NonSiamese` from a file of training, with the file's hash.

    Raises
    ------
    WeightsError
        When the file holds something else.
    """
    content, sha256 = verified_bytes(path)
    trunk = read_metadata(path)["trunk"]
    if trunk != "non-siamese":
        raise WeightsError(f"{path}: weights of the trunk {trunk!r}, expected those of 'non-siamese'")
    tensors = safetensors.torch.load(content)
    with torch.device("meta"):
        model_shapes = {
            f"trunk.{name}": tuple(value.shape) for name, value in NonSiamese().state_dict().items()
        }
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    if shapes != model_shapes:
        wrong = ", ".join(
            f"{name} {shapes.get(name, 'missing')}"
            for name in sorted(model_shapes | shapes)
            if shapes.get(name) != model_shapes.get(name)
        )
        raise WeightsError(f"{path}: not the tensors of a non-siamese network: {wrong}")
    return {name.removeprefix("trunk."): value.float() for name, value in tensors.items()}, sha256


def _move(device: torch.device, network: Network) -> Network:
    """Move a network to a device, with weights in the layout in which convolutions are fastest."""
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _empty(n: int, length: int, dtype: torch.dtype) -> Tensor:
    """Allocate (n, length). NumPy asks for large pages, which saves a tenth of the time to features."""
    return torch.from_numpy(np.empty((n, length), np.float64 if dtype == torch.float64 else np.float32))


def _tasks(planes: Tensor) -> list[slice]:
    """Cut planes (n, channel, y, x) into batches for the calls of threads."""
    return batches(len(planes), _frames_a_task(planes))


def _frames_a_task(planes: Tensor) -> int:
    """Return how many frames (…, y, x) a call of a thread takes; fewer large ones, to save memory."""
    y, x = planes.shape[2:]
    return max(3, min(FRAMES_A_TASK, FRAMES_A_TASK * 256**2 // (y * x)))


def _pad_batch(planes: Tensor, size: int = 2) -> Tensor:
    """Repeat the last plane up to ``size``: torch convolves a single one to other bits."""
    padding = size - len(planes)
    return planes if padding <= 0 else torch.cat([planes, planes[-1:].expand(padding, -1, -1, -1)])


def _numbers(embedding: Embedding) -> Tensor:
    return torch.arange(len(embedding), device=embedding.parts["reference"].device)
