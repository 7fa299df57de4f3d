"""Methods that learn the distribution of their directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tests.optim.methods.formulas.registry import Settings, adamm, carried, formula, sign
from tests.optim.methods.problem import Vec, World, mixed, optimizer_of, total, train
from zo_lightning.optim import ScaleNetworks
from zo_lightning.optim.methods import METHODS


def best_of(w: World, s: Settings, draw: Callable[[int], tuple[Vec, Vec]]) -> tuple[list[float], list[Vec], Vec, float]:
    """Losses, directions and V, and the slope of the best direction, which is the last of the directions."""
    drawn = [draw(query) for query in range(s["k"])]
    us = [w.embed(*pair) for pair in drawn]
    losses = [w.f(u, s["smoothing"]) for u in us]
    best = int(np.argmin(losses))
    slope = (losses[best] - w.f(us[best], -s["smoothing"])) / (2 * s["smoothing"])
    return losses, [left for left, _ in [*drawn, drawn[best]]], drawn[0][1], slope


def learn_mean(w: World, s: Settings, losses: Sequence[float], lefts: Sequence[Vec]) -> None:
    """The score function's estimate, for each tensor over the directions that moved it."""
    mean = w.memory["mean"]
    for name in list(mean):
        moved = [i for i in range(s["k"]) if np.any(lefts[i][name])]
        if len(moved) < 2:
            continue
        k, old = len(moved), mean[name]
        advantages = [losses[i] - np.mean([losses[j] for j in moved if j != i]) for i in moved]
        g = sum(a * (lefts[i][name] - old) for i, a in zip(moved, advantages, strict=True)) / (k * s["sigma"] ** 2)
        mean[name] = old - s["mean_rate"] * g


def around_mean(w: World, s: Settings) -> Callable[[int], tuple[Vec, Vec]]:
    lefts, rights = w.factors()
    w.memory.setdefault("mean", {name: np.zeros_like(x) for name, x in lefts.items()})
    carried(w, rights, "mean", "average")

    def draw(query: int) -> tuple[Vec, Vec]:
        z, rights = w.factors(query)
        return {name: w.memory["mean"][name] + s["sigma"] * z[name] for name in z}, rights

    return draw


LEARNING = {"k": 4, "mean_rate": 20.0, "sigma": 0.7}


@formula(
    "ldsd_sgd",
    LEARNING,
    {**LEARNING, "momentum": 0.8, "weight_decay": 0.3},
    {**LEARNING, "low_rank": 2, "interval": 2},
    {**LEARNING, "low_rank": 2, "interval": 2, "momentum": 0.8, "normalised": True},
    {**LEARNING, "mean_rate": 0.0, "normalised": True},
    state=1,
)
def ldsd_sgd(w: World, s: Settings) -> None:
    losses, lefts, rights, slope = best_of(w, s, around_mean(w, s))
    weight = np.sign(slope) if s.get("normalised") else slope
    g = w.average(total([weight], [lefts[-1]]), s.get("momentum", 0.0))
    w.move(w.embed(g, rights), s)
    learn_mean(w, s, losses, lefts)


@formula("ldsd_adamm", {**LEARNING, "beta1": 0.6, "beta2": 0.4, "eps": 0.01, "weight_decay": 0.3}, state=4)
def ldsd_adamm(w: World, s: Settings) -> None:
    losses, lefts, _, slope = best_of(w, s, around_mean(w, s))
    w.move(adamm(w, total([slope], [lefts[-1]]), s), s)
    learn_mean(w, s, losses, lefts)


