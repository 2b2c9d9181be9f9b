"""Pictures of the report: frames and matrices as PNG, curves and intervals as inline SVG.

Colours come from viridis, which is readable with every kind of colour blindness and in grey. Curves
take their colours from the page's style, so that they follow its light and dark scheme.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from PIL import Image

from pipeline.report.contents import Contents
from pipeline.report.ranking import Cell
from pipeline.report.reading import Strip
from pipeline.report.text import number
from pipeline.storage.safe_names import printable

FRAME_BYTES = 4_500_000
"""Bytes that all pictures of frames may take in the page together, as incompressible PNG in base64."""
THUMB_SIZES = (16, 144)
"""Smallest and largest height of a frame's picture, in pixels."""
BYTES_PER_PIXEL = 3 * 4 / 3
"""Three channels; base64 writes three bytes as four characters."""
LINES = 40
"""Thin lines in a curve's picture; more would be a smear."""
MATRIX_CELLS = 96
"""Rows and columns of a matrix's picture; larger matrices are thinned."""
MISSING = np.array([0x80, 0x80, 0x80], np.uint8)
"""Colour of pixels that are not finite."""

ACCENT, INK, SOFT, LINE = "#1f6f8b", "#1b1f27", "#5b6472", "#dde1e7"
OVERVIEW_SETS, OVERVIEW_FRAMES = 4, 5
AXIS_STARTS = (0.0, -0.2, -0.6, -1.0)
"""Where an axis of correlations may begin, each with four round steps to 1."""

WIDTH_INCHES = 11

WIDTH, HEIGHT, PAD = 160, 116, 12


@dataclass(frozen=True)
class Thumb:
    """A frame's picture: ``data:`` address, label beneath, and alternative text."""

    src: str
    label: str
    alt: str


@dataclass(frozen=True)
class CardPictures:
    """Pictures of a metric on a set: SVG of the curve and address of the matrix, both empty where missing."""

    curve: Markup
    matrix: str


@dataclass(frozen=True)
class SectionPictures:
    """Pictures of a set: frames of each example, and those of each metric's card."""

    strips: list[list[Thumb]]
    cards: list[CardPictures]


@dataclass(frozen=True)
class Tick:
    """A tick of an axis, in percent of its length, with its label."""

    at: float | None
    label: str


@dataclass(frozen=True)
class ForestRow:
    """A metric's value and interval, and where they lie in percent of the axis; None where there is none."""

    cell: Cell
    at: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Forest:
    """Values with their intervals on a common axis."""

    ticks: list[Tick]
    rows: list[ForestRow]


@dataclass(frozen=True)
class Pictures:
    """All pictures of the page.

    Attributes
    ----------
    forest : Forest
    sets : dict of str to SectionPictures
    worst : list of list of Thumb
        Frames of each of the worst-ranked sequences.
    scale : str
        Address of the colour scale of matrices.
    """

    forest: Forest
    sets: dict[str, SectionPictures]
    worst: list[list[Thumb]]
    scale: str


def draw_pictures(contents: Contents) -> Pictures:
    """Draw all pictures of the page."""
    strips = [strip for section in contents.sets for strip in section.examples]
    strips += [sequence.strip for sequence in contents.worst]
    height = thumb_height(strips)
    return Pictures(
        forest=forest(contents),
        sets={
            section.name: SectionPictures(
                strips=[draw_strip(strip, height) for strip in section.examples],
                cards=[
                    CardPictures(curve(card.metric, section.name, card.curves), matrix_image(card.matrix))
                    for card in section.cards
                ],
            )
            for section in contents.sets
        },
        worst=[draw_strip(sequence.strip, height) for sequence in contents.worst],
        scale=data_address(scale_image()),
    )


# -- Frames -------------------------------------------------------------------------------------------


def thumb_height(strips: list[Strip]) -> int:
    """Compute the height of frames, in pixels, with which all of them stay within :data:`FRAME_BYTES`."""
    area = 0.0  # all frames together, at a height of one pixel
    for strip in strips:
        if strip.frames is not None:
            area += len(strip.frames) * strip.frames.shape[2] / strip.frames.shape[1]
    if area == 0:
        return THUMB_SIZES[1]
    fits = math.isqrt(int(FRAME_BYTES / BYTES_PER_PIXEL / area))
    return min(max(fits, THUMB_SIZES[0]), THUMB_SIZES[1])


