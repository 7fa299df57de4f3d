"""The optimizer's step, against an independent float64 recomputation and against the contracts of its documentation."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

from tests.optim import reference
from tests.optim.reference import bits, dense, loss_at, raw, same_bits
from tests.optim.zoo import CASES, IDS, Mixed, inputs
from zo_lightning.optim import (
    DIRECTIONS,
    Address,
    LowRank,
    NonFiniteLossError,
    ParameterFree,
    StepRule,
    ZerothOrder,
    round_stochastically,
)
from zo_lightning.optim.randomness import generator

CPU = torch.device("cpu")
attached = pytest.mark.parametrize("attach", [True, False], ids=["scratch", "in_place"])


def mixed(dtype: torch.dtype = torch.float64) -> nn.Module:
    return CASES["mixed"].module(dtype)


def per_example(module: nn.Module) -> torch.Tensor:
    return module(IDS)


def mean(module: nn.Module) -> torch.Tensor:
    return module(IDS).mean()


def optimizer_of(module: nn.Module, attach: bool = True, **settings) -> ZerothOrder:
    optimizer = ZerothOrder(module.named_parameters(), **{"lr": 0.05, "smoothing": 0.02, "seed": 0, **settings})
    return optimizer.attach(module) if attach else optimizer


def train(module: nn.Module, optimizer: ZerothOrder, steps: int, loss=mean) -> list[float]:
    return [float(optimizer.step(lambda: loss(module))) for _ in range(steps)]


def averages(optimizer: ZerothOrder) -> dict[str, torch.Tensor]:
    """The bits of the moving averages, wherever a mechanism keeps them."""
    state = optimizer.state_dict()
    dense = {str(k): v["momentum_buffer"] for k, v in state["state"].items()}
    return {k: raw(v) for k, v in (state.get("path", {}).get("momentum", {}) | dense).items()}


# ---- the formulas ------------------------------------------------------------------------------------------------------
class Reference:
    """The same optimizer written down again: float64, the whole direction at once, a materialised W + τu."""

    def __init__(self, module, groups, *, directions, update, q, sides, momentum, weight_decay, seed, lr, tau) -> None:
        self.module, self.groups = module, groups
        self.x = {name: p.detach().double().numpy().copy() for name, p in module.named_parameters()}
        self.directions, self.update, self.q, self.sides = directions, update, q, sides
        self.momentum, self.weight_decay, self.seed, self.lr, self.tau = momentum, weight_decay, seed, lr, tau
        self.average: dict[str, np.ndarray] = {}
        self.t = 0

    def direction(self, query: int) -> dict[str, np.ndarray]:
        u = {}
        for group in self.groups:
            z = []
            for name in group["param_names"]:
                shape = torch.Size(self.x[name].shape)
                z.append(dense(self.directions.draw(Address(self.seed, self.t, name, query), shape, CPU), shape))
            if self.update == "lmo":
                z = reference.extreme(group["geometry"], z, group["radius"], group["transposed"])
            elif self.directions.name == "sphere":
                length = math.sqrt(sum((x**2).sum() for x in z))
                z = [x / length for x in z]
            u.update(zip(group["param_names"], z, strict=True))
        return u

    def loss(self, u: dict[str, np.ndarray], tau: float) -> float:
        return float(loss_at(self.module, {n: x + tau * u[n] for n, x in self.x.items()}, mean))

    def step(self) -> tuple[list[float], float]:
        us = [self.direction(query) for query in range(self.q)]
        plus = [self.loss(u, self.tau) for u in us]
        if self.sides == 2:
            minus = [self.loss(u, -self.tau) for u in us]
            rho = [(a - b) / (2 * self.tau) for a, b in zip(plus, minus, strict=True)]
            seen = np.mean(plus + minus)
        else:
            base = self.loss(us[0], 0.0)
            rho = [(a - base) / self.tau for a in plus]
            seen = np.mean(plus)
        g = {n: sum(r * u[n] for r, u in zip(rho, us, strict=True)) / self.q for n in self.x}
        if self.momentum:
            g = {n: self.momentum * self.average.get(n, 0.0) + (1 - self.momentum) * x for n, x in g.items()}
            self.average = dict(g)
        if self.update == "lmo":
            for group in self.groups:
                names = group["param_names"]
                s = reference.extreme(group["geometry"], [g[n] for n in names], group["radius"], group["transposed"])
                g.update(zip(names, s, strict=True))
        self.x = {n: (1 - self.lr * self.weight_decay) * x - self.lr * g[n] for n, x in self.x.items()}
        self.t += 1
        return rho, float(seen)


def check_against_reference(steps: int = 2, **settings) -> None:
    module = mixed()
    full = {"num_directions": 1, "sides": 2, "momentum": 0.0, "weight_decay": 0.0, "seed": 4, "update": "lmo", "rank": 2}
    full |= settings
    optimizer = optimizer_of(module, **full)
    twin = Reference(
        mixed(),
        optimizer.param_groups,
        directions=DIRECTIONS[full["directions"]](**({"rank": full["rank"]} if full["directions"] == "low_rank" else {})),
        update=full["update"],
        q=full["num_directions"],
        sides=full["sides"],
        momentum=full["momentum"],
        weight_decay=full["weight_decay"],
        seed=full["seed"],
        lr=0.05,
        tau=0.02,
    )
    for _ in range(steps):
        before = optimizer.forwards
        loss = optimizer.step(lambda: mean(module))
        rho, seen = twin.step()
        assert optimizer.last.slopes == pytest.approx(rho, rel=1e-4, abs=1e-6)
        assert float(loss) == pytest.approx(seen, rel=1e-6)
        assert optimizer.last.loss == pytest.approx(seen, rel=1e-6)
        observing = 1 if before == 0 else 0
        evaluations = full["num_directions"] * full["sides"] if full["sides"] == 2 else full["num_directions"] + 1
        assert optimizer.forwards - before == optimizer.last.forwards == evaluations + observing
    for name, weight in module.state_dict().items():
        np.testing.assert_allclose(weight.numpy(), twin.x[name], atol=2e-6, err_msg=name)


@pytest.mark.parametrize("update", ["lmo", "sgd"])
@pytest.mark.parametrize("directions", reference.BASIC)
@pytest.mark.parametrize("sides", [2, 1])
@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_a_step_is_its_formula(update, directions, sides, q, momentum, weight_decay):
    check_against_reference(
        update=update, directions=directions, sides=sides, num_directions=q, momentum=momentum, weight_decay=weight_decay
    )


@pytest.mark.parametrize(
    ("directions", "geometry"),
    [("gaussian", name) for name in ("euclidean", "row", "column", "spectral", "sign")]
    + [("sphere", "euclidean"), ("rademacher", "spectral"), ("low_rank", "euclidean"), ("low_rank", "row")],
)
@pytest.mark.parametrize(("q", "momentum"), [(1, 0.0), (2, 0.9)])
def test_a_step_is_its_formula_in_every_geometry(directions, geometry, q, momentum):
    rules = {kind: {"name": geometry, "radius": 0.7} for kind in ("matrix", "embedding", "vector")}
    check_against_reference(directions=directions, geometry=rules, num_directions=q, momentum=momentum)


def test_low_rank_sign_geometry_at_rank_one():
    check_against_reference(directions="low_rank", rank=1, geometry={"matrix": "sign"})


def test_frozen_parameters_neither_probed_nor_updated():
    module = mixed()
    before = bits(module)
    optimizer = optimizer_of(module, geometry={"emb.*": None, "vector": None})
    train(module, optimizer, 3)
    changed = {name for name, b in bits(module).items() if not torch.equal(b, before[name])}
    assert changed == {"conv.weight", "head.weight"}


@pytest.mark.parametrize("directions", reference.BASIC)
def test_the_basic_step_is_gamma_times_the_sign_along_the_probe(directions):
    """x ← x - γ sign(ρ) u, of length γ in the norm."""
    module = mixed()
    start = {n: p.detach().clone() for n, p in module.named_parameters()}
    optimizer = optimizer_of(module, directions=directions)
    losses = []
    optimizer.step(lambda: losses.append(mean(module)) or losses[-1])
    for group in optimizer.param_groups:
        now = module.state_dict()
        delta = [(now[n] - start[n]).numpy() for n in group["param_names"]]
        assert reference.norm(group["geometry"], delta, group["radius"], group["transposed"]) == pytest.approx(0.05, rel=1e-5)
    sign = math.copysign(1, optimizer.last.slopes[0])
    u = {n: (start[n] - weight) / (0.05 * sign) for n, weight in module.state_dict().items()}
    for loss, tau in zip(losses[-2:], (0.02, -0.02), strict=True):
        assert float(loss) == pytest.approx(float(loss_at(module, {n: start[n] + tau * u[n] for n in u}, mean)), rel=1e-6)


@attached
def test_scalar_and_per_example_losses_agree(attach):
    a, b = mixed(), mixed()
    first, second = (optimizer_of(m, attach, num_directions=2, momentum=0.5) for m in (a, b))
    for _ in range(3):
        assert float(first.step(lambda: mean(a))) == pytest.approx(float(second.step(lambda: per_example(b))), rel=1e-7)
    for name, weight in a.state_dict().items():
        torch.testing.assert_close(weight, b.state_dict()[name], rtol=1e-6, atol=1e-7)
    twice = mixed()
    third = optimizer_of(twice, attach, num_directions=2, momentum=0.5)
    third.step(lambda: per_example(twice).reshape(2, 2))  # any shape
    assert third.last.slopes == pytest.approx(_first_slopes(attach), rel=1e-12)


def _first_slopes(attach: bool) -> list[float]:
    module = mixed()
    optimizer = optimizer_of(module, attach, num_directions=2, momentum=0.5)
    optimizer.step(lambda: per_example(module))
    return optimizer.last.slopes


@attached
@pytest.mark.parametrize("directions", reference.BASIC)
def test_both_mechanisms_take_the_same_steps(attach, directions):
    a, b = mixed(torch.float32), mixed(torch.float32)
    train(a, optimizer_of(a, True, directions=directions), 3)
    train(b, optimizer_of(b, attach, directions=directions), 3)
    exact = directions != "low_rank" or attach  # factors add up before they are written, the weights would at every step
    for name, weight in a.state_dict().items():
        torch.testing.assert_close(weight, b.state_dict()[name], rtol=0, atol=0 if exact else 1e-6)


def test_the_cross_validated_gain():
    module = mixed()
    optimizer = optimizer_of(module, lr=0.0)
    losses = []
    optimizer.step(lambda: losses.append(per_example(module).clone()) or losses[-1])
    plus, minus = (x.numpy() for x in losses[-2:])
    rho = (plus - minus) / 0.04
    n = len(rho)
    by_hand = np.mean([np.sign(np.delete(rho, i).mean()) * rho[i] for i in range(n)])
    assert optimizer.last.gain == pytest.approx(by_hand, rel=1e-6)
    optimizer.step(lambda: mean(module))
    assert optimizer.last.gain == abs(optimizer.last.slopes[0]), "nothing to leave out"


# ---- one world ---------------------------------------------------------------------------------------------------------
class Noisy(nn.Module):
    """Dropout, batch norm, and a buffer that its forward replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm, self.drop = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.masks: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        ones = self.drop(torch.ones(6))
        self.masks.append(ones)
        return (self.norm(self.lin(x)) * ones).square().mean()


