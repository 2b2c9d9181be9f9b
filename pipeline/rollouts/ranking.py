"""rollouts.zarr → tables: the error of each model over time, which is best, and from when on it drifts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from pipeline.rollouts.intervals import Bootstrap, Difference
from pipeline.rollouts.results import FieldResults, read_results
from pipeline.rollouts.scores import SKILL, SPREAD
from pipeline.rollouts.spectra import ENERGY, SpectrumTables
from pipeline.rollouts.spread import SpreadTable
from pipeline.sources.local_folder import local_folder
from pipeline.stage.provenance import has_specification
from pipeline.storage import metadata, schema, store
from pipeline.storage.address import absolute
from pipeline.storage.versions import versions

ALL_FIELDS = "all"
"""Name of the mean over the fields of a data set, where all of them have the same rollouts."""

THRESHOLDS = {"correlation": 0.2}
"""Distances beyond which a rollout is no longer valid, by metric: a correlation below 0.8."""


class RankingError(ValueError):
    """A store that has nothing to rank."""


@dataclass
class RankingReport:
    """Summary of :func:`rank`.

    Attributes
    ----------
    errors, differences, valid_times, spread : DataFrame
        As the tables that were written.
    spectra : dict of str to DataFrame
        The tables ``spectra`` and ``bands``.
    best : dict of (str, str, str) to str
        By data set, field and metric the model with the least error.
    equals : dict of (str, str, str) to list of str
        By data set, field and metric, models that cannot be told from the best one.
    damaged : list of str
        Distances that are not those that were written; they are left out.
    """

    errors: pd.DataFrame
    differences: pd.DataFrame
    valid_times: pd.DataFrame
    spread: pd.DataFrame
    spectra: dict[str, pd.DataFrame] = field(default_factory=dict)
    best: dict[tuple[str, str, str], str] = field(default_factory=dict)
    equals: dict[tuple[str, str, str], list[str]] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)


def rank(
    rollouts: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    replicates: int = 2000,
    seed: int = 0,
    thresholds: Mapping[str, float] | None = None,
) -> RankingReport:
    """Rank the models of a ``rollouts.zarr``, and write tables.

    Parameters
    ----------
    rollouts : path or address
    out : path or address
        Folder of ``errors``, ``differences``, ``valid_times``, ``spread``, ``spectra`` and ``bands.parquet``,
        and of ``rollouts.json``.
    replicates, seed : int
        Of the bootstrap.
    thresholds : mapping of str to float, optional
        Distance by metric from which on a rollout is not valid any more. Default: :data:`THRESHOLDS`.

    Returns
    -------
    RankingReport

    Raises
    ------
    RankingError
        When the store holds no rollouts.

    Notes
    -----
    The error of a rollout is the mean of its distances over time. A rollout without all of its distances has
    none: it is counted as incomplete, and its frames count where they are there. Intervals resample
    sequences, and members within a model, on the same draws of sequences for all models; differences are
    simultaneous over all pairs.
    """
    root = store.open_store(rollouts)
    if root.attrs.get("kind") != schema.ROLLOUTS_STORE:
        raise RankingError(f"{rollouts}: expected a rollouts.zarr, found a store of {root.attrs.get('kind')}")
    metadata.check_documents(root)
    thresholds = THRESHOLDS if thresholds is None else thresholds
    report = RankingReport(pd.DataFrame(), pd.DataFrame(), pd.DataFrame(), pd.DataFrame())
    errors: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    valid: list[dict[str, Any]] = []
    spread = SpreadTable(replicates, seed)
    for place, table in _tables(root, report.damaged):
        dataset, name, metric = place
        if metric in (SPREAD, SKILL):
            spread.put(place, table.distances, table.times)
            continue
        means = {model: _means(values) for model, values in table.distances.items()}
        bootstrap = Bootstrap(means, replicates, seed)
        labels = {"dataset": dataset, "field": name, "metric": metric}
        errors += [labels | row for row in _rows_of_errors(table, bootstrap, replicates, seed)]
        pairs = bootstrap.differences()
        differences += [labels | asdict(pair) for pair in pairs]
        _choose_best(report, place, bootstrap, pairs)
        if metric in thresholds:
            rows = _rows_of_valid_times(table, thresholds[metric], replicates, seed)
            valid += [labels | row for row in rows]
    if not errors:
        raise RankingError(f"{rollouts}: no distances to rank; 'lsim compare' computes them")
    report.errors, report.differences = pd.DataFrame(errors), pd.DataFrame(differences)
    report.valid_times = pd.DataFrame(valid)
    tables = SpectrumTables(replicates, seed)
    _add_spectra(root, tables, report.damaged)
    report.spectra = tables.to_frames()
    report.spread = spread.to_frame({key: _members_of(root, key) for key in spread.keys})
    _write(report, rollouts, out, replicates, seed, root)
    return report


@dataclass(frozen=True)
class _Table:
    """Distances of all models by a metric, (member, sequence, frame) each, and the frames' times.

    ``members`` counts those that scores of ensembles are of.
    """

    distances: dict[str, np.ndarray]
    times: np.ndarray
    members: dict[str, int] | None = None


def _tables(root: store.Group, damaged: list[str]) -> Iterator[tuple[tuple[str, str, str], _Table]]:
    """Give the distances of every field and metric, and the means over fields of a data set.

    Scores of ensembles are metrics of a model that has one member: all of its members together.
    """
    by_dataset: dict[str, list[str]] = {}
    for key in store.field_keys(root, schema.MODEL):
        by_dataset.setdefault(key.split("/")[0], []).append(key)
    for dataset, keys in by_dataset.items():
        for suffix in ("", f"/{schema.ENSEMBLE}"):
            fields = [read_results(root, f"{key}{suffix}") for key in keys if f"{key}{suffix}" in root]
            counts: dict[str, int] = {}
            for results in fields:
                damaged += leave_out_damaged(results)
                of_field = _members_of(root, results.key)
                counts = {
                    model: min(count, of_field.get(model, count))
                    for model, count in (counts or of_field).items()
                }
                for metric in results.distances:
                    table = replace(_table_of(results, metric), members=of_field if suffix else None)
                    yield (dataset, results.key.split("/")[1], metric), table
            named_so = f"{dataset}/{ALL_FIELDS}" in keys
            if len(keys) > 1 and not named_so and _are_alike(fields, len(keys)):
                for metric in fields[0].distances:
                    if all(metric in results.distances for results in fields):
                        table = replace(_mean_over_fields(fields, metric), members=counts if suffix else None)
                        yield (dataset, ALL_FIELDS, metric), table


def _add_spectra(root: store.Group, tables: SpectrumTables, damaged: list[str]) -> None:
    """Add the energies of all fields to the tables."""
    for key in store.field_keys(root, schema.MODEL):
        if f"{key}/{schema.SPECTRA}" not in root:
            continue
        results = read_results(root, f"{key}/{schema.SPECTRA}")
        damaged += leave_out_damaged(results)
        dataset, name = key.split("/")
        energies = _table_of(results, ENERGY).distances
        times = results.axes.times.mean(axis=0)
        tables.add({"dataset": dataset, "field": name}, energies, times, results.axes.wavenumbers)


def _are_alike(fields: list[FieldResults], count: int) -> bool:
    """Tell whether results are of all fields of a data set, with the same rollouts."""
    return len(fields) == count and all(other.axes_equal(fields[0].axes) for other in fields[1:])


def _members_of(root: store.Group, key: str) -> dict[str, int]:
    """Count the members of each model of a field; none for the mean over fields."""
    dataset, name = key.split("/")[:2]
    if name == ALL_FIELDS and f"{dataset}/{name}" not in root:
        return {}
    return {
        model: len(names) for model, names in read_results(root, f"{dataset}/{name}").axes.members.items()
    }


def leave_out_damaged(results: FieldResults) -> list[str]:
    """Make distances NaN that are not those that were written with their record; say which."""
    left_out = []
    described = has_specification(store.get_group(results.root, results.key))
    for metric, values in results.distances.items():
        if not described[metric]:
            values[...] = np.nan
            left_out.append(f"{results.key}: {metric}: its specification is not the one that was recorded")
            continue
        for place in np.ndindex(*values.shape[:3]):
            model = results.axes.models[place[0]]
            members = results.axes.members[model]
            if place[1] >= len(members):
                continue
            if not results.texts[metric][schema.FINGERPRINT][place]:
                values[place] = np.nan
            elif not results.is_bound(metric, place):
                values[place] = np.nan
                labels = " ".join(part for part in (model, members[place[1]]) if part)
                sequence = results.axes.sequences[place[2]]
                left_out.append(f"{results.key}: {metric}, {labels} {sequence}")
    return left_out


def _table_of(results: FieldResults, metric: str) -> _Table:
    values = results.distances[metric]
    return _Table(
        {
            model: values[place, : len(results.axes.members[model])]
            for place, model in enumerate(results.axes.models)
        },
        results.axes.times,
    )


def _mean_over_fields(fields: list[FieldResults], metric: str) -> _Table:
    """Average over fields; a rollout lacks a distance where any field lacks it."""
    tables = [_table_of(results, metric) for results in fields]
    models = tables[0].distances
    return _Table(
        {model: np.mean([table.distances[model] for table in tables], axis=0) for model in models},
        tables[0].times,
    )


def _means(distances: np.ndarray) -> np.ndarray:
    """Average over time, (member, sequence); NaN where a frame is missing."""
    return distances.mean(axis=2)


def _rows_of_errors(
    table: _Table, bootstrap: Bootstrap, replicates: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Make the rows of errors.parquet: each model over all times, and at each."""
    for model, means in bootstrap.values.items():
        labels = {"model": model, "frame": -1, "time": np.nan}
        yield labels | _summary(bootstrap, model, means) | _members(table, model)
    times = table.times.mean(axis=0)
    for frame, time in enumerate(times.tolist()):
        at_time = {model: distances[:, :, frame] for model, distances in table.distances.items()}
        draws = Bootstrap(at_time, replicates, seed)
        for model, values in at_time.items():
            labels = {"model": model, "frame": frame, "time": time}
            yield labels | _summary(draws, model, values) | _members(table, model)


