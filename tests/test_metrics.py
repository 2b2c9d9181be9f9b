"""Every metric holds its contract, and equals its textbook formula in double precision."""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import (
    mean_squared_error,
    peak_signal_noise_ratio,
    structural_similarity,
    variation_of_information,
)
from torch import Tensor

import lsim
from lsim.metric import Embedding, Metric, MetricInfo, hash_specification
from lsim.metrics.learned import LSiM
from lsim.networks import LsimTrunk, SkipTrunk
from lsim.preprocess import Preprocessing
from lsim.testing import (
    check_axioms,
    check_consistency,
    check_features,
    check_gradients,
    check_metric,
    example_frames,
    write_random_checkpoint,
)

CLASSIC = ("l1", "l2", "psnr", "ssim", "vi")
LEARNED = ("lsim", "lsim-noiseless", "lsim-strong-noise", "lsim-skip")
COMPAT = ("default", "published")

Load = Callable[..., Metric]

quiet = pytest.mark.filterwarnings("ignore::lsim.SizeWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of random weights, by metric: what is tested on them needs no reference data."""
    folder = tmp_path_factory.mktemp("weights")
    return {
        "lsim": write_random_checkpoint(folder / "random-lsim.pth", LsimTrunk),
        "lsim-skip": write_random_checkpoint(folder / "random-skip.pth", SkipTrunk),
    }


@pytest.fixture
def load(random_weights: dict[str, Path]) -> Load:
    """``load_metric`` on the CPU, with random weights for learned metrics."""

    def load(name: str, **settings: object) -> Metric:
        return lsim.load_metric(name, random_weights.get(name), device="cpu", **settings)  # type: ignore[arg-type]

    return load


def grey_levels(rng: np.random.Generator, n: int, size: int) -> np.ndarray:
    """Frames of whole numbers that span 0…255 in every frame, so that normalising leaves them."""
    frames = rng.integers(0, 256, (n, size, size, 3)).astype(np.float32)
    frames[:, 0, 0], frames[:, -1, -1] = 0, 255
    return frames


# --- the contract -----------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize(
    ("name", "compat"),
    [*itertools.product(CLASSIC, COMPAT), ("lsim", "published"), ("lsim-skip", "published")],
)
def test_contract(load: Load, name: str, compat: str) -> None:
    check_metric(load(name, size=48, compat=compat))


@quiet
@pytest.mark.parametrize("name", [*CLASSIC, "lsim", "lsim-skip"])
def test_contract_without_resizing(load: Load, name: str) -> None:
    check_metric(load(name, size=None), frame_size=48, seed=1)


WITHOUT_WEIGHTS = [
    name for name in lsim.list_metrics() if not name.startswith(("lsim", "lpips", "non-siamese"))
]
# Of metrics that differ by a band or a quotient of the same sums, one shows how these grow with frames.
SAME_SUMS = ("frmse-low", "frmse-mid", "spectral-mse-low", "spectral-mse-mid", "mutual-information", "nmi")


@pytest.fixture(scope="module")
def large_frames() -> dict[str, np.ndarray]:
    """Three frames of a kind: as many as a triangle needs."""
    kinds = ("random", "constant", "one grey level apart in one pixel", "huge")
    made = example_frames(512)
    return {kind: made[kind][:3] for kind in kinds}


@pytest.mark.parametrize("name", [name for name in WITHOUT_WEIGHTS if name not in SAME_SUMS])
def test_axioms_on_frames_of_the_largest_size_in_use(large_frames: dict[str, np.ndarray], name: str) -> None:
    """The contract's whole run is on small frames; sums grow with them, and so could their rounding."""
    if reason := lsim.registry.why_unavailable(name):
        pytest.skip(reason)
    metric = lsim.load_metric(name, device="cpu", size=None)
    for kind, frames in large_frames.items():
        # Normalised, which is the same code for all, huge values are the random ones again.
        if kind != "huge" or name in ("l1", "l2"):
            check_axioms(metric, frames, kind)


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_every_metric_computes_in_the_published_mode(rng: np.random.Generator, name: str) -> None:
    """What the published evaluation is run with, by default with all metrics."""
    if reason := lsim.registry.why_unavailable(name):
        pytest.skip(reason)
    metric = lsim.load_metric(name, device="cpu", size=176, compat="published")
    for channels in (1, 3):
        frames = rng.integers(0, 256, (3, 64, 64, channels)).astype(np.uint8)
        row, bounds = metric.from_reference_with_rounding(metric.prepare(frames, "sequence"))
        assert np.isfinite(row[1:]).all()
        assert row[1:].any()
        assert row.shape == bounds.shape


