"""Discs and squares that move along straight lines: not a simulation, but an exactly known motion.

Motion
    centre(i) = start + (end − start) · position,  position = 0, 0.1, …, 1: all shapes move at once.
    Where shapes overlap, the largest value counts.
Domain
    The unit square, y downwards, with walls: no shape leaves it. Value 1 inside, 0 outside, without
    unit; the edge is a linear ramp, one pixel wide, or `edge` wide for smooth shapes.
Ranges
    1 to 5 shapes; start and end uniform, further apart than 0.3; radius 0.1…0.2 times the way; a square
    has half the side 0.85 · radius; half of the families smooth, with an edge of 1/32
Noise
    Normal, independent in each pixel and frame, of standard deviation 0.25 in half of the families,
    none in the others
Varied
    position

Source: the shape data of Kohl, Um, Thuerey: Learning Similarity Metrics for Numerical Simulations, ICML
2020, with the ranges of the script that the authors published with their later work on volumes (Kohl,
Chen, Thuerey, AAAI 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .recipe import Parameters, Recipe, Variation

MOST_SHAPES = 5


def draw(rng: np.random.Generator) -> Parameters:
    """Draw the shapes of a family; ``radius`` is 0 for those of the five that are absent."""
    count = rng.integers(1, MOST_SHAPES + 1)
    start, end = np.zeros((2, MOST_SHAPES, 2))
    radius = np.zeros(MOST_SHAPES)
    for shape in range(count):
        start[shape], end[shape] = draw_path(rng)
        radius[shape] = rng.uniform(0.1, 0.2) * np.linalg.norm(end[shape] - start[shape])
    return {
        "start": start,
        "end": end,
        "radius": radius,
        "square": rng.integers(0, 2, MOST_SHAPES).astype(float),
        "edge": np.asarray(rng.choice([0.0, 1 / 32])),
        "noise": np.asarray(rng.choice([0.0, 0.25])),
        "position": np.asarray(0.0),
    }


def solve(
    parameters: dict[str, Tensor],
    generators: Sequence[np.random.Generator],
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Draw the occupancy (row, y, x, 1); see :data:`lsim.simulate.recipe.Solver`."""
    p = parameters
    pixels = (torch.arange(size, device=device, dtype=dtype) + 0.5) / size
    y, x = pixels[:, None], pixels[None, :]
    edge = p["edge"].clamp(min=1 / size)[:, None, None]
    centre = p["start"] + (p["end"] - p["start"]) * p["position"][:, None, None]

    image = torch.zeros(len(centre), size, size, device=device, dtype=dtype)
    for shape in range(MOST_SHAPES):
        radius, square = (p[name][:, shape, None, None] for name in ("radius", "square"))
        offset_y, offset_x = ((axis - centre[:, shape, i, None, None]).abs() for i, axis in enumerate((y, x)))
        from_disc = torch.hypot(offset_y, offset_x) - radius
        from_square = torch.maximum(offset_y, offset_x) - 0.85 * radius
        outside = torch.where(square > 0, from_square, from_disc)
        covered = (0.5 - outside / edge).clamp(0, 1)
        image = torch.maximum(image, torch.where(radius > 0, covered, torch.zeros_like(covered)))

    image = image + p["noise"][:, None, None] * pixel_noise(generators, len(centre), size).to(image)
    return {"density": image[..., None]}


def pixel_noise(generators: Sequence[np.random.Generator], rows: int, size: int) -> Tensor:
    """Draw normal numbers (row, y, x), from one stream per family."""
    shape = (rows // len(generators), size, size)
    return torch.from_numpy(
        np.concatenate([rng.standard_normal(shape, dtype=np.float32) for rng in generators])
    )


def draw_path(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw start and end of a path, far enough from the walls for the largest shape on it."""
    while True:
        start, end = rng.uniform(size=(2, 2))
        margin = 0.25 * np.linalg.norm(end - start)
        start, end = np.clip(start, margin, 1 - margin), np.clip(end, margin, 1 - margin)
        if np.linalg.norm(end - start) > 0.3:
            return start, end


RECIPE = Recipe(
    name="shapes",
    title="discs and squares moving along straight lines",
    folder="shapes",
    fields=("density",),
    draw=draw,
    variations={"position": Variation(0.1, both_ways=False)},
    solve=solve,
    role="test",
)
