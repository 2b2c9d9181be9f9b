"""Measure on a worker the memory and time that metrics take for a frame and a pair; plans are made of it."""

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
"""Least seconds of a square that is timed well."""


@dataclass(frozen=True)
class Measured:
    """Memory and time that a family of metrics takes, measured on some of the archive's frames.

    Attributes
    ----------
    frame_bytes : int
        Size of a frame's embedding.
    prepared_bytes : int
        Size of a frame as the metric takes it.
    raw_bytes, sequence_bytes : int
        Size of a frame as it is stored, and of the largest sequence.
    process_bytes : int
        Memory of the process before it holds embeddings; 0 for the memory of a GPU.
    embed_seconds, pair_seconds : float
        Seconds to read, prepare and embed a frame, and to compare a pair by all metrics of the family.
    copies : bool
        Comparisons may copy embeddings, in double.
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
    """Measure what a family of metrics takes for the first of some blocks that it can embed.

    Where it can embed none of them, as they are damaged, hold NaN or make the metric raise, frames of noise
    are measured: others of the archive may be whole. A metric that raises at noise, too, takes nothing, and
    the result says so. Runs on a worker. Times are those of a second pass: the first loads and compiles.

    Parameters
    ----------
    frames : str
        Path of the ``frames.zarr``.
    requests : sequence of MetricRequest
        The family.
    blocks : sequence of FrameBlock
    sequence_bytes : int
        Size of the largest sequence.
    n : int
        Frames that are to be compared.
    physical : bool
        Frames are in their own units, which take twice the memory.
    weights : FieldWeights, optional

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
        bounds = (tuple(np.nan_to_num(lo).tolist()), tuple(np.nan_to_num(hi).tolist()))
        scope: Scope = "none" if physical else bounds
        embedded = embed_block(source, block, metrics[0], scope)
        if embedded.embedding is None or embedded.undone:
            continue
        start = time.perf_counter()
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
            return Measured(0, 0, 0, sequence_bytes, process, 0.0, 0.0, fault=_describe(metrics[0], error))
        start = time.perf_counter()
        embedded = _embedded(metrics[0], values, scope)
    _wait_for(metrics[0])
    embed_seconds = (time.perf_counter() - start) / len(values)
    pair_seconds, faults = 0.0, []
    for metric in metrics:
        try:
            pair_seconds += _seconds_of_pair(metric, embedded, n)
        except MemoryError:
            raise
        except Exception as error:
            faults.append(_describe(metric, error))
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


def _describe(metric: Metric, error: Exception) -> str:
    return f"{metric.name}: {type(error).__name__}: {' '.join(str(error).split())}"


def _noise(source: store.Group, block: FrameBlock) -> np.ndarray:
    """Make frames of noise in 0 to 1, as many and as large as a block's: (n, y, x, channel)."""
    array = store.get_array(source, f"{block.pieces[0].key}/{schema.FRAMES}")
    chunks.check_fits(array, 0)
    noise = np.random.default_rng(0).random((len(block), *array.shape[2:]), np.float32)
    return noise.round().astype(array.dtype) if array.dtype.kind in "iu" else noise.astype(array.dtype)


def _embedded(metric: Metric, frames: np.ndarray, scope: Scope) -> EmbeddedBlock:
    with torch.no_grad():
        embedding = metric.embed_prepared(metric.prepare(frames, scope))
    return EmbeddedBlock(embedding, np.ones(len(frames), bool))


def _seconds_of_pair(metric: Metric, embedded: EmbeddedBlock, n: int) -> float:
    """Time a pair among many, made by repeating the frames.

    There are as many pairs as take long enough to be timed (some metrics take milliseconds a pair), and no
    more than ``n`` frames have.
    """
    limit = min(ROWS_AT_ONCE if metric.device.type == "cpu" else 1024, max(n, SIDE_TO_BEGIN_WITH))
    side = min(SIDE_TO_BEGIN_WITH, limit)
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
            start = time.perf_counter()
            with torch.no_grad():
                metric.distance_block(a, b)
            _wait_for(metric)
            seconds = min(seconds, time.perf_counter() - start)
        if side == limit or seconds > LONG_ENOUGH_S:
            return seconds / side**2
        side = min(2 * side, limit)


def _wait_for(metric: Metric) -> None:
    if metric.device.type == "cuda":
        torch.cuda.synchronize(metric.device)


@dataclass(frozen=True)
class Device:
    """A worker's device: its kind, its identity among all devices, and its free bytes."""

    kind: str
    identity: str
    free: int


def device_of_worker() -> Device:
    """Describe this process's device; a CPU counts as 0 free bytes."""
    device = process_device()
    if device.type != "cuda":
        return Device(device.type, platform.node(), 0)
    # Processes number only the devices that they see.
    identity = f"{platform.node()} {torch.cuda.get_device_properties(device).uuid}"
    return Device(device.type, identity, torch.cuda.mem_get_info(device)[0])


def share_of_device(devices: Collection[Device], kind: str) -> int:
    """Compute the least bytes of a device of some kind that a worker has, where workers share devices."""
    devices = [device for device in devices if device.kind == kind]
    users = Counter(device.identity for device in devices)
    return min(device.free // users[device.identity] for device in devices)
