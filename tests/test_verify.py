"""A whole store is whole, each damage is named with what it belongs to, and repair brings it back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run_lsim
from matrices import archive_of, matrices_of, write_archive
from PIL import Image

from pipeline.convert import ConversionReport, convert
from pipeline.distances import DistancesReport, compute_distances
from pipeline.matrix import MatrixRequest, compute_matrix
from pipeline.metrics.settings import Settings
from pipeline.sources.catalog import open_catalog
from pipeline.storage import schema, store
from pipeline.verify import verify
from pipeline.verify.damage import Damage, VerifyReport
from pipeline.verify.repair import repair
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

KEY = "A/density"
SETTINGS = Settings(metrics=("l2", "ssim"), size=None, block=2)
SEQUENCES = 5


def flip(chunk: Path) -> None:
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 16
    chunk.write_bytes(data)


def truncate(chunk: Path) -> None:
    chunk.write_bytes(chunk.read_bytes()[:-7])


def compute(frames: Path, out: Path, **changes: Any) -> DistancesReport:
    with Cluster(Profile(kind="none")) as cluster:
        return compute_distances(frames, out, SETTINGS.model_copy(update=changes), cluster=cluster)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole stores, of which tests take copies."""
    folder = tmp_path_factory.mktemp("made")
    frames = write_archive(folder / "frames.zarr", archive_of(SEQUENCES, frames=4, size=16))
    compute(frames, folder / "d.zarr")
    compute_tiles(frames, folder / "a.zarr")
    return folder


@pytest.fixture
def frames(tmp_path: Path, made: Path) -> Path:
    return shutil.copytree(made / "frames.zarr", tmp_path / "frames.zarr")


@pytest.fixture
def distances(tmp_path: Path, frames: Path, made: Path) -> Path:
    return shutil.copytree(made / "d.zarr", tmp_path / "d.zarr")


@pytest.fixture
def tiles(tmp_path: Path, frames: Path, made: Path) -> Path:
    return shutil.copytree(made / "a.zarr", tmp_path / "a.zarr")


def chunk(path: Path, array: str, key: str) -> Path:
    return path / KEY / array / "c" / key


def single(report: VerifyReport) -> Damage:
    assert len(report.damages) == 1, report.damages
    return report.damages[0]


def test_whole_stores_are_whole_and_everything_is_read(frames: Path, distances: Path):
    seen: list[tuple[int, int]] = []
    report = verify(frames, progress=lambda done, total: seen.append((done, total)))
    assert (report.kind, report.whole, report.compared, report.unfinished) == ("frames", True, SEQUENCES, 0)
    assert report.chunks == 4 * SEQUENCES + 3
    assert seen[-1] == (SEQUENCES, SEQUENCES)
    report = verify(distances)
    assert (report.kind, report.whole, report.compared) == ("distances", True, 2 * SEQUENCES)
    one_thread = verify(distances, threads=1)
    assert (one_thread.chunks, one_thread.damages) == (report.chunks, [])


@pytest.mark.parametrize("changes", [{"scope": "dataset"}, {"pairs": "reference"}, {"scope": (-2.0, 2.0)}])
def test_fingerprints_of_other_settings_are_made_from_the_record(tmp_path: Path, frames: Path, changes):
    compute(frames, tmp_path / "d.zarr", metrics=("l2", "vi"), **changes)
    assert verify(tmp_path / "d.zarr").whole
    compute(frames, tmp_path / "d.zarr", **changes)
    assert verify(tmp_path / "d.zarr").whole


