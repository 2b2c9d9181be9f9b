"""Training examples: sequences that are read, checked and augmented, ahead of the step that takes them."""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lsim.preprocess import as_array
from lsim.training.processes import Processes
from lsim.training.sequences import SequenceError, SequenceSource, Subset, read_checked
from lsim.training.settings import TrainingSettings


@dataclass(frozen=True)
class Example:
    """One augmented sequence.

    Attributes
    ----------
    index : int
        Index of the sequence in its source.
    frames : ndarray of shape (n, size, size, 3)
        Frames of the sequence, or the first frame of each pair.
    other : ndarray of shape (n, size, size, 3) or None
        Second frame of each pair where pairs are augmented by themselves.
    pairs : ndarray of shape (2, pair)
    ground_truth : ndarray of shape (pair,)
    """

    index: int
    frames: np.ndarray
    other: np.ndarray | None
    pairs: np.ndarray
    ground_truth: np.ndarray


def make_example(source: SequenceSource, index: int, epoch: int, settings: TrainingSettings) -> Example:
    """Read a sequence and augment it for an epoch.

    Raises
    ------
    SequenceError
        When the sequence is unusable, see :func:`lsim.training.sequences.read_checked`.
    """
    sequence = read_checked(source, index)
    rng = np.random.default_rng((settings.seed, 2, epoch, index))
    pairs = np.stack(np.triu_indices(len(sequence.frames), 1))
    truth = sequence.parameter[pairs[1]] - sequence.parameter[pairs[0]]
    augment = settings.augmentation
    if settings.augment == "sequence":
        return Example(index, augment.scale(augment.vary(sequence.frames, rng)), None, pairs, truth)
    frames = augment.scale(sequence.frames)
    varied = [augment.vary(frames[[i, j]], rng) for i, j in pairs.T]
    return Example(index, np.stack([v[0] for v in varied]), np.stack([v[1] for v in varied]), pairs, truth)


def planes(frames: np.ndarray, device: torch.device) -> Tensor:
    """Convert (n, y, x, channel) to (n, channel, y, x), float32, on the device."""
    values = np.ascontiguousarray(as_array(frames), dtype=np.float32)
    return torch.from_numpy(values).to(device).permute(0, 3, 1, 2)


def read_ahead(
    source: SequenceSource,
    batches: Sequence[np.ndarray],
    epoch: int,
    settings: TrainingSettings,
    processes: Processes,
) -> Iterator[tuple[np.ndarray, list[Example | SequenceError]]]:
    """Yield each batch with this process's share of its examples, and read the next ones meanwhile."""

    def read(index: int) -> Example | SequenceError:
        try:
            return make_example(source, index, epoch, settings)
        except SequenceError as error:
            return error

    with ThreadPoolExecutor(settings.readers) as pool:
        remaining = iter(batches)
        queue: deque[tuple[np.ndarray, list[Future[Example | SequenceError]]]] = deque()

        def submit(count: int) -> None:
            for batch in itertools.islice(remaining, count):
                share = batch[processes.rank :: processes.count]
                queue.append((batch, [pool.submit(read, int(index)) for index in share]))

        submit(1 + settings.readers)
        try:
            while queue:
                batch, examples = queue.popleft()
                yield batch, [example.result() for example in examples]
                submit(1)
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass
class SkippedSequences:
    """Sequences that are skipped since nothing can be learned from them.

    Attributes
    ----------
    largest_share : float
        Largest share of all sequences that may be skipped.
    total : int
        Number of all sequences.
    reasons : dict of str to str
        Name of each skipped sequence to the reason.
    """

    largest_share: float
    total: int
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, reason: str) -> None:
        """Skip a sequence, with a warning.

        Raises
        ------
        SequenceError
            When too many are skipped.
        """
        if name in self.reasons:
            return
        self.reasons[name] = reason
        if len(self.reasons) > self.largest_share * self.total:
            raise SequenceError(
                f"{len(self.reasons)} of {self.total} sequences cannot be learned from, more than "
                f"{self.largest_share:.1%}: {'; '.join(list(self.reasons.values())[:3])}. "
                f"Repair or remove them, or raise bad_sequences"
            )
        warnings.warn(f"left out: {reason}", stacklevel=2)


def select_evenly(source: SequenceSource, maximum: int | None) -> SequenceSource:
    """Select at most ``maximum`` sequences of a source, evenly spaced."""
    count = len(source.names)
    if maximum is None or maximum >= count:
        return source
    return Subset(source, [k * count // maximum for k in range(maximum)])


def select_usable(source: SequenceSource, omissions: SkippedSequences) -> SequenceSource:
    """Select the sequences that can be learned from, and skip the others.

    Raises
    ------
    SequenceError
        When none is usable, or too many are not.
    """
    usable = []
    for index, name in enumerate(source.names):
        try:
            read_checked(source, index)
        except SequenceError as error:
            omissions.add(name, str(error))
        else:
            usable.append(index)
    if not usable:
        raise SequenceError(f"none of the {len(source.names)} validation sequences is usable")
    return Subset(source, usable)


def calibration_frames(
    source: SequenceSource,
    settings: TrainingSettings,
    device: torch.device,
    omissions: SkippedSequences,
) -> Iterator[Tensor]:
    """Yield the frames of each sequence once, augmented as in training: (n, 3, size, size)."""
    augment = settings.augmentation
    for index, name in enumerate(source.names):
        rng = np.random.default_rng((settings.seed, 4, index))
        try:
            frames = read_checked(source, index).frames
        except SequenceError as error:
            omissions.add(name, str(error))
            continue
        yield planes(augment.scale(augment.vary(frames, rng)), device)
