"""Start each kind of cluster: translate a profile into the arguments of the library that starts it.

A profile's ``options`` are passed through to the library's class. Before anything starts,
:func:`check_options` checks that the class has them, and that no key of the profile sets the same.
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
from pipeline.workers.profiles import BATCH, ClusterError, Kind, Profile, WorkerRange, parse_duration
from pipeline.workers.tls import load_files, wants_tls

logger = logging.getLogger(__name__)

DASK_SETTINGS = Path("dask", "distributed.yaml")
"""A file among the shipped profiles that Dask reads by itself, for schedulers that lsim doesn't start."""
FAULT_TOLERANCE: dict[str, Any] = yaml.safe_load(
    (shipped_folder("workflows/clusters") / DASK_SETTINGS).read_text(encoding="utf-8")
)
"""Settings of Dask with which it notices dead workers soon, for every cluster that lsim starts."""

ON_THIS_MACHINE: tuple[Kind, ...] = ("local", "cuda")
"""Kinds whose workers are child processes of the driver, which stops them."""
NEVER_REPLACED: tuple[Kind, ...] = (*ON_THIS_MACHINE, "ssh")
"""Kinds without a batch system that replaces lost workers."""
LOCAL_WORKER_TTL = "60s"
"""Longer than for other kinds: Dask sees a dead local process at once; a silent one is on a busy machine."""
LOST_LOCAL_WORKER_TIMEOUT = "120s"
"""Time to restart a worker that died on this machine, even a busy one; then Dask gives it up."""
NO_WORKERS_TIMEOUT = "120s"
"""Tasks without a worker for this long fail, rather than wait for ever."""
PRELOAD = ("pipeline.workers.cluster",)
"""Modules that workers import before they join: the long import would make a joined worker silent."""

SAFE_PATH, SAFE_PATH_FLAG = "PYTHONSAFEPATH", "-P"
"""Keep ``python -m`` from importing from the current folder first: it may hold another ``pipeline``."""

LOOPBACK = "127.0.0.1"
SUBMISSION_S = 60
"""Seconds that a batch system may take to accept a job."""
STARTUP_S = 30
"""Seconds of the walltime that a job spends before its worker's lifetime begins to count."""

_LIBRARIES: dict[Kind, tuple[str, str]] = {
    "cuda": ("dask_cuda", "LocalCUDACluster"),
    "slurm": ("dask_jobqueue", "SLURMCluster"),
    "pbs": ("dask_jobqueue", "PBSCluster"),
    "kubernetes": ("dask_kubernetes.operator", "KubeCluster"),
}
_PACKAGES: dict[Kind, str] = {kind: module for kind, (module, _) in _LIBRARIES.items()} | {"ssh": "asyncssh"}

_NOT_FOR_PROFILES = "lsim sets it"
_RESERVED_EVERYWHERE = {
    "n_workers": "use workers",
    "security": "use security or tls",
    "protocol": "use tls",
    "resources": "use resources",
    "asynchronous": _NOT_FOR_PROFILES,
    "loop": _NOT_FOR_PROFILES,
    "silence_logs": _NOT_FOR_PROFILES,
}
_RESERVED_ON_WORKERS = {
    "nthreads": "use threads",
    "memory_limit": "use memory_limit",
    "env": "use environment",
    "resources": "use resources",
    "security": "use security or tls",
    "protocol": "use tls",
}
_RESERVED_FOR_JOBS = {
    "cores": "use threads",
    "memory": "use memory_limit",
    # Dask forgets a job by its worker's name: one with several workers would never be replaced.
    "processes": "use workers; each worker is a job of its own, so that it can be replaced",
    "walltime": "use walltime",
    "host": "use host",
    "interface": "use interface",
    "shared_temp_directory": "use shared_folder",
}
_RESERVED: dict[Kind, dict[str, str]] = {
    "local": _RESERVED_EVERYWHERE
    | _RESERVED_ON_WORKERS
    | {"threads_per_worker": "use threads", "host": "use host", "ip": "use host", "interface": "use host"},
    "slurm": _RESERVED_EVERYWHERE | _RESERVED_FOR_JOBS,
    "pbs": _RESERVED_EVERYWHERE | _RESERVED_FOR_JOBS,
    "ssh": _RESERVED_EVERYWHERE,
    "kubernetes": {
        **_RESERVED_EVERYWHERE,
        "env": "use environment",
        "worker_command": "use threads, memory_limit",
    },
}
_RESERVED["cuda"] = _RESERVED["local"]
# For Kubernetes these are requests and limits of pods, which no key of a profile sets.
del _RESERVED["kubernetes"]["resources"]

