"""Read what the report shows from the folder of results and the stores that it names."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xxhash

from pipeline.correlate import statistics
from pipeline.storage import metadata, schema, store
from pipeline.storage.address import absolute, resolve
from pipeline.storage.checked_frames import check_bound, read_sequence
from pipeline.storage.digests import is_sealed
from pipeline.storage.recorded import check_rows

SHOWN_FRAMES = 11
"""Frames of a sequence that are shown."""


class ReportError(ValueError):
    """A report that cannot be written, with the reason."""


@dataclass(frozen=True)
class Stores:
    """The distances that results were computed from, and their frames where they exist.

    Attributes
    ----------
    distances : str
        Path or address.
    root : Group
        Of the distances.
    attributes : dict
        Root attributes of the distances.
    dataset_attributes : dict of str to dict
        Attributes of each data set's group in the distances.
    frames : str or None
        Path or address.
    missing_frames : str
        Why there are no pictures of frames; empty where there are.
    frames_attributes, frames_dataset_attributes : dict
        The same of the frames; empty without frames.
    """

    distances: str
    root: store.Group
    attributes: dict[str, Any]
    dataset_attributes: dict[str, dict[str, Any]]
    frames: str | None
    missing_frames: str
    frames_attributes: dict[str, Any]
    frames_dataset_attributes: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Field:
    """One group of ``distances.zarr`` with what the report draws of it.

    Attributes
    ----------
    key, dataset, field : str
    sequences : list of str
    targets : ndarray of shape (sequence, pair)
        Ground truth.
    predictions : dict of str to ndarray of shape (sequence, pair)
        Scaled distances by metric; NaN for sequences that are left out.
    ranked : dict of str to ndarray of shape (sequence,)
        Each sequence's own correlation, by metric.
    matrices : dict of str to ndarray of shape (sequence, frame, frame)
    """

    key: str
    dataset: str
    field: str
    sequences: list[str]
    targets: np.ndarray
    predictions: dict[str, np.ndarray]
    ranked: dict[str, np.ndarray]
    matrices: dict[str, np.ndarray]


@dataclass(frozen=True)
class Strip:
    """Frames of one sequence to show, with their parameters; without frames where they are missing."""

    dataset: str
    field: str
    sequence: str
    frames: np.ndarray | None
    positions: list[int]
    parameters: list[float]
    sizes: str


def read_record(results: str, folder: Path) -> dict[str, Any]:
    """Read what correlate recorded of its results, and compare its files with that.

    Raises
    ------
    ReportError
        When there is no record, or it or a file beside it differs from what correlate wrote.
    """
    advice = f"run 'lsim correlate DISTANCES --out {results}'"
    try:
        record: dict[str, Any] = json.loads((folder / "correlations.json").read_text())
    except FileNotFoundError as error:
        raise ReportError(f"{results}: no correlations.json here; {advice} first") from error
    except ValueError as error:
        raise ReportError(f"{results}: correlations.json cannot be read ({error}); {advice} again") from error
    if not isinstance(record, dict) or not is_sealed(record):
        raise ReportError(f"{results}: correlations.json is not as correlate wrote it; {advice} again")
    for name, digest in record["outputs"].items():
        file = folder / name
        if not file.exists() or xxhash.xxh3_128_hexdigest(file.read_bytes()) != digest:
            state = "not as correlate wrote it" if file.exists() else "missing"
            raise ReportError(f"{results}: {name} is {state}; {advice} again")
    return record


def open_stores(results: str, record: dict[str, Any]) -> Stores:
    """Open the distances that a record of results names, and their frames.

    Raises
    ------
    ReportError
        When there are no distances at the recorded place.
    """
    distances = resolve(record["distances"], results)
    if not store.exists(distances):
        raise ReportError(
            f"{results}/correlations.json names its distances as {record['distances']}, and there is nothing "
            "there; keep both folders in the same places to one another, or run correlate again"
        )
    root = store.open_store(distances)
    metadata.check_documents(root)
    attributes: dict[str, Any] = dict(root.attrs)
    frames, missing_frames = find_frames(distances, attributes)
    return Stores(
        distances=distances,
        root=root,
        attributes=attributes,
        dataset_attributes=_attributes_by_dataset(distances),
        frames=frames,
        missing_frames=missing_frames,
        frames_attributes=dict(store.open_store(frames).attrs) if frames else {},
        frames_dataset_attributes=_attributes_by_dataset(frames) if frames else {},
    )


def find_frames(distances: str | os.PathLike[str], attributes: dict[str, Any]) -> tuple[str | None, str]:
    """Find the ``frames.zarr`` that distances name; without it, say why there are no pictures of frames.

    Raises
    ------
    pipeline.storage.store.DamagedError
        When metadata of that store is damaged.
    """
    name = attributes.get("frames")
    if not name:
        return None, "The distances don't say which frames they were computed from."
    path = resolve(str(name), absolute(distances))
    if not store.exists(path):
        return None, f"The frames were at {name} beside the distances, and are there no more."
    metadata.check_documents(store.open_store(path))
    return path, ""


def _attributes_by_dataset(path: str) -> dict[str, dict[str, Any]]:
    return {name: dict(group.attrs) for name, group in store.open_store(path).groups()}


def read_fields(
    stores: Stores, metrics: list[str], protocol: str, omissions: pd.DataFrame
) -> tuple[list[Field], list[str]]:
    """Read what is drawn of each field, and name its damaged distances, which are left out."""
    of_protocol = omissions[omissions.protocol == protocol]
    columns = (of_protocol.dataset, of_protocol.field, of_protocol.sequence, of_protocol.metric)
    exclusions = set(zip(*columns, strict=True))
    fields, damaged = [], []
    for key in store.field_keys(stores.root, schema.PARAMETER):
        field, damage = _read_field(stores, key, metrics, protocol, exclusions)
        fields.append(field)
        damaged += damage
    return fields, damaged


def _read_field(
    stores: Stores, key: str, metrics: list[str], protocol: str, exclusions: set[tuple[str, str, str, str]]
) -> tuple[Field, list[str]]:
    """Read one field; ``exclusions`` holds (dataset, field, sequence, metric) that figures leave out."""
    group = store.load_dataset(stores.distances, key)
    dataset, name = key.split("/")
    sequences = [str(sequence) for sequence in group[schema.SEQUENCE].values]
    pairs = statistics.PAIRS[protocol](group.sizes[schema.FRAME])
    targets = statistics.ground_truth(group[schema.PARAMETER].values, pairs)
    matrices = {metric: group[metric].values for metric in metrics if metric in group}
    check = check_rows(stores.root, key, matrices)
    predictions, ranked = {}, {}
    for metric, values in matrices.items():
        usable = np.array(
            [(dataset, name, sequence, metric) not in exclusions for sequence in sequences], dtype=bool
        )
        if metric in check.damaged:
            values[check.damaged[metric]] = np.nan
            usable &= ~check.damaged[metric]
        scaled = np.full(targets.shape, np.nan)
        if usable.any():
            scaled[usable] = statistics.scale(statistics.select_pairs(values[usable], pairs))
        predictions[metric] = scaled
        ranked[metric] = statistics.sequence_correlations(scaled, targets, "spearman")
    field = Field(key, dataset, name, sequences, targets, predictions, ranked, matrices)
    return field, check.list_damaged(key, sequences)


def read_strip(frames: str | None, key: str, sequence: str) -> Strip:
    """Read up to :data:`SHOWN_FRAMES` frames of a sequence, evenly spaced, first and last among them."""
    dataset, field = key.split("/")
    missing = Strip(dataset, field, sequence, None, [], [], "")
    if frames is None or key not in store.field_keys(store.open_store(frames), schema.FRAMES):
        return missing
    group = store.load_dataset(frames, key, (schema.SEQUENCE, schema.PARAMETER, schema.CONTENT))
    names = [str(name) for name in group[schema.SEQUENCE].values]
    if sequence not in names:
        return missing
    row, count = names.index(sequence), group.sizes[schema.FRAME]
    positions = np.unique(np.linspace(0, count - 1, min(count, SHOWN_FRAMES)).round().astype(int))
    array = group[schema.FRAMES]
    stored = store.get_group(store.open_store(frames), key)
    check_bound(stored)
    values = read_sequence(stored, row, str(group[schema.CONTENT].values[row]))
    return Strip(
        dataset=dataset,
        field=field,
        sequence=sequence,
        frames=values[positions],
        positions=positions.tolist(),
        parameters=group[schema.PARAMETER].values[row, positions].tolist(),
        sizes=f"{array.sizes['y']} × {array.sizes['x']} × {array.sizes['channel']}, {array.dtype}",
    )
