"""Compute distances within sequences."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.display import show_distances, stage
from pipeline.cli.options import (
    ClusterOption,
    Compat,
    Directed,
    MaskOption,
    Metrics,
    Options,
    Order,
    OwnMetrics,
    PixelWeights,
    PrecisionOption,
    ScopeOption,
    Size,
    Strict,
    WeightsOption,
    Workers,
    exit_unless,
    metric_names,
    parse_mask_and_precision,
    parse_scope,
    read_settings,
)


def distances(
    frames: Annotated[
        str, typer.Argument(help="The frames.zarr to read; a path or an s3:// or gs:// address.")
    ],
    out: Annotated[str, typer.Option(help="Store to create or update; a path or an s3:// or gs:// address.")],
    metrics: Metrics = "all",
    references: OwnMetrics = None,
    option: Options = None,
    mask: MaskOption = None,
    precision: PrecisionOption = None,
    weights: WeightsOption = None,
    pixel_weights: PixelWeights = False,
    pairs: Annotated[
        str,
        typer.Option(help="Pairs of frames to compare: all, or reference for frame 0 with each other frame."),
    ] = "all",
    scope: ScopeOption = "sequence",
    compat: Compat = "default",
    size: Size = 224,
    order: Order = 0,
    block: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Sequences per block, the unit of work, of a new store. Default: about two seconds of work.",
        ),
    ] = None,
    directed: Directed = False,
    strict: Strict = False,
    cluster: ClusterOption = "local",
    workers: Workers = None,
) -> None:
    """Compute distances between the frames of each sequence, where they are new or out of date.

    To compare all frames of an archive with one another, use 'lsim matrix'.
    """
    from pipeline.distances import compute_distances
    from pipeline.workers.cluster import Cluster
    from pipeline.workers.profiles import load_profile

    stage_settings = {
        "size": size or None,
        "order": order,
        "compat": compat,
        "scope": parse_scope(scope),
        "pairs": pairs,
        "directed": directed,
        "strict": strict,
        "block": block,
        "pixel_weights": pixel_weights,
    }
    stage_settings |= parse_mask_and_precision(mask, precision)
    settings = read_settings(metric_names(metrics, references), option, weights, stage_settings)
    with Cluster(load_profile(cluster, workers)) as pool, stage(pool)("distances") as show:
        report = compute_distances(frames, out, settings, cluster=pool, progress=show)
    show_distances(report)
    exit_unless(not report.failures)