@pytest.mark.parametrize("which", [slice(2, 3), slice(None)])
def test_frames_that_no_metric_takes_are_no_damage(tmp_path: Path, which: slice):
    archive = archive_of(3, frames=4, size=16)
    archive[KEY]["s1"][which] = np.nan
    frames = write_archive(tmp_path / "frames.zarr", archive)
    assert compute(frames, tmp_path / "d.zarr", block=1).failures
    with Cluster(Profile(kind="none")) as cluster:
        settings = SETTINGS.model_copy(update={"scope": "dataset"})
        assert compute_matrix(
            frames, tmp_path / "a.zarr", settings, MatrixRequest(tile=4), cluster=cluster
        ).failures
    for path in (frames, tmp_path / "d.zarr", tmp_path / "a.zarr"):
        assert verify(path).damages == []


@pytest.mark.parametrize("damage", [flip, truncate])
def test_a_damaged_frame_is_named(frames: Path, damage: Callable[[Path], None]):
    damage(chunk(frames, "frames", "3/2/0/0/0"))
    found = single(verify(frames))
    assert (found.group, found.array, found.chunk) == (KEY, "frames", "c/3/2/0/0/0")
    assert (found.what, found.reason) == ("sequence s3, frame 2", "its checksum does not match")


def test_a_lost_or_exchanged_frame_is_named(frames: Path):
    chunk(frames, "frames", "0/1/0/0/0").unlink()
    assert (single(verify(frames)).chunk, single(verify(frames)).reason) == ("c/0/1/0/0/0", "missing")
    chunk(frames, "frames", "0/1/0/0/0").write_bytes(chunk(frames, "frames", "0/2/0/0/0").read_bytes())
    assert single(verify(frames)).reason.startswith("not as converted")
    assert single(verify(frames)).what == "sequence s0"


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_damaged_distances_are_named(frames: Path, distances: Path, damage: Callable[[Path], None]):
    """Flipped, cut short by a writer that died, lost: each under fingerprints that say done."""
    undisturbed = matrices_of(distances)
    damage(chunk(distances, "ssim", "1/0/0"))
    report = verify(distances)
    found = single(report)
    assert (found.array, found.chunk, found.what) == ("ssim", "c/1/0/0", "sequence s2, s3")
    assert found.reason == ("missing" if damage is Path.unlink else "its checksum does not match")

    assert repair(distances, report) == 2
    again = compute(frames, distances)
    assert (again.computed, again.up_to_date) == (2, 2 * SEQUENCES - 2)
    assert verify(distances).whole
    for name, matrices in matrices_of(distances).items():
        np.testing.assert_array_equal(matrices, undisturbed[name])


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (lambda m: np.full_like(m, np.nan), "NaN, and no failure"),
        (lambda m: m + np.arange(4), "not symmetric"),
        (lambda m: m + 1, "values other than zero on the diagonal"),
    ],
)
def test_distances_that_are_sound_but_wrong_are_found(frames: Path, distances: Path, values, reason: str):
    array = store.open_store(distances, "r+")[f"{KEY}/l2"]
    block = store.read(array, slice(2, 4))
    block[1] = values(block[1])
    store.write_rows(array, 2, block)
    report = verify(distances)
    assert (single(report).metric, single(report).rows) == ("l2", (3,))
    assert reason in single(report).reason
    assert repair(distances, report) == 1
    assert compute(frames, distances).computed == 1
    assert verify(distances).whole


def test_a_fingerprint_of_other_content_is_found(distances: Path):
    provenance = store.open_store(distances, "r+")[f"{KEY}/provenance"]
    contents = store.read(provenance["content"])
    contents[0, 1] = "of other frames"
    store.write_rows(provenance["content"], 0, contents)
    assert "fingerprint is not that of the content" in single(verify(distances)).reason


