"""Cluster profiles: how to get workers, read from YAML and checked before anything starts."""

from __future__ import annotations

import contextlib
import difflib
import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias

import pydantic
import yaml
from dask.utils import parse_bytes, parse_timedelta

from pipeline.resources import ResourceError, find_resource


class ClusterError(RuntimeError):
    """A profile that cannot be read, or a cluster that cannot be reached."""


Kind: TypeAlias = Literal["local", "none", "cuda", "slurm", "pbs", "ssh", "kubernetes", "address"]

ACROSS_HOSTS: tuple[Kind, ...] = ("slurm", "pbs", "ssh", "kubernetes")
"""Kinds whose workers run on other machines and communicate over a network."""
BATCH: tuple[Kind, ...] = ("slurm", "pbs")
"""Kinds whose workers are jobs of a batch system."""

_WORKERS = {"workers", "threads", "memory_limit", "resources", "environment", "options", "start_timeout"}
_SECURE = {"tls", "security"}
_JOBS = {"walltime", "lifetime", "lifetime_stagger", "host", "interface", "shared_folder"}
_KEYS: dict[Kind, set[str]] = {
    "none": set(),
    "local": {*_WORKERS, *_SECURE, "host", "grace"},
    "cuda": {*_WORKERS, *_SECURE, "host", "grace"},
    "slurm": {*_WORKERS, *_SECURE, *_JOBS, "grace"},
    "pbs": {*_WORKERS, *_SECURE, *_JOBS, "grace"},
    "ssh": {*_WORKERS, *_SECURE, "shared_folder", "grace"},
    "kubernetes": {*_WORKERS, "tls", "grace"},
    "address": {"address", "security", "grace", "start_timeout"},
}
"""Keys of each kind, besides ``kind`` and ``device``."""

START_TIMEOUT_S: dict[Kind, float] = {
    "slurm": 3600,
    "pbs": 3600,
    "kubernetes": 600,
    "local": 180,
    "cuda": 180,
}
"""Seconds to wait for the first worker, or for all workers on this machine; 60 for other kinds."""


def parse_duration(value: Any) -> float:
    """Parse a duration into seconds.

    Accepts a number of seconds, ``"90s"``, ``"2 hours"``, ``"hh:mm:ss"`` and ``"d-hh:mm:ss"``.

    Raises
    ------
    ValueError
        For anything else.
    """
    try:
        if isinstance(value, bool):
            raise ValueError
        if isinstance(value, str) and ":" in value:
            days, _, clock = value.rpartition("-")
            hours, minutes, seconds = (float(part) for part in f"{clock}:0".split(":")[:3])
            if clock.count(":") > 2:
                raise ValueError
            return 86400 * float(days or 0) + 3600 * hours + 60 * minutes + seconds
        return float(parse_timedelta(value))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"expected a duration as in 30s, 2h or 01:30:00, found {_as_yaml(value)}") from error


def _parse_memory(value: Any) -> str:
    """Check a worker's memory limit for Dask: bytes, a fraction of the machine's, ``"4GB"`` or ``"auto"``."""
    text = str(value)
    try:
        if isinstance(value, bool) or (
            text != "auto" and (float(text) if _is_number(text) else parse_bytes(text)) < 0
        ):
            raise ValueError
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"expected bytes as in 4GB, or auto, found {_as_yaml(value)}") from error
    return text


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return math.isfinite(float(text))
    return False


def _is_range(value: Any) -> str:
    return "range" if isinstance(value, dict | WorkerRange) else "number"


def _as_yaml(value: Any) -> str:
    """Format a value for a message as YAML, shortened to 100 characters; ``true`` is not ``True`` there."""
    if isinstance(value, str):
        return repr(value)
    try:
        text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    except yaml.YAMLError:
        text = repr(value)
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= 100 else f"{text[:99]}…"


Duration: TypeAlias = Annotated[float, pydantic.BeforeValidator(parse_duration), pydantic.Field(gt=0)]
"""A duration in seconds."""
Number: TypeAlias = Annotated[int, pydantic.Field(strict=True, ge=1)]
Amount: TypeAlias = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class WorkerRange(_Strict):
    """Limits for a number of workers that follows the amount of work."""

    minimum: Number = 1
    maximum: Number

    @pydantic.model_validator(mode="after")
    def _minimum_below_maximum(self) -> WorkerRange:
        if self.minimum > self.maximum:
            raise ValueError(f"minimum ({self.minimum}) exceeds maximum ({self.maximum})")
        return self


class SecurityFiles(_Strict):
    """A site's own certificates: PEM files at the same paths on all hosts."""

    ca_file: str
    cert: str
    key: str


