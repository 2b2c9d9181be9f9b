"""Resizing as scipy does, and ranges taken over the right frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lsim import preprocess
from lsim.preprocess import Preprocessing, apply, range_of, resize, truncate_to_8bit

RIM_ZEROED = [(512, 224), (480, 224), (1000, 224), (128, 320), (448, 320)]
"""Lengths (from, to) at which scipy's last position rounds to beyond the last sample."""

SIZES = [
    (256, 224),
    (224, 224),
    (64, 224),
    (300, 224),
    (100, 33),
    (17, 40),
    (2, 7),
    (1, 5),
    (9, 1),
    (128, 64),
]
DTYPES = (np.float32, np.float64, np.uint8, np.int16)


def zoom(frames: np.ndarray, size: int, order: int) -> np.ndarray:
    """(n, y, x, channel) by scipy, frame by frame, as the published code calls it."""
    _, y, x, _ = frames.shape
    return np.stack([scipy.ndimage.zoom(f, (size / y, size / x, 1), order=order) for f in frames])


def sample(dtype: type, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, 80, shape)
    return np.clip(values + 128, 0, 255).astype(dtype) if dtype == np.uint8 else values.astype(dtype)


# --- resize -----------------------------------------------------------------------------------------------


SIZES_ORDERS_DTYPES = [
    (n, m, order, DTYPES[(place + order) % len(DTYPES)])
    for place, (n, m) in enumerate(SIZES + RIM_ZEROED)
    for order in range(4)
]
"""Every size with every order, and with every dtype; every order with every dtype at several sizes."""


@pytest.mark.parametrize(("n", "m", "order", "dtype"), SIZES_ORDERS_DTYPES)
def test_published_resize_is_scipys(n: int, m: int, order: int, dtype: type) -> None:
    """All of it, with the rim that scipy zeroes at some sizes; along y, and along x."""
    for shape in [(1, n, 5, 1), (2, 6, n, 3)]:
        frames = sample(dtype, shape)
        check_against_scipy(frames, m, order)


