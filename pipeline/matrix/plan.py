"""Plan a matrix over an archive: tiles, embeddings, memory, bytes and time, checked before it starts."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.matrix.embedding_cache import FRAMES_TOGETHER
from pipeline.matrix.measuring import Measured
from pipeline.matrix.tiles import ROWS_AT_ONCE
from pipeline.storage.limits import readable

TASK_SECONDS = 60.0
"""Longest time of a task, unless one tile takes longer. A lost worker costs a tile, so tasks may be long; the
longer they are, the fewer embeddings they need."""
TASKS_PER_THREAD = 8
"""Least tasks of a thread, so that all threads end about together."""
TILES_A_SIDE = 1024
"""Most tiles on a side of a large archive's matrix: a million files a metric, half as many fingerprints."""
SMALLEST_TILE = 8
WRITE_RATE = 100e6
"""Bytes of tiles that a thread compresses and writes a second: assumed, for the estimate alone."""
GPU_WORKSPACE = 700 * 2**20
"""Memory that a matrix product and a network take on a GPU besides."""


class PlanError(ValueError):
    """A plan that doesn't fit the memory; the message has the numbers."""


@dataclass(frozen=True)
class Workers:
    """Workers that a plan is made for.

    Attributes
    ----------
    workers, threads : int
        Processes, and threads of each, which share the embeddings of their process.
    memory : int
        Bytes that each process may take, or its device has.
    device : str
        Kind of device.
    """

    workers: int
    threads: int
    memory: int
    device: str = "cpu"


@dataclass(frozen=True)
class FamilyPlan:
    """Plan of one family of metrics; memory is that of a worker.

    Attributes
    ----------
    metrics : tuple of str
    tiles, up_to_date : int
        Tiles on and above the diagonal that are to be computed, and that are up to date.
    tasks : int
    embeddings : int
        Frames embedded in total, by all workers: ``factor`` times the number of frames.
    factor : float
    process, cache, work : int
        Bytes of memory: of the process anyway, of embeddings that are kept, and of work in hand at most.
    memory : int
        Bytes available.
    written : int
        Bytes of distances, uncompressed.
    seconds : float
        Estimated time.
    fault : str
        What could not be measured, and the estimate lacks.
    """

    metrics: tuple[str, ...]
    tiles: int
    up_to_date: int
    tasks: int
    embeddings: int
    factor: float
    process: int
    cache: int
    work: int
    memory: int
    written: int
    seconds: float
    fault: str = ""


@dataclass(frozen=True)
class Plan:
    """Plan of the matrix of one group; see :func:`describe_plan`."""

    key: str
    frames: int
    tile: int
    side: int
    workers: Workers
    families: tuple[FamilyPlan, ...]

    @property
    def seconds(self) -> float:
        """Estimated time."""
        return sum(family.seconds for family in self.families)


