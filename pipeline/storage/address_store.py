"""Open the storage that Zarr and xarray read: a folder, or an object store by its address."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from typing import Any

from zarr.storage import ObjectStore

from pipeline.storage import locks, objects
from pipeline.storage.address import absolute, is_address


class _AddressStore(ObjectStore[Any]):
    """Zarr's store of an address, which error messages call by the address.

    Reads and lists turn obstore's errors into one line. Writes check the lock first: a run that has lost its
    lock must not write into a store that another run has taken over.
    """

    def __init__(self, store: Any, *, read_only: bool = False, address: str = "") -> None:
        super().__init__(store, read_only=read_only)
        self._address = address

    def with_read_only(self, read_only: bool = False) -> _AddressStore:
        return type(self)(self.store, read_only=read_only, address=self._address)

    def __str__(self) -> str:
        return self._address

    async def get(self, *arguments: Any, **keywords: Any) -> Any:
        with objects.in_one_line(self._address):
            return await super().get(*arguments, **keywords)

    async def get_partial_values(self, *arguments: Any, **keywords: Any) -> Any:
        with objects.in_one_line(self._address):
            return await super().get_partial_values(*arguments, **keywords)

    async def exists(self, key: str) -> bool:
        with objects.in_one_line(self._address):
            return await super().exists(key)

    async def getsize(self, key: str) -> int:
        with objects.in_one_line(self._address):
            return await super().getsize(key)

    async def getsize_prefix(self, prefix: str) -> int:
        with objects.in_one_line(self._address):
            return await super().getsize_prefix(prefix)

    async def set(self, key: str, value: Any) -> None:
        locks.check(self._address)
        with objects.in_one_line(self._address):
            await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        locks.check(self._address)
        with objects.in_one_line(self._address):
            await super().set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        locks.check(self._address)
        with objects.in_one_line(self._address):
            await super().delete(key)

    async def delete_dir(self, prefix: str) -> None:
        with objects.in_one_line(self._address):
            await super().delete_dir(prefix)

    async def list(self) -> AsyncGenerator[str, None]:
        with objects.in_one_line(self._address):
            async for key in super().list():
                yield key

    async def list_prefix(self, prefix: str) -> AsyncGenerator[str, None]:
        with objects.in_one_line(self._address):
            async for key in super().list_prefix(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        with objects.in_one_line(self._address):
            names = await objects.names_directly_below(self.store, prefix)
        for name in names:
            yield name


def zarr_store(path: str | os.PathLike[str]) -> str | _AddressStore:
    """Return what Zarr and xarray open: an obstore-backed store for an address, or the path itself.

    Zarr makes a LocalStore of a path. fsspec isn't used for paths: it shows half-written chunks.
    """
    location = absolute(path)
    return _AddressStore(objects.connect(location), address=location) if is_address(location) else location
