"""Every metric, all pairs: against its pair-by-pair reference, and against what the machine can do.

For sequences of 11 and 128 frames of 224²×3 and ×1, one core: pairs per second here; pairs per second of the
reference (benchmarks/references.py), on a sample of the same pairs; and the share of the machine's limit,
the time that its arithmetic takes at the measured rate of a single-precision matrix product,
or its frames at the measured memory bandwidth, whichever is more. Both have to agree on the distances.

Then LSiM with the published preprocessing, and the whole registry on sequences in a store, end to end: the
share of time in reading, preprocessing, each metric and writing.

    python benchmarks/metrics.py [--json] [--metrics ssim,l2] [--seconds 2] [--device auto] [--sequences 64]
    python benchmarks/metrics.py --overhead [--json] [--metrics ssim,l2] [--seconds 2]

The second measures what checks of claims, and bounds on rounding, take besides embedding and comparing.

Weights are those in $LSIM_WEIGHTS, else random ones of the same shape: times are the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import processor
from references import BY_LIBRARY, IN_SINGLE, SIZE, PairNetwork, Reference, one_pair_at_a_time, transform
from threadpoolctl import threadpool_limits
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lsim
from lsim.metric import Metric, resolve_device
from lsim.networks import LsimTrunk, SkipTrunk
from lsim.prepared import Prepared
from lsim.registry import why_unavailable
from lsim.testing import write_random_checkpoint
from lsim.weights import WeightsError, find_weights

SIDE = 256
CASES = tuple(itertools.product((11, 128), (3, 1)))
LEARNED: dict[str, type[LsimTrunk] | type[SkipTrunk]] = {
    **dict.fromkeys(("lsim-open", "lsim", "lsim-noiseless", "lsim-strong-noise"), LsimTrunk),
    "lsim-skip": SkipTrunk,
}
LONGEST = 60.0
"""Seconds: what would take longer is not run at 128 frames; its rate is that of 11."""

EXPECTED_RATIO = {"ssim": 25.0, "ms-ssim": 100.0, "vi": 40.0}
"""At 11 frames of three channels, against the reference."""
EXPECTED_SHARE = {"l2": 0.7}
"""At 128 frames of three channels, of the machine's limit."""
EXPECTED_WITH_PREPROCESSING = {11: 15.0, 128: 120.0}
EXPECTED_OF_NETWORKS = 0.9
AGREEMENT = 1e-5
"""Relative deviation allowed from a reference.

Twice that where both sides are networks in single precision: each is up to 8e-6 from double precision on
neighbours among 128 frames, and 3e-7 on frames that are far apart.
"""
LARGEST_STAGE = 0.15
"""What anything but the metrics may take of a run."""

PAIR_OPERATIONS: dict[str, float] = {
    **dict.fromkeys(("l1", "l2", "rmse", "nrmse", "vrmse", "psnr", "correlation", "cosine"), 2.0),
    "ssim": 45.0,
    "ssim-gaussian": 90.0,
    "ms-ssim": 120.0,
    "gmsd": 8.0,
    "gradient": 4.0,
    "fft": 1.0,
    "wasserstein": 2.0,
}
"""Operations a value of a frame and pair, as the formulas are written; a product and a sum count as two.

Metrics that are not here do not compute with the frame's values (histograms, spectra by radius, projections),
compute in an embedding, or in somebody else's code: they have no such limit, or another.
"""


def make_frames(n: int, channels: int, seed: int = 0) -> np.ndarray:
    """Drifting waves with a little noise, far outside of [0, 255]: (n, 256, 256, channels) float32."""
    rng = np.random.default_rng(seed)
    y, x = np.indices((SIDE, SIDE)) * (2 * np.pi / SIDE)
    frames = np.zeros((n, SIDE, SIDE, channels), np.float32)
    for channel in range(channels):
        for waves in (1, 2, 5, 9):
            phase, angle = rng.uniform(0, 2 * np.pi, 2)
            wave_phase = waves * (x * np.cos(angle) + y * np.sin(angle))
            for k in range(n):
                frames[k, ..., channel] += 700 / waves * np.sin(wave_phase + phase + 1.3 * k / n * waves)
    return frames + rng.normal(0, 10, frames.shape).astype(np.float32)


