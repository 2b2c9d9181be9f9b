"""The command ``lsim``: one file a group of commands.

Modules of commands import stages inside functions: importing PyTorch takes seconds, which ``--help`` need
not.
"""

from __future__ import annotations

from pipeline.cli.app import app
from pipeline.cli.process import main

__all__ = ["app", "main"]
