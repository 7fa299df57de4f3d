"""Steps whose directions the Triton kernels draw in registers, against the same steps that read them from memory.

Triton's interpreter runs in one process of its own (see test_kernels.py), which leaves what it measured to the tests.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.optim.zoo import CASES, IDS, Case
from zo_lightning.optim import Address, ZerothOrder, dense_path, kernels
from zo_lightning.optim.directions import base as directions

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
STEPS = 2
LR, DECAY, SEED = 0.01, 0.5, 7
SETTINGS: dict[str, dict[str, Any]] = {
    "sgd gaussian": {"update": "sgd", "directions": "gaussian"},
    "sgd rademacher": {"update": "sgd", "directions": "rademacher"},
    "lmo rademacher sign": {"update": "lmo", "directions": "rademacher"},
    "lmo gaussian sign": {"update": "lmo", "directions": "gaussian"},  # whose sign is not a multiple of z
}
DTYPES = [torch.float32, torch.bfloat16]
PROBES = ["sequential", "stacked"]


class Stackable(nn.Module):
    """What dense directions can stack, which is not a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.head(torch.tanh(self.body(self.norm(self.emb(ids)))).mean(1))
        return F.cross_entropy(logits.float(), ids[:, 0] % 3, reduction="none")


MODELS = {"sequential": CASES["mixed"], "stacked": Case(Stackable, tokens=True)}
every_run = pytest.mark.parametrize(("name", "dtype", "probes"), list(product(SETTINGS, DTYPES, PROBES)))


def run(path: str) -> None:
    """Take the steps; Triton's interpreter is on."""
    directions._BLOCK_CPU = 12  # entries: matrices have several blocks, of which the last may have fewer rows
    torch.set_num_threads(1)
    fill = kernels.fill
    # the interpreter takes its time, and a direction in memory is the same in all runs of a family
    filled = cache(lambda n, seed, kind: fill(torch.empty(n), seed, kind))
    kernels.fill = lambda out, seed, kind: out.copy_(filled(out.numel(), seed, kind).view(out.shape))
    runs = {key: pair(*key) for key in product(SETTINGS, DTYPES, PROBES)}
    torch.save({"runs": runs, "scalar": attempt(scalar)}, path)


def pair(name: str, dtype: torch.dtype, probes: str) -> list[list[dict[str, Any]]]:
    """For each step what came out with the kernels, and without them from the same weights."""
    modules = [MODELS[probes].module(dtype) for _ in range(2)]
    optimizers = [
        ZerothOrder(m.named_parameters(), lr=LR, smoothing=0.25, weight_decay=DECAY, seed=SEED, **SETTINGS[name]).attach(m)
        for m in modules
    ]
    steps = []
    for optimizer in optimizers:  # no comparison of losses: what bfloat16 resolves of them is little
        optimizer.param_groups[0]["stacking"] = "trusted" if probes == "stacked" else "off"
    for _ in range(STEPS):
        modules[1].load_state_dict(modules[0].state_dict())
        steps.append([step(*both, probes, memory) for *both, memory in zip(modules, optimizers, (False, True), strict=True)])
    return steps


def step(module: nn.Module, optimizer: ZerothOrder, probes: str, memory: bool) -> dict[str, Any]:
    """One step; with ``memory`` no direction counts as one that can be drawn in registers."""
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    z = {
        n: optimizer.directions.draw(Address(SEED, optimizer.step_index, n), p.shape, CPU) for n, p in module.named_parameters()
    }
    calls: Counter[str] = Counter()
    patch = pytest.MonkeyPatch()
    for kernel in ("displace", "update_"):
        original = getattr(kernels, kernel)
        patch.setattr(kernels, kernel, lambda *a, k=kernel, f=original: (calls.update([k]), f(*a))[1])
    if memory:
        in_memory = property(lambda self: False, lambda self, value: None)
        patch.setattr(dense_path._Direction, "in_registers", in_memory, raising=False)
    forwards = []
    hook = module.register_forward_pre_hook(lambda *_: forwards.append(1))
    stacked = (lambda copies: module(IDS.repeat(copies, 1))) if probes == "stacked" else None
    loss = optimizer.step(lambda: module(IDS), stacked=stacked)
    hook.remove()
    patch.undo()
    return {
        "loss": float(loss),
        "slope": optimizer.last.slopes[0],
        "forwards": len(forwards),
        "before": before,
        "z": z,
        "after": {n: p.detach().clone() for n, p in module.named_parameters()},
        "calls": dict(calls),
    }


