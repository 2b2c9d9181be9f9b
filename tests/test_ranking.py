"""The published protocol in the library: the same number as the pipeline's, for any mix of sequences."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import parameters, random_distances

from lsim.ranking import pooled_spearman
from pipeline.correlate.statistics import correlation, pooled_inputs


def test_it_is_what_the_pipeline_reports() -> None:
    parameter = np.sort(np.random.default_rng(0).uniform(size=(12, 11)), axis=1)
    parameter[:6] = parameters(6)  # steps that are equal but for their last bit
    matrices = random_distances(parameter, noise=0.2, seed=1)
    predictions, targets = pooled_inputs(matrices, parameter, "published")
    expected = correlation(predictions.ravel(), targets.ravel(), "spearman")
    found = pooled_spearman(matrices[:, 0, 1:], parameter[:, 1:] - parameter[:, :1])
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0.5 < found < 0.99


def test_one_ground_truth_serves_all_sequences() -> None:
    distances = np.random.default_rng(0).uniform(size=(5, 10))
    truth = np.linspace(0.1, 1, 10)
    assert pooled_spearman(distances, truth) == pooled_spearman(distances, [truth] * 5)


def test_sequences_are_scaled_before_they_are_pooled() -> None:
    rng = np.random.default_rng(0)
    truth = np.linspace(0.1, 1, 10)
    distances = truth + 0.3 * rng.uniform(size=(5, 10))
    elsewhere = rng.uniform(1e-3, 1e3, (5, 1)) * distances + rng.uniform(-9, 9, (5, 1))
    assert pooled_spearman(elsewhere, truth) == pytest.approx(pooled_spearman(distances, truth))


def test_sequences_may_differ_in_length() -> None:
    short, long = np.linspace(0, 1, 4), np.linspace(0, 1, 9)
    assert pooled_spearman([short, long], [short, long]) == pytest.approx(1)
    assert pooled_spearman([short, -long], [short, long]) < 0
    with pytest.raises(ValueError, match="zip"):
        pooled_spearman([short, long], [short])


def test_sequences_without_a_ranking_are_left_out() -> None:
    truth = np.linspace(0.1, 1, 10)
    with_nan = np.where(truth > 0.5, np.nan, truth)
    assert pooled_spearman([truth, with_nan, np.full(10, 3.0)], truth) == pytest.approx(1)
    assert np.isnan(pooled_spearman([with_nan, np.zeros(10)], truth))
