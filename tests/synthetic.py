"""Small stores made on the spot, through the project's own store and schema, for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.storage import digests, recorded, schema, store
from pipeline.storage.checked_frames import content_hash

NOISE = {"good": 0.02, "fair": 0.15, "poor": 0.6}
"""Metrics of :func:`random_distances`: standard deviation of their noise, in steps of the parameter."""


def write_field(
    root: Any,
    key: str,
    sequences: Sequence[str],
    parameter: np.ndarray,
    matrices: Mapping[str, np.ndarray],
    failures: Mapping[tuple[str, str], str] | None = None,
    resolutions: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write one group of a ``distances.zarr``; ``failures`` maps (metric, sequence) to a reason.

    ``resolutions`` has by metric the text of each sequence; without it the group says nothing of rounding.
    """
    group = root.create_group(key, overwrite=True)
    arrays = {schema.SEQUENCE: ((schema.SEQUENCE,), np.array(sequences, dtype=object), str)}
    arrays[schema.PARAMETER] = (schema.PARAMETER_DIMS, np.asarray(parameter, np.float64), np.float64)
    for name, values in matrices.items():
        arrays[name] = (schema.DISTANCE_DIMS, np.asarray(values), values.dtype)
    _write(group, arrays)
    metrics = list(matrices)
    failure = [[(failures or {}).get((m, s), "") for s in sequences] for m in metrics]
    fingerprint = [[f"{key}/{m}/{s}" for s in sequences] for m in metrics]
    identities = digests.identify_rows(sequences, np.asarray(parameter, np.float64))
    texts = {schema.FAILURE: failure, schema.FINGERPRINT: fingerprint}
    if resolutions is not None:
        texts[schema.RESOLUTION] = [list(resolutions[metric]) for metric in metrics]
    digest = [
        [
            digests.bind(
                digests.identify(key, metric) + identity,
                {name: rows[k][row] for name, rows in texts.items()},
                digests.hash_values(np.asarray(matrices[metric])[row]),
            )
            for row, identity in enumerate(identities)
        ]
        for k, metric in enumerate(metrics)
    ]
    about = [{"name": m, "version": 1, "size": 224} for m in metrics]
    _write(
        group.create_group(schema.PROVENANCE),
        {
            schema.METRIC: ((schema.METRIC,), np.array(metrics, dtype=object), str),
            schema.SPECIFICATION: (
                (schema.METRIC,),
                _sealed(about, key, metrics),
                str,
            ),
            **{
                name: (schema.PROVENANCE_DIMS, np.array(rows, dtype=object), str)
                for name, rows in (texts | {schema.DIGEST: digest}).items()
            },
        },
    )


def _sealed(specifications: Sequence[Mapping[str, Any]], key: str, metrics: Sequence[str]) -> np.ndarray:
    """Specifications as provenance has them."""
    both = zip(specifications, metrics, strict=True)
    return np.array([json.dumps(digests.sealed(about, key, metric)) for about, metric in both], dtype=object)


def _write(group: Any, arrays: Mapping[str, tuple[tuple[str, ...], np.ndarray, Any]]) -> None:
    for name, (dims, values, dtype) in arrays.items():
        array = store.create_array(
            group, name, shape=values.shape, chunks=values.shape, dims=dims, dtype=dtype
        )
        if values.size:
            store.write_rows(array, 0, values)


def parameters(sequences: int, frames: int = 11) -> np.ndarray:
    """Evenly rising parameters of shape (sequence, frame)."""
    return np.tile(np.linspace(0, 1, frames), (sequences, 1))


