"""Source files to ``frames.zarr``: a catalog's sequences, decoded in parallel and kept up to date.

What is done
------------
Each field of each data set is one dense group, see :mod:`pipeline.storage.schema`. Its rows hold good
sequences only. A task owns one shard, that is a whole number of sequences: it decodes what is new or
changed, keeps or moves the other rows, writes the shard at once, then the sequence's ``parameter`` and
``source``, and at last ``content``, the commit record. The arrays of names and records are chunked in step
with the shards, so two tasks never share a chunk.

A row whose ``content`` is empty isn't committed. It is emptied before the frames are overwritten, so a run
that is killed leaves no row whose record belongs to other frames, and the next run decodes the rows that
weren't committed and no others.

What is up to date
------------------
``source`` records the reader's code, the settings, the files with size, times and inode, and a hash of their
bytes. While all of these stay, a sequence is not read at all. When only times or inodes differ the bytes are
hashed: equal bytes refresh the record. A file that holds several sequences is not hashed for each of them;
they are decoded instead, and a row whose ``content`` turns out the same is not written again. With
``verify_sources`` every sequence is decoded and its ``content`` compared, whatever a look at its files tells.

New sequences take free rows, then the array grows. Rows of sequences that vanished or broke are filled
from the array's end, and the array shrinks; so after such a run rows are not in the order of the names.

What is quarantined
-------------------
The first good sequence of a field, in natural order of the names, gives the field its shape and dtype. A
sequence that has another, that cannot be decoded, that holds NaN or infinity, or whose parameter doesn't
rise within [0, 1] is listed with file and reason in the attribute ``quarantined`` of ``/<dataset>``. With
``missing: keep`` in the catalog, only a frame without any finite value does so. A sequence is tried again
when its files change, or that key. Where nothing is left of a field, the field is made anew from all that
its sequences now are, whatever its shape was.

All sequences of a field have the same weights of pixels, or none: those of the first good one. A sequence
that has others is quarantined, as one of another shape is; where none is left that has the field's, the field
is made anew. So is one whose weights are not those that are recorded of its sequences: a disk lost them.

A name is the key of a sequence. Where several have one, which of them is meant can't be told: they are listed
once, under it, with a reason that names their files, and what the store had of that name goes. The one that
is left, when the others were removed or renamed, is a sequence like any other.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.convert.shards import (
    COLUMNS,
    Decode,
    Keep,
    Move,
    Opening,
    Outcome,
    ShardTask,
    convert_shard,
    describe,
    open_field,
    same_look,
)
from pipeline.sources.catalog import Catalog, Dataset
from pipeline.sources.fetch import where
from pipeline.sources.readers import LazySequence, list_sequences
from pipeline.stage.bounded_map import run_bounded
from pipeline.storage import schema, store
from pipeline.storage.address import absolute
from pipeline.storage.checked_frames import hash_weights, is_bound, stored_weights, weights_of_record
from pipeline.storage.versions import versions

if TYPE_CHECKING:
    from distributed import Client

    from pipeline.workers.cluster import Cluster

Progress = Callable[[int, int], None]
"""Called with the number of sequences done, and the number that there are to look at."""

Connect = Callable[[], "Client | None"]


class ConversionError(RuntimeError):
    """A store that conversion cannot write into."""


@dataclass(frozen=True)
class Quarantined:
    """A sequence that was left out, and why."""

    dataset: str
    field: str
    sequence: str
    file: str
    reason: str


@dataclass
class ConversionReport:
    """What :func:`convert` did. Sequences are named ``<dataset>/<field>/<sequence>``.

    ``bytes`` counts the decoded bytes of the converted sequences, ``seconds`` the wall time.
    """

    converted: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    seconds: float = 0.0
    bytes: int = 0

    @property
    def changed(self) -> bool:
        """Whether the store holds other sequences than before."""
        return bool(self.converted or self.removed)


def convert(
    catalog: Catalog,
    out: str | os.PathLike[str],
    *,
    datasets: Iterable[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    cluster: Cluster | None = None,
    progress: Progress | None = None,
    verify_sources: bool = False,
) -> ConversionReport:
    """Bring ``frames.zarr`` at ``out`` up to date with a catalog.

    Data sets of the store that are not selected stay as they are. Memory is bounded by one shard
    (:data:`pipeline.storage.store.SHARD_BYTES`, or one sequence where that is larger) for each thread,
    whatever the archive's size; frames don't pass through the scheduler.

    Parameters
    ----------
    catalog : Catalog
    out : path or address
        The store; created when absent.
    datasets : iterable of str, optional
        Data sets or pools of the catalog; all by default.
    data_dir : path, optional
        Where downloads and simulations lie, see :func:`pipeline.sources.fetch.data_root`.
    cluster : Cluster, optional
        Its workers decode, and must see the same files. It is started only if there is something to decode.
        By default this process decodes, to the same bytes.
    progress : callable, optional
    verify_sources : bool, default False
        Decode every sequence and compare its content with the store's, also where size, times and inode of
        its files, and the code of its reader, are those of the last conversion.

    Raises
    ------
    CatalogError
        When data is missing (:class:`~pipeline.sources.catalog.MissingDataError`), a reader or field is
        unknown, or a data set has no sequences.
    ConversionError
        When ``out`` is a Zarr store of another kind or version.
    """
    started = time.perf_counter()
    path = absolute(out)
    entries = catalog.select(datasets)
    folders = {entry.name: where(catalog, entry, data_dir) for entry in entries}
    sequences = {entry.name: list_sequences(entry, folders[entry.name]) for entry in entries}

    with store.locked(path):
        root = _open(path)
        plans: list[_Plan] = []
        for entry in entries:
            listed = sequences[entry.name]
            plans += _plan_dataset(root, entry, folders[entry.name], listed, verify=verify_sources)
        attributes = _attributes(root, catalog, entries)
        if (
            any(plan.has_work for plan in plans)
            or not store.is_consolidated(path)
            or any(_differs(root, key, values) for key, values in attributes.items())
            or any(_other_attributes(root, plan) for plan in plans)
        ):
            connect: Connect = (lambda: None) if cluster is None else (lambda: cluster.client)
            _bring_up_to_date(path, root, plans, attributes, connect, progress, started)

    report = ConversionReport()
    for plan in plans:
        plan.report_to(report)
    report.seconds = time.perf_counter() - started
    return report


def _bring_up_to_date(
    path: str,
    root: store.Group,
    plans: Sequence[_Plan],
    attributes: dict[str, dict[str, Any]],
    connect: Connect,
    progress: Progress | None,
    started: float,
) -> None:
    """Do what the plans say, then write the groups' attributes, as :func:`_attributes` gives them."""
    # Stale, it would hide what is new; a run that is killed leaves none.
    store.drop_consolidated(path)
    store.remove_partials(path)
    datasets = [name for name in attributes if name]
    for dataset in datasets:
        if dataset not in root:
            store.create_group(root, dataset)
    _decode(path, root, plans, connect, progress)
    for dataset in datasets:
        found = _quarantined([plan for plan in plans if plan.dataset == dataset])
        _update(root, dataset, {schema.QUARANTINED: found})
    _compact(path, root, plans, connect)
    for key, values in attributes.items():
        _update(root, key, values)
    for plan in plans:
        if changed := _other_attributes(root, plan):
            frames = store.get_array(store.get_group(root, plan.key), schema.FRAMES)
            frames.update_attributes(changed)
    if any(plan.outcomes for plan in plans) or "convert_seconds" not in root.attrs:
        seconds = time.perf_counter() - started
        store.set_attributes(root, {"convert_seconds": seconds, "versions": versions()})
    store.consolidate(path)


