"""Names, dimensions and dtypes of the two stores, and what makes a store valid.

Both stores are Zarr format 3 hierarchies with one group per ``<dataset>/<field>``; every group reads
as a dense :class:`xarray.Dataset` with plain :func:`xarray.open_datatree`.

``frames.zarr``, group ``/<dataset>/<field>``:

=============== ================================== ============ =========================================
variable        dims                               dtype        meaning
=============== ================================== ============ =========================================
``frames``      sequence, frame, y, x, channel     as in source the fields
``parameter``   sequence, frame                    float64      ground truth in [0, 1], rising
``sequence``    sequence                           str          name, stable between conversions
``content``     sequence                           str          hash of the decoded frames and parameter
``source``      sequence                           str          what the sequence was decoded from (JSON)
=============== ================================== ============ =========================================

The attribute ``quarantined`` of ``/<dataset>`` lists the sequences that could not be converted:
``[{"sequence": …, "field": …, "file": …, "reason": …}, …]``.

``distances.zarr``, the same groups:

=============== ================================== ============ =========================================
variable        dims                               dtype        meaning
=============== ================================== ============ =========================================
one per metric  sequence, frame, frame_other       float64      distances; symmetric, zero diagonal, NaN
                                                                where not compared
``parameter``   sequence, frame                    float64      carried along
``sequence``    sequence                           str          carried along
=============== ================================== ============ =========================================

and in the child group ``provenance``: ``metric`` (metric), ``specification`` (metric; JSON: all that
determines the metric's values, with scope, pairs and versions), ``fingerprint`` (metric, sequence; empty
where the distances are out of date), ``content`` (metric, sequence; hash of the frames that they were
computed from) and ``failure`` (metric, sequence; why distances are missing, empty where none are).
Its attribute ``precision`` says by metric how sums over pairs were computed in the last run that did: method,
promised relative error and its bound, pairs, how many were taken again, and on what device; for networks
it is that of sums over their features.
The diagonal is zero by convention, not evaluated: PSNR of a frame with itself would be infinite.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import numpy as np
import xarray as xr

SCHEMA_VERSION = 1
"""Root attribute ``schema_version`` of both stores; the attribute ``kind`` tells them apart."""

FRAMES_STORE = "frames"
DISTANCES_STORE = "distances"

SEQUENCE = "sequence"
FRAME = "frame"
FRAME_OTHER = "frame_other"
METRIC = "metric"

FRAMES = "frames"
PARAMETER = "parameter"
CONTENT = "content"
SOURCE = "source"
QUARANTINED = "quarantined"

PROVENANCE = "provenance"
FINGERPRINT = "fingerprint"
FAILURE = "failure"
SPECIFICATION = "specification"

FRAMES_DIMS = (SEQUENCE, FRAME, "y", "x", "channel")
PARAMETER_DIMS = (SEQUENCE, FRAME)
DISTANCE_DIMS = (SEQUENCE, FRAME, FRAME_OTHER)
PROVENANCE_DIMS = (METRIC, SEQUENCE)

FRAME_DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64")
"""Dtypes that ``frames`` may have: what image libraries and simulation codes write."""

CARRIED = frozenset({PARAMETER, SEQUENCE})
"""Variables of a ``distances.zarr`` group that are not metrics."""


RESERVED = CARRIED | {FRAME, FRAME_OTHER, PROVENANCE}
"""Names that no metric can have in a ``distances.zarr``."""


Pairs: TypeAlias = Literal["all", "reference"]
"""Which pairs of a sequence have distances: all, or frame 0 with the others."""


class SchemaError(ValueError):
    """A store that is not what its name says; the message names group, expected and found."""


def metric_names(variables: Iterable[str]) -> list[str]:
    """Names of the metrics among the variables of a ``distances.zarr`` group."""
    return sorted(str(name) for name in variables if str(name) not in CARRIED)


def validate_parameter(parameter: np.ndarray, where: str) -> None:
    """Raise :class:`SchemaError` unless every row of ``parameter`` rises strictly within [0, 1].

    Parameters
    ----------
    parameter : ndarray of shape (sequence, frame), float64
    where : str
        What to name in the error.
    """
    if not np.isfinite(parameter).all():
        raise SchemaError(f"{where}: parameter holds NaN or infinity; expected finite values in [0, 1]")
    if parameter.size and (parameter.min() < 0 or parameter.max() > 1):
        raise SchemaError(
            f"{where}: parameter spans [{parameter.min():g}, {parameter.max():g}]; expected within [0, 1]"
        )
    falling = np.flatnonzero((np.diff(parameter, axis=1) <= 0).any(axis=1))
    if falling.size:
        raise SchemaError(f"{where}: parameter of row {falling[0]} does not rise: {parameter[falling[0]]}")


def validate_frames(group: xr.Dataset, where: str) -> None:
    """Raise :class:`SchemaError` unless ``group`` is a valid field of ``frames.zarr``."""
    _expect_variable(group, FRAMES, FRAMES_DIMS, FRAME_DTYPES, where)
    _expect_variable(group, PARAMETER, PARAMETER_DIMS, ("float64",), where)
    for name in (SEQUENCE, CONTENT):
        _expect_variable(group, name, (SEQUENCE,), None, where)
    _expect_unique_sequences(group, where)
    validate_parameter(group[PARAMETER].values, where)


def validate_distances(group: xr.Dataset, where: str) -> None:
    """Raise :class:`SchemaError` unless ``group`` is a valid field of ``distances.zarr``.

    Checks names, dims and dtypes, and that each matrix is symmetric with a zero diagonal.
    """
    _expect_variable(group, PARAMETER, PARAMETER_DIMS, ("float64",), where)
    _expect_unique_sequences(group, where)
    for name in metric_names(map(str, group.variables)):
        _expect_variable(group, name, DISTANCE_DIMS, ("float32", "float64"), where)
        matrices = group[name].values
        if not np.array_equal(matrices, matrices.swapaxes(1, 2), equal_nan=True):
            raise SchemaError(f"{where}: {name} is not symmetric")
        diagonal = np.diagonal(matrices, axis1=1, axis2=2)
        if np.any((diagonal != 0) & ~np.isnan(diagonal)):
            raise SchemaError(f"{where}: {name} has values other than 0 on the diagonal")


def _expect_variable(
    group: xr.Dataset, name: str, dims: tuple[str, ...], dtypes: tuple[str, ...] | None, where: str
) -> None:
    if name not in group.variables:
        raise SchemaError(f"{where}: no variable {name!r}; found {sorted(map(str, group.variables))}")
    variable: Any = group.variables[name]
    if variable.dims != dims:
        raise SchemaError(f"{where}: {name} has dims {variable.dims}; expected {dims}")
    if dtypes is not None and variable.dtype.name not in dtypes:
        raise SchemaError(f"{where}: {name} is {variable.dtype.name}; expected one of {', '.join(dtypes)}")


def _expect_unique_sequences(group: xr.Dataset, where: str) -> None:
    if SEQUENCE not in group.variables:
        raise SchemaError(f"{where}: no variable {SEQUENCE!r}; found {sorted(map(str, group.variables))}")
    names, counts = np.unique(group[SEQUENCE].values.astype(object), return_counts=True)
    if (counts > 1).any():
        raise SchemaError(f"{where}: sequence {names[counts > 1][0]!r} stands twice")
