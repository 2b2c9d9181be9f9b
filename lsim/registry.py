"""Metrics by name: a dict that other packages extend through the entry point ``lsim.metrics``."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch

from lsim.claims import AXIOMS, MetricError, OthersCode
from lsim.metric import Metric, MetricInfo, resolve_device
from lsim.metrics.errors import (
    NMAE,
    BoundaryError,
    ConservedError,
    HighBandError,
    HighFourierError,
    LowBandError,
    LowFourierError,
    MaxError,
    MidBandError,
    MidFourierError,
    SobolevError,
)
from lsim.metrics.events import FractionsSkill
from lsim.metrics.flow import OpticalFlow
from lsim.metrics.gradients import GMSD, GradientDifference
from lsim.metrics.information import (
    MutualInformation,
    NormalizedMutualInformation,
    VariationOfInformation,
)
from lsim.metrics.learned import LSiM, LSiMAlex, LSiMSkip, NonSiameseMetric
from lsim.metrics.optimal_transport import SlicedWasserstein, Wasserstein
from lsim.metrics.perceptual import LPIPS, LPIPSSqueeze, LPIPSVgg
from lsim.metrics.pixel import L1, L2, NRMSE, PSNR, RMSE, VRMSE, Correlation, Cosine
from lsim.metrics.spectral import FourierAmplitude, RadialSpectrum
from lsim.metrics.structural import SSIM, GaussianSSIM, MultiScaleSSIM
from lsim.preprocess import Compat, Preprocessing
from lsim.weights import WeightsError, find_weights, read_metadata

METRICS: dict[str, type[Metric]] = {
    "l1": L1,
    "l2": L2,
    "rmse": RMSE,
    "nrmse": NRMSE,
    "vrmse": VRMSE,
    "psnr": PSNR,
    "correlation": Correlation,
    "cosine": Cosine,
    "max-error": MaxError,
    "nmae": NMAE,
    "crmse": ConservedError,
    "brmse": BoundaryError,
    "frmse-low": LowFourierError,
    "frmse-mid": MidFourierError,
    "frmse-high": HighFourierError,
    "spectral-mse-low": LowBandError,
    "spectral-mse-mid": MidBandError,
    "spectral-mse-high": HighBandError,
    "h1": SobolevError,
    "fss": FractionsSkill,
    "ssim": SSIM,
    "ssim-gaussian": GaussianSSIM,
    "ms-ssim": MultiScaleSSIM,
    "gmsd": GMSD,
    "gradient": GradientDifference,
    "vi": VariationOfInformation,
    "mutual-information": MutualInformation,
    "nmi": NormalizedMutualInformation,
    "spectral": RadialSpectrum,
    "fft": FourierAmplitude,
    "wasserstein": Wasserstein,
    "sliced-wasserstein": SlicedWasserstein,
    "flow": OpticalFlow,
    "lpips-alex": LPIPS,
    "lpips-vgg": LPIPSVgg,
    "lpips-squeeze": LPIPSSqueeze,
    "lsim-open": LSiM,
    "lsim": LSiM,
    "lsim-noiseless": LSiM,
    "lsim-strong-noise": LSiM,
    "lsim-skip": LSiMSkip,
    "non-siamese": NonSiameseMetric,
}
"""Classes of metrics by name, in the order of tables."""

LEARNED: dict[str, type[Metric]] = {
    "lsim": LSiM,
    "skip": LSiMSkip,
    "alex": LSiMAlex,
    "non-siamese": NonSiameseMetric,
}
"""Classes of metrics by the name of a trunk, as files of weights state it."""

ENTRY_POINT = "lsim.metrics"

Precision: TypeAlias = Literal["exact", "double", "ranking"]
"""Arithmetic of a metric: see :func:`load_metric`."""


@functools.cache
def registered() -> dict[str, type[Metric]]:
    """List the classes of this package's metrics, then of those registered under ``lsim.metrics``.

    An entry point names a subclass of :class:`~lsim.metric.Metric`, called as
    ``cls(name, preprocessing, device)``. One that cannot be imported, or is no metric, is left out with a
    warning.
    """
    classes = dict(METRICS)
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT):
        if entry.name in classes:
            warnings.warn(f"{entry.value} would replace metric {entry.name!r}: ignored", stacklevel=2)
            continue
        try:
            with OthersCode(entry.name, f"importing {entry.value}", on_change="warn"):
                cls = entry.load()
            classes[entry.name] = _check_class(cls, entry.value)
        except Exception as error:
            # Code of another package may raise anything, and must not cost the other metrics.
            cause = f"{type(error).__name__}: {error}"
            warnings.warn(f"metric {entry.name!r} ({entry.value}) is left out: {cause}", stacklevel=2)
    return classes


class UnknownMetricError(KeyError):
    """No metric of that name; the message suggests near ones."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class ListedMetric:
    """A metric's name with its description.

    Attributes
    ----------
    name : str
    info : MetricInfo
    unavailable : str
        Empty, or the reason why it cannot be loaded, with the command that changes that.
    """

    name: str
    info: MetricInfo
    unavailable: str


