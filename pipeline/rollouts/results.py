"""Results of a field in rollouts.zarr, in memory while a run brings them up to date: distances and records.

Distances of a rollout are a few numbers a frame, so the driver holds those of a field, and is the one writer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.rollouts.matching import FieldRollouts
from pipeline.stage.provenance import METRICS_PER_CHUNK, add_metrics, metric_places
from pipeline.stage.row_records import FLUSH_S
from pipeline.storage import digests, schema, store

CHUNK_BYTES = 16 * 2**20
"""Most bytes of a chunk of distances, which holds sequences of all members of one model."""

LOST = "/"
"""Start of the name of a model whose label is lost to a damaged disk; no model's own name has a slash."""

TEXTS = (schema.FAILURE, schema.CONTENT, schema.DIGEST, schema.FINGERPRINT)
"""Texts of each rollout and metric, in the order in which they are written: the fingerprint last."""


@dataclass(frozen=True)
class Axes:
    """Models with their members, and the trajectories of a field.

    Attributes
    ----------
    models : list of str
    members : dict of str to list of str
        By model; a model with one member alone has the name "".
    sequences : list of str
    times : ndarray of shape (sequence, frame), float64
    wavenumbers : ndarray of shape (wavenumber,), float64
        Of spectra; empty for distances, which don't have the axis.
    """

    models: list[str]
    members: dict[str, list[str]]
    sequences: list[str]
    times: np.ndarray
    wavenumbers: np.ndarray = field(default_factory=lambda: np.empty(0))

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of model, member, sequence, frame, and of wavenumber where there are any."""
        most = max((len(of_model) for of_model in self.members.values()), default=0)
        return (len(self.models), most, *self.times.shape, *self.wavenumbers.shape[: self.has_spectra])

    @property
    def has_spectra(self) -> bool:
        """True if values are spectra."""
        return len(self.wavenumbers) > 0

    def member_table(self) -> np.ndarray:
        """Tabulate the members by model, (model, member); "" where a model has fewer."""
        table = np.full(self.shape[:2], "", dtype=object)
        for place, model in enumerate(self.models):
            table[place, : len(self.members[model])] = self.members[model]
        return table

    def place(self, model: str, member: str, sequence: str) -> tuple[int, int, int]:
        """Find a rollout's indices."""
        names = self.members[model]
        return self.models.index(model), names.index(member), self._rows[sequence]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {sequence: row for row, sequence in enumerate(self.sequences)}

    @classmethod
    def joined(cls, stored: Axes | None, of_field: FieldRollouts, baselines: Sequence[str]) -> Axes:
        """Join stored models with those of a run; the trajectories are those of the reference."""
        earlier = {} if stored is None else stored.members
        members = {model: list(names) for model, names in earlier.items() if not model.startswith(LOST)}
        current: dict[str, set[str]] = {}
        for rollout in of_field.rollouts:
            current.setdefault(rollout.model, set()).add(rollout.member)
        members |= {model: sorted(names, key=_member_order) for model, names in current.items()}
        members |= {baseline: [""] for baseline in baselines}
        reference = of_field.reference
        return cls(list(members), members, reference.names, reference.times, of_field.wavenumbers)


def _member_order(name: str) -> tuple[int, str]:
    return len(name), name


