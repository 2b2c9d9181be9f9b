"""Count the workers of an archive's matrix and their memory, from the cluster or this machine."""

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
"""Share of a worker's memory that it may take, unless ``--memory`` says otherwise: Dask pauses it at 80 %."""
SHARE_OF_GPU = 0.85


def shared_memory_profile(profile: Profile) -> Profile:
    """Turn a local cluster of a process a core into one process of as many threads, which share embeddings.

    Where there are GPUs, and the profile doesn't say otherwise, one process for each of them.
    """
    if profile.kind != "local" or profile.workers is not None or profile.threads > 1:
        return profile
    if gpus := _count_gpus(profile.device):
        return profile.model_copy(update={"workers": gpus})
    return profile.model_copy(update={"workers": 1, "threads": CPU_COUNT})


def find_workers(cluster: Cluster, memory: int | None) -> Workers:
    """Count the workers of a cluster and the memory that each may take."""
    client = cluster.client
    if client is None:
        driver_device = device_of_worker()
        available = (
            int(SHARE_OF_GPU * driver_device.free)
            if driver_device.kind != "cpu"
            else _share_of_this_machine(1)
        )
        return Workers(1, 1, memory or available, driver_device.kind)
    information = client.scheduler_info(n_workers=-1)["workers"]
    # Workers of batch jobs come one after the other: the plan is for all of them.
    count = max(len(information), cluster.profile.asked_for.maximum)
    devices: dict[str, Device] = client.run(device_of_worker)
    kinds = {device.kind for device in devices.values()}
    device = "cpu" if kinds == {"cpu"} else next(iter(sorted(kinds - {"cpu"})))
    if device != "cpu":
        available = int(SHARE_OF_GPU * share_of_device(devices.values(), device))
    else:
        unlimited = MEMORY_LIMIT // count
        limits_of_workers = (worker["memory_limit"] or unlimited for worker in information.values())
        available = int(SHARE_OF_MEMORY * min(limits_of_workers))
        if cluster.profile.kind == "local":
            available = min(available, _share_of_this_machine(count))
    threads = max(worker["nthreads"] for worker in information.values())
    return Workers(count, threads, memory or available, device)


def _share_of_this_machine(workers: int) -> int:
    free = min(psutil.virtual_memory().available, MEMORY_LIMIT)
    available = SHARE_OF_MEMORY * free / workers
    if (headroom := limits.headroom_bytes()) is not None:  # of each process: workers have the same limits
        available = min(available, psutil.Process().memory_info().rss + SHARE_OF_MEMORY * headroom)
    return int(available)


def _count_gpus(device: str) -> int:
    """Count the GPUs of this machine that workers with this device use."""
    if not (device == "auto" or device.startswith("cuda")) or not torch.cuda.is_available():
        return 0
    return torch.cuda.device_count() if device == "auto" else 1
