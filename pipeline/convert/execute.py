"""Carry out the plans of fields: create and resize arrays, and have workers convert shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.convert.decode import Outcome
from pipeline.convert.plan import FieldPlan, read_index
from pipeline.convert.shards import (
    COLUMNS,
    Keep,
    Move,
    Opening,
    RowSource,
    ShardTask,
    convert_shard,
    open_field,
)
from pipeline.stage.bounded_map import run_bounded
from pipeline.storage import schema, store

if TYPE_CHECKING:
    from distributed import Client

Progress = Callable[[int, int], None]
"""Called with the number of sequences that are done, and of all that there are to look at."""

Connect = Callable[[], "Client | None"]
"""Starts a cluster where there is one to start, and returns its client."""


class ConversionError(RuntimeError):
    """A store that conversion cannot write into."""


def decode_fields(
    path: str, root: store.Group, plans: Sequence[FieldPlan], connect: Connect, progress: Progress | None
) -> None:
    """Decode the sequences of all plans in parallel, and note their outcomes in the plans.

    A field of which no sequence is good any more is made anew: all its sequences are decoded once more.
    """
    progress = progress or (lambda count, total: None)
    total, count = sum(len(plan.sources) for plan in plans), 0
    by_key = {plan.key: plan for plan in plans}
    progress(0, total)
    pending = [plan for plan in plans if plan.has_work]
    while pending:
        for key, outcomes in _run_round(path, root, pending, connect):
            by_key[key].outcomes.update((outcome.sequence, outcome) for outcome in outcomes)
            count += len(outcomes)
            progress(min(count, total), total)
        pending = [plan for plan in pending if plan.exists and plan.is_lost]
        for plan in pending:
            total += len(plan.sequences)
            store.delete(root, plan.key)
            plan.restart()


def _run_round(
    path: str, root: store.Group, plans: Sequence[FieldPlan], connect: Connect
) -> Iterator[tuple[str, list[Outcome]]]:
    """Create new fields, then convert the shards of all; yield a field's key and outcomes as they come."""
    new = [plan for plan in plans if not plan.exists and plan.sources]
    openings = (Opening(path, plan.key, plan.folder, tuple(plan.sources.values())) for plan in new)
    yield from _run(open_field, openings, connect)
    for plan in plans:
        if plan.exists:
            _reserve_rows(root, plan)
    shards = (
        task
        for plan in plans
        if f"{plan.key}/{schema.CONTENT}" in root
        for task in _shard_tasks(path, root, plan)
    )
    yield from _run(convert_shard, shards, connect)


def _reserve_rows(root: store.Group, plan: FieldPlan) -> None:
    """Give the sequences that have no row their rows: uncommitted, with their names."""
    names, fresh = plan.rows.names, plan.rows.fresh
    if not fresh:
        return
    group = store.get_group(root, plan.key)
    arrays = {name: store.get_array(group, name) for name in COLUMNS}
    # In this order, a run killed at any moment leaves no name beside another sequence's record. The last
    # chunk may hold old values beyond the array's end, so every new row is written.
    _put(arrays[schema.CONTENT], {row: "" for row in fresh if row < plan.length})
    for name in (schema.FRAMES, schema.PARAMETER, schema.SOURCE, schema.SEQUENCE):
        store.resize_rows(arrays[name], len(names))
    _put(arrays[schema.SOURCE], dict.fromkeys(fresh, ""))
    _put(arrays[schema.SEQUENCE], {row: names[row] for row in fresh})
    store.resize_rows(arrays[schema.CONTENT], len(names))
    _put(arrays[schema.CONTENT], dict.fromkeys(fresh, ""))


def _shard_tasks(path: str, root: store.Group, plan: FieldPlan) -> Iterator[ShardTask]:
    """Make a task for each shard with rows to decode, without those that :func:`open_field` decoded."""
    rows = {row: source for row, source in plan.sources.items() if source.sequence.name not in plan.outcomes}
    return _tasks_of_rows(path, root, plan, rows)


def _tasks_of_rows(
    path: str, root: store.Group, plan: FieldPlan, rows: Mapping[int, RowSource]
) -> Iterator[ShardTask]:
    """Make a task for each shard that holds one of these rows; its other rows stay."""
    if not rows:
        return
    frames = store.get_array(store.get_group(root, plan.key), schema.FRAMES)
    unit = _unit(frames)
    for start in sorted({row - row % unit for row in rows}):
        stop = min(start + unit, frames.shape[0])
        sources = tuple(rows.get(row, Keep()) for row in range(start, stop))
        yield ShardTask(path, plan.key, plan.folder, start, sources)


def compact_fields(path: str, root: store.Group, plans: Sequence[FieldPlan], connect: Connect) -> None:
    """Fill the rows that hold no good sequence from the array's end, and cut the end off."""
    tasks: list[ShardTask] = []
    lengths: dict[str, int] = {}
    for plan in plans:
        index = read_index(root, plan.key)
        if index is None or not plan.has_work:
            continue
        rows = index.rows_by_name()
        good = [
            row
            for row, name in enumerate(index.names)
            if index.content[row] and rows.get(name) == row and name in plan.sequences
        ]
        lengths[plan.key] = len(good)
        occupied = set(good)
        holes = [row for row in range(len(good)) if row not in occupied]
        origins = reversed(good[len(good) - len(holes) :])
        moves = {hole: Move(origin) for hole, origin in zip(holes, origins, strict=True)}
        tasks += _tasks_of_rows(path, root, plan, moves)
    for _ in _run(convert_shard, tasks, connect):
        pass
    for key, length in lengths.items():
        if length == 0:
            store.delete(root, key)
            continue
        group = store.get_group(root, key)
        for name in COLUMNS:
            store.resize_rows(store.get_array(group, name), length)


def _unit(array: store.Array) -> int:
    """Count the rows that one writer owns: those of a shard, or of a chunk where there are no shards."""
    unit: int = (array.shards or array.chunks)[0]
    return unit


def _put(array: store.Array, values: Mapping[int, Any]) -> None:
    """Change some rows of an array, chunk by chunk; the caller is the only writer of these chunks."""
    unit = _unit(array)
    for start in sorted({row - row % unit for row in values}):
        stop = min(start + unit, array.shape[0])
        block = store.read(array, slice(start, stop))
        block = block if block.flags.writeable else block.copy()
        for row in range(start, stop):
            if row in values:
                block[row - start] = values[row]
        store.write_rows(array, start, block)


def _run(
    function: Callable[[Any], list[Outcome]], tasks: Iterable[Opening | ShardTask], connect: Connect
) -> Iterator[tuple[str, list[Outcome]]]:
    """Run tasks here or on a client's workers; yield a field's key and outcomes as they come."""
    arguments = [(task,) for task in tasks]
    if not arguments:
        return
    for (task,), outcomes, error in run_bounded(connect(), function, arguments):
        if error is not None:
            raise ConversionError(
                f"{task.path}: converting {task.key} failed: {type(error).__name__}: {error}. Committed "
                "sequences stay; run the conversion again to continue"
            ) from error
        yield task.key, outcomes
