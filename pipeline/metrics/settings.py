"""Settings of a run, and the metrics that they select, checked before anything is computed."""

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
    """A metric requested by name cannot be loaded on this machine."""


class Settings(pydantic.BaseModel):
    """Settings of distances. Unknown names and wrong values are errors.

    Attributes
    ----------
    metrics : list of str, or "all"
        Names of metrics. ``"all"``, also within a list, stands for all registered metrics; it leaves out,
        with a message, metrics without weights on this machine, and metrics that cannot take frames of
        ``size`` or the ``scope``. ``"module:Class"`` is a custom metric; workers must be able to import it.
    options : dict of str to dict
        Options of single metrics, by metric and option.
    mask : "nan", optional
        Leave missing pixels (NaN) out in metrics that take a mask; others leave out frames that have any.
    precision : {"exact", "double", "ranking"}
        As in :func:`lsim.load_metric`. ``"ranking"`` applies to networks: other metrics stay exact, and so do
        metrics whose ``options`` set a precision. ``"all"`` leaves out metrics without double precision.
    size, order, compat
        As in :func:`lsim.load_metric`.
    weights : dict of str to str
        Files of custom weights by metric. With a file of ``lsim train``, a new name becomes a metric of its
        own, which is added to ``metrics``. For a registered learned metric the file replaces its weights.
        Each worker must find the file at the same path, or in the same search folder.
    scope : str or (lo, hi)
        Frames whose minimum and maximum normalise the values: ``"sequence"``, ``"pair"``, ``"dataset"`` (all
        sequences of a field); or a fixed range. ``"none"`` keeps values in their own units, for metrics that
        accept them.
    pairs : {"all", "reference"}
        ``"reference"`` compares frame 0 with each other frame only.
    pixel_weights : bool
        Weight means over pixels by the field's weights, which ``frames.zarr`` has if the catalog names them.
        ``"all"`` leaves out metrics that are no means over pixels. Frames must keep their size.
    directed : bool
        Store both directions of metrics that are not symmetric, at [i, j] the distance with frame i as the
        reference, and the computed diagonal. Otherwise stores hold ½ (d(a, b) + d(b, a)) for these metrics.
    strict : bool
        Raise an error for a metric that ``"all"`` would leave out.
    block : int, optional
        Sequences per block of a new store. Default: as many as take about two seconds.
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
            raise ValueError(f"expected a fixed scope LO,HI with LO below HI, found {scope}")
        return scope


@dataclass(frozen=True)
class ChosenMetrics:
    """Metrics that settings select.

    Attributes
    ----------
    metrics : list of Metric
        Metrics loaded on the CPU.
    requests : dict of str to MetricRequest
        Requests, by name, with which workers load the same metrics.
    unavailable : dict of str to str
        Reasons, by name, for metrics of ``"all"`` that are left out.
    required : frozenset of str
        Names of metrics that must not be left out.
    """

    metrics: list[Metric]
    requests: dict[str, MetricRequest]
    unavailable: dict[str, str]
    required: frozenset[str] = frozenset()


def choose_metrics(settings: Settings) -> ChosenMetrics:
    """Load the metrics that settings select, and check the settings.

    A metric with custom weights counts as requested by name.

    Raises
    ------
    UnavailableMetricError
        When a metric requested by name (with ``strict``: any metric) cannot be loaded on this machine.
    lsim.UnknownMetricError
        For an unknown name.
    lsim.FramesError
        When a metric requested by name (with ``strict``: any metric) cannot take frames of that size.
    lsim.WeightsError
        For weights of another network.
    lsim.error_bounds.PrecisionError
        When a metric requested by name (with ``strict``: any metric) doesn't have the precision.
    ValueError
        For reserved or duplicate names, unknown options, a scope or pixel weights that a metric requested by
        name (with ``strict``: any metric) does not support, and pixel weights for resized frames.
    """
    _check_keeps_pixels(settings)
    weights = settings.weights
    entries = ["all"] if settings.metrics == "all" else settings.metrics
    by_name = [name for name in (*entries, *weights) if name != "all"]
    metric_list = [name for entry in entries for name in (list_metrics() if entry == "all" else [entry])]
    names = list(dict.fromkeys([*metric_list, *weights]))
    _check_names(names)
    _check_options(settings, names)
    unavailable = {name: reason for name in names if (reason := why_unavailable(name, weights.get(name)))}
    required_names = names if settings.strict else by_name
    if faults := [name for name in required_names if name in unavailable]:
        raise UnavailableMetricError(
            "; ".join(f"metric {name!r} is not available: {unavailable[name]}" for name in faults)
        )
    metrics: list[Metric] = []
    requests: dict[str, MetricRequest] = {}
    for name in names:
        if name in unavailable:
            continue
        request = _request(name, settings)
        metric_or_reason = _load(name, request, settings, required=name in required_names)
        if isinstance(metric_or_reason, str):
            unavailable[name] = metric_or_reason
        else:
            metrics.append(metric_or_reason)
            requests[metric_or_reason.name] = request.for_metric(metric_or_reason)
    return ChosenMetrics(metrics, requests, unavailable, frozenset(map(metric_name, required_names)))


def _load(name: str, request: MetricRequest, settings: Settings, *, required: bool) -> Metric | str:
    """Load a metric, or return the reason to leave it out; if it is ``required``, raise an error instead."""
    try:
        metric = request.load("cpu")
    except (FramesError, PrecisionError) as error:
        if required:
            raise
        return str(error)
    except Exception as error:
        # Within "all", a faulty metric of another package must not stop the run. An error of a metric of
        # ours, or of one with options, is an error of the settings.
        if required or name in METRICS or name in settings.options:
            raise
        return f"{type(error).__name__}: {error}"
    reason = metric.why_not_scope(settings.scope) or _why_not_weighted(metric, settings)
    if reason and required:
        raise ValueError(reason)
    return reason or metric


def is_directed(metric: Metric) -> bool:
    """Tell whether a store has both directions of the metric's distances."""
    return "symmetric" not in metric.axioms


