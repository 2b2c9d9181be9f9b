"""Each file of a small store exchanged with others, deleted or flipped: nothing changes without a word.

Readers give the same values, or name what is damaged; :func:`pipeline.verify.verify` finds all that readers
name. What stages read is read here as they do, without what they then compute.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from matrices import archive_of, write_archive
from PIL import Image

from pipeline import cli
from pipeline.convert import convert
from pipeline.correlate import correlate
from pipeline.correlate.archive import read_archive
from pipeline.distances import compute_distances, list_failures
from pipeline.matrix import MatrixRequest, compute_matrix, embeddings, list_matrix_failures
from pipeline.matrix.embeddings import compute_embeddings, list_embedding_failures, load_embeddings
from pipeline.matrix.neighbours import find_neighbours
from pipeline.metrics.fields import checked_fields
from pipeline.metrics.settings import Settings
from pipeline.report.matrix import gather_matrices
from pipeline.report.reading import ReportError, read_record
from pipeline.sources.catalog import open_catalog
from pipeline.storage import metadata, recorded, schema, store
from pipeline.storage.checked_frames import read_sequence
from pipeline.storage.recorded import CheckedMatrix
from pipeline.verify import verify
from pipeline.verify.repair import repair
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

SETTINGS = Settings(metrics=("l2", "l1"), size=None, block=1)
MATRIX = Settings(metrics=("l2", "l1"), size=None, scope="dataset")
EMBEDDED = Settings(metrics=("l2",), size=None, scope="dataset")
KEYS = ("A/rho", "A/density")
NAMED = (store.StoreError, ValueError)
"""What readers raise for what is damaged, with a message that names it."""


def distances_of(frames: Path, out: Path, **changes: Any) -> Any:
    with Cluster(Profile(kind="none")) as cluster:
        return compute_distances(frames, out, SETTINGS.model_copy(update=changes), cluster=cluster)


def matrix_of(frames: Path, out: Path) -> Any:
    with Cluster(Profile(kind="none")) as cluster:
        return compute_matrix(frames, out, MATRIX, MatrixRequest(tile=3), cluster=cluster)


def embeddings_of(frames: Path, out: Path) -> Any:
    """Embeddings whose blocks are a sequence, and chunks a frame."""
    with pytest.MonkeyPatch.context() as patch, Cluster(Profile(kind="none")) as cluster:
        patch.setattr(embeddings, "BLOCK_BYTES", 1)
        return compute_embeddings(frames, out, EMBEDDED, cluster=cluster)


def frames_of(folder: Path) -> Any:
    """Convert two data sets of images whose sequences have the same names, a sequence a shard."""
    rng = np.random.default_rng(3)
    for name, n, k in itertools.product("AB", range(2), range(3)):
        path = folder / "images" / name / f"p{n}" / f"f{k:02}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)
    datasets = [
        {"name": name, "title": name, "role": "validation", "source": {"path": f"images/{name}"}}
        | {"reader": "lsim"}
        for name in "AB"
    ]
    catalog = {"name": "mine", "title": "Mine", "licence": "MIT", "datasets": datasets}
    (folder / "catalog.yaml").write_text(json.dumps(catalog | {"pools": {"All": ["A", "B"]}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "SHARD_BYTES", 1)
        return convert(open_catalog(folder / "catalog.yaml"), folder / "frames.zarr")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of two fields whose sequences have the same names; one frame is NaN."""
    folder = tmp_path_factory.mktemp("integrity")
    fields = archive_of(2, frames=3, size=8) | archive_of(2, key="A/rho", start=2, frames=3, size=8)
    fields["A/rho"] = dict(zip(fields["A/density"], fields["A/rho"].values(), strict=True))
    fields["A/rho"]["s1"][2] = np.nan
    frames = write_archive(folder / "frames.zarr", fields)
    distances_of(frames, folder / "distances.zarr")
    matrix_of(frames, folder / "matrix.zarr")
    embeddings_of(frames, folder / "embeddings.zarr")
    correlate(folder / "distances.zarr", folder / "results", replicates=0)
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "made")


