"""Training, in one pass from top to bottom: :func:`train`.

One step takes ``batch`` sequences. Their frames are augmented, pass the trunk once, and all distances within
each sequence are derived from the features (``augment="sequence"``); or every pair of frames is augmented for
itself and passes the trunk anew, as published (``augment="pair"``). Under ``torchrun`` each process takes its
share of every batch, and gradients are summed.

All that is drawn at random is keyed by seed, epoch and sequence, so that a run which was killed goes on with
the losses it would have had, and several processes have those of one.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import os
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lsim.metric import resolve_device
from lsim.networks import TRUNKS, LsimTrunk
from lsim.no_tf32 import ieee_convolutions
from lsim.preprocess import as_array, preprocess
from lsim.ranking import differ_by_rounding, pooled_spearman
from lsim.training.loss import sequence_loss
from lsim.training.network import DistanceNetwork, PairNetwork
from lsim.training.sequences import (
    Augmentation,
    SequenceError,
    SequenceSource,
    Subset,
    hold_out,
    read_checked,
)
from lsim.weights import find_weights, save_checkpoint

Network: TypeAlias = DistanceNetwork | PairNetwork

STATE, WEIGHTS, UNTRAINED, HISTORY, LOSSES, PICTURE = (
    "state.pt",
    "weights.safetensors",
    "untrained.safetensors",
    "history.csv",
    "losses.csv",
    "loss.png",
)
"""Files of a training run."""

TERMS = ("loss", "squared error", "correlation")
"""What is kept of each step, see :class:`lsim.training.loss.LossTerms`."""

MAY_CHANGE = (
    "epochs",
    "patience",
    "bad_sequences",
    "checkpoint_minutes",
    "tensorboard",
    "device",
    "threads",
    "readers",
)
"""Settings that a run may be continued with in other values than it was begun with."""

PROCESSES_WAIT = timedelta(hours=2)
"""How long processes wait for one another: the others have nothing to do while the first validates."""


class DivergedError(ArithmeticError, ValueError):
    """The loss or its gradient is no longer finite."""


@dataclass(frozen=True)
class TrainingSettings:
    """All that decides a training run; the defaults are those of the publication where it states them.

    Attributes
    ----------
    trunk : {"lsim", "skip", "alex", "non-siamese"}
    initial_weights : str or None
        To begin from: a file that a run wrote, the name of published weights, or for the trunk ``alex`` a
        file of ImageNet's, as safetensors with torchvision's names.
    frozen_trunk : bool
        Train the channel weights alone.
    seed : int
    epochs : int, default 40
    batch : int, default 1
        Sequences a step, over all processes.
    learning_rate : float, default 1e-5
        Of Adam.
    schedule : {"constant", "cosine"}
        Cosine goes down to nothing at the end of the last epoch.
    augment : {"sequence", "pair"}
        See the module.
    augmentation : Augmentation
    dropout : float, default 0.5
        Of squared feature differences, before the channel weights.
    squared_error_weight, correlation_weight : float, default 0.3 and 0.7
    correlated_pairs : {"reference", "all"}
        Pairs over which the loss takes the correlation.
    held_out : float, default 0.05
        Share of the simulations to validate on.
    validation_sequences : int or None
        At most as many, evenly chosen; None takes all that are held out.
    validation_size : int, default 224
        Frames are resized to it to be validated on, as the evaluation does.
    calibration_sequences : int or None
        To set the deviation maps from; None takes all.
    precision : {"float32", "bfloat16"}
        Of the trunk; bfloat16 is mixed precision: features are of it, parameters and distances are not.
    average : float, default 0
        Decay of an exponential average of the weights, a step; it is what is validated and kept. 0 is off.
    patience : int or None
        Stop after as many epochs without a better validation.
    bad_sequences : float, default 0.01
        Share of the sequences that may be left out since nothing can be learned from them; more end the run.
    checkpoint_minutes : float, default 5
    tensorboard : bool, default True
    device : str, default "auto"
    threads : int or None
        Of torch, on a CPU.
    readers : int, default 1
        Threads that read and augment sequences ahead of the step; a GPU is kept busy by several.

    Raises
    ------
    ValueError
        For values that cannot be trained with.
    """

    trunk: Literal["lsim", "skip", "alex", "non-siamese"] = "lsim"
    initial_weights: str | None = None
    frozen_trunk: bool = False
    seed: int = 0
    epochs: int = 40
    batch: int = 1
    learning_rate: float = 1e-5
    schedule: Literal["constant", "cosine"] = "constant"
    augment: Literal["sequence", "pair"] = "sequence"
    augmentation: Augmentation = field(default_factory=Augmentation)
    dropout: float = 0.5
    squared_error_weight: float = 0.3
    correlation_weight: float = 0.7
    correlated_pairs: Literal["reference", "all"] = "reference"
    held_out: float = 0.05
    validation_sequences: int | None = None
    validation_size: int = 224
    calibration_sequences: int | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    average: float = 0.0
    patience: int | None = None
    bad_sequences: float = 0.01
    checkpoint_minutes: float = 5.0
    tensorboard: bool = True
    device: str = "auto"
    threads: int | None = None
    readers: int = 1

    def __post_init__(self) -> None:
        """Refuse values that cannot be trained with."""
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                allowed = ", ".join(map(repr, get_args(hint)))
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name, least in (
            ("epochs", 1),
            ("batch", 1),
            ("learning_rate", 0),
            ("patience", 1),
            ("threads", 1),
            ("readers", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("dropout", "average", "held_out", "bad_sequences"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        takes = TRUNKS.get(self.trunk, LsimTrunk).takes
        for name, size in (
            ("augmentation.size", self.augmentation.size),
            ("validation_size", self.validation_size),
        ):
            if not takes(size):
                raise ValueError(f"{name}: the trunk {self.trunk!r} cannot take frames of {size}×{size}")
        if self.frozen_trunk and (self.trunk == "non-siamese" or self.initial_weights is None):
            raise ValueError("a frozen trunk needs initial_weights, and a trunk other than non-siamese")
        if self.trunk == "non-siamese" and self.initial_weights is not None:
            raise ValueError(
                f"the trunk 'non-siamese' takes no initial_weights, got {self.initial_weights!r}"
            )


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to.

    Attributes
    ----------
    folder : Path
        Of its files.
    epochs, steps : int
        Finished.
    best : float
        Pooled Spearman of the kept weights on the sequences that were held out.
    history : list of dict
        One row an epoch.
    stopped : str
        Why it ended: ``"epochs"``, ``"patience"`` or ``"minutes"``.
    skipped : dict of str to str
        Sequences that could not be learned from, and why.
    """

    folder: Path
    epochs: int
    steps: int
    best: float
    history: list[dict[str, float]]
    stopped: str
    skipped: dict[str, str]


