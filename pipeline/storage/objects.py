"""Object stores through obstore: connect by address, and read and write single objects.

Credentials and endpoint come from the environment (``AWS_…``, ``GOOGLE_…``) of the process that connects;
nothing here takes, keeps or prints any.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.storage import object_errors
from pipeline.storage.address import join, parent, split_bucket
from pipeline.storage.object_errors import PREFIXES, ObjectStoreError

if TYPE_CHECKING:
    from obstore.store import GCSStore, S3Store

EXTRAS = {"s3": "s3", "gs": "gcs"}
"""The extra of this package that a scheme needs."""
BLOCK_BYTES = 8 * 2**20
FIRST_RETRIES = 2
FIRST_PATIENCE_S = 10
"""Seconds that a first request and a conditional write are tried for; a lock's owner tries again anyway."""
PATIENCE_S = 180
"""Seconds that later requests are tried for, so that a long run outlives a restart of the server. After a
failure the next request counts as a first one again, so that a run waits this long only once."""


class ChangedError(Exception):
    """An object that exists, doesn't exist or has changed, against the condition of a write."""


class _Connection(NamedTuple):
    """The part of an object store below an address, for patient requests and for brief ones."""

    patient: S3Store | GCSStore
    brief: S3Store | GCSStore


def connect(address: str) -> S3Store | GCSStore:
    """Connect to the part of an object store below an address, and check that it answers.

    Parameters
    ----------
    address : str
        As :func:`pipeline.storage.address.absolute` returns it.

    Raises
    ------
    ObjectStoreError
        When obstore isn't installed, a variable in the environment is invalid, the store doesn't answer, the
        bucket doesn't exist, or access is denied.
    """
    return _connection(address).patient


def _connection(address: str) -> _Connection:
    prefix = PREFIXES[split_bucket(address)[0]]
    # The environment as it is now: credentials may be renewed while a process lives. Empty means unset.
    with _environment:
        variables = {name: value for name, value in os.environ.items() if name.startswith(prefix) and value}
    return _connect(address, tuple(sorted(variables.items())))


@lru_cache(maxsize=64)
def _connect(address: str, environment: tuple[tuple[str, str], ...]) -> _Connection:
    scheme, bucket, name = split_bucket(address)
    try:
        import obstore
        from obstore import store
    except ImportError as error:
        raise ObjectStoreError(f"{address}: needs obstore: pip install 'lsim[{EXTRAS[scheme]}]'") from error
    if fault := object_errors.fault_of_environment(dict(environment)):
        raise ObjectStoreError(f"{address}: {fault}")
    opener = store.S3Store if scheme == "s3" else store.GCSStore
    brief_retries: Any = {"max_retries": FIRST_RETRIES, "retry_timeout": timedelta(seconds=FIRST_PATIENCE_S)}
    # By default ten retries are over in seconds: pauses are random, and rarely grow.
    backoff = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 3}
    patient_retries: Any = {
        "max_retries": 10_000,
        "retry_timeout": timedelta(seconds=PATIENCE_S),
        "backoff": backoff,
    }
    with in_one_line(address):
        with _without_empty(PREFIXES[scheme]):
            brief = opener(bucket, prefix=name or None, retry_config=brief_retries)
            patient = opener(bucket, prefix=name or None, retry_config=patient_retries)
            whole_bucket = opener(bucket, retry_config=brief_retries)
        # The first request: it fails where the store, the bucket or the credentials are wrong.
        next(iter(obstore.list(whole_bucket, prefix=name or None, chunk_size=1)), None)
        return _Connection(patient, brief)


_environment = threading.Lock()


@contextlib.contextmanager
def _without_empty(prefix: str) -> Iterator[None]:
    """Unset empty variables for the time being: obstore takes "" for an address."""
    with _environment:
        empty = [name for name, value in os.environ.items() if name.startswith(prefix) and not value]
        for name in empty:
            del os.environ[name]
        try:
            yield
        finally:
            os.environ.update(dict.fromkeys(empty, ""))


@contextlib.contextmanager
def in_one_line(address: str, name: str = "") -> Iterator[None]:
    """Turn obstore's errors, which quote the request, into an :class:`ObjectStoreError` of one line.

    A missing object is a FileNotFoundError of the address, and of the name where one is passed. Errors of
    conditional writes pass as they are.
    """
    from obstore import exceptions

    bucket = split_bucket(address)[1]
    try:
        yield
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
        raise
    except FileNotFoundError as error:
        if object_errors.is_missing_bucket(error):
            raise ObjectStoreError(f"{address}: {object_errors.explain_error(error, bucket)}") from None
        missing = join(address, name) if name else address
        raise FileNotFoundError(errno.ENOENT, "there is no such object", missing) from None
    except exceptions.BaseError as error:
        if not object_errors.is_refusal(error):
            _connect.cache_clear()  # the server is away: the next request is a first one again
        raise ObjectStoreError(f"{address}: {object_errors.explain_error(error, bucket)}") from None
    except BaseException as error:
        # A panic of Rust is no Exception, and its text may quote anything.
        if type(error).__name__ not in ("PanicException", "RustPanic"):
            raise
        variables = f"{PREFIXES[split_bucket(address)[0]]}…"
        raise ObjectStoreError(
            f"{address}: obstore broke off, as it does at invalid settings: look at the variables "
            f"{variables} in the environment"
        ) from None


