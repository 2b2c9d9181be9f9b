"""Gather everything that the report shows, in the order of the page."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.correlate import statistics
from pipeline.report.provenance import Provenance, collect_provenance, note_changed_distances
from pipeline.report.ranking import (
    FurtherTable,
    Headline,
    TableRow,
    make_further_tables,
    make_headline,
    make_rows,
    rank_metrics,
    records,
)
from pipeline.report.reading import (
    Field,
    ReportError,
    Stores,
    Strip,
    open_stores,
    read_fields,
    read_record,
    read_strip,
)
from pipeline.storage import schema
from pipeline.storage.csv_tables import read_csv

WORST = 6
"""How many of the worst-ranked sequences are shown."""
ILLUSTRATED = 16
"""Sets beyond this many are in all tables, but have no pictures: the page must stay small."""
SHOWN_FIELDS = 3
"""Fields of a set whose frames are shown; the rest is named."""


@dataclass(frozen=True)
class Column:
    """A column of the main table: a set or a pool.

    Attributes
    ----------
    name : str
    pool : bool
    members : list of str
    title : str
    role : str
        Role of the catalog, such as test.
    """

    name: str
    pool: bool
    members: list[str]
    title: str
    role: str


@dataclass(frozen=True)
class Card:
    """One metric on one set.

    Attributes
    ----------
    metric : str
    value : float
    left_out : int
        Sequences that are left out.
    matrix : ndarray of shape (frame, frame), or None
        Distances of the typical sequence.
    curves : list of (targets, predictions)
        Of each field, both of shape (sequence, pair); without sequences that are left out.
    """

    metric: str
    value: float
    left_out: int
    matrix: np.ndarray | None
    curves: list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class SetSection:
    """A set's section: an example of each field, and a card for each metric.

    Attributes
    ----------
    name, title, role, citation, licence : str
    sequences : int
    fields : list of str
    examples : list of Strip
    matrix_of : str
        Name of the sequence whose distance matrices are shown.
    cards : list of Card
    """

    name: str
    title: str
    role: str
    citation: str
    licence: str
    sequences: int
    fields: list[str]
    examples: list[Strip]
    matrix_of: str
    cards: list[Card]


@dataclass(frozen=True)
class SequenceValue:
    """A metric's correlation on one sequence."""

    metric: str
    value: float


@dataclass(frozen=True)
class WorstSequence:
    """A sequence that the best metric ranks badly, with the values of all metrics."""

    value: float
    strip: Strip
    values: list[SequenceValue]


@dataclass(frozen=True)
class LeftOut:
    """A sequence that figures leave out for one reason, with the metrics and protocols this holds for."""

    dataset: str
    field: str
    sequence: str
    reason: str
    metrics: list[str]
    protocols: list[str]


@dataclass(frozen=True)
class Quarantined:
    """A sequence that could not be converted."""

    dataset: str
    field: str
    sequence: str
    file: str
    reason: str


@dataclass(frozen=True)
class Contents:
    """Everything that the page shows, under the names that its template uses.

    Attributes
    ----------
    title, catalog : str
        Of the archive.
    date : str
        When the correlations were computed.
    protocol, statistic : str
        What metrics are ranked by.
    protocols : list of str
        All that were computed.
    replicates, sequences : int
    metrics : list of str
        From best to worst.
    columns, rows : list of Column, list of TableRow
        The main table.
    headline : Headline
    sets : list of SetSection
    not_illustrated : list of str
        Sets without a section.
    worst : list of WorstSequence
    further : list of FurtherTable
    left_out, quarantined : list of LeftOut, list of Quarantined
    unavailable : dict of str to str
        Why metrics were left out.
    notes : list of str
    made_by : Provenance
    missing_frames : str
        Why there are no pictures of frames; empty where there are.
    damaged : list of str
    tables : dict of str to DataFrame
        Tables beside the page, by name.
    """

    title: str
    catalog: str
    date: str
    protocol: str
    protocols: list[str]
    statistic: str
    replicates: int
    sequences: int
    metrics: list[str]
    columns: list[Column]
    rows: list[TableRow]
    headline: Headline
    sets: list[SetSection]
    not_illustrated: list[str]
    worst: list[WorstSequence]
    further: list[FurtherTable]
    left_out: list[LeftOut]
    quarantined: list[Quarantined]
    unavailable: dict[str, str]
    notes: list[str]
    made_by: Provenance
    missing_frames: str
    damaged: list[str]
    tables: dict[str, pd.DataFrame]


