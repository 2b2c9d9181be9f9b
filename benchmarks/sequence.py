"""Time all 55 distances of an 11-frame sequence: this project against evaluating pair by pair.

The baseline is what the published evaluation does, plainly written: two stacks with the frames of every
pair, resized by scipy and normalised together, then for every pair two passes of the network with the
authors' arithmetic, or one call of scikit-image. Both run in this process, on the same threads, their
repeats taken in turn, and have to agree. Weights are those that ``$LSIM_WEIGHTS`` (or ``$LSIM_SHARED``)
holds, else random ones of the same shape: times are the same.

    python benchmarks/sequence.py [--json] [--repeats 7] [--threads 2] [--compat published|default]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage
import torch
from skimage.metrics import (
    mean_squared_error,
    peak_signal_noise_ratio,
    structural_similarity,
    variation_of_information,
)
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import lsim
from lsim.metric import Metric
from lsim.metrics.learned import LSiM
from lsim.networks import LsimTrunk, SkipTrunk
from lsim.testing import write_random_checkpoint
from lsim.weights import WeightsError, find_weights

FRAMES, SIDE, SIZE = 11, 256, 224
PAIRS = list(itertools.combinations(range(FRAMES), 2))
LEARNED: dict[str, type[LsimTrunk] | type[SkipTrunk]] = {"lsim": LsimTrunk, "lsim-skip": SkipTrunk}
EXPECTED = {"lsim": 8.0, "l2": 10.0, "psnr": 10.0, "ssim": 10.0, "vi": 5.0}
"""Ratios that this project means to reach, without preprocessing."""
AGREEMENT = {"lsim": 1e-5, "lsim-skip": 1e-5}
"""Relative deviation allowed between both; 1e-6 for the others."""


def make_sequence(seed: int = 0) -> np.ndarray:
    """Drifting waves with a little noise: (11, 256, 256, 3) float32, far outside of [0, 255]."""
    rng = np.random.default_rng(seed)
    y, x = np.indices((SIDE, SIDE)) * (2 * np.pi / SIDE)
    frames = np.zeros((FRAMES, SIDE, SIDE, 3), np.float32)
    for channel in range(3):
        for waves in (1, 2, 5, 9):
            phase, angle = rng.uniform(0, 2 * np.pi, 2)
            along = waves * (x * math.cos(angle) + y * math.sin(angle))
            for k in range(FRAMES):
                frames[k, ..., channel] += 700 / waves * np.sin(along + phase + 0.12 * k * waves)
    return frames + rng.normal(0, 10, frames.shape).astype(np.float32)


# --- the baseline: pair by pair ---------------------------------------------------------------------------


def transform(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both frames of every pair, resized by scipy, minimum and maximum per channel over all to [0, 255]."""
    _, y, x, _ = frames.shape
    zoom = (1, SIZE / y, SIZE / x, 1)
    left, right = (scipy.ndimage.zoom(frames[list(side)], zoom, order=0) for side in zip(*PAIRS, strict=True))
    lo = np.minimum(left.min(axis=(0, 1, 2)), right.min(axis=(0, 1, 2)))
    hi = np.maximum(left.max(axis=(0, 1, 2)), right.max(axis=(0, 1, 2)))
    return 255 * ((left - lo) / (hi - lo)), 255 * ((right - lo) / (hi - lo))


class PairNetwork:
    """LSiM as published: both frames through the network, normalised features, weighted squares."""

    def __init__(self, file: Path, trunk_class: type[LsimTrunk] | type[SkipTrunk]) -> None:
        raw = torch.load(file, weights_only=True, map_location="cpu")
        state, layers = raw["stateDict"], trunk_class.CHECKPOINT_KEYS.items()
        self.trunk = trunk_class().eval().requires_grad_(False)
        self.trunk.load_state_dict(
            {f"{own}.{kind}": state[f"{key}.{kind}"] for own, key in layers for kind in ("weight", "bias")}
        )
        self.heads = [state[f"lin{k}.1.weight"].clamp(min=0) for k in range(len(trunk_class.CHANNELS))]
        self.means = raw["normAcc"]
        self.deviations = [
            (m2 / (count - 1)).sqrt() for m2, count in zip(raw["normM2"], raw["normCount"], strict=True)
        ]

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


