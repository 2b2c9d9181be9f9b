"""The network while it is trained: a trunk, its channel weights, and the maps that features are divided by.

The distance is that of :mod:`lsim.metrics.learned`. In training all distances of a sequence come from one
pass of the trunk over its frames:

    d(i, j)² = Σ_l mean_yx Σ_c w_lc ((f_lc(i) − f_lc(j)) / ((σ_l + 1e-10)(√C_l − 1)))²

comes from the Gram matrix of the features f around their mean over the sequence. Dropout, before the channel
weights as published, then leaves out the same elements for all pairs of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsim.metric import safe_sqrt
from lsim.networks import TRUNKS, AlexTrunk, NonSiamese
from lsim.weights import Checkpoint, WeightsError, load_checkpoint

INITIAL_CHANNEL_WEIGHT = 0.1


class DistanceNetwork(nn.Module):
    """A trunk with channel weights and deviation maps, as it is trained.

    Parameters
    ----------
    trunk : str
        A name in :data:`lsim.networks.TRUNKS`.
    size : int
        Side of the frames that the maps are kept for; they are resized for other frames.
    frozen : bool, default False
        Keep the trunk as it is, and train the channel weights alone.
    """

    def __init__(self, trunk: str, size: int, frozen: bool = False) -> None:
        super().__init__()
        self.trunk = TRUNKS[trunk]()
        self.trunk.requires_grad_(not frozen)
        channels = self.trunk.CHANNELS
        self.channel_weights = nn.ParameterList(
            nn.Parameter(torch.full((c,), INITIAL_CHANNEL_WEIGHT)) for c in channels
        )
        with torch.no_grad():
            shapes = [tuple(m.shape[2:]) for m in self.trunk(torch.zeros(1, 3, size, size))]
        self.counts = 0
        for k, shape in enumerate(shapes):
            self.register_buffer(f"deviation_squares_{k}", torch.ones(shape))

    def load_initial(self, path: Path) -> None:
        """Begin from weights of the metric, or for ``alex`` from torchvision's, as safetensors.

        Raises
        ------
        WeightsError
            When the file doesn't hold such weights.
        """
        if isinstance(self.trunk, AlexTrunk):
            published = _torchvision_tensors(path)
            keys = self.trunk.CHECKPOINT_KEYS.items()
            wanted = {
                f"{layer}.{kind}": f"{key}.{kind}" for layer, key in keys for kind in ("weight", "bias")
            }
            if published:
                missing = sorted(set(wanted.values()) - published.keys())
                if missing:
                    found = ", ".join(published)
                    raise WeightsError(f"{path}: no tensors {', '.join(missing)}; found {found}")
                self.trunk.load_state_dict({ours: published[theirs] for ours, theirs in wanted.items()})
                return
        loaded = load_checkpoint(path, type(self.trunk))
        self.trunk.load_state_dict(dict(loaded.trunk))
        with torch.no_grad():
            for parameter, weight in zip(self.channel_weights, loaded.channel_weights, strict=True):
                parameter.copy_(weight)
        for k, squares in enumerate(loaded.deviation_squares):
            shape = self.get_buffer(f"deviation_squares_{k}").shape
            # The maps of a run at another frame size, as the metric takes them.
            self.get_buffer(f"deviation_squares_{k}").copy_(resized_map(squares, tuple(shape)))
        self.counts = loaded.counts[0]

    def features(self, frames: Tensor) -> list[Tensor]:
        """Feature maps (n, y', x', channel) of frames (n, 3, y, x) in [0, 255], channels last."""
        maps = self.trunk(frames.contiguous(memory_format=torch.channels_last))
        return [f.permute(0, 2, 3, 1) for f in maps]

    def sequence_distances(
        self, features: Sequence[Tensor], pairs: Tensor, dropout: float, generator: torch.Generator
    ) -> Tensor:
        """Distances of pairs within one sequence, from the features of its frames.

        Parameters
        ----------
        features : sequence of Tensor (frame, y', x', channel)
            Of :meth:`features`.
        pairs : Tensor of shape (2, pair)
        dropout : float
            Share of the elements that are left out.
        generator : torch.Generator
            Draws them.

        Returns
        -------
        Tensor of shape (pair,), float64
        """
        first, second = pairs
        squared: Tensor | float = 0.0
        for k, f in enumerate(features):
            factor = self._factor(k, f.shape[1:])
            if dropout:
                factor = factor * kept(f.shape[1:], dropout, generator, f.device)
            # Around the mean of the sequence, since frames are near one another, and Gram matrices are not
            # exact then.
            centred = (f.float() - f.float().mean(0, keepdim=True)).flatten(1)
            with torch.autocast(f.device.type, enabled=False):  # in single precision whatever the trunk's
                gram = ((centred * factor.flatten()) @ centred.T).double()
            norm = gram.diagonal()
            squared = squared + norm[first] + norm[second] - 2 * gram[first, second]
        assert isinstance(squared, Tensor)
        return safe_sqrt(squared.clamp(min=0))

    def pair_distances(
        self, reference: Sequence[Tensor], other: Sequence[Tensor], dropout: float, generator: torch.Generator
    ) -> Tensor:
        """Distances of the k-th frame of one side and the k-th of the other, dropout drawn for each pair.

        Parameters
        ----------
        reference, other : sequence of Tensor (pair, y', x', channel)
            Of :meth:`features`.
        dropout, generator
            See :meth:`sequence_distances`.

        Returns
        -------
        Tensor of shape (pair,), float64
        """
        squared: Tensor | float = 0.0
        for k, (a, b) in enumerate(zip(reference, other, strict=True)):
            difference = (a.float() - b.float()).square() * self._factor(k, a.shape[1:])
            if dropout:
                difference = difference * kept(difference.shape, dropout, generator, a.device)
            squared = squared + difference.sum((1, 2, 3)).double()
        assert isinstance(squared, Tensor)
        return safe_sqrt(squared)

    def _factor(self, k: int, shape: Sequence[int]) -> Tensor:
        """What a squared difference of features weighs in the squared distance: (y', x', channel)."""
        y, x, channels = shape
        squares = resized_map(self.get_buffer(f"deviation_squares_{k}"), (y, x))
        deviation = (squares / max(self.counts - 1, 1)).sqrt()
        scale = (deviation + 1e-10) * (math.sqrt(channels) - 1)
        return self.channel_weights[k].clamp(min=0) / (scale.square() * (y * x))[:, :, None]

    def clamp_weights(self) -> None:
        """Make negative channel weights 0: after each step of the optimiser, so that they may rise again."""
        with torch.no_grad():
            for weight in self.channel_weights:
                weight.clamp_(min=0)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set the deviation maps from frames: once, before training.

        Per pixel of each map, the sum of squared deviations of the feature vector's length from its mean
        (Welford's update by batches); section 4.2 of the paper.

        Parameters
        ----------
        batches : iterable of Tensor (n, 3, y, x)
            Frames of the size that the maps are kept for, in [0, 255].
        """
        count = 0
        means: list[Tensor] = []
        squares: list[Tensor] = []
        for frames in batches:
            maps = self.trunk(frames.contiguous(memory_format=torch.channels_last))
            lengths = [f.double().norm(dim=1) for f in maps]
            if not means:
                means = [torch.zeros_like(length[0]) for length in lengths]
                squares = [torch.zeros_like(length[0]) for length in lengths]
            n = len(frames)
            for k, length in enumerate(lengths):
                mean = length.mean(0)
                shift = mean - means[k]
                squares[k] += (length - mean).square().sum(0) + shift.square() * (count * n / (count + n))
                means[k] += shift * (n / (count + n))
            count += n
        if count < 2:
            raise ValueError(f"deviation maps need two frames or more, found {count}")
        for k, square in enumerate(squares):
            self.get_buffer(f"deviation_squares_{k}").copy_(square)
        self.counts = count

    def get_extra_state(self) -> dict[str, int]:
        """How many frames the deviation maps are of; saved with the parameters."""
        return {"counts": self.counts}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Take up :meth:`get_extra_state`."""
        self.counts = state["counts"]

    def checkpoint(self) -> Checkpoint:
        """The weights as :func:`lsim.weights.save_checkpoint` takes them."""
        return Checkpoint(
            trunk={
                name: value.detach().cpu().contiguous() for name, value in self.trunk.state_dict().items()
            },
            channel_weights=[weight.detach().cpu().clamp(min=0) for weight in self.channel_weights],
            deviation_squares=[
                self.get_buffer(f"deviation_squares_{k}").cpu() for k in range(len(self.channel_weights))
            ],
            counts=[self.counts] * len(self.channel_weights),
            sha256="",
        )


def _torchvision_tensors(path: Path) -> dict[str, Tensor]:
    """Those named ``features.…``, as torchvision names AlexNet's."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith("features.")]  # noqa: SIM118 (no mapping)
            return {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path}: not safetensors: {error}") from error


