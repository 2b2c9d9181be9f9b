"""What a worker does with tiles of an archive's matrix: hold two blocks of frames, compare, write both sides.

A task is a square of tiles, so that it touches few blocks for many tiles. Of each tile the distances are
written first, on either side of the diagonal, then the fingerprint that says it is done.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsim.claims import ClaimError, other_random_numbers
from lsim.embedding import Embedding
from lsim.error_bounds import PairPrecision, ReportsPrecision
from lsim.metric import Metric
from lsim.prepared import Prepared
from lsim.preprocess import FramesError, Scope
from pipeline.matrix.embedding_cache import FRAMES_TOGETHER, EmbeddedBlock, cache, embed_block
from pipeline.matrix.frame_blocks import FrameBlock, read_block
from pipeline.matrix.layout import OF_TILES, tile_fingerprint
from pipeline.metrics.pixel_weights import FieldWeights, get_weighted
from pipeline.metrics.resolution import count_unresolved
from pipeline.metrics.settings import is_directed
from pipeline.stage import trials
from pipeline.storage import digests, schema, store
from pipeline.storage.recorded import tile_identity, tile_texts
from pipeline.workers import sigterm
from pipeline.workers.worker_metrics import MetricRequest, still_wanted

logger = logging.getLogger(__name__)

Tile = tuple[int, int]

ROWS_AT_ONCE = 128
"""Frames on either side that a CPU compares at once: metrics that copy them, in double, copy no more."""


@dataclass(frozen=True)
class TileTask:
    """A square of tiles with all that a worker needs to compute it.

    Attributes
    ----------
    frames, out, key : str
        Where frames are read, and the group of the store that is written.
    requests : tuple of MetricRequest
        A family that embeds alike.
    places : mapping of str to int
        The index of each metric in provenance.
    tiles : mapping of str to tuple of (int, int)
        By metric, the tiles (i, j), i <= j, that are out of date, in the order to compute them.
    blocks : mapping of int to FrameBlock
        Those that the tiles are of.
    scope : (lo, hi)
    frame_bytes : int
        Of a frame's embedding.
    room : int
        Bytes of embeddings that the worker may keep.
    run : str
        The run's name, in which each worker tries each metric once.
    weights : FieldWeights, optional
        Of the frames' pixels, where metrics are weighted by them.
    """

    frames: str
    out: str
    key: str
    requests: tuple[MetricRequest, ...]
    places: Mapping[str, int]
    tiles: Mapping[str, tuple[Tile, ...]]
    blocks: Mapping[int, FrameBlock]
    scope: Scope
    frame_bytes: int
    room: int
    run: str = ""
    weights: FieldWeights | None = None

    @property
    def label(self) -> str:
        """What it is of, in messages."""
        tiles = sorted({tile for wanted in self.tiles.values() for tile in wanted})
        return f"{self.key}, {len(tiles)} tiles from {tiles[0] if tiles else 'none'}"


@dataclass(frozen=True)
class TileResult:
    """What a worker tells of a task; the distances themselves are in the store.

    Attributes
    ----------
    tiles : int
        Tiles that are done, metric by metric.
    errors : dict of str to str
        By metric, why the last of its tiles that are undone is.
    undone : int
        Tiles without a fingerprint: the next run tries them again.
    embedded : int
        Frames that were embedded.
    seconds : Counter
        Of ``embed``, ``compare``, ``write``.
    precision : dict
        By metric, what those that have a promise to keep say of how they kept it.
    device : str
    """

    tiles: int
    errors: dict[str, str]
    undone: int
    embedded: int
    seconds: Counter[str]
    precision: dict[str, PairPrecision]
    device: str


@dataclass
class _Record:
    """What is recorded of the tiles of a task's square; its copies write that, too."""

    group: store.Group
    place: int
    tiles: Sequence[Tile]
    arrays: dict[str, store.Array] = field(init=False)
    origin: Tile = field(init=False)
    part: tuple[slice, ...] = field(init=False)
    done: dict[Tile, dict[str, str | int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        provenance = store.get_group(self.group, schema.PROVENANCE)
        self.arrays = {name: store.get_array(provenance, name) for name in OF_TILES}
        side = self.arrays[schema.FINGERPRINT].chunks[1]
        i, j = self.tiles[0]
        self.origin = (i - i % side, j - j % side)
        self.part = tuple(slice(start, start + side) for start in self.origin)

    def write(self, tile: Tile, fingerprint: str, digest: str, missing: int = 0, unresolved: int = 0) -> None:
        """Say that a tile is done; the fingerprint last."""
        self.done[tile[0] - self.origin[0], tile[1] - self.origin[1]] = {
            schema.FINGERPRINT: fingerprint,
            schema.DIGEST: digest,
            schema.MISSING: missing,
            schema.UNRESOLVED: unresolved,
        }
        for name in reversed(OF_TILES):
            # A second copy of the task may write the same values: what it has done is read, and all that
            # this one has done is written again, for the copy may have read before and written since.
            values = store.read(self.arrays[name], (self.place, *self.part))
            for at, records in self.done.items():
                values[at] = records[name]
            store.write_block(self.arrays[name], (self.place, *self.origin), values[None])


def compute_tiles(task: TileTask) -> TileResult:
    """Compute and write a task's tiles. Runs on a worker.

    In memory are at most ``task.room`` bytes of embeddings, and what one comparison and one batch of frames
    take.
    """
    source = store.open_store(task.frames)
    group = store.get_group(store.open_store(task.out, "r+"), task.key)
    metrics = {metric.name: metric for metric in (get_weighted(one, task.weights) for one in task.requests)}
    first = next(iter(metrics.values()))
    records = {name: _Record(group, task.places[name], tiles) for name, tiles in task.tiles.items() if tiles}
    seconds: Counter[str] = Counter()
    errors: dict[str, str] = {}
    done, undone, embedded = 0, 0, [0]

    def wanted(index: int) -> tuple[int, Any]:
        block = task.blocks[index]

        def compute() -> EmbeddedBlock:
            embedded[0] += len(block)
            return embed_block(source, block, first, task.scope)

        return len(block) * task.frame_bytes, compute

    # With its place: a block of equal frames elsewhere is not the same block, and may be damaged.
    keys = {
        index: (embeds_as(first), task.scope, block.content, block.start)
        for index, block in task.blocks.items()
    }
    for i, j in in_order(task.tiles.values()):
        if sigterm.requested():
            raise sigterm.Stopped  # of a driver that computes by itself; tiles before this one are done
        _check_wanted(task, i, j)
        names = [name for name, tiles in task.tiles.items() if (i, j) in tiles]
        began = time.perf_counter()
        with cache.hold({keys[k]: wanted(k) for k in sorted({i, j})}, task.room) as held:
            seconds["embed"] += time.perf_counter() - began  # type: ignore[assignment]
            rows, columns = held[0], held[-1]
            for name in names:
                metric = metrics[name]
                began = time.perf_counter()
                try:
                    due = trials.is_due(task.run, metric)
                    values = compare_blocks(metric, rows, columns)
                    two_ways = i != j and is_directed(metric)
                    mirrored = compare_blocks(metric, columns, rows) if two_ways else None
                    if due:
                        _try_metric(metric, task, source, task.blocks[i], rows)
                    unresolved = unresolved_pairs(metric, rows, columns, values)
                    if mirrored is not None:
                        unresolved += unresolved_pairs(metric, columns, rows, mirrored)
                except Exception as error:
                    # One tile must not take down its task. Without a fingerprint the next run tries again.
                    errors[name], undone = f"{type(error).__name__}: {error}", undone + 1
                    continue
                finally:
                    seconds["compare"] += time.perf_counter() - began  # type: ignore[assignment]
                began = time.perf_counter()
                reason = rows.undone or columns.undone
                _check_wanted(task, i, j)
                if reason:
                    # Another copy may have finished it: its fingerprint must not stand for what comes now.
                    records[name].write((i, j), "", "")
                _write_tile(group, task, name, (i, j), values, mirrored, rows)
                reasons = [rows.reasons.get(k, "") for k in range(len(values))] if i == j else []
                if reason:
                    if any(reasons):  # so that they are known to be what was written
                        records[name].write(
                            (i, j), "", _digest(task, name, (i, j), (), tile_texts("", 0, 0, reasons))
                        )
                    errors[name], undone = reason, undone + 1
                else:
                    both = rows.comparable[:, None] & columns.comparable
                    missing = int((np.isnan(values) & both).sum())
                    if mirrored is not None:
                        missing += int((np.isnan(mirrored) & both.T).sum())
                    contents = task.blocks[i].content, task.blocks[j].content
                    made_of = tile_fingerprint(*contents, metric.specification_hash, task.scope)
                    texts = tile_texts(made_of, missing, unresolved, reasons)
                    arrays = [values] if mirrored is None else [values, mirrored]
                    digest = _digest(task, name, (i, j), arrays, texts)
                    _check_wanted(task, i, j)
                    records[name].write((i, j), made_of, digest, missing, unresolved)
                    done += 1
                seconds["write"] += time.perf_counter() - began  # type: ignore[assignment]
    precision = {
        name: kept
        for name, metric in metrics.items()
        if isinstance(metric, ReportsPrecision) and (kept := metric.take_precision()) is not None
    }
    return TileResult(done, errors, undone, embedded[0], seconds, precision, first.device.type)


def _digest(
    task: TileTask, metric: str, tile: Tile, arrays: Sequence[np.ndarray], texts: Mapping[str, str]
) -> str:
    """Make the digest of a tile that is done, and of its mirror image where that is no transpose."""
    rows, columns = (task.blocks[index].labels for index in tile)
    identity = tile_identity(task.key, metric, tile, rows, columns)
    return digests.bind(identity, texts, "".join(map(digests.hash_values, arrays)))


def _check_wanted(task: TileTask, i: int, j: int) -> None:
    """Write nothing when another copy was faster, or the run is over and the next may be writing."""
    if not still_wanted():
        raise store.StoreError(f"{task.out}: nobody waits for tile {i},{j} of {task.key} any more")


def embeds_as(metric: Metric) -> Hashable:
    """Equal for metrics that can be computed from one another's embeddings."""
    shared = metric.family
    alike = metric.specification_hash if shared is None else shared
    return (metric.preprocessing, type(metric).prepare, alike)


def compare_blocks(metric: Metric, rows: EmbeddedBlock, columns: EmbeddedBlock) -> np.ndarray:
    """The tile of two blocks, (rows, columns) float32; symmetric, with a zero diagonal, of one with itself.

    Of a metric that isn't symmetric rows are the references, and the diagonal is its own. A pair's bits
    depend on its two frames alone on a CPU, wherever in whatever tile it stands. Code of others is given
    copies: the blocks are compared again, by other metrics and in other tiles.

    Raises
    ------
    lsim.ClaimError
        When distances aren't what the metric claims.
    """
    n, m = len(rows.comparable), len(columns.comparable)
    values = np.full((n, m), np.nan)
    diagonal, single = rows is columns, False
    symmetric = diagonal and not is_directed(metric)
    if rows.embedding is not None and columns.embedding is not None:
        at_once = ROWS_AT_ONCE if metric.device.type == "cpu" or metric.of_others else max(n, m)
        with torch.no_grad():
            for start in range(0, n, at_once):
                # New ones each time: what comparisons derive from an embedding stays with it.
                left = _part(metric, rows.embedding, start, at_once)
                for other in range(start if symmetric else 0, m, at_once):
                    same = diagonal and start == other
                    right = left if same else _part(metric, columns.embedding, other, at_once)
                    part = metric.distance_block(left, right)
                    single = part.dtype == torch.float32
                    values[start : start + at_once, other : other + at_once] = part.double().cpu().numpy()
    values[~rows.comparable] = np.nan
    values[:, ~columns.comparable] = np.nan
    # What lies below the diagonal squares of a tile of its own isn't computed.
    computed = np.where(np.isnan(values), values.T, values) if symmetric else values
    metric.claims.check_distances(computed, square=diagonal, single=single)
    if symmetric:
        below = np.tril_indices(n, -1)
        values[below] = values.T[below]
        np.fill_diagonal(values, np.where(rows.comparable, 0, np.nan))
    elif diagonal and not np.isnan(known := metric.info.distance_to_itself):
        np.fill_diagonal(values, np.where(rows.comparable, known, np.nan))
    with np.errstate(over="ignore"):
        stored = values.astype(np.float32)
    # Nobody ranks by infinity, unless it is how far the metric says that equal frames are.
    stored[np.isinf(stored) & (stored != metric.info.distance_to_itself)] = np.nan
    return stored


def _part(metric: Metric, embedding: Embedding, start: int, length: int) -> Embedding:
    """Frames of a block; a copy of them for code of others."""
    part = embedding[start : start + length]
    return part.copy() if metric.of_others else part


def _try_metric(
    metric: Metric, task: TileTask, source: store.Group, block: FrameBlock, rows: EmbeddedBlock
) -> None:
    """Try a metric on the first frames of a block: what it was embedded as, and what comes of its pairs.

    Raises
    ------
    lsim.ClaimError
        When it fails.
    """
    if rows.undone or rows.embedding is None or rows.comparable.sum() < 2:
        return  # another block will do
    frames = next(read_block(source, block, FRAMES_TOGETHER.get(metric.device.type, 32))).frames
    if frames is None:
        return
    with trials.trial(task.run, metric) as tried, torch.no_grad():
        part, again = _embed_again(tried, frames, task.scope, np.flatnonzero(rows.comparable[: len(frames)]))
        if again is not None:
            _check_again(tried, again, {name: one[part] for name, one in rows.embedding.parts.items()})


def _embed_again(
    tried: Metric, frames: np.ndarray, scope: Scope, comparable: np.ndarray
) -> tuple[slice, tuple[Prepared, Embedding] | None]:
    """Embed frames once more; where that raises, the first that can be compared, and say why.

    ``comparable`` are the frames that have an embedding. Returns which frames these are, and what they were
    prepared and embedded as; None where there is none to try.
    """
    try:
        return slice(0, len(frames)), _prepared_and_embedded(tried, frames, scope)
    except (FramesError, ClaimError):
        raise
    except Exception as error:  # of code of others, or of memory: the block was embedded one by one, then
        if not len(comparable):
            return slice(0, 0), None
        part = slice(comparable[0], comparable[0] + 1)
        logger.warning(
            "%s: %d frames at once failed (%s: %s), so the metric is tried on one of them",
            *(tried.name, len(frames), type(error).__name__, error),
        )
        return part, _prepared_and_embedded(tried, frames[part], scope)


def _prepared_and_embedded(
    tried: Metric, frames: np.ndarray, scope: Scope
) -> tuple[Prepared, Embedding] | None:
    prepared = tried.prepare(frames, scope)
    if not prepared.comparable.any():
        return None
    with other_random_numbers():
        return prepared, tried.embed_prepared(prepared)


def _check_again(tried: Metric, again: tuple[Prepared, Embedding], before: Mapping[str, Tensor]) -> None:
    """Compare embeddings of frames with those of ``before``, and distances of a few with those alone."""
    prepared, embedding = again
    known = torch.from_numpy(np.flatnonzero(prepared.comparable)).to(tried.device)
    exact = tried.device.type == "cpu"
    for name, part in before.items():
        first, second = (trials.as_array(one[known.to(one.device)]) for one in (part, embedding.parts[name]))
        tried.claims.check_repeated(first, second, f"embedding {name!r}", exact=exact)
    alone = tried.check_claims(prepared)
    few = Embedding(
        {name: part[known[: len(alone)].to(part.device)] for name, part in embedding.parts.items()}
    )
    amid_others = tried.distance_block(few, few.copy()).double().cpu().numpy()
    tried.claims.check_repeated(amid_others, alone, "amid other frames, and then alone, d", exact=False)


def unresolved_pairs(metric: Metric, rows: EmbeddedBlock, columns: EmbeddedBlock, values: np.ndarray) -> int:
    """Count the pairs of a tile whose distance rounding may have changed.

    Of a block with itself each pair counts once; of a metric that isn't symmetric, once in each direction.

    ``values`` are those of :func:`compare_blocks`. See :func:`pipeline.metrics.resolution.count_unresolved`.
    """
    if rows.embedding is None or columns.embedding is None:
        return 0
    n, m = values.shape
    counted = np.ones((n, m), bool)
    if rows is columns:
        counted = ~np.eye(n, dtype=bool) if is_directed(metric) else np.triu(counted, 1)
    at_once = ROWS_AT_ONCE if metric.device.type == "cpu" else max(n, m)
    unresolved = 0
    with torch.no_grad():
        for start, other in itertools.product(range(0, n, at_once), range(0, m, at_once)):
            place = np.s_[start : start + at_once, other : other + at_once]
            if not counted[place].any():
                continue
            left = _part(metric, rows.embedding, start, at_once)
            right = _part(metric, columns.embedding, other, at_once)
            part = torch.from_numpy(values[place]).to(metric.device).double()
            rounding = metric.bound_rounding(left, right, part)
            unresolved += count_unresolved(values[place][counted[place]], rounding[counted[place]])
    return unresolved


def in_order(tiles: Iterable[Sequence[Tile]]) -> list[Tile]:
    """All tiles, row by row, to and fro: each shares a block with the one before."""
    order: list[Tile] = []
    there = sorted(set(itertools.chain.from_iterable(tiles)))
    for number, (_, row) in enumerate(itertools.groupby(there, lambda tile: tile[0])):
        order += list(row)[:: -1 if number % 2 else 1]
    return order


def _write_tile(
    group: store.Group,
    task: TileTask,
    name: str,
    tile: Tile,
    values: np.ndarray,
    mirrored: np.ndarray | None,
    rows: EmbeddedBlock,
) -> None:
    """Write a tile and its mirror image; that of a block with itself comes with what is wrong with frames.

    ``mirrored`` is what stands at the mirror image of a directed metric; None of one that is symmetric.
    """
    array = store.get_array(group, name)
    start, other = (task.blocks[index].start for index in tile)
    store.write_block(array, (start, other), values)
    if start != other:
        store.write_block(
            array, (other, start), np.ascontiguousarray(values.T if mirrored is None else mirrored)
        )
        return
    failure = store.get_array(store.get_group(group, schema.PROVENANCE), schema.FAILURE)
    texts = np.full((1, len(values)), "", object)
    for place, reason in rows.reasons.items():
        texts[0, place] = reason
    store.write_block(failure, (task.places[name], start), texts)
