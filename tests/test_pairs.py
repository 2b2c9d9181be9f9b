"""Sums over pairs are right to the promise on whatever frames, and to the bit wherever a pair stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsim import gram, no_tf32, pairs
from lsim.embedding import Embedding
from lsim.error_bounds import PROMISE, PairPrecision
from lsim.gram import known_in_both, squared_differences_in_torch
from lsim.pairs import (
    TileKernel,
    absolute_differences,
    all_pairs,
    known_absolute_differences,
    known_squared_differences,
    rows_in_torch,
    squared_differences,
    squared_distances,
)

KERNELS = {
    "squared": squared_differences,
    "absolute": absolute_differences,
    "squared, known": known_squared_differences,
    "absolute, known": known_absolute_differences,
}

Sums = Callable[[np.ndarray, np.ndarray], np.ndarray]


def by_differences(x: np.ndarray, y: np.ndarray, squared: bool = True) -> np.ndarray:
    """In double precision, over what is known in both."""
    differences = x.astype(np.float64)[:, None] - y.astype(np.float64)
    return np.nansum(differences**2 if squared else np.abs(differences), axis=2)


def compiled(kernel: TileKernel, x: np.ndarray, y: np.ndarray, *, symmetric: bool = False) -> np.ndarray:
    return all_pairs(kernel, len(x), len(y), x, y, symmetric=symmetric, operations=x.shape[1]).numpy()


def in_torch(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return squared_differences_in_torch(torch.from_numpy(x), torch.from_numpy(y))[0].numpy()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- right to the promise ---------------------------------------------------------------------------------


@st.composite
def near_duplicates(draw: st.DrawFn) -> tuple[np.ndarray, bool]:
    """Rows that differ in a few values, by a grey level or by much less; and whether they are whole."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    columns = draw(st.integers(1, 1500))
    whole = draw(st.booleans())
    levels = rng.integers(0, 256, columns).astype(np.float32) if whole else rng.uniform(0, 255, columns)
    rows = np.repeat(levels.astype(np.float32)[None], draw(st.integers(2, 9)), axis=0)
    for row in rows[1:]:
        changed = rng.integers(columns, size=draw(st.sampled_from([0, 1, 1, 2, 30, columns])))
        step = 1.0 if whole else draw(st.sampled_from([1.0, 1e-2, 1e-4]))
        row[changed] += np.where(row[changed] >= 128, -step, step).astype(np.float32)
    if draw(st.booleans()):
        rows[-1] = rng.integers(0, 256, columns) if whole else rng.uniform(0, 255, columns)
    return rows, whole


@settings(max_examples=150, deadline=None)
@given(near_duplicates())
def test_near_duplicates_keep_the_promise(drawn: tuple[np.ndarray, bool]) -> None:
    """8-bit values exactly; the others to 1e-5 of the distance, however little frames differ."""
    rows, whole = drawn
    ways: dict[str, tuple[Sums, bool]] = {
        "kernel": (lambda x, y: compiled(squared_differences, x, y), True),
        "kernel, absolute": (lambda x, y: compiled(absolute_differences, x, y), False),
        "products": (in_torch, True),
    }
    for way, (sums, squared) in ways.items():
        exact = by_differences(rows, rows, squared)
        found = sums(rows, rows.copy())
        if whole:
            assert np.array_equal(found, exact), way
        else:
            np.testing.assert_allclose(found, exact, rtol=PROMISE, atol=0, err_msg=way)


