"""Simulate data sets, train the learned metric, and export it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.display import (
    announce,
    console,
    output,
    show_calibration,
    show_simulation,
    stage,
)
from pipeline.cli.options import ClusterOption, Workers, exit_unless

if TYPE_CHECKING:
    from pipeline.train import TrainingRun

RANK_AND_PROCESSES = (("RANK", "0"), ("WORLD_SIZE", "1"))
"""Variables that torchrun sets for each process, and their values without it."""


def simulate(
    recipe: Annotated[
        str, typer.Argument(help="Name of the simulation: smoke, burgers, …; docs/simulate.md lists all.")
    ],
    out: Annotated[
        str | None, typer.Option(help="Folder of data sets. The simulations are written to OUT/RECIPE/.")
    ] = None,
    families: Annotated[int, typer.Option(min=1, help="Number of families.")] = 10,
    size: Annotated[int, typer.Option(help="Pixels along each axis; an even number.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 0,
    format: Annotated[
        str, typer.Option(help="Format of the files: npz, png, or zarr for npz and a store OUT.zarr.")
    ] = "npz",
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Write nothing; search for the parameter steps that make families suitably hard to rank.",
        ),
    ] = False,
    cluster: ClusterOption = "local",
    workers: Workers = None,
) -> None:
    """Simulate data: families of a reference and ten variations, where they are missing."""
    from pipeline.simulate import measure_hardness, simulate
    from pipeline.workers.cluster import Cluster
    from pipeline.workers.profiles import load_profile

    if calibrate:
        show_calibration(recipe, families, size, seed)
        return
    if out is None:
        raise typer.BadParameter("--out is missing: expected the folder of data sets")
    with Cluster(load_profile(cluster, workers)) as pool, stage(pool)("simulate") as show:
        report = simulate(recipe, out, families, size, seed, format, cluster=pool, progress=show)  # type: ignore[arg-type]
    show_simulation(report, *measure_hardness(report))
    exit_unless(report.complete)


def train(
    config: Annotated[
        str, typer.Argument(help="Training file: a YAML file, or the name of a shipped one (train_lsim).")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run. Default: the one in the training file.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Training data: a frames.zarr or a folder of data sets. Default: as in the training file."
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Save and stop after this many minutes; the same command continues the run."),
    ] = None,
    data_only: Annotated[
        bool, typer.Option("--data-only", help="Simulate the training data that is missing, and stop.")
    ] = False,
    cluster: ClusterOption = "local",
    workers: Workers = None,
) -> None:
    """Train the learned metric, or continue a run that was stopped.

    Missing training data is simulated first, on the cluster; training itself runs in this process. To train
    on several GPUs: 'torchrun --no-python lsim train …'.
    """
    from lsim.training import train
    from pipeline.train import describe_data, missing_data, open_sequences, open_training

    rank, processes = (int(os.environ.get(name, fallback)) for name, fallback in RANK_AND_PROCESSES)
    run = open_training(config)
    changes = {"out": out, "data": data}
    run = run.model_copy(update={key: str(path) for key, path in changes.items() if path is not None})
    missing = missing_data(run)
    if missing and processes == 1:
        _simulate_data(run, missing, cluster, workers)
    elif missing and rank == 0:
        console.print(
            f"{run.data} lacks {sum(missing.values())} families of {', '.join(missing)}; training continues "
            f"without them. To simulate them, run 'lsim train {config} --data-only' in one process",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
    if data_only:
        return
    result = train(
        open_sequences(run),
        run.training,
        run.out,
        minutes=minutes,
        about=describe_data(run),
        progress=announce,
    )
    if rank == 0:
        output.print(
            f"{result.epochs} epochs, {result.steps} steps ({result.stopped}): pooled Spearman "
            f"{result.best:.3f} on held-out sequences; weights in {result.folder}",
            markup=False,
        )
        for reason in result.skipped.values():
            console.print(f"left out: {reason}", style="yellow", markup=False, soft_wrap=True)
    # torchrun takes any exit code but 0 for a crash.
    exit_unless(not result.skipped or processes > 1)


def _simulate_data(run: TrainingRun, recipes: Iterable[str], cluster: str, workers: int | None) -> None:
    """Simulate the missing families of recipes, as a training file describes them."""
    from pipeline.simulate import simulate
    from pipeline.workers.cluster import Cluster
    from pipeline.workers.profiles import load_profile

    with Cluster(load_profile(cluster, workers)) as pool:
        for recipe in recipes:
            settings = run.simulate[recipe]
            with stage(pool)(recipe) as show:
                report = simulate(
                    recipe,
                    run.data,
                    settings.families,
                    settings.size,
                    settings.seed,
                    cluster=pool,
                    progress=show,
                )
            output.print(
                f"{recipe}: {len(report.made)} families made, {len(report.present)} already there, "
                f"{len(report.unusable)} unusable",
                markup=False,
            )


def export(
    name: Annotated[
        str, typer.Argument(help="Name of a learned metric; with --weights, a name for the exported one.")
    ],
    format: Annotated[str, typer.Option(help="Format of the files: onnx, keras or safetensors.")],
    out: Annotated[Path, typer.Option(help="Folder to write the files to.")] = Path("."),
    weights: Annotated[
        str | None, typer.Option(help="File of weights to export. Default: the metric's own.")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Side in pixels of the frames that a Keras model takes. Default: 224."),
    ] = None,
) -> None:
    """Write a learned metric for another framework, after a check that it computes the same there."""
    from lsim.export import export_metric

    exported = export_metric(name, format, out, weights=weights, size=size)  # type: ignore[arg-type]
    agreement = exported.agreement
    for path in exported.paths:
        output.print(str(path), markup=False)
    output.print(
        f"compared by {agreement.by} on {len(agreement.frames)} batches of random and plume frames: relative "
        f"difference {agreement.embedding:.1e} in embeddings and {agreement.distance:.1e} in distances",
        markup=False,
    )
