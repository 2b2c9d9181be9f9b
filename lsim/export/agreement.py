"""Agreement of an exported metric with the metric: the frames compared and the tolerance."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

import numpy as np
import torch

from lsim.metrics.learned import LSiM
from lsim.preprocess import FramesError, finite_frames, preprocess

TOLERANCE = 1e-5
"""Largest relative difference: of an embedding by its length, of a distance by its value."""

SIZES: tuple[tuple[int, int], ...] = ((224, 224), (128, 160), (131, 195), (256, 512))
"""Frame sizes (y, x) to compare at, besides the metric's smallest; one is no multiple of 16."""

BATCHES = (3, 1, 2)
"""Numbers of random pairs per size, in turn."""

NEARLY_EQUAL = 0.01
"""Share of an embedding's length: for nearer pairs single precision cannot reach :data:`TOLERANCE`."""

LARGE = 1e30
"""Bound above any sum of a frame's values in [0, 255]."""

Embed: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Frames (n, y, x, 3) in [0, 255], float32 → embeddings (n, length)."""

Distance: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Two batches of such frames → distances (n,)."""


class ExportError(RuntimeError):
    """A metric cannot be exported, or its export does not agree with it."""


@dataclass(frozen=True)
class Case:
    """Pairs of frames to compare on: (n, y, x, 3) in [0, 255], float32."""

    kind: str
    reference: np.ndarray
    other: np.ndarray

    def __str__(self) -> str:
        n, y, x, _ = self.reference.shape
        return f"{self.kind} {n}×{y}×{x}"


@dataclass(frozen=True)
class Agreement:
    """Largest relative differences from the metric, over all frames compared.

    Attributes
    ----------
    embedding : float
        Length of the difference of embeddings, by the length of the embedding.
    distance : float
        Largest relative difference of the distance function.
    distance_of_embeddings : float
        Largest relative difference of the Euclidean distance of embeddings.
    tolerance : float
        Largest difference allowed.
    frames : list of str
        The frames compared: kind, number of pairs, y and x.
    by : str
        Library that computed the exported functions.
    """

    embedding: float
    distance: float
    distance_of_embeddings: float
    tolerance: float
    frames: list[str]
    by: str


def cases(
    metric: LSiM, sizes: Sequence[tuple[int, int]], frames: Mapping[str, np.ndarray], seed: int = 0
) -> list[Case]:
    """Make frames to compare on: random frames, and pairs of the given sequences, at each size.

    Parameters
    ----------
    metric : LSiM
    sizes : sequence of (y, x)
        A single size gets a second batch; to several, the metric's smallest is added.
    frames : mapping of str to ndarray (n, y, x) or (n, y, x, channel)
        Sequences of two frames or more, in any units. The first frame is paired with the second, the middle
        and the last.
    seed : int, default 0
        Seed of the random frames.

    Raises
    ------
    FramesError
        When a sequence has fewer than two frames, or missing values.
    """
    rng = np.random.default_rng(seed)
    smallest = metric.info.minimum_size
    sizes = [*sizes, *(sizes if len(sizes) == 1 else [(smallest, smallest)])]
    compared = []
    for k, (y, x) in enumerate(sizes):
        shape = (BATCHES[k % len(BATCHES)], y, x, 3)
        random = [255 * rng.random(shape, dtype=np.float32) for _ in range(2)]
        compared.append(Case("random", *random))
    for kind, sequence in frames.items():
        if len(sequence) < 2:
            raise FramesError(f"expected at least two {kind} frames to compare on, found {len(sequence)}")
        # The nearest pair, one between, and the farthest.
        indices = sorted({1, len(sequence) // 2, len(sequence) - 1})
        for y, x in dict.fromkeys(sizes):
            prepared = preprocess(sequence, size=max(y, x), order=1)[:, :y, :x]
            finite = finite_frames(prepared)
            if not finite.all():
                raise FramesError(
                    f"expected finite {kind} frames to compare on, found NaN, infinity or masked values in "
                    f"frame {np.argmin(finite)}"
                )
            compared.append(Case(kind, prepared[[0] * len(indices)], prepared[indices]))
    return compared


def compare(metric: LSiM, compared: Sequence[Case], embed: Embed, distance: Distance, by: str) -> Agreement:
    """Compare exported functions with the metric.

    Equal frames must have distance exactly 0.

    Raises
    ------
    ExportError
        When they differ by more than :data:`TOLERANCE`.
    FramesError
        When a pair is nearly equal, by :data:`NEARLY_EQUAL`: the difference would be rounding alone.
    """
    worst = dict.fromkeys(("embedding", "distance", "distance_of_embeddings"), 0.0)

    def check(function: str, case: Case, reference: np.ndarray, actual: np.ndarray) -> None:
        if actual.shape != reference.shape:
            raise ExportError(
                f"exported {function} of {case} frames by {by}: shape {actual.shape}, expected "
                f"{reference.shape}"
            )
        size, difference = length(reference), length(actual - reference)
        # Relative to 0, no difference is 0 and any other infinite.
        with np.errstate(divide="ignore"):
            quotient = np.divide(difference, size, out=np.zeros_like(difference), where=difference != 0)
        relative = quotient.max()
        if not relative <= TOLERANCE:
            raise ExportError(
                f"exported {function} of {case} frames by {by} differs from metric {metric.name!r} by "
                f"{relative:.1e} relative, more than {TOLERANCE:.0e}: nothing was written"
            )
        worst[function] = max(worst[function], float(relative))

    def length(values: np.ndarray) -> np.ndarray:
        return np.sqrt(np.square(values).sum(tuple(range(1, values.ndim))))

    for case in compared:
        with torch.no_grad():
            a, b = (metric.embed(torch.from_numpy(frames)) for frames in (case.reference, case.other))
            distances = metric.paired(a, b).numpy()
        features = [part.parts["features"].double().numpy() for part in (a, b)]
        sizes = np.maximum(*map(length, features))
        near = (distances > 0) & (distances < NEARLY_EQUAL * sizes)
        if near.any():
            pair = near.argmax()
            raise FramesError(
                f"cannot compare on {case} frames: pair {pair + 1} is nearly equal, at a distance of "
                f"{distances[pair] / sizes[pair]:.1e} of the length of its embeddings, less than "
                f"{NEARLY_EQUAL}; pass frames that are equal or differ more"
            )
        embeddings = [embed(frames).astype(np.float64) for frames in (case.reference, case.other)]
        for z, embedding in zip(features, embeddings, strict=True):
            check("embedding", case, z, embedding)
        norms = np.linalg.norm(embeddings[0] - embeddings[1], axis=1)
        check("distance_of_embeddings", case, distances, norms)
        check("distance", case, distances, distance(case.reference, case.other).astype(np.float64))
    return Agreement(**worst, tolerance=TOLERANCE, frames=list(map(str, compared)), by=by)


def facts(metric: LSiM, agreement: Agreement) -> dict[str, str]:
    """Describe an exported file in metadata of its own; JSON where the value isn't text."""
    return {
        "metric": metric.name,
        "title": metric.info.title,
        "source": metric.info.source,
        "specification": json.dumps(metric.specification(), sort_keys=True),
        "exported_by": f"lsim {importlib.metadata.version('lsim')}, torch {torch.__version__}",
        "agreement": json.dumps(asdict(agreement), ensure_ascii=False),
    }
