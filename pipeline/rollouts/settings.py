"""Settings of a comparison of models with their reference, and the scope of each metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import pydantic

from lsim.metric import Metric
from lsim.preprocess import Compat
from lsim.registry import Precision
from pipeline.metrics.settings import ChosenMetrics, Settings, choose_metrics
from pipeline.workers.worker_metrics import Option

RolloutScope: TypeAlias = Literal["none", "reference", "each", "pair", "dataset"] | tuple[float, float]
"""Frames whose minimum and maximum normalise a rollout and its reference, see :class:`RolloutSettings`."""

Times: TypeAlias = Annotated[tuple[pydantic.FiniteFloat, ...], pydantic.Field(min_length=1)]

BASELINES = ("persistence", "mean")
"""Models that are made of the reference itself: its first frame, or its mean over time and sequences."""


class RolloutSettings(pydantic.BaseModel):
    """Settings of :func:`pipeline.rollouts.compare`. Unknown names and wrong values are errors.

    Attributes
    ----------
    metrics : list of str
        Names of metrics, or ``module:Class``.
    scope : str, (lo, hi), or a mapping of metric to one of these
        Frames whose minimum and maximum, by channel, normalise values. ``"none"``: values keep their units;
        the default of metrics that take them so. ``"reference"``: the reference's trajectory; the default of
        other metrics. ``"each"``: reference and rollout by their own trajectories. ``"pair"``: each pair of
        frames. ``"dataset"``: all reference trajectories of the field. Or a fixed range.
    protocol : "acdm", optional
        That of Kohl, Chen, Thuerey 2023 (arXiv 2309.01745): ``l2`` on raw values, ``lsim`` at the frames' own
        size with scope ``"each"``.
    size : int, optional
        Frames are resized to it. Default: their own size.
    baselines : list of {"persistence", "mean"}
        Models made of the reference: its first frame; its mean over time and sequences.
    ensembles : bool
        Score all members of a model together, where any model has several: CRPS, spread and skill, and the
        energy score by metrics that are Euclidean.
    spectra : int, or list of float
        Times at which energies by wavenumber are measured: so many, evenly from the first to the last, or
        the frames nearest to some times. 0: none.
    tolerance : float
        Times are equal that differ by less than this share of the reference's smallest step.
    options, mask, precision, order, compat, weights
        As in :class:`pipeline.metrics.settings.Settings`.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    metrics: Annotated[tuple[str, ...], pydantic.Field(min_length=1)] = ("l2", "vrmse", "lsim-open")
    scope: RolloutScope | dict[str, RolloutScope] | None = None
    protocol: Literal["acdm"] | None = None
    size: int | None = pydantic.Field(default=None, ge=1)
    baselines: tuple[Literal["persistence", "mean"], ...] = ()
    ensembles: bool = True
    spectra: Annotated[int, pydantic.Field(ge=0)] | Times = 4
    tolerance: float = pydantic.Field(default=1e-3, gt=0, lt=0.5)
    options: dict[str, dict[str, Option]] = {}
    mask: Literal["nan"] | None = None
    precision: Precision = "exact"
    order: int = pydantic.Field(default=0, ge=0, le=5)
    compat: Compat = "default"
    weights: dict[str, str] = {}

    @pydantic.model_validator(mode="after")
    def _check(self) -> RolloutSettings:
        scopes = self.scope.values() if isinstance(self.scope, dict) else [self.scope]
        for scope in scopes:
            if isinstance(scope, tuple) and not scope[0] < scope[1]:
                raise ValueError(f"expected a fixed scope LO,HI with LO below HI, found {scope}")
        if isinstance(self.scope, dict) and (unknown := sorted(self.scope.keys() - {*self.metrics})):
            raise ValueError(f"scope of {', '.join(unknown)}, which is none of the metrics")
        if self.protocol == "acdm":
            if self.size is not None or self.scope is not None:
                raise ValueError("protocol acdm sets size and scope: leave them out")
            if others := sorted({*self.metrics} - {"l2", "lsim", "lsim-open"}):
                raise ValueError(f"protocol acdm has the metrics l2 and lsim, not {', '.join(others)}")
        return self


@dataclass(frozen=True)
class ScopedMetrics:
    """The metrics of a comparison, and the scope of each by name."""

    chosen: ChosenMetrics
    scopes: dict[str, RolloutScope]


def choose_scoped(settings: RolloutSettings) -> ScopedMetrics:
    """Load the metrics, and choose the scope of each.

    Raises
    ------
    ValueError, lsim.UnknownMetricError, lsim.WeightsError
        For metrics that :func:`~pipeline.metrics.settings.choose_metrics` refuses, and scopes that a metric
        doesn't take.
    """
    common: dict[str, Any] = settings.model_dump(
        include={"metrics", "size", "options", "mask", "precision", "order", "compat", "weights"}
    )
    # A direction is kept: the reference comes first.
    chosen = choose_metrics(Settings(**common, directed=True))
    scopes = {metric.name: _scope_of(metric, settings) for metric in chosen.metrics}
    for metric in chosen.metrics:
        scope = scopes[metric.name]
        if reason := metric.why_not_scope("none" if scope == "none" else (0.0, 1.0)):
            raise ValueError(reason)
    return ScopedMetrics(chosen, scopes)


def _scope_of(metric: Metric, settings: RolloutSettings) -> RolloutScope:
    physical: RolloutScope = "none"
    takes_physical = not metric.why_not_scope("none")
    if settings.protocol == "acdm":
        return physical if takes_physical else "each"
    scope = settings.scope.get(metric.name) if isinstance(settings.scope, dict) else settings.scope
    if scope is not None:
        return scope
    return physical if takes_physical else "reference"