@pytest.mark.parametrize("columns", [50_176, 3 * 50_176])
def test_one_grey_level_in_one_pixel_of_a_whole_frame(rng: np.random.Generator, columns: int) -> None:
    """Beside frames that aren't whole numbers, so that the products are not exact."""
    rows = rng.uniform(0, 255, (4, columns)).astype(np.float32)
    rows[1] = rows[0]
    rows[1, columns // 2] += 1
    exact = by_differences(rows, rows)
    for found in (compiled(squared_differences, rows, rows.copy()), in_torch(rows, rows.copy())):
        np.testing.assert_allclose(found, exact, rtol=1e-6, atol=0)
    expanded = 2 * np.vdot(rows[0], rows[0]) - 2 * np.vdot(rows[0], rows[1])
    assert abs(expanded - 1) > 0.5, "what the tests are about: in single precision the expansion has no digit"


def test_extremes_of_8_bit_are_exact() -> None:
    """Black against white: the largest sums there are."""
    rows = np.zeros((5, 70_001), np.float32)
    rows[[1, 3]] = 255
    rows[4, ::2] = 255
    for squared, kernel in ((True, squared_differences), (False, absolute_differences)):
        assert np.array_equal(compiled(kernel, rows, rows.copy()), by_differences(rows, rows, squared))
    assert np.array_equal(in_torch(rows, rows.copy()), by_differences(rows, rows))


@pytest.mark.parametrize("name", [name for name in KERNELS if "known" in name])
def test_what_is_missing_in_either_row_is_left_out(rng: np.random.Generator, name: str) -> None:
    x, y = (rng.uniform(0, 255, (n, 777)).astype(np.float32) for n in (6, 9))
    x[rng.random(x.shape) < 0.2] = np.nan
    y[rng.random(y.shape) < 0.3] = np.nan
    y[4] = np.nan
    known = (~np.isnan(x)).astype(int) @ (~np.isnan(y)).astype(int).T
    assert np.array_equal(known_in_both(torch.from_numpy(x), torch.from_numpy(y)).numpy(), known)
    found = compiled(KERNELS[name], x, y)
    np.testing.assert_allclose(found, by_differences(x, y, "squared" in name), rtol=1e-6)
    assert (found[:, 4] == 0).all()


def test_nan_spoils_its_own_sums_alone(rng: np.random.Generator) -> None:
    rows = rng.uniform(0, 255, (7, 300)).astype(np.float32)
    clean = by_differences(rows, rows)
    rows[2, 17] = np.nan
    rest = [0, 1, 3, 4, 5, 6]
    for found in (compiled(squared_differences, rows, rows.copy()), in_torch(rows, rows.copy())):
        assert np.isnan(found[2]).all()
        assert np.isnan(found[:, 2]).all()
        np.testing.assert_allclose(found[np.ix_(rest, rest)], clean[np.ix_(rest, rest)], rtol=1e-6)


# --- to the bit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("columns", [1, 100, 1111])
def test_a_pair_is_the_same_bits_wherever_it_stands(
    rng: np.random.Generator, name: str, dtype: type, columns: int
) -> None:
    """In a tile, at its edge, alone, either way round; among few rows, or so many that they are copied."""
    kernel = KERNELS[name]
    rows = rng.standard_normal((90, columns)).astype(dtype)
    if "known" in name:
        rows[rng.random(rows.shape) < 0.1] = np.nan
    whole = compiled(kernel, rows, rows, symmetric=True)
    assert np.array_equal(whole, whole.T)
    np.testing.assert_allclose(whole, by_differences(rows, rows, "squared" in name), rtol=PROMISE)
    for start, stop in ((0, 11), (3, 6), (1, 77), (89, 90)):
        few = rows[start:stop]
        expected = whole[start:stop, start:stop]
        assert np.array_equal(compiled(kernel, few, few, symmetric=True), expected)
        assert np.array_equal(compiled(kernel, few, rows), whole[start:stop])
        assert np.array_equal(compiled(kernel, rows, few), whole[:, start:stop])
    for i, j in ((0, 1), (5, 2), (89, 0), (70, 71)):
        assert compiled(kernel, rows[i : i + 1], rows[j : j + 1])[0, 0] == whole[i, j]


@pytest.mark.parametrize("name", ["squared", "absolute, known"])
def test_threads_make_no_difference(rng: np.random.Generator, name: str) -> None:
    rows = rng.standard_normal((70, 20_000), np.float32)
    with threads(1):
        one = compiled(KERNELS[name], rows, rows, symmetric=True)
        one_way = compiled(KERNELS[name], rows[:9], rows)
    for count in (2, 3, 4):
        with threads(count):
            assert np.array_equal(compiled(KERNELS[name], rows, rows, symmetric=True), one)
            assert np.array_equal(compiled(KERNELS[name], rows[:9], rows), one_way)


def test_rows_need_not_lie_side_by_side(rng: np.random.Generator) -> None:
    rows = rng.standard_normal((9, 400), np.float32)
    spread = np.asfortranarray(np.repeat(rows, 2, axis=0))[::2]
    assert np.array_equal(
        compiled(squared_differences, spread, spread), compiled(squared_differences, rows, rows)
    )


# --- products of matrices ---------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_tiles_and_chunks_of_products_fit_together(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, symmetric: bool
) -> None:
    monkeypatch.setattr(gram, "ROWS_OF_PRODUCT", 3)
    monkeypatch.setattr(gram, "CHUNKS_TOGETHER", 2)
    monkeypatch.setattr(gram, "VALUES_TOGETHER", 700)
    rows = torch.from_numpy(rng.uniform(0, 255, (11, 601)).astype(np.float32))
    rows[7:] = rows[3] + torch.from_numpy(rng.uniform(0, 0.01, (4, 601)).astype(np.float32))
    others = rows if symmetric else rows[:8].clone()
    found, record = squared_differences_in_torch(rows, others)
    np.testing.assert_allclose(found, by_differences(rows.numpy(), others.numpy()), rtol=PROMISE, atol=0)
    # Five rows are near-duplicates of one another, two of them among the others; and six are in both.
    assert record.recomputed == (10 if symmetric else 5 * 2 + 6)
    assert record.pairs == (55 if symmetric else 88)


