"""Stores in an object store: the same bytes as in a folder, one run at a time, no secret anywhere.

The server is moto's, on loopback, in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from commands import run_lsim
from matrices import archive_of, write_archive
from moto.server import ThreadedMotoServer
from obstore.exceptions import PermissionDeniedError
from obstore.store import S3Store
from zarr.storage import ObjectStore

from lsim.simulate import write_families
from pipeline.cli import main
from pipeline.convert import convert
from pipeline.correlate import correlate
from pipeline.distances import compute_distances
from pipeline.matrix import compute_matrix
from pipeline.matrix.neighbours import find_neighbours
from pipeline.metrics.settings import Settings
from pipeline.report import write_report
from pipeline.simulate import simulate
from pipeline.sources.catalog import MissingDataError, open_catalog
from pipeline.sources.fetch import fetch
from pipeline.sources.local_folder import local_folder
from pipeline.sources.remote_copy import bring, find_copy
from pipeline.stage.bounded_map import run_bounded
from pipeline.storage import locks, object_errors, objects, schema, store
from pipeline.storage.address import AddressError, absolute
from pipeline.storage.address_store import zarr_store
from pipeline.train import TrainingRun, open_sequences
from pipeline.verify import verify
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

KEY_ID, SECRET = "AKIAOFTHETEST", "hush/hush+0123456789abcdef"
QUICK = Settings(metrics=("l1", "l2"), size=None, block=2)


@pytest.fixture(scope="module")
def server():
    """Address of an S3 server on loopback."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def bucket(server, monkeypatch, request):
    """A bucket of this test's own, and the environment that opens it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    import boto3

    name = f"test-{abs(hash(request.node.nodeid)):x}"[:40]
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


def objects_of(address: str) -> dict[str, bytes]:
    """All objects below an address, with their bytes."""
    found = {name: objects.read(address, name) for name in objects.names(address)}
    return {name: content for name, content in found.items() if content is not None}


def files_of(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def chunks_alone(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in found.items() if not name.endswith("zarr.json")}


def put_archive(address: str, count: int, folder: Path, **options: int) -> Path:
    """A frames.zarr of random sequences, in a folder and at an address."""
    path = write_archive(folder / "frames.zarr", archive_of(count, **options))
    for name, content in files_of(path).items():
        objects.write(address, name, content)
    return path


def catalog_file(folder: Path, source: str, dataset: str = "Waves") -> Path:
    file = folder / "mine.yaml"
    entry = {"name": dataset, "source": {"path": source}, "reader": "lsim"}
    file.write_text(json.dumps({"name": "mine", "datasets": [entry]}))
    return file


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> Path:
    """Three families of waves as folders of files."""
    folder = tmp_path_factory.mktemp("families") / "waves"
    write_families(folder, "waves", range(1, 4), 32, 0, "npz")
    return folder


def take_environment(environment: dict[str, str]) -> dict[str, str]:
    """Give a process what this one has of AWS; what it had before."""
    before = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("AWS_")}
    os.environ.update(environment)
    return before


@pytest.fixture
def remote_workers(bucket, two_workers):
    """The shared cluster, with the environment that opens the bucket, as workers that start now have it."""
    opening = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    (before, *_) = two_workers.client.run(take_environment, opening).values()
    yield two_workers
    two_workers.client.run(take_environment, before)


def test_the_whole_chain_ends_with_the_bytes_of_one_in_folders(
    bucket, remote_workers, tmp_path, families, capfd
):
    """Converted to S3, computed there by two workers, correlated and reported: and no secret anywhere."""
    catalog = open_catalog(catalog_file(tmp_path, str(families)))
    here = tmp_path / "run"
    pages = {}
    with Cluster(Profile(kind="none")) as alone:
        for place, cluster in ((bucket, remote_workers), (str(here), alone)):
            frames, distances = f"{place}/frames.zarr", f"{place}/distances.zarr"
            results = f"{place}/results"
            convert(catalog, frames, cluster=cluster)
            assert compute_distances(frames, distances, QUICK, cluster=cluster).computed == 6
            correlate(distances, results, replicates=2)
            pages[place] = write_report(results)
    client = remote_workers.client
    logs = f"{client.get_worker_logs()} {client.get_scheduler_logs()}"

    for name in ("frames.zarr", "distances.zarr"):
        remote, local = objects_of(f"{bucket}/{name}"), files_of(here / name)
        assert remote.keys() == local.keys()
        assert chunks_alone(remote) == chunks_alone(local)
        assert len(chunks_alone(remote)) > 3
    assert store.open_store(f"{bucket}/distances.zarr").attrs["frames"] == "../frames.zarr"

    # xarray reads it as any store of Zarr's.
    theirs = ObjectStore(S3Store(bucket.removeprefix("s3://"), prefix="distances.zarr"), read_only=True)
    with xr.open_datatree(theirs, engine="zarr") as tree:
        (key,) = store.field_keys(store.open_store(f"{bucket}/distances.zarr"), schema.PARAMETER)
        schema.validate_distances(tree[key].to_dataset(), key)

    for name in ("correlations.parquet", "differences.parquet", "left_out.csv", "correlation.csv"):
        assert objects.read(f"{bucket}/results", name) == (here / "results" / name).read_bytes()
    assert pages[bucket] == f"{bucket}/results/report/index.html"
    page = objects.read(f"{bucket}/results/report", "index.html").decode()
    assert page.count("<img") == Path(pages[str(here)]).read_text().count("<img") > 0

    # A second run does nothing, and starts no worker.
    before = objects_of(bucket)
    with Cluster(Profile(workers=2)) as cluster:
        assert not convert(catalog, f"{bucket}/frames.zarr", cluster=cluster).changed
        again = compute_distances(f"{bucket}/frames.zarr", f"{bucket}/distances.zarr", QUICK, cluster=cluster)
        assert (again.computed, again.up_to_date) == (0, 6)
        assert cluster.dashboard is None
    assert correlate(f"{bucket}/distances.zarr", f"{bucket}/results", replicates=2).up_to_date
    assert chunks_alone(objects_of(bucket)) == chunks_alone(before)
    assert not [name for name in before if ".lock" in name]

    printed = "".join(capfd.readouterr())
    everything = [*before.values(), *files_of(tmp_path).values(), printed.encode(), logs.encode()]
    for text in everything:
        assert SECRET.encode() not in text
        assert KEY_ID.encode() not in text


def test_source_data_is_copied_from_an_address_and_converted(bucket, tmp_path, families, monkeypatch):
    monkeypatch.setenv("LSIM_DATA", str(tmp_path / "data"))
    for name, content in files_of(families).items():
        objects.write(f"{bucket}/archive/waves", name, content)
    catalog = open_catalog(catalog_file(tmp_path, f"{bucket}/archive/waves"))
    out = f"{bucket}/frames.zarr"
    with pytest.raises(MissingDataError, match=f"lies at {bucket}/archive/waves.*lsim catalog fetch"):
        convert(catalog, out)
    assert [done.action for done in fetch(catalog)] == ["downloaded"]
    assert len(convert(catalog, out).converted) == 3
    assert [done.action for done in fetch(catalog)] == ["present"]
    assert not convert(catalog, out).changed
    key = store.field_keys(store.open_store(out), schema.FRAMES)[0]
    convert(open_catalog(catalog_file(tmp_path, str(families))), tmp_path / "frames.zarr")
    for name in (schema.FRAMES, schema.CONTENT):
        remote, local = (
            store.open_dataset(place, key)[name].values for place in (out, tmp_path / "frames.zarr")
        )
        assert np.array_equal(remote, local)

    # What vanished there vanishes here; what is half copied doesn't count.
    gone = sorted({name.partition("/")[0] for name in files_of(families)})[0]
    for name in objects.names(f"{bucket}/archive/waves/{gone}"):
        objects.delete(f"{bucket}/archive/waves/{gone}", name)
    assert [done.action for done in fetch(catalog)] == ["downloaded"]
    report = convert(catalog, out)
    assert (len(report.removed), len(report.unchanged)) == (1, 2)
    copy = tmp_path / "data" / "mine" / "Waves"
    assert find_copy(f"{bucket}/archive/waves", copy) == copy
    objects.write(f"{bucket}/one", "run.nc", b"not read here")
    assert bring(f"{bucket}/one/run.nc", tmp_path / "one")
    assert find_copy(f"{bucket}/one/run.nc", tmp_path / "one") == tmp_path / "one" / "run.nc"
    with pytest.raises(FileExistsError, match="no copy of"):
        bring(f"{bucket}/one", families)
    with pytest.raises(objects.ObjectStoreError, match="nothing here"):
        bring(f"{bucket}/absent", tmp_path / "absent")


def test_an_object_of_the_same_size_and_second_is_copied_again_where_its_tag_is_another(bucket, tmp_path):
    folder, note = tmp_path / "in", tmp_path / ".in.brought-from.json"
    objects.write(f"{bucket}/in", "one", b"1")
    objects.write(f"{bucket}/in", "two", b"a")
    assert bring(f"{bucket}/in", folder)
    objects.write(f"{bucket}/in", "one", b"2")
    for one in objects.list_objects(f"{bucket}/in"):
        os.utime(folder / one.name, (one.time, one.time))
    assert bring(f"{bucket}/in", folder)
    assert files_of(folder) == {"one": b"2", "two": b"a"}
    assert not bring(f"{bucket}/in", folder)
    # A copy of an earlier version has no tags: it is taken as it is, and notes them.
    noted = json.loads(note.read_text())
    assert all(noted["tags"].values())
    note.write_text(json.dumps({"from": noted["from"], "file": ""}))
    assert not bring(f"{bucket}/in", folder)
    assert json.loads(note.read_text()) == noted


def test_simulations_become_a_store_at_an_address_and_are_trained_on_there(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("LSIM_DATA", str(tmp_path / "data"))
    with Cluster(Profile(kind="none")) as cluster:
        with pytest.raises(ValueError, match="format zarr writes a store to an address"):
            simulate("waves", f"{bucket}/made", 2, 32, cluster=cluster)
        report = simulate("waves", f"{bucket}/made", 2, 32, format="zarr", cluster=cluster)
    assert report.store == f"{bucket}/made.zarr"
    assert report.folder == tmp_path / "data" / "simulated" / "made" / "waves"
    run = TrainingRun(out=str(tmp_path / "run"), data=report.store)
    source = open_sequences(run)
    assert len(source.names) == 2
    assert source.read(0).frames.shape[0] == 11


def test_commands_take_addresses_and_their_errors_hold_no_secret(bucket, tmp_path, families):
    put_archive(f"{bucket}/frames.zarr", 3, tmp_path)
    options = ("--metrics", "l2", "--size", "0", "--cluster", "none")
    out = f"{bucket}/d.zarr"
    code, text = run_lsim("distances", f"{bucket}/frames.zarr", "--out", out, *options)
    assert code == 0, text
    code, more = run_lsim("correlate", out, "--out", f"{bucket}/results", "--replicates", 0)
    assert code == 0, more
    code, page = run_lsim("report", f"{bucket}/results", "--out", tmp_path / "report")
    assert code == 0, page
    assert (tmp_path / "report" / "index.html").exists()
    code, local = run_lsim(
        "convert",
        catalog_file(tmp_path, str(families)),
        "--out",
        f"file://{tmp_path}/f.zarr",
        "--cluster",
        "none",
    )
    assert code == 0, local
    assert (tmp_path / "f.zarr" / "zarr.json").exists()
    secret = f"s3://{KEY_ID}:{SECRET}@bucket/frames.zarr"
    code, refused = run_lsim("distances", secret, "--out", out, *options)
    assert code == 1, refused
    assert "error: s3://…: an address holds" in refused
    assert "no credentials" in refused
    assert SECRET not in text + more + page + local + refused


def count_done(out: str) -> int:
    """Count fingerprints; none before the store is laid out."""
    try:
        provenance = store.get_group(store.open_store(out), "A/density/provenance")
        return int((store.read(store.get_array(provenance, schema.FINGERPRINT)) != "").sum())
    except store.StoreError:
        return 0


def test_a_store_has_one_writer_and_says_who_it_is(bucket):
    address = f"{bucket}/deep/s.zarr"
    with store.locked(address):
        owner = json.loads(objects.read(f"{bucket}/deep", "s.zarr.lock"))
        assert owner["pid"] == os.getpid()
        with pytest.raises(store.StoreError) as found, store.locked(address):
            pass
    for part in (f"process {os.getpid()} on {socket.gethostname()}", f"delete {address}.lock", "5 minutes"):
        assert part in str(found.value)
    assert list(objects.names(bucket)) == []
    with pytest.raises(KeyboardInterrupt), store.locked(address):
        raise KeyboardInterrupt
    assert list(objects.names(bucket)) == []


def run_until_refused() -> None:
    """Run tasks as a stage does, in this process, until its lock is lost."""
    deadline = time.monotonic() + 60
    for _, _, error in run_bounded(None, time.sleep, itertools.repeat((0.02,))):
        assert error is None
        assert time.monotonic() < deadline, "was not stopped"


def test_a_lock_that_nobody_renews_is_taken_over_and_its_owner_stops(bucket, monkeypatch):
    address = f"{bucket}/s.zarr"
    monkeypatch.setattr(locks, "RENEW_S", 0.05)
    with pytest.raises(store.StoreError, match="took it over"), store.locked(address):  # noqa: PT012
        first = json.loads(objects.read(bucket, "s.zarr.lock"))
        elsewhere = first | {"machine": "elsewhere", "id": "another"}
        objects.write(bucket, "s.zarr.lock", json.dumps(elsewhere).encode())
        run_until_refused()
    # What another machine holds is let be, until it is stale by the store's clock.
    assert json.loads(objects.read(bucket, "s.zarr.lock"))["id"] == "another"
    with pytest.raises(store.StoreError, match="another run"), store.locked(address):
        pass
    age_s = objects.age_s
    monkeypatch.setattr(objects, "age_s", lambda *of: age_s(*of) + locks.STALE_S + 1)
    with store.locked(address):
        assert json.loads(objects.read(bucket, "s.zarr.lock"))["pid"] == os.getpid()
    assert list(objects.names(bucket)) == []


def test_an_owner_that_cannot_renew_its_lock_stops_before_another_may_take_it(bucket, monkeypatch):
    """Its credentials have expired, say: nothing tells it that the lock is another's."""
    address = f"{bucket}/s.zarr"
    monkeypatch.setattr(locks, "RENEW_S", 0.05)
    monkeypatch.setattr(locks, "STALE_S", 1.0)
    ended = "could not be renewed.*nothing listens"
    with pytest.raises(store.StoreError, match=ended), store.locked(address):  # noqa: PT012

        def fail(*_: object, **__: object) -> None:
            raise objects.ObjectStoreError("nothing listens")

        monkeypatch.setattr(objects, "write_if", fail)
        run_until_refused()