# -- single objects ----------------------------------------------------------------------------------------


def read(folder: str, name: str) -> bytes | None:
    """Read the object ``name`` below an address; None where there is none."""
    return read_with_tag(folder, name)[0]


def read_with_tag(folder: str, name: str) -> tuple[bytes | None, dict[str, Any]]:
    """Read an object, None where there is none, and its version for :func:`write_if`."""
    import obstore

    try:
        with in_one_line(folder):
            response = obstore.get(connect(folder), name)
            return bytes(response.bytes()), _version(response.meta)
    except FileNotFoundError:
        return None, {}


def _version(meta: Any) -> dict[str, Any]:
    return {name: meta[name] for name in ("e_tag", "version") if meta.get(name) is not None}


def write(folder: str, name: str, content: bytes) -> None:
    """Write an object, whole or not at all."""
    import obstore

    with in_one_line(folder, name):
        obstore.put(connect(folder), name, content)


def write_if(folder: str, name: str, content: bytes, *, version: dict[str, Any] | None) -> dict[str, Any]:
    """Write an object that doesn't exist (``version`` None), or that still has this version.

    Returns
    -------
    dict
        The object's new version.

    Raises
    ------
    ChangedError
        When it exists already, or has another version.
    """
    import obstore

    mode: Any = "create" if version is None else version
    try:
        with in_one_line(folder):
            result = obstore.put(_connection(folder).brief, name, content, mode=mode)
    except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError, FileNotFoundError):
        raise ChangedError(join(folder, name)) from None
    return _version(result)


def delete(folder: str, name: str) -> None:
    """Delete an object; none there is no error."""
    import obstore

    with contextlib.suppress(FileNotFoundError), in_one_line(folder):
        obstore.delete(connect(folder), name)


def age_s(folder: str, name: str, probe: str) -> float:
    """Return the seconds since an object was written, by the store's clock, read by writing ``probe``."""
    import obstore

    store = connect(folder)
    with in_one_line(folder):
        obstore.put(store, probe, b"")
        try:
            probe_time, write_time = (obstore.head(store, path)["last_modified"] for path in (probe, name))
        finally:
            obstore.delete(store, probe)
    return float((probe_time - write_time).total_seconds())


def blocks(folder: str, name: str) -> Iterator[bytes]:
    """Yield the bytes of an object, some megabytes at a time."""
    import obstore

    with in_one_line(folder, name):
        for block in obstore.get(connect(folder), name).stream(min_chunk_size=BLOCK_BYTES):
            yield bytes(block)


# -- lists -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    """A listed object.

    Attributes
    ----------
    name : str
        Name below an address.
    size : int
        Bytes.
    time : float
        Seconds from 1970 to its writing.
    tag : str
        The store's own mark of the content (ETag), and its version; empty where it has none.
    """

    name: str
    size: int
    time: float
    tag: str = ""


def list_objects(folder: str) -> list[Listed]:
    """List all objects below an address, by name; without the empty ones that consoles make for folders."""
    import obstore

    with in_one_line(folder):
        entries = [_describe_object(meta) for page in obstore.list(connect(folder)) for meta in page]
    folders = {str(folder_path) for entry in entries for folder_path in PurePosixPath(entry.name).parents}
    return sorted(
        (
            entry
            for entry in entries
            if entry.size or (entry.name not in folders and _is_object(folder, entry.name))
        ),
        key=lambda entry: entry.name,
    )


def names(folder: str) -> Iterator[str]:
    """Yield the names of all objects below an address; without the empty ones that consoles make."""
    import obstore

    with in_one_line(folder):
        for page in obstore.list(connect(folder)):
            for meta in page:
                if meta["size"] or _is_object(folder, str(meta["path"])):
                    yield str(meta["path"])


async def names_directly_below(store: Any, prefix: str) -> list[str]:
    """List the names of objects and folders directly below a prefix, without the prefix itself."""
    import obstore

    listing = await obstore.list_with_delimiter_async(store, prefix=prefix)
    folder = prefix.strip("/")
    paths = [*listing["common_prefixes"], *(meta["path"] for meta in listing["objects"])]
    names = [path.removeprefix(f"{folder}/") if folder else path for path in paths if path != folder]
    return [name for name in names if name]


def look(address: str) -> Listed | None:
    """Look at the object at an address; None where there is none."""
    import obstore

    name = split_bucket(address)[2].rpartition("/")[2]
    try:
        with in_one_line(address):
            return _describe_object(obstore.head(connect(parent(address)), name))
    except FileNotFoundError:
        return None


def _is_object(folder: str, name: str) -> bool:
    """Tell whether an empty entry of a list is an object: a folder's ``sub/`` is listed as ``sub``."""
    import obstore

    try:
        with in_one_line(folder):
            return bool(name) and bool(obstore.head(connect(folder), name))
    except FileNotFoundError:
        return False


def _describe_object(meta: Any) -> Listed:
    tag = " ".join(str(meta[part]) for part in ("e_tag", "version") if meta.get(part))
    return Listed(str(meta["path"]), int(meta["size"]), meta["last_modified"].timestamp(), tag)
