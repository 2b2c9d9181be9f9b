"""What reading frames costs: zarr-python's own decoding against zarrs (the extra ``fast``), by size of frame.

    python benchmarks/reading.py [--small] [--json]

Whole sequences from a shard each, files in the page cache, one thread of each kind. CPU milliseconds a frame:
medians of several passes over four sequences, both kinds in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from common import processor

from pipeline.storage import schema, store
from pipeline.storage.zarrs_reading import read_shards

SHAPES = [
    ((250, 16, 16, 1), "float32"),
    ((60, 128, 64, 1), "float32"),
    ((11, 128, 128, 1), "float32"),
    ((11, 224, 224, 3), "uint8"),
    ((11, 256, 256, 1), "float64"),
    ((11, 1024, 1024, 1), "float32"),
]
"""Shape (frame, y, x, channel) and dtype."""
SEQUENCES = 4
PASSES = 7


def measure(path: Path, shape: tuple[int, ...], dtype: str, passes: int) -> dict[str, Any]:
    """Measure both ways to read a store of noise, which hardly compresses."""
    frames = (100 + 50 * np.random.default_rng(0).standard_normal((SEQUENCES, *shape))).astype(dtype)
    root = store.open_output(path, schema.FRAMES_STORE)
    array = store.create_array(
        root.require_group("data/field"),
        schema.FRAMES,
        shape=frames.shape,
        chunks=(1, 1, *shape[1:]),
        shards=(1, *shape),
        dims=schema.FRAMES_DIMS,
        dtype=dtype,
    )
    for row in range(SEQUENCES):
        store.write_rows(array, row, frames[row : row + 1])
    ways = {"zarr": lambda row: np.asarray(array[row]), "zarrs": lambda row: read_shards(array, row)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(passes + 1):
        for way, read in ways.items():
            began = time.process_time()
            for row in range(SEQUENCES):
                values = read(row)
                if values is None or not np.array_equal(values, frames[row]):
                    raise SystemExit(f"{way} does not read {shape} {dtype}; is the extra 'fast' installed?")
            seconds[way].append(time.process_time() - began)
    frames_read = SEQUENCES * shape[0]
    medians = {way: 1e3 * statistics.median(of[1:]) / frames_read for way, of in seconds.items()}
    return {
        "shape": shape,
        "dtype": dtype,
        "cpu_ms_per_frame": {way: round(value, 4) for way, value in medians.items()},
        "times_faster": round(medians["zarr"] / medians["zarrs"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    zarr.config.set({"threading.max_workers": 1})
    with tempfile.TemporaryDirectory() as folder:
        cases = [
            measure(Path(folder) / f"{number}.zarr", shape, dtype, 2 if arguments.small else PASSES)
            for number, (shape, dtype) in enumerate(SHAPES[:2] if arguments.small else SHAPES)
        ]
    figures = {"cases": cases, "machine": {"processor": processor(), "cpu_count": os.cpu_count()}}
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    for case in cases:
        print(case)


if __name__ == "__main__":
    main()
