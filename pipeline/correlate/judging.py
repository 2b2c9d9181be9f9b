"""Decide which sequences a metric can be judged on, and give the reason for each that it cannot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.correlate import statistics
from pipeline.correlate.archive import Field
from pipeline.metrics.resolution import Resolution
from pipeline.storage.schema import Pairs

PAIRS_OF: dict[str, Pairs] = {"published": "reference", "all-pairs": "all"}
"""The kind of pairs that a protocol compares, as the distances stage calls it."""


@dataclass(frozen=True)
class JudgedField:
    """The sequences of a field under one protocol.

    Attributes
    ----------
    dataset : str
    units : list of str
        The simulation of each sequence: sequences of one simulation are resampled together.
    targets : ndarray of shape (sequence, pair)
        Ground truth.
    predictions : dict of str to ndarray of shape (sequence, pair)
        Scaled distances by metric; NaN where a sequence is not usable.
    coefficients : dict of str to dict of str to ndarray of shape (sequence,)
        Each sequence's own correlation, by metric and statistic.
    usable : dict of str to ndarray of shape (sequence,), bool
    left_out : list of dict
        Rows of the table of sequences that are left out.
    """

    dataset: str
    units: list[str]
    targets: np.ndarray
    predictions: dict[str, np.ndarray]
    coefficients: dict[str, dict[str, np.ndarray]]
    usable: dict[str, np.ndarray]
    left_out: list[dict[str, Any]]


def judge(field: Field, protocol: str, metrics: Iterable[str]) -> JudgedField:
    """Scale the distances of a field's usable sequences, and correlate each sequence by itself."""
    pairs = statistics.PAIRS[protocol](field.parameter.shape[1])
    targets = statistics.ground_truth(field.parameter, pairs)
    predictions, coefficients, usable, omissions = {}, {}, {}, []
    for metric in metrics:
        if metric in field.matrices:
            distances = statistics.select_pairs(field.matrices[metric], pairs)
        else:
            distances = np.full(targets.shape, np.nan)
        reasons = _reasons(field, metric, distances, protocol)
        omissions += [
            {"dataset": field.dataset, "field": field.field, "sequence": sequence}
            | {"metric": metric, "reason": reason}
            for sequence, reason in zip(field.sequences, reasons, strict=True)
            if reason
        ]
        is_usable = np.array([not reason for reason in reasons], dtype=bool)
        scaled = np.full(targets.shape, np.nan)
        if is_usable.any():
            scaled[is_usable] = statistics.scale(distances[is_usable])
        usable[metric], predictions[metric] = is_usable, scaled
        coefficients[metric] = {
            name: statistics.sequence_correlations(scaled, targets, name) for name in statistics.PER_SEQUENCE
        }
    return JudgedField(
        dataset=field.dataset,
        # `plume1.density` and `plume1.vel` are one simulation.
        units=[f"{field.dataset}/{name.removesuffix('.' + field.field)}" for name in field.sequences],
        targets=targets,
        predictions=predictions,
        coefficients=coefficients,
        usable=usable,
        left_out=omissions,
    )


def _reasons(field: Field, metric: str, distances: np.ndarray, protocol: str) -> list[str]:
    """Give the reason why each sequence is left out of a metric's figures; empty where it is not.

    A reason is what is wrong with the distances, then what is recorded of them.
    """
    count = len(field.sequences)
    if metric in field.matrices:
        pairs = statistics.PAIRS[protocol](field.parameter.shape[1])
        faults = statistics.reasons_to_leave_out(distances, pairs)
    else:
        faults = ["metric was not computed for this field"] * count
    resolutions = field.resolutions.get(metric, [None] * count)
    problems = field.problems.get(metric, [""] * count)
    reasons = []
    for row, fault, resolution, problem in zip(distances, faults, resolutions, problems, strict=True):
        cause = fault or _reason_of_rounding(row, resolution, protocol)
        reasons.append(": ".join(filter(None, (cause, problem))))
    return reasons


def _reason_of_rounding(distances: np.ndarray, resolution: Resolution | None, protocol: str) -> str:
    """Give the reason where a sequence's distances may be nothing but rounding; else an empty string."""
    if resolution is None or PAIRS_OF[protocol] not in resolution.constant:
        return ""
    largest, spread = float(np.abs(distances).max()), float(np.ptp(distances))
    size = (
        f"are at most {largest:.2g}" if largest <= resolution.rounding else f"differ by at most {spread:.2g}"
    )
    advice = "" if resolution.precision == "double" else "; --precision double resolves more"
    return (
        f"its {distances.size} distances {size}, and rounding alone makes up to {resolution.rounding:.2g}: a "
        f"constant has no correlation{advice}"
    )
