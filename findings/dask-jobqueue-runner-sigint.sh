#!/usr/bin/env bash
# dask-jobqueue 0.9.0: importing the package replaces the process's SIGINT handler by one that calls sys.exit().
# Expected: an import leaves signal handlers as they are, and Ctrl-C raises KeyboardInterrupt.
# Observed: after "import dask_jobqueue" Ctrl-C raises SystemExit(None), which "except KeyboardInterrupt" does not catch.
# The process ends with exit code 0, as if it had finished, and a handler that the program has set is lost. The cause is
# dask_jobqueue/runner.py, imported by slurm.py, which calls signal.signal at its top. If the package is first imported
# in another thread than the main one, it raises ValueError instead.
# This script fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q dask-jobqueue==0.9.0 dask==2026.8.0 distributed==2026.8.0
cd "$folder"
env -u PYTHONPATH venv/bin/python - <<'PROGRAM'
import signal
import subprocess
import sys
from importlib.metadata import version

print("dask-jobqueue", version("dask-jobqueue"), "distributed", version("distributed"))

INTERRUPTED = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in the foreground of a shell
{first}
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    raise SystemExit(130)
"""
IN_A_THREAD = """
import threading
def load():
    try:
        import dask_jobqueue
    except ValueError as error:
        print(error)
thread = threading.Thread(target=load)
thread.start()
thread.join()
"""


def run(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


imports = ("import distributed", "import dask_jobqueue")
codes = {first: run(INTERRUPTED.format(first=first)).returncode for first in imports}
print("exit code after Ctrl-C:", codes)
assert codes["import distributed"] == 130
assert codes["import dask_jobqueue"] == 0, "the handler is left alone now"

message = run(IN_A_THREAD).stdout.strip()
print("imported in a thread:", message or "no error")
assert "main thread" in message, "it can be imported in a thread now"
PROGRAM
