"""Classification by prompting: a decoder scores the verbalisers of each class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from zo_lightning.data import repeat_scoring_batch
from zo_lightning.modules.adapters import is_prompt_learning
from zo_lightning.modules.language_model import LanguageModelModule
from zo_lightning.modules.scoring import candidate_scores, classification_losses

__all__ = ["CausalLMClassificationModule"]


class CausalLMClassificationModule(LanguageModelModule):
    """A causal language model that classifies by the likelihood of each class's candidate text.

    The batches are those of :class:`~zo_lightning.data.PromptClassificationDataModule`. Logits are computed at the scored
    positions only; losses are float32 from the logits on. Logs ``train/loss``, and ``loss``, ``acc`` and (macro) ``f1``
    under ``val/`` and ``test/``.

    Args:
        model_name_or_path: A folder or a name on the Hugging Face hub; ``quickstart`` is the tiny model of this package.
        dropout: Whether the model's dropout (an adapter's too) is active in training. All probes of a step see the same mask.
        length_normalised: Whether a candidate's log-likelihood is divided by its number of tokens.
        num_classes: For the metrics; None asks the datamodule.
        trust_remote_code: Whether code that comes with the model may run.
        attn_implementation: Passed to transformers, for example ``sdpa``.
        peft: An adapter to train in place of the model, as ``peft.get_peft_config`` takes it:
            ``{peft_type: LORA, r: 8, target_modules: [q_proj, v_proj]}``.
        quantization: Arguments of ``transformers.BitsAndBytesConfig``: ``{load_in_8bit: true}``; needs ``peft``.
        device_map: Which part of the model lies where, as transformers takes it: ``auto``, or a device for each module;
            needs ``peft``.
        max_memory: For ``auto``: how much each device may hold, as in ``{0: 6GiB, cpu: 30GiB}``.
        offload_folder: Where accelerate writes what is kept on the disk.
        optimizer: See :class:`ZOModule`.
        lr_scheduler: See :class:`ZOModule`.
        lr_scheduler_interval: See :class:`ZOModule`.
        accumulate_grad_batches: See :class:`ZOModule`.
        first_order: See :class:`ZOModule`.

    Attributes:
        model: The language model, or the ``peft.PeftModel`` around it, once :meth:`configure_model` has run.
    """

    #: What to keep the best checkpoint by.
    monitor = "val/loss"
    #: Whether less or more of it is better.
    mode = "min"

    def __init__(
        self,
        model_name_or_path: str = "facebook/opt-1.3b",
        dropout: bool = False,
        length_normalised: bool = True,
        num_classes: int | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        peft: dict[str, Any] | None = None,
        quantization: dict[str, Any] | None = None,
        device_map: str | dict[str, Any] | None = None,
        max_memory: dict[Any, Any] | None = None,
        offload_folder: str | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["step", "epoch"] = "step",
        accumulate_grad_batches: int = 1,
        first_order: bool = False,
    ) -> None:
        super().__init__(
            model_name_or_path,
            dropout,
            trust_remote_code,
            attn_implementation,
            peft,
            quantization,
            device_map,
            max_memory,
            offload_folder,
            optimizer,
            lr_scheduler,
            lr_scheduler_interval,
            accumulate_grad_batches,
            first_order,
        )
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.length_normalised = length_normalised
        self.num_classes = num_classes
        self.val_metrics: MetricCollection | None = None
        self.test_metrics: MetricCollection | None = None

    # ---- set-up --------------------------------------------------------------------------------------------------------
    def setup(self, stage: str) -> None:
        """Make the metrics of the stage.

        Raises:
            MisconfigurationException: If the number of classes is unknown; see also :meth:`ZOModule.setup`.
        """
        super().setup(stage)
        if stage == "predict":
            return
        classes = self.num_classes
        if classes is None:
            classes = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        if classes is None:
            raise MisconfigurationException(
                "the number of classes is unknown: the datamodule has no `num_classes`; give the module num_classes=..."
            )
        metrics = MetricCollection(
            {
                "acc": MulticlassAccuracy(classes, average="micro"),
                "f1": MulticlassF1Score(classes, average="macro"),
            }
        )
        if stage == "test":
            self.test_metrics = metrics.clone(prefix="test/")
        else:
            self.val_metrics = metrics.clone(prefix="val/")

    # ---- evaluation ----------------------------------------------------------------------------------------------------
    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Score the classes of each example.

        Args:
            batch: See :class:`zo_lightning.data.ScoringBatch`.

        Returns:
            Shape (B, K), float32: mean (or summed) log-likelihoods in nats, ``-inf`` where an example has fewer classes.
        """
        return candidate_scores(self._scored_logits(batch), batch, length_normalised=self.length_normalised)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy over the classes, per example: shape (B,), float32, in nats."""
        return classification_losses(self(batch), batch["label"])

    def repeat_batch(self, batch: Any, copies: int) -> Any:
        """See :meth:`ZOModule.repeat_batch`."""
        return None if self.one_prompt_for_all else repeat_scoring_batch(batch, copies)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log ``val/loss``, ``val/acc`` and ``val/f1``."""
        assert self.val_metrics is not None
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log ``test/loss``, ``test/acc`` and ``test/f1``."""
        assert self.test_metrics is not None
        self._evaluate(batch, "test", self.test_metrics)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """One dictionary per example: ``index`` (row of the split), ``prediction`` (class), ``scores`` (one per class)."""
        scores = self(batch)
        columns = batch["index"].tolist(), scores.argmax(dim=1).tolist(), scores.tolist()
        return [
            {"index": index, "prediction": prediction, "scores": [s for s in row if s != -torch.inf]}
            for index, prediction, row in zip(*columns, strict=True)
        ]

    def _evaluate(self, batch: Mapping[str, Tensor], prefix: str, metrics: MetricCollection) -> None:
        scores, label = self(batch), batch["label"]
        loss = classification_losses(scores, label).mean()
        metrics.update(scores.argmax(dim=1), label)
        # Lightning weights the mean over batches by their sizes
        self.log(f"{prefix}/loss", loss, on_epoch=True, batch_size=label.numel(), sync_dist=True)
        self.log_dict(metrics, on_epoch=True, batch_size=label.numel())

    def _scored_logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Next-token logits at the plan's positions, shape (P, V).

        The hidden states are gathered in front of the head, so that all that the model does to its logits afterwards
        (scaling, soft-capping) stays. The head over all positions costs 40 % of an OPT-125m forward.
        """
        assert self.model is not None, "configure_model has not run"
        head = self.model.get_output_embeddings()
        row, position, width = batch["logit_row"], batch["logit_position"], batch["input_ids"].shape[1]

        def gather(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            virtual = args[0].shape[1] - width  # tokens that an adapter has put in front
            return (args[0][row, position + virtual].unsqueeze(0), *args[1:])

        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        if not is_prompt_learning(self.model) and self._takes_position_ids:
            inputs["position_ids"] = batch["position_ids"]
        handle = head.register_forward_pre_hook(gather)
        try:
            with self.positions_after_prompt():
                logits = self.model(**inputs, use_cache=False).logits
        finally:
            handle.remove()
        if logits.shape[:2] != (1, row.numel()):
            raise RuntimeError(
                f"{type(self.model).__name__} returned logits of shape {tuple(logits.shape)} where (1, {row.numel()}, V) "
                "was expected; its output head is not called once on the hidden states"
            )
        return logits[0]