@quiet
@pytest.mark.shared
@pytest.mark.usefixtures("published_weights")
@pytest.mark.parametrize("name", LEARNED)
def test_contract_with_published_weights(name: str) -> None:
    """What depends on the weights; the rest of the contract is of the networks, whatever their weights."""
    metric, kinds = lsim.load_metric(name, device="cpu", size=64), example_frames(64)
    for kind in ("random", "equal", "one grey level apart in one pixel"):
        check_axioms(metric, kinds[kind], kind)
        check_consistency(metric, kinds[kind], kind)
    check_gradients(metric, kinds["random"])
    check_features(metric, kinds["random"])


@pytest.mark.gpu
@quiet
@pytest.mark.parametrize("name", [*CLASSIC, "lsim", "lsim-skip"])
def test_contract_on_gpu_and_agreement_with_cpu(
    load: Load, random_weights: dict[str, Path], rng: np.random.Generator, name: str
) -> None:
    on_gpu = lsim.load_metric(name, random_weights.get(name), device="cuda", size=64)
    check_metric(on_gpu)
    frames = rng.standard_normal((5, 64, 64, 3))
    np.testing.assert_allclose(on_gpu.pairwise(frames), load(name, size=64).pairwise(frames), rtol=1e-5)


class Broken(Metric):
    """A metric that can be told to break one clause of the contract."""

    info = MetricInfo(
        title="mean difference", source="", axioms=frozenset({"non-negative", "symmetric", "zero-on-itself"})
    )

    def __init__(self, fault: str) -> None:
        super().__init__(f"broken-{fault}", Preprocessing(16), torch.device("cpu"))
        self.fault = fault

    def embed(self, frames: Tensor) -> Embedding:
        if self.fault == "depends on the batch":
            frames = frames - frames.mean() * len(frames)
        return Embedding({"x": frames.flatten(1)})

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        return torch.stack([self.paired(a[slice(k, k + 1)], b) for k in range(len(a))])

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        x, y = a.parts["x"], b.parts["x"]
        value = (x - y).double().square().mean(1)
        if self.fault == "negative":
            return -value
        if self.fault == "asymmetric":
            return value + (x - y).double().mean(1).clamp(min=0)
        if self.fault == "not zero on itself":
            return value + 1
        if self.fault == "infinite gradient":
            return value.sqrt()
        if self.fault == "depends on the batch":
            return value + x.double().mean(1).abs() + y.double().mean(1).abs()
        return value


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("negative", "non-negative"),
        ("asymmetric", "symmetric"),
        ("not zero on itself", "to itself"),
        ("infinite gradient", "gradient"),
        ("depends on the batch", "to itself|batch|pairwise"),
    ],
)
def test_contract_finds_what_is_broken(fault: str, message: str) -> None:
    with pytest.raises(AssertionError, match=f"broken-{fault}.*({message})"):
        check_metric(Broken(fault))


def test_contract_finds_nothing_where_nothing_is_broken() -> None:
    check_metric(Broken("nothing"))


def test_a_block_of_another_shape_is_refused_by_name() -> None:
    class Flat(Broken):
        def compare(self, a: Embedding, b: Embedding) -> Tensor:
            return super().compare(a, b).flatten()

    with pytest.raises(
        lsim.ClaimError, match=r"'broken-nothing': compare gave a block of shape \(9,\).*\(3, 3\)"
    ):
        Flat("nothing").pairwise(np.random.default_rng(0).random((3, 16, 16, 3)))


