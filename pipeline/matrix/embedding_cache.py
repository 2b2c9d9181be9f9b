"""Blocks of frames, embedded once and kept on their device: a cache of bounded size, one a process."""

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
    """A block of frames as a family of metrics compares them.

    Attributes
    ----------
    embedding : Embedding or None
        None where no frame of the block can be compared.
    comparable : ndarray of shape (n,), bool
    reasons : dict of int to str
        Why frames of the block can't be compared, by their place in it.
    undone : str
        Why some frames could not be read, or embedded, of the last of them; the next run tries again.
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
    """Read, check, prepare and embed the frames of a block, some at a time.

    Parameters
    ----------
    source : Group
        Of the ``frames.zarr``.
    block : FrameBlock
    metric : Metric
        Of a family that embeds alike, any.
    scope : (lo, hi)
        Fixed: with another the frames would depend on their batch.

    Returns
    -------
    EmbeddedBlock
        On the metric's device. The same bits whatever the block. A frame at which the metric raises costs
        no other.
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
        for some in _embed(metric, batch.frames, scope):
            there = places[some.start : some.start + len(some.comparable)]
            comparable[there.start : there.stop] = some.comparable
            reasons.update({there[k]: some.reason for k in np.flatnonzero(~some.comparable)})
            undone = some.reason if some.undone else undone
            if some.embedding is None:
                continue
            for name, part in some.embedding.parts.items():
                if name not in parts:
                    parts[name] = _room(len(block), part)
                parts[name][there.start : there.stop] = part
            for name, bound in (("rounding", some.embedding.rounding), ("stored", some.embedding.stored)):
                if bound is not None:
                    bounds.setdefault(name, _room(len(block), bound))[there.start : there.stop] = bound
    embedding = Embedding(parts, bounds.get("rounding"), bounds.get("stored")) if parts else None
    return EmbeddedBlock(embedding, comparable, reasons, undone)


@dataclass(frozen=True)
class _Some:
    """Frames of a batch from ``start`` on: their embedding, and why those that aren't comparable are not."""

    start: int
    comparable: np.ndarray
    embedding: Embedding | None
    reason: str
    undone: bool = False


def _embed(metric: Metric, frames: np.ndarray, scope: Scope) -> Iterator[_Some]:
    """All frames at once; one by one where the metric raises."""

    def together(some: np.ndarray) -> tuple[np.ndarray, Embedding]:
        prepared = metric.prepare(some, scope)
        with torch.no_grad():
            return prepared.comparable, metric.embed_prepared(prepared)

    bad = "has no pixel that is not missing" if metric.preprocessing.mask else "holds NaN or infinity"
    try:
        for start, found in in_batch_or_alone(together, frames, metric.name):
            if isinstance(found, str):
                yield _Some(start, np.zeros(1, bool), None, found, undone=True)
            else:
                yield _Some(start, *found, bad)
    except FramesError as error:
        yield _Some(0, np.zeros(len(frames), bool), None, str(error))
    except ClaimError as error:
        yield _Some(0, np.zeros(len(frames), bool), None, str(error), undone=True)


def _room(n: int, like: Tensor) -> Tensor:
    """(n, …) of zeros; NumPy asks for large pages, which makes products of matrices faster."""
    shape = (n, *like.shape[1:])
    if like.device.type != "cpu" or like.dtype == torch.bfloat16:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    return torch.from_numpy(np.zeros(shape, torch.empty(0, dtype=like.dtype).numpy().dtype))


