"""The orthogonalisation of Muon's steps, against the singular value decomposition and by its laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.optim.methods.problem import normal
from tests.optim.reference import LAWS
from zo_lightning.optim import newton_schulz

sizes = st.integers(1, 9)
seeds = st.integers(0, 10**6)


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(n, n, seed=seed)).Q


def by_singular_values(g: Tensor, iterations: int) -> Tensor:
    """The polynomial acts on the singular values alone."""
    left, values, right = torch.linalg.svd(g, full_matrices=False)
    values = values / values.norm()
    for _ in range(iterations):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values) @ right


@LAWS
@given(m=sizes, n=st.integers(1, 60), iterations=st.integers(1, 6), seed=seeds)
def test_it_is_a_polynomial_of_the_singular_values(m, n, iterations, seed):
    g = normal(m, n, seed=seed)
    torch.testing.assert_close(newton_schulz(g, iterations), by_singular_values(g, iterations), rtol=1e-4, atol=1e-4)


@LAWS
@given(m=sizes, n=sizes, seed=seeds)
def test_it_turns_with_its_argument(m, n, seed):
    g, left, right = normal(m, n, seed=seed), orthogonal(m, seed + 1), orthogonal(n, seed + 2)
    torch.testing.assert_close(newton_schulz(left @ g @ right), left @ newton_schulz(g) @ right, rtol=1e-6, atol=1e-6)


@LAWS
@given(m=sizes, n=sizes, seed=seeds)
def test_the_transpose_is_that_of_the_transpose(m, n, seed):
    g = normal(m, n, seed=seed)
    torch.testing.assert_close(newton_schulz(g.T), newton_schulz(g).T, rtol=1e-10, atol=1e-10)


@LAWS
@given(m=sizes, n=sizes, seed=seeds, scale=st.sampled_from([1e-30, 1e-12, 3.0, 1e12, 1e30]))
def test_the_scale_plays_no_part(m, n, seed, scale):
    """In float32 the square of an entry of 1e30 is infinite and that of 1e-30 zero."""
    g = normal(m, n, seed=seed).float()
    torch.testing.assert_close(newton_schulz(g * scale), newton_schulz(g), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(newton_schulz(-g), -newton_schulz(g), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_long_matrix_without_full_rank(dtype):
    """Its singular values of zero stay zero in the powers of its Gram matrix."""
    g = (normal(8, 3, seed=1) @ normal(3, 500, seed=2)).to(dtype)
    values = torch.linalg.svdvals(newton_schulz(g, 10).double())
    assert 0.65 < values[2] <= values[0] < 1.25
    assert values[3] < 0.05
    torch.testing.assert_close(newton_schulz(g.T, 10).T, newton_schulz(g, 10), rtol=0, atol=1e-5)


def test_the_gram_matrix_is_the_same_in_pieces(monkeypatch):
    g = normal(4, 100, seed=1)
    whole = newton_schulz(g)
    monkeypatch.setattr("zo_lightning.optim.updates.muon._PIECE", 28)
    torch.testing.assert_close(newton_schulz(g), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_the_eigenvalues_of_a_gram_matrix_give_what_its_products_do(monkeypatch, iterations):
    g = normal(12, 100, seed=1)
    by_products = newton_schulz(g, iterations)
    monkeypatch.setattr("zo_lightning.optim.updates.muon._EIGEN", 1)
    torch.testing.assert_close(newton_schulz(g, iterations), by_products, rtol=0, atol=1e-12)
    torch.testing.assert_close(newton_schulz(g.T, iterations), by_products.T, rtol=0, atol=1e-12)
    assert newton_schulz(torch.full((3, 20), torch.nan), iterations).isnan().all()  # which no decomposition takes
    assert torch.equal(newton_schulz(torch.zeros(3, 20), iterations), torch.zeros(3, 20))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_worked_on_in_float32(dtype):
    """In float16 the norm of these is infinite, and the released code's step zero."""
    g = (300 * normal(64, 128)).to(dtype)
    assert newton_schulz(g).dtype is torch.float32
    torch.testing.assert_close(newton_schulz(g), newton_schulz(g.float()), rtol=0, atol=0)
    assert newton_schulz(g).norm() > 5


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (1, 5), (5, 1), (1, 1)])
def test_zero_stays_zero(shape):
    assert torch.equal(newton_schulz(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (25, 25)])
def test_it_is_about_the_polar_factor(shape):
    """The quintic does not converge: it keeps the singular values within some 0.3 of one."""
    g = normal(*shape, seed=3)
    left, _, right = torch.linalg.svd(g, full_matrices=False)
    for iterations in (8, 10, 13):
        x = newton_schulz(g, iterations)
        values = torch.linalg.svdvals(x)
        assert 0.65 < values.min() <= values.max() < 1.25
        assert torch.linalg.matrix_norm(x - left @ right, 2) < 0.35


def test_rank_one_is_its_sign():
    """What JAGUAR Muon's released code comes down to: one block of equal entries is orthogonalised at each step."""
    block = torch.zeros(6, 8)
    block[:2, :3] = -7.0
    x = newton_schulz(block, 10)
    np.testing.assert_allclose(np.unique(np.abs(x.numpy()).round(4)), [0, float(x.abs().max().round(decimals=4))])
    assert 0.65 / 6**0.5 < -x[0, 0] < 1.25 / 6**0.5
