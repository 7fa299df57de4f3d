"""Methods whose directions have a fixed distribution."""

from __future__ import annotations

import numpy as np

from tests.optim import reference
from tests.optim.methods.formulas.registry import (
    Settings,
    adamm,
    carried,
    extreme,
    formula,
    gradient,
    orthogonalised,
    sign,
    slopes,
)
from tests.optim.methods.problem import Vec, World, total


@formula("adanaged", {"rank": 2, "interval": 2}, {"rank": 2, "interval": 3, "rule": 20, "momentum": 0.5}, state=0)
def adanaged(w: World, s: Settings) -> None:
    """Probes and steps are extreme points of the groups' norms; the sizes are those of the rule, which has its own tests."""
    u = extreme(w, w.z())
    (rho,) = slopes(w, s, [u])
    if not s.get("momentum"):
        w.move(total([np.sign(rho)], [u]), s)
        return
    _, rights = w.factors()
    lefts = {n: u[n].reshape(len(u[n]), -1) @ np.linalg.pinv(rights[n].T) if n in rights else u[n] for n in u}
    carried(w, rights, "average")
    w.move(extreme(w, w.embed(w.average(total([rho], [lefts]), s["momentum"]), rights)), s)


@formula(
    "zo_sgd",
    {},
    {"num_directions": 3, "sides": 1, "momentum": 0.8, "weight_decay": 0.3},
    {"num_directions": 3, "normalised": True},
    state=0,
)
def zo_sgd(w: World, s: Settings) -> None:
    zs = [w.z(query) for query in range(s.get("num_directions", 1))]
    rho = slopes(w, s, zs)
    scale = np.linalg.norm(rho) if s.get("normalised") else len(zs)
    w.move(w.average(total([r / scale for r in rho], zs), s.get("momentum", 0.0)), s)


@formula("zo_signsgd", {}, {"num_directions": 3, "momentum": 0.8, "weight_decay": 0.3}, state=0)
def zo_signsgd(w: World, s: Settings) -> None:
    w.move(sign(w.average(gradient(w, s), s.get("momentum", 0.0))), s)


@formula(
    "zo_adamm",
    {"beta1": 0.9, "beta2": 0.999, "eps": 1e-10},
    {"beta1": 0.6, "beta2": 0.4, "eps": 0.01, "num_directions": 2, "sides": 1, "weight_decay": 0.3},
    state=3,
)
def zo_adamm(w: World, s: Settings) -> None:
    w.move(adamm(w, gradient(w, s), s), s)


@formula("zo_conservative", {}, {"lr": 0.2, "smoothing": 3.0}, state=0)
def zo_conservative(w: World, s: Settings) -> None:
    z = w.z()
    (rho,) = slopes(w, s, [z])
    places = [(w.f(z, factor * s["lr"] * rho), factor) for factor in (0.0, -1.0, 1.0)]
    _, factor = min(places)
    w.memory.setdefault("taken", []).append(factor)
    w.move(total([-factor * rho], [z]), s)


@formula("fzoo", {"num_directions": 4, "lr": 0.001}, {"num_directions": 3, "lr": 0.0003, "weight_decay": 0.3}, state=0)
def fzoo(w: World, s: Settings) -> None:
    q, eps = s["num_directions"], s["smoothing"]
    us, base = [w.z(query) for query in range(q)], w.f()
    losses = [w.f(u, eps) for u in us]
    g = total([(loss - base) / (eps * q) for loss in losses], us)
    w.move(total([1 / np.std(losses, ddof=1)], [g]), s)


def block_momentum(w: World, s: Settings) -> Vec:
    """``M ← β M + (1 - β) ρ e`` on the block's entries, which all others keep."""
    es = [w.z(query) for query in range(s.get("num_directions", 1))]
    g = total([rho / len(es) for rho in slopes(w, s, es)], es)
    old = w.memory.get("M", {name: np.zeros_like(x) for name, x in w.x.items()})
    probed = {name: sum(np.abs(e[name]) for e in es) > 0 for name in g}
    beta = s["momentum"]
    w.memory["M"] = {n: np.where(probed[n], beta * old[n] + (1 - beta) * g[n], old[n]) for n in g}
    return dict(w.memory["M"])


@formula(
    "jaguar_signsgd",
    {"fraction": 0.5, "momentum": 0.9},
    {"fraction": 0.3, "momentum": 0.5, "signs": "ones", "num_directions": 2, "weight_decay": 0.3},
    state=1,
)
def jaguar_signsgd(w: World, s: Settings) -> None:
    w.move(sign(block_momentum(w, s)), s)


@formula(
    "jaguar_muon",
    {"fraction": 1.0, "momentum": 0.9, "iterations": 5},
    {"fraction": 0.6, "momentum": 0.5, "iterations": 2, "num_directions": 2, "weight_decay": 0.3},
    {"fraction": 1.0, "momentum": 0.5, "iterations": 3, "normalised": True},
    state=1,
    rtol=2e-5,
)
def jaguar_muon(w: World, s: Settings) -> None:
    m = block_momentum(w, s)
    size = {n: max(reference.matrix(x).shape) ** 0.5 if s.get("normalised") else 1.0 for n, x in m.items()}
    w.move({n: size[n] * orthogonalised(x, s["iterations"]) if x.ndim > 1 else np.sign(x) for n, x in m.items()}, s)
