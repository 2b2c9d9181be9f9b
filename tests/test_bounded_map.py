"""Tasks in flight: few of them whatever their number, none lost, and no one waited for too long."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import dask
import pytest
from distributed import Client, KilledWorker
from tasks import Nap, die, double, nap, nap_or_watch, raise_as_told, take, wait_for

from pipeline.distances.blocks import Block, FieldBlocks
from pipeline.matrix import embeddings
from pipeline.matrix.tiles import TileTask
from pipeline.stage import bounded_map
from pipeline.stage.bounded_map import reason_of, run_bounded
from pipeline.workers import pickled_task, sigterm
from pipeline.workers.cluster import FAULT_TOLERANCE, Cluster
from pipeline.workers.profiles import ClusterError, Profile
from pipeline.workers.worker_metrics import still_wanted


@pytest.fixture
def client(two_workers: Cluster) -> Client:
    return two_workers.client


def test_tasks_are_taken_as_others_finish(client):
    taken = 0

    def tasks():
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield (number,)

    ahead, found = [], []
    for done, ((number,), result, error) in enumerate(run_bounded(client, double, tasks())):
        assert (result, error) == (2 * number, None)
        found.append(number)
        # What has come in one message with this one is done, too.
        ahead.append(taken - done)
    assert sorted(found) == list(range(1000))
    assert max(ahead) <= 2 * bounded_map.IN_FLIGHT
    assert ahead[0] <= bounded_map.IN_FLIGHT


def test_no_tasks_are_no_trouble(client):
    assert list(run_bounded(client, double, [])) == []
    assert list(run_bounded(None, double, [])) == []


@pytest.fixture(scope="module")
def growing() -> Iterator[Cluster]:
    """A cluster that starts with one worker, in which a task that takes two of them along is given up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAULT_TOLERANCE["distributed"]["scheduler"], "allowed-failures", 1)
        with Cluster(Profile(workers=1)) as cluster:
            assert cluster.client is not None
            yield cluster


def test_the_window_follows_the_threads_that_join(growing, monkeypatch):
    monkeypatch.setattr(bounded_map, "IN_FLIGHT", 2)
    monkeypatch.setattr(bounded_map, "COUNT_THREADS_S", 0.1)
    stop = time.monotonic() + 60
    taken, joined, windows = 0, 0.0, []

    def tasks():
        nonlocal taken
        while time.monotonic() < stop:
            taken += 1
            yield (0.05,)

    client = growing.client
    for done, _ in enumerate(run_bounded(client, nap, tasks())):
        windows.append(taken - done)
        if done == 20:
            client.cluster.scale(2)
        if not joined and len(client.nthreads()) == 2:
            joined, stop = done, time.monotonic() + 2
    assert joined, "no second worker in a minute"
    assert max(windows[:20]) <= 2 * bounded_map.IN_FLIGHT_PER_THREAD
    assert max(windows) > 1.5 * max(windows[:20])


def test_a_task_that_kills_its_workers_is_handed_back_and_the_others_go_on(growing):
    outcomes = {
        number: error for (number,), _, error in run_bounded(growing.client, die, ((k,) for k in range(12)))
    }
    assert sorted(outcomes) == list(range(12))
    assert isinstance(outcomes.pop(5), KilledWorker)
    assert set(outcomes.values()) == {None}


def test_a_task_knows_when_nobody_waits_for_it_any_more(client, tmp_path):
    """What goes on in its thread then writes nothing: the next run may be writing."""
    outcomes = run_bounded(client, nap_or_watch, [(0.0, ""), (0.0, str(tmp_path))])
    next(outcomes)
    wait_for(tmp_path / "wanted True")
    outcomes.close()
    wait_for(tmp_path / "given up")
    assert still_wanted()  # outside of a worker


def test_a_task_that_runs_far_too_long_is_told_of_once(client, monkeypatch, caplog):
    monkeypatch.setattr(bounded_map, "HUNG_SECONDS", 0.5)
    tasks = [(Nap(0.02),) for _ in range(20)] + [(Nap(3.0), Nap(0.0))]
    assert len(list(run_bounded(client, take, tasks))) == 21
    (said,) = [record.getMessage() for record in caplog.records if "may hang" in record.getMessage()]
    assert said.startswith("A/density, sequences 8 to 11 and 1 more: has run for ")
    assert "on worker tcp://127.0.0.1:" in said
    assert "is kept if you end this command (Ctrl-C or SIGTERM)" in said


