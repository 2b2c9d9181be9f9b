"""Checks of a metric's claims on its results; a breach is an error that names the metric.

Metrics may come from other packages. :class:`OthersCode` runs their code, and lets it neither end the process
nor change settings that other metrics compute under. :class:`Claims` checks each result: tensors of the right
kind, and distances with the sign, the zero and the symmetry that the metric claims.
"""

from __future__ import annotations

import contextlib
import functools
import random
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType, TracebackType
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from lsim.embedding import Embedding

AXIOMS = frozenset({"non-negative", "symmetric", "zero-on-itself", "triangle", "euclidean"})
"""All that a metric can claim of its distances."""

RTOL = 1e-5
"""Relative difference allowed between two ways to the same distance."""

ATOL = 1e-9
"""Absolute difference allowed from a claimed zero: the rounding of a sum."""

ATOL_SINGLE = 1e-6
"""The same for distances in single precision: eight times the rounding of 1."""

OF_THE_LARGEST = 1e-7
"""Difference allowed between d(a, b) and d(b, a), relative to the largest distance of their block."""


class MetricError(ValueError):
    """A metric that cannot be used: its code tried to end the process, or broke a claim."""


class ClaimError(MetricError):
    """A metric whose code breaks a claim."""


# ---------------------------------------------------------------- results of a metric


@dataclass(frozen=True)
class Claims:
    """Claims of a metric about its distances, and checks of them.

    Attributes
    ----------
    name : str
    axioms : frozenset of str
        A subset of :data:`AXIOMS`.
    distance_to_itself : float
        NaN where nothing is claimed.
    """

    name: str
    axioms: frozenset[str]
    distance_to_itself: float

    def refuse(self, breach: str) -> NoReturn:
        """Raise :class:`ClaimError` with the metric's name and a description of the breach."""
        raise ClaimError(f"metric {self.name!r}: {breach}")

    def check_embedding(self, embedding: object, n: int) -> None:
        """Check that embed gave an :class:`~lsim.Embedding` of tensors with an entry for each frame.

        Raises
        ------
        ClaimError
        """
        if not isinstance(embedding, Embedding):
            self.refuse(f"embed gave {_kind(embedding)}, expected an lsim.Embedding")
        if not embedding.parts:
            self.refuse("embed gave an Embedding without parts, expected one tensor or more")
        for name, part in embedding.parts.items():
            if not isinstance(part, Tensor):
                self.refuse(f"embed gave {_kind(part)} for its part {name!r}, expected a torch.Tensor")
            if part.ndim == 0 or len(part) != n:
                self.refuse(
                    f"embed gave its part {name!r} in shape {tuple(part.shape)} for {n} frames; expected one "
                    f"entry a frame, ({n}, …)"
                )

    def check_block(self, block: object, shape: tuple[int, ...], method: str = "compare") -> None:
        """Check that distances are a real tensor of a shape, in single or double precision.

        ``paired`` may return lower precision: that of the frames that a user passes.

        Raises
        ------
        ClaimError
        """
        if not isinstance(block, Tensor):
            self.refuse(f"{method} gave {_kind(block)}, expected a torch.Tensor of distances")
        if block.shape != shape:
            frames = " and ".join(map(str, shape))
            self.refuse(
                f"{method} gave a block of shape {tuple(block.shape)} for {frames} frames; expected {shape}"
            )
        if block.dtype not in (torch.float64, torch.float32) and not (
            method == "paired" and block.is_floating_point()
        ):
            self.refuse(
                f"{method} gave distances of {block.dtype}, expected torch.float64: convert what they are "
                "made of before it is subtracted or summed"
            )

    def check_distances(
        self,
        values: np.ndarray,
        *,
        square: bool,
        single: bool,
        rounding: Callable[[], np.ndarray] | None = None,
    ) -> None:
        """Check the sign of distances, and for a square block the diagonal and the symmetry.

        Parameters
        ----------
        values : ndarray of any shape, float64
            NaN where frames could not be compared, or were not.
        square : bool
            Whether rows and columns are the same frames. A diagonal of 0 or NaN then counts as not computed,
            and so does a lower triangle that is all one of these.
        single : bool
            Whether the metric returned single precision.
        rounding : callable, optional
            Bounds the rounding of the distances. Called only if a claim would be broken without it.

        Raises
        ------
        ClaimError
        """
        try:
            self._check_within(values, square, single, 0.0)
        except ClaimError:
            if rounding is None:
                raise
            self._check_within(values, square, single, rounding())

    def _check_within(
        self, values: np.ndarray, square: bool, single: bool, rounding: np.ndarray | float
    ) -> None:
        """Check the claims of :meth:`check_distances`, given the rounding of each distance."""
        if "non-negative" in self.axioms and values.size and not values.min() >= 0 and (values < 0).any():
            self._check_sign(values, _tolerance(values, single, rounding))
        if not square:
            return
        diagonal = values.diagonal()
        if diagonal.any():
            tolerance = _tolerance(values, single, rounding)
            self.check_itself(diagonal, np.broadcast_to(tolerance, values.shape).diagonal())
        if "symmetric" in self.axioms and not (values == values.T).all():
            tolerance = _tolerance(values, single, rounding, relative=OF_THE_LARGEST)
            self._check_symmetry(values, np.broadcast_to(tolerance, values.shape))

    def _check_sign(self, values: np.ndarray, tolerance: np.ndarray | float) -> None:
        if (negative := values < -tolerance).any():
            self.refuse(
                f"claims to be non-negative, and gave {values[negative].min():.6g} as the least of "
                f"{negative.sum()} negative distances"
            )

    def check_itself(self, diagonal: np.ndarray, tolerance: np.ndarray | float) -> None:
        """Check distances of frames to themselves; 0 and NaN count as not computed.

        Raises
        ------
        ClaimError
        """
        claimed = self.distance_to_itself
        if np.isnan(claimed):
            return
        is_computed = ~(np.isnan(diagonal) | (diagonal == 0) | (diagonal == claimed))
        with np.errstate(invalid="ignore"):
            if (wrong := is_computed & ~(np.abs(diagonal - claimed) <= tolerance)).any():
                k = int(np.argmax(wrong))
                self.refuse(
                    f"claims a distance of {claimed:g} from any frame to itself, and gave {diagonal[k]:.6g} "
                    f"for frame {k}; where it isn't the same for all, distance_to_itself is NaN"
                )

    def _check_symmetry(self, values: np.ndarray, tolerance: np.ndarray) -> None:
        """Compare d(i, j) with d(j, i), if both were computed."""
        i, j = np.triu_indices(len(values), 1)
        upper, lower = values[i, j], values[j, i]
        if (np.isnan(lower) | (lower == 0)).all():
            return
        with np.errstate(invalid="ignore"):
            largest = np.maximum(np.abs(upper), np.abs(lower))
            alike = (upper == lower) | (np.abs(upper - lower) <= RTOL * largest + tolerance[i, j])
        different = ~(alike | (np.isnan(upper) & np.isnan(lower)))
        if different.any():
            k = int(np.argmax(different))
            self.refuse(
                f"claims to be symmetric, and gave d({i[k]}, {j[k]}) = {upper[k]:.6g} but "
                f"d({j[k]}, {i[k]}) = {lower[k]:.6g}; one that isn't leaves 'symmetric' out of its axioms"
            )

    def check_unwritten(self, old_versions: Iterable[int], new_versions: Iterable[int], breach: str) -> None:
        """Check that nothing was written into tensors: their :func:`versions` are the same.

        Raises
        ------
        ClaimError
        """
        if [*old_versions] != [*new_versions]:
            self.refuse(f"{breach} that it was given; it has to work on a copy (clone)")

    def check_repeated(self, first: np.ndarray, second: np.ndarray, name: str, *, exact: bool) -> None:
        """Check that two results of the same frames agree: bit for bit, or within :data:`RTOL`.

        Raises
        ------
        ClaimError
        """
        if np.array_equal(first, second, equal_nan=True):
            return
        if not exact and np.allclose(first, second, rtol=RTOL, atol=ATOL, equal_nan=True):
            return
        different = ~((first == second) | (np.isnan(first) & np.isnan(second)))
        place = tuple(int(k) for k in np.argwhere(different)[0])
        self.refuse(
            f"gave another result for the same frames when asked again: {name} {place} is "
            f"{first[place]!r}, then {second[place]!r}"
        )


