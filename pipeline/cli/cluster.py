"""Check a cluster before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.display import (
    show_cluster,
)
from pipeline.cli.options import (
    Metrics,
    Options,
    OwnMetrics,
    WeightsOption,
    Workers,
    metric_names,
    read_settings,
)


def check(
    profile: Annotated[
        str, typer.Argument(help="A profile's name or YAML file, or a scheduler's tcp:// or tls:// address.")
    ],
    frames: Annotated[
        str | None, typer.Argument(help="A frames.zarr: what a run over it would take.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="That all workers see: a small archive lies there meanwhile. Not for local ones."),
    ] = None,
    metrics: Metrics = "all",
    own: OwnMetrics = None,
    option: Options = None,
    weights: WeightsOption = None,
    workers: Workers = None,
) -> None:
    """Start a cluster, look at its workers' versions and devices, and measure what a run would take."""
    from pipeline.cluster_check import check_cluster
    from pipeline.workers.profiles import load_profile

    settings = read_settings(metric_names(metrics, own), option, weights)
    found = check_cluster(load_profile(profile, workers), settings, folder=folder, frames=frames)
    show_cluster(found)
    if found.errors:
        raise typer.Exit(1)
