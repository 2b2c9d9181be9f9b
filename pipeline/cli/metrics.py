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

from pipeline.cli.display import add_row, output
from pipeline.cli.options import make_importable


def metrics(
    name: Annotated[
        str | None,
        typer.Argument(help="A metric, or MODULE:CLASS of your own, to describe in detail."),
    ] = None,
) -> None:
    """List the metrics with their properties, or describe one metric in detail."""
    from lsim.registry import list_metrics, metric_class, why_unavailable

    if name is not None:
        make_importable([name], Path.cwd())
        _show_metric(name)
        return
    table = Table("metric", "description", "grad.", "mask", "sym.", "usable", box=box.SIMPLE)
    table.columns[0].no_wrap = True
    for column in table.columns[2:5]:
        column.justify = "center"
    missing: dict[str, list[str]] = {}
    for metric in list_metrics():
        cls = metric_class(metric)
        reason = why_unavailable(metric)
        if reason:
            remedy = _remedy(reason).replace(f"fetch {metric}", "fetch NAME")
            missing.setdefault(remedy, []).append(metric)
        properties = (cls.info.differentiable, cls.info.takes_mask, "symmetric" in cls.info.axioms)
        marks = ("✓" if has_property else "–" for has_property in properties)
        add_row(table, metric, cls.info.title, *marks, "no" if reason else "yes")
    output.print(table, soft_wrap=False)
    for remedy, names in missing.items():
        output.print(f"to use {', '.join(names)}: {remedy}", markup=False)
    output.print(
        "grad.: has a gradient; mask: can leave out missing pixels; sym.: symmetric, otherwise stores hold "
        "½ (d(a, b) + d(b, a)). 'lsim metrics NAME' describes a metric and its options",
        markup=False,
    )


def _remedy(reason: str) -> str:
    """Extract the command that a reason suggests; the whole reason if it suggests none."""
    command = re.search(r"(?:pip install|lsim weights fetch) [^\s;,()`']+(?:\[[^\]]*\][^\s;,()`']*)?", reason)
    return command.group() if command else reason


def _show_metric(name: str) -> None:
    """Print all properties of a metric, one a line."""
    from lsim.registry import metric_class, metric_name, why_unavailable

    cls = metric_class(name)
    info = cls.info
    sizes = f"at least {info.minimum_size}×{info.minimum_size} pixels"
    if info.advised_sizes:
        sizes += f", made for {info.advised_sizes[0]} to {info.advised_sizes[1]}"
    symmetric = "symmetric" in info.axioms
    to_itself = info.distance_to_itself
    properties = {
        "description": info.title,
        "source": info.source,
        "axioms": ", ".join(sorted(info.axioms)) or "none",
        "gradient": "yes" if info.differentiable else "no",
        "mask": "yes: missing pixels can be left out" if info.takes_mask else "no",
        "pixel weights": "yes: its means can be weighted" if info.takes_weights else "no",
        "symmetric": "yes" if symmetric else "no: stores hold ½ (d(a, b) + d(b, a)), unless --directed",
        "frame size": sizes,
        "d(a, a)": "depends on the frame" if math.isnan(to_itself) else f"{to_itself:g}",
        "units": "none" if info.units == "1" else info.units,
        "options": ", ".join(map(str, _signature(cls))) or "none",
        "usable": why_unavailable(name) or "yes",
    }
    output.print(metric_name(name), style="bold", markup=False)
    for label, text in properties.items():
        output.print(f"{label + ':':<15}{text}", markup=False)


def _signature(cls: type) -> list[inspect.Parameter]:
    """List a metric's options with their defaults."""
    parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    return [p.replace(annotation=p.empty) for p in parameters if p.kind is p.KEYWORD_ONLY]


def list_weights() -> None:
    """List shipped and published weights, and where they are stored."""
    from lsim.weights import PUBLISHED, SHIPPED, weights_status

    table = Table("weights", "state", "location, or how to get them", "licence")
    for entry in weights_status():
        add_row(table, entry.name, entry.state, entry.detail, (SHIPPED | PUBLISHED)[entry.name].licence)
    output.print(table)


def fetch_weights(
    name: Annotated[
        str, typer.Argument(help="Name of published weights, or 'all'. 'lsim weights list' shows the names.")
    ],
) -> None:
    """Download published weights into the user cache, and check their SHA-256."""
    from lsim.weights import PUBLISHED, fetch_weights

    for published in PUBLISHED if name == "all" else (name,):
        output.print(f"{published}: {fetch_weights(published)}", markup=False)


def verify_weights() -> None:
    """Check the SHA-256 of all weights on this machine."""
    from lsim.weights import weights_status

    entries = weights_status()
    for entry in entries:
        output.print(f"{entry.name}: {entry.state}: {entry.detail}", markup=False)
    raise typer.Exit(1 if any(entry.state == "damaged" for entry in entries) else 0)
