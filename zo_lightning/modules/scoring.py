"""From next-token logits to scores and losses: pure functions on the scoring plan of a batch.

The plan says which logits were computed (P of them), which S tokens are scored there, to which of the C candidates each
token belongs, and to which of the B examples each candidate. See :class:`zo_lightning.data.ScoringBatch`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["by_example", "candidate_log_likelihoods", "candidate_scores", "classification_losses", "is_right", "label_losses"]


def candidate_log_likelihoods(logits: Tensor, batch: Mapping[str, Tensor], *, length_normalised: bool = True) -> Tensor:
    """Log-likelihood of each candidate's tokens given what precedes them.

    Args:
        logits: Shape (P, V), any floating dtype: next-token logits at the plan's positions.
        batch: The scoring plan; ``token_logit``, ``token_id`` and ``token_candidate`` of shape (S,), ``candidate_length`` of
            shape (C,).
        length_normalised: Divide each candidate's sum by its number of tokens.

    Returns:
        Shape (C,), in nats, float32 (float64 for float64 logits).
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # log p = logit - logsumexp, without a second (P, V) tensor of log-probabilities
    chosen = wide[batch["token_logit"], batch["token_id"]]
    log_p = chosen - wide.logsumexp(dim=-1)[batch["token_logit"]]
    length = batch["candidate_length"]
    # a sum in the order of the tokens: index_add_ on CUDA adds in an order that differs between runs
    owner = torch.arange(length.numel(), device=log_p.device)
    total = torch.where(owner[:, None] == batch["token_candidate"], log_p, 0.0).sum(dim=1)
    return total / length if length_normalised else total


def candidate_scores(logits: Tensor, batch: Mapping[str, Tensor], *, length_normalised: bool = True) -> Tensor:
    """Score of each class of each example: the log-likelihood of its candidate.

    Args:
        logits: Shape (P, V), next-token logits at the plan's positions.
        batch: The scoring plan; see :func:`candidate_log_likelihoods` and :func:`by_example` for the keys.
        length_normalised: Divide each log-likelihood by the candidate's number of tokens.

    Returns:
        Shape (B, K), float32 (float64 for float64 logits), K the largest number of candidates in the batch; ``-inf`` where
        an example has fewer.
    """
    return by_example(candidate_log_likelihoods(logits, batch, length_normalised=length_normalised), batch)


def by_example(values: Tensor, batch: Mapping[str, Tensor], fill: float = -torch.inf) -> Tensor:
    """Lay out one value per candidate as a table with a row for each example.

    Args:
        values: Shape (C,).
        batch: The scoring plan; ``candidate_example`` and ``candidate_index`` of shape (C,) and ``label`` of shape (B,).
        fill: What stands where an example has fewer candidates than another.

    Returns:
        Shape (B, K), the dtype of ``values``, K the largest number of candidates in the batch.
    """
    table = values.new_full((batch["label"].numel(), int(batch["candidate_index"].max()) + 1), fill)
    table[batch["candidate_example"], batch["candidate_index"]] = values
    return table


def is_right(prediction: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Whether the chosen candidate of each example is right, any of them where several are.

    Args:
        prediction: Shape (B,), the number of the chosen candidate.
        batch: The scoring plan; ``candidate_gold`` besides what :func:`by_example` takes.

    Returns:
        Shape (B,), int64, 0 or 1.
    """
    return by_example(batch["candidate_gold"], batch, fill=0).gather(1, prediction[:, None]).squeeze(1)


def classification_losses(scores: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of each example's scores against its label, in nats.

    Args:
        scores: Shape (B, K), from :func:`candidate_scores`.
        label: Shape (B,), the right class.

    Returns:
        Shape (B,), the dtype of ``scores``.
    """
    return F.cross_entropy(scores, label, reduction="none")


def label_losses(log_likelihoods: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Negative log-likelihood per token of each example's right candidate, in nats; the others count nothing.

    Args:
        log_likelihoods: Shape (C,), sums over the tokens of a candidate.
        batch: The scoring plan; ``candidate_example`` and ``candidate_length`` of shape (C,) and ``label`` of shape (B,).

    Returns:
        Shape (B,), the dtype of ``log_likelihoods``.
    """
    label = batch["label"]
    # candidates are in the order of the examples: the label counts from the first one of its example
    first = torch.searchsorted(batch["candidate_example"], torch.arange(label.numel(), device=label.device))
    right = first + label
    return -log_likelihoods[right] / batch["candidate_length"][right]
