"""Files shipped with the package: catalogs and workflows, found by name.

In a checkout they lie in the repository's ``catalogs/`` and ``workflows/``; a wheel carries them as
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
    """A name that no shipped file has, or a path where there is no file; the message names those known."""


def shipped_folder(kind: str) -> Path:
    """The folder that holds the shipped files of ``kind`` ("catalogs" or "workflows")."""
    package = Path(__file__).resolve().parent
    candidates = [package / "_shipped" / kind, package.parent / kind]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise ResourceError(f"no shipped {kind}: looked in {' and '.join(map(str, candidates))}")


def shipped_names(kind: str) -> list[str]:
    """Names of the shipped files of ``kind``, sorted."""
    return sorted(path.stem for path in shipped_folder(kind).glob("*.yaml"))


def find_resource(kind: str, name_or_path: str | os.PathLike[str]) -> Path:
    """The YAML file that a bare name (``demo``) or a path (``./mine.yaml``) means.

    Parameters
    ----------
    kind : str
        "catalogs" or "workflows".
    name_or_path : str or path
        Taken as a path when it ends in ``.yaml`` or ``.yml`` or has a folder in it, else as a name.

    Raises
    ------
    ResourceError
        When there is no such file; an unknown name lists the known ones.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise ResourceError(f"{path}: no such file")
        return path.resolve()
    known = shipped_names(kind)
    if path.name not in known:
        near = difflib.get_close_matches(path.name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ResourceError(
            f"no {kind.removesuffix('s')} named {path.name!r}; {hint}known: {', '.join(known)}; "
            f"a file of your own is named by its path, as in ./{path.name}.yaml"
        )
    return shipped_folder(kind) / f"{path.name}.yaml"


def read_yaml(path: Path, error: type[ValueError]) -> Any:
    """The content of a YAML file; raises ``error``, naming the file, where it isn't YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as cause:
        raise error(f"{path}: not YAML: {cause}") from cause


def validated(content: Any, model: type[Model], path: Path, error: type[ValueError]) -> Model:
    """What a YAML file holds, as ``model``; raises ``error``, naming the file and each key that is wrong."""
    try:
        return model.model_validate(content)
    except pydantic.ValidationError as cause:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}" for fault in cause.errors()
        )
        raise error(f"{path}: {faults}") from cause
