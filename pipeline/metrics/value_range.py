"""Minimum and maximum over a data set: the scope that all of its frames are normalised by."""

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
"""How often the ranges that are known are recorded: a driver that is killed loses what came since."""

Range: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
"""Minimum and maximum per channel."""


def dataset_range(
    cluster: Cluster,
    frames: str,
    sequences: Sequence[tuple[str, int, str]],
    provenance: store.Group,
    preprocessing: Preprocessing,
) -> Range:
    """Minimum and maximum per channel over sequences of a ``frames.zarr``; known ones aren't read again.

    Parameters
    ----------
    cluster : Cluster
        Reads what isn't known.
    frames : str
        Where workers find the store.
    sequences : sequence of (str, int, str)
        Key of the field, row and content of each.
    provenance : Group
        Of the results: it keeps the range of every sequence, by content.
    preprocessing : Preprocessing
        Ranges are those of frames as metrics take them.

    Returns
    -------
    lo, hi : tuple of float
        ``(0.0,), (0.0,)`` where no frame counts, or none has a shape that a metric takes.
    """
    known = _recorded(provenance, preprocessing)
    ranges = {content: known[content] for _, _, content in sequences if content in known}
    missing = [
        (frames, key, row, preprocessing, content) for key, row, content in sequences if content not in ranges
    ]
    saved = time.monotonic()
    try:
        for task, result, error in run_bounded(cluster.client if missing else None, sequence_range, missing):
            if isinstance(error, FramesError):
                return (0.0,), (0.0,)  # no metric can take this field: each will say why
            if isinstance(error, store.DamagedError):
                continue  # quarantined: its block says so
            if error is not None:
                raise error
            ranges[task[-1]] = result
            if time.monotonic() - saved > SAVED_EVERY_S:
                _record(provenance, preprocessing, ranges)
                saved = time.monotonic()
    finally:
        # Also of a run that is stopped: reading all frames may have taken hours.
        if missing:
            _record(provenance, preprocessing, ranges)
    return _over_all(list(ranges.values()))


def recorded_range(
    sequences: Sequence[tuple[str, int, str]], provenance: store.Group, preprocessing: Preprocessing
) -> Range | None:
    """:func:`dataset_range` where it is known without reading a frame, else None."""
    known = _recorded(provenance, preprocessing)
    contents = [content for _, _, content in sequences]
    return _over_all([known[c] for c in contents]) if all(c in known for c in contents) else None


def _recorded(provenance: store.Group, preprocessing: Preprocessing) -> dict[str, Any]:
    """Known ranges by content."""
    name, label = _recorded_under(preprocessing)
    if name not in provenance:
        return {}
    text = str(store.read(store.get_array(provenance, name))[0])
    recorded: dict[str, Any] = json.loads(text) if text else {}
    return dict(recorded["ranges"]) if recorded.get("of") == label else {}


def _record(provenance: store.Group, preprocessing: Preprocessing, ranges: dict[str, Any]) -> None:
    """Keep ranges in one chunk, which is replaced as a whole.

    No attribute: every task would read the ranges of 10⁵ sequences with the metadata.
    """
    name, label = _recorded_under(preprocessing)
    if name not in provenance:
        store.create_array(provenance, name, shape=(1,), chunks=(1,), dims=(name,), dtype=str)
    text = json.dumps({"of": label, "ranges": ranges})
    store.write_rows(store.get_array(provenance, name), 0, np.array([text], object))


def _recorded_under(preprocessing: Preprocessing) -> tuple[str, str]:
    """The array that has ranges, and what they have to be of."""
    # With the array's own name: ranges of the other one are not taken for these.
    name = schema.MASKED_RANGES if preprocessing.mask else schema.RANGES
    return name, f"{name}/{preprocessing.size}/{preprocessing.order}/{preprocessing.compat}"


def _over_all(ranges: Sequence[Any]) -> Range:
    lo, hi = (np.array([found[side] for found in ranges], float) for side in (0, 1))
    if np.isnan(lo).all():
        return (0.0,), (0.0,)  # nothing counts in any sequence: distances will be NaN whatever the range
    return tuple(np.nanmin(lo, axis=0).tolist()), tuple(np.nanmax(hi, axis=0).tolist())


def sequence_range(
    frames: str, key: str, row: int, settings: Preprocessing, content: str
) -> tuple[list[float | None], list[float | None]]:
    """Minimum and maximum per channel of one sequence as metrics take them; None where nothing counts.

    Runs on a worker. ``content`` says whose they are.

    Raises
    ------
    DamagedError
        When its frames are not those that were converted.
    """
    group = store.get_group(store.open_store(frames), key)
    lo, hi = (side.tolist() for side in range_of(read_sequence(group, row, content), settings))
    return [None if math.isnan(v) else v for v in lo], [None if math.isnan(v) else v for v in hi]
