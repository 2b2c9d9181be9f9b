"""Seconds of a block, by what they were spent on."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator


class Stopwatch:
    """Stopwatch that sums up seconds by what they were spent on.

    Examples
    --------
    >>> stopwatch = Stopwatch()
    >>> with stopwatch("read"):
    ...     pass
    >>> list(stopwatch.seconds)
    ['read']
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextlib.contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Add the seconds of a block of code to those of an activity."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] += time.perf_counter() - start  # type: ignore[assignment]


def rounded(seconds: Counter[str]) -> dict[str, float]:
    """Round seconds for the record of a run."""
    return {activity: round(value, 4) for activity, value in seconds.items()}
