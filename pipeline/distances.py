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
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import pydantic

from lsim.metric import Metric
from lsim.preprocess import Compat, FramesError, Preprocessing, Scope
from lsim.registry import learned_class, list_metrics, metric_class, metric_name, why_unavailable
from pipeline import schema, store
from pipeline.blocks import Pairs, describe, drop_vanished, invalidate, lay_out, stale_blocks
from pipeline.cluster import Cluster
from pipeline.compute import BlockResult, BlockTask, compute_block, sequence_range, write_provenance
from pipeline.profiles import Profile
from pipeline.resident import MetricRequest, Option, check_own_metrics, prewarm
from pipeline.submission import run_bounded
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
        ``"all"`` leaves out those whose weights aren't here or that can't take frames of ``size``, and says
        so. In a list, too, it stands for all that are registered; ``"module:Class"`` is a metric of one's
        own, which workers must be able to import.
    options : dict of str to dict
        What single metrics are told, by their names and those of their options.
    mask : "nan", optional
        Metrics that take a mask leave missing pixels (NaN) out; the others, frames that have any.
    precision : {"exact", "ranking"}
        What metrics with that option are told, unless ``options`` say otherwise.
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
        Make what is left out of ``"all"`` an error.
    block : int
        Sequences per block of a store that is new.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    metrics: Annotated[tuple[str, ...], pydantic.Field(min_length=1)] | Literal["all"] = "all"
    options: dict[str, dict[str, Option]] = {}
    mask: Literal["nan"] | None = None
    precision: Literal["exact", "ranking"] = "exact"
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
class ChosenMetrics:
    """The metrics that settings ask for.

    Attributes
    ----------
    metrics : list of Metric
        Loaded on the CPU.
    requests : dict of str to MetricRequest
        By name, how workers load the same.
    unavailable : dict of str to str
        Those of ``"all"`` that are left out, each with the reason.
    """

    metrics: list[Metric]
    requests: dict[str, MetricRequest]
    unavailable: dict[str, str]


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
    frames_path, out_path = Path(frames).absolute(), Path(out).absolute()
    chosen = choose_metrics(settings)
    metrics, requests = chosen.metrics, chosen.requests
    source = store.open_store(frames_path)
    keys = _checked_fields(source, frames_path)
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
                    "frames": os.path.relpath(frames_path.resolve(), out_path.resolve()),
                    "unavailable": report.unavailable,
                    "runs": runs,
                },
            )
            store.consolidate(out_path)
    report.failures = list_failures(out_path)
    return report


def choose_metrics(settings: Settings) -> ChosenMetrics:
    """Load the metrics that settings ask for: what is wrong with the settings is an error here.

    What weights are given for is asked for by name, too.

    Raises
    ------
    UnavailableMetricError
        When a metric asked for by name (or any, with ``strict``) isn't there to be loaded.
    lsim.UnknownMetricError
        For an unknown name.
    lsim.FramesError
        When a metric asked for by name (or any, with ``strict``) can't take frames of that size.
    lsim.WeightsError
        For weights of another network.
    ValueError
        For names that are taken, and options that no metric has or that it can't take.
    """
    given = settings.weights
    named = ["all"] if settings.metrics == "all" else settings.metrics
    by_name = [name for name in (*named, *given) if name != "all"]
    listed = [name for entry in named for name in (list_metrics() if entry == "all" else [entry])]
    wanted = list(dict.fromkeys([*listed, *given]))
    _check_names(wanted)
    _check_options(settings, wanted)
    unavailable = {name: reason for name in wanted if (reason := why_unavailable(name, given.get(name)))}
    needed = wanted if settings.strict else by_name
    if faults := [name for name in needed if name in unavailable]:
        raise UnavailableMetricError(
            "; ".join(f"metric {name!r} is not available: {unavailable[name]}" for name in faults)
        )
    chosen = ChosenMetrics([], {}, unavailable)
    for name in wanted:
        if name in unavailable:
            continue
        request = _request(name, settings)
        try:
            metric = request.load("cpu")
        except FramesError as error:
            if name in needed:
                raise
            unavailable[name] = str(error)
            continue
        chosen.metrics.append(metric)
        chosen.requests[metric.name] = request.of(metric)
    return chosen