@pytest.mark.parametrize("settings", [{}, {"num_directions": 3}, {"sides": 1}, {"step_rule": lambda: ParameterFree(10)}])
def test_all_evaluations_of_a_step_see_the_same_world(settings):
    torch.manual_seed(1)
    module = Noisy().train()
    settings = {k: v() if callable(v) else v for k, v in settings.items()}
    optimizer = optimizer_of(module, **settings)
    x = inputs(8, 4, dtype=torch.float32)
    for _ in range(2):
        buffers = {name: raw(buffer) for name, buffer in module.named_buffers()}
        state = torch.get_rng_state()
        module.masks.clear()
        optimizer.step(lambda: module(x))
        assert len(module.masks) == optimizer.last.forwards >= 2
        assert all(torch.equal(mask, module.masks[0]) for mask in module.masks)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        module.drop(torch.ones(6))
        assert torch.equal(torch.get_rng_state(), after), "the generator is where one evaluation leaves it"
        assert all(torch.equal(raw(buffer), buffers[name]) for name, buffer in module.named_buffers())
        assert not torch.equal(state, after)


def test_buffers_are_put_back_when_the_closure_raises():
    module = Noisy().train()
    before = bits(module)
    optimizer = optimizer_of(module)

    def closure():
        module(inputs(8, 4, dtype=torch.float32))
        raise RuntimeError("after the forward")

    with pytest.raises(RuntimeError, match="after the forward"):
        optimizer.step(closure)
    assert same_bits(bits(module), before)


