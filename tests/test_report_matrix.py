"""An archive in the report: what is on its maps, what they say, and that nobody is left out in silence."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import run_lsim
from synthetic import make_distances, make_frames, make_matrix, record_matrices
from test_report import Page

from pipeline.correlate import correlate
from pipeline.matrix import mds
from pipeline.report import DamagedReportError, ReportError, maps, write_matrix_report, write_report
from pipeline.report import matrix as contents
from pipeline.report.matrix import gather_matrices, say_how_much
from pipeline.storage import schema, store

MATRICES = {
    "Smoke/density": {"Smoke/density": 6},
    "together/both": {"Smoke/density": 6, "Shapes/rgb": 5},
}
FAILURES = {f"Smoke/density/smoke2:{k}": "frame holds <b>NaN</b>" for k in (5, 6)}
RUN = {"started": "2026-01-01T10:00:00", "seconds": 2.5, "tiles": 12, "embeddings": 66, "workers": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames, an archive of them with frames that have no distances, and its page."""
    folder = tmp_path_factory.mktemp("made")
    make_frames(folder / "frames.zarr", {"Smoke/density": (6, "float32", 1), "Shapes/rgb": (5, "uint8", 3)})
    attributes = {
        "frames": "../frames.zarr",
        "scope": "dataset",
        "title": "Toy <i>archive</i>",
        "runs": [RUN],
        "plan": ["66 frames, 15 tiles"],
        "unavailable": {"lpips": "no weights"},
    }
    path = folder / "matrix.zarr"
    make_matrix(path, MATRICES, failures=FAILURES, attributes=attributes)
    write_matrix_report(path, folder / "page")
    return folder


@pytest.fixture(scope="module")
def page(made: Path) -> Page:
    return Page(made / "page/index.html")


def svgs(path: Path) -> list[str]:
    return re.findall(r"<svg class=\"map.*?</svg>", path.read_text(), re.DOTALL)


def dots(svg: str) -> int:
    return sum(part.count("h0") for part in re.findall(r'<g class="dots">(.*?)</g>', svg))


def test_page_needs_nothing_from_outside_and_no_name_is_markup(page):
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "i", "b"}
        if "src" in attrs:
            assert attrs["src"].startswith("data:image/png;base64,")
        if "href" in attrs and attrs["href"].startswith("#"):
            assert attrs["href"][1:] in page.attributes("id")
    assert "Toy <i>archive</i>" in page.text
    assert "frame holds <b>NaN</b>" in page.text


def test_every_frame_with_distances_is_a_dot_and_every_reference_a_ring(made):
    main, small, both, by_field, small_both = svgs(made / "page/index.html")
    assert [dots(svg) for svg in (main, small, both, by_field, small_both)] == [64, 64, 119, 119, 119]
    rings = re.search(r'<path class="rings" d="(.*?)"', main)
    assert rings is not None
    assert rings.group(1).count("h0") == 6
    lines = re.search(r'<path class="lines" d="(.*?)"', main)
    assert lines is not None
    assert lines.group(1).count("M") == 6
    assert lines.group(1).count("L") == 64 - 6


def test_words_say_how_much_of_the_distances_a_map_shows(page):
    assert "lsim : The two axes hold 100 % of the variance: the map is all there is." in page.text
    assert "66 frames · 2 without distances are not on it" in page.text
    assert "Frames are normalised by minimum and maximum of all frames of a matrix." in page.text
    assert "good 100 % of the variance" in page.text


@pytest.mark.parametrize(
    ("explained", "words"),
    [
        (1.0, "hold 100 % of the variance: the map is all there is"),
        (0.86, "hold 86 % of the variance: what is near on the map is near"),
        (0.6, "hold 60 % of the variance: most of what"),
        (0.2, "hold only 20 % of the variance: frames that are near on the map may be far"),
        (np.nan, "All frames are the same"),
    ],
)
def test_words_for_every_share(explained, words):
    nothing = np.array([], int)
    found = mds.FrameMap(np.zeros((1, 2)), explained, 0.0, nothing, nothing)
    assert words in say_how_much(found)


