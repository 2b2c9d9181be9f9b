"""What 10⁵ blocks cost beyond their computing: the scheduler's time and memory, the first result, a resume.

    python benchmarks/graph.py [--blocks 100000] [--computed 20000] [--workers 2] [--json]

1. Tasks that do nothing, through the same submission as all stages, with the payload of a block of ten
   metrics: CPU time and growth of memory of driver and scheduler, with the scheduler in the driver's process
   (as on one machine) and in a process of its own (as on clusters). What memory they hold before is said
   beside it: most of it is torch, which the driver imports to check the metrics.
2. A store of ``--computed`` blocks, of one sequence each (2 frames of 8×8, the metric l2), computed by
   workers: CPU time of all processes a block, with its reading and writing, and files a block. Then a run
   that finds nothing to do reads and compares all fingerprints, and lists all failures.
3. The same in one process, whose operations on stores are counted: each is a request on an object store.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import processor
from distributed import Client
from zarr.storage import LocalStore

from pipeline.distances import Settings, compute_distances, list_failures
from pipeline.distances.blocks import Block, FieldBlocks, FieldMetric
from pipeline.stage.bounded_map import run_bounded
from pipeline.storage import schema, store
from pipeline.storage.checked_frames import content_hash
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile
from pipeline.workers.worker_metrics import MetricRequest

METRICS = ("l1", "l2", "psnr", "ssim", "ms-ssim", "gmsd", "vi", "lsim", "lpips-alex", "flow")
KEY = "D/density"
SETTINGS = Settings(metrics=("l2",), size=None, block=1)


class Watch:
    """CPU seconds of processes, and the growth of their memory at its highest, sampled ten times a second."""

    def __init__(self, *pids: int) -> None:
        self.processes = [psutil.Process(pid) for pid in pids]
        self.initial_bytes = self._memory()
        self.peak = self.initial_bytes
        self.cpu = self._cpu()
        self.start = time.perf_counter()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _memory(self) -> list[int]:
        return [process.memory_info().rss for process in self.processes]

    def _cpu(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self.processes)

    def _sample(self) -> None:
        while not self._end.wait(0.1):
            self.peak = [max(pair) for pair in zip(self.peak, self._memory(), strict=True)]

    def stop(self, blocks: int) -> dict[str, Any]:
        """Seconds, CPU milliseconds a block, and megabytes (10⁶ bytes)."""
        seconds, cpu = time.perf_counter() - self.start, self._cpu() - self.cpu
        self._end.set()
        self._thread.join()
        growth = [peak - initial for peak, initial in zip(self.peak, self.initial_bytes, strict=True)]
        return {
            "seconds": round(seconds, 2),
            "ms_a_block": round(1e3 * seconds / blocks, 3),
            "cpu_ms_a_block": round(1e3 * cpu / blocks, 3),
            "memory_before_MB": [round(nbytes / 1e6) for nbytes in self.initial_bytes],
            "memory_growth_MB": round(sum(growth) / 1e6, 1),
        }


def nothing_tasks(count: int) -> Iterator[tuple[Block]]:
    """Tasks of one block each, as large as those of ten metrics."""
    metrics = {
        name: FieldMetric(
            MetricRequest(name, None, 224, 0, "default", specification_hash="0" * 32), "0" * 32, "sequence"
        )
        for name in METRICS
    }
    for row in range(count):
        content = hashlib.sha256(str(row).encode()).hexdigest()[:32]
        field = FieldBlocks("/frames.zarr", "/out.zarr", KEY, metrics, "all")
        yield (Block(field, row, (content,), (b"0" * 100,), dict.fromkeys(METRICS, (row,))),)


def measure_submission(client: Client, blocks: int, *pids: int) -> dict[str, Any]:
    """Tasks that do nothing. The first hundred are not counted: connections are made, modules imported."""
    for _ in run_bounded(client, bool, nothing_tasks(100)):
        pass
    watch, first = Watch(os.getpid(), *pids), 0.0
    for _, count, error in run_bounded(client, bool, nothing_tasks(blocks)):
        if error is not None or count != 1:
            raise RuntimeError(f"a task that does nothing failed: {error}")
        first = first or time.perf_counter() - watch.start
    return watch.stop(blocks) | {"first_result_seconds": round(first, 3)}


@contextlib.contextmanager
def scheduler_apart(workers: int) -> Iterator[tuple[str, int]]:
    """Scheduler and workers in processes of their own: the scheduler's address and process."""
    options = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"]
    scheduler = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_scheduler", *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert scheduler.stderr is not None
    address = next(line.split()[-1] for line in scheduler.stderr if "Scheduler at:" in line)
    threading.Thread(target=scheduler.stderr.read, daemon=True).start()
    options = ["--nworkers", str(workers), "--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1"]
    crew = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_worker", address, *options], stderr=subprocess.DEVNULL
    )
    try:
        yield address, scheduler.pid
    finally:
        for process in (crew, scheduler):
            process.terminate()
            process.wait()


