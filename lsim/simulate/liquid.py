"""A liquid-like two-phase flow: a drop that falls into a basin, and the same on a noisy background.

Scope
    Two immiscible fluids of different weight in a closed box. The difference acts in gravity alone
    (Boussinesq) and both have the same inertia: the drop sinks, spreads and stirs the basin like a heavy
    fluid in a slightly lighter one. There is no surface tension, no free surface with weightless air, no
    spray and no splash. It resembles the published liquid data in its look, a sharp interface that is torn
    and folded, and not in its physics.
Equations
    u_t + (u·∇)u = −∇p − g (c − ½) + noise,  ∇·u = 0,  c_t + u·∇c = 0
    with the velocity u, the pressure p, gravity g, and the liquid's share c of a cell, 0 or 1 except in
    the interface. After each step the interface is sharpened by the flux of the conservative phase field,
    ∇·(ε ∇c − c (1 − c) n), n = ∇c / |∇c|, ε half a cell (Chiu, Lin, J. Comput. Phys. 230, 2011). Liquid that
    the advection gained or lost is restored within the interface.
Domain
    the unit square with walls without friction all around, t in [0, 1]; from 192 pixels on there is one cell
    per 2 × 2 pixels
Initial values
    at rest; a basin of liquid and a disc of it above
Noise
    a normal acceleration of variance noise² / Δt, drawn independently for each frame and step, on a 16 × 16
    grid
Background (``liquid-noise`` only)
    where there is no liquid, normal noise of standard deviation 0.2 times the field's range, independent in
    each pixel, frame and channel
Ranges
    drop at x 0.3…0.7, y 0.55…0.75, radius 0.1…0.18; basin 0.15…0.3 high; gravity along y 3…5, along x ±0.5;
    noise 0.02…0.06
Varied
    one of drop_x, drop_y, drop_radius, basin, gravity_x, gravity_y, noise
Fields
    phase (the liquid's share); velocity (x, y and 0)

Source: the liquid data of Kohl, Um, Thuerey: Learning Similarity Metrics for Numerical Simulations, ICML
2020, for the set-up, what is varied, and the noisy background; solver, scales and steps are this project's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lsim.compiled import compiled

from .fluid import Box, as_fields, cells_for, disc
from .recipe import Parameters, Recipe, Variation

DURATION, STEPS = 1.0, 40
BACKGROUND = 0.2
"""Standard deviation of the noisy background, as a share of a field's range."""


def draw(rng: np.random.Generator) -> Parameters:
    """Draw a reference; the module's docstring has the ranges."""
    parameters = {
        "drop_x": rng.uniform(0.3, 0.7),
        "drop_y": rng.uniform(0.55, 0.75),
        "drop_radius": rng.uniform(0.1, 0.18),
        "basin": rng.uniform(0.15, 0.3),
        "gravity_x": rng.uniform(-0.5, 0.5),
        "gravity_y": rng.uniform(3, 5),
        "noise": rng.uniform(0.02, 0.06),
    }
    return {name: np.asarray(value) for name, value in parameters.items()}