def draw_strip(strip: Strip, height: int) -> list[Thumb]:
    """Draw the frames of a strip; without frames the list is empty."""
    if strip.frames is None:
        return []
    thumbs = []
    images = colour(strip.frames)
    for image, position, parameter in zip(images, strip.positions, strip.parameters, strict=True):
        label = "reference" if position == 0 else number(parameter, 2).rstrip("0").rstrip(".")
        role = "reference frame" if position == 0 else f"frame {position}, parameter {label}"
        address = data_address(shrink(image, height))
        thumbs.append(Thumb(address, label, f"{strip.dataset}, {strip.sequence}: {role}"))
    return thumbs


def colour(frames: np.ndarray) -> np.ndarray:
    """Convert frames to 8-bit RGB, on one scale for the whole sequence.

    Three channels of 8 bit stay as they are. Three channels of another type are scaled one by one to their
    minimum and maximum over the frames, as the metrics see them. A single channel, or the magnitude of two
    or of more than four, goes through viridis. Alpha is dropped. Values that are not finite are grey.

    Parameters
    ----------
    frames : ndarray of shape (frame, y, x, channel)

    Returns
    -------
    ndarray of shape (frame, y, x, 3), uint8
    """
    if isinstance(frames, np.ma.MaskedArray) and np.ma.is_masked(frames):
        frames = np.ma.filled(np.ma.asanyarray(frames, dtype=np.float64), np.nan)
    if frames.shape[-1] == 4:
        frames = frames[..., :3]
    if frames.shape[-1] == 3 and frames.dtype == np.uint8:
        return frames
    values = frames.astype(np.float64)
    if values.shape[-1] not in (1, 3):
        values = np.sqrt((values**2).sum(axis=-1, keepdims=True))
    finite = np.isfinite(values)
    low = np.min(values, axis=(0, 1, 2), where=finite, initial=np.inf)
    high = np.max(values, axis=(0, 1, 2), where=finite, initial=-np.inf)
    span = np.where(high > low, high - low, 1.0)
    scaled = np.where(finite, (np.where(finite, values, 0) - np.where(high >= low, low, 0)) / span, 0)
    if scaled.shape[-1] == 1:
        rgb = matplotlib.colormaps["viridis"](scaled[..., 0], bytes=True)[..., :3].copy()
    else:
        rgb = (255 * scaled).round().astype(np.uint8)
    rgb[~finite.all(axis=-1)] = MISSING
    return rgb


def shrink(image: np.ndarray, height: int) -> Image.Image:
    """Scale an RGB image to the given height; small ones are enlarged without smoothing."""
    width = max(1, round(image.shape[1] * height / image.shape[0]))
    method = Image.Resampling.BOX if image.shape[0] >= height else Image.Resampling.NEAREST
    return Image.fromarray(image).resize((width, height), method)


# -- Matrices -----------------------------------------------------------------------------------------


def matrix_image(matrix: np.ndarray | None) -> str:
    """Draw a distance matrix, a pixel a cell, and return its address; empty without finite distances.

    Near is dark and far is bright. The diagonal and pairs without a distance stay transparent.
    """
    if matrix is None:
        return ""
    if len(matrix) > MATRIX_CELLS:
        frames = np.linspace(0, len(matrix) - 1, MATRIX_CELLS).round().astype(int)
        matrix = matrix[np.ix_(frames, frames)]
    is_drawn = np.isfinite(matrix) & ~np.eye(len(matrix), dtype=bool)
    if not is_drawn.any():
        return ""
    low, high = matrix[is_drawn].min(), matrix[is_drawn].max()
    scaled = np.where(is_drawn, matrix - low, 0) / (high - low if high > low else 1)
    rgba = matplotlib.colormaps["viridis"](scaled, bytes=True).copy()
    rgba[~is_drawn] = 0
    return data_address(Image.fromarray(rgba))


