"""What holds of every method of METHODS; a new one needs a formula in formulas/."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from tests.optim.methods.formulas import COMMON, REFERENCES, Reference
from tests.optim.methods.problem import (
    Stackable,
    World,
    accepts,
    mean,
    memory_of,
    mixed,
    optimizer_of,
    train,
    watched_step,
    weights,
)
from tests.optim.reference import bits, raw, same_bits
from tests.optim.zoo import IDS
from zo_lightning.optim.methods import METHODS

attached = pytest.mark.parametrize("attach", [True, False], ids=["attached", "in_place"])
every = pytest.mark.parametrize("name", METHODS)
STEPS = 4


def reference_of(name: str) -> Reference:
    if name not in REFERENCES:
        pytest.fail(f"the method {name!r} has no formula to compare with: write one with @formula({name!r}, ...) in formulas/")
    return REFERENCES[name]


def settings_of(name: str) -> list[dict[str, Any]]:
    return reference_of(name).settings


def test_every_reference_is_of_a_method():
    assert set(REFERENCES) <= set(METHODS)


@attached
@every
def test_steps_are_the_published_formula(name, attach):
    for settings in settings_of(name):
        module = mixed()
        optimizer = optimizer_of(METHODS[name], module, attach, **settings)
        world = World(mixed(), optimizer.directions, optimizer.param_groups)
        start = dict(world.x)
        for _ in range(STEPS):
            train(module, optimizer, 1)
            last = optimizer.last
            sizes = {"lr": last.lr, "smoothing": last.smoothing} if "rule" in settings else {}
            reference_of(name).step(world, {**settings, **sizes})
            world.t += 1
            moved = max(np.abs(x - start[n]).max() for n, x in world.x.items())
            assert moved > 0 or name == "zo_conservative"
            for parameter, x in weights(module).items():
                error = np.abs(x - world.x[parameter]).max()
                assert error <= reference_of(name).rtol * moved, f"{settings}, step {world.t}: {parameter} is off by {error}"


def test_the_conservative_comparison_has_every_outcome():
    """Of the formula's three places each is taken in some step."""
    seen = set()
    for settings in settings_of("zo_conservative"):
        world = World(mixed(), optimizer_of(METHODS["zo_conservative"], mixed()).directions)
        for _ in range(STEPS):
            reference_of("zo_conservative").step(world, settings)
            world.t += 1
        seen |= set(world.memory["taken"])
    assert seen == {-1.0, 0.0, 1.0}


@attached
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every
def test_probes_leave_no_trace(name, attach, dtype):
    for settings in settings_of(name)[: None if dtype is torch.bfloat16 else 1]:
        module = mixed(dtype)
        before = bits(module)
        plain = {key: value for key, value in settings.items() if key != "rule"}
        train(module, optimizer_of(METHODS[name], module, attach, **{**plain, "lr": 0.0}), 3)
        assert same_bits(bits(module), before), settings


@every
def test_the_state_has_the_size_that_is_documented(name):
    module = mixed()
    chosen = {"fraction": 1.0} if name == "ldsd_jaguar" else {}  # every tensor has been moved
    optimizer = optimizer_of(METHODS[name], module, **COMMON, **chosen)
    train(module, optimizer, 2)
    size = sum(p.numel() for p in module.parameters())
    assert sum(x.numel() for x in memory_of(optimizer).values()) == reference_of(name).state * size
    if accepts(METHODS[name], "momentum") and inspect.signature(METHODS[name]).parameters["momentum"].default == 0:
        heavy = optimizer_of(METHODS[name], module, **COMMON, **chosen, momentum=0.9)
        train(module, heavy, 2)
        assert sum(x.numel() for x in memory_of(heavy).values()) == (reference_of(name).state + 1) * size


@pytest.mark.parametrize("name", ["lozo", "ldsd_sgd"])
def test_low_rank_state_is_left_factors(name):
    module = mixed()
    low = {"rank": 2} if name == "lozo" else {"low_rank": 2}
    optimizer = optimizer_of(METHODS[name], module, True, **COMMON, **low, interval=2, momentum=0.9)
    train(module, optimizer, 2)
    lefts = sum(p.numel() if p.dim() < 2 else 2 * len(p) for p in module.parameters())
    assert sum(x.numel() for x in memory_of(optimizer).values()) == lefts * (1 if name == "lozo" else 2)


@attached
@every
def test_an_interrupted_run_goes_on_bit_for_bit(name, attach):
    for settings in settings_of(name):
        whole = mixed(torch.float32)
        optimizer = optimizer_of(METHODS[name], whole, attach, **settings)
        saved = []
        for _ in range(STEPS):
            saved.append((copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())))
            train(whole, optimizer, 1)
        for stop in range(1, STEPS):
            module = mixed(torch.float32)
            module.load_state_dict(saved[stop][0])
            resumed = optimizer_of(METHODS[name], module, attach, **settings)
            resumed.load_state_dict(saved[stop][1])
            train(module, resumed, STEPS - stop)
            assert same_bits(bits(module), bits(whole)), f"{settings}, stopped after {stop} steps"