def test_positions_are_those_of_the_map(made):
    table = pd.read_csv(made / "page/map.csv")
    here = table[(table.matrix == "Smoke/density") & (table.metric == "lsim")]
    array = store.get_array(store.open_store(made / "matrix.zarr"), "Smoke/density/lsim")
    wanted = mds.classical_map(store.read(array)).positions
    np.testing.assert_allclose(here[["x", "y"]].to_numpy(), wanted, atol=1e-8)
    assert here[here.x.isna()].number.tolist() == [5, 6]
    assert set(table.metric) == {"good", "lsim"}


def test_frames_are_shown_and_what_is_nearest_to_references(made, page):
    pictures = [attrs["alt"] for tag, attrs in page.tags if tag == "img" and "alt" in attrs]
    found = gather_matrices(made / "matrix.zarr")
    first = found.matrices[0]
    assert len(first.marked) == 8
    for frame in contents.marked_frames(first):
        assert frame.name in pictures
    assert len(first.nearest) == 3
    for row in first.nearest:
        assert row.of.number == 0
        assert len(row.nearest) == 6
        assert row.of.sequence not in {near.frame.sequence for near in row.nearest}
        assert {row.of.name, *(near.frame.name for near in row.nearest)} <= set(pictures)


def test_failures_and_what_made_it_are_told(page):
    assert "smoke2 Smoke/density 5, 6 good , lsim frame holds <b>NaN</b>" in page.text
    assert "2026-01-01T10:00:00" in page.text
    assert "66 frames, 15 tiles" in page.text
    assert "lpips (no weights)" in page.text


def test_several_fields_on_one_map_have_colours_of_their_own(page, made):
    assert "The same, by field: Smoke/density Shapes/rgb" in page.text
    by_field = svgs(made / "page/index.html")[3]
    assert {colour for colour in maps.HUES if colour in by_field} == set(maps.HUES[:2])


def test_more_fields_than_colours_share_the_last():
    classes, hues, legend = maps.by_field([f"A/{k}" for k in range(12)])
    assert classes.tolist() == [*range(8), 7, 7, 7, 7]
    assert len(hues) == 8
    assert [entry.label for entry in legend] == [*(f"A/{k}" for k in range(7)), "others"]
    assert [entry.label for entry in maps.by_field([f"A/{k}" for k in range(8)])[2]][-1] == "A/7"


def test_without_frames_there_are_names_and_no_pictures(tmp_path):
    path = make_matrix(tmp_path / "matrix.zarr", MATRICES, attributes={"frames": "../gone.zarr"})
    found = Page(Path(write_matrix_report(path, tmp_path / "page")))
    assert "Pictures of frames are missing. The frames were at ../gone.zarr" in found.text
    assert {attrs["alt"] for tag, attrs in found.tags if tag == "img"} == {"colour scale from dark to bright"}
    assert "Nearest in other sequences" in found.text


def test_damage_is_named_and_costs_a_picture_or_a_map(tmp_path):
    make_frames(tmp_path / "frames.zarr", {"A/x": (3, "float32", 1)})
    path = make_matrix(tmp_path / "matrix.zarr", {"A/x": {"A/x": 3}}, attributes={"frames": "../frames.zarr"})
    (tmp_path / "frames.zarr/A/x/frames/c/0/0/0/0/0").write_bytes(b"damaged")
    next((tmp_path / "matrix.zarr/A/x/lsim/c").glob("*/*")).write_bytes(b"damaged")
    with pytest.raises(
        DamagedReportError, match=r"index\.html is written .*A/x: lsim, tile \d, \d: .*chunk c/"
    ):
        write_matrix_report(path, tmp_path / "page")
    found = Page(tmp_path / "page/index.html")
    assert "Pictures of frames are missing. Damaged: A/x/a" in found.text
    assert re.search(r"Left out, .*lsim, tile \d, \d: damaged distances: chunk c/\d/\d cannot", found.text)
    assert "The two axes hold 100 %" in found.text


