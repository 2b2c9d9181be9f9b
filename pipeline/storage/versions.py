"""Versions of the packages that determine results, as every store records them."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform

RECORDED = ("lsim", "torch", "numpy", "scipy", "numba", "zarr", "xarray", "dask", "distributed")
OPENCV = ("opencv-python-headless", "opencv-python")
"""Distributions of the module ``cv2``, on whose version the values of ``flow`` depend."""


def versions() -> dict[str, str]:
    """Look up the versions of the packages that compute and store, of Python, and the kind of machine."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in RECORDED}
    for name in OPENCV:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return packages | {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
