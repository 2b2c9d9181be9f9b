"""Each kind of cluster, started from its profile: what is ours in the words of the library that starts it.

Options of the library's own class are passed through once they are known to be some, and none of ours:
:func:`check_options` says so before anything starts.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import queue
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from multiprocessing import resource_tracker
from pathlib import Path
from types import ModuleType
from typing import Any

import dask
import yaml
from dask.system import CPU_COUNT
from distributed import LocalCluster, Nanny, Scheduler, Security, SSHCluster, Worker
from distributed.deploy import Cluster as DaskCluster
from distributed.deploy import SpecCluster
from distributed.deploy.spec import ProcessInterface
from distributed.utils import get_ip, get_ip_interface

from pipeline.resources import shipped_folder
from pipeline.workers.profiles import ClusterError, Kind, Profile, WorkerRange, parse_duration
from pipeline.workers.tls import of_files, wants_tls

logger = logging.getLogger(__name__)

DASK_SETTINGS = Path("dask", "distributed.yaml")
"""Within the shipped profiles: a file that Dask reads as it is, for schedulers that others start."""
FAULT_TOLERANCE: dict[str, Any] = yaml.safe_load(
    (shipped_folder("workflows/clusters") / DASK_SETTINGS).read_text(encoding="utf-8")
)
"""Settings of Dask with which what died is noticed soon; those of every cluster that is started here."""

OF_THIS_MACHINE: tuple[Kind, ...] = ("local", "cuda")
"""Kinds whose workers are children of the driver, and stopped by it."""
REPLACED_BY_NOBODY: tuple[Kind, ...] = (*OF_THIS_MACHINE, "ssh")
"""Kinds for which no batch system starts other workers."""
LOCAL_WORKER_TTL = "60s"
"""A process that dies here is noticed at once; silent ones are busy machines, and should not be restarted."""
LOST_LOCAL_WORKER_TIMEOUT = "120s"
"""Within it a worker that died here is started again, however busy the machine; then Dask gives up on it."""
NO_WORKERS_TIMEOUT = "120s"
"""Tasks that find no worker for so long fail, rather than wait forever."""
PRELOAD = ("pipeline.workers.cluster",)
"""What takes long to import is imported ahead: a worker that has joined must not be silent."""

SAFE_PATH, SAFE_PATH_FLAG = "PYTHONSAFEPATH", "-P"
"""Have ``python -m`` not look in the current folder first: it may hold another ``pipeline``."""

LOOPBACK = "127.0.0.1"
SUBMISSION_S = 60
"""How long a batch system may take to accept a job."""
STARTUP_S = 30
"""What a job spends before its worker's lifetime begins to count: of the walltime, kept free."""

_LIBRARIES: dict[Kind, tuple[str, str]] = {
    "cuda": ("dask_cuda", "LocalCUDACluster"),
    "slurm": ("dask_jobqueue", "SLURMCluster"),
    "pbs": ("dask_jobqueue", "PBSCluster"),
    "kubernetes": ("dask_kubernetes.operator", "KubeCluster"),
}
_NEEDED: dict[Kind, str] = {kind: module for kind, (module, _) in _LIBRARIES.items()} | {"ssh": "asyncssh"}

