"""What others compute, pair by pair: the references that benchmarks/metrics.py measures against.

Each is a function of two frames (y, x, channel) in [0, 255] and gives a distance as the package defines it,
by the library that people in the field call: scikit-image, SciPy, POT, pytorch-msssim, OpenCV, or the
network's two passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import scipy.fft
import scipy.ndimage
import scipy.spatial.distance
import scipy.stats
import torch
from skimage import metrics as skimage_metrics
from torch import Tensor
from torch.nn import functional as F

from lsim.metric import Metric
from lsim.networks import LsimTrunk, SkipTrunk
from lsim.weights import load_checkpoint

SIZE = 224
Reference: TypeAlias = Callable[[np.ndarray, np.ndarray], float]


def _levels(frame: np.ndarray) -> np.ndarray:
    return frame.astype(np.uint8).reshape(-1, 1)


def l1(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean() / 255)


def l2(a: np.ndarray, b: np.ndarray) -> float:
    return float(skimage_metrics.mean_squared_error(a, b) / 255**2)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-skimage_metrics.peak_signal_noise_ratio(a, b, data_range=255))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(scipy.spatial.distance.correlation(a.ravel(), b.ravel()))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(scipy.spatial.distance.cosine(a.ravel(), b.ravel()))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    return float(1 - skimage_metrics.structural_similarity(a, b, data_range=255, channel_axis=-1))


def ssim_gaussian(a: np.ndarray, b: np.ndarray) -> float:
    similarity = skimage_metrics.structural_similarity(
        a,
        b,
        data_range=255,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    return float(1 - similarity)


def ms_ssim(a: np.ndarray, b: np.ndarray) -> float:
    import pytorch_msssim

    x, y = (torch.from_numpy(np.ascontiguousarray(f)).permute(2, 0, 1)[None] for f in (a, b))
    # Its own window is rounded to single precision, which moves distances by 1e-5.
    bell = torch.exp(-(torch.arange(-5, 6, dtype=x.dtype) ** 2) / (2 * 1.5**2))
    window = (bell / bell.sum()).expand(x.shape[1], 1, 1, -1)
    return float(1 - pytorch_msssim.ms_ssim(x, y, data_range=255, win=window))


def vi(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean(skimage_metrics.variation_of_information(_levels(a), _levels(b))))


def wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    return float(scipy.stats.wasserstein_distance(a.ravel(), b.ravel()) / 255)


def nrmse(a: np.ndarray, b: np.ndarray) -> float:
    return math.sqrt(l2(a, b) / (np.mean((a / 255) ** 2) + 1e-7))


def vrmse(a: np.ndarray, b: np.ndarray) -> float:
    return math.sqrt(l2(a, b) / (np.var(a / 255, ddof=1) + 1e-7))


def gmsd(a: np.ndarray, b: np.ndarray) -> float:
    smooth, slope = np.ones(3), np.array([-1.0, 0.0, 1.0]) / 3
    magnitudes = []
    for frame in (a, b):
        half = frame.reshape(frame.shape[0] // 2, 2, frame.shape[1] // 2, 2, -1).mean(axis=(1, 3))
        parts = []
        for along, across in ((0, 1), (1, 0)):
            part = scipy.ndimage.correlate1d(half, slope, axis=along, mode="constant")
            parts.append(scipy.ndimage.correlate1d(part, smooth, axis=across, mode="constant"))
        magnitudes.append(np.hypot(*parts))
    x, y = magnitudes
    similar = (2 * x * y + 170) / (x**2 + y**2 + 170)
    return float(similar.std(axis=(0, 1)).mean())


def gradient(a: np.ndarray, b: np.ndarray) -> float:
    parts = [np.abs(np.diff(a, axis=axis) - np.diff(b, axis=axis)) for axis in (0, 1)]
    return float(sum(part.sum() for part in parts) / sum(part.size for part in parts) / 255)


def _entropies(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    joint = np.histogram2d(_levels(a)[:, 0], _levels(b)[:, 0], 256, ((0, 256), (0, 256)))[0]
    entropy = scipy.stats.entropy
    return entropy(joint.sum(1), base=2), entropy(joint.sum(0), base=2), entropy(joint.ravel(), base=2)


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    first, second, joint = _entropies(a, b)
    return float(max(first, second) - (first + second - joint))


def nmi(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 - skimage_metrics.normalized_mutual_information(_levels(a), _levels(b), bins=256))


def fft(a: np.ndarray, b: np.ndarray) -> float:
    energies = (np.abs(scipy.fft.fft2(f / 255, axes=(0, 1), norm="forward")) ** 2 for f in (a, b))
    first, second = (np.log10(energy + 1e-12) / 2 for energy in energies)
    return float(np.sqrt(np.mean((first - second) ** 2)))


def spectral(a: np.ndarray, b: np.ndarray) -> float:
    side = max(a.shape[:2])
    ky, kx = (np.fft.fftfreq(n, 1 / side) for n in a.shape[:2])
    shell = np.rint(np.hypot(ky[:, None], kx[None])).astype(int).ravel()
    counts = np.bincount(shell)[: side // 2 + 1]
    logs = []
    for frame in (a, b):
        energy = np.abs(scipy.fft.fft2(frame / 255, axes=(0, 1), norm="forward")) ** 2
        sums = [np.bincount(shell, energy[..., c].ravel()) for c in range(frame.shape[2])]
        logs.append(np.log10(np.stack(sums)[:, : side // 2 + 1] / counts + 1e-12))
    return float(np.sqrt(np.mean((logs[0] - logs[1]) ** 2)))


BY_LIBRARY: dict[str, tuple[str, Reference]] = {
    "l1": ("numpy", l1),
    "l2": ("skimage", l2),
    "rmse": ("skimage", lambda a, b: math.sqrt(l2(a, b))),
    "nrmse": ("skimage", nrmse),
    "vrmse": ("skimage", vrmse),
    "psnr": ("skimage", psnr),
    "correlation": ("scipy", correlation),
    "cosine": ("scipy", cosine),
    "ssim": ("skimage", ssim),
    "ssim-gaussian": ("skimage", ssim_gaussian),
    "ms-ssim": ("pytorch-msssim", ms_ssim),
    "gmsd": ("scipy", gmsd),
    "gradient": ("numpy", gradient),
    "vi": ("skimage", vi),
    "mutual-information": ("numpy", mutual_information),
    "nmi": ("skimage", nmi),
    "spectral": ("scipy", spectral),
    "fft": ("scipy", fft),
    "wasserstein": ("scipy", wasserstein),
}
"""By metric: whose the reference is, and the reference. Frames come in double precision."""

IN_SINGLE = {"ms-ssim": ms_ssim}
"""References that are faster in single precision, which is what people use them in, and less right."""


def transform(frames: np.ndarray, pairs: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The published preprocessing: both frames of every pair resized by SciPy, then normalised together.

    Parameters
    ----------
    frames : ndarray of shape (n, y, x, channel)
    pairs : ndarray of shape (pair, 2)
    size : int
    """
    _, y, x, _ = frames.shape
    zoom = (1, size / y, size / x, 1)
    left, right = (scipy.ndimage.zoom(frames[side], zoom, order=0) for side in pairs.T)
    lo = np.minimum(left.min(axis=(0, 1, 2)), right.min(axis=(0, 1, 2)))
    hi = np.maximum(left.max(axis=(0, 1, 2)), right.max(axis=(0, 1, 2)))
    return 255 * ((left - lo) / (hi - lo)), 255 * ((right - lo) / (hi - lo))


