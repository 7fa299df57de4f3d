"""ZO-SGD, its unit steps, ZO-SignSGD, ZO-AdaMM, conservative ZO, FZOO and HiZOO: what defines each."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.optim.methods.problem import (
    CPU,
    SEED,
    SHAPES,
    Landscape,
    World,
    landscape,
    mean,
    mixed,
    normal,
    optimizer_of,
)
from zo_lightning.optim import Address, Gaussian
from zo_lightning.optim.methods import FZOO, ZOSGD, ConservativeZO, HiZOO, ZOAdaMM, ZOSignSGD

ETA = 1e-3


def scaled(factor: float, shift: float = 0.0):
    """A landscape whose loss is a multiple of another's, and is shifted."""
    other = landscape()
    plain = other.loss
    other.loss = lambda x: factor * plain(x) + shift
    return other


# ---- ZO-SGD ------------------------------------------------------------------------------------------------------------
def test_the_average_with_a_larger_rate_is_heavy_ball_momentum():
    """``η/(1 - β)`` times the moving average is torch's momentum, fed with ``ρ z`` as the gradient."""
    ours, theirs = landscape(), landscape()
    optimizer = ours.optimizer(ZOSGD, lr=0.01 / (1 - 0.8), smoothing=0.01, momentum=0.8)
    twin = torch.optim.SGD(theirs.parameters.values(), lr=0.01, momentum=0.8)
    for step in range(8):
        ours.step(optimizer)
        z = {n: Gaussian().draw(Address(SEED, step, n), torch.Size(s), CPU).double() for n, s in SHAPES.items()}
        plus, minus = (theirs.loss({n: p.detach() + tau * z[n] for n, p in theirs.parameters.items()}) for tau in (0.01, -0.01))
        for name, p in theirs.parameters.items():
            p.grad = (plus - minus) / 0.02 * z[name]
        twin.step()
        for name, x in theirs.here().items():
            np.testing.assert_allclose(ours.here()[name], x, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("q", "sides"), [(1, 2), (3, 2), (4, 1)])
def test_unit_steps_are_as_long_whatever_the_losss_scale(q, sides):
    """And the weights of the directions have norm one."""
    moves = []
    for factor in (1.0, 1024.0):
        x = scaled(factor)
        optimizer = x.optimizer(ZOSGD, lr=ETA, normalised=True, num_directions=q, sides=sides)
        seen = x.step(optimizer)
        moves.append(seen.move)
        firsts = slice(0, None, 2) if sides == 2 else slice(1, None)
        us = [np.concatenate([u[n].ravel() for n in SHAPES]) / 1e-3 for u in seen.probes[firsts]]
        move = np.concatenate([seen.move[n].ravel() for n in SHAPES])
        found = np.linalg.lstsq(np.stack(us, 1), -move / ETA, rcond=None)[0]
        assert len(us) == q
        assert np.linalg.norm(found) == pytest.approx(1, rel=1e-5)
        np.testing.assert_allclose(np.stack(us, 1) @ found, -move / ETA, rtol=0, atol=1e-5)
        losses = np.array(seen.losses)
        slopes = (losses[0::2] - losses[1::2]) / 2 if sides == 2 else losses[1:] - losses[0]
        np.testing.assert_allclose(found, slopes / np.linalg.norm(slopes), rtol=0, atol=1e-5)
    assert all(np.array_equal(moves[0][name], moves[1][name]) for name in SHAPES)


# ---- ZO-SignSGD --------------------------------------------------------------------------------------------------------
def test_the_sign_is_that_of_every_entry():
    """In ZO-Bench's code the step is ``sign(ρ) z``."""
    x = landscape()
    optimizer = x.optimizer(ZOSignSGD, lr=ETA)
    for _ in range(4):
        seen = x.step(optimizer)
        for name in SHAPES:
            z = seen.of(name)[0] / 1e-3
            np.testing.assert_allclose(seen.move[name], -ETA * np.sign(seen.losses[0] - seen.losses[1]) * np.sign(z), rtol=1e-6)
            assert np.abs(z).std() > 0.3, "it is no longer than others where z is"


