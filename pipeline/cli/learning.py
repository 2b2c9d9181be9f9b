"""Simulate data sets, train the learned metric, and export it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.display import (
    announce,
    console,
    output,
    show_calibration,
    show_simulation,
    stage,
)
from pipeline.cli.options import (
    ClusterOption,
    Workers,
    exit_unless,
)

RANK_AND_PROCESSES = (("RANK", "0"), ("WORLD_SIZE", "1"))
"""Variables that torchrun sets for each process, and their values without it."""


def simulate(
    recipe: Annotated[str, typer.Argument(help="smoke, burgers, …; see docs/simulate.md")],
    out: Annotated[
        str | None, typer.Option(help="Folder of data sets; the families lie in OUT/RECIPE/.")
    ] = None,
    families: Annotated[int, typer.Option(min=1, help="How many, numbered from 1.")] = 10,
    size: Annotated[int, typer.Option(help="Pixels along each axis, even.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    format: Annotated[str, typer.Option(help="npz, png, or zarr: the store OUT.zarr beside.")] = "npz",
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Only search the factor of the steps that is right.")
    ] = False,
    cluster: ClusterOption = "local",
    workers: Workers = None,
) -> None:
    """Make simulations: families of a reference and ten more, only those that are not there yet."""
    from pipeline.simulate import measure_hardness, simulate
    from pipeline.workers.cluster import Cluster
    from pipeline.workers.profiles import load_profile

    if calibrate:
        show_calibration(recipe, families, size, seed)
        return
    if out is None:
        raise typer.BadParameter("--out is needed: the folder of data sets")
    with Cluster(load_profile(cluster, workers)) as pool, stage(pool)("simulate") as show:
        report = simulate(recipe, out, families, size, seed, format, cluster=pool, progress=show)  # type: ignore[arg-type]
    show_simulation(report, *measure_hardness(report))
    exit_unless(report.complete)


def train(
    config: Annotated[
        str, typer.Argument(help="Name of a shipped training file (train_lsim) or a YAML file.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default the file's.")] = None,
    data: Annotated[
        str | None, typer.Option(help="A frames.zarr, or a folder of data sets; default the file's.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Stop in good order after so long; the same command goes on.")
    ] = None,
    data_only: Annotated[
        bool, typer.Option("--data-only", help="Simulate what the file asks for, and stop.")
    ] = False,
    cluster: ClusterOption = "local",
    workers: Workers = None,
) -> None:
    """Train the learned metric, or go on with a run that was stopped; 'torchrun --no-python lsim train' too.

    What the file wants simulated is made first, by the cluster's workers; training itself doesn't use them.
    """
    from lsim.training import train
    from pipeline.train import describe_data, missing_data, open_sequences, open_training

    rank, processes = (int(os.environ.get(name, fallback)) for name, fallback in RANK_AND_PROCESSES)
    run = open_training(config)
    changes = {"out": out, "data": data}
    run = run.model_copy(update={key: str(path) for key, path in changes.items() if path is not None})
    missing = missing_data(run)
    if missing and processes > 1 and rank == 0:
        console.print(
            f"{run.data} lacks {sum(missing.values())} families of {', '.join(missing)}; one process can "
            f"make them: 'lsim train {config} --data-only'. Training goes on with what is there",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
    if missing and processes == 1:
        from pipeline.simulate import simulate
        from pipeline.workers.cluster import Cluster
        from pipeline.workers.profiles import load_profile

        with Cluster(load_profile(cluster, workers)) as pool:
            for recipe in missing:
                asked = run.simulate[recipe]
                with stage(pool)(recipe) as show:
                    report = simulate(
                        *(recipe, run.data, asked.families, asked.size, asked.seed),
                        cluster=pool,
                        progress=show,
                    )
                output.print(
                    f"{recipe}: {len(report.made)} families made, {len(report.present)} were there, "
                    f"{len(report.unusable)} of no use",
                    markup=False,
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
            f"{result.best:.3f} on the sequences held out; weights in {result.folder}",
            markup=False,
        )
        for reason in result.skipped.values():
            console.print(f"left out: {reason}", style="yellow", markup=False, soft_wrap=True)
    # A launcher of several processes would take any other code than 0 for a crash.
    exit_unless(not result.skipped or processes > 1)


def export(
    name: Annotated[str, typer.Argument(help="A learned metric; with --weights any name.")],
    format: Annotated[str, typer.Option(help="onnx, keras or safetensors.")],
    out: Annotated[Path, typer.Option(help="Folder of the files.")] = Path("."),
    weights: Annotated[str | None, typer.Option(help="A file of weights; default the metric's own.")] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Side of a Keras model's frames; default 224.")
    ] = None,
) -> None:
    """Write a learned metric for other frameworks, once it is found to compute the same there."""
    from lsim.export import export_metric

    exported = export_metric(name, format, out, weights=weights, size=size)  # type: ignore[arg-type]
    agreement = exported.agreement
    for path in exported.paths:
        output.print(str(path), markup=False)
    output.print(
        f"compared by {agreement.by} on {len(agreement.frames)} batches of random and plume frames: off by "
        f"{agreement.embedding:.1e} in embeddings and {agreement.distance:.1e} in distances, relative",
        markup=False,
    )
