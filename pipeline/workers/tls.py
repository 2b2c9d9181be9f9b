"""TLS for clusters across hosts, with the site's certificates or with temporary ones.

Whoever can connect to a Dask scheduler runs code as its user. Within one machine everything listens on
loopback; beyond it, scheduler, workers and clients require each other's certificates. Temporary certificates
end with the cluster.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import shutil
import ssl
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import dask
from distributed import Security

from pipeline.workers.profiles import ACROSS_HOSTS, ClusterError, Profile, SecurityFiles

CONFIGURED = ("ca-file", "client.cert", "client.key")
"""Keys below ``distributed.comm.tls`` in Dask's configuration with which clients have certificates."""

CLOCKS_DIFFER = datetime.timedelta(days=1)
"""Temporary certificates are valid from this long ago, for hosts whose clock is slow."""
VALID = datetime.timedelta(days=365)
"""Validity of a temporary certificate, and so the longest run of its cluster."""


class UnencryptedClusterWarning(UserWarning):
    """A cluster is reachable over a network without TLS."""


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach a server that listens on ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def wants_tls(profile: Profile) -> bool:
    """Tell whether a profile's cluster uses TLS: as the profile says, otherwise if it leaves the machine."""
    if profile.address is not None:
        return profile.address.startswith("tls://")
    if profile.tls is not None:
        return profile.tls
    is_remote = profile.host is not None and not is_loopback(profile.host)
    return profile.security is not None or profile.kind in ACROSS_HOSTS or is_remote


def warn_if_open(profile: Profile) -> None:
    """Warn if anybody can reach the cluster over a network."""
    if profile.kind == "none" or wants_tls(profile):
        return
    host = profile.host
    if profile.address is not None:
        host = profile.address.removeprefix("tcp://").rpartition(":")[0]
    if profile.kind in ACROSS_HOSTS or (host is not None and not is_loopback(host)):
        label = profile.address or f"a cluster of kind {profile.kind!r} with tls: false"
        warnings.warn(
            f"{label} has no TLS: anybody who reaches its ports can run code as you",
            UnencryptedClusterWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def credentials(profile: Profile) -> Iterator[Security | None]:
    """Provide certificates for the time of a cluster.

    Yields
    ------
    distributed.Security or None
        None without TLS. Otherwise the profile's own files, those of Dask's configuration, or temporary ones.
        If other hosts need them, temporary certificates are files of mode 0600 in a new folder of
        ``shared_folder``, which is removed at the end; otherwise they stay in memory.

    Raises
    ------
    ClusterError
        When there are no certificates for a running scheduler, a file is missing, or ``cryptography`` is not
        installed.
    """
    if not wants_tls(profile):
        yield None
        return
    security = _configured(profile)
    if security is not None:
        yield security
    elif profile.kind in ACROSS_HOSTS:
        folder = _new_folder(profile.shared_folder)
        try:
            yield load_files(write_temporary(folder))
        finally:
            shutil.rmtree(folder)
    else:
        yield _temporary()


def _configured(profile: Profile) -> Security | None:
    """Load the certificates of the profile or of Dask's configuration; None if neither names any."""
    if profile.security is not None:
        return load_files(profile.security)
    if all(dask.config.get(f"distributed.comm.tls.{name}", None) for name in CONFIGURED):
        return Security(require_encryption=True)
    if profile.address is not None:
        raise ClusterError(
            f"{profile.address} needs certificates: name them as security: {{ca_file, cert, key}} in a "
            "profile of kind address, or as distributed.comm.tls in Dask's configuration "
            "(DASK_DISTRIBUTED__COMM__TLS__CA_FILE, …CLIENT__CERT, …CLIENT__KEY)"
        )
    return None


def load_files(files: SecurityFiles) -> Security:
    """Load certificates from files, the same for all roles.

    Raises
    ------
    ClusterError
        For a file that cannot be read, or holds no certificate or key; names the file.
    """
    paths = {role: _readable(role, name) for role, name in files.model_dump().items()}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for role in ("ca_file", "cert"):
        with _naming_file(role, paths[role], "certificates in PEM"):
            context.load_verify_locations(paths[role])
    with _naming_file("key", paths["key"], "the key of security.cert in PEM, without a password"):
        context.load_cert_chain(paths["cert"], paths["key"], password="")
    roles = _for_all_roles(paths["cert"], paths["key"])
    return Security(require_encryption=True, tls_ca_file=paths["ca_file"], **roles)


def _readable(role: str, name: str) -> str:
    """Resolve the path of a certificate or key, and check that it can be read."""
    path = Path(os.path.expandvars(name)).expanduser().absolute()
    if not os.access(path, os.R_OK):
        raise ClusterError(f"security.{role}: {path} cannot be read")
    return str(path)


@contextlib.contextmanager
def _naming_file(role: str, path: str, content: str) -> Iterator[None]:
    """Turn errors of OpenSSL into one that names the file and what was expected in it."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ClusterError(f"security.{role}: expected {content}, found {path} ({error})") from error


def write_temporary(folder: Path) -> SecurityFiles:
    """Write a new self-signed certificate as files that only their owner can read."""
    texts = _temporary().get_tls_config_for_role("client")
    files = {"ca_file": folder / "ca.pem", "cert": folder / "cert.pem", "key": folder / "key.pem"}
    for part, path in files.items():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(texts[part])
    return SecurityFiles(**{part: str(path) for part, path in files.items()})


def _new_folder(shared_folder: str) -> Path:
    parent = Path(os.path.expandvars(shared_folder)).expanduser().absolute()
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="tls-", dir=parent))
    except OSError as error:
        raise ClusterError(f"shared_folder: temporary certificates cannot be written: {error}") from error


def _temporary() -> Security:
    """Create a self-signed certificate for all roles, in memory.

    Dask's own is valid from the current second on, which a host with a slow clock refuses.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise ClusterError(
            "temporary certificates need the package cryptography: pip install 'lsim[tls]'"
        ) from error
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "lsim-cluster")])
    start = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - CLOCKS_DIFFER)
        .not_valid_after(start + VALID)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
        .decode("ascii")
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode("ascii")
    return Security(require_encryption=True, tls_ca_file=certificate, **_for_all_roles(certificate, secret))


def _for_all_roles(cert: str, key: str) -> dict[str, str]:
    roles = ("client", "scheduler", "worker")
    return {f"tls_{role}_cert": cert for role in roles} | {f"tls_{role}_key": key for role in roles}
