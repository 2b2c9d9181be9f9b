"""How to get workers: profiles of clusters, read from YAML and checked before anything starts."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, TypeAlias

import pydantic
import yaml
from dask.utils import parse_timedelta

from pipeline.resources import ResourceError, find_resource


class ClusterError(RuntimeError):
    """A profile that cannot be read, or a cluster that cannot be reached."""


Kind: TypeAlias = Literal["local", "none", "cuda", "slurm", "pbs", "ssh", "kubernetes", "address"]

ACROSS_HOSTS: tuple[Kind, ...] = ("slurm", "pbs", "ssh", "kubernetes")
"""Kinds whose workers are on other machines: what they say to each other goes over a network."""
BATCH: tuple[Kind, ...] = ("slurm", "pbs")
"""Kinds whose workers are jobs."""

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
"""What each kind takes besides ``kind`` and ``device``."""

START_TIMEOUT_S: dict[Kind, float] = {"slurm": 3600, "pbs": 3600, "kubernetes": 600}
"""How long to wait for the first worker, where jobs queue; else a minute."""


def parse_duration(value: Any) -> float:
    """Seconds of a duration: a number of them, ``"90s"``, ``"2 hours"``, ``"hh:mm:ss"`` or ``"d-hh:mm:ss"``.

    Raises
    ------
    ValueError
        For anything else.
    """
    try:
        if isinstance(value, str) and ":" in value:
            days, _, clock = value.rpartition("-")
            hours, minutes, seconds = (float(part) for part in f"{clock}:0".split(":")[:3])
            if clock.count(":") > 2:
                raise ValueError
            return 86400 * float(days or 0) + 3600 * hours + 60 * minutes + seconds
        return float(parse_timedelta(value))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"expected a duration as in 30s, 2h or 01:30:00, got {value!r}") from error


Duration: TypeAlias = Annotated[float, pydantic.BeforeValidator(parse_duration), pydantic.Field(gt=0)]
"""Seconds."""


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class WorkerRange(_Strict):
    """Workers that come and go with the work."""

    minimum: int = pydantic.Field(default=1, ge=1)
    maximum: int = pydantic.Field(ge=1)

    @pydantic.model_validator(mode="after")
    def _minimum_below_maximum(self) -> WorkerRange:
        if self.minimum > self.maximum:
            raise ValueError(f"minimum {self.minimum} is above maximum {self.maximum}")
        return self


class SecurityFiles(_Strict):
    """Certificates of a site: PEM files that all hosts see at these paths."""

    ca_file: str
    cert: str
    key: str


class Profile(_Strict):
    """How to get workers. Unknown keys are errors, and so are those that the kind has no use for.

    Attributes
    ----------
    kind : {"local", "none", "cuda", "slurm", "pbs", "ssh", "kubernetes", "address"}
        Worker processes on this machine; the calling process alone; one worker per GPU of this machine; jobs
        of SLURM or PBS; hosts reached by SSH; pods of Kubernetes; a scheduler that runs already.
    workers : int or {minimum, maximum}, optional
        Worker processes; a range lets them come and go with the work. Of ``ssh``, on each host. Default: one
        per core (``local``), per GPU (``cuda``), or one.
    threads : int
        Threads per worker, that share the worker's metrics. 1 where a worker has a GPU to itself.
    memory_limit : str
        Per worker, as Dask takes it; jobs need a number.
    device : str
        ``"auto"``: the worker's GPU when it has one, workers taking turns where there are several.
    resources : dict of str to float
        What Dask's own resource constraints find on each worker, as in ``{GPU: 1}``.
    environment : dict of str to str
        Variables of the workers' environment.
    walltime : duration, optional
        Of a job, after which the batch system kills it. Default: that of Dask's own configuration.
    lifetime, lifetime_stagger : duration, optional
        Workers leave by themselves after this time, give or take the stagger. Default: so that they are gone
        before the walltime is over, and not all at once.
    grace : duration
        A worker that is told to go (SIGTERM) has so long to finish its running blocks.
    address : str, optional
        Of the scheduler, ``tls://…`` or ``tcp://…``.
    host, interface : str, optional
        Where the scheduler listens, by address or by the name of a network interface. Default: loopback; with
        jobs this host's address in the direction of the default route.
    tls : bool, optional
        Default: wherever something listens beyond loopback. False must be said, and is recorded.
    security : {ca_file, cert, key}, optional
        The site's own certificates. Default: those of Dask's configuration, else temporary ones.
    shared_folder : str
        Where temporary certificates are written for jobs to read: it must be seen by all hosts.
    start_timeout : duration, optional
        How long to wait for the first worker. Default: one minute; with jobs, one hour.
    options : dict
        Of the library's own cluster class, passed through.
    """

    kind: Kind = "local"
    workers: Annotated[int, pydantic.Field(ge=1)] | WorkerRange | None = None
    threads: int = pydantic.Field(default=1, ge=1)
    memory_limit: str = "auto"
    device: str = "auto"
    resources: dict[str, float] = {}
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

    @pydantic.field_validator("environment", mode="before")
    @classmethod
    def _numbers_are_text(cls, environment: Any) -> Any:
        if not isinstance(environment, dict):
            return environment
        return {
            name: str(value) if type(value) in (int, float) else value for name, value in environment.items()
        }

    @pydantic.model_validator(mode="after")
    def _only_what_the_kind_takes(self) -> Profile:
        if (self.kind == "address") != (self.address is not None):
            raise ValueError("kind 'address' and the key 'address' need each other")
        taken = _KEYS[self.kind] | {"kind", "device"}
        if useless := sorted(self.model_fields_set - taken):
            raise ValueError(
                f"a cluster of kind {self.kind!r} has no {', '.join(useless)}; "
                f"it takes {', '.join(sorted(taken))}"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _one_thread_per_gpu(self) -> Profile:
        if self.threads > 1 and (self.kind == "cuda" or self.device.startswith("cuda")):
            raise ValueError(
                f"threads: 1 is all a worker with a GPU of its own can use, got {self.threads}; leave it out"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _values_that_go_together(self) -> Profile:
        if self.kind in BATCH and self.memory_limit == "auto":
            raise ValueError("memory_limit: a job needs a number, as in 4GB; its memory is asked for with it")
        if isinstance(self.workers, WorkerRange) and self.kind in ("cuda", "ssh"):
            raise ValueError(f"workers: a cluster of kind {self.kind!r} has a fixed number")
        if self.security is not None and self.tls is False:
            raise ValueError("security: certificates are of no use with tls: false")
        if self.host is not None and self.interface is not None:
            raise ValueError("host, interface: give one of them")
        return self

    @property
    def wait_s(self) -> float:
        """How long to wait for the first worker, in seconds."""
        return self.start_timeout or START_TIMEOUT_S.get(self.kind, 60.0)

    @property
    def asked_for(self) -> WorkerRange:
        """How many workers there are to be, on all hosts; one on each where nothing says so."""
        if isinstance(self.workers, WorkerRange):
            return self.workers
        # The first host is the scheduler's.
        hosts = len(self.options["hosts"]) - 1 if self.kind == "ssh" else 1
        count = (self.workers or 1) * hosts
        return WorkerRange(minimum=count, maximum=count)


def load_profile(name: str, workers: int | None = None) -> Profile:
    """A profile by name (``local``, ``slurm``), path of a YAML file, or address of a scheduler.

    Parameters
    ----------
    name : str
    workers : int, optional
        Instead of the profile's.

    Raises
    ------
    ClusterError
        When there is no such profile or it holds unknown keys or wrong values.
    """
    if name.startswith(("tcp://", "tls://")):
        profile = Profile(kind="address", address=name)
    else:
        profile = _read_profile(name)
    if workers is None:
        return profile
    if "workers" not in _KEYS[profile.kind]:
        raise ClusterError(
            f"--workers is for clusters that are started, as local; {name!r} is of kind {profile.kind}"
        )
    if workers < 1:
        raise ClusterError(f"expected at least one worker, got {workers}")
    return profile.model_copy(update={"workers": workers})


def _read_profile(name: str) -> Profile:
    try:
        content = yaml.safe_load(find_resource("workflows/clusters", name).read_text(encoding="utf-8")) or {}
        if not isinstance(content, dict):
            raise TypeError(f"expected keys and values, got a {type(content).__name__}")
        return Profile(**content)
    except pydantic.ValidationError as error:
        raise ClusterError(f"cluster profile {name!r}: {_faults(error)}") from error
    except (ResourceError, TypeError, OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ClusterError(f"cluster profile {name!r}: {error}") from error


def _faults(error: pydantic.ValidationError) -> str:
    """What is wrong, key by key, with a near name for one that is unknown."""
    lines = []
    for fault in error.errors():
        where = ".".join(map(str, fault["loc"]))
        text = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(fault["loc"][-1]), list(Profile.model_fields), n=1)
            text = "unknown key" + (f", did you mean {near[0]!r}?" if near else "")
        lines.append(f"{where}: {text}" if where else text)
    return "; ".join(lines)
