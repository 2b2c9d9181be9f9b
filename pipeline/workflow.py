"""Compose the stages: the only file that knows their order.

A workflow is a YAML file with a catalog, the settings of each stage, and a folder for the results. Each stage
reads a store and writes a store, and skips what is up to date; so does a repeated workflow.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import pydantic

from pipeline.convert import ConversionReport, convert
from pipeline.correlate import CorrelationReport, correlate
from pipeline.distances import DistancesReport, compute_distances
from pipeline.matrix import MatrixReport, MatrixRequest, compute_matrix
from pipeline.metrics.settings import Settings, choose_metrics
from pipeline.report import write_report
from pipeline.resources import find_resource, read_yaml, validated
from pipeline.sources.catalog import open_catalog
from pipeline.sources.fetch import fetch
from pipeline.storage import store
from pipeline.storage.address import absolute, join
from pipeline.workers.cluster import Cluster

StageProgress: TypeAlias = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Called with a stage's title; returns a context that yields a function of (done, total)."""


class WorkflowError(ValueError):
    """A workflow file has unknown keys or wrong values; names the file and the key."""


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class CorrelateSection(_Strict):
    """Settings of the correlation stage, see :func:`pipeline.correlate.correlate`."""

    protocols: list[Literal["published", "all-pairs"]] = ["published"]
    replicates: int = pydantic.Field(default=2000, ge=0)
    seed: int = 0


class MatrixSection(_Strict):
    """Settings of the matrix over all frames, see :func:`pipeline.matrix.compute_matrix`.

    All other settings are those of the section ``distances``. The report shows maps of the matrix.

    Attributes
    ----------
    metrics : list of str
    scope : "dataset", "none" or (lo, hi)
        Range that normalises the values; "none" keeps them in their own units.
    groups : list of str
        Keys ``<dataset>/<field>`` or patterns of them. Empty: all.
    together : str, optional
        Name of one matrix over all groups, instead of one for each.
    """

    metrics: Annotated[tuple[str, ...], pydantic.Field(min_length=1)]
    scope: Literal["dataset", "none"] | tuple[float, float] = "dataset"
    groups: tuple[str, ...] = ()
    together: str | None = None

    def settings(self, distances: Settings) -> Settings:
        """Adapt the settings of ``distances`` to this section's metrics and scope."""
        weights = {name: file for name, file in distances.weights.items() if name in self.metrics}
        changes = {"metrics": self.metrics, "scope": self.scope, "pairs": "all", "weights": weights}
        return distances.model_copy(update=changes)


class Workflow(_Strict):
    """Settings of a run of all stages.

    Attributes
    ----------
    title : str
        Title of the report.
    catalog : str
        Name of the catalog, or its path, relative to the workflow's file.
    datasets : list of str, optional
        Data sets of the catalog to use. Default: all.
    fetch : bool
        Download or simulate missing data first. Should be off for large downloads, which nobody should start
        by accident.
    out : str
        Default folder of the stores and results.
    distances : Settings
    correlate : CorrelateSection
    matrix : MatrixSection, optional
        Without it no matrix over all frames is computed.
    """

    title: str = ""
    catalog: str
    datasets: list[str] | None = None
    fetch: bool = False
    out: str
    distances: Settings = Settings()
    correlate: CorrelateSection = CorrelateSection()
    matrix: MatrixSection | None = None


@dataclass
class WorkflowReport:
    """Reports of the stages of a run, and the location of the HTML page."""

    conversion: ConversionReport
    distances: DistancesReport
    correlation: CorrelationReport
    page: Path | str
    stores: dict[str, str] = field(default_factory=dict)
    matrix: MatrixReport | None = None

    @property
    def complete(self) -> bool:
        """True if no sequence was quarantined, and no distance failed or is damaged."""
        failures = self.distances.failures or (self.matrix is not None and self.matrix.failures)
        return not (self.conversion.quarantined or failures or self.correlation.damaged)