def scale_image() -> Image.Image:
    """Draw the colour scale of matrices, from near to far."""
    return Image.fromarray(matplotlib.colormaps["viridis"](np.linspace(0, 1, 64)[None], bytes=True))


def data_address(image: Image.Image) -> str:
    """Encode an image as the ``data:`` address of a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# -- Curves -------------------------------------------------------------------------------------------


def curve(metric: str, dataset: str, curves: list[tuple[np.ndarray, np.ndarray]]) -> Markup:
    """Draw scaled distance against ground truth as SVG; empty without a sequence.

    Each sequence is a thin line, their median a thick one, the middle 80 % a band, the ideal is dashed.

    Parameters
    ----------
    metric, dataset : str
        Named in the alternative text.
    curves : list of (targets, predictions)
        Both of shape (sequence, pair); predictions within [0.1, 1].
    """
    lines = [line for x, y in curves for line in zip(x, y, strict=True)]
    if not lines:
        return Markup("")
    largest = max(float(x.max()) for x, _ in lines)
    grid = np.linspace(min(float(x.min()) for x, _ in lines), largest, 12)
    on_grid = []
    for k, (x, y) in enumerate(lines):
        # Several pairs may be equally far apart (all pairs): their mean stands for them.
        levels, inverse = np.unique(x, return_inverse=True)
        lines[k] = (levels, np.bincount(inverse, y) / np.bincount(inverse))
        on_grid.append(np.interp(grid, *lines[k]))
    thin = lines[:: max(1, math.ceil(len(lines) / LINES))]
    low, middle, high = np.quantile(np.stack(on_grid), [0.1, 0.5, 0.9], axis=0)
    label = printable(
        f"{metric} on {dataset}: scaled distance against ground truth, {len(lines)} sequences; the median "
        f"goes from {number(float(middle[0]), 2)} to {number(float(middle[-1]), 2)}"
    )

    def points(x: np.ndarray, y: np.ndarray) -> str:
        x_pixels = PAD + (WIDTH - 2 * PAD) * x / largest
        y_pixels = HEIGHT - PAD - (HEIGHT - 2 * PAD) * y
        return " ".join(f"{a:.4g},{b:.4g}" for a, b in zip(x_pixels, y_pixels, strict=True))

    band = points(np.append(grid, grid[::-1]), np.append(low, high[::-1]))
    return Markup(
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f'<path class="axis" d="M{PAD} {PAD}V{HEIGHT - PAD}H{WIDTH - PAD}"/>'
        f'<text x="{WIDTH - PAD}" y="{HEIGHT - 3}" text-anchor="end">ground truth</text>'
        f'<text transform="translate({PAD - 4} {PAD}) rotate(-90)" text-anchor="end">distance</text>'
        f'<polyline class="ideal" points="{points(np.array([0, largest]), np.array([0.0, 1.0]))}"/>'
        f'<polygon class="band" points="{band}"/>'
        + "".join(f'<polyline class="thin" points="{points(*line)}"/>' for line in thin)
        + f'<polyline class="middle" points="{points(grid, middle)}"/></svg>'
    )


def forest(contents: Contents) -> Forest:
    """Place the metrics' values and intervals on the headline's data on a common axis."""
    cells = headline_cells(contents)
    low = axis_start([v for c in cells for v in (c.value, c.low, c.high) if not math.isnan(v)])

    def at(value: float) -> float | None:
        return None if math.isnan(value) else round(100 * (value - low) / (1 - low), 2)

    return Forest(
        ticks=[Tick(at(t), number(t, 2)) for t in np.linspace(low, 1, 5).tolist()],
        rows=[ForestRow(cell, at(cell.value), at(cell.low), at(cell.high)) for cell in cells],
    )


def headline_cells(contents: Contents) -> list[Cell]:
    """Get the cells of the headline's data from the main table, best first."""
    index = [column.name for column in contents.columns].index(contents.headline.dataset)
    return [row.cells[index] for row in contents.rows]


def axis_start(values: list[float]) -> float:
    """Choose where an axis of correlations begins; it ends at 1."""
    lowest = min(values, default=0.0)
    return 0.5 if lowest > 0.5 else next(start for start in AXIS_STARTS if start <= max(lowest, -1.0))


