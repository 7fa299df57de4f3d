"""A small model, and a float64 world in which a method's published formula is computed anew."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.optim.zoo import CASES, IDS
from zo_lightning.optim import Address, Directions, Factors, ParameterFree, ZerothOrder

CPU = torch.device("cpu")
SEED = 4

Vec = dict[str, np.ndarray]
"""A direction or an estimate: an array for each parameter."""


@cache
def _mixed(dtype: torch.dtype) -> nn.Module:
    return CASES["mixed"].module(dtype)


def mixed(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Embedding, 3-D kernel, norm, matrix and biases."""
    return copy.deepcopy(_mixed(dtype))


class Stackable(nn.Module):
    """Of the kinds of parameters that several points can be shown of in one forward; a loss for each row of ids."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.norm, self.head = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.head(torch.tanh(self.norm(self.emb(ids))).mean(1)), ids[:, 0] % 3, reduction="none")


def mean(module: nn.Module) -> Tensor:
    return module(IDS).mean()


def optimizer_of(build: Callable[..., ZerothOrder], module: nn.Module, attach: bool = False, **settings: Any) -> ZerothOrder:
    """An optimizer with ``seed``, whose ``rule`` is a number of steps for the parameter-free rule."""
    if (steps := settings.pop("rule", None)) is not None:
        settings["step_rule"] = ParameterFree(steps)
    optimizer = build(module.named_parameters(), **{"seed": SEED, **settings})
    return optimizer.attach(module) if attach else optimizer


def train(module: nn.Module, optimizer: ZerothOrder, steps: int, loss: Callable[[nn.Module], Tensor] = mean) -> None:
    for _ in range(steps):
        optimizer.step(lambda: loss(module))


def watched_step(module: nn.Module, optimizer: ZerothOrder) -> list[float]:
    """Take a step, and return the losses that its closure has returned."""
    losses: list[float] = []

    def closure() -> Tensor:
        loss = mean(module).detach()
        losses.append(float(loss))
        return loss

    optimizer.step(closure)
    return losses


def weights(module: nn.Module) -> Vec:
    return {name: tensor.double().numpy().copy() for name, tensor in module.state_dict().items()}


def accepts(build: Callable[..., ZerothOrder], argument: str) -> bool:
    return argument in inspect.signature(build).parameters


def memory_of(optimizer: ZerothOrder) -> dict[str, Tensor]:
    """What an optimizer remembers of the parameters, wherever a mechanism keeps it."""
    state = optimizer.state_dict()
    names = list(optimizer.named_parameters())
    kept = {f"{names[i]} {key}": value for i, held in state["state"].items() for key, value in held.items()}
    kept |= {f"{name} left momentum": value for name, value in state.get("path", {}).get("momentum", {}).items()}
    return kept


class World:
    """The weights in float64, the loss anywhere, and the raw random directions, which alone come from the package.

    Args:
        module: A module of its own, whose weights are overwritten.
        directions: The optimizer's family.
        groups: The optimizer's parameter groups, whose geometries count for steps along oracles.
        loss: Of a module.

    Attributes:
        x: The weights.
        t: Steps so far.
        memory: Whatever a method remembers.
    """

    def __init__(
        self,
        module: nn.Module,
        directions: Directions,
        groups: Sequence[Mapping[str, Any]] = (),
        loss: Callable[[nn.Module], Tensor] = mean,
        seed: int = SEED,
    ) -> None:
        self._module, self._directions, self._loss, self._seed = module, directions, loss, seed
        self.groups = groups
        self.x: Vec = {name: p.detach().double().numpy().copy() for name, p in module.named_parameters()}
        self.t = 0
        self.memory: dict[str, Any] = {}

    def f(self, u: Vec | None = None, tau: float = 0.0) -> float:
        """The loss at ``x + tau u``."""
        x = self.x if u is None else {name: x + tau * u[name] for name, x in self.x.items()}
        with torch.no_grad():
            for name, parameter in self._module.named_parameters():
                parameter.copy_(torch.from_numpy(np.asarray(x[name])))
            return float(self._loss(self._module))

    def factors(self, query: int = 0) -> tuple[Vec, Vec]:
        """The direction as U of every parameter, and the V of those that have one; a dense direction is its own U."""
        lefts, rights = {}, {}
        for name, x in self.x.items():
            z = self._directions.draw(Address(self._seed, self.t, name, query), torch.Size(x.shape), CPU)
            if isinstance(z, Factors):
                lefts[name], rights[name] = z.left.double().numpy(), z.right.double().numpy()
            else:
                lefts[name] = z.double().numpy()
        return lefts, rights

    def embed(self, lefts: Vec, rights: Vec) -> Vec:
        """``U Vᵀ`` in the parameters' shapes."""
        return {name: (u @ rights[name].T if name in rights else u).reshape(self.x[name].shape) for name, u in lefts.items()}

    def z(self, query: int = 0) -> Vec:
        return self.embed(*self.factors(query))

    def average(self, g: Vec, beta: float, key: str = "average") -> Vec:
        """``m ← β m + (1 - β) g`` from zero."""
        old = self.memory.get(key, dict.fromkeys(g, 0.0))
        self.memory[key] = {name: beta * old[name] + (1 - beta) * g[name] for name in g}
        return dict(self.memory[key])

    def move(self, step: Vec, settings: Mapping[str, Any]) -> None:
        """``x ← (1 - η λ) x - η step``."""
        lr, decay = settings["lr"], settings.get("weight_decay", 0.0)
        self.x = {name: (1 - lr * decay) * x - lr * step[name] for name, x in self.x.items()}


