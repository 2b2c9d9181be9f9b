"""Workers hold their metrics: loaded once a process, again after a restart; profiles are checked."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from archives import archive_of, write_archive

from pipeline.choice import Settings
from pipeline.cluster import Cluster
from pipeline.distances import compute_distances
from pipeline.profiles import ClusterError, Profile, load_profile
from pipeline.resident import load_counts
from pipeline.submission import run_bounded

SETTINGS = Settings(metrics=("l1", "ssim"), size=None, block=1)


def squared_or_fail(value: int) -> int:
    """Fails for 3, whoever runs it."""
    if value == 3:
        raise ValueError("three is not squared here")
    return value**2


def where_it_runs() -> int:
    return os.getpid()


def test_each_worker_loads_each_metric_once_and_again_after_a_restart(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(12))
    with Cluster(Profile(workers=2)) as cluster:
        compute_distances(frames, tmp_path / "one.zarr", SETTINGS, cluster=cluster)
        compute_distances(frames, tmp_path / "two.zarr", SETTINGS, cluster=cluster)
        client = cluster.client
        counts = client.run(load_counts)
        assert len(counts) == 2
        assert all(count == {"l1": 1, "ssim": 1} for count in counts.values())

        processes = client.run(where_it_runs)
        victim = next(iter(processes.values()))
        os.kill(victim, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            alive = set(client.run(where_it_runs, on_error="ignore").values())
            if len(alive) == 2 and victim not in alive:
                break
            time.sleep(0.2)
        compute_distances(frames, tmp_path / "three.zarr", SETTINGS, cluster=cluster)
        assert all(count == {"l1": 1, "ssim": 1} for count in client.run(load_counts).values())


@pytest.mark.parametrize("kind", ["none", "local"])
def test_a_task_that_fails_is_handed_back_and_the_others_go_on(kind):
    profile = Profile(kind="none") if kind == "none" else Profile(workers=1)
    with Cluster(profile) as cluster:
        outcomes = {
            task[0]: (result, error)
            for task, result, error in run_bounded(cluster.client, squared_or_fail, ((k,) for k in range(40)))
        }
    assert sorted(outcomes) == list(range(40))
    assert isinstance(outcomes[3][1], ValueError)
    assert all(result == k**2 for k, (result, _) in outcomes.items() if k != 3)


def test_scheduler_and_dashboard_listen_on_loopback_alone():
    with Cluster(Profile(workers=1)) as cluster:
        client = cluster.client
        assert "127.0.0.1" in client.scheduler.address
        assert all("127.0.0.1" in address for address in client.run(where_it_runs))
        listening = {
            line.split()[1].split(":")[0]
            for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
            if line.split()[3] == "0A" and _belongs_to_us(line.split()[9])
        }
        assert listening == {"0100007F"}, "something listens beyond 127.0.0.1"


def _belongs_to_us(inode: str) -> bool:
    descriptors = Path("/proc/self/fd")
    targets = []
    for entry in descriptors.iterdir():
        try:
            targets.append(os.readlink(entry))
        except FileNotFoundError:  # the descriptor of this very listing
            continue
    return f"socket:[{inode}]" in targets


def test_profiles_by_name_address_and_file(tmp_path):
    assert load_profile("none").kind == "none"
    assert load_profile("local", workers=3).workers == 3
    assert load_profile("tls://10.0.0.1:8786").address == "tls://10.0.0.1:8786"
    file = tmp_path / "mine.yaml"
    file.write_text("kind: local\nworkers: 2\n")
    assert load_profile(str(file)).workers == 2


@pytest.mark.parametrize(
    ("text", "fault"),
    [("kind: local\nwrokers: 2\n", "wrokers"), ("kind: address\n", "address"), ("- 1\n", "")],
)
def test_a_profile_with_an_unknown_key_or_wrong_value_is_an_error_that_names_it(tmp_path, text, fault):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ClusterError, match=rf"(?s)mine\.yaml.*{fault}"):
        load_profile(str(file))


def test_an_unknown_profile_is_an_error_that_lists_the_known():
    with pytest.raises(ClusterError, match="local, none"):
        load_profile("lokal")
