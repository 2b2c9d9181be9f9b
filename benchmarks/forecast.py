"""What LSiM's matrix over a large archive would take: the planner's own arithmetic, from assumed rates.

    python benchmarks/forecast.py

prints the table of docs/matrix.md. No archive is read, and nothing measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.matrix.measuring import Measured
from pipeline.matrix.plan import Workers, choose_sides, plan_family
from pipeline.storage.limits import readable

VALUES = 226_208
"""Of an LSiM embedding at 224²."""
EMBEDDING_OPERATIONS = 341e6
PAIR_OPERATIONS = 2 * VALUES
RAW_BYTES = 256 * 256 * 3 * 4


@dataclass(frozen=True)
class Machine:
    """A worker: its name, kind of device, memory, and the rates of its products and of its network."""

    name: str
    device: str
    memory: float
    products: float
    network: float


CORE = Machine("core of 94 GFLOP/s, 8 GB", "cpu", 8e9, 0.6 * 94e9, 341e6 / 3.3e-3)
"""As measured here: a share of 60 % in comparing, and 3.3 ms an embedding."""
H100 = Machine("H100, IEEE single precision", "cuda", 0.85 * 80e9, 0.6 * 67e12, 0.3 * 67e12)
"""67 TFLOP/s by its data sheet; 60 % of it in products and 30 % in the network are assumptions."""
CASES = (
    (10_000, CORE, 2),
    (100_000, CORE, 64),
    (100_000, H100, 1),
    (1_000_000, H100, 8),
    (1_000_000, H100, 64),
)


def row(n: int, machine: Machine, count: int) -> list[str]:
    """One line of the table: ``n`` frames on ``count`` such workers."""
    measurement = Measured(
        4 * VALUES,
        4 * 3 * 224 * 224,
        RAW_BYTES,
        16 * RAW_BYTES,
        0 if machine.device == "cuda" else 400_000_000,
        EMBEDDING_OPERATIONS / machine.network,
        PAIR_OPERATIONS / machine.products,
    )
    workers = Workers(count, 1, int(machine.memory), machine.device)
    tile, side = choose_sides(n, [measurement], workers, None)
    blocks = -(-n // tile)
    upper_triangle = np.triu(np.ones((blocks, blocks), bool))
    plan = plan_family(["lsim"], [upper_triangle], n, tile, side, measurement, workers)
    hours = plan.seconds / 3600
    return [
        f"{n:,}",
        f"{count} × {machine.name}",
        f"{plan.embeddings:,.0f} ({plan.factor:.1f})",
        f"{plan.embeddings * EMBEDDING_OPERATIONS:.1e}",
        f"{n * (n - 1) / 2 * PAIR_OPERATIONS:.1e}",
        readable(plan.written),
        readable(plan.cache + plan.work + plan.process),
        f"{hours:.2g}",
        f"{hours * count:.2g}",
    ]


def table() -> str:
    """The whole table, in Markdown."""
    head = (
        *("frames", "workers", "embeddings (a frame)", "FLOP, embedding", "FLOP, pairs", "distances"),
        *("memory of a worker", "hours", "hours × workers"),
    )
    lines = [head, ["---"] * len(head), *(row(*case) for case in CASES)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    print(table())
