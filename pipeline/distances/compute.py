"""What a worker does with a block: read it, prepare it once, run its metrics, write it, and say so.

A block is some sequences of one field. Distances are written first, then the fingerprints that say they are
done (:mod:`pipeline.distances.blocks`). Nothing but small counts goes back through the scheduler.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from lsim.claims import OthersCode
from lsim.metric import Metric
from lsim.prepared import Prepared
from lsim.preprocess import FramesError, Scope, finite_frames
from pipeline.distances.blocks import ROW_TEXTS, Pairs, StaleBlock, digest_rows
from pipeline.metrics.pixel_weights import FieldWeights, get_weighted
from pipeline.metrics.resolution import resolution_of, to_text
from pipeline.metrics.settings import is_directed
from pipeline.stage import trials
from pipeline.storage import schema, store
from pipeline.storage.checked_frames import NOT_READ, read_sequence, why_not_read
from pipeline.workers.worker_metrics import MetricRequest, get_metric, still_wanted

logger = logging.getLogger(__name__)

TOO_LONG_TO_REPEAT_S = 30.0
"""A sequence that takes longer is timed once: it makes a block by itself, whatever was loaded meanwhile."""


@dataclass(frozen=True)
class BlockTask:
    """A stale block with all that a worker needs to compute it."""

    frames: str
    out: str
    key: str
    block: StaleBlock
    requests: tuple[MetricRequest, ...]
    scopes: Mapping[bool, Scope]
    """With and without a mask: minimum and maximum of a data set differ where single pixels are missing."""
    pairs: Pairs
    masking: bool
    run: str = ""
    """The run's name, in which each worker tries each metric once; without one nothing is tried."""
    weights: FieldWeights | None = None
    """Of the field's pixels, where metrics are weighted by them."""

    @property
    def label(self) -> str:
        """What it is of, in messages."""
        return f"{self.key}, sequences {self.block.start} to {self.block.stop - 1}"


@dataclass(frozen=True)
class BlockResult:
    """What a worker tells of a block; the distances themselves are in the store.

    Attributes
    ----------
    matrices : int
        How many are done.
    seconds_by_stage : Counter
        Of ``open``, ``read``, ``prepare``, ``metrics``, ``write``: what the block waited for.
    seconds_by_metric : Counter
        ``metrics``, metric by metric; a family's embedding counts for the first of them.
    precision : dict
        By metric, what those that have a promise to keep say of how they kept it.
    device : str
        Kind of device that computed.
    """

    matrices: int
    seconds_by_stage: Counter[str]
    seconds_by_metric: Counter[str]
    precision: dict[str, Any]
    device: str

    def __add__(self, other: BlockResult) -> BlockResult:
        """Of both blocks."""
        precision = dict(self.precision)
        for metric, found in other.precision.items():
            precision[metric] = precision[metric] + found if metric in precision else found
        return BlockResult(
            self.matrices + other.matrices,
            self.seconds_by_stage + other.seconds_by_stage,
            self.seconds_by_metric + other.seconds_by_metric,
            precision,
            self.device,
        )


@dataclass
class _Sequence:
    """A sequence's frames, and what metrics share of them; dropped before the next but one is read.

    ``damage`` says what is wrong with frames that are not those that were converted; there are none then.
    """

    frames: np.ndarray
    damage: str = ""
    prepared: dict[Hashable, Prepared] = field(default_factory=dict)

    def for_metric(self, metric: Metric, scope: Scope) -> Prepared:
        """The frames as the metric takes them, prepared for the first that takes them so."""
        # A metric of somebody else may prepare frames in a way of its own, which is nobody else's.
        key = (metric.preprocessing, type(metric).prepare)
        if key not in self.prepared:
            self.prepared[key] = metric.prepare(self.frames, scope)
        return self.prepared[key]

    def anew(self) -> _Sequence:
        """The same frames, of which nothing is embedded yet."""
        return _Sequence(self.frames, prepared={key: kept.anew() for key, kept in self.prepared.items()})


class _Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - began  # type: ignore[assignment]


