"""Training: the same losses however a run is cut up, and weights that the metric takes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import lsim
from lsim.simulate import layout
from lsim.training import Augmentation, LayoutFolders, TrainingSequence, TrainingSettings, train
from lsim.training.loss import sequence_loss
from lsim.training.network import DistanceNetwork
from lsim.training.sequences import hold_out, simulation_of
from lsim.training.train import HISTORY, LOSSES, PICTURE, STATE, UNTRAINED, WEIGHTS

SMALL = TrainingSettings(
    epochs=2,
    learning_rate=1e-4,
    augmentation=Augmentation(size=48),
    validation_size=48,
    held_out=0.3,
    checkpoint_minutes=0,
    tensorboard=False,
    device="cpu",
    threads=1,
)


class Blobs:
    """Sequences of a blob that moves, the further the later; small enough to train on in a test."""

    def __init__(self, count: int = 10, frames: int = 5, channels: int = 1, stop_at_read: int | None = None) -> None:
        self.names = [f"blobs/blob{k}.density" for k in range(count)]
        self._shape, self._channels = (frames, 56, 60), channels
        self._reads, self._stop_at_read = 0, stop_at_read

    def read(self, index: int) -> TrainingSequence:
        self._reads += 1
        if self._reads == self._stop_at_read:
            raise KeyboardInterrupt
        rng = np.random.default_rng(index)
        n, height, width = self._shape
        y, x = np.mgrid[:height, :width]
        start, velocity = rng.uniform(15, 40, 2), rng.uniform(-10, 10, 2)
        position = start + np.linspace(0, 1, n)[:, None] * velocity
        away = (y - position[:, 0, None, None]) ** 2 + (x - position[:, 1, None, None]) ** 2
        frames = np.exp(-away / 50)[..., None] + 0.1 * rng.standard_normal((n, height, width, self._channels))
        return TrainingSequence(self.names[index], frames.astype(np.float32), np.linspace(0, 1, n))


def losses(folder: Path) -> np.ndarray:
    with (folder / LOSSES).open() as file:
        return np.array([[float(value) for value in row] for row in list(csv.reader(file))[1:]])


def test_distances_in_training_are_those_of_the_metric(tmp_path: Path) -> None:
    source = Blobs()
    train(source, SMALL, tmp_path)
    metric = lsim.load_metric("lsim", weights=tmp_path / WEIGHTS, device="cpu", size=48)
    from lsim.weights import load_checkpoint

    network = DistanceNetwork("lsim", 48)
    network.load_initial(tmp_path / WEIGHTS)
    frames = lsim.preprocess(source.read(0).frames, 48)
    pairs = torch.triu_indices(len(frames), len(frames), 1)
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = network.features(planes)
        by_sequence = network.sequence_distances(features, pairs, 0.0, torch.Generator())
        by_pair = network.pair_distances(planes[pairs[0]], planes[pairs[1]], 0.0, torch.Generator())
    expected = metric.pairwise(source.read(0).frames)[tuple(pairs.numpy())]
    np.testing.assert_allclose(by_sequence, expected, rtol=1e-5)
    np.testing.assert_allclose(by_pair, expected, rtol=1e-5)
    assert load_checkpoint(tmp_path / WEIGHTS, type(network.trunk)).counts[0] == network.counts > 0


def test_loss_is_squared_error_and_correlation_as_published() -> None:
    rng = np.random.default_rng(0)
    distances, truth = rng.uniform(size=(2, 10))
    correlated = np.arange(10) < 4
    terms = sequence_loss(*map(torch.from_numpy, (distances, truth, correlated)))
    error = np.mean((distances - truth) ** 2)
    r = np.corrcoef(distances[:4], truth[:4])[0, 1]
    np.testing.assert_allclose(terms, [0.3 * error + 0.7 * (1 - r) / 2, error, r], rtol=1e-9)


def test_loss_of_equal_frames_has_a_finite_gradient() -> None:
    network = DistanceNetwork("lsim", 48)
    frames = torch.rand(1, 3, 48, 48).expand(4, -1, -1, -1) * 255
    pairs = torch.triu_indices(4, 4, 1)
    distances = network.sequence_distances(network.features(frames), pairs, 0.5, torch.Generator())
    assert (distances == 0).all()
    sequence_loss(distances, torch.linspace(0, 1, 6).double(), pairs[0] == 0).total.backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_training_lowers_the_loss_and_ranks_better_than_before(tmp_path: Path) -> None:
    settings = replace(SMALL, epochs=8, learning_rate=3e-4, average=0.9)
    result = train(Blobs(30), settings, tmp_path)
    assert result.stopped == "epochs"
    assert result.steps == 8 * len(hold_out(Blobs(30), 0.3)[0].names)
    steps = losses(tmp_path)
    assert len(steps) == result.steps
    assert steps[-20:, 1].mean() < 0.8 * steps[:20, 1].mean()
    best = max(result.history, key=lambda row: row["spearman"])
    assert result.best == best["spearman"] >= best["untrained"]
    assert {HISTORY, PICTURE, WEIGHTS, UNTRAINED, STATE} <= {path.name for path in tmp_path.iterdir()}


def test_channel_weights_never_become_negative(tmp_path: Path) -> None:
    train(Blobs(), replace(SMALL, learning_rate=0.05), tmp_path)
    weights = torch.load(tmp_path / STATE, weights_only=True)["network"]
    channel_weights = [value for name, value in weights.items() if name.startswith("channel_weights")]
    assert all((weight >= 0).all() for weight in channel_weights)
    assert any((weight == 0).any() for weight in channel_weights)


@pytest.mark.parametrize("stop_at_read", [25, 31])
@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_run_that_was_stopped_goes_on_with_the_same_losses(
    tmp_path: Path, stop_at_read: int, average: float
) -> None:
    settings = replace(SMALL, average=average, epochs=3)
    undisturbed = train(Blobs(), settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(Blobs(stop_at_read=stop_at_read), settings, tmp_path / "cut")
    before = len(torch.load(tmp_path / "cut" / STATE, weights_only=True)["losses"])
    assert 0 < before < undisturbed.steps
    resumed = train(Blobs(), settings, tmp_path / "cut")
    np.testing.assert_allclose(losses(tmp_path / "cut"), losses(tmp_path / "whole"), rtol=1e-5)
    assert resumed.best == pytest.approx(undisturbed.best, rel=1e-5)


def test_a_run_goes_on_for_more_epochs_but_not_with_other_settings(tmp_path: Path) -> None:
    first = train(Blobs(), replace(SMALL, epochs=1), tmp_path)
    second = train(Blobs(), SMALL, tmp_path)
    assert (first.epochs, second.epochs) == (1, 2)
    with pytest.raises(ValueError, match="learning_rate: 0.0001 then, 0.5 now"):
        train(Blobs(), replace(SMALL, learning_rate=0.5), tmp_path)
    with pytest.raises(ValueError, match="training sequences then"):
        train(Blobs(20), SMALL, tmp_path)


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    settings = replace(SMALL, epochs=50, patience=2, learning_rate=0.0)
    result = train(Blobs(), settings, tmp_path)
    assert (result.stopped, result.epochs) == ("patience", 3)


def test_both_augmentation_forms_agree_where_nothing_is_random(tmp_path: Path) -> None:
    plain = Augmentation(size=56, margin=1, flip=False, turn=False, shuffle_channels=False)

    class Square(Blobs):
        def read(self, index: int) -> TrainingSequence:
            sequence = super().read(index)
            return replace(sequence, frames=sequence.frames[:, :, :56])

    settings = replace(SMALL, augmentation=plain, dropout=0.0, epochs=1)
    train(Square(), settings, tmp_path / "sequence")
    train(Square(), replace(settings, augment="pair"), tmp_path / "pair")
    np.testing.assert_allclose(losses(tmp_path / "sequence"), losses(tmp_path / "pair"), rtol=1e-4)


@pytest.mark.parametrize("trunk", ["lsim", "skip", "alex", "non-siamese"])
@pytest.mark.parametrize("augment", ["sequence", "pair"])
def test_every_trunk_trains(tmp_path: Path, trunk: Any, augment: Any) -> None:
    settings = replace(SMALL, trunk=trunk, augment=augment, epochs=1)
    result = train(Blobs(6, frames=3), settings, tmp_path)
    assert np.isfinite(losses(tmp_path)).all()
    assert np.isfinite(result.best)
    assert (tmp_path / WEIGHTS).read_bytes() != (tmp_path / UNTRAINED).read_bytes()


def test_a_frozen_trunk_begins_from_a_file_and_stays(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    trunk = DistanceNetwork("alex", 48).trunk
    names = trunk.CHECKPOINT_KEYS
    published = {
        f"{names[name.split('.')[0]]}.{name.split('.')[1]}": value.clone()
        for name, value in trunk.state_dict().items()
    }
    save_file(published, tmp_path / "alexnet.safetensors")
    settings = replace(
        SMALL, trunk="alex", frozen_trunk=True, initial_weights=str(tmp_path / "alexnet.safetensors"), epochs=1
    )
    train(Blobs(6, frames=3), settings, tmp_path / "run")
    trained = load_file(tmp_path / "run" / WEIGHTS)
    for name, value in trunk.state_dict().items():
        assert torch.equal(trained[f"trunk.{name}"], value)
    assert not torch.equal(trained["channel_weights.0"], load_file(tmp_path / "run" / UNTRAINED)["channel_weights.0"])


def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    write_blobs(tmp_path / "data" / "blobs", 8)
    settings = {
        "epochs": 2, "batch": 3, "learning_rate": 1e-4, "augmentation": {"size": 48}, "validation_size": 48,
        "held_out": 0.3, "tensorboard": False, "device": "cpu", "threads": 1,
    }  # fmt: skip
    for run, launcher in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]),
    ):
        document = {"out": str(tmp_path / run), "data": str(tmp_path / "data"), "training": settings}
        (tmp_path / f"{run}.yaml").write_text(yaml.safe_dump(document))
        command = [sys.executable, *launcher, "-m", "pipeline", "train", str(tmp_path / f"{run}.yaml")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, timeout=300)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) > 2
    np.testing.assert_allclose(two, one, rtol=1e-5)


def write_blobs(folder: Path, count: int) -> None:
    """Blobs in the layout of the published data."""
    source = Blobs(count)
    for index, name in enumerate(source.names):
        target = folder / name.split("/")[1]
        target.mkdir(parents=True)
        for k, frame in enumerate(source.read(index).frames):
            np.savez(target / f"blob{k:02d}.npz", frame)


def test_all_fields_of_a_simulation_are_held_out_together() -> None:
    class Fields:
        names = [f"smoke/plume{k}.{field}" for k in range(100) for field in ("density", "velocity")]

        def read(self, index: int) -> TrainingSequence:
            raise NotImplementedError

    training, validation = hold_out(Fields(), 0.2)
    assert len(training.names) + len(validation.names) == 200
    assert 10 < len(validation.names) < 80
    assert not set(map(simulation_of, training.names)) & set(map(simulation_of, validation.names))


def test_augmentation_treats_all_frames_alike() -> None:
    frame = np.random.default_rng(0).uniform(size=(1, 70, 80, 3)).astype(np.float32)
    frames = np.repeat(frame, 4, axis=0)
    for seed in range(10):
        varied = Augmentation(size=48).varied(frames, np.random.default_rng(seed))
        assert varied.shape == (4, 48, 48, 3)
        assert (varied == varied[:1]).all()
    noisy = Augmentation(size=48, noise=0.5)
    assert any(
        not (varied == varied[:1]).all()
        for varied in (noisy.varied(frames, np.random.default_rng(seed)) for seed in range(10))
    )


def test_folders_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no data set 'smoke'"):
        LayoutFolders(tmp_path, ["smoke"])
    write_blobs(tmp_path / "blobs", 2)
    (tmp_path / "blobs" / "blob1.density" / "blob03.npz").write_bytes(b"no archive")
    source = LayoutFolders(tmp_path, ["blobs"])
    assert list(source.names) == ["blobs/blob0.density", "blobs/blob1.density"]
    np.testing.assert_array_equal(source.read(0).frames, Blobs().read(0).frames)
    with pytest.raises(ValueError, match="blob1.density: a frame cannot be read"):
        source.read(1)
