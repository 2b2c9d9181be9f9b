"""The page of models against their reference: what lsim rank found, with curves, frames and reasons."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from PIL import Image

from pipeline.report.curves import Curve, draw_curves
from pipeline.report.pictures import MISSING, data_address, shrink
from pipeline.report.reading import ReportError
from pipeline.report.text import significant
from pipeline.rollouts import list_rollout_failures
from pipeline.rollouts.matching import FieldRollouts, match_fields
from pipeline.rollouts.ranking import leave_out_damaged
from pipeline.rollouts.results import read_results
from pipeline.rollouts.spectra import REFERENCE
from pipeline.storage import schema, store
from pipeline.storage.address import resolve
from pipeline.storage.checked_frames import NOT_READ, read_sequence

RECORD = "rollouts.json"
TABLES = ("errors", "differences", "valid_times", "spread", "spectra", "bands")
PICTURED_TIMES = 4
PICTURED_MODELS = 6
HEIGHT_OF_FRAMES = 96
"""Pixels."""
WORST = 5
ENERGY_FLOOR = 1e-12
"""Energies below this share of the largest are rounding of frames in single precision."""


@dataclass(frozen=True)
class Cell:
    """A model's error by a metric, with its interval; ``mark`` is best, even or empty."""

    value: float
    low: float
    high: float
    mark: str
    incomplete: int


@dataclass(frozen=True)
class Row:
    """A row of a table: a field and metric, and a cell for each model."""

    field: str
    metric: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class Figure:
    """A chart with what it shows: a field, and a metric or a time."""

    field: str
    of: str
    svg: Markup
    logarithmic: bool


@dataclass(frozen=True)
class FramesRow:
    """Pictures of one kind at some times: the reference, a model, or a difference."""

    name: str
    thumbs: list[str]


@dataclass(frozen=True)
class DatasetSection:
    """All that the page says of a data set."""

    name: str
    sentences: list[str]
    models: list[str]
    rows: list[Row]
    charts: list[Figure]
    valid: list[dict[str, Any]]
    spread: list[dict[str, Any]]
    spectra: list[Figure]
    bands: list[dict[str, Any]]
    no_frames: str = ""
    times: list[str] = field(default_factory=list)
    frames: list[FramesRow] = field(default_factory=list)
    frames_of: str = ""
    units: str = ""
    worst: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class RolloutContents:
    """Contents of the page."""

    sections: list[DatasetSection]
    unmatched: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    damaged: list[str]
    record: dict[str, Any]
    fault: str


def is_ranking(path: str | os.PathLike[str]) -> bool:
    """Tell whether a folder holds the results of ``lsim rank``."""
    return (Path(path) / RECORD).is_file()


def gather_rollouts(folder: Path) -> RolloutContents:
    """Gather what the page shows from a folder of results and the stores that it names.

    Raises
    ------
    ReportError
        When a table is missing.
    """
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in TABLES}
    except (OSError, ValueError) as error:
        raise ReportError(
            f"{folder}: no complete results of 'lsim rank' here: run it again ({error})"
        ) from error
    marks = {(e["dataset"], e["field"], e["metric"]): (e["model"], e["equals"]) for e in record["best"]}
    stores = _Stores(record["rollouts"])
    sections = []
    for dataset in dict.fromkeys(tables["errors"]["dataset"]):
        of_dataset = {
            name: table[table["dataset"] == dataset] if len(table) else table
            for name, table in tables.items()
        }
        sections.append(_make_section(str(dataset), of_dataset, marks, stores))
    return RolloutContents(
        sections,
        list(record.get(schema.UNMATCHED, [])),
        stores.list_failures(),
        record["damaged"],
        record,
        stores.fault,
    )


