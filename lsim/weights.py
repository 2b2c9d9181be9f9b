"""Find, download, verify and read the weights of learned metrics.

Weights are searched in this order: an explicit path, the folders or files in ``$LSIM_WEIGHTS``, the user
cache, files shipped with the package. A file with a published SHA-256 is checked against it before it is
loaded, and only tensors are unpickled (``weights_only=True``).

The authors' files are pickles (``.pth``). LPIPS needs two: its head, and the convolutions of an image
network, which come from another publisher or from the user. Files of this package are safetensors with the
tensors ``trunk.<layer>.<weight|bias>``, ``channel_weights.<k>`` and ``deviation_squares.<k>``. Their metadata
are ``format`` ("lsim"), ``format_version``, ``trunk`` (a name in :data:`lsim.networks.TRUNKS`), ``counts``,
and the origin as training records it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lsim.networks import TRUNKS, ImageTrunk, Trunk

AUTHORS_REPOSITORY = "https://github.com/tum-pbs/LSIM/raw/a89a1d4"
"""The authors' repository at a pinned commit; MIT licence."""

LPIPS_HEADS = (
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/"
    "082bb24f84c091ea94de2867d34c4544f68e0963/lpips/weights/v0.1"
)
"""LPIPS' linear heads, version 0.1, at a pinned commit; BSD-2-Clause licence."""

TORCHVISION = "https://download.pytorch.org/models"
"""Torchvision's image networks, whose file names contain their hash; BSD-3-Clause licence."""


class WeightsError(RuntimeError):
    """Weights that are absent, damaged, or of another network."""


class MissingWeightsError(WeightsError):
    """Weights that no folder holds; the message lists the folders searched and how to get them."""


@dataclass(frozen=True)
class Published:
    """A file of published weights: its address, expected hash, licence, and size in MB."""

    file: str
    url: str
    sha256: str
    licence: str
    megabytes: float


PUBLISHED: dict[str, Published] = {
    "lsim": Published(
        "LSiM.pth",
        f"{AUTHORS_REPOSITORY}/Models/LSiM.pth",
        "6f9d3934e9a14222c25bcd58cb81e79e8c1e2bde5e2968ab04612d9b08057634",
        "MIT",
        2.5,
    ),
    "lsim-noiseless": Published(
        "Lsim_DataNoiseless.pth",
        f"{AUTHORS_REPOSITORY}/Models/Experimental/Lsim_DataNoiseless.pth",
        "6230c5dd7f3f6ff68f2bd4a250b768b18357de145e2f573634e6f144f3c848f3",
        "MIT",
        2.5,
    ),
    "lsim-strong-noise": Published(
        "Lsim_DataStrongNoise.pth",
        f"{AUTHORS_REPOSITORY}/Models/Experimental/Lsim_DataStrongNoise.pth",
        "6e8549e4b8765941e9cf5fd34eb43b7d3061a950e4e1a06f3e1ca6f5e4d0b26c",
        "MIT",
        2.5,
    ),
    "lsim-skip": Published(
        "SkipConnections.pth",
        f"{AUTHORS_REPOSITORY}/Models/Experimental/SkipConnections.pth",
        "48093eb39957f581125bdaedfea662e531edeca5440ed975ae41f76da25087a4",
        "MIT",
        2.5,
    ),
    "lpips-alex": Published(
        "alex.pth",
        f"{LPIPS_HEADS}/alex.pth",
        "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
        "BSD-2-Clause",
        0.01,
    ),
    "alexnet": Published(
        "alexnet-owt-7be5be79.pth",
        f"{TORCHVISION}/alexnet-owt-7be5be79.pth",
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        "BSD-3-Clause",
        244,
    ),
    "lpips-vgg": Published(
        "vgg.pth",
        f"{LPIPS_HEADS}/vgg.pth",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        "BSD-2-Clause",
        0.01,
    ),
    "vgg16": Published(
        "vgg16-397923af.pth",
        f"{TORCHVISION}/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        "BSD-3-Clause",
        553,
    ),
    "lpips-squeeze": Published(
        "squeeze.pth",
        f"{LPIPS_HEADS}/squeeze.pth",
        "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76",
        "BSD-2-Clause",
        0.01,
    ),
    "squeezenet1_1": Published(
        "squeezenet1_1-b8a52dc0.pth",
        f"{TORCHVISION}/squeezenet1_1-b8a52dc0.pth",
        "b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
        "BSD-3-Clause",
        5,
    ),
}
"""Published weights by name, one file each; metrics in :data:`BACKBONES` need a second."""