# ---- ZO-AdaMM ----------------------------------------------------------------------------------------------------------
def test_the_first_step_has_no_bias_correction():
    x = landscape()
    seen = x.step(x.optimizer(ZOAdaMM, lr=ETA, beta1=0.9, beta2=0.999))
    for name in SHAPES:
        np.testing.assert_allclose(np.abs(seen.move[name]), ETA * 0.1 / 0.001**0.5, rtol=1e-4)


def test_the_second_moment_never_falls_back():
    """After one huge gradient steps stay small; Adam, which ZO-Bench calls by this name, forgets it."""
    x = landscape()
    optimizer = x.optimizer(ZOAdaMM, lr=ETA, beta1=0.0, beta2=0.5)
    plain, sizes = x.loss, []
    largest = {name: torch.zeros(()) for name in SHAPES}
    for step in range(20):
        x.loss = (lambda p: 1e3 * plain(p)) if step == 3 else plain
        move = x.step(optimizer).move
        sizes.append(np.mean([np.abs(move[name]).mean() for name in SHAPES]))
        for name, p in x.parameters.items():
            state = optimizer.state[p]
            assert (state["largest_second_moment"] >= largest[name]).all()
            assert (state["largest_second_moment"] >= state["second_moment"]).all()
            largest[name] = state["largest_second_moment"].clone()
    assert max(sizes[10:]) < 0.05 * np.mean(sizes[:3])
    assert any((optimizer.state[p]["second_moment"] < 1e-3 * largest[n]).all() for n, p in x.parameters.items())


# ---- conservative ZO ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("lr", "steps", "kinds"), [(1e-3, 30, {1, -1}), (0.3, 200, {1, -1, 0}), (1e4, 20, {0})])
def test_the_batch_loss_never_rises(lr, steps, kinds):
    """With rates from small to absurd; a step is down the measured slope (1), up it (-1), or none (0)."""
    x = landscape()
    optimizer = x.optimizer(ConservativeZO, lr=lr, smoothing=1.0)
    losses, taken = [float(x.closure())], set()
    for _ in range(steps):
        seen = x.step(optimizer)
        assert len(seen.losses) == 5
        losses.append(float(x.closure()))
        assert losses[-1] == min(seen.losses[2:]), "the lowest of x and the two trials"
        along = float((seen.move["matrix"] * seen.of("matrix")[0]).sum())
        taken.add(int(np.sign(along * (seen.losses[1] - seen.losses[0]))))
    assert all(after <= before for before, after in pairwise(losses))
    assert taken == kinds


def test_a_trial_that_overflows_is_not_taken():
    x = landscape()
    plain = x.loss
    x.loss = lambda p: plain(p) + torch.where(p["vector"].abs().max() > 50, torch.inf, 0.0)
    optimizer = x.optimizer(ConservativeZO, lr=1e4)
    seen = x.step(optimizer)
    assert seen.losses[3:] == [np.inf, np.inf]
    assert optimizer.last.finite
    assert not any(move.any() for move in seen.move.values())


# ---- FZOO --------------------------------------------------------------------------------------------------------------
def test_steps_are_in_units_of_the_standard_deviation_of_the_losses():
    x = landscape()
    optimizer = x.optimizer(FZOO, lr=1e-5, num_directions=5)
    for _ in range(4):
        seen = x.step(optimizer)
        assert len(seen.losses) == 6 == optimizer.forwards_per_step
        base, losses = seen.losses[0], np.array(seen.losses[1:])
        sigma = np.sqrt(((losses - losses.mean()) ** 2).sum() / 4)
        for name in SHAPES:
            us = [u / 1e-3 for u in seen.of(name)[1:]]
            np.testing.assert_allclose(np.abs(us), 1, rtol=1e-6)
            g = sum((loss - base) * u for loss, u in zip(losses, us, strict=True)) / (1e-3 * 5)
            np.testing.assert_allclose(seen.move[name], -1e-5 * g / sigma, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("factor", "shift"), [(1000.0, 0.0), (1e-3, 0.0), (1.0, 40.0), (7.0, -300.0)])
def test_neither_a_factor_nor_a_shift_of_the_loss_changes_the_steps(factor, shift):
    plain, other = landscape(), scaled(factor, shift)
    first, second = (x.optimizer(FZOO, lr=1e-5) for x in (plain, other))
    for _ in range(3):
        a, b = plain.step(first).move, other.step(second).move
        for name in SHAPES:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-5, atol=1e-9)


