"""Size blocks and tasks by measured rates.

A task should take between half a second and five. Shorter ones are mostly scheduling; longer ones make a lost
worker expensive and the end of a run uneven.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SHORTEST_S = 0.5
TARGET_S = 2.0
TASKS_PER_THREAD = 4
"""Least number, where that leaves tasks of :data:`SHORTEST_S`: the last ones end together."""
MOST_SEQUENCES = 1024
MOST_BLOCKS = 256
MATRIX_BYTES = 64 * 2**20
"""Most memory of the matrices of one metric and block."""


@dataclass(frozen=True)
class BlockSize:
    """Blocks of a new field.

    Attributes
    ----------
    sequences : int
        Sequences of a block, a power of two.
    seconds_per_sequence : float, optional
        Measured on one thread; None where it wasn't measured.
    """

    sequences: int
    seconds_per_sequence: float | None = None

    @property
    def seconds(self) -> float | None:
        """Expected seconds of a block."""
        return None if self.seconds_per_sequence is None else self.sequences * self.seconds_per_sequence


def block_size(seconds: float, sequences: int, threads: int, frames: int) -> BlockSize:
    """Choose the blocks of a new field.

    Parameters
    ----------
    seconds : float
        Seconds of one sequence, all metrics together.
    sequences : int
        Sequences of the field.
    threads : int
        Threads of all workers.
    frames : int
        Frames of a sequence.
    """
    target = SHORTEST_S / seconds
    share = sequences / (TASKS_PER_THREAD * threads)
    limit = min(
        TARGET_S / seconds,
        max(share, target),
        sequences,
        MOST_SEQUENCES,
        MATRIX_BYTES / (8 * frames**2),
    )
    return BlockSize(1 << max(0, int(limit).bit_length() - 1), seconds)


@dataclass
class Pace:
    """Seconds that blocks have taken so far, by field; decides how many a task gets."""

    threads: int = 1
    seconds: dict[str, float] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)

    def note(self, key: str, blocks: int, seconds: float) -> None:
        """Note how long some blocks of a field have taken on one thread."""
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds
        self.blocks[key] = self.blocks.get(key, 0) + blocks

    def blocks_per_task(self, key: str, remaining: int) -> int:
        """Choose how many of the remaining blocks of a field a task computes; one before any is done."""
        if not self.blocks.get(key):
            return 1
        block_seconds = max(self.seconds[key] / self.blocks[key], 1e-6)
        if block_seconds >= SHORTEST_S:
            return 1
        share = remaining / (TASKS_PER_THREAD * self.threads)
        return max(
            1,
            min(
                int(TARGET_S / 2 / block_seconds),
                int(max(share, SHORTEST_S / block_seconds)),
                MOST_BLOCKS,
                remaining,
            ),
        )
