"""Work on one shard of ``frames.zarr``: assemble its rows, then commit them.

Workers run this for :mod:`pipeline.convert`, whose documentation explains the order of writes. Knows no Dask.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pipeline.convert.decode import Decode, Decoded, FieldForm, Outcome, decode_sequence
from pipeline.storage import schema, store
from pipeline.storage.digests import sealed

COLUMNS = (schema.CONTENT, schema.SOURCE, schema.SEQUENCE, schema.PARAMETER, schema.FRAMES)
"""All arrays of a field, in the order in which they shrink: `content` first."""


@dataclass(frozen=True)
class Keep:
    """A row that stays as it is."""


@dataclass(frozen=True)
class Move:
    """A row that becomes a copy of row ``origin``."""

    origin: int


RowSource = Keep | Decode | Move


@dataclass(frozen=True)
class ShardTask:
    """One whole shard of a field: rows from ``start`` on, and the source of each."""

    path: str
    key: str
    folder: str
    start: int
    rows: tuple[RowSource, ...]


@dataclass(frozen=True)
class Opening:
    """A field to create, with the sources of all its rows."""

    path: str
    key: str
    folder: str
    rows: tuple[Decode, ...]


@dataclass
class _Rows:
    """Rows of one shard as they are to be written.

    ``columns`` holds the small arrays by name, ``frames`` a block of the whole shard once a row's frames
    change, ``uncommitted`` the places within the shard whose frames or record belong to another content.
    """

    columns: dict[str, np.ndarray]
    shape: tuple[int, ...]
    dtype: np.dtype
    frames: np.ndarray | None = None
    uncommitted: list[int] = field(default_factory=list)

    def put(self, place: int, key: str, result: Decoded | Outcome) -> Outcome:
        """Put the result of decoding a row in its place."""
        outcome = result.outcome if isinstance(result, Decoded) else result
        record = sealed(outcome.record, key, outcome.sequence, outcome.content)
        self.columns[schema.SOURCE][place] = json.dumps(record)
        self.columns[schema.CONTENT][place] = outcome.content
        if outcome.committed_before:
            return outcome
        self.uncommitted.append(place)
        if isinstance(result, Decoded):
            self.columns[schema.PARAMETER][place] = result.parameter
            self._put_frames(place, result.frames)
        return outcome

    def copy(self, place: int, arrays: Mapping[str, store.Array], origin: int) -> None:
        """Copy another row of the field to a place."""
        self.uncommitted.append(place)
        values = {name: store.read(array, slice(origin, origin + 1))[0] for name, array in arrays.items()}
        self._put_frames(place, values.pop(schema.FRAMES))
        for name, value in values.items():
            self.columns[name][place] = value

    def _put_frames(self, place: int, values: np.ndarray) -> None:
        if self.frames is None:
            self.frames = np.zeros(self.shape, self.dtype)
        self.frames[place] = values


def convert_shard(task: ShardTask, decoded: Mapping[int, Decoded] | None = None) -> list[Outcome]:
    """Bring one shard to the state that its rows' sources describe.

    Parameters
    ----------
    task : ShardTask
    decoded : mapping of int to Decoded, optional
        Rows that are decoded already.

    Returns
    -------
    list of Outcome
        One for each row that was to be decoded.
    """
    group = store.get_group(store.open_store(task.path, "r+"), task.key)
    arrays = {name: store.get_array(group, name) for name in COLUMNS}
    frames = arrays[schema.FRAMES]
    span = slice(task.start, task.start + len(task.rows))
    stored_columns = {
        name: store.read(array, span) for name, array in arrays.items() if name != schema.FRAMES
    }
    rows = _Rows(
        columns={name: values.copy() for name, values in stored_columns.items()},
        shape=(len(task.rows), *frames.shape[1:]),
        dtype=frames.dtype,
    )
    outcomes = _assemble(task, rows, arrays, FieldForm.of(group), decoded or {})
    _commit(task.start, rows, arrays, stored_columns)
    return outcomes


def _assemble(
    task: ShardTask,
    rows: _Rows,
    arrays: Mapping[str, store.Array],
    form: FieldForm,
    decoded: Mapping[int, Decoded],
) -> list[Outcome]:
    """Fill the rows of a shard from their sources, in memory; list the outcomes of decoding."""
    outcomes = []
    for place, source in enumerate(task.rows):
        row = task.start + place
        if isinstance(source, Move):
            rows.copy(place, arrays, source.origin)
        elif isinstance(source, Decode):
            result = decoded.get(row) or decode_sequence(source, row, task.folder, form)
            outcomes.append(rows.put(place, task.key, result))
    return outcomes


def _commit(
    start: int, rows: _Rows, arrays: Mapping[str, store.Array], stored_columns: Mapping[str, np.ndarray]
) -> None:
    """Write the rows of a shard; at no moment is a row committed whose record belongs to other frames."""
    # 1. Rows that change count as uncommitted before any of their values is overwritten.
    content = stored_columns[schema.CONTENT].copy()
    if any(content[rows.uncommitted] != ""):
        content[rows.uncommitted] = ""
        store.write_rows(arrays[schema.CONTENT], start, content)
    # 2. A shard is written as a whole, so the frames of rows that stay are read and written again.
    if rows.frames is not None:
        for place in np.flatnonzero(content != ""):
            rows.frames[place] = store.read(arrays[schema.FRAMES], start + int(place))
        store.write_rows(arrays[schema.FRAMES], start, rows.frames)
    # 3. `content` comes last: it commits the others.
    for name in (schema.PARAMETER, schema.SEQUENCE, schema.SOURCE, schema.CONTENT):
        if rows.uncommitted or not np.array_equal(rows.columns[name], stored_columns[name]):
            store.write_rows(arrays[name], start, rows.columns[name])


# -- new fields --------------------------------------------------------------------------------------------


def open_field(task: Opening) -> list[Outcome]:
    """Create a field in the form of its first good sequence, and commit that sequence.

    Returns
    -------
    list of Outcome
        Of the sequences up to the first good one. Where none is good, no field is created.
    """
    outcomes: list[Outcome] = []
    for row, source in enumerate(task.rows):
        result = decode_sequence(source, row, task.folder, form=None)
        if isinstance(result, Decoded):
            return outcomes + _create_and_commit(task, result)
        outcomes.append(result)
    return outcomes


def _create_and_commit(task: Opening, first: Decoded) -> list[Outcome]:
    """Create a field and commit its first good sequence, which is decoded only once this way."""
    rows_per_shard = _create_field(task, first)
    row = first.outcome.row
    start = row - row % rows_per_shard
    sources: list[RowSource] = [Keep() for _ in task.rows[start : start + rows_per_shard]]
    sources[row - start] = task.rows[row]
    shard = ShardTask(task.path, task.key, task.folder, start, tuple(sources))
    return convert_shard(shard, {row: first})


def _create_field(task: Opening, first: Decoded) -> int:
    """Create the arrays of a field, with the names of its sequences; return the number of rows in a shard."""
    count, (frames, height, width, channels) = len(task.rows), first.frames.shape
    rows = store.rows_per_shard(frames, first.frames[0].nbytes)
    group = store.create_group(store.open_store(task.path, "r+"), task.key)
    store.create_array(
        group,
        schema.FRAMES,
        shape=(count, frames, height, width, channels),
        chunks=(1, 1, height, width, channels),
        shards=(rows, frames, height, width, channels),
        dims=schema.FRAMES_DIMS,
        dtype=first.frames.dtype,
        fill_value=0,
    ).update_attributes(task.rows[first.outcome.row].sequence.attributes)
    store.create_array(
        group,
        schema.PARAMETER,
        shape=(count, frames),
        chunks=(rows, frames),
        dims=schema.PARAMETER_DIMS,
        dtype=np.float64,
    )
    if first.weights is not None:
        shape = first.weights.shape
        array = store.create_array(
            group, schema.WEIGHTS, shape=shape, chunks=shape, dims=schema.WEIGHTS_DIMS, dtype=np.float64
        )
        store.write_rows(array, 0, first.weights)
    # `content` last: a field that has it counts as created.
    for name in (schema.SEQUENCE, schema.SOURCE, schema.CONTENT):
        column = store.create_array(
            group, name, shape=(count,), chunks=(rows,), dims=(schema.SEQUENCE,), dtype=str
        )
        if name == schema.SEQUENCE:
            store.write_rows(column, 0, np.array([row.sequence.name for row in task.rows], dtype=object))
    return rows
