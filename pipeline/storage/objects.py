"""Object stores through obstore: connect by address, and read and write single objects.

Credentials and endpoint are those of the environment (``AWS_…``, ``GOOGLE_…``) of the process that connects;
nothing here takes, keeps or prints any.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.storage.address import join, parent, split_bucket

if TYPE_CHECKING:
    from obstore.store import GCSStore, S3Store

EXTRAS = {"s3": "s3", "gs": "gcs"}
"""The extra of this package that a scheme needs."""
ENVIRONMENT = {"s3": "AWS_", "gs": "GOOGLE_"}
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
BLOCK_BYTES = 8 * 2**20
FIRST_RETRIES = 2
FIRST_PATIENCE_S = 10
"""How long a first contact is tried, and a conditional write: who holds a lock asks again anyway."""
PATIENCE_S = 180
"""How long later requests are: a long run shall outlive a restart of the server. One that was made in vain is
followed by a first contact, so that of a run only the first ones wait that long."""


class ObjectStoreError(OSError):
    """An object store that cannot be reached, or that refuses."""


class ChangedError(Exception):
    """An object that was to be there, or not to be there, or to be unchanged, is not so."""


class _Connection(NamedTuple):
    """The part of an object store below an address: for requests that may take a while, and that may not."""

    patient: S3Store | GCSStore
    brief: S3Store | GCSStore


def connect(address: str) -> S3Store | GCSStore:
    """The part of an object store below an address, once it is known to answer.

    Parameters
    ----------
    address : str
        As :func:`pipeline.storage.address.absolute` gives it.

    Raises
    ------
    ObjectStoreError
        When obstore isn't installed, the environment says what can't be, the store doesn't answer, the
        bucket isn't there, or access is denied.
    """
    return _connection(address).patient


def _connection(address: str) -> _Connection:
    prefix = ENVIRONMENT[split_bucket(address)[0]]
    # Of the environment as it is now: credentials may be renewed while a process lives. Empty is not set.
    with _environment:
        now = {name: value for name, value in os.environ.items() if name.startswith(prefix) and value}
    return _connect(address, tuple(sorted(now.items())))


@lru_cache(maxsize=64)
def _connect(address: str, environment: tuple[tuple[str, str], ...]) -> _Connection:
    scheme, bucket, name = split_bucket(address)
    try:
        import obstore
        from obstore import store
    except ImportError as error:
        raise ObjectStoreError(f"{address}: needs obstore: pip install 'lsim[{EXTRAS[scheme]}]'") from error
    if fault := _fault_of_environment(dict(environment)):
        raise ObjectStoreError(f"{address}: {fault}")
    opener = store.S3Store if scheme == "s3" else store.GCSStore
    first: Any = {"max_retries": FIRST_RETRIES, "retry_timeout": timedelta(seconds=FIRST_PATIENCE_S)}
    # By themselves ten retries are over in seconds: pauses are random ones, and rarely grow.
    backoff = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 3}
    later: Any = {"max_retries": 10_000, "retry_timeout": timedelta(seconds=PATIENCE_S), "backoff": backoff}
    with in_one_line(address):
        with _without_empty(ENVIRONMENT[scheme]):
            brief = opener(bucket, prefix=name or None, retry_config=first)
            found = _Connection(opener(bucket, prefix=name or None, retry_config=later), brief)
            whole = opener(bucket, retry_config=first)
        next(iter(obstore.list(whole, prefix=name or None, chunk_size=1)), None)
        return found


def _fault_of_environment(settings: Mapping[str, str]) -> str:
    """What is wrong with variables that obstore would panic at, or take for something else; "" if nothing.

    Of their values nothing is repeated: there may be a password in an address, and a key in any of them.
    """
    insecure = settings.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on", "y", "t")
    for name in ENDPOINTS:
        endpoint = settings.get(name)
        if endpoint is None:
            continue
        if not _is_endpoint(endpoint):
            return (
                f"{name} is no address of a server: expected http:// or https://, a host and, if need be, "
                "a port, as in https://127.0.0.1:9000; no user, no password, no '?' or '#'"
            )
        if endpoint.lower().startswith("http://") and not insecure:
            return f"the endpoint in {name} is not encrypted (http://); AWS_ALLOW_HTTP=true allows it"
    for name in CREDENTIALS:
        if not re.fullmatch("[!-~]*", settings.get(name, "")):
            return f"{name} holds a space, the end of a line or a letter that can't be in it"
    for name in REGIONS:
        if not re.fullmatch("[A-Za-z0-9._-]*", settings.get(name, "")):
            return f"{name} is no name of a region: expected one such as eu-central-1"
    return ""


def _is_endpoint(text: str) -> bool:
    """Whether this is ``http[s]://HOST[:PORT][/PATH]`` and no more."""
    host, path = r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", r"(?:/[!-~]*)?"
    found = re.fullmatch(rf"(?i:https?)://({host})(?::(\d{{1,5}}))?{path}", text)
    if found is None or re.search("[?#@]", text) or int(found[2] or 1) not in range(1, 2**16):
        return False
    with contextlib.suppress(ValueError):
        if found[1].startswith("["):
            ipaddress.IPv6Address(found[1].strip("[]"))
        return True
    return False


