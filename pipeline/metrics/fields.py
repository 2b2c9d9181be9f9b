"""Which fields of a ``frames.zarr`` a stage computes from, once they are known to be whole."""

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
    """Keys ``<dataset>/<field>`` of a store of frames, all of them or those chosen.

    Parameters
    ----------
    source : Group
        The store's root.
    path : path
        Where it is, for messages.
    groups : sequence of str, optional
        Keys, or patterns of them: ``Smoke/*``.

    Raises
    ------
    pipeline.storage.store.StoreError
        For a store of another kind, without such fields, or whose conversion was interrupted.
    pipeline.storage.store.DamagedError
        For one that has lost a group or an array: its distances must not go as well.
    pipeline.storage.schema.SchemaError
        For a field that is not as it should be.
    """
    if source.attrs.get("kind", schema.FRAMES_STORE) != schema.FRAMES_STORE:
        raise store.StoreError(f"{path}: expected a store of frames, found one of {source.attrs['kind']}")
    metadata.check_documents(source)
    keys = store.field_keys(source, schema.FRAMES)
    if not keys:
        raise store.StoreError(f"{path}: expected groups <dataset>/<field> with frames, found none")
    if groups is not None:
        keys = _chosen(keys, path, groups)
    for key in keys:
        if fault := next(filter(None, map(group_fault, key.split("/"))), ""):
            raise store.StoreError(f"{path}: a group called {fault}")
        content = store.read(store.get_array(store.get_group(source, key), schema.CONTENT)).tolist()
        if "" in content:
            raise store.StoreError(
                f"{path}: {content.count('')} of {len(content)} sequences of {key} are not there: their "
                "conversion was interrupted; run it again"
            )
        check_bound(store.get_group(source, key))
        small = (schema.PARAMETER, schema.SEQUENCE, schema.CONTENT)
        schema.validate_frames(store.load_dataset(path, key, small), f"{path}/{key}")
    return keys


def field_units(source: store.Group, keys: Sequence[str]) -> str:
    """Read the units of fields' values; empty where they aren't stated, or not the same for all."""
    attributes = [store.get_array(store.get_group(source, key), schema.FRAMES).attrs for key in keys]
    units = {str(known.get("units", "")) for known in attributes}
    return units.pop() if len(units) == 1 else ""


def drop_vanished(root: store.Group, variable: str, source: store.Group, besides: Sequence[str] = ()) -> None:
    """Delete the fields of a store of results that the frames no longer have.

    Only as consolidated metadata says: without it, while frames are converted, nothing is deleted.

    Parameters
    ----------
    root : Group
        Of the store of results.
    variable : str
        What every field there has.
    source : Group
        Of the ``frames.zarr``.
    besides : sequence of str
        Patterns of groups that are no field's, and stay.

    Raises
    ------
    pipeline.storage.store.StoreError
        See :func:`refuse_others_results`.
    """
    refuse_others_results(root, variable, source, besides)
    listed = metadata.listed_members(source)
    if listed is None:
        return
    for key in _of_fields(root, variable, besides):
        if f"{key}/{schema.FRAMES}" not in listed:
            store.delete(root, key)


def refuse_others_results(
    root: store.Group, variable: str, source: store.Group, besides: Sequence[str] = ()
) -> None:
    """Raise :class:`~pipeline.storage.store.StoreError` for results none of whose fields the frames have."""
    there, known = _of_fields(root, variable, besides), store.field_keys(source, schema.FRAMES)
    if there and not set(there) & set(known):
        raise store.StoreError(
            f"{root.store_path} holds results of {', '.join(there)}, and none of {', '.join(known)}: choose "
            "another path"
        )


def _of_fields(root: store.Group, variable: str, besides: Sequence[str]) -> list[str]:
    keys = store.field_keys(root, variable)
    return [key for key in keys if not any(fnmatch.fnmatchcase(key, pattern) for pattern in besides)]


def _chosen(keys: Sequence[str], path: str | os.PathLike[str], groups: Sequence[str]) -> list[str]:
    for pattern in groups:
        if not any(fnmatch.fnmatchcase(key, pattern) for key in keys):
            raise store.StoreError(f"{path}: no group {pattern!r}; there are {', '.join(keys)}")
    return [key for key in keys if any(fnmatch.fnmatchcase(key, pattern) for pattern in groups)]
