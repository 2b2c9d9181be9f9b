"""frames.zarr → embeddings.zarr: what a metric keeps of every frame, for search libraries of others.

A learned metric is a distance between vectors: where it is the Euclidean one, an index over these vectors
finds by it. A block is some whole sequences of one field. A worker writes its rows, then the fingerprint that
says they are done: a hash of the frames' content, of all that determines the metric's values, and of the
range that frames were normalised by. Beside it stands a digest, which binds the values to the metric, the
block and the names of its frames (:mod:`pipeline.storage.digests`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
import xarray as xr
import xxhash

from lsim.claims import other_random_numbers
from lsim.metric import Metric
from lsim.preprocess import FramesError, Scope, finite_frames, scope_identity
from pipeline.metrics.fields import checked_fields, drop_vanished
from pipeline.metrics.settings import Settings, choose_metrics
from pipeline.metrics.value_range import dataset_range
from pipeline.stage import trials
from pipeline.stage.bounded_map import reason_of, run_bounded
from pipeline.stage.retry_single import in_batch_or_alone
from pipeline.storage import digests, metadata, schema, store
from pipeline.storage.address import absolute, relative
from pipeline.storage.checked_frames import NOT_READ, read_sequence, why_not_read
from pipeline.storage.chunks import check_fits
from pipeline.storage.recorded import (
    LABELS,
    OTHER_EMBEDDING_RECORD,
    CheckedEmbeddings,
    block_identity,
    block_texts,
    record_fingerprints,
)
from pipeline.storage.run_records import begin_run, record_run
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile
from pipeline.workers.worker_metrics import (
    MetricRequest,
    dismiss_unfit_workers,
    get_metric,
    prewarm,
    still_wanted,
)

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (blocks done, blocks in all)."""

BLOCK_BYTES = 64 * 2**20
"""Of a block's embeddings, and of a chunk: some 70 frames of LSiM, a second of work."""

NAMES_TOGETHER = 1 << 14
"""Frames whose names make a chunk."""

COLUMNS: dict[str, Any] = dict(zip(LABELS, (str, str, "int32", "float64"), strict=True))
"""What is said of every frame, beside its embedding."""

BLOCK = "block"
FAILURE = f"{schema.PROVENANCE}/{schema.FAILURE}"
DIGEST = f"{schema.PROVENANCE}/{schema.DIGEST}"
FINGERPRINT = f"{schema.PROVENANCE}/{schema.FINGERPRINT}"

FEATURES = "features"
"""The part of an embedding that a metric's ``feature_distance`` speaks of."""


@dataclass(frozen=True)
class EmbeddingFailure:
    """Frames of a sequence that have no embedding, and why."""

    field: str
    sequence: str
    numbers: tuple[int, ...]
    reason: str


@dataclass
class EmbeddingsReport:
    """What a run of :func:`compute_embeddings` did.

    Attributes
    ----------
    metric : str
    computed, up_to_date : int
        Frames.
    blocks : int
        Blocks that were computed.
    values : int
        Length of a frame's embedding, by field.
    feature_distance : str
        What the metric is of its features: "euclidean", "squared euclidean", or empty.
    failures : list of EmbeddingFailure
        All that the store records.
    seconds : float
    cluster : dict
        Empty where nothing was to be done.
    unrecorded : int
        Blocks that were computed again as their record, or the names of their frames, were not those that
        were written with them.
    """

    metric: str
    computed: int = 0
    up_to_date: int = 0
    blocks: int = 0
    values: dict[str, int] = field(default_factory=dict)
    feature_distance: str = ""
    failures: list[EmbeddingFailure] = field(default_factory=list)
    seconds: float = 0.0
    cluster: dict[str, Any] = field(default_factory=dict)
    unrecorded: int = 0


@dataclass(frozen=True)
class EmbedTask:
    """A stale block with all that a worker needs to compute it.

    ``first`` is the row of the block's first sequence of ``n`` frames, ``contents`` has the hashes of all,
    ``together`` is how many frames make a chunk, and ``identity`` what the block's digest is bound to.
    """

    frames: str
    out: str
    key: str
    block: int
    first: int
    n: int
    contents: tuple[str, ...]
    together: int
    request: MetricRequest
    scope: Scope
    fingerprint: str
    identity: bytes
    run: str = ""

    @property
    def label(self) -> str:
        """What it is of, in messages."""
        return f"{self.key}, sequences {self.first} to {self.first + len(self.contents) - 1}"


