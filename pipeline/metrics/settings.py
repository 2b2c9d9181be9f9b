"""The metrics that settings ask for: what can be said of them before any computing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from lsim.error_bounds import PrecisionError
from lsim.metric import Metric
from lsim.preprocess import Compat, FramesError
from lsim.registry import (
    METRICS,
    Precision,
    learned_class,
    list_metrics,
    metric_class,
    metric_name,
    why_unavailable,
)
from pipeline.storage import schema
from pipeline.storage.schema import Pairs
from pipeline.workers.worker_metrics import MetricRequest, Option


class UnavailableMetricError(ValueError):
    """A metric asked for by name that cannot be loaded here."""


class Settings(pydantic.BaseModel):
    """Which distances are computed; unknown names and wrong values are errors.

    Attributes
    ----------
    metrics : list of str, or "all"
        ``"all"`` leaves out those whose weights aren't here or that can't take frames of ``size`` or the
        ``scope``, and says so. In a list, too, it stands for all that are registered; ``"module:Class"`` is
        a metric of one's own, which workers must be able to import.
    options : dict of str to dict
        What single metrics are told, by their names and those of their options.
    mask : "nan", optional
        Metrics that take a mask leave missing pixels (NaN) out; the others, frames that have any.
    precision : {"exact", "double", "ranking"}
        As :func:`lsim.load_metric` takes it. ``"ranking"`` is for networks: other metrics stay
        exact, and so do those whose ``options`` say so. ``"all"`` leaves out what has no double precision.
    size, order, compat
        As :func:`lsim.load_metric` takes them.
    weights : dict of str to str
        Weights of one's own by the name of their metric: files that ``lsim train`` wrote, under any name,
        which is then a metric as others are, whatever ``metrics`` lists; or others for a learned metric
        that is registered. A file must lie at the same path, or in the same search folder, on every worker.
    scope : str or (lo, hi)
        Over which frames minimum and maximum are taken: ``"sequence"``, ``"pair"``, ``"dataset"`` (all
        sequences of a field) or fixed; ``"none"``, over none: values in their own units, for metrics that
        take them.
    pairs : {"all", "reference"}
        ``"reference"`` computes frame 0 against the others only.
    pixel_weights : bool
        Weight means over pixels by the field's weights, which ``frames.zarr`` has where the catalog names
        them. ``"all"`` leaves out metrics that are no such means. Frames must keep their size.
    directed : bool
        Keep both directions of metrics that aren't symmetric, at [i, j] that with frame i as the reference,
        and what is computed for the diagonal. Otherwise stores hold ½ (d(a, b) + d(b, a)) of them.
    strict : bool
        Make what is left out of ``"all"`` an error.
    block : int, optional
        Sequences per block of a store that is new; default as many as take about two seconds.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    metrics: Annotated[tuple[str, ...], pydantic.Field(min_length=1)] | Literal["all"] = "all"
    options: dict[str, dict[str, Option]] = {}
    mask: Literal["nan"] | None = None
    precision: Precision = "exact"
    size: int | None = pydantic.Field(default=224, ge=1)
    order: int = pydantic.Field(default=0, ge=0, le=5)
    compat: Compat = "default"
    weights: dict[Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][\w.+-]*$")], str] = {}
    scope: Literal["sequence", "pair", "dataset", "none"] | tuple[float, float] = "sequence"
    pairs: Pairs = "all"
    pixel_weights: bool = False
    directed: bool = False
    strict: bool = False

    block: int | None = pydantic.Field(default=None, ge=1)

    @pydantic.field_validator("scope")
    @classmethod
    def _scope_rises(cls, scope: Any) -> Any:
        if isinstance(scope, tuple) and not scope[0] < scope[1]:
            raise ValueError(f"a fixed scope is LO,HI with LO below HI, got {scope}")
        return scope


@dataclass(frozen=True)
class ChosenMetrics:
    """The metrics that settings ask for.

    Attributes
    ----------
    metrics : list of Metric
        Loaded on the CPU.
    requests : dict of str to MetricRequest
        By name, how workers load the same.
    unavailable : dict of str to str
        Those of ``"all"`` that are left out, each with the reason.
    needed : frozenset of str
        Names of those that must not be left out.
    """

    metrics: list[Metric]
    requests: dict[str, MetricRequest]
    unavailable: dict[str, str]
    needed: frozenset[str] = frozenset()


