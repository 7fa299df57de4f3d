"""A strategy for several processes without gradient buckets."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor

__all__ = ["ZODDPStrategy"]


class ZODDPStrategy(DDPStrategy):
    """Data parallelism for forward-only training: ``Trainer(strategy="zo_ddp", devices=2)``.

    The weights are broadcast once. The module is not wrapped in ``DistributedDataParallel``, whose buckets take the memory
    of all gradients. What the processes tell each other is the optimizer's: some ten numbers per step. Each evaluates its
    own part of the data along the same directions, so that a step is that of the joint batch, and all weights stay equal bit
    for bit. The registered names ``zo_ddp_spawn``, ``zo_ddp_fork`` and ``zo_ddp_notebook`` start processes as ``ddp_spawn``
    and its kin do.

    Args:
        split_directions: Each process probes along a direction of its own, and a step averages over all of them: more
            directions for the same forwards, each from a smaller batch.
        **kwargs: See :class:`~lightning.pytorch.strategies.DDPStrategy`.
    """

    def __init__(self, split_directions: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.split_directions = split_directions

    def configure_ddp(self) -> None:
        """Take the first process's weights and buffers, and wrap nothing."""
        assert self.model is not None
        with torch.no_grad():
            for tensor in chain(self.model.parameters(), self.model.buffers()):
                if not tensor.is_meta:
                    _broadcast(tensor.detach())

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register the names."""
        for name, method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
            strategy_registry.register(
                f"zo_ddp{name}",
                cls,
                description=f"Forward-only data parallelism with `start_method` '{method}'",
                start_method=method,
            )


def _broadcast(tensor: Tensor) -> None:
    """As bytes: not every backend knows every dtype."""
    whole = tensor.contiguous()
    torch.distributed.broadcast(whole.view(-1).view(torch.uint8), src=0)
    if whole.data_ptr() != tensor.data_ptr():
        tensor.copy_(whole)


if "zo_ddp" not in StrategyRegistry:
    ZODDPStrategy.register_strategies(StrategyRegistry)
