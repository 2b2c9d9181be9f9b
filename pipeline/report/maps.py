"""Draw maps of frames: frames are dots on inline SVG, sequences are lines between them.

Dots of one colour are one path, so that thousands of frames are some tens of kilobytes. Lines and rings take
their colours from the page's style and follow its light and dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from pipeline.matrix.mds import FrameMap
from pipeline.matrix.neighbours import Frame, Neighbours
from pipeline.report import pictures
from pipeline.report.matrix import Matrix, MatrixContents, MetricMap, marked_frames, say_how_much

LARGE, SMALL = 480, 240
"""Widths of maps, in the SVG's own units."""
MARGIN = 0.04
"""Margin on every side, as a share of the width."""
MANY = 700
"""With more frames, dots are smaller and lines fainter."""
FLATTEST = 0.42
"""Smallest height of a map over its width: frames that lie on a line still make a picture."""
SHADES = 24
"""Steps of the colour scale."""
BRIGHTEST = 0.93
"""End of the colour scale in viridis, whose last yellow is hard to see on white."""
HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
"""Colours of fields, to be told apart with every kind of colour blindness (Okabe and Ito)."""


THUMB_BYTES = 2_500_000
"""Bytes that all pictures of frames may take in the section, as incompressible PNG in base64."""
THUMB_SIZES = (16, 88)
"""Smallest and largest height of a frame's picture, in pixels."""


@dataclass(frozen=True)
class LabelledFrame:
    """A frame's picture (empty where it is missing) and label; distance where it is one of the nearest."""

    src: str
    sequence: str
    number: str
    name: str
    distance: float | None = None


@dataclass(frozen=True)
class NearestFrames:
    """A reference and the frames that a metric finds nearest to it."""

    of: LabelledFrame
    metric: str
    nearest: list[LabelledFrame]


@dataclass(frozen=True)
class Mark:
    """The number of a frame, where it stands in percent of the map, and on which side of the frame."""

    number: int
    left: float
    top: float
    side: str


@dataclass(frozen=True)
class MapPicture:
    """A map as SVG, with numbers to write over it."""

    svg: Markup
    marks: list[Mark]


@dataclass(frozen=True)
class LegendEntry:
    """A colour and the field that it stands for."""

    colour: str
    label: str


@dataclass(frozen=True)
class FieldsPicture:
    """A map whose frames are coloured by field."""

    svg: Markup
    legend: list[LegendEntry]


@dataclass(frozen=True)
class SmallMap:
    """The map of a metric beside the leading one; without SVG where there is a reason."""

    metric: str
    reason: str
    explained: float | None
    svg: Markup


@dataclass(frozen=True)
class MatrixPictures:
    """All pictures of one matrix.

    Attributes
    ----------
    metric : str
        The metric of the large map, the first that has one; empty where none has.
    main : MapPicture or None
        The large map.
    caption : str
        How much of the distances it shows.
    frame_map : FrameMap or None
        The positions that it shows.
    by_fields : FieldsPicture or None
        The same map coloured by field, where there are several.
    small : list of SmallMap
        Maps of the other metrics.
    marked : list of LabelledFrame
        The frames whose numbers stand on the large map.
    nearest : list of NearestFrames
    """

    metric: str
    main: MapPicture | None
    caption: str
    frame_map: FrameMap | None
    by_fields: FieldsPicture | None
    small: list[SmallMap]
    marked: list[LabelledFrame]
    nearest: list[NearestFrames]


@dataclass(frozen=True)
class SectionPictures:
    """All pictures of the section: address of the colour scale, and pictures of each matrix."""

    scale: str
    matrices: list[MatrixPictures]


def draw_matrices(contents: MatrixContents) -> SectionPictures:
    """Draw all pictures of the section on matrices."""
    thumbs = _draw_thumbs(contents.frames_by_name)
    return SectionPictures(
        scale=pictures.data_address(_scale()),
        matrices=[_draw_matrix(matrix, thumbs) for matrix in contents.matrices],
    )


def _draw_matrix(matrix: Matrix, thumbs: dict[str, str]) -> MatrixPictures:
    """Draw the large map of the first metric that has one, and small maps of the others."""
    leading = next((metric_map for metric_map in matrix.maps if metric_map.frame_map is not None), None)
    main, by_fields = None, None
    if leading is not None:
        main = _draw_metric_map(matrix, leading, by_parameter(matrix.parameter), marked=matrix.marked)
        if len(set(matrix.fields)) > 1:
            classes, hues, legend = by_field(matrix.fields)
            by_fields = FieldsPicture(_draw_metric_map(matrix, leading, (classes, hues)).svg, legend)
    frame_map = leading.frame_map if leading is not None else None
    return MatrixPictures(
        metric=leading.metric if leading is not None else "",
        main=main,
        caption=say_how_much(frame_map) if frame_map is not None else "",
        frame_map=frame_map,
        by_fields=by_fields,
        small=[_draw_small_map(matrix, small_map) for small_map in matrix.maps if small_map is not leading],
        marked=[_label(frame, thumbs) for frame in marked_frames(matrix)],
        nearest=[_label_nearest(neighbours, thumbs) for neighbours in matrix.nearest],
    )


