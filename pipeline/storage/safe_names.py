"""What names may be: those of groups in a store, those of sequences, and all that is shown to people.

Names come from archives of others. One that is a path, or that hides a control code, must do no harm where
it becomes a folder, a line of a terminal or a cell of a table.
"""

from __future__ import annotations

import hashlib
import re

GROUP_CHARACTERS = 120
"""Longest name of a data set or a field: file systems take 255 bytes."""
SEQUENCE_CHARACTERS = 1000
"""Longest name of a sequence: it may be a path within its data set."""
SHOWN_CHARACTERS = 100
"""What is shown of a name that is longer than it may be."""

_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OURS = ("zarr.json", ".partial", ".tmp")
"""Endings of what a store itself keeps beside its groups."""
# Control codes of both sets, halves of surrogates (bytes that are no UTF-8), line separators, and what turns
# the direction of writing: a name with these reads as what it isn't.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]"
)


def group_fault(name: str) -> str:
    """Why a data set or a field can't have this name, which is that of a group and a folder; else empty."""
    if not _GROUP.fullmatch(name):
        return f"{shown(name)!r}: expected letters, digits, '.', '_' and '-', beginning with no sign"
    if len(name) > GROUP_CHARACTERS:
        return f"{shown(name)!r}: {len(name)} characters; expected {GROUP_CHARACTERS} at most"
    if name.lower().endswith(_OURS):
        return f"{name!r}: a store keeps files of its own under names that end in {', '.join(_OURS)}"
    return ""


def sequence_fault(name: str) -> str:
    """Why a sequence can't have this name; else empty."""
    if len(name) > SEQUENCE_CHARACTERS:
        return f"a name of {len(name)} characters; expected {SEQUENCE_CHARACTERS} at most"
    if _HIDDEN.search(name):
        return "control characters in the name"
    return "" if name else "an empty name"


def printable(text: str, keep: str = "\n\t") -> str:
    r"""The text with control characters written out (``\x1b``); those of ``keep`` stay."""
    return _HIDDEN.sub(
        lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(), text
    )


def shown(name: str) -> str:
    """A name that is safe to show: no control characters, and what is too long is cut, with a hash of all."""
    safe = printable(name, keep="")
    if len(safe) <= SHOWN_CHARACTERS:
        return safe
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{safe[:SHOWN_CHARACTERS]}…{digest}"
