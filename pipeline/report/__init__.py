"""The report: correlations, distances and frames → one self-contained HTML page and CSV tables.

The page opens from disk without a network: style and pictures are inside it. It shows the contents of the
stores and computes nothing that the correlation stage computes, save each sequence's own correlation.

``reading`` reads stores and tables, ``ranking`` ranks metrics, ``provenance`` collects how results were made,
and ``contents`` gathers all of it for the page; ``pictures`` draws it. ``matrix`` and ``maps`` do the same
for matrices of all frames.
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from pipeline.report import maps, pictures, text
from pipeline.report.contents import gather
from pipeline.report.markdown import write_markdown
from pipeline.report.matrix import MatrixContents, gather_matrices, is_matrix
from pipeline.report.reading import ReportError
from pipeline.report.rollouts import TABLES, gather_rollouts, is_ranking
from pipeline.sources.local_folder import local_folder
from pipeline.storage.address import absolute, is_address, join
from pipeline.storage.csv_tables import write_csv

__all__ = [
    "DamagedReportError",
    "ReportError",
    "is_matrix",
    "is_ranking",
    "write_matrix_report",
    "write_report",
    "write_rollouts_report",
]

NAMED = 5
"""Damaged distances that an error names; the page names all."""
TITLE = "Which metric ranks simulations best?"
MATRIX_TITLE = "What lies near what?"
ROLLOUTS_TITLE = "How far is each model from the simulation?"
MAP = "map"
PAGE = "index.html"
PICTURE = "overview.png"
MARKDOWN = "correlations.md"


class DamagedReportError(ReportError):
    """A report that was written without damaged distances; the message names them."""


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
        Title of the page; default the question that it answers.
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
        When there are no correlations in ``results`` or they are damaged, the distances are not where the
        record says, or ``protocol`` or ``statistic`` is not among the results.
    DamagedReportError
        After the page is written, when it leaves out distances that differ from what was written.
    """
    location = absolute(results)
    place = join(location, "report") if out is None else absolute(out)
    with local_folder(location) as folder:
        contents = gather(location, folder, protocol, statistic)
    matrices = None if matrix is None else gather_matrices(absolute(matrix))
    page = _render(
        "page.html.jinja",
        pictures=pictures.draw_pictures(contents),
        heading=title or TITLE,
        **_matrix_section(matrices),
        **vars(contents),
    )
    tables: dict[str, pd.DataFrame] = dict(contents.tables)
    damaged = list(contents.damaged)
    if matrices is not None:
        tables[MAP] = matrices.table
        damaged += matrices.damaged
    with local_folder(place) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            write_csv(table, folder / f"{name}.csv")
        (folder / MARKDOWN).write_text(write_markdown(contents), encoding="utf-8")
        (folder / PICTURE).write_bytes(pictures.overview(contents))
        _write_page(folder, page)
    _refuse_damaged(place, damaged)
    return join(place, PAGE) if is_address(place) else Path(place, PAGE)


def write_matrix_report(
    matrix: str | os.PathLike[str], out: str | os.PathLike[str], *, title: str | None = None
) -> Path | str:
    """Write the report of a matrix of all frames: its maps, nearest frames, and how it was made.

    Parameters
    ----------
    matrix : path or address
        A ``matrix.zarr``. It names its ``frames.zarr``, without which there are no pictures of frames.
    out : path or address
        Folder of the page, ``index.html``, and of ``map.csv`` with the position of each frame on each map.
    title : str, optional

    Returns
    -------
    Path, or str for an address
        The page.

    Raises
    ------
    ReportError
        When ``matrix`` is no matrix of all frames, or has no distances yet.
    DamagedReportError
        After the page is written, when it leaves out distances that differ from what was written.
    """
    matrices = gather_matrices(absolute(matrix))
    place = absolute(out)
    page = _render("matrix_page.html.jinja", heading=title or MATRIX_TITLE, **_matrix_section(matrices))
    with local_folder(place) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(matrices.table, folder / f"{MAP}.csv")
        _write_page(folder, page)
    _refuse_damaged(place, matrices.damaged)
    return join(place, PAGE) if is_address(place) else Path(place, PAGE)


def write_rollouts_report(
    results: str | os.PathLike[str], *, out: str | os.PathLike[str] | None = None, title: str | None = None
) -> Path | str:
    """Write the page of models against their reference, from what ``lsim rank`` wrote.

    Parameters
    ----------
    results : path or address
        Folder that :func:`pipeline.rollouts.ranking.rank` wrote. Its record names the ``rollouts.zarr``, and
        that the stores of frames, without which there are no pictures.
    out : path or address, optional
        Folder of the page, ``index.html``, and of the tables; default ``<results>/report``.
    title : str, optional

    Returns
    -------
    Path, or str for an address
        The page.

    Raises
    ------
    ReportError
        When the results are not complete.
    DamagedReportError
        After the page is written, when the ranking leaves out distances that differ from what was written.
    """
    location = absolute(results)
    place = join(location, "report") if out is None else absolute(out)
    with local_folder(location) as folder:
        contents = gather_rollouts(folder)
        tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in TABLES}
    page = _render("rollouts_page.html.jinja", heading=title or ROLLOUTS_TITLE, **vars(contents))
    with local_folder(place) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            write_csv(table, folder / f"{name}.csv")
        _write_page(folder, page)
    _refuse_damaged(place, contents.damaged)
    return join(place, PAGE) if is_address(place) else Path(place, PAGE)


def _refuse_damaged(place: str, damaged: list[str]) -> None:
    """Raise :class:`DamagedReportError` where the page leaves out damaged distances."""
    if damaged:
        suffix = f"; and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
        raise DamagedReportError(
            f"{join(place, PAGE)} is written without what is damaged: {'; '.join(damaged[:NAMED])}{suffix}; "
            "'lsim verify' lists all damage in a store"
        )


def _matrix_section(matrices: MatrixContents | None) -> dict[str, Any]:
    """Make the values of the section on matrices; it is left out where there are none."""
    return {"maps": matrices, "matrix_pictures": None if matrices is None else maps.draw_matrices(matrices)}


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=text.escape_controls,
    )
    environment.filters |= {"number": text.number, "range": text.number_range}
    environment.filters |= {"significant": text.significant, "significant_range": text.significant_range}
    style = resources.files("pipeline.report").joinpath("style.css").read_text()
    return environment.get_template(template).render(style=style, **values)


def _write_page(folder: Path, page: str) -> None:
    partial = folder / (PAGE + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(folder / PAGE)
