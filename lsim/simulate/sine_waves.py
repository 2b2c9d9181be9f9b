"""An initial velocity and a forcing of sine waves, for the recipes advection-diffusion and burgers.

Space is the periodic interval [0, 1), time runs over [0, 1]; a velocity is in lengths per unit time.

initial velocity
    u(x, 0) = mean + Σ_k amplitude_k sin(2πk x + θ_k),  k = 1, 2, 4, 8, with the phases
    θ = (phase_a, phase_b, 0.4 phase_a, 0.3 phase_b)
forcing
    F(x, t) = forcing · Σ_k amplitude_k sin(2πk (x + s(t)) + φ_k), with the phases
    φ = (0, phase_a, phase_b, 0.7 phase_a), and s(t) = forcing_speed · t · (½ + sin 3t): a pattern of
    the same waves that travels back and forth; its speed sets the frequency at a point
noise
    space–time white noise of strength ``noise``, without the waves shorter than 1/32, drawn independently
    for each frame: at each of the `size` rows the velocity gets a normal increment of variance
    noise² Δt/Δx per point (where Δt = Δx) before the short waves are dropped. The distribution doesn't
    depend on the resolution.

The form follows Kohl, Um, Thuerey (ICML 2020), appendix on data generation, and the scripts that the
authors published with their later work on volumes (Kohl, Chen, Thuerey, AAAI 2023). The scales are this
project's: the published ones are in the grid units of another solver.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .fourier import PeriodicGrid
from .recipe import Parameters

WAVES = (1, 2, 4, 8)
SHORTEST_NOISE = 32
"""Number of waves per box length of the finest noise."""
FASTEST = 2.0
"""Bound on the initial speed, in lengths per unit time: it limits the time step."""


def draw_velocity(rng: np.random.Generator, scale: float) -> Parameters:
    """Draw the parameters of initial velocity and forcing, all scalars.

    ``mean`` and ``amplitude_1`` are uniform within ± scale · (1…3), the amplitudes of 2 and 4 waves
    within 3/4 of it, of 8 waves within half. A strong initial velocity goes with a weak forcing, as in
    the published recipe. Velocities that could exceed :data:`FASTEST` are parameters again.
    """
    while True:
        vigour = rng.uniform()
        reach = scale * (1 + 2 * vigour)
        parameters = {
            "mean": reach * rng.uniform(-1, 1),
            "amplitude_1": reach * rng.uniform(-1, 1),
            "amplitude_2": reach * rng.uniform(-0.75, 0.75),
            "amplitude_4": reach * rng.uniform(-0.75, 0.75),
            "amplitude_8": reach * rng.uniform(-0.5, 0.5),
        }
        if sum(abs(value) for value in parameters.values()) <= FASTEST:
            break
    parameters["phase_a"], parameters["phase_b"] = rng.uniform(0, 2 * math.pi, 2)
    parameters["forcing"] = 0.5 + 2.5 * (1 - vigour)
    parameters["forcing_speed"] = rng.uniform(-0.4, 0.4)
    return {name: np.asarray(value) for name, value in parameters.items()}


def initial_velocity(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """Compute u(x, 0), shape (row, x), from parameters (row, 1)."""
    p = parameters
    phases = (p["phase_a"], p["phase_b"], 0.4 * p["phase_a"], 0.3 * p["phase_b"])
    return p["mean"] + _waves(p, x, phases)


def forcing(parameters: dict[str, Tensor], x: Tensor, time: float) -> Tensor:
    """Compute F(x, t), shape (row, x), from parameters (row, 1)."""
    p = parameters
    phases = (torch.zeros_like(p["phase_a"]), p["phase_a"], p["phase_b"], 0.7 * p["phase_a"])
    shift = p["forcing_speed"] * (time * (0.5 + math.sin(3 * time)))
    return p["forcing"] * _waves(p, x + shift, phases)


def white_noise(generators: Sequence[np.random.Generator], frames: int, grid: PeriodicGrid) -> Tensor:
    """Draw normal numbers (family · frame, time, x) without short waves: one stream per family."""
    shape = (frames, grid.size, grid.size)
    noise_values = np.concatenate([rng.standard_normal(shape, dtype=np.float32) for rng in generators])
    long_waves = grid.wavenumbers[-1] <= 2 * math.pi * (SHORTEST_NOISE + 0.5)
    return grid.backward(
        grid.forward(torch.from_numpy(noise_values).to(grid.laplacian)) * (grid.band * long_waves)
    )


def _waves(p: dict[str, Tensor], x: Tensor, phases: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(phases[0] + x)
    for k, phase in zip(WAVES, phases, strict=True):
        total = total + p[f"amplitude_{k}"] * torch.sin(2 * math.pi * k * x + phase)
    return total
