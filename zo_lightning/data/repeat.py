"""Several copies of a batch in one, for probes that run as one forward."""

from __future__ import annotations

from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from zo_lightning.data.collate import ScoringBatch
from zo_lightning.data.collate_generation import GenerationBatch

__all__ = ["repeat_batch", "repeat_generation_batch", "repeat_scoring_batch"]

# what the numbers in a column count: they go on where the copy before ends
_COUNTS = {
    "logit_row": "input_ids",
    "token_logit": "logit_row",
    "token_candidate": "candidate_length",
    "candidate_example": "label",
}


def repeat_batch(batch: Any, copies: int) -> Any | None:
    """Repeat the tensors of any nested batch along their first dimension.

    Args:
        batch: Tensors in dictionaries, lists, tuples or dataclasses; plain values besides them are kept.
        copies: How many.

    Returns:
        The batch of copies, one after the other; None where there is no tensor or their first dimensions differ.
    """
    sizes: set[int] = set()
    apply_to_collection(batch, Tensor, lambda tensor: sizes.add(tensor.shape[0] if tensor.dim() else -1))
    if len(sizes) != 1 or sizes <= {-1, 0}:
        return None
    return apply_to_collection(batch, Tensor, lambda tensor: torch.cat([tensor] * copies))


def repeat_scoring_batch(batch: ScoringBatch, copies: int) -> ScoringBatch:
    """Repeat a scoring batch: the columns that count rows, positions, candidates and examples go on counting.

    The neutral prompts of a calibrated one are repeated like the others, so that each copy reads its own.

    Args:
        batch: Of B examples.
        copies: How many.

    Returns:
        A batch of copies · B examples, one copy after the other.
    """
    columns: dict[str, Any] = dict(batch)
    repeated: dict[str, Any] = {}
    steps = {key: len(columns[of]) for key, of in _COUNTS.items()}
    neutral = columns.pop("neutral", None)
    if neutral is not None:
        steps["candidate_neutral"] = len(neutral["candidate_length"])
    for key, column in columns.items():
        step = steps.get(key, 0)
        repeated[key] = torch.cat([column + i * step if step else column for i in range(copies)])
    if neutral is not None:
        repeated["neutral"] = repeat_scoring_batch(neutral, copies)
    return repeated  # type: ignore[return-value]


def repeat_generation_batch(batch: GenerationBatch, copies: int) -> GenerationBatch:
    """Repeat a generation batch, its lists of answers too.

    Args:
        batch: Of B examples.
        copies: How many.

    Returns:
        A batch of copies · B examples, one copy after the other.
    """
    return GenerationBatch(
        scoring=repeat_scoring_batch(batch["scoring"], copies),
        input_ids=torch.cat([batch["input_ids"]] * copies),
        attention_mask=torch.cat([batch["attention_mask"]] * copies),
        answers=batch["answers"] * copies,
        index=torch.cat([batch["index"]] * copies),
    )
