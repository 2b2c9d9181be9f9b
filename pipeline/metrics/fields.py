"""Fields of a ``frames.zarr``: choose them for a stage, and check that they are complete."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence

from pipeline.storage import metadata, schema, store
from pipeline.storage.checked_frames import check_bound
from pipeline.storage.safe_names import group_fault


def checked_fields(
    source: store.Group, path: str | os.PathLike[str], groups: Sequence[str] | None = None
) -> list[str]:
    """List the keys ``<dataset>/<field>`` of a store of frames, and check each field.

    Parameters
    ----------
    source : Group
        The store's root.
    path : path
        Location of the store, for messages.
    groups : sequence of str, optional
        Keys to list, or patterns of them: ``Smoke/*``. Default: all.

    Raises
    ------
    pipeline.storage.store.StoreError
        For a store of another kind, without such fields, or whose conversion was interrupted.
    pipeline.storage.store.DamagedError
        For a store that has lost a group or an array: its distances must not be deleted as well.
    pipeline.storage.schema.SchemaError
        For a field that breaks the schema.
    """
    if source.attrs.get("kind", schema.FRAMES_STORE) != schema.FRAMES_STORE:
        raise store.StoreError(f"{path}: expected a store of frames, found one of {source.attrs['kind']}")
    metadata.check_documents(source)
    keys = store.field_keys(source, schema.FRAMES)
    if not keys:
        raise store.StoreError(f"{path}: expected groups <dataset>/<field> with frames, found none")
    if groups is not None:
        keys = _matching(keys, path, groups)
    for key in keys:
        if fault := next(filter(None, map(group_fault, key.split("/"))), ""):
            raise store.StoreError(f"{path}: expected a safe name for a group, found one called {fault}")
        content = store.read(store.get_array(store.get_group(source, key), schema.CONTENT)).tolist()
        if "" in content:
            raise store.StoreError(
                f"{path}: {content.count('')} of {len(content)} sequences of {key} are missing: their "
                "conversion was interrupted; run it again"
            )
        check_bound(store.get_group(source, key))
        small = (schema.PARAMETER, schema.SEQUENCE, schema.CONTENT)
        schema.validate_frames(store.load_dataset(path, key, small), f"{path}/{key}")
    return keys


def field_units(source: store.Group, keys: Sequence[str]) -> str:
    """Read the units of fields' values; empty if they are missing or differ between fields."""
    arrays = [store.get_array(store.get_group(source, key), schema.FRAMES) for key in keys]
    units = {str(array.attrs.get("units", "")) for array in arrays}
    return units.pop() if len(units) == 1 else ""


def _matching(keys: Sequence[str], path: str | os.PathLike[str], groups: Sequence[str]) -> list[str]:
    for pattern in groups:
        if not any(fnmatch.fnmatchcase(key, pattern) for key in keys):
            raise store.StoreError(f"{path}: no group {pattern!r}; there are {', '.join(keys)}")
    return [key for key in keys if any(fnmatch.fnmatchcase(key, pattern) for pattern in groups)]
