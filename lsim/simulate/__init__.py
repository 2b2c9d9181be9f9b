"""Families of simulations for training and evaluating metrics, computed by batched solvers.

A family is a reference and ten more simulations, in which one parameter of the reference, drawn at
random, moves by ten equal steps; frame i has the ground truth i / 10. A good metric ranks the frames by
it. Every frame has its own noise, which makes ranking hard.

>>> from lsim.simulate import simulate_families, write_families
>>> families = simulate_families("smoke", 4, size=128)
>>> families.frames["velocity"].shape
(4, 11, 128, 128, 3)

Each recipe is a module whose docstring gives its equations, boundaries, ranges and source.
`docs/simulate.md` compares the recipes with one another and with the published data (Kohl, Um, Thuerey:
Learning Similarity Metrics for Numerical Simulations, ICML 2020, https://arxiv.org/abs/2002.07863), and lists
how hard each is to rank and its cost. :mod:`lsim.simulate.hardness` measures how hard a recipe is, and
searches the step for a given hardness.

The random numbers come from NumPy's Philox streams on the host, one per family. The same recipe, seed and
number give the same bytes on one machine and one thread, regardless of the other families and the batch.
Another number of threads, device, processor, or version of NumPy, SciPy or torch may round differently.
Differences are below 1e-4 of a field's range in single precision, and below 1e-2 for liquid, liquid-noise
and transport, where a sharp interface or a fast swirl magnifies them.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import torch

from . import (
    advection_diffusion,
    advection_diffusion_2d,
    burgers,
    burgers_2d,
    layout,
    liquid,
    shapes,
    smoke,
    transport,
    waves,
)
from .families import DegenerateFamilyError, Families, FamilyRecord, make, torch_threads
from .layout import FORMATS, Format
from .recipe import FRAMES, Parameters, Recipe, Variation

__all__ = [
    "FRAMES",
    "RECIPES",
    "DegenerateFamilyError",
    "Families",
    "FamilyRecord",
    "Parameters",
    "Recipe",
    "UnknownRecipeError",
    "Variation",
    "family_folders",
    "find_recipe",
    "missing_families",
    "simulate_families",
    "write_families",
]

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        advection_diffusion.RECIPE,
        advection_diffusion_2d.RECIPE,
        burgers.RECIPE,
        burgers_2d.RECIPE,
        smoke.RECIPE,
        liquid.RECIPE,
        transport.RECIPE,
        advection_diffusion.NOISY_RECIPE,
        shapes.RECIPE,
        waves.RECIPE,
        liquid.NOISY_RECIPE,
    )
}
"""All recipes by name."""


class UnknownRecipeError(KeyError):
    """Name of no recipe; the message suggests similar ones."""

    def __str__(self) -> str:
        return str(self.args[0])


def find_recipe(name: str) -> Recipe:
    """Find the recipe registered under ``name``.

    Raises
    ------
    UnknownRecipeError
        When there is none.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"available: {', '.join(RECIPES)}"
        raise UnknownRecipeError(f"no recipe named {name!r}; {hint}")
    return RECIPES[name]


def simulate_families(
    recipe: str,
    families: int | Sequence[int],
    size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    batch: int = 4,
    threads: int = 1,
) -> Families:
    """Simulate families of one recipe.

    Parameters
    ----------
    recipe : str
        A name in :data:`RECIPES`.
    families : int or sequence of int
        Number of families, numbered from 1; or their numbers.
    size : int, default 256
        Pixels along y and x, even. Below 128 the finest densities aren't resolved.
    seed : int, default 0
        Not negative.
    device : torch.device or str, default "cpu"
    dtype : torch.dtype, default torch.float32
        Precision of the computation: float32 or float64. Frames are float32 either way.
    batch : int, default 4
        Number of families that advance together; it doesn't change them. On a GPU, more is faster.
    threads : int, default 1
        Torch's threads on the CPU; the setting is restored. More than one is seldom faster.

    Returns
    -------
    Families
        ``frames`` by field, (family, frame, y, x, channel) float32, ``parameter`` (frame,) float64, and a
        record of each family: the varied parameter, its values, and the number of draws that were discarded
        as not finite, constant or without effect.

    Raises
    ------
    UnknownRecipeError
    ValueError
        When another argument isn't as described.
    DegenerateFamilyError
        When a family is degenerate in every draw.
    """
    definition = find_recipe(recipe)
    numbers = _numbers(families)
    _check(size, seed, batch, threads)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    with torch_threads(threads):
        return make(definition, numbers, size, seed, torch.device(device), dtype, batch)


