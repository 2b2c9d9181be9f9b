"""One matrix over an archive: time by phase, share of the machine's products, against pairs, and growth.

A store of drifting waves, 2,048 frames of 256²×3 in sequences of 16, is made; then LSiM's matrix over all of
them is computed on every core by one process, as the command does, and

- the time of each phase: embed (read, check, prepare, network), compare, write;
- the tile phase's rate, counting 2·k operations a pair of embeddings of k values, as a share of that of
  torch.mm in single precision on the same shapes, on as many threads;
- the same by the authors' evaluation, two passes of the network a pair, extrapolated from some pairs;
- how all that and memory grow from 512 to 4,096 frames.

On a GPU 16,384 frames, made there, and the accuracy of single, TF32 and bfloat16 products.

    python benchmarks/matrix.py [--json] [--frames 512,1024,2048,4096] [--reported 2048] [--memory 3e9]
                                 [--device auto]

Weights are those of lsim in $LSIM_WEIGHTS, else the shipped ones: times are the same. Needs 4 GB of disk.
With 3 GB of memory the embeddings of 2,048 frames fit, and those of 4,096 don't.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import processor
from distributed import Client
from references import PairNetwork

import lsim
from lsim.embedding import Embedding
from lsim.error_bounds import PROMISE
from lsim.metrics.learned import LSiM
from lsim.networks import LsimTrunk
from lsim.registry import why_unavailable
from lsim.weights import find_weights
from pipeline.matrix import MatrixReport, MatrixRequest, compute_matrix
from pipeline.matrix.embedding_cache import EmbeddedBlock
from pipeline.matrix.tiles import ROWS_AT_ONCE, compare_blocks
from pipeline.metrics.settings import Settings
from pipeline.storage import schema, store
from pipeline.storage.checked_frames import content_hash
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

SIDE, FRAMES_OF_SEQUENCE = 256, 16
GPU_FRAMES = 16384
SAMPLE_PAIRS = 24
EXPECTED_SHARE = {"cpu": 0.6, "cuda": 0.4}
"""Of the measured rate of products, in the tile phase."""
EXPECTED_RATIO = 300.0
"""Against two passes a pair."""


def waves(count: int, seed: int) -> np.ndarray:
    """Drifting waves with a little noise: (count, 256, 256, 3) float32."""
    rng = np.random.default_rng(seed)
    y, x = np.indices((SIDE, SIDE), dtype=np.float32) * np.float32(2 * np.pi / SIDE)
    frames = np.zeros((count, SIDE, SIDE, 3), np.float32)
    for channel in range(3):
        for number in (1, 2, 5):
            phase, angle = rng.uniform(0, 2 * np.pi, 2)
            wave_phase = (number * (x * np.cos(angle) + y * np.sin(angle)) + phase).astype(np.float32)
            for k in range(count):
                frames[k, ..., channel] += np.sin(wave_phase + np.float32(0.1 * k * number)) / number
    return frames + rng.normal(0, 0.02, frames.shape).astype(np.float32)


def make_store(path: Path, count: int) -> Path:
    """A frames.zarr of ``count`` frames; sequences are written one by one."""
    sequences = count // FRAMES_OF_SEQUENCE
    group = store.open_store(path, "a").require_group("waves/height")
    parameter = np.linspace(0, 1, FRAMES_OF_SEQUENCE)
    shape = (sequences, FRAMES_OF_SEQUENCE, SIDE, SIDE, 3)
    array = store.create_array(
        group, schema.FRAMES, shape=shape, chunks=(1, 1, *shape[2:]), dims=schema.FRAMES_DIMS, dtype="float32"
    )
    contents = []
    for row in range(sequences):
        values = waves(FRAMES_OF_SEQUENCE, row)
        store.write_rows(array, row, values[None])
        contents.append(content_hash(values, parameter))
    names = [f"s{row:05d}" for row in range(sequences)]
    labels: dict[str, tuple[np.ndarray, tuple[str, ...], Any]] = {
        schema.PARAMETER: (np.tile(parameter, (sequences, 1)), schema.PARAMETER_DIMS, "float64"),
        schema.SEQUENCE: (np.array(names, object), (schema.SEQUENCE,), str),
        schema.CONTENT: (np.array(contents, object), (schema.SEQUENCE,), str),
    }
    for name, (values, dims, dtype) in labels.items():
        stored_array = store.create_array(
            group, name, shape=values.shape, chunks=values.shape, dims=dims, dtype=dtype
        )
        store.write_rows(stored_array, 0, values)
    return path


def peak_memory() -> int:
    """Most bytes that this process had in memory. Runs on a worker."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compute(frames: Path, out: Path, metric: str, threads: int, memory: int) -> dict[str, Any]:
    """The matrix of a whole store, in one process as the command has it, and what it took."""
    settings = Settings(metrics=(metric,), scope="dataset")
    announced: list[str] = []
    with Cluster(Profile(workers=1, threads=threads, device="cpu")) as cluster:
        client: Client | None = cluster.client  # its start isn't counted
        assert client is not None
        start = time.perf_counter()
        report = compute_matrix(
            frames, out, settings, MatrixRequest(memory=memory), cluster=cluster, announce=announced.append
        )
        seconds = time.perf_counter() - start
        peak = max(client.run(peak_memory).values())
    return described(report, seconds, peak, threads, announced)


