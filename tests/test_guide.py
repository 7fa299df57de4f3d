"""The commands, files and messages of docs/tasks.md are what they are said to be."""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from tests.test_configs import MODULES, logged, predictions
from tests.tiny import save_tiny_model, tiny_config
from zo_lightning import modules
from zo_lightning.cli import cli, main
from zo_lightning.data import PromptDataModule, get_task, list_tasks
from zo_lightning.data.tasks import registry

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "tasks.md").read_text()
KINDS = ("classification", "multiple_choice", "generation")
CHAT = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    """A tiny model for longer texts, with a chat template."""
    config = tiny_config("opt")
    config.max_position_embeddings = 256
    folder = save_tiny_model(tmp_path_factory.mktemp("chat-opt"), config, seed=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def own_modules(tmp_path, monkeypatch) -> Iterator[None]:
    """The guide's Python files, where ``PYTHONPATH=.`` finds them; what they register is forgotten."""
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    for block in blocks("python"):
        (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("my_tasks", "my_scores"):
        sys.modules.pop(name, None)


def small(command: str, root: Path, model: Path, rows) -> list[str]:
    """A command's words, with few steps, and with tiny stand-ins for what comes from the hub."""
    words = [word for word in shlex.split(command) if word != "PYTHONPATH=."]
    assert words.pop(0) == "zo-lightning"
    words += ["--trainer.default_root_dir", str(root), "--trainer.enable_progress_bar", "false"]
    words += ["--trainer.max_steps", "2", "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu"]
    for task in re.findall(r"configs/opt-1\.3b/(\w+)\.yaml", command):
        words += ["--model.model_name_or_path", str(model), "--data.data_dir", str(rows(task)), "--data.max_length", "200"]
        words += ["--model.max_new_tokens", "2"] if MODULES[task].task_kind == "generation" else []
    return words


@pytest.mark.parametrize("block", blocks("bash"), ids=lambda block: block.split()[-1])
def test_the_commands(block, chat_model, rows_of, own_modules, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for number, command in enumerate(block.splitlines()):
        root = tmp_path / ("0" if "best" in command else str(number))  # a test follows its fit
        main(small(command, root, chat_model, rows_of))
        assert logged(root, "zo/lr") or "zo-lightning fit" not in command
        assert list(root.glob("**/predictions.jsonl")) or "zo-lightning fit" in command


def test_the_messages(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (block,) = blocks("console")
    lines = block.splitlines()
    for command, message in zip(lines[::2], lines[1::2], strict=True):
        with pytest.raises(SystemExit) as stopped:
            main(small(command.removeprefix("$ "), tmp_path, tmp_path, None))
        assert stopped.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1] == message


@pytest.mark.parametrize("kind", KINDS)
def test_the_examples_are_shown_as_they_are(kind):
    text = (ROOT / f"examples/tasks/{kind}.yaml").read_text()
    assert sum(block in text for block in blocks("yaml")) == 1
    assert f"#   zo-lightning fit --config examples/tasks/{kind}.yaml\n" in text
    made = cli(["--config", str(ROOT / f"examples/tasks/{kind}.yaml")], run=False)
    assert made.model.task_kind == made.datamodule.task.kind == kind
    assert f"`{type(made.model).__name__}`" in next(
        line for line in GUIDE.splitlines() if line.startswith(f"| {spaced(kind)} ")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_learns(kind, tmp_path, monkeypatch):
    """In a fifth of its steps the loss of the development rows falls by a third."""
    monkeypatch.chdir(ROOT)
    path = f"examples/tasks/{kind}.yaml"
    options = ["--trainer.default_root_dir", str(tmp_path), "--trainer.enable_progress_bar", "false"]
    main(["validate", "--config", path, *options])
    main(["fit", "--config", path, *options, "--trainer.max_steps", "60", "--validation.times", "1"])
    before, after = logged(tmp_path, "val/loss")
    assert after < before * 2 / 3


def test_a_dataset_of_the_hub():
    """The task of the hub's ARC, on a row of its shape."""
    (block,) = [block for block in blocks("yaml") if "hub:" in block]
    task = get_task(yaml.safe_load(block)["data"]["init_args"]["task"])
    assert (task.hub, task.hub_config) == ("allenai/ai2_arc", "ARC-Easy")
    choices = {"text": ["a stone", "a tree", "a cloud"], "label": ["A", "B", "C"]}
    row = {"question": "What grows?", "choices": choices, "answerKey": "B"}
    assert task.prompt(row) == "Question: What grows?\nAnswer:"
    assert list(task.candidates(row)) == [" a stone", " a tree", " a cloud"]
    assert task.gold(row) == [1]


def test_a_task_in_python(own_modules):
    """Registered by its module, once in a process."""
    import my_tasks

    data = PromptDataModule("reviews", data_dir=str(ROOT / "examples/tasks/reviews"))
    assert type(data.task) is my_tasks.Reviews
    assert data.task.prompt({"review": "the soup was bad ."}) == "the soup was bad! It was"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_in_the_predictions(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = ["--trainer.default_root_dir", str(tmp_path), "--trainer.enable_progress_bar", "false"]
    main(["predict", "--config", f"examples/tasks/{kind}.yaml", *options])
    general, first, second = (set(re.findall(r"`(\w+)`", line)) for line in told_of_predictions())
    fields = general | (second if kind == "generation" else first)
    if kind == "multiple_choice":
        fields -= {"class_name"}
    rows = predictions(tmp_path)
    assert len(rows) == 40
    assert all(fields <= set(row) for row in rows)


def told_of_predictions() -> list[str]:
    section = GUIDE.partition("## Predictions\n")[2].partition("```")[0]
    general, first, second = re.split(r"\n\* ", section)
    return [general.partition("per example:")[2], first, second]


def test_the_table_of_tasks():
    rows = re.findall(r"^\| `(\w+)` \| ([\w ]+) \| (\S+)(?: \((\S+)\))? \| (.*) \| .* \|$", GUIDE, flags=re.MULTILINE)
    assert sorted(name for name, *_ in rows) == list_tasks()
    for name, kind, hub, config, metric in rows:
        task = get_task(name)
        assert (spaced(task.kind), task.hub, task.hub_config or "") == (kind, hub, config)
        assert MODULES[name].task_kind == task.kind
        assert metric == ("`f1`, `em`" if kind == "generation" else "`acc`")


def test_the_modules_of_the_kinds():
    rows = re.findall(r"^\| (classification|multiple choice|generation) \|.*\| `(\w+)` \|.*\|$", GUIDE, flags=re.MULTILINE)
    assert [spaced(getattr(modules, module).task_kind) for _, module in rows] == [kind for kind, _ in rows]
    assert len(rows) == 3


def test_the_rows_of_the_examples():
    """As the template, the labels and the answers say, and none twice."""
    for kind in KINDS:
        made = cli(["--config", str(ROOT / f"examples/tasks/{kind}.yaml")], run=False)
        folder = ROOT / made.datamodule.data_dir
        texts = [path.read_text() for path in sorted(folder.iterdir())]
        assert len(texts) == 2
        lines = [line for text in texts for line in text.splitlines()[kind == "classification" :]]
        reviews = [line.rpartition(",")[0] if kind == "classification" else json.loads(line)["review"] for line in lines]
        assert len(set(reviews)) == len(reviews) == 120


def test_the_files_it_points_to_exist():
    for target in re.findall(r"\]\(([^)]+)\)", GUIDE):
        assert (ROOT / "docs" / target).exists(), target


def spaced(kind: str) -> str:
    return kind.replace("_", " ")
