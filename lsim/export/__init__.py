"""Learned metrics for other frameworks: as ONNX, as Keras models, and as plain weights.

>>> from lsim.export import export_metric
>>> export_metric("lsim-open", "onnx", "exported")     # doctest: +SKIP

A metric leaves as two functions of frames in [0, 255]: its *embedding*, and the *distance*, which is the
Euclidean distance of embeddings. What was written is read back and compared with the metric before it is
left in its place, and says itself how well it agrees.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from lsim.export.agreement import SIZES, Agreement, Case, ExportError, cases, compare, facts
from lsim.metrics.learned import LSiM
from lsim.networks import TRUNKS
from lsim.registry import load_metric
from lsim.simulate import simulate_families
from lsim.weights import find_weights, load_checkpoint, read_metadata, save_checkpoint

__all__ = ["FORMATS", "ExportError", "Exported", "Format", "export_metric"]

Format = Literal["onnx", "keras", "safetensors"]
FORMATS: tuple[Format, ...] = get_args(Format)

FIXED_SIZE = 224
"""Side of the frames where a format takes one size alone: what metrics resize to by default."""


@dataclass(frozen=True)
class Exported:
    """The files that :func:`export_metric` left, and how well what they compute agrees with the metric."""

    paths: list[Path]
    agreement: Agreement


def export_metric(
    name: str,
    format: Format,
    folder: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    size: int | None = None,
    frames: Mapping[str, np.ndarray] | None = None,
) -> Exported:
    """Write a learned metric in a format that others read.

    Parameters
    ----------
    name : str
        A learned metric, as :func:`lsim.load_metric` takes it.
    format : {"onnx", "keras", "safetensors"}
        ``"onnx"``: ``<name>.embedding.onnx`` and ``<name>.distance.onnx``, for frames (n, 3, y, x) of any
        number and size. ``"keras"``: the same two as ``.keras``, of standard layers, for frames
        (n, size, size, 3) of any number. ``"safetensors"``: ``<name>.weights.safetensors``, weights as
        :mod:`lsim.weights` describes them.
    folder : path
        Made where it is missing; files of these names in it are replaced.
    weights : path or str, optional
        As :func:`lsim.load_metric` takes it.
    size : int, optional
        Side of the frames that a Keras model takes; default 224. The other formats take any size.
    frames : mapping of str to ndarray (n, y, x) or (n, y, x, channel), optional
        Sequences of two frames or more, in any units, by what to call them: compared besides random frames,
        the first with the second, the middle one and the last. Where these are equal, distances have to be
        0; nearly equal ones are refused, since single precision leaves too few digits there. Default: a
        simulated plume.

    Returns
    -------
    Exported

    Raises
    ------
    ExportError
        When the metric has no network, a package is missing, or what was written does not agree with the
        metric to 1e-5 relative; nothing is left in the folder then.
    lsim.preprocess.FramesError
        When the metric doesn't take frames of ``size``, or ``frames`` aren't as described.
    UnknownMetricError, lsim.weights.WeightsError
        As :func:`lsim.load_metric`.
    """
    if format not in FORMATS:
        raise ExportError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if size is not None and format != "keras":
        raise ExportError(f"{format} takes frames of any size, got size={size}: that is for keras alone")
    metric = load_metric(name, weights, "cpu", size=None)
    if not isinstance(metric, LSiM):
        raise ExportError(f"metric {name!r} is not learned: it has no network to export")
    write: Callable[[LSiM, Path, list[Case]], Agreement]
    sizes = SIZES
    if format == "safetensors":
        write = functools.partial(write_safetensors, origin=find_weights(name, weights))
    elif format == "onnx":
        with _needs("onnx"):
            from lsim.export.onnx import write_onnx
        write = write_onnx
    else:
        with _needs("keras"):
            from lsim.export.keras import write_keras
        side = FIXED_SIZE if size is None else size
        metric.check_size(side, side)
        sizes = ((side, side),)
        write = functools.partial(write_keras, size=side)

    if frames is None:
        frames = {"plume": simulate_families("smoke", 1, size=64).frames["density"][0]}
    compared = cases(metric, sizes, frames)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Beside their place until they are found to agree.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as temporary:
        agreement = write(metric, Path(temporary), compared)
        written = sorted(Path(temporary).iterdir())
        return Exported([path.replace(folder / path.name) for path in written], agreement)


def write_safetensors(metric: LSiM, folder: Path, compared: Sequence[Case], origin: Path) -> Agreement:
    """Write ``<name>.weights.safetensors``.

    Parameters
    ----------
    metric : LSiM
    folder : Path
    compared : sequence of Case
    origin : Path
        The file of the metric's weights. What it says of how they were made is kept.
    """
    path = folder / f"{metric.name}.weights.safetensors"
    checkpoint = load_checkpoint(origin, metric.trunk_class)
    trunk = next(name for name, trunk_class in TRUNKS.items() if trunk_class is metric.trunk_class)
    history = read_metadata(origin) if origin.suffix == ".safetensors" else {}

    save_checkpoint(path, checkpoint, trunk, history)
    read = type(metric)(
        metric.name, metric.preprocessing, metric.device, load_checkpoint(path, metric.trunk_class)
    )

    def embed(frames: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = read.embed(torch.from_numpy(frames)).parts["features"].numpy()
        return found

    def distances(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            a, b = (read.embed(torch.from_numpy(frames)) for frames in (reference, other))
            return read.paired(a, b).numpy()

    agreement = compare(metric, compared, embed, distances, f"torch {torch.__version__}")
    save_checkpoint(path, checkpoint, trunk, history | facts(metric, agreement))
    return agreement


@contextlib.contextmanager
def _needs(extra: str) -> Iterator[None]:
    """Say which extra brings what an import finds missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ExportError(
            f"export to {extra} needs the package {error.name!r}: install the extra, as in "
            f"pip install 'lsim[{extra}]'"
        ) from error
