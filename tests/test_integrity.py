"""Each file of a small store exchanged with each other, deleted or flipped: nothing changes without a word.

Readers give the same figures, or name what is damaged; :func:`pipeline.verify.verify` finds all that would
change what a reader gives.
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
from matrices import archive_of, write_archive

from pipeline.correlate import correlate
from pipeline.distances import compute_distances
from pipeline.matrix import MatrixRequest, compute_matrix
from pipeline.matrix.neighbours import NeighboursError, find_neighbours
from pipeline.metrics.settings import Settings
from pipeline.report.matrix import gather_matrices
from pipeline.report.reading import ReportError, read_record
from pipeline.storage import store
from pipeline.verify import verify
from pipeline.verify.repair import repair
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

SETTINGS = Settings(metrics=("l2", "l1"), size=None, block=2)
MATRIX = Settings(metrics=("l2", "l1"), size=None, scope="dataset")
NAMED = (store.StoreError, ValueError)
"""What readers raise for what is damaged, with a message that names it."""


def distances_of(frames: Path, out: Path) -> Any:
    with Cluster(Profile(kind="none")) as cluster:
        return compute_distances(frames, out, SETTINGS, cluster=cluster)


def matrix_of(frames: Path, out: Path) -> Any:
    with Cluster(Profile(kind="none")) as cluster:
        compute_matrix(frames, out, MATRIX, MatrixRequest(tile=4), cluster=cluster)
        return compute_matrix(
            frames, out, MATRIX, MatrixRequest(together="all", groups=("A/*",), tile=4), cluster=cluster
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of two fields whose sequences have the same names; one frame is NaN."""
    folder = tmp_path_factory.mktemp("integrity")
    fields = archive_of(4, frames=4, size=8) | archive_of(4, key="A/rho", start=4, frames=4, size=8)
    fields["A/rho"] = dict(zip(fields["A/density"], fields["A/rho"].values(), strict=True))
    fields["A/rho"]["s2"][3] = np.nan
    frames = write_archive(folder / "frames.zarr", fields)
    distances_of(frames, folder / "distances.zarr")
    matrix_of(frames, folder / "matrix.zarr")
    correlate(folder / "distances.zarr", folder / "results", replicates=0)
    return folder


def alterations(root: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Delete and flip each file, and exchange each two of the same kind that differ; with a name."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    for path in files:
        yield f"delete {path.relative_to(root)}", path.unlink
        yield f"flip {path.relative_to(root)}", lambda path=path: flip(path)  # type: ignore[misc]
    for a, b in itertools.combinations(files, 2):
        if (a.name == "zarr.json") == (b.name == "zarr.json") and a.read_bytes() != b.read_bytes():
            name = f"exchange {a.relative_to(root)} and {b.relative_to(root)}"
            yield name, lambda a=a, b=b: exchange(a, b)  # type: ignore[misc]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def exchange(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def altered(root: Path, share: int = 1) -> Iterator[str]:
    """Make each alteration by itself, and take it back; of exchanges one in ``share``."""
    whole = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for number, (name, alter) in enumerate(list(alterations(root))):
        if name.startswith("exchange") and number % share:
            continue
        alter()
        yield name
        for path, data in whole.items():
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)


def outcome(read: Callable[[], Any]) -> Any:
    """What a reader gives, or None where it names damage."""
    try:
        return read()
    except NAMED:
        return None


def figures(path: Path, folder: Path) -> Any:
    """Correlations and what is left out with its reason; None where damage is named."""
    shutil.rmtree(folder, ignore_errors=True)
    report = correlate(path, folder, replicates=0)
    unfinished = len(report.left_out) and report.left_out.reason.str.contains("not computed").any()
    if report.damaged or unfinished:
        return None
    return report.correlations.to_csv(), report.left_out.to_csv(), report.notes


def near(path: Path) -> Any:
    """Neighbours in each matrix, by each metric; None where damage is named."""
    found = []
    for matrix, metric in itertools.product(("A/density", "A/rho", "together/all"), ("l1", "l2")):
        try:
            neighbours = find_neighbours(path, f"A/{matrix[2:] if matrix[0] == 'A' else 'rho'}/s1:2", 40,
                                         metric, matrix=matrix)  # fmt: skip
        except NeighboursError:
            return None
        if neighbours.left_out:
            return None
        found.append(neighbours)
    return found


