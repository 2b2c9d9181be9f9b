"""Names, dimensions and dtypes of the stores, and checks of whether a store is valid.

All stores are Zarr format 3 hierarchies with one group per ``<dataset>/<field>``; every group reads
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
``weights``     y, x                               float64      weights of the pixels in means; absent where
                                                                the source has none
=============== ================================== ============ =========================================

All sequences of a field have the same weights: ``weights`` in each ``source`` is their hash. ``time`` in a
``source`` is the parameter of the first and of the last frame, before it was scaled to [0, 1].

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
computed from), ``failure`` (metric, sequence; why distances are missing, empty where none are),
``resolution`` (metric, sequence; JSON: ``rounding``, the largest bound on what rounding did to any of them,
``distances`` and ``unresolved``, how many there are and how many may be off by more than 0.1 %,
``constant``, the kinds of pairs, ``reference`` and ``all``, whose distances cannot be told from a constant)
and ``digest`` (metric, sequence; hash of the distances, bound to all that is recorded of them, see
:mod:`pipeline.storage.digests`; ``matrix.zarr`` has that of each tile; each specification has one of its
own, under ``digest``). The attribute ``resolution`` has these counts by metric. Where the scope was a data
set there is ``ranges`` (one JSON document), minimum and maximum of each sequence by the hash of its content,
or ``masked_ranges``, those of frames with a mask; ``matrix.zarr`` has them as well.
Its attribute ``precision`` says by metric how sums over pairs were computed in the last run that did: method,
promised relative error and its bound, pairs, how many were taken again, and on what device; for networks
it is that of sums over their features.
The diagonal is zero by convention, not evaluated: PSNR of a frame with itself would be infinite. A metric
that isn't symmetric, of a run that keeps directions, has the attribute ``directed``: [i, j] then is the
distance with frame i as the reference, and the diagonal is computed; its specification says ``directed``,
too.

``matrix.zarr``, one matrix over all frames of a group ``/<dataset>/<field>``, or of several groups together,
``/together/<name>``:

=============== ================================== ============ =========================================
variable        dims                               dtype        meaning
=============== ================================== ============ =========================================
one per metric  frame, frame_other                 float32      distances; symmetric, zero diagonal, NaN
                                                                where not compared; chunks are square tiles
``field``       frame                              str          ``<dataset>/<field>`` that the frame is of
``sequence``    frame                              str          its sequence
``number``      frame                              int32        its index within the sequence
``parameter``   frame                              float64      ground truth
=============== ================================== ============ =========================================

Frames stand in the order of their groups' keys, then of sequences, then of their numbers. The child group
``provenance`` has ``metric`` (metric), ``specification`` (metric, JSON), ``failure`` (metric, frame; why a
frame has no distances, empty where it has), ``content`` (tile; hash of the frames of a block) and
``fingerprint`` (metric, tile, tile_other; of the tiles on and above the diagonal, empty where they are out of
date; it is written after the tile and its mirror image), ``missing`` (metric, tile, tile_other; how many
distances of a tile are NaN although both frames can be compared) and ``unresolved`` (the same; how many
pairs of a tile have distances that rounding may have changed by more than 0.1 %). Attributes of a group:
``groups``, its fields; ``scope``; and of the root: ``frames``, where they are from; ``plan``, as it was
shown; ``runs``.

``embeddings.zarr``, the same groups: ``field``, ``sequence``, ``number``, ``parameter``, and a variable for
each part of a metric's embedding, (frame, …): ``features`` (frame, feature; float32) of the learned metrics.
The attribute ``euclidean`` is true where the metric is the Euclidean distance of its features. The child
group ``provenance`` has ``failure`` (frame; why it has no embedding), ``fingerprint`` and ``digest`` (block,
of whole sequences).

``rollouts.zarr``, the same groups: distances of models' rollouts to the trajectories of a reference, the
reference first:

=============== ================================== ============ =========================================
variable        dims                               dtype        meaning
=============== ================================== ============ =========================================
one per metric  model, member, sequence, frame     float64      distances; NaN where not compared
``model``       model                              str          names of the models
``member``      model, member                      str          names of its members: training runs,
                                                                samples; "" if it has one, or fewer
``sequence``    sequence                           str          trajectories of the reference
``time``        sequence, frame                    float64      times of the reference's frames
=============== ================================== ============ =========================================

and in ``provenance``: ``metric``, ``specification`` as in ``distances.zarr``; ``failure``, ``content``,
``digest`` and ``fingerprint`` (metric, model, member, sequence). Two child groups have the same form:
``ensemble``, scores of all members of a model together, under one member ""; ``spectra``, with ``energy``
(…, ``wavenumber``) at some frames, and the model ``reference``. The root's attribute ``unmatched`` lists what
could not be compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import numpy as np
import xarray as xr

from pipeline.storage.safe_names import sequence_fault, short_name

SCHEMA_VERSION = 1
"""Root attribute ``schema_version`` of both stores; the attribute ``kind`` tells them apart."""

FRAMES_STORE = "frames"
DISTANCES_STORE = "distances"
MATRIX_STORE = "matrix"
EMBEDDINGS_STORE = "embeddings"
ROLLOUTS_STORE = "rollouts"
TOGETHER = "together"
"""The group of matrices over several fields of an archive."""

MODEL = "model"
MEMBER = "member"
SEQUENCE = "sequence"
FRAME = "frame"
FRAME_OTHER = "frame_other"
METRIC = "metric"
FIELD = "field"
NUMBER = "number"
TILE = "tile"
TILE_OTHER = "tile_other"

FRAMES = "frames"
PARAMETER = "parameter"
CONTENT = "content"
SOURCE = "source"
WEIGHTS = "weights"
TIME = "time"
ENSEMBLE = "ensemble"
"""Group of a field of ``rollouts.zarr``: scores of all members of a model together."""
SPECTRA = "spectra"
"""Group of a field of ``rollouts.zarr``: energies by wavenumber of the reference and of rollouts."""
PARTS_OF_ROLLOUTS = (ENSEMBLE, SPECTRA)
WAVENUMBER = "wavenumber"
QUARANTINED = "quarantined"

PROVENANCE = "provenance"
FINGERPRINT = "fingerprint"
FAILURE = "failure"
SPECIFICATION = "specification"
MISSING = "missing"
RESOLUTION = "resolution"
UNRESOLVED = "unresolved"
DIGEST = "digest"
RANGES = "ranges"
MASKED_RANGES = "masked_ranges"
UNMATCHED = "unmatched"
"""Attribute of a ``rollouts.zarr``: what could not be compared, with the reasons."""
DIRECTED = "directed"
"""Attribute of an array of distances whose [i, j] and [j, i] may differ, and entry of its specification."""

FRAMES_DIMS = (SEQUENCE, FRAME, "y", "x", "channel")
PARAMETER_DIMS = (SEQUENCE, FRAME)
WEIGHTS_DIMS = ("y", "x")
DISTANCE_DIMS = (SEQUENCE, FRAME, FRAME_OTHER)
PROVENANCE_DIMS = (METRIC, SEQUENCE)
ROLLOUT_DIMS = (MODEL, MEMBER, SEQUENCE, FRAME)
ROLLOUT_PROVENANCE_DIMS = (METRIC, MODEL, MEMBER, SEQUENCE)
MATRIX_DIMS = (FRAME, FRAME_OTHER)
FINGERPRINT_DIMS = (METRIC, TILE, TILE_OTHER)

VALIDATED_TOGETHER = 1024
"""Rows of a matrix that are validated at once."""

FRAME_DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64")
"""Dtypes that ``frames`` may have: what image libraries and simulation codes write."""

CARRIED = frozenset({PARAMETER, SEQUENCE})
"""Variables of a ``distances.zarr`` group that are not metrics."""

CARRIED_BY_MATRIX = frozenset({FIELD, SEQUENCE, NUMBER, PARAMETER})
"""Variables of a ``matrix.zarr`` group that are not metrics."""

RESERVED = (
    CARRIED
    | CARRIED_BY_MATRIX
    | {FRAME, FRAME_OTHER, PROVENANCE, MODEL, MEMBER, TIME, WAVENUMBER}
    | {*PARTS_OF_ROLLOUTS}
)
"""Names that no metric can have in a store of results."""


Pairs: TypeAlias = Literal["all", "reference"]
"""Pairs of a sequence that have distances: all, or frame 0 with the others."""


class SchemaError(ValueError):
    """A store that doesn't follow the schema; the message names group, expected and found."""


