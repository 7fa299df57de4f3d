"""Generation tasks: SQuAD and DROP as prompts and tokens, what counts as an answer, and room for what the model writes."""

import json

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from tests.data.conftest import SHARED, opt_like, write_jsonl
from zo_lightning.data import DROP, DataError, GenerationTask, PromptDataModule, PromptDataset, SQuAD, get_task, load_split

SQUAD_ROW = {
    "id": "s1",
    "title": "River_Otter",
    "context": "The otter swims. It eats fish.",
    "question": " What does it eat? ",
    "answers": {"text": ["fish", "fish.", " fish", "It eats\nfish"], "answer_start": [25, 25, 24, 17]},
}
DROP_ROW = {
    "section_id": "d",
    "query_id": "d1",
    "passage": "The team won 3 games.",
    "question": "How many games did it win?  ",
    "answers_spans": {"spans": ["3", "3 games"], "types": ["number", "span"]},
}
TEXT = (
    "Title Context Question Answer Passage : River Otter The otter swims . It eats fish What does it eat ? team won 3 games "
    "How many did win"
)
WORDS = ["\n", *dict.fromkeys(TEXT.split())]  # ids from 4 on


@pytest.fixture(scope="module")
def tokens():
    """One token per word, and OPT's `</s>` in front of every text."""
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<mask>": 3, **{word: 4 + i for i, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), behavior="removed", invert=True)
    return opt_like(tokenizer)


def encoded(task, rows, tokenizer, folder, max_length=64):
    write_jsonl(folder / "train.jsonl", rows)
    source = load_split(task, "train", folder)
    return PromptDataset.from_rows(task, source, range(len(rows)), tokenizer, max_length)


# ---- the tasks of the literature ---------------------------------------------------------------------------------------
def test_squad_prompt():
    task = get_task("squad")
    assert isinstance(task, SQuAD)
    assert task.prompt(SQUAD_ROW) == (
        "Title: River Otter\nContext: The otter swims. It eats fish.\nQuestion: What does it eat?\nAnswer:"
    )
    assert task.candidates(SQUAD_ROW) == [" fish\n"]
    assert task.answers(SQUAD_ROW) == ["fish", "fish.", "It eats fish"]
    assert task.gold(SQUAD_ROW) == [0]
    assert (task.hub, task.hub_config, task.max_new_tokens) == ("rajpurkar/squad", None, 50)
    assert SQUAD_ROW["title"] == "River_Otter", "the row itself is left as it is"


def test_drop_prompt():
    task = get_task("DROP")
    assert isinstance(task, DROP)
    assert task.prompt(DROP_ROW) == "Passage: The team won 3 games.\nQuestion: How many games did it win?\nAnswer:"
    assert task.candidates(DROP_ROW) == [" 3\n"]
    assert task.answers(DROP_ROW) == ["3", "3 games"]
    assert (task.hub, task.hub_config, task.max_new_tokens) == ("ucinlp/drop", None, 50)


def test_squad_tokens(tokens, tmp_path):
    (example,) = encoded(SQuAD(max_new_tokens=8), [SQUAD_ROW], tokens, tmp_path).examples
    prompt = [2, 5, 10, 11, 12, 4, 6, 10, 13, 14, 15, 16, 17, 18, 19, 16, 4, 7, 10, 20, 21, 22, 23, 24, 4, 8, 10]
    assert example["prompt_ids"] == example["generation_ids"] == prompt
    assert example["candidate_ids"] == [[19, 4]], "the first answer and the line break"
    assert example["answers"] == ["fish", "fish.", "It eats fish"]
    assert (example["label"], example["gold"], example["index"]) == (0, [0], 0)


def test_drop_tokens(tokens, tmp_path):
    (example,) = encoded(DROP(max_new_tokens=8), [DROP_ROW], tokens, tmp_path).examples
    prompt = [2, 9, 10, 13, 25, 26, 27, 28, 16, 4, 7, 10, 29, 30, 28, 31, 22, 32, 24, 4, 8, 10]
    assert example["prompt_ids"] == example["generation_ids"] == prompt
    assert example["candidate_ids"] == [[27, 4]]
    assert example["answers"] == ["3", "3 games"]


@pytest.mark.parametrize(("task", "row"), [(SQuAD(8), SQUAD_ROW), (DROP(8), DROP_ROW)])
def test_bytes_decode_to_the_texts(task, row, bpe, tmp_path):
    (example,) = encoded(task, [row], bpe, tmp_path, 400).examples
    assert example["prompt_ids"][0] == example["generation_ids"][0] == bpe.bos_token_id
    assert bpe.decode(example["generation_ids"][1:]) == task.prompt(row)
    assert bpe.decode(example["prompt_ids"][1:] + example["candidate_ids"][0]) == task.prompt(row) + task.candidates(row)[0]


def test_split_sizes_of_squad():
    folder, model = SHARED / "data" / "squad", SHARED / "models" / "opt-mini"
    if not folder.is_dir() or not model.is_dir():
        pytest.skip(f"no real rows in {folder}, or no tokenizer in {model}")
    data = PromptDataModule("squad", str(folder), str(model), pin_memory=False)
    data.setup()
    assert [len(data.dataset(part)) for part in ("train", "dev", "eval")] == [1000, 500, 1000]
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert data.tokenizer_in_use.get_vocab() == tokenizer.get_vocab()
    lines = [json.loads(line) for line in (folder / "validation.jsonl").read_text(encoding="utf-8").splitlines()]
    several = 0
    for example in data.dataset("eval").examples:
        row = lines[example["index"]]
        assert len(example["generation_ids"]) <= tokenizer.model_max_length - 50
        assert example["generation_ids"][0] == tokenizer.bos_token_id
        assert example["prompt"].endswith(tokenizer.decode(example["generation_ids"][1:]))
        assert row["context"] in example["prompt"]
        assert set(example["answers"]) == {text.strip() for text in row["answers"]["text"]}
        several += len(example["answers"]) > 1
    assert several > 100


