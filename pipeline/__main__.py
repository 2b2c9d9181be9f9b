"""The command ``lsim`` as ``python -m pipeline``; where another ``pipeline`` comes first, that one runs."""

from __future__ import annotations

from lsim_command import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
