"""Workers hold their metrics; clusters of every kind start as their profiles say, and listen on loopback."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import dask
import numpy as np
import psutil
import pytest
from commands import run_lsim
from distributed import LocalCluster
from distributed.comm import CommClosedError
from matrices import archive_of, write_archive
from ssh_server import ssh_server
from tasks import slow_task, squared_or_fail, suspicions, where_it_runs

from pipeline import cluster_check
from pipeline.cluster_check import check_cluster, compare_versions, inspect_workers
from pipeline.distances import Settings, compute_distances
from pipeline.stage.bounded_map import run_bounded
from pipeline.workers import cluster as cluster_module
from pipeline.workers import starting, worker_metrics
from pipeline.workers.cluster import FAULT_TOLERANCE, Cluster
from pipeline.workers.cluster_kinds import check_options, jobs_cluster, lifetime, pod_options
from pipeline.workers.profiles import ClusterError, Kind, Profile, load_profile, parse_duration
from pipeline.workers.tls import credentials
from pipeline.workers.worker_metrics import MetricRequest, dismiss_unfit_workers, load_counts, prewarm

SETTINGS = Settings(metrics=("l1", "ssim"), size=None, block=1)


@pytest.fixture(scope="module")
def local() -> Iterator[Cluster]:
    """A running cluster of two processes."""
    with Cluster(Profile(workers=2, environment={"COLOUR": "blue"})) as cluster:
        assert cluster.client is not None
        yield cluster


@pytest.mark.parametrize("kind", ["none", "local"])
def test_a_task_that_fails_is_handed_back_and_the_others_go_on(kind, local):
    client = None if kind == "none" else local.client
    outcomes = {
        task[0]: (result, error)
        for task, result, error in run_bounded(client, squared_or_fail, ((k,) for k in range(40)))
    }
    assert sorted(outcomes) == list(range(40))
    assert isinstance(outcomes[3][1], ValueError)
    assert all(result == k**2 for k, (result, _) in outcomes.items() if k != 3)


def test_nothing_listens_beyond_loopback(local):
    assert local.client.scheduler.address.startswith("tcp://127.0.0.1:")
    me = psutil.Process()
    tree = [me, *me.children(recursive=True)]
    assert {worker.pid for worker in tree} >= set(local.client.run(where_it_runs).values())
    assert listening_on(tree) == {"127.0.0.1"}


def listening_on(processes: list[psutil.Process]) -> set[str]:
    """Addresses on which these processes take connections."""
    return {
        socket.laddr.ip
        for process in processes
        for socket in process.net_connections(kind="inet")
        if socket.status == psutil.CONN_LISTEN
    }


def test_shipped_timeouts_are_those_of_the_scheduler_and_its_workers(local):
    comm, scheduler = (FAULT_TOLERANCE["distributed"][part] for part in ("comm", "scheduler"))
    wanted = {
        "distributed.scheduler.allowed-failures": scheduler["allowed-failures"],
        "distributed.comm.timeouts.tcp": comm["timeouts"]["tcp"],
        "distributed.comm.retry.count": comm["retry"]["count"],
    }
    for name, value in wanted.items():
        assert local.client.run_on_scheduler(dask.config.get, name) == value
        assert set(local.client.run(dask.config.get, name).values()) == {value}
    assert set(local.client.run(os.getenv, "COLOUR").values()) == {"blue"}


def request_of(reference: str) -> MetricRequest:
    """Of a metric of a test's module, as the driver loads it."""
    request = MetricRequest(reference, None, None, 0, "default")
    return request.for_metric(request.load("cpu"))


SEARCH = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
"""Environment in which workers find the tests' modules."""


@pytest.fixture(scope="module")
def one_sound_worker() -> Iterator[LocalCluster]:
    """A cluster of Dask's own with one worker, which others join and leave."""
    with LocalCluster(
        n_workers=1, threads_per_worker=1, env=SEARCH, dashboard_address=None, silence_logs=50
    ) as cluster:
        yield cluster


