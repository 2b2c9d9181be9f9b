"""Records of the runs that made a store of results: time, settings, versions, seconds."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from pipeline.storage import store
from pipeline.storage.versions import versions

CARRIED = ("catalog", "title", "datasets", "pools")
"""Attributes of the root of a ``frames.zarr`` that results repeat."""


def begin_run(**settings: Any) -> dict[str, Any]:
    """Begin the record of a run: its time, settings, and the versions that compute."""
    start_time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"started": start_time, **settings, "versions": versions()}


def record_run(root: store.Group, run: Mapping[str, Any] | None, **attributes: Any) -> None:
    """Add a run, unless it is None, to the records of a store, and set other attributes in the same write."""
    runs: list[Any] = list(root.attrs.get("runs", []))  # type: ignore[arg-type]
    store.set_attributes(root, {"runs": runs if run is None else [*runs, run], **attributes})


def carried(source: store.Group) -> dict[str, Any]:
    """Read the attributes that results repeat from the root of their ``frames.zarr``."""
    return {name: source.attrs[name] for name in CARRIED if name in source.attrs}
