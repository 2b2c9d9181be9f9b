"""Cache of embedded blocks of frames, of bounded size, one a process; blocks stay on their device."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lsim.claims import ClaimError
from lsim.embedding import Embedding
from lsim.metric import Metric
from lsim.preprocess import FramesError, Scope
from pipeline.matrix.frame_blocks import FrameBlock, read_block
from pipeline.stage.retry_single import in_batch_or_alone
from pipeline.storage import store

FRAMES_TOGETHER = {"cpu": 32, "cuda": 64}
"""Frames that are read, prepared and embedded at a time, on the way into their block."""


@dataclass(frozen=True)
class EmbeddedBlock:
    """A block of frames, embedded for a family of metrics.

    Attributes
    ----------
    embedding : Embedding or None
        None where no frame of the block can be compared.
    comparable : ndarray of shape (n,), bool
    reasons : dict of int to str
        Why frames of the block can't be compared, by their place in it.
    undone : str
        Why the last of those frames that could not be read or embedded could not; the next run tries again.
    """

    embedding: Embedding | None
    comparable: np.ndarray
    reasons: dict[int, str] = field(default_factory=dict)
    undone: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the embedding."""
        parts = self.embedding.parts.values() if self.embedding is not None else ()
        return sum(part.numel() * part.element_size() for part in parts)


def embed_block(source: store.Group, block: FrameBlock, metric: Metric, scope: Scope) -> EmbeddedBlock:
    """Read, check, prepare and embed the frames of a block, batch by batch.

    Parameters
    ----------
    source : Group
        Root of the ``frames.zarr``.
    block : FrameBlock
    metric : Metric
        Any metric of a family that embeds alike.
    scope : (lo, hi)
        Fixed: with another scope frames would depend on their batch.

    Returns
    -------
    EmbeddedBlock
        On the metric's device, with the same bits whatever the block. If the metric raises at a frame, only
        that frame has no embedding.
    """
    parts: dict[str, Tensor] = {}
    bounds: dict[str, Tensor] = {}
    comparable = np.zeros(len(block), bool)
    reasons: dict[int, str] = {}
    undone = ""
    for batch in read_block(source, block, FRAMES_TOGETHER.get(metric.device.type, 32)):
        places = range(batch.start, batch.stop)
        if batch.frames is None:
            undone = batch.damage
            reasons.update(dict.fromkeys(places, batch.damage))
            continue
        for part in _embed(metric, batch.frames, scope):
            rows = places[part.start : part.start + len(part.comparable)]
            comparable[rows.start : rows.stop] = part.comparable
            reasons.update({rows[k]: part.reason for k in np.flatnonzero(~part.comparable)})
            undone = part.reason if part.undone else undone
            if part.embedding is None:
                continue
            for name, values in part.embedding.parts.items():
                if name not in parts:
                    parts[name] = _zeros(len(block), values)
                parts[name][rows.start : rows.stop] = values
            for name, bound in (("rounding", part.embedding.rounding), ("stored", part.embedding.stored)):
                if bound is not None:
                    bounds.setdefault(name, _zeros(len(block), bound))[rows.start : rows.stop] = bound
    embedding = Embedding(parts, bounds.get("rounding"), bounds.get("stored")) if parts else None
    return EmbeddedBlock(embedding, comparable, reasons, undone)


@dataclass(frozen=True)
class _Part:
    """Frames of a batch from ``start`` on: their embedding, and why some can't be compared."""

    start: int
    comparable: np.ndarray
    embedding: Embedding | None
    reason: str
    undone: bool = False


def _embed(metric: Metric, frames: np.ndarray, scope: Scope) -> Iterator[_Part]:
    """Embed all frames at once; one by one where the metric raises."""

    def embed(batch: np.ndarray) -> tuple[np.ndarray, Embedding]:
        prepared = metric.prepare(batch, scope)
        with torch.no_grad():
            return prepared.comparable, metric.embed_prepared(prepared)

    bad = "has no pixel that is not missing" if metric.preprocessing.mask else "holds NaN or infinity"
    try:
        for start, result in in_batch_or_alone(embed, frames, metric.name):
            if isinstance(result, str):
                yield _Part(start, np.zeros(1, bool), None, result, undone=True)
            else:
                yield _Part(start, *result, bad)
    except FramesError as error:
        yield _Part(0, np.zeros(len(frames), bool), None, str(error))
    except ClaimError as error:
        yield _Part(0, np.zeros(len(frames), bool), None, str(error), undone=True)


def _zeros(n: int, like: Tensor) -> Tensor:
    """Allocate (n, …) zeros; NumPy asks for large pages, which makes matrix products faster."""
    shape = (n, *like.shape[1:])
    if like.device.type != "cpu" or like.dtype == torch.bfloat16:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    return torch.from_numpy(np.zeros(shape, torch.empty(0, dtype=like.dtype).numpy().dtype))