def solve(
    parameters: dict[str, Tensor],
    generators: Sequence[np.random.Generator],
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Solve for phase and velocity, on the CPU; see :data:`lsim.simulate.recipe.Solver`."""
    precision = np.dtype(np.float32 if dtype == torch.float32 else np.float64)
    p = {name: values.cpu().numpy().astype(precision) for name, values in parameters.items()}
    rows, frames = len(p["noise"]), len(p["noise"]) // len(generators)
    box = Box(cells_for(size), open_top=False, dtype=precision)
    basin = np.clip(0.5 + (p["basin"][:, None, None] - box.y[None]) * box.n, 0, 1).astype(precision)
    phase = np.maximum(disc(box, p["drop_y"], p["drop_x"], p["drop_radius"]), basin)
    g_x, g_y, noise = (p[name][:, None, None] for name in ("gravity_x", "gravity_y", "noise"))

    dt = DURATION / STEPS
    u, v = box.velocity_at_rest(rows)
    amount = phase.sum(axis=(1, 2), dtype=np.float64)
    for _ in range(STEPS):
        phase = sharpen(box.advect_scalar(phase, u, v, dt))
        phase = restore(phase, amount)
        u, v = box.advect_velocity(u, v, dt)
        noise_x, noise_y = box.noise(generators, frames)
        u += precision.type(dt**0.5) * noise * noise_x
        v += precision.type(dt**0.5) * noise * noise_y
        u[:, :, 1:-1] -= precision.type(dt) * g_x * ((phase[:, :, 1:] + phase[:, :, :-1]) / 2 - 0.5)
        v[:, 1:-1] -= precision.type(dt) * g_y * ((phase[:, 1:] + phase[:, :-1]) / 2 - 0.5)
        u, v, _ = box.project(u, v)
    return as_fields(box, size, {"phase": phase}, u, v)


def solve_on_noise(
    parameters: dict[str, Tensor],
    generators: Sequence[np.random.Generator],
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Solve for phase and velocity, with a noisy background where there is no liquid."""
    solved = solve(parameters, generators, size, device, dtype)
    frames = len(solved["phase"]) // len(generators)
    empty = 1 - solved["phase"].clamp(0, 1)
    noisy = {}
    for name, images in solved.items():
        channels = 2 if images.shape[-1] == 3 else 1  # the third channel of a velocity stays 0
        noise_values = np.concatenate(
            [rng.standard_normal((frames, size, size, channels), dtype=np.float32) for rng in generators]
        )
        by_family = images.reshape(len(generators), -1)
        span = (by_family.amax(1) - by_family.amin(1)).repeat_interleave(frames)[:, None, None, None]
        noisy[name] = images.clone()
        noisy[name][..., :channels] += BACKGROUND * span * empty * torch.from_numpy(noise_values).to(images)
    return noisy


def restore(phase: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Restore each row's sum of liquid to ``amount``, by a change within the interface."""
    interface = phase * (1 - phase)
    missing = amount - phase.sum(axis=(1, 2), dtype=np.float64)
    share = missing / np.maximum(interface.sum(axis=(1, 2), dtype=np.float64), 1e-6)
    return np.asarray(phase + share[:, None, None].astype(phase.dtype) * interface)


@compiled()
def sharpen(phase):  # type: ignore[no-untyped-def]
    """Take a pseudo-time step of ∇·(ε ∇c − c (1 − c) n) in units of cells, ε = ½; the sum is conserved.

    Parameters
    ----------
    phase : ndarray of shape (row, y, x)
    """
    rows, n, m = phase.shape
    kind = phase.dtype.type
    epsilon, step, tiny = kind(0.5), kind(0.25), kind(1e-6)
    out = phase.copy()
    for b in range(rows):
        c = phase[b]
        for i in range(n):
            for j in range(m):
                up, down = c[min(i + 1, n - 1), j], c[max(i - 1, 0), j]
                right, left = c[i, min(j + 1, m - 1)], c[i, max(j - 1, 0)]
                if j + 1 < m:  # flux through the face to the right, between (i, j) and (i, j + 1)
                    slope = right - c[i, j]
                    up_r, down_r = c[min(i + 1, n - 1), j + 1], c[max(i - 1, 0), j + 1]
                    tangential = kind(0.25) * (up + up_r - down - down_r)
                    mean = kind(0.5) * (right + c[i, j])
                    normal = slope / np.sqrt(slope * slope + tangential * tangential + tiny)
                    flux = step * (epsilon * slope - mean * (kind(1) - mean) * normal)
                    out[b, i, j] += flux
                    out[b, i, j + 1] -= flux
                if i + 1 < n:
                    slope = up - c[i, j]
                    right_u, left_u = c[i + 1, min(j + 1, m - 1)], c[i + 1, max(j - 1, 0)]
                    tangential = kind(0.25) * (right + right_u - left - left_u)
                    mean = kind(0.5) * (up + c[i, j])
                    normal = slope / np.sqrt(slope * slope + tangential * tangential + tiny)
                    flux = step * (epsilon * slope - mean * (kind(1) - mean) * normal)
                    out[b, i, j] += flux
                    out[b, i + 1, j] -= flux
    return out


VARIATIONS = {
    "drop_x": Variation(0.006),
    "drop_y": Variation(0.006),
    "drop_radius": Variation(0.003, both_ways=False),
    "basin": Variation(0.004, both_ways=False),
    "gravity_x": Variation(0.06),
    "gravity_y": Variation(0.06, both_ways=False),
    "noise": Variation(0.15, relative=True, both_ways=False),
}

RECIPE = Recipe(
    name="liquid",
    title="a drop of heavy fluid falling into a basin: a two-phase stand-in for a liquid",
    folder="drop",
    fields=("phase", "velocity"),
    draw=draw,
    variations=VARIATIONS,
    solve=solve,
)

NOISY_RECIPE = Recipe(
    name="liquid-noise",
    title="the liquid-like flow on a noisy background",
    folder="dropNoise",
    fields=("phase", "velocity"),
    draw=draw,
    variations=VARIATIONS,
    solve=solve_on_noise,
    role="test",
)
