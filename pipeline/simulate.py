"""Simulated data sets: families of a recipe as folders, computed by Dask workers, and as a store.

The recipes are those of :mod:`lsim.simulate`; this module distributes them, one family per task, and reports.
Complete families are kept, so a run that was killed resumes, to the same bytes.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from distributed import Client

from lsim.ranking import pooled_spearman
from lsim.simulate import (
    DegenerateFamilyError,
    family_folders,
    find_recipe,
    missing_families,
    write_families,
)
from lsim.simulate.families import ground_truth
from lsim.simulate.hardness import reference_errors, rounding_of_errors
from lsim.simulate.layout import Format, read_frames, read_record, settings
from pipeline.convert import ConversionReport, convert
from pipeline.sources.catalog import Catalog, Dataset, Source
from pipeline.sources.fetch import data_root
from pipeline.stage.bounded_map import run_bounded
from pipeline.storage.address import absolute, is_address, split_bucket
from pipeline.storage.store import exists
from pipeline.workers.cluster import Cluster

Output: TypeAlias = Literal["npz", "png", "zarr"]
OUTPUTS: tuple[Output, ...] = ("npz", "png", "zarr")
Progress: TypeAlias = Callable[[int, int], None]
"""Receives the number of finished families and the number of all families to simulate."""

Task: TypeAlias = tuple[str, str, int, int, int, Format]
"""Arguments of :func:`make_family`."""

CATALOG = "simulated"
"""Name of the catalog that a store of simulated data sets is converted from."""


class SimulationError(RuntimeError):
    """A family could not be simulated or written; the message names it and the reason."""


@dataclass
class SimulationReport:
    """Result of :func:`simulate`.

    Attributes
    ----------
    recipe : str
    folder : Path
        Folder of the families.
    made, present : list of int
        Numbers of the families that were simulated now, and of those that existed before.
    unusable : dict of int to str
        Families without a usable draw, with the reason; they are not written.
    discarded : dict of str to int
        Number of discarded draws by reason, over all families that exist.
    others : list of str
        Folders beside them that this call did not request. They are kept, and are not in the store.
    unlike : list of str
        Folders in ``others`` that were made with other settings (size, seed, format, version of the recipe)
        or by other means.
    store : Path, str for an address, or None
        The updated store.
    conversion : ConversionReport or None
    seconds : float
        Time of simulating and writing, without the start of the workers and the conversion.
    """

    recipe: str
    folder: Path
    made: list[int] = field(default_factory=list)
    present: list[int] = field(default_factory=list)
    unusable: dict[int, str] = field(default_factory=dict)
    discarded: dict[str, int] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)
    store: Path | str | None = None
    conversion: ConversionReport | None = None
    seconds: float = 0.0

    @property
    def numbers(self) -> list[int]:
        """Numbers of the families that exist, in order."""
        return sorted(self.made + self.present)

    @property
    def complete(self) -> bool:
        """True if all requested families exist, and none is quarantined in the store."""
        return not self.unusable and not (self.conversion and self.conversion.quarantined)


def simulate(
    recipe: str,
    out: str | os.PathLike[str],
    families: int,
    size: int = 256,
    seed: int = 0,
    format: Output = "npz",
    *,
    cluster: Cluster,
    progress: Progress | None = None,
) -> SimulationReport:
    """Simulate the missing families of a recipe, as folders ``<out>/<recipe>/``.

    Parameters
    ----------
    recipe : str
        A name in :data:`lsim.simulate.RECIPES`.
    out : path, or address with ``zarr``
        Folder of data sets. With ``zarr`` the store is written beside it, to ``<out>.zarr``; ``out`` may have
        that ending, too. With an address only the store is written there, and the families go to the data
        root (:func:`pipeline.sources.fetch.data_root`).
    families : int
        Number of families, numbered from 1.
    size : int, default 256
        Pixels along y and x, even.
    seed : int, default 0
    format : {"npz", "png", "zarr"}, default "npz"
        Format of the files. ``zarr`` writes ``npz`` folders and converts them to a store: this recipe's data
        set then holds exactly the requested families; data sets of other recipes are kept.
    cluster : Cluster
        Cluster whose workers simulate and write; they must see the same files. It starts only when there is
        something to do. Each worker has one thread, so a family's bytes don't depend on the workers.
    progress : callable, optional

    Raises
    ------
    UnknownRecipeError, ValueError
        See :func:`lsim.simulate.write_families`.
    SimulationError
        When a family cannot be written, or its worker dies; or when all families are degenerate and there is
        a store, which cannot be updated with nothing. Single degenerate families are no error: they are
        reported in ``unusable``.
    pipeline.convert.ConversionError
        When ``<out>.zarr`` is a Zarr store of another kind.
    """
    if format not in OUTPUTS:
        raise ValueError(f"format must be one of {OUTPUTS}, got {format!r}")
    root, place = _locate(out, format)
    files: Format = "npz" if format == "zarr" else format
    report = SimulationReport(recipe, root / recipe)
    missing = missing_families(report.folder, recipe, families, size, seed, files)
    report.present = sorted(set(range(1, families + 1)) - set(missing))
    if missing:
        tasks = [(str(report.folder), recipe, number, size, seed, files) for number in missing]
        client = cluster.client  # starts the workers
        start = time.perf_counter()
        report.unusable = _make_families(client, tasks, progress or (lambda count, total: None))
        report.seconds = time.perf_counter() - start
        report.made = sorted(set(missing) - report.unusable.keys())
    report.discarded = _discarded(report)
    report.others, report.unlike = _list_extra_folders(report, size, seed, files)
    if format == "zarr":
        report.conversion = _update_store(report, place, families, cluster)
    if report.conversion is not None:
        report.store = place if is_address(place) else Path(place)
    return report


def _locate(out: str | os.PathLike[str], format: Output) -> tuple[Path, str]:
    """Return the folder of data sets, and the path or address of the store."""
    beside = absolute(out).removesuffix(".zarr")  # absolute: a store cannot be named after `.`
    root = Path(beside)
    if is_address(beside):
        if format != "zarr":
            raise ValueError(f"{beside}: families are local files; format zarr writes a store to an address")
        root = data_root() / CATALOG / split_bucket(beside)[2].rpartition("/")[2]
    if format == "zarr" and not (split_bucket(beside)[2] if is_address(beside) else root.name):
        raise ValueError(f"out must be a folder with a name, beside which the store is written, got {out}")
    return root, f"{beside}.zarr"


def _make_families(client: Client | None, tasks: Sequence[Task], progress: Progress) -> dict[int, str]:
    """Run :func:`make_family` on workers; return the reason for each family without a usable draw."""
    unusable: dict[int, str] = {}
    progress(0, len(tasks))
    for count, (task, reason, error) in enumerate(run_bounded(client, make_family, tasks), 1):
        folder, recipe, number, *_ = task
        if error is not None:
            raise SimulationError(
                f"{folder}: family {number} of recipe {recipe!r} failed: {type(error).__name__}: "
                f"{error}. Finished families are kept; run the same again to resume"
            ) from error
        if reason is not None:
            unusable[number] = reason
        progress(count, len(tasks))
    return unusable


def _update_store(
    report: SimulationReport, place: str, families: int, cluster: Cluster
) -> ConversionReport | None:
    """Convert the families of a report to the store, None where there is neither."""
    if report.numbers:
        return convert(_catalog(report), place, cluster=cluster)
    if exists(place):
        raise SimulationError(
            f"{place} is not updated: none of {families} families of recipe {report.recipe!r} is usable. "
            f"The first: {report.unusable[min(report.unusable)]}"
        )
    return None


def make_family(folder: str, recipe: str, number: int, size: int, seed: int, format: Format) -> str | None:
    """Simulate and write one family, in any process; return the reason if no draw is usable, else None."""
    try:
        write_families(folder, recipe, [number], size, seed, format)
    except DegenerateFamilyError as error:
        return str(error)
    return None


def measure_hardness(report: SimulationReport, most: int = 100) -> tuple[dict[str, float], int]:
    """Measure how well the mean squared error ranks existing families, see :mod:`lsim.simulate.hardness`.

    Parameters
    ----------
    report : SimulationReport
    most : int, default 100
        Largest number of families to read.

    Returns
    -------
    hardness : dict of str to float
        Pooled Spearman correlation by field, and over all fields where there are several (``"all"``).
    families : int
        Number of families read.
    """
    numbers = report.numbers[:most]
    pools: dict[str, list[tuple[np.ndarray, float]]] = {
        name: [] for name in find_recipe(report.recipe).fields
    }
    for number in numbers:
        folders = family_folders(report.folder, report.recipe, number)
        for pool, folder in zip(pools.values(), folders, strict=True):
            frames = read_frames(folder)
            pool.append((reference_errors(frames), rounding_of_errors(frames)))
    if not numbers:
        return {}, 0
    truth = ground_truth()[1:]
    if len(pools) > 1:
        pools["all"] = [row for pool in pools.values() for row in pool]
    hardness = {}
    for name, pool in pools.items():
        errors, rounding = zip(*pool, strict=True)
        hardness[name] = pooled_spearman(errors, truth, rounding)
    return hardness, len(numbers)


def _discarded(report: SimulationReport) -> dict[str, int]:
    """Count the discarded draws of all families by reason."""
    total: Counter[str] = Counter()
    for number in report.numbers:
        record = read_record(family_folders(report.folder, report.recipe, number)[0])
        assert record is not None  # the family has just been written, or checked
        total.update(record["family"]["discarded"])
    return dict(total)


def _list_extra_folders(
    report: SimulationReport, size: int, seed: int, format: Format
) -> tuple[list[str], list[str]]:
    """List folders that were not requested, and those among them with other settings."""
    recipe = find_recipe(report.recipe)
    requested = {
        path.name
        for number in report.numbers
        for path in family_folders(report.folder, report.recipe, number)
    }
    entries = report.folder.iterdir() if report.folder.is_dir() else ()
    # Hidden folders are being written, and no reader takes them.
    extra_folders = sorted(
        entry
        for entry in entries
        if entry.is_dir() and entry.name not in requested and not entry.name.startswith(".")
    )

    def is_alike(folder: Path) -> bool:
        record = read_record(folder)
        made_with = record["settings"] if record is not None else {}
        return bool(made_with) and made_with == settings(recipe, made_with["number"], size, seed, format)

    return [path.name for path in extra_folders], [path.name for path in extra_folders if not is_alike(path)]


def _catalog(report: SimulationReport) -> Catalog:
    """Describe the families of the report as a data set, without other folders beside them."""
    recipe = find_recipe(report.recipe)
    entry = Dataset(
        name=report.recipe,
        title=recipe.title,
        source=Source(path=str(report.folder)),
        reader="lsim",
        filter=[f"{recipe.folder}{number}." for number in report.numbers],
        role="train" if recipe.role == "training" else "test",
    )
    return Catalog(name=CATALOG, title="Simulated families", datasets=[entry])
