"""Units of length: a unit step changes a module's output by the output's own size."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.optim import reference
from tests.optim.reference import bits, dense, same_bits
from tests.optim.zoo import CASES, IDS
from zo_lightning.optim import Address, Displacement, LowRank, ZerothOrder, make_directions, make_geometry
from zo_lightning.optim.scaling import Activity, entry_target, unit_entry

CPU = torch.device("cpu")


class Conv1D(nn.Module):
    """As in transformers: weight (in, out)."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n, m)), nn.Parameter(torch.zeros(m))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def rms(x: torch.Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


def activities(module: nn.Module, *args: torch.Tensor) -> dict[nn.Parameter, Activity]:
    moved = Displacement(dict(module.named_parameters()), module)
    with torch.no_grad():
        moved.observe(lambda: module(*args))
    return moved.activity


# ---- how large a change may be -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(300, 400), torch.randn(50, 300) * 7 + 1),
        (nn.Linear(300, 400, bias=False), torch.randn(2, 25, 300) * 1e-3),
        (Conv1D(300, 400), torch.randn(50, 300) * 0.1),
        (nn.Embedding(400, 300), torch.arange(400)),
        (nn.Conv2d(40, 30, 3), torch.randn(2, 40, 9, 9)),
    ],
    ids=["linear", "linear, small inputs", "Conv1D", "embedding", "conv2d"],
)
def test_a_change_of_the_target_size_changes_the_output_by_its_size(module, x):
    seen = activities(module, x)
    at_rest = module(x)
    for parameter in module.parameters():
        change = torch.randn(parameter.shape) * entry_target(parameter, seen[parameter])
        with torch.no_grad():
            parameter.add_(change)
            relative = rms(module(x) - at_rest) / rms(at_rest)
            parameter.sub_(change)
        assert relative == pytest.approx(1.0, rel=0.15)


def test_targets_by_hand():
    module = nn.Linear(16, 3)
    x = torch.randn(5, 16)
    seen, y = activities(module, x), module(x)
    assert entry_target(module.weight, seen[module.weight]) == pytest.approx(rms(y) / (4 * rms(x)), rel=1e-5)
    assert entry_target(module.bias, seen[module.bias]) == pytest.approx(rms(y), rel=1e-5)


def test_where_there_is_nothing_to_go_by():
    module = nn.Linear(4, 4)
    assert entry_target(module.weight, None) == pytest.approx(rms(module.weight), rel=1e-6)
    nn.init.zeros_(module.bias)
    assert entry_target(module.bias, None) == 1.0
    # a module whose output is zero, as a fresh LoRA factor: measured by its input
    fresh = nn.Linear(4, 6, bias=False)
    nn.init.zeros_(fresh.weight)
    x = torch.randn(9, 4) * 3
    assert entry_target(fresh.weight, activities(fresh, x)[fresh.weight]) == pytest.approx(1 / 2, rel=1e-5)
    # neither in nor out
    nothing = Activity(fresh, torch.tensor(0.0), torch.tensor(float("nan")))
    assert entry_target(fresh.weight, nothing) == 1.0


@pytest.mark.parametrize(
    ("args", "output", "expected"),
    [
        ((torch.full((2, 3), 2.0),), torch.full((2,), -3.0), (2.0, 3.0)),
        ((torch.full((2, 3), 2.0),), (torch.full((2,), 5.0), None), (2.0, 5.0)),
        ((torch.tensor([1, 2]),), torch.full((2,), 5.0), (None, 5.0)),
        ((), [[torch.full((2,), 4.0)]], (None, 4.0)),
        ((None,), None, (None, None)),
        ((torch.zeros(3),), torch.tensor([float("inf")]), (None, None)),
        ((torch.full((2,), 3.0, dtype=torch.float16),), (), (3.0, None)),
    ],
)
def test_activity_reads_the_usual_signatures(args, output, expected):
    activity = Activity(nn.Linear(1, 1))
    activity.record(args, output)
    assert activity.read() == expected


def test_only_the_first_call_counts():
    activity = Activity(nn.Linear(1, 1))
    for size in (2.0, 9.0):
        activity.record((torch.tensor([size]),), torch.tensor([size + 1]))
    assert activity.read() == (2.0, 3.0)


