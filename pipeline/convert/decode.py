"""Decode one sequence for ``frames.zarr``, check it, and tell whether its source has changed."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from pipeline.sources.readers import LazySequence, ReaderError, TooLargeError
from pipeline.sources.readers.base import FIRST_VERSION, checked_weights
from pipeline.storage import schema, store
from pipeline.storage.checked_frames import content_hash, hash_weights, stored_weights

REASON_CHARACTERS = 2000
"""Longest reason of a failure that is recorded: it may list everything in a file."""


@dataclass(frozen=True)
class Decode:
    """A row to decode.

    Attributes
    ----------
    sequence : LazySequence
    record, content : dict, str
        What the store has of the row now, if anything.
    hash_files : bool
        Don't decode files with the recorded bytes.
    verify : bool
        Decode them all the same.
    """

    sequence: LazySequence
    record: dict[str, Any] = field(default_factory=dict)
    content: str = ""
    hash_files: bool = True
    verify: bool = False


@dataclass
class Outcome:
    """Result of looking at one sequence: its content hash, or a record with the reason why there is none."""

    sequence: str
    row: int
    content: str
    record: dict[str, Any]
    nbytes: int = 0
    committed_before: bool = False

    @property
    def failed(self) -> bool:
        """True where the sequence is quarantined."""
        return "reason" in self.record


@dataclass(frozen=True)
class FieldForm:
    """Properties that all sequences of a field share.

    Attributes
    ----------
    shape : tuple of int
    dtype : dtype
    weights : str
        Hash of the field's weights of pixels.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    weights: str

    @classmethod
    def of(cls, group: store.Group) -> FieldForm:
        """Read the form of a stored field."""
        frames, weights = store.get_array(group, schema.FRAMES), stored_weights(group)
        return cls(tuple(frames.shape[1:]), frames.dtype, "" if weights is None else hash_weights(weights))


@dataclass
class Decoded:
    """A decoded sequence, checked and ready to be stored."""

    outcome: Outcome
    frames: np.ndarray
    parameter: np.ndarray
    weights: np.ndarray | None


# -- has the source changed? -------------------------------------------------------------------------------


def describe(sequence: LazySequence, folder: str) -> dict[str, Any]:
    """Describe all that decides the outcome of reading a sequence, without opening its files."""
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
    """Tell whether a record was made from the source that :func:`describe` sees now."""
    # Earlier versions recorded neither of these, and no marks of files: all their files are hashed once.
    record = {"missing": "quarantine", "code": FIRST_VERSION} | record
    return all(record.get(key) == value for key, value in look.items())


def _same_but_time(record: dict[str, Any], look: dict[str, Any]) -> bool:
    """Tell whether at most times and marks of files have changed."""
    timeless = {"files": [file[:2] for file in look["files"]]}
    return same_look({**record, "files": [file[:2] for file in record.get("files", [])]}, look | timeless)


