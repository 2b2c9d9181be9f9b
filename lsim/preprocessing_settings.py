"""Settings of preprocessing, which metrics with equal ones share."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

Compat: TypeAlias = Literal["default", "published"]
Floats: TypeAlias = Literal["single", "double"]

ORDERS = (0, 1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Preprocessing:
    """Settings by which a metric prepares frames; metrics with equal settings share the result.

    Attributes
    ----------
    size : int or None
        Both frame axes are resized to it; None keeps the frame's own size.
    order : int
        Order of the spline used to resize, 0 (nearest) to 5.
    compat : {"default", "published"}
        ``"published"`` keeps the rim of zeros that scipy writes at some sizes (see :func:`resize`), and
        whole numbers for integers of which some, but not all, channels are constant.
    mask : bool
        Keep single missing pixels (NaN or infinite) as NaN, out of minimum and maximum, instead of giving
        up their frame. For orders 0 and 1.
    precision : {"single", "double"}
        Floating point of prepared frames, and of all computation on them. With ``"double"`` frames of any
        dtype are resized and normalised in double precision, too.

    Examples
    --------
    >>> Preprocessing(size=128) == Preprocessing(np.int64(128))
    True
    """

    size: int | None = 224
    order: int = 0
    compat: Compat = "default"
    mask: bool = False
    precision: Floats = "single"

    def __post_init__(self) -> None:
        # Equal settings have to hash alike: NumPy's integers become Python's, and True is not 1.
        if self.size is not None:
            object.__setattr__(self, "size", _integer(self.size, "size must be a positive integer or None"))
            if self.size < 1:
                raise ValueError(f"size must be a positive integer or None, got {self.size!r}")
        object.__setattr__(self, "order", _integer(self.order, f"order must be one of {ORDERS}"))
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, got {self.order!r}")
        if self.mask and self.order > 1:
            raise ValueError(
                f"a mask goes with order 0 or 1, got {self.order}: splines spread a missing pixel everywhere"
            )
        if self.compat not in ("default", "published"):
            raise ValueError(f"compat must be 'default' or 'published', got {self.compat!r}")
        if self.precision not in ("single", "double"):
            raise ValueError(f"precision must be 'single' or 'double', got {self.precision!r}")


def _integer(value: Any, message: str) -> int:
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise ValueError(f"{message}, got {value!r}")
    return operator.index(value)
