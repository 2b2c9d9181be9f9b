"""Metrics that fail in the ways that metrics do: for tests of what a run makes of it.

Each is the mean absolute difference, but for its fault; :mod:`paced` writes down who computed what.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import torch
from paced import FOLDER, WHO, Pace, Paced
from torch import Tensor

from lsim import Embedding, MetricInfo

BROKEN = "HINDERED_BROKEN"
"""Environment: set on workers whose metric cannot be set up."""
FATAL = "HINDERED_FATAL"
"""Environment: set on workers that die when they set up their metric."""


def marked(frames: Tensor) -> bool:
    """Whether frames are of the sequence that a test has marked: its first pixel is 7 after normalising."""
    return bool(frames.double().flatten(1).std(dim=1).max() < 1e-9)


class Unfit(Paced):
    """Can't be set up on some workers."""

    info = MetricInfo(title="can't be set up everywhere", source="this test")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        if os.environ.get(BROKEN):
            raise RuntimeError("no such device on this machine")
        super().__init__(*arguments, **options)


class Fatal(Paced):
    """Kills some workers when it is set up."""

    info = MetricInfo(title="can't be set up without dying", source="this test")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        if os.environ.get(FATAL):
            os._exit(9)
        super().__init__(*arguments, **options)


class Deadly(Paced):
    """Takes the whole worker with it, at frames that are constant."""

    info = MetricInfo(title="kills its worker", source="this test")

    def embed(self, frames: Tensor) -> Embedding:
        if marked(frames):
            Pace(Path(os.environ[FOLDER])).note("deadly", f"{zlib.crc32(frames.numpy().tobytes()):08x}")
            os._exit(9)
        return super().embed(frames)


class Raising(Paced):
    """Raises at frames that are constant, every time."""

    info = MetricInfo(title="raises", source="this test")

    def embed(self, frames: Tensor) -> Embedding:
        embedding = super().embed(frames)
        if marked(frames):
            raise ArithmeticError("no distances of these frames")
        return embedding


class Void(Paced):
    """Gives NaN for frames that are constant."""

    info = MetricInfo(title="NaN", source="this test")

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        distances = super().compare(a, b)
        return torch.where(torch.tensor(marked(a.parts["frames"])), torch.nan, distances)


__all__ = ["BROKEN", "FATAL", "WHO", "Deadly", "Fatal", "Raising", "Unfit", "Void"]