def test_a_run_that_lost_its_lock_writes_nothing_more(bucket, monkeypatch):
    address = f"{bucket}/s.zarr"
    monkeypatch.setattr(locks, "RENEW_S", 0.05)
    with pytest.raises(store.StoreError, match="took it over"), store.locked(address):  # noqa: PT012
        root = store.open_output(address, schema.FRAMES_STORE)
        before = objects_of(address)
        elsewhere = json.loads(objects.read(bucket, "s.zarr.lock")) | {
            "machine": "elsewhere",
            "id": "another",
        }
        objects.write(bucket, "s.zarr.lock", json.dumps(elsewhere).encode())
        try:
            run_until_refused()
        finally:
            attempts = (
                lambda: store.set_attributes(root, {"runs": ["mine"]}),
                lambda: store.consolidate(address),
                lambda: store.create_group(root, "more"),
            )
            for attempt in attempts:
                with pytest.raises(locks.LockedError, match="took it over"):
                    attempt()
            store.set_attributes(root, {"runs": ["mine"]})  # as a stage does that was stopped
    assert objects_of(address) == before
    assert json.loads(objects.read(bucket, "s.zarr.lock"))["id"] == "another"


def test_what_consoles_make_for_folders_is_in_nobodys_way(bucket, tmp_path):
    import boto3

    client, name = boto3.client("s3"), bucket.removeprefix("s3://")
    for key in ("in/", "in/sub/", "in/sub/deep/", "in/vacant/", "out/", "out/d/", "results/"):
        client.put_object(Bucket=name, Key=key, Body=b"")
    objects.write(f"{bucket}/in", "sub/deep/one", b"1")
    objects.write(f"{bucket}/in", "empty", b"")
    assert list(objects.names(f"{bucket}/in")) == ["empty", "sub/deep/one"]
    assert bring(f"{bucket}/in", tmp_path / "in")
    assert files_of(tmp_path / "in") == {"empty": b"", "sub/deep/one": b"1"}
    assert not bring(f"{bucket}/in", tmp_path / "in")
    with pytest.raises(objects.ObjectStoreError, match="nothing here"):
        bring(f"{bucket}/results", tmp_path / "results")
    with local_folder(f"{bucket}/in") as folder:
        assert [path.name for path in folder.iterdir()] == ["empty"]
    with store.locked(f"{bucket}/out"):
        root = store.open_output(f"{bucket}/out", schema.FRAMES_STORE)
        group = store.create_group(root, "d")
        client.put_object(Bucket=name, Key="out/d/", Body=b"")
        store.create_group(group, "f")
        assert [found for found, _ in root.groups()] == ["d"]
        assert [found for found, _ in group.groups()] == ["f"]


class Proxy:
    """Between a server and those who ask it: an outage, of which the server's data know nothing."""

    def __init__(self, server: str) -> None:
        host, _, port = server.removeprefix("http://").partition(":")
        self.target, self.port = (host, int(port)), 0
        self.connections: list[socket.socket] = []
        self.up()

    def up(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def down(self) -> None:
        """Nobody listens any more, and what was open is closed."""
        for one in (self.listener, *self.connections):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.connections.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                ends = listener.accept()[0], socket.create_connection(self.target)
                self.connections += ends
                for pair in (ends, ends[::-1]):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(2**16):
                sink.sendall(block)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


class Interrupted:
    """`lsim distances` at addresses, through a server that is gone once some blocks are there."""

    options = ("--metrics", "ssim,vi", "--size", "0", "--block", "1", "--cluster", "none")

    def __init__(self, bucket: str, undisturbed: Path, proxy: Proxy) -> None:
        self.bucket, self.undisturbed, self.proxy = bucket, undisturbed, proxy
        for name, content in files_of(undisturbed / "frames.zarr").items():
            objects.write(f"{bucket}/frames.zarr", name, content)
        self.patience: float = 180

    @property
    def command(self) -> tuple[str, ...]:
        places = (f"{self.bucket}/frames.zarr", "--out", f"{self.bucket}/d.zarr")
        return ("distances", *places, *self.options)

    def start(self) -> subprocess.Popen[str]:
        program = f"from pipeline.storage import objects; objects.PATIENCE_S = {self.patience}"
        program = f"{program}; from pipeline.stage import row_records; row_records.FLUSH_S = 0.1"
        program = f"{program}; from pipeline.cli import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", program, *self.command],
            env={**os.environ, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.port}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def count(self) -> int:
        """How many blocks of the last metric are there."""
        return sum(1 for _ in objects.names(f"{self.bucket}/d.zarr/A/density/vi/c"))

    def until_some_are_done(self) -> subprocess.Popen[str]:
        run, deadline = self.start(), time.monotonic() + 120
        records = f"{self.bucket}/d.zarr/A/density/provenance/{schema.FINGERPRINT}/c"
        # A look at one address costs the server less than opening the store.
        while not any(objects.names(records)) or count_done(f"{self.bucket}/d.zarr") < 4:
            assert run.poll() is None, run.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return run

    @contextlib.contextmanager
    def gone_for(self, seconds: float) -> Iterator[None]:
        """A run in this process finds its server gone for a while once some blocks are there."""
        gone = threading.Event()
        ended = threading.Event()

        def restart() -> None:
            while self.count() < 3 and not ended.is_set():
                time.sleep(0.02)
            if not ended.is_set():
                self.proxy.down()
                gone.set()
                ended.wait(seconds)
                self.proxy.up()

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{self.proxy.port}")
            thread = threading.Thread(target=restart)
            thread.start()
            try:
                yield
            finally:
                early = not gone.is_set()
                ended.set()
                thread.join()
        assert not early, "the run ended before its server was gone"

    def until_it_is_gone(self) -> subprocess.Popen[str]:
        run = self.until_some_are_done()
        self.proxy.down()
        return run

    def check(self) -> None:
        """What is there now has the bytes of an undisturbed run in a folder."""
        found = chunks_alone(objects_of(f"{self.bucket}/d.zarr"))
        assert found == chunks_alone(files_of(self.undisturbed / "d.zarr"))


SEQUENCES = 6
"""Of which two are left, at least, where a run ends once three are there."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A folder with frames, and the distances of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    frames = write_archive(folder / "frames.zarr", archive_of(SEQUENCES, frames=6, size=32))
    settings = Settings(metrics=("ssim", "vi"), size=None, block=1)
    with Cluster(Profile(kind="none")) as cluster:
        compute_distances(frames, folder / "d.zarr", settings, cluster=cluster)
    return folder


@pytest.fixture
def interrupted(bucket, server, undisturbed):
    proxy = Proxy(server)
    yield Interrupted(bucket, undisturbed, proxy)
    proxy.down()


def test_a_run_whose_driver_is_killed_goes_on_and_computes_no_block_twice(interrupted):
    bucket, out = interrupted.bucket, f"{interrupted.bucket}/d.zarr"
    driver = interrupted.until_some_are_done()
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    assert objects.read(bucket, "d.zarr.lock") is not None  # it had no time to give it back
    done = count_done(out)
    assert 0 < done < 2 * SEQUENCES
    # The lock counts for nothing: its process has ended.
    code, text = run_lsim(*interrupted.command)
    assert code == 0, text
    assert f"{2 * SEQUENCES - done} distance matrices computed, {done} up to date" in text
    interrupted.check()
    assert objects.read(bucket, "d.zarr.lock") is None


def error_of(run: subprocess.Popen[str]) -> str:
    """The one line that a run ends with, soon and with 1."""
    text = run.communicate(timeout=100)[0]
    assert run.returncode == 1, text
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if "error" in line.lower()]
    return line


def test_a_run_outlives_a_restart_of_the_server(interrupted):
    with interrupted.gone_for(8):
        code, text = run_lsim(*interrupted.command)
    assert code == 0, text
    interrupted.check()


def test_a_run_whose_server_stays_away_ends_and_goes_on_later(interrupted):
    """It ends soon: what would have been asked of the server afterwards isn't tried for minutes each."""
    interrupted.patience = 3
    run = interrupted.until_it_is_gone()
    assert "s3://" in (line := error_of(run))
    assert "the object store does not answer" in line
    code, text = run_lsim(*interrupted.command)
    assert code == 0, text
    assert f"{2 * SEQUENCES} distance matrices computed" not in text
    interrupted.check()


