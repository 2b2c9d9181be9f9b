"""Data sets of simulated families: the same from workers, after a kill, and from the command."""

import dataclasses
import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import xarray
from commands import run_lsim
from typer.testing import CliRunner

from lsim.simulate import RECIPES, families, missing_families, shapes, simulate_families, write_families
from lsim.simulate.hardness import hardness
from pipeline.cli import app
from pipeline.simulate import SimulationError, measure_hardness, simulate
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

SIZE = 64


@pytest.fixture
def here():
    """Everything in this process."""
    with Cluster(Profile(kind="none")) as cluster:
        yield cluster


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_workers_make_the_same_bytes_as_this_process(tmp_path, here, two_workers):
    report = simulate("burgers", tmp_path / "a", 5, SIZE, seed=3, cluster=two_workers)
    assert (report.made, report.present, report.complete) == ([1, 2, 3, 4, 5], [], True)
    write_families(tmp_path / "b" / "burgers", "burgers", 5, SIZE, seed=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with Cluster(Profile(kind="local")) as unused:
        again = simulate("burgers", tmp_path / "a", 4, SIZE, seed=3, cluster=unused)
        assert unused.dashboard is None  # nothing to do: no workers are started
    assert (again.made, again.present, again.others) == ([], [1, 2, 3, 4], ["burgersEq5.velocity"])
    more = simulate("burgers", tmp_path / "a", 6, SIZE, seed=3, cluster=here)
    assert (more.made, more.present) == ([6], [1, 2, 3, 4, 5])


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, here):
    script = """
        import os, signal, sys
        from pipeline.workers.cluster import Cluster
        from pipeline.workers.profiles import Profile
        from pipeline.simulate import simulate

        def kill(done, total):
            if done == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        simulate("shapes", sys.argv[1], 4, 64, cluster=Cluster(Profile(kind="none")), progress=kill)
    """
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "a")]
    assert subprocess.run(command, cwd=root).returncode == -9
    assert missing_families(tmp_path / "a" / "shapes", "shapes", 4, 64) == [3, 4]
    report = simulate("shapes", tmp_path / "a", 4, 64, cluster=here)
    assert (report.made, report.present) == ([3, 4], [1, 2])
    simulate("shapes", tmp_path / "b", 4, 64, cluster=here)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.fixture
def faulty(monkeypatch):
    """A recipe of whose draws every other is of no use."""

    def draw(rng):
        return shapes.draw(rng) | {"noise": np.asarray(math.nan if rng.uniform() < 0.5 else 0.0)}

    monkeypatch.setattr(families, "ATTEMPTS", 2)
    monkeypatch.setitem(RECIPES, "faulty", dataclasses.replace(shapes.RECIPE, name="faulty", draw=draw))
    return "faulty"


def test_a_family_that_is_of_no_use_is_named_and_the_others_are_made(tmp_path, here, faulty):
    report = simulate(faulty, tmp_path, 12, 16, cluster=here)
    assert report.unusable
    assert not report.complete
    assert all("2 draws in a row were unusable ({'not finite': 2})" in r for r in report.unusable.values())
    assert sorted([*report.made, *report.unusable]) == list(range(1, 13))
    assert {path.name for path in report.folder.iterdir()} == {f"shapes{n}.density" for n in report.made}
    records = [json.loads(path.read_text())["family"] for path in report.folder.glob("*/family.json")]
    assert report.discarded == {"not finite": sum(record["discarded"] != {} for record in records)}
    again = simulate(faulty, tmp_path, 12, 16, cluster=here)
    assert (again.made, again.present, again.unusable) == ([], report.made, report.unusable)


def test_what_is_no_matter_of_simulation_stops_with_the_family_s_number(tmp_path, here):
    (tmp_path / "shapes" / "shapes2.density").mkdir(parents=True)
    with pytest.raises(SimulationError, match="family 2 of recipe 'shapes' failed: FileExistsError"):
        simulate("shapes", tmp_path, 3, 64, cluster=here)
    with pytest.raises(ValueError, match="format must be one of"):
        simulate("shapes", tmp_path, 3, 64, format="gif", cluster=here)


