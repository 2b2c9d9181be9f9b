"""Compare rollouts with their trajectory on a worker: window by window, the reference prepared once for all.

Distances of a rollout are a few numbers a frame: they go back to the driver, which writes them.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lsim.embedding import Embedding
from lsim.frames import drop_alpha
from lsim.metric import Metric
from lsim.prepared import Prepared
from lsim.preprocess import FramesError, Scope
from pipeline.rollouts import scores
from pipeline.rollouts.matching import Rollout
from pipeline.rollouts.settings import RolloutScope
from pipeline.rollouts.spectra import ENERGY, REFERENCE, measure_energy, wavenumbers
from pipeline.rollouts.windows import Frames
from pipeline.stage.stopwatch import Stopwatch
from pipeline.storage.checked_frames import NOT_READ, why_not_read
from pipeline.workers.worker_metrics import MetricRequest, get_metric

MOST_ROUNDING = 1e-3
"""Bound on the rounding of a distance of equal frames, above which nothing is known about it."""


@dataclass(frozen=True)
class ScopedRequest:
    """A metric, the scope that normalises frames for it, and the range of the data set if it is that."""

    request: MetricRequest
    scope: RolloutScope
    dataset_range: Any = None


@dataclass(frozen=True)
class Source:
    """Frames of a rollout: those of a model, or of a baseline that is made of the reference.

    ``metrics`` are those that are out of date, and ``spectrum`` is true if its energies are. A baseline has
    no ``rollout``, and neither has the reference itself.
    """

    model: str
    member: str
    metrics: tuple[str, ...]
    rollout: Rollout | None = None
    spectrum: bool = False


@dataclass(frozen=True)
class Ensemble:
    """A model whose members are to be scored together.

    Attributes
    ----------
    members : tuple of str
        All that the model has in this field: without one of them there is no score.
    scores : tuple of str
        Those that are out of date.
    masked : bool
        Pixels that any frame lacks are left out.
    """

    model: str
    members: tuple[str, ...]
    scores: tuple[str, ...]
    masked: bool = False

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics whose energy scores are out of date."""
        return tuple(
            name.removeprefix(scores.ENERGY) for name in self.scores if name not in scores.PIXEL_SCORES
        )


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
        With an ``ensemble``, all rollouts of its model and no others.
    contents : tuple of str
        Contents of all trajectories of the field, where a source is their mean.
    ensemble : Ensemble, optional
    spectrum_frames : tuple of int
        Frames of the trajectory whose energies are measured.
    """

    frames: str
    key: str
    row: int
    content: str
    sequence: str
    metrics: Mapping[str, ScopedRequest]
    sources: tuple[Source, ...]
    contents: tuple[str, ...] = ()
    ensemble: Ensemble | None = None
    spectrum_frames: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """Description of the block in messages."""
        return f"{self.key}, {self.sequence} and {len(self.sources)} rollouts"

    @property
    def together(self) -> int:
        """Number of trajectories in memory at once."""
        return len(self.sources) + 1


@dataclass
class RolloutResult:
    """Distances of one rollout, (frame,) by metric, and why some are missing; or the scores of a model.

    A metric in ``unfinished`` is tried again by the next run. By those in ``equal`` the rollout is the
    trajectory itself, within rounding.
    """

    model: str
    member: str
    distances: dict[str, np.ndarray] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    unfinished: set[str] = field(default_factory=set)
    equal: set[str] = field(default_factory=set)

    @classmethod
    def failed(cls, model: str, member: str, names: Sequence[str], reason: str) -> RolloutResult:
        """Make a result that the next run tries again."""
        return cls(model, member, reasons=dict.fromkeys(names, reason), unfinished={*names})

    def fail(self, name: str, error: Exception) -> None:
        """Record why a metric has no distances; frames that it refuses are no reason to try again."""
        if isinstance(error, FramesError):
            self.reasons[name] = str(error)
        else:
            self.reasons[name] = f"{type(error).__name__}: {error}"
            self.unfinished.add(name)

    def append(self, name: str, values: np.ndarray) -> None:
        """Add the distances of a window."""
        self.distances[name] = np.concatenate([self.distances.get(name, np.full(0, np.nan)), values])

    def explain(self, counts: Mapping[str, Sequence[tuple[int, str]]]) -> RolloutResult:
        """Say how many frames lack a distance, by metric, and why."""
        for name, reasons in counts.items():
            total = len(self.distances.get(name, ()))
            texts = [f"{count} of {total} {reason}" for count, reason in reasons if count]
            if texts and name not in self.reasons:
                self.reasons[name] = "; ".join(texts)
        return self


@dataclass(frozen=True)
class BlockResult:
    """Results of a block's rollouts, their spectra, their ensemble's; and seconds by activity."""

    rollouts: list[RolloutResult]
    seconds: Counter[str]
    device: str
    ensemble: RolloutResult | None = None
    spectra: list[RolloutResult] = field(default_factory=list)


def compute_block(block: Block) -> BlockResult:
    """Compare rollouts with their trajectory. Runs on a worker."""
    stopwatch = Stopwatch()
    metrics = {name: get_metric(scoped.request) for name, scoped in block.metrics.items()}
    device = next((metric.device.type for metric in metrics.values()), "cpu")
    with stopwatch("read"):
        try:
            reference = Frames(block.frames, block.key, block.row, block.content, block.together)
        except NOT_READ as error:
            return give_up(block, f"reference: {why_not_read(error)}", device)
        rollouts = [_Compared(source, block, reference) for source in block.sources]
    with stopwatch("spectra"):
        spectra = [rollout.measure_spectrum() for rollout in rollouts if rollout.source.spectrum]
    # Others are there for their spectra alone.
    rollouts = [rollout for rollout in rollouts if block.ensemble or rollout.source.metrics]
    ensemble = _Scored(block.ensemble, rollouts) if block.ensemble else None
    for part, window in reference.windows() if rollouts else ():
        ours: dict[Hashable, Prepared] = {}
        compared = [rollout.compare(part, window, ours, metrics, stopwatch) for rollout in rollouts]
        if ensemble is not None:
            ensemble.score(window, compared, metrics, stopwatch)
    return BlockResult(
        [rollout.finish(metrics) for rollout in rollouts],
        stopwatch.seconds,
        device,
        None if ensemble is None else ensemble.finish(),
        spectra,
    )


def give_up(block: Block, reason: str, device: str = "") -> BlockResult:
    """Make the results of a block that failed: the next run tries it again."""
    rollouts = [
        RolloutResult.failed(source.model, source.member, source.metrics, reason)
        for source in block.sources
        if source.metrics
    ]
    ensemble = None
    if block.ensemble:
        ensemble = RolloutResult.failed(block.ensemble.model, "", block.ensemble.scores, reason)
    spectra = [
        RolloutResult.failed(source.model, source.member, (ENERGY,), reason)
        for source in block.sources
        if source.spectrum
    ]
    return BlockResult(rollouts, Counter(), device, ensemble, spectra)


@dataclass
class _Window:
    """Frames of a rollout in a window of the trajectory.

    Attributes
    ----------
    present : ndarray of shape (frame,), bool
        Frames of the trajectory that have a partner.
    frames : ndarray of shape (present frame, y, x, channel)
    embedded : dict of str to tuple of Embedding, Embedding, ndarray
        By metric those of the trajectory's frames, of their partners, and which pairs compare.
    """

    present: np.ndarray
    frames: np.ndarray
    embedded: dict[str, tuple[Embedding, Embedding, np.ndarray]] = field(default_factory=dict)


class _Compared:
    """A rollout while it is compared with its trajectory, window by window."""

    def __init__(self, source: Source, block: Block, reference: Frames) -> None:
        self.source, self.block, self.reference = source, block, reference
        self.result = RolloutResult(source.model, source.member)
        self.frames: Frames | None = None
        self.missing = 0
        self.fault = ""
        self._differs: set[str] = set()
        self._names = dict.fromkeys([*source.metrics, *(block.ensemble.metrics if block.ensemble else ())])
        self._baseline: np.ndarray | None = None
        rollout = source.rollout
        if source.model == REFERENCE:
            self.frames = reference
            return
        if rollout is None:
            self._baseline = _baseline(source.model, block, reference)
            return
        try:
            self.frames = Frames(rollout.frames.path, block.key, rollout.row, rollout.content, block.together)
        except NOT_READ as error:
            self.fault = why_not_read(error)
            self.result = RolloutResult.failed(source.model, source.member, source.metrics, self.fault)

    def compare(
        self,
        part: slice,
        window: np.ndarray,
        ours: dict[Hashable, Prepared],
        metrics: Mapping[str, Metric],
        stopwatch: Stopwatch,
    ) -> _Window:
        """Compare a window of the trajectory; ``ours`` holds what it is prepared as, for all rollouts."""
        if self.fault:
            return _Window(np.zeros(len(window), bool), np.empty(0))
        with stopwatch("read"):
            partners, other = self._partners(part)
        compared = _Window(partners >= 0, other)
        theirs: dict[Hashable, Prepared] = {}
        for name in self._names:
            distances = np.full(len(window), np.nan)
            if name not in self.result.reasons and compared.present.any():
                scoped, metric = self.block.metrics[name], metrics[name]
                try:
                    with stopwatch(name):
                        if scoped.scope == "pair":
                            self._differs.add(name)  # its rounding is not known
                            values = _compare_pairs(metric, window[compared.present], other)
                        else:
                            compared.embedded[name] = self._embed(
                                metric, scoped, (window, compared.present, other), ours, theirs
                            )
                            values = _distances(metric, *compared.embedded[name])
                            if name not in self._differs and _exceeds_rounding(
                                metric, *compared.embedded[name][:2], values
                            ):
                                self._differs.add(name)
                    distances[compared.present] = values
                except Exception as error:
                    # One rollout must not take down its block.
                    self.result.fail(name, error)
            if name in self.source.metrics:
                self.result.append(name, distances)
        self.missing += int((~compared.present).sum())
        return compared

    def measure_spectrum(self) -> RolloutResult:
        """Measure the energies of some frames by wavenumber, (frame, wavenumber); NaN where there is none."""
        source, numbers = self.source, np.array(self.block.spectrum_frames)
        if self.fault:
            return RolloutResult.failed(source.model, source.member, (ENERGY,), self.fault)
        if self._baseline is not None:
            energies = np.repeat(measure_energy(drop_alpha(self._baseline[None])), len(numbers), axis=0)
        else:
            assert self.frames is not None
            partners = numbers if source.rollout is None else source.rollout.partners[numbers]
            frames = [self.frames.select(slice(k, k + 1))[0] for k in partners[partners >= 0]]
            energies = np.full((len(numbers), len(wavenumbers(*self.reference.shape[:2]))), np.nan)
            if frames:
                energies[partners >= 0] = measure_energy(drop_alpha(np.stack(frames)))
        return RolloutResult(source.model, source.member, {ENERGY: energies}).explain(
            {ENERGY: [(int(np.isnan(energies[:, 0]).sum()), "frames are missing, or have NaN or infinity")]}
        )

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

    def _embed(
        self,
        metric: Metric,
        scoped: ScopedRequest,
        frames: tuple[np.ndarray, np.ndarray, np.ndarray],
        ours: dict[Hashable, Prepared],
        theirs: dict[Hashable, Prepared],
    ) -> tuple[Embedding, Embedding, np.ndarray]:
        """Embed a window's frames and their partners; tell which pairs compare."""
        window, present, other = frames
        first, second = self._scopes(scoped, metric.preprocessing.mask)
        key = (metric.preprocessing, type(metric).prepare)
        if (key, first) not in ours:
            ours[key, first] = metric.prepare(window, first)
        if (key, second) not in theirs:
            theirs[key, second] = metric.prepare(other, second)
        reference, rollout = ours[key, first], theirs[key, second]
        with torch.no_grad():
            embedding = _select(metric.embed_prepared(reference), present)
            partners = metric.embed_prepared(rollout)
        return embedding, partners, reference.comparable[present] & rollout.comparable

    def _scopes(self, scoped: ScopedRequest, masked: bool) -> tuple[Scope, Scope]:
        """Choose the ranges that normalise the reference and the rollout."""
        scope = scoped.scope
        if scope == "reference":
            return self.reference.range(masked), self.reference.range(masked)
        if scope == "each":
            other = self.reference if self.frames is None else self.frames
            return self.reference.range(masked), other.range(masked)
        if scope == "dataset":
            return scoped.dataset_range, scoped.dataset_range
        return scope, scope

    def finish(self, metrics: Mapping[str, Metric]) -> RolloutResult:
        """Say why distances are missing."""
        counts = {}
        for name in self.source.metrics:
            values = self.result.distances.get(name, np.full(0, np.nan))
            lost = "no pixel in common" if metrics[name].preprocessing.mask else "NaN or infinity"
            counts[name] = [
                (self.missing, "frames have no partner at their time"),
                (
                    int(np.isnan(values).sum()) - self.missing,
                    f"pairs of frames have {lost}, or distance NaN",
                ),
                (int(np.isinf(values).sum()), "distances are infinite"),
            ]
        for name, values in self.result.distances.items():
            if name not in self._differs and name not in self.result.reasons and (values > 0).any():
                self.result.distances[name] = np.where(values > 0, 0, values)
                self.result.equal.add(name)
        # What was embedded for a score alone has a reason there.
        self.result.reasons = {n: why for n, why in self.result.reasons.items() if n in counts}
        self.result.unfinished &= counts.keys()
        return self.result.explain(counts)


