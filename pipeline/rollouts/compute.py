"""Compare rollouts with their trajectory on a worker: window by window, the reference prepared once for all.

Distances of a rollout are a few numbers a frame: they go back to the driver, which writes them.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash

from lsim.embedding import Embedding
from lsim.metric import Metric
from lsim.prepared import Prepared
from lsim.preprocess import FramesError, Scope
from lsim.scope import find_extremes
from pipeline.rollouts.matching import Rollout
from pipeline.rollouts.settings import RolloutScope
from pipeline.stage.stopwatch import Stopwatch
from pipeline.storage import schema, store
from pipeline.storage.checked_frames import NOT_READ, why_not_read
from pipeline.workers.worker_metrics import MetricRequest, get_metric

WINDOW_BYTES = 16 * 2**20
"""Bytes of a window of frames, in double precision; a window has one frame at least."""

HELD_BYTES = 256 * 2**20
"""Frames of a trajectory that are kept after they are checked; longer trajectories are read twice."""


@dataclass(frozen=True)
class ScopedRequest:
    """A metric, the scope that normalises frames for it, and the range of the data set if it is that."""

    request: MetricRequest
    scope: RolloutScope
    dataset_range: Any = None


@dataclass(frozen=True)
class Source:
    """Frames of a rollout: those of a model, or of a baseline that is made of the reference.

    ``metrics`` are those that are out of date. A baseline has no ``rollout``.
    """

    model: str
    member: str
    metrics: tuple[str, ...]
    rollout: Rollout | None = None


@dataclass(frozen=True)
class Block:
    """A trajectory, and some rollouts of it.

    Attributes
    ----------
    frames, key : str
        Store of the reference, and the field.
    row : int
        Row of the trajectory.
    content, sequence : str
    metrics : dict of str to ScopedRequest
    sources : tuple of Source
    contents : tuple of str
        Contents of all trajectories of the field, where a source is their mean.
    """

    frames: str
    key: str
    row: int
    content: str
    sequence: str
    metrics: Mapping[str, ScopedRequest]
    sources: tuple[Source, ...]
    contents: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Description of the block in messages."""
        return f"{self.key}, {self.sequence} and {len(self.sources)} rollouts"


@dataclass
class RolloutResult:
    """Distances of one rollout, (frame,) by metric, and why some are missing.

    A metric in ``unfinished`` is tried again by the next run.
    """

    model: str
    member: str
    distances: dict[str, np.ndarray] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    unfinished: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class BlockResult:
    """Results of a block's rollouts, and the seconds that they took by activity."""

    rollouts: list[RolloutResult]
    seconds: Counter[str]
    device: str


