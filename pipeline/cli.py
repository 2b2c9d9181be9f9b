"""The command ``lsim``: one sub-command a stage, and ``run`` for all of them.

Exit codes: 0 all is well; 1 an error, said in one line; 2 wrong usage; 3 finished, but some sequences were
quarantined or could not be compared; 130 interrupted, 143 ended by a batch system (SIGTERM), and a second
run goes on where this one stopped.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import random
import re
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import pydantic
import typer
import yaml
from rich import box
from rich.table import Table

from pipeline.display import (
    add_row,
    console,
    output,
    show_archive,
    show_calibration,
    show_cluster,
    show_correlations,
    show_damaged,
    show_distances,
    show_embeddings,
    show_neighbours,
    show_quarantined,
    show_simulation,
    show_verified,
    stage,
)
from pipeline.workers import stopping

if TYPE_CHECKING:
    from pipeline.archive import MatrixRequest
    from pipeline.metric_choice import Settings
    from pipeline.workers.profiles import Profile

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="How far apart are two simulations? Similarity metrics over whole archives.",
)
catalog_app = typer.Typer(
    no_args_is_help=True, help="What data there is, where it comes from, whether it is whole."
)
weights_app = typer.Typer(no_args_is_help=True, help="Weights of the learned metrics.")
app.add_typer(catalog_app, name="catalog")
app.add_typer(weights_app, name="weights")
cluster_app = typer.Typer(no_args_is_help=True, help="Where runs compute.")
app.add_typer(cluster_app, name="cluster")

RANK_AND_PROCESSES = (("RANK", "0"), ("WORLD_SIZE", "1"))
"""What torchrun tells each process, and what holds without it."""

INCOMPLETE = 3
INTERRUPTED = 130

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
        help="What a metric is told, see 'lsim metrics NAME'; may be repeated.",
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


def _show_version(wanted: bool) -> None:
    from pipeline.versions import versions

    if wanted:
        output.print(f"lsim {versions()['lsim']}", markup=False)
        raise typer.Exit


@app.callback()
def options_of_all(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
) -> None:
    """Options before a command's name; each acts by itself."""


@functools.cache
def _say_once(warning: str) -> None:
    console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