def _make_section(
    dataset: str,
    tables: dict[str, pd.DataFrame],
    marks: dict[tuple[str, str, str], tuple[str, list[str]]],
    stores: _Stores,
) -> DatasetSection:
    errors, spread, spectra, bands = (tables[n] for n in ("errors", "spread", "spectra", "bands"))
    overall = errors[errors["frame"] == -1]
    models = list(dict.fromkeys(overall["model"]))
    rows, sentences = [], []
    for labels, of_pair in overall.groupby(["field", "metric"], sort=False):
        name, metric = map(str, labels)
        best, equals = marks.get((dataset, name, metric), ("", []))
        by_model = {row["model"]: row for row in _records(of_pair)}
        cells = [_make_cell(by_model.get(model), model, best, equals) for model in models]
        rows.append(Row(name, metric, cells))
    fields = list(dict.fromkeys(overall["field"]))
    lead = "all" if "all" in fields else fields[0]
    for row in rows:
        if row.field == lead:
            best, equals = marks.get((dataset, lead, row.metric), ("", []))
            sentences.append(_say_best(row.metric, best, equals, tables["differences"], lead, len(models)))
    charts = [
        _draw_errors(str(name), str(metric), of_pair, models)
        for (name, metric), of_pair in errors[errors["frame"] >= 0].groupby(["field", "metric"], sort=False)
        if name == lead
    ]
    of_fields = [name for name in fields if name != "all"]
    pictured = stores.picture(dataset, of_fields, models)
    return DatasetSection(
        dataset,
        sentences,
        models,
        rows,
        charts,
        _records(tables["valid_times"]),
        _records(spread[spread["frame"] == -1]) if len(spread) else [],
        _draw_spectra(spectra[spectra["field"] == of_fields[0]], models) if len(spectra) else [],
        _tabulate_bands(bands[bands["field"] == of_fields[0]]) if len(bands) else [],
        **pictured,
        worst=stores.find_worst(dataset),
    )


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _make_cell(row: dict[str, Any] | None, model: str, best: str, equals: Sequence[str]) -> Cell | None:
    if row is None:
        return None
    mark = "best" if model == best else "even" if model in equals else ""
    return Cell(row["value"], row["low"], row["high"], mark, int(row["incomplete"]))


def _say_best(
    metric: str, best: str, equals: Sequence[str], differences: pd.DataFrame, name: str, models: int
) -> str:
    """Say in one sentence which model is best by a metric, and how sure that is."""
    if not best:
        return f"By {metric} no model has complete rollouts."
    if models < 2:
        return f"By {metric}, {best} is the only model."
    if not len(differences):
        return f"By {metric}, {best} is the only model with complete rollouts, or no interval was computed."
    of_metric = differences[(differences["metric"] == metric) & (differences["field"] == name)]
    known = of_metric["low"].notna().any() if len(of_metric) else False
    if not known:
        return (
            f"By {metric}, {best} has the least error; whether that is more than chance cannot be said: "
            "there are too few sequences for an interval."
        )
    if equals:
        return (
            f"By {metric}, {best} has the least error, but it cannot be told apart from "
            f"{' and '.join(equals)}: the 95 % intervals of their differences, for all pairs of models at "
            "once, hold zero."
        )
    return (
        f"By {metric}, {best} is best: the 95 % intervals of its differences to all other models, for all "
        "pairs at once, exclude zero."
    )


# ---------------------------------------------------------------- curves


def _draw_errors(name: str, metric: str, rows: pd.DataFrame, models: Sequence[str]) -> Figure:
    """Draw errors over time."""
    curves = []
    for place, model in enumerate(models):
        of_model = rows[rows["model"] == model].sort_values("frame")
        columns = (of_model[column].to_numpy(float) for column in ("time", "value", "low", "high"))
        curves.append(Curve(model, place, *columns))
    chart = draw_curves(curves, f"{metric} of {name} over time", "t")
    return Figure(name, metric, chart.svg, chart.logarithmic)


