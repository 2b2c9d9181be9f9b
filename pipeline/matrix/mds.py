"""Frames as points of a plane, from the distances between them: plain functions on arrays.

Classical multidimensional scaling finds the positions whose inner products are nearest to those that the
squared distances imply (Torgerson 1952; Gower 1966). It needs all distances and the eigenvectors of a
matrix as large. Landmark scaling does so for a few frames, and places each other one by its distances to
these (de Silva and Tenenbaum, "Sparse multidimensional scaling using landmark points", 2004).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg

CLASSICAL_UP_TO = 2000
"""Frames of which all distances are taken: a second or two of eigenvectors, and 32 MB a matrix."""
LANDMARKS = 128
"""Frames that others are placed by, where there are more than :data:`CLASSICAL_UP_TO`."""
AXES = 2

SAME = 1e-6
"""Coordinates that differ by no more, relative to the largest, count as equal when an axis gets its sign."""

FLAT = 1e-10
"""An axis with a smaller eigenvalue, relative to the largest, is zero: rounding left that, and it has no
direction; landmarks would place others by it a long way off."""


@dataclass(frozen=True)
class FrameMap:
    """Where frames lie, and how much of their distances that shows.

    Attributes
    ----------
    positions : ndarray of shape (frame, 2), float64
        In the unit of the distances, centred; the first axis has the largest variance. NaN for frames that
        are left out.
    explained : float
        The two axes' share of the variance, the sum of the eigenvalues' magnitudes; of the landmarks, where
        there are some. 1 where the frames lie in a plane, NaN where all lie at one point.
    stress : float
        √(Σ (d − d̂)² / Σ d²) over the distances d that were used, d̂ being those on the map (Kruskal's
        stress-1). NaN where all are zero.
    left_out : ndarray of int
        Frames without a finite distance to the others.
    landmarks : ndarray of int
        Frames that the others were placed by; empty where all distances were used.
    """

    positions: np.ndarray
    explained: float
    stress: float
    left_out: np.ndarray
    landmarks: np.ndarray


def classical_map(distances: np.ndarray) -> FrameMap:
    """Place frames by all distances between them.

    Parameters
    ----------
    distances : ndarray of shape (frame, frame)
        Symmetric, from zero on; the diagonal counts as zero. A frame that cannot be compared has NaN.

    Raises
    ------
    ValueError
        For distances below zero, or that are no square matrix.
    """
    matrix = _with_nan(distances)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"expected a square matrix of distances, found shape {matrix.shape}")
    np.fill_diagonal(matrix, 0)
    kept = _comparable(matrix)
    matrix = matrix[np.ix_(kept, kept)]
    _check_sign(matrix)
    squares = matrix**2
    found, explained = _axes(_inner_products(squares))
    stress = _stress(found, found, matrix)
    return _on_all_frames(len(distances), kept, _turned(found), explained, stress, np.array([], dtype=int))


def landmark_map(to_landmarks: np.ndarray, landmarks: np.ndarray) -> FrameMap:
    """Place frames by their distances to a few of them; where these are all, as :func:`classical_map` does.

    Parameters
    ----------
    to_landmarks : ndarray of shape (landmark, frame)
        Distances of each landmark to every frame, from zero on. NaN for a frame that cannot be compared;
        a landmark that cannot isn't used.
    landmarks : ndarray of shape (landmark,), int
        Which frames these are, see :func:`choose_landmarks`.

    Raises
    ------
    ValueError
        For distances below zero, or where shapes don't fit.
    """
    rows = _with_nan(to_landmarks)
    landmarks = np.asarray(landmarks, dtype=int)
    if rows.ndim != 2 or landmarks.shape != rows.shape[:1]:
        raise ValueError(f"expected a row of distances for each of {len(landmarks)}, found {rows.shape}")
    count = rows.shape[1]
    rows[np.arange(len(landmarks)), landmarks] = 0
    used = _comparable(rows[:, landmarks])
    rows, landmarks = rows[used], landmarks[used]
    kept = np.flatnonzero(np.isfinite(rows).all(axis=0)) if len(rows) else np.array([], dtype=int)
    rows = rows[:, kept]
    _check_sign(rows)
    squares = rows**2
    between = squares[:, np.searchsorted(kept, landmarks)]
    found, explained = _axes(_inner_products(between))
    # x = −½ L⁺ (δ² − mean δ²) with L⁺ = Vᵀ/√λ: as positions are V √λ, each column is one over λ.
    sizes = (found**2).sum(axis=0)
    inverse = np.divide(found, sizes, out=np.zeros_like(found), where=sizes > 0)
    means = between.mean(axis=1, keepdims=True) if len(rows) else np.zeros((0, 1))
    placed = -0.5 * (squares - means).T @ inverse
    stress = _stress(found, placed, rows)
    return _on_all_frames(count, kept, _turned(placed), explained, stress, landmarks)


def choose_landmarks(
    distances_of: Callable[[int], np.ndarray], frames: int, count: int = LANDMARKS
) -> tuple[np.ndarray, np.ndarray]:
    """Landmarks by maxmin: each is the frame farthest from those before it. No draw is involved.

    Parameters
    ----------
    distances_of : callable
        Gives one frame's distances to all, (frame,).
    frames : int
    count : int
        Fewer are taken where no other frame is apart from all of these.

    Returns
    -------
    landmarks : ndarray of shape (landmark,), int
        The first is the first frame that has distances at all.
    to_landmarks : ndarray of shape (landmark, frame), float64
        As :func:`landmark_map` takes them.
    """
    chosen: list[int] = []
    rows: list[np.ndarray] = []
    nearest = np.full(frames, np.inf)
    for first in range(frames):
        row = _with_nan(distances_of(first))
        row[first] = 0
        if np.isfinite(row).sum() > 1 or frames == 1:
            break
    else:
        return np.array([], dtype=int), np.empty((0, frames))
    following = first
    while True:
        chosen.append(following)
        rows.append(row)
        # A frame without a distance to a landmark is no landmark.
        nearest = np.where(np.isfinite(row), np.minimum(nearest, row), -np.inf)
        following = int(np.argmax(nearest))
        if len(chosen) == min(count, frames) or nearest[following] <= 0:
            return np.array(chosen), np.stack(rows)
        row = _with_nan(distances_of(following))
        row[following] = 0


def spread(positions: np.ndarray, count: int) -> list[int]:
    """Frames far apart on a map, to be looked at: the one nearest the middle, then each farthest from those.

    Parameters
    ----------
    positions : ndarray of shape (frame, 2)
        NaN for frames that aren't there.
    """
    there = np.flatnonzero(np.isfinite(positions).all(axis=1))
    if not len(there):
        return []
    points = positions[there]
    chosen = [int(np.argmin((points**2).sum(axis=1)))]
    nearest = ((points - points[chosen[0]]) ** 2).sum(axis=1)
    while len(chosen) < min(count, len(points)) and nearest.max() > 0:
        chosen.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
    return [int(there[k]) for k in chosen]


def _with_nan(distances: np.ndarray) -> np.ndarray:
    """Copy distances to float64, NaN where they are masked."""
    return np.array(np.ma.filled(np.ma.asanyarray(distances, dtype=np.float64), np.nan))


def _comparable(matrix: np.ndarray) -> np.ndarray:
    """Frames of a square matrix of which all distances are finite, the worst left out first."""
    finite = np.isfinite(matrix)
    kept = np.arange(len(matrix))
    while len(kept):
        missing = (~finite[np.ix_(kept, kept)]).sum(axis=1)
        if not missing.any():
            break
        # Frames without any distance at once, of others the one that lacks most.
        alone = missing >= len(kept) - 1
        kept = kept[~alone] if alone.any() else np.delete(kept, missing.argmax())
    return kept


def _check_sign(distances: np.ndarray) -> None:
    if distances.size and distances.min() < 0:
        raise ValueError(
            f"a map needs distances from zero on, found {distances.min():g}: a metric whose values go below "
            "zero has no map"
        )


def _inner_products(squares: np.ndarray) -> np.ndarray:
    """−½ J D² J of squared distances, J being the centring: inner products of centred positions."""
    if not squares.size:
        return squares
    rows = squares.mean(axis=1, keepdims=True)
    return -0.5 * (squares - rows - rows.T + squares.mean())


def _axes(products: np.ndarray) -> tuple[np.ndarray, float]:
    """Positions on the axes of the two largest eigenvalues, 0 where one isn't positive, and these' share."""
    count = len(products)
    positions = np.zeros((count, AXES))
    if count < 2:
        return positions, np.nan
    values, vectors = scipy.linalg.eigh(products)
    total = np.abs(values).sum()
    flat = FLAT * np.abs(values).max()
    largest = range(count - 1, max(count - 1 - AXES, -1), -1)
    for axis, k in enumerate(largest):
        if values[k] > flat:
            positions[:, axis] = vectors[:, k] * np.sqrt(values[k])
    sizes = (positions**2).sum()
    return positions, float(sizes / total) if total > 0 else np.nan


def _turned(positions: np.ndarray) -> np.ndarray:
    """The same map, centred, along its principal axes, each with its farthest frame on the positive side."""
    if not len(positions):
        return positions
    centred = positions - positions.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    turned = centred @ vectors[:, ::-1]
    for axis in range(AXES):
        size = np.abs(turned[:, axis])
        farthest = int(np.argmax(size >= (1 - SAME) * size.max()))
        if turned[farthest, axis] < 0:
            turned[:, axis] *= -1
    return turned


def _stress(landmarks: np.ndarray, frames: np.ndarray, distances: np.ndarray) -> float:
    """Kruskal's stress-1 of positions, landmark by landmark: (landmark, 2), (frame, 2), (landmark, frame)."""
    off, total = 0.0, 0.0
    for position, row in zip(landmarks, distances, strict=True):
        on_map = np.hypot(*(frames - position).T)
        off += float(((row - on_map) ** 2).sum())
        total += float((row**2).sum())
    return float(np.sqrt(off / total)) if total > 0 else np.nan


def _on_all_frames(
    count: int,
    kept: np.ndarray,
    positions: np.ndarray,
    explained: float,
    stress: float,
    landmarks: np.ndarray,
) -> FrameMap:
    everywhere = np.full((count, AXES), np.nan)
    everywhere[kept] = positions
    left_out = np.setdiff1d(np.arange(count), kept)
    return FrameMap(everywhere, explained, stress, left_out, landmarks)
