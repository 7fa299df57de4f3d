"""Stochastic rounding: unbiased, to one of the two neighbours, exact where nothing needs rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.optim.reference import LAWS
from zo_lightning.optim import round_stochastically

HALF = [torch.bfloat16, torch.float16]
# mantissas, subnormals, both signs; within float16's range
VALUES = [1.0, 1.00390625, 3.1415927, -2.7182817, 0.1, -1e-3, 6.2e-5, 6.0e-5, 1.234e-5, -5e-7, 3e-8, 1000.3, -65000.7]


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(value: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The nearest representable values below and above, worked out from the format alone."""
    mantissa, smallest = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}[dtype]
    exponent = np.maximum(np.frexp(value)[1] - 1, smallest)
    spacing = np.exp2(exponent.astype(np.float64) - mantissa)
    return np.floor(value / spacing) * spacing, np.ceil(value / spacing) * spacing


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("value", VALUES)
def test_rounds_to_a_neighbour_and_is_right_on_average(dtype, value):
    n = 200_000
    exact = np.float64(np.float32(value))
    rounded = round_stochastically(torch.full((n,), value), dtype, source())
    assert rounded.dtype is dtype
    below, above = neighbours(exact, dtype)
    found = np.unique(rounded.double().numpy())
    assert set(found) <= {below, above}
    if below == above:
        return
    p = (exact - below) / (above - below)
    standard_error = (above - below) * np.sqrt(p * (1 - p) / n)
    assert abs(rounded.double().mean().item() - exact) <= 4 * standard_error + 1e-12 * abs(exact)


@pytest.mark.parametrize("dtype", HALF)
def test_what_is_representable_stays(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)  # each of the 65,536 patterns
    for seed in range(5):
        rounded = round_stochastically(every.float(), dtype, source(seed))
        assert torch.equal(torch.nan_to_num(rounded.float(), 7.0), torch.nan_to_num(every.float(), 7.0))
        assert torch.equal(torch.isnan(rounded), torch.isnan(every))


@pytest.mark.parametrize("dtype", HALF)
def test_infinities_and_nan_stay(dtype):
    value = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0])
    rounded = round_stochastically(value, dtype, source())
    assert rounded[:2].tolist() == [float("inf"), float("-inf")]
    assert rounded[2].isnan()
    assert rounded[3:].tolist() == [0.0, 0.0]


@LAWS
@given(st.lists(st.floats(-60000, 60000, width=32), min_size=1, max_size=30), st.sampled_from(HALF), st.integers(0, 2**31))
def test_always_one_of_the_two_neighbours(values, dtype, seed):
    exact = np.array(values, dtype=np.float32).astype(np.float64)
    tiny = np.abs(exact) < 2.0**-126  # below float32's normal numbers: flushed or not, either is fine
    exact[tiny] = 0
    below, above = neighbours(exact, dtype)
    rounded = round_stochastically(torch.tensor(exact, dtype=torch.float32), dtype, source(seed)).double().numpy()
    assert ((rounded == below) | (rounded == above)).all()


@pytest.mark.parametrize("dtype", HALF)
def test_a_step_far_below_the_resolution_moves_the_mean(dtype):
    n, steps = 20_000, 50
    step = torch.finfo(dtype).eps / 200  # nearest rounding would never move
    weight = torch.ones(n, dtype=dtype)
    assert torch.equal((weight.float() + step).to(dtype), weight)
    generator = source()
    for _ in range(steps):
        weight = round_stochastically(weight.float() + step, dtype, generator)
    moved = weight.double().mean().item() - 1
    eps = torch.finfo(dtype).eps
    assert moved == pytest.approx(steps * step, abs=4 * eps * np.sqrt(steps / 200 / n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_types_are_cast(dtype):
    value = torch.tensor([0.1, -3.0])
    assert torch.equal(round_stochastically(value, dtype, source()), value.to(dtype))


def test_seeded():
    value = torch.randn(1000, generator=source(5))
    a, b, c = (round_stochastically(value, torch.bfloat16, source(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("dtype", HALF)
def test_strided_input(dtype):
    value = torch.randn(6, 5, generator=source(1)).T
    assert torch.equal(round_stochastically(value.to(dtype).float(), dtype, source()), value.to(dtype))
