"""Hash the code of a user's reader: sequences that another version decoded are out of date."""

from __future__ import annotations

import functools
import hashlib
import sys
import uuid
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def hash_code(label: str, definitions: Iterable[Callable[..., Any]], extra: str = "") -> str:
    """Hash the files of the modules that define functions and classes.

    Parameters
    ----------
    label : str
        Whose code it is, for the warning.
    definitions : iterable of callable
    extra : str, optional
        Text to hash as well.

    Returns
    -------
    str
        ``sha256:…``. Where a module has no file, as in a notebook, a change of its code can't be detected: a
        warning says so, and each call returns another text.
    """
    digests = {}
    for definition in map(_definition, definitions):
        module = definition.__module__
        digests[module] = _file_sha256(definition)
        if digests[module] is None:
            warnings.warn(
                f"{label}: module {module!r} has no file that shows whether its code has changed, so all "
                "its sequences are decoded in every run; define it in a file",
                stacklevel=2,
            )
            return f"unknown:{uuid.uuid4()}"
    text = "\n".join([extra, *(f"{module} {digest}" for module, digest in sorted(digests.items()))])
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _definition(definition: Any) -> Any:
    """Find the function or class behind a partial, a method or a callable object."""
    while isinstance(definition, functools.partial):
        definition = definition.func
    definition = getattr(definition, "__func__", definition)
    return definition if hasattr(definition, "__qualname__") else type(definition)


@functools.cache
def _file_sha256(definition: Any) -> str | None:
    """Hash the file that defines a function or class, once: an imported module doesn't change."""
    file = getattr(sys.modules.get(definition.__module__), "__file__", None)
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None
    except OSError:  # within a zip archive, or gone
        return None
