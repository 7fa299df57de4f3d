"""A strategy for several processes without gradient buckets."""

from __future__ import annotations

from collections.abc import Iterable
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
    for bit. Buffers that training changes (running statistics) are each process's own; before a validation and at the end
    of training all take those of the first, which are the ones that a checkpoint holds. The registered names
    ``zo_ddp_spawn``, ``zo_ddp_fork`` and ``zo_ddp_notebook`` start processes as ``ddp_spawn`` and its kin do.

    Args:
        split_directions: Each process probes along directions of its own, and a step averages over all of them: more
            directions for the same forwards, each from a smaller batch.
        **kwargs: See :class:`~lightning.pytorch.strategies.DDPStrategy`.
    """

    def __init__(self, split_directions: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.split_directions = split_directions

    def configure_ddp(self) -> None:
        """Take the first process's weights and buffers, and wrap nothing."""
        assert self.model is not None
        self._take(chain(self.model.parameters(), self.model.buffers()))

    def on_validation_start(self) -> None:
        """Validate with the first process's buffers."""
        self._take_buffers()

    def on_train_end(self) -> None:
        """End with the first process's buffers."""
        self._take_buffers()

    def _take_buffers(self) -> None:
        assert self.model is not None
        self._take(self.model.buffers())

    @torch.no_grad()
    def _take(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if not tensor.is_meta and tensor.numel():
                _broadcast(tensor.detach(), self.root_device)

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


def _broadcast(tensor: Tensor, device: torch.device) -> None:
    """As bytes, on the device that the backend knows: not every backend knows every dtype."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:  # expanded: one element in memory
            tensor = tensor.narrow(dim, 0, 1)
    whole = tensor.to(device).contiguous()
    torch.distributed.broadcast(whole.view(-1).view(torch.uint8), src=0)
    if whole.data_ptr() != tensor.data_ptr():
        tensor.copy_(whole)


if "zo_ddp" not in StrategyRegistry:
    ZODDPStrategy.register_strategies(StrategyRegistry)