def _compare_pairs(metric: Metric, window: np.ndarray, other: np.ndarray) -> np.ndarray:
    mask = "nan" if metric.preprocessing.mask else None
    return metric.distance(window, other, scope="pair", mask=mask)


def _distances(
    metric: Metric, embedding: Embedding, partners: Embedding, comparable: np.ndarray
) -> np.ndarray:
    """Measure the distances of a window's frames to their partners, the reference first."""
    with torch.no_grad():
        values = metric.distance_pairs(embedding, partners)
    distances = values.detach().double().cpu().numpy().copy()
    distances[~comparable] = np.nan
    metric.claims.check_distances(distances, square=False, single=values.dtype == torch.float32)
    return distances


def _exceeds_rounding(metric: Metric, embedding: Embedding, partners: Embedding, values: np.ndarray) -> bool:
    """Tell whether any distance is larger than rounding can have made it, the largest first.

    Of a metric that is blind to some change, whose distance is then 0 without rounding. The rounding of the
    reference itself counts: a rollout that diverges has a bound as large as its distances.
    """
    if not metric.info.blind_to or not np.isfinite(values[~np.isnan(values)]).all():
        return True
    for k in np.argsort(-np.nan_to_num(values)).tolist():
        if not values[k] > 0:
            return False
        pair = slice(k, k + 1)
        block = torch.full((1, 1), float(values[k]), dtype=torch.float64)
        bound = metric.bound_rounding(embedding[pair], partners[pair], block)[0, 0]
        own = metric.bound_rounding(embedding[pair], embedding[pair], 0 * block)[0, 0]
        if not values[k] <= min(bound, own) or own > MOST_ROUNDING:
            return True
    return False


