"""Start the command ``lsim``.

A module beside the packages ``lsim`` and ``pipeline``. Importing ``lsim`` takes seconds, which ``--help``
need not; and ``pipeline`` is a name that others use, too, so another one may be imported in its place.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import NoReturn

INTERRUPTED = 130


def main() -> NoReturn:
    """Run the command, or say which other ``pipeline`` is in the way."""
    try:
        if fault := explain_other_pipeline():
            sys.exit(f"error: {fault}")
        from pipeline.cli import main as run
    except KeyboardInterrupt:  # importing what commands need takes a while, in which it is no fault either
        sys.exit(INTERRUPTED)
    run()


def explain_other_pipeline() -> str:
    """Explain which other ``pipeline`` would be imported, and what to do; "" where it is ours."""
    ours = Path(__file__).with_name("pipeline") / "__init__.py"
    spec = importlib.util.find_spec("pipeline")
    if spec is None or spec.origin is None:
        return f"lsim is not whole: its package pipeline should be in {ours.parent}; install lsim again"
    origin = Path(spec.origin)
    if origin.resolve() == ours.resolve():
        return ""
    folder = origin.parents[1] if origin.name == "__init__.py" else origin.parent
    return (
        f"{origin} is in the way: Python looks in {folder} before it gets to lsim's own package pipeline, "
        f"{ours.parent}. Rename it, or take {folder} out of PYTHONPATH"
    )
