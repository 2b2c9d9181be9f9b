"""Distances between amplitudes of the Fourier transform, on a logarithmic scale: blind to positions.

A frame on [0, 1] has the coefficients û(ky, kx) = 1/N Σ u exp(−2πi (ky·y/Y + kx·x/X)), each channel for
itself, without a window: a frame is taken as periodic, and a step from its one edge to the other shows as
energy at all wavenumbers, in both frames. Divided by the number N of pixels, neither amplitudes nor the
root mean square over coefficients grow with the frame. û(0, 0) is the mean, and counts as any other.

Energies span many decades, and none may be zero: the square of ``floor`` is added to |û|². Below it a
difference fades out. Everything is in double precision: logarithms of near-identical frames hardly differ.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from lsim.embedding import difference_of
from lsim.metric import Embedding, Metric, MetricInfo, positive_number, safe_sqrt
from lsim.pairs import all_pairs, has_kernel, is_plain, pairs_in_torch, rows_in_torch, squared_differences
from lsim.preprocess import Preprocessing
from lsim.rounding import FULL_SCALE, of_difference, of_each, of_sum, share_of_equals, size_of_difference
from lsim.threads import in_threads

WHITE = 2.0
"""Bound on the noise of rounding in one coefficient, against white noise; measured, 0.6."""
TRANSFORM = 2.0**-47
"""Rounding of a transform of values on [0, 1], as an error of the values."""
LOGARITHM = 2.0**-51
"""Rounding of a logarithm, as a share of it."""
FLOOR = 1e-6
"""Amplitude that counts as zero, as a share of the full range: single precision and resizing leave about
1e-8 of rounding in a frame, and one grey level in one pixel of 224² is 8e-8 in every coefficient."""


class _SpectralMetric(Metric):
    """Euclidean distance of one part of the embedding, which both metrics share.

    Parameters
    ----------
    name, preprocessing, device
        As :class:`~lsim.metric.Metric` takes them.
    floor : float, default 1e-6
        Amplitude of a coefficient, as a share of the full range, that counts as zero.
    """

    copies_to_compare = False

    shares_embedding = "spectrum"
    takes_rest = True
    _part: str

    def __init__(
        self, name: str, preprocessing: Preprocessing, device: torch.device, *, floor: float = FLOOR
    ) -> None:
        if positive_number(name, "floor", floor) >= 1:
            raise ValueError(f"option 'floor' of metric {name!r} is a share of the full range, got {floor!r}")
        super().__init__(name, preprocessing, device, floor=float(floor))

    @property
    def shared_as(self) -> tuple[object, ...]:
        """Key of metrics with the same floor."""
        return (self.shares_embedding, self.options["floor"])

    def embed(self, frames: Tensor) -> Embedding:
        """Compute logarithms, scaled such that the distance is Euclidean: (n, value) float64 each."""
        spectra = functools.partial(_log_spectra, floor=self.options["floor"])
        run = in_threads if has_kernel(frames) else map
        parts = list(run(spectra, frames.split(1)))
        shells, coefficients, slopes = map(torch.cat, zip(*parts, strict=True))
        return Embedding({"shells": shells, "coefficients": coefficients, "slopes": slopes})

    def embed_with_rest(self, frames: Tensor, rest: Tensor) -> Embedding:
        """Add frames, their rest and coefficients, to compare pairs by their difference's transform."""
        value, remainder = (part.permute(0, 3, 1, 2).contiguous() for part in (frames, rest))
        run = in_threads if has_kernel(value) else map
        spectra = torch.cat(list(run(_transform, value.split(1))))
        parts = {"frames": value, "rest": remainder, "spectrum": torch.view_as_real(spectra)}
        return Embedding(self.embed(frames).parts | parts)

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound logarithms of energies, of coefficients or shells, to which errors add noise.

        The transform's own rounding is noise, too. With the rest of frames, it is the rounding of their
        difference's transform.
        """
        if "rest" in a.parts:
            return self._rounding_with_rest(a, b) + of_sum(distances, torch.float64)
        x, y = (self._error(side) for side in (a, b))
        return x[:, None] + y + of_sum(distances, torch.float64)

    def _rounding_with_rest(self, a: Embedding, b: Embedding) -> Tensor:
        """Bound the effect of noise in a pair's difference on the compared part: (len(a), len(b))."""
        size = rows_in_torch(size_of_difference, a, b)
        noise = WHITE * (of_difference(a, b) + TRANSFORM * size)
        part_index = ("shells", "coefficients").index(self._part)
        x, y = (side.parts["slopes"].unflatten(1, (2, 2))[:, part_index] for side in (a, b))
        first, second = x[:, None, 0] + y[:, 0], x[:, None, 1].square() + y[:, 1].square()
        # The coefficients' own rounding meets that of the difference in the second order.
        return noise * (first + second * (noise + WHITE * TRANSFORM))

    def _error(self, embedding: Embedding) -> Tensor:
        """Bound the effect of errors of values on the compared part of a frame: (n,)."""
        part_index = ("shells", "coefficients").index(self._part)
        slopes = embedding.parts["slopes"].unflatten(1, (2, 2))[:, part_index]
        error = of_each(embedding, mean=True) / FULL_SCALE
        noise = WHITE * (error + TRANSFORM)
        logarithm = LOGARITHM * abs(math.log10(self.options["floor"]))
        # Errors in proportion to the values change all amplitudes by the same share.
        return error + noise * (slopes[:, 0] + slopes[:, 1].square() * noise) + logarithm

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        x, y = a.parts[self._part], b.parts[self._part]
        if not has_kernel(x, y):
            return rows_in_torch(self.paired, a, b)
        if "rest" in a.parts:
            return pairs_in_torch(self.paired, a, b)
        squared = all_pairs(
            squared_differences,
            len(x),
            len(y),
            x.numpy(),
            y.numpy(),
            symmetric=a is b,
            operations=x.shape[1],
        )
        return squared.sqrt()

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        if "rest" in a.parts:
            return self._paired_with_rest(a, b)
        return safe_sqrt((a.parts[self._part] - b.parts[self._part]).square().sum(1))

    def _paired_with_rest(self, a: Embedding, b: Embedding) -> Tensor:
        """Compute log (A / B) as log (1 + (A − B) / B), and |û|² − |v̂|² as Re (û − v̂)(û + v̂)*."""
        x, y = a.parts["spectrum"], b.parts["spectrum"]
        height, width = a.parts["frames"].shape[2:]
        change = torch.view_as_real(_transform(difference_of(a, b, "frames")))
        members, share, multiplicity = _half_plane(height, width, x.device)
        energies = [(left * right).sum(-1).flatten(2) for left, right in ((change, x + y), (x, x), (y, y))]
        if self._part == "shells":
            energies = [(energy[:, :, members] * share).sum(-1) for energy in energies]
        difference, first, second = energies
        smaller = torch.minimum(first, second) + self.options["floor"] ** 2
        decades = torch.log1p(difference.abs() / smaller) / math.log(10)
        if self._part == "shells":
            return safe_sqrt(decades.square().mean((1, 2)))
        # Half the logarithm of the energy is that of the amplitude.
        squares = decades.square() * multiplicity / (4 * height * width)
        return safe_sqrt(squares.sum(2).mean(1))


