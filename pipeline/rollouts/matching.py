"""Match the rollouts of models with the trajectories of their reference, by name and time.

A rollout belongs to the trajectory of the same data set, field and name. Where a store has several members of
a model, their rollouts are called ``<member>/<name>``. Frames are matched by their times, never by position.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from pipeline.metrics.fields import checked_fields
from pipeline.storage import schema, store


@dataclass(frozen=True)
class Unmatched:
    """Something that could not be compared, and why."""

    dataset: str
    field: str
    model: str
    member: str
    sequence: str
    reason: str


@dataclass(frozen=True)
class Trajectories:
    """The sequences of a field of a store of frames.

    Attributes
    ----------
    path, key : str
        The store, and ``<dataset>/<field>``.
    names, contents : list of str
    times : ndarray of shape (sequence, frame), float64
        As in the source where that is ``recorded``, else the parameter in [0, 1].
    recorded : bool
    shape : tuple of int
        Of a frame, (y, x, channel).
    """

    path: str
    key: str
    names: list[str]
    contents: list[str]
    times: np.ndarray
    recorded: bool
    shape: tuple[int, ...]

    @classmethod
    def open(cls, root: store.Group, path: str, key: str) -> Trajectories:
        """Read all but the frames of a field."""
        group = store.get_group(root, key)
        names, contents, parameter = (
            store.read(store.get_array(group, name))
            for name in (schema.SEQUENCE, schema.CONTENT, schema.PARAMETER)
        )
        ends = _recorded_times(group)
        times = parameter
        if ends is not None:
            times = ends[:, :1] + parameter * (ends[:, 1:] - ends[:, :1])
        shape = store.get_array(group, schema.FRAMES).shape[2:]
        return cls(
            path, key, list(map(str, names)), list(map(str, contents)), times, ends is not None, tuple(shape)
        )


def _recorded_times(group: store.Group) -> np.ndarray | None:
    """Read the times of each sequence's first and last frame, (sequence, 2); None unless all are recorded."""
    if schema.SOURCE not in group:
        return None
    records = [json.loads(str(text) or "{}") for text in store.read(store.get_array(group, schema.SOURCE))]
    if not all(schema.TIME in record for record in records):
        return None
    return np.array([record[schema.TIME] for record in records], dtype=np.float64).reshape(len(records), 2)


@dataclass(frozen=True)
class Rollout:
    """A rollout of a model, and the trajectory that it is compared with.

    Attributes
    ----------
    model, member : str
        The member is empty where a model has one alone.
    sequence : int
        Row of the trajectory in the reference.
    frames : Trajectories
    row : int
        Row in ``frames``.
    partners : ndarray of shape (frame,), int
        For each frame of the reference the rollout's frame at that time, −1 for none.
    """

    model: str
    member: str
    sequence: int
    frames: Trajectories
    row: int
    partners: np.ndarray

    @property
    def content(self) -> str:
        """Hash of the rollout's frames."""
        return self.frames.contents[self.row]


@dataclass(frozen=True)
class FieldRollouts:
    """The trajectories of a field, and the rollouts that are compared with them.

    ``wavenumbers`` are those of spectra, where results are spectra.
    """

    reference: Trajectories
    rollouts: list[Rollout] = field(default_factory=list)
    wavenumbers: np.ndarray = field(default_factory=lambda: np.empty(0))

    def of(self, row: int, model: str) -> list[Rollout]:
        """List a model's rollouts of a trajectory; for when all are matched."""
        return self._by_row_and_model.get((row, model), [])

    @cached_property
    def _by_row_and_model(self) -> dict[tuple[int, str], list[Rollout]]:
        index: dict[tuple[int, str], list[Rollout]] = {}
        for rollout in self.rollouts:
            index.setdefault((rollout.sequence, rollout.model), []).append(rollout)
        return index


@dataclass(frozen=True)
class Matching:
    """Rollouts that have a trajectory, by ``<dataset>/<field>``, and what has none."""

    fields: dict[str, FieldRollouts]
    unmatched: list[Unmatched] = field(default_factory=list)


def match_fields(
    reference: str, models: Mapping[str, Sequence[tuple[str, str]]], tolerance: float
) -> Matching:
    """Match all fields of a reference with those of models.

    Parameters
    ----------
    reference : str
        Path of a store of frames.
    models : mapping of str to sequence of (str, str)
        By model its stores, each with the name of the member that it is of; empty where it is the only one.
    tolerance : float
        Share of the smallest step of time by which equal times may differ.

    Returns
    -------
    Matching

    Raises
    ------
    pipeline.storage.store.StoreError
        For a path without a store of frames, and for models that have no field in common with the reference.
    """
    source = store.open_store(reference)
    keys = checked_fields(source, reference)
    matching = Matching({key: FieldRollouts(Trajectories.open(source, reference, key)) for key in keys})
    for model, stores in models.items():
        for member, path in stores:
            _match_store(matching, path, (model, member), tolerance)
        _list_lacking(matching, model)
    return matching


