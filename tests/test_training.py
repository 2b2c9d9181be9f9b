"""Training: the same losses however a run is cut up, and weights that the metric takes."""

from __future__ import annotations

import csv
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from synthetic import make_frames
from typer.testing import CliRunner

import lsim
from lsim.training import (
    Augmentation,
    LayoutFolders,
    SequenceError,
    TrainingResult,
    TrainingSequence,
    TrainingSettings,
    train,
)
from lsim.training.loss import sequence_loss
from lsim.training.network import DistanceNetwork, dropout_mask
from lsim.training.run_files import HISTORY, LOSSES, PICTURE, STATE, UNTRAINED, WEIGHTS
from lsim.training.sequences import hold_out, simulation_name
from lsim.training.train import DivergedError, validate
from lsim.weights import load_checkpoint
from pipeline.cli import app
from pipeline.train import (
    StoredSequences,
    TrainingFileError,
    TrainingRun,
    describe_data,
    missing_data,
    open_sequences,
    open_training,
)

SMALL = TrainingSettings(
    epochs=2,
    learning_rate=1e-4,
    augmentation=Augmentation(size=48),
    validation_size=48,
    held_out=0.3,
    tensorboard=False,
    device="cpu",
    threads=1,
)


class Blobs:
    """Sequences of a blob that moves, the further the later; small enough to train on in a test.

    Every other one has a frame more.
    """

    def __init__(
        self,
        count: int = 10,
        frames: int = 3,
        *,
        stop_at_read: int | None = None,
        bad: Collection[int] = (),
        side: tuple[int, int] = (56, 60),
    ) -> None:
        self.names = [f"blobs/blob{k}.density" for k in range(count)]
        self._shape = (frames, *side)
        self._reads, self._stop_at_read, self._bad = 0, stop_at_read, bad

    def read(self, index: int) -> TrainingSequence:
        self._reads += 1
        if self._reads == self._stop_at_read:
            raise KeyboardInterrupt
        rng = np.random.default_rng(index)
        n, height, width = self._shape
        n += index % 2
        y, x = np.mgrid[:height, :width]
        start, velocity = rng.uniform(15, 40, 2), rng.uniform(-10, 10, 2)
        position = start + np.linspace(0, 1, n)[:, None] * velocity
        away = (y - position[:, 0, None, None]) ** 2 + (x - position[:, 1, None, None]) ** 2
        frames = np.exp(-away / 50)[..., None] + 0.1 * rng.standard_normal((n, height, width, 1))
        if index in self._bad:
            frames[1, 7, 7] = np.nan
        return TrainingSequence(self.names[index], frames.astype(np.float32), np.linspace(0, 1, n))


def losses(folder: Path) -> np.ndarray:
    """Loss, squared error and correlation of each step."""
    with (folder / LOSSES).open() as file:
        return np.array([[float(value) for value in row[1:]] for row in list(csv.reader(file))[1:]])


def sides() -> tuple[list[str], list[str]]:
    """Names of the blobs that are trained on, and of those held out."""
    training, validation = hold_out(Blobs(), SMALL.held_out)
    return list(training.names), list(validation.names)


def metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return dict(file.metadata())


def write_initial(folder: Path) -> str:
    """Weights of a short run, for another to begin from."""
    train(Blobs(6), replace(SMALL, epochs=1), folder / "initial")
    return str(folder / "initial" / WEIGHTS)


def write_blobs(folder: Path, count: int) -> None:
    """Blobs in the layout of the published data."""
    source = Blobs(count)
    for index, name in enumerate(source.names):
        target = folder / name.split("/")[1]
        target.mkdir(parents=True)
        for k, frame in enumerate(source.read(index).frames):
            np.savez(target / f"blob{5 * k:02d}.npz", frame)


# ---------------------------------------------------------------- distances and loss


