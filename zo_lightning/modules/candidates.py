"""What the modules share that choose among candidates: their scores, and the evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from zo_lightning.modules.prompted import PromptedModule
from zo_lightning.modules.scoring import by_example, candidate_log_likelihoods

__all__ = ["CandidateModule"]


class CandidateModule(PromptedModule):
    """Base class of the modules that choose the candidate of the highest score.

    A score is the log-likelihood of a candidate after its prompt, for each of its tokens. Where a batch carries neutral prompts
    (``calibrated`` of :class:`~zo_lightning.data.PromptDataModule`), it is the sum over the tokens less the same sum after the
    neutral prompt, as in surface-form competition: what a candidate gains by its prompt. Predictions and metrics follow these
    scores; the loss, in training and in evaluation, never does.

    Args:
        model_name_or_path: A folder or a name on the Hugging Face hub; ``quickstart`` is the tiny model of this package.
        length_normalised: Whether a candidate's log-likelihood is divided by its number of tokens.
        **options: See :class:`PromptedModule`.

    Attributes:
        model: The language model, or the ``peft.PeftModel`` around it, once :meth:`configure_model` has run.
    """

    def __init__(self, model_name_or_path: str = "facebook/opt-1.3b", length_normalised: bool = True, **options: Any) -> None:
        super().__init__(model_name_or_path, **options)
        self.length_normalised = length_normalised
        self.val_metrics: MetricCollection | None = None
        self.test_metrics: MetricCollection | None = None

    # ---- what differs --------------------------------------------------------------------------------------------------
    def metrics(self) -> MetricCollection:
        """The metrics of an evaluation, by the names under which they are logged."""
        raise NotImplementedError(f"{type(self).__name__} must define `metrics(self)`")

    def update_metrics(self, metrics: MetricCollection, prediction: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Count a batch.

        Args:
            metrics: What :meth:`metrics` made.
            prediction: Shape (B,), the number of the candidate of the highest score.
            batch: See :class:`zo_lightning.data.ScoringBatch`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `update_metrics(self, metrics, prediction, batch)`")

    def losses(self, log_likelihoods: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of each example.

        Args:
            log_likelihoods: Shape (C,), float32, see :meth:`log_likelihoods`.
            batch: See :class:`zo_lightning.data.ScoringBatch`.

        Returns:
            Shape (B,), float32, in nats.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `losses(self, log_likelihoods, batch)`")

    # ---- scores --------------------------------------------------------------------------------------------------------
    def log_likelihoods(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Log-likelihood of each candidate after its prompt: shape (C,), float32, in nats, summed over its tokens."""
        return candidate_log_likelihoods(self.scored_logits(batch), batch, length_normalised=False)

    def scores(self, log_likelihoods: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Log-likelihoods as scores that the loss is taken of: shape (B, K), ``-inf`` where there are fewer candidates."""
        length = batch["candidate_length"]
        return by_example(log_likelihoods / length if self.length_normalised else log_likelihoods, batch)

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Score the candidates of each example.

        Args:
            batch: See :class:`zo_lightning.data.ScoringBatch`, and :class:`zo_lightning.data.CalibratedBatch` for calibrated
                scores.

        Returns:
            Shape (B, K), float32: mean (or summed, or calibrated) log-likelihoods in nats, ``-inf`` where an example has fewer
            candidates.
        """
        return self._decisive(self.log_likelihoods(batch), batch)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of each example, never calibrated: shape (B,), float32, in nats; or that of the ``objective``."""
        return self._objective(self.log_likelihoods(batch), batch)

    def _objective(self, log_likelihoods: Tensor, batch: Mapping[str, Any]) -> Tensor:
        if self.score is None:
            return self.losses(log_likelihoods, batch)
        prediction = self.scores(log_likelihoods, batch).argmax(dim=1)
        return self.score(prediction, batch, len(prediction), prediction.device)

    def _decisive(self, log_likelihoods: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """The scores that decide: calibrated ones where the batch has neutral prompts."""
        if "neutral" not in batch:
            return self.scores(log_likelihoods, batch)
        neutral = self.log_likelihoods(batch["neutral"])[batch["candidate_neutral"]]
        return by_example(log_likelihoods - neutral, batch)

    # ---- evaluation ----------------------------------------------------------------------------------------------------
    def setup(self, stage: str) -> None:
        """Make the metrics of the stage.

        Raises:
            MisconfigurationException: See :meth:`PromptedModule.setup`.
        """
        super().setup(stage)
        if stage == "test":
            self.test_metrics = self.metrics().clone(prefix="test/")
        elif stage != "predict":
            self.val_metrics = self.metrics().clone(prefix="val/")

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log ``val/loss`` and the metrics."""
        assert self.val_metrics is not None
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Log ``test/loss`` and the metrics; returns as ``rows`` what :meth:`predict_step` returns."""
        assert self.test_metrics is not None
        return {"rows": _rows(self._evaluate(batch, "test", self.test_metrics), batch)}

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """One dictionary per example: ``index`` (row of the split), ``prediction`` (candidate), ``scores`` (one each)."""
        return _rows(self(batch), batch)

    def _evaluate(self, batch: Mapping[str, Tensor], prefix: str, metrics: MetricCollection) -> Tensor:
        """Log the loss and the metrics of a batch; returns the scores that decide, shape (B, K)."""
        log_likelihoods, size = self.log_likelihoods(batch), batch["label"].numel()
        loss = self._objective(log_likelihoods, batch).mean()
        scores = self._decisive(log_likelihoods, batch)
        self.update_metrics(metrics, scores.argmax(dim=1), batch)
        # Lightning weights the mean over batches by their sizes
        self.log(f"{prefix}/loss", loss, on_epoch=True, batch_size=size, sync_dist=True)
        self.log_dict(metrics, on_epoch=True, batch_size=size)
        return scores


def _rows(scores: Tensor, batch: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    columns = batch["index"].tolist(), scores.argmax(dim=1).tolist(), scores.tolist()
    return [
        {"index": index, "prediction": prediction, "scores": [s for s in row if s != -torch.inf]}
        for index, prediction, row in zip(*columns, strict=True)
    ]
