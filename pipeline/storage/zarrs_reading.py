"""Decode the chunks of shards by zarrs, a codec pipeline in Rust, where it is installed (extra ``fast``).

zarr-python spends about 0.3 ms on each chunk of a shard, whatever its size; a chunk is a frame, so that of
small frames most of the time to read is lost. zarrs needs a sixth. Values are the same; what it cannot read
is left to zarr-python, which names what is damaged.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, cast

import numpy as np
import zarr
from zarr.core.array import AsyncArray
from zarr.storage import LocalStore


@functools.cache
def _pipeline_class() -> Any:
    """Import the pipeline; None where zarrs isn't installed."""
    try:
        from zarrs import ZarrsCodecPipeline
    except ImportError:
        return None
    return ZarrsCodecPipeline


def read_shards(array: zarr.Array, region: Any) -> np.ndarray | None:
    """Read a region of a sharded array in a folder.

    Parameters
    ----------
    array : Array
    region : slices and integers

    Returns
    -------
    ndarray or None
        None where zarrs is not installed or not meant for it: without shards, at an address, in another byte
        order than this machine's. What zarrs fails to read, zarr-python reads, with a warning, or raises the
        error for.
    """
    store = array.store_path.store
    if array.shards is None or type(store) is not LocalStore or not array.dtype.isnative:
        return None
    pipeline_class = _pipeline_class()
    if pipeline_class is None:
        return None
    try:
        return decode_shards(array, region, pipeline_class)
    except Exception as error:
        # zarr-python raises its own error for what is damaged.
        values = np.asarray(array[region])
        _warn_once(f"{type(error).__name__}: {error}", str(array.store_path))
        return values


def decode_shards(array: zarr.Array, region: Any, pipeline_class: Any) -> np.ndarray:
    """Read a region through a codec pipeline, which raises whatever it raises for damage."""
    pipeline = pipeline_class.from_array_metadata_and_store(array.metadata, array.store_path.store)
    decoded: Any = AsyncArray(metadata=array.metadata, store_path=array.store_path, config=array.config)
    object.__setattr__(decoded, "codec_pipeline", pipeline)
    return np.asarray(zarr.Array(cast(Any, decoded))[region])


@functools.cache
def _warn_once(fault: str, path: str) -> None:
    """Warn of an array that zarrs fails to read and zarr-python reads."""
    warnings.warn(f"{path}: zarrs cannot read it, and zarr-python does, more slowly: {fault}", stacklevel=4)