def resized_map(squares: Tensor, size: tuple[int, ...]) -> Tensor:
    """A deviation map for feature maps of another size: bilinear, corners aligned, as published."""
    if squares.shape == size:
        return squares
    return F.interpolate(squares[None, None], size, mode="bilinear", align_corners=True)[0, 0]


def kept(shape: Sequence[int], dropout: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """A mask of dropout: 0 with that probability, else 1/(1 − dropout); drawn on the host."""
    mask = torch.rand(tuple(shape), generator=generator) >= dropout
    return mask.to(device, torch.float32) / (1 - dropout)


class PairNetwork(nn.Module):
    """The non-siamese baseline as it is trained: no features of one frame, a pass for every pair."""

    counts = 0

    def __init__(self) -> None:
        super().__init__()
        self.network = NonSiamese()

    def features(self, frames: Tensor) -> list[Tensor]:
        """The frames themselves, scaled to [−1, 1]."""
        return [frames / 127.5 - 1]

    def sequence_distances(
        self, features: Sequence[Tensor], pairs: Tensor, dropout: float, generator: torch.Generator
    ) -> Tensor:
        """As :meth:`DistanceNetwork.sequence_distances`; a pass a pair."""
        (frames,) = features
        return self._distances(frames[pairs[0]], frames[pairs[1]], dropout, generator)

    def pair_distances(
        self, reference: Sequence[Tensor], other: Sequence[Tensor], dropout: float, generator: torch.Generator
    ) -> Tensor:
        """As :meth:`DistanceNetwork.pair_distances`."""
        return self._distances(reference[0], other[0], dropout, generator)

    def _distances(self, a: Tensor, b: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
        keep = (
            kept((len(a), self.network.full1.in_features), dropout, generator, a.device) if dropout else None
        )
        distances: Tensor = self.network(torch.cat([a, b], 1), keep)
        return distances

    def clamp_weights(self) -> None:
        """Nothing: it has no channel weights."""

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Nothing: it divides by no maps."""

    def checkpoint(self) -> Checkpoint:
        """The weights as :func:`lsim.weights.save_checkpoint` takes them."""
        state = {name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()}
        return Checkpoint(trunk=state, channel_weights=[], deviation_squares=[], counts=[], sha256="")
