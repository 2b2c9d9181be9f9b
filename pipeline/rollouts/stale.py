"""Find what is out of date in rollouts.zarr: distances, spectra and scores; make blocks of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lsim.metric import Metric
from lsim.preprocess import scope_identity
from lsim.units import raise_units
from pipeline.metrics.value_range import dataset_range
from pipeline.rollouts import scores, spectra
from pipeline.rollouts.compute import Block, Ensemble, ScopedRequest, Source
from pipeline.rollouts.matching import FieldRollouts, Rollout
from pipeline.rollouts.results import FieldResults, read_results
from pipeline.rollouts.settings import BASELINES, RolloutSettings, ScopedMetrics
from pipeline.stage.provenance import has_specification, record_specifications, specification_of
from pipeline.storage import schema, store
from pipeline.storage.versions import versions
from pipeline.workers.cluster import Cluster

SOURCES_TOGETHER = 8
"""Rollouts that a task compares with their trajectory: few enough that several workers share those of one."""

RULES = 2
"""Raised whenever what is done with a metric's distances changes, such as where they are but rounding."""

Place = tuple[str, str, str, int]
"""Metric, model, member, and row of the trajectory."""


@dataclass
class Stale:
    """Outdated results of a field, by row of the trajectory.

    Attributes
    ----------
    results : FieldResults
        Of rollouts.
    scores, spectra : FieldResults, optional
        Of ensembles, each a model with one nameless member; and energies, the reference among the models.
    reference : FieldRollouts
    requests : dict of str to ScopedRequest
    sources : dict of int to dict of (str, str) to Source
        Rollouts that are out of date, by row, model and member.
    ensembles : dict of int to dict of str to Ensemble
        By row and model.
    spectrum_frames : ndarray of shape (row, time), int
    fingerprints, score_fingerprints, spectrum_fingerprints : dict of Place to (str, str)
        Content and fingerprint to record once it is computed.
    fresh : int
        Rollouts, times metrics, that are up to date.
    """

    results: FieldResults
    reference: FieldRollouts
    requests: Mapping[str, ScopedRequest]
    scores: FieldResults | None = None
    spectra: FieldResults | None = None
    sources: dict[int, dict[tuple[str, str], Source]] = field(default_factory=dict)
    ensembles: dict[int, dict[str, Ensemble]] = field(default_factory=dict)
    spectrum_frames: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int64))
    fingerprints: dict[Place, tuple[str, str]] = field(default_factory=dict)
    score_fingerprints: dict[Place, tuple[str, str]] = field(default_factory=dict)
    spectrum_fingerprints: dict[Place, tuple[str, str]] = field(default_factory=dict)
    fresh: int = 0

    def blocks(self) -> Iterator[Block]:
        """Make the blocks: an ensemble with all of its members, or some other rollouts of a trajectory."""
        for row in sorted({*self.sources, *self.ensembles}):
            outdated, ensembles = self.sources.get(row, {}), self.ensembles.get(row, {})
            for model, ensemble in ensembles.items():
                sources = _sources_of(self.reference, row, model)
                yield self._block(row, [outdated.get((model, of.member), of) for of in sources], ensemble)
            others = [source for source in outdated.values() if source.model not in ensembles]
            for start in range(0, len(others), SOURCES_TOGETHER):
                yield self._block(row, others[start : start + SOURCES_TOGETHER], None)

    def _block(self, row: int, sources: Sequence[Source], ensemble: Ensemble | None) -> Block:
        needed = {metric for source in sources for metric in source.metrics}
        needed |= {*ensemble.metrics} if ensemble else set()
        of = self.reference.reference
        return Block(
            of.path,
            of.key,
            row,
            of.contents[row],
            of.names[row],
            {name: request for name, request in self.requests.items() if name in needed},
            tuple(sources),
            tuple(of.contents),
            ensemble,
            tuple(self.spectrum_frames[row].tolist()) if self.spectra is not None else (),
        )


def _sources_of(of_field: FieldRollouts, row: int, model: str) -> list[Source]:
    """List all rollouts of a model with a trajectory, or its baseline."""
    return [Source(model, of.member, (), of) for of in of_field.of(row, model)] or [Source(model, "", ())]


