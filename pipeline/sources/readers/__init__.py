"""Readers: list the sequences in a folder of files, to be decoded later. One file for each format.

Writing a reader
----------------
A reader is one function ``(entry, folder) -> iterable of LazySequence``. It lists names, fields, and the
path, size and time of each file, and decodes nothing. A worker decodes later by
:meth:`~pipeline.sources.readers.base.LazySequence.read`, so a sequence must be picklable, and imports heavy
libraries inside that call::

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

The caller applies the catalog's ``filter`` and ``fields``, and sorts. It checks that names are unique
(sequences of one name are quarantined together, under it), that frames are finite (unless the catalog says
``missing: keep``) and of one shape, and that the parameter rises. A sequence whose ``read`` raises
:class:`~pipeline.sources.readers.base.ReaderError` is quarantined. For one that cannot even be listed, return
a :class:`~pipeline.sources.readers.base.BrokenSequence`. An error that the reader itself raises is about the
whole entry, and stops the run.
:meth:`~pipeline.sources.readers.base.LazySequence.read_weights` may return weights of pixels.
Options come from ``entry.options``; check them with :func:`pipeline.sources.catalog.reader_options`, which
refuses unknown keys. Everything besides the files that influences decoding belongs in ``settings``.

An installed package offers a reader by an entry point of the group ``lsim.readers``.

When the code of a reader changes, its sequences are decoded again. For your own reader, a change is detected
in the files that define the reader and the classes of its sequences, but not in modules that these import,
nor in libraries: after a change there, run ``lsim convert --verify-sources``, which decodes everything. Each
shipped reader has a ``VERSION``.
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
from pipeline.sources.readers import arrays, lsim, stack, well, xarray
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
from pipeline.storage.safe_names import group_fault, sequence_fault, short_name

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

READERS: dict[str, Reader] = {
    "arrays": arrays.read,
    "lsim": lsim.read,
    "stack": stack.read,
    "well": well.read,
    "xarray": xarray.read,
}

VERSIONS: dict[str, str] = {module.__name__: module.VERSION for module in (arrays, lsim, stack, well, xarray)}
"""Versions of the shipped readers, by module."""


def find_reader(name: str) -> Reader:
    """Find a reader by name, in :data:`READERS` or an installed package.

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
    names = sorted({*READERS, *offered})
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise CatalogError(f"no reader {name!r}; {hint}known: {', '.join(names)}")


def list_sequences(entry: Dataset, folder: Path) -> list[LazySequence]:
    """List all sequences of a data set, in natural order, after its ``filter`` and ``fields``.

    A name is unique in a field. Several sequences of one name can't be told apart: one broken sequence stands
    for all of them, with a reason that names their files, and none is read.

    Raises
    ------
    CatalogError
        When the reader is unknown, the folder can't be listed, there are no sequences, a field that the
        catalog names isn't there, or two fields differ only in case.
    """
    label = f"dataset {entry.name} ({folder})"
    reader = find_reader(entry.reader)
    try:
        selection = [s for s in reader(entry, folder) if entry.selects(s.name)]
        code = _code_of(entry.reader, reader, selection)
        sequences = [
            replace(s, missing=entry.missing, most_bytes=entry.sequence_bytes, code=code)
            for s in _quarantine_unsafe(selection, folder)
        ]
    except ReaderError as error:
        raise CatalogError(f"dataset {entry.name}, reader {entry.reader!r}: {error}") from error
    except OSError as error:
        raise CatalogError(f"{label}: {error}") from error
    if not sequences:
        condition = f" whose name holds one of {', '.join(entry.filter)}" if entry.filter else ""
        raise CatalogError(f"{label}: reader {entry.reader!r} found no sequences{condition}")
    chosen_fields = _choose_fields(sequences, entry, label)
    chosen_fields.sort(key=lambda s: (s.field, natural_key(s.name)))
    result = [
        _only_one(list(members), entry, folder)
        for _, members in groupby(chosen_fields, key=lambda s: (s.field, s.name))
    ]
    spelling: dict[str, str] = {}
    for field in sorted({s.field for s in result}):
        first = spelling.setdefault(field.casefold(), field)
        if first != field:
            raise CatalogError(
                f"{label}: fields {first!r} and {field!r} differ only in case; on a file system that "
                "ignores case they would be one group"
            )
        if fault := group_fault(field):
            raise CatalogError(f"{label}: field {fault}")
    return result


