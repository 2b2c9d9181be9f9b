"""frames.zarr → distances.zarr: every out-of-date block of every metric, on Dask.

Here is what the driver does: choose the metrics, find the blocks that are out of date
(:mod:`pipeline.distances.blocks`), and hand them to the workers (:mod:`pipeline.distances.compute`), as many
to a task as take a second or so (:mod:`pipeline.distances.sizing`). Tasks are made when they are submitted.
"""

from __future__ import annotations

import itertools
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

from distributed import Client

from lsim.metric import Metric
from lsim.preprocess import Preprocessing, Scope
from pipeline.distances.blocks import (
    StaleBlock,
    StaleRows,
    describe,
    digest_rows,
    find_stale,
    forget_metrics,
    lay_out,
)
from pipeline.distances.compute import (
    BlockResult,
    BlockTask,
    compute_blocks,
    seconds_per_sequence,
    write_provenance,
)
from pipeline.distances.sizing import BlockSize, Pace, block_size
from pipeline.metrics.fields import checked_fields, drop_vanished, field_units
from pipeline.metrics.pixel_weights import FieldMetrics, metrics_by_field, weighted_otherwise
from pipeline.metrics.resolution import Unresolved, list_unresolved, record_resolution
from pipeline.metrics.settings import Settings, choose_metrics, is_directed
from pipeline.metrics.value_range import dataset_range
from pipeline.stage.bounded_map import reason_of, run_bounded
from pipeline.storage import schema, store
from pipeline.storage.address import absolute, relative
from pipeline.storage.digests import identify_rows
from pipeline.storage.recorded import failures_of_rows, record_fingerprints
from pipeline.storage.run_records import begin_run, carried, record_run
from pipeline.storage.versions import versions
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile
from pipeline.workers.worker_metrics import MetricRequest, dismiss_unfit_workers, prewarm

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (blocks done, blocks in all)."""

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
    """What a run of :func:`compute_distances` did.

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
    copies : int
        Tasks that ran so long that a second copy was sent to another worker.
    unrecorded : int
        Matrices that were computed again as their record was not the one that was written with them: it was
        damaged, or was made before records had digests.
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
    copies: int = 0
    unrecorded: int = 0


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
        For metrics that :func:`choose_metrics` refuses, and fields without the weights of pixels that are
        asked for; before any computing.
    pipeline.storage.store.StoreError
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
    source = store.open_store(frames_path)
    keys = checked_fields(source, frames_path)
    chosen, by_field = metrics_by_field(chosen, source, frames_path, keys, weighted=settings.pixel_weights)
    report = DistancesReport(unavailable=chosen.unavailable, symmetrised=_symmetrised(chosen.metrics))
    report.weighted = [metric.name for metric in chosen.metrics if settings.pixel_weights]
    totals = Totals()
    workers = _Workers(cluster, list(chosen.requests.values()))
    run_name = uuid.uuid4().hex
    with store.locked(out_path):
        root = store.open_output(out_path, schema.DISTANCES_STORE)
        store.drop_consolidated(out_path)
        drop_vanished(root, schema.PARAMETER, source)
        made_by = begin_run(
            pairs=settings.pairs,
            scope=settings.scope,
            compat=settings.compat,
            mask=settings.mask,
            pixel_weights=settings.pixel_weights,
        )
        fields = [
            _bring_into_shape(
                _Field(key, frames_path, out_path, chosen.requests, by_field[key], settings, run_name),
                source,
                root,
                workers,
                report,
            )
            for key in keys
        ]
        try:
            _run(fields, workers, root, progress, report, totals)
        finally:
            # Also of a run that is interrupted: what it computed stays, and says what made it.
            report.seconds = time.perf_counter() - began
            report.cluster = workers.description
            run = None
            if report.blocks:
                counts = {"blocks": report.blocks, "matrices": report.computed, "copies": report.copies}
                spent = {
                    "seconds": round(report.seconds, 3),
                    "seconds_by_stage": _rounded(totals.seconds_by_stage),
                    "seconds_by_metric": _rounded(totals.seconds_by_metric),
                }
                sizes = {key: asdict(size) for key, size in report.sizes.items()}
                run = made_by | counts | spent | {"new_blocks": sizes} | report.cluster
                _record_precision(root, totals)
                record_resolution(root)
            about = {"frames": relative(frames_path, out_path), "unavailable": report.unavailable}
            record_fingerprints(root)
            record_run(root, run, **carried(source), **about)
            store.consolidate(out_path)
    report.failures = list_failures(out_path)
    report.unresolved = list_unresolved(store.open_store(out_path))
    return report


