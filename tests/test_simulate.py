"""Families against their promises, how hard they are, and folders against interruptions."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lsim
from lsim.simulate import (
    RECIPES,
    DegenerateFamilyError,
    Families,
    UnknownRecipeError,
    families,
    layout,
    simulate_families,
    write_families,
)
from lsim.simulate.hardness import calibrate_step, hardness, reference_errors
from lsim.simulate.recipe import FRAMES, Recipe, Variation

CPU = torch.device("cpu")
DOUBLE = torch.float64
SIZE = 64  # small, and still a simulation
ALL = sorted(RECIPES)
VECTORS = {
    name: {"velocity"} if name in ("burgers-2d", "smoke", "liquid", "liquid-noise") else set() for name in ALL
}
TOLERANCE = dict.fromkeys(ALL, 1e-4) | dict.fromkeys(("liquid", "liquid-noise", "transport"), 1e-2)
"""Largest difference that rounding makes, as a share of a field's range."""


def small(name: str) -> int:
    """Space–time images need their points; the others have them in two dimensions."""
    return SIZE if name in ("advection-diffusion", "burgers", "density-noise") else 32


@pytest.fixture(autouse=True)
def one_thread():
    """Rows of a few hundred numbers: threads only wait for one another."""
    with families.torch_threads(1):
        yield


# Families -------------------------------------------------------------------------------------------


@functools.cache
def two_families(name: str) -> Families:
    """Families 1 and 2 of a recipe, made together; of seed 4, for tests that only read them."""
    return simulate_families(name, 2, small(name), seed=4, batch=2)


@pytest.mark.parametrize("name", ALL)
def test_a_family_is_what_it_promises(name):
    size, recipe = small(name), RECIPES[name]
    made = two_families(name)
    assert made.recipe == name
    assert tuple(made.frames) == recipe.fields
    assert np.array_equal(made.parameter, np.arange(11) / 10)
    for field, of_field in made.frames.items():
        assert of_field.shape == (2, 11, size, size, 3 if field in VECTORS[name] else 1)
        assert of_field.dtype == np.float32
        assert np.isfinite(of_field).all()
        assert (of_field.std(axis=(2, 3, 4)) > 0).all()
        assert all(len({frame.tobytes() for frame in frames}) == 11 for frames in of_field)
    for number, record in enumerate(made.records, start=1):
        assert (record.number, record.seed) == (number, 4)
        assert record.varied in recipe.variations
        assert record.values[0] == record.reference[record.varied]
        assert np.allclose(np.diff(record.values), record.step)
        assert record.step != 0


@pytest.mark.parametrize("name", ALL)
def test_only_the_varied_parameter_moves(name):
    for number in range(1, 30):
        drawn = families.draw_family(RECIPES[name], number, seed=1)
        for key, values in drawn.frames.items():
            assert values.shape[0] == FRAMES
            moved = not np.array_equal(values, np.broadcast_to(values[:1], values.shape))
            assert moved == (key == drawn.varied)
        for key in {"viscosity", "noise"} & drawn.frames.keys():
            assert (drawn.frames[key] >= 0).all()


@pytest.mark.parametrize("name", ALL)
def test_every_variation_is_drawn_sooner_or_later_both_ways_where_it_may(name):
    drawn = [families.draw_family(RECIPES[name], number, seed=0) for number in range(1, 120)]
    for key, variation in RECIPES[name].variations.items():
        signs = {math.copysign(1, draw.step) for draw in drawn if draw.varied == key}
        assert signs == ({-1, 1} if variation.both_ways else {1})


def content(made: Families, *picked: int) -> list[bytes]:
    """Bytes of each family's frames, all fields together."""
    rows = picked or range(len(made.records))
    return [b"".join(frames[k].tobytes() for frames in made.frames.values()) for k in rows]


@pytest.mark.parametrize("name", ALL)
def test_frames_depend_on_seed_and_number_alone(name):
    size = small(name)
    made = two_families(name)
    alone = simulate_families(name, [3, 2], size, seed=4, batch=1)
    assert content(alone, 1) == content(made, 1)
    assert alone.records[1] == made.records[1]
    other = simulate_families(name, 1, size, seed=3)
    assert len({*content(made), *content(alone), *content(other)}) == 4