BACKBONES: dict[str, str] = {
    "lpips-alex": "alexnet",
    "lpips-vgg": "vgg16",
    "lpips-squeeze": "squeezenet1_1",
}
"""Published head to the published network that it belongs to: a metric needs both."""

SHIPPED: dict[str, Published] = {
    "lsim-open": Published(
        "lsim-open.safetensors",
        "",
        "5cbcac8f0b6b15cfca0e4175ac8582ee89bc78d13dc68bf77860dae77210530b",
        "MIT",
        2.5,
    ),
    "lsim-untrained": Published(
        "lsim-untrained.safetensors",
        "",
        "8c2eee89a147b76d9a97482a028fd3bbc3f2444e2c65187845506a384550d69f",
        "MIT",
        2.5,
    ),
}
"""Weights that ship with the package, hence without ``url``; ``lsim-untrained`` are the initial weights."""

FORMAT, FORMAT_VERSION = "lsim", "1"


@dataclass(frozen=True)
class Checkpoint:
    """The content of a weights file, translated to the names of :mod:`lsim.networks`.

    Attributes
    ----------
    trunk : mapping of str to Tensor
        State of the trunk module.
    channel_weights : list of Tensor (channel,)
        One per feature map; slightly negative values are to be clamped to 0.
    deviation_squares : list of Tensor (y, x)
        Sum of squared deviations per pixel of each feature map over the training data.
    counts : list of int
        Number of frames behind each sum.
    sha256 : str
        Hash of the file.
    """

    trunk: Mapping[str, Tensor]
    channel_weights: list[Tensor]
    deviation_squares: list[Tensor]
    counts: list[int]
    sha256: str


def cache_folder() -> Path:
    """Return the folder for downloaded weights."""
    import pooch

    return Path(pooch.os_cache("lsim")) / "weights"


def find_weights(name: str, weights: str | os.PathLike[str] | None = None) -> Path:
    """Find the file with a metric's weights.

    Parameters
    ----------
    name : str
        The metric's name.
    weights : path or str, optional
        A path, also relative to one of the folders searched, or the name of published weights; None takes
        the metric's own.

    Returns
    -------
    Path

    Raises
    ------
    WeightsError
        When there is no such file; :class:`MissingWeightsError` where the search found none.
    """
    catalogue = PUBLISHED | SHIPPED
    folders = search_folders()
    if weights is not None and str(weights) not in catalogue:
        path = Path(weights).expanduser()
        # An absolute path stays what it is when joined to a folder.
        for candidate in (path, *(folder / path for folder in folders)):
            if candidate.is_file():
                return candidate
        raise WeightsError(
            f"no weights at {path}: expected a file, there or in {', '.join(map(str, folders))}, "
            f"or one of the names {', '.join(catalogue)}"
        )
    published_name = str(weights) if weights is not None else name
    if published_name not in catalogue:
        raise WeightsError(
            f"there are no published weights of {name!r}: train them with 'lsim train', then pass "
            f"weights=FILE, or --weights {name}=FILE"
        )
    file = catalogue[published_name].file
    for folder in folders:
        candidate = folder if folder.name == file else folder / file
        if candidate.is_file():
            return candidate
    searched = f"no weights for {published_name!r}: searched {file} in {', '.join(map(str, folders))}"
    if published_name in SHIPPED:
        raise MissingWeightsError(f"{searched}. They come with the package: install it again")
    raise MissingWeightsError(
        f"{searched}. Get them with {_how_to_fetch(published_name)}, or set LSIM_WEIGHTS to their folder"
    )


