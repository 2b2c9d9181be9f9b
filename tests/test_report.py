"""The report: one page that opens without a network and loses nobody."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from synthetic import make_distances, make_frames, parameters, random_distances, write_field

from pipeline.correlate import correlate
from pipeline.report import ReportError, pictures, write_report
from pipeline.report.reading import Strip
from pipeline.storage import store
from pipeline.storage.checked_frames import content_hash

VOID = {"meta", "img", "br", "wbr", "link", "input", "hr"}


class Page(HTMLParser):
    """Addresses, alternative texts and visible text of a page; asserts that every element is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> where another element is open"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.tags if name in attrs]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with frames, distances, results and report: three sets, a pool, all kinds of faults."""
    folder = tmp_path_factory.mktemp("made")
    fields = {"Smoke/density": 6, "Smoke/vel": 4, "Shapes/rgb": 5}
    runs = [
        {"started": "2026-01-01T10:00:00", "seconds": 12.5, "blocks": 3, "profile": "local", "workers": 2}
    ]
    attributes = {
        "datasets": ["Smoke", "Shapes", "Broken"],
        "pools": {"All": ["Smoke", "Shapes"]},
        "frames": "../frames.zarr",
        "unavailable": {"lpips": "no weights; run: lsim weights fetch lpips"},
        "runs": runs,
    }
    path = make_distances(folder / "distances.zarr", fields, attributes=attributes)
    root = store.open_store(path, "r+")
    psnr = random_distances(parameters(5), 0.2, seed=9)
    psnr[1, 0, 3] = psnr[1, 3, 0] = -np.inf
    names = ["007", "shapes1", "shapes2", "shapes3", "<b>&amp;"]
    matrices = {m: store.read(store.get_array(root, f"Shapes/rgb/{m}")) for m in ("good", "fair", "poor")}
    write_field(
        root, "Shapes/rgb", names, parameters(5), {**matrices, "psnr": psnr}, {("good", "007"): "died"}
    )
    void = {"good": np.full((2, 11, 11), np.nan), "fair": np.full((2, 11, 11), np.nan)}
    write_field(root, "Broken/scalar", ["void0", "void1"], parameters(2), void)
    make_frames(
        folder / "frames.zarr",
        {"Smoke/density": (6, "float32", 1), "Smoke/vel": (4, "float64", 2), "Shapes/rgb": (5, "uint8", 3)},
    )
    frames = store.open_store(folder / "frames.zarr", "r+")
    store.set_attributes(frames, {"catalog": "toy", "title": "Toy archive", "convert_seconds": 3.5})
    quarantined = {
        "sequence": "smoke99",
        "field": "vel",
        "file": "smoke99/v03.png",
        "reason": "truncated PNG",
    }
    about = {"title": "Smoke plumes", "role": "test", "quarantined": [quarantined]}
    store.set_attributes(store.get_group(frames, "Smoke"), about)
    correlate(path, folder / "results", protocol=["published", "all-pairs"], replicates=200)
    write_report(folder / "results")
    return folder


@pytest.fixture(scope="module")
def page(made: Path) -> Page:
    return Page(made / "results/report/index.html")


def test_page_needs_nothing_from_outside(made: Path, page: Page):
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed"}
        if "src" in attrs:
            assert attrs["src"].startswith("data:image/png;base64,")
        if "href" in attrs:
            target = attrs["href"]
            if target.startswith("http"):
                assert tag == "a"  # a citation; nothing is loaded
            elif target.startswith("#"):
                assert target[1:] in page.attributes("id")
            else:
                assert (made / "results/report" / target).is_file()
    text = (made / "results/report/index.html").read_text()
    assert "@import" not in text
    assert not re.search(r"url\(", text)


