"""Families as folders in the layout of the published LSIM data.

::

    <out>/advDiff1.density/advDiff00.npz … advDiff10.npz    (or .png)
                           family.json

A folder is one sequence, ``<name><number>.<field>``, a field of a family; the two digits of a frame are its
ground truth, as a count of steps from the reference. An ``.npz`` holds the array ``arr_0`` (y, x, channel),
float32; a ``.png`` has 8 bits, the family's minimum and maximum over all frames mapped to 0 and 255.

A folder is written under a hidden name and renamed when it is complete, so a folder with the final name is
never half written. Only one process at a time may write a folder.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from lsim.preprocess import as_array, finite_frames

from .families import FamilyRecord
from .recipe import FRAMES, Recipe

Format: TypeAlias = Literal["npz", "png"]
FORMATS: tuple[Format, ...] = ("npz", "png")
RECORD = "family.json"
LAYOUT_VERSION = 1
"""Version of the files; raised whenever the same frames give other files than before."""


def settings(recipe: Recipe, number: int, size: int, seed: int, format: Format) -> dict[str, Any]:
    """Return the settings that determine a folder's content; one with other settings is replaced."""
    return {
        "recipe": recipe.name,
        "recipe_version": recipe.version,
        "layout_version": LAYOUT_VERSION,
        "number": number,
        "size": size,
        "seed": seed,
        "format": format,
    }


def folder_names(recipe: Recipe, number: int) -> list[str]:
    """List the folder name ``<name><number>.<field>`` of each field."""
    return [f"{recipe.folder}{number}.{field}" for field in recipe.fields]


def frame_names(recipe: Recipe, format: Format) -> list[str]:
    """List the file names of the frames, the reference first."""
    return [f"{recipe.folder}{index:02d}.{format}" for index in range(FRAMES)]


def is_complete(folder: Path, settings: dict[str, Any]) -> bool:
    """Return True if a folder has the ``settings`` :func:`settings`, and every file its full length."""
    record = read_record(folder)
    if record is None or record.get("settings") != settings:
        return False
    files: dict[str, int] = record["bytes"]
    return all(_length(folder / name) == length for name, length in files.items())


def write_family(
    folder: Path, recipe: Recipe, frames: np.ndarray, record: FamilyRecord, settings: dict[str, Any]
) -> None:
    """Write one field of a family as a folder, and replace one with other settings.

    Parameters
    ----------
    folder : Path
    recipe : Recipe
    frames : ndarray of shape (frame, y, x, channel), float32
    record : FamilyRecord
    settings : dict
        Result of :func:`settings`.

    Raises
    ------
    FileExistsError
        When the folder exists and was not written by this function; it is not touched.
    ValueError
        When frames hold NaN, infinity or masked values, which the files cannot store.
    """
    frames = as_array(frames)
    finite = finite_frames(frames)
    if not finite.all():
        raise ValueError(
            f"{folder}: expected finite frames, found missing values in frame {np.argmin(finite)}"
        )
    if folder.exists() and read_record(folder) is None:
        raise FileExistsError(
            f"{folder} exists without a {RECORD} of simulated families, and is not replaced: "
            "move it away or choose another output folder"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    old_folder = folder.with_name(f".{folder.name}.replaced")
    for leftover in (partial, old_folder):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    try:
        _write_files(partial, recipe, frames, record, settings)
        if folder.exists():
            folder.rename(old_folder)
        partial.rename(folder)
    finally:
        for leftover in (partial, old_folder):
            if leftover.exists():
                shutil.rmtree(leftover)


def read_frames(folder: Path) -> np.ndarray:
    """Read one field of a family: (frame, y, x, channel), float32 from NPZ or uint8 from PNG.

    Raises
    ------
    FileNotFoundError
        When the folder is missing, or is no simulated family.
    """
    record = read_record(folder)
    if record is None:
        raise FileNotFoundError(f"{folder}: no {RECORD} of simulated families")
    return np.stack([_read_frame(folder / name) for name in record["bytes"]])


def _read_frame(path: Path) -> np.ndarray:
    if path.suffix == ".npz":
        with np.load(path) as stored:
            return np.asarray(stored["arr_0"])
    from PIL import Image

    with Image.open(path) as image:
        frame = np.asarray(image)
    return frame[..., None] if frame.ndim == 2 else frame


def _write_files(
    folder: Path, recipe: Recipe, frames: np.ndarray, record: FamilyRecord, settings: dict[str, Any]
) -> None:
    format: Format = settings["format"]
    names = frame_names(recipe, format)
    lo, hi = float(frames.min()), float(frames.max())
    for name, frame in zip(names, frames, strict=True):
        if format == "npz":
            np.savez(folder / name, frame)
        else:
            _write_png(folder / name, np.rint((frame - lo) * (255 / (hi - lo))).astype(np.uint8))
    described = {
        "settings": settings,
        "family": dataclasses.asdict(record),
        "range": [lo, hi],
        "bytes": {name: (folder / name).stat().st_size for name in names},
    }
    (folder / RECORD).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def _write_png(path: Path, image: np.ndarray) -> None:
    from PIL import Image

    if image.shape[-1] not in (1, 3):
        raise ValueError(
            f"{path.name}: a PNG takes 1 or 3 channels, the frame has {image.shape[-1]}; use npz"
        )
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read ``family.json``; None if there is none in the expected form.

    Keys are ``settings`` (see :func:`settings`), ``family`` (the :class:`FamilyRecord`), ``range`` (minimum
    and maximum) and ``bytes`` (length of each frame's file, the reference first).
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    is_record = isinstance(record, dict) and {"settings", "family", "bytes"} <= record.keys()
    return record if is_record else None


def _length(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
