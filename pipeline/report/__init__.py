"""The report: correlations, distances and frames → one self-contained HTML page and CSV tables.

The page opens from disk without a network: style and pictures are inside it. It shows what the stores
hold and computes nothing that the correlation stage computes, save each sequence's own correlation.
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from pipeline.report import contents, maps, pictures
from pipeline.report.contents import ReportError
from pipeline.report.matrix import MatrixContents, gather_matrices, is_matrix
from pipeline.sources.local_folder import local_folder
from pipeline.storage.address import absolute, is_address, join
from pipeline.storage.csv_tables import write_csv

__all__ = ["DamagedReportError", "ReportError", "is_matrix", "write_matrix_report", "write_report"]

NAMED = 5
"""Of what is damaged, in an error; the page names all."""
TITLE = "Which metric ranks simulations best?"
MATRIX_TITLE = "What lies near what?"
MAP = "map"
PAGE = "index.html"
PICTURE = "overview.png"
MARKDOWN = "correlations.md"


class DamagedReportError(ReportError):
    """A report that is written, and shows less than there should be: the message names what is damaged."""


def write_report(
    results: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    protocol: str | None = None,
    statistic: str = "spearman",
    title: str | None = None,
    matrix: str | os.PathLike[str] | None = None,
) -> Path | str:
    """Write the report of a folder of correlations.

    Parameters
    ----------
    results : path or address
        Folder that :func:`pipeline.correlate.correlate` wrote. Its record names the ``distances.zarr``,
        and that names the ``frames.zarr``.
    out : path or address, optional
        Folder of the page and its tables; default ``<results>/report``.
    protocol : str, optional
        The protocol to show first; default the first one that was computed.
    statistic : {"spearman", "pearson", "kendall"}
        What metrics are ranked by.
    title : str, optional
        Of the page; default the question that it answers.
    matrix : path or address, optional
        A ``matrix.zarr`` whose maps are shown as well.

    Returns
    -------
    Path, or str for an address
        The page, ``index.html``. Beside it lie ``correlations.csv``, ``differences.csv``,
        ``sequences.csv``, ``left_out.csv``, ``quarantined.csv``, ``unavailable.csv``,
        ``correlations.md``, the main table for a README, and ``overview.png``, frames and values in one
        picture.

    Raises
    ------
    ReportError
        When there are no correlations in ``results`` or they are damaged, the distances aren't where they
        say, or ``protocol`` or ``statistic`` is not among them.
    DamagedReportError
        Once the page is written, when it leaves out distances that are not as they were written.
    """
    location = absolute(results)
    place = join(location, "report") if out is None else absolute(out)
    with local_folder(location) as folder:
        found = contents.gather(location, folder, protocol, statistic)
    maps_of = None if matrix is None else gather_matrices(absolute(matrix))
    page = _render(
        "page.html.jinja",
        pictures=pictures.draw(found),
        heading=title or TITLE,
        **_matrix_section(maps_of),
        **vars(found),
    )
    with local_folder(place) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        tables: dict[str, pd.DataFrame] = found.tables | ({MAP: maps_of.table} if maps_of is not None else {})
        for name, table in tables.items():
            write_csv(table, folder / f"{name}.csv")
        (folder / MARKDOWN).write_text(contents.markdown(found), encoding="utf-8")
        (folder / PICTURE).write_bytes(pictures.overview(found))
        _write_page(folder, page)
    _refuse_damaged(place, [*found.damaged, *(maps_of.damaged if maps_of is not None else [])])
    return join(place, PAGE) if is_address(place) else Path(place, PAGE)


def write_matrix_report(
    matrix: str | os.PathLike[str], out: str | os.PathLike[str], *, title: str | None = None
) -> Path | str:
    """Write the report of a matrix of all frames: its maps, what lies near what, and what made it.

    Parameters
    ----------
    matrix : path or address
        A ``matrix.zarr``. It names its ``frames.zarr``; without that, there are no pictures of frames.
    out : path or address
        Folder of the page, ``index.html``, and of ``map.csv``, where each frame lies on each map.
    title : str, optional

    Returns
    -------
    Path, or str for an address
        The page.

    Raises
    ------
    ReportError
        When this is no matrix of all frames, or it has no distances yet.
    DamagedReportError
        Once the page is written, when it leaves out distances that are not as they were written.
    """
    found = gather_matrices(absolute(matrix))
    place = absolute(out)
    page = _render("matrix_page.html.jinja", heading=title or MATRIX_TITLE, **_matrix_section(found))
    with local_folder(place) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(found.table, folder / f"{MAP}.csv")
        _write_page(folder, page)
    _refuse_damaged(place, found.damaged)
    return join(place, PAGE) if is_address(place) else Path(place, PAGE)


def _refuse_damaged(place: str, damaged: list[str]) -> None:
    """Raise :class:`DamagedReportError` where a page that is written leaves out what is damaged."""
    if damaged:
        more = f"; and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
        raise DamagedReportError(
            f"{join(place, PAGE)} is written without what is damaged: {'; '.join(damaged[:NAMED])}{more}; "
            "'lsim verify' lists all that is damaged in a store"
        )


def _matrix_section(found: MatrixContents | None) -> dict[str, Any]:
    """Give the section on matrices its values; it is left out where there are none."""
    return {"maps": found, "matrix_pictures": None if found is None else maps.draw_matrices(found)}


def _render(template: str, **told: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=contents.shown,
    )
    environment.filters |= {"number": contents.number, "range": contents.number_range}
    style = resources.files("pipeline.report").joinpath("style.css").read_text()
    return environment.get_template(template).render(style=style, **told)


def _write_page(folder: Path, page: str) -> None:
    partial = folder / (PAGE + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(folder / PAGE)