def compute_blocks(tasks: Sequence[BlockTask]) -> BlockResult:
    """Compute and write blocks of one field, each by itself. Runs on a worker.

    Those that an earlier attempt has finished are left as they are: a worker that died costs one block.
    """
    done = [False] * len(tasks)
    if _is_done(tasks[0]):
        done = [_is_done(task) for task in tasks]
    results = [
        _found_done(task) if there else compute_block(task) for task, there in zip(tasks, done, strict=True)
    ]
    return functools.reduce(operator.add, results)


def _is_done(task: BlockTask) -> bool:
    """Whether a block's fingerprints are those that computing it would write."""
    group = store.get_group(store.open_store(task.out), f"{task.key}/{schema.PROVENANCE}")
    block = task.block
    found = store.read(
        store.get_array(group, schema.FINGERPRINT), (slice(None), slice(block.start, block.stop))
    )
    return all(
        found[block.places[name], row - block.start] == fingerprint
        for name, rows in block.rows.items()
        for row, fingerprint in rows.items()
    )


def _found_done(task: BlockTask) -> BlockResult:
    matrices = sum(len(rows) for rows in task.block.rows.values())
    return BlockResult(matrices, Counter(), Counter(), {}, get_metric(task.requests[0]).device.type)


def compute_block(task: BlockTask) -> BlockResult:
    """Compute and write one block. Runs on a worker.

    Frames are read a sequence at a time, so memory is that of one sequence whatever the block (of two, where
    a GPU computes one while the next is read).
    """
    stages, by_metric = _Clock(), _Clock()
    found, block = _compute(task, stages, by_metric), task.block
    with stages("write"):
        if not still_wanted():
            # Another copy was faster, or the run is over and the next may be writing.
            raise store.StoreError(f"{task.out}: nobody waits for block {block.start}:{block.stop} any more")
        group = store.get_group(store.open_store(task.out, "r+"), task.key)
        undone = {
            name: {row: "" for row in matrices if row not in found.done[name]}
            for name, matrices in found.matrices.items()
        }
        if any(undone.values()):
            # Another copy may have finished these: its fingerprint must not stand for what comes now.
            write_provenance(group, schema.FINGERPRINT, block, undone)
        for name, matrices in found.matrices.items():
            _write_matrices(group, name, block, matrices)
        computed_from = {
            name: {row: block.contents[row] for row in matrices} for name, matrices in found.matrices.items()
        }
        texts: dict[str, Mapping[str, Mapping[int, str]]] = {
            schema.FAILURE: found.reasons,
            schema.CONTENT: computed_from,
            schema.RESOLUTION: found.resolutions,
            schema.FINGERPRINT: found.done,
        }
        texts[schema.DIGEST] = digest_rows(task.key, block, texts, found.matrices)
        # In their order, the fingerprints last: they say that all else is there.
        for name in ROW_TEXTS:
            write_provenance(group, name, block, texts[name])
    kept = {metric.name: _take_precision(metric) for metric in found.metrics}
    precision = {name: promise for name, promise in kept.items() if promise is not None}
    finished = sum(len(rows) for rows in found.done.values())
    return BlockResult(finished, stages.seconds, by_metric.seconds, precision, found.metrics[0].device.type)


def seconds_per_sequence(task: BlockTask) -> float:
    """What one sequence takes here: reading it and computing all that is stale of it. Runs on a worker.

    Measured the second time, when all is loaded and compiled.

    Parameters
    ----------
    task : BlockTask
        Of one sequence; nothing is written.

    Raises
    ------
    DamagedError
        When the sequence's frames are not those that were converted.
    """
    source = store.get_group(store.open_store(task.frames), task.key)
    for row, content in task.block.contents.items():
        read_sequence(source, row, content)

    def once() -> float:
        stages = _Clock()
        for metric in _compute(task, stages, _Clock()).metrics:
            _take_precision(metric)
        return stages.seconds["read"] + stages.seconds["prepare"] + stages.seconds["metrics"]

    first = once()
    return first if first > TOO_LONG_TO_REPEAT_S else once()


