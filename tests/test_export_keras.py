"""Keras models compute what the metric does, under TensorFlow and without this project (make test-keras)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lsim
from lsim.metrics.learned import LSiM
from lsim.networks import TRUNKS
from lsim.testing import write_random_checkpoint
from lsim.weights import load_checkpoint, save_checkpoint

if "LSIM_TEST_KERAS" not in os.environ:
    pytest.skip("'make test-keras' runs these, in an environment of its own", allow_module_level=True)

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import tensorflow as tf

from lsim.export import ExportError, export_metric
from lsim.export.keras import FACTS, _InKeras

SIDE = 80
pytestmark = [
    pytest.mark.filterwarnings("ignore::lsim.SizeWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:keras"),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights by trunk, with maps of another size than the frames here."""
    folder = tmp_path_factory.mktemp("weights")
    paths = {}
    for trunk, trunk_class in TRUNKS.items():
        authors = write_random_checkpoint(folder / f"{trunk}.pth", trunk_class, size=96)
        paths[trunk] = folder / f"{trunk}.safetensors"
        save_checkpoint(paths[trunk], load_checkpoint(authors, trunk_class), trunk, {})
    return paths


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    for trunk, path in weights.items():
        exported = export_metric(f"my-{trunk}", "keras", folder, weights=path, size=SIDE, frames={})
        assert [p.name for p in exported.paths] == [
            f"my-{trunk}.distance.keras",
            f"my-{trunk}.embedding.keras",
        ]
    return folder


@pytest.fixture(params=list(TRUNKS))
def trunk(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def metric(trunk: str, weights: dict[str, Path]) -> LSiM:
    metric = lsim.load_metric(f"my-{trunk}", weights[trunk], device="cpu", size=None)
    assert isinstance(metric, LSiM)
    return metric


@pytest.fixture
def read(folder: Path, trunk: str) -> Callable[[str], keras.Model]:
    return lambda function: keras.saving.load_model(folder / f"my-{trunk}.{function}.keras")


def random_frames(rng: np.random.Generator, n: int) -> np.ndarray:
    return (255 * rng.random((n, SIDE, SIDE, 3))).astype(np.float32)


def planes(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))


WITHOUT_LSIM = """
import sys
import numpy as np, keras
folder, name = sys.argv[1:]
a, b = np.load(folder + "/frames.npy")
embedding = keras.saving.load_model(f"{folder}/{name}.embedding.keras")
distance = keras.saving.load_model(f"{folder}/{name}.distance.keras")
np.savez(folder + "/found.npz", z=embedding.predict(a), d=distance.predict([a, b]))
print(keras.backend.backend(), sorted({"lsim", "torch", "tensorflow"} & set(sys.modules)))
"""


