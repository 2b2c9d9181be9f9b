"""Files of a training run: its state, from which it is resumed, and its history as tables and a picture."""

from __future__ import annotations

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import torch

from lsim.training.settings import MAY_CHANGE, TrainingSettings

STATE, WEIGHTS, UNTRAINED, HISTORY, LOSSES, PICTURE, SETTINGS, TENSORBOARD = (
    "state.pt",
    "weights.safetensors",
    "untrained.safetensors",
    "history.csv",
    "losses.csv",
    "loss.png",
    "settings.json",
    "tensorboard",
)

TERMS = ("loss", "squared error", "correlation")
"""Names of the numbers recorded at each step, see :class:`lsim.training.loss.LossTerms`."""


class RunDescription(TypedDict):
    """Identity of a run: a resumed run must have the same, but for :data:`MAY_CHANGE`."""

    settings: dict[str, Any]
    training: list[str]
    validation: list[str]


@dataclass
class RunProgress:
    """Progress of a run.

    Attributes
    ----------
    about : dict of str to str
        Additions to the metadata of the weights, from the call that began the run.
    step : int
        Number of steps taken.
    losses : list of list of float
        :data:`TERMS` of each step; NaN where no sequence of the batch was usable.
    history : list of dict
        One row per epoch.
    best : float
        Best pooled Spearman correlation of a validation.
    best_epoch : int
        Epoch of that validation, from 1.
    untrained, l2 : dict of str to float
        Validation of the network before the first step, and of the mean squared error; in the first process.
    """

    about: dict[str, str]
    step: int = 0
    losses: list[list[float]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    best: float = -math.inf
    best_epoch: int = 0
    untrained: dict[str, float] = field(default_factory=dict)
    l2: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunState:
    """Content of ``state.pt``.

    Attributes
    ----------
    progress : RunProgress
    description : RunDescription
    skipped : dict of str to str
        Sequences that are skipped, and why.
    network, optimiser : dict
        Their state dicts.
    average : dict or None
        State dict of the averaged weights, where there are such.
    """

    progress: RunProgress
    description: RunDescription
    skipped: dict[str, str]
    network: dict[str, Any]
    optimiser: dict[str, Any]
    average: dict[str, Any] | None


def save_state(folder: Path, state: RunState) -> None:
    """Replace ``state.pt`` whole, and write ``losses.csv``."""
    stored = vars(state.progress) | {
        "described": state.description,
        "skipped": state.skipped,
        "network": state.network,
        "optimiser": state.optimiser,
    }
    if state.average is not None:
        stored["average"] = state.average
    partial = folder / f"{STATE}.partial"
    torch.save(stored, partial)
    os.replace(partial, folder / STATE)
    with (folder / LOSSES).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *TERMS])
        writer.writerows([step, *row] for step, row in enumerate(state.progress.losses, 1))


def load_state(
    folder: Path, description: RunDescription, origin: Mapping[str, str], device: torch.device
) -> RunState | None:
    """Load the state of a stopped run, or None where there is none.

    Parameters
    ----------
    folder : Path
    description : RunDescription
        Expected identity of the run.
    origin : mapping of str to str
        Replacement for the ``origin`` of states of earlier versions, which lack it.
    device : torch.device

    Raises
    ------
    ValueError
        When the folder holds a run with other settings or sequences.
    """
    path = folder / STATE
    if not path.exists():
        return None
    stored: dict[str, Any] = torch.load(path, weights_only=True, map_location=device)
    _check_same_run(path, stored["described"], description)
    names = [entry.name for entry in fields(RunProgress)]
    progress = {"about": dict(origin)} | {name: stored[name] for name in names if name in stored}
    return RunState(
        RunProgress(**progress),
        description,
        stored.get("skipped", {}),
        stored["network"],
        stored["optimiser"],
        stored.get("average"),
    )


def _check_same_run(path: Path, stored: RunDescription, description: RunDescription) -> None:
    old, current = stored["settings"], json.loads(json.dumps(description["settings"]))
    differences = [
        f"{key}: {old.get(key)!r} then, {value!r} now"
        for key, value in current.items()
        if key not in MAY_CHANGE and old.get(key) != value
    ]
    for side, names_before, names_now in (
        ("training", stored["training"], description["training"]),
        ("validation", stored["validation"], description["validation"]),
    ):
        if names_before != names_now:
            other_names = ", with other names" if len(names_before) == len(names_now) else ""
            differences.append(
                f"{len(names_before)} {side} sequences then, {len(names_now)} now{other_names}"
            )
    if differences:
        raise ValueError(f"{path} belongs to another run ({'; '.join(differences)}): choose another folder")


def describe_origin(
    settings: TrainingSettings, step: int, names: Sequence[str], omissions: Iterable[str]
) -> dict[str, str]:
    """Describe in the metadata of weights how they were trained."""
    datasets = Counter(name.split("/")[0] for name in names)
    return {
        "trained_by": f"lsim train, lsim {version('lsim')}, torch {torch.__version__}",
        "settings": json.dumps(asdict(settings)),
        "sequences": json.dumps(datasets),
        "skipped": json.dumps(sorted(omissions)),
        "steps": str(step),
    }


def write_history(folder: Path, progress: RunProgress) -> None:
    """Write ``history.csv`` and ``loss.png``."""
    history = progress.history
    with (folder / HISTORY).open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(key for row in history for key in row)))
        table.writeheader()
        table.writerows(history)

    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    loss_axes, rank_axes = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    loss_axes.plot(epochs, [row["loss"] for row in history], marker=".", label="loss")
    loss_axes.plot(epochs, [row["squared error"] for row in history], marker=".", label="squared error")
    rank_axes.plot(epochs, [row["spearman"] for row in history], marker=".", label="this network")
    rank_axes.axhline(progress.untrained["spearman"], color="0.5", linestyle="--", label="before training")
    rank_axes.axhline(progress.l2["spearman"], color="0.5", linestyle=":", label="l2")
    loss_axes.set(xlabel="epoch", title="training", ylim=(0, None))
    rank_axes.set(xlabel="epoch", title="pooled Spearman, held out")
    loss_axes.legend()
    rank_axes.legend()
    figure.savefig(folder / PICTURE, dpi=120)


def find_summary_writer() -> Any:
    """Import TensorBoard's writer class.

    Raises
    ------
    ValueError
        When TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "tensorboard is not installed: pip install 'lsim[train]', or set tensorboard: false"
        ) from error
    return SummaryWriter
