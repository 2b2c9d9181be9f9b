"""Train an autoencoder of plume frames by the mean squared error alone, and with a learned metric besides.

An experiment after Kohl, Um, Thuerey: Learning Similarity Metrics for Numerical Simulations, ICML 2020. The
code holds a quarter of the numbers of a frame. Both networks begin with the same weights, see the same
frames in the same order, and are then judged on simulations that neither has seen, by metrics that neither
was trained with.

    python examples/autoencoder.py --out autoencoder.png
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import lsim
from lsim.loss import SimulationLoss
from lsim.metrics.learned import LSiM
from lsim.simulate import simulate_families

RECIPE, FIELD, FIELD_RANGE = "smoke", "density", (0.0, 1.0)
BATCH, LEARNING_RATE = 8, 2e-3
OF_SQUARED_ERROR = ("l2", "rmse", "nrmse", "vrmse", "psnr")
CODE_CHANNELS = 4
SHOWN = 3

Loss = Callable[[Tensor, Tensor], Tensor]


class Autoencoder(nn.Module):
    """Frames (batch, 1, y, x) through a code (batch, 4, y/4, x/4): a quarter of their numbers."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(1, width, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(2 * width, CODE_CHANNELS, 3, padding=1),
        )
        self.decode = nn.Sequential(
            nn.Conv2d(CODE_CHANNELS, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1),
        )

    def forward(self, frames: Tensor) -> Tensor:
        decoded: Tensor = self.decode(self.encode(frames))
        return decoded


@dataclass(frozen=True)
class Judgement:
    """What one metric says of the held-out frames: mean distances from the originals, by training.

    ``families_better`` counts the held-out families in which the second training is closer; frames of one
    family resemble each other.
    """

    metric: str
    trained_on: str
    squared_error: float
    with_metric: float
    families_better: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiment; see ``--help``."""
    options = parse(arguments)
    start = time.perf_counter()
    metric = lsim.load_metric(options.metric, options.weights, "cpu", size=None)
    frames = plumes(options.families, options.size, options.seed)
    held_out = max(1, options.families // 4)
    training, unseen = frames[:-held_out].flatten(0, 1), frames[-held_out:]
    print(
        f"{options.families} simulated families at {options.size}×{options.size}: {len(training)} frames to "
        f"train on, {unseen.shape[0] * unseen.shape[1]} of {held_out} families held out"
    )

    # Densities lie in [0, 1]: with a fixed range no gradient has to pass through minimum and maximum.
    distance = SimulationLoss(metric, normalisation=FIELD_RANGE)
    torch.manual_seed(options.seed)
    initial = Autoencoder()

    def with_metric(prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction, target) + options.weight * distance(prediction, target)

    losses: dict[str, Loss] = {"MSE": F.mse_loss, f"MSE + {options.metric}": with_metric}
    trained = {}
    for name, loss in losses.items():
        print(f"training by {name}")
        trained[name] = train(copy.deepcopy(initial), training, loss, options.epochs, options.seed)

    judgements = judge(unseen, *(reconstruct(network, unseen) for network in trained.values()), metric)
    print(table(judgements, list(trained), held_out))
    shown = [unseen[k % len(unseen), -1 - k // len(unseen)] for k in range(SHOWN)]
    shown += [image_frame(path) for path in options.images]
    draw(shown, trained, options.out)
    print(f"{options.out}, after {time.perf_counter() - start:.0f} s")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--metric", default="lsim-open", help="of the loss: a learned metric, or ssim")
    parser.add_argument("--weights", type=Path, help="file with its weights (default: the metric's own)")
    parser.add_argument("--weight", type=float, default=0.02, help="of the metric beside the MSE")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--families", type=int, default=16, help="of 11 frames; a quarter is held out")
    parser.add_argument("--size", type=int, default=128, help="of the frames, a multiple of 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="grey images to show as well")
    parser.add_argument("--out", type=Path, default=Path("autoencoder.png"))
    options = parser.parse_args(arguments)
    if options.families < 2 or options.epochs < 1:
        parser.error("needs two families, one of them to hold out, and an epoch")
    if options.size % 4:
        parser.error(f"--size must be a multiple of 4, got {options.size}")
    return options


def plumes(families: int, size: int, seed: int) -> Tensor:
    """Simulated densities: (family, frame, 1, y, x)."""
    frames = simulate_families(RECIPE, families, size, seed).frames[FIELD]
    return torch.from_numpy(frames).permute(0, 1, 4, 2, 3).contiguous()


def train(network: Autoencoder, frames: Tensor, loss: Loss, epochs: int, seed: int) -> Autoencoder:
    """Train on frames (n, 1, y, x), mirrored at random; the same order for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    steps = epochs * math.ceil(len(frames) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(frames), generator=generator).split(BATCH):
            mirrored = torch.rand(len(chosen), 1, 1, 1, generator=generator) < 0.5
            batch = torch.where(mirrored, frames[chosen].flip(-1), frames[chosen])
            value = loss(network(batch), batch)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            schedule.step()
            total += value.item() * len(chosen)
        if epoch + 1 in (1, epochs) or (epoch + 1) % 5 == 0:
            print(f"  epoch {epoch + 1} of {epochs}: loss {total / len(frames):.5f}")
    return network


