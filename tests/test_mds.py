"""Maps of distances: planar points come back, and what is no distance is left out and counted."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from pipeline.matrix.mds import choose_landmarks, classical_map, landmark_map, spread


def planar(rng: np.random.Generator, count: int = 60) -> np.ndarray:
    return rng.normal(size=(count, 2)) * [3, 1] + [5, -2]


def aligned(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """``wanted`` moved and turned (or mirrored) onto ``found``: Procrustes."""
    centred = wanted - wanted.mean(axis=0)
    left, _, right = np.linalg.svd(centred.T @ (found - found.mean(axis=0)))
    return centred @ left @ right + found.mean(axis=0)


def test_planar_points_come_back(rng):
    points = planar(rng)
    found = classical_map(cdist(points, points))
    np.testing.assert_allclose(found.positions, aligned(found.positions, points), atol=1e-8)
    assert found.explained == pytest.approx(1, abs=1e-12)
    assert found.stress < 1e-12
    assert not len(found.left_out)


def test_planar_points_come_back_from_a_few_landmarks(rng):
    points = planar(rng)
    distances = cdist(points, points)
    landmarks, rows = choose_landmarks(lambda k: distances[k], len(points), 8)
    found = landmark_map(rows, landmarks)
    np.testing.assert_allclose(found.positions, aligned(found.positions, points), atol=1e-8)
    assert found.explained == pytest.approx(1, abs=1e-12)
    assert found.stress < 1e-12
    assert len(np.unique(found.landmarks)) == 8


@pytest.mark.parametrize("dimensions", [1, 2, 7])
def test_landmarks_that_are_all_frames_give_the_classical_map(rng, dimensions):
    points = rng.normal(size=(40, dimensions))
    distances = cdist(points, points, "cityblock")  # with eigenvalues below zero, where dimensions are many
    classical = classical_map(distances)
    found = landmark_map(distances, np.arange(40))
    np.testing.assert_allclose(found.positions, classical.positions, atol=1e-8)
    assert found.explained == pytest.approx(classical.explained)
    assert found.stress == pytest.approx(classical.stress, abs=1e-8)


def test_share_is_that_of_the_variance(rng):
    points = rng.normal(size=(200, 6)) * [5, 4, 3, 2, 1, 1]
    found = classical_map(cdist(points, points))
    variances = np.linalg.svd(points - points.mean(axis=0), compute_uv=False) ** 2
    assert found.explained == pytest.approx(variances[:2].sum() / variances.sum())
    on_map = cdist(found.positions, found.positions)
    true = cdist(points, points)
    assert found.stress == pytest.approx(np.sqrt(((true - on_map) ** 2).sum() / (true**2).sum()))


def test_the_first_axis_is_the_longest_and_its_farthest_frame_is_positive(rng):
    points = planar(rng)
    for sign in (1, -1):
        found = classical_map(cdist(sign * points, sign * points)).positions
        assert found[:, 0].var() > found[:, 1].var()
        assert (found[np.abs(found).argmax(axis=0), [0, 1]] > 0).all()


def test_a_map_is_the_same_each_time_and_in_single_precision(rng):
    points = rng.normal(size=(50, 10))
    distances = cdist(points, points).astype(np.float32)
    first, second = classical_map(distances), classical_map(distances)
    assert np.array_equal(first.positions, second.positions)
    np.testing.assert_allclose(first.positions, classical_map(distances.astype(float)).positions)


@pytest.mark.parametrize("diagonal", [0.0, np.nan, -np.inf])
def test_frames_without_distances_are_left_out(rng, diagonal):
    points = planar(rng)
    distances = cdist(points, points)
    distances[[3, 17]] = distances[:, [3, 17]] = np.nan
    np.fill_diagonal(distances, diagonal)
    found = classical_map(distances)
    assert found.left_out.tolist() == [3, 17]
    assert np.isnan(found.positions[[3, 17]]).all()
    kept = np.delete(np.arange(60), [3, 17])
    there = found.positions[kept]
    np.testing.assert_allclose(there, aligned(there, points[kept]), atol=1e-8)

    landmarks, rows = choose_landmarks(lambda k: distances[k], 60, 10)
    assert not {3, 17} & set(landmarks.tolist())
    by_landmarks = landmark_map(rows, landmarks)
    assert by_landmarks.left_out.tolist() == [3, 17]
    there = by_landmarks.positions[kept]
    np.testing.assert_allclose(there, aligned(there, points[kept]), atol=1e-8)


def test_one_pair_that_is_missing_costs_one_frame(rng):
    points = planar(rng, 12)
    distances = cdist(points, points)
    distances[4, 7] = distances[7, 4] = np.nan
    assert len(classical_map(distances).left_out) == 1


def test_the_first_frame_may_be_the_one_without_distances(rng):
    points = planar(rng)
    distances = cdist(points, points)
    distances[0] = distances[:, 0] = np.nan
    landmarks, rows = choose_landmarks(lambda k: distances[k], 60, 5)
    assert landmarks[0] == 1
    assert landmark_map(rows, landmarks).left_out.tolist() == [0]


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_frames(count):
    points = np.arange(float(count))[:, None]
    distances = cdist(points, points) if count else np.empty((0, 0))
    found = classical_map(distances)
    assert found.positions.shape == (count, 2)
    if count > 1:
        assert np.ptp(found.positions[:, 0]) == pytest.approx(count - 1)
        np.testing.assert_allclose(found.positions[:, 1], 0, atol=1e-8)
    else:
        assert np.isnan(found.explained)
    if count:
        landmarks, rows = choose_landmarks(lambda k: distances[k], count)
        np.testing.assert_allclose(landmark_map(rows, landmarks).positions, found.positions, atol=1e-8)


def test_frames_that_are_all_the_same():
    found = classical_map(np.zeros((5, 5)))
    assert (found.positions == 0).all()
    assert np.isnan(found.explained)
    landmarks, rows = choose_landmarks(lambda k: np.zeros(5), 5)
    assert len(landmarks) == 1
    assert (landmark_map(rows, landmarks).positions == 0).all()


def test_no_frame_has_distances():
    nothing = np.full((4, 4), np.nan)
    found = classical_map(nothing)
    assert len(found.left_out) == 4
    landmarks, rows = choose_landmarks(lambda k: nothing[k], 4)
    assert not len(landmarks)
    assert len(landmark_map(rows, landmarks).left_out) == 4


def test_what_goes_below_zero_has_no_map():
    distances = -10 * (1 - np.eye(4))
    with pytest.raises(ValueError, match="not negative, found -10"):
        classical_map(distances)
    with pytest.raises(ValueError, match="not negative, found -10"):
        landmark_map(distances, np.arange(4))


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"square matrix of distances, found shape \(2, 3\)"):
        classical_map(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="distances of 3 landmarks to all frames, found shape"):
        landmark_map(np.zeros((2, 5)), np.arange(3))


def test_frames_to_look_at_are_far_apart():
    corners = np.array([[0, 0], [1, 1], [-1, 1], [1, -1], [-1, -1]], float)
    near = np.array([[0.1, 0], [np.nan, np.nan], [0.9, 0.9]])
    positions = np.concatenate([near, corners])
    assert sorted(spread(positions, 5)) == [3, 4, 5, 6, 7]
    assert spread(positions, 1) == [3]
    assert len(spread(positions, 99)) == 7
    assert spread(np.full((3, 2), np.nan), 2) == []
