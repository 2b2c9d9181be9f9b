"""Options that several commands have, and what their texts mean."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

if TYPE_CHECKING:
    from pipeline.metrics.settings import Settings

INCOMPLETE = 3
"""Exit code of a run that finished, and left something out."""

Names = Annotated[
    list[str] | None, typer.Option("--dataset", "-d", help="Only this data set; may be repeated.")
]
DataDir = Annotated[
    Path | None, typer.Option(help="Where source data lies; default $LSIM_DATA or the user cache.")
]
ClusterOption = Annotated[
    str,
    typer.Option(
        help="local, none, cuda, slurm, pbs, ssh, kubernetes, a profile's YAML file, or a scheduler's tcp:// "
        "or tls:// address."
    ),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Worker processes, instead of the profile's; local: one a core.")
]
WeightsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--weights",
        metavar="NAME=FILE",
        help="Weights of your own as a metric of that name; may be repeated.",
    ),
]
Groups = Annotated[
    str | None, typer.Option(help="Only these <dataset>/<field>, or patterns of them: A/density,B/*.")
]
Metrics = Annotated[str, typer.Option(help="Names separated by commas, or 'all'.")]
OwnMetrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        metavar="MODULE:CLASS",
        help="A metric of your own besides, importable from this folder; may be repeated.",
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="METRIC.OPTION=VALUE",
        help="Set an option of a metric, see 'lsim metrics NAME'; may be repeated.",
    ),
]
MaskOption = Annotated[
    str | None,
    typer.Option("--mask", help="nan: leave missing pixels out, for metrics that take a mask; or none."),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="exact; double: for frames that hardly differ; or ranking: faster, the same but for near-ties.",
    ),
]
PixelWeights = Annotated[
    bool,
    typer.Option(
        "--pixel-weights",
        help="Weight means over pixels by the field's weights, which its catalog names; needs --size 0.",
    ),
]
VerifySources = Annotated[
    bool,
    typer.Option(
        "--verify-sources",
        help="Decode all source files again and compare, whatever their sizes and times say.",
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Make a metric that 'all' would leave out an error.")]
ScopeOption = Annotated[
    str,
    typer.Option(
        help="Normalise over: sequence, pair, dataset, or a fixed LO,HI; none: values in their own units."
    ),
]
CommonScope = Annotated[
    str, typer.Option(help="Normalise over: dataset, all frames together; a fixed LO,HI; or none.")
]
Compat = Annotated[str, typer.Option(help="default, or published: the authors' evaluation.")]
Size = Annotated[int, typer.Option(help="Resize frames to this side; 0 keeps their size.")]
Order = Annotated[int, typer.Option(help="Spline order of the resize, 0 to 5.")]
Directed = Annotated[
    bool,
    typer.Option(
        "--directed", help="Keep both directions of metrics that aren't symmetric; rows are references."
    ),
]


def read_settings(
    metrics: Any, option: list[str] | None, weights: list[str] | None, others: Mapping[str, Any] | None = None
) -> Settings:
    """Make settings of the options that stages have in common; metrics of this folder can be imported."""
    from pipeline.metrics.settings import Settings

    given = {"metrics": metrics, "options": parse_options(option, {}), "weights": parse_weights(weights)}
    settings = Settings.model_validate(given | dict(others or {}))
    make_importable(settings.metrics, Path.cwd())
    return settings


def split_list(text: str | None) -> list[str] | None:
    """Split a text at commas; None stays None."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def metric_names(names: Any, own: list[str] | None = None) -> Any:
    """Read names of metrics, or ``"all"``, and add references to metrics of the user's own."""
    if isinstance(names, str) and names != "all":
        names = split_list(names)
    if not own:
        return names if names == "all" else tuple(names)
    if wrong := [name for name in own if ":" not in name]:
        raise typer.BadParameter(f"--metric {wrong[0]!r}: expected MODULE:CLASS; names go into --metrics")
    return (*(["all"] if names == "all" else names), *own)


def make_importable(metrics: Any, *folders: Path) -> None:
    """Let metrics given by reference be imported from these folders, by local workers as well.

    The folders come last on the path: no file of the user's may replace a module of a library.
    """
    if any(":" in name for name in metrics):
        sys.path += [folder for folder in map(str, folders) if folder not in sys.path]


def parse_options(
    texts: list[str] | None, known: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Read METRIC.OPTION=VALUE, values as in YAML, and add them to known options by metric."""
    by_metric = {metric: dict(options) for metric, options in known.items()}
    for text in texts or []:
        name, equals, value = text.partition("=")
        metric, dot, option = name.rpartition(".")
        if not (equals and dot and metric and option):
            raise typer.BadParameter(f"option {text!r}: expected METRIC.OPTION=VALUE")
        try:
            by_metric.setdefault(metric, {})[option] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise typer.BadParameter(f"option {text!r}: the value is no YAML: {error}") from error
    return by_metric


def parse_mask_and_precision(mask: str | None, precision: str | None) -> dict[str, Any]:
    """Read the mask and the precision, where they are given."""
    changes: dict[str, Any] = {} if mask is None else {"mask": None if mask == "none" else mask}
    return changes if precision is None else changes | {"precision": precision}


def parse_weights(texts: list[str] | None) -> dict[str, str]:
    """Read NAME=FILE, by name."""
    files = {}
    for text in texts or []:
        name, equals, file = text.partition("=")
        if not (name and equals and file):
            raise typer.BadParameter(f"weights {text!r}: expected NAME=FILE")
        files[name] = file
    return files


def parse_scope(text: str) -> Any:
    """Read a scope: a word, or the two numbers of LO,HI."""
    if "," not in text:
        return text
    try:
        lo, hi = (float(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"scope {text!r}: expected LO,HI, two numbers") from error
    return lo, hi


def exit_unless(complete: bool) -> None:
    """End with the exit code of an incomplete run, unless it is complete."""
    if not complete:
        raise typer.Exit(INCOMPLETE)