def scalar() -> float:
    """A parameter without a dimension."""
    module = CASES["root_parameter"].module(torch.float32)
    optimizer = ZerothOrder(module.named_parameters(), directions="gaussian", update="sgd", seed=0).attach(module)
    return float(optimizer.step(lambda: CASES["root_parameter"].loss(module)))


def attempt(action: Any) -> Any:
    try:
        return action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def taken(tmp_path_factory) -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    path = tmp_path_factory.mktemp("steps") / "taken"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    program = f"from tests.optim.test_kernels_in_steps import run; run({str(path)!r})"
    command = [sys.executable, "-W", "error::UserWarning", "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=clean | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(path, weights_only=True)


def spacing(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance to the next number of ``dtype``, away from zero."""
    return torch.finfo(dtype).eps * 2.0 ** x.abs().clamp_min(torch.finfo(dtype).tiny).log2().floor()


@every_run
def test_losses_are_those_of_directions_in_memory(taken, name, dtype, probes):
    exact = dtype is torch.float32
    for number, (registers, memory) in enumerate(taken["runs"][name, dtype, probes]):
        # Triton 3.9's interpreter truncates to bfloat16 where torch rounds to nearest
        assert registers["loss"] == pytest.approx(memory["loss"], rel=1e-6 if exact else 5e-3)
        assert registers["slope"] == pytest.approx(memory["slope"], abs=1e-5 if exact else 0.01)
        assert abs(registers["slope"]) > 1e-3
        assert registers["forwards"] == memory["forwards"] == (number == 0) + (1 if probes == "stacked" else 2)


@every_run
def test_weights_are_those_of_directions_in_memory(taken, name, dtype, probes):
    for both in taken["runs"][name, dtype, probes]:
        registers, memory = both
        assert any(not torch.equal(registers["after"][n], before) for n, before in registers["before"].items())
        for n, before in registers["before"].items():
            assert torch.equal(before, memory["before"][n])
            assert torch.equal(registers["z"][n], memory["z"][n])
            if dtype is torch.float32:
                torch.testing.assert_close(registers["after"][n], memory["after"][n], rtol=0, atol=1e-6)
                continue
            exact = [updated(one, n, name) for one in both]
            gap = (registers["after"][n].double() - memory["after"][n].double()).abs()
            step = torch.maximum(*(spacing(x, dtype) for x in exact))
            assert (gap <= step + (exact[0] - exact[1]).abs()).all()


@every_run
def test_weights_are_the_formula(taken, name, dtype, probes):
    """``(1 - γλ) W - γ φ u`` in float64, with φ the slope or its sign, rounded to one of its neighbours."""
    for both in taken["runs"][name, dtype, probes]:
        for one in both:
            for n, after in one["after"].items():
                exact = updated(one, n, name)
                error = (after.double() - exact).abs()
                assert (error <= (1e-6 if dtype is torch.float32 else spacing(exact, dtype) + 1e-6)).all(), n


def updated(one: dict[str, Any], n: str, name: str) -> torch.Tensor:
    z, slope = one["z"][n].double(), torch.tensor(one["slope"], dtype=torch.float64)
    move = slope * z if name.startswith("sgd") else slope.sign() * z.sign()
    return (1 - LR * DECAY) * one["before"][n].double() - LR * move


@every_run
def test_directions_are_in_registers_where_they_can_be(taken, name, dtype, probes):
    """Blocks of the models: embeddings 2, the kernel 4, matrices 1, or 2 and 2; and each of 4, or 3, vectors 1."""
    written, formed = (9, 4) if probes == "stacked" else (11, 5)  # of embeddings only what is looked up is formed
    for registers, memory in taken["runs"][name, dtype, probes]:
        assert memory["calls"] == {}
        assert registers["calls"] == ({} if name == "lmo gaussian sign" else {"update_": written, "displace": 2 * formed})


def test_parameters_without_a_dimension_take_steps_too(taken):
    assert isinstance(taken["scalar"], float), taken["scalar"]
