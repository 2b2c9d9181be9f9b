"""Training of the learned metric on sequences of simulations: :func:`train`, or ``lsim train``."""

from lsim.training.sequences import (
    Augmentation,
    LayoutFolders,
    SequenceError,
    SequenceSource,
    TrainingSequence,
)
from lsim.training.settings import TrainingSettings
from lsim.training.train import TrainingResult, train

__all__ = [
    "Augmentation",
    "LayoutFolders",
    "SequenceError",
    "SequenceSource",
    "TrainingResult",
    "TrainingSequence",
    "TrainingSettings",
    "train",
]
