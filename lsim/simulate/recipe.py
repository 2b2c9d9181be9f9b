"""What a recipe is: a few numbers drawn at random, one of them to vary, and a solver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

FRAMES = 11
"""Frames of a family: the reference and ten steps of one parameter."""

Parameters: TypeAlias = dict[str, np.ndarray]
"""The parameters of one simulation by name; most are numbers (shape ``()``)."""

Solver: TypeAlias = Callable[
    [dict[str, Tensor], Sequence[np.random.Generator], int, torch.device, torch.dtype], dict[str, Tensor]
]
"""``solve(parameters, generators, size, device, dtype) -> {field: frames}``

parameters: each (row, …), a row being one frame of one family, families one after the other;
generators: one a family, for its noise, all drawn on the host, so that no row depends on the rows of
other families; frames: (row, y, x, channel), one channel for a scalar, three for a vector (x, y and 0, so
that metrics and PNG take it).
"""


@dataclass(frozen=True)
class Variation:
    """How one parameter moves through a family.

    Attributes
    ----------
    step : float
        From one frame to the next, in the parameter's own unit; ``relative``: as a fraction of the
        reference's value.
    relative : bool, default False
    both_ways : bool, default True
        Up or down at random; otherwise up only, for what must stay positive.
    """

    step: float
    relative: bool = False
    both_ways: bool = True


@dataclass(frozen=True)
class Recipe:
    """A way to make families of simulations.

    Attributes
    ----------
    name : str
        As users write it.
    title : str
        One line for people.
    folder : str
    fields : tuple of str
        Sequences are named ``<folder><number>.<field>``.
    draw : callable
        Draws the parameters of a reference from a generator.
    variations : mapping
        The parameters of which one is varied, with their steps.
    solve : Solver
    role : {"training", "test"}
        Whether the published evaluation trains on such data, or keeps it for tests alone.
    version : int
        Raised whenever the same seed gives other frames than before; written data is then remade.
    """

    name: str
    title: str
    folder: str
    fields: tuple[str, ...]
    draw: Callable[[np.random.Generator], Parameters]
    variations: Mapping[str, Variation]
    solve: Solver
    role: Literal["training", "test"] = "training"
    version: int = 1
