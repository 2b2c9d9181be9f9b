"""Metrics by name: one dict, which other packages extend through the entry point ``lsim.metrics``."""

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
"""Name to class, in the order in which tables list them."""

LEARNED: dict[str, type[Metric]] = {
    "lsim": LSiM,
    "skip": LSiMSkip,
    "alex": LSiMAlex,
    "non-siamese": NonSiameseMetric,
}
"""Name of a trunk, as a file of weights states it, to class."""

ENTRY_POINT = "lsim.metrics"

Precision: TypeAlias = Literal["exact", "double", "ranking"]
"""Arithmetic of a metric: see :func:`load_metric`."""


@functools.cache
def registered() -> dict[str, type[Metric]]:
    """This package's metrics, then those that installed packages register under ``lsim.metrics``.

    An entry point names a subclass of :class:`~lsim.metric.Metric` that is made as
    ``cls(name, preprocessing, device)``. One that cannot be imported, or is none, is left out with a warning.
    """
    found = dict(METRICS)
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT):
        if entry.name in found:
            warnings.warn(f"{entry.value} would replace metric {entry.name!r}: ignored", stacklevel=2)
            continue
        try:
            with OthersCode(entry.name, f"importing {entry.value}", on_change="warn"):
                cls = entry.load()
            found[entry.name] = _checked(cls, entry.value)
        except Exception as error:
            # Somebody else's code, that may raise anything: the other metrics are none the worse for it.
            cause = f"{type(error).__name__}: {error}"
            warnings.warn(f"metric {entry.name!r} ({entry.value}) is left out: {cause}", stacklevel=2)
    return found


class UnknownMetricError(KeyError):
    """No metric of that name; the message suggests near ones."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class ListedMetric:
    """A metric's name with what is known of it.

    ``unavailable`` is empty, or says why it can't be loaded here and the command that changes that.
    """

    name: str
    info: MetricInfo
    unavailable: str


def metric_class(name: str) -> type[Metric]:
    """The class registered under ``name``, or that ``"module:Class"`` refers to.

    Raises
    ------
    UnknownMetricError
        When there is none, or it is no metric, or lacks what a metric has to define.
    """
    if ":" in name:
        return _imported(name)
    known = registered()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(known)}"
        raise UnknownMetricError(f"no metric named {name!r}; {hint}")
    return known[name]


def metric_name(name: str) -> str:
    """What results call a metric: its name, or for ``"module:MyMetric"`` ``"my-metric"``."""
    _, _, cls = name.partition(":")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.rpartition(".")[2]).lower() if cls else name


def _imported(reference: str) -> type[Metric]:
    module, _, qualified = reference.partition(":")
    try:
        with OthersCode(metric_name(reference), f"importing {module}", on_change="warn"):
            found: Any = importlib.import_module(module)
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UnknownMetricError(f"no metric at {reference!r}: {error}") from error
    cls = _checked(found, reference)
    if (name := metric_name(reference)) in registered():
        raise UnknownMetricError(
            f"{reference!r} would be called {name!r}, as a metric that is there: call its class otherwise"
        )
    return cls


def _loaded(
    cls: type[Metric],
    name: str,
    preprocessing: Preprocessing,
    device: torch.device,
    *given: Any,
    **options: Any,
) -> Metric:
    """``cls.load``, of which a whole metric comes, or an error."""
    with OthersCode(name, "loading it", on_change="warn"):
        metric = cls.load(name, preprocessing, device, *given, **options)
    for attribute, expected in (("name", name), ("preprocessing", preprocessing), ("device", device)):
        found = getattr(metric, attribute, None)
        if found != expected:
            raise MetricError(
                f"metric {name!r}: loading it gave {attribute} = {found!r}, expected {expected!r}: __init__ "
                "has to call super().__init__(name, preprocessing, device)"
            )
    return metric


def _checked(found: Any, reference: str) -> type[Metric]:
    """What a reference or an entry point led to, once it is known to be a metric, and a whole one."""
    if not (isinstance(found, type) and issubclass(found, Metric)):
        raise UnknownMetricError(f"{reference!r} is no subclass of lsim.Metric, found {found!r}")
    lacking = sorted(found.__abstractmethods__)
    if not isinstance(getattr(found, "info", None), MetricInfo):
        lacking.append("info, an lsim.MetricInfo")
    if lacking:
        raise UnknownMetricError(f"{reference!r} is no whole metric: it lacks {', '.join(lacking)}")
    if unknown := sorted(map(str, set(found.info.axioms) - AXIOMS)):
        raise UnknownMetricError(
            f"{reference!r} claims {', '.join(unknown)}; the axioms are {', '.join(sorted(AXIOMS))}"
        )
    if not found.info.lower_is_more_similar:
        raise UnknownMetricError(
            f"{reference!r} is a similarity, as lower_is_more_similar is false: negate it, or take it from 1"
        )
    return found


@functools.cache
def _source_sha256(cls: type[Metric]) -> str:
    """Of the file of a class, as it was first seen: what is imported stays, whatever becomes of the file."""
    file = inspect.getsourcefile(cls)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def learned_class(name: str, weights: str | os.PathLike[str]) -> type[Metric]:
    """The class for a metric with weights of one's own: the one of that name, else that of their trunk.

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
            f"{path}: weights of the trunk {trunk!r}, which is no metric; there are {', '.join(LEARNED)}"
        )
    return LEARNED[trunk]


