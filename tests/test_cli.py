"""What the command ``lsim`` says besides what its stages do."""

from __future__ import annotations

import importlib.metadata

from commands import run_lsim
from matrices import archive_of, write_archive


def test_version():
    code, text = run_lsim("--version")
    assert (code, text) == (0, f"lsim {importlib.metadata.version('lsim')}\n")


def test_a_warning_is_a_line_said_once(tmp_path):
    frames = write_archive(tmp_path / "frames.zarr", archive_of(2, size=32))
    of = ("--metric", "lsim-open", "--size", 64, "--scope=-2,2", "--cluster", "none")
    code, text = run_lsim("embed", frames, "--out", tmp_path / "e.zarr", *of)
    assert code == 0, text
    assert text.count("warning: metric 'lsim-open' was made for frames of 128 to 512") == 1
    assert ".py" not in text


def test_fetching_says_what_is_fetched_before_it_takes_its_time(tmp_path):
    catalog = tmp_path / "mine.yaml"
    catalog.write_text(
        "name: mine\ndatasets:\n- name: S\n  reader: lsim\n"
        "  source: {simulate: {recipe: shapes, families: 2, size: 32}}\n"
    )
    folder = tmp_path / "data" / "mine" / "S"
    fetch = ("catalog", "fetch", catalog, "--data-dir", tmp_path / "data")
    done = f"S: simulated {folder}"
    assert run_lsim(*fetch) == (0, f"S: simulating 2 families (shapes)\n{done}\n")
    assert run_lsim(*fetch) == (0, f"S: present {folder}\n")
