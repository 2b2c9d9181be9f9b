"""What a reader gives: lazy sequences, and the errors they raise."""

from __future__ import annotations

import contextlib
import dataclasses
import lzma
import os
import re
import stat
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import xxhash

from pipeline.sources.catalog import Missing
from pipeline.storage import limits


class ReaderError(ValueError):
    """A sequence that cannot be decoded: what is wrong, and in which file where that is known."""

    def __init__(self, reason: str, file: str = "") -> None:
        super().__init__(reason, file)
        self.reason = reason
        self.file = file

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}" if self.file else self.reason


SEQUENCE_RULE = "a sequence may take {} (largest_sequence in the catalog states another size)"


class TooLargeError(ReaderError):
    """A sequence that claims more than it may take, or than this machine has."""


def check_size(
    shape: Iterable[int], itemsize: int, most: int, path: str, what: str, rule: str = SEQUENCE_RULE
) -> int:
    """Size of an array in bytes, before it is allocated.

    Parameters
    ----------
    shape : iterable of int
    itemsize : int
        Bytes of one value.
    most : int
        Bytes that it may take, as a sequence's ``most_bytes``.
    path, what, rule : str
        Named in the error; ``rule`` says who may have ``most``.

    Raises
    ------
    TooLargeError
        When that is more than ``most``, or than the memory of this machine.
    """
    shape = tuple(shape)
    nbytes, memory = limits.array_bytes(shape, itemsize), limits.memory_bytes()
    if nbytes <= min(most, memory):
        return nbytes
    bound = f"this machine has {limits.readable(memory)} of memory"
    if most < memory:
        bound = rule.format(limits.readable(most))
    raise TooLargeError(f"{what} of shape {shape} would take {limits.readable(nbytes)}; {bound}", path)


@contextlib.contextmanager
def decoding(path: str, what: str = "") -> Iterator[None]:
    """Turn whatever libraries make of a damaged file into :class:`ReaderError`; faults of the disk pass."""
    try:
        yield
    except ReaderError:
        raise
    except OSError as error:
        if error.errno is not None:  # the disk's fault, not the file's
            raise
        raise ReaderError(f"{what}cannot be decoded: {error}", path) from error
    except (ValueError, SyntaxError, EOFError, KeyError, RuntimeError, OverflowError) as error:
        raise ReaderError(f"{what}cannot be decoded: {error}", path) from error
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        raise ReaderError(f"{what}cannot be decoded: {error}", path) from error


LEADS_OUT = "a link that leads out of the data set's folder, and is not followed"


def is_within(path: str, top: str) -> bool:
    """Whether a real path lies at or below another."""
    return path == top or path.startswith(top.rstrip(os.sep) + os.sep)


class SourceFile(NamedTuple):
    """A file (or the folder of a Zarr store) as it was found when the sequences were listed.

    Attributes
    ----------
    path : str
    size : int
        Bytes; of a folder those of all its files.
    mtime_ns : int
        Time of modification in nanoseconds; of a folder the newest of its files.
    mark : str
        Time of the last change (ctime) and inode, of a folder a hash of those of all its files with their
        names. Sizes and times of modification survive ``mv``, ``cp -p`` and ``tar``; the mark doesn't.
    """

    path: str
    size: int
    mtime_ns: int
    mark: str = ""

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> SourceFile:
        """Look at a file, or at a folder and all files in it.

        Raises
        ------
        ReaderError
            For what is neither: a pipe or a device may be read from for ever.
        """
        if os.path.isdir(path):
            return cls._of_folder(os.fspath(path))
        return cls.seen(os.fspath(path), os.stat(path))

    @classmethod
    def _of_folder(cls, folder: str) -> SourceFile:
        # Links to folders count as what they lead to, and aren't walked into: that lies in the folder itself.
        files = [
            path
            for top, folders, names in os.walk(folder)
            for path in (os.path.join(top, name) for name in (*names, *folders))
            if os.path.islink(path) or not os.path.isdir(path)
        ]
        size, mtime, digest = 0, 0, xxhash.xxh3_128()
        for file in sorted(files):
            look = os.stat(file)
            size += look.st_size
            mtime = max(mtime, look.st_mtime_ns)
            name = os.fsencode(os.path.relpath(file, folder))
            digest.update(name + f"\0{look.st_size} {look.st_mtime_ns} {_mark(look)}\n".encode())
        return cls(folder, size, mtime, digest.hexdigest())

    @classmethod
    def seen(cls, path: str, look: os.stat_result) -> SourceFile:
        """A file that was looked at already."""
        if not stat.S_ISREG(look.st_mode):
            raise ReaderError("a pipe or a device, and no file", path)
        return cls(path, look.st_size, look.st_mtime_ns, _mark(look))