@pytest.mark.parametrize("name", ["l2", "ssim"])
def test_pairs_of_their_own_scope_resize_each_frame_once(
    load: Load, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    frames = rng.normal(size=(5, 40, 50, 3)) * np.arange(1, 6)[:, None, None, None]
    metric = load(name, size=32, order=1)
    expected = [[metric.distance(a, b)[0] for b in frames] for a in frames]
    resized: list[int] = []
    module = sys.modules["lsim.preprocess"]  # lsim.preprocess is a function, too
    resize = module._resize

    def counted(frames: np.ndarray, *settings: object) -> np.ndarray:
        resized.append(len(frames))
        return resize(frames, *settings)

    monkeypatch.setattr(module, "_resize", counted)
    matrix = metric.pairwise(frames, scope="pair")
    np.testing.assert_allclose(matrix[~np.eye(5, dtype=bool)], np.array(expected)[~np.eye(5, dtype=bool)])
    assert resized == [5]


def test_contract_finds_a_false_triangle_claim() -> None:
    class ClaimsTriangle(Broken):
        info = MetricInfo(title="mean squared difference", source="", axioms=frozenset({"triangle"}))

    with pytest.raises(AssertionError, match="triangle inequality"):
        check_metric(ClaimsTriangle("nothing"))


def test_contract_finds_a_false_euclidean_claim() -> None:
    class ClaimsVectors(Broken):
        info = MetricInfo(title="mean squared difference", source="", axioms=frozenset({"euclidean"}))

    with pytest.raises(AssertionError, match="no vectors have these distances"):
        check_metric(ClaimsVectors("nothing"))


# --- parity with numpy and scikit-image -------------------------------------------------------------------


def vi(a: np.ndarray, b: np.ndarray) -> float:
    left, right = (frame.astype(np.uint8).reshape(-1, 1) for frame in (a, b))
    return float(np.mean(variation_of_information(left, right)))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    return float(1 - structural_similarity(a, b, data_range=255, channel_axis=-1))


FORMULAS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "l1": lambda a, b: float(np.abs(a - b).mean() / 255),
    "l2": lambda a, b: float(mean_squared_error(a, b) / 255**2),
    "psnr": lambda a, b: float(-peak_signal_noise_ratio(a, b, data_range=255)),
    "ssim": ssim,
    "vi": vi,
}
"""On frames in [0, 255], double precision."""


def by_formula(name: str, prepared: np.ndarray, compat: str) -> np.ndarray:
    """All pairs i < j of prepared frames."""
    exact = prepared.astype(np.float64)
    if compat == "published" and name != "l1":
        exact = np.floor(exact)
    return np.array([FORMULAS[name](exact[i], exact[j]) for i, j in pairs(len(exact))])


def pairs(n: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(n) for j in range(i + 1, n)]


