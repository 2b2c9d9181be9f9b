"""A metric as a training loss: it brings predictions close to their targets in terms of the metric.

>>> from lsim.loss import SimulationLoss
>>> loss = SimulationLoss("lsim-open")             # doctest: +SKIP
>>> loss(prediction, target).backward()            # doctest: +SKIP

Learned metrics run as plain torch, independently of :class:`lsim.metrics.learned.LSiM`, so that they compile,
work with ``torch.func``, and accept double precision. Other metrics always compute in single precision.
"""

from __future__ import annotations

import copy
import os
import struct
import warnings
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from lsim.metric import Metric, SizeWarning, check_range, check_tensors, safe_sqrt
from lsim.metrics.learned import LSiM, feature_scale
from lsim.no_tf32 import ieee_convolutions
from lsim.preprocess import FramesError
from lsim.registry import load_metric

Bound: TypeAlias = float | Sequence[float]
Normalisation: TypeAlias = Literal["pair", "target"] | tuple[Bound, Bound] | None

CHANNELS = ("separate", "together")
REDUCTIONS = ("mean", "sum", "none")
IN_PLANE = (-2, -1)


class SimulationLoss(nn.Module):
    """Distance of predicted frames from their targets by a frozen metric.

    It has no parameters and adds nothing to a state dict; ``.to()``, copies and pickles work as for any
    module. Frames are not resized.

    Parameters
    ----------
    metric : str or Metric, default "lsim-open"
        A differentiable metric: a name in :func:`lsim.list_metrics`, or a loaded metric, which is copied.
        Its preprocessing isn't applied.
    channels : {"separate", "together"}, default "separate"
        ``"separate"``: each channel is a separate field; any number. ``"together"``: one or three channels
        form one frame, as in :meth:`Metric.distance`.
    normalisation : {"pair", "target"} or (lo, hi) or None, default "pair"
        Range mapped to [0, 255], for each channel: minimum and maximum over a prediction and its target, as
        in ``Metric.distance(scope="pair")``; those of the target; a fixed range in the simulation's own
        units, numbers or one number per channel; or None for frames in [0, 255]. Where the range is empty,
        both become 0: with ``"target"``, a constant target therefore has distance 0 to everything.
    differentiable_range : bool, default True
        Let gradients flow through minimum and maximum, too; otherwise these are constants.
    reduction : {"mean", "sum", "none"}, default "mean"
        Reduction over batch and channels. ``"none"`` returns (batch, channel), or (batch,) for channels
        together.
    weights : path or str, optional
        As for :func:`lsim.load_metric`, for a metric given by its name.

    Raises
    ------
    ValueError
        When a setting isn't as described, or the metric has no gradients.
    UnknownMetricError, lsim.weights.WeightsError
        See :func:`lsim.load_metric`.

    Notes
    -----
    Under autocast the metric stays in single precision. On GPUs it avoids TF32, which is wrong by 11 % on
    nearly equal frames; therefore ``torch.compile`` on a GPU leaves the network out of its graph. The
    backward pass uses the precision that torch is set to.
    """

    def __init__(
        self,
        metric: str | Metric = "lsim-open",
        *,
        channels: Literal["separate", "together"] = "separate",
        normalisation: Normalisation = "pair",
        differentiable_range: bool = True,
        reduction: Literal["mean", "sum", "none"] = "mean",
        weights: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        if channels not in CHANNELS:
            raise ValueError(f"channels must be one of {CHANNELS}, got {channels!r}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
        if isinstance(metric, Metric) and weights is not None:
            raise ValueError(f"metric {metric.name!r} is already loaded, got weights={os.fspath(weights)!r}")
        metric_object = (
            metric if isinstance(metric, Metric) else load_metric(metric, weights, "cpu", size=None)
        )
        if not metric_object.info.differentiable:
            raise ValueError(f"metric {metric_object.name!r} has no gradients to train with")
        if metric_object.quantised:
            raise ValueError(
                f"metric {metric_object.name!r} truncates to 8 bit, so its gradients are 0; load it with "
                "compat='default'"
            )
        self.channels = channels
        self.normalisation = _checked_normalisation(normalisation)
        self.differentiable_range = differentiable_range
        self.reduction = reduction
        self._warned = False
        self._range_known = False
        self.distance: FrozenNetwork | PlainDistance = (
            FrozenNetwork(metric_object) if isinstance(metric_object, LSiM) else PlainDistance(metric_object)
        )

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of predictions.

        Parameters
        ----------
        prediction, target : Tensor of shape (batch, channel, y, x)
            In the simulation's own units, of any floating dtype; targets may also be integers.

        Returns
        -------
        Tensor
            Scalar, or as for ``reduction``; float32, or float64 for learned metrics after ``.double()``.
            Gradients are finite, and 0 where prediction and target are equal. NaN in a frame makes its
            distance NaN.

        Raises
        ------
        ValueError
            When shapes differ, when the metric doesn't support their channels or size, or when they are
            arrays or masked tensors.
        """
        self._check(prediction, target)
        dtype = self.distance.dtype
        # In single precision an offset of double precision would be lost before it is subtracted.
        wide = torch.promote_types(_floating(prediction.dtype), _floating(target.dtype))
        with torch.autocast(prediction.device.type, enabled=False):
            wide = torch.promote_types(wide, dtype)
            prediction, target = self._normalised(prediction.to(wide), target.to(wide))
            prediction, target = prediction.to(dtype), target.to(dtype)
            if self.channels == "separate":
                distances = self.distance(
                    *(_as_planes(x.flatten(0, 1)[:, None]) for x in (prediction, target))
                )
                distances = distances.unflatten(0, prediction.shape[:2])
            else:
                distances = self.distance(_as_planes(prediction), _as_planes(target))
            if self.reduction == "none":
                return distances
            return distances.mean() if self.reduction == "mean" else distances.sum()

    def extra_repr(self) -> str:
        """Name the settings for the repr of the module."""
        return (
            f"{self.distance.name!r}, channels={self.channels!r}, normalisation={self.normalisation!r}, "
            f"differentiable_range={self.differentiable_range}, reduction={self.reduction!r}"
        )

    def _check(self, prediction: Tensor, target: Tensor) -> None:
        check_tensors(prediction, target)
        if prediction.ndim != 4 or prediction.shape != target.shape:
            raise ValueError(
                "expected prediction and target of equal shape (batch, channel, y, x), found "
                f"{tuple(prediction.shape)} and {tuple(target.shape)}"
            )
        if not prediction.is_floating_point():
            raise ValueError(f"expected a prediction of a floating dtype, found {prediction.dtype}")
        channels, y, x = prediction.shape[1:]
        if self.channels == "together" and channels not in (1, 3):
            raise ValueError(
                f"expected 1 or 3 channels on axis 1, found {channels}; any number works with "
                "channels='separate'"
            )
        if isinstance(self.normalisation, tuple):
            for bound in self.normalisation:
                if len(bound) not in (1, channels):
                    raise ValueError(
                        f"normalisation has a range for {len(bound)} channels, the frames have {channels}"
                    )
        self.distance.check_size(y, x)
        if self.normalisation is None and not self._range_known:
            self._range_known = check_range(
                self.distance.name, "normalisation=(0, 1)", prediction, target, stacklevel=6
            )
        advised = self.distance.advised_sizes
        if advised is None or self._warned or torch.compiler.is_compiling():
            return
        if min(y, x) < advised[0] or max(y, x) > advised[1]:
            self._warned = True
            warnings.warn(
                f"metric {self.distance.name!r} was made for frames of {advised[0]} to {advised[1]} pixels a "
                f"side, not {y}×{x}: its distances may mean less",
                SizeWarning,
                stacklevel=5,
            )

    def _normalised(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Map both to [0, 255]; 0 where the range is empty."""
        if self.normalisation is None:
            return prediction, target
        if isinstance(self.normalisation, tuple):
            return self._over_fixed_range(prediction), self._over_fixed_range(target)
        lo, hi = target.amin(IN_PLANE, keepdim=True), target.amax(IN_PLANE, keepdim=True)
        if self.normalisation == "pair":
            lo = torch.minimum(lo, prediction.amin(IN_PLANE, keepdim=True))
            hi = torch.maximum(hi, prediction.amax(IN_PLANE, keepdim=True))
        if not self.differentiable_range:
            lo, hi = lo.detach(), hi.detach()
        empty = hi == lo
        # The width of a range over the whole dtype would overflow.
        scale = torch.where((hi - lo).isinf(), 0.5, 1.0).to(lo.dtype)
        lo, hi = lo * scale, hi * scale
        # Never divide by 0: the gradients would be NaN even where the result is masked.
        spread = (hi - lo).masked_fill(empty, 1)
        first, second = (
            (255 * ((frames * scale - lo) / spread)).masked_fill(empty, 0) for frames in (prediction, target)
        )
        return first, second

    def _over_fixed_range(self, frames: Tensor) -> Tensor:
        """Map the fixed range to [0, 255]; the frames' dtype need not represent its bounds."""
        assert isinstance(self.normalisation, tuple)
        lows, highs = self.normalisation
        channels = max(len(lows), len(highs))
        lows, highs = lows * (channels // len(lows)), highs * (channels // len(highs))
        single = frames.dtype == torch.float32
        nearest = [struct.unpack("f", struct.pack("f", low))[0] if single else low for low in lows]
        rest = [low - near for low, near in zip(lows, nearest, strict=True)]
        # Halves have the same quotients, and don't overflow.
        spread = [high / 2 - low / 2 for low, high in zip(lows, highs, strict=True)]
        near, remainder, half = (frames.new_tensor(part)[:, None, None] for part in (nearest, rest, spread))
        return 255 * (((frames / 2 - near / 2) - remainder / 2) / half)


class FrozenNetwork(nn.Module):
    """The distance of a learned metric as plain torch: network, channel weights and maps are buffers.

    Parameters
    ----------
    metric : LSiM
        Metric to copy; it is not changed.
    """

    def __init__(self, metric: LSiM) -> None:
        super().__init__()
        self.name = metric.name
        self.minimum_size = metric.info.minimum_size
        self.advised_sizes = metric.info.advised_sizes
        self.takes = metric.trunk_class.takes
        self.trunk = _without_parameters(metric.trunk)
        self.counts: list[int] = []
        for k, (weight, squares, count) in enumerate(metric.scale_parts()):
            self.register_buffer(f"channel_weights_{k}", weight.clone(), persistent=False)
            self.register_buffer(f"deviation_squares_{k}", squares.clone(), persistent=False)
            self.counts.append(count)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the computation: that of the buffers."""
        dtype = self.get_buffer("channel_weights_0").dtype
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"metric {self.name!r} needs single or double precision, found {dtype}: move the loss with "
                ".to(device) alone, it takes predictions of any precision"
            )
        return dtype

    def check_size(self, y: int, x: int) -> None:
        """Raise :class:`FramesError` for frames of a size that the network does not support."""
        if min(y, x) < self.minimum_size or not (self.takes(y) and self.takes(x)):
            raise FramesError(
                f"a loss by metric {self.name!r} cannot take frames of {y}×{x}; the smallest that works is "
                f"{self.minimum_size}×{self.minimum_size}, and multiples of 16 from there always do"
            )

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compute the distances (n,) of planes (n, 3, y, x) in [0, 255]."""
        # Two passes: a target without gradients then stores no activations and has no backward pass.
        first, second = self._features(prediction), self._features(target)
        squared = prediction.new_zeros(len(prediction))
        for f, g, scale in zip(first, second, self.scales(first), strict=True):
            squared = squared + ((f - g) * scale).square().sum((1, 2, 3))
        return safe_sqrt(squared)

    def embedding(self, planes: Tensor) -> Tensor:
        """Compute the embedding z (n, Σ_l C_l H_l W_l) of planes (n, 3, y, x) in [0, 255]."""
        maps = self._features(planes)
        scaled = zip(maps, self.scales(maps), strict=True)
        return torch.cat([(f * scale).flatten(1) for f, scale in scaled], 1)

    def scales(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Compute the factors z_l / f_l for maps of these sizes: (channel, y', x') each."""
        return [
            feature_scale(
                self.get_buffer(f"channel_weights_{k}"),
                self.get_buffer(f"deviation_squares_{k}"),
                count,
                (f.shape[2], f.shape[3]),
            )
            for k, (f, count) in enumerate(zip(maps, self.counts, strict=True))
        ]

    def _features(self, planes: Tensor) -> Sequence[Tensor]:
        maps: Sequence[Tensor] = (_without_tf32 if planes.is_cuda else _run_trunk)(self.trunk, planes)
        return maps


class PlainDistance(nn.Module):
    """The distance of a metric without a network, computed on the frames' device.

    Parameters
    ----------
    metric : Metric
        Metric to copy.
    """

    dtype = torch.float32
    """Precision of normalised frames and of distances, also after ``.double()``."""

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self.name = metric.name
        self.advised_sizes = metric.info.advised_sizes
        self.metric = copy.deepcopy(metric)
        self.check_size = self.metric.check_size

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compute the distances (n,) of planes (n, 3, y, x) in [0, 255]."""
        # The target is the reference, which directed metrics divide by.
        a, b = (self.metric.embed(planes.permute(0, 2, 3, 1)) for planes in (target, prediction))
        distances = self.metric.paired(a, b)
        # The mean would hide a custom metric that returns all pairs.
        self.metric.claims.check_block(distances, (len(prediction),), "paired")
        return distances.to(self.dtype)


def _floating(dtype: torch.dtype) -> torch.dtype:
    """Return the floating dtype that represents a dtype's numbers, as far as there is one."""
    if dtype.is_floating_point:
        return dtype
    narrow = (torch.bool, torch.uint8, torch.int8, torch.int16)
    return torch.float32 if dtype in narrow else torch.float64


def _run_trunk(trunk: nn.Module, planes: Tensor) -> Sequence[Tensor]:
    maps: Sequence[Tensor] = trunk(planes)
    return maps


@torch.compiler.disable
def _without_tf32(trunk: nn.Module, planes: Tensor) -> Sequence[Tensor]:
    """Run the trunk in IEEE precision, outside of compiled graphs, which would drop the setting."""
    with ieee_convolutions():
        return _run_trunk(trunk, planes)


def _without_parameters(module: nn.Module) -> nn.Module:
    """Copy a module with buffers instead of parameters: nothing to train, an empty state dict."""
    module = copy.deepcopy(module).eval()
    for part in module.modules():
        tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for name, tensor in tensors:
            delattr(part, name)
            # Convolutions run in the layout of their weights; channels last is a quarter faster on a CPU.
            layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
            part.register_buffer(name, tensor.detach().clone(memory_format=layout), persistent=False)
    return module


def _as_planes(frames: Tensor) -> Tensor:
    """Expand (n, 1 or 3, y, x) to (n, 3, y, x)."""
    return frames.expand(-1, 3, -1, -1)


def _checked_normalisation(
    normalisation: Normalisation,
) -> Literal["pair", "target"] | tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Check a normalisation; convert the bounds of a fixed range to tuples, one number or one per channel."""
    if normalisation is None or normalisation == "pair" or normalisation == "target":
        return normalisation
    if not isinstance(normalisation, tuple) or len(normalisation) != 2:
        raise ValueError(f"normalisation must be 'pair', 'target', (lo, hi) or None, got {normalisation!r}")
    lo, hi = (
        tuple(map(float, bound)) if isinstance(bound, Sequence) else (float(bound),)
        for bound in normalisation
    )
    channels = max(len(lo), len(hi))
    if not {len(lo), len(hi)} <= {1, channels}:
        raise ValueError(
            f"normalisation must be (lo, hi) with as many numbers in each, got {len(lo)} and {len(hi)}"
        )
    pairs = zip(lo * (channels // len(lo)), hi * (channels // len(hi)), strict=True)
    if not all(low < high for low, high in pairs):
        raise ValueError(f"normalisation must be (lo, hi) with lo < hi, got {normalisation!r}")
    return lo, hi
