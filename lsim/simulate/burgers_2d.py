"""Burgers' equation in two dimensions, for a velocity without curl: the final state of a simulation.

Equation
    u_t + (u·∇)u = ν ∇²u + ∇F + noise,  u = mean + ∇P.  A velocity without curl stays so, and its potential
    obeys P_t + mean·∇P + |∇P|²/2 = ν ∇²P + F + noise, the equation solved.
Domain
    periodic in x and y, t in [0, 1/2]; from 192 pixels on there is one point per 2 × 2 pixels, and the image
    is evaluated by the Fourier series. Velocity in box lengths per unit time.
Potential P, its forcing F, and noise
    see :mod:`lsim.simulate.plane_waves`
Ranges
    ν log-uniform in [2e-3, 1e-2], so that fronts are several points wide; noise 0.006…0.015; velocities of
    scale 0.3
Varied
    one of amplitude_1 … amplitude_8, phase_a, phase_b, mean_x, mean_y, forcing, forcing_speed, viscosity,
    noise

Source: Kohl, Um, Thuerey: Learning Similarity Metrics for Numerical Simulations, ICML 2020, and the scripts
of their later work on volumes (Kohl, Chen, Thuerey, AAAI 2023), for the form; the restriction to potentials,
scales and steps are this project's. For the potential's equation: Cole, Quart. Appl. Math. 9, 1951; Hopf,
Comm. Pure Appl. Math. 3, 1950.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import plane_waves
from .fourier import Decay, PeriodicGrid, diffusion, integrating_factor_rk4
from .recipe import Parameters, Recipe, Variation


def step(
    spectrum: Tensor, mean: tuple[Tensor, Tensor], decay: Decay, dt: float, grid: PeriodicGrid
) -> Tensor:
    """Advance the potential's spectrum by ``dt``, without forcing; ``mean`` velocity along x and y."""
    mean_x, mean_y = mean

    def tendency(potential: Tensor) -> Tensor:
        u = grid.backward(grid.derivative(potential, -1))
        v = grid.backward(grid.derivative(potential, -2))
        return grid.forward(u * (u / 2 + mean_x) + v * (v / 2 + mean_y)).mul_(-grid.band)

    return integrating_factor_rk4(spectrum, tendency, decay, dt)


def draw(rng: np.random.Generator) -> Parameters:
    """Draw a reference; the module's docstring has the ranges."""
    parameters = plane_waves.draw(rng, 0.3)
    parameters["viscosity"] = np.asarray(2e-3 * 5 ** rng.uniform())
    parameters["noise"] = np.asarray(rng.uniform(0.006, 0.015))
    return parameters


def solve(
    parameters: dict[str, Tensor],
    generators: Sequence[np.random.Generator],
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Solve for the velocity (row, y, x, 3: x, y and 0); see :data:`lsim.simulate.recipe.Solver`."""
    grid = plane_waves.grid_for(size, device, dtype)
    p = parameters
    frames = len(p["noise"]) // len(generators)
    column = {name: p[name][:, None, None] for name in ("mean_x", "mean_y", "viscosity", "noise")}
    mean = column["mean_x"], column["mean_y"]
    steps = plane_waves.steps_for(grid)
    dt = plane_waves.DURATION / steps
    decay = diffusion(grid, column["viscosity"], dt)

    spectrum = plane_waves.potential(p, grid)
    for k in range(steps):
        spectrum = step(spectrum, mean, decay, dt, grid)
        disturbance = math.sqrt(dt) * column["noise"] * plane_waves.noise(generators, frames, grid)
        spectrum = spectrum + dt * plane_waves.forcing(p, grid, k * dt) + disturbance
    u = plane_waves.to_image(grid.derivative(spectrum, -1), grid, size) + mean[0]
    v = plane_waves.to_image(grid.derivative(spectrum, -2), grid, size) + mean[1]
    return {"velocity": torch.stack([u, v, torch.zeros_like(u)], -1)}


RECIPE = Recipe(
    name="burgers-2d",
    title="forced, noisy Burgers' equation in two dimensions, for velocities without curl",
    folder="burgersEq2d",
    fields=("velocity",),
    draw=draw,
    variations={
        "mean_x": Variation(0.015),
        "mean_y": Variation(0.015),
        "amplitude_1": Variation(0.02),
        "amplitude_2": Variation(0.02),
        "amplitude_4": Variation(0.025),
        "amplitude_8": Variation(0.03),
        "phase_a": Variation(0.06),
        "phase_b": Variation(0.06),
        "forcing": Variation(0.12),
        "forcing_speed": Variation(0.15),
        "viscosity": Variation(0.2, relative=True, both_ways=False),
        "noise": Variation(0.2, relative=True, both_ways=False),
    },
    solve=solve,
)
