"""Pictures of the report: frames and matrices as PNG, curves and intervals as inline SVG.

Colours come from viridis, which is readable with every kind of colour blindness and in grey. Curves
take their colours from the page's style, so that they follow its light and dark scheme.
"""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from pipeline.report.contents import Contents, Strip, number
from pipeline.storage.safe_names import printable

FRAME_BYTES = 4_500_000
"""What all pictures of frames may take in the page together, as incompressible PNG in base64."""
THUMB_SIZES = (16, 144)
"""Smallest and largest height of a frame's picture, in pixels."""
BYTES_PER_PIXEL = 3 * 4 / 3
LINES = 40
"""Thin lines in a curve's picture; more would be a smear."""
MATRIX_CELLS = 96
MISSING = np.array([0x80, 0x80, 0x80], np.uint8)
"""Where a frame has no finite value."""

ACCENT, INK, SOFT, LINE = "#1f6f8b", "#1b1f27", "#5b6472", "#dde1e7"
OVERVIEW_SETS, OVERVIEW_FRAMES = 4, 5
AXIS_STARTS = (0.0, -0.2, -0.6, -1.0)
"""Where an axis of correlations may begin, each with four round steps to 1."""

WIDTH_INCHES = 11

WIDTH, HEIGHT, PAD = 160, 116, 12


def draw(contents: Contents) -> dict[str, Any]:
    """All pictures, by where they stand in the page."""
    strips = [strip for s in contents.sets for strip in s["examples"]]
    strips += [entry["strip"] for entry in contents.worst]
    height = thumb_height(strips)
    return {
        "forest": forest(contents),
        "sets": {
            s["name"]: {
                "strips": [draw_strip(strip, height) for strip in s["examples"]],
                "cards": [
                    {
                        "curve": curve(card["metric"], s["name"], card["curves"]),
                        "matrix": matrix_image(card["matrix"]),
                    }
                    for card in s["cards"]
                ],
            }
            for s in contents.sets
        },
        "worst": [draw_strip(entry["strip"], height) for entry in contents.worst],
        "scale": data_address(scale_image()),
    }


# -- Frames -------------------------------------------------------------------------------------------


def thumb_height(strips: list[Strip]) -> int:
    """Height of frames in pixels with which all of them stay within :data:`FRAME_BYTES`."""
    area = 0.0  # of all frames, at a height of one pixel
    for strip in strips:
        if strip.frames is not None:
            area += len(strip.frames) * strip.frames.shape[2] / strip.frames.shape[1]
    if area == 0:
        return THUMB_SIZES[1]
    fits = math.isqrt(int(FRAME_BYTES / BYTES_PER_PIXEL / area))
    return min(max(fits, THUMB_SIZES[0]), THUMB_SIZES[1])


def draw_strip(strip: Strip, height: int) -> list[dict[str, str]]:
    """The frames of a strip, each with address, label and alternative text; empty without frames."""
    if strip.frames is None:
        return []
    drawn = []
    colours = colour(strip.frames)
    for image, position, parameter in zip(colours, strip.positions, strip.parameters, strict=True):
        label = "reference" if position == 0 else number(parameter, 2).rstrip("0").rstrip(".")
        role = "reference frame" if position == 0 else f"frame {position}, parameter {label}"
        drawn.append(
            {
                "src": data_address(shrink(image, height)),
                "label": label,
                "alt": f"{strip.dataset}, {strip.sequence}: {role}",
            }
        )
    return drawn


def colour(frames: np.ndarray) -> np.ndarray:
    """Frames as 8-bit RGB, on one scale for the whole sequence.

    Three channels of 8 bit are taken as they are; three others are scaled one by one to their minimum
    and maximum over the frames, as the metrics see them. A single channel, or the magnitude of two or of
    more than four, goes through viridis. Alpha is dropped. What is not finite is grey.

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
    """An RGB image at the given height; small ones are enlarged without smoothing."""
    width = max(1, round(image.shape[1] * height / image.shape[0]))
    method = Image.Resampling.BOX if image.shape[0] >= height else Image.Resampling.NEAREST
    return Image.fromarray(image).resize((width, height), method)


# -- Matrices -----------------------------------------------------------------------------------------


def matrix_image(matrix: np.ndarray | None) -> str:
    """Address of a distance matrix as picture, a pixel a cell; empty where nothing is known.

    Near is dark and far is bright. The diagonal and what was not compared stay transparent.
    """
    if matrix is None:
        return ""
    if len(matrix) > MATRIX_CELLS:
        kept = np.linspace(0, len(matrix) - 1, MATRIX_CELLS).round().astype(int)
        matrix = matrix[np.ix_(kept, kept)]
    shown = np.isfinite(matrix) & ~np.eye(len(matrix), dtype=bool)
    if not shown.any():
        return ""
    low, high = matrix[shown].min(), matrix[shown].max()
    scaled = np.where(shown, matrix - low, 0) / (high - low if high > low else 1)
    rgba = matplotlib.colormaps["viridis"](scaled, bytes=True).copy()
    rgba[~shown] = 0
    return data_address(Image.fromarray(rgba))


def scale_image() -> Image.Image:
    """The colour scale of matrices, from near to far."""
    return Image.fromarray(matplotlib.colormaps["viridis"](np.linspace(0, 1, 64)[None], bytes=True))


def data_address(image: Image.Image) -> str:
    """An image as ``data:`` address of a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# -- Curves -------------------------------------------------------------------------------------------


