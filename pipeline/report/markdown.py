"""Write the main table of the report as Markdown, for a README."""

from __future__ import annotations

import re

from pipeline.report.contents import Column, Contents
from pipeline.report.ranking import Cell
from pipeline.report.text import number, number_range
from pipeline.storage.safe_names import printable

MOST_COLUMNS = 12
"""Metrics that the table has as columns; with more of them they are its rows."""


def write_markdown(contents: Contents) -> str:
    """Write the table with a column a metric and a row a set; pools first, with intervals.

    The best of a set is bold, as are those that cannot be told apart from it. With more than
    :data:`MOST_COLUMNS` metrics these are the rows.
    """
    pools_first = sorted(range(len(contents.columns)), key=lambda k: not contents.columns[k].pool)
    table = [[f"{contents.statistic} ({contents.protocol})", *map(_code, contents.metrics)]]
    for k in pools_first:
        column = contents.columns[k]
        table.append([_set_name(column), *(_cell_text(row.cells[k], column) for row in contents.rows)])
    if len(contents.metrics) > MOST_COLUMNS:
        table = [list(row) for row in zip(*table, strict=True)]
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([lines[0], "| --- |" + " --- |" * (len(table[0]) - 1), *lines[1:]]) + "\n"


def _set_name(column: Column) -> str:
    name = _plain_text(column.name)
    return f"*{name}*" if column.pool else _plain_text(column.title or column.name)


def _plain_text(text: str) -> str:
    """Escape what Markdown would take as markup, as an element, or as the end of a cell or row."""
    return re.sub(r"([\\`*_\[\]<>|~$&!#])", r"\\\1", printable(" ".join(text.split())))


def _code(name: str) -> str:
    """Write a metric's name as code, where it can be."""
    return f"`{name}`" if re.fullmatch(r"[\w.:+-]+", name) else _plain_text(name)


def _cell_text(cell: Cell, column: Column) -> str:
    text = number(cell.value, 2)
    if cell.mark:
        text = f"**{text}**"
    interval = number_range(cell.low, cell.high) if column.pool else ""
    return f"{text} ({interval.replace(' to ', '–')})" if interval else text