def test_recipes_and_numbers_have_streams_of_their_own():
    drawn = [
        families.draw_family(RECIPES[name], number, seed=0, attempt=attempt).frames["phase_a"][0]
        for name in ("advection-diffusion", "burgers")
        for number in (1, 2)
        for attempt in (0, 1)
    ]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("name", ALL)
def test_threads_and_precision_change_rounding_alone(name):
    size = small(name)
    one = two_families(name)
    others = [simulate_families(name, 1, size, seed=4, dtype=DOUBLE)]
    if name not in ("density-noise", "liquid-noise"):  # the solvers of recipes without the noise
        others.append(simulate_families(name, 1, size, seed=4, threads=2))
    for other in others:
        for field, frames in one.frames.items():
            apart = np.abs(frames[:1] - other.frames[field])
            assert apart.max() < TOLERANCE[name] * np.ptp(frames)


def test_rounding_of_an_interface_stays_within_its_tolerance_at_a_real_size():
    single, double = (simulate_families("liquid", 1, 128, dtype=dtype) for dtype in (torch.float32, DOUBLE))
    for field, frames in single.frames.items():
        apart = np.abs(frames - double.frames[field])
        assert apart.max() < TOLERANCE["liquid"] * np.ptp(frames)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ALL)
def test_a_gpu_gives_the_same_families_up_to_rounding(name):
    here, there = (simulate_families(name, 2, SIZE, device=device) for device in ("cpu", "cuda"))
    for field, frames in here.frames.items():
        assert np.abs(frames - there.frames[field]).max() < TOLERANCE[name] * np.ptp(frames)
    assert here.records == there.records


def test_torch_is_left_as_it_was():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        simulate_families("shapes", 1, SIZE)
        assert torch.get_num_threads() == 2
        with pytest.raises(RuntimeError, match="faulty"):
            simulate_families("shapes", 1, SIZE, device="faulty")
        assert torch.get_num_threads() == 2
        assert not torch.is_inference_mode_enabled()
    finally:
        torch.set_num_threads(before)


def faulty_recipe(bad: float) -> Recipe:
    """A recipe whose references are unusable with probability one half, in the way ``bad`` says."""

    def draw(rng):
        return {"level": np.asarray(bad if rng.uniform() < 0.5 else 1.0), "shift": np.asarray(0.0)}

    def solver(parameters, generators, size, device, dtype):
        ramp = torch.linspace(0, 1, size, dtype=dtype)[None, :, None, None]
        image = parameters["level"][:, None, None, None] * (ramp + parameters["shift"][:, None, None, None])
        return {"field": image.expand(-1, size, size, 1)}

    return Recipe("faulty", "", "faulty", ("field",), draw, {"shift": Variation(0.1)}, solver)


@pytest.mark.parametrize(("bad", "reason"), [(math.nan, "not finite"), (0.0, "constant frame")])
def test_unusable_draws_are_replaced_and_counted(bad, reason):
    numbers = list(range(1, 21))
    made = families.make(faulty_recipe(bad), numbers, 16, 0, CPU, torch.float32, batch=7)
    assert [record.number for record in made.records] == numbers
    assert np.isfinite(made.frames["field"]).all()
    assert all(record.reference["level"] == 1.0 for record in made.records)
    assert set(made.discarded) == {reason}
    assert made.discarded[reason] == sum(record.discarded.get(reason, 0) for record in made.records)
    alone = families.make(faulty_recipe(bad), [9], 16, 0, CPU, torch.float32, batch=1)
    assert alone.records[0] == made.records[8]


def test_a_recipe_that_never_works_says_so():
    hopeless = dataclasses.replace(
        faulty_recipe(0.0), draw=lambda rng: {"level": np.zeros(()), "shift": np.zeros(())}
    )
    with pytest.raises(DegenerateFamilyError, match=r"'faulty', seed 3, family 1: 50 draws.*constant frame"):
        families.make(hopeless, [1], 16, 3, CPU, torch.float32, 1)