def _tolerance(
    values: np.ndarray, single: bool, rounding: np.ndarray | float, relative: float = RTOL
) -> np.ndarray | float:
    """Bound the error of distances that are claimed to be zero: relative to the largest, plus rounding."""
    largest = np.max(np.abs(values), initial=0.0, where=np.isfinite(values))
    return relative * float(largest) + (ATOL_SINGLE if single else ATOL) + np.nan_to_num(rounding)


def versions(tensors: Iterable[object]) -> list[int]:
    """Read torch's counters of writes into tensors; 0 for tensors without one."""
    return [
        0 if not isinstance(tensor, Tensor) or tensor.is_inference() else tensor._version
        for tensor in tensors
    ]


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


# ---------------------------------------------------------------- code of a metric


class OthersCode:
    """Context that runs code of other packages: it cannot end the process, and settings are restored.

    SystemExit, KeyboardInterrupt and other exceptions that are no :class:`Exception` become
    :class:`MetricError`. An exception of a signal's handler (Ctrl-C, SIGTERM) passes, even if the code
    catches it.

    Settings of the thread and of the process are restored: torch's default dtype, default device, number of
    threads and gradient mode, NumPy's treatment of floating-point errors, and the states of random numbers. A
    change of one of them, random numbers aside, is a breach. Changes of the process's settings are blamed on
    nobody while code of several metrics runs in several threads.

    Parameters
    ----------
    name : str
        Name of the metric.
    action : str
        The running code in messages: a method's name.
    on_change : {"raise", "warn"}
        ``"warn"`` for imports and the like, where libraries may be at fault.
    """

    def __init__(self, name: str, action: str, on_change: Literal["raise", "warn"] = "raise") -> None:
        self.name, self.action, self.on_change = name, action, on_change

    def __enter__(self) -> None:
        self._own_handler = _watch_interrupts()
        self._of_thread = [setting.get() for setting in _OF_THREAD]
        _process.enter(self.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        names = _restore(_OF_THREAD, self._of_thread) + _process.leave()
        interrupted = self._own_handler and _stop_watching()
        if error is not None and (signalled := _raised_by_a_signal(error)) is not None:
            if signalled is error:
                return
            raise signalled
        if interrupted:  # and its KeyboardInterrupt was swallowed
            raise KeyboardInterrupt
        if error is not None:
            if isinstance(error, Exception):
                return
            text = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise MetricError(
                f"metric {self.name!r}: {self.action} raised {text}, as if to end the process"
            ) from error
        if names:
            breach = f"metric {self.name!r}: {self.action} changed {' and '.join(names)} for all others"
            if self.on_change == "raise":
                raise ClaimError(f"{breach}; put back what it was, or leave it alone")
            warnings.warn(f"{breach}; it was put back", stacklevel=3)


@dataclass(frozen=True)
class _Setting:
    """A setting that all code shares. One without a name is restored, and may be changed."""

    name: str
    get: Callable[[], Any]
    put: Callable[[Any], Any]


def _default_device_or_none(device: torch.device) -> None:
    # The CPU is torch's default. Set explicitly, it costs time at every call.
    torch.set_default_device(None if device.type == "cpu" else device)


def _set_gradients(enabled: bool) -> None:
    torch.set_grad_enabled(enabled)


_OF_THREAD = (
    _Setting("torch's gradient mode", torch.is_grad_enabled, _set_gradients),
    _Setting("torch's default device", torch.get_default_device, _default_device_or_none),
    _Setting("NumPy's treatment of floating-point errors", np.geterr, lambda errors: np.seterr(**errors)),
)
_OF_PROCESS = (
    _Setting("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
    _Setting("torch's number of threads", torch.get_num_threads, torch.set_num_threads),
    _Setting("", random.getstate, random.setstate),
    _Setting("", np.random.get_state, np.random.set_state),
    _Setting("", torch.get_rng_state, torch.set_rng_state),
)


def _restore(settings: Iterable[_Setting], values: list[Any]) -> list[str]:
    """Restore settings that differ, and return their names."""
    names = []
    for setting, value in zip(settings, values, strict=True):
        if not setting.name:
            setting.put(value)
        elif setting.get() != value:
            setting.put(value)
            names.append(setting.name)
    return names


class _Process:
    """Settings of the process while code of other packages runs in any of its threads."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.inside = 0
        self.names: set[str] = set()
        self.originals: list[Any] = []

    def enter(self, name: str) -> None:
        with self.guard:
            if self.inside == 0:
                self.originals = [setting.get() for setting in _OF_PROCESS]
                self.names = set()
            self.inside += 1
            self.names.add(name)

    def leave(self) -> list[str]:
        """Restore settings after the last metric, and return the names of those that a single one changed."""
        with self.guard:
            self.inside -= 1
            if self.inside:
                return []
            names = _restore(_OF_PROCESS, self.originals)
            return names if len(self.names) == 1 else []


_process = _Process()


@contextlib.contextmanager
def other_random_numbers() -> Iterator[None]:
    """Advance the shared generators of random numbers, and restore them at the end."""
    generators = [setting for setting in _OF_PROCESS if not setting.name]
    states = [setting.get() for setting in generators]
    random.random()
    np.random.random()
    torch.rand(1)
    try:
        yield
    finally:
        _restore(generators, states)


# ---------------------------------------------------------------- signals


class _Interrupts:
    arrived = False


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C in place of Python's own handler, which leaves no trace in its exception."""
    _Interrupts.arrived = True
    raise KeyboardInterrupt


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _watch_interrupts() -> bool:
    """Take Ctrl-C over from Python's own handler, in the main thread; tell whether that was done."""
    if not _in_main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False
    _Interrupts.arrived = False
    signal.signal(signal.SIGINT, _on_interrupt)
    return True


def _stop_watching() -> bool:
    """Give Ctrl-C back to Python's own handler; tell whether one arrived."""
    if signal.getsignal(signal.SIGINT) is _on_interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return _Interrupts.arrived


def _raised_by_a_signal(error: BaseException) -> BaseException | None:
    """Find the exception of a signal's handler among an error and its causes; None if there is none."""
    if not _in_main_thread():  # handlers run nowhere else
        return None
    handlers = {code for number in signal.valid_signals() for code in _codes(signal.getsignal(number))}
    handlers.add(_on_interrupt.__code__)
    for cause in _chain(error):
        trace = cause.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code in handlers:
                return cause
            trace = trace.tb_next
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Iterate over an error and its causes and contexts."""
    visited: set[int] = set()
    while error is not None and id(error) not in visited:
        visited.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _codes(handler: Any) -> Iterator[CodeType]:
    """Find the code of a handler that is written in Python."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    function = getattr(handler, "__func__", handler)
    if not hasattr(function, "__code__") and callable(handler):
        function = type(handler).__call__
    if isinstance(code := getattr(function, "__code__", None), CodeType):
        yield code
