"""Decode stored values by the CF conventions, and count which of them are missing, and why.

A value is missing where it equals ``_FillValue`` or one of ``missing_value``, lies outside ``valid_min``,
``valid_max`` or ``valid_range``, is NaN, equals the default fill value of a NetCDF variable without
``_FillValue``, or was never written. Values are compared as they are stored, before ``scale_factor`` and
``add_offset``, and the attributes are cast to the stored dtype first: a ``missing_value`` of 1e20 in double
precision marks the 1e20 of single precision. xarray compares them as they are and ignores the valid range.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from pipeline.sources.readers.base import ReaderError

RULES_VERSION = 1
"""Increased when other values count as missing or are decoded otherwise; sequences are decoded again then."""

FILL_VALUES: Mapping[str, int | float] = {
    "i1": -127,
    "u1": 255,
    "i2": -32767,
    "u2": 65535,
    "i4": -2147483647,
    "u4": 4294967295,
    "i8": -9223372036854775806,
    "u8": 18446744073709551614,
    "f4": 9.969209968386869e36,
    "f8": 9.969209968386869e36,
}
"""NC_FILL_* of netcdf.h, by dtype: NetCDF's libraries return them for values that were never written."""

_EXACT_INTEGERS = 2**53
"""Integers up to this magnitude are exact in double precision."""
_LISTED_RANGES = 4
_UNWRITTEN = "never written"
_NAN = "stored as NaN"


class Rule(NamedTuple):
    """A rule by which values count as missing.

    Attributes
    ----------
    cause : str
    relation : str
    value : scalar
        In the dtype of the compared values.
    """

    cause: str
    relation: Literal["equal", "below", "above", "all equal"]
    value: np.generic

    def mask(self, values: np.ndarray) -> np.ndarray:
        """Mark the values of one frame for which the rule holds."""
        if self.relation == "below":
            return values < self.value
        if self.relation == "above":
            return values > self.value
        equal = np.isnan(values) if self.value != self.value else values == self.value
        if self.relation == "all equal" and not equal.all():
            return np.zeros(values.shape, dtype=bool)
        return equal


