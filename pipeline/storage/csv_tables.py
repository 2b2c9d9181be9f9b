"""Tables as CSV that spreadsheets take as text where it is text.

Names of sequences and files come from archives of others, and a cell that begins with ``=``, ``+``, ``-`` or
``@``, or one of their wide forms, is a formula to a spreadsheet. Such a text is written with an apostrophe
before it, as is one that begins with an apostrophe; :func:`read_csv` takes it away again. Numbers stay
numbers.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pandas as pd

_FORMULA = re.compile(r"[=+\-@＝＋－＠\t\r\n']")


def as_text(value: Any) -> Any:
    """A cell as it is written: a text that could be a formula has an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def write_csv(table: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table, without its index."""
    table.map(as_text).to_csv(path, index=False, errors="backslashreplace")


def read_csv(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a table of text as it was before :func:`write_csv`; numbers come as text."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return table.map(lambda text: text[1:] if text.startswith("'") else text)
