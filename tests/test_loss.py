"""The loss equals the metric, has true and finite gradients, and goes through torch's transformations."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F

import lsim
from lsim.loss import SimulationLoss
from lsim.metric import MetricInfo
from lsim.metrics.learned import LSiM
from lsim.preprocess import Preprocessing
from lsim.testing import write_random_checkpoint
from lsim.weights import Checkpoint

SIDE = 64
Make = Callable[..., SimulationLoss]
pytestmark = pytest.mark.filterwarnings("ignore::lsim.SizeWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def metric(tmp_path_factory: pytest.TempPathFactory) -> lsim.Metric:
    """LSiM with random weights, whose maps are of another size than the frames here."""
    weights = write_random_checkpoint(tmp_path_factory.mktemp("weights") / "random.pth", size=96)
    return lsim.load_metric("lsim", weights, device="cpu", size=None)


@pytest.fixture
def make(metric: lsim.Metric) -> Make:
    def make(**settings: object) -> SimulationLoss:
        return SimulationLoss(metric, **settings)  # type: ignore[arg-type]

    return make


@pytest.fixture
def frames(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Prediction and target (batch 3, channel 2, y, x), smooth, of very different ranges by channel."""
    coarse = torch.from_numpy(rng.standard_normal((2, 3, 2, 9, 9)))
    fine = F.interpolate(coarse.flatten(0, 1), (SIDE, SIDE), mode="bicubic").unflatten(0, (2, 3)).float()
    fine = fine * torch.tensor([1e-3, 1e4])[:, None, None] + torch.tensor([5.0, -1e4])[:, None, None]
    return fine[0] * 0.3 + fine[1] * 0.7, fine[1]


class TinyTrunk(nn.Module):
    """Two small convolutions in place of five large ones."""

    CHANNELS: ClassVar[tuple[int, ...]] = (3, 4)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, stride=2)
        self.conv2 = nn.Conv2d(3, 4, 2)

    @staticmethod
    def takes(n: int) -> bool:
        return n >= 6

    def forward(self, frames: Tensor) -> list[Tensor]:
        one = F.relu(self.conv1(frames))
        return [one, F.relu(self.conv2(F.max_pool2d(one, 2, 1)))]


class TinyLSiM(LSiM):
    info = MetricInfo(title="LSiM on a tiny trunk", source="this test", minimum_size=6)
    trunk_class = TinyTrunk  # type: ignore[assignment]


@pytest.fixture
def tiny() -> LSiM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        checkpoint = Checkpoint(
            trunk=TinyTrunk().state_dict(),
            channel_weights=[torch.rand(3), torch.rand(4)],
            deviation_squares=[1 + torch.rand(5, 5), 1 + torch.rand(3, 3)],
            counts=[10, 10],
            sha256="",
        )
    return TinyLSiM("tiny", Preprocessing(size=None), torch.device("cpu"), checkpoint)