# -- One picture of it all ----------------------------------------------------------------------------


def overview(contents: Contents) -> bytes:
    """Draw a PNG for slides and front pages: frames of some sets beside the metrics' values and intervals."""
    firsts = [section.examples[0] for section in contents.sets if section.examples]
    strips = [strip for strip in firsts if strip.frames is not None][:OVERVIEW_SETS]
    cells = headline_cells(contents)[::-1]
    # Many metrics stand closer, and few large frames fill the height beside them.
    height = max(2.6, (0.34 if len(cells) <= 16 else 0.25) * len(cells) + 1.0, 1.25 * len(strips))
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=150)
    FigureCanvasAgg(figure)
    halves = figure.add_gridspec(
        1, 2, width_ratios=(1.25, 1) if strips else (0.001, 1),
        left=0.02, right=0.97, top=1 - 0.3 / height, bottom=0.5 / height, wspace=0.34,
    )  # fmt: skip
    if strips:
        _plot_frames(figure, halves[0], strips, height - 0.8)
    axes = figure.add_subplot(halves[1])
    _plot_intervals(axes, cells)
    dataset = printable(contents.headline.dataset)
    title = f"{contents.statistic.title()} correlation with the ground truth, {dataset}"
    axes.set_title(title, loc="right", fontsize=9, color=INK, parse_math=False)
    axes.set_xlabel("95 % intervals over sequences · 1 is a perfect ranking", fontsize=8, color=SOFT)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def _plot_frames(figure: Figure, place: SubplotSpec, strips: Sequence[Strip], inches: float) -> None:
    """Plot evenly spaced frames of each strip, a row a strip, within ``inches`` of height."""
    count = _frames_beside(strips, inches)
    rows = place.subgridspec(len(strips), count, wspace=0.05, hspace=0.28)
    for k, strip in enumerate(strips):
        assert strip.frames is not None
        images = colour(strip.frames)
        positions = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)
        for n, position in enumerate(positions):
            axes = figure.add_subplot(rows[k, n])
            axes.imshow(np.asarray(shrink(images[position], 320)))
            axes.set_axis_off()
            if n == 0:
                title = printable(strip.dataset)
                axes.set_title(title, loc="left", fontsize=9, color=INK, pad=3, parse_math=False)


def _plot_intervals(axes: Axes, cells: Sequence[Cell]) -> None:
    """Plot each metric's value and interval, the first at the bottom; names of the best are bold."""
    places = np.arange(len(cells))
    values = np.array([cell.value for cell in cells])
    bounds = np.array([(cell.low, cell.high) for cell in cells]).T
    axes.hlines(places, bounds[0], bounds[1], color=ACCENT, alpha=0.45, linewidth=3)
    axes.plot(values, places, "o", color=ACCENT, markersize=6)
    # Names are no formulas, whatever dollars they hold.
    metrics = [printable(cell.metric) for cell in cells]
    axes.set_yticks(places, metrics, fontsize=9, color=INK, parse_math=False)
    for tick, cell in zip(axes.get_yticklabels(), cells, strict=True):
        tick.set_fontweight("bold" if cell.mark == "best" else "normal")
    start = axis_start([v for v in (*bounds.ravel(), *values) if math.isfinite(v)])
    axes.set_xlim(start - 0.005, 1.01)
    axes.set_xticks(np.linspace(start, 1, 5))
    axes.set_ylim(-0.6, len(cells) - 0.4)
    axes.tick_params(axis="x", labelsize=8, colors=SOFT, length=0)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _frames_beside(strips: Sequence[Strip], height: float) -> int:
    """Choose the number of frames of each strip: as few, and so as large, as fit into a height in inches."""
    width = 0.5 * WIDTH_INCHES
    ratios = [strip.frames.shape[1] / strip.frames.shape[2] for strip in strips if strip.frames is not None]
    for count in range(3, OVERVIEW_FRAMES):
        if sum(1.28 * ratio * width / count for ratio in ratios) <= height:
            return count
    return OVERVIEW_FRAMES
