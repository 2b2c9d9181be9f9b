"""Check that a cluster is fit for a run, and estimate the time of a run: ``lsim cluster check``.

The check measures the real thing: every worker loads the metrics, and all workers compute distances of a
small archive, through the same stage as those of a big one.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lsim.simulate import simulate_families
from pipeline.distances import compute_distances
from pipeline.distances.sizing import block_size
from pipeline.metrics.fields import checked_fields
from pipeline.metrics.settings import Settings, choose_metrics
from pipeline.storage import schema, store
from pipeline.storage.address import absolute
from pipeline.storage.checked_frames import content_hash
from pipeline.storage.versions import versions
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import ACROSS_HOSTS, ClusterError, Profile
from pipeline.workers.worker_metrics import MetricRequest, get_metric

MUST_AGREE = ("lsim", "torch", "zarr")
"""Packages whose versions must agree: another version may give or store other results."""
MUST_UNDERSTAND = ("dask", "distributed")
"""Packages whose major versions must agree: otherwise processes cannot communicate."""

SEQUENCES_PER_THREAD = 2
"""Sequences that are measured."""
SAMPLE_BYTES = 2**31
"""Largest size of a field's measured frames; one sequence is measured at any size."""
LOADING_S = 600
"""Seconds after which a worker that loads the metrics counts as failed."""


@dataclass(frozen=True)
class WorkerFindings:
    """Properties of one worker.

    Attributes
    ----------
    name, address, host : str
    threads : int
    device : str
        Device of the metrics.
    versions : dict of str to str
        See :func:`pipeline.storage.versions.versions`.
    load_s : float
        Seconds that it took to load the metrics; NaN where it failed.
    """

    name: str
    address: str
    host: str
    threads: int
    device: str
    versions: Mapping[str, str]
    load_s: float


@dataclass(frozen=True)
class FieldEstimate:
    """Estimated time of one field's distances on this cluster.

    Attributes
    ----------
    key : str
        ``<dataset>/<field>``.
    sequences, frames, blocks : int
        Number of sequences, of frames in each, and of blocks of sequences.
    sequence_s : float
        Seconds that one thread takes for a sequence while all threads are busy.
    total_s : float
        Seconds for all sequences on all threads.
    """

    key: str
    sequences: int
    frames: int
    blocks: int
    sequence_s: float
    total_s: float


@dataclass(frozen=True)
class Inspection:
    """Workers of a cluster, and where they differ from this process.

    Attributes
    ----------
    workers : list of WorkerFindings
    errors, warnings : list of str
        Differences that make a run fail, and others.
    """

    workers: list[WorkerFindings]
    errors: list[str]
    warnings: list[str]


@dataclass(frozen=True)
class ClusterFindings:
    """Results of :func:`check_cluster`.

    Attributes
    ----------
    cluster : dict
        The cluster, as results record it.
    workers : list of WorkerFindings
    expected : int
        Workers that the profile requests.
    start_s : float
        Seconds until they had started.
    errors, warnings : list of str
        Faults that make a run fail, and others, such as versions that differ from those of this process.
    metrics : list of str
        Metrics that were loaded.
    unavailable : dict of str to str
        Metrics that were not loaded, with the reason.
    estimates : list of FieldEstimate
        The measured field, or all fields of the store that was passed.
    """

    cluster: dict[str, Any]
    workers: list[WorkerFindings]
    expected: int
    start_s: float
    errors: list[str]
    warnings: list[str]
    metrics: list[str]
    unavailable: dict[str, str]
    estimates: list[FieldEstimate]

    @property
    def threads(self) -> int:
        """Threads of all workers together."""
        return sum(worker.threads for worker in self.workers)


