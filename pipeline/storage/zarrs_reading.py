"""Decode the chunks of shards by zarrs, a codec pipeline in Rust, where it is installed (extra ``fast``).

zarr-python spends about 0.3 ms on each chunk of a shard, whatever its size; a chunk is a frame, so that of
small frames most of the time to read is lost. zarrs needs a sixth. Values are the same; what it cannot read
is left to zarr-python, which names what is damaged.
"""

from __future__ import annotations

import functools
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
        None where zarrs is not installed or cannot read it: without shards, at an address, in another byte
        order than this machine's, or damaged.
    """
    store = array.store_path.store
    if array.shards is None or type(store) is not LocalStore or not array.dtype.isnative:
        return None
    pipeline_class = _pipeline_class()
    if pipeline_class is None:
        return None
    try:
        pipeline = pipeline_class.from_array_metadata_and_store(array.metadata, store)
        decoded: Any = AsyncArray(metadata=array.metadata, store_path=array.store_path, config=array.config)
        object.__setattr__(decoded, "codec_pipeline", pipeline)
        return np.asarray(zarr.Array(cast(Any, decoded))[region])
    except Exception:
        # Whatever it is, zarr-python reads the same bytes, or says what is wrong with them.
        return None
