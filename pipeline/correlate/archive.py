"""Read the distances, ground truth and pools that a ``distances.zarr`` holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xxhash

from pipeline.metrics.resolution import Resolution, from_text
from pipeline.storage import metadata, schema, store
from pipeline.storage.recorded import check_rows

ALL_FIELDS = "all"
"""Name that tables give to the pooled fields of a data set or pool."""


class CorrelationError(ValueError):
    """Distances that cannot be correlated as requested."""


@dataclass(frozen=True)
class Field:
    """One group of the store, with what is recorded of its distances.

    Attributes
    ----------
    dataset, field : str
    sequences : list of str
    parameter : ndarray of shape (sequence, frame)
    matrices : dict of str to ndarray of shape (sequence, frame, frame)
        Distances by metric. Damaged ones are NaN.
    problems : dict of str to list of str
        By metric, why each sequence's distances don't count; empty where they do.
    resolutions : dict of str to list of Resolution or None
        By metric, what rounding can have done to each sequence's distances. Empty for stores that don't
        record it.
    """

    dataset: str
    field: str
    sequences: list[str]
    parameter: np.ndarray
    matrices: dict[str, np.ndarray]
    problems: dict[str, list[str]]
    resolutions: dict[str, list[Resolution | None]]


@dataclass(frozen=True)
class Archive:
    """All fields of a store, in the order of the catalog.

    Attributes
    ----------
    fields : list of Field
    metrics : list of str
        Metrics with distances in any field, in the order in which they were requested.
    pools : dict of str to list of str
        Data sets of each pool.
    damaged : list of str
        Distances that differ from what was written, each with metric and sequence.
    """

    fields: list[Field]
    metrics: list[str]
    pools: dict[str, list[str]]
    damaged: list[str]

    @property
    def holds_all_pairs(self) -> bool:
        """True where a pair without the reference was compared, and where no such pair can exist."""
        blocks = [matrices[:, 1:, 1:] for field in self.fields for matrices in field.matrices.values()]
        off_diagonal = [values[:, ~np.eye(values.shape[1], dtype=bool)] for values in blocks]
        return all(values.size == 0 for values in off_diagonal) or any(
            np.isfinite(values).any() for values in off_diagonal
        )

    def fingerprint(self) -> str:
        """Hash everything that the figures depend on, values included."""
        digest = xxhash.xxh3_128()
        digest.update(json.dumps([self.metrics, self.pools]).encode())
        for field in self.fields:
            head = [field.dataset, field.field, field.sequences, field.problems, list(field.matrices)]
            digest.update(json.dumps([*head, field.resolutions], default=asdict).encode())
            for values in (field.parameter, *field.matrices.values()):
                digest.update(f"{values.dtype.str}{values.shape}".encode())
                digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Selection:
    """The fields that one block of table rows is computed from: a data set, one field of it, or a pool.

    Attributes
    ----------
    dataset, field : str
    members : list of int
        Positions in :attr:`Archive.fields`.
    """

    dataset: str
    field: str
    members: list[int]

    @property
    def compared(self) -> bool:
        """True where metrics are compared with one another: on data sets and pools, not on single fields."""
        return self.field == ALL_FIELDS

    @property
    def label(self) -> str:
        """Name in notes."""
        return self.dataset if self.compared else f"{self.dataset}/{self.field}"


def read_archive(path: str) -> Archive:
    """Read a ``distances.zarr`` and compare its values with their digests.

    Raises
    ------
    CorrelationError
        When the store holds no distances, or is of another kind.
    pipeline.storage.schema.SchemaError
        When a group does not follow the schema.
    """
    root = store.open_store(path)
    kind = root.attrs.get("kind", schema.DISTANCES_STORE)
    if kind != schema.DISTANCES_STORE:
        raise CorrelationError(f"{path}: expected a store of distances, found one of {kind}")
    metadata.check_documents(root)
    attributes = root.attrs.asdict()

    # The catalog's order of data sets; the sort is stable, so fields stay as they are in the store.
    keys = store.field_keys(root, schema.PARAMETER)
    order = [str(name) for name in _attribute(attributes, "datasets", list)]
    rank = {name: k for k, name in enumerate(order)}
    keys.sort(key=lambda key: rank.get(key.split("/")[0], len(rank)))
    if not keys:
        raise CorrelationError(f"{path}: no distances here; expected groups <dataset>/<field>")

    fields, damaged = [], []
    for key in keys:
        field, damage = _read_field(root, path, key)
        fields.append(field)
        damaged += damage

    # The order in which metrics were requested, where the store records it; then by name.
    requested = [metric for field in fields for metric in field.problems]
    stored = sorted({metric for field in fields for metric in field.matrices})
    metrics = [metric for metric in dict.fromkeys(requested + stored) if metric in stored]
    if not metrics:
        raise CorrelationError(f"{path}: no metric has distances; the groups are {', '.join(keys)}")
    pools = {str(k): [str(m) for m in v] for k, v in _attribute(attributes, "pools", dict).items()}
    return Archive(fields, metrics, pools, damaged)


def _read_field(root: store.Group, path: str, key: str) -> tuple[Field, list[str]]:
    """Read one group; return also the names of its damaged distances."""
    group = store.load_dataset(path, key)
    names = schema.metric_names(map(str, group.variables))
    check = check_rows(root, key, {name: group[name].values for name in names})
    for name, rows in check.damaged.items():
        if name in names:
            group[name].values[rows] = np.nan
    schema.validate_distances(group, f"{path}/{key}")

    dataset, name = key.split("/")
    sequences = [str(sequence) for sequence in group[schema.SEQUENCE].values]
    resolutions = {metric: list(map(from_text, texts)) for metric, texts in check.resolutions.items()}
    field = Field(
        dataset=dataset,
        field=name,
        sequences=sequences,
        parameter=group[schema.PARAMETER].values,
        matrices={metric: group[metric].values for metric in names},
        problems=_add_unrecorded(check.problems, resolutions),
        resolutions=resolutions,
    )
    return field, check.list_damaged(key, sequences)


def _add_unrecorded(
    problems: Mapping[str, Sequence[str]], resolutions: Mapping[str, Sequence[Resolution | None]]
) -> dict[str, list[str]]:
    """Add to the problems those of distances whose rounding is not recorded, though others' is."""
    remark = "what rounding did to it is not recorded; run distances again"
    return {
        metric: [
            reason or ("" if resolution is not None else remark)
            for reason, resolution in zip(reasons, resolutions[metric], strict=True)
        ]
        if metric in resolutions
        else list(reasons)
        for metric, reasons in problems.items()
    }