def curve(metric: str, dataset: str, curves: list[tuple[np.ndarray, np.ndarray]]) -> Markup:
    """Scaled distance against ground truth: each sequence thin, their median thick, the ideal dashed.

    Parameters
    ----------
    metric, dataset : str
        For those who cannot see it.
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
        across = PAD + (WIDTH - 2 * PAD) * x / largest
        down = HEIGHT - PAD - (HEIGHT - 2 * PAD) * y
        return " ".join(f"{a:.4g},{b:.4g}" for a, b in zip(across, down, strict=True))

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


def forest(contents: Contents) -> dict[str, Any]:
    """Values with their intervals on the headline's data, as positions in percent of a common axis."""
    index = [column["name"] for column in contents.columns].index(contents.headline["dataset"])
    cells = [row["cells"][index] for row in contents.rows]
    known = [v for c in cells for v in (c["value"], c["low"], c["high"]) if not math.isnan(v)]
    low = axis_start(known)

    def at(value: float) -> float | None:
        return None if math.isnan(value) else round(100 * (value - low) / (1 - low), 2)

    return {
        "ticks": [{"at": at(t), "label": number(t, 2)} for t in np.linspace(low, 1, 5).tolist()],
        "rows": [
            {"metric": cell["metric"], "value": cell["value"], "mark": cell["mark"]}
            | {"range": (cell["low"], cell["high"])}
            | {"at": at(cell["value"]), "low": at(cell["low"]), "high": at(cell["high"])}
            for cell in cells
        ],
    }


def axis_start(values: list[float]) -> float:
    """Where an axis of correlations that ends at 1 begins."""
    lowest = min(values, default=0.0)
    return 0.5 if lowest > 0.5 else next(start for start in AXIS_STARTS if start <= max(lowest, -1.0))


# -- One picture of it all ----------------------------------------------------------------------------


def overview(contents: Contents) -> bytes:
    """A PNG for slides and front pages: frames of some sets beside the metrics' values and intervals."""
    strips = [
        s["examples"][0] for s in contents.sets if s["examples"] and s["examples"][0].frames is not None
    ]
    strips = strips[:OVERVIEW_SETS]
    index = [column["name"] for column in contents.columns].index(contents.headline["dataset"])
    cells = [row["cells"][index] for row in contents.rows][::-1]
    # Many metrics stand closer, and few large frames fill the height beside them.
    height = max(2.6, (0.34 if len(cells) <= 16 else 0.25) * len(cells) + 1.0, 1.25 * len(strips))
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=150)
    FigureCanvasAgg(figure)
    halves = figure.add_gridspec(
        1, 2, width_ratios=(1.25, 1) if strips else (0.001, 1),
        left=0.02, right=0.97, top=1 - 0.3 / height, bottom=0.5 / height, wspace=0.34,
    )  # fmt: skip
    if strips:
        count = _frames_beside(strips, height - 0.8)
        rows = halves[0].subgridspec(len(strips), count, wspace=0.05, hspace=0.28)
        for k, strip in enumerate(strips):
            assert strip.frames is not None
            images = colour(strip.frames)
            chosen = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)
            for n, position in enumerate(chosen):
                axes = figure.add_subplot(rows[k, n])
                axes.imshow(np.asarray(shrink(images[position], 320)))
                axes.set_axis_off()
                if n == 0:
                    title = printable(strip.dataset)
                    axes.set_title(title, loc="left", fontsize=9, color=INK, pad=3, parse_math=False)
    axes = figure.add_subplot(halves[1])
    places = np.arange(len(cells))
    values = np.array([cell["value"] for cell in cells])
    bounds = np.array([(cell["low"], cell["high"]) for cell in cells]).T
    axes.hlines(places, *bounds, color=ACCENT, alpha=0.45, linewidth=3)
    axes.plot(values, places, "o", color=ACCENT, markersize=6)
    # Names are no formulas, whatever dollars they hold.
    metrics = [printable(cell["metric"]) for cell in cells]
    axes.set_yticks(places, metrics, fontsize=9, color=INK, parse_math=False)
    for tick, cell in zip(axes.get_yticklabels(), cells, strict=True):
        tick.set_fontweight("bold" if cell["mark"] == "best" else "normal")
    start = axis_start([v for v in (*bounds.ravel(), *values) if math.isfinite(v)])
    axes.set_xlim(start - 0.005, 1.01)
    axes.set_xticks(np.linspace(start, 1, 5))
    axes.set_ylim(-0.6, len(cells) - 0.4)
    axes.tick_params(axis="x", labelsize=8, colors=SOFT, length=0)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    where = printable(contents.headline["dataset"])
    title = f"{contents.statistic.title()} correlation with the ground truth, {where}"
    axes.set_title(title, loc="right", fontsize=9, color=INK, parse_math=False)
    axes.set_xlabel("95 % intervals over sequences · 1 is a perfect ranking", fontsize=8, color=SOFT)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def _frames_beside(strips: list[Strip], height: float) -> int:
    """How many frames of each strip: as few, and so as large, as fit above one another in so many inches."""
    inches = 0.5 * WIDTH_INCHES
    ratios = [strip.frames.shape[1] / strip.frames.shape[2] for strip in strips if strip.frames is not None]
    for count in range(3, OVERVIEW_FRAMES):
        if sum(1.28 * ratio * inches / count for ratio in ratios) <= height:
            return count
    return OVERVIEW_FRAMES