def list_metrics() -> list[str]:
    """Names of all metrics, in the order in which tables list them.

    >>> import lsim
    >>> "lsim" in lsim.list_metrics()
    True
    """
    return list(registered())


def describe_metrics() -> list[ListedMetric]:
    """All metrics with what is known of them and whether they can be loaded here."""
    return [ListedMetric(name, cls.info, why_unavailable(name)) for name, cls in registered().items()]


def why_unavailable(name: str, weights: str | os.PathLike[str] | None = None) -> str:
    """Empty when the metric can be loaded here, else the reason with the command that changes that."""
    try:
        cls = metric_class(name) if weights is None else learned_class(name, weights)
    except WeightsError as error:
        return str(error)
    with OthersCode(metric_name(name), "why_unavailable"):
        return cls.why_unavailable(name, weights)


def default_metric() -> str:
    """The published ``lsim`` where its weights are here, else ``lsim-open``, which comes with the package."""
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
        One of :func:`list_metrics`; any other, for ``weights`` of one's own; or ``"module:Class"``, a
        metric of one's own. Default: see :func:`default_metric`; the metric's ``name`` says which it is.
    weights : path or str, optional
        For learned metrics: a file, or the name of published weights. Default: the metric's own, searched
        in ``$LSIM_WEIGHTS``, the user cache and the package.
    device : str or torch.device, default "auto"
        ``"auto"`` is the GPU when there is one.
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
        Leave missing pixels (NaN) out of comparisons instead of their frames, for metrics that can.
    symmetrise : bool, default False
        Make ½ (d(a, b) + d(b, a)) of a metric that isn't symmetric; others stay as they are.
    precision : {"exact", "double", "ranking"}, default "exact"
        ``"exact"``: frames are prepared in single precision, and compared so that nothing more is lost.
        ``"double"``: everything is in double precision, from the frame on. ``"ranking"``: networks run in
        bfloat16, for where only the order matters; metrics without a network don't have it.
    **options
        What the metric itself can be told, such as ``window="gaussian"`` of ``ssim``: see its class.

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
    """
    if name is None:
        name = default_metric()
    cls = metric_class(name) if weights is None else learned_class(name, weights)
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
    if precision == "ranking":
        options["precision"] = precision
    if unknown := sorted(options.keys() - set(cls.option_names())):
        known = ", ".join(cls.option_names()) or "none"
        raise ValueError(f"metric {name!r} has no option {', '.join(unknown)}; it has: {known}")
    if precision == "double" or cls.needs_double(options):
        preprocessing = Preprocessing(size, order, compat, mask, "double")
    else:
        preprocessing = Preprocessing(size, order, compat, mask)
    metric = _loaded(cls, metric_name(name), preprocessing, resolve_device(device), weights, **options)
    if preprocessing.size is not None:
        metric.check_size(preprocessing.size, preprocessing.size)
    if ":" in name:
        # Its author changes it between runs, and won't think of a version each time.
        metric.source_sha256 = _source_sha256(cls)
    return metric.symmetrised() if symmetrise else metric