@pytest.mark.parametrize(
    "array",
    [
        "parameter",
        "sequence",
        *(f"provenance/{name}" for name in ("content", "fingerprint", "metric", "specification")),
    ],
)
def test_damaged_records_of_distances_are_repaired(frames: Path, distances: Path, array: str):
    undisturbed = matrices_of(distances)
    flip(next(path for path in sorted((distances / KEY / array / "c").rglob("*")) if path.is_file()))
    report = verify(distances)
    assert array in {damage.array for damage in report.damages}
    repair(distances, report)
    assert compute(frames, distances).failures == []
    assert verify(distances).whole
    for name, matrices in matrices_of(distances).items():
        np.testing.assert_array_equal(matrices, undisturbed[name])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_damaged_ranges_of_a_data_set_cost_no_distances(frames: Path, tmp_path: Path, damage):
    out = tmp_path / "d.zarr"
    compute(frames, out, scope="dataset")
    undisturbed = matrices_of(out)
    damage(chunk(out, "provenance/ranges", "0"))
    repair(out, verify(out))
    again = compute(frames, out, scope="dataset")
    assert (again.computed, again.failures) == (0, [])
    assert verify(out).whole
    for name, matrices in matrices_of(out).items():
        np.testing.assert_array_equal(matrices, undisturbed[name])


def test_a_lost_reason_is_found_by_what_has_none(tmp_path: Path):
    archive = archive_of(3, frames=4, size=16)
    archive[KEY]["s1"][2] = np.nan
    frames, out = write_archive(tmp_path / "frames.zarr", archive), tmp_path / "d.zarr"
    failures = compute(frames, out).failures
    flip(next(path for path in (out / KEY / "provenance" / "failure" / "c").rglob("*") if path.is_file()))
    report = verify(out)
    assert {"failure" in damage.array or damage.rows == (1,) for damage in report.damages} == {True}
    assert repair(out, report) == 2
    assert compute(frames, out).failures == failures
    assert verify(out).whole


def test_a_run_that_was_stopped_is_unfinished_and_not_damaged(frames: Path, distances: Path):
    provenance = store.open_store(distances, "r+")[f"{KEY}/provenance"]
    marks = store.read(provenance["fingerprint"])
    marks[:, 3:] = ""
    store.drop_consolidated(distances)  # it is written as a run ends
    store.write_rows(provenance["fingerprint"], 0, marks)
    report = verify(distances)
    assert (report.whole, report.compared, report.unfinished) == (True, 6, 4)


def test_a_store_of_before_has_no_checksums_and_must_decode(distances: Path):
    group = store.open_store(distances, "r+")[KEY]
    values = store.read(group["l2"])
    dims = schema.DISTANCE_DIMS
    array = group.create_array(
        "l2",
        shape=values.shape,
        chunks=(2, 4, 4),
        dtype="f8",
        fill_value=np.nan,
        compressors=store.COMPRESSION,
        dimension_names=dims,
        overwrite=True,
    )
    array[...] = values
    store.consolidate(distances)
    assert verify(distances).whole
    chunk(distances, "l2", "0/0/0").write_bytes(b"not blosc at all")
    assert single(verify(distances)).chunk == "c/0/0/0"


def test_other_stores_are_checked_by_chunk(tmp_path: Path):
    root = store.open_output(tmp_path / "e.zarr", "embeddings")
    group = root.require_group(KEY)
    array = store.create_array(group, "x", shape=(4, 4), chunks=(2, 4), dims=("frame", "f"), dtype="f4")
    store.write_rows(array, 0, np.ones((4, 4), "f4"))
    assert verify(tmp_path / "e.zarr").whole
    flip(tmp_path / "e.zarr" / KEY / "x" / "c" / "1" / "0")
    assert single(verify(tmp_path / "e.zarr")).chunk == "c/1/0"


# -- what is not there ---------------------------------------------------------------------------------


@pytest.mark.parametrize("array", ["parameter", "sequence"])
def test_lost_chunks_of_small_arrays_are_named_and_come_back(frames: Path, distances: Path, array: str):
    undisturbed = matrices_of(distances)
    lost = next(path for path in (distances / KEY / array / "c").rglob("*") if path.is_file())
    saved = lost.read_bytes()
    lost.unlink()
    report = verify(distances)
    found = single(report)
    assert (found.array, found.reason, found.rows) == (array, "missing", tuple(range(SEQUENCES)))
    repair(distances, report)
    compute(frames, distances)
    assert verify(distances).whole
    assert lost.read_bytes() == saved
    for name, matrices in matrices_of(distances).items():
        np.testing.assert_array_equal(matrices, undisturbed[name])


