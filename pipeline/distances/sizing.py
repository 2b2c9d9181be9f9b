"""How much one task does: blocks of a new store, and blocks a task, from a measured rate.

A task should take between half a second and five. Shorter ones are mostly scheduling; longer ones make a lost
worker dear and the end of a run uneven.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SHORTEST_S = 0.5
TARGET_S = 2.0
TASKS_PER_THREAD = 4
"""At least so many, where that leaves tasks of :data:`SHORTEST_S`: the last ones end together."""
MOST_SEQUENCES = 1024
MOST_BLOCKS = 256
MATRIX_BYTES = 64 * 2**20
"""Most that the matrices of one metric and block take in memory."""


@dataclass(frozen=True)
class BlockSize:
    """Blocks of a new field.

    Attributes
    ----------
    sequences : int
        In each block, a power of two.
    seconds_per_sequence : float, optional
        As measured, on one thread; None where it wasn't.
    """

    sequences: int
    seconds_per_sequence: float | None = None

    @property
    def seconds(self) -> float | None:
        """What a block should take."""
        return None if self.seconds_per_sequence is None else self.sequences * self.seconds_per_sequence


def block_size(seconds: float, sequences: int, threads: int, frames: int) -> BlockSize:
    """The blocks of a new field.

    Parameters
    ----------
    seconds : float
        What one sequence takes, all metrics together.
    sequences : int
        How many there are.
    threads : int
        Of all workers.
    frames : int
        Of a sequence.
    """
    enough = SHORTEST_S / seconds
    share = sequences / (TASKS_PER_THREAD * threads)
    most = min(
        TARGET_S / seconds,
        max(share, enough),
        sequences,
        MOST_SEQUENCES,
        MATRIX_BYTES / (8 * frames**2),
    )
    return BlockSize(1 << max(0, int(most).bit_length() - 1), seconds)


@dataclass
class Pace:
    """What blocks have taken so far, by field; tells how many to give to a task."""

    threads: int = 1
    seconds: dict[str, float] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)

    def note(self, key: str, blocks: int, seconds: float) -> None:
        """Some blocks of a field have taken so long, on one thread."""
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds
        self.blocks[key] = self.blocks.get(key, 0) + blocks

    def blocks_per_task(self, key: str, left: int) -> int:
        """How many of the blocks of a field that are left to compute in one task; one before any is done."""
        if not self.blocks.get(key):
            return 1
        each = max(self.seconds[key] / self.blocks[key], 1e-6)
        if each >= SHORTEST_S:
            return 1
        share = left / (TASKS_PER_THREAD * self.threads)
        return max(1, min(int(TARGET_S / 2 / each), int(max(share, SHORTEST_S / each)), MOST_BLOCKS, left))