@pytest.mark.filterwarnings("ignore::lsim.SizeWarning")
@pytest.mark.parametrize("trunk", ["lsim", "skip", "alex"])
def test_distances_in_training_are_those_of_the_metric(tmp_path: Path, trunk: Any) -> None:
    source = Blobs(6)
    train(source, replace(SMALL, trunk=trunk, epochs=1), tmp_path)
    name = trunk if trunk == "lsim" else f"lsim-{trunk}"
    metric = lsim.load_metric(name, weights=tmp_path / WEIGHTS, device="cpu", size=48)
    network = DistanceNetwork(trunk, 48)
    network.load_initial(tmp_path / WEIGHTS)
    frames = lsim.preprocess(source.read(0).frames, 48)
    pairs = torch.triu_indices(len(frames), len(frames), 1)
    with torch.no_grad():
        features = network.features(torch.from_numpy(frames).permute(0, 3, 1, 2))
        by_sequence = network.sequence_distances(features, pairs, 0.0, torch.Generator())
        sides = [[f[side] for f in features] for side in pairs]
        by_pair = network.pair_distances(*sides, 0.0, torch.Generator())
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


# ---------------------------------------------------------------- runs


def test_training_lowers_the_loss_and_ranks_better_than_before(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    settings = replace(SMALL, epochs=5, learning_rate=3e-4, schedule="cosine", average=0.9, tensorboard=True)
    result = train(Blobs(24), settings, tmp_path)
    assert result.stopped == "epochs"
    assert result.steps == 5 * len(hold_out(Blobs(24), 0.3)[0].names)
    steps = losses(tmp_path)
    assert len(steps) == result.steps
    assert steps[-20:, 0].mean() < 0.8 * steps[:20, 0].mean()
    best = max(result.history, key=lambda row: row["spearman"])
    assert result.best == best["spearman"] >= best["untrained"]
    assert {HISTORY, PICTURE, WEIGHTS, UNTRAINED, STATE} <= {path.name for path in tmp_path.iterdir()}
    assert [path for path in (tmp_path / "tensorboard").iterdir() if path.stat().st_size > 1000]
    said = metadata(tmp_path / WEIGHTS)
    assert json.loads(said["settings"])["learning_rate"] == 3e-4
    assert json.loads(said["sequences"]) == {"blobs": len(hold_out(Blobs(24), 0.3)[0].names)}
    assert int(said["steps"]) == best["step"]


def test_channel_weights_never_become_negative(tmp_path: Path) -> None:
    train(Blobs(), replace(SMALL, epochs=1, learning_rate=0.05), tmp_path)
    weights = torch.load(tmp_path / STATE, weights_only=True)["network"]
    channel_weights = [value for name, value in weights.items() if name.startswith("channel_weights")]
    assert all((weight >= 0).all() for weight in channel_weights)
    assert any((weight == 0).any() for weight in channel_weights)


def test_the_average_of_the_weights_is_validated_and_kept(tmp_path: Path) -> None:
    settings = replace(SMALL, epochs=1, learning_rate=1e-2, average=0.9)
    result = train(Blobs(14), settings, tmp_path)
    state, saved = torch.load(tmp_path / STATE, weights_only=True), load_file(tmp_path / WEIGHTS)
    averaged = {
        name.removeprefix("module."): value
        for name, value in state["average"].items()
        if name.startswith("module.")
    }
    for name in ("trunk.conv1.weight", "channel_weights.0"):
        torch.testing.assert_close(saved[name], averaged[name], rtol=0, atol=0)
        assert not torch.equal(saved[name], state["network"][name])
    network, last = DistanceNetwork("lsim", 48), DistanceNetwork("lsim", 48)
    network.load_state_dict(averaged)
    last.load_state_dict(state["network"])
    _, held_out = hold_out(Blobs(14), settings.held_out)
    found, of_last = (
        validate(each, held_out, settings, torch.device("cpu"))["spearman"] for each in (network, last)
    )
    assert result.best == pytest.approx(found, abs=1e-9)
    assert found != pytest.approx(of_last, abs=1e-3)


def test_the_learning_rate_is_constant_or_falls_as_a_cosine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.Adam.step

    def recorded(self: torch.optim.Adam, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    train(Blobs(6), replace(SMALL, schedule="constant", epochs=1), tmp_path / "constant")
    assert set(rates) == {1e-4}
    rates.clear()
    train(Blobs(6), replace(SMALL, schedule="cosine"), tmp_path / "cosine")
    n = len(rates)
    assert n % 2 == 0
    assert rates[0] == 1e-4
    assert rates[n // 2] == pytest.approx(0.5e-4)
    assert rates[-1] == pytest.approx(1e-4 * np.sin(np.pi / (2 * n)) ** 2)


def test_the_correlation_is_over_pairs_with_the_reference_or_all(tmp_path: Path) -> None:
    settings = replace(SMALL, epochs=1, learning_rate=0.0, dropout=0.0)
    reference, everything = tmp_path / "reference", tmp_path / "all"
    train(Blobs(6, frames=5), settings, reference)
    train(Blobs(6, frames=5), replace(settings, correlated_pairs="all"), everything)
    np.testing.assert_allclose(losses(reference)[:, 1], losses(everything)[:, 1], rtol=1e-6)
    assert (abs(losses(reference)[:, 2] - losses(everything)[:, 2]) > 1e-4).all()


def test_dropout_leaves_out_its_share_and_keeps_the_mean(tmp_path: Path) -> None:
    mask = dropout_mask((300, 300), 0.3, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert float((mask == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(mask.mean()) == pytest.approx(1, abs=0.01)
    network, frames = DistanceNetwork("lsim", 48), lsim.preprocess(Blobs().read(0).frames, 48)
    features = network.features(torch.from_numpy(frames).permute(0, 3, 1, 2))
    pairs, generator = torch.tensor([[0, 0, 1], [1, 2, 2]]), torch.Generator().manual_seed(1)
    with torch.no_grad():
        full = network.sequence_distances(features, pairs, 0.0, generator)
        drawn = [network.sequence_distances(features, pairs, 0.5, generator) for _ in range(20)]
    np.testing.assert_allclose(torch.stack(drawn).square().mean(0), full.square(), rtol=0.02)
    settings = replace(SMALL, epochs=1, learning_rate=0.0)
    for form in ("sequence", "pair"):
        for dropout in (0.0, 0.5):
            run = replace(settings, augment=form, dropout=dropout)
            train(Blobs(6), run, tmp_path / form / str(dropout))
        with_all, with_half = (losses(tmp_path / form / share)[:, 1] for share in ("0.0", "0.5"))
        assert (with_half != with_all).all()


def test_the_callers_threads_and_denormal_numbers_are_left_as_they_were(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(Blobs(stop_at_read=1), SMALL, tmp_path)
        assert torch.get_num_threads() == 3
        assert (torch.tensor(1e-310, dtype=torch.float64) * 1).item() > 0
    finally:
        torch.set_num_threads(before)


class StopAfterEpoch:
    """A kill between an epoch's validation and the checkpoint that follows it."""

    def __init__(self, epoch: int) -> None:
        self._line = f"epoch {epoch}:"

    def __call__(self, line: str) -> None:
        if line.startswith(self._line):
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def undisturbed_runs(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[float], tuple[Path, TrainingResult]]:
    """Runs of `SMALL` that nothing stopped, by the weights' average."""

    @functools.cache
    def run(average: float) -> tuple[Path, TrainingResult]:
        folder = tmp_path_factory.mktemp("undisturbed")
        return folder, train(Blobs(), replace(SMALL, average=average), folder)

    return run


@pytest.mark.parametrize(
    ("interrupted", "average"),
    [({"stop_at_read": 25}, 0.0), ({"stop_at_read": 35}, 0.9), ({"progress": StopAfterEpoch(2)}, 0.9)],
)
def test_a_run_that_was_killed_goes_on_with_the_same_losses(
    tmp_path: Path,
    undisturbed_runs: Callable[[float], tuple[Path, TrainingResult]],
    interrupted: dict[str, Any],
    average: float,
) -> None:
    settings = replace(SMALL, average=average, checkpoint_minutes=0)
    whole, undisturbed = undisturbed_runs(average)
    with pytest.raises(KeyboardInterrupt):
        train(
            Blobs(stop_at_read=interrupted.get("stop_at_read")),
            settings,
            tmp_path / "cut",
            progress=interrupted.get("progress", print),
        )
    before = len(torch.load(tmp_path / "cut" / STATE, weights_only=True)["losses"])
    assert 0 < before < undisturbed.steps
    resumed = train(Blobs(), settings, tmp_path / "cut")
    np.testing.assert_allclose(losses(tmp_path / "cut"), losses(whole), rtol=1e-5)
    assert len(resumed.history) == settings.epochs
    assert resumed.best == pytest.approx(undisturbed.best, rel=1e-5)
    for name, tensor in load_file(whole / WEIGHTS).items():
        torch.testing.assert_close(load_file(tmp_path / "cut" / WEIGHTS)[name], tensor, rtol=1e-5, atol=1e-7)


def test_a_run_that_is_out_of_time_goes_on(tmp_path: Path) -> None:
    settings = replace(SMALL, epochs=1)
    first = train(Blobs(6), settings, tmp_path / "cut", minutes=0, about={"simulated": "recipe 1"})
    assert (first.stopped, first.steps) == ("minutes", 1)
    second = train(Blobs(6), replace(settings, readers=3), tmp_path / "cut", about={"simulated": "recipe 2"})
    # The data are those that it was begun with; settings that may change are those of today.
    assert metadata(tmp_path / "cut" / WEIGHTS)["simulated"] == "recipe 1"
    assert json.loads((tmp_path / "cut" / "settings.json").read_text())["readers"] == 3
    train(Blobs(6), settings, tmp_path / "whole")
    assert second.stopped == "epochs"
    np.testing.assert_allclose(losses(tmp_path / "cut"), losses(tmp_path / "whole"), rtol=1e-5)


def test_a_run_goes_on_for_more_epochs_but_not_with_other_settings(tmp_path: Path) -> None:
    first = train(Blobs(6), replace(SMALL, epochs=1), tmp_path)
    second = train(Blobs(6), SMALL, tmp_path)
    assert (first.epochs, second.epochs) == (1, 2)
    with pytest.raises(ValueError, match=r"learning_rate: 0\.0001 then, 0\.5 now"):
        train(Blobs(6), replace(SMALL, learning_rate=0.5), tmp_path)
    with pytest.raises(ValueError, match="training sequences then"):
        train(Blobs(20), SMALL, tmp_path)


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    settings = replace(SMALL, epochs=50, patience=2, learning_rate=0.0)
    result = train(Blobs(6), settings, tmp_path)
    assert (result.stopped, result.epochs) == ("patience", 3)
    again = train(Blobs(6), settings, tmp_path)
    assert (again.stopped, again.steps) == ("patience", result.steps)
    trained, untrained = load_file(tmp_path / WEIGHTS), load_file(tmp_path / UNTRAINED)
    assert all(torch.equal(trained[name], untrained[name]) for name in untrained)


def test_both_augmentation_forms_agree_where_nothing_is_random(tmp_path: Path) -> None:
    plain = Augmentation(size=56, margin=1, flip=False, turn=False, shuffle_channels=False)
    settings = replace(SMALL, augmentation=plain, dropout=0.0, epochs=1)
    for form in ("sequence", "pair"):
        train(Blobs(6, side=(56, 56)), replace(settings, augment=form), tmp_path / form)
    np.testing.assert_allclose(losses(tmp_path / "sequence"), losses(tmp_path / "pair"), rtol=1e-4)


@pytest.mark.parametrize(
    ("form", "trunk"),
    [
        ("sequence", "lsim"),
        ("sequence", "alex"),
        ("sequence", "non-siamese"),
        ("pair", "lsim"),
        ("pair", "skip"),
        ("pair", "non-siamese"),
    ],
)
def test_every_trunk_trains(tmp_path: Path, trunk: Any, form: Any) -> None:
    precision: Any = "bfloat16" if form == "pair" else "float32"
    settings = replace(SMALL, trunk=trunk, augment=form, epochs=1, precision=precision)
    result = train(Blobs(6), settings, tmp_path)
    assert np.isfinite(losses(tmp_path)).all()
    assert np.isfinite(result.best)
    trained, untrained = load_file(tmp_path / WEIGHTS), load_file(tmp_path / UNTRAINED)
    moved = {name for name in trained if not torch.equal(trained[name], untrained[name])}
    assert moved == {name for name in trained if not name.startswith("deviation_squares")}
    assert all(tensor.dtype == torch.float32 for tensor in trained.values())


def test_bfloat16_has_nearly_the_losses_of_float32(tmp_path: Path) -> None:
    for precision in ("float32", "bfloat16"):
        train(Blobs(6), replace(SMALL, epochs=1, precision=precision), tmp_path / precision)
    single, half = losses(tmp_path / "float32"), losses(tmp_path / "bfloat16")
    np.testing.assert_allclose(half[:, 0], single[:, 0], rtol=0.05)
    assert (half[:, 0] != single[:, 0]).all()


def test_a_frozen_trunk_begins_from_a_file_and_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trunk = DistanceNetwork("alex", 48).trunk
    names = trunk.CHECKPOINT_KEYS
    published = {
        f"{names[name.split('.')[0]]}.{name.split('.')[1]}": value.clone()
        for name, value in trunk.state_dict().items()
    }
    file = tmp_path / "alexnet.safetensors"
    save_file(published, file)
    settings = replace(SMALL, trunk="alex", frozen_trunk=True, initial_weights=str(file), epochs=1)
    train(Blobs(6), settings, tmp_path / "run")
    trained, untrained = (load_file(tmp_path / "run" / name) for name in (WEIGHTS, UNTRAINED))
    for name, value in trunk.state_dict().items():
        assert torch.equal(trained[f"trunk.{name}"], value)
    assert not torch.equal(trained["channel_weights.0"], untrained["channel_weights.0"])


def test_a_run_begins_from_weights_that_another_left(tmp_path: Path) -> None:
    initial = write_initial(tmp_path)
    train(Blobs(6), replace(SMALL, initial_weights=initial, epochs=1), tmp_path / "second")
    first, second = load_file(initial), load_file(tmp_path / "second" / UNTRAINED)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    write_blobs(tmp_path / "data" / "blobs", 10)
    bad = sides()[0][1]
    (tmp_path / "data" / bad / "blob05.npz").write_bytes(b"no archive")
    settings = replace(SMALL, batch=3, bad_sequences=0.1)
    with pytest.warns(UserWarning, match="left out"):
        train(LayoutFolders(tmp_path / "data", ["blobs"]), settings, tmp_path / "one")
    fields = ("epochs", "batch", "learning_rate", "validation_size", "held_out", "bad_sequences", "device")
    document = {
        "out": str(tmp_path / "two"),
        "data": str(tmp_path / "data"),
        "training": {name: getattr(settings, name) for name in fields}
        | {"augmentation": {"size": 48}, "tensorboard": False},
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(document))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*launcher, "-m", "pipeline", "train", str(tmp_path / "two.yaml")],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 4
    np.testing.assert_allclose(two, one, rtol=1e-5)
    assert json.loads(metadata(tmp_path / "two" / WEIGHTS)["skipped"]) == [bad]


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("readers", [1, 3])
def test_a_few_bad_sequences_are_left_out_and_recorded(tmp_path: Path, readers: int) -> None:
    bad = {name: Blobs().names.index(name) for side in sides() for name in side[1:2]}
    settings = replace(SMALL, epochs=1, learning_rate=0.0, readers=readers, bad_sequences=0.25)
    with pytest.warns(UserWarning, match=r"left out: blobs/blob\d.density: frame 1 holds NaN"):
        single = train(Blobs(bad=bad.values()), settings, tmp_path / "single")
    assert single.skipped.keys() == bad.keys()
    assert json.loads(metadata(tmp_path / "single" / WEIGHTS)["skipped"]) == sorted(bad)
    one_by_one = losses(tmp_path / "single")
    assert np.isnan(one_by_one).all(1).sum() == 1
    # A batch that holds it has the loss of the others.
    with pytest.warns(UserWarning, match="left out"):
        train(Blobs(bad=bad.values()), replace(settings, batch=4), tmp_path / "batch")
    assert len(losses(tmp_path / "batch")) == 1
    np.testing.assert_allclose(losses(tmp_path / "batch")[0], np.nanmean(one_by_one, 0), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_a_step_with_nothing_to_learn_from_moves_no_weights(tmp_path: Path) -> None:
    training, _ = sides()
    bad = [Blobs().names.index(name) for name in training]
    settings = replace(SMALL, epochs=1, bad_sequences=0.9, initial_weights=write_initial(tmp_path))
    with pytest.warns(UserWarning, match="left out"):
        train(Blobs(bad=bad), settings, tmp_path / "run")
    trained, untrained = (load_file(tmp_path / "run" / name) for name in (WEIGHTS, UNTRAINED))
    assert all(torch.equal(trained[name], untrained[name]) for name in untrained)


def test_many_bad_sequences_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(SequenceError, match=r"1 of 10 sequences cannot be learned from.*blob0"):
        train(Blobs(bad=[0]), SMALL, tmp_path)


def test_a_run_that_diverges_says_so_and_keeps_what_was_saved(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"with blobs/blob\d+.density: loss .*nan.*learning_rate"):
        train(Blobs(), replace(SMALL, learning_rate=1e12, checkpoint_minutes=0), tmp_path)
    state = torch.load(tmp_path / STATE, weights_only=True)
    assert np.isfinite(state["losses"]).all()


def test_a_missing_tensorboard_is_said_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'lsim\[train\]'"):
        train(Blobs(stop_at_read=1), replace(SMALL, tensorboard=True), tmp_path)


def test_sizes_that_a_trunk_cannot_take_are_refused() -> None:
    with pytest.raises(ValueError, match="validation_size: the trunk 'skip' cannot take frames of 52×52"):
        replace(SMALL, trunk="skip", validation_size=52)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"schedule": "cosinus"}, "schedule must be one of 'constant', 'cosine', got 'cosinus'"),
        ({"augment": "pairs"}, "augment must be one of 'sequence', 'pair', got 'pairs'"),
        ({"precision": "float16"}, "precision must be one of 'float32', 'bfloat16', got 'float16'"),
        ({"correlated_pairs": "any"}, "correlated_pairs must be one of"),
        ({"trunk": "vgg"}, "trunk must be one of 'lsim', 'skip', 'alex', 'non-siamese', got 'vgg'"),
        ({"trunk": "non-siamese", "initial_weights": "lsim"}, "'non-siamese' takes no initial_weights"),
        ({"frozen_trunk": True}, "a frozen trunk needs initial_weights"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_that_cannot_be_trained_with_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(SMALL, **wrong)


def test_a_crop_that_would_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"augmentation\.margin must be at least 1, got 0\.9"):
        Augmentation(margin=0.9)


# ---------------------------------------------------------------- sequences


def test_all_fields_of_a_simulation_are_held_out_together() -> None:
    class Fields:
        def __init__(self) -> None:
            self.names = [f"smoke/plume{k}.{field}" for k in range(100) for field in ("density", "velocity")]

        def read(self, index: int) -> TrainingSequence:
            raise NotImplementedError

    training, validation = hold_out(Fields(), 0.2)
    assert len(training.names) + len(validation.names) == 200
    assert 10 < len(validation.names) < 80
    assert not set(map(simulation_name, training.names)) & set(map(simulation_name, validation.names))


def test_augmentation_treats_all_frames_alike() -> None:
    frame = np.random.default_rng(0).uniform(size=(1, 70, 80, 3)).astype(np.float32)
    frames = np.repeat(frame, 4, axis=0)
    for seed in range(10):
        varied = Augmentation(size=48).vary(frames, np.random.default_rng(seed))
        assert varied.shape == (4, 48, 48, 3)
        assert (varied == varied[:1]).all()
    noisy = Augmentation(size=48, noise=0.5)
    assert any(
        not (varied == varied[:1]).all()
        for varied in (noisy.vary(frames, np.random.default_rng(seed)) for seed in range(10))
    )


def test_noise_is_of_the_range_of_each_channel() -> None:
    frames = np.zeros((11, 64, 64, 3), np.float32)
    frames[..., 0], frames[..., 1] = np.linspace(0, 1, 64), np.linspace(-100, 100, 64)
    augment = Augmentation(size=64, margin=1, flip=False, turn=False, shuffle_channels=False, noise=0.5)
    noises = [augment.vary(frames, np.random.default_rng(seed)) - frames for seed in range(10)]
    deviations = np.array([noise.std((0, 1, 2)) for noise in noises if noise.any()])
    assert 0 < len(deviations) < 10
    assert (deviations[:, 2] == 0).all()
    np.testing.assert_allclose(deviations[:, 1] / deviations[:, 0], 200, rtol=0.02)
    assert (deviations[:, 0] < 0.52).all()


def test_png_files_keep_their_values(tmp_path: Path) -> None:
    folder = tmp_path / "plumes" / "plume0.density"
    folder.mkdir(parents=True)
    values = np.arange(3 * 6 * 8).reshape(3, 6, 8) * 400
    for k, frame in enumerate(values):
        Image.fromarray(frame.astype(np.uint16)).save(folder / f"plume{k:02d}.png")
    read = LayoutFolders(tmp_path, ["plumes"]).read(0).frames
    np.testing.assert_array_equal(read[..., 0], values)
    color = np.arange(6 * 8 * 4, dtype=np.uint8).reshape(6, 8, 4)
    for k, mode in enumerate(("RGB", "RGBA", "RGB")):
        pixels = color[..., : len(mode)]
        Image.fromarray(np.ascontiguousarray(pixels), mode).save(folder / f"plume{k:02d}.png")
    read = LayoutFolders(tmp_path, ["plumes"]).read(0).frames
    np.testing.assert_array_equal(read, np.stack([color[..., :3]] * 3))


@pytest.mark.parametrize("damage", ["checksum", "cut"])
def test_a_damaged_png_file_is_a_bad_sequence(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "plumes" / "plume0.density"
    folder.mkdir(parents=True)
    for k in range(3):
        Image.fromarray(np.full((6, 8), k, np.uint8)).save(folder / f"plume{k:02d}.png")
    content = bytearray((folder / "plume01.png").read_bytes())
    if damage == "checksum":
        content[29] ^= 0xFF  # of the header, for which Pillow raises SyntaxError
    else:
        content = content[: len(content) // 2]
    (folder / "plume01.png").write_bytes(content)
    with pytest.raises(SequenceError, match=r"plume0\.density: a frame cannot be read"):
        LayoutFolders(tmp_path, ["plumes"]).read(0)


def test_folders_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no data set 'smoke'"):
        LayoutFolders(tmp_path, ["smoke"])
    write_blobs(tmp_path / "blobs", 2)
    (tmp_path / "blobs" / "blob1.density" / "blob05.npz").write_bytes(b"no archive")
    (tmp_path / "blobs" / "blob0.density").joinpath("family.json").write_text("{}")
    write_blobs(tmp_path / "blobs" / ".partial", 1)
    source = LayoutFolders(tmp_path, ["blobs"])
    assert list(source.names) == ["blobs/blob0.density", "blobs/blob1.density"]
    np.testing.assert_array_equal(source.read(0).frames, Blobs().read(0).frames)
    np.testing.assert_array_equal(source.read(0).parameter, [0, 0.5, 1])
    with pytest.raises(SequenceError, match=r"blob1\.density: a frame cannot be read"):
        source.read(1)


def test_a_store_is_read_as_folders_are(tmp_path: Path) -> None:
    fields = {"waves/height": (3, "float32", 1), "flow/velocity": (2, "float32", 3)}
    store = make_frames(tmp_path / "frames.zarr", fields, frames=4)
    source = StoredSequences(store, ["waves"])
    assert list(source.names) == ["waves/waves0.height", "waves/waves1.height", "waves/waves2.height"]
    assert source.read(1).frames.shape == (4, 48, 64, 1)
    np.testing.assert_allclose(source.read(1).parameter, np.linspace(0, 1, 4))
    assert len(StoredSequences(store, None).names) == 5
    with pytest.raises(ValueError, match="no data set smoke; available: flow, waves"):
        StoredSequences(store, ["smoke"])
    for chunk in (store / "waves" / "height" / "frames" / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(chunk.read_bytes()[:100])
    with pytest.raises(SequenceError, match=r"waves/waves0\.height cannot be read"):
        source.read(0)


def test_what_is_simulated_neither_chooses_from_a_store_nor_is_said_of_it(tmp_path: Path) -> None:
    fields = {"waves/height": (3, "float32", 1), "flow/velocity": (2, "float32", 3)}
    store = make_frames(tmp_path / "frames.zarr", fields, frames=4)
    asked: Any = {"shapes": {"families": 6}, "burgers": {"families": 2}}
    run = TrainingRun(out="run", data=str(store), title="mine", simulate=asked)
    assert len(open_sequences(run).names) == 5
    assert describe_data(run) == {"title": "mine"}
    of_waves = run.model_copy(update={"datasets": ["waves"]})
    assert len(open_sequences(of_waves).names) == 3
    folders = run.model_copy(update={"data": str(tmp_path)})
    assert json.loads(describe_data(folders)["simulated"]).keys() == {"shapes", "burgers"}
    one = folders.model_copy(update={"datasets": ["burgers", "mine"]})
    assert json.loads(describe_data(one)["simulated"]).keys() == {"burgers"}
    none = folders.model_copy(update={"datasets": ["mine"]})
    assert describe_data(none) == {"title": "mine"}


# ---------------------------------------------------------------- the command


def test_the_command_simulates_and_trains(tmp_path: Path) -> None:
    document: dict[str, Any] = {
        "out": str(tmp_path / "run"),
        "data": str(tmp_path / "data"),
        "simulate": {"shapes": {"families": 6, "size": 64}},
        "training": {
            "epochs": 1,
            "augmentation": {"size": 48},
            "validation_size": 48,
            "held_out": 0.3,
            "tensorboard": False,
            "device": "cpu",
        },
    }
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(document))
    done = CliRunner().invoke(app, ["train", str(file), "--cluster", "none"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "shapes: 6 families made, 0 already there" in done.output
    assert "1 epochs, " in done.output
    assert len(list((tmp_path / "data" / "shapes").glob("*.*"))) == 6
    made = json.loads(metadata(tmp_path / "run" / WEIGHTS)["simulated"])
    assert made["shapes"]["families"] == 6
    assert not missing_data(open_training(file))
    # What a run that goes on was begun with isn't made again; a new run needs it.
    document["simulate"]["shapes"]["seed"] = 5
    file.write_text(yaml.safe_dump(document))
    assert not missing_data(open_training(file))
    file.write_text(yaml.safe_dump(document | {"out": str(tmp_path / "other")}))
    assert missing_data(open_training(file)) == {"shapes": 6}


def test_a_training_file_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("out: run\ndata: data\ntraining: {learning_rat: 1}\n")
    with pytest.raises(TrainingFileError, match=r"mine\.yaml: training\.learning_rat"):
        open_training(file)
