"""frames.zarr → distances.zarr: every out-of-date block of every metric, on Dask.

Here is what the driver does: choose the metrics, find the blocks that are out of date
(:mod:`pipeline.blocks`), and hand one task per block to the workers (:mod:`pipeline.compute`).
"""

from __future__ import annotations

import datetime
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lsim.metric import Metric
from lsim.preprocess import Preprocessing, Scope
from pipeline import schema, store
from pipeline.address import absolute, relative
from pipeline.blocks import describe, drop_vanished, invalidate, lay_out, stale_blocks
from pipeline.choice import Settings, choose_metrics
from pipeline.cluster import Cluster
from pipeline.compute import BlockResult, BlockTask, compute_block, write_provenance
from pipeline.fields import checked_fields
from pipeline.profiles import Profile
from pipeline.resident import MetricRequest, check_own_metrics, prewarm
from pipeline.scopes import dataset_range
from pipeline.submission import run_bounded
from pipeline.versions import versions

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (blocks done, blocks in all)."""


@dataclass(frozen=True)
class Failure:
    """A sequence for which a metric gave no distances, or not all, and why."""

    dataset: str
    field: str
    sequence: str
    metric: str
    reason: str


@dataclass
class DistancesReport:
    """What a run of :func:`compute_distances` did.

    Attributes
    ----------
    computed, up_to_date : int
        Matrices, one per sequence and metric.
    blocks : int
        Blocks that were computed.
    failures : list of Failure
        All matrices of the store that are not there or have rows of NaN, whenever they were computed.
    unavailable : dict of str to str
        Metrics left out of ``"all"``, each with the reason and, where there is one, the remedy.
    symmetrised : list of str
        Metrics that aren't symmetric: the store has ½ (d(a, b) + d(b, a)) of them.
    seconds : float
    cluster : dict
        The cluster that was used; empty where nothing was to be done.
    """

    computed: int = 0
    up_to_date: int = 0
    blocks: int = 0
    failures: list[Failure] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    symmetrised: list[str] = field(default_factory=list)
    seconds: float = 0.0
    cluster: dict[str, Any] = field(default_factory=dict)


@dataclass
class Totals:
    """:class:`BlockResult` summed over a run; precision by field and metric."""

    seconds_by_stage: Counter[str] = field(default_factory=Counter)
    seconds_by_metric: Counter[str] = field(default_factory=Counter)
    precision: dict[str, dict[str, Any]] = field(default_factory=dict)
    devices: set[str] = field(default_factory=set)

    def add(self, key: str, result: BlockResult) -> None:
        self.seconds_by_stage.update(result.seconds_by_stage)
        self.seconds_by_metric.update(result.seconds_by_metric)
        self.devices.add(result.device)
        here = self.precision.setdefault(key, {})
        for metric, found in result.precision.items():
            here[metric] = here[metric] + found if metric in here else found


def compute_distances(
    frames: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    cluster: Cluster | None = None,
    progress: Progress | None = None,
) -> DistancesReport:
    """Bring ``distances.zarr`` up to date with ``frames.zarr``.

    Parameters
    ----------
    frames : path or address
        A store that :func:`pipeline.convert.convert` made.
    out : path or address
        Created when absent; otherwise only what is out of date is computed.
    settings : Settings, optional
    cluster : Cluster, optional
        Started only if there is something to do. Default: one worker process per core.
    progress : callable, optional

    Returns
    -------
    DistancesReport
        With failures rather than an exception where single sequences could not be compared.

    Raises
    ------
    ValueError, lsim.UnknownMetricError, lsim.WeightsError
        For metrics that :func:`choose_metrics` refuses; before any computing.
    pipeline.store.StoreError
        When ``frames`` is no store.
    """
    if cluster is None:
        with Cluster(Profile()) as own:
            return compute_distances(frames, out, settings, cluster=own, progress=progress)
    settings = settings or Settings()
    began = time.perf_counter()
    # Workers may run in another folder.
    frames_path, out_path = absolute(frames), absolute(out)
    chosen = choose_metrics(settings)
    metrics, requests = chosen.metrics, chosen.requests
    source = store.open_store(frames_path)
    keys = checked_fields(source, frames_path)
    report = DistancesReport(unavailable=chosen.unavailable, symmetrised=_symmetrised(metrics))
    totals = Totals()
    with store.locked(out_path):
        root = store.open_output(out_path, schema.DISTANCES_STORE)
        store.drop_consolidated(out_path)
        drop_vanished(root, keys)
        tasks: list[BlockTask] = []
        for key in keys:
            tasks += _stale_tasks(
                key, source, root, frames_path, out_path, metrics, requests, settings, cluster, report
            )
        made_by = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "pairs": settings.pairs,
            "scope": settings.scope,
            "compat": settings.compat,
            "mask": settings.mask,
            "versions": versions(),
        }
        try:
            _run(tasks, list(requests.values()), cluster, root, progress, report, totals)
        finally:
            # Also of a run that is interrupted: what it computed stays, and says what made it.
            report.seconds = time.perf_counter() - began
            report.cluster = cluster.describe() if tasks else {}
            runs: list[Any] = list(root.attrs.get("runs", []))  # type: ignore[arg-type]
            if report.blocks:
                counts = {"blocks": report.blocks, "matrices": report.computed}
                spent = {
                    "seconds": round(report.seconds, 3),
                    "seconds_by_stage": _rounded(totals.seconds_by_stage),
                    "seconds_by_metric": _rounded(totals.seconds_by_metric),
                }
                runs.append(made_by | counts | spent | report.cluster)
                _record_precision(root, totals)
            carried = ("catalog", "title", "datasets", "pools")
            store.set_attributes(
                root,
                {name: source.attrs[name] for name in carried if name in source.attrs}
                | {
                    "frames": relative(frames_path, out_path),
                    "unavailable": report.unavailable,
                    "runs": runs,
                },
            )
            store.consolidate(out_path)
    report.failures = list_failures(out_path)
    return report


def _symmetrised(metrics: Sequence[Metric]) -> list[str]:
    return [metric.name for metric in metrics if metric.specification().get("symmetrised")]


def list_failures(out: str | os.PathLike[str]) -> list[Failure]:
    """All failures that a ``distances.zarr`` records."""
    root = store.open_store(out)
    found = []
    for key in store.field_keys(root, schema.PARAMETER):
        dataset, field_name = key.split("/")
        group = store.get_group(root, key)
        provenance = store.get_group(group, schema.PROVENANCE)
        sequences = store.read(store.get_array(group, schema.SEQUENCE))
        names = store.read(store.get_array(provenance, schema.METRIC))
        reasons = store.read(store.get_array(provenance, schema.FAILURE))
        found += [
            Failure(dataset, field_name, str(sequences[row]), str(names[index]), str(reasons[index, row]))
            for index, row in np.argwhere(reasons != "")
        ]
    return found


# ---------------------------------------------------------------- on the driver


def _stale_tasks(
    key: str,
    source: store.Group,
    root: store.Group,
    frames: str,
    out: str,
    metrics: Sequence[Metric],
    requests: Mapping[str, MetricRequest],
    settings: Settings,
    cluster: Cluster,
    report: DistancesReport,
) -> list[BlockTask]:
    """Bring a field's group into shape, declare what is out of date, and give the tasks that mend it."""
    origin = store.get_group(source, key)
    contents = [str(content) for content in store.read(store.get_array(origin, schema.CONTENT))]
    units = {metric.name: metric.info.units for metric in metrics}
    group = lay_out(root, origin, key, units, settings.block)
    dataset = key.split("/")[0]
    store.set_attributes(store.get_group(root, dataset), dict(store.get_group(source, dataset).attrs))
    provenance = store.get_group(group, schema.PROVENANCE)
    rows = [(key, row, content) for row, content in enumerate(contents)]
    scopes: dict[bool, Scope] = {
        masked: dataset_range(
            cluster,
            frames,
            rows,
            provenance,
            Preprocessing(settings.size, settings.order, settings.compat, masked),
        )
        if settings.scope == "dataset"
        else settings.scope
        for masked in {metric.preprocessing.mask for metric in metrics}
    }
    hashes = {metric.name: metric.specification_hash for metric in metrics}
    scope_of = {metric.name: scopes[metric.preprocessing.mask] for metric in metrics}
    blocks, fresh = stale_blocks(group, contents, hashes, scope_of, settings.pairs)
    report.up_to_date += fresh
    invalidate(group, contents, blocks)
    stale = {name for block in blocks for name in block.rows}
    made_with = {"pairs": settings.pairs, "versions": versions()}
    describe(
        group,
        store.read(store.get_array(origin, schema.PARAMETER)),
        {
            metric.name: metric.specification() | {"scope": scope_of[metric.name]} | made_with
            for metric in metrics
            if metric.name in stale
        },
    )
    return [
        BlockTask(
            frames,
            out,
            key,
            block,
            tuple(requests[name] for name in block.rows),
            scopes,
            settings.pairs,
            masking=settings.mask is not None,
        )
        for block in blocks
    ]