@formula(
    "ldsd_jaguar",
    {**LEARNING, "fraction": 0.5, "momentum": 0.9},
    {**LEARNING, "fraction": 0.3, "momentum": 0.5, "weight_decay": 0.3},
    state=2,
)
def ldsd_jaguar(w: World, s: Settings) -> None:
    if "mean" not in w.memory:
        w.memory["mean"] = first_means()

    def draw(query: int) -> tuple[Vec, Vec]:
        z, rights = w.factors(query)
        return {n: w.memory["mean"][n] + s["sigma"] * x if np.any(x) else x for n, x in z.items()}, rights

    losses, lefts, _, slope = best_of(w, s, draw)
    old = w.memory.get("M", {name: np.zeros_like(x) for name, x in w.x.items()})
    best, beta = lefts[-1], s["momentum"]
    w.memory["M"] = {n: beta * old[n] + (1 - beta) * slope * best[n] if np.any(best[n]) else old[n] for n in best}
    w.move(sign(w.memory["M"]), s)
    learn_mean(w, s, losses, lefts)


def first_means() -> Vec:
    """The random unit means that LDSD-JAGUAR begins with, from an optimizer that moves all tensors and learns nothing."""
    module = mixed()
    optimizer = optimizer_of(METHODS["ldsd_jaguar"], module, lr=0.0, mean_rate=0.0, fraction=1.0)
    train(module, optimizer, 1)
    return {name: optimizer.state[p]["mean"].double().numpy() for name, p in module.named_parameters()}


@formula("hizoo", {"alpha": 0.3, "smoothing": 0.1}, {"alpha": 0.1, "smoothing": 0.1, "weight_decay": 0.3}, state=1, rtol=5e-6)
def hizoo(w: World, s: Settings) -> None:
    alpha, eps, z = s["alpha"], s["smoothing"], w.z()
    h = w.memory.get("H", {name: np.ones_like(x) for name, x in z.items()})
    u = {n: z[n] / np.sqrt(h[n]) for n in z}
    plus, minus, base = w.f(u, eps), w.f(u, -eps), w.f()
    curvature = abs(plus + minus - 2 * base) / (2 * eps**2)
    h = {n: (1 - alpha) * h[n] + alpha * curvature * h[n] * z[n] ** 2 for n in z}
    w.memory["H"] = h
    w.move({n: (plus - minus) / (2 * eps) * z[n] / np.sqrt(h[n]) for n in z}, s)


@formula(
    "zo_finetuner",
    {"network_seed": 3, "refresh": 1},
    {"network_seed": 3, "refresh": 2, "weight_decay": 0.3},
    {"networks": 7.0},
    state=0,
)
def zo_finetuner(w: World, s: Settings) -> None:
    """Of the networks as they begin, which are random, and of one scale for all."""
    names = list(w.x)
    if "networks" in s:
        sigma = dict.fromkeys(names, s["networks"])
    else:
        if w.t % s["refresh"] == 0:
            w.memory["seen"] = {n: (x.mean(), x.var(ddof=1) if x.size > 1 else 0.0) for n, x in w.x.items()}
        last = w.memory.get("last", dict.fromkeys(names, 1.0))
        inputs = {n: np.array([*w.memory["seen"][n], *w.memory.get("losses", (0.0, 0.0)), last[n]]) for n in names}
        initial = {key: p.detach().double().numpy() for key, p in ScaleNetworks(names, s["network_seed"]).named_parameters()}
        w1, b1, w2, b2 = (initial[key] for key in ("w1", "b1", "w2", "b2"))
        sigma = {n: abs(w2[j] @ np.tanh(w1[j] @ inputs[n] + b1[j]) + b2[j]) for j, n in enumerate(names)}
    size = {n: x.size for n, x in w.x.items()}
    factor = np.sqrt(sum(size.values()) / sum(size[n] * sigma[n] ** 2 for n in names))
    z = w.z()
    u = {n: factor * sigma[n] * z[n] for n in names}
    plus, minus = w.f(u, s["smoothing"]), w.f(u, -s["smoothing"])
    w.memory |= {"losses": (plus, minus), "last": sigma}
    w.move(total([(plus - minus) / (2 * s["smoothing"])], [u]), s)
