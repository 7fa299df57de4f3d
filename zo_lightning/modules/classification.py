"""Classification by prompting: a decoder scores the verbalisers of each class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from zo_lightning.modules.candidates import CandidateModule
from zo_lightning.modules.scoring import classification_losses

__all__ = ["CausalLMClassificationModule"]


class CausalLMClassificationModule(CandidateModule):
    """A causal language model that classifies by the likelihood of each class's candidate text.

    The batches are those of :class:`~zo_lightning.data.PromptDataModule`. Logits are computed at the scored
    positions only; losses are float32 from the logits on. Logs ``train/loss``, and ``loss``, ``acc`` and (macro) ``f1``
    under ``val/`` and ``test/``. The loss is the cross-entropy over the classes.

    Args:
        model_name_or_path: A folder or a name on the Hugging Face hub; ``quickstart`` is the tiny model of this package.
        length_normalised: Whether a candidate's log-likelihood is divided by its number of tokens. Calibrated scores, see
            :class:`CandidateModule`, are sums in any case.
        num_classes: For the metrics; None asks the datamodule.
        **options: See :class:`PromptedModule`.

    Attributes:
        model: The language model, or the ``peft.PeftModel`` around it, once :meth:`configure_model` has run.
    """

    task_kind = "classification"

    def __init__(
        self,
        model_name_or_path: str = "facebook/opt-1.3b",
        length_normalised: bool = True,
        num_classes: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model_name_or_path, length_normalised, **options)
        self.save_hyperparameters(ignore=self.unsaved)
        self.num_classes = num_classes

    def losses(self, log_likelihoods: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy over the classes, per example; see :meth:`CandidateModule.losses`."""
        return classification_losses(self.scores(log_likelihoods, batch), batch["label"])

    def metrics(self) -> MetricCollection:
        """Accuracy and macro F1.

        Raises:
            MisconfigurationException: If the number of classes is unknown.
        """
        classes = self.num_classes
        if classes is None:
            classes = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        if classes is None:
            raise MisconfigurationException(
                "the number of classes is unknown: the datamodule has no `num_classes`; give the module num_classes=..."
            )
        return MetricCollection(
            {
                "acc": MulticlassAccuracy(classes, average="micro"),
                "f1": MulticlassF1Score(classes, average="macro"),
            }
        )

    def update_metrics(self, metrics: MetricCollection, prediction: Tensor, batch: Mapping[str, Tensor]) -> None:
        """See :meth:`CandidateModule.update_metrics`."""
        metrics.update(prediction, batch["label"])
