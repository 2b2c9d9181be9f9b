"""Frames of an archive in their order, and blocks of them."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.storage import schema, store
from pipeline.storage.checked_frames import NOT_READ, read_sequence, why_not_read
from pipeline.storage.digests import hash_labels


@dataclass(frozen=True)
class Piece:
    """Frames ``start:stop`` of a sequence: row ``row`` of the field ``key``, with the hash of its content."""

    key: str
    row: int
    content: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class FrameBlock:
    """Frames ``start:stop`` of an archive's order, as pieces of sequences.

    Attributes
    ----------
    start, stop : int
    pieces : tuple of Piece
    labels : bytes
        :func:`pipeline.storage.digests.hash_labels` of the frames.
    """

    start: int
    stop: int
    pieces: tuple[Piece, ...]
    labels: bytes = b""

    def __len__(self) -> int:
        return self.stop - self.start

    @cached_property
    def content(self) -> str:
        """Hash of the block's frames; it changes with frames that come before them, too."""
        inputs = [(piece.content, piece.start, piece.stop) for piece in self.pieces]
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class MatrixFrames:
    """All frames of some fields: by key, then by sequence as the store has them, then by number.

    Attributes
    ----------
    sequences : tuple of Piece
        Whole sequences.
    field, sequence : ndarray of shape (n,), object
        Names of each frame's field and sequence.
    number : ndarray of shape (n,), int32
        Index of each frame within its sequence.
    parameter : ndarray of shape (n,), float64
    shapes : dict of str to tuple of int
        (y, x, channel) of each field's frames.
    sequence_bytes : int
        Size of the largest sequence, decoded.
    """

    sequences: tuple[Piece, ...]
    field: np.ndarray
    sequence: np.ndarray
    number: np.ndarray
    parameter: np.ndarray
    shapes: dict[str, tuple[int, ...]]
    sequence_bytes: int

    def __len__(self) -> int:
        return len(self.number)

    def blocks(self, length: int) -> list[FrameBlock]:
        """Cut all frames into blocks of ``length``; the last may be shorter."""
        stops = np.cumsum([len(piece) for piece in self.sequences])
        labels = {
            schema.FIELD: self.field,
            schema.SEQUENCE: self.sequence,
            schema.NUMBER: self.number,
            schema.PARAMETER: self.parameter,
        }
        blocks = []
        for start in range(0, len(self), length):
            stop = min(start + length, len(self))
            first, last = np.searchsorted(stops, start, "right"), np.searchsorted(stops, stop, "left")
            pieces = []
            for index in range(first, last + 1):
                whole, origin = self.sequences[index], int(stops[index]) - len(self.sequences[index])
                begin, end = max(start - origin, 0), min(stop - origin, len(whole))
                pieces.append(Piece(whole.key, whole.row, whole.content, begin, end))
            of_block = {name: column[start:stop] for name, column in labels.items()}
            blocks.append(FrameBlock(start, stop, tuple(pieces), hash_labels(of_block)))
        return blocks


def list_frames(source: store.Group, keys: Sequence[str]) -> MatrixFrames:
    """List the frames of some fields of a ``frames.zarr``, in an archive's order; no pixel is read."""
    sequences: list[Piece] = []
    names: list[str] = []
    fields: list[str] = []
    parameters, shapes, largest = [], {}, 0
    for key in keys:
        group = store.get_group(source, key)
        array = store.get_array(group, schema.FRAMES)
        count, n = array.shape[:2]
        contents = store.read(store.get_array(group, schema.CONTENT))
        sequences += [Piece(key, row, str(content), 0, n) for row, content in enumerate(contents)]
        names += [str(name) for name in store.read(store.get_array(group, schema.SEQUENCE))]
        fields += [key] * count
        parameters.append(store.read(store.get_array(group, schema.PARAMETER)).ravel())
        shapes[key] = tuple(array.shape[2:])
        largest = max(largest, store.store_bytes(array.shape[1:], array.dtype))
    lengths = [len(piece) for piece in sequences]
    return MatrixFrames(
        tuple(sequences),
        np.repeat(np.array(fields, object), lengths),
        np.repeat(np.array(names, object), lengths),
        np.concatenate([np.arange(n, dtype=np.int32) for n in lengths] or [np.zeros(0, np.int32)]),
        np.concatenate(parameters or [np.zeros(0)]),
        shapes,
        largest,
    )


@dataclass(frozen=True)
class Batch:
    """Frames ``start:stop`` of a block.

    Attributes
    ----------
    start, stop : int
    frames : ndarray or None
    damage : str
        Why the frames could not be read; empty where they could.
    """

    start: int
    stop: int
    frames: np.ndarray | None
    damage: str = ""


def read_block(source: store.Group, block: FrameBlock, batch_size: int) -> Iterator[Batch]:
    """Read the frames of a block in batches of ``batch_size`` at most, each of one field; check sequences.

    In memory are one sequence and one batch.
    """
    position = 0
    for key, pieces in itertools.groupby(block.pieces, lambda piece: piece.key):
        group = store.get_group(source, key)
        pending: list[np.ndarray] = []
        start = position
        for piece in pieces:
            try:
                frames = read_sequence(group, piece.row, piece.content)[piece.start : piece.stop]
            except NOT_READ as error:
                if start < position:
                    yield Batch(start, position, np.concatenate(pending))
                yield Batch(position, position + len(piece), None, why_not_read(error))
                position += len(piece)
                start, pending = position, []
                continue
            while len(frames):
                part = frames[: batch_size - (position - start)]
                pending.append(part)
                position += len(part)
                frames = frames[len(part) :]
                if position - start == batch_size:
                    yield Batch(start, position, np.concatenate(pending))
                    start, pending = position, []
        if start < position:
            yield Batch(start, position, np.concatenate(pending))