def check_against_scipy(frames: np.ndarray, m: int, order: int) -> None:
    """Compare a resize to m pixels along both axes with scipy's; integers where rounding is clear."""
    found, expected = resize(frames, m, order, zero_rim=True), zoom(frames, m, order)
    assert found.dtype == expected.dtype
    if np.issubdtype(frames.dtype, np.integer):
        exact = zoom(frames.astype(np.float64), m, order)
        halfway = np.abs(np.abs(exact) % 1 - 0.5) < 1e-9  # rounding may go either way there
        assert ((found == expected) | halfway).all()
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    else:
        scale = np.abs(frames).max()
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize(("n", "m"), RIM_ZEROED)
def test_default_resize_keeps_the_rim(n: int, m: int, order: int) -> None:
    frames = 1 + np.abs(sample(np.float32, (1, n, n // 2, 3)))
    published, default = resize(frames, m, order, zero_rim=True), resize(frames, m, order)
    assert (published[:, -1] == 0).all()
    assert (default[:, -1] > 0).any(axis=-1).all()
    inner = (slice(None), slice(0, -1), slice(0, -1))
    assert np.array_equal(published[inner], default[inner])
    # The corners of the frame are kept: the last position is the last sample.
    np.testing.assert_allclose(default[:, -1, -1], frames[:, -1, -1], rtol=1e-5)
    np.testing.assert_allclose(default[:, -1, 0], frames[:, -1, 0], rtol=1e-5)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_modes_agree_at_other_sizes(n: int, m: int, order: int) -> None:
    frames = sample(np.float64, (2, n, n, 3))
    np.testing.assert_array_equal(resize(frames, m, order), resize(frames, m, order, zero_rim=True))


@pytest.mark.parametrize("order", [4, 5])
def test_higher_orders(order: int) -> None:
    frames = sample(np.float64, (1, 40, 30, 3))
    np.testing.assert_allclose(resize(frames, 64, order), zoom(frames, 64, order), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compat", ["default", "published"])
@pytest.mark.parametrize("order", [2, 3])
def test_8bit_overshoot_is_clipped(order: int, compat: str) -> None:
    step = np.zeros((1, 32, 32, 1), np.uint8)
    step[:, :, 16:] = 255
    resized = resize(step, 100, order, zero_rim=compat == "published")
    assert resized.dtype == np.uint8
    # Wrapped around, the overshoot beside the step would be dark where it is bright and the reverse.
    assert resized[..., 70:, 0].min() > 128
    assert resized[..., :30, 0].max() < 128


@given(
    n=st.integers(1, 70),
    m=st.integers(1, 90),
    order=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_any_size_is_scipys(n: int, m: int, order: int, dtype: type, seed: int) -> None:
    check_against_scipy(sample(dtype, (1, n, 4, 2), seed), m, order)


# --- range ------------------------------------------------------------------------------------------------


def expected_range(frames: np.ndarray, axis: tuple[int, ...]) -> np.ndarray:
    lo, hi = frames.min(axis=axis, keepdims=True), frames.max(axis=axis, keepdims=True)
    return 255 * (frames - lo) / (hi - lo)


@pytest.mark.parametrize("scope", ["sequence", "batch", "dataset"])
def test_scopes_over_a_stack(scope: str) -> None:
    frames = sample(np.float64, (4, 12, 10, 3)) * [1, 20, 0.01]
    found = preprocess(frames, size=None, scope=scope)
    np.testing.assert_allclose(found, expected_range(frames, (0, 1, 2)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scope", ["sequence", "batch", "dataset"])
def test_scopes_over_a_data_set(scope: str) -> None:
    """(sequence, frame, y, x, channel): ``sequence`` ranges over each by itself, others over all."""
    frames = sample(np.float64, (3, 4, 8, 9, 3)) * np.array([1, 5, 50])[:, None, None, None, None]
    found = preprocess(frames, size=None, scope=scope)
    axis = (1, 2, 3) if scope == "sequence" else (0, 1, 2, 3)
    np.testing.assert_allclose(found, expected_range(frames, axis), rtol=1e-5, atol=1e-4)


def test_scope_pair_takes_two_frames() -> None:
    frames = sample(np.float64, (2, 8, 8, 3))
    assert np.array_equal(
        preprocess(frames, size=None, scope="pair"), preprocess(frames, size=None, scope="batch")
    )
    with pytest.raises(ValueError, match="'pair' is taken over two frames, got 3"):
        preprocess(frames[[0, 1, 1]], size=None, scope="pair")


def test_fixed_scope() -> None:
    frames = np.array([-1.0, 0.0, 1.0, 3.0]).reshape(1, 2, 2, 1)
    found = preprocess(frames, size=None, scope=(0, 2))
    np.testing.assert_allclose(found[0, ..., 0].ravel(), [-127.5, 0, 127.5, 382.5])
    channels = np.concatenate([frames, frames, frames], axis=-1)
    found = preprocess(channels, size=None, scope=([0, -1, 0], [1, 3, 255]))
    np.testing.assert_allclose(found[0, 1, 0], [255, 127.5, 1])


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        ("sequences", "scope must be one of"),
        ((0, 1, 2), r"a fixed scope is a pair"),
        ((2, 1), "finite lo <= hi"),
        ((0, np.inf), "finite lo <= hi"),
        (([0, 0], [1, 1]), "expected one value or 3, one per channel"),
    ],
)
def test_wrong_scopes(scope: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preprocess(np.zeros((2, 4, 4, 3)), size=None, scope=scope)  # type: ignore[arg-type]


def test_range_is_taken_after_the_resize() -> None:
    frame = sample(np.float64, (1, 9, 9, 3))
    frame[0, 1, 1] = 1e6  # not sampled by 9 → 5 at order 0
    found = preprocess(frame, size=5)
    assert found.min() == 0
    np.testing.assert_allclose(found.max(axis=(0, 1, 2)), 255, rtol=1e-6)
    np.testing.assert_allclose(found, expected_range(frame[:, ::2, ::2], (0, 1, 2)), rtol=1e-5, atol=1e-4)


def test_zeros_of_the_rim_enter_the_range() -> None:
    frames = np.linspace(10, 20, 512)[None, :, None, None] * np.ones((1, 1, 224, 1))
    assert preprocess(frames, compat="default")[0, 0, 0, 0] == 0
    published = preprocess(frames, compat="published")
    np.testing.assert_allclose(published[0, 0, 0, 0], 255 * 10 / published_highest(frames), rtol=1e-6)
    assert (published[0, -1] == 0).all()


def published_highest(frames: np.ndarray) -> float:
    return float(zoom(frames, 224, 0).max())


@pytest.mark.parametrize("compat", ["default", "published"])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_channels_are_zero(dtype: type, order: int, compat: str) -> None:
    """Also when resized by splines, where rounding would make a range of a constant."""
    frames = sample(dtype, (3, 8, 11, 3))
    frames[..., 1] = 7.3
    found = preprocess(frames, size=30, order=order, compat=compat)  # type: ignore[arg-type]
    if (dtype, order, compat) == (np.float64, 1, "published"):
        # scipy's rounding, stretched to [0, 255] as published.
        resized = scipy.ndimage.zoom(frames, (1, 30 / 8, 30 / 11, 1), order=1)[..., 1]
        stretched = 255 * ((resized - resized.min()) / (resized.max() - resized.min()))
        np.testing.assert_array_equal(found[..., 1], stretched.astype(np.float32))
        return
    assert (found[..., 1] == 0).all()
    np.testing.assert_allclose(found[..., [0, 2]].max(axis=(0, 1, 2)), 255, rtol=1e-6)
    constant: np.ndarray = np.full((3, 8, 8, 3), -4.2, dtype)
    assert (preprocess(constant, size=16, order=order, compat=compat) == 0).all()  # type: ignore[arg-type]


def test_integers_with_a_constant_channel_stay_whole_where_published() -> None:
    """Only with some channels constant, and only for integers: so the published code stores them."""
    frames = np.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3).astype(np.int32)
    partly = frames.copy()
    partly[..., 1] = 3

    def fractional(array: np.ndarray, compat: str) -> bool:
        prepared = preprocess(array, size=None, compat=compat)  # type: ignore[arg-type]
        return bool((prepared % 1 != 0).any())

    assert not fractional(partly, "published")
    assert np.array_equal(
        preprocess(partly, size=None, compat="published"),
        np.floor(preprocess(partly.astype(np.float64), size=None, compat="published")),
    )
    assert fractional(partly, "default")
    assert fractional(frames, "published")
    assert fractional(partly.astype(np.float64), "published")


# --- channels, shapes, dtypes -----------------------------------------------------------------------------


def test_channels() -> None:
    colour = sample(np.float32, (2, 8, 9, 4))
    one = preprocess(colour[..., :1], size=16)
    assert one.shape == (2, 16, 16, 3)
    assert np.array_equal(one[..., 0], one[..., 2])
    assert np.array_equal(preprocess(colour, size=16), preprocess(colour[..., :3], size=16))
    assert np.array_equal(preprocess(colour[..., 0], size=16), one)
    assert np.array_equal(preprocess(colour[0, ..., 0], size=16), preprocess(colour[:1, ..., :1], size=16))


@pytest.mark.parametrize("channels", [2, 5, 7])
def test_other_channels_say_how(channels: int) -> None:
    with pytest.raises(ValueError, match=rf"{channels} channels.*separate fields"):
        preprocess(np.zeros((2, 8, 8, channels)))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((8, 8, 3)), "ambiguous"),
        (np.zeros(8), "expected"),
        (np.zeros((1,) * 6), "expected"),
        (np.zeros((0, 8, 8, 3)), "empty"),
        (np.zeros((2, 8, 8, 3), complex), "dtype"),
    ],
)
def test_other_shapes_and_dtypes(array: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preprocess(array)


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("dtype", ["f2", "f4", ">f4", "f8", "u1", "i1", "u2", "i2", "i4", "i8", "?"])
def test_dtypes(dtype: str, order: int) -> None:
    frames = (
        sample(np.float64, (2, 20, 20, 3)) > 0 if dtype == "?" else sample(np.int16, (2, 20, 20, 3)) % 100
    )
    frames = frames.astype(dtype)
    found = preprocess(frames, size=20, order=order)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, preprocess(frames.astype(np.float64), size=20, order=order), atol=1e-4)
    resized = preprocess(frames, size=31, order=order)
    assert resized.min() == 0
    np.testing.assert_allclose(resized.max(), 255, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("compat", ["default", "published"])
def test_the_result_is_single_precision_whatever_comes_in(dtype: type, compat: str) -> None:
    frames = sample(dtype, (2, 8, 8, 3))
    assert preprocess(frames, size=None, compat=compat).dtype == np.float32


@pytest.mark.parametrize("size", [None, 8, 12])
def test_input_is_left_alone_and_not_shared(size: int | None) -> None:
    frames = sample(np.float32, (2, 8, 8, 3))
    frames[1, 2, 2] = np.nan
    before = frames.copy()
    found = preprocess(frames, size=size)
    assert np.array_equal(frames, before, equal_nan=True)
    assert not np.shares_memory(found, frames)


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_frame_with_nan_is_nan_and_not_in_the_range(value: float, order: int) -> None:
    frames = sample(np.float32, (3, 9, 9, 3))
    spoilt = frames.copy()
    spoilt[1, 1, 1, 0] = value  # between the samples of 9 → 5 at order 0
    found = preprocess(spoilt, size=5, order=order)
    assert np.isnan(found[1]).all()
    assert np.array_equal(found[[0, 2]], preprocess(frames[[0, 2]], size=5, order=order))


def test_nothing_but_nan() -> None:
    assert np.isnan(preprocess(np.full((2, 6, 6, 1), np.nan), size=None)).all()


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e30, 3e38])
def test_extreme_ranges_in_single_precision(scale: float) -> None:
    frames = np.array([-1, -0.5, 0, 1]).reshape(1, 2, 2, 1)
    found = preprocess((frames * scale).astype(np.float32), size=None)
    np.testing.assert_allclose(
        found[0, ..., 0].ravel(), [0, 63.75, 127.5, 255], rtol=0.2 if scale < 1e-40 else 1e-5
    )


@pytest.mark.parametrize(
    "arguments", [{"order": 6}, {"order": -1}, {"size": 0}, {"size": 1.5}, {"compat": "x"}]
)
def test_settings_are_checked(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Preprocessing(**arguments)  # type: ignore[arg-type]


# --- properties -------------------------------------------------------------------------------------------

STACKS = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 3), st.integers(2, 9), st.integers(2, 9), st.sampled_from([1, 3])),
    elements=st.integers(-(2**20), 2**20).map(float),
)


