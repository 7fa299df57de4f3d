"""Run a training step of somebody else's module so that nothing of it remains but its loss."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from zo_lightning.optim.world import each_once

__all__ = ["Attributes", "muted"]

_PLAIN = (bool, int, float, str, type(None))
_CONTAINERS = (list, dict, set, deque)
_FEW = 100  # entries of a list up to which tensors in it may be counters, rather than outputs that are collected
_OF_EVERY_MODULE = set(vars(nn.Module()))
_OF_EVERY_LIGHTNING_MODULE = _OF_EVERY_MODULE | set(vars(LightningModule()))


@contextmanager
def muted(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Within this context what the module logs is lost, and afterwards its metrics and its own attributes are what they were.

    That is ``self.log`` and ``self.log_dict``, the loggers (as in ``self.logger.experiment.add_image(...)``), torchmetrics
    anywhere in the module, and the numbers, tensors and containers, nested ones too, among the LightningModule's attributes (as
    in ``self.outputs.append(loss)``). Tensors in a list of more than a hundred are taken for outputs that nobody changes in
    place. Buffers are the optimizer's affair.

    Args:
        trainer: Whose loggers are silent.
        module: The module.
    """
    kept = Attributes(module)
    rates = [(group, group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups if "lr" in group]
    own: dict[str, Any] = {name: vars(module)[name] for name in ("log", "log_dict") if name in vars(module)}
    loggers = trainer.loggers
    vars(module).update(log=_nothing, log_dict=_nothing)
    trainer.loggers = [DummyLogger()] if loggers else []
    try:
        yield
    finally:
        trainer.loggers = loggers
        for name in ("log", "log_dict"):
            vars(module).pop(name, None)
        vars(module).update(own)
        for group, rate in rates:
            group["lr"] = rate
        kept.put_back()


class Attributes:
    """What the metrics anywhere in a module, and its own attributes, are now."""

    def __init__(self, module: LightningModule) -> None:
        owners = [m for m in module.modules() if isinstance(m, (Metric, MetricCollection))]
        self._kept = [_Kept(module, _OF_EVERY_LIGHTNING_MODULE), *(_Kept(owner, _OF_EVERY_MODULE) for owner in owners)]

    def put_back(self) -> None:
        """Let them be that again."""
        for attributes in self._kept:
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
        self._values = self._looked_at()
        self._notes: dict[int, tuple[Any, Any]] = {}
        for value in self._values.values():
            _note(value, self._notes)

    def _looked_at(self) -> dict[str, Any]:
        kinds = (*_PLAIN, *_CONTAINERS, tuple, Tensor, np.ndarray)
        return {k: v for k, v in vars(self._owner).items() if k not in self._others and isinstance(v, kinds)}

    def put_back(self) -> None:
        """Give every attribute its value, in the same object: others may refer to it."""
        for value, copy in self._notes.values():
            _restore(value, copy)
        for name in self._looked_at().keys() - self._values.keys():
            del vars(self._owner)[name]
        vars(self._owner).update(self._values)


def _note(value: Any, notes: dict[int, tuple[Any, Any]]) -> None:
    """Copy whatever can be changed in place, at every depth: each object once, so that what refers to it still does."""
    if id(value) in notes:
        return
    if isinstance(value, Tensor):
        notes[id(value)] = value, each_once(value.detach()).clone()
    elif isinstance(value, np.ndarray):
        notes[id(value)] = value, value.copy()
    elif isinstance(value, _CONTAINERS):
        plain = dict if isinstance(value, dict) else set if isinstance(value, set) else list
        notes[id(value)] = value, plain(value)
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, (list, deque, tuple)) else ()
    collected = isinstance(value, (list, deque)) and len(value) > _FEW
    for entry in entries:
        if isinstance(entry, (*_CONTAINERS, tuple, np.ndarray)) or (isinstance(entry, Tensor) and not collected):
            _note(entry, notes)


def _restore(value: Any, copy: Any) -> None:
    if isinstance(value, Tensor):
        each_once(value.detach()).copy_(copy)
    elif isinstance(value, np.ndarray):
        if value.flags.writeable:
            value[...] = copy
    elif isinstance(value, (list, deque)):
        value.clear()
        value.extend(copy)
    elif isinstance(value, set):
        value.clear()
        value.update(copy)
    elif isinstance(value, dict):
        value.clear()
        for key, entry in copy.items():  # not `update`, which transformers' outputs forbid
            value[key] = entry
