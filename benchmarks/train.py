"""Time a training step: features once a frame (``augment="sequence"``) against once a pair (``"pair"``).

The second is as published. A step reads a sequence of 11 frames from memory, augments it, computes its loss
and gradient, and moves the weights. The forms are taken in turn in this process, on the same threads. Between
both stands a third, which is not in the package: features once a frame, but dropout drawn anew for every
pair, as published. Where nothing is random all must have the same loss.

    python benchmarks/train.py [--json] [--repeats 7] [--threads 1] [--size 224]
                               [--precision float32|bfloat16]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from common import FRAMES, PAIRS, SIDE, Stopwatch, make_sequence, processor
from threadpoolctl import threadpool_limits
from torch import Tensor

from lsim.training import Augmentation, TrainingSequence, TrainingSettings
from lsim.training.examples import make_example, planes
from lsim.training.loss import sequence_loss
from lsim.training.network import DistanceNetwork
from lsim.training.train import batch_losses, make_network

EXPECTED = 5.0
"""Ratio of the step of pairs to that of sequences that this project means to reach."""
AGREEMENT = 1e-4
"""Relative deviation allowed between the losses; Gram matrices are less exact than differences."""
DEVICE = torch.device("cpu")
FORMS = ("sequence", "sequence, dropout a pair", "pair")


class OneSequence:
    """A source of one sequence, in memory."""

    def __init__(self, frames: np.ndarray) -> None:
        self.names = ["waves/waves.height"]
        self._sequence = TrainingSequence(self.names[0], frames, np.linspace(0, 1, len(frames)))

    def read(self, index: int) -> TrainingSequence:
        """The sequence."""
        return self._sequence


def dropout_a_pair(
    network: DistanceNetwork, source: OneSequence, settings: TrainingSettings, epoch: int
) -> Tensor:
    """Loss with features once a frame, and differences and dropout for each pair."""
    example = make_example(source, 0, epoch, settings)
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bfloat16"):
        features = network.features(planes(example.frames, DEVICE))
    first, second = torch.from_numpy(example.pairs)
    distances = network.pair_distances(
        [f[first] for f in features],
        [f[second] for f in features],
        settings.dropout,
        torch.Generator().manual_seed(epoch),
    )
    return sequence_loss(distances, torch.from_numpy(example.ground_truth), first == 0).total


def in_package(
    network: DistanceNetwork, source: OneSequence, settings: TrainingSettings, epoch: int
) -> Tensor:
    """Loss as training takes it."""
    example = make_example(source, 0, epoch, settings)
    return batch_losses(network, [example], settings, DEVICE, epoch)[0, 0]


def losses_of_forms(settings: TrainingSettings) -> dict[str, Callable[..., Tensor]]:
    """Loss of each form, as a function of network, source and epoch."""
    pair = replace(settings, augment="pair")
    return {
        "sequence": lambda *arguments: in_package(*arguments[:2], settings, arguments[2]),
        "sequence, dropout a pair": lambda *arguments: dropout_a_pair(*arguments[:2], settings, arguments[2]),
        "pair": lambda *arguments: in_package(*arguments[:2], pair, arguments[2]),
    }


def deviation_of_forms(network: Any, source: OneSequence, settings: TrainingSettings) -> float:
    """Largest relative deviation of the forms' losses from one another, without randomness."""
    plain = Augmentation(size=SIDE, margin=1, flip=False, turn=False, shuffle_channels=False)
    losses = losses_of_forms(replace(settings, augmentation=plain, dropout=0.0, precision="float32"))
    with torch.no_grad():
        values = {form: float(loss(network, source, 0)) for form, loss in losses.items()}
    return max(abs(value / values["pair"] - 1) for value in values.values())


def time_forms(network: Any, source: OneSequence, settings: TrainingSettings, repeats: int) -> Stopwatch:
    """Time steps of all forms in turn, and the reading and augmenting in them."""
    optimiser = torch.optim.Adam(network.parameters(), settings.learning_rate)
    forms = losses_of_forms(settings)

    def step(form: str, epoch: int) -> None:
        optimiser.zero_grad()
        forms[form](network, source, epoch).backward()
        optimiser.step()
        network.clamp_weights()

    watch = Stopwatch()
    for repeat in range(repeats + 1):
        if repeat == 1:  # the first one fills caches
            watch = Stopwatch()
        for form in FORMS:
            watch.time((form,), step, form, repeat)
            augment = "pair" if form == "pair" else "sequence"
            watch.time((form, "data"), make_example, source, 0, repeat, replace(settings, augment=augment))
    return watch


def measure(repeats: int, threads: int, size: int, precision: Any) -> dict[str, Any]:
    """All timings of one run, as JSON."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    source = OneSequence(make_sequence())
    settings = TrainingSettings(
        precision=precision, augmentation=Augmentation(size=size), validation_size=size, device="cpu"
    )
    network = make_network(settings).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    frames = make_example(source, 0, 0, settings).frames
    network.calibrate([planes(frames, DEVICE)])
    deviation = deviation_of_forms(network, source, settings)
    watch = time_forms(network, source, settings, repeats)
    rows = [
        {
            "form": form,
            "seconds_a_step": watch.summary(form),
            "seconds_reading_and_augmenting": watch.summary(form, "data"),
            "ratio_to_sequence": watch.minimum(form) / watch.minimum("sequence"),
            "ratio_of_medians": watch.summary(form)["median"] / watch.summary("sequence")["median"],
        }
        for form in FORMS
    ]
    return {
        "sequence": [FRAMES, SIDE, SIDE, 3],
        "crop": size,
        "pairs": len(PAIRS),
        "precision": precision,
        "repeats": repeats,
        "threads": threads,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "expected_ratio": EXPECTED,
        "maximum_relative_deviation": deviation,
        "agrees": deviation <= AGREEMENT,
        "forms": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The same for people."""
    lines = [
        f"a step of one sequence {'×'.join(map(str, result['sequence']))}, crops of {result['crop']}, "
        f"{result['precision']}, {result['threads']} threads, minima of {result['repeats']} repeats, "
        f"machine's load {result['machine']['load']:.1f}",
        f"losses without randomness agree to {result['maximum_relative_deviation']:.1e}",
        "",
        f"{'features and dropout':<26} {'step':>9} {'of it data':>10} {'ratio':>6} {'of medians':>10} "
        f"{'expected':>8}",
    ]
    for row in result["forms"]:
        target = f"≥ {result['expected_ratio']:.0f}" if row["form"] == "pair" else ""
        short = "  short of it" if target and row["ratio_to_sequence"] < result["expected_ratio"] else ""
        lines.append(
            f"{row['form']:<26} {1e3 * row['seconds_a_step']['minimum']:>6.0f} ms "
            f"{1e3 * row['seconds_reading_and_augmenting']['minimum']:>7.0f} ms "
            f"{row['ratio_to_sequence']:>6.1f} {row['ratio_of_medians']:>10.1f} {target:>8}{short}"
        )
    return "\n".join(lines)


def main() -> int:
    """0 when the forms agree, else 1; how fast they are does not change it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=224, help="side of the crops")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    with threadpool_limits(limits=options.threads):
        result = measure(options.repeats, options.threads, options.size, options.precision)
    print(json.dumps(result, indent=2) if options.json else table(result))
    return 0 if result["agrees"] else 1


if __name__ == "__main__":
    sys.exit(main())
