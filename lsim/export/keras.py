"""Learned metrics as Keras models of standard layers, which load without this package."""

from __future__ import annotations

import importlib.util
import json
import operator
import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from lsim.export.agreement import LARGE, Agreement, Case, ExportError, compare, facts
from lsim.loss import FrozenNetwork
from lsim.metrics.learned import LSiM

if "keras" not in sys.modules and importlib.util.find_spec("tensorflow") is None:
    # Keras defaults to TensorFlow; torch is always installed.
    os.environ.setdefault("KERAS_BACKEND", "torch")

import keras

FACTS = "lsim.json"
"""Member of the ``.keras`` archive with the metadata of the export."""

SINGLE: dict[str, Any] = {"dtype": "float32"}
LAYOUT: dict[str, Any] = {"data_format": "channels_last"} | SINGLE


def write_keras(metric: LSiM, folder: Path, compared: Sequence[Case], size: int) -> Agreement:
    """Write ``<name>.embedding.keras`` and ``<name>.distance.keras``.

    Parameters
    ----------
    metric : LSiM
    folder : Path
    compared : sequence of Case
        Pairs of frames of ``size``.
    size : int
        Side of the frames.

    Raises
    ------
    ExportError
        When Keras computes other values than the metric, or a layer has no counterpart.
    """
    with keras.device("cpu"):
        embedding = _embedding_model(FrozenNetwork(metric), size)
        paths = {}
        for function, model in (("embedding", embedding), ("distance", _distance_model(embedding, size))):
            paths[function] = folder / f"{metric.name}.{function}.keras"
            model.trainable = False
            model.save(paths[function])
        # Compare the models as others will read them from the files.
        read = {function: keras.saving.load_model(path, compile=False) for function, path in paths.items()}

        def embed(frames: np.ndarray) -> np.ndarray:
            return _run(read["embedding"], frames)

        def distances(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
            return _run(read["distance"], [reference, other])

        runtime = f"keras {keras.__version__} on {keras.backend.backend()}"
        agreement = compare(metric, compared, embed, distances, runtime)
    for path in paths.values():
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(FACTS, json.dumps(facts(metric, agreement), ensure_ascii=False, indent=1))
    return agreement


def _embedding_model(network: FrozenNetwork, size: int) -> keras.Model:
    """Build the model frames (n, size, size, 3) → embedding (n, length), in the metric's order."""
    frames = keras.Input((size, size, 3), name="frames", **SINGLE)
    maps = _InKeras(torch.fx.symbolic_trace(network.trunk)).run(frames)
    with torch.no_grad():
        scales = network.scales(network.trunk(torch.zeros(1, 3, size, size)))
    planes = (keras.layers.Permute((3, 1, 2), **SINGLE)(f) for f in maps)
    features = keras.layers.Concatenate(axis=1, **SINGLE)(
        [keras.layers.Reshape((-1,), **SINGLE)(f) for f in planes]
    )
    # With mean 0 and variance 1 this layer multiplies by element; no other standard layer does so fast.
    multiply = keras.layers.BatchNormalization(center=False, epsilon=1e-12, name="scale", **SINGLE)
    scaled = multiply(features)
    multiply.gamma.assign(torch.cat([scale.flatten() for scale in scales]).numpy())
    # Some kernels drop NaN, but a frame with NaN must not get an ordinary embedding.
    total = keras.ops.sum(frames, axis=(1, 2, 3))[:, None]
    finite = keras.ops.less(keras.ops.absolute(total), LARGE)
    return keras.Model(frames, keras.ops.where(finite, scaled, total), name="embedding")


def _distance_model(embedding: keras.Model, size: int) -> keras.Model:
    """Build the model reference, other (n, size, size, 3) → distance (n,); gradients are 0 where it is."""
    reference, other = (keras.Input((size, size, 3), name=name, **SINGLE) for name in ("reference", "other"))
    difference = keras.layers.Subtract(**SINGLE)([embedding(reference), embedding(other)])
    ops = keras.ops
    squared = ops.sum(ops.square(ops.cast(difference, "float64")), axis=1)
    positive = ops.greater(squared, 0)
    root = ops.sqrt(ops.where(positive, squared, 1))
    distance = ops.cast(ops.where(positive, root, squared), "float32")
    return keras.Model([reference, other], distance, name="distance")


class _InKeras(torch.fx.Interpreter):
    """Interpreter that runs the graph of a trunk on Keras tensors, layer by layer."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Apply a convolution with its weights."""
        layer = self.fetch_attr(target)
        if (
            not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
            or layer.bias is None
            or (layer.groups, set(layer.dilation), layer.padding_mode) != (1, {1}, "zeros")
        ):
            raise ExportError(f"no counterpart in Keras for {target} = {layer}")
        settings = dict(
            filters=layer.out_channels,
            kernel_size=layer.kernel_size,
            strides=layer.stride,
            padding="valid",
            name=target,
            **LAYOUT,
        )
        (x,) = args
        if isinstance(layer, nn.Conv2d):
            padded = keras.layers.ZeroPadding2D(layer.padding, **LAYOUT)(x)
            convolution = keras.layers.Conv2D(**settings)
            out = convolution(padded)
        else:
            # Keras before 3.15 does not store output_padding. One more row and column of zeros in the input
            # give one stride more of output, which is cropped.
            padded = keras.layers.ZeroPadding2D(((0, 1), (0, 1)), **LAYOUT)(x)
            convolution = keras.layers.Conv2DTranspose(**settings)
            axes: Any = zip(layer.padding, layer.stride, layer.output_padding, strict=True)
            crops = tuple((padding, padding + stride - extra) for padding, stride, extra in axes)
            out = keras.layers.Cropping2D(crops, **LAYOUT)(convolution(padded))
        # Kernels: (out, in, y, x), for transposed ones (in, out, y, x) → (y, x, in, out), (y, x, out, in).
        convolution.set_weights([layer.weight.permute(2, 3, 1, 0).numpy(), layer.bias.numpy()])
        return out

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Apply an operation between convolutions; channels are on the last axis, not the second."""
        if target is F.relu:
            return keras.layers.ReLU(**SINGLE)(args[0])
        if target is F.max_pool2d:
            return _pool(*args, **kwargs)
        if target is torch.cat and args[1:] == (1,):
            return keras.layers.Concatenate(axis=-1, **SINGLE)(list(args[0]))
        if target in (operator.sub, operator.truediv) and isinstance(args[1], Tensor):
            values = args[1].flatten()  # (channel, 1, 1)
            scale, offset = (
                (1.0, (-values).tolist()) if target is operator.sub else ((1 / values).tolist(), 0.0)
            )
            return keras.layers.Rescaling(scale, offset, **SINGLE)(args[0])
        raise ExportError(
            f"no counterpart in Keras for {getattr(target, '__name__', target)}{args[1:]} {kwargs}"
        )


def _pool(
    x: Any,
    kernel_size: int,
    stride: int,
    padding: int = 0,
    dilation: int = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Apply the counterpart of ``F.max_pool2d``."""
    if padding or dilation != 1 or ceil_mode or return_indices:
        raise ExportError(f"no counterpart in Keras for a pooling with {padding=}, {dilation=}, {ceil_mode=}")
    return keras.layers.MaxPooling2D(kernel_size, stride, padding="valid", **LAYOUT)(x)


def _run(model: keras.Model, inputs: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(model(inputs, training=False)))