def find_head_and_backbone(name: str, weights: str | os.PathLike[str] | None = None) -> tuple[Path, Path]:
    """Find the two files of a metric that has a head on a published network.

    Parameters
    ----------
    name : str
        One of :data:`BACKBONES`.
    weights : path or str, optional
        Weights of the network, as for :func:`find_weights`; None takes the published ones. The head is
        searched as usual, and then beside the network.

    Returns
    -------
    head, backbone : Path

    Raises
    ------
    WeightsError
        When there is no such file; :class:`MissingWeightsError` where the search found none.
    """
    backbone = find_weights(BACKBONES[name], weights)
    try:
        return find_weights(name), backbone
    except MissingWeightsError:
        beside = backbone.parent / PUBLISHED[name].file
        if not beside.is_file():
            raise
        return beside, backbone


def _files_of(name: str) -> list[str]:
    """List the published weights that a metric of this name needs."""
    return [name, BACKBONES[name]] if name in BACKBONES else [name]


def _how_to_fetch(name: str) -> str:
    """Return the command that downloads published weights with all files they need, and their size."""
    metric = next((head for head, backbone in BACKBONES.items() if backbone == name), name)
    megabytes = sum(PUBLISHED[file].megabytes for file in _files_of(metric))
    return f"'lsim weights fetch {metric}' ({round(megabytes, 1):g} MB)"


def why_missing(name: str, weights: str | os.PathLike[str] | None = None) -> str:
    """Explain why a metric's weights are unusable, with the remedy; empty if they are fine."""
    try:
        if name in BACKBONES:
            for path in find_head_and_backbone(name, weights):
                verified_sha256(path, perceptual=True)
        else:
            verified_sha256(find_weights(name, weights))
    except MissingWeightsError as error:
        published_name = str(weights) if str(weights) in PUBLISHED | SHIPPED else name
        if published_name in SHIPPED:
            return str(error)
        return f"its weights are not here; get them with {_how_to_fetch(published_name)}"
    except WeightsError as error:
        return str(error)
    return ""


def search_folders() -> list[Path]:
    """List the folders searched for weights, in order: ``$LSIM_WEIGHTS``, the user cache, the package."""
    folders = [Path(p).expanduser() for p in os.environ.get("LSIM_WEIGHTS", "").split(os.pathsep) if p]
    return [*folders, cache_folder(), Path(__file__).parent / "shipped_weights"]


def verified_bytes(path: Path) -> tuple[bytes, str]:
    """Read a file, and check its SHA-256 if a file of this name was published.

    Returns
    -------
    content : bytes
    sha256 : str

    Raises
    ------
    WeightsError
        When the file has the name of published weights but another hash.
    """
    content = path.read_bytes()
    return content, _checked_sha256(path, io.BytesIO(content), perceptual=False)


def verified_sha256(path: Path, *, perceptual: bool = False) -> str:
    """Return the SHA-256 of a file, checked as by :func:`verified_bytes` but without reading it whole.

    LPIPS' heads have common names such as ``alex.pth``: files of these names are checked only with
    ``perceptual``, that is, where they are loaded for LPIPS.
    """
    with path.open("rb") as file:
        return _checked_sha256(path, file, perceptual)


def _checked_sha256(path: Path, file: BinaryIO, perceptual: bool) -> str:
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    for name, published in (PUBLISHED | SHIPPED).items():
        if name in BACKBONES and not perceptual:
            continue
        if published.file == path.name and published.sha256 != sha256:
            raise WeightsError(
                f"{path}: SHA-256 is {sha256}, expected {published.sha256} of the published {published.file} "
                f"(found {path.stat().st_size} bytes). It is damaged or another file: fetch it again, or "
                "rename your own"
            )
    return sha256


