"""Calls of a metric's own code, with what it returns checked, made symmetric if asked for, and bounded.

The author's ``embed``, ``compare``, ``paired`` and ``rounding`` are run here. Metrics of other packages run
guarded: see :class:`lsim.claims.OthersCode`.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lsim.claims import Claims, OthersCode, other_random_numbers, versions
from lsim.embedding import Embedding
from lsim.metric_definition import MetricDefinition
from lsim.prepared import Prepared

PROBES = 4
"""Multiple of the rounding that one probe shows, as a bound: once for each frame of a pair, and twice that
for errors that are less random than the probe's."""

_UNGUARDED = contextlib.nullcontext()


class CheckedMetric(MetricDefinition):
    """The part of a metric that runs its author's code and checks the results: see :class:`lsim.Metric`."""

    @property
    def claims(self) -> Claims:
        """The metric's claims about its distances, with the checks of them."""
        return Claims(self.name, self.axioms, self.info.distance_to_itself)

    @property
    def of_others(self) -> bool:
        """True for a class of another package, which no test here holds to the contract."""
        return not type(self).__module__.startswith("lsim.")

    def _guarded(self, method: str) -> contextlib.AbstractContextManager[None]:
        return OthersCode(self.name, method) if self.of_others else _UNGUARDED

    # --- frames to embeddings -----------------------------------------------------------------------------

    def embed_prepared(self, prepared: Prepared) -> Embedding:
        """Embed frames that :meth:`Metric.prepare` made, once for all metrics of a :attr:`family`.

        The embedding carries bounds on the rounding of its frames.
        """
        self.check_size(prepared.values.shape[1], prepared.values.shape[2])
        embedding = prepared.embedding(self.family, lambda: self._embed_anew(prepared))
        if self.of_others and self.family is not None:
            embedding = embedding.copy()
        return self._with_rounding(embedding, prepared)

    def _embed_anew(self, prepared: Prepared) -> Embedding:
        """Embed prepared frames, whatever has been embedded of them before."""
        frames = self._frames(prepared)
        rest = self._rest(prepared)
        return self._run_embed(frames, None if rest is None else rest.expand(frames.shape))

    def _run_embed(self, frames: Tensor, rest: Tensor | None = None) -> Embedding:
        """Run :meth:`embed` and check the embedding; code of others gets frames of its own."""
        frame_versions = versions([frames])
        with self._guarded("embed"):
            embedding = self.embed(frames) if rest is None else self.embed_with_rest(frames, rest)
        self.claims.check_embedding(embedding, len(frames))
        self.claims.check_unwritten(frame_versions, versions([frames]), "embed wrote into the frames")
        return embedding

    def _frames(self, prepared: Prepared) -> Tensor:
        return prepared.frames(
            quantised=self.quantised,
            one_channel=self.info.one_channel_suffices,
            copied=self.of_others,
        )

    def _rest(self, prepared: Prepared) -> Tensor | None:
        """Return the rest of the frames if the metric takes it; frames that are truncated have none."""
        takes_rest = self.takes_rest and (self.rest_of_units or self.preprocessing.precision == "double")
        return prepared.rest if takes_rest and not self.quantised else None

    def _with_rounding(self, embedding: Embedding, prepared: Prepared) -> Embedding:
        """Attach to an embedding how much preparing may have rounded its frames."""
        if prepared.rounding is None:
            return embedding
        rounding = prepared.rounding if self._rest(prepared) is None else prepared.rounding_with_rest
        return replace(embedding, rounding=rounding, stored=prepared.stored)

    # --- embeddings to distances --------------------------------------------------------------------------

    def distance_block(self, a: Embedding, b: Embedding) -> Tensor:
        """Compute the distances of all frames of two embeddings by :meth:`compare`; both ways if symmetrised.

        Returns
        -------
        Tensor of shape (len(a), len(b))

        Raises
        ------
        lsim.ClaimError
            When ``compare`` returns no block of distances, or writes into the embeddings.
        """
        block = self._run_compare(a, b)
        if not self._symmetrised:
            return block
        return (block + (block if a is b else self._run_compare(b, a)).T) / 2

    def _run_compare(self, a: Embedding, b: Embedding) -> Tensor:
        parts = [*a.parts.values(), *b.parts.values()]
        part_versions = versions(parts)
        with self._guarded("compare"):
            block = self.compare(a, b)
        self.claims.check_block(block, (len(a), len(b)))
        self.claims.check_unwritten(part_versions, versions(parts), "compare wrote into the embeddings")
        return block if torch.is_grad_enabled() else block.detach()

    def distance_pairs(self, a: Embedding, b: Embedding) -> Tensor:
        """Compute the distances of a[k] and b[k] by :meth:`paired`, both ways if symmetrised: (len(a),)."""
        values = self._run_paired(a, b)
        return (values + self._run_paired(b, a)) / 2 if self._symmetrised else values

    def _run_paired(self, a: Embedding, b: Embedding) -> Tensor:
        parts = [*a.parts.values(), *b.parts.values()]
        part_versions = versions(parts)
        with self._guarded("paired"):
            values = self.paired(a, b)
        self.claims.check_block(values, (len(b),), "paired")
        self.claims.check_unwritten(part_versions, versions(parts), "paired wrote into the embeddings")
        return values

    # --- bounds on rounding -------------------------------------------------------------------------------

    def bound_rounding(
        self, a: Embedding, b: Embedding, distances: Tensor, prepared: Prepared | None = None
    ) -> np.ndarray:
        """Bound the rounding of a :meth:`distance_block` by :meth:`rounding`, or without one by a probe.

        Parameters
        ----------
        a, b : Embedding
        distances : Tensor of shape (len(a), len(b)), float64
        prepared : Prepared, optional
            The frames of ``b``, of which ``a`` is the first frame, or all. Needed for the probe, and for
            bounds by the mean error of a frame.

        Returns
        -------
        ndarray of shape (len(a), len(b)), float64
            New memory.
        """
        # A mean over some of the pixels, or by weight, may be larger than that over all.
        if prepared is not None and not self.preprocessing.mask and self.pixel_weights is None:
            is_same = a is b
            mean = prepared.mean_rounding if self._rest(prepared) is None else None
            b = replace(b, mean_rounding=mean)
            a = b if is_same else b[: len(a)]
        with torch.no_grad(), self._guarded("rounding"):
            rounding = self._run_rounding(a, b, distances)
            if prepared is not None and type(self).rounding is MetricDefinition.rounding:
                rounding = rounding + self._probe_rounding(prepared)
        self.claims.check_block(rounding, tuple(distances.shape), "rounding")
        return rounding.detach().double().cpu().numpy().copy()

    def _run_rounding(self, a: Embedding, b: Embedding, block: Tensor) -> Tensor:
        """Run :meth:`rounding`, both ways if symmetrised: float64."""
        bound = self.rounding(a, b, block).double()
        if self._symmetrised:
            bound = (bound + self.rounding(b, a, block.T).double().T) / 2
        return bound.broadcast_to(block.shape)

    def _probe_rounding(self, prepared: Prepared) -> float:
        """Move a comparable frame by as much as it may be rounded, and measure its distance to itself.

        With frames in 8 bit only errors that may put a value on another level count: the same whole number
        is on the same level everywhere, so sources of integers have none.
        """
        first = np.flatnonzero(prepared.comparable)[:1]
        if prepared.rounding is None or not len(first):
            return 0.0
        frame = prepared.values[first]
        size = prepared.rounding[first]
        if self.quantised:
            stored = torch.zeros_like(size) if prepared.stored is None else prepared.stored[first]
            size = torch.where(stored > 0, size + stored, 0)
        signs = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], frame.shape)).to(frame)
        error = size.to(frame)[:, None, None, None]
        frames = torch.cat([frame, frame + error * signs])
        embedding = self._embed_anew(Prepared(frames, prepared.comparable[first].repeat(2), prepared.masked))
        diagonal, single = self.distance_block(embedding[slice(0, 1)], embedding)[0].double().tolist()
        claimed = self.info.distance_to_itself
        change = abs(single - (diagonal if math.isnan(claimed) else claimed))
        return PROBES * change if math.isfinite(change) else 0.0

    # --- a trial ------------------------------------------------------------------------------------------

    def check_claims(self, prepared: Prepared) -> np.ndarray:
        """Check claims that results don't show: frames left alone, zero on itself, both directions.

        Measures distances of the first comparable frame and two others, and measures them again from copies
        and with other random numbers: a handful of pairs, and two embeddings of these frames.

        Parameters
        ----------
        prepared : Prepared
            Frames like those that the metric is to compare.

        Returns
        -------
        ndarray of shape (n, n), float64
            Distances among the first comparable frames, three at most.

        Raises
        ------
        lsim.ClaimError
        """
        rows = np.flatnonzero(prepared.comparable)[:3]
        if not len(rows):
            return np.empty((0, 0))
        few = prepared.select(rows)
        claims = self.claims
        with torch.no_grad():
            frames = self._frames(few)
            original = frames.clone()
            embedding = self._run_embed(frames, self._rest(few))
            if not torch.equal(frames.nan_to_num(), original.nan_to_num()):
                claims.refuse(
                    "embed wrote into the frames that it was given; it has to work on a copy (clone)"
                )
            copy = embedding.copy()
            block = self.distance_block(embedding, copy)
            with other_random_numbers():
                repetition = self.distance_block(self._embed_anew(few), copy)
        single = block.dtype == torch.float32
        first, second = (values.double().cpu().numpy() for values in (block, repetition))
        claims.check_repeated(first, second, "d", exact=self.device.type == "cpu")
        claims.check_distances(first, square=True, single=single)
        return first