def cut(document: Path) -> None:
    document.write_bytes(document.read_bytes()[:-9])


def forget(document: Path) -> None:
    document.write_text("{}")


@pytest.mark.parametrize("kind", ["frames", "distances", "matrix"])
def test_each_metadata_document_that_is_lost_is_named_and_restored(
    frames: Path, distances: Path, tiles: Path, kind: str
):
    """Each in one of the ways that it may be lost, in turn; and one of a group and of an array in all."""
    store.open_store(frames, "r+").update_attributes({"kind": "frames"})
    store.consolidate(frames)
    path = {"frames": frames, "distances": distances, "matrix": tiles}[kind]
    documents = sorted(path.glob("*/**/zarr.json"))
    assert len(documents) == {"frames": 6, "distances": 14, "matrix": 18}[kind]
    ways = (Path.unlink, cut, forget)
    losses = [(document, ways[k % 3]) for k, document in enumerate(documents)]
    losses += [(path / KEY / "zarr.json", way) for way in ways] + [(documents[-1], way) for way in ways]
    for k, (document, damage) in enumerate(losses):
        saved = document.read_bytes()
        damage(document)
        report = verify(path)
        found = single(report)
        name = "/".join(filter(None, (found.group, found.array, found.chunk)))
        assert path / name == document
        assert found.reason == "missing" if damage is Path.unlink else "no metadata of Zarr" in found.reason
        if k < len(documents):
            document.write_bytes(saved)
            continue
        repair(path, report)
        assert json.loads(document.read_text()) == json.loads(saved)
        assert verify(path).whole
        store.consolidate(path)  # as the next run does


@pytest.mark.parametrize("damage", [Path.unlink, cut])
@pytest.mark.parametrize("kind", ["frames", "distances", "matrix"])
def test_lost_metadata_of_the_root_is_named_and_written_again(
    frames: Path, distances: Path, tiles: Path, kind: str, damage: Callable[[Path], None]
):
    path = {"frames": frames, "distances": distances, "matrix": tiles}[kind]
    damage(path / "zarr.json")
    code, text = run_lsim("verify", path, "--repair")
    assert code == 1
    assert f"{kind}: 0 chunks read" in text
    assert "damaged: zarr.json (its metadata)" in text
    assert "run 'lsim verify --repair' again" in text
    assert verify(path).whole
    if kind == "distances":
        assert compute(frames, path).computed == 0
    if kind == "matrix":
        assert compute_tiles(frames, path).tiles == 0


def test_a_metric_that_is_lost_whole_is_named_and_computed_again(frames: Path, distances: Path):
    undisturbed = matrices_of(distances)
    shutil.rmtree(distances / KEY / "ssim")
    report = verify(distances)
    found = single(report)
    assert (found.metric, found.reason, found.rows) == ("ssim", "missing", tuple(range(SEQUENCES)))
    assert repair(distances, report) == SEQUENCES
    assert compute(frames, distances).computed == SEQUENCES
    assert verify(distances).whole
    np.testing.assert_array_equal(matrices_of(distances)["ssim"], undisturbed["ssim"])
    # Nor is it missed where a run under way has removed the consolidated metadata.
    store.drop_consolidated(distances)
    shutil.rmtree(distances / KEY / "ssim")
    assert single(verify(distances)).metric == "ssim"


def test_a_document_of_the_root_that_is_cut_off_is_named(frames: Path, tmp_path: Path):
    cut(frames / "zarr.json")
    code, text = run_lsim("distances", frames, "--out", tmp_path / "new.zarr", "--metrics", "l2")
    assert code == 1
    assert "zarr.json: no metadata of Zarr" in " ".join(text.split())
    assert "Traceback" not in text


