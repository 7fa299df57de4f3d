"""Classification by prompting: a decoder scores the verbalisers of each class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from zo_lightning.modules.prompted import PromptedModule
from zo_lightning.modules.scoring import candidate_scores, classification_losses

__all__ = ["CausalLMClassificationModule"]


class CausalLMClassificationModule(PromptedModule):
    """A causal language model that classifies by the likelihood of each class's candidate text.

    The batches are those of :class:`~zo_lightning.data.PromptDataModule`. Logits are computed at the scored
    positions only; losses are float32 from the logits on. Logs ``train/loss``, and ``loss``, ``acc`` and (macro) ``f1``
    under ``val/`` and ``test/``.

    Args:
        model_name_or_path: A folder or a name on the Hugging Face hub; ``quickstart`` is the tiny model of this package.
        length_normalised: Whether a candidate's log-likelihood is divided by its number of tokens.
        num_classes: For the metrics; None asks the datamodule.
        **options: See :class:`LanguageModelModule`.

    Attributes:
        model: The language model, or the ``peft.PeftModel`` around it, once :meth:`configure_model` has run.
    """

    def __init__(
        self,
        model_name_or_path: str = "facebook/opt-1.3b",
        length_normalised: bool = True,
        num_classes: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model_name_or_path, **options)
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
        return candidate_scores(self.scored_logits(batch), batch, length_normalised=self.length_normalised)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy over the classes, per example: shape (B,), float32, in nats."""
        return classification_losses(self(batch), batch["label"])

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
