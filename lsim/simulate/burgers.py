"""Burgers' equation in one dimension, drawn as a space–time image of the velocity.

Equation
    u_t + (u²/2)_x = ν u_xx + F + noise
Domain
    x in [0, 1) periodic, t in [0, 1]; row i of the image is the time i / size, column j the place
    j / size. Velocity in lengths per unit time, ν in lengths² per unit time.
Initial velocity, forcing and noise
    see :mod:`lsim.simulate.sine_waves`; forcing and noise are added between the rows
Ranges
    ν log-uniform in [2e-3, 2e-2], so that fronts are several points wide at 256; noise 0.02…0.06;
    velocities of scale 0.4 (:func:`lsim.simulate.sine_waves.draw_velocity`)
Varied
    one of mean, amplitude_1 … amplitude_8, phase_a, phase_b, forcing, forcing_speed, viscosity, noise

Source: Kohl, Um, Thuerey: Learning Similarity Metrics for Numerical Simulations, ICML 2020, appendix on
Burgers' equation, for equation, initial values, forcing and the drawing as an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import sine_waves
from .fourier import Decay, PeriodicGrid, diffusion, integrating_factor_rk4
from .recipe import Parameters, Recipe, Variation

SUBSTEPS = 2
"""Time steps per row: stable up to a speed of 2.6; :data:`lsim.simulate.sine_waves.FASTEST` is 2."""


def step(spectrum: Tensor, decay: Decay, dt: float, grid: PeriodicGrid) -> Tensor:
    """Advance the velocity's spectrum by ``dt``, without forcing.

    Parameters
    ----------
    spectrum : Tensor, shape (row, size // 2 + 1), complex
    decay : Decay
        Result of :func:`lsim.simulate.fourier.diffusion` for the same ``dt``.
    dt : float
    grid : PeriodicGrid
    """

    def advection(velocity: Tensor) -> Tensor:
        squared = grid.forward(grid.backward(velocity).square_())
        return grid.derivative(squared).mul_(-0.5 * grid.band)

    return integrating_factor_rk4(spectrum, advection, decay, dt)


def draw(rng: np.random.Generator) -> Parameters:
    """Draw a reference; the module's docstring has the ranges."""
    parameters = sine_waves.draw_velocity(rng, 0.4)
    parameters["viscosity"] = np.asarray(2e-3 * 10 ** rng.uniform())
    parameters["noise"] = np.asarray(rng.uniform(0.02, 0.06))
    return parameters


def solve(
    parameters: dict[str, Tensor],
    generators: Sequence[np.random.Generator],
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Solve for the velocity (row, time, x, 1); see :data:`lsim.simulate.recipe.Solver`."""
    grid = PeriodicGrid(size, 1, device, dtype)
    p = {name: values[:, None] for name, values in parameters.items()}
    (x,) = grid.coordinates
    interval = 1 / size
    dt = interval / SUBSTEPS
    decay = diffusion(grid, p["viscosity"], dt)
    noise = p["noise"][..., None] * sine_waves.white_noise(
        generators, len(p["noise"]) // len(generators), grid
    )

    spectrum = grid.forward(sine_waves.initial_velocity(p, x)) * grid.band
    image = torch.empty(len(spectrum), size, size, device=device, dtype=dtype)
    for row in range(size):
        image[:, row] = grid.backward(spectrum)
        for _ in range(SUBSTEPS):
            spectrum = step(spectrum, decay, dt, grid)
        spectrum = spectrum + grid.forward(
            interval * sine_waves.forcing(p, x, row * interval) + noise[:, row]
        )
    return {"velocity": image[..., None]}


RECIPE = Recipe(
    name="burgers",
    title="forced, noisy Burgers' equation; space–time image of a 1-D simulation",
    folder="burgersEq",
    fields=("velocity",),
    draw=draw,
    variations={
        "mean": Variation(0.015),
        "amplitude_1": Variation(0.018),
        "amplitude_2": Variation(0.022),
        "amplitude_4": Variation(0.035),
        "amplitude_8": Variation(0.07),
        "phase_a": Variation(0.07),
        "phase_b": Variation(0.13),
        "forcing": Variation(0.15),
        "forcing_speed": Variation(0.015),
        "viscosity": Variation(0.3, relative=True, both_ways=False),
        "noise": Variation(0.12, relative=True, both_ways=False),
    },
    solve=solve,
)
