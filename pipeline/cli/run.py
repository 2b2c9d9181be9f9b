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
    show_ranking,
    show_rollouts,
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
        str,
        typer.Argument(
            help="Workflow: a YAML file, or the name of a shipped one (demo, lsim2d, own_weights)."
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(help="Folder or address of stores and results. Default: the one in the workflow."),
    ] = None,
    data_dir: DataDir = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Names of metrics, separated by commas, or 'all'. Default: as in the workflow."),
    ] = None,
    references: OwnMetrics = None,
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
    """Run all stages of a workflow, from source data to the report, where they are out of date."""
    from pipeline.comparison import is_comparison
    from pipeline.metrics.settings import Settings
    from pipeline.resources import find_resource
    from pipeline.workers.cluster import Cluster
    from pipeline.workers.profiles import load_profile
    from pipeline.workflow import open_workflow, run_workflow

    if is_comparison(workflow):
        overridden = (metrics, references, option, mask, precision, weights)
        _run_comparison(workflow, out, overridden, cluster, workers)
        return
    definition = open_workflow(workflow)
    defaults = definition.distances
    changes: dict[str, Any] = {
        "strict": strict or defaults.strict,
        "weights": defaults.weights | parse_weights(weights),
        "metrics": metric_names(defaults.metrics if metrics is None else metrics, references),
        "options": parse_options(option, defaults.options),
        "pixel_weights": pixel_weights or defaults.pixel_weights,
    }
    changes |= parse_mask_and_precision(mask, precision)
    settings = Settings.model_validate(defaults.model_dump() | changes)
    make_importable(settings.metrics, Path.cwd(), find_resource("workflows", workflow).parent)
    with Cluster(load_profile(cluster, workers)) as pool:
        report = run_workflow(
            definition.model_copy(update={"distances": settings}),
            pool,
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


def _run_comparison(
    workflow: str, out: str | None, overridden: tuple[Any, ...], cluster: str, workers: int | None
) -> None:
    """Run a workflow that compares models with their reference."""
    from pipeline.comparison import open_comparison, run_comparison
    from pipeline.workers.cluster import Cluster
    from pipeline.workers.profiles import load_profile

    if any(overridden):
        raise typer.BadParameter(
            f"{workflow} compares models: set metrics and their options in its section rollouts"
        )
    opened = open_comparison(workflow)
    make_importable(opened.rollouts.metrics, Path.cwd(), Path(workflow).parent)
    with Cluster(load_profile(cluster, workers)) as pool:
        compared, ranking, page = run_comparison(opened, pool, out=out, progress=stage(pool))
    show_quarantined(compared.quarantined)
    show_rollouts(compared.rollouts)
    show_ranking(ranking)
    output.print(f"report: {page}", markup=False)
    exit_unless(compared.complete and not ranking.damaged)