def _of_member(name: str, reason: str) -> str:
    """Name the member that a reason is of, where a model has several."""
    return f"member {name}: {reason}" if name else reason


class _Scored:
    """A model while its members are scored together, window by window."""

    def __init__(self, ensemble: Ensemble, rollouts: Sequence[_Compared]) -> None:
        self.ensemble, self.rollouts = ensemble, rollouts
        self.result = RolloutResult(ensemble.model, "")
        self.missing = 0
        members = {rollout.source.member: rollout for rollout in rollouts}
        absent = [name for name in ensemble.members if name not in members]
        faults = [_of_member(name, of.fault) for name, of in members.items() if of.fault]
        if faults:
            self.result = RolloutResult.failed(ensemble.model, "", ensemble.scores, faults[0])
        elif absent:
            reason = f"no rollout of member {', '.join(absent)}"
            self.result.reasons = dict.fromkeys(ensemble.scores, reason)

    def score(
        self,
        window: np.ndarray,
        members: Sequence[_Window],
        metrics: Mapping[str, Metric],
        stopwatch: Stopwatch,
    ) -> None:
        """Score a window of the trajectory, where all members have frames."""
        whole = np.logical_and.reduce([member.present for member in members])
        self.missing += int((~whole).sum())
        names = [name for name in self.ensemble.scores if name not in self.result.reasons]
        values = {name: np.full(len(window), np.nan) for name in names}
        if whole.any() and names:
            with stopwatch("scores"):
                if {*names} & {*scores.PIXEL_SCORES}:
                    # As metrics do, without alpha.
                    frames = [drop_alpha(member.frames[whole[member.present]]) for member in members]
                    truth = drop_alpha(window[whole])
                    of_pixels = scores.score_pixels(np.stack(frames), truth, masked=self.ensemble.masked)
                    for name in {*names} & of_pixels.keys():
                        values[name][whole] = of_pixels[name]
                for metric in self.ensemble.metrics:
                    if scores.ENERGY + metric in values:
                        self._score_energy(metrics[metric], members, whole, values[scores.ENERGY + metric])
        for name, of_window in values.items():
            self.result.append(name, of_window)

    def _score_energy(
        self, metric: Metric, members: Sequence[_Window], whole: np.ndarray, values: np.ndarray
    ) -> None:
        """Write a metric's energy scores of a window into ``values``, or record why there are none."""
        score = scores.ENERGY + metric.name
        for rollout, member in zip(self.rollouts, members, strict=True):
            if metric.name not in member.embedded:
                reason = rollout.result.reasons[metric.name]
                self.result.reasons[score] = _of_member(rollout.source.member, reason)
                if metric.name in rollout.result.unfinished:
                    self.result.unfinished.add(score)
                return
        chosen = [member.embedded[metric.name] for member in members]
        parts = [whole[member.present] for member in members]
        truth = _select(chosen[0][0], parts[0])
        try:
            energies = scores.score_energy(
                metric, [_select(of[1], part) for of, part in zip(chosen, parts, strict=True)], truth
            )
        except Exception as error:
            # As for a rollout's distances.
            self.result.fail(score, error)
            return
        comparable = np.logical_and.reduce([of[2][part] for of, part in zip(chosen, parts, strict=True)])
        values[whole] = np.where(comparable, energies, np.nan)

    def finish(self) -> RolloutResult:
        """Say why scores are missing."""
        counts = {}
        for name in self.ensemble.scores:
            values = self.result.distances.get(name, np.full(0, np.nan))
            counts[name] = [
                (self.missing, "frames lack a member"),
                (int(np.isnan(values).sum()) - self.missing, "frames of the reference or a member have NaN"),
            ]
        return self.result.explain(counts)


def _select(embedding: Embedding, present: np.ndarray) -> Embedding:
    """Take some of the frames."""
    if present.all():
        return embedding
    numbers = torch.from_numpy(np.flatnonzero(present))
    return embedding[numbers.to(next(iter(embedding.parts.values())).device)]


def _baseline(model: str, block: Block, reference: Frames) -> np.ndarray:
    """Make the one frame of a baseline: the reference's first, or the mean over time and all sequences."""
    if model == "persistence":
        return reference.select(slice(0, 1))[0]
    return _mean_frame(block.frames, block.key, block.contents)


@functools.lru_cache(maxsize=4)
def _mean_frame(path: str, key: str, contents: tuple[str, ...]) -> np.ndarray:
    """Average the finite values of each pixel over all trajectories of a field, float64; NaN without any."""
    total, counts = np.zeros(1), np.zeros(1)
    for row, content in enumerate(contents):
        for _, window in Frames(path, key, row, content).windows():
            finite = np.isfinite(window)
            total = total + np.where(finite, window, 0).sum(axis=0, dtype=np.float64)
            counts = counts + finite.sum(axis=0)
    return np.asarray(total / np.where(counts > 0, counts, np.nan))