def test_of_many_frames_some_sequences_are_shown_and_landmarks_place_them(tmp_path, monkeypatch):
    path = make_matrix(tmp_path / "matrix.zarr", {"A/x": {"A/x": 12}}, tile=16)
    monkeypatch.setattr(contents, "SHOWN_FRAMES", 60)
    monkeypatch.setattr(contents, "COLUMNS_TOGETHER", 16)
    monkeypatch.setattr(contents, "NAMES_TOGETHER", 7)
    (matrix,) = gather_matrices(path).matrices
    assert matrix.count == 132
    assert list(dict.fromkeys(matrix.sequences)) == ["a0", "a3", "a6", "a8", "a11"]
    assert matrix.numbers.tolist() == [*range(11)] * 5
    found = matrix.maps[0].frame_map
    assert len(found.landmarks) > 10
    assert found.explained == pytest.approx(1)
    whole = store.read(store.get_array(store.open_store(path), "A/x/lsim"))
    kept = np.concatenate([np.arange(11 * k, 11 * k + 11) for k in (0, 3, 6, 8, 11)])
    difference = found.positions[:, None] - found.positions[None]
    np.testing.assert_allclose(
        np.hypot(*np.moveaxis(difference, -1, 0)), whole[np.ix_(kept, kept)], atol=1e-3
    )
    text = Page(Path(write_matrix_report(path, tmp_path / "page"))).text
    assert "132 frames, of which 55 are on the map: whole sequences, evenly spaced" in text
    assert "Frames are placed by their distances to" in text


def test_a_metric_that_has_no_map_says_why(tmp_path):
    path = make_matrix(tmp_path / "matrix.zarr", {"A/x": {"A/x": 2}}, metrics=["psnr"])
    array = store.get_array(store.open_store(path, "r+"), "A/x/psnr")
    store.write_rows(array, 0, -store.read(array))
    record_matrices(path, "A/x")
    text = Page(Path(write_matrix_report(path, tmp_path / "page"))).text
    assert "No metric has a map of these frames." in text
    assert "No map: expected distances that are not negative" in text


def test_a_matrix_without_any_distance_has_no_map(tmp_path):
    failures = {f"A/x/a{k}:{n}": "no finite value" for k in range(2) for n in range(11)}
    path = make_matrix(tmp_path / "matrix.zarr", {"A/x": {"A/x": 2}}, failures=failures)
    text = Page(Path(write_matrix_report(path, tmp_path / "page"))).text
    assert "No map: no frame has distances" in text
    assert "no finite value" in text


def test_names_of_others_are_text(tmp_path):
    path = make_matrix(tmp_path / "matrix.zarr", {"A/x": {"A/x": 2}}, frames=3, tile=4)
    root = store.open_store(path, "r+")
    names = np.array(["<script>alert(1)</script>"] * 3 + ['"><img src=x onerror=y>'] * 3, object)
    store.write_rows(store.get_array(root, "A/x/sequence"), 0, names)
    record_matrices(path, "A/x")
    found = Page(Path(write_matrix_report(path, tmp_path / "page")))
    assert not [tag for tag, _ in found.tags if tag == "script"]
    assert not found.attributes("onerror")
    # Of a path, the last part stands below a picture.
    assert "script> :0" in found.text
    assert "img src=x onerror=y" in found.text


def test_results_may_have_an_archive_beside_them(tmp_path, made):
    path = make_distances(tmp_path / "distances.zarr", {"Smoke/density": 4})
    correlate(path, tmp_path / "results", replicates=0)
    alone = Page(Path(write_report(tmp_path / "results")))
    assert "Maps of all frames" not in alone.text
    both = Page(Path(write_report(tmp_path / "results", matrix=made / "matrix.zarr")))
    assert "Maps of all frames" in both.text
    assert "maps" in both.attributes("id")
    assert "#maps" in both.attributes("href")
    assert (tmp_path / "results/report/map.csv").is_file()


def test_other_stores_are_refused(tmp_path, made):
    with pytest.raises(ReportError, match="expected a store of kind matrix, found"):
        gather_matrices(made / "frames.zarr")
    root = store.open_store(tmp_path / "empty.zarr", "a")
    store.set_attributes(root, {"kind": schema.MATRIX_STORE})
    with pytest.raises(ReportError, match="no matrix has distances yet"):
        gather_matrices(tmp_path / "empty.zarr")


def test_the_command(made, tmp_path):
    code, text = run_lsim("report", made / "matrix.zarr", "--out", tmp_path / "page")
    assert code == 0, text
    assert (tmp_path / "page/index.html").is_file()
    code, text = run_lsim("report", made / "matrix.zarr", "--matrix", made / "matrix.zarr")
    assert (code, "with --matrix, expected" in " ".join(text.split())) == (2, True)
