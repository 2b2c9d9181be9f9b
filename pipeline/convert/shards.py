"""Work on one shard of ``frames.zarr``: decode, keep or move its rows, and commit them.

What a worker does for :mod:`pipeline.convert`; why it is done in this order stands there. Knows no Dask.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from pipeline.sources.readers import LazySequence, ReaderError, TooLargeError
from pipeline.sources.readers.base import FIRST_VERSION, checked_weights
from pipeline.storage import schema, store
from pipeline.storage.checked_frames import content_hash, hash_weights, stored_weights
from pipeline.storage.digests import sealed

COLUMNS = (schema.CONTENT, schema.SOURCE, schema.SEQUENCE, schema.PARAMETER, schema.FRAMES)
"""All arrays of a field, `content` first: so they shrink."""

REASON_CHARACTERS = 2000
"""What is kept of the reason of a failure: it may list all that a file holds."""


@dataclass(frozen=True)
class Keep:
    """The row stays as it is."""


@dataclass(frozen=True)
class Decode:
    """The row is decoded; ``record`` and ``content`` are what stands there now, if anything does.

    Where ``hash_files``, equal bytes of the files are enough, but for ``verify``: then it is decoded anyway.
    """

    sequence: LazySequence
    record: dict[str, Any] = field(default_factory=dict)
    content: str = ""
    hash_files: bool = True
    verify: bool = False


@dataclass(frozen=True)
class Move:
    """The row becomes what row ``origin`` is."""

    origin: int


RowSource = Keep | Decode | Move


@dataclass
class Outcome:
    """What became of one sequence that a task looked at."""

    sequence: str
    row: int
    content: str
    record: dict[str, Any]
    nbytes: int = 0
    committed_before: bool = False

    @property
    def failed(self) -> bool:
        return "reason" in self.record


def describe(sequence: LazySequence, folder: str) -> dict[str, Any]:
    """What decides the outcome of reading a sequence, as far as a look at the files tells."""
    top = folder if os.path.isdir(folder) else os.path.dirname(folder)
    return {
        "decoder": type(sequence).__qualname__,
        "code": sequence.code,
        "settings": json.loads(json.dumps(sequence.settings)),
        "missing": sequence.missing,
        # Relative, so that an archive may be moved as a whole.
        "files": [[os.path.relpath(f.path, top), f.size, f.mtime_ns, f.mark] for f in sequence.files],
    }


def same_look(record: dict[str, Any], look: dict[str, Any]) -> bool:
    """Whether a record was made of what :func:`describe` sees now."""
    # Those of earlier versions don't say; nor do their files have marks, so they are all looked into once.
    record = {"missing": "quarantine", "code": FIRST_VERSION} | record
    return all(record.get(key) == value for key, value in look.items())


def _same_but_time(record: dict[str, Any], look: dict[str, Any]) -> bool:
    """Whether nothing else has changed than times and marks of files."""
    timeless = {"files": [file[:2] for file in look["files"]]}
    return same_look({**record, "files": [file[:2] for file in record.get("files", [])]}, look | timeless)


def _hash_files(sequence: LazySequence) -> str:
    """xxh3 of the bytes of all files of a sequence, in order, each with its length."""
    digest = xxhash.xxh3_128()
    for file in sequence.files:
        digest.update(f"{os.path.basename(file.path)} {file.size}\n".encode())
        with open(file.path, "rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


# -- tasks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardTask:
    """Rows ``start …`` of one field, a whole shard, and where each comes from."""

    path: str
    key: str
    folder: str
    start: int
    rows: tuple[RowSource, ...]


@dataclass(frozen=True)
class Opening:
    """A field that isn't there yet: all its rows."""

    path: str
    key: str
    folder: str
    rows: tuple[Decode, ...]


@dataclass(frozen=True)
class _Field:
    """What all sequences of a field have in common; ``weights`` is the hash of those of its pixels."""

    shape: tuple[int, ...]
    dtype: np.dtype
    weights: str

    @classmethod
    def of(cls, group: store.Group) -> _Field:
        """Look at a field that is there."""
        frames, weights = store.get_array(group, schema.FRAMES), stored_weights(group)
        return cls(tuple(frames.shape[1:]), frames.dtype, "" if weights is None else hash_weights(weights))


@dataclass
class _Decoded:
    outcome: Outcome
    frames: np.ndarray
    parameter: np.ndarray
    weights: np.ndarray | None