# -- planning, in the driver: looks at files, decodes nothing ----------------------------------------------


@dataclass
class _Plan:
    """What is to be done for one field, and what came of it."""

    dataset: str
    key: str
    folder: str
    sequences: dict[str, LazySequence]
    exists: bool
    names: list[str]  # of every row, after the sequences without a row got one
    length: int  # rows in the store now
    sources: dict[int, Decode]  # rows to decode
    fresh_rows: list[int]  # rows that get another name than they have
    kept: list[str]
    holes: list[int]  # rows of no sequence
    removed: list[str]
    standing: dict[str, dict[str, Any]]  # record of each sequence that is known to be broken
    shared: frozenset[str]  # files that hold several sequences
    ragged: bool  # a run was killed while it changed the arrays' lengths
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.key.partition("/")[2]

    @property
    def has_work(self) -> bool:
        return bool(self.sources or self.holes or self.removed or self.ragged)

    @property
    def broken(self) -> dict[str, dict[str, Any]]:
        """Record of each sequence of this field that is quarantined."""
        failed = {name: outcome.record for name, outcome in self.outcomes.items() if outcome.failed}
        return {**self.standing, **failed}

    def report_to(self, report: ConversionReport) -> None:
        good = {name: outcome for name, outcome in self.outcomes.items() if not outcome.failed}
        report.converted += [f"{self.key}/{name}" for name, o in good.items() if not o.committed_before]
        report.unchanged += [f"{self.key}/{name}" for name in self.kept if name not in self.outcomes]
        report.unchanged += [f"{self.key}/{name}" for name, o in good.items() if o.committed_before]
        report.removed += [f"{self.key}/{name}" for name in self.removed]
        report.bytes += sum(o.nbytes for o in good.values() if not o.committed_before)
        report.quarantined += [
            Quarantined(self.dataset, self.name, name, record["file"], record["reason"])
            for name, record in sorted(self.broken.items())
        ]


