"""Correlate distances with ground truth: ``distances.zarr`` → ``correlations.parquet``.

The published evaluation (``protocol="published"``; Kohl, Um, Thuerey 2020) compares the reference with
every other frame, scales each sequence's distances to [0.1, 1], pools them over a data set and
correlates the pool with the ground truth. ``protocol="all-pairs"`` does the same with all pairs.
Sequences that a metric cannot be judged on are left out of *that metric's* figures, counted and named;
the published code would give NaN for the whole set.

Intervals are percentile intervals of a bootstrap over sequences. Fields of one simulation (sequences of
one data set whose names differ only in the field) are drawn together, and a pool is resampled within
its members, since the pool's composition is chosen and not random; members with fewer than three
sequences are merged for this. Differences between metrics have simultaneous intervals as well, which hold
for all comparisons of a data set at once, and so for the best metric, whichever that turns out to be.

One file for each step: ``archive`` reads the store, ``judging`` decides which sequences count, ``evaluation``
computes statistics with intervals, ``results`` writes the tables; ``statistics`` has the functions on arrays.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.correlate import statistics
from pipeline.correlate.archive import Archive, CorrelationError, Selection, read_archive, select
from pipeline.correlate.evaluation import LEVEL, Bootstrap, evaluate
from pipeline.correlate.judging import judge
from pipeline.correlate.notes import list_notes
from pipeline.correlate.results import (
    CORRELATION_COLUMNS,
    DIFFERENCE_COLUMNS,
    LEFT_OUT,
    LEFT_OUT_COLUMNS,
    CorrelationReport,
    Tables,
    load_tables,
    make_report,
    read_valid_record,
    write_record,
    write_tables,
)
from pipeline.correlate.statistics import Protocol
from pipeline.sources.local_folder import local_folder
from pipeline.storage import schema, store
from pipeline.storage.address import absolute, relative
from pipeline.storage.versions import versions

__all__ = ["LEFT_OUT", "CorrelationError", "CorrelationReport", "correlate", "statistics"]

ALGORITHM = 2
"""Raised when the same distances would give other figures; results of another version are out of date."""


def correlate(
    distances: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    protocol: Protocol | Sequence[Protocol] = "published",
    replicates: int = 2000,
    seed: int = 0,
) -> CorrelationReport:
    """Correlate every metric's distances with the ground truth.

    Writes into ``out``: ``correlations.parquet``, one row per (dataset, field, metric, protocol,
    statistic), where field ``all`` pools the fields of a data set and of a pool's members;
    ``differences.parquet``, between metrics on the same resamples of the sequences that both can be
    judged on, with the interval of each by itself and one that holds for all at once; ``left_out.csv``;
    ``correlation.csv``, Spearman of the first protocol in the published layout; and
    ``correlations.json``, the record of inputs and settings. Results of the same distances and settings
    are not computed again.

    Parameters
    ----------
    distances : path or address
        A ``distances.zarr``.
    out : path or address
        Folder of the results; created where absent.
    protocol : {"published", "all-pairs"} or several of them
    replicates : int
        Bootstrap replicates; 0 for no intervals.
    seed : int
        The same seed gives the same intervals.

    Returns
    -------
    CorrelationReport

    Raises
    ------
    CorrelationError
        When there are no distances, a protocol is unknown, or ``"all-pairs"`` is requested of a store that
        holds only pairs with the reference.
    pipeline.storage.schema.SchemaError
        When a group of the store does not follow its schema.
    """
    protocols = _check_settings(protocol, replicates)
    location = absolute(out)
    with local_folder(location) as folder:
        return _correlate(absolute(distances), location, folder, protocols, Bootstrap(replicates, seed))


def _check_settings(protocol: Protocol | Sequence[Protocol], replicates: int) -> list[str]:
    """Return the protocols as a list without duplicates; raise where a setting is invalid."""
    protocols = [protocol] if isinstance(protocol, str) else list(dict.fromkeys(protocol))
    unknown_names = [name for name in protocols if name not in statistics.PAIRS]
    if unknown_names or not protocols:
        raise CorrelationError(
            f"unknown protocol {', '.join(map(repr, unknown_names)) or '(none)'}; "
            f"expected one or more of {', '.join(statistics.PAIRS)}"
        )
    if replicates < 0:
        raise CorrelationError(f"replicates is {replicates}; expected 0 or more")
    return [str(name) for name in protocols]


def _correlate(
    distances: str, location: str, out: Path, protocols: list[str], bootstrap: Bootstrap
) -> CorrelationReport:
    """Write the results into the folder ``out``, which is that at ``location`` or a copy of it."""
    start_time, begin = datetime.now(UTC), time.perf_counter()
    archive = read_archive(distances)
    if "all-pairs" in protocols and not archive.holds_all_pairs:
        raise CorrelationError(
            f"{distances}: holds only pairs with the reference (--pairs reference), and protocol 'all-pairs' "
            "needs all pairs; compute the distances again with --pairs all, or use --protocol published"
        )

    # Results of the same inputs and settings are loaded.
    identity = {
        "algorithm": ALGORITHM,
        "inputs": archive.fingerprint(),
        "protocols": protocols,
        "replicates": bootstrap.replicates,
        "seed": bootstrap.seed,
        "level": LEVEL,
    }
    record = read_valid_record(out, identity)
    if record is not None:
        return make_report(location, load_tables(out), record, archive.damaged, up_to_date=True)

    selections, notes = select(archive)
    notes += list_notes(distances, archive)
    tables, remarks = _compute_tables(archive, selections, protocols, bootstrap)
    columns = [selection.dataset for selection in selections if selection.compared]
    write_tables(out, tables, protocols[0], columns, archive.metrics)
    record = {
        "distances": relative(distances, location),
        "identity": identity,
        "columns": columns,
        "pools": archive.pools,
        "metrics": archive.metrics,
        "notes": notes + remarks,
        "revision": store.revision(distances, schema.FINGERPRINT),
        "started": start_time.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - begin, 3),
        "versions": versions(),
    }
    write_record(out, record)
    return make_report(location, tables, record, archive.damaged, up_to_date=False)


def _compute_tables(
    archive: Archive, selections: Sequence[Selection], protocols: Sequence[str], bootstrap: Bootstrap
) -> tuple[Tables, list[str]]:
    """Evaluate all metrics on all selections under each protocol; return tables and remarks."""
    correlations: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    omissions: list[dict[str, Any]] = []
    remarks: list[str] = []
    for name in protocols:
        # Fields are judged once, and shared by the selections that pool them.
        judged = [judge(field, name, archive.metrics) for field in archive.fields]
        omissions += [row | {"protocol": name} for field in judged for row in field.left_out]
        for selection in selections:
            labels = {"dataset": selection.dataset, "field": selection.field, "protocol": name}
            members = [judged[k] for k in selection.members]
            evaluation = evaluate(members, archive.metrics, bootstrap, compared=selection.compared)
            correlations += [labels | row for row in evaluation.rows]
            differences += [labels | row for row in evaluation.differences]
            remarks += [f"{selection.label}, {name}: {remark}" for remark in evaluation.remarks]
    tables = Tables(
        correlations=pd.DataFrame(correlations, columns=CORRELATION_COLUMNS),
        differences=pd.DataFrame(differences, columns=DIFFERENCE_COLUMNS),
        left_out=pd.DataFrame(omissions, columns=LEFT_OUT_COLUMNS),
    )
    return tables, remarks