def metric_class(name: str) -> type[Metric]:
    """Return the class registered under ``name``, or the class that ``"module:Class"`` refers to.

    Raises
    ------
    UnknownMetricError
        When there is none, or it is no metric, or not a complete one.

    Examples
    --------
    >>> metric_class("l1").__name__
    'L1'
    """
    if ":" in name:
        return _imported(name)
    classes = registered()
    if name not in classes:
        near = difflib.get_close_matches(name, classes, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(classes)}"
        raise UnknownMetricError(f"no metric named {name!r}; {hint}")
    return classes[name]


def metric_name(name: str) -> str:
    """Return the name of a metric in results: ``"my-metric"`` for ``"module:MyMetric"``.

    Examples
    --------
    >>> metric_name("energy:PowerRise"), metric_name("l1")
    ('power-rise', 'l1')
    """
    _, _, cls = name.partition(":")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.rpartition(".")[2]).lower() if cls else name


def _imported(reference: str) -> type[Metric]:
    module, _, qualified = reference.partition(":")
    try:
        with OthersCode(metric_name(reference), f"importing {module}", on_change="warn"):
            target: Any = importlib.import_module(module)
        for part in qualified.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise UnknownMetricError(f"no metric at {reference!r}: {error}") from error
    cls = _check_class(target, reference)
    name = metric_name(reference)
    if name in registered():
        raise UnknownMetricError(
            f"{reference!r} would be called {name!r}, as a metric that is there: call its class otherwise"
        )
    return cls


def _load(
    cls: type[Metric],
    name: str,
    preprocessing: Preprocessing,
    device: torch.device,
    *weights: Any,
    **options: Any,
) -> Metric:
    """Load a metric and check that its ``__init__`` has set what every metric has."""
    with OthersCode(name, "loading it", on_change="warn"):
        metric = cls.load(name, preprocessing, device, *weights, **options)
    for attribute, value in (("name", name), ("preprocessing", preprocessing), ("device", device)):
        actual = getattr(metric, attribute, None)
        if actual != value:
            raise MetricError(
                f"metric {name!r}: loading it gave {attribute} = {actual!r}, expected {value!r}: __init__ "
                "has to call super().__init__(name, preprocessing, device)"
            )
    return metric


def _check_class(cls: Any, reference: str) -> type[Metric]:
    """Check that a reference or an entry point leads to a complete metric, and return its class."""
    if not (isinstance(cls, type) and issubclass(cls, Metric)):
        raise UnknownMetricError(f"{reference!r} is no subclass of lsim.Metric, found {cls!r}")
    missing = sorted(cls.__abstractmethods__)
    if not isinstance(getattr(cls, "info", None), MetricInfo):
        missing.append("info, an lsim.MetricInfo")
    if missing:
        raise UnknownMetricError(f"{reference!r} is incomplete: missing {', '.join(missing)}")
    if unknown_axioms := sorted(map(str, set(cls.info.axioms) - AXIOMS)):
        raise UnknownMetricError(
            f"{reference!r} claims {', '.join(unknown_axioms)}; the axioms are {', '.join(sorted(AXIOMS))}"
        )
    if not cls.info.lower_is_more_similar:
        raise UnknownMetricError(
            f"{reference!r} is a similarity (lower_is_more_similar is false): negate it or subtract it from 1"
        )
    return cls


@functools.cache
def _source_sha256(cls: type[Metric]) -> str:
    """Hash the file of a class, once: the imported code stays, even if the file changes."""
    file = inspect.getsourcefile(cls)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def learned_class(name: str, weights: str | os.PathLike[str]) -> type[Metric]:
    """Return the class of a metric with the user's weights: the class of that name, else of their trunk.

    Raises
    ------
    UnknownMetricError
        For a name that isn't registered, with weights that don't state their trunk.
    lsim.weights.WeightsError
        When there are no such weights.
    """
    if name in registered():
        return metric_class(name)
    path = find_weights(name, weights)
    if path.suffix != ".safetensors":
        raise UnknownMetricError(
            f"no metric named {name!r}, and {path.name} doesn't state its trunk, as .safetensors of ours do"
        )
    trunk = read_metadata(path)["trunk"]
    if trunk not in LEARNED:
        raise WeightsError(
            f"{path}: weights of the trunk {trunk!r}, which no metric has; there are {', '.join(LEARNED)}"
        )
    return LEARNED[trunk]