def vi(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean(variation_of_information(a.reshape(-1, 1), b.reshape(-1, 1))))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    return float(1 - structural_similarity(a, b, data_range=255, channel_axis=-1))


BY_SCIKIT_IMAGE: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "l2": lambda a, b: float(mean_squared_error(a, b) / 255**2),
    "psnr": lambda a, b: float(-peak_signal_noise_ratio(a, b, data_range=255)),
    "ssim": ssim,
    "vi": vi,
}


def pair_by_pair(
    distance: Callable[[np.ndarray, np.ndarray], float],
    stacks: tuple[np.ndarray, np.ndarray],
    in_8bit: bool,
) -> np.ndarray:
    """Distances of all pairs, each by itself; ``in_8bit`` truncates both stacks, as published."""
    if in_8bit:
        stacks = stacks[0].astype(np.uint8), stacks[1].astype(np.uint8)
    return np.array([distance(a, b) for a, b in zip(*stacks, strict=True)])


# --- measuring --------------------------------------------------------------------------------------------


class Stopwatch:
    """Collects the seconds of repeated calls by name."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, ...], list[float]] = {}

    def time(self, name: tuple[str, ...], call: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        result = call(*arguments)
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def minimum(self, *name: str) -> float:
        return min(self.seconds[name])

    def summary(self, *name: str) -> dict[str, float]:
        return {"minimum": min(self.seconds[name]), "median": statistics.median(self.seconds[name])}


def flops_per_frame(metric: LSiM) -> int:
    """Multiplications and additions of the network for one frame."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        metric.features(torch.zeros(1, 3, SIZE, SIZE))
    return int(counter.get_total_flops())


def weights_for(name: str, folder: Path) -> tuple[Path, str]:
    """The published weights, or random ones; and which of them."""
    try:
        return find_weights(name), "published"
    except WeightsError:
        return write_random_checkpoint(folder / f"random-{name}.pth", LEARNED[name]), "random"


