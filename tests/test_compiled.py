"""Kernels in Numba's cache: what several processes compile at once stays what it is."""

from __future__ import annotations

import subprocess
import sys
import textwrap
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
COMPILE = '''
import os, sys, time, traceback
from pathlib import Path
import numpy as np
from kernel import total

def compile_or_load(signature, others):
    """Go on from each look at the index when the others have had theirs: no one sees what another writes."""
    file, looks = total._cache._cache_file, []
    load_index = file._load_index

    def load_index_at_once():
        index = load_index()
        looks.append(signature)
        Path(f"{signature}.{len(looks)}").touch()
        deadline = time.monotonic() + 60
        while not all(Path(f"{other}.{len(looks)}").exists() for other in others):
            assert time.monotonic() < deadline, "another process has not looked in a minute"
            time.sleep(0.001)
        return index

    file._load_index = load_index_at_once
    dtype, layout = signature.split("-")
    values = np.asarray(np.arange(6).reshape(2, 3), dtype=dtype, order=layout)
    assert total(values) == 15
    assert looks

def run_at_once(*signatures):
    """Processes of their own, which share the imports of this one and no kernel."""
    processes = []
    for signature in signatures:
        if not (process := os.fork()):
            try:
                compile_or_load(signature, signatures)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        processes.append(process)
    ended = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    assert ended == [0] * len(processes)

signatures = sys.argv[1:]
run_at_once(*signatures)
assert len(list(Path().rglob("*.nbc"))) == len(signatures), "one wrote over another's code"
# The index is the last writer's: whatever it names, it names the right code.
for signature in signatures:
    run_at_once(signature)
'''
SIGNATURES = ("f4-C", "f8-C", "i8-F")


def test_processes_that_compile_at_once_leave_a_cache_that_all_can_load(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(KERNEL)
    subprocess.run([sys.executable, "-c", COMPILE, *SIGNATURES], cwd=tmp_path, check=True, timeout=240)
    files = [path.name for path in tmp_path.rglob("*.nbc")]
    assert len(files) == len(set(files)) >= len(SIGNATURES)


def test_a_kernel_adds_in_its_order_whoever_calls_it_first(tmp_path):
    """Numba 0.68.1 gives a function without ``fastmath`` that of its first caller."""
    code = """
    import sys
    import numpy as np
    from lsim.compiled import compiled

    @compiled()
    def add(values):
        result = 0.0
        for k in range(values.shape[0]):
            result += values[k]
        return result

    @compiled(fastmath=True)
    def twice(values):
        return 2 * add(values)

    values = np.random.default_rng(0).normal(size=10_007) * 1e8
    if sys.argv[1] == "caller":
        twice(values)
    print(add(values).hex())
    """
    sums = set()
    for number, first in enumerate(("caller", "itself")):
        script = tmp_path / f"{number}" / "kernels.py"
        script.parent.mkdir()
        script.write_text(textwrap.dedent(code))
        run = subprocess.run([sys.executable, script, first], capture_output=True, text=True, check=True)
        sums.add(run.stdout)
    assert len(sums) == 1
