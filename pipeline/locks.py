"""One run at a time brings a store up to date: who holds it, and how others see that.

A folder is locked by the system, which lets go of it however the process ends. An address is locked by an
object beside the store, ``<store>.lock``, made by a conditional write, so that of two runs one gets it. Its
owner renews it; a lock that nobody renewed for :data:`STALE_S`, by the clock of the object store, or whose
process on this machine has ended, is taken over.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import objects
from pipeline.address import is_address, join, parent, split_bucket

try:
    import fcntl
except ImportError:  # not on this platform: runs there have to keep out of each other's way themselves
    fcntl = None  # type: ignore[assignment]

RENEW_S = 60.0
STALE_S = 300.0
"""Several renewals: one that fails, or a machine that is slow for a while, loses no lock."""


class LockedError(RuntimeError):
    """A store that another run brings up to date, or has taken over."""


@contextlib.contextmanager
def hold(location: str) -> Iterator[None]:
    """Be the only process that brings the store at a location up to date.

    Raises
    ------
    LockedError
        When another process does so already; at the end, when one took the store over meanwhile.
    """
    with _address_lock(location) if is_address(location) else _folder_lock(location):
        yield


@contextlib.contextmanager
def _folder_lock(path: str) -> Iterator[None]:
    Path(path).mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    # On the folder itself: a file in it would read as a stray member.
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
    name = split_bucket(address)[2]
    if not name:
        raise LockedError(f"{address}: a store needs a name in its bucket, as in {address}/frames.zarr")
    # Beside the store: an object in it would read as a stray member.
    lock = _Lock(address, parent(address), f"{name.rpartition('/')[2]}.lock")
    lock.take()
    renewing = threading.Thread(target=lock.keep, name="lock", daemon=True)
    renewing.start()
    try:
        yield
    except KeyboardInterrupt:
        if not lock.lost:
            raise
    finally:
        lock.ended.set()
        renewing.join()
        lock.give_back()
    if lock.lost:
        raise LockedError(f"{address}: another run took it over while this one held it: run this again")


class _Lock:
    """The lock object of an address, and its owner's record in it."""

    def __init__(self, address: str, folder: str, name: str) -> None:
        self.address, self.folder, self.name = address, folder, name
        self.owner = {**_process(), "since": _now(), "id": uuid.uuid4().hex}
        self.version: dict[str, Any] | None = None
        self.ended = threading.Event()
        self.lost = False
        self.interrupts = threading.current_thread() is threading.main_thread()

    def take(self) -> None:
        """Make the lock ours; raise :class:`LockedError` when it is somebody's who is there."""
        with contextlib.suppress(objects.ChangedError):
            self._write(None)
            return
        content, version = objects.read_with_tag(self.folder, self.name)
        owner = _read_owner(content)
        if owner.get("id") == self.owner["id"]:  # written, but its answer was lost on the way
            self.version = version
            return
        if content is not None and not self._is_left(owner):
            raise LockedError(self._taken_by(owner))
        try:
            self._write(version if content is not None else None)
        except objects.ChangedError:
            raise LockedError(self._taken_by(owner)) from None

    def keep(self) -> None:
        """Renew the lock until it is given back, or lost: then stop the run. In a thread."""
        while not self.ended.wait(RENEW_S):
            # Whatever the network says, the next renewal tells whether the lock is still there.
            with contextlib.suppress(Exception):
                self._renew()
            if self.lost:
                if self.interrupts:
                    # As Ctrl-C: unlike _thread.interrupt_main, it wakes what waits.
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return

    def _renew(self) -> None:
        try:
            self._write(self.version)
        except objects.ChangedError:
            content, self.version = objects.read_with_tag(self.folder, self.name)
            self.lost = _read_owner(content).get("id") != self.owner["id"]

    def give_back(self) -> None:
        """Remove the lock where it is still ours; an unreachable store leaves it to become stale."""
        with contextlib.suppress(Exception):
            if _read_owner(objects.read(self.folder, self.name)).get("id") == self.owner["id"]:
                objects.delete(self.folder, self.name)

    def _write(self, version: dict[str, Any] | None) -> None:
        text = json.dumps(self.owner | {"renewed": _now()})
        self.version = objects.write_if(self.folder, self.name, text.encode(), version=version)

    def _is_left(self, owner: dict[str, Any]) -> bool:
        """Whether a lock's owner has ended, or hasn't renewed it for long."""
        here = _process()
        if owner.get("machine") == here["machine"] and isinstance(owner.get("pid"), int):
            try:
                os.kill(owner["pid"], 0)
            except ProcessLookupError:
                return True
            except PermissionError:
                pass
        try:
            return objects.age_s(self.folder, self.name, f"{self.name}.{self.owner['id']}") > STALE_S
        except FileNotFoundError:  # given back just now
            return True

    def _taken_by(self, owner: dict[str, Any]) -> str:
        known = (
            f"process {owner.get('pid', '?')} on {owner.get('host', '?')}, since {owner.get('since', '?')}"
        )
        return (
            f"{self.address}: another run is writing to it ({known}, renewed {owner.get('renewed', '?')}); "
            "wait for that to end. If it has ended without giving it back, its lock counts for nothing "
            f"{STALE_S / 60:.0f} minutes after it was renewed last; or delete {join(self.folder, self.name)}"
        )


def _read_owner(content: bytes | None) -> dict[str, Any]:
    """An owner's record; empty where it is no record of ours."""
    try:
        found = json.loads(content or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _process() -> dict[str, Any]:
    """Host and number of this process, and what tells machines of one name, and containers, apart."""
    marks: list[str] = []
    with contextlib.suppress(OSError):  # not on Linux
        marks.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        marks.append(os.readlink("/proc/self/ns/pid"))
    host = socket.gethostname()
    return {"host": host, "pid": os.getpid(), "machine": " ".join([host, *marks])}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