_NOT_FOR_PROFILES = "it has no place in a profile"
_OURS_EVERYWHERE = {
    "n_workers": "use workers",
    "security": "use security or tls",
    "protocol": "use tls",
    "resources": "use resources",
    "asynchronous": _NOT_FOR_PROFILES,
    "loop": _NOT_FOR_PROFILES,
    "silence_logs": _NOT_FOR_PROFILES,
}
_OURS_ON_WORKERS = {
    "nthreads": "use threads",
    "memory_limit": "use memory_limit",
    "env": "use environment",
    "resources": "use resources",
    "security": "use security or tls",
    "protocol": "use tls",
}
_OURS_OF_JOBS = {
    "cores": "use threads",
    "memory": "use memory_limit",
    # Dask forgets a job by its worker's name: one with several workers would never be replaced.
    "processes": "use workers; each is a job of its own, for of several in one job none would be replaced",
    "walltime": "use walltime",
    "host": "use host",
    "interface": "use interface",
    "shared_temp_directory": "use shared_folder",
}
_OURS: dict[Kind, dict[str, str]] = {
    "local": _OURS_EVERYWHERE
    | _OURS_ON_WORKERS
    | {"threads_per_worker": "use threads", "host": "use host", "ip": "use host", "interface": "use host"},
    "slurm": _OURS_EVERYWHERE | _OURS_OF_JOBS,
    "pbs": _OURS_EVERYWHERE | _OURS_OF_JOBS,
    "ssh": _OURS_EVERYWHERE,
    "kubernetes": {
        **_OURS_EVERYWHERE,
        "env": "use environment",
        "worker_command": "use threads, memory_limit",
    },
}
_OURS["cuda"] = _OURS["local"]
# Of Kubernetes these are requests and limits of pods, and nothing else says them.
del _OURS["kubernetes"]["resources"]

_OUR_WORKER_FLAGS = {
    "--lifetime": "lifetime",
    "--lifetime-stagger": "lifetime_stagger",
    "--resources": "resources",
    "--nthreads": "threads",
    "--nworkers": "workers",
    "--memory-limit": "memory_limit",
    "--protocol": "tls",
    "--tls-ca-file": "security",
    "--tls-cert": "security",
    "--tls-key": "security",
}


# ---------------------------------------------------------------- what may be asked for


def check_options(profile: Profile) -> None:
    """Refuse what cannot work, before anything starts.

    Raises
    ------
    ClusterError
        When the package of this kind of cluster is absent; for options that its class doesn't have, or that
        keys of the profile say; for certificates that it cannot use, and places where it cannot listen; for a
        lifetime beyond the walltime.
    """
    if profile.security is not None:
        of_files(profile.security)
    if profile.kind in ("none", "address"):
        return
    known = _known_options(profile.kind)
    _check_names(profile, "options", profile.options, known, _OURS[profile.kind])
    _check_where_it_listens(profile)
    if profile.kind in ("slurm", "pbs"):
        lifetime(profile)
        scheduler = profile.options.get("scheduler_options", {})
        ours = {"host": "use host", "interface": "use interface"} | _OURS_EVERYWHERE
        _check_names(profile, "options.scheduler_options", scheduler, _parameters(Scheduler), ours)
        for argument in _listed(profile, "worker_extra_args"):
            flag = str(argument).partition("=")[0]
            if flag in _OUR_WORKER_FLAGS:
                raise ClusterError(
                    f"options.worker_extra_args: {flag} is set already: use {_OUR_WORKER_FLAGS[flag]}"
                )
    if profile.kind == "ssh":
        if len(hosts := _listed(profile, "hosts")) < 2:
            raise ClusterError(
                "options.hosts: expected the scheduler's host, and then one or more for workers, found "
                f"{hosts or 'none'}"
            )
        connections = profile.options.get("connect_options", {})
        for connection in connections if isinstance(connections, list) else [connections]:
            _check_names(profile, "options.connect_options", connection, _connection_options(), {})
        worker, scheduler = (profile.options.get(f"{role}_options", {}) for role in ("worker", "scheduler"))
        ours = _OURS_ON_WORKERS | {"n_workers": "use workers"}
        _check_names(profile, "options.worker_options", worker, _parameters(Nanny, Worker), ours)
        ours = {name: _OURS_EVERYWHERE[name] for name in ("security", "protocol")}
        _check_names(profile, "options.scheduler_options", scheduler, _parameters(Scheduler), ours)
    if profile.kind == "kubernetes":
        if wants_tls(profile):
            raise ClusterError(
                "dask-kubernetes cannot give its scheduler certificates: say tls: false, and keep others out "
                "of the namespace with a network policy"
            )
        if "custom_cluster_spec" in profile.options and (
            said := profile.model_fields_set & {"threads", "memory_limit", "resources", "environment"}
        ):
            raise ClusterError(
                f"{', '.join(sorted(said))}: options.custom_cluster_spec says what workers are"
            )


