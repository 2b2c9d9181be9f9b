"""Write the texts that provenance has for every metric and row: by the driver alone, every two seconds.

Workers write values, and send back what is recorded of them. A store of 10⁵ blocks thus has a few hundred
files of texts rather than a few for each block. After a kill, what workers computed since the last writing is
computed again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TypeAlias

from pipeline.stage.provenance import metric_places
from pipeline.storage import schema, store

Records: TypeAlias = Mapping[str, Mapping[int, Mapping[str, str]]]
"""By metric and row, the texts that are recorded of a matrix, by name."""

ROWS_PER_CHUNK = 512
"""Rows of a chunk of texts: it is written again at each flush until its last row is done."""

FLUSH_S = 2.0
"""Seconds between two writings; a run that is killed loses what was computed since the last."""


class RowRecords:
    """Records of the rows of a store's fields, while a run computes them; a context that writes the rest.

    Parameters
    ----------
    root : Group
    names : sequence of str
        Arrays of provenance, (metric, row), in the order in which they are written: the fingerprint last, as
        it says that all else is there.
    """

    def __init__(self, root: store.Group, names: Iterable[str]) -> None:
        self._root = root
        self._names = tuple(names)
        self._pending: dict[str, dict[str, dict[int, Mapping[str, str]]]] = {}
        self._flush_time = time.monotonic()

    def __enter__(self) -> RowRecords:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()

    def add(self, key: str, records: Records) -> None:
        """Take records of a field; write those of the last seconds when it is time.

        Parameters
        ----------
        key : str
            ``<dataset>/<field>``.
        records : mapping
        """
        pending = self._pending.setdefault(key, {})
        for metric, by_row in records.items():
            pending.setdefault(metric, {}).update(by_row)
        if time.monotonic() - self._flush_time > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write all records that wait."""
        for key, records in self._pending.items():
            self._write(key, records)
        self._pending.clear()
        self._flush_time = time.monotonic()

    def _write(self, key: str, records: Records) -> None:
        """Write records of a field, chunk by chunk and text by text; other texts stay."""
        group = store.get_group(self._root, key)
        provenance, places = store.get_group(group, schema.PROVENANCE), metric_places(group)
        arrays = {name: store.get_array(provenance, name) for name in self._names}
        length = next(iter(arrays.values())).chunks[1]
        rows = {row for by_row in records.values() for row in by_row}
        for start in sorted({row - row % length for row in rows}):
            part = {
                places[metric]: {
                    row - start: texts for row, texts in by_row.items() if 0 <= row - start < length
                }
                for metric, by_row in records.items()
            }
            for name, array in arrays.items():
                _write_chunk(array, name, start, part)


def _write_chunk(
    array: store.Array, name: str, start: int, records: Mapping[int, Mapping[int, Mapping[str, str]]]
) -> None:
    """Write a text of rows in the chunks that begin at ``start``, by place of the metric and row."""
    texts = store.read(array, (slice(None), slice(start, start + array.chunks[1])))
    for place, by_row in records.items():
        for row, recorded in by_row.items():
            texts[place, row] = recorded.get(name, texts[place, row])
    store.write_block(array, (0, start), texts)