@dataclass(frozen=True)
class Coding:
    """Coding of a variable's stored values.

    Attributes
    ----------
    stored : dtype
        Dtype in which values are compared, with ``_Unsigned`` applied.
    decoded : dtype
        Dtype of the decoded values where none is missing.
    rules : tuple of Rule
    scale, offset : number or None
        ``scale_factor`` and ``add_offset`` in the decoded dtype.
    """

    stored: np.dtype
    decoded: np.dtype
    rules: tuple[Rule, ...] = ()
    scale: np.generic | None = None
    offset: np.generic | None = None

    @classmethod
    def of(
        cls, attributes: Mapping[str, Any], dtype: np.dtype, *, default_fill: bool, as_float: bool
    ) -> Coding:
        """Read the coding from a variable's attributes.

        Parameters
        ----------
        attributes : mapping
            As they are stored.
        dtype : dtype
            Of the stored values. Texts, dates and booleans are not decoded.
        default_fill : bool
            Whether the format's default fill value marks what was never written; ``_FillValue`` replaces it.
        as_float : bool
            Whether integers that may be missing become floating point even where none is missing.

        Raises
        ------
        ReaderError
            For an attribute that is no number, has the wrong length, or that the stored dtype can't hold.
        """
        if dtype.kind not in "iuf":
            return cls(dtype, dtype)
        stored = _signed_as_stated(attributes, dtype)
        rules = [*_fill_rules(attributes, dtype, stored), *_range_rules(attributes, dtype, stored)]
        if default_fill and "_FillValue" not in attributes:
            rules += _default_rules(dtype, stored)
        scale, offset = (_factor(attributes, name) for name in ("scale_factor", "add_offset"))
        decoded = _decoded_dtype(stored, scale, offset)
        marked = "_FillValue" in attributes or "missing_value" in attributes
        if decoded.kind != "f" and (marked or (as_float and rules)):
            decoded = _float_of(decoded)
        return cls(
            stored,
            decoded,
            tuple(rules),
            None if scale is None else decoded.type(scale),
            None if offset is None else decoded.type(offset),
        )

    def masks(self, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each cause with the values that it alone, or first, makes missing."""
        union = np.zeros(values.shape, dtype=bool)
        for rule in self.rules:
            mask = rule.mask(values) & ~union
            union |= mask
            yield rule.cause, mask
        if values.dtype.kind == "f":
            yield _NAN, np.isnan(values) & ~union

    def unpack(self, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Apply scale and offset in the given dtype."""
        result = values.astype(dtype)
        if self.scale is not None:
            result *= self.scale
        if self.offset is not None:
            result += self.offset
        return result


@dataclass
class MissingCount:
    """Missing values of an array: how many, why, and in which frames.

    Attributes
    ----------
    size : int
        Number of values in the array.
    frame_size : int
        Number of values in one frame.
    causes : dict of str to dict of int to int
        For each cause, number of missing values by frame.
    """

    size: int
    frame_size: int
    causes: dict[str, dict[int, int]] = field(default_factory=dict)

    def add(self, cause: str, frame: int, count: int) -> None:
        """Count the missing values of one frame."""
        if count:
            self.causes.setdefault(cause, {})[frame] = count

    def __bool__(self) -> bool:
        return bool(self.causes)

    def empty_frames(self) -> list[int]:
        """List the frames of which every value is missing."""
        totals: dict[int, int] = {}
        for frames in self.causes.values():
            for frame, count in frames.items():
                totals[frame] = totals.get(frame, 0) + count
        return sorted(frame for frame, count in totals.items() if count == self.frame_size)

    def __str__(self) -> str:
        parts = [
            f"{sum(frames.values())} {cause} ({list_frames(frames)})" for cause, frames in self.causes.items()
        ]
        count = sum(sum(frames.values()) for frames in self.causes.values())
        return f"{count} of {self.size} values missing: {', '.join(parts)}"


def decode(
    raw: np.ndarray, coding: Coding, extents: Sequence[int | None] = ()
) -> tuple[np.ndarray, MissingCount]:
    """Decode an array frame by frame; missing values become NaN.

    Parameters
    ----------
    raw : ndarray of shape (n, ...)
        The stored values.
    coding : Coding
    extents : sequence of int or None, optional
        For each axis, its length in storage where that is less than the array's: what lies beyond was never
        written.

    Returns
    -------
    values : ndarray of shape (n, ...)
        In ``coding.decoded``, or floating point where an integer is missing.
    missing : MissingCount

    Raises
    ------
    ReaderError
        When an integer beyond 2⁵³ would have to become floating point.
    """
    missing = MissingCount(raw.size, math.prod(raw.shape[1:]))
    if raw.ndim == 0 or coding.stored.kind not in "iuf":
        return raw, missing
    values = raw.astype(raw.dtype.newbyteorder("="), copy=False)
    if values.dtype != coding.stored:
        values = values.view(coding.stored)
    invalid = _find_missing(values, coding, extents, missing)
    dtype = coding.decoded if invalid is None else _float_of(coding.decoded)
    if dtype == values.dtype and coding.scale is None and coding.offset is None:
        result = values if invalid is None else values.copy()
    else:
        result = np.empty(values.shape, dtype=dtype)
        for number in range(len(values)):
            if values.dtype.kind in "iu" and dtype.kind == "f":
                _check_exact(values[number], None if invalid is None else invalid[number])
            result[number] = coding.unpack(values[number : number + 1], dtype)[0]
    if invalid is not None:
        result[invalid] = np.nan
    return result, missing


def _find_missing(
    values: np.ndarray, coding: Coding, extents: Sequence[int | None], missing: MissingCount
) -> np.ndarray | None:
    """Mark missing values and count them; None where there are none. One frame's masks at a time."""
    invalid = None
    for number in range(len(values)):
        frame = values[number, ...] if values.ndim > 1 else values[number : number + 1]
        mask = _unwritten(frame.shape, number, extents, values.ndim)
        missing.add(_UNWRITTEN, number, int(mask.sum()))
        for cause, marked in coding.masks(frame):
            marked &= ~mask
            missing.add(cause, number, int(marked.sum()))
            mask |= marked
        if mask.any():
            if invalid is None:
                invalid = np.zeros(values.shape, dtype=bool)
            invalid[number] = mask if values.ndim > 1 else mask[0]
    order = [_UNWRITTEN, *(rule.cause for rule in coding.rules), _NAN]
    missing.causes = {cause: missing.causes[cause] for cause in order if cause in missing.causes}
    return invalid


def _unwritten(shape: tuple[int, ...], number: int, extents: Sequence[int | None], ndim: int) -> np.ndarray:
    """Mark the values beyond the written part of one frame."""
    mask = np.zeros(shape, dtype=bool)
    for axis, length in enumerate(extents):
        if length is None:
            continue
        if axis == 0:
            mask |= number >= length
        elif ndim > 1:
            mask[(slice(None),) * (axis - 1) + (slice(length, None),)] = True
    return mask


def _check_exact(values: np.ndarray, invalid: np.ndarray | None) -> None:
    """Refuse 64-bit integers that floating point would round."""
    if values.dtype.itemsize < 8:
        return
    large = (values > _EXACT_INTEGERS) | (values < -_EXACT_INTEGERS if values.dtype.kind == "i" else False)
    if invalid is not None:
        large &= ~invalid
    if np.any(large):
        raise ReaderError(
            f"64-bit integers beyond 2^53, such as {values[large].flat[0]}, that must become floating point "
            "(they are packed, or values among them may be missing) would be rounded; subtract an offset and "
            "store them again"
        )


def _signed_as_stated(attributes: Mapping[str, Any], dtype: np.dtype) -> np.dtype:
    """Apply ``_Unsigned`` to the dtype."""
    stated = str(attributes.get("_Unsigned", "")).lower()
    kind = {("true", "i"): "u", ("false", "u"): "i"}.get((stated, dtype.kind), dtype.kind)
    return np.dtype(f"{kind}{dtype.itemsize}")


def _float_of(dtype: np.dtype) -> np.dtype:
    """Choose the floating point that holds the dtype's values: single precision up to 16 bits."""
    if dtype.kind == "f":
        return dtype
    return np.dtype(np.float32 if dtype.itemsize <= 2 else np.float64)


def _decoded_dtype(stored: np.dtype, scale: np.generic | None, offset: np.generic | None) -> np.dtype:
    """Choose the dtype of unpacked values, which no stored value is rounded in.

    As CF says it is that of the attributes, but for integers of 32 bits and more, and for an offset whose
    dtype isn't that of the scale: those are in double precision, as in xarray.
    """
    factors = [factor.dtype for factor in (scale, offset) if factor is not None]
    if not factors:
        return stored
    mixed = offset is not None and (scale is None or scale.dtype != offset.dtype)
    if stored.kind in "iu" and mixed:
        return np.dtype(np.float64)
    return np.result_type(stored, np.float32, *factors)


def _factor(attributes: Mapping[str, Any], name: str) -> np.generic | None:
    """Read ``scale_factor`` or ``add_offset``; integers count as double precision."""
    if name not in attributes:
        return None
    number = _numbers(attributes, name, (1,))[0]
    if not np.isfinite(number):
        raise ReaderError(f"attribute {name} is {number}; expected a finite number")
    return number if number.dtype.kind == "f" else np.float64(number)


def _numbers(attributes: Mapping[str, Any], name: str, lengths: tuple[int, ...] = ()) -> np.ndarray:
    """Read an attribute of one or more numbers; ``lengths`` says how many there may be."""
    value = attributes[name]
    array = np.ravel(np.asarray(value))
    if array.dtype.kind not in "iuf" or not array.size:
        raise ReaderError(f"attribute {name} is {value!r}; expected a number")
    if lengths and array.size not in lengths:
        raise ReaderError(f"attribute {name} holds {array.size} numbers; expected {lengths[0]}")
    return array


def _cast(
    attributes: Mapping[str, Any], name: str, numbers: np.ndarray, dtype: np.dtype, stored: np.dtype
) -> list[np.generic]:
    """Cast an attribute's numbers to the dtype that is compared; NaN marks nothing among integers."""
    if stored.kind == "f":
        with np.errstate(over="ignore"):
            return list(numbers.astype(stored))
    result: list[np.generic] = []
    for number in numbers:
        if number != number:
            continue
        exact = int(number) if np.isfinite(number) and number == np.trunc(number) else None
        if exact is not None and _fits(exact, stored):
            result.append(stored.type(exact))
        elif exact is not None and _fits(exact, dtype):  # -1 is 255 where _Unsigned holds
            result.append(np.array([exact], dtype=dtype).view(stored)[0])
        else:
            raise ReaderError(
                f"attribute {name} is {attributes[name]}, which is no value of the stored type {stored}; the "
                "attribute holds for values as they are stored, before scale_factor and add_offset"
            )
    return result


def _fits(number: int, dtype: np.dtype) -> bool:
    limits = np.iinfo(dtype)
    return int(limits.min) <= number <= int(limits.max)


def _fill_rules(attributes: Mapping[str, Any], dtype: np.dtype, stored: np.dtype) -> list[Rule]:
    """Make the rules of ``_FillValue`` and ``missing_value``."""
    rules = []
    for name, lengths in (("_FillValue", (1,)), ("missing_value", ())):
        if name in attributes:
            numbers = _numbers(attributes, name, lengths)
            for value in _cast(attributes, name, numbers, dtype, stored):
                rules.append(Rule(f"equal to {name} = {value}", "equal", value))
    return rules


def _range_rules(attributes: Mapping[str, Any], dtype: np.dtype, stored: np.dtype) -> list[Rule]:
    """Make the rules of ``valid_min``, ``valid_max`` and ``valid_range``."""
    bounds: dict[str, list[np.generic]] = {}
    for name, length in (("valid_range", 2), ("valid_min", 1), ("valid_max", 1)):
        if name in attributes:
            numbers = _numbers(attributes, name, (length,))
            if np.isnan(numbers).any():
                raise ReaderError(f"attribute {name} is {attributes[name]}; expected numbers, not NaN")
            bounds[name] = _cast(attributes, name, numbers, dtype, stored)
    if "valid_range" in bounds:
        low, high = bounds["valid_range"]
        if low > high:  # type: ignore[operator]
            raise ReaderError(f"attribute valid_range is {attributes['valid_range']}; expected lower, upper")
        for name, bound in (("valid_min", low), ("valid_max", high)):
            if name in bounds and bounds[name][0] != bound:
                raise ReaderError(
                    f"attribute {name} is {attributes[name]}, but valid_range {attributes['valid_range']}; "
                    "expected one of them"
                )
        return [
            Rule(f"below valid_range[0] = {low}", "below", low),
            Rule(f"above valid_range[1] = {high}", "above", high),
        ]
    rules = []
    if "valid_min" in bounds:
        rules.append(Rule(f"below valid_min = {bounds['valid_min'][0]}", "below", bounds["valid_min"][0]))
    if "valid_max" in bounds:
        rules.append(Rule(f"above valid_max = {bounds['valid_max'][0]}", "above", bounds["valid_max"][0]))
    return rules


def _default_rules(dtype: np.dtype, stored: np.dtype) -> list[Rule]:
    """Make the rule of the default fill value.

    Where ``_Unsigned`` changes the type it is an ordinary value, 129 for bytes, so it counts as missing only
    where a whole frame holds nothing else.
    """
    fill = FILL_VALUES.get(dtype.str[1:])
    if fill is None:
        return []
    value = np.array([fill], dtype=dtype).view(stored)[0]
    relation: Literal["equal", "all equal"] = "equal" if dtype == stored else "all equal"
    return [Rule(f"equal to NetCDF's default fill value {value}, so never written", relation, value)]


def list_frames(numbers: Iterable[int]) -> str:
    """Write frame numbers as ranges.

    Examples
    --------
    >>> list_frames([3]), list_frames([0, 1, 2, 5])
    ('frame 3', 'frames 0-2, 5')
    """
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:_LISTED_RANGES]]
    suffix = " and more" if len(ranges) > _LISTED_RANGES else ""
    single = len(ranges) == 1 and ranges[0][0] == ranges[0][1]
    return f"frame{'' if single else 's'} {', '.join(words)}{suffix}"
