"""Train the metric: :func:`train`, and the :class:`Run` that it drives.

One step takes ``batch`` sequences. With ``augment="sequence"`` the frames of a sequence are augmented alike
and pass the trunk once; all distances within the sequence derive from their features. With
``augment="pair"``, as published, each pair of frames is augmented by itself and passes the trunk anew. Under
``torchrun`` each process takes its share of every batch, and gradients are summed.

All random choices are keyed by seed, epoch and sequence. A run that was killed therefore resumes with the
losses that it would have had, and several processes have the losses of one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lsim.metric import resolve_device
from lsim.no_tf32 import ieee_convolutions
from lsim.preprocess import preprocess
from lsim.ranking import differ_by_rounding, pooled_spearman
from lsim.training.examples import (
    Example,
    SkippedSequences,
    calibration_frames,
    planes,
    read_ahead,
    select_evenly,
    select_usable,
)
from lsim.training.loss import sequence_loss
from lsim.training.network import DistanceNetwork, PairNetwork
from lsim.training.processes import Processes, join_processes
from lsim.training.run_files import (
    SETTINGS,
    TENSORBOARD,
    TERMS,
    UNTRAINED,
    WEIGHTS,
    RunDescription,
    RunProgress,
    RunState,
    describe_origin,
    find_summary_writer,
    load_state,
    save_state,
    write_history,
)
from lsim.training.sequences import SequenceError, SequenceSource, hold_out
from lsim.training.settings import TrainingSettings
from lsim.weights import find_weights, save_checkpoint

Network: TypeAlias = DistanceNetwork | PairNetwork


class DivergedError(ArithmeticError, ValueError):
    """The loss or its gradient is no longer finite."""


@dataclass(frozen=True)
class TrainingResult:
    """Outcome of a training run.

    Attributes
    ----------
    folder : Path
        Folder with the run's files.
    epochs, steps : int
        Numbers of finished epochs and steps.
    best : float
        Pooled Spearman correlation of the saved weights on the held-out sequences.
    history : list of dict
        One row per epoch.
    stopped : str
        Why the run ended: ``"epochs"``, ``"patience"`` or ``"minutes"``.
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
    """Train the metric, or resume a run that was stopped.

    Writes to ``out``: ``weights.safetensors``, the best weights by validation; ``untrained.safetensors``, the
    weights before the first step, as a baseline for every result; ``history.csv``, one row per epoch;
    ``losses.csv``, one row per step; ``loss.png``; ``tensorboard/``; ``settings.json``; ``state.pt``, from
    which the same call resumes.

    A sequence that cannot be read, is not finite or whose frames are all equal is skipped with a warning. It
    is named in ``TrainingResult.skipped`` and in the metadata of the weights.

    Parameters
    ----------
    source : SequenceSource
        Sequences for training and validation; see :func:`lsim.training.sequences.hold_out`.
    settings : TrainingSettings
    out : path
        Folder of the run.
    minutes : float, optional
        Stop after this time with the state saved; the same call resumes.
    about : mapping of str to str, optional
        Additions to the metadata of the weights. A resumed run keeps those that it began with.
    progress : callable
        Receives one line at each epoch.

    Returns
    -------
    TrainingResult

    Raises
    ------
    ValueError
        When ``out`` holds a run with other settings or other sequences, when too many sequences cannot be
        learned from, or when TensorBoard is requested and not installed.
    DivergedError
        When the loss is no longer finite; ``state.pt`` keeps the run as last saved.
    """
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    device = resolve_device(settings.device)
    with _torch_settings(settings.threads), join_processes(device) as processes:
        run = Run(source, settings, Path(out), processes, progress)
        if not run.resume(about or {}):
            run.begin(about or {})
        return run.train_until(deadline)


