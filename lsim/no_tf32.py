"""Torch in IEEE single precision, whatever the program has set: no TF32, no bfloat16.

Their eight or eleven bits are for training networks: two nearly equal frames become equal, or differ by
several times their distance. The settings belong to the whole process.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

_guard = threading.Lock()
_inside = 0
_original: list[Any] = []


@contextlib.contextmanager
def ieee_convolutions() -> Iterator[None]:
    """Run convolutions in IEEE single precision, whatever the program has set for TF32 and bfloat16.

    TF32, torch's default for convolutions on GPUs, is wrong by 11 % on nearly equal frames. The setting
    belongs to the whole process: it is restored when the last of several threads leaves.
    """
    global _inside, _original
    if torch.compiler.is_compiling():
        # A graph drops the settings and cannot hold locks; on GPUs, networks stay out of graphs.
        yield
        return
    backends = [b for b in (torch.backends.cudnn, torch.backends.mkldnn) if hasattr(b, "conv")]
    # torch before 2.9 has one setting; later versions have several, and cannot always read the old one.
    settings: list[tuple[Any, str, Any]] = [(b.conv, "fp32_precision", "ieee") for b in backends] or [
        (torch.backends.cudnn, "allow_tf32", False)
    ]
    with _guard:
        if _inside == 0:
            _original = [getattr(owner, name) for owner, name, _ in settings]
            for owner, name, exact in settings:
                setattr(owner, name, exact)
        _inside += 1
    try:
        yield
    finally:
        with _guard:
            _inside -= 1
            if _inside == 0:
                for (owner, name, _), value in zip(settings, _original, strict=True):
                    setattr(owner, name, value)


_multiplying = threading.Lock()


@contextlib.contextmanager
def ieee_products(device: torch.device) -> Iterator[None]:
    """Multiply matrices in IEEE single precision, whatever the program has set for TF32 and bfloat16."""
    if torch.compiler.is_compiling():
        yield
        return
    # Settings belong to the process: another thread's end must not restore them halfway through.
    with _multiplying, torch.autocast(device.type, enabled=False):
        restore = _settings_of_products()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            restore()


def _settings_of_products() -> Callable[[], None]:
    """Return a function that restores the present settings."""
    backends = [torch.backends.cuda.matmul]
    if hasattr(backends[0], "fp32_precision"):  # torch 2.9 on
        backends.append(torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
        single = [backend.fp32_precision for backend in backends]
    else:
        single = []
    try:
        common = torch.get_float32_matmul_precision()
    except RuntimeError:  # only the backends' own settings are set
        common = None

    def restore() -> None:
        if common is not None:
            torch.set_float32_matmul_precision(common)
        for backend, setting in zip(backends, single, strict=False):
            backend.fp32_precision = setting

    return restore
