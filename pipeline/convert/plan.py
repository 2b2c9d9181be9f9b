"""Plan the conversion of a field: which sequences to decode, and which row each gets.

Runs in the driver. It looks at files, and decodes nothing.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.convert.decode import Decode, Outcome, describe, same_look
from pipeline.convert.shards import COLUMNS
from pipeline.sources.catalog import Dataset
from pipeline.sources.readers import LazySequence
from pipeline.storage import schema, store
from pipeline.storage.checked_frames import hash_weights, is_bound, stored_weights, weights_of_record


@dataclass(frozen=True)
class Index:
    """Columns of a field that are small enough to be read whole.

    Attributes
    ----------
    names, content, source : list of str
    ragged : bool
        True if a run was killed while it changed the lengths of the field's arrays.
    """

    names: list[str]
    content: list[str]
    source: list[str]
    ragged: bool

    def record(self, row: int) -> dict[str, Any]:
        """Parse the record of a row's source."""
        record: dict[str, Any] = json.loads(self.source[row] or "{}")
        return record

    def rows_by_name(self) -> dict[str, int]:
        """Find the row of each name.

        A run that is killed while it moves a row leaves two rows of one name: the committed one counts.
        """
        rows: dict[str, int] = {}
        for row, name in enumerate(self.names):
            if name and (name not in rows or (self.content[row] and not self.content[rows[name]])):
                rows[name] = row
        return rows


def read_index(root: store.Group, key: str) -> Index | None:
    """Read the index of a field; None where there is no field, or its creation was interrupted."""
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
    return Index(columns[0], columns[1], columns[2], ragged)


def _has_lost_weights(root: store.Group, key: str, index: Index) -> bool:
    """Tell whether a field's weights of pixels differ from those recorded with its sequences."""
    rows = [row for row, content in enumerate(index.content) if content]
    recorded = {weights_of_record(index.source[row]) for row in rows}
    try:
        weights = stored_weights(store.get_group(root, key))
    except store.DamagedError:
        return True
    return bool(recorded) and recorded != {"" if weights is None else hash_weights(weights)}


@dataclass
class Rows:
    """Names of a field's rows as they will be.

    Attributes
    ----------
    names : list of str
        Name of each row; empty for a hole.
    holes : list of int
        Rows of no sequence.
    fresh : list of int
        Rows that get another name than they have.
    """

    names: list[str]
    holes: list[int] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)

    def vacate(self, row: int) -> None:
        """Make a row a hole."""
        self.names[row] = ""
        self.holes.append(row)

    def assign(self, name: str, free: list[int]) -> int:
        """Give a sequence the first free row, or a new one at the end; return the row."""
        if free:
            row = free.pop(0)
            self.holes.remove(row)
            self.names[row] = name
        else:
            row = len(self.names)
            self.names.append(name)
        self.fresh.append(row)
        return row


@dataclass
class FieldPlan:
    """Work to do on one field, and the outcomes of its sequences as they come.

    Attributes
    ----------
    key : str
        ``<dataset>/<field>``.
    folder : str
        Folder of the data set.
    sequences : dict of str to LazySequence
        All sequences that the source has, by name.
    unhashed : frozenset of str
        Names of sequences whose files aren't hashed, since other sequences share them.
    exists : bool
        Whether the store has the field.
    length : int
        Rows that the store has now.
    ragged : bool
        See :class:`Index`.
    rows : Rows
    sources : dict of int to Decode
        Rows to decode.
    unchanged : list of str
        Sequences that are up to date.
    removed : list of str
        Sequences in the store that the source has no more.
    failures : dict of str to dict
        Records of sequences that failed before and have not changed since.
    outcomes : dict of str to Outcome
    """

    key: str
    folder: str
    sequences: dict[str, LazySequence]
    unhashed: frozenset[str]
    exists: bool
    length: int
    ragged: bool
    rows: Rows
    sources: dict[int, Decode]
    unchanged: list[str]
    removed: list[str]
    failures: dict[str, dict[str, Any]]
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return self.key.partition("/")[0]

    @property
    def name(self) -> str:
        """Name of the field in its data set."""
        return self.key.partition("/")[2]

    @property
    def has_work(self) -> bool:
        """True where the store's arrays have to change."""
        return bool(self.sources or self.rows.holes or self.removed or self.ragged)

    @property
    def quarantined(self) -> dict[str, dict[str, Any]]:
        """Record of each quarantined sequence of this field."""
        new = {name: outcome.record for name, outcome in self.outcomes.items() if outcome.failed}
        return {**self.failures, **new}

    @property
    def is_lost(self) -> bool:
        """True where no sequence is good, but one would be in a field of another shape."""
        any_good = self.unchanged or any(not outcome.failed for outcome in self.outcomes.values())
        return not any_good and any("found" in record for record in self.quarantined.values())

    def restart(self) -> None:
        """Plan to decode all sequences into a new field."""
        self.exists, self.length, self.failures, self.outcomes = False, 0, {}, {}
        self.rows = Rows(names=[])
        self.sources = {
            self.rows.assign(name, []): Decode(sequence, hash_files=name not in self.unhashed)
            for name, sequence in self.sequences.items()
        }