def test_tasks_of_stages_say_what_they_are_of():
    common = ("frames.zarr", "out.zarr", "A/density")
    block = Block(FieldBlocks(*common, {}, "all"), 8, ("",) * 4, (b"",) * 4, {})
    assert block.label == "A/density, sequences 8 to 11"
    tiles = TileTask(*common, (), {}, {"l2": ((0, 3), (0, 4)), "l1": ((0, 3),)}, {}, (0.0, 1.0), 1, 1)
    assert tiles.label == "A/density, 2 tiles from (0, 3)"
    field = embeddings.FieldBlocks(*common, None, "", (0.0, 1.0), n=5, sequences=4, frames_per_chunk=20)
    assert embeddings.Block(field, 2, ("a", "b")).label == "A/density, sequences 8 to 9"


def test_nothing_is_told_of_tasks_that_are_all_long(client, monkeypatch, caplog):
    monkeypatch.setattr(bounded_map, "HUNG_SECONDS", 0.2)
    assert len(list(run_bounded(client, nap, [(0.5 + k / 1000,) for k in range(6)]))) == 6
    assert not caplog.records


def test_a_task_that_would_end_its_process_fails_and_the_worker_stays(client):
    before = set(client.nthreads())
    tasks = [(kind,) for kind in ("exit", "interrupt", "bare")]
    reasons = {kind: reason_of(error) for (kind,), _, error in run_bounded(client, raise_as_told, tasks)}
    assert reasons == {
        "exit": "SystemExit: 7",
        "interrupt": "KeyboardInterrupt",
        "bare": "BaseException: bare",
    }
    assert set(client.nthreads()) == before
    # Here Ctrl-C is the user's.
    ((_, _, error),) = run_bounded(None, raise_as_told, [("exit",)])
    assert reason_of(error) == "SystemExit: 7"
    with pytest.raises(KeyboardInterrupt):
        list(run_bounded(None, raise_as_told, [("interrupt",)]))


FAULTS = """
if __name__ == "__main__":  # workers import this file, and nothing by it
    import os, signal
    from pipeline.workers.cluster import Cluster
    from pipeline.workers.profiles import Profile
    from pipeline.stage.bounded_map import run_bounded
    from tasks import die, raise_as_told

    with Cluster(Profile(workers=1)) as cluster:
        tasks = [("exit",), ("interrupt",), ("bare",)]
        assert all(error for _, _, error in run_bounded(cluster.client, raise_as_told, tasks))
        (pid,) = cluster.client.run(os.getpid).values()
        os.kill(pid, signal.SIGKILL)
        assert [error for _, _, error in run_bounded(cluster.client, die, [(4,)])] == [None]
"""


def test_what_our_own_messages_say_is_not_logged_besides(tmp_path):
    script = tmp_path / "faults.py"
    script.write_text(FAULTS)
    search = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": search}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stderr == ""


def test_what_workers_log_is_kept_where_logging_is_configured(monkeypatch, capfd):
    monkeypatch.setenv("DASK_LOGGING__DISTRIBUTED", "error")
    with dask.config.set({"logging.distributed": "error"}), Cluster(Profile(workers=1)) as cluster:
        assert all(error for _, _, error in run_bounded(cluster.client, raise_as_told, [("bare",)]))
    assert "Compute Failed" in capfd.readouterr().err


def test_sigterm_is_heeded_while_a_lost_result_is_computed_again(client, monkeypatch):
    monkeypatch.setattr(bounded_map, "OUTCOME_S", 0.2)
    future = client.submit(nap, 2.0, pure=False)
    assert bounded_map._outcome(future) is None  # of one that isn't done, or not any more
    deadline = time.monotonic() + 60
    while (outcome := bounded_map._outcome(future)) is None:
        assert time.monotonic() < deadline
    assert outcome == (2.0, None)


def test_a_result_that_is_lost_with_the_scheduler_is_an_error(client):
    flight = bounded_map._Flight(client, nap, iter(()))
    future = client.submit(nap, 5.0, pure=False)
    future.cancel()
    with pytest.raises(ClusterError, match="lost the scheduler"):
        flight._ask(lambda: bounded_map._outcome(future))


class Outside:
    """A scheduler in a process of its own, on loopback, which has no worker until one is wanted."""

    def __init__(self) -> None:
        self.worker: subprocess.Popen[bytes] | None = None
        command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1"]
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--dashboard-address", "127.0.0.1:0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        self.address = next(line.split()[-1] for line in self.process.stdout if "Scheduler at:" in line)

    def start_worker(self) -> None:
        """Start the worker, unless it is there."""
        if self.worker is None:
            command = [sys.executable, "-m", "distributed.cli.dask_worker", self.address, "--nthreads", "1"]
            search = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
            self.worker = subprocess.Popen(
                [*command, "--no-nanny", "--no-dashboard"], env=os.environ | {"PYTHONPATH": search}
            )

    def end(self) -> None:
        for process in filter(None, (self.process, self.worker)):
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def outside() -> Iterator[Outside]:
    made = Outside()
    yield made
    made.end()


