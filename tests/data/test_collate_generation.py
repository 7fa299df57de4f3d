"""Generation batches against their examples: padding, copies, transfers, and which batches the datamodule makes."""

import copy
import pickle

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device

from tests.data.conftest import word_tokenizer, write_jsonl
from tests.data.test_collate import example
from tests.data.test_repeat import same
from zo_lightning.data import GenerationCollator, PromptDataModule, PromptDataset, ScoringCollator, repeat_generation_batch

PAD = 1


def written(prompt, answer, generation=None, answers=("a",), index=0):
    made = example(prompt, [answer], index=index)
    made["generation_ids"] = prompt if generation is None else generation
    made["answers"] = list(answers)
    return made


EXAMPLES = [
    written([2, 8, 9], [16, 4], answers=["x", "y z"], index=7),
    written([2, 8, 9, 10, 11, 12, 13, 14, 15], [17, 18, 4], generation=[2, 13, 14, 15], index=3),
    written([2], [19], answers=["w"], index=11),
]


def test_prompts_are_padded_on_the_left():
    batch = GenerationCollator(ScoringCollator(PAD))(EXAMPLES)
    assert batch["input_ids"].tolist() == [
        [1, 1, 1, 1, 1, 2, 8, 9],
        [1, 1, 1, 1, 2, 13, 14, 15],
        [1, 1, 1, 1, 1, 1, 1, 2],
    ]
    assert batch["attention_mask"].tolist() == [[0] * 5 + [1] * 3, [0] * 4 + [1] * 4, [0] * 7 + [1]]
    assert batch["answers"] == [["x", "y z"], ["a"], ["w"]]
    assert batch["index"].tolist() == [7, 3, 11]
    assert all(batch[key].dtype == torch.int64 for key in ("input_ids", "attention_mask", "index"))


@pytest.mark.parametrize(("multiple", "width"), [(1, 4), (3, 6), (8, 8), (None, 4)])
def test_the_width_is_a_multiple(multiple, width):
    batch = GenerationCollator(ScoringCollator(PAD, multiple))(EXAMPLES)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, width)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 4, 1]


def test_a_token_that_pads_is_a_token_all_the_same():
    """Where padding is done with EOS, which is OPT's BOS too."""
    batch = GenerationCollator(ScoringCollator(2))(EXAMPLES[:1])
    assert batch["input_ids"].tolist() == [[2] * 6 + [8, 9]]
    assert batch["attention_mask"].tolist() == [[0] * 5 + [1] * 3]


def test_answers_are_scored_as_ever():
    batch, expected = GenerationCollator(ScoringCollator(PAD))(EXAMPLES), ScoringCollator(PAD)(EXAMPLES)
    assert same(batch["scoring"], expected)
    assert expected["candidate_length"].tolist() == [2, 3, 1]


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_a_repeated_batch_is_that_of_the_examples_collated_again(copies):
    collate = GenerationCollator(ScoringCollator(PAD))
    batch = collate(EXAMPLES)
    before = copy.deepcopy(batch)
    assert same(repeat_generation_batch(batch, copies), collate(EXAMPLES * copies))
    assert same(batch, before)


def test_it_is_carried_to_a_device_and_between_processes():
    batch = GenerationCollator(ScoringCollator(PAD))(EXAMPLES)
    assert same(pickle.loads(pickle.dumps(batch)), batch)
    moved = move_data_to_device(batch, torch.device("meta"))
    assert list(moved) == list(batch)
    assert moved["answers"] == batch["answers"]
    tensors = [moved["input_ids"], moved["attention_mask"], moved["index"], *moved["scoring"].values()]
    assert all(tensor.device.type == "meta" for tensor in tensors)


@pytest.fixture
def questions(tmp_path):
    """Questions of 3 to 12 words."""
    for name, count in (("train", 40), ("validation", 12)):
        rows = [{"q": "was it a film" + " with no plot" * (i % 4), "a": ["Yes", "good"][: 1 + i % 2]} for i in range(count)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


TASK = {"template": "{q} ?", "answer_column": "a", "max_new_tokens": 5}


def datamodule(task, folder, **arguments):
    data = PromptDataModule(task, str(folder), word_tokenizer(), 4, num_dev=8, pin_memory=False, cache=False, **arguments)
    data.setup()
    return data


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_datamodule_makes_generation_batches_of_a_generation_task(questions, num_workers):
    data = datamodule(TASK, questions, num_workers=num_workers)
    seen = set()
    for batch in data.train_dataloader():
        assert batch["scoring"]["index"].tolist() == batch["index"].tolist()
        for row, index in enumerate(batch["index"].tolist()):
            item = data.dataset("train").by_index(index)
            mask = batch["attention_mask"][row].bool()
            assert batch["input_ids"][row][mask].tolist() == item["generation_ids"]
            assert batch["answers"][row] == item["answers"] == ["Yes", "good"][: 1 + index % 2]
            seen.add(index)
    assert len(seen) == 32
    assert sum(len(batch["answers"]) for batch in data.test_dataloader()) == 12


def test_other_tasks_make_scoring_batches(film_dir):
    batch = next(iter(datamodule("sst2", film_dir).train_dataloader()))
    assert "scoring" not in batch
    assert batch["label"].shape == (4,)


def test_batches_are_of_similar_length(questions):
    data = datamodule(TASK, questions, eval_batch_size=2)
    spans = [batch["attention_mask"].sum(dim=1) for batch in data.val_dataloader()]
    assert len(spans) == 4
    assert all(int(a.max()) <= int(b.min()) or int(b.max()) <= int(a.min()) for a in spans for b in spans if a is not b)


def test_the_longer_of_what_is_scored_and_what_is_continued_counts():
    """A prompt alone may have more tokens than before its answer, where a tokenizer merges the two."""
    assert PromptDataset([written([2, 8, 9], [16, 4]), written([2, 8], [16], generation=[2, 8, 9])]).lengths == [4, 3]


def test_a_training_limit_shorter_than_the_prompt_that_is_continued(questions):
    """An answer of many tokens leaves less of the prompt than what may be written."""
    task = {**TASK, "candidate": " Yes" * 9 + " {answer}", "max_new_tokens": 2}
    data = datamodule(task, questions, max_length=20)
    dataset = data.dataset("train")
    longest = max(dataset.examples, key=lambda example: len(example["generation_ids"]))
    assert len(longest["generation_ids"]) == 15
    assert len(longest["prompt_ids"]) == 10
