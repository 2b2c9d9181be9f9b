"""Solvers against exact solutions, families against their promises, folders against interruptions."""

import dataclasses
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

from lsim.simulate import (
    RECIPES,
    UnknownRecipeError,
    burgers,
    families,
    shapes,
    simulate_families,
    waves,
    write_families,
)
from lsim.simulate import advection_diffusion as advdiff
from lsim.simulate.recipe import FRAMES, Recipe, Variation
from lsim.simulate.spectral import PeriodicGrid, diffusion

CPU = torch.device("cpu")
DOUBLE = torch.float64
SIZE = 64  # small, and still a simulation
ALL = sorted(RECIPES)


@pytest.fixture(autouse=True)
def one_thread():
    """Rows of a few hundred numbers: threads only wait for one another."""
    with families.torch_threads(1):
        yield


def solve(recipe: Recipe, size: int, **changed: object) -> np.ndarray:
    """One simulation in double precision, without noise and forcing: (y, x)."""
    reference = recipe.draw(np.random.default_rng(0))
    for name in reference:
        if name not in ("density_waves", "edge") and recipe is not shapes.RECIPE:
            reference[name] = np.zeros_like(reference[name])
    reference["noise"] = np.zeros(())
    reference.update({name: np.asarray(value, dtype=float) for name, value in changed.items()})
    parameters = {name: torch.from_numpy(np.asarray(value))[None] for name, value in reference.items()}
    return recipe.solve(parameters, [np.random.default_rng(0)], size, CPU, DOUBLE)[0, ..., 0].numpy()


def cole_hopf(size: int, viscosity: float, amplitude: float, time: float) -> np.ndarray:
    """Exact Burgers solution from u(x, 0) = amplitude · sin(2πx): u = −2ν φ_x / φ, φ_t = ν φ_xx."""
    x = np.arange(size) / size
    k = 2 * np.pi * np.fft.rfftfreq(size, 1 / size)
    phi = np.exp(-amplitude * (1 - np.cos(2 * np.pi * x)) / (4 * np.pi * viscosity))
    spectrum = np.fft.rfft(phi) * np.exp(-viscosity * k**2 * time)
    return -2 * viscosity * np.fft.irfft(1j * k * spectrum, size) / np.fft.irfft(spectrum, size)


# Building blocks ------------------------------------------------------------------------------------


def test_derivative_of_a_wave_is_exact_along_each_axis():
    grid = PeriodicGrid(32, dim=2, dtype=DOUBLE)
    y, x = grid.coordinates
    spectrum = grid.forward(torch.sin(2 * math.pi * (3 * x + 5 * y)))
    slope = torch.cos(2 * math.pi * (3 * x + 5 * y))
    along_x = grid.backward(grid.derivative(spectrum, -1))
    along_y = grid.backward(grid.derivative(spectrum, -2))
    assert torch.allclose(along_x, 6 * math.pi * slope, atol=1e-11)
    assert torch.allclose(along_y, 10 * math.pi * slope, atol=1e-11)


def test_products_inside_the_band_are_free_of_aliases():
    grid = PeriodicGrid(96, dtype=DOUBLE)
    (x,) = grid.coordinates
    a, b = 30, 28  # both kept (below 96 / 3); their sum, 58, folds back to 38
    product = torch.sin(2 * math.pi * a * x) * torch.sin(2 * math.pi * b * x)
    kept = grid.backward(grid.forward(product) * grid.band)
    assert torch.allclose(kept, 0.5 * torch.cos(2 * math.pi * (a - b) * x), atol=1e-13)


@pytest.mark.parametrize("size", [15, 33, 8])
def test_grid_refuses_odd_and_tiny_sizes(size):
    with pytest.raises(ValueError, match=f"even size of at least 16 points, got {size}"):
        PeriodicGrid(size)


@pytest.mark.parametrize("waves", [1, 7, 20])
def test_a_mode_decays_as_the_heat_equation_says_whatever_the_step(waves):
    grid, viscosity, dt = PeriodicGrid(64, dtype=DOUBLE), torch.tensor([[0.01]], dtype=DOUBLE), 0.3
    (x,) = grid.coordinates
    mode = torch.sin(2 * math.pi * waves * x)[None]
    still = torch.zeros_like(mode)
    after = advdiff.step(grid.forward(mode), still, diffusion(grid, viscosity, dt), dt, grid)
    exact = math.exp(-0.01 * (2 * math.pi * waves) ** 2 * dt) * mode
    assert torch.allclose(grid.backward(after), exact, rtol=1e-10, atol=1e-14)


