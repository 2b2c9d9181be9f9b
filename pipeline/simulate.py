"""Simulated data sets: families of a recipe as folders, made by Dask workers, and as a store.

What is made is :mod:`lsim.simulate`'s; here it is spread over processes, one family a task, and accounted
for. A family that is there is left, so a run that was killed goes on, to the same bytes.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

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
"""Called with the number of families done, and the number that there are to make."""

CATALOG = "simulated"
"""Name of the catalog that a store of simulated data sets is converted from."""


class SimulationError(RuntimeError):
    """A family that could not be made or written; says which, and why."""


@dataclass
class SimulationReport:
    """What :func:`simulate` did.

    Attributes
    ----------
    recipe : str
    folder : Path
        Where the families lie.
    made, present : list of int
        Numbers of the families that were made now, and of those that were there.
    unusable : dict of int to str
        Families of which no draw was of use, with the reason; they are not written.
    discarded : dict of str to int
        Draws thrown away before one was of use, by reason, over all families that are there.
    others : list of str
        Folders beside them that this call was not asked for. They are left, and are not in the store.
    unlike : list of str
        Those of ``others`` that were made with other settings (size, seed, format, version of the recipe), or
        not by this function.
    store : Path, str for an address, or None
        The store that was brought up to date.
    conversion : ConversionReport or None
    seconds : float
        Of simulating and writing families, without the start of the workers and the conversion.
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
        """Families that are there, in order."""
        return sorted(self.made + self.present)

    @property
    def complete(self) -> bool:
        """Whether all families that were asked for are there."""
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
    """Make the families of a recipe that are not there yet, as folders ``<out>/<recipe>/``.

    Parameters
    ----------
    recipe : str
        A name in :data:`lsim.simulate.RECIPES`.
    out : path, or address with ``zarr``
        Folder of data sets. With ``zarr`` the store lies beside it, ``<out>.zarr``; ``out`` may be given
        with that ending, too. With an address the store alone lies there, and the families under the data
        root (:func:`pipeline.sources.fetch.data_root`).
    families : int
        How many, numbered from 1.
    size : int, default 256
        Pixels along y and x, even.
    seed : int, default 0
    format : {"npz", "png", "zarr"}, default "npz"
        Of the files; ``zarr`` makes ``npz`` folders and converts them to a store: this recipe's data set then
        holds the families asked for and no others, data sets of other recipes stay.
    cluster : Cluster
        Whose workers simulate and write; they must see the same files. Started when there is something to do.
        One thread a process: a family's bytes don't depend on the workers.
    progress : callable, optional

    Raises
    ------
    UnknownRecipeError, ValueError
        As :func:`lsim.simulate.write_families`.
    SimulationError
        When a family cannot be written, or a worker dies with it. A family that degenerates is no error: it
        is reported in ``unusable``, and the others go on; but when all do, and there is a store that cannot
        be brought up to date with nothing.
    pipeline.convert.ConversionError
        When ``<out>.zarr`` is a Zarr store of another kind.
    """
    if format not in OUTPUTS:
        raise ValueError(f"format must be one of {OUTPUTS}, got {format!r}")
    beside = absolute(out).removesuffix(".zarr")  # absolute: `.` has no name that a store could take
    root = Path(beside)
    if is_address(beside):
        if format != "zarr":
            raise ValueError(
                f"{beside}: families are files in a folder on this machine; zarr makes a store there"
            )
        root = data_root() / CATALOG / split_bucket(beside)[2].rpartition("/")[2]
    if format == "zarr" and not (split_bucket(beside)[2] if is_address(beside) else root.name):
        raise ValueError(f"out must be a folder beside which a store can lie, got {out}")
    place = f"{beside}.zarr"
    files: Format = "npz" if format == "zarr" else format
    report = SimulationReport(recipe, root / recipe)
    missing = missing_families(report.folder, recipe, families, size, seed, files)
    report.present = sorted(set(range(1, families + 1)) - set(missing))
    if missing:
        tasks = [(str(report.folder), recipe, number, size, seed, files) for number in missing]
        show = progress or (lambda done, total: None)
        client = cluster.client
        started = time.perf_counter()
        show(0, len(tasks))
        for done, (task, reason, error) in enumerate(run_bounded(client, make_family, tasks), 1):
            number = task[2]
            if error is not None:
                raise SimulationError(
                    f"{report.folder}: family {number} of recipe {recipe!r} failed: {type(error).__name__}: "
                    f"{error}. What is written stays; run the same again to go on"
                ) from error
            if reason is None:
                report.made.append(number)
            else:
                report.unusable[number] = reason
            show(done, len(tasks))
        report.seconds = time.perf_counter() - started
        report.made.sort()
    report.discarded = _discarded(report)
    report.others, report.unlike = _others(report, size, seed, files)
    if format == "zarr" and report.numbers:
        report.conversion = convert(_catalog(report), place, cluster=cluster)
        report.store = place if is_address(place) else Path(place)
    elif format == "zarr" and exists(place):
        raise SimulationError(
            f"{place} is left as it was: of {families} families of recipe {recipe!r} none is of use. "
            f"The first: {report.unusable[min(report.unusable)]}"
        )
    return report


