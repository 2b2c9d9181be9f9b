"""Solvers against exact solutions, conservation laws and symmetries."""

import math

import numpy as np
import pytest
import torch

from lsim.simulate import (
    RECIPES,
    burgers,
    burgers_2d,
    families,
    fluid,
    liquid,
    plane_waves,
    shapes,
    simulate_families,
    sine_waves,
    smoke,
    transport,
)
from lsim.simulate import advection_diffusion as advdiff
from lsim.simulate import advection_diffusion_2d as advdiff_2d
from lsim.simulate.fourier import PeriodicGrid, diffusion, pad
from lsim.simulate.recipe import FRAMES, Recipe

CPU = torch.device("cpu")
DOUBLE = torch.float64
SIZE = 64  # small, and still a simulation
FORM = ("start", "end", "radius", "square", "edge", "frequency", "reach", "wave_vectors", "density_waves")


@pytest.fixture(autouse=True)
def one_thread():
    """Rows of a few hundred numbers: threads only wait for one another."""
    with families.torch_threads(1):
        yield


def solve(recipe: Recipe, size: int, **changed: object) -> dict[str, np.ndarray]:
    """One simulation in double precision: fields (y, x, channel).

    What isn't given is zero: mean, amplitudes, forcing, forces, noise; a form is the first one drawn.
    """
    parameters = recipe.draw(np.random.default_rng(0))
    for name, value in parameters.items():
        if name not in FORM:
            parameters[name] = np.zeros_like(value)
    assert changed.keys() <= parameters.keys()
    parameters.update({name: np.asarray(value, dtype=float) for name, value in changed.items()})
    rows = {name: torch.tensor(value, dtype=DOUBLE)[None] for name, value in parameters.items()}
    solved = recipe.solve(rows, [np.random.default_rng(0)], size, CPU, DOUBLE)
    assert set(solved) == set(recipe.fields)
    return {field: images[0].numpy() for field, images in solved.items()}


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
    image = solve(burgers.RECIPE, 128, amplitude_1=1.0, viscosity=0.01)["velocity"][..., 0]
    for row in (0, 13, 64, 127):
        assert np.abs(image[row] - cole_hopf(128, 0.01, 1.0, row / 128)).max() < 1e-5


def test_rows_of_the_advection_diffusion_image_are_the_carried_waves():
    size, speed, viscosity, waves, phase = 128, 0.6, 1e-3, 4, 0.9
    image = solve(
        advdiff.RECIPE, size, mean=speed, viscosity=viscosity, density_waves=waves, density_phase=phase
    )["density"][..., 0]
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
    )["velocity"][..., 0]
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
@pytest.mark.parametrize(
    ("recipe", "given"),
    [(burgers.RECIPE, {}), (advdiff.NOISY_RECIPE, {"density_phase": 0.0, "density_waves": 2})],
)
def test_noise_is_white_in_time_and_long_in_space_at_every_resolution(recipe, given, size):
    (field,) = recipe.fields
    noisy, still = (
        solve(recipe, size, noise=noise, viscosity=1e-3, **given)[field][..., 0] for noise in (0.05, 0.0)
    )
    image = noisy - still
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
    for frames, record in zip(records.frames["velocity"], records.records, strict=True):
        if record.varied != "mean":
            first_row = frames[0, 0].mean()
            assert first_row == pytest.approx(record.reference["mean"], abs=1e-6)
    density = simulate_families("advection-diffusion", 4, 128).frames["density"]
    assert np.abs(density).max() < 1.02


def test_velocity_noise_differs_between_frames_and_families():
    generators = [np.random.default_rng(seed) for seed in (0, 1)]
    noise = sine_waves.white_noise(generators, 3, PeriodicGrid(SIZE))
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
        )["density"][..., 0]
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
        for frames, reference in zip(made.frames["density"], references, strict=True)
        if reference["noise"] and not reference["edge"]
    ]
    assert noisy
    for frames in noisy:
        flat = frames.reshape(FRAMES, -1)
        residual = flat[:, (np.abs(flat) < 0.9).all(axis=0)]  # far from the shapes' 1: noise around 0
        assert residual.std() == pytest.approx(0.25, rel=0.1)
        assert np.abs(np.corrcoef(residual) - np.eye(FRAMES)).max() < 0.2


