"""Multiple choice: prompts and token ids of COPA, ReCoRD and WinoGrande, choices and labels in every form, and mistakes."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.data.conftest import SHARED, opt_like, write_jsonl
from zo_lightning.data import (
    DataError,
    MultipleChoiceTask,
    PromptDataModule,
    PromptDataset,
    SourceSplit,
    encode_prompts,
    get_task,
)

pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")

SPACED = (
    "so because I the a it lamp went dark bulb broke paid bill met Ann Bob Rome in won left cup box does not fit is small "
    "was told that"
)
BARE = "because so The She He Ann Bob"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE such as OPT's, with a token for each word of SPACED behind its space and each of BARE without one."""
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<mask>": 3}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[byte] = len(vocabulary)
    merges = []
    for word in [*(f"Ġ{word}" for word in SPACED.split()), *BARE.split()]:
        for end in range(1, len(word)):
            if word[: end + 1] not in vocabulary:
                vocabulary[word[: end + 1]] = len(vocabulary)
                merges.append((word[:end], word[end]))
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return opt_like(model)


# Task, row, the tokens of the prompt behind the BOS, those of each candidate, the right ones, those of the neutral prompt.
# Ġ is a space and Ċ a line break, as byte-level BPE writes them.
GOLDEN = {
    "copa, cause": (
        "copa",
        {
            "premise": "The lamp went dark.",
            "choice1": "The bulb broke.",
            "choice2": "I paid the bill.",
            "question": "cause",
            "label": 0,
        },
        "The Ġlamp Ġwent Ġdark Ġbecause",
        ["Ġthe Ġbulb Ġbroke .", "ĠI Ġpaid Ġthe Ġbill ."],
        [0],
        "because",
    ),
    "copa, effect, with stray spaces and no full stop": (
        "copa",
        {
            "premise": "The bulb broke ",
            "choice1": "It was dark.",
            "choice2": " The lamp was paid.",
            "question": "effect",
            "label": 1,
        },
        "The Ġbulb Ġbroke Ġso",
        ["Ġit Ġwas Ġdark .", "Ġthe Ġlamp Ġwas Ġpaid ."],
        [1],
        "so",
    ),
    "record": (
        "record",
        {
            "passage": "Ann met Bob in Rome.\n@highlight\nBob won\n@highlight\nAnn left",
            "query": "@placeholder met Ann in Rome.",
            "entities": ["Ann", "Rome", "Bob", "Ann"],
            "answers": ["Bob", "Rome", "Bob"],
        },
        "Ann Ġmet ĠBob Ġin ĠRome . Ċ - ĠBob Ġwon Ċ - ĠAnn Ġleft Ċ -",
        ["ĠAnn Ġmet ĠAnn Ġin ĠRome .", "ĠRome Ġmet ĠAnn Ġin ĠRome .", "ĠBob Ġmet ĠAnn Ġin ĠRome ."],
        [2, 1],
        "-",
    ),
    "winogrande": (
        "winogrande",
        {
            "sentence": "The cup does not fit in the box because the _ is small.",
            "option1": "cup",
            "option2": "box",
            "answer": "2",
        },
        "The Ġcup Ġdoes Ġnot Ġfit Ġin Ġthe Ġbox Ġbecause Ġthe",
        ["Ġcup Ġis Ġsmall .", "Ġbox Ġis Ġsmall ."],
        [1],
        "",
    ),
    "winogrande, a blank at the beginning": (
        "winogrande",
        {"sentence": "_ told Ann that the cup broke.", "option1": "Bob", "option2": "Ann", "answer": 1},
        "",
        ["Bob Ġtold ĠAnn Ġthat Ġthe Ġcup Ġbroke .", "Ann Ġtold ĠAnn Ġthat Ġthe Ġcup Ġbroke ."],
        [0],
        "",
    ),
    "winogrande, a blank within a word": (
        "winogrande",
        {"sentence": "She met Bob in _'s box.", "option1": "Rome", "option2": "Ann", "answer": "1"},
        "She Ġmet ĠBob Ġin",
        ["ĠRome ' s Ġbox .", "ĠAnn ' s Ġbox ."],
        [0],
        "",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_tokens(name, tokenizer):
    task, row, prompt, candidates, gold, neutral = GOLDEN[name]
    task, before = get_task(task), dict(row)

    def ids(tokens: str) -> list[int]:
        return [tokenizer.get_vocab()[token] for token in tokens.split()]

    texts = list(task.candidates(row))
    for given, expected in ((task.prompt(row), prompt), (task.neutral_prompt(row), neutral)):
        (encoded,) = encode_prompts(tokenizer, [given], [texts], 2048)
        assert encoded.prompt_ids == [2, *ids(expected)]
        assert given == tokenizer.decode(ids(expected))
        if expected or not prompt:
            assert encoded.candidate_ids == [ids(tokens) for tokens in candidates]
    assert texts == [tokenizer.decode(ids(tokens)) for tokens in candidates]
    assert task.gold(row) == gold
    assert row == before, "the caller's row is not changed"


@pytest.mark.parametrize(("sentence", "seen"), [("She left", "she left"), ("I left", "I left"), ("TV broke", "tv broke")])
def test_the_first_word_of_a_copa_choice(sentence, seen):
    row = {"premise": "A.", "question": "cause", "choice1": sentence, "choice2": "x", "label": 0}
    assert get_task("copa").candidates(row)[0] == f" {seen}"


@pytest.mark.parametrize("task", ["copa", "record", "winogrande"])
def test_hub_and_columns(task):
    task = get_task(task)
    assert (task.hub, task.hub_config) == {
        "copa": ("aps/super_glue", "copa"),
        "record": ("aps/super_glue", "record"),
        "winogrande": ("allenai/winogrande", "winogrande_m"),
    }[task.name]
    assert {*task.columns, *task.target_columns} == {
        "copa": {"premise", "question", "choice1", "choice2", "label"},
        "record": {"passage", "query", "entities", "answers"},
        "winogrande": {"sentence", "option1", "option2", "answer"},
    }[task.name]
    assert task.small_dev == (100 if task.name == "copa" else None)


NEUTRAL = {"sst2": "It was", "rte": "", "cb": "", "boolq": "", "wic": "", "wsc": "", "multirc": ""}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_prompts_of_the_classification_tasks(name):
    task = get_task(name)
    row = dict.fromkeys(task.columns, "some text")
    assert task.neutral_prompt(row) == NEUTRAL[name]


COPA_ROW = {"premise": "A.", "question": "cause", "choice1": "B.", "choice2": "C.", "label": 0}
RECORD_ROW = {"passage": "P", "query": "@placeholder won", "entities": ["Ann", "Bob"], "answers": ["Bob"]}
WINO_ROW = {"sentence": "The _ broke.", "option1": "cup", "option2": "box", "answer": "1"}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("copa", {**COPA_ROW, "question": "why"}, "column 'question' holds 'why', expected ['effect', 'cause']"),
        ("copa", {**COPA_ROW, "label": -1}, "unknown label -1 in column 'label', expected [0, 1]; a row whose label was never"),
        ("copa", {**COPA_ROW, "choice2": " "}, "choice 1 (from 0) in column 'choice2' is empty: ' '"),
        ("record", {**RECORD_ROW, "query": "Ann won"}, "column 'query' holds no @placeholder: 'Ann won'"),
        ("record", {**RECORD_ROW, "answers": []}, "column 'answers' is empty; a row whose answers were never published"),
        ("record", {**RECORD_ROW, "answers": ["Eve"]}, "none of the answers ['Eve'] is among the entities ['Ann', 'Bob']"),
        ("record", {**RECORD_ROW, "entities": []}, "column 'entities' holds [], expected a list of names"),
        ("winogrande", {**WINO_ROW, "sentence": "It broke."}, "column 'sentence' holds no blank '_': 'It broke.'"),
        ("winogrande", {**WINO_ROW, "answer": ""}, "unknown label '' in column 'answer', expected [1, 2]; a row whose label"),
    ],
)
def test_rows_that_make_no_sense(task, row, message):
    task = get_task(task)
    with pytest.raises(DataError) as caught:
        [read(row) for read in (task.prompt, task.candidates, task.gold)]
    assert message in str(caught.value)