class RadialSpectrum(_SpectralMetric):
    """Root mean square difference of log₁₀ E(k), the radially averaged energy spectrum: in decades.

    E(k) is the mean of |û|² over the shell of coefficients whose wavenumber rounds to k, in cycles along
    the longer side; k = 0 … ⌊side / 2⌋, so that the corners beyond the last whole shell are left out. The
    mean is taken over shells and channels.
    """

    info = MetricInfo(
        title="RMS difference of log radially averaged energy spectra, in decades",
        source="Gray, Markel 1976 (log spectral distance); spectra as in pysteps rapsd, Ravuri et al. 2021",
        axioms=frozenset({"non-negative", "symmetric", "zero-on-itself", "triangle", "euclidean"}),
        one_channel_suffices=True,
        blind_to=("shift", "half turn", "quarter turn", "reflection"),
        units="decade",
        takes_physical_values=True,
    )
    _part = "shells"


class FourierAmplitude(_SpectralMetric):
    """Root mean square difference of log₁₀ |û| over all Y·X coefficients and channels: in decades."""

    info = MetricInfo(
        title="RMS difference of log Fourier amplitudes, in decades",
        source="Gray, Markel 1976 (log spectral distance), in two dimensions",
        axioms=frozenset({"non-negative", "symmetric", "zero-on-itself", "triangle", "euclidean"}),
        one_channel_suffices=True,
        blind_to=("shift", "half turn"),
        units="decade",
        takes_physical_values=True,
    )
    _part = "coefficients"


def _transform(planes: Tensor) -> Tensor:
    """Transform (n, channel, y, x) in [0, 255] to coefficients of the half plane."""
    return torch.fft.rfft2(planes / FULL_SCALE, norm="forward")


