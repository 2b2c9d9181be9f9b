"""Names, specifications and precision of metrics in the provenance of a group of results."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from lsim.claims import OthersCode
from lsim.error_bounds import PairPrecision
from lsim.metric import Metric
from lsim.preprocess import Scope
from pipeline.storage import digests, schema, store
from pipeline.storage.versions import versions

METRICS_PER_CHUNK = 64
"""Metrics whose names, and texts by row, make a chunk: one task writes those of all metrics at once."""


def metric_places(group: store.Group) -> dict[str, int]:
    """Index the metrics of a group as its provenance does."""
    names = store.read(store.get_array(store.get_group(group, schema.PROVENANCE), schema.METRIC))
    return {str(name): place for place, name in enumerate(names)}


def add_metrics(provenance: store.Group, names: Iterable[str], by_metric: Collection[str]) -> None:
    """Make room for metrics in a group's provenance, and write their names.

    Parameters
    ----------
    provenance : Group
    names : iterable of str
        Metrics to have; those already there keep their place.
    by_metric : collection of str
        Arrays whose first axis is the metric.
    """
    array = store.get_array(provenance, schema.METRIC)
    # A resize that was interrupted leaves a nameless entry.
    present = [str(name) for name in store.read(array) if name]
    names = list(dict.fromkeys([*present, *names]))
    for name in by_metric:
        store.resize_rows(store.get_array(provenance, name), len(names))
    store.write_rows(store.get_array(provenance, schema.METRIC), 0, np.array(names, dtype=object))


def specification_of(metric: Metric, scope: Scope, directed: bool, **settings: Any) -> dict[str, Any]:
    """Describe what distances of a metric are computed with.

    Parameters
    ----------
    metric : Metric
    scope : scope
    directed : bool
        Both directions of a pair are kept.
    **settings
        Other settings that the values depend on.
    """
    description = metric.specification() | {"scope": scope, "versions": versions()} | settings
    return description | {schema.DIRECTED: True} if directed else description


def record_specifications(group: store.Group, specifications: Mapping[str, Mapping[str, Any]]) -> None:
    """Record the specifications of the metrics that are about to be computed, sealed by their digest."""
    array = store.get_array(store.get_group(group, schema.PROVENANCE), schema.SPECIFICATION)
    recorded = store.read(array)
    texts = recorded.copy()
    for name, place in metric_places(group).items():
        if name in specifications:
            texts[place] = json.dumps(digests.sealed(specifications[name], group.path, name), sort_keys=True)
    if (texts != recorded).any():
        store.write_rows(array, 0, texts)


def has_specification(group: store.Group) -> dict[str, bool]:
    """Tell for each metric whether its specification is the one that was recorded for it in this group."""
    array = store.get_array(store.get_group(group, schema.PROVENANCE), schema.SPECIFICATION)
    texts = store.read(array)
    return {
        name: digests.is_sealed(json.loads(str(texts[place]) or "{}"), group.path, name)
        for name, place in metric_places(group).items()
    }


def take_precision(metrics: Iterable[Metric]) -> dict[str, PairPrecision]:
    """Take what metrics have recorded of the precision of their sums since the last call. Runs on a worker.

    Returns
    -------
    dict of str to PairPrecision
        By name, of metrics that record it. Where a custom metric's ``take_precision`` fails, its record
        promises nothing and says why: its distances are no worse for it.
    """
    records = {}
    for metric in metrics:
        take = getattr(metric, "take_precision", None)
        if take is None:
            continue
        try:
            with OthersCode(metric.name, "take_precision"):
                record = take()
            if record is not None:
                records[metric.name] = _as_pair_precision(record)
        except Exception as error:
            reason = f"not stated ({type(error).__name__}: {error})".replace(" + ", " and ")
            records[metric.name] = PairPrecision(reason, promise=1.0, bound=1.0, pairs=0)
    return records


def _as_pair_precision(record: Any) -> PairPrecision:
    """Copy a record, which may be of a class of the metric's own."""
    names = [entry.name for entry in fields(PairPrecision)]
    if missing := [name for name in names if not hasattr(record, name)]:
        raise TypeError(
            f"expected a record as lsim.error_bounds.PairPrecision is, found {record!r} without "
            f"{', '.join(missing)}"
        )
    return PairPrecision(**{name: getattr(record, name) for name in names})


def add_precision(total: dict[str, PairPrecision], precision: Mapping[str, PairPrecision]) -> None:
    """Add to a run's record of each metric's precision that of some blocks."""
    for metric, record in precision.items():
        total[metric] = total[metric] + record if metric in total else record


def record_precision(root: store.Group, precision: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Record in each group how its metrics kept their promise of precision in this run.

    Parameters
    ----------
    root : Group
    precision : mapping
        By key of the group and metric.
    """
    for key, by_metric in precision.items():
        if by_metric:
            provenance = store.get_group(root, f"{key}/{schema.PROVENANCE}")
            recorded: Any = provenance.attrs.get("precision", {})
            store.set_attributes(provenance, {"precision": recorded | dict(by_metric)})
