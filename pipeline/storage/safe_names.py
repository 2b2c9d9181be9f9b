"""Check names of groups and sequences, and make any text safe to show.

Names come from archives of others. A name that is a path, or hides a control code, must do no harm where it
becomes a folder, a line of a terminal or a cell of a table.
"""

from __future__ import annotations

import hashlib
import re

GROUP_CHARACTERS = 120
"""Longest name of a data set or a field: file systems take 255 bytes."""
SEQUENCE_CHARACTERS = 1000
"""Longest name of a sequence: it may be a path within its data set."""
SHOWN_CHARACTERS = 100
"""Longest name that is shown whole."""

_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OURS = ("zarr.json", ".partial", ".tmp")
"""Endings of a store's own files beside its groups."""
# Control codes of both sets, lone surrogates (bytes that aren't UTF-8), line separators, and marks that
# change the direction of writing, with which a name can be made to look like another.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]"
)


def group_fault(name: str) -> str:
    """Say why a data set or field can't have this name, which becomes a group and a folder; else empty."""
    if not _GROUP.fullmatch(name):
        return f"{short_name(name)!r}: expected letters, digits, '.', '_' and '-', beginning with no sign"
    if len(name) > GROUP_CHARACTERS:
        return f"{short_name(name)!r}: {len(name)} characters; expected {GROUP_CHARACTERS} at most"
    if name.lower().endswith(_OURS):
        return f"{name!r}: a store keeps files of its own under names that end in {', '.join(_OURS)}"
    return ""


def sequence_fault(name: str) -> str:
    """Say why a sequence can't have this name; else empty."""
    if len(name) > SEQUENCE_CHARACTERS:
        return f"a name of {len(name)} characters; expected {SEQUENCE_CHARACTERS} at most"
    if _HIDDEN.search(name):
        return "control characters in the name"
    return "" if name else "an empty name"


def printable(text: str, keep: str = "\n\t") -> str:
    r"""Write out the control characters in a text (``\x1b``), except those in ``keep``."""
    return _HIDDEN.sub(
        lambda match: match[0] if match[0] in keep else match[0].encode("unicode_escape").decode(), text
    )


def short_name(name: str) -> str:
    """Make a name safe to show: write out control characters, and cut a long name, with a hash of all."""
    safe = printable(name, keep="")
    if len(safe) <= SHOWN_CHARACTERS:
        return safe
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{safe[:SHOWN_CHARACTERS]}…{digest}"
