"""Correlate distances with ground truth: ``distances.zarr`` → ``correlations.parquet``.

The published evaluation (``protocol="published"``; Kohl, Um, Thuerey 2020) compares the reference with
every other frame, scales each sequence's distances to [0.1, 1], pools them over a data set and
correlates the pool with the ground truth. ``protocol="all-pairs"`` does the same with all pairs.
Sequences that a metric cannot be judged on are left out of *that metric's* figures, counted and named;
the published code would give NaN for the whole set.

Intervals are percentile intervals of a bootstrap over sequences. Fields of one simulation (sequences of
one data set with the same name, but for the field's) are drawn together, and a pool is resampled within
its members, since the pool's composition is chosen and not random; members with fewer than three
sequences are merged for this. Differences between metrics have simultaneous intervals as well, which hold
for all comparisons of a data set at once, and so for the best metric, whichever that turns out to be.
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from dataclasses import field as dataclass_field
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xxhash

from pipeline.correlate import statistics
from pipeline.correlate.statistics import Protocol
from pipeline.metrics.resolution import Resolution, from_text, list_unresolved
from pipeline.sources.local_folder import local_folder
from pipeline.storage import schema, store
from pipeline.storage.address import absolute, is_address, relative
from pipeline.storage.csv_tables import as_text, read_csv, write_csv
from pipeline.storage.digests import is_sealed, sealed
from pipeline.storage.recorded import check_rows
from pipeline.storage.schema import Pairs
from pipeline.storage.versions import versions

ALGORITHM = 2
"""Raised when the same distances would give other figures; results of another version are out of date."""

LEVEL = 0.95
ALL_FIELDS = "all"

CORRELATIONS = "correlations.parquet"
DIFFERENCES = "differences.parquet"
LEFT_OUT = "left_out.csv"
PUBLISHED_TABLE = "correlation.csv"
RECORD = "correlations.json"

CORRELATION_COLUMNS = (
    *("dataset", "field", "metric", "protocol", "statistic"),
    *("value", "low", "high", "sequences", "pairs", "left_out"),
)
DIFFERENCE_COLUMNS = (
    *("dataset", "protocol", "statistic", "metric", "metric_other"),
    *("difference", "low", "high", "low_simultaneous", "high_simultaneous", "sequences"),
)
LEFT_OUT_COLUMNS = ("dataset", "field", "sequence", "metric", "reason", "protocol")

STATISTICS = (*statistics.POOLED, "pearsonMean", "pearsonStd", "spearmanMean", "spearmanStd")
COMPARED = tuple(name for name in STATISTICS if not name.endswith("Std"))
"""Statistics that differences between metrics are given for."""


PAIRS_OF: dict[str, Pairs] = {"published": "reference", "all-pairs": "all"}
"""The kind of pairs that a protocol is about, as the distances stage calls it."""


class CorrelationError(ValueError):
    """Distances that cannot be correlated as asked."""


@dataclass(frozen=True)
class CorrelationReport:
    """What :func:`correlate` wrote.

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
        Distances that are not as they were written, each with its metric and sequence. They are left out.
    up_to_date : bool
        True where the results were there already and nothing was computed.
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
    ``correlations.json``, what made them. Results of the same distances and settings are not computed
    again.

    Parameters
    ----------
    distances : path or address
        A ``distances.zarr``.
    out : path or address
        Folder of the results; made where absent.
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
        When there are no distances, a protocol is unknown, or all pairs are asked for and the store
        holds those with the reference alone.
    pipeline.storage.schema.SchemaError
        When a group of the store is not as its schema says.
    """
    protocols = _check_settings(protocol, replicates)
    location = absolute(out)
    with local_folder(location) as folder:
        return _correlate(absolute(distances), location, folder, protocols, replicates, seed)


def _correlate(
    distances: str, location: str, out: Path, protocols: list[str], replicates: int, seed: int
) -> CorrelationReport:
    """Write the results into the folder ``out``, which is that at ``location`` or a copy of it."""
    started, begin = datetime.now(UTC), time.perf_counter()
    archive = _read(distances)
    if "all-pairs" in protocols and not _holds_all_pairs(archive.fields):
        raise CorrelationError(
            f"{distances}: holds the pairs with the reference alone (--pairs reference), so protocol "
            "'all-pairs' has nothing to work on; compute the distances again with --pairs all, or use "
            "--protocol published"
        )
    identity = {
        "algorithm": ALGORITHM,
        "inputs": _fingerprint(archive),
        "protocols": protocols,
        "replicates": replicates,
        "seed": seed,
        "level": LEVEL,
    }
    if (record := _valid_record(out, identity)) is not None:
        return _load(location, out, record, archive.damaged)

    selections, notes = _selections(archive)
    notes += (
        _unlike_settings(distances)
        + _symmetrised(distances)
        + _directed(distances)
        + _weighted(distances)
        + _unresolved(distances, archive)
    )
    correlations: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    for name in protocols:
        judged = [_judge(field, name, archive.metrics) for field in archive.fields]
        left_out += [row | {"protocol": name} for one in judged for row in one.left_out]
        for selection in selections:
            labels = {"dataset": selection.dataset, "field": selection.field, "protocol": name}
            members = [judged[k] for k in selection.members]
            rows, paired, remarks = _evaluate(members, archive.metrics, replicates, seed, selection.compared)
            correlations += [labels | row for row in rows]
            differences += [labels | row for row in paired]
            notes += [f"{selection.label}, {name}: {remark}" for remark in remarks]

    tables = {
        CORRELATIONS: pd.DataFrame(correlations, columns=CORRELATION_COLUMNS),
        DIFFERENCES: pd.DataFrame(differences, columns=DIFFERENCE_COLUMNS),
        LEFT_OUT: pd.DataFrame(left_out, columns=LEFT_OUT_COLUMNS),
    }
    columns = [s.dataset for s in selections if s.compared]
    _write_tables(out, tables, protocols[0], columns, archive.metrics)
    seconds = time.perf_counter() - begin
    record = {
        "distances": relative(distances, location),
        "identity": identity,
        "columns": columns,
        "pools": archive.pools,
        "metrics": archive.metrics,
        "notes": notes,
        "revision": store.revision(distances, schema.FINGERPRINT),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "versions": versions(),
        "outputs": {name: _hash_file(out / name) for name in (*tables, PUBLISHED_TABLE)},
    }
    # Last: without the record, what is there does not count.
    _replace(out / RECORD, json.dumps(sealed(record), indent=2, ensure_ascii=False) + "\n")
    return CorrelationReport(
        out=_named(location),
        correlations=tables[CORRELATIONS],
        differences=tables[DIFFERENCES],
        left_out=tables[LEFT_OUT],
        pools=archive.pools,
        notes=notes,
        damaged=archive.damaged,
        up_to_date=False,
        seconds=seconds,
    )


def _named(location: str) -> Path | str:
    return location if is_address(location) else Path(location)


# -- Reading ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Field:
    """One group of the store, with what is recorded of its distances by metric and sequence.

    ``problems`` say why they do not count; ``resolutions``, what rounding can have done to them, where that
    is known.
    """

    dataset: str
    field: str
    sequences: list[str]
    parameter: np.ndarray
    matrices: dict[str, np.ndarray]
    problems: dict[str, list[str]]
    resolutions: dict[str, list[Resolution | None]]


@dataclass(frozen=True)
class _Archive:
    fields: list[_Field]
    metrics: list[str]
    pools: dict[str, list[str]]
    damaged: list[str]


@dataclass(frozen=True)
class _Selection:
    """What one block of rows is about: a data set, one field of it, or a pool."""

    dataset: str
    field: str
    members: list[int]

    @property
    def compared(self) -> bool:
        return self.field == ALL_FIELDS

    @property
    def label(self) -> str:
        return self.dataset if self.compared else f"{self.dataset}/{self.field}"


def _read(path: str) -> _Archive:
    root = store.open_store(path)
    kind = root.attrs.get("kind", schema.DISTANCES_STORE)
    if kind != schema.DISTANCES_STORE:
        raise CorrelationError(f"{path}: expected a store of distances, found one of {kind}")
    store.check_documents(root)
    keys = store.field_keys(root, schema.PARAMETER)
    order = [str(name) for name in _attribute(root.attrs.asdict(), "datasets", list)]
    rank = {name: k for k, name in enumerate(order)}
    keys.sort(key=lambda key: rank.get(key.split("/")[0], len(rank)))  # stable: else as in the store
    if not keys:
        raise CorrelationError(f"{path}: no distances here; expected groups <dataset>/<field>")
    fields, damaged = [], []
    for key in keys:
        group = store.load_dataset(path, key)
        names = schema.metric_names(map(str, group.variables))
        checked = check_rows(root, key, {name: group[name].values for name in names})
        for name, rows in checked.damaged.items():
            if name in names:
                group[name].values[rows] = np.nan
        schema.validate_distances(group, f"{path}/{key}")
        dataset, field = key.split("/")
        sequences = [str(name) for name in group[schema.SEQUENCE].values]
        damaged += checked.told(key, sequences)
        resolutions = {metric: list(map(from_text, texts)) for metric, texts in checked.resolutions.items()}
        fields.append(
            _Field(
                dataset=dataset,
                field=field,
                sequences=sequences,
                parameter=group[schema.PARAMETER].values,
                matrices={name: group[name].values for name in names},
                problems=_problems(checked.problems, resolutions),
                resolutions=resolutions,
            )
        )
    # In the order in which they were asked for, where the store tells; then by name.
    asked = [metric for field in fields for metric in field.problems]
    found = sorted({metric for field in fields for metric in field.matrices})
    metrics = [metric for metric in dict.fromkeys(asked + found) if metric in found]
    if not metrics:
        raise CorrelationError(f"{path}: no metric's distances here; found only {', '.join(keys)}")
    attributes = root.attrs.asdict()
    pools = {str(k): [str(m) for m in v] for k, v in _attribute(attributes, "pools", dict).items()}
    return _Archive(fields, metrics, pools, damaged)


def _unlike_settings(path: str) -> list[str]:
    """A note where metrics were computed with settings that make them hard to compare."""
    found: dict[str, dict[str, list[str]]] = {}
    for metric, specification in store.specifications(path):
        scope = specification.get("scope")
        # Ranges of a data set differ from field to field, and are meant to.
        preprocessing = specification.get("preprocessing", {})
        settings = {"scope": "fixed" if isinstance(scope, list) else scope}
        masked = {"mask": "nan" if preprocessing.get("mask") else "none"}
        weights = {"weights of pixels": "the field's" if "weights_of_pixels" in specification else "none"}
        for name, value in (settings | preprocessing | masked | weights).items():
            metrics = found.setdefault(name, {}).setdefault(str(value), [])
            metrics += [metric] if metric not in metrics else []
    return [
        f"Not all metrics were computed with the same {name}: "
        + "; ".join(f"{value} for {', '.join(metrics)}" for value, metrics in values.items())
        for name, values in found.items()
        if len(values) > 1
    ]


def _symmetrised(path: str) -> list[str]:
    """A note on metrics whose two directions differ, and of which the store holds the mean."""
    found = [
        metric for metric, specification in store.specifications(path) if specification.get("symmetrised")
    ]
    if not found:
        return []
    names = ", ".join(dict.fromkeys(found))
    return [f"Metrics that are not symmetric are taken as half of d(a, b) + d(b, a): {names}"]


def _directed(path: str) -> list[str]:
    """A note on metrics of which the store holds both directions, and which of them counts."""
    found = [metric for metric, specification in store.specifications(path) if specification.get("directed")]
    if not found:
        return []
    names = ", ".join(dict.fromkeys(found))
    return [f"Of metrics that are not symmetric the earlier frame of a pair is the reference: {names}"]


def _weighted(path: str) -> list[str]:
    """Note the metrics whose means over pixels are weighted."""
    names = [
        name for name, specification in store.specifications(path) if "weights_of_pixels" in specification
    ]
    if not names:
        return []
    listed = ", ".join(dict.fromkeys(names))
    return [f"Means over pixels are weighted by the weights of the field's pixels: {listed}"]


def _problems(
    problems: Mapping[str, Sequence[str]], resolutions: Mapping[str, Sequence[Resolution | None]]
) -> dict[str, list[str]]:
    """Add to why distances don't count those of which nobody knows what rounding did to them."""
    unknown = "what rounding did to it is not recorded; run distances again"
    return {
        metric: [
            reason or ("" if resolution is not None else unknown)
            for reason, resolution in zip(reasons, resolutions[metric], strict=True)
        ]
        if metric in resolutions
        else list(reasons)
        for metric, reasons in problems.items()
    }


