"""Export of learned metrics to other frameworks: ONNX, Keras models, and plain weights.

>>> from lsim.export import export_metric
>>> export_metric("lsim-open", "onnx", "exported")     # doctest: +SKIP

A metric is exported as two functions of frames in [0, 255]: its *embedding*, and the *distance*, the
Euclidean distance of embeddings. Each file is read back and compared with the metric before it is moved into
place, and records how well it agrees.
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
"""Side of the frames where a format has a fixed size: the default size of metrics."""


@dataclass(frozen=True)
class Exported:
    """The files of :func:`export_metric`, and how well their results agree with the metric."""

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
    """Write a learned metric in the format of another framework.

    Parameters
    ----------
    name : str
        A learned metric, as for :func:`lsim.load_metric`.
    format : {"onnx", "keras", "safetensors"}
        ``"onnx"``: ``<name>.embedding.onnx`` and ``<name>.distance.onnx``, for frames (n, 3, y, x) of any
        number and size. ``"keras"``: the same two as ``.keras``, of standard layers, for frames
        (n, size, size, 3) of any number. ``"safetensors"``: ``<name>.weights.safetensors``, weights as
        :mod:`lsim.weights` describes them.
    folder : path
        Output folder; created if missing. Files of these names in it are replaced.
    weights : path or str, optional
        As for :func:`lsim.load_metric`.
    size : int, optional
        Side of the frames of a Keras model; default 224. The other formats accept any size.
    frames : mapping of str to ndarray (n, y, x) or (n, y, x, channel), optional
        Sequences by name, each of two frames or more, in any units. They are compared besides random frames:
        the first frame with the second, the middle and the last. Equal frames must have distance 0; nearly
        equal frames are an error, since single precision leaves too few digits. Default: a simulated plume.

    Returns
    -------
    Exported

    Raises
    ------
    ExportError
        When the metric has no network, a package is missing, or the export does not agree with the metric to
        1e-5 relative; then nothing is written to the folder.
    lsim.preprocess.FramesError
        When the metric doesn't take frames of ``size``, or ``frames`` aren't as described.
    UnknownMetricError, lsim.weights.WeightsError
        See :func:`lsim.load_metric`.
    """
    if format not in FORMATS:
        raise ExportError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if size is not None and format != "keras":
        raise ExportError(f"{format} accepts frames of any size, got size={size}: only keras needs a size")
    metric = load_metric(name, weights, "cpu", size=None)
    if not isinstance(metric, LSiM):
        raise ExportError(f"metric {name!r} is not a learned metric: it has no network to export")
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
    # Files are moved into place only once they agree.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as temporary:
        agreement = write(metric, Path(temporary), compared)
        files = sorted(Path(temporary).iterdir())
        return Exported([path.replace(folder / path.name) for path in files], agreement)


def write_safetensors(metric: LSiM, folder: Path, compared: Sequence[Case], origin: Path) -> Agreement:
    """Write ``<name>.weights.safetensors``.

    Parameters
    ----------
    metric : LSiM
    folder : Path
    compared : sequence of Case
    origin : Path
        File of the metric's weights; its metadata are kept.
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
            features: np.ndarray = read.embed(torch.from_numpy(frames)).parts["features"].numpy()
        return features

    def distances(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            a, b = (read.embed(torch.from_numpy(frames)) for frames in (reference, other))
            return read.paired(a, b).numpy()

    agreement = compare(metric, compared, embed, distances, f"torch {torch.__version__}")
    save_checkpoint(path, checkpoint, trunk, history | facts(metric, agreement))
    return agreement


@contextlib.contextmanager
def _needs(extra: str) -> Iterator[None]:
    """Name the extra to install when an import fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ExportError(
            f"export to {extra} needs the package {error.name!r}: install the extra, as in "
            f"pip install 'lsim[{extra}]'"
        ) from error
