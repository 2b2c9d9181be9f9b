"""frames.zarr → embeddings.zarr: a metric's embedding of every frame, for other search libraries.

A learned metric is a distance between vectors. Where it is the Euclidean distance, an index over these
vectors searches by it. A block is some whole sequences of one field. A worker writes its rows, then the
fingerprint that says they are done: a hash of the frames' content, of all that determines the metric's
values, and of the range that frames were normalised by. A digest beside it binds the values to the metric,
the block and the names of its frames (:mod:`pipeline.storage.digests`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
import xxhash

from lsim.claims import other_random_numbers
from lsim.metric import Metric
from lsim.preprocess import FramesError, Scope, finite_frames, scope_identity
from pipeline.metrics.fields import checked_fields
from pipeline.metrics.settings import Settings, choose_metrics
from pipeline.metrics.value_range import dataset_range
from pipeline.stage import trials
from pipeline.stage.results import open_results
from pipeline.stage.retry_single import in_batch_or_alone
from pipeline.stage.run import MetricWorkers, Progress, run_blocks
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
)
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile
from pipeline.workers.worker_metrics import MetricRequest, get_metric, still_wanted

BLOCK_BYTES = 64 * 2**20
"""Most bytes of a block's embeddings, and of a chunk: some 70 frames of LSiM, a second of work."""

NAMES_TOGETHER = 1 << 14
"""Frames whose names make a chunk."""

COLUMNS: dict[str, Any] = dict(zip(LABELS, (str, str, "int32", "float64"), strict=True))
"""Labels of each frame, with their dtypes."""

BLOCK = "block"
FAILURE = f"{schema.PROVENANCE}/{schema.FAILURE}"
DIGEST = f"{schema.PROVENANCE}/{schema.DIGEST}"
FINGERPRINT = f"{schema.PROVENANCE}/{schema.FINGERPRINT}"

FEATURES = "features"
"""Part of an embedding that a metric's ``feature_distance`` refers to."""


@dataclass(frozen=True)
class EmbeddingFailure:
    """Frames of a sequence that have no embedding, and why."""

    field: str
    sequence: str
    numbers: tuple[int, ...]
    reason: str


