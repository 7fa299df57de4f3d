"""Batches for scoring candidates: which rows to feed, and which logits to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from zo_lightning.data.dataset import Example
from zo_lightning.data.packing import FedRow, fed_rows
from zo_lightning.data.padding import padded_width


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


class PackedBatch(ScoringBatch):
    """A batch in which a row holds several tails of one prompt, each of which sees the prompt and itself alone.

    ``position_ids`` go on from the prompt's end at the beginning of every tail. A causal mask alone does not do for these rows.
    """

    segment: Tensor
    """(R, T) 0 for the tokens of a prompt, k for those of its k-th tail, -1 for padding."""


class CalibratedBatch(ScoringBatch):
    """A batch for calibrated scores: it carries the neutral prompts too, each once that differs in itself or its candidates."""

    neutral: ScoringBatch
    """The plan of the N neutral prompts. Its examples, labels and rows are those that a neutral prompt was first met in."""
    candidate_neutral: Tensor
    """(C,) the candidate of :attr:`neutral` that a candidate is compared with: the same text after the neutral prompt."""


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
        multiple: T is rounded up to a multiple of this; None for one that adds little, see
            :func:`~zo_lightning.data.padding.padded_width`.
        packed: Whether the candidates of an example are all in one row, behind a single copy of the prompt. The batch is a
            :class:`PackedBatch` where that makes a difference.
    """

    def __init__(self, pad_token_id: int, multiple: int | None = 8, packed: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.multiple = multiple
        self.packed = packed

    def __call__(self, examples: Sequence[Example]) -> ScoringBatch:
        """Collate B examples (one or more), whose numbers of candidates may differ.

        Returns:
            The batch, a :class:`CalibratedBatch` where the examples have neutral prompts.
        """
        rows: list[FedRow] = []
        logit_row: list[int] = []
        logit_position: list[int] = []
        token_logit: list[int] = []
        token_id: list[int] = []
        lengths: list[int] = []
        for example in examples:
            # What has been read of an example's candidates so far -> the logit position that predicts what comes next.
            read: dict[tuple[int, ...], int] = {}
            for row in fed_rows(example, self.packed):
                for tail, places in row.places():
                    for count, place in enumerate(places):
                        if tail[:count] not in read:
                            read[tail[:count]] = len(logit_row)
                            logit_row.append(len(rows))
                            logit_position.append(place - row.length)  # counted from the row's end, which is the batch's
                rows.append(row)
            for ids in example["candidate_ids"]:
                token_logit += [read[tuple(ids[:count])] for count in range(len(ids))]
                token_id += ids
                lengths.append(len(ids))
        counts = [len(example["candidate_ids"]) for example in examples]
        golds = [example["gold"] for example in examples]
        width = padded_width(max(row.length for row in rows), self.multiple)
        candidate_length = torch.tensor(lengths)
        batch = ScoringBatch(
            input_ids=_padded([row.ids for row in rows], width, self.pad_token_id),
            attention_mask=_padded([[1] * row.length for row in rows], width, 0),
            position_ids=_padded([row.positions for row in rows], width, 0),
            logit_row=torch.tensor(logit_row),
            logit_position=torch.tensor(logit_position) + width,
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
        if any(len(row.tails) > 1 for row in rows):
            batch = PackedBatch(**batch, segment=_padded([row.segments for row in rows], width, -1))
        return self._calibrated(batch, examples) if "neutral_ids" in examples[0] else batch

    def _calibrated(self, batch: ScoringBatch, examples: Sequence[Example]) -> CalibratedBatch:
        """Add the neutral prompts."""
        first: dict[Any, int] = {}  # a neutral prompt with its candidates -> the number of the first of these
        distinct: list[Example] = []
        candidate_neutral: list[int] = []
        count = 0
        for example in examples:
            prompt_ids, candidate_ids = example["neutral_ids"], example["neutral_candidate_ids"]
            key = (tuple(prompt_ids), tuple(map(tuple, candidate_ids)))
            if key not in first:
                first[key] = count
                count += len(candidate_ids)
                neutral: Example = {**example, "prompt_ids": prompt_ids, "candidate_ids": candidate_ids}
                del neutral["neutral_ids"]
                distinct.append(neutral)
            candidate_neutral += range(first[key], first[key] + len(candidate_ids))
        return CalibratedBatch(**batch, neutral=self(distinct), candidate_neutral=torch.tensor(candidate_neutral))


def _padded(rows: list[list[int]], width: int, value: int) -> Tensor:
    padded = np.full((len(rows), width), value, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, width - len(row) :] = row
    return torch.from_numpy(padded)
