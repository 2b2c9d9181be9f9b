"""frames.zarr → archive.zarr: the distances of all pairs of frames of a field, or of several together.

Here is what the driver does: measure what metrics take, plan and check the plan, find the tiles that are out
of date (:mod:`pipeline.archive.matrix`), and hand squares of them to the workers
(:mod:`pipeline.archive.tiles`).
"""

from __future__ import annotations

import datetime
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
import psutil
from dask.system import CPU_COUNT
from distributed import Client
from distributed.system import MEMORY_LIMIT

from lsim.metric import Metric
from lsim.precision import PairPrecision
from lsim.preprocess import Scope
from pipeline import limits, schema, store
from pipeline.address import absolute, relative
from pipeline.archive.matrix import describe, invalidate, label, lay_out, metric_places, sides, stale_tiles
from pipeline.archive.measuring import Device, Measured, device_of_worker, measure, share_of_device
from pipeline.archive.plan import (
    FamilyPlan,
    Plan,
    Workers,
    choose_sides,
    describe_plan,
    order_squares,
    plan_family,
    room_for,
)
from pipeline.archive.tiles import TileTask, compute_tiles, embeds_as
from pipeline.embedding_cache import clear_cache
from pipeline.fields import checked_fields, drop_vanished, refuse_others_results
from pipeline.frame_blocks import ArchiveFrames, FrameBlock, list_frames
from pipeline.metric_choice import Settings, choose_metrics
from pipeline.scopes import dataset_range, recorded_range
from pipeline.versions import versions
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile
from pipeline.workers.resident import MetricRequest, dismiss_unfit_workers, prewarm
from pipeline.workers.submission import reason_of, run_bounded

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (tasks done, tasks in all)."""

SHARE_OF_MEMORY = 0.6
"""What a worker's embeddings and all else may take of its memory, unless told: Dask pauses it at 80 %."""
SHARE_OF_GPU = 0.85

SAMPLES = 12
"""Blocks, evenly over the archive, of which the first that can be embedded is measured."""


@dataclass(frozen=True)
class MatrixRequest:
    """What is asked of an archive's matrix besides :class:`~pipeline.metric_choice.Settings`.

    Attributes
    ----------
    groups : tuple of str
        Keys of fields, or patterns such as ``B/*``; all where there are none.
    together : str, optional
        One matrix over all these fields, under this name, instead of one for each.
    tile : int, optional
        Frames on a side of a tile, of a store that is new. Default: as many as suit.
    memory : int, optional
        Bytes that each worker may take, or its GPU has. Default: a share of what there is.
    """

    groups: tuple[str, ...] = ()
    together: str | None = None
    tile: int | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.together is not None and not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", self.together):
            raise ValueError(f"a name is made of letters, digits, '_', '.', '+', '-'; got {self.together!r}")
        if self.tile is not None and self.tile < 1:
            raise ValueError(f"tile must be at least 1 frame, got {self.tile}")


@dataclass(frozen=True)
class ArchiveFailure:
    """Frames of a sequence, or tiles, for which a metric gave no distances, and why."""

    group: str
    metric: str
    what: str
    reason: str