def check_cluster(
    profile: Profile,
    settings: Settings | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    frames: str | os.PathLike[str] | None = None,
) -> ClusterFindings:
    """Start a cluster, inspect its workers, and measure them.

    Parameters
    ----------
    profile : Profile
    settings : Settings, optional
        Settings of the distances that are measured; default all metrics.
    folder : path, optional
        Folder that all workers see, for a small archive during the check. Required unless all workers run on
        this machine; there the default is a temporary folder.
    frames : path or address, optional
        A ``frames.zarr``: some of its sequences are measured, and all are estimated. Default: built-in
        shapes.

    Returns
    -------
    ClusterFindings
        Without estimates where there are errors.

    Raises
    ------
    ClusterError
        When no worker starts, or one cannot import this package.
    ValueError, pipeline.storage.store.StoreError
        For unknown metrics, and for ``frames`` that are no store.
    """
    settings = settings or Settings()
    pool = Cluster(profile)  # starts nothing, but finds faults of the profile
    if folder is None and profile.kind in (*ACROSS_HOSTS, "address"):
        raise ClusterError(
            f"checking a cluster of kind {profile.kind!r} needs --folder, a folder that all workers see"
        )
    selection = choose_metrics(settings)
    if frames is not None:
        checked_fields(store.open_store(absolute(frames)), frames)
    with pool as cluster:
        worker_count, start_s = _await_workers(cluster, profile)
        inspection = inspect_workers(cluster.client, list(selection.requests.values()))
        description = cluster.describe()
        warnings, estimates = list(inspection.warnings), []
        if not inspection.errors:
            threads = sum(worker.threads for worker in inspection.workers)
            with _temporary_folder(folder) as temporary:
                for number, sample in enumerate(_samples(frames, SEQUENCES_PER_THREAD * threads)):
                    place = temporary / str(number)
                    estimate, warning = _measure(cluster, settings, place, sample, threads)
                    estimates.append(estimate)
                    warnings += warning
    return ClusterFindings(
        cluster=description,
        workers=inspection.workers,
        expected=worker_count,
        start_s=start_s,
        errors=inspection.errors,
        warnings=warnings,
        metrics=[metric.name for metric in selection.metrics],
        unavailable=selection.unavailable,
        estimates=estimates,
    )


def _await_workers(cluster: Cluster, profile: Profile) -> tuple[int, float]:
    """Wait for the workers that a profile requests; return their number and the seconds."""
    start = time.perf_counter()
    client, count = cluster.client, 1
    if client is not None:
        count = profile.asked_for.minimum
        with contextlib.suppress(TimeoutError):  # the workers that have started are inspected
            client.wait_for_workers(count, timeout=profile.wait_s)
    return count, time.perf_counter() - start


# ---------------------------------------------------------------- workers


def inspect_workers(client: Any, requests: list[MetricRequest]) -> Inspection:
    """Load metrics on every worker, and compare the workers' versions with those of this process.

    Parameters
    ----------
    client : dask.distributed.Client or None
        None where this process computes by itself.
    requests : list of MetricRequest

    Raises
    ------
    ClusterError
        When a worker cannot import this package.
    """
    driver_versions = versions()
    if client is None:
        load_s, device = timed_load(requests)
        return Inspection(
            [WorkerFindings("this process", "", platform.node(), 1, device, driver_versions, load_s)], [], []
        )
    info = client.scheduler_info(n_workers=-1)["workers"]
    versions_of = client.run(versions, on_error="return")
    for address, answer in versions_of.items():
        if isinstance(answer, BaseException):
            raise ClusterError(
                f"worker {address} cannot import this package: {type(answer).__name__}: {answer}"
            ) from answer
    loads = {
        address: client.submit(timed_load, requests, workers=[address], pure=False) for address in versions_of
    }
    inspection = Inspection([], [], [])
    for address, future in loads.items():
        name = str(info[address]["name"])
        fault = _find_fault(client, future, address)
        if fault:
            inspection.errors.append(f"worker {name}: {fault}")
        load_s, device = (float("nan"), "none") if fault else future.result()
        inspection.workers.append(
            WorkerFindings(
                name=name,
                address=address,
                host=info[address]["host"],
                threads=info[address]["nthreads"],
                device=device,
                versions=versions_of[address],
                load_s=load_s,
            )
        )
        errors, warnings = compare_versions(driver_versions, versions_of[address])
        inspection.errors.extend(f"worker {name}: {line}" for line in errors)
        inspection.warnings.extend(f"worker {name}: {line}" for line in warnings)
    return inspection