def test_page_names_every_set_metric_and_lost_sequence(made: Path, page: Page):
    for name in ("Smoke", "Shapes", "Broken", "All", "good", "fair", "poor", "psnr"):
        assert name in page.text
    left_out = pd.read_csv(made / "results/left_out.csv", dtype=str)
    assert {"void0", "void1", "shapes1", "007"} <= set(left_out.sequence)
    for row in left_out.itertuples():
        assert row.sequence in page.text
        assert row.reason in page.text
    assert "smoke99 Smoke / vel smoke99/v03.png truncated PNG" in page.text
    assert "lsim weights fetch lpips" in page.text
    assert "Toy archive" in page.text


def test_headline_is_the_best_of_the_pool(made: Path, page: Page):
    table = pd.read_parquet(made / "results/correlations.parquet")
    pool = table[(table.dataset == "All") & (table.protocol == "published") & (table.statistic == "spearman")]
    ranked = pool.sort_values("value", ascending=False)
    best, second = ranked.iloc[0], ranked.iloc[1]
    assert f"{best.metric} ranks best on All (Smoke + Shapes)" in page.text
    assert f"ground truth is {best.value:.3f}" in page.text
    assert f"The runner-up, {second.metric} , has {second.value:.3f}" in page.text
    differences = pd.read_parquet(made / "results/differences.parquet")
    found = differences.query("dataset == 'All' and protocol == 'published' and statistic == 'spearman'")
    found = found[(found.metric == best.metric) & (found.metric_other == second.metric)].iloc[0]
    apart = found.low_simultaneous > 0 or found.high_simultaneous < 0
    assert ("is more than chance explains: its simultaneous" in page.text) == apart
    assert "allows for all 6 comparisons between the 4 metrics" in page.text


def test_names_are_escaped(made: Path, page: Page):
    assert "<b>&amp;" in page.text or "<b>&amp;" in " ".join(page.attributes("alt"))
    table = pd.read_csv(made / "results/report/sequences.csv", dtype=str)
    assert "<b>&amp;" in set(table.sequence)


def test_pictures_have_alternative_texts_and_are_pictures(page: Page):
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) > 3 * 11
    for attrs in images:
        assert attrs["alt"].strip()
    sizes = {Image.open(io.BytesIO(base64.b64decode(a["src"].split(",")[1]))).size for a in images}
    assert (11, 11) in sizes  # a distance matrix, a pixel a cell
    for tag, attrs in page.tags:
        if tag == "svg":
            assert attrs["role"] == "img"
            assert attrs["aria-label"]


def test_tables_beside_the_page(made: Path):
    folder = made / "results/report"
    for name in ("correlations", "differences", "sequences", "left_out", "quarantined", "unavailable"):
        assert (folder / f"{name}.csv").is_file()
    assert pd.read_csv(folder / "quarantined.csv").sequence.tolist() == ["smoke99"]
    sequences = pd.read_csv(folder / "sequences.csv", dtype={"sequence": str})
    known = sequences.dropna()
    assert set(known.dataset) == {"Smoke", "Shapes"}
    assert "007" not in set(known[known.metric == "good"].sequence)  # its distances are out of date
    assert "007" in set(known[known.metric == "fair"].sequence)


def test_overview_picture(made: Path):
    image = np.asarray(Image.open(made / "results/report/overview.png").convert("RGB"))
    assert image.shape[1] > 1000
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 200


def test_other_statistic_and_protocol(made: Path, tmp_path: Path):
    text = Page(write_report(made / "results", out=tmp_path, protocol="all-pairs", statistic="kendall")).text
    assert "Kendall (τ-b) correlation with the ground truth" in text
    with pytest.raises(ReportError, match=r"'nope' was not computed; there are published, all-pairs"):
        write_report(made / "results", out=tmp_path, protocol="nope")
    with pytest.raises(ReportError, match=r"'nope'.*pearson, spearman, kendall"):
        write_report(made / "results", out=tmp_path, statistic="nope")


