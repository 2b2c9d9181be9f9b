"""frames.zarr → distances.zarr: every out-of-date block of every metric, on Dask.

A block is some sequences of one field. One task reads it, prepares its frames once per distinct
preprocessing, runs the metrics that are out of date on it, and writes whole aligned blocks: distances
first, then the fingerprints that say they are done (:mod:`pipeline.blocks`). Nothing but small counts
travels through the scheduler.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import pydantic

from lsim.metric import Metric
from lsim.prepared import Prepared
from lsim.preprocess import (
    Compat,
    FramesError,
    Preprocessing,
    Scope,
    drop_alpha,
    finite_frames,
    resize,
    value_range,
)
from lsim.registry import learned_class, list_metrics, load_metric, metric_class, why_unavailable
from pipeline import schema, store
from pipeline.blocks import Pairs, StaleBlock, describe, drop_vanished, invalidate, lay_out, stale_blocks
from pipeline.cluster import Cluster, MetricRequest, Profile, get_metric, prewarm, run_bounded
from pipeline.versions import versions

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (blocks done, blocks in all)."""

SEQUENCES_PER_BLOCK = 4
"""Default of a new store; about a second of work for ten metrics on 11 frames of 256²."""


class UnavailableMetricError(ValueError):
    """A metric asked for by name that cannot be loaded here."""


class Settings(pydantic.BaseModel):
    """Which distances are computed; unknown names and wrong values are errors.

    Attributes
    ----------
    metrics : list of str, or "all"
        ``"all"`` leaves out those whose weights aren't here, and says so.
    size, order, compat
        As :func:`lsim.load_metric` takes them.
    weights : dict of str to str
        Weights of one's own by the name of their metric: files that ``lsim train`` wrote, under any name,
        which is then a metric as others are, whatever ``metrics`` lists; or others for a learned metric
        that is registered. A file must lie at the same path, or in the same search folder, on every worker.
    scope : str or (lo, hi)
        Over which frames minimum and maximum are taken: ``"sequence"``, ``"pair"``, ``"dataset"`` (all
        sequences of a field) or fixed.
    pairs : {"all", "reference"}
        ``"reference"`` computes frame 0 against the others only.
    strict : bool
        Make an unavailable metric an error also for ``"all"``.
    block : int
        Sequences per block of a store that is new.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    metrics: Annotated[tuple[str, ...], pydantic.Field(min_length=1)] | Literal["all"] = "all"
    size: int | None = pydantic.Field(default=224, ge=1)
    order: int = pydantic.Field(default=0, ge=0, le=5)
    compat: Compat = "default"
    weights: dict[Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][\w.+-]*$")], str] = {}
    scope: Literal["sequence", "pair", "dataset"] | tuple[float, float] = "sequence"
    pairs: Pairs = "all"
    strict: bool = False

    block: int = pydantic.Field(default=SEQUENCES_PER_BLOCK, ge=1)

    @pydantic.field_validator("scope")
    @classmethod
    def _scope_rises(cls, scope: Any) -> Any:
        if isinstance(scope, tuple) and not scope[0] < scope[1]:
            raise ValueError(f"a fixed scope is LO,HI with LO below HI, got {scope}")
        return scope


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
        Metrics left out of ``"all"``, and how to get each.
    seconds : float
    cluster : dict
        The cluster that was used; empty where nothing was to be done.
    """

    computed: int = 0
    up_to_date: int = 0
    blocks: int = 0
    failures: list[Failure] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    cluster: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockTask:
    """A stale block with all that a worker needs to compute it."""

    frames: str
    out: str
    key: str
    block: StaleBlock
    requests: tuple[MetricRequest, ...]
    scope: Scope
    pairs: Pairs


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
    frames : path
        A store that :func:`pipeline.convert.convert` made.
    out : path
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
    UnavailableMetricError
        When a metric asked for by name (or any, with ``strict``) can't be loaded; before any computing.
    lsim.UnknownMetricError
        For an unknown name.
    pipeline.store.StoreError
        When ``frames`` is no store.
    """
    if cluster is None:
        with Cluster(Profile()) as own:
            return compute_distances(frames, out, settings, cluster=own, progress=progress)
    settings = settings or Settings()
    began = time.perf_counter()
    # Workers may run in another folder.
    frames_path, out_path = Path(frames).absolute(), Path(out).absolute()
    names, unavailable = select_metrics(settings)
    weights = {name: _everywhere(file) for name, file in settings.weights.items()}
    metrics = [
        load_metric(name, weights.get(name), "cpu", settings.size, settings.order, settings.compat)
        for name in names
    ]
    requests = {metric.name: _request(metric, weights.get(metric.name)) for metric in metrics}
    source = store.open_store(frames_path)
    keys = _checked_fields(source, frames_path)
    report = DistancesReport(unavailable=unavailable)
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
            "versions": versions(),
        }
        try:
            _run(tasks, list(requests.values()), cluster, root, progress, report)
        finally:
            # Also of a run that is interrupted: what it computed stays, and says what made it.
            report.seconds = time.perf_counter() - began
            report.cluster = cluster.describe() if tasks else {}
            runs: list[Any] = list(root.attrs.get("runs", []))  # type: ignore[arg-type]
            if report.blocks:
                counts = {"blocks": report.blocks, "matrices": report.computed}
                runs.append(made_by | counts | {"seconds": round(report.seconds, 3)} | report.cluster)
            carried = ("catalog", "title", "datasets", "pools")
            store.set_attributes(
                root,
                {name: source.attrs[name] for name in carried if name in source.attrs}
                | {
                    "frames": os.path.relpath(frames_path.resolve(), out_path.resolve()),
                    "unavailable": report.unavailable,
                    "runs": runs,
                },
            )
            store.consolidate(out_path)
    report.failures = list_failures(out_path)
    return report


def select_metrics(settings: Settings) -> tuple[list[str], dict[str, str]]:
    """The metrics to compute, and those of ``"all"`` that are left out, each with the reason.

    What weights are given for is asked for by name, too.
    """
    given = settings.weights
    named = list_metrics() if settings.metrics == "all" else settings.metrics
    wanted = list(dict.fromkeys([*named, *given]))
    if reserved := sorted(schema.RESERVED & set(wanted)):
        raise ValueError(
            f"a metric cannot be named {', '.join(reserved)}: the store has variables of that name"
        )
    unavailable = {
        name: reason
        for name in wanted
        if (reason := why_unavailable(name, given.get(name)) or _why_unfit(name, given.get(name)))
    }
    names = [name for name in wanted if name not in unavailable]
    by_name = wanted if settings.strict or settings.metrics != "all" else given
    if faults := [name for name in by_name if name in unavailable]:
        raise UnavailableMetricError(
            "; ".join(f"metric {name!r} is not available: {unavailable[name]}" for name in faults)
        )
    return names, unavailable


def _everywhere(weights: str) -> str:
    """A file of weights as workers find it, who may run in another folder; names stay as they are."""
    path = Path(weights).expanduser()
    return str(path.absolute()) if path.is_file() else weights


def _why_unfit(name: str, weights: str | None) -> str:
    """Empty when a metric's distances make a matrix as the store holds them, else why not."""
    cls = metric_class(name) if weights is None else learned_class(name, weights)
    if "symmetric" in cls.info.axioms:
        return ""
    return (
        "it doesn't claim to be symmetric, and the store holds symmetric matrices; symmetrise it in `compare`"
    )


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


