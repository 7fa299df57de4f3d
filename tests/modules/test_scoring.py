"""Scores against a loop over examples, candidates and tokens in plain Python."""

import math

import pytest
import torch

from tests.tiny import CANDIDATES, PROMPTS, plan
from zo_lightning.modules import (
    by_example,
    candidate_log_likelihoods,
    candidate_scores,
    classification_losses,
    label_losses,
)


def slow_scores(logits: torch.Tensor, batch: dict, normalised: bool) -> list[list[float]]:
    result = [[-math.inf] * 3 for _ in batch["label"]]
    for c in range(len(batch["candidate_length"])):
        total = 0.0
        for s in range(len(batch["token_id"])):
            if batch["token_candidate"][s] == c:
                row = [float(x) for x in logits[batch["token_logit"][s]].double()]
                total += row[batch["token_id"][s]] - math.log(sum(math.exp(x) for x in row))
        total /= int(batch["candidate_length"][c]) if normalised else 1
        result[batch["candidate_example"][c]][batch["candidate_index"][c]] = total
    return result


@pytest.fixture
def ragged():
    """Three examples with 3, 2 and 2 candidates."""
    return plan(PROMPTS, [[*CANDIDATES[0], [7, 8]], *CANDIDATES[1:]], [2, 0, 1])


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_equal_the_slow_loop(ragged, normalised, dtype):
    torch.manual_seed(0)
    logits = (4 * torch.randn(len(ragged["token_id"]), 24)).to(dtype)
    scores = candidate_scores(logits, ragged, length_normalised=normalised)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(slow_scores(logits, ragged, normalised)), rtol=1e-6, atol=1e-6)


def test_losses_are_the_cross_entropy_of_the_scores(ragged):
    torch.manual_seed(1)
    logits = torch.randn(len(ragged["token_id"]), 24)
    losses = classification_losses(candidate_scores(logits, ragged), ragged["label"])
    expected = [
        -(row[label] - math.log(sum(math.exp(x) for x in row)))
        for row, label in zip(slow_scores(logits, ragged, True), ragged["label"].tolist(), strict=True)
    ]
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_label_losses_are_those_of_the_right_candidate_per_token(ragged):
    torch.manual_seed(2)
    logits = torch.randn(len(ragged["token_id"]), 24)
    sums = candidate_log_likelihoods(logits, ragged, length_normalised=False)
    expected = [-row[label] for row, label in zip(slow_scores(logits, ragged, True), ragged["label"].tolist(), strict=True)]
    torch.testing.assert_close(label_losses(sums, ragged), torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_values_by_example(ragged):
    """Three candidates of the first example, two of the others."""
    assert by_example(torch.arange(7), ragged, fill=9).tolist() == [[0, 1, 2], [3, 4, 9], [5, 6, 9]]
    assert by_example(torch.arange(7.0), ragged)[1].tolist() == [3.0, 4.0, -math.inf]


def test_a_shared_logit_position_serves_several_candidates():
    """Single-token candidates of one example read the same logits."""
    batch = {
        "token_logit": torch.tensor([0, 0]),
        "token_id": torch.tensor([1, 2]),
        "token_candidate": torch.tensor([0, 1]),
        "candidate_length": torch.tensor([1, 1]),
        "candidate_example": torch.tensor([0, 0]),
        "candidate_index": torch.tensor([0, 1]),
        "label": torch.tensor([1]),
    }
    logits = torch.tensor([[0.5, 2.0, -1.0]])
    torch.testing.assert_close(candidate_scores(logits, batch)[0], logits.log_softmax(1)[0, 1:])


def test_large_logits_of_half_precision_stay_finite(ragged):
    logits = torch.full((len(ragged["token_id"]), 24), 6e4, dtype=torch.float16)
    expected = torch.full_like(logits[:, 0], -math.log(24), dtype=torch.float32)
    scores = candidate_scores(logits, ragged)
    torch.testing.assert_close(scores[scores.isfinite()], expected[: int(scores.isfinite().sum())], atol=1e-2, rtol=0)
