"""Compare models with their reference."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipeline.cli.display import show_quarantined, show_ranking, show_rollouts, stage
from pipeline.cli.options import (
    ClusterOption,
    MaskOption,
    Options,
    OwnMetrics,
    PrecisionOption,
    WeightsOption,
    Workers,
    exit_unless,
    metric_names,
    parse_mask_and_precision,
    parse_options,
    parse_scope,
    parse_weights,
)


def compare(
    reference: Annotated[
        str, typer.Argument(help="Trajectories to compare with: a frames.zarr, or files that a reader opens.")
    ],
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL=STORE...",
            help="Rollouts of each model, a frames.zarr or files; the same MODEL again for another member.",
        ),
    ],
    out: Annotated[str, typer.Option(help="Store to create or update, such as rollouts.zarr.")],
    metrics: Annotated[
        str, typer.Option(help="Names of metrics, separated by commas. 'lsim metrics' lists them.")
    ] = "l2,vrmse,lsim-open",
    own: OwnMetrics = None,
    option: Options = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help="Frames whose range normalises values: none, reference, each, pair, dataset, or LO,HI. "
            "Default: none for metrics of physical values, reference for others."
        ),
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="acdm: l2 on raw values, lsim with scope each (arXiv 2309.01745).")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="Compare persistence, or mean, of the reference, too. May be repeated."),
    ] = None,
    ensembles: Annotated[
        bool,
        typer.Option(
            help="Where a model has several members, score them together: CRPS, spread and skill, energy."
        ),
    ] = True,
    spectra: Annotated[
        str,
        typer.Option(
            metavar="COUNT|TIME,...",
            help="Times at which energies by wavenumber are measured: so many, or those nearest to TIME,... "
            "(one: TIME,); 0: none.",
        ),
    ] = "4",
    size: Annotated[
        int, typer.Option(min=0, help="Resize frames to SIZE×SIZE. Default: 0, their own size.")
    ] = 0,
    mask: MaskOption = None,
    precision: PrecisionOption = None,
    weights: WeightsOption = None,
    layout: Annotated[
        str | None, typer.Option(help="YAML file that says how files are read, see docs/compare.md.")
    ] = None,
    cluster: ClusterOption = "local",
    workers: Workers = None,
) -> None:
    """Compare rollouts of models with the trajectories of a reference, frame by frame in time."""
    from pipeline.comparison import compare_files, open_layout
    from pipeline.rollouts import RolloutSettings
    from pipeline.workers.cluster import Cluster
    from pipeline.workers.profiles import load_profile

    chosen: dict[str, Any] = {
        "metrics": metric_names(metrics, own),
        "options": parse_options(option, {}),
        "scope": None if scope is None else parse_scope(scope),
        "protocol": protocol,
        "baselines": baseline or (),
        "ensembles": ensembles,
        "spectra": _parse_spectra(spectra),
        "size": size or None,
        "weights": parse_weights(weights),
    }
    chosen |= parse_mask_and_precision(mask, precision)
    settings = RolloutSettings.model_validate(chosen)
    opened = open_layout(layout) if layout is not None else None
    with Cluster(load_profile(cluster, workers)) as pool:
        report = compare_files(
            reference, parse_models(models), out, settings, pool, layout=opened, progress=stage(pool)
        )
    show_quarantined(report.quarantined)
    show_rollouts(report.rollouts)
    exit_unless(report.complete)


def _parse_spectra(text: str) -> int | tuple[float, ...]:
    """Read a count, or times that commas follow."""
    try:
        return tuple(float(part) for part in text.split(",") if part) if "," in text else int(text)
    except ValueError as error:
        raise typer.BadParameter(f"spectra {text!r}: expected COUNT, or TIME,TIME,...") from error


def rank(
    rollouts: Annotated[str, typer.Argument(help="The rollouts.zarr to rank; a path or an address.")],
    out: Annotated[str, typer.Option(help="Folder of the tables and the page.")] = "results",
    replicates: Annotated[
        int, typer.Option(min=0, help="Bootstrap replicates for the intervals; 0 computes none.")
    ] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC=DISTANCE",
            help="Distance from which on a rollout is not valid any more. Default: correlation=0.2.",
        ),
    ] = None,
) -> None:
    """Rank models by their errors, with intervals, and find from when on they drift."""
    from pipeline.rollouts.ranking import rank

    thresholds = None if threshold is None else dict(map(_parse_threshold, threshold))
    report = rank(rollouts, out, replicates=replicates, seed=seed, thresholds=thresholds)
    show_ranking(report)
    exit_unless(not report.damaged)


def _parse_threshold(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise typer.BadParameter(f"threshold {text!r}: expected METRIC=DISTANCE") from error


def parse_models(texts: list[str]) -> dict[str, list[str]]:
    """Read MODEL=STORE into stores by model."""
    models: dict[str, list[str]] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise typer.BadParameter(f"model {text!r}: expected MODEL=STORE, such as unet=unet.zarr")
        models.setdefault(name, []).append(path)
    return models