def _open(path: str) -> store.Group:
    try:
        return store.open_output(path, schema.FRAMES_STORE)
    except store.StoreError as error:
        raise ConversionError(str(error)) from error


def _plan_dataset(
    root: store.Group, entry: Dataset, folder: Path, sequences: Sequence[LazySequence], *, verify: bool
) -> list[_Plan]:
    group = store.get_group(root, entry.name) if entry.name in root else None
    noted: Any = group.attrs.get(schema.QUARANTINED, []) if group is not None else []
    by_field: dict[str, list[LazySequence]] = {
        name: [] for name, _ in (group.groups() if group is not None else ())
    }
    for sequence in sequences:
        by_field.setdefault(sequence.field, []).append(sequence)
    return [
        _plan_field(
            root,
            f"{entry.name}/{name}",
            str(folder),
            members,
            [n for n in noted if n["field"] == name],
            verify=verify,
        )
        for name, members in sorted(by_field.items())
    ]


def _plan_field(
    root: store.Group,
    key: str,
    folder: str,
    members: Sequence[LazySequence],
    noted: Sequence[dict[str, Any]],
    *,
    verify: bool,
) -> _Plan:
    wanted = {sequence.name: sequence for sequence in members}
    uses = Counter(file.path for sequence in members for file in sequence.files)
    index = _read_index(root, key)
    if index is not None and _has_lost_weights(root, key, index):
        index = None  # made anew
    plan = _Plan(
        dataset=key.partition("/")[0],
        key=key,
        folder=folder,
        sequences=wanted,
        exists=index is not None,
        names=[],
        length=0 if index is None else len(index.names),
        sources={},
        fresh_rows=[],
        kept=[],
        holes=[],
        removed=[],
        standing={},
        ragged=index is not None and index.ragged,
        shared=frozenset(path for path, count in uses.items() if count > 1 or os.path.isdir(path)),
    )
    known = {note["sequence"]: note["source"] for note in noted}
    rows = _rows_by_name(index) if index is not None else {}
    if index is not None:
        plan.names = list(index.names)
        plan.removed = [name for name, row in rows.items() if name not in wanted and index.content[row]]
        for row, row_name in enumerate(index.names):
            if rows.get(row_name) != row or row_name not in wanted:
                plan.names[row] = ""
                plan.holes.append(row)
            elif not index.content[row] and "reason" in index.record(row):
                known[row_name] = index.record(row)

    free = list(plan.holes)
    for sequence_name, sequence in wanted.items():
        look = describe(sequence, folder)
        old_row = rows.get(sequence_name)
        if index is not None and old_row is not None and index.content[old_row]:
            record = index.record(old_row)
            if not is_bound(key, sequence_name, index.content[old_row], index.source[old_row]):
                plan.sources[old_row] = Decode(sequence)  # whose record this is, nobody knows
            elif not verify and same_look(record, look):
                plan.kept.append(sequence_name)
            else:
                plan.sources[old_row] = Decode(sequence, record, index.content[old_row], verify=verify)
        elif not verify and same_look(known.get(sequence_name, {}), look):
            plan.standing[sequence_name] = known[sequence_name]
            if old_row is not None:
                plan.names[old_row] = ""
                plan.holes.append(old_row)
        elif old_row is not None:
            plan.sources[old_row] = Decode(sequence)
        elif free:
            row = free.pop(0)
            plan.holes.remove(row)
            plan.names[row] = sequence_name
            plan.fresh_rows.append(row)
            plan.sources[row] = Decode(sequence)
        else:
            plan.fresh_rows.append(len(plan.names))
            plan.sources[len(plan.names)] = Decode(sequence)
            plan.names.append(sequence_name)
    for row, source in plan.sources.items():
        if any(file.path in plan.shared for file in source.sequence.files):
            plan.sources[row] = replace(source, hash_files=False)
    return plan


