"""frames.zarr of a reference and of models → rollouts.zarr: how far rollouts are from their trajectories.

Rollouts are matched with trajectories by data set, field, name and time (:mod:`pipeline.rollouts.matching`).
Workers compare them (:mod:`pipeline.rollouts.compute`), a trajectory with several rollouts a task; the driver
writes what comes of it (:mod:`pipeline.rollouts.results`).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lsim.preprocess import scope_identity
from pipeline.metrics.fields import field_units
from pipeline.metrics.value_range import dataset_range
from pipeline.rollouts.compute import (
    Block,
    BlockResult,
    RolloutResult,
    ScopedRequest,
    Source,
    compute_block,
    split_sources,
)
from pipeline.rollouts.matching import FieldRollouts, Rollout, Unmatched, match_fields
from pipeline.rollouts.results import FieldResults, read_results
from pipeline.rollouts.settings import BASELINES, RolloutSettings, ScopedMetrics, choose_scoped
from pipeline.stage.provenance import has_specification, record_specifications, specification_of
from pipeline.stage.results import open_results
from pipeline.stage.run import MetricWorkers, Progress, run_blocks
from pipeline.stage.stopwatch import rounded
from pipeline.storage import schema, store
from pipeline.storage.address import absolute, relative
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

__all__ = ["RolloutFailure", "RolloutSettings", "RolloutsReport", "compare", "list_rollout_failures"]

SOURCES_TOGETHER = 8
"""Rollouts that a task compares with their trajectory: few enough that several workers share those of one."""


@dataclass(frozen=True)
class RolloutFailure:
    """A rollout for which a metric gave no distances, or not all, and why."""

    dataset: str
    field: str
    model: str
    member: str
    sequence: str
    metric: str
    reason: str


@dataclass
class RolloutsReport:
    """Summary of a run of :func:`compare`.

    Attributes
    ----------
    computed, up_to_date : int
        Rollouts, times metrics.
    blocks : int
        Tasks that ran.
    failures : list of RolloutFailure
        All rollouts of the store with missing distances, whenever they were computed.
    unmatched : list of Unmatched
        What could not be compared: no partner by name, field, shape or time, and quarantined sequences.
    seconds : float
    seconds_by_activity : Counter
    cluster : dict
    """

    computed: int = 0
    up_to_date: int = 0
    blocks: int = 0
    failures: list[RolloutFailure] = field(default_factory=list)
    unmatched: list[Unmatched] = field(default_factory=list)
    seconds: float = 0.0
    seconds_by_activity: Counter[str] = field(default_factory=Counter)
    cluster: dict[str, Any] = field(default_factory=dict)

    def summarise(self, root: store.Group) -> dict[str, Any]:
        """Return what the run did, for its record."""
        if not self.blocks:
            return {}
        seconds = rounded(self.seconds_by_activity)
        return {"blocks": self.blocks, "rollouts": self.computed, "seconds_by_activity": seconds}


def compare(
    reference: str | os.PathLike[str],
    models: Mapping[str, str | os.PathLike[str] | Sequence[str | os.PathLike[str]]],
    out: str | os.PathLike[str],
    settings: RolloutSettings | None = None,
    *,
    cluster: Cluster | None = None,
    progress: Progress | None = None,
) -> RolloutsReport:
    """Bring ``rollouts.zarr`` up to date with a reference and the rollouts of models.

    Parameters
    ----------
    reference : path or address
        A ``frames.zarr`` with the trajectories to compare with.
    models : mapping of str to path, or to a list of paths
        By model its ``frames.zarr``; of several, each holds one member: a training run, or a sample. In one
        store members are told by names such as ``run0/<sequence>``.
    out : path or address
        Created when absent; otherwise only what is out of date is computed. Models that it has already stay.
    settings : RolloutSettings, optional
    cluster : Cluster, optional
        Started only if there is something to do. Default: one worker process per core.
    progress : callable, optional

    Returns
    -------
    RolloutsReport
        With what could not be compared, rather than an exception.

    Raises
    ------
    ValueError, lsim.UnknownMetricError, lsim.WeightsError
        For metrics and settings that are refused, before anything is computed.
    pipeline.storage.store.StoreError
        For a path without a store of frames, or a model with no field in common with the reference.
    """
    if cluster is None:
        with Cluster(Profile()) as own:
            return compare(reference, models, out, settings, cluster=own, progress=progress)
    settings = settings or RolloutSettings()
    began = time.perf_counter()
    reference_path, out_path = absolute(reference), absolute(out)
    stores = _stores_of(models)
    scoped = choose_scoped(settings)
    matching = match_fields(reference_path, stores, settings.tolerance)
    source = store.open_store(reference_path)
    workers = MetricWorkers(cluster, scoped.chosen.requests.values())
    report = RolloutsReport(unmatched=matching.unmatched)
    with open_results(out_path, schema.ROLLOUTS_STORE, schema.MODEL, source) as results:
        stale: list[_Stale] = []
        for key, of_field in matching.fields.items():
            units = field_units(source, [key])
            names = {
                metric.name: metric.units(_library_scope(scoped.scopes[metric.name]), units)
                for metric in scoped.chosen.metrics
            }
            field_results = FieldResults.open(results.root, of_field, names, settings.baselines)
            requests = _scoped_requests(of_field, field_results, scoped, cluster)
            stale.append(_find_stale(of_field, field_results, requests, scoped, settings))
        attributes = {
            "reference": relative(reference_path, out_path),
            "models": {
                model: [relative(path, out_path) for _, path in members] for model, members in stores.items()
            },
            schema.UNMATCHED: [asdict(entry) for entry in matching.unmatched],
        }
        recorded = settings.model_dump(exclude={"weights", "options"}, exclude_defaults=True)
        with results.recorded(began, {"settings": recorded}, report.summarise, workers, attributes):
            _run(stale, workers, report, progress)
    report.up_to_date = sum(entry.fresh for entry in stale)
    report.seconds, report.cluster = time.perf_counter() - began, workers.description
    report.failures = list_rollout_failures(out_path)
    return report


def list_rollout_failures(out: str | os.PathLike[str]) -> list[RolloutFailure]:
    """List all rollouts with missing distances that a ``rollouts.zarr`` records, with the reasons."""
    root = store.open_store(out)
    failures = []
    for key in store.field_keys(root, schema.MODEL):
        dataset, name = key.split("/")
        results = read_results(root, key)
        for metric, place, labels in _each(results):
            reason = str(results.texts[metric][schema.FAILURE][place])
            if reason or results.texts[metric][schema.DIGEST][place]:
                if not results.is_bound(metric, place):
                    reason = "the record or the distances are not those that were written together"
                if reason:
                    failures.append(RolloutFailure(dataset, name, *labels, metric, reason))
    return failures


# ---------------------------------------------------------------- planning


def _stores_of(models: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """List the stores of each model with the member that each is of."""
    stores = {}
    for model, paths in models.items():
        if not model or "/" in model or model in BASELINES:
            raise ValueError(
                f"a model needs a name, without '/' and not {' or '.join(BASELINES)}; got {model!r}"
            )
        listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        members = [""] if len(listed) == 1 else [str(number) for number in range(len(listed))]
        stores[model] = list(zip(members, map(absolute, listed), strict=True))
    return stores


def _library_scope(scope: Any) -> Any:
    """Name the scope for a metric's units: all others than none lose them."""
    return "none" if scope == "none" else "sequence"