def random_distances(parameter: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Symmetric matrices (sequence, frame, frame) that follow the parameter, but for noise."""
    rng = np.random.default_rng(seed)
    steps = np.abs(parameter[:, :, None] - parameter[:, None, :])
    upper = np.triu(np.abs(steps + noise * rng.normal(size=steps.shape)) + 1e-3, k=1)
    return upper + upper.swapaxes(1, 2)


def make_distances(
    path: Path,
    fields: Mapping[str, int],
    *,
    metrics: Mapping[str, float] = NOISE,
    frames: int = 11,
    seed: int = 0,
    attributes: Mapping[str, Any] | None = None,
) -> Path:
    """A ``distances.zarr`` with the given number of sequences in each ``<dataset>/<field>``."""
    root = store.open_store(path, "a")
    for k, (key, count) in enumerate(fields.items()):
        parameter = parameters(count, frames)
        matrices = {
            name: random_distances(parameter, noise, seed=1000 * seed + 100 * k + m)
            for m, (name, noise) in enumerate(metrics.items())
        }
        names = [f"{key.split('/')[0].lower()}{n}" for n in range(count)]
        write_field(root, key, names, parameter, matrices)
    datasets = list(dict.fromkeys(key.split("/")[0] for key in fields))
    store.set_attributes(root, {"datasets": datasets, "pairs": "all", "pools": {}, **(attributes or {})})
    return path


def make_frames(path: Path, fields: Mapping[str, tuple[int, str, int]], *, frames: int = 11) -> Path:
    """A ``frames.zarr`` of travelling waves: per ``<dataset>/<field>`` count, dtype and channels."""
    root = store.open_store(path, "a")
    for k, (key, (count, dtype, channels)) in enumerate(fields.items()):
        y, x = np.mgrid[0:48, 0:64] / 64
        rng = np.random.default_rng(k)
        phase = rng.uniform(0, 6, (count, 1, channels)) + np.linspace(0, 2, frames)[None, :, None]
        waves = np.sin(9 * x[..., None] + 5 * y[..., None] + phase[:, :, None, None, :])
        values = (127.5 * (1 + waves)).astype(dtype) if dtype == "uint8" else (40 * waves).astype(dtype)
        group = root.create_group(key)
        sequences = np.array([f"{key.split('/')[0].lower()}{n}" for n in range(count)], dtype=object)
        parameter = parameters(count, frames)
        contents = np.array([content_hash(*both) for both in zip(values, parameter, strict=True)], object)
        _write(
            group,
            {
                schema.SEQUENCE: ((schema.SEQUENCE,), sequences, str),
                schema.CONTENT: ((schema.SEQUENCE,), contents, str),
                schema.PARAMETER: (schema.PARAMETER_DIMS, parameter, np.float64),
                schema.FRAMES: (schema.FRAMES_DIMS, values, values.dtype),
            },
        )
    return path


def make_matrix(
    path: Path,
    matrices: Mapping[str, Mapping[str, int]],
    *,
    metrics: Sequence[str] = ("good", "lsim"),
    frames: int = 11,
    tile: int = 16,
    failures: Mapping[str, str] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> Path:
    """A ``matrix.zarr`` of frames on planar curves, so that distances by every metric are Euclidean.

    ``matrices`` has by group the number of sequences of each ``<dataset>/<field>`` in it; ``failures`` the
    reason, by name, of frames that have no distances. The metrics have scales of their own: 1, 2, ….
    """
    root = store.open_store(path, "a")
    store.set_attributes(root, {"kind": schema.MATRIX_STORE, "schema_version": schema.SCHEMA_VERSION})
    for key, fields in matrices.items():
        points, names = [], []
        for field, count in fields.items():
            for n in range(count):
                turn = np.linspace(0, 1.5, frames)[:, None] + n
                curve = np.concatenate([np.cos(turn), np.sin(turn)], axis=1) * (1 + 0.2 * n)
                points.append(curve + 3 * list(fields).index(field))
                names += [(field, f"{field.split('/')[0].lower()}{n}", k) for k in range(frames)]
        at = np.concatenate(points)
        reasons = [(failures or {}).get(f"{field}/{sequence}:{k}", "") for field, sequence, k in names]
        there = np.array([not reason for reason in reasons])
        distances = np.sqrt(((at[:, None] - at[None]) ** 2).sum(axis=-1)).astype(np.float32)
        distances[~there] = distances[:, ~there] = np.nan
        np.fill_diagonal(distances, 0)
        group = root.require_group(key)
        columns = {
            schema.FIELD: ([name[0] for name in names], object, str),
            schema.SEQUENCE: ([name[1] for name in names], object, str),
            schema.NUMBER: ([name[2] for name in names], np.int32, np.int32),
            schema.PARAMETER: ([name[2] / (frames - 1) for name in names], np.float64, np.float64),
        }
        arrays = {
            name: ((schema.FRAME,), np.array(values, dtype), kind)
            for name, (values, dtype, kind) in columns.items()
        }
        _write(group, arrays)
        for scale, metric in enumerate(metrics, start=1):
            array = store.create_array(
                group,
                metric,
                shape=distances.shape,
                chunks=(tile, tile),
                dims=schema.MATRIX_DIMS,
                dtype="float32",
            )
            store.write_rows(array, 0, scale * distances)
        record_matrices(path, key, reasons)
        store.set_attributes(group, {"groups": list(fields), "scope": "dataset"})
    store.set_attributes(root, {"runs": [], **(attributes or {})})
    return path


def record_matrices(path: Path, key: str, reasons: Sequence[str] | None = None) -> None:
    """Write the provenance of a group of a ``matrix.zarr`` anew, for the matrices and labels that it has.

    ``reasons`` say why frames have no distances; default none.
    """
    group = store.open_store(path, "r+")[key]
    metrics = sorted(schema.matrix_metric_names(group.array_keys()))
    tile = group[metrics[0]].chunks[0]
    labels = recorded.labels_of_blocks(group, tile)
    reasons = reasons or [""] * group[schema.NUMBER].shape[0]
    fingerprints = np.full((len(metrics), len(labels), len(labels)), "", object)
    sealed = fingerprints.copy()
    for place, metric in enumerate(metrics):
        values = store.read(group[metric])
        for i, j in zip(*np.triu_indices(len(labels)), strict=True):
            rows, columns = (slice(k * tile, (k + 1) * tile) for k in (i, j))
            fingerprints[place, i, j] = f"{metric} {i} {j}"
            texts = recorded.tile_texts(f"{metric} {i} {j}", 0, 0, reasons[rows] if i == j else ())
            identity = recorded.tile_identity(key, metric, (int(i), int(j)), labels[i], labels[j])
            sealed[place, i, j] = digests.bind(identity, texts, digests.hash_values(values[rows, columns]))
    about = [{"metric": metric, "scope": [0, 1]} for metric in metrics]
    of_frames = np.array([list(reasons)] * len(metrics), object)
    _write(
        store.create_group(group, schema.PROVENANCE),
        {
            schema.METRIC: ((schema.METRIC,), np.array(metrics, object), str),
            schema.SPECIFICATION: ((schema.METRIC,), _sealed(about, key, metrics), str),
            schema.FAILURE: ((schema.METRIC, schema.FRAME), of_frames, str),
            schema.FINGERPRINT: (schema.FINGERPRINT_DIMS, fingerprints, str),
            schema.DIGEST: (schema.FINGERPRINT_DIMS, sealed, str),
            schema.MISSING: (schema.FINGERPRINT_DIMS, np.zeros(sealed.shape, np.int32), np.int32),
            schema.UNRESOLVED: (schema.FINGERPRINT_DIMS, np.zeros(sealed.shape, np.int32), np.int32),
        },
    )
