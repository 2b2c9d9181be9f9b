"""List metrics, and the weights of learned ones."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from pipeline.cli.display import (
    add_row,
    output,
)
from pipeline.cli.options import (
    make_importable,
)


def metrics(
    name: Annotated[
        str | None, typer.Argument(help="All that is known of this one; or MODULE:CLASS.")
    ] = None,
) -> None:
    """List the metrics, what they can do, and whether they can be used here."""
    from lsim.registry import list_metrics, metric_class, why_unavailable

    if name is not None:
        make_importable([name], Path.cwd())
        _show_metric(name)
        return
    table = Table("metric", "what it is", "grad.", "mask", "sym.", "here", box=box.SIMPLE)
    table.columns[0].no_wrap = True
    for column in table.columns[2:5]:
        column.justify = "center"
    missing: dict[str, list[str]] = {}
    for known in list_metrics():
        cls = metric_class(known)
        if reason := why_unavailable(known):
            missing.setdefault(_command_in(reason).replace(f"fetch {known}", "fetch NAME"), []).append(known)
        marks = (cls.info.differentiable, cls.info.takes_mask, "symmetric" in cls.info.axioms)
        here = "no" if reason else "yes"
        add_row(table, known, cls.info.title, *("✓" if mark else "–" for mark in marks), here)
    output.print(table, soft_wrap=False)
    for command, names in missing.items():
        output.print(f"to have {', '.join(names)}: {command}", markup=False)
    output.print(
        "grad.: has a gradient; mask: can leave out missing pixels; sym.: symmetric, and where not, archives "
        "hold ½ (d(a, b) + d(b, a)). Options, and all else of one: lsim metrics NAME",
        markup=False,
    )


def _command_in(reason: str) -> str:
    """The command that a reason names, where it names one on its own; else the reason."""
    found = re.search(r"(?:pip install|lsim weights fetch) [^\s;,()`']+(?:\[[^\]]*\][^\s;,()`']*)?", reason)
    return found.group() if found else reason


def _show_metric(name: str) -> None:
    from lsim.registry import metric_class, metric_name, why_unavailable

    cls = metric_class(name)
    info = cls.info
    sizes = f"{info.minimum_size}×{info.minimum_size} at least"
    if info.advised_sizes:
        sizes += f", made for {info.advised_sizes[0]} to {info.advised_sizes[1]}"
    symmetric = "symmetric" in info.axioms
    about = {
        "what it is": info.title,
        "source": info.source,
        "claims": ", ".join(sorted(info.axioms)) or "nothing",
        "gradient": "yes" if info.differentiable else "no",
        "mask": "yes: missing pixels can be left out" if info.takes_mask else "no",
        "weights": "yes: of pixels, in its means" if info.takes_weights else "no",
        "symmetric": "yes" if symmetric else "no: stores hold ½ (d(a, b) + d(b, a)), unless told --directed",
        "frames": sizes,
        "to itself": "depends on the frame" if math.isnan(own := info.distance_to_itself) else f"{own:g}",
        "units": "none" if info.units == "1" else info.units,
        "options": ", ".join(map(str, _signature(cls))) or "none",
        "here": why_unavailable(name) or "yes",
    }
    output.print(metric_name(name), style="bold", markup=False)
    for label, text in about.items():
        output.print(f"{label + ':':<12}{text}", markup=False)


def _signature(cls: type) -> list[inspect.Parameter]:
    parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    return [p.replace(annotation=p.empty) for p in parameters if p.kind is p.KEYWORD_ONLY]


def list_weights() -> None:
    """List shipped and published weights and where they are."""
    from lsim.weights import PUBLISHED, SHIPPED, weights_status

    table = Table("weights", "state", "where, or how to get them", "licence")
    for entry in weights_status():
        add_row(table, entry.name, entry.state, entry.detail, (SHIPPED | PUBLISHED)[entry.name].licence)
    output.print(table)


def fetch_weights(
    name: Annotated[str, typer.Argument(help="Name of published weights, or 'all'.")],
) -> None:
    """Download weights from their publisher into the user cache, and check their SHA-256."""
    from lsim.weights import PUBLISHED, fetch_weights

    for wanted in PUBLISHED if name == "all" else (name,):
        output.print(f"{wanted}: {fetch_weights(wanted)}", markup=False)


def verify_weights() -> None:
    """Check the SHA-256 of all weights that are here."""
    from lsim.weights import weights_status

    entries = weights_status()
    for entry in entries:
        output.print(f"{entry.name}: {entry.state}: {entry.detail}", markup=False)
    raise typer.Exit(1 if any(entry.state == "damaged" for entry in entries) else 0)
