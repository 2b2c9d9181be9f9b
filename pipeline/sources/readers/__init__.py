"""Readers: from a folder of files to lazy sequences. One file a format.

Writing a reader
----------------
A reader is one function ``(entry, folder) -> iterable of LazySequence``. It lists what is there and
decodes nothing: names, fields, and of each file its path, size and time. Decoding is the sequence's
:meth:`~pipeline.sources.readers.base.LazySequence.read`, called on a worker, so a sequence holds only what
pickles and imports heavy libraries inside the call::

    @dataclass(frozen=True, kw_only=True)
    class RawSequence(LazySequence):
        def read(self):
            frames = np.fromfile(self.files[0].path, "<f4").reshape(-1, 256, 256, 1)
            return frames, np.linspace(0, 1, len(frames))

    def read(entry, folder):
        return [
            RawSequence(name=path.stem, field="density", files=(SourceFile.of(path),))
            for path in folder.glob("*.raw")
        ]

    READERS["raw"] = read

The rest is done for it: the catalog's ``filter`` and ``fields``, the natural order, and the checks that a
sequence's name stands once (sequences of one name are quarantined together, under it), that frames are
finite (unless the catalog says ``missing: keep``), of one shape, and that the parameter rises. What is
broken in one sequence is raised by its ``read`` as :class:`~pipeline.sources.readers.base.ReaderError`, which
quarantines that sequence; one that cannot even be listed is given as
:class:`~pipeline.sources.readers.base.BrokenSequence`. What is wrong with the whole entry is raised by the
reader and stops the run.
Weights of pixels are what :meth:`~pipeline.sources.readers.base.LazySequence.read_weights` gives, where a
reader defines it.
Options come from ``entry.options``; check them with :func:`pipeline.sources.catalog.reader_options`, for
which an unknown key is an error. Whatever besides the files decides what is decoded belongs into
``settings``.

An installed package offers a reader by an entry point of the group ``lsim.readers``.

When the code of a reader changes, what it decoded is decoded again. For a reader of one's own that is seen by
the files that define the reader and the classes of its sequences; modules that these import aren't looked at,
nor are libraries: after a change there, ``lsim convert --verify-sources`` decodes everything. Shipped readers
have a ``VERSION`` each.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from itertools import groupby
from pathlib import Path

import numpy as np

from pipeline.sources.catalog import CatalogError, Dataset, FieldChoice
from pipeline.sources.readers import lsim, stack, xarray
from pipeline.sources.readers.base import (
    LEADS_OUT,
    BrokenSequence,
    LazySequence,
    ReaderError,
    SourceFile,
    TooLargeError,
    is_within,
    natural_key,
)
from pipeline.sources.readers.code_hash import hash_code
from pipeline.storage.safe_names import group_fault, sequence_fault, shown

__all__ = [
    "READERS",
    "BrokenSequence",
    "LazySequence",
    "Reader",
    "ReaderError",
    "SourceFile",
    "TooLargeError",
    "find_reader",
    "list_sequences",
]

Reader = Callable[[Dataset, Path], Iterable[LazySequence]]

READERS: dict[str, Reader] = {"lsim": lsim.read, "stack": stack.read, "xarray": xarray.read}

VERSIONS: dict[str, str] = {module.__name__: module.VERSION for module in (lsim, stack, xarray)}
"""Of the shipped readers, by module."""


def find_reader(name: str) -> Reader:
    """The reader of this name, from :data:`READERS` or an installed package.

    Raises
    ------
    CatalogError
        For an unknown name; it suggests near ones.
    """
    if name in READERS:
        return READERS[name]
    offered = {point.name: point for point in entry_points(group="lsim.readers")}
    if name in offered:
        reader: Reader = offered[name].load()
        return reader
    known = sorted({*READERS, *offered})
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise CatalogError(f"no reader {name!r}; {hint}known: {', '.join(known)}")


def list_sequences(entry: Dataset, folder: Path) -> list[LazySequence]:
    """All sequences of a data set, in natural order, after its ``filter`` and ``fields``.

    A name stands once in a field. Where several sequences have it, one broken sequence stands for all: which
    of them is meant can't be told, so none is read, and the reason names their files.

    Raises
    ------
    CatalogError
        When the reader is unknown, the folder can't be listed, there are no sequences, a field that the
        catalog names isn't there, or two fields differ in case alone.
    """
    here = f"dataset {entry.name} ({folder})"
    reader = find_reader(entry.reader)
    try:
        selected = [s for s in reader(entry, folder) if entry.selects(s.name)]
        code = _code_of(entry.reader, reader, selected)
        found = [
            replace(s, missing=entry.missing, most_bytes=entry.sequence_bytes, code=code)
            for s in _quarantine_unsafe(selected, folder)
        ]
    except ReaderError as error:
        raise CatalogError(f"dataset {entry.name}, reader {entry.reader!r}: {error}") from error
    except OSError as error:
        raise CatalogError(f"{here}: {error}") from error
    if not found:
        chosen = f" whose name holds one of {', '.join(entry.filter)}" if entry.filter else ""
        raise CatalogError(f"{here}: reader {entry.reader!r} found no sequences{chosen}")
    chosen_fields = _choose_fields(found, entry, here)
    chosen_fields.sort(key=lambda s: (s.field, natural_key(s.name)))
    result = [
        _only_one(list(members), entry, folder)
        for _, members in groupby(chosen_fields, key=lambda s: (s.field, s.name))
    ]
    spelling: dict[str, str] = {}
    for field in sorted({s.field for s in result}):
        other = spelling.setdefault(field.casefold(), field)
        if other != field:
            raise CatalogError(
                f"{here}: fields {other!r} and {field!r} differ in case alone; where names of files don't "
                "count case they would be one group"
            )
        if fault := group_fault(field):
            raise CatalogError(f"{here}: field {fault}")
    return result


def _code_of(name: str, reader: Reader, sequences: Iterable[LazySequence]) -> str:
    """Version of a shipped reader; hash of the code of another one, which may call shipped ones."""
    if (module := getattr(reader, "__module__", "")) in VERSIONS:
        return VERSIONS[module]
    classes = {cls for s in sequences for cls in type(s).__mro__ if issubclass(cls, LazySequence)}
    ours = {cls for cls in classes if cls.__module__.startswith(f"{__name__}.")}
    return hash_code(f"reader {name!r}", (reader, *(classes - ours)), ",".join(VERSIONS.values()))


MOST_NAMED = 4
"""Of the files whose sequences have one name, so many are named; there may be thousands."""


def _only_one(members: list[LazySequence], entry: Dataset, folder: Path) -> LazySequence:
    """The sequence of a name; where there are several, a broken one that names the files of all."""
    first = members[0]
    if len(members) == 1:
        return first
    paths = [_file_of(s) for s in members]
    top = folder if folder.is_dir() else folder.parent
    # Relative, so that the reason is the same where an archive was moved to.
    counts = Counter(shown(os.path.relpath(path, top)) if path else "no file" for path in sorted(paths))
    named = [path if count == 1 else f"{path} ({count} times)" for path, count in counts.items()]
    more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
    reason = (
        f"{len(members)} sequences of one name: {', '.join(named[:MOST_NAMED])}{more}. None is read; rename "
        "or remove all but one"
    )
    broken = BrokenSequence.of(first.name, first.field, min(paths), ReaderError(reason, min(paths)))
    return replace(broken, missing=entry.missing, most_bytes=entry.sequence_bytes)


def _file_of(sequence: LazySequence) -> str:
    """The file that a sequence is found in, or its first one; "" where it has none."""
    if isinstance(sequence, ChannelsOf):
        return _file_of(sequence.source)
    if isinstance(sequence, BrokenSequence):
        return sequence.file
    return sequence.files[0].path if sequence.files else ""


def _quarantine_unsafe(sequences: Iterable[LazySequence], folder: Path) -> list[LazySequence]:
    """Sequences with a name that can't be shown, or a file that lies elsewhere, as broken ones.

    A link within a data set could lead to any file of this machine. The data set's own folder may be one.
    """
    top = os.path.realpath(folder if folder.is_dir() else folder.parent)
    folders: dict[str, str] = {}

    def is_inside(path: str) -> bool:
        parent, name = os.path.split(path)
        if parent not in folders:
            folders[parent] = os.path.realpath(parent)
        real = os.path.realpath(path) if os.path.islink(path) else os.path.join(folders[parent], name)
        return is_within(real, top) or path == os.fspath(folder)

    result = []
    for sequence in sequences:
        outside = next((file.path for file in sequence.files if not is_inside(file.path)), None)
        reason = sequence_fault(sequence.name)
        if outside is not None:
            reason = LEADS_OUT
        if reason:
            file = outside or (sequence.files[0].path if sequence.files else "")
            sequence = BrokenSequence.of(
                shown(sequence.name), sequence.field, file, ReaderError(reason, file)
            )
        result.append(sequence)
    return result


@dataclass(frozen=True, kw_only=True)
class ChannelsOf(LazySequence):
    """Some channels of another sequence."""

    source: LazySequence
    channels: tuple[int, ...]

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Decode the other sequence and take the channels."""
        frames, parameter = self.source.read()
        if frames.ndim != 4 or max(self.channels) >= frames.shape[3]:
            raise ReaderError(
                f"sequence {self.name}: frames of shape {frames.shape} have no channel {max(self.channels)}"
            )
        return frames[..., list(self.channels)], parameter

    def read_weights(self) -> np.ndarray | None:
        """Decode the weights of the other sequence: they are those of all channels."""
        return self.source.read_weights()