class PairNetwork:
    """LSiM as published, at 224²: both frames through the network, normalised features, weighted squares."""

    def __init__(self, file: Path, trunk_class: type[LsimTrunk] | type[SkipTrunk]) -> None:
        checkpoint = load_checkpoint(file, trunk_class)
        self.trunk = trunk_class().eval().requires_grad_(False)
        self.trunk.load_state_dict(checkpoint.trunk)
        self.heads = [weight.clamp(min=0)[None, :, None, None] for weight in checkpoint.channel_weights]
        parts = zip(checkpoint.deviation_squares, checkpoint.counts, strict=True)
        sizes = [m.shape[2:] for m in self.trunk(torch.zeros(1, 3, SIZE, SIZE))]
        self.deviations = [
            (
                F.interpolate(squares[None, None], size, mode="bilinear", align_corners=True)[0, 0]
                / (count - 1)
            ).sqrt()
            for (squares, count), size in zip(parts, sizes, strict=True)
        ]
        # The published code takes off the mean of the training data, which cancels: the work is the same.
        self.means = [torch.zeros_like(deviation) for deviation in self.deviations]

    def features(self, frame: np.ndarray) -> list[Tensor]:
        maps = self.trunk(torch.from_numpy(frame.astype(np.float32)).permute(2, 0, 1)[None].contiguous())
        return [
            (f - mean) / (deviation + 1e-10) / (math.sqrt(f.shape[1]) - 1)
            for f, mean, deviation in zip(maps, self.means, self.deviations, strict=True)
        ]

    def __call__(self, a: np.ndarray, b: np.ndarray) -> float:
        with torch.no_grad():
            parts = zip(self.features(a), self.features(b), self.heads, strict=True)
            total = sum(F.conv2d((x - y) ** 2, head).mean(dim=(2, 3)) for x, y, head in parts)
            return float(torch.sqrt(torch.as_tensor(total)))


def one_pair_at_a_time(metric: Metric) -> Reference:
    """The metric itself, each pair from its two frames: for those that nobody else computes here."""

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        frames = (torch.from_numpy(f.astype(np.float32))[None].to(metric.device) for f in (a, b))
        with torch.no_grad():
            return float(metric.compare(*(metric.embed(frame) for frame in frames)))

    return distance
