"""Options that several commands share, and the parsers of their values."""

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
"""Exit code of a run that finished but left something out."""

Names = Annotated[
    list[str] | None,
    typer.Option("--dataset", "-d", help="Name of a data set to use; may be repeated. Default: all."),
]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder of the source data. Default: $LSIM_DATA, else the user cache.")
]
ClusterOption = Annotated[
    str,
    typer.Option(
        help="Where to compute: local (processes on this machine), none (this process), cuda, slurm, pbs, "
        "ssh, kubernetes, a profile's YAML file, or a running scheduler's tcp:// or tls:// address."
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Number of worker processes. Default: the profile's; for local, one per core."),
]
WeightsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--weights",
        metavar="NAME=FILE",
        help="Use weights of your own, from FILE, as the metric NAME; may be repeated.",
    ),
]
Groups = Annotated[
    str | None,
    typer.Option(
        help="Fields to use, <dataset>/<field>, separated by commas; patterns such as A/density,B/*. "
        "Default: all."
    ),
]
Metrics = Annotated[
    str,
    typer.Option(
        help="Names of metrics, separated by commas; or 'all' usable ones. 'lsim metrics' lists them."
    ),
]
OwnMetrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        metavar="MODULE:CLASS",
        help="Add a metric of your own; MODULE is installed or in the current folder. May be repeated.",
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="METRIC.OPTION=VALUE",
        help="Set an option of a metric; 'lsim metrics NAME' lists them. May be repeated.",
    ),
]
MaskOption = Annotated[
    str | None,
    typer.Option(
        "--mask",
        help="nan: leave missing pixels (NaN) out, in metrics that support it; none: use no mask.",
    ),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="exact; double: double precision, for frames that hardly differ; ranking: faster "
        "learned metrics, which may swap ranks of almost equal distances.",
    ),
]
PixelWeights = Annotated[
    bool,
    typer.Option(
        "--pixel-weights",
        help="Weight pixels in means by the field's weights, which the catalog names. Needs --size 0 "
        "(size: null in a workflow).",
    ),
]
VerifySources = Annotated[
    bool,
    typer.Option(
        "--verify-sources",
        help="Decode and compare all source files, even if their sizes and times have not changed.",
    ),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Fail if a metric of 'all' cannot be used, rather than leave it out.")
]
ScopeOption = Annotated[
    str,
    typer.Option(
        help="Normalise frames by the minimum and maximum of their sequence, pair or dataset, or by a fixed "
        "LO,HI; none: keep values in their own units."
    ),
]
CommonScope = Annotated[
    str,
    typer.Option(
        help="Normalise frames by the minimum and maximum of all frames together (dataset), or by a fixed "
        "LO,HI; none: keep values in their own units."
    ),
]
Compat = Annotated[
    str,
    typer.Option(help="Preprocessing: default, or published for that of the LSiM authors' evaluation."),
]
Size = Annotated[int, typer.Option(help="Side in pixels to which frames are resized; 0 keeps their size.")]
Order = Annotated[int, typer.Option(help="Order of the splines that resize frames, 0 to 5.")]
Directed = Annotated[
    bool,
    typer.Option(
        "--directed",
        help="For metrics that are not symmetric, store both directions, with rows as references, rather "
        "than their mean.",
    ),
]


def read_settings(
    metrics: Any,
    option: list[str] | None,
    weights: list[str] | None,
    stage_settings: Mapping[str, Any] | None = None,
) -> Settings:
    """Read the options that stages share, and make metrics in the current folder importable."""
    from pipeline.metrics.settings import Settings

    common = {"metrics": metrics, "options": parse_options(option, {}), "weights": parse_weights(weights)}
    settings = Settings.model_validate(common | dict(stage_settings or {}))
    make_importable(settings.metrics, Path.cwd())
    return settings


def split_list(text: str | None) -> list[str] | None:
    """Split a text at commas; None stays None."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def metric_names(names: Any, references: list[str] | None = None) -> Any:
    """Read names of metrics, or ``"all"``, and add references to custom metrics."""
    if isinstance(names, str) and names != "all":
        names = split_list(names)
    if not references:
        return names if names == "all" else tuple(names)
    if wrong := [name for name in references if ":" not in name]:
        raise typer.BadParameter(f"--metric {wrong[0]!r}: expected MODULE:CLASS; give names to --metrics")
    return (*(["all"] if names == "all" else names), *references)


def make_importable(metrics: Any, *folders: Path) -> None:
    """Let metrics given by reference be imported from these folders, by local workers as well.

    The folders come last on the path, so that a file of the user cannot replace a library's module.
    """
    if any(":" in name for name in metrics):
        sys.path += [folder for folder in map(str, folders) if folder not in sys.path]


def parse_options(
    texts: list[str] | None, defaults: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Read METRIC.OPTION=VALUE, with values in YAML, and add them to default options by metric."""
    by_metric = {metric: dict(options) for metric, options in defaults.items()}
    for text in texts or []:
        name, equals, value = text.partition("=")
        metric, dot, option = name.rpartition(".")
        if not (equals and dot and metric and option):
            raise typer.BadParameter(f"option {text!r}: expected METRIC.OPTION=VALUE")
        try:
            by_metric.setdefault(metric, {})[option] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise typer.BadParameter(f"option {text!r}: expected a value in YAML: {error}") from error
    return by_metric


def parse_mask_and_precision(mask: str | None, precision: str | None) -> dict[str, Any]:
    """Read the mask and the precision, if they are set."""
    changes: dict[str, Any] = {} if mask is None else {"mask": None if mask == "none" else mask}
    return changes if precision is None else changes | {"precision": precision}


def parse_weights(texts: list[str] | None) -> dict[str, str]:
    """Read NAME=FILE into files by name."""
    files = {}
    for text in texts or []:
        name, equals, file = text.partition("=")
        if not (name and equals and file):
            raise typer.BadParameter(f"weights {text!r}: expected NAME=FILE")
        files[name] = file
    return files


def parse_scope(text: str) -> Any:
    """Read a scope: a word, or two numbers LO,HI."""
    if "," not in text:
        return text
    try:
        lo, hi = (float(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"scope {text!r}: expected LO,HI, two numbers") from error
    return lo, hi


def exit_unless(complete: bool) -> None:
    """Exit with the code of an incomplete run, unless the run is complete."""
    if not complete:
        raise typer.Exit(INCOMPLETE)
