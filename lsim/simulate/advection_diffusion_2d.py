"""Advection–diffusion of a density in two dimensions: the final state of a simulation.

Equation
    d_t + u·∇d = ν ∇²d,  u = mean + (∂P/∂y, −∂P/∂x),  P(x, t) = P(x, 0) + ∫ F dt + noise
    The velocity is prescribed and free of divergence, so the density's integral and bounds are conserved.
Domain
    periodic in x and y, t in [0, 1/2]; from 192 pixels on there is one point per 2 × 2 pixels, and the image
    is evaluated by the Fourier series. Density without unit, lengths in box lengths.
Initial density
    ((sin(2π · density_waves · x + density_phase) + sin(2π · density_waves · y)) / 2)³, density_waves 1…4
Velocity's potential P, its forcing F, and noise
    see :mod:`lsim.simulate.plane_waves`
Ranges
    ν log-uniform in [3e-4, 3e-3]; noise 0.002…0.006; velocities of scale 0.3
Varied
    one of mean_x, mean_y, amplitude_1 … amplitude_8, phase_a, phase_b, forcing, forcing_speed, density_phase,
    viscosity, noise

Source: Kohl, Um, Thuerey: Learning Similarity Metrics for Numerical Simulations, ICML 2020, and the scripts
of their later work on volumes (Kohl, Chen, Thuerey, AAAI 2023), for the form; the velocity's potential,
scales and steps are this project's.
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
    spectrum: Tensor, velocity: tuple[Tensor, Tensor], decay: Decay, dt: float, grid: PeriodicGrid
) -> Tensor:
    """Advance the density's spectrum by ``dt`` in a constant velocity (along x, along y)."""
    along_x, along_y = velocity

    def advection(density: Tensor) -> Tensor:
        slope_x = grid.backward(grid.derivative(density, -1))
        slope_y = grid.backward(grid.derivative(density, -2))
        return grid.forward(along_x * slope_x + along_y * slope_y).mul_(-grid.band)

    return integrating_factor_rk4(spectrum, advection, decay, dt)


def draw(rng: np.random.Generator) -> Parameters:
    """Draw a reference; the module's docstring has the ranges."""
    parameters = plane_waves.draw(rng, 0.3)
    parameters["density_waves"] = np.asarray(float(rng.integers(1, 5)))
    parameters["density_phase"] = np.asarray(rng.uniform(0, 2 * math.pi))
    parameters["viscosity"] = np.asarray(3e-4 * 10 ** rng.uniform())
    parameters["noise"] = np.asarray(rng.uniform(0.002, 0.006))
    return parameters


def solve(
    parameters: dict[str, Tensor],
    generators: Sequence[np.random.Generator],
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Solve for the density (row, y, x, 1); see :data:`lsim.simulate.recipe.Solver`."""
    grid = plane_waves.grid_for(size, device, dtype)
    p = parameters
    frames = len(p["noise"]) // len(generators)
    column = {name: p[name][:, None, None] for name in ("mean_x", "mean_y", "viscosity", "noise")}
    steps = plane_waves.steps_for(grid)
    dt = plane_waves.DURATION / steps
    decay = diffusion(grid, column["viscosity"], dt)

    y, x = grid.coordinates
    waves, phase = p["density_waves"][:, None, None], p["density_phase"][:, None, None]
    wave = torch.sin(2 * math.pi * waves * x + phase) + torch.sin(2 * math.pi * waves * y)
    spectrum = grid.forward((wave / 2) ** 3) * grid.band
    potential = plane_waves.potential(p, grid)
    for k in range(steps):
        velocity = (
            grid.backward(grid.derivative(potential, -2)) + column["mean_x"],
            column["mean_y"] - grid.backward(grid.derivative(potential, -1)),
        )
        spectrum = step(spectrum, velocity, decay, dt, grid)
        disturbance = math.sqrt(dt) * column["noise"] * plane_waves.noise(generators, frames, grid)
        potential = potential + dt * plane_waves.forcing(p, grid, k * dt) + disturbance
    return {"density": plane_waves.to_image(spectrum, grid, size)[..., None]}


RECIPE = Recipe(
    name="advection-diffusion-2d",
    title="density stirred by a forced, noisy velocity in two dimensions",
    folder="advDiff2d",
    fields=("density",),
    draw=draw,
    variations={
        "mean_x": Variation(0.01),
        "mean_y": Variation(0.01),
        "amplitude_1": Variation(0.015),
        "amplitude_2": Variation(0.015),
        "amplitude_4": Variation(0.02),
        "amplitude_8": Variation(0.02),
        "phase_a": Variation(0.05),
        "phase_b": Variation(0.05),
        "forcing": Variation(0.1),
        "forcing_speed": Variation(0.1),
        "density_phase": Variation(0.05),
        "viscosity": Variation(0.2, relative=True, both_ways=False),
        "noise": Variation(0.2, relative=True, both_ways=False),
    },
    solve=solve,
)
