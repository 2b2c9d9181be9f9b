"""Format names and figures as the page shows them."""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

from pipeline.storage.safe_names import printable


def escape_controls(value: Any) -> Any:
    """Write out the control characters of a text; markup of the report itself and other values stay."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)


def number(value: float | None, digits: int = 3) -> str:
    """Format a figure; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def number_range(low: float | None, high: float | None, digits: int = 2) -> str:
    """Format an interval; empty where there is none."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return ""
    return f"{number(low, digits)} to {number(high, digits)}"


def significant(value: float | None) -> str:
    """Format a number of any size with three significant digits; a dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3g}".replace("-", "−")


def significant_range(low: float | None, high: float | None) -> str:
    """Format an interval of numbers of any size; empty where there is none."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"{significant(low)} to {significant(high)}"
