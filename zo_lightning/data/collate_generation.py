"""Batches for generation: the answers to score, as for any task, and the prompts to continue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zo_lightning.data.collate import ScoringBatch, ScoringCollator
from zo_lightning.data.dataset import Example
from zo_lightning.data.padding import padded_width

__all__ = ["GenerationBatch", "GenerationCollator"]


class GenerationBatch(TypedDict):
    """A batch of B examples of a generation task, as a plain dictionary."""

    scoring: ScoringBatch
    """The answers to train on, the only candidate of each example."""
    input_ids: Tensor
    """(B, T) int64, the tokens of the prompts alone, padded on the left."""
    attention_mask: Tensor
    """(B, T) int64, 1 for tokens and 0 for padding."""
    answers: list[list[str]]
    """All right answers of each example."""
    index: Tensor
    """(B,) int64, the row number in the source split."""


class GenerationCollator:
    """Turn examples of a generation task into a :class:`GenerationBatch`.

    Args:
        scoring: Collates the answers; prompts are padded with the same token, and as widely.
    """

    def __init__(self, scoring: ScoringCollator) -> None:
        self.scoring = scoring

    def __call__(self, examples: Sequence[Example]) -> GenerationBatch:
        """Collate B examples (one or more)."""
        prompts = [torch.tensor(example["generation_ids"]) for example in examples]
        scoring = self.scoring(examples)
        return GenerationBatch(
            scoring=scoring,
            input_ids=self._pad(prompts, self.scoring.pad_token_id),
            attention_mask=self._pad([torch.ones_like(prompt) for prompt in prompts], 0),
            answers=[example["answers"] for example in examples],
            index=scoring["index"],
        )

    def _pad(self, rows: list[Tensor], value: int) -> Tensor:
        padded = pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")
        width = padded_width(padded.shape[1], self.scoring.multiple)
        return F.pad(padded, (width - padded.shape[1], 0), value=value)