def _symmetrised(metrics: Sequence[Metric]) -> list[str]:
    return [metric.name for metric in metrics if metric.specification().get("symmetrised")]


def list_failures(out: str | os.PathLike[str]) -> list[Failure]:
    """List all failures that a ``distances.zarr`` records, each compared with the digest of its record.

    A matrix whose record is damaged is a failure by itself.
    """
    root = store.open_store(out)
    failures = []
    for key in store.field_keys(root, schema.PARAMETER):
        dataset, field_name = key.split("/")
        failures += [Failure(dataset, field_name, *of_row) for of_row in failures_of_rows(root, key)]
    return failures


# ---------------------------------------------------------------- on the driver


class _Workers:
    """The cluster, once there is something to do: its workers have the metrics, or say why not."""

    def __init__(self, cluster: Cluster, requests: list[MetricRequest]) -> None:
        self.cluster = cluster
        self.requests = requests
        self.description: dict[str, Any] = {}
        self.threads = 1

    def client(self) -> Client | None:
        """The client; asked for the first time, it starts the workers and has them load the metrics."""
        client = self.cluster.client
        if not self.description:
            if client is not None:
                dismiss_unfit_workers(client, self.requests)
                prewarm(client, self.requests)
                self.threads = max(1, sum(client.nthreads().values()))
            self.description = self.cluster.describe()
        return client


@dataclass
class _Field:
    """A field, how it is to be computed, and what of it is out of date."""

    key: str
    frames: str
    out: str
    requests: Mapping[str, MetricRequest]
    chosen: FieldMetrics
    settings: Settings
    run: str = ""
    scopes: dict[bool, Scope] = field(default_factory=dict)
    stale: StaleRows | None = None

    def blocks(self) -> Iterator[BlockTask]:
        """Tasks of a block each, made one after the other."""
        requests: dict[tuple[str, ...], tuple[MetricRequest, ...]] = {}
        for block in self.stale.blocks() if self.stale is not None else ():
            names = tuple(block.rows)
            if names not in requests:  # one object, which is sent once for all blocks of a task
                requests[names] = tuple(self.requests[name] for name in names)
            yield self.task(block, requests[names], self.scopes)

    def task(
        self, block: StaleBlock, requests: tuple[MetricRequest, ...], scopes: Mapping[bool, Scope]
    ) -> BlockTask:
        pairs, masking = self.settings.pairs, self.settings.mask is not None
        stores = (self.frames, self.out, self.key)
        return BlockTask(
            *stores, block, requests, scopes, pairs, masking, run=self.run, weights=self.chosen.weights
        )


def _bring_into_shape(
    this: _Field,
    source: store.Group,
    root: store.Group,
    workers: _Workers,
    report: DistancesReport,
) -> _Field:
    """Lay out a field's group, and declare and find what of it is out of date."""
    key, settings, metrics = this.key, this.settings, this.chosen.metrics
    origin = store.get_group(source, key)
    contents = [str(content) for content in store.read(store.get_array(origin, schema.CONTENT))]

    def choose() -> int:
        if settings.block is not None:
            return settings.block
        report.sizes[key] = _measured_size(this, origin, contents, workers)
        return report.sizes[key].sequences

    own_units = field_units(source, [key])
    units = {metric.name: metric.units(settings.scope, own_units) for metric in metrics}
    group = lay_out(root, origin, key, units, choose)
    for metric in metrics:
        store.set_directed(store.get_array(group, metric.name), is_directed(metric))
    dataset = key.split("/")[0]
    store.set_attributes(store.get_group(root, dataset), dict(store.get_group(source, dataset).attrs))
    provenance = store.get_group(group, schema.PROVENANCE)
    rows = [(key, row, content) for row, content in enumerate(contents)]
    this.scopes = {
        masked: dataset_range(
            workers.cluster,
            this.frames,
            rows,
            provenance,
            Preprocessing(settings.size, settings.order, settings.compat, masked),
        )
        if settings.scope == "dataset"
        else settings.scope
        for masked in {metric.preprocessing.mask for metric in metrics}
    }
    hashes = {metric.name: metric.specification_hash for metric in metrics}
    scope_of = {metric.name: this.scopes[metric.preprocessing.mask] for metric in metrics}
    parameter = store.read(store.get_array(origin, schema.PARAMETER))
    identities = identify_rows(store.read(store.get_array(origin, schema.SEQUENCE)), parameter)
    forget_metrics(group, set(weighted_otherwise(group, origin)) - hashes.keys())
    this.stale = find_stale(group, contents, hashes, scope_of, settings.pairs, identities)
    report.unrecorded += sum(this.stale.damaged.values())
    report.up_to_date += this.stale.fresh
    made_with = {"pairs": settings.pairs, "versions": versions()}
    describe(
        group,
        parameter,
        {
            metric.name: metric.specification()
            | {"scope": scope_of[metric.name]}
            | made_with
            | ({schema.DIRECTED: True} if is_directed(metric) else {})
            for metric in metrics
            if metric.name in this.stale.metrics
        },
    )
    return this


