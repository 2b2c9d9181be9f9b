"""Check a cluster before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.display import show_cluster
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
        str,
        typer.Argument(
            help="Name or YAML file of a cluster profile, or the tcp:// or tls:// address of a running "
            "scheduler."
        ),
    ],
    frames: Annotated[
        str | None, typer.Argument(help="A frames.zarr for which to estimate the time of a run.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder that all workers can access, for a small temporary archive. Not needed for local "
            "workers."
        ),
    ] = None,
    metrics: Metrics = "all",
    references: OwnMetrics = None,
    option: Options = None,
    weights: WeightsOption = None,
    workers: Workers = None,
) -> None:
    """Start a cluster, compare its workers' versions and devices, and measure their speed."""
    from pipeline.cluster_check import check_cluster
    from pipeline.workers.profiles import load_profile

    settings = read_settings(metric_names(metrics, references), option, weights)
    report = check_cluster(load_profile(profile, workers), settings, folder=folder, frames=frames)
    show_cluster(report)
    if report.errors:
        raise typer.Exit(1)
