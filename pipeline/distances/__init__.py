"""frames.zarr → distances.zarr: compute every out-of-date block of every metric, on Dask.

The stage lays out the store, lists the blocks that are out of date (:mod:`pipeline.distances.blocks`), and
hands them to workers (:mod:`pipeline.distances.compute`), as many to a task as take a second or so
(:mod:`pipeline.distances.sizing`). Tasks are made when they are submitted.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from lsim.error_bounds import PairPrecision
from lsim.metric import Metric
from lsim.preprocess import Preprocessing, Scope
from pipeline.distances.blocks import (
    ROW_TEXTS,
    Block,
    FieldBlocks,
    FieldMetric,
    StaleRows,
    block_length,
    drop_other_frames,
    failure_of,
    find_stale,
    forget_metrics,
    lay_out,
    write_parameter,
)
from pipeline.distances.compute import BlockResult, compute_blocks, seconds_per_sequence
from pipeline.distances.sizing import BlockSize, Pace, block_size
from pipeline.metrics.fields import checked_fields, field_units
from pipeline.metrics.pixel_weights import FieldMetrics, metrics_by_field, weighted_otherwise
from pipeline.metrics.resolution import Unresolved, list_unresolved, record_resolution
from pipeline.metrics.settings import Settings, choose_metrics, is_directed
from pipeline.metrics.value_range import dataset_range
from pipeline.stage.bounded_map import run_bounded
from pipeline.stage.provenance import (
    add_precision,
    record_precision,
    record_specifications,
    specification_of,
)
from pipeline.stage.results import open_results
from pipeline.stage.row_records import RowRecords
from pipeline.stage.run import MetricWorkers, Progress, run_blocks
from pipeline.stage.stopwatch import rounded
from pipeline.storage import schema, store
from pipeline.storage.address import absolute, relative
from pipeline.storage.digests import identify_rows
from pipeline.storage.recorded import failures_of_rows
from pipeline.storage.run_records import carried
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile
from pipeline.workers.worker_metrics import MetricRequest

WORTH_MEASURING = 16
"""Sequences of a new field from which on one is timed to choose its blocks; fewer have one each."""


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
    """Summary of a run of :func:`compute_distances`.

    Attributes
    ----------
    computed, up_to_date : int
        Matrices, one per sequence and metric.
    blocks : int
        Blocks that were computed.
    failures : list of Failure
        All matrices of the store that are not there or have rows of NaN, whenever they were computed.
    unresolved : list of Unresolved
        Metrics with distances of the store that rounding may have changed by more than 0.1 %.
    unavailable : dict of str to str
        Metrics left out of ``"all"``, each with the reason and, where there is one, the remedy.
    symmetrised : list of str
        Metrics that aren't symmetric: the store has ½ (d(a, b) + d(b, a)) of them.
    weighted : list of str
        Metrics whose means are weighted by each field's weights of pixels.
    seconds : float
    cluster : dict
        The cluster that was used; empty where nothing was to be done.
    sizes : dict of str to BlockSize
        By field, the blocks of those that are new in this run.
    unrecorded : int
        Matrices that were computed again as their record was not the one that was written with them: it was
        damaged, or was made before records had digests.
    seconds_by_stage, seconds_by_metric : Counter
        Summed over all blocks, see :class:`~pipeline.distances.compute.BlockResult`.
    precision : dict
        By field and metric, how sums over pairs of this run kept their promise of precision.
    devices : set of str
        Kinds of devices that computed.
    """

    computed: int = 0
    up_to_date: int = 0
    blocks: int = 0
    failures: list[Failure] = field(default_factory=list)
    unresolved: list[Unresolved] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    symmetrised: list[str] = field(default_factory=list)
    weighted: list[str] = field(default_factory=list)
    seconds: float = 0.0
    cluster: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, BlockSize] = field(default_factory=dict)
    unrecorded: int = 0
    seconds_by_stage: Counter[str] = field(default_factory=Counter)
    seconds_by_metric: Counter[str] = field(default_factory=Counter)
    precision: dict[str, dict[str, PairPrecision]] = field(default_factory=dict)
    devices: set[str] = field(default_factory=set)

    def add(self, blocks: Sequence[Block], result: BlockResult) -> None:
        """Add the result of some blocks of a field."""
        self.blocks += len(blocks)
        self.computed += result.matrices
        self.seconds_by_stage.update(result.seconds_by_stage)
        self.seconds_by_metric.update(result.seconds_by_metric)
        self.devices.add(result.device)
        add_precision(self.precision.setdefault(blocks[0].field.key, {}), result.precision)

    def summarise(self, root: store.Group) -> dict[str, Any]:
        """Record precision and resolution in the groups of a store; return what the run did."""
        if not self.blocks:
            return {}
        device = " + ".join(sorted(self.devices))
        precision = {
            key: {name: _describe_precision(record, device) for name, record in by_metric.items()}
            for key, by_metric in self.precision.items()
        }
        record_precision(root, precision)
        record_resolution(root)
        return {
            "blocks": self.blocks,
            "matrices": self.computed,
            "seconds_by_stage": rounded(self.seconds_by_stage),
            "seconds_by_metric": rounded(self.seconds_by_metric),
            "new_blocks": {key: asdict(size) for key, size in self.sizes.items()},
        }


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
        For metrics that :func:`choose_metrics` refuses, and fields without the weights of pixels that are
        asked for; before any computing.
    pipeline.storage.store.StoreError
        When ``frames`` is no store.
    """
    if cluster is None:
        with Cluster(Profile()) as local_cluster:
            return compute_distances(frames, out, settings, cluster=local_cluster, progress=progress)
    settings = settings or Settings()
    start = time.perf_counter()
    # Workers may run in another folder.
    frames_path, out_path = absolute(frames), absolute(out)
    choice = choose_metrics(settings)
    source = store.open_store(frames_path)
    keys = checked_fields(source, frames_path)
    choice, by_field = metrics_by_field(choice, source, frames_path, keys, weighted=settings.pixel_weights)
    workers = MetricWorkers(cluster, choice.requests.values())
    report = DistancesReport(
        unavailable=choice.unavailable,
        symmetrised=[metric.name for metric in choice.metrics if metric.specification().get("symmetrised")],
        weighted=[metric.name for metric in choice.metrics if settings.pixel_weights],
    )
    with open_results(out_path, schema.DISTANCES_STORE, schema.PARAMETER, source) as results:
        stale = []
        for key in keys:
            plan = _read_field(source, key, by_field[key], (frames_path, out_path), choice.requests, settings)
            drop_other_frames(results.root, key, plan.frames)
            length = block_length(results.root, key) or settings.block
            if length is None:
                # The field is new: a sequence is timed on a worker.
                report.sizes[key] = _measure_block_size(plan, workers)
                length = report.sizes[key].sequences
            group = _lay_out(results.root, source, plan, settings.scope, length)
            # With the scope "dataset", workers read the frames whose range isn't recorded yet.
            scopes = _find_scopes(group, plan, settings, cluster)
            stale.append(_list_stale(group, plan, scopes, results.run, length))
            _record_settings(group, plan, scopes, stale[-1].metrics)
        recorded_settings = settings.model_dump(include={"pairs", "scope", "compat", "mask", "pixel_weights"})
        attributes = carried(source) | {
            "frames": relative(frames_path, out_path),
            "unavailable": choice.unavailable,
        }
        with results.recorded(start, recorded_settings, report.summarise, workers, attributes):
            _run(stale, workers, results.root, report, progress)
    report.up_to_date = sum(rows.fresh for rows in stale)
    report.unrecorded = sum(rows.damaged for rows in stale)
    report.seconds, report.cluster = time.perf_counter() - start, workers.description
    report.failures = list_failures(out_path)
    report.unresolved = list_unresolved(store.open_store(out_path))
    return report