def test_a_gaussian_is_carried_and_widened_exactly():
    grid, viscosity, speed, steps = PeriodicGrid(128, dtype=DOUBLE), 1e-3, 0.7, 512
    (x,) = grid.coordinates

    def gaussian(time: float) -> torch.Tensor:
        variance = 0.05**2 + 2 * viscosity * time
        images = sum(torch.exp(-((x - 0.5 - speed * time + i) ** 2) / (2 * variance)) for i in range(-3, 4))
        return images * 0.05 / math.sqrt(variance)

    decay = diffusion(grid, torch.tensor([[viscosity]], dtype=DOUBLE), 1 / steps)
    velocity = torch.full((1, 1), speed, dtype=DOUBLE)
    spectrum = grid.forward(gaussian(0.0)[None])
    for _ in range(steps):
        spectrum = advdiff.step(spectrum, velocity, decay, 1 / steps, grid)
    assert (grid.backward(spectrum)[0] - gaussian(1.0)).abs().max() < 1e-6


def test_burgers_step_converges_to_cole_hopf_at_fourth_order():
    size, viscosity, time = 256, 0.02, 0.25
    grid = PeriodicGrid(size, dtype=DOUBLE)
    exact = cole_hopf(size, viscosity, 1.0, time)
    errors = []
    for steps in (20, 40, 80):
        decay = diffusion(grid, torch.tensor([[viscosity]], dtype=DOUBLE), time / steps)
        spectrum = grid.forward(torch.sin(2 * math.pi * grid.coordinates[0])[None])
        for _ in range(steps):
            spectrum = burgers.step(spectrum, decay, time / steps, grid)
        errors.append(np.abs(grid.backward(spectrum)[0].numpy() - exact).max())
    assert errors[-1] < 1e-6
    assert errors[0] / errors[1] > 12
    assert errors[1] / errors[2] > 12


# Recipes, whole -------------------------------------------------------------------------------------


def test_rows_of_the_burgers_image_are_cole_hopf_at_their_times():
    image = solve(burgers.RECIPE, 128, amplitude_1=1.0, viscosity=0.01)
    for row in (0, 13, 64, 127):
        assert np.abs(image[row] - cole_hopf(128, 0.01, 1.0, row / 128)).max() < 1e-5


def test_rows_of_the_advection_diffusion_image_are_the_carried_waves():
    size, speed, viscosity, waves, phase = 128, 0.6, 1e-3, 4, 0.9
    image = solve(
        advdiff.RECIPE, size, mean=speed, viscosity=viscosity, density_waves=waves, density_phase=phase
    )
    time, x = np.arange(size)[:, None] / size, np.arange(size)[None] / size
    k = 2 * np.pi * waves
    angle = k * (x - speed * time) + phase
    one, three = (np.exp(-viscosity * (m * k) ** 2 * time) for m in (1, 3))
    exact = (3 * np.sin(angle) * one - np.sin(3 * angle) * three) / 4
    assert np.abs(image - exact).max() < 1e-5


@pytest.mark.parametrize("speed", [0.0, 0.3, -0.4])
def test_travelling_forcing_drives_a_weak_wave_as_the_linear_equation_says(speed):
    # So weak that u u_x is nothing: u = Im(A(t) exp(2πix)) with A' = -rate A + strength exp(2πi s(t)).
    amplitude, viscosity, strength, size = 1e-4, 0.01, 20.0, 256
    image = solve(
        burgers.RECIPE,
        size,
        amplitude_1=amplitude,
        viscosity=viscosity,
        forcing=strength,
        forcing_speed=speed,
    )
    rate = viscosity * (2 * np.pi) ** 2
    for row in (64, 128, 255):
        past = np.linspace(0, row / size, 20001)
        pattern = np.exp(2j * np.pi * speed * past * (0.5 + np.sin(3 * past)))
        driven = np.trapezoid(np.exp(-rate * (past[-1] - past)) * pattern, past)
        coefficient = amplitude * (np.exp(-rate * past[-1]) + strength * driven)
        exact = np.imag(coefficient * np.exp(2j * np.pi * np.arange(size) / size))
        # The forcing acts between rows, to first order in their distance.
        assert np.abs(image[row] - exact).max() < 0.02 * abs(coefficient)


@pytest.mark.parametrize("size", [128, 256])
def test_velocity_noise_is_white_in_time_and_long_in_space_at_every_resolution(size):
    image = solve(burgers.RECIPE, size, noise=0.05, viscosity=1e-3)
    assert np.array_equal(image[0], np.zeros(size))
    # The mean, which nothing else moves, walks at random: its variance is noise² t.
    steps = np.diff(image.mean(axis=1))
    assert steps.std() * np.sqrt(size) == pytest.approx(0.05, rel=0.25)
    assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1]) < 0.3
    power = np.abs(np.fft.rfft(image[1]))
    assert power[33:].max() < 1e-6 * power[:33].max()
    assert power[25:33].max() > 0.1 * power[:33].max()