def test_equal_losses_make_no_step():
    x = Landscape(lambda p: 0 * p["w"].sum() + 0.7, {"w": normal(3, 4)})
    optimizer = x.optimizer(FZOO, lr=1.0, weight_decay=0.0)
    assert not x.step(optimizer).move["w"].any()
    assert optimizer.last.finite


# ---- HiZOO -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attach", [True, False], ids=["attached", "in_place"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_diagonal_changes_however_small_alpha(dtype, attach):
    """In the released code, in half precision and with this α of its README, H stays one."""
    module = mixed(dtype)
    optimizer = optimizer_of(HiZOO, module, attach, lr=1e-6, smoothing=0.3, alpha=1e-8)
    optimizer.step(lambda: mean(module))
    curvature = optimizer.last.curvature
    assert curvature
    for name, p in module.named_parameters():
        logarithm = optimizer.state[p]["log_hessian"]
        z = Gaussian().draw(Address(SEED, 0, name), p.shape, CPU).double()
        assert logarithm.dtype is torch.float32
        torch.testing.assert_close(logarithm.double(), 1e-8 * (abs(curvature) * z**2 / 2 - 1), rtol=1e-4, atol=1e-15)
    first = {p: optimizer.state[p]["log_hessian"].clone() for p in module.parameters()}
    optimizer.step(lambda: mean(module))
    assert all((optimizer.state[p]["log_hessian"] != first[p]).any() for p in module.parameters())


@pytest.mark.parametrize("alpha", [0.2, 1e-8])
def test_the_diagonal_is_the_published_recursion(alpha):
    """Over 20 steps, in float64; of a small α what it adds to one is compared."""
    module = mixed()
    optimizer = optimizer_of(HiZOO, module, lr=1e-3, smoothing=0.2, alpha=alpha)
    world = World(mixed(), optimizer.directions)
    h = {name: np.ones_like(x, dtype=np.longdouble) for name, x in world.x.items()}
    for _ in range(20):
        z = world.z()
        u = {name: np.float64(z[name] / np.sqrt(h[name])) for name in z}
        plus, minus, base = world.f(u, 0.2), world.f(u, -0.2), world.f()
        curvature = abs(plus + minus - 2 * base) / (2 * 0.2**2)
        h = {n: (1 - np.longdouble(alpha)) * h[n] + alpha * np.longdouble(curvature) * h[n] * z[n] ** 2 for n in z}
        world.move({n: (plus - minus) / 0.4 * z[n] / np.float64(np.sqrt(h[n])) for n in z}, {"lr": 1e-3})
        world.t += 1
        optimizer.step(lambda: mean(module))
    for name, p in module.named_parameters():
        change = np.expm1(optimizer.state[p]["log_hessian"].double().numpy())
        expected = np.float64(h[name] - 1)
        np.testing.assert_allclose(change, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max(), err_msg=name)
        np.testing.assert_allclose(p.detach().numpy(), world.x[name], rtol=0, atol=1e-5)


def test_the_step_is_taken_with_the_new_diagonal_and_the_probe_with_the_old_one():
    x = landscape()
    optimizer = x.optimizer(HiZOO, lr=1e-3, smoothing=0.1, alpha=0.4)
    old = {name: np.ones(shape) for name, shape in SHAPES.items()}
    for step in range(4):
        seen = x.step(optimizer)
        order = [i for i, probe in enumerate(seen.probes) if any(u.any() for u in probe.values())]
        assert len(seen.losses) == 3 == optimizer.forwards_per_step
        slope = (seen.losses[order[0]] - seen.losses[order[1]]) / 0.2
        for name, p in x.parameters.items():
            z = Gaussian().draw(Address(SEED, step, name), p.shape, CPU).double().numpy()
            new = np.exp(optimizer.state[p]["log_hessian"].double().numpy())
            np.testing.assert_allclose(seen.of(name)[order[0]], 0.1 * z / np.sqrt(old[name]), rtol=1e-5, atol=1e-9)
            np.testing.assert_allclose(seen.move[name], -1e-3 * slope * z / np.sqrt(new), rtol=1e-5, atol=1e-9)
            old[name] = new
