"""What metrics take of a frame and of a pair, measured on a worker: what plans are made of."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from lsim.embedding import Embedding
from lsim.metric import Metric
from lsim.preprocess import Scope, range_of
from pipeline import store
from pipeline.archive.tiles import ROWS_AT_ONCE
from pipeline.embedded import EmbeddedBlock, embed_block
from pipeline.frames import FrameBlock, read_block
from pipeline.workers.resident import MetricRequest, get_metric, this_device


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
    """

    frame_bytes: int
    prepared_bytes: int
    raw_bytes: int
    sequence_bytes: int
    process_bytes: int
    embed_seconds: float
    pair_seconds: float
    copies: bool = False


def measure(
    frames: str, requests: Sequence[MetricRequest], blocks: Sequence[FrameBlock], sequence_bytes: int
) -> Measured:
    """Measure what a family of metrics takes of the first of some blocks that it can embed.

    Runs on a worker. Times are of a second pass: the first loads and compiles.
    """
    source = store.open_store(frames)
    metrics = [get_metric(request) for request in requests]
    process = psutil.Process().memory_info().rss if metrics[0].device.type == "cpu" else 0
    for block in blocks:
        values = next(read_block(source, block, len(block))).frames
        if values is None:
            continue
        lo, hi = range_of(values, metrics[0].preprocessing)
        scope: Scope = (tuple(np.nan_to_num(lo).tolist()), tuple(np.nan_to_num(hi).tolist()))
        embedded = embed_block(source, block, metrics[0], scope)
        if embedded.embedding is None:
            continue
        began = time.perf_counter()
        embedded = embed_block(source, block, metrics[0], scope)
        _wait_for(metrics[0])
        embed_seconds = (time.perf_counter() - began) / len(block)
        pair_seconds = sum(_seconds_of_pair(metric, embedded) for metric in metrics)
        prepared = metrics[0].prepare(values[:1], scope)
        return Measured(
            embedded.nbytes // len(block),
            prepared.values[0].numel() * prepared.values.element_size(),
            values[0].nbytes,
            sequence_bytes,
            process,
            embed_seconds,
            pair_seconds,
            any(metric.copies_to_compare for metric in metrics),
        )
    return Measured(0, 0, 0, sequence_bytes, process, 0.0, 0.0)


def _seconds_of_pair(metric: Metric, embedded: EmbeddedBlock) -> float:
    """Seconds of one pair amid many: the frames there are, over and over."""
    side = ROWS_AT_ONCE if metric.device.type == "cpu" else 1024
    assert embedded.embedding is not None
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
            metric.between(a, b)
        _wait_for(metric)
        seconds = min(seconds, time.perf_counter() - began)
    return seconds / side**2


def _wait_for(metric: Metric) -> None:
    if metric.device.type == "cuda":
        torch.cuda.synchronize(metric.device)


def device_of_worker() -> tuple[str, int]:
    """Kind of this process's device, and the bytes that are free there; 0 of a CPU."""
    device = this_device()
    if device.type != "cuda":
        return device.type, 0
    return device.type, torch.cuda.mem_get_info(device)[0]
