"""What several benchmarks need: a sequence of frames, a stopwatch, and the name of the machine."""

from __future__ import annotations

import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

FRAMES, SIDE = 11, 256
PAIRS = list(itertools.combinations(range(FRAMES), 2))


def make_sequence(seed: int = 0) -> np.ndarray:
    """Drifting waves with a little noise: (11, 256, 256, 3) float32, far outside of [0, 255]."""
    rng = np.random.default_rng(seed)
    y, x = np.indices((SIDE, SIDE)) * (2 * np.pi / SIDE)
    frames = np.zeros((FRAMES, SIDE, SIDE, 3), np.float32)
    for channel in range(3):
        for waves in (1, 2, 5, 9):
            phase, angle = rng.uniform(0, 2 * np.pi, 2)
            wave_phase = waves * (x * math.cos(angle) + y * math.sin(angle))
            for k in range(FRAMES):
                frames[k, ..., channel] += 700 / waves * np.sin(wave_phase + phase + 0.12 * k * waves)
    return frames + rng.normal(0, 10, frames.shape).astype(np.float32)


class Stopwatch:
    """Collects the seconds of repeated calls by name."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, ...], list[float]] = {}

    def time(self, name: tuple[str, ...], call: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        result = call(*arguments)
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def minimum(self, *name: str) -> float:
        return min(self.seconds[name])

    def summary(self, *name: str) -> dict[str, float]:
        return {"minimum": min(self.seconds[name]), "median": statistics.median(self.seconds[name])}


def processor(device: torch.device | None = None) -> str:
    """What the machine, or the device, calls itself."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )
