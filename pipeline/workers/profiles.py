"""How to get workers: profiles of clusters, read from YAML and checked before anything starts."""

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

START_TIMEOUT_S: dict[Kind, float] = {
    "slurm": 3600,
    "pbs": 3600,
    "kubernetes": 600,
    "local": 180,
    "cuda": 180,
}
"""How long to wait for the first worker, on this machine for all of them to start; else a minute."""


def parse_duration(value: Any) -> float:
    """Seconds of a duration: a number of them, ``"90s"``, ``"2 hours"``, ``"hh:mm:ss"`` or ``"d-hh:mm:ss"``.

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
        raise ValueError(f"expected a duration as in 30s, 2h or 01:30:00, found {_shown(value)}") from error


def _parse_memory(value: Any) -> str:
    """Bytes of a worker as Dask takes them: a number, a share of the machine's, ``"4GB"``, ``"auto"``."""
    text = str(value)
    try:
        if isinstance(value, bool) or (
            text != "auto" and (float(text) if _is_number(text) else parse_bytes(text)) < 0
        ):
            raise ValueError
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"expected bytes as in 4GB, or auto, found {_shown(value)}") from error
    return text


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return math.isfinite(float(text))
    return False


def _is_range(value: Any) -> str:
    return "range" if isinstance(value, dict | WorkerRange) else "number"


def _shown(value: Any) -> str:
    """What was found, as YAML has it where that is short, so that ``true`` is not ``True``."""
    if isinstance(value, str):
        return repr(value)
    try:
        text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    except yaml.YAMLError:
        text = repr(value)
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= 100 else f"{text[:99]}…"


Duration: TypeAlias = Annotated[float, pydantic.BeforeValidator(parse_duration), pydantic.Field(gt=0)]
"""Seconds."""
Number: TypeAlias = Annotated[int, pydantic.Field(strict=True, ge=1)]
Amount: TypeAlias = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class WorkerRange(_Strict):
    """Workers that come and go with the work."""

    minimum: Number = 1
    maximum: Number

    @pydantic.model_validator(mode="after")
    def _minimum_below_maximum(self) -> WorkerRange:
        if self.minimum > self.maximum:
            raise ValueError(
                f"expected a minimum of at most {self.maximum}, the maximum, found {self.minimum}"
            )
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
    memory_limit : str or int
        Per worker, as Dask takes it; jobs need a number.
    device : str
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"``: the worker's GPU when it has one, workers taking
        turns where there are several.
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
        How long to wait for the first worker. Default: one minute; with jobs, one hour. On this machine, for
        all of them, and three minutes: silent ones are then killed, and all are started again.
    options : dict
        Of the library's own cluster class, passed through.
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
    def _device_of_ours(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError(f"expected auto, cpu, cuda or cuda:N, found {device!r}")
        return device

    @pydantic.field_validator("address")
    @classmethod
    def _address_of_a_scheduler(cls, address: str | None) -> str | None:
        if address is not None:
            found = re.fullmatch(r"(tcp|tls)://([^\s/:]+|\[[\da-fA-F:.]+\]):(\d{1,5})", address)
            if found is None or not 0 < int(found[3]) < 2**16:
                raise ValueError(f"expected tcp://HOST:PORT or tls://HOST:PORT, found {address!r}")
        return address

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
            raise ValueError(
                f"address: expected with kind 'address', and with no other; found "
                f"{'none' if self.address is None else repr(self.address)}, and kind {self.kind!r}"
            )
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
                f"threads: 1 is all a worker with a GPU of its own can use, found {self.threads}"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _values_that_go_together(self) -> Profile:
        if self.kind in BATCH and (self.memory_limit == "auto" or parse_bytes(self.memory_limit) < 1):
            raise ValueError(
                "memory_limit: a job needs a number, as in 4GB; its memory is asked for with it; found "
                f"{self.memory_limit!r}"
            )
        if isinstance(self.workers, WorkerRange) and self.kind in ("cuda", "ssh"):
            found = _shown(self.workers.model_dump())
            raise ValueError(f"workers: a cluster of kind {self.kind!r} has a fixed number, found {found}")
        if self.security is not None and self.tls is False:
            raise ValueError("security: certificates are of no use with tls: false")
        if self.host is not None and self.interface is not None:
            raise ValueError("host, interface: give one of them")
        return self

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Name the file of this profile, where it has one, in what is raised here of the cluster."""
        try:
            yield
        except ClusterError as error:
            if not self._source:
                raise
            raise ClusterError(f"cluster profile {self._source!r}: {error}") from error

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
            f"--workers is for clusters that are started, as local; {name!r} is of kind {profile.kind}"
        )
    if workers < 1:
        raise ClusterError(f"expected at least one worker, got {workers}")
    return profile.model_copy(update={"workers": workers})


class _Loader(yaml.SafeLoader):
    """Of two values of a key the last would count, unsaid."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        there: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in there:
                    raise TypeError(
                        f"{key.value}: expected once, found again in line {key.start_mark.line + 1}"
                    )
                there.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _read_profile(name: str) -> Profile:
    try:
        text = find_resource("workflows/clusters", name).read_text(encoding="utf-8")
        content = _Loader(text).get_single_data() or {}
        if not isinstance(content, dict):
            raise TypeError(f"expected keys and values, found {_shown(content)}")
        if others := [key for key in content if not isinstance(key, str)]:
            raise TypeError(f"{others[0]}: unknown key")
        return Profile(**content)
    except pydantic.ValidationError as error:
        raise ClusterError(f"cluster profile {name!r}: {_faults(error)}") from error
    except (ResourceError, TypeError, OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            said = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise ClusterError(f"cluster profile {name!r}: {said}") from error


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
    """What is wrong, key by key: what was expected and found, with a near name for a key that is unknown."""
    lines = []
    for fault in error.errors():
        of, *within = (str(part) for part in fault["loc"]) if fault["loc"] else ("",)
        model: Any = Profile
        if of == "workers":  # a number or a range, as pydantic calls them
            within, model = within[1:], WorkerRange
        elif of == "security":
            model = SecurityFiles
        where = ".".join((of, *within)).removesuffix(".[key]")
        text = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            known = list(model.model_fields if within else Profile.model_fields)
            near = difflib.get_close_matches((of, *within)[-1], known, n=1)
            text = "unknown key" + (
                f", did you mean {near[0]!r}?" if near else f", expected {', '.join(known)}"
            )
        elif fault["type"] == "missing":
            text = "expected, and not found"
        elif fault["type"] != "value_error":
            text = _EXPECTED.get(fault["type"], text.replace("Input should be", "expected", 1))
            if where == "workers":
                text = "expected a whole number from 1, or a range as in {minimum: 1, maximum: 64}"
            text += f", found {_shown(fault['input'])}"
        lines.append(f"{where}: {text}" if where else text)
    return "; ".join(lines)