def _attribute(attributes: dict[str, Any], name: str, kind: type) -> Any:
    """Get an attribute of the root; empty where absent."""
    value = attributes.get(name) or kind()
    if not isinstance(value, kind):
        raise CorrelationError(f"root attribute {name!r} is {value!r}; expected a {kind.__name__}")
    return value


def select(archive: Archive) -> tuple[list[Selection], list[str]]:
    """List what tables have rows for: each data set with its fields, then pools.

    A data set with a single field has no rows for it. Order is that of the store.

    Returns
    -------
    selections : list of Selection
    notes : list of str
        Pools that lack members.
    """
    datasets = list(dict.fromkeys(field.dataset for field in archive.fields))
    selections, notes = [], []
    for dataset in datasets:
        members = [k for k, field in enumerate(archive.fields) if field.dataset == dataset]
        selections.append(Selection(dataset, ALL_FIELDS, members))
        if len(members) > 1:
            for k in members:
                if archive.fields[k].field == ALL_FIELDS:
                    raise CorrelationError(
                        f"{dataset}: one of several fields is called {ALL_FIELDS!r}, which is the name of "
                        "their pool; rename the field in the catalog"
                    )
                selections.append(Selection(dataset, archive.fields[k].field, [k]))
    for pool, names in archive.pools.items():
        if pool in datasets:
            raise CorrelationError(f"pool {pool!r} has the name of a data set; rename it in the catalog")
        members = [k for k, field in enumerate(archive.fields) if field.dataset in names]
        missing = [name for name in names if name not in datasets]
        if missing and members:
            present = [name for name in names if name in datasets]
            notes.append(f"{pool}: pools only {', '.join(present)}; no distances of {', '.join(missing)}")
        if members:
            selections.append(Selection(pool, ALL_FIELDS, members))
        else:
            notes.append(f"{pool}: left away, no distances of any member ({', '.join(names)})")
    return selections, notes
