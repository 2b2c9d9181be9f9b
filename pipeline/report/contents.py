"""What the report says: read from the three stores and the tables, and put into words and order."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xxhash
from markupsafe import Markup

from pipeline.correlate import statistics
from pipeline.storage import schema, store
from pipeline.storage.address import absolute, resolve
from pipeline.storage.checked_frames import check_bound, read_sequence
from pipeline.storage.csv_tables import read_csv
from pipeline.storage.digests import is_sealed
from pipeline.storage.recorded import check_rows
from pipeline.storage.safe_names import printable

WORST = 6
"""How many of the worst-ranked sequences are shown."""
ILLUSTRATED = 16
"""Sets beyond this many are in all tables, but have no pictures: the page must stay small."""
SHOWN_FIELDS = 3
"""Fields of a set whose frames are shown; the rest is named."""
SHOWN_FRAMES = 11
BESIDE = 12
"""Metrics that a table for a README has as columns; more of them are its rows."""


class ReportError(ValueError):
    """A report that cannot be written, and why."""


@dataclass(frozen=True)
class Field:
    """One group of ``distances.zarr`` with what the report draws of it.

    ``predictions`` holds scaled distances (sequence, pair), NaN for sequences that are left out;
    ``ranked`` each sequence's own correlation, by metric.
    """

    key: str
    dataset: str
    field: str
    sequences: list[str]
    targets: np.ndarray
    predictions: dict[str, np.ndarray]
    ranked: dict[str, np.ndarray]
    matrices: dict[str, np.ndarray]


@dataclass(frozen=True)
class Strip:
    """Frames of one sequence to show, with their parameters."""

    dataset: str
    field: str
    sequence: str
    frames: np.ndarray | None
    positions: list[int]
    parameters: list[float]
    sizes: str


@dataclass(frozen=True)
class Contents:
    """Everything that the page shows, under the names that its template uses."""

    title: str
    catalog: str
    made: str
    protocol: str
    protocols: list[str]
    statistic: str
    replicates: int
    sequences: int
    metrics: list[str]
    columns: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    headline: dict[str, Any]
    sets: list[dict[str, Any]]
    not_illustrated: list[str]
    worst: list[dict[str, Any]]
    further: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]
    left_out: list[dict[str, Any]]
    quarantined: list[dict[str, Any]]
    unavailable: dict[str, str]
    notes: list[str]
    made_by: dict[str, Any]
    missing_frames: str
    damaged: list[str]
    tables: dict[str, pd.DataFrame]


def shown(value: Any) -> Any:
    """A text of others as the page shows it: control characters are written out. Markup of ours stays."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)


def number(value: float | None, digits: int = 3) -> str:
    """A figure as the page writes it; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def number_range(low: float | None, high: float | None, digits: int = 2) -> str:
    """An interval as the page writes it; empty where there is none."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return ""
    return f"{number(low, digits)} to {number(high, digits)}"


def markdown(contents: Contents) -> str:
    """The main table for a README: a column a metric, a row a set; pools first, with intervals.

    The best of a set is bold, as are those that aren't told apart from it. With more than :data:`BESIDE`
    metrics these are the rows.
    """
    sets = sorted(range(len(contents.columns)), key=lambda k: not contents.columns[k]["pool"])
    table = [[f"{contents.statistic} ({contents.protocol})", *map(_code, contents.metrics)]]
    for k in sets:
        column = contents.columns[k]
        table.append([_set_name(column), *(_cell(row["cells"][k], column) for row in contents.rows)])
    if len(contents.metrics) > BESIDE:
        table = [list(row) for row in zip(*table, strict=True)]
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([lines[0], "| --- |" + " --- |" * (len(table[0]) - 1), *lines[1:]]) + "\n"


def _set_name(column: dict[str, Any]) -> str:
    name = _plain_markdown(column["title"] or column["name"])
    return f"*{_plain_markdown(column['name'])}*" if column["pool"] else name


def _plain_markdown(text: str) -> str:
    """Text that Markdown takes as text: no markup, no elements, no end of a cell or a row."""
    return re.sub(r"([\\`*_\[\]<>|~$&!#])", r"\\\1", printable(" ".join(text.split())))


def _code(name: str) -> str:
    """A metric's name as code, where it can be."""
    return f"`{name}`" if re.fullmatch(r"[\w.:+-]+", name) else _plain_markdown(name)