def test_burgers_keeps_its_mean_and_density_its_bounds():
    records = simulate_families("burgers", 4, SIZE, dtype=DOUBLE)
    for frames, record in zip(records.frames, records.records, strict=True):
        if record.varied != "mean":
            first_row = frames[0, 0].mean()
            assert first_row == pytest.approx(record.reference["mean"], abs=1e-6)
    density = simulate_families("advection-diffusion", 4, 128).frames
    assert np.abs(density).max() < 1.02


def test_velocity_noise_differs_between_frames_and_families():
    generators = [np.random.default_rng(seed) for seed in (0, 1)]
    noise = waves.white_noise(generators, 3, PeriodicGrid(SIZE))
    assert noise.shape == (6, SIZE, SIZE)
    correlations = np.corrcoef(noise.reshape(6, -1).numpy())
    assert np.abs(correlations - np.eye(6)).max() < 0.1


@pytest.mark.parametrize("square", [0.0, 1.0])
@pytest.mark.parametrize("edge", [0.0, 1 / 32])
def test_a_shape_moves_linearly_and_keeps_its_area(square, edge):
    start, end, radius = np.array([0.3, 0.25]), np.array([0.6, 0.75]), 0.1
    places, areas = [], []
    for position in np.arange(FRAMES) / 10:
        image = solve(
            shapes.RECIPE,
            200,
            start=np.array([start, *np.zeros((4, 2))]),
            end=np.array([end, *np.zeros((4, 2))]),
            radius=[radius, 0, 0, 0, 0],
            square=[square] * 5,
            edge=edge,
            position=position,
        )
        centres = (np.arange(200) + 0.5) / 200
        areas.append(image.mean())
        places.append([(image.sum(1) @ centres), (image.sum(0) @ centres)] / image.sum())
    expected = start + np.linspace(0, 1, FRAMES)[:, None] * (end - start)
    assert np.abs(np.array(places) - expected).max() < 5e-4  # a tenth of a pixel
    exact_area = (2 * 0.85 * radius) ** 2 if square else np.pi * radius**2
    assert np.allclose(areas, exact_area, rtol=0.04)
    assert np.ptp(areas) < 0.01 * exact_area


def test_shapes_stay_inside_the_walls():
    for seed in range(200):
        drawn = shapes.draw(np.random.default_rng(seed))
        there = drawn["radius"] > 0
        assert 1 <= there.sum() <= 5
        for place in (drawn["start"], drawn["end"]):
            assert (place[there] >= drawn["radius"][there, None]).all()
            assert (place[there] <= 1 - drawn["radius"][there, None]).all()


def test_noise_is_drawn_for_each_frame_on_its_own_with_the_stated_strength():
    made = simulate_families("shapes", 12, SIZE)
    references = [record.reference for record in made.records]
    noisy = [
        frames
        for frames, reference in zip(made.frames, references, strict=True)
        if reference["noise"] and not reference["edge"]
    ]
    assert noisy
    for frames in noisy:
        flat = frames.reshape(FRAMES, -1)
        residual = flat[:, (np.abs(flat) < 0.9).all(axis=0)]  # far from the shapes' 1: noise around 0
        assert residual.std() == pytest.approx(0.25, rel=0.1)
        assert np.abs(np.corrcoef(residual) - np.eye(FRAMES)).max() < 0.2


# Families -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_family_is_what_it_promises(name):
    made = simulate_families(name, 3, SIZE, seed=4)
    recipe = RECIPES[name]
    assert made.frames.shape == (3, 11, SIZE, SIZE, 1)
    assert made.frames.dtype == np.float32
    assert np.array_equal(made.parameter, np.arange(11) / 10)
    assert (made.recipe, made.field) == (name, recipe.field)
    assert np.isfinite(made.frames).all()
    assert (made.frames.std(axis=(2, 3, 4)) > 0).all()
    for number, (frames, record) in enumerate(zip(made.frames, made.records, strict=True), start=1):
        assert (record.number, record.seed) == (number, 4)
        assert record.varied in recipe.variations
        assert record.values[0] == record.reference[record.varied]
        assert np.allclose(np.diff(record.values), record.step)
        assert record.step != 0
        assert len({frame.tobytes() for frame in frames}) == 11


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


