"""How much an archive may make this machine hold: bounds that are checked before anything is allocated.

Archives are hostile input, and headers are claims. A file of a few kilobytes may say that it holds a
petabyte; what it says is compared with these bounds first, and what is unpacked is counted as it is written.
A catalog raises them where its data is larger, see :mod:`pipeline.sources.catalog`.
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
"""One decoded sequence, where its catalog states nothing (``largest_sequence``)."""
COORDINATE_BYTES = 2**30
"""All variables of one dimension in a file: xarray reads coordinates when it opens one."""
COORDINATE_VALUE_BYTES = 2**16
"""One value of them: a text of fixed length may claim any."""
LISTED_SEQUENCES = 1_000_000
"""Sequences that one variable of a file may hold: each is listed before any is read."""
DOWNLOAD_BYTES = 100 * 10**9
"""A download of which the catalog doesn't state the ``size``."""
DOWNLOAD_SLACK = 1.1
"""Over the stated size, which is rounded, and may be meant in powers of two."""
UNPACKED_RATIO, UNPACKED_BYTES = 20, 10**9
"""What an archive may hold, as a multiple of its own size and at least, unless ``unpacked`` is stated."""
MEMBERS = 1_000_000
"""Files in an archive, unless ``members`` is stated."""

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20} | {
    "GiB": 2**30,
    "TiB": 2**40,
}


def parse_size(text: str) -> int:
    """``"3.9 GB"`` in bytes.

    Raises
    ------
    ValueError
        When it is no number with a unit.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip(), re.ASCII)
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"size {text!r}: expected a number and one of {', '.join(_UNITS)}")
    return int(float(found[1]) * _UNITS[found[2]])


def readable(nbytes: int) -> str:
    """Bytes in words, with the largest decimal unit: ``"7.1 PB"``."""
    value, unit = float(nbytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB", "PB", "EB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def array_bytes(shape: Iterable[int], itemsize: int) -> int:
    """Size of an array, in whole numbers that don't overflow."""
    return math.prod(map(int, shape)) * itemsize


def control_group_bytes(root: Path = Path("/")) -> int | None:
    """Memory that the control groups of this process allow it, as those of a job of SLURM or systemd do.

    Parameters
    ----------
    root : Path
        Where ``proc/self/cgroup`` and ``sys/fs/cgroup`` lie.

    Returns
    -------
    int or None
        The least of the group and of those that it lies in; None where none states any.
    """
    groups = root / "proc/self/cgroup"
    found = []
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2, alone or beside version 1
            tops, name = ["sys/fs/cgroup", "sys/fs/cgroup/unified"], "memory.max"
        elif "memory" in controllers.split(","):
            tops, name = ["sys/fs/cgroup/memory"], "memory.limit_in_bytes"
        else:
            continue
        # A container may see its own group as the top, and not where the path says: then that is looked at.
        group = PurePosixPath("/" if ".." in path.split("/") else path)
        for top in tops:
            for folder in (group, *group.parents):
                file = root / top / folder.relative_to("/") / name
                text = file.read_text().strip() if file.is_file() else ""
                found += [int(text)] if text.isdigit() else []
    return min(found, default=None)


def _process_limits() -> dict[str, int]:
    """Bytes that this process may have of all its addresses and of data alone, where they are limited."""
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
    """What this process may still take of its limits (``ulimit -v``, ``ulimit -d``); None without any."""
    now = psutil.Process().memory_info()
    return min((limit - getattr(now, name) for name, limit in _process_limits().items()), default=None)


@functools.cache
def memory_bytes() -> int:
    """Memory that this process may have: the machine's, its control group's or its limits'."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    if (allowed := control_group_bytes()) is not None:
        found.append(allowed)
    return min([*found, *_process_limits().values()], default=2**63)