def choose_sides(
    n: int, measurements: Sequence[Measured], workers: Workers, tile: int | None
) -> tuple[int, int]:
    """Choose the frames on a side of a tile, and the tiles on a side of a task.

    Memory holds a block of frames for each thread, and one more that they share. Tasks are so large that they
    touch few blocks for their tiles, and so small that there are enough of them.

    Raises
    ------
    PlanError
        When the given tile, or the smallest, doesn't fit.
    """
    fits = [tile] if tile is not None else _tiles(n, workers.device)
    for length in fits:
        rooms = [
            room_for(measurement, workers, length) // (measurement.frame_bytes * length or 1)
            for measurement in measurements
        ]
        if min(rooms) >= workers.threads + 1:
            break
    else:
        worst = max(
            measurements, key=lambda family: work_bytes(family, workers, fits[-1]) + family.frame_bytes
        )
        raise PlanError(_does_not_fit(worst, workers, fits[-1]))
    pair_seconds = max(max(measurement.pair_seconds for measurement in measurements), 1e-12)
    blocks = -(-n // length)
    by_room = min(rooms) // (workers.threads + 1)
    by_time = int(math.sqrt(TASK_SECONDS / pair_seconds)) // length
    task_target = math.sqrt(2 * TASKS_PER_THREAD * workers.workers * workers.threads)
    return length, max(1, min(by_room, by_time, math.ceil(blocks / task_target)))


def _tiles(n: int, device: str) -> list[int]:
    """List lengths of blocks to try, the best first."""
    best = 128 if n >= 1024 else 64 if n >= 256 else 32
    if device != "cpu":
        best = 1024 if n >= 16384 else 512 if n >= 4096 else 256
    while n > best * TILES_A_SIDE:
        best *= 2
    return [best >> k for k in range(best.bit_length()) if best >> k >= SMALLEST_TILE]


def work_bytes(measurement: Measured, workers: Workers, tile: int) -> int:
    """Compute the bytes that a worker has in hand at most, besides the embeddings that it keeps."""
    batch = FRAMES_TOGETHER.get(workers.device, 32)
    reading = 2 * measurement.sequence_bytes + batch * measurement.raw_bytes
    embedding = batch * (2 * measurement.raw_bytes + 6 * measurement.prepared_bytes + measurement.frame_bytes)
    if workers.device == "cpu":
        # Both sides in double, where metrics take them so, and the tile.
        copy_bytes = 4 * min(ROWS_AT_ONCE, tile) * measurement.frame_bytes if measurement.copies else 0
        comparing = copy_bytes + 24 * tile**2
        return workers.threads * (reading + max(embedding, comparing))
    return workers.threads * (embedding + 32 * tile**2) + GPU_WORKSPACE


def room_for(measurement: Measured, workers: Workers, tile: int) -> int:
    """Compute the bytes of embeddings that a worker may keep; below 0 where there is no room at all."""
    return workers.memory - measurement.process_bytes - work_bytes(measurement, workers, tile)


def _does_not_fit(cost: Measured, workers: Workers, tile: int) -> str:
    block = cost.frame_bytes * tile
    demand = cost.process_bytes + work_bytes(cost, workers, tile) + (workers.threads + 1) * block
    return (
        f"a worker has {readable(workers.memory)} of memory, and with tiles of {tile} frames a side needs "
        f"{readable(demand)}: {readable(cost.process_bytes)} for the process, "
        f"{readable(work_bytes(cost, workers, tile))} for what is in hand, and {workers.threads + 1} "
        f"blocks of {readable(block)} ({tile} embeddings of {readable(cost.frame_bytes)}); give it more "
        "(--memory), smaller tiles (--tile), fewer threads, or smaller frames (--size)"
    )


def plan_family(
    metrics: Sequence[str],
    stale: Sequence[np.ndarray],
    n: int,
    tile: int,
    side: int,
    measurement: Measured,
    workers: Workers,
) -> FamilyPlan:
    """Plan one family of metrics; ``stale`` has the tiles of each that are out of date."""
    room = room_for(measurement, workers, tile)
    block = measurement.frame_bytes * tile
    if room < 2 * block:
        raise PlanError(_does_not_fit(measurement, workers, tile))
    count = len(stale[0])
    any_stale = np.logical_or.reduce(stale)
    squares = list(order_squares(any_stale, side))
    embedded = simulate_embeddings(squares, count, side, workers.workers, room // block if block else count)
    lengths = np.full(count, tile)
    lengths[-1:] = n - tile * (count - 1)
    frames = int((embedded * lengths).sum())
    of_tile = lengths[:, None] * lengths
    pairs = sum(int(of_tile[table].sum()) for table in stale)
    values = sum(int(of_tile[table | table.T].sum()) for table in stale)
    whole = count * (count + 1) // 2 * len(stale)
    tiles = sum(int(table.sum()) for table in stale)
    seconds = frames * measurement.embed_seconds + pairs / len(stale) * measurement.pair_seconds
    seconds += 4 * values / WRITE_RATE
    return FamilyPlan(
        tuple(metrics),
        tiles,
        whole - tiles,
        len(squares),
        frames,
        frames / max(int(lengths[any_stale.any(0) | any_stale.any(1)].sum()), 1),
        measurement.process_bytes,
        min(room, n * measurement.frame_bytes),
        work_bytes(measurement, workers, tile),
        workers.memory,
        4 * values,
        seconds / (workers.workers * workers.threads),
        measurement.fault,
    )


def order_squares(stale: np.ndarray, side: int) -> Iterator[tuple[int, int]]:
    """Order the squares of ``side`` × ``side`` tiles that hold a stale tile, row by row, to and fro.

    A square shares blocks with the one before it, or with the one before that.
    """
    count = -(-len(stale) // side)
    for row in range(count):
        columns = range(row, count)
        for column in reversed(columns) if row % 2 else columns:
            part = stale[row * side : (row + 1) * side, column * side : (column + 1) * side]
            if part.any():
                yield row, column


def simulate_embeddings(
    squares: Sequence[tuple[int, int]], count: int, side: int, workers: int, capacity: int
) -> np.ndarray:
    """Count how often each block is embedded when workers take the squares in turn: (count,) int.

    Each worker keeps the ``capacity`` blocks that it used last.
    """
    times = np.zeros(count, int)
    for worker in range(workers):
        cached: OrderedDict[int, None] = OrderedDict()
        for row, column in itertools.islice(squares, worker, None, workers):
            for index in _touched(row, column, side, count):
                if index in cached:
                    cached.move_to_end(index)
                    continue
                times[index] += 1
                cached[index] = None
                if len(cached) > capacity:
                    cached.popitem(last=False)
    return times


def _touched(row: int, column: int, side: int, count: int) -> Iterator[int]:
    """List the blocks that a square uses, in the order of :func:`pipeline.matrix.tiles.in_order`."""
    rows = range(row * side, min((row + 1) * side, count))
    columns = range(column * side, min((column + 1) * side, count))
    for number, i in enumerate(rows):
        for j in reversed(columns) if number % 2 else columns:
            if i < j:
                yield i
                yield j
            elif i == j:
                yield i


def describe_plan(plan: Plan) -> str:
    """Describe a plan in words, a line each for the group, its metrics, memory and time."""
    blocks = -(-plan.frames // plan.tile)
    lines = [
        f"{plan.key}: {plan.frames:,} frames, {_count(blocks, 'block')} of {plan.tile}, on "
        f"{_count(plan.workers.workers, 'worker')} of {_count(plan.workers.threads, 'thread')} "
        f"({plan.workers.device})"
    ]
    for family in plan.families:
        fresh = f", {family.up_to_date:,} up to date" if family.up_to_date else ""
        lines.append(
            f"  {', '.join(family.metrics)}: {_count(family.tiles, 'tile')} in "
            f"{_count(family.tasks, 'task')}{fresh}; "
            f"{family.embeddings:,} embeddings ({family.factor:.2f} a frame); "
            f"{readable(family.written)} of distances; about {in_time(family.seconds)}"
        )
        lines.append(
            f"    memory of a worker: {readable(family.process + family.cache + family.work)} of "
            f"{readable(family.memory)}: process {readable(family.process)}, embeddings "
            f"{readable(family.cache)}, in hand {readable(family.work)}"
        )
        if family.fault:
            lines.append(f"    could not be measured, and counts as nothing: {family.fault}")
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def in_time(seconds: float) -> str:
    """Format a time to be read."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    if seconds < 5400:
        return f"{seconds / 60:.2g} min"
    return f"{seconds / 3600:,.3g} h"