def train(
    source: SequenceSource,
    settings: TrainingSettings,
    out: str | os.PathLike[str],
    *,
    minutes: float | None = None,
    about: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> TrainingResult:
    """Train the metric, or go on with a run that was stopped.

    Leaves in ``out``: ``weights.safetensors``, the best by validation; ``untrained.safetensors``, those
    before the first step, which every result should be compared with; ``history.csv``, an epoch a row;
    ``losses.csv``, a step a row; ``loss.png``; ``tensorboard/``; ``settings.json``; ``state.pt``, from which
    the same call goes on.

    A sequence that cannot be read, is not finite or whose frames are all equal is left out with a warning,
    and named in ``TrainingResult.skipped`` and in the metadata of the weights.

    Parameters
    ----------
    source : SequenceSource
        Sequences to train on and to validate on; see :func:`lsim.training.sequences.hold_out`.
    settings : TrainingSettings
    out : path
        Folder of the run.
    minutes : float, optional
        Stop in good order after so long; the same call goes on.
    about : mapping of str to str, optional
        What else the metadata of the weights shall say of how they were made; a run that goes on says what
        it was begun with.
    progress : callable
        Takes a line at each epoch.

    Returns
    -------
    TrainingResult

    Raises
    ------
    ValueError
        When ``out`` holds a run with other settings or other sequences, when too many sequences cannot be
        learned from, or tensorboard is wanted and not installed.
    DivergedError
        When the loss is no longer finite; ``state.pt`` holds the run as it was before.
    """
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    folder = Path(out)
    device = resolve_device(settings.device)
    with _torch_settings(settings.threads), _processes(device) as (rank, world):
        first_process = rank == 0
        writer = _summary_writer() if settings.tensorboard and first_process else None
        training, held_out = hold_out(source, settings.held_out)
        validation = _evenly(held_out, settings.validation_sequences)
        names = list(training.names)
        described = {"settings": asdict(settings), "training": names, "validation": list(validation.names)}
        skipped: dict[str, str] = {}

        def skip(name: str, reason: str) -> None:
            _skip(skipped, name, reason, settings.bad_sequences, len(names) + len(held_out.names))

        validation = _usable(validation, skip)

        # ---- the network, as it is before the first step
        torch.manual_seed(settings.seed)
        network = make_network(settings).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimiser = torch.optim.Adam(
            [p for p in network.parameters() if p.requires_grad], settings.learning_rate
        )
        steps_an_epoch = math.ceil(len(names) / settings.batch)
        last_step = settings.epochs * steps_an_epoch

        # ---- go on where a run stopped, or begin
        state = _resume(folder / STATE, described, device)
        if state is None:
            if not network.counts:  # initial weights bring their maps
                chosen = _evenly(training, settings.calibration_sequences)
                network.calibrate(_calibration_frames(chosen, settings, device, skip))
            state = {"step": 0, "losses": [], "history": [], "best": -math.inf, "best_epoch": 0}
            state["about"] = dict(about or {})
            if first_process:
                folder.mkdir(parents=True, exist_ok=True)
                save_checkpoint(
                    folder / UNTRAINED,
                    network.checkpoint(),
                    settings.trunk,
                    {**state["about"], **_origin(settings, 0, names, skipped)},
                )
                state["untrained"] = validate(network, validation, settings, device)
                state["l2"] = validate(None, validation, settings, device)
                progress(f"before training: {_shown(state['untrained'])}; l2: {_shown(state['l2'])}")
        else:
            state.setdefault("about", dict(about or {}))  # which earlier versions didn't keep
            skipped.update(state.get("skipped", {}))
            network.load_state_dict(state["network"])
            optimiser.load_state_dict(state["optimiser"])
        if first_process:
            (folder / "settings.json").write_text(json.dumps(described["settings"], indent=1) + "\n")
        average, kept_network = None, network
        if settings.average:
            average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(settings.average))
            if "average" in state:
                average.load_state_dict(state["average"])
            kept_network = cast(Network, average.module)
        # What a killed run wrote after its last checkpoint is written again.
        log = writer(str(folder / "tensorboard"), purge_step=state["step"] + 1) if writer else None

        def save_state() -> None:
            if first_process:
                state.update(
                    described=described,
                    skipped=skipped,
                    network=network.state_dict(),
                    optimiser=optimiser.state_dict(),
                )
                if average is not None:
                    state["average"] = average.state_dict()
                torch.save(state, folder / f"{STATE}.partial")
                os.replace(folder / f"{STATE}.partial", folder / STATE)
                _write_losses(folder / LOSSES, state["losses"])

        # ---- the steps
        saved, stopped = time.monotonic(), "epochs"
        while state["step"] < last_step:
            epoch, position = divmod(state["step"], steps_an_epoch)
            waited = position == 0 and epoch - state["best_epoch"] >= (settings.patience or math.inf)
            if _any_process(first_process and waited, world, device):
                stopped = "patience"
                break
            order = np.random.default_rng((settings.seed, 1, epoch)).permutation(len(names))
            batches = [order[k : k + settings.batch] for k in range(0, len(order), settings.batch)][position:]
            began, out_of_time = time.monotonic(), False
            for batch, examples in _read_ahead(training, batches, epoch, settings, rank, world):
                for group in optimiser.param_groups:
                    group["lr"] = _learning_rate(settings, state["step"], last_step)
                optimiser.zero_grad()
                good = [example for example in examples if isinstance(example, Example)]
                terms = torch.zeros(4, dtype=torch.float64)  # sums over the batch, and how many they are of
                if good:
                    losses = batch_losses(network, good, settings, device, epoch)
                    (losses[:, 0].sum() / len(batch)).backward()
                    terms[:3], terms[3] = losses.detach().sum(0).cpu(), len(good)
                gradients = [_gradient(p) for p in network.parameters() if p.requires_grad]
                if world > 1:
                    _sum_over_processes([terms], device)
                    _sum_over_processes(gradients, device)
                count = int(terms[3])
                if count < len(batch):
                    found = zip((names[k] for k in batch[rank::world]), examples, strict=True)
                    bad = {name: str(error) for name, error in found if isinstance(error, SequenceError)}
                    for name, reason in _of_all_processes(bad, world).items():
                        skip(name, reason)
                    for gradient in gradients:
                        gradient.mul_(len(batch) / max(count, 1))
                terms = terms[:3] / count  # NaN where there was nothing to learn from
                if count:
                    _check_finite(terms, gradients, state["step"], [names[k] for k in batch], settings)
                    optimiser.step()
                network.clamp_weights()
                if average is not None:
                    average.update_parameters(network)
                state["step"] += 1
                state["losses"].append(terms.tolist())
                if log is not None:
                    for name, term in zip(TERMS, terms, strict=True):
                        log.add_scalar(f"training/{name}", float(term), state["step"])
                # Not at the last step, whose state is saved with the validation of the epoch.
                within = state["step"] % steps_an_epoch != 0
                if within and time.monotonic() - saved > 60 * settings.checkpoint_minutes:
                    save_state()
                    saved = time.monotonic()
                out_of_time = _any_process(time.monotonic() > deadline, world, device)
                if out_of_time:
                    break
            # ---- the end of an epoch
            if state["step"] % steps_an_epoch == 0 and first_process:
                row = _end_of_epoch(
                    state, kept_network, validation, settings, device, epoch + 1, steps_an_epoch
                )
                row["seconds"] = time.monotonic() - began
                progress(f"epoch {epoch + 1}: {_shown(row)}")
                if log is not None:
                    for name, value in row.items():
                        log.add_scalar(f"validation/{name}", value, state["step"])
                if row["spearman"] > state["best"]:
                    state.update(best=row["spearman"], best_epoch=epoch + 1)
                    origin = {
                        **state["about"],
                        **_origin(settings, state["step"], names, skipped),
                        "validation_spearman": f"{state['best']:.4f}",
                    }
                    save_checkpoint(folder / WEIGHTS, kept_network.checkpoint(), settings.trunk, origin)
                _write_history(folder, state)
            save_state()
            if out_of_time and state["step"] < last_step:
                stopped = "minutes"
                break
        if log is not None:
            log.close()
        return TrainingResult(
            folder,
            state["step"] // steps_an_epoch,
            state["step"],
            state["best"],
            state["history"],
            stopped,
            skipped,
        )


