"""What a metric keeps of each frame, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Embedding:
    """A metric's state per frame: named tensors that share their first axis, one entry a frame.

    ``rounding`` and ``stored`` (n,) bound the error of the values of each frame that was embedded, see
    :class:`lsim.prepared.Prepared`; None where nothing is known of it. ``mean_rounding`` is the root mean
    square of that error over a frame, where bounds are asked for.
    """

    parts: dict[str, Tensor] = field(default_factory=dict)
    rounding: Tensor | None = None
    stored: Tensor | None = None
    mean_rounding: Tensor | None = None
    _derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, what: str, compute: Callable[[], Any]) -> Any:
        """``compute()``, the first time; metrics that share this embedding then take the same again."""
        if what not in self._derived:
            self._derived[what] = compute()
        return self._derived[what]

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def __getitem__(self, frames: slice) -> Embedding:
        rounding, stored, mean = (
            None if bound is None else bound[frames]
            for bound in (self.rounding, self.stored, self.mean_rounding)
        )
        return Embedding({name: part[frames] for name, part in self.parts.items()}, rounding, stored, mean)

    def copy(self) -> Embedding:
        """Copy the parts, so that who writes into them harms nobody; what is derived of them stays shared."""
        parts = {name: part.clone() for name, part in self.parts.items()}
        return Embedding(parts, self.rounding, self.stored, self.mean_rounding, self._derived)

    def __iter__(self) -> Iterator[Embedding]:
        return (self[k : k + 1] for k in range(len(self)))
