"""Reader of The Well: HDF5 files with trajectories in the groups ``t0_fields``, ``t1_fields``, ``t2_fields``.

The source is one such file, or a folder of them, at any depth (``data/train/*.hdf5``). A trajectory is a
sequence, named by its number, after the file's name where there are several. A scalar is a field; of a vector
each component is one, ``velocity_x``, and of a tensor, ``D_xy``. Along an axis in which a field doesn't vary,
its values are repeated. Fields that don't vary in time are none of a trajectory, and are not listed. The
parameter is the time of the file.

Format: https://github.com/PolymathicAI/the_well, docs/data_format.md.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipeline.sources.catalog import Dataset, reader_options
from pipeline.sources.readers.base import (
    BrokenSequence,
    LazySequence,
    ReaderError,
    SourceFile,
    check_size,
    decoding,
    natural_key,
    scale_parameter,
)
from pipeline.storage.limits import LISTED_SEQUENCES

VERSION = "1"
"""Increased when the same files are decoded to other frames or another parameter."""
GROUPS = ("t0_fields", "t1_fields", "t2_fields")
"""Groups of scalars, vectors and tensors; the number counts the axes of components."""
_ENDINGS = (".hdf5", ".h5")


class WellOptions(BaseModel):
    """Options of this reader: none, since files say all."""

    model_config = ConfigDict(extra="forbid")


def is_well(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file is in the format of The Well, by its content."""
    import h5py

    if not os.path.isfile(path) or not h5py.is_hdf5(path):
        return False
    with h5py.File(path, "r") as file:
        return "dimensions/time" in file and any(group in file for group in GROUPS)


def read(entry: Dataset, folder: Path) -> list[LazySequence]:
    """List the trajectories of every file at, or below, ``folder``."""
    reader_options(WellOptions, entry)
    paths = [folder]
    if folder.is_dir():
        names = (Path(top, name) for top, _, files in os.walk(folder) for name in files)
        visible = [path for path in names if path.suffix.lower() in _ENDINGS and path.name[0] != "."]
        paths = sorted(visible, key=lambda path: natural_key(str(path)))
    sequences: list[LazySequence] = []
    broken: list[tuple[Path, Exception]] = []
    for path in paths:
        prefix = "" if len(paths) == 1 else f"{path.relative_to(folder).with_suffix('').as_posix()}/"
        try:
            sequences += _list_trajectories(path, prefix)
        except (OSError, ReaderError) as error:
            if len(paths) == 1:
                raise
            broken.append((path, error))
    field = sequences[0].field if sequences else "frames"
    return sequences + [BrokenSequence.of(path.stem, field, path, cause) for path, cause in broken]


@dataclass(frozen=True, kw_only=True)
class WellTrajectory(LazySequence):
    """One field of one trajectory.

    Attributes
    ----------
    array : str
        Path of the field in the file.
    row : int
    component : tuple of int
        Index along the axes of components.
    """

    array: str
    row: int
    component: tuple[int, ...]

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Read the field at this row, and the time."""
        import h5py

        path = self.files[0].path
        with decoding(path, f"{self.array} "), h5py.File(path, "r") as file:
            dataset, dims = file[self.array], _spatial_dims(file)
            lengths = _lengths(file, dataset, dims)
            check_size(lengths, dataset.dtype.itemsize, self.most_bytes, path, f"field {self.array!r}")
            row = (self.row,) if _varies(dataset, "sample_varying") else ()
            rest = (slice(None),) * (dataset.ndim - len(row) - len(self.component))
            values = dataset[(*row, *rest, *self.component)]
        varying = [True, *(bool(varies) for varies in self.settings["dim_varying"])]
        shape = [length if varies else 1 for length, varies in zip(lengths, varying, strict=True)]
        frames = np.broadcast_to(values.reshape(shape), lengths)
        if dims == ["x", "y"]:
            frames = frames.swapaxes(1, 2)
        return np.ascontiguousarray(frames)[..., None], scale_parameter(self.read_time(), self.name)

    def read_time(self) -> np.ndarray:
        """Read the times of the frames."""
        import h5py

        path = self.files[0].path
        with decoding(path, "dimensions/time "), h5py.File(path, "r") as file:
            time = file["dimensions/time"]
            values = time[self.row] if time.ndim == 2 else time[...]
        return np.asarray(values, dtype=np.float64)


def _list_trajectories(path: Path, prefix: str) -> list[LazySequence]:
    """List the fields of all trajectories of a file; only metadata is read."""
    import h5py

    source = SourceFile.of(path)
    if not h5py.is_hdf5(path):
        raise ReaderError("not an HDF5 file; expected one of The Well", str(path))
    with decoding(str(path)), h5py.File(path, "r") as file:
        if not is_well(path):
            raise ReaderError(
                f"no file of The Well: expected dimensions/time and {', '.join(GROUPS)}; found "
                f"{', '.join(file) or 'nothing'}",
                str(path),
            )
        dims = _spatial_dims(file)
        if len(dims) != 2:
            raise ReaderError(
                f"{len(dims)} spatial dims, {', '.join(dims)}; expected 2: volumes can't be compared yet",
                str(path),
            )
        trajectories = int(file.attrs["n_trajectories"])
        fields = list(_fields(file, dims))
        if trajectories * len(fields) > LISTED_SEQUENCES:
            raise ReaderError(f"{trajectories} trajectories; expected {LISTED_SEQUENCES} at most", str(path))
        return [
            WellTrajectory(
                name=f"{prefix}{row:05d}",
                field=name,
                files=(source,),
                settings={
                    "array": array,
                    "component": list(component),
                    "dim_varying": [bool(varies) for varies in file[array].attrs["dim_varying"]],
                },
                array=array,
                row=row,
                component=component,
            )
            for name, array, component in fields
            for row in range(trajectories)
        ]


def _fields(file: Any, dims: list[str]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """List the fields that vary in time: name, path of the array, and component."""
    for order, group in enumerate(GROUPS):
        for name, dataset in file.get(group, {}).items():
            if not _varies(dataset, "time_varying"):
                continue
            axes = order
            if order == 2 and dataset.shape[-1] == len(dims) ** 2:
                axes = 1  # both directions in one axis
            sizes = dataset.shape[dataset.ndim - axes :]
            for component in itertools.product(*map(range, sizes)):
                yield _component_name(name, order, component, dims), f"{group}/{name}", component


def _component_name(name: str, order: int, component: tuple[int, ...], dims: list[str]) -> str:
    """Name a component as The Well does: by its directions."""
    if order == 2 and len(component) == 1:
        component = divmod(component[0], len(dims))
    directions = "".join(dims[k] if k < len(dims) else str(k) for k in component)
    return f"{name}_{directions}" if directions else name


def _spatial_dims(file: Any) -> list[str]:
    names = file["dimensions"].attrs["spatial_dims"]
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _varies(dataset: Any, along: str) -> bool:
    return bool(dataset.attrs[along])


def _lengths(file: Any, dataset: Any, dims: list[str]) -> tuple[int, ...]:
    """Find the lengths of time and the spatial dims, of a field that may not vary along some of them."""
    return (file["dimensions/time"].shape[-1], *(file["dimensions"][dim].shape[-1] for dim in dims))
