"""Prompts, labels, the registry, and every way to write a task down."""

import warnings

import pytest
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

from zo_lightning.data import (
    SST2,
    ClassificationTask,
    DataError,
    get_task,
    list_tasks,
    register_task,
)

# One row of our own for each task, with what MeZO's templates make of it.
GOLDEN = {
    "sst2": (
        {"sentence": " a quiet little gem . ", "label": 1},
        "a quiet little gem . It was",
        [" terrible", " great"],
    ),
    "rte": (
        {"premise": "The bridge opened in 1931.", "hypothesis": "The bridge is closed.", "label": 1},
        'The bridge opened in 1931.\nDoes this mean that "The bridge is closed." is true? Yes or No?\n',
        ["Yes", "No"],
    ),
    "cb": (
        {"premise": "I doubt that it rained.", "hypothesis": "it rained", "label": 1},
        'Suppose I doubt that it rained. Can we infer that "it rained"? Yes, No, or Maybe?\n',
        ["Yes", "No", "Maybe"],
    ),
    "boolq": (
        {"passage": "Pumice -- Pumice is a rock.", "question": "can pumice float", "label": 1},
        "Pumice -- Pumice is a rock. Can pumice float?\n",
        ["No", "Yes"],
    ),
    "wic": (
        {"word": "bank", "sentence1": "A river bank.", "sentence2": "He went to the bank.", "label": 0},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA river bank.\nHe went to the bank.\n',
        ["No", "Yes"],
    ),
    "wsc": (
        {"text": "Ann thanked Eve. She smiled.", "span1_text": "Ann", "span2_text": "She", "label": 0},
        'Ann thanked Eve. She smiled.\nIn the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\n',
        ["No", "Yes"],
    ),
    "multirc": (
        {"paragraph": " The cat slept. ", "question": "Who slept?", "answer": "A cat ", "label": 1},
        'The cat slept. \nQuestion: Who slept?\nI found this answer "A cat ". Is that correct? Yes or No?\n',
        ["No", "Yes"],
    ),
}