def save_checkpoint(
    path: str | os.PathLike[str], checkpoint: Checkpoint, trunk: str, metadata: Mapping[str, str]
) -> str:
    """Write weights as safetensors.

    Parameters
    ----------
    path : path
        File to write; an existing one is replaced whole.
    checkpoint : Checkpoint
        Its ``sha256`` is ignored.
    trunk : str
        Name of the network: one in :data:`lsim.networks.TRUNKS`, or "non-siamese".
    metadata : mapping of str to str
        Additions to the metadata, such as the origin of the weights.

    Returns
    -------
    str
        SHA-256 of the file.
    """
    tensors = {f"trunk.{name}": value for name, value in checkpoint.trunk.items()}
    tensors |= {f"channel_weights.{k}": value for k, value in enumerate(checkpoint.channel_weights)}
    tensors |= {f"deviation_squares.{k}": value for k, value in enumerate(checkpoint.deviation_squares)}
    required = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "trunk": trunk,
        "counts": json.dumps(checkpoint.counts),
    }
    content = safetensors.torch.save(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
        dict(metadata) | required,
    )
    partial = Path(f"{os.fspath(path)}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
    return hashlib.sha256(content).hexdigest()


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata of weights that this package wrote; ``trunk`` names the network.

    Raises
    ------
    WeightsError
        When the file is of another format, or its metadata is incomplete.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path}: not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT or metadata.get("format_version") != FORMAT_VERSION:
        stored = metadata.get("format"), metadata.get("format_version")
        raise WeightsError(f"{path}: expected weights of format {FORMAT} {FORMAT_VERSION}, found {stored}")
    missing = {"trunk", "counts"} - metadata.keys()
    if missing:
        raise WeightsError(f"{path}: its metadata lacks {', '.join(sorted(missing))}")
    return metadata