def _mark(look: os.stat_result) -> str:
    return f"{look.st_ctime_ns} {look.st_ino}"


FIRST_VERSION = "1"
"""Of each shipped reader when records of sequences began to name it."""


@dataclass(frozen=True, kw_only=True)
class LazySequence(ABC):
    """A sequence that is known but not decoded yet. Small and picklable: it travels to the workers.

    Attributes
    ----------
    name : str
        Unique in its field, and the same at every listing.
    field : str
        The physical quantity.
    files : tuple of SourceFile
        All that :meth:`read` reads. While a look at them shows no change, the sequence isn't decoded again.
    settings : dict of JSON values
        What else decides the outcome of :meth:`read`; a change is decoded again.
    attributes : dict of JSON values
        Attributes for the field's ``frames``, such as ``units``.
    missing : {"quarantine", "keep"}
        Whether frames may hold NaN and infinity, as the catalog says; set after listing.
    most_bytes : int
        What the decoded frames may take, as the catalog says; set after listing. :func:`check_size` compares.
    code : str
        What the reader's code is: a version, or a hash of its files; set after listing. Another is decoded
        again.
    """

    name: str
    field: str
    files: tuple[SourceFile, ...]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    missing: Missing = "quarantine"
    most_bytes: int = limits.SEQUENCE_BYTES
    code: str = FIRST_VERSION

    @abstractmethod
    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Decode.

        Returns
        -------
        frames : ndarray of shape (n, y, x, channel)
        parameter : ndarray of shape (n,), float64
            Ground truth in [0, 1], rising; frame 0 is the reference.

        Raises
        ------
        ReaderError
            When the sequence is broken.
        """

    def read_weights(self) -> np.ndarray | None:
        """Decode the weights of pixels in means over them.

        Returns
        -------
        ndarray of shape (y, x), or None
            NaN where a weight is missing. None, unless a reader says otherwise: there are no weights.

        Raises
        ------
        ReaderError
            When there should be some, and they cannot be read.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class BrokenSequence(LazySequence):
    """A sequence whose source cannot even be listed or opened; :meth:`read` raises the reason.

    A reader gives it in place of the sequence, so that this one is quarantined and the others go on.
    """

    file: str

    @classmethod
    def of(cls, name: str, field: str, path: str | os.PathLike[str], error: Exception) -> BrokenSequence:
        """The sequence of this name at ``path``, and the error that it made."""
        wrapped = opening_error(path, error)
        # The reason is a setting: when it changes, the record in the store does.
        return cls(name=name, field=field, files=(), settings={"reason": wrapped.reason}, file=wrapped.file)

    def read(self) -> NoReturn:
        """Raise the reason."""
        raise ReaderError(f"sequence {self.name}: {self.settings['reason']}", self.file)


def opening_error(path: str | os.PathLike[str], error: Exception) -> ReaderError:
    """An error of listing or opening ``path`` as :class:`ReaderError` that names the file."""
    if isinstance(error, ReaderError):
        return ReaderError(error.reason, error.file or os.fspath(path))
    # The first line: xarray goes on about its manual.
    file, reason = os.fspath(path), f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, OSError) and error.strerror:
        file = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else file
        reason = error.strerror
    return ReaderError(f"cannot be opened: {reason}", file)


_FIELDS = (
    "density, pressure, vel, velocity, velx, vely, velz, flags, phi, levelset, vorticity, temperature, "
    "smoke, marker, mask, rgb"
)
KNOWN_FIELDS = frozenset(_FIELDS.split(", "))
"""Physical quantities that are recognised anywhere between the dots of a folder's name, in lower case."""


