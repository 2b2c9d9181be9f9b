"""Find, download, verify and read the weights of learned metrics.

Weights are searched in this order: an explicit path, the folders or files in ``$LSIM_WEIGHTS``, the user
cache, files shipped with the package. Nothing is loaded before its SHA-256 was checked where one is
known, and nothing is unpickled but tensors (``weights_only=True``).

Files of the authors are pickles (``.pth``). Ours are safetensors: the tensors
``trunk.<layer>.<weight|bias>``, ``channel_weights.<k>`` and ``deviation_squares.<k>``, and as metadata
``format`` ("lsim"), ``format_version``, ``trunk`` (a name in :data:`lsim.networks.TRUNKS`), ``counts``, and
what training says of where they come from.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lsim.networks import TRUNKS, Trunk

AUTHORS_REPOSITORY = "https://github.com/tum-pbs/LSIM/raw/a89a1d4"
"""The authors' repository at a pinned commit; MIT licence."""


class WeightsError(RuntimeError):
    """Weights that are absent, damaged, or not those of the network they are meant for."""


class MissingWeightsError(WeightsError):
    """Weights that are nowhere to be found; the message says where was searched and how to get them."""


@dataclass(frozen=True)
class Published:
    """A file of weights that somebody published: where it is and what it must hash to."""

    file: str
    url: str
    sha256: str
    licence: str


PUBLISHED: dict[str, Published] = {
    "lsim": Published(
        "LSiM.pth",
        f"{AUTHORS_REPOSITORY}/Models/LSiM.pth",
        "6f9d3934e9a14222c25bcd58cb81e79e8c1e2bde5e2968ab04612d9b08057634",
        "MIT",
    ),
    "lsim-noiseless": Published(
        "Lsim_DataNoiseless.pth",
        f"{AUTHORS_REPOSITORY}/Models/Experimental/Lsim_DataNoiseless.pth",
        "6230c5dd7f3f6ff68f2bd4a250b768b18357de145e2f573634e6f144f3c848f3",
        "MIT",
    ),
    "lsim-strong-noise": Published(
        "Lsim_DataStrongNoise.pth",
        f"{AUTHORS_REPOSITORY}/Models/Experimental/Lsim_DataStrongNoise.pth",
        "6e8549e4b8765941e9cf5fd34eb43b7d3061a950e4e1a06f3e1ca6f5e4d0b26c",
        "MIT",
    ),
    "lsim-skip": Published(
        "SkipConnections.pth",
        f"{AUTHORS_REPOSITORY}/Models/Experimental/SkipConnections.pth",
        "48093eb39957f581125bdaedfea662e531edeca5440ed975ae41f76da25087a4",
        "MIT",
    ),
}


SHIPPED: dict[str, Published] = {
    "lsim-open": Published(
        "lsim-open.safetensors",
        "",
        "5cbcac8f0b6b15cfca0e4175ac8582ee89bc78d13dc68bf77860dae77210530b",
        "MIT",
    ),
    "lsim-untrained": Published(
        "lsim-untrained.safetensors",
        "",
        "8c2eee89a147b76d9a97482a028fd3bbc3f2444e2c65187845506a384550d69f",
        "MIT",
    ),
}
"""Weights that come with the package, so without ``url``; ``lsim-untrained`` is what training began from."""

FORMAT, FORMAT_VERSION = "lsim", "1"


@dataclass(frozen=True)
class Checkpoint:
    """The content of a weights file, translated to the names of :mod:`lsim.networks`.

    Attributes
    ----------
    trunk : mapping of str to Tensor
        State of the trunk module.
    channel_weights : list of Tensor (channel,)
        One per feature map; slightly negative ones are meant to be clamped.
    deviation_squares : list of Tensor (y, x)
        Sum of squared deviations per pixel of each feature map over the training data.
    counts : list of int
        How many frames these are the sums of.
    sha256 : str
        Hash of the file.
    """

    trunk: Mapping[str, Tensor]
    channel_weights: list[Tensor]
    deviation_squares: list[Tensor]
    counts: list[int]
    sha256: str


