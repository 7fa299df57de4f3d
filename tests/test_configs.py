"""Every shipped configuration parses through the real CLI, and runs with a tiny model and data."""

from pathlib import Path

import pytest
import yaml

from zo_lightning.callbacks import AdaNAGED
from zo_lightning.cli import cli
from zo_lightning.data import PromptClassificationDataModule
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