_RESERVED_WORKER_FLAGS = {
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


# ---------------------------------------------------------------- checks of options


def check_options(profile: Profile) -> None:
    """Check that a cluster of this profile can be started, before anything starts.

    Raises
    ------
    ClusterError
        When the package for this kind of cluster is missing; for options that its class doesn't have, or that
        keys of the profile set; for unusable certificates; for a host or an interface that this machine
        doesn't have; for a lifetime beyond the walltime.
    """
    if profile.security is not None:
        load_files(profile.security)
    if profile.kind in ("none", "address"):
        return
    _check_names(profile, "options", profile.options, _option_names(profile.kind), _RESERVED[profile.kind])
    _check_where_it_listens(profile)
    if profile.kind in BATCH:
        _check_jobs(profile)
    elif profile.kind == "ssh":
        _check_ssh(profile)
    elif profile.kind == "kubernetes":
        _check_kubernetes(profile)


def _check_jobs(profile: Profile) -> None:
    """Check the lifetime of a job's worker, the scheduler's options and the worker's flags."""
    lifetime(profile)
    scheduler = profile.options.get("scheduler_options", {})
    reserved = {"host": "use host", "interface": "use interface"} | _RESERVED_EVERYWHERE
    _check_names(profile, "options.scheduler_options", scheduler, _parameters(Scheduler), reserved)
    for argument in _list_option(profile, "worker_extra_args"):
        flag = str(argument).partition("=")[0]
        if flag in _RESERVED_WORKER_FLAGS:
            raise ClusterError(
                f"options.worker_extra_args: {flag} is set already: use {_RESERVED_WORKER_FLAGS[flag]}"
            )


def _check_ssh(profile: Profile) -> None:
    """Check the hosts, and the options of connections, workers and the scheduler."""
    hosts = _list_option(profile, "hosts")
    if len(hosts) < 2:
        raise ClusterError(
            "options.hosts: expected the scheduler's host, then at least one for workers, found "
            f"{hosts or 'none'}"
        )
    connections = profile.options.get("connect_options", {})
    for connection in connections if isinstance(connections, list) else [connections]:
        _check_names(profile, "options.connect_options", connection, _connection_options(), {})
    worker, scheduler = (profile.options.get(f"{role}_options", {}) for role in ("worker", "scheduler"))
    reserved = _RESERVED_ON_WORKERS | {"n_workers": "use workers"}
    _check_names(profile, "options.worker_options", worker, _parameters(Nanny, Worker), reserved)
    reserved = {name: _RESERVED_EVERYWHERE[name] for name in ("security", "protocol")}
    _check_names(profile, "options.scheduler_options", scheduler, _parameters(Scheduler), reserved)


def _check_kubernetes(profile: Profile) -> None:
    """Refuse TLS, which dask-kubernetes lacks, and keys that a custom specification of pods would ignore."""
    if wants_tls(profile):
        raise ClusterError(
            "dask-kubernetes cannot give its scheduler certificates: set tls: false, and isolate the "
            "namespace with a network policy"
        )
    unused_keys = profile.model_fields_set & {"threads", "memory_limit", "resources", "environment"}
    if unused_keys and "custom_cluster_spec" in profile.options:
        raise ClusterError(
            f"{', '.join(sorted(unused_keys))}: cannot be combined with options.custom_cluster_spec, which "
            "describes the workers"
        )


def _check_names(
    profile: Profile, section: str, options: Any, names: set[str], reserved: Mapping[str, str]
) -> None:
    """Check that options are among ``names``, and none is ``reserved``, which maps it to a remedy."""
    if not isinstance(options, Mapping):
        raise ClusterError(f"{section}: expected keys and values, found {options!r}")
    for name in map(str, options):
        if name in reserved:
            raise ClusterError(
                f"{section}.{name} is not for profiles of kind {profile.kind!r}: {reserved[name]}"
            )
        if name not in names:
            near = difflib.get_close_matches(name, sorted(names - reserved.keys()), n=3)
            hint = f", did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ClusterError(
                f"{section}.{name}: a cluster of kind {profile.kind!r} has no such option{hint}"
            )