@dataclass(frozen=True)
class _Index:
    """The columns of a field that are small enough to be read whole."""

    names: list[str]
    content: list[str]
    source: list[str]
    ragged: bool

    def record(self, row: int) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self.source[row] or "{}")
        return record


def _read_index(root: store.Group, key: str) -> _Index | None:
    """The index of a field; None where the field isn't there or its creation was interrupted."""
    if f"{key}/{schema.CONTENT}" not in root:
        return None
    group = store.get_group(root, key)
    # `content` is resized first when the arrays shrink and last when they grow: its length counts.
    length = store.get_array(group, schema.CONTENT).shape[0]
    columns = [
        [str(text) for text in store.read(store.get_array(group, name), slice(0, length))]
        for name in (schema.SEQUENCE, schema.CONTENT, schema.SOURCE)
    ]
    ragged = any(store.get_array(group, name).shape[0] != length for name in COLUMNS)
    return _Index(columns[0], columns[1], columns[2], ragged)


def _has_lost_weights(root: store.Group, key: str, index: _Index) -> bool:
    """Tell whether a field's weights of pixels are not those that are recorded of its sequences."""
    rows = [row for row, content in enumerate(index.content) if content]
    recorded = {weights_of_record(index.source[row]) for row in rows}
    try:
        weights = stored_weights(store.get_group(root, key))
    except store.DamagedError:
        return True
    return bool(recorded) and recorded != {"" if weights is None else hash_weights(weights)}


def _rows_by_name(index: _Index) -> dict[str, int]:
    """The row of each name. A run killed while it moved a row leaves two of a name: the committed counts."""
    rows: dict[str, int] = {}
    for row, name in enumerate(index.names):
        if name and (name not in rows or (index.content[row] and not index.content[rows[name]])):
            rows[name] = row
    return rows


# -- doing -------------------------------------------------------------------------------------------------


def _decode(
    path: str, root: store.Group, plans: Sequence[_Plan], connect: Connect, progress: Progress | None
) -> None:
    """Decode what the plans say, field by field in parallel; a field of which nothing is left, once more."""
    total = sum(len(plan.sources) for plan in plans)
    done = 0
    by_key = {plan.key: plan for plan in plans}

    def take(plan: _Plan, outcomes: list[Outcome]) -> None:
        nonlocal done
        plan.outcomes.update((outcome.sequence, outcome) for outcome in outcomes)
        done += len(outcomes)
        if progress is not None:
            progress(min(done, total), total)

    if progress is not None:
        progress(0, total)
    pending = [plan for plan in plans if plan.has_work]
    while pending:
        new = [plan for plan in pending if not plan.exists and plan.sources]
        openings = (Opening(path, plan.key, plan.folder, tuple(plan.sources.values())) for plan in new)
        for key, outcomes in _run(open_field, openings, connect):
            take(by_key[key], outcomes)
        for plan in pending:
            if plan.exists:
                _reserve_rows(root, plan)
        shards = (
            task
            for plan in pending
            if f"{plan.key}/{schema.CONTENT}" in root
            for task in _shard_tasks(path, root, plan)
        )
        for key, outcomes in _run(convert_shard, shards, connect):
            take(by_key[key], outcomes)
        pending = [plan for plan in pending if plan.exists and _is_lost(plan)]
        for plan in pending:
            total += len(plan.sequences)
            _start_anew(root, plan)


