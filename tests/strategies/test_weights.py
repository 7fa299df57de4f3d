"""What the processes hold: the first one's weights, buffers and seed, and no gradient buckets."""

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zo_lightning.optim import Alone
from zo_lightning.strategies import ZODDPStrategy, ranks_of


def test_all_begin_with_the_firsts(pair):
    """Parameters and buffers of all kinds, and the seed of the directions, which nobody has set."""
    first, second = pair.result("odd_weights")
    differing = [name for name, value in first["mine"].items() if not torch.equal(value, second["mine"][name])]
    assert {"net.0.weight", "scale", "turned", "still", "whole", "of_bool_random", "of_half", "of_brain", "of_int8"} < set(
        differing
    )
    assert {"complex", "single", "turned_buffer", "expanded"} < set(differing)
    for name, value in first["mine"].items():
        for began in (first["begin"][name], second["begin"][name]):
            assert torch.equal(began, value), name
            assert began.dtype == value.dtype
    assert first["begin"]["turned"].stride() == second["begin"]["turned"].stride()
    assert first["initial_seed"] != second["initial_seed"]
    assert first["seed"] == second["seed"] == first["initial_seed"]
    assert torch.equal(first["weights"], second["weights"])
    assert not torch.equal(first["end"]["turned"], first["begin"]["turned"])
    assert torch.equal(first["end"]["still"], first["mine"]["still"])
    assert first["val"] == second["val"]


def test_groups_that_are_added_later_have_the_same_seed(pair):
    first, second = pair.result("added_group")
    assert len(set(first["seeds"] + second["seeds"])) == 1
    assert torch.equal(first["weights"], second["weights"])


def test_running_statistics_are_the_firsts_where_it_counts(pair):
    first, second = pair.result("running_statistics")
    assert torch.equal(first["weights"], second["weights"])
    assert len(first["validations"]) == 2
    for (mean, loss), (other_mean, other_loss) in zip(first["validations"], second["validations"], strict=True):
        assert mean.any()
        assert torch.equal(mean, other_mean)
        assert loss == other_loss
    assert all(torch.equal(a, b) for a, b in zip(first["buffers"], second["buffers"], strict=True))


def test_no_gradient_buckets(pair):
    """DDP's take as much as the trainable weights; none are there, nor gradients, nor the wrapper itself."""
    for result in pair.result("buckets"):
        ours, stock = result["zo_ddp"], result["ddp"]
        assert (ours["wrappers"], ours["bucket_bytes"], ours["gradients"], ours["wrapped"]) == (0, 0, 0, False)
        assert stock["wrappers"] == 1
        assert stock["bucket_bytes"] == stock["trained_bytes"] > 2**22


# ---- names --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "method"), [("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")])
def test_names(name, method):
    strategy = StrategyRegistry.get(f"zo_ddp{name}")
    assert isinstance(strategy, ZODDPStrategy)
    assert strategy._start_method == method
    assert not strategy.split_directions


def test_strategies_that_are_not_supported():
    assert isinstance(ranks_of(SingleDeviceStrategy()), Alone)
    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy is not supported.*strategy='zo_ddp'"):
        ranks_of(FSDPStrategy())
