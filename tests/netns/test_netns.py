"""Several hosts under TLS: a worker cut off in mid-run that comes back, clocks that differ, strangers.

The hosts share this machine's disk, as those of a cluster share theirs: a network that fails takes the
scheduler away from a worker, not the stores.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paced
import pytest
from commands import run_lsim, skip_or_fail
from hosts import ADDRESSES, ROOT, SCHEDULER, Hosts, Membership, netns, why_no_hosts, write_credentials
from matrices import archive_of, matrices_of, write_archive

from pipeline.storage import schema, store

pytestmark = [pytest.mark.netns, pytest.mark.timeout(900)]

TESTS = Path(paced.__file__).parent
SEQUENCES = 100
KEY = "A/density"
RECOVERY_S = 60
"""A bound of liveness on any machine; what it took is printed."""
SETTINGS = ("--metrics", "l2,paced:Paced", "--size", "0", "--block", "1")
IN_ONE = (*SETTINGS[:-1], "20", "--cluster", "none")


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    return write_archive(tmp_path_factory.mktemp("archive") / "frames.zarr", archive_of(SEQUENCES, frames=4))


@pytest.fixture(scope="module")
def undisturbed(frames, tmp_path_factory) -> dict[str, np.ndarray]:
    """Matrices by metric, computed in one process."""
    out = tmp_path_factory.mktemp("undisturbed") / "d.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
        code, text = run_lsim("distances", frames, "--out", out, *IN_ONE)
    assert code == 0, text
    return matrices_of(out)


@pytest.fixture(scope="module")
def credentials(tmp_path_factory) -> dict[str, str]:
    """Environment in which Dask uses the credentials of these hosts."""
    return write_credentials(tmp_path_factory.mktemp("credentials"))


@pytest.fixture
def hosts(tmp_path, credentials) -> Iterator[Hosts]:
    """Hosts that are connected, with a scheduler on h0 and nothing else."""
    if reason := why_no_hosts():
        skip_or_fail(reason)
    netns("up")
    search = os.pathsep.join([str(TESTS), str(ROOT), os.environ.get("PYTHONPATH", "")])
    bare = {name: value for name, value in os.environ.items() if not name.startswith("DASK_")}
    environment = bare | credentials | {"PYTHONPATH": search, "COLUMNS": "400"}
    environment[paced.FOLDER] = str(tmp_path)
    environment["DASK_CONFIG"] = str(ROOT / "workflows" / "clusters" / "dask")
    found = Hosts(tmp_path, environment)
    try:
        scheduler = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", ADDRESSES["h0"]]
        found.start("h0", *scheduler, "--port", "8786", "--no-dashboard", log="scheduler.log")
        yield found
    finally:
        for process in found.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        netns("down")


def chunk_times(out: Path) -> dict[str, int]:
    """Time of writing of the chunks of all finished matrices, by path."""
    group = store.get_group(store.open_store(out), f"{KEY}/{schema.PROVENANCE}")
    names = store.read(store.get_array(group, schema.METRIC))
    done = store.read(store.get_array(group, schema.FINGERPRINT)) != ""
    paths = [out / KEY / str(names[i]) / "c" / str(row) / "0" / "0" for i, row in np.argwhere(done)]
    return {str(path): path.stat().st_mtime_ns for path in paths}


def test_a_host_cut_off_costs_its_blocks_and_comes_back(hosts, frames, undisturbed, capsys):
    out = hosts.folder / "d.zarr"
    pace = paced.Pace(hosts.folder)
    pace.seconds = 0.7
    members = Membership(hosts)
    for host in ("h1", "h2"):
        hosts.start_worker(host)
    hosts.wait_until("two workers", lambda: members.names == ["h1", "h2"])
    run = hosts.start_lsim(
        "h0", "distances", frames, "--out", out, *SETTINGS, "--cluster", SCHEDULER, log="run.log"
    )
    hosts.wait_until("both compute", lambda: pace.workers() == {"h1", "h2"})
    # The driver writes records every two seconds.
    hosts.wait_until("some blocks are recorded", lambda: bool(chunk_times(out)))

    netns("cut", "h2")
    cut = time.time()
    finished = chunk_times(out)
    hosts.wait_until("the scheduler gives h2 up", lambda: members.names == ["h1"], RECOVERY_S)
    lost = members.changes[-1]["time"] - cut
    done = len(pace.lines("end"))
    hosts.wait_until("h1 goes on", lambda: "h1" in pace.workers(after=done))

    netns("mend", "h2")
    mended = time.time()
    hosts.wait_until("h2 is back", lambda: members.names == ["h1", "h2"])
    back = members.changes[-1]["time"] - mended
    assert run.poll() is None, "the run was over before the host was back: nothing was tested"
    done = len(pace.lines("end"))
    hosts.wait_until("h2 computes again", lambda: "h2" in pace.workers(after=done))
    pace.seconds = 0
    assert run.wait(timeout=120) == 0, hosts.log("run.log")
    with capsys.disabled():
        print(
            f"\nh2 given up {lost:.1f} s after it was cut off, back {back:.1f} s after the network was mended"
        )
    np.testing.assert_equal(matrices_of(out), undisturbed)
    assert {path: time for path, time in chunk_times(out).items() if path in finished} == finished
    assert len({sequence for sequence, _ in pace.lines("end")}) == SEQUENCES


def test_strangers_are_refused(hosts, frames, credentials, tmp_path):
    members = Membership(hosts)
    hosts.wait_until("a client with credentials", lambda: bool(members.changes))
    foreign = write_credentials(tmp_path)
    clear = SCHEDULER.replace("tls", "tcp")
    strangers = {
        "without TLS": (clear, {}, f"no scheduler answers at {clear}"),
        "without credentials": (SCHEDULER, {}, f"{SCHEDULER} needs certificates"),
        "with others' credentials": (SCHEDULER, foreign, "no scheduler answers to these certificates"),
    }
    started = {}
    for number, (who, (address, theirs, _)) in enumerate(strangers.items()):
        stranger = dataclasses.replace(
            hosts, environment={k: v for k, v in hosts.environment.items() if k not in credentials} | theirs
        )
        out = tmp_path / f"{number}.zarr"
        started[who] = stranger.start_lsim(
            "h1", "distances", frames, "--out", out, *SETTINGS, "--cluster", address, log=f"{number}.log"
        )
    for number, (who, (_, _, expected)) in enumerate(strangers.items()):
        assert started[who].wait(timeout=120) == 1, who
        assert expected in hosts.log(f"{number}.log"), who
    assert members.process.poll() is None, "the scheduler is there still"


def test_clocks_differ_and_a_host_is_told_to_go(hosts, frames, undisturbed):
    out = hosts.folder / "d.zarr"
    pace = paced.Pace(hosts.folder)
    pace.seconds = 0.5
    search = os.pathsep.join([str(Path(__file__).parent / "skewed"), hosts.environment["PYTHONPATH"]])
    scripts = [
        hosts.start_worker(host, PYTHONPATH=search, CLOCK_AHEAD_S=str(ahead))
        for host, ahead in (("h1", -3600), ("h2", 3600))
    ]
    members = Membership(hosts)
    hosts.wait_until("two workers", lambda: members.names == ["h1", "h2"])
    run = hosts.start_lsim(
        "h0", "distances", frames, "--out", out, *SETTINGS, "--cluster", SCHEDULER, log="run.log"
    )
    hosts.wait_until("both compute", lambda: pace.workers() == {"h1", "h2"})
    # The script and all its processes, as a batch system tells them.
    os.killpg(scripts[1].pid, signal.SIGTERM)
    assert scripts[1].wait(timeout=120) == 0
    pace.seconds = 0
    assert run.wait(timeout=120) == 0, hosts.log("run.log")
    # The script alone, as systemd and sbatch --signal B: do.
    scripts[0].terminate()
    assert scripts[0].wait(timeout=120) == 0
    np.testing.assert_equal(matrices_of(out), undisturbed)
    pace.assert_begun_once(SEQUENCES)
    assert not any("starting it again" in hosts.log(f"worker-{host}.log") for host in ("h1", "h2"))
    first, second = (clock_of(hosts.log(f"worker-{host}.log")) for host in ("h1", "h2"))
    assert second - first > datetime.timedelta(minutes=90), "the clocks did not differ"


def clock_of(log: str) -> datetime.datetime:
    """The first time in a worker's log."""
    found = re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", log, re.MULTILINE)
    assert found, log
    return datetime.datetime.fromisoformat(found[0])
