"""One run at a time brings a store up to date: who holds it, and how others see that.

A folder is locked by the system, which lets go of it however the process ends. An address is locked by an
object beside the store, ``<store>.lock``, made by a conditional write, so that of two runs one gets it. Its
owner renews it; a lock that nobody renewed for :data:`STALE_S`, by the clock of the object store, or whose
process on this machine has ended, is taken over. An owner that lost its lock, or could not renew it for as
long, is stopped, and :func:`check` refuses what it would still write.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.storage import objects
from pipeline.storage.address import is_address, join, parent, split_bucket

try:
    import fcntl
except ImportError:  # not on this platform: runs there have to keep out of each other's way themselves
    fcntl = None  # type: ignore[assignment]

RENEW_S = 60.0
STALE_S = 300.0
"""Several renewals: one that fails, or a machine that is slow for a while, loses no lock."""
LOOK_S = 5.0
"""How often an owner looks whether it is one; renewals themselves may wait for minutes."""
WAKE = getattr(signal, "SIGURG", None)
"""The signal that stops an owner. SIGINT is ignored in what a script starts with ``&``; this one ends nobody
who doesn't know it, not even processes that were started meanwhile."""


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


def check(address: str) -> None:
    """Before something is written to a store at an address: its lock, where this process took it, is held.

    Raises
    ------
    LockedError
        When this process has lost it: the store is another run's.
    """
    lock = _held.get(address)
    if lock is not None and lock.is_lost():
        raise LockedError(lock.lost_to())


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
    _held[address] = lock
    before = signal.signal(WAKE, _stop_owner) if WAKE is not None and lock.interrupts else None
    renewing = threading.Thread(target=lock.keep, name="lock", daemon=True)
    renewing.start()
    threading.Thread(target=lock.watch, name="lock watch", daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        if not lock.is_lost():
            raise
    finally:
        lock.ended.set()
        if WAKE is not None and lock.interrupts:
            signal.signal(WAKE, signal.SIG_DFL if before is None else before)
        if _held.get(address) is lock:
            del _held[address]
        if not lock.is_lost():  # a renewal that waits for an answer would have it wait, too
            renewing.join()
            lock.give_back()
    if lock.is_lost():
        raise LockedError(lock.lost_to())


def _stop_owner(number: int, frame: FrameType | None) -> None:
    """In the main thread, as Ctrl-C: unlike _thread.interrupt_main, a signal wakes what waits."""
    if any(lock.interrupts and not lock.ended.is_set() and lock.is_lost() for lock in _held.values()):
        raise KeyboardInterrupt


class _Lock:
    """The lock object of an address, and its owner's record in it."""

    def __init__(self, address: str, folder: str, name: str) -> None:
        self.address, self.folder, self.name = address, folder, name
        self.owner = {**_process(), "since": _now(), "id": uuid.uuid4().hex}
        self.version: dict[str, Any] | None = None
        self.ended = threading.Event()
        self.lost = False
        self.renewed = _clock()
        self.taken = False
        self.trouble = ""
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
        """Renew the lock until it is given back, or lost. In a thread."""
        while not self.ended.wait(min(RENEW_S, LOOK_S) if self.trouble else RENEW_S) and not self.lost:
            try:
                self._renew()
                self.trouble = ""
            except (OSError, objects.ChangedError) as error:
                # The next one tells whether the lock is still there; for how long it has been so counts.
                self.trouble = str(error)

    def watch(self) -> None:
        """Stop the run once the lock is lost, and again where that is caught on its way. In a thread."""
        while not self.ended.wait(min(RENEW_S, LOOK_S)):
            if self.is_lost() and WAKE is not None and self.interrupts:
                signal.pthread_kill(threading.main_thread().ident or 0, WAKE)

    def is_lost(self) -> bool:
        """Whether somebody else has the lock, or may have taken it, as it wasn't renewed for so long."""
        if not self.lost and not self.ended.is_set() and _clock() - self.renewed > STALE_S:
            self.lost = os.getpid() == self.owner["pid"]  # a fork's copy of it isn't renewed
        return self.lost

    def lost_to(self) -> str:
        """Why the run that held it ends."""
        if self.taken:
            return f"{self.address}: another run took it over while this one held it: run this again"
        return (
            f"{self.address}: its lock could not be renewed for {STALE_S / 60:.0f} minutes, so another run "
            f"may have taken it over: run this again{f' ({self.trouble})' if self.trouble else ''}"
        )

    def _renew(self) -> None:
        try:
            self._write(self.version)
        except objects.ChangedError:
            content, self.version = objects.read_with_tag(self.folder, self.name)
            if _read_owner(content).get("id") != self.owner["id"]:
                self.taken = self.lost = True
            else:  # written, but its answer was lost on the way
                self._write(self.version)

    def give_back(self) -> None:
        """Remove the lock where it is still ours; an unreachable store leaves it to become stale."""
        with contextlib.suppress(OSError):
            if _read_owner(objects.read(self.folder, self.name)).get("id") == self.owner["id"]:
                objects.delete(self.folder, self.name)

    def _write(self, version: dict[str, Any] | None) -> None:
        text, began = json.dumps(self.owner | {"renewed": _now()}), _clock()
        self.version = objects.write_if(self.folder, self.name, text.encode(), version=version)
        self.renewed = began  # others count from when it arrived, which is later

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


_held: dict[str, _Lock] = {}
"""The locks of this process, by address."""


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


def _clock() -> float:
    """Seconds that go on while the machine sleeps, where the system has such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