def open_workflow(name: str | os.PathLike[str]) -> Workflow:
    """Read a workflow by name (``demo``) or path.

    Raises
    ------
    WorkflowError
        For unknown keys and wrong values; names the file and the key.
    pipeline.resources.ResourceError
        When there is no workflow of that name.
    """
    path = find_resource("workflows", name)
    content = read_yaml(path, WorkflowError)
    if isinstance(content, dict) and "training" in content:
        raise WorkflowError(f"{path} is a training file: run it with 'lsim train {name}'")
    workflow = validated(content, Workflow, path, WorkflowError)
    catalog = path.parent / workflow.catalog
    # A name means a shipped catalog; a path is relative to the folder of the workflow.
    changes: dict[str, Any] = {"catalog": str(catalog)} if catalog.suffix in (".yaml", ".yml") else {}
    weights = {
        metric: str(path.parent / file) if (path.parent / file).is_file() else file
        for metric, file in workflow.distances.weights.items()
    }
    changes["distances"] = workflow.distances.model_copy(update={"weights": weights})
    return workflow.model_copy(update=changes)


def run_workflow(
    workflow: Workflow,
    cluster: Cluster,
    *,
    out: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    progress: StageProgress,
    announce: Callable[[str], None] | None = None,
    verify_sources: bool = False,
) -> WorkflowReport:
    """Run all stages, from source data to the report; each computes only what is out of date.

    Parameters
    ----------
    workflow : Workflow
    cluster : Cluster
        Cluster for all stages; it starts when the first of them needs it.
    out : path or address, optional
        Folder of stores and results. Default: the workflow's.
    data_dir : path, optional
        Folder of source data, see :mod:`pipeline.sources.catalog`.
    progress : callable
        Displays the progress of each stage.
    announce : callable, optional
        Called with a line of text before each download, and with the plan of a matrix over all frames before
        it is computed.
    verify_sources : bool, default False
        See :func:`pipeline.convert.convert`.

    Raises
    ------
    pipeline.storage.objects.ObjectStoreError
        When ``out`` is an address that cannot be opened.
    pipeline.sources.catalog.MissingDataError
        When source data is missing; names what to download.
    ValueError, lsim.UnknownMetricError, lsim.WeightsError
        For metrics that :func:`pipeline.metrics.settings.choose_metrics` refuses; before anything is fetched.
    """
    folder = absolute(out if out is not None else workflow.out)
    frames, distances, results = (join(folder, name) for name in ("frames.zarr", "distances.zarr", "results"))
    catalog = open_catalog(workflow.catalog)
    # Errors of the object store and of metrics are raised before anything is fetched.
    store.exists(frames)
    choose_metrics(workflow.distances)
    if workflow.matrix is not None:
        choose_metrics(workflow.matrix.settings(workflow.distances))
    if workflow.fetch:
        with progress("fetch"):
            fetch(catalog, workflow.datasets, data_dir, announce)
    with progress("convert") as show:
        conversion = convert(
            catalog,
            frames,
            datasets=workflow.datasets,
            data_dir=data_dir,
            cluster=cluster,
            progress=show,
            verify_sources=verify_sources,
        )
    with progress("distances") as show:
        distances_report = compute_distances(
            frames, distances, workflow.distances, cluster=cluster, progress=show
        )
    stores = {"frames": frames, "distances": distances, "results": results}
    matrix_report = None
    if workflow.matrix is not None:
        stores["matrix"] = join(folder, "matrix.zarr")
        with progress("matrix") as show:
            matrix_report = compute_matrix(
                frames,
                stores["matrix"],
                workflow.matrix.settings(workflow.distances),
                MatrixRequest(workflow.matrix.groups, workflow.matrix.together),
                cluster=cluster,
                progress=show,
                announce=announce,
            )
    with progress("correlate"):
        correlation = correlate(
            distances,
            results,
            protocol=workflow.correlate.protocols,
            replicates=workflow.correlate.replicates,
            seed=workflow.correlate.seed,
        )
    with progress("report"):
        page = write_report(results, title=workflow.title or None, matrix=stores.get("matrix"))
    return WorkflowReport(conversion, distances_report, correlation, page, stores, matrix_report)