def _draw_spectra(spectra: pd.DataFrame, models: Sequence[str]) -> list[Figure]:
    """Draw energies by wavenumber, a figure for each time; the mean itself, wavenumber 0, is left out."""
    figures = []
    for time, rows in spectra[spectra["wavenumber"] > 0].groupby("time", sort=True):
        curves = []
        for place, model in enumerate([*models, REFERENCE]):
            of_model = rows[rows["model"] == model].sort_values("wavenumber")
            k, energy = (of_model[column].to_numpy(float) for column in ("wavenumber", "energy"))
            nothing = np.full(len(k), np.nan)
            style = -1 if model == REFERENCE else place
            curves.append(Curve(model, style, k, energy, nothing, nothing))
        name = str(rows["field"].iloc[0])
        at = f"t = {significant(float(str(time)))}"
        chart = draw_curves(
            curves, f"Energy of {name} by wavenumber, {at}", "k", x_logarithmic=True, y_floor=ENERGY_FLOOR
        )
        figures.append(Figure(name, at, chart.svg, chart.logarithmic))
    return figures


def _tabulate_bands(bands: pd.DataFrame) -> list[dict[str, Any]]:
    """List the relative errors of each model's bands at the last time."""
    rows: list[dict[str, Any]] = []
    if not len(bands):
        return rows
    last = bands[bands["time"] == bands["time"].max()]
    for model, of_model in last.groupby("model", sort=False):
        rows.append({"model": model, "time": float(last["time"].iloc[0]), "bands": _records(of_model)})
    return rows


# ---------------------------------------------------------------- stores


