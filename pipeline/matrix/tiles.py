"""Compute tiles of an archive's matrix on a worker: hold two blocks of frames, compare, write both sides.

A task is a square of tiles, so that it touches few blocks for many tiles. Of each tile the distances are
written first, on either side of the diagonal, then the fingerprint that says it is done.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lsim.claims import ClaimError, other_random_numbers
from lsim.embedding import Embedding
from lsim.error_bounds import PairPrecision
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
from pipeline.stage.provenance import take_precision
from pipeline.stage.stopwatch import Stopwatch
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
        Stores that are read and written, and the group of the second.
    requests : tuple of MetricRequest
        A family that embeds alike.
    places : mapping of str to int
        The index of each metric in provenance.
    tiles : mapping of str to tuple of (int, int)
        By metric, the tiles (i, j), i <= j, that are out of date, in the order to compute them.
    blocks : mapping of int to FrameBlock
        Blocks of frames that the tiles compare.
    scope : (lo, hi)
    frame_bytes : int
        Size of a frame's embedding.
    room : int
        Bytes of embeddings that the worker may keep.
    run : str
        The run's name, in which each worker tries each metric once.
    weights : FieldWeights, optional
        Weights of the frames' pixels, where metrics are weighted by them.
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
        """Description of the task in messages."""
        tiles = sorted({tile for of_metric in self.tiles.values() for tile in of_metric})
        return f"{self.key}, {len(tiles)} tiles from {tiles[0] if tiles else 'none'}"


@dataclass(frozen=True)
class TileResult:
    """Counts that a worker reports of a task; the distances themselves are in the store.

    Attributes
    ----------
    tiles : int
        Tiles that are done, metric by metric.
    errors : dict of str to str
        By metric, why the last of its undone tiles is undone.
    undone : int
        Tiles without a fingerprint: the next run tries them again.
    embedded : int
        Frames that were embedded.
    seconds : Counter
        Seconds of ``embed``, ``compare``, ``write``.
    precision : dict
        By metric, how those with a promise of precision kept it.
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
    """Records of the tiles of a task's square.

    An attempt of the same task on a worker that was taken for lost may write them at the same time.
    """

    group: store.Group
    place: int
    tiles: Sequence[Tile]
    arrays: dict[str, store.Array] = field(init=False)
    origin: Tile = field(init=False)
    part: tuple[slice, ...] = field(init=False)
    records: dict[Tile, dict[str, str | int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        provenance = store.get_group(self.group, schema.PROVENANCE)
        self.arrays = {name: store.get_array(provenance, name) for name in OF_TILES}
        side = self.arrays[schema.FINGERPRINT].chunks[1]
        i, j = self.tiles[0]
        self.origin = (i - i % side, j - j % side)
        self.part = tuple(slice(start, start + side) for start in self.origin)

    def write(self, tile: Tile, fingerprint: str, digest: str, missing: int = 0, unresolved: int = 0) -> None:
        """Record a tile, its fingerprint last; an empty one says that it is not done."""
        self.records[tile[0] - self.origin[0], tile[1] - self.origin[1]] = {
            schema.FINGERPRINT: fingerprint,
            schema.DIGEST: digest,
            schema.MISSING: missing,
            schema.UNRESOLVED: unresolved,
        }
        for name in reversed(OF_TILES):
            # What another attempt has done is read. All that this one has done is written again, as the other
            # may have read before and written since.
            values = store.read(self.arrays[name], (self.place, *self.part))
            for at, records in self.records.items():
                values[at] = records[name]
            store.write_block(self.arrays[name], (self.place, *self.origin), values[None])


def compute_tiles(task: TileTask) -> TileResult:
    """Compute and write a task's tiles. Runs on a worker.

    In memory are at most ``task.room`` bytes of embeddings, and what one comparison and one batch of frames
    take.
    """
    square = _Square(task)
    for tile in in_order(task.tiles.values()):
        if sigterm.requested():
            raise sigterm.Stopped  # of a driver that computes by itself; tiles before this one are done
        _check_wanted(task, tile)
        with square.hold(tile) as (rows, columns):
            for name in [name for name, tiles in task.tiles.items() if tile in tiles]:
                try:
                    compared = square.compare(name, tile, rows, columns)
                except Exception as error:
                    # One tile must not take down its task. Without a fingerprint the next run tries again.
                    square.note_undone(name, f"{type(error).__name__}: {error}")
                    continue
                square.write(name, tile, compared, rows, columns)
    return square.result()


@dataclass(frozen=True)
class _Tile:
    """Distances of a tile; of its mirror image, where a directed metric has others there."""

    values: np.ndarray
    mirrored: np.ndarray | None
    unresolved: int

    @property
    def arrays(self) -> list[np.ndarray]:
        """Distances that the tile's digest hashes."""
        return [self.values] if self.mirrored is None else [self.values, self.mirrored]

    def missing(self, rows: EmbeddedBlock, columns: EmbeddedBlock) -> int:
        """Count NaN among frames that can be compared."""
        mask = rows.comparable[:, None] & columns.comparable
        missing = int((np.isnan(self.values) & mask).sum())
        if self.mirrored is not None:
            missing += int((np.isnan(self.mirrored) & mask.T).sum())
        return missing


class _Square:
    """A task while a worker computes it: its stores, its metrics, and counts of what is done."""

    def __init__(self, task: TileTask) -> None:
        self.task = task
        self.source = store.open_store(task.frames)
        self.group = store.get_group(store.open_store(task.out, "r+"), task.key)
        metrics = [get_weighted(request, task.weights) for request in task.requests]
        self.first = metrics[0]
        self.metrics = {metric.name: metric for metric in metrics}
        self.records = {
            name: _Record(self.group, task.places[name], tiles) for name, tiles in task.tiles.items() if tiles
        }
        self.stopwatch = Stopwatch()
        self.errors: dict[str, str] = {}
        self.tile_count = self.undone = self.embedded = 0

    @contextlib.contextmanager
    def hold(self, tile: Tile) -> Iterator[tuple[EmbeddedBlock, EmbeddedBlock]]:
        """Hold the embedded blocks of a tile; those that aren't in the cache are embedded."""
        blocks: dict[Hashable, tuple[int, Callable[[], EmbeddedBlock]]] = {}
        for index in sorted(set(tile)):
            block = self.task.blocks[index]
            # With its place: a block of equal frames elsewhere is not the same block, and may be damaged.
            key = (embeds_as(self.first), self.task.scope, block.content, block.start)
            blocks[key] = (len(block) * self.task.frame_bytes, functools.partial(self._embed, block))
        with contextlib.ExitStack() as stack:
            with self.stopwatch("embed"):
                embedded_blocks = stack.enter_context(cache.hold(blocks, self.task.room))
            yield embedded_blocks[0], embedded_blocks[-1]

    def _embed(self, block: FrameBlock) -> EmbeddedBlock:
        self.embedded += len(block)
        return embed_block(self.source, block, self.first, self.task.scope)

    def compare(self, name: str, tile: Tile, rows: EmbeddedBlock, columns: EmbeddedBlock) -> _Tile:
        """Compare two blocks by a metric, and try the metric where that is due."""
        metric, (i, j) = self.metrics[name], tile
        with self.stopwatch("compare"):
            is_due = trials.is_due(self.task.run, metric)
            values = compare_blocks(metric, rows, columns)
            two_ways = i != j and is_directed(metric)
            mirrored = compare_blocks(metric, columns, rows) if two_ways else None
            if is_due:
                _try_metric(metric, self.task, self.source, self.task.blocks[i], rows)
            unresolved = unresolved_pairs(metric, rows, columns, values)
            if mirrored is not None:
                unresolved += unresolved_pairs(metric, columns, rows, mirrored)
        return _Tile(values, mirrored, unresolved)

    def write(
        self, name: str, tile: Tile, compared: _Tile, rows: EmbeddedBlock, columns: EmbeddedBlock
    ) -> None:
        """Write a tile and its record."""
        reason, (i, j) = rows.undone or columns.undone, tile
        reasons = [rows.reasons.get(k, "") for k in range(len(compared.values))] if i == j else []
        with self.stopwatch("write"):
            _check_wanted(self.task, tile)
            if reason:
                # An attempt on a lost worker may have finished it: its fingerprint must not stand for new
                # values.
                self.records[name].write(tile, "", "")
            _write_tile(self.group, self.task, name, tile, compared.values, compared.mirrored, rows)
            if reason:
                if any(reasons):  # so that they are known to be what was written
                    texts = tile_texts("", 0, 0, reasons)
                    self.records[name].write(tile, "", _digest(self.task, name, tile, (), texts))
                self.note_undone(name, reason)
                return
            missing = compared.missing(rows, columns)
            fingerprint = tile_fingerprint(
                self.task.blocks[i].content,
                self.task.blocks[j].content,
                self.metrics[name].specification_hash,
                self.task.scope,
            )
            texts = tile_texts(fingerprint, missing, compared.unresolved, reasons)
            digest = _digest(self.task, name, tile, compared.arrays, texts)
            _check_wanted(self.task, tile)
            self.records[name].write(tile, fingerprint, digest, missing, compared.unresolved)
            self.tile_count += 1

    def note_undone(self, name: str, reason: str) -> None:
        """Count a tile that the next run tries again."""
        self.errors[name] = reason
        self.undone += 1

    def result(self) -> TileResult:
        """Sum up what is done."""
        precision = take_precision(self.metrics.values())
        return TileResult(
            self.tile_count,
            self.errors,
            self.undone,
            self.embedded,
            self.stopwatch.seconds,
            precision,
            self.first.device.type,
        )


def _digest(
    task: TileTask, metric: str, tile: Tile, arrays: Sequence[np.ndarray], texts: Mapping[str, str]
) -> str:
    """Make the digest of a tile that is done, and of its mirror image where that is no transpose."""
    rows, columns = (task.blocks[index].labels for index in tile)
    identity = tile_identity(task.key, metric, tile, rows, columns)
    return digests.bind(identity, texts, "".join(map(digests.hash_values, arrays)))


def _check_wanted(task: TileTask, tile: Tile) -> None:
    """Write nothing once the run is over, as the next may be writing."""
    if not still_wanted():
        raise store.StoreError(
            f"{task.out}: tile {tile[0]},{tile[1]} of {task.key} is not waited for any more"
        )


def embeds_as(metric: Metric) -> Hashable:
    """Identify the embedding of a metric: equal for metrics that can be computed from one another's."""
    family = metric.specification_hash if metric.family is None else metric.family
    return (metric.preprocessing, type(metric).prepare, family)


def compare_blocks(metric: Metric, rows: EmbeddedBlock, columns: EmbeddedBlock) -> np.ndarray:
    """Compute the tile of two blocks, (rows, columns) float32.

    The tile of a block with itself is symmetric with a zero diagonal, unless the metric isn't symmetric: then
    rows are the references, and the diagonal is the metric's own. On a CPU the bits of a pair depend on its
    two frames alone, whatever the tile. Custom metrics are given copies, as the blocks are compared again, by
    other metrics and in other tiles.

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
                row_part = _part(metric, rows.embedding, start, at_once)
                for column in range(start if symmetric else 0, m, at_once):
                    is_diagonal = diagonal and start == column
                    column_part = (
                        row_part if is_diagonal else _part(metric, columns.embedding, column, at_once)
                    )
                    part = metric.distance_block(row_part, column_part)
                    single = part.dtype == torch.float32
                    values[start : start + at_once, column : column + at_once] = part.double().cpu().numpy()
    values[~rows.comparable] = np.nan
    values[:, ~columns.comparable] = np.nan
    # What lies below the diagonal squares of a tile of its own isn't computed.
    mirrored = np.where(np.isnan(values), values.T, values) if symmetric else values
    metric.claims.check_distances(mirrored, square=diagonal, single=single)
    if symmetric:
        lower_triangle = np.tril_indices(n, -1)
        values[lower_triangle] = values.T[lower_triangle]
        np.fill_diagonal(values, np.where(rows.comparable, 0, np.nan))
    elif diagonal and not np.isnan(itself := metric.info.distance_to_itself):
        np.fill_diagonal(values, np.where(rows.comparable, itself, np.nan))
    with np.errstate(over="ignore"):
        stored = values.astype(np.float32)
    # Nobody ranks by infinity, unless it is how far the metric says that equal frames are.
    stored[np.isinf(stored) & (stored != metric.info.distance_to_itself)] = np.nan
    return stored


def _part(metric: Metric, embedding: Embedding, start: int, length: int) -> Embedding:
    """Take frames of a block; custom metrics get a copy."""
    part = embedding[start : start + length]
    return part.copy() if metric.of_others else part


def _try_metric(
    metric: Metric, task: TileTask, source: store.Group, block: FrameBlock, rows: EmbeddedBlock
) -> None:
    """Try a metric on the first frames of a block: embed them again, and compare some pairs alone.

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
    with trials.trial(task.run, metric) as copy, torch.no_grad():
        part, repetition = _embed_again(
            copy, frames, task.scope, np.flatnonzero(rows.comparable[: len(frames)])
        )
        if repetition is not None:
            _check_again(
                copy, repetition, {name: values[part] for name, values in rows.embedding.parts.items()}
            )


def _embed_again(
    metric: Metric, frames: np.ndarray, scope: Scope, comparable: np.ndarray
) -> tuple[slice, tuple[Prepared, Embedding] | None]:
    """Embed frames once more; where that raises, warn and embed the first that can be compared.

    ``comparable`` are the frames that have an embedding. Returns which frames were embedded, and what they
    were prepared and embedded as; None where there is none to try.
    """
    try:
        return slice(0, len(frames)), _prepared_and_embedded(metric, frames, scope)
    except (FramesError, ClaimError):
        raise
    except Exception as error:  # the block was embedded one by one, too
        if not len(comparable):
            return slice(0, 0), None
        part = slice(comparable[0], comparable[0] + 1)
        logger.warning(
            "%s: %d frames at once failed (%s: %s), so the metric is tried on one of them",
            metric.name,
            len(frames),
            type(error).__name__,
            error,
        )
        return part, _prepared_and_embedded(metric, frames[part], scope)


def _prepared_and_embedded(
    metric: Metric, frames: np.ndarray, scope: Scope
) -> tuple[Prepared, Embedding] | None:
    prepared = metric.prepare(frames, scope)
    if not prepared.comparable.any():
        return None
    with other_random_numbers():
        return prepared, metric.embed_prepared(prepared)


def _check_again(metric: Metric, repetition: tuple[Prepared, Embedding], parts: Mapping[str, Tensor]) -> None:
    """Compare embeddings of frames with those of ``parts``, and distances of a few with those alone."""
    prepared, embedding = repetition
    places = torch.from_numpy(np.flatnonzero(prepared.comparable)).to(metric.device)
    exact = metric.device.type == "cpu"
    for name, part in parts.items():
        first, second = (
            trials.as_array(values[places.to(values.device)]) for values in (part, embedding.parts[name])
        )
        metric.claims.check_repeated(first, second, f"embedding {name!r}", exact=exact)
    alone = metric.check_claims(prepared)
    few = Embedding(
        {name: part[places[: len(alone)].to(part.device)] for name, part in embedding.parts.items()}
    )
    amid_others = metric.distance_block(few, few.copy()).double().cpu().numpy()
    metric.claims.check_repeated(amid_others, alone, "amid other frames, and then alone, d", exact=False)


def unresolved_pairs(metric: Metric, rows: EmbeddedBlock, columns: EmbeddedBlock, values: np.ndarray) -> int:
    """Count the pairs of a tile whose distance rounding may have changed.

    In a block with itself each pair counts once; for a metric that isn't symmetric, once in each direction.

    ``values`` are those of :func:`compare_blocks`. See :func:`pipeline.metrics.resolution.count_unresolved`.
    """
    if rows.embedding is None or columns.embedding is None:
        return 0
    n, m = values.shape
    mask = np.ones((n, m), bool)
    if rows is columns:
        mask = ~np.eye(n, dtype=bool) if is_directed(metric) else np.triu(mask, 1)
    at_once = ROWS_AT_ONCE if metric.device.type == "cpu" else max(n, m)
    unresolved = 0
    with torch.no_grad():
        for start, column in itertools.product(range(0, n, at_once), range(0, m, at_once)):
            place = np.s_[start : start + at_once, column : column + at_once]
            if not mask[place].any():
                continue
            row_part = _part(metric, rows.embedding, start, at_once)
            column_part = _part(metric, columns.embedding, column, at_once)
            part = torch.from_numpy(values[place]).to(metric.device).double()
            rounding = metric.bound_rounding(row_part, column_part, part)
            unresolved += count_unresolved(values[place][mask[place]], rounding[mask[place]])
    return unresolved


def in_order(tiles: Iterable[Sequence[Tile]]) -> list[Tile]:
    """Order all tiles row by row, to and fro, so that each shares a block with the one before."""
    order: list[Tile] = []
    distinct = sorted(set(itertools.chain.from_iterable(tiles)))
    for number, (_, row) in enumerate(itertools.groupby(distinct, lambda tile: tile[0])):
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
    """Write a tile and its mirror image; with a block's tile with itself, why frames have no distances.

    ``mirrored`` has the values of a directed metric at the mirror image; None for a symmetric metric.
    """
    array = store.get_array(group, name)
    start, column = (task.blocks[index].start for index in tile)
    store.write_block(array, (start, column), values)
    if start != column:
        store.write_block(
            array, (column, start), np.ascontiguousarray(values.T if mirrored is None else mirrored)
        )
        return
    failure = store.get_array(store.get_group(group, schema.PROVENANCE), schema.FAILURE)
    texts = np.full((1, len(values)), "", object)
    for place, reason in rows.reasons.items():
        texts[0, place] = reason
    store.write_block(failure, (task.places[name], start), texts)