def test_every_classification_task_has_a_golden_prompt():
    assert [name for name in list_tasks() if isinstance(get_task(name), ClassificationTask)] == sorted(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_prompt(name):
    row, prompt, verbalizers = GOLDEN[name]
    task = get_task(name)
    before = dict(row)
    assert task.prompt(row) == prompt
    assert list(task.candidates(row)) == verbalizers
    assert row == before, "prepare must not change the caller's row"
    assert task.num_classes == len(task.class_names) == len(verbalizers)
    assert task.name == name
    assert task.hub is not None


def test_question_mark_is_not_doubled():
    assert get_task("boolq").prompt({"passage": "P.", "question": "is it?"}) == "P. Is it?\n"


def test_braces_and_percent_in_the_data_are_text():
    assert get_task("sst2").prompt({"sentence": "{0} {x} 100% %s"}) == "{0} {x} 100% %s It was"


def test_names_ignore_case_and_tasks_pass_through():
    task = get_task("SST2")
    assert isinstance(task, SST2)
    assert get_task(task) is task


def test_misspelt_name_suggests_the_closest():
    with pytest.raises(DataError, match=r"unknown task 'sst-2', did you mean 'sst2'\?.*'boolq', 'cb', .*'multirc'"):
        get_task("sst-2")
    with pytest.raises(DataError, match=r"unknown task 'translation'; the tasks are"):
        get_task("translation")


def test_a_new_task_in_a_few_lines_of_python(monkeypatch):
    monkeypatch.setattr("zo_lightning.data.tasks.registry._TASKS", {})

    @register_task("Shout")
    class Shout(ClassificationTask):
        def __init__(self):
            super().__init__("{text} is", [" loud", " quiet"], name="shout", columns=["body"])

        def prepare(self, row):
            return {"text": row["body"].upper()}

    task = get_task("shout")
    assert task.prompt({"body": "hey", "label": 0}) == "HEY is"
    assert task.class_names == ["loud", "quiet"]
    with pytest.raises(ValueError, match="'SHOUT' is taken"):
        register_task("SHOUT")(Shout)


@pytest.mark.parametrize(
    ("verbalizers", "label", "index"),
    [
        ([" bad", " good"], 1, 1),
        ([" bad", " good"], True, 1),
        ([" bad", " good"], "1", 1),
        ([" bad", " good"], 1.0, 1),
        ({"neg": " bad", "pos": " good"}, "pos", 1),
        ({"neg": " bad", "pos": " good"}, " pos ", 1),
        ({0: " bad", 4: " good"}, 4, 1),
        ({False: " bad", True: " good"}, True, 1),
        ({False: " bad", True: " good"}, "true", 1),
        ({"0": " bad", "1": " good"}, False, 0),
    ],
)
def test_labels(verbalizers, label, index):
    assert ClassificationTask("{text}", verbalizers).label_index(label) == index


@pytest.mark.parametrize(
    ("verbalizers", "label", "message"),
    [
        ([" bad", " good"], 2, r"unknown label 2 in column 'label', expected \[0, 1\]"),
        ([" bad", " good"], "pos", r"unknown label 'pos'"),
        ([" bad", " good"], None, r"unknown label None"),
        ([" bad", " good"], 0.5, r"unknown label 0\.5"),
        ({"neg": " bad", "pos": " good"}, "Pos", r"expected \['neg', 'pos'\]$"),
        ({False: " bad", True: " good"}, "yes", r"unknown label 'yes'.*quote labels such as 'yes' and 'no' in YAML"),
    ],
)
def test_unknown_labels(verbalizers, label, message):
    with pytest.raises(DataError, match=message):
        ClassificationTask("{text}", verbalizers).label_index(label)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": "no column", "verbalizers": ["a", "b"]}, "names no column; write for example {text}"),
        ({"template": "{}", "verbalizers": ["a", "b"]}, "names no column, write {column}"),
        ({"template": "{0}", "verbalizers": ["a", "b"]}, "names no column"),
        ({"template": "{text", "verbalizers": ["a", "b"]}, "cannot read the template"),
        ({"template": "{text}", "verbalizers": ["a"]}, "at least two verbalizers"),
        ({"template": "{text}", "verbalizers": [False, True]}, "of 0 is False and not text; quote words"),
        ({"template": "{text}", "verbalizers": {"n": " ", "p": "a"}}, "of 'n' is empty"),
        ({"template": "{text}", "verbalizers": {1: "a", "1": "b"}}, "are the same once written as text"),
        ({"template": "{text}", "verbalizers": ["a", "b"], "class_names": ["x"]}, "1 class_names for 2 verbalizers"),
        ({"template": "{text}", "verbalizer": ["a", "b"]}, "unknown key 'verbalizer', did you mean 'verbalizers'"),
        ({"template": "{text}"}, "give a `template` and one of `verbalizers` (classification), `choices`"),
        ({"class_path": "nowhere.Task"}, "'nowhere.Task' is no importable subclass"),
    ],
)
def test_impossible_tasks(arguments, message):
    with pytest.raises(DataError) as caught:
        get_task(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_template_columns():
    task = ClassificationTask("{a}{{x}} {b.c} {a!s:>3} {d[0]}", ["y", "n"])
    assert task.columns == ["a", "b", "d"]
    assert "custom" in repr(task)


def parse(*arguments):
    """Build the DataModule by LightningCLI from arguments, written to YAML and read back on the way."""
    options = {
        "subclass_mode_data": True,
        "run": False,
        "auto_configure_optimizers": False,
        "seed_everything_default": False,
        "save_config_callback": None,
        "trainer_defaults": {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"},
    }
    with warnings.catch_warnings():
        # Lightning 2.6 uses names that the newest jsonargparse has deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["test"])
            arguments = ["--data", "zo_lightning.data.PromptDataModule", *arguments]
            cli = LightningCLI(BoringModel, LightningDataModule, args=arguments, **options)
            written = yaml.safe_load(cli.parser.dump(cli.config))
            return LightningCLI(BoringModel, LightningDataModule, args=written, **options).datamodule


@pytest.mark.parametrize("name", GOLDEN)
def test_every_task_by_name_on_the_command_line(name):
    data = parse("--data.task", name, "--data.batch_size", "4")
    assert data.task.name == name
    assert data.num_classes == len(GOLDEN[name][2])
    assert data.eval_batch_size == 8


@pytest.mark.parametrize(
    "written",
    [
        '{template: "{review}\\nSentiment:", verbalizers: {neg: " bad", pos: " good"}, label_column: stars}',
        '{template: "{review}\\nSentiment:", verbalizers: [" bad", " good"], label_column: stars}',
        '{class_path: zo_lightning.data.ClassificationTask, init_args: {template: "{review}\\nSentiment:",'
        ' verbalizers: [" bad", " good"], label_column: stars}}',
    ],
)
def test_a_new_task_in_yaml_alone(written):
    task = parse("--data.task", written).task
    assert task.prompt({"review": "Fine."}) == "Fine.\nSentiment:"
    assert task.verbalizers == [" bad", " good"]
    assert task.label_column == "stars"
    assert task.class_names in (["neg", "pos"], ["bad", "good"])


def test_a_task_class_in_yaml():
    assert isinstance(parse("--data.task", "zo_lightning.data.SST2").task, SST2)
    assert isinstance(parse("--data.task", "{class_path: zo_lightning.data.SST2}").task, SST2)


def test_integer_and_boolean_keys_in_yaml():
    data = parse("--data.task", '{template: "{review}", verbalizers: {0: " bad", 1: " good"}}')
    assert data.task.label_index(1) == 1
    data = parse("--data.task", '{template: "{review}", verbalizers: {no: " bad", yes: " good"}}')
    assert data.task.label_index(True) == 1


def test_mistakes_in_yaml_are_named():
    with pytest.raises(Exception, match="unknown key 'verbalizer', did you mean 'verbalizers'"):
        parse("--data.task", '{template: "{review}", verbalizer: [" bad", " good"]}')
    with pytest.raises(Exception, match="unknown task 'sst', did you mean 'sst2'"):
        parse("--data.task", "sst")
