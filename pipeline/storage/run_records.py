"""What a store of results says of the runs that made it: when, with what settings and versions, how long."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from pipeline.storage import store
from pipeline.storage.versions import versions

CARRIED = ("catalog", "title", "datasets", "pools")
"""Attributes of the root of a ``frames.zarr``."""


def begin_run(**settings: Any) -> dict[str, Any]:
    """The record of a run that begins now: its time, settings, and the versions that compute."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"started": started, **settings, "versions": versions()}


def record_run(root: store.Group, run: Mapping[str, Any] | None, **attributes: Any) -> None:
    """Add a run, unless it is None, to the records of a store, and set other attributes in the same write."""
    runs: list[Any] = list(root.attrs.get("runs", []))  # type: ignore[arg-type]
    store.set_attributes(root, {"runs": runs if run is None else [*runs, run], **attributes})


def carried(source: store.Group) -> dict[str, Any]:
    """What results say of the archive that they are of, as its ``frames.zarr`` does."""
    return {name: source.attrs[name] for name in CARRIED if name in source.attrs}
