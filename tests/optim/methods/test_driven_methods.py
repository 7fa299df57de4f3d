"""The parameter-free rule drives every method whose steps are normalised; what it measures along sparse directions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.optim.methods.problem import SHAPES, landscape, normal
from zo_lightning.optim import ParameterFree
from zo_lightning.optim.methods import (
    FZOO,
    LDSD,
    LOZO,
    ZOSGD,
    HiZOO,
    JaguarMuon,
    JaguarSignSGD,
    LDSDAdaMM,
    LDSDJaguar,
    SubZero,
    ZOAdaMM,
    ZOMuon,
    ZOSignSGD,
)

DRIVEN = {
    "jaguar_signsgd": (JaguarSignSGD, {"fraction": 0.5}, 300),
    "jaguar_muon": (JaguarMuon, {"fraction": 0.5, "normalised": True}, 300),
    "lozo": (LOZO, {"normalised": True}, 200),
    "subzero": (SubZero, {"normalised": True, "rank": 2, "interval": 50}, 200),
    "zo_muon": (ZOMuon, {"normalised": True}, 150),
    "fzoo": (FZOO, {}, 100),
    "ldsd_sgd": (LDSD, {"normalised": True}, 150),
    "ldsd_adamm": (LDSDAdaMM, {}, 100),
    "ldsd_jaguar": (LDSDJaguar, {"fraction": 0.5}, 250),
    "hizoo": (HiZOO, {"normalised": True}, 200),
    "zo_sgd": (ZOSGD, {"normalised": True}, 200),
    "zo_adamm": (ZOAdaMM, {}, 200),
    "zo_signsgd": (ZOSignSGD, {}, 200),
}
"""Methods whose steps are normalised, with the steps of a run."""


def logistic() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Two classes by a linear teacher, which a linear model can fit."""
    x = normal(64, 4, seed=1).float()
    labels = (x @ normal(4, 2, seed=2).float()).argmax(1)
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    return model, x, labels


@pytest.mark.parametrize("name", DRIVEN)
def test_the_rule_trains_it_untuned(name):
    build, settings, steps = DRIVEN[name]
    model, x, labels = logistic()
    rule = ParameterFree(steps)
    optimizer = build(model.named_parameters(), **settings, seed=0, step_rule=rule).attach(model)

    def losses() -> torch.Tensor:
        return F.cross_entropy(model(x), labels, reduction="none")

    for _ in range(steps):
        optimizer.step(losses)
    assert float(losses().mean().detach()) < math.log(2) / 2
    assert rule.recalibrations == 0


@pytest.mark.parametrize(("build", "settings"), [(JaguarSignSGD, {}), (JaguarMuon, {"normalised": True})])
def test_the_curvature_along_blocks_is_measured_along_whole_directions(build, settings):
    """Two forwards and the one at x more: with τ of the rule, which probes of few entries exceed."""
    x = landscape()
    rule = ParameterFree(40, f_low=-100.0, interval=4)
    optimizer = x.optimizer(build, step_rule=rule, fraction=0.2, **settings)
    calibration = len(x.step(optimizer).losses) - 5
    assert calibration >= 7
    shares = []  # of each tensor's entries in a block
    for shape in SHAPES.values():
        rows, columns = shape[0], math.prod(shape[1:])
        shares.append(max(1, int(0.2 * rows)) * max(1, int(0.2 * columns)) / (rows * columns))
    less = math.sqrt(max(shares))
    for step in range(1, 10):
        seen = x.step(optimizer)
        measured = step % 4 == 0
        assert len(seen.losses) == optimizer.last.forwards == (5 if measured else 2)
        probes = seen.probes[1:3] if measured else seen.probes
        for name, shape in SHAPES.items():
            assert np.count_nonzero(probes[0][name]) < math.prod(shape)
            sizes = np.abs(probes[0][name][probes[0][name] != 0])
            np.testing.assert_allclose(sizes, optimizer.last.smoothing, rtol=1e-5)
            if measured:
                above, below = seen.of(name)[3:]
                np.testing.assert_allclose(np.abs(above), less * optimizer.last.smoothing, rtol=1e-5)
                np.testing.assert_allclose(below, -above, rtol=0, atol=1e-12)
        if measured:
            second = (seen.losses[3] - 2 * seen.losses[0] + seen.losses[4]) / (less * optimizer.last.smoothing) ** 2
            assert optimizer.last.curvature == pytest.approx(second, rel=1e-6)
