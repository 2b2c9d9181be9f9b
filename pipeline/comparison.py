"""Compare models with their reference, from files or stores: conversion, then the stage rollouts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pydantic

from pipeline.convert import Progress, Quarantined, convert
from pipeline.report import write_rollouts_report
from pipeline.resources import read_yaml, validated
from pipeline.rollouts import RolloutSettings, RolloutsReport, compare
from pipeline.rollouts.ranking import RankingReport, rank
from pipeline.sources.catalog import Catalog
from pipeline.sources.readers.well import is_well
from pipeline.storage import metadata, schema, store
from pipeline.storage.address import absolute, is_address, join
from pipeline.workers.cluster import Cluster

StageProgress: TypeAlias = Callable[[str], AbstractContextManager[Progress]]
"""Shows the progress of a stage by name."""

ARRAYS = (".npy", ".npz", ".pt")
"""Endings of files that the reader ``arrays`` opens; others are xarray's."""


class LayoutError(ValueError):
    """A layout with unknown keys or wrong values; names the file and the key."""


class Layout(pydantic.BaseModel):
    """Options by which readers open the files of a reference and of models.

    Attributes
    ----------
    dataset : str
        Name of the data set in the stores.
    reader : str, optional
        Default: ``arrays`` for ``.npy``, ``.npz`` and ``.pt``, ``well`` for files of The Well, ``xarray`` for
        others.
    options : dict
        Of the reader, for the reference and all models.
    reference, models : dict
        Options for the reference, or the models, alone.
    fields : list of str, or mapping
        As in catalogs.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    dataset: str = "data"
    reader: str | None = None
    options: dict[str, Any] = {}
    reference: dict[str, Any] = {}
    models: dict[str, Any] = {}
    fields: list[str] | dict[str, Any] = []


class ComparisonWorkflow(pydantic.BaseModel):
    """A workflow that compares models: a YAML file with the sections ``reference`` and ``models``.

    Attributes
    ----------
    title : str
    reference : str
        File or store, relative to the workflow's file.
    models : dict of str to str or list of str
        By model its file or store, or one for each member.
    out : str
        Folder of the stores and results.
    layout : Layout
    rollouts : RolloutSettings
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    title: str = ""
    reference: str
    models: dict[str, str | list[str]] = pydantic.Field(min_length=1)
    out: str
    layout: Layout = Layout()
    rollouts: RolloutSettings = RolloutSettings()


@dataclass
class ComparisonReport:
    """Reports of conversion and comparison, and where the results are."""

    rollouts: RolloutsReport
    store: str
    quarantined: list[Quarantined] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """True if everything was compared."""
        return not (self.quarantined or self.rollouts.failures or self.rollouts.unmatched)