def cache_folder() -> Path:
    """Where fetched weights are kept."""
    import pooch

    return Path(pooch.os_cache("lsim")) / "weights"


def find_weights(name: str, weights: str | os.PathLike[str] | None = None) -> Path:
    """The file with a metric's weights.

    Parameters
    ----------
    name : str
        The metric's name.
    weights : path or str, optional
        A path to a file, there or in one of the folders searched, or the name of published weights; None
        takes those of the metric.

    Raises
    ------
    WeightsError
        When there is no such file; :class:`MissingWeightsError` where the search found none.
    """
    known = PUBLISHED | SHIPPED
    folders = search_folders()
    if weights is not None and str(weights) not in known:
        path = Path(weights).expanduser()
        found = path if path.is_file() else None
        if found is None and not path.is_absolute():
            found = next((folder / path for folder in folders if (folder / path).is_file()), None)
        if found is None:
            raise WeightsError(
                f"no weights at {path}: expected a file, there or in {', '.join(map(str, folders))}, "
                f"or one of the names {', '.join(known)}"
            )
        return found
    wanted = str(weights) if weights is not None else name
    if wanted not in known:
        raise WeightsError(f"metric {name!r} has no published weights; pass weights=PATH")
    file = known[wanted].file
    for folder in folders:
        candidate = folder if folder.name == file else folder / file
        if candidate.is_file():
            return candidate
    searched = f"no weights for {wanted!r}: searched {file} in {', '.join(map(str, folders))}"
    if wanted in SHIPPED:
        raise MissingWeightsError(f"{searched}. They come with the package: install it again")
    raise MissingWeightsError(
        f"{searched}. Get them with 'lsim weights fetch {wanted}', or set LSIM_WEIGHTS to their folder"
    )


def why_missing(name: str, weights: str | os.PathLike[str] | None = None) -> str:
    """Empty when a metric's weights are here and whole, else the reason with the command that gets them."""
    try:
        verified_bytes(find_weights(name, weights))
    except MissingWeightsError as error:
        wanted = str(weights or name)
        if wanted in SHIPPED:
            return str(error)
        return f"its weights are not here; get them with 'lsim weights fetch {wanted}'"
    except WeightsError as error:
        return str(error)
    return ""


def search_folders() -> list[Path]:
    """Where weights are looked for, in order: ``$LSIM_WEIGHTS``, the user cache, the package."""
    named = [Path(p).expanduser() for p in os.environ.get("LSIM_WEIGHTS", "").split(os.pathsep) if p]
    return [*named, cache_folder(), Path(__file__).parent / "shipped_weights"]


def verified_bytes(path: Path) -> tuple[bytes, str]:
    """Read a file and its SHA-256, and check it where a file of this name was published.

    Raises
    ------
    WeightsError
        When the file is named as published weights are, but is not those.
    """
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    for published in (PUBLISHED | SHIPPED).values():
        if published.file == path.name and published.sha256 != found:
            raise WeightsError(
                f"{path}: SHA-256 is {found}, expected {published.sha256} of the published {published.file} "
                f"({len(content)} bytes found). Damaged, or another file: fetch it again, or rename your own"
            )
    return content, found


