"""The command ``lsim``, run as a user runs it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import IO, NoReturn
from unittest import mock

import pytest

from pipeline import cli

WIDTH = 400
"""Columns of the terminal: wide enough that no message is wrapped."""


def run_lsim(*arguments: object) -> tuple[int, str]:
    """Run the command ``lsim`` in this process: exit code, and all that it and its workers printed.

    Starting Python and importing torch would take longer than most commands; ``test_process.py`` shows that
    a command leaves its process as it was.
    """
    argv = ["lsim", *map(str, arguments)]
    with tempfile.TemporaryFile("a+") as printed:
        with (
            mock.patch.object(sys, "argv", argv),
            mock.patch.dict(os.environ, {"COLUMNS": str(WIDTH)}),
            _printing_to(printed),
            _logging_to_stderr(),
            pytest.raises(SystemExit) as end,
        ):
            cli.main()
        printed.seek(0)
        return end.value.code or 0, printed.read()


@contextlib.contextmanager
def _printing_to(file: IO[str]) -> Iterator[None]:
    """Have this process and those that it starts print to a file that is open for appending."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [(number, os.dup(number)) for number in (1, 2)]
    try:
        for number, _ in before:
            os.dup2(file.fileno(), number)
        with (
            open(1, "w", buffering=1, closefd=False) as stream,
            contextlib.redirect_stdout(stream),
            contextlib.redirect_stderr(stream),
        ):
            yield
    finally:
        for number, copy in before:
            os.dup2(copy, number)
            os.close(copy)


@contextlib.contextmanager
def _logging_to_stderr() -> Iterator[None]:
    """Have warnings logged as in a process that configures nothing: pytest's handlers would keep them."""
    root = logging.getLogger()
    before = list(root.handlers)
    root.handlers.clear()
    try:
        yield
    finally:
        root.handlers[:] = before


def skip_or_fail(reason: str) -> NoReturn:
    """Skip a test for want of a service; fail where ``$LSIM_TEST_SERVICES`` says that it has to be here."""
    if os.environ.get("LSIM_TEST_SERVICES") == "required":
        pytest.fail(reason)
    pytest.skip(reason)