@dataclass
class EmbeddingsReport:
    """Summary of a run of :func:`compute_embeddings`.

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
        How the metric compares features: "euclidean", "squared euclidean", or empty.
    failures : list of EmbeddingFailure
        All failures that the store records.
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

    def summarise(self, root: store.Group) -> dict[str, Any]:
        """Return what the run did, for its record."""
        return {"blocks": self.blocks, "frames": self.computed} if self.blocks else {}


@dataclass(frozen=True)
class FieldBlocks:
    """Description that all blocks of a field share.

    Attributes
    ----------
    frames, out, key : str
        Stores that are read and written, and the field's group in both.
    request : MetricRequest
    specification_hash : str
    scope : scope
    n, sequences, frames_per_chunk : int
        Frames of a sequence, sequences of a block, and frames of a chunk of embeddings.
    run : str
        Name of the run, in which each worker tries the metric once.
    """

    frames: str
    out: str
    key: str
    request: MetricRequest
    specification_hash: str
    scope: Scope
    n: int
    sequences: int
    frames_per_chunk: int
    run: str = ""


@dataclass(frozen=True)
class Block:
    """Whole sequences of a field, with all that a worker needs to embed them.

    Attributes
    ----------
    field : FieldBlocks
    index : int
    contents : tuple of str
        Content hash of each sequence.
    identity : bytes
        What the block's digest is bound to.
    """

    field: FieldBlocks
    index: int
    contents: tuple[str, ...]
    identity: bytes = b""

    @property
    def first(self) -> int:
        """Row of the first sequence."""
        return self.index * self.field.sequences

    @property
    def rows(self) -> slice:
        """Frames of the block among those of the field."""
        return slice(self.first * self.field.n, (self.first + len(self.contents)) * self.field.n)

    @property
    def label(self) -> str:
        """Description of the block in messages."""
        return f"{self.field.key}, sequences {self.first} to {self.first + len(self.contents) - 1}"

    @property
    def fingerprint(self) -> str:
        """Hash of all that determines the values."""
        inputs = {
            "contents": self.contents,
            "specification": self.field.specification_hash,
            "scope": scope_identity(self.field.scope),
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


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
        with Cluster(Profile()) as local_cluster:
            return compute_embeddings(
                frames, out, settings, groups=groups, cluster=local_cluster, progress=progress
            )
    start = time.perf_counter()
    _check_scope(settings.scope)
    metric, request = _one_metric(settings)
    # Workers may run in another folder.
    frames_path, out_path = absolute(frames), absolute(out)
    source = store.open_store(frames_path)
    keys = checked_fields(source, frames_path, groups)
    attributes = {"metric": metric.name, "frames": relative(frames_path, out_path)}
    workers = MetricWorkers(cluster, [request])
    report = EmbeddingsReport(metric.name, feature_distance=metric.info.feature_distance)
    with open_results(
        out_path,
        schema.EMBEDDINGS_STORE,
        schema.NUMBER,
        source,
        check=lambda root: _check_metric(root, metric, out_path),
    ) as results:
        store.set_attributes(results.root, attributes)
        stale: list[Block] = []
        for key in keys:
            origin = store.get_group(source, key)
            shapes = _shapes_of_parts(metric, origin, key)
            report.values[key] = sum(map(math.prod, shapes.values()))
            group = _lay_out(results.root, origin, key, shapes, metric)
            # With the scope "dataset", workers read the frames whose range isn't recorded yet.
            scope = _find_scope(group, origin, metric, settings.scope, frames_path, cluster)
            n, sequences, chunk = _sizes(group, origin)
            field = FieldBlocks(
                frames_path,
                out_path,
                key,
                request,
                metric.specification_hash,
                scope,
                n,
                sequences,
                chunk,
                results.run,
            )
            blocks, fresh, damaged = _list_stale(group, origin, field, metric.name)
            stale += blocks
            report.up_to_date += fresh
            report.unrecorded += damaged
            _describe(group, origin, metric, scope)
        with results.recorded(start, {"scope": settings.scope}, report.summarise, workers, attributes):
            _run(stale, workers, results.root, report, progress)
    report.seconds, report.cluster = time.perf_counter() - start, workers.description
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
        embeddings = CheckedEmbeddings(root, key)
        reasons = embeddings.failures.copy()
        for block in range(embeddings.count):
            if embeddings.is_damaged(block):
                reasons[embeddings.rows(block)] = OTHER_EMBEDDING_RECORD
            elif not embeddings.is_bound(block):
                reasons[embeddings.rows(block)] = ""  # of a run that was stopped
        by_reason: dict[tuple[str, str], list[int]] = {}
        for row in np.flatnonzero(reasons != ""):
            sequence, number = (embeddings.labels[name][row] for name in (schema.SEQUENCE, schema.NUMBER))
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
    embeddings = CheckedEmbeddings(root, key)
    blocks = [embeddings.read(block) for block in range(embeddings.count)]
    variables: dict[str, Any] = {name: (schema.FRAME, column) for name, column in embeddings.labels.items()}
    for name, array in embeddings.parts.items():
        values = [block[name] for block in blocks]
        dims = (schema.FRAME, *_dims(name, array.shape[1:]))
        variables[name] = (dims, np.concatenate(values) if values else np.empty(array.shape, array.dtype))
    return xr.Dataset(variables, attrs=dict(store.get_group(root, key).attrs)), list(embeddings.left_out)


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
    choice = choose_metrics(settings)
    if settings.metrics == "all" or len(choice.metrics) != 1:
        names = ", ".join(metric.name for metric in choice.metrics)
        raise ValueError(f"a store of embeddings has those of one metric, expected its name; got {names}")
    metric = choice.metrics[0]
    return metric, choice.requests[metric.name]


def _check_metric(root: store.Group, metric: Metric, path: str) -> None:
    recorded = root.attrs.get("metric", metric.name)
    if recorded != metric.name:
        raise store.StoreError(
            f"{path}: holds embeddings by {recorded}, not by {metric.name}: choose another path"
        )


def _shapes_of_parts(metric: Metric, origin: store.Group, key: str) -> dict[str, tuple[int, ...]]:
    """Find the shape of each part of a frame's embedding by embedding one frame of zeros."""
    frames = store.get_array(origin, schema.FRAMES)
    check_fits(frames, 0)
    zeros = np.zeros((1, *frames.shape[2:]), frames.dtype)
    try:
        with torch.no_grad():
            embedding = metric.embed_prepared(metric.prepare(zeros, (0.0, 1.0)))
    except FramesError as error:
        raise FramesError(f"{key}: {error}; --groups chooses other fields") from error
    return {name: tuple(part.shape[1:]) for name, part in embedding.parts.items()}