# Two dimensions --------------------------------------------------------------------------------------


def test_a_gaussian_in_two_dimensions_is_carried_and_widened_exactly():
    grid, viscosity, speed, steps, time = PeriodicGrid(64, 2, dtype=DOUBLE), 2e-3, (0.7, -0.4), 200, 0.5
    y, x = grid.coordinates

    def gaussian(at: float) -> torch.Tensor:
        variance = 0.06**2 + 2 * viscosity * at

        def along(axis: torch.Tensor, velocity: float) -> torch.Tensor:
            places = (axis - 0.5 - velocity * at + i for i in range(-3, 4))
            return sum(torch.exp(-(place**2) / (2 * variance)) for place in places)

        return along(x, speed[0]) * along(y, speed[1]) * 0.06**2 / variance

    decay = diffusion(grid, torch.tensor(viscosity, dtype=DOUBLE), time / steps)
    velocity = tuple(torch.full((1, 1, 1), component, dtype=DOUBLE) for component in speed)
    spectrum = grid.forward(gaussian(0.0)[None])
    for _ in range(steps):
        spectrum = advdiff_2d.step(spectrum, velocity, decay, time / steps, grid)
    assert (grid.backward(spectrum)[0] - gaussian(time)).abs().max() < 2e-7


def test_a_shear_flow_tilts_a_wave_exactly():
    grid, steps, time = PeriodicGrid(64, 2, dtype=DOUBLE), 50, 0.25
    y, x = grid.coordinates
    shear = torch.sin(2 * math.pi * y).expand(1, 64, 64)
    decay = diffusion(grid, torch.zeros((), dtype=DOUBLE), time / steps)
    spectrum = grid.forward(torch.sin(2 * math.pi * x).expand(1, 64, 64))
    for _ in range(steps):
        spectrum = advdiff_2d.step(spectrum, (shear, 0 * shear), decay, time / steps, grid)
    exact = torch.sin(2 * math.pi * (x - time * shear[0]))
    assert (grid.backward(spectrum)[0] - exact).abs().max() < 1e-6


@pytest.mark.parametrize("size", [64, 192])
def test_the_density_in_two_dimensions_is_carried_and_decays_mode_by_mode(size):
    time, viscosity, speed, phase = plane_waves.DURATION, 2e-3, (0.3, -0.2), 0.7
    made = solve(
        advdiff_2d.RECIPE,
        size,
        mean_x=speed[0],
        mean_y=speed[1],
        viscosity=viscosity,
        density_waves=2,
        density_phase=phase,
    )["density"][..., 0]
    at = np.arange(size) / size
    initial = ((np.sin(4 * np.pi * at + phase) + np.sin(4 * np.pi * at)[:, None]) / 2) ** 3
    k = 2 * np.pi * np.fft.fftfreq(size, 1 / size)
    k_y, k_x = k[:, None], k[None]
    factor = np.exp(-(viscosity * (k_x**2 + k_y**2) + 1j * (k_x * speed[0] + k_y * speed[1])) * time)
    exact = np.fft.ifft2(np.fft.fft2(initial) * factor).real
    assert np.abs(made - exact).max() < 1e-5


def test_stirring_keeps_the_density_s_integral_and_bounds():
    given = {f"amplitude_{k}": 0.1 for k in plane_waves.LENGTHS} | {"forcing": 1.0, "forcing_speed": 0.3}
    # Sines cubed have no mean; the noise on the velocity leaves it at that.
    density = solve(
        advdiff_2d.RECIPE, SIZE, viscosity=2e-3, noise=0.004, density_waves=1, density_phase=1.0, **given
    )["density"]
    assert abs(density.mean()) < 1e-12
    assert 0.3 < np.abs(density).max() < 1.01