def test_without_frames_it_says_so(tmp_path: Path):
    path = make_distances(tmp_path / "d.zarr", {"A/scalar": 4}, attributes={"frames": "../gone.zarr"})
    correlate(path, tmp_path / "results", replicates=50)
    text = Page(write_report(tmp_path / "results")).text
    assert "gone.zarr" in text
    assert "No picture" in text


def test_without_anything_to_rank(tmp_path: Path):
    root = store.open_store(tmp_path / "d.zarr", "a")
    write_field(root, "A/scalar", ["a", "b"], parameters(2), {"void": np.full((2, 11, 11), np.nan)})
    correlate(tmp_path / "d.zarr", tmp_path / "results", replicates=50)
    text = Page(write_report(tmp_path / "results")).text
    assert "No metric could be ranked" in text
    assert "No sequence could be ranked" in text


def test_too_few_sequences_for_an_interval_is_said_in_the_headline(tmp_path: Path):
    path = make_distances(tmp_path / "d.zarr", {"A/scalar": 2})
    correlate(path, tmp_path / "results", replicates=50)
    assert "cannot be said: there are too few sequences" in Page(write_report(tmp_path / "results")).text


def test_size_stays_bounded(tmp_path: Path):
    fields = {f"Set{k:02}/rgb": 3 for k in range(24)}
    attributes = {"frames": "../frames.zarr"}
    path = make_distances(tmp_path / "d.zarr", fields, metrics={"m": 0.1, "n": 0.2}, attributes=attributes)
    root = make_frames(tmp_path / "frames.zarr", dict.fromkeys(fields, (3, "uint8", 3)))
    noise = np.random.default_rng(0)
    for key in fields:  # incompressible
        array = store.get_array(store.open_store(root, "r+"), f"{key}/frames")
        values = noise.integers(0, 255, array.shape).astype(np.uint8)
        store.write_rows(array, 0, values)
        group = store.open_store(root, "r+")[key]
        both = zip(values, store.read(group["parameter"]), strict=True)
        store.write_rows(group["content"], 0, np.array([content_hash(*one) for one in both], object))
    correlate(path, tmp_path / "results", replicates=20)
    index = write_report(tmp_path / "results")
    assert index.stat().st_size < 8e6
    page = Page(index)
    assert all(name.split("/")[0] in page.text for name in fields)


def test_missing_inputs_are_told_plainly(tmp_path: Path):
    with pytest.raises(ReportError, match="run 'lsim correlate"):
        write_report(tmp_path)
    path = make_distances(tmp_path / "d.zarr", {"A/scalar": 3})
    correlate(path, tmp_path / "results", replicates=10)
    path.rename(tmp_path / "moved.zarr")
    with pytest.raises(ReportError, match=r"d\.zarr, and there is nothing there"):
        write_report(tmp_path / "results")


# -- Pictures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "float64"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_every_kind_of_frame_becomes_a_picture(dtype: str, channels: int):
    frames = np.random.default_rng(0).uniform(0, 200, (3, 8, 12, channels)).astype(dtype)
    image = pictures.colour(frames)
    assert image.shape == (3, 8, 12, 3)
    assert image.dtype == np.uint8
    assert image.std() > 0


def test_one_scale_for_the_whole_sequence():
    frames = np.stack([np.zeros((4, 4, 3)), np.full((4, 4, 3), 5.0), np.full((4, 4, 3), 10.0)])
    assert pictures.colour(frames)[:, 0, 0, 0].tolist() == [0, 128, 255]


def test_missing_values_are_grey_and_constants_no_fault():
    frames = np.zeros((2, 4, 4, 1), np.float32)
    frames[1, 0, 0] = np.nan
    frames[1, 0, 1] = np.inf
    image = pictures.colour(frames)
    assert (image[1, 0, :2] == pictures.MISSING).all()
    assert not (image[1, 1:] == pictures.MISSING).all()
    assert (pictures.colour(np.full((2, 4, 4, 3), np.nan)) == pictures.MISSING).all()


