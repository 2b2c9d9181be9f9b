"""Display results in the terminal: progress bars, tables, and messages of one line."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from pipeline.storage.safe_names import printable

if TYPE_CHECKING:
    from pipeline.correlate import CorrelationReport
    from pipeline.matrix import MatrixReport
    from pipeline.matrix.embeddings import EmbeddingsReport
    from pipeline.matrix.neighbours import Neighbours
    from pipeline.rollouts import RolloutsReport
    from pipeline.rollouts.ranking import RankingReport


class _SafeConsole(Console):
    """A console that shows control characters as text, so that foreign names cannot control the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Render text without its control characters."""
        return super().render_str(printable(text), **options)


console = _SafeConsole(stderr=True, highlight=False, emoji=False)
output = _SafeConsole(highlight=False, soft_wrap=True, emoji=False)

_reported_warnings: set[str] = set()


def show_warning_once(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning in one line, once in a run, without the code that raised it."""
    text = str(message)
    if text not in _reported_warnings:
        _reported_warnings.add(text)
        console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)


def forget_warnings() -> None:
    """Allow warnings of earlier runs in this process to be printed again."""
    _reported_warnings.clear()


def announce(text: str) -> None:
    """Print a line about the next step or its progress."""
    output.print(text, markup=False)


SHOWN = 8
"""Number of entries shown of a list that may be long."""


class _Rate(ProgressColumn):
    """Column with the steps per second."""

    def render(self, task: Task) -> Text:
        """Render the rate; empty before the first step."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s", style="progress.data.speed")


def stage(cluster: Any) -> Callable[[str], contextlib.AbstractContextManager[Callable[[int, int], None]]]:
    """Make a function that shows a progress bar for a stage: rate, remaining time, the dashboard's address.

    Parameters
    ----------
    cluster : Cluster or None
        Its dashboard has an address once workers have started.
    """

    @contextlib.contextmanager
    def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[dashboard]}"),
        )
        with Progress(*columns, console=console) as bars:
            bar = bars.add_task(title, total=None, dashboard="")

            def show(count: int, total: int) -> None:
                dashboard = getattr(cluster, "dashboard", None) or ""
                bars.update(bar, completed=count, total=total, dashboard=dashboard)

            yield show
            # A stage without steps ends with a full bar, too.
            task = bars.tasks[0]
            bars.update(bar, total=task.completed or 1, completed=task.completed or 1)

    return progress_bar


def add_row(table: Table, *cells: str) -> None:
    """Add a row of plain text to a table: brackets in it are not markup."""
    table.add_row(*map(escape, cells))


def _warn(text: str) -> None:
    """Print a line in yellow to stderr."""
    console.print(text, style="yellow", markup=False, soft_wrap=True)


def show_simulation(report: Any, hardness: dict[str, float], sample_size: int) -> None:
    """Show the numbers of simulated and discarded families, and their hardness over a sample."""
    if report.made:
        rate = 60 * len(report.made) / max(report.seconds, 1e-9)
        output.print(
            f"{report.recipe}: {len(report.made)} families made, {len(report.present)} already there, "
            f"in {report.seconds:.1f} s ({rate:.1f}/min)",
            markup=False,
        )
    elif not report.unusable:
        is_written = report.conversion is not None and report.conversion.changed
        state = "no families to make" if is_written else "nothing to do"
        output.print(f"{state}: {len(report.present)} families are there", markup=False)
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(report.discarded.items()))
    output.print(f"draws discarded: {reasons or 'none'}", markup=False)
    if hardness:
        figures = ", ".join(f"{name} {value:.2f}" for name, value in hardness.items())
        output.print(
            f"hardness (Spearman correlation of the mean squared error, {sample_size} families): {figures}",
            markup=False,
        )
    if report.others:
        _warn(f"{report.folder} has {len(report.others)} folders of other families as well")
    if report.unlike:
        _warn(f"made with other settings: {_shortened(report.unlike)}")
    if report.store:
        conversion = report.conversion
        output.print(
            f"store: {report.store}: {len(conversion.converted)} sequences written, "
            f"{len(conversion.unchanged)} up to date, {len(conversion.removed)} removed",
            markup=False,
        )
    if report.unusable:
        unusable = sorted(report.unusable.items())
        _list_reasons("unusable, not made", [(f"family {number}", reason) for number, reason in unusable])
    if report.conversion:
        show_quarantined(report.conversion.quarantined)


def show_calibration(recipe: str, families: int, size: int, seed: int) -> None:
    """Search for the factor of a recipe's parameter steps that gives the target hardness, and show it."""
    from lsim.simulate import find_recipe
    from lsim.simulate.hardness import TARGET, calibrate_step

    calibration = calibrate_step(find_recipe(recipe), families=families, size=size, seed=seed)
    table = Table("factor of the steps", "hardness")
    for factor, hardness in calibration.evaluations:
        add_row(table, f"{factor:.3f}", f"{hardness:.3f}")
    output.print(table)
    target = f"the target of {TARGET[0]:g} to {TARGET[1]:g}"
    state = f"within {target}" if calibration.reached else f"the nearest to {target}"
    output.print(
        f"{recipe}: factor {calibration.factor:.3f}, hardness {calibration.hardness:.3f}: {state}",
        markup=False,
    )