@contextlib.contextmanager
def joined_by_hindered_ones(sound: LocalCluster, hindrance: str) -> Iterator[tuple[LocalCluster, Any]]:
    """Workers that are added by scale() have ``hindrance`` in their environment; they are gone after it."""
    with sound.get_client() as client:
        wait_until("the sound one", lambda: len(client.nthreads()) == 1)
        sound.new_spec["options"]["env"] = SEARCH | {hindrance: "1"}
        yield sound, client
        sound.scale(1)
        wait_until("the sound one", lambda: len(client.nthreads()) == 1)


def test_a_worker_that_cannot_load_a_metric_leaves_also_when_it_joins_later(one_sound_worker):
    request = request_of("hindered:Unfit")
    with joined_by_hindered_ones(one_sound_worker, "HINDERED_BROKEN") as (cluster, client):
        (sound,) = client.nthreads()
        prewarm(client, [request])
        cluster.scale(2)
        # By the scheduler's record: it may come and go between two looks.
        wait_until("the second", lambda: has_joined_beside(sound, client))
        wait_until("its end", lambda: list(client.nthreads()) == [sound])
        time.sleep(2)
        assert list(client.nthreads()) == [sound], "its nanny has started it again"


def has_joined_beside(sound: str, client: Any) -> bool:
    """Whether the scheduler has seen another worker than this, there still or not."""
    return any(
        address != sound
        and address.startswith("tcp://")
        and any(e["action"] == "add-worker" for _, e in events)
        for address, events in client.get_events().items()
        if all(isinstance(e, dict) and "action" in e for _, e in events)
    )


def test_workers_that_cannot_be_asked_are_not_sent_away(local, monkeypatch):
    there = set(local.client.nthreads())
    monkeypatch.setattr(worker_metrics, "load_metrics", cannot_be_reached)
    dismiss_unfit_workers(local.client, [])
    assert set(local.client.nthreads()) == there


def cannot_be_reached(requests: Any) -> None:
    raise TimeoutError("the network is slow")


def test_each_worker_loads_each_metric_once_and_again_after_a_restart(local, tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(12, frames=3, size=16))
    client = local.client
    compute_distances(frames, tmp_path / "one.zarr", SETTINGS, cluster=local)
    compute_distances(frames, tmp_path / "two.zarr", SETTINGS, cluster=local)
    assert list(client.run(load_counts).values()) == [{"l1": 1, "ssim": 1}] * 2

    victim, other = client.run(where_it_runs).values()
    os.kill(victim, signal.SIGKILL)

    def has_another() -> bool:
        alive = set(client.run(where_it_runs, on_error="ignore").values())
        return len(alive) == 2 and other in alive and victim not in alive

    wait_until("another worker", has_another)
    compute_distances(frames, tmp_path / "three.zarr", SETTINGS, cluster=local)
    assert list(client.run(load_counts).values()) == [{"l1": 1, "ssim": 1}] * 2


