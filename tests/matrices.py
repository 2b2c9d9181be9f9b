"""Small frames.zarr archives for tests of what computes distances from them."""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.storage import schema, store
from pipeline.storage.checked_frames import content_hash


def smooth_sequence(seed: int, frames: int = 5, size: int = 40, channels: int = 1) -> np.ndarray:
    """A random smooth field drifting away from itself: (frame, y, x, channel) float32."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    out = np.zeros((frames, size, size, channels), np.float32)
    for k in range(frames):
        for c in range(channels):
            waves = rng.normal(size=4) * 0.3
            out[k, ..., c] = np.sin(7 * x + seed + 0.2 * k) * np.cos(5 * y - c + 0.1 * k * waves[0])
    return out + 0.05 * rng.normal(size=out.shape).astype(np.float32)


@functools.cache
def _templates() -> tempfile.TemporaryDirectory[str]:
    """Archives that this process has written, by what they hold; gone with it."""
    return tempfile.TemporaryDirectory(prefix="archives-")


def write_archive(path: Path, fields: Mapping[str, Mapping[str, np.ndarray]]) -> Path:
    """A frames.zarr with the given sequences in each ``<dataset>/<field>``, made anew.

    What was written before is copied, which takes a tenth of the time.
    """
    held = hashlib.sha256()
    for key, sequences in fields.items():
        for name, frames in sequences.items():
            held.update(repr((key, name, frames.shape, frames.dtype)).encode() + frames.tobytes())
    template = Path(_templates().name, held.hexdigest())
    if not template.exists():
        _write(template, fields)
    shutil.rmtree(path, ignore_errors=True)
    return shutil.copytree(template, path, copy_function=shutil.copyfile)


def _write(path: Path, fields: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    root = store.open_store(path, "a")
    for key, sequences in fields.items():
        group = root.require_group(key)
        frames = np.stack(list(sequences.values()))
        count, n = frames.shape[:2]
        parameter = np.tile(np.linspace(0, 1, n), (count, 1))
        contents = [content_hash(*of_sequence) for of_sequence in zip(frames, parameter, strict=True)]
        arrays = {
            schema.FRAMES: (frames, schema.FRAMES_DIMS, frames.dtype, (1, 1, *frames.shape[2:])),
            schema.PARAMETER: (parameter, schema.PARAMETER_DIMS, "float64", (count, n)),
            schema.SEQUENCE: (np.array(list(sequences), object), (schema.SEQUENCE,), str, (count,)),
            schema.CONTENT: (np.array(contents, object), (schema.SEQUENCE,), str, (count,)),
        }
        for name, (values, dims, dtype, chunks) in arrays.items():
            array = store.create_array(group, name, shape=values.shape, chunks=chunks, dims=dims, dtype=dtype)
            store.write_rows(array, 0, values)


def archive_of(
    count: int, *, key: str = "A/density", start: int = 0, **options: int
) -> dict[str, dict[str, np.ndarray]]:
    """``count`` sequences s0, s1, … under one key."""
    return {key: {f"s{k}": smooth_sequence(k, **options) for k in range(start, start + count)}}


def matrices_of(path: Path, key: str = "A/density") -> dict[str, np.ndarray]:
    """All distance matrices of a field by metric."""
    dataset = store.open_dataset(path, key)
    return {name: dataset[name].values for name in schema.metric_names(map(str, dataset.variables))}
