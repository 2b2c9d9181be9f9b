"""Write the tables of the correlation stage with a record of what made them, and load them again."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import xxhash

from pipeline.correlate.archive import ALL_FIELDS
from pipeline.storage.address import is_address
from pipeline.storage.csv_tables import as_text, read_csv, write_csv
from pipeline.storage.digests import is_sealed, sealed

CORRELATIONS = "correlations.parquet"
DIFFERENCES = "differences.parquet"
LEFT_OUT = "left_out.csv"
PUBLISHED_TABLE = "correlation.csv"
RECORD = "correlations.json"

CORRELATION_COLUMNS = [
    "dataset",
    "field",
    "metric",
    "protocol",
    "statistic",
    "value",
    "low",
    "high",
    "sequences",
    "pairs",
    "left_out",
]
DIFFERENCE_COLUMNS = [
    "dataset",
    "protocol",
    "statistic",
    "metric",
    "metric_other",
    "difference",
    "low",
    "high",
    "low_simultaneous",
    "high_simultaneous",
    "sequences",
]
LEFT_OUT_COLUMNS = ["dataset", "field", "sequence", "metric", "reason", "protocol"]


@dataclass(frozen=True)
class Tables:
    """The tables of the stage.

    Attributes
    ----------
    correlations, differences, left_out : DataFrame
    """

    correlations: pd.DataFrame
    differences: pd.DataFrame
    left_out: pd.DataFrame


@dataclass(frozen=True)
class CorrelationReport:
    """Results of :func:`pipeline.correlate.correlate`.

    Attributes
    ----------
    out : Path, or str for an address
        Folder of the results.
    correlations, differences, left_out : DataFrame
        The tables, as written.
    pools : dict of str to list of str
        Data sets that the tables pool, by the pool's name.
    notes : list of str
        What a reader of the tables must know, such as missing members of a pool.
    damaged : list of str
        Distances that differ from what was written, each with its metric and sequence. They are left out.
    up_to_date : bool
        True where valid results existed and nothing was computed.
    seconds : float
        Time it took to compute them.
    """

    out: Path | str
    correlations: pd.DataFrame
    differences: pd.DataFrame
    left_out: pd.DataFrame
    pools: dict[str, list[str]]
    notes: list[str]
    damaged: list[str]
    up_to_date: bool
    seconds: float


def make_report(
    location: str, tables: Tables, record: dict[str, Any], damaged: list[str], *, up_to_date: bool
) -> CorrelationReport:
    """Combine the tables at ``location`` with their record."""
    return CorrelationReport(
        out=location if is_address(location) else Path(location),
        correlations=tables.correlations,
        differences=tables.differences,
        left_out=tables.left_out,
        pools=record["pools"],
        notes=record["notes"],
        damaged=damaged,
        up_to_date=up_to_date,
        seconds=record["seconds"],
    )


def read_valid_record(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Read the record in ``out``; None where inputs or settings differ, or any file was changed."""
    if not (out / RECORD).exists():
        return None
    try:
        record = json.loads((out / RECORD).read_text())
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("identity") != identity or not is_sealed(record):
        return None
    is_intact = all(
        (out / name).exists() and _hash_file(out / name) == digest
        for name, digest in record["outputs"].items()
    )
    return record if is_intact else None


def load_tables(out: Path) -> Tables:
    """Load the tables of the stage from the folder ``out``."""
    return Tables(
        correlations=pd.read_parquet(out / CORRELATIONS),
        differences=pd.read_parquet(out / DIFFERENCES),
        left_out=read_csv(out / LEFT_OUT),
    )


def write_tables(out: Path, tables: Tables, protocol: str, columns: list[str], metrics: list[str]) -> None:
    """Write all tables into the folder ``out``, which has no record until :func:`write_record`.

    ``protocol``, ``columns`` (data sets and pools) and ``metrics`` (rows) are those of the table in the
    published layout.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / RECORD).unlink(missing_ok=True)
    tables.correlations.to_parquet(out / CORRELATIONS, index=False)
    tables.differences.to_parquet(out / DIFFERENCES, index=False)
    write_csv(tables.left_out, out / LEFT_OUT)

    correlations = tables.correlations
    published = correlations[
        (correlations.protocol == protocol)
        & (correlations.statistic == "spearman")
        & (correlations.field == ALL_FIELDS)
    ]
    values = published.set_index(["metric", "dataset"])["value"].to_dict()
    # The authors' format: csv's own line ends, figures rounded to three places, zeros not padded.
    with open(out / PUBLISHED_TABLE, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Metric", *map(as_text, columns)])
        for metric in metrics:
            writer.writerow([as_text(metric), *(round(float(values[metric, name]), 3) for name in columns)])


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Write the record with the hashes of the tables: only with it do the tables count."""
    names = (CORRELATIONS, DIFFERENCES, LEFT_OUT, PUBLISHED_TABLE)
    outputs = {name: _hash_file(out / name) for name in names}
    text = json.dumps(sealed(record | {"outputs": outputs}), indent=2, ensure_ascii=False) + "\n"
    partial = out / (RECORD + ".partial")
    partial.write_text(text)
    partial.replace(out / RECORD)


def _hash_file(path: Path) -> str:
    return xxhash.xxh3_128(path.read_bytes()).hexdigest()
