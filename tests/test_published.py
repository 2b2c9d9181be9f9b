"""Distances against those that the authors' own code gave for the same frames."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lsim

METRICS = {
    "LSiM": "lsim",
    "LSiM_noiseless": "lsim-noiseless",
    "LSiM_strongNoise": "lsim-strong-noise",
    "Skip_scratch": "lsim-skip",
    "L2": "l2",
    "SSIM": "ssim",
    "PSNR": "psnr",
    "MI": "vi",
}
"""The authors' name to ours."""

RTOL = dict.fromkeys(METRICS.values(), 1e-5) | dict.fromkeys(("l2", "ssim", "psnr", "vi"), 1e-6)
SEQUENCES = ("vec256", "scal256", "nonsq", "vec224")

pytestmark = [
    pytest.mark.shared,
    pytest.mark.usefixtures("published_weights"),
    pytest.mark.filterwarnings("ignore::lsim.SizeWarning"),
]


class Reference:
    """The frames that the authors' code was given, and what it answered."""

    def __init__(self, folder: Path) -> None:
        golden = folder / "golden"
        self.images = folder / "images"
        self.exceptions = json.loads((golden / "cases_exceptions.json").read_text())
        self.sequences, self.distances, self.cases, self.plume, self.features = (
            dict(np.load(golden / f"{name}.npz"))
            for name in ("sequences", "distances", "cases", "plume", "features_vec256_frame0")
        )

    def image(self, name: str) -> np.ndarray:
        return np.asarray(Image.open(self.images / f"plume{name}.png"))

    def pair(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """``vec256_0_5``: frames 0 and 5 of that sequence; ``plumeU8_ref_A``: the images, as bytes."""
        if name == "plumeU8_ref_A":
            return self.image("Reference")[..., :3], self.image("A")[..., :3]
        sequence, i, j = name.rsplit("_", 2)
        return self.sequences[sequence][int(i)], self.sequences[sequence][int(j)]


@pytest.fixture(scope="module")
def reference(shared: Path) -> Reference:
    return Reference(shared / "reference")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@cache
def published(name: str, size: int | None = 224, order: int = 0) -> lsim.Metric:
    return lsim.load_metric(METRICS[name], device="cpu", size=size, order=order, compat="published")


def agree(metric: str, found: np.ndarray, expected: np.ndarray) -> None:
    # Identical frames have a variation of information of 2e-17 there, of 0 here.
    np.testing.assert_allclose(found, expected, rtol=RTOL[METRICS[metric]], atol=1e-15)


# --- whole sequences, as the published evaluation goes through them --------------------------------------


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("metric", METRICS)
def test_all_pairs_of_a_sequence(reference: Reference, sequence: str, metric: str) -> None:
    matrix = published(metric).pairwise(reference.sequences[sequence])
    above = np.triu_indices(11, 1)
    agree(metric, matrix[above], reference.distances[f"{sequence}/{metric}"])
    agree(metric, matrix.T[above], reference.distances[f"{sequence}/{metric}"])


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("metric", ["LSiM", "LSiM_noiseless", "LSiM_strongNoise", "Skip_scratch"])
def test_network_in_double_precision_is_as_near(reference: Reference, sequence: str, metric: str) -> None:
    matrix = published(metric).pairwise(reference.sequences[sequence])
    exact = reference.distances[f"{sequence}/{metric}__fp64"]
    np.testing.assert_allclose(matrix[np.triu_indices(11, 1)], exact, rtol=5e-6)


# --- the plume example ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [True, False])
@pytest.mark.parametrize("metric", METRICS)
def test_plume_example(reference: Reference, metric: str, alpha: bool) -> None:
    channels = slice(None) if alpha else slice(3)
    images = [reference.image(name)[..., channels] for name in ("Reference", "A", "B")]
    assert images[0].shape[-1] == (4 if alpha else 3)
    found = [published(metric).distance(images[0], other)[0] for other in images[1:]]
    agree(metric, np.array(found), reference.plume[metric])


@pytest.mark.parametrize(
    ("metric", "printed"),
    [("LSiM", (0.3791, 0.4433)), ("L2", (0.0708, 0.0651)), ("SSIM", (0.3927, 0.4020))],
)
def test_plume_example_as_printed(reference: Reference, metric: str, printed: tuple[float, float]) -> None:
    """The numbers that the authors' README prints."""
    stack = np.stack([reference.image("Reference")] * 2), np.stack([reference.image(n) for n in "AB"])
    found = published(metric).distance(*stack, scope="pair")
    assert tuple(found.round(4)) == printed


# --- single pairs: sizes, orders, dtypes, constants, batches ----------------------------------------------

PAIRS = ("vec256_0_5", "nonsq_0_7", "scal256_0_10", "vec224_2_3", "plumeU8_ref_A")
FOUR_PAIRS = ([0, 0, 3, 2], [1, 5, 4, 10])


def pair_cases() -> list[tuple[str, str, int | None, int]]:
    """(pair, metric, size, order) of all keys of the form pair/metric/to<size>/order<k>."""
    sizes: list[tuple[int | None, int]] = [(None, 0)]
    sizes += [(size, order) for size in (128, 224, 320) for order in range(4)]
    cases = [(p, m, size, order) for p in PAIRS for m in ("LSiM", "Skip_scratch") for size, order in sizes]
    more = [(512, 0), (64, 0), (60, 0), (48, 0), *((s, 1) for s in (227, 225, 226, 223, 200, 222))]
    return cases + [("vec256_0_5", "LSiM", size, order) for size, order in more]


def key(pair: str, metric: str, size: int | None, order: int) -> str:
    return f"{pair}/{metric}/to{size}/order{order}"


@pytest.mark.parametrize("case", pair_cases(), ids=lambda case: key(*case))
def test_sizes_and_orders(reference: Reference, case: tuple[str, str, int | None, int]) -> None:
    pair, metric, size, order = case
    a, b = reference.pair(pair)
    agree(metric, published(metric, size, order).distance(a, b), reference.cases[key(*case)])


@pytest.mark.parametrize("metric", ["L2", "SSIM", "PSNR", "MI"])
@pytest.mark.parametrize("pair", PAIRS)
def test_classic_metrics_do_not_resize_single_pairs(reference: Reference, pair: str, metric: str) -> None:
    a, b = reference.pair(pair)
    agree(metric, published(metric).distance(a, b), reference.cases[f"{pair}/{metric}/native"])


def constant(value: float, channels: int = 3) -> np.ndarray:
    return np.full((256, 256, channels), value, np.float32)


def special_pairs(reference: Reference) -> dict[str, tuple[str, int | None, int, np.ndarray, np.ndarray]]:
    """Key of cases.npz → (metric, size, order, a, b), for all keys that name no plain pair."""
    vec256, scal256, nonsq = (reference.sequences[name] for name in ("vec256", "scal256", "nonsq"))
    a, b = vec256[0], vec256[5]
    pairs: dict[str, tuple[str, int | None, int, Any, Any]] = {
        "f64/vec256_0_5/LSiM/to224/order0": ("LSiM", 224, 0, a.astype(np.float64), b.astype(np.float64)),
        "int32/vec256_0_5/LSiM/to224/order0": ("LSiM", 224, 0, a.astype(np.int32), b.astype(np.int32)),
        "sym/vec256_5_0": ("LSiM", 224, 0, b, a),
        "order4": ("LSiM", 224, 4, a, b),
        "order5": ("LSiM", 224, 5, a, b),
        "both_None": ("LSiM", None, 0, a, b),
        "const/3_vs_5_1ch": ("LSiM", 224, 0, constant(3, 1), constant(5, 1)),
        "const/0_vs_vec256_0": ("LSiM", 224, 0, constant(0), a),
        "batch4_scal256/LSiM/to320/order1": ("LSiM", 320, 1, scal256[:4], scal256[4:8]),
        "batch4_nonsq/LSiM/to224/order3": ("LSiM", 224, 3, nonsq[:4], nonsq[4:8]),
    }
    constants = {
        "const/same3.5": (constant(3.5), constant(3.5)),
        "const/3_vs_5": (constant(3), constant(5)),
        "const/identical_vec256_0": (a, a),
    }
    four = tuple(vec256[side] for side in FOUR_PAIRS)
    for metric in ("LSiM", "L2", "SSIM", "PSNR", "MI"):
        suffix = "" if metric == "LSiM" else f"/{metric}"
        pairs |= {f"{name}{suffix}": (metric, 224, 0, *pair) for name, pair in constants.items()}
    for metric in ("L2", "SSIM", "PSNR", "MI"):
        pairs[f"batch4_vec256/{metric}/native"] = (metric, 224, 0, *four)
    for metric in ("LSiM", "Skip_scratch"):
        pairs[f"batch4_vec256/{metric}"] = (metric, 224, 0, *four)
    # The second channel is constant, with the same value in both frames.
    sources = {"float32": (a, b), "uint8": reference.pair("plumeU8_ref_A")}
    for dtype, sides in sources.items():
        left, right = (side.copy() for side in sides)
        left[..., 1] = right[..., 1] = 7
        pairs[f"partialconst/{dtype}/LSiM/to224"] = ("LSiM", 224, 0, left, right)
        pairs[f"partialconst/{dtype}/LSiM/toNone"] = ("LSiM", None, 0, left, right)
        pairs[f"partialconst/{dtype}/L2/native"] = ("L2", 224, 0, left, right)
        if dtype == "float32":
            cropped = left[:224, :224], right[:224, :224]
            pairs["partialconst/float32_224crop/LSiM/to224"] = ("LSiM", 224, 0, *cropped)
    for name in ("nan", "inf"):
        spoilt = a.copy()
        spoilt[128, 128, 0] = float(name)
        pairs[f"{name}/one_pixel"] = ("LSiM", 224, 0, spoilt, b)
    return pairs


def test_special_pairs(reference: Reference) -> None:
    for name, (metric, size, order, a, b) in special_pairs(reference).items():
        found = published(metric, size, order).distance(a, b)
        np.testing.assert_allclose(
            found, reference.cases[name], rtol=RTOL[METRICS[metric]], atol=1e-15, err_msg=name
        )


@pytest.mark.parametrize("metric", ["LSiM", "Skip_scratch"])
def test_pairs_one_by_one_and_with_scope_pair(reference: Reference, metric: str) -> None:
    left, right = (reference.sequences["vec256"][side] for side in FOUR_PAIRS)
    expected = reference.cases[f"batch4_vec256_single/{metric}"]
    single = [published(metric).distance(a, b)[0] for a, b in zip(left, right, strict=True)]
    agree(metric, np.array(single), expected)
    agree(metric, published(metric).distance(left, right, scope="pair"), expected)


def test_no_case_is_left_out(reference: Reference) -> None:
    covered = {key(*case) for case in pair_cases()} | special_pairs(reference).keys()
    covered |= {f"{pair}/{metric}/native" for pair in PAIRS for metric in ("L2", "SSIM", "PSNR", "MI")}
    covered |= {f"batch4_vec256_single/{metric}" for metric in ("LSiM", "Skip_scratch")}
    assert covered == reference.cases.keys()


# --- the trunk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["LSiM", "Skip_scratch"])
def test_feature_maps(reference: Reference, metric: str) -> None:
    frame = torch.from_numpy(reference.features["input"])
    with torch.no_grad():
        maps = published(metric).features(frame)  # type: ignore[attr-defined]
    names = [name for name in reference.features if re.fullmatch(rf"{metric}/relu\d", name)]
    assert len(maps) == len(names)
    for k, found in enumerate(maps):
        expected = reference.features[f"{metric}/relu{k}"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * expected.max(), err_msg=f"map {k}")


def test_input_of_the_trunk(reference: Reference) -> None:
    """Frame 0 as the authors' transform prepares it with its sequence: the same bits."""
    prepared = lsim.preprocess(reference.sequences["vec256"], compat="published")
    assert np.array_equal(prepared[0].transpose(2, 0, 1), reference.features["input"][0])


# --- what the authors' code raises on ---------------------------------------------------------------------


def test_half_precision_works(reference: Reference) -> None:
    """The authors' code raises: scipy resizes no half precision. Ours resizes the same values in single."""
    a, b = (side.astype(np.float16) for side in reference.pair("vec256_0_5"))
    found = published("LSiM").distance(a, b)
    assert np.array_equal(found, published("LSiM").distance(a.astype(np.float32), b.astype(np.float32)))
    np.testing.assert_allclose(found, reference.cases["vec256_0_5/LSiM/to224/order0"], rtol=1e-2)


def test_two_dimensional_frames_work(reference: Reference) -> None:
    a, b = reference.pair("scal256_0_10")
    found = published("LSiM").distance(a[..., 0], b[..., 0])
    agree("LSiM", found, reference.cases["scal256_0_10/LSiM/to224/order0"])


def test_two_channels_say_how(reference: Reference) -> None:
    a, b = reference.pair("vec256_0_5")
    with pytest.raises(ValueError, match=r"2 channels.*separate fields: frames\[\.\.\., \[i\]\]"):
        published("LSiM").distance(a[..., :2], b[..., :2])


def test_size_32_names_the_smallest() -> None:
    with pytest.raises(ValueError, match=r"'lsim'.*32×32.*smallest that works is 44×44"):
        published("LSiM", 32)


def test_order_none_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"order must be one of .*None"):
        lsim.load_metric("lsim", order=None, compat="published")  # type: ignore[arg-type]


def test_all_exceptions_are_covered(reference: Reference) -> None:
    assert {name for name, *_ in reference.exceptions} == {
        "f16/vec256_0_5/LSiM/to224/order0",
        "2ch",
        "2d_noChannel",
        "vec256_0_5/LSiM/to32/order0",
        "orderNone_to224",
    }
