"""Damped circular waves with centres on straight lines: not a simulation, but an exactly known motion.

Motion
    as in :mod:`lsim.simulate.shapes`: centre(i) = start + (end − start) · position, position = 0, 0.1, …, 1
Value
    Σ cos(2π · frequency · r) · exp(−r / reach), r the distance from a wave's centre, in lengths of the box;
    without unit
Domain
    the unit square, y downwards; waves run out of it
Ranges
    1 to 3 waves; start and end uniform, further apart than 0.3; frequency 2…6, reach 0.08…0.2
Noise
    normal, independent in each pixel and frame, of standard deviation 0.15 in half of the families, none in
    the others
Varied
    position

Source: the wave data of Kohl, Um, Thuerey: Learning Similarity Metrics for Numerical Simulations, ICML 2020,
with the form of the script that the authors published with their later work on volumes (Kohl, Chen, Thuerey,
AAAI 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .recipe import Parameters, Recipe, Variation
from .shapes import draw_path, pixel_noise

MOST_WAVES = 3


def draw(rng: np.random.Generator) -> Parameters:
    """Draw the waves of a family; ``reach`` is 0 for those of the three that are absent."""
    count = rng.integers(1, MOST_WAVES + 1)
    start, end = np.zeros((2, MOST_WAVES, 2))
    frequency, reach = np.zeros((2, MOST_WAVES))
    for wave in range(count):
        start[wave], end[wave] = draw_path(rng)
        frequency[wave], reach[wave] = rng.uniform(2, 6), rng.uniform(0.08, 0.2)
    return {
        "start": start,
        "end": end,
        "frequency": frequency,
        "reach": reach,
        "noise": np.asarray(rng.choice([0.0, 0.15])),
        "position": np.asarray(0.0),
    }


def solve(
    parameters: dict[str, Tensor],
    generators: Sequence[np.random.Generator],
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Draw the elevation (row, y, x, 1); see :data:`lsim.simulate.recipe.Solver`."""
    p = parameters
    pixels = (torch.arange(size, device=device, dtype=dtype) + 0.5) / size
    y, x = pixels[:, None], pixels[None, :]
    centre = p["start"] + (p["end"] - p["start"]) * p["position"][:, None, None]
    image = torch.zeros(len(centre), size, size, device=device, dtype=dtype)
    for wave in range(MOST_WAVES):
        frequency, reach = (p[name][:, wave, None, None] for name in ("frequency", "reach"))
        r = torch.hypot(y - centre[:, wave, 0, None, None], x - centre[:, wave, 1, None, None])
        value = torch.cos(2 * math.pi * frequency * r) * torch.exp(-r / reach.clamp(min=1e-6))
        image = image + torch.where(reach > 0, value, torch.zeros_like(value))
    image = image + p["noise"][:, None, None] * pixel_noise(generators, len(centre), size).to(image)
    return {"elevation": image[..., None]}


RECIPE = Recipe(
    name="waves",
    title="damped circular waves moving along straight lines",
    folder="waves",
    fields=("elevation",),
    draw=draw,
    variations={"position": Variation(0.1, both_ways=False)},
    solve=solve,
    role="test",
)
