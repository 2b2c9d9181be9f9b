"""Run a whole workflow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.display import (
    announce,
    output,
    show_correlations,
    show_damaged,
    show_distances,
    show_matrix,
    show_quarantined,
    stage,
)
from pipeline.cli.options import (
    ClusterOption,
    DataDir,
    MaskOption,
    Options,
    OwnMetrics,
    PixelWeights,
    PrecisionOption,
    Strict,
    VerifySources,
    WeightsOption,
    Workers,
    exit_unless,
    make_importable,
    metric_names,
    parse_mask_and_precision,
    parse_options,
    parse_weights,
)


def run(
    workflow: Annotated[
        str, typer.Argument(help="Name of a shipped workflow (demo, lsim2d, own_weights) or a YAML file.")
    ],
    out: Annotated[
        str | None, typer.Option(help="Folder or address of stores and results; default the workflow's.")
    ] = None,
    data_dir: DataDir = None,
    metrics: Annotated[str | None, typer.Option(help="Instead of the workflow's: names, or 'all'.")] = None,
    own: OwnMetrics = None,
    option: Options = None,
    mask: MaskOption = None,
    precision: PrecisionOption = None,
    weights: WeightsOption = None,
    pixel_weights: PixelWeights = False,
    strict: Strict = False,
    verify_sources: VerifySources = False,
    cluster: ClusterOption = "local",
    workers: Workers = None,
) -> None:
    """Run a workflow: fetch, convert, distances, correlate, report; only what is out of date."""
    from pipeline.metrics.settings import Settings
    from pipeline.resources import find_resource
    from pipeline.workers.cluster import Cluster
    from pipeline.workers.profiles import load_profile
    from pipeline.workflow import open_workflow, run_workflow

    chosen = open_workflow(workflow)
    there = chosen.distances
    changes: dict[str, Any] = {
        "strict": strict or there.strict,
        "weights": there.weights | parse_weights(weights),
    }
    changes["metrics"] = metric_names(there.metrics if metrics is None else metrics, own)
    changes["options"] = parse_options(option, there.options)
    changes["pixel_weights"] = pixel_weights or there.pixel_weights
    changes |= parse_mask_and_precision(mask, precision)
    settings = Settings.model_validate(there.model_dump() | changes)
    make_importable(settings.metrics, Path.cwd(), find_resource("workflows", workflow).parent)
    chosen = chosen.model_copy(update={"distances": settings})
    with Cluster(load_profile(cluster, workers)) as pool:
        report = run_workflow(
            *(chosen, pool),
            out=out,
            data_dir=data_dir,
            progress=stage(pool),
            announce=announce,
            verify_sources=verify_sources,
        )
    show_quarantined(report.conversion.quarantined)
    show_distances(report.distances)
    if report.matrix is not None:
        show_matrix(report.matrix)
    show_correlations(report.correlation)
    show_damaged(report.correlation.damaged)
    output.print(f"report: {report.page}", markup=False)
    exit_unless(report.complete)
