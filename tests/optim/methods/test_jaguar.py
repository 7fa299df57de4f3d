"""JAGUAR: the momentum persists and moves every entry; what a block's probes estimate; orthogonalised steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.optim.methods.problem import CPU, SHAPES, Landscape, landscape, linear, normal
from tests.optim.reference import LAWS, matrix
from zo_lightning.optim import Address, Block
from zo_lightning.optim.methods import JaguarMuon, JaguarSignSGD

ETA = 1e-3


def test_entries_out_of_the_block_move_by_the_sign_of_what_is_remembered_of_them():
    """In the released code the momentum is cleared at every step, and only the block of the present one moves."""
    x = landscape()
    optimizer = x.optimizer(JaguarSignSGD, lr=ETA, fraction=0.3)
    known = {name: np.zeros(shape, bool) for name, shape in SHAPES.items()}
    remembered = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    without_probe = 0
    for _ in range(8):
        seen = x.step(optimizer)
        slope = (seen.losses[0] - seen.losses[1]) / 2e-3
        for name in SHAPES:
            e = seen.of(name)[0] / 1e-3
            block = np.abs(e) > 0.5
            average = 0.9 * remembered[name] + 0.1 * slope * e.round()
            remembered[name] = np.where(block, average, remembered[name])
            known[name] |= block
            np.testing.assert_allclose(seen.move[name], -ETA * np.sign(remembered[name]), rtol=0, atol=1e-9)
            assert not seen.move[name][~known[name]].any(), "an entry that was never probed stays"
            assert seen.move[name][known[name]].all()
            without_probe += int((known[name] & ~block).sum())
    assert without_probe > 100
    assert not all(k.all() for k in known.values())


@pytest.mark.parametrize(("beta", "keeps"), [(0.9, True), (0.1, False)])
@pytest.mark.parametrize("build", [JaguarSignSGD, JaguarMuon])
def test_the_momentum_has_an_effect(build, beta, keeps):
    """After three steps down a slope, one step on the opposite slope does not turn a long memory round."""
    gradient = {"vector": normal(1)}
    x = Landscape(linear(gradient), {"vector": torch.zeros(1, dtype=torch.float64)})
    optimizer = x.optimizer(build, lr=ETA, fraction=1.0, momentum=beta)
    before = [x.step(optimizer).move["vector"] for _ in range(3)]
    x.loss = linear({"vector": -gradient["vector"]})
    after = x.step(optimizer).move["vector"]
    assert (np.sign(after) == np.sign(before[-1])).all() == keeps


@LAWS
@given(
    shape=st.lists(st.integers(1, 24), max_size=3),
    fraction=st.sampled_from([0.01, 0.1, 0.34, 0.5, 1.0]),
    signs=st.sampled_from(["random", "ones"]),
    step=st.integers(0, 1000),
)
def test_a_block_is_some_rows_by_some_columns(shape, fraction, signs, step):
    z = Block(fraction, signs).draw(Address(1, step, "w"), torch.Size(shape), CPU).numpy()
    assert z.shape == tuple(shape)
    z = matrix(z) if z.ndim else z.reshape(1, 1)
    rows, columns = z.any(1), z.any(0)
    assert rows.sum() == max(1, int(z.shape[0] * fraction))
    assert columns.sum() == max(1, int(z.shape[1] * fraction))
    assert set(np.unique(z[np.ix_(rows, columns)])) <= ({1.0} if signs == "ones" else {1.0, -1.0})
    assert np.count_nonzero(z) == rows.sum() * columns.sum()


def test_blocks_of_steps_queries_and_tensors_differ():
    draws = [
        Block(0.3).draw(address, torch.Size((20, 20)), CPU)
        for address in (Address(1, 0, "a"), Address(1, 1, "a"), Address(1, 0, "b"), Address(1, 0, "a", 1), Address(2, 0, "a"))
    ]
    assert all(not torch.equal(a != 0, b != 0) for i, a in enumerate(draws) for b in draws[:i])


def estimates(signs: str, gradient: torch.Tensor, draws: int) -> torch.Tensor:
    """The mean of ``⟨g, e⟩ e``, which is the estimate on a linear function, over the share of the entries in a block."""
    family = Block(0.5, signs)
    es = torch.stack([family.draw(Address(0, i, "w"), gradient.shape, CPU).double() for i in range(draws)])
    return torch.einsum("k,kd->d", es @ gradient, es) / draws / 0.5


def test_random_signs_estimate_each_entry_and_ones_the_sum_over_the_block():
    gradient, draws = normal(8, seed=5), 4000
    random, ones = (estimates(signs, gradient, draws) for signs in ("random", "ones"))
    # by chance: the other three entries of the block, over the root of the number of blocks with this entry
    noise = float(gradient.norm()) * (3 / 7 / (draws * 0.5)) ** 0.5
    assert float((random - gradient).abs().max()) < 4 * noise
    others = gradient + 3 / 7 * (gradient.sum() - gradient)
    assert float((ones - others).abs().max()) < 6 * noise
    assert float((ones - gradient).abs().max()) > 20 * noise, "the sum is not the entry"


# ---- orthogonalised steps ----------------------------------------------------------------------------------------------
def test_steps_of_matrices_have_singular_values_of_about_one():
    x = landscape()
    optimizer = x.optimizer(JaguarMuon, lr=ETA, fraction=1.0)
    for _ in range(4):
        seen = x.step(optimizer)
        for name in ("matrix", "wide", "kernel"):
            values = np.linalg.svd(matrix(seen.move[name]), compute_uv=False) / ETA
            assert 0.65 < values.min() <= values.max() < 1.25, name
        np.testing.assert_allclose(np.abs(seen.move["vector"]), ETA, rtol=1e-6)


def test_blocks_of_many_steps_make_up_a_step_of_full_rank():
    """The released code orthogonalises the present block alone: rank one."""
    x = landscape()
    optimizer = x.optimizer(JaguarMuon, lr=ETA, fraction=0.4)
    for _ in range(60):
        move = x.step(optimizer).move["matrix"]
    assert (np.linalg.svd(move, compute_uv=False) / ETA > 0.5).all()


def test_the_step_is_along_the_orthogonalised_momentum():
    """It goes down: along the polar factor of M as far as the quintic lets it."""
    x = landscape()
    optimizer = x.optimizer(JaguarMuon, lr=ETA, fraction=0.5)
    for _ in range(12):
        move = x.step(optimizer).move["matrix"]
    left, values, right = np.linalg.svd(optimizer.state[x.parameters["matrix"]]["momentum_buffer"].double().numpy())
    kept = values > 1e-4 * values[0]
    weights = np.diag(left.T @ -move @ right.T)[kept] / ETA
    assert ((weights > 0.65) & (weights < 1.25)).all()