@dataclass
class _Computed:
    """A block's metrics; by metric and row its matrices, why distances are missing, and fingerprints.

    ``resolutions`` say what rounding can have done to the distances.
    """

    metrics: list[Metric]
    matrices: dict[str, dict[int, np.ndarray]]
    reasons: dict[str, dict[int, str]]
    resolutions: dict[str, dict[int, str]]
    done: dict[str, dict[int, str]]


def _compute(task: BlockTask, stages: _Clock, by_metric: _Clock) -> _Computed:
    """Read a block's sequences and compute what is stale of them; nothing is written."""
    with stages("open"):
        source = store.get_group(store.open_store(task.frames), task.key)
        metrics = [get_weighted(request, task.weights) for request in task.requests]
    block, n = task.block, store.get_array(source, schema.FRAMES).shape[1]
    matrices: dict[str, dict[int, np.ndarray]] = {metric.name: {} for metric in metrics}
    reasons: dict[str, dict[int, str]] = {metric.name: {} for metric in metrics}
    resolutions: dict[str, dict[int, str]] = {metric.name: {} for metric in metrics}
    done: dict[str, dict[int, str]] = {metric.name: {} for metric in metrics}
    rows = sorted({row for rows in block.rows.values() for row in rows})
    sequences = _read(source, rows, metrics, task)
    for row in rows:
        with stages("read"):
            sequence = next(sequences)
        for metric in metrics:
            if row not in block.rows[metric.name]:
                continue
            scope = task.scopes[metric.preprocessing.mask]
            matrix, rounding = np.full((2, n, n), np.nan)
            reason, final = "", True
            if sequence.damage:
                # Not done: the next run looks whether the frames are whole again.
                matrices[metric.name][row], reasons[metric.name][row] = matrix, sequence.damage
                resolutions[metric.name][row] = ""
                continue
            try:
                if scope != "pair":
                    with stages("prepare"):
                        sequence.for_metric(metric, scope)
                with stages("metrics"), by_metric(metric.name):
                    matrix, rounding = _tried_matrix(metric, sequence, scope, task)
                reason = _incomparable(matrix, sequence.frames, metric, task)
            except FramesError as error:
                # The metric cannot take these frames, today or tomorrow: done, with the reason recorded.
                reason = str(error)
            except Exception as error:
                # One sequence must not take down its block. Without a fingerprint the next run tries again.
                reason, final = f"{type(error).__name__}: {error}", False
            matrices[metric.name][row] = matrix
            reasons[metric.name][row] = reason
            resolution = resolution_of(matrix, rounding, task.pairs, metric.preprocessing.precision)
            resolutions[metric.name][row] = to_text(resolution)
            if final:
                done[metric.name][row] = block.rows[metric.name][row]
    return _Computed(metrics, matrices, reasons, resolutions, done)


def _read(
    source: store.Group, rows: Sequence[int], metrics: Sequence[Metric], task: BlockTask
) -> Iterator[_Sequence]:
    """The sequences of a block, one after the other; a damaged one says so and holds up nobody.

    Where metrics are on a GPU the next is read, uploaded and prepared by a thread on a stream of its own,
    while this one is computed.
    """
    first_of = {metric.preprocessing: metric for metric in reversed(metrics)}

    def load(row: int, *, prepared: bool) -> _Sequence:
        try:
            sequence = _Sequence(read_sequence(source, row, task.block.contents[row]))
        except NOT_READ as error:
            return _Sequence(np.empty(0), why_not_read(error))
        for settings, metric in first_of.items() if prepared else ():
            if (scope := task.scopes[settings.mask]) != "pair":
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