def measure(repeats: int, threads: int, compat: str) -> dict[str, Any]:
    """All timings of one run, as JSON."""
    torch.set_num_threads(threads)
    metrics: dict[str, Metric] = {}
    baselines: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {}
    weights: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, trunk_class in LEARNED.items():
            file, weights[name] = weights_for(name, Path(folder))
            metrics[name] = lsim.load_metric(name, file, "cpu", SIZE, compat=compat)  # type: ignore[arg-type]
            baselines[name] = PairNetwork(file, trunk_class)
    for name, baseline in BY_SCIKIT_IMAGE.items():
        metrics[name] = lsim.load_metric(name, device="cpu", size=SIZE, compat=compat)  # type: ignore[arg-type]
        baselines[name] = baseline

    frames = make_sequence()
    watch = Stopwatch()
    deviation = dict.fromkeys(metrics, 0.0)
    left, right = torch.rand(2, 1536, 1536)
    flops = {name: flops_per_frame(metric) for name, metric in metrics.items() if isinstance(metric, LSiM)}
    above = tuple(np.transpose(PAIRS))
    for repeat in range(repeats + 1):
        if repeat == 1:  # the first one compiles kernels and fills caches
            watch = Stopwatch()
        watch.time(("gemm",), torch.mm, left, right)
        transformed = watch.time(("preprocessing", "baseline"), transform, frames)
        for name, metric in metrics.items():
            in_8bit = metric.quantised
            expected = watch.time((name, "baseline"), pair_by_pair, baselines[name], transformed, in_8bit)
            prepared = watch.time(("preprocessing", "here"), metric.prepare, frames, "sequence")
            matrix = watch.time((name, "here"), metric.all_pairs, prepared)
            if isinstance(metric, LSiM):
                with torch.no_grad():
                    watch.time((name, "embedding"), metric.embed, prepared.values)
            found = matrix[above]
            deviation[name] = max(deviation[name], float(np.max(np.abs(found / expected - 1))))

    gemm = 2 * left.shape[0] ** 3 / watch.minimum("gemm")
    preparing = {side: watch.minimum("preprocessing", side) for side in ("baseline", "here")}
    rows = []
    for name in metrics:
        there, here = watch.minimum(name, "baseline"), watch.minimum(name, "here")
        row: dict[str, Any] = {
            "metric": name,
            "seconds": {side: watch.summary(name, side) for side in ("baseline", "here")},
            "seconds_with_preprocessing": {
                "baseline": there + preparing["baseline"],
                "here": here + preparing["here"],
            },
            "pairs_per_second": {"baseline": len(PAIRS) / there, "here": len(PAIRS) / here},
            "ratio": there / here,
            "ratio_of_medians": statistics.median(watch.seconds[name, "baseline"])
            / statistics.median(watch.seconds[name, "here"]),
            "ratio_with_preprocessing": (there + preparing["baseline"]) / (here + preparing["here"]),
            "expected_ratio": EXPECTED.get(name),
            "maximum_relative_deviation": deviation[name],
            "agrees": deviation[name] <= AGREEMENT.get(name, 1e-6),
        }
        if name in flops:
            rate = FRAMES * flops[name] / watch.minimum(name, "embedding")
            row["network"] = {
                "weights": weights[name],
                "mflop_per_frame": flops[name] / 1e6,
                "embedding_seconds": watch.summary(name, "embedding"),
                "gflops": rate / 1e9,
                "share_of_gemm": rate / gemm,
            }
        rows.append(row)
    return {
        "sequence": [FRAMES, SIDE, SIDE, 3],
        "pairs": len(PAIRS),
        "repeats": repeats,
        "threads": threads,
        "compat": compat,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scikit-image": version("scikit-image"),
        },
        "gemm_gflops": gemm / 1e9,
        "preprocessing_seconds": {
            side: watch.summary("preprocessing", side) for side in ("baseline", "here")
        },
        "metrics": rows,
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def table(result: dict[str, Any]) -> str:
    """The same for people."""
    preprocessing = result["preprocessing_seconds"]
    lines = [
        f"{result['pairs']} pairs of {'×'.join(map(str, result['sequence']))}, {result['threads']} threads, "
        f"compat={result['compat']}, minima of {result['repeats']} repeats, "
        f"machine's load {result['machine']['load']:.1f}",
        f"preprocessing {1e3 * preprocessing['baseline']['minimum']:.0f} ms pair by pair, "
        f"{1e3 * preprocessing['here']['minimum']:.1f} ms here; GEMM {result['gemm_gflops']:.0f} GFLOP/s",
        "",
        f"{'metric':<10} {'by pair':>9} {'here':>9} {'pairs/s':>8} {'ratio':>6} {'of medians':>10} "
        f"{'with prep.':>10} {'expected':>8} {'deviation':>9}",
    ]
    for row in result["metrics"]:
        seconds = row["seconds"]
        expected = row["expected_ratio"]
        short = "" if not expected or row["ratio"] >= expected else "  short of it"
        lines.append(
            f"{row['metric']:<10} {1e3 * seconds['baseline']['minimum']:>6.1f} ms "
            f"{1e3 * seconds['here']['minimum']:>6.2f} ms {row['pairs_per_second']['here']:>8.0f} "
            f"{row['ratio']:>6.1f} {row['ratio_of_medians']:>10.1f} {row['ratio_with_preprocessing']:>10.1f} "
            f"{f'≥ {expected:.0f}' if expected else '':>8} {row['maximum_relative_deviation']:>9.1e}{short}"
        )
    for row in result["metrics"]:
        if network := row.get("network"):
            lines.append(
                f"{row['metric']}: {network['mflop_per_frame']:.0f} MFLOP a frame, "
                f"{1e3 * network['embedding_seconds']['minimum'] / FRAMES:.2f} ms, {network['gflops']:.0f} "
                f"GFLOP/s = {network['share_of_gemm']:.0%} of GEMM; {network['weights']} weights"
            )
    return "\n".join(lines)


def main() -> int:
    """0 when both agree, else 1; how fast it is does not change it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compat", choices=["published", "default"], default="published")
    options = parser.parse_args()
    if "LSIM_WEIGHTS" not in os.environ and "LSIM_SHARED" in os.environ:
        os.environ["LSIM_WEIGHTS"] = str(Path(os.environ["LSIM_SHARED"]) / "reference" / "weights")
    with warnings.catch_warnings(), threadpool_limits(limits=options.threads):
        warnings.simplefilter("ignore", lsim.SizeWarning)
        result = measure(options.repeats, options.threads, options.compat)
    print(json.dumps(result, indent=2) if options.json else table(result))
    wrong = [row["metric"] for row in result["metrics"] if not row["agrees"]]
    if wrong:
        print(f"deviates from pair by pair: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