def find_stale(
    root: store.Group,
    of_field: FieldRollouts,
    scoped: ScopedMetrics,
    settings: RolloutSettings,
    units: str,
    cluster: Cluster,
) -> Stale:
    """Find what of a field is out of date, delete its records, and describe the metrics.

    Parameters
    ----------
    root : Group
        Of ``rollouts.zarr``.
    of_field : FieldRollouts
    scoped : ScopedMetrics
    settings : RolloutSettings
    units : str
        Units of the field.
    cluster : Cluster
        Computes the range of the data set, where a metric needs it.
    """
    metrics = {metric.name: metric for metric in scoped.chosen.metrics}
    metric_units = {
        name: metric.units("none" if scoped.scopes[name] == "none" else "sequence", units)
        for name, metric in metrics.items()
    }
    results = FieldResults.open(root, of_field, metric_units, settings.baselines)
    requests = _scoped_requests(of_field, results, scoped, cluster)
    stale = Stale(results, of_field, requests)
    _find_stale_rollouts(stale, metrics, settings)
    if settings.spectra and settings.mask is None:
        _find_stale_spectra(stale, settings, units)
    else:
        spectra_of = _renamed(of_field, schema.SPECTRA)
        _forget_in_part(stale, spectra_of, _contents_of(of_field, (*settings.baselines, spectra.REFERENCE)))
    if _are_scored(root, of_field, settings):
        energies = {
            scores.ENERGY + name: metric_units[name]
            for name, metric in metrics.items()
            if "euclidean" in metric.axioms
            and not metric.preprocessing.mask
            and scoped.scopes[name] != "pair"
        }
        names = dict.fromkeys(scores.PIXEL_SCORES, units) | energies
        stale.scores = FieldResults.open(root, as_ensembles(of_field), names, settings.baselines)
        _find_stale_ensembles(stale, names, metrics, settings)
    else:
        _forget_in_part(stale, as_ensembles(of_field), _contents_of_ensembles(of_field))
    return stale


def as_ensembles(of_field: FieldRollouts) -> FieldRollouts:
    """Rename a field and its rollouts as the group of scores has them: one nameless member a model."""
    renamed = _renamed(of_field, schema.ENSEMBLE)
    return FieldRollouts(renamed.reference, [replace(rollout, member="") for rollout in of_field.rollouts])


def _renamed(of_field: FieldRollouts, part: str) -> FieldRollouts:
    """Rename a field as a part of its results is called."""
    reference = replace(of_field.reference, key=f"{of_field.reference.key}/{part}")
    return FieldRollouts(reference, of_field.rollouts)


def _are_scored(root: store.Group, of_field: FieldRollouts, settings: RolloutSettings) -> bool:
    """Tell whether a field has scores: where any model has several members, or had them."""
    if not settings.ensembles:
        return False
    members = _members(of_field)
    return any(len(names) > 1 for names in members.values()) or (
        f"{of_field.reference.key}/{schema.ENSEMBLE}" in root
    )


def _members(of_field: FieldRollouts) -> dict[str, list[str]]:
    members: dict[str, set[str]] = {}
    for rollout in of_field.rollouts:
        members.setdefault(rollout.model, set()).add(rollout.member)
    return {model: sorted(names) for model, names in members.items()}


def _scoped_requests(
    of_field: FieldRollouts, results: FieldResults, scoped: ScopedMetrics, cluster: Cluster
) -> dict[str, ScopedRequest]:
    """Give each metric its scope; the range of the reference's data set is computed where that is it."""
    trajectories, requests = of_field.reference, {}
    for metric in scoped.chosen.metrics:
        scope, of_dataset = scoped.scopes[metric.name], None
        if scope == "dataset":
            group = store.get_group(results.root, f"{trajectories.key}/{schema.PROVENANCE}")
            rows = [(trajectories.key, row, content) for row, content in enumerate(trajectories.contents)]
            of_dataset = dataset_range(cluster, trajectories.path, rows, group, metric.preprocessing)
        requests[metric.name] = ScopedRequest(scoped.chosen.requests[metric.name], scope, of_dataset)
    return requests


# ---------------------------------------------------------------- rollouts


def _find_stale_rollouts(stale: Stale, metrics: Mapping[str, Metric], settings: RolloutSettings) -> None:
    """Find the rollouts whose distances are out of date."""
    results, of_field = stale.results, stale.reference
    group = store.get_group(results.root, results.key)
    described = has_specification(group)
    rollouts = _list_rollouts(of_field, settings.baselines)
    contents = _contents_of(of_field, settings.baselines)
    for model, member, row, rollout in rollouts:
        place = results.axes.place(model, member, of_field.reference.names[row])
        content = contents[model, member, row]
        outdated = []
        for name, request in stale.requests.items():
            made_of = _hashed(_made_of(content, request, metrics[name]))
            if described.get(name) and results.is_fresh(name, place, made_of):
                stale.fresh += 1
                continue
            results.forget(name, place)
            outdated.append(name)
            stale.fingerprints[name, model, member, row] = (content, made_of)
        if outdated:
            of_row = stale.sources.setdefault(row, {})
            of_row[model, member] = Source(model, member, tuple(outdated), rollout)
    _forget_others(results, of_field, contents)
    outdated_metrics = {name for name, *_ in stale.fingerprints}
    record_specifications(
        group,
        {
            name: _specification(metric, stale.requests[name], settings)
            for name, metric in metrics.items()
            if name in outdated_metrics
        },
    )


def _list_rollouts(
    of_field: FieldRollouts, others: Sequence[str]
) -> list[tuple[str, str, int, Rollout | None]]:
    """List model, member and row of all rollouts, and those of models that are made of the reference."""
    rollouts: list[tuple[str, str, int, Rollout | None]] = [
        (rollout.model, rollout.member, rollout.sequence, rollout) for rollout in of_field.rollouts
    ]
    rows = range(len(of_field.reference.names))
    rollouts += [(name, "", row, None) for name in others for row in rows]
    return sorted(rollouts, key=lambda entry: (entry[2], entry[0], entry[1]))


def _specification(
    metric: Metric, request: ScopedRequest, settings: RolloutSettings, **others: Any
) -> dict[str, Any]:
    """Describe what distances of a metric, or scores by it, are computed with."""
    pairing = {"protocol": settings.protocol} if settings.protocol else {}
    return specification_of(metric, scope_identity(request.scope), directed=True, **pairing, **others)


def _other(of_field: FieldRollouts, model: str, rollout: Rollout | None) -> list[Any]:
    """List what a trajectory is compared with."""
    if rollout is not None:
        return [rollout.content, rollout.partners.tolist()]
    return [model, of_field.reference.contents if model == "mean" else ""]


def _made_of(content: str, request: ScopedRequest, metric: Metric) -> dict[str, Any]:
    """List all that determines distances."""
    scope = request.dataset_range if request.scope == "dataset" else scope_identity(request.scope)
    return {
        "content": content,
        "specification": metric.specification_hash,
        "scope": [request.scope, scope],
        "rules": RULES,
    }


