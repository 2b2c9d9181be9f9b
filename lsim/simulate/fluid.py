"""Incompressible flow in a box with walls, on a staggered grid: what the recipes of smoke and liquid share.

Domain
    the unit square, n × n cells of width h = 1/n. Axis 1 is y, upwards; axis 2 is x; axis 0 a batch, whose
    members don't depend on one another.
Variables
    scalars at cell centres (row, n, n); velocity through the faces: ``u`` along x (row, n, n + 1), ``v``
    along y (row, n + 1, n). Lengths in box lengths.
Boundaries
    left, right and bottom are walls without friction: no flow through them. The top is a wall, too, or open:
    zero pressure, through which fluid leaves and enters. Scalars don't change across a boundary.
Advection
    semi-Lagrangian along second-order characteristics, corrected as by MacCormack and clamped to the values
    it was interpolated from (Selle, Fedkiw, Kim, Liu, Rossignac: An unconditionally stable MacCormack method,
    J. Sci. Comput. 35, 2008): second order where the flow is smooth, stable for any time step.
    With the projection after it, a step is of first order in time.
Projection
    exact to rounding: the discrete Poisson equation is diagonal in cosine transforms, DCT-II between walls
    and DCT-IV between a wall and an open side.
Obstacles
    cells that no flow enters. The velocity is made free of divergence and blocked in turns
    (:data:`PASSES` times, alternating projections), ending with blocked: nothing crosses an obstacle's faces,
    and some divergence is left in the cells beside them.

All runs in NumPy and Numba on the CPU, whatever the device asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numba
import numpy as np
import scipy.fft
import torch
from torch import Tensor

PASSES = 3
"""Projections a step where there is an obstacle."""

NOISE_CELLS = 16
"""Points of the coarse grid along each axis on which noise is drawn."""


class Box:
    """The unit square in n × n cells.

    Parameters
    ----------
    n : int
        Cells along each axis.
    open_top : bool
    dtype : numpy dtype
        float32 or float64, of all fields.
    """

    def __init__(self, n: int, open_top: bool, dtype: np.dtype) -> None:
        self.n, self.open_top, self.dtype = n, open_top, dtype
        k = np.arange(n)
        between_walls = 2 - 2 * np.cos(np.pi * k / n)
        to_open = 2 - 2 * np.cos(np.pi * (k + 0.5) / n)
        eigenvalues = ((to_open if open_top else between_walls)[:, None] + between_walls[None]) * n**2
        if not open_top:
            eigenvalues[0, 0] = 1  # the mean pressure between walls is nothing: set to zero
        self._inverse = (-1 / eigenvalues).astype(dtype)
        if not open_top:
            self._inverse[0, 0] = 0
        centres = ((k + 0.5) / n).astype(dtype)
        self.y, self.x = centres[:, None], centres[None, :]

    def still(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Velocity (u, v) at rest."""
        n = self.n
        return np.zeros((rows, n, n + 1), self.dtype), np.zeros((rows, n + 1, n), self.dtype)

    def divergence(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Divergence at cell centres, per unit time."""
        return np.asarray((np.diff(u, axis=2) + np.diff(v, axis=1)) * self.dtype.type(self.n))

    def project(
        self, u: np.ndarray, v: np.ndarray, blocked: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Make a velocity free of divergence, and block it in obstacles.

        Parameters
        ----------
        u, v : ndarray
        blocked : ndarray of bool, shape (row, n, n), optional
            Cells that are obstacles.

        Returns
        -------
        u, v, potential : ndarray
            What was taken away is the gradient of the potential: the pressure times the time step.
        """
        self._walls(u, v)
        if blocked is None:
            return self._project_once(u, v)
        total = np.zeros_like(u[:, :, 1:])
        for _ in range(PASSES):
            _block(u, v, blocked)
            u, v, potential = self._project_once(u, v)
            total += potential
        _block(u, v, blocked)
        return u, v, total

    def _project_once(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        kind = 4 if self.open_top else 2
        spectrum = scipy.fft.dct(self.divergence(u, v), 2, axis=2, workers=1)
        spectrum = scipy.fft.dct(spectrum, kind, axis=1, workers=1, overwrite_x=True)
        spectrum *= self._inverse
        potential = scipy.fft.idct(spectrum, kind, axis=1, workers=1, overwrite_x=True)
        potential = scipy.fft.idct(potential, 2, axis=2, workers=1, overwrite_x=True)
        scale = self.dtype.type(self.n)
        u[:, :, 1:-1] -= np.diff(potential, axis=2) * scale
        v[:, 1:-1] -= np.diff(potential, axis=1) * scale
        if self.open_top:
            v[:, -1] += 2 * scale * potential[:, -1]  # zero pressure half a cell above the last centre
        return u, v, potential

    def _walls(self, u: np.ndarray, v: np.ndarray) -> None:
        u[:, :, 0] = u[:, :, -1] = 0
        v[:, 0] = 0
        if not self.open_top:
            v[:, -1] = 0

    def carry_scalar(self, field: np.ndarray, u: np.ndarray, v: np.ndarray, dt: float) -> np.ndarray:
        """A scalar after a time step in a velocity."""
        return _maccormack(
            field, u, v, self.dtype.type(dt * self.n), self.dtype.type(0.5), self.dtype.type(0.5)
        )

    def carry_velocity(self, u: np.ndarray, v: np.ndarray, dt: float) -> tuple[np.ndarray, np.ndarray]:
        """A velocity after a time step in itself."""
        half, none, cells = self.dtype.type(0.5), self.dtype.type(0), self.dtype.type(dt * self.n)
        return _maccormack(u, u, v, cells, half, none), _maccormack(v, u, v, cells, none, half)

    def centred(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Velocity along x and y at the cell centres."""
        return (u[:, :, 1:] + u[:, :, :-1]) / 2, (v[:, 1:] + v[:, :-1]) / 2

    def noise(self, generators: Sequence[np.random.Generator], frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Normal numbers of variance one at every face, drawn on a coarse grid: one stream a family."""
        shape = (frames, 2, NOISE_CELLS, NOISE_CELLS)
        drawn = np.concatenate([rng.standard_normal(shape, dtype=np.float32) for rng in generators])
        centres, faces = _interpolation(self.n, False), _interpolation(self.n, True)
        coarse = drawn.astype(self.dtype)
        along_x = centres.astype(self.dtype) @ coarse[:, 0] @ faces.T.astype(self.dtype)
        along_y = faces.astype(self.dtype) @ coarse[:, 1] @ centres.T.astype(self.dtype)
        return along_x, along_y


def disc(box: Box, y: np.ndarray, x: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """How much of each cell a disc covers, about: (row, n, n) in [0, 1], moving smoothly with the disc."""
    shape = (-1, 1, 1)
    away = np.hypot(box.y[None] - y.reshape(shape), box.x[None] - x.reshape(shape)) - radius.reshape(shape)
    return np.clip(0.5 - away * box.n, 0, 1).astype(box.dtype)


def as_images(field: np.ndarray, size: int) -> np.ndarray:
    """A scalar (row, n, n), y upwards, as images (row, size, size), y downwards; interpolated linearly."""
    image = field[:, ::-1]
    n = field.shape[1]
    if n == size:
        return np.ascontiguousarray(image)
    matrix = _between_centres(n, size).astype(field.dtype)
    return matrix @ image @ matrix.T


def as_fields(
    box: Box, size: int, scalars: dict[str, np.ndarray], u: np.ndarray, v: np.ndarray
) -> dict[str, Tensor]:
    """Images of scalars (…, 1) and of the velocity (…, x y 0), y downwards in the image only."""
    images = {name: as_images(values, size)[..., None] for name, values in scalars.items()}
    along = [as_images(component, size) for component in box.centred(u, v)]
    images["velocity"] = np.stack([*along, np.zeros_like(along[0])], axis=-1)
    return {name: torch.from_numpy(np.ascontiguousarray(image)) for name, image in images.items()}


def cells_for(size: int) -> int:
    """Cells along each axis for images of ``size`` pixels: half as many from 192 on."""
    return size // 2 if size >= 192 else size


@cache
def _interpolation(n: int, faces: bool) -> np.ndarray:
    """Matrix that interpolates :data:`NOISE_CELLS` values to n centres or n + 1 faces, of unit variance."""
    places = np.arange(n + 1) / n if faces else (np.arange(n) + 0.5) / n
    matrix = _linear(places * (NOISE_CELLS - 1), NOISE_CELLS)
    return np.asarray(matrix / np.sqrt((matrix**2).sum(axis=1, keepdims=True)))


@cache
def _between_centres(n: int, m: int) -> np.ndarray:
    """Matrix that interpolates values at n cell centres to m cell centres of the same interval."""
    return _linear(np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1), n)


def _linear(places: np.ndarray, n: int) -> np.ndarray:
    matrix = np.zeros((len(places), n))
    low = np.minimum(places.astype(int), n - 2)
    rows = np.arange(len(places))
    matrix[rows, low] = 1 - (places - low)
    matrix[rows, low + 1] = places - low
    return matrix


# ---------------------------------------------------------------- kernels; positions are in cells


@numba.njit(nogil=True, cache=True)
def _sample(field, y, x):  # type: ignore[no-untyped-def]
    """Linear interpolation at an index position, held to the array's edge; with the range of the corners."""
    rows, columns = field.shape
    y = min(max(y, field.dtype.type(0)), field.dtype.type(rows - 1))
    x = min(max(x, field.dtype.type(0)), field.dtype.type(columns - 1))
    i, j = min(int(y), rows - 2), min(int(x), columns - 2)
    fy, fx = y - i, x - j
    a, b, c, d = field[i, j], field[i, j + 1], field[i + 1, j], field[i + 1, j + 1]
    one = field.dtype.type(1)
    value = (one - fy) * ((one - fx) * a + fx * b) + fy * ((one - fx) * c + fx * d)
    return value, min(min(a, b), min(c, d)), max(max(a, b), max(c, d))


@numba.njit(nogil=True, cache=True)
def _velocity(u, v, y, x):  # type: ignore[no-untyped-def]
    """Velocity at a position in cells from the box's corner."""
    half = u.dtype.type(0.5)
    return _sample(v, y, x - half)[0], _sample(u, y - half, x)[0]


@numba.njit(nogil=True, cache=True)
def _trace(u, v, y, x, cells):  # type: ignore[no-untyped-def]
    """Where fluid at a position was ``cells`` (a time over the cell width) ago: midpoint rule."""
    half = u.dtype.type(0.5)
    vy, vx = _velocity(u, v, y, x)
    vy, vx = _velocity(u, v, y - half * cells * vy, x - half * cells * vx)
    return y - cells * vy, x - cells * vx


@numba.njit(nogil=True, cache=True)
def _maccormack(field, u, v, cells, offset_y, offset_x):  # type: ignore[no-untyped-def]
    """Advect a field that lies at index + offset, in cells."""
    batch, rows, columns = field.shape
    out = np.empty_like(field)
    half = field.dtype.type(0.5)
    forward = np.empty((rows, columns), field.dtype)
    low = np.empty((rows, columns), field.dtype)
    high = np.empty((rows, columns), field.dtype)
    for b in range(batch):
        for i in range(rows):
            for j in range(columns):
                y, x = _trace(u[b], v[b], i + offset_y, j + offset_x, cells)
                forward[i, j], low[i, j], high[i, j] = _sample(field[b], y - offset_y, x - offset_x)
        for i in range(rows):
            for j in range(columns):
                y, x = _trace(u[b], v[b], i + offset_y, j + offset_x, -cells)
                back = _sample(forward, y - offset_y, x - offset_x)[0]
                corrected = forward[i, j] + half * (field[b, i, j] - back)
                out[b, i, j] = min(max(corrected, low[i, j]), high[i, j])
    return out


@numba.njit(nogil=True, cache=True)
def _block(u, v, blocked):  # type: ignore[no-untyped-def]
    """Stop all flow through the faces of blocked cells, in place."""
    batch, n, m = blocked.shape
    for b in range(batch):
        for i in range(n):
            for j in range(m):
                if blocked[b, i, j]:
                    u[b, i, j] = u[b, i, j + 1] = v[b, i, j] = v[b, i + 1, j] = 0