# ---------------------------------------------------------------- on the workers


def compute_block(task: BlockTask) -> int:
    """Compute and write one block; returns how many matrices. Runs on a worker.

    Frames are read a sequence at a time, so memory is that of one sequence whatever the block.
    """
    frames = store.get_array(store.get_group(store.open_store(task.frames), task.key), schema.FRAMES)
    group = store.get_group(store.open_store(task.out, "r+"), task.key)
    block = task.block
    n = frames.shape[1]
    metrics = [get_metric(request) for request in task.requests]
    matrices: dict[str, dict[int, np.ndarray]] = {metric.name: {} for metric in metrics}
    reasons: dict[str, dict[int, str]] = {metric.name: {} for metric in metrics}
    done: dict[str, dict[int, str]] = {metric.name: {} for metric in metrics}
    for row in sorted({row for rows in block.rows.values() for row in rows}):
        sequence = store.read(frames, row)
        prepared: dict[Preprocessing, Prepared] = {}
        for metric in metrics:
            if row not in block.rows[metric.name]:
                continue
            matrix, reason, final = np.full((n, n), np.nan), "", True
            try:
                matrix = _matrix(metric, sequence, prepared, task.scope, task.pairs)
                reason = _incomparable(matrix, sequence, task.pairs)
            except FramesError as error:
                # The metric cannot take these frames, today or tomorrow: done, with the reason recorded.
                reason = str(error)
            except Exception as error:
                # One sequence must not take down its block. Without a fingerprint the next run tries again.
                reason, final = f"{type(error).__name__}: {error}", False
            matrices[metric.name][row] = matrix
            reasons[metric.name][row] = reason
            if final:
                done[metric.name][row] = block.rows[metric.name][row]
    for metric in metrics:
        name = metric.name
        _write_matrices(group, name, block, matrices[name])
        _write_provenance(group, schema.FAILURE, name, block, reasons[name])
        computed_from = {row: block.contents[row] for row in matrices[name]}
        _write_provenance(group, schema.CONTENT, name, block, computed_from)
        # The fingerprint last: it says that all else is there.
        _write_provenance(group, schema.FINGERPRINT, name, block, done[name])
    return sum(len(rows) for rows in done.values())


