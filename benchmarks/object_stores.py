"""How fast stores in an object store are: MB/s of conversion and distances, against a folder, in one run.

The object store is moto's S3 server on loopback, in a process of its own. It is written for tests, in Python,
and is itself the limit: a real object store is farther away and much faster. What is measured is that the
pipeline keeps such a server busy, and what an address costs beside a path with the same workers.

    python benchmarks/object_stores.py [--sequences 24] [--size 256] [--workers 2] [--json]

Conversion reads .npz files of a folder, or copies them from the object store first (``copy``). Distances are
those of one cheap metric on frames as they are, so that reading frames is what takes the time. MB are 10⁶
decoded bytes; the order of path and address changes from repeat to repeat, and the median is given.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import processor
from convert import FRAMES, make_archive

from pipeline.convert import convert
from pipeline.distances import compute_distances
from pipeline.metrics.settings import Settings
from pipeline.sources.catalog import open_catalog
from pipeline.sources.fetch import fetch
from pipeline.storage import objects
from pipeline.storage.versions import versions
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

BUCKET = "bench"
SETTINGS = Settings(metrics=("l1",), size=None)


def start_server(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A moto server on loopback with a bucket, and its address in this process's environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "moto.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
        )
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
    }
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    import boto3

    boto3.client("s3").create_bucket(Bucket=BUCKET)
    return server, f"s3://{BUCKET}"


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(sequences: int, size: int, workers: int, repeats: int) -> dict[str, Any]:
    """Seconds by stage and place, each repeat into new stores."""
    with tempfile.TemporaryDirectory() as name, Cluster(Profile(workers=workers)) as cluster:
        folder = Path(name)
        server, remote = start_server(folder)
        try:
            make_archive(folder, sequences, size, "npz")
            seconds = measure_stages(folder, remote, cluster, repeats)
        finally:
            server.terminate()
            server.wait()
    return {stage: statistics.median(values) for stage, values in seconds.items()}


def measure_stages(folder: Path, remote: str, cluster: Cluster, repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat by stage and place, of the archive in a folder."""
    remote_catalog = copy_archive(folder, remote)
    local_catalog = open_catalog(folder / "catalog.yaml")

    def stages(place: str) -> dict[str, Callable[[], Any]]:
        frames, out = f"{place}/frames.zarr", f"{place}/distances.zarr"
        return {
            "convert": lambda: convert(local_catalog, frames, cluster=cluster),
            "distances": lambda: compute_distances(frames, out, SETTINGS, cluster=cluster),
            "nothing to do": lambda: compute_distances(frames, out, SETTINGS, cluster=cluster),
        }

    for stage in stages(str(folder / "warm")).values():
        stage()
    seconds: dict[str, list[float]] = {}
    for repeat in range(repeats):
        places = {"path": str(folder / f"{repeat}"), "address": f"{remote}/{repeat}"}
        for kind in list(places)[:: 1 if repeat % 2 else -1]:
            for stage, call in stages(places[kind]).items():
                seconds.setdefault(f"{stage}, {kind}", []).append(seconds_of(call))
        data = folder / f"data-{repeat}"
        copy = seconds_of(lambda data=data: fetch(open_catalog(remote_catalog), data_dir=data))
        seconds.setdefault("copy, address", []).append(copy)
    return seconds


def copy_archive(folder: Path, remote: str) -> Path:
    """Copy the archive in a folder to an object store; return the path of a catalog of the copy."""
    for file in sorted((folder / "data").rglob("*.npz")):
        objects.write(f"{remote}/data", str(file.relative_to(folder / "data")), file.read_bytes())
    catalog = folder / "there.yaml"
    catalog.write_text(
        f"name: there\ndatasets:\n- {{name: D, source: {{path: {remote}/data}}, reader: lsim}}\n"
    )
    return catalog


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    seconds = measure(arguments.sequences, arguments.size, arguments.workers, arguments.repeats)
    megabytes = arguments.sequences * FRAMES * arguments.size**2 * 3 * 4 / 1e6
    result = {
        "processor": processor(),
        "cores": os.cpu_count(),
        **vars(arguments),
        "megabytes": megabytes,
        "seconds": seconds,
        "megabytes_per_second": {
            stage: megabytes / value for stage, value in seconds.items() if "nothing" not in stage
        },
        "versions": versions(),
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(
        f"{megabytes:.0f} MB in {arguments.sequences} sequences, {arguments.workers} workers, {processor()}"
    )
    for stage, value in seconds.items():
        rate = "" if "nothing" in stage else f"{megabytes / value:8.0f} MB/s"
        print(f"  {stage:<24}{value:8.2f} s{rate}")
    print("  the object store is moto's server for tests on loopback, and the limit of what is at an address")


if __name__ == "__main__":
    main()
