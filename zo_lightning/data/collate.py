"""Batches for scoring candidates: which rows to feed, and which logits to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from zo_lightning.data.dataset import Example, fed_length


class ScoringBatch(TypedDict):
    """A batch of B examples with C candidates in all, as a plain dictionary of int64 tensors.

    R rows of T tokens are fed; next-token logits are needed at P positions of them, and S tokens are scored there.
    """

    input_ids: Tensor
    """(R, T) token ids, padded on the left."""
    attention_mask: Tensor
    """(R, T) 1 for tokens and 0 for padding."""
    position_ids: Tensor
    """(R, T) positions counted from the first token; 0 on padding."""
    logit_row: Tensor
    """(P,) the row of each logit position."""
    logit_position: Tensor
    """(P,) its column t: the logits there predict the token at t + 1. Pairs of row and column are unique."""
    token_logit: Tensor
    """(S,) the logit position, 0 to P - 1, that predicts a scored token."""
    token_id: Tensor
    """(S,) the scored token."""
    token_candidate: Tensor
    """(S,) the candidate, 0 to C - 1, that it belongs to."""
    candidate_length: Tensor
    """(C,) the number of scored tokens of a candidate, 1 or more."""
    candidate_example: Tensor
    """(C,) the example, 0 to B - 1, that a candidate belongs to, in ascending order."""
    candidate_index: Tensor
    """(C,) the number k of a candidate among those of its example."""
    candidate_gold: Tensor
    """(C,) 1 for the right candidates of an example, 0 for the others."""
    label: Tensor
    """(B,) the k of the right candidate, of the first where several are right."""
    index: Tensor
    """(B,) the row number in the source split."""


def num_candidates(batch: ScoringBatch) -> Tensor:
    """Count the candidates of every example of a batch.

    Args:
        batch: The batch.

    Returns:
        The counts, int64 of shape (B,).
    """
    return torch.bincount(batch["candidate_example"], minlength=len(batch["label"]))


class ScoringCollator:
    """Turn examples into a :class:`ScoringBatch` with as few tokens as scoring needs.

    A row ends before the last scored token, whose own logits nobody reads. A candidate whose remaining tokens begin
    another's shares the other's row, so single-token candidates cost one row for all of them; and a position at which
    several candidates agree so far is read once.

    Args:
        pad_token_id: What to pad with. It is masked, so any valid id will do.
        multiple: T is rounded up to a multiple of this.
    """

    def __init__(self, pad_token_id: int, multiple: int = 8) -> None:
        self.pad_token_id = pad_token_id
        self.multiple = multiple

    def __call__(self, examples: Sequence[Example]) -> ScoringBatch:
        """Collate B examples (one or more), whose numbers of candidates may differ."""
        width = -(-max(fed_length(example) for example in examples) // self.multiple) * self.multiple
        rows: list[list[int]] = []
        logit_row: list[int] = []
        logit_position: list[int] = []
        token_logit: list[int] = []
        token_id: list[int] = []
        lengths: list[int] = []
        for example in examples:
            prompt = example["prompt_ids"]
            # What has been read of an example's candidates so far -> the logit position that predicts what comes next.
            read: dict[tuple[int, ...], int] = {}
            for tail in _shared_tails(example["candidate_ids"]):
                for count in range(len(tail) + 1):
                    if tail[:count] not in read:
                        read[tail[:count]] = len(logit_row)
                        logit_row.append(len(rows))
                        logit_position.append(width - len(tail) - 1 + count)
                rows.append([*prompt, *tail])
            for ids in example["candidate_ids"]:
                token_logit += [read[tuple(ids[:count])] for count in range(len(ids))]
                token_id += ids
                lengths.append(len(ids))
        counts = [len(example["candidate_ids"]) for example in examples]
        golds = [example["gold"] for example in examples]
        input_ids, attention_mask = self._pad(rows, width)
        candidate_length = torch.tensor(lengths)
        return ScoringBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0),
            logit_row=torch.tensor(logit_row),
            logit_position=torch.tensor(logit_position),
            token_logit=torch.tensor(token_logit),
            token_id=torch.tensor(token_id),
            token_candidate=torch.arange(len(lengths)).repeat_interleave(candidate_length),
            candidate_length=candidate_length,
            candidate_example=torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)),
            candidate_index=torch.tensor([k for count in counts for k in range(count)]),
            candidate_gold=torch.tensor(
                [int(k in gold) for gold, count in zip(golds, counts, strict=True) for k in range(count)]
            ),
            label=torch.tensor([example["label"] for example in examples]),
            index=torch.tensor([example["index"] for example in examples]),
        )

    def _pad(self, rows: list[list[int]], width: int) -> tuple[Tensor, Tensor]:
        ids = np.full((len(rows), width), self.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for number, row in enumerate(rows):
            ids[number, width - len(row) :] = row
            mask[number, width - len(row) :] = 1
        return torch.from_numpy(ids), torch.from_numpy(mask)


def _shared_tails(candidates: list[list[int]]) -> list[tuple[int, ...]]:
    """The fewest tails, to be fed after the prompt, in which every candidate less its last token is a beginning."""
    tails: list[tuple[int, ...]] = []
    for ids in sorted(candidates, key=len, reverse=True):
        fed = tuple(ids[:-1])
        if not any(tail[: len(fed)] == fed for tail in tails):
            tails.append(fed)
    return tails