@torch.no_grad()
def reconstruct(network: Autoencoder, frames: Tensor) -> Tensor:
    """Frames (…, 1, y, x) as the network gives them back."""
    return network(frames.flatten(0, -4)).unflatten(0, frames.shape[:-3])


def judge(
    original: Tensor, squared_error: Tensor, with_metric: Tensor, trained_on: lsim.Metric
) -> list[Judgement]:
    """Distances of two reconstructions (family, frame, 1, y, x).

    By the metric of the second training, with the weights that it had there, and by all others that are here
    and take frames of this size.
    """
    side = min(original.shape[-2:])
    names = [
        listed.name
        for listed in lsim.describe_metrics()
        if not listed.unavailable and listed.info.minimum_size <= side
    ]
    judgements = []
    for name in dict.fromkeys([*names, trained_on.name]):
        metric = trained_on if name == trained_on.name else lsim.load_metric(name, device="cpu", size=None)
        by_family = [
            distances(metric, original, reconstruction).mean(axis=1)
            for reconstruction in (squared_error, with_metric)
        ]
        means = [float(values.mean()) for values in by_family]
        better = int((by_family[1] < by_family[0]).sum())
        judgements.append(Judgement(name, seen_in_training(metric, trained_on), *means, better))
    return judgements


def distances(metric: lsim.Metric, original: Tensor, other: Tensor) -> np.ndarray:
    """(family, frame) distances of frames (family, frame, 1, y, x) with a common range."""
    first, second = (x.flatten(0, 1).permute(0, 2, 3, 1).numpy() for x in (original, other))
    return metric.distance(first, second, scope=FIELD_RANGE).reshape(original.shape[:2])


def seen_in_training(metric: lsim.Metric, trained_on: lsim.Metric) -> str:
    """What a metric has to do with the two losses, if anything."""
    if metric.name in OF_SQUARED_ERROR:
        return "both, as MSE"
    if metric is trained_on:
        return "the second"
    if isinstance(metric, LSiM) and isinstance(trained_on, LSiM):
        return "a relative of it"
    return ""


def table(judgements: Sequence[Judgement], names: Sequence[str], families: int) -> str:
    """The judgements for people, and the verdict of the metrics that neither was trained on."""
    first, second = names
    width = max(len(second), 12)
    lines = [
        "",
        f"mean distance of {families} held-out families from their originals; lower is better",
        f"{'metric':<18} {first:>{width}} {second:>{width}}  closer             trained on by",
    ]
    for j in judgements:
        closer = second if j.with_metric < j.squared_error else first
        count = j.families_better if closer == second else families - j.families_better
        lines.append(
            f"{j.metric:<18} {j.squared_error:>{width}.6g} {j.with_metric:>{width}.6g}  "
            f"{closer:<{width}} in {count} of {families}  {j.trained_on}"
        )
    others = [j for j in judgements if not j.trained_on]
    by = {
        name: [j.metric for j in others if (j.with_metric < j.squared_error) == (name == second)]
        for name in names
    }
    verdict = "; ".join(
        f"{name} is better by {', '.join(metrics)}" for name, metrics in by.items() if metrics
    )
    return "\n".join([*lines, f"By metrics that neither was trained on: {verdict}.", ""])


def image_frame(path: Path) -> Tensor:
    """A grey image as a frame (1, y, x) in [0, 1], cut to multiples of four."""
    grey = np.asarray(Image.open(path).convert("L"), dtype=np.float32) / 255
    y, x = (length - length % 4 for length in grey.shape)
    return torch.from_numpy(grey[None, :y, :x].copy())


def draw(frames: Sequence[Tensor], trained: dict[str, Autoencoder], out: Path) -> None:
    """A row a frame: the original, the reconstructions, and where these differ from it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 1 + 2 * len(trained)
    figure, axes = plt.subplots(
        len(frames), columns, figsize=(2.4 * columns, 2.5 * len(frames)), layout="constrained", squeeze=False
    )
    lo, hi = FIELD_RANGE
    for row, frame in zip(axes, frames, strict=True):
        row[0].imshow(frame[0], cmap="gray", vmin=lo, vmax=hi)
        row[0].set_title("original")
        for k, (name, network) in enumerate(trained.items()):
            other = reconstruct(network, frame[None])[0]
            row[1 + k].imshow(other[0], cmap="gray", vmin=lo, vmax=hi)
            row[1 + k].set_title(name)
            row[1 + len(trained) + k].imshow((other - frame)[0], cmap="RdBu_r", vmin=-0.3, vmax=0.3)
            row[1 + len(trained) + k].set_title(f"{name}\nminus original, ±0.3")
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(out, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
