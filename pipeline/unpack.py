"""Zip and tar archives of others, unpacked so that they can harm nothing but their own folder.

Only files and folders are made, and by this module: links, devices and names that lead elsewhere are
refused, whatever the libraries would do with them. Bytes are counted as they are written, since the sizes
that an archive states of itself may be wrong.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pipeline.limits import MEMBERS, UNPACKED_BYTES, UNPACKED_RATIO, readable
from pipeline.names import printable, shown

DEPTH = 64
"""Folders within folders."""
_PIECE = 2**20
_HEADER_BYTES = 16 * 2**20
"""What tarfile may read at once: it reads the long headers of a member whole, whatever length they claim."""
_HEADERS_PER_MEMBER = 4096
_OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
_BROKEN = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError),
    *(EOFError, RuntimeError, ValueError),  # passwords and unknown compressions are kinds of RuntimeError
)


class UnpackError(ValueError):
    """An archive that isn't unpacked, and why."""


@dataclass(frozen=True)
class _Member:
    """A file of an archive, or a folder, of which ``open`` is None."""

    name: str
    open: Callable[[], IO[bytes]] | None


def unpack(
    archive: Path, folder: Path, *, most_bytes: int | None = None, most_members: int | None = None
) -> None:
    """Unpack an archive into an empty folder.

    Parameters
    ----------
    archive : Path
        Zip where its name says so, else tar, compressed or not.
    folder : Path
        Nothing is written outside of it. After an error it holds what was unpacked so far.
    most_bytes : int, optional
        That all files may have together; default :data:`~pipeline.limits.UNPACKED_RATIO` times the
        archive's own size, and :data:`~pipeline.limits.UNPACKED_BYTES` at least.
    most_members : int, optional
        Files and folders, default :data:`~pipeline.limits.MEMBERS`.

    Raises
    ------
    UnpackError
        When the archive is damaged or encrypted, holds more than that, or a member is a link, a device, or
        would be written elsewhere.
    """
    if most_bytes is None:
        most_bytes = max(UNPACKED_BYTES, UNPACKED_RATIO * archive.stat().st_size)
    if most_members is None:
        most_members = MEMBERS
    read = _zip_members if archive.name.endswith(".zip") else _tar_members
    written = 0
    try:
        for count, member in enumerate(
            read(archive, most_bytes + _HEADERS_PER_MEMBER * most_members), start=1
        ):
            if count > most_members:
                raise UnpackError(
                    f"{archive}: more than {most_members} members; a catalog that expects them states "
                    "their number as members"
                )
            path = folder / _relative(member.name, archive)
            if member.open is None:
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with member.open() as stream, path.open("xb") as file:
                while piece := stream.read(_PIECE):
                    written += len(piece)
                    if written > most_bytes:
                        raise UnpackError(_too_much(archive, most_bytes))
                    file.write(piece)
    except (FileExistsError, NotADirectoryError) as error:
        raise UnpackError(
            f"{archive}: two members are called {shown(member.name)!r}, or one lies in the other"
        ) from error
    except UnpackError:
        raise
    except (*_BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's fault, not the archive's
            raise
        raise UnpackError(f"{archive}: cannot be unpacked: {type(error).__name__}: {error}") from error


def _relative(name: str, archive: Path) -> PurePosixPath:
    """Where a member belongs within the folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and path.parts[0].endswith(":")):
        raise UnpackError(f"{archive}: {shown(name)!r} would be written outside of the folder")
    if printable(name, keep="") != name:
        raise UnpackError(f"{archive}: {shown(name)!r}: control characters in a name")
    if len(path.parts) > DEPTH or any(len(part.encode()) > 255 for part in path.parts):
        raise UnpackError(
            f"{archive}: {shown(name)!r}: expected names of 255 bytes at most, {DEPTH} within one another"
        )
    return path


def _too_much(archive: Path, most: int) -> str:
    return (
        f"{archive} ({readable(archive.stat().st_size)}) holds more than {readable(most)}, which may be a "
        "decompression bomb; a catalog that expects more states it as unpacked: SIZE"
    )


def _zip_members(archive: Path, _: int) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as members:
        for member in members.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UnpackError(
                    f"{archive}: {shown(member.filename)!r} is a link or a device, and would lead outside"
                )
            name = member.filename.replace("\\", "/")
            yield _Member(name, None if name.endswith("/") else partial(members.open, member))


def _tar_members(archive: Path, most: int) -> Iterator[_Member]:
    with archive.open("rb") as file:
        start = file.read(8)
    opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)
    with (
        opener(archive) if opener else archive.open("rb") as stream,
        tarfile.open(fileobj=_Bounded(stream, archive, most), mode="r:") as members,  # type: ignore[call-overload]
    ):
        for member in members:
            if not member.isreg() and not member.isdir():
                target = f" to {shown(member.linkname)!r}" if member.linkname else ""
                raise UnpackError(
                    f"{archive}: {shown(member.name)!r} is a link or a device{target}, and would lead outside"
                )
            yield _Member(member.name, None if member.isdir() else partial(members.extractfile, member))


class _Bounded:
    """A stream of which no more than ``most`` bytes are read, and never many at once."""

    def __init__(self, stream: Any, archive: Path, most: int) -> None:
        self._stream, self._archive, self._most = stream, archive, most

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _HEADER_BYTES:
            raise UnpackError(
                f"{self._archive}: a header claims {size} bytes; expected {_HEADER_BYTES} at most"
            )
        self._check(self._stream.tell() + size)
        data: bytes = self._stream.read(size)
        return data

    def seek(self, position: int) -> int:
        self._check(position)
        place: int = self._stream.seek(position)
        return place

    def tell(self) -> int:
        place: int = self._stream.tell()
        return place

    def _check(self, position: int) -> None:
        if position > self._most:
            raise UnpackError(_too_much(self._archive, self._most))