def wait_until(what: str, condition: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def test_a_worker_that_is_told_to_go_finishes_its_task_and_hands_back_the_others(local, tmp_path):
    log = tmp_path / "log"
    log.touch()
    client = local.client
    futures = client.map(slow_task, range(6), log=str(log), pure=False)
    wait_until("two tasks", lambda: len(log.read_text().splitlines()) >= 2)
    gone = int(log.read_text().split()[2])
    os.kill(gone, signal.SIGTERM)
    assert client.gather(futures) == list(range(6))
    wait_until("its end", lambda: gone not in client.run(where_it_runs, on_error="ignore").values())
    assert client.run_on_scheduler(suspicions) == 0
    lines = log.read_text().splitlines()
    begun, ended = ([line.split()[1] for line in lines if line.startswith(w)] for w in ("begin", "end"))
    assert sorted(begun) == sorted(ended) == [str(k) for k in range(6)], "a task was lost, or run again"


def test_a_nanny_that_is_told_to_go_waits_for_its_worker(one_sound_worker, tmp_path):
    log = tmp_path / "log"
    log.touch()
    scheduler = one_sound_worker.scheduler_address
    command = [sys.executable, "-m", "distributed.cli.dask_worker", scheduler, "--nthreads", "1"]
    nanny = subprocess.Popen(
        [*command, "--name", "a", "--dashboard-address", "127.0.0.1:0"],
        env=os.environ | SEARCH,
        stderr=subprocess.DEVNULL,
    )
    try:
        with Cluster(Profile(kind="address", address=scheduler, start_timeout=120)) as cluster:
            client = cluster.client
            client.wait_for_workers(2, timeout=120)
            futures = client.map(slow_task, range(6), log=str(log), pure=False)
            wait_until("two tasks", lambda: len(log.read_text().splitlines()) >= 2)
            nanny.terminate()
            assert client.gather(futures) == list(range(6))
            assert client.run_on_scheduler(suspicions) == 0
            assert nanny.wait(timeout=60) == 0
    finally:
        nanny.terminate()
        nanny.wait(timeout=120)
    lines = log.read_text().splitlines()
    ended = [line.split()[1] for line in lines if line.startswith("end")]
    assert sorted(ended) == [str(k) for k in range(6)]
    assert len(lines) == 12, "a task was lost, or run again"


@pytest.mark.smoke
def test_a_cluster_by_ssh_is_encrypted_and_leaves_nothing(tmp_path):
    shared = tmp_path / "shared"
    with ssh_server(tmp_path) as connection:
        options = {"hosts": ["127.0.0.1", "127.0.0.1"], "connect_options": connection}
        profile = Profile(
            kind="ssh",
            workers=2,
            shared_folder=str(shared),
            environment={"COLOUR": "blue"},
            start_timeout=120,
            options=options,
        )
        with Cluster(profile) as cluster:
            client = cluster.client
            client.wait_for_workers(2, timeout=120)
            assert client.scheduler.address.startswith("tls://")
            assert all(address.startswith("tls://") for address in client.run(os.getpid))
            assert set(client.run(os.getenv, "COLOUR").values()) == {"blue"}
            assert cluster.describe() == {"profile": "ssh", "threads": 1, "tls": True, "workers": 2}
            assert len(list(shared.iterdir())) == 1
    assert not list(shared.iterdir())


def test_a_host_that_cannot_be_reached_is_an_error_that_names_it(tmp_path):
    options = {"hosts": ["127.0.0.1", "127.0.0.1"], "connect_options": {"port": 1, "known_hosts": None}}
    profile = Profile(kind="ssh", shared_folder=str(tmp_path), options=options)
    with Cluster(profile) as cluster, pytest.raises(ClusterError, match=r"127\.0\.0\.1"):
        assert cluster.client
    assert not list(tmp_path.iterdir())


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["slurm", "pbs"])
def test_the_script_of_a_job(kind, tmp_path):
    profile = Profile(
        kind=kind,
        threads=2,
        memory_limit="4GiB",
        walltime="02:00:00",
        interface="lo",
        resources={"GPU": 1},
        environment={"PLACE": "a b"},
        shared_folder=str(tmp_path),
        options={"queue": "long", "job_script_prologue": ["module load cuda"]},
    )
    with credentials(profile) as security, jobs_cluster(profile, security) as cluster:
        script = cluster.job_script()
        assert listening_on([psutil.Process()]) == {"127.0.0.1"}, "the scheduler listens beyond its interface"
        (folder,) = tmp_path.iterdir()
    directives = {
        "slurm": ["-p long", "--cpus-per-task=2", "--mem=4G", "-t 02:00:00"],
        "pbs": ["-q long", "-l select=1:ncpus=2:mem=4096MB", "-l walltime=02:00:00"],
    }
    for directive in directives[kind]:
        assert f"#{'SBATCH' if kind == 'slurm' else 'PBS'} {directive}\n" in script
    before, _, command = script.partition(" -m distributed.cli.dask_worker ")
    prologue = before.splitlines()
    assert "trap : TERM" in prologue, "the job would end before its worker"
    assert "export PLACE='a b'" in prologue
    assert "export DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP=12s" in prologue
    assert prologue.index("module load cuda") > prologue.index("export PLACE='a b'")
    assert command.startswith("tls://127.0.0.1:")
    for option in (
        "--nthreads 2",
        "--memory-limit 4.00GiB",
        "--resources GPU=1",
        "--interface lo",
        "--lifetime 6840s --lifetime-stagger 300s --no-lifetime-restart",
        f"--tls-key {folder / 'key.pem'}",
        "--no-dashboard --dashboard-address 127.0.0.1:0",
    ):
        assert f" {option}" in command
    assert "PRIVATE KEY" not in script


