"""Locks of stores: one run at a time brings a store up to date.

A folder is locked by the operating system, which releases it however the process ends. An address is locked
by an object beside the store, ``<store>.lock``. A conditional write creates it, so that one of two runs gets
it. Its owner renews it. A lock is stale, and taken over, when nobody has renewed it for :data:`STALE_S` by
the clock of the object store, or when its owner was a process on this machine that has ended. When an owner
has lost its lock, or could not renew it for that long, :func:`check` refuses its writes, and
:func:`check_all` ends its run.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.storage import objects
from pipeline.storage.address import is_address, join, parent, split_bucket

try:
    import fcntl
except ImportError:  # not on this platform: users there must not start two runs on one store
    fcntl = None  # type: ignore[assignment]

RENEW_S = 60.0
STALE_S = 300.0
"""Several renewals, so that one that fails, or a machine that is slow for a while, loses no lock."""
RETRY_S = 5.0
"""Interval of renewals after one that failed."""


class LockedError(RuntimeError):
    """A store that another run is bringing up to date, or has taken over."""


@contextlib.contextmanager
def hold(location: str) -> Iterator[None]:
    """Hold the lock of the store at a location.

    Raises
    ------
    LockedError
        When another process holds it; at the end, when one has taken it over in the meantime.
    """
    with _address_lock(location) if is_address(location) else _folder_lock(location):
        yield


def check(address: str) -> None:
    """Check before a write to an address that this process hasn't lost its lock, if it took one.

    Raises
    ------
    LockedError
        When the lock is lost: the store is another run's.
    """
    lock = _locks.get(address)
    if lock is not None and lock.is_lost():
        raise LockedError(lock.reason_of_loss())


def check_all() -> None:
    """Check between two tasks that this process has lost none of its locks.

    Raises
    ------
    LockedError
    """
    for address in list(_locks):
        check(address)


@contextlib.contextmanager
def _folder_lock(path: str) -> Iterator[None]:
    """Lock a folder through the operating system; create it when absent."""
    Path(path).mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    # The folder itself is locked: a file in it would read as a stray member.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError(f"{path}: another run is writing to it; wait for that to end") from error
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _address_lock(address: str) -> Iterator[None]:
    """Lock an address, and renew the lock in a thread."""
    name = split_bucket(address)[2]
    if not name:
        raise LockedError(f"{address}: a store needs a name in its bucket, as in {address}/frames.zarr")
    # The object is beside the store: in it, it would read as a stray member.
    lock = _Lock(address, parent(address), f"{name.rpartition('/')[2]}.lock")
    lock.take()
    _locks[address] = lock
    renewal = threading.Thread(target=lock.renew_until_ended, name="lock", daemon=True)
    renewal.start()
    try:
        yield
    finally:
        lock.end_event.set()
        if _locks.get(address) is lock:
            del _locks[address]
        if not lock.is_lost():  # else a renewal may be waiting for an answer for minutes
            renewal.join()
            lock.release()
    if lock.is_lost():
        raise LockedError(lock.reason_of_loss())


class _Lock:
    """Lock object of an address, with its owner's record in it."""

    def __init__(self, address: str, folder: str, name: str) -> None:
        self.address, self.folder, self.name = address, folder, name
        self.owner = {**_process(), "since": _timestamp(), "id": uuid.uuid4().hex}
        self.version: dict[str, Any] | None = None
        self.end_event = threading.Event()
        self.lost = False
        self.renewed = _clock()
        self.is_taken = False
        self.trouble = ""

    def take(self) -> None:
        """Take the lock; raise :class:`LockedError` when another run holds it."""
        with contextlib.suppress(objects.ChangedError):
            self._write(None)
            return
        content, version = objects.read_with_tag(self.folder, self.name)
        owner = _read_owner(content)
        if owner.get("id") == self.owner["id"]:  # it was written, and the answer was lost
            self.version = version
            return
        if content is not None and not self._is_abandoned(owner):
            raise LockedError(self._describe_owner(owner))
        try:
            self._write(version if content is not None else None)
        except objects.ChangedError:
            raise LockedError(self._describe_owner(owner)) from None

    def renew_until_ended(self) -> None:
        """Renew the lock until it is released or lost; runs in a thread."""
        while not self.end_event.wait(min(RENEW_S, RETRY_S) if self.trouble else RENEW_S) and not self.lost:
            try:
                self._renew()
                self.trouble = ""
            except (OSError, objects.ChangedError) as error:
                # The next renewal shows whether the lock is still ours; meanwhile is_lost counts the time.
                self.trouble = str(error)

    def is_lost(self) -> bool:
        """Tell whether another run has the lock, or may have taken it since it became stale."""
        if not self.lost and not self.end_event.is_set() and _clock() - self.renewed > STALE_S:
            self.lost = os.getpid() == self.owner["pid"]  # a forked child renews no lock
        return self.lost

    def reason_of_loss(self) -> str:
        """Say why the run that held the lock ends."""
        if self.is_taken:
            return f"{self.address}: another run took it over while this one held it: run the command again"
        return (
            f"{self.address}: its lock could not be renewed for {STALE_S / 60:.0f} minutes, so another run "
            f"may have taken it over: run the command again{f' ({self.trouble})' if self.trouble else ''}"
        )

    def _renew(self) -> None:
        """Renew the lock; set ``lost`` where another run has taken it."""
        try:
            self._write(self.version)
        except objects.ChangedError:
            content, self.version = objects.read_with_tag(self.folder, self.name)
            if _read_owner(content).get("id") != self.owner["id"]:
                self.is_taken = self.lost = True
            else:  # it was written, and the answer was lost
                self._write(self.version)

    def release(self) -> None:
        """Delete the lock if it is still ours; in a store that can't be reached it becomes stale."""
        with contextlib.suppress(OSError):
            if _read_owner(objects.read(self.folder, self.name)).get("id") == self.owner["id"]:
                objects.delete(self.folder, self.name)

    def _write(self, version: dict[str, Any] | None) -> None:
        """Write the owner's record if the object still has this version; None: if there is no object."""
        text, write_time = json.dumps(self.owner | {"renewed": _timestamp()}), _clock()
        self.version = objects.write_if(self.folder, self.name, text.encode(), version=version)
        self.renewed = write_time  # other runs count from its arrival, which is later

    def _is_abandoned(self, owner: dict[str, Any]) -> bool:
        """Tell whether a lock's owner has ended, or hasn't renewed it for :data:`STALE_S`."""
        if owner.get("machine") == _process()["machine"] and isinstance(owner.get("pid"), int):
            try:
                os.kill(owner["pid"], 0)
            except ProcessLookupError:
                return True
            except PermissionError:
                pass
        try:
            return objects.age_s(self.folder, self.name, f"{self.name}.{self.owner['id']}") > STALE_S
        except FileNotFoundError:  # released just now
            return True

    def _describe_owner(self, owner: dict[str, Any]) -> str:
        process = (
            f"process {owner.get('pid', '?')} on {owner.get('host', '?')}, since {owner.get('since', '?')}"
        )
        return (
            f"{self.address}: another run is writing to it ({process}, renewed {owner.get('renewed', '?')}); "
            "wait for that to end. If it has ended without releasing its lock, the lock becomes stale "
            f"{STALE_S / 60:.0f} minutes after its last renewal; or delete {join(self.folder, self.name)}"
        )


_locks: dict[str, _Lock] = {}
"""The locks of this process, by address."""


def _read_owner(content: bytes | None) -> dict[str, Any]:
    """Parse an owner's record; empty where it is none of ours."""
    try:
        record = json.loads(content or b"{}")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _process() -> dict[str, Any]:
    """Identify this process by host, number, and marks of its machine and container."""
    marks: list[str] = []
    with contextlib.suppress(OSError):  # not on Linux
        marks.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        marks.append(os.readlink("/proc/self/ns/pid"))
    host = socket.gethostname()
    return {"host": host, "pid": os.getpid(), "machine": " ".join([host, *marks])}


def _clock() -> float:
    """Read a clock that goes on while the machine sleeps, where the system has one, in seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _timestamp() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