def total(weights: Sequence[float], vectors: Sequence[Vec]) -> Vec:
    """``Σ w_i v_i``."""
    return {name: sum(w * v[name] for w, v in zip(weights, vectors, strict=True)) for name in vectors[0]}


@dataclass
class Seen:
    """A step, by what the closure saw.

    Attributes:
        probes: Where it was evaluated, from the weights before the step.
        losses: What it returned there.
        move: The step itself.
    """

    probes: list[Vec]
    losses: list[float]
    move: Vec

    def of(self, name: str) -> list[np.ndarray]:
        return [probe[name] for probe in self.probes]


class Landscape:
    """Loose parameters, which an optimizer moves in place, so that a closure sees where it is.

    Args:
        loss: Of the parameters by name.
        start: Their values.
    """

    def __init__(self, loss: Callable[[dict[str, Any]], Tensor], start: Mapping[str, Tensor]) -> None:
        self.loss = loss
        self.parameters = {name: nn.Parameter(value.clone()) for name, value in start.items()}
        self._points: list[Vec] = []
        self._losses: list[float] = []

    def optimizer(self, build: Callable[..., ZerothOrder], **settings: Any) -> ZerothOrder:
        return build(self.parameters.items(), **{"seed": SEED, **settings})

    def here(self) -> Vec:
        return {name: p.detach().double().numpy().copy() for name, p in self.parameters.items()}

    def closure(self) -> Tensor:
        value = self.loss(self.parameters).detach()
        self._points.append(self.here())
        self._losses.append(float(value))
        return value

    def step(self, optimizer: ZerothOrder) -> Seen:
        start = self.here()
        self._points, self._losses = [], []
        optimizer.step(self.closure)
        here = self.here()
        probes = [{name: point[name] - x for name, x in start.items()} for point in self._points]
        return Seen(probes, self._losses, {name: here[name] - x for name, x in start.items()})


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(slopes: Mapping[str, Tensor]) -> Callable[[dict[str, Any]], Tensor]:
    """``⟨g, x⟩``."""
    return lambda x: torch.stack([(slopes[name] * p).sum() for name, p in x.items()]).sum()


def wavy(x: Mapping[str, Tensor]) -> Tensor:
    """Neither convex nor symmetric."""
    parts = [(torch.sin(2 * p + i) + 0.05 * (p - 0.3) ** 2).sum() for i, p in enumerate(x.values())]
    return torch.stack(parts).sum() + torch.tanh(torch.stack([p.sum() for p in x.values()]).sum())


SHAPES = {"matrix": (6, 5), "wide": (3, 8), "vector": (7,), "kernel": (4, 3, 2)}


def landscape(
    loss: Callable[[dict[str, Any]], Tensor] = wavy, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> Landscape:
    start = {name: (scale * normal(*shape, seed=i)).to(dtype) for i, (name, shape) in enumerate(SHAPES.items())}
    return Landscape(loss, start)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))
