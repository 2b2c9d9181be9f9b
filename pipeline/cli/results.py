"""Correlate distances with ground truth, write reports, and check stores."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipeline.cli.display import (
    console,
    output,
    show_correlations,
    show_damaged,
    show_verified,
    stage,
)
from pipeline.cli.options import exit_unless


def correlate(
    distances: Annotated[
        str, typer.Argument(help="The distances.zarr to read; a path or an s3:// or gs:// address.")
    ],
    out: Annotated[str, typer.Option(help="Folder or address to write the results to.")],
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            help="Distances to correlate: published (frame 0 with each other frame) or all-pairs; may be "
            "repeated. Default: published."
        ),
    ] = None,
    replicates: Annotated[
        int, typer.Option(min=0, help="Number of bootstrap replicates; 0: no intervals.")
    ] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap's random numbers.")] = 0,
) -> None:
    """Correlate distances with ground truth, with bootstrap confidence intervals over sequences."""
    from pipeline.correlate import LEFT_OUT, correlate
    from pipeline.storage.address import join

    protocols: Any = protocol or ["published"]
    report = correlate(distances, out, protocol=protocols, replicates=replicates, seed=seed)
    show_correlations(report)
    for note in report.notes:
        console.print(note, markup=False)
    if len(report.left_out):
        console.print(
            f"{len(report.left_out)} pairs of sequence and metric left out, listed in {join(out, LEFT_OUT)}",
            markup=False,
        )
    if report.up_to_date:
        output.print("nothing to do: the results are up to date")
    show_damaged(report.damaged)
    exit_unless(not report.damaged)


def report(
    results: Annotated[
        str,
        typer.Argument(
            help="Folder or address of the results of 'lsim correlate'; folder of those of 'lsim rank'; or "
            "a matrix.zarr, for its maps alone."
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(help="Folder of the page. Default: RESULTS/report; for a matrix.zarr: report."),
    ] = None,
    matrix: Annotated[str | None, typer.Option(help="A matrix.zarr whose maps are added.")] = None,
) -> None:
    """Write an HTML report of correlations, of a matrix of all frames, of both, or of a ranking of models."""
    from pipeline.report import (
        is_matrix,
        is_ranking,
        write_matrix_report,
        write_report,
        write_rollouts_report,
    )

    if matrix is None and is_ranking(results):
        page = write_rollouts_report(results, out=out)
    elif not is_matrix(results):
        page = write_report(results, out=out, matrix=matrix)
    elif matrix is None:
        page = write_matrix_report(results, out or "report")
    else:
        raise typer.BadParameter(
            f"{results} is a matrix.zarr: with --matrix, expected a folder of results before it"
        )
    output.print(f"report: {page}", markup=False)


def verify(
    path: Annotated[
        str,
        typer.Argument(
            metavar="STORE",
            help="The store to check: of frames, distances, a matrix, embeddings or rollouts.",
        ),
    ],
    should_repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Remove the records of damaged values, so that the next run computes them again."
        ),
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="Number of threads that read and check.")] = 8,
) -> None:
    """Check each chunk of a store against its checksum, and its values against their record."""
    from pipeline.storage.metadata import DOCUMENT
    from pipeline.verify import verify
    from pipeline.verify.damage import is_of_root
    from pipeline.verify.repair import repair

    with stage(None)("verify") as show:
        report = verify(path, threads=threads, progress=show)
    show_verified(report)
    if should_repair and not report.whole:
        count = repair(path, report)
        stages = {"frames": "convert", "distances": "distances", "matrix": "matrix", "embeddings": "embed"}
        stages["rollouts"] = "compare"
        restored = sum(damage.chunk == DOCUMENT for damage in report.damages)
        actions = [f"{count} records removed"] if count else []
        actions += [f"metadata of {restored} groups and arrays written again"] if restored else []
        advice = (
            "lsim verify --repair" if any(map(is_of_root, report.damages)) else f"lsim {stages[report.kind]}"
        )
        output.print(f"{'; '.join(actions) or 'nothing to remove'}: run '{advice}' again", markup=False)
    if not report.whole:
        raise typer.Exit(1)
