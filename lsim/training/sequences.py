"""Sequences to train on: where they come from, how they are held out, scaled and augmented.

A source of sequences is anything with ``names`` and ``read(index)``, so that other stores can be trained on;
:class:`LayoutFolders` reads the layout of the published data, in which ``lsim simulate`` writes.

Every random choice comes from a NumPy generator keyed by seed, epoch and sequence: not by the order in which
sequences are asked for, nor by the process that asks.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol
from zipfile import BadZipFile

import numpy as np

from lsim.preprocess import as_array, finite_frames, preprocess, resize

_FRAME = re.compile(r"(?P<digits>\d{2})\.(?P<ending>npz|png)$", re.IGNORECASE)


@dataclass(frozen=True)
class TrainingSequence:
    """Frames ordered by a rising parameter.

    Attributes
    ----------
    name : str
    frames : ndarray of shape (frame, y, x, channel), any real dtype
        1 or 3 channels.
    parameter : ndarray of shape (frame,), float64
        Ground truth of each frame in [0, 1].
    """

    name: str
    frames: np.ndarray
    parameter: np.ndarray


class SequenceError(ValueError):
    """A sequence that cannot be read or cannot be learned from; says which, and why."""


class SequenceSource(Protocol):
    """Where sequences come from: their names, and each by its index."""

    @property
    def names(self) -> Sequence[str]:
        """``<data set>/<family>.<field>``; sequences of one simulation share all but the field."""

    def read(self, index: int) -> TrainingSequence:
        """The sequence of that index in ``names``.

        Raises
        ------
        SequenceError
            When it cannot be read: training goes on without it. Any other error ends the run.
        """


def read_checked(source: SequenceSource, index: int) -> TrainingSequence:
    """Read a sequence, without alpha where it has four channels, and see that it can be learned from.

    Raises
    ------
    SequenceError
        When it cannot be read, holds NaN, infinity or masked values, has fewer than three frames, or its
        frames are all equal.
    """
    sequence = source.read(index)
    frames, parameter = as_array(sequence.frames), as_array(sequence.parameter, "parameter")
    if frames.ndim != 4 or len(frames) < 3 or frames.shape[-1] not in (1, 3, 4):
        raise SequenceError(
            f"{sequence.name}: expected frames (frame, y, x, channel), three or more of 1, 3 or 4 channels, "
            f"found {frames.shape}"
        )
    if parameter.shape != (len(frames),) or not (np.diff(parameter) > 0).all():  # NaN, too
        raise SequenceError(
            f"{sequence.name}: expected a rising parameter for {len(frames)} frames, found {parameter}"
        )
    finite = finite_frames(frames)
    if not finite.all():
        raise SequenceError(
            f"{sequence.name}: frame {np.argmin(finite)} holds NaN, infinity or masked values"
        )
    if (frames[1:] == frames[:1]).all():
        raise SequenceError(f"{sequence.name}: its frames are all equal")
    return replace(sequence, frames=frames[..., :3], parameter=parameter)


class LayoutFolders:
    """Sequences in the layout of the published data: ``<root>/<data set>/<name>.<field>/<file>NN.npz``.

    NN, two digits, is the frame's ground truth; PNG files are taken, too.

    Parameters
    ----------
    root : Path
        Folder of data sets.
    datasets : sequence of str
        Names of folders in it.

    Raises
    ------
    FileNotFoundError
        When a data set isn't there, or holds no sequence.
    """

    def __init__(self, root: Path, datasets: Sequence[str]) -> None:
        self._folders: list[Path] = []
        for dataset in datasets:
            if not (root / dataset).is_dir():
                there = (
                    sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
                )
                raise FileNotFoundError(
                    f"no data set {dataset!r} in {root}; there are: {', '.join(there) or 'none'}. "
                    f"'lsim simulate' makes data sets"
                )
            folders = (f for f in sorted((root / dataset).iterdir()) if not f.name.startswith("."))
            found = [f for f in folders if f.is_dir() and _frame_files(f)]
            if not found:
                raise FileNotFoundError(
                    f"{root / dataset}: no folders of frames <name>NN.npz or <name>NN.png"
                )
            self._folders += found

    @property
    def names(self) -> Sequence[str]:
        """``<data set>/<folder>``."""
        return [f"{folder.parent.name}/{folder.name}" for folder in self._folders]

    def read(self, index: int) -> TrainingSequence:
        """Decode the frames of one folder.

        Raises
        ------
        SequenceError
            When frames cannot be read, differ in shape, or there are fewer than three; names the folder.
        """
        folder = self._folders[index]
        files = _frame_files(folder)
        try:
            frames = [_decode(path) for path in files]
        except (OSError, EOFError, KeyError, ValueError, SyntaxError, BadZipFile, zlib.error) as error:
            # SyntaxError is Pillow's for a damaged PNG file.
            raise SequenceError(f"{folder}: a frame cannot be read: {error}") from error
        shapes = sorted({frame.shape for frame in frames})
        if len(frames) < 3 or len(shapes) != 1:
            raise SequenceError(
                f"{folder}: expected three or more frames of one shape, found {len(frames)}: {shapes}"
            )
        position = np.array([int(path.stem[-2:]) for path in files], dtype=np.float64)
        parameter = (position - position[0]) / (position[-1] - position[0])
        return TrainingSequence(f"{folder.parent.name}/{folder.name}", np.stack(frames), parameter)


class Subset:
    """Some of a source's sequences."""

    def __init__(self, source: SequenceSource, indices: Sequence[int]) -> None:
        self._source, self._indices = source, list(indices)

    @property
    def names(self) -> Sequence[str]:
        """Names of those chosen."""
        names = self._source.names
        return [names[index] for index in self._indices]

    def read(self, index: int) -> TrainingSequence:
        """The sequence of that index among those chosen."""
        return self._source.read(self._indices[index])


