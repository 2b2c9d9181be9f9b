"""Units of distances in the notation of UDUNITS, which CF metadata use."""

from __future__ import annotations

import re

_FACTOR = re.compile(r"([A-Za-zµΩ°%]+)(?:\^|\*\*)?(-?\d+)?")


def raise_units(units: str, power: int) -> str:
    """Raise a unit to a power: ``"m s-1"`` squared is ``"m2 s-2"``.

    Parameters
    ----------
    units : str
        A product of units, each with or without an exponent; anything else is put in brackets.
    power : int
        At least 1.

    Returns
    -------
    str
        Empty if ``units`` is.

    Examples
    --------
    >>> raise_units("Pa", 2), raise_units("kg m-3", 2), raise_units("1e-3 m/s", 2)
    ('Pa2', 'kg2 m-6', '(1e-3 m/s)2')
    """
    units = units.strip()
    if power == 1 or units in ("", "1"):
        return units
    factors = [_FACTOR.fullmatch(factor) for factor in re.split(r"[ .]+", units)]
    if None in factors:
        return f"({units}){power}"
    return " ".join(f"{m[1]}{int(m[2] or 1) * power}" for m in factors if m is not None)