@given(frames=STACKS, size=st.sampled_from([None, 1, 5, 12]), order=st.integers(0, 1))
@settings(max_examples=80, deadline=None)
def test_result_is_within_range(frames: np.ndarray, size: int | None, order: int) -> None:
    for compat in ("default", "published"):
        found = preprocess(frames, size=size, order=order, compat=compat)
        assert found.shape[-1] == 3
        assert found.min() == 0
        assert found.max() <= 255 * (1 + 1e-6)


@given(
    frames=STACKS,
    gain=st.floats(1e-6, 1e6),
    offset=st.integers(-(2**20), 2**20),
    order=st.sampled_from([0, 1, 3]),
)
@settings(max_examples=60, deadline=None)
def test_invariant_under_gain_and_offset(frames: np.ndarray, gain: float, offset: int, order: int) -> None:
    """Units and zero points don't matter."""
    plain = preprocess(frames, size=7, order=order)
    moved = preprocess(gain * (frames + offset), size=7, order=order)
    np.testing.assert_allclose(moved, plain, atol=1e-3)


@given(frames=STACKS)
@settings(max_examples=40, deadline=None)
def test_reversal_of_sign_reverses_the_range(frames: np.ndarray) -> None:
    found, mirrored = preprocess(frames, size=None), preprocess(-frames, size=None)
    varies = np.broadcast_to(np.ptp(frames, axis=(0, 1, 2)) > 0, 3)
    np.testing.assert_allclose(found[..., varies] + mirrored[..., varies], 255, rtol=1e-5)


