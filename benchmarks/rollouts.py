"""What a comparison of models costs: against evaluation pair by pair, the memory's bandwidth, and overhead.

    python benchmarks/rollouts.py [--small] [--json]

3 models × 3 runs × 5 samples, 4 sequences × 60 frames of 128×64, 3 fields (``--small``: fewer of each), in
one process with one thread:

1. ``lsim compare`` by LSiM with the scope ``each``, without scores and spectra, against the evaluation pair
   by pair: the network in plain torch, two passes a pair, normalised as the protocol says, in batches. Some
   of its pairs are measured.
2. The same by ``l2`` on raw values: bytes of frames (of models and reference, once) by second, against the
   bandwidth of a plain sum over an array that is larger than all caches.
3. ``lsim compare`` by LSiM with scores of ensembles and spectra, and its overhead: the seconds that no read,
   no metric and no score took.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from common import processor
from torch.nn import functional as F

from lsim.networks import LsimTrunk
from pipeline.rollouts import RolloutSettings, compare
from pipeline.storage import schema, store
from pipeline.storage.checked_frames import content_hash
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

FULL, SMALL = (3, 3, 5, 4, 60, 3), (1, 2, 2, 2, 20, 2)
"""Models, runs, samples, sequences, frames, fields."""
Y, X = 128, 64
BATCH = 16
PAIRS_MEASURED = 240


def write_frames(path: Path, fields: int, sequences: dict[str, np.ndarray]) -> None:
    """Write a frames.zarr with the same frames in each field."""
    root = store.open_output(path, schema.FRAMES_STORE)
    frames = np.stack(list(sequences.values()))
    count, n = frames.shape[:2]
    parameter = np.tile(np.linspace(0, 1, n), (count, 1))
    contents = [content_hash(*of) for of in zip(frames, parameter, strict=True)]
    for number in range(fields):
        group = root.require_group(f"data/field{number}")
        arrays: dict[str, tuple[Any, ...]] = {
            schema.FRAMES: (frames, schema.FRAMES_DIMS, "float32", (1, 1, *frames.shape[2:])),
            schema.PARAMETER: (parameter, schema.PARAMETER_DIMS, "float64", (count, n)),
            schema.SEQUENCE: (np.array(list(sequences), object), (schema.SEQUENCE,), str, (count,)),
            schema.CONTENT: (np.array(contents, object), (schema.SEQUENCE,), str, (count,)),
        }
        for name, (values, dims, dtype, chunks) in arrays.items():
            shards = (1, *frames.shape[1:]) if name == schema.FRAMES else None
            array = store.create_array(
                group, name, shape=values.shape, chunks=chunks, dims=dims, dtype=dtype, shards=shards
            )
            store.write_rows(array, 0, values)


def make_stores(folder: Path, sizes: tuple[int, ...]) -> dict[str, Path]:
    models, runs, samples, sequences, frames, fields = sizes
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:Y, :X] / X
    reference = {
        f"s{s}": np.stack([np.sin(7 * x + 0.1 * t + s) * np.cos(5 * y) for t in range(frames)])[
            ..., None
        ].astype(np.float32)
        for s in range(sequences)
    }
    write_frames(folder / "reference.zarr", fields, reference)
    for model in range(models):
        rollouts = {
            f"run{r}-sample{k}/{name}": (of + 0.05 * rng.standard_normal(of.shape)).astype(np.float32)
            for r in range(runs)
            for k in range(samples)
            for name, of in reference.items()
        }
        write_frames(folder / f"m{model}.zarr", fields, rollouts)
    return {f"m{model}": folder / f"m{model}.zarr" for model in range(models)}


def time_compare(
    folder: Path, models: dict[str, Path], metrics: tuple[str, ...], scope: Any, *, scored: bool = False
) -> dict[str, Any]:
    settings = RolloutSettings(metrics=metrics, scope=scope, ensembles=scored, spectra=4 if scored else 0)
    out = folder / f"{'-'.join(metrics)}{'-scored' if scored else ''}.zarr"
    with Cluster(Profile(kind="none")) as cluster:
        began, cpu = time.perf_counter(), time.process_time()
        report = compare(folder / "reference.zarr", models, out, settings, cluster=cluster)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu, "by_activity": dict(report.seconds_by_activity)}


class PlainLsim:
    """LSiM in plain torch: trunk, normalised maps, weighted squares; random weights are as much work."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.trunk = LsimTrunk().eval().requires_grad_(False)
        maps = self.trunk(torch.zeros(1, 3, Y, X))
        self.means = [torch.zeros(of.shape[1:]) for of in maps]
        self.deviations = [torch.ones(of.shape[1:]) for of in maps]
        self.heads = [torch.rand(1, of.shape[1], 1, 1) for of in maps]

    def features(self, frames: torch.Tensor) -> list[torch.Tensor]:
        maps = self.trunk(frames)
        parts = zip(maps, self.means, self.deviations, strict=True)
        return [(of - mean) / (deviation + 1e-10) for of, mean, deviation in parts]

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        parts = zip(self.features(a), self.features(b), self.heads, strict=True)
        return sum(F.conv2d((x - y) ** 2, head).mean(dim=(2, 3)) for x, y, head in parts).sqrt()