def compute_embeddings(
    frames: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: Settings,
    *,
    groups: Sequence[str] | None = None,
    cluster: Cluster | None = None,
    progress: Progress | None = None,
) -> EmbeddingsReport:
    """Bring ``embeddings.zarr`` up to date with ``frames.zarr``.

    Parameters
    ----------
    frames : path
    out : path
        Created when absent; otherwise only what is out of date is computed.
    settings : Settings
        Of one metric, with a scope that is the same for all frames: ``"dataset"`` (all sequences of a field)
        or fixed.
    groups : sequence of str, optional
        Keys ``<dataset>/<field>``, or patterns of them; default all.
    cluster : Cluster, optional
        Started only if there is something to do. Default: one worker process per core.
    progress : callable, optional

    Returns
    -------
    EmbeddingsReport
        With failures rather than an exception where single frames have no embedding.

    Raises
    ------
    ValueError, lsim.UnknownMetricError, lsim.WeightsError
        For metrics that :func:`pipeline.metrics.settings.choose_metrics` refuses, more than one, and scopes
        of single sequences or pairs; before any computing.
    pipeline.storage.store.StoreError
        When ``frames`` is no store, or ``out`` holds embeddings by another metric.

    Notes
    -----
    A worker has one sequence of frames in memory and :data:`BLOCK_BYTES` of embeddings, about five times over
    while they are written and read back; or one frame's, where that is more.
    """
    if cluster is None:
        with Cluster(Profile()) as own:
            return compute_embeddings(frames, out, settings, groups=groups, cluster=own, progress=progress)
    began = time.perf_counter()
    _check_scope(settings.scope)
    metric, request = _one_metric(settings)
    # Workers may run in another folder.
    frames_path, out_path = absolute(frames), absolute(out)
    source = store.open_store(frames_path)
    keys = checked_fields(source, frames_path, groups)
    report = EmbeddingsReport(metric.name, feature_distance=metric.info.feature_distance)
    with store.locked(out_path):
        root = store.open_output(out_path, schema.EMBEDDINGS_STORE)
        _check_metric(root, metric, out_path)
        store.drop_consolidated(out_path)
        drop_vanished(root, schema.NUMBER, source)
        about = {"metric": metric.name, "frames": relative(frames_path, out_path)}
        store.set_attributes(root, about)
        tasks: list[EmbedTask] = []
        run_name = uuid.uuid4().hex
        for key in keys:
            tasks += _stale_tasks(
                key, source, root, frames_path, out_path, metric, request, settings, cluster, report, run_name
            )
        made_by = begin_run(scope=settings.scope)
        try:
            _run(tasks, request, cluster, root, progress, report)
        finally:
            # Also of a run that is interrupted: what it computed stays, and says what made it.
            report.seconds = time.perf_counter() - began
            report.cluster = cluster.describe() if tasks else {}
            if report.blocks:
                counts = {"blocks": report.blocks, "frames": report.computed}
                spent = {"seconds": round(report.seconds, 3)}
                record_run(root, made_by | counts | spent | report.cluster)
            record_fingerprints(root)
            store.consolidate(out_path)
    report.failures = list_embedding_failures(out_path)
    return report


def list_embedding_failures(out: str | os.PathLike[str]) -> list[EmbeddingFailure]:
    """List all frames without an embedding that an ``embeddings.zarr`` records, by sequence and reason.

    Reasons are compared with the digests of their blocks. Of a block whose record is damaged all frames are
    listed, as what was wrong with them isn't known.
    """
    root = store.open_store(out)
    failures: list[EmbeddingFailure] = []
    for key in store.field_keys(root, schema.NUMBER):
        checked = CheckedEmbeddings(root, key)
        reasons = checked.failures.copy()
        for block in range(checked.count):
            if checked.is_damaged(block):
                reasons[checked.rows(block)] = OTHER_EMBEDDING_RECORD
            elif not checked.is_bound(block):
                reasons[checked.rows(block)] = ""  # of a run that was stopped
        by_reason: dict[tuple[str, str], list[int]] = {}
        for row in np.flatnonzero(reasons != ""):
            sequence, number = (checked.labels[name][row] for name in (schema.SEQUENCE, schema.NUMBER))
            by_reason.setdefault((str(sequence), str(reasons[row])), []).append(int(number))
        failures += [
            EmbeddingFailure(key, sequence, tuple(numbers), reason)
            for (sequence, reason), numbers in by_reason.items()
        ]
    return failures