@dataclass
class ArchiveReport:
    """What a run of :func:`compute_archive` did.

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
    failures : list of ArchiveFailure
        All that the store records, and of this run.
    unavailable : dict of str to str
        Metrics left out of ``"all"``, with the reason.
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
    failures: list[ArchiveFailure] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_by_stage: Counter[str] = field(default_factory=Counter)
    precision: dict[str, dict[str, PairPrecision]] = field(default_factory=dict)
    cluster: dict[str, Any] = field(default_factory=dict)


def compute_archive(
    frames: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: Settings,
    matrix: MatrixRequest | None = None,
    *,
    cluster: Cluster | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
    plan_only: bool = False,
) -> ArchiveReport:
    """Bring ``archive.zarr`` up to date with ``frames.zarr``: distances of all pairs of frames.

    Parameters
    ----------
    frames : path or address
        A store that :func:`pipeline.convert.convert` made.
    out : path or address
        Created when absent; otherwise only tiles that are out of date are computed.
    settings : Settings
        With the scope ``"dataset"``, minimum and maximum over all frames of the matrix, or a fixed one.
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
    ArchiveReport

    Raises
    ------
    ValueError, lsim.UnknownMetricError, lsim.WeightsError
        For settings that a matrix can't have, and metrics that :func:`~pipeline.metric_choice.choose_metrics`
        refuses.
    pipeline.archive.plan.PlanError
        When the plan doesn't fit the memory that there is; nothing has been computed then.
    pipeline.store.StoreError
        When ``frames`` is no store of frames, or ``out`` one of something else.
    """
    matrix = matrix or MatrixRequest()
    if cluster is None:
        with Cluster(shared_memory_profile(Profile())) as own:
            return compute_archive(
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
    report = ArchiveReport(unavailable=chosen.unavailable)
    context = _Context(frames_path, out_path, settings, matrix, cluster, chosen.metrics, chosen.requests)
    jobs = [_Job(context, key, source, fields) for key, fields in _matrices(keys, matrix)]
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
    made_by = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "scope": settings.scope,
        "compat": settings.compat,
        "mask": settings.mask,
        "versions": versions(),
    }
    errors: list[ArchiveFailure] = []
    with store.locked(out_path):
        root = store.open_output(out_path, schema.ARCHIVE_STORE)
        store.drop_consolidated(out_path)
        drop_vanished(root, schema.NUMBER, source, _BESIDES)
        try:
            for job in jobs:
                job.prepare(root, report)
            tasks = (task for job in jobs for task in job.tasks())
            errors = _run(tasks, sum(job.count() for job in jobs), context, progress, report)
        finally:
            # Also of a run that is interrupted: what it computed stays, and says what made it.
            report.seconds = time.perf_counter() - began
            report.cluster = cluster.describe() if report.plans else {}
            runs: list[Any] = list(root.attrs.get("runs", []))  # type: ignore[arg-type]
            if report.tiles:
                spent = {
                    "tiles": report.tiles,
                    "embeddings": report.embeddings,
                    "copies": report.copies,
                    "seconds": round(report.seconds, 3),
                    "seconds_by_stage": {k: round(v, 4) for k, v in report.seconds_by_stage.items()},
                }
                runs.append(made_by | spent | report.cluster)
                _record_precision(root, report)
            carried = ("catalog", "title", "datasets")
            attributes = {name: source.attrs[name] for name in carried if name in source.attrs}
            attributes |= {
                "frames": relative(frames_path, out_path),
                "scope": settings.scope,
                "unavailable": report.unavailable,
                "runs": runs,
            }
            if report.plans:
                attributes["plan"] = [describe_plan(plan) for plan in report.plans]
            store.set_attributes(root, attributes)
            store.consolidate(out_path)
    report.failures = list_archive_failures(out_path)
    # The store tells of damaged frames, unless the tile of their block with itself was up to date.
    said = {(known.group, known.metric, known.reason) for known in report.failures}
    report.failures += [new for new in errors if (new.group, new.metric, new.reason) not in said]
    return report


def _record_precision(root: store.Group, report: ArchiveReport) -> None:
    """Say in each group's provenance how its metrics kept their promise of precision in this run."""
    for key, by_metric in report.precision.items():
        provenance = store.get_group(root, f"{key}/{schema.PROVENANCE}")
        known: Any = provenance.attrs.get("precision", {})
        found = {name: asdict(precision) for name, precision in by_metric.items()}
        store.set_attributes(provenance, {"precision": known | found})


def shared_memory_profile(profile: Profile) -> Profile:
    """A local cluster of one process a core, as one process with as many threads: they share embeddings.

    Where there are GPUs, and the profile doesn't say otherwise, one process for each of them.
    """
    if profile.kind != "local" or profile.workers is not None or profile.threads > 1:
        return profile
    if gpus := _count_gpus(profile.device):
        return profile.model_copy(update={"workers": gpus})
    return profile.model_copy(update={"workers": 1, "threads": CPU_COUNT})


def list_archive_failures(out: str | os.PathLike[str]) -> list[ArchiveFailure]:
    """All failures that an ``archive.zarr`` records: by sequence and reason, and NaN of finite frames."""
    root = store.open_store(out)
    found: list[ArchiveFailure] = []
    for key in store.field_keys(root, schema.NUMBER):
        group = store.get_group(root, key)
        provenance = store.get_group(group, schema.PROVENANCE)
        reasons, missing = (store.get_array(provenance, name) for name in (schema.FAILURE, schema.MISSING))
        labels = [store.get_array(group, name) for name in (schema.FIELD, schema.SEQUENCE, schema.NUMBER)]
        for name, place in metric_places(group).items():
            texts = store.read(reasons, place)
            by_sequence: dict[tuple[str, str], list[str]] = {}
            bad = np.flatnonzero(texts != "")
            if len(bad):
                fields, sequences, numbers = (store.read(array) for array in labels)
                for index in bad:
                    which = f"{fields[index]}/{sequences[index]}"
                    by_sequence.setdefault((which, str(texts[index])), []).append(str(numbers[index]))
            for (which, reason), frames in by_sequence.items():
                found.append(ArchiveFailure(key, name, f"{which}: frame {_few(frames)}", reason))
            if count := int(store.read(missing, place).sum(dtype=np.int64)):
                reason = f"the metric gave NaN for {count} distances of frames that it takes"
                found.append(ArchiveFailure(key, name, "", reason))
    return found


