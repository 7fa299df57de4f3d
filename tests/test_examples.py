"""The examples run as they are, and show what they say."""

import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def test_the_plug_in_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    path = ROOT / "examples" / "plug_in.py"
    assert sum(bool(line.strip()) for line in path.read_text().splitlines()) <= 30
    runpy.run_path(str(path), run_name="__main__")
    [accuracy] = re.findall(r"accuracy in the last epoch: ([.\d]+)", capsys.readouterr().out)
    assert float(accuracy) > 0.8  # of a coin: 0.5


def test_the_plug_in_example_knows_nothing_of_us_but_the_callback():
    names = re.findall(r"zo_lightning.*", (ROOT / "examples" / "plug_in.py").read_text())
    assert names == ["zo_lightning import AdaNAGED"]


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode:UserWarning")
def test_the_walkthrough(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path / "runs"))
    with torch.random.fork_rng():
        names = runpy.run_path(str(ROOT / "examples" / "walkthrough.py"))
    printed = capsys.readouterr().out
    assert "weights are the same: True; metrics.csv is the same: True" in printed
    assert "the exported and the replayed model give the same logits: True" in printed
    losses = [float(row["val/loss"]) for row in names["rows"] if row["val/loss"]]
    assert losses[-1] < losses[0]
    accuracies = [float(x) for x in re.findall(r"accuracy ([.\d]+)", printed)]
    assert accuracies[-1] > 0.8
