"""Run a command: print errors in one line, set the exit code, and restore the state of the process.

Exit codes: 0 success; 1 an error, reported in one line; 2 wrong usage; 3 finished, but some sequences were
quarantined or could not be compared; 130 interrupted (Ctrl-C); 143 ended by SIGTERM. After 130 and 143 the
same command continues where it stopped.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pydantic
import typer

from pipeline.cli.app import app
from pipeline.cli.display import console, forget_warnings, show_warning_once
from pipeline.workers import sigterm

INTERRUPTED = 130


def main() -> NoReturn:
    """Run a command and exit with its code; the state of the process is restored."""
    with _restoring_process():
        code, was_stopped = _run()
    if was_stopped and not _is_whole_process():
        # The signal was meant for the whole process: a program that called the command ends now, too.
        signal.raise_signal(signal.SIGTERM)
    sys.exit(code)


@contextlib.contextmanager
def _restoring_process() -> Iterator[None]:
    """Restore what a command changes in its process; :mod:`pipeline.workers.sigterm` restores the handler."""
    variables, path, modules = dict(os.environ), list(sys.path), set(sys.modules)
    show_warning, show_exception = warnings.showwarning, sys.excepthook
    torch: Any = sys.modules.get("torch")  # not imported for this alone
    torch_state = None if torch is None else torch.get_rng_state()
    random_state = random.getstate()
    forget_warnings()
    warnings.showwarning = show_warning_once
    try:
        yield
    finally:
        warnings.showwarning = show_warning
        sys.excepthook = show_exception  # typer sets its own
        random.setstate(random_state)  # Dask draws its delays
        if torch is not None:
            torch.set_rng_state(torch_state)  # networks draw their initial weights
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update(variables)
        _forget_modules(set(sys.path) - set(path), sys.modules.keys() - modules)
        sys.path[:] = path


def _forget_modules(folders: Collection[str], names: Iterable[str]) -> None:
    """Forget modules from these folders: the next command may mean another file of the same name."""
    for name in list(names):
        top = name.partition(".")[0]
        file = getattr(sys.modules.get(name), "__file__", None)
        candidates = [Path(folder, end) for folder in folders for end in (top, f"{top}.py")]
        if file and top not in OURS and any(Path(file).is_relative_to(path) for path in candidates):
            del sys.modules[name]


OURS = ("lsim", "pipeline", "lsim_command")
"""Top-level modules of this project, which stay imported."""

_STARTED_AS = ("__main__", "runpy", "lsim_command", __name__)
"""Modules on the stack when a process was started only for a command."""


def _is_whole_process() -> bool:
    """Tell whether the process was started for this command alone."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") not in _STARTED_AS:
            return False
        frame = frame.f_back
    return True


def _run() -> tuple[int, bool]:
    """Run a command, and return its exit code and whether SIGTERM ended it."""
    with sigterm.restoring_handler() as stop_on_sigterm:
        code = _exit_code(stop_on_sigterm)
        was_stopped = sigterm.requested()
    if code in (INTERRUPTED, sigterm.EXIT_CODE):  # typer turns Ctrl-C into this
        console.print("stopped; what is finished is kept, run the same command again to continue")
    return code, was_stopped


def _exit_code(stop_on_sigterm: Callable[[], None]) -> int:
    """Run a command and return its exit code; errors that users can correct are printed in one line."""
    try:
        stop_on_sigterm()
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except sigterm.Stopped:
        code = sigterm.EXIT_CODE
    except Exception as error:
        code = _explain(error)
        if code is None:
            raise
    return code if isinstance(code, int) else 0


def _explain(error: Exception) -> int | None:
    """Print an error that the user can correct and return its exit code; None for other errors."""
    # Imported only here: these would cost every command a second.
    from lsim.export import ExportError
    from lsim.registry import UnknownMetricError
    from lsim.simulate import UnknownRecipeError
    from lsim.weights import WeightsError
    from pipeline.convert import ConversionError
    from pipeline.resources import ResourceError
    from pipeline.simulate import SimulationError
    from pipeline.storage.store import StoreError
    from pipeline.workers.profiles import ClusterError

    if hasattr(error, "exit_code") and hasattr(error, "show"):  # click's usage errors
        error.show()
        return int(error.exit_code)
    if isinstance(error, pydantic.ValidationError):
        for fault in error.errors():
            location = ".".join(map(str, fault["loc"]))
            console.print(
                f"error: {location}: {fault['msg']}, got {fault['input']!r}", style="red", markup=False
            )
        return 2
    # Errors of catalogs, schemas, correlations and workflows are kinds of ValueError.
    user_errors = (UnknownMetricError, WeightsError, ClusterError, ConversionError, ResourceError, StoreError)
    kinds = (ExportError, SimulationError, UnknownRecipeError, ValueError, OSError, MemoryError)
    if isinstance(error, (*user_errors, *kinds)):
        text = str(error) or "out of memory" if isinstance(error, MemoryError) else str(error)
        console.print(f"error: {text or type(error).__name__}", style="red", markup=False, soft_wrap=True)
        return 1
    return None
