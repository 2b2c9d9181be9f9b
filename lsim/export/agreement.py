"""How well an exported metric agrees with the metric: on which frames, and to what."""

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
"""Relative difference that is allowed: of an embedding, in its length; of a distance, in its value."""

SIZES: tuple[tuple[int, int], ...] = ((224, 224), (128, 160), (131, 195), (256, 512))
"""Frame sizes (y, x) to compare at, and the smallest that the metric takes; two aren't multiples of 16."""

BATCHES = (3, 1, 2)
"""Numbers of random pairs, in turn."""

NEARLY_EQUAL = 0.01
"""Of the length of an embedding: at nearer pairs single precision leaves less than :data:`TOLERANCE` asks."""

LARGE = 1e30
"""Beyond every sum of a frame's values in [0, 255]."""

Embed: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Frames (n, y, x, 3) in [0, 255], float32 → embeddings (n, length)."""

Distance: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Two batches of such frames → distances (n,)."""


class ExportError(RuntimeError):
    """A metric that cannot be exported, or an export that does not agree with it."""


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
        Of the distance function.
    distance_of_embeddings : float
        Of the Euclidean distance of embeddings.
    tolerance : float
        What was allowed.
    frames : list of str
        What was compared on: kind, number of pairs, y and x.
    by : str
        What computed it.
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
    """Frames to compare on: random ones, and pairs of the sequences given, at every size.

    Parameters
    ----------
    metric : LSiM
    sizes : sequence of (y, x)
        Of one size alone, one batch more is made; of more, the metric's smallest is added.
    frames : mapping of str to ndarray (n, y, x) or (n, y, x, channel)
        In any units; of two frames or more, of which the first is paired with the second, the middle one and
        the last.
    seed : int, default 0
        Of the random frames.
    """
    rng = np.random.default_rng(seed)
    smallest = metric.info.minimum_size
    sizes = [*sizes, *(sizes if len(sizes) == 1 else [(smallest, smallest)])]
    found = []
    for k, (y, x) in enumerate(sizes):
        shape = (BATCHES[k % len(BATCHES)], y, x, 3)
        random = [255 * rng.random(shape, dtype=np.float32) for _ in range(2)]
        found.append(Case("random", *random))
    for kind, sequence in frames.items():
        if len(sequence) < 2:
            raise FramesError(f"expected two {kind} frames or more to compare on, found {len(sequence)}")
        # The pair that is nearest, one between, and the one that is farthest apart.
        others = sorted({1, len(sequence) // 2, len(sequence) - 1})
        for y, x in dict.fromkeys(sizes):
            prepared = preprocess(sequence, size=max(y, x), order=1)[:, :y, :x]
            if not (finite := finite_frames(prepared)).all():
                raise FramesError(
                    f"expected finite {kind} frames to compare on, found NaN, infinity or masked values in "
                    f"frame {np.argmin(finite)}"
                )
            found.append(Case(kind, prepared[[0] * len(others)], prepared[others]))
    return found


def compare(metric: LSiM, compared: Sequence[Case], embed: Embed, distance: Distance, by: str) -> Agreement:
    """Compare exported functions with the metric.

    Equal frames have distance 0, and no other will do.

    Raises
    ------
    ExportError
        Where they differ by more than :data:`TOLERANCE`; names what, the frames, expected and found.
    FramesError
        Where a pair is nearly equal, by :data:`NEARLY_EQUAL`: no figure would say anything of the export.
    """
    worst = dict.fromkeys(("embedding", "distance", "distance_of_embeddings"), 0.0)

    def note(what: str, case: Case, expected: np.ndarray, found: np.ndarray) -> None:
        if found.shape != expected.shape:
            raise ExportError(
                f"exported {what} of {case} frames by {by}: shape {found.shape}, expected {expected.shape}"
            )
        size, difference = length(expected), length(found - expected)
        # Relative to 0, nothing is 0 and all else infinite.
        with np.errstate(divide="ignore"):
            quotient = np.divide(difference, size, out=np.zeros_like(difference), where=difference != 0)
        relative = quotient.max()
        if not relative <= TOLERANCE:
            raise ExportError(
                f"exported {what} of {case} frames by {by} differs from metric {metric.name!r} by "
                f"{relative:.1e} relative, more than {TOLERANCE:.0e}: nothing was written"
            )
        worst[what] = max(worst[what], float(relative))

    def length(values: np.ndarray) -> np.ndarray:
        return np.sqrt(np.square(values).sum(tuple(range(1, values.ndim))))

    for case in compared:
        with torch.no_grad():
            a, b = (metric.embed(torch.from_numpy(frames)) for frames in (case.reference, case.other))
            distances = metric.paired(a, b).numpy()
        expected = [embedding.parts["features"].double().numpy() for embedding in (a, b)]
        sizes = np.maximum(*map(length, expected))
        near = (distances > 0) & (distances < NEARLY_EQUAL * sizes)
        if near.any():
            pair = near.argmax()
            raise FramesError(
                f"cannot compare on {case} frames: pair {pair + 1} is nearly equal, at a distance of "
                f"{distances[pair] / sizes[pair]:.1e} of the length of its embeddings, less than "
                f"{NEARLY_EQUAL}; give frames that are equal or differ more"
            )
        found = [embed(frames).astype(np.float64) for frames in (case.reference, case.other)]
        for z, computed in zip(expected, found, strict=True):
            note("embedding", case, z, computed)
        note("distance_of_embeddings", case, distances, np.linalg.norm(found[0] - found[1], axis=1))
        note("distance", case, distances, distance(case.reference, case.other).astype(np.float64))
    return Agreement(**worst, tolerance=TOLERANCE, frames=list(map(str, compared)), by=by)


def facts(metric: LSiM, agreement: Agreement) -> dict[str, str]:
    """What an exported file says of itself; JSON where it isn't a sentence."""
    return {
        "metric": metric.name,
        "title": metric.info.title,
        "source": metric.info.source,
        "specification": json.dumps(metric.specification(), sort_keys=True),
        "exported_by": f"lsim {importlib.metadata.version('lsim')}, torch {torch.__version__}",
        "agreement": json.dumps(asdict(agreement), ensure_ascii=False),
    }
