"""Stores: blocks are whole, other people's folders stay as they are, one writer at a time."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from pipeline.storage import schema, store


def test_a_block_that_would_share_a_chunk_or_shard_is_refused(tmp_path):
    root = store.open_store(tmp_path / "s.zarr", "a")
    plain = store.create_array(root, "plain", shape=(10, 3), chunks=(4, 3), dims=("a", "b"), dtype="f8")
    sharded = store.create_array(
        root, "sharded", shape=(10, 3), chunks=(1, 3), shards=(4, 3), dims=("a", "b"), dtype="f8"
    )
    for array in (plain, sharded):
        store.write_rows(array, 4, np.ones((4, 3)))
        store.write_rows(array, 8, np.ones((2, 3)))  # the last block may be short
        for start, rows in ((2, 4), (4, 3), (8, 4)):
            with pytest.raises(store.StoreError, match="whole blocks of 4"):
                store.write_rows(array, start, np.ones((rows, 3)))
        assert np.isnan(store.read(array)[:4]).all()


def test_chunks_of_fill_values_are_written_and_count_as_there(tmp_path):
    root = store.open_store(tmp_path / "s.zarr", "a")
    array = store.create_array(root, "a", shape=(4,), chunks=(2,), dims=("a",), dtype="f8")
    store.write_rows(array, 0, np.full(2, np.nan))
    assert (tmp_path / "s.zarr" / "a" / "c" / "0").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "movies").mkdir()
    (tmp_path / "movies" / "film.partial").write_text("a film")
    with pytest.raises(store.StoreError, match="no Zarr store and not empty"):
        store.open_output(tmp_path / "movies", schema.FRAMES_STORE)
    (tmp_path / "file").write_text("a file")
    with pytest.raises(store.StoreError, match="found a file"), store.locked(tmp_path / "file"):
        pass
    assert [p.name for p in (tmp_path / "movies").iterdir()] == ["film.partial"]


def test_a_store_has_one_writer(tmp_path):
    first, second = store.locked(tmp_path / "s.zarr"), store.locked(tmp_path / "s.zarr")
    with first, pytest.raises(store.StoreError, match="another run"), second:
        pass
    with store.locked(tmp_path / "s.zarr"):
        pass


def test_stale_consolidated_metadata_hides_nothing(tmp_path):
    root = store.open_output(tmp_path / "s.zarr", schema.FRAMES_STORE)
    store.consolidate(tmp_path / "s.zarr")
    assert store.is_consolidated(tmp_path / "s.zarr")
    store.drop_consolidated(tmp_path / "s.zarr")
    store.create_array(root, "late", shape=(1,), chunks=(1,), dims=("a",), dtype="f8")
    assert "late" in store.open_store(tmp_path / "s.zarr")
    assert store.open_store(tmp_path / "s.zarr").attrs["kind"] == schema.FRAMES_STORE


def test_a_damaged_chunk_raises_and_xarray_reads_what_is_whole(tmp_path):
    path = tmp_path / "s.zarr"
    group = store.create_group(store.open_store(path, "a"), "d/f")
    rows = np.arange(8.0).reshape(4, 2)
    for name, shards in (("plain", None), ("sharded", (4, 2))):
        store.create_array(
            group, name, shape=(4, 2), chunks=(1, 2), shards=shards, dims=("a", "b"), dtype="f8"
        )
        store.write_rows(store.get_array(group, name), 0, rows)
    text = store.create_array(group, "text", shape=(4,), chunks=(4,), dims=("a",), dtype=str)
    store.write_rows(text, 0, np.array(list("abcd"), dtype=object))
    store.consolidate(path)
    with xr.open_datatree(path, engine="zarr") as tree:
        assert tree["d/f"]["text"].values.tolist() == list("abcd")
        assert np.array_equal(tree["d/f/plain"], rows)
        assert np.array_equal(tree["d/f/sharded"], rows)
    for chunk in (path / "d/f/plain/c/0/0", path / "d/f/sharded/c/0/0", path / "d/f/text/c/0"):
        whole = chunk.read_bytes()
        for damaged in (whole[:-3], whole[:20] + bytes([whole[20] ^ 4]) + whole[21:]):
            chunk.write_bytes(damaged)
            with pytest.raises(store.DamagedError, match="checksum"):
                store.read(store.get_array(group, chunk.relative_to(path / "d/f").parts[0]))
        chunk.write_bytes(whole)


# ---------------------------------------------------------------- small chunks of text


@pytest.mark.parametrize(
    ("shape", "chunks"), [((3, 10), (64, 4)), ((70, 9), (64, 2)), ((5,), (2,)), ((2, 0), (64, 2))]
)
def test_text_is_read_past_zarr_as_zarr_reads_it(tmp_path, rng, shape, chunks):
    root = store.open_store(tmp_path / "t.zarr", "a")
    dims = ("metric", "sequence")[: len(shape)]
    array = store.create_array(root, "texts", shape=shape, chunks=chunks, dims=dims, dtype=str)
    values = np.array(["é" * int(n) for n in rng.integers(0, 9, shape).ravel()], object).reshape(shape)
    assert (store.read(array) == "").all()
    if values.size:
        store.write_block(array, (0,) * len(shape), values)
    regions = [..., slice(1, 3), slice(None, -1), (slice(None), slice(2, 7)), (slice(0, 1), slice(4, None))]
    for region in regions[: 3 if len(shape) == 1 else None]:
        found = store.read(array, region)
        assert found.dtype == object
        np.testing.assert_array_equal(found, np.asarray(array[region]).astype(object))


def test_damaged_text_is_named_though_it_is_read_past_zarr(tmp_path):
    root = store.open_store(tmp_path / "t.zarr", "a")
    array = store.create_array(root, "texts", shape=(6,), chunks=(2,), dims=("sequence",), dtype=str)
    store.write_rows(array, 0, np.array(list("abcdef"), object))
    chunk = tmp_path / "t.zarr" / "texts" / "c" / "1"
    whole = chunk.read_bytes()
    for damaged in (whole[:5], whole[:-6] + b"x" + whole[-5:], b""):
        chunk.write_bytes(damaged)
        with pytest.raises(store.DamagedError, match="c/1"):
            store.read(array)
    chunk.write_bytes(whole)
    assert store.read(array).tolist() == list("abcdef")
