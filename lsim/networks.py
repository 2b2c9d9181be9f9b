"""Feature extractors of the learned metrics, as plain modules.

A trunk maps frames of shape (batch, 3, y, x) to a list of feature maps (batch, channel, y', x');
:data:`CHANNELS` is the number of channels of each map. Layer names are those of the published checkpoints
without their slice numbering; :data:`CHECKPOINT_KEYS` translates.
"""

from __future__ import annotations

import copy
from typing import ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LsimTrunk(nn.Module):
    """The five convolutions of LSiM (Kohl et al. 2020, section 4.2): 626,304 parameters with the heads."""

    CHANNELS: ClassVar[tuple[int, ...]] = (32, 96, 192, 128, 128)
    CHECKPOINT_KEYS: ClassVar[dict[str, str]] = {
        "conv1": "basenet.slice1.0",
        "conv2": "basenet.slice2.1",
        "conv3": "basenet.slice3.1",
        "conv4": "basenet.slice4.0",
        "conv5": "basenet.slice5.0",
    }

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 12, stride=4, padding=2)
        self.conv2 = nn.Conv2d(32, 96, 5, padding=2)
        self.conv3 = nn.Conv2d(96, 192, 3, padding=1)
        self.conv4 = nn.Conv2d(192, 128, 3, padding=1)
        self.conv5 = nn.Conv2d(128, 128, 3, padding=1)

    @staticmethod
    def map_size(n: int) -> int:
        """Return the length of the coarsest feature map for input length ``n``, below 1 if too small."""
        return _pooled(_pooled(_strided(n)))

    @staticmethod
    def takes(n: int) -> bool:
        """Return True if the network can process frames of length ``n`` along an axis."""
        return LsimTrunk.map_size(n) >= 1

    def forward(self, frames: Tensor) -> list[Tensor]:
        map1 = F.relu(self.conv1(frames))
        map2 = F.relu(self.conv2(F.max_pool2d(map1, 4, 2)))
        map3 = F.relu(self.conv3(F.max_pool2d(map2, 4, 2)))
        map4 = F.relu(self.conv4(map3))
        map5 = F.relu(self.conv5(map4))
        return [map1, map2, map3, map4, map5]


class SkipTrunk(nn.Module):
    """The encoder/decoder with skip connections of the publication ("Skip from scratch"): eight maps."""

    CHANNELS: ClassVar[tuple[int, ...]] = (32, 64, 128, 128, 64, 64, 32, 32)
    CHECKPOINT_KEYS: ClassVar[dict[str, str]] = {
        "conv1": "basenet.conv1.0",
        "conv2": "basenet.conv2.1",
        "conv3": "basenet.conv3.1",
        "conv4": "basenet.conv4.0",
        "deconv3": "basenet.deconv3.0",
        "deconv2": "basenet.deconv2.0",
        "deconv1": "basenet.deconv1.0",
        "conv5": "basenet.conv5.0",
    }

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 12, stride=4, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1)
        self.conv4 = nn.Conv2d(128, 128, 3, padding=1)
        self.deconv3 = nn.ConvTranspose2d(128, 64, 3, padding=1)
        self.deconv2 = nn.ConvTranspose2d(192, 64, 3, stride=2, output_padding=1)
        self.deconv1 = nn.ConvTranspose2d(128, 32, 5, stride=2)
        self.conv5 = nn.Conv2d(64, 32, 3, padding=1)

    @staticmethod
    def takes(n: int) -> bool:
        """Return True if the decoder's maps have the sizes of the encoder's for frames of length ``n``."""
        fine, middle = _strided(n), _pooled(_strided(n))
        coarse = _pooled(middle)
        return coarse >= 1 and middle == 2 * coarse + 2 and fine == 2 * middle + 3

    def forward(self, frames: Tensor) -> list[Tensor]:
        map1 = F.relu(self.conv1(frames))
        map2 = F.relu(self.conv2(F.max_pool2d(map1, 4, 2)))
        map3 = F.relu(self.conv3(F.max_pool2d(map2, 4, 2)))
        map4 = F.relu(self.conv4(map3))
        up3 = F.relu(self.deconv3(map4))
        up2 = F.relu(self.deconv2(torch.cat([map3, up3], 1)))
        up1 = F.relu(self.deconv1(torch.cat([map2, up2], 1)))
        map5 = F.relu(self.conv5(torch.cat([map1, up1], 1)))
        return [map1, map2, map3, map4, up3, up2, up1, map5]