def _block_of(n: int, frame_bytes: int) -> tuple[int, int]:
    """Choose how many sequences of n frames make a block, and how many frames a chunk: a divisor of that."""
    fits = max(1, BLOCK_BYTES // max(1, frame_bytes))
    if n <= fits:
        return fits // n, fits // n * n
    return 1, max(part for part in range(1, fits + 1) if n % part == 0)


def _lay_out(
    root: store.Group, origin: store.Group, key: str, shapes: Mapping[str, tuple[int, ...]], metric: Metric
) -> store.Group:
    """Bring a field's group into the shape of its frames: metadata first, then tasks write values alone.

    A group with other chunks, or embeddings of other ``shapes``, is deleted.
    """
    dtype_of_parts = "float64" if metric.preprocessing.precision == "double" else "float32"
    count, n = store.get_array(origin, schema.FRAMES).shape[:2]
    values = sum(map(math.prod, shapes.values()))
    sequences, rows_per_chunk = _block_of(n, np.dtype(dtype_of_parts).itemsize * values)
    rows, blocks = count * n, -(-count // sequences)
    layout: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...], Any]] = {
        name: ((rows, *shape), (rows_per_chunk, *shape), (schema.FRAME, *_dims(name, shape)), dtype_of_parts)
        for name, shape in shapes.items()
    }
    for name, dtype in COLUMNS.items():
        layout[name] = ((rows,), (NAMES_TOGETHER,), (schema.FRAME,), dtype)
    layout[FAILURE] = ((rows,), (sequences * n,), (schema.FRAME,), str)
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
    """Tell whether a group differs from a layout by the number of rows at most."""
    if not {*group.array_keys()} <= {*layout}:
        return False
    arrays = {name: store.get_array(group, name) for name in layout if name in group}
    return all(
        array.shape[1:] == layout[name][0][1:] and array.chunks == layout[name][1]
        for name, array in arrays.items()
    )


def _sizes(group: store.Group, origin: store.Group) -> tuple[int, int, int]:
    """Look up frames of a sequence, sequences of a block, and frames of a chunk of a group laid out."""
    n = store.get_array(origin, schema.FRAMES).shape[1]
    block = store.get_array(group, FAILURE).chunks[0]
    return n, block // n, store.get_array(group, _parts_of(group)[0]).chunks[0]


def _find_scope(
    group: store.Group, origin: store.Group, metric: Metric, scope: Scope, frames: str, cluster: Cluster
) -> Scope:
    """Give the scope of a field; the range of a data set is computed where it isn't recorded."""
    if scope != "dataset":
        return scope
    contents = store.read(store.get_array(origin, schema.CONTENT))
    sequences = [(group.path, row, str(content)) for row, content in enumerate(contents)]
    provenance = store.get_group(group, schema.PROVENANCE)
    return dataset_range(cluster, frames, sequences, provenance, metric.preprocessing)


def _list_stale(
    group: store.Group, origin: store.Group, field: FieldBlocks, metric: str
) -> tuple[list[Block], int, int]:
    """List the blocks that are out of date, and delete their fingerprints before anything changes.

    Returns
    -------
    blocks : list of Block
    fresh : int
        Frames that are up to date.
    damaged : int
        Blocks with today's fingerprint whose record is not the one that was written with it.
    """
    contents = [str(content) for content in store.read(store.get_array(origin, schema.CONTENT))]
    columns, parts = _labels(origin, field.key), _parts_of(group)
    fingerprints, recorded_digests, reasons = (
        store.read(store.get_array(group, name)) for name in (FINGERPRINT, DIGEST, FAILURE)
    )
    blocks, fresh, damaged = [], 0, 0
    for index, first in enumerate(range(0, len(contents), field.sequences)):
        block = Block(field, index, tuple(contents[first : first + field.sequences]))
        labels = digests.hash_labels({name: column[block.rows] for name, column in columns.items()})
        block = replace(block, identity=block_identity(field.key, metric, index, labels))
        fingerprint = block.fingerprint
        texts = block_texts(fingerprint, parts, reasons[block.rows])
        is_recorded = fingerprints[index] == fingerprint
        if is_recorded and digests.binds(str(recorded_digests[index]), block.identity, texts):
            fresh += len(block.contents) * field.n
            continue
        damaged += bool(is_recorded)
        blocks.append(block)
        if fingerprints[index]:
            _write_fingerprint(group, block, "")
    return blocks, fresh, damaged


