"""The contract that every metric must pass, as functions for any test.

>>> import lsim
>>> from lsim.testing import check_metric
>>> check_metric(lsim.load_metric("ssim", size=32))

A custom metric passes if it defines ``embed`` and ``compare`` and claims only axioms that hold; see
:class:`lsim.metric.Metric`. No test framework is needed.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lsim.claims import ATOL, RTOL, ClaimError
from lsim.metric import Metric
from lsim.networks import LsimTrunk, Trunk
from lsim.preprocess import FramesError, as_array, finite_frames, value_range


def check_metric(metric: Metric, frame_size: int | None = None, seed: int = 0) -> None:
    """Check that a metric fulfils its contract, on frames of many kinds.

    The checks are, in this order:

    - the claims that runs check, too (:mod:`lsim.claims`): tensors of the right kind, reproducible results,
      unchanged frames and settings;
    - frames are unchanged, and values are float64 and finite;
    - the claimed axioms;
    - single pairs, batches of pairs and all pairs at once agree, as do the row of the reference and the
      first row of the matrix, and the call on tensors and ``distance``;
    - a frame with NaN or infinity makes its own distances NaN and no others;
    - missing pixels are left out, if the metric accepts a mask;
    - gradients are finite, and zero at equal frames;
    - the metric is the distance of its features that it claims to be.

    Parameters
    ----------
    metric : Metric
    frame_size : int, optional
        Side of the frames in pixels. Default: the size that the metric resizes to, so that nothing is
        resized; otherwise its smallest size, or 32.
    seed : int, default 0
        Seed of the random frames.

    Raises
    ------
    AssertionError
        When a property does not hold; the message names the metric, the kind of frames and the values.
    """
    try:
        _check_metric(metric, frame_size, seed)
    except ClaimError as error:
        raise AssertionError(str(error)) from error


def _check_metric(metric: Metric, frame_size: int | None, seed: int) -> None:
    smallest = max(metric.info.minimum_size, (metric.info.advised_sizes or (32, 32))[0])
    side = frame_size or metric.preprocessing.size or smallest
    kinds = example_frames(side, seed)
    for kind, frames in kinds.items():
        check_claims(metric, frames, kind)
        check_axioms(metric, frames, kind)
        check_consistency(metric, frames, kind)
    if not metric.preprocessing.mask:
        check_missing_values(metric, kinds["random"])
    check_mask(metric, kinds["random"])
    if metric.info.differentiable:
        check_gradients(metric, kinds["random"])
    if metric.info.feature_distance:
        check_features(metric, kinds["random"])


def _finite(frames: np.ndarray) -> np.ndarray:
    """Reject frames with missing values: NaN distances would hide the property that is checked."""
    frames = as_array(frames)
    finite = finite_frames(frames)
    if not finite.all():
        raise FramesError(
            f"expected finite frames to check a metric on, found NaN, infinity or masked values in frame "
            f"{np.argmin(finite)}"
        )
    return frames


def example_frames(side: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Make sequences that expose the weak points of a metric, by kind.

    Parameters
    ----------
    side : int
        Frames are (side, side) pixels.
    seed : int, default 0

    Returns
    -------
    dict of str to ndarray of shape (n, side, side, channel)
        Random, constant and equal frames; frames one grey level apart in one pixel; huge and tiny values;
        8-bit and 32-bit integers; half and double precision; one channel.
    """
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(np.linspace(0, 1, side), np.linspace(0, 1, side), indexing="ij")
    waves = np.stack([np.sin(2 * np.pi * (2 * x + y + shift)) for shift in (0, 0.1, 0.3, 0.7)])
    random = (waves[..., None] + 0.3 * rng.standard_normal((4, side, side, 3))).astype(np.float32)
    grey = rng.integers(0, 256, (side, side, 3)).astype(np.float32)
    grey[0, 0], grey[-1, -1] = 0, 255
    grey[side // 2, side // 2] = 100
    close = np.repeat(grey[None], 3, axis=0)
    close[1, side // 2, side // 2, 0] += 1
    close[2, side // 2, side // 2, 1] -= 1
    levels = np.clip(128 + 60 * random, 0, 255)
    constant = np.broadcast_to(np.array([3, 5, 3, -2], np.float32)[:, None, None, None], random.shape)
    return {
        "random": random,
        "constant": constant.copy(),
        "equal": np.repeat(random[:1], 3, axis=0),
        "one grey level apart in one pixel": close,
        "huge": random * np.float32(1e30),
        "tiny": random * np.float32(1e-30),
        "uint8": levels.astype(np.uint8),
        "int32": (random * 100_000).astype(np.int32),
        "float16": random.astype(np.float16),
        "float64": random.astype(np.float64) * np.pi,
        "single channel": random[..., :1],
    }


def check_claims(metric: Metric, frames: np.ndarray, kind: str = "given") -> None:
    """Check the claims that runs check on a metric's first frames: see :meth:`Metric.check_claims`.

    Parameters
    ----------
    metric : Metric
    frames : ndarray of shape (n, y, x, channel)
        Finite frames.
    kind : str
        Name of the frames in error messages.

    Raises
    ------
    AssertionError
        When a property does not hold.
    lsim.FramesError
        When frames hold NaN, infinity or masked values.
    """
    frames = _finite(frames)
    try:
        metric.check_claims(metric.prepare(frames, "sequence"))
    except ClaimError as error:
        raise AssertionError(f"{error} ({kind} frames)") from error


def check_axioms(metric: Metric, frames: np.ndarray, kind: str = "given") -> None:
    """Check the distances of a sequence against the axioms that the metric claims.

    Zero on itself is checked on the formula, not on the diagonal that ``pairwise`` fills in.

    Parameters
    ----------
    metric : Metric
    frames : ndarray of shape (n, y, x, channel)
        Finite frames.
    kind : str
        Name of the frames in error messages.

    Raises
    ------
    AssertionError
        When a property does not hold.
    lsim.FramesError
        When frames hold NaN, infinity or masked values.
    """
    frames = _finite(frames)
    original = frames.copy()
    matrix = metric.pairwise(frames)
    to_itself = metric.distance(frames, frames)
    reverse = metric.distance(frames[::-1], frames)
    direct = metric.distance(frames, frames[::-1])
    label = f"metric {metric.name!r}, {kind} frames"
    n = len(frames)
    itself = np.full(n, metric.info.distance_to_itself)

    _require(np.array_equal(original, frames), f"{label}: the frames passed were changed")
    _require(
        matrix.shape == (n, n) and matrix.dtype == np.float64,
        f"{label}: pairwise gives {matrix.shape} {matrix.dtype}, expected {(n, n)} float64",
    )
    _require(
        to_itself.shape == (n,) and to_itself.dtype == np.float64,
        f"{label}: distance gives {to_itself.shape} {to_itself.dtype}, expected {(n,)} float64",
    )
    _require(not np.isnan(matrix).any(), f"{label}: NaN among the distances of finite frames:\n{matrix}")
    _require(
        bool(np.isnan(itself).all() or (matrix.diagonal() == itself).all()),
        f"{label}: the diagonal is {matrix.diagonal()}, expected distance_to_itself = {itself}",
    )
    _agree(to_itself, matrix.diagonal(), f"{label}: distance of frames to themselves", atol=ATOL)
    if "non-negative" in metric.axioms:
        _require(bool((matrix >= 0).all()), f"{label}: claims non-negative, found {matrix.min()}")
    if "symmetric" in metric.axioms:
        _require(bool((matrix == matrix.T).all()), f"{label}: claims symmetric, found\n{matrix}")
        _agree(direct, reverse, f"{label}: claims symmetric; d(a, b) against d(b, a)", atol=ATOL)
    if "zero-on-itself" in metric.axioms:
        _agree(to_itself, np.zeros(n), f"{label}: claims zero on itself", atol=ATOL)
    if "triangle" in metric.axioms:
        for i, j, k in itertools.permutations(range(n), 3):
            detour = matrix[i, j] + matrix[j, k]
            _require(
                matrix[i, k] <= detour * (1 + RTOL) + ATOL,
                f"{label}: claims the triangle inequality, but d({i}, {k}) = {matrix[i, k]!r} > {detour!r} "
                f"= d({i}, {j}) + d({j}, {k})",
            )
    if "euclidean" in metric.axioms:
        _check_euclidean(matrix, label)


def _check_euclidean(matrix: np.ndarray, label: str) -> None:
    """Check that there are vectors with these distances: scalar products without negative eigenvalues."""
    squares = np.square(matrix)
    centred = squares - squares.mean(axis=0) - squares.mean(axis=1)[:, None] + squares.mean()
    eigenvalues = np.linalg.eigvalsh(-centred / 2)
    _require(
        eigenvalues.min() >= -(4 * len(matrix) * RTOL * squares.max() + ATOL),
        f"{label}: claims to be Euclidean, but no vectors have these distances; eigenvalues {eigenvalues} of "
        f"the scalar products of\n{matrix}",
    )


def check_features(metric: Metric, frames: np.ndarray, kind: str = "given") -> None:
    """Check that a metric is the claimed :attr:`MetricInfo.feature_distance`, to 1e-5 relative.

    Parameters
    ----------
    metric : Metric
    frames : ndarray of shape (n, y, x, channel)
        Finite frames.
    kind : str
        Name of the frames in error messages.

    Raises
    ------
    AssertionError
        When a property does not hold.
    lsim.FramesError
        When frames hold NaN, infinity or masked values.
    """
    frames = _finite(frames)
    with torch.no_grad():
        features = metric.embed_prepared(metric.prepare(frames, "sequence")).parts["features"].double().cpu()
    squared = (features[:, None] - features[None]).square().flatten(2).sum(2).numpy()
    distances = squared if metric.info.feature_distance == "squared euclidean" else np.sqrt(squared)
    label = (
        f"metric {metric.name!r}, {kind} frames: the {metric.info.feature_distance} distance of its features"
    )
    _agree(distances, metric.pairwise(frames), label, atol=ATOL)


def check_consistency(metric: Metric, frames: np.ndarray, kind: str = "given") -> None:
    """Check that all ways to compute the distance of two frames agree, to 1e-5 relative.

    Parameters
    ----------
    metric : Metric
    frames : ndarray of shape (n, y, x, channel)
        Finite frames, of the size that the metric resizes to, if any.
    kind : str
        Name of the frames in error messages.

    Raises
    ------
    AssertionError
        When a property does not hold.
    lsim.FramesError
        When frames hold NaN, infinity or masked values.
    """
    frames = _finite(frames)
    label = f"metric {metric.name!r}, {kind} frames"
    first, second = np.triu_indices(len(frames), 1)
    lo, hi = value_range(frames)
    matrix = metric.pairwise(frames)
    flat = matrix[first, second]

    batch = metric.distance(frames[first], frames[second], scope=(lo, hi))
    _agree(batch, flat, f"{label}: distance against pairwise")
    single = [
        metric.distance(frames[i], frames[j], scope=(lo, hi)) for i, j in zip(first, second, strict=True)
    ]
    _agree(np.concatenate(single), batch, f"{label}: distance one pair at a time against a batch of pairs")

    alone = metric.pairwise(frames[:3], scope="pair")
    pairs = [(0, 1), (0, 2), (1, 2)]
    singles = np.array([metric.distance(frames[i], frames[j])[0] for i, j in pairs])
    by_pairwise = np.array([alone[pair] for pair in pairs])
    _agree(by_pairwise, singles, f"{label}: pairwise(scope='pair') against distance")

    prepared = metric.prepare(frames, "sequence")
    _agree(metric.all_pairs(prepared), matrix, f"{label}: all_pairs(prepare(…)) against pairwise")
    row = metric.from_reference(prepared)
    _agree(row, matrix[0], f"{label}: from_reference against row 0 of all_pairs")

    planes = _planes(prepared.values)
    with torch.no_grad():
        by_call = metric(planes[first], planes[second]).double().cpu().numpy()
    _agree(by_call, flat, f"{label}: metric(reference, other) on prepared tensors against pairwise")

    with torch.no_grad():
        embedding = metric.embed(
            prepared.frames(quantised=metric.quantised, one_channel=metric.info.one_channel_suffices)
        )
        block = metric.compare(embedding[slice(0, 2)], embedding)
    _require(
        tuple(block.shape) == (2, len(frames)),
        f"{label}: compare gives a block of {tuple(block.shape)}, expected {(2, len(frames))}",
    )


def check_missing_values(metric: Metric, frames: np.ndarray) -> None:
    """Check that a frame with NaN or infinity makes its own distances NaN, and no others.

    Parameters
    ----------
    metric : Metric
    frames : ndarray of shape (n, y, x, channel)
        At least three finite frames in floating point; the check puts NaN into a copy of the second.

    Raises
    ------
    AssertionError
        When a property does not hold.
    lsim.FramesError
        When frames hold NaN, infinity or masked values.
    """
    frames = _finite(frames)
    rest = [k for k in range(len(frames)) if k != 1]
    intact = metric.pairwise(frames[rest])
    for value in (np.nan, np.inf, -np.inf):
        damaged = frames.copy()
        damaged[1, frames.shape[1] // 3, frames.shape[2] // 3, -1] = value
        label = f"metric {metric.name!r}, {value} in one pixel of frame 1 of {len(frames)}"
        matrix = metric.pairwise(damaged)
        _require(
            bool(np.isnan(matrix[1]).all() and np.isnan(matrix[:, 1]).all()),
            f"{label}: expected NaN in its row and column, found {matrix[1]} and {matrix[:, 1]}",
        )
        _agree(matrix[np.ix_(rest, rest)], intact, f"{label}: distances among the other frames")
        row = metric.from_reference(metric.prepare(damaged, "sequence"))
        _agree(row, matrix[0], f"{label}: from_reference against row 0 of pairwise")
        pairs = metric.distance(damaged[[0, 1, 2]], damaged[[2, 0, 1]])
        _require(
            np.isnan(pairs).tolist() == [False, True, True],
            f"{label}: distances of pairs (0, 2), (1, 0), (2, 1) are {pairs}; expected NaN in the last two",
        )


def check_mask(metric: Metric, frames: np.ndarray) -> None:
    """Check that missing pixels are left out of both frames, or that the metric rejects a mask.

    A mask without missing pixels changes nothing. Values under a mask don't matter. NaN in one frame acts as
    a mask of that frame. Without any common pixel the distance is NaN.

    Parameters
    ----------
    metric : Metric
    frames : ndarray of shape (n, y, x, channel)
        At least three finite frames in floating point.

    Raises
    ------
    AssertionError
        When a property does not hold.
    lsim.FramesError
        When frames hold NaN, infinity or masked values.
    """
    frames = _finite(frames)
    label = f"metric {metric.name!r}, with a mask"
    if not metric.info.takes_mask:
        try:
            metric.pairwise(frames, mask="nan")
        except ValueError:
            return
        raise AssertionError(f"{label}: claims to accept none, but computes a distance")
    valid = np.ones(frames.shape[:3], bool)
    _agree(metric.pairwise(frames, mask=valid), metric.pairwise(frames), f"{label} of nothing")
    _, y, x, _ = frames.shape
    valid[:, y // 4 : y // 3, x // 5 : x // 4] = False
    valid[1, :2, :3] = False
    masked = metric.pairwise(frames, mask=valid)
    off_diagonal = ~np.eye(len(masked), dtype=bool)
    _require(bool(np.isfinite(masked[off_diagonal]).all()), f"{label}: not finite:\n{masked}")
    # Change frames under the mask only, by enough to change a maximum over the frame, too.
    variant = np.where(valid[..., None], frames, frames.max() * 3 + 7)
    _require(
        not np.allclose(masked, metric.pairwise(variant), rtol=RTOL, atol=0),
        f"{label}: does not change the distances",
    )
    _agree(metric.pairwise(variant, mask=valid), masked, f"{label}: depends on values under it")
    with_nan = np.where(valid[..., None], frames, np.nan)
    _agree(metric.pairwise(with_nan, mask="nan"), masked, f"{label}: NaN against a mask array")
    lo, hi = value_range(with_nan, masked=True)
    pairs = metric.distance(with_nan[[0, 1]], with_nan[[1, 2]], (lo, hi), mask="nan")
    _agree(pairs, masked[[0, 1], [1, 2]], f"{label}: distance against pairwise")
    valid[2] = False
    nothing = metric.pairwise(frames, mask=valid)
    _require(
        bool(np.isnan(nothing[2]).all() and np.isfinite(nothing[0, 1])),
        f"{label}: frame 2 has no pixel left, expected NaN in its row alone, found\n{nothing}",
    )


def check_gradients(metric: Metric, frames: np.ndarray) -> None:
    """Check that gradients are finite in both arguments, nonzero where frames differ, and 0 where equal.

    A metric that truncates to 8 bit is constant between the steps: its gradients may be 0 everywhere.

    Parameters
    ----------
    metric : Metric
    frames : ndarray of shape (n, y, x, channel)
        At least three frames, no two of them equal.

    Raises
    ------
    AssertionError
        When a property does not hold.
    lsim.FramesError
        When frames hold NaN, infinity or masked values.
    """
    frames = _finite(frames)
    planes = _planes(metric.prepare(frames, "sequence").values)
    label = f"metric {metric.name!r}"
    # Without a certain distance of equal frames, these are no minimum.
    no_minimum = bool(np.isnan(metric.info.distance_to_itself))
    # The last pair has equal frames, and must not spoil the gradients of the batch.
    reference = planes[[0, 0, 1]].clone().requires_grad_()
    partners = planes[[1, 2, 1]].clone().requires_grad_()
    distances = metric(reference, partners)
    _require(tuple(distances.shape) == (3,), f"{label}: gives {tuple(distances.shape)} for 3 pairs")
    _require(
        distances.requires_grad or metric.quantised, f"{label}: claims gradients, but its distances have none"
    )
    with torch.no_grad():
        plain = metric(reference, partners)
    _agree(
        distances.detach().double().cpu().numpy()[:2],
        plain.double().cpu().numpy()[:2],
        f"{label}: values with gradients against values without",
    )
    gradients = torch.autograd.grad(distances[torch.isfinite(distances)].sum(), (reference, partners))
    for argument, gradient in zip(("reference", "other"), gradients, strict=True):
        _require(bool(torch.isfinite(gradient).all()), f"{label}: gradient of {argument} is not finite")
        largest = gradient.abs().amax(dim=(1, 2, 3)).tolist()
        _require(
            largest[2] == 0 or no_minimum,
            f"{label}: gradient of {argument} at equal frames is up to {largest[2]}, expected 0",
        )
        unsaturated = [
            size for size, at in zip(largest[:2], plain[:2], strict=True) if at < metric.info.saturates_at
        ]
        _require(
            metric.quantised or (bool(unsaturated) and min(unsaturated) > 0),
            f"{label}: gradient of {argument} vanishes for frames that differ: {largest[:2]}",
        )
    equal = planes[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(metric(equal, planes[:1]).sum(), equal)
    _require(
        bool((gradient == 0).all()) or no_minimum,
        f"{label}: gradient at equal frames is {gradient.abs().max().item()} at most, expected 0",
    )


def write_random_checkpoint(
    path: str | os.PathLike[str],
    trunk_class: type[Trunk] = LsimTrunk,
    seed: int = 0,
    size: int = 224,
) -> Path:
    """Write random weights in the format of the published ones, for tests and timings.

    Parameters
    ----------
    path : path
        File to write. Published names are rejected on loading, since their hashes are checked.
    trunk_class : a network in :data:`lsim.networks.TRUNKS`
    seed : int, default 0
    size : int, default 224
        Side of the frames that the deviation maps are made for.

    Returns
    -------
    Path
        The file, for ``load_metric(name, weights=path)``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = trunk_class()
        # A few channel weights are slightly negative, as in the published files.
        heads = [torch.rand(1, channels, 1, 1) - 0.02 for channels in trunk_class.CHANNELS]
        with torch.no_grad():
            shapes = [feature.shape[2:] for feature in trunk(torch.zeros(1, 3, size, size))]
        count = 1000
        squares = [(count - 1) * (1 + 20 * torch.rand(shape)) for shape in shapes]
    layers = trunk.state_dict()
    state = {
        f"{key}.{kind}": layers[f"{layer}.{kind}"]
        for layer, key in trunk_class.CHECKPOINT_KEYS.items()
        for kind in ("weight", "bias")
    }
    state |= {f"lin{k}.1.weight": head for k, head in enumerate(heads)}
    torch.save(
        {
            "stateDict": state,
            "normAcc": [torch.zeros(shape) for shape in shapes],
            "normM2": squares,
            "normCount": [count] * len(shapes),
        },
        path,
    )
    return Path(path)


def _planes(values: Tensor) -> Tensor:
    """Convert (n, y, x, channel) to (n, channel, y, x), as for the call on tensors."""
    return values.permute(0, 3, 1, 2)


def _agree(actual: np.ndarray, reference: np.ndarray, subject: str, atol: float = 0.0) -> None:
    """Require equal values within :data:`RTOL`; equal infinities and NaN in the same places agree."""
    if actual.shape == reference.shape and np.allclose(
        actual, reference, rtol=RTOL, atol=atol, equal_nan=True
    ):
        return
    raise AssertionError(f"{subject}: found\n{actual!r}\nexpected\n{reference!r}")


def _require(holds: bool, message: str) -> None:
    """Raise an AssertionError unless a condition holds, also under ``python -O``."""
    if not holds:
        raise AssertionError(message)