def _cell(cell: dict[str, Any], column: dict[str, Any]) -> str:
    text = number(cell["value"], 2)
    if cell["mark"]:
        text = f"**{text}**"
    span = number_range(cell["low"], cell["high"]) if column["pool"] else ""
    return f"{text} ({span.replace(' to ', '–')})" if span else text


def gather(results: str, folder: Path, protocol: str | None, statistic: str) -> Contents:
    """Read all that the report shows; see :func:`pipeline.report.write_report`.

    ``folder`` holds the files of ``results``, which may be an address.
    """
    record = read_record(results, folder)
    correlations = pd.read_parquet(folder / "correlations.parquet")
    differences = pd.read_parquet(folder / "differences.parquet")
    left_out = read_csv(folder / "left_out.csv")
    protocols, protocol = _choose_protocol(record, protocol)
    if statistic not in statistics.POOLED:
        raise ReportError(f"unknown statistic {statistic!r}; expected one of {', '.join(statistics.POOLED)}")

    distances = resolve(record["distances"], results)
    if not store.exists(distances):
        raise ReportError(
            f"{results}/correlations.json names its distances as {record['distances']}, and there is nothing "
            "there; keep both folders in the same places to one another, or run correlate again"
        )
    root = store.open_store(distances)
    store.check_documents(root)
    attributes: dict[str, Any] = dict(root.attrs)
    frames, missing_frames = find_frames(distances, attributes)
    about = _attributes_by_dataset(distances)
    about_frames = _attributes_by_dataset(frames) if frames else {}
    source: dict[str, Any] = dict(store.open_store(frames).attrs) if frames else {}

    names: list[str] = record["columns"]
    metrics: list[str] = record["metrics"]
    pools: dict[str, list[str]] = record["pools"]
    fields, damaged = _read_fields(root, distances, metrics, protocol, left_out)
    main = correlations[(correlations.protocol == protocol) & (correlations.statistic == statistic)]
    compared = differences[(differences.protocol == protocol) & (differences.statistic == statistic)]
    headline = _headline(main, compared, names, pools)
    order = _order(main, headline["dataset"], metrics)
    quarantined = [
        {"dataset": dataset, **entry}
        for dataset, found in (about_frames or about).items()
        for entry in found.get(schema.QUARANTINED, [])
    ]
    datasets = [name for name in names if name not in pools]
    sets = [
        _describe_set(
            name, main, fields, frames, order, {**about.get(name, {}), **about_frames.get(name, {})}
        )
        for name in datasets[:ILLUSTRATED]
    ]
    return Contents(
        title=str(source.get("title") or attributes.get("title") or ""),
        catalog=str(source.get("catalog") or attributes.get("catalog") or ""),
        made=record["started"][:16].replace("T", " ") + " UTC",
        protocol=protocol,
        protocols=protocols,
        statistic=statistic,
        replicates=record["identity"]["replicates"],
        sequences=sum(len(field.sequences) for field in fields),
        metrics=order,
        columns=[
            {
                "name": name,
                "pool": name in pools,
                "members": pools.get(name, []),
                "title": about.get(name, {}).get("title") or about_frames.get(name, {}).get("title") or "",
                "role": about.get(name, {}).get("role") or about_frames.get(name, {}).get("role") or "",
            }
            for name in names
        ],
        rows=_rows(main, compared, order, names),
        headline=headline,
        sets=sets,
        not_illustrated=datasets[ILLUSTRATED:],
        worst=_worst(fields, headline["metric"], order, headline["members"], frames),
        further=_further(correlations, order, protocol, statistic),
        comparisons=headline["against"],
        left_out=_condense(left_out),
        quarantined=quarantined,
        unavailable={str(k): str(v) for k, v in attributes.get("unavailable", {}).items()},
        notes=[*record["notes"], *_outdated(record, distances), *(f"Damaged: {text}." for text in damaged)],
        made_by=_made_by(record, distances, attributes, source, frames),
        missing_frames=missing_frames,
        damaged=damaged,
        tables={
            "correlations": correlations,
            "differences": differences,
            "sequences": _sequence_table(fields, protocol),
            "left_out": left_out,
            "quarantined": pd.DataFrame(
                quarantined, columns=["dataset", "field", "sequence", "file", "reason"]
            ),
            "unavailable": pd.DataFrame(
                attributes.get("unavailable", {}).items(), columns=["metric", "reason"]
            ),
        },
    )


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as plain dictionaries."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


