"""Families a minute of each recipe, on one core and, where there is one, on a GPU.

A family is eleven simulations, drawn, simulated and checked, in memory: writing them is not timed. The first
families of a recipe fill caches and compile kernels and are not counted. On a core it is this process's
processor time that counts, one thread, so that a machine that does other work as well gives about the same
figures; on a GPU the time of the clock. Smoke and liquid run on the CPU whatever the device, and are not
timed on a GPU.

    python benchmarks/simulate.py [--json] [--recipe NAME …] [--families 4] [--size 256] [--repeats 3]
                                  [--gpu-batch 32]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from typing import Any

import numba
import numpy as np
import scipy
import torch
from common import processor
from threadpoolctl import threadpool_limits

from lsim.simulate import RECIPES, simulate_families

ON_CPU = ("smoke", "liquid", "liquid-noise")
"""Recipes whose solvers run in NumPy and Numba."""


def seconds_a_family(
    recipe: str, size: int, repeats: int, families: int, device: str, batch: int
) -> list[float]:
    """One number a repeat; every repeat simulates other families."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds = []
    for repeat in range(repeats + 1):
        numbers = range(1 + repeat * families, 1 + (repeat + 1) * families)
        start = clock()
        simulate_families(recipe, numbers, size, seed=1, device=device, batch=batch)
        seconds.append((clock() - start) / families)
    return seconds[1:]


def row(recipe: str, device: str, batch: int, seconds: list[float]) -> dict[str, Any]:
    """Figures of one recipe on one device."""
    return {
        "recipe": recipe,
        "fields": len(RECIPES[recipe].fields),
        "device": device,
        "batch": batch,
        "seconds_a_family": {"minimum": min(seconds), "median": statistics.median(seconds)},
        "families_a_minute": 60 / statistics.median(seconds),
    }


def measure(recipes: list[str], size: int, repeats: int, families: int, gpu_batch: int) -> dict[str, Any]:
    """All timings of one run, as JSON."""
    rows = []
    for recipe in recipes:
        seconds = seconds_a_family(recipe, size, repeats, families, "cpu", families)
        rows.append(row(recipe, "one core", families, seconds))
    if torch.cuda.is_available():
        for recipe in (name for name in recipes if name not in ON_CPU):
            # The frames come back to the host, so the clock stops after the GPU has.
            seconds = seconds_a_family(recipe, size, repeats, gpu_batch, "cuda", gpu_batch)
            rows.append(row(recipe, torch.cuda.get_device_name(), gpu_batch, seconds))
    return {
        "size": size,
        "families": families,
        "repeats": repeats,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "numba": numba.__version__,
        },
        "recipes": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The same for people."""
    lines = [
        f"families of 11 frames {result['size']}×{result['size']}, medians of {result['repeats']} repeats, "
        f"machine's load {result['machine']['load']:.1f}",
        "",
        f"{'recipe':<24} {'device':<22} {'a family':>10} {'families a minute':>18}",
    ]
    lines += [
        f"{row['recipe']:<24} {row['device']:<22} {row['seconds_a_family']['median']:>8.2f} s "
        f"{row['families_a_minute']:>18.1f}"
        for row in result["recipes"]
    ]
    return "\n".join(lines)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--recipe", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--families", type=int, default=4, help="simulated together, on the CPU")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gpu-batch", type=int, default=32, help="families together, on a GPU")
    options = parser.parse_args()
    with threadpool_limits(limits=1):
        result = measure(options.recipe, options.size, options.repeats, options.families, options.gpu_batch)
    print(json.dumps(result, indent=2) if options.json else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
