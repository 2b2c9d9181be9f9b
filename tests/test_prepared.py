"""Frames on their device, prepared once for all metrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lsim
from lsim.embedding import Embedding
from lsim.prepared import Prepared, move_to, prepare
from lsim.preprocess import Preprocessing, apply

CPU = torch.device("cpu")


def sample(shape: tuple[int, ...] = (4, 20, 30, 3), dtype: str = "f4") -> np.ndarray:
    return np.random.default_rng(0).normal(100, 30, shape).clip(0, 255).astype(dtype)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_values_are_those_of_the_public_function(order: int) -> None:
    frames = sample()
    prepared = prepare(frames, Preprocessing(24, order), "sequence", CPU)
    np.testing.assert_array_equal(prepared.values.numpy(), lsim.preprocess(frames, 24, order))
    assert prepared.comparable.all()
    assert len(prepared) == 4


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    "dtype", ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", ">f4", "f8"]
)
def test_frames_move_in_their_own_dtype(dtype: str, channels: int) -> None:
    """Prepared on a device as on the CPU; here, by the CPU's own plain torch."""
    frames = sample((3, 20, 30, channels)) > 100 if dtype == "?" else sample((3, 20, 30, channels), dtype)
    frames.flags.writeable = False
    tensor = move_to(frames, CPU)
    assert tensor.element_size() == frames.dtype.itemsize
    assert tensor.shape[-1] == min(channels, 3)
    for order in (0, 1):
        wanted = Preprocessing(17, order, "published")
        expected = prepare(frames, wanted, "sequence", CPU).values
        assert torch.equal(apply(wanted, tensor, "sequence"), expected)


def test_a_scalar_field_keeps_one_channel_and_stands_for_three() -> None:
    prepared = prepare(sample((4, 20, 30, 1)), Preprocessing(16), "sequence", CPU)
    assert prepared.values.shape == (4, 16, 16, 1)
    assert prepared.frames(quantised=False, one_channel=True) is prepared.values
    three = prepared.frames(quantised=False, one_channel=False)
    assert three.shape == (4, 16, 16, 3)
    assert three.data_ptr() == prepared.values.data_ptr()


def test_truncated_frames_are_made_once() -> None:
    frames = sample()
    frames[2, 3, 4] = np.nan
    prepared = prepare(frames, Preprocessing(None), (90, 110), CPU)
    truncated = prepared.frames(quantised=True, one_channel=True)
    assert truncated is prepared.frames(quantised=True, one_channel=False)
    expected = torch.from_numpy(np.floor(prepared.values.numpy().clip(0, 255)))
    torch.testing.assert_close(truncated, expected, rtol=0, atol=0, equal_nan=True)
    assert (prepared.values < 0).any()
    assert (prepared.values > 255).any()


def test_comparable_frames() -> None:
    frames = sample()
    frames[1, 5, 5, 0] = np.inf
    frames[2] = np.nan
    assert prepare(frames, Preprocessing(16), "sequence", CPU).comparable.tolist() == [
        True,
        False,
        False,
        True,
    ]
    for compat in ("default", "published"):
        settings = Preprocessing(16, 1, compat, mask=True)
        assert prepare(frames, settings, "sequence", CPU).comparable.tolist() == [True, True, False, True]


def test_an_embedding_is_shared_under_a_name_only() -> None:
    prepared = Prepared(torch.zeros(2, 4, 4, 1), np.ones(2, bool))
    made: list[Embedding] = []

    def embed() -> Embedding:
        made.append(Embedding({"values": prepared.values}))
        return made[-1]

    first = prepared.embedding(("pixels", False), embed)
    assert prepared.embedding(("pixels", False), embed) is first
    assert prepared.embedding(("pixels", True), embed) is not first
    assert prepared.embedding(None, embed) is not prepared.embedding(None, embed)
    assert len(made) == 4