def _draw_small_map(matrix: Matrix, metric_map: MetricMap) -> SmallMap:
    """Draw a small map, or give the reason why there is none."""
    if metric_map.frame_map is None:
        return SmallMap(metric_map.metric, metric_map.reason, None, Markup(""))
    picture = _draw_metric_map(matrix, metric_map, by_parameter(matrix.parameter), width=SMALL)
    return SmallMap(metric_map.metric, "", metric_map.frame_map.explained, picture.svg)


def _draw_metric_map(
    matrix: Matrix,
    metric_map: MetricMap,
    colours: tuple[np.ndarray, list[str]],
    *,
    marked: Sequence[int] = (),
    width: int = LARGE,
) -> MapPicture:
    """Draw the map of a metric that has one."""
    frame_map = metric_map.frame_map
    assert frame_map is not None
    label = (
        f"Map of {len(matrix.fields)} frames of {matrix.key} under {metric_map.metric}: "
        f"{say_how_much(frame_map)} Lines join the frames of a sequence."
    )
    sequences, references = _number_sequences(matrix), matrix.numbers == 0
    return draw_map(frame_map.positions, colours, sequences, references, label, marked=marked, width=width)


def _label(frame: Frame, thumbs: dict[str, str], distance: float | None = None) -> LabelledFrame:
    """Label a frame with its picture, where there is one, and its name."""
    return LabelledFrame(
        src=thumbs.get(frame.name, ""),
        sequence=frame.sequence.rpartition("/")[2],
        number=str(frame.number),
        name=frame.name,
        distance=distance,
    )


def _label_nearest(neighbours: Neighbours, thumbs: dict[str, str]) -> NearestFrames:
    metric = neighbours.metric
    return NearestFrames(
        of=_label(neighbours.of, thumbs),
        metric=metric,
        nearest=[_label(near.frame, thumbs, near.distances[metric]) for near in neighbours.nearest],
    )


def _number_sequences(matrix: Matrix) -> np.ndarray:
    """Give all frames of a sequence the same number."""
    sequences = list(zip(matrix.fields, matrix.sequences, strict=True))
    numbers = {sequence: k for k, sequence in enumerate(dict.fromkeys(sequences))}
    return np.array([numbers[sequence] for sequence in sequences], dtype=int)


def _draw_thumbs(frames: dict[str, np.ndarray]) -> dict[str, str]:
    """Draw frames, and return addresses by name; frames of one field are on one colour scale."""
    area = sum(frame.shape[1] / frame.shape[0] for frame in frames.values())
    fits = math.isqrt(int(THUMB_BYTES / pictures.BYTES_PER_PIXEL / area)) if area else THUMB_SIZES[1]
    height = min(max(fits, THUMB_SIZES[0]), THUMB_SIZES[1])
    names_by_field: dict[tuple[str, ...], list[str]] = {}
    for name in frames:
        names_by_field.setdefault(tuple(name.split("/")[:2]), []).append(name)
    addresses = {}
    for names in names_by_field.values():
        images = pictures.colour(np.stack([frames[name] for name in names]))
        for name, image in zip(names, images, strict=True):
            addresses[name] = pictures.data_address(pictures.shrink(image, height))
    return addresses