def test_a_run_whose_server_comes_back_without_its_data_says_so(interrupted):
    run = interrupted.until_it_is_gone()
    for name in objects.names(interrupted.bucket):
        objects.delete(interrupted.bucket, name)
    interrupted.proxy.up()
    assert interrupted.bucket in error_of(run)
    for name in objects.names(interrupted.bucket):
        assert not name.startswith("frames.zarr/")


class Refusing(BaseHTTPRequestHandler):
    """An S3 server that lists buckets as empty while ``answers`` is true, and then refuses the token."""

    answers = True
    status = 400
    text = "<Code>ExpiredToken</Code><Message>Expired.</Message><Token-0>hush-token</Token-0>"

    def do_GET(self) -> None:
        status, text = 200, "<ListBucketResult></ListBucketResult>"
        if not self.answers:
            status, text = self.status, f"<Error>{self.text}</Error>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing(bucket, monkeypatch):
    """The address of a store, of which a server gives lists until it is told otherwise."""
    handler = type("Handler", (Refusing,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_of_what_a_server_answers_only_status_and_code_are_shown(refusing):
    address = "s3://bucket/s.zarr"
    remote = zarr_store(address)
    refusing.answers = False

    async def listing(keys: AsyncIterator[str]) -> list[str]:
        return [key async for key in keys]

    attempts = (
        lambda: objects.read(address, "x"),
        lambda: objects.list_objects(address),
        lambda: list(objects.names(address)),
        lambda: asyncio.run(listing(remote.list())),
        lambda: asyncio.run(listing(remote.list_prefix("a"))),
        lambda: asyncio.run(listing(remote.list_dir("a"))),
        lambda: asyncio.run(remote.delete_dir("a")),
        lambda: asyncio.run(remote.getsize_prefix("a")),
    )
    for attempt in attempts:
        with pytest.raises(objects.ObjectStoreError) as found:
            attempt()
        assert str(found.value) == f"{address}: the object store refuses: 400 Bad Request, ExpiredToken"
    refusing.status = 404
    for attempt in (
        lambda: list(objects.blocks(address, "x")),
        lambda: objects.write(address, "x", b""),
    ):
        with pytest.raises(FileNotFoundError, match=f"no such object: '{address}/x'$") as gone:
            attempt()
        assert gone.value.__suppress_context__


MALFORMED = "<Code>AuthorizationHeaderMalformed</Code><Message>The authorization header is malformed"


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (301, "", "bucket 'bucket' is in another region: set AWS_REGION to that one"),
        (301, "<Code>PermanentRedirect</Code>", "bucket 'bucket' is in another region.*: set AWS_REGION to"),
        (
            400,
            f"{MALFORMED}; the region 'us-east-1' is wrong; expecting 'eu-central-1'</Message>"
            "<Region>eu-central-1</Region>",
            r"bucket 'bucket' is in another region \(400 Bad Request, AuthorizationHeaderMalformed\): "
            "set AWS_REGION=eu-central-1$",
        ),
        (400, f"{MALFORMED}; expecting region</Message><Region>hush hush</Region>", "set AWS_REGION to that"),
        (400, f"{MALFORMED}; incorrect date</Message>", "refuses: 400 Bad Request, AuthorizationHeaderMalf"),
        (400, "<Code>hushhush</Code>", "refuses: 400 Bad Request$"),
        (400, "<Code>AKIAHUSHHUSHHUSH</Code>", "refuses: 400 Bad Request$"),
        (400, "<Code>Hush_hush0123</Code>", "refuses: 400 Bad Request$"),
        (400, f"<Code>{'Hush' * 11}</Code>", "refuses: 400 Bad Request$"),
        (400, "<Code>XMinioInvalidObjectName</Code>", "refuses: 400 Bad Request, XMinioInvalidObjectName$"),
        (400, "<Code>InvalidURI</Code>", "refuses: 400 Bad Request, InvalidURI$"),
        (403, "<Code>hush0hush</Code>", r"access to bucket 'bucket' is denied \(403 Forbidden\): look"),
    ],
)
def test_regions_are_explained_and_only_what_looks_like_a_code_is_shown(refusing, status, text, said):
    refusing.answers, refusing.status, refusing.text = False, status, text
    with pytest.raises(objects.ObjectStoreError, match=said) as found:
        store.open_store("s3://bucket/s.zarr")
    assert "hush" not in str(found.value).lower()
    assert "does not answer" not in str(found.value)


