"""Feature extractors of the learned metrics, as plain modules.

A trunk maps frames of shape (batch, 3, y, x) to a list of feature maps (batch, channel, y', x'), and
its :data:`CHANNELS` say how many channels each map has. Layer names are those of the published
checkpoints without their slice numbering; :data:`CHECKPOINT_KEYS` translates.
"""

from __future__ import annotations

from typing import ClassVar

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
        """Length of the coarsest feature map for input length ``n``; below one the input is too small."""
        return _pooled(_pooled(_strided(n)))

    @staticmethod
    def takes(n: int) -> bool:
        """Whether the network can take frames of length ``n`` along an axis."""
        return LsimTrunk.map_size(n) >= 1

    def forward(self, frames: Tensor) -> list[Tensor]:
        one = F.relu(self.conv1(frames))
        two = F.relu(self.conv2(F.max_pool2d(one, 4, 2)))
        three = F.relu(self.conv3(F.max_pool2d(two, 4, 2)))
        four = F.relu(self.conv4(three))
        five = F.relu(self.conv5(four))
        return [one, two, three, four, five]


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
        """Whether the decoder's maps meet the encoder's again for frames of length ``n``."""
        fine, middle = _strided(n), _pooled(_strided(n))
        coarse = _pooled(middle)
        return coarse >= 1 and middle == 2 * coarse + 2 and fine == 2 * middle + 3

    def forward(self, frames: Tensor) -> list[Tensor]:
        one = F.relu(self.conv1(frames))
        two = F.relu(self.conv2(F.max_pool2d(one, 4, 2)))
        three = F.relu(self.conv3(F.max_pool2d(two, 4, 2)))
        four = F.relu(self.conv4(three))
        up_three = F.relu(self.deconv3(four))
        up_two = F.relu(self.deconv2(torch.cat([three, up_three], 1)))
        up_one = F.relu(self.deconv1(torch.cat([two, up_two], 1)))
        five = F.relu(self.conv5(torch.cat([one, up_one], 1)))
        return [one, two, three, four, up_three, up_two, up_one, five]


TRUNKS: dict[str, type[LsimTrunk] | type[SkipTrunk]] = {"lsim": LsimTrunk, "skip": SkipTrunk}


def _strided(n: int) -> int:
    """Output length of the first convolution: kernel 12, stride 4, padding 2."""
    return (n - 8) // 4 + 1


def _pooled(n: int) -> int:
    """Output length of the poolings: kernel 4, stride 2."""
    return (n - 4) // 2 + 1
