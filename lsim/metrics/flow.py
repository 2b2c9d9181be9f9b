"""Mean magnitude of the optical flow between two frames.

The publication of LSiM compares with FlowNet2, a network that estimates flow. Here it is DIS (Kroeger et al.,
ECCV 2016), a classic method that needs no weights, as OpenCV computes it: it searches for patches from
coarse to fine, and refines the field by a variational method. The distance of a and b is

    d(a, b) = ½ (mean_yx |flow(a → b)| + mean_yx |flow(b → a)|),

in pixels of the frames that are compared, that is, after resizing. Flow needs texture: constant frames have
none, so all of them are at distance 0 from each other, and the same grey with other channels is the same.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor

from lsim.compiled import compiled
from lsim.error_bounds import PrecisionError
from lsim.metric import Embedding, Metric, MetricInfo
from lsim.pairs import FAST, all_pairs
from lsim.preprocess import Preprocessing

Preset = Literal["medium", "fast", "ultrafast"]

NEEDS_OPENCV = "it needs OpenCV: pip install 'lsim[flow]'"


class OpticalFlow(Metric):
    """Mean magnitude of DIS optical flow, in pixels, over both directions: not the publication's FlowNet2.

    On 8-bit grey values, in every mode: the rounded mean of the channels.

    Parameters
    ----------
    preset : {"medium", "fast", "ultrafast"}
        OpenCV's settings of that name. ``"fast"`` takes a fifth of the time, ``"ultrafast"`` a tenth; both
        refine less, and are wrong by up to a tenth of a pixel where frames moved by one.
    """

    copies_to_compare = False

    info = MetricInfo(
        title="mean magnitude of DIS optical flow, both directions, in pixels",
        source="Kroeger et al., ECCV 2016, by OpenCV; the publication of LSiM compares with FlowNet2 instead",
        differentiable=False,
        minimum_size=12,
        one_channel_suffices=True,
        units="pixel",
    )

    def __init__(
        self, name: str, preprocessing: Preprocessing, device: torch.device, *, preset: Preset = "medium"
    ) -> None:
        if preset not in get_args(Preset):
            raise ValueError(f"preset must be one of {', '.join(get_args(Preset))}, got {preset!r}")
        if preprocessing.precision == "double":
            raise PrecisionError(
                f"metric {name!r} has no precision 'double': OpenCV takes 8-bit grey values; ask for 'exact'"
            )
        super().__init__(name, preprocessing, device, preset=preset)
        self.preset = preset

    @classmethod
    def load(
        cls,
        name: str,
        preprocessing: Preprocessing,
        device: torch.device,
        weights: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Self:
        if reason := cls.why_unavailable(name):
            raise ModuleNotFoundError(f"metric {name!r} is not available: {reason}")
        return super().load(name, preprocessing, device, weights, **options)

    @classmethod
    def why_unavailable(cls, name: str, weights: str | os.PathLike[str] | None = None) -> str:
        return "" if importlib.util.find_spec("cv2") else NEEDS_OPENCV

    @property
    def quantised(self) -> bool:
        """True, since OpenCV takes 8-bit grey values."""
        return True

    def embed(self, frames: Tensor) -> Embedding:
        values = frames.detach().cpu().numpy()
        channels = values.shape[3]
        total = values.sum(axis=3)  # whole numbers, so exact
        with np.errstate(invalid="ignore"):
            grey = ((total + channels // 2) // channels).astype(np.uint8)
        # NaN for a frame with NaN or infinity, else zero: added to each of its distances.
        missing = np.where(np.isfinite(total).all(axis=(1, 2)), 0.0, np.nan)
        return Embedding({"grey": torch.from_numpy(grey), "missing": torch.from_numpy(missing)})

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        parts = [side.parts[name].numpy() for side in (a, b) for name in ("grey", "missing")]
        pixels = a.parts["grey"][0].numel()
        with _opencv_in_one_thread():
            block = all_pairs(
                mean_magnitudes,
                len(a),
                len(b),
                *parts,
                self.preset,
                symmetric=a is b,
                operations=500 * pixels,
            )
        return block.to(self.device)


def mean_magnitudes(
    i: np.ndarray,
    j: np.ndarray,
    out: np.ndarray,
    x: np.ndarray,
    x_missing: np.ndarray,
    y: np.ndarray,
    y_missing: np.ndarray,
    preset: Preset,
) -> None:
    """Add to out[p] the distance of frames i[p] of x and j[p] of y, each (n, y, x) uint8."""
    import cv2

    # It holds buffers, so that every thread needs one of its own.
    dis: Any = cv2.DISOpticalFlow.create(getattr(cv2, f"DISOPTICAL_FLOW_PRESET_{preset.upper()}"))
    for p in range(len(out)):
        a, b = x[i[p]], y[j[p]]
        forward, backward = dis.calc(a, b, None), dis.calc(b, a, None)
        magnitude = (total_magnitude(forward) + total_magnitude(backward)) / (2 * a.size)
        out[p] += magnitude + x_missing[i[p]] + y_missing[j[p]]


@compiled(fastmath=FAST)
def total_magnitude(flow):  # type: ignore[no-untyped-def]
    """Compute Σ_yx |flow| of a field (y, x, 2)."""
    total = 0.0
    for y in range(flow.shape[0]):
        for x in range(flow.shape[1]):
            total += np.sqrt(flow[y, x, 0] * flow[y, x, 0] + flow[y, x, 1] * flow[y, x, 1])
    return total


_lock = threading.Lock()
_running = 0
_threads_before = 1


@contextmanager
def _opencv_in_one_thread() -> Iterator[None]:
    """Set OpenCV to one thread, for the whole process, until the last thread leaves.

    Pairs are spread over threads already, and OpenCV cuts frames into as many stripes as it has threads, so
    that values could depend on their number.
    """
    import cv2

    global _running, _threads_before
    with _lock:
        if _running == 0:
            _threads_before = cv2.getNumThreads()
            cv2.setNumThreads(1)
        _running += 1
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if _running == 0:
                cv2.setNumThreads(_threads_before)