@pytest.mark.parametrize("compat", COMPAT)
@pytest.mark.parametrize("name", CLASSIC)
@pytest.mark.parametrize("shape", [(70, 90, 3), (64, 64, 1), (33, 51, 4)])
def test_parity_with_formula(
    load: Load, rng: np.random.Generator, name: str, compat: str, shape: tuple[int, ...]
) -> None:
    y, x = np.indices(shape[:2]) / 10
    waves = np.stack([np.sin(x + k) * np.cos(y - k / 2) for k in range(5)])[..., None]
    frames = (1e3 * waves + rng.normal(0, 50, (5, *shape))).astype(np.float32)
    metric = load(name, size=64, order=1, compat=compat)
    prepared = lsim.preprocess(frames, size=64, order=1, compat=compat)  # type: ignore[arg-type]
    expected = by_formula(name, prepared, compat)
    found = [metric.pairwise(frames)[pair] for pair in pairs(5)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("compat", COMPAT)
@pytest.mark.parametrize("name", CLASSIC)
def test_distance_is_joint_over_batch(load: Load, rng: np.random.Generator, name: str, compat: str) -> None:
    """``distance`` of the published mode does not resize the classic metrics, the default mode does."""
    a, b = rng.normal(size=(2, 3, 40, 50, 3))
    size = None if compat == "published" and name != "l1" else 32
    prepared = lsim.preprocess(np.concatenate([a, b]), size, scope="batch", compat=compat)  # type: ignore[arg-type]
    if compat == "published" and name != "l1":
        prepared = np.floor(prepared)
    expected = [
        FORMULAS[name](x.astype(np.float64), y.astype(np.float64))
        for x, y in zip(prepared[:3], prepared[3:], strict=True)
    ]
    np.testing.assert_allclose(load(name, size=32, compat=compat).distance(a, b), expected, rtol=1e-6)


@pytest.mark.parametrize("compat", COMPAT)
@pytest.mark.parametrize("name", CLASSIC)
def test_near_duplicates_are_exact(load: Load, rng: np.random.Generator, name: str, compat: str) -> None:
    """From one pixel by one grey level upward; the expansion |x|² + |y|² − 2xy has no digit left here."""
    base = grey_levels(rng, 1, 64)[0]
    base[20:30, 20:30] = 100
    frames = np.stack([base] * 4)
    frames[1, 25, 25, 0] += 1
    frames[2, 25, 25, 0] += 1
    frames[2, 21, 28, 2] -= 1
    frames[3, 20:30, 20:30] += 3
    matrix = load(name, size=None, compat=compat).pairwise(frames)
    np.testing.assert_allclose(
        [matrix[pair] for pair in pairs(4)], by_formula(name, frames, compat), rtol=1e-6
    )


@pytest.mark.parametrize("name", ["l1", "l2", "psnr"])
def test_near_duplicates_far_below_one_grey_level(load: Load, rng: np.random.Generator, name: str) -> None:
    """Default mode keeps floating point: a relative difference of 1e-5 in one value is measured."""
    frames = grey_levels(rng, 2, 64)
    frames[1] = frames[0]
    frames[:, 30, 30, 1] = [100, 100.001]
    found = load(name, size=None).pairwise(frames)[0, 1]
    np.testing.assert_allclose(found, by_formula(name, frames, "default")[0], rtol=2e-6)


def lsim_in_double(metric: Metric, prepared: np.ndarray) -> np.ndarray:
    """The formula of the paper with every feature in double precision: all pairs i < j."""
    assert isinstance(metric, LSiM)
    trunk = metric.trunk_class().double()
    trunk.load_state_dict(metric.trunk.state_dict())
    with torch.no_grad():
        maps = trunk(torch.from_numpy(prepared).double().permute(0, 3, 1, 2))
    squared = np.zeros(len(pairs(len(prepared))))
    parts = zip(maps, metric._weights, metric._squares, metric._counts, strict=True)
    for features, weight, squares, count in parts:
        deviation = torch.nn.functional.interpolate(
            squares[None, None].double(), features.shape[2:], mode="bilinear", align_corners=True
        )
        normal = features / ((deviation / (count - 1)).sqrt() + 1e-10) / (features.shape[1] ** 0.5 - 1)
        for p, (i, j) in enumerate(pairs(len(prepared))):
            weighted = weight.double()[:, None, None] * (normal[i] - normal[j]) ** 2
            squared[p] += weighted.sum(0).mean().item()
    return np.sqrt(squared)


@quiet
@pytest.mark.parametrize("name", ["lsim", "lsim-skip"])
@pytest.mark.parametrize("size", [64, 224])
def test_lsim_parity_with_formula(load: Load, rng: np.random.Generator, name: str, size: int) -> None:
    frames = grey_levels(rng, 4, size)
    frames[3] = frames[0]
    frames[3, size // 2, size // 2, 0] += 1 if frames[0, size // 2, size // 2, 0] < 255 else -1
    metric = load(name, size=None)
    expected = lsim_in_double(metric, frames)
    found = np.array([metric.pairwise(frames)[pair] for pair in pairs(4)])
    apart = expected > expected.max() / 100
    assert apart.sum() == 5
    np.testing.assert_allclose(found[apart], expected[apart], rtol=5e-6)
    # One grey level in one pixel: single-precision features, not their comparison, set the limit.
    np.testing.assert_allclose(found[~apart], expected[~apart], rtol=1e-3)


# --- what must not change the values ----------------------------------------------------------------------


def at_threads(metric: Metric, frames: np.ndarray) -> list[np.ndarray]:
    """Distances with 1, 2, 3 and 4 threads."""
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(metric.pairwise(frames))
    return results


@quiet
@pytest.mark.parametrize("name", [*CLASSIC, "lsim", "lsim-skip"])
def test_values_do_not_depend_on_threads(load: Load, rng: np.random.Generator, name: str) -> None:
    one, *more = at_threads(load(name, size=128), rng.normal(size=(5, 150, 150, 3)))
    for result in more:
        assert np.array_equal(result, one)


@quiet
@pytest.mark.parametrize("name", [*CLASSIC, "lsim", "lsim-skip"])
def test_values_do_not_depend_on_the_other_frames(load: Load, rng: np.random.Generator, name: str) -> None:
    """Bit for bit, for a fixed range: blocks of any size may be computed on any worker."""
    frames = rng.uniform(size=(6, 64, 64, 3))
    metric = load(name, size=64)
    whole = metric.pairwise(frames, scope=(0, 1))
    assert np.array_equal(whole[1:4, 1:4], metric.pairwise(frames[1:4], scope=(0, 1)))


@pytest.mark.parametrize("name", CLASSIC)
def test_nan_frame_spoils_only_its_pairs(load: Load, rng: np.random.Generator, name: str) -> None:
    """Also where the resize steps over the missing pixel, at order 0."""
    frames = rng.normal(size=(4, 64, 64, 3)).astype(np.float32)
    clean = load(name, size=16).pairwise(frames[[0, 1, 3]])
    for pixel in [(0, 0), (1, 1), (31, 17)]:
        spoilt = frames.copy()
        spoilt[2, *pixel, 1] = np.nan
        matrix = load(name, size=16).pairwise(spoilt)
        assert np.isnan(matrix[2]).all()
        assert np.isnan(matrix[:, 2]).all()
        assert np.array_equal(matrix[np.ix_([0, 1, 3], [0, 1, 3])], clean)


def test_8bit_truncation_follows_rounding_to_single_precision_as_published(load: Load) -> None:
    """The published code makes a float tensor before it makes 8-bit values: 99.999999999 is 100."""
    frames = np.zeros((2, 8, 8, 3))
    frames[:, 0] = 255
    frames[0, 1], frames[1, 1] = 100, 100 - 1e-9
    assert load("l2", size=None, compat="published").distance(frames[0], frames[1]) == 0
    frames[1, 1] = 100 - 1e-3
    found = load("l2", size=None, compat="published").distance(frames[0], frames[1])
    assert found == pytest.approx(1 / 8 / 255**2, rel=1e-12)


def test_embedding_with_gradients_compares_without(load: Load, rng: np.random.Generator) -> None:
    metric = load("l2", size=None)
    embedding = metric.embed(torch.from_numpy(grey_levels(rng, 3, 16)).requires_grad_())
    with torch.no_grad():
        block = metric.compare(embedding, embedding)
    assert block.shape == (3, 3)


# --- metadata ---------------------------------------------------------------------------------------------


def test_psnr_of_identical_frames_is_minus_infinity(load: Load, rng: np.random.Generator) -> None:
    frame = rng.normal(size=(32, 32, 3))
    metric = load("psnr", size=None)
    assert metric.distance(frame, frame)[0] == -np.inf
    assert (metric.pairwise(np.stack([frame, frame])) == -np.inf).all()


@pytest.mark.parametrize("compat", COMPAT)
def test_specification_tells_apart_what_gives_other_values(
    random_weights: dict[str, Path], tmp_path: Path, compat: str
) -> None:
    other = write_random_checkpoint(tmp_path / "other.pth", seed=1)
    specifications = [
        lsim.load_metric("lsim", random_weights["lsim"], compat=compat).specification(),  # type: ignore[arg-type]
        lsim.load_metric("lsim", other, compat=compat).specification(),  # type: ignore[arg-type]
        lsim.load_metric("lsim", other, compat=compat, order=1).specification(),  # type: ignore[arg-type]
        lsim.load_metric("lsim", other, compat=compat, size=128).specification(),  # type: ignore[arg-type]
        lsim.load_metric("l2", compat=compat).specification(),  # type: ignore[arg-type]
    ]
    assert len({repr(s) for s in specifications}) == len(specifications)


def test_a_recorded_specification_has_the_hash_of_its_metric() -> None:
    metric = lsim.load_metric("ssim", size=64)
    recorded = json.loads(json.dumps(metric.specification()))
    assert hash_specification(dict(reversed(recorded.items()))) == metric.specification_hash
    # Stores are made of it: another hash would make every distance anew.
    assert hash_specification({"metric": "l2", "quantised": False}) == "7923f3d430183c1d207ade26c70dd3c9"


# --- errors and warnings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 5])
def test_wrong_channels_say_how(load: Load, channels: int) -> None:
    frames = np.zeros((3, 16, 16, channels))
    with pytest.raises(ValueError, match=rf"{channels} channels.*separate fields: frames\[\.\.\., \[i\]\]"):
        load("l2", size=None).pairwise(frames)
    with pytest.raises(ValueError, match=rf"{channels} channels"):
        load("l2", size=None).distance(frames[0], frames[1])


@pytest.mark.parametrize(
    ("name", "smallest"), [("ssim", 7), ("lsim", 44), ("lsim-skip", 48), ("l1", 1), ("vi", 1)]
)
def test_smallest_size_works_and_is_named_below(load: Load, name: str, smallest: int) -> None:
    metric = load(name, size=None)
    frames = np.random.default_rng(0).random((2, smallest, smallest, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lsim.SizeWarning)
        assert np.isfinite(metric.pairwise(frames)).all()
    if smallest == 1:
        return
    for too_small in (frames[:, 1:], frames[:, :, 1:]):
        with pytest.raises(ValueError, match=f"'{name}'.*smallest that works is {smallest}×{smallest}"):
            metric.pairwise(too_small)
        with pytest.raises(ValueError, match=f"smallest that works is {smallest}×{smallest}"):
            metric(torch.zeros(1, 3, *too_small.shape[1:3]), torch.zeros(1, 3, *too_small.shape[1:3]))
    if name != "ssim":
        with pytest.raises(ValueError, match=f"smallest that works is {smallest}×{smallest}"):
            load(name, size=smallest - 1)


@quiet
@pytest.mark.parametrize("name", ["lsim", "lsim-skip"])
def test_network_agrees_on_which_sizes_it_takes(load: Load, name: str) -> None:
    metric = load(name, size=None)
    assert isinstance(metric, LSiM)
    for length in range(36, 120):
        planes = torch.zeros(1, 3, length, length, device="meta")
        trunk = metric.trunk_class().to("meta")
        try:
            trunk(planes)
            works = True
        except RuntimeError:
            works = False
        assert metric.trunk_class.takes(length) == works, length


def test_skip_names_a_size_that_works(load: Load) -> None:
    with pytest.raises(ValueError, match=r"100×100.*pass size=96"):
        load("lsim-skip", size=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lsim.SizeWarning)
        load("lsim-skip", size=96)


def test_ambiguous_three_dimensional_stack(load: Load) -> None:
    with pytest.raises(ValueError, match=r"\(16, 16, 3\) is ambiguous.*array\[None\].*array\[\.\.\., None\]"):
        load("l2", size=None).pairwise(np.zeros((16, 16, 3)))


def test_shapes_that_differ(load: Load) -> None:
    with pytest.raises(ValueError, match=r"differ in shape: \(16, 16, 3\) and \(16, 17, 3\)"):
        load("l2", size=None).distance(np.zeros((16, 16, 3)), np.zeros((16, 17, 3)))
    with pytest.raises(ValueError, match=r"equal shape.*\(1, 3, 16, 16\) and \(2, 3, 16, 16\)"):
        load("l2", size=None)(torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match="1 or 3 channels on axis 1, found 16"):
        load("l2", size=None)(torch.zeros(1, 16, 16, 3), torch.zeros(1, 16, 16, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compat": "publshed"}, "compat must be 'default' or 'published', got 'publshed'"),
        ({"size": 0}, "size must be a positive integer or None, got 0"),
        ({"size": 2.5}, "size must be"),
        ({"order": 6}, "order must be one of"),
    ],
)
def test_unknown_settings(load: Load, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("l2", **settings)


def test_complex_and_text_are_refused(load: Load) -> None:
    for array in (np.zeros((2, 8, 8, 1), complex), np.full((2, 8, 8, 1), "a")):
        with pytest.raises(ValueError, match="integer or floating"):
            load("l2", size=None).pairwise(array)


@pytest.mark.parametrize("size", [None, 224])
def test_size_warning_once_per_metric(load: Load, rng: np.random.Generator, size: int | None) -> None:
    frames = rng.random((2, 64, 64, 3))
    for metric in (load("lsim", size=size), load("lsim", size=size)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            metric.pairwise(frames)
            metric.pairwise(frames)
            metric.distance(frames[0], frames[1])
        assert [w.category for w in caught] == [lsim.SizeWarning]
        assert "64×64" in str(caught[0].message)
        assert "128 to 512" in str(caught[0].message)


def test_no_size_warning_within_advised_sizes(load: Load, rng: np.random.Generator) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("lsim").pairwise(rng.random((2, 128, 512, 3)))
        load("l2").pairwise(rng.random((2, 16, 16, 3)))
