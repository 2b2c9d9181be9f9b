"""Training files (YAML) that define data and settings of a run, and frames.zarr as a source of sequences.

Training itself is :mod:`lsim.training`, which reads folders of frames only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pydantic

from lsim.simulate import find_recipe, missing_families
from lsim.training import LayoutFolders, SequenceError, SequenceSource, TrainingSequence, TrainingSettings
from lsim.training.run_files import STATE
from pipeline.resources import find_resource, read_yaml, validated
from pipeline.storage import schema
from pipeline.storage.checked_frames import read_sequence
from pipeline.storage.store import exists, field_keys, get_array, get_group, open_store, read


class TrainingFileError(ValueError):
    """A training file has unknown keys or wrong values; the message names the file and the key."""


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class SimulatedSet(_Strict):
    """Families of one recipe to simulate before training, see :func:`pipeline.simulate.simulate`."""

    families: int = pydantic.Field(ge=1)
    size: int = 256
    seed: int = pydantic.Field(default=0, ge=0)


class TrainingRun(_Strict):
    """Content of a training file.

    Attributes
    ----------
    title : str
    out : str
        Folder of the run.
    data : str
        A ``frames.zarr``, at a path or an address, or a folder of data sets in the layout of the published
        data.
    datasets : list of str, optional
        Data sets to train on; default all, or in a folder those of ``simulate``.
    simulate : dict, optional
        Recipe to :class:`SimulatedSet`: simulated first in ``<data>/<recipe>/``, where absent.
    training : dict
        Fields of :class:`lsim.training.TrainingSettings`.
    """

    title: str = ""
    out: str
    data: str
    datasets: list[str] | None = None
    simulate: dict[str, SimulatedSet] = {}
    training: TrainingSettings = TrainingSettings()


def open_training(name: str | os.PathLike[str]) -> TrainingRun:
    """Read a training file by name (``train_lsim``) or path.

    Raises
    ------
    TrainingFileError
        For unknown keys and wrong values, naming the file and the key.
    pipeline.resources.ResourceError
        When there is no such file.
    """
    path = find_resource("workflows", name)
    return validated(read_yaml(path, TrainingFileError), TrainingRun, path, TrainingFileError)


def missing_data(run: TrainingRun) -> dict[str, int]:
    """Count the families of ``simulate`` that are missing, by recipe.

    Nothing is missing where ``data`` is a store, or for a run that is resumed: it needs the data that it
    began with, even if a recipe has changed since.
    """
    if (Path(run.out) / STATE).exists() or exists(run.data):
        return {}
    missing = {
        recipe: len(missing_families(Path(run.data) / recipe, recipe, entry.families, entry.size, entry.seed))
        for recipe, entry in run.simulate.items()
    }
    return {recipe: count for recipe, count in missing.items() if count}


def describe_data(run: TrainingRun) -> dict[str, str]:
    """Describe the data for the metadata of the weights: title and the recipes trained on."""
    described = {"title": run.title}
    simulated = {
        recipe: {"version": find_recipe(recipe).version, **entry.model_dump()}
        for recipe, entry in run.simulate.items()
        if not run.datasets or recipe in run.datasets
    }
    if simulated and not exists(run.data):
        described["simulated"] = json.dumps(simulated)
    return described


def open_sequences(run: TrainingRun) -> SequenceSource:
    """Open the sequences of a training file, from a store or from folders.

    Raises
    ------
    FileNotFoundError
        When there is nothing to train on.
    """
    if exists(run.data):  # a store; nothing is simulated into it
        return StoredSequences(run.data, run.datasets or None)
    data = Path(run.data)
    datasets = run.datasets or sorted(run.simulate)
    if not datasets:
        datasets = sorted(entry.name for entry in data.iterdir() if entry.is_dir()) if data.is_dir() else []
    if not datasets:
        raise FileNotFoundError(
            f"nothing to train on in {data}: expected a frames.zarr or folders of data sets"
        )
    return LayoutFolders(data, datasets)


class StoredSequences:
    """Sequences of a ``frames.zarr``.

    Parameters
    ----------
    path : path or address
    datasets : sequence of str or None
        Data sets to train on; None takes all.

    Raises
    ------
    pipeline.storage.store.StoreError
        When there is no store.
    ValueError
        When the store lacks a data set.
    """

    def __init__(self, path: str | os.PathLike[str], datasets: Sequence[str] | None) -> None:
        self._path = path
        root = open_store(path)
        keys = field_keys(root, schema.FRAMES)
        available = sorted({key.split("/")[0] for key in keys})
        missing = sorted(set(datasets or ()) - set(available))
        if missing:
            raise ValueError(f"{path}: no data set {', '.join(missing)}; available: {', '.join(available)}")
        self._rows: list[tuple[str, int, str]] = []
        self._groups = {}
        for key in keys:
            dataset, field = key.split("/")
            if datasets is None or dataset in datasets:
                group = self._groups[key] = get_group(root, key)
                names = read(get_array(group, schema.SEQUENCE)).tolist()
                self._rows += [(key, row, _full_name(dataset, name, field)) for row, name in enumerate(names)]

    @property
    def names(self) -> Sequence[str]:
        """Names ``<data set>/<sequence>.<field>``."""
        return [name for _, _, name in self._rows]

    def read(self, index: int) -> TrainingSequence:
        """Read one sequence, as stored.

        Raises
        ------
        SequenceError
            When its shard is damaged, or its frames are not those that were converted.
        """
        key, row, name = self._rows[index]
        group = self._groups[key]
        try:
            content = str(read(get_array(group, schema.CONTENT), slice(row, row + 1))[0])
            frames = read_sequence(group, row, content)
            parameter = read(get_array(group, schema.PARAMETER), row)
        except (OSError, ValueError, RuntimeError) as error:  # codecs raise any of these
            raise SequenceError(f"{self._path}: {name} cannot be read: {error}") from error
        return TrainingSequence(name, frames, parameter)


def _full_name(dataset: str, sequence: str, field: str) -> str:
    """Name a sequence with its data set and its field, which it may already end with."""
    return f"{dataset}/{sequence}" if sequence.endswith(f".{field}") else f"{dataset}/{sequence}.{field}"
