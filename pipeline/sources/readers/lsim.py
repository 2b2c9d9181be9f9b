"""Reader of the published layout: a folder a sequence, ``<name>NN.png`` or ``<name>NN.npz`` a frame.

The last two digits NN of a file's name are the frame's ground truth; they are scaled to [0, 1] over the
sequence. Endings count in any case. ``ref.png`` and ``ref.npz`` are skipped, and so are folders and every
file that is neither PNG nor NPZ. The field is taken, in lower case, from the folder's name where it is
between dots (``plume1.density``), else it is ``options.field``. PNG files are gray, palette or RGB,
8-bit, or gray 16-bit; an alpha channel is dropped.

A frame is taken to be missing when a sequence has fewer frames than most of the sequences of the same
field in the same folder (where two counts are equally frequent, the larger counts); ``options.frames``
states the number instead. Numbers may skip a step: they are the parameter, whose steps need not be equal.

A sequence whose folder cannot be listed, or with a frame that is a link to nothing, is broken: its ``read``
raises the reason, and other sequences are converted.

Options: ``field`` (default "frames"), ``frames`` (default: as most sequences have), ``digits`` (default 2),
``key`` (of the array in an NPZ file, default "arr_0"), ``format`` ("png" or "npz", default: both).
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pipeline.sources.catalog import Dataset, reader_options
from pipeline.sources.readers.base import (
    BrokenSequence,
    LazySequence,
    ReaderError,
    SourceFile,
    check_size,
    decoding,
    field_in_name,
    list_folder,
    scale_parameter,
    with_channel,
)
from pipeline.sources.readers.npy import load_npz

VERSION = "1"
"""Increased when the same files are decoded to other frames or another parameter."""


class LsimOptions(BaseModel):
    """Options of this reader; see the module."""

    model_config = ConfigDict(extra="forbid")

    field: str = "frames"
    frames: int | None = Field(None, ge=2)
    digits: int = Field(2, ge=1)
    key: str = "arr_0"
    format: Literal["png", "npz"] | None = None


def read(entry: Dataset, folder: Path) -> list[LazySequence]:
    """List the sequences in ``folder``, one for each folder in it that the entry's filter selects."""
    options = reader_options(LsimOptions, entry)
    endings = (f".{options.format}",) if options.format else (".png", ".npz")
    files: dict[str, tuple[SourceFile, ...]] = {}
    broken: list[LazySequence] = []
    for child in list_folder(folder):
        if not entry.selects(child.name) or not _may_be_folder(child):
            continue
        try:
            files[child.name] = _frames_in(child.path, endings)
        except (OSError, ReaderError) as error:
            field = field_in_name(child.name, options.field)
            broken.append(BrokenSequence.of(child.name, field, child.path, error))
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    fields = {name: field_in_name(name, options.field) for name in files}
    for name, frames in files.items():
        counts[fields[name]][len(frames)] += 1

    def frames_of(field: str) -> int:
        return options.frames or max(counts[field], key=lambda count: (counts[field][count], count))

    return broken + [
        ImageSequence(
            name=name,
            field=fields[name],
            files=frames,
            folder=str(folder / name),
            settings={"frames": frames_of(fields[name]), "digits": options.digits, "key": options.key},
        )
        for name, frames in files.items()
    ]


def _may_be_folder(child: os.DirEntry[str]) -> bool:
    """Tell whether an entry is a folder, or a broken link, whose listing raises the reason."""
    try:
        return child.is_dir() or (child.is_symlink() and not os.path.exists(child.path))
    except OSError:
        return True


def _frames_in(folder: str, endings: tuple[str, ...]) -> tuple[SourceFile, ...]:
    """List the frames in a folder."""
    frames = []
    for file in list_folder(Path(folder)):
        name = file.name.lower()
        # A link to nothing isn't a folder: it counts as a frame, and its stat raises the reason.
        if name.endswith(endings) and name not in ("ref.png", "ref.npz") and not file.is_dir():
            frames.append(SourceFile.from_stat(file.path, file.stat()))
    return tuple(frames)


