"""Turn archives of simulations into distances, correlations and reports.

Each stage is one function that takes a store and gives a store. Run again, it computes what is new or out of
date, and nothing else. All of them, from source files to a page::

    import pipeline

    catalog = pipeline.open_catalog("demo")
    pipeline.fetch(catalog)
    settings = pipeline.Settings(metrics=("lsim-open", "l2"))
    with pipeline.Cluster(pipeline.load_profile("local")) as cluster:
        pipeline.convert(catalog, "frames.zarr", cluster=cluster)
        pipeline.compute_distances("frames.zarr", "distances.zarr", settings, cluster=cluster)
        of_all_frames = settings.model_copy(update={"scope": "dataset"})
        pipeline.compute_matrix("frames.zarr", "matrix.zarr", of_all_frames, cluster=cluster)
    pipeline.correlate("distances.zarr", "results")
    pipeline.write_report("results", matrix="matrix.zarr")

Rollouts of models are compared with a reference by two stages::

    pipeline.compare("reference.zarr", {"unet": "unet.zarr"}, "rollouts.zarr")
    pipeline.rank("rollouts.zarr", "results")

A module is imported when one of its names is first used: PyTorch and Dask take seconds.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.convert import convert
    from pipeline.correlate import correlate
    from pipeline.distances import compute_distances
    from pipeline.matrix import MatrixRequest, compute_matrix
    from pipeline.matrix.embeddings import compute_embeddings
    from pipeline.matrix.neighbours import find_neighbours
    from pipeline.metrics.settings import Settings
    from pipeline.report import write_matrix_report, write_report
    from pipeline.rollouts import RolloutSettings, compare
    from pipeline.rollouts.ranking import rank
    from pipeline.simulate import simulate
    from pipeline.sources.catalog import open_catalog
    from pipeline.sources.fetch import fetch
    from pipeline.verify import verify
    from pipeline.workers.cluster import Cluster
    from pipeline.workers.profiles import load_profile
    from pipeline.workflow import open_workflow, run_workflow

__all__ = [
    "Cluster",
    "MatrixRequest",
    "RolloutSettings",
    "Settings",
    "compare",
    "compute_distances",
    "compute_embeddings",
    "compute_matrix",
    "convert",
    "correlate",
    "fetch",
    "find_neighbours",
    "load_profile",
    "open_catalog",
    "open_workflow",
    "rank",
    "run_workflow",
    "simulate",
    "verify",
    "write_matrix_report",
    "write_report",
]

_MODULES = {
    "Cluster": "workers.cluster",
    "MatrixRequest": "matrix",
    "RolloutSettings": "rollouts",
    "Settings": "metrics.settings",
    "compare": "rollouts",
    "compute_distances": "distances",
    "compute_embeddings": "matrix.embeddings",
    "compute_matrix": "matrix",
    "convert": "convert",
    "correlate": "correlate",
    "fetch": "sources.fetch",
    "find_neighbours": "matrix.neighbours",
    "load_profile": "workers.profiles",
    "open_catalog": "sources.catalog",
    "open_workflow": "workflow",
    "rank": "rollouts.ranking",
    "run_workflow": "workflow",
    "simulate": "simulate",
    "verify": "verify",
    "write_matrix_report": "report",
    "write_report": "report",
}
"""The module of each public name, below this package."""


class _Package(ModuleType):
    """Module that looks up public names in their modules, and imports these when they are first needed.

    Some stages have the name of their folder: as an attribute, ``pipeline.convert`` is always the function.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{self.__name__}.{_MODULES[name]}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a submodule sets it as an attribute of its package.
        if isinstance(value, ModuleType) and name in _MODULES:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
