"""Locations: paths and addresses, how one names another, and what is refused without being repeated."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.storage.address import AddressError, absolute, is_address, join, relative, resolve


def test_paths_are_made_absolute_and_addresses_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("a/frames.zarr") == str(tmp_path / "a/frames.zarr")
    assert absolute(Path("frames.zarr")) == str(tmp_path / "frames.zarr")
    assert absolute("s3://bucket/a/frames.zarr/") == "s3://bucket/a/frames.zarr"
    assert absolute("gs://bucket") == "gs://bucket"
    assert absolute(f"file://{tmp_path}/with%20space.zarr") == str(tmp_path / "with space.zarr")
    assert is_address("s3://bucket/x")
    assert not any(map(is_address, ("/s3/x", "s3", tmp_path, f"file://{tmp_path}")))


def test_a_location_names_another_so_that_both_may_be_moved_together(tmp_path):
    frames, distances = "s3://bucket/run/frames.zarr", "s3://bucket/run/distances.zarr"
    assert relative(frames, distances) == "../frames.zarr"
    for named, start in ((frames, distances), (distances, join("s3://bucket/run", "results"))):
        assert resolve(relative(named, start), start) == named
    here = str(tmp_path.resolve() / "d.zarr")
    for named, start in ((frames, here), (here, frames), (frames, "s3://other/d.zarr"), (here, here + "2")):
        assert resolve(relative(named, start), start) == named
    assert resolve(relative("s3://bucket/a", "gs://bucket/b"), "gs://bucket/b") == "s3://bucket/a"
    assert resolve("../../../x", "s3://bucket/a") == "s3://bucket/x"


@pytest.mark.parametrize(
    "address",
    [
        "s3://AKIA:hush/hush+hush@bucket/frames.zarr",
        "s3://hush@bucket/frames.zarr",
        "s3://AKIA:hush",
        "s3://bucket/frames.zarr?X-Amz-Signature=hush",
        "gs://bucket/frames.zarr#hush",
        "https://user:hush@host/frames.zarr",
        "file://user:hush@host/frames.zarr",
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(address):
    with pytest.raises(AddressError) as found:
        absolute(address)
    assert "hush" not in str(found.value)
    assert "expected" in str(found.value) or "no credentials" in str(found.value)


@pytest.mark.parametrize(
    "address", ["s3://", "s3:///x", "s3://bucket//x", "s3://bucket/../x", "ftp://host/x"]
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(AddressError, match="expected"):
        absolute(address)


def test_an_address_that_went_through_a_path_is_no_folder_of_that_name():
    with pytest.raises(AddressError, match="never a pathlib"):
        absolute(os.fspath(Path("s3://bucket/frames.zarr")))
