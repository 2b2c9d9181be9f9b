"""Learned and classic similarity metrics for simulation data: how far apart are two simulations?

>>> import lsim
>>> metric = lsim.load_metric("rmse", size=None)
>>> metric.distance([[0.0, 0.0]], [[3.0, 3.0]], scope="none")
array([3.])
"""

from lsim.claims import ClaimError, MetricError
from lsim.metric import Embedding, Metric, MetricInfo, RangeWarning, SizeWarning
from lsim.preprocess import FramesError, Preprocessing, preprocess
from lsim.registry import UnknownMetricError, describe_metrics, list_metrics, load_metric
from lsim.weights import WeightsError

__version__ = "0.1.0"

__all__ = [
    "ClaimError",
    "Embedding",
    "FramesError",
    "Metric",
    "MetricError",
    "MetricInfo",
    "Preprocessing",
    "RangeWarning",
    "SizeWarning",
    "UnknownMetricError",
    "WeightsError",
    "describe_metrics",
    "list_metrics",
    "load_metric",
    "preprocess",
]
