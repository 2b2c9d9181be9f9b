"""frames.zarr → matrix.zarr: the distances of all pairs of frames of a field, or of several together.

Here is what the driver does: of each matrix (:mod:`pipeline.matrix.job`) measure what metrics take, plan and
check the plan, find the tiles that are out of date (:mod:`pipeline.matrix.layout`), and hand squares of them
to the workers (:mod:`pipeline.matrix.tiles`).
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
from distributed import Client

from lsim.error_bounds import PairPrecision
from pipeline.matrix.embedding_cache import clear_cache
from pipeline.matrix.job import Context, MatrixJob, MatrixRequest
from pipeline.matrix.layout import metric_places, sides
from pipeline.matrix.machines import shared_memory_profile
from pipeline.matrix.plan import Plan, describe_plan
from pipeline.matrix.tiles import TileTask, compute_tiles
from pipeline.metrics.fields import checked_fields, drop_vanished, refuse_others_results
from pipeline.metrics.pixel_weights import metrics_by_field
from pipeline.metrics.resolution import Unresolved, list_unresolved, record_resolution
from pipeline.metrics.settings import Settings, choose_metrics
from pipeline.stage.bounded_map import reason_of, run_bounded
from pipeline.storage import schema, store
from pipeline.storage.address import absolute, relative
from pipeline.storage.recorded import failures_of_tiles, labels_of_blocks, record_fingerprints
from pipeline.storage.run_records import begin_run, carried, record_run
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (tasks done, tasks in all)."""


@dataclass(frozen=True)
class MatrixFailure:
    """Frames of a sequence, or tiles, for which a metric gave no distances, and why."""

    group: str
    metric: str
    what: str
    reason: str


@dataclass
class MatrixReport:
    """What a run of :func:`compute_matrix` did.

    Attributes
    ----------
    tiles, up_to_date : int
        Tiles on and above the diagonal that were computed, and that were there, metric by metric.
    frames, embeddings : int
        Frames of all matrices, and how many times a frame was embedded.
    copies : int
        Second copies of stragglers.
    plans : list of Plan
        Empty where nothing was to be done.
    failures : list of MatrixFailure
        All that the store records, and of this run.
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
    copies: int = 0
    plans: list[Plan] = field(default_factory=list)
    failures: list[MatrixFailure] = field(default_factory=list)
    unresolved: list[Unresolved] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    weighted: list[str] = field(default_factory=list)
    seconds: float = 0.0
    seconds_by_stage: Counter[str] = field(default_factory=Counter)
    precision: dict[str, dict[str, PairPrecision]] = field(default_factory=dict)
    cluster: dict[str, Any] = field(default_factory=dict)


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
        with Cluster(shared_memory_profile(Profile())) as own:
            return compute_matrix(
                *(frames, out, settings, matrix),
                cluster=own,
                progress=progress,
                announce=announce,
                plan_only=plan_only,
            )
    _check(settings)
    began = time.perf_counter()
    # Workers may run in another folder.
    frames_path, out_path = absolute(frames), absolute(out)
    chosen = choose_metrics(settings)
    source = store.open_store(frames_path)
    keys = checked_fields(source, frames_path, matrix.groups or None)
    report = MatrixReport(unavailable=chosen.unavailable)
    chosen, by_field = metrics_by_field(chosen, source, frames_path, keys, weighted=settings.pixel_weights)
    report.unavailable = chosen.unavailable
    report.weighted = [metric.name for metric in chosen.metrics if settings.pixel_weights]
    context = Context(frames_path, out_path, settings, matrix, cluster, chosen.requests)
    jobs = [
        MatrixJob(context, key, source, {one: by_field[one] for one in fields})
        for key, fields in _matrices(keys, matrix)
    ]
    report.frames = sum(len(job.frames) for job in jobs)
    there = store.exists(out_path)
    if there:
        _refuse_others(store.open_store(out_path), out_path, source)
    if plan_only or not there or any(job.is_stale(out_path) for job in jobs):
        context.make_ready()
        report.plans = [job.plan(out_path) for job in jobs]
        for plan in report.plans:
            if announce is not None:
                announce(describe_plan(plan))
    if plan_only:
        report.seconds = time.perf_counter() - began
        return report
    made_by = begin_run(
        scope=settings.scope,
        compat=settings.compat,
        mask=settings.mask,
        pixel_weights=settings.pixel_weights,
    )
    errors: list[MatrixFailure] = []
    with store.locked(out_path):
        root = store.open_output(out_path, schema.MATRIX_STORE)
        store.drop_consolidated(out_path)
        drop_vanished(root, schema.NUMBER, source, _BESIDES)
        try:
            for job in jobs:
                report.up_to_date += job.prepare(root)
            tasks = (task for job in jobs for task in job.tasks())
            errors = _run(tasks, sum(job.count() for job in jobs), context, progress, report)
        finally:
            # Also of a run that is interrupted: what it computed stays, and says what made it.
            report.seconds = time.perf_counter() - began
            report.cluster = cluster.describe() if report.plans else {}
            run = None
            if report.tiles:
                spent = {
                    "tiles": report.tiles,
                    "embeddings": report.embeddings,
                    "copies": report.copies,
                    "seconds": round(report.seconds, 3),
                    "seconds_by_stage": {k: round(v, 4) for k, v in report.seconds_by_stage.items()},
                }
                unresolved = {one.metric: one.unresolved for one in list_unresolved(root)}
                run = made_by | spent | {"unresolved": unresolved} | report.cluster
                _record_precision(root, report)
                record_resolution(root)
            about: dict[str, Any] = {"scope": settings.scope, "unavailable": report.unavailable}
            if report.plans:
                about["plan"] = [describe_plan(plan) for plan in report.plans]
            record_fingerprints(root)
            record_run(root, run, **carried(source), frames=relative(frames_path, out_path), **about)
            store.consolidate(out_path)
    report.failures = list_matrix_failures(out_path)
    report.unresolved = list_unresolved(store.open_store(out_path))
    # The store tells of damaged frames, unless the tile of their block with itself was up to date.
    said = {(known.group, known.metric, known.reason) for known in report.failures}
    report.failures += [new for new in errors if (new.group, new.metric, new.reason) not in said]
    return report


def _record_precision(root: store.Group, report: MatrixReport) -> None:
    """Say in each group's provenance how its metrics kept their promise of precision in this run."""
    for key, by_metric in report.precision.items():
        provenance = store.get_group(root, f"{key}/{schema.PROVENANCE}")
        known: Any = provenance.attrs.get("precision", {})
        found = {name: asdict(precision) for name, precision in by_metric.items()}
        store.set_attributes(provenance, {"precision": known | found})