def _hash_files(sequence: LazySequence) -> str:
    """Hash the bytes of all files of a sequence, in order, each with its length (xxh3, 128 bits)."""
    digest = xxhash.xxh3_128()
    for file in sequence.files:
        digest.update(f"{os.path.basename(file.path)} {file.size}\n".encode())
        with open(file.path, "rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


# -- decoding ----------------------------------------------------------------------------------------------


def decode_sequence(source: Decode, row: int, folder: str, form: FieldForm | None) -> Decoded | Outcome:
    """Decode and check one sequence.

    Parameters
    ----------
    source : Decode
    row : int
        Row of the field that the sequence gets.
    folder : str
        Folder of the data set.
    form : FieldForm or None
        Form of the field; None for its first sequence.

    Returns
    -------
    Decoded or Outcome
        An outcome alone where the sequence is quarantined, or its files still have the recorded bytes.
    """
    sequence = source.sequence
    look = describe(sequence, folder)
    try:
        # Hash before decoding: a file that changes in between then differs at the next look.
        digest = _hash_files(sequence) if source.hash_files else ""
        same_bytes = bool(digest) and digest == source.record.get("hash")
        if same_bytes and not source.verify and _same_but_time(source.record, look):
            contents = (schema.WEIGHTS, schema.TIME)
            record = {**look, "hash": digest} | {
                name: source.record[name] for name in contents if name in source.record
            }
            return Outcome(sequence.name, row, source.content, record, committed_before=True)
        frames, parameter, weights = read_checked(sequence, form)
        time = sequence.read_time()
    except Exception as error:
        return Outcome(sequence.name, row, "", {**look, **_failure(error, sequence)})
    content = content_hash(frames, parameter)
    record = {**look, "hash": digest}
    if weights is not None:
        record[schema.WEIGHTS] = hash_weights(weights)
    if time is not None:
        record[schema.TIME] = [float(time[0]), float(time[-1])]
    same_content = content == source.content
    outcome = Outcome(sequence.name, row, content, record, frames.nbytes, committed_before=same_content)
    return Decoded(outcome, frames, parameter, weights)


def _failure(error: Exception, sequence: LazySequence) -> dict[str, Any]:
    """Make the part of a record that says why a sequence is quarantined."""
    reader_error = isinstance(error, ReaderError)
    reason = error.reason if isinstance(error, ReaderError) else f"{type(error).__name__}: {error}"
    failure: dict[str, Any] = {
        "file": getattr(error, "file", "") or (sequence.files[0].path if sequence.files else ""),
        "reason": reason[:REASON_CHARACTERS],
    }
    if isinstance(error, _OtherFormError):
        failure["found"] = error.form
    # A record without files matches no look at them, so these are tried again at every run:
    if isinstance(error, OSError) and not reader_error and error.errno is not None:
        failure["files"] = []  # a fault of the disk or the network
    if isinstance(error, MemoryError | TooLargeError):
        failure["files"] = []  # too little memory on this machine, or a bound that may have been raised
    return failure


class _OtherFormError(ReaderError):
    """A sound sequence whose shape, dtype or weights differ from those of its field."""

    def __init__(self, reason: str, form: str) -> None:
        super().__init__(reason)
        self.form = form


def read_checked(
    sequence: LazySequence, form: FieldForm | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Decode a sequence and check what its reader returns.

    Parameters
    ----------
    sequence : LazySequence
    form : FieldForm or None
        Form of the field; None where any will do.

    Returns
    -------
    frames : ndarray of shape (n, y, x, channel)
        In native byte order; NaN where an array was masked.
    parameter : ndarray of shape (n,), float64
    weights : ndarray of shape (y, x), float64, or None

    Raises
    ------
    ReaderError
        When something is wrong with any of them.
    """
    label = f"sequence {sequence.name}"
    frames, parameter = (_without_mask(values, label) for values in sequence.read())
    frames = np.ascontiguousarray(frames, dtype=frames.dtype.newbyteorder("="))
    parameter = np.asarray(parameter, dtype=np.float64)
    if frames.ndim != 4 or 0 in frames.shape or len(frames) < 2:
        raise ReaderError(
            f"{label}: frames of shape {frames.shape}; expected (frame, y, x, channel), 2 or more"
        )
    if frames.dtype.name not in schema.FRAME_DTYPES:
        raise ReaderError(
            f"{label}: frames are {frames.dtype}; expected one of {', '.join(schema.FRAME_DTYPES)}"
        )
    if parameter.shape != frames.shape[:1]:
        raise ReaderError(f"{label}: parameter of shape {parameter.shape}; expected {frames.shape[:1]}")
    try:
        schema.validate_parameter(parameter[None], label)
    except schema.SchemaError as error:
        raise ReaderError(str(error)) from error
    if form is not None and (frames.shape, frames.dtype) != (form.shape, form.dtype):
        own_form = f"{frames.shape} {frames.dtype}"
        raise _OtherFormError(
            f"{label}: frames are {own_form}; the field has {form.shape} {form.dtype}. A group of "
            "another shape needs an entry of its own in the catalog, chosen by its filter",
            own_form,
        )
    if frames.dtype.kind == "f":
        _check_finite(sequence, frames)
    return frames, parameter, _read_weights(sequence, frames, form)


def _without_mask(values: np.ndarray, label: str) -> np.ndarray:
    """Put NaN where an array is masked: a user's reader may return masked arrays, as netCDF4 does."""
    if not isinstance(values, np.ma.MaskedArray):
        return values
    from lsim.preprocess import FramesError, as_array

    try:
        return as_array(values)
    except FramesError as error:
        raise ReaderError(f"{label}: {error}") from error


def _check_finite(sequence: LazySequence, frames: np.ndarray) -> None:
    """Refuse frames with NaN or infinity; with ``missing: keep`` only frames that hold nothing else."""
    if sequence.missing == "frames":
        return
    label = f"sequence {sequence.name}"
    for number, frame in enumerate(frames):
        finite = np.isfinite(frame)
        if finite.all() or (sequence.missing == "keep" and finite.any()):
            continue
        kind = "NaN" if np.isnan(frame).any() else "infinity"
        file = sequence.files[number].path if len(sequence.files) == len(frames) else ""
        if sequence.missing == "keep":
            raise ReaderError(f"{label}: frame {number} has no finite value, only {kind}", file)
        raise ReaderError(
            f"{label}: frame {number} holds {kind}; expected finite values (missing: keep stores them as "
            "they are)",
            file,
        )


def _read_weights(sequence: LazySequence, frames: np.ndarray, form: FieldForm | None) -> np.ndarray | None:
    """Decode the weights of a sequence's pixels, float64, which have to be those of its field."""
    weights = sequence.read_weights()
    label = f"sequence {sequence.name}: weights"
    if name := sequence.settings.get("weights"):
        label = f"{label} {name!r}"
    file = sequence.files[0].path if sequence.files else ""
    if weights is not None:
        weights = checked_weights(weights, frames, label, file)
    digest = "" if weights is None else hash_weights(weights)
    if form is not None and digest != form.weights:
        state = "missing, unlike those of" if not digest else "present, unlike for"
        state = "other than those of" if digest and form.weights else state
        raise _OtherFormError(
            f"{label} are {state} the field's first sequence, and all sequences of a field are compared with "
            "the same weights. A group with weights of its own needs an entry of its own in the catalog, "
            "chosen by its filter",
            f"weights {digest}",
        )
    return weights