def is_comparison(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file is a workflow that compares models: whether it has the section ``models``."""
    file = Path(path)
    content = read_yaml(file, LayoutError) if file.is_file() else None
    return isinstance(content, dict) and "models" in content


def run_comparison(
    workflow: ComparisonWorkflow,
    cluster: Cluster,
    *,
    out: str | os.PathLike[str] | None = None,
    progress: StageProgress,
) -> tuple[ComparisonReport, RankingReport, Path | str]:
    """Run all stages of a comparison, from conversion to the page; each computes what is out of date.

    Parameters
    ----------
    workflow : ComparisonWorkflow
    cluster : Cluster
    out : path or address, optional
        Folder of stores and results. Default: the workflow's.
    progress : callable

    Raises
    ------
    As :func:`compare_files` and :func:`pipeline.rollouts.ranking.rank` do.
    """
    folder = absolute(out if out is not None else workflow.out)
    compared = compare_files(
        workflow.reference,
        workflow.models,
        join(folder, "rollouts.zarr"),
        workflow.rollouts,
        cluster,
        layout=workflow.layout,
        progress=progress,
    )
    with progress("rank"):
        ranking = rank(compared.store, join(folder, "results"))
    with progress("report"):
        page = write_rollouts_report(join(folder, "results"), title=workflow.title or None)
    return compared, ranking, page


def open_layout(path: str | os.PathLike[str]) -> Layout:
    """Read a layout from a YAML file.

    Raises
    ------
    LayoutError
    """
    return validated(read_yaml(Path(path), LayoutError), Layout, Path(path), LayoutError)


def open_comparison(path: str | os.PathLike[str]) -> ComparisonWorkflow:
    """Read a workflow that compares models; paths in it are relative to its folder.

    Raises
    ------
    LayoutError
    """
    file = Path(path)
    workflow = validated(read_yaml(file, LayoutError), ComparisonWorkflow, file, LayoutError)

    def beside(name: str) -> str:
        return name if is_address(name) else str(file.parent / name)

    models: dict[str, str | list[str]] = {
        model: beside(paths) if isinstance(paths, str) else [beside(name) for name in paths]
        for model, paths in workflow.models.items()
    }
    return workflow.model_copy(update={"reference": beside(workflow.reference), "models": models})


def compare_files(
    reference: str,
    models: Mapping[str, str | Sequence[str]],
    out: str | os.PathLike[str],
    settings: RolloutSettings,
    cluster: Cluster,
    *,
    layout: Layout | None = None,
    progress: StageProgress,
) -> ComparisonReport:
    """Compare models with a reference, each a ``frames.zarr`` or files that a reader opens.

    Files are converted to stores in the folder ``<out without ending>-frames`` first; later runs convert what
    has changed.

    Parameters
    ----------
    reference : str
    models : mapping of str to str, or to a sequence of str
    out : path or address
        The ``rollouts.zarr``.
    settings : RolloutSettings
    cluster : Cluster
    layout : Layout, optional
    progress : callable

    Raises
    ------
    As :func:`pipeline.convert.convert` and :func:`pipeline.rollouts.compare` do.
    """
    layout = layout or Layout()
    out_path = absolute(out)
    folder = f"{out_path.removesuffix('.zarr')}-frames"
    quarantined: list[Quarantined] = []

    def as_store(path: str, name: str, options: Mapping[str, Any]) -> str:
        if _is_frames(path):
            return path
        target = join(folder, f"{name}.zarr")
        catalog = _catalog_of(path, layout, options)
        with progress("convert") as show:
            converted = convert(catalog, target, cluster=cluster, progress=show)
        quarantined.extend(converted.quarantined)
        return target

    reference_store = as_store(reference, "reference", layout.reference)
    stores: dict[str, list[str]] = {}
    for model, paths in models.items():
        listed = [paths] if isinstance(paths, str) else list(paths)
        stores[model] = [
            as_store(path, model if len(listed) == 1 else f"{model}-{number}", layout.models)
            for number, path in enumerate(listed)
        ]
    with progress("compare") as show:
        report = compare(reference_store, stores, out_path, settings, cluster=cluster, progress=show)
    return ComparisonReport(report, out_path, quarantined)


def _is_frames(path: str) -> bool:
    """Tell whether there is a ``frames.zarr`` at a path."""
    document = metadata.read_document(path)
    if document is None:
        return False
    try:
        return bool(store.open_store(path).attrs.get("kind") == schema.FRAMES_STORE)
    except (store.StoreError, ValueError, KeyError):
        return False


def _catalog_of(path: str, layout: Layout, options: Mapping[str, Any]) -> Catalog:
    """Make the catalog of one file or folder."""
    location = path if is_address(path) else str(Path(path).absolute())
    if not is_address(path) and not Path(path).exists():
        raise LayoutError(f"{path}: no such file or store")
    entry = {
        "name": layout.dataset,
        "source": {"path": location},
        "reader": layout.reader or _recognise(path),
        "options": {**layout.options, **options},
        "fields": layout.fields,
        "missing": "frames",
    }
    content = {"name": "comparison", "title": "comparison", "datasets": [entry]}
    return validated(content, Catalog, Path(path), LayoutError)


def _recognise(path: str) -> str:
    """Choose the reader of a file or folder."""
    if _holds_arrays(Path(path)):
        return "arrays"
    return "well" if is_well(path) else "xarray"


def _holds_arrays(path: Path) -> bool:
    """Tell whether a file, or those of a folder, are arrays without names of their axes."""
    if path.is_dir() and path.suffix.lower() != ".zarr":
        return any(child.suffix.lower() in ARRAYS for child in path.iterdir())
    return path.suffix.lower() in ARRAYS