def list_matrix_failures(out: str | os.PathLike[str]) -> list[MatrixFailure]:
    """List all failures that a ``matrix.zarr`` records: by sequence and reason, and NaN of finite frames.

    What is recorded is compared with its digest. A tile whose record is damaged is a failure by itself.
    """
    root = store.open_store(out)
    failures: list[MatrixFailure] = []
    for key in store.field_keys(root, schema.NUMBER):
        group = store.get_group(root, key)
        labels = labels_of_blocks(group, sides(group)[0])
        for name, place in metric_places(group).items():
            tiles = failures_of_tiles(group, name, place, labels)
            failures += [MatrixFailure(key, name, what, reason) for what, reason in tiles.damaged]
            failures += _failures_of_sequences(group, name, tiles.reasons)
            if tiles.missing:
                reason = (
                    f"the metric gave NaN or infinity for {tiles.missing} distances of frames that it takes"
                )
                failures.append(MatrixFailure(key, name, "", reason))
    return failures


def _failures_of_sequences(group: store.Group, metric: str, reasons: np.ndarray) -> list[MatrixFailure]:
    """Put together the frames of a sequence that have no distances for the same reason."""
    failed = np.flatnonzero(reasons != "")
    if not len(failed):
        return []
    columns = (schema.FIELD, schema.SEQUENCE, schema.NUMBER)
    fields, sequences, numbers = (store.read(store.get_array(group, name)) for name in columns)
    by_sequence: dict[tuple[str, str], list[str]] = {}
    for index in failed:
        which = f"{fields[index]}/{sequences[index]}"
        by_sequence.setdefault((which, str(reasons[index])), []).append(str(numbers[index]))
    return [
        MatrixFailure(group.path, metric, f"{which}: frame {_few(frames)}", reason)
        for (which, reason), frames in by_sequence.items()
    ]


def _few(names: Sequence[str], shown: int = 12) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


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
    """Groups to write, with the fields of each."""
    if matrix.together is None:
        return [(key, [key]) for key in sorted(keys)]
    return [(f"{schema.TOGETHER}/{matrix.together}", sorted(keys))]


_BESIDES = (f"{schema.TOGETHER}/*",)
"""Groups of a ``matrix.zarr`` that are of several fields."""


def _refuse_others(root: store.Group, path: str, source: store.Group) -> None:
    found = root.attrs.get("kind")
    if found not in (None, schema.MATRIX_STORE):
        raise store.StoreError(
            f"{path}: expected a store of kind {schema.MATRIX_STORE!r}, found kind {found!r}: choose "
            "another path"
        )
    refuse_others_results(root, schema.NUMBER, source, _BESIDES)


def _run(
    tasks: Iterator[tuple[TileTask]],
    count: int,
    context: Context,
    progress: Progress | None,
    report: MatrixReport,
) -> list[MatrixFailure]:
    """Run the tasks. What fails every time is left to the next run."""
    if not count:
        return []
    client = context.cluster.client
    if progress is not None:
        progress(0, count)
    tally: Counter[str] = Counter()
    errors: list[MatrixFailure] = []
    try:
        outcomes = run_bounded(client, compute_tiles, tasks, tally=tally)
        for done, ((task,), result, error) in enumerate(outcomes, start=1):
            if error is None:
                report.tiles += result.tiles
                report.embeddings += result.embedded
                report.seconds_by_stage.update(result.seconds)
                here = report.precision.setdefault(task.key, {})
                for name, kept in result.precision.items():
                    here[name] = here[name] + kept if name in here else kept
                errors += [
                    MatrixFailure(task.key, name, f"{_tiles_of(task)}: {result.undone} tiles", reason)
                    for name, reason in result.errors.items()
                ]
            elif store.is_full_disk(error):
                raise error  # as would all others
            else:
                reason = reason_of(error)
                errors += [MatrixFailure(task.key, name, _tiles_of(task), reason) for name in task.tiles]
            if progress is not None:
                progress(done, count)
    finally:
        report.copies = tally["copies"]
        _forget(client)
    return errors


def _tiles_of(task: TileTask) -> str:
    tiles = [tile for found in task.tiles.values() for tile in found]
    first, last = min(tiles), max(tiles)
    return f"tiles {first[0]},{first[1]} to {last[0]},{last[1]}"


def _forget(client: Client | None) -> None:
    """Give back the memory of embeddings, of this process and of workers that go on living."""
    clear_cache()
    if client is not None and client.status == "running":
        client.run(clear_cache, on_error="ignore")
