"""Metrics are tried once a run by each process that computes with them, on the first frames that it gets.

What is checked of every distance is no matter of this module (:mod:`lsim.claims`). A trial asks what single
results don't show: whether the same frames give the same again. Each worker finds that out by itself, so it
holds however many there are, whoever joins late or computes what. A metric that fails its trial gives nothing
in that run: each of its blocks has the breach as its reason.
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
"""Outcomes that a process remembers: it may serve runs for months."""

_outcomes: dict[tuple[str, str], str] = {}
"""By run and specification, what was breached; empty where nothing was."""


def is_due(run: str, metric: Metric) -> bool:
    """Tell whether a metric has yet to be tried here in a run; none is in a run without a name.

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
    """Give a copy of a metric to try, which takes no note of its precision, and remember what comes out."""
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
    """A part of an embedding for NumPy, which knows no bfloat16."""
    return (part.float() if part.dtype == torch.bfloat16 else part).detach().cpu().numpy()


def try_distances(
    run: str,
    metric: Metric,
    prepared: Prepared,
    distances: np.ndarray,
    again: Callable[[Metric], np.ndarray],
) -> None:
    """Try a metric on frames whose distances it has just given.

    Parameters
    ----------
    run : str
        The run's name.
    metric : Metric
    prepared : Prepared
        The frames.
    distances : ndarray, float64
    again : callable
        Computes them anew by the metric that it is given.

    Raises
    ------
    lsim.ClaimError
        When it fails.
    """
    with trial(run, metric) as tried:
        with other_random_numbers():
            second = again(tried)
        tried.claims.check_repeated(distances, second, "distance", exact=metric.device.type == "cpu")
        tried.check_claims(prepared)