def test_gradients_are_neither_made_nor_touched():
    module = mixed(torch.float32)
    grads = {}
    for n, p in module.named_parameters():
        grads[n] = p.grad = torch.full_like(p, 3.0)
    flags = []
    optimizer = optimizer_of(module)
    loss = optimizer.step(lambda: flags.append(torch.is_grad_enabled()) or mean(module))
    assert not any(flags)
    assert not loss.requires_grad
    assert all(p.grad is grads[n] and (p.grad == 3).all() for n, p in module.named_parameters())
    assert all(p.requires_grad for p in module.parameters())


# ---- non-finite losses -------------------------------------------------------------------------------------------------
@attached
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("evaluation", ["plus", "minus"])
def test_a_nonfinite_loss_skips_the_update_and_is_counted(attach, bad, evaluation):
    module = mixed(torch.float32)
    optimizer = optimizer_of(module, attach, momentum=0.9, max_nonfinite=3)
    train(module, optimizer, 1)
    before = bits(module)
    momentum = averages(optimizer)

    def poisoned():
        calls = itertools.count()
        return lambda: mean(module) * (bad if next(calls) == ("plus", "minus").index(evaluation) else 1)

    for count in (1, 2):
        with pytest.warns(UserWarning, match=rf"step {count}: the loss is .*; the update is skipped \({count} in a row\)"):
            optimizer.step(poisoned())
        assert not optimizer.last.finite
        assert optimizer.param_groups[0]["nonfinite"] == count
        assert same_bits(bits(module), before)
    assert same_bits(averages(optimizer), momentum)
    train(module, optimizer, 1)
    assert optimizer.param_groups[0]["nonfinite"] == 0, "a good step resets the count"
    assert not same_bits(bits(module), before)
    before = bits(module)
    for _ in range(2):
        with pytest.warns(UserWarning, match="the update is skipped"):
            optimizer.step(poisoned())
    with pytest.raises(NonFiniteLossError, match=r"in 3 steps in a row .*weights are those of the last good step"):
        optimizer.step(poisoned())
    assert same_bits(bits(module), before)