@pytest.mark.parametrize("size", [64, 192])
def test_burgers_in_two_dimensions_is_cole_hopf(size):
    time, viscosity, mean = plane_waves.DURATION, 0.01, (0.2, -0.1)
    given = {"amplitude_1": 0.2, "amplitude_2": 0.1, "phase_a": 0.4, "phase_b": 2.0}
    made = solve(burgers_2d.RECIPE, size, viscosity=viscosity, mean_x=mean[0], mean_y=mean[1], **given)[
        "velocity"
    ]
    vectors = burgers_2d.draw(np.random.default_rng(0))["wave_vectors"]
    at = np.arange(size) / size
    y, x = at[:, None], at[None]
    potential = np.zeros((size, size))
    for k, length in enumerate(plane_waves.LENGTHS[:2]):
        for j, phase in enumerate((given["phase_a"], given["phase_b"])):
            angle = 2 * np.pi * (vectors[k, j, 0] * y + vectors[k, j, 1] * x) + (k + 1) * phase
            potential += given[f"amplitude_{length}"] / (2 * np.pi * length) * np.sin(angle)
    k = 2 * np.pi * np.fft.fftfreq(size, 1 / size)
    k_y, k_x = k[:, None], k[None]
    # φ = exp(−P / 2ν) obeys the heat equation, in coordinates that move with the mean.
    moved = np.exp(-viscosity * (k_x**2 + k_y**2) * time - 1j * (k_x * mean[0] + k_y * mean[1]) * time)
    spectrum = np.fft.fft2(np.exp(-potential / (2 * viscosity))) * moved
    phi = np.fft.ifft2(spectrum).real
    for channel, wave in enumerate((k_x, k_y)):
        exact = mean[channel] - 2 * viscosity * np.fft.ifft2(1j * wave * spectrum).real / phi
        assert np.ptp(exact) > 0.2  # something has happened
        assert np.abs(made[..., channel] - exact).max() < 1e-4
    assert not made[..., 2].any()


def test_a_finer_grid_has_the_same_potential_and_noise_and_no_more_waves():
    coarse, fine = PeriodicGrid(32, 2, dtype=DOUBLE), PeriodicGrid(64, 2, dtype=DOUBLE)
    drawn = {
        name: torch.from_numpy(np.asarray(value))[None]
        for name, value in plane_waves.draw(np.random.default_rng(1), 0.3).items()
    }
    for there, here in (
        (plane_waves.potential(drawn, fine), plane_waves.potential(drawn, coarse)),
        *([plane_waves.noise([np.random.default_rng(2)], 3, grid) for grid in (fine, coarse)],),
    ):
        assert torch.allclose(fine.backward(there)[:, ::2, ::2], coarse.backward(here), atol=1e-12)
        assert not there[:, 17:48].any()
    noise = coarse.backward(plane_waves.noise([np.random.default_rng(2)], 20, coarse))
    assert float(noise.std()) == pytest.approx(1, rel=0.05)
    with pytest.raises(ValueError, match="64 points to a coarser grid of 32"):
        pad(fine.forward(torch.zeros(1, 64, 64, dtype=DOUBLE)), coarse)


# The box ----------------------------------------------------------------------------------------------


