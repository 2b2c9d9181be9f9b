"""TLS for clusters across hosts: the site's certificates, or temporary ones that end with the cluster.

Whoever can speak to a Dask scheduler runs code as its user. Within one machine everything listens on
loopback; beyond it, scheduler, workers and clients show each other certificates, and refuse who has none.
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
"""What Dask's own configuration names under ``distributed.comm.tls`` where clients have certificates."""

CLOCKS_DIFFER = datetime.timedelta(days=1)
"""The clocks of hosts may be behind by so much: temporary certificates are valid from then on."""
VALID = datetime.timedelta(days=365)
"""For as long a cluster may run on a temporary certificate."""


class UnencryptedClusterWarning(UserWarning):
    """A cluster that can be reached over a network, without TLS."""


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach what listens on ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def wants_tls(profile: Profile) -> bool:
    """Whether a cluster of this profile is encrypted: by its own word, else where it leaves the machine."""
    if profile.address is not None:
        return profile.address.startswith("tls://")
    if profile.tls is not None:
        return profile.tls
    beyond = profile.host is not None and not is_loopback(profile.host)
    return profile.security is not None or profile.kind in ACROSS_HOSTS or beyond


def warn_if_open(profile: Profile) -> None:
    """Say that a cluster can be reached over the network by anybody, once."""
    if profile.kind == "none" or wants_tls(profile):
        return
    host = profile.host
    if profile.address is not None:
        host = profile.address.removeprefix("tcp://").rpartition(":")[0]
    if profile.kind in ACROSS_HOSTS or (host is not None and not is_loopback(host)):
        where = profile.address or f"a cluster of kind {profile.kind!r} with tls: false"
        warnings.warn(
            f"{where} has no TLS: whoever reaches its ports can run code as you",
            UnencryptedClusterWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def credentials(profile: Profile) -> Iterator[Security | None]:
    """Certificates for the time of a cluster; None for one without TLS.

    Yields
    ------
    distributed.Security or None
        The profile's own files, else those of Dask's configuration, else temporary ones. Where other hosts
        need them, temporary ones are files of mode 0600 in a new folder of ``shared_folder``, which is
        removed at the end; where they don't, they stay in memory.

    Raises
    ------
    ClusterError
        When there are none for a scheduler that runs already, a file is absent, or ``cryptography`` is.
    """
    if not wants_tls(profile):
        yield None
    elif profile.security is not None:
        yield of_files(profile.security)
    elif all(dask.config.get(f"distributed.comm.tls.{name}", None) for name in CONFIGURED):
        yield Security(require_encryption=True)
    elif profile.address is not None:
        raise ClusterError(
            f"{profile.address} needs certificates: name them as security: {{ca_file, cert, key}} in a "
            "profile of kind address, or as distributed.comm.tls in Dask's configuration "
            "(DASK_DISTRIBUTED__COMM__TLS__CA_FILE, …CLIENT__CERT, …CLIENT__KEY)"
        )
    elif profile.kind in ACROSS_HOSTS:
        folder = _new_folder(profile.shared_folder)
        try:
            yield of_files(write_temporary(folder))
        finally:
            shutil.rmtree(folder)
    else:
        yield _temporary()


def of_files(files: SecurityFiles) -> Security:
    """The certificates in files, for all roles.

    Raises
    ------
    ClusterError
        Naming the file that cannot be read, or holds no certificate or key.
    """
    paths = {}
    for role, name in files.model_dump().items():
        path = Path(os.path.expandvars(name)).expanduser().absolute()
        if not os.access(path, os.R_OK):
            raise ClusterError(f"security.{role}: {path} cannot be read")
        paths[role] = str(path)
    tried = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    role, expected = "", ""
    try:
        for role in ("ca_file", "cert"):
            expected = "certificates in PEM"
            tried.load_verify_locations(paths[role])
        role, expected = "key", "the key of security.cert in PEM, without a password"
        tried.load_cert_chain(paths["cert"], paths["key"], password="")
    except (OSError, ValueError) as error:
        raise ClusterError(f"security.{role}: expected {expected}, found {paths[role]} ({error})") from error
    roles = _for_all_roles(paths["cert"], paths["key"])
    return Security(require_encryption=True, tls_ca_file=paths["ca_file"], **roles)


def write_temporary(folder: Path) -> SecurityFiles:
    """Make a certificate that signs itself, as files that only their owner can read."""
    made = _temporary().get_tls_config_for_role("client")
    files = {"ca_file": folder / "ca.pem", "cert": folder / "cert.pem", "key": folder / "key.pem"}
    for part, path in files.items():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(made[part])
    return SecurityFiles(**{part: str(path) for part, path in files.items()})


def _new_folder(within: str) -> Path:
    parent = Path(os.path.expandvars(within)).expanduser().absolute()
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="tls-", dir=parent))
    except OSError as error:
        raise ClusterError(f"shared_folder: temporary certificates cannot be written: {error}") from error


def _temporary() -> Security:
    """A certificate that signs itself, for all roles, in memory.

    Dask's own is valid from this second on, which a host whose clock is behind refuses.
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
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS_DIFFER)
        .not_valid_after(now + VALID)
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
