"""Optical flow: what moved by k pixels is k pixels away; values are those of OpenCV called directly."""

from __future__ import annotations

import importlib.util
import threading

import numpy as np
import pytest
import torch
from scipy import ndimage

import lsim
from lsim.metric import Metric
from lsim.metrics import flow
from lsim.testing import check_metric

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'lsim[flow]'")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def load(**settings: object) -> Metric:
    return lsim.load_metric("flow", **{"device": "cpu", **settings})  # type: ignore[arg-type]


@pytest.fixture
def texture(rng: np.random.Generator) -> np.ndarray:
    """A smooth random field (160, 160) that spans 0…255."""
    field = ndimage.gaussian_filter(rng.standard_normal((160, 160)), 4)
    return ((field - field.min()) / np.ptp(field) * 255).astype(np.float32)


def shifted(texture: np.ndarray, *shifts: tuple[int, int]) -> np.ndarray:
    """Windows (n, 128, 128, 1) of a field, each moved by (y, x) pixels."""
    return np.stack([texture[16 + y : 144 + y, 16 + x : 144 + x, None] for y, x in shifts])


def by_opencv(a: np.ndarray, b: np.ndarray, preset: int) -> float:
    """Of two frames (y, x) in whole numbers of 0…255."""
    dis = cv2.DISOpticalFlow.create(preset)
    both = [(a, b), (b, a)]
    flows = [dis.calc(p.astype(np.uint8), q.astype(np.uint8), None).astype(np.float64) for p, q in both]
    return float(np.mean([np.linalg.norm(field, axis=2).mean() for field in flows]))


def test_contract() -> None:
    check_metric(load(size=64))
    check_metric(load(size=None, preset="ultrafast"), frame_size=33, seed=1)


@pytest.mark.parametrize("preset", ["medium", "fast", "ultrafast"])
def test_a_translation_by_k_pixels_is_about_k(texture: np.ndarray, preset: str) -> None:
    shifts = [(0, 0), (0, 1), (2, 0), (0, -4), (3, 4), (-8, 0)]
    row = load(size=None, preset=preset).pairwise(shifted(texture, *shifts), scope=(0, 255))[0]
    expected = np.linalg.norm(shifts, axis=1)
    assert row[0] == 0
    np.testing.assert_allclose(row[1:], expected[1:], rtol=0.05, atol=0.15)


@pytest.mark.smoke
@pytest.mark.parametrize("preset", ["medium", "fast", "ultrafast"])
def test_parity_with_opencv(texture: np.ndarray, preset: str) -> None:
    frames = np.floor(shifted(texture, (0, 0), (1, 2), (5, 0)))
    found = load(size=None, preset=preset).pairwise(frames, scope=(0, 255))
    number = getattr(cv2, f"DISOPTICAL_FLOW_PRESET_{preset.upper()}")
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        expected = by_opencv(frames[i, :, :, 0], frames[j, :, :, 0], number)
        assert found[i, j] == pytest.approx(expected, rel=1e-6)


def test_grey_is_the_rounded_mean_of_the_channels(rng: np.random.Generator) -> None:
    frames = rng.integers(0, 256, (2, 40, 40, 3)).astype(np.float32)
    metric = load(size=None)
    grey = metric.embed(torch.from_numpy(frames)).parts["grey"].numpy()
    assert np.array_equal(grey, np.rint(frames.astype(np.float64).mean(axis=3)))
    three = np.repeat(frames[..., :1], 3, axis=3)
    assert np.array_equal(metric.pairwise(three), metric.pairwise(frames[..., :1]))


def test_frames_without_texture_are_at_distance_zero() -> None:
    frames = np.zeros((2, 32, 32, 1))
    frames[1] = 200
    assert load(size=None).pairwise(frames, scope=(0, 255))[0, 1] == 0


def test_values_do_not_depend_on_threads_order_or_other_frames(rng: np.random.Generator) -> None:
    """Bit for bit, whatever OpenCV's own threads are."""
    frames = rng.uniform(size=(5, 96, 96, 1))
    metric = load(size=None)
    alone = metric.pairwise(frames, scope=(0, 1))
    assert np.array_equal(metric.pairwise(frames[::-1], scope=(0, 1)), alone[::-1, ::-1])
    assert np.array_equal(metric.pairwise(frames[1:4], scope=(0, 1)), alone[1:4, 1:4])
    before = cv2.getNumThreads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            cv2.setNumThreads(threads)
            assert np.array_equal(metric.pairwise(frames, scope=(0, 1)), alone)
    finally:
        cv2.setNumThreads(before)


def test_opencv_gets_its_threads_back_when_the_last_one_is_done() -> None:
    before = cv2.getNumThreads()
    entered, leave, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with flow._opencv_in_one_thread():
            entered.set()
            leave.wait(60)

    try:
        cv2.setNumThreads(3)
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(60)
        with flow._opencv_in_one_thread():
            seen.append(cv2.getNumThreads())
        seen.append(cv2.getNumThreads())  # the other one is still within
        leave.set()
        thread.join()
        assert [*seen, cv2.getNumThreads()] == [1, 1, 3]
    finally:
        leave.set()
        cv2.setNumThreads(before)


def test_missing_values_in_tensors(rng: np.random.Generator) -> None:
    planes = torch.from_numpy(rng.uniform(0, 255, (2, 1, 16, 16)).astype(np.float32))
    planes[1, 0, 3, 3] = torch.nan
    assert load(size=None)(planes, planes.flip(0)).isnan().all()
    assert load(size=None)(planes[:1], planes[:1]) == 0


@pytest.mark.gpu
def test_agreement_on_gpu(rng: np.random.Generator) -> None:
    frames = rng.uniform(size=(3, 40, 40, 3))
    on_gpu = load(size=None, device="cuda")
    check_metric(on_gpu)
    assert np.array_equal(on_gpu.pairwise(frames), load(size=None).pairwise(frames))
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2).cuda()
    assert on_gpu(planes, planes.flip(0)).device.type == "cuda"


def test_smallest_size_works_and_is_named_below(rng: np.random.Generator) -> None:
    metric = load(size=None)
    frames = rng.random((2, 12, 12, 3))
    assert metric.pairwise(frames)[0, 1] > 0
    for too_small in (frames[:, 1:], frames[:, :, 1:]):
        with pytest.raises(lsim.FramesError, match=r"'flow'.*smallest that works is 12×12"):
            metric.pairwise(too_small)


def test_says_what_it_is_not_and_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    described = {metric.name: metric for metric in lsim.describe_metrics()}["flow"]
    assert "FlowNet2" in described.info.source
    assert not described.unavailable
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    described = {metric.name: metric for metric in lsim.describe_metrics()}["flow"]
    assert "pip install 'lsim[flow]'" in described.unavailable
    with pytest.raises(ModuleNotFoundError, match=r"'flow' is not available.*pip install 'lsim\[flow\]'"):
        load()


def test_presets_are_checked_and_specified() -> None:
    with pytest.raises(ValueError, match="preset must be one of medium, fast, ultrafast, got 'slow'"):
        load(preset="slow")
    assert load().specification_hash != load(preset="fast").specification_hash
