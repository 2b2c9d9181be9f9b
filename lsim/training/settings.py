"""Settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin, get_type_hints

from lsim.networks import TRUNKS, LsimTrunk
from lsim.training.sequences import Augmentation

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
"""Settings that may differ when a run is resumed."""


@dataclass(frozen=True)
class TrainingSettings:
    """Settings that determine a training run; the defaults are the published values where those are stated.

    Attributes
    ----------
    trunk : {"lsim", "skip", "alex", "non-siamese"}
    initial_weights : str or None
        Weights before the first step: a file that a run wrote, the name of published weights, or for the
        trunk ``alex`` ImageNet weights, as safetensors with torchvision's names.
    frozen_trunk : bool
        Train the channel weights alone.
    seed : int
    epochs : int, default 40
    batch : int, default 1
        Sequences per step, over all processes.
    learning_rate : float, default 1e-5
        Learning rate of Adam.
    schedule : {"constant", "cosine"}
        ``cosine`` lowers the learning rate to zero at the end of the last epoch.
    augment : {"sequence", "pair"}
        Augment all frames of a sequence alike, or each pair of frames by itself; see
        :mod:`lsim.training.train`.
    augmentation : Augmentation
    dropout : float, default 0.5
        Dropout of squared feature differences, before the channel weights.
    squared_error_weight, correlation_weight : float, default 0.3 and 0.7
    correlated_pairs : {"reference", "all"}
        Pairs over which the loss takes the correlation.
    held_out : float, default 0.05
        Share of the simulations that are held out for validation.
    validation_sequences : int or None
        Largest number of validation sequences, evenly spaced; None takes all that are held out.
    validation_size : int, default 224
        Side to which frames are resized for validation, as the evaluation does.
    calibration_sequences : int or None
        Number of sequences that set the deviation maps; None takes all.
    precision : {"float32", "bfloat16"}
        Precision of the trunk; ``bfloat16`` is mixed precision: features have it, parameters and distances
        do not.
    average : float, default 0
        Decay per step of an exponential average of the weights, which is then validated and saved; 0 is off.
    patience : int or None
        Stop after this many epochs without a better validation.
    bad_sequences : float, default 0.01
        Largest share of sequences that may be skipped as unusable; more end the run with an error.
    checkpoint_minutes : float, default 5
    tensorboard : bool, default True
    device : str, default "auto"
    threads : int or None
        Torch's threads on a CPU.
    readers : int, default 1
        Threads that read and augment sequences ahead of the step; a GPU needs several to stay busy.

    Raises
    ------
    ValueError
        When a value is out of range, or two of them contradict each other.
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
        """Reject values that are out of range or contradict each other."""
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                choices = ", ".join(map(repr, get_args(hint)))
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name, minimum in (
            ("epochs", 1),
            ("batch", 1),
            ("learning_rate", 0),
            ("patience", 1),
            ("threads", 1),
            ("readers", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
        for name in ("dropout", "average", "held_out", "bad_sequences"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        accepts = TRUNKS.get(self.trunk, LsimTrunk).takes
        for name, size in (
            ("augmentation.size", self.augmentation.size),
            ("validation_size", self.validation_size),
        ):
            if not accepts(size):
                raise ValueError(f"{name}: the trunk {self.trunk!r} cannot take frames of {size}×{size}")
        if self.frozen_trunk and (self.trunk == "non-siamese" or self.initial_weights is None):
            raise ValueError("a frozen trunk needs initial_weights, and a trunk other than non-siamese")
        if self.trunk == "non-siamese" and self.initial_weights is not None:
            raise ValueError(
                f"the trunk 'non-siamese' takes no initial_weights, got {self.initial_weights!r}"
            )