def _is_lost(plan: _Plan) -> bool:
    """Whether nothing is good any more, though some sequences only had another shape than the field."""
    any_good = plan.kept or any(not outcome.failed for outcome in plan.outcomes.values())
    return not any_good and any("found" in record for record in plan.broken.values())


def _start_anew(root: store.Group, plan: _Plan) -> None:
    store.delete(root, plan.key)
    plan.exists, plan.length, plan.holes, plan.standing, plan.outcomes = False, 0, [], {}, {}
    plan.names = list(plan.sequences)
    plan.fresh_rows = list(range(len(plan.names)))
    plan.sources = {
        row: Decode(sequence, hash_files=not any(f.path in plan.shared for f in sequence.files))
        for row, sequence in enumerate(plan.sequences.values())
    }


def _reserve_rows(root: store.Group, plan: _Plan) -> None:
    """Give the sequences that have no row their rows: uncommitted, with their names."""
    if not plan.fresh_rows:
        return
    group = store.get_group(root, plan.key)
    arrays = {name: store.get_array(group, name) for name in COLUMNS}
    # In this order no moment of a kill leaves a name beside the record of another sequence. What lies
    # beyond the end of a last chunk may be old, so every new row is written.
    _put(arrays[schema.CONTENT], {row: "" for row in plan.fresh_rows if row < plan.length})
    for name in (schema.FRAMES, schema.PARAMETER, schema.SOURCE, schema.SEQUENCE):
        store.resize_rows(arrays[name], len(plan.names))
    _put(arrays[schema.SOURCE], dict.fromkeys(plan.fresh_rows, ""))
    _put(arrays[schema.SEQUENCE], {row: plan.names[row] for row in plan.fresh_rows})
    store.resize_rows(arrays[schema.CONTENT], len(plan.names))
    _put(arrays[schema.CONTENT], dict.fromkeys(plan.fresh_rows, ""))


def _shard_tasks(path: str, root: store.Group, plan: _Plan) -> Iterator[ShardTask]:
    """One task for each shard that has a row to decode, but for what the opening task has decoded."""
    rows = {row: source for row, source in plan.sources.items() if source.sequence.name not in plan.outcomes}
    yield from _tasks_of(path, root, plan, rows)


def _tasks_of(path: str, root: store.Group, plan: _Plan, rows: dict[int, Any]) -> Iterator[ShardTask]:
    if not rows:
        return
    frames = store.get_array(store.get_group(root, plan.key), schema.FRAMES)
    unit = _unit(frames)
    for start in sorted({row - row % unit for row in rows}):
        stop = min(start + unit, frames.shape[0])
        sources = tuple(rows.get(row, Keep()) for row in range(start, stop))
        yield ShardTask(path, plan.key, plan.folder, start, sources)


def _compact(path: str, root: store.Group, plans: Sequence[_Plan], connect: Connect) -> None:
    """Fill the rows that hold no good sequence from the array's end, and cut the end off."""
    moves: list[ShardTask] = []
    lengths: dict[str, int] = {}
    for plan in plans:
        index = _read_index(root, plan.key)
        if index is None or not plan.has_work:
            continue
        rows = _rows_by_name(index)
        good = [
            row
            for row, name in enumerate(index.names)
            if index.content[row] and rows.get(name) == row and name in plan.sequences
        ]
        lengths[plan.key] = len(good)
        occupied = set(good)
        holes = [row for row in range(len(good)) if row not in occupied]
        origins = reversed(good[len(good) - len(holes) :])
        sources = {hole: Move(origin) for hole, origin in zip(holes, origins, strict=True)}
        moves += _tasks_of(path, root, plan, sources)
    for _ in _run(convert_shard, moves, connect):
        pass
    for key, length in lengths.items():
        if length == 0:
            store.delete(root, key)
            continue
        group = store.get_group(root, key)
        for name in COLUMNS:
            store.resize_rows(store.get_array(group, name), length)


