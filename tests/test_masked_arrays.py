"""A masked array is the same array with NaN where it is masked, to every function that takes frames."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.masked import masked_tensor

import lsim
from lsim import testing
from lsim.export import agreement
from lsim.loss import SimulationLoss
from lsim.ranking import pooled_spearman
from lsim.simulate import families, find_recipe, layout
from lsim.simulate.hardness import hardness, reference_errors
from lsim.training import sequences
from lsim.training.train import planes
from pipeline.convert import decode
from pipeline.matrix import mds
from pipeline.report import pictures
from pipeline.sources.readers.base import LazySequence, scale_parameter

pre = importlib.import_module("lsim.preprocess")  # lsim.preprocess is the function
SETTINGS = pre.Preprocessing(size=None)
RESIZED = pre.Preprocessing(size=12, order=1, mask=True)
NO_RANDOMNESS = sequences.Augmentation(size=8, margin=1, flip=False, turn=False, shuffle_channels=False)


def l2(**options: Any) -> lsim.Metric:
    return lsim.load_metric("l2", device="cpu", **({"size": None} | options))


def of_source(frames: np.ndarray, parameter: np.ndarray | None = None) -> Any:
    position = np.linspace(0, 1, len(frames)) if parameter is None else parameter
    sequence = sequences.TrainingSequence("A/s.u", frames, position)
    return sequences.read_checked(SimpleNamespace(names=["A/s.u"], read=lambda index: sequence), 0)


def of_reader(frames: np.ndarray, missing: str) -> Any:
    class Sequence(LazySequence):
        def read(self) -> tuple[np.ndarray, np.ndarray]:
            return frames, np.linspace(0, 1, len(frames))

    return decode.read_checked(Sequence(name="s", field="u", files=(), missing=missing), None)


def of_families(frames: np.ndarray) -> Any:
    stacked = {"u": np.ma.stack([frames, frames]) if np.ma.isMaskedArray(frames) else np.stack([frames] * 2)}
    return hardness(families.Families("shapes", stacked, np.linspace(0, 1, len(frames)), ()))


def written(frames: np.ndarray, folder: Path) -> Any:
    made_with = {"format": "npz"}
    layout.write_family(folder / "family", find_recipe("shapes"), frames, None, made_with)  # type: ignore[arg-type]


TAKE_FRAMES: dict[str, Callable[[Any], Any]] = {
    "preprocess": lsim.preprocess,
    "as_frames": pre.as_frames,
    "drop_alpha": pre.drop_alpha,
    "resize": lambda frames: pre.resize(frames, 5),
    "resize, linear": lambda frames: pre.resize(frames, 20, order=1),
    "value_range": pre.value_range,
    "value_range of what is known": lambda frames: pre.value_range(frames, masked=True),
    "range_of": lambda frames: pre.range_of(frames, RESIZED),
    "finite_frames": pre.finite_frames,
    "normalise": lambda frames: pre.normalise(
        frames, np.zeros(1), np.ones(1), floor=False, complete=None, double=frames.dtype == np.float64
    ),
    "truncate_to_8bit": pre.truncate_to_8bit,
    "apply": lambda frames: pre.apply(SETTINGS, frames, "sequence"),
    "apply with a mask": lambda frames: pre.apply(RESIZED, frames, (0, 1)),
    "apply_to_pairs": lambda frames: [pair[2].values for pair in pre.apply_to_pairs(SETTINGS, frames)],
    "distance": lambda frames: l2().distance(frames, frames[::-1]),
    "distance with a mask": lambda frames: l2().distance(frames, frames[::-1], mask="nan"),
    "pairwise": lambda frames: l2().pairwise(frames),
    "pairwise of pairs": lambda frames: l2(mask=True).pairwise(frames, "pair"),
    "prepare": lambda frames: l2(mask=True, size=12).prepare(frames, "sequence").values.numpy(),
    "each_pair": lambda frames: l2().each_pair_with_rounding(frames),
    "reference_errors": lambda frames: reference_errors(frames, size=None),
    "hardness": of_families,
    "defect": families.defect,
    "read_checked": of_source,
    "vary": lambda frames: NO_RANDOMNESS.vary(frames, np.random.default_rng(0)),
    "scale": sequences.Augmentation.scale,
    "planes": lambda frames: planes(frames, torch.device("cpu")).numpy(),
    "a reader's frames": lambda frames: of_reader(frames, "refuse"),
    "a reader's frames, missing kept": lambda frames: of_reader(frames, "keep"),
    "colour": pictures.colour,
    "check_claims": lambda frames: testing.check_claims(l2(), frames),
    "check_axioms": lambda frames: testing.check_axioms(l2(), frames),
    "check_features": lambda frames: testing.check_features(l2(), frames),
    "check_consistency": lambda frames: testing.check_consistency(l2(), frames),
    "check_missing_values": lambda frames: testing.check_missing_values(l2(), frames),
    "check_mask": lambda frames: testing.check_mask(l2(), frames),
    "check_gradients": lambda frames: testing.check_gradients(l2(), frames),
}
TAKE_ROWS: dict[str, Callable[[Any], Any]] = {
    "classical_map": lambda rows: mds.classical_map(rows).positions,
    "landmark_map": lambda rows: mds.landmark_map(rows, np.arange(len(rows))).positions,
    "choose_landmarks": lambda rows: mds.choose_landmarks(lambda k: rows[k], len(rows)),
    "pooled_spearman": lambda rows: pooled_spearman(list(rows), np.arange(rows.shape[1])),
    "pooled_spearman, ground truth": lambda rows: pooled_spearman([np.arange(6.0)] * 6, list(rows)),
    "pooled_spearman, rounding": lambda rows: pooled_spearman([np.arange(6.0)] * 6, np.arange(6), list(rows)),
    "scale_parameter": lambda rows: scale_parameter(rows[0], "s"),
    "read_checked, parameter": lambda rows: of_source(np.random.default_rng(0).random((6, 8, 8, 1)), rows[0]),
}


def outcome(function: Callable[[Any], Any], given: Any) -> Any:
    """What comes out: values, or an error with its words."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = function(given)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    if isinstance(found, sequences.TrainingSequence):
        return found.frames, found.parameter
    return found


