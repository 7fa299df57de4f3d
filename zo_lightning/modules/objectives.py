"""What a training can be for besides likelihood: scores of what the model decides, which have no gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.text import squad

from zo_lightning.modules.scoring import is_right

__all__ = ["OBJECTIVES", "Objective", "Score", "accuracy", "exact_match", "match", "token_f1"]

Score = Callable[[Any, Any], Any]
"""From predictions (chosen candidates, int64 of shape (B,), or B texts) and their batch to B scores, or one of them all."""


def accuracy(predictions: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Whether the chosen candidate of each example is right, any of them where several are.

    Args:
        predictions: Shape (B,), the number of the chosen candidate.
        batch: See :class:`zo_lightning.data.ScoringBatch`.

    Returns:
        Shape (B,), float32, 0 or 1.
    """
    return is_right(predictions, batch).float()


def token_f1(predictions: Sequence[str], batch: Mapping[str, Any]) -> Tensor:
    """F1 of the words that each text shares with the nearest of its right answers, compared as in SQuAD.

    Args:
        predictions: B texts.
        batch: See :class:`zo_lightning.data.GenerationBatch`.

    Returns:
        Shape (B,), float32, from 0 to 1.
    """
    return torch.tensor([match(*pair)[1] for pair in zip(predictions, batch["answers"], strict=True)])


def exact_match(predictions: Sequence[str], batch: Mapping[str, Any]) -> Tensor:
    """Whether each text is one of its right answers, compared as in SQuAD: without case, punctuation and articles.

    Args:
        predictions: B texts.
        batch: See :class:`zo_lightning.data.GenerationBatch`.

    Returns:
        Shape (B,), float32, 0 or 1.
    """
    return torch.tensor([match(*pair)[0] for pair in zip(predictions, batch["answers"], strict=True)])


OBJECTIVES: dict[str, dict[str, Score]] = {
    "classification": {"accuracy": accuracy},
    "multiple_choice": {"accuracy": accuracy},
    "generation": {"f1": token_f1, "exact_match": exact_match},
}
"""The scores that have a name, for each kind of task."""


class Objective:
    """A loss from a score: how much is missing to the best there can be, so that zero is its lower bound.

    Args:
        score: See :data:`Score`.
        best: The highest score there can be.
        worst: The lowest.

    Raises:
        ValueError: If ``best`` is not above ``worst``.
    """

    def __init__(self, score: Score, best: float = 1.0, worst: float = 0.0) -> None:
        if not -math.inf < worst < best < math.inf:
            raise ValueError(f"best_score must be above worst_score, both finite, got {best} and {worst}")
        self.score = score
        self.best = best
        self.worst = worst
        self._own = any(score in scores.values() for scores in OBJECTIVES.values()) and worst <= 0 and best >= 1
        self.per_example = True
        """Whether the score last seen was one per example."""

    def __call__(self, predictions: Any, batch: Any, size: int, device: torch.device) -> Tensor:
        """The loss of each example, or of all together where the score is one number.

        Args:
            predictions: Of B examples.
            batch: The batch.
            size: B.
            device: Where the loss is wanted.

        Returns:
            Shape (B,) or (), float32, 0 or more.

        Raises:
            ValueError: If the scores are neither one nor B, or one of them is beyond ``worst`` or ``best``.
        """
        scores = torch.as_tensor(self.score(predictions, batch), dtype=torch.float32, device=device)
        if scores.dim() and scores.shape != (size,):
            raise ValueError(
                f"the objective returned scores of shape {tuple(scores.shape)} for {size} examples: return one for each, or "
                "one number for all"
            )
        # waits for the device, which the scores of this package, from 0 to 1, need not
        if not self._own and not bool(((scores >= self.worst) & (scores <= self.best)).all()):
            raise ValueError(
                f"the objective returned scores from {float(scores.min()):.6g} to {float(scores.max()):.6g}, not all from "
                f"worst_score={self.worst:.6g} to best_score={self.best:.6g}: give the lowest and the highest there can be"
            )
        self.per_example = scores.dim() == 1
        return self.best - scores


def match(text: str, answers: Sequence[str]) -> tuple[float, float]:
    """Compare a text with the nearest of several answers, as in SQuAD: without case, punctuation and articles.

    Args:
        text: What was written.
        answers: All right answers.

    Returns:
        Whether it is one of them, 0 or 1, and the F1 of shared words, from 0 to 1.
    """
    width = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # under precision="bf16-true" it is of three digits, and torchmetrics counts in it
    try:
        target = {"answers": {"text": list(answers), "answer_start": []}, "id": ""}
        found = squad({"prediction_text": text, "id": ""}, target)  # in percent
    finally:
        torch.set_default_dtype(width)
    return float(found["exact_match"]) / 100, float(found["f1"]) / 100