_environment = threading.Lock()


@contextlib.contextmanager
def _without_empty(prefix: str) -> Iterator[None]:
    """Empty variables aren't set, meanwhile: obstore takes "" for an address."""
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
    """Make obstore's errors an :class:`ObjectStoreError` that names the address; theirs quote the request.

    An object that isn't there is a FileNotFoundError, of the address, and of the name where one is given.
    """
    from obstore import exceptions

    try:
        yield
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
        raise  # answers, for whoever asked
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise ObjectStoreError(f"{address}: {_explained(error, split_bucket(address)[1])}") from None
        missing = join(address, name) if name else address
        raise FileNotFoundError(errno.ENOENT, "there is no such object", missing) from None
    except exceptions.BaseError as error:
        if "status code: 4" not in str(error):
            _connect.cache_clear()  # nobody was there: the next request is a first contact again
        raise ObjectStoreError(f"{address}: {_explained(error, split_bucket(address)[1])}") from None
    except BaseException as error:
        # Of Rust, and no Exception. Its text may quote anything.
        if type(error).__name__ not in ("PanicException", "RustPanic"):
            raise
        variables = f"{ENVIRONMENT[split_bucket(address)[0]]}…"
        raise ObjectStoreError(
            f"{address}: obstore broke off, which it does at settings that it can't use: look at the "
            f"variables {variables} in the environment"
        ) from None


def _explained(error: Exception, bucket: str) -> str:
    """What is wrong, in one line and in words that hold nothing of the request."""
    text = str(error)
    if "NoSuchBucket" in text:
        return f"there is no bucket {bucket!r}"
    if "169.254.169.254" in text or "metadata.google" in text:
        return (
            "no credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "GOOGLE_APPLICATION_CREDENTIALS), and this machine has none of its own"
        )
    # Of an answer its status and code alone: its text may hold a token, as that of one that has expired does.
    status = re.search(r"status code: (\d{3}[A-Za-z ]*)", text)
    code = re.search(rf"<Code>({_CODE})</Code>", text)
    said = ", ".join(found[1].strip() for found in (status, code) if found)
    more = f" ({said})" if said else ""
    if _is_elsewhere(text):
        region = re.search(rf"<Region>({_REGION})</Region>|expecting '({_REGION})'", text)
        name = f"={region[1] or region[2]}" if region else " to that one"
        return f"bucket {bucket!r} is in another region{more}: set AWS_REGION{name}"
    if any(denial in text for denial in ("403 Forbidden", "401 Unauthorized", "AccessDenied")):
        return f"access to bucket {bucket!r} is denied{more}: look at the credentials in the environment"
    if said:
        return f"the object store refuses: {said}"
    if "Generic Config error" in text or "builder error" in text:
        kind = re.search(r"as (boolean|Duration|\w*size)\b", text)
        what = f", where a {kind[1].lower()} is expected" if kind else ""
        value = re.search(r'"([^"]*)"', text)
        names = [
            name
            for name in sorted(os.environ)
            if value and os.environ[name] == value[1] and name.startswith(tuple(ENVIRONMENT.values()))
        ]
        return f"{' or '.join(names) or 'a variable AWS_… or GOOGLE_…'} has a value that can't be used{what}"
    # obstore goes on with a dump of its request; an endpoint may have a password in it.
    line = re.split(r"Debug source|\n|<", text)[0].strip()
    return f"the object store does not answer: {re.sub(r'//[^/@ ]*@', '//', line)[:300]}"


