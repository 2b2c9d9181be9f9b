"""Transport of a density by a steady flow, without diffusion, along its characteristics.

Equation
    ∂c/∂t + u · ∇c = 0,  u = wind + ∇⊥ψ,  ψ = swirl/(2πm) · sin(2πm x + p) sin(2πm y + q): a uniform wind over
    Taylor–Green cells, which is a steady flow without divergence. Hence c(x, 1) = c₀(X), where X is the point
    that the flow takes to x within time 1, computed by eight Runge–Kutta steps of fourth order. Their error
    is the only one, and grows with the swirl: at m = 2 X is off by less than 5e-4 of the box at .25, by about
    .01 at .45, and at .65, the largest swirl of any family, by up to .18, and by more than .005 in 14 % of
    the pixels. With such swirls the fields are smooth maps of the initial density, not solutions of the
    equation.
Domain
    the unit square, periodic, y downwards
Initial density
    in half of the families a texture: tanh(sharpness · Σ of 8 plane waves of integer wave numbers up to
    2…6); in the others 1 to 4 puffs exp(−(r/radius)²) of radius 0.04…0.14; without unit
Ranges
    wind −0.2…0.2 along each axis; swirl 0…0.25; m 1 or 2; sharpness 0.5…4
Noise
    normal, independent in each pixel and frame, of a standard deviation uniform in 0…0.3
Varied
    wind along x or y in steps of 0.03, swirl in steps of 0.04

Not in the publication. In diffusive recipes that the mean squared error ranks well, little moves; this recipe
teaches how far structures have moved once they no longer overlap. The flow is that of Taylor and Green:
Mechanism of the production of small eddies from large ones, Proc. R. Soc. A 158, 1937.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .recipe import Parameters, Recipe, Variation
from .shapes import pixel_noise

WAVES = 8
MOST_PUFFS = 4
STEPS = 8


def draw(rng: np.random.Generator) -> Parameters:
    """Draw flow and initial density of a family; ``radius`` is 0 for absent puffs."""
    finest = rng.integers(2, 7)
    waves = rng.integers(-finest, finest + 1, (WAVES, 2))
    waves[(waves == 0).all(axis=1)] = 1
    radius = np.zeros(MOST_PUFFS)
    puffs = rng.integers(1, MOST_PUFFS + 1) if rng.uniform() < 0.5 else 0
    radius[:puffs] = rng.uniform(0.04, 0.14, puffs)
    return {
        "waves": waves.astype(float),
        "phase": rng.uniform(0, 2 * math.pi, WAVES),
        "amplitude": rng.standard_normal(WAVES) / math.sqrt(WAVES),
        "sharpness": np.asarray(rng.uniform(0.5, 4)),
        "centre": rng.uniform(size=(MOST_PUFFS, 2)),
        "radius": radius,
        "wind_x": np.asarray(rng.uniform(-0.2, 0.2)),
        "wind_y": np.asarray(rng.uniform(-0.2, 0.2)),
        "swirl": np.asarray(rng.uniform(0, 0.25)),
        "cells": np.asarray(float(rng.integers(1, 3))),
        "cell_phase": rng.uniform(0, 2 * math.pi, 2),
        "noise": np.asarray(rng.uniform(0, 0.3)),
    }


def solve(
    parameters: dict[str, Tensor],
    generators: Sequence[np.random.Generator],
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Compute the density (row, y, x, 1); see :data:`lsim.simulate.recipe.Solver`."""
    p = {name: value[..., None, None] for name, value in parameters.items()}
    pixels = (torch.arange(size, device=device, dtype=dtype) + 0.5) / size
    rows = len(p["noise"])
    y, x = (axis.expand(rows, size, size) for axis in (pixels[:, None], pixels[None, :]))
    y, x = departure(p, y, x)

    texture = torch.zeros_like(x)
    for wave in range(WAVES):
        angle = p["waves"][:, wave, 0] * y + p["waves"][:, wave, 1] * x
        texture += p["amplitude"][:, wave] * torch.cos(2 * math.pi * angle + p["phase"][:, wave])
    texture = torch.tanh(p["sharpness"] * texture)
    puffs = torch.zeros_like(x)
    for puff in range(MOST_PUFFS):
        # Of a puff's periodic images, only the nearest contributes at this radius.
        offsets = [c - p["centre"][:, puff, i] for i, c in enumerate((y, x))]
        squared = sum((a - a.round()).square() for a in offsets)
        radius = p["radius"][:, puff]
        puffs += (radius > 0) * torch.exp(-squared / radius.clamp(min=1e-6).square())

    density = torch.where(p["radius"][:, 0] > 0, puffs, texture)
    density = density + p["noise"] * pixel_noise(generators, rows, size).to(density)
    return {"density": density[..., None]}


def departure(p: dict[str, Tensor], y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Trace the flow back from (y, x) over time 1; parameters end with two axes of length 1."""
    k = 2 * math.pi * p["cells"]

    def flow(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        alpha, beta = k * x + p["cell_phase"][:, 0], k * y + p["cell_phase"][:, 1]
        return (
            p["wind_y"] - p["swirl"] * torch.cos(alpha) * torch.sin(beta),
            p["wind_x"] + p["swirl"] * torch.sin(alpha) * torch.cos(beta),
        )

    h = -1 / STEPS
    for _ in range(STEPS):
        y1, x1 = flow(y, x)
        y2, x2 = flow(y + h / 2 * y1, x + h / 2 * x1)
        y3, x3 = flow(y + h / 2 * y2, x + h / 2 * x2)
        y4, x4 = flow(y + h * y3, x + h * x3)
        y = y + h / 6 * (y1 + 2 * y2 + 2 * y3 + y4)
        x = x + h / 6 * (x1 + 2 * x2 + 2 * x3 + x4)
    return y, x


RECIPE = Recipe(
    name="transport",
    title="density carried along by a steady flow",
    folder="transport",
    fields=("density",),
    draw=draw,
    variations={
        "wind_x": Variation(0.03),
        "wind_y": Variation(0.03),
        "swirl": Variation(0.04),
    },
    solve=solve,
)
