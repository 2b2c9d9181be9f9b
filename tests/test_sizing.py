"""How much a task does: half a second to five, with enough tasks for all threads where that leaves them."""

from __future__ import annotations

import pytest

from pipeline.distances.sizing import (
    MATRIX_BYTES,
    MOST_BLOCKS,
    MOST_SEQUENCES,
    SHORTEST_S,
    BlockSize,
    Pace,
    block_size,
)


@pytest.mark.parametrize("seconds", [0.003, 0.02, 0.11, 0.4, 1.0, 1.9])
def test_blocks_take_half_a_second_to_five(seconds):
    size = block_size(seconds, sequences=100_000, threads=8, frames=11)
    assert 0.5 <= size.seconds <= 5
    assert size.sequences & (size.sequences - 1) == 0


@pytest.mark.parametrize(
    ("seconds", "sequences", "threads", "frames", "expected"),
    [
        (30.0, 1000, 4, 11, 1),  # a sequence cannot be divided
        (1e-6, 100_000, 4, 11, MOST_SEQUENCES),
        (0.1, 64, 8, 11, 4),  # no smaller than half a second, though threads have nothing to do then
        (0.25, 64, 4, 11, 4),  # smaller than two seconds, so that each thread has four
        (1e-6, 5, 1, 11, 4),  # no larger than the field
        (1e-3, 10_000, 1, 1000, 8),  # matrices of a thousand frames take memory
    ],
)
def test_the_bounds_of_a_block(seconds, sequences, threads, frames, expected):
    assert block_size(seconds, sequences, threads, frames).sequences == expected
    assert 8 * frames**2 * expected <= MATRIX_BYTES


def test_a_size_that_was_not_measured_says_nothing_of_seconds():
    assert BlockSize(1).seconds is None


def test_quick_blocks_go_together_once_it_is_known_that_they_are_quick():
    pace = Pace(threads=2)
    assert pace.blocks_per_task("A/density", remaining=1000) == 1
    pace.note("A/density", blocks=4, seconds=0.2)
    together = pace.blocks_per_task("A/density", remaining=1000)
    assert SHORTEST_S <= together * 0.05 <= 5
    assert pace.blocks_per_task("A/density", remaining=12) == 10
    assert pace.blocks_per_task("B/pressure", remaining=1000) == 1
    pace.note("B/pressure", blocks=1, seconds=0.7)
    assert pace.blocks_per_task("B/pressure", remaining=1000) == 1
    pace.note("C/all-done", blocks=3, seconds=0.0)
    assert pace.blocks_per_task("C/all-done", remaining=100_000) == MOST_BLOCKS
