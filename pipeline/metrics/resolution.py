"""Effects of rounding on stored distances: how many it may have changed, and which sequences it dominates.

A metric bounds the rounding error of each distance (:meth:`lsim.Metric.rounding`). A store keeps a summary of
these bounds, a short text for each metric and sequence.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lsim.ranking import may_be_constant
from pipeline.storage import schema, store
from pipeline.storage.schema import Pairs

UNRESOLVED_FROM = 1e-3
"""Rounding error, relative to the distance, above which it is reported: the third digit, as in tables."""


@dataclass(frozen=True)
class Resolution:
    """Rounding errors of a metric's distances within a sequence.

    Attributes
    ----------
    rounding : float
        Largest bound on the error of a distance.
    distances : int
        Number of requested distances that are finite.
    unresolved : int
        Number of distances with an error that may exceed :data:`UNRESOLVED_FROM` of their value.
    constant : tuple of {"reference", "all"}
        Kinds of pairs whose distances cannot be distinguished from a constant, see
        :func:`lsim.ranking.may_be_constant`.
    precision : {"single", "double"}
        Precision in which frames were prepared.
    """

    rounding: float
    distances: int
    unresolved: int
    constant: tuple[Pairs, ...]
    precision: str = "single"


@dataclass(frozen=True)
class Unresolved:
    """A metric, and how many of its distances are below the resolution of its precision.

    Attributes
    ----------
    metric : str
    unresolved, distances : int
        Number of unresolved distances, and of all.
    precision : {"single", "double"}
        Precision in which frames were prepared.
    """

    metric: str
    unresolved: int
    distances: int
    precision: str

    def __add__(self, other: Unresolved) -> Unresolved:
        """Add the counts of the same metric in another group, and keep the lower precision."""
        return Unresolved(
            self.metric,
            self.unresolved + other.unresolved,
            self.distances + other.distances,
            max(self.precision, other.precision),
        )

    def __str__(self) -> str:
        verb = "is" if self.unresolved == 1 else "are"
        advice = "" if self.precision == "double" else "; ask for --precision double"
        return (
            f"{self.metric}: {self.unresolved} of {self.distances} distances {verb} below what "
            f"{self.precision} precision resolves (rounding above {UNRESOLVED_FROM:.1%}){advice}"
        )


def count_unresolved(distances: np.ndarray, rounding: np.ndarray) -> int:
    """Count the distances whose rounding error may exceed :data:`UNRESOLVED_FROM` of their value.

    Parameters
    ----------
    distances, rounding : ndarrays of equal shape, floating
        NaN is not counted. A distance of exactly 0 is resolved if its rounding error is 0, too.

    Examples
    --------
    >>> import numpy as np
    >>> count_unresolved(np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.0, 1e-9, 1e-9, 1e-2]))
    2
    """
    finite = np.isfinite(distances)
    return int((~(rounding[finite] <= UNRESOLVED_FROM * np.abs(distances[finite]))).sum())


def resolution_of(
    matrix: np.ndarray, rounding: np.ndarray, pairs: Pairs, precision: str = "single"
) -> Resolution:
    """Summarise the rounding errors of a sequence's distances.

    Parameters
    ----------
    matrix, rounding : ndarrays of shape (n, n), float64
        Distances, NaN where there are none, and bounds on their errors.
    pairs : {"all", "reference"}
        Pairs that were requested.
    precision : {"single", "double"}
        Precision in which frames were prepared.
    """
    upper_triangle = np.triu_indices(len(matrix), 1)
    kinds: dict[Pairs, tuple[np.ndarray, np.ndarray]] = {
        "reference": (matrix[0, 1:], rounding[0, 1:]),
        "all": (matrix[upper_triangle], rounding[upper_triangle]),
    }
    distances, bounds = kinds[pairs]
    # Of a directed matrix both directions count.
    if pairs == "all" and not np.array_equal(matrix, matrix.T, equal_nan=True):
        off_diagonal = ~np.eye(len(matrix), dtype=bool)
        distances, bounds = matrix[off_diagonal], rounding[off_diagonal]
    finite = np.isfinite(distances)
    constant = tuple(
        kind
        for kind, (values, errors) in kinds.items()
        if (kind == pairs or pairs == "all")
        and values.size
        and np.isfinite(values).all()
        and may_be_constant(values, errors)
    )
    largest = float(bounds[finite].max()) if finite.any() else 0.0
    return Resolution(largest, int(finite.sum()), count_unresolved(distances, bounds), constant, precision)


def to_text(resolution: Resolution) -> str:
    """Write a resolution as JSON for :func:`from_text`."""
    return json.dumps(asdict(resolution))


def from_text(text: str) -> Resolution | None:
    """Read a text of :func:`to_text`; None if it is another text, for example a damaged one."""
    try:
        recorded = json.loads(text)
        return Resolution(**recorded | {"constant": tuple(recorded["constant"])})
    except (ValueError, TypeError, KeyError):
        return None


def precision_of(specification: str) -> str:
    """Read the precision in which frames were prepared from a metric's specification (JSON)."""
    settings = json.loads(specification).get("preprocessing", {}) if specification else {}
    return str(settings.get("precision", "single"))