# -- Reading ------------------------------------------------------------------------------------------


def read_record(results: str, folder: Path) -> dict[str, Any]:
    """Read what correlate recorded of its results, and compare its files with that.

    Raises
    ------
    ReportError
        When there is no record, or it or a file beside it is not as correlate wrote it.
    """
    again = f"run 'lsim correlate DISTANCES --out {results}'"
    try:
        record: dict[str, Any] = json.loads((folder / "correlations.json").read_text())
    except FileNotFoundError as error:
        raise ReportError(f"{results}: no correlations.json here; {again} first") from error
    except ValueError as error:
        raise ReportError(f"{results}: correlations.json cannot be read ({error}); {again} again") from error
    if not isinstance(record, dict) or not is_sealed(record):
        raise ReportError(f"{results}: correlations.json is not as correlate wrote it; {again} again")
    for name, expected in record["outputs"].items():
        file = folder / name
        if not file.exists() or xxhash.xxh3_128_hexdigest(file.read_bytes()) != expected:
            state = "not as correlate wrote it" if file.exists() else "missing"
            raise ReportError(f"{results}: {name} is {state}; {again} again")
    return record


def _choose_protocol(record: dict[str, Any], protocol: str | None) -> tuple[list[str], str]:
    protocols = record["identity"]["protocols"]
    if protocol is None:
        return protocols, protocols[0]
    if protocol not in protocols:
        raise ReportError(f"protocol {protocol!r} was not computed; there are {', '.join(protocols)}")
    return protocols, protocol


def _outdated(record: dict[str, Any], distances: str) -> list[str]:
    """A note where the distances have changed since they were correlated."""
    if record.get("revision") == store.revision(distances, schema.FINGERPRINT):
        return []
    return [
        "The distances have changed since these correlations were computed: curves and matrices here show "
        "the new ones. Run 'lsim correlate' again."
    ]


def find_frames(distances: str | os.PathLike[str], attributes: dict[str, Any]) -> tuple[str | None, str]:
    """Find the ``frames.zarr`` that the distances name, or say why there are no pictures of frames.

    Raises
    ------
    pipeline.storage.store.DamagedError
        When metadata of that store is damaged.
    """
    named = attributes.get("frames")
    if not named:
        return None, "The distances don't say which frames they were computed from."
    path = resolve(str(named), absolute(distances))
    if not store.exists(path):
        return None, f"The frames were at {named} beside the distances, and are there no more."
    store.check_documents(store.open_store(path))
    return path, ""


def _attributes_by_dataset(path: str) -> dict[str, dict[str, Any]]:
    return {name: dict(group.attrs) for name, group in store.open_store(path).groups()}


def _read_fields(
    root: store.Group, path: str, metrics: list[str], protocol: str, left_out: pd.DataFrame
) -> tuple[list[Field], list[str]]:
    """Read what is drawn of each field, and name what of it is damaged: that is left out."""
    here = left_out[left_out.protocol == protocol]
    without = set(zip(here.dataset, here.field, here.sequence, here.metric, strict=True))
    fields, damaged = [], []
    for key in store.field_keys(root, schema.PARAMETER):
        group = store.load_dataset(path, key)
        dataset, field = key.split("/")
        sequences = [str(name) for name in group[schema.SEQUENCE].values]
        pairs = statistics.PAIRS[protocol](group.sizes[schema.FRAME])
        targets = statistics.ground_truth(group[schema.PARAMETER].values, pairs)
        predictions, ranked = {}, {}
        matrices = {name: group[name].values for name in metrics if name in group}
        checked = check_rows(root, key, matrices)
        damaged += checked.told(key, sequences)
        for metric, values in matrices.items():
            if metric in checked.damaged:
                values[checked.damaged[metric]] = np.nan
            scaled = np.full(targets.shape, np.nan)
            kept = np.array([(dataset, field, name, metric) not in without for name in sequences], dtype=bool)
            if metric in checked.damaged:
                kept &= ~checked.damaged[metric]
            if kept.any():
                scaled[kept] = statistics.scale(statistics.select_pairs(values[kept], pairs))
            predictions[metric] = scaled
            ranked[metric] = statistics.sequence_correlations(scaled, targets, "spearman")
        fields.append(Field(key, dataset, field, sequences, targets, predictions, ranked, matrices))
    return fields, damaged


