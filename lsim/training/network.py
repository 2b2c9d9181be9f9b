"""Networks in training: a trunk, its channel weights and its deviation maps, which features are divided by.

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
    """A trunk with trainable channel weights, and deviation maps.

    Parameters
    ----------
    trunk : str
        A name in :data:`lsim.networks.TRUNKS`.
    size : int
        Side of the frames that the maps are stored for; they are resized for other frames.
    frozen : bool, default False
        Train the channel weights alone, not the trunk.
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
        """Load initial weights: those of the metric, or for ``alex`` torchvision's, as safetensors.

        Raises
        ------
        WeightsError
            When the file doesn't hold such weights.
        """
        if isinstance(self.trunk, AlexTrunk):
            published = _torchvision_tensors(path)
            keys = self.trunk.CHECKPOINT_KEYS.items()
            published_names = {
                f"{layer}.{kind}": f"{key}.{kind}" for layer, key in keys for kind in ("weight", "bias")
            }
            if published:
                missing = sorted(set(published_names.values()) - published.keys())
                if missing:
                    raise WeightsError(
                        f"{path}: no tensors {', '.join(missing)}; found {', '.join(published)}"
                    )
                self.trunk.load_state_dict(
                    {name: published[published_name] for name, published_name in published_names.items()}
                )
                return
        checkpoint = load_checkpoint(path, type(self.trunk))
        self.trunk.load_state_dict(dict(checkpoint.trunk))
        with torch.no_grad():
            for parameter, weight in zip(self.channel_weights, checkpoint.channel_weights, strict=True):
                parameter.copy_(weight)
        for k, squares in enumerate(checkpoint.deviation_squares):
            shape = self.get_buffer(f"deviation_squares_{k}").shape
            # Maps of a run at another frame size are resized, as by the metric.
            self.get_buffer(f"deviation_squares_{k}").copy_(resized_map(squares, tuple(shape)))
        self.counts = checkpoint.counts[0]

    def features(self, frames: Tensor) -> list[Tensor]:
        """Compute feature maps (n, y', x', channel) of frames (n, 3, y, x) in [0, 255]."""
        maps = self.trunk(frames.contiguous(memory_format=torch.channels_last))
        return [f.permute(0, 2, 3, 1) for f in maps]

    def sequence_distances(
        self, features: Sequence[Tensor], pairs: Tensor, dropout: float, generator: torch.Generator
    ) -> Tensor:
        """Compute distances of pairs within one sequence from the features of its frames.

        Parameters
        ----------
        features : sequence of Tensor (frame, y', x', channel)
            Result of :meth:`features`.
        pairs : Tensor of shape (2, pair)
        dropout : float
            Share of the elements that are dropped.
        generator : torch.Generator
            Source of the random choice.

        Returns
        -------
        Tensor of shape (pair,), float64
        """
        first, second = pairs
        squared: Tensor | float = 0.0
        for k, f in enumerate(features):
            factor = self._factor(k, f.shape[1:])
            if dropout:
                factor = factor * dropout_mask(f.shape[1:], dropout, generator, f.device)
            # Centred on the mean of the sequence: a Gram matrix of nearly equal frames loses digits.
            centred = (f.float() - f.float().mean(0, keepdim=True)).flatten(1)
            with torch.autocast(f.device.type, enabled=False):  # single precision for any trunk
                gram = ((centred * factor.flatten()) @ centred.T).double()
            norm = gram.diagonal()
            squared = squared + norm[first] + norm[second] - 2 * gram[first, second]
        assert isinstance(squared, Tensor)
        return safe_sqrt(squared.clamp(min=0))

    def pair_distances(
        self, reference: Sequence[Tensor], other: Sequence[Tensor], dropout: float, generator: torch.Generator
    ) -> Tensor:
        """Compute the distance between each frame and its counterpart, with dropout drawn for each pair.

        Parameters
        ----------
        reference, other : sequence of Tensor (pair, y', x', channel)
            Results of :meth:`features`.
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
                mask = dropout_mask(difference.shape, dropout, generator, a.device)
                difference = difference * mask
            squared = squared + difference.sum((1, 2, 3)).double()
        assert isinstance(squared, Tensor)
        return safe_sqrt(squared)

    def _factor(self, k: int, shape: Sequence[int]) -> Tensor:
        """Compute the weight of a squared feature difference in the squared distance: (y', x', channel)."""
        y, x, channels = shape
        squares = resized_map(self.get_buffer(f"deviation_squares_{k}"), (y, x))
        deviation = (squares / max(self.counts - 1, 1)).sqrt()
        scale = (deviation + 1e-10) * (math.sqrt(channels) - 1)
        return self.channel_weights[k].clamp(min=0) / (scale.square() * (y * x))[:, :, None]

    def clamp_weights(self) -> None:
        """Set negative channel weights to 0: after each optimiser step, so that they can rise again."""
        with torch.no_grad():
            for weight in self.channel_weights:
                weight.clamp_(min=0)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Compute the deviation maps from frames, once before training.

        Per pixel of each map, the sum of squared deviations of the feature vector's length from its mean
        (Welford's update by batches); section 4.2 of the paper.

        Parameters
        ----------
        batches : iterable of Tensor (n, 3, y, x)
            Frames of the size that the maps are stored for, in [0, 255].

        Raises
        ------
        ValueError
            When there are fewer than two frames.
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
            raise ValueError(f"deviation maps need at least two frames, found {count}")
        for k, square in enumerate(squares):
            self.get_buffer(f"deviation_squares_{k}").copy_(square)
        self.counts = count

    def get_extra_state(self) -> dict[str, int]:
        """Return the number of frames behind the deviation maps; saved with the parameters."""
        return {"counts": self.counts}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore the result of :meth:`get_extra_state`."""
        self.counts = state["counts"]

    def checkpoint(self) -> Checkpoint:
        """Return the weights in the form that :func:`lsim.weights.save_checkpoint` expects."""
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
    """Read the tensors named ``features.…``, torchvision's names of AlexNet's convolutions."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith("features.")]  # noqa: SIM118 (no mapping)
            return {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path}: not safetensors: {error}") from error


def resized_map(squares: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize a deviation map for feature maps of another size: bilinear, corners aligned, as published."""
    if squares.shape == size:
        return squares
    return F.interpolate(squares[None, None], size, mode="bilinear", align_corners=True)[0, 0]