# ---------------------------------------------------------------- profiles


def test_profiles_by_name_address_and_file(tmp_path):
    assert load_profile("none").kind == "none"
    assert load_profile("local", workers=3).workers == 3
    assert load_profile("tls://10.0.0.1:8786").address == "tls://10.0.0.1:8786"
    file = tmp_path / "mine.yaml"
    file.write_text("kind: local\nworkers: 2\n")
    assert load_profile(str(file)).workers == 2


@pytest.mark.parametrize("name", get_args(Kind))
def test_a_profile_of_every_kind_is_shipped_and_its_options_are_some(name):
    if name == "address":
        pytest.skip("addresses are named as they are")
    profile = load_profile(name)
    assert profile.kind == name
    with contextlib.suppress(ClusterError) if not is_here(name) else contextlib.nullcontext():
        check_options(profile)


def is_here(kind: str) -> bool:
    """Whether the package that starts clusters of this kind is installed."""
    module = {"cuda": "dask_cuda", "kubernetes": "dask_kubernetes"}.get(kind, "distributed")
    return importlib.util.find_spec(module) is not None


@pytest.mark.skipif(is_here("cuda"), reason="dask-cuda is here")
def test_a_package_that_is_not_here_is_an_error_that_names_the_extra():
    with pytest.raises(ClusterError, match=r"pip install 'lsim\[cuda\]'"):
        Cluster(load_profile("cuda"))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kind: local\nwrokers: 2\n", "wrokers: unknown key, did you mean 'workers'"),
        ("kind: address\n", "address"),
        ("kind: lokal\n", "'local'"),
        ("- 1\n", "expected keys and values"),
        ("kind: none\nworkers: 2\n", "'none' has no workers"),
        ("kind: local\nwalltime: 1h\n", "'local' has no walltime"),
        ("kind: local\ndevice: cuda:0\nthreads: 2\n", "threads: expected 1"),
        ("kind: cuda\nthreads: 2\n", "threads: expected 1"),
        ("kind: slurm\n", "memory_limit: expected a number, as in 4GB"),
        ("kind: slurm\nmemory_limit: 1GB\nwalltime: soon\n", "walltime: expected a duration"),
        ("workers: {minimum: 4, maximum: 2}\n", r"workers: minimum \(4\) exceeds maximum \(2\)$"),
        ("workers: {maximum: 2, most: 3}\n", "workers.most: unknown key, expected minimum, maximum$"),
        (
            "workers: {min: 1, max: 2}\n",
            "workers.maximum: missing; workers.min: unknown key, did you mean 'minimum'.*"
            "workers.max: unknown key, did you mean 'maximum'",
        ),
        ("workers: two\n", "': workers: expected a whole number from 1, or a range as in .*, found 'two'$"),
        ("workers: 2.5\n", "workers: expected a whole number from 1, .*, found 2.5$"),
        ("workers: true\n", "workers: expected a whole number from 1, .*, found true$"),
        ("workers: 0\n", "workers: expected a whole number from 1, .*, found 0$"),
        ("workers: {maximum: true}\n", "workers.maximum: expected a whole number, found true$"),
        ("workers: 1\nworkers: 2\n", "workers: expected once, found again in line 2$"),
        ("options: {a: 1, a: 2}\n", "a: expected once, found again in line 1$"),
        ("1: 2\n", "1: unknown key"),
        ("options: {1: 3}\n", "options.1: expected text, found 1$"),
        ("kind: [local\n", "line 2: expected ',' or ']', but got '<stream end>'$"),
        ("kind: lokal\n", "kind: expected 'local'.*, found 'lokal'$"),
        ("threads: -1\n", "threads: expected greater than or equal to 1, found -1$"),
        ("environment: {A: true}\n", "environment.A: expected text, found true$"),
        ("resources: {GPU: -1}\n", "resources.GPU: expected greater than or equal to 0, found -1$"),
        ("memory_limit: lots\n", "memory_limit: expected bytes as in 4GB, or auto, found 'lots'$"),
        ("memory_limit: -4GB\n", "memory_limit: expected bytes .*, found '-4GB'$"),
        ("memory_limit: true\n", "memory_limit: expected bytes .*, found true$"),
        ("kind: slurm\nmemory_limit: 0\n", "memory_limit: expected a number, .* found '0'$"),
        ("device: tpu\n", "device: expected auto, cpu, cuda or cuda:N, found 'tpu'$"),
        ("device: 'cuda:'\n", "device: expected .*, found 'cuda:'$"),
        ("grace: true\n", "grace: expected a duration .*, found true$"),
        (
            "kind: address\naddress: tcp://127.0.0.1\n",
            "address: expected tcp://HOST:PORT .*, found 'tcp:.*1'$",
        ),
        ("kind: address\naddress: http://127.0.0.1:8786\n", "address: expected tcp://HOST:PORT .*, found"),
        ("kind: address\naddress: tcp://a:65536\n", "address: expected tcp://HOST:PORT .*, found"),
        ("security: {ca_file: a}\n", "security.cert: missing"),
        ("kind: ssh\nworkers: {maximum: 2}\n", "fixed number"),
        ("kind: local\ntls: false\nsecurity: {ca_file: a, cert: b, key: c}\n", "tls: false"),
        ("kind: slurm\nmemory_limit: 1GB\nhost: a\ninterface: b\n", "expected one of them, found both"),
    ],
)
def test_a_profile_with_an_unknown_key_or_wrong_value_is_an_error_that_names_it(tmp_path, text, fault):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ClusterError, match=rf"(?s)mine\.yaml.*{fault}"):
        load_profile(str(file))