def list_metrics() -> list[str]:
    """List the names of all metrics, in the order of tables.

    Examples
    --------
    >>> import lsim
    >>> "lsim" in lsim.list_metrics()
    True
    """
    return list(registered())


def describe_metrics() -> list[ListedMetric]:
    """List all metrics with their descriptions, and why some cannot be loaded.

    Examples
    --------
    >>> describe_metrics()[0].info.title
    'mean absolute difference'
    """
    return [ListedMetric(name, cls.info, why_unavailable(name)) for name, cls in registered().items()]


def why_unavailable(name: str, weights: str | os.PathLike[str] | None = None) -> str:
    """Explain why a metric cannot be loaded, with the command that changes that; empty if it can."""
    try:
        cls = metric_class(name) if weights is None else learned_class(name, weights)
    except WeightsError as error:
        return str(error)
    with OthersCode(metric_name(name), "why_unavailable"):
        return cls.why_unavailable(name, weights)


def default_metric() -> str:
    """Return ``"lsim"`` if its published weights are installed, else ``"lsim-open"``, which is shipped."""
    return "lsim-open" if why_unavailable("lsim") else "lsim"


def load_metric(
    name: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    device: str | torch.device = "auto",
    size: int | None = 224,
    order: int = 0,
    compat: Compat = "default",
    *,
    mask: bool = False,
    symmetrise: bool = False,
    precision: Precision = "exact",
    **options: Any,
) -> Metric:
    """Load a metric, ready to measure distances.

    Parameters
    ----------
    name : str, optional
        One of :func:`list_metrics`; any other name, for ``weights`` of your own; or ``"module:Class"``, for a
        metric of your own. Default: see :func:`default_metric`.
    weights : path or str, optional
        For learned metrics: a file, or the name of published weights. Default: the metric's own, searched
        in ``$LSIM_WEIGHTS``, the user cache and the package.
    device : str or torch.device, default "auto"
        ``"auto"`` is the GPU if there is one.
    size : int or None, default 224
        Frames are resized to it; None keeps their size.
    order : int, default 0
        Spline order of the resize.
    compat : {"default", "published"}
        ``"published"`` reproduces the published evaluation: ``l2``, ``psnr``, ``ssim`` and ``vi`` on
        values truncated to 8 bit, which :meth:`Metric.distance` of these doesn't resize, LPIPS on frames in
        [0, 255], and scipy's rim of zeros after some resizes. In ``"default"`` all but the metrics of
        histograms keep floating-point values.
    mask : bool, default False
        Leave missing pixels (NaN) out of comparisons instead of their frames, for metrics that take a mask.
    symmetrise : bool, default False
        Measure ½ (d(a, b) + d(b, a)) by a metric that isn't symmetric; others don't change.
    precision : {"exact", "double", "ranking"}, default "exact"
        ``"exact"``: frames are prepared in single precision, and compared without further loss.
        ``"double"``: everything is in double precision, from the frame on. ``"ranking"``: networks run in
        bfloat16, if only the order matters; metrics without a network don't have it.
    **options
        Options of the metric itself, such as ``window="gaussian"`` for ``ssim``: see its class.

    Raises
    ------
    UnknownMetricError
        For a name that is not registered.
    lsim.weights.WeightsError
        When weights are absent, damaged or of another network.
    lsim.FramesError
        When the metric cannot take frames of that size.
    ValueError
        For settings that the metric cannot take.

    Examples
    --------
    >>> load_metric("ssim", size=None, window="gaussian").options["window"]
    'gaussian'
    """
    if name is None:
        name = default_metric()
    cls = metric_class(name) if weights is None else learned_class(name, weights)
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
    if precision == "ranking":
        options["precision"] = precision
    if unknown_options := sorted(options.keys() - set(cls.option_names())):
        names = ", ".join(cls.option_names()) or "none"
        raise ValueError(f"metric {name!r} has no option {', '.join(unknown_options)}; it has: {names}")
    if precision == "double" or cls.needs_double(options):
        preprocessing = Preprocessing(size, order, compat, mask, "double")
    else:
        preprocessing = Preprocessing(size, order, compat, mask)
    metric = _load(cls, metric_name(name), preprocessing, resolve_device(device), weights, **options)
    if preprocessing.size is not None:
        metric.check_size(preprocessing.size, preprocessing.size)
    if ":" in name:
        # Its author changes it between runs, without raising a version each time.
        metric.source_sha256 = _source_sha256(cls)
    return metric.symmetrised() if symmetrise else metric