def dropout_mask(
    shape: Sequence[int], dropout: float, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Draw a mask that is 0 with the probability ``dropout``, else 1/(1 − dropout), on the host."""
    mask = torch.rand(tuple(shape), generator=generator) >= dropout
    return mask.to(device, torch.float32) / (1 - dropout)


class PairNetwork(nn.Module):
    """The non-siamese baseline in training: no features per frame, one pass per pair."""

    counts = 0

    def __init__(self) -> None:
        super().__init__()
        self.network = NonSiamese()

    def features(self, frames: Tensor) -> list[Tensor]:
        """Scale frames to [−1, 1]: they are their own features."""
        return [frames / 127.5 - 1]

    def sequence_distances(
        self, features: Sequence[Tensor], pairs: Tensor, dropout: float, generator: torch.Generator
    ) -> Tensor:
        """Compute what :meth:`DistanceNetwork.sequence_distances` does, with one pass per pair."""
        (frames,) = features
        return self._distances(frames[pairs[0]], frames[pairs[1]], dropout, generator)

    def pair_distances(
        self, reference: Sequence[Tensor], other: Sequence[Tensor], dropout: float, generator: torch.Generator
    ) -> Tensor:
        """Compute what :meth:`DistanceNetwork.pair_distances` does."""
        return self._distances(reference[0], other[0], dropout, generator)

    def _distances(self, a: Tensor, b: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
        shape = (len(a), self.network.full1.in_features)
        keep = dropout_mask(shape, dropout, generator, a.device) if dropout else None
        distances: Tensor = self.network(torch.cat([a, b], 1), keep)
        return distances

    def clamp_weights(self) -> None:
        """Ignore the call: it has no channel weights."""

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Ignore the call: it has no deviation maps."""

    def checkpoint(self) -> Checkpoint:
        """Return the weights in the form that :func:`lsim.weights.save_checkpoint` expects."""
        state = {name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()}
        return Checkpoint(trunk=state, channel_weights=[], deviation_squares=[], counts=[], sha256="")