def show_quarantined(quarantined: list[Any]) -> None:
    """Show the sequences that could not be converted, with the reasons."""
    if not quarantined:
        return
    _list_reasons(
        "quarantined, not converted",
        [
            (f"{entry.dataset}/{entry.field} {entry.sequence}", f"{entry.file}: {entry.reason}")
            for entry in quarantined
        ],
    )


def _list_reasons(title: str, entries: Sequence[tuple[str, str]]) -> None:
    """Print what failed, and why, on a line each: no width of the terminal shortens a file's name."""
    console.print(f"{title}:", style="yellow", markup=False)
    for place, reason in entries:
        console.print(f"  {place}: {reason}", markup=False, soft_wrap=True)


def show_distances(report: Any) -> None:
    """Show how many matrices were computed, what was left out, and what could not be compared."""
    if report.blocks:
        rate = report.computed / max(report.seconds, 1e-9)
        output.print(
            f"{report.computed} distance matrices computed, {report.up_to_date} up to date, "
            f"in {report.seconds:.1f} s ({rate:.1f}/s)"
        )
    elif not report.failures:
        output.print(f"nothing to do: {report.up_to_date} distance matrices are up to date")
    if report.sizes:
        lengths = {str(size.sequences) for size in report.sizes.values()}
        block_seconds = [size.seconds for size in report.sizes.values() if size.seconds is not None]
        duration = (
            f", {max(block_seconds):.2g} s each at most, as measured on one sequence" if block_seconds else ""
        )
        console.print(f"sequences per block of new fields: {' or '.join(sorted(lengths, key=int))}{duration}")
    if report.symmetrised:
        console.print(
            f"not symmetric, stored as ½ (d(a, b) + d(b, a)): {', '.join(report.symmetrised)}", markup=False
        )
    _show_weighted(report.weighted)
    if report.unrecorded:
        console.print(
            f"{report.unrecorded} matrices were computed again: their record was damaged or had no digest"
        )
    for name, reason in report.unavailable.items():
        _warn(f"left out: {name}: {reason}")
    _show_unresolved(report.unresolved)
    if report.failures:
        by_reason: dict[tuple[str, ...], list[str]] = {}
        for entry in report.failures:
            key = (entry.dataset, entry.field, entry.sequence, entry.reason)
            by_reason.setdefault(key, []).append(entry.metric)
        entries = [
            (f"{dataset}/{field} {sequence}, {', '.join(metrics)}", reason)
            for (dataset, field, sequence, reason), metrics in by_reason.items()
        ]
        _list_reasons("not compared", entries)


def _show_weighted(metrics: Sequence[str]) -> None:
    if metrics:
        console.print(f"weighted by the fields' pixel weights: {', '.join(metrics)}", markup=False)


def _show_unresolved(unresolved: list[Any]) -> None:
    """Warn about each metric with distances below its precision."""
    for metric in unresolved:
        _warn(str(metric))