ENDPOINTS = ("127.0.0.1:5599", "http://localhost:notaport", "http://[bad:PASSWDTOP", "http://", "http://a b")
WITH_MORE = ("http://me:PASSWDTOP@localhost", "http://localhost?PASSWDTOP", "http://localhost#PASSWDTOP")
UNPRINTABLE = "PASSWDTOP\n"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        *(("AWS_ENDPOINT_URL", value, "http:// or https://, a host and") for value in ENDPOINTS + WITH_MORE),
        ("AWS_ENDPOINT_URL", "ftp://localhost", "http:// or https://"),
        ("AWS_ENDPOINT_URL", "http://localhost:65536", "http:// or https://"),
        ("AWS_ENDPOINT_URL", "http://[::g]", "http:// or https://"),
        ("AWS_ENDPOINT", "127.0.0.1:5599", "http:// or https://"),
        ("AWS_ENDPOINT_URL_S3", "127.0.0.1:5599", "http:// or https://"),
        ("AWS_ACCESS_KEY_ID", UNPRINTABLE, "holds a space, the end of a line"),
        ("AWS_SECRET_ACCESS_KEY", UNPRINTABLE, "holds a space, the end of a line"),
        ("AWS_SESSION_TOKEN", UNPRINTABLE, "holds a space, the end of a line"),
        ("AWS_REGION", "eu central", "no name of a region"),
        ("AWS_ALLOW_HTTP", "PASSWDTOP", "AWS_ALLOW_HTTP=true allows it"),
        (
            "AWS_SKIP_SIGNATURE",
            "PASSWDTOP",
            "AWS_SKIP_SIGNATURE has a value that can't be used, where a boolean",
        ),
        ("AWS_PROXY_URL", "http://[PASSWDTOP", "a variable AWS_… or GOOGLE_… has a value that can't be used"),
    ],
)
def test_a_mistake_in_the_environment_is_one_line_that_names_the_variable(
    bucket, monkeypatch, capfd, name, value, said
):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["lsim", "verify", f"{bucket}/x.zarr"])
    with pytest.raises(SystemExit) as ended:
        main()
    *progress, line = "".join(capfd.readouterr()).splitlines()
    assert ended.value.code == 1
    assert line.startswith(f"error: {bucket}/x.zarr: ")
    assert len(progress) <= 1
    assert said in line
    assert name in line or "AWS_…" in line
    assert "PASSWDTOP" not in line + "".join(progress)