def _matrix(
    metric: Metric,
    sequence: np.ndarray,
    prepared: dict[Preprocessing, Prepared],
    scope: Scope,
    pairs: Pairs,
) -> np.ndarray:
    """One sequence's distances, (n, n) with a zero diagonal; what is not asked for is NaN."""
    if scope == "pair":
        matrix = metric.pairwise(sequence, "pair")
        if pairs == "reference":
            matrix[1:, 1:] = np.nan
    else:
        if metric.preprocessing not in prepared:
            prepared[metric.preprocessing] = metric.prepare(sequence, scope)
        frames = prepared[metric.preprocessing]
        if pairs == "all":
            matrix = metric.all_pairs(frames)
        else:
            matrix = np.full((len(frames), len(frames)), np.nan)
            matrix[0] = matrix[:, 0] = metric.from_reference(frames)
    np.fill_diagonal(matrix, 0)
    return matrix


def _incomparable(matrix: np.ndarray, sequence: np.ndarray, pairs: Pairs) -> str:
    """Why distances that were asked for are NaN; empty when none is."""
    computed = matrix if pairs == "all" else matrix[0]
    missing = int(np.isnan(computed).sum())
    if not missing:
        return ""
    bad = np.flatnonzero(~finite_frames(sequence))
    if len(bad):
        return f"frames {', '.join(map(str, bad))} hold NaN or infinity"
    return f"the metric gave NaN for {missing} of {computed.size} distances of finite frames"


def _write_matrices(
    group: store.Group, name: str, block: StaleBlock, matrices: Mapping[int, np.ndarray]
) -> None:
    """Write a block whole, keeping the rows that were up to date, and read it back."""
    array = store.get_array(group, name)
    values = store.read(array, slice(block.start, block.stop))
    for row, matrix in matrices.items():
        values[row - block.start] = matrix
    store.write_rows(array, block.start, values)
    written = store.read(array, slice(block.start, block.stop))
    if not np.array_equal(written, values, equal_nan=True):
        raise store.StoreError(f"{array.store_path}: block {block.start}:{block.stop} reads back differently")


def _write_provenance(
    group: store.Group, variable: str, metric: str, block: StaleBlock, texts: Mapping[int, str]
) -> None:
    provenance = store.get_group(group, schema.PROVENANCE)
    at = store.read(store.get_array(provenance, schema.METRIC)).tolist().index(metric)
    array = store.get_array(provenance, variable)
    values = store.read(array, (slice(at, at + 1), slice(block.start, block.stop)))
    for row, text in texts.items():
        values[0, row - block.start] = text
    store.write_block(array, (at, block.start), values)


def sequence_range(
    frames: str, key: str, row: int, settings: Preprocessing
) -> tuple[list[float], list[float]]:
    """Minimum and maximum per channel of one sequence, after the resize. Runs on a worker."""
    array = store.get_array(store.get_group(store.open_store(frames), key), schema.FRAMES)
    sequence = drop_alpha(store.read(array, row))
    if settings.size is not None:
        sequence = resize(sequence, settings.size, settings.order, zero_rim=settings.compat == "published")
    lo, hi = value_range(sequence)
    return lo.tolist(), hi.tolist()


# ---------------------------------------------------------------- on the driver


def _checked_fields(source: store.Group, path: Path) -> list[str]:
    """The fields of a ``frames.zarr``, once it is known to be one, and whole."""
    if source.attrs.get("kind", schema.FRAMES_STORE) != schema.FRAMES_STORE:
        raise store.StoreError(f"{path}: expected a store of frames, found one of {source.attrs['kind']}")
    keys = store.field_keys(source, schema.FRAMES)
    if not keys:
        raise store.StoreError(f"{path}: expected groups <dataset>/<field> with frames, found none")
    for key in keys:
        content = store.read(store.get_array(store.get_group(source, key), schema.CONTENT)).tolist()
        if "" in content:
            raise store.StoreError(
                f"{path}: {content.count('')} of {len(content)} sequences of {key} are not there: their "
                "conversion was interrupted; run it again"
            )
        schema.validate_frames(store.open_dataset(path, key), f"{path}/{key}")
    return keys


