"""Metrics of spatial gradients: GMSD, and the mean difference of gradients."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lsim.compiled import compiled
from lsim.doubles import Pair, add, subtract
from lsim.embedding import difference_of
from lsim.error_bounds import HALF_ULP_OF_DOUBLE, as_floats
from lsim.metric import Embedding, Metric, MetricInfo, positive_number, safe_sqrt
from lsim.pairs import FAST, all_pairs, has_kernel, pairs_in_torch, rows_in_torch, subtract_with_rests
from lsim.preprocess import Preprocessing
from lsim.rounding import FULL_SCALE, of_difference, of_each, of_sum
from lsim.threads import in_threads

STABILISER = 170.0
"""T of Xue et al. 2014, for a data range of 255."""

OF_GRADIENT = 0.8
"""Share of an error of values that remains in a magnitude, as a root mean square: a third of errors without a
pattern, by averages of 2×2 and Prewitt's filters; 0.5 of a pattern of the period that these pass best."""

LUMINANCE = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in Y of YIQ."""


class GMSD(Metric):
    """Gradient magnitude similarity deviation of each channel, and the mean of all channels.

    Frames are halved by averages of 2×2; their gradients are Prewitt's, divided by three, with zeros around
    the frame, as in the authors' code and in piq. Of the similarity of magnitudes m in each pixel, written as
    a difference,

        GMS = (2 mx my + T) / (mx² + my² + T) = 1 − (mx − my)² / (mx² + my² + T),

    the distance is the standard deviation over all pixels. The authors and piq convert colours to grey first.
    Channels of simulations aren't colours: here each has a distance of its own, by default.

    Parameters
    ----------
    downsample : bool, default True
        Halve frames first, as published.
    data_range : float, default 255
        T is 170 at 255, and proportional to its square.
    channels : {"each", "luminance"}, default "each"
        ``"luminance"`` takes three channels for red, green and blue, and compares their luminance alone, as
        piq does: 0.299 R + 0.587 G + 0.114 B.

    Examples
    --------
    >>> import lsim, numpy as np
    >>> float(lsim.load_metric("gmsd", size=None).pairwise(np.stack([np.eye(8), np.eye(8)]))[0, 1])
    0.0
    """

    copies_to_compare = False

    info = MetricInfo(
        title="gradient magnitude similarity deviation",
        source="Xue, Zhang, Mou, Bovik 2014, eq. 4–6; piq gmsd",
        minimum_size=3,
        takes_mask=True,
        one_channel_suffices=True,
    )
    algorithm_version = 2
    takes_rest = True

    def __init__(
        self,
        name: str,
        preprocessing: Preprocessing,
        device: torch.device,
        *,
        downsample: bool = True,
        data_range: float = 255.0,
        channels: str = "each",
    ) -> None:
        data_range = positive_number(name, "data_range", data_range)
        if channels not in ("each", "luminance"):
            raise ValueError(
                f"option 'channels' of metric {name!r} is 'each' or 'luminance', got {channels!r}"
            )
        if not isinstance(downsample, bool):
            raise ValueError(
                f"option 'downsample' of metric {name!r} must be true or false, got {downsample!r}"
            )
        # The default has the specification of versions without this option.
        options = {"channels": channels} if channels != "each" else {}
        super().__init__(name, preprocessing, device, downsample=downsample, data_range=data_range, **options)
        self._downsample = downsample
        self._luminance = channels == "luminance"
        # A weighted sum of channels has a rounding of its own, whatever the rest of the channels.
        self.takes_rest = not self._luminance
        self._stabiliser = STABILISER * (data_range / FULL_SCALE) ** 2

    def embed(self, frames: Tensor) -> Embedding:
        """Compute gradient magnitudes (n, channel, y, x): float64, since nearly equal ones are subtracted."""
        if self._luminance and frames.shape[3] == 3:
            red, green, blue = frames.double().unbind(3)
            frames = (LUMINANCE[0] * red + LUMINANCE[1] * green + LUMINANCE[2] * blue)[..., None]
        if has_kernel(frames):
            return Embedding({"magnitude": torch.stack(in_threads(self._compiled_magnitude, frames))})
        planes = frames.permute(0, 3, 1, 2).contiguous().double()
        if not self.preprocessing.mask:
            return Embedding({"magnitude": self._magnitude(planes)})
        missing = planes.isnan()
        # Before the gradients, into which NaN would spread.
        magnitude = self._magnitude(torch.where(missing, 0, planes))
        return Embedding({"magnitude": torch.where(self._touched(missing.float()), math.nan, magnitude)})

    def embed_with_rest(self, frames: Tensor, rest: Tensor) -> Embedding:
        """Add gradients with their rest, (n, 2, 2, channel, y, x): along x and y; value and rest."""
        value, remainder = (part.permute(0, 3, 1, 2).contiguous() for part in (frames, rest))
        missing = value.isnan()
        pair = torch.where(missing, 0, value), torch.where(missing, 0, remainder)
        gradient = torch.stack([torch.stack(part, 1) for part in self._gradients_with_rest(pair)], 1)
        return Embedding(self.embed(frames).parts | {"gradient": gradient})

    def _gradients_with_rest(self, planes: Pair) -> tuple[Pair, Pair]:
        """Compute three times Prewitt's gradients along x and y, of pairs of doubles (n, channel, y, x)."""
        if self._downsample:
            padded_planes = [_pad_to_even(part) for part in planes]
            corners = [[part[:, :, r::2, k::2] / 4 for part in padded_planes] for r in (0, 1) for k in (0, 1)]
            planes = functools.reduce(add, [(value, rest) for value, rest in corners])
        padded = [F.pad(part, (1, 1, 1, 1)) for part in planes]
        y, x = (length - 2 for length in padded[0].shape[2:])

        def at(r: int, k: int) -> Pair:
            return padded[0][:, :, r : r + y, k : k + x], padded[1][:, :, r : r + y, k : k + x]

        by_x = functools.reduce(add, [subtract(at(r, 2), at(r, 0)) for r in range(3)])
        by_y = functools.reduce(add, [subtract(at(2, k), at(0, k)) for k in range(3)])
        return by_x, by_y

    def _compiled_magnitude(self, frame: Tensor) -> Tensor:
        planes = frame.permute(2, 0, 1).to(torch.float64, memory_format=torch.contiguous_format)
        return torch.from_numpy(gradient_magnitude(planes.numpy(), 2 if self._downsample else 1))

    def _magnitude(self, planes: Tensor) -> Tensor:
        if self._downsample:
            planes = F.avg_pool2d(_pad_to_even(planes), 2)
        planes = F.pad(planes, (1, 1, 1, 1))
        columns = planes[:, :, :-2] + planes[:, :, 1:-1] + planes[:, :, 2:]
        rows = planes[..., :-2] + planes[..., 1:-1] + planes[..., 2:]
        by_x, by_y = columns[..., 2:] - columns[..., :-2], rows[:, :, 2:] - rows[:, :, :-2]
        return safe_sqrt(by_x.square() + by_y.square()) / 3

    def _touched(self, missing: Tensor) -> Tensor:
        """Tell where a missing pixel enters a magnitude."""
        if self._downsample:
            missing = F.max_pool2d(_pad_to_even(missing), 2)
        return F.max_pool2d(missing, 3, 1, 1) > 0

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        x, y = a.parts["magnitude"], b.parts["magnitude"]
        if not has_kernel(x, y):
            return rows_in_torch(self.paired, a, b)
        if "gradient" in a.parts:
            return pairs_in_torch(self.paired, a, b)
        return all_pairs(
            similarity_deviation,
            len(x),
            len(y),
            x.flatten(2).numpy(),
            y.flatten(2).numpy(),
            self._stabiliser,
            self.preprocessing.mask,
            symmetric=a is b,
            operations=16 * x[0].numel(),
        )

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound a deviation of q², q = |mx − my| / √(mx² + my² + T), whose mean is a few deviations at most.

        The root below is √T at least. Errors of two frames are independent, or alike and cancel out; without
        averages of 2×2 they are twice as large.
        """
        share = OF_GRADIENT * (1 if self._downsample else 2) / self._stabiliser**0.5
        error = share * torch.hypot(of_each(a, mean=True)[:, None], of_each(b, mean=True))
        mean = (8 * distances + error.square()).clamp(max=1)
        return error * (2 * mean.sqrt() + 3 * mean + error) + of_sum(distances, torch.float64)

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        x, y = a.parts["magnitude"].flatten(2), b.parts["magnitude"].flatten(2)
        missing = x.isnan() | y.isnan()
        present = (~missing).sum(2) if self.preprocessing.mask else x.shape[2]
        if self.preprocessing.mask:
            x, y = (torch.where(missing, 0, magnitude) for magnitude in (x, y))
        difference = x - y
        if "gradient" in a.parts:
            difference = torch.where(missing, 0, _difference_of_magnitudes(a, b))
        square = difference.square()
        dissimilarity = square / (square + (2 * x * y + self._stabiliser))
        deviation = dissimilarity - (dissimilarity.sum(2) / present)[..., None]
        if self.preprocessing.mask:
            deviation = torch.where(missing, 0, deviation)
        return safe_sqrt(deviation.square().sum(2) / present).mean(1)


class GradientDifference(Metric):
    """Mean absolute difference of gradients (forward differences along x and y), on [0, 1] per pixel.

    Differences of a pair are taken in double precision, so that a large offset between frames doesn't round
    the small slopes on top of it.
    """

    copies_to_compare = False

    info = MetricInfo(
        title="mean absolute difference of gradients",
        source="1/N Σ |∂(a − b)|; gradient term of the loss in Kim et al. 2019, Deep Fluids",
        axioms=frozenset({"non-negative", "symmetric", "zero-on-itself", "triangle"}),
        minimum_size=2,
        takes_mask=True,
        one_channel_suffices=True,
        blind_to=("offset",),
        takes_physical_values=True,
        power_of_units=1,
    )
    takes_rest = True
    rest_of_units = False

    def embed(self, frames: Tensor) -> Embedding:
        """Keep the frames: the gradient of a difference is cheaper than the difference of gradients."""
        return Embedding({"frames": as_floats(frames).contiguous()})

    def embed_with_rest(self, frames: Tensor, rest: Tensor) -> Embedding:
        """Keep the rest, too."""
        return Embedding(self.embed(frames).parts | {"rest": rest})

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        x, y = a.parts["frames"], b.parts["frames"]
        if not has_kernel(x, y):
            return rows_in_torch(self.paired, a, b)
        # Without rests, the kernel ignores the arrays in their place.
        x_rest, y_rest = (side.parts.get("rest", side.parts["frames"]) for side in (a, b))
        return all_pairs(
            absolute_gradient,
            len(x),
            len(y),
            *(part.flatten(2).numpy() for part in (x, x_rest, y, y_rest)),
            "rest" in a.parts,
            x.shape[3],
            self.preprocessing.mask,
            symmetric=a is b,
            operations=8 * x[0].numel(),
        )

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound a mean of differences of two values each, which stored offsets have rounded, too."""
        error = of_difference(a, b, stored=True, mean=True)
        if "rest" in a.parts:
            error = error + HALF_ULP_OF_DOUBLE * rows_in_torch(_largest_difference, a, b)
        return 2 * error + of_sum(distances, torch.float64)

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        if "rest" in a.parts:
            difference = difference_of(a, b, "frames")
        else:
            difference = a.parts["frames"].double() - b.parts["frames"].double()
        missing = difference.isnan()
        if self.preprocessing.mask:
            difference = torch.where(missing, 0, difference)
        steps = torch.cat([difference.diff(dim=axis).flatten(1) for axis in (1, 2)], 1).abs()
        if not self.preprocessing.mask:
            return steps.mean(1) / FULL_SCALE
        touched = torch.cat(
            [
                (missing[:, 1:] | missing[:, :-1]).flatten(1),
                (missing[:, :, 1:] | missing[:, :, :-1]).flatten(1),
            ],
            1,
        )
        return torch.where(touched, 0, steps).sum(1) / (~touched).sum(1) / FULL_SCALE