def show_matrix(report: MatrixReport) -> None:
    """Show how many tiles were computed, what was left out, and what could not be compared."""
    if report.tiles:
        output.print(
            f"{report.tiles} tiles computed, {report.up_to_date} up to date, from {report.embeddings} "
            f"embeddings of {report.frames} frames, in {report.seconds:.1f} s"
        )
    elif not report.failures:
        output.print(f"nothing to do: {report.up_to_date} tiles are up to date")
    _show_weighted(report.weighted)
    for name, reason in report.unavailable.items():
        _warn(f"left out: {name}: {reason}")
    _show_unresolved(report.unresolved)
    if report.failures:
        entries = [(f"{entry.group} {entry.what}, {entry.metric}", entry.reason) for entry in report.failures]
        _list_reasons("not compared", entries)


def show_embeddings(report: EmbeddingsReport) -> None:
    """Show how many embeddings were computed, and which distance between them is the metric's."""
    values = " or ".join(sorted({str(length) for length in report.values.values()}, key=int))
    if report.computed:
        rate = report.computed / max(report.seconds, 1e-9)
        output.print(
            f"{report.computed} embeddings of {values} values computed, {report.up_to_date} up to date, in "
            f"{report.seconds:.1f} s ({rate:.1f}/s)"
        )
    elif not report.failures:
        output.print(f"nothing to do: {report.up_to_date} embeddings are up to date")
    if report.feature_distance:
        name = report.feature_distance.capitalize().replace("euclidean", "Euclidean")
        output.print(f"the {name} distance of two embeddings is {report.metric}", markup=False)
    else:
        output.print(f"{report.metric} is not a Euclidean distance of its embeddings", markup=False)
    if report.failures:
        entries = [
            (f"{entry.field} {entry.sequence}, frames {_shortened(entry.numbers)}", entry.reason)
            for entry in report.failures
        ]
        _list_reasons("not embedded", entries)


def show_rollouts(report: RolloutsReport) -> None:
    """Show how many rollouts were compared, and what could not be compared."""
    if report.blocks:
        output.print(
            f"{report.computed} rollouts compared, times metrics, {report.up_to_date} up to date, in "
            f"{report.seconds:.1f} s{f'; {report.scored} scores of ensembles' if report.scored else ''}"
        )
        if report.equal:
            output.print(
                f"{report.equal} rollouts, times metrics, equal the reference within rounding: their "
                "distances are 0"
            )
    elif not report.failures:
        output.print(f"nothing to do: {report.up_to_date} rollouts, times metrics, are up to date")
    if report.unmatched:
        entries = []
        for entry in report.unmatched:
            place = " ".join(part for part in (entry.model, entry.member, entry.sequence) if part)
            entries.append((f"{entry.dataset}/{entry.field} {place}", entry.reason))
        _list_reasons("without a partner", entries)
    if report.failures:
        by_reason: dict[tuple[str, str], list[str]] = {}
        for failure in report.failures:
            labels = (failure.model, failure.member, failure.sequence)
            place = f"{failure.dataset}/{failure.field} {' '.join(part for part in labels if part)}"
            by_reason.setdefault((place, failure.reason), []).append(failure.metric)
        entries = [
            (f"{place}, {', '.join(metrics)}", reason) for (place, reason), metrics in by_reason.items()
        ]
        _list_reasons("not compared, or in part", entries)


COLUMNS_OF_ERRORS = ("model", "value", "low", "high")


def show_ranking(report: RankingReport) -> None:
    """Show the errors of all models by field and metric, the best marked, and what could not be used."""
    overall = report.errors[report.errors["frame"] == -1]
    table = Table("field", "metric", "model", "error", "95 % interval", title="Mean error over time")
    for column in table.columns:
        column.overflow = "fold"
    for labels, rows in overall.groupby(["dataset", "field", "metric"], sort=False):
        dataset, field, metric = map(str, labels)
        best = report.best.get((dataset, field, metric))
        equals = report.equals.get((dataset, field, metric), [])
        table.add_section()
        names = (f"{dataset}/{field}", metric)
        for model, value, low, high in zip(*(rows[n] for n in COLUMNS_OF_ERRORS), strict=True):
            mark = " *" if model == best else " ≈" if model in equals else ""
            interval = f"{low:.3g} to {high:.3g}" if math.isfinite(low) else ""
            add_row(table, *names, str(model), f"{value:.4g}{mark}", interval)
            names = ("", "")
    output.print(table, soft_wrap=False)
    output.print("* least error; ≈ cannot be told from it (95 %, all pairs of models at once)")
    spread = report.spread
    for row in spread[(spread["frame"] == -1) & spread["ratio"].notna()].itertuples() if len(spread) else ():
        ratio = f"{row.ratio:.2f} [{row.low:.2f}, {row.high:.2f}]"
        output.print(
            f"{row.dataset}/{row.field}, {row.model}: spread / skill of {row.members} members {ratio}; near "
            "1 if they are reliable",
            markup=False,
        )
    incomplete = overall.groupby("model")["incomplete"].max()
    for model, count in incomplete[incomplete > 0].items():
        _warn(f"{model}: {count} rollouts are incomplete, and have no mean over time")
    for text in report.damaged:
        _warn(f"left out, not as it was written: {text}")


