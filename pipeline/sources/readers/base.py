"""Lazy sequences that readers return, the errors that they raise, and checks that readers share."""

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
    """A sequence that cannot be decoded: the reason, and the file where it is known."""

    def __init__(self, reason: str, file: str = "") -> None:
        super().__init__(reason, file)
        self.reason = reason
        self.file = file

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}" if self.file else self.reason


SEQUENCE_RULE = "a sequence may take {} (largest_sequence in the catalog states another size)"


class TooLargeError(ReaderError):
    """A sequence that claims more memory than its bound, or than this machine has."""


def check_size(
    shape: Iterable[int], itemsize: int, limit: int, path: str, subject: str, rule: str = SEQUENCE_RULE
) -> int:
    """Compute the size of an array in bytes, and refuse one that is too large, before it is allocated.

    Parameters
    ----------
    shape : iterable of int
    itemsize : int
        Bytes of one value.
    limit : int
        Bound in bytes, such as a sequence's ``most_bytes``.
    path, subject, rule : str
        For the error; ``rule`` explains the bound, in place of ``{}``.

    Raises
    ------
    TooLargeError
        When the size exceeds ``limit``, or the memory of this machine.
    """
    shape = tuple(shape)
    nbytes, memory = limits.array_bytes(shape, itemsize), limits.memory_bytes()
    if nbytes <= min(limit, memory):
        return nbytes
    bound = f"this machine has {limits.readable(memory)} of memory"
    if limit < memory:
        bound = rule.format(limits.readable(limit))
    raise TooLargeError(f"{subject} of shape {shape} would take {limits.readable(nbytes)}; {bound}", path)


@contextlib.contextmanager
def decoding(path: str, subject: str = "") -> Iterator[None]:
    """Turn errors of libraries for a damaged file into :class:`ReaderError`; errors of the disk pass."""
    try:
        yield
    except ReaderError:
        raise
    except OSError as error:
        if error.errno is not None:  # a fault of the disk, not of the file
            raise
        raise ReaderError(f"{subject}cannot be decoded: {error}", path) from error
    except (ValueError, SyntaxError, EOFError, KeyError, RuntimeError, OverflowError) as error:
        raise ReaderError(f"{subject}cannot be decoded: {error}", path) from error
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        raise ReaderError(f"{subject}cannot be decoded: {error}", path) from error


LEADS_OUT = "a link that leads out of the data set's folder, and is not followed"


def is_within(path: str, top: str) -> bool:
    """Tell whether a real path is another one or below it."""
    return path == top or path.startswith(top.rstrip(os.sep) + os.sep)


class SourceFile(NamedTuple):
    """A file (or the folder of a Zarr store) as it was when the sequences were listed.

    Attributes
    ----------
    path : str
    size : int
        Bytes; for a folder those of all its files.
    mtime_ns : int
        Time of modification in nanoseconds; for a folder that of its newest file.
    mark : str
        Time of the last change (ctime) and inode; for a folder a hash of those of all its files with their
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
            For a pipe or a device, which could be read for ever.
        """
        if os.path.isdir(path):
            return cls._of_folder(os.fspath(path))
        return cls.from_stat(os.fspath(path), os.stat(path))

    @classmethod
    def _of_folder(cls, folder: str) -> SourceFile:
        # Links to folders count like their targets, and aren't walked into: the targets are listed anyway.
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
    def from_stat(cls, path: str, look: os.stat_result) -> SourceFile:
        """Make a SourceFile from a file's status."""
        if not stat.S_ISREG(look.st_mode):
            raise ReaderError("a pipe or a device, and no file", path)
        return cls(path, look.st_size, look.st_mtime_ns, _mark(look))


def _mark(look: os.stat_result) -> str:
    return f"{look.st_ctime_ns} {look.st_ino}"


FIRST_VERSION = "1"
"""Version of each shipped reader at the time when records of sequences began to state it."""


@dataclass(frozen=True, kw_only=True)
class LazySequence(ABC):
    """A sequence that is listed but not decoded yet. Small and picklable: it is sent to workers.

    Attributes
    ----------
    name : str
        Unique in its field, and the same at every listing.
    field : str
        The physical quantity.
    files : tuple of SourceFile
        All files that :meth:`read` reads. While they look unchanged, the sequence isn't decoded again.
    settings : dict of JSON values
        Everything else that influences :meth:`read`; after a change the sequence is decoded again.
    attributes : dict of JSON values
        Attributes for the field's ``frames``, such as ``units``.
    missing : {"quarantine", "keep", "frames"}
        Whether frames may hold NaN and infinity, from the catalog; set after listing.
    most_bytes : int
        Bound on the decoded frames, from the catalog; set after listing.
    code : str
        Version of the reader's code, or a hash of its files; set after listing. After a change the sequence
        is decoded again.
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
        """Decode the sequence.

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
            NaN where a weight is missing. None where there are no weights, as by default.

        Raises
        ------
        ReaderError
            When the sequence has weights that cannot be read.
        """
        return None

    def read_time(self) -> np.ndarray | None:
        """Decode the parameter as the source has it, before it is scaled to [0, 1]: (n,), or None if unknown.

        Trajectories of different lengths are matched by it.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class BrokenSequence(LazySequence):
    """A sequence whose source cannot even be listed or opened; :meth:`read` raises the reason.

    A reader returns it in place of the sequence, which is then quarantined, and the others are converted.
    """

    file: str

    @classmethod
    def of(cls, name: str, field: str, path: str | os.PathLike[str], error: Exception) -> BrokenSequence:
        """Make the broken sequence of this name at ``path`` from the error that it raised."""
        wrapped = opening_error(path, error)
        # The reason is a setting: when it changes, so does the record in the store.
        return cls(name=name, field=field, files=(), settings={"reason": wrapped.reason}, file=wrapped.file)

    def read(self) -> NoReturn:
        """Raise the reason."""
        raise ReaderError(f"sequence {self.name}: {self.settings['reason']}", self.file)


