"""Fourier pseudo-spectral building blocks on periodic boxes.

A recipe keeps its state as Fourier coefficients, evaluates products in space, drops the third of the
wave numbers that a product of two fields pollutes (the 2/3 rule of Orszag, 1971), and advances with an
integrating factor: diffusion exactly, the rest by the classic fourth-order Runge–Kutta scheme.

Everything is batched over the leading axes, and a row's result doesn't depend on the rows beside it:
not in the last bit, either. That rules out products of two whole batches of spectra, whose last few
numbers torch multiplies with other rounding than the rest. Real factors are fine, and so are complex
ones that all rows share.
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
        Points along each axis, even and at least 16.
    dim : int, default 1
    device, dtype
        Of the fields; float32 or float64.

    Attributes
    ----------
    coordinates : tuple of Tensor
        Of each axis, shaped to broadcast against a field; the last is x.
    wavenumbers : tuple of Tensor
        Of each axis, shaped to broadcast against a spectrum.
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
        wavenumbers = [_along(one_sign if axis == -1 else both_signs, axis) for axis in self._axes]
        nyquist = math.pi * size

        self.coordinates = tuple(_along(points, axis).to(device, dtype) for axis in self._axes)
        self.wavenumbers = tuple(k.to(device, dtype) for k in wavenumbers)
        self.laplacian = -sum((k * k for k in wavenumbers), torch.zeros((), dtype=exact)).to(device, dtype)
        inside = torch.ones((), dtype=torch.bool)
        for k in wavenumbers:
            inside = inside & (k.abs() < 2 / 3 * nyquist)
        self.band = inside.to(device, dtype)
        # The derivative of the highest wave, sampled, is zero: it has no imaginary part to turn into.
        self._derivatives = tuple(
            (1j * torch.where(k.abs() < nyquist * (1 - 1e-9), k, 0 * k)).to(device, _complex(dtype))
            for k in wavenumbers
        )

    def forward(self, field: Tensor) -> Tensor:
        """Spectrum of a real field; the leading axes are a batch."""
        return torch.fft.rfftn(field, dim=self._axes)

    def backward(self, spectrum: Tensor) -> Tensor:
        """Real field of a spectrum; the leading axes are a batch."""
        return torch.fft.irfftn(spectrum, s=(self.size,) * self.dim, dim=self._axes)

    def derivative(self, spectrum: Tensor, axis: int = -1) -> Tensor:
        """Spectrum of the first derivative along ``axis`` (−1 is x, −2 is y)."""
        return spectrum * self._derivatives[axis]


class Decay(NamedTuple):
    """What diffusion leaves of each Fourier coefficient after half a time step and after a whole one."""

    half: Tensor
    full: Tensor


def diffusion(grid: PeriodicGrid, viscosity: Tensor, dt: float) -> Decay:
    """Exact solution operator of u_t = ν ∇²u: exp(−ν |k|² dt) per coefficient.

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
    """One time step of U_t = L U + N(U), where ``decay`` solves the linear part exactly.

    The classic Runge–Kutta scheme of fourth order in the variable exp(−L t) U; see Kassam and
    Trefethen, Fourth-order time-stepping for stiff PDEs, SIAM J. Sci. Comput. 26 (2005), section 2.
    Stable for advection while speed · k · dt < 2.8, k being the largest wave number kept.

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


def padded(spectrum: Tensor, grid: PeriodicGrid) -> Tensor:
    """The spectrum (…, n, n // 2 + 1) of a coarser 2-D grid's field, on ``grid``: the same waves, and no
    others.

    The highest wave of the coarser grid is dropped: its sign is not known there.
    """
    n, m = spectrum.shape[-2], grid.size
    if n > m:
        raise ValueError(f"cannot take a spectrum of {n} points to a grid of {m}: it is coarser")
    half = n // 2
    out = torch.zeros(*spectrum.shape[:-2], m, m // 2 + 1, device=spectrum.device, dtype=spectrum.dtype)
    out[..., :half, :half] = spectrum[..., :half, :half]
    out[..., m - half + 1 :, :half] = spectrum[..., half + 1 :, :half]
    return out * (m / n) ** 2


def _along(values: Tensor, axis: int) -> Tensor:
    """Shape (n,) to broadcast along ``axis`` (−1: (n,), −2: (n, 1), …)."""
    return values.reshape(-1, *(1,) * (-axis - 1))


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.complex64 if dtype == torch.float32 else torch.complex128
