"""What 10⁵ blocks cost beyond their computing: the scheduler's time and memory, the first result, a resume.

    python benchmarks/graph.py [--blocks 100000] [--workers 2] [--json]

1. Tasks that do nothing, through the same submission as all stages, with the payload of a block of ten
   metrics: CPU time and growth of memory of driver and scheduler, with the scheduler in the driver's process
   (as on one machine) and in a process of its own (as on clusters). What memory they hold before is said
   beside it: most of it is torch, which the driver imports to check the metrics.
2. A store of that many blocks, of one sequence each (2 frames of 8×8, the metric l2). Some are computed by
   workers, for the time of the first result and the cost of a block with its reading and writing; the others
   get the files that computing them would write (all sequences are the same, so all blocks are). Then a run
   that finds nothing to do reads and compares all fingerprints, and lists all failures.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import processor
from distributed import Client

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
BY_WORKERS = 400
"""Blocks of the store that workers compute."""


class Watch:
    """CPU seconds of processes, and the growth of their memory at its highest, sampled ten times a second."""

    def __init__(self, *pids: int) -> None:
        self.processes = [psutil.Process(pid) for pid in pids]
        self.before = self._memory()
        self.peak = self.before
        self.cpu = self._cpu()
        self.began = time.perf_counter()
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
        seconds, cpu = time.perf_counter() - self.began, self._cpu() - self.cpu
        self._end.set()
        self._thread.join()
        growth = [peak - before for peak, before in zip(self.peak, self.before, strict=True)]
        return {
            "seconds": round(seconds, 2),
            "ms_a_block": round(1e3 * seconds / blocks, 3),
            "cpu_ms_a_block": round(1e3 * cpu / blocks, 3),
            "memory_before_MB": [round(held / 1e6) for held in self.before],
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
        first = first or time.perf_counter() - watch.began
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


def copy_blocks(out: Path, sequences: int) -> None:
    """Give every block the files of one that was computed: what computing them would write."""
    folder = out / KEY
    done = store.read(store.get_array(store.open_store(out), f"{KEY}/provenance/fingerprint"))
    computed = int(np.flatnonzero(done[0] != "")[0])
    for array, place in (
        (folder / "l2", "c/{}/0/0"),
        *((folder / schema.PROVENANCE / name, "c/0/{}") for name in ("failure", "content", "fingerprint")),
    ):
        if not (array / place.format(computed)).exists():
            continue  # chunks of nothing but fill values have no file
        found = (array / place.format(computed)).read_bytes()
        for row in range(sequences):
            target = array / place.format(row)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(found)


class _EnoughError(Exception):
    """Enough blocks were computed."""


def measure_store(folder: Path, blocks: int, workers: int) -> dict[str, Any]:
    """A run on a new store until some blocks are done, and one on the finished store."""
    make_frames(folder / "frames.zarr", blocks)
    out, found = folder / "distances.zarr", {}
    times: list[float] = []

    def until_enough(done: int, total: int) -> None:
        if done:
            times.append(time.perf_counter() - began)
        if done >= min(BY_WORKERS, total):
            raise _EnoughError

    with Cluster(Profile(workers=workers)) as cluster:
        cluster.client  # noqa: B018  workers are there when the time begins
        began = time.perf_counter()
        with contextlib.suppress(_EnoughError):
            compute_distances(folder / "frames.zarr", out, SETTINGS, cluster=cluster, progress=until_enough)
    found["new_store"] = {
        "seconds_to_first_result": round(times[0], 2),
        "blocks_computed": min(BY_WORKERS, blocks),
        "ms_a_block": round(1e3 * (times[-1] - times[0]) / max(1, min(BY_WORKERS, blocks)), 2),
    }
    copy_blocks(out, blocks)
    with Cluster(Profile(kind="none")) as cluster:
        # The first run after one that was stopped records what that one did not.
        compute_distances(folder / "frames.zarr", out, SETTINGS, cluster=cluster)
        watch = Watch(os.getpid())
        report = compute_distances(folder / "frames.zarr", out, SETTINGS, cluster=cluster)
        found["resume"] = watch.stop(blocks)
    if (report.blocks, report.up_to_date, report.failures) != (0, blocks, []):
        raise RuntimeError(f"the finished store is not up to date: {report}")
    for name, call in (
        ("list_failures", lambda: list_failures(out)),
        ("revision", lambda: store.revision(out, schema.FINGERPRINT)),
    ):
        began = time.perf_counter()
        call()
        found[f"{name}_seconds"] = round(time.perf_counter() - began, 2)
    return found


def measure(blocks: int, workers: int) -> dict[str, Any]:
    found: dict[str, Any] = {"blocks": blocks, "workers": workers}
    with Cluster(Profile(workers=workers)) as cluster:
        found["scheduler_in_the_driver"] = measure_submission(cluster.client, blocks)
    with (
        scheduler_apart(workers) as (address, pid),
        Cluster(Profile(kind="address", address=address)) as cluster,
    ):
        found["scheduler_apart"] = measure_submission(cluster.client, blocks, pid)
    with tempfile.TemporaryDirectory() as folder:
        found |= measure_store(Path(folder), blocks, workers)
    found["driver_peak_MB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
    found["machine"] = {"processor": processor(), "cpu_count": os.cpu_count()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.blocks, arguments.workers)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        details = value if isinstance(value, dict) else {"": value}
        print(f"{name}:", ", ".join(f"{key} {each}".strip() for key, each in details.items()))


if __name__ == "__main__":
    main()
