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
from typing import Any, Literal, TypeAlias

import pydantic

from pipeline.address import absolute, join
from pipeline.catalog import fetch, open_catalog
from pipeline.choice import Settings, choose_metrics
from pipeline.cluster import Cluster
from pipeline.convert import ConversionReport, convert
from pipeline.correlate import CorrelationReport, correlate
from pipeline.distances import DistancesReport, compute_distances
from pipeline.report import write_report
from pipeline.resources import find_resource, read_yaml, validated

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
    """

    title: str = ""
    catalog: str
    datasets: list[str] | None = None
    fetch: bool = False
    out: str
    distances: Settings = Settings()
    correlate: CorrelateSection = CorrelateSection()


@dataclass
class WorkflowReport:
    """What each stage of a run did, and where the page is."""

    conversion: ConversionReport
    distances: DistancesReport
    correlation: CorrelationReport
    page: Path | str
    stores: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether no sequence was quarantined and no distance failed."""
        return not (self.conversion.quarantined or self.distances.failures)


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
        Where source data lies, see :mod:`pipeline.catalog`.
    progress : callable
        Shows each stage's progress.

    Raises
    ------
    pipeline.catalog.MissingDataError
        When source data is absent; says what to download.
    ValueError, lsim.UnknownMetricError, lsim.WeightsError
        For metrics that :func:`pipeline.choice.choose_metrics` refuses; before anything is fetched.
    """
    folder = absolute(out if out is not None else workflow.out)
    frames, distances, results = (join(folder, name) for name in ("frames.zarr", "distances.zarr", "results"))
    catalog = open_catalog(workflow.catalog)
    choose_metrics(workflow.distances)
    if workflow.fetch:
        with progress("fetch"):
            fetch(catalog, workflow.datasets, data_dir)
    with progress("convert") as show:
        conversion = convert(
            catalog,
            frames,
            datasets=workflow.datasets,
            data_dir=data_dir,
            client=lambda: cluster.client,
            progress=show,
        )
    with progress("distances") as show:
        computed = compute_distances(frames, distances, workflow.distances, cluster=cluster, progress=show)
    with progress("correlate"):
        section = workflow.correlate
        correlation = correlate(
            distances, results, protocol=section.protocols, replicates=section.replicates, seed=section.seed
        )
    with progress("report"):
        page = write_report(results, title=workflow.title or None)
    stores = {"frames": frames, "distances": distances, "results": results}
    return WorkflowReport(conversion, computed, correlation, page, stores)
