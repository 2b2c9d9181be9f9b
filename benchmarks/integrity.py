"""What it costs to compare results with their digests when they are read, as a share of reading them.

Three stores are made, and read twice over by turns: as plain arrays, and as their readers do, which hash the
values and compare them and their records with the digests.

1. ``distances.zarr``: sequences of 11 frames, 50 a chunk, ten metrics.
2. ``matrix.zarr``: the matrix of 2,048 frames in tiles of 256.
3. ``embeddings.zarr``: blocks of 64 MB.

    python benchmarks/integrity.py [--sequences 4000] [--repeats 5] [--json]

Distances are random numbers, which compress badly, as computed ones do. Files are in the page cache: from a
disk reading takes longer, and the check does not.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common import processor

from pipeline.storage import digests, schema, store
from pipeline.storage.recorded import (
    LABELS,
    CheckedEmbeddings,
    CheckedMatrix,
    block_identity,
    block_texts,
    check_rows,
    labels_of_blocks,
    tile_identity,
    tile_texts,
)

KEY = "D/density"
FRAMES, TOGETHER = 11, 50
METRICS = ("gmsd", "l1", "l2", "lpips-alex", "lsim", "ms-ssim", "nmi", "psnr", "ssim", "vi")
TILE, TILES = 256, 8
VALUES, ROWS = 226208, 70
"""Of LSiM's embedding of a frame, and frames of a block."""

Read = Callable[[], Any]


def write(
    group: store.Group, arrays: Mapping[str, tuple[np.ndarray, Any, tuple[int, ...], tuple[str, ...]]]
) -> None:
    """Write arrays, each with its values, dtype, chunks and dimensions."""
    for name, (values, dtype, chunks, dims) in arrays.items():
        array = store.create_array(group, name, shape=values.shape, chunks=chunks, dims=dims, dtype=dtype)
        store.write_block(array, (0,) * values.ndim, values)


def texts(shape: tuple[int, ...], text: str) -> np.ndarray:
    return np.full(shape, text, dtype=object)


def specifications(*metrics: str) -> np.ndarray:
    """Describe metrics, as provenance has them."""
    return np.array([json.dumps(digests.sealed({"name": m}, KEY, m)) for m in metrics], dtype=object)


def make_distances(path: Path, sequences: int) -> tuple[Read, Read]:
    """Write a ``distances.zarr``; gives how it is read plainly, and how it is read and compared."""
    rng = np.random.default_rng(0)
    root = store.open_output(path, schema.DISTANCES_STORE)
    group = root.require_group(KEY)
    names = np.array([f"s{k:06}" for k in range(sequences)], dtype=object)
    parameter = np.tile(np.linspace(0, 1, FRAMES), (sequences, 1))
    identities = digests.identify_rows(names, parameter)
    of_rows = {
        schema.FAILURE: texts((len(METRICS), sequences), ""),
        schema.CONTENT: texts((len(METRICS), sequences), "c" * 32),
        schema.RESOLUTION: texts((len(METRICS), sequences), "r" * 100),
        schema.FINGERPRINT: texts((len(METRICS), sequences), "f" * 32),
        schema.DIGEST: texts((len(METRICS), sequences), ""),
    }
    arrays: dict[str, Any] = {
        schema.SEQUENCE: (names, str, (4096,), (schema.SEQUENCE,)),
        schema.PARAMETER: (parameter, "float64", (4096, FRAMES), schema.PARAMETER_DIMS),
    }
    recorded = {name: column[0, 0] for name, column in of_rows.items() if name != schema.DIGEST}
    for place, metric in enumerate(METRICS):
        values = rng.random((sequences, FRAMES, FRAMES))
        arrays[metric] = (values, "float64", (TOGETHER, FRAMES, FRAMES), schema.DISTANCE_DIMS)
        matrix_identity = digests.identify(KEY, metric)
        of_rows[schema.DIGEST][place] = [
            digests.bind(matrix_identity + identity, recorded, digests.hash_values(matrix))
            for identity, matrix in zip(identities, values, strict=True)
        ]
    write(group, arrays)
    by_row = {name: (column, str, (64, TOGETHER), schema.PROVENANCE_DIMS) for name, column in of_rows.items()}
    by_metric = {
        schema.METRIC: (np.array(METRICS, dtype=object), str, (64,), (schema.METRIC,)),
        schema.SPECIFICATION: (specifications(*METRICS), str, (64,), (schema.METRIC,)),
    }
    write(group.require_group(schema.PROVENANCE), by_row | by_metric)

    def plainly() -> dict[str, np.ndarray]:
        return {metric: store.read(store.get_array(group, metric)) for metric in METRICS}

    def compared() -> None:
        check = check_rows(root, KEY, plainly())
        if any(rows.any() for rows in check.damaged.values()):
            raise RuntimeError("a sound store is taken for a damaged one")

    return plainly, compared


def label(group: store.Group, count: int) -> None:
    """Say what each frame is."""
    columns = (texts((count,), KEY), texts((count,), "s0"), np.arange(count), np.linspace(0, 1, count))
    dtypes = (str, str, "int32", "float64")
    write(
        group,
        {
            name: (column, dtype, (16384,), (schema.FRAME,))
            for name, column, dtype in zip(LABELS, columns, dtypes, strict=True)
        },
    )


