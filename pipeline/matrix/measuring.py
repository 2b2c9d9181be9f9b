"""What metrics take of a frame and of a pair, measured on a worker: what plans are made of."""

from __future__ import annotations

import math
import platform
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from lsim.embedding import Embedding
from lsim.metric import Metric
from lsim.preprocess import FramesError, Scope, range_of
from pipeline.matrix.embedding_cache import EmbeddedBlock, embed_block
from pipeline.matrix.frame_blocks import FrameBlock, read_block
from pipeline.matrix.tiles import ROWS_AT_ONCE
from pipeline.metrics.pixel_weights import FieldWeights, get_weighted
from pipeline.storage import chunks, schema, store
from pipeline.workers.worker_metrics import MetricRequest, process_device

SIDE_TO_BEGIN_WITH = 8
"""Frames on a side of the square of pairs that is timed first."""
LONG_ENOUGH_S = 0.05
"""What such a square takes to be timed well."""


@dataclass(frozen=True)
class Measured:
    """What a family of metrics takes, measured on some of the archive's frames.

    Attributes
    ----------
    frame_bytes : int
        Of a frame's embedding.
    prepared_bytes : int
        Of a frame as the metric takes it.
    raw_bytes, sequence_bytes : int
        Of a frame as it is stored, and of the largest sequence.
    process_bytes : int
        Of the process before it holds embeddings; 0 for the memory of a GPU.
    embed_seconds, pair_seconds : float
        A frame: read, prepare, embed. A pair: compare; all metrics of the family.
    copies : bool
        Whether comparisons may copy embeddings, in double.
    fault : str
        What could not be measured, and why: it counts as nothing.
    """

    frame_bytes: int
    prepared_bytes: int
    raw_bytes: int
    sequence_bytes: int
    process_bytes: int
    embed_seconds: float
    pair_seconds: float
    copies: bool = False
    fault: str = ""


def measure(
    frames: str,
    requests: Sequence[MetricRequest],
    blocks: Sequence[FrameBlock],
    sequence_bytes: int,
    n: int,
    physical: bool = False,
    weights: FieldWeights | None = None,
) -> Measured:
    """Measure what a family of metrics takes of the first of some blocks that it can embed.

    Where it can embed none of them, as they are damaged, hold NaN or make the metric raise, frames of noise
    are measured: others of the archive may be whole. A metric that raises at those, too, takes nothing, and
    the result says so. Runs on a worker. Times are of a second pass: the first loads and compiles. ``n``
    frames are to be compared; ``physical`` ones in their own units, which take twice the memory.

    Raises
    ------
    MemoryError
        When frames can't even be tried.
    """
    source = store.open_store(frames)
    metrics = [get_weighted(request, weights) for request in requests]
    process = psutil.Process().memory_info().rss if metrics[0].device.type == "cpu" else 0
    for block in blocks:
        values = next(read_block(source, block, len(block))).frames
        if values is None:
            continue
        try:
            lo, hi = range_of(values, metrics[0].preprocessing)
        except FramesError:
            continue
        found = (tuple(np.nan_to_num(lo).tolist()), tuple(np.nan_to_num(hi).tolist()))
        scope: Scope = "none" if physical else found
        embedded = embed_block(source, block, metrics[0], scope)
        if embedded.embedding is None or embedded.undone:
            continue
        began = time.perf_counter()
        embedded = embed_block(source, block, metrics[0], scope)
        break
    else:
        if not blocks:
            return Measured(0, 0, 0, sequence_bytes, process, 0.0, 0.0)
        values, scope = _noise(source, blocks[0]), "none" if physical else (0.0, 1.0)
        try:
            embedded = _embedded(metrics[0], values, scope)
        except MemoryError:
            raise
        except Exception as error:
            return Measured(0, 0, 0, sequence_bytes, process, 0.0, 0.0, fault=_said(metrics[0], error))
        began = time.perf_counter()
        embedded = _embedded(metrics[0], values, scope)
    _wait_for(metrics[0])
    embed_seconds = (time.perf_counter() - began) / len(values)
    pair_seconds, faults = 0.0, []
    for metric in metrics:
        try:
            pair_seconds += _seconds_of_pair(metric, embedded, n)
        except MemoryError:
            raise
        except Exception as error:
            faults.append(_said(metric, error))
    prepared = metrics[0].prepare(values[:1], scope)
    return Measured(
        embedded.nbytes // len(values),
        prepared.values[0].numel() * prepared.values.element_size(),
        values[0].nbytes,
        sequence_bytes,
        process,
        embed_seconds,
        pair_seconds,
        any(metric.copies_to_compare for metric in metrics),
        "; ".join(faults),
    )


