"""Demonstrations: their texts and tokens, which rows they are, and how many fit."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoTokenizer

from tests.data.conftest import SHARED, byte_tokenizer, film_rows, write_jsonl
from tests.data.test_datamodule import Recorder, make, trainer
from zo_lightning.data import (
    ClassificationTask,
    DataError,
    Demonstration,
    Demonstrations,
    PlainPrompting,
    PromptDataModule,
    PromptDataset,
)
from zo_lightning.data.prompting import fitting_counts
from zo_lightning.data.sources import load_split

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]

ANSWERS = (" terrible", " great")


def shown_text(index: int) -> str:
    row = film_rows(40)[index]
    return f"{row['sentence']} It was{ANSWERS[row['label']]}\n\n"


def test_golden_text():
    shown = [Demonstration("a film.\n", "Yes", "here", 0), Demonstration(" a plot. Answer:", " no\n", "here", 1)]
    assert PlainPrompting().prompt("one two?", shown) == "a film.\nYes\n\na plot. Answer: no\n\none two?"
    assert PlainPrompting().prompt(" one two?\n") == " one two?\n"
    assert PlainPrompting().candidates([" good\n"], ends=True) == [" good\n"]


def test_golden_ids(tmp_path, words):
    # Ids from 4 on, in the order of conftest.WORDS: a 4, film 5, with 6, no 7, plot 8, It 9, was 10, terrible 11, ...
    write_jsonl(tmp_path / "train.jsonl", [{"sentence": "a film", "label": 1}, {"sentence": "no plot", "label": 0}])
    write_jsonl(tmp_path / "validation.jsonl", [{"sentence": "a plot ", "label": 0}])
    data = make(tmp_path, words, num_dev=1, num_demonstrations=1)
    data.setup("test")
    (item,) = data.dataset("eval").examples
    shown, ids = {
        0: ("a film It was great", [4, 5, 9, 10, 12]),
        1: ("no plot It was terrible", [7, 8, 9, 10, 11]),
    }[int(data._training_split()[1][0])]
    assert item["prompt"] == f"{shown}\n\na plot It was"
    assert item["prompt_ids"] == [2, *ids, 28, 28, 4, 8, 9, 10]
    assert item["candidate_ids"] == [[11], [12]]


def test_which_rows_are_shown(film_dir, words):
    data = make(film_dir, words, num_train=10, num_dev=6, num_demonstrations=3)
    data.setup()
    train = [item["index"] for item in data.dataset("train").examples]
    for part in ("dev", "eval"):
        for item in data.dataset(part).examples:
            assert item["prompt"].startswith("".join(map(shown_text, train[:3])))
            assert item["prompt"].count("\n\n") == 3
    for item in data.dataset("train").examples:
        others = [index for index in train if index != item["index"]][:3]
        row = film_rows(40)[item["index"]]
        assert item["prompt"] == "".join(map(shown_text, others)) + f"{row['sentence']} It was"


def test_all_training_rows_are_shown_but_the_row_itself(film_dir, words):
    data = make(film_dir, words, num_train=4, num_dev=6, num_demonstrations=4)
    data.setup()
    assert [item["prompt"].count("\n\n") for item in data.dataset("train").examples] == [3] * 4
    assert {item["prompt"].count("\n\n") for item in data.dataset("eval").examples} == {4}


def test_the_same_number_in_another_split_is_another_row():
    """Row 5 of the evaluation split has nothing to do with row 5 of the training split."""
    shown = tuple(Demonstration("", "", "train.jsonl", index) for index in range(3))
    assert Demonstrations(shown, 2).before("validation.jsonl", 0) == [*shown[:2]]
    assert Demonstrations(shown, 2).before("train.jsonl", 0) == [*shown[1:]]
    assert Demonstrations(shown, 2).before("train.jsonl", 2) == [*shown[:2]]


def test_seeds(film_dir, words):
    def prompt(**arguments):
        data = make(film_dir, words, num_train=20, num_dev=5, num_demonstrations=4, **arguments)
        data.setup("test")
        return data.dataset("eval").by_index(0)["prompt"], data

    first, data = prompt()
    assert prompt()[0] == first
    drawn = [prompt(demonstration_seed=seed)[0] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert len({first, *drawn}) == 3
    train = data._training_split()[1]
    texts = {shown_text(index) for index in train}
    for text in (first, *drawn):
        shown = [f"{each}\n\n" for each in text.split("\n\n")[:-1]]
        assert set(shown) <= texts
        assert len(shown) == 4


def test_too_many(film_dir, words):
    with pytest.raises(
        DataError, match=r"num_demonstrations is 5, and there are 4 training rows .*lower it or raise num_train"
    ):
        make(film_dir, words, num_train=4, num_dev=6, num_demonstrations=5).setup("test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_demonstrations": -1}, "num_demonstrations must be at least 0, got -1"),
        ({"demonstration_seed": -1}, "demonstration_seed must be from 0 to"),
        ({"system_prompt": "Help."}, "system_prompt is for chats only, give chat_template=True too"),
    ],
)
def test_bad_arguments(film_dir, words, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(film_dir, words, **arguments)


def test_a_row_without_a_value(film_dir, words):
    rows = film_rows(40)
    for row in rows:
        row["sentence"] = None
    write_jsonl(film_dir / "train.jsonl", rows)
    with pytest.raises(DataError, match=r"row \d+ \(from 0\) of .*train\.jsonl: no value in \['sentence'\]"):
        make(film_dir, words, num_demonstrations=2).setup("test")


def test_counts_are_logged(film_dir, words, monkeypatch):
    messages = []
    monkeypatch.setattr("zo_lightning.data.dataset.rank_zero_info", messages.append)
    make(film_dir, words, num_demonstrations=2, num_eval=5).setup("test")
    origin = film_dir / "validation.jsonl"
    assert messages == [f"{origin}: demonstrations that fit into 2048 tokens with each prompt: 2"]
    messages.clear()
    data = make(film_dir, words, num_demonstrations=6, max_length=45)
    data.setup("test")
    counts = [item["prompt"].count("\n\n") for item in data.dataset("eval").examples]
    assert min(counts) < max(counts)
    assert messages == [
        f"{origin}: demonstrations that fit into 45 tokens with each prompt: {min(counts)} to {max(counts)}, "
        f"{sum(counts) / 12:.1f} on average"
    ]


def test_one_that_does_not_fit_is_left_out_in_whole(film_dir, words):
    data = make(film_dir, words, num_demonstrations=30, max_length=60)
    data.setup("test")
    for item in data.dataset("eval").examples:
        texts = item["prompt"].split("\n\n")
        assert len(texts) > 2
        assert words(item["prompt"])["input_ids"] == item["prompt_ids"], "nothing is cut"
        assert len(item["prompt_ids"]) + 1 <= 60
        for text in texts[:-1]:
            assert text.startswith("a ")
            assert text.endswith(("terrible", "great"))


def test_prompts_too_long_for_any(film_dir, words):
    data = make(film_dir, words, num_demonstrations=3, max_length=6)
    data.setup("test")
    for item in data.dataset("eval").examples:
        assert "\n" not in item["prompt"]
        assert len(item["prompt_ids"]) == 5


def test_generation_leaves_room_for_what_is_written(tmp_path, words):
    rows = [{"question": "one two", "answers": ["bad film"]}] * 9
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "validation.jsonl", rows)
    for room, most in ((3, 3), (4, 3), (9, 3), (10, 2), (16, 2), (17, 1)):
        # BOS, the prompt's 3 tokens, and 7 for each demonstration: one two : bad film, and the blank line
        task = {"template": "{question}:", "answer_column": "answers", "max_new_tokens": room}
        data = make(tmp_path, words, task=task, num_demonstrations=8, max_length=34)
        data.setup("test")
        item = data.dataset("eval")[0]
        assert item["prompt"] == "one two: bad film\n\n" * most + "one two:"
        assert item["generation_ids"] == item["prompt_ids"]
        assert len(item["generation_ids"]) == 4 + 7 * most


def test_neutral_prompts_keep_the_demonstrations(film_dir, words):
    data = make(film_dir, words, num_demonstrations=2, calibrated=True)
    data.setup("test")
    for item in data.dataset("eval").examples:
        shown = item["prompt"].rpartition("\n\n")[0]
        assert item["neutral_ids"] == words(f"{shown}\n\nIt was")["input_ids"]
        assert item["neutral_candidate_ids"] == [[11], [12]]


def test_a_long_neutral_prompt_counts_too(tmp_path, words):
    task = ClassificationTask("{text}", [" bad", " good"], neutral_template="{text}" + " one" * 8, columns=["text"])
    rows = [{"text": "a film", "label": 0}] * 9
    write_jsonl(tmp_path / "validation.jsonl", rows)
    source = load_split(task, "validation", tmp_path)
    shown = Demonstrations(tuple(Demonstration("a", " bad", "elsewhere", i) for i in range(4)), 4)
    for calibrated, count in ((False, 3), (True, 1)):
        (item,) = PromptDataset.from_rows(task, source, [0], words, 17, calibrated, demonstrations=shown).examples
        assert item["prompt"].count("\n\n") == count


@given(
    pieces=st.lists(st.lists(st.integers(1, 9), max_size=8), min_size=1, max_size=5),
    alone=st.integers(1, 9),
    limit=st.integers(0, 60),
)
def test_property_the_largest_number_that_fits(pieces, alone, limit):
    def lengths(positions, counts):
        return [alone + sum(pieces[position][:count]) for position, count in zip(positions, counts, strict=True)]

    def slow(sizes):
        return max((n for n in range(len(sizes) + 1) if alone + sum(sizes[:n]) <= limit), default=0)

    assert fitting_counts(lengths, [len(sizes) for sizes in pieces], limit) == [slow(sizes) for sizes in pieces]


@pytest.mark.parametrize("limit", [3, 20, 45, 200])
def test_two_tries_do_where_no_tokens_merge(limit):
    """Besides one prompt with all numbers of demonstrations, and all prompts without any."""
    tries = []

    def lengths(positions, counts):
        tries.append(counts)
        return [5 + position + sum(range(3, 3 + count)) for position, count in zip(positions, counts, strict=True)]

    counts = fitting_counts(lengths, [8] * 20, limit)
    assert counts == [sum(5 + i + sum(range(3, 3 + n)) <= limit for n in range(1, 9)) for i in range(20)]
    assert len(tries) <= 4


BPE = byte_tokenizer()
TEXT = st.text(st.sampled_from("goodb aIt:\n."), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None)
@given(
    shown=st.lists(st.tuples(TEXT, TEXT), max_size=6), texts=st.lists(TEXT, min_size=1, max_size=3), limit=st.integers(9, 90)
)
def test_property_the_limit_is_kept_and_used(tmp_path_factory, shown, texts, limit):
    """Against the lengths of whole texts, each tokenised by itself."""
    task = ClassificationTask("{text}", [" good", " Maybe"])
    folder = tmp_path_factory.mktemp("rows")
    write_jsonl(folder / "validation.jsonl", [{"text": text, "label": 0} for text in texts])
    source = load_split(task, "validation", folder)
    rows = tuple(Demonstration(prompt, answer, "elsewhere", i) for i, (prompt, answer) in enumerate(shown))
    dataset = PromptDataset.from_rows(
        task, source, range(len(texts)), BPE, limit, demonstrations=Demonstrations(rows, len(rows))
    )
    for text, item in zip(texts, dataset.examples, strict=True):
        whole = ["\n\n".join([*((prompt + answer).strip() for prompt, answer in shown[:n]), text.lstrip()]) for n in range(7)]
        needed = [max(len(BPE(prompt + candidate)["input_ids"]) for candidate in (" good", " Maybe")) for prompt in whole]
        count = max((n for n in range(len(shown) + 1) if needed[n] <= limit), default=0)
        assert item["prompt"] == whole[count]
        assert len(item["prompt_ids"]) + max(map(len, item["candidate_ids"])) <= limit
        if needed[count] <= limit:
            assert item["prompt_ids"] + item["candidate_ids"][0] == BPE(whole[count] + " good")["input_ids"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_sees_the_same_batches(film_dir, words, tmp_path):
    options = {"num_demonstrations": 2, "num_train": 20, "num_dev": 5}
    whole, first, second = Recorder(), Recorder(), Recorder()
    trainer(tmp_path, max_steps=9, limit_val_batches=0).fit(whole, make(film_dir, words, **options))
    save = [ModelCheckpoint(tmp_path / "saved", every_n_train_steps=4, save_top_k=-1, filename="first-{step}")]
    kept = {"limit_val_batches": 0, "enable_checkpointing": True, "callbacks": save}
    trainer(tmp_path, max_steps=4, **kept).fit(first, make(film_dir, words, **options))
    trainer(tmp_path, max_steps=9, **kept).fit(
        second, make(film_dir, words, **options), ckpt_path=tmp_path / "saved" / "first-step=4.ckpt"
    )
    assert first.seen["train"] + second.seen["train"] == whole.seen["train"]


@pytest.mark.parametrize("task", ["sst2", "rte", "copa", "squad"])
def test_real_rows(task):
    folder, model = SHARED / "data" / task, SHARED / "models" / "opt-mini"
    if not folder.is_dir() or not model.is_dir():
        pytest.skip(f"no real rows in {folder}, or no tokenizer in {model}")
    data = PromptDataModule(task, str(folder), str(model), pin_memory=False, num_eval=40, num_demonstrations=32)
    data.setup("test")
    tokenizer = AutoTokenizer.from_pretrained(model)
    source, train, _ = data._training_split()
    row = source.rows[int(train[0])]
    first = (data.task.prompt(row) + data.task.candidates(row)[data.task.gold(row)[0]]).strip()
    room = getattr(data.task, "max_new_tokens", 0)
    for item in data.dataset("eval").examples:
        ids = tokenizer(item["prompt"])["input_ids"]
        longest = max(len(tokenizer(item["prompt"] + text)["input_ids"]) for text in item["candidates"])
        shown = item["prompt"].startswith(first[:40])
        if shown:
            assert max(longest, len(ids) + room) <= 512
            assert item["prompt_ids"] == ids[: len(item["prompt_ids"])]
        else:
            assert len(tokenizer(f"{first}\n\n{item['prompt']}")["input_ids"]) + max(longest - len(ids), room) > 512
    assert task == "squad" or shown