@dataclass(frozen=True, kw_only=True)
class ImageSequence(LazySequence):
    """One folder of frames."""

    folder: str

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Decode the frames in the order of their file names."""
        if not self.files:
            raise ReaderError(
                f"sequence {self.name}: no frame <name>NN.png or <name>NN.npz in its folder", self.folder
            )
        numbers = [self._number(file.path) for file in self.files]
        if len(set(numbers)) < len(numbers):
            value = next(n for n in numbers if numbers.count(n) > 1)
            names = [os.path.basename(f.path) for f, n in zip(self.files, numbers, strict=True) if n == value]
            raise ReaderError(
                f"sequence {self.name}: parameter does not rise: {' and '.join(names)} both stand at {value} "
                f"(by the last {self.settings['digits']} digits, options.digits)",
                self.files[numbers.index(value)].path,
            )
        if len(numbers) != self.settings["frames"]:
            raise ReaderError(
                f"sequence {self.name}: {len(numbers)} frames ({', '.join(map(str, numbers))}); "
                f"expected {self.settings['frames']}",
                self.folder,
            )
        parameter = scale_parameter(np.array(numbers, dtype=np.float64), self.name)
        frames: np.ndarray | None = None
        for index, file in enumerate(self.files):
            frame = self._decode(file.path)
            if frames is None:
                check_size(
                    (len(self.files), *frame.shape), frame.itemsize, self.most_bytes, file.path, "sequence"
                )
                frames = np.empty((len(self.files), *frame.shape), frame.dtype)
            if frame.shape != frames.shape[1:] or frame.dtype != frames.dtype:
                raise ReaderError(
                    f"sequence {self.name}: frame of shape {frame.shape} {frame.dtype}; expected "
                    f"{frames.shape[1:]} {frames.dtype} as in {os.path.basename(self.files[0].path)}",
                    file.path,
                )
            frames[index] = frame
        assert frames is not None
        return frames, parameter

    def _number(self, path: str) -> int:
        digits = Path(path).stem[-self.settings["digits"] :]
        if len(digits) < self.settings["digits"] or not (digits.isascii() and digits.isdigit()):
            raise ReaderError(
                f"sequence {self.name}: the name doesn't end in the parameter's {self.settings['digits']} "
                "digits (options.digits states how many there are)",
                path,
            )
        return int(digits)

    def _decode(self, path: str) -> np.ndarray:
        with decoding(path):
            if path.lower().endswith(".png"):
                frame = _read_png(path)
            else:
                (frame,) = load_npz(path, [self.settings["key"]], self.most_bytes)
                # As the published evaluation: four channels are RGB and alpha.
                frame = frame[..., :3] if frame.ndim == 3 and frame.shape[2] == 4 else frame
        if frame.ndim not in (2, 3):
            raise ReaderError(f"frame of shape {frame.shape}; expected (y, x) or (y, x, channel)", path)
        return with_channel(frame[None])[0]


def _read_png(path: str) -> np.ndarray:
    """Decode a PNG file to (y, x) or (y, x, 3)."""
    from PIL import Image

    try:
        # No other format under that name: Pillow hands some to other programs.
        file = Image.open(path, formats=("PNG",))
    except Image.DecompressionBombError as error:
        raise ReaderError(f"{error} Store larger frames as NPZ", path) from error
    with file as image:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise ReaderError(
                f"an image of {image.width} × {image.height} pixels, which may be a decompression bomb; "
                f"expected {limit} pixels at most. Store larger frames as NPZ",
                path,
            )
        raw_mode = str(image.tile[0][3]) if image.tile else ""
        if image.mode in ("RGB", "RGBA", "LA") and "16" in raw_mode:
            raise ReaderError("16 bits in each of several channels would be cut to 8; store NPZ", path)
        # Pillow's modes: P and PA are palettes, 1 is black and white, LA and RGBA have alpha.
        plain = {"P": "RGB", "PA": "RGB", "1": "L"}.get(image.mode)
        pixels = np.asarray(image.convert(plain) if plain else image)
        if image.mode == "RGBA":
            return pixels[..., :3]
        return pixels[..., 0] if image.mode == "LA" else pixels
