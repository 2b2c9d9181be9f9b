"""Whether a cluster is fit for a run, and what a run on it would take: ``lsim cluster check``.

What is measured is the real thing: the metrics are loaded on every worker, and distances of a small archive
are computed by all of them, through the same stage as those of a big one.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
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
"""Packages of which another version computes or stores otherwise."""
MUST_UNDERSTAND = ("dask", "distributed")
"""Packages whose first number must agree: processes of others don't understand one another."""

SEQUENCES_PER_THREAD = 2
"""Of the measurement."""
SAMPLE_BYTES = 2**31
"""Of frames that are measured of a field, at most; but for one sequence."""
LOADING_S = 600
"""How long a worker may take to load the metrics."""


@dataclass(frozen=True)
class WorkerFindings:
    """One worker.

    Attributes
    ----------
    name, address, host : str
    threads : int
    device : str
        Where it has the metrics.
    versions : dict of str to str
        As :func:`pipeline.storage.versions.versions` gives them.
    load_s : float
        Seconds until it had loaded the metrics.
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
    """What distances of one field would take on this cluster.

    Attributes
    ----------
    key : str
        ``<dataset>/<field>``.
    sequences, frames, blocks : int
        Sequences, frames in each, and blocks of sequences.
    sequence_s : float
        Seconds that one thread takes for a sequence, while all are busy.
    total_s : float
        Seconds for all of them, on all threads.
    """

    key: str
    sequences: int
    frames: int
    blocks: int
    sequence_s: float
    total_s: float


@dataclass
class ClusterFindings:
    """What :func:`check_cluster` found.

    Attributes
    ----------
    cluster : dict
        As results record it.
    workers : list of WorkerFindings
    expected : int
        Workers that the profile asks for.
    start_s : float
        Seconds until they were there.
    errors, warnings : list of str
        Versions that differ from those here, so that a run would fail, or might.
    metrics : list of str
        Those that were loaded.
    unavailable : dict of str to str
        Those that weren't, and why.
    estimates : list of FieldEstimate
        Of the measured field, or of those of the store that was given.
    """

    cluster: dict[str, Any] = field(default_factory=dict)
    workers: list[WorkerFindings] = field(default_factory=list)
    expected: int = 1
    start_s: float = 0.0
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    estimates: list[FieldEstimate] = field(default_factory=list)

    @property
    def threads(self) -> int:
        """Of all workers."""
        return sum(worker.threads for worker in self.workers)


def check_cluster(
    profile: Profile,
    settings: Settings | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    frames: str | os.PathLike[str] | None = None,
) -> ClusterFindings:
    """Start a cluster, look at its workers, and measure them.

    Parameters
    ----------
    profile : Profile
    settings : Settings, optional
        Of the distances that are measured; default all metrics.
    folder : path, optional
        Where a small archive may lie for the time of the check: a folder that all workers see. Default for
        workers of this machine: one of its own; for others it must be said.
    frames : path or address, optional
        A ``frames.zarr``, of which some sequences are measured, and all estimated. Default: built-in shapes.

    Returns
    -------
    ClusterFindings
        Without estimates where there are errors.

    Raises
    ------
    ClusterError
        When no worker comes, or one cannot import this package.
    ValueError, pipeline.storage.store.StoreError
        For metrics that aren't there, and for a store that is none.
    """
    settings = settings or Settings()
    pool = Cluster(profile)  # starts nothing, but finds its faults
    if folder is None and profile.kind in (*ACROSS_HOSTS, "address"):
        raise ClusterError(
            f"a cluster of kind {profile.kind!r} is checked with --folder, that all workers see"
        )
    chosen = choose_metrics(settings)
    if frames is not None:
        checked_fields(store.open_store(absolute(frames)), frames)
    found = ClusterFindings(metrics=[m.name for m in chosen.metrics], unavailable=chosen.unavailable)
    with pool as cluster:
        began = time.perf_counter()
        client = cluster.client
        if client is not None:
            found.expected = profile.asked_for.minimum
            with contextlib.suppress(TimeoutError):  # those that have come are looked at
                client.wait_for_workers(found.expected, timeout=profile.wait_s)
        found.start_s = time.perf_counter() - began
        _look_at_workers(client, list(chosen.requests.values()), found)
        found.cluster = cluster.describe()
        if not found.errors:
            with _folder_of(folder) as there:
                found.estimates = list(_measure(cluster, settings, there, frames, found))
    return found


# ---------------------------------------------------------------- workers


def _look_at_workers(client: Any, requests: list[MetricRequest], found: ClusterFindings) -> None:
    here = versions()
    if client is None:
        load_s, device = timed_load(requests)
        found.workers = [WorkerFindings("this process", "", platform.node(), 1, device, here, load_s)]
        return
    known = client.scheduler_info(n_workers=-1)["workers"]
    abroad = client.run(versions, on_error="return")
    for address, answer in abroad.items():
        if isinstance(answer, BaseException):
            raise ClusterError(
                f"worker {address} cannot import this package: {type(answer).__name__}: {answer}"
            ) from answer
    loads = {
        address: client.submit(timed_load, requests, workers=[address], pure=False) for address in abroad
    }
    for address, future in loads.items():
        about = known[address]
        fault = _fault(client, future, address)
        if fault:
            found.errors.append(f"worker {about['name']}: {fault}")
            load_s, device = float("nan"), "none"
        else:
            load_s, device = future.result()
        host = about["host"]
        found.workers.append(
            WorkerFindings(
                str(about["name"]), address, host, about["nthreads"], device, abroad[address], load_s
            )
        )
        errors, warnings = compare_versions(here, abroad[address])
        found.errors += [f"worker {about['name']}: {line}" for line in errors]
        found.warnings += [f"worker {about['name']}: {line}" for line in warnings]


def _fault(client: Any, future: Any, address: str) -> str:
    """Why a worker has not loaded the metrics; empty when it has.

    A worker that dies of it is started again at another address, where nobody computes this future.
    """
    deadline = time.monotonic() + LOADING_S
    while not future.done():
        if address not in client.nthreads():
            return "it has ended while it loaded the metrics"
        if time.monotonic() > deadline:
            return f"it has not loaded the metrics within {LOADING_S} s"
        time.sleep(0.1)
    error = future.exception(timeout=LOADING_S)
    return "" if error is None else str(error)


def timed_load(requests: list[MetricRequest]) -> tuple[float, str]:
    """Load metrics as this worker keeps them; seconds, and on which device. Runs on a worker."""
    began = time.perf_counter()
    metrics = [get_metric(request) for request in requests]
    device = metrics[0].device if metrics else torch.device("cpu")
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return time.perf_counter() - began, f"{device} ({kind})"


def compare_versions(here: Mapping[str, str], there: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """What differs between two processes: what would make a run fail, and what is only worth knowing.

    Parameters
    ----------
    here, there : dict of str to str
        As :func:`pipeline.storage.versions.versions` gives them.

    Returns
    -------
    errors, warnings : list of str
    """
    errors, warnings = [], []
    for name in sorted(here.keys() | there.keys()):
        mine, theirs = here.get(name, "none"), there.get(name, "none")
        if mine == theirs:
            continue
        text = f"{name} {theirs}, here {mine}"
        unlike = mine.partition(".")[0] != theirs.partition(".")[0]
        if name in MUST_AGREE or (name in MUST_UNDERSTAND and unlike):
            errors.append(text)
        else:
            warnings.append(text)
    return errors, warnings


# ---------------------------------------------------------------- measuring


@contextlib.contextmanager
def _folder_of(folder: str | os.PathLike[str] | None) -> Iterator[Path]:
    """A new folder within one that all workers see, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="lsim-check-", dir=folder) as made:
        yield Path(made).absolute()


