"""How to get workers: profiles of clusters, read from YAML and checked before anything starts."""

from __future__ import annotations

from typing import Literal

import pydantic
import yaml

from pipeline.resources import ResourceError, find_resource


class ClusterError(RuntimeError):
    """A profile that cannot be read, or a cluster that cannot be reached."""


class Profile(pydantic.BaseModel):
    """How to get workers. Unknown keys are errors.

    Attributes
    ----------
    kind : {"local", "none", "address"}
        Worker processes on this machine; the calling process alone; a scheduler that runs already.
    workers : int, optional
        Worker processes of ``local``; default one per core.
    threads : int
        Threads per worker. More than one share the worker's metrics.
    memory_limit : str
        Per worker, as Dask takes it.
    device : str
        ``"auto"``: the worker's GPU when it has one, workers taking turns where there are several.
    address : str, optional
        Of the scheduler, ``tls://…`` or ``tcp://…``.
    host : str
        Where a local scheduler and its workers listen; loopback unless told otherwise.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    kind: Literal["local", "none", "address"] = "local"
    workers: int | None = pydantic.Field(default=None, ge=1)
    threads: int = pydantic.Field(default=1, ge=1)
    memory_limit: str = "auto"
    device: str = "auto"
    address: str | None = None
    host: str = "127.0.0.1"

    @pydantic.model_validator(mode="after")
    def _address_where_needed(self) -> Profile:
        if (self.kind == "address") != (self.address is not None):
            raise ValueError("kind 'address' and the key 'address' need each other")
        return self


def load_profile(name: str, workers: int | None = None) -> Profile:
    """A profile by name (``local``, ``none``), path of a YAML file, or address of a scheduler.

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
    if profile.kind != "local":
        raise ClusterError(f"--workers is for clusters of kind local; {name!r} is of kind {profile.kind}")
    if workers < 1:
        raise ClusterError(f"expected at least one worker, got {workers}")
    return profile.model_copy(update={"workers": workers})


def _read_profile(name: str) -> Profile:
    try:
        content = yaml.safe_load(find_resource("workflows/clusters", name).read_text()) or {}
        return Profile(**content)
    except (ResourceError, TypeError, yaml.YAMLError, pydantic.ValidationError) as error:
        raise ClusterError(f"cluster profile {name!r}: {error}") from error