def _said(metric: Metric, error: Exception) -> str:
    return f"{metric.name}: {type(error).__name__}: {' '.join(str(error).split())}"


def _noise(source: store.Group, block: FrameBlock) -> np.ndarray:
    """As many frames as a block has, of the shape of its first, with values in 0 to 1: (n, y, x, channel)."""
    array = store.get_array(source, f"{block.pieces[0].key}/{schema.FRAMES}")
    chunks.check_fits(array, 0)
    noise = np.random.default_rng(0).random((len(block), *array.shape[2:]), np.float32)
    return noise.round().astype(array.dtype) if array.dtype.kind in "iu" else noise.astype(array.dtype)


def _embedded(metric: Metric, frames: np.ndarray, scope: Scope) -> EmbeddedBlock:
    with torch.no_grad():
        embedding = metric.embed_prepared(metric.prepare(frames, scope))
    return EmbeddedBlock(embedding, np.ones(len(frames), bool))


def _seconds_of_pair(metric: Metric, embedded: EmbeddedBlock, n: int) -> float:
    """Seconds of one pair amid many, the frames there are, over and over.

    Of so many as take long enough to be timed, some metrics take milliseconds a pair; of no more than there
    are among ``n`` frames.
    """
    most = min(ROWS_AT_ONCE if metric.device.type == "cpu" else 1024, max(n, SIDE_TO_BEGIN_WITH))
    side = min(SIDE_TO_BEGIN_WITH, most)
    assert embedded.embedding is not None
    while True:
        times = -(-side // len(embedded.comparable))
        parts = {
            name: part.repeat(times, *[1] * (part.ndim - 1))[:side]
            for name, part in embedded.embedding.parts.items()
        }
        seconds = math.inf
        for _ in range(2):
            a, b = Embedding(dict(parts)), Embedding(dict(parts))
            began = time.perf_counter()
            with torch.no_grad():
                metric.distance_block(a, b)
            _wait_for(metric)
            seconds = min(seconds, time.perf_counter() - began)
        if side == most or seconds > LONG_ENOUGH_S:
            return seconds / side**2
        side = min(2 * side, most)


def _wait_for(metric: Metric) -> None:
    if metric.device.type == "cuda":
        torch.cuda.synchronize(metric.device)


@dataclass(frozen=True)
class Device:
    """A worker's device: its kind, which one it is of all there are, and the bytes that are free there."""

    kind: str
    identity: str
    free: int


def device_of_worker() -> Device:
    """This process's device; 0 bytes are said to be free of a CPU."""
    device = process_device()
    if device.type != "cuda":
        return Device(device.type, platform.node(), 0)
    # Processes may each number those alone that they see.
    identity = f"{platform.node()} {torch.cuda.get_device_properties(device).uuid}"
    return Device(device.type, identity, torch.cuda.mem_get_info(device)[0])


def share_of_device(devices: Collection[Device], kind: str) -> int:
    """The bytes of a device of some kind that each worker has at least, of those that share it."""
    users = Counter(one.identity for one in devices if one.kind == kind)
    return min(one.free // users[one.identity] for one in devices if one.kind == kind)
