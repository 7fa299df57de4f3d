"""What a take-over cannot serve, or would silently ignore."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer

from zo_lightning.optim import ZerothOrder
from zo_lightning.strategies import ranks_of

__all__ = ["has_onlookers", "refuse", "refuse_changes"]


def refuse(trainer: Trainer, module: LightningModule, callback: Any) -> None:
    """Refuse early what a take-over cannot serve, or would silently ignore.

    Args:
        trainer: The Trainer.
        module: A module that is not a :class:`~zo_lightning.modules.ZOModule`.
        callback: The callback that is to take over.

    Raises:
        MisconfigurationException: With the reason, and what to do.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{name} uses manual optimization, whose steps only it knows; subclass zo_lightning.modules.ZOModule, or leave "
            "automatic_optimization on"
        )
    for hook in ("optimizer_step", "backward", "configure_gradient_clipping"):
        if is_overridden(hook, module):
            raise MisconfigurationException(
                f"{name}.{hook} would be ignored, since AdaNAGED steps without gradients; remove it"
            )
    if trainer.gradient_clip_val:
        raise MisconfigurationException(
            f"gradient_clip_val={trainer.gradient_clip_val} would be ignored, since there are no gradients, and steps have a "
            "length of their own; leave it out"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise MisconfigurationException(
            f"{name}.training_step takes a dataloader_iter, whose batches cannot be evaluated twice; let it take a batch"
        )
    callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
    for other in callbacks[callbacks.index(callback) + 1 :]:
        if isinstance(other, (StochasticWeightAveraging, WeightAveraging)):
            raise MisconfigurationException(
                f"{type(other).__name__} copies the module in its setup; put it before AdaNAGED in the list of callbacks"
            )
    if any(isinstance(other, LearningRateFinder) for other in callbacks):
        raise MisconfigurationException(
            "LearningRateFinder has nothing to find, since AdaNAGED needs no learning rate; remove it"
        )
    for other in callbacks:
        if isinstance(other, BatchSizeFinder):
            raise MisconfigurationException(
                f"{type(other).__name__} tries steps before AdaNAGED is ready; find the batch size with a Trainer of its own"
            )
        if isinstance(other, (BaseFinetuning, ModelPruning)):
            raise MisconfigurationException(
                f"{type(other).__name__} changes during the run which parameters there are to train, and AdaNAGED trains those "
                "that were at its start; use one Trainer.fit for each stage"
            )
    ranks_of(trainer.strategy)


def refuse_changes(
    module: LightningModule, theirs: Optimizer, optimizer: ZerothOrder, wanted: Collection[nn.Parameter]
) -> None:
    """Refuse, in the middle of a run, what changes which parameters there are to train.

    Args:
        module: The module.
        theirs: The optimizer that the module has made; one without parameters stands for all.
        optimizer: The one that takes the steps.
        wanted: The parameters that were to be trained when the run began.

    Raises:
        MisconfigurationException: If one has been unfrozen, frozen or replaced.
    """
    name = type(module).__name__
    chosen = {p for group in theirs.param_groups for p in group["params"]}
    trained = {p: n for n, p in optimizer.named_parameters().items()}
    for n, p in module.named_parameters():
        if p.requires_grad and (p in chosen or not chosen) and p not in wanted:
            raise MisconfigurationException(
                f"{n!r} of {name} has become trainable during the run, and AdaNAGED trains those parameters that were at its "
                "start; unfreeze it before, or go on in a second Trainer.fit"
            )
        if p in trained and not p.requires_grad:
            raise MisconfigurationException(
                f"{n!r} of {name} has been frozen during the run; freeze it before, or go on in a second Trainer.fit"
            )
    named = dict(module.named_parameters())
    for p, n in trained.items():
        if named.get(n) is not p:
            raise MisconfigurationException(
                f"{n!r} of {name} has been replaced during the run (by pruning, say) and would be trained no longer; replace "
                "it before, or go on in a second Trainer.fit"
            )


def has_onlookers(trainer: Trainer, module: LightningModule) -> bool:
    """Whether somebody may read the weights between two steps: then every step is written into them at once."""
    hooks = (
        "on_train_batch_end",
        "on_train_batch_start",
        "on_before_zero_grad",
        "on_after_backward",
        "on_before_optimizer_step",
    )
    if any(is_overridden(hook, module) for hook in hooks):
        return True
    ours = ("lightning.", "pytorch_lightning.", "zo_lightning.")
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return any(
        isinstance(callback, (StochasticWeightAveraging, WeightAveraging)) or not type(callback).__module__.startswith(ours)
        for callback in callbacks
    )