def _members(table: _Table, model: str) -> dict[str, int]:
    return {"members": table.members[model]} if table.members else {}


def _summary(bootstrap: Bootstrap, model: str, values: np.ndarray) -> dict[str, Any]:
    present = np.isfinite(values)
    interval = bootstrap.interval(model)
    spread = float(np.std(values[present], ddof=1)) if present.sum() > 1 else np.nan
    return {
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "std": spread,
        "sequences": int(present.any(axis=0).sum()),
        "members": int(present.any(axis=1).sum()),
        "rollouts": int(present.sum()),
        "incomplete": int((~present).sum()),
    }


def _choose_best(
    report: RankingReport, place: tuple[str, str, str], bootstrap: Bootstrap, pairs: list[Difference]
) -> None:
    """Choose the model with the least error on the sequences of all, and those that it isn't better than.

    For certain, that is, by the interval of the difference.
    """
    present = [model for model in bootstrap.values if np.isfinite(bootstrap.mean(model))]
    if not present:
        return
    shared = bootstrap.restricted(present)
    if np.isfinite(shared.balanced_mean(present[0])):
        means = {model: shared.balanced_mean(model) for model in present}
    else:  # there is no sequence that all have
        means = {model: bootstrap.balanced_mean(model) for model in present}
    best = min(means, key=lambda model: means[model])
    report.best[place] = best
    report.equals[place] = [
        pair.other if pair.model == best else pair.model
        for pair in pairs
        if best in (pair.model, pair.other) and not pair.shows_better(best)
    ]


