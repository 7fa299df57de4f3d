"""LDSD: the mean learns from the losses, the best direction alone makes the step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.optim.methods.problem import CPU, SEED, SHAPES, Landscape, cosine, landscape, linear, normal, optimizer_of, wavy
from zo_lightning.optim import Address
from zo_lightning.optim.methods import LDSD, LDSDAdaMM, LDSDJaguar

EPS = 1e-3


def unit_gradient() -> dict[str, torch.Tensor]:
    """Of norm one, split over three tensors in about equal parts."""
    parts = {"matrix": normal(2, 2, seed=1), "vector": normal(4, seed=2), "scalars": normal(2, seed=3)}
    return {name: g / g.norm() * share**0.5 for (name, g), share in zip(parts.items(), (0.35, 0.34, 0.31), strict=True)}


def rates(landscape: Landscape, optimizer, gradient: dict[str, torch.Tensor], steps: int) -> list[float]:
    """How far the mean has gone along -g, over what ``E Δμ = -η_μ ε g`` says; the last is that of all tensors together."""
    for _ in range(steps):
        optimizer.step(lambda: landscape.loss(landscape.parameters))
    eta = optimizer.sampler.mean_rate
    gone = {n: -float((optimizer.state[p]["mean"].double() * gradient[n]).sum()) for n, p in landscape.parameters.items()}
    expected = {n: steps * eta * EPS * float((g**2).sum()) for n, g in gradient.items()}
    return [gone[n] / expected[n] for n in gone] + [sum(gone.values()) / sum(expected.values())]


def test_the_mean_moves_along_the_negative_gradient_at_the_predicted_rate():
    """The released code draws other noise for the mean than for the probes, and has about a hundredth of this rate.

    By chance the whole is off by 1.8 % and one tensor by 2.6 % (one standard deviation); over 4,000 steps, which take three
    times as long, it is 1.004 with 1.016, 0.989 and 1.006 for the tensors.
    """
    gradient = unit_gradient()
    frozen = Landscape(linear(gradient), {name: torch.zeros_like(g) for name, g in gradient.items()})
    optimizer = frozen.optimizer(LDSD, lr=0.0, smoothing=EPS, k=5, sigma=1.0, mean_rate=0.5)
    assert rates(frozen, optimizer, gradient, 1500) == pytest.approx([1.0] * 4, abs=0.1)
    assert all(not p.any() for p in frozen.parameters.values()), "x is frozen"


def test_a_low_rank_mean_is_a_left_factor_that_moves_along_the_gradient_by_it():
    """``u = L Vᵀ``: the gradient by L is G V."""
    module = nn.Linear(4, 5, bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.weight.zero_()
    slope, eye, steps = normal(5, 4), torch.eye(4, dtype=torch.float64), 1000
    optimizer = optimizer_of(LDSD, module, True, lr=0.0, smoothing=EPS, k=5, mean_rate=0.5, low_rank=2, interval=steps)
    for _ in range(steps):
        optimizer.step(lambda: (module(eye).T * slope).sum())
    right = optimizer.directions.draw(Address(SEED, 0, "weight"), module.weight.shape, CPU).right.double()
    left = optimizer.state[module.weight]["mean"].double().T
    assert left.shape == (5, 2)
    by_left = slope @ right
    gone, expected = -(left * by_left).sum(), steps * 0.5 * EPS * by_left.square().sum()
    assert float(gone / expected) == pytest.approx(1, abs=0.1)
    assert not module.weight.any()


def test_sigma_does_not_change_the_rate_of_the_mean():
    """``1/(k σ²) Σ a_i (u_i - μ)`` is unbiased for the same gradient whatever σ: with equal draws even equal."""
    gradient = unit_gradient()
    means = []
    for sigma in (1.0, 0.25):
        frozen = Landscape(linear(gradient), {name: torch.zeros_like(g) for name, g in gradient.items()})
        optimizer = frozen.optimizer(LDSD, lr=0.0, smoothing=EPS, k=5, sigma=sigma, mean_rate=0.5)
        for _ in range(3):
            optimizer.step(frozen.closure)
        means.append(torch.cat([optimizer.state[p]["mean"].flatten() for p in frozen.parameters.values()]))
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("build", [LDSD, LDSDAdaMM])
def test_without_a_rate_no_mean_is_kept(build):
    x = landscape()
    optimizer = x.optimizer(build, lr=1e-3, mean_rate=0.0)
    for _ in range(3):
        x.step(optimizer)
    assert not any("mean" in state for state in optimizer.state.values())


def test_one_direction_has_no_other_to_be_compared_with():
    x = landscape()
    optimizer = x.optimizer(LDSD, lr=1e-3, k=1, mean_rate=1e3)
    for _ in range(3):
        assert len(x.step(optimizer).losses) == 2
    assert not any(state["mean"].any() for state in optimizer.state.values())


@pytest.mark.parametrize("build", [LDSD, LDSDAdaMM, LDSDJaguar])
@pytest.mark.parametrize("k", [1, 2, 6])
def test_the_best_probe_is_not_evaluated_again(build, k):
    x = landscape()
    optimizer = x.optimizer(build, lr=1e-3, smoothing=0.05, k=k)
    for _ in range(4):
        seen = x.step(optimizer)
        assert len(seen.losses) == k + 1 == optimizer.forwards_per_step
        best = int(np.argmin(seen.losses[:k]))
        for name in SHAPES:
            np.testing.assert_allclose(seen.of(name)[-1], -seen.of(name)[best], rtol=0, atol=1e-12)


def test_the_step_is_along_the_best_direction_by_its_two_sided_slope():
    x = landscape()
    optimizer = x.optimizer(LDSD, lr=0.01, smoothing=0.05, k=5, mean_rate=5.0)
    chosen = set()
    for _ in range(6):
        seen = x.step(optimizer)
        best = int(np.argmin(seen.losses[:5]))
        chosen.add(best)
        slope = (seen.losses[best] - seen.losses[5]) / 0.1
        for name in SHAPES:
            np.testing.assert_allclose(seen.move[name], -0.01 * slope * seen.of(name)[best] / 0.05, rtol=1e-5, atol=1e-6)
    assert len(chosen) > 1


def test_directions_lean_towards_the_mean_that_is_learned():
    """On a slope the probes go down it more and more."""
    gradient = unit_gradient()
    x = Landscape(linear(gradient), {name: torch.zeros_like(g) for name, g in gradient.items()})
    optimizer = x.optimizer(LDSD, lr=0.0, smoothing=EPS, k=5, mean_rate=100.0)
    drops = [np.mean(x.step(optimizer).losses[:5]) for _ in range(120)]
    assert np.mean(drops[-20:]) < np.mean(drops[:20]) - 3 * EPS


# ---- LDSD-JAGUAR -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.25, 1), (0.5, 2), (0.8, 3), (1.0, 4)])
def test_a_direction_moves_so_many_tensors(fraction, count):
    x = landscape()
    optimizer = x.optimizer(LDSDJaguar, lr=1e-3, k=4, fraction=fraction)
    sets = set()
    for _ in range(5):
        for probe in x.step(optimizer).probes:
            moved = frozenset(name for name, u in probe.items() if u.any())
            assert len(moved) == count
            assert all(probe[name].all() for name in moved), "a tensor moves as a whole"
            sets.add(moved)
    assert len(sets) > 1 or count == 4, "each direction has its own"


def test_tensors_that_no_chosen_direction_moved_do_not_move_and_the_others_always_do():
    x = landscape()
    optimizer = x.optimizer(LDSDJaguar, lr=1e-3, k=2, fraction=0.01)
    chosen: set[str] = set()
    stayed = 0
    for _ in range(5):
        seen = x.step(optimizer)
        chosen |= {name for name, u in seen.probes[-1].items() if u.any()}
        for name in SHAPES:
            expected = 1e-3 if name in chosen else 0.0
            stayed += name not in chosen
            np.testing.assert_allclose(np.abs(seen.move[name]), expected, rtol=0, atol=1e-9, err_msg=name)
    assert stayed
    assert {n for n, p in x.parameters.items() if "momentum_buffer" in optimizer.state[p]} >= chosen


def test_the_mean_of_a_tensor_learns_only_from_directions_that_moved_it():
    """The released code weights every tensor's mean by the losses of all directions, at this fraction mostly noise."""

    def means(factor: float) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        def loss(x):
            return wavy({"vector": x["vector"]}) + factor * (x["matrix"] - start["matrix"]).square().sum()

        start = {"matrix": normal(3, 4, seed=1), "vector": normal(5, seed=2)}
        x = Landscape(loss, start)
        optimizer = x.optimizer(LDSDJaguar, lr=0.0, smoothing=0.1, k=7, fraction=0.5, mean_rate=2.0)
        seen = x.step(optimizer)
        moved = {name: sum(bool(u.any()) for u in seen.of(name)[:7]) for name in start}
        return {name: optimizer.state[p]["mean"].clone() for name, p in x.parameters.items()}, moved

    small, moved = means(1.0)
    large, _ = means(1000.0)
    assert min(moved.values()) >= 2
    assert torch.equal(small["vector"], large["vector"])
    assert not torch.equal(small["matrix"], large["matrix"])