def by_parameter(parameter: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Classify frames by their parameter in [0, 1], and give each class a colour.

    Parameters
    ----------
    parameter : ndarray of shape (frame,)

    Returns
    -------
    classes : ndarray of shape (frame,), int
        −1 where the parameter is not finite.
    colours : list of str
    """
    finite = np.isfinite(parameter)
    classes = np.full(len(parameter), -1)
    classes[finite] = np.clip((parameter[finite] * SHADES).astype(int), 0, SHADES - 1)
    return classes, _shades()


def by_field(fields: Sequence[str]) -> tuple[np.ndarray, list[str], list[LegendEntry]]:
    """Classify frames by their field, and give each class a colour; fields beyond the colours share the last.

    Returns
    -------
    classes : ndarray of shape (frame,), int
    colours : list of str
    legend : list of LegendEntry
    """
    names = list(dict.fromkeys(fields))
    shared = len(HUES) - 1
    class_of = {name: min(k, shared) for k, name in enumerate(names)}
    legend = [
        LegendEntry(HUES[k], name if k < shared or len(names) == len(HUES) else "others")
        for k, name in enumerate(names[: len(HUES)])
    ]
    return np.array([class_of[name] for name in fields]), list(HUES), legend


def draw_map(
    positions: np.ndarray,
    colours: tuple[np.ndarray, list[str]],
    sequences: np.ndarray,
    references: np.ndarray,
    label: str,
    *,
    marked: Sequence[int] = (),
    width: int = LARGE,
) -> MapPicture:
    """Draw a map, with places for numbers beside the marked frames.

    Parameters
    ----------
    positions : ndarray of shape (frame, 2)
        NaN for frames that aren't on the map. Both axes have one scale.
    colours : (ndarray of shape (frame,), list of str)
        Class of each frame, and the colour of each class.
    sequences : ndarray of shape (frame,), int
        Equal for the frames of one sequence, which follow one another.
    references : ndarray of shape (frame,), bool
        Frames with a ring.
    label : str
        Alternative text.
    marked : sequence of int
        Frames that are numbered 1, 2, …
    width : int

    Returns
    -------
    MapPicture
    """
    classes, palette = colours
    x, y, height = _fit(positions, width)
    mapped = np.isfinite(x)
    lines = "".join(
        "M" + "L".join(_points(x, y, frames)) for frames in _runs(sequences, mapped) if len(frames) > 1
    )
    dots = "".join(
        f'<path stroke="{colour}" d="{_dots(x, y, mapped & (classes == k))}"/>'
        for k, colour in enumerate(palette)
        if (mapped & (classes == k)).any()
    )
    rings = _dots(x, y, mapped & references)
    size = ("small" if width == SMALL else "large") + (" many" if mapped.sum() > MANY else "")
    svg = Markup(
        f'<svg class="map {size}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f'<path class="lines" d="{lines}"/>'
        f'<path class="rings" d="{rings}"/><path class="gaps" d="{rings}"/>'
        f'<path class="halos" d="{_dots(x, y, mapped & ~references)}"/>'
        f'<g class="dots">{dots}</g></svg>'
    )
    marks = [
        Mark(
            number=n,
            left=round(100 * x[k] / width, 2),
            top=round(100 * y[k] / height, 2),
            side="before" if x[k] > 0.9 * width else "after",
        )
        for n, k in enumerate(marked, start=1)
        if mapped[k]
    ]
    return MapPicture(svg, marks)


def _scale() -> Image.Image:
    """Draw the colours of parameters, from 0 to 1."""
    return Image.fromarray(np.array([[tuple(bytes.fromhex(shade[1:])) for shade in _shades()]], np.uint8))


def _shades() -> list[str]:
    colours = matplotlib.colormaps["viridis"](np.linspace(0, BRIGHTEST, SHADES), bytes=True)
    return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b, _ in colours.tolist()]


def _fit(positions: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Fit positions into a box of a width; return x, y (downwards) and the box's height."""
    mapped = np.isfinite(positions).all(axis=1)
    if not mapped.any():
        empty = np.full(len(positions), np.nan)
        return empty, empty, round(FLATTEST * width)
    low, high = positions[mapped].min(axis=0), positions[mapped].max(axis=0)
    margin = MARGIN * width
    span = high - low
    # As tall as the frames need, within the bounds of a picture; one scale for both axes.
    inner = width - 2 * margin
    ratio = span[1] / span[0] if span[0] > 0 else 1.0
    tall = float(np.clip(ratio * inner, FLATTEST * width - 2 * margin, inner))
    scale = min(
        (room / length for room, length in zip((inner, tall), span, strict=True) if length > 0), default=1.0
    )
    middle = (low + high) / 2
    x = width / 2 + scale * (positions[:, 0] - middle[0])
    y = margin + tall / 2 - scale * (positions[:, 1] - middle[1])
    x[~mapped] = y[~mapped] = np.nan
    return x, y, round(tall + 2 * margin)


def _runs(sequences: np.ndarray, mapped: np.ndarray) -> list[np.ndarray]:
    """List the frames of each sequence that are on the map, in order."""
    if not len(sequences):
        return []
    bounds = np.flatnonzero(np.diff(sequences)) + 1
    return [frames[mapped[frames]] for frames in np.split(np.arange(len(sequences)), bounds)]


def _points(x: np.ndarray, y: np.ndarray, frames: np.ndarray) -> list[str]:
    return [f"{a:.1f} {b:.1f}" for a, b in zip(x[frames].tolist(), y[frames].tolist(), strict=True)]


def _dots(x: np.ndarray, y: np.ndarray, mask: np.ndarray) -> str:
    """Write dots as lines of no length, whose round caps are drawn."""
    return "".join(f"M{point}h0" for point in _points(x, y, np.flatnonzero(mask)))
