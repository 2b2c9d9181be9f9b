"""frames.zarr → matrix.zarr: the distances of all pairs of frames of a field, or of several together.

The stage measures what the metrics of each matrix (:mod:`pipeline.matrix.job`) take, makes a plan and checks
it, lists the tiles that are out of date (:mod:`pipeline.matrix.layout`), and hands squares of them to workers
(:mod:`pipeline.matrix.tiles`).
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from distributed import Client

from lsim.error_bounds import PairPrecision
from pipeline.matrix.embedding_cache import clear_cache
from pipeline.matrix.job import Context, MatrixJob, MatrixRequest, StaleTiles
from pipeline.matrix.layout import sides
from pipeline.matrix.machines import find_workers, shared_memory_profile
from pipeline.matrix.measuring import Measured
from pipeline.matrix.plan import Plan, Workers, describe_plan
from pipeline.matrix.tiles import TileResult, TileTask, compute_tiles
from pipeline.metrics.fields import checked_fields
from pipeline.metrics.pixel_weights import metrics_by_field
from pipeline.metrics.resolution import Unresolved, list_unresolved, record_resolution
from pipeline.metrics.settings import ChosenMetrics, Settings, choose_metrics
from pipeline.stage.provenance import add_precision, metric_places, record_precision
from pipeline.stage.results import open_results, refuse_others_results
from pipeline.stage.run import MetricWorkers, Progress, run_blocks
from pipeline.stage.stopwatch import rounded
from pipeline.storage import schema, store
from pipeline.storage.address import absolute, relative
from pipeline.storage.recorded import failures_of_tiles, labels_of_blocks
from pipeline.storage.run_records import carried
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile


@dataclass(frozen=True)
class MatrixFailure:
    """Frames of a sequence, or tiles, for which a metric gave no distances, and why."""

    group: str
    metric: str
    what: str
    reason: str


@dataclass
class MatrixReport:
    """Summary of a run of :func:`compute_matrix`.

    Attributes
    ----------
    tiles, up_to_date : int
        Tiles on and above the diagonal that were computed, and that were there, metric by metric.
    frames, embeddings : int
        Frames of all matrices, and how many times a frame was embedded.
    plans : list of Plan
        Empty where nothing was to be done.
    failures : list of MatrixFailure
        All failures that the store records, and those of this run.
    unresolved : list of Unresolved
        Metrics with distances of the store that rounding may have changed by more than 0.1 %.
    unavailable : dict of str to str
        Metrics left out of ``"all"``, with the reason.
    weighted : list of str
        Metrics whose means are weighted by the fields' weights of pixels.
    seconds : float
    seconds_by_stage : Counter
        ``embed``, ``compare``, ``write``, summed over threads.
    precision : dict
        By group and metric, how sums over pairs of this run kept their promise of precision.
    cluster : dict
    """

    tiles: int = 0
    up_to_date: int = 0
    frames: int = 0
    embeddings: int = 0
    plans: list[Plan] = field(default_factory=list)
    failures: list[MatrixFailure] = field(default_factory=list)
    unresolved: list[Unresolved] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    weighted: list[str] = field(default_factory=list)
    seconds: float = 0.0
    seconds_by_stage: Counter[str] = field(default_factory=Counter)
    precision: dict[str, dict[str, PairPrecision]] = field(default_factory=dict)
    cluster: dict[str, Any] = field(default_factory=dict)

    def add(self, task: TileTask, result: TileResult) -> None:
        """Add the result of a task."""
        self.tiles += result.tiles
        self.embeddings += result.embedded
        self.seconds_by_stage.update(result.seconds)
        add_precision(self.precision.setdefault(task.key, {}), result.precision)
        self.failures += [
            MatrixFailure(task.key, name, f"{_tiles_of(task)}: {result.undone} tiles", reason)
            for name, reason in result.errors.items()
        ]

    def summarise(self, root: store.Group) -> dict[str, Any]:
        """Record precision and resolution in the groups of a store; return what the run did."""
        if not self.tiles:
            return {}
        record_precision(
            root,
            {
                key: {name: asdict(record) for name, record in by_metric.items()}
                for key, by_metric in self.precision.items()
            },
        )
        record_resolution(root)
        return {
            "tiles": self.tiles,
            "embeddings": self.embeddings,
            "seconds_by_stage": rounded(self.seconds_by_stage),
            "unresolved": {entry.metric: entry.unresolved for entry in list_unresolved(root)},
        }


def compute_matrix(
    frames: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: Settings,
    matrix: MatrixRequest | None = None,
    *,
    cluster: Cluster | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
    plan_only: bool = False,
) -> MatrixReport:
    """Bring ``matrix.zarr`` up to date with ``frames.zarr``: distances of all pairs of frames.

    Parameters
    ----------
    frames : path or address
        A store that :func:`pipeline.convert.convert` made.
    out : path or address
        Created when absent; otherwise only tiles that are out of date are computed.
    settings : Settings
        With the scope ``"dataset"``, minimum and maximum over all frames of the matrix, a fixed one, or
        ``"none"``.
    matrix : MatrixRequest, optional
    cluster : Cluster, optional
        Started only if there is something to do. Default: one worker process, with a thread a core.
    progress : callable, optional
    announce : callable, optional
        Called with the plan of each matrix, in words, before anything is computed.
    plan_only : bool
        Plan, and stop: nothing is written.

    Returns
    -------
    MatrixReport

    Raises
    ------
    ValueError, lsim.UnknownMetricError, lsim.WeightsError
        For settings that a matrix can't have, and metrics that
        :func:`~pipeline.metrics.settings.choose_metrics` refuses.
    pipeline.matrix.plan.PlanError
        When the plan doesn't fit the memory that there is; nothing has been computed then.
    pipeline.storage.store.StoreError
        When ``frames`` is no store of frames, or ``out`` one of something else.
    """
    matrix = matrix or MatrixRequest()
    if cluster is None:
        with Cluster(shared_memory_profile(Profile())) as local_cluster:
            return compute_matrix(
                frames,
                out,
                settings,
                matrix,
                cluster=local_cluster,
                progress=progress,
                announce=announce,
                plan_only=plan_only,
            )
    _check(settings)
    start = time.perf_counter()
    # Workers may run in another folder.
    frames_path, out_path = absolute(frames), absolute(out)
    source = store.open_store(frames_path)
    choice, jobs = _make_jobs(source, frames_path, out_path, settings, matrix)
    report = MatrixReport(
        frames=sum(len(job.frames) for job in jobs),
        unavailable=choice.unavailable,
        weighted=[metric.name for metric in choice.metrics if settings.pixel_weights],
    )
    exists = store.exists(out_path)
    if exists:
        _refuse_others(store.open_store(out_path), out_path, source)
    workers, plans = MetricWorkers(cluster, choice.requests.values()), _Plans(matrix.memory)
    if plan_only or not exists or any(job.is_stale() for job in jobs):
        plans.make(jobs, workers)
        for plan in plans.plans.values():
            if announce is not None:
                announce(describe_plan(plan))
    report.plans = list(plans.plans.values())
    if plan_only:
        report.seconds = time.perf_counter() - start
        return report
    with open_results(out_path, schema.MATRIX_STORE, schema.NUMBER, source, other_groups=_BESIDES) as results:
        stale = _lay_out(jobs, results.root, plans, workers)
        recorded_settings = settings.model_dump(include={"scope", "compat", "mask", "pixel_weights"})
        attributes: dict[str, Any] = carried(source) | {
            "frames": relative(frames_path, out_path),
            "scope": settings.scope,
            "unavailable": choice.unavailable,
        }
        if report.plans:
            attributes["plan"] = [describe_plan(plan) for plan in report.plans]
        with results.recorded(start, recorded_settings, report.summarise, workers, attributes):
            _run(jobs, stale, plans, workers, results.run, report, progress)
    report.up_to_date = sum(tiles.fresh for tiles in stale)
    report.seconds, report.cluster = time.perf_counter() - start, workers.description
    report.failures = _add_recorded(report.failures, out_path)
    report.unresolved = list_unresolved(store.open_store(out_path))
    return report


class _Plans:
    """Plans of matrices, by the keys of their groups, and what they were made of."""

    def __init__(self, memory: int | None) -> None:
        self.memory = memory
        self.workers: Workers | None = None
        self.plans: dict[str, Plan] = {}
        self.measurements: dict[str, dict[str, Measured]] = {}

    def make(self, jobs: Sequence[MatrixJob], workers: MetricWorkers) -> None:
        """Measure and plan matrices, on workers that are started for it."""
        for job in jobs:
            client = workers.start()
            self.workers = self.workers or find_workers(workers.cluster, self.memory)
            self.measurements[job.key] = job.measure(client)
            self.plans[job.key] = job.plan(self.measurements[job.key], self.workers)


def list_matrix_failures(out: str | os.PathLike[str]) -> list[MatrixFailure]:
    """List all failures that a ``matrix.zarr`` records: by sequence and reason, and NaN of finite frames.

    Records are compared with their digests. A tile whose record is damaged is a failure by itself.
    """
    root = store.open_store(out)
    failures: list[MatrixFailure] = []
    for key in store.field_keys(root, schema.NUMBER):
        group = store.get_group(root, key)
        labels = labels_of_blocks(group, sides(group)[0])
        for name, place in metric_places(group).items():
            tiles = failures_of_tiles(group, name, place, labels)
            failures += [MatrixFailure(key, name, tile, reason) for tile, reason in tiles.damaged]
            failures += _failures_of_sequences(group, name, tiles.reasons)
            if tiles.missing:
                reason = (
                    f"the metric gave NaN or infinity for {tiles.missing} distances of frames that it takes"
                )
                failures.append(MatrixFailure(key, name, "", reason))
    return failures


def _failures_of_sequences(group: store.Group, metric: str, reasons: np.ndarray) -> list[MatrixFailure]:
    """Combine the frames of a sequence that have no distances for the same reason."""
    indices = np.flatnonzero(reasons != "")
    if not len(indices):
        return []
    columns = (schema.FIELD, schema.SEQUENCE, schema.NUMBER)
    fields, sequences, numbers = (store.read(store.get_array(group, name)) for name in columns)
    by_sequence: dict[tuple[str, str], list[str]] = {}
    for index in indices:
        sequence = f"{fields[index]}/{sequences[index]}"
        by_sequence.setdefault((sequence, str(reasons[index])), []).append(str(numbers[index]))
    return [
        MatrixFailure(group.path, metric, f"{sequence}: frame {_few(frames)}", reason)
        for (sequence, reason), frames in by_sequence.items()
    ]


def _few(names: Sequence[str], limit: int = 12) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# ---------------------------------------------------------------- on the driver


def _check(settings: Settings) -> None:
    if settings.scope in ("sequence", "pair"):
        raise ValueError(
            f"scope {settings.scope!r} normalises a frame otherwise with every other frame, so it cannot be "
            "embedded once for a whole archive: use scope 'dataset' (minimum and maximum of all frames) or "
            "fixed, LO,HI; or 'none', values in their own units, for metrics that take them"
        )
    if settings.pairs != "all":
        raise ValueError("a matrix over an archive has all pairs; pairs 'reference' is for single sequences")


def _matrices(keys: Sequence[str], matrix: MatrixRequest) -> list[tuple[str, list[str]]]:
    """List the groups to write, with the fields of each."""
    if matrix.together is None:
        return [(key, [key]) for key in sorted(keys)]
    return [(f"{schema.TOGETHER}/{matrix.together}", sorted(keys))]


def _make_jobs(
    source: store.Group, frames: str, out: str, settings: Settings, matrix: MatrixRequest
) -> tuple[ChosenMetrics, list[MatrixJob]]:
    """Choose the metrics of a run, and make a job for each matrix that it is to write."""
    choice = choose_metrics(settings)
    keys = checked_fields(source, frames, matrix.groups or None)
    choice, by_field = metrics_by_field(choice, source, frames, keys, weighted=settings.pixel_weights)
    context = Context(frames, out, settings, matrix, choice.requests)
    return choice, [
        MatrixJob(context, key, source, {name: by_field[name] for name in fields})
        for key, fields in _matrices(keys, matrix)
    ]


def _lay_out(
    jobs: Sequence[MatrixJob], root: store.Group, plans: _Plans, workers: MetricWorkers
) -> list[StaleTiles]:
    """Bring the groups of the store into the shape of their frames, and list the stale tiles of each."""
    stale = []
    for job in jobs:
        group = job.lay_out(root, plans.plans.get(job.key))
        # With the scope "dataset", workers read the frames whose range isn't recorded yet.
        scopes = job.find_scopes(group, workers.cluster)
        stale.append(job.list_stale(group, scopes))
        job.describe(group, stale[-1])
    unplanned = [
        job for job, tiles in zip(jobs, stale, strict=True) if tiles.families and job.key not in plans.plans
    ]
    # Only what was taken for up to date: a range changed between the first look and the lock.
    plans.make(unplanned, workers)
    return stale


def _add_recorded(failures: Sequence[MatrixFailure], out: str) -> list[MatrixFailure]:
    """Put the failures that a store records before those of a run that it doesn't record.

    It records damaged frames, unless the tile of their block with itself was up to date.
    """
    recorded = list_matrix_failures(out)
    labels = {(failure.group, failure.metric, failure.reason) for failure in recorded}
    return recorded + [
        failure for failure in failures if (failure.group, failure.metric, failure.reason) not in labels
    ]


_BESIDES = (f"{schema.TOGETHER}/*",)
"""Groups of a ``matrix.zarr`` that hold several fields."""


def _refuse_others(root: store.Group, path: str, source: store.Group) -> None:
    kind = root.attrs.get("kind")
    if kind not in (None, schema.MATRIX_STORE):
        raise store.StoreError(
            f"{path}: expected a store of kind {schema.MATRIX_STORE!r}, found kind {kind!r}: choose "
            "another path"
        )
    refuse_others_results(root, schema.NUMBER, source, _BESIDES)


def _run(
    jobs: Sequence[MatrixJob],
    stale: Sequence[StaleTiles],
    plans: _Plans,
    workers: MetricWorkers,
    run: str,
    report: MatrixReport,
    progress: Progress | None,
) -> None:
    """Compute all stale tiles. A task that fails every time is left to the next run."""
    count = sum(tiles.count for tiles in stale)
    if not count:
        return
    assert plans.workers is not None
    tasks = (
        task
        for job, tiles in zip(jobs, stale, strict=True)
        if tiles.families
        for task in job.tasks(tiles, plans.measurements[job.key], plans.workers, run)
    )
    client = workers.start()
    try:
        with run_blocks(client, compute_tiles, tasks, count, progress) as outcomes:
            for (task,), result, reason in outcomes:
                if result is not None:
                    report.add(task, result)
                    continue
                where = _tiles_of(task)
                report.failures += [MatrixFailure(task.key, name, where, reason) for name in task.tiles]
    finally:
        _free_embeddings(client)


def _tiles_of(task: TileTask) -> str:
    tiles = [tile for of_metric in task.tiles.values() for tile in of_metric]
    first, last = min(tiles), max(tiles)
    return f"tiles {first[0]},{first[1]} to {last[0]},{last[1]}"


def _free_embeddings(client: Client | None) -> None:
    """Free the memory of embeddings, of this process and of workers that go on living."""
    clear_cache()
    if client is not None and client.status == "running":
        client.run(clear_cache, on_error="ignore")