def plan_dataset(
    root: store.Group, entry: Dataset, folder: Path, sequences: Sequence[LazySequence], *, verify: bool
) -> list[FieldPlan]:
    """Plan all fields of a data set, those of the source and those of the store.

    Parameters
    ----------
    root : Group
        Root of the store.
    entry : Dataset
    folder : Path
        Where its files are.
    sequences : sequence of LazySequence
        All that its reader lists.
    verify : bool
        Decode all sequences, whatever a look at their files says.
    """
    group = store.get_group(root, entry.name) if entry.name in root else None
    quarantined: Any = group.attrs.get(schema.QUARANTINED, []) if group is not None else []
    by_field: dict[str, list[LazySequence]] = {
        name: [] for name, _ in (group.groups() if group is not None else ())
    }
    for sequence in sequences:
        by_field.setdefault(sequence.field, []).append(sequence)
    plans = []
    for name, members in sorted(by_field.items()):
        failures = {note["sequence"]: note["source"] for note in quarantined if note["field"] == name}
        key = f"{entry.name}/{name}"
        plans.append(_plan_field(root, key, str(folder), members, failures, verify=verify))
    return plans


def _plan_field(
    root: store.Group,
    key: str,
    folder: str,
    members: Sequence[LazySequence],
    failures: dict[str, dict[str, Any]],
    *,
    verify: bool,
) -> FieldPlan:
    """Plan one field; ``failures`` has the records of its quarantined sequences by name."""
    failures = dict(failures)
    index = read_index(root, key)
    if index is not None and _has_lost_weights(root, key, index):
        index = None  # the field is made anew
    exists, index = index is not None, index or Index([], [], [], ragged=False)
    rows_by_name = index.rows_by_name()
    sequences = {sequence.name: sequence for sequence in members}
    plan = FieldPlan(
        key=key,
        folder=folder,
        sequences=sequences,
        unhashed=_sharing_files(members),
        exists=exists,
        length=len(index.names),
        ragged=index.ragged,
        rows=Rows(list(index.names)),
        sources={},
        unchanged=[],
        removed=[name for name, row in rows_by_name.items() if name not in sequences and index.content[row]],
        failures={},
    )
    for row, name in enumerate(index.names):
        if rows_by_name.get(name) != row or name not in sequences:
            plan.rows.vacate(row)
        elif not index.content[row] and "reason" in index.record(row):
            failures[name] = index.record(row)  # a run was killed before it listed this one

    # A snapshot: rows that become holes below are filled when the field is compacted.
    free = list(plan.rows.holes)
    for name, sequence in sequences.items():
        look = describe(sequence, folder)
        row = rows_by_name.get(name, -1)
        if row >= 0 and index.content[row]:
            source = _decode_committed(key, index, row, sequence, look, verify=verify)
            if source is None:
                plan.unchanged.append(name)
            else:
                plan.sources[row] = source
        elif not verify and same_look(failures.get(name, {}), look):
            plan.failures[name] = failures[name]
            if row >= 0:
                plan.rows.vacate(row)
        else:
            plan.sources[row if row >= 0 else plan.rows.assign(name, free)] = Decode(sequence)
    for row, source in plan.sources.items():
        if source.sequence.name in plan.unhashed:
            plan.sources[row] = replace(source, hash_files=False)
    return plan


def _decode_committed(
    key: str, index: Index, row: int, sequence: LazySequence, look: dict[str, Any], *, verify: bool
) -> Decode | None:
    """Say how to decode a sequence that has a committed row; None where the row is up to date."""
    record, content = index.record(row), index.content[row]
    if not is_bound(key, sequence.name, content, index.source[row]):
        return Decode(sequence)  # the record may be another sequence's
    if not verify and same_look(record, look):
        return None
    return Decode(sequence, record, content, verify=verify)


def _sharing_files(members: Sequence[LazySequence]) -> frozenset[str]:
    """Name the sequences that share a file with others, or whose file is a folder.

    Hashing such a file for each of its sequences would take longer than decoding them.
    """
    uses = Counter(file.path for sequence in members for file in sequence.files)
    shared = {path for path, count in uses.items() if count > 1 or os.path.isdir(path)}
    return frozenset(s.name for s in members if any(file.path in shared for file in s.files))