def list_failures(out: str | os.PathLike[str]) -> list[Failure]:
    """List all failures that a ``distances.zarr`` records, each compared with the digest of its record.

    A matrix whose record is damaged is a failure by itself.
    """
    root = store.open_store(out)
    failures = []
    for key in store.field_keys(root, schema.PARAMETER):
        dataset, field_name = key.split("/")
        failures += [Failure(dataset, field_name, *failure) for failure in failures_of_rows(root, key)]
    return failures


# ---------------------------------------------------------------- steps of a field


@dataclass(frozen=True)
class _Field:
    """A field of the frames and the metrics that its sequences are compared under.

    ``blocks`` has neither final scopes nor the places of metrics in provenance yet.
    """

    origin: store.Group
    frames: int
    contents: list[str]
    parameter: np.ndarray
    metrics: list[Metric]
    blocks: FieldBlocks

    @property
    def key(self) -> str:
        """Path of the field in the store, ``<dataset>/<field>``."""
        return self.blocks.key


def _read_field(
    source: store.Group,
    key: str,
    of_field: FieldMetrics,
    paths: tuple[str, str],
    requests: Mapping[str, MetricRequest],
    settings: Settings,
) -> _Field:
    """Read what the frames' store says of a field; ``paths`` are those of frames and results."""
    origin = store.get_group(source, key)
    # The range of a data set isn't known yet. Any other takes as long to compute with.
    scope: Scope = "pair" if settings.scope == "pair" else "sequence"
    blocks = FieldBlocks(
        *paths,
        key,
        {
            metric.name: FieldMetric(requests[metric.name], metric.specification_hash, scope)
            for metric in of_field.metrics
        },
        settings.pairs,
        masking=settings.mask is not None,
        weights=of_field.weights,
    )
    return _Field(
        origin,
        store.get_array(origin, schema.FRAMES).shape[1],
        [str(content) for content in store.read(store.get_array(origin, schema.CONTENT))],
        store.read(store.get_array(origin, schema.PARAMETER)),
        of_field.metrics,
        blocks,
    )