def test_distances_that_are_exchanged_deleted_or_flipped_are_named(made: Path, tmp_path: Path):
    path = shutil.copytree(made / "distances.zarr", tmp_path / "distances.zarr")
    sound = figures(path, tmp_path / "sound")
    assert sound is not None
    silent, unseen = [], []
    for name in altered(path, share=61):
        found = outcome(lambda: figures(path, tmp_path / "again"))
        if found is not None and found != sound:
            silent.append(name)
        report = outcome(lambda: verify(path))
        if report is not None and report.whole and found is None:
            unseen.append(name)
    assert not silent
    assert not unseen


@pytest.mark.slow_faults
def test_tiles_that_are_exchanged_deleted_or_flipped_are_named(made: Path, tmp_path: Path):
    path = shutil.copytree(made / "matrix.zarr", tmp_path / "matrix.zarr")
    sound = near(path)
    assert sound is not None
    silent, unseen = [], []
    for name in altered(path, share=397):
        found = outcome(lambda: near(path))
        if found is not None and found != sound:
            silent.append(name)
        report = outcome(lambda: verify(path))
        if report is not None and report.whole and found is None:
            unseen.append(name)
    assert not silent
    assert not unseen


def test_the_archive_report_names_tiles_that_are_exchanged(made: Path, tmp_path: Path):
    path = shutil.copytree(made / "matrix.zarr", tmp_path / "matrix.zarr")
    assert gather_matrices(path).damaged == []
    exchange(path / "A/density/l2/c/0/1", path / "A/density/l2/c/0/2")
    assert {text.split(":")[1] for text in gather_matrices(path).damaged} == {
        " l2, tile 0, 1",
        " l2, tile 0, 2",
    }


def test_whole_folders_of_metrics_that_are_exchanged_are_named_and_computed_again(made: Path, tmp_path: Path):
    path = shutil.copytree(made / "distances.zarr", tmp_path / "distances.zarr")
    shutil.copytree(made / "frames.zarr", tmp_path / "frames.zarr")
    sound = figures(path, tmp_path / "sound")
    (path / "A/rho/l1").rename(tmp_path / "l1")
    (path / "A/rho/l2").rename(path / "A/rho/l1")
    (tmp_path / "l1").rename(path / "A/rho/l2")
    report = correlate(path, tmp_path / "again", replicates=0)
    assert len(report.damaged) == 8
    assert set(report.left_out.reason.str.contains("damaged distances")) == {True}
    damages = verify(path)
    assert {(damage.metric, damage.rows) for damage in damages.damages} == set(
        itertools.product(("l1", "l2"), [(row,) for row in range(4)])
    )
    assert repair(path, damages) == 8
    assert distances_of(tmp_path / "frames.zarr", path).computed == 8
    assert verify(path).whole
    assert figures(path, tmp_path / "once more") == sound


@pytest.mark.parametrize("text", ["content", "digest", "failure", "specification", "fingerprint"])
def test_records_that_are_lost_are_computed_again_by_the_next_run(made: Path, tmp_path: Path, text: str):
    path = shutil.copytree(made / "distances.zarr", tmp_path / "distances.zarr")
    shutil.copytree(made / "frames.zarr", tmp_path / "frames.zarr")
    sound = figures(path, tmp_path / "sound")
    for chunk in (path / f"A/rho/provenance/{text}/c").rglob("*"):
        if chunk.is_file():
            chunk.unlink()
    report = distances_of(tmp_path / "frames.zarr", path)
    assert report.computed > 0
    assert len(report.failures) == 2
    assert verify(path).whole
    assert figures(path, tmp_path / "again") == sound


def test_results_that_are_not_as_correlate_wrote_them_are_refused(made: Path, tmp_path: Path):
    folder = shutil.copytree(made / "results", tmp_path / "results")
    sound = read_record("results", folder)
    for name in altered(folder):
        found = outcome(lambda: read_record("results", folder))
        assert found is None or found == sound, name
    (folder / "correlations.json").write_text(json.dumps(sound | {"columns": ["B"]}))
    with pytest.raises(ReportError, match="not as correlate wrote it"):
        read_record("results", folder)