def _shortened(entries: Sequence[object]) -> str:
    """List the first few entries, and count the others."""
    suffix = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    return ", ".join(map(str, entries[:SHOWN])) + suffix


def show_neighbours(neighbours: Neighbours, *, as_json: bool) -> None:
    """Show the nearest frames with their distances by every metric, as a table or as JSON."""
    if as_json:
        _print_neighbours_json(neighbours)
        return
    name, metrics = neighbours.of.name, _fitting_metrics(neighbours)
    table = Table("frame", "parameter", *map(escape, metrics))
    table.title = f"nearest to {escape(name)} by {escape(neighbours.metric)}"
    for column in table.columns[1:]:
        column.justify = "right"
    for near in neighbours.nearest:
        distances = [f"{near.distances[metric]:.4g}" for metric in metrics]
        add_row(table, near.frame.name, f"{near.frame.parameter:.3g}", *distances)
    output.print(table)
    hidden = [metric for metric in neighbours.nearest[0].distances if metric not in metrics]
    if hidden:
        console.print(f"--json has the distances by {', '.join(hidden)} as well", markup=False)
    if neighbours.without_distance:
        verb = "has" if neighbours.without_distance == 1 else "have"
        _warn(
            f"{neighbours.without_distance} of {neighbours.compared} frames {verb} no distance to it: not "
            "comparable"
        )
    if neighbours.directed:
        console.print(
            f"not symmetric, distances with {name} as the reference: {', '.join(neighbours.directed)}",
            markup=False,
        )
    if neighbours.unresolved:
        _warn(
            f"{neighbours.unresolved} distances by {neighbours.metric} in these tiles or this sequence are "
            "below what their precision resolves: the order may be wrong; compute with --precision double"
        )


def _fitting_metrics(neighbours: Neighbours) -> list[str]:
    """List the metrics whose columns fit in a line after the names, but at least the one that orders."""
    names = neighbours.nearest[0].distances
    metrics = [neighbours.metric, *(name for name in names if name != neighbours.metric)]
    longest = max(len(near.frame.name) for near in neighbours.nearest)
    room = output.width - longest - len("| parameter |") - 4
    widths = itertools.accumulate(max(len(name), len("-1.234e-05")) + 3 for name in metrics)
    return metrics[: max(1, sum(width <= room for width in widths))]


def _print_neighbours_json(neighbours: Neighbours) -> None:
    nearest = [
        {"name": near.frame.name, "parameter": near.frame.parameter, "distances": near.distances}
        for near in neighbours.nearest
    ]
    result = {
        "of": neighbours.of.name,
        "matrix": neighbours.of.matrix,
        "metric": neighbours.metric,
        "nearest": nearest,
        "directed": neighbours.directed,
        "compared": neighbours.compared,
        "without_distance": neighbours.without_distance,
        "unresolved": neighbours.unresolved,
    }
    output.print(json.dumps(_without_nan(result), ensure_ascii=False), markup=False)