def test_thumbnails_shrink_when_there_are_many():
    def strips(count: int) -> list[Strip]:
        return [Strip("A", "f", "s", np.zeros((11, 64, 64, 3), np.uint8), [], [], "")] * count

    heights = [pictures.thumb_height(strips(count)) for count in (0, 1, 20, 60)]
    assert heights == sorted(heights, reverse=True)
    for count, height in zip((1, 20, 60), heights[1:], strict=True):
        assert count * 11 * height**2 * pictures.BYTES_PER_PIXEL <= pictures.FRAME_BYTES


def test_matrix_without_finite_distances_is_no_picture():
    assert pictures.matrix_image(np.full((3, 3), np.nan)) == ""
    matrix = np.array([[0, -np.inf, 1], [-np.inf, 0, 2], [1, 2, 0]])
    image = Image.open(io.BytesIO(base64.b64decode(pictures.matrix_image(matrix).split(",")[1])))
    alpha = np.asarray(image)[..., 3]
    assert alpha.tolist() == [[0, 0, 255], [0, 0, 255], [255, 255, 0]]


def test_markdown_table_has_every_metric_and_set_and_intervals_of_pools(made: Path):
    lines = (made / "results/report/correlations.md").read_text().splitlines()
    head = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert head[0] == "spearman (published)"
    assert set(head[1:]) == {"`good`", "`fair`", "`poor`", "`psnr`"}
    rows = {
        cells[0]: cells[1:]
        for line in lines[2:]
        if (cells := [c.strip() for c in line.strip("|").split("|")])
    }
    assert next(iter(rows)) == "*All*"
    assert {"Smoke plumes", "Shapes", "Broken"} <= rows.keys()
    table = pd.read_csv(made / "results/report/correlations.csv")
    chosen = table[
        (table.protocol == "published") & (table.statistic == "spearman") & (table.dataset == "All")
    ]
    good = chosen[chosen.metric == "good"].iloc[0]
    cell = rows["*All*"][head[1:].index("`good`")]
    assert cell == f"**{good.value:.2f}** ({good.low:.2f}–{good.high:.2f})"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of thirty metrics on two sets."""
    folder = tmp_path_factory.mktemp("many")
    metrics = {f"metric-number-{k:02}": 0.02 + 0.03 * k for k in range(30)}
    make_distances(folder / "d.zarr", {"A/x": 4, "B/x": 4}, metrics=metrics)
    correlate(folder / "d.zarr", folder / "results", replicates=20)
    return folder / "results"


def test_many_metrics_are_rows_of_the_markdown_table_and_all_on_the_page(many: Path):
    page = Page(write_report(many))
    lines = (many / "report/correlations.md").read_text().splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["spearman (published)", "A", "B"]
    assert len(lines) == 32
    cards = [attrs for tag, attrs in page.tags if tag == "li" and attrs.get("class") == "card"]
    assert len(cards) == 2 * 30
    assert page.text.count("18 other metrics on") == 2
    drawn = [attrs["alt"] for tag, attrs in page.tags if tag == "img" and "matrix" in str(attrs.get("class"))]
    assert len(set(drawn)) == 2 * 30


def test_names_of_many_metrics_do_not_overlap_in_the_picture(many: Path):
    write_report(many)
    image = Image.open(many / "report/overview.png").convert("L")
    ink = (np.asarray(image)[:, : image.width // 2] < 128).any(axis=1)
    lines = np.flatnonzero(np.diff(ink.astype(int)) == 1)  # where a line of text begins
    assert len(lines) >= 30
    assert image.height < 1.2 * image.width


@pytest.mark.parametrize(
    ("values", "start"),
    [
        ([], 0),
        ([0.7, 0.9], 0.5),
        ([0.5, 0.9], 0),
        ([-0.01, 1], -0.2),
        ([-0.3], -0.6),
        ([-1.0], -1),
        ([-0.7], -1),
    ],
)
def test_axes_begin_below_all_values_at_a_round_figure(values: list[float], start: float):
    assert pictures.axis_start(values) == start
