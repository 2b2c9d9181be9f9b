"""Reader of arrays that hold many rollouts: the files that surrogate models write.

The source is one file, or a folder of them: ``.npy``, ``.npz``, ``.pt`` (a tensor, or a dict of tensors),
HDF5 or Zarr. Each holds an array with the dims time, y and x, and perhaps channel, sequence, run and sample.
Each channel is a field, or as ``channels`` says. A sequence is named by its number or by ``sequences``; where
there are runs or samples, or several files, before it stands the member that it is of, as in
``run0-sample2/00003``.

Options
-------
``array`` : name of the array in an ``.npz`` file, a dict, an HDF5 file or a Zarr group; default: the only
    one.
``arrays`` : mapping of field to the name of its array, instead: each field has its own, with the same dims.
``dims`` : list of dims in the array's order; default ``[sequence, time, channel, y, x]``, with run and sample
    before them where the array has more axes.
``channels`` : mapping of field to a channel's number, or to a list of them. Default: each channel is a field,
    ``channel0``, ``channel1``, …
``sequences`` : list of names. Default: numbers.
``time`` : list of the frames' times, ``{start, step}``, or the name of an array in the file. Default: 0, 1, …
``mask`` : ``{file, array, dims}`` of obstacles, where frames are multiplied by 0 (elsewhere by 1). ``file``
    lies beside the source; dims are y and x, perhaps with sequence.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
    list_folder,
    scale_parameter,
)
from pipeline.sources.readers.npy import list_npz, load_npy, load_npz
from pipeline.storage.limits import LISTED_SEQUENCES

VERSION = "1"
"""Increased when the same files are decoded to other frames or another parameter."""
_HDF5 = (".h5", ".hdf5", ".hdf")
_ENDINGS = (".npy", ".npz", ".pt", ".zarr", *_HDF5)
_MEMBERS = ("run", "sample")
_DIMS = ("run", "sample", "sequence", "time", "channel", "y", "x")


class Times(BaseModel):
    """Times of frames at equal steps."""

    model_config = ConfigDict(extra="forbid")

    start: float = 0.0
    step: float


class MaskOptions(BaseModel):
    """An array of obstacles: its file, its name there, and its dims."""

    model_config = ConfigDict(extra="forbid")

    file: str
    array: str | None = None
    dims: list[Literal["sequence", "y", "x"]] = ["y", "x"]


class ArraysOptions(BaseModel):
    """Options of this reader; see the module."""

    model_config = ConfigDict(extra="forbid")

    array: str | None = None
    arrays: dict[str, str] = {}
    dims: list[Literal["run", "sample", "sequence", "time", "channel", "y", "x"]] | None = None
    channels: dict[str, int | list[int]] = {}
    sequences: list[str] = []
    time: list[float] | Times | str | None = None
    mask: MaskOptions | None = None


def read(entry: Dataset, folder: Path) -> list[LazySequence]:
    """List the rollouts of every array at, or in, ``folder``."""
    options = reader_options(ArraysOptions, entry)
    paths = [folder]
    if folder.is_dir() and folder.suffix.lower() != ".zarr":
        mask = options.mask.file if options.mask else None
        children = [Path(child.path) for child in list_folder(folder)]
        paths = [path for path in children if path.suffix.lower() in _ENDINGS and path.name != mask]
    sequences: list[LazySequence] = []
    for path in paths:
        try:
            sequences += _list_rollouts(path, options, entry.sequence_bytes, alone=len(paths) == 1)
        except (OSError, ReaderError) as error:
            if len(paths) == 1:
                raise
            field = next(iter(options.channels), "channel0")
            sequences.append(BrokenSequence.of(path.stem, field, path, error))
    return sequences


@dataclass(frozen=True, kw_only=True)
class Rollout(LazySequence):
    """One field of one rollout; ``index`` has its place along the dims run, sample and sequence."""

    array: str | None
    index: dict[str, int]
    channels: tuple[int, ...]

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Take the rollout from the array, multiply it by the mask, and scale its time."""
        path, options = self.files[0].path, ArraysOptions.model_validate(self.settings["options"])
        with decoding(path):
            array = _load(self.files[0], self.array, self.most_bytes)
            dims = _dims_of(array.shape, options, path)
            sizes = [size for dim, size in zip(dims, array.shape, strict=True) if dim not in self.index]
            check_size(sizes, array.dtype.itemsize, self.most_bytes, path, "rollout")
            frames = _take(array, dims, self.index, self.channels)
            if options.mask is not None:
                frames = frames * self._mask(options.mask, frames)[..., None]
        return frames, scale_parameter(self.read_time(), self.name)

    def read_time(self) -> np.ndarray:
        """Return the times of the frames."""
        return np.asarray(self.settings["time"], dtype=np.float64)

    def _mask(self, options: MaskOptions, frames: np.ndarray) -> np.ndarray:
        """Load the mask of this rollout, (y, x), in the dtype of the frames."""
        file = self.files[1]
        with decoding(file.path, "mask "):
            array = np.asarray(_load(file, options.array, self.most_bytes))
            if array.ndim != len(options.dims):
                raise ReaderError(f"mask of shape {array.shape}; expected the dims {options.dims}", file.path)
            if "sequence" in options.dims:
                array = np.take(array, self.index.get("sequence", 0), axis=options.dims.index("sequence"))
            rest = [dim for dim in options.dims if dim != "sequence"]
            array = array.T if rest == ["x", "y"] else array
        values = np.asarray(array)
        if values.shape != frames.shape[1:3] or not np.isin(values, (0, 1)).all():
            raise ReaderError(
                f"mask of shape {values.shape}; expected {frames.shape[1:3]}, of zeros (obstacle) and ones",
                file.path,
            )
        return values.astype(frames.dtype)