def test_a_run_that_was_stopped_before_its_arrays_were_there_is_no_damage(frames: Path, distances: Path):
    store.drop_consolidated(distances)
    for path, array in ((frames, "content"), (distances, "provenance/fingerprint")):
        shutil.rmtree(path / KEY / array)
        report = verify(path)
        assert (report.whole, report.compared) == (True, 0)


@pytest.mark.parametrize(("kind", "array"), [("frames", "frames"), ("distances", "l2"), ("other", "l2")])
def test_claims_of_more_chunks_than_anyone_can_read_are_refused(
    frames: Path, distances: Path, kind: str, array: str
):
    path = frames if kind == "frames" else distances
    store.drop_consolidated(distances)
    if kind == "other":
        store.open_store(path, "r+").update_attributes({"kind": "embeddings"})
    document = path / KEY / array / "zarr.json"
    claim = json.loads(document.read_text())
    claim["shape"][0] = 10**12
    document.write_text(json.dumps(claim))
    with pytest.raises(
        store.OversizedError, match=rf"{array}: shape \(1000000000000, .* chunks; 100000000 at"
    ):
        verify(path)


# -- archives -----------------------------------------------------------------------------------------


def compute_tiles(frames: Path, out: Path) -> Any:
    settings = Settings(metrics=("l2", "l1"), size=None, scope="dataset")
    with Cluster(Profile(kind="none")) as cluster:
        return compute_matrix(frames, out, settings, MatrixRequest(tile=8), cluster=cluster)


@pytest.mark.parametrize(
    ("key", "damage"),
    [
        ("0/1", flip),
        ("1/0", flip),
        ("2/2", flip),
        ("0/1", truncate),
        ("1/0", Path.unlink),
        ("2/2", Path.unlink),
    ],
)
def test_tiles_of_archives_are_compared_with_their_mirror_image_and_repaired(frames, tiles, key, damage):
    out = tiles
    assert (verify(out).kind, verify(out).compared, verify(out).whole) == ("matrix", 2 * 6, True)
    whole = store.read(store.open_store(out)[f"{KEY}/l2"])
    damage(chunk(out, "l2", key))
    report = verify(out)
    assert (single(report).array, single(report).chunk) == ("l2", f"c/{key}")
    assert repair(out, report) == 1
    assert compute_tiles(frames, out).tiles == 1
    np.testing.assert_array_equal(store.read(store.open_store(out)[f"{KEY}/l2"]), whole)
    assert verify(out).whole


def test_tiles_that_are_sound_but_wrong_are_found(frames: Path, tiles: Path):
    out = tiles
    saved = chunk(out, "l2", "0/1").read_bytes()
    chunk(out, "l2", "0/1").write_bytes(chunk(out, "l2", "1/2").read_bytes())
    assert "not symmetric" in single(verify(out)).reason
    chunk(out, "l2", "0/1").write_bytes(saved)
    array = store.open_store(out, "r+")[f"{KEY}/l1"]
    store.write_block(array, (8, 8), store.read(array, (slice(8, 16), slice(8, 16))) + 1)
    assert single(verify(out)).what == "tile 1, 1"
    for name in ("content", "fingerprint", "failure", "specification"):
        damaged = sorted(p for p in (out / KEY / "provenance" / name / "c").rglob("*") if p.is_file())
        if damaged:
            flip(damaged[0])
            repair(out, verify(out))
            compute_tiles(frames, out)
            assert verify(out).whole, name


# -- repair of frames ---------------------------------------------------------------------------------