def test_a_run_without_workers_says_so_once_and_waits(outside, monkeypatch, caplog):
    """The scheduler, for its part, needs nothing of what tasks name but one module, which imports nothing."""
    monkeypatch.setattr(bounded_map, "NO_WORKERS_S", 0.2)
    monkeypatch.setattr(bounded_map, "COUNT_THREADS_S", 0.05)
    with Client(outside.address) as client:
        threading.Timer(1.5, outside.start_worker).start()
        assert [result for _, result, _ in run_bounded(client, double, [(4,)])] == [8]
        imported = client.run_on_scheduler(lambda: sorted(__import__("sys").modules))
    (said,) = [record for record in caplog.records if "no worker for" in record.getMessage()]
    assert "squeue or qstat" in said.getMessage()
    assert pickled_task.__name__ in imported
    assert not {"torch", "zarr", "lsim", "tasks"} & set(imported)


def test_a_scheduler_that_dies_is_an_error_and_no_wait_without_end(outside):
    outside.start_worker()
    logged = logging.StreamHandler(io.StringIO())
    logging.getLogger("distributed.client").addHandler(logged)
    try:
        with Cluster(Profile(kind="address", address=outside.address)) as cluster:
            outcomes = run_bounded(cluster.client, nap, ((0.05,) for _ in range(10_000)))
            next(outcomes)
            outside.process.send_signal(signal.SIGKILL)
            began = time.monotonic()
            with pytest.raises(ClusterError, match=r"lost the scheduler.*run the same command again"):
                for _ in outcomes:
                    pass
        assert time.monotonic() - began < 90
        assert logged.stream.getvalue() == "", "said twice, with a traceback"
    finally:
        logging.getLogger("distributed.client").removeHandler(logged)


# ---------------------------------------------------------------- stopped by a batch system


@pytest.fixture
def stop(monkeypatch) -> Iterator[None]:
    """SIGTERM is handled as the command does, and what was asked is forgotten after."""
    monkeypatch.setattr(sigterm, "_state", sigterm._State())
    before = signal.getsignal(signal.SIGTERM)
    sigterm.stop_on_sigterm()
    yield
    signal.signal(signal.SIGTERM, before)


def terminate_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_waits_for_what_runs_and_begins_nothing(client, stop):
    done = []

    def stop_after_three() -> None:
        for (number,), _, error in run_bounded(client, nap, ((0.3 + k / 1000,) for k in range(500))):
            done.append((number, error))
            if len(done) == 3:
                terminate_this_process()
                terminate_this_process()  # a second one changes nothing

    with pytest.raises(sigterm.Stopped) as stopped:
        stop_after_three()
    assert stopped.value.code == 143
    assert 3 < len(done) <= 9  # the two that ran, and what had finished by then
    assert all(error is None for _, error in done)


def test_sigterm_does_not_wait_longer_than_the_grace_time(client, stop, tmp_path):
    sigterm.allow_grace(0.5)
    threading.Timer(1.0, terminate_this_process).start()
    began = time.monotonic()
    with pytest.raises(sigterm.Stopped):
        list(run_bounded(client, wait_for, [(tmp_path / "the end of the test",)]))
    assert time.monotonic() - began < 15
    # Its thread is free again: tests after this one would wait for it.
    (tmp_path / "the end of the test").touch()


def test_sigterm_in_this_process_ends_after_the_task_in_hand(stop):
    done = []

    def stop_after_four() -> None:
        for (number,), _, _ in run_bounded(None, double, ((k,) for k in range(9))):
            done.append(number)
            if number == 4:
                terminate_this_process()

    with pytest.raises(sigterm.Stopped):
        stop_after_four()
    assert done == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("workers", [False, True])
def test_sigterm_at_the_last_task_ends_what_comes_after(client, stop, workers):
    done = []

    def stop_at_the_last() -> None:
        for (number,), _, _ in run_bounded(client if workers else None, double, [(7,)]):
            done.append(number)
            terminate_this_process()

    with pytest.raises(sigterm.Stopped):
        stop_at_the_last()
    assert done == [7]


def test_sigterm_elsewhere_ends_at_once(stop):
    with pytest.raises(sigterm.Stopped):
        terminate_this_process()