def hold_out(source: SequenceSource, share: float) -> tuple[Subset, Subset]:
    """Split into sequences for training and for validation, by simulation and by name alone.

    All fields of a simulation go to the same side, and a simulation stays on its side when others are added.

    Parameters
    ----------
    source : SequenceSource
    share : float
        Of the simulations to hold out, in (0, 1).

    Raises
    ------
    ValueError
        When one side would be empty.
    """
    sides: tuple[list[int], list[int]] = ([], [])
    for index, name in enumerate(source.names):
        draw = zlib.crc32(simulation_of(name).encode()) / 2**32
        sides[draw < share].append(index)
    training, validation = sides
    if not training or not validation:
        raise ValueError(
            f"cannot hold out {share:.0%} of {len(source.names)} sequences: {len(training)} would be left to "
            f"train on and {len(validation)} to validate on"
        )
    return Subset(source, training), Subset(source, validation)


def simulation_of(name: str) -> str:
    """The sequence's name without its field: ``smoke/plume7.density`` → ``smoke/plume7``."""
    return name.rsplit(".", 1)[0] if "." in name.rsplit("/", 1)[-1] else name


@dataclass(frozen=True)
class Augmentation:
    """How frames are varied at random, the same way for all frames that are compared.

    Attributes
    ----------
    size : int, default 224
        Side of the crop, in pixels. Frames that are shorter than ``margin`` · size are enlarged first.
    margin : float, default 8/7
        256 for crops of 224, as published.
    flip, turn, shuffle_channels : bool
        Mirror both axes; turn by quarters (square crops stay square); permute the channels.
    noise : float, default 0
        Largest standard deviation of normal noise, as a fraction of the range of each channel's values; each
        sequence draws its own, uniform in [0, noise], in half of the cases. Not in the publication.

    Raises
    ------
    ValueError
        When ``margin`` is less than 1: the crop would not fit into the frame.
    """

    size: int = 224
    margin: float = 8 / 7
    flip: bool = True
    turn: bool = True
    shuffle_channels: bool = True
    noise: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a crop that may not fit."""
        if not self.margin >= 1:  # NaN, too
            raise ValueError(f"augmentation.margin must be at least 1, got {self.margin}")

    def varied(self, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Crop, turn and disturb frames (frame, y, x, channel) alike: (frame, size, size, channel)."""
        frames = as_array(frames)
        least = round(self.size * self.margin)
        if min(frames.shape[1:3]) < least:
            # Order 0 is how the published evaluation resizes, order 1 how most people do.
            frames = resize(frames, least, order=int(rng.integers(2)))
        y, x = (int(rng.integers(0, n - self.size + 1)) for n in frames.shape[1:3])
        frames = frames[:, y : y + self.size, x : x + self.size]
        if self.flip:
            frames = frames[:, :: 1 - 2 * int(rng.integers(2)), :: 1 - 2 * int(rng.integers(2))]
        if self.turn:
            frames = np.rot90(frames, int(rng.integers(4)), axes=(1, 2))
        if self.shuffle_channels:
            frames = frames[..., rng.permutation(frames.shape[-1])]
        if self.noise and rng.uniform() < 0.5:
            # Of each channel for itself, as they are scaled: one that is constant stays so.
            span = frames.max((0, 1, 2)).astype(np.float64) - frames.min((0, 1, 2))
            strength = (self.noise * rng.uniform() * span).astype(np.float32)
            frames = frames + strength * rng.standard_normal(frames.shape, dtype=np.float32)
        return np.ascontiguousarray(frames)

    @staticmethod
    def scaled(frames: np.ndarray) -> np.ndarray:
        """Map the frames of a sequence to three channels in [0, 255] jointly, as the metric does."""
        return preprocess(frames, size=None, scope="sequence")


def _frame_files(folder: Path) -> list[Path]:
    matches = {path: _FRAME.search(path.name) for path in folder.iterdir()}
    return sorted((path for path, match in matches.items() if match), key=lambda p: int(p.stem[-2:]))


def _decode(path: Path) -> np.ndarray:
    if path.suffix.lower() == ".npz":
        with np.load(path) as content:
            frame = np.asarray(content["arr_0"])
    else:
        frame = _decode_png(path)
    return frame[..., None] if frame.ndim == 2 else frame


def _decode_png(path: Path) -> np.ndarray:
    """(y, x) or (y, x, 3); gray of 16 bits stays so, alpha is dropped."""
    from PIL import Image

    with Image.open(path) as image:
        raw_mode = str(image.tile[0][3]) if image.tile else ""
        if image.mode in ("RGB", "RGBA", "LA") and "16" in raw_mode:
            raise ValueError(f"{path.name}: 16 bits in each of several channels would be cut to 8; store NPZ")
        # Pillow's modes: P and PA are palettes, 1 is black and white, LA and RGBA have alpha.
        plain = {"P": "RGB", "PA": "RGB", "1": "L"}.get(image.mode)
        pixels = np.asarray(image.convert(plain) if plain else image)
        if image.mode == "RGBA":
            return pixels[..., :3]
        return pixels[..., 0] if image.mode == "LA" else pixels