def metric_names(variables: Iterable[str]) -> list[str]:
    """List the metrics among the variables of a ``distances.zarr`` group."""
    return sorted(str(name) for name in variables if str(name) not in CARRIED)


def matrix_metric_names(variables: Iterable[str]) -> list[str]:
    """List the metrics among the variables of a ``matrix.zarr`` group."""
    return sorted(str(name) for name in variables if str(name) not in CARRIED_BY_MATRIX)


def validate_parameter(parameter: np.ndarray, label: str) -> None:
    """Raise :class:`SchemaError` unless every row of ``parameter`` rises strictly within [0, 1].

    Parameters
    ----------
    parameter : ndarray of shape (sequence, frame), float64
    label : str
        Label for the error.
    """
    if not np.isfinite(parameter).all():
        raise SchemaError(f"{label}: parameter holds NaN or infinity; expected finite values in [0, 1]")
    if parameter.size and (parameter.min() < 0 or parameter.max() > 1):
        raise SchemaError(
            f"{label}: parameter spans [{parameter.min():g}, {parameter.max():g}]; expected within [0, 1]"
        )
    falling = np.flatnonzero((np.diff(parameter, axis=1) <= 0).any(axis=1))
    if falling.size:
        raise SchemaError(f"{label}: parameter of row {falling[0]} does not rise: {parameter[falling[0]]}")