def make_family(folder: str, recipe: str, number: int, size: int, seed: int, format: Format) -> str | None:
    """Make and write one family, in any process; the reason where no draw of it is of use, else None."""
    try:
        write_families(folder, recipe, [number], size, seed, format)
    except DegenerateFamilyError as error:
        return str(error)
    return None


def measure_hardness(report: SimulationReport, most: int = 100) -> tuple[dict[str, float], int]:
    """How well the mean squared error ranks families that are there, see :mod:`lsim.simulate.hardness`.

    Parameters
    ----------
    report : SimulationReport
    most : int, default 100
        The first so many families are read.

    Returns
    -------
    hardness : dict of str to float
        Pooled Spearman correlation by field, and of all together where there are several (``"all"``).
    families : int
        How many were read.
    """
    numbers = report.numbers[:most]
    errors: dict[str, list[tuple[np.ndarray, float]]] = {
        name: [] for name in find_recipe(report.recipe).fields
    }
    for number in numbers:
        for of_field, folder in zip(
            errors.values(), family_folders(report.folder, report.recipe, number), strict=True
        ):
            frames = read_frames(folder)
            of_field.append((reference_errors(frames), rounding_of_errors(frames)))
    if not numbers:
        return {}, 0
    truth = ground_truth()[1:]
    pools = dict(errors)
    if len(errors) > 1:
        pools["all"] = [error for of_field in errors.values() for error in of_field]
    found = {}
    for name, pool in pools.items():
        distances, rounding = zip(*pool, strict=True)
        found[name] = pooled_spearman(distances, truth, rounding)
    return found, len(numbers)


def _discarded(report: SimulationReport) -> dict[str, int]:
    total: Counter[str] = Counter()
    for number in report.numbers:
        record = read_record(family_folders(report.folder, report.recipe, number)[0])
        assert record is not None  # it has just been written, or found complete
        total.update(record["family"]["discarded"])
    return dict(total)


def _others(report: SimulationReport, size: int, seed: int, format: Format) -> tuple[list[str], list[str]]:
    """Folders that were not asked for, and those of them that were made with other settings."""
    recipe = find_recipe(report.recipe)
    wanted = {
        path.name
        for number in report.numbers
        for path in family_folders(report.folder, report.recipe, number)
    }
    there = report.folder.iterdir() if report.folder.is_dir() else ()
    # A hidden folder is one that is being written, and no reader's.
    others = sorted(p for p in there if p.is_dir() and p.name not in wanted and not p.name.startswith("."))

    def is_alike(folder: Path) -> bool:
        record = read_record(folder)
        made_with = record["settings"] if record is not None else {}
        return bool(made_with) and made_with == settings(recipe, made_with["number"], size, seed, format)

    return [path.name for path in others], [path.name for path in others if not is_alike(path)]


def _catalog(report: SimulationReport) -> Catalog:
    """The families that are there as a data set, without what else lies in their folder."""
    described = find_recipe(report.recipe)
    entry = Dataset(
        name=report.recipe,
        title=described.title,
        source=Source(path=str(report.folder)),
        reader="lsim",
        filter=[f"{described.folder}{number}." for number in report.numbers],
        role="train" if described.role == "training" else "test",
    )
    return Catalog(name=CATALOG, title="Simulated families", datasets=[entry])
