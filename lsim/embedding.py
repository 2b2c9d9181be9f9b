"""State of frames that a metric computes once and compares often."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Embedding:
    """A metric's state per frame: named tensors that share their first axis, one entry a frame.

    Attributes
    ----------
    parts : dict of str to Tensor
    rounding, stored : Tensor of shape (n,), or None
        Bounds on the error of the values of each embedded frame, see :class:`lsim.prepared.Prepared`; None if
        unknown.
    mean_rounding : Tensor of shape (n,), or None
        Root mean square of that error over a frame, if bounds are asked for.

    Examples
    --------
    >>> import torch
    >>> embedding = Embedding({"mean": torch.tensor([1.0, 2.0])})
    >>> len(embedding), embedding[1:].parts["mean"]
    (2, tensor([2.]))
    """

    parts: dict[str, Tensor] = field(default_factory=dict)
    rounding: Tensor | None = None
    stored: Tensor | None = None
    mean_rounding: Tensor | None = None
    _derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return ``compute()``, computed once for all metrics that share this embedding."""
        if name not in self._derived:
            self._derived[name] = compute()
        return self._derived[name]

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def __getitem__(self, frames: slice | Tensor) -> Embedding:
        rounding, stored, mean = (
            None if bound is None else bound[frames]
            for bound in (self.rounding, self.stored, self.mean_rounding)
        )
        return Embedding({name: part[frames] for name, part in self.parts.items()}, rounding, stored, mean)

    def copy(self) -> Embedding:
        """Copy the parts, for code that may write into them; derived values stay shared."""
        parts = {name: part.clone() for name, part in self.parts.items()}
        return Embedding(parts, self.rounding, self.stored, self.mean_rounding, self._derived)

    def __iter__(self) -> Iterator[Embedding]:
        return (self[k : k + 1] for k in range(len(self)))


def difference_of(a: Embedding, b: Embedding, part: str) -> Tensor:
    """Subtract the values of a part, and then their rests where embeddings have them (:mod:`lsim.doubles`).

    Examples
    --------
    >>> import torch
    >>> values, rest = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), 1e-20, dtype=torch.float64)
    >>> a, b = Embedding({"values": values, "rest": rest}), Embedding({"values": values, "rest": -rest})
    >>> difference_of(a, b, "values").item()
    2e-20
    """
    difference = a.parts[part] - b.parts[part]
    if "rest" not in a.parts:
        return difference
    return difference + (a.parts["rest"] - b.parts["rest"])