def _check_names(wanted: Sequence[str]) -> None:
    """Two metrics of one name, or one named as a variable of the store, would overwrite each other."""
    names = [metric_name(name) for name in wanted]
    if reserved := sorted(schema.RESERVED & set(names)):
        raise ValueError(
            f"a metric cannot be named {', '.join(reserved)}: the store has variables of that name"
        )
    for name in names:
        if names.count(name) > 1:
            which = " and ".join(repr(one) for one in wanted if metric_name(one) == name)
            raise ValueError(f"{which} would both be called {name!r}: call one of them otherwise")


def _check_options(settings: Settings, wanted: Sequence[str]) -> None:
    """Options are those of a metric that there is, and that has them, whether it is computed now or not."""
    known = {metric_name(name): name for name in (*list_metrics(), *wanted)}
    for name, options in settings.options.items():
        if name not in known:
            raise ValueError(f"options for {name!r}, which is no metric; there are {', '.join(known)}")
        there = _class_of(known[name], settings).option_names()
        if unknown := sorted(options.keys() - set(there)):
            raise ValueError(
                f"metric {name!r} has no option {', '.join(unknown)}; it has: {', '.join(there) or 'none'}"
            )


def _class_of(name: str, settings: Settings) -> type[Metric]:
    weights = settings.weights.get(name)
    return metric_class(name) if weights is None else learned_class(name, weights)


def _request(name: str, settings: Settings) -> MetricRequest:
    """How a metric is asked for under these settings; its specification is known once it is loaded."""
    cls = _class_of(name, settings)
    options = dict(settings.options.get(metric_name(name), {}))
    if settings.precision != "exact" and "precision" in cls.option_names():
        options.setdefault("precision", settings.precision)
    weights = settings.weights.get(name)
    return MetricRequest(
        name,
        None if weights is None else _everywhere(weights),
        settings.size,
        settings.order,
        settings.compat,
        mask=settings.mask is not None and cls.info.takes_mask,
        symmetrise=True,
        options=tuple(sorted(options.items())),
    )


def _everywhere(weights: str) -> str:
    """A file of weights as workers find it, who may run in another folder; names stay as they are."""
    path = Path(weights).expanduser()
    return str(path.absolute()) if path.is_file() else weights


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
    units = {metric.name: metric.info.units for metric in metrics}
    group = lay_out(root, origin, key, units, settings.block)
    dataset = key.split("/")[0]
    store.set_attributes(store.get_group(root, dataset), dict(store.get_group(source, dataset).attrs))
    scopes: dict[bool, Scope] = {
        masked: _dataset_range(cluster, str(frames), group, key, contents, settings, masked)
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
            str(frames),
            str(out),
            key,
            block,
            tuple(requests[name] for name in block.rows),
            scopes,
            settings.pairs,
            masking=settings.mask is not None,
        )
        for block in blocks
    ]


def _dataset_range(
    cluster: Cluster,
    frames: str,
    group: store.Group,
    key: str,
    contents: Sequence[str],
    settings: Settings,
    masked: bool,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Minimum and maximum per channel over all sequences of a field; known ones aren't read again."""
    preprocessing = Preprocessing(settings.size, settings.order, settings.compat, masked)
    label = f"{settings.size}/{settings.order}/{settings.compat}"
    attribute = "masked_ranges" if masked else "ranges"
    provenance = store.get_group(group, schema.PROVENANCE)
    recorded: Any = provenance.attrs.get(attribute, {})
    known = recorded.get("ranges", {}) if recorded.get("of") == label else {}
    ranges: dict[str, Any] = {content: known[content] for content in contents if content in known}
    missing = [
        (frames, key, row, preprocessing) for row, content in enumerate(contents) if content not in ranges
    ]
    for task, result, error in run_bounded(cluster.client if missing else None, sequence_range, missing):
        if isinstance(error, FramesError):
            return (0.0,), (0.0,)  # no metric can take this field: each will say why
        if error is not None:
            raise error
        ranges[contents[task[2]]] = result
    if missing:
        store.set_attributes(provenance, {attribute: {"of": label, "ranges": ranges}})
    lo, hi = (np.array([ranges[content][side] for content in contents], float) for side in (0, 1))
    if np.isnan(lo).all():
        return (0.0,), (0.0,)  # nothing counts in any sequence: distances will be NaN whatever the range
    return tuple(np.nanmin(lo, axis=0).tolist()), tuple(np.nanmax(hi, axis=0).tolist())


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
