"""LOZO, SubZero and ZO-Muon: what is held, for how long, and that probes and steps agree where it is drawn anew."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.optim.methods.formulas.registry import extreme, slopes
from tests.optim.methods.problem import (
    CPU,
    SEED,
    SHAPES,
    Landscape,
    World,
    cosine,
    landscape,
    mean,
    memory_of,
    mixed,
    normal,
    optimizer_of,
    total,
    train,
    watched_step,
    wavy,
    weights,
)
from tests.optim.reference import loss_at, matrix
from zo_lightning.optim import GEOMETRIES, Address, Subspace, SubZeroDirections, ZerothOrder
from zo_lightning.optim.methods import LOZO, SubZero, ZOMuon

MATRICES = [name for name, shape in SHAPES.items() if len(shape) > 1]


def rank(x: np.ndarray) -> int:
    values = np.linalg.svd(x, compute_uv=False)
    return int((values > 1e-5 * values[0]).sum())


# ---- LOZO --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("normalised", [False, True])
def test_the_step_is_along_the_probe_also_where_v_is_drawn_anew(interval, normalised):
    """In the released code probe and step draw in another order there, and have a cosine of zero; vectors too."""
    x = landscape()
    optimizer = x.optimizer(LOZO, lr=1e-3, rank=2, interval=interval, normalised=normalised)
    spaces = []
    for _ in range(2 * interval + 1):
        seen = x.step(optimizer)
        slope = (seen.losses[0] - seen.losses[1]) / 2e-3
        for name in SHAPES:
            probe = (seen.of(name)[0] - seen.of(name)[1]) / 2
            assert cosine(seen.move[name], -np.sign(slope) * probe) == pytest.approx(1, abs=1e-6), name
            assert np.linalg.norm(seen.move[name]) == pytest.approx(
                np.linalg.norm(probe) * (1 if normalised else abs(slope)), rel=1e-5
            )
        spaces.append(matrix(seen.of("matrix")[0]))
    held = [rank(np.vstack([a, b])) for a, b in pairwise(spaces)]
    assert held == [4 if (t + 1) % interval == 0 else 2 for t in range(2 * interval)], "V is that of its interval"


@pytest.mark.parametrize("interval", [1, 2])
def test_attached_the_step_is_along_the_probe_too(interval):
    """The direction that is read off the step has the losses that the closure saw."""
    module = mixed()
    optimizer = optimizer_of(LOZO, module, True, lr=0.05, smoothing=0.3, rank=2, interval=interval)
    for _ in range(4):
        start = weights(module)
        plus, minus = watched_step(module, optimizer)[-2:]
        here = weights(module)
        u = {name: (x - here[name]) / (0.05 * (plus - minus) / 0.6) for name, x in start.items()}
        assert plus == pytest.approx(float(loss_at(mixed(), {n: x + 0.3 * u[n] for n, x in start.items()}, mean)), rel=1e-6)
        assert minus == pytest.approx(float(loss_at(mixed(), {n: x - 0.3 * u[n] for n, x in start.items()}, mean)), rel=1e-6)
        assert plus != pytest.approx(minus, rel=1e-3), "the test would see another direction"


@pytest.mark.parametrize("attach", [True, False], ids=["attached", "in_place"])
def test_the_momentum_goes_over_to_a_new_v_by_projection(attach):
    """At a step of no slope the average is β times what has been carried over."""
    module = mixed()
    optimizer = optimizer_of(LOZO, module, attach, lr=0.05, smoothing=0.02, rank=2, interval=3, momentum=0.8)
    shapes = {name: p.shape for name, p in module.named_parameters()}

    def rights(step: int) -> dict[str, np.ndarray]:
        drawn = {n: optimizer.directions.draw(Address(SEED, step, n), s, CPU) for n, s in shapes.items() if len(s) > 1}
        return {name: z.right.double().numpy() for name, z in drawn.items()}

    def products(step: int) -> dict[str, np.ndarray]:
        held, v = memory_of(optimizer), rights(step)
        if attach:
            return {n: held[f"{n} left momentum"].double().numpy().T @ v[n].T for n in v}
        return {n: matrix(held[f"{n} momentum_buffer"].double().numpy()) for n in v}

    for _ in range(3):
        optimizer.step(lambda: mean(module))
    old = products(2)
    optimizer.step(lambda: torch.ones((), dtype=torch.float64) + 0 * mean(module))
    for name, new in products(3).items():
        v = rights(3)[name]
        nearest = old[name] @ v @ np.linalg.pinv(v)
        np.testing.assert_allclose(new, 0.8 * nearest, rtol=0, atol=1e-5 * np.abs(old[name]).max(), err_msg=name)
        assert np.linalg.norm(nearest) < 0.99 * np.linalg.norm(old[name]), "something is lost, or V is the same"


# ---- SubZero -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(40, 60), (60, 20), (16, 4, 5)])
@pytest.mark.parametrize("r", [3, 16])
def test_entries_of_subzero_have_a_size_of_one(shape, r):
    family = SubZeroDirections(r, 10)
    zs = [family.draw(Address(0, step, "w"), torch.Size(shape), CPU) for step in range(60)]
    size = np.mean([float(z.dense().square().mean()) for z in zs]) ** 0.5
    assert size == pytest.approx(1, abs=4 / (2 * r * r * 60) ** 0.5)  # r² numbers are fresh in each
    for z in zs[:1] + zs[-1:]:
        torch.testing.assert_close(z.right.T @ z.right, torch.eye(r), rtol=0, atol=1e-5)


def test_subzero_holds_both_sides_for_its_interval():
    x = landscape()
    optimizer = x.optimizer(SubZero, lr=1e-3, rank=2, interval=3)
    seen = [x.step(optimizer) for _ in range(7)]
    for name in MATRICES:
        us = [matrix(step.of(name)[0]) for step in seen]
        assert [rank(u) for u in us] == [2] * 7
        pairs = list(pairwise(us))
        short = min(len(us[0]), 4), min(us[0].shape[1], 4)
        expected = [(2, 2), (2, 2), short] * 2
        assert [(rank(np.hstack(pair)), rank(np.vstack(pair))) for pair in pairs] == expected, name
        assert abs(cosine(*pairs[0])) < 0.95, "what is between them is fresh"
        for step in seen:
            assert abs(cosine(step.of(name)[0], step.move[name])) == pytest.approx(1, abs=1e-6)


# ---- ZO-Muon -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["left", "right"])
def test_all_probes_of_a_step_share_the_basis_also_where_it_is_drawn_anew(side):
    """In the released code each draws its own there, and the step has the last one's with all of their coefficients."""
    x = landscape()
    optimizer = x.optimizer(ZOMuon, lr=1e-3, num_directions=3, rank=2, interval=2, side=side)
    bases = []
    for _ in range(5):
        seen = x.step(optimizer)
        assert len(seen.losses) == 4 == optimizer.forwards_per_step
        for name in MATRICES:
            us = [matrix(u) for u in seen.of(name)[1:]]
            assert all(rank(u) == 2 for u in us)
            together = np.hstack if side == "left" else np.vstack
            apart = np.vstack if side == "left" else np.hstack
            assert rank(together([*us, matrix(seen.move[name])])) == 2
            assert rank(apart(us)) > 2, "the other factor is fresh"
        bases.append(us[-1])
    changes = [rank(together(list(pair))) > 2 for pair in pairwise(bases)]
    assert changes == [False, True, False, True]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_step_orthogonalises_the_mean_estimate(side):
    """``P NS(mean)`` is NS of the dense product: the polynomial of its singular values, of which r are not zero."""
    x = landscape()
    optimizer = x.optimizer(ZOMuon, lr=1e-3, num_directions=3, rank=2, side=side, vector_rate=0.3, iterations=4)
    for _ in range(3):
        seen = x.step(optimizer)
        slopes = [(loss - seen.losses[0]) / 1e-3 for loss in seen.losses[1:]]
        for name in SHAPES:
            estimate = sum(rho * u / 1e-3 for rho, u in zip(slopes, seen.of(name)[1:], strict=True)) / 3
            if name == "vector":
                np.testing.assert_allclose(seen.move[name], -1e-3 * 0.3 * estimate, rtol=1e-5, atol=1e-9)
                continue
            left, values, right = np.linalg.svd(matrix(estimate), full_matrices=False)
            values = np.where(values > 1e-5 * values[0], values, 0) / np.linalg.norm(values)
            for _ in range(4):
                values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
            step = ((left * values) @ right).reshape(SHAPES[name])
            np.testing.assert_allclose(seen.move[name], -1e-3 * step, rtol=0, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_huge_loss_does_not_silence_the_step_in_half_precision(side):
    """In float16 the Frobenius norm of the estimate overflows, and the released code's step is zero."""
    moves = []
    for factor in (1.0, 1e6):
        start = {"w": normal(64, 128).half(), "v": normal(5).half()}
        x = Landscape(lambda p, factor=factor: factor * wavy({name: value.double() for name, value in p.items()}), start)
        optimizer = x.optimizer(ZOMuon, lr=0.05, smoothing=0.1, num_directions=2, rank=8, side=side, vector_rate=0.0)
        moves.append(x.step(optimizer).move)
    assert np.linalg.norm(moves[0]["w"]) > 0.05
    assert cosine(moves[0]["w"], moves[1]["w"]) > 0.99


@pytest.mark.parametrize("attach", [True, False], ids=["attached", "in_place"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_probes_and_steps_along_oracles_are_extreme_points(geometry, attach, momentum):
    """With a basis held on the left too; the sign of a product is no product of signs."""
    rules = {kind: {"name": geometry, "radius": 0.7} for kind in ("matrix", "embedding", "vector")}
    family, settings = Subspace(2, 2), {"lr": 0.05, "smoothing": 0.02, "num_directions": 2}
    module = mixed()
    optimizer = optimizer_of(ZerothOrder, module, attach, directions=family, geometry=rules, momentum=momentum, **settings)
    world = World(mixed(), family, optimizer.param_groups)
    for _ in range(3):
        train(module, optimizer, 1)
        us = [extreme(world, world.z(query)) for query in range(2)]
        estimate = total([rho / 2 for rho in slopes(world, settings, us)], us)
        world.move(extreme(world, world.average(estimate, momentum)), settings)
        world.t += 1
        for name, x in weights(module).items():
            np.testing.assert_allclose(x, world.x[name], rtol=0, atol=5e-6, err_msg=name)


def test_a_side_that_is_none():
    with pytest.raises(ValueError, match="side must be 'left' or 'right', got 'top'"):
        landscape().optimizer(ZOMuon, side="top")