def _labels(origin: store.Group, key: str) -> dict[str, np.ndarray]:
    """List field, sequence, number and parameter of each frame, (frame,)."""
    count, n = store.get_array(origin, schema.FRAMES).shape[:2]
    sequences = store.read(store.get_array(origin, schema.SEQUENCE))
    return {
        schema.FIELD: np.full(count * n, key, dtype=object),
        schema.SEQUENCE: np.repeat(sequences, n),
        schema.NUMBER: np.tile(np.arange(n, dtype=np.int32), count),
        schema.PARAMETER: store.read(store.get_array(origin, schema.PARAMETER)).reshape(-1),
    }


def _describe(group: store.Group, origin: store.Group, metric: Metric, scope: Scope) -> None:
    """Write the labels of the frames, and what embeddings are made with."""
    for name, column in _labels(origin, group.path).items():
        store.write_rows(store.get_array(group, name), 0, column)
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
    blocks: Sequence[Block],
    workers: MetricWorkers,
    root: store.Group,
    report: EmbeddingsReport,
    progress: Progress | None,
) -> None:
    """Compute stale blocks. One that fails every time is left to the next run, its reason recorded."""
    if not blocks:
        return
    batches = ((block,) for block in blocks)
    with run_blocks(workers.start(), embed_block, batches, len(blocks), progress) as outcomes:
        for (block,), frames, reason in outcomes:
            if frames is None:
                group = store.get_group(root, block.field.key)
                frames_of_block = len(block.contents) * block.field.n
                _write_record(group, block, _parts_of(group), [reason] * frames_of_block)
            else:
                report.blocks += 1
                report.computed += frames


# ---------------------------------------------------------------- on a worker


def embed_block(block: Block) -> int:
    """Compute and write one block. Runs on a worker.

    Returns
    -------
    int
        Frames of the block that are done: all of them, or none.
    """
    field = block.field
    metric = get_metric(field.request)
    origin = store.get_group(store.open_store(field.frames), field.key)
    group = store.get_group(store.open_store(field.out, "r+"), field.key)
    writer = _Writer(group, block)
    reasons: list[str] = []
    whole = True
    for part in _embed(origin, metric, block, writer):
        if whole and not part.final:
            # Not done: the next run tries again. An attempt on a lost worker may have finished the block, and
            # its fingerprint must not stand for what comes now.
            whole = False
            _check_wanted(block)
            _write_fingerprint(group, block, "")
        writer.add(part.values)
        reasons += part.reasons
    writer.flush()
    _write_record(group, block, writer.names, reasons, writer.digest() if whole else "")
    if not whole:
        return 0
    _check_wanted(block)
    # Last: it says that all else is there.
    _write_fingerprint(group, block, block.fingerprint)
    return len(reasons)


@dataclass(frozen=True)
class _Part:
    """Embeddings of some frames by part, (frame, …), and why a frame has none.

    One that isn't ``final`` is tried again by the next run.
    """

    values: dict[str, np.ndarray]
    reasons: list[str]
    final: bool = True


def _embed(origin: store.Group, metric: Metric, block: Block, writer: _Writer) -> Iterator[_Part]:
    """Read the sequences of a block and embed them, a chunk at most at a time."""
    field = block.field
    step = min(field.n, field.frames_per_chunk)
    for row, content in enumerate(block.contents, block.first):
        try:
            frames = read_sequence(origin, row, content)
        except NOT_READ as error:
            for _ in range(0, field.n, step):
                yield _Part(writer.missing(step), [why_not_read(error)] * step, final=False)
            continue
        for first in range(0, field.n, step):
            chunk = frames[first : first + step]
            is_due = trials.is_due(field.run, metric)
            part = _embed_or_explain(metric, chunk, field.scope, writer)
            if is_due and part.final and "" in part.reasons:
                _try_metric(metric, chunk, block, part.values)
            yield part


def _parts_of(group: store.Group) -> list[str]:
    """List the parts of the embeddings in a field's group, in the order in which digests have them."""
    return sorted(name for name in group.array_keys() if name not in COLUMNS)