def _run(
    tasks: list[BlockTask],
    requests: list[MetricRequest],
    cluster: Cluster,
    root: store.Group,
    progress: Progress | None,
    report: DistancesReport,
    totals: Totals,
) -> None:
    """Run the tasks. One that fails every time leaves its block to the next run, with the reason recorded."""
    if not tasks:
        return
    client = cluster.client
    if client is not None:
        check_own_metrics(client, requests)
        prewarm(client, requests)
    if progress is not None:
        progress(0, len(tasks))
    outcomes = run_bounded(client, compute_block, ((task,) for task in tasks))
    given_up = []
    for done, ((task,), result, error) in enumerate(outcomes, start=1):
        if error is None:
            report.computed += result.matrices
            report.blocks += 1
            totals.add(task.key, result)
        else:
            given_up.append((task, f"{type(error).__name__}: {error}"))
        if progress is not None:
            progress(done, len(tasks))
    # Now nobody else writes. Without a fingerprint these are computed again by the next run.
    for task, reason in given_up:
        group = store.get_group(root, task.key)
        failed = {name: dict.fromkeys(rows, reason) for name, rows in task.block.rows.items()}
        write_provenance(group, schema.FAILURE, task.block, failed)


def _record_precision(root: store.Group, totals: Totals) -> None:
    """Say in each field's provenance how its metrics kept their promise of precision in this run."""
    for key, by_metric in totals.precision.items():
        records = {}
        for name, precision in by_metric.items():
            found = asdict(precision)
            share = found["recomputed"] / max(found["pairs"], 1)
            records[name] = found | {"share_recomputed": share, "device": " + ".join(sorted(totals.devices))}
        if records:
            provenance = store.get_group(root, f"{key}/{schema.PROVENANCE}")
            known: Any = provenance.attrs.get("precision", {})
            store.set_attributes(provenance, {"precision": known | records})


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in seconds.items()}
