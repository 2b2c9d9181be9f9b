"""Errors of stores, and the errors of Zarr and its codecs that stand for damage."""

from __future__ import annotations


class StoreError(RuntimeError):
    """A store that cannot be opened, or a write that would damage one."""


class DamagedError(StoreError):
    """Values in a store that differ from those written; ``damage`` names them without their folder."""

    def __init__(self, location: str, damage: str) -> None:
        super().__init__(location, damage)
        self.damage = damage

    def __str__(self) -> str:
        location, damage = self.args
        return f"{location}: {damage}; 'lsim verify' lists all damage in a store"


class OversizedError(StoreError):
    """An array that claims more than this machine's memory; ``claim`` says how much, without its folder."""

    def __init__(self, location: str, claim: str) -> None:
        super().__init__(location, claim)
        self.claim = claim

    def __str__(self) -> str:
        return ": ".join(self.args)


UNREADABLE = (ValueError, RuntimeError, SystemError, MemoryError)
"""Errors of codecs for bytes that they did not write; each codec raises kinds of its own."""
NO_METADATA = (ValueError, KeyError, TypeError, AttributeError)
"""Errors of Zarr for a document that it did not write: not JSON, or incomplete."""