class AlexTrunk(nn.Module):
    """The five convolutions of AlexNet (Krizhevsky 2014, as in torchvision): for ImageNet's weights.

    Frames in [0, 255] are standardised as ImageNet's images were.
    """

    CHANNELS: ClassVar[tuple[int, ...]] = (64, 192, 384, 256, 256)
    CHECKPOINT_KEYS: ClassVar[dict[str, str]] = {
        "conv1": "features.0",
        "conv2": "features.3",
        "conv3": "features.6",
        "conv4": "features.8",
        "conv5": "features.10",
    }
    """Names of torchvision's AlexNet."""
    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 11, stride=4, padding=2)
        self.conv2 = nn.Conv2d(64, 192, 5, padding=2)
        self.conv3 = nn.Conv2d(192, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 256, 3, padding=1)
        self.conv5 = nn.Conv2d(256, 256, 3, padding=1)
        mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        self.register_buffer("mean", 255 * torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("deviation", 255 * torch.tensor(deviation)[:, None, None], persistent=False)

    @staticmethod
    def takes(n: int) -> bool:
        """Return True if the network can process frames of length ``n`` along an axis."""
        return n >= 31

    def forward(self, frames: Tensor) -> list[Tensor]:
        map1 = F.relu(self.conv1((frames - self.mean) / self.deviation))
        map2 = F.relu(self.conv2(F.max_pool2d(map1, 3, 2)))
        map3 = F.relu(self.conv3(F.max_pool2d(map2, 3, 2)))
        map4 = F.relu(self.conv4(map3))
        map5 = F.relu(self.conv5(map4))
        return [map1, map2, map3, map4, map5]


class VggTrunk(nn.Module):
    """VGG16's thirteen convolutions (Simonyan & Zisserman 2015, as in torchvision): for ImageNet's weights.

    Frames in [0, 255] are standardised as ImageNet's images were. The five maps are those before each
    pooling, and the last.
    """

    CHANNELS: ClassVar[tuple[int, ...]] = (64, 128, 256, 512, 512)
    CHECKPOINT_KEYS: ClassVar[dict[str, str]] = {
        "conv1_1": "features.0",
        "conv1_2": "features.2",
        "conv2_1": "features.5",
        "conv2_2": "features.7",
        "conv3_1": "features.10",
        "conv3_2": "features.12",
        "conv3_3": "features.14",
        "conv4_1": "features.17",
        "conv4_2": "features.19",
        "conv4_3": "features.21",
        "conv5_1": "features.24",
        "conv5_2": "features.26",
        "conv5_3": "features.28",
    }
    """Names of torchvision's VGG16."""
    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1_1 = nn.Conv2d(3, 64, 3, padding=1)
        self.conv1_2 = nn.Conv2d(64, 64, 3, padding=1)
        self.conv2_1 = nn.Conv2d(64, 128, 3, padding=1)
        self.conv2_2 = nn.Conv2d(128, 128, 3, padding=1)
        self.conv3_1 = nn.Conv2d(128, 256, 3, padding=1)
        self.conv3_2 = nn.Conv2d(256, 256, 3, padding=1)
        self.conv3_3 = nn.Conv2d(256, 256, 3, padding=1)
        self.conv4_1 = nn.Conv2d(256, 512, 3, padding=1)
        self.conv4_2 = nn.Conv2d(512, 512, 3, padding=1)
        self.conv4_3 = nn.Conv2d(512, 512, 3, padding=1)
        self.conv5_1 = nn.Conv2d(512, 512, 3, padding=1)
        self.conv5_2 = nn.Conv2d(512, 512, 3, padding=1)
        self.conv5_3 = nn.Conv2d(512, 512, 3, padding=1)
        _register_imagenet(self)

    @staticmethod
    def takes(n: int) -> bool:
        """Return True if the network can process frames of length ``n`` along an axis."""
        return n >= 16

    def forward(self, frames: Tensor) -> list[Tensor]:
        x = F.relu(self.conv1_1((frames - self.mean) / self.deviation))
        map1 = F.relu(self.conv1_2(x))
        x = F.relu(self.conv2_1(F.max_pool2d(map1, 2)))
        map2 = F.relu(self.conv2_2(x))
        x = F.relu(self.conv3_1(F.max_pool2d(map2, 2)))
        x = F.relu(self.conv3_2(x))
        map3 = F.relu(self.conv3_3(x))
        x = F.relu(self.conv4_1(F.max_pool2d(map3, 2)))
        x = F.relu(self.conv4_2(x))
        map4 = F.relu(self.conv4_3(x))
        x = F.relu(self.conv5_1(F.max_pool2d(map4, 2)))
        x = F.relu(self.conv5_2(x))
        map5 = F.relu(self.conv5_3(x))
        return [map1, map2, map3, map4, map5]


class Fire(nn.Module):
    """SqueezeNet's block: few channels, then many; half of them from 1×1 and half from 3×3 kernels."""

    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], 1))