def write_families(
    out_dir: str | Path,
    recipe: str,
    families: int | Sequence[int],
    size: int = 256,
    seed: int = 0,
    format: Format = "npz",
    *,
    device: torch.device | str = "cpu",
    batch: int = 4,
    threads: int = 1,
) -> list[Path]:
    """Simulate families and write each as a folder of the LSIM layout (:mod:`lsim.simulate.layout`).

    A folder that is complete with the same settings is kept, and nothing is simulated for it. One with
    other settings (recipe and its version, size, seed, format) is replaced. After an interruption, the same
    call resumes. Folders of other families in ``out_dir`` are not touched.

    Parameters
    ----------
    out_dir : str or Path
        Output folder; created if missing.
    recipe, families, size, seed, device, batch, threads
        See :func:`simulate_families`.
    format : {"npz", "png"}, default "npz"
        ``npz`` stores the values, ``png`` 8 bits.

    Returns
    -------
    list of Path
        The folders, one per field of a family, in order.

    Raises
    ------
    FileExistsError
        When a folder of such a name exists that this function didn't write.
    UnknownRecipeError, ValueError, DegenerateFamilyError
        See :func:`simulate_families`.
    """
    _check(size, seed, batch, threads)
    definition = find_recipe(recipe)
    missing = missing_families(out_dir, recipe, families, size, seed, format)
    for start in range(0, len(missing), batch):
        simulated = simulate_families(
            recipe, missing[start : start + batch], size, seed, device, batch=batch, threads=threads
        )
        for k, record in enumerate(simulated.records):
            settings = layout.settings(definition, record.number, size, seed, format)
            folders = family_folders(out_dir, recipe, record.number)
            for folder, frames in zip(folders, simulated.frames.values(), strict=True):
                layout.write_family(folder, definition, frames[k], record, settings)
    return [folder for number in _numbers(families) for folder in family_folders(out_dir, recipe, number)]


def missing_families(
    out_dir: str | Path,
    recipe: str,
    families: int | Sequence[int],
    size: int = 256,
    seed: int = 0,
    format: Format = "npz",
) -> list[int]:
    """List the families that :func:`write_families` would write: absent, damaged, or with other settings.

    Returns
    -------
    list of int
        Their numbers.

    Raises
    ------
    UnknownRecipeError, ValueError
        See :func:`write_families`.
    """
    definition = find_recipe(recipe)
    numbers = _numbers(families)
    _check(size, seed)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}")

    def is_complete(number: int) -> bool:
        settings = layout.settings(definition, number, size, seed, format)
        folders = family_folders(out_dir, recipe, number)
        return all(layout.is_complete(folder, settings) for folder in folders)

    return [number for number in numbers if not is_complete(number)]


def family_folders(out_dir: str | Path, recipe: str, number: int) -> list[Path]:
    """List the folders of a family's fields as :func:`write_families` names them, in the recipe's order."""
    return [Path(out_dir) / name for name in layout.folder_names(find_recipe(recipe), number)]


def _numbers(families: int | Sequence[int]) -> list[int]:
    numbers = list(range(1, families + 1)) if isinstance(families, int) else list(families)
    if not numbers or min(numbers) < 1 or len(set(numbers)) != len(numbers):
        raise ValueError(
            f"families must be a count of at least 1 or distinct numbers from 1, got {families!r}"
        )
    return numbers


def _check(size: int, seed: int, batch: int = 1, threads: int = 1) -> None:
    if size < 16 or size % 2:
        raise ValueError(f"size must be even and at least 16, got {size}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if batch < 1 or threads < 1:
        raise ValueError(f"batch and threads must be at least 1, got {batch} and {threads}")
