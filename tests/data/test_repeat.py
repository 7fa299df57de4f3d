"""Several copies of a batch in one, against collating the examples again and against the single batch."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from torch import Tensor

from tests.data.test_collate import PAD, batches, example, score_by_plan
from tests.tiny import CANDIDATES, PROMPTS
from zo_lightning.data import ScoringCollator, repeat_batch, repeat_scoring_batch
from zo_lightning.modules import CausalLMClassificationModule

X = torch.arange(6.0).view(3, 2)
Y = torch.tensor([4, 5, 6])


@dataclass
class Row:
    x: Tensor
    name: str


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def same(a: Any, b: Any) -> bool:
    """Equal in structure, types, values and dtypes."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Row):
        return same(vars(a), vars(b))
    return a == b


def made(kind: str, x: Tensor, y: Tensor) -> Any:
    """A batch of that kind."""
    return {
        "tensor": x,
        "list": [x, y],
        "tuple": (x, y),
        "named tuple": Pair(x, y),
        "dictionary": {"x": x, "y": y},
        "dataclass": Row(x, "film"),
        "nested": {"inputs": [x, (y, Pair(x, y))], "row": Row(x, "film"), "mask": y > 4},
        "plain values": {"x": x, "epoch": 3, "names": ["a", "b"], "nothing": None, "flag": True, "ratio": 0.5},
    }[kind]


@pytest.mark.parametrize("copies", [1, 2, 5])
@pytest.mark.parametrize(
    "kind", ["tensor", "list", "tuple", "named tuple", "dictionary", "dataclass", "nested", "plain values"]
)
def test_every_tensor_is_repeated_and_nothing_else(kind, copies):
    batch = made(kind, X, Y)
    before = copy.deepcopy(batch)
    expected = made(kind, torch.cat([X] * copies), torch.cat([Y] * copies))
    assert same(repeat_batch(batch, copies), expected)
    assert same(batch, before)


def test_copies_come_one_after_the_other():
    assert repeat_batch([Y], 2)[0].tolist() == [4, 5, 6, 4, 5, 6]


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y[:2]),
        {"x": X, "deep": [Row(Y[:1], "film")]},
        torch.tensor(3.0),
        {"x": X, "temperature": torch.tensor(0.7)},
        {"names": ["a", "b"]},
        [],
        None,
        torch.zeros(0, 3),
        (X, torch.zeros(0)),
    ],
    ids=["lengths", "deep lengths", "scalar", "scalar beside", "no tensor", "empty", "none", "no rows", "no rows beside"],
)
def test_what_cannot_be_repeated(batch):
    assert repeat_batch(batch, 2) is None


# ---- scoring batches ---------------------------------------------------------------------------------------------------
@given(batches)
def test_a_repeated_scoring_batch_is_that_of_the_examples_collated_again(examples):
    """Examples with 2 to 5 candidates of 1 to 4 tokens, which may begin alike."""
    collate = ScoringCollator(PAD)
    batch = collate(examples)
    for copies in (1, 2, 3):
        expected = collate(examples * copies)
        repeated = repeat_scoring_batch(batch, copies)
        assert list(repeated) == list(expected)
        assert all(same(repeated[key], expected[key]) for key in expected)
    assert torch.equal(score_by_plan(repeat_scoring_batch(batch, 2)), score_by_plan(batch).repeat(2))


def test_a_scoring_batch_is_left_as_it_is():
    batch = ScoringCollator(PAD)([example([2, 8], [[16], [17], [18, 19, 20]]), example([2], [[3], [4, 5]], label=1)])
    before = copy.deepcopy(batch)
    repeated = repeat_scoring_batch(batch, 2)
    assert same(batch, before)
    assert repeated["candidate_example"].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert repeated["candidate_index"].tolist() == [0, 1, 2, 0, 1] * 2
    assert repeated["token_candidate"].tolist() == [0, 1, 2, 2, 2, 3, 4, 4, 5, 6, 7, 7, 7, 8, 9, 9]


@pytest.fixture(scope="module")
def module(tiny_opt) -> CausalLMClassificationModule:
    made = CausalLMClassificationModule(str(tiny_opt), num_classes=3)
    made.configure_model()
    return made.eval()


@pytest.mark.parametrize("copies", [2, 3])
@torch.no_grad()
def test_the_module_scores_every_copy_alike(module, copies):
    """Three examples with 3, 2 and 2 candidates of one to three tokens."""
    candidates = [[*CANDIDATES[0], [7, 8]], *CANDIDATES[1:]]
    examples = [example(prompt, ids, label=label) for prompt, ids, label in zip(PROMPTS, candidates, [2, 0, 1], strict=True)]
    batch = ScoringCollator(PAD)(examples)
    repeated = module.repeat_batch(batch, copies)
    scores, losses = module(batch), module.loss(batch)
    assert scores.shape == (3, 3)
    assert scores.isinf().tolist() == [[False] * 3, [False, False, True], [False, False, True]]
    assert len(set(losses.tolist())) == 3
    torch.testing.assert_close(module(repeated), scores.repeat(copies, 1), rtol=0, atol=2e-6)
    torch.testing.assert_close(module.loss(repeated), losses.repeat(copies), rtol=0, atol=2e-6)
    torch.testing.assert_close(module.closures(batch)[1](copies), losses.repeat(copies), rtol=0, atol=2e-6)
