"""README's commands and examples do what they say."""

import re
from pathlib import Path

import pytest
import yaml

from zo_lightning.cli import cli, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [part.strip() for block in blocks("bash") for line in block.splitlines() for part in line.split("&&")]


def test_every_command_is_of_a_kind_tested_here():
    assert {command.split()[0] for command in COMMANDS} == {"pip", "pytest", "zo-lightning"}


def test_what_pip_installs():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {extra for command in COMMANDS if command.startswith("pip") for extra in re.findall(r"\[(\w+)\]", command)}
    assert extras == {"test"} <= set(project["optional-dependencies"])
    assert project["scripts"]["zo-lightning"] == "zo_lightning.cli:main"


def test_the_quickstart_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    [command] = [c for c in COMMANDS if "quickstart" in c]
    main([*command.split()[1:], "--trainer.max_steps", "3", "--trainer.default_root_dir", str(tmp_path)])
    output = capsys.readouterr().out
    assert "before" in output
    assert "val/acc" in output


def test_the_commands_of_a_real_run(tiny_opt, rows_of, tmp_path, monkeypatch):
    """In order, with a tiny model and data in place of those of the hub."""
    monkeypatch.chdir(ROOT)
    commands = [c.split()[1:] for c in COMMANDS if c.startswith("zo-lightning") and "quickstart" not in c]
    assert [command[0] for command in commands] == ["fit", "test"]
    for command in commands:
        command[command.index("--trainer.default_root_dir") + 1] = str(tmp_path)
        main(
            [
                *command,
                *("--model.model_name_or_path", str(tiny_opt), "--data.data_dir", str(rows_of("sst2"))),
                *("--data.num_dev", "12", "--trainer.max_steps", "2", "--trainer.accelerator", "cpu"),
                *("--trainer.enable_progress_bar", "false"),
            ]
        )


def test_the_yaml_task(tmp_path):
    [block] = blocks("yaml")
    config = {"model": {"class_path": "CausalLMClassificationModule"}, **yaml.safe_load(block)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    task = cli(["--config", str(tmp_path / "config.yaml")], run=False).datamodule.task
    assert task.prompt({"review": "Good."}) == "Good.\nThis review is"
    assert task.class_names == ["neg", "pos"]


@pytest.mark.filterwarnings("ignore:You are using a CUDA device:UserWarning")
def test_the_python_examples(tmp_path, monkeypatch):
    """They follow one another, and training lowers the loss."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    subclass, callback, plain = blocks("python")
    exec(subclass, names)
    exec(callback, names)
    exec(plain, names)
    x, net = names["x"], names["net"]
    assert (net(x) - x.sum(1, keepdim=True)).square().mean() < 4.0  # at first it is 8 to 10


def test_the_files_it_points_to_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target
