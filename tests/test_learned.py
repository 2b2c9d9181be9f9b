"""Learned metrics: the same bits however frames are batched, one channel as three, and two precisions."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional as F

import lsim
from lsim.metric import Metric
from lsim.metrics.learned import NonSiameseMetric
from lsim.networks import TRUNKS, NonSiamese
from lsim.no_tf32 import ieee_convolutions
from lsim.registry import why_unavailable
from lsim.testing import check_metric, write_random_checkpoint
from lsim.threads import batches
from lsim.training.network import PairNetwork
from lsim.weights import MissingWeightsError, WeightsError, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::lsim.SizeWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights by trunk, in files that state their trunk."""
    folder = tmp_path_factory.mktemp("weights")
    files = {}
    for name, trunk in TRUNKS.items():
        files[name] = folder / f"{name}.safetensors"
        random = write_random_checkpoint(folder / f"random-{name}.pth", trunk, size=144)
        save_checkpoint(files[name], load_checkpoint(random, trunk), name, {})
    files["non-siamese"] = folder / "non-siamese.safetensors"
    save_checkpoint(files["non-siamese"], trained_pair_network().checkpoint(), "non-siamese", {})
    return files


def trained_pair_network() -> PairNetwork:
    """As training has it, with weights by which distances spread over much of [0, 1]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = PairNetwork()
    with torch.no_grad():
        for layer in (network.network.full1, network.network.full2, network.network.full3):
            layer.weight.mul_(8)
    return network


def load(weights: dict[str, Path], trunk: str, **settings: Any) -> Metric:
    return lsim.load_metric(f"my-{trunk}", weights[trunk], device="cpu", **({"size": None} | settings))


def random_planes(rng: np.random.Generator, n: int, y: int, x: int, channels: int = 3) -> torch.Tensor:
    """(n, y, x, channel) in [0, 255]."""
    return torch.from_numpy(255 * rng.random((n, y, x, channels), dtype=np.float32))


def drifting(n: int = 11, size: int = 128) -> np.ndarray:
    """A plume that moves and grows, in equal steps: (n, y, x, 1)."""
    y, x = np.mgrid[:size, :size] / size
    steps = np.linspace(0, 1, n)
    frames = [
        np.exp(-(((x - 0.3 - 0.3 * t) / 0.1) ** 2) - ((y - 0.4) / (0.15 + 0.1 * t)) ** 2)
        + 0.1 * np.sin(40 * x + 9 * t)
        for t in steps
    ]
    return np.stack(frames)[..., None].astype(np.float32)


# --- LSiM: bits, channels, precision ----------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["exact", "ranking"])
@pytest.mark.parametrize("trunk", list(TRUNKS))
@pytest.mark.parametrize(("side", "channels"), [((48, 64), 3), ((128, 128), 1)])
def test_features_are_the_same_bits_in_batches_of_any_size(
    weights: dict[str, Path],
    rng: np.random.Generator,
    trunk: str,
    precision: str,
    side: tuple[int, int],
    channels: int,
) -> None:
    metric = load(weights, trunk, precision=precision)
    frames = random_planes(rng, 20, *side, channels)
    alone = torch.cat([metric.embed(frames[k : k + 1]).parts["features"] for k in range(len(frames))])
    assert len(alone.unique(dim=0)) == len(frames)
    for n in range(2, 21):
        assert torch.equal(metric.embed(frames[20 - n :]).parts["features"], alone[20 - n :]), n
    torch.set_num_threads(3)
    assert torch.equal(metric.embed(frames).parts["features"], alone)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_batches_cover_all_in_order_and_leave_none_alone(threads: int) -> None:
    torch.set_num_threads(threads)
    for n in range(2, 100):
        parts = batches(n, 8)
        assert [k for part in parts for k in range(n)[part]] == list(range(n))
        assert {2 <= part.stop - part.start <= 8 for part in parts} == {True}
    assert batches(1, 8) == [slice(0, 1)]


@pytest.mark.parametrize("trunk", ["lsim", "skip", "alex"])
def test_one_channel_gives_the_distances_of_three_equal_ones(
    weights: dict[str, Path], rng: np.random.Generator, trunk: str
) -> None:
    metric = load(weights, trunk)
    frames = np.concatenate([drifting(4, 96) * 255, rng.uniform(0, 255, (2, 96, 96, 1))]).astype(np.float32)
    one = metric.pairwise(frames, scope=(0, 255))
    three = metric.pairwise(np.repeat(frames, 3, axis=-1), scope=(0, 255))
    np.testing.assert_allclose(one, three, rtol=1e-6)
    assert metric.embed(torch.from_numpy(frames)).parts["features"].shape[1] == sum(
        m.numel() for m in TRUNKS[trunk]()(torch.zeros(1, 3, 96, 96))
    )


def test_contract_on_a_trunk_of_its_own(weights: dict[str, Path]) -> None:
    check_metric(load(weights, "alex", size=48))


def test_contract_in_the_precision_for_ranking(weights: dict[str, Path]) -> None:
    check_metric(load(weights, "lsim", size=48, precision="ranking"))


def test_the_precision_for_ranking_ranks_alike() -> None:
    exact = lsim.load_metric("lsim-open", device="cpu", size=None)
    ranking = lsim.load_metric("lsim-open", device="cpu", size=None, precision="ranking")
    frames = drifting()
    first, second = np.triu_indices(len(frames), 1)
    expected, found = (metric.pairwise(frames)[first, second] for metric in (exact, ranking))
    assert spearmanr(expected, found).statistic > 0.99
    assert 1e-4 < np.abs(found / expected - 1).max() < 0.1
    truth = (second - first) / len(frames)
    assert spearmanr(found, truth).statistic > 0.9


def test_precision_is_part_of_the_specification_where_it_is_not_the_exact_one() -> None:
    plain, exact, ranking = (
        lsim.load_metric("lsim-open", device="cpu", **options)  # type: ignore[arg-type]
        for options in ({}, {"precision": "exact"}, {"precision": "ranking"})
    )
    assert "options" not in plain.specification()
    assert exact.specification_hash == plain.specification_hash
    assert ranking.specification()["options"] == {"precision": "ranking"}
    assert ranking.specification_hash != plain.specification_hash
    with pytest.raises(ValueError, match="precision must be one of exact, double, ranking, got 'half'"):
        lsim.load_metric("lsim-open", device="cpu", precision="half")


def test_exact_is_exact_under_autocast(weights: dict[str, Path], rng: np.random.Generator) -> None:
    frames = random_planes(rng, 3, 64, 64)
    metric = load(weights, "lsim")
    expected = metric.embed(frames).parts["features"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(metric.embed(frames).parts["features"], expected)


BACKENDS: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.mkldnn)


def told() -> list[str]:
    """What torch is to make of convolutions in single precision, on GPUs and on CPUs."""
    return [backend.conv.fp32_precision for backend in BACKENDS]


@pytest.fixture
def _told_tf32() -> Iterator[None]:
    """As a user may have set it for a model of their own."""
    if not all(hasattr(backend, "conv") for backend in BACKENDS):
        pytest.skip("this torch has one setting of precision alone")
    before = told()
    for backend in BACKENDS:
        backend.conv.fp32_precision = "tf32"
    yield
    for backend, precision in zip(BACKENDS, before, strict=True):
        backend.conv.fp32_precision = precision


@pytest.mark.usefixtures("_told_tf32")
@pytest.mark.parametrize("trunk", ["lsim", "non-siamese"])
def test_convolutions_are_of_ieee_precision_whatever_torch_was_told(
    weights: dict[str, Path], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, trunk: str
) -> None:
    """Few processors compute otherwise, so the setting in the midst of the network is what is looked at."""
    seen = []
    convolve = F.conv2d

    def watched(planes: torch.Tensor, *rest: Any) -> torch.Tensor:
        if planes.device.type != "meta":
            seen.append(told())
        return convolve(planes, *rest)

    monkeypatch.setattr(F, "conv2d", watched)
    load(weights, trunk).pairwise(random_planes(rng, 2, 64, 64).numpy())
    assert len(seen) >= 5
    assert all(setting == ["ieee", "ieee"] for setting in seen)
    assert told() == ["tf32", "tf32"]


def test_gradients_after_distances_under_inference_mode(
    weights: dict[str, Path], rng: np.random.Generator
) -> None:
    """What is kept of the first frames of a size serves training, too."""
    metric = load(weights, "lsim")
    planes = random_planes(rng, 2, 64, 64).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = metric(planes[:1], planes[1:])
    found = metric(planes[:1].requires_grad_(), planes[1:])
    found.sum().backward()
    torch.testing.assert_close(found.detach(), expected.clone(), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("_told_tf32")
def test_precision_is_put_back_by_the_last_of_several_threads() -> None:
    entered, leave, seen = threading.Event(), threading.Event(), []

    def longer() -> None:
        with ieee_convolutions():
            entered.set()
            leave.wait(10)
            seen.append(told())

    thread = threading.Thread(target=longer)
    with ieee_convolutions():
        thread.start()
        entered.wait(10)
    seen.append(told())
    leave.set()
    thread.join()
    assert seen == [["ieee", "ieee"]] * 2
    assert told() == ["tf32", "tf32"]


# --- the non-siamese network ------------------------------------------------------------------------------


def test_contract_of_the_non_siamese_network(weights: dict[str, Path]) -> None:
    check_metric(load(weights, "non-siamese", size=48))


@pytest.mark.parametrize("name", ["my-ns", "non-siamese"])
def test_non_siamese_is_the_network_that_was_trained(
    weights: dict[str, Path], rng: np.random.Generator, name: str
) -> None:
    metric = lsim.load_metric(name, weights["non-siamese"], device="cpu", size=None)
    assert isinstance(metric, NonSiameseMetric)
    assert metric.name == name
    frames = random_planes(rng, 5, 80, 64).numpy()
    frames[3] = frames[2] + 1
    found = metric.pairwise(frames, scope=(0, 255))
    network = trained_pair_network()
    (scaled,) = network.features(torch.from_numpy(frames).permute(0, 3, 1, 2))
    i, j = np.indices((5, 5)).reshape(2, -1)
    with torch.no_grad():
        generator = torch.Generator()
        trained = network.pair_distances([scaled[i]], [scaled[j]], 0.0, generator)
        exact = network.network.double()(torch.cat([scaled[i], scaled[j]], 1).double()).reshape(5, 5)
    np.testing.assert_allclose(found, trained.reshape(5, 5), rtol=1e-5)
    np.testing.assert_allclose(found, exact, rtol=1e-5)
    # The reference comes first, and a frame is at some distance of itself.
    assert np.abs(found - found.T).max() > 1e-3
    assert (found.diagonal() > 1e-3).all()
    assert ((found >= 0) & (found <= 1)).all()


def test_non_siamese_made_symmetric_is_the_mean_of_both_ways(weights: dict[str, Path]) -> None:
    frames = drifting(3, 64)
    found = load(weights, "non-siamese").pairwise(frames)
    both = load(weights, "non-siamese", symmetrise=True)
    np.testing.assert_allclose(both.pairwise(frames), (found + found.T) / 2, rtol=1e-12)
    assert "symmetric" in both.axioms


def test_non_siamese_distances_are_the_same_bits_whatever_the_other_pairs(
    weights: dict[str, Path], rng: np.random.Generator
) -> None:
    metric = load(weights, "non-siamese")
    frames = random_planes(rng, 5, 64, 64).numpy()
    whole = metric.pairwise(frames, scope=(0, 255))
    for i, j in [(0, 1), (3, 2), (4, 4)]:
        assert metric.distance(frames[i], frames[j], scope=(0, 255))[0] == whole[i, j]
    for n in (2, 3, 4):
        assert np.array_equal(metric.pairwise(frames[:n], scope=(0, 255)), whole[:n, :n])
    assert np.array_equal(metric.from_reference(metric.prepare(frames, (0, 255))), whole[0])
    torch.set_num_threads(3)
    assert np.array_equal(metric.pairwise(frames, scope=(0, 255)), whole)


def test_non_siamese_gradients_are_those_of_the_network(
    weights: dict[str, Path], rng: np.random.Generator
) -> None:
    metric = load(weights, "non-siamese")
    a, b = random_planes(rng, 2, 64, 64).permute(0, 3, 1, 2).split(1)
    a = a.requires_grad_()
    (found,) = torch.autograd.grad(metric(a, b).sum(), a)
    network = trained_pair_network().network
    (expected,) = torch.autograd.grad(network(torch.cat([a / 127.5 - 1, b / 127.5 - 1], 1)).sum(), a)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_non_siamese_says_how_to_get_weights(weights: dict[str, Path]) -> None:
    reason = why_unavailable("non-siamese")
    assert "lsim train" in reason
    assert "trunk: non-siamese" in reason
    assert "--weights non-siamese=FILE" in reason
    with pytest.raises(MissingWeightsError, match="'lsim train' and trunk: non-siamese"):
        lsim.load_metric("non-siamese")
    assert why_unavailable("non-siamese", weights["non-siamese"]) == ""
    assert why_unavailable("my-ns", weights["non-siamese"]) == ""


def test_non_siamese_refuses_other_weights(weights: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"trunk 'lsim', expected those of 'non-siamese'"):
        lsim.load_metric("non-siamese", weights["lsim"])
    path = tmp_path / "cut.safetensors"
    checkpoint = trained_pair_network().checkpoint()
    checkpoint.trunk.pop("full3.bias")  # type: ignore[attr-defined]
    save_checkpoint(path, checkpoint, "non-siamese", {})
    with pytest.raises(WeightsError, match=r"cut\.safetensors: .* trunk\.full3\.bias missing"):
        lsim.load_metric("non-siamese", path)


def test_training_sees_the_network_as_published(rng: np.random.Generator) -> None:
    """Cut in two for the metric: the whole is still the plain sequence of layers."""
    network = NonSiamese()
    frames = torch.from_numpy(rng.standard_normal((2, 6, 64, 80)).astype(np.float32))
    keep = torch.from_numpy(rng.integers(0, 2, (2, 4608)).astype(np.float32))
    x = F.max_pool2d(network.conv1(frames).relu(), 4, 2)
    x = F.max_pool2d(network.conv2(x).relu(), 4, 2)
    x = network.conv5(network.conv4(network.conv3(x).relu()).relu()).relu()
    x = F.adaptive_avg_pool2d(x, 6).flatten(1) * keep
    expected = network.full3(network.full2(network.full1(x).relu()).relu()).sigmoid()[:, 0]
    torch.testing.assert_close(network(frames, keep), expected)
