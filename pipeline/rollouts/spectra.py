"""Energy of frames by wavenumber, and how much of it a model lacks or adds in bands of wavenumbers."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from pipeline.rollouts.intervals import Bootstrap, bound

REFERENCE = "reference"
"""Model, in spectra, that is the reference itself."""

ENERGY = "energy"
"""Metric, in spectra: the energy by wavenumber."""

BANDS = ("low", "mid", "high")
VERSION = 1
"""Raised whenever spectra change, so that stored ones are computed again."""


def wavenumbers(y: int, x: int) -> np.ndarray:
    """List the wavenumbers of a frame, in cycles along its longer side: 0 to half of its pixels.

    Examples
    --------
    >>> wavenumbers(4, 6)
    array([0., 1., 2., 3.])
    """
    return np.arange(max(y, x) // 2 + 1, dtype=np.float64)


def measure_energy(frames: np.ndarray) -> np.ndarray:
    """Measure the energy of frames by wavenumber.

    Parameters
    ----------
    frames : ndarray of shape (n, y, x, channel)
        Values in their own units; a frame is taken as periodic.

    Returns
    -------
    ndarray of shape (n, wavenumber), float64
        Σ |û|² over channels and all coefficients whose |k| rounds to the wavenumber, with û divided by the
        number of pixels: over all coefficients it adds up to the mean square, times channels (Parseval). The
        few in the corners, beyond half of the longer side, are in none. NaN for frames with NaN or infinity.

    Examples
    --------
    >>> wave = np.cos(2 * np.pi * 2 * np.arange(8) / 8)
    >>> np.round(measure_energy(np.broadcast_to(wave, (8, 8))[None, :, :, None]), 12)
    array([[0. , 0. , 0.5, 0. , 0. ]])
    """
    n, y, x, _ = frames.shape
    shells, multiplicity = _shells(y, x)
    count = len(wavenumbers(y, x))
    energies = np.full((n, count), np.nan)
    for place, frame in enumerate(frames.astype(np.float64)):
        if np.isfinite(frame).all():
            transform = np.fft.rfft2(frame, axes=(0, 1), norm="forward")
            with np.errstate(over="ignore"):
                energy = (np.square(transform.real) + np.square(transform.imag)).sum(axis=2).ravel()
            energies[place] = np.bincount(shells, energy * multiplicity, count + 1)[:count]
    return energies


@functools.lru_cache(maxsize=16)
def _shells(y: int, x: int) -> tuple[np.ndarray, np.ndarray]:
    """Assign each coefficient of a real transform to a shell, and count how often it occurs."""
    side, count = max(y, x), len(wavenumbers(y, x))
    ky, kx = np.fft.fftfreq(y, 1 / side)[:, None], np.fft.rfftfreq(x, 1 / side)[None]
    shells = np.minimum(np.rint(np.hypot(ky, kx)).astype(np.int64), count)
    column = np.arange(kx.size)
    # A column stands for its mirror image too, but for the first, and the last of an even length.
    has_mirror = (column > 0) & (2 * column != x)
    multiplicity = np.broadcast_to(np.where(has_mirror, 2.0, 1.0), shells.shape)
    return shells.ravel(), multiplicity.ravel()


def choose_frames(times: np.ndarray, chosen: int | tuple[float, ...]) -> np.ndarray:
    """Choose frames of a trajectory: so many, evenly from the first to the last, or the nearest to times.

    Examples
    --------
    >>> choose_frames(np.arange(9.0), 3).tolist(), choose_frames(np.arange(9.0), (7.0, 1.2)).tolist()
    ([0, 4, 8], [1, 7])
    """
    if isinstance(chosen, int):
        count = min(chosen, len(times))
        return np.unique(np.rint(np.linspace(0, len(times) - 1, count)).astype(np.int64))
    reach = (times[-1] - times[0]) / max(len(times) - 1, 1)
    if outside := [time for time in chosen if not times[0] - reach <= time <= times[-1] + reach]:
        raise ValueError(
            f"spectra at {', '.join(f'{time:g}' for time in outside)}; expected times of the reference, "
            f"{times[0]:g} to {times[-1]:g}"
        )
    return np.array([int(np.argmin(np.abs(times - time))) for time in sorted(chosen)], np.int64)


def bands_of(wavenumber: np.ndarray) -> list[np.ndarray]:
    """Split wavenumbers from 1 on into three bands that are equally wide on a logarithmic scale.

    Examples
    --------
    >>> [band.tolist() for band in bands_of(np.arange(9.0))]
    [[1, 2], [3, 4], [5, 6, 7, 8]]
    """
    numbers = np.arange(1, len(wavenumber))
    edges = np.geomspace(1, max(float(wavenumber[-1]), 1.0), len(BANDS) + 1)[1:-1] * (1 + 1e-12)
    place = np.searchsorted(edges, wavenumber[1:])
    return [numbers[place == k] for k in range(len(BANDS))]


class SpectrumTables:
    """Tables of spectra: by wavenumber, and the relative error of bands with intervals.

    Parameters
    ----------
    replicates, seed : int
        Of the bootstrap over sequences, and members within a model.
    """

    def __init__(self, replicates: int, seed: int) -> None:
        self.replicates, self.seed = replicates, seed
        self.spectra: list[dict[str, Any]] = []
        self.bands: list[dict[str, Any]] = []

    def add(
        self,
        labels: Mapping[str, str],
        energies: Mapping[str, np.ndarray],
        times: np.ndarray,
        wavenumber: np.ndarray,
    ) -> None:
        """Add a field.

        Parameters
        ----------
        labels : mapping of str to str
            Data set and field.
        energies : mapping of str to ndarray of shape (member, sequence, time, wavenumber)
            By model, the reference among them.
        times : ndarray of shape (time,)
        wavenumber : ndarray of shape (wavenumber,)
        """
        truth = energies[REFERENCE]
        for model, energy in energies.items():
            for place, time in enumerate(times.tolist()):
                at_time = dict(labels) | {"model": model, "time": time}
                self.spectra += self._by_wavenumber(at_time, energy[:, :, place], wavenumber)
                if model != REFERENCE:
                    self.bands += self._by_band(at_time, energy[:, :, place], truth[:, :, place], wavenumber)

    def _by_wavenumber(
        self, labels: dict[str, Any], energy: np.ndarray, wavenumber: np.ndarray
    ) -> Iterator[dict[str, Any]]:
        present = np.isfinite(energy).all(axis=2)
        means = energy[present].mean(axis=0) if present.any() else np.full(len(wavenumber), np.nan)
        for k, value in zip(wavenumber.tolist(), means.tolist(), strict=True):
            yield labels | {"wavenumber": k, "energy": value, "rollouts": int(present.sum())}

    def _by_band(
        self, labels: dict[str, Any], energy: np.ndarray, truth: np.ndarray, wavenumber: np.ndarray
    ) -> Iterator[dict[str, Any]]:
        """Compare the energy of bands on the sequences that a model has."""
        for name, band in zip(BANDS, bands_of(wavenumber), strict=True):
            if not len(band):
                continue
            ours = energy[:, :, band].sum(axis=2)
            present = np.isfinite(ours).any(axis=0)
            theirs = np.where(present, truth[:, :, band].sum(axis=2), np.nan)
            bootstrap = Bootstrap({"model": ours, REFERENCE: theirs}, self.replicates, self.seed)
            with np.errstate(divide="ignore", invalid="ignore"):
                value = np.divide(bootstrap.balanced_mean("model"), bootstrap.balanced_mean(REFERENCE)) - 1
                draws = bootstrap.balanced_draws("model") / bootstrap.balanced_draws(REFERENCE) - 1
            interval = bound(float(value), draws, bootstrap.units("model"))
            yield labels | {
                "band": name,
                "first": float(wavenumber[band[0]]),
                "last": float(wavenumber[band[-1]]),
                "relative_error": interval.value,
                "low": interval.low,
                "high": interval.high,
                "sequences": int(present.sum()),
            }

    def to_frames(self) -> dict[str, pd.DataFrame]:
        """Make the tables ``spectra`` and ``bands``."""
        return {"spectra": pd.DataFrame(self.spectra), "bands": pd.DataFrame(self.bands)}
