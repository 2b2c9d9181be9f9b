"""What rounding leaves of stored distances: how many it may have changed, which sequences are nothing else.

A metric bounds what rounding can have done to each distance (:meth:`lsim.Metric.rounding`). Stores keep of it
what their readers ask: a short text for each metric and sequence.
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
"""Share of a distance from which on its rounding is told to users: the third digit, as tables show it."""


@dataclass(frozen=True)
class Resolution:
    """What rounding can have done to the distances of a sequence under a metric.

    Attributes
    ----------
    rounding : float
        The largest bound on the error of any of them.
    distances : int
        How many there are that were asked for and are finite.
    unresolved : int
        How many may be off by more than :data:`UNRESOLVED_FROM` of themselves.
    constant : tuple of {"reference", "all"}
        The kinds of pairs whose distances cannot be told from a constant, see
        :func:`lsim.ranking.may_be_constant`.
    precision : {"single", "double"}
        That frames were prepared in.
    """

    rounding: float
    distances: int
    unresolved: int
    constant: tuple[Pairs, ...]
    precision: str = "single"


@dataclass(frozen=True)
class Unresolved:
    """A metric with distances that the arithmetic it was computed in doesn't resolve.

    Attributes
    ----------
    metric : str
    unresolved, distances : int
        How many of how many.
    precision : {"single", "double"}
        That frames were prepared in.
    """

    metric: str
    unresolved: int
    distances: int
    precision: str

    def __add__(self, other: Unresolved) -> Unresolved:
        """Add the distances of the same metric elsewhere; of two precisions, the lower is named."""
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
    """Count the distances whose rounding is more than a share of themselves; NaN is no distance.

    Parameters
    ----------
    distances, rounding : ndarrays of equal shape, floating
        A distance of exactly 0 is resolved where its rounding is 0, too.

    Examples
    --------
    >>> import numpy as np
    >>> count_unresolved(np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.0, 1e-9, 1e-9, 1e-2]))
    2
    """
    known = np.isfinite(distances)
    return int((~(rounding[known] <= UNRESOLVED_FROM * np.abs(distances[known]))).sum())


def resolution_of(
    matrix: np.ndarray, rounding: np.ndarray, pairs: Pairs, precision: str = "single"
) -> Resolution:
    """Sum up what rounding can have done to one sequence's distances.

    Parameters
    ----------
    matrix, rounding : ndarrays of shape (n, n), float64
        Distances, NaN where there are none, and bounds on the error of each.
    pairs : {"all", "reference"}
        Those that were asked for.
    precision : {"single", "double"}
        That frames were prepared in.
    """
    above = np.triu_indices(len(matrix), 1)
    kinds: dict[Pairs, tuple[np.ndarray, np.ndarray]] = {
        "reference": (matrix[0, 1:], rounding[0, 1:]),
        "all": (matrix[above], rounding[above]),
    }
    chosen, bounds = kinds[pairs]
    if pairs == "all" and not np.array_equal(matrix, matrix.T, equal_nan=True):
        off = ~np.eye(len(matrix), dtype=bool)
        chosen, bounds = matrix[off], rounding[off]
    known = np.isfinite(chosen)
    constant = tuple(
        kind
        for kind, (values, errors) in kinds.items()
        if (kind == pairs or pairs == "all")
        and values.size
        and np.isfinite(values).all()
        and may_be_constant(values, errors)
    )
    largest = float(bounds[known].max()) if known.any() else 0.0
    return Resolution(largest, int(known.sum()), count_unresolved(chosen, bounds), constant, precision)


def to_text(resolution: Resolution) -> str:
    """Write a resolution as JSON, to be read by :func:`from_text`."""
    return json.dumps(asdict(resolution))


def from_text(text: str) -> Resolution | None:
    """Read what :func:`to_text` wrote; None of any other text, as of one that damage has put there."""
    try:
        recorded = json.loads(text)
        return Resolution(**recorded | {"constant": tuple(recorded["constant"])})
    except (ValueError, TypeError, KeyError):
        return None


def precision_of(specification: str) -> str:
    """Read from a metric's specification (JSON) which precision its frames were prepared in."""
    settings = json.loads(specification).get("preprocessing", {}) if specification else {}
    return str(settings.get("precision", "single"))


# ---------------------------------------------------------------- in stores


def list_unresolved(root: store.Group) -> list[Unresolved]:
    """Sum up by metric what a store of distances records of those that rounding may have changed.

    Metrics without any are left away.
    """
    total: dict[str, Unresolved] = {}
    for key in store.field_keys(root, schema.PARAMETER):
        for one in resolution_of_group(store.get_group(root, key)):
            total[one.metric] = total[one.metric] + one if one.metric in total else one
    return [one for one in total.values() if one.unresolved]


def record_resolution(root: store.Group) -> None:
    """Say in each group's provenance how many of its distances rounding may have changed."""
    for key in store.field_keys(root, schema.PARAMETER):
        group = store.get_group(root, key)
        counts = {one.metric: asdict(one) for one in resolution_of_group(group)}
        store.set_attributes(store.get_group(group, schema.PROVENANCE), {schema.RESOLUTION: counts})


def resolution_of_group(group: store.Group) -> list[Unresolved]:
    """Count each metric's distances, and those that aren't resolved; none where the group doesn't say.

    Parameters
    ----------
    group : Group
        Of a ``distances.zarr`` or an ``matrix.zarr``.
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
    """Unresolved distances of each metric, and all, over the sequences of a field."""
    counts = []
    for texts in store.read(store.get_array(provenance, schema.RESOLUTION)):
        some = [resolution for text in texts if (resolution := from_text(str(text))) is not None]
        counts.append((sum(one.unresolved for one in some), sum(one.distances for one in some)))
    return counts


def is_directed(specification: str) -> bool:
    """Tell from a recorded specification whether both directions of a metric's distances are kept."""
    return bool(json.loads(specification or "{}").get(schema.DIRECTED))


def _counts_of_tiles(provenance: store.Group, directed: Sequence[bool]) -> list[tuple[int, int]]:
    """Unresolved distances of each metric, and all, over the tiles of a matrix that are done.

    Pairs count once, and those of a ``directed`` metric once in each direction.
    """
    arrays = [
        store.get_array(provenance, name)
        for name in (schema.FAILURE, schema.FINGERPRINT, schema.MISSING, schema.UNRESOLVED)
    ]
    tile, counts = arrays[0].chunks[1], []
    for place in range(arrays[0].shape[0]):
        failure, fingerprint, missing, unresolved = (store.read(array, place) for array in arrays)
        sizes = np.add.reduceat(failure == "", np.arange(0, len(failure), tile), dtype=np.int64)
        # What is missing of a tile of a block with itself is counted on both sides of the diagonal.
        pairs = np.outer(sizes, sizes) * (1 + directed[place]) - missing
        of_itself = sizes * (sizes - 1) - missing.diagonal()
        np.fill_diagonal(pairs, of_itself if directed[place] else of_itself // 2)
        done = np.triu(fingerprint != "")
        counts.append((int(unresolved[done].sum(dtype=np.int64)), int(pairs[done].sum())))
    return counts
