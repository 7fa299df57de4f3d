"""Combinations that a method does not work with are refused, with the argument's name."""

from __future__ import annotations

import pytest
import torch

from tests.optim.methods.problem import landscape, mean, mixed, optimizer_of
from zo_lightning.optim import Alone, DiagonalHessian, LearnedMean, LowRank, Muon, ParameterFree, ZerothOrder
from zo_lightning.optim.methods import (
    FZOO,
    LDSD,
    LOZO,
    ZOSGD,
    ConservativeZO,
    HiZOO,
    JaguarMuon,
    JaguarSignSGD,
    LDSDJaguar,
    SubZero,
    ZOAdaMM,
    ZOMuon,
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"update": "sign", "directions": "low_rank"},
            r"update rule 'sign' treats every entry by itself.*use dense directions",
        ),
        (
            {"update": "adamm", "directions": "low_rank"},
            r"update rule 'adamm' treats every entry by itself.*use dense directions",
        ),
        ({"update": "muon", "directions": LowRank(2, 5, "gaussian")}, r"update rule 'muon' needs .*right='orthonormal'"),
        ({"sampler": LearnedMean(), "directions": "gaussian"}, r"learned_mean.*update='lmo'.*use 'sgd' or 'unit'"),
        (
            {"sampler": DiagonalHessian(), "update": "sgd"},
            r"diagonal_hessian.*does not work with low_rank\(rank=1, interval=50\)",
        ),
        ({"sampler": LearnedMean(), "update": "sgd", "directions": "sphere"}, r"learned_mean.*does not work with sphere"),
        ({"sampler": LearnedMean(), "update": "sgd", "directions": "subspace"}, r"learned_mean.*does not work with subspace"),
        ({"scheme": "best_of", "sides": 1}, r"scheme 'best_of' .*got sides=1"),
        ({"scheme": "conservative", "update": "sgd", "momentum": 0.5}, r"scheme 'conservative' .*momentum=0\.5"),
        ({"scheme": "conservative", "update": "sgd", "weight_decay": 0.5}, r"scheme 'conservative' .*weight_decay=0\.5"),
        ({"scheme": "conservative", "update": "sgd", "num_directions": 2}, r"scheme 'conservative' .*num_directions=2"),
        ({"scheme": "conservative", "update": "sgd", "sides": 1}, r"scheme 'conservative' .*sides=1"),
        ({"scheme": "conservative", "update": "sign", "directions": "gaussian"}, r"scheme 'conservative' .*update='sign'"),
        ({"scheme": "worst_of"}, r"scheme must be one of best_of, conservative, differences, got 'worst_of'"),
        ({"update": "standardised"}, r"at least 2 directions per step, got num_directions=1"),
    ],
)
def test_what_does_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        ZerothOrder(mixed().named_parameters(), **settings)


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (FZOO, {"num_directions": 1}, r"num_directions=1"),
        (LDSD, {"k": 0}, r"num_directions must be at least 1, got 0"),
        (LDSD, {"mean_rate": -1.0}, r"mean_rate must be a finite number >= 0, got -1\.0"),
        (LDSD, {"mean_rate": float("nan")}, r"mean_rate must be .*got nan"),
        (LDSD, {"sigma": 0.0}, r"sigma must be a finite number > 0, got 0\.0"),
        (LDSD, {"low_rank": 0}, r"rank must be at least 1, got 0"),
        (LDSDJaguar, {"fraction": 0.0}, r"fraction must be in \(0, 1\], got 0\.0"),
        (JaguarSignSGD, {"fraction": 1.5}, r"fraction must be in \(0, 1\], got 1\.5"),
        (JaguarSignSGD, {"signs": "minus"}, r"signs must be 'random' or 'ones', got 'minus'"),
        (JaguarMuon, {"iterations": 0}, r"iterations must be at least 1, got 0"),
        (ZOMuon, {"rank": 0}, r"rank must be at least 1, got 0"),
        (ZOMuon, {"interval": 0}, r"interval must be at least 1"),
        (ZOMuon, {"vector_rate": -1.0}, r"vector_rate must be >= 0, got -1\.0"),
        (LOZO, {"interval": 0}, r"interval must be at least 1"),
        (ZOAdaMM, {"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1\.0"),
        (ZOAdaMM, {"beta2": -0.1}, r"beta2 must be in \[0, 1\), got -0\.1"),
        (ZOAdaMM, {"eps": 0.0}, r"eps must be positive, got 0\.0"),
        (HiZOO, {"alpha": 1.0}, r"alpha must be in \[0, 1\), got 1\.0"),
    ],
)
def test_arguments_out_of_their_range(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(mixed().named_parameters(), **settings)


def test_other_settings_of_an_update_rule():
    with pytest.raises(ValueError, match="vectors must be 'sign' or 'sgd', got 'adam'"):
        Muon(5, "adam")
    with pytest.raises(ValueError, match="initial must be 'zero' or 'unit', got 'one'"):
        LearnedMean(initial="one")


@pytest.mark.parametrize("build", [LDSD, LDSDJaguar, ConservativeZO])
def test_a_batch_in_parts_is_refused_where_the_losses_decide_on_the_probes(build):
    module = mixed()
    optimizer = optimizer_of(build, module)
    name = optimizer.scheme.name
    optimizer.accumulate(lambda: mean(module))  # one part is the whole batch, until there is another
    with pytest.raises(ValueError, match=rf"scheme '{name}' .*accumulate_grad_batches=1"):
        optimizer.step(lambda: mean(module))
    optimizer.step(lambda: mean(module))


@pytest.mark.parametrize("build", [LDSD, LDSDJaguar, ConservativeZO])
def test_one_part_is_a_whole_batch(build):
    """Which is how a module that is taken over hands its batches over."""
    module, other = mixed(), mixed()
    parts, whole = optimizer_of(build, module), optimizer_of(build, other)
    for _ in range(3):
        parts.accumulate(lambda: mean(module))
        parts.step()
        whole.step(lambda: mean(other))
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


class Split(Alone):
    """Processes with directions of their own, of which this is one."""

    split = True


@pytest.mark.parametrize("build", [LDSD, LDSDJaguar, ConservativeZO, HiZOO])
def test_processes_with_directions_of_their_own_are_refused(build):
    module = mixed()
    optimizer = optimizer_of(build, module)
    optimizer.ranks = Split()
    with pytest.raises(ValueError, match=r"split_directions=True .*use shared directions"):
        optimizer.step(lambda: mean(module))


def test_conservative_steps_need_one_rate():
    x = landscape()
    groups = [{"params": [pair], "lr": 0.1 * (i + 1)} for i, pair in enumerate(x.parameters.items())]
    optimizer = ConservativeZO(groups)
    with pytest.raises(ValueError, match="scheme 'conservative' needs one lr for all parameter groups"):
        optimizer.step(x.closure)


@pytest.mark.parametrize("build", [ZOSGD, LDSD, LOZO, SubZero, HiZOO, ConservativeZO, JaguarMuon, ZOMuon])
def test_a_rule_cannot_drive_steps_that_are_not_normalised(build):
    with pytest.raises(ValueError, match=r"step_rule sets the length of a step.*update='(sgd|muon)'.*normalised=True"):
        build(mixed().named_parameters(), step_rule=ParameterFree(10))
