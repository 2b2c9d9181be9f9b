"""frames.zarr of a reference and of models → rollouts.zarr: how far rollouts are from their trajectories.

Rollouts are matched with trajectories by data set, field, name and time (:mod:`pipeline.rollouts.matching`).
Workers compare them (:mod:`pipeline.rollouts.compute`), a trajectory with several rollouts a task; the driver
writes what comes of it (:mod:`pipeline.rollouts.results`).
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipeline.metrics.fields import field_units
from pipeline.rollouts.compute import Block, BlockResult, RolloutResult, compute_block, give_up
from pipeline.rollouts.matching import Unmatched, match_fields
from pipeline.rollouts.results import FieldResults, read_results
from pipeline.rollouts.settings import BASELINES, RolloutSettings, choose_scoped
from pipeline.rollouts.spectra import REFERENCE
from pipeline.rollouts.stale import Place, Stale, find_stale
from pipeline.stage.results import open_results
from pipeline.stage.run import MetricWorkers, Progress, run_blocks
from pipeline.stage.stopwatch import rounded
from pipeline.storage import schema, store
from pipeline.storage.address import absolute, relative
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

__all__ = ["RolloutFailure", "RolloutSettings", "RolloutsReport", "compare", "list_rollout_failures"]


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
    equal : int
        Of the computed ones, those that equal their trajectory within rounding: their distances are 0.
    scored : int
        Models, times trajectories and scores, whose members were scored together.
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
    equal: int = 0
    scored: int = 0
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
        return {
            "blocks": self.blocks,
            "rollouts": self.computed,
            "scores": self.scored,
            "seconds_by_activity": seconds,
        }


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
        stale = [
            find_stale(results.root, of_field, scoped, settings, field_units(source, [key]), cluster)
            for key, of_field in matching.fields.items()
        ]
        attributes = {
            "reference": relative(reference_path, out_path),
            "tolerance": settings.tolerance,
            "models": {
                model: [relative(path, out_path) for _, path in members] for model, members in stores.items()
            },
            schema.UNMATCHED: [
                *(entry for entry in _earlier_unmatched(results.root) if entry["model"] not in stores),
                *(asdict(entry) for entry in matching.unmatched),
            ],
        }
        recorded = settings.model_dump(exclude={"weights", "options"}, exclude_defaults=True)
        with results.recorded(began, {"settings": recorded}, report.summarise, workers, attributes):
            _run(stale, workers, report, progress)
    report.up_to_date = sum(entry.fresh for entry in stale)
    report.seconds, report.cluster = time.perf_counter() - began, workers.description
    report.failures = list_rollout_failures(out_path)
    return report


def _earlier_unmatched(root: store.Group) -> list[Any]:
    """List what earlier runs could not compare."""
    listed: Any = root.attrs.get(schema.UNMATCHED, [])
    return list(listed)


def list_rollout_failures(out: str | os.PathLike[str]) -> list[RolloutFailure]:
    """List all rollouts with missing distances that a ``rollouts.zarr`` records, with the reasons."""
    root = store.open_store(out)
    failures = []
    for key in store.field_keys(root, schema.MODEL):
        dataset, name = key.split("/")
        groups = [key, *(f"{key}/{part}" for part in schema.PARTS_OF_ROLLOUTS)]
        for results in (read_results(root, of_group) for of_group in groups if of_group in root):
            for metric, place, labels in results.each():
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
        if not model or "/" in model or model in (*BASELINES, REFERENCE):
            reserved_names = " or ".join((*BASELINES, REFERENCE))
            raise ValueError(f"a model needs a name, without '/' and not {reserved_names}; got {model!r}")
        listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        members = [""] if len(listed) == 1 else [str(number) for number in range(len(listed))]
        stores[model] = list(zip(members, map(absolute, listed), strict=True))
    return stores


# ---------------------------------------------------------------- running


def _run(
    stale: Sequence[Stale], workers: MetricWorkers, report: RolloutsReport, progress: Progress | None
) -> None:
    """Compare all rollouts that are out of date."""
    count = sum(1 for entry in stale for _ in entry.blocks())
    if not count:
        return
    client = workers.start()
    by_key = {entry.results.key: entry for entry in stale}
    batches = ((block,) for entry in stale for block in entry.blocks())
    try:
        with run_blocks(client, compute_block, batches, count, progress) as outcomes:
            for (block,), result, reason in outcomes:
                report.blocks += 1
                of_block = result if result is not None else give_up(block, reason)
                report.seconds_by_activity.update(of_block.seconds)
                _put_block(by_key[block.key], block, of_block, report)
    finally:
        for entry in stale:
            for results in (entry.results, entry.scores, entry.spectra):
                if results is not None:
                    results.flush()


def _put_block(entry: Stale, block: Block, result: BlockResult, report: RolloutsReport) -> None:
    """Put what came of a block in the results."""
    for rollout in result.rollouts:
        report.equal += len(rollout.equal)
        report.computed += _put(entry.results, entry.fingerprints, block, rollout)
    if result.ensemble is not None and entry.scores is not None:
        report.scored += _put(entry.scores, entry.score_fingerprints, block, result.ensemble)
    for rollout in result.spectra:
        assert entry.spectra is not None
        _put(entry.spectra, entry.spectrum_fingerprints, block, rollout)


def _put(
    results: FieldResults,
    fingerprints: Mapping[Place, tuple[str, str]],
    block: Block,
    rollout: RolloutResult,
) -> int:
    """Put the distances of a rollout in the results; return the number of metrics that are done."""
    place = results.axes.place(rollout.model, rollout.member, block.sequence)
    names = {*rollout.distances, *rollout.reasons}
    for name in sorted(names):
        finished = name not in rollout.unfinished
        values = rollout.distances.get(name)
        content, made_of = fingerprints[name, rollout.model, rollout.member, block.row]
        expected = results.distances[name][place]
        if values is None or values.shape != expected.shape:
            values = np.full_like(expected, np.nan)
        texts = {schema.FAILURE: rollout.reasons.get(name, ""), schema.CONTENT: content}
        texts[schema.FINGERPRINT] = made_of if finished else ""
        results.put(name, place, values, texts)
    return len(names - rollout.unfinished)