# ---- how large the entries of a unit direction are ---------------------------------------------------------------------
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("geometry", ["euclidean", "sign", "spectral", "row", "column"])
@pytest.mark.parametrize("directions", [*(d for d in reference.BASIC if d != "low_rank"), LowRank(1, 5), LowRank(4, 5)])
def test_unit_entry_is_what_unit_directions_have(directions, geometry, transposed):
    directions, made = make_directions(directions), make_geometry(geometry, 1.0, transposed)
    shapes = [torch.Size(s) for s in [(40, 60), (50,), (60, 40), (12, 3, 2, 2)]]
    if made.accepts(directions, shapes[0]) is not None:
        return
    squares = np.zeros(len(shapes))
    for step in range(8):
        z = [dense(directions.draw(Address(0, 5 * step, str(i)), s, CPU), s) for i, s in enumerate(shapes)]
        u = reference.extreme(geometry, z, 1.0, transposed)
        squares += [np.mean(x**2) / 8 for x in u]
    for shape, square in zip(shapes, squares, strict=True):
        assert unit_entry(made, directions, shape, shapes) == pytest.approx(math.sqrt(square), rel=0.1)


# ---- in the optimizer --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("directions", reference.BASIC)
@pytest.mark.parametrize("settings", [{}, {"num_directions": 2, "momentum": 0.9}, {"update": "sgd"}])
def test_probes_and_steps_are_measured_in_the_units(directions, settings):
    case = CASES["mixed"]
    module, scaled = case.module(), case.module()
    common = {"lr": 0.05, "smoothing": 1e-5, "directions": directions, "seed": 0, **settings}
    plain = ZerothOrder(module.named_parameters(), **common).attach(module)
    optimizer = ZerothOrder(scaled.named_parameters(), scaling="output", **common).attach(scaled)
    start = {n: p.detach().clone() for n, p in module.named_parameters()}
    optimizer.step(lambda: scaled(IDS))
    units = {n: unit for g in optimizer.param_groups for n, unit in zip(g["param_names"], g["units"], strict=True)}
    assert units.keys() == start.keys()
    assert all(unit > 0 and math.isfinite(unit) for unit in units.values())
    assert len({round(unit, 6) for unit in units.values()}) > 1

    # the same problem in the variables y = x / unit, with units of one
    class InUnits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.y = nn.ParameterDict({n.replace(".", "_"): nn.Parameter(p / units[n]) for n, p in start.items()})

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            weights = {n: self.y[n.replace(".", "_")] * units[n] for n in start}
            return torch.func.functional_call(module, weights, (ids,))

    other = InUnits()
    groups = [
        {
            "params": [(n, other.y[n.replace(".", "_")]) for n in g["param_names"]],
            **{key: g[key] for key in ("geometry", "radius", "transposed")},
        }
        for g in plain.param_groups
    ]
    twin = ZerothOrder(groups, **common)
    twin.step(lambda: other(IDS))
    assert twin.last.slopes == pytest.approx(optimizer.last.slopes, rel=1e-4)
    for n, weight in scaled.state_dict().items():
        moved = other.y[n.replace(".", "_")].detach() * units[n]
        assert not torch.equal(weight, start[n])
        torch.testing.assert_close(weight, moved, rtol=0, atol=1e-5 * units[n])


def test_units_are_measured_once_and_resumed():
    case = CASES["mixed"]

    def start(module):
        settings = {"lr": 0.1, "smoothing": 0.01, "scaling": "output", "momentum": 0.5, "seed": 0}
        return ZerothOrder(module.named_parameters(), **settings).attach(module)

    module = case.module(torch.float32)
    optimizer = start(module)
    for _ in range(3):
        optimizer.step(lambda: module(IDS))
    units = [list(g["units"]) for g in optimizer.param_groups]
    state, weights = copy.deepcopy((optimizer.state_dict(), module.state_dict()))
    optimizer.step(lambda: module(IDS))
    assert [g["units"] for g in optimizer.param_groups] == units
    other = case.module(torch.float32)
    other.load_state_dict(weights)
    resumed = start(other)
    resumed.load_state_dict(state)
    resumed.step(lambda: other(IDS))
    assert [g["units"] for g in resumed.param_groups] == units, "not measured anew at other weights"
    assert same_bits(bits(other), bits(module))


def test_units_are_one_without_scaling():
    module = CASES["mixed"].module()
    optimizer = ZerothOrder(module.named_parameters()).attach(module)
    optimizer.step(lambda: module(IDS))
    assert {unit for g in optimizer.param_groups for unit in g["units"]} == {1.0}


def test_unknown_scaling():
    with pytest.raises(ValueError, match="scaling must be 'output' or 'none', got 'input'"):
        ZerothOrder(nn.Linear(2, 2).parameters(), scaling="input")
