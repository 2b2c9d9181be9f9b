"""Versions of what determines results, as every store records them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform

RECORDED = ("lsim", "torch", "numpy", "scipy", "numba", "zarr", "xarray", "dask", "distributed")
OPENCV = ("opencv-python-headless", "opencv-python")
"""Each brings the module ``cv2``, on whose version the values of ``flow`` depend."""


def versions() -> dict[str, str]:
    """Versions of the packages that compute and store, of Python, and the kind of machine."""
    found = {name: importlib.metadata.version(name) for name in RECORDED}
    for name in OPENCV:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