# ---------------------------------------------------------------- stores


def list_unresolved(root: store.Group) -> list[Unresolved]:
    """List the metrics of a store with unresolved distances, with their numbers over all groups."""
    totals: dict[str, Unresolved] = {}
    for key in store.field_keys(root, schema.PARAMETER):
        for counts in resolution_of_group(store.get_group(root, key)):
            total = totals.get(counts.metric)
            totals[counts.metric] = counts if total is None else total + counts
    return [total for total in totals.values() if total.unresolved]


def record_resolution(root: store.Group) -> None:
    """Record in each group's provenance how many of its distances are unresolved."""
    for key in store.field_keys(root, schema.PARAMETER):
        group = store.get_group(root, key)
        counts = {entry.metric: asdict(entry) for entry in resolution_of_group(group)}
        store.set_attributes(store.get_group(group, schema.PROVENANCE), {schema.RESOLUTION: counts})


def resolution_of_group(group: store.Group) -> list[Unresolved]:
    """Count each metric's distances and unresolved distances, from the group's provenance.

    Parameters
    ----------
    group : Group
        Group of a ``distances.zarr`` or a ``matrix.zarr``. Without such records the list is empty.
    """
    if schema.PROVENANCE not in group:
        return []
    provenance = store.get_group(group, schema.PROVENANCE)
    names, texts = (
        store.read(store.get_array(provenance, name)) for name in (schema.METRIC, schema.SPECIFICATION)
    )
    if schema.RESOLUTION in provenance:
        counts = _counts_of_sequences(provenance)
    elif schema.UNRESOLVED in provenance:
        counts = _counts_of_tiles(provenance, [is_directed(str(text)) for text in texts])
    else:
        return []
    return [
        Unresolved(str(name), *count, precision_of(str(text)))
        for name, text, count in zip(names, texts, counts, strict=True)
        if name
    ]


def _counts_of_sequences(provenance: store.Group) -> list[tuple[int, int]]:
    """Count each metric's unresolved distances, and all distances, over the sequences of a field."""
    counts = []
    for texts in store.read(store.get_array(provenance, schema.RESOLUTION)):
        resolutions = [entry for entry in map(from_text, map(str, texts)) if entry is not None]
        unresolved = sum(entry.unresolved for entry in resolutions)
        counts.append((unresolved, sum(entry.distances for entry in resolutions)))
    return counts


def is_directed(specification: str) -> bool:
    """Tell from a recorded specification whether a store has both directions of a metric's distances."""
    return bool(json.loads(specification or "{}").get(schema.DIRECTED))


def _counts_of_tiles(provenance: store.Group, directed: Sequence[bool]) -> list[tuple[int, int]]:
    """Count each metric's unresolved distances, and all distances, over the finished tiles of a matrix.

    Each pair counts once; for a ``directed`` metric, once in each direction.
    """
    arrays = [
        store.get_array(provenance, name)
        for name in (schema.FAILURE, schema.FINGERPRINT, schema.MISSING, schema.UNRESOLVED)
    ]
    tile, counts = arrays[0].chunks[1], []
    for place in range(arrays[0].shape[0]):
        failure, fingerprint, missing, unresolved = (store.read(array, place) for array in arrays)
        sizes = np.add.reduceat(failure == "", np.arange(0, len(failure), tile), dtype=np.int64)
        pairs = np.outer(sizes, sizes) * (1 + directed[place]) - missing
        # Tiles on the diagonal count missing distances on both of its sides.
        on_diagonal = sizes * (sizes - 1) - missing.diagonal()
        np.fill_diagonal(pairs, on_diagonal if directed[place] else on_diagonal // 2)
        finished = np.triu(fingerprint != "")
        counts.append((int(unresolved[finished].sum(dtype=np.int64)), int(pairs[finished].sum())))
    return counts
