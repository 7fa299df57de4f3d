"""Every shipped configuration parses through the real CLI, and runs with a tiny model and data."""

import json
from pathlib import Path

import pytest
import yaml

from zo_lightning.callbacks import AdaNAGED
from zo_lightning.cli import cli, main
from zo_lightning.data import ClassificationTask, PromptClassificationDataModule, get_task
from zo_lightning.modules import CausalLMClassificationModule

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("**/*.yaml"))
TASKS = {"sst2", "rte", "cb", "boolq", "wic", "wsc", "multirc"}


def name(path: Path) -> str:
    return str(path.relative_to(FOLDER).with_suffix(""))


def test_what_is_shipped():
    assert {name(path) for path in CONFIGS} == {"quickstart", "opt-125m/sst2", *(f"opt-1.3b/{task}" for task in TASKS)}


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_instantiates(path, tmp_path):
    made = cli(["--config", str(path), "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)], run=False)
    assert isinstance(made.model, CausalLMClassificationModule)
    assert isinstance(made.datamodule, PromptClassificationDataModule)
    assert sum(isinstance(callback, AdaNAGED) for callback in made.trainer.callbacks) == 1
    if path.parent.name == "opt-1.3b":
        assert made.datamodule.task.name == path.stem
        assert made.model.model_name_or_path == "facebook/opt-1.3b"
        assert made.trainer.precision == "bf16-true"


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_nothing_to_tune(path):
    """No learning rate and no smoothing anywhere, and the head says how to run it."""
    text = path.read_text()
    settings = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert not {"lr", "learning_rate", "smoothing", "optimizer"} & set(keys(yaml.safe_load(settings)))
    assert f"zo-lightning fit --config configs/{path.relative_to(FOLDER)}" in text


def keys(node) -> list[str]:
    if isinstance(node, dict):
        return [*node, *(key for value in node.values() for key in keys(value))]
    return [key for value in node for key in keys(value)] if isinstance(node, list) else []


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem != "quickstart"], ids=name)
def test_runs(path, tiny_opt, tmp_path):
    """Two steps in the configuration's own precision, and the evaluation of the checkpoint that was kept."""
    task = get_task(yaml.safe_load(path.read_text())["data"]["init_args"]["task"])
    save_rows(task, tmp_path / "data")
    options = [
        *("--config", str(path), "--model.model_name_or_path", str(tiny_opt), "--data.data_dir", str(tmp_path / "data")),
        *("--data.batch_size", "4", "--data.num_train", "20", "--data.num_dev", "12", "--trainer.max_steps", "2"),
        *("--trainer.log_every_n_steps", "1"),
        *(
            "--trainer.accelerator",
            "cpu",
            "--trainer.default_root_dir",
            str(tmp_path),
            "--trainer.enable_progress_bar",
            "false",
        ),
    ]
    main(["fit", *options])
    main(["test", *options, "--ckpt_path", "best"])
    logged = [path.read_text() for path in tmp_path.glob("**/metrics.csv")]
    assert any("val/acc" in text and "zo/lr" in text for text in logged)
    assert any("test/acc" in text for text in logged)


def save_rows(task: ClassificationTask, folder: Path) -> None:
    """Rows with the columns of ``task``: enough for the 100 development rows of CB."""
    folder.mkdir()
    for split, count in (("train", 130), ("validation", 6)):
        rows = [
            {**dict.fromkeys(task.columns, "a film with no plot"), "label": index % task.num_classes} for index in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