def _unresolved(path: str, archive: _Archive) -> list[str]:
    """Notes on distances that rounding may have changed, by metric, and on stores that don't say."""
    notes = [str(one) for one in list_unresolved(store.open_store(path))]
    unknown = [f"{field.dataset}/{field.field}" for field in archive.fields if not field.resolutions]
    if unknown:
        notes.append(
            "What rounding did to the distances is not recorded, so sequences of nothing else may count: "
            + ", ".join(unknown)
        )
    return notes


def _holds_all_pairs(fields: Iterable[_Field]) -> bool:
    """Whether any pair without the reference was compared; True where there can be none."""
    beyond = [matrices[:, 1:, 1:] for field in fields for matrices in field.matrices.values()]
    off = [values[:, ~np.eye(values.shape[1], dtype=bool)] for values in beyond]
    return all(values.size == 0 for values in off) or any(np.isfinite(values).any() for values in off)


def _attribute(attributes: dict[str, Any], name: str, kind: type) -> Any:
    """An attribute of the root; empty where absent, an error where it is of another kind."""
    value = attributes.get(name) or kind()
    if not isinstance(value, kind):
        raise CorrelationError(f"root attribute {name!r} is {value!r}; expected a {kind.__name__}")
    return value


def _selections(archive: _Archive) -> tuple[list[_Selection], list[str]]:
    """Data sets, then their fields where there are several, in the store's order; then pools."""
    datasets = list(dict.fromkeys(field.dataset for field in archive.fields))
    selections, notes = [], []
    for dataset in datasets:
        members = [k for k, field in enumerate(archive.fields) if field.dataset == dataset]
        selections.append(_Selection(dataset, ALL_FIELDS, members))
        if len(members) > 1:
            for k in members:
                if archive.fields[k].field == ALL_FIELDS:
                    raise CorrelationError(
                        f"{dataset}: one of several fields is called {ALL_FIELDS!r}, the name of their pool"
                    )
                selections.append(_Selection(dataset, archive.fields[k].field, [k]))
    for pool, names in archive.pools.items():
        if pool in datasets:
            raise CorrelationError(f"pool {pool!r} has the name of a data set")
        members = [k for k, field in enumerate(archive.fields) if field.dataset in names]
        missing = [name for name in names if name not in datasets]
        if missing and members:
            present = [name for name in names if name in datasets]
            notes.append(f"{pool}: pools only {', '.join(present)}; no distances of {', '.join(missing)}")
        if members:
            selections.append(_Selection(pool, ALL_FIELDS, members))
        else:
            notes.append(f"{pool}: left away, no distances of any member ({', '.join(names)})")
    return selections, notes