def _find_fault(client: Any, future: Any, address: str) -> str:
    """Wait until a worker has loaded the metrics; return the reason where it fails, else an empty string.

    A worker that crashes is started again at another address, where the future is not computed.
    """
    deadline = time.monotonic() + LOADING_S
    while not future.done():
        if address not in client.nthreads():
            return "it ended while it loaded the metrics"
        if time.monotonic() > deadline:
            return f"it did not load the metrics within {LOADING_S} s"
        time.sleep(0.1)
    error = future.exception(timeout=LOADING_S)
    return "" if error is None else str(error)


def timed_load(requests: list[MetricRequest]) -> tuple[float, str]:
    """Load metrics into this worker's memory; return the seconds and the device. Runs on a worker."""
    start = time.perf_counter()
    metrics = [get_metric(request) for request in requests]
    device = metrics[0].device if metrics else torch.device("cpu")
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return time.perf_counter() - start, f"{device} ({kind})"


def compare_versions(driver: Mapping[str, str], worker: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Compare the versions of two processes.

    Parameters
    ----------
    driver, worker : dict of str to str
        Versions of this process and of a worker, see :func:`pipeline.storage.versions.versions`.

    Returns
    -------
    errors, warnings : list of str
        Differences that would make a run fail, and others.
    """
    errors, warnings = [], []
    for name in sorted(driver.keys() | worker.keys()):
        mine, theirs = driver.get(name, "none"), worker.get(name, "none")
        if mine == theirs:
            continue
        text = f"{name} {theirs}, here {mine}"
        other_major = mine.partition(".")[0] != theirs.partition(".")[0]
        if name in MUST_AGREE or (name in MUST_UNDERSTAND and other_major):
            errors.append(text)
        else:
            warnings.append(text)
    return errors, warnings


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class _Sample:
    """Some sequences of a field.

    ``sequences`` yields frames (frame, y, x, channel), ``parameter`` has shape (sequence, frame), and
    ``total`` is the number of sequences of the whole field.
    """

    key: str
    sequences: Iterable[np.ndarray]
    parameter: np.ndarray
    total: int


@contextlib.contextmanager
def _temporary_folder(folder: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Make a folder within one that all workers see, and remove it at the end."""
    with tempfile.TemporaryDirectory(prefix="lsim-check-", dir=folder) as path:
        yield Path(path).absolute()


def _measure(
    cluster: Cluster, settings: Settings, folder: Path, sample: _Sample, threads: int
) -> tuple[FieldEstimate, list[str]]:
    """Compute a sample on all workers at once; return the estimate for its field, and warnings."""
    key = sample.key
    folder.mkdir()
    source, out = folder / "frames.zarr", folder / "second.zarr"
    write_sample(source, key, sample.sequences, sample.parameter)
    single = settings.model_copy(update={"block": 1})
    # The first run compiles kernels, the second is measured.
    compute_distances(source, folder / "first.zarr", single, cluster=cluster)
    report = compute_distances(source, out, single, cluster=cluster)

    # Distances that are missing from a finished block are the frames' fault, others are the cluster's.
    finished = _finished_rows(store.get_group(store.open_store(out), key))
    for failure in report.failures:
        if (failure.metric, failure.sequence) not in finished:
            raise ClusterError(f"{key}: {failure.metric} failed on the cluster: {failure.reason}")
    warnings = [
        f"{key}: {failure.metric} cannot compare all frames of sequence {failure.sequence}: {failure.reason}"
        for failure in report.failures[:1]
    ]

    runs: Any = store.open_store(out).attrs["runs"]
    sequence_count, frames = sample.parameter.shape
    sequence_s = sum(runs[-1]["seconds_by_stage"].values()) / sequence_count
    block = block_size(max(sequence_s, 1e-6), sample.total, threads, frames).sequences
    estimate = FieldEstimate(
        key=key,
        sequences=sample.total,
        frames=frames,
        blocks=-(-sample.total // block),
        sequence_s=sequence_s,
        total_s=sample.total * sequence_s / max(threads, 1),
    )
    return estimate, warnings


def _finished_rows(group: store.Group) -> set[tuple[str, str]]:
    """List the metrics and sequences with a fingerprint: their block is finished."""
    provenance = store.get_group(group, schema.PROVENANCE)
    metrics = store.read(store.get_array(provenance, schema.METRIC))
    sequences = store.read(store.get_array(group, schema.SEQUENCE))
    fingerprints = store.read(store.get_array(provenance, schema.FINGERPRINT))
    return {(str(metrics[index]), str(sequences[row])) for index, row in np.argwhere(fingerprints != "")}


def _samples(frames: str | os.PathLike[str] | None, count: int) -> Iterator[_Sample]:
    """Sample up to ``count`` sequences of each field of a store, or of built-in shapes."""
    if frames is None:
        shapes = simulate_families("shapes", count)
        for name, values in shapes.frames.items():
            yield _Sample(f"Shapes/{name}", values, np.tile(shapes.parameter, (count, 1)), count)
        return
    location = absolute(frames)
    root = store.open_store(location)
    for key in checked_fields(root, location):
        group = store.get_group(root, key)
        array = store.get_array(group, schema.FRAMES)
        total = array.shape[0]
        sequence_bytes = math.prod(array.shape[1:]) * array.dtype.itemsize
        rows = min(total, count, max(1, SAMPLE_BYTES // sequence_bytes))
        parameter = store.read(store.get_array(group, schema.PARAMETER), slice(0, rows))
        yield _Sample(key, _read_rows(array, rows), parameter, total)


def _read_rows(array: store.Array, rows: int) -> Iterator[np.ndarray]:
    for row in range(rows):
        yield store.read(array, row)


def write_sample(path: Path, key: str, sequences: Iterable[np.ndarray], parameter: np.ndarray) -> None:
    """Write a ``frames.zarr`` of one field, a sequence at a time.

    Parameters
    ----------
    path : path
        Store to create.
    key : str
        ``<dataset>/<field>``.
    sequences : iterable of ndarray of shape (frame, y, x, channel)
    parameter : ndarray of shape (sequence, frame), float64
    """
    group = store.create_group(store.open_store(path, "a"), key)
    count, n = parameter.shape
    contents = []
    for row, frames in enumerate(sequences):
        if row == 0:
            shape, chunks = (count, *frames.shape), (1, 1, *frames.shape[1:])
            array = store.create_array(
                group, schema.FRAMES, shape=shape, chunks=chunks, dims=schema.FRAMES_DIMS, dtype=frames.dtype
            )
        store.write_rows(array, row, frames[None])
        contents.append(content_hash(frames, parameter[row]))
    names = np.array([f"s{row}" for row in range(count)], object)
    arrays: dict[str, tuple[np.ndarray, tuple[str, ...], Any, tuple[int, ...]]] = {
        schema.PARAMETER: (parameter, schema.PARAMETER_DIMS, "float64", (count, n)),
        schema.SEQUENCE: (names, (schema.SEQUENCE,), str, (count,)),
        schema.CONTENT: (np.array(contents, object), (schema.SEQUENCE,), str, (count,)),
    }
    for name, (values, dims, dtype, chunks) in arrays.items():
        array = store.create_array(group, name, shape=values.shape, chunks=chunks, dims=dims, dtype=dtype)
        store.write_rows(array, 0, values)