def make_archive(path: Path) -> tuple[Read, Read]:
    """Write an ``matrix.zarr``; gives how it is read plainly, and how it is read and compared."""
    root = store.open_output(path, schema.MATRIX_STORE)
    group = root.require_group(KEY)
    count = TILE * TILES
    values = np.random.default_rng(1).random((count, count), np.float32)
    values = np.maximum(values, values.T)
    label(group, count)
    write(group, {"l2": (values, "float32", (TILE, TILE), schema.MATRIX_DIMS)})
    labels = labels_of_blocks(group, TILE)
    digest = texts((1, TILES, TILES), "")
    for i, j in np.argwhere(np.triu(np.ones((TILES, TILES), bool))).tolist():
        part = values[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE]
        identity = tile_identity(KEY, "l2", (i, j), labels[i], labels[j])
        digest[0, i, j] = digests.bind(identity, tile_texts("f" * 32, 0, 0), digests.hash_values(part))
    squares = ((1, TILES, TILES), schema.FINGERPRINT_DIMS)
    zeros = np.zeros((1, TILES, TILES), np.int32)
    write(
        group.require_group(schema.PROVENANCE),
        {
            schema.METRIC: (np.array(["l2"], dtype=object), str, (64,), (schema.METRIC,)),
            schema.SPECIFICATION: (specifications("l2"), str, (64,), (schema.METRIC,)),
            schema.FAILURE: (texts((1, count), ""), str, (1, TILE), (schema.METRIC, schema.FRAME)),
            schema.FINGERPRINT: (texts((1, TILES, TILES), "f" * 32), str, *squares),
            schema.DIGEST: (digest, str, *squares),
            schema.MISSING: (zeros, "int32", *squares),
            schema.UNRESOLVED: (zeros, "int32", *squares),
        },
    )

    def compared() -> None:
        matrix = CheckedMatrix(root, KEY, "l2")
        matrix.whole()
        if matrix.left_out:
            raise RuntimeError("a sound store is taken for a damaged one")

    def plainly() -> list[np.ndarray]:
        array = store.get_array(group, "l2")
        return [store.read(array, slice(start, start + TILE)) for start in range(0, count, TILE)]

    return plainly, compared


def make_embeddings(path: Path) -> tuple[Read, Read]:
    """Write an ``embeddings.zarr``; gives how it is read plainly, and how it is read and compared."""
    root = store.open_output(path, schema.EMBEDDINGS_STORE)
    group = root.require_group(KEY)
    store.set_attributes(group, {"metric": "lsim"})
    values = np.random.default_rng(2).random((2 * ROWS, VALUES), np.float32)
    label(group, len(values))
    write(group, {"features": (values, "float32", (ROWS, VALUES), (schema.FRAME, "feature"))})
    digest = texts((2,), "")
    for block, labels in enumerate(labels_of_blocks(group, ROWS)):
        identity = block_identity(KEY, "lsim", block, labels)
        of_values = digests.hash_values(values[block * ROWS : (block + 1) * ROWS])
        digest[block] = digests.bind(identity, block_texts("f" * 32, ["features"], ()), of_values)
    write(
        group.require_group(schema.PROVENANCE),
        {
            schema.FAILURE: (texts((2 * ROWS,), ""), str, (ROWS,), (schema.FRAME,)),
            schema.FINGERPRINT: (texts((2,), "f" * 32), str, (1,), ("block",)),
            schema.DIGEST: (digest, str, (1,), ("block",)),
        },
    )

    def plainly() -> None:
        array = store.get_array(group, "features")
        for block in range(2):
            store.read(array, slice(block * ROWS, (block + 1) * ROWS))

    def compared() -> None:
        embeddings = CheckedEmbeddings(root, KEY)
        for block in range(embeddings.count):
            embeddings.read(block)
        if embeddings.left_out:
            raise RuntimeError("a sound store is taken for a damaged one")

    return plainly, compared


def cpu_seconds(call: Read) -> float:
    """Time a call, in CPU seconds of this process: what else the machine does counts little."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(folder: Path, sequences: int, repeats: int) -> dict[str, Any]:
    """Read each store by turns; gives CPU seconds, and what the check adds as a share of reading."""
    stores = {
        "distances": make_distances(folder / "distances.zarr", sequences),
        "archive": make_archive(folder / "matrix.zarr"),
        "embeddings": make_embeddings(folder / "embeddings.zarr"),
    }
    result: dict[str, Any] = {"sequences": sequences, "metrics": len(METRICS)}
    for name, (plainly, compared) in stores.items():
        turns = [(cpu_seconds(plainly), cpu_seconds(compared)) for _ in range(repeats)]
        read, total = map(min, zip(*turns, strict=True))
        result[name] = {
            "cpu_seconds_read": round(read, 4),
            "cpu_seconds_read_and_compared": round(total, 4),
            "share_of_reading": round(total / read - 1, 3),
        }
    return result | {"machine": {"processor": processor(), "cpu_count": os.cpu_count()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sequences", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), arguments.sequences, arguments.repeats)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for name in ("distances", "archive", "embeddings"):
        read, share = result[name]["cpu_seconds_read"], result[name]["share_of_reading"]
        print(f"{name}: {read:.3f} s to read, {share:.0%} of that to compare")


if __name__ == "__main__":
    main()