def random_flow(box: fluid.Box, rows: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    n = box.n
    return rng.standard_normal((rows, n, n + 1)), rng.standard_normal((rows, n + 1, n))


@pytest.mark.parametrize("open_top", [False, True])
def test_projection_leaves_no_divergence_and_no_flow_through_walls(open_top):
    box = fluid.Box(48, open_top, np.dtype(np.float64))
    u, v, _ = box.project(*random_flow(box))
    assert np.abs(box.divergence(u, v)).max() < 1e-10
    assert not u[:, :, [0, -1]].any()
    assert not v[:, 0].any()
    assert bool(v[:, -1].any()) == open_top
    again_u, again_v, potential = box.project(u.copy(), v.copy())
    assert np.allclose(again_u, u, atol=1e-12)
    assert np.allclose(again_v, v, atol=1e-12)
    assert np.abs(potential).max() < 1e-12


def test_weight_on_a_fluid_under_an_open_top_makes_hydrostatic_pressure_and_no_flow():
    box = fluid.Box(32, True, np.dtype(np.float64))
    u, v = box.velocity_at_rest(1)
    v += 0.3
    u, v, potential = box.project(u, v)
    assert np.abs(u).max() < 1e-13
    assert np.abs(v).max() < 1e-13
    assert np.allclose(potential, 0.3 * (box.y - 1), atol=1e-13)


def test_nothing_flows_through_an_obstacle_and_divergence_stays_near_it():
    box = fluid.Box(64, True, np.dtype(np.float64))
    blocked = fluid.disc(box, np.array([0.5]), np.array([0.4]), np.array([0.12])) > 0.5
    # A smooth stream upwards, as buoyancy makes one.
    u, v = box.velocity_at_rest(1)
    v += np.exp(-((box.x - 0.4) ** 2) / 0.02)
    before = np.abs(box.divergence(*box._project_once(u.copy(), v.copy())[:2])).max()
    u, v, _ = box.project(u, v, blocked)
    inside_u = blocked[:, :, 1:] | blocked[:, :, :-1]
    inside_v = blocked[:, 1:] | blocked[:, :-1]
    assert not u[:, :, 1:-1][inside_u].any()
    assert not v[:, 1:-1][inside_v].any()
    assert not u[:, :, [0, -1]].any()
    assert not v[:, 0].any()
    rest = np.abs(box.divergence(u, v))[0]
    near = np.pad(blocked[0], 1)
    near = near[1:-1, 1:-1] | near[2:, 1:-1] | near[:-2, 1:-1] | near[1:-1, 2:] | near[1:-1, :-2]
    assert before < 1e-10
    assert rest[~near].max() < 1e-10
    assert rest.max() < 0.35 * np.abs(v).max() * box.n


def test_the_vortex_that_euler_s_equations_keep_is_kept_to_first_order_in_the_time_step():
    # u = sin πx cos πy, v = −cos πx sin πy: Taylor and Green's flow, without viscosity, between walls.
    errors = []
    for n in (16, 32, 64):
        box = fluid.Box(n, False, np.dtype(np.float64))
        faces, centres = np.arange(n + 1) / n, (np.arange(n) + 0.5) / n
        u = (np.cos(np.pi * centres)[:, None] * np.sin(np.pi * faces))[None]
        v = (-np.sin(np.pi * faces)[:, None] * np.cos(np.pi * centres))[None]
        exact = u.copy()
        for _ in range(n):
            u, v = box.advect_velocity(u, v, 1 / n)
            u, v, _ = box.project(u, v)
        errors.append(np.sqrt(((u - exact) ** 2).mean()))
        kept = (u * exact).sum() / (exact**2).sum()
        assert 1 - 2.5 / n < kept < 1  # it loses strength, and gains none
    assert errors[-1] < 0.02
    assert errors[0] / errors[1] > 1.7
    assert errors[1] / errors[2] > 1.8


def test_a_scalar_turns_with_the_fluid_and_keeps_its_bounds():
    errors = []
    for n in (32, 64):
        box = fluid.Box(n, False, np.dtype(np.float64))
        centres = (np.arange(n) + 0.5) / n - 0.5
        u = np.broadcast_to(-centres[:, None], (1, n, n + 1)).copy()
        v = np.broadcast_to(centres[None], (1, n + 1, n)).copy()
        field, turned = (
            np.exp(-((centres[:, None] - y) ** 2 + (centres[None] - x) ** 2) / (2 * 0.08**2))[None]
            for y, x in ((0.0, 0.2), (0.2, 0.0))
        )
        steps = 2 * n
        for _ in range(steps):
            field = box.advect_scalar(field, u, v, math.pi / 2 / steps)
        assert field.min() >= 0
        assert field.max() <= 1
        errors.append(np.abs(field - turned).max())  # a quarter turn
    assert errors[1] < 0.05
    assert errors[0] / errors[1] > 2.5


def test_noise_in_the_box_has_variance_one_at_every_face():
    box = fluid.Box(24, False, np.dtype(np.float64))
    along_x, along_y = box.noise([np.random.default_rng(0), np.random.default_rng(1)], 500)
    assert along_x.shape == (1000, 24, 25)
    assert along_y.shape == (1000, 25, 24)
    for noise in (along_x, along_y):
        assert np.allclose(noise.std(axis=0), 1, atol=0.12)
        assert noise.std() == pytest.approx(1, abs=0.01)


# Smoke and liquid ---------------------------------------------------------------------------------------

SMOKE = {
    "source_x": 0.5,
    "source_y": 0.14,
    "source_radius": 0.1,
    "buoyancy_y": 3.5,
    "obstacle_x": 0.5,
    "obstacle_y": 0.5,
    "obstacle_radius": 0.1,
}
LIQUID = {"drop_x": 0.35, "drop_y": 0.6, "drop_radius": 0.15, "basin": 0.2, "gravity_y": 4.0}


def test_smoke_rises_around_the_obstacle_within_its_bounds():
    made = solve(smoke.RECIPE, SIZE, **SMOKE)
    density = made["density"][..., 0]
    assert density.min() == 0
    assert 0.9 < density.max() <= 1
    height = (np.arange(SIZE)[::-1] + 0.5) / SIZE  # y downwards in the image
    assert density.sum(axis=1) @ height / density.sum() > 0.25
    assert density[height > 0.55].max() > 0.5  # it has come past the obstacle
    y, x = height[:, None], ((np.arange(SIZE) + 0.5) / SIZE)[None]
    obstacle = np.hypot(y - 0.5, x - 0.5) < 0.1 - 1 / SIZE
    assert not density[obstacle].any()
    assert np.abs(made["velocity"][obstacle]).max() == 0
    assert made["velocity"][..., 1].max() > 0.2


def test_smoke_in_a_symmetric_box_is_symmetric():
    made = solve(smoke.RECIPE, SIZE, **SMOKE)
    mirrored = {field: image[:, ::-1] for field, image in made.items()}
    for field in ("density", "pressure"):
        assert np.abs(made[field] - mirrored[field]).max() < 1e-8 * np.ptp(made[field])
    assert np.abs(made["velocity"] - mirrored["velocity"] * [-1, 1, 0]).max() < 1e-8


def test_a_drop_falls_and_keeps_its_volume():
    phase = solve(liquid.RECIPE, SIZE, **LIQUID)["phase"][..., 0]
    volume = LIQUID["basin"] + math.pi * LIQUID["drop_radius"] ** 2
    assert phase.mean() == pytest.approx(volume, rel=2e-3)
    assert -0.05 < phase.min() < phase.max() < 1.05
    height = ((np.arange(SIZE)[::-1] + 0.5) / SIZE)[:, None]
    began = (LIQUID["basin"] ** 2 / 2 + math.pi * LIQUID["drop_radius"] ** 2 * LIQUID["drop_y"]) / volume
    assert (phase * height).sum() / phase.sum() < 0.75 * began
    assert ((phase > 0.1) & (phase < 0.9)).mean() < 0.2  # still an interface, not a mixture


def test_volume_is_that_of_the_first_state_to_rounding():
    box = fluid.Box(SIZE, False, np.dtype(np.float64))
    rng = np.random.default_rng(0)
    phase = fluid.disc(box, np.array([0.5, 0.4]), np.array([0.5, 0.6]), np.array([0.2, 0.1]))
    blurred = np.clip(phase + 0.01 * rng.standard_normal(phase.shape) * phase * (1 - phase), 0, 1)
    amount = blurred.sum(axis=(1, 2))
    sharp = liquid.sharpen(blurred)
    assert np.allclose(sharp.sum(axis=(1, 2)), amount, rtol=1e-13)
    lost = liquid.restore(0.99 * sharp, amount)
    assert np.allclose(lost.sum(axis=(1, 2)), amount, rtol=1e-13)


def test_a_basin_under_no_drop_is_at_rest():
    made = solve(liquid.RECIPE, SIZE, drop_radius=-1.0, drop_y=0.6, drop_x=0.5, basin=0.3, gravity_y=4.0)
    assert np.abs(made["velocity"]).max() < 1e-12
    assert made["phase"].mean() == pytest.approx(0.3, abs=1e-12)
    assert np.ptp(made["phase"], axis=1).max() < 1e-12


def test_a_mirrored_drop_falls_as_in_a_mirror():
    one = solve(liquid.RECIPE, SIZE, **LIQUID, gravity_x=0.3)
    other = solve(liquid.RECIPE, SIZE, **(LIQUID | {"drop_x": 1 - LIQUID["drop_x"]}), gravity_x=-0.3)
    assert np.abs(one["phase"] - other["phase"][:, ::-1]).max() < 1e-6
    assert np.abs(one["velocity"] - other["velocity"][:, ::-1] * [-1, 1, 0]).max() < 1e-6
    assert np.abs(one["velocity"]).max() > 0.1


def test_the_noisy_background_is_noise_where_there_is_no_liquid():
    clean = solve(liquid.RECIPE, SIZE, **LIQUID)
    noisy = solve(liquid.NOISY_RECIPE, SIZE, **LIQUID)
    empty = 1 - clean["phase"][..., 0].clip(0, 1)
    for field, channels in (("phase", 1), ("velocity", 2)):
        span = np.ptp(clean[field])
        added = noisy[field] - clean[field]
        assert not added[empty == 0].any()
        assert not added[..., channels:].any()
        deviation = added[empty > 0.99][:, :channels].std(axis=0)
        assert np.allclose(deviation, liquid.BACKGROUND * span, rtol=0.06)


@pytest.mark.parametrize("position", [0.0, 0.35, 1.0])
def test_a_wave_moves_linearly(position):
    start, end, frequency, reach = np.array([0.3, 0.25]), np.array([0.6, 0.75]), 4.0, 0.1
    none = np.zeros((2, 2))
    made = solve(
        RECIPES["waves"],
        100,
        start=np.array([start, *none]),
        end=np.array([end, *none]),
        frequency=[frequency, 0, 0],
        reach=[reach, 0, 0],
        position=position,
    )["elevation"][..., 0]
    centre = start + position * (end - start)
    pixels = (np.arange(100) + 0.5) / 100
    away = np.hypot(pixels[:, None] - centre[0], pixels[None] - centre[1])
    assert np.allclose(made, np.cos(2 * np.pi * frequency * away) * np.exp(-away / reach), atol=1e-12)


def test_a_wind_carries_the_density_round_the_periodic_square():
    form = {"waves": np.tile([1.0, 2.0], (8, 1)), "amplitude": [1.0, *[0.0] * 7], "radius": np.zeros(4)}
    form |= {"sharpness": 1.0, "cells": 1.0}
    still, moved = (
        solve(transport.RECIPE, SIZE, wind_x=0.25 * on, wind_y=0.125 * on, **form)["density"] for on in (0, 1)
    )
    assert np.allclose(moved, np.roll(still, (SIZE // 8, SIZE // 4), (0, 1)), atol=1e-12)
    assert np.ptp(still) > 1


def test_a_swirl_carries_along_the_stream_lines_and_keeps_areas():
    swirl, phases = 0.25, torch.tensor([[0.3, 1.1]], dtype=DOUBLE)[..., None, None]
    p = {name: torch.zeros(1, 1, 1, dtype=DOUBLE) for name in ("wind_x", "wind_y", "swirl", "cells")}
    p |= {"swirl": p["swirl"] + swirl, "cells": p["cells"] + 1, "cell_phase": phases}
    pixels = (torch.arange(SIZE, dtype=DOUBLE) + 0.5) / SIZE
    y, x = (axis.expand(1, SIZE, SIZE) for axis in (pixels[:, None], pixels[None, :]))
    there_y, there_x = transport.departure(p, y, x)

    def stream(y, x):
        return torch.sin(2 * math.pi * x + phases[:, 0]) * torch.sin(2 * math.pi * y + phases[:, 1])

    assert (there_x - x).abs().max() > 0.1
    assert (stream(there_y, there_x) - stream(y, x)).abs().max() < 1e-4
    # Central differences of the map, inside: its determinant is one.
    (yy, yx), (xy, xx) = (torch.gradient(there, dim=(1, 2)) for there in (there_y, there_x))
    area = ((yy * xx - yx * xy) * SIZE**2)[:, 1:-1, 1:-1]
    assert (area - 1).abs().max() < 0.05


def test_a_moderate_swirl_of_small_cells_is_resolved(monkeypatch):
    shape = (1, 1, 1)
    p = {"wind_x": 0.2, "wind_y": -0.1, "swirl": 0.25, "cells": 2.0}
    parameters = {name: torch.full(shape, value, dtype=DOUBLE) for name, value in p.items()}
    parameters["cell_phase"] = torch.tensor([[0.3, 1.1]], dtype=DOUBLE)[..., None, None]
    pixels = (torch.arange(SIZE, dtype=DOUBLE) + 0.5) / SIZE
    y, x = (axis.expand(1, SIZE, SIZE) for axis in (pixels[:, None], pixels[None, :]))
    found = transport.departure(parameters, y, x)
    monkeypatch.setattr(transport, "STEPS", 256)
    exact = transport.departure(parameters, y, x)
    assert torch.hypot(found[0] - exact[0], found[1] - exact[1]).max() < 5e-4