# ---------------------------------------------------------------- one step


@dataclass(frozen=True)
class Example:
    """One sequence, augmented: frames (n, size, size, 3), or two such stacks of pairs."""

    index: int
    frames: np.ndarray
    other: np.ndarray | None
    pairs: np.ndarray
    ground_truth: np.ndarray


def make_example(source: SequenceSource, index: int, epoch: int, settings: TrainingSettings) -> Example:
    """Read a sequence and augment it, as it is to be in this epoch."""
    sequence = read_checked(source, index)
    rng = np.random.default_rng((settings.seed, 2, epoch, index))
    pairs = np.stack(np.triu_indices(len(sequence.frames), 1))
    truth = sequence.parameter[pairs[1]] - sequence.parameter[pairs[0]]
    augment = settings.augmentation
    if settings.augment == "sequence":
        return Example(index, augment.scaled(augment.varied(sequence.frames, rng)), None, pairs, truth)
    frames = augment.scaled(sequence.frames)
    varied = [augment.varied(frames[[i, j]], rng) for i, j in pairs.T]
    return Example(index, np.stack([v[0] for v in varied]), np.stack([v[1] for v in varied]), pairs, truth)


def batch_losses(
    network: Network,
    examples: Sequence[Example],
    settings: TrainingSettings,
    device: torch.device,
    epoch: int,
) -> Tensor:
    """Loss, squared error and correlation of each example: (example, 3)."""
    rows = []
    parts: Iterable[Sequence[Tensor]] = [()] * len(examples)
    if settings.augment == "sequence":
        stacked = torch.cat([planes(example.frames, device) for example in examples])
        with _autocast(settings, device):
            features = network.features(stacked)
        lengths = [len(example.frames) for example in examples]
        parts = zip(*[torch.split(f, lengths) for f in features], strict=True)
    for example, part in zip(examples, parts, strict=True):
        generator = torch.Generator().manual_seed(
            int(np.random.default_rng((settings.seed, 3, epoch, example.index)).integers(2**62))
        )
        pairs = torch.from_numpy(example.pairs).to(device)
        with _autocast(settings, device):
            if example.other is None:
                distances = network.sequence_distances(part, pairs, settings.dropout, generator)
            else:
                distances = network.pair_distances(
                    network.features(planes(example.frames, device)),
                    network.features(planes(example.other, device)),
                    settings.dropout,
                    generator,
                )
        correlated = pairs[0] == 0 if settings.correlated_pairs == "reference" else pairs[0] >= 0
        terms = sequence_loss(
            distances.double(),
            torch.from_numpy(example.ground_truth).to(device),
            correlated,
            settings.squared_error_weight,
            settings.correlation_weight,
        )
        rows.append(torch.stack(terms))
    return torch.stack(rows)


