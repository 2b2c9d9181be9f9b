"""Compute distances within sequences."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.display import (
    show_distances,
    stage,
)
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
    frames: Annotated[str, typer.Argument(help="A frames.zarr; a path or an address, s3:// or gs://.")],
    out: Annotated[str, typer.Option(help="The store to make or bring up to date; a path or an address.")],
    metrics: Metrics = "all",
    own: OwnMetrics = None,
    option: Options = None,
    mask: MaskOption = None,
    precision: PrecisionOption = None,
    weights: WeightsOption = None,
    pixel_weights: PixelWeights = False,
    pairs: Annotated[str, typer.Option(help="all, or reference: frame 0 against the others only.")] = "all",
    scope: ScopeOption = "sequence",
    compat: Compat = "default",
    size: Size = 224,
    order: Order = 0,
    block: Annotated[int | None, typer.Option(min=1, help="Sequences per block of a new store.")] = None,
    directed: Directed = False,
    strict: Strict = False,
    cluster: ClusterOption = "local",
    workers: Workers = None,
) -> None:
    """Compute distances within each sequence; only what is new or out of date.

    'lsim matrix' compares all frames of an archive with one another.
    """
    from pipeline.distances import compute_distances
    from pipeline.workers.cluster import Cluster
    from pipeline.workers.profiles import load_profile

    others = {"size": size or None, "order": order, "compat": compat, "scope": parse_scope(scope)}
    others |= {
        "pairs": pairs,
        "directed": directed,
        "strict": strict,
        "block": block,
        "pixel_weights": pixel_weights,
    }
    others |= parse_mask_and_precision(mask, precision)
    settings = read_settings(metric_names(metrics, own), option, weights, others)
    with Cluster(load_profile(cluster, workers)) as pool, stage(pool)("distances") as show:
        report = compute_distances(frames, out, settings, cluster=pool, progress=show)
    show_distances(report)
    exit_unless(not report.failures)