# -- Figures ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Judged:
    """A field's sequences under one protocol; rows of a metric are NaN where ``usable`` is False."""

    dataset: str
    units: list[str]
    targets: np.ndarray
    predictions: dict[str, np.ndarray]
    coefficients: dict[str, dict[str, np.ndarray]]
    usable: dict[str, np.ndarray]
    left_out: list[dict[str, Any]]


def _judge(field: _Field, protocol: str, metrics: Iterable[str]) -> _Judged:
    pairs = statistics.PAIRS[protocol](field.parameter.shape[1])
    targets = statistics.ground_truth(field.parameter, pairs)
    predictions, coefficients, usable, left_out = {}, {}, {}, []
    for metric in metrics:
        if metric in field.matrices:
            chosen = statistics.select_pairs(field.matrices[metric], pairs)
            reasons = statistics.reasons_to_leave_out(chosen, pairs)
        else:
            chosen = np.full(targets.shape, np.nan)
            reasons = ["metric was not computed for this field"] * len(field.sequences)
        resolutions = field.resolutions.get(metric, [None] * len(field.sequences))
        reasons = [
            reason or _reason_of_rounding(row, resolution, protocol)
            for reason, row, resolution in zip(reasons, chosen, resolutions, strict=True)
        ]
        problems = field.problems.get(metric, [""] * len(field.sequences))
        reasons = [
            ": ".join(filter(None, (reason, problem)))
            for reason, problem in zip(reasons, problems, strict=True)
        ]
        left_out += [
            {"dataset": field.dataset, "field": field.field, "sequence": sequence}
            | {"metric": metric, "reason": reason}
            for sequence, reason in zip(field.sequences, reasons, strict=True)
            if reason
        ]
        kept = np.array([not reason for reason in reasons], dtype=bool)
        scaled = np.full(targets.shape, np.nan)
        if kept.any():
            scaled[kept] = statistics.scale(chosen[kept])
        usable[metric], predictions[metric] = kept, scaled
        coefficients[metric] = {
            name: statistics.sequence_correlations(scaled, targets, name) for name in statistics.PER_SEQUENCE
        }
    return _Judged(
        dataset=field.dataset,
        # `plume1.density` and `plume1.vel` are one simulation.
        units=[f"{field.dataset}/{name.removesuffix('.' + field.field)}" for name in field.sequences],
        targets=targets,
        predictions=predictions,
        coefficients=coefficients,
        usable=usable,
        left_out=left_out,
    )


