"""The report: correlations, distances and frames → one self-contained HTML page and CSV tables.

The page opens from disk without a network: style and pictures are inside it. It shows what the stores
hold and computes nothing that the correlation stage computes, save each sequence's own correlation.
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import jinja2

from pipeline.address import absolute, is_address, join
from pipeline.mirror import local_folder
from pipeline.report import contents, pictures
from pipeline.report.contents import ReportError
from pipeline.tables import write_csv

__all__ = ["ReportError", "write_report"]

TITLE = "Which metric ranks simulations best?"
PAGE = "index.html"
PICTURE = "overview.png"
MARKDOWN = "correlations.md"


def write_report(
    results: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    protocol: str | None = None,
    statistic: str = "spearman",
    title: str | None = None,
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
        When there are no correlations in ``results``, the distances aren't where they say, or
        ``protocol`` or ``statistic`` is not among them.
    """
    location = absolute(results)
    place = join(location, "report") if out is None else absolute(out)
    with local_folder(location) as folder:
        found = contents.gather(location, folder, protocol, statistic)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=contents.shown,
    )
    environment.filters |= {"number": contents.number, "range": contents.number_range}
    page = environment.get_template("page.html.jinja").render(
        style=resources.files("pipeline.report").joinpath("style.css").read_text(),
        pictures=pictures.draw(found),
        heading=title or TITLE,
        **vars(found),
    )
    with local_folder(place) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in found.tables.items():
            write_csv(table, folder / f"{name}.csv")
        (folder / MARKDOWN).write_text(contents.markdown(found), encoding="utf-8")
        (folder / PICTURE).write_bytes(pictures.overview(found))
        partial = folder / (PAGE + ".partial")
        partial.write_text(page, encoding="utf-8")
        partial.replace(folder / PAGE)
    return join(place, PAGE) if is_address(place) else Path(place, PAGE)