def test_a_parameter_without_effect_is_a_defect():
    frame = np.random.default_rng(0).normal(size=(1, 16, 16, 1)).astype(np.float32)
    same = np.repeat(frame, FRAMES, axis=0)
    assert families.defect(same) == "no effect"
    assert families.defect(same + np.linspace(0, 1, FRAMES, dtype=np.float32)[:, None, None, None]) is None


def test_an_unknown_recipe_suggests_a_near_one(tmp_path):
    with pytest.raises(UnknownRecipeError, match=r"no recipe named 'burger'; did you mean 'burgers' or"):
        simulate_families("burger", 1)
    with pytest.raises(
        UnknownRecipeError, match="available: advection-diffusion, advection-diffusion-2d, burgers"
    ):
        write_families(tmp_path, "xyz", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"families": 0}, "families must be"),
        ({"families": [1, 1]}, "families must be"),
        ({"families": [0, 1]}, "families must be"),
        ({"size": 65}, "size must be even"),
        ({"seed": -1}, "seed must not be negative"),
        ({"batch": 0}, "batch and threads"),
        ({"dtype": torch.float16}, "float32 or torch.float64"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate_families("shapes", **{"families": 1, "size": SIZE, **arguments})


def test_the_documentation_has_every_recipe_with_its_role_fields_and_steps():
    text = (Path(__file__).parent.parent / "docs" / "simulate.md").read_text(encoding="utf-8")
    sections = {part.split(maxsplit=1)[0]: part for part in text.split("\n### ")[1:]}
    assert set(sections) == set(RECIPES)
    for name, recipe in RECIPES.items():
        steps = []
        for key, variation in recipe.variations.items():
            step = f"{100 * variation.step:g} %" if variation.relative else f"{variation.step:g}"
            steps.append(f"{key} {step if variation.both_ways else '+' + step}")
        assert f"Steps: {', '.join(steps)}." in sections[name]
        assert f"({recipe.role}" in sections[name].splitlines()[0]
        (fields,) = (line for line in sections[name].splitlines() if line.startswith("Field"))
        assert all(field in fields for field in recipe.fields)


# Folders --------------------------------------------------------------------------------------------


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file below, to see what was written again."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.stat()
        found[str(path.relative_to(folder))] = (status.st_ino, status.st_mtime_ns)
    return found


def test_families_are_written_in_the_published_layout(tmp_path):
    folders = write_families(tmp_path / "new" / "out", "advection-diffusion", 2, SIZE, seed=1)
    assert [folder.name for folder in folders] == ["advDiff1.density", "advDiff2.density"]
    made = simulate_families("advection-diffusion", 2, SIZE, seed=1)
    for folder, frames, record in zip(folders, made.frames["density"], made.records, strict=True):
        names = sorted(path.name for path in folder.iterdir())
        assert names == [*(f"advDiff{i:02d}.npz" for i in range(11)), "family.json"]
        for index, frame in enumerate(frames):
            with np.load(folder / f"advDiff{index:02d}.npz") as stored:
                assert stored.files == ["arr_0"]
                assert stored["arr_0"].dtype == np.float32
                assert np.array_equal(stored["arr_0"], frame)
        described = json.loads((folder / "family.json").read_text())
        assert described["family"]["varied"] == record.varied
        assert described["family"]["values"] == list(record.values)
        assert described["settings"]["seed"] == 1


def test_png_spans_eight_bits_over_the_family(tmp_path):
    (folder,) = write_families(tmp_path, "burgers", 1, SIZE, format="png")
    assert folder.name == "burgersEq1.velocity"
    images = np.stack([np.asarray(Image.open(folder / f"burgersEq{i:02d}.png")) for i in range(11)])
    assert images.shape == (11, SIZE, SIZE)
    assert (images.dtype, images.min(), images.max()) == (np.uint8, 0, 255)
    lo, hi = json.loads((folder / "family.json").read_text())["range"]
    frames = simulate_families("burgers", 1, SIZE).frames["velocity"][0, ..., 0]
    assert np.abs(lo + images * (hi - lo) / 255 - frames).max() <= (hi - lo) / 255 * 0.501


def test_every_field_of_a_family_has_a_folder_and_a_png_of_three_channels_a_vector(tmp_path):
    folders = write_families(tmp_path, "smoke", 1, 32, format="png")
    assert [folder.name for folder in folders] == ["plume1.density", "plume1.velocity", "plume1.pressure"]
    for folder, channels in zip(folders, (1, 3, 1), strict=True):
        assert layout.read_frames(folder).shape == (11, 32, 32, channels)


def test_what_was_written_is_read_back(tmp_path):
    folders = write_families(tmp_path, "liquid", [2], 32)
    made = simulate_families("liquid", [2], 32)
    for folder, frames in zip(folders, made.frames.values(), strict=True):
        assert np.array_equal(layout.read_frames(folder), frames[0])
    with pytest.raises(FileNotFoundError, match=r"no family\.json"):
        layout.read_frames(tmp_path)


def test_two_runs_write_the_same_bytes(tmp_path):
    for out in ("a", "b"):
        write_families(tmp_path / out, "shapes", 2, SIZE)
    for path in sorted((tmp_path / "a").rglob("*.*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_writing_again_does_nothing_and_more_families_are_added(tmp_path):
    first = write_families(tmp_path, "shapes", 2, SIZE)
    before = stamps(tmp_path)
    assert write_families(tmp_path, "shapes", 2, SIZE, batch=1) == first
    assert stamps(tmp_path) == before
    assert len(write_families(tmp_path, "shapes", 3, SIZE)) == 3
    after = stamps(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len(after) == 3 * 13


@pytest.mark.parametrize("changed", [{"seed": 7}, {"size": 48}, {"format": "png"}])
def test_other_settings_replace_a_folder(tmp_path, changed):
    write_families(tmp_path, "shapes", 1, SIZE)
    (folder,) = write_families(tmp_path, "shapes", 1, **{"size": SIZE, **changed})
    assert len(list(folder.iterdir())) == 12
    fresh = write_families(tmp_path / "fresh", "shapes", 1, **{"size": SIZE, **changed})[0]
    for path in fresh.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_a_raised_version_makes_a_folder_again(tmp_path, monkeypatch):
    write_families(tmp_path, "shapes", 1, SIZE)
    before = stamps(tmp_path)
    monkeypatch.setitem(RECIPES, "shapes", dataclasses.replace(RECIPES["shapes"], version=99))
    write_families(tmp_path, "shapes", 1, SIZE)
    assert not set(before.values()) & set(stamps(tmp_path).values())


@pytest.mark.parametrize("damage", ["truncated", "missing", "no record"])
def test_a_damaged_folder_is_made_again_or_left_with_an_error(tmp_path, damage):
    (folder,) = write_families(tmp_path, "shapes", 1, SIZE)
    victim = folder / "shapes04.npz"
    whole = victim.read_bytes()
    if damage == "truncated":
        victim.write_bytes(whole[:100])
    elif damage == "missing":
        victim.unlink()
    else:
        (folder / "family.json").unlink()
        with pytest.raises(FileExistsError, match=r"shapes1\.density exists without a family\.json"):
            write_families(tmp_path, "shapes", 1, SIZE)
        return
    write_families(tmp_path, "shapes", 1, SIZE)
    assert victim.read_bytes() == whole


def test_another_program_s_folder_is_left_alone(tmp_path):
    mine = tmp_path / "shapes1.density"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="is not replaced"):
        write_families(tmp_path, "shapes", 1, SIZE)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_killed_in_mid_write_leaves_no_half_folder_and_goes_on(tmp_path):
    script = """
        import os, signal, sys
        import numpy as np
        from lsim.simulate import write_families

        save, calls = np.savez, []

        def save_until_killed(*args, **kwargs):
            calls.append(1)
            if len(calls) == 17:
                os.kill(os.getpid(), signal.SIGKILL)
            save(*args, **kwargs)

        np.savez = save_until_killed
        write_families(sys.argv[1], "shapes", 3, 64)
    """
    root = Path(__file__).parent.parent
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], cwd=root)
    assert killed.returncode == -9
    visible = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert visible == ["shapes1.density"]
    whole = stamps(tmp_path / "shapes1.density")
    folders = write_families(tmp_path, "shapes", 3, SIZE)
    assert stamps(tmp_path / "shapes1.density") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name for folder in folders]
    assert all(len(list(folder.iterdir())) == 12 for folder in folders)