def test_one_nan_among_the_examples_counts():
    module = mixed(torch.float32)
    optimizer = optimizer_of(module)
    mask = torch.tensor([1.0, float("nan"), 1.0, 1.0])
    with pytest.warns(UserWarning, match="the update is skipped"):
        optimizer.step(lambda: per_example(module) * mask)


@pytest.mark.parametrize("sides", [1, 2])
def test_a_bad_loss_at_the_centre_counts_where_it_is_used(sides):
    module = mixed(torch.float32)
    optimizer = optimizer_of(module, sides=sides)
    train(module, optimizer, 1)
    calls = itertools.count()
    before = bits(module)

    def closure():
        return mean(module) * (float("inf") if next(calls) == 0 else 1)

    with pytest.warns(UserWarning, match="the update is skipped"):
        optimizer.step(closure)
    assert same_bits(bits(module), before)


def test_low_precision_losses_are_averaged_in_float32():
    module = mixed(torch.float16)
    optimizer = optimizer_of(module)
    loss = optimizer.step(lambda: mean(module).half() * 0 + torch.full((100,), 60000.0, dtype=torch.float16))
    assert loss.dtype is torch.float32
    assert optimizer.last.finite
    assert float(loss) == 60000.0


# ---- resuming ----------------------------------------------------------------------------------------------------------
RESUMED = {
    "plain": {},
    "momentum": {"momentum": 0.9, "num_directions": 2},
    "sgd": {"update": "sgd", "directions": "sphere", "weight_decay": 0.1},
    "rule": {"step_rule": lambda: ParameterFree(20, interval=3)},
    "rule and momentum": {"step_rule": lambda: ParameterFree(interval=2), "momentum": 0.9, "sides": 1},
    "held factors": {"rank": 2, "interval": 4, "momentum": 0.5},
}