def test_a_record_row_with_a_single_entity():
    row = {**RECORD_ROW, "entities": ["Bob", "Bob"]}
    assert get_task("record").candidates(row) == [" Bob won"]
    assert get_task("record").gold(row) == [0]


# ---- tasks of one's own ------------------------------------------------------------------------------------------------
def columns(**arguments) -> MultipleChoiceTask:
    return get_task({"template": "{question}", "choices": ["a", "b"], **arguments})


@pytest.mark.parametrize(
    ("labels", "label", "gold"),
    [
        (None, 1, 1),
        (None, "1", 1),
        (None, 1.0, 1),
        (None, True, 1),
        (["A", "B"], "B", 1),
        (["A", "B"], " A ", 0),
        ([1, 2], "2", 1),
        ([True, False], False, 1),
        ([True, False], "true", 0),
        ([0, 1], True, 1),
        (None, "two", 1),
        (None, " one", 0),
        (["A", "B"], "two", 1),
    ],
)
def test_labels_in_every_form(labels, label, gold):
    row = {"question": "How many?", "a": "one", "b": " two ", "label": label}
    task = columns(labels=labels)
    assert task.candidates(row) == [" one", " two"]
    assert task.gold(row) == [gold]


def test_numbers_as_choices():
    row = {"question": "2 - 1?", "a": 1, "b": 2, "label": 0}
    assert columns().candidates(row) == [" 1", " 2"]
    assert columns().gold(row) == [0]
    assert columns().gold({**row, "a": "0", "b": "1", "label": "1"}) == [1], "both readings are the same choice"
    with pytest.raises(DataError, match="'1' in column 'label' is the number of choice '2' and the text of another"):
        columns().gold({**row, "a": "1", "b": "2", "label": "1"})
    assert columns(labels=["0", "1"]).gold({**row, "a": "1", "b": "2", "label": "1"}) == [1], "labels that were given count"


