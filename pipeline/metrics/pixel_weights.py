"""Weights of pixels in runs: those of each field, and the metrics of a run weighted by them.

Tasks name a field's weights by its store and their hash. Workers read them from there, once for all fields
that have the same.
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
"""Weighted metrics that a worker holds: each has a copy of the weights."""


@dataclass(frozen=True)
class FieldWeights:
    """Weights of a field's pixels, as tasks name them: equal where the weights are.

    Attributes
    ----------
    frames, key : str
        The store and the field that have them.
    digest : str
        Their hash, see :func:`pipeline.storage.checked_frames.hash_weights`.
    """

    frames: str = field(compare=False)
    key: str = field(compare=False)
    digest: str


@dataclass(frozen=True)
class FieldMetrics:
    """The metrics of a run for one field; weighted, where ``weights`` says by what."""

    metrics: list[Metric]
    weights: FieldWeights | None = None


def metrics_by_field(
    chosen: ChosenMetrics, source: store.Group, frames: str, keys: Sequence[str], *, weighted: bool
) -> tuple[ChosenMetrics, dict[str, FieldMetrics]]:
    """Give each field the metrics of a run, weighted by the field's weights of pixels if they shall be.

    Parameters
    ----------
    chosen : ChosenMetrics
    source : Group
        Root of the ``frames.zarr``.
    frames : str
        Where workers find it.
    keys : sequence of str
        The fields, ``<dataset>/<field>``.
    weighted : bool

    Returns
    -------
    ChosenMetrics
        Without those of ``"all"`` that cannot take the weights of a field, which are unavailable then.
    dict of str to FieldMetrics

    Raises
    ------
    ValueError
        For fields without weights, and metrics asked for by name that cannot take those of a field.
    pipeline.storage.store.DamagedError
        For weights that are not those that were converted.
    """
    if not weighted:
        return chosen, {key: FieldMetrics(chosen.metrics) for key in keys}
    arrays = {key: read_weights(store.get_group(source, key)) for key in keys}
    if lacking := [key for key, weights in arrays.items() if weights is None]:
        raise ValueError(
            f"{frames}: {', '.join(lacking)} has no weights of pixels; expected the array {schema.WEIGHTS!r} "
            "in each field: name the source's variable in the catalog (options: weights) and convert again, "
            "or leave out --pixel-weights (pixel_weights in a workflow)"
        )
    found: dict[str, FieldMetrics] = {}
    by_digest: dict[str, list[Metric]] = {}
    refused: dict[str, str] = {}
    for key, weights in arrays.items():
        assert weights is not None
        digest = hash_weights(weights)
        if digest not in by_digest:
            by_digest[digest] = _weighted(chosen, weights, key, refused)
        found[key] = FieldMetrics(by_digest[digest], FieldWeights(frames, key, digest))
    kept = [metric for metric in chosen.metrics if metric.name not in refused]
    names = {metric.name for metric in kept}
    remaining = replace(
        chosen,
        metrics=kept,
        requests={name: request for name, request in chosen.requests.items() if name in names},
        unavailable=chosen.unavailable | refused,
    )
    return remaining, {
        key: replace(of_field, metrics=[metric for metric in of_field.metrics if metric.name in names])
        for key, of_field in found.items()
    }


def _weighted(chosen: ChosenMetrics, weights: np.ndarray, key: str, refused: dict[str, str]) -> list[Metric]:
    """Weight the metrics that take these weights; note why others don't, or raise it if asked for by name."""
    metrics = []
    for metric in chosen.metrics:
        try:
            metrics.append(metric.weighted(weights))
        except ValueError as error:
            if metric.name in chosen.needed:
                raise ValueError(f"{key}: {error}") from error
            refused[metric.name] = f"{key}: {error}"
    return metrics


def get_weighted(request: MetricRequest, weights: FieldWeights | None) -> Metric:
    """Give this process's instance of a metric, weighted by a field's weights where there are some.

    Raises
    ------
    pipeline.storage.store.DamagedError
        When the weights in the store are others.
    pipeline.workers.profiles.ClusterError, lsim.WeightsError
        See :func:`pipeline.workers.worker_metrics.get_metric`.
    """
    metric = get_metric(request)
    if weights is None:
        return metric
    with _lock:
        return _held(request, str(metric.device), weights)


_lock = threading.Lock()


@functools.lru_cache(HELD)
def _held(request: MetricRequest, device: str, weights: FieldWeights) -> Metric:
    group = store.get_group(store.open_store(weights.frames), weights.key)
    values = read_weights(group, weights.digest)
    assert values is not None  # their hash would be another
    return get_metric(request, device).weighted(values)


def weighted_otherwise(group: store.Group, origin: store.Group) -> list[str]:
    """List the metrics whose recorded weights of pixels are not those that the field has now.

    Parameters
    ----------
    group : Group
        A field of a store of results.
    origin : Group
        The field in ``frames.zarr``.
    """
    texts = [str(text) for text in _specifications(group)]
    recorded = [json.loads(text or "{}") for text in texts]
    if not any(WEIGHTS_OF_PIXELS in one for one in recorded):
        return []
    weights = read_weights(origin)
    today = None if weights is None else describe_weights(weights)
    return [
        str(one["metric"]) for one in recorded if WEIGHTS_OF_PIXELS in one and one[WEIGHTS_OF_PIXELS] != today
    ]


def _specifications(group: store.Group) -> list[str]:
    if f"{schema.PROVENANCE}/{schema.SPECIFICATION}" not in group:
        return []
    provenance = store.get_group(group, schema.PROVENANCE)
    texts: list[str] = store.read(store.get_array(provenance, schema.SPECIFICATION)).tolist()
    return texts