def _largest_difference(a: Embedding, b: Embedding) -> Tensor:
    return difference_of(a, b, "frames").nan_to_num().abs().flatten(1).amax(1) / FULL_SCALE


def _difference_of_magnitudes(a: Embedding, b: Embedding) -> Tensor:
    """Subtract magnitudes as (mx² − my²) / (mx + my), from differences of gradients: (n, channel, pixel)."""
    x, y = a.parts["gradient"], b.parts["gradient"]
    squares = ((x - y).sum(2) * (x[:, :, 0] + y[:, :, 0])).sum(1) / 9
    total = a.parts["magnitude"] + b.parts["magnitude"]
    return (squares / torch.where(total > 0, total, 1)).flatten(2)


def _pad_to_even(planes: Tensor) -> Tensor:
    """Append a row and a column of zeros where their number is odd."""
    return F.pad(planes, (0, planes.shape[3] % 2, 0, planes.shape[2] % 2))


@compiled(fastmath=FAST)
def gradient_magnitude(planes, step):  # type: ignore[no-untyped-def]
    """Compute Prewitt's gradient magnitude of a frame (channel, y, x) float64, averaged over step×step first.

    NaN wherever a pixel of the window is NaN.
    """
    channels, rows, columns = planes.shape
    height, width = -(-rows // step), -(-columns // step)
    out = np.empty((channels, height, width))
    padded = np.zeros((height + 2, width + 2))
    for c in range(channels):
        padded[1:-1, 1:-1] = 0
        for r in range(rows):
            into = padded[1 + r // step, 1:]
            row = planes[c, r]
            for start in range(step):
                strided = row[start::step]
                for k in range(strided.shape[0]):
                    into[k] += strided[k]
        for r in range(height):
            above, centre, below = padded[r], padded[r + 1], padded[r + 2]
            for k in range(width):
                left = above[k] + centre[k] + below[k]
                right = above[k + 2] + centre[k + 2] + below[k + 2]
                top = above[k] + above[k + 1] + above[k + 2]
                bottom = below[k] + below[k + 1] + below[k + 2]
                square = (right - left) * (right - left) + (bottom - top) * (bottom - top)
                valid = centre[k + 1] == centre[k + 1]
                out[c, r, k] = np.sqrt(square) / (3 * step * step) if valid else np.nan
    return out


@compiled(fastmath=FAST, error_model="numpy")
def similarity_deviation(i, j, out, x, y, stabiliser, masked):  # type: ignore[no-untyped-def]
    """Add the standard deviation of GMS, mean over channels, of frames i[p] of x and j[p] of y to out[p].

    Frames are gradient magnitudes (n, channel, pixel). Pixels with NaN are left out if ``masked``; otherwise
    the distance is NaN.
    """
    channels, pixels = x.shape[1:]
    dissimilarity = np.empty(pixels)
    for p in range(i.shape[0]):
        for c in range(channels):
            a = x[i[p], c]
            b = y[j[p], c]
            total = 0.0
            present = 0
            for k in range(pixels):
                difference = a[k] - b[k]
                square = difference * difference
                # Not a² + b²: one of the two would be rounded before the other is added, d(a, b) ≠ d(b, a).
                value = square / (square + (2 * a[k] * b[k] + stabiliser))
                dissimilarity[k] = value
                valid = value == value
                total += value if valid else 0.0
                present += valid
            mean = total / present
            squares = 0.0
            for k in range(pixels):
                deviation = dissimilarity[k] - mean
                square = deviation * deviation
                squares += square if square == square else 0.0
            complete = masked or present == pixels
            out[p] += np.sqrt(squares / present) / channels if complete else np.nan


@compiled(fastmath=FAST, error_model="numpy")
def absolute_gradient(i, j, out, x, x_rest, y, y_rest, with_rest, step, masked):  # type: ignore[no-untyped-def]
    """Add to out[p] the mean absolute gradient of the difference of frames i[p] and j[p], over 255.

    Frames of x and y are (n, y, x·channel), neighbours along x being ``step`` apart; their rests are read if
    ``with_rest``. Differences that are NaN are left out where ``masked``, else spoil it.
    """
    rows, columns = x.shape[1:]
    row = np.empty(columns)
    previous_row = np.empty(columns)
    for p in range(i.shape[0]):
        total = 0.0
        present = 0
        for r in range(rows):
            a = x[i[p], r]
            b = y[j[p], r]
            if with_rest:
                subtract_with_rests(a, x_rest[i[p], r], b, y_rest[j[p], r], row)
            else:
                for k in range(columns):
                    row[k] = np.float64(a[k]) - np.float64(b[k])
            part, count = _absolute_differences(row[step:], row)
            total += part
            present += count
            if r > 0:
                part, count = _absolute_differences(row, previous_row)
                total += part
                present += count
            row, previous_row = previous_row, row
        complete = masked or present == rows * (columns - step) + (rows - 1) * columns
        out[p] += total / (present * FULL_SCALE) if complete else np.nan


@compiled(fastmath=FAST)
def _absolute_differences(values, neighbours):  # type: ignore[no-untyped-def]
    """Sum |values − others| over those that aren't NaN, and count them."""
    total = 0.0
    count = 0
    for k in range(values.shape[0]):
        step = abs(values[k] - neighbours[k])
        total += step if step == step else 0.0
        count += step == step
    return total, count
