"""Zeroth-order steps for a LightningModule that was written for backpropagation, through its public hooks alone."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from zo_lightning.callbacks.muting import Attributes, muted
from zo_lightning.callbacks.refusals import has_onlookers, refuse_changes
from zo_lightning.callbacks.schedule import Schedule
from zo_lightning.optim import GeometryMap, StepRule, ZerothOrder
from zo_lightning.optim.world import BufferChanges
from zo_lightning.strategies import join

__all__ = ["TakeOver", "give_rule"]


_HOOKS = ("training_step", "backward", "optimizer_step", "lr_scheduler_step")


class TakeOver:
    """Puts the probes into ``training_step``, and the update into the place of the module's own optimizer.

    The patched hooks are the instance's ``training_step``, ``backward`` (which does nothing), ``optimizer_step`` and
    ``lr_scheduler_step``. The optimizer that ``configure_optimizers`` makes is never stepped; it says which parameters are
    trained, and the learning-rate schedule. One evaluation of each batch is the user's: its logs, metrics and buffers (running
    statistics) stay. It is that of the step's first point. The others leave no trace.

    Args:
        trainer: The Trainer.
        module: The module.

    Attributes:
        optimizer: Takes the steps, once :meth:`start` has been called.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.optimizer: ZerothOrder | None = None
        self._trainer, self._module = trainer, module
        self._schedule: Schedule | None = None
        self._eager = False
        self._checked_in = -1  # an epoch
        self._before: dict[str, Any] = {}
        for name in _HOOKS:
            if name in vars(module):
                self._before[name] = vars(module)[name]
            vars(module)[name] = _Patch(self, name, getattr(module, name))

    # ---- set-up --------------------------------------------------------------------------------------------------------
    def start(
        self, make_optimizer: Callable[[Any], Any], geometry: Any, rule: StepRule, state: dict[str, Any] | None
    ) -> ZerothOrder:
        """Make the optimizer, once the module's own is there and the weights are on their device.

        Args:
            make_optimizer: Makes it from parameter groups.
            geometry: Rules for a :class:`~zo_lightning.optim.GeometryMap`; None leaves them to the optimizer.
            rule: Sets the sizes of the steps.
            state: What :meth:`state_dict` gave in the run that is resumed.

        Raises:
            MisconfigurationException: If there are several optimizers, or ``make_optimizer`` makes something else.
        """
        if len(self._trainer.optimizers) > 1:
            raise MisconfigurationException(
                f"AdaNAGED takes the place of one optimizer, {type(self._module).__name__}.configure_optimizers makes "
                f"{len(self._trainer.optimizers)}; return one over all parameters to train"
            )
        theirs = self._trainer.optimizers[0]
        chosen = {p for group in theirs.param_groups for p in group["params"]}
        named = [(n, p) for n, p in self._module.named_parameters() if p.requires_grad and (p in chosen or not chosen)]
        if not named:
            raise MisconfigurationException(
                "the module's optimizer has no parameter that requires a gradient: nothing to train"
            )
        self._wanted = {p for _, p in named}
        draft = make_optimizer(named)
        if not isinstance(draft, ZerothOrder):
            raise MisconfigurationException(f"AdaNAGED(optimizer=...) must make a ZerothOrder, got {type(draft).__name__}")
        rules = draft.geometry if geometry is None else GeometryMap(geometry, directions=draft.directions)
        self._schedule = Schedule(theirs)
        self.optimizer = make_optimizer(self._schedule.split(rules.split(named, self._module)))
        assert self.optimizer is not None
        give_rule(self.optimizer, rule)
        self.optimizer.attach(self._module)
        join(self.optimizer, self._trainer.strategy)
        self._eager = has_onlookers(self._trainer, self._module)
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self._schedule.load_state_dict(state["schedule"])
        return self.optimizer

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, and what learning rates are relative to."""
        assert self.optimizer is not None
        assert self._schedule is not None
        return {"optimizer": self.optimizer.state_dict(), "schedule": self._schedule.state_dict()}

    def undo(self) -> None:
        """Leave the module as it was; the weights hold every step."""
        for name in _HOOKS:
            if isinstance(vars(self._module).get(name), _Patch):
                del vars(self._module)[name]
                if name in self._before:
                    vars(self._module)[name] = self._before[name]
        if self.optimizer is not None:
            self.optimizer.detach()

    # ---- the patched hooks ---------------------------------------------------------------------------------------------
    def training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Probe on a batch; what the user's evaluation gave is returned."""
        optimizer = self.optimizer
        assert optimizer is not None
        assert self._schedule is not None
        output: Any = None
        changes: BufferChanges | None = None
        after: Attributes | None = None

        def closure() -> Tensor:
            nonlocal output, changes, after
            if optimizer.probing and changes is None:
                changes = BufferChanges(self._module)
                before = Attributes(self._module)
                output = original(*args, **kwargs)
                changes.take()
                after = Attributes(self._module)
                before.put_back()  # the other points see the module as this one did
                return _loss(output)
            with muted(self._trainer, self._module):
                return _loss(original(*args, **kwargs))

        if self._checked_in != self._trainer.current_epoch:
            refuse_changes(self._module, self._trainer.optimizers[0], optimizer, self._wanted)
            self._checked_in = self._trainer.current_epoch
        if optimizer.progress[1] == 0:
            self._schedule.apply(optimizer)
        try:
            loss = optimizer.accumulate(closure)
        except _NoLoss:
            if changes is None:  # it was found out while getting ready, which leaves no trace
                with torch.no_grad():
                    original(*args, **kwargs)
            else:
                changes.make(torch.zeros(()))
            return None
        finally:
            if after is not None:
                after.put_back()
        if changes is not None:
            changes.make(loss)
        return output

    def backward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Nothing: there is no gradient."""

    def optimizer_step(
        self, original: Callable[..., Any], epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Probe on the step's last batch, and update."""
        assert self.optimizer is not None
        optimizer_closure()
        theirs = self._trainer.optimizers[0]
        for callback in self._trainer.callbacks:  # type: ignore[attr-defined]
            callback.on_before_optimizer_step(self._trainer, self._module, theirs)
        self._module.on_before_optimizer_step(theirs)
        if self.optimizer.progress[1]:  # none if training_step gave no loss
            self.optimizer.step()
            if self._eager:
                self.optimizer.fold()

    def lr_scheduler_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Step the scheduler, without torch's remark that its optimizer has not been stepped."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step\\(\\)` before")
            return original(*args, **kwargs)


