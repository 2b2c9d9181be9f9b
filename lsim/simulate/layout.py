"""Families as folders in the layout of the published LSIM data.

::

    <out>/advDiff1.density/advDiff00.npz … advDiff10.npz    (or .png)
                           family.json

A folder is one sequence, ``<name><number>.<field>``, a field of a family; the two digits of a frame are its
ground truth, as a count of steps from the reference. An ``.npz`` holds the array ``arr_0`` (y, x, channel),
float32; a ``.png`` has 8 bits, the family's minimum and maximum over all frames mapped to 0 and 255.

A folder is written under a hidden name and renamed when it is whole, so that a folder with the proper
name is never half written. One process at a time may write a folder.
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
"""Raised whenever the same frames are written as other files than before."""


def settings(recipe: Recipe, number: int, size: int, seed: int, format: Format) -> dict[str, Any]:
    """All that decides a folder's content; a folder made with other settings is made again."""
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
    """``<name><number>.<field>`` of each field."""
    return [f"{recipe.folder}{number}.{field}" for field in recipe.fields]


def frame_names(recipe: Recipe, format: Format) -> list[str]:
    """File names of the frames, the reference first."""
    return [f"{recipe.folder}{index:02d}.{format}" for index in range(FRAMES)]


def is_complete(folder: Path, expected: dict[str, Any]) -> bool:
    """Whether a folder holds what ``expected`` (of :func:`settings`) asks for, every file in full length."""
    record = read_record(folder)
    if record is None or record.get("settings") != expected:
        return False
    files: dict[str, int] = record["bytes"]
    return all(_length(folder / name) == length for name, length in files.items())


def write_family(
    folder: Path, recipe: Recipe, frames: np.ndarray, record: FamilyRecord, made_with: dict[str, Any]
) -> None:
    """Write one field of a family as a folder, in place of one that was made here with other settings.

    Parameters
    ----------
    folder : Path
    recipe : Recipe
    frames : ndarray of shape (frame, y, x, channel), float32
    record : FamilyRecord
    made_with : dict
        Of :func:`settings`.

    Raises
    ------
    FileExistsError
        When there is something of that name that wasn't made here; it is left alone.
    ValueError
        For frames with NaN, infinity or masked values: the files have no place for what is missing.
    """
    frames = as_array(frames)
    if not (finite := finite_frames(frames)).all():
        raise ValueError(
            f"{folder}: expected finite frames, found missing values in frame {np.argmin(finite)}"
        )
    if folder.exists() and read_record(folder) is None:
        raise FileExistsError(
            f"{folder} exists and has no {RECORD} of simulated families, so it isn't replaced; "
            "move it away or choose another output folder"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    replaced = folder.with_name(f".{folder.name}.replaced")
    for leftover in (partial, replaced):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    try:
        _write_files(partial, recipe, frames, record, made_with)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
    finally:
        for leftover in (partial, replaced):
            if leftover.exists():
                shutil.rmtree(leftover)


def read_frames(folder: Path) -> np.ndarray:
    """One field of a family, as it was written: (frame, y, x, channel), float32, or uint8 of PNG.

    Raises
    ------
    FileNotFoundError
        When the folder isn't there, or wasn't written here.
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
    folder: Path, recipe: Recipe, frames: np.ndarray, record: FamilyRecord, made_with: dict[str, Any]
) -> None:
    format: Format = made_with["format"]
    names = frame_names(recipe, format)
    lo, hi = float(frames.min()), float(frames.max())
    for name, frame in zip(names, frames, strict=True):
        if format == "npz":
            np.savez(folder / name, frame)
        else:
            _write_png(folder / name, np.rint((frame - lo) * (255 / (hi - lo))).astype(np.uint8))
    described = {
        "settings": made_with,
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
    """What ``family.json`` holds, or None where there is none that was written here.

    Keys: ``settings`` (of :func:`settings`), ``family`` (the :class:`FamilyRecord`), ``range`` (minimum and
    maximum), ``bytes`` (length of each frame's file, the reference first).
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    ours = isinstance(record, dict) and {"settings", "family", "bytes"} <= record.keys()
    return record if ours else None


def _length(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