class Clock:
    """CPU time of this process on the CPU; wall time, with all work done, on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()

    def fastest(self, call: Callable[[], Any], seconds: float, minimum: int = 2) -> float:
        """The shortest of as many calls as fit into so many seconds."""
        best, spent = np.inf, 0.0
        while minimum > 0 or spent < seconds:
            start = self()
            call()
            duration = self() - start
            best, spent, minimum = min(best, duration), spent + duration, minimum - 1
        return float(best)


def machine_limits(clock: Clock) -> dict[str, float]:
    """Rate of a single-precision matrix product, and bandwidth of a copy, on the device."""
    left, right = torch.rand(2, 2048, 2048, device=clock.device)
    source = torch.rand(1 << 26, device=clock.device)
    target = torch.empty_like(source)
    return {
        "gemm_flops": 2 * 2048**3 / clock.fastest(lambda: torch.mm(left, right), 1.0, 3),
        "bytes": 2 * source.nbytes / clock.fastest(lambda: target.copy_(source), 1.0, 3),
    }


def load_metrics(names: list[str], device: str, folder: Path) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics that load here, with random weights where there are none; the others, and why not."""
    metrics, absent = {}, {}
    for name in names:
        try:
            metrics[name] = lsim.load_metric(name, _weights(name, folder), device)
        except (WeightsError, ImportError, ValueError) as error:
            absent[name] = why_unavailable(name) or str(error)
    return metrics, absent


def _weights(name: str, folder: Path) -> Path | None:
    if name not in LEARNED:
        return None
    try:
        return find_weights(name)
    except WeightsError:
        return write_random_checkpoint(folder / f"random-{name}.pth", LEARNED[name])


def references(metrics: dict[str, Metric], folder: Path) -> dict[str, tuple[str, Reference]]:
    """By name, what each metric is compared with: whose it is, and the function."""
    functions = {name: BY_LIBRARY[name] for name in metrics if name in BY_LIBRARY}
    for name, metric in metrics.items():
        file = _weights(name, folder)
        if file is not None:
            functions[name] = ("two passes a pair", PairNetwork(file, LEARNED[name]))
        elif name not in functions:
            functions[name] = ("itself, pair by pair", one_pair_at_a_time(metric))
    return functions


def sample(reference: Reference, frames: np.ndarray, seconds: float) -> tuple[float, dict[Any, float]]:
    """Seconds a pair of the reference, and its distances, of as many pairs as fit into the time."""
    pairs = list(itertools.combinations(range(len(frames)), 2))
    order = np.random.default_rng(1).permutation(len(pairs))
    reference(frames[0], frames[1])  # the first call fills caches
    distances, durations, spent = {}, [], 0.0
    for index in order:
        i, j = pairs[index]
        start = time.process_time()
        distances[i, j] = reference(frames[i], frames[j])
        durations.append(time.process_time() - start)
        spent += durations[-1]
        if spent > seconds and len(durations) >= 3:
            break
    return float(np.median(durations)), distances


