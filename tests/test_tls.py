"""Beyond loopback clusters are encrypted, and whoever has no certificates is refused."""

from __future__ import annotations

import datetime
import gc
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import dask
import pytest
from cryptography import x509
from distributed import Client, Security

from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import ClusterError, Profile, SecurityFiles
from pipeline.workers.tls import (
    UnencryptedClusterWarning,
    credentials,
    is_loopback,
    wants_tls,
    warn_if_open,
    write_temporary,
)

JOBS = {"kind": "slurm", "memory_limit": "1GB"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> SecurityFiles:
    """Certificates of a site."""
    return write_temporary(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def encrypted(site) -> Iterator[Cluster]:
    """A running cluster with the site's certificates."""
    with Cluster(Profile(workers=1, security=site)) as cluster:
        yield cluster


def attempt(address: str, **options: object) -> int:
    """What a client of this scheduler gets computed."""
    # A refused one, collected while the next is starting, would wait for that one's lock for ever.
    gc.collect()
    with (
        dask.config.set({"distributed.comm.retry.count": 0}),
        Client(address, timeout="2s", **options) as client,
    ):
        return client.submit(sum, [1, 2]).result(timeout=10)


def test_a_client_without_certificates_is_refused(encrypted, site):
    address = encrypted.client.scheduler.address
    assert address.startswith("tls://127.0.0.1:")
    assert encrypted.describe()["tls"] is True
    plain = address.replace("tls://", "tcp://")
    with pytest.raises((OSError, TimeoutError)):
        attempt(plain)
    with pytest.raises((OSError, TypeError)):  # Dask's own way of saying that it has none
        attempt(address)
    with pytest.raises((OSError, TimeoutError)):
        attempt(address, security=Security.temporary())
    with Cluster(Profile(kind="address", address=address, security=site)) as cluster:
        assert cluster.client.submit(sum, [1, 2]).result(timeout=30) == 3


def test_an_address_without_certificates_is_an_error_that_says_where_to_name_them(encrypted):
    address = encrypted.client.scheduler.address
    with (
        Cluster(Profile(kind="address", address=address)) as cluster,
        pytest.raises(ClusterError, match=r"security.*DASK_DISTRIBUTED__COMM__TLS__CA_FILE"),
    ):
        assert cluster.client


def test_foreign_certificates_are_an_error_that_names_the_scheduler(encrypted, tmp_path):
    address = encrypted.client.scheduler.address
    profile = Profile(kind="address", address=address, security=write_temporary(tmp_path))
    with Cluster(profile) as cluster, pytest.raises(ClusterError, match=f"certificates at {address}"):
        assert cluster.client


def test_certificates_of_dasks_configuration_are_used(encrypted, site):
    known = {
        "distributed.comm.tls.ca-file": site.ca_file,
        "distributed.comm.tls.client.cert": site.cert,
        "distributed.comm.tls.client.key": site.key,
    }
    address = encrypted.client.scheduler.address
    with dask.config.set(known), Cluster(Profile(kind="address", address=address)) as cluster:
        assert cluster.client.submit(sum, [1, 2]).result(timeout=30) == 3


def test_temporary_certificates_are_their_owners_alone_and_end_with_the_cluster(tmp_path):
    shared = tmp_path / "a" / "shared"
    with credentials(Profile(**JOBS, shared_folder=str(shared))) as security:
        (folder,) = shared.iterdir()
        files = sorted(folder.iterdir())
        assert [file.name for file in files] == ["ca.pem", "cert.pem", "key.pem"]
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
        assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, shared)} == {0o700}
        assert security.require_encryption
        # Files and no text: a key on a command line would be everybody's.
        assert Path(security.tls_worker_key) == folder / "key.pem"
    assert not list(shared.iterdir())


def test_a_host_whose_clock_is_behind_takes_them(site):
    certificate = x509.load_pem_x509_certificate(Path(site.cert).read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    assert certificate.not_valid_before_utc < now - datetime.timedelta(hours=12)
    assert certificate.not_valid_after_utc > now + datetime.timedelta(days=300)


def test_they_end_with_a_cluster_that_failed_too(tmp_path):
    with (
        pytest.raises(RuntimeError, match="failed"),
        credentials(Profile(**JOBS, shared_folder=str(tmp_path))),
    ):
        raise RuntimeError("failed")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_there_is_named(tmp_path, site):
    files = site.model_copy(update={"key": str(tmp_path / "none.pem")})
    with pytest.raises(ClusterError, match=r"security\.key.*none\.pem"):
        Cluster(Profile(security=files))


@pytest.mark.parametrize("role", ["ca_file", "cert", "key"])
def test_a_file_that_is_no_certificate_or_key_is_named_before_anything_starts(tmp_path, site, role):
    garbage = tmp_path / "bad.pem"
    garbage.write_text("garbage\n")
    files = site.model_copy(update={role: str(garbage)})
    with pytest.raises(ClusterError, match=rf"security\.{role}: expected .* in PEM.*, found .*bad\.pem"):
        Cluster(Profile(security=files))


def test_a_key_of_another_certificate_is_named(tmp_path, site):
    files = site.model_copy(update={"key": write_temporary(tmp_path).key})
    with pytest.raises(ClusterError, match=r"security\.key: expected the key of security\.cert.*key\.pem"):
        Cluster(Profile(kind="address", address="tls://127.0.0.1:1", security=files))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),
        ({"host": "127.0.0.1"}, False),
        ({"host": "localhost"}, False),
        ({"host": "192.0.2.1"}, True),
        ({"host": "0.0.0.0"}, True),
        ({"host": "192.0.2.1", "tls": False}, False),
        ({"tls": True}, True),
        (JOBS, True),
        (JOBS | {"tls": False}, False),
        ({"kind": "ssh"}, True),
        ({"kind": "address", "address": "tls://192.0.2.1:8786"}, True),
        ({"kind": "address", "address": "tcp://192.0.2.1:8786"}, False),
    ],
)
def test_what_leaves_the_machine_is_encrypted_unless_told_otherwise(settings, expected):
    assert wants_tls(Profile(**settings)) is expected


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (JOBS | {"tls": False}, "'slurm' with tls: false has no TLS"),
        ({"host": "0.0.0.0", "tls": False}, "'local' with tls: false has no TLS"),
        ({"kind": "address", "address": "tcp://192.0.2.1:8786"}, "192.0.2.1:8786 has no TLS"),
    ],
)
def test_a_cluster_that_anybody_can_reach_is_warned_of(settings, match):
    with pytest.warns(UnencryptedClusterWarning, match=match):
        warn_if_open(Profile(**settings))
    assert Cluster(Profile(**settings)).describe()["tls"] is False


@pytest.mark.parametrize("settings", [{}, JOBS, {"kind": "address", "address": "tcp://127.0.0.1:8786"}])
def test_of_others_nothing_is_said(settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_open(Profile(**settings))


def test_loopback_is_known_by_its_addresses():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.0.2.1", "login1")))
