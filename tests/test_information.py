"""Entropies of joint histograms: right to the last pixel, the same bits on every way to them."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from skimage.metrics import normalized_mutual_information, variation_of_information

import lsim
from lsim.metrics import information
from lsim.testing import check_metric

NAMES = ("vi", "mutual-information", "nmi")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def load(name: str, size: int | None = None) -> lsim.Metric:
    return lsim.load_metric(name, device="cpu", size=size)


def fields(rng: np.random.Generator, n: int, y: int, x: int) -> np.ndarray:
    """Smooth fields with some noise, in whole numbers; each frame spans 0 … 255."""
    rows, columns = np.meshgrid(np.linspace(0, 1, y), np.linspace(0, 1, x), indexing="ij")
    waves = np.stack([np.sin(7 * (rows + 2 * columns + k / 20)) for k in range(n)])[..., None]
    frames = np.clip(np.rint(120 + 90 * waves + 5 * rng.standard_normal((n, y, x, 3))), 1, 254)
    frames[:, 0, 0], frames[:, -1, -1] = 0, 255
    return frames.astype(np.float32)


def by_formula(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """From entropies of NumPy's histograms by SciPy, in bits."""
    joint, _, _ = np.histogram2d(a.ravel(), b.ravel(), bins=256, range=((0, 256), (0, 256)))
    x, y, both = entropy(joint.sum(1), base=2), entropy(joint.sum(0), base=2), entropy(joint.ravel(), base=2)
    information = x + y - both
    return {
        "vi": both - (x + y) / 2,
        "mutual-information": max(x, y) - information,
        "nmi": 2 - (x + y) / both,
    }


@functools.cache
def count_log(count: int) -> Decimal:
    """c log₂ c to forty digits."""
    with localcontext() as context:
        context.prec = 40
        return count * Decimal(count).ln() / Decimal(2).ln() if count else Decimal(0)


def exactly(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """From whole numbers and forty digits."""
    with localcontext() as context:
        context.prec = 40
        total = count_log(a.size)
        left, right = a.astype(int).ravel().tolist(), b.astype(int).ravel().tolist()
        x, y, both = (
            total - sum(map(count_log, Counter(cells).values()), Decimal(0))
            for cells in (left, right, zip(left, right, strict=True))
        )
        return {
            "vi": float((both - (x + y) / 2) / a.size),
            "mutual-information": float((both - min(x, y)) / a.size),
            "nmi": float((2 * both - x - y) / both) if both else 0.0,
        }


@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str) -> None:
    check_metric(load(name, size=64))
    check_metric(load(name), frame_size=17, seed=3)


@pytest.mark.parametrize(("y", "x"), [(128, 128), (224, 224), (512, 512), (90, 250)])
def test_parity_with_scikit_image_and_scipy(rng: np.random.Generator, y: int, x: int) -> None:
    a, b = fields(rng, 2, y, x)
    labels = [frame.astype(np.uint8).reshape(-1, 1) for frame in (a, b)]
    expected = {
        **by_formula(a, b),
        "vi": np.mean(variation_of_information(*labels)),
        "nmi": 2 - normalized_mutual_information(a, b, bins=256),
    }
    for name in NAMES:
        np.testing.assert_allclose(load(name).distance(a, b), expected[name], rtol=1e-9, err_msg=name)


def test_parity_after_resizing_and_truncation(rng: np.random.Generator) -> None:
    frames = rng.normal(size=(3, 70, 90, 3)).cumsum(axis=1)
    prepared = np.floor(lsim.preprocess(frames, 64, order=1).astype(np.float64))
    for name in NAMES:
        matrix = lsim.load_metric(name, device="cpu", size=64, order=1).pairwise(frames)
        for i, j in itertools.combinations(range(3), 2):
            expected = by_formula(prepared[i], prepared[j])[name]
            assert matrix[i, j] == pytest.approx(expected, rel=1e-9), name


def nearly_equal(rng: np.random.Generator, kind: str) -> np.ndarray:
    """A frame, and the same with one grey level in one pixel; ``kind`` is what is in the other pixels."""
    base = {
        "noise": lambda: rng.integers(0, 256, (224, 224, 3)).astype(np.float32),
        "waves": lambda: fields(rng, 1, 224, 224)[0],
        "nothing": lambda: np.zeros((224, 224, 3), np.float32),
    }[kind]()
    base[0, 0], base[-1, -1] = 0, 255
    base[100, 100, 1] = min(base[100, 100, 1], 254)
    other = base.copy()
    other[100, 100, 1] += 1
    return np.stack([base, other])


