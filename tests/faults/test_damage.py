"""Chunks damaged on disk: seen, named, that sequence alone left out, and computed once they are whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import run_lsim
from matrices import archive_of, matrices_of, write_archive

from pipeline.distances import DistancesReport, compute_distances
from pipeline.metrics.settings import Settings
from pipeline.storage import schema, store
from pipeline.storage.checked_frames import content_hash
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

KEY = "A/density"
SETTINGS = Settings(metrics=("l2", "ssim"), size=None, block=2)
SEQUENCES = 4
DAMAGED = 2
"""The row that is damaged: it shares its block with the next."""


def compute(frames: Path, out: Path, **changes: object) -> DistancesReport:
    with Cluster(Profile(kind="none")) as cluster:
        return compute_distances(frames, out, SETTINGS.model_copy(update=changes), cluster=cluster)


def flip(chunk: Path) -> None:
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 4
    chunk.write_bytes(data)


def truncate(chunk: Path) -> None:
    chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 2])


def empty(chunk: Path) -> None:
    chunk.write_bytes(b"")


DAMAGES: list[Callable[[Path], None]] = [flip, truncate, empty, Path.unlink]


def chunk_of(frames: Path, row: int = DAMAGED, frame: int = 1) -> Path:
    return frames / KEY / "frames" / "c" / f"{row}/{frame}/0/0/0"


def without_checksums(frames: Path) -> None:
    """Write the frames again as stores of before had them: no checksum in any chunk."""
    group = store.open_store(frames, "r+")[KEY]
    values = store.read(group[schema.FRAMES])
    attributes = {"dimension_names": schema.FRAMES_DIMS, "compressors": store.COMPRESSION}
    chunks = (1, 1, *values.shape[2:])
    array = group.create_array(
        schema.FRAMES, shape=values.shape, chunks=chunks, dtype="f4", overwrite=True, **attributes
    )
    array[...] = values


def in_shards(frames: Path) -> None:
    """Write the frames again in shards of one sequence."""
    group = store.open_store(frames, "r+")[KEY]
    values = store.read(group[schema.FRAMES])
    store.delete(group, schema.FRAMES)
    rest = values.shape[2:]
    array = store.create_array(
        group,
        schema.FRAMES,
        shape=values.shape,
        chunks=(1, 1, *rest),
        shards=(1, *values.shape[1:2], *rest),
        dims=schema.FRAMES_DIMS,
        dtype="f4",
        fill_value=0,
    )
    store.write_rows(array, 0, values)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("undisturbed")
    frames = write_archive(folder / "frames.zarr", archive_of(SEQUENCES))
    compute(frames, folder / "d.zarr")
    return matrices_of(folder / "d.zarr")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("layout", ["chunks", "shards", "no checksums"])
def test_damaged_frames_are_named_and_leave_out_their_sequence_alone(tmp_path, undisturbed, damage, layout):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(SEQUENCES))
    out = tmp_path / "d.zarr"
    chunk = chunk_of(frames)
    if layout == "no checksums":
        without_checksums(frames)
    elif layout == "shards":
        in_shards(frames)
        chunk = chunk_of(frames, frame=0)
    whole = chunk.read_bytes()
    damage(chunk)

    report = compute(frames, out)
    assert {(f.sequence, f.metric) for f in report.failures} == {("s2", "l2"), ("s2", "ssim")}
    for failure in report.failures:
        assert failure.reason.startswith("damaged frames: "), failure.reason
        assert str(tmp_path) not in failure.reason
        if damage is Path.unlink:
            assert f"chunk {chunk.relative_to(frames / KEY / 'frames')} is missing" in failure.reason
        elif layout == "chunks":
            assert "chunk c/2/1/0/0/0 (from (2, 1, " in failure.reason
        elif layout == "shards" and damage is not empty:
            assert "chunk c/2/0/0/0/0 (from (2, " in failure.reason
        else:  # Zarr gives other values, or fill values, and no error
            assert "chunk c/2/1/0/0/0" in failure.reason or "not those that were converted" in failure.reason
    others = [row for row in range(SEQUENCES) if row != DAMAGED]
    for name, matrices in matrices_of(out).items():
        assert np.isnan(matrices[DAMAGED]).sum() == matrices[DAMAGED].size
        np.testing.assert_array_equal(matrices[others], undisturbed[name][others])
    fingerprints = store.read(store.open_store(out)[f"{KEY}/provenance/fingerprint"])
    assert ((fingerprints == "").any(axis=0) == (np.arange(SEQUENCES) == DAMAGED)).all()

    chunk.parent.mkdir(parents=True, exist_ok=True)
    chunk.write_bytes(whole)
    report = compute(frames, out)
    assert (report.computed, report.up_to_date, report.failures) == (2, 2 * (SEQUENCES - 1), [])
    for name, matrices in matrices_of(out).items():
        np.testing.assert_array_equal(matrices, undisturbed[name])


def test_frames_that_are_sound_but_of_something_else_are_seen(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(SEQUENCES))
    chunk_of(frames).write_bytes(chunk_of(frames, row=0).read_bytes())
    report = compute(frames, tmp_path / "d.zarr")
    assert {f.sequence for f in report.failures} == {"s2"}
    assert "not those that were converted" in report.failures[0].reason


def test_distances_that_are_there_survive_damage_to_their_frames(tmp_path, undisturbed):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(SEQUENCES))
    compute(frames, tmp_path / "d.zarr", metrics=("l2",))
    flip(chunk_of(frames))
    report = compute(frames, tmp_path / "d.zarr")
    assert [(f.sequence, f.metric) for f in report.failures] == [("s2", "ssim")]
    np.testing.assert_array_equal(matrices_of(tmp_path / "d.zarr")["l2"], undisturbed["l2"])


def test_the_range_of_a_data_set_leaves_out_damaged_frames(tmp_path):
    """As it leaves out sequences that could not be converted; what was compared says by which range."""
    archive = archive_of(SEQUENCES)
    archive[KEY]["s2"][1] *= 100
    frames = write_archive(tmp_path / "frames.zarr", archive)
    whole = chunk_of(frames).read_bytes()
    flip(chunk_of(frames))
    report = compute(frames, tmp_path / "d.zarr", scope="dataset")
    assert {f.sequence for f in report.failures} == {"s2"}
    kept = {KEY: {name: frames_of for name, frames_of in archive[KEY].items() if name != "s2"}}
    compute(write_archive(tmp_path / "kept.zarr", kept), tmp_path / "kept_d.zarr", scope="dataset")
    found, expected = matrices_of(tmp_path / "d.zarr"), matrices_of(tmp_path / "kept_d.zarr")
    np.testing.assert_array_equal(np.delete(found["l2"], DAMAGED, axis=0), expected["l2"])

    chunk_of(frames).write_bytes(whole)
    report = compute(frames, tmp_path / "d.zarr", scope="dataset")
    assert (report.computed, report.failures) == (2 * SEQUENCES, [])


def test_the_command_ends_with_code_3_and_names_the_chunk(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(2, frames=3))
    flip(chunk_of(frames, row=1))
    arguments = ("--out", tmp_path / "d.zarr", "--metrics", "l2", "--cluster", "none")
    code, text = run_lsim("distances", frames, *arguments)
    assert code == 3, text
    assert "1 distance matrices computed" in text
    assert "c/1/1/0/0/0" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("damage", [flip, truncate])
@pytest.mark.parametrize("name", [schema.PARAMETER, schema.CONTENT, schema.SEQUENCE])
def test_a_damaged_record_of_frames_is_one_line(tmp_path, damage, name):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(2, frames=3))
    damage(next(path for path in (frames / KEY / name / "c").rglob("*") if path.is_file()))
    with pytest.raises(store.DamagedError, match=f"{name}: chunk c/0"):
        compute(frames, tmp_path / "d.zarr")


def test_archives_of_tests_have_the_contents_of_conversion(tmp_path):
    group = store.open_store(write_archive(tmp_path / "f.zarr", archive_of(1)))[KEY]
    frames, parameter = store.read(group["frames"], 0), store.read(group["parameter"], 0)
    assert content_hash(frames, parameter) == store.read(group["content"], 0).item()
