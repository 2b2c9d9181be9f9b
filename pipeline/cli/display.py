"""How the command line shows what was done: progress bars, tables, one line where one will do."""

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


class _SafeConsole(Console):
    """A console that writes out control characters: names and reasons of others don't command a terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


console = _SafeConsole(stderr=True, highlight=False, emoji=False)
output = _SafeConsole(highlight=False, soft_wrap=True, emoji=False)

_reported_warnings: set[str] = set()


def show_warning_once(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning in one line, once in a run, without the line of code that raised it."""
    text = str(message)
    if text not in _reported_warnings:
        _reported_warnings.add(text)
        console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)


def forget_warnings() -> None:
    """Let warnings of earlier runs in this process be printed again."""
    _reported_warnings.clear()


def announce(text: str) -> None:
    """Print a line on what is about to be done, or on how it goes."""
    output.print(text, markup=False)


SHOWN = 8
"""Names of a list that may be long."""


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s", style="progress.data.speed")


def stage(cluster: Any) -> Callable[[str], contextlib.AbstractContextManager[Callable[[int, int], None]]]:
    """A progress bar a stage, with rate, remaining time, and the dashboard's address once there is one."""

    @contextlib.contextmanager
    def bar_of(title: str) -> Iterator[Callable[[int, int], None]]:
        columns = (
            *(TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), _Rate()),
            *(TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[dashboard]}")),
        )
        with Progress(*columns, console=console) as bars:
            bar = bars.add_task(title, total=None, dashboard="")

            def show(done: int, total: int) -> None:
                bars.update(
                    bar, completed=done, total=total, dashboard=getattr(cluster, "dashboard", None) or ""
                )

            yield show
            task = bars.tasks[0]
            bars.update(bar, total=task.completed or 1, completed=task.completed or 1)

    return bar_of


def add_row(table: Table, *cells: str) -> None:
    """A row of plain text: brackets in a path or a reason are no markup."""
    table.add_row(*map(escape, cells))


