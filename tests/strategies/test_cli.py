"""Several processes from the command line: shards of the data, metrics, and one of everything that is shown or written."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml

from tests.strategies.worker import ROOT, environment, free_port
from zo_lightning.cli import cli
from zo_lightning.console import quiet

CONFIG = ROOT / "configs" / "opt-125m" / "sst2.yaml"
SPLIT = {"class_path": "zo_lightning.strategies.ZODDPStrategy", "init_args": {"split_directions": True, "start_method": "fork"}}


def options_of(model: Path, data: Path, *options: str, **numbers: int) -> list[str]:
    given = ["--model.model_name_or_path", str(model), "--data.data_dir", str(data), "--data.batch_size", "4", *options]
    for name, number in numbers.items():
        given += [f"--data.{name}", str(number)]
    return given


class Run:
    """The command line in a process of its own, which starts the others."""

    def __init__(self, folder: Path, model: Path, data: Path, *options: str, strategy=None, **numbers: int) -> None:
        self.folder = folder
        rows = {"class_path": "tests.strategies.problems.Rows", "init_args": {"folder": str(folder / "rows")}}
        trainer = {"callbacks": [{"class_path": "AdaNAGED"}, rows], "accelerator": "cpu", "precision": 32, "max_steps": 8}
        trainer |= {"default_root_dir": str(folder / "out"), "log_every_n_steps": 1}
        extra = {"trainer": trainer if strategy is None else {**trainer, "devices": 2, "strategy": strategy}}
        (folder / "extra.yaml").write_text(yaml.safe_dump(extra))
        (folder / "run.py").write_text("from zo_lightning.cli import main\n\nif __name__ == '__main__':\n    main()\n")
        given = ["fit", "--config", str(CONFIG), "--config", str(folder / "extra.yaml"), "--validation.times", "2"]
        given += options_of(model, data, *options, **numbers)
        command = [sys.executable, str(folder / "run.py"), *given]
        variables = {k: v for k, v in environment(free_port()).items() if k not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")}
        variables["HF_DATASETS_CACHE"] = str(folder / "datasets")
        done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        self.output = done.stdout + done.stderr
        assert done.returncode == 0, self.output[-3000:]
        paths = sorted((folder / "rows").iterdir())
        self.ranks = [json.loads(path.read_text()) for path in paths]

    def epoch(self, number: int) -> list[list[int]]:
        return [rank["rows"][number] for rank in self.ranks]


@pytest.fixture(scope="session")
def by_name(tmp_path_factory, tiny_opt, films) -> Run:
    options = ("--trainer.strategy", "zo_ddp", "--trainer.devices", "2")
    return Run(tmp_path_factory.mktemp("by-name"), tiny_opt, films, *options, num_train=32, num_dev=16)


@pytest.fixture(scope="session")
def by_class(tmp_path_factory, tiny_opt, films) -> Run:
    return Run(tmp_path_factory.mktemp("by-class"), tiny_opt, films, strategy=SPLIT, num_train=31, num_dev=15)


def test_both_end_alike(by_name, by_class):
    for run, directions in ((by_name, 1), (by_class, 2)):
        assert len(run.ranks) == 2
        assert run.ranks[0]["weights"] == run.ranks[1]["weights"]
        assert [rank["directions"] for rank in run.ranks] == [directions] * 2


def test_every_row_is_seen_once_in_an_epoch(by_name):
    first, second = by_name.epoch(0), by_name.epoch(1)
    for shards in (first, second):
        assert [len(rows) for rows in shards] == [16, 16]
        assert len(set(shards[0] + shards[1])) == 32
    assert set(first[0] + first[1]) == set(second[0] + second[1])
    assert first != second  # shuffled anew


def test_rows_that_do_not_divide(by_class):
    """The shards are filled up with a row that has its place already."""
    shards = by_class.epoch(0)
    assert [len(rows) for rows in shards] == [16, 16]
    assert len(set(shards[0] + shards[1])) == 31


def test_metrics_are_those_of_one_process(by_name, tmp_path, tiny_opt, films, monkeypatch):
    """Before the first step: the batches of later ones are others."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    options = options_of(tiny_opt, films, "--trainer.default_root_dir", str(tmp_path), num_train=32, num_dev=16)
    with quiet():
        one = cli(["validate", "--config", str(CONFIG), *options, "--trainer.accelerator", "cpu", "--trainer.precision", "32"])
    metrics = {name: float(value) for name, value in one.trainer.callback_metrics.items()}
    first, second = (rank["metrics"] for rank in by_name.ranks)
    assert first == second
    assert len(first) == 3
    assert set(metrics) == {"val/loss", "val/acc", "val/f1"}
    assert first[0] == pytest.approx(metrics, abs=1e-6)


def test_the_first_process_speaks_and_writes(by_name):
    assert by_name.output.count("M parameters in") == 1
    assert by_name.output.count("before: ") == 1
    assert "Warning" not in by_name.output
    assert "deprecated" not in by_name.output
    assert by_name.output.count("step 8: ") == 1
    (path,) = by_name.folder.glob("out/**/metrics.csv")
    with path.open() as file:
        steps = [row["step"] for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == [str(step) for step in range(8)]
    assert len(list(by_name.folder.glob("out/**/best.ckpt"))) == 1
    assert len(list(by_name.folder.glob("out/**/config.yaml"))) == 1
