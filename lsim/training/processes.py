"""Processes of one training run, as ``torchrun`` starts them: their ranks and what they exchange."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

TIMEOUT = timedelta(hours=2)
"""Longest wait of processes for one another: the others are idle while the first validates."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    Attributes
    ----------
    device : torch.device
        Device of this process.
    rank : int
        Number of this process, from 0.
    count : int
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """True in the process that validates and writes files."""
        return self.rank == 0

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in one message."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.reshape(-1).to(self.device, torch.float64) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.reshape(tensor.shape))

    def merge(self, items: dict[str, str]) -> dict[str, str]:
        """Return the items of all processes."""
        if self.count == 1:
            return items
        gathered: list[dict[str, str]] = [{}] * self.count
        dist.all_gather_object(gathered, items)
        return {name: value for part in gathered for name, value in part.items()}

    def any(self, condition: bool) -> bool:
        """Return True if the condition holds in at least one process: all must stop at the same step."""
        if self.count == 1:
            return condition
        flag = torch.tensor([float(condition)], device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())


@contextlib.contextmanager
def join_processes(device: torch.device) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started, or run as a single process."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Processes(device, dist.get_rank(), count)
    finally:
        dist.destroy_process_group()