def test_a_tensor_that_fewer_than_two_directions_moved_keeps_its_mean():
    x = landscape()
    optimizer = x.optimizer(LDSDJaguar, lr=0.0, k=3, fraction=0.01, mean_rate=100.0)
    kept: dict[str, torch.Tensor] = {}
    learned = 0
    for _ in range(12):
        seen = x.step(optimizer)
        moved = {name: sum(bool(u.any()) for u in seen.of(name)[:3]) for name in SHAPES}
        for name, p in x.parameters.items():
            now = optimizer.state[p].get("mean")
            if now is not None and name in kept:
                assert torch.equal(now, kept[name]) == (moved[name] < 2)
                learned += moved[name] >= 2
            if now is not None:
                kept[name] = now.clone()
    assert learned


def test_the_first_means_have_norm_one_in_each_tensor():
    x = landscape()
    optimizer = x.optimizer(LDSDJaguar, lr=0.0, k=2, fraction=1.0, mean_rate=0.0)
    x.step(optimizer)
    means = {name: optimizer.state[p]["mean"] for name, p in x.parameters.items()}
    for mean in means.values():
        assert float(mean.norm()) == pytest.approx(1, rel=1e-6)
    assert abs(cosine(means["matrix"].numpy().ravel()[:24], means["wide"].numpy().ravel())) < 0.7
    x.step(optimizer)
    assert all(torch.equal(optimizer.state[p]["mean"], means[name]) for name, p in x.parameters.items())


def test_a_tensor_that_is_added_later_has_a_mean_of_its_own():
    x = landscape()
    optimizer = LDSDJaguar(list(x.parameters.items())[:2], lr=1e-3, fraction=1.0, seed=SEED)
    x.step(optimizer)
    optimizer.add_param_group({"params": list(x.parameters.items())[2:], "geometry": "sign"})
    x.step(optimizer)
    assert all("mean" in optimizer.state[p] for p in x.parameters.values())


def test_without_a_seed_the_global_one_decides_on_the_first_means_too():
    def mean(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        x = landscape()
        optimizer = x.optimizer(LDSDJaguar, lr=0.0, fraction=1.0, mean_rate=0.0, seed=None)
        x.step(optimizer)
        return optimizer.state[x.parameters["matrix"]]["mean"]

    assert torch.equal(mean(1), mean(1))
    assert not torch.equal(mean(1), mean(2))