def test_an_empty_variable_counts_as_one_that_is_not_set(bucket, tmp_path, monkeypatch, server):
    put_archive(f"{bucket}/frames.zarr", 2, tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "")
    for name in ("AWS_ENDPOINT", "AWS_SESSION_TOKEN", "AWS_SKIP_SIGNATURE", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "")
    assert verify(f"{bucket}/frames.zarr").damages == []
    assert os.environ["AWS_ENDPOINT_URL_S3"] == ""
    for accepted in (server.upper().replace("HTTP", "http"), f"{server}/", server.replace("http", "HTTP")):
        monkeypatch.setenv("AWS_ENDPOINT_URL", accepted)
        assert store.exists(f"{bucket}/frames.zarr")


def test_a_panic_of_obstore_is_one_line(bucket, monkeypatch):
    """Whatever it is about that isn't looked at before."""
    import obstore

    monkeypatch.setattr(object_errors, "fault_of_environment", lambda _: "")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://[bad:PASSWDTOP")
    with pytest.raises(BaseException, match="InvalidUri") as panic:
        next(iter(obstore.list(S3Store("bucket"))))
    assert not isinstance(panic.value, Exception)
    with pytest.raises(objects.ObjectStoreError, match="look at the variables AWS_…") as found:
        store.open_store(f"{bucket}/x.zarr")
    assert "PASSWDTOP" not in str(found.value)


@pytest.mark.parametrize("address", ["s3://KEY%3AHUSH%40acc/x", "s3://acc//HUSH", "s3://HUSH!/x"])
def test_an_address_that_is_refused_is_not_repeated(address):
    with pytest.raises(AddressError, match=r"^s3://…: expected s3://BUCKET/NAME/…") as found:
        absolute(address)
    assert "HUSH" not in str(found.value)


def test_a_lock_is_renewed_while_it_is_held(bucket, monkeypatch):
    monkeypatch.setattr(locks, "RENEW_S", 0.02)
    with store.locked(f"{bucket}/s.zarr"):
        seen = {objects.read_with_tag(bucket, "s.zarr.lock")[1]["e_tag"]}
        deadline = time.monotonic() + 30
        while len(seen) < 2:
            assert time.monotonic() < deadline
            seen.add(objects.read_with_tag(bucket, "s.zarr.lock")[1]["e_tag"])
            time.sleep(0.1)


def test_of_many_that_want_a_lock_at_once_one_gets_it(bucket):
    held, refused, gate = [], [], threading.Barrier(8)

    def want() -> None:
        gate.wait()
        try:
            with store.locked(f"{bucket}/s.zarr"):
                held.append(1)
                done.wait(30)
        except store.StoreError:
            refused.append(1)
            if len(refused) == 7:
                done.set()

    done = threading.Event()
    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 7)