def described(
    report: MatrixReport, seconds: float, peak: int, threads: int, announced: list[str]
) -> dict[str, Any]:
    plan = report.plans[0]
    n, family = plan.frames, plan.families[0]
    pairs = n * (n - 1) // 2
    phases = {name: round(value / threads, 3) for name, value in report.seconds_by_stage.items()}
    return {
        "frames": n,
        "pairs": pairs,
        "seconds": round(seconds, 2),
        "seconds_by_phase": phases | {"all else": round(seconds - sum(phases.values()), 3)},
        "planned_seconds": round(plan.seconds, 2),
        "embeddings": report.embeddings,
        "tile": plan.tile,
        "tasks": family.tasks,
        "microseconds_a_pair": 1e6 * seconds / pairs,
        "milliseconds_a_frame": 1e3 * seconds / n,
        "memory_peak": peak,
        "memory_planned": family.process + family.cache + family.work,
        "plan": announced[0].splitlines(),
    }


def wait_for(device: torch.device) -> None:
    """Until all that was asked of it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(call: Callable[[], Any], times: int, device: torch.device) -> float:
    """The shortest of some calls, in seconds."""
    best = np.inf
    for _ in range(times):
        start = time.perf_counter()
        call()
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return best


def rate_of_products(rows: int, values: int, threads: int) -> float:
    """Operations a second of torch.mm in single precision: two blocks of embeddings, on so many threads."""
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.normal(size=(rows, values)).astype(np.float32)) for _ in range(2))
    thread_count = torch.get_num_threads()
    torch.set_num_threads(threads)
    seconds = fastest(lambda: torch.mm(x, y.T), 5, torch.device("cpu"))
    torch.set_num_threads(thread_count)
    return 2 * rows * rows * values / seconds


def pair_by_pair(name: str, threads: int) -> float:
    """Seconds of a pair as the authors' evaluation has it: both frames through the network, then compared."""
    network = PairNetwork(find_weights(name), LsimTrunk)
    frames = waves(8, 0)[:, :224, :224] * 80 + 120
    pairs = [(i, j) for i in range(8) for j in range(i + 1, 8)][:SAMPLE_PAIRS]
    thread_count = torch.get_num_threads()
    torch.set_num_threads(threads)
    network(frames[0], frames[1])
    start = time.perf_counter()
    for i, j in pairs:
        network(frames[i], frames[j])
    seconds = time.perf_counter() - start
    torch.set_num_threads(thread_count)
    return seconds / len(pairs)


