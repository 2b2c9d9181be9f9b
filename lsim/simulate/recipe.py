"""Recipes: a few random parameters, one of which is varied, and a solver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

FRAMES = 11
"""Number of frames of a family: the reference and ten steps of one parameter."""

Parameters: TypeAlias = dict[str, np.ndarray]
"""The parameters of one simulation by name; most are numbers (shape ``()``)."""

Solver: TypeAlias = Callable[
    [dict[str, Tensor], Sequence[np.random.Generator], int, torch.device, torch.dtype], dict[str, Tensor]
]
"""``solve(parameters, generators, size, device, dtype) -> {field: frames}``

parameters: each (row, …); a row is one frame of one family, families one after the other.
generators: one per family, for its noise, drawn on the host, so that no row depends on other families.
frames: (row, y, x, channel), one channel for a scalar, three for a vector (x, y and 0, so that metrics and
PNG accept it).
"""


@dataclass(frozen=True)
class Variation:
    """Variation of one parameter through a family.

    Attributes
    ----------
    step : float
        Change from one frame to the next, in the parameter's unit.
    relative : bool, default False
        The step is a fraction of the reference's value instead.
    both_ways : bool, default True
        Up or down at random; otherwise up only, for parameters that must stay positive.
    """

    step: float
    relative: bool = False
    both_ways: bool = True


@dataclass(frozen=True)
class Recipe:
    """A recipe for families of simulations.

    Attributes
    ----------
    name : str
        Name in commands and calls.
    title : str
        One-line description.
    folder : str
    fields : tuple of str
        Sequences are named ``<folder><number>.<field>``.
    draw : callable
        Draws the parameters of a reference from a generator.
    variations : mapping
        The parameters that can vary, one per family, with their steps.
    solve : Solver
    role : {"training", "test"}
        ``"test"`` if the published evaluation uses such data for tests alone.
    version : int
        Raised whenever the same seed gives other frames than before; existing data is then replaced.
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