def _without_nan(value: Any) -> Any:
    """Replace numbers that JSON lacks, NaN and infinities, by null."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show_verified(report: Any) -> None:
    """Show how much of a store was checked, and each damage with its chunk."""
    unit = {"frames": "sequences", "distances": "matrices", "matrix": "tiles"}.get(report.kind, "records")
    state = "whole" if report.whole else f"{len(report.damages)} damaged"
    output.print(f"{report.kind}: {report.chunks} chunks read, {report.compared} {unit} compared: {state}")
    if report.unfinished:
        console.print(f"{report.unfinished} {unit} are missing: a run was stopped, or left them out")
    for damage in report.damages:
        location = "/".join(filter(None, (damage.group, damage.array, damage.chunk)))
        output.print(f"damaged: {location} ({damage.what}): {damage.reason}", style="red", markup=False)


def show_damaged(damaged: Sequence[str]) -> None:
    """Show damaged results that were left out, and the remedy."""
    for text in damaged[:SHOWN]:
        console.print(f"left out: {text}", style="red", markup=False, soft_wrap=True)
    if damaged:
        remainder = f"{len(damaged) - SHOWN} more are left out; " if len(damaged) > SHOWN else ""
        console.print(
            f"{remainder}'lsim verify' lists all; 'lsim verify --repair' lets the next run replace them"
        )


def show_correlations(report: CorrelationReport) -> None:
    """Show the Spearman correlation per data set and metric, the best in bold.

    If not all data sets fit in a line, only pools of them are shown.
    """
    correlations = report.correlations
    protocol = correlations["protocol"].iloc[0] if len(correlations) else ""
    rows = correlations.query("statistic == 'spearman' and field == 'all' and protocol == @protocol")
    datasets = list(dict.fromkeys(rows["dataset"]))
    if sum(max(len(name), 5) + 3 for name in ["lsim-strong-noise", *datasets]) > output.width:
        datasets = [name for name in datasets if name in report.pools] or datasets
    table = Table(
        "metric", *map(escape, datasets), title=f"Spearman correlation with ground truth ({protocol})"
    )
    best = rows.groupby("dataset")["value"].max()
    for metric in dict.fromkeys(rows["metric"]):
        cells = []
        for dataset in datasets:
            values = rows.query("metric == @metric and dataset == @dataset")["value"]
            value = float(values.iloc[0]) if len(values) else float("nan")
            cells.append(f"[bold]{value:.3f}[/]" if value == best[dataset] else f"{value:.3f}")
        table.add_row(escape(metric), *cells)
    output.print(table)


def show_cluster(report: Any) -> None:
    """Show the workers of a cluster, differences between them, and the time that a run would take."""
    table = Table("worker", "host", "threads", "device", "metrics loaded in", box=box.SIMPLE)
    for worker in report.workers:
        add_row(table, worker.name, worker.host, str(worker.threads), worker.device, f"{worker.load_s:.1f} s")
    output.print(table)
    tls = {True: "TLS", False: "no TLS", None: "no processes of its own"}[report.cluster.get("tls")]
    request = f" of {report.expected} requested" if len(report.workers) < report.expected else ""
    output.print(
        f"{len(report.workers)} worker(s){request}, {report.threads} thread(s), "
        f"after {report.start_s:.1f} s; {tls}",
        markup=False,
    )
    by_versions: dict[str, list[str]] = {}
    for worker in report.workers:
        versions = ", ".join(f"{name} {version}" for name, version in worker.versions.items())
        by_versions.setdefault(versions, []).append(worker.name)
    for versions, names in by_versions.items():
        label = "all workers" if len(by_versions) == 1 else f"workers {', '.join(names)}"
        output.print(f"{label}: {versions}", markup=False)
    for line in report.warnings:
        _warn(f"differs: {line}")
    for line in report.errors:
        console.print(f"error: {line}", style="red", markup=False, soft_wrap=True)
    output.print(f"metrics: {', '.join(report.metrics)}", markup=False)
    if report.unavailable:
        output.print(f"metrics that cannot be used: {', '.join(report.unavailable)}", markup=False)
    for field in report.estimates:
        rate = report.threads / field.sequence_s
        output.print(
            f"{field.key}: a sequence of {field.frames} frames takes {field.sequence_s:.2f} s of a thread; "
            f"{rate / report.threads:.2f}/s per thread, {rate:.1f}/s in all: "
            f"{field.sequences} sequences in {field.blocks} blocks, about {duration(field.total_s)}",
            markup=False,
        )
    if len(report.estimates) > 1:
        total = sum(field.total_s for field in report.estimates)
        output.print(f"all fields: about {duration(total)}", markup=False)


def duration(seconds: float) -> str:
    """Format a duration in a suitable unit: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