def gather(results: str, folder: Path, protocol: str | None, statistic: str) -> Contents:
    """Read all that the report shows; see :func:`pipeline.report.write_report`.

    ``folder`` holds the files of ``results``, which may be an address.
    """
    record = read_record(results, folder)
    correlations = pd.read_parquet(folder / "correlations.parquet")
    differences = pd.read_parquet(folder / "differences.parquet")
    omissions = read_csv(folder / "left_out.csv")
    protocol = _choose_protocol(record, protocol)
    if statistic not in statistics.POOLED:
        raise ReportError(f"unknown statistic {statistic!r}; expected one of {', '.join(statistics.POOLED)}")
    stores = open_stores(results, record)
    fields, damaged = read_fields(stores, record["metrics"], protocol, omissions)

    # Rank by one protocol and statistic. The best metric on the headline's data leads everywhere.
    names, pools = record["columns"], record["pools"]
    main = correlations[(correlations.protocol == protocol) & (correlations.statistic == statistic)]
    compared = differences[(differences.protocol == protocol) & (differences.statistic == statistic)]
    headline = make_headline(main, compared, names, pools)
    metrics = rank_metrics(main, headline.dataset, record["metrics"])
    datasets = [name for name in names if name not in pools]
    quarantined = _list_quarantined(stores)
    unavailable = stores.attributes.get("unavailable", {})
    return Contents(
        title=_root_attribute(stores, "title"),
        catalog=_root_attribute(stores, "catalog"),
        date=record["started"][:16].replace("T", " ") + " UTC",
        protocol=protocol,
        protocols=record["identity"]["protocols"],
        statistic=statistic,
        replicates=record["identity"]["replicates"],
        sequences=sum(len(field.sequences) for field in fields),
        metrics=metrics,
        columns=[_make_column(name, pools, stores) for name in names],
        rows=make_rows(main, compared, metrics, names),
        headline=headline,
        sets=[_make_section(name, main, fields, stores, metrics) for name in datasets[:ILLUSTRATED]],
        not_illustrated=datasets[ILLUSTRATED:],
        worst=_find_worst(fields, headline, metrics, stores.frames),
        further=make_further_tables(correlations, metrics, protocol, statistic),
        left_out=_condense(omissions),
        quarantined=quarantined,
        unavailable={str(metric): str(reason) for metric, reason in unavailable.items()},
        notes=[
            *record["notes"],
            *note_changed_distances(record, stores.distances),
            *(f"Damaged: {text}." for text in damaged),
        ],
        made_by=collect_provenance(record, stores),
        missing_frames=stores.missing_frames,
        damaged=damaged,
        tables={
            "correlations": correlations,
            "differences": differences,
            "sequences": _tabulate_sequences(fields, protocol),
            "left_out": omissions,
            "quarantined": pd.DataFrame(
                [vars(entry) for entry in quarantined],
                columns=["dataset", "field", "sequence", "file", "reason"],
            ),
            "unavailable": pd.DataFrame(unavailable.items(), columns=["metric", "reason"]),
        },
    )


def _choose_protocol(record: dict[str, Any], protocol: str | None) -> str:
    """Return the requested protocol, or the first that was computed."""
    protocols: list[str] = record["identity"]["protocols"]
    if protocol is not None and protocol not in protocols:
        raise ReportError(f"protocol {protocol!r} was not computed; there are {', '.join(protocols)}")
    return protocol or protocols[0]


def _root_attribute(stores: Stores, name: str) -> str:
    return str(stores.frames_attributes.get(name) or stores.attributes.get(name) or "")


def _make_column(name: str, pools: dict[str, list[str]], stores: Stores) -> Column:
    attributes, frames_attributes = (
        stores.dataset_attributes.get(name, {}),
        stores.frames_dataset_attributes.get(name, {}),
    )
    return Column(
        name=name,
        pool=name in pools,
        members=pools.get(name, []),
        title=attributes.get("title") or frames_attributes.get("title") or "",
        role=attributes.get("role") or frames_attributes.get("role") or "",
    )


def _list_quarantined(stores: Stores) -> list[Quarantined]:
    return [
        Quarantined(dataset, entry["field"], entry["sequence"], entry["file"], entry["reason"])
        for dataset, attributes in (stores.frames_dataset_attributes or stores.dataset_attributes).items()
        for entry in attributes.get(schema.QUARANTINED, [])
    ]


# -- Sets and sequences -------------------------------------------------------------------------------