def test_lists_of_different_lengths():
    task = get_task({"template": "{q}", "choices": "options", "labels": ["A", "B", "C", "D"], "candidate": "\n- {choice}!"})
    assert task.candidates({"options": ["x", "y", "z"]}) == ["\n- x!", "\n- y!", "\n- z!"]
    assert task.gold({"options": ["x", "y", "z"], "label": "C"}) == [2]
    with pytest.raises(DataError, match=r"unknown label 'D' in column 'label', expected \['A', 'B', 'C'\]"):
        task.gold({"options": ["x", "y", "z"], "label": "D"})
    with pytest.raises(DataError, match=r"4 labels \['A', 'B', 'C', 'D'\] for 5 choices"):
        task.gold({"options": list("vwxyz"), "label": "D"})
    assert task.target_columns == ["options", "label"]


ARC = {"template": "{question}", "choices": "choices.text", "labels": "choices.label", "label_column": "answerKey"}
OPTIONS = {"text": ["ice", "steam", "mud"], "label": ["1", "2", "3"]}


@pytest.mark.parametrize("mapping", [OPTIONS, [{"text": t, "label": k} for t, k in zip(*OPTIONS.values(), strict=True)]])
def test_paths_into_a_mapping(mapping, tmp_path, words):
    """As in ARC, read from a file: a mapping of lists, or a list of mappings."""
    rows = [{"question": f"a film {i}", "choices": mapping, "answerKey": str(1 + i % 3)} for i in range(10)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    task = get_task(ARC)
    assert task.target_columns == ["choices", "answerKey"]
    assert task.gold(rows[1]) == [1]
    source = PromptDataModule(ARC, str(tmp_path), words, pin_memory=False)
    with pytest.raises(DataError, match="have the same tokens"):  # words that the tokenizer does not know
        source.setup("fit")
    rows = [{**row, "choices": json.loads(json.dumps(mapping).replace("ice", "good").replace("mud", "bad"))} for row in rows]
    write_jsonl(tmp_path / "train.jsonl", rows)
    data = PromptDataModule(ARC, str(tmp_path), words, pin_memory=False)
    data.setup("fit")
    for item in data.dataset("train").examples:
        assert item["candidates"] == [" good", " steam", " bad"]
        assert item["label"] == item["index"] % 3
        assert item["gold"] == [item["label"]]


def test_a_missing_column_is_named_by_the_first_part_of_its_path(tmp_path, words):
    write_jsonl(tmp_path / "train.jsonl", [{"question": "a film", "answerKey": "1"}] * 4)
    with pytest.raises(DataError, match=r"lacks the columns \['choices'\] that task 'custom' needs"):
        PromptDataModule(ARC, str(tmp_path), words, pin_memory=False).setup("fit")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": {"texts": ["x", "y"]}, "answerKey": "1"}, "in which there is no 'choices.text'"),
        ({"choices": "x, y", "answerKey": "1"}, "column 'choices' holds 'x, y', in which there is no 'choices.text'"),
        ({"choices": {"text": "x"}, "answerKey": "1"}, "column 'choices.text' holds 'x' and no list; choices are given as"),
        ({"choices": {"text": ["x"], "label": ["1"]}, "answerKey": "1"}, "1 choices in column 'choices.text', at least two"),
        (
            {"choices": {"text": ["x", None], "label": ["1", "2"]}, "answerKey": "1"},
            "choice 1 (from 0) in column 'choices.text'",
        ),
        ({"choices": {"text": ["x", "y"], "label": "1"}, "answerKey": "1"}, "column 'choices.label' holds '1' and no list"),
        ({"choices": {"text": ["x", "y"], "label": ["1"]}, "answerKey": "1"}, "1 labels ['1'] for 2 choices"),
        ({"choices": OPTIONS, "answerKey": None}, "unknown label None in column 'answerKey', expected ['1', '2', '3']; a row"),
        (
            {"choices": {"text": ["x", "y"], "label": [True, False]}, "answerKey": "yes"},
            "; quote labels such as 'yes' and 'no'",
        ),
        ({"choices": {"text": ["x", "x"], "label": [0, 1]}, "answerKey": "x"}, "unknown label 'x'"),
    ],
)
def test_impossible_rows(row, message):
    with pytest.raises(DataError) as caught:
        get_task(ARC).gold(row)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"choices": []}, "`choices` [] names 0 columns, at least two are needed"),
        (
            {"choices": ["a"]},
            "`choices` ['a'] names 1 columns, at least two are needed; a column that holds a list is given as",
        ),
        ({"choices": ""}, "`choices` names no column"),
        ({"choices": ["a", "b", "a"]}, "the column 'a' is there twice in `choices`"),
        ({"choices": [True, False]}, "True in `choices` is no column; quote words such as 'yes' and 'no' in YAML"),
        ({"labels": ["A"]}, "1 labels for 2 choices"),
        ({"labels": ["1", 1]}, "two of the labels ['1', 1] are the same once written as text"),
        ({"candidate": " choice"}, "the candidate ' choice' needs {choice}, and no other name"),
        ({"candidate": " {choice} {question}"}, "needs {choice}, and no other name"),
        ({"candidate": " {choice"}, "cannot read the candidate"),
        ({"neutral_template": "{"}, "cannot read the neutral_template"),
        ({"template": "question"}, "names no column"),
    ],
)
def test_impossible_tasks(arguments, message):
    with pytest.raises(DataError) as caught:
        columns(**arguments)
    assert "task 'custom': " in str(caught.value)
    assert message in str(caught.value)