def validate_frames(group: xr.Dataset, label: str) -> None:
    """Raise :class:`SchemaError` unless ``group`` is a valid field of ``frames.zarr``."""
    _expect_variable(group, FRAMES, FRAMES_DIMS, FRAME_DTYPES, label)
    _expect_variable(group, PARAMETER, PARAMETER_DIMS, ("float64",), label)
    for name in (SEQUENCE, CONTENT):
        _expect_variable(group, name, (SEQUENCE,), None, label)
    _expect_unique_sequences(group, label)
    validate_parameter(group[PARAMETER].values, label)
    if WEIGHTS in group.variables:
        _expect_variable(group, WEIGHTS, WEIGHTS_DIMS, ("float64",), label)


def validate_weights(weights: np.ndarray, shape: tuple[int, ...], label: str) -> None:
    """Raise :class:`SchemaError` unless these are valid weights of a field's pixels.

    Parameters
    ----------
    weights : ndarray of shape (y, x), float64
    shape : tuple of int
        (y, x) of the field's frames.
    label : str
        Label for the error.
    """
    if weights.shape != shape:
        raise SchemaError(f"{label}: {WEIGHTS} have shape {weights.shape}; expected {shape}, as frames have")
    if not (np.isfinite(weights) & (weights >= 0)).all() or not (weights > 0).any():
        raise SchemaError(f"{label}: {WEIGHTS} must be finite and 0 or more, with some above 0")