def test_a_profile_with_values_as_dask_takes_them(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("environment: {<<: {A: 1, B: 2}, A: 3}\n")  # no key twice
    assert load_profile(str(file)).environment == {"A": "3", "B": "2"}
    for text, taken in (("4000000000", "4000000000"), ("4GB", "4GB"), ("auto", "auto"), ("0.5", "0.5")):
        file.write_text(f"memory_limit: {text}\ndevice: cuda:1\n")
        assert load_profile(str(file)).memory_limit == taken
    with pytest.raises(ClusterError, match=r"^cluster 'tcp://10.0.0.1': address: expected tcp://HOST:PORT"):
        load_profile("tcp://10.0.0.1")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("options: {n_workerz: 3}\n", "options.n_workerz: .*no such option"),
        ("host: 203.0.113.7\n", "host: expected an address or a name of this machine, found '203.0.113.7'"),
        ("host: no.such.host.invalid\n", "host: expected an address .*, found 'no.such.host.invalid'"),
        ("kind: slurm\nmemory_limit: 4GB\ninterface: ib77\n", "interface: expected one .*, found 'ib77'"),
        (
            "kind: slurm\nmemory_limit: 4GB\nwalltime: '00:00:10'\n",
            "walltime: expected more than 67 s, .*found 10 s$",
        ),
        (
            "kind: ssh\noptions: {hosts: [a, b], connect_options: {usrname: me}}\n",
            "options.connect_options.usrname: .*did you mean 'username'",
        ),
        ("kind: ssh\noptions: {hosts: localhost}\n", "options.hosts: expected a list, found 'localhost'"),
        (
            "kind: slurm\nmemory_limit: 4GB\noptions: {scheduler_options: [1]}\n",
            "options.scheduler_options: expected keys and values, found",
        ),
    ],
)
def test_what_a_kind_cannot_do_names_the_file_and_the_key_before_anything_starts(tmp_path, text, fault):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    profile = load_profile(str(file))
    with pytest.raises(ClusterError, match=rf"^cluster profile '\S+mine\.yaml': {fault}"):
        Cluster(profile)
    with pytest.raises(ClusterError, match=fault):  # and not that a folder is missing
        check_cluster(profile)


