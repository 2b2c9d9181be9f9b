"""Pixel weights: read those of each field, and weight the metrics of a run by them.

A task names a field's weights by store, field and hash. A worker reads them from the store, once for all
fields with equal weights.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lsim.metric import WEIGHTS_OF_PIXELS, Metric, describe_weights
from pipeline.metrics.settings import ChosenMetrics
from pipeline.storage import schema, store
from pipeline.storage.checked_frames import hash_weights, read_weights
from pipeline.workers.worker_metrics import MetricRequest, get_metric

HELD = 64
"""Number of weighted metrics that a worker holds, each with a copy of the weights."""


@dataclass(frozen=True)
class FieldWeights:
    """Reference to a field's pixel weights, for tasks; two references are equal if the weights are.

    Attributes
    ----------
    frames, key : str
        Store and field of the weights.
    digest : str
        Hash of the weights, see :func:`pipeline.storage.checked_frames.hash_weights`.
    """

    frames: str = field(compare=False)
    key: str = field(compare=False)
    digest: str


@dataclass(frozen=True)
class FieldMetrics:
    """Metrics of a run for one field; weighted if ``weights`` is not None."""

    metrics: list[Metric]
    weights: FieldWeights | None = None


def metrics_by_field(
    selection: ChosenMetrics, source: store.Group, frames: str, keys: Sequence[str], *, weighted: bool
) -> tuple[ChosenMetrics, dict[str, FieldMetrics]]:
    """Prepare the metrics of a run for each field, weighted by the field's pixel weights on request.

    Parameters
    ----------
    selection : ChosenMetrics
    source : Group
        Root of the ``frames.zarr``.
    frames : str
        Path or address of the store for workers.
    keys : sequence of str
        The fields, ``<dataset>/<field>``.
    weighted : bool
        Weight the metrics.

    Returns
    -------
    ChosenMetrics
        A metric of ``"all"`` that cannot take the weights of a field has become unavailable.
    dict of str to FieldMetrics
        Metrics by field.

    Raises
    ------
    ValueError
        For fields without weights, and for metrics requested by name that cannot take a field's weights.
    pipeline.storage.store.DamagedError
        For weights that differ from those that were converted.
    """
    if not weighted:
        return selection, {key: FieldMetrics(selection.metrics) for key in keys}
    arrays = {key: read_weights(store.get_group(source, key)) for key in keys}
    if lacking := [key for key, weights in arrays.items() if weights is None]:
        raise ValueError(
            f"{frames}: {', '.join(lacking)} has no weights of pixels; expected the array {schema.WEIGHTS!r} "
            "in each field: name the source's variable in the catalog (options: weights) and convert again, "
            "or leave out --pixel-weights (pixel_weights in a workflow)"
        )
    fields: dict[str, FieldMetrics] = {}
    by_digest: dict[str, list[Metric]] = {}
    refusals: dict[str, str] = {}
    for key, weights in arrays.items():
        assert weights is not None
        digest = hash_weights(weights)
        if digest not in by_digest:
            by_digest[digest], reasons = _weighted(selection, weights, key)
            refusals |= reasons
        fields[key] = FieldMetrics(by_digest[digest], FieldWeights(frames, key, digest))
    # A run has the same metrics for all fields: one that a field refuses is left out of all.
    usable = [metric for metric in selection.metrics if metric.name not in refusals]
    names = {metric.name for metric in usable}
    remaining = replace(
        selection,
        metrics=usable,
        requests={name: request for name, request in selection.requests.items() if name in names},
        unavailable=selection.unavailable | refusals,
    )
    return remaining, {
        key: replace(field, metrics=[metric for metric in field.metrics if metric.name in names])
        for key, field in fields.items()
    }


def _weighted(selection: ChosenMetrics, weights: np.ndarray, key: str) -> tuple[list[Metric], dict[str, str]]:
    """Weight the metrics that take these weights, and explain by name why others don't."""
    metrics, refusals = [], {}
    for metric in selection.metrics:
        try:
            metrics.append(metric.weighted(weights))
        except ValueError as error:
            if metric.name in selection.required:
                raise ValueError(f"{key}: {error}") from error
            refusals[metric.name] = f"{key}: {error}"
    return metrics, refusals


def get_weighted(request: MetricRequest, weights: FieldWeights | None) -> Metric:
    """Get the process's instance of a metric, weighted by a field's weights if it has any.

    Raises
    ------
    pipeline.storage.store.DamagedError
        When the store has other weights than ``weights`` names.
    pipeline.workers.profiles.ClusterError, lsim.WeightsError
        See :func:`pipeline.workers.worker_metrics.get_metric`.
    """
    metric = get_metric(request)
    if weights is None:
        return metric
    with _lock:
        return _cached_metric(request, str(metric.device), weights)


_lock = threading.Lock()


@functools.lru_cache(HELD)
def _cached_metric(request: MetricRequest, device: str, weights: FieldWeights) -> Metric:
    group = store.get_group(store.open_store(weights.frames), weights.key)
    values = read_weights(group, weights.digest)
    assert values is not None  # read_weights has compared their hash
    return get_metric(request, device).weighted(values)


def weighted_otherwise(group: store.Group, origin: store.Group) -> list[str]:
    """List the metrics whose recorded pixel weights differ from those that the field has now.

    Parameters
    ----------
    group : Group
        A field of a store of results.
    origin : Group
        The field in ``frames.zarr``.
    """
    specifications = [json.loads(text or "{}") for text in _specifications(group)]
    weighted = [entry for entry in specifications if WEIGHTS_OF_PIXELS in entry]
    if not weighted:
        return []
    weights = read_weights(origin)
    current = None if weights is None else describe_weights(weights)
    return [str(entry["metric"]) for entry in weighted if entry[WEIGHTS_OF_PIXELS] != current]


def _specifications(group: store.Group) -> list[str]:
    """Read the recorded specifications (JSON) of a field's metrics."""
    if f"{schema.PROVENANCE}/{schema.SPECIFICATION}" not in group:
        return []
    provenance = store.get_group(group, schema.PROVENANCE)
    texts: list[str] = store.read(store.get_array(provenance, schema.SPECIFICATION)).tolist()
    return texts
