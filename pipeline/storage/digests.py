"""Hashes that bind values in a store of results to their records.

A checksum finds a chunk with flipped bits or a lost end. It doesn't find a chunk in another's place, nor a
lost chunk that reads as its fill value. So each block has a *digest* beside its fingerprint, made of two
hashes. The second is the hash of the block's values. The first is the hash of the block's identity (group,
metric, sequence or tile), of all other texts in its record, and of the second. The record can be checked
without reading values, and the values once they are read.

Digests find accidents: 64 bits are enough for these, and are no protection against forgery.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

HALF = 16
"""Characters of each of the two hashes."""

_BETWEEN = "\x1f"


def hash_values(values: np.ndarray) -> str:
    """Hash the bytes of an array, in C order and little-endian.

    Parameters
    ----------
    values : ndarray
        Numbers.

    Returns
    -------
    str
        16 hexadecimal digits.
    """
    return xxhash.xxh3_64_hexdigest(bytes_of(values))


def hash_each(values: np.ndarray) -> list[str]:
    """Hash each row of an array, along its first axis, as :func:`hash_values` does."""
    content, size = bytes_of(values), values[:1].nbytes
    hexdigest = xxhash.xxh3_64_hexdigest
    return [hexdigest(content[start : start + size]) for start in range(0, size * len(values), size or 1)]


def bytes_of(values: np.ndarray) -> memoryview:
    """Return the bytes of an array as they are hashed: in C order and little-endian."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data


def bind(identity: bytes, texts: Mapping[str, str], values: str = "") -> str:
    """Make a digest of a record.

    Parameters
    ----------
    identity : bytes
        Group, metric, sequence or tile that the record belongs to.
    texts : mapping of str to str
        All other texts in the record, by name. An empty text is the same as none.
    values : str
        :func:`hash_values` of the values, and after it that of the mirror image where that has its own;
        empty where none count.
    """
    columns = {name: [text] for name, text in texts.items()}
    return bind_each([identity], columns, [values])[0] + values


def bind_each(
    identities: Iterable[bytes], texts: Mapping[str, Sequence[str]], values: Iterable[str]
) -> list[str]:
    """Make the first halves of the digests of several records, see :func:`bind`.

    Parameters
    ----------
    identities : iterable of bytes
    texts : mapping of str to sequence of str
        By name, the texts of all records.
    values : iterable of str
    """
    names = sorted(texts)
    prefixes = [f"{name}=" for name in names]
    columns = zip(*(texts[name] for name in names), strict=True)
    hexdigest = xxhash.xxh3_64_hexdigest
    hashes = []
    for identity, row, of_values in zip(identities, columns, values, strict=True):
        recorded = _BETWEEN.join([prefix + text for prefix, text in zip(prefixes, row, strict=True) if text])
        hashes.append(hexdigest(b"%b\n%b\n%b" % (identity, encode(recorded), of_values.encode())))
    return hashes


def binds(digest: str, identity: bytes, texts: Mapping[str, str]) -> bool:
    """Tell whether a digest belongs to a record, whatever the values are."""
    return digest != "" and digest == bind(identity, texts, digest[HALF:])


def is_of_no_values(digest: str) -> bool:
    """Tell whether a digest has no hash of values: its block failed."""
    return len(digest) == HALF


def binds_values(digest: str, values: np.ndarray) -> bool:
    """Tell whether a digest belongs to these values."""
    return digest[HALF : 2 * HALF] == hash_values(values)


def binds_mirror_image(digest: str, values: np.ndarray) -> bool:
    """Tell whether a digest belongs to the tile whose mirror image these values are.

    The mirror image of a directed metric has values of its own, whose hash is the third in the digest. Else
    it is the tile, transposed.
    """
    if len(digest) > 2 * HALF:
        return digest[2 * HALF :] == hash_values(values)
    return digest[HALF:] == hash_values(values.T)


def encode(text: str) -> bytes:
    """Encode a text that may hold lone surrogates, as names in archives of others may."""
    return text.encode("utf-8", "surrogatepass")


def identify(*names: str) -> bytes:
    """Make an identity from names."""
    return encode(_BETWEEN.join(names))


def identify_rows(sequences: Iterable[str], parameter: np.ndarray) -> list[bytes]:
    """Identify the sequences of a field, each by its name and its parameter.

    Parameters
    ----------
    sequences : iterable of str
    parameter : ndarray of shape (sequence, frame), float64
    """
    little = np.ascontiguousarray(parameter, dtype="<f8")
    return [identify("", str(name), "") + row.tobytes() for name, row in zip(sequences, little, strict=True)]


def hash_labels(labels: Mapping[str, np.ndarray]) -> bytes:
    """Hash the labels of some frames: columns of texts or numbers, (frame,), by name."""
    digest = xxhash.xxh3_64()
    for name in sorted(labels):
        column = labels[name]
        digest.update(identify(name, str(len(column)), ""))
        if column.dtype.kind in "OTU":
            digest.update(encode(_BETWEEN.join(map(str, column.tolist()))))
        else:
            digest.update(np.ascontiguousarray(column, dtype=column.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest().encode()


# ---------------------------------------------------------------- documents


def hash_document(document: Any) -> str:
    """Hash a value of JSON, whatever the order of its keys."""
    return xxhash.xxh3_128_hexdigest(encode(json.dumps(document, sort_keys=True, ensure_ascii=False)))


def sealed(document: Mapping[str, Any], *place: str) -> dict[str, Any]:
    """Add to a JSON object, under ``digest``, the hash of the rest and of the place where it is stored."""
    rest = {name: value for name, value in document.items() if name != "digest"}
    return rest | {"digest": hash_document([list(place), json.loads(json.dumps(rest))])}


def is_sealed(document: Mapping[str, Any], *place: str) -> bool:
    """Tell whether a JSON object is as :func:`sealed` made it, for that place."""
    return "digest" in document and sealed(document, *place)["digest"] == document["digest"]
