"""Smoke: a warm plume that rises in a box and flows around an obstacle.

Equations
    u_t + (u·∇)u = −∇p + b d + f + noise,  ∇·u = 0,  d_t + u·∇d = 0
    with the velocity u, the pressure p (over the constant mass density), the density d of the smoke, the
    buoyancy b (Boussinesq: density weighs in the force alone) and a wind f along x, the same everywhere.
    Without viscosity; the scheme has some of its own (:mod:`lsim.simulate.fluid`).
Domain
    the unit square, t in [0, 1.1]; walls without friction left, right and below, open above; a disc that
    nothing flows through. From 192 pixels on there is one cell per 2 × 2 pixels.
Initial values
    at rest, without smoke; density is at least 1 within the source, a disc near the floor
Noise
    a normal acceleration of variance noise² / Δt, drawn independently for each frame and step, on a 16 × 16
    grid
Ranges
    source at x 0.35…0.65, y 0.08…0.14, radius 0.07…0.12; buoyancy along y 2…3.5, along x ±0.3; obstacle at x
    0.3…0.7, y 0.4…0.6, radius 0.06…0.12; wind ±0.1; noise 0.03…0.09
Varied
    one of source_x, source_y, source_radius, buoyancy_x, buoyancy_y, obstacle_x, obstacle_y, obstacle_radius,
    wind, noise
Fields
    density; velocity (x, y and 0); pressure

Source: the smoke data of Kohl, Um, Thuerey: Learning Similarity Metrics for Numerical Simulations, ICML 2020,
for the set-up and what is varied; solver, scales and steps are this project's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .fluid import Box, as_fields, cells_for, disc
from .recipe import Parameters, Recipe, Variation

DURATION, STEPS = 1.1, 44


def draw(rng: np.random.Generator) -> Parameters:
    """Draw a reference; the module's docstring has the ranges."""
    parameters = {
        "source_x": rng.uniform(0.35, 0.65),
        "source_y": rng.uniform(0.08, 0.14),
        "source_radius": rng.uniform(0.07, 0.12),
        "buoyancy_x": rng.uniform(-0.3, 0.3),
        "buoyancy_y": rng.uniform(2, 3.5),
        "obstacle_x": rng.uniform(0.3, 0.7),
        "obstacle_y": rng.uniform(0.4, 0.6),
        "obstacle_radius": rng.uniform(0.06, 0.12),
        "wind": rng.uniform(-0.1, 0.1),
        "noise": rng.uniform(0.03, 0.09),
    }
    return {name: np.asarray(value) for name, value in parameters.items()}


def solve(
    parameters: dict[str, Tensor],
    generators: Sequence[np.random.Generator],
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Solve for density, velocity and pressure, on the CPU; see :data:`lsim.simulate.recipe.Solver`."""
    precision = np.dtype(np.float32 if dtype == torch.float32 else np.float64)
    p = {name: values.cpu().numpy().astype(precision) for name, values in parameters.items()}
    rows, frames = len(p["noise"]), len(p["noise"]) // len(generators)
    box = Box(cells_for(size), open_top=True, dtype=precision)
    source = disc(box, p["source_y"], p["source_x"], p["source_radius"])
    blocked = disc(box, p["obstacle_y"], p["obstacle_x"], p["obstacle_radius"]) > 0.5
    b_x, b_y, wind, noise = (p[name][:, None, None] for name in ("buoyancy_x", "buoyancy_y", "wind", "noise"))

    dt = DURATION / STEPS
    u, v = box.velocity_at_rest(rows)
    density = np.zeros((rows, box.n, box.n), precision)
    potential = density
    for _ in range(STEPS):
        density = np.maximum(density, source)
        density = box.advect_scalar(density, u, v, dt)
        density[blocked] = 0
        u, v = box.advect_velocity(u, v, dt)
        noise_x, noise_y = box.noise(generators, frames)
        u += precision.type(dt) * wind + precision.type(dt**0.5) * noise * noise_x
        v += precision.type(dt**0.5) * noise * noise_y
        u[:, :, 1:-1] += precision.type(dt) * b_x * (density[:, :, 1:] + density[:, :, :-1]) / 2
        v[:, 1:-1] += precision.type(dt) * b_y * (density[:, 1:] + density[:, :-1]) / 2
        u, v, potential = box.project(u, v, blocked)
    return as_fields(box, size, {"density": density, "pressure": potential / dt}, u, v)


RECIPE = Recipe(
    name="smoke",
    title="warm smoke rising around an obstacle; walls, open above",
    folder="plume",
    fields=("density", "velocity", "pressure"),
    draw=draw,
    variations={
        "source_x": Variation(0.006),
        "source_y": Variation(0.006, both_ways=False),
        "source_radius": Variation(0.003, both_ways=False),
        "buoyancy_x": Variation(0.06),
        "buoyancy_y": Variation(0.05, both_ways=False),
        "obstacle_x": Variation(0.006),
        "obstacle_y": Variation(0.008),
        "obstacle_radius": Variation(0.005, both_ways=False),
        "wind": Variation(0.02),
        "noise": Variation(0.15, relative=True, both_ways=False),
    },
    solve=solve,
)