def _show_warning_once(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning in a line, without that of our code which gives it: it says nothing to users."""
    _say_once(str(message))


def main() -> NoReturn:
    """Run a command, and end with its exit code; the process is left as it was found."""
    with _process_as_before():
        code, was_stopped = _run()
    if was_stopped and not _is_whole_process():
        # Whoever called the command in their own program ends now, too: the signal was meant for all of it.
        signal.raise_signal(signal.SIGTERM)
    sys.exit(code)


@contextlib.contextmanager
def _process_as_before() -> Iterator[None]:
    """Take back what a command changes of its process; signals are :mod:`pipeline.workers.stopping`'s."""
    variables, path, modules = dict(os.environ), list(sys.path), set(sys.modules)
    show_warning, show_exception = warnings.showwarning, sys.excepthook
    torch: Any = sys.modules.get("torch")  # not imported for this alone
    torch_state = None if torch is None else torch.get_rng_state()
    random_state = random.getstate()
    _say_once.cache_clear()
    warnings.showwarning = _show_warning_once
    try:
        yield
    finally:
        warnings.showwarning = show_warning
        sys.excepthook = show_exception  # typer sets its own
        random.setstate(random_state)  # Dask spreads its delays
        if torch is not None:
            torch.set_rng_state(torch_state)  # networks draw their first weights
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update(variables)
        _forget_modules(set(sys.path) - set(path), sys.modules.keys() - modules)
        sys.path[:] = path


def _forget_modules(folders: Collection[str], names: Iterable[str]) -> None:
    """Forget modules that were found in folders: another command may mean another file of the same name."""
    for name in list(names):
        top = name.partition(".")[0]
        file = getattr(sys.modules.get(name), "__file__", None)
        places = [Path(folder, end) for folder in folders for end in (top, f"{top}.py")]
        if file and top not in OURS and any(Path(file).is_relative_to(place) for place in places):
            del sys.modules[name]


OURS = ("lsim", "pipeline", "lsim_command")


_STARTED_AS = ("__main__", "runpy", "lsim_command", __name__)
"""Modules between the start of a process and a command that is all it does."""


def _is_whole_process() -> bool:
    """Whether the process was started for this command, and nothing else runs in it."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") not in _STARTED_AS:
            return False
        frame = frame.f_back
    return True


def _run() -> tuple[int, bool]:
    """Run a command: its exit code, with faults that users can mend in one line; whether SIGTERM ended it."""
    with stopping.stoppable() as stop_on_sigterm:
        code = _exit_code(stop_on_sigterm)
        was_stopped = stopping.asked()
    if code in (INTERRUPTED, stopping.EXIT_CODE):  # typer turns Ctrl-C into this
        console.print("stopped; what is finished is kept, run the same command again to go on")
    return code, was_stopped


def _exit_code(stop_on_sigterm: Callable[[], None]) -> int:
    try:
        stop_on_sigterm()
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except stopping.Stopped:
        code = stopping.EXIT_CODE
    except Exception as error:
        code = _explain(error)
        if code is None:
            raise
    return code if isinstance(code, int) else 0


def _explain(error: Exception) -> int | None:
    """Print an error that is the user's to mend, and give its exit code; None for a fault of ours."""
    # Only now: imported ahead, these would cost every command a second.
    from lsim.export import ExportError
    from lsim.registry import UnknownMetricError
    from lsim.simulate import UnknownRecipeError
    from lsim.weights import WeightsError
    from pipeline.convert import ConversionError
    from pipeline.resources import ResourceError
    from pipeline.simulate import SimulationError
    from pipeline.store import StoreError
    from pipeline.workers.profiles import ClusterError

    if hasattr(error, "exit_code") and hasattr(error, "show"):  # click's usage errors
        error.show()
        return int(error.exit_code)
    if isinstance(error, pydantic.ValidationError):
        for fault in error.errors():
            where = ".".join(map(str, fault["loc"]))
            console.print(
                f"error: {where}: {fault['msg']}, got {fault['input']!r}", style="red", markup=False
            )
        return 2
    # Errors of catalogs, schemas, correlations and workflows are kinds of ValueError.
    expected = (UnknownMetricError, WeightsError, ClusterError, ConversionError, ResourceError, StoreError)
    kinds = (ExportError, SimulationError, UnknownRecipeError, ValueError, OSError, MemoryError)
    if isinstance(error, (*expected, *kinds)):
        text = str(error) or "out of memory" if isinstance(error, MemoryError) else str(error)
        console.print(f"error: {text or type(error).__name__}", style="red", markup=False, soft_wrap=True)
        return 1
    return None


@app.command()
def run(
    workflow: Annotated[
        str, typer.Argument(help="Name of a shipped workflow (demo, lsim2d, own_weights) or a YAML file.")
    ],
    out: Annotated[
        str | None, typer.Option(help="Folder or address of stores and results; default the workflow's.")
    ] = None,
    data_dir: DataDir = None,
    metrics: Annotated[str | None, typer.Option(help="Instead of the workflow's: names, or 'all'.")] = None,
    own: OwnMetrics = None,
    option: Options = None,
    mask: MaskOption = None,
    precision: PrecisionOption = None,
    weights: WeightsOption = None,
    pixel_weights: PixelWeights = False,
    strict: Strict = False,
    verify_sources: VerifySources = False,
    cluster: ClusterOption = "local",
    workers: Workers = None,
) -> None:
    """Run a workflow: fetch, convert, distances, correlate, report; only what is out of date."""
    from pipeline.metric_choice import Settings
    from pipeline.resources import find_resource
    from pipeline.workers.cluster import Cluster
    from pipeline.workers.profiles import load_profile
    from pipeline.workflow import open_workflow, run_workflow

    chosen = open_workflow(workflow)
    there = chosen.distances
    changes: dict[str, Any] = {"strict": strict or there.strict, "weights": there.weights | _weights(weights)}
    changes["metrics"] = _metric_names(there.metrics if metrics is None else metrics, own)
    changes["options"] = _options(option, there.options)
    changes["pixel_weights"] = pixel_weights or there.pixel_weights
    changes |= _mask_and_precision(mask, precision)
    settings = Settings.model_validate(there.model_dump() | changes)
    _make_importable(settings.metrics, Path.cwd(), find_resource("workflows", workflow).parent)
    chosen = chosen.model_copy(update={"distances": settings})
    with Cluster(load_profile(cluster, workers)) as pool:
        report = run_workflow(
            *(chosen, pool),
            out=out,
            data_dir=data_dir,
            progress=stage(pool),
            announce=_announce,
            verify_sources=verify_sources,
        )
    show_quarantined(report.conversion.quarantined)
    show_distances(report.distances)
    if report.archive is not None:
        show_archive(report.archive)
    show_correlations(report.correlation)
    show_damaged(report.correlation.damaged)
    output.print(f"report: {report.page}", markup=False)
    _exit(report.complete)


@app.command("convert")
def convert_command(
    catalog: Annotated[str, typer.Argument(help="Name of a shipped catalog or a YAML file.")],
    out: Annotated[str, typer.Option(help="The store to make or bring up to date; a path or an address.")],
    dataset: Names = None,
    data_dir: DataDir = None,
    verify_sources: VerifySources = False,
    cluster: ClusterOption = "local",
    workers: Workers = None,
) -> None:
    """Convert source files to frames.zarr; only new and changed ones."""
    from pipeline.catalog import open_catalog
    from pipeline.convert import convert
    from pipeline.workers.cluster import Cluster
    from pipeline.workers.profiles import load_profile

    with Cluster(load_profile(cluster, workers)) as pool, stage(pool)("convert") as show:
        report = convert(
            open_catalog(catalog),
            out,
            datasets=dataset,
            data_dir=data_dir,
            client=lambda: pool.client,
            progress=show,
            verify_sources=verify_sources,
        )
    if report.converted or report.removed:
        rate = report.bytes / 1e6 / max(report.seconds, 1e-9)
        output.print(
            f"{len(report.converted)} sequences converted, {len(report.unchanged)} unchanged, "
            f"{len(report.removed)} removed in {report.seconds:.1f} s ({rate:.0f} MB/s)"
        )
    else:
        compared = ", as their sources decode" if verify_sources else ""
        output.print(f"nothing to do: {len(report.unchanged)} sequences are up to date{compared}")
    show_quarantined(report.quarantined)
    _exit(not report.quarantined)


@app.command("distances")
def distances_command(
    frames: Annotated[str, typer.Argument(help="A frames.zarr; a path or an address, s3:// or gs://.")],
    out: Annotated[str, typer.Option(help="The store to make or bring up to date; a path or an address.")],
    metrics: Metrics = "all",
    own: OwnMetrics = None,
    option: Options = None,
    mask: MaskOption = None,
    precision: PrecisionOption = None,
    weights: WeightsOption = None,
    pixel_weights: PixelWeights = False,
    pairs: Annotated[str, typer.Option(help="all, or reference: frame 0 against the others only.")] = "all",
    scope: Annotated[
        str,
        typer.Option(
            help="Frames that share one minimum and maximum: sequence, pair, dataset, or LO,HI; "
            "none: values in their own units."
        ),
    ] = "sequence",
    compat: Annotated[str, typer.Option(help="default, or published: the authors' evaluation.")] = "default",
    size: Annotated[int, typer.Option(help="Frames are resized to it; 0 keeps their size.")] = 224,
    order: Annotated[int, typer.Option(help="Spline order of the resize, 0 to 5.")] = 0,
    matrix: Annotated[
        str,
        typer.Option(help="sequence: one a sequence; archive: one over all frames, see docs/archives.md."),
    ] = "sequence",
    groups: Groups = None,
    together: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of an archive: one matrix over all groups, so called.")
    ] = None,
    tile: Annotated[
        int | None, typer.Option(min=1, help="Of an archive: frames on a side of a tile of a new store.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of an archive: what a worker may take, as in 8GB.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Of an archive: say what it takes, and stop.")] = False,
    block: Annotated[int | None, typer.Option(min=1, help="Sequences per block of a new store.")] = None,
    directed: Annotated[
        bool,
        typer.Option(
            "--directed", help="Keep both directions of metrics that aren't symmetric: row, the reference."
        ),
    ] = False,
    strict: Strict = False,
    cluster: ClusterOption = "local",
    workers: Workers = None,
) -> None:
    """Compute distance matrices, of sequences or of a whole archive; only what is new or out of date."""
    from pipeline.distances import compute_distances
    from pipeline.workers.cluster import Cluster
    from pipeline.workers.profiles import load_profile

    told = {"size": size or None, "order": order, "compat": compat, "scope": _scope(scope)}
    told |= {"pairs": pairs, "directed": directed, "strict": strict, "block": block}
    told |= {"pixel_weights": pixel_weights} | _mask_and_precision(mask, precision)
    settings = _settings(_metric_names(metrics, own), option, weights, told)
    if matrix not in ("sequence", "archive"):
        raise typer.BadParameter(f"--matrix {matrix!r}: expected sequence or archive")
    if matrix == "archive":
        if block:
            raise typer.BadParameter("--block is for --matrix sequence; of an archive use --tile")
        wanted = _matrix(groups, together, tile, memory)
        _compute_archive(frames, out, settings, wanted, load_profile(cluster, workers), plan_only=plan)
        return
    of_archives = {"groups": groups, "together": together, "tile": tile, "memory": memory, "plan": plan}
    if given := [name for name, value in of_archives.items() if value]:
        raise typer.BadParameter(f"--{given[0]} is for --matrix archive")
    with Cluster(load_profile(cluster, workers)) as pool, stage(pool)("distances") as show:
        report = compute_distances(frames, out, settings, cluster=pool, progress=show)
    show_distances(report)
    _exit(not report.failures)


