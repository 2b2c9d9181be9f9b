"""Source files to ``frames.zarr``: a catalog's sequences, decoded in parallel and kept up to date.

Commit protocol
---------------
Each field of each data set is one dense group, see :mod:`pipeline.storage.schema`. Its rows hold only good
sequences. A task owns one shard, which holds a whole number of sequences. It decodes new and changed rows,
keeps or moves the other rows, and writes the shard at once. Then it writes ``parameter`` and ``source`` of
each sequence, and last ``content``, the commit record. The arrays of names and records are chunked in step
with the shards, so two tasks never share a chunk.

A row whose ``content`` is empty isn't committed. ``content`` is emptied before the frames are overwritten, so
a run that is killed leaves no row whose record belongs to other frames. The next run decodes the rows that
weren't committed, and no others.

Up to date
----------
``source`` records the reader's code, the settings, the files with size, times and inode, and a hash of their
bytes. While all of these stay, a sequence isn't read at all. When only times or inodes differ, the bytes are
hashed: equal bytes refresh the record. A file that holds several sequences isn't hashed for each of them.
They are decoded instead, and a row whose ``content`` comes out the same isn't written again. With
``verify_sources`` every sequence is decoded and its ``content`` compared, whatever its files look like.

New sequences take free rows, then the array grows. Rows of sequences that vanished or broke are filled
from the array's end, and the array shrinks. After such a run rows are no longer in the order of the names.

Quarantine
----------
The first good sequence of a field, in natural order of the names, gives the field its shape and dtype. A
sequence is quarantined when it has another shape or dtype, cannot be decoded, holds NaN or infinity, or has a
parameter that doesn't rise within [0, 1]. It is listed with file and reason in the attribute ``quarantined``
of ``/<dataset>``. With ``missing: keep`` in the catalog, only frames without any finite value are refused. A
sequence is tried again when its files or that key change. Where no good sequence of a field is left, the
field is made anew from all its sequences, whatever its shape was.

All sequences of a field share the weights of pixels of its first good one, or have none. A sequence with
other weights is quarantined, like one of another shape. A field whose stored weights differ from those
recorded with its sequences has lost them to a damaged disk, and is made anew.

A name identifies a sequence. Several sequences of one name can't be told apart: they are listed once, with a
reason that names their files, and what the store had under that name is removed. Once all but one are
removed or renamed, that one is converted like any other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.convert.execute import Connect, ConversionError, Progress, compact_fields, decode_fields
from pipeline.convert.plan import FieldPlan, plan_dataset
from pipeline.sources.catalog import Catalog, Dataset
from pipeline.sources.fetch import where
from pipeline.sources.readers import list_sequences
from pipeline.storage import schema, store
from pipeline.storage.address import absolute
from pipeline.storage.versions import versions

if TYPE_CHECKING:
    from pipeline.workers.cluster import Cluster

__all__ = ["ConversionError", "ConversionReport", "Progress", "Quarantined", "convert"]


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
    """Changes that :func:`convert` made. Sequences are named ``<dataset>/<field>/<sequence>``.

    Attributes
    ----------
    converted, unchanged, removed : list of str
        Names of sequences.
    quarantined : list of Quarantined
    seconds : float
        Wall time.
    bytes : int
        Decoded bytes of the converted sequences.
    """

    converted: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    seconds: float = 0.0
    bytes: int = 0

    @property
    def changed(self) -> bool:
        """True where the store holds other sequences than before."""
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
        Folder of downloads and simulations, see :func:`pipeline.sources.fetch.data_root`.
    cluster : Cluster, optional
        Its workers decode, and must see the same files. It is started only if there is something to decode.
        By default this process decodes, to the same bytes.
    progress : callable, optional
        Called with the number of sequences that are done, and of all that there are to look at.
    verify_sources : bool, default False
        Decode every sequence and compare its content with the store's, even where size, times and inode of
        its files and the code of its reader are those of the last conversion.

    Returns
    -------
    ConversionReport

    Raises
    ------
    CatalogError
        When data is missing (:class:`~pipeline.sources.catalog.MissingDataError`), a reader or field is
        unknown, or a data set has no sequences.
    ConversionError
        When ``out`` is a Zarr store of another kind or version.
    """
    start = time.perf_counter()
    path = absolute(out)
    entries = catalog.select(datasets)
    # List all sources first: an error in one of them leaves the store as it is.
    folders = {entry.name: where(catalog, entry, data_dir) for entry in entries}
    sequences = {entry.name: list_sequences(entry, folders[entry.name]) for entry in entries}

    with store.locked(path):
        root = _open(path)
        plans: list[FieldPlan] = []
        for entry in entries:
            members = sequences[entry.name]
            plans += plan_dataset(root, entry, folders[entry.name], members, verify=verify_sources)
        attributes = _attributes(root, catalog, entries)
        if _is_stale(path, root, plans, attributes):
            connect: Connect = (lambda: None) if cluster is None else (lambda: cluster.client)
            store.drop_consolidated(path)  # stale, it would hide new groups; a killed run leaves none
            store.remove_partials(path)
            _bring_up_to_date(path, root, plans, attributes, connect, progress)
            if any(plan.outcomes for plan in plans) or "convert_seconds" not in root.attrs:
                seconds = time.perf_counter() - start
                store.set_attributes(root, {"convert_seconds": seconds, "versions": versions()})
            store.consolidate(path)
    return _report(plans, time.perf_counter() - start)


