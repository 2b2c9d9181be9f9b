"""Write tables as CSV whose texts no spreadsheet runs as formulas.

Names of sequences and files come from archives of others. To a spreadsheet, a cell that begins with ``=``,
``+``, ``-`` or ``@``, or one of their wide forms, is a formula. Such a text gets an apostrophe in front, as
does one that begins with an apostrophe; :func:`read_csv` removes it. Numbers stay numbers.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pandas as pd

_FORMULA = re.compile(r"[=+\-@＝＋－＠\t\r\n']")


def as_text(value: Any) -> Any:
    """Put an apostrophe before a text that could be a formula; return other values as they are."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def write_csv(table: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table to a CSV file, without its index."""
    table.map(as_text).to_csv(path, index=False, errors="backslashreplace")


def read_csv(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a table that :func:`write_csv` wrote; numbers come as text."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return table.map(lambda text: text[1:] if text.startswith("'") else text)
