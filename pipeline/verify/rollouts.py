"""Compare the rollouts of a ``rollouts.zarr`` with their digests."""

from __future__ import annotations

import numpy as np

from pipeline.rollouts.results import FieldResults, read_results
from pipeline.stage.provenance import has_specification
from pipeline.storage import schema, store
from pipeline.verify.damage import Damage, VerifyReport


def check_rollouts(root: store.Group, key: str, report: VerifyReport) -> list[Damage]:
    """Compare all rollouts of a field with their records.

    Parameters
    ----------
    root : Group
    key : str
        ``<dataset>/<field>``.
    report : VerifyReport
        Receives the numbers of rollouts that are compared, and unfinished.
    """
    try:
        results = read_results(root, key)
        described = has_specification(store.get_group(root, key))
    except (store.DamagedError, store.StoreError):
        return []  # the checks of chunks and documents report it
    damages = []
    for metric, column in results.texts.items():
        computed = column[schema.FINGERPRINT] != ""
        report.compared += int(computed.sum())
        if computed.any() and not described[metric]:
            array, reason = (
                f"{schema.PROVENANCE}/{schema.SPECIFICATION}",
                "it is not the one that was recorded",
            )
            damages.append(Damage(key, array, "", f"specification of {metric}", reason, (), metric))
        for place in np.ndindex(*computed.shape):
            model = results.axes.models[place[0]]
            if place[1] >= len(results.axes.members[model]):
                continue
            report.unfinished += int(not computed[place])
            recorded = computed[place] or column[schema.DIGEST][place]
            if recorded and not results.is_bound(metric, place):
                damages.append(_damage(results, metric, place))
    return damages


def _damage(results: FieldResults, metric: str, place: tuple[int, ...]) -> Damage:
    model, member, sequence = place
    name = results.axes.models[model]
    labels = (name, results.axes.members[name][member], results.axes.sequences[sequence])
    what = " ".join(part for part in labels if part)
    reason = "its distances and their record are not those that were written together"
    return Damage(results.key, metric, "", what, reason, (sequence,), metric)