def open_field(task: Opening) -> list[Outcome]:
    """Create a field after its first good sequence, and commit that sequence, so that it is decoded once.

    The sequences before it have failed. Where none is good nothing is created.
    """
    failed: list[Outcome] = []
    first: _Decoded | None = None
    for row, source in enumerate(task.rows):
        result = _read_sequence(source, row, task.folder, expected=None)
        if isinstance(result, _Decoded):
            first = result
            break
        failed.append(result)
    if first is None:
        return failed

    root = store.open_store(task.path, "r+")
    count, (frames, height, width, channels) = len(task.rows), first.frames.shape
    rows = store.rows_per_shard(frames, first.frames[0].nbytes)
    group = store.create_group(root, task.key)
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
    # `content` last: with it the field counts as created.
    for name in (schema.SEQUENCE, schema.SOURCE, schema.CONTENT):
        column = store.create_array(
            group, name, shape=(count,), chunks=(rows,), dims=(schema.SEQUENCE,), dtype=str
        )
        if name == schema.SEQUENCE:
            store.write_rows(column, 0, np.array([row.sequence.name for row in task.rows], dtype=object))
    row = first.outcome.row
    start = row - row % rows
    sources: list[RowSource] = [Keep() for _ in task.rows[start : start + rows]]
    sources[row - start] = task.rows[row]
    shard = ShardTask(task.path, task.key, task.folder, start, tuple(sources))
    return failed + convert_shard(shard, {row: first})


def convert_shard(task: ShardTask, known: Mapping[int, _Decoded] | None = None) -> list[Outcome]:
    """Bring one shard to what its rows' sources say; ``known`` holds rows that are decoded already."""
    group = store.get_group(store.open_store(task.path, "r+"), task.key)
    arrays = {name: store.get_array(group, name) for name in COLUMNS}
    frames = arrays[schema.FRAMES]
    span = slice(task.start, task.start + len(task.rows))
    columns = {name: store.read(array, span) for name, array in arrays.items() if name != schema.FRAMES}
    before, columns = columns, {name: values.copy() for name, values in columns.items()}

    common = _Field.of(group)
    block: np.ndarray | None = None
    outcomes: list[Outcome] = []
    unsettled: list[int] = []
    for place, source in enumerate(task.rows):
        row = task.start + place
        if isinstance(source, Keep):
            continue
        if isinstance(source, Move):
            record = {name: store.read(array, source.origin) for name, array in arrays.items()}
            for name, values in columns.items():
                values[place] = record[name].item() if record[name].ndim == 0 else record[name]
            decoded = record[schema.FRAMES]
            unsettled.append(place)
        else:
            if known and row in known:
                result: _Decoded | Outcome = known[row]
            else:
                result = _read_sequence(source, row, task.folder, common)
            outcome = result.outcome if isinstance(result, _Decoded) else result
            outcomes.append(outcome)
            about = (task.key, outcome.sequence, outcome.content)
            columns[schema.SOURCE][place] = json.dumps(sealed(outcome.record, *about))
            columns[schema.CONTENT][place] = outcome.content
            if not outcome.committed_before:
                unsettled.append(place)
            if not isinstance(result, _Decoded) or outcome.committed_before:
                continue
            decoded = result.frames
            columns[schema.PARAMETER][place] = result.parameter
        if block is None:
            block = np.zeros((len(task.rows), *frames.shape[1:]), frames.dtype)
        block[place] = decoded

    # From here to the end no row may count as committed that isn't what its record says.
    committed = store.read(arrays[schema.CONTENT], span).copy()
    if any(committed[unsettled] != ""):
        committed[unsettled] = ""
        store.write_rows(arrays[schema.CONTENT], task.start, committed)
    if block is not None:
        for place, content in enumerate(committed):
            if content:
                block[place] = store.read(frames, task.start + place)
        store.write_rows(frames, task.start, block)
    for name in (schema.PARAMETER, schema.SEQUENCE, schema.SOURCE, schema.CONTENT):
        if unsettled or not np.array_equal(columns[name], before[name]):
            store.write_rows(arrays[name], task.start, columns[name])
    return outcomes


def _read_sequence(source: Decode, row: int, folder: str, expected: _Field | None) -> _Decoded | Outcome:
    """Decode and check one sequence; an outcome alone where it failed, or is what stands there already."""
    sequence = source.sequence
    look = describe(sequence, folder)
    try:
        # The hash comes before decoding: a file that changes in between will differ at the next look.
        digest = _hash_files(sequence) if source.hash_files else ""
        same_bytes = bool(digest) and digest == source.record.get("hash")
        if same_bytes and not source.verify and _same_but_time(source.record, look):
            kept = {name: source.record[name] for name in (schema.WEIGHTS,) if name in source.record}
            record = {**look, "hash": digest, **kept}
            return Outcome(sequence.name, row, source.content, record, committed_before=True)
        frames, parameter, weights = _checked(sequence, expected)
    except Exception as error:
        return Outcome(sequence.name, row, "", {**look, **_failure(error, sequence)})
    content = content_hash(frames, parameter)
    record = {**look, "hash": digest}
    if weights is not None:
        record[schema.WEIGHTS] = hash_weights(weights)
    outcome = Outcome(sequence.name, row, content, record, frames.nbytes)
    outcome.committed_before = content == source.content
    return _Decoded(outcome, frames, parameter, weights)