def _reason_of_rounding(distances: np.ndarray, resolution: Resolution | None, protocol: str) -> str:
    """Why a sequence is left out whose distances may be nothing but rounding; empty where they aren't."""
    if resolution is None or PAIRS_OF[protocol] not in resolution.constant:
        return ""
    largest, spread = float(np.abs(distances).max()), float(np.ptp(distances))
    size = (
        f"are at most {largest:.2g}" if largest <= resolution.rounding else f"differ by at most {spread:.2g}"
    )
    advice = "" if resolution.precision == "double" else "; --precision double resolves more"
    return (
        f"its {distances.size} distances {size}, and rounding alone makes up to {resolution.rounding:.2g}: a "
        f"constant has no correlation{advice}"
    )


@dataclass(frozen=True)
class _Sample:
    """What one figure is computed from: the kept sequences of one metric, pooled."""

    predictions: np.ndarray
    targets: np.ndarray
    pair_unit: np.ndarray
    coefficients: dict[str, np.ndarray]
    sequence_unit: np.ndarray


def _pool(members: Sequence[_Judged], metric: str, keep: np.ndarray) -> tuple[_Sample, np.ndarray]:
    """Pool the kept sequences of ``members``; also the stratum (data set) of each unit."""
    ends = np.cumsum([len(one.units) for one in members])[:-1]
    masks = np.split(keep, ends)
    names = [unit for one, mask in zip(members, masks, strict=True) for unit in np.array(one.units)[mask]]
    units, sequence_unit = np.unique(np.array(names, dtype=str), return_inverse=True)
    strata = np.unique([name.split("/")[0] for name in units], return_inverse=True)[1]
    lengths = np.concatenate(
        [np.full(int(mask.sum()), one.targets.shape[1]) for one, mask in zip(members, masks, strict=True)]
    )
    sample = _Sample(
        predictions=np.concatenate(
            [one.predictions[metric][m].ravel() for one, m in zip(members, masks, strict=True)]
        ),
        targets=np.concatenate([one.targets[m].ravel() for one, m in zip(members, masks, strict=True)]),
        pair_unit=np.repeat(sequence_unit, lengths.astype(int)),
        coefficients={
            name: np.concatenate(
                [one.coefficients[metric][name][m] for one, m in zip(members, masks, strict=True)]
            )
            for name in statistics.PER_SEQUENCE
        },
        sequence_unit=sequence_unit,
    )
    return sample, statistics.collapse_strata(strata)


