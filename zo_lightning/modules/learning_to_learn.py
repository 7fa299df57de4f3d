"""The training phase of ZO Fine-tuner, as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from zo_lightning.data import MultiTaskDataModule
from zo_lightning.modules.classification import CausalLMClassificationModule
from zo_lightning.modules.errors import CheckpointError
from zo_lightning.modules.restarts import Restarts
from zo_lightning.optim import NonFiniteLossError, ScaleLearner
from zo_lightning.optim.randomness import generator

__all__ = ["FineTunerTraining"]

_WIDE = ("32-true", "64-true", "bf16-mixed")


class FineTunerTraining(CausalLMClassificationModule):
    """Learns the scales of ZO Fine-tuner along a first-order fine-tune of the model (ZO Fine-tuner, 2025).

    Each batch first teaches the networks (:class:`~zo_lightning.optim.ScaleLearner`), then moves the model by its true
    gradient, and every ``epochs_per_restart`` epochs the model goes back to where it began. With a
    :class:`~zo_lightning.data.MultiTaskDataModule` a step does so for each task, in an order drawn anew, with scales and losses
    of its own. Two forwards and two forwards with a backward pass for each batch; memory for four copies of the weights, and
    for one on the CPU.

    The networks are written to ``finetuner.safetensors`` in the log folder with every checkpoint and at the end, for
    ``--model.optimizer.init_args.networks``. Logs ``meta/loss``, the loss after the zeroth-order step that is learned from,
    mean, least and largest scale as ``meta/sigma_*``, and ``train/loss`` of the model itself.

    Args:
        model_name_or_path: A folder or a name on the Hugging Face hub; ``quickstart`` is the tiny model of this package.
        lr_update: η_u, the learning rate of the zeroth-order step, as it is to be in use.
        lr_mlp: η_φ, that of the networks.
        lr_llm: That of the model; it falls to zero until the next restart.
        epochs_per_restart: Epochs until the model goes back to where it began.
        smoothing: ε of the probes.
        mlp_optimizer: ``sgd``, as published, or ``adam``, whose steps do not shrink with η_u.
        momentum: Of the model's steps.
        max_grad_norm: The norm to which the model's gradient is clipped.
        refresh: Steps between two looks at the weights' means and variances.
        embedding_rows: Rows of an embedding that count in the normaliser; None for all.
        seed: Of directions, of networks as they begin, and of the tasks' order.
        max_nonfinite: This many batches in a row with a loss that is NaN or infinite end the run.
        dropout: Whether the model's dropout is active in its own steps. The networks always see the model without it.
        length_normalised: See :class:`CausalLMClassificationModule`.
        num_classes: See :class:`CausalLMClassificationModule`.
        trust_remote_code: Whether code that comes with the model may run.
        attn_implementation: Passed to transformers, for example ``sdpa``.
        peft: An adapter, whose weights alone then get networks.

    Attributes:
        learner: The learner, once :meth:`configure_model` has run.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        model_name_or_path: str = "facebook/opt-1.3b",
        lr_update: float = 1e-6,
        lr_mlp: float = 1e-3,
        lr_llm: float = 1e-5,
        epochs_per_restart: int = 4,
        smoothing: float = 1e-3,
        mlp_optimizer: Literal["sgd", "adam"] = "sgd",
        momentum: float = 0.8,
        max_grad_norm: float = 1.0,
        refresh: int = 1,
        embedding_rows: int | None = None,
        seed: int = 0,
        max_nonfinite: int = 10,
        dropout: bool = True,
        length_normalised: bool = True,
        num_classes: int | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        peft: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            model_name_or_path,
            dropout=dropout,
            length_normalised=length_normalised,
            num_classes=num_classes,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            peft=peft,
            first_order=True,
        )
        for argument, value in {"epochs_per_restart": epochs_per_restart, "max_nonfinite": max_nonfinite}.items():
            if value < 1:
                raise ValueError(f"{argument} must be at least 1, got {value}")
        if lr_llm < 0 or max_grad_norm <= 0 or not 0 <= momentum < 1:
            raise ValueError(
                "lr_llm must be >= 0, max_grad_norm > 0 and momentum in [0, 1), got "
                f"lr_llm={lr_llm}, max_grad_norm={max_grad_norm}, momentum={momentum}"
            )
        self.lr_llm, self.momentum, self.max_grad_norm = lr_llm, momentum, max_grad_norm
        self.epochs_per_restart, self.seed, self.max_nonfinite = epochs_per_restart, seed, max_nonfinite
        self._learner_options = {
            "lr": lr_update,
            "smoothing": smoothing,
            "network_lr": lr_mlp,
            "network_optimizer": mlp_optimizer,
            "seed": seed,
            "refresh": refresh,
            "embedding_rows": embedding_rows,
        }
        self.learner: ScaleLearner | None = None
        self._restarts: Restarts | None = None
        self._nonfinite = 0

    # ---- set-up --------------------------------------------------------------------------------------------------------
    def setup(self, stage: str) -> None:
        """See :meth:`CausalLMClassificationModule.setup`.

        Raises:
            MisconfigurationException: For weights in half precision, which lose the steps of the model, and for several
                processes.
        """
        if stage == "fit" and self.trainer.precision not in _WIDE:
            raise MisconfigurationException(
                f"precision {self.trainer.precision!r}: the steps of learning to learn are smaller than what half-precision "
                f"weights resolve; use one of {', '.join(_WIDE)}"
            )
        if stage == "fit" and self.trainer.world_size > 1:
            raise MisconfigurationException("the training phase of ZO Fine-tuner runs in one process: use devices=1")
        super().setup(stage)

    def configure_model(self) -> None:
        """Load the model, keep its trainable weights to restart from, and make the networks."""
        super().configure_model()
        if self.learner is None:
            assert self.model is not None
            named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            self._restarts = Restarts(list(named.values()), self.epochs_per_restart)
            self.learner = ScaleLearner(named, **self._learner_options)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD for the model; the networks have an optimizer of their own."""
        return torch.optim.SGD(self._trained(), lr=self.lr_llm, momentum=self.momentum)

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    # ---- a step --------------------------------------------------------------------------------------------------------
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Learn from the batch, of each task, and move the model."""
        assert self.learner is not None
        assert self.model is not None
        assert self._restarts is not None
        if self._restarts.begin(self.trainer.current_epoch):  # networks, scales and losses stay
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()  # a fresh one has no momentum
            self.learner.look_again()
        tasks: dict[str, Any] = batch if all(isinstance(part, Mapping) for part in batch.values()) else {"": batch}
        names = list(tasks)
        order = torch.randperm(len(names), generator=generator(self.seed, self.trainer.global_step, "tasks")).tolist()
        losses, seen = [], {}
        for number, place in enumerate(order):
            part = tasks[names[place]]
            self.model.eval()
            seen[names[place]] = self.learner.step(partial(self.loss, part), names[place])
            losses.append(self._move_model(part, len(names), last=number == len(names) - 1))
        self._count_nonfinite(all(step.finite for step in seen.values()))
        scales = torch.tensor([step.sigma for step in seen.values()])
        values = {f"meta/sigma_{kind}": float(getattr(scales, kind)()) for kind in ("mean", "min", "max")}
        values["meta/loss"] = sum(step.loss for step in seen.values()) / len(seen)
        if len(seen) > 1:
            values |= {f"meta/loss/{name}": step.loss for name, step in seen.items()}
        self.log_dict(values, batch_size=1)
        loss = torch.stack(losses).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        return loss

    def _move_model(self, batch: Any, tasks: int, *, last: bool) -> Tensor:
        """One step of SGD with the true gradient; the last one of a batch is the one that Lightning counts."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        assert self.model is not None
        assert self._restarts is not None
        self.model.train(self.dropout)
        loss = self.loss(batch).mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self._trained(), self.max_grad_norm)
        rate = self.lr_llm * self._restarts.take(int(self.trainer.num_training_batches) * tasks)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if loss.isfinite() and norm.isfinite():
            (optimizer if last else optimizer.optimizer).step()
        elif last:  # a step all the same for what counts steps
            optimizer.zero_grad()
            optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def _count_nonfinite(self, finite: bool) -> None:
        self._nonfinite = 0 if finite else self._nonfinite + 1
        if self._nonfinite >= self.max_nonfinite:
            raise NonFiniteLossError(
                f"the loss was NaN or infinite in {self._nonfinite} batches in a row; the rates are too large "
                f"(lr_llm={self.lr_llm}, lr_update={self._learner_options['lr']}), or the data or the model are at fault"
            )

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """How far the model's own fine-tune has come; with several tasks the loss of each."""
        if isinstance(self.trainer.val_dataloaders, list) and len(self.trainer.val_dataloaders) > 1:
            losses = self.loss(batch)
            data = getattr(self.trainer, "datamodule", None)
            names = list(data.members) if isinstance(data, MultiTaskDataModule) else []
            name = names[dataloader_idx] if names else f"dataloader_idx_{dataloader_idx}"
            self.log(f"val/loss/{name}", losses.mean(), batch_size=losses.numel(), add_dataloader_idx=False)
        else:
            super().validation_step(batch, batch_idx)

    # ---- what is left of it --------------------------------------------------------------------------------------------
    def on_fit_end(self) -> None:
        """Write the networks."""
        path = self._write()
        if path is not None:
            rank_zero_info(f"wrote {path}, for --model.optimizer.init_args.networks")

    def _write(self) -> Path | None:
        trainer = self._trainer
        if trainer is None or self.learner is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        path = Path(trainer.log_dir or trainer.default_root_dir) / "finetuner.safetensors"
        self.learner.networks.save(path)
        return path

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the networks and where the run is, and write them beside it."""
        super().on_save_checkpoint(checkpoint)
        assert self.learner is not None
        assert self._restarts is not None
        checkpoint["finetuner"] = {
            "learner": self.learner.state_dict(),
            "restarts": self._restarts.state_dict(),
            "nonfinite": self._nonfinite,
        }
        self._write()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: If it is not of such a run.
        """
        super().on_load_checkpoint(checkpoint)
        if "finetuner" not in checkpoint:
            raise CheckpointError("the checkpoint is not one of a training phase of ZO Fine-tuner")
        self.configure_model()  # load_from_checkpoint has not done so yet
        assert self.learner is not None
        assert self._restarts is not None
        state = checkpoint["finetuner"]
        self.learner.load_state_dict(state["learner"])
        self._restarts.load_state_dict(state["restarts"])
        self._nonfinite = int(state["nonfinite"])
