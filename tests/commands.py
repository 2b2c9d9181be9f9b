"""The command ``lsim``, run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NoReturn

import pytest


def run_lsim(*arguments: object, timeout: float = 300) -> tuple[int, str]:
    """Run the command ``lsim`` in a process of its own: exit code, and all it printed."""
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "400"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, env=environment
    )
    return done.returncode, done.stdout


def skip_or_fail(reason: str) -> NoReturn:
    """Skip a test for want of a service; fail where ``$LSIM_TEST_SERVICES`` says that it has to be here."""
    if os.environ.get("LSIM_TEST_SERVICES") == "required":
        pytest.fail(reason)
    pytest.skip(reason)
