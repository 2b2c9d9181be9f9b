"""The command ``lsim`` as ``python -m lsim``.

The only module of this package that leads to the stages: it is a command, and nothing imports it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lsim_command import main

if __name__ == "__main__":
    # For -m Python looks in the current folder first. As for the command `lsim`, what lies there must not
    # stand in for a module of others; a checkout that is run in place has lsim itself there.
    if not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
        del sys.path[0]
    main()