def field_in_name(name: str, default: str) -> str:
    """The field that a name says between its dots (``plume1.Density`` → density), else ``default``.

    That is the first part that is a known quantity, or else a last part that is a word (``run1.enstrophy``);
    in lower case, as one quantity is one field however its folders are spelt.
    """
    parts = name.lower().split(".")[1:]
    known = next((part for part in parts if part in KNOWN_FIELDS), None)
    if known is not None:
        return known
    return parts[-1] if parts and re.fullmatch(r"[a-z][a-z_-]*", parts[-1]) else default


def natural_key(name: str) -> tuple[Any, ...]:
    """Sort key that counts: plume2 before plume10."""
    parts: list[Any] = re.split(r"(\d+)", name)
    parts[1::2] = map(int, parts[1::2])
    return tuple(parts), name


def scale_parameter(values: np.ndarray, name: str) -> np.ndarray:
    """Scale a parameter to [0, 1]: its smallest value to 0, its largest to 1.

    Parameters
    ----------
    values : ndarray of shape (n,)
        The parameter of each frame, in the frames' order.
    name : str
        The sequence, for the error.

    Raises
    ------
    ReaderError
        Unless there are at least two values, all finite, and each is larger than the one before.
    """
    values = np.ma.filled(np.ma.asanyarray(values, dtype=np.float64), np.nan)
    if values.ndim != 1 or values.size < 2:
        raise ReaderError(f"sequence {name}: parameter of shape {values.shape}; expected (n,) with n >= 2")
    if not np.isfinite(values).all():
        raise ReaderError(f"sequence {name}: parameter is not finite: {_listed(values)}")
    if not (np.diff(values) > 0).all():
        raise ReaderError(f"sequence {name}: parameter does not rise: {_listed(values)}")
    return (values - values[0]) / (values[-1] - values[0])


def checked_weights(weights: np.ndarray, frames: np.ndarray, what: str, path: str) -> np.ndarray:
    """Check the weights of a sequence's pixels.

    Parameters
    ----------
    weights : ndarray of shape (y, x)
        Numbers. They may be NaN or infinite at pixels that are missing in all frames.
    frames : ndarray of shape (n, y, x, channel)
    what, path : str
        What they are, and in which file, for errors.

    Returns
    -------
    ndarray of shape (y, x), float64
        Finite, not negative: 0 where the weight was not finite.

    Raises
    ------
    ReaderError
        For another shape or kind of numbers, negative weights, weights that are not finite where a frame has
        a value, and weights that are all 0 there.
    """
    if weights.dtype.kind not in "biuf" or weights.shape != frames.shape[1:3]:
        raise ReaderError(
            f"{what}: {weights.dtype} of shape {weights.shape}; expected real numbers of the shape (y, x) of "
            f"the frames, {frames.shape[1:3]}",
            path,
        )
    values = np.array(weights, dtype=np.float64)
    finite = np.isfinite(values)
    if negative := int((values < 0).sum()):
        raise ReaderError(
            f"{what}: {negative} of {values.size} are negative, down to {np.nanmin(values):g}; expected 0 or "
            "more, such as areas of cells",
            path,
        )
    used = np.ones(values.shape, dtype=bool)
    if frames.dtype.kind == "f":
        used = np.any([np.isfinite(frame).all(axis=-1) for frame in frames], axis=0)
    if (lost := used & ~finite).any():
        y, x = np.argwhere(lost)[0]
        raise ReaderError(
            f"{what}: {int(lost.sum())} of {values.size} are missing or not finite where frames have values, "
            f"the first at y {y}, x {x}; expected a number there: 0 for pixels that shall not count",
            path,
        )
    values[~finite] = 0
    if not (values[used] > 0).any():
        raise ReaderError(
            f"{what}: all are 0 where frames have values; expected some above 0, or leave the option out",
            path,
        )
    return values


def with_channel(frames: np.ndarray) -> np.ndarray:
    """(n, y, x) gets a channel axis of length 1; (n, y, x, channel) stays."""
    return frames[..., None] if frames.ndim == 3 else frames


def list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """Entries of a folder that are not hidden, in natural order."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    return sorted(visible, key=lambda entry: natural_key(entry.name))


def _listed(values: np.ndarray) -> str:
    return ", ".join(f"{value:g}" for value in values)
