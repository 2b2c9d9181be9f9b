"""The tree of commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from pipeline.cli.cluster import check
from pipeline.cli.display import output
from pipeline.cli.distances import distances
from pipeline.cli.learning import export, simulate, train
from pipeline.cli.matrix import embed, matrix, neighbours
from pipeline.cli.metrics import fetch_weights, list_weights, metrics, verify_weights
from pipeline.cli.results import correlate, report, verify
from pipeline.cli.rollouts import compare, rank
from pipeline.cli.run import run
from pipeline.cli.sources import convert, fetch_catalog, list_catalogs, show_catalog, verify_catalog

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compute how far apart simulations are, with similarity metrics, over whole archives.",
)
COMMANDS = (
    *(run, convert, distances, matrix, compare, rank, correlate, report, neighbours, embed, verify),
    *(simulate, train, export, metrics),
)
for command in COMMANDS:
    app.command()(command)

GROUPS: dict[str, tuple[str, dict[str, Callable[..., None]]]] = {
    "catalog": (
        "List, download and check the source data that catalogs describe.",
        {"list": list_catalogs, "show": show_catalog, "fetch": fetch_catalog, "verify": verify_catalog},
    ),
    "weights": (
        "List, download and check the weights of learned metrics.",
        {"list": list_weights, "fetch": fetch_weights, "verify": verify_weights},
    ),
    "cluster": ("Check the clusters that runs compute on.", {"check": check}),
}
for group, (text, commands) in GROUPS.items():
    commands_of_group = typer.Typer(no_args_is_help=True, help=text)
    for name, function in commands.items():
        commands_of_group.command(name)(function)
    app.add_typer(commands_of_group, name=group)


def _show_version(requested: bool) -> None:
    from pipeline.storage.versions import versions

    if requested:
        output.print(f"lsim {versions()['lsim']}", markup=False)
        raise typer.Exit


@app.callback()
def root_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Print the version of lsim and exit."
        ),
    ] = False,
) -> None:
    """Read the options that stand before the name of a command."""