def _measure_block_size(plan: _Field, workers: MetricWorkers) -> BlockSize:
    """Choose the blocks of a new field from what one of its sequences takes on a worker."""
    count = len(plan.contents)
    if count < WORTH_MEASURING:
        return BlockSize(1)
    # Another sequence is tried where one is damaged or can't be computed.
    for row in dict.fromkeys((0, count // 2, count - 1)):
        rows = dict.fromkeys(plan.blocks.metrics, (row,))
        block = Block(plan.blocks, row, (plan.contents[row],), (b"",), rows)
        ((_, seconds, error),) = run_bounded(workers.start(), seconds_per_sequence, [(block,)])
        if error is None:
            return block_size(max(seconds, 1e-6), count, workers.threads, plan.frames)
    # The reason is reported where these sequences are computed.
    return BlockSize(1)


def _lay_out(root: store.Group, source: store.Group, plan: _Field, scope: Scope, length: int) -> store.Group:
    """Bring a field's group into shape, with the units of each metric and the attributes of the data set."""
    units = field_units(source, [plan.key])
    metrics = {metric.name: metric.units(scope, units) for metric in plan.metrics}
    group = lay_out(root, plan.origin, plan.key, metrics, length)
    for metric in plan.metrics:
        store.set_directed(store.get_array(group, metric.name), is_directed(metric))
    dataset = plan.key.split("/")[0]
    store.set_attributes(store.get_group(root, dataset), dict(store.get_group(source, dataset).attrs))
    return group


def _find_scopes(group: store.Group, plan: _Field, settings: Settings, cluster: Cluster) -> dict[str, Scope]:
    """Find the scope of each metric; ranges of a data set are computed where they aren't recorded."""
    if settings.scope != "dataset":
        return {metric.name: settings.scope for metric in plan.metrics}
    provenance = store.get_group(group, schema.PROVENANCE)
    sequences = [(plan.key, row, content) for row, content in enumerate(plan.contents)]
    # Where single pixels are missing, frames have another range with a mask than without.
    ranges = {
        masked: dataset_range(
            cluster,
            plan.blocks.frames,
            sequences,
            provenance,
            Preprocessing(settings.size, settings.order, settings.compat, masked),
        )
        for masked in {metric.preprocessing.mask for metric in plan.metrics}
    }
    return {metric.name: ranges[metric.preprocessing.mask] for metric in plan.metrics}


def _list_stale(
    group: store.Group, plan: _Field, scopes: Mapping[str, Scope], run: str, length: int
) -> StaleRows:
    """List the rows that are out of date, in blocks of ``length``; they have no fingerprint any more."""
    metrics = {name: replace(metric, scope=scopes[name]) for name, metric in plan.blocks.metrics.items()}
    forget_metrics(group, set(weighted_otherwise(group, plan.origin)) - metrics.keys())
    identities = identify_rows(store.read(store.get_array(plan.origin, schema.SEQUENCE)), plan.parameter)
    blocks = replace(plan.blocks, metrics=metrics, run=run)
    return find_stale(group, blocks, plan.contents, identities, length)


def _record_settings(
    group: store.Group, plan: _Field, scopes: Mapping[str, Scope], stale: Sequence[str]
) -> None:
    """Record the parameter of the frames, and the specification of the metrics that are stale."""
    write_parameter(group, plan.parameter)
    record_specifications(
        group,
        {
            metric.name: specification_of(
                metric, scopes[metric.name], is_directed(metric), pairs=plan.blocks.pairs
            )
            for metric in plan.metrics
            if metric.name in stale
        },
    )


# ---------------------------------------------------------------- running


def _batches(stale: Sequence[StaleRows], pace: Pace) -> Iterator[tuple[Block, ...]]:
    """Make batches as they are asked for; blocks that are quick go together."""
    for rows in stale:
        blocks, remaining = rows.blocks(), len(rows.starts)
        while batch := tuple(itertools.islice(blocks, pace.blocks_per_task(rows.field.key, remaining))):
            remaining -= len(batch)
            yield batch


def _run(
    stale: Sequence[StaleRows],
    workers: MetricWorkers,
    root: store.Group,
    report: DistancesReport,
    progress: Progress | None,
) -> None:
    """Compute all stale blocks. One that fails every time is left to the next run, its reason recorded."""
    count = sum(len(rows.starts) for rows in stale)
    if not count:
        return
    client = workers.start()
    pace = Pace(workers.threads)
    with (
        RowRecords(root, ROW_TEXTS) as records,
        run_blocks(client, compute_blocks, _batches(stale, pace), count, progress) as outcomes,
    ):
        for batch, result, reason in outcomes:
            key = batch[0].field.key
            if result is None:
                records.add(key, failure_of(batch[0], reason))
            else:
                records.add(key, result.records)
                report.add(batch, result)
                pace.note(key, len(batch), sum(result.seconds_by_stage.values()))


def _describe_precision(record: PairPrecision, device: str) -> dict[str, Any]:
    counts = asdict(record)
    return counts | {"share_recomputed": counts["recomputed"] / max(counts["pairs"], 1), "device": device}