class EmbeddingCache:
    """Embedded blocks of a process; the least recently used make room for others.

    Several threads share it: a thread waits for a block that another is computing. A thread takes all blocks
    that it needs at once, or waits and holds none, so that no two wait for each other.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._condition = threading.Condition()

    @property
    def nbytes(self) -> int:
        """Bytes of blocks that are held or being computed."""
        return sum(entry.nbytes for entry in self._entries.values())

    def clear(self) -> None:
        """Drop all blocks that no thread holds."""
        with self._condition:
            for key in [key for key, entry in self._entries.items() if not entry.holders]:
                del self._entries[key]

    @contextlib.contextmanager
    def hold(
        self,
        blocks: Mapping[Hashable, tuple[int, Callable[[], EmbeddedBlock]]],
        room: int,
    ) -> Iterator[list[EmbeddedBlock]]:
        """Hold some blocks while the context lasts; missing ones are computed.

        Parameters
        ----------
        blocks : mapping
            By key, the bytes that the block will have, and a function that computes it.
        room : int
            Most bytes that the cache may hold.

        Raises
        ------
        MemoryError
            When there isn't room for these alone.
        """
        if sum(nbytes for nbytes, _ in blocks.values()) > room:
            nbytes_of_blocks = sum(nbytes for nbytes, _ in blocks.values())
            raise MemoryError(
                f"{len(blocks)} blocks of frames need {nbytes_of_blocks} bytes, and there are {room}"
            )
        while True:
            entries, claims = self._claim(blocks, room)
            try:
                for key in claims:
                    self._fill(key, entries[key], blocks[key][1])
                results = [self._wait_for(entry) for entry in entries.values()]
                if all(block is not None for block in results):
                    yield [block for block in results if block is not None]
                    return
            finally:
                self._release(entries, claims)

    def _claim(
        self, blocks: Mapping[Hashable, tuple[int, Callable[[], EmbeddedBlock]]], room: int
    ) -> tuple[dict[Hashable, _Entry], list[Hashable]]:
        """Hold entries for all keys; give them, and the keys of those that the caller has to fill."""
        with self._condition:
            while not self._make_room(blocks, room):
                self._condition.wait()
            claims = [key for key in blocks if key not in self._entries]
            for key in claims:
                self._entries[key] = _Entry(blocks[key][0])
            for key in blocks:
                self._entries.move_to_end(key)
                self._entries[key].holders += 1
            return {key: self._entries[key] for key in blocks}, claims

    def _make_room(
        self, blocks: Mapping[Hashable, tuple[int, Callable[[], EmbeddedBlock]]], room: int
    ) -> bool:
        """Drop blocks until the missing ones fit; where they can't yet, drop none and return False."""
        demand = self.nbytes + sum(size for key, (size, _) in blocks.items() if key not in self._entries)
        idle = [key for key, entry in self._entries.items() if not entry.holders and key not in blocks]
        victims = []
        for key in idle:
            if demand <= room:
                break
            demand -= self._entries[key].nbytes
            victims.append(key)
        if demand > room:
            return False
        for key in victims:
            del self._entries[key]
        return True

    def _fill(self, key: Hashable, entry: _Entry, compute: Callable[[], EmbeddedBlock]) -> None:
        try:
            block = compute()
        except BaseException:
            with self._condition:
                entry.has_failed = True
                self._entries.pop(key, None)
                self._condition.notify_all()
            raise
        with self._condition:
            entry.block, entry.nbytes = block, block.nbytes
            self._condition.notify_all()

    def _wait_for(self, entry: _Entry) -> EmbeddedBlock | None:
        """Wait for a block; None when the thread that computed it failed, and it is to be tried again."""
        with self._condition:
            self._condition.wait_for(lambda: entry.block is not None or entry.has_failed)
            return entry.block

    def _release(self, entries: Mapping[Hashable, _Entry], claims: Sequence[Hashable]) -> None:
        with self._condition:
            for key, entry in entries.items():
                entry.holders -= 1
                if key in claims and entry.block is None and not entry.has_failed:
                    # Claimed and never filled, as the block before it could not be computed.
                    entry.has_failed = True
                    del self._entries[key]
            self._condition.notify_all()


@dataclass(eq=False)
class _Entry:
    nbytes: int
    block: EmbeddedBlock | None = None
    holders: int = 0
    has_failed: bool = False


cache = EmbeddingCache()
"""The cache of this process."""


def clear_cache() -> None:
    """Drop the embeddings that this process keeps."""
    cache.clear()
