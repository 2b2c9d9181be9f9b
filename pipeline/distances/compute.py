"""Compute blocks of distances on a worker: read, prepare once, run the metrics, write.

A block is some sequences of one field. A worker writes its distances. What is recorded of them, with the
fingerprints that say they are done (:mod:`pipeline.distances.blocks`), goes to the driver, which writes it.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lsim.metric import Metric
from lsim.prepared import Prepared
from lsim.preprocess import FramesError, Scope, finite_frames
from pipeline.distances.blocks import Block, add_digests
from pipeline.metrics.pixel_weights import get_weighted
from pipeline.metrics.resolution import resolution_of, to_text
from pipeline.metrics.settings import is_directed
from pipeline.stage import trials
from pipeline.stage.provenance import add_precision, take_precision
from pipeline.stage.row_records import Records
from pipeline.stage.stopwatch import Stopwatch
from pipeline.storage import schema, store
from pipeline.storage.checked_frames import NOT_READ, read_sequence, why_not_read
from pipeline.storage.schema import Pairs
from pipeline.workers.worker_metrics import still_wanted

TOO_LONG_TO_REPEAT_S = 30.0
"""A sequence that takes longer is timed once: it makes a block by itself, whatever was loaded meanwhile."""


@dataclass(frozen=True)
class BlockResult:
    """Counts that a worker reports of blocks; the distances themselves are in the store.

    Attributes
    ----------
    matrices : int
        Matrices that are done.
    seconds_by_stage : Counter
        Seconds of ``load``, ``read``, ``prepare``, ``metrics``, ``write``: what the block waited for.
    seconds_by_metric : Counter
        ``metrics``, metric by metric; a family's embedding counts for the first of them.
    precision : dict
        By metric, how those with a promise of precision kept it.
    device : str
        Kind of device that computed.
    records : dict
        What is recorded of the matrices, by metric and row; the driver writes it.
    """

    matrices: int
    seconds_by_stage: Counter[str]
    seconds_by_metric: Counter[str]
    precision: dict[str, Any]
    device: str
    records: Records

    def __add__(self, other: BlockResult) -> BlockResult:
        """Combine the results of two blocks."""
        precision = dict(self.precision)
        add_precision(precision, other.precision)
        return BlockResult(
            self.matrices + other.matrices,
            self.seconds_by_stage + other.seconds_by_stage,
            self.seconds_by_metric + other.seconds_by_metric,
            precision,
            self.device,
            {
                metric: {**self.records.get(metric, {}), **other.records.get(metric, {})}
                for metric in {**self.records, **other.records}
            },
        )


@dataclass
class _Sequence:
    """Frames of a sequence and what metrics share of them; dropped before the next but one is read.

    ``damage`` says what is wrong with frames that are not those that were converted; there are none then.
    """

    frames: np.ndarray
    damage: str = ""
    prepared: dict[Hashable, Prepared] = field(default_factory=dict)

    def for_metric(self, metric: Metric, scope: Scope) -> Prepared:
        """Prepare the frames for a metric, once for all metrics that take them so."""
        # A custom metric may prepare frames in a way that no other shares.
        key = (metric.preprocessing, type(metric).prepare)
        if key not in self.prepared:
            self.prepared[key] = metric.prepare(self.frames, scope)
        return self.prepared[key]

    def anew(self) -> _Sequence:
        """Copy the sequence without what metrics have embedded."""
        prepared = {key: frames.anew() for key, frames in self.prepared.items()}
        return _Sequence(self.frames, prepared=prepared)


@dataclass(frozen=True)
class _Matrix:
    """Distances of a sequence under a metric, (n, n), and what is recorded of them.

    ``reason`` says why distances are missing; a matrix that is not ``final`` is tried again by the next run.
    """

    values: np.ndarray
    reason: str = ""
    resolution: str = ""
    final: bool = True


def compute_blocks(*blocks: Block) -> BlockResult:
    """Compute and write blocks of one field, each by itself. Runs on a worker."""
    field = blocks[0].field
    source = store.get_group(store.open_store(field.frames), field.key)
    group = store.get_group(store.open_store(field.out, "r+"), field.key)
    return functools.reduce(operator.add, [_compute_block(block, source, group) for block in blocks])


def _compute_block(block: Block, source: store.Group, group: store.Group) -> BlockResult:
    """Compute and write one block.

    Frames are read a sequence at a time, so memory is that of one sequence whatever the block (of two, where
    a GPU computes one while the next is read).
    """
    stages, by_metric = Stopwatch(), Stopwatch()
    metrics, matrices = _compute(block, source, stages, by_metric)
    with stages("write"):
        if not still_wanted():  # the run is over, and the next may be writing
            raise store.StoreError(
                f"{block.field.out}: block {block.start}:{block.stop} is not waited for any more"
            )
        records = _write(block, group, matrices)
    return BlockResult(
        sum(matrix.final for by_row in matrices.values() for matrix in by_row.values()),
        stages.seconds,
        by_metric.seconds,
        take_precision(metrics),
        metrics[0].device.type,
        records,
    )


def seconds_per_sequence(block: Block) -> float:
    """Measure what one sequence takes: reading it and computing all of its metrics. Runs on a worker.

    Measured the second time, when all is loaded and compiled.

    Parameters
    ----------
    block : Block
        Of one sequence; nothing is written.

    Raises
    ------
    DamagedError
        When the sequence's frames are not those that were converted.
    """
    source = store.get_group(store.open_store(block.field.frames), block.field.key)
    for row, content in enumerate(block.contents, block.start):
        read_sequence(source, row, content)

    def measure() -> float:
        stages = Stopwatch()
        metrics, _ = _compute(block, source, stages, Stopwatch())
        take_precision(metrics)
        return stages.seconds["read"] + stages.seconds["prepare"] + stages.seconds["metrics"]

    first = measure()
    return first if first > TOO_LONG_TO_REPEAT_S else measure()


# ---------------------------------------------------------------- computing


def _compute(
    block: Block, source: store.Group, stages: Stopwatch, by_metric: Stopwatch
) -> tuple[list[Metric], dict[str, dict[int, _Matrix]]]:
    """Read a block's sequences and compute what is stale of them; nothing is written.

    Returns
    -------
    metrics : list of Metric
    matrices : dict
        By metric and row.
    """
    with stages("load"):
        metrics = [
            get_weighted(block.field.metrics[name].request, block.field.weights) for name in block.rows
        ]
    matrices: dict[str, dict[int, _Matrix]] = {metric.name: {} for metric in metrics}
    rows = sorted({row for rows in block.rows.values() for row in rows})
    n = store.get_array(source, schema.FRAMES).shape[1]
    sequences = _read(source, rows, metrics, block)
    for row in rows:
        with stages("read"):
            sequence = next(sequences)
        for metric in metrics:
            if row not in block.rows[metric.name]:
                continue
            if sequence.damage:
                # Not final: the next run looks whether the frames are whole again.
                matrix = _Matrix(np.full((n, n), np.nan), sequence.damage, final=False)
            else:
                matrix = _compute_matrix(metric, sequence, block, stages, by_metric)
            matrices[metric.name][row] = matrix
    return metrics, matrices


def _compute_matrix(
    metric: Metric, sequence: _Sequence, block: Block, stages: Stopwatch, by_metric: Stopwatch
) -> _Matrix:
    """Compute the distances of one sequence under a metric, or say why there are none."""
    scope = block.field.metrics[metric.name].scope
    values, rounding = np.full((2, len(sequence.frames), len(sequence.frames)), np.nan)
    final = True
    try:
        if scope != "pair":
            with stages("prepare"):
                sequence.for_metric(metric, scope)
        with stages("metrics"), by_metric(metric.name):
            values, rounding = _tried_distances(metric, sequence, scope, block)
        reason = _why_incomparable(values, sequence.frames, metric, block)
    except FramesError as error:
        # The metric cannot take these frames, today or tomorrow: done, with the reason recorded.
        reason = str(error)
    except Exception as error:
        # One sequence must not take down its block. Without a fingerprint the next run tries again.
        reason, final = f"{type(error).__name__}: {error}", False
    resolution = resolution_of(values, rounding, block.field.pairs, metric.preprocessing.precision)
    return _Matrix(values, reason, to_text(resolution), final)


def _read(
    source: store.Group, rows: Sequence[int], metrics: Sequence[Metric], block: Block
) -> Iterator[_Sequence]:
    """Read the sequences of a block, one after the other; a damaged one holds up no other.

    Where metrics are on a GPU the next is read, uploaded and prepared by a thread on a stream of its own,
    while this one is computed.
    """
    first_of = {metric.preprocessing: metric for metric in reversed(metrics)}

    def load(row: int, *, prepared: bool) -> _Sequence:
        try:
            sequence = _Sequence(read_sequence(source, row, block.contents[row - block.start]))
        except NOT_READ as error:
            return _Sequence(np.empty(0), why_not_read(error))
        for metric in first_of.values() if prepared else ():
            if (scope := block.field.metrics[metric.name].scope) != "pair":
                # What goes wrong does so again where the metric is asked, and is recorded there.
                with contextlib.suppress(Exception):
                    sequence.for_metric(metric, scope)
        return sequence

    device = metrics[0].device
    if device.type != "cuda":
        yield from (load(row, prepared=False) for row in rows)
        return
    stream = torch.cuda.Stream(device)

    def load_ahead(row: int) -> tuple[_Sequence, torch.cuda.Event]:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            return load(row, prepared=True), stream.record_event()

    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(load_ahead, rows[0])
        for following in [*rows[1:], None]:
            sequence, arrived = ahead.result()
            if following is not None:
                ahead = thread.submit(load_ahead, following)
            computing = torch.cuda.current_stream(device)
            computing.wait_event(arrived)
            for prepared in sequence.prepared.values():
                # Its memory may be given to the other stream only when this one is done with it.
                prepared.values.record_stream(computing)
            yield sequence


def _tried_distances(
    metric: Metric, sequence: _Sequence, scope: Scope, block: Block
) -> tuple[np.ndarray, np.ndarray]:
    """Compute distances, twice for the first frames that this process gives a metric in a run."""
    run, pairs = block.field.run, block.field.pairs
    is_due = trials.is_due(run, metric)
    values, rounding = _distances(metric, sequence, scope, pairs)
    if is_due and (np.isfinite(values) & ~np.eye(len(values), dtype=bool)).any():
        fresh = sequence.anew()
        prepared = fresh.for_metric(metric, "sequence" if scope == "pair" else scope)
        trials.try_distances(
            run, metric, prepared, values, lambda copy: _distances(copy, fresh, scope, pairs)[0]
        )
    return values, rounding


def _distances(
    metric: Metric, sequence: _Sequence, scope: Scope, pairs: Pairs
) -> tuple[np.ndarray, np.ndarray]:
    """Compute one sequence's distances and bounds on their rounding: (n, n) both, with a zero diagonal.

    Pairs that are not asked for are NaN. The diagonal of a metric that isn't symmetric is its own, and with
    the reference's pairs row 0 alone is asked for.
    """
    directed = is_directed(metric)
    if scope == "pair":
        matrix, rounding = metric.each_pair_with_rounding(sequence.frames)
        if pairs == "reference":
            matrix[1:, 0 if directed else 1 :] = np.nan
    else:
        prepared = sequence.for_metric(metric, scope)
        if pairs == "all":
            matrix, rounding = metric.all_pairs_with_rounding(prepared)
        else:
            matrix, rounding = np.full((2, len(prepared), len(prepared)), np.nan)
            row, bounds = metric.from_reference_with_rounding(prepared)
            matrix[0], rounding[0] = row, bounds
            if not directed:
                matrix[:, 0], rounding[:, 0] = row, bounds
    if not directed:
        np.fill_diagonal(matrix, 0)
    return matrix, rounding


def _why_incomparable(matrix: np.ndarray, frames: np.ndarray, metric: Metric, block: Block) -> str:
    """Explain why distances that were asked for are NaN or infinite; empty when none is."""
    distances = matrix if block.field.pairs == "all" else matrix[0]
    missing = int(np.isnan(distances).sum())
    # Minus infinity is no fault of a metric that says so: so far are equal frames by a negated ratio.
    itself = metric.info.distance_to_itself
    if not missing and (infinite := int((np.isinf(distances) & (distances != itself)).sum())):
        scope = block.field.metrics[metric.name].scope
        suffix = f", whose values may be far from the scope {scope}" if isinstance(scope, tuple) else ""
        return (
            f"the metric gave infinity for {infinite} of {distances.size} distances of finite frames{suffix}"
        )
    if not missing:
        return ""
    if metric.preprocessing.mask:
        missing_pixels = "of frames with missing pixels, which may have none in common"
        subject = "of finite frames" if finite_frames(frames).all() else missing_pixels
        return f"the metric gave NaN for {missing} of {distances.size} distances {subject}"
    if len(bad := np.flatnonzero(~finite_frames(frames))):
        subject = f"frames {', '.join(map(str, bad))} hold NaN or infinity"
        return f"{subject}, and this metric takes no mask" if block.field.masking else subject
    return f"the metric gave NaN for {missing} of {distances.size} distances of finite frames"


# ---------------------------------------------------------------- writing


def _write(block: Block, group: store.Group, matrices: Mapping[str, Mapping[int, _Matrix]]) -> Records:
    """Write a block's distances, and return what is to be recorded of them."""
    records: dict[str, dict[int, dict[str, str]]] = {}
    values = {
        name: {row: matrix.values for row, matrix in by_row.items()} for name, by_row in matrices.items()
    }
    for name, by_row in matrices.items():
        _write_values(group, name, block, values[name])
        fingerprints = block.fingerprints(name)
        records[name] = {
            row: {
                schema.FAILURE: matrix.reason,
                schema.CONTENT: block.contents[row - block.start],
                schema.RESOLUTION: matrix.resolution,
                schema.FINGERPRINT: fingerprints[row] if matrix.final else "",
            }
            for row, matrix in by_row.items()
        }
    return add_digests(block, records, values)


def _write_values(group: store.Group, name: str, block: Block, values: Mapping[int, np.ndarray]) -> None:
    """Write a block whole, keeping the rows that were up to date, and read it back."""
    array = store.get_array(group, name)
    rows = range(block.start, block.stop)
    if all(row in values for row in rows):
        whole = np.stack([values[row] for row in rows])
    else:
        whole = store.read(array, slice(block.start, block.stop))
        for row, matrix in values.items():
            whole[row - block.start] = matrix
    store.write_rows(array, block.start, whole)
    stored = store.read(array, slice(block.start, block.stop))
    if not np.array_equal(stored, whole, equal_nan=True):
        raise store.StoreError(f"{array.store_path}: block {block.start}:{block.stop} reads back differently")