def planes(frames: np.ndarray, device: torch.device) -> Tensor:
    """(n, y, x, channel) → (n, channel, y, x), float32, on the device."""
    values = np.ascontiguousarray(as_array(frames), dtype=np.float32)
    return torch.from_numpy(values).to(device).permute(0, 3, 1, 2)


def _read_ahead(
    source: SequenceSource,
    batches: Sequence[np.ndarray],
    epoch: int,
    settings: TrainingSettings,
    rank: int,
    world: int,
) -> Iterator[tuple[np.ndarray, list[Example | SequenceError]]]:
    """Batches with this process's share of their examples; the next are read while one is in use."""

    def read(index: int) -> Example | SequenceError:
        try:
            return make_example(source, index, epoch, settings)
        except SequenceError as error:
            return error

    with ThreadPoolExecutor(settings.readers) as pool:
        waiting = iter(batches)
        ahead: deque[tuple[np.ndarray, list[Future[Example | SequenceError]]]] = deque()

        def begin_next() -> None:
            for batch in itertools.islice(waiting, 1):
                ahead.append((batch, [pool.submit(read, int(index)) for index in batch[rank::world]]))

        for _ in range(1 + settings.readers):
            begin_next()
        try:
            while ahead:
                batch, examples = ahead.popleft()
                yield batch, [example.result() for example in examples]
                begin_next()
        finally:
            pool.shutdown(cancel_futures=True)