class EmbeddingCache:
    """Embedded blocks of a process; the least recently used make room for others.

    Several threads share it: a block that one is computing, another waits for. A thread takes all that it
    needs at once or waits, holding none, so that none waits for one that waits for it.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._changed = threading.Condition()

    @property
    def nbytes(self) -> int:
        """Bytes that are held, or promised to blocks that are being computed."""
        return sum(entry.nbytes for entry in self._entries.values())

    def clear(self) -> None:
        """Drop all that nobody holds."""
        with self._changed:
            for key in [key for key, entry in self._entries.items() if not entry.holders]:
                del self._entries[key]

    @contextlib.contextmanager
    def hold(
        self,
        wanted: Mapping[Hashable, tuple[int, Callable[[], EmbeddedBlock]]],
        room: int,
    ) -> Iterator[list[EmbeddedBlock]]:
        """Hold some blocks while the context lasts; those that aren't there are computed.

        Parameters
        ----------
        wanted : mapping
            By key, the bytes that the block will have, and what computes it.
        room : int
            Bytes that the cache may hold in all.

        Raises
        ------
        MemoryError
            When there isn't room for these alone.
        """
        if sum(nbytes for nbytes, _ in wanted.values()) > room:
            needed = sum(nbytes for nbytes, _ in wanted.values())
            raise MemoryError(f"{len(wanted)} blocks of frames need {needed} bytes, and there are {room}")
        while True:
            entries, mine = self._claim(wanted, room)
            try:
                for key in mine:
                    self._fill(key, entries[key], wanted[key][1])
                found = [self._wait_for(entry) for entry in entries.values()]
                if all(block is not None for block in found):
                    yield [block for block in found if block is not None]
                    return
            finally:
                self._release(entries, mine)

    def _claim(
        self, wanted: Mapping[Hashable, tuple[int, Callable[[], EmbeddedBlock]]], room: int
    ) -> tuple[dict[Hashable, _Entry], list[Hashable]]:
        """Entries for all keys, held; and the keys of those that the caller has to fill."""
        with self._changed:
            while not self._make_room(wanted, room):
                self._changed.wait()
            mine = [key for key in wanted if key not in self._entries]
            for key in mine:
                self._entries[key] = _Entry(wanted[key][0])
            for key in wanted:
                self._entries.move_to_end(key)
                self._entries[key].holders += 1
            return {key: self._entries[key] for key in wanted}, mine

    def _make_room(
        self, wanted: Mapping[Hashable, tuple[int, Callable[[], EmbeddedBlock]]], room: int
    ) -> bool:
        """Drop blocks until those that are missing fit; False, and none is dropped, where they can't yet."""
        needed = self.nbytes + sum(size for key, (size, _) in wanted.items() if key not in self._entries)
        idle = [key for key, entry in self._entries.items() if not entry.holders and key not in wanted]
        dropped = []
        for key in idle:
            if needed <= room:
                break
            needed -= self._entries[key].nbytes
            dropped.append(key)
        if needed > room:
            return False
        for key in dropped:
            del self._entries[key]
        return True

    def _fill(self, key: Hashable, entry: _Entry, compute: Callable[[], EmbeddedBlock]) -> None:
        try:
            block = compute()
        except BaseException:
            with self._changed:
                entry.failed = True
                self._entries.pop(key, None)
                self._changed.notify_all()
            raise
        with self._changed:
            entry.block, entry.nbytes = block, block.nbytes
            self._changed.notify_all()

    def _wait_for(self, entry: _Entry) -> EmbeddedBlock | None:
        """The block, once it is there; None when who computed it failed, and it is to be tried again."""
        with self._changed:
            self._changed.wait_for(lambda: entry.block is not None or entry.failed)
            return entry.block

    def _release(self, entries: Mapping[Hashable, _Entry], mine: Sequence[Hashable]) -> None:
        with self._changed:
            for key, entry in entries.items():
                entry.holders -= 1
                if key in mine and entry.block is None and not entry.failed:
                    # Claimed, and never filled: the one before it could not be.
                    entry.failed = True
                    del self._entries[key]
            self._changed.notify_all()


@dataclass(eq=False)
class _Entry:
    nbytes: int
    block: EmbeddedBlock | None = None
    holders: int = 0
    failed: bool = False


cache = EmbeddingCache()
"""This process's."""


def clear_cache() -> None:
    """Drop the embeddings that this process keeps."""
    cache.clear()