@pytest.mark.parametrize("name", ["advection-diffusion", "burgers"])
def test_every_variation_is_drawn_sooner_or_later_both_ways_where_it_may(name):
    drawn = [families.draw_family(RECIPES[name], number, seed=0) for number in range(1, 400)]
    for key, variation in RECIPES[name].variations.items():
        signs = {math.copysign(1, draw.step) for draw in drawn if draw.varied == key}
        assert signs == ({-1, 1} if variation.both_ways else {1})


@pytest.mark.parametrize("name", ALL)
def test_frames_depend_on_seed_and_number_alone(name):
    made = simulate_families(name, 5, SIZE, seed=2, batch=5)
    again = simulate_families(name, 5, SIZE, seed=2, batch=5)
    alone = simulate_families(name, 5, SIZE, seed=2, batch=1)
    some = simulate_families(name, [4, 2], SIZE, seed=2, batch=2)
    assert made.frames.tobytes() == again.frames.tobytes() == alone.frames.tobytes()
    assert some.frames.tobytes() == made.frames[[3, 1]].tobytes()
    assert made.records == again.records == alone.records
    other = simulate_families(name, 5, SIZE, seed=3)
    assert not {frame.tobytes() for frame in other.frames} & {frame.tobytes() for frame in made.frames}
    assert len({frame.tobytes() for frame in made.frames}) == 5


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
    one = simulate_families(name, 3, SIZE)
    spread = np.ptp(one.frames.reshape(3, -1), axis=1)
    for other in (
        simulate_families(name, 3, SIZE, threads=2),
        simulate_families(name, 3, SIZE, dtype=DOUBLE),
    ):
        apart = np.abs(one.frames - other.frames).reshape(3, -1).max(axis=1)
        assert (apart < 1e-4 * spread).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ALL)
def test_a_gpu_gives_the_same_families_up_to_rounding(name):
    here, there = (simulate_families(name, 3, SIZE, device=device) for device in ("cpu", "cuda"))
    assert np.abs(here.frames - there.frames).max() < 1e-4 * np.ptp(here.frames)
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
        return image.expand(-1, size, size, 1)

    return Recipe("faulty", "", "faulty", "field", draw, {"shift": Variation(0.1)}, solver)


@pytest.mark.parametrize(("bad", "reason"), [(math.nan, "not finite"), (0.0, "constant frame")])
def test_unusable_draws_are_replaced_and_counted(bad, reason):
    numbers = list(range(1, 21))
    made = families.make(faulty_recipe(bad), numbers, 16, 0, CPU, torch.float32, batch=7)
    assert [record.number for record in made.records] == numbers
    assert np.isfinite(made.frames).all()
    assert all(record.reference["level"] == 1.0 for record in made.records)
    assert set(made.discarded) == {reason}
    assert made.discarded[reason] == sum(record.discarded.get(reason, 0) for record in made.records)
    alone = families.make(faulty_recipe(bad), [9], 16, 0, CPU, torch.float32, batch=1)
    assert alone.records[0] == made.records[8]


def test_a_recipe_that_never_works_says_so():
    hopeless = dataclasses.replace(
        faulty_recipe(0.0), draw=lambda rng: {"level": np.zeros(()), "shift": np.zeros(())}
    )
    with pytest.raises(RuntimeError, match=r"'faulty', seed 3, family 1: 50 draws.*constant frame"):
        families.make(hopeless, [1], 16, 3, CPU, torch.float32, 1)


def test_a_parameter_without_effect_is_a_defect():
    frame = np.random.default_rng(0).normal(size=(1, 16, 16, 1)).astype(np.float32)
    same = np.repeat(frame, FRAMES, axis=0)
    assert families.defect(same) == "no effect"
    assert families.defect(same + np.linspace(0, 1, FRAMES, dtype=np.float32)[:, None, None, None]) is None


def test_an_unknown_recipe_suggests_a_near_one(tmp_path):
    with pytest.raises(UnknownRecipeError, match=r"no recipe named 'burger'; did you mean 'burgers'\?"):
        simulate_families("burger", 1)
    with pytest.raises(UnknownRecipeError, match="there are advection-diffusion, burgers, shapes"):
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
    for folder, frames, record in zip(folders, made.frames, made.records, strict=True):
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
    frames = simulate_families("burgers", 1, SIZE).frames[0, ..., 0]
    assert np.abs(lo + images * (hi - lo) / 255 - frames).max() <= (hi - lo) / 255 * 0.501


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
        with pytest.raises(FileExistsError, match=r"shapes1\.density exists and has no family\.json"):
            write_families(tmp_path, "shapes", 1, SIZE)
        return
    write_families(tmp_path, "shapes", 1, SIZE)
    assert victim.read_bytes() == whole


def test_another_program_s_folder_is_left_alone(tmp_path):
    mine = tmp_path / "shapes1.density"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="isn't replaced"):
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