class Frames:
    """Frames of a trajectory that are read in windows, and compared with their hash when the last is read.

    Attributes
    ----------
    lo, hi : ndarray of shape (channel,), float64
        Minimum and maximum over all frames without NaN and infinity; NaN if there is none.
    """

    def __init__(self, path: str, key: str, row: int, content: str) -> None:
        group = store.get_group(store.open_store(path), key)
        self._array = store.get_array(group, schema.FRAMES)
        self._parameter = store.read(store.get_array(group, schema.PARAMETER), row)
        self._row, self._content = row, content
        self._count = int(self._array.shape[1])
        frame = self._array.shape[2:]
        self._length = max(1, WINDOW_BYTES // (8 * int(np.prod(frame))))
        self._held: list[np.ndarray] | None = []
        self._scan()

    def _scan(self) -> None:
        """Read all frames, check their hash, and find their range; keep them if they are few."""
        digest = xxhash.xxh3_128()
        nbytes, lows, highs = 0, [], []
        dtype = self._array.dtype.newbyteorder("<")
        shape = (self._count, *self._array.shape[2:])
        digest.update(f"{dtype.str} {shape}\n".encode())
        for start in range(0, self._count, self._length):
            window = store.read(self._array, (self._row, slice(start, start + self._length)))
            digest.update(np.ascontiguousarray(window, dtype).reshape(-1).view(np.uint8).data)
            extremes = find_extremes(window)
            lows.append(extremes.lo[extremes.finite])
            highs.append(extremes.hi[extremes.finite])
            nbytes += window.nbytes
            if self._held is not None:
                self._held.append(window)
                if nbytes > HELD_BYTES:
                    self._held = None
        parameter = np.ascontiguousarray(self._parameter, "<f8")
        digest.update(f"{parameter.dtype.str} {parameter.shape}\n".encode())
        digest.update(parameter.view(np.uint8).data)
        if digest.hexdigest() != self._content:
            raise store.DamagedError(
                str(self._array.store_path),
                f"row {self._row}: frames and parameter are not those that were converted",
            )
        low, high = np.concatenate(lows), np.concatenate(highs)
        nothing = np.full(shape[-1], np.nan)
        self.lo = low.min(axis=0) if len(low) else nothing
        self.hi = high.max(axis=0) if len(high) else nothing

    @property
    def range(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """``lo`` and ``hi`` as a scope; of frames without any finite value (0, 0)."""
        lo, hi = (np.nan_to_num(side, nan=0.0) for side in (self.lo, self.hi))
        return tuple(lo.tolist()), tuple(hi.tolist())

    def windows(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield windows of frames, (n, y, x, channel), and where they stand in the trajectory."""
        for number, start in enumerate(range(0, self._count, self._length)):
            part = slice(start, min(start + self._length, self._count))
            yield part, self.select(part) if self._held is None else self._held[number]

    def select(self, part: slice | np.ndarray) -> np.ndarray:
        """Return some frames by their numbers, which rise."""
        numbers = np.arange(self._count)[part]
        if self._held is not None:
            return np.stack([self._held[k // self._length][k % self._length] for k in numbers])
        first, last = int(numbers[0]), int(numbers[-1])
        return store.read(self._array, (self._row, slice(first, last + 1)))[numbers - first]


def compute_block(block: Block) -> BlockResult:
    """Compare rollouts with their trajectory. Runs on a worker."""
    stopwatch = Stopwatch()
    metrics = {name: get_metric(scoped.request) for name, scoped in block.metrics.items()}
    device = next(iter(metrics.values())).device.type
    with stopwatch("read"):
        try:
            reference = Frames(block.frames, block.key, block.row, block.content)
        except NOT_READ as error:
            reason = f"reference: {why_not_read(error)}"
            return BlockResult([_failed(source, reason) for source in block.sources], Counter(), device)
        rollouts = [_Compared(source, block, reference) for source in block.sources]
    for part, window in reference.windows():
        ours: dict[Hashable, Prepared] = {}
        for rollout in rollouts:
            rollout.compare(part, window, ours, metrics, stopwatch)
    return BlockResult([rollout.finish(metrics) for rollout in rollouts], stopwatch.seconds, device)


def _failed(source: Source, reason: str) -> RolloutResult:
    reasons = dict.fromkeys(source.metrics, reason)
    return RolloutResult(source.model, source.member, reasons=reasons, unfinished={*source.metrics})


class _Compared:
    """A rollout while it is compared with its trajectory, window by window."""

    def __init__(self, source: Source, block: Block, reference: Frames) -> None:
        self.source, self.block, self.reference = source, block, reference
        self.result = RolloutResult(source.model, source.member)
        self.frames: Frames | None = None
        self.missing = 0
        self._baseline: np.ndarray | None = None
        rollout = source.rollout
        if rollout is None:
            self._baseline = _baseline(source.model, block, reference)
            return
        try:
            self.frames = Frames(rollout.frames.path, block.key, rollout.row, rollout.content)
        except NOT_READ as error:
            self.result = _failed(source, why_not_read(error))

    def compare(
        self,
        part: slice,
        window: np.ndarray,
        ours: dict[Hashable, Prepared],
        metrics: Mapping[str, Metric],
        stopwatch: Stopwatch,
    ) -> None:
        """Compare a window of the trajectory; ``ours`` holds what it is prepared as, for all rollouts."""
        if len(self.result.unfinished) == len(self.source.metrics):
            return
        with stopwatch("read"):
            partners, other = self._partners(part)
        theirs: dict[Hashable, Prepared] = {}
        present = partners >= 0
        for name in self.source.metrics:
            values = self.result.distances.setdefault(name, np.full(0, np.nan))
            distances = np.full(len(window), np.nan)
            if name not in self.result.reasons and present.any():
                scoped, metric = self.block.metrics[name], metrics[name]
                try:
                    with stopwatch(name):
                        distances[present] = self._distances(
                            metric, scoped, (window, present, other), ours, theirs
                        )
                except FramesError as error:
                    self.result.reasons[name] = str(error)
                except Exception as error:
                    # One rollout must not take down its block; the next run tries it again.
                    self.result.reasons[name] = f"{type(error).__name__}: {error}"
                    self.result.unfinished.add(name)
            self.result.distances[name] = np.concatenate([values, distances])
        self.missing += int((~present).sum())

    def _partners(self, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of each frame's partner, −1 for none, and the partners' frames."""
        if self._baseline is not None or self.frames is None:
            assert self._baseline is not None
            count = part.stop - part.start
            return np.arange(count), np.repeat(self._baseline[None], count, axis=0)
        assert self.source.rollout is not None
        partners = self.source.rollout.partners[part]
        if not (partners >= 0).any():
            return partners, np.empty(0)
        return partners, self.frames.select(partners[partners >= 0])

    def _distances(
        self,
        metric: Metric,
        scoped: ScopedRequest,
        frames: tuple[np.ndarray, np.ndarray, np.ndarray],
        ours: dict[Hashable, Prepared],
        theirs: dict[Hashable, Prepared],
    ) -> np.ndarray:
        """Measure the distances of a window's frames to their partners, the reference first."""
        window, present, other = frames
        if scoped.scope == "pair":
            mask = "nan" if metric.preprocessing.mask else None
            return metric.distance(window[present], other, scope="pair", mask=mask)
        first, second = self._scopes(scoped)
        key = (metric.preprocessing, type(metric).prepare)
        if (key, first) not in ours:
            ours[key, first] = metric.prepare(window, first)
        if (key, second) not in theirs:
            theirs[key, second] = metric.prepare(other, second)
        reference, rollout = ours[key, first], theirs[key, second]
        with torch.no_grad():
            embedding = _select(metric.embed_prepared(reference), present)
            values = metric.distance_pairs(embedding, metric.embed_prepared(rollout))
        distances = values.detach().double().cpu().numpy().copy()
        distances[~(reference.comparable[present] & rollout.comparable)] = np.nan
        metric.claims.check_distances(distances, square=False, single=values.dtype == torch.float32)
        return distances

    def _scopes(self, scoped: ScopedRequest) -> tuple[Scope, Scope]:
        """Choose the ranges that normalise the reference and the rollout."""
        scope = scoped.scope
        if scope == "reference":
            return self.reference.range, self.reference.range
        if scope == "each":
            return self.reference.range, self.reference.range if self.frames is None else self.frames.range
        if scope == "dataset":
            return scoped.dataset_range, scoped.dataset_range
        return scope, scope

    def finish(self, metrics: Mapping[str, Metric]) -> RolloutResult:
        """Say why distances are missing."""
        for name, values in self.result.distances.items():
            if name in self.result.reasons:
                continue
            reasons = []
            if self.missing:
                reasons.append(f"{self.missing} of {len(values)} frames have no partner at their time")
            count = int(np.isnan(values).sum()) - self.missing
            if count:
                which = "no pixel in common" if metrics[name].preprocessing.mask else "NaN or infinity"
                reasons.append(f"{count} of {len(values)} pairs of frames have {which}, or distance NaN")
            if np.isinf(values).any():
                reasons.append(f"{int(np.isinf(values).sum())} distances are infinite")
            if reasons:
                self.result.reasons[name] = "; ".join(reasons)
        return self.result


def _select(embedding: Embedding, present: np.ndarray) -> Embedding:
    """Take the frames that have a partner."""
    if present.all():
        return embedding
    numbers = torch.from_numpy(np.flatnonzero(present))
    return Embedding({name: part[numbers.to(part.device)] for name, part in embedding.parts.items()})


def _baseline(model: str, block: Block, reference: Frames) -> np.ndarray:
    """Make the one frame of a baseline: the reference's first, or the mean over time and all sequences."""
    if model == "persistence":
        return reference.select(slice(0, 1))[0]
    return _mean_frame(block.frames, block.key, block.contents)


@functools.lru_cache(maxsize=4)
def _mean_frame(path: str, key: str, contents: tuple[str, ...]) -> np.ndarray:
    """Average the finite frames of all trajectories of a field, float64."""
    total, count = np.zeros(1), 0
    for row, content in enumerate(contents):
        for _, window in Frames(path, key, row, content).windows():
            finite = np.isfinite(window).all(axis=(1, 2, 3))
            total = total + window[finite].sum(axis=0, dtype=np.float64)
            count += int(finite.sum())
    return np.asarray(total / max(count, 1))


def split_sources(sources: Sequence[Source], most: int) -> Iterator[tuple[Source, ...]]:
    """Split the rollouts of a trajectory into blocks."""
    for start in range(0, len(sources), most):
        yield tuple(sources[start : start + most])
