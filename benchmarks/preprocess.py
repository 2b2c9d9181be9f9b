"""Time what comes before a metric: 11 frames of 256²×3 resized to 224² and mapped to [0, 255].

The baseline is scipy's zoom and NumPy's arithmetic, each frame once; the published evaluation does that
for both frames of every pair, so ten times over. All in this process on one thread, repeats taken in turn.
Times are those of the processor, as other programs don't matter to these; on a GPU, of the clock on the
wall until it is done, moving included.

    python benchmarks/preprocess.py [--json] [--repeats 7] [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import scipy.ndimage
import torch
from common import processor
from threadpoolctl import threadpool_limits

from lsim.metric import resolve_device
from lsim.prepared import prepare
from lsim.preprocess import Compat, Preprocessing

FRAMES, SIDE, SIZE = 11, 256, 224
ORDERS = (0, 1, 2, 3)
SOURCES = (np.uint8, np.float32, np.float64)
MODES: tuple[Compat, ...] = ("default", "published")
TARGET = 0.015
"""Seconds that a sequence may take on one core."""
AGREEMENT = 1e-6
"""Deviation from scipy, as a share of 255; at this size both modes are to reproduce it."""


def make_sequence(seed: int = 0) -> np.ndarray:
    """Drifting waves with a little noise in 20 … 235, so that splines of bytes do not overflow."""
    rng = np.random.default_rng(seed)
    y, x = np.indices((SIDE, SIDE)) * (2 * np.pi / SIDE)
    frames = np.zeros((FRAMES, SIDE, SIDE, 3))
    for channel in range(3):
        for waves in (1, 2, 5, 9):
            phase, angle = rng.uniform(0, 2 * np.pi, 2)
            wave_phase = waves * (x * np.cos(angle) + y * np.sin(angle))
            for k in range(FRAMES):
                frames[k, ..., channel] += np.sin(wave_phase + phase + 0.12 * k * waves) / waves
    frames += rng.normal(0, 0.01, frames.shape)
    return 20 + 215 * (frames - frames.min()) / np.ptp(frames)


def by_scipy(frames: np.ndarray, order: int) -> np.ndarray:
    """Each frame once by scipy, minimum and maximum per channel over all to [0, 255]."""
    resized = scipy.ndimage.zoom(frames, (1, SIZE / SIDE, SIZE / SIDE, 1), order=order)
    lo, hi = resized.min(axis=(0, 1, 2)), resized.max(axis=(0, 1, 2))
    return (255 * ((resized - lo) / (hi - lo))).astype(np.float32)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(frames: np.ndarray, order: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows of the result for one source and order, in both modes."""
    reference = by_scipy(frames, order)

    def prepared(compat: Compat) -> torch.Tensor:
        return prepare(frames, Preprocessing(SIZE, order, compat), "sequence", device).values

    # The first call compiles kernels and fills caches.
    deviation = {c: float(np.abs(prepared(c).cpu().numpy() - reference).max()) / 255 for c in MODES}
    timings: dict[str, list[float]] = {name: [] for name in ("scipy", *MODES)}
    for repeat in range(repeats):
        for compat in MODES:
            timings[compat].append(seconds(lambda c=compat: prepared(c), device))  # type: ignore[misc]
        if repeat % 3 == 0:  # it takes its time
            timings["scipy"].append(seconds(lambda: by_scipy(frames, order), torch.device("cpu")))
    best = {name: min(values) for name, values in timings.items()}
    return [
        {
            "source": frames.dtype.name,
            "order": order,
            "compat": compat,
            "seconds": {"baseline": best["scipy"], "here": best[compat]},
            "ratio": best["scipy"] / best[compat],
            "within_target": best[compat] <= TARGET,
            "maximum_deviation": deviation[compat],
            "agrees": deviation[compat] <= AGREEMENT,
        }
        for compat in MODES
    ]


def measure(repeats: int, device: torch.device) -> dict[str, Any]:
    """All timings of one run, as JSON."""
    torch.set_num_threads(1)
    waves = make_sequence()
    rows = [
        row
        for source in SOURCES
        for order in ORDERS
        for row in compare(waves.astype(source), order, repeats, device)
    ]
    return {
        "sequence": [FRAMES, SIDE, SIDE, 3],
        "size": SIZE,
        "repeats": repeats,
        "threads": 1,
        "device": str(device),
        "target_seconds": TARGET,
        "machine": {"processor": processor(device), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "numba": version("numba"),
            "scipy": version("scipy"),
        },
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The same for people."""
    lines = [
        f"{'×'.join(map(str, result['sequence']))} to {result['size']}², one thread, {result['device']}, "
        f"minima of {result['repeats']} repeats, machine's load {result['machine']['load']:.1f}",
        "",
        f"{'source':<8} {'order':>5} {'compat':<9} {'scipy':>9} {'here':>8} {'ratio':>6} {'deviation':>9}",
    ]
    for row in result["rows"]:
        seconds = row["seconds"]
        suffix = "" if row["within_target"] else f"  over {1e3 * result['target_seconds']:.0f} ms"
        lines.append(
            f"{row['source']:<8} {row['order']:>5} {row['compat']:<9} {1e3 * seconds['baseline']:>6.0f} ms "
            f"{1e3 * seconds['here']:>5.1f} ms {row['ratio']:>6.1f} {row['maximum_deviation']:>9.1e}{suffix}"
        )
    return "\n".join(lines)


def main() -> int:
    """0 when both agree, else 1; how fast it is does not change it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with threadpool_limits(limits=1):
        result = measure(options.repeats, resolve_device(options.device))
    print(json.dumps(result, indent=2) if options.json else table(result))
    wrong = [f"{r['source']}/{r['order']}/{r['compat']}" for r in result["rows"] if not r["agrees"]]
    if wrong:
        print(f"deviates from scipy: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