@dataclass(frozen=True)
class _Stale:
    """Rollouts of a field that are out of date, by row of their trajectory."""

    results: FieldResults
    reference: FieldRollouts
    requests: Mapping[str, ScopedRequest]
    sources: Mapping[int, list[Source]]
    fingerprints: Mapping[tuple[str, str, str, int], tuple[str, str]]
    fresh: int

    def blocks(self) -> Iterator[tuple[Block]]:
        """Make the blocks, one after the other."""
        trajectories = self.reference.reference
        for row, sources in self.sources.items():
            for part in split_sources(sources, SOURCES_TOGETHER):
                needed = {metric for source in part for metric in source.metrics}
                yield (
                    Block(
                        trajectories.path,
                        trajectories.key,
                        row,
                        trajectories.contents[row],
                        trajectories.names[row],
                        {name: self.requests[name] for name in self.requests if name in needed},
                        part,
                        tuple(trajectories.contents),
                    ),
                )

    @property
    def count(self) -> int:
        """Number of blocks."""
        return sum(-(-len(sources) // SOURCES_TOGETHER) for sources in self.sources.values())


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


def _find_stale(
    of_field: FieldRollouts,
    results: FieldResults,
    requests: Mapping[str, ScopedRequest],
    scoped: ScopedMetrics,
    settings: RolloutSettings,
) -> _Stale:
    """Find the rollouts that are out of date, delete their records, and describe the metrics."""
    trajectories = of_field.reference
    group = store.get_group(results.root, trajectories.key)
    described = has_specification(group)
    specifications = {
        metric.name: specification_of(
            metric, scope_identity(requests[metric.name].scope), directed=True, settings=_pairing(settings)
        )
        for metric in scoped.chosen.metrics
    }
    hashes = {metric.name: metric.specification_hash for metric in scoped.chosen.metrics}
    rollouts: list[tuple[str, str, int, Rollout | None]] = [
        (rollout.model, rollout.member, rollout.sequence, rollout) for rollout in of_field.rollouts
    ]
    rollouts += [
        (name, "", row, None) for name in settings.baselines for row in range(len(trajectories.names))
    ]
    sources: dict[int, list[Source]] = {}
    fingerprints: dict[tuple[str, str, str, int], tuple[str, str]] = {}
    fresh = 0
    for model, member, row, rollout in sorted(rollouts, key=lambda entry: (entry[2], entry[0], entry[1])):
        place = results.axes.place(model, member, trajectories.names[row])
        outdated = []
        for name, request in requests.items():
            content, made_of = _fingerprint(of_field, row, (model, rollout), request, hashes[name])
            recorded = str(results.texts[name][schema.FINGERPRINT][place])
            if recorded == made_of and described.get(name) and results.is_bound(name, place):
                fresh += 1
                continue
            results.forget(name, place)
            outdated.append(name)
            fingerprints[name, model, member, row] = (content, made_of)
        if outdated:
            sources.setdefault(row, []).append(Source(model, member, tuple(outdated), rollout))
    _forget_others(results, of_field, {(model, member, row) for model, member, row, _ in rollouts})
    results.flush()
    outdated_metrics = {name for name, *_ in fingerprints}
    record_specifications(
        group, {name: text for name, text in specifications.items() if name in outdated_metrics}
    )
    return _Stale(results, of_field, requests, sources, fingerprints, fresh)


def _pairing(settings: RolloutSettings) -> dict[str, Any]:
    return {"protocol": settings.protocol} if settings.protocol else {}


def _fingerprint(
    of_field: FieldRollouts,
    row: int,
    source: tuple[str, Rollout | None],
    request: ScopedRequest,
    specification_hash: str,
) -> tuple[str, str]:
    """Hash the contents of trajectory and rollout, and all that determines their distances."""
    reference, (model, rollout) = of_field.reference, source
    if rollout is not None:
        other: Any = [rollout.content, rollout.partners.tolist()]
    else:
        other = [model, reference.contents if model == "mean" else ""]
    content = f"{reference.contents[row]} {_hashed(other)}"
    scope = request.dataset_range if request.scope == "dataset" else scope_identity(request.scope)
    made_of = {"content": content, "specification": specification_hash, "scope": [request.scope, scope]}
    return content, _hashed(made_of)


def _hashed(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _forget_others(
    results: FieldResults, of_field: FieldRollouts, present: set[tuple[str, str, int]]
) -> None:
    """Forget rollouts that are gone, and those of other models whose trajectory has changed."""
    named = {model for model, _, _ in present}
    contents = of_field.reference.contents
    for metric, place, (model, member, sequence) in _each(results):
        row = results.axes.sequences.index(sequence)
        trajectory = str(results.texts[metric][schema.CONTENT][place]).partition(" ")[0]
        is_vanished = model in named and (model, member, row) not in present
        if is_vanished or (model not in named and trajectory not in ("", contents[row])):
            results.forget(metric, place)


def _each(results: FieldResults) -> Iterator[tuple[str, tuple[int, int, int], tuple[str, str, str]]]:
    """List metric, place, and names of model, member and sequence of all results of a field."""
    for metric in results.distances:
        for m, model in enumerate(results.axes.models):
            for k, member in enumerate(results.axes.members[model]):
                for s, sequence in enumerate(results.axes.sequences):
                    yield metric, (m, k, s), (model, member, sequence)


# ---------------------------------------------------------------- running


def _run(
    stale: Sequence[_Stale], workers: MetricWorkers, report: RolloutsReport, progress: Progress | None
) -> None:
    """Compare all rollouts that are out of date."""
    count = sum(entry.count for entry in stale)
    if not count:
        return
    client = workers.start()
    by_key = {entry.results.key: entry for entry in stale}
    batches = (batch for entry in stale for batch in entry.blocks())
    try:
        with run_blocks(client, compute_block, batches, count, progress) as outcomes:
            for (block,), result, reason in outcomes:
                report.blocks += 1
                of_block = result if result is not None else _given_up(block, reason)
                report.seconds_by_activity.update(of_block.seconds)
                for rollout in of_block.rollouts:
                    report.computed += _put(by_key[block.key], block, rollout)
    finally:
        for entry in stale:
            entry.results.flush()


def _given_up(block: Block, reason: str) -> BlockResult:
    """Make the results of a block that failed every time: the next run tries it again."""
    rollouts = [
        RolloutResult(
            source.model,
            source.member,
            reasons=dict.fromkeys(source.metrics, reason),
            unfinished={*source.metrics},
        )
        for source in block.sources
    ]
    return BlockResult(rollouts, Counter(), "")


def _put(entry: _Stale, block: Block, rollout: RolloutResult) -> int:
    """Put the distances of a rollout in the results; return the number of metrics that are done."""
    place = entry.results.axes.place(rollout.model, rollout.member, block.sequence)
    names = {*rollout.distances, *rollout.reasons}
    for name in sorted(names):
        finished = name not in rollout.unfinished
        values = rollout.distances.get(name)
        content, made_of = entry.fingerprints[name, rollout.model, rollout.member, block.row]
        frames = entry.results.distances[name].shape[-1]
        if values is None or len(values) != frames:
            values = entry.results.distances[name][place] * float("nan")
        texts = {schema.FAILURE: rollout.reasons.get(name, ""), schema.CONTENT: content}
        texts[schema.FINGERPRINT] = made_of if finished else ""
        entry.results.put(name, place, values, texts)
    return len(names - rollout.unfinished)