def test_an_interrupted_replacement_is_taken_up(tmp_path):
    (folder,) = write_families(tmp_path, "shapes", 1, SIZE)
    # As a kill between the two renames leaves it: the old one aside, the new one not yet named.
    folder.rename(tmp_path / ".shapes1.density.replaced")
    (tmp_path / ".shapes1.density.partial").mkdir()
    write_families(tmp_path, "shapes", 1, SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["shapes1.density"]


# Hardness -------------------------------------------------------------------------------------------


def test_errors_of_the_reference_are_distances_of_the_metric_l2():
    frames = simulate_families("smoke", 1, 32).frames["velocity"][0]
    expected = lsim.load_metric("l2").pairwise(frames)[0, 1:]
    assert np.allclose(reference_errors(frames), expected, rtol=1e-5)


def graded(noise: float) -> Recipe:
    """A ramp that grows by each step, under noise: the longer the step, the easier."""

    def draw(rng):
        return {"height": np.asarray(1.0), "offset": np.asarray(rng.uniform())}

    def solver(parameters, generators, size, device, dtype):
        ramp = torch.linspace(0, 1, size, dtype=dtype)[None, :, None, None]
        shape = (len(parameters["height"]) // len(generators), size, size, 1)
        drawn = np.concatenate([rng.standard_normal(shape) for rng in generators])
        image = parameters["height"][:, None, None, None] * ramp + noise * torch.from_numpy(drawn).to(dtype)
        return {"field": image}

    return Recipe("graded", "", "graded", ("field",), draw, {"height": Variation(0.01)}, solver)


def test_hardness_is_one_where_the_error_grows_and_nothing_where_it_is_noise():
    for noise, step, low, high in ((0.0, 0.1, 1.0, 1.0), (1.0, 1e-9, -0.35, 0.35)):
        recipe = dataclasses.replace(graded(noise), variations={"height": Variation(step)})
        made = families.make(recipe, range(1, 9), 32, 0, CPU, torch.float32, 8)
        assert low <= hardness(made, size=None)["field"] <= high


@pytest.mark.parametrize(("step", "sign"), [(0.002, 1), (0.3, -1), (0.04, 0)])
def test_calibration_finds_a_factor_that_makes_steps_as_hard_as_wanted(step, sign):
    recipe = dataclasses.replace(graded(0.5), variations={"height": Variation(step)})
    found = calibrate_step(recipe, size=32, bounds=(1 / 64, 64))
    assert found.reached
    assert 0.6 <= found.hardness <= 0.8
    assert np.sign(found.factor - 1) == sign
    assert found.evaluations[0][0] == 1
    assert (found.factor, found.hardness) in found.evaluations
    assert len(found.evaluations) <= 8
    scaled = dataclasses.replace(recipe, variations={"height": Variation(found.factor * step)})
    made = families.make(scaled, range(1, 13), 32, 0, CPU, torch.float32, 4)
    assert hardness(made)["field"] == pytest.approx(found.hardness)


def test_calibration_gives_up_at_its_bounds_and_says_so():
    found = calibrate_step(graded(0.0), families=2, size=32, bounds=(1 / 3, 2))
    assert not found.reached
    assert [factor for factor, _ in found.evaluations] == [1, 0.5, 1 / 3]
    assert found.hardness > 0.99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": (0.8, 0.6)}, "target must be"),
        ({"bounds": (2, 4)}, "bounds must be"),
        ({"most": 0}, "most must be"),
    ],
)
def test_wrong_arguments_of_calibration_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate_step(graded(0.0), **arguments)
