"""Advection–diffusion in one dimension, drawn as a space–time image of the density.

Equation
    d_t + u d_x = ν d_xx,  u(x, t) = u(x, 0) + ∫ F dt + noise
    The velocity u is prescribed and not advected itself.
Domain
    x in [0, 1) periodic, t in [0, 1]; row i of the image is the time i / size, column j the place
    j / size. Density without unit, velocity in lengths per unit time, ν in lengths² per unit time.
Initial density
    sin³(2π · density_waves · x + density_phase), density_waves one of 2, 3, 4, 6, 12
Velocity, forcing and noise
    see :mod:`lsim.simulate.sine_waves`. The recipe ``density-noise`` has the noise on the density instead,
    added between the rows, so that it is advected and diffused, too.
Ranges
    ν log-uniform in [1e-3, 1e-2], so that converging flow doesn't squeeze the density below the grid
    at 256; noise 0.01…0.03, on the density 0.015…0.04; velocities of scale 0.2
    (:func:`lsim.simulate.sine_waves.draw_velocity`)
Varied
    one of mean, amplitude_1 … amplitude_8, phase_a, phase_b, forcing, forcing_speed, density_phase,
    viscosity, noise

Source: Kohl, Um, Thuerey: Learning Similarity Metrics for Numerical Simulations, ICML 2020, appendix on
advection–diffusion, for equation, initial values, forcing and the drawing as an image.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from . import sine_waves
from .fourier import Decay, PeriodicGrid, diffusion, integrating_factor_rk4
from .recipe import Parameters, Recipe, Variation

SUBSTEPS = 3
"""Time steps per row: stable up to a speed of 4.0, twice :data:`lsim.simulate.sine_waves.FASTEST`."""


def step(spectrum: Tensor, velocity: Tensor, decay: Decay, dt: float, grid: PeriodicGrid) -> Tensor:
    """Advance the density's spectrum by ``dt`` in a constant velocity.

    Parameters
    ----------
    spectrum : Tensor, shape (row, size // 2 + 1), complex
    velocity : Tensor, shape (row, size) or (row, 1)
        In lengths per unit time.
    decay : Decay
        Result of :func:`lsim.simulate.fourier.diffusion` for the same ``dt``.
    dt : float
    grid : PeriodicGrid
    """

    def advection(density: Tensor) -> Tensor:
        slope = grid.backward(grid.derivative(density))
        return grid.forward(velocity * slope).mul_(-grid.band)

    return integrating_factor_rk4(spectrum, advection, decay, dt)


def draw(rng: np.random.Generator) -> Parameters:
    """Draw a reference; the module's docstring has the ranges."""
    parameters = sine_waves.draw_velocity(rng, 0.2)
    parameters["density_waves"] = np.asarray(float(rng.choice([2, 3, 4, 6, 12])))
    parameters["density_phase"] = np.asarray(rng.uniform(0, 2 * math.pi))
    parameters["viscosity"] = np.asarray(1e-3 * 10 ** rng.uniform())
    parameters["noise"] = np.asarray(rng.uniform(0.01, 0.03))
    return parameters


def draw_noisy(rng: np.random.Generator) -> Parameters:
    """Draw a reference with noise on the density; the module's docstring has the ranges."""
    return draw(rng) | {"noise": np.asarray(rng.uniform(0.015, 0.04))}


def solve(
    parameters: dict[str, Tensor],
    generators: Sequence[np.random.Generator],
    size: int,
    device: torch.device,
    dtype: torch.dtype,
    noise_on: Literal["velocity", "density"] = "velocity",
) -> dict[str, Tensor]:
    """Solve for the density (row, time, x, 1); see :data:`lsim.simulate.recipe.Solver`."""
    grid = PeriodicGrid(size, 1, device, dtype)
    p = {name: values[:, None] for name, values in parameters.items()}
    (x,) = grid.coordinates
    interval = 1 / size
    dt = interval / SUBSTEPS
    decay = diffusion(grid, p["viscosity"], dt)
    noise = p["noise"][..., None] * sine_waves.white_noise(
        generators, len(p["noise"]) // len(generators), grid
    )

    velocity = sine_waves.initial_velocity(p, x)
    density = torch.sin(2 * math.pi * p["density_waves"] * x + p["density_phase"]) ** 3
    spectrum = grid.forward(density) * grid.band
    image = torch.empty(len(density), size, size, device=device, dtype=dtype)
    for row in range(size):
        image[:, row] = grid.backward(spectrum)
        for _ in range(SUBSTEPS):
            spectrum = step(spectrum, velocity, decay, dt, grid)
        velocity = velocity + interval * sine_waves.forcing(p, x, row * interval)
        if noise_on == "velocity":
            velocity = velocity + noise[:, row]
        else:
            spectrum = spectrum + grid.forward(noise[:, row])
    return {"density": image[..., None]}


VARIATIONS = {
    "mean": Variation(0.008),
    "amplitude_1": Variation(0.012),
    "amplitude_2": Variation(0.01),
    "amplitude_4": Variation(0.012),
    "amplitude_8": Variation(0.015),
    "phase_a": Variation(0.07),
    "phase_b": Variation(0.1),
    "forcing": Variation(0.25),
    "forcing_speed": Variation(0.05),
    "density_phase": Variation(0.05),
    "viscosity": Variation(0.2, relative=True, both_ways=False),
    "noise": Variation(0.2, relative=True, both_ways=False),
}

RECIPE = Recipe(
    name="advection-diffusion",
    title="density carried by a forced, noisy velocity; space–time image of a 1-D simulation",
    folder="advDiff",
    fields=("density",),
    draw=draw,
    variations=VARIATIONS,
    solve=solve,
)

NOISY_RECIPE = Recipe(
    name="density-noise",
    title="a noisy density carried by a forced velocity; space–time image of a 1-D simulation",
    folder="advDiffDensity",
    fields=("density",),
    draw=draw_noisy,
    variations=VARIATIONS,
    solve=functools.partial(solve, noise_on="density"),
    role="test",
)
