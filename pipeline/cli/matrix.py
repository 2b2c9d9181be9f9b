"""Compare all frames of an archive: distances of all pairs, embeddings, nearest neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import pydantic
import typer

from pipeline.cli.display import (
    announce,
    show_damaged,
    show_embeddings,
    show_matrix,
    show_neighbours,
    stage,
)
from pipeline.cli.options import (
    ClusterOption,
    CommonScope,
    Compat,
    Directed,
    Groups,
    MaskOption,
    Metrics,
    Options,
    Order,
    OwnMetrics,
    PixelWeights,
    PrecisionOption,
    Size,
    Strict,
    WeightsOption,
    Workers,
    exit_unless,
    metric_names,
    parse_mask_and_precision,
    parse_scope,
    read_settings,
    split_list,
)

if TYPE_CHECKING:
    from pipeline.matrix import MatrixRequest


def matrix(
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
    groups: Groups = None,
    together: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Compute one matrix over all groups, with this name."),
    ] = None,
    scope: CommonScope = "dataset",
    compat: Compat = "default",
    size: Size = 224,
    order: Order = 0,
    tile: Annotated[
        int | None,
        typer.Option(min=1, help="Frames along each side of a tile, the unit of work, of a new store."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for each worker, for example 8GB.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print the estimated time and memory, and stop.")
    ] = False,
    directed: Directed = False,
    strict: Strict = False,
    cluster: ClusterOption = "local",
    workers: Workers = None,
) -> None:
    """Compute distances between all frames of an archive, in tiles, where they are new or out of date."""
    from pipeline.matrix import compute_matrix
    from pipeline.matrix.machines import shared_memory_profile
    from pipeline.workers.cluster import Cluster
    from pipeline.workers.profiles import load_profile

    stage_settings = {
        "size": size or None,
        "order": order,
        "compat": compat,
        "scope": parse_scope(scope),
        "directed": directed,
        "strict": strict,
        "pixel_weights": pixel_weights,
    }
    stage_settings |= parse_mask_and_precision(mask, precision)
    settings = read_settings(metric_names(metrics, references), option, weights, stage_settings)
    request = _matrix_request(groups, together, tile, memory)
    profile = shared_memory_profile(load_profile(cluster, workers))
    with Cluster(profile) as pool, stage(pool)("matrix") as show:
        report = compute_matrix(
            frames, out, settings, request, cluster=pool, progress=show, announce=announce, plan_only=plan
        )
    if not plan:
        show_matrix(report)
        exit_unless(not report.failures)


def _matrix_request(
    groups: str | None, together: str | None, tile: int | None, memory: str | None
) -> MatrixRequest:
    """Read the options that shape a matrix."""
    from pipeline.matrix import MatrixRequest

    try:
        memory_bytes = (
            None if memory is None else pydantic.TypeAdapter(pydantic.ByteSize).validate_python(memory)
        )
    except pydantic.ValidationError as error:
        raise typer.BadParameter(f"--memory {memory!r}: expected a size, for example 8GB") from error
    return MatrixRequest(tuple(split_list(groups) or ()), together, tile, memory_bytes)


def neighbours(
    distances: Annotated[
        str,
        typer.Argument(
            help="A matrix.zarr; or a distances.zarr, where a frame's neighbours are in its own sequence."
        ),
    ],
    of: Annotated[
        str,
        typer.Option(
            help="The frame: <dataset>/<field>/<sequence>:<number>, or the last parts of it if unambiguous."
        ),
    ],
    k: Annotated[int, typer.Option("--k", min=1, help="Number of neighbours.")] = 10,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Metric that orders frames. Default: lsim, else lsim-open, else the first in the store."
        ),
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Group of the matrix, if the frame is in several.")
    ] = None,
    other_sequences: Annotated[
        bool, typer.Option("--other-sequences", help="Leave out frames of the same sequence.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """List the frames nearest to a frame, from stored distances."""
    from pipeline.matrix.neighbours import find_neighbours

    neighbours = find_neighbours(distances, of, k, metric, matrix=group, other_sequences=other_sequences)
    show_neighbours(neighbours, as_json=as_json)
    show_damaged(neighbours.left_out)
    exit_unless(not neighbours.left_out)


def embed(
    frames: Annotated[
        str, typer.Argument(help="The frames.zarr to read; a path or an s3:// or gs:// address.")
    ],
    metric: Annotated[str, typer.Option(help="Metric that embeds the frames: a name, or MODULE:CLASS.")],
    out: Annotated[str, typer.Option(help="Store to create or update; a path or an s3:// or gs:// address.")],
    groups: Groups = None,
    scope: CommonScope = "dataset",
    option: Options = None,
    mask: MaskOption = None,
    precision: PrecisionOption = None,
    weights: WeightsOption = None,
    compat: Compat = "default",
    size: Size = 224,
    order: Order = 0,
    cluster: ClusterOption = "local",
    workers: Workers = None,
) -> None:
    """Write a metric's embedding of each frame, for search libraries, where it is new or out of date."""
    from pipeline.matrix.embeddings import compute_embeddings
    from pipeline.workers.cluster import Cluster
    from pipeline.workers.profiles import load_profile

    stage_settings = {"size": size or None, "order": order, "compat": compat, "scope": parse_scope(scope)}
    settings = read_settings(
        (metric,), option, weights, stage_settings | parse_mask_and_precision(mask, precision)
    )
    with Cluster(load_profile(cluster, workers)) as pool, stage(pool)("embed") as show:
        report = compute_embeddings(
            frames, out, settings, groups=split_list(groups), cluster=pool, progress=show
        )
    show_embeddings(report)
    exit_unless(not report.failures)