def load_embeddings(path: str | os.PathLike[str], key: str) -> tuple[xr.Dataset, list[str]]:
    """Read the embeddings of a field, each block compared with its digest.

    Parameters
    ----------
    path : path or address
        Of an ``embeddings.zarr``.
    key : str
        ``<dataset>/<field>``.

    Returns
    -------
    dataset : Dataset
        Variables (frame, …): each part of the embeddings, and ``field``, ``sequence``, ``number``,
        ``parameter``. Embeddings that aren't as they were written are NaN.
    left_out : list of str
        These, by block, with the reason; and blocks that aren't computed yet.

    Raises
    ------
    pipeline.storage.store.DamagedError
        When metadata, or the names of frames, can't be read.
    """
    root = store.open_store(path)
    metadata.check_documents(root)
    checked = CheckedEmbeddings(root, key)
    blocks = [checked.read(block) for block in range(checked.count)]
    variables: dict[str, Any] = {name: (schema.FRAME, column) for name, column in checked.labels.items()}
    for name, array in checked.parts.items():
        values = [block[name] for block in blocks]
        dims = (schema.FRAME, *_dims(name, array.shape[1:]))
        variables[name] = (dims, np.concatenate(values) if values else np.empty(array.shape, array.dtype))
    return xr.Dataset(variables, attrs=dict(store.get_group(root, key).attrs)), list(checked.left_out)


# ---------------------------------------------------------------- on the driver


def _check_scope(scope: Scope) -> None:
    if scope in ("sequence", "pair"):
        raise ValueError(
            f"scope {scope!r}: embeddings can be compared only where all frames are normalised by the same "
            "range; expected dataset or LO,HI"
        )


def _one_metric(settings: Settings) -> tuple[Metric, MetricRequest]:
    if settings.pixel_weights:
        raise ValueError(
            "weights of pixels count where embeddings are compared, and are not in a store of them: leave "
            "pixel_weights out"
        )
    chosen = choose_metrics(settings)
    if settings.metrics == "all" or len(chosen.metrics) != 1:
        names = ", ".join(metric.name for metric in chosen.metrics)
        raise ValueError(f"a store of embeddings has those of one metric, expected its name; got {names}")
    metric = chosen.metrics[0]
    return metric, chosen.requests[metric.name]


def _check_metric(root: store.Group, metric: Metric, path: str) -> None:
    found = root.attrs.get("metric", metric.name)
    if found != metric.name:
        raise store.StoreError(
            f"{path}: holds embeddings by {found}, not by {metric.name}: choose another path"
        )


def _stale_tasks(
    key: str,
    source: store.Group,
    root: store.Group,
    frames: str,
    out: str,
    metric: Metric,
    request: MetricRequest,
    settings: Settings,
    cluster: Cluster,
    report: EmbeddingsReport,
    run: str,
) -> list[EmbedTask]:
    """Bring a field's group into shape, declare what is out of date, and give the tasks that mend it."""
    origin = store.get_group(source, key)
    array = store.get_array(origin, schema.FRAMES)
    count, n = array.shape[:2]
    contents = [str(content) for content in store.read(store.get_array(origin, schema.CONTENT))]
    try:
        parts = _shapes_of_parts(metric, array)
    except FramesError as error:
        raise FramesError(f"{key}: {error}; --groups chooses other fields") from error
    report.values[key] = sum(map(math.prod, parts.values()))
    dtype = "float64" if metric.preprocessing.precision == "double" else "float32"
    sequences, together = _block_of(n, np.dtype(dtype).itemsize * report.values[key])
    group = _lay_out(root, origin, key, parts, dtype, sequences * n, together)
    provenance = store.get_group(group, schema.PROVENANCE)
    scope: Scope = settings.scope
    if scope == "dataset":
        scope = dataset_range(
            cluster,
            frames,
            [(key, row, content) for row, content in enumerate(contents)],
            provenance,
            metric.preprocessing,
        )
    tasks = []
    columns = _labels(origin, key)
    fingerprints = store.get_array(group, FINGERPRINT)
    recorded, of_blocks, reasons = (
        store.read(store.get_array(group, name)) for name in (FINGERPRINT, DIGEST, FAILURE)
    )
    for block, first in enumerate(range(0, count, sequences)):
        own = tuple(contents[first : first + sequences])
        rows = slice(first * n, (first + len(own)) * n)
        labels = digests.hash_labels({name: column[rows] for name, column in columns.items()})
        identity = block_identity(key, metric.name, block, labels)
        wanted = _fingerprint(own, metric.specification_hash, scope)
        bound = digests.binds(str(of_blocks[block]), identity, block_texts(wanted, parts, reasons[rows]))
        if recorded[block] == wanted and bound:
            report.up_to_date += len(own) * n
        else:
            report.unrecorded += bool(recorded[block] == wanted)
            tasks.append(
                EmbedTask(
                    frames,
                    out,
                    key,
                    block,
                    first,
                    n,
                    own,
                    together,
                    request,
                    scope,
                    wanted,
                    identity,
                    run,
                )
            )
            if recorded[block]:
                # Before anything else changes, nothing that is out of date counts as done.
                store.write_rows(fingerprints, block, np.array([""], dtype=object))
    for name, column in columns.items():
        store.write_rows(store.get_array(group, name), 0, column)
    _describe(group, metric, scope)
    return tasks