# ---- what counts as an answer ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("found", "answers"),
    [
        ("yes", ["yes"]),
        (" a\n b ", ["a b"]),
        (7, ["7"]),
        (7.0, ["7"]),
        (2.5, ["2.5"]),
        (True, ["true"]),
        (["b", "a", "b", " a "], ["b", "a"]),
        (["", None, "a"], ["a"]),
        ([3, "three"], ["3", "three"]),
        ({"text": ["x", "y"], "answer_start": [0, 1]}, ["x", "y"]),
        ({"spans": ["x"], "types": ["span"]}, ["x"]),
        ({"text": "x"}, ["x"]),
    ],
)
def test_forms_of_answers(found, answers):
    task = GenerationTask("{q}", answer_column="a")
    assert task.answers({"q": "?", "a": found}) == answers
    assert task.candidates({"q": "?", "a": found}) == [f" {answers[0]}\n"]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "no answer in column 'a', fill it or remove the row"),
        (float("nan"), "no answer in column 'a'"),
        ("  ", "no answer in column 'a'"),
        ([], "no answer in column 'a'"),
        ({"text": [], "answer_start": []}, "no answer in column 'a'"),
        ({"value": "x"}, r"must be texts or numbers, .* under 'text' or 'spans', got \{'value': 'x'\}"),
        ([{"text": "x"}], r"must be texts or numbers, .* got \{'text': 'x'\}"),
    ],
)
def test_no_answer(found, message):
    with pytest.raises(DataError, match=message):
        GenerationTask("{q}", answer_column="a").answers({"q": "?", "a": found})


def test_a_row_without_an_answer_is_named(tokens, tmp_path):
    rows = [SQUAD_ROW, {**SQUAD_ROW, "answers": {"text": [], "answer_start": []}}]
    with pytest.raises(DataError, match=r"row 1 \(from 0\) of .*train.jsonl: no answer in column 'answers'"):
        encoded(SQuAD(), rows, tokens, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidate": " answer"}, "the candidate ' answer' names no column"),
        ({"candidate": " {answer} {other}"}, r"must name \{answer\} and nothing else"),
        ({"candidate": "{text}"}, r"must name \{answer\} and nothing else"),
        ({"candidate": "\n{answer}\n"}, "has a line break before"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"answer_column": ""}, "answer_column must be the name of one column, got ''"),
        ({"answer_column": ["a"]}, r"answer_column must be the name of one column, got \['a'\]"),
        ({"template": "Q:"}, "the template 'Q:' names no column"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(DataError, match=f"task 'mine': .*{message}"):
        GenerationTask(**{"template": "{q}", "answer_column": "a", "name": "mine", **arguments})


def test_a_task_of_ones_own_in_yaml():
    task = get_task({"template": "Q: {q}\nA:", "answer_column": "a", "candidate": " {answer}.\n", "max_new_tokens": 3})
    assert isinstance(task, GenerationTask)
    assert task.kind == "generation"
    assert task.candidates({"q": "one?", "a": ["{x}", "y"]}) == [" {x}.\n"]
    assert task.prompt({"q": "one?", "a": "x"}) == "Q: one?\nA:"


# ---- room for what the model writes ------------------------------------------------------------------------------------
@pytest.mark.parametrize("room", [27, 26, 20, 2])
def test_prompts_lose_their_beginning_to_what_is_written(tokens, tmp_path, room):
    """BOS, and the end of the prompt; what is trained on needs less room and loses less."""
    (example,) = encoded(SQuAD(max_new_tokens=8), [SQUAD_ROW], tokens, tmp_path, room + 8).examples
    whole = [2, *tokens(example["prompt"])["input_ids"][1:]]
    assert example["generation_ids"] == [2, *whole[1:][-(room - 1) :]]
    assert example["prompt_ids"] == [2, *whole[1:][-(room + 8 - 2 - 1) :]]


def test_a_tokenizers_own_limit_counts(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "model_max_length", 30)
    (example,) = encoded(SQuAD(max_new_tokens=8), [SQUAD_ROW], tokens, tmp_path, 10_000).examples
    assert len(example["generation_ids"]) == 22


def test_truncation_is_reported(tokens, tmp_path, caplog, recwarn):
    rows = [SQUAD_ROW, {**SQUAD_ROW, "context": "It swims."}]
    with caplog.at_level("INFO"):
        encoded(SQuAD(max_new_tokens=40), rows, tokens, tmp_path, 64)
    assert (
        "1 of 2 prompts lose their beginning where the model writes the answer, to leave room for 40 tokens of 64"
        in caplog.text
    )


def test_no_room_is_an_error(tokens, tmp_path):
    message = "no room for a prompt before the 50 tokens that task 'squad' may write: the limit is 50 tokens, raise"
    with pytest.raises(DataError, match=message):
        encoded(SQuAD(), [SQUAD_ROW], tokens, tmp_path, 50)