def _stale_tasks(
    key: str,
    source: store.Group,
    root: store.Group,
    frames: Path,
    out: Path,
    metrics: Sequence[Metric],
    requests: Mapping[str, MetricRequest],
    settings: Settings,
    cluster: Cluster,
    report: DistancesReport,
) -> list[BlockTask]:
    """Bring a field's group into shape, declare what is out of date, and give the tasks that mend it."""
    origin = store.get_group(source, key)
    contents = [str(content) for content in store.read(store.get_array(origin, schema.CONTENT))]
    group = lay_out(root, origin, key, [metric.name for metric in metrics], settings.block)
    dataset = key.split("/")[0]
    store.set_attributes(store.get_group(root, dataset), dict(store.get_group(source, dataset).attrs))
    scope: Scope = settings.scope
    if scope == "dataset":
        scope = _dataset_range(cluster, str(frames), group, key, contents, settings)
    hashes = {metric.name: metric.specification_hash for metric in metrics}
    blocks, fresh = stale_blocks(group, contents, hashes, scope, settings.pairs)
    report.up_to_date += fresh
    invalidate(group, contents, blocks)
    stale = {name for block in blocks for name in block.rows}
    made_with = {"scope": scope, "pairs": settings.pairs, "versions": versions()}
    describe(
        group,
        store.read(store.get_array(origin, schema.PARAMETER)),
        {metric.name: metric.specification() | made_with for metric in metrics if metric.name in stale},
    )
    return [
        BlockTask(
            str(frames),
            str(out),
            key,
            block,
            tuple(requests[name] for name in block.rows),
            scope,
            settings.pairs,
        )
        for block in blocks
    ]


def _request(metric: Metric, weights: str | None) -> MetricRequest:
    settings = metric.preprocessing
    return MetricRequest(
        metric.name, weights, settings.size, settings.order, settings.compat, metric.specification_hash
    )


def _dataset_range(
    cluster: Cluster,
    frames: str,
    group: store.Group,
    key: str,
    contents: Sequence[str],
    settings: Settings,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Minimum and maximum per channel over all sequences of a field; known ones aren't read again."""
    preprocessing = Preprocessing(settings.size, settings.order, settings.compat)
    label = f"{settings.size}/{settings.order}/{settings.compat}"
    provenance = store.get_group(group, schema.PROVENANCE)
    recorded: Any = provenance.attrs.get("ranges", {})
    known = recorded.get("ranges", {}) if recorded.get("of") == label else {}
    ranges: dict[str, Any] = {content: known[content] for content in contents if content in known}
    missing = [
        (frames, key, row, preprocessing) for row, content in enumerate(contents) if content not in ranges
    ]
    for task, result, error in run_bounded(cluster.client if missing else None, sequence_range, missing):
        if error is not None:
            raise error
        ranges[contents[task[2]]] = result
    if missing:
        store.set_attributes(provenance, {"ranges": {"of": label, "ranges": ranges}})
    lo, hi = (np.array([ranges[content][side] for content in contents]) for side in (0, 1))
    return tuple(np.nanmin(lo, axis=0).tolist()), tuple(np.nanmax(hi, axis=0).tolist())


def _run(
    tasks: list[BlockTask],
    requests: list[MetricRequest],
    cluster: Cluster,
    root: store.Group,
    progress: Progress | None,
    report: DistancesReport,
) -> None:
    """Run the tasks. One that fails every time leaves its block to the next run, with the reason recorded."""
    if not tasks:
        return
    client = cluster.client
    if client is not None:
        prewarm(client, requests)
    if progress is not None:
        progress(0, len(tasks))
    outcomes = run_bounded(client, compute_block, ((task,) for task in tasks))
    given_up = []
    for done, ((task,), result, error) in enumerate(outcomes, start=1):
        if error is None:
            report.computed += result
            report.blocks += 1
        else:
            given_up.append((task, f"{type(error).__name__}: {error}"))
        if progress is not None:
            progress(done, len(tasks))
    # Now nobody else writes. Without a fingerprint these are computed again by the next run.
    for task, reason in given_up:
        group = store.get_group(root, task.key)
        for name, rows in task.block.rows.items():
            _write_provenance(group, schema.FAILURE, name, task.block, dict.fromkeys(rows, reason))