def _write_record(
    group: store.Group, block: Block, parts: Sequence[str], reasons: Sequence[str], values: str = ""
) -> None:
    """Write why frames of a block have no embedding, and the block's digest.

    ``values`` has the hashes of all parts; of a block that isn't done none counts, nor does a fingerprint.
    """
    texts = block_texts(block.fingerprint if values else "", parts, reasons)
    digest = digests.bind(block.identity, texts, values)
    store.write_rows(store.get_array(group, FAILURE), block.rows.start, np.array(reasons, dtype=object))
    store.write_rows(store.get_array(group, DIGEST), block.index, np.array([digest], dtype=object))


def _write_fingerprint(group: store.Group, block: Block, fingerprint: str) -> None:
    store.write_rows(store.get_array(group, FINGERPRINT), block.index, np.array([fingerprint], dtype=object))


def _check_wanted(block: Block) -> None:
    """Write nothing once the run is over, as the next may be writing."""
    if not still_wanted():
        raise store.StoreError(
            f"{block.field.out}: block {block.index} of {block.field.key} is not waited for any more"
        )


def _embed_or_explain(metric: Metric, frames: np.ndarray, scope: Scope, writer: _Writer) -> _Part:
    """Embed frames; those at which the metric raises are NaN, with the error as their reason."""
    parts = []
    for _, result in in_batch_or_alone(lambda batch: _embedded(metric, batch, scope), frames, metric.name):
        if isinstance(result, str):
            parts.append(_Part(writer.missing(1), [result], final=False))
        else:
            parts.append(_Part(*result))
    return _Part(
        {name: np.concatenate([part.values[name] for part in parts]) for name in writer.names},
        [reason for part in parts for reason in part.reasons],
        all(part.final for part in parts),
    )


def _try_metric(metric: Metric, frames: np.ndarray, block: Block, values: dict[str, np.ndarray]) -> None:
    """Embed the first frames that a worker is given in a run once more.

    Raises
    ------
    lsim.ClaimError
        When something else comes out.
    """
    with trials.trial(block.field.run, metric) as copy:
        with other_random_numbers():
            repetition, _ = _embedded(copy, frames, block.field.scope)
        for name, part in values.items():
            exact = metric.device.type == "cpu"
            copy.claims.check_repeated(part, repetition[name], f"embedding {name!r}", exact=exact)


def _embedded(metric: Metric, frames: np.ndarray, scope: Scope) -> tuple[dict[str, np.ndarray], list[str]]:
    """Give each part of the embeddings of some frames, (frame, …), and why a frame is NaN."""
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


class _Writer:
    """Writer of embeddings of a block in whole chunks, which hashes them.

    Attributes
    ----------
    names : list of str
        Parts of the embeddings, in the order in which digests have them.
    """

    def __init__(self, group: store.Group, block: Block) -> None:
        self.names = _parts_of(group)
        self._block = block
        self._arrays = {name: store.get_array(group, name) for name in self.names}
        self._hashers = {name: xxhash.xxh3_64() for name in self.names}
        self._pending: list[dict[str, np.ndarray]] = []
        self._frames = 0
        self._start: int = block.rows.start

    def missing(self, frames: int) -> dict[str, np.ndarray]:
        """Make embeddings of frames that have none: NaN."""
        return {
            name: np.full((frames, *array.shape[1:]), np.nan, array.dtype)
            for name, array in self._arrays.items()
        }

    def add(self, values: dict[str, np.ndarray]) -> None:
        """Add embeddings of some frames, and write them when a chunk is full."""
        self._pending.append(values)
        self._frames += len(values[self.names[0]])
        if self._frames == self._block.field.frames_per_chunk:
            self.flush()

    def flush(self) -> None:
        """Write what is pending, and read it back."""
        if not self._pending:
            return
        _check_wanted(self._block)
        stop = self._start + self._frames
        for name, array in self._arrays.items():
            # Popped: what is written needs no second place in memory.
            values = np.concatenate([part.pop(name) for part in self._pending])
            store.write_rows(array, self._start, values)
            if not np.array_equal(store.read(array, slice(self._start, stop)), values, equal_nan=True):
                raise store.StoreError(f"{array.store_path}: rows {self._start}:{stop} read back differently")
            self._hashers[name].update(digests.bytes_of(values))
        self._pending.clear()
        self._start, self._frames = stop, 0

    def digest(self) -> str:
        """Join the hashes of all parts."""
        return "".join(hasher.hexdigest() for hasher in self._hashers.values())