def _failure(error: Exception, sequence: LazySequence) -> dict[str, Any]:
    """The part of a record that says why a sequence is quarantined."""
    reader_error = isinstance(error, ReaderError)
    reason = error.reason if isinstance(error, ReaderError) else f"{type(error).__name__}: {error}"
    failure: dict[str, Any] = {
        "file": getattr(error, "file", "") or (sequence.files[0].path if sequence.files else ""),
        "reason": reason[:REASON_CHARACTERS],
    }
    if isinstance(error, _OtherShapeError):
        failure["found"] = error.found
    if isinstance(error, OSError) and not reader_error and error.errno is not None:
        failure["files"] = []  # the disk's or network's fault: tried again at every run
    if isinstance(error, MemoryError | TooLargeError):
        failure["files"] = []  # a machine with too little left, or a bound that may have been raised
    return failure


def _without_mask(values: np.ndarray, here: str) -> np.ndarray:
    """Put NaN where an array is masked: that of a reader of one's own may be, as netCDF4's are."""
    if not isinstance(values, np.ma.MaskedArray):
        return values
    from lsim.preprocess import FramesError, as_array

    try:
        return as_array(values)
    except FramesError as error:
        raise ReaderError(f"{here}: {error}") from error


class _OtherShapeError(ReaderError):
    """A sequence that is sound but of another shape or dtype, or other weights, than its field."""

    def __init__(self, reason: str, found: str) -> None:
        super().__init__(reason)
        self.found = found


def _checked(
    sequence: LazySequence, expected: _Field | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Decode frames (n, y, x, channel), in native byte order, parameter (n,) and weights (y, x), if any.

    An error says what is wrong with them.
    """
    frames, parameter = sequence.read()
    here = f"sequence {sequence.name}"
    frames, parameter = (_without_mask(values, here) for values in (frames, parameter))
    frames = np.ascontiguousarray(frames, dtype=frames.dtype.newbyteorder("="))
    parameter = np.asarray(parameter, dtype=np.float64)
    if frames.ndim != 4 or 0 in frames.shape or len(frames) < 2:
        raise ReaderError(
            f"{here}: frames of shape {frames.shape}; expected (frame, y, x, channel), 2 or more"
        )
    if frames.dtype.name not in schema.FRAME_DTYPES:
        raise ReaderError(
            f"{here}: frames are {frames.dtype}; expected one of {', '.join(schema.FRAME_DTYPES)}"
        )
    if parameter.shape != frames.shape[:1]:
        raise ReaderError(f"{here}: parameter of shape {parameter.shape}; expected {frames.shape[:1]}")
    try:
        schema.validate_parameter(parameter[None], here)
    except schema.SchemaError as error:
        raise ReaderError(str(error)) from error
    if expected is not None and (frames.shape, frames.dtype) != (expected.shape, expected.dtype):
        found = f"{frames.shape} {frames.dtype}"
        raise _OtherShapeError(
            f"{here}: frames are {found}; the field has {expected.shape} {expected.dtype}. A group of "
            "another shape needs an entry of its own in the catalog, chosen by its filter",
            found,
        )
    if frames.dtype.kind == "f":
        for number, frame in enumerate(frames):
            finite = np.isfinite(frame)
            if finite.all() or (sequence.missing == "keep" and finite.any()):
                continue
            kind = "NaN" if np.isnan(frame).any() else "infinity"
            file = sequence.files[number].path if len(sequence.files) == len(frames) else ""
            if sequence.missing == "keep":
                raise ReaderError(f"{here}: frame {number} has no finite value, {kind} alone", file)
            raise ReaderError(
                f"{here}: frame {number} holds {kind}; expected finite values (missing: keep takes them as "
                "they are)",
                file,
            )
    return frames, parameter, _weights_of(sequence, frames, expected)


def _weights_of(sequence: LazySequence, frames: np.ndarray, expected: _Field | None) -> np.ndarray | None:
    """Decode the weights of a sequence's pixels, float64, which have to be those of its field."""
    weights = sequence.read_weights()
    what = f"sequence {sequence.name}: weights"
    if name := sequence.settings.get("weights"):
        what = f"{what} {name!r}"
    file = sequence.files[0].path if sequence.files else ""
    if weights is not None:
        weights = checked_weights(weights, frames, what, file)
    digest = "" if weights is None else hash_weights(weights)
    if expected is not None and digest != expected.weights:
        state = "other than those of" if digest else "missing, unlike those of"
        state = state if expected.weights else "there, unlike for"
        raise _OtherShapeError(
            f"{what} are {state} the field's first sequence, and all of a field are compared with the same. "
            "A group with weights of its own needs an entry of its own in the catalog, chosen by its filter",
            f"weights {digest}",
        )
    return weights
