"""Compiled modules: the same losses at the probes as uncompiled ones, and no compilation from step to step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.optim.reference import bits, raw, same_bits
from tests.optim.zoo import IDS, Case, inputs
from zo_lightning.optim import ZerothOrder

STEPS, SETTLED = 7, 3  # two intervals and one step; graphs are made in the first steps alone


class Layers(nn.Module):
    """What directions are applied to without being formed: an embedding that is the head, a norm, a matrix with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.norm, self.body = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.emb.weight

    def hidden(self, ids: Tensor) -> Tensor:
        h = self.norm(self.emb(ids))
        return h + torch.tanh(self.body(h))

    def forward(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.hidden(ids)).transpose(1, 2), ids.flip(1), reduction="none").mean(1)


class Elementwise(Layers):
    """With a scalar and a vector that the forward itself multiplies and adds."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(4))

    def hidden(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.body(self.norm(self.emb(ids)))) * self.scale + self.shift


MODELS = {"layers": Case(Layers, tokens=True), "elementwise": Case(Elementwise, tokens=True)}


def whole(module: nn.Module, backend: str) -> nn.Module:
    """A wrapper around the module."""
    return torch.compile(module, backend=backend)


def in_place(module: nn.Module, backend: str) -> nn.Module:
    """The module itself."""
    module.compile(backend=backend)
    return module


COMPILED = {"torch.compile": whole, "module.compile": in_place}


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    """Nothing is compiled before a test or left after it."""
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    yield
    dynamo.reset()
    dynamo.utils.counters.clear()


def graphs() -> int:
    """How many have been compiled so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@dataclass
class Run:
    """What was seen at each step: the mean loss at the probes, the slope, the loss after it, whether weights were written."""

    losses: list[float] = field(default_factory=list)
    slopes: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    written: list[bool] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)
    stacking: str = ""
    weights: dict[str, Tensor] = field(default_factory=dict)


def train(module: nn.Module, forward: nn.Module, attached: nn.Module, stack: bool, **settings) -> Run:
    """Steps whose closures call ``forward``."""
    settings = {"lr": 0.05, "smoothing": 0.02, "interval": 3, "seed": 0, **settings}
    optimizer = ZerothOrder(module.named_parameters(), **settings).attach(attached)

    def stacked(copies: int) -> Tensor:
        return forward(IDS.repeat(copies, 1))

    run = Run()
    for _ in range(STEPS):
        before = {name: raw(p) for name, p in module.named_parameters()}
        run.losses.append(float(optimizer.step(lambda: forward(IDS), stacked=stacked if stack else None)))
        run.written.append(not same_bits({name: raw(p) for name, p in module.named_parameters()}, before))
        run.slopes.append(optimizer.last.slopes[0])
        with torch.no_grad():
            run.after.append(float(forward(IDS).mean()))
        run.graphs.append(graphs())
    run.stacking = optimizer.param_groups[0]["stacking"]
    run.weights = module.state_dict()
    return run


def compare(compiled: Run, plain: Run) -> None:
    for name in ("losses", "slopes", "after"):
        assert getattr(compiled, name) == pytest.approx(getattr(plain, name), rel=1e-9), name
    for name, weight in plain.weights.items():
        torch.testing.assert_close(compiled.weights[name], weight, rtol=1e-9, atol=1e-10)
    assert compiled.stacking == plain.stacking
    assert min(map(abs, compiled.slopes)) > 1e-3
    assert len(set(compiled.after)) == len(compiled.after)
    assert compiled.graphs[-1] == compiled.graphs[SETTLED - 1] > 0


@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize(("backend", "rank"), [("eager", 1), ("aot_eager", 2)])
@pytest.mark.parametrize(
    ("model", "probes"),
    list(product(MODELS, ["sequential", "stacked"])),
)
def test_low_rank_steps_are_those_of_the_uncompiled_module(how, backend, rank, model, probes):
    case, stack = MODELS[model], probes == "stacked"
    module, plain = case.module(), case.module()
    expected = train(plain, plain, plain, stack, rank=rank)
    forward = COMPILED[how](module, backend)
    run = train(module, forward, forward, stack, rank=rank)
    compare(run, expected)
    assert run.stacking == ("trusted" if stack else "untried")
    assert run.written == [True] * STEPS, "a graph does not see what wraps its module's forward, so no update waits"
    assert expected.written == [step % 3 == 2 for step in range(STEPS)]


@pytest.mark.parametrize(
    ("how", "directions", "probes"),
    [("torch.compile", "gaussian", "sequential"), ("module.compile", "rademacher", "stacked")],
)
def test_dense_steps_are_those_of_the_uncompiled_module(how, directions, probes):
    case, stack = MODELS["elementwise"], probes == "stacked"
    module, plain = case.module(), case.module()
    expected = train(plain, plain, plain, stack, directions=directions)
    forward = COMPILED[how](module, "eager")
    run = train(module, forward, forward, stack, directions=directions)
    compare(run, expected)
    assert run.written == expected.written == [True] * STEPS


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin:UserWarning")
def test_a_wrapper_made_beside_the_attached_module_shows_the_pending_update():
    """Its optimizer does not know of it, and lets the update wait."""
    module, plain = (MODELS["layers"].module() for _ in range(2))
    expected = train(plain, plain, plain, stack=False)
    run = train(module, torch.compile(module, backend="eager"), module, stack=False)
    assert run.losses == pytest.approx(expected.losses, rel=1e-9)
    assert run.after == pytest.approx(expected.after, rel=1e-9)
    assert run.written == expected.written
    assert run.graphs[-1] == run.graphs[3], "after the first step of the second interval"


def test_a_compiled_part_of_a_module():
    """Only the inner module is compiled; the state dictionary holds what the next forward sees."""
    seen = {}
    for compiled in (False, True):
        module = MODELS["layers"].module()
        if compiled:
            module.body.compile(backend="eager")
        optimizer = ZerothOrder(module.named_parameters(), lr=0.05, smoothing=0.02, interval=3, seed=0).attach(module)
        seen[compiled] = [float(optimizer.step(lambda module=module: module(IDS))) for _ in range(4)]
        assert same_bits({n: raw(p) for n, p in module.named_parameters(remove_duplicate=False)}, bits(module)) == compiled
    assert seen[True] == pytest.approx(seen[False], rel=1e-9)
    assert graphs() > 0


def has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler, which torch.compile's default backend needs on a CPU")
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")  # torch's own use of it
def test_the_default_backend(monkeypatch):
    import torch._inductor.config as config

    monkeypatch.setattr(config, "compile_threads", 1)  # no pool of processes for one small graph

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))

    seen = {}
    for compiled in (False, True):
        module = Case(build).module(torch.float32)
        forward = torch.compile(module) if compiled else module
        optimizer = ZerothOrder(module.named_parameters(), lr=0.05, smoothing=0.02, interval=3, seed=0).attach(forward)
        x, seen[compiled] = inputs(3, 4, dtype=torch.float32), []
        for _ in range(4):
            loss = optimizer.step(lambda forward=forward, x=x: forward(x).square().mean(1))
            seen[compiled].append((float(loss), optimizer.last.slopes[0]))
            assert graphs() == compiled, "the first one serves for all"
    for one, other in zip(seen[True], seen[False], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)
        assert abs(one[1]) > 0.01