@dataclass
class FieldResults:
    """Distances and records of a field.

    Attributes
    ----------
    key : str
    axes : Axes
    distances : dict of str to ndarray of shape (model, member, sequence, frame), float64
        Spectra have one axis more.
    texts : dict of str to dict of str to ndarray of shape (model, member, sequence), object
        By metric and name.
    specifications : dict of str to str
        Of stored metrics, as they were recorded.
    """

    root: store.Group
    key: str
    axes: Axes
    distances: dict[str, np.ndarray] = field(default_factory=dict)
    texts: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    specifications: dict[str, str] = field(default_factory=dict)
    _changed: set[tuple[str, int]] = field(default_factory=set)
    _written: float = field(default_factory=time.monotonic)

    # ---------------------------------------------------------------- reading and layout

    @classmethod
    def open(
        cls,
        root: store.Group,
        of_field: FieldRollouts,
        metrics: Mapping[str, str],
        baselines: Sequence[str],
    ) -> FieldResults:
        """Read the results of a field, and bring its group into the shape of the reference and the models.

        Parameters
        ----------
        root : Group
            Of ``rollouts.zarr``.
        of_field : FieldRollouts
        metrics : mapping of str to str
            Names of the metrics to have, and the units of each; metrics already in the store stay.
        baselines : sequence of str
        """
        key = of_field.reference.key
        complete = f"{key}/{schema.PROVENANCE}/{schema.METRIC}" in root
        stored = read_results(root, key) if complete else None
        axes = Axes.joined(stored.axes if stored else None, of_field, baselines)
        results = cls(root, key, axes)
        names = list(dict.fromkeys([*(stored.distances if stored else ()), *metrics]))
        for name in names:
            results.distances[name] = np.full(axes.shape, np.nan)
            results.texts[name] = {text: np.full(axes.shape[:3], "", dtype=object) for text in TEXTS}
        if stored is not None:
            results._take(stored)
        if stored is None or not stored.axes_equal(axes):
            results._lay_out()
        results._add_metrics(names, metrics)
        if stored is not None and not stored.axes_equal(axes):
            results._keep_specifications(stored.specifications)
        return results

    def axes_equal(self, other: Axes) -> bool:
        """Tell whether the results have these axes."""
        mine = self.axes
        return (
            (mine.models, mine.members, mine.sequences) == (other.models, other.members, other.sequences)
            and np.array_equal(mine.times, other.times)
            and np.array_equal(mine.wavenumbers, other.wavenumbers)
        )

    def _take(self, stored: FieldResults) -> None:
        """Take results of rollouts that still have the same trajectory."""
        times = dict(zip(stored.axes.sequences, stored.axes.times, strict=True))
        same = [
            sequence
            for sequence, own in zip(self.axes.sequences, self.axes.times, strict=True)
            if sequence in times and np.array_equal(times[sequence], own)
        ]
        if not np.array_equal(stored.axes.wavenumbers, self.axes.wavenumbers):
            return
        for model, names in stored.axes.members.items():
            for member in set(names) & set(self.axes.members.get(model, [])):
                for sequence in same:
                    origin = stored.axes.place(model, member, sequence)
                    place = self.axes.place(model, member, sequence)
                    for metric, values in stored.distances.items():
                        self.distances[metric][place] = values[origin]
                        for name, column in stored.texts[metric].items():
                            self.texts[metric][name][place] = column[origin]

    def _lay_out(self) -> None:
        """Create the group anew, with its labels; what was taken is written as a whole."""
        group = self.root.require_group(self.key)
        for name in sorted(name for name, _ in group.members() if name not in schema.PARTS_OF_ROLLOUTS):
            store.delete(self.root, f"{self.key}/{name}")
        labels: dict[str, tuple[np.ndarray, tuple[str, ...], Any]] = {
            schema.MEMBER: (self.axes.member_table(), (schema.MODEL, schema.MEMBER), str),
            schema.SEQUENCE: (np.array(self.axes.sequences, object), (schema.SEQUENCE,), str),
            schema.TIME: (self.axes.times, (schema.SEQUENCE, schema.FRAME), "float64"),
            schema.MODEL: (np.array(self.axes.models, object), (schema.MODEL,), str),
        }
        if self.axes.has_spectra:
            labels[schema.WAVENUMBER] = (self.axes.wavenumbers, (schema.WAVENUMBER,), "float64")
        for name, (values, dims, dtype) in labels.items():
            array = store.create_array(
                group, name, shape=values.shape, chunks=values.shape, dims=dims, dtype=dtype
            )
            store.write_rows(array, 0, values)
        self._changed = {(name, place) for name in self.distances for place in range(len(self.axes.models))}

    def _add_metrics(self, names: Sequence[str], units: Mapping[str, str]) -> None:
        """Create the arrays of metrics that the group doesn't have yet."""
        group = store.get_group(self.root, self.key)
        provenance = group.require_group(schema.PROVENANCE)
        models, members, sequences, *values = self.axes.shape
        together = max(1, min(sequences, CHUNK_BYTES // max(1, 8 * members * int(np.prod(values)))))
        by_metric: dict[str, Any] = {"shape": (0,), "chunks": (METRICS_PER_CHUNK,), "dims": (schema.METRIC,)}
        by_rollout: dict[str, Any] = {
            "shape": (0, models, members, sequences),
            "chunks": (1, 1, members, sequences),
            "dims": schema.ROLLOUT_PROVENANCE_DIMS,
        }
        layouts = {schema.METRIC: by_metric, schema.SPECIFICATION: by_metric} | dict.fromkeys(
            TEXTS, by_rollout
        )
        for name, layout in layouts.items():
            if name not in provenance:
                store.create_array(provenance, name, dtype=str, **layout)
        for name in names:
            if name not in group:
                store.create_array(
                    group,
                    name,
                    shape=self.axes.shape,
                    chunks=(1, members, together, *values),
                    dims=(*schema.ROLLOUT_DIMS, schema.WAVENUMBER)[: len(self.axes.shape)],
                    dtype="float64",
                )
                self._changed |= {(name, place) for place in range(models)}
            if name in units:
                store.set_units(store.get_array(group, name), units[name])
        add_metrics(provenance, names, layouts)

    def _keep_specifications(self, specifications: Mapping[str, str]) -> None:
        """Write the specifications of metrics into a group that was laid out anew."""
        group = store.get_group(self.root, self.key)
        array = store.get_array(store.get_group(group, schema.PROVENANCE), schema.SPECIFICATION)
        texts = [specifications.get(name, "") for name in metric_places(group)]
        store.write_rows(array, 0, np.array(texts, dtype=object))

    # ---------------------------------------------------------------- records

    def put(
        self, metric: str, place: tuple[int, int, int], values: np.ndarray, texts: Mapping[str, str]
    ) -> None:
        """Put the distances of a rollout, and their record with its digest."""
        self.distances[metric][place] = values
        recorded = {name: texts.get(name, "") for name in TEXTS if name != schema.DIGEST}
        hashed = digests.hash_values(values) if recorded[schema.FINGERPRINT] else ""
        recorded[schema.DIGEST] = digests.bind(self._identity(metric, place), recorded, hashed)
        for name, text in recorded.items():
            self.texts[metric][name][place] = text
        self._changed.add((metric, place[0]))
        if time.monotonic() - self._written > FLUSH_S:
            self.flush()

    def is_bound(self, metric: str, place: tuple[int, int, int]) -> bool:
        """Tell whether record and distances of a rollout are those that were written together."""
        texts = {name: str(column[place]) for name, column in self.texts[metric].items()}
        digest = texts.pop(schema.DIGEST)
        values = self.distances[metric][place]
        return digests.binds(digest, self._identity(metric, place), texts) and (
            digests.is_of_no_values(digest) or digests.binds_values(digest, values)
        )

    def is_fresh(self, metric: str, place: tuple[int, int, int], fingerprint: str) -> bool:
        """Tell whether distances are made of what a fingerprint says, and as they were written."""
        recorded = str(self.texts[metric][schema.FINGERPRINT][place])
        return recorded == fingerprint and self.is_bound(metric, place)

    def each(self) -> Iterator[tuple[str, tuple[int, int, int], tuple[str, str, str]]]:
        """List metric, place, and names of model, member and sequence of all results."""
        for metric in self.distances:
            for m, model in enumerate(self.axes.models):
                for k, member in enumerate(self.axes.members[model]):
                    for s, sequence in enumerate(self.axes.sequences):
                        yield metric, (m, k, s), (model, member, sequence)

    def _identity(self, metric: str, place: tuple[int, int, int]) -> bytes:
        model, member, sequence = place
        name = self.axes.models[model]
        labels = (self.key, metric, name, self.axes.members[name][member], self.axes.sequences[sequence])
        axes = (self.axes.times[sequence], self.axes.wavenumbers)
        return digests.identify(*labels) + b"".join(
            np.ascontiguousarray(axis, "<f8").tobytes() for axis in axes
        )

    def forget(self, metric: str, place: tuple[int, int, int]) -> None:
        """Delete the record and the distances of a rollout that is out of date."""
        if any(column[place] for column in self.texts[metric].values()):
            for column in self.texts[metric].values():
                column[place] = ""
            self.distances[metric][place] = np.nan
            self._changed.add((metric, place[0]))

    def flush(self) -> None:
        """Write what has changed: distances first, fingerprints last."""
        group = store.get_group(self.root, self.key)
        provenance, places = store.get_group(group, schema.PROVENANCE), metric_places(group)
        for metric, model in sorted(self._changed):
            array = store.get_array(group, metric)
            step = array.chunks[2]
            for start in range(0, array.shape[2], step):
                part = self.distances[metric][model : model + 1, :, start : start + step]
                store.write_block(array, (model, 0, start, *(0 for _ in part.shape[3:])), part)
            for name in TEXTS:
                column = self.texts[metric][name][model][None, None]
                store.write_block(store.get_array(provenance, name), (places[metric], model, 0, 0), column)
        self._changed.clear()
        self._written = time.monotonic()


def read_results(root: store.Group, key: str) -> FieldResults:
    """Read the results of a field."""
    group = store.get_group(root, key)
    provenance = store.get_group(group, schema.PROVENANCE)
    models, table, sequences, times = (
        store.read(store.get_array(group, name))
        for name in (schema.MODEL, schema.MEMBER, schema.SEQUENCE, schema.TIME)
    )
    members = {}
    for number, (model, row) in enumerate(zip(map(str, models), table, strict=True)):
        names = [str(name) for name in row]
        # The first may be called "": a model of one member alone.
        members[model or f"{LOST}{number}"] = [name for place, name in enumerate(names) if name or place == 0]
    wavenumbers = np.empty(0)
    if schema.WAVENUMBER in group:
        wavenumbers = store.read(store.get_array(group, schema.WAVENUMBER))
    axes = Axes(list(members), members, [str(name) for name in sequences], times, wavenumbers)
    results = FieldResults(root, key, axes)
    for metric, place in metric_places(group).items():
        if not metric or metric not in group:
            continue  # a run was killed while it laid out the store, or the name is lost
        results.distances[metric] = store.read(store.get_array(group, metric))
        results.texts[metric] = {name: store.read(store.get_array(provenance, name), place) for name in TEXTS}
    specifications = store.read(store.get_array(provenance, schema.SPECIFICATION))
    results.specifications = {
        metric: str(specifications[place]) for metric, place in metric_places(group).items()
    }
    return results