def test_record_says_what_was_taken_again(rng: np.random.Generator) -> None:
    apart = torch.from_numpy(rng.uniform(0, 255, (6, 5000)).astype(np.float32))
    found, record = squared_differences_in_torch(apart, apart)
    assert (record.method, record.promise, record.pairs, record.recomputed) == (
        "centred product",
        1e-5,
        15,
        0,
    )
    errors = np.abs(found.numpy() / (by_differences(apart.numpy(), apart.numpy()) + np.eye(6)) - 1)
    assert errors[np.triu_indices(6, 1)].max() <= record.bound <= PROMISE

    close = torch.cat([apart, apart[:2] + 0.25])
    _, record = squared_differences_in_torch(close, close)
    assert (record.pairs, record.recomputed) == (28, 2)
    _, record = squared_differences_in_torch(apart.round(), apart.round() + 0)
    assert (record.bound, record.recomputed) == (0, 0)
    # A promise that single precision can't keep has every pair computed again.
    _, record = squared_differences_in_torch(apart, apart, promise=1e-8)
    assert record.recomputed == 15

    _, record = squared_distances(apart, apart)
    assert (record.method, record.pairs, record.recomputed) == ("direct differences", 15, 0)
    assert 0 < record.bound <= PROMISE


def test_bound_of_products_holds_on_correlated_rows(rng: np.random.Generator) -> None:
    """None of the products that were kept is further off than the record says, from far to near."""
    base = rng.uniform(0, 255, 3000)
    noise = rng.standard_normal((30, 3000)) * np.logspace(-3, 2, 30)[:, None]
    rows = np.clip(base + noise, 0, 255).astype(np.float32)
    found, record = squared_differences_in_torch(torch.from_numpy(rows), torch.from_numpy(rows.copy()))
    exact = by_differences(rows, rows)
    apart = exact > 0
    assert np.abs(found.numpy()[apart] / exact[apart] - 1).max() <= record.bound
    assert 30 < record.recomputed < record.pairs == 900


def _tell_all() -> None:
    torch.set_float32_matmul_precision("medium")


def _tell_cuda() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


@pytest.mark.parametrize("tell", [_tell_all, _tell_cuda])
def test_settings_of_the_program_for_products_are_kept_and_not_followed(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, tell: Callable[[], None]
) -> None:
    matmul = torch.backends.cuda.matmul
    if tell is _tell_cuda and not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch before 2.9 has no such setting")
    rows = torch.from_numpy(rng.uniform(0, 255, (5, 2000)).astype(np.float32))
    expected, _ = squared_differences_in_torch(rows, rows)
    allowed = []
    product = torch.bmm

    def watched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        allowed.append(matmul.allow_tf32)
        return product(a, b)

    monkeypatch.setattr(torch, "bmm", watched)
    undo = no_tf32._settings_of_products()
    try:
        tell()
        told = getattr(matmul, "fp32_precision", None)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, _ = squared_differences_in_torch(rows, rows)
        assert allowed == [False]
        assert getattr(matmul, "fp32_precision", None) == told
        assert tell is _tell_cuda or torch.get_float32_matmul_precision() == "medium"
    finally:
        undo()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_records_add_up() -> None:
    one = PairPrecision("direct differences", 1e-5, 5e-6, 10)
    other = PairPrecision("centred product", 1e-5, 8e-6, 20, 3)
    both = PairPrecision("centred product + direct differences", 1e-5, 8e-6, 30, 3)
    assert one + other == other + one == both
    assert both + one == PairPrecision("centred product + direct differences", 1e-5, 8e-6, 40, 3)


def test_rows_in_torch_a_few_at_a_time(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.from_numpy(rng.standard_normal((3, 8))), torch.from_numpy(rng.standard_normal((7, 8)))
    sizes = []

    def paired(a: Embedding, b: Embedding) -> torch.Tensor:
        sizes.append(len(b))
        return (a.parts["x"] - b.parts["x"]).square().sum(1)

    a, b = Embedding({"x": x}), Embedding({"x": y})
    assert torch.equal(rows_in_torch(paired, a, b, batch_size=3), rows_in_torch(paired, a, b))
    assert sizes == [3, 3, 1] * 3 + [7] * 3
    sizes.clear()
    monkeypatch.setattr(pairs, "VALUES_TOGETHER", 8 * 2)
    rows_in_torch(paired, a, b)
    assert max(sizes) == 2, "memory is bounded without being told"