def flops_per_frame(metric: Metric, channels: int) -> int:
    """Multiplications and additions of a network for one frame; 0 for metrics without one."""
    if not any(isinstance(part, nn.Module) for part in vars(metric).values()):
        return 0
    # Two, since a lone frame may be computed twice.
    frames = torch.zeros(2, SIZE, SIZE, channels, device=metric.device)
    if channels == 1 and not metric.info.one_channel_suffices:
        frames = frames.expand(-1, -1, -1, 3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        metric.embed(frames)
    return int(counter.get_total_flops()) // 2


def least_seconds(metric: Metric, prepared: Prepared, limits: dict[str, float]) -> float | None:
    """What the arithmetic, or the frames, take at the machine's limits; None where that is unknown."""
    n = len(prepared)
    pairs = n * (n - 1) / 2
    channels = prepared.values.shape[-1] if metric.info.one_channel_suffices else 3
    values = SIZE * SIZE * channels
    network = flops_per_frame(metric, prepared.values.shape[-1])
    if network:
        with torch.no_grad():
            first_frame = Prepared(prepared.values[:1], prepared.comparable[:1])
            embedded = metric.embed_prepared(first_frame).parts
        operations = n * network + pairs * 2 * sum(part[0].numel() for part in embedded.values())
    elif metric.name in PAIR_OPERATIONS:
        operations = pairs * PAIR_OPERATIONS[metric.name] * values
    else:
        return None
    return max(operations / limits["gemm_flops"], 4.0 * n * values / limits["bytes"])


def measure_metric(
    metric: Metric,
    reference: tuple[str, Reference],
    prepared: Prepared,
    seconds: float,
    clock: Clock,
    limits: dict[str, float],
) -> dict[str, Any]:
    """One line of the table."""
    n, channels = len(prepared), prepared.values.shape[-1]
    pairs = n * (n - 1) // 2

    def run() -> np.ndarray:
        return metric.all_pairs(Prepared(prepared.values, prepared.comparable))

    matrix = run()
    duration = clock.fastest(run, seconds)
    frames = prepared.frames(quantised=metric.quantised, one_channel=channels != 1).cpu().numpy()
    library, function = reference
    exact = frames.astype(np.float64)
    a_pair, distances = sample(function, exact, seconds)
    if metric.name in IN_SINGLE:
        library = f"{library}, single precision"
        a_pair, _ = sample(IN_SINGLE[metric.name], frames, seconds)
    deviations = {
        pair: abs(matrix[pair] - value) / max(abs(value), 1e-300) for pair, value in distances.items()
    }
    minimum = least_seconds(metric, prepared, limits)
    return {
        "metric": metric.name,
        "frames": n,
        "channels": channels,
        "seconds": duration,
        "pairs_per_second": pairs / duration,
        "reference": library,
        "reference_pairs_per_second": 1 / a_pair,
        "ratio": pairs * a_pair / duration,
        "share_of_limit": None if minimum is None else minimum / duration,
        "maximum_relative_deviation": max(deviations.values()),
    }


def measure_network(
    metric: Metric, prepared: Prepared, seconds: float, clock: Clock, gemm: float
) -> dict[str, Any]:
    """Rate of the network alone."""
    frames = prepared.frames(quantised=metric.quantised, one_channel=metric.info.one_channel_suffices)
    flops = flops_per_frame(metric, prepared.values.shape[-1])
    with torch.no_grad():
        metric.embed(frames)
        duration = clock.fastest(lambda: metric.embed(frames), seconds)
    rate = len(frames) * flops / duration
    return {
        "metric": metric.name,
        "frames": len(frames),
        "channels": prepared.values.shape[-1],
        "mflop_per_frame": flops / 1e6,
        "milliseconds_per_frame": 1e3 * duration / len(frames),
        "gflops": rate / 1e9,
        "share_of_gemm": rate / gemm,
    }


def with_preprocessing(
    metric: Metric, reference: Reference, n: int, seconds: float, clock: Clock
) -> dict[str, Any]:
    """From frames of 256²: the published way pair by pair, from a sample of its pairs, against ours."""
    frames = make_frames(n, 3)
    metric.pairwise(frames)
    metric_seconds = clock.fastest(lambda: metric.pairwise(frames), seconds)
    preparing = clock.fastest(lambda: metric.prepare(frames, "sequence"), seconds)
    pairs = np.array(list(itertools.combinations(range(n), 2)))
    subset = pairs[np.random.default_rng(2).permutation(len(pairs))[:20]]
    start = time.process_time()
    stacks = transform(frames, subset, SIZE)
    for a, b in zip(*stacks, strict=True):
        reference(a, b)
    reference_seconds = (time.process_time() - start) / len(subset) * len(pairs)
    return {
        "metric": metric.name,
        "frames": n,
        "seconds": metric_seconds,
        "preprocessing_milliseconds": 1e3 * preparing,
        "reference_seconds": reference_seconds,
        "reference_pairs_sampled": len(subset),
        "ratio": reference_seconds / metric_seconds,
        "expected_ratio": EXPECTED_WITH_PREPROCESSING[n],
    }


def write_frames(path: Path, sequences: int) -> None:
    """A ``frames.zarr`` of sequences of 11 frames of 256²×3."""
    from pipeline.storage import schema, store
    from pipeline.storage.checked_frames import content_hash

    group = store.open_store(path, "a").require_group("Waves/density")
    names = np.array([f"s{k}" for k in range(sequences)], object)
    contents = np.empty(sequences, object)
    parameter = np.tile(np.linspace(0, 1, 11), (sequences, 1))
    shape = (sequences, 11, SIDE, SIDE, 3)
    array = store.create_array(
        group, schema.FRAMES, shape=shape, chunks=(1, 1, *shape[2:]), dims=schema.FRAMES_DIMS, dtype="float32"
    )
    for k in range(sequences):
        frames = make_frames(11, 3, seed=k).astype("float32")
        store.write_rows(array, k, frames[None])
        contents[k] = content_hash(frames, parameter[k])
    arrays: dict[str, tuple[tuple[str, ...], np.ndarray, Any, tuple[int, ...]]] = {
        schema.SEQUENCE: ((schema.SEQUENCE,), names, str, (8,)),
        schema.CONTENT: ((schema.SEQUENCE,), contents, str, (8,)),
        schema.PARAMETER: (schema.PARAMETER_DIMS, parameter, float, (8, 11)),
    }
    for name, (dims, values, dtype, chunks) in arrays.items():
        array = store.create_array(group, name, shape=values.shape, chunks=chunks, dims=dims, dtype=dtype)
        store.write_rows(array, 0, values)


def measure_registry(sequences: int, folder: Path, device: str, metrics: list[str]) -> dict[str, Any]:
    """The stage itself, in one process, on a store of sequences: where its time goes.

    A store of one sequence goes first, so that nothing is loaded or compiled in the time that is measured.
    """
    from pipeline.distances import compute_distances
    from pipeline.metrics.settings import Settings
    from pipeline.storage import store
    from pipeline.workers.cluster import Cluster
    from pipeline.workers.profiles import Profile

    settings = Settings(metrics=tuple(metrics))
    with Cluster(Profile(kind="none", device=device)) as cluster:
        for run_of, count in (("first", 1), ("measured", sequences)):
            frames, distances = (folder / run_of / f"{name}.zarr" for name in ("frames", "distances"))
            write_frames(frames, count)
            start = time.perf_counter()
            report = compute_distances(frames, distances, settings, cluster=cluster)
            seconds = time.perf_counter() - start
    run: Any = store.open_store(distances).attrs["runs"][-1]  # type: ignore[index]
    stages = run["seconds_by_stage"]
    return {
        "sequences": sequences,
        "metrics": metrics,
        "matrices": report.computed,
        "seconds": seconds,
        "share": {stage: value / sum(stages.values()) for stage, value in stages.items()},
        "seconds_by_stage": stages,
        "seconds_by_metric": run["seconds_by_metric"],
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device = resolve_device(options.device)
    clock = Clock(device)
    limits = machine_limits(clock)
    names = lsim.list_metrics() if options.metrics == "all" else options.metrics.split(",")
    rows: list[dict[str, Any]] = []
    networks: list[dict[str, Any]] = []
    whole: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        metrics, absent = load_metrics(names, str(device), folder)
        compared = references(metrics, folder)
        for n, channels in CASES:
            frames = make_frames(n, channels)
            for name, metric in metrics.items():
                prepared = metric.prepare(frames, "sequence")
                baseline = [r for r in rows if r["metric"] == name and r["channels"] == channels]
                if baseline and (n * (n - 1) / 2) / baseline[0]["pairs_per_second"] > LONGEST:
                    continue
                rows.append(measure_metric(metric, compared[name], prepared, options.seconds, clock, limits))
                print(f"{name} {n}×{channels}: {rows[-1]['ratio']:.1f}×", file=sys.stderr, flush=True)
                if n == CASES[-1][0] and flops_per_frame(metric, channels):
                    networks.append(
                        measure_network(metric, prepared, options.seconds, clock, limits["gemm_flops"])
                    )
        if "lsim" in metrics:
            whole = [
                with_preprocessing(metrics["lsim"], compared["lsim"][1], n, options.seconds, clock)
                for n in EXPECTED_WITH_PREPROCESSING
            ]
        registry = (
            measure_registry(options.sequences, folder, str(device), _in_stage(metrics, folder))
            if options.sequences
            else None
        )
    limits_after = machine_limits(clock)
    return {
        "machine": {"processor": processor(device), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "threads": 1,
        "device": str(device),
        "limits": {"before": limits, "after": limits_after},
        "versions": {"python": platform.python_version()}
        | {p: version(p) for p in ("torch", "numpy", "numba", "scipy", "scikit-image", "pytorch-msssim")},
        "not_available": absent,
        "metrics": rows,
        "networks": networks,
        "with_preprocessing": whole,
        "registry": registry,
    }


def measure_overhead(metric: Metric, frames: np.ndarray, seconds: float, clock: Clock) -> dict[str, Any]:
    """Ratios of checked distances, without and with bounds, to embedding and comparing alone.

    Medians of ratios within rounds that have all three: load that comes and goes is then in none of them.
    """
    prepared = metric.prepare(frames, "sequence")

    def alone() -> None:
        with torch.no_grad():
            embedding = metric.embed(metric._frames(prepared))
            metric.compare(embedding, embedding)

    calls: list[Callable[[], Any]] = [
        alone,
        lambda: metric.all_pairs(prepared),
        lambda: metric.all_pairs_with_rounding(prepared),
    ]
    for call in calls:
        call()
    rounds, first_start = [], clock()
    while len(rounds) < 15 or clock() - first_start < seconds:
        durations = []
        for call in calls:
            prepared._embeddings.clear()  # what metrics of any kind share of the frames stays, as in a run
            start = clock()
            call()
            durations.append(clock() - start)
        rounds.append(durations)
    round_seconds = np.array(rounds)
    check_overhead, bound_overhead = np.median(round_seconds[:, 1:] / round_seconds[:, :1], axis=0) - 1
    return {
        "metric": metric.name,
        "milliseconds": 1e3 * float(np.median(round_seconds[:, 0])),
        "checked": float(check_overhead),
        "bounded": float(bound_overhead),
        "rounds": len(rounds),
    }


def overhead(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the overhead of every metric on a sequence of 11 frames of three channels."""
    device = resolve_device(options.device)
    names = lsim.list_metrics() if options.metrics == "all" else options.metrics.split(",")
    frames = make_frames(11, 3)
    with tempfile.TemporaryDirectory() as temporary:
        metrics, _ = load_metrics(names, str(device), Path(temporary))
        return [
            measure_overhead(metric, frames, options.seconds, Clock(device)) for metric in metrics.values()
        ]


def overhead_table(rows: list[dict[str, Any]]) -> str:
    """Write the rows of :func:`overhead` for people."""
    return "\n".join(
        f"{row['metric']:<20} {row['milliseconds']:>9.2f} ms, checked {row['checked']:>+7.1%}, "
        f"with bounds {row['bounded']:>+7.1%}"
        for row in rows
    )


def _in_stage(metrics: dict[str, Metric], folder: Path) -> list[str]:
    """Those that a run of the stage has at hand: not the ones with random weights."""
    return [name for name in metrics if (file := _weights(name, folder)) is None or file.parent != folder]


def table(result: dict[str, Any]) -> str:
    """The same for people."""
    limits = result["limits"]["before"]
    lines = [
        f"{result['machine']['processor']}, one core, load {result['machine']['load']:.1f}: matrix product "
        f"{limits['gemm_flops'] / 1e9:.0f} GFLOP/s, copy {limits['bytes'] / 1e9:.0f} GB/s",
        f"{'metric':<20} {'frames':>9} {'pairs/s':>10} {'reference':>10} {'ratio':>8} "
        f"{'of limit':>8} {'deviation':>9}",
    ]
    for row in result["metrics"]:
        share = "" if row["share_of_limit"] is None else f"{row['share_of_limit']:.0%}"
        short = ""
        if row["channels"] == 3:
            target_ratio = EXPECTED_RATIO.get(row["metric"], 0.0) if row["frames"] == 11 else 0.0
            share_wanted = EXPECTED_SHARE.get(row["metric"], 0.0) if row["frames"] == 128 else 0.0
            if row["ratio"] < target_ratio:
                short = f"  short of {target_ratio:.0f}"
            elif share_wanted and row["share_of_limit"] < share_wanted:
                short = f"  short of {share_wanted:.0%}"
        lines.append(
            f"{row['metric']:<20} {row['frames']:>7}×{row['channels']} {row['pairs_per_second']:>10.0f} "
            f"{row['reference_pairs_per_second']:>10.1f} {row['ratio']:>8.1f} {share:>8} "
            f"{row['maximum_relative_deviation']:>9.1e}{short}"
        )
    for row in result["networks"]:
        lines.append(
            f"network of {row['metric']}, {row['frames']} frames, {row['channels']} channels: "
            f"{row['milliseconds_per_frame']:.2f} ms a frame, {row['gflops']:.0f} GFLOP/s = "
            f"{row['share_of_gemm']:.0%} of the matrix product"
            + (
                ""
                if row["share_of_gemm"] >= EXPECTED_OF_NETWORKS
                else f"  short of {EXPECTED_OF_NETWORKS:.0%}"
            )
        )
    for row in result["with_preprocessing"]:
        short = "" if row["ratio"] >= row["expected_ratio"] else f"  short of {row['expected_ratio']:.0f}"
        lines.append(
            f"{row['metric']}, {row['frames']} frames of 256²×3 with preprocessing "
            f"({row['preprocessing_milliseconds']:.1f} ms): {1e3 * row['seconds']:.0f} ms, pair by pair "
            f"{1e3 * row['reference_seconds']:.0f} ms: {row['ratio']:.0f}×{short}"
        )
    if registry := result["registry"]:
        lines.append(
            f"{len(registry['metrics'])} metrics on {registry['sequences']} sequences: "
            f"{registry['seconds']:.1f} s"
        )
        shares = sorted(registry["share"].items(), key=lambda item: -item[1])
        lines += [
            f"  {stage:<22} {share:>6.1%}"
            + ("  too much" if stage != "metrics" and share > LARGEST_STAGE else "")
            for stage, share in shares
        ]
        by_metric = sorted(registry["seconds_by_metric"].items(), key=lambda item: -item[1])
        lines.append("  of which " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in by_metric))
    if absent := result["not_available"]:
        lines.append(f"not available here: {', '.join(absent)}")
    return "\n".join(lines)


def main() -> int:
    """0 when all agree with their references, else 1; how fast it is does not change it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--metrics", default="all", help="names separated by commas")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each figure")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sequences", type=int, default=64, help="of the whole registry's run; 0 for none")
    parser.add_argument("--overhead", action="store_true", help="measure checks and bounds instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with warnings.catch_warnings(), threadpool_limits(limits=1):
        warnings.simplefilter("ignore", lsim.SizeWarning)
        if options.overhead:
            rows = overhead(options)
            print(json.dumps(rows, indent=2) if options.json else overhead_table(rows))
            return 0
        result = measure(options)
    print(json.dumps(result, indent=2) if options.json else table(result))
    wrong = {
        row["metric"]
        for row in result["metrics"]
        if row["maximum_relative_deviation"] > AGREEMENT * (2 if row["metric"] in LEARNED else 1)
    }
    if wrong:
        print(f"deviates from its reference: {', '.join(sorted(wrong))}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