def _check_finite(
    terms: Tensor, gradients: Sequence[Tensor], step: int, names: Sequence[str], settings: TrainingSettings
) -> None:
    """Raise where a step would spoil the network."""
    norm = torch.nn.utils.get_total_norm(gradients)
    if not (torch.isfinite(terms).all() and torch.isfinite(norm)):
        loss, error, correlation = terms.tolist()
        raise DivergedError(
            f"step {step + 1}, of {', '.join(names)}: loss {loss:.3g} (squared error {error:.3g}, "
            f"correlation {correlation:.3g}), length of the gradient {float(norm):.3g}. A learning_rate "
            f"below {settings.learning_rate:g}, or precision float32, may help; the run is kept as last saved"
        )


def _learning_rate(settings: TrainingSettings, step: int, steps: int) -> float:
    if settings.schedule == "constant":
        return settings.learning_rate
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))


def _autocast(settings: TrainingSettings, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16")


# ---------------------------------------------------------------- validation


@torch.no_grad()
def validate(
    network: Network | None,
    source: SequenceSource,
    settings: TrainingSettings,
    device: torch.device,
) -> dict[str, float]:
    """Pooled Spearman of the reference's distances: over all sequences, and for each data set.

    Frames are resized as the evaluation does, not cropped. ``network=None`` is the mean squared error.
    Sequences whose frames differ by nothing but rounding are left out.

    Returns
    -------
    dict of str to float
        ``"spearman"`` over all, ``"spearman <data set>"``.
    """
    found: dict[str, list[tuple[np.ndarray, np.ndarray, float]]] = {}
    generator = torch.Generator()
    for index, name in enumerate(source.names):
        sequence = source.read(index)
        frames = planes(preprocess(sequence.frames, settings.validation_size), device)
        n = len(frames)
        pairs = torch.stack([torch.zeros(n - 1, dtype=torch.long), torch.arange(1, n)]).to(device)
        if network is None:
            distances = (frames[1:] - frames[:1]).double().square().mean((1, 2, 3))
        else:
            distances = network.sequence_distances(network.features(frames), pairs, 0.0, generator)
        truth = sequence.parameter[1:] - sequence.parameter[0]
        rounding = math.inf if differ_by_rounding(sequence.frames, settings.validation_size) else 0.0
        row = distances.double().cpu().numpy(), truth, rounding
        found.setdefault("spearman", []).append(row)
        found.setdefault(f"spearman {name.split('/')[0]}", []).append(row)
    return {name: pooled_spearman(*zip(*rows, strict=True)) for name, rows in found.items()}


def _end_of_epoch(
    state: dict[str, Any],
    network: Network,
    validation: SequenceSource,
    settings: TrainingSettings,
    device: torch.device,
    epoch: int,
    steps_an_epoch: int,
) -> dict[str, float]:
    """Validate, and add a row to the history."""
    row: dict[str, float] = {"epoch": epoch, "step": state["step"]}
    # NaN are steps that had nothing to learn from.
    means = np.nanmean(np.array(state["losses"][-steps_an_epoch:]), axis=0)
    row |= dict(zip(TERMS, means.tolist(), strict=True))
    row |= validate(network, validation, settings, device)
    row |= {"untrained": state["untrained"]["spearman"], "l2": state["l2"]["spearman"]}
    state["history"].append(row)
    return row


# ---------------------------------------------------------------- what goes in, what is left behind


def make_network(settings: TrainingSettings) -> Network:
    """The network before training, from the seed or from a file."""
    if settings.trunk == "non-siamese":
        return PairNetwork()
    network = DistanceNetwork(settings.trunk, settings.augmentation.size, settings.frozen_trunk)
    if settings.initial_weights is not None:
        network.load_initial(find_weights(settings.trunk, settings.initial_weights))
    return network


def _evenly(source: SequenceSource, most: int | None) -> SequenceSource:
    """At most so many sequences of a source, evenly chosen."""
    count = len(source.names)
    if most is None or most >= count:
        return source
    return Subset(source, [k * count // most for k in range(most)])


def _usable(source: SequenceSource, skip: Callable[[str, str], None]) -> SequenceSource:
    """Those held-out sequences that can be learned from; raises where there are none."""
    usable = []
    for index, name in enumerate(source.names):
        try:
            read_checked(source, index)
        except SequenceError as error:
            skip(name, str(error))
        else:
            usable.append(index)
    if not usable:
        raise SequenceError(f"none of the {len(source.names)} sequences to validate on can be")
    return Subset(source, usable)


def _skip(skipped: dict[str, str], name: str, reason: str, share: float, of: int) -> None:
    """Note a sequence that cannot be learned from; raises when they are too many."""
    if name in skipped:
        return
    skipped[name] = reason
    if len(skipped) > share * of:
        raise SequenceError(
            f"{len(skipped)} of {of} sequences cannot be learned from, more than {share:.1%}: "
            f"{'; '.join(list(skipped.values())[:3])}. Mend or remove them, or raise bad_sequences"
        )
    warnings.warn(f"left out: {reason}", stacklevel=3)


def _calibration_frames(
    source: SequenceSource,
    settings: TrainingSettings,
    device: torch.device,
    skip: Callable[[str, str], None],
) -> Iterator[Tensor]:
    """Every sequence once, augmented as in training."""
    augment = settings.augmentation
    for index, name in enumerate(source.names):
        rng = np.random.default_rng((settings.seed, 4, index))
        try:
            frames = read_checked(source, index).frames
        except SequenceError as error:
            skip(name, str(error))
            continue
        yield planes(augment.scaled(augment.varied(frames, rng)), device)


def _resume(path: Path, described: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """The state of a run that was stopped, None where there is none; raises where it is another run's."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location=device)
    was, now = state["described"], json.loads(json.dumps(described))
    differing = [
        f"{key}: {was['settings'].get(key)!r} then, {value!r} now"
        for key, value in now["settings"].items()
        if key not in MAY_CHANGE and was["settings"].get(key) != value
    ]
    differing += [
        f"{len(was[side])} {side} sequences then, {len(now[side])} now"
        + (", of other names" if len(was[side]) == len(now[side]) else "")
        for side in ("training", "validation")
        if was[side] != now[side]
    ]
    if differing:
        raise ValueError(f"{path} is of another run ({'; '.join(differing)}): choose another folder")
    return state


def _origin(
    settings: TrainingSettings, step: int, names: Sequence[str], skipped: Iterable[str]
) -> dict[str, str]:
    """What a weights file says of how it was made."""
    datasets = Counter(name.split("/")[0] for name in names)
    return {
        "trained_by": f"lsim train, lsim {version('lsim')}, torch {torch.__version__}",
        "settings": json.dumps(asdict(settings)),
        "sequences": json.dumps(datasets),
        "skipped": json.dumps(sorted(skipped)),
        "steps": str(step),
    }


def _write_losses(path: Path, losses: Sequence[Sequence[float]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *TERMS])
        writer.writerows([step, *row] for step, row in enumerate(losses, 1))


def _write_history(folder: Path, state: dict[str, Any]) -> None:
    """``history.csv`` and ``loss.png``."""
    history = state["history"]
    with (folder / HISTORY).open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(key for row in history for key in row)))
        table.writeheader()
        table.writerows(history)

    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["loss"] for row in history], marker=".", label="loss")
    left.plot(epochs, [row["squared error"] for row in history], marker=".", label="squared error")
    right.plot(epochs, [row["spearman"] for row in history], marker=".", label="this network")
    right.axhline(state["untrained"]["spearman"], color="0.5", linestyle="--", label="before training")
    right.axhline(state["l2"]["spearman"], color="0.5", linestyle=":", label="l2")
    left.set(xlabel="epoch", title="training", ylim=(0, None))
    right.set(xlabel="epoch", title="pooled Spearman, held out")
    left.legend()
    right.legend()
    figure.savefig(folder / PICTURE, dpi=120)


def _summary_writer() -> Any:
    """TensorBoard's class that writes."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "tensorboard is not installed: pip install 'lsim[train]', or set tensorboard: false"
        ) from error
    return SummaryWriter


def _shown(row: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name not in ("epoch", "step"))


@contextlib.contextmanager
def _torch_settings(threads: int | None) -> Iterator[None]:
    """Torch's settings for training; the caller's again afterwards."""
    threads_before = torch.get_num_threads()
    # Torch doesn't tell; a product that is a denormal number does.
    flushed_before = (torch.tensor(1e-310, dtype=torch.float64) * 1).item() == 0
    if threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        with ieee_convolutions():
            yield
    finally:
        torch.set_flush_denormal(flushed_before)
        torch.set_num_threads(threads_before)


# ---------------------------------------------------------------- several processes


@contextlib.contextmanager
def _processes(device: torch.device) -> Iterator[tuple[int, int]]:
    """Rank and number of processes: those that ``torchrun`` started, else one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PROCESSES_WAIT)
    try:
        yield dist.get_rank(), world
    finally:
        dist.destroy_process_group()


def _sum_over_processes(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Replace tensors by their sums, in one message."""
    flat = torch.cat([tensor.reshape(-1).to(device, torch.float64) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.reshape(tensor.shape))


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    """Its gradient, zero where this process had no sequence in the batch."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _of_all_processes(items: dict[str, str], world: int) -> dict[str, str]:
    """The items that any process has, in every process."""
    if world == 1:
        return items
    gathered: list[dict[str, str]] = [{}] * world
    dist.all_gather_object(gathered, items)
    return {name: reason for part in gathered for name, reason in part.items()}


def _any_process(condition: bool, world: int, device: torch.device) -> bool:
    """Whether it is true in one process at least: all must stop at the same step."""
    if world == 1:
        return condition
    flag = torch.tensor([float(condition)], device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())
