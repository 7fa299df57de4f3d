"""Candidates that share a row with their prompt, against scoring one candidate at a time and against rows of their own."""

from itertools import chain

import pytest
import torch
from hypothesis import given
from lightning.pytorch import LightningModule

from tests.data.conftest import write_jsonl
from tests.data.test_collate import PAD, VOCABULARY, batches, example, score_slowly, toy_logits
from tests.data.test_repeat import same
from zo_lightning.data import DataError, PromptDataModule, ScoringCollator, repeat_scoring_batch
from zo_lightning.data.packing import fed_rows, row_lengths, shared_tails

PACKED = ScoringCollator(PAD, packed=True)


def scores_as_seen(batch) -> torch.Tensor:
    """Log-probabilities of the candidates, (C,): every logit position reads what its segment lets it see, and nothing else."""
    segments = batch.get("segment", batch["attention_mask"] - 1)
    logits = []
    for row, column in zip(batch["logit_row"].tolist(), batch["logit_position"].tolist(), strict=True):
        segment = segments[row].tolist()
        visible = [t for t in range(column + 1) if segment[t] in (0, segment[column])]
        assert batch["position_ids"][row, visible].tolist() == list(range(len(visible)))
        logits.append(toy_logits(batch["input_ids"][row, visible].tolist())[-1])
    log_probs = torch.stack(logits).log_softmax(dim=-1)
    tokens = log_probs[batch["token_logit"], batch["token_id"]]
    return torch.zeros(len(batch["candidate_length"]), dtype=torch.float64).index_add(0, batch["token_candidate"], tokens)


@given(batches)
def test_scores_are_those_of_one_candidate_at_a_time(examples):
    """Examples with 2 to 5 candidates of 1 to 4 tokens, which may begin alike, and prompts of 1 to 20 tokens."""
    expected = [score for item in examples for score in score_slowly(item)]
    torch.testing.assert_close(scores_as_seen(PACKED(examples)), torch.tensor(expected, dtype=torch.float64))


@given(batches)
def test_the_plan_is_the_same_but_for_the_rows(examples):
    packed, alone = PACKED(examples), ScoringCollator(PAD)(examples)
    moved = {"input_ids", "attention_mask", "position_ids", "logit_row", "logit_position", "segment"}
    assert {key: column.tolist() for key, column in packed.items() if key not in moved} == {
        key: column.tolist() for key, column in alone.items() if key not in moved
    }
    assert len(packed["logit_row"]) == len(alone["logit_row"])
    assert "segment" not in alone
    rows = [fed_rows(item, packed=True)[0] for item in examples]
    assert ("segment" in packed) == any(len(row.tails) > 1 for row in rows)
    assert len(packed["input_ids"]) == len(examples)
    for number, item in enumerate(examples):
        count = int(packed["attention_mask"][number].sum())
        assert [count] == row_lengths(item, packed=True)
        assert bool((packed["input_ids"][number, :-count] == PAD).all())
        if "segment" in packed:
            segment = packed["segment"][number].tolist()
            assert segment[:-count] == [-1] * (len(segment) - count)
            prompt, tails = item["prompt_ids"], shared_tails(item["candidate_ids"])
            found = list(zip(segment[-count:], packed["input_ids"][number, -count:].tolist(), strict=True))
            parts = [prompt, *map(list, tails)]
            assert found == [(k, token) for k, tokens in enumerate(parts) for token in tokens]
    assert [int(n) for n in alone["attention_mask"].sum(dim=1)] == [n for e in examples for n in row_lengths(e, packed=False)]


@given(batches)
def test_a_repeated_packed_batch_is_that_of_the_examples_collated_again(examples):
    batch = PACKED(examples)
    for copies in (1, 2, 3):
        expected, repeated = PACKED(examples * copies), repeat_scoring_batch(batch, copies)
        assert list(repeated) == list(expected)
        assert all(same(repeated[key], expected[key]) for key in expected)


def test_one_row():
    batch = PACKED([example([2, 8, 9], [[11, 12], [13, 14, 15], [11, 16]]), example([2], [[5], [6]])])
    width = batch["input_ids"].shape[1]
    assert width == 8
    # of the candidates that begin with 11 one tail is enough
    assert batch["input_ids"].tolist() == [[PAD] * 2 + [2, 8, 9, 13, 14, 11], [PAD] * 7 + [2]]
    assert batch["segment"].tolist() == [[-1] * 2 + [0, 0, 0, 1, 1, 2], [-1] * 7 + [0]]
    assert batch["position_ids"].tolist() == [[0] * 2 + [0, 1, 2, 3, 4, 3], [0] * 8]
    places = list(zip(batch["logit_row"].tolist(), batch["logit_position"].tolist(), strict=True))
    assert places == [(0, 4), (0, 5), (0, 6), (0, 7), (1, 7)]