def show_simulation(report: Any, hardness: dict[str, float], measured: int) -> None:
    if report.made:
        rate = 60 * len(report.made) / max(report.seconds, 1e-9)
        output.print(
            f"{report.recipe}: {len(report.made)} families made, {len(report.present)} there already, "
            f"in {report.seconds:.1f} s ({rate:.1f}/min)",
            markup=False,
        )
    elif not report.unusable:
        written = report.conversion is not None and report.conversion.changed
        state = "no families to make" if written else "nothing to do"
        output.print(f"{state}: {len(report.present)} families are there", markup=False)
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(report.discarded.items()))
    output.print(f"draws discarded: {reasons or 'none'}", markup=False)
    if hardness:
        figures = ", ".join(f"{name} {value:.2f}" for name, value in hardness.items())
        output.print(
            f"hardness (Spearman correlation of the mean squared error, {measured} families): {figures}",
            markup=False,
        )
    if report.others:
        console.print(
            f"{len(report.others)} folders of other families lie in {report.folder}, too",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
    if report.unlike:
        more = f" and {len(report.unlike) - SHOWN} more" if len(report.unlike) > SHOWN else ""
        console.print(
            f"made with other settings: {', '.join(report.unlike[:SHOWN])}{more}",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
    if report.store:
        found = report.conversion
        output.print(
            f"store: {report.store}: {len(found.converted)} sequences written, {len(found.unchanged)} up to "
            f"date, {len(found.removed)} removed",
            markup=False,
        )
    if report.unusable:
        table = Table("family", "reason", title="Unusable: not made")
        for number, reason in sorted(report.unusable.items()):
            add_row(table, str(number), reason)
        console.print(table)
    if report.conversion:
        show_quarantined(report.conversion.quarantined)


def show_calibration(recipe: str, families: int, size: int, seed: int) -> None:
    from lsim.simulate import find_recipe
    from lsim.simulate.hardness import TARGET, calibrate_step

    found = calibrate_step(find_recipe(recipe), families=families, size=size, seed=seed)
    table = Table("factor of the steps", "hardness")
    for factor, hardness in found.evaluations:
        add_row(table, f"{factor:.3f}", f"{hardness:.3f}")
    output.print(table)
    wanted = f"{TARGET[0]:g} to {TARGET[1]:g}"
    state = f"within {wanted}" if found.reached else f"the nearest to {wanted} found"
    output.print(f"{recipe}: factor {found.factor:.3f}, hardness {found.hardness:.3f}: {state}", markup=False)


def show_quarantined(quarantined: list[Any]) -> None:
    if not quarantined:
        return
    table = Table("data set", "field", "sequence", "file", "reason", title="Quarantined: not converted")
    for entry in quarantined:
        add_row(table, entry.dataset, entry.field, entry.sequence, entry.file, entry.reason)
    console.print(table)


def show_distances(report: Any) -> None:
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
        measured = [size.seconds for size in report.sizes.values() if size.seconds is not None]
        took = f", {max(measured):.2g} s each at most, as measured on one sequence" if measured else ""
        console.print(f"sequences per block of new fields: {' or '.join(sorted(lengths, key=int))}{took}")
    if report.copies:
        console.print(f"{report.copies} tasks ran so long that a second copy was sent to another worker")
    if report.symmetrised:
        console.print(
            f"not symmetric, so half of d(a, b) + d(b, a): {', '.join(report.symmetrised)}", markup=False
        )
    _show_weighted(report.weighted)
    if report.unrecorded:
        console.print(
            f"{report.unrecorded} matrices were computed again: their record was damaged, or without a digest"
        )
    for name, reason in report.unavailable.items():
        console.print(f"left out: {name}: {reason}", style="yellow", markup=False, soft_wrap=True)
    _show_unresolved(report.unresolved)
    if report.failures:
        table = Table("data set", "field", "sequence", "metrics", "reason", title="Not compared")
        alike: dict[tuple[str, ...], list[str]] = {}
        for entry in report.failures:
            alike.setdefault((entry.dataset, entry.field, entry.sequence, entry.reason), []).append(
                entry.metric
            )
        for (*where, reason), metrics in alike.items():
            add_row(table, *where, ", ".join(metrics), reason)
        console.print(table)


def _show_weighted(metrics: Sequence[str]) -> None:
    if metrics:
        console.print(f"means weighted by the fields' weights of pixels: {', '.join(metrics)}", markup=False)


def _show_unresolved(unresolved: list[Any]) -> None:
    """A line for each metric with distances that its arithmetic doesn't resolve."""
    for one in unresolved:
        console.print(str(one), style="yellow", markup=False, soft_wrap=True)


def show_matrix(report: MatrixReport) -> None:
    if report.tiles:
        output.print(
            f"{report.tiles} tiles computed, {report.up_to_date} up to date, from {report.embeddings} "
            f"embeddings of {report.frames} frames, in {report.seconds:.1f} s"
        )
    elif not report.failures:
        output.print(f"nothing to do: {report.up_to_date} tiles are up to date")
    if report.copies:
        console.print(f"{report.copies} tasks ran so long that a second copy was sent to another worker")
    _show_weighted(report.weighted)
    for name, reason in report.unavailable.items():
        console.print(f"left out: {name}: {reason}", style="yellow", markup=False, soft_wrap=True)
    _show_unresolved(report.unresolved)
    if report.failures:
        table = Table("group", "metric", "frames", "reason", title="Not compared")
        for entry in report.failures:
            add_row(table, entry.group, entry.metric, entry.what, entry.reason)
        console.print(table)


def show_embeddings(report: EmbeddingsReport) -> None:
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
        output.print(f"{report.metric} is no Euclidean distance of its embeddings", markup=False)
    if report.failures:
        table = Table("field", "sequence", "frames", "reason", title="Not embedded")
        for entry in report.failures:
            add_row(table, entry.field, entry.sequence, _numbers(entry.numbers), entry.reason)
        console.print(table)


def _numbers(numbers: tuple[int, ...]) -> str:
    """The first few of some numbers, and how many more."""
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    return ", ".join(map(str, numbers[:SHOWN])) + more


def show_neighbours(found: Neighbours, *, as_json: bool) -> None:
    """A table of the nearest frames, with their distances by every metric; or the same as JSON."""
    nearest = [
        {"name": near.frame.name, "parameter": near.frame.parameter, "distances": near.distances}
        for near in found.nearest
    ]
    if as_json:
        about = {"of": found.of.name, "matrix": found.of.matrix, "metric": found.metric, "nearest": nearest}
        counts = {"compared": found.compared, "without_distance": found.without_distance}
        counts["unresolved"] = found.unresolved
        about["directed"] = found.directed
        output.print(json.dumps(_without_nan(about | counts), ensure_ascii=False), markup=False)
        return
    metrics = [found.metric, *(name for name in found.nearest[0].distances if name != found.metric)]
    # The frames' names come first, then as many metrics as a line holds, and the one that orders in any case.
    room = output.width - max(len(near.frame.name) for near in found.nearest) - len("| parameter |") - 4
    widths = itertools.accumulate(max(len(name), len("-1.234e-05")) + 3 for name in metrics)
    fitting = max(1, sum(width <= room for width in widths))
    metrics, left_out = metrics[:fitting], metrics[fitting:]
    table = Table("frame", "parameter", *map(escape, metrics))
    table.title = f"nearest to {escape(found.of.name)} by {escape(found.metric)}"
    for column in table.columns[1:]:
        column.justify = "right"
    for near in found.nearest:
        distances = [f"{near.distances[name]:.4g}" for name in metrics]
        add_row(table, near.frame.name, f"{near.frame.parameter:.3g}", *distances)
    output.print(table)
    if left_out:
        console.print(f"--json has the distances by {', '.join(left_out)} as well", markup=False)
    if found.without_distance:
        verb = "has" if found.without_distance == 1 else "have"
        console.print(
            f"{found.without_distance} of {found.compared} frames {verb} no distance to it: not comparable",
            style="yellow",
        )
    if found.directed:
        console.print(
            f"not symmetric, so the distances with {found.of.name} as the reference: "
            f"{', '.join(found.directed)}",
            markup=False,
        )
    _say_unresolved(found)


def _say_unresolved(found: Neighbours) -> None:
    """Say that rounding may have ordered frames, where it may."""
    if found.unresolved:
        console.print(
            f"{found.unresolved} distances by {found.metric} of the same sequence or tiles are below what "
            "their precision resolves: the nearest may stand in another order (--precision double)",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )


def _without_nan(value: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show_verified(report: Any) -> None:
    """What was read, and each damage with its chunk."""
    counted = {"frames": "sequences", "distances": "matrices", "matrix": "tiles"}.get(report.kind, "records")
    state = "whole" if report.whole else f"{len(report.damages)} damaged"
    output.print(f"{report.kind}: {report.chunks} chunks read, {report.compared} {counted} compared: {state}")
    if report.unfinished:
        console.print(f"{report.unfinished} {counted} are not there yet: a run was stopped, or left them out")
    for damage in report.damages:
        where = "/".join(filter(None, (damage.group, damage.array, damage.chunk)))
        output.print(f"damaged: {where} ({damage.what}): {damage.reason}", style="red", markup=False)


def show_damaged(damaged: Sequence[str]) -> None:
    """Name what isn't as it was written, and what to do."""
    for text in damaged[:SHOWN]:
        console.print(f"left out: {text}", style="red", markup=False, soft_wrap=True)
    if damaged:
        more = f"{len(damaged) - SHOWN} more are left out; " if len(damaged) > SHOWN else ""
        console.print(f"{more}'lsim verify' lists all, 'lsim verify --repair' has them made again")


def show_correlations(report: CorrelationReport) -> None:
    """Pooled Spearman per data set, best marked; the pools alone where a line doesn't hold all sets."""
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
            found = rows.query("metric == @metric and dataset == @dataset")["value"]
            value = float(found.iloc[0]) if len(found) else float("nan")
            cells.append(f"[bold]{value:.3f}[/]" if value == best[dataset] else f"{value:.3f}")
        table.add_row(escape(metric), *cells)
    output.print(table)


def show_cluster(found: Any) -> None:
    """Workers, what differs in their versions, and what a run would take."""
    table = Table("worker", "host", "threads", "device", "metrics loaded in", box=box.SIMPLE)
    for worker in found.workers:
        add_row(table, worker.name, worker.host, str(worker.threads), worker.device, f"{worker.load_s:.1f} s")
    output.print(table)
    tls = {True: "TLS", False: "no TLS", None: "no processes of its own"}[found.cluster.get("tls")]
    asked = f" of {found.expected} asked for" if len(found.workers) < found.expected else ""
    output.print(
        f"{len(found.workers)} worker(s){asked}, {found.threads} thread(s), "
        f"after {found.start_s:.1f} s; {tls}",
        markup=False,
    )
    alike: dict[str, list[str]] = {}
    for worker in found.workers:
        of_worker = ", ".join(f"{name} {version}" for name, version in worker.versions.items())
        alike.setdefault(of_worker, []).append(worker.name)
    for of_workers, names in alike.items():
        which = "all workers" if len(alike) == 1 else f"workers {', '.join(names)}"
        output.print(f"{which}: {of_workers}", markup=False)
    for line in found.warnings:
        console.print(f"differs: {line}", style="yellow", markup=False, soft_wrap=True)
    for line in found.errors:
        console.print(f"error: {line}", style="red", markup=False, soft_wrap=True)
    output.print(f"metrics: {', '.join(found.metrics)}", markup=False)
    if found.unavailable:
        output.print(f"not here: {', '.join(found.unavailable)}", markup=False)
    for field in found.estimates:
        rate = found.threads / field.sequence_s
        output.print(
            f"{field.key}: a sequence of {field.frames} frames takes {field.sequence_s:.2f} s of a thread; "
            f"{rate / found.threads:.2f}/s a thread, {rate:.1f}/s in all: "
            f"{field.sequences} sequences in {field.blocks} blocks, about {duration(field.total_s)}",
            markup=False,
        )
    if len(found.estimates) > 1:
        total = sum(field.total_s for field in found.estimates)
        output.print(f"all fields: about {duration(total)}", markup=False)


def duration(seconds: float) -> str:
    """As people say it: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