def _fingerprint(contents: Sequence[str], specification_hash: str, scope: Scope) -> str:
    made_of = {"contents": contents, "specification": specification_hash, "scope": scope_identity(scope)}
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]


def _shapes_of_parts(metric: Metric, frames: store.Array) -> dict[str, tuple[int, ...]]:
    """Shape of each part of a frame's embedding, from one frame of zeros."""
    check_fits(frames, 0)
    nothing = np.zeros((1, *frames.shape[2:]), frames.dtype)
    with torch.no_grad():
        embedding = metric.embed_prepared(metric.prepare(nothing, (0.0, 1.0)))
    return {name: tuple(part.shape[1:]) for name, part in embedding.parts.items()}


def _block_of(n: int, frame_bytes: int) -> tuple[int, int]:
    """How many sequences of n frames make a block, and how many frames a chunk: whole ones of that block."""
    fits = max(1, BLOCK_BYTES // max(1, frame_bytes))
    if n <= fits:
        return fits // n, fits // n * n
    return 1, max(part for part in range(1, fits + 1) if n % part == 0)


def _lay_out(
    root: store.Group,
    origin: store.Group,
    key: str,
    parts: Mapping[str, tuple[int, ...]],
    dtype_of_parts: str,
    block: int,
    together: int,
) -> store.Group:
    """Bring a field's group into the shape of its frames: metadata first, then tasks write values alone.

    What is there with other chunks, or embeddings of another shape, is deleted.
    """
    count, n = store.get_array(origin, schema.FRAMES).shape[:2]
    rows, blocks = count * n, -(-count * n // block)
    layout: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...], Any]] = {
        name: ((rows, *shape), (together, *shape), (schema.FRAME, *_dims(name, shape)), dtype_of_parts)
        for name, shape in parts.items()
    }
    for name, dtype in COLUMNS.items():
        layout[name] = ((rows,), (NAMES_TOGETHER,), (schema.FRAME,), dtype)
    layout[FAILURE] = ((rows,), (block,), (schema.FRAME,), str)
    layout[DIGEST] = layout[FINGERPRINT] = ((blocks,), (1,), (BLOCK,), str)
    if key in root and not _fits(store.get_group(root, key), layout):
        store.delete(root, key)
    group = root.require_group(key)
    group.require_group(schema.PROVENANCE)
    for name, (shape, chunks, dims, dtype) in layout.items():
        if name not in group:
            store.create_array(group, name, shape=shape, chunks=chunks, dims=dims, dtype=dtype)
        store.resize_rows(store.get_array(group, name), shape[0])
    return group