def _list_option(profile: Profile, name: str) -> list[Any]:
    """Get an option whose value must be a list; empty if it isn't set."""
    value = profile.options.get(name, [])
    if not isinstance(value, list | tuple):
        raise ClusterError(f"options.{name}: expected a list, found {value!r}")
    return list(value)


def _connection_options() -> set[str]:
    """List the options of asyncssh's connect(), and of the classes to which it passes the rest."""
    import asyncssh

    classes = inspect.getmro(asyncssh.SSHClientConnectionOptions)
    methods = (vars(cls)["prepare"] for cls in classes if "prepare" in vars(cls))
    return _parameters(asyncssh.connect, *methods)


def _check_where_it_listens(profile: Profile) -> None:
    """Check that this machine has the profile's host or interface."""
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
            with socket.socket(family) as server:
                server.bind(address)
        except (OSError, UnicodeError) as error:
            raise ClusterError(
                f"host: expected an address or a name of this machine, found {profile.host!r}: {error}"
            ) from error


def _option_names(kind: Kind) -> set[str]:
    """List the options of the library's class for this kind."""
    library = _library(kind)
    if kind == "local":
        return _parameters(LocalCluster, Nanny, Worker)
    if kind == "cuda":
        return _parameters(*inspect.getmro(library)[:-1], Nanny, Worker)
    if kind == "ssh":
        return _parameters(SSHCluster, SpecCluster) - {"workers", "scheduler", "worker"}
    if kind == "kubernetes":
        return _parameters(library)
    # dask-jobqueue passes options on to its base classes, and to those of its job.
    classes = [*inspect.getmro(library), *inspect.getmro(library.job_cls)]
    of_library = [cls for cls in classes if cls.__module__.startswith("dask_jobqueue")]
    return _parameters(*of_library) - {"job_cls", "scheduler", "scheduler_cls", "dashboard_address"}


def _parameters(*callables: Callable[..., Any]) -> set[str]:
    """List the names of parameters that can be given by keyword, of functions and of classes."""
    names = set()
    for function in callables:
        signature = inspect.signature(function.__init__ if inspect.isclass(function) else function)
        for parameter in signature.parameters.values():
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                names.add(parameter.name)
    return names - {"self"}


def _library(kind: Kind) -> Any:
    """Import the class that starts clusters of this kind.

    Raises
    ------
    ClusterError
        When the package isn't installed; names the extra to install.
    """
    try:
        if kind in _PACKAGES:
            _import_keeping_handler(_PACKAGES[kind])
        module, name = _LIBRARIES.get(
            kind, ("distributed", "SSHCluster" if kind == "ssh" else "LocalCluster")
        )
        return getattr(_import_keeping_handler(module), name)
    except ImportError as error:
        raise ClusterError(
            f"clusters of kind {kind!r} need a package that is not installed ({error}): "
            f"pip install 'lsim[{kind}]'"
        ) from error


def _import_keeping_handler(module: str) -> ModuleType:
    """Import a module and restore the handler of Ctrl-C: dask_jobqueue turns it into an exit with code 0."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        return importlib.import_module(module)
    finally:
        # None stands for a handler that isn't Python's: it cannot be set again.
        if handler is not None and signal.getsignal(signal.SIGINT) is not handler:
            signal.signal(signal.SIGINT, handler)


# ---------------------------------------------------------------- starting


def start_cluster(profile: Profile, security: Security | None) -> DaskCluster:
    """Start a cluster. Workers on this machine have started on return; others may start later."""
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
    """Tell whether Dask's configuration sets up logging; if not, we silence what our messages report."""
    return any(dask.config.get(name, None) is not None for name in ("logging", "distributed.logging"))


def dask_settings(profile: Profile) -> dict[str, Any]:
    """Configure Dask, by full names, for the time of a cluster; the cluster's processes inherit it."""
    settings = _flat(FAULT_TOLERANCE)
    environ = dask.config.get("distributed.nanny.environ") | profile.environment
    preload = dask.config.get("distributed.worker.preload")
    settings |= {"distributed.nanny.environ": environ, "distributed.worker.preload": [*preload, *PRELOAD]}
    if profile.kind in NEVER_REPLACED:
        settings["distributed.scheduler.no-workers-timeout"] = NO_WORKERS_TIMEOUT
    if profile.kind in ON_THIS_MACHINE:
        settings["distributed.scheduler.worker-ttl"] = LOCAL_WORKER_TTL
        settings["distributed.deploy.lost-worker-timeout"] = LOST_LOCAL_WORKER_TIMEOUT
    return settings


