"""Fourier pseudo-spectral building blocks on periodic boxes.

A recipe keeps its state as Fourier coefficients, evaluates products in space, drops the third of the
wave numbers that a product of two fields pollutes (the 2/3 rule of Orszag, 1971), and advances with an
integrating factor: diffusion exactly, the rest by the classic fourth-order Runge–Kutta scheme.

Everything is batched over the leading axes, and a row's result is bit-identical for any rows beside it. That
excludes products of two whole batches of spectra, since torch rounds the last few of such products
differently. Real factors, and complex factors shared by all rows, are safe.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class PeriodicGrid:
    """A box [0, 1)^dim with ``size`` points along each axis and periodic boundaries.

    Fields are tensors (..., size) or (..., size, size); their spectra (complex) have size // 2 + 1
    along the last axis. Lengths are in box lengths, wave numbers in radians per box length.

    Parameters
    ----------
    size : int
        Number of points along each axis, even and at least 16.
    dim : int, default 1
    device, dtype
        Device and precision of the fields; float32 or float64.

    Attributes
    ----------
    coordinates : tuple of Tensor
        Coordinates along each axis, shaped to broadcast against a field; the last is x.
    wavenumbers : tuple of Tensor
        Wave numbers along each axis, shaped to broadcast against a spectrum.
    laplacian : Tensor
        −|k|², the Laplacian as a factor on a spectrum.
    band : Tensor
        1 where every |k| is below 2/3 of the largest wave number, else 0.
    """

    def __init__(
        self,
        size: int,
        dim: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if size < 16 or size % 2:
            raise ValueError(f"a periodic grid needs an even size of at least 16 points, got {size}")
        self.size, self.dim = size, dim
        self._axes = tuple(range(-dim, 0))
        exact = torch.float64
        points = torch.arange(size, dtype=exact) / size
        both_signs = 2 * math.pi * torch.fft.fftfreq(size, 1 / size, dtype=exact)
        one_sign = 2 * math.pi * torch.fft.rfftfreq(size, 1 / size, dtype=exact)
        wavenumbers = [_reshape_along(one_sign if axis == -1 else both_signs, axis) for axis in self._axes]
        nyquist = math.pi * size

        self.coordinates = tuple(_reshape_along(points, axis).to(device, dtype) for axis in self._axes)
        self.wavenumbers = tuple(k.to(device, dtype) for k in wavenumbers)
        self.laplacian = -sum((k * k for k in wavenumbers), torch.zeros((), dtype=exact)).to(device, dtype)
        inside = torch.ones((), dtype=torch.bool)
        for k in wavenumbers:
            inside = inside & (k.abs() < 2 / 3 * nyquist)
        self.band = inside.to(device, dtype)
        # The sampled derivative of the highest wave is zero: its sine vanishes at all points.
        self._derivatives = tuple(
            (1j * torch.where(k.abs() < nyquist * (1 - 1e-9), k, 0 * k)).to(device, _complex(dtype))
            for k in wavenumbers
        )

    def forward(self, field: Tensor) -> Tensor:
        """Transform a real field to its spectrum; the leading axes are a batch."""
        return torch.fft.rfftn(field, dim=self._axes)

    def backward(self, spectrum: Tensor) -> Tensor:
        """Transform a spectrum to its real field; the leading axes are a batch."""
        return torch.fft.irfftn(spectrum, s=(self.size,) * self.dim, dim=self._axes)

    def derivative(self, spectrum: Tensor, axis: int = -1) -> Tensor:
        """Differentiate a spectrum along ``axis`` (−1 is x, −2 is y)."""
        return spectrum * self._derivatives[axis]


class Decay(NamedTuple):
    """Factors of diffusion on each Fourier coefficient over half a time step and over a whole one."""

    half: Tensor
    full: Tensor


def diffusion(grid: PeriodicGrid, viscosity: Tensor, dt: float) -> Decay:
    """Compute the exact solution operator of u_t = ν ∇²u: exp(−ν |k|² dt) per coefficient.

    Parameters
    ----------
    grid : PeriodicGrid
    viscosity : Tensor
        ν in box lengths² per unit time; broadcasts against a spectrum.
    dt : float
        Time step.
    """
    rate = viscosity * grid.laplacian
    return Decay(torch.exp(rate * (dt / 2)), torch.exp(rate * dt))


def integrating_factor_rk4(
    spectrum: Tensor, tendency: Callable[[Tensor], Tensor], decay: Decay, dt: float
) -> Tensor:
    """Take one time step of U_t = L U + N(U), where ``decay`` solves the linear part exactly.

    The classic Runge–Kutta scheme of fourth order in the variable exp(−L t) U; see Kassam and
    Trefethen, Fourth-order time-stepping for stiff PDEs, SIAM J. Sci. Comput. 26 (2005), section 2.
    Stable for advection while speed · k · dt < 2.8, where k is the largest wave number in use.

    Parameters
    ----------
    spectrum : Tensor
        U at the beginning of the step.
    tendency : callable
        N, from a spectrum to a spectrum.
    decay : Decay
        exp(L dt / 2) and exp(L dt).
    dt : float
    """
    at_start = spectrum * decay.half
    a = tendency(spectrum)
    b = tendency(at_start + (dt / 2) * (decay.half * a))
    c = tendency(at_start + (dt / 2) * b)
    d = tendency(decay.full * spectrum + dt * (decay.half * c))
    return decay.full * (spectrum + (dt / 6) * a) + decay.half * ((dt / 3) * (b + c)) + (dt / 6) * d


def pad(spectrum: Tensor, grid: PeriodicGrid) -> Tensor:
    """Pad the spectrum (…, n, n // 2 + 1) of a coarser 2-D grid to ``grid``: the same waves, no others.

    The highest wave of the coarser grid is dropped: its sign is undetermined there.
    """
    n, m = spectrum.shape[-2], grid.size
    if n > m:
        raise ValueError(f"cannot pad a spectrum of {n} points to a coarser grid of {m}")
    half = n // 2
    out = torch.zeros(*spectrum.shape[:-2], m, m // 2 + 1, device=spectrum.device, dtype=spectrum.dtype)
    out[..., :half, :half] = spectrum[..., :half, :half]
    out[..., m - half + 1 :, :half] = spectrum[..., half + 1 :, :half]
    return out * (m / n) ** 2


def _reshape_along(values: Tensor, axis: int) -> Tensor:
    """Reshape (n,) to broadcast along ``axis`` (−1: (n,), −2: (n, 1), …)."""
    return values.reshape(-1, *(1,) * (-axis - 1))


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.complex64 if dtype == torch.float32 else torch.complex128
