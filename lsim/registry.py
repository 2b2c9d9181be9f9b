"""Metrics by name: one dict, which other packages extend through the entry point ``lsim.metrics``."""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import os
import warnings
from dataclasses import dataclass

import torch

from lsim.metric import Metric, MetricInfo, resolve_device
from lsim.metrics.information import VariationOfInformation
from lsim.metrics.learned import LSiM, LSiMAlex, LSiMSkip
from lsim.metrics.pixel import L1, L2, PSNR
from lsim.metrics.structural import SSIM
from lsim.preprocess import Compat, Preprocessing
from lsim.weights import (
    SHIPPED,
    MissingWeightsError,
    WeightsError,
    find_weights,
    load_checkpoint,
    read_metadata,
    verified_bytes,
)

METRICS: dict[str, type[Metric]] = {
    "l1": L1,
    "l2": L2,
    "psnr": PSNR,
    "ssim": SSIM,
    "vi": VariationOfInformation,
    "lsim-open": LSiM,
    "lsim": LSiM,
    "lsim-noiseless": LSiM,
    "lsim-strong-noise": LSiM,
    "lsim-skip": LSiMSkip,
}
"""Name to class, in the order in which tables list them."""

LEARNED: dict[str, type[LSiM]] = {"lsim": LSiM, "skip": LSiMSkip, "alex": LSiMAlex}
"""Name of a trunk, as a file of weights states it, to class."""

ENTRY_POINT = "lsim.metrics"


@functools.cache
def registered() -> dict[str, type[Metric]]:
    """This package's metrics, then those that installed packages register under ``lsim.metrics``.

    An entry point names a subclass of :class:`~lsim.metric.Metric` that is made as
    ``cls(name, preprocessing, device)``. One that cannot be imported is left out with a warning.
    """
    found = dict(METRICS)
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT):
        if entry.name in found:
            warnings.warn(f"{entry.value} would replace metric {entry.name!r}: ignored", stacklevel=2)
            continue
        try:
            found[entry.name] = entry.load()
        except (ImportError, AttributeError) as error:
            warnings.warn(f"metric {entry.name!r} ({entry.value}) is left out: {error}", stacklevel=2)
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
    """The class registered under ``name``; raises :class:`UnknownMetricError`."""
    known = registered()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(known)}"
        raise UnknownMetricError(f"no metric named {name!r}; {hint}")
    return known[name]


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
    """Empty when the metric can be loaded here, else the reason with the command that gets its weights."""
    if weights is None and not issubclass(metric_class(name), LSiM):
        return ""
    try:
        verified_bytes(find_weights(name, weights))
    except MissingWeightsError as error:
        wanted = str(weights or name)
        if wanted in SHIPPED:
            return str(error)
        return f"its weights are not here; get them with 'lsim weights fetch {wanted}'"
    except WeightsError as error:
        return str(error)
    return ""


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
) -> Metric:
    """Load a metric, ready to measure distances.

    Parameters
    ----------
    name : str, optional
        One of :func:`list_metrics`; or any other, for ``weights`` of one's own. Default: see
        :func:`default_metric`; the metric's ``name`` says which it is.
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
        values truncated to 8 bit, which :meth:`Metric.distance` of these doesn't resize, and scipy's rim
        of zeros after some resizes. In ``"default"`` all but ``vi`` keep floating-point values.

    Raises
    ------
    UnknownMetricError
        For a name that is not registered.
    lsim.weights.WeightsError
        When weights are absent, damaged or of another network.
    ValueError
        For settings that the metric cannot take.
    """
    if name is None:
        name = default_metric()
    cls = metric_class(name) if weights is None else learned_class(name, weights)
    preprocessing = Preprocessing(size, order, compat)
    target = resolve_device(device)
    if issubclass(cls, LSiM):
        checkpoint = load_checkpoint(find_weights(name, weights), cls.trunk_class)
        return cls(name, preprocessing, target, checkpoint)
    if weights is not None:
        raise ValueError(f"metric {name!r} has no weights; got weights={os.fspath(weights)!r}")
    return cls(name, preprocessing, target)
