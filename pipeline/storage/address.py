"""Locations of stores: a path, or an address such as ``s3://bucket/archive/frames.zarr``.

A *location* is either, as text. :func:`absolute` makes one from what a user typed, and all other functions
take such a location. An address never holds credentials: they are in the environment of each process that
opens it.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

SCHEMES = ("s3", "gs")
"""Object stores; ``file://`` is another way to write a path."""

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_HALVED = re.compile(r"(s3|gs|file):/[^/]")


class AddressError(ValueError):
    """An address that cannot be opened. The message repeats nothing that may be a secret."""


def is_address(location: str | os.PathLike[str]) -> bool:
    """Tell whether a location is an address in an object store, and not a path."""
    return isinstance(location, str) and location.partition("://")[0] in SCHEMES and "://" in location


def absolute(location: str | os.PathLike[str]) -> str:
    """Make a location from a user's text: an absolute path, or an address without a slash at its end.

    Raises
    ------
    AddressError
        For an unknown scheme, credentials in an address, and an address that went through pathlib.
    """
    text = os.fspath(location)
    match = _ADDRESS.fullmatch(text)
    if match is None:
        if halved := _HALVED.match(text):
            scheme = halved.group(1)
            raise AddressError(
                f"{scheme}:/…: expected {scheme}://…; an address is a str, never a pathlib.Path"
            )
        return os.path.abspath(text)
    scheme, rest = match.groups()
    if scheme == "file":
        return _local(text)
    if scheme not in SCHEMES:
        raise AddressError(
            f"{scheme}://…: expected an address that begins with s3://, gs:// or file://, or a path"
        )
    return f"{scheme}://{_validate(scheme, rest)}"


def _local(text: str) -> str:
    """Make an absolute path from a ``file://`` address."""
    parts = urlsplit(text)
    if (
        parts.netloc not in ("", "localhost")
        or not parts.path.startswith("/")
        or parts.query
        or parts.fragment
    ):
        raise AddressError(
            "file://…: expected file:/// and an absolute path, with % for what an address can't hold"
        )
    return os.path.abspath(unquote(parts.path))


def _validate(scheme: str, rest: str) -> str:
    """Check ``bucket/key``; the error doesn't repeat it, as it may hold a secret."""
    if re.search(r"[@?#]", rest) or ":" in rest.partition("/")[0]:
        raise AddressError(
            f"{scheme}://…: an address holds a bucket and a name, and no credentials, '?', '#' or '@'; "
            "these are read from the environment (AWS_ACCESS_KEY_ID and others, see docs/object-stores.md)"
        )
    bucket, *names = rest.rstrip("/").split("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]+", bucket) or {"", ".", ".."} & set(names):
        raise AddressError(
            f"{scheme}://…: expected {scheme}://BUCKET/NAME/…, the bucket of letters, digits, '.', '_' and "
            "'-', and no empty name, '.' or '..'"
        )
    return "/".join([bucket, *names])


def join(location: str, *names: str) -> str:
    """Join names to a location."""
    return "/".join([location, *names]) if is_address(location) else os.path.join(location, *names)


def parent(address: str) -> str:
    """Return the address one level up; a bucket is its own parent."""
    scheme, bucket, name = split_bucket(address)
    folder = name.rpartition("/")[0]
    return f"{scheme}://{bucket}/{folder}" if folder else f"{scheme}://{bucket}"


def split_bucket(address: str) -> tuple[str, str, str]:
    """Split an address into scheme, bucket and the name in it."""
    scheme, _, rest = address.partition("://")
    bucket, _, name = rest.partition("/")
    return scheme, bucket, name


def relative(location: str, start: str) -> str:
    """Name a location as seen from ``start``: relative where both may be moved together."""
    if is_address(location) and is_address(start):
        if split_bucket(location)[:2] != split_bucket(start)[:2]:
            return location
        return posixpath.relpath(f"/{split_bucket(location)[2]}", f"/{split_bucket(start)[2]}")
    if is_address(location) or is_address(start):
        return location
    return os.path.relpath(Path(location).resolve(), Path(start).resolve())


def resolve(name_from_start: str, start: str) -> str:
    """Return the location that :func:`relative` named as seen from ``start``."""
    if is_address(name_from_start) or os.path.isabs(name_from_start):
        return absolute(name_from_start)
    if not is_address(start):
        return os.path.normpath(Path(start).resolve() / name_from_start)
    scheme, bucket, name = split_bucket(start)
    inside = posixpath.normpath(f"/{name}/{name_from_start}").lstrip("/")
    return absolute(f"{scheme}://{bucket}/{inside}")
