"""Minimum and maximum over a data set, by which scope ``"dataset"`` normalises all of its frames."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from lsim.preprocess import FramesError, Preprocessing, range_of
from pipeline.stage.bounded_map import run_bounded
from pipeline.storage import schema, store
from pipeline.storage.checked_frames import read_sequence
from pipeline.workers.cluster import Cluster

SAVED_EVERY_S = 60
"""Seconds between records of new ranges: a driver that is killed loses those since the last record."""

Range: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
"""Minimum and maximum per channel."""


def dataset_range(
    cluster: Cluster,
    frames: str,
    sequences: Sequence[tuple[str, int, str]],
    provenance: store.Group,
    preprocessing: Preprocessing,
) -> Range:
    """Compute minimum and maximum per channel over sequences of a ``frames.zarr``.

    Only sequences whose range is not recorded are read.

    Parameters
    ----------
    cluster : Cluster
        Cluster that reads the sequences.
    frames : str
        Path or address of the store for workers.
    sequences : sequence of (str, int, str)
        Field, row and content of each sequence.
    provenance : Group
        Provenance of the results, which records the range of each sequence by content.
    preprocessing : Preprocessing
        Preprocessing of frames, which precedes the range.

    Returns
    -------
    lo, hi : tuple of float
        ``(0.0,), (0.0,)`` if there are no valid values, or if metrics cannot take the frames' shape.
    """
    recorded = _recorded(provenance, preprocessing)
    ranges = {content: recorded[content] for _, _, content in sequences if content in recorded}
    missing = [
        (frames, key, row, preprocessing, content) for key, row, content in sequences if content not in ranges
    ]
    record_time = time.monotonic()
    try:
        for task, result, error in run_bounded(cluster.client if missing else None, sequence_range, missing):
            if isinstance(error, FramesError):
                return (0.0,), (0.0,)  # no metric can take this field: each will report why
            if isinstance(error, store.DamagedError):
                continue  # its block reports the damage
            if error is not None:
                raise error
            ranges[task[-1]] = result
            if time.monotonic() - record_time > SAVED_EVERY_S:
                _record(provenance, preprocessing, ranges)
                record_time = time.monotonic()
    finally:
        # Also when the run is stopped: reading all frames may have taken hours.
        if missing:
            _record(provenance, preprocessing, ranges)
    return _over_all(list(ranges.values()))


def recorded_range(
    sequences: Sequence[tuple[str, int, str]], provenance: store.Group, preprocessing: Preprocessing
) -> Range | None:
    """Return :func:`dataset_range` from records alone; None if a sequence has no record."""
    recorded = _recorded(provenance, preprocessing)
    ranges = [recorded.get(content) for _, _, content in sequences]
    return None if None in ranges else _over_all(ranges)


def _recorded(provenance: store.Group, preprocessing: Preprocessing) -> dict[str, Any]:
    """Read the recorded ranges by content."""
    name, label = _array_and_label(preprocessing)
    if name not in provenance:
        return {}
    text = str(store.read(store.get_array(provenance, name))[0])
    recorded: dict[str, Any] = json.loads(text) if text else {}
    return dict(recorded["ranges"]) if recorded.get("of") == label else {}


def _record(provenance: store.Group, preprocessing: Preprocessing, ranges: dict[str, Any]) -> None:
    """Record ranges in an array of one chunk, which is replaced as a whole.

    An attribute would make every task read the ranges of 10⁵ sequences with the metadata.
    """
    name, label = _array_and_label(preprocessing)
    if name not in provenance:
        store.create_array(provenance, name, shape=(1,), chunks=(1,), dims=(name,), dtype=str)
    text = json.dumps({"of": label, "ranges": ranges})
    store.write_rows(store.get_array(provenance, name), 0, np.array([text], object))


def _array_and_label(preprocessing: Preprocessing) -> tuple[str, str]:
    """Name the array of ranges, and the preprocessing for which its ranges are valid."""
    # The label contains the name, so that masked ranges are not taken for others if arrays are exchanged.
    name = schema.MASKED_RANGES if preprocessing.mask else schema.RANGES
    return name, f"{name}/{preprocessing.size}/{preprocessing.order}/{preprocessing.compat}"


def _over_all(ranges: Sequence[Any]) -> Range:
    lo, hi = (np.array([limits[side] for limits in ranges], float) for side in (0, 1))
    if np.isnan(lo).all():
        return (0.0,), (0.0,)  # no valid value at all: distances will be NaN for any range
    return tuple(np.nanmin(lo, axis=0).tolist()), tuple(np.nanmax(hi, axis=0).tolist())


def sequence_range(
    frames: str, key: str, row: int, settings: Preprocessing, content: str
) -> tuple[list[float | None], list[float | None]]:
    """Compute minimum and maximum per channel of one preprocessed sequence; None for no valid values.

    Runs on a worker. ``content`` is the expected hash of the frames.

    Raises
    ------
    DamagedError
        When the frames differ from those that were converted.
    """
    group = store.get_group(store.open_store(frames), key)
    lo, hi = (side.tolist() for side in range_of(read_sequence(group, row, content), settings))
    return [None if math.isnan(v) else v for v in lo], [None if math.isnan(v) else v for v in hi]
