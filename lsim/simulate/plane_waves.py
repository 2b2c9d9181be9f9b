"""A potential of plane waves, its forcing, and smooth noise, for the two-dimensional recipes.

Space is the periodic square [0, 1)², time runs over [0, 1/2]; lengths are in box lengths. The fields have so
few waves that they are evaluated on a coarse grid and padded to the fine one, which is exact.

potential
    P(x, 0) = Σ_k amplitude_k / (2πk) Σ_j sin(2π K_kj · x + θ_kj),  k = 1, 2, 4, 8, two directions j each,
    integer wave vectors K_kj of about length k, phases θ_k1 = k phase_a, θ_k2 = k phase_b; its gradient has
    the strength amplitude_k
forcing
    forcing · P(x + s(t), ·), s(t) = forcing_speed · t · (½ + sin 3t) along both axes
noise
    white in time, flat in space up to :data:`NOISE_WAVES`, of strength ``noise``, drawn independently for
    each frame; its distribution doesn't depend on the resolution
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .fourier import PeriodicGrid, pad
from .recipe import Parameters

LENGTHS = (1, 2, 4, 8)
NOISE_WAVES = 12
COARSE = 32
"""Number of points of the coarse grid along each axis: enough for all waves in this module."""
FASTEST = 1.0
"""Bound on the initial speed |u| + |v|, in lengths per unit time: it limits the time step."""
DURATION = 0.5


def draw(rng: np.random.Generator, scale: float) -> Parameters:
    """Draw mean velocity, amplitudes, wave vectors, phases and forcing."""
    while True:
        parameters = {
            "mean_x": scale * rng.uniform(-1, 1),
            "mean_y": scale * rng.uniform(-1, 1),
            "amplitude_1": scale * rng.uniform(0.3, 1),
            "amplitude_2": scale * rng.uniform(0.2, 0.75),
            "amplitude_4": scale * rng.uniform(0.1, 0.6),
            "amplitude_8": scale * rng.uniform(0, 0.4),
        }
        waves = 2 * math.sqrt(2) * sum(parameters[f"amplitude_{k}"] for k in LENGTHS)
        if abs(parameters["mean_x"]) + abs(parameters["mean_y"]) + waves <= FASTEST:
            break
    parameters["phase_a"], parameters["phase_b"] = rng.uniform(0, 2 * math.pi, 2)
    parameters["forcing"] = rng.uniform(0.2, 1.5)
    parameters["forcing_speed"] = rng.uniform(-0.5, 0.5)
    angles = rng.uniform(0, 2 * math.pi, (len(LENGTHS), 2))
    vectors = np.rint(np.stack([np.sin(angles), np.cos(angles)], -1) * np.array(LENGTHS)[:, None, None])
    vectors[np.abs(vectors).sum(-1) == 0] = (0, 1)
    return {name: np.asarray(value) for name, value in parameters.items()} | {"wave_vectors": vectors}


def potential(p: dict[str, Tensor], grid: PeriodicGrid, shift: Tensor | float = 0.0) -> Tensor:
    """Compute the spectrum of P at x + ``shift`` (row,): (row, size, size // 2 + 1)."""
    coarse = _coarse(grid)
    y, x = coarse.coordinates
    field = torch.zeros(len(p["phase_a"]), COARSE, COARSE, device=y.device, dtype=y.dtype)
    offset = torch.as_tensor(shift, device=y.device, dtype=y.dtype).reshape(-1, 1, 1)
    for k, length in enumerate(LENGTHS):
        strength = p[f"amplitude_{length}"][:, None, None] / (2 * math.pi * length)
        for j, phase in enumerate(("phase_a", "phase_b")):
            k_y, k_x = (p["wave_vectors"][:, k, j, axis, None, None] for axis in (0, 1))
            waves = k_y * (y + offset) + k_x * (x + offset)
            angle = 2 * math.pi * waves + (k + 1) * p[phase][:, None, None]
            field = field + strength * torch.sin(angle)
    return pad(coarse.forward(field), grid)


def forcing(p: dict[str, Tensor], grid: PeriodicGrid, time: float) -> Tensor:
    """Compute the spectrum of the forcing's potential at a time."""
    shift = p["forcing_speed"] * (time * (0.5 + math.sin(3 * time)))
    return p["forcing"][:, None, None] * potential(p, grid, shift)


def noise(generators: Sequence[np.random.Generator], frames: int, grid: PeriodicGrid) -> Tensor:
    """Draw normal numbers of variance one, waves up to :data:`NOISE_WAVES`, as a spectrum."""
    coarse = _coarse(grid)
    noise_values = np.concatenate(
        [rng.standard_normal((frames, COARSE, COARSE), dtype=np.float32) for rng in generators]
    )
    limit = 2 * math.pi * (NOISE_WAVES + 0.5)
    k_y, k_x = coarse.wavenumbers
    inside = ((k_y.abs() < limit) & (k_x.abs() < limit)).to(coarse.laplacian.dtype)
    share = (2 * NOISE_WAVES + 1) / COARSE
    return pad(coarse.forward(torch.from_numpy(noise_values).to(coarse.laplacian)) * (inside / share), grid)


def steps_for(grid: PeriodicGrid) -> int:
    """Return the number of time steps with which twice :data:`FASTEST` is stable in the band."""
    largest = 2 / 3 * math.pi * grid.size
    return math.ceil(DURATION * 2 * FASTEST * largest / 2.8)


def grid_for(size: int, device: torch.device, dtype: torch.dtype) -> PeriodicGrid:
    """Make a grid with half as many points as pixels from 192 on; :func:`to_image` stays exact."""
    return PeriodicGrid(size // 4 * 2 if size >= 192 else size, 2, device, dtype)


def to_image(spectrum: Tensor, grid: PeriodicGrid, size: int) -> Tensor:
    """Transform a spectrum to its field at ``size`` points along each axis."""
    if grid.size == size:
        return grid.backward(spectrum)
    fine = PeriodicGrid(size, 2, spectrum.device, grid.laplacian.dtype)
    return fine.backward(pad(spectrum, fine))


def _coarse(grid: PeriodicGrid) -> PeriodicGrid:
    return PeriodicGrid(COARSE, 2, grid.laplacian.device, grid.laplacian.dtype)