def _few(names: Sequence[str], shown: int = 12) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


# ---------------------------------------------------------------- on the driver


def _check(settings: Settings) -> None:
    if settings.scope in ("sequence", "pair"):
        raise ValueError(
            f"scope {settings.scope!r} normalises a frame otherwise with every other frame, so it cannot be "
            "embedded once for a whole archive: use scope 'dataset' (minimum and maximum of all frames) or "
            "fixed, LO,HI"
        )
    if settings.pairs != "all":
        raise ValueError("a matrix over an archive has all pairs; pairs 'reference' is for single sequences")


def _matrices(keys: Sequence[str], matrix: MatrixRequest) -> list[tuple[str, list[str]]]:
    """Groups to write, with the fields of each."""
    if matrix.together is None:
        return [(key, [key]) for key in sorted(keys)]
    return [(f"{schema.TOGETHER}/{matrix.together}", sorted(keys))]


_BESIDES = (f"{schema.TOGETHER}/*",)
"""Groups of an ``archive.zarr`` that are of several fields."""


def _refuse_others(root: store.Group, path: str, source: store.Group) -> None:
    found = root.attrs.get("kind")
    if found not in (None, schema.ARCHIVE_STORE):
        raise store.StoreError(
            f"{path}: expected a store of kind {schema.ARCHIVE_STORE!r}, found kind {found!r}: choose "
            "another path"
        )
    refuse_others_results(root, schema.NUMBER, source, _BESIDES)


@dataclass(frozen=True)
class _Context:
    """What all matrices of a run share."""

    frames: str
    out: str
    settings: Settings
    matrix: MatrixRequest
    cluster: Cluster
    metrics: list[Metric]
    requests: dict[str, MetricRequest]

    def make_ready(self) -> None:
        """Have the workers load the metrics, and send away those that cannot: no plan is made of them."""
        client = self.cluster.client
        if client is not None:
            dismiss_unfit_workers(client, list(self.requests.values()))
            prewarm(client, list(self.requests.values()))

    def families(self) -> list[list[Metric]]:
        """Metrics by what they are embedded as."""
        found: dict[Any, list[Metric]] = {}
        for metric in self.metrics:
            found.setdefault(embeds_as(metric), []).append(metric)
        return list(found.values())