def make_frames(path: Path, sequences: int) -> None:
    """A frames.zarr of equal sequences: two frames of 8×8."""
    rng = np.random.default_rng(0)
    frames, parameter = rng.random((2, 8, 8, 1), np.float32), np.array([0.0, 1.0])
    rows = 4096
    group = store.open_output(path, schema.FRAMES_STORE).require_group(KEY)
    content = content_hash(frames, parameter)
    arrays = {
        schema.FRAMES: (np.broadcast_to(frames, (sequences, *frames.shape)), schema.FRAMES_DIMS, "float32"),
        schema.PARAMETER: (np.broadcast_to(parameter, (sequences, 2)), schema.PARAMETER_DIMS, "float64"),
        schema.SEQUENCE: (np.array([f"s{k}" for k in range(sequences)], object), (schema.SEQUENCE,), str),
        schema.CONTENT: (np.full(sequences, content, object), (schema.SEQUENCE,), str),
    }
    for name, (values, dims, dtype) in arrays.items():
        shape, shards = values.shape, None
        chunks = (rows, *shape[1:])
        if name == schema.FRAMES:
            chunks, shards = (1, 1, *shape[2:]), (rows, *shape[1:])
        array = store.create_array(
            group, name, shape=shape, chunks=chunks, dims=dims, dtype=dtype, shards=shards
        )
        for start in range(0, sequences, rows):
            store.write_rows(array, start, values[start : start + rows])


def count_files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def measure_store(folder: Path, blocks: int, workers: int) -> dict[str, Any]:
    """A run on a new store, and one on the finished store."""
    make_frames(folder / "frames.zarr", blocks)
    out, figures = folder / "distances.zarr", {}
    cpu_before = cpu_of_children()
    with Cluster(Profile(workers=workers)) as cluster:
        cluster.client  # noqa: B018  workers are there when the time begins
        watch = Watch(os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True)))
        report = compute_distances(folder / "frames.zarr", out, SETTINGS, cluster=cluster)
        figures["new_store"] = watch.stop(blocks) | {
            "blocks": report.blocks,
            "files_a_block": round(count_files(out / KEY) / blocks, 2),
        }
    figures["new_store"]["cpu_seconds_of_workers"] = round(cpu_of_children() - cpu_before, 1)
    with Cluster(Profile(kind="none")) as cluster:
        watch = Watch(os.getpid())
        report = compute_distances(folder / "frames.zarr", out, SETTINGS, cluster=cluster)
        figures["resume"] = watch.stop(blocks)
    if (report.blocks, report.up_to_date, report.failures) != (0, blocks, []):
        raise RuntimeError(f"the finished store is not up to date: {report}")
    for name, call in (
        ("list_failures", lambda: list_failures(out)),
        ("revision", lambda: store.revision(out, schema.FINGERPRINT)),
    ):
        start = time.perf_counter()
        call()
        figures[f"{name}_seconds"] = round(time.perf_counter() - start, 2)
    return figures


def cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def count_operations(folder: Path, blocks: int) -> dict[str, float]:
    """Count operations on stores, a block, of a run in this process."""
    make_frames(folder / "frames.zarr", blocks)
    counts: Counter[str] = Counter()
    originals = {name: getattr(LocalStore, name) for name in ("get", "set", "exists", "delete")}

    def counting(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return originals[name](*arguments, **options)

        return call

    try:
        for name in originals:
            setattr(LocalStore, name, counting(name))
        with Cluster(Profile(kind="none")) as cluster:
            compute_distances(folder / "frames.zarr", folder / "d.zarr", SETTINGS, cluster=cluster)
    finally:
        for name, original in originals.items():
            setattr(LocalStore, name, original)
    return {name: round(count / blocks, 2) for name, count in sorted(counts.items())}


def measure(blocks: int, computed_blocks: int, workers: int) -> dict[str, Any]:
    result: dict[str, Any] = {"blocks": blocks, "computed": computed_blocks, "workers": workers}
    with Cluster(Profile(workers=workers)) as cluster:
        result["scheduler_in_the_driver"] = measure_submission(cluster.client, blocks)
    with (
        scheduler_apart(workers) as (address, pid),
        Cluster(Profile(kind="address", address=address)) as cluster,
    ):
        result["scheduler_apart"] = measure_submission(cluster.client, blocks, pid)
    with tempfile.TemporaryDirectory() as folder:
        result |= measure_store(Path(folder), computed_blocks, workers)
    with tempfile.TemporaryDirectory() as folder:
        result["operations_a_block"] = count_operations(Path(folder), min(1000, computed_blocks))
    result["driver_peak_MB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
    result["machine"] = {"processor": processor(), "cpu_count": os.cpu_count()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=100_000)
    parser.add_argument("--computed", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.blocks, arguments.computed, arguments.workers)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        details = value if isinstance(value, dict) else {"": value}
        print(f"{name}:", ", ".join(f"{key} {figure}".strip() for key, figure in details.items()))


if __name__ == "__main__":
    main()