class _Patch:
    """A method of an instance that a :class:`TakeOver` answers. A deep copy of the instance has its own method again."""

    def __init__(self, owner: TakeOver, name: str, original: Callable[..., Any]) -> None:
        self._owner, self._name, self._original = owner, name, original
        functools.update_wrapper(self, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._owner, self._name)(self._original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        module = self._owner._module
        return types.MethodType(getattr(type(module), self._name), memo[id(module)])


class _NoLoss(Exception):  # noqa: N818
    """``training_step`` returned None, which skips the batch."""


def _loss(output: Any) -> Tensor:
    loss = output["loss"] if isinstance(output, dict) else output
    if loss is None:
        raise _NoLoss
    if isinstance(loss, Tensor) and loss.dtype in (torch.float16, torch.bfloat16):
        rank_zero_warn(
            f"training_step returns a loss in {loss.dtype}, too coarse for the small differences between the probes; compute "
            "the loss in float32: loss_function(logits.float(), target)"
        )
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(f"training_step must return a loss, a dictionary with one, or None, got {type(output)}")
    return loss


def give_rule(optimizer: ZerothOrder, rule: StepRule) -> None:
    """Let ``rule`` set the sizes of an optimizer's steps.

    Raises:
        MisconfigurationException: If the optimizer's steps are not normalised or it has a rule of its own.
    """
    if not optimizer.update.normalised:
        raise MisconfigurationException(
            f"AdaNAGED needs steps of unit norm, which update={optimizer.update.name!r} does not take; use update='lmo' or, "
            "for a method that has it, normalised=True"
        )
    if optimizer.step_rule is not None:
        raise MisconfigurationException("the optimizer has a step_rule of its own; leave it or AdaNAGED out")
    optimizer.step_rule = rule