@pytest.fixture
def lost_starts(monkeypatch) -> Callable[[str, Exception, int], list[str]]:
    """Have starts fail, where and how often a test says; gives the list of attempts."""

    def fail(where: str, error: Exception, times: int) -> list[str]:
        attempts: list[str] = []

        def reach(place: str) -> None:
            attempts.append(place)
            if place == where and attempts.count(place) <= times:
                raise RuntimeError("Cluster failed to start: see above") from error

        def start(profile: Profile, security: object) -> contextlib.nullcontext[str]:
            reach("start")
            return contextlib.nullcontext("a cluster")

        monkeypatch.setattr(starting, "start_cluster", start)
        monkeypatch.setattr(starting, "Client", lambda cluster, security: contextlib.nullcontext("a client"))
        monkeypatch.setattr(cluster_module, "_set_up", lambda client, profile: reach("set-up"))
        return attempts

    return fail


@pytest.mark.parametrize("where", ["start", "set-up"])
@pytest.mark.parametrize(
    "said",
    [RuntimeError("Nanny failed to start worker process"), OSError("Stream is closed"), TimeoutError()],
)
def test_workers_that_are_lost_while_they_start_are_started_again(said, where, lost_starts):
    attempts = lost_starts(where, said, 2)
    with Cluster(Profile(kind="local")) as cluster:
        assert cluster.client == "a client"
    assert attempts.count(where) == 3
    lost_starts(where, said, 3)
    said_of_it = "no workers on this machine: in 3 attempts a process died"
    with Cluster(Profile(kind="local")) as cluster, pytest.raises(ClusterError, match=said_of_it):
        assert cluster.client


def test_a_start_that_fails_for_another_reason_fails_at_once(lost_starts):
    attempts = lost_starts("start", FileNotFoundError(2, "No such file", "/nope"), 1)
    with Cluster(Profile(kind="local")) as cluster, pytest.raises(ClusterError, match="No such file"):
        assert cluster.client
    assert attempts == ["start"]


def test_a_plugin_reaches_workers_though_one_is_lost_meanwhile(monkeypatch):
    monkeypatch.setattr(worker_metrics, "REGISTERED_AGAIN_AFTER_S", 0)
    attempts = []

    class Client:
        def register_plugin(self, plugin: object) -> None:
            attempts.append(plugin)
            if len(attempts) < 3:
                raise CommClosedError("Stream is closed")

    worker_metrics.register_plugin(Client(), "a plugin")
    assert attempts == ["a plugin"] * 3
    monkeypatch.setattr(worker_metrics, "REGISTRATIONS", 2)
    attempts.clear()
    with pytest.raises(ClusterError, match="workers were lost while they started, 2 times"):
        worker_metrics.register_plugin(Client(), "a plugin")


def test_ctrl_c_stays_whose_it_was_when_a_library_of_clusters_is_imported(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "dask_jobqueue"]:
        monkeypatch.delitem(sys.modules, name)
    handler = signal.getsignal(signal.SIGINT)
    check_options(Profile(kind="slurm", memory_limit="4GB", walltime=3600))
    assert "dask_jobqueue.runner" in sys.modules
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_cluster_that_does_not_start_is_one_line_that_names_the_file(tmp_path, capfd):
    file = tmp_path / "mine.yaml"
    file.write_text("workers: 1\noptions: {local_directory: /proc/nope}\n")
    said = r"mine\.yaml': a cluster of kind 'local' did not start, with options local_directory: .*nope'$"
    with Cluster(load_profile(str(file))) as cluster, pytest.raises(ClusterError, match=said):
        assert cluster.client
    assert "Traceback" not in capfd.readouterr().err