def time_pair_by_pair(folder: Path) -> float:
    """Measure the seconds of a pair: both frames through the plain network, in batches."""
    network = PlainLsim()
    group = store.get_group(store.open_store(folder / "reference.zarr"), "data/field0")
    other = store.get_group(store.open_store(folder / "m0.zarr"), "data/field0")
    began, pairs = time.perf_counter(), 0
    with torch.no_grad():
        while pairs < PAIRS_MEASURED:
            sides = []
            for side in (group, other):
                frames = store.read(store.get_array(side, schema.FRAMES), 0)[:BATCH]
                scaled = 255 * (frames - frames.min()) / (frames.max() - frames.min())
                sides.append(torch.from_numpy(scaled).permute(0, 3, 1, 2).repeat(1, 3, 1, 1))
            network(*sides)
            pairs += len(sides[0])
    return (time.perf_counter() - began) / pairs


def measure_bandwidth() -> float:
    """Measure bytes a second of a sum over an array of 512 MiB: the best of five."""
    array = torch.ones(128 * 2**20)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        array.sum()
        best = max(best, 4 * array.numel() / (time.perf_counter() - began))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = SMALL if arguments.small else FULL
    models, runs, samples, sequences, frames, fields = sizes
    pairs = models * runs * samples * sequences * frames * fields
    nbytes = (pairs + sequences * frames * fields) * Y * X * 4
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stores = make_stores(folder, sizes)
        time_compare(folder, dict(list(stores.items())[:1]), ("l1", "lsim-open"), None)  # loads and compiles
        learned = time_compare(folder, stores, ("lsim-open",), "each")
        pixels = time_compare(folder, stores, ("l2",), "none")
        scored = time_compare(folder, stores, ("lsim-open",), "each", scored=True)
        pair_by_pair = time_pair_by_pair(folder) * pairs
    bandwidth = measure_bandwidth()
    spent = sum(scored["by_activity"].values())
    figures = {
        "sizes": sizes,
        "pairs": pairs,
        "lsim_seconds": round(learned["seconds"], 2),
        "pair_by_pair_seconds": round(pair_by_pair, 2),
        "times_faster": round(pair_by_pair / learned["seconds"], 2),
        "l2_seconds": round(pixels["seconds"], 2),
        "l2_by_activity": {k: round(v, 2) for k, v in pixels["by_activity"].items()},
        "l2_bytes_per_second": round(nbytes / pixels["seconds"]),
        "memory_bytes_per_second": round(bandwidth),
        "share_of_bandwidth": round(nbytes / pixels["seconds"] / bandwidth, 3),
        "lsim_with_scores_seconds": round(scored["seconds"], 2),
        "lsim_with_scores_by_activity": {k: round(v, 2) for k, v in scored["by_activity"].items()},
        "overhead": round(1 - spent / scored["seconds"], 3),
        "machine": {"processor": processor(), "cpu_count": os.cpu_count()},
    }
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    for name, figure in figures.items():
        print(f"{name}: {figure}")


if __name__ == "__main__":
    main()