def _dims(name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    if name == FEATURES and len(shape) == 1:
        return ("feature",)
    return tuple(f"{name}_{axis}" for axis in range(len(shape)))


def _fits(group: store.Group, layout: Mapping[str, tuple[Any, ...]]) -> bool:
    """Whether what is there differs from a layout by the number of rows at most."""
    if not {*group.array_keys()} <= {*layout}:
        return False
    there = {name: store.get_array(group, name) for name in layout if name in group}
    return all(
        array.shape[1:] == layout[name][0][1:] and array.chunks == layout[name][1]
        for name, array in there.items()
    )


def _labels(origin: store.Group, key: str) -> dict[str, np.ndarray]:
    """List what each frame of a field is: its field, sequence, number and parameter, (frame,)."""
    count, n = store.get_array(origin, schema.FRAMES).shape[:2]
    sequences = store.read(store.get_array(origin, schema.SEQUENCE))
    return {
        schema.FIELD: np.full(count * n, key, dtype=object),
        schema.SEQUENCE: np.repeat(sequences, n),
        schema.NUMBER: np.tile(np.arange(n, dtype=np.int32), count),
        schema.PARAMETER: store.read(store.get_array(origin, schema.PARAMETER)).reshape(-1),
    }


def _describe(group: store.Group, metric: Metric, scope: Scope) -> None:
    """Say whose embeddings these are, and what made them."""
    store.set_attributes(
        group,
        {
            "metric": metric.name,
            "specification": metric.specification(),
            "scope": scope,
            "euclidean": metric.info.feature_distance == "euclidean",
            "feature_distance": metric.info.feature_distance,
        },
    )


def _run(
    tasks: Sequence[EmbedTask],
    request: MetricRequest,
    cluster: Cluster,
    root: store.Group,
    progress: Progress | None,
    report: EmbeddingsReport,
) -> None:
    """Run the tasks. One that fails every time leaves its block to the next run, with the reason recorded."""
    if not tasks:
        return
    client = cluster.client
    if client is not None:
        dismiss_unfit_workers(client, [request])
        prewarm(client, [request])
    if progress is not None:
        progress(0, len(tasks))
    given_up = []
    try:
        outcomes = run_bounded(client, write_block_of_embeddings, ((task,) for task in tasks))
        for done, ((task,), result, error) in enumerate(outcomes, start=1):
            if error is None:
                report.computed += result
                report.blocks += 1
            elif store.is_full_disk(error):
                raise error  # as would all others
            else:
                given_up.append((task, reason_of(error)))
            if progress is not None:
                progress(done, len(tasks))
    finally:
        # Now nobody else writes.
        for task, reason in given_up:
            group = store.get_group(root, task.key)
            _write_record(group, task, _parts_of(group), [reason] * (len(task.contents) * task.n))


# ---------------------------------------------------------------- on a worker


def write_block_of_embeddings(task: EmbedTask) -> int:
    """Compute and write one block; returns how many of its frames are done. Runs on a worker."""
    metric = get_metric(task.request)
    origin = store.get_group(store.open_store(task.frames), task.key)
    group = store.get_group(store.open_store(task.out, "r+"), task.key)
    names = _parts_of(group)
    start = task.first * task.n
    pending: list[dict[str, np.ndarray]] = []
    hashers = {name: xxhash.xxh3_64() for name in names}
    reasons: list[str] = []
    whole = True
    for row, content in enumerate(task.contents, task.first):
        try:
            frames, damage = read_sequence(origin, row, content), ""
        except NOT_READ as error:
            frames, damage = np.empty(0), why_not_read(error)
        step = min(task.n, task.together)
        for first in range(0, task.n, step):
            if damage:
                values, why, good = _nothing(group, names, step), [damage] * step, False
            else:
                part = frames[first : first + step]
                due = trials.is_due(task.run, metric)
                values, why, good = _embedded_or_why(group, metric, part, task.scope, names)
                if due and good and "" in why:
                    _try_metric(metric, part, task, values)
            if whole and not good:
                # Not done: the next run tries again. Another copy may have finished the block, and its
                # fingerprint must not stand for what comes now.
                whole = False
                _check_wanted(task)
                _write_fingerprint(group, task, "")
            pending.append(values)
            reasons += why
            if len(reasons) % task.together == 0:
                _check_wanted(task)
                start = _write(group, hashers, start, pending)
    _check_wanted(task)
    _write(group, hashers, start, pending)
    of_values = "".join(hasher.hexdigest() for hasher in hashers.values()) if whole else ""
    _write_record(group, task, names, reasons, of_values)
    if not whole:
        return 0
    _check_wanted(task)
    # Last: it says that all else is there.
    _write_fingerprint(group, task, task.fingerprint)
    return len(reasons)


def _parts_of(group: store.Group) -> list[str]:
    """List the parts of the embeddings in a field's group, in the order in which digests have them."""
    return sorted(name for name in group.array_keys() if name not in COLUMNS)


def _write_record(
    group: store.Group, task: EmbedTask, names: Sequence[str], reasons: Sequence[str], values: str = ""
) -> None:
    """Write why frames of a block have no embedding, and the block's digest.

    ``values`` has the hashes of all parts; of a block that isn't done none counts, nor does a fingerprint.
    """
    texts = block_texts(task.fingerprint if values else "", names, reasons)
    digest = digests.bind(task.identity, texts, values)
    store.write_rows(store.get_array(group, FAILURE), task.first * task.n, np.array(reasons, dtype=object))
    store.write_rows(store.get_array(group, DIGEST), task.block, np.array([digest], dtype=object))


def _write_fingerprint(group: store.Group, task: EmbedTask, fingerprint: str) -> None:
    store.write_rows(store.get_array(group, FINGERPRINT), task.block, np.array([fingerprint], dtype=object))


def _check_wanted(task: EmbedTask) -> None:
    """Write nothing when another copy was faster, or the run is over and the next may be writing."""
    if not still_wanted():
        raise store.StoreError(f"{task.out}: nobody waits for block {task.block} of {task.key} any more")


def _embedded_or_why(
    group: store.Group, metric: Metric, frames: np.ndarray, scope: Scope, names: Sequence[str]
) -> tuple[dict[str, np.ndarray], list[str], bool]:
    """:func:`_embedded`, NaN and the error of frames at which the metric raises, and whether none is."""
    parts: list[dict[str, np.ndarray]] = []
    reasons: list[str] = []
    whole = True
    for _, found in in_batch_or_alone(lambda some: _embedded(metric, some, scope), frames, metric.name):
        values, why = (_nothing(group, names, 1), [found]) if isinstance(found, str) else found
        whole = whole and not isinstance(found, str)
        parts.append(values)
        reasons += why
    return {name: np.concatenate([part[name] for part in parts]) for name in names}, reasons, whole


def _try_metric(metric: Metric, frames: np.ndarray, task: EmbedTask, values: dict[str, np.ndarray]) -> None:
    """Embed the first frames that a worker is given in a run once more.

    Raises
    ------
    lsim.ClaimError
        When something else comes out.
    """
    with trials.trial(task.run, metric) as tried:
        with other_random_numbers():
            again, _ = _embedded(tried, frames, task.scope)
        for name, part in values.items():
            exact = metric.device.type == "cpu"
            tried.claims.check_repeated(part, again[name], f"embedding {name!r}", exact=exact)


def _embedded(metric: Metric, frames: np.ndarray, scope: Scope) -> tuple[dict[str, np.ndarray], list[str]]:
    """Each part of the embeddings of some frames, (frame, …), and why a frame is NaN."""
    prepared = metric.prepare(frames, scope)
    with torch.no_grad():
        parts = metric.embed_prepared(prepared).parts
    values = {name: part.to(metric.dtype).cpu().numpy() for name, part in parts.items()}
    reasons = [""] * len(frames)
    finite = finite_frames(frames)
    for k in np.flatnonzero(~prepared.comparable):
        reasons[k] = "no pixel is left" if metric.preprocessing.mask else "the frame holds NaN or infinity"
        for part in values.values():
            part[k] = np.nan
    if not metric.preprocessing.mask:
        for name, part in values.items():
            for k in np.flatnonzero(np.isnan(part.reshape(len(part), -1)).any(axis=1) & finite):
                reasons[k] = f"the metric gave NaN for {name} of a finite frame"
    return values, reasons


def _nothing(group: store.Group, names: Sequence[str], rows: int) -> dict[str, np.ndarray]:
    """Embeddings of frames that cannot be read."""
    arrays = {name: store.get_array(group, name) for name in names}
    return {name: np.full((rows, *array.shape[1:]), np.nan, array.dtype) for name, array in arrays.items()}


def _write(
    group: store.Group,
    hashers: Mapping[str, xxhash.xxh3_64],
    start: int,
    pending: list[dict[str, np.ndarray]],
) -> int:
    """Write whole chunks and read them back; empties ``pending`` and returns the row after them.

    ``hashers`` have the values of each part so far, and take these as well.
    """
    if not pending:
        return start
    stop = start
    for name, hasher in hashers.items():
        values = np.concatenate([part.pop(name) for part in pending])
        stop = start + len(values)
        array = store.get_array(group, name)
        store.write_rows(array, start, values)
        if not np.array_equal(store.read(array, slice(start, stop)), values, equal_nan=True):
            raise store.StoreError(f"{array.store_path}: rows {start}:{stop} read back differently")
        hasher.update(digests.bytes_of(values))
    pending.clear()
    return stop