def _start_local(profile: Profile, security: Security | None) -> DaskCluster:
    _start_resource_tracker()
    host = profile.host or LOOPBACK
    options: dict[str, Any] = {
        "threads_per_worker": profile.threads,
        "memory_limit": profile.memory_limit,
        "host": host,
        "dashboard_address": f"{LOOPBACK}:0",
        # Tasks report what fails in a worker; waiting tasks report missing workers.
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


def _start_resource_tracker() -> None:
    """Start the process that frees the resources of killed workers, without its warnings about them."""
    if not keeps_logs():
        rule = "ignore:resource_tracker:UserWarning"
        sys.warnoptions.append(rule)
        try:
            resource_tracker.ensure_running()
        finally:
            sys.warnoptions.remove(rule)


def _start_jobs(profile: Profile, security: Security | None) -> DaskCluster:
    """Submit the first jobs, wait until the batch system has accepted them, and replace lost ones later."""
    cluster = jobs_cluster(profile, security)
    command = shlex.split(cluster.job_cls.submit_command)[0]
    if shutil.which(command) is None:
        cluster.close()
        raise ClusterError(f"{command} not found: run this on a host where jobs can be submitted")
    low, high = _range(profile.workers)
    try:
        cluster.scale(jobs=low)
        for _ in range(low):
            refusal = cluster.job_cls.submissions.get(timeout=SUBMISSION_S)
            if refusal is not None:
                raise ClusterError(f"the batch system refused a job: {_stderr_of(refusal)}") from refusal
    except queue.Empty as error:
        cluster.close()
        raise ClusterError(f"{command} has not answered within {SUBMISSION_S} s") from error
    except BaseException:
        cluster.close()
        raise
    cluster.job_cls.submissions = None
    # scale() would not replace cancelled or killed jobs. adapt() does, but only jobs whose worker had joined:
    # Dask doesn't learn of a job that ends in the queue.
    cluster.adapt(minimum_jobs=low, maximum_jobs=high, interval="2s")
    return cluster


def _reporting_submissions(job_class: Any) -> Any:
    """Extend a class of jobs so that it reports submissions in a queue; the library only logs errors."""

    class Job(job_class):
        submissions: queue.Queue[Exception | None] | None = queue.Queue()

        async def start(self) -> None:
            submissions = type(self).submissions
            if submissions is None:
                await super().start()
                return
            try:
                await super().start()
            except Exception as error:
                await ProcessInterface.start(self)  # so that it can be closed
                submissions.put(error)
            else:
                submissions.put(None)

        async def close(self) -> None:
            await super().close()
            await ProcessInterface.close(self)  # sets the status, which the library's own omits

    return Job


def _stderr_of(error: Exception) -> str:
    """Extract the output of a failed command from the library's error; the whole text if there is none."""
    _, _, output = str(error).partition("stderr:\n")
    return output.strip() or str(error)


def jobs_cluster(profile: Profile, security: Security | None) -> Any:
    """Create a cluster of batch jobs with its scheduler, and submit no job yet."""
    options = dict(profile.options)
    limit = dask.utils.parse_bytes(profile.memory_limit)
    seconds, stagger = lifetime(profile)
    host = profile.host or (get_ip_interface(profile.interface) if profile.interface else get_ip())
    extra = [
        "--no-dashboard",
        "--dashboard-address",
        f"{LOOPBACK}:0",
        "--lifetime",
        f"{seconds:.0f}s",
        "--lifetime-stagger",
        f"{stagger:.0f}s",
        "--no-lifetime-restart",
        *(word for module in PRELOAD for word in ("--preload", module)),
        *(["--resources", shlex.quote(_resources(profile))] if profile.resources else []),
        *map(str, options.pop("worker_extra_args", ())),
    ]
    prologue = [
        # The shell that runs the job must outlive its worker; without a trap it ends at the first signal.
        "trap : TERM",
        *(f"export {name}={shlex.quote(value)}" for name, value in environment(profile).items()),
        *map(str, options.pop("job_script_prologue", ())),
    ]
    scheduler = {
        "host": host,
        "dashboard_address": f"{LOOPBACK}:0",
        **options.pop("scheduler_options", {}),
    }
    interface = {} if profile.interface is None else {"interface": profile.interface}
    library = _library(profile.kind)
    return library(
        job_cls=_reporting_submissions(library.job_cls),
        cores=profile.threads,
        memory=f"{limit}B",
        processes=1,
        walltime=_hh_mm_ss(walltime(profile)),
        security=security,
        protocol="tcp://" if security is None else "tls://",
        worker_extra_args=extra,
        job_script_prologue=prologue,
        scheduler_options=scheduler,
        **interface,
        **options,
    )


def _start_ssh(profile: Profile, security: Security | None) -> DaskCluster:
    options = dict(profile.options)
    connection: dict[str, Any] = {"protocol": "tcp://"}
    if security is not None:
        connection = {"protocol": "tls://", "security": _as_dict(security)}
    workers, _ = _range(profile.workers)
    worker = {
        "nthreads": profile.threads,
        "memory_limit": profile.memory_limit,
        "n_workers": workers,
        "dashboard": False,
        "dashboard_address": f"{LOOPBACK}:0",
        **({"resources": profile.resources} if profile.resources else {}),
        **connection,
        **options.pop("worker_options", {}),
    }
    scheduler = {
        "dashboard_address": f"{LOOPBACK}:0",
        **connection,
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
        # asyncssh's errors have no other base in common, and the library raises Exception itself.
        raise ClusterError(f"a cluster on {', '.join(hosts)}: {type(error).__name__}: {error}") from error


def _start_kubernetes(profile: Profile, security: Security | None) -> DaskCluster:
    low, high = _range(profile.workers)
    cluster = _library("kubernetes")(n_workers=low, quiet=True, **pod_options(profile))
    if high > low:
        cluster.adapt(minimum=low, maximum=high)
    return cluster


def pod_options(profile: Profile) -> dict[str, Any]:
    """Translate the profile's keys into options of dask-kubernetes, and add the profile's own options."""
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
    """Convert a Security of files for another process: paths are sent, keys are not."""
    names = ("tls_ca_file", "tls_worker_cert", "tls_worker_key", "tls_scheduler_cert", "tls_scheduler_key")
    return {"require_encryption": True} | {name: getattr(security, name) for name in names}


# ---------------------------------------------------------------- jobs


def environment(profile: Profile) -> dict[str, str]:
    """Collect the workers' environment variables: safe path, Dask's fault tolerance, the profile's own."""
    variables = {
        f"DASK_{name.upper().replace('-', '_').replace('.', '__')}": str(value)
        for name, value in _flat(FAULT_TOLERANCE).items()
    }
    return {SAFE_PATH: "1"} | variables | profile.environment


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to full names, such as ``distributed.comm.retry.count``."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def walltime(profile: Profile) -> float:
    """Return the seconds after which the batch system kills a job, by the profile or Dask's configuration."""
    if profile.walltime is not None:
        return profile.walltime
    return parse_duration(dask.config.get(f"jobqueue.{profile.kind}.walltime"))


def lifetime(profile: Profile) -> tuple[float, float]:
    """Compute the seconds after which a worker leaves by itself, and the largest deviation from that.

    By default the walltime leaves room for the start of the job, and for the grace of the worker that leaves
    last.

    Returns
    -------
    seconds, stagger : float

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
    seconds = profile.lifetime or latest - stagger
    reserve = f"a grace of {profile.grace:g} s, a stagger of {stagger:g} s and {STARTUP_S} s to start"
    if latest - stagger <= stagger:
        setting = "walltime" if profile.walltime else "walltime of Dask's configuration"
        # The stagger is reserved twice. By default it is 1/20 of the walltime, at most 300 s.
        minimum = profile.grace + STARTUP_S
        minimum = minimum + 2 * stagger if profile.lifetime_stagger else min(minimum / 0.9, minimum + 600)
        raise ClusterError(f"{setting}: expected more than {minimum:.0f} s, for {reserve}; found {limit:g} s")
    if not stagger < seconds <= latest - stagger:
        raise ClusterError(
            f"lifetime: expected more than {stagger:g} s and at most {latest - stagger:g} s, for {reserve} "
            f"within a walltime of {limit:g} s; found {seconds:g} s"
        )
    return seconds, stagger


def _hh_mm_ss(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour:02}:{minute:02}:{second:02}"
