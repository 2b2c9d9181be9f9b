"""Compose the stages: the only file that knows their order.

A workflow is a YAML file: a catalog, the settings of each stage, and where to write. Every stage takes a
store and gives a store, and skips what is up to date; so does a workflow that is run again.
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
"""Called with a stage's title; gives a context with a function of (done, in all)."""


class WorkflowError(ValueError):
    """A workflow file with unknown keys or wrong values; names the file and the key."""


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class CorrelateSection(_Strict):
    """Settings of the correlation stage, see :func:`pipeline.correlate.correlate`."""

    protocols: list[Literal["published", "all-pairs"]] = ["published"]
    replicates: int = pydantic.Field(default=2000, ge=0)
    seed: int = 0


class MatrixSection(_Strict):
    """A matrix over all frames, see :func:`pipeline.matrix.compute_matrix`; its maps go into the report.

    Metrics are told what the section ``distances`` tells them.

    Attributes
    ----------
    metrics : list of str
    scope : "dataset", "none" or (lo, hi)
        Of minimum and maximum; with "none" values are in their own units.
    groups : list of str
        Keys ``<dataset>/<field>`` or patterns of them; none are all.
    together : str, optional
        One matrix over all groups, so called, instead of one for each.
    """

    metrics: Annotated[tuple[str, ...], pydantic.Field(min_length=1)]
    scope: Literal["dataset", "none"] | tuple[float, float] = "dataset"
    groups: tuple[str, ...] = ()
    together: str | None = None

    def settings(self, distances: Settings) -> Settings:
        """Those of ``distances``, for this section's metrics and scope."""
        weights = {name: file for name, file in distances.weights.items() if name in self.metrics}
        changes = {"metrics": self.metrics, "scope": self.scope, "pairs": "all", "weights": weights}
        return distances.model_copy(update=changes)


class Workflow(_Strict):
    """A run of all stages.

    Attributes
    ----------
    title : str
        Of the report.
    catalog : str
        Name of the catalog, or its path, relative to the workflow's file.
    datasets : list of str, optional
        Which of its data sets; default all.
    fetch : bool
        Make or download what is absent first. Off for downloads that nobody should start by accident.
    out : str
        Default folder of the stores and results.
    matrix : MatrixSection, optional
        Without it there is no matrix over all frames.
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
    """What each stage of a run did, and where the page is."""

    conversion: ConversionReport
    distances: DistancesReport
    correlation: CorrelationReport
    page: Path | str
    stores: dict[str, str] = field(default_factory=dict)
    matrix: MatrixReport | None = None

    @property
    def complete(self) -> bool:
        """Whether no sequence was quarantined, and no distance failed or is damaged."""
        failures = self.distances.failures or (self.matrix is not None and self.matrix.failures)
        return not (self.conversion.quarantined or failures or self.correlation.damaged)


def open_workflow(name: str | os.PathLike[str]) -> Workflow:
    """Read a workflow by name (``demo``) or path.

    Raises
    ------
    WorkflowError
        For unknown keys and wrong values, naming the file and the key.
    pipeline.resources.ResourceError
        When there is none of that name.
    """
    path = find_resource("workflows", name)
    content = read_yaml(path, WorkflowError)
    if isinstance(content, dict) and "training" in content:
        raise WorkflowError(f"{path} is a training file: run it with 'lsim train {name}'")
    workflow = validated(content, Workflow, path, WorkflowError)
    beside = path.parent / workflow.catalog
    # A name is a shipped catalog; whatever looks like a path starts where the workflow is.
    changes: dict[str, Any] = {"catalog": str(beside)} if beside.suffix in (".yaml", ".yml") else {}
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
    """Fetch, convert, compute distances, correlate, report; each stage only what is out of date.

    Parameters
    ----------
    workflow : Workflow
    cluster : Cluster
        Shared by the stages, started when the first has something to do.
    out : path or address, optional
        Instead of the workflow's own folder.
    data_dir : path, optional
        Where source data lies, see :mod:`pipeline.sources.catalog`.
    progress : callable
        Shows each stage's progress.
    announce : callable, optional
        Called with a line for what is about to be fetched, and with the plans of matrices of all frames,
        in words, before they are computed.
    verify_sources : bool, default False
        See :func:`pipeline.convert.convert`.

    Raises
    ------
    pipeline.storage.objects.ObjectStoreError
        When ``out`` is an address that cannot be opened.
    pipeline.sources.catalog.MissingDataError
        When source data is absent; says what to download.
    ValueError, lsim.UnknownMetricError, lsim.WeightsError
        For metrics that :func:`pipeline.metrics.settings.choose_metrics` refuses; before anything is fetched.
    """
    folder = absolute(out if out is not None else workflow.out)
    names = ("frames.zarr", "distances.zarr", "matrix.zarr", "results")
    frames, distances, all_frames, results = (join(folder, name) for name in names)
    catalog = open_catalog(workflow.catalog)
    store.exists(frames)  # an object store that doesn't answer is an error now, before anything is fetched
    choose_metrics(workflow.distances)
    section = workflow.matrix
    matrix_settings = section.settings(workflow.distances) if section is not None else None
    if matrix_settings is not None:
        choose_metrics(matrix_settings)
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
        computed = compute_distances(frames, distances, workflow.distances, cluster=cluster, progress=show)
    of_all_frames = None
    if section is not None and matrix_settings is not None:
        matrix = MatrixRequest(section.groups, section.together)
        with progress("matrix") as show:
            of_all_frames = compute_matrix(
                frames,
                all_frames,
                matrix_settings,
                matrix,
                cluster=cluster,
                progress=show,
                announce=announce,
            )
    with progress("correlate"):
        told = workflow.correlate
        correlation = correlate(
            distances, results, protocol=told.protocols, replicates=told.replicates, seed=told.seed
        )
    with progress("report"):
        maps_of = all_frames if of_all_frames is not None else None
        page = write_report(results, title=workflow.title or None, matrix=maps_of)
    stores = {"frames": frames, "distances": distances, "results": results}
    if of_all_frames is not None:
        stores["matrix"] = all_frames
    return WorkflowReport(conversion, computed, correlation, page, stores, of_all_frames)
