"""Try each metric once a run in each process that computes with it, on the first frames that it gets.

A trial checks what single results don't show: whether the same frames give the same result again. (Checks of
every distance are in :mod:`lsim.claims`.) Each worker tries metrics by itself, also one that joins late. A
metric that fails its trial computes nothing in that run: each of its blocks has the breach as its reason.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from lsim.claims import ClaimError, other_random_numbers
from lsim.metric import Metric
from lsim.prepared import Prepared

MOST_OUTCOMES = 10_000
"""Most outcomes that a process remembers: it may serve runs for months."""

_outcomes: dict[tuple[str, str], str] = {}
"""Breach of a claim by run and specification; empty where there was none."""


def is_due(run: str, metric: Metric) -> bool:
    """Tell whether a metric has yet to be tried in this process in a run; never in a run without a name.

    Raises
    ------
    lsim.ClaimError
        When it failed its trial.
    """
    outcome = _outcomes.get((run, metric.specification_hash)) if run else ""
    if outcome:
        raise ClaimError(outcome)
    return outcome is None


@contextlib.contextmanager
def trial(run: str, metric: Metric) -> Iterator[Metric]:
    """Give a copy of a metric to try, which doesn't count its precision, and remember the outcome."""
    if len(_outcomes) > MOST_OUTCOMES:
        _outcomes.clear()
    key = (run, metric.specification_hash)
    try:
        yield copy.copy(metric)
    except ClaimError as error:
        _outcomes[key] = str(error)
        raise
    _outcomes.setdefault(key, "")


def as_array(part: Tensor) -> np.ndarray:
    """Convert a part of an embedding to NumPy, which has no bfloat16."""
    return (part.float() if part.dtype == torch.bfloat16 else part).detach().cpu().numpy()


def try_distances(
    run: str,
    metric: Metric,
    prepared: Prepared,
    distances: np.ndarray,
    recompute: Callable[[Metric], np.ndarray],
) -> None:
    """Try a metric on frames whose distances it has just computed.

    Parameters
    ----------
    run : str
        The run's name.
    metric : Metric
    prepared : Prepared
        The frames.
    distances : ndarray, float64
    recompute : callable
        Computes the distances anew by the metric that it is given.

    Raises
    ------
    lsim.ClaimError
        When it fails.
    """
    with trial(run, metric) as copy:
        with other_random_numbers():
            second = recompute(copy)
        copy.claims.check_repeated(distances, second, "distance", exact=metric.device.type == "cpu")
        copy.check_claims(prepared)