def test_columns_of_the_neutral_template_are_read_too():
    task = columns(neutral_template="{topic}:")
    assert task.columns == ["question", "topic"]
    assert task.neutral_prompt({"question": "Q?", "topic": "Films"}) == "Films:"
    assert columns().neutral_prompt({"question": "Q?"}) == ""


def test_errors_name_the_row(tmp_path, words):
    write_jsonl(tmp_path / "train.jsonl", [{"question": "a film", "a": "good", "b": "bad", "label": 7}] * 4)
    task = {"template": "{question}", "choices": ["a", "b"]}
    with pytest.raises(DataError, match=r"row \d \(from 0\) of .*train\.jsonl: unknown label 7 in column 'label'"):
        PromptDataModule(task, str(tmp_path), words, pin_memory=False).setup("fit")


def test_only_the_gold_candidate_is_kept(words):
    import datasets

    options = [["good", "bad"], ["bad", "not sure", "okay"], ["not sure", "bad", "okay"]]
    rows = datasets.Dataset.from_list([{"question": "a film", "options": o, "label": i} for i, o in enumerate(options)])
    task = get_task({"template": "{question} It was", "choices": "options"})
    dataset = PromptDataset.from_rows(task, SourceSplit(rows, None, "here"), np.arange(3), words, 2048)
    alone = dataset.gold_only()
    assert [item["candidates"] for item in alone.examples] == [[" good"], [" not sure"], [" okay"]]
    for item, whole in zip(alone.examples, dataset.examples, strict=True):
        assert item["prompt_ids"] == whole["prompt_ids"]
        assert item["candidate_ids"] == [whole["candidate_ids"][whole["label"]]]
        assert (item["label"], item["gold"], item["index"]) == (0, [0], whole["index"])
    assert dataset.lengths == [5, 6, 6]
    assert alone.lengths == [5, 6, 5]


