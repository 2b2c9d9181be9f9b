"""Unpack zip and tar archives of others so that they can harm nothing outside their own folder.

This module creates all files and folders itself. Links, devices and names that lead elsewhere are refused,
whatever the libraries would do with them (tarfile's ``data`` filter allows links within the folder, and reads
headers of any length). Bytes are counted as they are written, since the sizes that an archive states may be
wrong.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pipeline.storage.limits import MEMBERS, UNPACKED_BYTES, UNPACKED_RATIO, readable
from pipeline.storage.safe_names import printable, short_name

DEPTH = 64
"""Deepest nesting of folders."""
_PIECE = 2**20
_HEADER_BYTES = 2**20
"""Bound on all headers of one tar member: tarfile reads and keeps them, whatever length they claim."""
_HEADERS_PER_MEMBER = 4096
"""Allowance for headers and padding of a tar member; bound on global headers, which each member gets."""
_ENTRY_BYTES = 512
"""Allowance for an entry in the directory of a zip archive."""
_ENTRY = b"PK\x01\x02"
_MORE_MEMBERS = "; a catalog that expects them states their number as members"
_OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
_BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,  # encryption and unknown compression, too
    ValueError,
)


class UnpackError(ValueError):
    """An archive that is refused; the message says why."""


@dataclass(frozen=True)
class _Member:
    """A file of an archive, or a folder, whose ``open`` is None."""

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
        Nothing is written outside of it. After an error it holds the files unpacked so far.
    most_bytes : int, optional
        Bound on the bytes of all files; default :data:`~pipeline.storage.limits.UNPACKED_RATIO` times the
        archive's own size, and :data:`~pipeline.storage.limits.UNPACKED_BYTES` at least.
    most_members : int, optional
        Bound on the number of files and folders, default :data:`~pipeline.storage.limits.MEMBERS`.

    Raises
    ------
    UnpackError
        When the archive is damaged or encrypted, exceeds a bound, or has a member that is a link or a device,
        or that would be written outside of the folder.
    """
    if most_bytes is None:
        most_bytes = max(UNPACKED_BYTES, UNPACKED_RATIO * archive.stat().st_size)
    if most_members is None:
        most_members = MEMBERS
    read = _zip_members if archive.name.endswith(".zip") else _tar_members
    nbytes = 0
    try:
        for count, member in enumerate(read(archive, most_bytes, most_members), start=1):
            if count > most_members:
                raise UnpackError(f"{archive}: more than {most_members} members{_MORE_MEMBERS}")
            path = folder / _relative(member.name, archive)
            if member.open is None:
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with member.open() as stream, path.open("xb") as file:
                nbytes += _copy(stream, file, most_bytes - nbytes)
            if nbytes > most_bytes:
                raise UnpackError(_too_much(archive, most_bytes))
    except (FileExistsError, NotADirectoryError) as error:
        raise UnpackError(
            f"{archive}: two members are called {short_name(member.name)!r}, or one lies in the other"
        ) from error
    except UnpackError:
        raise
    except (*_BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # a fault of the disk, not of the archive
            raise
        raise UnpackError(f"{archive}: cannot be unpacked: {type(error).__name__}: {error}") from error


def _copy(stream: IO[bytes], file: IO[bytes], limit: int) -> int:
    """Copy bytes until there are more than ``limit``; return the number of bytes read."""
    count = 0
    while piece := stream.read(_PIECE):
        count += len(piece)
        if count > limit:
            break
        file.write(piece)
    return count


def _relative(name: str, archive: Path) -> PurePosixPath:
    """Return the path of a member within the folder, or refuse its name."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and path.parts[0].endswith(":")):
        raise UnpackError(f"{archive}: {short_name(name)!r} would be written outside of the folder")
    if printable(name, keep="") != name:
        raise UnpackError(f"{archive}: {short_name(name)!r}: control characters in a name")
    if len(path.parts) > DEPTH or any(len(part.encode()) > 255 for part in path.parts):
        raise UnpackError(
            f"{archive}: {short_name(name)!r}: expected names of 255 bytes at most, "
            f"{DEPTH} within one another"
        )
    return path


def _too_much(archive: Path, limit: int) -> str:
    """Write the error of an archive that holds too many bytes."""
    return (
        f"{archive} ({readable(archive.stat().st_size)}) holds more than {readable(limit)}, which may be a "
        "decompression bomb; a catalog that expects more states it as unpacked: SIZE"
    )


@contextlib.contextmanager
def open_zip(archive: Path, most_members: int, hint: str = "") -> Iterator[zipfile.ZipFile]:
    """Open a zip archive for reading, and refuse it if its directory lists too many members.

    Parameters
    ----------
    archive : Path
    most_members : int
    hint : str, optional
        Remedy, for the error.

    Raises
    ------
    UnpackError
        When it lists more members, or its directory is longer than so many members need.
    zipfile.BadZipFile
        When it is damaged.
    """
    with _Directory(archive, most_members, hint) as file, zipfile.ZipFile(file) as members:
        file.is_listed = True
        yield members


class _Directory(io.BufferedReader):
    """A zip archive's file that gives zipfile no larger directory than allowed.

    zipfile reads the directory at once and makes an object of each entry, whatever number is stated.
    """

    def __init__(self, archive: Path, most_members: int, hint: str) -> None:
        super().__init__(io.FileIO(archive))
        self._archive, self._limit, self._hint = archive, most_members, hint
        self.is_listed = False

    def read(self, size: int | None = -1, /) -> bytes:
        if self.is_listed or size is None or size < 0:  # to the end: zipfile looks there for a comment
            return super().read(size)
        limit = _HEADER_BYTES + _ENTRY_BYTES * self._limit
        if size > limit:
            raise UnpackError(
                f"{self._archive}: a directory of {size} bytes; expected {limit} at most for {self._limit} "
                f"members{self._hint}"
            )
        data = super().read(size)
        if data.count(_ENTRY) > self._limit:
            raise UnpackError(f"{self._archive}: more than {self._limit} members{self._hint}")
        return data


def _zip_members(archive: Path, _: int, most_members: int) -> Iterator[_Member]:
    """Yield the members of a zip archive."""
    with open_zip(archive, most_members, _MORE_MEMBERS) as members:
        for member in members.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UnpackError(
                    f"{archive}: {short_name(member.filename)!r} is a link or a device, "
                    "and would lead outside"
                )
            name = member.filename.replace("\\", "/")
            yield _Member(name, None if name.endswith("/") else partial(members.open, member))


def _tar_members(archive: Path, most_bytes: int, _: int) -> Iterator[_Member]:
    """Yield the members of a tar archive, compressed or not."""
    with archive.open("rb") as file:
        start = file.read(8)
    opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)
    with opener(archive) if opener else archive.open("rb") as stream:
        bounded = _Bounded(stream, archive, most_bytes)
        with tarfile.open(fileobj=bounded, mode="r:") as members:  # type: ignore[call-overload]
            while (member := members.next()) is not None:
                members.members.clear()  # tarfile would keep each, with all its headers
                bounded.end_headers()
                _check_tar_member(archive, member, members.pax_headers)
                yield _Member(member.name, None if member.isdir() else partial(members.extractfile, member))
                bounded.begin_headers()


def _check_tar_member(archive: Path, member: tarfile.TarInfo, global_headers: Mapping[str, str]) -> None:
    """Refuse links, devices and long global headers."""
    if sum(len(key) + len(value) for key, value in global_headers.items()) > _HEADERS_PER_MEMBER:
        raise UnpackError(
            f"{archive}: global headers of more than {_HEADERS_PER_MEMBER} characters, which each member gets"
        )
    if not member.isreg() and not member.isdir():
        target = f" to {short_name(member.linkname)!r}" if member.linkname else ""
        raise UnpackError(
            f"{archive}: {short_name(member.name)!r} is a link or a device{target}, and would lead outside"
        )


class _Bounded:
    """A tar archive's stream that bounds the headers of each member, and the whole."""

    def __init__(self, stream: Any, archive: Path, limit: int) -> None:
        self._stream, self._archive = stream, archive
        self._limit = limit + _HEADER_BYTES
        self._in_headers, self._headers = True, 0

    def begin_headers(self) -> None:
        """Count the following bytes as headers of the next member."""
        self._in_headers, self._headers = True, 0

    def end_headers(self) -> None:
        """Count the following bytes as data of a member whose headers are read."""
        self._in_headers = False
        self._limit += _HEADERS_PER_MEMBER

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _HEADER_BYTES:
            raise UnpackError(
                f"{self._archive}: a header claims {size} bytes; expected {_HEADER_BYTES} at most"
            )
        if self._in_headers:
            self._headers += size
            if self._headers > _HEADER_BYTES:
                raise UnpackError(
                    f"{self._archive}: headers of one member take more than {_HEADER_BYTES} bytes"
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
        if position > self._limit:
            raise UnpackError(_too_much(self._archive, self._limit))