@every
def test_forwards_per_step_are_the_closures_calls(name):
    for settings in settings_of(name):
        module = mixed()
        plain = {key: value for key, value in settings.items() if key != "rule"}
        optimizer = optimizer_of(METHODS[name], module, **plain)
        train(module, optimizer, 1)
        losses = watched_step(module, optimizer)
        assert len(losses) == optimizer.forwards_per_step == optimizer.last.forwards, settings


@every
def test_probes_of_a_stacked_batch_make_the_same_run(name):
    torch.manual_seed(0)
    first = Stackable().double()
    for settings in settings_of(name):
        ends = []
        for probes in ("sequential", "stacked"):
            module = copy.deepcopy(first)
            optimizer = optimizer_of(METHODS[name], module, True, **settings, probes=probes)
            for _ in range(3):
                optimizer.step(lambda m=module: m(IDS), stacked=lambda copies, m=module: m(IDS.repeat(copies, 1)))
            ends.append(weights(module))
        assert optimizer.param_groups[0]["stacking"] == "trusted", settings
        for parameter, x in ends[0].items():
            np.testing.assert_allclose(ends[1][parameter], x, rtol=0, atol=1e-5, err_msg=f"{settings}: {parameter}")


@attached
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every
def test_half_precision_weights_have_a_float32_state(name, attach, dtype):
    for settings in settings_of(name)[: None if dtype is torch.bfloat16 else 1]:
        module = mixed(dtype)
        before = bits(module)
        optimizer = optimizer_of(METHODS[name], module, attach, **{**settings, "smoothing": 0.1})
        train(module, optimizer, 3)
        assert all(p.dtype is dtype and p.isfinite().all() for p in module.parameters())
        assert {x.dtype for x in memory_of(optimizer).values()} <= {torch.float32}
        assert not same_bits(bits(module), before) or name == "zo_conservative"
        again = optimizer_of(METHODS[name], mixed(dtype), attach, **settings)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        kept, loaded = memory_of(optimizer), memory_of(again)
        assert kept.keys() == loaded.keys()
        assert all(torch.equal(raw(kept[key]), raw(loaded[key])) for key in kept), "torch casts a state to the weights' dtype"


@attached
@every
def test_weight_decay_shrinks_beside_the_step(name, attach):
    if not accepts(METHODS[name], "weight_decay"):
        with pytest.raises(TypeError, match="weight_decay"):
            optimizer_of(METHODS[name], mixed(), weight_decay=0.1)
        return
    settings = {key: value for key, value in settings_of(name)[0].items() if key not in ("rule", "weight_decay")}
    plain, decayed = mixed(), mixed()
    start = weights(plain)
    train(plain, optimizer_of(METHODS[name], plain, attach, **settings), 1)
    train(decayed, optimizer_of(METHODS[name], decayed, attach, **settings, weight_decay=0.3), 1)
    for parameter, x in weights(decayed).items():
        expected = weights(plain)[parameter] - settings["lr"] * 0.3 * start[parameter]
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-9, err_msg=parameter)


@every
def test_a_seed_decides_on_the_run(name):
    settings = settings_of(name)[0]

    def run(seed: int) -> nn.Module:
        module = mixed(torch.float32)
        torch.rand(seed + 1)  # the global generator plays no part
        train(module, optimizer_of(METHODS[name], module, **{**settings, "seed": seed}), 3)
        return module

    first = bits(run(1))
    assert same_bits(bits(run(1)), first)
    assert not same_bits(bits(run(2)), first)


@attached
@every
def test_a_scheduler_scales_the_step(name, attach):
    settings = {key: value for key, value in settings_of(name)[0].items() if key != "rule"}
    settings["lr"] /= 10  # conservative ZO takes the same of its places
    ends = {}
    for factor in (1.0, 0.25):
        module = mixed()
        optimizer = optimizer_of(METHODS[name], module, attach, **settings)
        scheduler = LambdaLR(optimizer, lambda t, factor=factor: factor if t else 1.0)
        train(module, optimizer, 1)
        scheduler.step()
        middle = weights(module)
        train(module, optimizer, 1)
        ends[factor] = {n: x - middle[n] for n, x in weights(module).items()}
    assert any(np.any(x) for x in ends[1.0].values())
    for parameter, whole in ends[1.0].items():
        np.testing.assert_allclose(ends[0.25][parameter], 0.25 * whole, rtol=1e-5, atol=1e-9, err_msg=parameter)


@pytest.mark.parametrize(("attach", "bad"), [(True, float("nan")), (False, float("inf"))], ids=["attached", "in_place"])
@every
def test_a_nonfinite_loss_changes_neither_weights_nor_state(name, attach, bad):
    settings = settings_of(name)[0]
    module = mixed()
    optimizer = optimizer_of(METHODS[name], module, attach, **settings)
    train(module, optimizer, 3)
    before, kept = bits(module), {key: raw(x) for key, x in memory_of(optimizer).items()}
    calls = []

    def closure() -> torch.Tensor:
        calls.append(0)
        return mean(module) if len(calls) == 1 else mean(module) * bad

    with pytest.warns(UserWarning, match="the update is skipped"):
        optimizer.step(closure)
    assert same_bits(bits(module), before)
    assert same_bits({key: raw(x) for key, x in memory_of(optimizer).items()}, kept)
    train(module, optimizer, 1)
    assert optimizer.last.finite