@pytest.mark.parametrize("settings", RESUMED.values(), ids=RESUMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(settings, dtype, tmp_path):
    def start(module):
        return optimizer_of(module, **{k: v() if callable(v) else v for k, v in settings.items()})

    module = mixed(dtype)
    optimizer = start(module)
    train(module, optimizer, 5)
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    losses = train(module, optimizer, 6)

    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other = mixed(dtype)
    resumed = start(other)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.step_index == 5
    again = train(other, resumed, 6)
    assert again == losses
    assert same_bits(bits(other), bits(module))
    assert resumed.step_index == optimizer.step_index == 11
    assert resumed.forwards == optimizer.forwards


def test_other_directions_are_refused():
    module = mixed()
    state = optimizer_of(module, rank=2).state_dict()
    with pytest.raises(ValueError, match=r"made with directions low_rank\(rank=2, interval=50\), this run has gaussian"):
        optimizer_of(module, directions="gaussian").load_state_dict(state)


def test_a_loaded_state_does_not_alias_the_saved_one():
    module = mixed()
    optimizer = optimizer_of(module, momentum=0.9)
    train(module, optimizer, 1)
    state = optimizer.state_dict()
    kept = {k: v["momentum_buffer"].clone() for k, v in state["state"].items()}
    twin = mixed()
    other = optimizer_of(twin, momentum=0.9)
    other.load_state_dict(state)
    train(twin, other, 2)
    assert all(torch.equal(state["state"][k]["momentum_buffer"], v) for k, v in kept.items())


def test_param_groups_hold_plain_data():
    optimizer = optimizer_of(mixed(), momentum=0.9, step_rule=ParameterFree(10))
    train(optimizer._module, optimizer, 2)
    plain = (int, float, str, bool, type(None))
    for group in optimizer.state_dict()["param_groups"]:
        for key, value in group.items():
            flat = value if isinstance(value, list) else [value]
            assert all(isinstance(x, plain) for x in flat), key
    assert all(isinstance(x, plain) for x in optimizer.state_dict()["step_rule"].values())


# ---- schedulers --------------------------------------------------------------------------------------------------------
class FixedRule(StepRule):
    """γ and τ from a table."""

    def __init__(self, sizes: list[float]) -> None:
        self.sizes, self.step_size, self.smoothing = sizes, 0.0, 1e-3

    def before_step(self, step, probe):
        self.step_size, self.smoothing = self.sizes[step], 1e-3 * (step + 1)
        return False

    def after_step(self, report):
        self.reports = [*getattr(self, "reports", []), report]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def moved_by(module: nn.Module, optimizer: ZerothOrder) -> float:
    """Length of one step in the optimizer's own norm."""
    start = {n: weight.clone() for n, weight in module.state_dict().items()}
    train(module, optimizer, 1)
    now = module.state_dict()
    return max(
        reference.norm(g["geometry"], [(now[n] - start[n]).numpy() for n in g["param_names"]], g["radius"], g["transposed"])
        for g in optimizer.param_groups
    )


SCHEDULERS = {
    "lambda": (lambda o: LambdaLR(o, lambda t: 0.5**t), lambda t: 0.5**t),
    "cosine": (lambda o: CosineAnnealingLR(o, T_max=5), lambda t: (1 + math.cos(math.pi * t / 5)) / 2),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_scales_the_fixed_step(name):
    make, factor = SCHEDULERS[name]
    module = mixed()
    optimizer = optimizer_of(module, lr=0.2)
    scheduler = make(optimizer)
    for t in range(4):
        assert moved_by(module, optimizer) == pytest.approx(0.2 * factor(t), rel=1e-5)
        assert optimizer.last.lr == pytest.approx(0.2 * factor(t))
        scheduler.step()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_multiplies_the_rules_step(name):
    make, factor = SCHEDULERS[name]
    module = mixed()
    optimizer = optimizer_of(module, step_rule=FixedRule([0.1, 0.3, 0.2, 0.1]))
    scheduler = make(optimizer)
    for t, size in enumerate([0.1, 0.3, 0.2, 0.1]):
        assert moved_by(module, optimizer) == pytest.approx(size * factor(t), rel=1e-5)
        assert optimizer.last.lr == pytest.approx(size * factor(t))
        assert optimizer.last.smoothing == pytest.approx(1e-3 * (t + 1))
        scheduler.step()
        assert scheduler.get_last_lr()[0] == pytest.approx(1e-3 * 50 * factor(t + 1)), "the schedule's own lr is left alone"


def test_a_rule_writes_lr_and_smoothing_into_every_group():
    module = mixed()
    rule = FixedRule([0.1, 0.3])
    optimizer = optimizer_of(module, step_rule=rule)
    for t in range(2):
        assert moved_by(module, optimizer) == pytest.approx(rule.sizes[t], rel=1e-5)
        assert {g["lr"] for g in optimizer.param_groups} == {rule.sizes[t]}
        assert {g["smoothing"] for g in optimizer.param_groups} == {1e-3 * (t + 1)}
    assert [r.step for r in rule.reports] == [0, 1]


def test_a_rules_step_shrinks_with_momentum():
    module = mixed()
    optimizer = optimizer_of(module, step_rule=FixedRule([0.1]), momentum=0.9)
    assert moved_by(module, optimizer) == pytest.approx(0.1 * math.sqrt(0.1 / 1.9), rel=1e-5)


# ---- construction ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "params",
    [
        lambda m: m.parameters(),
        lambda m: list(m.parameters()),
        lambda m: m.named_parameters(),
        lambda m: [{"params": m.parameters()}],
        lambda m: ({"params": p} for p in m.parameters()),
        lambda m: [
            {"params": m.emb.parameters(), "lr": 0.1},
            {"params": [p for n, p in m.named_parameters() if "emb" not in n]},
        ],
    ],
    ids=["generator", "list", "named", "group", "groups of one", "groups with options"],
)
def test_every_usual_form_of_params(params):
    module = mixed()
    optimizer = ZerothOrder(params(module), lr=0.05).attach(module)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(module.parameters()))
    names = [n for group in optimizer.param_groups for n in group["param_names"]]
    assert len(set(names)) == len(names)
    before = bits(module)
    train(module, optimizer, 1)
    assert all(not torch.equal(b, before[n]) for n, b in bits(module).items())