class SqueezeTrunk(nn.Module):
    """SqueezeNet 1.1 (Iandola et al. 2016, as in torchvision): for ImageNet's weights.

    Frames in [0, 255] are standardised as ImageNet's images were. The seven maps are those before each
    pooling, and the last four.
    """

    CHANNELS: ClassVar[tuple[int, ...]] = (64, 128, 256, 384, 384, 512, 512)
    CHECKPOINT_KEYS: ClassVar[dict[str, str]] = {"conv1": "features.0"} | {
        f"fire{k}.{part}": f"features.{k}.{part}"
        for k in (3, 4, 6, 7, 9, 10, 11, 12)
        for part in ("squeeze", "expand1x1", "expand3x3")
    }
    """Names of torchvision's SqueezeNet 1.1; blocks are numbered as there."""
    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2)
        self.fire3 = Fire(64, 16, 64)
        self.fire4 = Fire(128, 16, 64)
        self.fire6 = Fire(128, 32, 128)
        self.fire7 = Fire(256, 32, 128)
        self.fire9 = Fire(256, 48, 192)
        self.fire10 = Fire(384, 48, 192)
        self.fire11 = Fire(384, 64, 256)
        self.fire12 = Fire(512, 64, 256)
        _register_imagenet(self)

    @staticmethod
    def takes(n: int) -> bool:
        """Return True if the network can process frames of length ``n`` along an axis."""
        return n >= 17

    def forward(self, frames: Tensor) -> list[Tensor]:
        map1 = F.relu(self.conv1((frames - self.mean) / self.deviation))
        map2 = self.fire4(self.fire3(F.max_pool2d(map1, 3, 2, ceil_mode=True)))
        map3 = self.fire7(self.fire6(F.max_pool2d(map2, 3, 2, ceil_mode=True)))
        map4 = self.fire9(F.max_pool2d(map3, 3, 2, ceil_mode=True))
        map5 = self.fire10(map4)
        map6 = self.fire11(map5)
        map7 = self.fire12(map6)
        return [map1, map2, map3, map4, map5, map6, map7]


class NonSiamese(nn.Module):
    """The publication's baseline that takes both frames at once: six channels in, one distance out.

    LSiM's convolutions, pooled to 6×6, then three full layers and a sigmoid. It is not symmetric.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(6, 32, 12, stride=4, padding=2)
        self.conv2 = nn.Conv2d(32, 96, 5, padding=2)
        self.conv3 = nn.Conv2d(96, 192, 3, padding=1)
        self.conv4 = nn.Conv2d(192, 128, 3, padding=1)
        self.conv5 = nn.Conv2d(128, 128, 3, padding=1)
        self.full1 = nn.Linear(4608, 128)
        self.full2 = nn.Linear(128, 128)
        self.full3 = nn.Linear(128, 1)

    def forward(self, frames: Tensor, keep: Tensor | None = None) -> Tensor:
        """Compute distances (pair,) in [0, 1] of pairs (pair, 6, y, x), reference before other.

        ``keep`` (pair, 4608) multiplies the pooled features: a dropout mask, in training.
        """
        x = self.pooled(self.conv1(frames))
        return self.judged(x if keep is None else x * keep)

    def pooled(self, first: Tensor) -> Tensor:
        """Map the first convolution's output (pair, 32, y', x') to features (pair, 4608)."""
        x = F.relu(self.conv2(F.max_pool2d(F.relu(first), 4, 2)))
        x = F.relu(self.conv3(F.max_pool2d(x, 4, 2)))
        x = F.relu(self.conv5(F.relu(self.conv4(x))))
        return F.adaptive_avg_pool2d(x, 6).flatten(1)

    def judged(self, features: Tensor) -> Tensor:
        """Map features (pair, 4608) to distances (pair,)."""
        x = F.relu(self.full2(F.relu(self.full1(features))))
        return torch.sigmoid(self.full3(x))[:, 0]


Trunk: TypeAlias = LsimTrunk | SkipTrunk | AlexTrunk
ImageTrunk: TypeAlias = AlexTrunk | VggTrunk | SqueezeTrunk
"""Trunks for ImageNet's weights; ``mean`` and ``deviation`` standardise the frames."""
TRUNKS: dict[str, type[Trunk]] = {"lsim": LsimTrunk, "skip": SkipTrunk, "alex": AlexTrunk}

Convolving = TypeVar("Convolving", bound=LsimTrunk | SkipTrunk)


def for_one_channel(trunk: Convolving) -> Convolving:
    """Copy a trunk for frames (batch, 1, y, x) whose channel stands for three equal ones.

    The weights of the first convolution are summed over the channels, in double precision.
    """
    grey = copy.deepcopy(trunk)
    weight = grey.conv1.weight
    summed = weight.detach().double().sum(1, keepdim=True).to(weight.dtype)
    grey.conv1.weight = nn.Parameter(summed, requires_grad=weight.requires_grad)
    grey.conv1.in_channels = 1
    return grey


def _strided(n: int) -> int:
    """Return the output length of the first convolution: kernel 12, stride 4, padding 2."""
    return (n - 8) // 4 + 1


def _pooled(n: int) -> int:
    """Return the output length of a pooling: kernel 4, stride 2."""
    return (n - 4) // 2 + 1


def _register_imagenet(trunk: nn.Module) -> None:
    """Register mean and deviation of ImageNet's images, in [0, 255], as unsaved buffers (3, 1, 1)."""
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    trunk.register_buffer("mean", 255 * torch.tensor(mean)[:, None, None], persistent=False)
    trunk.register_buffer("deviation", 255 * torch.tensor(deviation)[:, None, None], persistent=False)