def load_checkpoint(path: Path, trunk_class: type[Trunk]) -> Checkpoint:
    """Read weights that this package wrote (``.safetensors``), or a checkpoint of the authors' code.

    The latter has the keys ``stateDict``, ``normM2`` and ``normCount``.

    Raises
    ------
    WeightsError
        When hash, keys or shapes are not the expected ones.
    """
    content, sha256 = verified_bytes(path)
    if path.suffix == ".safetensors":
        return _load_safetensors(path, content, sha256, trunk_class)
    raw = _unpickled(path, io.BytesIO(content))
    containers = {"stateDict": Mapping, "normM2": Sequence, "normCount": Sequence}
    if not isinstance(raw, dict) or not containers.keys() <= raw.keys():
        keys = sorted(map(str, raw)) if isinstance(raw, dict) else type(raw).__name__
        raise WeightsError(f"{path}: expected the keys {sorted(containers)}, found {keys}")
    for key, container in containers.items():
        if not isinstance(raw[key], container):
            raise WeightsError(
                f"{path}: expected {key} to be a {container.__name__}, found {type(raw[key]).__name__}"
            )
    state = raw["stateDict"]
    with torch.device("meta"):
        model_state = trunk_class().state_dict()
    trunk = {}
    for layer, key in trunk_class.CHECKPOINT_KEYS.items():
        for kind in ("weight", "bias"):
            name = f"{key}.{kind}"
            trunk[f"{layer}.{kind}"] = _checked_tensor(
                state, name, tuple(model_state[f"{layer}.{kind}"].shape), path
            )
    channel_weights = [
        _checked_tensor(state, f"lin{k}.1.weight", (1, channels, 1, 1), path).reshape(-1)
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


@dataclass(frozen=True)
class PerceptualWeights:
    """Weights of LPIPS: a head and the trunk that it belongs to.

    Attributes
    ----------
    trunk : mapping of str to Tensor
        State of the trunk module.
    channel_weights : list of Tensor (channel,)
        One per feature map, none negative.
    sha256 : dict of str to str
        Hashes of the files, by ``"head"`` and ``"backbone"``.
    """

    trunk: Mapping[str, Tensor]
    channel_weights: list[Tensor]
    sha256: dict[str, str]


def load_perceptual(head: Path, backbone: Path, trunk_class: type[ImageTrunk]) -> PerceptualWeights:
    """Read a head of LPIPS and the convolutions of the network that it belongs to.

    Parameters
    ----------
    head : path
        File with the tensors ``lin<k>.model.1.weight`` (1, channel, 1, 1), as LPIPS' authors publish it.
    backbone : path
        State dict with torchvision's names (``features.<k>.weight``), as safetensors or saved by torch.
    trunk_class : type

    Raises
    ------
    WeightsError
        When hash, keys or shapes are not the expected ones.
    """
    state, head_sha256 = _read_state(head)
    channel_weights = [
        _checked_tensor(state, f"lin{k}.model.1.weight", (1, channels, 1, 1), head).reshape(-1)
        for k, channels in enumerate(trunk_class.CHANNELS)
    ]
    lowest = min(weights.min().item() for weights in channel_weights)
    if lowest < 0:
        raise WeightsError(
            f"{head}: negative channel weights, down to {lowest:.3g}, would make distances negative; "
            "LPIPS' heads of version 0.1 have none"
        )
    state, backbone_sha256 = _read_state(backbone)
    with torch.device("meta"):
        model_state = trunk_class().state_dict()
    trunk = {
        f"{layer}.{kind}": _checked_tensor(
            state, f"{key}.{kind}", tuple(model_state[f"{layer}.{kind}"].shape), backbone
        )
        for layer, key in trunk_class.CHECKPOINT_KEYS.items()
        for kind in ("weight", "bias")
    }
    return PerceptualWeights(trunk, channel_weights, {"head": head_sha256, "backbone": backbone_sha256})


def _read_state(path: Path) -> tuple[Mapping[str, Tensor], str]:
    """Read the tensors of a file by name, and its SHA-256, without a second copy in memory."""
    with path.open("rb") as file:
        sha256 = _checked_sha256(path, file, perceptual=True)
        file.seek(0)
        if path.suffix == ".safetensors":
            try:
                return safetensors.torch.load(file.read()), sha256
            except safetensors.SafetensorError as error:
                raise WeightsError(f"{path}: not a safetensors file: {error}") from error
        state = _unpickled(path, file)
    if not isinstance(state, Mapping):
        raise WeightsError(f"{path}: expected tensors by name, found {type(state).__name__}")
    return state, sha256


def _unpickled(path: Path, file: BinaryIO) -> Any:
    """Load what torch saved, if it consists of tensors in plain containers."""
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # the unpickler raises any exception for a file that is no checkpoint
        # The rest of torch's message advises reading the file unsafely.
        reason = str(error).partition(". ")[0] or type(error).__name__
        raise WeightsError(
            f"{path}: not a checkpoint of tensors that torch can read safely: {reason}"
        ) from error


def _load_safetensors(path: Path, content: bytes, sha256: str, trunk_class: type[Trunk]) -> Checkpoint:
    metadata = read_metadata(path)
    if TRUNKS.get(metadata["trunk"]) is not trunk_class:
        raise WeightsError(
            f"{path}: weights of the trunk {metadata['trunk']!r}, expected those of {trunk_class.__name__}"
        )
    tensors = safetensors.torch.load(content)
    with torch.device("meta"):
        model_state = trunk_class().state_dict()
    trunk = {
        name: _checked_tensor(tensors, f"trunk.{name}", tuple(value.shape), path)
        for name, value in model_state.items()
    }
    channel_weights = [
        _checked_tensor(tensors, f"channel_weights.{k}", (channels,), path)
        for k, channels in enumerate(trunk_class.CHANNELS)
    ]
    maps = [tensors.get(f"deviation_squares.{k}") for k in range(len(channel_weights))]
    squares, counts = _checked_maps(path, maps, json.loads(metadata["counts"]))
    return Checkpoint(trunk, channel_weights, squares, counts, sha256)


def _checked_maps(
    path: Path, squares: Sequence[Any], counts: Sequence[Any]
) -> tuple[list[Tensor], list[int]]:
    """Check deviation maps and the numbers of frames behind them, and return both."""
    if any(not isinstance(m2, Tensor) or m2.ndim != 2 for m2 in squares):
        shapes = [tuple(getattr(m2, "shape", ())) for m2 in squares]
        raise WeightsError(f"{path}: maps of squared deviations have shapes {shapes}; expected (y, x)")
    maps = [m2.float() for m2 in squares]
    usable = [count for count in counts if isinstance(count, int) and count > 1]
    if len(usable) != len(squares) or not all(bool((m2 >= 0).all()) for m2 in maps):
        raise WeightsError(
            f"{path}: expected counts above 1 and sums of squares, found counts {list(counts)} and squares "
            f"from {[float(m2.min()) for m2 in maps]}"
        )
    return maps, usable


def fetch_weights(name: str, folder: Path | None = None) -> Path:
    """Download published weights into the user cache (or ``folder``) and check their SHA-256.

    For a metric that needs a second file (:data:`BACKBONES`), both are downloaded.

    Returns
    -------
    Path
        File with the weights of that name.

    Raises
    ------
    WeightsError
        For an unknown name, when the publisher cannot be reached, or on a wrong hash.
    """
    if name not in PUBLISHED:
        raise WeightsError(f"no published weights named {name!r}; available: {', '.join(PUBLISHED)}")
    fetched = {file: _fetch(PUBLISHED[file], folder or cache_folder()) for file in _files_of(name)}
    return fetched[name]


def _fetch(published: Published, folder: Path) -> Path:
    import pooch

    try:
        path = pooch.retrieve(
            published.url,
            known_hash=f"sha256:{published.sha256}",
            fname=published.file,
            path=folder,
        )
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"could not fetch {published.file} from {published.url}: {error}. Download it by other means and "
            f"put it into {folder}, or set LSIM_WEIGHTS to its folder"
        ) from error
    return Path(path)