def _values(sample: _Sample) -> dict[str, float]:
    """Every statistic of a sample."""
    values = {
        name: statistics.correlation(sample.predictions, sample.targets, name) for name in statistics.POOLED
    }
    for name, coefficients in sample.coefficients.items():
        some = coefficients.size > 0
        values[f"{name}Mean"] = float(coefficients.mean()) if some else float("nan")
        values[f"{name}Std"] = float(coefficients.std()) if some else float("nan")
    return values


def _resample(sample: _Sample, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Every statistic of every bootstrap replicate of a sample."""
    if weights.size == 0:
        return dict.fromkeys(STATISTICS, np.empty(0))
    arguments = (sample.predictions, sample.targets, sample.pair_unit, weights)
    spearman, kendall = statistics.bootstrap_ranks(*arguments)
    found = {"pearson": statistics.bootstrap_pearson(*arguments), "spearman": spearman, "kendall": kendall}
    for name, coefficients in sample.coefficients.items():
        mean, std = statistics.bootstrap_mean_std(coefficients, sample.sequence_unit, weights)
        found[f"{name}Mean"], found[f"{name}Std"] = mean, std
    return found


@dataclass(frozen=True)
class _Figures:
    """Statistics of metrics on sets of sequences, by metric and set: values, replicates, and how many.

    Of a set, ``strata`` are those of its units; see :func:`pipeline.correlate.statistics.draw_weights`.
    """

    values: dict[tuple[str, bytes], dict[str, float]] = dataclass_field(default_factory=dict)
    resampled: dict[tuple[str, bytes], dict[str, np.ndarray]] = dataclass_field(default_factory=dict)
    counts: dict[tuple[str, bytes], tuple[int, int]] = dataclass_field(default_factory=dict)
    strata: dict[bytes, np.ndarray] = dataclass_field(default_factory=dict)

    def difference(self, a: str, b: str, key: bytes, statistic: str) -> float:
        return self.values[a, key][statistic] - self.values[b, key][statistic]

    def resampled_difference(self, a: str, b: str, key: bytes, statistic: str) -> np.ndarray:
        return self.resampled[a, key][statistic] - self.resampled[b, key][statistic]


def _evaluate(
    members: Sequence[_Judged], metrics: Sequence[str], replicates: int, seed: int, compared: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Rows of the two tables for the sequences of ``members``, and remarks."""
    usable = {metric: np.concatenate([one.usable[metric] for one in members]) for metric in metrics}
    couples = list(combinations(metrics, 2)) if compared else []

    # Metrics are resampled once for every set of sequences that they are needed on: their own, and
    # those in common with each other metric. Mostly that is one set for all of them.
    needed: dict[bytes, dict[str, None]] = {}
    for metric in metrics:
        needed.setdefault(usable[metric].tobytes(), {})[metric] = None
    for a, b in couples:
        needed.setdefault((usable[a] & usable[b]).tobytes(), {}).update({a: None, b: None})

    figures = _Figures()
    remarks: list[str] = []
    for key, here in needed.items():
        keep = np.frombuffer(key, dtype=bool)
        pooled = {metric: _pool(members, metric, keep) for metric in here}
        strata = figures.strata[key] = next(iter(pooled.values()))[1]
        enough = replicates > 0 and strata.size >= statistics.MINIMUM_UNITS
        weights = statistics.draw_weights(strata, replicates if enough else 0, seed)
        with ThreadPoolExecutor(max_workers=min(len(here), os.cpu_count() or 1)) as threads:
            samples = [sample for sample, _ in pooled.values()]
            drawn = list(threads.map(_resample, samples, [weights] * len(samples)))
        for k, (metric, (sample, _)) in enumerate(pooled.items()):
            figures.values[metric, key] = _values(sample)
            figures.counts[metric, key] = (sample.sequence_unit.size, sample.predictions.size)
            figures.resampled[metric, key] = drawn[k]
        owners = [metric for metric in here if usable[metric].tobytes() == key]
        if owners and replicates and not enough:
            which = "" if owners == list(metrics) else f" for {', '.join(owners)}"
            remarks.append(
                f"no intervals{which}: {strata.size} independent "
                f"sequence{'s' * (strata.size != 1)}, and at least {statistics.MINIMUM_UNITS} are needed"
            )

    rows = []
    for metric in metrics:
        key = usable[metric].tobytes()
        sequences, pairs = figures.counts[metric, key]
        for name in STATISTICS:
            value = figures.values[metric, key][name]
            low, high = statistics.interval(figures.resampled[metric, key][name], value, LEVEL)
            rows.append(
                {"metric": metric, "statistic": name, "value": value, "low": low, "high": high}
                | {"sequences": sequences, "pairs": pairs, "left_out": int((~usable[metric]).sum())}
            )
    by_set: dict[bytes, list[tuple[str, str]]] = {}
    for a, b in couples:
        by_set.setdefault((usable[a] & usable[b]).tobytes(), []).append((a, b))
    if len(by_set) > 1 and replicates:
        remarks.append(
            f"differences between metrics are taken on {len(by_set)} sets of sequences, as metrics leave out "
            "different ones; simultaneous intervals share out the chance of an error among these"
        )
    place = {couple: k for k, couple in enumerate(couples)}
    paired = [row for name in COMPARED for row in _compare(figures, by_set, name)]
    paired.sort(key=lambda row: place[row["metric"], row["metric_other"]])
    return rows, paired, remarks


def _compare(
    figures: _Figures, by_set: Mapping[bytes, Sequence[tuple[str, str]]], statistic: str
) -> list[dict[str, Any]]:
    """Rows of differences of one statistic, of couples of metrics by the set of sequences in common."""
    families = [
        statistics.Comparisons(
            np.array([figures.difference(a, b, key, statistic) for a, b in couples]),
            np.stack([figures.resampled_difference(a, b, key, statistic) for a, b in couples]),
            figures.strata[key],
        )
        for key, couples in by_set.items()
    ]
    simultaneous = statistics.simultaneous_intervals(families, LEVEL)
    rows = []
    for (key, couples), family, intervals in zip(by_set.items(), families, simultaneous, strict=True):
        for k, (a, b) in enumerate(couples):
            difference = float(family.differences[k])
            low, high = statistics.interval(family.replicates[k], difference, LEVEL)
            rows.append(
                {"statistic": statistic, "metric": a, "metric_other": b, "difference": difference}
                | {"low": low, "high": high, "sequences": figures.counts[a, key][0]}
                # What holds for all comparisons at once holds for each by itself.
                | {"low_simultaneous": float(np.minimum(intervals[k, 0], low))}
                | {"high_simultaneous": float(np.maximum(intervals[k, 1], high))}
            )
    return rows


# -- Records and files --------------------------------------------------------------------------------


def _check_settings(protocol: Protocol | Sequence[Protocol], replicates: int) -> list[str]:
    protocols = [protocol] if isinstance(protocol, str) else list(dict.fromkeys(protocol))
    unknown = [name for name in protocols if name not in statistics.PAIRS]
    if unknown or not protocols:
        raise CorrelationError(
            f"unknown protocol {', '.join(map(repr, unknown)) or '(none)'}; "
            f"expected one or more of {', '.join(statistics.PAIRS)}"
        )
    if replicates < 0:
        raise CorrelationError(f"replicates is {replicates}; expected 0 or more")
    return [str(name) for name in protocols]


def _fingerprint(archive: _Archive) -> str:
    """Hash of everything that the figures depend on, values included."""
    digest = xxhash.xxh3_128()
    digest.update(json.dumps([archive.metrics, archive.pools]).encode())
    for field in archive.fields:
        head = [field.dataset, field.field, field.sequences, field.problems, list(field.matrices)]
        digest.update(json.dumps([*head, field.resolutions], default=asdict).encode())
        for values in (field.parameter, *field.matrices.values()):
            digest.update(f"{values.dtype.str}{values.shape}".encode())
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _valid_record(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The record in ``out``, where it is of these inputs and settings and every file is as it says."""
    if not (out / RECORD).exists():
        return None
    try:
        record = json.loads((out / RECORD).read_text())
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("identity") != identity or not is_sealed(record):
        return None
    intact = all(
        (out / name).exists() and _hash_file(out / name) == expected
        for name, expected in record["outputs"].items()
    )
    return record if intact else None


def _load(location: str, out: Path, record: dict[str, Any], damaged: list[str]) -> CorrelationReport:
    return CorrelationReport(
        out=_named(location),
        correlations=pd.read_parquet(out / CORRELATIONS),
        differences=pd.read_parquet(out / DIFFERENCES),
        left_out=read_csv(out / LEFT_OUT),
        pools=record["pools"],
        notes=record["notes"],
        damaged=damaged,
        up_to_date=True,
        seconds=record["seconds"],
    )


def _write_tables(
    out: Path, tables: dict[str, pd.DataFrame], protocol: str, columns: list[str], metrics: list[str]
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / RECORD).unlink(missing_ok=True)
    tables[CORRELATIONS].to_parquet(out / CORRELATIONS, index=False)
    tables[DIFFERENCES].to_parquet(out / DIFFERENCES, index=False)
    write_csv(tables[LEFT_OUT], out / LEFT_OUT)

    correlations = tables[CORRELATIONS]
    chosen = correlations[
        (correlations.protocol == protocol)
        & (correlations.statistic == "spearman")
        & (correlations.field == ALL_FIELDS)
    ]
    values = chosen.set_index(["metric", "dataset"])["value"].to_dict()
    # As the authors write it: csv's own line ends, figures rounded to three places, zeros not padded.
    with open(out / PUBLISHED_TABLE, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Metric", *map(as_text, columns)])
        for metric in metrics:
            writer.writerow([as_text(metric), *(round(float(values[metric, name]), 3) for name in columns)])


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _hash_file(path: Path) -> str:
    return xxhash.xxh3_128(path.read_bytes()).hexdigest()