def _code_of(name: str, reader: Reader, sequences: Iterable[LazySequence]) -> str:
    """Return the version of a shipped reader; hash the code of another, which may call shipped ones."""
    if (module := getattr(reader, "__module__", "")) in VERSIONS:
        return VERSIONS[module]
    classes = {cls for s in sequences for cls in type(s).__mro__ if issubclass(cls, LazySequence)}
    ours = {cls for cls in classes if cls.__module__.startswith(f"{__name__}.")}
    return hash_code(f"reader {name!r}", (reader, *(classes - ours)), ",".join(VERSIONS.values()))


MOST_NAMED = 4
"""Most files that an error names where several sequences have one name; there may be thousands."""


def _only_one(members: list[LazySequence], entry: Dataset, folder: Path) -> LazySequence:
    """Return the only sequence of a name; where there are several, a broken one that names their files."""
    first = members[0]
    if len(members) == 1:
        return first
    paths = [_file_of(s) for s in members]
    top = folder if folder.is_dir() else folder.parent
    # Relative, so that the reason stays the same when an archive is moved.
    counts = Counter(short_name(os.path.relpath(path, top)) if path else "no file" for path in sorted(paths))
    names = [path if count == 1 else f"{path} ({count} times)" for path, count in counts.items()]
    tail = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    reason = (
        f"{len(members)} sequences of one name: {', '.join(names[:MOST_NAMED])}{tail}. None is read; rename "
        "or remove all but one"
    )
    broken = BrokenSequence.of(first.name, first.field, min(paths), ReaderError(reason, min(paths)))
    return replace(broken, missing=entry.missing, most_bytes=entry.sequence_bytes)


def _file_of(sequence: LazySequence) -> str:
    """Return the first file of a sequence; empty where it has none."""
    if isinstance(sequence, ChannelsOf):
        return _file_of(sequence.source)
    if isinstance(sequence, BrokenSequence):
        return sequence.file
    return sequence.files[0].path if sequence.files else ""


def _quarantine_unsafe(sequences: Iterable[LazySequence], folder: Path) -> list[LazySequence]:
    """Replace sequences with an unsafe name, or a file outside of the data set's folder, by broken ones.

    A link within a data set could lead to any file of this machine. The data set's own folder may be a link.
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
                short_name(sequence.name), sequence.field, file, ReaderError(reason, file)
            )
        result.append(sequence)
    return result


@dataclass(frozen=True, kw_only=True)
class ChannelsOf(LazySequence):
    """A sequence made of some channels of another one."""

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
        """Decode the weights of the other sequence, which hold for all channels."""
        return self.source.read_weights()

    def read_time(self) -> np.ndarray | None:
        """Decode the time of the other sequence."""
        return self.source.read_time()


def _choose_fields(sequences: list[LazySequence], entry: Dataset, label: str) -> list[LazySequence]:
    """Select fields, or make new ones, as an entry's ``fields`` says."""
    if not entry.fields:
        return sequences
    present = sorted({s.field for s in sequences})
    choices = entry.fields if isinstance(entry.fields, dict) else {n: FieldChoice() for n in entry.fields}
    result: list[LazySequence] = []
    for name, choice in choices.items():
        source = choice.source or (name if name in present or len(present) > 1 else present[0])
        if source not in present or (source != name and isinstance(entry.fields, list)):
            missing = choice.source or name
            raise CatalogError(f"{label}: no field {missing!r}; found {', '.join(present)}")
        members = [s for s in sequences if s.field == source]
        if choice.channel is None:
            result += [replace(s, field=name) for s in members]
            continue
        channels = (choice.channel,) if isinstance(choice.channel, int) else tuple(choice.channel)
        if not channels or min(channels) < 0:
            raise CatalogError(f"{label}: field {name!r}: channels {channels}; expected indices from 0")
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
            for s in members
        ]
    return result