def _matrix(groups: str | None, together: str | None, tile: int | None, memory: str | None) -> MatrixRequest:
    """What is asked of an archive's matrix."""
    from pipeline.archive import MatrixRequest

    try:
        room = None if memory is None else pydantic.TypeAdapter(pydantic.ByteSize).validate_python(memory)
    except pydantic.ValidationError as error:
        raise typer.BadParameter(f"--memory {memory!r}: expected a size, as in 8GB") from error
    return MatrixRequest(tuple(_separated(groups) or ()), together, tile, room)


def _compute_archive(
    frames: str, out: str, settings: Settings, matrix: MatrixRequest, profile: Profile, *, plan_only: bool
) -> None:
    """The command ``distances`` with ``--matrix archive``."""
    from pipeline.archive import compute_archive
    from pipeline.archive.machines import shared_memory_profile
    from pipeline.workers.cluster import Cluster

    with Cluster(shared_memory_profile(profile)) as pool, stage(pool)("archive") as show:
        report = compute_archive(
            *(frames, out, settings, matrix),
            cluster=pool,
            progress=show,
            announce=_announce,
            plan_only=plan_only,
        )
    if not plan_only:
        show_archive(report)
        _exit(not report.failures)


@app.command("correlate")
def correlate_command(
    distances: Annotated[str, typer.Argument(help="A distances.zarr; a path or an address.")],
    out: Annotated[str, typer.Option(help="Folder or address of the results.")],
    protocol: Annotated[
        list[str] | None, typer.Option(help="published or all-pairs; may be repeated. Default published.")
    ] = None,
    replicates: Annotated[int, typer.Option(min=0, help="Bootstrap replicates; 0 for no intervals.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Correlate distances with ground truth, with bootstrap intervals over sequences."""
    from pipeline.address import join
    from pipeline.correlate import LEFT_OUT, correlate

    protocols: Any = protocol or ["published"]
    report = correlate(distances, out, protocol=protocols, replicates=replicates, seed=seed)
    show_correlations(report)
    for note in report.notes:
        console.print(note, markup=False)
    if len(report.left_out):
        console.print(
            f"{len(report.left_out)} (sequence, metric) left out, named in {join(out, LEFT_OUT)}",
            markup=False,
        )
    if report.up_to_date:
        output.print("nothing to do: the results are up to date")
    show_damaged(report.damaged)
    _exit(not report.damaged)


@app.command("report")
def report_command(
    results: Annotated[
        str,
        typer.Argument(
            help="The folder or address that 'lsim correlate' wrote to; or an archive.zarr, alone."
        ),
    ],
    out: Annotated[
        str | None, typer.Option(help="Folder of the page; default RESULTS/report, of an archive report.")
    ] = None,
    archive: Annotated[str | None, typer.Option(help="An archive.zarr whose maps are shown as well.")] = None,
) -> None:
    """Write the HTML report, of correlations, of an archive, or of both."""
    from pipeline.report import is_archive, write_archive_report, write_report

    if not is_archive(results):
        page = write_report(results, out=out, archive=archive)
    elif archive is None:
        page = write_archive_report(results, out or "report")
    else:
        raise typer.BadParameter(f"{results} is an archive; --archive goes with a folder of results")
    output.print(f"report: {page}", markup=False)


@app.command("neighbours")
def neighbours_command(
    distances: Annotated[
        str, typer.Argument(help="An archive.zarr; or a distances.zarr, sequence by sequence.")
    ],
    of: Annotated[
        str, typer.Option(help="The frame, <dataset>/<field>/<sequence>:<number>, or an end of that.")
    ],
    k: Annotated[int, typer.Option("--k", min=1, help="How many.")] = 10,
    metric: Annotated[
        str | None, typer.Option(help="What orders them; default lsim, lsim-open, or the first there is.")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Group of the matrix, where the frame is in several.")
    ] = None,
    other_sequences: Annotated[
        bool, typer.Option("--other-sequences", help="Leave out the frames of its own sequence.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The frames nearest to a frame, of a matrix over a whole archive."""
    from pipeline.neighbours import find_neighbours

    found = find_neighbours(distances, of, k, metric, matrix=group, other_sequences=other_sequences)
    show_neighbours(found, as_json=as_json)
    show_damaged(found.left_out)
    _exit(not found.left_out)


@app.command("embed")
def embed_command(
    frames: Annotated[str, typer.Argument(help="A frames.zarr.")],
    metric: Annotated[str, typer.Option(help="Whose embeddings: a name, or MODULE:CLASS.")],
    out: Annotated[str, typer.Option(help="The store to make or bring up to date.")],
    groups: Groups = None,
    scope: Annotated[
        str,
        typer.Option(help="Frames that share one minimum and maximum: dataset, all of a field; or LO,HI."),
    ] = "dataset",
    option: Options = None,
    mask: MaskOption = None,
    precision: PrecisionOption = None,
    weights: WeightsOption = None,
    compat: Annotated[str, typer.Option(help="default, or published: the authors' evaluation.")] = "default",
    size: Annotated[int, typer.Option(help="Frames are resized to it; 0 keeps their size.")] = 224,
    order: Annotated[int, typer.Option(help="Spline order of the resize, 0 to 5.")] = 0,
    cluster: ClusterOption = "local",
    workers: Workers = None,
) -> None:
    """Write a metric's embedding of every frame, for search libraries; only what is new or out of date."""
    from pipeline.embeddings import compute_embeddings
    from pipeline.workers.cluster import Cluster
    from pipeline.workers.profiles import load_profile

    told = {"size": size or None, "order": order, "compat": compat, "scope": _scope(scope)}
    settings = _settings((metric,), option, weights, told | _mask_and_precision(mask, precision))
    with Cluster(load_profile(cluster, workers)) as pool, stage(pool)("embed") as show:
        chosen = _separated(groups)
        report = compute_embeddings(frames, out, settings, groups=chosen, cluster=pool, progress=show)
    show_embeddings(report)
    _exit(not report.failures)


@app.command("verify")
def verify_command(
    path: Annotated[str, typer.Argument(metavar="STORE", help="A frames.zarr, distances.zarr, ….")],
    mend: Annotated[
        bool,
        typer.Option(
            "--repair", help="Take away the record of what is damaged: the next run makes it again."
        ),
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads that read and check.")] = 8,
) -> None:
    """Check a store: every chunk against its checksum, and what is in it against what is recorded."""
    from pipeline.store import DOCUMENT
    from pipeline.verify import verify
    from pipeline.verify.damage import is_of_root
    from pipeline.verify.repair import repair

    with stage(None)("verify") as show:
        report = verify(path, threads=threads, progress=show)
    show_verified(report)
    if mend and not report.whole:
        count = repair(path, report)
        stages = {"frames": "convert", "distances": "distances", "embeddings": "embed"}
        stages["archive"] = "distances --matrix archive"
        restored = sum(damage.chunk == DOCUMENT for damage in report.damages)
        told = [f"{count} of what is recorded taken away"] if count else []
        told += [f"metadata of {restored} groups and arrays written again"] if restored else []
        again = (
            "lsim verify --repair" if any(map(is_of_root, report.damages)) else f"lsim {stages[report.kind]}"
        )
        output.print(f"{'; '.join(told) or 'nothing to take away'}: run '{again}' again", markup=False)
    if not report.whole:
        raise typer.Exit(1)


@app.command("simulate")
def simulate_command(
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
    _exit(report.complete)


@app.command("train")
def train_command(
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
        progress=_announce,
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
    _exit(not result.skipped or processes > 1)


@app.command("export")
def export_command(
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


@app.command("metrics")
def metrics_command(
    name: Annotated[
        str | None, typer.Argument(help="All that is known of this one; or MODULE:CLASS.")
    ] = None,
) -> None:
    """List the metrics, what they can do, and whether they can be used here."""
    from lsim.registry import list_metrics, metric_class, why_unavailable

    if name is not None:
        _make_importable([name], Path.cwd())
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


@catalog_app.command("list")
def catalog_list() -> None:
    """List the shipped catalogs."""
    from pipeline.catalog import open_catalog
    from pipeline.resources import shipped_names

    table = Table("catalog", "title", "data sets")
    for name in shipped_names("catalogs"):
        catalog = open_catalog(name)
        add_row(table, name, catalog.title, ", ".join(entry.name for entry in catalog.datasets))
    output.print(table)


@catalog_app.command("show")
def catalog_show(
    catalog: Annotated[str, typer.Argument(help="Name or YAML file.")], data_dir: DataDir = None
) -> None:
    """Show a catalog's data sets, where they come from, and whether they are here."""
    from pipeline.catalog import locate, open_catalog

    opened = open_catalog(catalog)
    output.print(opened.title or opened.name, style="bold", markup=False)
    for label, text in (("licence", opened.licence), ("doi", opened.doi), ("citation", opened.citation)):
        if text:
            output.print(f"{label}: {text}", markup=False)
    table = Table("data set", "title", "role", "reader", "here")
    for entry in opened.datasets:
        found = locate(opened, entry, data_dir)
        add_row(table, entry.name, entry.title, entry.role, entry.reader, str(found) if found else "no")
    output.print(table)
    for pool, members in opened.pools.items():
        output.print(f"pool {pool}: {', '.join(members)}", markup=False)


@catalog_app.command("fetch")
def catalog_fetch(
    catalog: Annotated[str, typer.Argument(help="Name or YAML file.")],
    dataset: Names = None,
    data_dir: DataDir = None,
) -> None:
    """Download, or simulate, the data of a catalog, with checksums."""
    from pipeline.catalog import fetch, open_catalog

    for entry in fetch(open_catalog(catalog), dataset, data_dir, _announce):
        output.print(f"{entry.dataset}: {entry.action} {entry.folder}", markup=False)


@catalog_app.command("verify")
def catalog_verify(
    catalog: Annotated[str, typer.Argument(help="Name or YAML file.")],
    dataset: Names = None,
    data_dir: DataDir = None,
) -> None:
    """Check that a catalog's data is here and whole."""
    from pipeline.catalog import open_catalog, verify

    whole = True
    for entry in verify(open_catalog(catalog), dataset, data_dir):
        whole &= entry.ok
        state = "damaged" if not entry.ok and entry.present else "here" if entry.present else "absent"
        output.print(f"{entry.dataset}: {state}, checksum {entry.checksum}: {entry.detail}", markup=False)
    raise typer.Exit(0 if whole else 1)


@weights_app.command("list")
def weights_list() -> None:
    """List shipped and published weights and where they are."""
    from lsim.weights import PUBLISHED, SHIPPED, weights_status

    table = Table("weights", "state", "where, or how to get them", "licence")
    for entry in weights_status():
        add_row(table, entry.name, entry.state, entry.detail, (SHIPPED | PUBLISHED)[entry.name].licence)
    output.print(table)


@weights_app.command("fetch")
def weights_fetch(
    name: Annotated[str, typer.Argument(help="Name of published weights, or 'all'.")],
) -> None:
    """Download weights from their publisher into the user cache, and check their SHA-256."""
    from lsim.weights import PUBLISHED, fetch_weights

    for wanted in PUBLISHED if name == "all" else (name,):
        output.print(f"{wanted}: {fetch_weights(wanted)}", markup=False)


@weights_app.command("verify")
def weights_verify() -> None:
    """Check the SHA-256 of all weights that are here."""
    from lsim.weights import weights_status

    entries = weights_status()
    for entry in entries:
        output.print(f"{entry.name}: {entry.state}: {entry.detail}", markup=False)
    raise typer.Exit(1 if any(entry.state == "damaged" for entry in entries) else 0)


@cluster_app.command("check")
def cluster_check(
    profile: Annotated[
        str, typer.Argument(help="A profile's name or YAML file, or a scheduler's tcp:// or tls:// address.")
    ],
    frames: Annotated[
        str | None, typer.Argument(help="A frames.zarr: what a run over it would take.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="That all workers see: a small archive lies there meanwhile. Not for local ones."),
    ] = None,
    metrics: Metrics = "all",
    own: OwnMetrics = None,
    option: Options = None,
    weights: WeightsOption = None,
    workers: Workers = None,
) -> None:
    """Start a cluster, look at its workers' versions and devices, and measure what a run would take."""
    from pipeline.cluster_check import check_cluster
    from pipeline.workers.profiles import load_profile

    settings = _settings(_metric_names(metrics, own), option, weights)
    found = check_cluster(load_profile(profile, workers), settings, folder=folder, frames=frames)
    show_cluster(found)
    if found.errors:
        raise typer.Exit(1)


# ---------------------------------------------------------------- what options mean


def _settings(
    metrics: Any, option: list[str] | None, weights: list[str] | None, told: Mapping[str, Any] | None = None
) -> Settings:
    """Settings of metrics, options and weights, and what else is told; metrics of this folder are found."""
    from pipeline.metric_choice import Settings

    given = {"metrics": metrics, "options": _options(option, {}), "weights": _weights(weights)}
    settings = Settings.model_validate(given | dict(told or {}))
    _make_importable(settings.metrics, Path.cwd())
    return settings


def _separated(text: str | None) -> list[str] | None:
    """What commas separate; None of nothing."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _metric_names(named: Any, own: list[str] | None = None) -> Any:
    """``"all"``, or names of metrics, and metrics of one's own besides."""
    if isinstance(named, str) and named != "all":
        named = _separated(named)
    if not own:
        return named if named == "all" else tuple(named)
    if wrong := [name for name in own if ":" not in name]:
        raise typer.BadParameter(f"--metric {wrong[0]!r}: expected MODULE:CLASS; names go into --metrics")
    return (*(["all"] if named == "all" else named), *own)


def _make_importable(metrics: Any, *folders: Path) -> None:
    """Let metrics that are given by reference be found in these folders, by local workers as well.

    After all else: a file of the user's, whatever its name, must not stand in for a module of others.
    """
    if any(":" in name for name in metrics):
        sys.path += [folder for folder in map(str, folders) if folder not in sys.path]


def _options(given: list[str] | None, there: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """METRIC.OPTION=VALUE by metric and option, over those that are there; values as in YAML."""
    found = {metric: dict(options) for metric, options in there.items()}
    for text in given or []:
        name, equals, value = text.partition("=")
        metric, dot, option = name.rpartition(".")
        if not (equals and dot and metric and option):
            raise typer.BadParameter(f"option {text!r}: expected METRIC.OPTION=VALUE")
        try:
            found.setdefault(metric, {})[option] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise typer.BadParameter(f"option {text!r}: the value is no YAML: {error}") from error
    return found


def _mask_and_precision(mask: str | None, precision: str | None) -> dict[str, Any]:
    """Those that are given."""
    changes: dict[str, Any] = {} if mask is None else {"mask": None if mask == "none" else mask}
    return changes if precision is None else changes | {"precision": precision}


def _weights(given: list[str] | None) -> dict[str, str]:
    """NAME=FILE by name."""
    found = {}
    for text in given or []:
        name, equals, file = text.partition("=")
        if not (name and equals and file):
            raise typer.BadParameter(f"weights {text!r}: expected NAME=FILE")
        found[name] = file
    return found


def _scope(text: str) -> Any:
    if "," not in text:
        return text
    try:
        lo, hi = (float(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"scope {text!r}: expected LO,HI, two numbers") from error
    return lo, hi


def _announce(text: str) -> None:
    """Print what is about to be done, or how it goes."""
    output.print(text, markup=False)


def _exit(complete: bool) -> None:
    if not complete:
        raise typer.Exit(INCOMPLETE)
