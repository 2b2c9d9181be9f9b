"""Compare the blocks of an ``embeddings.zarr`` with their digests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import xxhash

from pipeline.storage import chunks, schema, store
from pipeline.storage.digests import HALF, binds, bytes_of, hash_labels, is_of_no_values
from pipeline.storage.recorded import LABELS, block_identity, block_texts
from pipeline.verify.damage import Check, Checks, Damage, VerifyReport, read_column


@dataclass(frozen=True)
class _Block:
    """Frames and record of a block.

    ``identity`` is None if the names of its frames are lost, which is reported by itself.
    """

    group: str
    number: int
    rows: slice
    identity: bytes | None
    fingerprint: str
    digest: str
    failures: list[str]

    @property
    def label(self) -> str:
        """Text that names the block and its frames."""
        return f"block {self.number}, frames {self.rows.start} to {self.rows.stop - 1}"

    def is_bound(self, parts: Mapping[str, store.Array]) -> bool:
        """Tell whether the block's digest matches its record."""
        texts = block_texts(self.fingerprint, parts, self.failures)
        return self.identity is None or binds(self.digest, self.identity, texts)


def add_embeddings(
    checks: Checks,
    name: str,
    attributes: Mapping[str, Any],
    arrays: Mapping[str, store.Array],
    report: VerifyReport,
) -> None:
    """Add a check for each block of a field; its records are read at once.

    Parameters
    ----------
    checks : Checks
    name : str
        Path of the group.
    attributes : mapping
        Attributes of the group.
    arrays : mapping of str to Array
        Arrays of the group, with those of ``provenance/``.
    report : VerifyReport
        Receives the number of chunks, and damage of the records.
    """
    prefix = f"{schema.PROVENANCE}/"
    damage_count = len(report.damages)
    labels = {column: read_column(name, arrays[column], report) for column in LABELS}
    records = {
        column.removeprefix(prefix): read_column(name, array, report, prefix)
        for column, array in arrays.items()
        if column.startswith(prefix)
    }
    fingerprints, failures = records[schema.FINGERPRINT], records[schema.FAILURE]
    # Stores of older versions have no digests, so nothing in them can be confirmed.
    records.setdefault(schema.DIGEST, np.full(fingerprints.shape, "", dtype=object))
    length = arrays[f"{prefix}{schema.FAILURE}"].chunks[0]
    if (fingerprints != "").any():
        report.damages += [
            Damage(name, column, key, "names of frames", "missing")
            for column in LABELS
            for key in chunks.missing_chunks(arrays[column])
        ]
    # The next run writes the names again, and compares them with the digests of all blocks.
    nameless = any(damage.array in LABELS for damage in report.damages[damage_count:])
    parts = {column: arrays[column] for column in sorted(arrays) if _is_part(column)}
    report.chunks += sum(map(chunks.chunk_count, parts.values()))
    report.compared += int((fingerprints != "").sum())
    report.unfinished += int((fingerprints == "").sum())
    metric = str(attributes.get("metric", ""))

    def blocks() -> Iterator[Check]:
        for number, fingerprint in enumerate(fingerprints):
            rows = slice(number * length, min((number + 1) * length, len(failures)))
            label_hash = hash_labels({column: values[rows] for column, values in labels.items()})
            identity = None if nameless else block_identity(name, metric, number, label_hash)
            digest, reasons = str(records[schema.DIGEST][number]), failures[rows].tolist()
            yield partial(
                _check, _Block(name, number, rows, identity, str(fingerprint), digest, reasons), parts
            )

    checks.add(len(fingerprints), blocks())


def _is_part(name: str) -> bool:
    return name not in LABELS and not name.startswith(f"{schema.PROVENANCE}/")


def _check(block: _Block, parts: Mapping[str, store.Array]) -> list[Damage]:
    """Read a block, chunk by chunk, and compare it with its digest."""
    number = (block.number,)
    hashes: dict[str, str] = {}
    damages: list[Damage] = []
    for name, array in parts.items():
        hasher = xxhash.xxh3_64()
        try:
            for first in range(block.rows.start, block.rows.stop, array.chunks[0]):
                rows = slice(first, min(first + array.chunks[0], block.rows.stop))
                hasher.update(bytes_of(store.read(array, rows)))
        except store.DamagedError:
            damages += [
                Damage(block.group, name, chunk.key, block.label, chunk.reason, number, unreadable=True)
                for chunk in chunks.damaged_chunks(array, block.rows)
            ]
        hashes[name] = hasher.hexdigest()
    if damages:
        return damages
    if not block.is_bound(parts) and (block.fingerprint or is_of_no_values(block.digest)):
        reason = "its record, with the names of its frames, is not the one that was written with it"
        return [Damage(block.group, _DIGEST, "", block.label, reason, number)]
    for place, (name, value) in enumerate(hashes.items(), start=1):
        if block.fingerprint and value != block.digest[place * HALF : (place + 1) * HALF]:
            missing = chunks.missing_chunks(parts[name], block.rows)
            reason = "missing" if missing else "its embeddings are not those that were computed"
            damages.append(Damage(block.group, name, ", ".join(missing), block.label, reason, number))
    return damages


_DIGEST = f"{schema.PROVENANCE}/{schema.DIGEST}"
