"""Learned metrics as ONNX, for onnxruntime and other runtimes."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from lsim.export.agreement import LARGE, Agreement, Case, compare, facts
from lsim.loss import FrozenNetwork
from lsim.metrics.learned import LSiM

EXAMPLE = (2, 3, 96, 112)
"""Shape of the frames that the graph is traced with; the graph keeps none of its sizes."""


def write_onnx(metric: LSiM, folder: Path, compared: Sequence[Case]) -> Agreement:
    """Write ``<name>.embedding.onnx`` and ``<name>.distance.onnx``.

    Parameters
    ----------
    metric : LSiM
    folder : Path
    compared : sequence of Case

    Raises
    ------
    ExportError
        When onnxruntime computes other values than the metric.
    """
    embedding = _embedding_model(metric)
    distance = _distance_model(embedding)
    models = {"embedding": embedding, "distance": distance}
    sessions = {}
    for function, model in models.items():
        onnx.checker.check_model(model, full_check=True)
        sessions[function] = _session(model)

    def embed(frames: np.ndarray) -> np.ndarray:
        (embeddings,) = sessions["embedding"].run(None, {"frames": _planes(frames)})
        return np.asarray(embeddings)

    def distances(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
        inputs = {"reference": _planes(reference), "other": _planes(other)}
        (values,) = sessions["distance"].run(None, inputs)
        return np.asarray(values)

    runtime = f"onnxruntime {onnxruntime.__version__}"
    agreement = compare(metric, compared, embed, distances, runtime)
    metadata = facts(metric, agreement)
    for function, model in models.items():
        model.doc_string = f"{function} of frames (n, 3, y, x) in [0, 255]: {metric.info.title}"
        helper.set_model_props(model, metadata)
        onnx.save(model, folder / f"{metric.name}.{function}.onnx")
    return agreement


class _Embedding(nn.Module):
    def __init__(self, network: FrozenNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, frames: Tensor) -> Tensor:
        # Some kernels drop NaN, but a frame with NaN must not get an ordinary embedding.
        total = frames.sum((1, 2, 3))[:, None]
        return torch.where(total.abs() < LARGE, self.network.embedding(frames), total)


def _embedding_model(metric: LSiM) -> onnx.ModelProto:
    """Build the model frames (n, 3, y, x) → embedding (n, length)."""
    module = _Embedding(FrozenNetwork(metric)).eval()
    step = 16
    sides = range(4 * step, 5 * step)
    if all(metric.trunk_class.takes(n) for n in sides):
        y = x = torch.export.Dim.AUTO
    else:
        # A decoder matches its encoder only at some sizes, so the tracer gets sizes that always match.
        # The graph rounds sizes down as the layers do, so it accepts the others, too.
        y, x = (step * torch.export.Dim(name, min=3) for name in ("rows", "columns"))
    with _quiet():
        program = torch.onnx.export(
            module,
            (torch.zeros(EXAMPLE),),
            dynamo=True,
            dynamic_shapes={"frames": {0: torch.export.Dim.AUTO, 2: y, 3: x}},
            input_names=["frames"],
            output_names=["embedding"],
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    graph = model.graph
    # Remove source paths of the exporting machine.
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value, dims in ((graph.input[0], ("n", 3, "y", "x")), (graph.output[0], ("n", "length"))):
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, dims))
    graph.name = "embedding"
    return model


def _distance_model(embedding: onnx.ModelProto) -> onnx.ModelProto:
    """Build the model reference (n, 3, y, x), other (m, 3, y, x) → distance; n equals m, or one is 1.

    All frames pass the network at once. Squares are summed in double precision, as by the metric.
    """
    model = onnx.ModelProto()
    model.CopyFrom(embedding)
    graph = model.graph
    prologue_nodes = [
        helper.make_node("Concat", ["reference", "other"], ["frames"], axis=0),
        helper.make_node("Shape", ["reference"], ["n"], start=0, end=1),
        helper.make_node("Shape", ["other"], ["m"], start=0, end=1),
        helper.make_node("Concat", ["n", "m"], ["n_and_m"], axis=0),
    ]
    epilogue_nodes = [
        helper.make_node("Split", ["embedding", "n_and_m"], ["z_reference", "z_other"], axis=0),
        helper.make_node("Sub", ["z_reference", "z_other"], ["difference"]),
        helper.make_node("Cast", ["difference"], ["difference_double"], to=TensorProto.DOUBLE),
        helper.make_node("Mul", ["difference_double", "difference_double"], ["squares"]),
        helper.make_node("ReduceSum", ["squares", "length_axis"], ["squared_distance"], keepdims=0),
        helper.make_node("Sqrt", ["squared_distance"], ["distance_double"]),
        helper.make_node("Cast", ["distance_double"], ["distance"], to=TensorProto.FLOAT),
    ]
    for number, node in enumerate([*prologue_nodes, *epilogue_nodes]):
        node.name = f"distance_{number}"
    nodes = [*prologue_nodes, *graph.node, *epilogue_nodes]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.initializer.append(helper.make_tensor("length_axis", TensorProto.INT64, [1], [1]))
    for name, count in (("reference", "n"), ("other", "m")):
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [count, 3, "y", "x"]))
    graph.output.append(helper.make_tensor_value_info("distance", TensorProto.FLOAT, ["pairs"]))
    graph.name = "distance"
    return model


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _planes(frames: np.ndarray) -> np.ndarray:
    """Convert (n, y, x, 3) to (n, 3, y, x)."""
    return np.ascontiguousarray(frames.transpose(0, 3, 1, 2))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the messages of torch's exporter on missing packages and deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