class Run:
    """A training run: its data, its network and its progress.

    Call :meth:`resume`, or :meth:`begin` where there is nothing to resume, then :meth:`train_until`. Every
    process of a run has one; the first alone validates and writes files.

    Parameters
    ----------
    source, settings, progress
        See :func:`train`.
    folder : Path
        Folder of the run.
    processes : Processes
    """

    log: Any = None
    """TensorBoard's writer, where there is one."""

    def __init__(
        self,
        source: SequenceSource,
        settings: TrainingSettings,
        folder: Path,
        processes: Processes,
        progress: Callable[[str], None],
    ) -> None:
        self.settings, self.folder, self.processes, self.announce = settings, folder, processes, progress
        # A missing TensorBoard is an error before anything is computed.
        self._summary_writer = find_summary_writer() if settings.tensorboard and processes.is_first else None
        self.training, held_out = hold_out(source, settings.held_out)
        self.names = list(self.training.names)
        self.omissions = SkippedSequences(settings.bad_sequences, len(self.names) + len(held_out.names))
        validation = select_evenly(held_out, settings.validation_sequences)
        self.description: RunDescription = {
            "settings": asdict(settings),
            "training": self.names,
            "validation": list(validation.names),
        }
        self.validation = select_usable(validation, self.omissions)
        self.steps_per_epoch = math.ceil(len(self.names) / settings.batch)
        self.last_step = settings.epochs * self.steps_per_epoch
        torch.manual_seed(settings.seed)  # of the first weights
        self.network: Network = make_network(settings).to(
            processes.device,
            memory_format=torch.channels_last,  # type: ignore[call-overload]
        )
        self.optimiser = torch.optim.Adam(
            [parameter for parameter in self.network.parameters() if parameter.requires_grad],
            settings.learning_rate,
        )
        self.average: AveragedModel | None = None
        self.state = RunProgress(about={})
        self._last_save = time.monotonic()

    @property
    def result_network(self) -> Network:
        """Network that is validated and saved: the averaged weights where there are such."""
        return self.network if self.average is None else cast(Network, self.average.module)

    # ---- begin or resume

    def begin(self, origin: Mapping[str, str]) -> None:
        """Calibrate the network, and record it and its validation before the first step.

        Parameters
        ----------
        origin : mapping of str to str
            Additions to the metadata of the weights.
        """
        device, settings = self.processes.device, self.settings
        if not self.network.counts:  # initial weights bring their deviation maps
            calibration = select_evenly(self.training, settings.calibration_sequences)
            self.network.calibrate(calibration_frames(calibration, settings, device, self.omissions))
        self.state = RunProgress(about=dict(origin))
        if self.processes.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._save_weights(UNTRAINED, self.network)
            self.state.untrained = validate(self.network, self.validation, settings, device)
            self.state.l2 = validate(None, self.validation, settings, device)
            self.announce(
                f"before training: {_format_row(self.state.untrained)}; l2: {_format_row(self.state.l2)}"
            )
        self._open(None)

    def resume(self, origin: Mapping[str, str]) -> bool:
        """Continue from ``state.pt``; return False where there is none.

        Parameters
        ----------
        origin : mapping of str to str
            Additions to the metadata of the weights, if the state has none.

        Raises
        ------
        ValueError
            When the folder holds a run with other settings or sequences.
        """
        stored = load_state(self.folder, self.description, origin, self.processes.device)
        if stored is None:
            return False
        self.state = stored.progress
        self.omissions.reasons.update(stored.skipped)
        self.network.load_state_dict(stored.network)
        self.optimiser.load_state_dict(stored.optimiser)
        self._open(stored.average)
        return True

    def _open(self, average: dict[str, Any] | None) -> None:
        """Set up the averaged weights and the log, and write the settings."""
        if self.settings.average:
            # A copy of the network, hence after its weights and maps are set.
            decay = get_ema_multi_avg_fn(self.settings.average)
            self.average = AveragedModel(self.network, multi_avg_fn=decay)
            if average is not None:
                self.average.load_state_dict(average)
        if self.processes.is_first:
            content = json.dumps(self.description["settings"], indent=1) + "\n"
            (self.folder / SETTINGS).write_text(content)
        if self._summary_writer is not None:
            # Entries that a killed run wrote after its last checkpoint are written again.
            log_folder = str(self.folder / TENSORBOARD)
            self.log = self._summary_writer(log_folder, purge_step=self.state.step + 1)

    # ---- epochs and steps

    def train_until(self, deadline: float) -> TrainingResult:
        """Train to the last epoch, until patience is exhausted, or until the deadline.

        Parameters
        ----------
        deadline : float
            In the time of :func:`time.monotonic`.
        """
        reason = "epochs"
        self._last_save = time.monotonic()
        while self.state.step < self.last_step:
            if self._is_patience_exhausted():
                reason = "patience"
                break
            out_of_time = self.train_epoch(deadline)
            if out_of_time and self.state.step < self.last_step:
                reason = "minutes"
                break
        if self.log is not None:
            self.log.close()
        return TrainingResult(
            folder=self.folder,
            epochs=self.state.step // self.steps_per_epoch,
            steps=self.state.step,
            best=self.state.best,
            history=self.state.history,
            stopped=reason,
            skipped=self.omissions.reasons,
        )

    def _is_patience_exhausted(self) -> bool:
        """Return True at the start of an epoch after too many without a better validation."""
        epoch, position = divmod(self.state.step, self.steps_per_epoch)
        patience = self.settings.patience or math.inf
        exhausted = position == 0 and epoch - self.state.best_epoch >= patience
        return self.processes.any(self.processes.is_first and exhausted)

    def train_epoch(self, deadline: float) -> bool:
        """Train to the end of the current epoch, from wherever it stands; save the state.

        Returns
        -------
        bool
            True if the deadline came first, or with the last step.
        """
        start, out_of_time = time.monotonic(), False
        epoch, position = divmod(self.state.step, self.steps_per_epoch)
        order = np.random.default_rng((self.settings.seed, 1, epoch)).permutation(len(self.names))
        batches = np.split(order, range(self.settings.batch, len(order), self.settings.batch))[position:]
        for batch, examples in read_ahead(self.training, batches, epoch, self.settings, self.processes):
            self.step(epoch, batch, examples)
            # The last step's state is saved with the validation of the epoch.
            is_within_epoch = self.state.step % self.steps_per_epoch != 0
            seconds = time.monotonic() - self._last_save
            if is_within_epoch and seconds > 60 * self.settings.checkpoint_minutes:
                self.save()
            out_of_time = self.processes.any(time.monotonic() > deadline)
            if out_of_time:
                break
        if self.state.step % self.steps_per_epoch == 0 and self.processes.is_first:
            self.end_epoch(epoch + 1, start)
        self.save()
        return out_of_time

    def step(self, epoch: int, batch: np.ndarray, examples: Sequence[Example | SequenceError]) -> None:
        """Move the weights by the gradient of one batch.

        Parameters
        ----------
        epoch : int
        batch : ndarray of int
            Indices of its sequences, over all processes.
        examples : sequence of Example or SequenceError
            This process's share of them.

        Raises
        ------
        DivergedError
            When the loss or its gradient is not finite; the weights are as before.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = _learning_rate(self.settings, self.state.step, self.last_step)
        self.optimiser.zero_grad()
        usable = [example for example in examples if isinstance(example, Example)]
        sums = torch.zeros(4, dtype=torch.float64)  # of each term over the batch, and of usable sequences
        if usable:
            losses = batch_losses(self.network, usable, self.settings, self.processes.device, epoch)
            (losses[:, 0].sum() / len(batch)).backward()
            sums[:3], sums[3] = losses.detach().sum(0).cpu(), len(usable)
        gradients = [_gradient(p) for p in self.network.parameters() if p.requires_grad]
        self.processes.add_up([sums])
        self.processes.add_up(gradients)
        count = int(sums[3])
        if count < len(batch):
            self._skip_unusable(batch, examples)
            # The batch has the mean gradient of its usable sequences.
            for gradient in gradients:
                gradient.mul_(len(batch) / max(count, 1))
        terms = sums[:3] / count  # NaN where no sequence is usable
        if count:
            names = [self.names[k] for k in batch]
            _check_finite(terms, gradients, self.state.step, names, self.settings)
            self.optimiser.step()
        self.network.clamp_weights()
        if self.average is not None:
            self.average.update_parameters(self.network)
        self.state.step += 1
        self.state.losses.append(terms.tolist())
        self._log("training", dict(zip(TERMS, terms.tolist(), strict=True)))

    def _skip_unusable(self, batch: np.ndarray, examples: Sequence[Example | SequenceError]) -> None:
        """Skip the unusable sequences of a batch, in every process."""
        share = batch[self.processes.rank :: self.processes.count]
        unusable = {
            self.names[k]: str(error)
            for k, error in zip(share, examples, strict=True)
            if isinstance(error, SequenceError)
        }
        for name, reason in self.processes.merge(unusable).items():
            self.omissions.add(name, reason)

    def end_epoch(self, epoch: int, start: float) -> None:
        """Validate, add a row to the history, and save the weights if they are the best.

        Parameters
        ----------
        epoch : int
            Number of the epoch, from 1.
        start : float
            Its start in the time of :func:`time.monotonic`.
        """
        state = self.state
        # Steps without a usable sequence are NaN.
        means = np.nanmean(np.array(state.losses[-self.steps_per_epoch :]), axis=0)
        row: dict[str, float] = {"epoch": epoch, "step": state.step}
        row |= dict(zip(TERMS, means.tolist(), strict=True))
        row |= validate(self.result_network, self.validation, self.settings, self.processes.device)
        row |= {"untrained": state.untrained["spearman"], "l2": state.l2["spearman"]}
        row["seconds"] = time.monotonic() - start
        state.history.append(row)
        self.announce(f"epoch {epoch}: {_format_row(row)}")
        self._log("validation", row)
        if row["spearman"] > state.best:
            state.best, state.best_epoch = row["spearman"], epoch
            self._save_weights(WEIGHTS, self.result_network, validation_spearman=f"{state.best:.4f}")
        write_history(self.folder, state)

    # ---- files

    def save(self) -> None:
        """Write ``state.pt`` and ``losses.csv``, in the first process."""
        self._last_save = time.monotonic()
        if not self.processes.is_first:
            return
        average = None if self.average is None else self.average.state_dict()
        state = RunState(
            progress=self.state,
            description=self.description,
            skipped=self.omissions.reasons,
            network=self.network.state_dict(),
            optimiser=self.optimiser.state_dict(),
            average=average,
        )
        save_state(self.folder, state)

    def _save_weights(self, file: str, network: Network, **extra: str) -> None:
        """Write weights with their origin and further metadata."""
        origin = describe_origin(self.settings, self.state.step, self.names, self.omissions.reasons)
        metadata = {**self.state.about, **origin, **extra}
        save_checkpoint(self.folder / file, network.checkpoint(), self.settings.trunk, metadata)

    def _log(self, group: str, values: Mapping[str, float]) -> None:
        if self.log is not None:
            for name, value in values.items():
                self.log.add_scalar(f"{group}/{name}", value, self.state.step)


def batch_losses(
    network: Network,
    examples: Sequence[Example],
    settings: TrainingSettings,
    device: torch.device,
    epoch: int,
) -> Tensor:
    """Compute loss, squared error and correlation of each example.

    Returns
    -------
    Tensor of shape (example, 3), float64
    """
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


def _check_finite(
    terms: Tensor, gradients: Sequence[Tensor], step: int, names: Sequence[str], settings: TrainingSettings
) -> None:
    """Raise an error if the step would make the weights infinite or NaN."""
    norm = torch.nn.utils.get_total_norm(gradients)
    if not (torch.isfinite(terms).all() and torch.isfinite(norm)):
        loss, error, correlation = terms.tolist()
        raise DivergedError(
            f"step {step + 1}, with {', '.join(names)}: loss {loss:.3g} (squared error {error:.3g}, "
            f"correlation {correlation:.3g}), norm of the gradient {float(norm):.3g}. A learning_rate "
            f"below {settings.learning_rate:g}, or precision float32, may help; the folder holds the run "
            f"as last saved"
        )


def _learning_rate(settings: TrainingSettings, step: int, steps: int) -> float:
    if settings.schedule == "constant":
        return settings.learning_rate
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))


def _autocast(settings: TrainingSettings, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16")


@torch.no_grad()
def validate(
    network: Network | None,
    source: SequenceSource,
    settings: TrainingSettings,
    device: torch.device,
) -> dict[str, float]:
    """Correlate the distances to the reference with the ground truth, pooled over sequences.

    Frames are resized as the evaluation does, not cropped. Sequences whose frames differ only by rounding are
    left out.

    Parameters
    ----------
    network : DistanceNetwork, PairNetwork or None
        None takes the mean squared error as the distance.
    source : SequenceSource
        Sequences to validate on, all usable.
    settings : TrainingSettings
    device : torch.device

    Returns
    -------
    dict of str to float
        Pooled Spearman correlation: ``"spearman"`` over all, ``"spearman <data set>"`` of each data set.
    """
    rows: dict[str, list[tuple[np.ndarray, np.ndarray, float]]] = {}
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
        rows.setdefault("spearman", []).append(row)
        rows.setdefault(f"spearman {name.split('/')[0]}", []).append(row)
    return {name: pooled_spearman(*zip(*values, strict=True)) for name, values in rows.items()}


def make_network(settings: TrainingSettings) -> Network:
    """Make the network before training, from the seed or from a file.

    Raises
    ------
    lsim.weights.WeightsError
        When ``initial_weights`` are missing, or those of another network.
    """
    if settings.trunk == "non-siamese":
        return PairNetwork()
    network = DistanceNetwork(settings.trunk, settings.augmentation.size, settings.frozen_trunk)
    if settings.initial_weights is not None:
        network.load_initial(find_weights(settings.trunk, settings.initial_weights))
    return network


def _format_row(row: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name not in ("epoch", "step"))


@contextlib.contextmanager
def _torch_settings(threads: int | None) -> Iterator[None]:
    """Set torch up for training, and restore the caller's settings afterwards."""
    threads_before = torch.get_num_threads()
    # Torch has no query for this; a denormal product shows it.
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


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    """Return a gradient; zero where this process had no usable sequence in the batch."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
