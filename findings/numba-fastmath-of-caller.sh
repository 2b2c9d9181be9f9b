#!/usr/bin/env bash
# Numba 0.68.1: a function compiled by @njit alone has fastmath if a function with fastmath calls it first.
# Expected: options belong to the function that states them; @njit without fastmath adds in the order written,
# whoever calls it.
# Observed: the first call compiles the function, with the options of its caller, and later calls, direct ones
# too, use what was compiled: the same sum of the same array differs in its last digits with the order of calls.
# With cache=True it stays so in later processes. @njit(fastmath=False), written out, is not overruled.
# This script fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numba==0.68.1 numpy==2.4.6
cd "$folder"
cat > program.py <<'PROGRAM'
import sys

import numba
import numpy as np


def add(values):
    result = 0.0
    for k in range(values.shape[0]):
        result += values[k]
    return result


plain, stated = numba.njit(add), numba.njit(fastmath=False)(add)


@numba.njit(fastmath=True)
def twice_plain(values):
    return 2 * plain(values)


@numba.njit(fastmath=True)
def twice_stated(values):
    return 2 * stated(values)


print("numba", numba.__version__, "numpy", np.__version__, file=sys.stderr)
values = np.random.default_rng(0).normal(size=10_007) * 1e8
if sys.argv[1] == "caller-first":
    twice_plain(values), twice_stated(values)
print(repr(float(plain(values))), repr(float(stated(values))))
PROGRAM
run() { env -u PYTHONPATH venv/bin/python program.py "$1"; }
alone=$(run alone)
called=$(run caller-first)
echo "plain, stated: called by itself: $alone; first by a caller with fastmath: $called"
test "${alone% *}" != "${called% *}" || { echo "the caller's fastmath no longer counts"; exit 1; }
test "${alone#* }" = "${called#* }" || { echo "the stated fastmath=False is overruled now"; exit 1; }
