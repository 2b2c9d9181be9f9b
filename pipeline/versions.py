"""Versions of what determines results, as every store records them."""

from __future__ import annotations

import importlib.metadata
import platform

RECORDED = ("lsim", "torch", "numpy", "scipy", "numba", "zarr", "xarray", "dask", "distributed")


def versions() -> dict[str, str]:
    """Versions of the packages that compute and store, of Python, and the kind of machine."""
    found = {name: importlib.metadata.version(name) for name in RECORDED}
    return found | {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
