"""LPIPS equals the published one, and a plain formula in double precision on torchvision's layers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

import lsim
from lsim import weights
from lsim.metric import Metric
from lsim.metrics.perceptual import LPIPS
from lsim.testing import check_axioms, check_consistency, check_gradients, check_metric, example_frames
from lsim.weights import PUBLISHED

NAMES = ("lpips-alex", "lpips-vgg", "lpips-squeeze")
SMALLEST = {"lpips-alex": 31, "lpips-vgg": 16, "lpips-squeeze": 17}

Load = Callable[..., LPIPS]


class Fire(nn.Module):
    """As in torchvision."""

    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, kernel_size=1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, kernel_size=1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)


def torchvision_features(name: str) -> nn.Sequential:
    """``features`` of torchvision's network: its layers and their numbers."""
    layers: list[nn.Module] = []
    if name == "lpips-alex":
        layers = [nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
        layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
        for channels, wanted in [(192, 384), (384, 256), (256, 256)]:
            layers += [nn.Conv2d(channels, wanted, 3, padding=1), nn.ReLU()]
    elif name == "lpips-vgg":
        channels = 3
        for wanted in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
            if wanted:
                layers += [nn.Conv2d(channels, wanted, 3, padding=1), nn.ReLU()]
            else:
                layers.append(nn.MaxPool2d(2, 2))
            channels = wanted or channels
    else:
        layers = [nn.Conv2d(3, 64, 3, stride=2), nn.ReLU()]
        for fires in ([(64, 16, 64), (128, 16, 64)], [(128, 32, 128), (256, 32, 128)]):
            layers += [nn.MaxPool2d(3, 2, ceil_mode=True), *(Fire(*fire) for fire in fires)]
        layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
        layers += [Fire(*fire) for fire in [(256, 48, 192), (384, 48, 192), (384, 64, 256), (512, 64, 256)]]
    return nn.Sequential(*layers)


AFTER = {
    "lpips-alex": (1, 4, 7, 9, 11),
    "lpips-vgg": (3, 8, 15, 22, 29),
    "lpips-squeeze": (1, 4, 7, 9, 10, 11, 12),
}
"""Numbers of the layers whose output LPIPS compares."""


def write_random_weights(folder: Path, name: str) -> None:
    """``<name>.pth`` with torchvision's names and more, and a head under its published name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = torchvision_features(name)
        for module in features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        state = {f"features.{key}": value for key, value in features.state_dict().items()}
        torch.save(state | {"classifier.1.weight": torch.ones(3, 2)}, folder / f"{name}.pth")
        channels = [sizes[1] for sizes in _map_sizes(features, name)]
        head = {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1) for k, c in enumerate(channels)}
        torch.save(head, folder / PUBLISHED[name].file)


def _map_sizes(features: nn.Sequential, name: str) -> list[torch.Size]:
    x, sizes = torch.zeros(1, 3, 64, 64), []
    for k, layer in enumerate(features):
        x = layer(x)
        if k in AFTER[name]:
            sizes.append(x.shape)
    return sizes


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("perceptual")
    for name in NAMES:
        write_random_weights(folder, name)
    return folder


@pytest.fixture
def load(random_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """``load_metric`` on the CPU with random weights, whose heads are those published."""
    monkeypatch.setenv("LSIM_WEIGHTS", "")
    monkeypatch.setattr(weights, "cache_folder", lambda: random_weights / "nothing")
    for name in NAMES:
        sha256 = hashlib.sha256((random_weights / PUBLISHED[name].file).read_bytes()).hexdigest()
        monkeypatch.setitem(PUBLISHED, name, replace(PUBLISHED[name], sha256=sha256))

    def load(name: str, **settings: object) -> LPIPS:
        metric = lsim.load_metric(
            name,
            random_weights / f"{name}.pth",
            **{"device": "cpu", **settings},  # type: ignore[arg-type]
        )
        assert isinstance(metric, LPIPS)
        return metric

    return load


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def in_double(name: str, folder: Path, frames: np.ndarray, compat: str) -> np.ndarray:
    """LPIPS as its authors define it, all pairs of frames (n, y, x, 3) in [0, 255], in double precision."""
    features = torchvision_features(name).double()
    state = torch.load(folder / f"{name}.pth", weights_only=True)
    features.load_state_dict({k.removeprefix("features."): v for k, v in state.items() if "features" in k})
    head = torch.load(folder / PUBLISHED[name].file, weights_only=True)
    x = torch.from_numpy(frames).double().permute(0, 3, 1, 2)
    if compat == "default":
        x = x / 127.5 - 1
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = (x - shift[:, None, None]) / scale[:, None, None]
    distances = torch.zeros(len(x), len(x), dtype=torch.float64)
    tapped = 0
    with torch.no_grad():
        for k, layer in enumerate(features):
            x = layer(x)
            if k in AFTER[name]:
                unit = x / ((x**2).sum(1, keepdim=True).sqrt() + 1e-10)
                difference = (unit[:, None] - unit[None]) ** 2
                weight = head[f"lin{tapped}.model.1.weight"].double()
                distances += (difference * weight).sum(2).mean((2, 3))
                tapped += 1
    assert tapped == len(head)
    return distances.numpy()


def grey_levels(rng: np.random.Generator, n: int, y: int, x: int) -> np.ndarray:
    """Frames of whole numbers that span 0…255, so that normalising leaves them."""
    frames = rng.integers(0, 256, (n, y, x, 3)).astype(np.float32)
    frames[:, 0, 0], frames[:, -1, -1] = 0, 255
    return frames


# --- parity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", ["default", "published"])
@pytest.mark.parametrize("name", NAMES)
def test_parity_with_formula(
    load: Load, random_weights: Path, rng: np.random.Generator, name: str, compat: str
) -> None:
    frames = grey_levels(rng, 4, 50, 41)
    frames[2] = frames[1]
    frames[2, 10:20, 10:20] = 100
    frames[3] = frames[0]
    frames[3, 25, 20, 0] += 1 if frames[0, 25, 20, 0] < 255 else -1
    expected = in_double(name, random_weights, frames, compat)
    found = load(name, size=None, compat=compat).pairwise(frames)
    close = np.zeros((4, 4), bool)
    close[0, 3] = close[3, 0] = True
    np.testing.assert_allclose(found[~close], expected[~close], rtol=5e-6, atol=1e-15)
    # One grey level in one pixel: single-precision features, not their comparison, set the limit.
    np.testing.assert_allclose(found[close], expected[close], rtol=5e-3)


@pytest.fixture
def published_alex(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """AlexNet's convolutions; the published head lies beside them."""
    monkeypatch.delenv("LSIM_WEIGHTS", raising=False)
    return shared / "reference" / "lpips" / "alexnet_features.safetensors"


@pytest.mark.shared
def test_parity_with_the_published_package(shared: Path, published_alex: Path) -> None:
    metric = lsim.load_metric("lpips-alex", published_alex, "cpu", size=None)
    with np.load(shared / "reference" / "golden" / "plume.npz") as golden:
        np.testing.assert_allclose(plume_distances(shared, metric), golden["LPIPS_alex_pm1"], rtol=1e-6)


def plume_distances(shared: Path, metric: Metric) -> list[float]:
    """Of the reference plume from A and B, as they are."""
    planes = []
    for which in ("Reference", "A", "B"):
        with Image.open(shared / "reference" / "images" / f"plume{which}.png") as image:
            planes.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float())
    return [metric(planes[0], other).item() for other in planes[1:]]