def convert_images(folder: Path, out: Path) -> ConversionReport:
    """Six sequences of three images, in a catalog of their own."""
    for n in range(6):
        (folder / "data" / f"p{n}").mkdir(parents=True, exist_ok=True)
        for k in range(3):
            values = np.random.default_rng([n, k]).integers(0, 255, (6, 8, 3), dtype=np.uint8)
            path = folder / "data" / f"p{n}" / f"f{k:02d}.png"
            if not path.exists():
                Image.fromarray(values).save(path)
    (folder / "catalog.yaml").write_text(
        "name: mine\ntitle: Mine\nlicence: MIT\ndatasets:\n"
        "- {name: A, title: First, role: validation, source: {path: data}, reader: lsim}\npools: {All: [A]}\n"
    )
    return convert(open_catalog(folder / "catalog.yaml"), out)


TWO_A_SHARD = 2 * 3 * 6 * 8 * 3


@pytest.fixture(scope="module")
def converted_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "SHARD_BYTES", TWO_A_SHARD)
        convert_images(folder, folder / "frames.zarr")
    return folder


# What is cut short fails at its checksum as what is flipped does; of shards the table at the end, too.
@pytest.mark.parametrize(
    ("array", "damage"),
    [("frames", truncate), ("content", truncate)]
    + [
        (array, damage)
        for array in ("frames", "parameter", "content", "sequence", "source")
        for damage in (flip, Path.unlink)
    ],
)
def test_repaired_frames_are_converted_again(
    tmp_path: Path, converted_images: Path, monkeypatch, array: str, damage
):
    monkeypatch.setattr(store, "SHARD_BYTES", TWO_A_SHARD)
    out = shutil.copytree(converted_images / "frames.zarr", tmp_path / "frames.zarr")
    key = store.field_keys(store.open_store(out), schema.FRAMES)[0]
    before = {name: store.read(a) for name, a in store.open_store(out)[key].arrays()}
    chunks = sorted(path for path in (out / key / array / "c").rglob("*") if path.is_file())
    assert len(chunks) == 3
    damage(chunks[1])

    report = verify(out)
    rows = {row for found in report.damages for row in found.rows}
    assert rows == ({3} if array == "frames" and damage is flip else {2, 3}), report.damages
    assert repair(out, report) == len(rows)
    converted = convert_images(converted_images, out)
    assert (len(converted.converted) + len(converted.unchanged), converted.quarantined) == (6, [])
    assert verify(out).whole
    assert verify(out).unfinished == 0
    after = {name: store.read(a) for name, a in store.open_store(out)[key].arrays()}
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values, err_msg=name)


# -- the command --------------------------------------------------------------------------------------


def test_the_command_says_what_is_damaged(frames: Path, distances: Path):
    code, text = run_lsim("verify", distances)
    assert (code, "distances: " in text, "whole" in text) == (0, True, True), text
    flip(chunk(distances, "l2", "0/0/0"))
    code, text = run_lsim("verify", distances, "--repair")
    assert code == 1, text
    assert f"damaged: {KEY}/l2/c/0/0/0 (sequence s0, s1): its checksum does not match" in text
    assert "run 'lsim distances' again" in text
    code, text = run_lsim("verify", frames / "nothing")
    assert code == 1
    assert "no Zarr store here" in text


def test_correlate_and_report_name_damaged_distances(tmp_path: Path, distances: Path):
    results = tmp_path / "results"
    code, text = run_lsim("correlate", distances, "--out", results, "--replicates", 10)
    assert code == 0, text
    saved = chunk(distances, "l2", "1/0/0").read_bytes()
    flip(chunk(distances, "l2", "1/0/0"))
    for command in (("report", results), ("correlate", distances, "--out", tmp_path / "again")):
        code, text = run_lsim(*command)
        assert code == 1, text
        assert "error: " in text
        assert "l2: chunk c/1/0/0" in text
        assert "'lsim verify'" in text
        assert "Traceback" not in text
    chunk(distances, "l2", "1/0/0").write_bytes(saved)
    chunk(distances, "ssim", "1/0/0").unlink()
    code, text = run_lsim("correlate", distances, "--out", tmp_path / "again", "--replicates", 10)
    assert code == 3, text
    assert "chunk c/1/0/0 is missing" in text