def _list_rollouts(path: Path, options: ArraysOptions, most: int, *, alone: bool) -> list[LazySequence]:
    """List the fields of all rollouts of one file."""
    file = SourceFile.of(path)
    files = [file]
    if options.mask is not None:
        files.append(SourceFile.of(path.parent / options.mask.file))
    if options.arrays and (options.array or options.channels):
        raise ReaderError("options arrays: leave out array and channels", str(path))
    fields: dict[str, tuple[str | None, int | list[int]]] = {
        field: (array, 0) for field, array in options.arrays.items()
    }
    with decoding(str(path)):
        shape = _load(file, next(iter(options.arrays.values()), options.array), most).shape
        dims = _dims_of(shape, options, str(path))
        sizes = dict(zip(dims, shape, strict=True))
        times = _times(options, sizes["time"], file, most)
    names = options.sequences or [f"{number:05d}" for number in range(sizes.get("sequence", 1))]
    if len(names) != sizes.get("sequence", 1):
        raise ReaderError(f"{len(names)} names for {sizes.get('sequence', 1)} sequences", str(path))
    channels = options.channels or {f"channel{k}": k for k in range(sizes.get("channel", 1))}
    fields = fields or {field: (options.array, numbers) for field, numbers in channels.items()}
    along = [dim for dim in (*_MEMBERS, "sequence") if dim in sizes]
    places = list(itertools.product(*(range(sizes[dim]) for dim in along)))
    if len(places) * len(fields) > LISTED_SEQUENCES:
        raise ReaderError(f"{len(places)} rollouts; expected {LISTED_SEQUENCES} at most", str(path))
    rollouts: list[LazySequence] = []
    for place, (field, (array, numbers)) in itertools.product(places, fields.items()):
        index = dict(zip(along, place, strict=True))
        member = "-".join(f"{dim}{index[dim]}" for dim in _MEMBERS if dim in index)
        parts = (
            ([] if alone else [path.stem]) + ([member] if member else []) + [names[index.get("sequence", 0)]]
        )
        rollouts.append(
            Rollout(
                name="/".join(["-".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts),
                field=field,
                files=tuple(files),
                settings={
                    "options": options.model_dump(),
                    "time": times,
                    "index": index,
                    "field": [array, numbers],
                },
                array=array,
                index=index,
                channels=(numbers,) if isinstance(numbers, int) else tuple(numbers),
            )
        )
    return rollouts


def _times(options: ArraysOptions, count: int, file: SourceFile, most: int) -> list[float]:
    if isinstance(options.time, Times):
        return [options.time.start + options.time.step * k for k in range(count)]
    times = [float(k) for k in range(count)] if options.time is None else options.time
    if isinstance(times, str):
        values = np.asarray(_load(file, times, most))
        times = values.reshape(-1).astype(np.float64).tolist()
    if len(times) != count:
        raise ReaderError(f"{len(times)} times for {count} frames", file.path)
    return times


def _dims_of(shape: tuple[int, ...], options: ArraysOptions, path: str) -> tuple[str, ...]:
    """Name the axes of an array."""
    dims = tuple(options.dims) if options.dims else _DIMS[len(_DIMS) - len(shape) :]
    if len(dims) != len(shape) or len(set(dims)) != len(dims) or not {"time", "y", "x"} <= set(dims):
        raise ReaderError(
            f"array of shape {shape}; expected {len(dims)} axes, {', '.join(dims)} (options.dims states "
            "others)",
            path,
        )
    return dims


def _take(
    array: np.ndarray, dims: Sequence[str], index: dict[str, int], channels: Sequence[int]
) -> np.ndarray:
    """Take frames (time, y, x, channel) of a rollout."""
    # An axis at a time, so that a memory map reads no more than it must.
    part = array[tuple(index.get(dim, slice(None)) for dim in dims)]
    rest = [dim for dim in dims if dim not in index]
    if "channel" not in rest:
        part, rest = part[..., None], [*rest, "channel"]
    order = [rest.index(dim) for dim in ("time", "y", "x", "channel")]
    frames = part.transpose(order)
    if max(channels) >= frames.shape[3]:
        raise ReaderError(f"no channel {max(channels)}; the array has {frames.shape[3]}")
    return np.ascontiguousarray(frames[..., list(channels)])


@functools.lru_cache(maxsize=2)
def _load(file: SourceFile, name: str | None, most: int) -> Any:
    """Load an array, or map it into memory; the last two stay, as all rollouts of a file need them."""
    path = file.path
    ending = Path(path).suffix.lower()
    if ending == ".npy":
        return load_npy(path, most, mapped=True)
    if ending == ".npz":
        names = [name] if name else list_npz(path)
        if len(names) != 1:
            raise ReaderError(f"several arrays: {', '.join(names)}; options.array chooses one", path)
        return load_npz(path, names, most)[0]
    if ending == ".pt":
        return _load_tensor(path, name)
    return _open_hdf5(path, name) if ending in _HDF5 else _open_zarr(path, name)


def _load_tensor(path: str, name: str | None) -> np.ndarray:
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    tensors = {"": content} if isinstance(content, torch.Tensor) else content
    if not isinstance(tensors, dict) or not all(isinstance(v, torch.Tensor) for v in tensors.values()):
        raise ReaderError("expected a tensor, or a dict of tensors", path)
    key = next(iter(tensors)) if name is None and len(tensors) == 1 else name or ""
    if key not in tensors:
        raise ReaderError(f"no tensor {key!r}; found {', '.join(map(str, tensors))}", path)
    return np.asarray(tensors[key].numpy())


def _open_hdf5(path: str, name: str | None) -> Any:
    """Open an array of an HDF5 file, of which rollouts are read one by one."""
    import h5py

    file = h5py.File(path, "r")
    arrays: list[str] = []
    file.visititems(lambda member, node: arrays.append(member) if isinstance(node, h5py.Dataset) else None)
    return file[_choose(name, arrays, path)]


def _open_zarr(path: str, name: str | None) -> Any:
    """Open an array of a Zarr store, of which rollouts are read one by one."""
    from pipeline.storage import store

    node = store.open_node(path)
    if name is None and hasattr(node, "shape"):
        return node
    return (
        node[name]
        if name is not None and name in node
        else node[_choose(name, list(node.array_keys()), path)]
    )


def _choose(name: str | None, arrays: Sequence[str], path: str) -> str:
    """Choose an array by name, or the only one."""
    if name in arrays:
        return str(name)
    if name is None and len(arrays) == 1:
        return arrays[0]
    raise ReaderError(f"arrays: {', '.join(arrays) or 'none'}; options.array chooses one", path)