@given(frames=STACKS, order=st.integers(0, 1))
@settings(max_examples=40, deadline=None)
def test_axes_may_be_swapped(frames: np.ndarray, order: int) -> None:
    swapped = preprocess(frames.swapaxes(1, 2), size=6, order=order)
    np.testing.assert_allclose(preprocess(frames, size=6, order=order), swapped.swapaxes(1, 2), atol=1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_truncation_to_8bit(dtype: type) -> None:
    values: np.ndarray = np.array(
        [[-3, 0, 0.999, 1], [254.9999, 255, 300, np.nan], [-np.inf, np.inf, 2.5, 3]], dtype
    )
    expected = np.array([[0, 0, 0, 1], [254, 255, 255, np.nan], [0, 255, 2, 3]])
    np.testing.assert_array_equal(truncate_to_8bit(values), expected)
    np.testing.assert_array_equal(truncate_to_8bit(values.T), expected.T)


# --- any shape and dtype ----------------------------------------------------------------------------------

PREPARED_DTYPES: dict[str, Any] = {
    "?": np.uint8,
    "u1": np.uint8,
    "i2": np.int16,
    "u2": np.uint16,
    "f2": np.float32,
    "f4": np.float32,
    ">f4": np.dtype(">f4"),
    "f8": np.float64,
}
"""Dtypes that come in, and in which they are resized."""


@st.composite
def any_frames(draw: st.DrawFn, dtypes: tuple[str, ...] = tuple(PREPARED_DTYPES)) -> np.ndarray:
    """A few frames with axes down to one pixel, of one or three channels, with a large offset or none."""
    shape = [draw(st.integers(1, high)) for high in (3, 24, 24)]
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    values = rng.normal(draw(st.sampled_from([0, 120])), 40, (*shape, draw(st.sampled_from([1, 3]))))
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    if dtype.kind == "b":
        return values > 120
    return (values.clip(0, 255) if dtype.kind == "u" else values).astype(dtype)


def spoilt(frames: np.ndarray, seed: int) -> np.ndarray:
    """The same with up to three values that are NaN or infinite."""
    rng = np.random.default_rng(seed)
    frames = frames.copy()
    for _ in range(rng.integers(1, 4)):
        frames[tuple(rng.integers(0, frames.shape))] = rng.choice([np.nan, np.inf, -np.inf])
    return frames


SEEDS = st.integers(0, 2**16)


@given(frames=any_frames(), m=st.integers(1, 40), order=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_any_frames_are_resized_as_by_scipy(frames: np.ndarray, m: int, order: int) -> None:
    taken = frames.astype(PREPARED_DTYPES[frames.dtype.str.lstrip("<|=").replace("b1", "?")])
    found = resize(frames, m, order, zero_rim=True)
    assert found.dtype == taken.dtype
    if order < 2 and taken.dtype.kind == "f" and frames.shape[1:3] != (m, m):
        np.testing.assert_array_equal(found, zoom(taken, m, order))
        return
    exact = zoom(taken.astype(np.float64), m, order)
    if taken.dtype.kind == "u" or taken.dtype.kind == "i":
        limits = np.iinfo(taken.dtype)
        exact = np.clip(exact, limits.min, limits.max)
        assert np.abs(found - exact).max() <= 0.5 + 1e-9
    else:
        np.testing.assert_allclose(found, exact, rtol=1e-7, atol=1e-6 * max(np.ptp(taken), 1e-30))


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_tensors_are_prepared_as_arrays_are(data: st.DataObject) -> None:
    """The way of other devices, in plain torch, and compiled kernels."""
    dtypes = tuple(name for name in PREPARED_DTYPES if not name.startswith(">"))
    frames = data.draw(any_frames(dtypes))
    if frames.dtype.kind == "f" and data.draw(st.booleans()):
        frames = spoilt(frames, data.draw(SEEDS))
    if data.draw(st.booleans()):
        frames[..., 0] = frames[0, 0, 0, 0]
    order = data.draw(st.integers(0, 5))
    wanted = Preprocessing(
        data.draw(st.sampled_from([None, 1, 7, 30])),
        order,
        data.draw(st.sampled_from(["default", "published"])),
        mask=order < 2 and data.draw(st.booleans()),
    )
    scope: Any = data.draw(st.sampled_from(["sequence", (-20, 200), (50, 50)]))
    found = apply(wanted, torch.from_numpy(frames), scope)
    assert found.dtype == torch.float32
    expected = apply(wanted, frames, scope)
    if order < 2:
        np.testing.assert_array_equal(found.numpy(), expected)
    else:
        span = max(255, np.nan_to_num(np.abs(expected)).max())
        # Whole numbers may be rounded either way, where rounding decides.
        near = 255 if frames.dtype.kind in "uib" else 1e-6 * span
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=near)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_a_frame_is_the_same_bits_whatever_is_with_it(order: int) -> None:
    frames = sample(np.float32, (5, 30, 50, 3))
    wanted = Preprocessing(41, order)
    together = apply(wanted, frames, (-100, 100))
    for k in range(5):
        np.testing.assert_array_equal(apply(wanted, frames[k : k + 1], (-100, 100))[0], together[k])


@pytest.mark.parametrize("order", [0, 1, 3])
def test_memory_that_cannot_be_walked_or_written(order: int) -> None:
    frames = sample(np.float32, (4, 20, 30, 3))
    expected = preprocess(frames, 16, order)
    locked = frames.copy()
    locked.flags.writeable = False
    turned = np.ascontiguousarray(frames[::-1].transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0)[::-1]
    for other in (locked, turned, frames.astype(">f4")):
        np.testing.assert_array_equal(preprocess(other, 16, order), expected)


# --- missing pixels ---------------------------------------------------------------------------------------


def masked(size: int | None, order: int = 0, compat: str = "default") -> Preprocessing:
    return Preprocessing(size, order, compat, mask=True)  # type: ignore[arg-type]


@given(frames=any_frames(("f4", "f8")), m=st.integers(1, 40), order=st.integers(0, 1), data=st.data())
@settings(max_examples=100, deadline=None)
def test_missing_pixels_spread_as_far_as_their_weight(
    frames: np.ndarray, m: int, order: int, data: st.DataObject
) -> None:
    """A sample is missing where it takes anything of a missing pixel, and else is what it would be."""
    frames = spoilt(frames, data.draw(SEEDS))
    missing = ~np.isfinite(frames).all(-1, keepdims=True)
    filled = np.where(missing, 0, frames)
    taken = resize(missing.astype(np.float64), m, order)[..., 0] > 0
    resized = resize(filled, m, order)
    found = apply(masked(m, order), frames, (0, 255))
    np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(taken[..., None], found.shape))
    np.testing.assert_allclose(found[~taken], resized[~taken], rtol=1e-6, atol=1e-4)
    if not taken.all():
        lo, hi = range_of(frames, masked(m, order))
        np.testing.assert_array_equal(lo, resized[~taken].min(0))
        np.testing.assert_array_equal(hi, resized[~taken].max(0))


