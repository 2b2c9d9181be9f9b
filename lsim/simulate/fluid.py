"""Incompressible flow in a box with walls, on a staggered grid, for the recipes of smoke and liquid.

Domain
    the unit square, n × n cells of width h = 1/n. Axis 1 is y, upwards; axis 2 is x; axis 0 a batch of
    independent rows.
Variables
    scalars at cell centres (row, n, n); velocity through the faces: ``u`` along x (row, n, n + 1), ``v``
    along y (row, n + 1, n). Lengths in box lengths.
Boundaries
    left, right and bottom are walls without friction: no flow through them. The top is a wall, too, or open,
    with zero pressure: fluid leaves and enters. Scalars don't change across a boundary.
Advection
    semi-Lagrangian along second-order characteristics, with MacCormack's correction, clamped to the values
    that it interpolates (Selle, Fedkiw, Kim, Liu, Rossignac: An unconditionally stable MacCormack method,
    J. Sci. Comput. 35, 2008): second order where the flow is smooth, stable for any time step.
    Together with the projection, a step is of first order in time.
Projection
    exact to rounding: the discrete Poisson equation is diagonal in cosine transforms, DCT-II between walls
    and DCT-IV between a wall and an open side.
Obstacles
    cells that no flow enters. The velocity is alternately made free of divergence and blocked
    (:data:`PASSES` times, alternating projections), and blocked last: nothing crosses an obstacle's faces,
    and some divergence remains in the cells beside them.

Everything runs in NumPy and Numba on the CPU, for any requested device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import scipy.fft
import torch
from torch import Tensor

from lsim.compiled import compiled

PASSES = 3
"""Number of projections per step where there is an obstacle."""

NOISE_CELLS = 16
"""Number of points along each axis of the coarse grid on which noise is values."""


class Box:
    """The unit square in n × n cells.

    Parameters
    ----------
    n : int
        Cells along each axis.
    open_top : bool
    dtype : numpy dtype
        Precision of all fields: float32 or float64.
    """

    def __init__(self, n: int, open_top: bool, dtype: np.dtype) -> None:
        self.n, self.open_top, self.dtype = n, open_top, dtype
        k = np.arange(n)
        between_walls = 2 - 2 * np.cos(np.pi * k / n)
        to_open = 2 - 2 * np.cos(np.pi * (k + 0.5) / n)
        eigenvalues = ((to_open if open_top else between_walls)[:, None] + between_walls[None]) * n**2
        if not open_top:
            eigenvalues[0, 0] = 1  # the mean pressure between walls is arbitrary: set to zero below
        self._inverse = (-1 / eigenvalues).astype(dtype)
        if not open_top:
            self._inverse[0, 0] = 0
        centres = ((k + 0.5) / n).astype(dtype)
        self.y, self.x = centres[:, None], centres[None, :]

    def velocity_at_rest(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the velocity (u, v) of a fluid at rest."""
        n = self.n
        return np.zeros((rows, n, n + 1), self.dtype), np.zeros((rows, n + 1, n), self.dtype)

    def divergence(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Compute the divergence at cell centres, per unit time."""
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
            The velocity changes by the gradient of the potential, which is pressure times time step.
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

    def advect_scalar(self, field: np.ndarray, u: np.ndarray, v: np.ndarray, dt: float) -> np.ndarray:
        """Advect a scalar with a velocity for one time step."""
        return _maccormack(
            field, u, v, self.dtype.type(dt * self.n), self.dtype.type(0.5), self.dtype.type(0.5)
        )

    def advect_velocity(self, u: np.ndarray, v: np.ndarray, dt: float) -> tuple[np.ndarray, np.ndarray]:
        """Advect a velocity with itself for one time step."""
        half, zero, cells = self.dtype.type(0.5), self.dtype.type(0), self.dtype.type(dt * self.n)
        return _maccormack(u, u, v, cells, half, zero), _maccormack(v, u, v, cells, zero, half)

    def centred(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Interpolate the velocity along x and y to the cell centres."""
        return (u[:, :, 1:] + u[:, :, :-1]) / 2, (v[:, 1:] + v[:, :-1]) / 2

    def noise(self, generators: Sequence[np.random.Generator], frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw normal numbers of variance one at every face, from a coarse grid: one stream per family."""
        shape = (frames, 2, NOISE_CELLS, NOISE_CELLS)
        values = np.concatenate([rng.standard_normal(shape, dtype=np.float32) for rng in generators])
        centres, faces = _interpolation(self.n, False), _interpolation(self.n, True)
        coarse = values.astype(self.dtype)
        along_x = centres.astype(self.dtype) @ coarse[:, 0] @ faces.T.astype(self.dtype)
        along_y = faces.astype(self.dtype) @ coarse[:, 1] @ centres.T.astype(self.dtype)
        return along_x, along_y


def disc(box: Box, y: np.ndarray, x: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Approximate the share of each cell that a disc covers: (row, n, n) in [0, 1], smooth in its place."""
    shape = (-1, 1, 1)
    distance = np.hypot(box.y[None] - y.reshape(shape), box.x[None] - x.reshape(shape)) - radius.reshape(
        shape
    )
    return np.clip(0.5 - distance * box.n, 0, 1).astype(box.dtype)


def as_images(field: np.ndarray, size: int) -> np.ndarray:
    """Interpolate a scalar (row, n, n), y upwards, to images (row, size, size), y downwards."""
    image = field[:, ::-1]
    n = field.shape[1]
    if n == size:
        return np.ascontiguousarray(image)
    matrix = _between_centres(n, size).astype(field.dtype)
    return matrix @ image @ matrix.T


def as_fields(
    box: Box, size: int, scalars: dict[str, np.ndarray], u: np.ndarray, v: np.ndarray
) -> dict[str, Tensor]:
    """Convert scalars to images (…, 1) and the velocity to images (…, x y 0), with y downwards."""
    images = {name: as_images(values, size)[..., None] for name, values in scalars.items()}
    components = [as_images(component, size) for component in box.centred(u, v)]
    images["velocity"] = np.stack([*components, np.zeros_like(components[0])], axis=-1)
    return {name: torch.from_numpy(np.ascontiguousarray(image)) for name, image in images.items()}


def cells_for(size: int) -> int:
    """Return the cells along each axis for images of ``size`` pixels: half as many from 192 on."""
    return size // 2 if size >= 192 else size


@cache
def _interpolation(n: int, faces: bool) -> np.ndarray:
    """Return the matrix from :data:`NOISE_CELLS` values to n centres or n + 1 faces, of unit variance."""
    positions = np.arange(n + 1) / n if faces else (np.arange(n) + 0.5) / n
    matrix = _linear(positions * (NOISE_CELLS - 1), NOISE_CELLS)
    return np.asarray(matrix / np.sqrt((matrix**2).sum(axis=1, keepdims=True)))


@cache
def _between_centres(n: int, m: int) -> np.ndarray:
    """Return the matrix that interpolates n cell centres to m cell centres of the same interval."""
    return _linear(np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1), n)


def _linear(positions: np.ndarray, n: int) -> np.ndarray:
    """Return the matrix that interpolates n values linearly at index positions."""
    matrix = np.zeros((len(positions), n))
    low = np.minimum(positions.astype(int), n - 2)
    rows = np.arange(len(positions))
    matrix[rows, low] = 1 - (positions - low)
    matrix[rows, low + 1] = positions - low
    return matrix


# ---------------------------------------------------------------- kernels; positions are in cells


@compiled()
def _sample(field, y, x):  # type: ignore[no-untyped-def]
    """Interpolate linearly at an index position, clamped to the array; also return the corners' range."""
    rows, columns = field.shape
    y = min(max(y, field.dtype.type(0)), field.dtype.type(rows - 1))
    x = min(max(x, field.dtype.type(0)), field.dtype.type(columns - 1))
    i, j = min(int(y), rows - 2), min(int(x), columns - 2)
    fy, fx = y - i, x - j
    a, b, c, d = field[i, j], field[i, j + 1], field[i + 1, j], field[i + 1, j + 1]
    unit = field.dtype.type(1)
    value = (unit - fy) * ((unit - fx) * a + fx * b) + fy * ((unit - fx) * c + fx * d)
    return value, min(min(a, b), min(c, d)), max(max(a, b), max(c, d))


@compiled()
def _velocity(u, v, y, x):  # type: ignore[no-untyped-def]
    """Interpolate the velocity at a position in cells from the box's corner."""
    half = u.dtype.type(0.5)
    return _sample(v, y, x - half)[0], _sample(u, y - half, x)[0]


@compiled()
def _trace(u, v, y, x, cells):  # type: ignore[no-untyped-def]
    """Trace fluid back from a position by ``cells`` (time over cell width), by the midpoint rule."""
    half = u.dtype.type(0.5)
    vy, vx = _velocity(u, v, y, x)
    vy, vx = _velocity(u, v, y - half * cells * vy, x - half * cells * vx)
    return y - cells * vy, x - cells * vx


@compiled()
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
                backward = _sample(forward, y - offset_y, x - offset_x)[0]
                corrected = forward[i, j] + half * (field[b, i, j] - backward)
                out[b, i, j] = min(max(corrected, low[i, j]), high[i, j])
    return out


@compiled()
def _block(u, v, blocked):  # type: ignore[no-untyped-def]
    """Stop all flow through the faces of blocked cells, in place."""
    batch, n, m = blocked.shape
    for b in range(batch):
        for i in range(n):
            for j in range(m):
                if blocked[b, i, j]:
                    u[b, i, j] = u[b, i, j + 1] = v[b, i, j] = v[b, i + 1, j] = 0