def read_strip(frames: str | None, key: str, sequence: str) -> Strip:
    """Up to :data:`SHOWN_FRAMES` frames of a sequence, first and last among them; ``None`` without frames."""
    dataset, field = key.split("/")
    nothing = Strip(dataset, field, sequence, None, [], [], "")
    if frames is None or key not in store.field_keys(store.open_store(frames), schema.FRAMES):
        return nothing
    group = store.load_dataset(frames, key, (schema.SEQUENCE, schema.PARAMETER, schema.CONTENT))
    names = [str(name) for name in group[schema.SEQUENCE].values]
    if sequence not in names:
        return nothing
    row, count = names.index(sequence), group.sizes[schema.FRAME]
    positions = np.unique(np.linspace(0, count - 1, min(count, SHOWN_FRAMES)).round().astype(int))
    array = group[schema.FRAMES]
    content, of_frames = (
        str(group[schema.CONTENT].values[row]),
        store.get_group(store.open_store(frames), key),
    )
    check_bound(of_frames)
    shown = read_sequence(of_frames, row, content)[positions]
    return Strip(
        dataset=dataset,
        field=field,
        sequence=sequence,
        frames=shown,
        positions=positions.tolist(),
        parameters=group[schema.PARAMETER].values[row, positions].tolist(),
        sizes=f"{array.sizes['y']} × {array.sizes['x']} × {array.sizes['channel']}, {array.dtype}",
    )


# -- Ranking ------------------------------------------------------------------------------------------


def _order(main: pd.DataFrame, dataset: str, metrics: list[str]) -> list[str]:
    """Metrics from best to worst on a set or pool; those without a value last."""
    values = main[(main.dataset == dataset) & (main.field == "all")].set_index("metric")["value"].to_dict()
    return sorted(metrics, key=lambda m: -values[m] if not math.isnan(values[m]) else math.inf)


INTERVALS = (("low", "high"), ("low_simultaneous", "high_simultaneous"))
"""Of a difference by itself, and those that hold for all differences of a set at once."""


def _against(compared: pd.DataFrame, dataset: str, best: str) -> dict[str, dict[str, float]]:
    """How much better ``best`` is than each other metric, with intervals."""
    against = {}
    for row in _records(compared[compared.dataset == dataset]):
        if row["metric"] == best:
            names = ("difference", *(name for ends in INTERVALS for name in ends))
            against[row["metric_other"]] = {name: row[name] for name in names}
        elif row["metric_other"] == best:
            mirrored = {"difference": -row["difference"]}
            for low, high in INTERVALS:
                mirrored |= {low: -row[high], high: -row[low]}
            against[row["metric"]] = mirrored
    return against


def _verdict(difference: dict[str, float]) -> str:
    """Tell whether two metrics are apart by the simultaneous interval of their difference.

    The best was picked on the same sequences, out of all: the interval of one difference by itself would call
    the best of equals better than another far too often.
    """
    low, high = difference["low_simultaneous"], difference["high_simultaneous"]
    if math.isnan(low) or math.isnan(high):
        return "unknown"
    return "apart" if low > 0 or high < 0 else "even"


def _comparisons(compared: pd.DataFrame, dataset: str) -> int:
    """Count the differences of a set that its simultaneous intervals hold for."""
    return int(compared[compared.dataset == dataset]["low_simultaneous"].notna().sum())


def _headline(
    main: pd.DataFrame, compared: pd.DataFrame, names: list[str], pools: dict[str, list[str]]
) -> dict[str, Any]:
    """The best metric on the first pool; without pools, on the set with the most sequences."""
    pooled = main[main.field == "all"]
    counted = pooled.groupby("dataset")["sequences"].max()
    here = [name for name in names if name in pools] or [
        max((name for name in names), key=lambda n: int(counted[n]))
    ]
    dataset = here[0]
    table = pooled[(pooled.dataset == dataset)].dropna(subset=["value"]).sort_values("value", ascending=False)
    members = pools.get(dataset, [dataset])
    head: dict[str, Any] = {
        "dataset": dataset,
        "pool": dataset in pools,
        "members": [name for name in members if name in names],
        "sequences": int(counted[dataset]),
        "metric": None,
        "runner_up": None,
        "ranked": len(table),
        "comparisons": _comparisons(compared, dataset),
        "even": [],
        "against": [],
    }
    if table.empty:
        return head
    ranks = _records(table)
    best = ranks[0]
    head |= {k: best[k] for k in ("metric", "value", "low", "high")}
    against = _against(compared, dataset, best["metric"])
    if len(ranks) > 1:
        second = ranks[1]
        head["runner_up"] = {
            "metric": second["metric"],
            "value": second["value"],
            **against[second["metric"]],
            "verdict": _verdict(against[second["metric"]]),
        }
    head["even"] = [row["metric"] for row in ranks[1:] if _verdict(against[row["metric"]]) == "even"]
    head["against"] = [
        {"metric": row["metric"], "value": row["value"], **against[row["metric"]]}
        | {"verdict": _verdict(against[row["metric"]])}
        for row in ranks[1:]
    ]
    return head