def assert_masked_is_missing(function: Callable[[Any], Any], values: np.ndarray, missing: np.ndarray) -> None:
    filled = np.where(missing, 1e4, values).astype(values.dtype)
    masked = np.ma.masked_array(filled, missing)
    expected = outcome(function, np.where(missing, np.nan, values).astype(values.dtype))
    found = outcome(function, masked)
    np.testing.assert_equal(found, expected)
    assert not isinstance(found, str) or "AttributeError" not in found
    np.testing.assert_array_equal(masked.data, filled, "the array passed was changed")
    with pytest.raises(AssertionError):  # else this test shows nothing
        np.testing.assert_equal(outcome(function, filled), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", TAKE_FRAMES)
def test_frames_that_are_masked_are_missing(rng: np.random.Generator, name: str, dtype: type) -> None:
    values = rng.random((4, 16, 16, 1)).astype(dtype)
    missing = np.zeros(values.shape, bool)
    missing[1, 2:12, 3:12] = True
    assert_masked_is_missing(TAKE_FRAMES[name], values, missing)


@pytest.mark.parametrize("name", TAKE_ROWS)
def test_distances_and_parameters_that_are_masked_are_missing(rng: np.random.Generator, name: str) -> None:
    values = np.sort(rng.random((6, 6)) * 0.1, axis=1)
    missing = np.zeros(values.shape, bool)
    missing[0, 5] = missing[2, 3] = True
    assert_masked_is_missing(TAKE_ROWS[name], values, missing)


def test_masked_integers_of_a_reader_are_missing_pixels(rng: np.random.Generator) -> None:
    values = rng.integers(0, 99, (3, 8, 8, 1)).astype(np.int16)
    missing = rng.random(values.shape) < 0.2
    frames, _, _ = of_reader(np.ma.masked_array(values, missing), "keep")
    np.testing.assert_array_equal(frames, np.where(missing, np.nan, values))


def test_a_family_with_masked_frames_is_not_written(tmp_path: Path, rng: np.random.Generator) -> None:
    frames = np.ma.masked_greater(rng.random((11, 8, 8, 1)).astype(np.float32), 0.9)
    with pytest.raises(ValueError, match=r"expected finite frames, found missing values in frame 0"):
        written(frames, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_export_is_not_compared_on_masked_frames(rng: np.random.Generator) -> None:
    metric = SimpleNamespace(info=SimpleNamespace(minimum_size=64))
    frames = np.ma.masked_greater(rng.random((4, 64, 64)), 0.9)
    with pytest.raises(lsim.FramesError, match=r"expected finite mine frames .* masked values in frame 0"):
        agreement.cases(metric, [(64, 64)], {"mine": frames})  # type: ignore[arg-type]


def test_losses_and_calls_on_tensors_refuse_what_is_masked_and_say_so(rng: np.random.Generator) -> None:
    array = np.ma.masked_greater(rng.random((2, 1, 16, 16)).astype(np.float32), 0.9)
    tensor = torch.from_numpy(array.data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that its masked tensors are a prototype
        masked = masked_tensor(tensor, tensor < 0.9)
        for call in (SimulationLoss(l2()), l2()):
            for pair in ((array, tensor), (tensor, array), (masked, tensor), (tensor, masked)):
                with pytest.raises(ValueError, match=r"expected plain tensors .*, found Masked"):
                    call(*pair)


def test_masked_entries_of_a_mask_leave_their_pixels_out() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random((2, 12, 12))
    present = np.ones((12, 12), bool)
    present[2:5, 3:9] = False
    metric = lsim.load_metric("l2", size=None)
    unsure = np.ma.masked_array(np.ones((12, 12), bool), mask=~present)
    expected = metric.distance(a, b, mask=present)
    np.testing.assert_array_equal(metric.distance(a, b, mask=unsure), expected)
    assert metric.distance(a, b) != expected