class _Stores:
    """The stores behind the results; where they are gone, the page goes without their pictures."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.root: store.Group | None = None
        self.fault = ""
        try:
            self.root = store.open_store(path)
        except (store.StoreError, OSError) as error:
            self.fault = str(error)

    def list_failures(self) -> list[dict[str, Any]]:
        """List rollouts with missing distances, by reason."""
        if self.root is None:
            return []
        by_reason: dict[tuple[str, str], list[str]] = {}
        for entry in list_rollout_failures(self.path):
            labels = " ".join(part for part in (entry.model, entry.member, entry.sequence) if part)
            by_reason.setdefault((f"{entry.dataset}/{entry.field} {labels}", entry.reason), []).append(
                entry.metric
            )
        return [
            {"place": place, "metrics": ", ".join(metrics), "reason": reason}
            for (place, reason), metrics in by_reason.items()
        ]

    def find_worst(self, dataset: str) -> list[dict[str, Any]]:
        """Find the sequences with the largest mean error over all members, by field and model."""
        if self.root is None:
            return []
        worst: list[dict[str, Any]] = []
        for key in store.field_keys(self.root, schema.MODEL):
            if key.split("/")[0] != dataset:
                continue
            results = read_results(self.root, key)
            leave_out_damaged(results)
            for metric, values in results.distances.items():
                present = np.isfinite(values)
                counts = present.sum(axis=(1, 3))
                means = np.where(present, values, 0).sum(axis=(1, 3)) / np.where(counts, counts, np.nan)
                for place, model in enumerate(results.axes.models):
                    row = means[place]
                    if np.isfinite(row).sum() > 1:
                        sequence = int(np.nanargmax(row))
                        worst.append(
                            {
                                "field": key.split("/")[1],
                                "metric": metric,
                                "model": model,
                                "sequence": results.axes.sequences[sequence],
                                "value": float(row[sequence]),
                                "ratio": float(row[sequence] / (np.nanmedian(row) or np.nan)),
                            }
                        )
        worst.sort(key=lambda entry: -entry["ratio"] if np.isfinite(entry["ratio"]) else 0)
        return worst[:WORST]

    def picture(self, dataset: str, fields: Sequence[str], models: Sequence[str]) -> dict[str, Any]:
        """Draw frames of the reference and of each model, and differences: first field, first sequence."""
        if self.root is None or not fields:
            return {"no_frames": self.fault or "there is no field"}
        key = f"{dataset}/{fields[0]}"
        try:
            return self._picture(key, models[:PICTURED_MODELS])
        except (*NOT_READ, store.StoreError, OSError, KeyError, ValueError) as error:
            return {"no_frames": f"{type(error).__name__}: {error}"}

    def _picture(self, key: str, models: Sequence[str]) -> dict[str, Any]:
        of_field = self._match(key)
        reference = of_field.reference
        ours = _read(reference.path, key, 0, reference.contents[0])
        numbers = np.unique(np.linspace(0, len(ours) - 1, PICTURED_TIMES).round().astype(int))
        limits = _limits(ours)
        rows = [FramesRow("reference", [_thumb(ours[k], limits) for k in numbers])]
        for model in models:
            rollout = next((r for r in of_field.rollouts if r.model == model and r.sequence == 0), None)
            if rollout is None:
                continue
            theirs = _read(rollout.frames.path, key, rollout.row, rollout.content)
            partners = rollout.partners[numbers]
            label = f"{model} {rollout.member}".strip()
            rows += _draw_model(
                label, ours[numbers], [theirs[p] if p >= 0 else None for p in partners], limits
            )
        low, high = map(significant, limits)
        group = store.get_group(store.open_store(reference.path), key)
        return {
            "times": [f"t = {significant(float(reference.times[0][k]))}" for k in numbers],
            "frames": rows,
            "frames_of": f"{key.split('/')[1]}, sequence {reference.names[0]}, from {low} to {high}",
            "units": str(store.get_array(group, schema.FRAMES).attrs.get("units", "")),
        }

    def _match(self, key: str) -> FieldRollouts:
        """Match the rollouts of a field as they were when they were compared."""
        assert self.root is not None
        paths: Any = self.root.attrs["models"]
        stores = {
            model: [
                ("" if len(listed) == 1 else str(number), self._beside(path))
                for number, path in enumerate(listed)
            ]
            for model, listed in paths.items()
        }
        reference = self._beside(str(self.root.attrs["reference"]))
        tolerance: Any = self.root.attrs["tolerance"]
        return match_fields(reference, stores, tolerance).fields[key]

    def _beside(self, path: str) -> str:
        """Resolve a path that the store records relative to itself."""
        return resolve(path, self.path)


def _draw_model(
    label: str, ours: np.ndarray, theirs: Sequence[np.ndarray | None], limits: tuple[float, float]
) -> list[FramesRow]:
    """Draw frames of a model, and their differences from the reference's on a scale of their own."""
    changes = [
        None if frame is None else frame.astype(float) - own for own, frame in zip(ours, theirs, strict=True)
    ]
    largest = max((float(np.nanmax(np.abs(c), initial=0)) for c in changes if c is not None), default=0.0)
    scale = (-largest, largest)
    return [
        FramesRow(label, ["" if frame is None else _thumb(frame, limits) for frame in theirs]),
        FramesRow(
            f"{label} − reference, ±{significant(largest)}",
            ["" if change is None else _thumb(change, scale, "RdBu_r") for change in changes],
        ),
    ]


def _read(path: str, key: str, row: int, content: str) -> np.ndarray:
    return read_sequence(store.get_group(store.open_store(path), key), row, content)


def _limits(frames: np.ndarray) -> tuple[float, float]:
    """Find the range of the first channel, over all times."""
    finite = frames[..., 0][np.isfinite(frames[..., 0])]
    return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)


def _thumb(frame: np.ndarray, limits: tuple[float, float], colours: str = "viridis") -> str:
    """Draw the first channel of a frame on a scale, as a ``data:`` address."""
    low, high = limits
    values = (frame[..., 0].astype(float) - low) / ((high - low) or 1.0)
    image = (matplotlib.colormaps[colours](np.clip(np.nan_to_num(values), 0, 1))[..., :3] * 255).astype(
        np.uint8
    )
    image[~np.isfinite(frame[..., 0])] = MISSING
    picture = shrink(image, HEIGHT_OF_FRAMES)
    return data_address(picture if isinstance(picture, Image.Image) else Image.fromarray(picture))
