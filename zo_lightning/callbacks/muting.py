"""Run a training step of somebody else's module so that nothing of it remains but its loss."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

__all__ = ["muted"]

_PLAIN = (bool, int, float, str, type(None))
_CONTAINERS = (list, dict, set, deque)
# what every module has, and what Lightning keeps of its own in one
_NOT_THE_USERS = set(vars(nn.Module())) | set(vars(LightningModule()))


@contextmanager
def muted(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Within this context what the module logs is lost, and afterwards its metrics and its own attributes are what they were.

    That is ``self.log`` and ``self.log_dict``, the loggers (as in ``self.logger.experiment.add_image(...)``), torchmetrics
    anywhere in the module, and the numbers, tensors and containers among the LightningModule's attributes (as in
    ``self.outputs.append(loss)``). Buffers are the optimizer's affair.

    Args:
        trainer: Whose loggers are silent.
        module: The module.
    """
    owners = [m for m in module.modules() if isinstance(m, (Metric, MetricCollection))]
    kept = [_Kept(module, _NOT_THE_USERS), *(_Kept(owner, set(vars(nn.Module()))) for owner in owners)]
    names = [name for name in ("log", "log_dict") if name not in vars(module)]
    loggers = trainer.loggers
    for name in names:
        vars(module)[name] = _nothing
    trainer.loggers = [DummyLogger()] if loggers else []
    try:
        yield
    finally:
        trainer.loggers = loggers
        for name in names:
            vars(module).pop(name, None)
        for attributes in kept:
            attributes.put_back()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Take the place of ``self.log``."""


class _Kept:
    """The attributes of an object that hold plain values, and what these were.

    Args:
        owner: The object.
        others: Names of attributes that are not looked at.
    """

    def __init__(self, owner: nn.Module, others: set[str]) -> None:
        self._owner, self._others = owner, others
        self._values = {name: (value, _copy(value)) for name, value in self._looked_at().items()}

    def _looked_at(self) -> dict[str, Any]:
        kinds = (*_PLAIN, *_CONTAINERS, Tensor)
        return {k: v for k, v in vars(self._owner).items() if k not in self._others and isinstance(v, kinds)}

    def put_back(self) -> None:
        """Give every attribute its value, in the same object: others may refer to it."""
        for name in self._looked_at().keys() - self._values.keys():
            del vars(self._owner)[name]
        for name, (value, copy) in self._values.items():
            _restore(value, copy)
            vars(self._owner)[name] = value


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if isinstance(value, _CONTAINERS) else value


def _restore(value: Any, copy: Any) -> None:
    if isinstance(value, Tensor):
        value.detach().copy_(copy)
    elif isinstance(value, (list, deque)):
        value.clear()
        value.extend(copy)
    elif isinstance(value, (dict, set)):
        value.clear()
        value.update(copy)