# ---- real rows ---------------------------------------------------------------------------------------------------------
def test_copa_on_real_rows():
    folder, model = SHARED / "data" / "copa", SHARED / "models" / "opt-mini"
    if not folder.is_dir() or not model.is_dir():
        pytest.skip(f"no real rows in {folder}, or no tokenizer in {model}")
    data = PromptDataModule("copa", str(folder), str(model), calibrated=True, pin_memory=False)
    data.setup()
    tokenizer = AutoTokenizer.from_pretrained(model)
    for part, size, file in (("train", 300, "train"), ("dev", 100, "train"), ("eval", 100, "validation")):
        examples = data.dataset(part).examples
        assert len(examples) == size
        raw = [json.loads(line) for line in (folder / f"{file}.jsonl").read_text().splitlines()]
        for item in examples:
            row = raw[item["index"]]
            assert item["label"] == row["label"]
            assert item["prompt_ids"][0] == tokenizer.bos_token_id
            assert tokenizer.decode(item["prompt_ids"][1:]) == item["prompt"]
            assert item["prompt"].endswith(" so" if row["question"] == "effect" else " because")
            assert not item["prompt"].removesuffix(" so").removesuffix(" because").endswith((".", " "))
            assert [tokenizer.decode(ids) for ids in item["candidate_ids"]] == item["candidates"]
            for text, choice in zip(item["candidates"], (row["choice1"], row["choice2"]), strict=True):
                assert text.lower() == f" {choice.strip().lower()}"
            assert ("neutral_ids" in item) == (part != "train"), "training needs none"
            if part != "train":
                assert tokenizer.decode(item["neutral_ids"][1:]) == ("so" if row["question"] == "effect" else "because")
                assert item["neutral_candidate_ids"] == item["candidate_ids"]
    indices = [{item["index"] for item in data.dataset(part).examples} for part in ("train", "dev")]
    assert not indices[0] & indices[1]
