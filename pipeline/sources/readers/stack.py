"""Reader of NumPy stacks: one ``.npz`` or ``.npy`` file a sequence.

``name.npz`` holds the array ``frames`` (n, y, x) or (n, y, x, channel) and the array ``parameter`` (n,).
``name.npy`` holds the frames, ``name.parameter.npy`` beside it the parameter. The parameter is scaled to
[0, 1]. Folders within the folder are searched too. A sequence's name is its path without the ending; endings
count in any case. The field is taken, in lower case, from the name where it is between dots
(``run1.density.npz``).

Options: ``field`` (default "frames"), ``arrays`` (field: key, for NPZ files with several fields;
default ``{<field>: frames}``), ``parameter`` (the key of the parameter, default "parameter", or a list of
numbers that holds for all sequences), ``weights`` (the key of an array (y, x) in each NPZ file that weights
the pixels in means; default none).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipeline.sources.catalog import Dataset, reader_options
from pipeline.sources.readers.base import (
    BrokenSequence,
    LazySequence,
    ReaderError,
    SourceFile,
    decoding,
    field_in_name,
    natural_key,
    scale_parameter,
    with_channel,
)
from pipeline.sources.readers.npy import load_npy, load_npz

VERSION = "1"
"""Increased when the same files are decoded to other frames or another parameter."""
_BESIDE = ".parameter.npy"


class StackOptions(BaseModel):
    """Options of this reader; see the module."""

    model_config = ConfigDict(extra="forbid")

    field: str = "frames"
    arrays: dict[str, str] = {}
    parameter: str | list[float] = "parameter"
    weights: str | None = None


def read(entry: Dataset, folder: Path) -> list[LazySequence]:
    """List the sequences in ``folder`` and the folders below, one for each stack and field."""
    options = reader_options(StackOptions, entry)
    paths = (
        [folder]
        if folder.is_file()
        else [p for p in folder.rglob("*") if p.suffix.lower() in (".npy", ".npz") and not p.is_dir()]
    )
    top = folder.parent if folder.is_file() else folder
    sequences: list[LazySequence] = []
    for path in sorted(paths, key=lambda p: natural_key(p.relative_to(top).as_posix())):
        if path.name.lower().endswith(_BESIDE) or any(p.startswith(".") for p in path.relative_to(top).parts):
            continue
        name = path.relative_to(top).with_suffix("").as_posix()
        arrays = options.arrays or {field_in_name(path.stem, options.field): "frames"}
        beside = path.with_name(f"{path.stem}.parameter{path.suffix}")
        try:
            files = [SourceFile.of(path)]
            if path.suffix.lower() == ".npy" and isinstance(options.parameter, str) and beside.is_file():
                files.append(SourceFile.of(beside))
        except (OSError, ReaderError) as error:
            sequences += [BrokenSequence.of(name, field, path, error) for field in arrays]
            continue
        sequences += [
            StackSequence(
                name=name,
                field=field,
                files=tuple(files),
                # Earlier versions recorded no weights: without weights the settings must stay the same.
                settings={"key": key, "parameter": options.parameter}
                | ({"weights": options.weights} if options.weights is not None else {}),
            )
            for field, key in arrays.items()
        ]
    return sequences


@dataclass(frozen=True, kw_only=True)
class StackSequence(LazySequence):
    """One file of stacked frames."""

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Decode the stack and its parameter."""
        path, key = self.files[0].path, self.settings["key"]
        with decoding(path):
            if path.lower().endswith(".npy"):
                frames = load_npy(path, self.most_bytes)
            else:
                (frames,) = load_npz(path, [key], self.most_bytes)
        parameter = self.read_time()
        if frames.ndim not in (3, 4):
            raise ReaderError(
                f"array of shape {frames.shape}; expected (frame, y, x) or (frame, y, x, channel), "
                "one sequence a file",
                path,
            )
        try:
            scaled = scale_parameter(np.asarray(parameter), self.name)
        except ReaderError as error:
            raise ReaderError(error.reason, path) from error
        if len(scaled) != len(frames):
            raise ReaderError(f"{len(frames)} frames, but {len(scaled)} values of the parameter", path)
        return with_channel(frames), scaled

    def read_time(self) -> np.ndarray:
        """Decode the parameter as it is stored."""
        path, parameter = self.files[0].path, self.settings["parameter"]
        with decoding(path):
            if not isinstance(parameter, str):
                return np.asarray(parameter, dtype=np.float64)
            if not path.lower().endswith(".npy"):
                return load_npz(path, [parameter], self.most_bytes)[0]
            if len(self.files) < 2:
                raise ReaderError(
                    f"no parameter: expected it in {Path(path).stem}.parameter{Path(path).suffix}", path
                )
            return load_npy(self.files[1].path, self.most_bytes)

    def read_weights(self) -> np.ndarray | None:
        """Decode the array of weights."""
        path, key = self.files[0].path, self.settings.get("weights")
        if key is None:
            return None
        if path.lower().endswith(".npy"):
            raise ReaderError(f"a single array, without weights {key!r}; expected an NPZ file of both", path)
        with decoding(path):
            (weights,) = load_npz(path, [key], self.most_bytes)
        return weights
