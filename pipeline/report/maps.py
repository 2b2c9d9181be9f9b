"""Pictures of an archive's maps: frames as dots on inline SVG, sequences as lines between them.

Dots of one colour are one path, so that thousands of frames are some tens of kilobytes. Lines and rings take
their colours from the page's style and follow its light and dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from pipeline.matrix.mds import FrameMap
from pipeline.matrix.neighbours import Frame
from pipeline.report import pictures
from pipeline.report.matrix import Matrix, MatrixContents, marked_frames, say_how_much

LARGE, SMALL = 480, 240
"""Widths of maps, in the SVG's own units."""
MARGIN = 0.04
"""Of the width, on every side."""
MANY = 700
"""Dots of more frames are smaller, and lines fainter."""
FLATTEST = 0.42
"""Height of a map over its width, at least: one whose frames lie on a line is still a picture."""
SHADES = 24
"""Steps of the colour scale."""
BRIGHTEST = 0.93
"""Where the colour scale ends: its last yellow is hard to see on white."""
HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
"""Colours of fields, to be told apart with every kind of colour blindness (Okabe and Ito)."""


THUMB_BYTES = 2_500_000
"""What all pictures of frames may take in the section, as incompressible PNG in base64."""
THUMB_SIZES = (16, 88)
"""Smallest and largest height of a frame's picture, in pixels."""


def draw_matrices(contents: MatrixContents) -> dict[str, Any]:
    """All pictures of the section, by where they stand in it."""
    thumbs = _thumbs(contents.frames_by_name)
    return {
        "scale": pictures.data_address(_scale()),
        "matrices": [_draw_matrix(matrix, thumbs) for matrix in contents.matrices],
    }


def _draw_matrix(matrix: Matrix, thumbs: dict[str, str]) -> dict[str, Any]:
    drawn = [one for one in matrix.maps if one.found is not None]
    first = drawn[0] if drawn else None
    several = len(dict.fromkeys(matrix.fields)) > 1
    sequences = _numbered(matrix)

    def picture(found: FrameMap, metric: str, colours: tuple[np.ndarray, list[str]], **options: Any) -> Any:
        label = (
            f"Map of {len(matrix.fields)} frames of {matrix.key} under {metric}: {say_how_much(found)} "
            "Lines join the frames of a sequence."
        )
        return draw_map(found.positions, colours, sequences, matrix.numbers == 0, label, **options)

    shades = by_parameter(matrix.parameter)
    by_fields = None
    if first is not None and first.found is not None and several:
        classes, hues, legend = by_field(matrix.fields)
        by_fields = picture(first.found, first.metric, (classes, hues)) | {"legend": legend}
    return {
        "metric": first.metric if first is not None else "",
        "main": None
        if first is None or first.found is None
        else picture(first.found, first.metric, shades, marked=matrix.marked),
        "says": "" if first is None or first.found is None else say_how_much(first.found),
        "found": None if first is None else first.found,
        "by_fields": by_fields,
        "small": [
            {"metric": one.metric, "reason": one.reason, "explained": None, "svg": ""}
            if one.found is None
            else {
                "metric": one.metric,
                "reason": "",
                "explained": one.found.explained,
                "svg": picture(one.found, one.metric, shades, width=SMALL)["svg"],
            }
            for one in matrix.maps
            if one is not first
        ],
        "marked": [_labelled(frame, thumbs) for frame in marked_frames(matrix)],
        "nearest": [
            {
                "of": _labelled(found.of, thumbs),
                "metric": found.metric,
                "nearest": [
                    _labelled(near.frame, thumbs) | {"distance": near.distances[found.metric]}
                    for near in found.nearest
                ],
            }
            for found in matrix.nearest
        ],
    }


def _labelled(frame: Frame, thumbs: dict[str, str]) -> dict[str, str]:
    """What stands for a frame: its picture, where there is one, and how it is called."""
    return {
        "src": thumbs.get(frame.name, ""),
        "sequence": frame.sequence.rpartition("/")[2],
        "number": str(frame.number),
        "name": frame.name,
    }


def _numbered(matrix: Matrix) -> np.ndarray:
    """The same number for the frames of a sequence."""
    numbers = {
        pair: k for k, pair in enumerate(dict.fromkeys(zip(matrix.fields, matrix.sequences, strict=True)))
    }
    return np.array([numbers[pair] for pair in zip(matrix.fields, matrix.sequences, strict=True)], dtype=int)


def _thumbs(frames: dict[str, np.ndarray]) -> dict[str, str]:
    """Addresses of frames as pictures, by name; those of one field are on one colour scale."""
    area = sum(frame.shape[1] / frame.shape[0] for frame in frames.values())
    fits = math.isqrt(int(THUMB_BYTES / pictures.BYTES_PER_PIXEL / area)) if area else THUMB_SIZES[1]
    height = min(max(fits, THUMB_SIZES[0]), THUMB_SIZES[1])
    found = {}
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in frames:
        alike.setdefault(tuple(name.split("/")[:2]), []).append(name)
    for names in alike.values():
        images = pictures.colour(np.stack([frames[name] for name in names]))
        for name, image in zip(names, images, strict=True):
            found[name] = pictures.data_address(pictures.shrink(image, height))
    return found