def test_keras_gives_the_distances_and_embeddings_of_the_metric_without_its_code(
    folder: Path, trunk: str, metric: LSiM, rng: np.random.Generator
) -> None:
    a, b = (random_frames(rng, 3) for _ in range(2))
    np.save(folder / "frames.npy", np.stack([a, b]))
    command = [sys.executable, "-c", WITHOUT_LSIM, str(folder), f"my-{trunk}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "tensorflow ['tensorflow']"
    found = np.load(folder / "found.npz")
    with torch.no_grad():
        expected = metric(planes(a), planes(b)).numpy()
        embedding = metric.embed(torch.from_numpy(a)).parts["features"].numpy()
    np.testing.assert_allclose(found["d"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["z"], embedding, rtol=1e-4, atol=1e-5 * embedding.max())


def test_keras_gives_the_same_eagerly_and_compiled_and_nan_stays_with_its_frame(
    read: Callable[[str], keras.Model], rng: np.random.Generator
) -> None:
    distance, embedding = read("distance"), read("embedding")
    a, b = (random_frames(rng, 3) for _ in range(2))
    a[1, 20, 30, 2] = np.nan
    ways = {
        "eager": lambda x, y: distance([x, y]).numpy(),
        "function": lambda x, y: tf.function(distance)([x, y]).numpy(),
        "predict": lambda x, y: distance.predict([x, y], verbose=0),
        "embeddings": lambda x, y: np.linalg.norm(embedding(x).numpy() - embedding(y).numpy(), axis=1),
    }
    expected = ways["eager"](a[[0, 2]], b[[0, 2]])
    for way, compute in ways.items():
        found = compute(a, b)
        assert np.isfinite(found).tolist() == [True, False, True], way
        np.testing.assert_allclose(found[[0, 2]], expected, rtol=1e-5, err_msg=way)
    assert distance([b, b]).numpy().tolist() == [0, 0, 0]
    np.testing.assert_allclose(distance([b[:1], b])[1:], distance([b[[0, 0]], b[1:]]), rtol=1e-6)


def test_keras_has_the_gradients_of_the_metric_and_0_at_equal_frames(
    read: Callable[[str], keras.Model], metric: LSiM, rng: np.random.Generator
) -> None:
    distance = read("distance")
    assert not distance.trainable_weights
    a, b = (random_frames(rng, 2) for _ in range(2))
    b[1] = a[1]
    prediction = tf.constant(a)
    with tf.GradientTape() as tape:
        tape.watch(prediction)
        total = tf.reduce_sum(distance([prediction, tf.constant(b)]))
    found = tape.gradient(total, prediction).numpy()
    leaf = planes(a).requires_grad_()
    metric(leaf, planes(b)).sum().backward()
    expected = leaf.grad.permute(0, 2, 3, 1).numpy()
    assert (found[1] == 0).all()
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


def test_keras_files_say_what_they_are_and_are_of_standard_layers(
    folder: Path, trunk: str, metric: LSiM
) -> None:
    def objects(node: object) -> list[dict[str, object]]:
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
        own = [node] if isinstance(node, dict) and "registered_name" in node else []
        return own + [found for child in children for found in objects(child)]

    for function in ("embedding", "distance"):
        with zipfile.ZipFile(folder / f"my-{trunk}.{function}.keras") as archive:
            said = json.loads(archive.read(FACTS))
            found = objects(json.loads(archive.read("config.json")))
        assert json.loads(said["specification"]) == metric.specification()
        agreement = json.loads(said["agreement"])
        assert 0 < agreement["distance"] <= agreement["tolerance"] == 1e-5
        assert agreement["by"] == f"keras {keras.__version__} on tensorflow"
        assert len(found) > 5
        assert {str(each["module"]).split(".")[0] for each in found} == {"keras"}


def test_what_keras_on_torch_writes_is_read_by_keras_on_tensorflow(
    tmp_path: Path, weights: dict[str, Path], folder: Path, rng: np.random.Generator
) -> None:
    """The encoder/decoder, whose transposed convolutions are where backends could differ."""
    arguments = ["export", "other", "--format", "keras", "--size", SIDE, "--out", tmp_path]
    command = [sys.executable, "-m", "pipeline", *arguments, "--weights", weights["skip"]]
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
        env=os.environ | {"KERAS_BACKEND": "torch"},
    )
    assert f"keras {keras.__version__} on torch" in done.stdout
    other = keras.saving.load_model(tmp_path / "other.distance.keras")
    same = keras.saving.load_model(folder / "my-skip.distance.keras")
    frames = [random_frames(rng, 2) for _ in range(2)]
    np.testing.assert_array_equal(other(frames), same(frames))


def test_what_has_no_counterpart_in_keras_is_an_error(tmp_path: Path, weights: dict[str, Path]) -> None:
    frames = keras.Input((8, 8, 3))
    for layers in (nn.Conv2d(3, 3, 1, groups=3), nn.Conv2d(3, 3, 1, bias=False), nn.Flatten()):
        network = torch.fx.symbolic_trace(nn.Sequential(layers).requires_grad_(False))
        with pytest.raises(ExportError, match="no counterpart in Keras"):
            _InKeras(network).run(frames)
    with pytest.raises(ValueError, match="cannot take frames of 90×90"):
        export_metric("my-skip", "keras", tmp_path / "out", weights=weights["skip"], size=90)
    assert not (tmp_path / "out").exists()