def test_neutral_prompts_are_packed_too():
    item = {**example([2, 8], [[11, 12], [13, 14]]), "neutral_ids": [2, 9], "neutral_candidate_ids": [[11, 12], [13, 14]]}
    batch = PACKED([item, item])
    neutral = batch["neutral"]
    assert neutral["input_ids"].tolist() == [[PAD] * 4 + [2, 9, 11, 13]]
    assert neutral["segment"].tolist() == [[-1] * 4 + [0, 0, 1, 2]]
    assert VOCABULARY > 14
    assert scores_as_seen(neutral).tolist() == pytest.approx(score_slowly({**item, "prompt_ids": [2, 9]}))


# ---- in the datamodule -------------------------------------------------------------------------------------------------
TASK = {"template": "{premise} so", "choices": ["one", "two"], "label_column": "label"}


@pytest.fixture
def choice_dir(tmp_path):
    """Short and long choices, so that packed rows sort in another order than rows of their own."""
    rows = [
        {
            "premise": "a film" + " with no plot" * (i % 3),
            "one": "film was good" if i % 2 else "no plot",
            "two": "It was terrible ." + " not sure" * (i % 4),
            "label": i % 2,
        }
        for i in range(24)
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "validation.jsonl", rows[:8])
    return tmp_path


class Packs(LightningModule):
    """Says that it packs, when it has its model."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.asked = answer, 0

    @property
    def allows_packing(self):
        self.asked += 1
        return self.answer

    def check_packing(self):
        self.asked += 1
        if not self.answer:
            raise ValueError("no")


class Stub:
    """What a datamodule asks of a Trainer."""

    overfit_batches = 0

    def __init__(self, module):
        self.lightning_module = module


def make(folder, words, module=None, **options):
    arguments = {"task": TASK, "data_dir": str(folder), "tokenizer": words, "batch_size": 4, "num_dev": 4, "pin_memory": False}
    data = PromptDataModule(**{**arguments, "shuffle_seed": 0, **options})
    data.trainer = None if module is None else Stub(module)
    data.setup()
    return data


def test_the_module_is_asked_when_the_first_batch_is(choice_dir, words):
    module = Packs(False)
    data = make(choice_dir, words, module)
    loader = data.train_dataloader()
    assert module.asked == 0
    module.answer = True  # as where the model is loaded after the loaders are made
    lengths = loader.batch_sampler.lengths
    before = list(lengths)
    assert all(len(batch["input_ids"]) == 4 and "segment" in batch for batch in loader)
    assert module.asked == 1
    assert lengths == [row_lengths(item, packed=True)[0] for item in data.dataset("train").examples] != before
    list(loader)
    assert module.asked == 1
    for other in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert all("segment" in batch for batch in other)


@pytest.mark.parametrize(
    ("module", "packing"), [(None, None), (LightningModule(), None), (Packs(False), None), (Packs(True), False)]
)
def test_rows_of_their_own(choice_dir, words, module, packing):
    data = make(choice_dir, words, module, packing=packing)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            assert "segment" not in batch
            assert len(batch["input_ids"]) == 2 * len(batch["label"])
    assert data.dataset("train").lengths == [max(row_lengths(e, packed=False)) for e in data.dataset("train").examples]


def test_batches_hold_the_same_examples_however_they_are_fed(choice_dir, words):
    """All examples once, in batches of similar packed length."""
    rows = []
    for packing in (False, True):
        loader = make(choice_dir, words, Packs(True), packing=packing).train_dataloader()
        rows.append([batch["index"].tolist() for batch in loader])
    assert sorted(chain(*rows[0])) == sorted(chain(*rows[1]))
    assert rows[0] != rows[1]
    spread = [max(lengths) - min(lengths) for lengths in ([loader.dataset.lengths[p] for p in b] for b in loader.batch_sampler)]
    assert sum(spread) <= 8


def test_packing_that_is_asked_for_and_impossible(choice_dir, words):
    with pytest.raises(DataError, match="packing=True: nothing can tell whether the model allows it"):
        next(iter(make(choice_dir, words, packing=True).train_dataloader()))
    with pytest.raises(ValueError, match=r"^no$"):
        next(iter(make(choice_dir, words, Packs(False), packing=True).train_dataloader()))


def test_single_tokens_are_never_packed(film_dir, words):
    """One row does for both verbalizers anyway: nobody is asked."""
    module = Packs(True)
    data = make(film_dir, words, module, task="sst2")
    assert not any("segment" in batch for batch in data.train_dataloader())
    assert module.asked == 0


def test_workers_pack_too(choice_dir, words):
    found = []
    for workers in (0, 2):
        loader = make(choice_dir, words, Packs(True), num_workers=workers).train_dataloader()
        epochs = [[{key: column.tolist() for key, column in batch.items()} for batch in loader] for _ in range(2)]
        assert epochs[0] == epochs[1]
        found.append(epochs[0])
    assert found[0] == found[1]
    assert "segment" in found[0][0]
