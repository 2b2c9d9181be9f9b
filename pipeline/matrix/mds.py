"""Multidimensional scaling (MDS): place frames in a plane so that it represents their distances well.

Classical MDS finds the positions whose inner products are nearest to those implied by the squared distances
(Torgerson 1952; Gower 1966). It needs all distances, and the eigenvectors of a matrix of that size. Landmark
MDS does this for a few frames, and places the others by their distances to these (de Silva and Tenenbaum,
"Sparse multidimensional scaling using landmark points", 2004). All functions work on plain arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg

CLASSICAL_UP_TO = 2000
"""Number of frames up to which all distances are used: 32 MB, and a second or two for eigenvectors."""
LANDMARKS = 128
"""Number of landmarks, if there are more than :data:`CLASSICAL_UP_TO` frames."""
AXES = 2
"""Dimensions of a map."""

SAME = 1e-6
"""Relative difference up to which coordinates count as equal when the sign of an axis is chosen."""

FLAT = 1e-10
"""Eigenvalues below this share of the largest count as zero. They are rounding errors without a direction,
and landmarks would place other frames far off along them."""


@dataclass(frozen=True)
class FrameMap:
    """Positions of frames, and how well they represent the distances.

    Attributes
    ----------
    positions : ndarray of shape (frame, 2), float64
        Centred positions, in the unit of the distances; the first axis has the largest variance. NaN for
        frames that are left out.
    explained : float
        Share of the two axes in the variance, that is in the sum of the eigenvalues' magnitudes; if there are
        landmarks, in theirs. 1 if the frames lie in a plane, NaN if all lie at one point.
    stress : float
        Kruskal's stress-1, √(Σ (d − d̂)² / Σ d²), over the distances d that were used and their values d̂ on
        the map. NaN if all distances are zero.
    left_out : ndarray of int
        Frames without a finite distance to the others.
    landmarks : ndarray of int
        Frames by which the others were placed; empty if all distances were used.
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
        Symmetric and not negative; the diagonal counts as zero. NaN for frames that cannot be compared.

    Raises
    ------
    ValueError
        For negative distances, and for a matrix that is not square.
    """
    matrix = _with_nan(distances)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"expected a square matrix of distances, found shape {matrix.shape}")
    np.fill_diagonal(matrix, 0)
    comparable = _comparable(matrix)
    matrix = matrix[np.ix_(comparable, comparable)]
    _check_sign(matrix)
    positions, explained = _axes(_inner_products(matrix**2))
    stress = _stress(positions, positions, matrix)
    everywhere, omissions = _on_all_frames(len(distances), comparable, positions)
    return FrameMap(everywhere, explained, stress, omissions, np.array([], dtype=int))


def landmark_map(to_landmarks: np.ndarray, landmarks: np.ndarray) -> FrameMap:
    """Place frames by their distances to landmarks; equals :func:`classical_map` if all are landmarks.

    Parameters
    ----------
    to_landmarks : ndarray of shape (landmark, frame)
        Distances of each landmark to each frame, not negative. NaN for frames that cannot be compared; such
        landmarks are not used.
    landmarks : ndarray of shape (landmark,), int
        Indices of the landmarks among the frames, see :func:`choose_landmarks`.

    Raises
    ------
    ValueError
        For negative distances, and for shapes that don't fit.
    """
    rows = _with_nan(to_landmarks)
    landmarks = np.asarray(landmarks, dtype=int)
    if rows.ndim != 2 or landmarks.shape != rows.shape[:1]:
        raise ValueError(
            f"expected distances of {len(landmarks)} landmarks to all frames, found shape {rows.shape}"
        )
    frames = rows.shape[1]
    rows[np.arange(len(landmarks)), landmarks] = 0
    usable = _comparable(rows[:, landmarks])
    rows, landmarks = rows[usable], landmarks[usable]
    comparable = np.flatnonzero(np.isfinite(rows).all(axis=0)) if len(rows) else np.array([], dtype=int)
    rows = rows[:, comparable]
    _check_sign(rows)
    squares = rows**2
    landmark_squares = squares[:, np.searchsorted(comparable, landmarks)]
    landmark_positions, explained = _axes(_inner_products(landmark_squares))
    # x = −½ L⁺ (δ² − mean δ²) with L⁺ = Vᵀ/√λ. Positions are V √λ, so L⁺ is their transpose over λ.
    eigenvalues = (landmark_positions**2).sum(axis=0)
    inverse = np.divide(
        landmark_positions, eigenvalues, out=np.zeros_like(landmark_positions), where=eigenvalues > 0
    )
    means = landmark_squares.mean(axis=1, keepdims=True) if len(rows) else np.zeros((0, 1))
    positions = -0.5 * (squares - means).T @ inverse
    stress = _stress(landmark_positions, positions, rows)
    everywhere, omissions = _on_all_frames(frames, comparable, positions)
    return FrameMap(everywhere, explained, stress, omissions, landmarks)


def choose_landmarks(
    distances_of: Callable[[int], np.ndarray], frames: int, count: int = LANDMARKS
) -> tuple[np.ndarray, np.ndarray]:
    """Choose landmarks by maxmin: each is the frame farthest from those before it. Deterministic.

    Parameters
    ----------
    distances_of : callable
        Returns the distances of one frame to all frames, (frame,).
    frames : int
        Number of frames.
    count : int
        Number of landmarks; fewer are chosen if all other frames coincide with a landmark.

    Returns
    -------
    landmarks : ndarray of shape (landmark,), int
        The first landmark is the first frame that has distances.
    to_landmarks : ndarray of shape (landmark, frame), float64
        Distances for :func:`landmark_map`.
    """
    landmarks: list[int] = []
    rows: list[np.ndarray] = []
    nearest = np.full(frames, np.inf)
    for first in range(frames):
        row = _with_nan(distances_of(first))
        row[first] = 0
        if np.isfinite(row).sum() > 1 or frames == 1:
            break
    else:
        return np.array([], dtype=int), np.empty((0, frames))
    landmark = first
    while True:
        landmarks.append(landmark)
        rows.append(row)
        # A frame without a distance to a landmark cannot become one.
        nearest = np.where(np.isfinite(row), np.minimum(nearest, row), -np.inf)
        landmark = int(np.argmax(nearest))
        if len(landmarks) == min(count, frames) or nearest[landmark] <= 0:
            return np.array(landmarks), np.stack(rows)
        row = _with_nan(distances_of(landmark))
        row[landmark] = 0


def spread(positions: np.ndarray, count: int) -> list[int]:
    """Select ``count`` frames far apart on a map: the one nearest the centre, then each farthest from those.

    Parameters
    ----------
    positions : ndarray of shape (frame, 2)
        NaN for frames that are not on the map.
    count : int
    """
    frames = np.flatnonzero(np.isfinite(positions).all(axis=1))
    if not len(frames):
        return []
    points = positions[frames]
    landmarks = [int(np.argmin((points**2).sum(axis=1)))]
    nearest = ((points - points[landmarks[0]]) ** 2).sum(axis=1)
    while len(landmarks) < min(count, len(points)) and nearest.max() > 0:
        landmarks.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, ((points - points[landmarks[-1]]) ** 2).sum(axis=1))
    return [int(frames[k]) for k in landmarks]


def _with_nan(distances: np.ndarray) -> np.ndarray:
    """Copy distances to float64, NaN where they are masked."""
    return np.array(np.ma.filled(np.ma.asanyarray(distances, dtype=np.float64), np.nan))


def _comparable(matrix: np.ndarray) -> np.ndarray:
    """Select frames with finite distances between all of them, leaving out the worst first."""
    finite = np.isfinite(matrix)
    frames = np.arange(len(matrix))
    while len(frames):
        missing = (~finite[np.ix_(frames, frames)]).sum(axis=1)
        if not missing.any():
            break
        # Leave out all frames without any distance at once, else the frame that lacks most.
        isolated = missing >= len(frames) - 1
        frames = frames[~isolated] if isolated.any() else np.delete(frames, missing.argmax())
    return frames


def _check_sign(distances: np.ndarray) -> None:
    if distances.size and distances.min() < 0:
        raise ValueError(
            f"expected distances that are not negative, found {distances.min():g}: a metric with negative "
            "values has no map"
        )


def _inner_products(squares: np.ndarray) -> np.ndarray:
    """Compute inner products of centred positions, −½ J D² J with J the centring, from squared distances."""
    if not squares.size:
        return squares
    rows = squares.mean(axis=1, keepdims=True)
    return -0.5 * (squares - rows - rows.T + squares.mean())


def _axes(products: np.ndarray) -> tuple[np.ndarray, float]:
    """Compute positions on the axes of the two largest eigenvalues, and their share of the variance.

    Axes whose eigenvalue isn't positive are 0.
    """
    count = len(products)
    positions = np.zeros((count, AXES))
    if count < 2:
        return positions, np.nan
    values, vectors = scipy.linalg.eigh(products)
    total = np.abs(values).sum()
    smallest = FLAT * np.abs(values).max()
    largest = range(count - 1, max(count - 1 - AXES, -1), -1)
    for axis, k in enumerate(largest):
        if values[k] > smallest:
            positions[:, axis] = vectors[:, k] * np.sqrt(values[k])
    variance = (positions**2).sum()
    return positions, float(variance / total) if total > 0 else np.nan


def _align_axes(positions: np.ndarray) -> np.ndarray:
    """Centre positions and rotate them to their principal axes, with the farthest frame of each positive."""
    if not len(positions):
        return positions
    centred = positions - positions.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    aligned = centred @ vectors[:, ::-1]
    for axis in range(AXES):
        size = np.abs(aligned[:, axis])
        farthest = int(np.argmax(size >= (1 - SAME) * size.max()))
        if aligned[farthest, axis] < 0:
            aligned[:, axis] *= -1
    return aligned


def _stress(landmarks: np.ndarray, frames: np.ndarray, distances: np.ndarray) -> float:
    """Compute Kruskal's stress-1 from positions (landmark, 2), (frame, 2) and distances (landmark, frame)."""
    errors, total = 0.0, 0.0
    for position, row in zip(landmarks, distances, strict=True):
        on_map = np.hypot(*(frames - position).T)
        errors += float(((row - on_map) ** 2).sum())
        total += float((row**2).sum())
    return float(np.sqrt(errors / total)) if total > 0 else np.nan


def _on_all_frames(
    count: int, comparable: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Align positions, extend them by NaN to all ``count`` frames, and list the frames that are left out."""
    everywhere = np.full((count, AXES), np.nan)
    everywhere[comparable] = _align_axes(positions)
    return everywhere, np.setdiff1d(np.arange(count), comparable)