def _make_section(
    name: str, main: pd.DataFrame, fields: list[Field], stores: Stores, metrics: Sequence[str]
) -> SetSection:
    """Make a set's section: an example of each field, and each metric's curve and matrix."""
    set_fields = [field for field in fields if field.dataset == name]
    ranking = rank_metrics(main, name, metrics)
    # The example of a field is the sequence in the middle of how well the set's best metric ranks them.
    examples = [(field, _typical_row(field, ranking[0])) for field in set_fields if field.sequences][
        :SHOWN_FIELDS
    ]
    first = examples[0] if examples else None
    rows = {row["metric"]: row for row in records(main[(main.dataset == name) & (main.field == "all")])}
    cards = [_make_card(rows[metric], set_fields, first) for metric in ranking]
    attributes = {**stores.dataset_attributes.get(name, {}), **stores.frames_dataset_attributes.get(name, {})}
    return SetSection(
        name=name,
        title=attributes.get("title") or "",
        role=attributes.get("role") or "",
        citation=attributes.get("citation") or "",
        licence=attributes.get("licence") or "",
        sequences=sum(len(field.sequences) for field in set_fields),
        fields=[field.field for field in set_fields],
        examples=[read_strip(stores.frames, field.key, field.sequences[row]) for field, row in examples],
        matrix_of=first[0].sequences[first[1]] if first is not None else "",
        cards=cards,
    )


def _make_card(row: dict[str, Any], fields: list[Field], example: tuple[Field, int] | None) -> Card:
    """Make a metric's card from its row of the main table; its matrix is that of the example's sequence."""
    metric = row["metric"]
    curves = []
    for field in fields:
        if metric in field.predictions:
            usable = np.isfinite(field.predictions[metric]).all(axis=1)
            curves.append((field.targets[usable], field.predictions[metric][usable]))
    matrix = None
    if example is not None and metric in example[0].matrices:
        matrix = example[0].matrices[metric][example[1]]
    return Card(metric, row["value"], row["left_out"], matrix, curves)


def _typical_row(field: Field, metric: str) -> int:
    """Find the sequence with the median correlation under a metric; the first where none has one."""
    ranked = field.ranked.get(metric, np.array([]))
    finite = np.flatnonzero(np.isfinite(ranked))
    if not finite.size:
        return 0
    return int(finite[np.argsort(ranked[finite], kind="stable")[finite.size // 2]])


def _find_worst(
    fields: list[Field], headline: Headline, metrics: Sequence[str], frames: str | None
) -> list[WorstSequence]:
    """Find the sequences of the headline's data that the best metric ranks worst."""
    best = headline.metric
    if best is None:
        return []
    members: Collection[str] = set(headline.members)
    ranked = [
        (float(value), field, row)
        for field in fields
        if field.dataset in members and best in field.ranked
        for row, value in enumerate(field.ranked[best])
        if math.isfinite(value)
    ]
    ranked.sort(key=lambda item: item[0])
    return [
        WorstSequence(
            value=value,
            strip=read_strip(frames, field.key, field.sequences[row]),
            values=[SequenceValue(m, float(field.ranked[m][row])) for m in metrics if m in field.ranked],
        )
        for value, field, row in ranked[:WORST]
    ]


def _tabulate_sequences(fields: list[Field], protocol: str) -> pd.DataFrame:
    """Tabulate each sequence's own correlations, for the CSV beside the page."""
    rows = []
    for field in fields:
        for metric, predictions in field.predictions.items():
            pearson = statistics.sequence_correlations(predictions, field.targets, "pearson")
            rows += [
                (field.dataset, field.field, sequence, metric, protocol, p, s)
                for sequence, p, s in zip(field.sequences, pearson, field.ranked[metric], strict=True)
            ]
    columns = ["dataset", "field", "sequence", "metric", "protocol", "pearson", "spearman"]
    return pd.DataFrame(rows, columns=columns)


def _condense(omissions: pd.DataFrame) -> list[LeftOut]:
    """Combine the metrics and protocols that leave out a sequence for the same reason."""
    keys = ["dataset", "field", "sequence", "reason"]
    entries = []
    for _, group in omissions.groupby(keys, sort=False):
        first = group.iloc[0]
        metrics, protocols = list(dict.fromkeys(group.metric)), list(dict.fromkeys(group.protocol))
        entries.append(LeftOut(first.dataset, first.field, first.sequence, first.reason, metrics, protocols))
    return entries