def _open(path: str) -> store.Group:
    """Open the store, or create it."""
    try:
        return store.open_output(path, schema.FRAMES_STORE)
    except store.StoreError as error:
        raise ConversionError(str(error)) from error


def _is_stale(
    path: str, root: store.Group, plans: Sequence[FieldPlan], attributes: Mapping[str, dict[str, Any]]
) -> bool:
    """Tell whether anything in the store has to be written."""
    return (
        any(plan.has_work for plan in plans)
        or not store.is_consolidated(path)
        or any(_differs(root, key, values) for key, values in attributes.items())
        or any(_new_attributes(root, plan) for plan in plans)
    )


def _bring_up_to_date(
    path: str,
    root: store.Group,
    plans: Sequence[FieldPlan],
    attributes: Mapping[str, dict[str, Any]],
    connect: Connect,
    progress: Progress | None,
) -> None:
    """Carry out the plans, then write the groups' attributes, as :func:`_attributes` returns them."""
    datasets = [name for name in attributes if name]
    for dataset in datasets:
        if dataset not in root:
            store.create_group(root, dataset)
    decode_fields(path, root, plans, connect, progress)
    # Before rows of quarantined sequences are filled: a killed run must not forget why they failed.
    for dataset in datasets:
        quarantined = _quarantined([plan for plan in plans if plan.dataset == dataset])
        _update(root, dataset, {schema.QUARANTINED: quarantined})
    compact_fields(path, root, plans, connect)
    for key, values in attributes.items():
        _update(root, key, values)
    for plan in plans:
        if new_attributes := _new_attributes(root, plan):
            frames = store.get_array(store.get_group(root, plan.key), schema.FRAMES)
            frames.update_attributes(new_attributes)


def _report(plans: Sequence[FieldPlan], seconds: float) -> ConversionReport:
    """Sum up the outcomes of all plans."""
    report = ConversionReport(seconds=seconds)
    for plan in plans:
        good = {name: outcome for name, outcome in plan.outcomes.items() if not outcome.failed}
        report.converted += [f"{plan.key}/{name}" for name, o in good.items() if not o.committed_before]
        report.unchanged += [f"{plan.key}/{name}" for name in plan.unchanged if name not in plan.outcomes]
        report.unchanged += [f"{plan.key}/{name}" for name, o in good.items() if o.committed_before]
        report.removed += [f"{plan.key}/{name}" for name in plan.removed]
        report.bytes += sum(o.nbytes for o in good.values() if not o.committed_before)
        report.quarantined += [
            Quarantined(plan.dataset, plan.name, name, record["file"], record["reason"])
            for name, record in sorted(plan.quarantined.items())
        ]
    return report


# -- attributes --------------------------------------------------------------------------------------------


def _quarantined(plans: Sequence[FieldPlan]) -> list[dict[str, Any]]:
    """List the quarantined sequences of a data set as its attribute has them."""
    return [
        {
            "sequence": name,
            "field": plan.name,
            "file": record["file"],
            "reason": record["reason"],
            # The digest belongs to a row of the store, and a quarantined sequence has none.
            "source": {key: value for key, value in record.items() if key != "digest"},
        }
        for plan in plans
        for name, record in sorted(plan.quarantined.items())
    ]


def _attributes(root: store.Group, catalog: Catalog, entries: Sequence[Dataset]) -> dict[str, dict[str, Any]]:
    """Make the attributes of each group that follow from the catalog; "" is the root."""
    # Pools of other catalogs' data sets stay; this catalog's own are replaced.
    names = {entry.name for entry in catalog.datasets}
    earlier: Any = root.attrs.get("pools", {})
    pools = {pool: members for pool, members in earlier.items() if not names.intersection(members)}
    stored: Any = root.attrs.get("datasets", [])
    present = {*stored, *(entry.name for entry in entries)}
    dataset_order = [entry.name for entry in catalog.datasets if entry.name in present]
    descriptions = {
        "schema_version": schema.SCHEMA_VERSION,
        "catalog": catalog.name,
        "title": catalog.title,
        # Tables have their columns in this order.
        "datasets": [*dataset_order, *(name for name in stored if name not in dataset_order)],
        "pools": {**pools, **catalog.pools},
    }
    attributes = {"": descriptions}
    for entry in entries:
        attributes[entry.name] = {
            "title": entry.title,
            "role": entry.role,
            "pools": [pool for pool, members in catalog.pools.items() if entry.name in members],
            "licence": entry.licence or catalog.licence,
            "citation": entry.citation or catalog.citation,
        }
    return attributes


def _new_attributes(root: store.Group, plan: FieldPlan) -> dict[str, Any]:
    """List attributes, such as units, of a field's first good sequence that the stored field lacks."""
    names = (name for name in plan.rows.names if name in plan.sequences and name not in plan.quarantined)
    first = next(names, None)
    if first is None or f"{plan.key}/{schema.CONTENT}" not in root:
        return {}
    stored = store.get_array(store.get_group(root, plan.key), schema.FRAMES).attrs
    attributes = plan.sequences[first].attributes
    return {name: value for name, value in attributes.items() if stored.get(name) != value}


def _differs(root: store.Group, key: str, values: Mapping[str, Any]) -> bool:
    """Tell whether a group lacks any of these attributes."""
    if key and key not in root:
        return True
    group = store.get_group(root, key) if key else root
    return any(group.attrs.get(name) != value for name, value in values.items())


def _update(root: store.Group, key: str, values: Mapping[str, Any]) -> None:
    """Write a group's attributes where they differ."""
    if _differs(root, key, values):
        store.set_attributes(store.get_group(root, key) if key else root, values)