def _hashed(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _forget_others(
    results: FieldResults, of_field: FieldRollouts, contents: Mapping[tuple[str, str, int], str]
) -> None:
    """Forget what is made of other frames than today's, whether or not this run asks for its metric.

    Parameters
    ----------
    contents : mapping of (model, member, row) to str
        Of all rollouts that there are, of models that this run names. Of other models the trajectory alone is
        known.
    """
    named = {model for model, _, _ in contents}
    for metric, place, (model, member, sequence) in results.each():
        row = results.axes.sequences.index(sequence)
        recorded = str(results.texts[metric][schema.CONTENT][place])
        if model in named:
            is_outdated = recorded != contents.get((model, member, row))
        else:
            is_outdated = recorded.partition(" ")[0] != of_field.reference.contents[row]
        if recorded and is_outdated:
            results.forget(metric, place)
    results.flush()


def _contents_of(of_field: FieldRollouts, others: Sequence[str]) -> dict[tuple[str, str, int], str]:
    """Describe what each rollout, and each baseline whether named or not, is compared with."""
    models = [*dict.fromkeys([*others, *BASELINES])]
    hashes = {model: _hashed(_other(of_field, model, None)) for model in models}
    contents = {}
    for model, member, row, rollout in _list_rollouts(of_field, models):
        hashed = hashes[model] if rollout is None else _hashed(_other(of_field, model, rollout))
        contents[model, member, row] = f"{of_field.reference.contents[row]} {hashed}"
    return contents


def _contents_of_ensembles(of_field: FieldRollouts) -> dict[tuple[str, str, int], str]:
    """Describe what each ensemble, and each baseline, is made of."""
    hashes = {model: _hashed(_other(of_field, model, None)) for model in BASELINES}
    all_members = _members(of_field)
    contents = {}
    for row, trajectory in enumerate(of_field.reference.contents):
        for model, members in all_members.items():
            if rollouts := of_field.of(row, model):
                others = [[of.member, _other(of_field, model, of)] for of in rollouts]
                contents[model, "", row] = f"{trajectory} {_hashed([members, others])}"
        contents |= {(model, "", row): f"{trajectory} {hashed}" for model, hashed in hashes.items()}
    return contents


def _forget_in_part(
    stale: Stale, of_part: FieldRollouts, contents: Mapping[tuple[str, str, int], str]
) -> None:
    """Forget what is outdated in a group that this run doesn't compute."""
    if f"{of_part.reference.key}/{schema.PROVENANCE}/{schema.METRIC}" in stale.results.root:
        _forget_others(read_results(stale.results.root, of_part.reference.key), of_part, contents)


# ---------------------------------------------------------------- spectra


def _find_stale_spectra(stale: Stale, settings: RolloutSettings, units: str) -> None:
    """Find the rollouts whose energies by wavenumber are out of date, the reference among them."""
    of_field, reference = stale.reference, stale.reference.reference
    chosen = np.stack([spectra.choose_frames(times, settings.spectra) for times in reference.times])
    chosen = np.unique(chosen, axis=1)  # two times may have the same nearest frame
    at_times = replace(
        reference,
        key=f"{reference.key}/{schema.SPECTRA}",
        times=np.take_along_axis(reference.times, chosen, axis=1),
    )
    with_numbers = FieldRollouts(at_times, of_field.rollouts, spectra.wavenumbers(*reference.shape[:2]))
    models = (*settings.baselines, spectra.REFERENCE)
    names = {spectra.ENERGY: raise_units(units, 2)}
    results = FieldResults.open(stale.results.root, with_numbers, names, models)
    stale.spectra, stale.spectrum_frames = results, chosen
    group = store.get_group(results.root, results.key)
    described = has_specification(group)[spectra.ENERGY]
    contents = _contents_of(of_field, models)
    for model, member, row, rollout in _list_rollouts(of_field, models):
        content = contents[model, member, row]
        made_of = _hashed({"content": content, "frames": chosen[row].tolist(), "version": spectra.VERSION})
        place = results.axes.place(model, member, reference.names[row])
        if described and results.is_fresh(spectra.ENERGY, place, made_of):
            continue
        results.forget(spectra.ENERGY, place)
        stale.spectrum_fingerprints[spectra.ENERGY, model, member, row] = (content, made_of)
        of_row = stale.sources.setdefault(row, {})
        source = of_row.get((model, member), Source(model, member, (), rollout))
        of_row[model, member] = replace(source, spectrum=True)
    _forget_others(results, of_field, contents)
    if stale.spectrum_fingerprints:
        description = {"spectrum_version": spectra.VERSION, "scope": "none", "versions": versions()}
        record_specifications(group, {spectra.ENERGY: description})


# ---------------------------------------------------------------- ensembles


def _find_stale_ensembles(
    stale: Stale, names: Mapping[str, str], metrics: Mapping[str, Metric], settings: RolloutSettings
) -> None:
    """Find the models whose scores are out of date."""
    results, of_field = stale.scores, stale.reference
    assert results is not None
    group = store.get_group(results.root, results.key)
    described = has_specification(group)
    masked = settings.mask is not None
    members = _members(of_field) | {baseline: [""] for baseline in settings.baselines}
    contents = _contents_of_ensembles(of_field)
    for row, sequence in enumerate(of_field.reference.names):
        for model, of_model in members.items():
            if (model, "", row) not in contents:
                continue  # without any rollout of this trajectory
            content = contents[model, "", row]
            place = results.axes.place(model, "", sequence)
            outdated = []
            for name in names:
                made_of: dict[str, Any] = {"content": content, "version": scores.VERSION, "masked": masked}
                if metric := metrics.get(name.removeprefix(scores.ENERGY)):
                    made_of |= _made_of(content, stale.requests[metric.name], metric)
                if described.get(name) and results.is_fresh(name, place, _hashed(made_of)):
                    continue
                results.forget(name, place)
                outdated.append(name)
                stale.score_fingerprints[name, model, "", row] = (content, _hashed(made_of))
            if outdated:
                ensemble = Ensemble(model, tuple(of_model), tuple(outdated), masked)
                stale.ensembles.setdefault(row, {})[model] = ensemble
    _forget_others(results, of_field, contents)
    record_specifications(
        group,
        {
            name: _specification_of_score(name, metrics, stale.requests, settings)
            for name in {score for score, *_ in stale.score_fingerprints}
        },
    )


def _specification_of_score(
    name: str, metrics: Mapping[str, Metric], requests: Mapping[str, ScopedRequest], settings: RolloutSettings
) -> dict[str, Any]:
    version = {"score": name, "score_version": scores.VERSION}
    metric = metrics.get(name.removeprefix(scores.ENERGY))
    if metric is not None:
        return _specification(metric, requests[metric.name], settings, **version)
    return version | {"mask": settings.mask, "scope": "none", "versions": versions()}
