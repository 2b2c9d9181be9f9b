"""The nearest frames of an archive: which they are, what they are called, and what is read for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import run_lsim
from synthetic import make_distances, make_frames, make_matrix, record_matrices

from pipeline.matrix import neighbours
from pipeline.matrix.neighbours import NeighboursError, find_frame, find_neighbours
from pipeline.storage import schema, store


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two matrices of one field each and one of both, with a frame that has no distances."""
    matrices = {
        "Smoke/density": {"Smoke/density": 4},
        "Shapes/rgb": {"Shapes/rgb": 3},
        "together/both": {"Smoke/density": 4, "Shapes/rgb": 3},
    }
    failures = {"Smoke/density/smoke2:5": "frames hold NaN or infinity"}
    return make_matrix(tmp_path_factory.mktemp("made") / "matrix.zarr", matrices, failures=failures)


def matrix(path: Path, key: str, metric: str = "lsim") -> np.ndarray:
    return store.read(store.get_array(store.open_store(path), f"{key}/{metric}"))


@pytest.mark.parametrize("columns_together", [1, 16, 40, 10_000])
def test_the_nearest_are_those_of_the_row(archive, monkeypatch, columns_together):
    monkeypatch.setattr(neighbours, "COLUMNS_TOGETHER", columns_together)
    found = find_neighbours(archive, "smoke1:3", 7, matrix="Smoke/density")
    row = matrix(archive, "Smoke/density")[14].astype(float)
    row[14] = np.nan
    expected = np.argsort(row)[:7]
    assert [near.frame.row[0] for near in found.nearest] == expected.tolist()
    assert [near.distances["lsim"] for near in found.nearest] == row[expected].tolist()
    first = found.nearest[0].frame
    assert first.name == f"Smoke/density/smoke{expected[0] // 11}:{expected[0] % 11}"
    assert first.parameter == pytest.approx(expected[0] % 11 / 10)
    assert (found.compared, found.without_distance) == (43, 1)


def test_only_the_row_s_chunks_are_read(tmp_path):
    path = make_matrix(tmp_path / "matrix.zarr", {"A/x": {"A/x": 8}}, tile=16)
    wanted = find_neighbours(path, "a3:2", 20)
    # Frame 35 is in the third row of tiles; all others are damaged.
    for chunk in path.glob("A/x/*/c/*/*"):
        if chunk.parts[-2] != "2":
            chunk.write_bytes(b"damaged")
    assert find_neighbours(path, "a3:2", 20) == wanted
    with pytest.raises(neighbours.NeighboursError, match=r"lsim.*c/0/0"):
        find_neighbours(path, "a0:2", 20)


def test_every_metric_has_its_distances_and_one_orders(archive):
    by_lsim = find_neighbours(archive, "shapes0:4", 3, matrix="Shapes/rgb")
    assert by_lsim.metric == "lsim"
    by_good = find_neighbours(archive, "shapes0:4", 3, "good", matrix="Shapes/rgb")
    assert by_good.metric == "good"
    for near in (*by_lsim.nearest, *by_good.nearest):
        assert near.distances["lsim"] == pytest.approx(2 * near.distances["good"])


@pytest.mark.parametrize("columns_together", [16, 10_000])
def test_own_sequence_may_be_left_out(archive, monkeypatch, columns_together):
    monkeypatch.setattr(neighbours, "COLUMNS_TOGETHER", columns_together)
    found = find_neighbours(archive, "smoke1:3", 100, matrix="together/both", other_sequences=True)
    assert len(found.nearest) == 77 - 11 - 1
    assert "smoke1" not in {near.frame.sequence for near in found.nearest}
    assert found.compared == 66


def test_of_equally_near_ones_the_first_in_the_matrix_comes_first(tmp_path):
    path = make_matrix(tmp_path / "matrix.zarr", {"A/x": {"A/x": 2}}, frames=4, tile=4)
    root = store.open_store(path, "r+")
    for name in ("good", "lsim"):
        store.write_rows(store.get_array(root, f"A/x/{name}"), 0, np.ones((8, 8), np.float32) - np.eye(8))
    record_matrices(path, "A/x")
    found = find_neighbours(path, "a0:2", 5)
    assert [near.frame.row[0] for near in found.nearest] == [0, 1, 3, 4, 5]


def test_any_end_of_a_name_that_is_of_one_frame_will_do(archive):
    for name in ("Smoke/density/smoke3:7", "density/smoke3:7", "smoke3:7"):
        assert find_frame(archive, name, "Smoke/density").name == "Smoke/density/smoke3:7"
    assert find_frame(archive, "smoke3", "Smoke/density").number == 0
    with pytest.raises(NeighboursError, match="no frame 'moke3:7'"):
        find_frame(archive, "moke3:7")


def test_a_name_of_several_frames_lists_them(tmp_path):
    path = make_matrix(tmp_path / "matrix.zarr", {f"A/{f}": {f"A/{f}": 2} for f in "xyz"})
    with pytest.raises(NeighboursError, match="'a1:2' may be any of A/x/a1:2, A/y/a1:2, A/z/a1:2: give more"):
        find_frame(path, "a1:2")
    assert find_frame(path, "y/a1:2").field == "A/y"


def test_a_frame_of_several_matrices_lists_those(archive):
    with pytest.raises(NeighboursError, match="in several matrices, Smoke/density, together/both: choose"):
        find_frame(archive, "smoke1:3")
    with pytest.raises(NeighboursError, match="no matrix 'both'; there are Shapes/rgb, Smoke/density, tog"):
        find_frame(archive, "smoke1:3", "both")