@pytest.mark.shared
@pytest.mark.parametrize("sequence", ["vec256", "scal256", "nonsq", "vec224"])
def test_parity_with_the_published_evaluation(shared: Path, published_alex: Path, sequence: str) -> None:
    metric = lsim.load_metric("lpips-alex", published_alex, "cpu", compat="published")
    golden = shared / "reference" / "golden"
    with np.load(golden / "sequences.npz") as frames, np.load(golden / "distances.npz") as distances:
        found = metric.pairwise(frames[sequence])[np.triu_indices(11, 1)]
        np.testing.assert_allclose(found, distances[f"{sequence}/LPIPS"], rtol=1e-5)


@pytest.mark.shared
def test_parity_of_vgg_with_the_published_package(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.environ.get("LSIM_VGG16")
    if not folder:
        pytest.skip("no convolutions of VGG16: set LSIM_VGG16 to a folder with vgg16_features.safetensors")
    monkeypatch.setenv("LSIM_WEIGHTS", str(shared / "reference" / "lpips"))
    metric = lsim.load_metric("lpips-vgg", Path(folder) / "vgg16_features.safetensors", "cpu", size=None)
    np.testing.assert_allclose(plume_distances(shared, metric), [0.297184, 0.320509], atol=5e-7)


# --- the contract -----------------------------------------------------------------------------------------


def test_contract(load: Load) -> None:
    check_metric(load("lpips-alex", size=32))


def test_contract_of_vgg(load: Load) -> None:
    """On random frames alone: it is slow."""
    metric, frames = load("lpips-vgg", size=20), example_frames(20)["random"]
    check_axioms(metric, frames)
    check_consistency(metric, frames)
    check_gradients(metric, frames)


def test_contract_of_another_network_in_the_published_mode(load: Load) -> None:
    check_metric(load("lpips-squeeze", size=None, compat="published"), frame_size=40, seed=1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_contract_on_gpu_and_agreement_with_cpu(load: Load, rng: np.random.Generator, name: str) -> None:
    on_gpu = load(name, size=64, device="cuda")
    check_metric(on_gpu)
    frames = rng.standard_normal((5, 64, 64, 3))
    np.testing.assert_allclose(on_gpu.pairwise(frames), load(name, size=64).pairwise(frames), rtol=1e-5)


@pytest.mark.parametrize("precision", ["exact", "ranking"])
@pytest.mark.parametrize("name", NAMES)
def test_values_do_not_depend_on_threads_or_other_frames(
    load: Load, rng: np.random.Generator, name: str, precision: str
) -> None:
    """Bit for bit."""
    metric = load(name, size=48, precision=precision)
    frames = rng.uniform(size=(5, 48, 48, 3))
    alone = metric.pairwise(frames, scope=(0, 1))
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert np.array_equal(metric.pairwise(frames, scope=(0, 1)), alone)
    assert np.array_equal(metric.pairwise(frames[1:4], scope=(0, 1)), alone[1:4, 1:4])


@pytest.mark.parametrize("name", NAMES)
def test_one_channel_stands_for_three(load: Load, rng: np.random.Generator, name: str) -> None:
    frames = rng.normal(size=(3, 40, 40, 1))
    metric = load(name, size=None)
    assert np.array_equal(metric.pairwise(frames), metric.pairwise(np.repeat(frames, 3, axis=-1)))


def test_gradients_are_finite_where_all_features_are_zero(load: Load, rng: np.random.Generator) -> None:
    metric = load("lpips-alex", size=None)
    with torch.no_grad():
        metric.trunk.get_submodule("conv3").bias.fill_(-1e9)  # type: ignore[operator, union-attr]
    planes = torch.from_numpy(grey_levels(rng, 2, 40, 40)).permute(0, 3, 1, 2).requires_grad_()
    distance = metric(planes[:1], planes[1:])
    (gradient,) = torch.autograd.grad(distance.sum(), planes)
    assert torch.isfinite(distance).all()
    assert torch.isfinite(gradient).all()
    assert (gradient != 0).any()


def test_ranking_precision_orders_as_the_exact_one(load: Load, rng: np.random.Generator) -> None:
    noise = rng.normal(size=(64, 64, 3))
    y = np.linspace(0, 6, 64)[:, None, None]
    frames = np.stack([np.sin(y + 0.2 * k) + 0.1 * noise for k in range(6)])
    exact = load("lpips-alex", size=None).pairwise(frames)
    ranking = load("lpips-alex", size=None, precision="ranking").pairwise(frames)
    np.testing.assert_allclose(ranking, exact, rtol=0.05)
    assert not np.allclose(ranking, exact, rtol=1e-6)
    assert (np.argsort(ranking[0]) == np.argsort(exact[0])).all()


# --- sizes, options, what it says of itself ---------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_smallest_size_works_and_is_named_below(load: Load, name: str) -> None:
    smallest = SMALLEST[name]
    metric = load(name, size=None)
    frames = np.random.default_rng(0).random((2, smallest, smallest, 3))
    assert metric.pairwise(frames)[0, 1] > 0
    for too_small in (frames[:, 1:], frames[:, :, 1:]):
        with pytest.raises(lsim.FramesError, match=f"'{name}'.*smallest that works is {smallest}×{smallest}"):
            metric.pairwise(too_small)
    with pytest.raises(lsim.FramesError, match=f"smallest that works is {smallest}×{smallest}"):
        load(name, size=smallest - 1)
    with torch.device("meta"):
        trunk = metric.trunk_class()
        for length in range(10, 40):
            try:
                trunk(torch.empty(1, 3, length, length))
            except RuntimeError:
                assert length < smallest
            else:
                assert length >= smallest
            assert metric.trunk_class.takes(length) == (length >= smallest)


def test_options_are_checked_and_specified(load: Load) -> None:
    with pytest.raises(ValueError, match="precision must be one of exact, double, ranking, got 'low'"):
        load("lpips-alex", precision="low")
    exact, ranking = load("lpips-alex"), load("lpips-alex", precision="ranking")
    assert exact.specification_hash != ranking.specification_hash


def test_specification_names_both_files(load: Load, random_weights: Path) -> None:
    found = load("lpips-squeeze").specification()["weights_sha256"]
    expected = {
        "head": hashlib.sha256((random_weights / "squeeze.pth").read_bytes()).hexdigest(),
        "backbone": hashlib.sha256((random_weights / "lpips-squeeze.pth").read_bytes()).hexdigest(),
    }
    assert found == expected


# --- weights ----------------------------------------------------------------------------------------------


def test_backbone_as_safetensors_gives_the_same(
    load: Load,
    random_weights: Path,
    rng: np.random.Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frames = rng.normal(size=(3, 40, 40, 3))
    expected = load("lpips-squeeze", size=None).pairwise(frames)
    state = torch.load(random_weights / "lpips-squeeze.pth", weights_only=True)
    file = tmp_path / "features.safetensors"
    safetensors.torch.save_file({k: v for k, v in state.items() if "features" in k}, file)
    with pytest.raises(lsim.WeightsError, match=r"searched squeeze\.pth.*lsim weights fetch lpips-squeeze'"):
        lsim.load_metric("lpips-squeeze", file, "cpu")
    monkeypatch.setenv("LSIM_WEIGHTS", str(random_weights))
    metric = lsim.load_metric("lpips-squeeze", file, "cpu", size=None)
    assert np.array_equal(metric.pairwise(frames), expected)


@pytest.mark.usefixtures("load")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"features.0.weight": torch.ones(64, 3, 3, 3)},
            r"'features\.0\.weight' has shape .* \(64, 3, 11, 11\)",
        ),
        ({"x": torch.ones(2)}, r"no tensor 'features\.0\.weight'; found x"),
        (torch.ones(2), "expected tensors by name, found Tensor"),
    ],
)
def test_other_networks_are_refused(
    random_weights: Path, tmp_path: Path, content: object, message: str
) -> None:
    (tmp_path / "alex.pth").write_bytes((random_weights / "alex.pth").read_bytes())
    torch.save(content, tmp_path / "mine.pth")
    with pytest.raises(lsim.WeightsError, match=rf"mine\.pth: .*{message}"):
        lsim.load_metric("lpips-alex", tmp_path / "mine.pth")