_CODE = r"(?=[A-Za-z]{2,40}<)(?:[A-Z]{1,4}[a-z]+){1,6}[A-Z]{0,4}"
"""A code such as NoSuchKey or InvalidURI, up to its end; what isn't one may be anything, a secret too."""
_REGION = r"[a-z]{2,4}(?:-[a-z]{2,12}){1,3}-\d{1,2}"


def _is_elsewhere(text: str) -> bool:
    """Whether an answer says that the bucket is in another region than that of the request."""
    if "redirect without LOCATION" in text or "<Code>PermanentRedirect</Code>" in text:
        return True
    return "<Code>AuthorizationHeaderMalformed</Code>" in text and re.search(r"[Rr]egion", text) is not None


def read(folder: str, name: str) -> bytes | None:
    """The bytes of the object ``name`` below an address; None where there is none."""
    return read_with_tag(folder, name)[0]


def read_with_tag(folder: str, name: str) -> tuple[bytes | None, dict[str, Any]]:
    """The bytes of an object, None where there is none, and which version of it they are."""
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
    """Write an object that isn't there (``version`` None), or that is still of this version.

    Returns
    -------
    dict
        The object's new version.

    Raises
    ------
    ChangedError
        When there is one already, or another.
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
    """Delete an object; nothing there is no error."""
    import obstore

    with contextlib.suppress(FileNotFoundError), in_one_line(folder):
        obstore.delete(connect(folder), name)


def age_s(folder: str, name: str, probe: str) -> float:
    """Seconds since an object was written, by the clock of the store; ``probe`` is written to read it."""
    import obstore

    store = connect(folder)
    with in_one_line(folder):
        obstore.put(store, probe, b"")
        try:
            now, then = (obstore.head(store, one)["last_modified"] for one in (probe, name))
        finally:
            obstore.delete(store, probe)
    return float((now - then).total_seconds())


@dataclass(frozen=True)
class Listed:
    """An object as it is listed: its name below an address, bytes, and seconds since 1970 of its writing.

    ``tag`` is the store's own of the object's content (ETag), and its version; empty where it has none.
    """

    name: str
    size: int
    time: float
    tag: str = ""


def listed(folder: str) -> list[Listed]:
    """All objects below an address, by name; without the empty ones that consoles make for folders."""
    import obstore

    with in_one_line(folder):
        found = [_listed(one) for page in obstore.list(connect(folder)) for one in page]
    folders = {str(above) for one in found for above in PurePosixPath(one.name).parents}
    return sorted(
        (one for one in found if one.size or (one.name not in folders and _is_object(folder, one.name))),
        key=lambda one: one.name,
    )


def _is_object(folder: str, name: str) -> bool:
    """Whether an empty entry of a list is an object; ``sub/``, made for a folder, is listed as ``sub``."""
    import obstore

    try:
        with in_one_line(folder):
            return bool(name) and bool(obstore.head(connect(folder), name))
    except FileNotFoundError:
        return False


def look(address: str) -> Listed | None:
    """The object at an address; None where there is none."""
    import obstore

    try:
        with in_one_line(address):
            return _listed(
                obstore.head(connect(parent(address)), split_bucket(address)[2].rpartition("/")[2])
            )
    except FileNotFoundError:
        return None


def _listed(meta: Any) -> Listed:
    tag = " ".join(str(meta[part]) for part in ("e_tag", "version") if meta.get(part))
    return Listed(str(meta["path"]), int(meta["size"]), meta["last_modified"].timestamp(), tag)


def blocks(folder: str, name: str) -> Iterator[bytes]:
    """The bytes of an object, some megabytes at a time."""
    import obstore

    with in_one_line(folder, name):
        for block in obstore.get(connect(folder), name).stream(min_chunk_size=BLOCK_BYTES):
            yield bytes(block)


def names(folder: str) -> Iterator[str]:
    """Names of all objects below an address; without the empty ones that consoles make for folders."""
    import obstore

    with in_one_line(folder):
        for page in obstore.list(connect(folder)):
            for found in page:
                if found["size"] or _is_object(folder, str(found["path"])):
                    yield str(found["path"])


async def names_directly_below(store: Any, prefix: str) -> list[str]:
    """Names of the objects and folders directly below a prefix; what stands for the folder isn't in it."""
    import obstore

    found = await obstore.list_with_delimiter_async(store, prefix=prefix)
    folder = prefix.strip("/")
    paths = [*found["common_prefixes"], *(one["path"] for one in found["objects"])]
    below = [path.removeprefix(f"{folder}/") if folder else path for path in paths if path != folder]
    return [name for name in below if name]
