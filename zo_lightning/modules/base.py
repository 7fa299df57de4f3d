"""The LightningModule that trains with forward passes only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from zo_lightning.data import repeat_batch
from zo_lightning.modules.errors import ModelError
from zo_lightning.optim import GeometryMap, ZerothOrder
from zo_lightning.optim.groups import GeometrySpec
from zo_lightning.optim.world import BufferChanges
from zo_lightning.strategies import join, ranks_of

__all__ = ["ZOModule"]


class ZOModule(LightningModule):
    """Base class: override :meth:`loss`, and the Trainer fine-tunes with forward passes only.

    Each batch is one call of ``self.optimizers().step(closure)``, so that ``max_steps``, the progress bar,
    ``ModelCheckpoint`` and resuming count batches. Learning-rate schedulers are stepped here, as Lightning leaves them
    to the module under manual optimization::

        class Regression(ZOModule):
            def __init__(self):
                super().__init__()
                self.net = nn.Linear(3, 1)

            def loss(self, batch):
                x, y = batch
                return (self.net(x) - y).square().mean(dim=1)  # per example, or a scalar

        Trainer(max_steps=500, callbacks=[AdaNAGED()]).fit(Regression(), loader)

    Note:
        Lightning runs ``on_before_optimizer_step`` hooks after each evaluation of a single batch's loss: several times in a
        step whose probes run one after the other, and not where they run as one forward.

    Args:
        optimizer: Makes the :class:`~zo_lightning.optim.ZerothOrder` from parameter groups; None is one with its own defaults.
        lr_scheduler: Makes a scheduler from the optimizer. It scales the step size of the parameter-free rule too.
        lr_scheduler_interval: Whether the scheduler is stepped after each ``"step"`` or ``"epoch"``.
        first_order: Train by backpropagation in place of forward passes, as the reference that methods are compared with;
            ``optimizer`` is then any of torch's.
        accumulate_grad_batches: Batches that make one step, as the argument of the Trainer, which Lightning keeps to automatic
            optimization. Each is probed at the same points and only the losses are kept; the last batches of an epoch make a
            step of their own.

    Raises:
        ValueError: If ``accumulate_grad_batches`` is less than 1.

    Attributes:
        geometry: Rules that a callback hands over in its ``setup``; they replace those of the optimizer.
        f_high: An upper bound of the loss, where it counts decisions, for the parameter-free rule; else None.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["step", "epoch"] = "step",
        accumulate_grad_batches: int = 1,
        first_order: bool = False,
    ) -> None:
        super().__init__()
        if accumulate_grad_batches < 1:
            raise ValueError(f"accumulate_grad_batches must be at least 1, got {accumulate_grad_batches}")
        self.accumulate_grad_batches = accumulate_grad_batches
        self.first_order = first_order
        self.automatic_optimization = False
        self.geometry: Mapping[str, GeometrySpec] | None = None
        self.f_high: float | None = None
        self._make_optimizer: OptimizerCallable = optimizer or ZerothOrder
        self._make_lr_scheduler = lr_scheduler
        self._lr_scheduler_interval = lr_scheduler_interval

    def loss(self, batch: Any) -> Tensor:
        """The loss of a batch: a scalar, or one loss per example (any shape), which makes better estimates possible.

        It is called several times per step, under ``no_grad``, with the same random numbers each time.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `loss(self, batch)`")

    def setup(self, stage: str) -> None:
        """Refuse what does not work without gradients or has no meaning.

        Raises:
            MisconfigurationException: For 16-bit mixed precision, and for strategies that shard the weights.
        """
        if stage != "fit":
            return
        if self.trainer.precision == "16-mixed":
            raise MisconfigurationException(
                "precision '16-mixed' scales gradients, and there are none here; use 'bf16-mixed', 'bf16-true' or '16-true'"
            )
        ranks_of(self.trainer.strategy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One :class:`~zo_lightning.optim.ZerothOrder` over the trainable parameters, grouped by geometry.

        Raises:
            MisconfigurationException: If ``optimizer`` makes something else (with ``first_order``, a zeroth-order one), cannot
                take a step of several batches, or the scheduler needs a metric.
        """
        if self.first_order:
            return self._with_scheduler(self._made([p for p in self.parameters() if p.requires_grad]))
        # the directions decide which geometries are the default, and only the optimizer knows them: hence a draft first
        draft = self._optimizer_over([(name, p) for name, p in self.named_parameters() if p.requires_grad])
        rules = draft.geometry if self.geometry is None else GeometryMap(self.geometry, directions=draft.directions)
        optimizer = self._optimizer_over(rules.split(self.named_parameters(), self)).attach(self)
        if optimizer.scheme.whole and self.accumulate_grad_batches > 1:
            raise MisconfigurationException(
                f"{type(optimizer).__name__} needs the whole batch at once: use accumulate_grad_batches=1 and a larger batch, "
                f"got accumulate_grad_batches={self.accumulate_grad_batches}"
            )
        return self._with_scheduler(optimizer)

    def _with_scheduler(self, optimizer: torch.optim.Optimizer) -> OptimizerLRScheduler:
        if self._make_lr_scheduler is None:
            return optimizer
        scheduler = self._make_lr_scheduler(optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise MisconfigurationException("ReduceLROnPlateau is not supported: use a scheduler that needs no metric")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self._lr_scheduler_interval}}

    def on_fit_start(self) -> None:
        """Join the other processes, and check the weights, so that a broken checkpoint is found before the first step.

        Raises:
            ModelError: If a weight is NaN or infinite.
        """
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, ZerothOrder):
                join(optimizer, self.trainer.strategy)
        # those that accelerate brings along, or that are quantised, hold nothing to look at here
        named = {name: p for name, p in self.named_parameters() if p.is_floating_point() and not p.is_meta}
        finite = torch.stack([p.detach().isfinite().all().to(self.device) for p in named.values()]).tolist()
        broken = [name for name, good in zip(named, finite, strict=True) if not good]
        if broken:
            raise ModelError(
                f"the weights hold NaN or infinite values in {broken[0]!r}"
                f"{f' and {len(broken) - 1} more' if len(broken) > 1 else ''}; load a sound checkpoint"
            )

    # no_grad rather than inference_mode: buffers made here are changed later
    @torch.no_grad()
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step of the optimizer; logs ``train/loss``, the mean loss at the probes.

        Buffers that the forward changes (running statistics) change once, as by the evaluation at the step's first point.
        """
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        complete = (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        if self.first_order:
            return self._backpropagate(optimizer, batch, batch_idx, complete)
        zeroth_order = optimizer.optimizer
        assert isinstance(zeroth_order, ZerothOrder)
        closure, stacked = self.closures(batch)
        examples = 1
        changes: BufferChanges | None = None

        def counted() -> Tensor:
            nonlocal examples, changes
            first = changes is None and zeroth_order.probing
            if first:
                changes = BufferChanges(self)
            losses = closure()
            if first and changes is not None:
                changes.take()
            examples = losses.numel()
            return losses

        def counted_stack(copies: int) -> Tensor | None:
            nonlocal examples
            losses = stacked(copies)
            examples = 1 if losses is None else losses.numel() // copies
            return losses

        if complete:
            loss = optimizer.step(counted, stacked=counted_stack)
        else:
            loss = zeroth_order.accumulate(counted, stacked=counted_stack)
        if changes is not None:
            changes.make(loss)
        self.log("train/loss", loss, prog_bar=True, batch_size=examples)
        if complete:
            self._step_lr_schedulers("step", self.trainer.global_step)
        return loss

    def _backpropagate(self, optimizer: LightningOptimizer, batch: Any, batch_idx: int, complete: bool) -> Tensor:
        """A step by gradients; those of the batches that make one add up to their mean."""
        first = batch_idx - batch_idx % self.accumulate_grad_batches
        parts = min(self.accumulate_grad_batches, self.trainer.num_training_batches - first)  # fewer at an epoch's end
        with torch.enable_grad():
            losses = self.loss(batch)
            loss = losses.float().mean()
            self.manual_backward(loss / parts)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=losses.numel())
        if complete:
            optimizer.step()
            optimizer.zero_grad()
            self._step_lr_schedulers("step", self.trainer.global_step)
        return loss.detach()

    def closures(self, batch: Any) -> tuple[Callable[[], Tensor], Callable[[int], Tensor | None]]:
        """The loss of a batch for the optimizer: as it is, and of several copies of it in one forward."""
        repeated: dict[int, Any] = {}

        def stacked(copies: int) -> Tensor | None:
            if copies not in repeated:
                repeated[copies] = self.repeat_batch(batch, copies)
            return None if repeated[copies] is None else self.loss(repeated[copies])

        return lambda: self.loss(batch), stacked

    def repeat_batch(self, batch: Any, copies: int) -> Any | None:
        """``copies`` of a batch one after the other, for probes that run as one forward.

        Override it where the batch is more than tensors whose first dimension is that of the examples. The optimizer compares
        the losses with those of single batches before it trusts them.

        Returns:
            The batch, or None if it cannot be repeated, as where its tensors differ in their first dimension.
        """
        return repeat_batch(batch, copies)

    def on_fit_end(self) -> None:
        """Write what is pending of the update into the weights."""
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, ZerothOrder):
                optimizer.detach()

    def on_train_epoch_end(self) -> None:
        """Step the schedulers whose interval is an epoch."""
        self._step_lr_schedulers("epoch", self.trainer.current_epoch + 1)

    def _step_lr_schedulers(self, interval: str, count: int) -> None:
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == interval and count % config.frequency == 0:
                config.scheduler.step()  # type: ignore[call-arg]  # none that needs a metric, see configure_optimizers

    def _optimizer_over(self, params: list[Any]) -> ZerothOrder:
        optimizer = self._made(params)
        assert isinstance(optimizer, ZerothOrder)
        return optimizer

    def _made(self, params: list[Any]) -> torch.optim.Optimizer:
        if not params:
            raise ModelError(f"{type(self).__name__} has no trainable parameter: all are frozen (requires_grad=False)")
        optimizer = self._make_optimizer(params)
        if self.first_order and isinstance(optimizer, ZerothOrder):
            raise MisconfigurationException(
                "first_order=True trains by backpropagation: the optimizer must be one of torch's, such as torch.optim.AdamW, "
                f"got {type(optimizer).__name__}"
            )
        if not self.first_order and not isinstance(optimizer, ZerothOrder):
            raise MisconfigurationException(
                f"the optimizer must be zo_lightning.optim.ZerothOrder or a subclass, got {type(optimizer).__name__}; "
                "first_order=True trains by backpropagation with it"
            )
        return optimizer
