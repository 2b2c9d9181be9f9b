"""Kernels in Numba's cache: what several processes compile at once stays what it is."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

KERNEL = """
from lsim.compiled import compiled

@compiled()
def total(values):
    result = 0.0
    for value in values.flat:
        result += value
    return result
"""
COMPILE = """
import sys, time
import numpy as np
from kernel import total

# All processes have seen an empty index before any of them writes.
total._cache._cache_file._load_index()
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
dtype, layout = sys.argv[1].split("-")
values = np.asarray(np.arange(6).reshape(2, 3), dtype=dtype, order=layout)
assert total(values) == 15
"""
SIGNATURES = ("f4-C", "f8-C", "i8-F")


def test_processes_that_compile_at_once_leave_a_cache_that_all_can_load(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(KERNEL)
    start = str(time.time() + 8)
    command = [sys.executable, "-c", COMPILE]
    first = [subprocess.Popen([*command, signature, start], cwd=tmp_path) for signature in SIGNATURES]
    assert [process.wait(timeout=120) for process in first] == [0] * len(SIGNATURES)
    # The index is the last writer's: whatever it names, it names the right code.
    for signature in SIGNATURES[:2]:
        subprocess.run([*command, signature, "0"], cwd=tmp_path, check=True, timeout=120)
    files = [path.name for path in tmp_path.rglob("*.nbc")]
    assert len(files) == len(set(files)) >= len(SIGNATURES)