class _Job:
    """One matrix: its frames, what of it is out of date, its plan and its tasks."""

    def __init__(self, context: _Context, key: str, source: store.Group, fields: Sequence[str]) -> None:
        self.context = context
        self.key = key
        self.fields = list(fields)
        self.frames: ArchiveFrames = list_frames(source, fields)
        self._measured: dict[str, Measured] = {}
        self._workers: Workers | None = None
        self._places: dict[str, int] = {}
        self._blocks: list[FrameBlock] = []
        self._side = 1
        self._to_do: list[tuple[dict[str, np.ndarray], Scope]] = []
        _check_shapes(self.frames, context.settings)

    def _sequences(self) -> list[tuple[str, int, str]]:
        return [(piece.key, piece.row, piece.content) for piece in self.frames.sequences]

    def _group(self, out: str) -> store.Group | None:
        """The group as it is in the store, where it is."""
        if not store.exists(out):
            return None
        root = store.open_store(out)
        complete = f"{self.key}/{schema.PROVENANCE}/{schema.FINGERPRINT}"
        return store.get_group(root, self.key) if complete in root else None

    def _known_scope(self, group: store.Group, metric: Metric) -> Scope | None:
        if self.context.settings.scope != "dataset":
            return self.context.settings.scope
        provenance = store.get_group(group, schema.PROVENANCE)
        return recorded_range(self._sequences(), provenance, metric.preprocessing)

    def _stale(self, group: store.Group | None, tile: int) -> dict[str, np.ndarray]:
        """Of every metric, the tiles that are out of date as far as is known without reading frames."""
        blocks = self.frames.blocks(tile)
        stale = {}
        for metric in self.context.metrics:
            scope = None if group is None else self._known_scope(group, metric)
            if group is None or scope is None:
                stale[metric.name] = np.triu(np.ones((len(blocks), len(blocks)), bool))
            else:
                stale[metric.name] = stale_tiles(group, metric.name, metric.specification_hash, scope, blocks)
        return stale

    def is_stale(self, out: str) -> bool:
        """Whether anything may be to be done."""
        group = self._group(out)
        return group is None or any(one.any() for one in self._stale(group, sides(group)[0]).values())

    def plan(self, out: str) -> Plan:
        """Measure and plan; an error where it doesn't fit."""
        context = self.context
        self._workers = _find_workers(context.cluster, context.matrix.memory)
        families = context.families()
        for family in families:
            self._measured[family[0].name] = self._measure(family)
        measured = [self._measured[family[0].name] for family in families]
        group = self._group(out)
        if group is None:
            tile, side = choose_sides(len(self.frames), measured, self._workers, context.matrix.tile)
        else:
            tile, side = sides(group)
            if context.matrix.tile not in (None, tile):
                raise ValueError(
                    f"{out}/{self.key} has tiles of {tile} frames a side, not {context.matrix.tile}: leave "
                    "--tile out, or choose another path"
                )
        stale = self._stale(group, tile)
        planned = tuple(self._plan_family(family, stale, tile, side) for family in families)
        return Plan(self.key, len(self.frames), tile, side, self._workers, planned)

    def _plan_family(
        self, family: Sequence[Metric], stale: Mapping[str, np.ndarray], tile: int, side: int
    ) -> FamilyPlan:
        assert self._workers is not None
        names = [metric.name for metric in family]
        measured = self._measured[names[0]]
        tables = [stale[name] for name in names]
        return plan_family(names, tables, len(self.frames), tile, side, measured, self._workers)

    def _measure(self, family: Sequence[Metric]) -> Measured:
        requests = tuple(self.context.requests[metric.name] for metric in family)
        blocks = self.frames.blocks(8)
        # The first would do, but for those whose first frames are damaged or hold NaN.
        step = max(1, len(blocks) // SAMPLES)
        sample = tuple(blocks[::step][:SAMPLES])
        task = (self.context.frames, requests, sample, self.frames.sequence_bytes, len(self.frames))
        for _, result, error in run_bounded(self.context.cluster.client, measure, [task]):
            if error is not None:
                raise error
            return result
        raise AssertionError("a task has an outcome")

    def prepare(self, root: store.Group, report: ArchiveReport) -> None:
        """Bring the group into shape, and declare what is out of date."""
        context = self.context
        group = self._group(context.out)
        plan = next((plan for plan in report.plans if plan.key == self.key), None)
        if group is not None:
            tile, side = sides(group)
        elif plan is not None:
            tile, side = plan.tile, plan.side
        else:
            raise store.StoreError(f"{context.out}: {self.key} vanished while it was looked at")
        units = {metric.name: metric.info.units for metric in context.metrics}
        group = lay_out(root, self.key, self.frames, units, tile, side)
        provenance = store.get_group(group, schema.PROVENANCE)
        scopes = {metric.name: self._scope(provenance, metric) for metric in context.metrics}
        blocks = self.frames.blocks(tile)
        stale = {
            metric.name: stale_tiles(
                group, metric.name, metric.specification_hash, scopes[metric.name], blocks
            )
            for metric in context.metrics
        }
        invalidate(group, blocks, stale)
        label(group, self.frames)
        store.set_attributes(group, {"groups": self.fields, "scope": context.settings.scope})
        describe(
            group,
            {
                metric.name: metric.specification() | {"scope": scopes[metric.name], "versions": versions()}
                for metric in context.metrics
                if stale[metric.name].any()
            },
        )
        report.up_to_date += sum(
            len(blocks) * (len(blocks) + 1) // 2 - int(table.sum()) for table in stale.values()
        )
        self._places = metric_places(group)
        self._blocks, self._side = blocks, side
        self._to_do = [
            ({metric.name: stale[metric.name] for metric in family}, scopes[family[0].name])
            for family in context.families()
            if any(stale[metric.name].any() for metric in family)
        ]
        if self._to_do and self._workers is None:
            # Only what was taken for up to date is not: a range changed between a look and the lock.
            context.make_ready()
            self.plan(context.out)

    def count(self) -> int:
        """Tasks there are."""
        return sum(len(list(self._squares(tables))) for tables, _ in self._to_do)

    def _squares(self, tables: Mapping[str, np.ndarray]) -> Iterator[tuple[int, int]]:
        return order_squares(np.logical_or.reduce(list(tables.values())), self._side)

    def tasks(self) -> Iterator[tuple[TileTask]]:
        """The tasks, made as they are asked for: together they would take more than their tiles."""
        for tables, scope in self._to_do:
            yield from self._tasks_of(tables, scope)

    def _scope(self, provenance: store.Group, metric: Metric) -> Scope:
        context = self.context
        if context.settings.scope != "dataset":
            return context.settings.scope
        return dataset_range(
            context.cluster, context.frames, self._sequences(), provenance, metric.preprocessing
        )

    def _tasks_of(
        self,
        tables: Mapping[str, np.ndarray],
        scope: Scope,
    ) -> Iterator[tuple[TileTask]]:
        context, blocks, side = self.context, self._blocks, self._side
        assert self._workers is not None
        measured = self._measured[next(iter(tables))]
        room = room_for(measured, self._workers, len(blocks[0]))
        for row, column in self._squares(tables):
            tiles = {}
            for name, table in tables.items():
                part = table[row * side : (row + 1) * side, column * side : (column + 1) * side]
                found = tuple((row * side + int(i), column * side + int(j)) for i, j in np.argwhere(part))
                if found:
                    tiles[name] = found
            needed = sorted({index for found in tiles.values() for pair in found for index in pair})
            yield (
                TileTask(
                    context.frames,
                    context.out,
                    self.key,
                    tuple(context.requests[name] for name in tiles),
                    {name: self._places[name] for name in tiles},
                    tiles,
                    {index: blocks[index] for index in needed},
                    scope,
                    measured.frame_bytes,
                    room,
                ),
            )


def _check_shapes(frames: ArchiveFrames, settings: Settings) -> None:
    """Frames of several fields can be compared where they come out alike."""
    channels = {3 if shape[2] == 4 else shape[2] for shape in frames.shapes.values()}
    sizes = {shape[:2] for shape in frames.shapes.values()}
    if len(channels) > 1 or (settings.size is None and len(sizes) > 1):
        shapes = ", ".join(f"{key} {'×'.join(map(str, shape))}" for key, shape in frames.shapes.items())
        raise ValueError(
            f"frames of different channels, or of different sizes that aren't resized, have no distances: "
            f"{shapes}; choose --groups that agree, or give --size"
        )


def _run(
    tasks: Iterator[tuple[TileTask]],
    count: int,
    context: _Context,
    progress: Progress | None,
    report: ArchiveReport,
) -> list[ArchiveFailure]:
    """Run the tasks. What fails every time is left to the next run."""
    if not count:
        return []
    client = context.cluster.client
    if progress is not None:
        progress(0, count)
    tally: Counter[str] = Counter()
    errors: list[ArchiveFailure] = []
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
                    ArchiveFailure(task.key, name, f"{_tiles_of(task)}: {result.undone} tiles", reason)
                    for name, reason in result.errors.items()
                ]
            elif store.is_full_disk(error):
                raise error  # as would all others
            else:
                reason = reason_of(error)
                errors += [ArchiveFailure(task.key, name, _tiles_of(task), reason) for name in task.tiles]
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


