"""The register of the methods' formulas, and what several of them have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.optim import reference
from tests.optim.methods.problem import Vec, World, total

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Reference:
    """A method's formula.

    Attributes:
        step: Takes one step in a world.
        settings: Arguments under which the method is compared with it.
        state: Numbers that the method remembers for each weight, with its defaults but for what the test says.
        rtol: Of the change of the weights; what is orthogonalised in float32 is less exact.
    """

    step: Callable[[World, Settings], None]
    settings: Sequence[dict[str, Any]]
    state: float
    rtol: float = 2e-6


REFERENCES: dict[str, Reference] = {}

COMMON = {"lr": 0.05, "smoothing": 0.02}


def formula(name: str, *settings: dict[str, Any], state: float, rtol: float = 2e-6) -> Callable[..., Any]:
    def register(step: Callable[[World, Settings], None]) -> Callable[[World, Settings], None]:
        REFERENCES[name] = Reference(step, [{**COMMON, **extra} for extra in settings], state, rtol)
        return step

    return register


# ---- parts ---------------------------------------------------------------------------------------------------------------
def slopes(w: World, s: Settings, us: Sequence[Vec]) -> list[float]:
    """Central differences, or one-sided ones."""
    tau = s["smoothing"]
    if s.get("sides", 2) == 2:
        return [(w.f(u, tau) - w.f(u, -tau)) / (2 * tau) for u in us]
    base = w.f()
    return [(w.f(u, tau) - base) / tau for u in us]


def gradient(w: World, s: Settings) -> Vec:
    zs = [w.z(query) for query in range(s.get("num_directions", 1))]
    return total([rho / len(zs) for rho in slopes(w, s, zs)], zs)


def sign(g: Vec) -> Vec:
    return {name: np.sign(x) for name, x in g.items()}


def orthogonalised(g: np.ndarray, iterations: int) -> np.ndarray:
    """Muon's quintic Newton-Schulz iteration, in float64."""
    x = reference.matrix(g)
    x = x / (np.linalg.norm(x) + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(iterations):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.T if tall else x).reshape(g.shape)


def adamm(w: World, g: Vec, s: Settings) -> Vec:
    zero = {name: np.zeros_like(x) for name, x in g.items()}
    m, v, top = (w.memory.get(key, zero) for key in ("m", "v", "top"))
    m = {n: s["beta1"] * m[n] + (1 - s["beta1"]) * g[n] for n in g}
    v = {n: s["beta2"] * v[n] + (1 - s["beta2"]) * g[n] ** 2 for n in g}
    top = {n: np.maximum(top[n], v[n]) for n in g}
    w.memory |= {"m": m, "v": v, "top": top}
    return {n: m[n] / (np.sqrt(top[n]) + s["eps"]) for n in g}


def carried(w: World, rights: Vec, *keys: str) -> None:
    """Where V is drawn anew: the left factors M' for which ``M' V'ᵀ`` is nearest to ``M Vᵀ``."""
    old = w.memory.get("rights", rights)
    for key in keys:
        for name, v in rights.items():
            if name in w.memory.get(key, {}) and not np.array_equal(v, old[name]):
                w.memory[key][name] = np.linalg.lstsq(v, old[name] @ w.memory[key][name].T, rcond=None)[0].T
    w.memory["rights"] = rights


def extreme(w: World, z: Vec) -> Vec:
    """The farthest point of each group's unit ball along z."""
    points: Vec = {}
    for group in w.groups:
        names = group["param_names"]
        found = reference.extreme(group["geometry"], [z[n] for n in names], group["radius"], group["transposed"])
        points |= dict(zip(names, found, strict=True))
    return points