def _rows(
    main: pd.DataFrame, compared: pd.DataFrame, order: list[str], names: list[str]
) -> list[dict[str, Any]]:
    """The main table: a row a metric, a cell a set, with the best and its equals marked."""
    pooled = main[main.field == "all"]
    cells: dict[tuple[str, str], dict[str, Any]] = {
        (row["metric"], row["dataset"]): row | {"mark": ""} for row in _records(pooled)
    }
    for name in names:
        values = {m: cells[m, name]["value"] for m in order if not math.isnan(cells[m, name]["value"])}
        if not values:
            continue
        best = max(values, key=lambda m: values[m])
        for metric, difference in _against(compared, name, best).items():
            if metric in values and _verdict(difference) == "even":
                cells[metric, name]["mark"] = "even"
        for metric, value in values.items():
            if value == values[best]:
                cells[metric, name]["mark"] = "best"
    return [{"metric": metric, "cells": [cells[metric, name] for name in names]} for metric in order]


def _further(
    correlations: pd.DataFrame, order: list[str], protocol: str, statistic: str
) -> list[dict[str, Any]]:
    """All the other tables: every protocol and statistic, sets first and then single fields."""
    tables = []
    for kept, frame in (("sets", correlations[correlations.field == "all"]),
                        ("fields", correlations[correlations.field != "all"])):  # fmt: skip
        for at, name in dict.fromkeys(zip(frame.protocol, frame.statistic, strict=True)):
            group = frame[(frame.protocol == at) & (frame.statistic == name)]
            if name.endswith("Std") or (kept == "sets" and (at, name) == (protocol, statistic)):
                continue
            columns = list(dict.fromkeys(zip(group.dataset, group.field, strict=True)))
            values = {(r["metric"], r["dataset"], r["field"]): r for r in _records(group)}
            spread = frame[(frame.protocol == at) & (frame.statistic == name.replace("Mean", "Std"))]
            spreads = {(r["metric"], r["dataset"], r["field"]): r["value"] for r in _records(spread)}
            tables.append(
                {
                    "protocol": at,
                    "statistic": name,
                    "kind": kept,
                    "columns": [d if f == "all" else f"{d}/{f}" for d, f in columns],
                    "rows": [
                        {
                            "metric": m,
                            "cells": [
                                values[m, d, f] | {"std": spreads[m, d, f] if name.endswith("Mean") else None}
                                for d, f in columns
                            ],
                        }
                        for m in order
                    ],
                }
            )
    return tables


# -- Sequences ----------------------------------------------------------------------------------------