def test_what_is_no_store_and_not_empty_is_left_alone(bucket):
    objects.write(f"{bucket}/movies", "film", b"a film")
    for attempt in (
        lambda: store.open_output(f"{bucket}/movies", schema.FRAMES_STORE),
        lambda: enter(f"{bucket}/movies"),
    ):
        with pytest.raises(store.StoreError, match=r"not empty \(film\)"):
            attempt()
    assert list(objects.names(bucket)) == ["movies/film"]
    objects.delete(f"{bucket}/movies", "film")
    with pytest.raises(store.StoreError, match="needs a name"):
        enter(bucket)


def enter(address: str) -> None:
    with store.locked(address):
        pass


def test_consolidated_metadata_at_an_address_comes_and_goes(bucket):
    address = f"{bucket}/s.zarr"
    assert not store.exists(address)
    root = store.open_output(address, schema.FRAMES_STORE)
    store.consolidate(address)
    assert store.is_consolidated(address)
    store.drop_consolidated(address)
    assert not store.is_consolidated(address)
    store.remove_partials(address)
    array = store.create_array(root, "late", shape=(4,), chunks=(2,), dims=("a",), dtype="f8")
    store.write_rows(array, 0, np.full(4, np.nan))
    assert np.isnan(store.read(store.get_array(store.open_store(address), "late"))).all()
    with pytest.raises(store.StoreError, match=rf"{address}/late: 1:2 is not whole blocks"):
        store.write_rows(array, 1, np.ones(1))
    # Damaged, it raises, and names the store by its address.
    objects.write(f"{address}/late/c", "0", objects.read(f"{address}/late/c", "0")[:-2])
    with pytest.raises(store.StoreError, match=rf"{address}/late.*damaged"):
        store.read(array)


@pytest.mark.smoke
def test_matrices_of_archives_embeddings_and_checks_take_addresses(bucket, tmp_path):
    local = put_archive(f"{bucket}/frames.zarr", 4, tmp_path, frames=4)
    settings = Settings(metrics=("l2",), size=None, scope="dataset")
    with Cluster(Profile(kind="none")) as cluster:
        for place, frames in ((bucket, f"{bucket}/frames.zarr"), (str(tmp_path), str(local))):
            compute_matrix(frames, f"{place}/matrix.zarr", settings, cluster=cluster)
    assert chunks_alone(objects_of(f"{bucket}/matrix.zarr")) == chunks_alone(
        files_of(tmp_path / "matrix.zarr")
    )
    found = find_neighbours(f"{bucket}/matrix.zarr", "A/density/s1:0", 3)
    assert [near.frame for near in found.nearest] == [
        near.frame for near in find_neighbours(tmp_path / "matrix.zarr", "A/density/s1:0", 3).nearest
    ]
    address = f"{bucket}/matrix.zarr"
    assert not verify(address).damages
    name = next(name for name in objects.names(address) if "/l2/c/" in name)
    objects.write(address, name, objects.read(address, name)[:-1] + b"!")
    assert len(verify(address).damages) == 1


def test_what_cannot_be_opened_is_said_in_one_line_and_soon(bucket, monkeypatch, tmp_path):
    put_archive(f"{bucket}/frames.zarr", 2, tmp_path)

    def fault(address: str = f"{bucket}/frames.zarr") -> str:
        with pytest.raises((objects.ObjectStoreError, store.StoreError)) as found:
            store.open_store(address)
        text = str(found.value)
        assert address in text
        assert "\n" not in text and SECRET not in text and len(text) < 500  # noqa: PT018
        return text

    assert "there is no bucket 'nowhere-at-all'" in fault("s3://nowhere-at-all/frames.zarr")
    assert "no Zarr store here" in fault(f"{bucket}/absent.zarr")
    root = store.open_store(f"{bucket}/frames.zarr")
    denied = f"{bucket}/frames.zarr: access to .* is denied"
    with pytest.raises(objects.ObjectStoreError, match=denied) as later, objects.in_one_line(str(root.store)):
        raise PermissionDeniedError(f"403 Forbidden\nDebug source: {SECRET}")
    assert SECRET not in str(later.value)
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    assert "AWS_ALLOW_HTTP=true" in fault()
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    with socket.socket() as nobody:  # bound, and not listening: connections are refused
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        assert "does not answer" in fault()
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setenv("AWS_REGION", "elsewhere")
    assert "pip install 'lsim[s3]'" in fault()
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", "/nowhere.json")
    assert "pip install 'lsim[gcs]'" in fault("gs://bucket/frames.zarr")
