"""From a Lightning strategy to the processes that an optimizer's step is taken with."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from zo_lightning.optim import Alone, Ranks, ZerothOrder

__all__ = ["StrategyRanks", "join", "ranks_of"]


class StrategyRanks(Ranks):
    """The processes of a strategy that keeps all weights on each.

    Args:
        strategy: Knows the processes, whose default group gathers the numbers.
        split: Whether each process probes along directions of its own.

    Attributes:
        bytes_sent: What this process has given to be gathered, so far.
    """

    def __init__(self, strategy: DDPStrategy, *, split: bool = False) -> None:
        self.strategy = strategy
        self.rank, self.size, self.split = strategy.global_rank, strategy.world_size, split
        self.bytes_sent = 0

    def gather(self, values: Tensor) -> Tensor:
        """See :meth:`Ranks.gather`; one collective."""
        self.bytes_sent += values.numel() * values.element_size()
        mine = values.to(self.strategy.root_device)
        table = mine.new_empty(self.size, mine.numel())
        # not the strategy's own all_gather, which goes through a part of torch that warns of its end
        torch.distributed.all_gather(list(table), mine)
        return table.to(values.device)


def ranks_of(strategy: Strategy) -> Ranks:
    """The processes of a strategy.

    Raises:
        MisconfigurationException: If the strategy shards the weights, or is not known.
    """
    if isinstance(strategy, DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy):  # which is a subclass
        return StrategyRanks(strategy, split=getattr(strategy, "split_directions", False))
    if isinstance(strategy, SingleDeviceStrategy):
        return Alone()
    raise MisconfigurationException(
        f"the strategy {type(strategy).__name__} is not supported, since forward passes need no sharded gradients or optimizer "
        "state; use strategy='zo_ddp' for several processes, or devices=1"
    )


def join(optimizer: ZerothOrder, strategy: Strategy) -> None:
    """Let an optimizer take its steps with the other processes of ``strategy``, with the first one's seed."""
    optimizer.ranks = ranks_of(strategy)
    seed = strategy.broadcast(optimizer.param_groups[0]["seed"])
    for group in (optimizer.defaults, *optimizer.param_groups):  # the defaults are for groups that are added later
        group["seed"] = seed