def save_checkpoint(
    path: str | os.PathLike[str], checkpoint: Checkpoint, trunk: str, metadata: Mapping[str, str]
) -> str:
    """Write weights as safetensors.

    Parameters
    ----------
    path : path
        Of the file; replaced whole when it is there.
    checkpoint : Checkpoint
        Its ``sha256`` is not looked at.
    trunk : str
        Name of the network: one in :data:`lsim.networks.TRUNKS`, or "non-siamese".
    metadata : mapping of str to str
        What else to say of them, such as how they were made.

    Returns
    -------
    str
        SHA-256 of the file.
    """
    tensors = {f"trunk.{name}": value for name, value in checkpoint.trunk.items()}
    tensors |= {f"channel_weights.{k}": value for k, value in enumerate(checkpoint.channel_weights)}
    tensors |= {f"deviation_squares.{k}": value for k, value in enumerate(checkpoint.deviation_squares)}
    said = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "trunk": trunk,
        "counts": json.dumps(checkpoint.counts),
    }
    content = safetensors.torch.save(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, dict(metadata) | said
    )
    partial = Path(f"{os.fspath(path)}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
    return hashlib.sha256(content).hexdigest()


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a safetensors file of ours says of itself; its ``trunk`` names the network.

    Raises
    ------
    WeightsError
        When it isn't such a file.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path}: not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT or metadata.get("format_version") != FORMAT_VERSION:
        found = metadata.get("format"), metadata.get("format_version")
        raise WeightsError(f"{path}: expected weights of format {FORMAT} {FORMAT_VERSION}, found {found}")
    if missing := {"trunk", "counts"} - metadata.keys():
        raise WeightsError(f"{path}: its metadata lacks {', '.join(sorted(missing))}")
    return metadata


def load_checkpoint(path: Path, trunk_class: type[Trunk]) -> Checkpoint:
    """Read weights: a file of ours (``.safetensors``), else a checkpoint of the authors' code.

    The latter has the keys ``stateDict``, ``normM2`` and ``normCount``.

    Raises
    ------
    WeightsError
        When hash, keys or shapes are not those expected; names file, expected and found.
    """
    content, sha256 = verified_bytes(path)
    if path.suffix == ".safetensors":
        return _load_safetensors(path, content, sha256, trunk_class)
    try:
        raw: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:  # whatever a file that is no checkpoint makes of the unpickler
        # torch's own message goes on to advise reading the file unsafely.
        reason = str(error).partition(". ")[0] or type(error).__name__
        raise WeightsError(
            f"{path}: not a checkpoint of tensors that torch can read safely: {reason}"
        ) from error
    wanted_keys = {"stateDict", "normM2", "normCount"}
    if not isinstance(raw, dict) or not wanted_keys <= raw.keys():
        found_keys = sorted(map(str, raw)) if isinstance(raw, dict) else type(raw).__name__
        raise WeightsError(f"{path}: expected the keys {sorted(wanted_keys)}, found {found_keys}")

    containers = {"stateDict": Mapping, "normM2": Sequence, "normCount": Sequence}
    for key, container in containers.items():
        if not isinstance(raw[key], container):
            raise WeightsError(
                f"{path}: expected {key} to be a {container.__name__}, found {type(raw[key]).__name__}"
            )
    state = raw["stateDict"]
    with torch.device("meta"):
        expected = trunk_class().state_dict()
    trunk = {}
    for layer, key in trunk_class.CHECKPOINT_KEYS.items():
        for kind in ("weight", "bias"):
            name = f"{key}.{kind}"
            trunk[f"{layer}.{kind}"] = _checked(state, name, tuple(expected[f"{layer}.{kind}"].shape), path)
    channel_weights = [
        _checked(state, f"lin{k}.1.weight", (1, channels, 1, 1), path).reshape(-1)
        for k, channels in enumerate(trunk_class.CHANNELS)
    ]
    maps = len(trunk_class.CHANNELS)
    if len(raw["normM2"]) != maps or len(raw["normCount"]) != maps:
        raise WeightsError(
            f"{path}: normM2 and normCount have {len(raw['normM2'])} and {len(raw['normCount'])} entries; "
            f"expected {maps}, one per feature map of {trunk_class.__name__}"
        )
    squares, counts = _checked_maps(path, raw["normM2"], raw["normCount"])
    return Checkpoint(trunk, channel_weights, squares, counts, sha256)


def _load_safetensors(path: Path, content: bytes, sha256: str, trunk_class: type[Trunk]) -> Checkpoint:
    metadata = read_metadata(path)
    if TRUNKS.get(metadata["trunk"]) is not trunk_class:
        raise WeightsError(
            f"{path}: weights of the trunk {metadata['trunk']!r}, expected those of {trunk_class.__name__}"
        )
    tensors = safetensors.torch.load(content)
    with torch.device("meta"):
        expected = trunk_class().state_dict()
    trunk = {
        name: _checked(tensors, f"trunk.{name}", tuple(value.shape), path) for name, value in expected.items()
    }
    channel_weights = [
        _checked(tensors, f"channel_weights.{k}", (channels,), path)
        for k, channels in enumerate(trunk_class.CHANNELS)
    ]
    maps = [tensors.get(f"deviation_squares.{k}") for k in range(len(channel_weights))]
    squares, counts = _checked_maps(path, maps, json.loads(metadata["counts"]))
    return Checkpoint(trunk, channel_weights, squares, counts, sha256)


def _checked_maps(
    path: Path, squares: Sequence[Any], counts: Sequence[Any]
) -> tuple[list[Tensor], list[int]]:
    """Deviation maps and how many frames they are of, checked."""
    if any(not isinstance(m2, Tensor) or m2.ndim != 2 for m2 in squares):
        shapes = [tuple(getattr(m2, "shape", ())) for m2 in squares]
        raise WeightsError(f"{path}: maps of squared deviations have shapes {shapes}; expected (y, x)")
    checked = [m2.float() for m2 in squares]
    usable = [count for count in counts if isinstance(count, int) and count > 1]
    if len(usable) != len(squares) or not all(bool((m2 >= 0).all()) for m2 in checked):
        raise WeightsError(
            f"{path}: expected counts above 1 and sums of squares, found counts {list(counts)} and squares "
            f"from {[float(m2.min()) for m2 in checked]}"
        )
    return checked, usable


def fetch_weights(name: str, folder: Path | None = None) -> Path:
    """Download published weights into the user cache (or ``folder``) and check their SHA-256.

    Raises
    ------
    WeightsError
        For an unknown name, when the publisher cannot be reached, or on a wrong hash.
    """
    if name not in PUBLISHED:
        raise WeightsError(f"no published weights named {name!r}; there are {', '.join(PUBLISHED)}")
    import pooch

    published = PUBLISHED[name]
    try:
        path = pooch.retrieve(
            published.url,
            known_hash=f"sha256:{published.sha256}",
            fname=published.file,
            path=folder or cache_folder(),
        )
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"could not fetch {published.file} from {published.url}: {error}. Download it by other means and "
            f"put it into {folder or cache_folder()}, or set LSIM_WEIGHTS to its folder"
        ) from error
    return Path(path)