@pytest.mark.usefixtures("load")
def test_a_network_under_its_published_name_is_checked(
    random_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / PUBLISHED["squeezenet1_1"].file
    file.write_bytes((random_weights / "lpips-squeeze.pth").read_bytes())
    monkeypatch.setenv("LSIM_WEIGHTS", os.pathsep.join([str(tmp_path), str(random_weights)]))
    with pytest.raises(lsim.WeightsError, match=rf"{file.name}: SHA-256 is .*{file.name}"):
        lsim.load_metric("lpips-squeeze")


@pytest.mark.usefixtures("load")
def test_negative_channel_weights_are_refused(
    random_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = torch.load(random_weights / "alex.pth", weights_only=True)
    head["lin3.model.1.weight"][0, 5] = -0.25
    torch.save(head, tmp_path / "alex.pth")
    sha256 = hashlib.sha256((tmp_path / "alex.pth").read_bytes()).hexdigest()
    monkeypatch.setitem(PUBLISHED, "lpips-alex", replace(PUBLISHED["lpips-alex"], sha256=sha256))
    monkeypatch.setenv("LSIM_WEIGHTS", str(tmp_path))
    with pytest.raises(lsim.WeightsError, match=r"alex\.pth: negative channel weights, down to -0\.25"):
        lsim.load_metric("lpips-alex", random_weights / "lpips-alex.pth")


@pytest.mark.parametrize("name", ["lpips-alex", "lpips-squeeze"])
@pytest.mark.parametrize("apart", [1.0, 1e-4, 1e-8])
def test_single_precision_is_within_its_bounds_of_double(load: Load, name: str, apart: float) -> None:
    rng = np.random.default_rng(0)
    frames = (rng.random((64, 64)) + apart * rng.standard_normal((3, 64, 64)))[..., None]
    single, double = load(name, size=None), load(name, size=None, precision="double")
    found, bounds = single.all_pairs_with_rounding(single.prepare(frames, "sequence"))
    exact = double.pairwise(frames)
    assert (np.abs(found - exact) <= bounds).all()
    assert bounds.max() < 1e-3 * max(exact.max(), 1e-6)
