"""Families: a reference, and ten more simulations in which one parameter moves by equal steps.

A family's random numbers come from one Philox stream on the host, keyed by seed, recipe, family number
and attempt. The family therefore depends on nothing else: not on the families beside it, and on device and
number of threads only by rounding.
"""

from __future__ import annotations

import contextlib
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lsim.preprocess import as_array

from .recipe import FRAMES, Parameters, Recipe

ATTEMPTS = 50
"""Number of draws after which a degenerate family is given up."""


class DegenerateFamilyError(RuntimeError):
    """No draw of a family is usable; the message names the family and the reasons."""


@dataclass(frozen=True)
class FamilyRecord:
    """Origin of one family.

    Attributes
    ----------
    number : int
        From 1.
    seed : int
    varied : str
        Name of the varied parameter.
    values : tuple of float
        Its value in each frame.
    step : float
        Its change from one frame to the next.
    reference : dict
        All parameters of frame 0 by name: numbers, or nested lists of them.
    discarded : dict
        Number of draws discarded before this one, by reason.
    """

    number: int
    seed: int
    varied: str
    values: tuple[float, ...]
    step: float
    reference: dict[str, Any]
    discarded: dict[str, int]


@dataclass(frozen=True)
class Families:
    """Families of one recipe.

    Attributes
    ----------
    recipe : str
    frames : dict of str to ndarray of shape (family, frame, y, x, channel), float32
        By field.
    parameter : ndarray of shape (frame,), float64
        Ground truth: 0, 0.1, …, 1.
    records : tuple of FamilyRecord
        One per family.
    """

    recipe: str
    frames: dict[str, np.ndarray]
    parameter: np.ndarray
    records: tuple[FamilyRecord, ...]

    @property
    def discarded(self) -> dict[str, int]:
        """Number of discarded draws over all families, by reason."""
        total: Counter[str] = Counter()
        for record in self.records:
            total.update(record.discarded)
        return dict(total)


@dataclass(frozen=True)
class _Draw:
    """One attempt at one family, not yet simulated."""

    number: int
    attempt: int
    varied: str
    step: float
    frames: Parameters  # every parameter with a leading axis of FRAMES
    generator: np.random.Generator  # draws the noise next


def ground_truth() -> np.ndarray:
    """Return the position of each frame in [0, 1]: i / 10, shape (11,), float64."""
    return np.arange(FRAMES) / (FRAMES - 1)


def make(
    recipe: Recipe,
    numbers: Sequence[int],
    size: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
) -> Families:
    """Simulate the families with these numbers, ``batch`` of them at a time.

    Raises
    ------
    DegenerateFamilyError
        When a family is degenerate in every draw.
    """
    finished: dict[int, tuple[dict[str, np.ndarray], FamilyRecord]] = {}
    discarded: dict[int, Counter[str]] = {number: Counter() for number in numbers}
    waiting = [draw_family(recipe, number, seed) for number in numbers]
    while waiting:
        draws, waiting = waiting[:batch], waiting[batch:]
        for draw, frames in zip(draws, _simulate(recipe, draws, size, device, dtype), strict=True):
            reason = next(filter(None, map(defect, frames.values())), None)
            if reason is None:
                finished[draw.number] = frames, _record(draw, seed, discarded[draw.number])
                continue
            discarded[draw.number][reason] += 1
            if draw.attempt + 1 == ATTEMPTS:
                raise DegenerateFamilyError(
                    f"recipe {recipe.name!r}, seed {seed}, family {draw.number}: {ATTEMPTS} draws in a "
                    f"row were unusable ({dict(discarded[draw.number])}); size {size} may be too small"
                )
            waiting.append(draw_family(recipe, draw.number, seed, draw.attempt + 1))
    stacked = {field: np.stack([finished[number][0][field] for number in numbers]) for field in recipe.fields}
    records = tuple(finished[number][1] for number in numbers)
    return Families(recipe.name, stacked, ground_truth(), records)


def draw_family(recipe: Recipe, number: int, seed: int, attempt: int = 0) -> _Draw:
    """Draw a reference and the parameter to vary, and lay out the parameters of all frames."""
    key = (zlib.crc32(recipe.name.encode()), number, attempt)
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))
    reference = recipe.draw(generator)
    varied = sorted(recipe.variations)[generator.integers(len(recipe.variations))]
    variation = recipe.variations[varied]
    is_upward = not variation.both_ways or generator.uniform() < 0.5
    step = variation.step if is_upward else -variation.step
    if variation.relative:
        step *= abs(float(reference[varied]))
    frames = {name: np.repeat(value[None], FRAMES, axis=0) for name, value in reference.items()}
    frames[varied] = frames[varied] + step * np.arange(FRAMES)
    return _Draw(number, attempt, varied, step, frames, generator)


def defect(frames: np.ndarray) -> str | None:
    """Find the reason why a family is unusable.

    Parameters
    ----------
    frames : ndarray of shape (frame, y, x, channel)

    Returns
    -------
    str or None
        ``"not finite"``: NaN or infinity somewhere; ``"constant frame"``: a frame is constant up to
        rounding; ``"no effect"``: the last frame differs from the reference by less than a thousandth of
        the reference's standard deviation; None if the family is usable.
    """
    frames = as_array(frames)  # masked values become NaN
    if not np.isfinite(frames).all():
        return "not finite"
    exact = frames.astype(np.float64)
    spread = exact.std(axis=(1, 2, 3))
    if (spread <= 1e-5 * np.abs(exact).max()).any():
        return "constant frame"
    if np.sqrt(np.mean((exact[-1] - exact[0]) ** 2)) < 1e-3 * spread[0]:
        return "no effect"
    return None


def _simulate(
    recipe: Recipe, draws: Sequence[_Draw], size: int, device: torch.device, dtype: torch.dtype
) -> list[dict[str, np.ndarray]]:
    """Simulate several draws at once; each gives frames (frame, y, x, channel), float32, by field."""
    parameters = {
        name: torch.from_numpy(np.concatenate([draw.frames[name] for draw in draws])).to(device, dtype)
        for name in draws[0].frames
    }
    with torch.inference_mode():
        solved = recipe.solve(parameters, [draw.generator for draw in draws], size, device, dtype)
    fields = {name: rows.to("cpu", torch.float32).numpy() for name, rows in solved.items()}
    return [
        {name: rows[k * FRAMES : (k + 1) * FRAMES] for name, rows in fields.items()}
        for k in range(len(draws))
    ]


def _record(draw: _Draw, seed: int, discarded: Counter[str]) -> FamilyRecord:
    return FamilyRecord(
        number=draw.number,
        seed=seed,
        varied=draw.varied,
        values=tuple(draw.frames[draw.varied].tolist()),
        step=draw.step,
        reference={name: values[0].tolist() for name, values in draw.frames.items()},
        discarded=dict(discarded),
    )


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Set torch's number of threads within a context; small transforms are slower on several."""
    thread_count = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(thread_count)
