"""Catalogs and workflows that ship with the package, by name, and YAML files in general.

In a checkout they are in the repository's ``catalogs/`` and ``workflows/``; a wheel carries them as
``pipeline/_shipped/catalogs`` and ``pipeline/_shipped/workflows``.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

Model = TypeVar("Model", bound=pydantic.BaseModel)


class ResourceError(LookupError):
    """A name that no shipped file has, or a path without a file; the message lists the shipped names."""


def shipped_folder(kind: str) -> Path:
    """Find the folder of the shipped files of ``kind`` ("catalogs" or "workflows")."""
    package = Path(__file__).resolve().parent
    candidates = [package / "_shipped" / kind, package.parent / kind]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise ResourceError(f"no shipped {kind}: looked in {' and '.join(map(str, candidates))}")


def shipped_names(kind: str) -> list[str]:
    """List the names of the shipped files of ``kind``, sorted."""
    return sorted(path.stem for path in shipped_folder(kind).glob("*.yaml"))


def find_resource(kind: str, name_or_path: str | os.PathLike[str]) -> Path:
    """Find the YAML file that a bare name (``demo``) or a path (``./mine.yaml``) means.

    Parameters
    ----------
    kind : str
        "catalogs" or "workflows".
    name_or_path : str or path
        A path when it ends in ``.yaml`` or ``.yml`` or contains a folder, else a name.

    Raises
    ------
    ResourceError
        When there is no such file; the message lists the names that there are.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise ResourceError(f"{path}: no such file")
        return path.resolve()
    names = shipped_names(kind)
    if path.name not in names:
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ResourceError(
            f"no {kind.removesuffix('s')} named {path.name!r}; {hint}known: {', '.join(names)}; "
            f"a file of your own is named by its path, as in ./{path.name}.yaml"
        )
    return shipped_folder(kind) / f"{path.name}.yaml"


def read_yaml(path: Path, error: type[ValueError]) -> Any:
    """Read a YAML file; raise ``error``, naming the file, where it isn't YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as cause:
        raise error(f"{path}: not YAML: {cause}") from cause


def validated(content: Any, model: type[Model], path: Path, error: type[ValueError]) -> Model:
    """Validate the content of a YAML file as ``model``; raise ``error`` naming file and wrong keys."""
    try:
        return model.model_validate(content)
    except pydantic.ValidationError as cause:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}" for fault in cause.errors()
        )
        raise error(f"{path}: {faults}") from cause