def test_a_device_that_is_not_there_is_an_error_of_the_worker_in_one_line(capfd):
    found = check_cluster(Profile(workers=1, device="cuda:99"), SETTINGS)
    (error,) = found.errors
    assert re.fullmatch(
        r"worker 0: device: expected one that worker .* has, found 'cuda:99' and \d+ GPUs", error
    )
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"options": {"local_direktory": "/x"}}, "local_direktory.*did you mean 'local_directory'"),
        ({"options": {"n_workers": 2}}, "n_workers is not for profiles.*use workers"),
        ({"options": {"interface": "eth0"}}, "interface is not for profiles.*use host"),
        ({"kind": "slurm", "options": {"queu": "a"}}, "queu.*did you mean 'queue'"),
        ({"kind": "slurm", "options": {"cores": 2}}, "cores is not for profiles.*use threads"),
        ({"kind": "slurm", "options": {"processes": 2}}, "processes is not.*use workers.*can be replaced"),
        ({"kind": "slurm", "options": {"worker_extra_args": ["--nworkers", "2"]}}, "use workers"),
        ({"kind": "pbs", "options": {"job_cpu": 2}}, "job_cpu.*no such option"),
        ({"kind": "slurm", "options": {"scheduler_options": {"prot": 1}}}, "prot.*did you mean 'port'"),
        ({"kind": "slurm", "options": {"worker_extra_args": ["--lifetime=1h"]}}, "use lifetime"),
        (
            {"kind": "slurm", "walltime": "00:02:00", "lifetime": "3m"},
            "lifetime: expected .*at most 54 s, .*found 180 s",
        ),
        ({"kind": "slurm", "walltime": "00:01:00"}, "walltime: expected more than 67 s, .*found 60 s"),
        ({"kind": "ssh"}, "options.hosts: expected the scheduler's host"),
        (
            {"kind": "ssh", "options": {"hosts": ["a", "b"], "worker_options": {"nthreads": 2}}},
            "nthreads is not for profiles.*use threads",
        ),
    ],
)
def test_options_are_checked_before_anything_starts(settings, fault):
    settings = settings | ({"memory_limit": "1GB"} if settings.get("kind") in ("slurm", "pbs") else {})
    with pytest.raises(ClusterError, match=fault):
        Cluster(Profile(**settings))


@pytest.mark.skipif(not is_here("kubernetes"), reason="dask-kubernetes is not here")
@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({}, "set tls: false"),
        ({"tls": False, "options": {"imagge": "a"}}, "did you mean 'image'"),
        (
            {"tls": False, "threads": 2, "options": {"custom_cluster_spec": "a.yaml"}},
            "threads: cannot be combined with options.custom",
        ),
    ],
)
def test_a_cluster_of_pods_cannot_be_encrypted_and_says_so(settings, fault):
    with pytest.raises(ClusterError, match=fault):
        Cluster(Profile(kind="kubernetes", **settings))


@pytest.mark.skipif(not is_here("kubernetes"), reason="dask-kubernetes is not here")
def test_the_pods_of_a_cluster():
    from dask_kubernetes.operator import make_cluster_spec

    profile = Profile(
        kind="kubernetes",
        tls=False,
        threads=2,
        memory_limit="4GB",
        environment={"PLACE": "a b"},
        options={"image": "mine:1", "resources": {"limits": {"nvidia.com/gpu": "1"}}},
    )
    spec = make_cluster_spec(name="lsim", n_workers=3, **pod_options(profile))
    assert spec["spec"]["worker"]["replicas"] == 3
    (pod,) = spec["spec"]["worker"]["spec"]["containers"]
    assert pod["image"] == "mine:1"
    assert pod["resources"] == {"limits": {"nvidia.com/gpu": "1"}}
    assert {"--nthreads", "2", "--memory-limit", "4GB"} <= set(pod["args"])
    variables = {entry["name"]: entry["value"] for entry in pod["env"]}
    assert variables["PLACE"] == "a b"
    assert variables["DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL"] == "20s"