def _find_workers(cluster: Cluster, memory: int | None) -> Workers:
    """Who computes, and what memory each has."""
    client = cluster.client
    if client is None:
        own = device_of_worker()
        there = int(SHARE_OF_GPU * own.free) if own.kind != "cpu" else _share_of_this_machine(1)
        return Workers(1, 1, memory or there, own.kind)
    information = client.scheduler_info(n_workers=-1)["workers"]
    # At most: those of jobs come one after the other.
    count = max(len(information), cluster.profile.asked_for.maximum)
    devices: dict[str, Device] = client.run(device_of_worker)
    kinds = {device.kind for device in devices.values()}
    device = "cpu" if kinds == {"cpu"} else next(iter(sorted(kinds - {"cpu"})))
    if device != "cpu":
        there = int(SHARE_OF_GPU * share_of_device(devices.values(), device))
    else:
        unlimited = MEMORY_LIMIT // count
        there = int(SHARE_OF_MEMORY * min(one["memory_limit"] or unlimited for one in information.values()))
        if cluster.profile.kind == "local":
            there = min(there, _share_of_this_machine(count))
    threads = max(worker["nthreads"] for worker in information.values())
    return Workers(count, threads, memory or there, device)


def _share_of_this_machine(workers: int) -> int:
    free = min(psutil.virtual_memory().available, MEMORY_LIMIT)
    there = SHARE_OF_MEMORY * free / workers
    if (headroom := limits.headroom_bytes()) is not None:  # of each process: workers have the same limits
        there = min(there, psutil.Process().memory_info().rss + SHARE_OF_MEMORY * headroom)
    return int(there)


def _count_gpus(device: str) -> int:
    """How many GPUs of this machine workers take that are told to use a device."""
    import torch

    if not (device == "auto" or device.startswith("cuda")) or not torch.cuda.is_available():
        return 0
    return torch.cuda.device_count() if device == "auto" else 1