def test_a_store_holds_the_families_of_several_recipes(tmp_path, here):
    for recipe in ("shapes", "smoke"):
        report = simulate(recipe, tmp_path / "data.zarr", 2, 32, format="zarr", cluster=here)
        assert report.store == tmp_path / "data.zarr"
    with xarray.open_datatree(tmp_path / "data.zarr", engine="zarr") as tree:
        assert set(tree) == {"shapes", "smoke"}
        assert tree["smoke"].attrs["role"] == "train"
        made = simulate_families("smoke", 2, 32)
        for field, frames in made.frames.items():
            stored = tree[f"smoke/{field}"]
            assert stored["sequence"].values.tolist() == [f"plume{number}.{field}" for number in (1, 2)]
            assert np.array_equal(stored["frames"].values, frames)
            assert np.allclose(stored["parameter"].values, made.parameter)
    again = simulate("smoke", tmp_path / "data.zarr", 2, 32, format="zarr", cluster=here)
    assert not again.made
    assert not again.conversion.changed


def test_a_store_holds_the_families_asked_for_and_no_leftovers(tmp_path, here):
    simulate("shapes", tmp_path / "data", 3, 16, seed=1, format="zarr", cluster=here)
    write_families(tmp_path / "data" / "shapes", "shapes", [4], 32, 2, "png")
    report = simulate("shapes", tmp_path / "data", 2, 16, seed=2, format="zarr", cluster=here)
    assert report.complete
    assert report.unlike == report.others == ["shapes3.density", "shapes4.density"]
    with xarray.open_datatree(tmp_path / "data.zarr", engine="zarr") as tree:
        stored = tree["shapes/density"]
        assert sorted(stored["sequence"].values) == ["shapes1.density", "shapes2.density"]
        made = simulate_families("shapes", 2, 16, seed=2).frames["density"]
        assert {f.tobytes() for f in stored["frames"].values} == {f.tobytes() for f in made}


def test_a_store_of_the_current_folder_lies_beside_it(tmp_path, here, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    report = simulate("shapes", ".", 1, 16, format="zarr", cluster=here)
    assert report.store == tmp_path / "data.zarr"
    assert report.store.is_dir()


@pytest.mark.parametrize("format", ["npz", "png"])
def test_hardness_of_what_was_written_is_that_of_the_families(tmp_path, here, format):
    report = simulate("liquid", tmp_path, 2, 32, format=format, cluster=here)
    found, measured = measure_hardness(report)
    assert measured == 2
    assert list(found) == ["phase", "velocity", "all"]
    for field, value in hardness(simulate_families("liquid", 2, 32)).items():
        assert found[field] == pytest.approx(value, abs=1e-9 if format == "npz" else 0.05)
    assert measure_hardness(report, most=1)[1] == 1


def command(*arguments: object) -> tuple[int, str]:
    """Run ``lsim simulate`` in this process: exit code, and all it printed."""
    done = CliRunner().invoke(app, ["simulate", *map(str, arguments), "--cluster", "none"])
    return done.exit_code, done.output


def test_the_command_simulates_says_how_hard_it_is_and_does_nothing_twice(tmp_path):
    arguments = ("shapes", "--families", 3, "--size", SIZE, "--out", tmp_path)
    code, printed = command(*arguments)
    assert code == 0, printed
    assert "3 families made, 0 already there" in printed
    assert "draws discarded: none" in printed
    assert "hardness (Spearman correlation of the mean squared error, 3 families): density" in printed
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, printed = command(*arguments)
    assert code == 0
    assert "nothing to do: 3 families are there" in printed
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_command_ends_with_3_where_families_are_of_no_use(tmp_path, faulty):
    code, printed = command(faulty, "--families", 12, "--size", 16, "--out", tmp_path)
    assert code == 3
    assert "unusable, not made" in printed
    assert "draws discarded: " in printed


def test_the_command_calibrates_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed = command("shapes", "--calibrate", "--families", 3, "--size", 32)
    assert code == 0, printed
    assert "shapes: factor " in printed
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_is_wrong(tmp_path):
    code, printed = run_lsim("simulate", "shape", "--out", tmp_path)
    assert code == 1
    assert "error: no recipe named 'shape'; did you mean 'shapes'?" in printed
    assert command("shapes")[0] == 2