class Profile(_Strict):
    """A description of a cluster. Unknown keys are errors, and so are keys that don't apply to the kind.

    Attributes
    ----------
    kind : {"local", "none", "cuda", "slurm", "pbs", "ssh", "kubernetes", "address"}
        Worker processes on this machine; the calling process alone; one worker per GPU of this machine; jobs
        of SLURM or PBS; hosts reached by SSH; pods of Kubernetes; a scheduler that is already running.
    workers : int or {minimum, maximum}, optional
        Number of worker processes, for ``ssh`` on each host; a range follows the amount of work. Default: one
        per core (``local``), one per GPU (``cuda``), otherwise one.
    threads : int
        Threads per worker; they share the worker's metrics. Must be 1 if each worker has its own GPU.
    memory_limit : str or int
        Memory per worker, in Dask's notation; jobs need a number.
    device : str
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"``: a GPU if the worker's machine has any; workers are
        spread over several GPUs.
    resources : dict of str to float
        Resources of each worker for Dask's own resource constraints, for example ``{GPU: 1}``.
    environment : dict of str to str
        Environment variables of the workers.
    walltime : duration, optional
        Time after which the batch system kills a job. Default: that of Dask's own configuration.
    lifetime, lifetime_stagger : duration, optional
        Time after which a worker leaves by itself, and the largest random deviation from it. Default: all
        workers have left before the end of the walltime, and not all at once.
    grace : duration
        Time that a worker gets to finish its running blocks after SIGTERM.
    address : str, optional
        Address of the scheduler, ``tls://…`` or ``tcp://…``.
    host, interface : str, optional
        Address, or name of the network interface, on which the scheduler listens. Default: loopback; with
        jobs this host's address towards the default route.
    tls : bool, optional
        Encrypt the connections. Default: wherever something listens beyond loopback. False has to be set
        explicitly, and is recorded.
    security : {ca_file, cert, key}, optional
        The site's own certificates. Default: those of Dask's configuration, otherwise temporary ones.
    shared_folder : str
        Folder, visible to all hosts, for the temporary certificates that jobs read.
    start_timeout : duration, optional
        Time to wait for the first worker. Default: one minute; with jobs, one hour. On this machine: time for
        all workers, three minutes; then silent ones are killed, and all are started again.
    options : dict
        Options of the library's cluster class, passed through.
    """

    kind: Kind = "local"
    workers: (
        Annotated[
            Annotated[Number, pydantic.Tag("number")] | Annotated[WorkerRange, pydantic.Tag("range")],
            pydantic.Discriminator(_is_range),
        ]
        | None
    ) = None
    threads: Number = 1
    memory_limit: Annotated[str, pydantic.BeforeValidator(_parse_memory)] = "auto"
    device: str = "auto"
    resources: dict[str, Amount] = {}
    environment: dict[str, str] = {}
    walltime: Duration | None = None
    lifetime: Duration | None = None
    lifetime_stagger: Duration | None = None
    grace: Duration = 30.0
    address: str | None = None
    host: str | None = None
    interface: str | None = None
    tls: bool | None = None
    security: SecurityFiles | None = None
    shared_folder: str = "~/.cache/lsim/clusters"
    start_timeout: Duration | None = None
    options: dict[str, Any] = {}

    _source: str = ""

    @pydantic.field_validator("device")
    @classmethod
    def _device_is_supported(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError(f"expected auto, cpu, cuda or cuda:N, found {device!r}")
        return device

    @pydantic.field_validator("address")
    @classmethod
    def _address_is_valid(cls, address: str | None) -> str | None:
        if address is not None:
            match = re.fullmatch(r"(tcp|tls)://([^\s/:]+|\[[\da-fA-F:.]+\]):(\d{1,5})", address)
            if match is None or not 0 < int(match[3]) < 2**16:
                raise ValueError(f"expected tcp://HOST:PORT or tls://HOST:PORT, found {address!r}")
        return address

    @pydantic.field_validator("environment", mode="before")
    @classmethod
    def _numbers_to_text(cls, environment: Any) -> Any:
        if not isinstance(environment, dict):
            return environment
        return {
            name: str(value) if type(value) in (int, float) else value for name, value in environment.items()
        }

    @pydantic.model_validator(mode="after")
    def _keys_apply_to_the_kind(self) -> Profile:
        if (self.kind == "address") != (self.address is not None):
            raise ValueError(
                f"address: expected with kind 'address', and with no other; found "
                f"{'none' if self.address is None else repr(self.address)}, and kind {self.kind!r}"
            )
        keys = _KEYS[self.kind] | {"kind", "device"}
        if useless := sorted(self.model_fields_set - keys):
            raise ValueError(
                f"a cluster of kind {self.kind!r} has no {', '.join(useless)}; "
                f"it takes {', '.join(sorted(keys))}"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _one_thread_per_gpu(self) -> Profile:
        if self.threads > 1 and (self.kind == "cuda" or self.device.startswith("cuda")):
            raise ValueError(f"threads: expected 1 for a worker with a GPU of its own, found {self.threads}")
        return self

    @pydantic.model_validator(mode="after")
    def _values_fit_together(self) -> Profile:
        if self.kind in BATCH and (self.memory_limit == "auto" or parse_bytes(self.memory_limit) < 1):
            raise ValueError(
                "memory_limit: expected a number, as in 4GB: it is the memory of the job; found "
                f"{self.memory_limit!r}"
            )
        if isinstance(self.workers, WorkerRange) and self.kind in ("cuda", "ssh"):
            limits = _as_yaml(self.workers.model_dump())
            raise ValueError(
                f"workers: expected a fixed number for a cluster of kind {self.kind!r}, found {limits}"
            )
        if self.security is not None and self.tls is False:
            raise ValueError("security: certificates have no effect with tls: false; remove one of them")
        if self.host is not None and self.interface is not None:
            raise ValueError("host, interface: expected one of them, found both")
        return self

    @contextlib.contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Add the file of the profile, if it has one, to cluster errors raised in this context."""
        try:
            yield
        except ClusterError as error:
            if not self._source:
                raise
            raise ClusterError(f"cluster profile {self._source!r}: {error}") from error

    @property
    def wait_s(self) -> float:
        """Seconds to wait for the first worker."""
        return self.start_timeout or START_TIMEOUT_S.get(self.kind, 60.0)

    @property
    def asked_for(self) -> WorkerRange:
        """Number of workers on all hosts together; without ``workers`` one on each host."""
        if isinstance(self.workers, WorkerRange):
            return self.workers
        # The first host is the scheduler's.
        hosts = len(self.options["hosts"]) - 1 if self.kind == "ssh" else 1
        count = (self.workers or 1) * hosts
        return WorkerRange(minimum=count, maximum=count)


def load_profile(name: str, workers: int | None = None) -> Profile:
    """Load a profile by name, from a YAML file, or for the address of a scheduler.

    Parameters
    ----------
    name : str
        Name of a shipped profile (``local``, ``slurm``, …), path of a YAML file, or ``tcp://`` or ``tls://``
        address.
    workers : int, optional
        Number of workers, instead of the profile's.

    Raises
    ------
    ClusterError
        When there is no such profile, or it has unknown keys or wrong values.
    """
    if name.startswith(("tcp://", "tls://")):
        try:
            profile = Profile(kind="address", address=name)
        except pydantic.ValidationError as error:
            raise ClusterError(f"cluster {name!r}: {_faults(error)}") from error
    else:
        profile = _read_profile(name)
        profile._source = name
    if workers is None:
        return profile
    if "workers" not in _KEYS[profile.kind]:
        raise ClusterError(
            f"--workers applies to clusters that lsim starts, such as local; {name!r} is of kind "
            f"{profile.kind}"
        )
    if workers < 1:
        raise ClusterError(f"workers: expected at least 1, found {workers}")
    return profile.model_copy(update={"workers": workers})


class _Loader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys; PyYAML silently keeps the last value."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise TypeError(
                        f"{key.value}: expected once, found again in line {key.start_mark.line + 1}"
                    )
                keys.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _read_profile(name: str) -> Profile:
    try:
        text = find_resource("workflows/clusters", name).read_text(encoding="utf-8")
        content = _Loader(text).get_single_data() or {}
        if not isinstance(content, dict):
            raise TypeError(f"expected keys and values, found {_as_yaml(content)}")
        for key in content:
            if not isinstance(key, str):
                raise TypeError(f"{key}: unknown key")
        return Profile(**content)
    except pydantic.ValidationError as error:
        raise ClusterError(f"cluster profile {name!r}: {_faults(error)}") from error
    except (ResourceError, TypeError, OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            reason = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise ClusterError(f"cluster profile {name!r}: {reason}") from error


_EXPECTED = {
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "string_type": "expected text",
    "dict_type": "expected keys and values",
    "model_type": "expected keys and values",
    "finite_number": "expected a number",
}


def _faults(error: pydantic.ValidationError) -> str:
    """Describe the faults of a profile, key by key: what was expected, what was found, and near names."""
    return "; ".join(map(_fault, error.errors()))


def _fault(fault: Any) -> str:
    """Describe one of pydantic's faults in our words."""
    section, *keys = (str(part) for part in fault["loc"]) if fault["loc"] else ("",)
    if section == "workers":
        keys = keys[1:]  # pydantic puts "number" or "range" first
    location = ".".join((section, *keys)).removesuffix(".[key]")
    text = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        models: dict[str, Any] = {"workers": WorkerRange, "security": SecurityFiles}
        names = list((models[section] if keys else Profile).model_fields)
        near = difflib.get_close_matches((section, *keys)[-1], names, n=1)
        text = "unknown key, " + (f"did you mean {near[0]!r}?" if near else f"expected {', '.join(names)}")
    elif fault["type"] == "missing":
        text = "missing"
    elif fault["type"] != "value_error":
        text = _EXPECTED.get(fault["type"], text.replace("Input should be", "expected", 1))
        if location == "workers":
            text = "expected a whole number from 1, or a range as in {minimum: 1, maximum: 64}"
        text += f", found {_as_yaml(fault['input'])}"
    return f"{location}: {text}" if location else text