def test_a_sample_on_a_pixel_does_not_take_of_the_missing_one_beside_it() -> None:
    frames = sample(np.float64, (1, 9, 9, 3))
    frames[0, 3, 3, 1] = np.inf
    found = apply(masked(5, order=1), frames, "sequence")  # at every second pixel
    assert np.isfinite(found).all()
    found = apply(masked(17, order=1), frames, "sequence")  # and between them
    assert np.argwhere(np.isnan(found[0, ..., 0])).tolist() == [[i, j] for i in (5, 6, 7) for j in (5, 6, 7)]


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("compat", ["default", "published"])
def test_missing_pixels_do_not_count_in_the_range(order: int, compat: str) -> None:
    """Nor do the values that their other channels have."""
    frames = sample(np.float32, (3, 12, 10, 3))
    frames[1, 4, 5] = [np.nan, 1e6, -1e6]
    found = apply(masked(None, order, compat), frames, "sequence")
    assert np.isnan(found[1, 4, 5]).all()
    assert np.isnan(found).sum() == 3
    assert np.nanmin(found, axis=(0, 1, 2)).tolist() == [0, 0, 0]
    np.testing.assert_allclose(np.nanmax(found, axis=(0, 1, 2)), 255, rtol=1e-6)


@pytest.mark.parametrize("kind", ["array", "tensor"])
@pytest.mark.parametrize("order", [0, 1])
def test_constant_channels_with_missing_pixels_are_zero(order: int, kind: str) -> None:
    frames = sample(np.float64, (2, 11, 8, 3))
    frames[..., 1] = 7.3
    frames[0, 2, 2] = [np.nan, 9, 9]  # with it, the second channel would vary
    taken: Any = frames if kind == "array" else torch.from_numpy(frames)
    found = np.asarray(apply(masked(30, order), taken, "sequence"))
    assert np.isnan(found[0]).any()
    assert not np.isnan(found[1]).any()
    present = ~np.isnan(found[..., 1])
    assert (found[..., 1][present] == 0).all()
    assert (np.isnan(found) == ~present[..., None]).all()