def opening_error(path: str | os.PathLike[str], error: Exception) -> ReaderError:
    """Turn an error of listing or opening ``path`` into a :class:`ReaderError` that names the file."""
    if isinstance(error, ReaderError):
        return ReaderError(error.reason, error.file or os.fspath(path))
    # The first line only: xarray goes on about its manual.
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
"""Physical quantities that are recognised anywhere between the dots of a folder's name."""


def field_in_name(name: str, default: str) -> str:
    """Find the field that a name states between its dots (``plume1.Density`` → density), else ``default``.

    It is the first part that is a known quantity, or else a last part that is a word (``run1.enstrophy``),
    in lower case: a quantity is one field however its folders are spelt.

    Examples
    --------
    >>> field_in_name("plume1.Density", "frames"), field_in_name("plume1", "frames")
    ('density', 'frames')
    """
    parts = name.lower().split(".")[1:]
    quantity = next((part for part in parts if part in KNOWN_FIELDS), None)
    if quantity is not None:
        return quantity
    return parts[-1] if parts and re.fullmatch(r"[a-z][a-z_-]*", parts[-1]) else default


def natural_key(name: str) -> tuple[Any, ...]:
    """Make a sort key by which plume2 comes before plume10."""
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
        Name of the sequence, for the error.

    Raises
    ------
    ReaderError
        Unless there are at least two values, all finite, and each is larger than the one before.
    """
    values = np.ma.filled(np.ma.asanyarray(values, dtype=np.float64), np.nan)
    if values.ndim != 1 or values.size < 2:
        raise ReaderError(f"sequence {name}: parameter of shape {values.shape}; expected (n,) with n >= 2")
    if not np.isfinite(values).all():
        raise ReaderError(f"sequence {name}: parameter is not finite: {_format_values(values)}")
    if not (np.diff(values) > 0).all():
        raise ReaderError(f"sequence {name}: parameter does not rise: {_format_values(values)}")
    return (values - values[0]) / (values[-1] - values[0])


def checked_weights(weights: np.ndarray, frames: np.ndarray, name: str, path: str) -> np.ndarray:
    """Check the weights of a sequence's pixels.

    Parameters
    ----------
    weights : ndarray of shape (y, x)
        Numbers. They may be NaN or infinite at pixels that are missing in all frames.
    frames : ndarray of shape (n, y, x, channel)
    name, path : str
        Label of the weights, and their file, for errors.

    Returns
    -------
    ndarray of shape (y, x), float64
        Finite, not negative: 0 where the weight was not finite.

    Raises
    ------
    ReaderError
        For another shape or kind of numbers, for negative weights, and where frames have values for weights
        that are not finite or all 0.
    """
    if weights.dtype.kind not in "biuf" or weights.shape != frames.shape[1:3]:
        raise ReaderError(
            f"{name}: {weights.dtype} of shape {weights.shape}; expected real numbers of the shape (y, x) of "
            f"the frames, {frames.shape[1:3]}",
            path,
        )
    values = np.array(weights, dtype=np.float64)
    finite = np.isfinite(values)
    if negative := int((values < 0).sum()):
        raise ReaderError(
            f"{name}: {negative} of {values.size} are negative, down to {np.nanmin(values):g}; expected 0 or "
            "more, such as areas of cells",
            path,
        )
    has_values = np.ones(values.shape, dtype=bool)
    if frames.dtype.kind == "f":
        has_values = np.any([np.isfinite(frame).all(axis=-1) for frame in frames], axis=0)
    if (faulty := has_values & ~finite).any():
        y, x = np.argwhere(faulty)[0]
        raise ReaderError(
            f"{name}: {int(faulty.sum())} of {values.size} are missing or not finite where frames have "
            f"values, the first at y {y}, x {x}; expected a number there: 0 for pixels that should not count",
            path,
        )
    values[~finite] = 0
    if not (values[has_values] > 0).any():
        raise ReaderError(
            f"{name}: all are 0 where frames have values; expected some above 0, or leave the option out",
            path,
        )
    return values


def with_channel(frames: np.ndarray) -> np.ndarray:
    """Add a channel axis of length 1 to (n, y, x); return (n, y, x, channel) as it is."""
    return frames[..., None] if frames.ndim == 3 else frames


def list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """List the entries of a folder that are not hidden, in natural order."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    return sorted(visible, key=lambda entry: natural_key(entry.name))


def _format_values(values: np.ndarray) -> str:
    return ", ".join(f"{value:g}" for value in values)