def _check_names(profile: Profile, where: str, given: Any, known: set[str], ours: Mapping[str, str]) -> None:
    if not isinstance(given, Mapping):
        raise ClusterError(f"{where}: expected keys and values, found {given!r}")
    for name in map(str, given):
        if name in ours:
            raise ClusterError(f"{where}.{name} is not for profiles of kind {profile.kind!r}: {ours[name]}")
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known - ours.keys()), n=3)
            hint = f", did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ClusterError(f"{where}.{name}: a cluster of kind {profile.kind!r} has no such option{hint}")


def _listed(profile: Profile, name: str) -> list[Any]:
    """An option that is a list."""
    given = profile.options.get(name, [])
    if not isinstance(given, list | tuple):
        raise ClusterError(f"options.{name}: expected a list, found {given!r}")
    return list(given)


def _connection_options() -> set[str]:
    """What asyncssh takes of a connection: its own connect(), and the classes that it hands the rest to."""
    import asyncssh

    classes = inspect.getmro(asyncssh.SSHClientConnectionOptions)
    prepared = (vars(one)["prepare"] for one in classes if "prepare" in vars(one))
    return _parameters(asyncssh.connect, *prepared)


def _check_where_it_listens(profile: Profile) -> None:
    if profile.interface is not None:
        try:
            get_ip_interface(profile.interface)
        except ValueError as error:
            raise ClusterError(
                f"interface: expected one of this machine, found {profile.interface!r}: {error}"
            ) from error
    if profile.host is not None:
        try:
            family, *_, address = socket.getaddrinfo(profile.host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
            with socket.socket(family) as tried:
                tried.bind(address)
        except (OSError, UnicodeError) as error:
            raise ClusterError(
                f"host: expected an address or a name of this machine, found {profile.host!r}: {error}"
            ) from error


def _known_options(kind: Kind) -> set[str]:
    """Names of the options that the library's class of this kind takes."""
    found = _library(kind)
    if kind == "local":
        return _parameters(LocalCluster, Nanny, Worker)
    if kind == "cuda":
        return _parameters(*inspect.getmro(found)[:-1], Nanny, Worker)
    if kind == "ssh":
        return _parameters(SSHCluster, SpecCluster) - {"workers", "scheduler", "worker"}
    if kind == "kubernetes":
        return _parameters(found)
    of_jobs = [cls for cls in inspect.getmro(found.job_cls) if cls.__module__.startswith("dask_jobqueue")]
    mine = [cls for cls in inspect.getmro(found) if cls.__module__.startswith("dask_jobqueue")]
    return _parameters(*mine, *of_jobs) - {"job_cls", "scheduler", "scheduler_cls", "dashboard_address"}


def _parameters(*callables: Callable[..., Any]) -> set[str]:
    names = set()
    for one in callables:
        for parameter in inspect.signature(one.__init__ if inspect.isclass(one) else one).parameters.values():
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                names.add(parameter.name)
    return names - {"self"}


def _library(kind: Kind) -> Any:
    """The class that starts clusters of this kind.

    Raises
    ------
    ClusterError
        Naming the extra, when the package isn't installed.
    """
    try:
        if kind in _NEEDED:
            _import_quietly(_NEEDED[kind])
        module, name = _LIBRARIES.get(
            kind, ("distributed", "SSHCluster" if kind == "ssh" else "LocalCluster")
        )
        return getattr(_import_quietly(module), name)
    except ImportError as error:
        raise ClusterError(
            f"clusters of kind {kind!r} need a package that is not here ({error}): pip install 'lsim[{kind}]'"
        ) from error


def _import_quietly(module: str) -> ModuleType:
    """Import a module and keep the handler of Ctrl-C: dask_jobqueue makes it an exit with code 0."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        return importlib.import_module(module)
    finally:
        # None stands for a handler that isn't Python's: it cannot be set again.
        if handler is not None and signal.getsignal(signal.SIGINT) is not handler:
            signal.signal(signal.SIGINT, handler)


# ---------------------------------------------------------------- starting


def start_cluster(profile: Profile, security: Security | None) -> DaskCluster:
    """Start a cluster; its workers may come later, but for those of this machine."""
    start = {
        "local": _start_local,
        "cuda": _start_local,
        "slurm": _start_jobs,
        "pbs": _start_jobs,
        "ssh": _start_ssh,
        "kubernetes": _start_kubernetes,
    }[profile.kind]
    return start(profile, security)


def keeps_logs() -> bool:
    """Whether Dask's own configuration says what it logs; else what our messages say is left out."""
    return any(dask.config.get(name, None) is not None for name in ("logging", "distributed.logging"))


def settings(profile: Profile) -> dict[str, Any]:
    """Dask's configuration while a cluster of this profile runs, by full names; its processes inherit it."""
    found = _flat(FAULT_TOLERANCE)
    environ = dask.config.get("distributed.nanny.environ") | profile.environment
    preload = dask.config.get("distributed.worker.preload")
    found |= {"distributed.nanny.environ": environ, "distributed.worker.preload": [*preload, *PRELOAD]}
    if profile.kind in REPLACED_BY_NOBODY:
        found["distributed.scheduler.no-workers-timeout"] = NO_WORKERS_TIMEOUT
    if profile.kind in OF_THIS_MACHINE:
        found["distributed.scheduler.worker-ttl"] = LOCAL_WORKER_TTL
        found["distributed.deploy.lost-worker-timeout"] = LOST_LOCAL_WORKER_TIMEOUT
    return found


def _start_local(profile: Profile, security: Security | None) -> DaskCluster:
    _track_quietly()
    host = profile.host or LOOPBACK
    options: dict[str, Any] = {
        "threads_per_worker": profile.threads,
        "memory_limit": profile.memory_limit,
        "host": host,
        "dashboard_address": f"{LOOPBACK}:0",
        # What fails in a worker is told of by its task, and workers that are missing by the tasks that wait.
        "silence_logs": False if keeps_logs() else logging.CRITICAL,
        "security": security,
        "resources": profile.resources or None,
        **profile.options,
    }
    workers = profile.workers
    if profile.kind == "cuda":
        cluster = _library("cuda")(n_workers=workers, **options)
    elif isinstance(workers, WorkerRange):
        cluster = LocalCluster(n_workers=workers.minimum, **options)
        cluster.adapt(minimum=workers.minimum, maximum=workers.maximum)
    else:
        cluster = LocalCluster(n_workers=workers or CPU_COUNT, **options)
    return cluster


def _track_quietly() -> None:
    """Start the process that frees what killed workers leave, and not have it warn that it does."""
    if not keeps_logs():
        sys.warnoptions.append(rule := "ignore:resource_tracker:UserWarning")
        try:
            resource_tracker.ensure_running()
        finally:
            sys.warnoptions.remove(rule)


def _start_jobs(profile: Profile, security: Security | None) -> DaskCluster:
    cluster = jobs_cluster(profile, security)
    command = shlex.split(cluster.job_cls.submit_command)[0]
    if shutil.which(command) is None:
        cluster.close()
        raise ClusterError(f"{command} is not here: start this where jobs can be submitted")
    low, high = _range(profile.workers)
    try:
        cluster.scale(jobs=low)
        for _ in range(low):
            if (refusal := cluster.job_cls.submissions.get(timeout=SUBMISSION_S)) is not None:
                raise ClusterError(f"the batch system refused a job: {_said(refusal)}") from refusal
    except queue.Empty as error:
        cluster.close()
        raise ClusterError(f"{command} has not answered for {SUBMISSION_S} s") from error
    except BaseException:
        cluster.close()
        raise
    cluster.job_cls.submissions = None
    # scale() would leave jobs that were cancelled or killed unreplaced; adapt() submits others, but only for
    # jobs whose worker had joined: nothing tells Dask of one that ends in the queue.
    cluster.adapt(minimum_jobs=low, maximum_jobs=high, interval="2s")
    return cluster


def _heard(job_class: Any) -> Any:
    """A class of jobs of which the first submissions can be heard of: the library tells only its log."""

    class Job(job_class):
        submissions: queue.Queue[Exception | None] | None = queue.Queue()

        async def start(self) -> None:
            if (heard := type(self).submissions) is None:
                await super().start()
                return
            try:
                await super().start()
            except Exception as error:
                await ProcessInterface.start(self)  # so that it can be closed
                heard.put(error)
            else:
                heard.put(None)

        async def close(self) -> None:
            await super().close()
            await ProcessInterface.close(self)  # says that it is closed, which the library's own leaves out

    return Job


def _said(error: Exception) -> str:
    """What a command that failed printed, where the library's error tells it."""
    _, found, printed = str(error).partition("stderr:\n")
    return printed.strip() if found and printed.strip() else str(error)


def jobs_cluster(profile: Profile, security: Security | None) -> Any:
    """A cluster of batch jobs with its scheduler, and no job submitted yet."""
    options = dict(profile.options)
    limit = dask.utils.parse_bytes(profile.memory_limit)
    lasting, stagger = lifetime(profile)
    host = profile.host or (get_ip_interface(profile.interface) if profile.interface else get_ip())
    extra = [
        "--no-dashboard",
        "--dashboard-address",
        f"{LOOPBACK}:0",
        "--lifetime",
        f"{lasting:.0f}s",
        "--lifetime-stagger",
        f"{stagger:.0f}s",
        "--no-lifetime-restart",
        *(word for module in PRELOAD for word in ("--preload", module)),
        *(["--resources", shlex.quote(_resources(profile))] if profile.resources else []),
        *map(str, options.pop("worker_extra_args", ())),
    ]
    prologue = [
        # The shell that runs the job stays until its worker has left; it would end at the first signal.
        "trap : TERM",
        *(f"export {name}={shlex.quote(value)}" for name, value in environment(profile).items()),
        *map(str, options.pop("job_script_prologue", ())),
    ]
    scheduler = {
        "host": host,
        "dashboard_address": f"{LOOPBACK}:0",
        **options.pop("scheduler_options", {}),
    }
    given = {} if profile.interface is None else {"interface": profile.interface}
    library = _library(profile.kind)
    return library(
        job_cls=_heard(library.job_cls),
        cores=profile.threads,
        memory=f"{limit}B",
        processes=1,
        walltime=_clock(walltime(profile)),
        security=security,
        protocol="tcp://" if security is None else "tls://",
        worker_extra_args=extra,
        job_script_prologue=prologue,
        scheduler_options=scheduler,
        **given,
        **options,
    )


def _start_ssh(profile: Profile, security: Security | None) -> DaskCluster:
    options = dict(profile.options)
    everywhere: dict[str, Any] = {"protocol": "tcp://"}
    if security is not None:
        everywhere = {"protocol": "tls://", "security": _as_dict(security)}
    workers, _ = _range(profile.workers)
    worker = {
        "nthreads": profile.threads,
        "memory_limit": profile.memory_limit,
        "n_workers": workers,
        "dashboard": False,
        "dashboard_address": f"{LOOPBACK}:0",
        **({"resources": profile.resources} if profile.resources else {}),
        **everywhere,
        **options.pop("worker_options", {}),
    }
    scheduler = {
        "dashboard_address": f"{LOOPBACK}:0",
        **everywhere,
        **options.pop("scheduler_options", {}),
    }
    hosts = options.pop("hosts")
    options.setdefault("remote_python", f"{sys.executable} {SAFE_PATH_FLAG}")
    try:
        return SSHCluster(
            hosts,
            worker_options=worker,
            scheduler_options=scheduler,
            security=security,
            silence_logs=40,
            **options,
        )
    except Exception as error:
        # asyncssh's errors share no other base, and the library raises Exception itself.
        raise ClusterError(f"a cluster on {', '.join(hosts)}: {type(error).__name__}: {error}") from error


def _start_kubernetes(profile: Profile, security: Security | None) -> DaskCluster:
    low, high = _range(profile.workers)
    cluster = _library("kubernetes")(n_workers=low, quiet=True, **pod_options(profile))
    if high > low:
        cluster.adapt(minimum=low, maximum=high)
    return cluster


def pod_options(profile: Profile) -> dict[str, Any]:
    """Options of pods: those of the profile, and what its keys say in the words of dask-kubernetes."""
    if "custom_cluster_spec" in profile.options:
        return profile.options
    command = ["dask-worker", "--nthreads", str(profile.threads), "--memory-limit", profile.memory_limit]
    command += [word for module in PRELOAD for word in ("--preload", module)]
    if profile.resources:
        command += ["--resources", _resources(profile)]
    return profile.options | {"worker_command": command, "env": environment(profile)}


def _range(workers: int | WorkerRange | None) -> tuple[int, int]:
    if isinstance(workers, WorkerRange):
        return workers.minimum, workers.maximum
    return workers or 1, workers or 1


def _resources(profile: Profile) -> str:
    return " ".join(f"{name}={amount:g}" for name, amount in profile.resources.items())


def _as_dict(security: Security) -> dict[str, Any]:
    """A Security of files, as another process makes it again; paths travel, keys don't."""
    names = ("tls_ca_file", "tls_worker_cert", "tls_worker_key", "tls_scheduler_cert", "tls_scheduler_key")
    return {"require_encryption": True} | {name: getattr(security, name) for name in names}


# ---------------------------------------------------------------- of jobs


def environment(profile: Profile) -> dict[str, str]:
    """Variables of the workers' environment: a safe path, Dask's fault tolerance, then the profile's own."""
    variables = {
        f"DASK_{name.upper().replace('-', '_').replace('.', '__')}": str(value)
        for name, value in _flat(FAULT_TOLERANCE).items()
    }
    return {SAFE_PATH: "1"} | variables | profile.environment


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their full names, ``distributed.comm.retry.count`` and the like."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def walltime(profile: Profile) -> float:
    """Seconds after which the batch system kills a job: the profile's, else those of Dask's configuration."""
    if profile.walltime is not None:
        return profile.walltime
    return parse_duration(dask.config.get(f"jobqueue.{profile.kind}.walltime"))


def lifetime(profile: Profile) -> tuple[float, float]:
    """Seconds after which a worker leaves by itself, and how much more or less that may be.

    By default the latest still has its grace, and the start of the job, before the walltime is over.

    Raises
    ------
    ClusterError
        When the walltime is too short for that.
    """
    limit = walltime(profile)
    stagger = profile.lifetime_stagger
    if stagger is None:
        stagger = min(300.0, limit / 20)
    latest = limit - profile.grace - STARTUP_S
    lasting = profile.lifetime or latest - stagger
    kept = f"a grace of {profile.grace:g} s, a stagger of {stagger:g} s and {STARTUP_S} s to start"
    if latest - stagger <= stagger:
        where = "walltime" if profile.walltime else "walltime of Dask's configuration"
        # The stagger is kept free twice: half of what it needs at most follows from the walltime.
        needed = profile.grace + STARTUP_S
        needed = needed + 2 * stagger if profile.lifetime_stagger else min(needed / 0.9, needed + 600)
        raise ClusterError(f"{where}: expected more than {needed:.0f} s, for {kept}; found {limit:g} s")
    if not stagger < lasting <= latest - stagger:
        raise ClusterError(
            f"lifetime: expected more than {stagger:g} s and at most {latest - stagger:g} s, for {kept} "
            f"within a walltime of {limit:g} s; found {lasting:g} s"
        )
    return lasting, stagger


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour:02}:{minute:02}:{second:02}"
