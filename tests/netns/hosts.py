"""Three hosts of network namespaces, and what runs on them: for tests of what networks do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paced
from distributed import Security

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCHEDULER = "tls://10.99.0.10:8786"
ADDRESSES = {"h0": "10.99.0.10", "h1": "10.99.0.11", "h2": "10.99.0.12"}


def netns(*arguments: str) -> None:
    done = subprocess.run([HERE / "netns.sh", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"netns.sh {' '.join(arguments)}: {done.stderr}"


def why_no_hosts() -> str:
    """Why there can be no network namespaces here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the command ip is not here: apt-get install iproute2"
    netns("down")  # what a run that was killed has left
    tried = subprocess.run([HERE / "netns.sh", "up"], capture_output=True, text=True)
    netns("down")
    return f"hosts cannot be made here: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass
class Hosts:
    """The hosts h0 (scheduler, driver), h1 and h2, and what runs on them."""

    folder: Path
    environment: dict[str, str]
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, host: str, *command: object, log: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command on a host; all that it prints goes to a file of the folder."""
        with (self.folder / log).open("a") as output:
            process = subprocess.Popen(
                [HERE / "netns.sh", "run", host, *map(str, command)],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                cwd=self.folder,
                env=self.environment | environment,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def start_worker(self, host: str, **environment: str) -> subprocess.Popen[str]:
        """A worker with its nanny, by the shipped job script."""
        script = ROOT / "workflows" / "jobs" / "worker.sh"
        options = ["--host", ADDRESSES[host], "--nthreads", "1", "--memory-limit", "2GB", "--name", host]
        options += ["--local-directory", str(self.folder / f"scratch-{host}")]
        named = {paced.WHO: host, "PYTHON": sys.executable}
        return self.start(host, script, SCHEDULER, *options, log=f"worker-{host}.log", **named, **environment)

    def start_lsim(
        self, host: str, *arguments: object, log: str, **environment: str
    ) -> subprocess.Popen[str]:
        command = "from pipeline.cli import main; main()"
        return self.start(host, sys.executable, "-c", command, *arguments, log=log, **environment)

    def log(self, name: str) -> str:
        return (self.folder / name).read_text()

    def wait_until(self, what: str, condition: Callable[[], bool], seconds: float = 240) -> float:
        return paced.wait_until(what, condition, seconds, self.trouble)

    def trouble(self) -> str:
        """Logs, when something that was started has ended with an error; empty as long as nothing has."""
        if any(process.poll() for process in self.processes):
            return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in self.folder.glob("*.log"))
        return ""


class Membership:
    """Which workers the scheduler has, as a client on h0 sees it."""

    def __init__(self, hosts: Hosts) -> None:
        watch = [HERE / "netns.sh", "run", "h0", sys.executable, HERE / "watch.py", SCHEDULER]
        self.process = subprocess.Popen(
            [*map(str, watch)],
            stdout=subprocess.PIPE,
            stderr=(hosts.folder / "watch.log").open("w"),
            text=True,
            env=hosts.environment,
            start_new_session=True,
        )
        hosts.processes.append(self.process)
        self.changes: list[dict[str, Any]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.changes.append(json.loads(line))

    @property
    def names(self) -> list[str]:
        """Names of the workers of now."""
        return self.changes[-1]["workers"] if self.changes else []


def write_credentials(folder: Path) -> dict[str, str]:
    parts = Security.temporary().get_tls_config_for_role("scheduler")
    environment = {
        "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "True",
        "DASK_DISTRIBUTED__COMM__DEFAULT_SCHEME": "tls",
    }
    for part in ("ca_file", "cert", "key"):
        path = folder / f"{part}.pem"
        path.touch(mode=0o600)
        path.write_text(parts[part])
        for role in ("scheduler", "worker", "client"):
            name = "CA_FILE" if part == "ca_file" else f"{role}__{part}".upper()
            environment[f"DASK_DISTRIBUTED__COMM__TLS__{name}"] = str(path)
    return environment