def _measured_size(
    this: _Field, origin: store.Group, contents: Sequence[str], workers: _Workers
) -> BlockSize:
    """The blocks of a new field, from what one of its sequences takes on a worker."""
    if len(contents) < WORTH_MEASURING:
        return BlockSize(1)
    # Another range of values would take as long, and that of a data set isn't known yet.
    scopes = dict.fromkeys((False, True), "pair" if this.settings.scope == "pair" else "sequence")
    requests = tuple(this.requests.values())
    rows = dict.fromkeys((0, len(contents) // 2, len(contents) - 1))
    for row in rows:
        block = StaleBlock(
            row,
            row + 1,
            {name: {row: ""} for name in this.requests},
            {row: contents[row]},
            dict.fromkeys(this.requests, 0),
            {row: b""},
        )
        # What is timed is what every block takes: nothing is tried.
        task = replace(this.task(block, requests, scopes), run="")
        ((_, seconds, error),) = run_bounded(workers.client(), seconds_per_sequence, [(task,)])
        if error is None:
            frames = store.get_array(origin, schema.FRAMES).shape[1]
            return block_size(max(seconds, 1e-6), len(contents), workers.threads, frames)
    # What is wrong with them will be said where they are computed.
    return BlockSize(1)


def _tasks(fields: Sequence[_Field], pace: Pace) -> Iterator[tuple[tuple[BlockTask, ...]]]:
    """Tasks of one block or several, made as they are asked for: blocks that are quick go together."""
    for this in fields:
        blocks, left = this.blocks(), 0 if this.stale is None else len(this.stale.starts)
        while together := tuple(itertools.islice(blocks, pace.blocks_per_task(this.key, left))):
            left -= len(together)
            yield (together,)


def _run(
    fields: Sequence[_Field],
    workers: _Workers,
    root: store.Group,
    progress: Progress | None,
    report: DistancesReport,
    totals: Totals,
) -> None:
    """Run the tasks. A block that fails every time is left to the next run, with the reason recorded."""
    total = sum(len(this.stale.starts) for this in fields if this.stale is not None)
    if not total:
        return
    client = workers.client()
    pace, tally = Pace(workers.threads), Counter[str]()
    given_up: list[tuple[BlockTask, str]] = []
    if progress is not None:
        progress(0, total)
    done = 0

    def run(tasks: Iterable[tuple[tuple[BlockTask, ...]]]) -> Iterator[tuple[BlockTask, ...]]:
        """Run tasks, and give back the blocks of those that failed and had several."""
        nonlocal done
        for (together,), result, error in run_bounded(client, compute_blocks, tasks, tally=tally):
            if error is None:
                report.computed += result.matrices
                report.blocks += len(together)
                totals.add(together[0].key, result)
                pace.note(together[0].key, len(together), sum(result.seconds_by_stage.values()))
            elif store.is_full_disk(error):
                raise error  # as would all others
            elif len(together) > 1:
                yield together
                continue
            else:
                given_up.append((together[0], reason_of(error)))
            done += len(together)
            if progress is not None:
                progress(done, total)

    try:
        failed = list(run(_tasks(fields, pace)))
        # One of them is to blame; the others are done when they run by themselves.
        list(run(((one,),) for together in failed for one in together))
    finally:
        report.copies = tally["copies"]
        # Now nobody else writes. Without a fingerprint these are computed again by the next run.
        for task, reason in given_up:
            group = store.get_group(root, task.key)
            block = task.block
            texts: dict[str, dict[str, dict[int, str]]] = {
                schema.FAILURE: {name: dict.fromkeys(rows, reason) for name, rows in block.rows.items()},
                schema.CONTENT: {name: dict.fromkeys(rows, "") for name, rows in block.rows.items()},
            }
            texts[schema.DIGEST] = digest_rows(task.key, block, texts, {})
            for name, by_metric in texts.items():
                write_provenance(group, name, block, by_metric)


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
