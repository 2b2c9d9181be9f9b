"""Frames of a trajectory, or of a rollout: read in windows, and compared with their hash."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xxhash

from lsim.scope import find_extremes
from pipeline.storage import schema, store

WINDOW_BYTES = 32 * 2**20
"""Bytes of a window of all trajectories of a block, in double precision; it has a frame of each at least."""

HELD_BYTES = 512 * 2**20
"""Frames that a block keeps after they are checked; longer trajectories are read twice."""


class Frames:
    """Frames of a trajectory that are read in windows, and compared with their hash when the last is read.

    Parameters
    ----------
    path, key, row, content
        Store, field and row of the trajectory, and the hash of its frames.
    together : int
        Trajectories that are in memory at once, with their windows.

    Attributes
    ----------
    shape : tuple of int
        Of a frame, (y, x, channel).
    """

    def __init__(self, path: str, key: str, row: int, content: str, together: int = 1) -> None:
        group = store.get_group(store.open_store(path), key)
        self._array = store.get_array(group, schema.FRAMES)
        self._parameter = store.read(store.get_array(group, schema.PARAMETER), row)
        self._row, self._content = row, content
        self._count = int(self._array.shape[1])
        self.shape = tuple(self._array.shape[2:])
        self._length = max(1, WINDOW_BYTES // (8 * int(np.prod(self.shape)) * together))
        self._most_held = HELD_BYTES // together
        self._held: list[np.ndarray] | None = []
        self._scan()

    def _scan(self) -> None:
        """Read all frames, check their hash, and find their range; keep them if they are few."""
        digest = xxhash.xxh3_128()
        nbytes, lows, highs, whole = 0, [], [], []
        dtype = self._array.dtype.newbyteorder("<")
        shape = (self._count, *self._array.shape[2:])
        digest.update(f"{dtype.str} {shape}\n".encode())
        for start in range(0, self._count, self._length):
            window = store.read(self._array, (self._row, slice(start, start + self._length)))
            digest.update(np.ascontiguousarray(window, dtype).reshape(-1).view(np.uint8).data)
            extremes = find_extremes(window)
            lows.append(extremes.lo)
            highs.append(extremes.hi)
            whole.append(extremes.finite)
            nbytes += window.nbytes
            if self._held is not None:
                self._held.append(window)
                if nbytes > self._most_held:
                    self._held = None
        parameter = np.ascontiguousarray(self._parameter, "<f8")
        digest.update(f"{parameter.dtype.str} {parameter.shape}\n".encode())
        digest.update(parameter.view(np.uint8).data)
        if digest.hexdigest() != self._content:
            raise store.DamagedError(
                str(self._array.store_path),
                f"row {self._row}: frames and parameter are not those that were converted",
            )
        self._low, self._high = np.concatenate(lows), np.concatenate(highs)
        self._whole = np.concatenate(whole)

    def range(self, masked: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Find the minimum and maximum by channel, as a scope.

        Over frames without NaN and infinity; ``masked``, over the finite values of all frames. (0, 0) where
        there is none.
        """
        chosen = np.ones(self._count, bool) if masked else self._whole
        ends = []
        for side, of in ((self._low, np.fmin), (self._high, np.fmax)):
            finite = np.where(np.isfinite(side[chosen]), side[chosen], np.nan)
            end = of.reduce(finite, axis=0) if len(finite) else np.zeros(self.shape[-1])
            ends.append(tuple(np.nan_to_num(end, nan=0.0).tolist()))
        return ends[0], ends[1]

    def windows(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield windows of frames, (n, y, x, channel), and where they stand in the trajectory."""
        for number, start in enumerate(range(0, self._count, self._length)):
            part = slice(start, min(start + self._length, self._count))
            yield part, self.select(part) if self._held is None else self._held[number]

    def select(self, part: slice | np.ndarray) -> np.ndarray:
        """Return some frames by their numbers, which rise."""
        numbers = np.arange(self._count)[part]
        if self._held is not None:
            return np.stack([self._held[k // self._length][k % self._length] for k in numbers])
        first, last = int(numbers[0]), int(numbers[-1])
        return store.read(self._array, (self._row, slice(first, last + 1)))[numbers - first]