def _choose_fields(found: list[LazySequence], entry: Dataset, here: str) -> list[LazySequence]:
    if not entry.fields:
        return found
    present = sorted({s.field for s in found})
    choices = entry.fields if isinstance(entry.fields, dict) else {n: FieldChoice() for n in entry.fields}
    result: list[LazySequence] = []
    for name, choice in choices.items():
        source = choice.source or (name if name in present or len(present) > 1 else present[0])
        if source not in present or (source != name and isinstance(entry.fields, list)):
            missing = choice.source or name
            raise CatalogError(f"{here}: no field {missing!r}; found {', '.join(present)}")
        sequences = [s for s in found if s.field == source]
        if choice.channel is None:
            result += [replace(s, field=name) for s in sequences]
            continue
        channels = (choice.channel,) if isinstance(choice.channel, int) else tuple(choice.channel)
        if not channels or min(channels) < 0:
            raise CatalogError(f"{here}: field {name!r}: channels {channels}; expected indices from 0")
        result += [
            ChannelsOf(
                name=s.name,
                field=name,
                files=s.files,
                settings={**s.settings, "channels": list(channels)},
                attributes=s.attributes,
                missing=s.missing,
                most_bytes=s.most_bytes,
                code=s.code,
                source=s,
                channels=channels,
            )
            for s in sequences
        ]
    return result