@pytest.mark.parametrize("kind", ["noise", "waves", "nothing"])
def test_one_grey_level_in_one_pixel_is_exact(rng: np.random.Generator, kind: str) -> None:
    a, b = nearly_equal(rng, kind)
    expected = exactly(a, b)
    for name in NAMES:
        assert 0 < expected[name] < 1e-3 or kind == "nothing"
        assert load(name).distance(a, b)[0] == pytest.approx(expected[name], rel=1e-8), name


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_cells_of_more_counts_than_sixteen_bits_hold(rng: np.random.Generator, share: float) -> None:
    """Density fields are empty for the most part: 81,000 or more of 90,000 pixels, thrice."""
    frames = fields(rng, 3, 300, 300)
    frames[:, 2 : int(300 * share)] = 0
    for name in NAMES:
        matrix = load(name).pairwise(frames)
        for i, j in itertools.combinations(range(3), 2):
            assert matrix[i, j] == pytest.approx(exactly(frames[i], frames[j])[name], rel=1e-9), name


@pytest.mark.parametrize("name", NAMES)
def test_without_the_compiled_kernel_the_same_bits(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As on a GPU: histograms by torch."""
    frames = np.concatenate([fields(rng, 3, 40, 50), np.full((2, 40, 50, 3), 100, np.float32)])
    frames[4, 20, 20, 2] = 101
    compiled = load(name).pairwise(frames)
    monkeypatch.setattr(information, "has_kernel", lambda *tensors: False)
    assert np.array_equal(load(name).pairwise(frames), compiled)
    monkeypatch.setattr(information, "AT_ONCE", 1)
    assert np.array_equal(load(name).pairwise(frames), compiled)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_gpu_the_same_bits(rng: np.random.Generator, name: str) -> None:
    frames = fields(rng, 4, 64, 80)
    on_gpu = lsim.load_metric(name, device="cuda", size=None)
    np.testing.assert_allclose(on_gpu.pairwise(frames), load(name).pairwise(frames), rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_bits_do_not_depend_on_threads_or_other_frames(rng: np.random.Generator, name: str) -> None:
    frames = fields(rng, 7, 128, 128)
    metric = load(name)
    whole = metric.pairwise(frames, scope=(0, 255))
    for part in (slice(1, 4), slice(2, 7), slice(0, 2)):
        assert np.array_equal(whole[part, part], metric.pairwise(frames[part], scope=(0, 255)))
    torch.set_num_threads(3)
    assert np.array_equal(whole, metric.pairwise(frames, scope=(0, 255)))
    assert np.array_equal(whole[0, 1:], metric.distance(frames[[0] * 6], frames[1:], scope=(0, 255)))


def test_constant_frames(rng: np.random.Generator) -> None:
    """They tell all of one another, and nothing of any other frame."""
    field = fields(rng, 1, 32, 32)[0]
    frames = np.stack([np.full_like(field, 50), np.full_like(field, 200), field])
    h = entropy(np.bincount(field.astype(int).ravel()), base=2)
    for name, apart in {"vi": h / 2, "mutual-information": h, "nmi": 1}.items():
        matrix = load(name).pairwise(frames)
        assert matrix[0, 1] == 0
        np.testing.assert_allclose(matrix[:2, 2], apart, rtol=1e-12)


def test_a_recoloured_frame_is_the_same(rng: np.random.Generator) -> None:
    frame = fields(rng, 1, 48, 48)[0]
    for name in NAMES:
        assert load(name).distance(frame, 255 - frame) == 0


def test_independent_frames_share_nothing() -> None:
    """Every pair of levels once: I = 0 exactly, and H(x) = H(y) = 8 bits."""
    y, x = np.meshgrid(np.arange(256.0), np.arange(256.0), indexing="ij")
    for name, apart in {"vi": 8, "mutual-information": 8, "nmi": 1}.items():
        assert load(name).distance(y, x)[0] == pytest.approx(apart, rel=1e-12)


def test_mutual_information_ranks_as_the_similarity_does(rng: np.random.Generator) -> None:
    """Against a reference that has the larger entropy, the distance is a constant minus I."""
    reference = rng.integers(0, 256, (64, 64, 1)).astype(np.float32)
    coarser = [np.floor(reference / k) * k for k in (2, 3, 5, 9, 20)]
    distances = load("mutual-information").distance([reference] * 5, coarser, scope=(0, 255))
    h = [entropy(np.bincount(f.astype(int).ravel()), base=2) for f in (reference, *coarser)]
    np.testing.assert_allclose(distances, h[0] - np.array(h[1:]), rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_one_channel_is_three_equal_ones(rng: np.random.Generator, name: str) -> None:
    scalar = fields(rng, 3, 40, 40)[..., :1]
    three = np.repeat(scalar, 3, axis=-1)
    np.testing.assert_allclose(load(name).pairwise(scalar), load(name).pairwise(three), rtol=1e-12)


def test_a_run_counts_joint_histograms_once(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = fields(rng, 3, 32, 32)
    expected = {name: load(name).pairwise(frames) for name in NAMES}
    counted = []
    by_all_pairs = information.all_pairs
    monkeypatch.setattr(information, "all_pairs", lambda *a, **k: counted.append(1) or by_all_pairs(*a, **k))
    prepared = load("vi").prepare(frames, "sequence")
    for name in NAMES:
        assert np.array_equal(load(name).all_pairs(prepared), expected[name])
    assert len(counted) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_single_pixel(name: str) -> None:
    """One value has no entropy."""
    assert load(name).distance(np.zeros((1, 1)), np.ones((1, 1))) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compiled", [True, False])
def test_tensors_with_a_missing_value_are_not_comparable(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str, compiled: bool
) -> None:
    if not compiled:
        monkeypatch.setattr(information, "has_kernel", lambda *tensors: False)
    planes = torch.from_numpy(fields(rng, 3, 16, 16)).permute(0, 3, 1, 2)
    planes[1, 2, 5, 5] = torch.nan
    distances = load(name)(planes, planes.roll(1, 0))
    assert distances.isnan().tolist() == [False, True, True]


# --- bins -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [2, 10, 51, 100, 256])
@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_with_bins_nmi_is_that_of_scikit_image(rng: np.random.Generator, bins: int, dtype: type) -> None:
    noise = rng.standard_normal((2, 64, 64))
    frames = np.stack([noise[0], 0.5 * noise[0] + noise[1], noise[1]])
    if dtype is np.uint8:
        frames = np.clip(128 + 40 * frames, 0, 255)
        frames[:, 0, :2] = 0, 255
    frames = frames.astype(dtype)
    metric = lsim.load_metric("nmi", size=None, device="cpu", bins=bins)
    matrix = metric.pairwise(frames)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        expected = 2 - normalized_mutual_information(frames[i], frames[j], bins=bins)
        assert matrix[i, j] == pytest.approx(expected, rel=1e-6)
        assert metric.distance(frames[i], frames[j])[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bins", [7, 32])
def test_with_bins_vi_is_that_of_scikit_image(rng: np.random.Generator, bins: int) -> None:
    noise = rng.standard_normal((2, 48, 48))
    a, b = noise[0], noise[0] + noise[1]
    labels = [
        np.minimum(np.searchsorted(np.linspace(f.min(), f.max(), bins + 1), f, "right"), bins) for f in (a, b)
    ]
    expected = sum(variation_of_information(*labels)) / 2
    found = lsim.load_metric("vi", size=None, device="cpu", bins=bins).distance(a, b)[0]
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["vi", "mutual-information", "nmi"])
def test_contract_with_bins(name: str) -> None:
    check_metric(lsim.load_metric(name, size=None, device="cpu", bins=16), frame_size=32)


def test_few_bins_take_the_bias_of_small_frames_away(rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((2, 64, 64))
    assert lsim.load_metric("nmi", size=None).distance(a, b)[0] < 0.8
    assert lsim.load_metric("nmi", size=None, bins=10).distance(a, b)[0] > 0.995


def test_metrics_of_other_bins_share_no_histograms() -> None:
    names = [lsim.load_metric("nmi", bins=bins).shared_as for bins in (None, 16, 32)]
    assert len(set(names)) == 3


@pytest.mark.parametrize("bins", [1, 257, 2.5, True])
def test_impossible_bins_are_refused(bins: object) -> None:
    with pytest.raises(ValueError, match="'bins' of metric 'nmi' is 2 to 256"):
        lsim.load_metric("nmi", bins=bins)
