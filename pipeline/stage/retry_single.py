"""A batch of frames given to a metric at once; where it raises, one by one, so that each says itself why."""

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
    """``call(frames)``; where it raises, that of each frame, or why there is none.

    Parameters
    ----------
    call : callable
        Gives the same of a frame whatever its batch.
    frames : ndarray of shape (n, y, x, channel)
    metric : str
        Its name, for a warning where all frames went well alone: nothing else tells of it.

    Yields
    ------
    start, result : tuple
        Index of the first frame that the result is of, and the result; a text is the error of one frame.

    Raises
    ------
    FramesError
        When the metric takes no such frames at all.
    lsim.ClaimError
        When the metric gives something else than it claims: what it gives of single frames proves nothing.
    """
    try:
        yield 0, call(frames)
        return
    except (FramesError, ClaimError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    failed = False
    for k in range(len(frames)):
        try:
            result: Result | str = call(frames[k : k + 1])
        except Exception as error:
            result, failed = f"{type(error).__name__}: {error}", True
        yield k, result
    if not failed:
        logger.warning(
            "%s: %d frames at once failed (%s), and went well one by one", metric, len(frames), reason
        )