def choose_metrics(settings: Settings) -> ChosenMetrics:
    """Load the metrics that settings ask for: what is wrong with the settings is an error here.

    What weights are given for is asked for by name, too.

    Raises
    ------
    UnavailableMetricError
        When a metric asked for by name (or any, with ``strict``) isn't there to be loaded.
    lsim.UnknownMetricError
        For an unknown name.
    lsim.FramesError
        When a metric asked for by name (or any, with ``strict``) can't take frames of that size.
    lsim.WeightsError
        For weights of another network.
    lsim.error_bounds.PrecisionError
        When a metric asked for by name (or any, with ``strict``) doesn't have the precision.
    ValueError
        For names that are taken, options that no metric has or that it can't take, a scope that a metric
        asked for by name (or any, with ``strict``) can't measure over, weights of pixels that it doesn't
        take, and such weights of frames that are resized.
    """
    _check_keeps_pixels(settings)
    given = settings.weights
    named = ["all"] if settings.metrics == "all" else settings.metrics
    by_name = [name for name in (*named, *given) if name != "all"]
    listed = [name for entry in named for name in (list_metrics() if entry == "all" else [entry])]
    wanted = list(dict.fromkeys([*listed, *given]))
    _check_names(wanted)
    _check_options(settings, wanted)
    unavailable = {name: reason for name in wanted if (reason := why_unavailable(name, given.get(name)))}
    needed = wanted if settings.strict else by_name
    if faults := [name for name in needed if name in unavailable]:
        raise UnavailableMetricError(
            "; ".join(f"metric {name!r} is not available: {unavailable[name]}" for name in faults)
        )
    chosen = ChosenMetrics([], {}, unavailable, frozenset(map(metric_name, needed)))
    for name in wanted:
        if name in unavailable:
            continue
        request = _request(name, settings)
        try:
            metric = request.load("cpu")
        except (FramesError, PrecisionError) as error:
            if name in needed:
                raise
            unavailable[name] = str(error)
            continue
        except Exception as error:
            # Of "all", a metric of somebody else must not cost the others their run. An error of one of
            # ours, or of one that has options here, is one of the settings.
            if name in needed or name in METRICS or name in settings.options:
                raise
            unavailable[name] = f"{type(error).__name__}: {error}"
            continue
        if reason := metric.why_not_scope(settings.scope) or _why_not_weighted(metric, settings):
            if name in needed:
                raise ValueError(reason)
            unavailable[name] = reason
            continue
        chosen.metrics.append(metric)
        chosen.requests[metric.name] = request.for_metric(metric)
    return chosen


def is_directed(metric: Metric) -> bool:
    """Whether a store of the metric's distances keeps two directions of a pair."""
    return "symmetric" not in metric.axioms


def _check_keeps_pixels(settings: Settings) -> None:
    if settings.pixel_weights and settings.size is not None:
        raise ValueError(
            f"weights of pixels are those of the frames' own pixels, and size {settings.size} resizes them: "
            "give --size 0 (in a workflow size: null), which keeps their size"
        )


def _why_not_weighted(metric: Metric, settings: Settings) -> str:
    """Say why a metric takes no weights of pixels that these settings ask for; empty where it does."""
    if not settings.pixel_weights or metric.info.takes_weights:
        return ""
    return (
        f"metric {metric.name!r} takes no weights of pixels: it is no mean over single pixels; 'lsim metrics "
        "NAME' says which are"
    )


def _check_names(wanted: Sequence[str]) -> None:
    """Two metrics of one name, or one named as a variable of the store, would overwrite each other."""
    names = [metric_name(name) for name in wanted]
    if reserved := sorted(schema.RESERVED & set(names)):
        raise ValueError(
            f"a metric cannot be named {', '.join(reserved)}: the store has variables of that name"
        )
    for name in names:
        if names.count(name) > 1:
            which = " and ".join(repr(one) for one in wanted if metric_name(one) == name)
            raise ValueError(f"{which} would both be called {name!r}: call one of them otherwise")


def _check_options(settings: Settings, wanted: Sequence[str]) -> None:
    """Options are those of a metric that there is, and that has them, whether it is computed now or not."""
    known = {metric_name(name): name for name in (*list_metrics(), *wanted)}
    for name, options in settings.options.items():
        if name not in known:
            raise ValueError(f"options for {name!r}, which is no metric; there are {', '.join(known)}")
        there = _class_of(known[name], settings).option_names()
        if unknown := sorted(options.keys() - set(there)):
            raise ValueError(
                f"metric {name!r} has no option {', '.join(unknown)}; it has: {', '.join(there) or 'none'}"
            )


def _class_of(name: str, settings: Settings) -> type[Metric]:
    weights = settings.weights.get(name)
    return metric_class(name) if weights is None else learned_class(name, weights)


def _request(name: str, settings: Settings) -> MetricRequest:
    """How a metric is asked for under these settings; its specification is known once it is loaded."""
    cls = _class_of(name, settings)
    options = dict(settings.options.get(metric_name(name), {}))
    if settings.precision == "ranking" and "precision" in cls.option_names():
        options.setdefault("precision", settings.precision)
    weights = settings.weights.get(name)
    return MetricRequest(
        name,
        None if weights is None else _everywhere(weights),
        settings.size,
        settings.order,
        settings.compat,
        mask=settings.mask is not None and cls.info.takes_mask,
        symmetrise=not settings.directed,
        precision="double" if settings.precision == "double" else "exact",
        options=tuple(sorted(options.items())),
    )


def _everywhere(weights: str) -> str:
    """A file of weights as workers find it, who may run in another folder; names stay as they are."""
    path = Path(weights).expanduser()
    return str(path.absolute()) if path.is_file() else weights
