"""Methods that hold a factor of their directions."""

from __future__ import annotations

import numpy as np

from tests.optim.methods.formulas.registry import Settings, carried, extreme, formula, orthogonalised, slopes
from tests.optim.methods.problem import Vec, World, total


@formula(
    "lozo",
    {"rank": 2, "interval": 2},
    {"rank": 2, "interval": 2, "momentum": 0.8, "weight_decay": 0.3},
    {"rank": 3, "interval": 1, "normalised": True},
    state=0,
)
def lozo(w: World, s: Settings) -> None:
    lefts, rights = w.factors()
    carried(w, rights, "average")
    (rho,) = slopes(w, s, [w.embed(lefts, rights)])
    weight = np.sign(rho) if s.get("normalised") else rho
    w.move(w.embed(w.average(total([weight], [lefts]), s.get("momentum", 0.0)), rights), s)


@formula("subzero", {"rank": 2, "interval": 2}, {"rank": 2, "interval": 3, "normalised": True, "weight_decay": 0.3}, state=0)
def subzero(w: World, s: Settings) -> None:
    z = w.z()
    (rho,) = slopes(w, s, [z])
    w.move(total([np.sign(rho) if s.get("normalised") else rho], [z]), s)


@formula(
    "zo_muon",
    {"rank": 2, "interval": 2, "num_directions": 3, "iterations": 5, "vector_rate": 0.2},
    {"rank": 2, "interval": 2, "num_directions": 2, "iterations": 3, "vector_rate": 0.2, "side": "right", "weight_decay": 0.3},
    {"rank": 2, "interval": 2, "num_directions": 3, "normalised": True},
    {"rank": 2, "interval": 2, "num_directions": 3, "normalised": True, "side": "right"},
    state=0,
    rtol=2e-5,
)
def zo_muon(w: World, s: Settings) -> None:
    drawn = [w.factors(query) for query in range(s["num_directions"])]
    if s.get("normalised"):
        us = [extreme(w, w.embed(*pair)) for pair in drawn]
        w.move(extreme(w, total(slopes(w, {**s, "sides": 1}, us), us)), s)
        return
    rho = slopes(w, {**s, "sides": 1}, [w.embed(*pair) for pair in drawn])
    lefts = total([r / len(rho) for r in rho], [left for left, _ in drawn])
    rights = total([r / len(rho) for r in rho], [right for _, right in drawn])
    step: Vec = {}
    for name, x in w.x.items():
        if x.ndim < 2:
            step[name] = s["vector_rate"] * lefts[name]
        elif s.get("side", "left") == "left":
            step[name] = drawn[0][0][name] @ orthogonalised(rights[name], s["iterations"]).T
        else:
            step[name] = orthogonalised(lefts[name], s["iterations"]) @ drawn[0][1][name].T
    w.move({name: x.reshape(w.x[name].shape) for name, x in step.items()}, s)