def _tried_matrix(
    metric: Metric, sequence: _Sequence, scope: Scope, task: BlockTask
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`_matrix`, computed twice for the first frames that a metric is given here in a run."""
    due = trials.is_due(task.run, metric)
    matrix, rounding = _matrix(metric, sequence, scope, task.pairs)
    if due and (np.isfinite(matrix) & ~np.eye(len(matrix), dtype=bool)).any():
        fresh = sequence.anew()
        of_all = "sequence" if scope == "pair" else scope
        trials.try_distances(
            task.run,
            metric,
            fresh.for_metric(metric, of_all),
            matrix,
            lambda tried: _matrix(tried, fresh, scope, task.pairs)[0],
        )
    return matrix, rounding


def _matrix(metric: Metric, sequence: _Sequence, scope: Scope, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Compute one sequence's distances and bounds on their rounding: (n, n) both, with a zero diagonal.

    What is not asked for is NaN. Of a metric that isn't symmetric the diagonal is its own, and of the
    reference row 0 alone is asked for.
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


def _incomparable(matrix: np.ndarray, frames: np.ndarray, metric: Metric, task: BlockTask) -> str:
    """Why distances that were asked for are NaN or infinite; empty when none is."""
    computed = matrix if task.pairs == "all" else matrix[0]
    missing = int(np.isnan(computed).sum())
    # Minus infinity is no fault of a metric that says so: so far are equal frames by a negated ratio.
    itself = metric.info.distance_to_itself
    if not missing and (infinite := int((np.isinf(computed) & (computed != itself)).sum())):
        scope = task.scopes[metric.preprocessing.mask]
        where = f", whose values may be far from the scope {scope}" if isinstance(scope, tuple) else ""
        return f"the metric gave infinity for {infinite} of {computed.size} distances of finite frames{where}"
    if not missing:
        return ""
    if metric.preprocessing.mask:
        missing_pixels = "of frames with missing pixels, which may have none in common"
        which = "of finite frames" if finite_frames(frames).all() else missing_pixels
        return f"the metric gave NaN for {missing} of {computed.size} distances {which}"
    if len(bad := np.flatnonzero(~finite_frames(frames))):
        which = f"frames {', '.join(map(str, bad))} hold NaN or infinity"
        return f"{which}, and this metric takes no mask" if task.masking else which
    return f"the metric gave NaN for {missing} of {computed.size} distances of finite frames"


def _take_precision(metric: Metric) -> Any:
    """What a metric has counted of its precision since it was last asked; None of most."""
    take = getattr(metric, "take_precision", None)
    if take is None:
        return None
    try:
        with OthersCode(metric.name, "take_precision"):
            record = take()
        if record is not None and not {"pairs", "recomputed"} <= asdict(record).keys():
            raise TypeError(f"expected a record as lsim.error_bounds.PairPrecision is, found {record!r}")
        return record
    except Exception as error:  # of a metric of one's own: its distances are no worse for it
        logger.warning("%s: says nothing of its precision: %s: %s", metric.name, type(error).__name__, error)
        return None


def _write_matrices(
    group: store.Group, name: str, block: StaleBlock, matrices: Mapping[int, np.ndarray]
) -> None:
    """Write a block whole, keeping the rows that were up to date, and read it back."""
    array = store.get_array(group, name)
    rows = range(block.start, block.stop)
    if all(row in matrices for row in rows):
        values = np.stack([matrices[row] for row in rows])
    else:
        values = store.read(array, slice(block.start, block.stop))
        for row, matrix in matrices.items():
            values[row - block.start] = matrix
    store.write_rows(array, block.start, values)
    written = store.read(array, slice(block.start, block.stop))
    if not np.array_equal(written, values, equal_nan=True):
        raise store.StoreError(f"{array.store_path}: block {block.start}:{block.stop} reads back differently")


def write_provenance(
    group: store.Group, variable: str, block: StaleBlock, texts: Mapping[str, Mapping[int, str]]
) -> None:
    """Write the texts of metrics and rows, all at once; those of others stay.

    A block's chunks hold all metrics, and have one writer: the block's task.
    """
    array = store.get_array(store.get_group(group, schema.PROVENANCE), variable)
    values = store.read(array, (slice(None), slice(block.start, block.stop)))
    for metric, by_row in texts.items():
        for row, text in by_row.items():
            values[block.places[metric], row - block.start] = text
    store.write_block(array, (0, block.start), values)
