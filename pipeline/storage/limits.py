"""Bounds on the memory and disk that an archive may use, checked before anything is allocated.

Archives are hostile input, and headers are claims. A file of a few kilobytes may claim that it holds a
petabyte: the claim is compared with these bounds first, and unpacked bytes are counted as they are written.
A catalog raises the bounds where its data is larger, see :mod:`pipeline.sources.catalog`.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import psutil

SEQUENCE_BYTES = 16 * 2**30
"""Largest decoded sequence, unless its catalog states ``largest_sequence``."""
COORDINATE_BYTES = 2**30
"""Largest total of the variables of one dimension in a file: xarray reads coordinates when it opens one."""
COORDINATE_VALUE_BYTES = 2**16
"""Largest value in such a variable: a text of fixed length may claim any length."""
LISTED_SEQUENCES = 1_000_000
"""Most sequences in one variable of a file: all are listed before any is read."""
DOWNLOAD_BYTES = 100 * 10**9
"""Largest download, unless the catalog states its ``size``."""
DOWNLOAD_SLACK = 1.1
"""Factor on the stated size, which is rounded and may be meant in powers of two."""
UNPACKED_RATIO, UNPACKED_BYTES = 20, 10**9
"""Bound on unpacked bytes unless ``unpacked`` is stated: a multiple of the archive's size, or this many."""
MEMBERS = 1_000_000
"""Most files in an archive, unless ``members`` is stated."""

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20} | {
    "GiB": 2**30,
    "TiB": 2**40,
}


def parse_size(text: str) -> int:
    """Convert a size such as ``"3.9 GB"`` to bytes.

    Raises
    ------
    ValueError
        When it is no number with a unit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip(), re.ASCII)
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"size {text!r}: expected a number and one of {', '.join(_UNITS)}")
    return int(float(match[1]) * _UNITS[match[2]])


def readable(nbytes: int) -> str:
    """Format bytes with the largest decimal unit, as in ``"7.1 PB"``."""
    value, unit = float(nbytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB", "PB", "EB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def array_bytes(shape: Iterable[int], itemsize: int) -> int:
    """Compute the bytes of an array in integers that don't overflow."""
    return math.prod(map(int, shape)) * itemsize


def control_group_bytes(root: Path = Path("/")) -> int | None:
    """Read the memory that this process's control groups allow, as those of SLURM and systemd jobs do.

    Parameters
    ----------
    root : Path
        Folder of ``proc/self/cgroup`` and ``sys/fs/cgroup``.

    Returns
    -------
    int or None
        The smallest limit of the group and those above it; None where none has a limit.
    """
    groups = root / "proc/self/cgroup"
    limits = []
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2, alone or beside version 1
            tops, name = ["sys/fs/cgroup", "sys/fs/cgroup/unified"], "memory.max"
        elif "memory" in controllers.split(","):
            tops, name = ["sys/fs/cgroup/memory"], "memory.limit_in_bytes"
        else:
            continue
        # A container may see its own group as the top, and not at its path: then the top is read.
        group = PurePosixPath("/" if ".." in path.split("/") else path)
        for top in tops:
            for folder in (group, *group.parents):
                file = root / top / folder.relative_to("/") / name
                text = file.read_text().strip() if file.is_file() else ""
                limits += [int(text)] if text.isdigit() else []
    return min(limits, default=None)


def _process_limits() -> dict[str, int]:
    """Read this process's limits on address space and on data, in bytes; empty where there are none."""
    try:
        import resource
    except ImportError:  # not on this platform
        return {}
    soft = {
        "vms": resource.getrlimit(resource.RLIMIT_AS)[0],
        "data": resource.getrlimit(resource.RLIMIT_DATA)[0],
    }
    return {name: limit for name, limit in soft.items() if limit != resource.RLIM_INFINITY}


def headroom_bytes() -> int | None:
    """Compute the memory left under this process's limits (``ulimit -v``, ``-d``); None without any."""
    memory = psutil.Process().memory_info()
    return min((limit - getattr(memory, name) for name, limit in _process_limits().items()), default=None)


@functools.cache
def memory_bytes() -> int:
    """Return the memory that this process may use: the machine's, or a lower limit of group or process."""
    bounds = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    if (limit := control_group_bytes()) is not None:
        bounds.append(limit)
    return min([*bounds, *_process_limits().values()], default=2**63)