def test_groups_keep_their_options():
    module = mixed()
    named = dict(module.named_parameters())
    optimizer = ZerothOrder(
        [
            {
                "params": [("head.weight", named["head.weight"]), ("head.bias", named["head.bias"])],
                "lr": 0.5,
                "weight_decay": 0.1,
            },
            {"params": [("emb.weight", named["emb.weight"])], "geometry": "row", "radius": 0.3},
        ],
        lr=0.01,
        geometry={"head.*": {"radius": 0.25}},
    )
    found = {
        n: (g["geometry"], g["radius"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups for n in g["param_names"]
    }
    assert found == {
        "head.weight": ("spectral", 0.25, 0.5, 0.1),
        "head.bias": ("sign", 0.25, 0.5, 0.1),
        "emb.weight": ("row", 0.3, 0.01, 0.0),
    }


def test_a_wholly_frozen_group_is_left_out():
    module = mixed()
    module.emb.requires_grad_(False)
    optimizer = ZerothOrder([{"params": module.emb.parameters()}, {"params": module.head.parameters()}])
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, r"lr must be a finite number >= 0, got -1.0"),
        ({"lr": float("nan")}, r"lr must be a finite number >= 0, got nan"),
        ({"smoothing": 0.0}, r"smoothing must be a finite number > 0, got 0.0"),
        ({"smoothing": float("inf")}, r"smoothing must be a finite number > 0, got inf"),
        ({"num_directions": 0}, r"num_directions must be at least 1, got 0"),
        ({"sides": 3}, r"sides must be 1 or 2, got 3"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, r"weight_decay must be >= 0, got -0.1"),
        ({"max_nonfinite": 0}, r"max_nonfinite must be at least 1, got 0"),
        ({"directions": "gausian"}, r"directions must be one of block, gaussian, .*, got 'gausian'"),
        ({"update": "adam"}, r"update must be one of adamm, lmo, .*, got 'adam'"),
        ({"rank": 0}, r"rank must be at least 1"),
        ({"geometry": {"matrix": "spektral"}}, r"geometry\['matrix'\]: geometry must be one of"),
        ({"geometry": {"nothing.*": "sign"}}, r"the pattern 'nothing.\*' matches no trainable parameter"),
        ({"geometry": {"matrix": "sign"}, "rank": 2}, r"geometry 'sign' of 'emb.weight' with low_rank\(rank=2"),
    ],
)
def test_errors_name_the_argument(settings, message):
    with pytest.raises(ValueError, match=message):
        optimizer_of(mixed(), **settings)


def test_empty_parameter_lists():
    with pytest.raises(ValueError, match="empty parameter list"):
        ZerothOrder([])


def test_groups_are_checked_at_once_not_at_the_first_step():
    named = list(mixed().named_parameters())
    with pytest.raises(ValueError, match="geometry must be one of"):
        ZerothOrder([{"params": named, "geometry": "spektral"}])
    with pytest.raises(ValueError, match=r"geometry 'sign' of 'emb.weight' with low_rank\(rank=2"):
        ZerothOrder([{"params": named, "geometry": "sign"}], rank=2)
    with pytest.raises(ValueError, match="two parameters have the name 'a'"):
        ZerothOrder([("a", named[0][1]), ("a", named[1][1])])


def test_a_group_added_later_is_probed_too():
    module = mixed()
    named = list(module.named_parameters())
    optimizer = ZerothOrder(named[:2], lr=0.0, smoothing=1e-4, directions="gaussian", update="sgd", seed=0)
    optimizer.attach(module)
    train(module, optimizer, 1)
    with pytest.raises(ValueError, match="a parameter group needs a geometry, one of column"):
        optimizer.add_param_group({"params": named[2:]})
    optimizer.add_param_group({"params": named[2:], "geometry": "sign"})
    train(module, optimizer, 1)
    other = mixed()
    whole = optimizer_of(other, lr=0.0, smoothing=1e-4, directions="gaussian", update="sgd")
    train(other, whole, 2)
    assert optimizer.last.slopes == pytest.approx(whole.last.slopes, rel=1e-9)


def test_closure_errors():
    module = mixed()
    optimizer = optimizer_of(module)
    with pytest.raises(TypeError, match="needs a closure that evaluates the loss"):
        optimizer.step()
    with pytest.raises(TypeError, match="the closure must return the loss as a tensor, got float"):
        optimizer.step(lambda: 1.0)
    with pytest.raises(TypeError, match="got NoneType"):
        optimizer.step(lambda: None)


