"""Multiple choice by prompting: a decoder scores the choices of each row, which are free texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy

from zo_lightning.modules.candidates import CandidateModule
from zo_lightning.modules.scoring import classification_losses, is_right, label_losses

__all__ = ["CausalLMMultipleChoiceModule"]


class CausalLMMultipleChoiceModule(CandidateModule):
    """A causal language model that picks the most likely of the choices, whose number may differ from example to example.

    The batches are those of :class:`~zo_lightning.data.PromptDataModule`. Logits are computed at the scored
    positions only; losses are float32 from the logits on. Logs ``train/loss``, and ``loss`` and ``acc`` under ``val/`` and
    ``test/``. A prediction is right if it is any of an example's right choices.

    Args:
        model_name_or_path: A folder or a name on the Hugging Face hub; ``quickstart`` is the tiny model of this package.
        length_normalised: Whether a candidate's log-likelihood is divided by its number of tokens. Calibrated scores, see
            :class:`CandidateModule`, are sums in any case.
        train_on: What the loss is. ``lm``: the negative log-likelihood per token of the right choice, of the first where
            several are right, as in MeZO (which weights the examples of a batch by their tokens). The training batches of
            :class:`~zo_lightning.data.PromptDataModule` then hold that choice alone. ``classification``: the cross-entropy
            over the choices.
        **options: See :class:`PromptedModule`.

    Attributes:
        model: The language model, or the ``peft.PeftModel`` around it, once :meth:`configure_model` has run.

    Raises:
        ValueError: If ``train_on`` is something else.
    """

    task_kind = "multiple_choice"

    def __init__(
        self,
        model_name_or_path: str = "facebook/opt-1.3b",
        length_normalised: bool = True,
        train_on: Literal["lm", "classification"] = "lm",
        **options: Any,
    ) -> None:
        super().__init__(model_name_or_path, length_normalised, **options)
        if train_on not in ("lm", "classification"):
            raise ValueError(f"train_on must be 'lm' or 'classification', got {train_on!r}")
        self.save_hyperparameters(ignore=self.unsaved)
        self.train_on = train_on

    @property
    def reads_gold_only(self) -> bool:
        """See :attr:`PromptedModule.reads_gold_only`: so it is for ``lm``."""
        return self.train_on == "lm" and self.score is None

    def losses(self, log_likelihoods: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss that ``train_on`` names, per example; see :meth:`CandidateModule.losses`."""
        if self.train_on == "lm":
            return label_losses(log_likelihoods, batch)
        return classification_losses(self.scores(log_likelihoods, batch), batch["label"])

    def metrics(self) -> MetricCollection:
        """Accuracy."""
        # counts integers: the sums of a MeanMetric become bfloat16 with the module, and end at 256
        return MetricCollection({"acc": BinaryAccuracy()})

    def update_metrics(self, metrics: MetricCollection, prediction: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Count a prediction as right if it is any of the right choices; see :meth:`CandidateModule.update_metrics`."""
        hits = is_right(prediction, batch)
        metrics.update(hits, torch.ones_like(hits))
