"""A store of results while a run brings it up to date: locked, and recorded at the end however it ends."""

from __future__ import annotations

import contextlib
import fnmatch
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.stage.run import MetricWorkers
from pipeline.storage import metadata, schema, store
from pipeline.storage.recorded import record_fingerprints
from pipeline.storage.run_records import begin_run, record_run


@dataclass
class Results:
    """A store of results that a run brings up to date.

    Attributes
    ----------
    path : str
    root : Group
    run : str
        Name of the run, in which each worker tries each metric once.
    """

    path: str
    root: store.Group
    run: str = field(default_factory=lambda: uuid.uuid4().hex)

    @contextlib.contextmanager
    def recorded(
        self,
        start: float,
        settings: Mapping[str, Any],
        summarise: Callable[[store.Group], Mapping[str, Any]],
        workers: MetricWorkers,
        attributes: Mapping[str, Any],
    ) -> Iterator[None]:
        """Record what is computed in this context when it ends, also where the run is interrupted.

        Whoever enters has laid out the store: its metadata is consolidated in the end.

        Parameters
        ----------
        start : float
            When the run began, by :func:`time.perf_counter`.
        settings : mapping
            Settings of the run.
        summarise : callable
            Called at the end with the root of the store. It writes a summary into the groups and returns
            what the run did; nothing where no block was computed, and then no run is recorded.
        workers : MetricWorkers
        attributes : mapping
            Other attributes of the root.
        """
        run = begin_run(**settings)
        try:
            yield
        finally:
            summary = dict(summarise(self.root))
            if summary:
                summary = run | summary | {"seconds": round(time.perf_counter() - start, 3)}
            record_fingerprints(self.root)
            record_run(self.root, summary | workers.description if summary else None, **attributes)
            store.consolidate(self.path)


@contextlib.contextmanager
def open_results(
    path: str,
    kind: str,
    variable: str,
    source: store.Group,
    *,
    other_groups: Sequence[str] = (),
    check: Callable[[store.Group], None] = lambda root: None,
) -> Iterator[Results]:
    """Lock a store of results, created when absent, and delete results of fields that are gone.

    Parameters
    ----------
    path : str
    kind : str
        Kind of the store, see :mod:`pipeline.storage.schema`.
    variable : str
        Array that every field of the store has.
    source : Group
        Root of the ``frames.zarr``.
    other_groups : sequence of str
        Patterns of groups that are no field's, and stay.
    check : callable
        Called with the root before anything is changed; it raises for a store that must stay as it is.

    Raises
    ------
    pipeline.storage.locks.LockedError
        When another run brings the store up to date.
    pipeline.storage.store.StoreError
        For a store of another kind, or of other frames.
    """
    with store.locked(path):
        root = store.open_output(path, kind)
        check(root)
        refuse_others_results(root, variable, source, other_groups)
        store.drop_consolidated(path)
        _drop_vanished(root, variable, source, other_groups)
        yield Results(path, root)


def refuse_others_results(
    root: store.Group, variable: str, source: store.Group, other_groups: Sequence[str] = ()
) -> None:
    """Refuse a store of results none of whose fields the frames have.

    Parameters
    ----------
    root, variable, source, besides
        See :func:`open_results`.

    Raises
    ------
    pipeline.storage.store.StoreError
    """
    keys, source_keys = _keys_of_fields(root, variable, other_groups), store.field_keys(source, schema.FRAMES)
    if keys and not set(keys) & set(source_keys):
        raise store.StoreError(
            f"{root.store_path} holds results of {', '.join(keys)}, and none of {', '.join(source_keys)}: "
            "choose another path"
        )


def _drop_vanished(
    root: store.Group, variable: str, source: store.Group, other_groups: Sequence[str]
) -> None:
    """Delete results of fields that the frames no longer have.

    Only consolidated metadata counts: while frames are converted there is none, and nothing is deleted.
    """
    members = metadata.listed_members(source)
    if members is None:
        return
    for key in _keys_of_fields(root, variable, other_groups):
        if f"{key}/{schema.FRAMES}" not in members:
            store.delete(root, key)


def _keys_of_fields(root: store.Group, variable: str, other_groups: Sequence[str]) -> list[str]:
    keys = store.field_keys(root, variable)
    return [key for key in keys if not any(fnmatch.fnmatchcase(key, pattern) for pattern in other_groups)]
