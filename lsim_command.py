"""Start the command ``lsim``.

This module is outside of the packages for two reasons: importing ``lsim`` takes seconds, which ``--help``
should not wait for; and another project's module ``pipeline`` might be imported in place of ours.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import NoReturn

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def main() -> NoReturn:
    """Run the command, or report which other ``pipeline`` would be imported."""
    try:
        if fault := explain_other_pipeline():
            sys.exit(f"error: {fault}")
        from pipeline.cli import main as run
    except KeyboardInterrupt:  # imports take a while, and Ctrl-C during them is no error either
        sys.exit(INTERRUPTED)
    run()


def explain_other_pipeline() -> str:
    """Explain which other ``pipeline`` would be imported, and the remedy; empty if it is ours."""
    ours = Path(__file__).with_name("pipeline") / "__init__.py"
    spec = importlib.util.find_spec("pipeline")
    if spec is None or spec.origin is None:
        return f"lsim is incomplete: expected its package pipeline in {ours.parent}; install lsim again"
    origin = Path(spec.origin)
    if origin.resolve() == ours.resolve():
        return ""
    folder = origin.parents[1] if origin.name == "__init__.py" else origin.parent
    return (
        f"{origin} is in the way: Python looks in {folder} before it gets to lsim's own package pipeline, "
        f"{ours.parent}. Rename it, or take {folder} out of PYTHONPATH"
    )
