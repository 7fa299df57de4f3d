"""The scoring plan against scoring one candidate at a time."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from zo_lightning.data import Example, ScoringCollator, num_candidates

PAD = 1
VOCABULARY = 40


def example(prompt, candidates, label=0, index=0) -> Example:
    return Example(
        prompt="", candidates=[], prompt_ids=prompt, candidate_ids=candidates, label=label, gold=[label], index=index
    )


def toy_logits(ids: list[int]) -> torch.Tensor:
    """Next-token logits of a model whose state is a hash of everything so far: (len(ids), VOCABULARY), exact."""
    state, rows = 17, []
    for position, token in enumerate(ids):
        state = (state * 31 + token * 7 + position) % 1009
        rows.append([(state * (3 + v) + v * v) % 257 for v in range(VOCABULARY)])
    return torch.tensor(rows, dtype=torch.float64)


def score_slowly(example: Example) -> list[float]:
    """Sum of log-probabilities of each candidate, fed one at a time, unpadded."""
    scores = []
    for ids in example["candidate_ids"]:
        sequence = [*example["prompt_ids"], *ids]
        log_probs = toy_logits(sequence).log_softmax(dim=-1)
        start = len(example["prompt_ids"])
        scores.append(sum(float(log_probs[t - 1, sequence[t]]) for t in range(start, len(sequence))))
    return scores


def score_by_plan(batch) -> torch.Tensor:
    """The same from a batch, (C,): reads nothing but the plan."""
    logits = torch.zeros(*batch["input_ids"].shape, VOCABULARY, dtype=torch.float64)
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        logits[row, mask.bool()] = toy_logits(ids[mask.bool()].tolist())
    log_probs = logits[batch["logit_row"], batch["logit_position"]].log_softmax(dim=-1)
    tokens = log_probs[batch["token_logit"], batch["token_id"]]
    return torch.zeros(len(batch["candidate_length"]), dtype=torch.float64).index_add(0, batch["token_candidate"], tokens)


tokens = st.integers(2, 6)  # few, so that candidates begin alike
examples = st.builds(
    example,
    prompt=st.lists(tokens, min_size=1, max_size=20),
    candidates=st.lists(st.lists(tokens, min_size=1, max_size=4), min_size=2, max_size=5, unique_by=tuple),
    label=st.integers(0, 1),
    index=st.integers(0, 10**6),
)
batches = st.lists(examples, min_size=1, max_size=5)


@given(batches)
def test_scores_are_those_of_one_candidate_at_a_time(examples):
    batch = ScoringCollator(PAD)(examples)
    expected = [score for item in examples for score in score_slowly(item)]
    torch.testing.assert_close(score_by_plan(batch), torch.tensor(expected, dtype=torch.float64))


@given(batches)
def test_the_plan_holds_together(examples):
    batch = ScoringCollator(PAD)(examples)
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    rows, width = batch["input_ids"].shape
    mask = batch["attention_mask"]
    assert width % 8 == 0
    assert int(mask.sum(dim=1).max()) > width - 8, "no more padding than rounding up needs"
    assert bool((mask.diff(dim=1) >= 0).all()), "padding is on the left"
    assert bool((mask[:, -1] == 1).all())
    assert bool((batch["input_ids"][mask == 0] == PAD).all())
    for row in range(rows):
        length = int(mask[row].sum())
        assert batch["position_ids"][row].tolist() == [0] * (width - length) + list(range(length))
    places = list(zip(batch["logit_row"].tolist(), batch["logit_position"].tolist(), strict=True))
    assert len(set(places)) == len(places)
    assert sorted(set(batch["token_logit"].tolist())) == list(range(len(places))), "no logits that nobody reads"
    candidates = [(b, k, ids) for b, item in enumerate(examples) for k, ids in enumerate(item["candidate_ids"])]
    assert batch["candidate_example"].tolist() == [b for b, _, _ in candidates]
    assert batch["candidate_index"].tolist() == [k for _, k, _ in candidates]
    assert batch["candidate_length"].tolist() == [len(ids) for _, _, ids in candidates]
    assert batch["label"].tolist() == [item["label"] for item in examples]
    assert batch["index"].tolist() == [item["index"] for item in examples]
    assert num_candidates(batch).tolist() == [len(item["candidate_ids"]) for item in examples]
    for c, (b, _, ids) in enumerate(candidates):
        scored = (batch["token_candidate"] == c).nonzero().flatten().tolist()
        assert batch["token_id"][scored].tolist() == ids
        for count, s in enumerate(scored):
            row, column = places[int(batch["token_logit"][s])]
            seen = batch["input_ids"][row, : column + 1][mask[row, : column + 1].bool()].tolist()
            assert seen == [*examples[b]["prompt_ids"], *ids[:count]], "what comes before the token that is predicted"


@given(batches)
def test_no_row_could_be_saved(examples):
    batch = ScoringCollator(PAD)(examples)
    fed = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    wanted = []
    for item in examples:
        bodies = {(*item["prompt_ids"], *ids[:-1]) for ids in item["candidate_ids"]}
        wanted += [list(body) for body in bodies if not any(o != body and o[: len(body)] == body for o in bodies)]
    assert sorted(fed) == sorted(wanted)


def test_single_tokens_cost_one_row_and_one_logit():
    batch = ScoringCollator(PAD)([example([2, 8, 9], [[11], [12]], label=1), example([2, 7], [[11], [12]])])
    assert batch["input_ids"].tolist() == [[PAD] * 5 + [2, 8, 9], [PAD] * 6 + [2, 7]]
    assert batch["logit_row"].tolist() == [0, 1]
    assert batch["logit_position"].tolist() == [7, 7]
    assert batch["token_logit"].tolist() == [0, 0, 1, 1]
    assert batch["token_id"].tolist() == [11, 12, 11, 12]


def test_a_short_candidate_rides_on_a_long_one():
    # Yes, No, "Maybe not sure": one row, which never holds the last token.
    batch = ScoringCollator(PAD)([example([2, 8], [[16], [17], [18, 19, 20]])])
    assert batch["input_ids"].tolist() == [[PAD] * 4 + [2, 8, 18, 19]]
    assert batch["logit_position"].tolist() == [5, 6, 7]
    assert batch["token_logit"].tolist() == [0, 0, 0, 1, 2]
    assert batch["candidate_length"].tolist() == [1, 1, 3]


def test_the_multiple_and_the_padding_are_free():
    batch = ScoringCollator(0, multiple=1)([example([2, 8], [[3], [4]]), example([2], [[3], [4]])])
    assert batch["input_ids"].tolist() == [[2, 8], [0, 2]]