def _log_spectra(frames: Tensor, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute scaled logarithms of the energy of every shell, and of every coefficient of the half plane.

    Parameters
    ----------
    frames : Tensor of shape (n, y, x, channel)
    floor : float

    Returns
    -------
    Tensor of shape (n, channel · shells), Tensor of shape (n, channel · y · (x // 2 + 1))
    Tensor of shape (n, 4)
        Changes of shells and coefficients by noise of amplitude 1 in every coefficient: in first order, and
        the root of the second order.
    """
    y, x, channels = frames.shape[1:]
    transform = _transform(frames.permute(0, 3, 1, 2).double())
    energy = (transform.real.square() + transform.imag.square()).flatten(2)
    members, share, multiplicity = _half_plane(y, x, frames.device)
    shells = (energy[:, :, members] * share).sum(-1)
    log_shells = torch.log10(shells + floor**2) / (channels * shells.shape[-1]) ** 0.5
    # Half the logarithm of the energy is that of the amplitude.
    log_amplitudes = torch.log10(energy + floor**2) * (multiplicity / (4 * channels * y * x)).sqrt()
    # In the mean of a shell, the noise of its members averages out.
    averaged = 1 / (share > 0).sum(-1)
    # Where values repeat, so do their errors: noise that is not white is in 1 / repeated of the coefficients,
    # and stronger there, since its energy is that of the errors (Parseval).
    repeated = share_of_equals(frames.permute(0, 3, 1, 2))
    few = torch.ceil(channels / repeated)
    slopes = [
        *_slopes(shells, 2, 1 / (channels * shells.shape[-1]), averaged, floor),
        *_slopes(energy, 1, multiplicity / (channels * y * x), 1.0, floor, few),
    ]
    return log_shells.flatten(1), log_amplitudes.flatten(1), torch.stack(slopes, 1) * repeated.sqrt()[:, None]


def _slopes(
    energy: Tensor,
    power: int,
    share: Tensor | float,
    averaged: Tensor | float,
    floor: float,
    few: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute how noise moves log₁₀ (energy + floor²) · power / 2: first order, root of the second, (n,).

    With ``few``, of shape (n,), the noise is in so many of the coefficients: those that it moves most.
    """
    square = (energy.detach() + floor**2).square()
    first = _sum_of_largest((share * averaged * energy.detach() / square).flatten(1), few)
    second = _sum_of_largest((share / square).flatten(1), few)
    return first.sqrt() * power / math.log(10), (second.sqrt() * power / 2 / math.log(10)).sqrt()


def _sum_of_largest(values: Tensor, counts: Tensor | None) -> Tensor:
    """Add up the largest values of each row, as many as counted, or all."""
    if counts is None:
        return values.sum(1)
    width = values.shape[1]
    if is_plain(values, counts):  # five times faster than sorting
        width = min(int(counts.max()), width)
        largest = values.topk(width, dim=1).values
    else:
        largest = values.sort(dim=1, descending=True).values
    return largest.where(torch.arange(width, device=values.device) < counts[:, None], 0).sum(1)


@functools.lru_cache(maxsize=16)
def _half_plane(y: int, x: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Assign the coefficients of a real transform of (y, x) to shells.

    Returns
    -------
    members : Tensor of shape (shell, member), int64
        Coefficients of each shell, flattened; short rows are padded with 0. Gathering and adding up gives
        the same bits each time, unlike scattering on a GPU.
    share : Tensor of shape (shell, member), float64
        Weight of each in the shell's mean, 0 for the padding.
    multiplicity : Tensor of shape (coefficient,), float64
        How often each occurs in the whole plane, 1 or 2.
    """
    side = max(y, x)
    ky = np.fft.fftfreq(y, 1 / side)[:, None]
    kx = np.fft.rfftfreq(x, 1 / side)[None]
    shell = np.rint(np.hypot(ky, kx)).astype(np.int64).ravel()
    column = np.broadcast_to(np.arange(kx.size), (y, kx.size))
    # A column stands for its mirror image too, but for the first, and the last of an even length.
    has_mirror = (column > 0) & (2 * column != x)
    multiplicity = np.where(has_mirror, 2.0, 1.0).ravel()
    rows = [np.flatnonzero(shell == k) for k in range(side // 2 + 1)]
    members = np.zeros((len(rows), max(map(len, rows))), np.int64)
    share = np.zeros(members.shape)
    for k, row in enumerate(rows):
        members[k, : len(row)] = row
        share[k, : len(row)] = multiplicity[row] / multiplicity[row].sum()
    tensors = (torch.from_numpy(array).to(device) for array in (members, share, multiplicity))
    return next(tensors), next(tensors), next(tensors)
