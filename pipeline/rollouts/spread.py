"""Spread and skill of ensembles: do members differ from each other as much as their mean from the truth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from pipeline.rollouts.intervals import Bootstrap, bound
from pipeline.rollouts.scores import SKILL, SPREAD


class SpreadTable:
    """Table of spread, skill and their ratio, by data set, field, model and time.

    The ratio is √((M + 1) / M) · spread / skill of M members, each a root mean square over sequences and
    times: 1 for a reliable ensemble (Fortin et al. 2014, doi 10.1175/JHM-D-14-0008.1), below 1 for one that
    is too sure.

    Parameters
    ----------
    replicates, seed : int
        Of the bootstrap over sequences.
    """

    def __init__(self, replicates: int, seed: int) -> None:
        self.replicates, self.seed = replicates, seed
        self._values: dict[str, dict[str, Mapping[str, np.ndarray]]] = {}
        self._times: dict[str, np.ndarray] = {}

    @property
    def keys(self) -> list[str]:
        """Fields that have values, as ``<dataset>/<field>``."""
        return list(self._values)

    def put(self, place: tuple[str, str, str], values: Mapping[str, np.ndarray], times: np.ndarray) -> None:
        """Take spread or skill of all models of a field, (1, sequence, frame) by model."""
        dataset, name, score = place
        key = f"{dataset}/{name}"
        self._values.setdefault(key, {})[score] = values
        self._times[key] = times

    def to_frame(self, members: Mapping[str, Mapping[str, int]]) -> pd.DataFrame:
        """Make the table.

        Parameters
        ----------
        members : mapping of str to mapping of str to int
            By field and model the number of members; those of one member have no spread, and no rows.
        """
        rows = [
            row
            for key in self._values
            if key in members and {SPREAD, SKILL} <= self._values[key].keys()
            for row in self._rows(key, members[key])
        ]
        return pd.DataFrame(rows)

    def _rows(self, key: str, members: Mapping[str, int]) -> Iterator[dict[str, Any]]:
        dataset, name = key.split("/")
        times = self._times[key].mean(axis=0)
        for model, count in members.items():
            if count < 2 or model not in self._values[key][SPREAD]:
                continue
            spread, skill = (np.square(self._values[key][score][model]) for score in (SPREAD, SKILL))
            labels = {"dataset": dataset, "field": name, "model": model}
            yield (
                labels
                | {"frame": -1, "time": np.nan}
                | self._row(spread.mean(axis=2), skill.mean(axis=2), count)
            )
            for frame, time in enumerate(times.tolist()):
                at_time = self._row(spread[:, :, frame], skill[:, :, frame], count)
                yield labels | {"frame": frame, "time": time} | at_time

    def _row(self, spread: np.ndarray, skill: np.ndarray, members: int) -> dict[str, Any]:
        """Make a row of squares of shape (1, sequence)."""
        bootstrap = Bootstrap({SPREAD: spread, SKILL: skill}, self.replicates, self.seed)
        of_spread, of_skill = bootstrap.mean(SPREAD), bootstrap.mean(SKILL)
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = (members + 1) / members
            ratio = np.sqrt(factor * np.divide(of_spread, of_skill))
            draws = np.sqrt(factor * bootstrap.draws[SPREAD] / bootstrap.draws[SKILL])
        interval = bound(float(ratio), draws, bootstrap.units(SKILL))
        return {
            "spread": float(np.sqrt(of_spread)),
            "skill": float(np.sqrt(of_skill)),
            "ratio": interval.value,
            "low": interval.low,
            "high": interval.high,
            "members": members,
            "sequences": int(np.isfinite(skill).any(axis=0).sum()),
        }
