"""Who computes an archive's matrix, and what memory each has: read from the cluster, or from this machine."""

from __future__ import annotations

import psutil
import torch
from dask.system import CPU_COUNT
from distributed.system import MEMORY_LIMIT

from pipeline.matrix.measuring import Device, device_of_worker, share_of_device
from pipeline.matrix.plan import Workers
from pipeline.storage import limits
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

SHARE_OF_MEMORY = 0.6
"""What a worker's embeddings and all else may take of its memory, unless told: Dask pauses it at 80 %."""
SHARE_OF_GPU = 0.85


def shared_memory_profile(profile: Profile) -> Profile:
    """A local cluster of one process a core, as one process with as many threads: they share embeddings.

    Where there are GPUs, and the profile doesn't say otherwise, one process for each of them.
    """
    if profile.kind != "local" or profile.workers is not None or profile.threads > 1:
        return profile
    if gpus := _count_gpus(profile.device):
        return profile.model_copy(update={"workers": gpus})
    return profile.model_copy(update={"workers": 1, "threads": CPU_COUNT})


def find_workers(cluster: Cluster, memory: int | None) -> Workers:
    """Who computes, and what memory each has."""
    client = cluster.client
    if client is None:
        own = device_of_worker()
        there = int(SHARE_OF_GPU * own.free) if own.kind != "cpu" else _share_of_this_machine(1)
        return Workers(1, 1, memory or there, own.kind)
    information = client.scheduler_info(n_workers=-1)["workers"]
    # At most: those of jobs come one after the other.
    count = max(len(information), cluster.profile.asked_for.maximum)
    devices: dict[str, Device] = client.run(device_of_worker)
    kinds = {device.kind for device in devices.values()}
    device = "cpu" if kinds == {"cpu"} else next(iter(sorted(kinds - {"cpu"})))
    if device != "cpu":
        there = int(SHARE_OF_GPU * share_of_device(devices.values(), device))
    else:
        unlimited = MEMORY_LIMIT // count
        there = int(SHARE_OF_MEMORY * min(one["memory_limit"] or unlimited for one in information.values()))
        if cluster.profile.kind == "local":
            there = min(there, _share_of_this_machine(count))
    threads = max(worker["nthreads"] for worker in information.values())
    return Workers(count, threads, memory or there, device)


def _share_of_this_machine(workers: int) -> int:
    free = min(psutil.virtual_memory().available, MEMORY_LIMIT)
    there = SHARE_OF_MEMORY * free / workers
    if (headroom := limits.headroom_bytes()) is not None:  # of each process: workers have the same limits
        there = min(there, psutil.Process().memory_info().rss + SHARE_OF_MEMORY * headroom)
    return int(there)


def _count_gpus(device: str) -> int:
    """How many GPUs of this machine workers take that are told to use a device."""
    if not (device == "auto" or device.startswith("cuda")) or not torch.cuda.is_available():
        return 0
    return torch.cuda.device_count() if device == "auto" else 1