def on_gpu(name: str, count: int, device: torch.device) -> dict[str, Any]:
    """All pairs of frames that are made on the device: embedding, tiles, shares, accuracy."""
    metric = lsim.load_metric(name, device=device)
    assert isinstance(metric, LSiM)
    batches = [waves(64, seed) for seed in range(4)]
    noise = torch.Generator(device).manual_seed(0)

    def frames() -> Iterator[torch.Tensor]:
        for k in range(0, count, 64):
            values = torch.from_numpy(batches[k // 64 % 4][:, :224, :224]).to(device) * 80 + 120
            shifted = torch.roll(values, shifts=(k // 7 % 224, k // 3 % 224), dims=(1, 2))
            yield shifted + torch.randn(shifted.shape, generator=noise, device=device)

    with torch.no_grad():
        first = metric.embed(next(frames())).parts["features"]
        features = torch.empty(count, first.shape[1], device=device)
        wait_for(device)
        start = time.perf_counter()
        for k, batch in enumerate(frames()):
            features[64 * k : 64 * k + len(batch)] = metric.embed(batch).parts["features"]
        wait_for(device)
        embed = time.perf_counter() - start
        tile = min(2048, count)
        blocks = [
            EmbeddedBlock(Embedding({"features": part}), np.ones(len(part), bool))
            for part in features.split(tile)
        ]
        start = time.perf_counter()
        for i, row_block in enumerate(blocks):
            for column_block in blocks[i:]:
                compare_blocks(metric, row_block, column_block)
        tiles = time.perf_counter() - start
        operations = count * (count + tile) * features.shape[1]
        rates = {
            precision: 2 * tile * tile * features.shape[1] / fastest(call, 3, device)
            for precision, call in products(features[:tile]).items()
        }
    record = metric.take_precision()
    return {
        "frames": count,
        "seconds": embed + tiles,
        "seconds_by_phase": {"embed": embed, "compare": tiles},
        "rate": operations / tiles,
        "rate_of_products": rates,
        "share": {name: operations / tiles / rate for name, rate in rates.items()},
        "recomputed": record.recomputed / record.pairs if record is not None else None,
        "memory_peak": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory(),
        "accuracy": accuracy(features[:512]),
    }


def products(features: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The product of all rows with all, as devices have it in each precision."""
    half = features.bfloat16()

    def tf32(enabled: bool) -> Callable[[], Any]:
        def run() -> torch.Tensor:
            allow_tf32 = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = enabled
            try:
                return features @ features.T
            finally:
                torch.backends.cuda.matmul.allow_tf32 = allow_tf32

        return run

    return {"single": tf32(False), "tf32": tf32(True), "bfloat16": lambda: half @ half.T}


def accuracy(features: torch.Tensor) -> dict[str, Any]:
    """Largest relative error of distances by |x|² + |y|² − 2xy, as they are and less their mean, and of ours.

    Against differences in double; of distances above a thousandth of the median. All frames are taken less
    their mean for "centred".
    """
    exact = torch.stack([(features.double() - row.double()).square().sum(1).sqrt() for row in features])
    judged = exact > 1e-3 * exact[exact > 0].median()
    errors = {}
    for centred in (False, True):
        rows = features - features.mean(0) if centred else features
        for name, product in products(rows).items():
            xy = product().double()
            squares = rows.double().square().sum(1)
            distances = (squares[:, None] + squares - 2 * xy).clamp(min=0).sqrt()
            error = ((distances - exact).abs() / exact)[judged].max().item()
            errors[f"{name}{', centred' if centred else ''}"] = error
    whole = EmbeddedBlock(Embedding({"features": features}), np.ones(len(features), bool))
    metric = lsim.load_metric("lsim-open", device=features.device)
    ours = torch.from_numpy(compare_blocks(metric, whole, whole)).to(features.device).double()
    errors["lsim, as stored"] = ((ours - exact).abs() / exact)[judged].max().item()
    return errors


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="the whole record, for benchmarks/results/")
    parser.add_argument("--frames", default="512,1024,2048,4096", help="of which archives")
    parser.add_argument("--reported", type=int, default=2048, help="the one that is compared")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory", type=float, default=3e9, help="bytes that the worker may take")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--gpu-frames", type=int, default=GPU_FRAMES)
    options = parser.parse_args()
    name = "lsim-open" if why_unavailable("lsim") else "lsim"
    device = lsim.load_metric(name, device=options.device).device
    record: dict[str, Any] = {
        "benchmark": "archive",
        "metric": name,
        "machine": processor(),
        "device": processor(device),
        "threads": options.threads,
        "load": os.getloadavg()[0],
        "versions": {p: version(p) for p in ("torch", "numpy", "numba", "zarr", "dask")},
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        record["gpu"] = on_gpu(name, options.gpu_frames, device)
    else:
        record |= on_cpu(
            name,
            [int(n) for n in options.frames.split(",")],
            options.reported,
            options.threads,
            int(options.memory),
        )
    record["load_after"] = os.getloadavg()[0]
    record["faults"] = faults(record)
    if options.json:
        print(json.dumps(record, indent=1))
    else:
        show(record)
    return 1 if record["faults"] else 0


def on_cpu(name: str, counts: list[int], reported: int, threads: int, memory: int) -> dict[str, Any]:
    metric = lsim.load_metric(name, device="cpu")
    assert isinstance(metric, LSiM)
    growth = []
    with tempfile.TemporaryDirectory(prefix="lsim-benchmark-") as folder:
        frames = make_store(Path(folder) / "frames.zarr", max(counts))
        for count in counts:
            part = Path(folder) / f"{count}.zarr"
            shortened(frames, part, count)
            growth.append(compute(part, Path(folder) / f"{count}-matrix.zarr", name, threads, memory))
            print(f"{count} frames: {growth[-1]['seconds']} s", file=sys.stderr)
    largest = next((entry for entry in growth if entry["frames"] == reported), growth[-1])
    with torch.no_grad():
        values = metric.embed(torch.zeros(1, 224, 224, 3)).parts["features"].shape[1]
    products = rate_of_products(largest["tile"], values, threads)
    rate = 2 * largest["pairs"] * values / largest["seconds_by_phase"]["compare"]
    pair = pair_by_pair(name, threads)
    return {
        "values_a_frame": values,
        "growth": growth,
        "reported": largest,
        "rate_of_products": products,
        "rate_of_tiles": rate,
        "share": rate / products,
        "rows_at_once": ROWS_AT_ONCE,
        "seconds_a_pair_by_two_passes": pair,
        "seconds_by_two_passes": pair * largest["pairs"],
        "ratio": pair * largest["pairs"] / largest["seconds"],
    }


def shortened(frames: Path, out: Path, count: int) -> None:
    """A store of the first sequences, whose chunks are links to the files that there are."""
    for path in sorted(frames.rglob("*")):
        inside = path.relative_to(frames)
        target = out / inside
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif "frames" in inside.parts and "c" in inside.parts:
            os.link(path, target)
        else:
            target.write_bytes(path.read_bytes())
    sequences = count // FRAMES_OF_SEQUENCE
    group = store.get_group(store.open_store(out, "r+"), "waves/height")
    for name in (schema.SEQUENCE, schema.CONTENT, schema.PARAMETER):
        values = store.read(store.get_array(group, name))[:sequences]
        store.resize_rows(store.get_array(group, name), sequences)
        store.write_rows(store.get_array(group, name), 0, values)
    store.resize_rows(store.get_array(group, schema.FRAMES), sequences)


def faults(record: dict[str, Any]) -> list[str]:
    """What falls short of what is expected."""
    messages = []
    if "gpu" in record:
        best = max(record["gpu"]["share"][name] for name in ("tf32", "bfloat16"))
        if best < EXPECTED_SHARE["cuda"]:
            messages.append(f"share of products {best:.0%}, expected {EXPECTED_SHARE['cuda']:.0%}")
        if record["gpu"]["accuracy"]["lsim, as stored"] > PROMISE:
            messages.append(f"distances are off by more than {PROMISE:g}")
        return messages
    if record["share"] < EXPECTED_SHARE["cpu"]:
        messages.append(f"share of products {record['share']:.0%}, expected {EXPECTED_SHARE['cpu']:.0%}")
    if record["ratio"] < EXPECTED_RATIO:
        messages.append(f"{record['ratio']:.0f} times two passes a pair, expected {EXPECTED_RATIO:.0f}")
    return messages


def show(record: dict[str, Any]) -> None:
    if "gpu" in record:
        for key, value in record["gpu"].items():
            print(f"{key}: {value}")
    else:
        print(
            f"{'frames':>7} {'seconds':>8} {'embed':>7} {'compare':>8} {'write':>6} {'µs/pair':>8} "
            f"{'ms/frame':>9} {'memory':>8}"
        )
        for entry in record["growth"]:
            phases = [entry["seconds_by_phase"][name] for name in ("embed", "compare", "write")]
            print(
                f"{entry['frames']:>7} {entry['seconds']:>8.1f} {phases[0]:>7.1f} {phases[1]:>8.1f} "
                f"{phases[2]:>6.1f} {entry['microseconds_a_pair']:>8.2f} "
                f"{entry['milliseconds_a_frame']:>9.2f} {entry['memory_peak'] / 1e9:>5.2f} GB"
            )
        print(
            f"tile phase {record['rate_of_tiles'] / 1e9:.0f} GFLOP/s, {record['share']:.0%} of torch.mm's "
            f"{record['rate_of_products'] / 1e9:.0f}; two passes a pair would take "
            f"{record['seconds_by_two_passes'] / 3600:.1f} h, {record['ratio']:.0f} times as long"
        )
    for fault in record["faults"]:
        print(f"falls short: {fault}")


if __name__ == "__main__":
    sys.exit(main())
