"""Give a metric a batch of frames at once; where it raises, one by one, so that each has its own reason."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from lsim.claims import ClaimError
from lsim.preprocess import FramesError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def in_batch_or_alone(
    call: Callable[[np.ndarray], Result], frames: np.ndarray, metric: str
) -> Iterator[tuple[int, Result | str]]:
    """Call a function with all frames; where it raises, with each frame by itself.

    Parameters
    ----------
    call : callable
        Gives the same result for a frame whatever its batch.
    frames : ndarray of shape (n, y, x, channel)
    metric : str
        Its name, for a warning where all frames went well one by one: nothing else reports that.

    Yields
    ------
    start, result : tuple
        Index of the first frame of the result, and the result; a text is the error of one frame.

    Raises
    ------
    FramesError
        When the metric takes no such frames at all.
    lsim.ClaimError
        When the metric breaks a claim: results of single frames prove nothing then.
    """
    try:
        yield 0, call(frames)
        return
    except (FramesError, ClaimError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    has_failed = False
    for k in range(len(frames)):
        try:
            result: Result | str = call(frames[k : k + 1])
        except Exception as error:
            result, has_failed = f"{type(error).__name__}: {error}", True
        yield k, result
    if not has_failed:
        logger.warning(
            "%s: %d frames at once failed (%s), and went well one by one", metric, len(frames), reason
        )
