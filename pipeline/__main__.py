"""The command ``lsim``; as ``python -m pipeline`` where a launcher such as ``torchrun -m`` wants a module."""

from __future__ import annotations

import sys
from typing import NoReturn

INTERRUPTED = 130


def main() -> NoReturn:
    """Entry point. Importing what commands need takes a second or two, in which Ctrl-C is no fault either."""
    try:
        from pipeline.cli import main as run
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