def test_names_with_slashes_and_colons(tmp_path):
    path = make_matrix(tmp_path / "matrix.zarr", {"A/x": {"A/x": 3}}, frames=2, tile=4)
    root = store.open_store(path, "r+")
    names = np.array(["run/a:1", "run/a:1", "run/a", "run/a", "<b>", "<b>"], object)
    store.write_rows(store.get_array(root, "A/x/sequence"), 0, names)
    assert find_frame(path, "a:1:1").row == (1,)
    assert find_frame(path, "a:0").row == (2,)
    assert find_frame(path, "<b>").row == (4,)
    with pytest.raises(NeighboursError, match=r"'a:1' may be any of A/x/run/a:1:0, A/x/run/a:1"):
        find_frame(path, "a:1")


def test_unknown_names_suggest_near_ones(archive):
    with pytest.raises(
        NeighboursError, match=r"no frame 'smok3:1'; did you mean one of .*Smoke/density/smoke3"
    ):
        find_frame(archive, "smok3:1")
    with pytest.raises(NeighboursError, match="Smoke/density/smoke3 has frames 0 to 10, and no 'smoke3:11'"):
        find_frame(archive, "smoke3:11")
    with pytest.raises(NeighboursError, match="no frame 'zzzzzzzz'; there are frames of Shapes/rgb/shapes0"):
        find_frame(archive, "zzzzzzzz")


def test_a_frame_without_distances_says_why(archive):
    with pytest.raises(NeighboursError, match="smoke2:5 has no distances by lsim: frames hold NaN or infin"):
        find_neighbours(archive, "smoke2:5", matrix="Smoke/density")


def test_what_is_asked_for_must_be_there(archive):
    with pytest.raises(NeighboursError, match="no distances by 'ssim'; there are those by good, lsim"):
        find_neighbours(archive, "smoke1", metric="ssim", matrix="Smoke/density")
    with pytest.raises(NeighboursError, match="expected at least 1 neighbour, found 0"):
        find_neighbours(archive, "smoke1", 0)


def test_frames_of_a_sequence_have_neighbours_in_it(tmp_path):
    path = make_distances(tmp_path / "distances.zarr", {"Smoke/density": 3})
    found = find_neighbours(path, "smoke1:4", 3, "good")
    row = matrix(path, "Smoke/density", "good")[1, 4].copy()
    row[4] = np.inf
    assert [near.frame.number for near in found.nearest] == np.argsort(row)[:3].tolist()
    assert {near.frame.sequence for near in found.nearest} == {"smoke1"}
    assert found.nearest[0].frame.parameter == pytest.approx(found.nearest[0].frame.number / 10)
    with pytest.raises(NeighboursError, match="own sequence alone; a matrix of all frames is made by 'lsim"):
        find_neighbours(path, "smoke1:4", other_sequences=True)


def test_other_stores_are_refused(tmp_path):
    path = make_frames(tmp_path / "frames.zarr", {"A/x": (2, "float32", 1)})
    store.set_attributes(store.open_store(path, "r+"), {"kind": "frames"})
    with pytest.raises(store.StoreError, match=r"expected a matrix\.zarr or .*, found a store of frames"):
        find_neighbours(path, "a0")


def test_the_command_shows_a_table_or_json(archive):
    of = ("--of", "smoke1:3", "--group", "Smoke/density", "--k", 4)
    code, text = run_lsim("neighbours", archive, *of)
    assert code == 0, text
    assert "nearest to Smoke/density/smoke1:3 by lsim" in text
    assert "1 of 43 frames has no distance to it" in text
    found = find_neighbours(archive, "smoke1:3", 4, matrix="Smoke/density")
    for near in found.nearest:
        assert near.frame.name in text
        assert f"{near.distances['good']:.4g}" in text

    code, text = run_lsim("neighbours", archive, *of, "--json", "--metric", "good")
    assert code == 0, text
    answer = json.loads(text)
    assert answer["of"] == "Smoke/density/smoke1:3"
    assert answer["metric"] == "good"
    assert [near["name"] for near in answer["nearest"]] == [near.frame.name for near in found.nearest]
    assert answer["nearest"][0]["distances"] == found.nearest[0].distances
    assert answer["without_distance"] == 1


def test_many_metrics_leave_room_for_names_and_are_named(archive, tmp_path):
    archive = shutil.copytree(archive, tmp_path / "many.zarr")
    root = store.open_store(archive, "r+")
    group = store.get_group(root, "Smoke/density")
    good = store.get_array(group, "good")
    for k in range(12):
        copy = store.create_array(
            group,
            f"other-metric-{k}",
            shape=good.shape,
            chunks=good.chunks,
            dims=schema.MATRIX_DIMS,
            dtype="float32",
        )
        store.write_block(copy, (0, 0), store.read(good))
    record_matrices(archive, "Smoke/density")
    store.consolidate(archive)
    code, text = run_lsim("neighbours", archive, "--of", "smoke1:3", "--group", "Smoke/density", "--k", 4)
    assert code == 0, text
    found = find_neighbours(archive, "smoke1:3", 4, matrix="Smoke/density")
    for near in found.nearest:
        assert near.frame.name in text
        assert f"{near.distances[found.metric]:.4g}" in text
    assert "…" not in text
    assert "other-metric-11" in text


def test_the_command_says_what_is_wrong_in_a_line(archive):
    code, text = run_lsim("neighbours", archive, "--of", "smok9", "--group", "Smoke/density")
    assert code == 1
    assert text.startswith("error: ")
    assert "did you mean" in text