def by_parameter(parameter: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Class and colours of frames by their parameter in [0, 1]; −1 where there is none."""
    there = np.isfinite(parameter)
    classes = np.full(len(parameter), -1)
    classes[there] = np.clip((parameter[there] * SHADES).astype(int), 0, SHADES - 1)
    return classes, _shades()


def by_field(fields: Sequence[str]) -> tuple[np.ndarray, list[str], list[dict[str, str]]]:
    """Class and colours of frames by their field, and a legend; fields beyond the colours share the last."""
    names = list(dict.fromkeys(fields))
    shared = len(HUES) - 1
    class_of = {name: min(k, shared) for k, name in enumerate(names)}
    legend = [
        {"colour": HUES[k], "label": name if k < shared or len(names) == len(HUES) else "others"}
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
) -> dict[str, Any]:
    """A map as SVG, with places for numbers beside the frames that are marked.

    Parameters
    ----------
    positions : ndarray of shape (frame, 2)
        NaN for frames that aren't on it. Both axes have one scale: what is far on the map is far.
    colours : (ndarray of shape (frame,), list of str)
        Class of each frame, and the colour of each class.
    sequences : ndarray of shape (frame,), int
        Equal for the frames of one sequence, which follow one another.
    references : ndarray of shape (frame,), bool
        Frames with a ring.
    label : str
        For those who cannot see it.
    marked : sequence of int
    width : int

    Returns
    -------
    dict
        ``svg`` and ``marks``: number, place in percent, and side that the number goes to, of each frame
        that is marked.
    """
    classes, palette = colours
    x, y, height = _on_paper(positions, width)
    there = np.isfinite(x)
    lines = "".join(
        "M" + "L".join(_points(x, y, frames)) for frames in _runs(sequences, there) if len(frames) > 1
    )
    dots = "".join(
        f'<path stroke="{colour}" d="{_dots(x, y, there & (classes == k))}"/>'
        for k, colour in enumerate(palette)
        if (there & (classes == k)).any()
    )
    rings = _dots(x, y, there & references)
    size = ("small" if width == SMALL else "large") + (" many" if there.sum() > MANY else "")
    svg = Markup(
        f'<svg class="map {size}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f'<path class="lines" d="{lines}"/>'
        f'<path class="rings" d="{rings}"/><path class="gaps" d="{rings}"/>'
        f'<path class="halos" d="{_dots(x, y, there & ~references)}"/>'
        f'<g class="dots">{dots}</g></svg>'
    )
    marks = [
        {
            "number": n,
            "left": round(100 * x[k] / width, 2),
            "top": round(100 * y[k] / height, 2),
            "side": "before" if x[k] > 0.9 * width else "after",
        }
        for n, k in enumerate(marked, start=1)
        if there[k]
    ]
    return {"svg": svg, "marks": marks}


def _scale() -> Image.Image:
    """The colours of parameters, from 0 to 1."""
    return Image.fromarray(np.array([[tuple(bytes.fromhex(shade[1:])) for shade in _shades()]], np.uint8))


def _shades() -> list[str]:
    colours = matplotlib.colormaps["viridis"](np.linspace(0, BRIGHTEST, SHADES), bytes=True)
    return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b, _ in colours.tolist()]


def _on_paper(positions: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Positions in a box of that width, y downwards, and the box's height."""
    there = np.isfinite(positions).all(axis=1)
    if not there.any():
        return (*np.full((2, len(positions)), np.nan), round(FLATTEST * width))
    low, high = positions[there].min(axis=0), positions[there].max(axis=0)
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
    x[~there] = y[~there] = np.nan
    return x, y, round(tall + 2 * margin)


def _runs(sequences: np.ndarray, there: np.ndarray) -> list[np.ndarray]:
    """Frames of each sequence that are on the map, in order; a line skips those that aren't."""
    if not len(sequences):
        return []
    bounds = np.flatnonzero(np.diff(sequences)) + 1
    return [frames[there[frames]] for frames in np.split(np.arange(len(sequences)), bounds)]


def _points(x: np.ndarray, y: np.ndarray, frames: np.ndarray) -> list[str]:
    return [f"{a:.1f} {b:.1f}" for a, b in zip(x[frames].tolist(), y[frames].tolist(), strict=True)]


def _dots(x: np.ndarray, y: np.ndarray, chosen: np.ndarray) -> str:
    """Lines of no length: their round caps are the dots."""
    return "".join(f"M{point}h0" for point in _points(x, y, np.flatnonzero(chosen)))
