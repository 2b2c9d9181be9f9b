"""The weights that come with the package: they are here, whole, and worth having."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lsim
from lsim import weights
from lsim.ranking import pooled_spearman
from lsim.simulate import simulate_families
from lsim.weights import SHIPPED, find_weights, read_metadata, weights_status


@pytest.fixture(autouse=True)
def nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights but those of the package, and no network."""
    monkeypatch.setenv("LSIM_WEIGHTS", "")
    monkeypatch.setattr(weights, "cache_folder", lambda: tmp_path)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_are_whole_and_say_where_they_come_from(name: str) -> None:
    assert {status.name: status.state for status in weights_status()}[name] == "ok"
    path = find_weights(name)
    assert path.stat().st_size <= 5e6
    assert {"settings", "sequences", "steps", "trained_by"} <= read_metadata(path).keys()
    card = (path.parent / "lsim-open.md").read_text()
    assert SHIPPED[name].sha256 in card


def test_the_default_metric_needs_nothing_else() -> None:
    assert lsim.load_metric().name == "lsim-open"


def test_they_rank_recipes_they_never_saw_better_than_random_weights_and_the_squared_error() -> None:
    metrics = {
        "lsim-open": lsim.load_metric("lsim-open", device="cpu"),
        "untrained": lsim.load_metric("untrained", weights="lsim-untrained", device="cpu"),
        "l2": lsim.load_metric("l2", device="cpu"),
    }
    families = [simulate_families(recipe, 8, size=128, seed=77) for recipe in ("shapes", "waves")]
    sequences = [frames for made in families for field in made.frames.values() for frames in field]
    truth = [families[0].parameter[1:]] * len(sequences)
    ranks = {}
    for name, metric in metrics.items():
        prepared = [lsim.preprocess(frames) for frames in sequences]
        distances = [
            metric.distance(np.repeat(f[:1], len(f) - 1, 0), f[1:], scope=(0, 255)) for f in prepared
        ]
        ranks[name] = pooled_spearman(distances, truth)
    assert ranks["lsim-open"] > ranks["untrained"] + 0.05 > ranks["l2"] + 0.1
