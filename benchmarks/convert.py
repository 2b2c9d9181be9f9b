"""How fast conversion is: MB/s from image files to ``frames.zarr``, against a plain copy of the same frames.

The plain copy writes the frames, decoded beforehand and held in memory, into one Zarr array with the same
chunks, shards and compression: no conversion can be faster than that. Between the two lie reading and
decoding the files, hashing and checking; the line "decode, then plain copy" is what a loop over the files
that does no more than that would reach.

    python benchmarks/convert.py [--sequences 124] [--size 256] [--format png|npz] [--workers 2] [--json]

MB are 10⁶ decoded bytes. The frames are smooth fields with noise, which compress as simulations do.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from distributed import Client, LocalCluster
from PIL import Image
from scipy.ndimage import gaussian_filter

from pipeline.convert import convert
from pipeline.sources.catalog import open_catalog
from pipeline.sources.readers import list_sequences
from pipeline.storage import store
from pipeline.storage.checked_frames import content_hash

FRAMES = 11


def make_archive(folder: Path, sequences: int, size: int, kind: str) -> None:
    """Write a catalog and its sequences in the published layout."""
    rng = np.random.default_rng(0)
    base = [gaussian_filter(rng.standard_normal((size, size, 3)), (6, 6, 0)) for _ in range(2)]
    for number in range(sequences):
        first, second = np.roll(base[0], 7 * number, 0), np.roll(base[1], 5 * number, 1)
        (folder / "data" / f"s{number}").mkdir(parents=True)
        for frame in range(FRAMES):
            field = first + 0.1 * frame * second + 0.002 * rng.standard_normal(first.shape)
            path = folder / "data" / f"s{number}" / f"f{frame:02d}.{kind}"
            if kind == "png":
                Image.fromarray(np.clip(127 + 600 * field, 0, 255).astype(np.uint8)).save(path)
            else:
                np.savez(path, field.astype(np.float32))
    (folder / "catalog.yaml").write_text(
        "name: bench\ndatasets:\n- {name: D, source: {path: data}, reader: lsim}\n"
    )


def plain_copy(frames: np.ndarray, out: Path) -> None:
    """Write frames (sequence, frame, y, x, channel) into one array, shard by shard, and nothing else."""
    shape = frames.shape[1:]
    rows = store.rows_per_shard(shape[0], frames[0, 0].nbytes)
    array = store.create_array(
        store.open_store(out, "a"),
        "frames",
        shape=frames.shape,
        chunks=(1, 1, *shape[1:]),
        shards=(rows, *shape),
        dims=("sequence", "frame", "y", "x", "channel"),
        dtype=frames.dtype,
    )
    for start in range(0, len(frames), rows):
        store.write_rows(array, start, frames[start : start + rows])


def median_seconds(function: Callable[[Path], Any], folder: Path, repeats: int) -> float:
    """Median time of writing a new store."""
    seconds = []
    for _ in range(repeats):
        out = folder / "out.zarr"
        start = time.perf_counter()
        function(out)
        seconds.append(time.perf_counter() - start)
        shutil.rmtree(out)
    return statistics.median(seconds)


def measure(folder: Path, sequences: int, size: int, kind: str, workers: int, repeats: int) -> dict[str, Any]:
    """Rates in MB/s, and the times that the rates come from."""
    make_archive(folder, sequences, size, kind)
    catalog = open_catalog(folder / "catalog.yaml")
    lazy = list_sequences(catalog.datasets[0], folder / "data")
    start = time.perf_counter()
    decoded = [sequence.read() for sequence in lazy]
    decode = time.perf_counter() - start  # the files are in the page cache: they were just written
    start = time.perf_counter()
    for block, parameter in decoded:
        content_hash(block, parameter)
    hashing = time.perf_counter() - start
    frames = np.stack([block for block, _ in decoded])
    del decoded
    copy = median_seconds(lambda out: plain_copy(frames, out), folder, repeats)
    seconds = {
        "decode alone, one thread": decode,
        "content hash alone, one thread": hashing,
        "plain copy": copy,
        "decode, then plain copy": decode + copy,
        "convert, in this process": median_seconds(lambda out: convert(catalog, out), folder, repeats),
    }
    with (
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.ERROR,
        ) as cluster,
        Client(cluster) as client,
    ):
        convert(catalog, folder / "warm.zarr", cluster=SimpleNamespace(client=client))
        seconds[f"convert, {workers} workers"] = median_seconds(
            lambda out: convert(catalog, out, cluster=SimpleNamespace(client=client)), folder, repeats
        )
    start = time.perf_counter()
    nothing = convert(catalog, folder / "warm.zarr")
    if nothing.changed:
        raise RuntimeError("the second conversion converted something")
    seconds["nothing to do"] = time.perf_counter() - start
    stored = sum(p.stat().st_size for p in (folder / "warm.zarr").rglob("*") if p.is_file())
    megabytes = frames.nbytes / 1e6
    return {
        "sequences": sequences,
        "frame": list(frames.shape[2:]),
        "dtype": str(frames.dtype),
        "format": kind,
        "decoded_MB": megabytes,
        "stored_MB": stored / 1e6,
        "shards": -(-sequences // store.rows_per_shard(FRAMES, frames[0, 0].nbytes)),
        "seconds": seconds,
        "MB_per_s": {name: megabytes / s for name, s in seconds.items() if name != "nothing to do"},
        "share_of_plain_copy": {
            name: seconds["plain copy"] / s for name, s in seconds.items() if name.startswith("convert")
        },
        "machine": {"cpu_count": os.cpu_count(), "system": platform.platform()},
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=124)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--format", choices=("png", "npz"), default="png")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lsim-bench-") as folder:
        result = measure(
            Path(folder),
            arguments.sequences,
            arguments.size,
            arguments.format,
            arguments.workers,
            arguments.repeats,
        )
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(
        f"{result['sequences']} sequences of {FRAMES} frames {tuple(result['frame'])} {result['dtype']} in "
        f"{result['format'].upper()}: {result['decoded_MB']:.0f} MB decoded, "
        f"{result['stored_MB']:.0f} MB stored, {result['shards']} shards"
    )
    for name, rate in result["MB_per_s"].items():
        share = result["share_of_plain_copy"].get(name)
        print(f"{name:32} {rate:8.0f} MB/s" + (f"   {share:5.2f} of the plain copy" if share else ""))
    print(f"{'nothing to do':32} {result['seconds']['nothing to do']:8.3f} s")


if __name__ == "__main__":
    main()