def _rows_of_valid_times(
    table: _Table, threshold: float, replicates: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Make the rows of valid_times.parquet: how long rollouts stay below a threshold.

    The end of the trajectory is the time of a rollout that stays below it, counted as censored. A missing
    distance counts as one beyond the threshold.
    """
    ends = table.times[:, -1] - table.times[:, 0]
    valid, censored = {}, {}
    for model, distances in table.distances.items():
        present = np.isfinite(distances).any(axis=2)
        beyond = ~(distances <= threshold)
        first = np.argmax(beyond, axis=2)
        stays = ~beyond.any(axis=2)
        elapsed = table.times - table.times[:, :1]
        times = np.take_along_axis(np.broadcast_to(elapsed, distances.shape), first[..., None], axis=2)[
            ..., 0
        ]
        times = np.where(stays, ends, times)
        valid[model] = np.where(present, times, np.nan)
        censored[model] = int((stays & present).sum())
    draws = Bootstrap(valid, replicates, seed)
    for model, values in valid.items():
        summary = _summary(draws, model, values)
        del summary["incomplete"]
        yield {"model": model, "threshold": threshold, "censored": censored[model]} | summary


def _write(
    report: RankingReport,
    rollouts: str | os.PathLike[str],
    out: str | os.PathLike[str],
    replicates: int,
    seed: int,
    root: store.Group,
) -> None:
    """Write the tables, and what they were made from."""
    summary = {
        "rollouts": absolute(rollouts),
        "replicates": replicates,
        "seed": seed,
        "versions": versions(),
        "best": [
            {"dataset": d, "field": f, "metric": m, "model": model, "equals": report.equals[d, f, m]}
            for (d, f, m), model in report.best.items()
        ],
        "damaged": report.damaged,
        schema.UNMATCHED: root.attrs.get(schema.UNMATCHED, []),
    }
    with local_folder(absolute(out)) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        tables = {name: getattr(report, name) for name in ("errors", "differences", "valid_times", "spread")}
        for name, table in (tables | report.spectra).items():
            table.to_parquet(folder / f"{name}.parquet", index=False)
        # Last: what the tables were made from.
        (folder / "rollouts.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