def _measure(
    cluster: Cluster,
    settings: Settings,
    folder: Path,
    frames: str | os.PathLike[str] | None,
    found: ClusterFindings,
) -> Iterator[FieldEstimate]:
    """Compute a few sequences of each field on all workers at once: what one costs while all are busy."""
    threads = found.threads
    wanted = SEQUENCES_PER_THREAD * threads
    single = settings.model_copy(update={"block": 1})
    for number, (key, sample, parameter, count) in enumerate(_samples(frames, wanted)):
        source = folder / f"frames-{number}.zarr"
        write_sample(source, key, sample, parameter)
        measured, length_of_one = parameter.shape
        # The first time, kernels are compiled.
        compute_distances(source, folder / f"first-{number}.zarr", single, cluster=cluster)
        out = folder / f"second-{number}.zarr"
        report = compute_distances(source, out, single, cluster=cluster)
        done = _computed(store.get_group(store.open_store(out), key))
        for failure in report.failures:
            if (failure.metric, failure.sequence) not in done:
                raise ClusterError(f"{key}: {failure.metric} failed on the cluster: {failure.reason}")
        if report.failures:
            failure = report.failures[0]
            found.warnings.append(
                f"{key}: {failure.metric} cannot compare all frames of sequence {failure.sequence}: "
                f"{failure.reason}"
            )
        runs: Any = store.open_store(out).attrs["runs"]
        spent = sum(runs[-1]["seconds_by_stage"].values()) / measured
        length = block_size(max(spent, 1e-6), count, threads, length_of_one).sequences
        yield FieldEstimate(
            key, count, length_of_one, -(-count // length), spent, count * spent / max(threads, 1)
        )


def _computed(group: store.Group) -> set[tuple[str, str]]:
    """Metrics and sequences that are done, whatever came out: what is missing there is the frames' fault."""
    provenance = store.get_group(group, schema.PROVENANCE)
    metrics = store.read(store.get_array(provenance, schema.METRIC))
    sequences = store.read(store.get_array(group, schema.SEQUENCE))
    fingerprints = store.read(store.get_array(provenance, schema.FINGERPRINT))
    return {(str(metrics[index]), str(sequences[row])) for index, row in np.argwhere(fingerprints != "")}


def _samples(
    frames: str | os.PathLike[str] | None, wanted: int
) -> Iterator[tuple[str, Iterable[np.ndarray], np.ndarray, int]]:
    """Key, frames (frame, y, x, channel) of some sequences, their parameters; how many there are in all."""
    if frames is None:
        made = simulate_families("shapes", wanted)
        for name, values in made.frames.items():
            yield f"Shapes/{name}", values, np.tile(made.parameter, (wanted, 1)), wanted
        return
    location = absolute(frames)
    root = store.open_store(location)
    for key in checked_fields(root, location):
        group = store.get_group(root, key)
        array = store.get_array(group, schema.FRAMES)
        count = array.shape[0]
        of_one = math.prod(array.shape[1:]) * array.dtype.itemsize
        rows = min(count, wanted, max(1, SAMPLE_BYTES // of_one))
        parameter = store.read(store.get_array(group, schema.PARAMETER), slice(0, rows))
        yield key, (store.read(array, row) for row in range(rows)), parameter, count


def write_sample(path: Path, key: str, sequences: Iterable[np.ndarray], parameter: np.ndarray) -> None:
    """A ``frames.zarr`` of one field, written a sequence at a time.

    Parameters
    ----------
    path : path
        Made.
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