def _unit(array: store.Array) -> int:
    unit: int = (array.shards or array.chunks)[0]
    return unit


def _put(array: store.Array, values: dict[int, Any]) -> None:
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
    function: Callable[[Any], list[Outcome]],
    tasks: Iterable[Opening | ShardTask],
    connect: Connect,
) -> Iterator[tuple[str, list[Outcome]]]:
    """Run tasks here or on a client's workers; key of the field and outcomes, as they come."""
    arguments = [(task,) for task in tasks]
    if not arguments:
        return
    for (task,), outcomes, error in run_bounded(connect(), function, arguments):
        if error is not None:
            raise ConversionError(
                f"{task.path}: converting {task.key} failed: {type(error).__name__}: {error}. What is "
                "committed stays; run the conversion again to go on"
            ) from error
        yield task.key, outcomes


# -- attributes --------------------------------------------------------------------------------------------


def _quarantined(plans: Sequence[_Plan]) -> list[dict[str, Any]]:
    return [
        {
            "sequence": name,
            "field": plan.name,
            "file": record["file"],
            "reason": record["reason"],
            # The digest is that of a row of the store, which a quarantined sequence has none of.
            "source": {key: value for key, value in record.items() if key != "digest"},
        }
        for plan in plans
        for name, record in sorted(plan.broken.items())
    ]


def _attributes(root: store.Group, catalog: Catalog, entries: Sequence[Dataset]) -> dict[str, dict[str, Any]]:
    """Attributes by group, as far as they follow from the catalog; "" is the root."""
    # Pools of other catalogs' data sets stay; of this one's, what it says now.
    own = {entry.name for entry in catalog.datasets}
    earlier: Any = root.attrs.get("pools", {})
    pools = {pool: members for pool, members in earlier.items() if not own.intersection(members)}
    known: Any = root.attrs.get("datasets", [])
    here = {*known, *(entry.name for entry in entries)}
    ordered = [entry.name for entry in catalog.datasets if entry.name in here]
    about = {
        "schema_version": schema.SCHEMA_VERSION,
        "catalog": catalog.name,
        "title": catalog.title,
        # Tables have their columns in this order.
        "datasets": [*ordered, *(name for name in known if name not in ordered)],
        "pools": {**pools, **catalog.pools},
    }
    attributes = {"": about}
    for entry in entries:
        attributes[entry.name] = {
            "title": entry.title,
            "role": entry.role,
            "pools": [pool for pool, members in catalog.pools.items() if entry.name in members],
            "licence": entry.licence or catalog.licence,
            "citation": entry.citation or catalog.citation,
        }
    return attributes


def _other_attributes(root: store.Group, plan: _Plan) -> dict[str, Any]:
    """List attributes, such as units, that the first good sequence of a field has, and the field has not."""
    good = (name for name in plan.names if name in plan.sequences and name not in plan.broken)
    if (first := next(good, None)) is None or f"{plan.key}/{schema.CONTENT}" not in root:
        return {}
    there = store.get_array(store.get_group(root, plan.key), schema.FRAMES).attrs
    return {
        name: value for name, value in plan.sequences[first].attributes.items() if there.get(name) != value
    }


def _differs(root: store.Group, key: str, values: dict[str, Any]) -> bool:
    if key and key not in root:
        return True
    group = store.get_group(root, key) if key else root
    return any(group.attrs.get(name) != value for name, value in values.items())


def _update(root: store.Group, key: str, values: dict[str, Any]) -> None:
    if _differs(root, key, values):
        store.set_attributes(store.get_group(root, key) if key else root, values)