def by_the_metric(metric: lsim.Metric, prediction: Tensor, target: Tensor, scope: object) -> np.ndarray:
    """Distances of every channel as a field of its own: (batch, channel)."""
    a, b = prediction.numpy(), target.numpy()
    return np.array(
        [
            [metric.distance(*field, scope=scope)[0] for field in zip(*pair, strict=True)]
            for pair in zip(a, b, strict=True)
        ]  # type: ignore[arg-type]
    )


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (50, 77)])
def test_equals_the_metric_on_each_channel(
    make: Make, metric: lsim.Metric, frames: tuple[Tensor, Tensor], size: tuple[int, int]
) -> None:
    prediction, target = (F.interpolate(x, size, mode="bilinear") for x in frames)
    expected = by_the_metric(metric, prediction, target, "pair")
    assert expected.min() > 0
    np.testing.assert_allclose(make(reduction="none")(prediction, target), expected, rtol=1e-5)
    np.testing.assert_allclose(make()(prediction, target), expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(make(reduction="sum")(prediction, target), expected.sum(), rtol=1e-5)


def test_three_channels_together_are_one_frame(
    make: Make, metric: lsim.Metric, frames: tuple[Tensor, Tensor]
) -> None:
    prediction, target = (torch.cat([x, x[:, :1] ** 2], 1) for x in frames)
    expected = metric.distance(*(x.permute(0, 2, 3, 1).numpy() for x in (prediction, target)), scope="pair")
    loss = make(channels="together", reduction="none")
    np.testing.assert_allclose(loss(prediction, target), expected, rtol=1e-5)
    one = loss(prediction[:, :1], target[:, :1])
    np.testing.assert_allclose(one, make(reduction="none")(prediction[:, :1], target[:, :1])[:, 0], rtol=1e-6)


def test_fixed_range_for_all_channels_or_for_each(
    make: Make, metric: lsim.Metric, frames: tuple[Tensor, Tensor]
) -> None:
    prediction, target = frames
    lo, hi = [4.99, -3e4], [5.01, 2e4]
    found = make(normalisation=(lo, hi), reduction="none")(prediction, target)
    for channel in range(2):
        one = slice(channel, channel + 1)
        expected = by_the_metric(metric, prediction[:, one], target[:, one], (lo[channel], hi[channel]))
        np.testing.assert_allclose(found[:, one], expected, rtol=1e-5)
    same = make(normalisation=(-1e5, 1e5), reduction="none")(prediction, target)
    np.testing.assert_allclose(
        same, by_the_metric(metric, prediction, target, (-1e5, 1e5)), rtol=1e-5, atol=1e-7
    )


def test_normalised_frames_are_taken_as_they_are(make: Make, metric: lsim.Metric) -> None:
    a, b = torch.rand(2, 2, 3, SIDE, SIDE) * 255
    found = make(normalisation=None, channels="together", reduction="none")(a, b)
    np.testing.assert_allclose(found, metric(a, b), rtol=1e-5)


def test_range_of_the_target_does_not_follow_the_prediction(
    make: Make, frames: tuple[Tensor, Tensor]
) -> None:
    """A prediction of a large range squeezes both frames by ``"pair"``, not by ``"target"``."""
    prediction, target = frames
    far = target + 20 * (prediction - target)
    by_target, by_pair = (make(normalisation=n)(far, target).item() for n in ("target", "pair"))
    assert by_target > 3 * by_pair
    lo, hi = target[:1, :1].min().item(), target[:1, :1].max().item()
    fixed = make(normalisation=(lo, hi))(far[:1, :1], target[:1, :1])
    np.testing.assert_allclose(make(normalisation="target")(far[:1, :1], target[:1, :1]), fixed, rtol=1e-4)


def test_nan_in_a_frame_makes_its_distance_nan_alone(make: Make, frames: tuple[Tensor, Tensor]) -> None:
    prediction, target = frames[0].clone(), frames[1]
    prediction[1, 0, 20, 20] = torch.nan
    spoilt = torch.zeros(3, 2, dtype=torch.bool)
    spoilt[1, 0] = True
    assert torch.equal(make(reduction="none")(prediction, target).isnan(), spoilt)


# --- gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", ["separate", "together"])
@pytest.mark.parametrize("normalisation", ["pair", "target", (-3.0, 3.0), None])
def test_gradients_are_those_of_finite_differences(
    tiny: LSiM, rng: np.random.Generator, channels: str, normalisation: object
) -> None:
    loss = SimulationLoss(tiny, channels=channels, normalisation=normalisation, reduction="none").double()  # type: ignore[arg-type]
    prediction, target = (torch.from_numpy(x).requires_grad_() for x in rng.standard_normal((2, 1, 3, 7, 8)))
    assert torch.autograd.gradcheck(loss, (prediction, target))


def test_fixed_range_has_no_gradient_of_its_own(make: Make, frames: tuple[Tensor, Tensor]) -> None:
    target, prediction = (x[:1, :1] for x in frames)
    lo, hi = prediction.min().item(), prediction.max().item()
    assert lo < target.min() < target.max() < hi
    losses = [make(differentiable_range=False), make(normalisation=(lo, hi)), make(differentiable_range=True)]
    detached, fixed, through = (grad(loss)(prediction, target) for loss in losses)
    torch.testing.assert_close(detached, fixed, rtol=1e-3, atol=1e-4 * fixed.abs().max().item())
    assert (through - fixed).abs().max() > 1e-2 * fixed.abs().max()


@pytest.mark.parametrize("name", [None, "l1", "l2", "ssim"])
@pytest.mark.parametrize("normalisation", ["pair", "target", (-3e4, 3e4), None])
def test_gradients_are_finite_and_zero_at_equal_and_constant_frames(
    metric: lsim.Metric, frames: tuple[Tensor, Tensor], name: str | None, normalisation: object
) -> None:
    prediction, target = frames[0].clone(), frames[1].clone()
    prediction[0] = target[0]
    prediction[1], target[1] = 7.0, 7.0
    prediction.requires_grad_()
    loss = SimulationLoss(name or metric, normalisation=normalisation)  # type: ignore[arg-type]
    loss(prediction, target).backward()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()
    assert (prediction.grad[:2] == 0).all()
    assert (prediction.grad[2].abs().amax((1, 2)) > 0).all()


def test_descent_along_the_gradient_brings_a_frame_closer(make: Make, frames: tuple[Tensor, Tensor]) -> None:
    loss, target = make(normalisation="target"), frames[1][:1, :1]
    prediction = frames[0][:1, :1].clone().requires_grad_()
    optimiser = torch.optim.Adam([prediction], 5e-5)
    before = loss(prediction, target).item()
    for _ in range(20):
        optimiser.zero_grad()
        loss(prediction, target).backward()
        optimiser.step()
    assert loss(prediction, target).item() < 0.7 * before


# --- torch's transformations ------------------------------------------------------------------------------


def test_compiles_into_one_graph(make: Make, frames: tuple[Tensor, Tensor]) -> None:
    loss = make()
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        leaf = frames[0].clone().requires_grad_()
        value = function(leaf, frames[1])
        value.backward()
        assert leaf.grad is not None
        results.append((value.item(), leaf.grad / leaf.grad.abs().amax((0, 2, 3), keepdim=True)))
    (value, gradient), (compiled_value, compiled_gradient) = results
    assert compiled_value == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(compiled_gradient, gradient, rtol=0, atol=1e-5)


def test_maps_over_a_leading_axis_with_gradients_per_sample(
    make: Make, frames: tuple[Tensor, Tensor]
) -> None:
    loss = make()
    predictions, targets = (x[:, None] for x in frames)
    expected = torch.stack([loss(a, b) for a, b in zip(predictions, targets, strict=True)])
    torch.testing.assert_close(vmap(loss)(predictions, targets), expected, rtol=1e-6, atol=0)
    one_by_one = torch.stack([grad(loss)(a, b) for a, b in zip(predictions, targets, strict=True)])
    mapped = vmap(grad(loss))(predictions, targets)
    largest = one_by_one.abs().amax((1, 3, 4), keepdim=True)
    torch.testing.assert_close(mapped / largest, one_by_one / largest, rtol=0, atol=1e-5)


def test_autocast_does_not_reach_into_the_metric(make: Make, frames: tuple[Tensor, Tensor]) -> None:
    loss = make()
    scale = nn.Conv2d(2, 2, 1)
    leaf = frames[0].clone().requires_grad_()
    plain = loss(leaf, frames[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(leaf, frames[1]).item() == plain.item()
        predicted = scale(leaf / 1e4)
        assert predicted.dtype == torch.bfloat16
        value = loss(predicted, frames[1])
    assert value.dtype == torch.float32
    value.backward()
    assert scale.weight.grad is not None
    assert scale.weight.grad.isfinite().all()
    assert scale.weight.grad.abs().max() > 0


# --- as a module ------------------------------------------------------------------------------------------


def test_is_frozen_and_adds_nothing_to_a_model(make: Make, metric: lsim.Metric) -> None:
    loss = make()
    assert not list(loss.parameters())
    assert not loss.state_dict()
    model = nn.ModuleDict({"network": nn.Linear(1, 1), "loss": loss}).requires_grad_(True).train()
    assert set(model.state_dict()) == {"network.weight", "network.bias"}
    loss.double()
    assert all(p.dtype == torch.float32 for p in metric.trunk.parameters())  # type: ignore[attr-defined]


def test_copies_pickles_and_saves(make: Make, frames: tuple[Tensor, Tensor]) -> None:
    loss = make(normalisation=([4, -3e4], [6, 3e4]))
    expected = loss(*frames)
    saved = io.BytesIO()
    torch.save(loss, saved)
    saved.seek(0)
    for again in (
        copy.deepcopy(loss),
        pickle.loads(pickle.dumps(loss)),
        torch.load(saved, weights_only=False),
    ):
        assert again(*frames).item() == expected.item()


def test_double_precision_agrees_with_single(make: Make, frames: tuple[Tensor, Tensor]) -> None:
    single = make(reduction="none")(*frames)
    double = make(reduction="none").double()(*(x.double() for x in frames))
    assert double.dtype == torch.float64
    np.testing.assert_allclose(single, double, rtol=1e-4)


@pytest.mark.gpu
def test_moves_to_a_gpu_keeps_tf32_out_and_compiles(make: Make, frames: tuple[Tensor, Tensor]) -> None:
    expected = make()(*frames)
    target = frames[1].cuda()
    nearly = target * (1 + 1e-4 * torch.rand_like(target))
    close = make().double()(nearly.cpu().double(), frames[1].double())
    loss = make().cuda()
    for function in (loss, torch.compile(loss)):
        leaf = frames[0].cuda().requires_grad_()
        value = function(leaf, target)
        value.backward()
        np.testing.assert_allclose(value.item(), expected, rtol=1e-4)
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        np.testing.assert_allclose(function(nearly, target).item(), close, rtol=1e-2)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "vi"}, "no gradients"),
        ({"metric": "l2", "channels": "rgb"}, "channels must be one of"),
        ({"metric": "l2", "reduction": "max"}, "reduction must be one of"),
        ({"metric": "l2", "normalisation": "batch"}, "normalisation must be"),
        ({"metric": "l2", "normalisation": (1.0, 1.0)}, "lo < hi"),
        ({"metric": "l2", "normalisation": ([0.0, 0.0], [1.0, 1.0, 1.0])}, "as many"),
        ({"metric": "l2", "weights": "some.pth"}, "has no weights"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulationLoss(**settings)  # type: ignore[arg-type]


def test_metrics_on_8_bit_and_weights_beside_a_loaded_metric_are_refused(metric: lsim.Metric) -> None:
    with pytest.raises(ValueError, match="8 bit"):
        SimulationLoss(lsim.load_metric("l2", compat="published"))
    with pytest.raises(ValueError, match="already loaded"):
        SimulationLoss(metric, weights="some.pth")


@pytest.mark.parametrize(
    ("settings", "shapes", "message"),
    [
        ({}, [(2, 1, 64, 64), (2, 1, 64, 65)], "equal shape"),
        ({}, [(1, 64, 64)] * 2, "equal shape"),
        ({}, [(2, 1, 40, 64)] * 2, "cannot take frames of 40×64"),
        ({"channels": "together"}, [(2, 2, 64, 64)] * 2, "found 2"),
        ({"normalisation": ([0, 0], [1, 1])}, [(2, 3, 64, 64)] * 2, "range for 2 channels"),
    ],
)
def test_frames_that_do_not_fit_are_refused(
    make: Make, settings: dict[str, object], shapes: list[tuple[int, ...]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)(*map(torch.zeros, shapes))


def test_half_precision_weights_and_whole_numbers_are_refused(make: Make) -> None:
    frames = torch.zeros(1, 1, SIDE, SIDE)
    with pytest.raises(ValueError, match="single or double precision"):
        make().bfloat16()(frames, frames)
    with pytest.raises(ValueError, match="floating dtype"):
        make()(frames.int(), frames.int())


def test_warns_once_of_a_size_that_the_metric_was_not_made_for(make: Make) -> None:
    loss, frames = make(), torch.zeros(1, 1, SIDE, SIDE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            loss(frames, frames)
    assert [warning.category for warning in caught] == [lsim.SizeWarning]
    assert "64×64" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_loads_a_metric_by_name_with_weights_of_ones_own(
    tmp_path: Path, frames: tuple[Tensor, Tensor]
) -> None:
    path: Path = write_random_checkpoint(tmp_path / "own.pth", seed=5)
    by_name = SimulationLoss("lsim", weights=path, reduction="none")(*frames)
    loaded = SimulationLoss(lsim.load_metric("lsim", path, device="cpu"), reduction="none")(*frames)
    assert torch.equal(by_name, loaded)


@pytest.mark.parametrize("name", ["vrmse", "nrmse", "nmae"])
def test_the_target_is_the_reference_of_directed_metrics(name: str) -> None:
    """A prediction of a fifth of the target's amplitude is off by 0.8 of its spread, not by 4 of its own."""
    target = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 1, 16, 16)))
    prediction = 0.2 * target
    loss = SimulationLoss(name, normalisation=(-6.0, 6.0))(prediction, target).item()
    metric = lsim.load_metric(name, size=None)
    frames = [side[0, 0].numpy() for side in (target, prediction)]
    assert loss == pytest.approx(metric.distance(*frames, scope=(-6.0, 6.0)).item(), rel=2e-3)