def validate_distances(group: xr.Dataset, label: str) -> None:
    """Raise :class:`SchemaError` unless ``group`` is a valid field of ``distances.zarr``.

    Names, dims and dtypes are checked, and that each matrix is symmetric with a zero diagonal, except
    directed ones.
    """
    _expect_variable(group, PARAMETER, PARAMETER_DIMS, ("float64",), label)
    _expect_unique_sequences(group, label)
    for name in metric_names(map(str, group.variables)):
        _expect_variable(group, name, DISTANCE_DIMS, ("float32", "float64"), label)
        if group[name].attrs.get(DIRECTED):
            continue
        matrices = group[name].values
        if not np.array_equal(matrices, matrices.swapaxes(1, 2), equal_nan=True):
            raise SchemaError(f"{label}: {name} is not symmetric")
        diagonal = np.diagonal(matrices, axis1=1, axis2=2)
        if np.any((diagonal != 0) & ~np.isnan(diagonal)):
            raise SchemaError(f"{label}: {name} has values other than 0 on the diagonal")


def validate_matrix(group: xr.Dataset, label: str) -> None:
    """Raise :class:`SchemaError` unless ``group`` is a valid group of ``matrix.zarr``.

    Names, dims and dtypes are checked, and that each matrix is symmetric with a zero diagonal, except
    directed ones. Two bands of a matrix are in memory at a time.
    """
    for name, dtypes in ((FIELD, None), (SEQUENCE, None), (NUMBER, ("int32",)), (PARAMETER, ("float64",))):
        _expect_variable(group, name, (FRAME,), dtypes, label)
    n = group.sizes[FRAME]
    for name in matrix_metric_names(map(str, group.variables)):
        _expect_variable(group, name, MATRIX_DIMS, ("float32",), label)
        if group.sizes[FRAME_OTHER] != n:
            raise SchemaError(f"{label}: {name} has shape {group[name].shape}; expected {(n, n)}")
        if group[name].attrs.get(DIRECTED):
            continue
        for start in range(0, n, VALIDATED_TOGETHER):
            part = slice(start, start + VALIDATED_TOGETHER)
            rows, columns = group[name][part].values, group[name][:, part].values
            if not np.array_equal(rows, columns.T, equal_nan=True):
                raise SchemaError(f"{label}: {name} is not symmetric, in rows from {start} on")
            diagonal = np.diagonal(rows, start)
            if np.any((diagonal != 0) & ~np.isnan(diagonal)):
                raise SchemaError(f"{label}: {name} has values other than 0 on the diagonal")


def _expect_variable(
    group: xr.Dataset, name: str, dims: tuple[str, ...], dtypes: tuple[str, ...] | None, label: str
) -> None:
    if name not in group.variables:
        raise SchemaError(f"{label}: no variable {name!r}; found {sorted(map(str, group.variables))}")
    variable: Any = group.variables[name]
    if variable.dims != dims:
        raise SchemaError(f"{label}: {name} has dims {variable.dims}; expected {dims}")
    if dtypes is not None and variable.dtype.name not in dtypes:
        raise SchemaError(f"{label}: {name} is {variable.dtype.name}; expected one of {', '.join(dtypes)}")


def _expect_unique_sequences(group: xr.Dataset, label: str) -> None:
    if SEQUENCE not in group.variables:
        raise SchemaError(f"{label}: no variable {SEQUENCE!r}; found {sorted(map(str, group.variables))}")
    names, counts = np.unique(group[SEQUENCE].values.astype(object), return_counts=True)
    for name in map(str, names):
        if fault := sequence_fault(name):
            raise SchemaError(f"{label}: sequence {short_name(name)!r}: {fault}")
    if (counts > 1).any():
        raise SchemaError(f"{label}: sequence {names[counts > 1][0]!r} stands twice")


RECORDED = "recorded"
"""Attribute of provenance: number of fingerprints of each metric when a run came to its end."""

ATTRIBUTES = frozenset(
    {
        *("kind", "schema_version", "catalog", "title", "datasets", "pools", "runs", "versions"),
        *("convert_seconds", "frames", "unavailable", "scope", "plan", "role", "licence", "citation"),
        *("units", "groups", "precision", "metric", "specification", "euclidean", "feature_distance"),
        *(QUARANTINED, RESOLUTION, RECORDED, DIRECTED, UNMATCHED),
    }
)
"""Attributes of stores, groups and arrays that the stages write. Others are users' own, and not checked."""