def test_workers_are_gone_before_the_walltime_is_over():
    for hours in (0.1, 1, 24, 200):
        profile = Profile(kind="slurm", memory_limit="1GB", walltime=hours * 3600, grace=25)
        lasting, stagger = lifetime(profile)
        assert lasting > stagger
        assert lasting + stagger + 25 < hours * 3600


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("2 hours", 7200), ("01:30:00", 5400), ("1-00:00:00", 86400), ("10:00", 36000), (45, 45)],
)
def test_durations_as_batch_systems_and_dask_have_them(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("wrong", ["soon", "1:2:3:4", "", None, "a:b"])
def test_what_is_no_duration_is_an_error(wrong):
    with pytest.raises(ValueError, match="expected a duration"):
        parse_duration(wrong)


def test_an_unknown_profile_is_an_error_that_lists_the_known():
    with pytest.raises(ClusterError, match="kubernetes, local, none"):
        load_profile("lokal")


def test_workers_are_for_clusters_that_are_started():
    with pytest.raises(ClusterError, match="--workers applies to clusters that lsim starts"):
        load_profile("none", workers=2)


# ---------------------------------------------------------------- lsim cluster check


def test_check_measures_a_cluster_and_tells_what_a_run_would_take(local, tmp_path):
    archive = write_archive(tmp_path / "frames.zarr", archive_of(30, frames=4, size=32))
    address, count = local.client.scheduler.address, len(local.client.nthreads())
    options = ("--metrics", "l1,ssim", "--folder", tmp_path)
    code, text = run_lsim("cluster", "check", address, archive, *options)
    assert code == 0, text
    assert f"{count} worker(s), {count} thread(s)" in text
    assert "distributed" in text
    assert "A/density: a sequence of 4 frames takes" in text
    assert "30 sequences in" in text


def test_check_wants_a_folder_that_all_workers_see():
    with pytest.raises(ClusterError, match="--folder"):
        check_cluster(load_profile("slurm"))


def test_a_worker_that_dies_of_loading_is_found_by_the_check(one_sound_worker):
    request = request_of("hindered:Fatal")
    with joined_by_hindered_ones(one_sound_worker, "HINDERED_FATAL") as (cluster, client):
        cluster.scale(2)
        client.wait_for_workers(2, timeout=120)
        inspection = inspect_workers(client, [request])
    assert len(inspection.workers) == 2
    (error,) = inspection.errors
    assert "ended while it loaded the metrics" in error


def test_check_of_frames_with_nan_warns_and_measures_few_bytes(tmp_path, monkeypatch):
    archive = archive_of(3, frames=4)
    archive["A/density"]["s0"][2] = np.nan
    frames = write_archive(tmp_path / "frames.zarr", archive)
    monkeypatch.setattr(cluster_check, "SAMPLE_BYTES", 1)
    found = check_cluster(Profile(kind="none"), SETTINGS, frames=frames)
    assert not found.errors
    (warned,) = [line for line in found.warnings if "A/density" in line]
    assert "frames 2 hold NaN" in warned
    (estimate,) = found.estimates
    assert (estimate.sequences, estimate.frames) == (3, 4)


def test_versions_that_matter_are_errors_and_others_are_told():
    here = {"lsim": "0.1.0", "torch": "2.5", "dask": "2026.1.0", "python": "3.11.7", "scipy": "1.14"}
    assert compare_versions(here, here) == ([], [])
    there = here | {"torch": "2.6", "dask": "2026.2.0", "python": "3.12.1"}
    errors, warned = compare_versions(here, there)
    assert errors == ["torch 2.6, here 2.5"]
    assert warned == ["dask 2026.2.0, here 2026.1.0", "python 3.12.1, here 3.11.7"]
    errors, _ = compare_versions(here, here | {"dask": "2025.12.0"})
    assert errors == ["dask 2025.12.0, here 2026.1.0"]
    errors, _ = compare_versions(here, {k: v for k, v in here.items() if k != "lsim"})
    assert errors == ["lsim none, here 0.1.0"]