@dataclass(frozen=True)
class WeightsStatus:
    """Whether one set of published weights is here and whole.

    ``state`` is ``"ok"``, ``"absent"`` or ``"damaged"``; ``detail`` says where, or what is wrong.
    """

    name: str
    state: str
    detail: str


def weights_status() -> list[WeightsStatus]:
    """State of all shipped and published weights, checking the hash of those that are found."""
    found = []
    for name in SHIPPED | PUBLISHED:
        try:
            path = find_weights(name)
        except MissingWeightsError:
            how = "comes with the package" if name in SHIPPED else f"lsim weights fetch {name}"
            found.append(WeightsStatus(name, "absent", how))
            continue
        try:
            verified_bytes(path)
        except WeightsError as error:
            found.append(WeightsStatus(name, "damaged", str(error)))
        else:
            found.append(WeightsStatus(name, "ok", str(path)))
    return found


def _checked(state: Mapping[str, Tensor], name: str, shape: tuple[int, ...], path: Path) -> Tensor:
    if not isinstance(state.get(name), Tensor):
        raise WeightsError(f"{path}: no tensor {name!r}; found {', '.join(sorted(map(str, state)))}")
    if tuple(state[name].shape) != shape:
        raise WeightsError(f"{path}: tensor {name!r} has shape {tuple(state[name].shape)}, expected {shape}")
    return state[name].float()