def _list_lacking(matching: Matching, model: str) -> None:
    """List the trajectories of which a model's member has no rollout, unless another reason is listed."""
    listed = {
        (entry.dataset, entry.field, entry.member, entry.sequence)
        for entry in matching.unmatched
        if entry.model == model
    }
    for key, of_field in matching.fields.items():
        dataset, name = key.split("/")
        rows: dict[str, set[int]] = {}
        for rollout in of_field.rollouts:
            if rollout.model == model:
                rows.setdefault(rollout.member, set()).add(rollout.sequence)
        for member, present in rows.items():
            for row, sequence in enumerate(of_field.reference.names):
                if row not in present and (dataset, name, member, sequence) not in listed:
                    reason = "the model has no rollout of this sequence"
                    matching.unmatched.append(Unmatched(dataset, name, model, member, sequence, reason))


def _match_store(matching: Matching, path: str, owner: tuple[str, str], tolerance: float) -> None:
    """Match the rollouts of one store of a model."""
    model, member = owner
    root = store.open_store(path)
    keys = checked_fields(root, path)
    if not matching.fields.keys() & {*keys}:
        raise store.StoreError(
            f"{path}: model {model!r} has the fields {', '.join(keys)}; expected one of "
            f"{', '.join(matching.fields)}, as the reference has: name data sets and fields alike"
        )
    for key in sorted({*keys} | matching.fields.keys()):
        if key in keys and key in matching.fields:
            frames = Trajectories.open(root, path, key)
            unmatched = _match_field(matching.fields[key], frames, owner, tolerance)
        elif key in keys:
            unmatched = [("", member, "the reference has no such field")]
        else:
            unmatched = [("", member, f"{path} has no such field")]
        dataset, name = key.split("/")
        matching.unmatched.extend(
            Unmatched(dataset, name, model, of, sequence, reason) for sequence, of, reason in unmatched
        )
    for dataset, entry in _quarantined(root):
        if f"{dataset}/{entry['field']}" in matching.fields:
            reason = f"quarantined: {entry['file']}: {entry['reason']}"
            matching.unmatched.append(
                Unmatched(dataset, entry["field"], model, member, entry["sequence"], reason)
            )


def _match_field(
    of_field: FieldRollouts, frames: Trajectories, owner: tuple[str, str], tolerance: float
) -> list[tuple[str, str, str]]:
    """Match the rollouts of a field; list sequence, member and reason of those that don't compare."""
    reference, (model, member) = of_field.reference, owner
    if frames.shape != reference.shape:
        reason = (
            f"frames of {frames.path} have the shape {frames.shape} (y, x, channel), those of the reference "
            f"{reference.shape}: bring them to one grid first"
        )
        return [("", member, reason)]
    rows = {sequence: row for row, sequence in enumerate(reference.names)}
    unmatched = []
    for row, full_name in enumerate(frames.names):
        prefix, sequence = _split_name(full_name, rows)
        if sequence not in rows:
            unmatched.append((full_name, member, f"the reference has no sequence {full_name!r}"))
            continue
        of = "/".join(part for part in (member, prefix) if part)
        partners = match_times(reference, rows[sequence], frames, row, tolerance)
        if isinstance(partners, str):
            unmatched.append((sequence, of, partners))
        else:
            of_field.rollouts.append(Rollout(model, of, rows[sequence], frames, row, partners))
    return unmatched


def _split_name(name: str, rows: Mapping[str, int]) -> tuple[str, str]:
    """Split a rollout's name into member and the name of a trajectory; no member where there is none."""
    if name not in rows:
        for place, character in enumerate(name):
            if character == "/" and name[place + 1 :] in rows:
                return name[:place], name[place + 1 :]
    return "", name


def match_times(
    reference: Trajectories, row: int, rollout: Trajectories, other: int, tolerance: float
) -> np.ndarray | str:
    """Find the rollout's frame at the time of each frame of the reference, or say why times don't compare.

    Returns
    -------
    ndarray of shape (frame,), int, or str
        −1 where the rollout has no frame at that time.
    """
    times, theirs = reference.times[row], rollout.times[other]
    if reference.recorded != rollout.recorded:
        which = rollout.path if reference.recorded else reference.path
        return f"{which} records no times of its frames, and the other store does: convert it again"
    if not reference.recorded and len(times) != len(theirs):
        return (
            f"{len(theirs)} frames for {len(times)} of the reference, and neither store records times to "
            "match them by: convert both again"
        )
    nearest = np.searchsorted(theirs, times)
    below, above = np.clip(nearest - 1, 0, len(theirs) - 1), np.clip(nearest, 0, len(theirs) - 1)
    partners = np.where(np.abs(theirs[below] - times) <= np.abs(theirs[above] - times), below, above)
    limit = tolerance * float(np.diff(times).min())
    partners[np.abs(theirs[partners] - times) > limit] = -1
    if (partners < 0).all():
        return (
            f"no frame at a time of the reference: its times are {times[0]:g} to {times[-1]:g}, the "
            f"rollout's {theirs[0]:g} to {theirs[-1]:g}"
        )
    return partners


def _quarantined(root: store.Group) -> Iterator[tuple[str, dict[str, str]]]:
    """List data set and entry of the sequences that could not be converted."""
    for dataset, group in root.groups():
        entries = group.attrs.get(schema.QUARANTINED, [])
        for entry in entries if isinstance(entries, list) else []:
            yield dataset, dict(entry)