@dataclass(frozen=True)
class WeightsStatus:
    """State of one set of published weights on this machine.

    Attributes
    ----------
    name : str
    state : str
        ``"ok"``, ``"absent"`` or ``"damaged"``.
    detail : str
        The path, the remedy or the fault.
    """

    name: str
    state: str
    detail: str


def weights_status() -> list[WeightsStatus]:
    """List the state of all shipped and published weights, with the hash of present files checked."""
    statuses = []
    for name in SHIPPED | PUBLISHED:
        try:
            path = find_weights(name)
        except MissingWeightsError:
            remedy = "comes with the package" if name in SHIPPED else _how_to_fetch(name)
            statuses.append(WeightsStatus(name, "absent", remedy))
            continue
        try:
            verified_sha256(path, perceptual=True)
        except WeightsError as error:
            statuses.append(WeightsStatus(name, "damaged", str(error)))
        else:
            statuses.append(WeightsStatus(name, "ok", str(path)))
    return statuses


def _checked_tensor(state: Mapping[str, Tensor], name: str, shape: tuple[int, ...], path: Path) -> Tensor:
    if not isinstance(state.get(name), Tensor):
        raise WeightsError(f"{path}: no tensor {name!r}; found {', '.join(sorted(map(str, state)))}")
    if tuple(state[name].shape) != shape:
        raise WeightsError(f"{path}: tensor {name!r} has shape {tuple(state[name].shape)}, expected {shape}")
    return state[name].float()