@pytest.mark.parametrize("compat", ["default", "published"])
def test_a_frame_without_any_value_stays_so(compat: str) -> None:
    """Also where the published resize writes a rim of zeros."""
    n, m = RIM_ZEROED[3]
    frames = sample(np.float32, (3, n, n, 1))
    frames[1] = np.nan
    found = apply(masked(m, 1, compat), frames, "sequence")
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2]], apply(masked(m, 1, compat), frames[[0, 2]], "sequence"))
    assert np.isnan(apply(masked(m, 1, compat), frames[[1]], "sequence")).all()


@given(
    data=st.data(),
    order=st.integers(0, 1),
    mask=st.booleans(),
    compat=st.sampled_from(["default", "published"]),
)
@settings(max_examples=40, deadline=None)
def test_ranges_of_sequences_join_to_that_of_the_data_set(
    data: st.DataObject, order: int, mask: bool, compat: str
) -> None:
    frames = sample(np.float32, (6, 14, 9, 3), data.draw(st.integers(0, 99)))
    if data.draw(st.booleans()):
        frames = spoilt(frames, data.draw(SEEDS))
    wanted = Preprocessing(8, order, compat, mask)  # type: ignore[arg-type]
    ranges = [range_of(frames[part], wanted) for part in (slice(0, 2), slice(2, 6))]
    lo, hi = np.nanmin([r[0] for r in ranges], axis=0), np.nanmax([r[1] for r in ranges], axis=0)
    together = apply(wanted, frames, "dataset")
    for part in (slice(0, 2), slice(2, 6)):
        np.testing.assert_array_equal(apply(wanted, frames[part], (lo, hi)), together[part])


@given(
    frames=any_frames(("f4", "f8")), m=st.sampled_from([None, 1, 13]), order=st.integers(0, 3), data=st.data()
)
@settings(max_examples=60, deadline=None)
def test_without_a_mask_a_missing_value_costs_its_frame_alone(
    frames: np.ndarray, m: int | None, order: int, data: st.DataObject
) -> None:
    bad = spoilt(frames, data.draw(SEEDS))
    complete = np.isfinite(bad).all(axis=(1, 2, 3))
    found = preprocess(bad, m, order)
    assert np.isnan(found[~complete]).all()
    if complete.any():
        np.testing.assert_array_equal(found[complete], preprocess(frames[complete], m, order))