def _typical(field: Field, metric: str | None) -> int:
    """Row of the sequence that the metric ranks as it ranks half of them; the first without a ranking."""
    ranked = field.ranked.get(metric or "", np.array([]))
    known = np.flatnonzero(np.isfinite(ranked))
    if not known.size:
        return 0
    return int(known[np.argsort(ranked[known], kind="stable")[known.size // 2]])


def _describe_set(
    name: str,
    main: pd.DataFrame,
    fields: list[Field],
    frames: str | None,
    order: list[str],
    about: dict[str, Any],
) -> dict[str, Any]:
    """A set's section: an example of each field, and each metric's curve and matrix."""
    own = [field for field in fields if field.dataset == name]
    values = {row["metric"]: row for row in _records(main[(main.dataset == name) & (main.field == "all")])}
    ranking = _order(main, name, order)
    shown = [field for field in own if field.sequences][:SHOWN_FIELDS]
    rows = [_typical(field, ranking[0]) for field in shown]
    first = shown[0] if shown else None
    cards = []
    for metric in ranking:
        matrix = None
        if first is not None and metric in first.matrices:
            matrix = first.matrices[metric][rows[0]]
        curves = [
            (x[keep], y[keep])
            for field in own
            if metric in field.predictions
            for x, y in [(field.targets, field.predictions[metric])]
            for keep in [np.isfinite(y).all(axis=1)]
        ]
        cards.append({**values[metric], "matrix": matrix, "curves": curves})
    return {
        "name": name,
        "title": about.get("title") or "",
        "role": about.get("role") or "",
        "citation": about.get("citation") or "",
        "licence": about.get("licence") or "",
        "sequences": sum(len(field.sequences) for field in own),
        "fields": [field.field for field in own],
        "examples": [
            read_strip(frames, field.key, field.sequences[row])
            for field, row in zip(shown, rows, strict=True)
        ],
        "matrix_of": first.sequences[rows[0]] if first is not None else "",
        "cards": cards,
    }


def _worst(
    fields: list[Field], best: str | None, order: list[str], members: Iterable[str], frames: str | None
) -> list[dict[str, Any]]:
    """The sequences of ``members`` that the best metric ranks worst."""
    if best is None:
        return []
    found = [
        (float(value), field, row)
        for field in fields
        if field.dataset in set(members) and best in field.ranked
        for row, value in enumerate(field.ranked[best])
        if math.isfinite(value)
    ]
    found.sort(key=lambda item: item[0])
    return [
        {
            "value": value,
            "strip": read_strip(frames, field.key, field.sequences[row]),
            "values": [
                {"metric": m, "value": float(field.ranked[m][row])} for m in order if m in field.ranked
            ],
        }
        for value, field, row in found[:WORST]
    ]


def _sequence_table(fields: list[Field], protocol: str) -> pd.DataFrame:
    """Each sequence's own correlations, for the CSV beside the page."""
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


def _condense(left_out: pd.DataFrame) -> list[dict[str, Any]]:
    """One row a sequence and reason, with the metrics and protocols that it holds for."""
    keys = ["dataset", "field", "sequence", "reason"]
    return [
        dict(zip(keys, key, strict=True))
        | {"metrics": list(dict.fromkeys(group.metric)), "protocols": list(dict.fromkeys(group.protocol))}
        for key, group in left_out.groupby(keys, sort=False)
    ]


# -- How it was made ----------------------------------------------------------------------------------


def _made_by(
    record: dict[str, Any],
    distances: str,
    attributes: dict[str, Any],
    source: dict[str, Any],
    frames: str | None,
) -> dict[str, Any]:
    runs = attributes.get("runs", [])
    spent = sum(float(run.get("seconds", 0)) for run in runs)
    stages = [
        {"stage": "convert", "seconds": source.get("convert_seconds"), "detail": "its last run"},
        {
            "stage": "distances",
            "seconds": spent if runs else None,
            "detail": f"{len(runs)} run{'s' * (len(runs) != 1)}",
        },
        {"stage": "correlate", "seconds": record["seconds"],
         "detail": f"{record['identity']['replicates']} bootstrap replicates"},
    ]  # fmt: skip
    packages: dict[str, dict[str, str]] = {}
    for stage, found in (
        ("convert", source.get("versions", {})),
        ("distances", runs[-1].get("versions", {}) if runs else {}),
        ("correlate", record["versions"]),
    ):
        for package, version in found.items():
            packages.setdefault(package, {})[stage] = str(version)
    return {
        "stages": stages,
        "runs": [
            {k: _plain(run.get(k, "")) for k in ("started", "seconds", "blocks", "profile", "workers")}
            | {"cluster": _plain(run.get("cluster", run.get("profile", "")))}
            for run in runs
        ],
        "packages": packages,
        "settings": {
            "Protocols": ", ".join(record["identity"]["protocols"]),
            "Bootstrap": f"{record['identity']['replicates']} replicates, seed {record['identity']['seed']}, "
            f"{record['identity']['level']:.0%} percentile intervals over sequences; of differences also "
            "simultaneous ones (max-T)",
            "Hash of the distances": record["identity"]["inputs"],
            "Distances": record["distances"],
            "Frames": _plain(attributes.get("frames", "")),
        },
        "specifications": _specifications(distances),
    }


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _specifications(path: str) -> dict[str, str]:
    """Each metric's specification, from the first field that has it, and laid out to be read."""
    found: dict[str, str] = {}
    for metric, specification in store.specifications(path):
        found.setdefault(metric, json.dumps(specification, indent=2, ensure_ascii=False))
    return found