def test_directions_depend_on_names_not_on_order_or_grouping():
    a, b = mixed(), mixed()
    first = ZerothOrder(list(a.named_parameters()), smoothing=1e-3, directions="gaussian", lr=0.1, seed=3).attach(a)
    second = ZerothOrder(list(b.named_parameters())[::-1], smoothing=1e-3, directions="gaussian", lr=0.1, seed=3).attach(b)
    train(a, first, 2)
    train(b, second, 2)
    assert same_bits(bits(a), bits(b))
    c = mixed()
    train(c, optimizer_of(c, smoothing=1e-3, directions="gaussian", lr=0.1, seed=1), 2)
    assert not same_bits(bits(a), bits(c))


def test_without_a_seed_the_global_one_decides_and_is_kept():
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        module = mixed()
        optimizer = optimizer_of(module, seed=None)
        assert {group["seed"] for group in optimizer.param_groups} == {seed}
        train(module, optimizer, 1)
        torch.manual_seed(99)  # from here on it plays no part
        train(module, optimizer, 1)
        runs.append((module, optimizer))
    assert same_bits(bits(runs[0][0]), bits(runs[1][0]))
    assert not same_bits(bits(runs[0][0]), bits(runs[2][0]))
    resumed = optimizer_of(runs[0][0], seed=None)
    resumed.load_state_dict(runs[2][1].state_dict())
    assert {group["seed"] for group in resumed.param_groups} == {2}, "a checkpoint's seed goes on"