def _check_keeps_pixels(settings: Settings) -> None:
    if settings.pixel_weights and settings.size is not None:
        raise ValueError(
            f"pixel weights apply to frames of their own size, and size {settings.size} resizes them: set "
            "--size 0 (size: null in a workflow), which keeps their size"
        )


def _why_not_weighted(metric: Metric, settings: Settings) -> str:
    """Explain why a metric cannot use pixel weights that the settings request; empty if it can."""
    if not settings.pixel_weights or metric.info.takes_weights:
        return ""
    return (
        f"metric {metric.name!r} takes no weights of pixels: it is not a mean over single pixels; 'lsim "
        "metrics NAME' shows this for each metric"
    )


def _check_names(references: Sequence[str]) -> None:
    """Refuse metrics with equal names or the name of a store's variable: one would overwrite the other."""
    names = [metric_name(name) for name in references]
    if reserved := sorted(schema.RESERVED & set(names)):
        raise ValueError(
            f"a metric cannot be named {', '.join(reserved)}: the store has variables of that name"
        )
    for name in names:
        if names.count(name) > 1:
            spellings = " and ".join(repr(text) for text in references if metric_name(text) == name)
            raise ValueError(f"{spellings} would both be called {name!r}: rename one of them")


def _check_options(settings: Settings, metrics: Sequence[str]) -> None:
    """Refuse options of unknown metrics, and unknown options; also of metrics that are not selected."""
    references = {metric_name(name): name for name in (*list_metrics(), *metrics)}
    for name, options in settings.options.items():
        if name not in references:
            raise ValueError(f"options for {name!r}, which is no metric; there are {', '.join(references)}")
        names = _class_of(references[name], settings).option_names()
        if extra := sorted(options.keys() - set(names)):
            raise ValueError(
                f"metric {name!r} has no option {', '.join(extra)}; it has: {', '.join(names) or 'none'}"
            )


def _class_of(name: str, settings: Settings) -> type[Metric]:
    weights = settings.weights.get(name)
    return metric_class(name) if weights is None else learned_class(name, weights)


def _request(name: str, settings: Settings) -> MetricRequest:
    """Build the request of a metric from settings, without the specification, which needs the metric."""
    cls = _class_of(name, settings)
    options = dict(settings.options.get(metric_name(name), {}))
    if settings.precision == "ranking" and "precision" in cls.option_names():
        options.setdefault("precision", settings.precision)
    weights = settings.weights.get(name)
    return MetricRequest(
        name,
        None if weights is None else _path_for_workers(weights),
        settings.size,
        settings.order,
        settings.compat,
        mask=settings.mask is not None and cls.info.takes_mask,
        symmetrise=not settings.directed,
        precision="double" if settings.precision == "double" else "exact",
        options=tuple(sorted(options.items())),
    )


def _path_for_workers(weights: str) -> str:
    """Make the path of a weights file absolute for workers, which may run in another folder; keep names."""
    path = Path(weights).expanduser()
    return str(path.absolute()) if path.is_file() else weights