# -- each file ----------------------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def alterations(
    root: Path, below: Path, *, documents: bool
) -> Iterator[tuple[str, dict[Path, bytes | None]]]:
    """Delete and flip each chunk, or document of metadata, and exchange it: a name, and what files hold then.

    Those below a folder, each with one of the whole store: in turn the next, often of the same array, and the
    one that is half of them on, of another field.
    """
    files = sorted(p for p in root.rglob("*") if p.is_file() and (p.name == "zarr.json") == documents)
    content = {path: path.read_bytes() for path in files}
    for k, path in enumerate(files):
        if not path.is_relative_to(below):
            continue
        data = content[path]
        yield f"delete {path.relative_to(root)}", {path: None}
        yield f"flip {path.relative_to(root)}", {path: flipped(data)}
        other = files[(k + (1 if k % 2 else len(files) // 2)) % len(files)]
        if content[other] != data:
            name = f"exchange {path.relative_to(root)} and {other.relative_to(root)}"
            yield name, {path: content[other], other: data}


def altered(root: Path, below: Path | None = None, *, documents: bool = False) -> Iterator[str]:
    """Make each alteration by itself, and take it back."""
    for name, changes in list(alterations(root, below or root, documents=documents)):
        before = {path: path.read_bytes() for path in changes}
        for path, data in changes.items():
            path.unlink() if data is None else path.write_bytes(data)
        yield name
        for path, data in before.items():
            path.write_bytes(data)


def outcome(read: Callable[[], Any]) -> Any:
    """Give what a reader gives, or None where it names damage."""
    try:
        return read()
    except NAMED:
        return None


def assert_nothing_is_silent(path: Path, read: Callable[[], Any], changes: Iterator[str]) -> None:
    """Alter files of a store: its reader gives the same, or it and ``verify`` name damage."""
    sound = read()
    assert sound is not None
    silent, unseen = [], []
    for name in changes:
        values = outcome(read)
        if values is None:
            report = outcome(lambda: verify(path, threads=1))
            unseen += [name] if report is not None and report.whole else []
        elif values != sound:
            silent.append(name)
    assert not silent
    assert not unseen
    assert read() == sound


def read_distances(path: Path) -> Any:
    """Read what correlate does; None where it names damage, or what is not computed."""
    archive = read_archive(str(path))
    problems = [field.problems for field in archive.fields]
    if archive.damaged or recorded.NOT_COMPUTED in str(problems):
        return None
    fields = [
        (field.sequences, field.parameter.tolist(), {k: v.tobytes() for k, v in field.matrices.items()})
        for field in archive.fields
    ]
    specifications = [text for _, text in store.specifications(path)]
    return fields, problems, archive.metrics, archive.pools, specifications


def read_tiles(path: Path) -> Any:
    """Read the matrices as neighbours and maps do; None where tiles are left out."""
    root = store.open_store(path)
    matrices = []
    for key, metric in itertools.product(KEYS, ("l1", "l2")):
        matrix = CheckedMatrix(root, key, metric)
        matrices.append(matrix.whole().tobytes())
        if matrix.left_out:
            return None
    return matrices


def read_embeddings(path: Path) -> Any:
    fields = []
    for key in KEYS:
        dataset, left_out = load_embeddings(path, key)
        if left_out:
            return None
        fields.append({str(name): values.values.tolist() for name, values in dataset.variables.items()})
    return str(fields)


def read_frames(path: Path) -> Any:
    """Read the frames as distances, matrices and embeddings do."""
    root = store.open_store(path)
    fields = []
    for key in checked_fields(root, path):
        group = store.get_group(root, key)
        names, contents = (
            store.read(store.get_array(group, n)).tolist() for n in (schema.SEQUENCE, schema.CONTENT)
        )
        parameter = store.read(store.get_array(group, schema.PARAMETER)).tolist()
        frames = [read_sequence(group, row, content).tobytes() for row, content in enumerate(contents)]
        fields.append((key, sorted(zip(names, parameter, frames, strict=True))))
    return fields


def test_metadata_that_is_exchanged_deleted_or_flipped_is_named(copied: Path):
    path = copied / "distances.zarr"
    assert_nothing_is_silent(
        path, lambda: read_distances(path), altered(path, path / "A/rho", documents=True)
    )


def test_distances_that_are_exchanged_deleted_or_flipped_are_named(copied: Path):
    path = copied / "distances.zarr"
    assert_nothing_is_silent(path, lambda: read_distances(path), altered(path, path / "A/rho"))


def test_tiles_that_are_exchanged_deleted_or_flipped_are_named(copied: Path):
    path = copied / "matrix.zarr"
    assert_nothing_is_silent(path, lambda: read_tiles(path), altered(path, path / "A/rho"))


def test_embeddings_that_are_exchanged_deleted_or_flipped_are_named(copied: Path):
    path = copied / "embeddings.zarr"
    assert_nothing_is_silent(path, lambda: read_embeddings(path), altered(path, path / "A/rho"))


@pytest.mark.parametrize("documents", [False, True])
def test_frames_that_are_exchanged_deleted_or_flipped_are_named(tmp_path: Path, documents: bool):
    frames_of(tmp_path)
    path = tmp_path / "frames.zarr"
    changes = altered(path, path / "A", documents=documents)
    assert_nothing_is_silent(path, lambda: read_frames(path), changes)


def test_frames_that_are_converted_again_are_whole_or_named(tmp_path: Path):
    """Conversion reads no frames of the store; what it then leaves is whole, or readers name it."""
    frames_of(tmp_path)
    path = tmp_path / "frames.zarr"
    sound = read_frames(path)
    whole = shutil.copytree(path, tmp_path / "whole.zarr")
    for change in altered(path, path / "A"):
        outcome(lambda: frames_of(tmp_path))
        assert outcome(lambda: read_frames(path)) in (None, sound), change
        shutil.rmtree(path)
        shutil.copytree(whole, path)


# -- stages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("array", ["frames", "parameter", "sequence", "content", "source", "zarr.json"])
def test_stages_that_read_damaged_frames_end_with_another_code_than_0(
    tmp_path: Path, array: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    frames_of(tmp_path)
    path, out = tmp_path / "frames.zarr", tmp_path / "distances.zarr"
    distances_of(path, out, metrics=("l1",))
    correlate(out, tmp_path / "results", replicates=0)
    first, second = (sorted(p for p in (path / d).rglob("*") if p.is_file()) for d in "AB")
    chosen = [k for k, p in enumerate(first) if array in p.relative_to(path).parts[2:]]
    a, b = first[chosen[-1]], second[chosen[0]]
    a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
    assert a_bytes != b_bytes or array in ("parameter", "sequence")
    a.write_bytes(b_bytes)
    b.write_bytes(flipped(a_bytes))
    for arguments in (
        ("distances", path, "--out", tmp_path / "new.zarr", "--metrics", "l1", "--cluster", "none"),
        ("report", tmp_path / "results"),
        ("verify", path),
    ):
        monkeypatch.setattr("sys.argv", ["lsim", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code not in (0, None), (arguments, capfd.readouterr())


def exchange(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def test_neighbours_and_the_archive_report_name_tiles_that_are_exchanged(copied: Path):
    path = copied / "matrix.zarr"
    assert gather_matrices(path).damaged == []
    exchange(path / "A/density/l2/c/0/1", path / "A/density/l2/c/1/1")
    tiles = {" l2, tile 0, 1", " l2, tile 1, 1"}
    assert {text.split(":")[1] for text in gather_matrices(path).damaged} == tiles
    neighbours = find_neighbours(path, "A/density/s0:0", metric="l2")
    assert {text.split(":")[1] for text in neighbours.left_out} == {" l2, tile 0, 1"}


def test_whole_folders_of_metrics_that_are_exchanged_are_named_and_computed_again(copied: Path):
    path = copied / "distances.zarr"
    sound = read_distances(path)
    (path / "A/rho/l1").rename(copied / "l1")
    (path / "A/rho/l2").rename(path / "A/rho/l1")
    (copied / "l1").rename(path / "A/rho/l2")
    report = correlate(path, copied / "again", replicates=0)
    assert len(report.damaged) == 4
    assert set(report.left_out[report.left_out.field == "rho"].reason.str.contains("damaged distances")) == {
        True
    }
    damages = verify(path)
    assert {(damage.metric, damage.rows) for damage in damages.damages} == set(
        itertools.product(("l1", "l2"), [(row,) for row in range(2)])
    )
    assert repair(path, damages) == 4
    assert distances_of(copied / "frames.zarr", path).computed == 4
    assert verify(path).whole
    assert read_distances(path) == sound


@pytest.mark.parametrize("text", ["content", "digest", "failure", "specification", "fingerprint"])
def test_records_that_are_lost_are_computed_again_by_the_next_run(copied: Path, text: str):
    path = copied / "distances.zarr"
    sound = read_distances(path)
    for chunk in (path / f"A/rho/provenance/{text}/c").rglob("*"):
        if chunk.is_file():
            chunk.unlink()
    report = distances_of(copied / "frames.zarr", path)
    assert report.computed > 0
    assert len(report.failures) == 2
    assert verify(path).whole
    assert read_distances(path) == sound


def test_embeddings_whose_record_or_values_are_damaged_are_computed_again(copied: Path):
    path = copied / "embeddings.zarr"
    sound = read_embeddings(path)
    (name,) = set((path / "A/rho").iterdir()) & {path / "A/rho" / "values", path / "A/rho" / "features"} or {
        next(p for p in (path / "A/rho").iterdir() if (p / "c").exists() and p.name not in recorded.LABELS)
    }
    chunks = sorted(p for p in name.rglob("*") if p.is_file() and p.name != "zarr.json")
    exchange(chunks[0], chunks[4])
    dataset, left_out = load_embeddings(path, "A/rho")
    assert [text.split(":")[1] for text in left_out] == [
        f" block {k}, frames {3 * k} to {3 * k + 2}" for k in (0, 1)
    ]
    assert np.isnan(dataset[name.name].values).all()
    report = verify(path)
    assert {damage.rows for damage in report.damages} == {(0,), (1,)}
    assert repair(path, report) == 2
    assert embeddings_of(copied / "frames.zarr", path).blocks == 2
    # A record is compared by each run, without repair.
    exchange(path / "A/rho/provenance/digest/c/0", path / "A/rho/provenance/digest/c/1")
    again = embeddings_of(copied / "frames.zarr", path)
    assert (again.blocks, again.unrecorded) == (2, 2)
    assert verify(path).whole
    assert read_embeddings(path) == sound


def test_embeddings_of_a_version_without_digests_are_computed_again(copied: Path):
    path = copied / "embeddings.zarr"
    for key in KEYS:
        shutil.rmtree(path / key / "provenance/digest")
    assert embeddings_of(copied / "frames.zarr", path).blocks == 4
    assert verify(path).whole


# -- failures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "list_all"),
    [
        ("distances.zarr", list_failures),
        ("matrix.zarr", list_matrix_failures),
        ("embeddings.zarr", list_embedding_failures),
    ],
)
def test_reasons_of_failures_that_are_not_what_was_written_are_not_listed(
    copied: Path, name: str, list_all: Callable[[Path], list[Any]]
):
    path = copied / name
    sound = list_all(path)
    assert "NaN" in str(sound)
    assert "damaged" not in str(sound)
    for key in KEYS:
        for change in altered(path, path / key / "provenance/failure/c"):
            failures = outcome(lambda: list_all(path))
            if failures is not None and failures != sound:
                assert any("damaged" in failure.reason for failure in failures), change
                assert not verify(path, threads=1).whole, change


@pytest.mark.parametrize(
    ("make", "list_all"),
    [
        (distances_of, list_failures),
        (matrix_of, list_matrix_failures),
        (embeddings_of, list_embedding_failures),
    ],
)
def test_reasons_of_what_is_not_done_are_compared_as_well(
    tmp_path: Path, make: Callable[[Path, Path], Any], list_all: Callable[[Path], list[Any]]
):
    """Damaged frames have no fingerprints, and a reason: that of another sequence is not taken for theirs."""
    frames = write_archive(tmp_path / "frames.zarr", archive_of(3, frames=2, size=8))
    for row in range(2):
        (frames / f"A/density/frames/c/{row}/{row}/0/0/0").unlink()
    path = tmp_path / "results.zarr"
    make(frames, path)
    sound = list_all(path)
    assert "is missing" in str(sound)
    assert verify(path).whole
    for change in altered(path, path / "A/density/provenance/failure/c"):
        failures = outcome(lambda: list_all(path))
        assert failures is None or failures == sound or "is not what was written" in str(failures), change
        assert failures == sound or not verify(path, threads=1).whole, change


# -- attributes ---------------------------------------------------------------------------------------

STORES = ("frames.zarr", "distances.zarr", "matrix.zarr", "embeddings.zarr")


@pytest.mark.parametrize("name", STORES)
def test_attributes_that_users_add_are_no_damage(copied: Path, name: str):
    path = copied / name
    if name == "frames.zarr":
        store.consolidate(path)
    zarr.open_group(path, mode="r+").attrs["note"] = "of the third run"
    for place in ("A", "A/density", f"A/density/{schema.PARAMETER}"):
        zarr.open(path, path=place, mode="r+").attrs["note"] = {"checked": ["by", "me"]}
    assert verify(path).whole
    metadata.check_documents(store.open_store(path))
    assert xr.open_datatree(path, engine="zarr").attrs["note"] == "of the third run"
    if name == "distances.zarr":
        assert read_distances(path) == read_distances(copied / name)
        assert distances_of(copied / "frames.zarr", path).computed == 0
        assert store.open_store(path).attrs["note"] == "of the third run"
        assert verify(path).whole


@pytest.mark.parametrize("name", STORES[1:])
def test_a_root_without_the_digest_of_its_metadata_is_found(copied: Path, name: str):
    path = copied / name
    document = json.loads((path / "zarr.json").read_text())
    del document["attributes"]["digest"]
    (path / "zarr.json").write_text(json.dumps(document))
    (damage,) = verify(path).damages
    assert "without the digest" in damage.reason
    with pytest.raises(store.DamagedError, match="run again what made this store"):
        metadata.check_documents(store.open_store(path))
    make = {"distances.zarr": distances_of, "matrix.zarr": matrix_of, "embeddings.zarr": embeddings_of}[name]
    make(copied / "frames.zarr", path)
    assert verify(path).whole


def test_a_run_that_was_stopped_leaves_no_digest_and_is_no_damage(copied: Path):
    path = copied / "distances.zarr"
    store.drop_consolidated(path)
    assert verify(path).whole
    metadata.check_documents(store.open_store(path))


# -- tables -------------------------------------------------------------------------------------------


def test_results_that_are_not_as_correlate_wrote_them_are_refused(copied: Path):
    folder = copied / "results"
    sound = read_record("results", folder)
    for name in altered(folder):
        record = outcome(lambda: read_record("results", folder))
        assert record is None or record == sound, name
    (folder / "correlations.json").write_text(json.dumps(sound | {"columns": ["B"]}))
    with pytest.raises(ReportError, match="not as correlate wrote it"):
        read_record("results", folder)