# ---- half precision ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@attached
def test_half_precision_updates_are_rounded_stochastically(dtype, attach):
    module = mixed(dtype)
    start = {n: p.detach().float().clone() for n, p in module.named_parameters()}
    optimizer = optimizer_of(module, attach, directions="rademacher", lr=1e-3, seed=9)
    train(module, optimizer, 1)
    sign = math.copysign(1, optimizer.last.slopes[0])
    for name, parameter in module.named_parameters():
        z = optimizer.directions.draw(Address(9, 0, name), parameter.shape, CPU)
        exact = start[name] - 1e-3 * sign * z
        source = generator(9, 0, name, "rounding")
        assert torch.equal(parameter.detach(), round_stochastically(exact, dtype, source)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_far_below_the_resolution_still_move_the_mean(dtype):
    """Nearest rounding would never move a weight of 1 by a hundredth of its resolution."""
    eps = torch.finfo(dtype).eps
    module = nn.Linear(1, 400, bias=False).to(dtype)
    with torch.no_grad():
        module.weight.fill_(1)
    optimizer = ZerothOrder(
        [{"params": list(module.named_parameters()), "geometry": "sign"}],
        lr=eps / 100,
        smoothing=0.05,
        directions="rademacher",
        seed=0,
    ).attach(module)
    x = torch.ones(1, 1, dtype=dtype)
    moved = 0.0
    for step in range(100):
        before = module.weight.detach().double().mean()
        optimizer.step(lambda: module(x).float().sum())
        sign = math.copysign(1, optimizer.last.slopes[0])
        z = optimizer.directions.draw(Address(0, step, "weight"), module.weight.shape, CPU)
        moved += float(-(eps / 100) * sign * z.mean())
        assert abs(module.weight.detach().double().mean() - before) < eps
    assert float(module.weight.detach().double().mean()) - 1 == pytest.approx(moved, abs=4 * eps * math.sqrt(100 * 0.01 / 400))
    assert moved < -eps / 100


def test_half_precision_descends():
    for dtype in (torch.bfloat16, torch.float16):
        module = mixed(dtype)
        optimizer = optimizer_of(module, lr=0.1, smoothing=0.1)
        losses = train(module, optimizer, 60)
        assert np.mean(losses[-5:]) < 0.8 * losses[0]


# ---- autocast ----------------------------------------------------------------------------------------------------------
def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@attached
@pytest.mark.parametrize("directions", ["gaussian", "low_rank"])
def test_under_autocast_forwards_see_displaced_weights(attach, directions):
    """No stale cast copy: each evaluation is that of a copy whose weights are displaced."""
    module = mixed(torch.float32)
    seen = []

    def closure():
        seen.append(mean(module))
        return seen[-1]

    optimizer = optimizer_of(module, attach, lr=0.3, smoothing=1.0, directions=directions)
    with autocast():
        for step in range(3):
            start = mixed(torch.float32)
            start.load_state_dict(module.state_dict())
            with torch.enable_grad():  # a forward with gradients fills the cache of casts
                mean(module)
            seen.clear()
            optimizer.step(closure)
            u = {}
            for group in optimizer.param_groups:
                names = group["param_names"]
                with torch.autocast("cpu", enabled=False):
                    shapes = [p.shape for p in group["params"]]
                    z = [optimizer.directions.draw(Address(0, step, n), s, CPU) for n, s in zip(names, shapes, strict=True)]
                    z = [dense(x, s) for x, s in zip(z, shapes, strict=True)]
                u.update(zip(names, reference.extreme(group["geometry"], z, group["radius"], group["transposed"]), strict=True))
            for loss, tau in zip(seen[-2:], (1.0, -1.0), strict=True):
                weights = {n: p.detach() + (tau * torch.from_numpy(u[n])).float() for n, p in start.named_parameters()}
                with torch.autocast("cpu", enabled=False):  # bfloat16's own error is some 5e-4 here, and 3e-3 at most
                    assert float(loss) == pytest.approx(float(loss_at(start, weights, mean)), abs=4e-3)
            assert max(abs(float(loss - mean(start).detach())) for loss in seen[-2:]) > 0.01, "the test would see a stale cast"


@attached
@pytest.mark.parametrize("settings", [{"directions": "low_rank", "rank": 2}, {"directions": "gaussian"}, {"num_directions": 3}])
def test_a_step_inside_of_autocast_computes_as_outside(attach, settings):
    """Lightning's ``training_step`` runs inside of autocast: products such as U Vᵀ and the polar factor must not be rounded."""
    inside, outside = mixed(torch.float32), mixed(torch.float32)
    a, b = (optimizer_of(m, attach, momentum=0.5, **settings) for m in (inside, outside))

    def with_autocast(module):
        with autocast():
            return mean(module)

    for _ in range(3):
        with autocast():
            a.step(lambda: mean(inside))
        b.step(lambda: with_autocast(outside))
    assert a.last.slopes == b.last.slopes
    assert same_bits(bits(inside), bits(outside))
    assert not torch.is_autocast_enabled("cpu")


# ---- cost --------------------------------------------------------------------------------------------------------------
class Syncs(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default or func is torch.ops.aten.is_nonzero.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


def synchronisations(depth: int, monkeypatch, **settings) -> int:
    """Transfers of a value to the host in one step, however they are written."""
    module = nn.Sequential(*[nn.Linear(4, 4) for _ in range(depth)])
    optimizer = optimizer_of(module, **settings)
    x = inputs(3, 4, dtype=torch.float32)
    optimizer.step(lambda: module(x).square().mean())
    python = 0
    with monkeypatch.context() as patch:
        original = torch.Tensor.tolist

        def tolist(tensor):
            nonlocal python
            python += 1
            return original(tensor)

        patch.setattr(torch.Tensor, "tolist", tolist)
        with Syncs() as syncs:
            optimizer.step(lambda: module(x).square().mean())
    return python + syncs.count


@pytest.mark.parametrize("directions", reference.BASIC)
@pytest.mark.parametrize(
    "settings",
    [{}, {"momentum": 0.9, "num_directions": 3}, {"sides": 1}, {"geometry": {"matrix": "euclidean"}}, {"update": "sgd"}],
    ids=["plain", "momentum", "one-sided", "coupled", "sgd"],
)
def test_one_host_synchronisation_per_step(directions, settings, monkeypatch):
    assert synchronisations(2, monkeypatch, directions=directions, **settings) == 1
    assert synchronisations(8, monkeypatch, directions=directions, **settings) == 1


def test_no_warning_in_an_ordinary_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = mixed(torch.float32)
        train(module, optimizer_of(module, directions=LowRank(2, 5), step_rule=ParameterFree(10)), 10)


def test_state_is_empty_without_momentum_and_one_buffer_with_it():
    module = mixed()
    plain = optimizer_of(module, num_directions=3, directions="gaussian")
    train(module, plain, 1)
    assert not plain.state
    heavy = optimizer_of(module, momentum=0.9, directions="gaussian")
    train(module, heavy, 2)
    for parameter, state in heavy.state.items():
        assert set(state) == {"momentum_buffer"}
        assert state["momentum_buffer"].shape == parameter.shape
        assert state["momentum_buffer"].dtype is torch.float32


def test_tied_weights_are_updated_once():
    case = CASES["tied_head"]
    module = case.module()
    start = module.emb.weight.detach().clone()
    optimizer = ZerothOrder(module.named_parameters(), lr=0.05, directions="rademacher").attach(module)
    optimizer.step(lambda: case.loss(module))
    assert module.head.weight is module.emb.weight
    delta = (module.emb.weight.detach() - start).abs()
    torch.testing.assert_close(delta, torch.full_like(delta, 0.05), rtol=1e-5, atol=0)


def test_mixed_has_every_kind_of_parameter():
    assert {p.dim() for p in Mixed().parameters()} == {1, 2, 3}
