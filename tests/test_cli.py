"""The command line as a user meets it: runs, files, and one line for each mistake."""

import csv
import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.tiny import save_tiny_model, tiny_config
from zo_lightning.cli import main
from zo_lightning.modules import CausalLMClassificationModule

CONFIG = Path(__file__).parents[1] / "configs" / "opt-125m" / "sst2.yaml"


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    """Keep the Arrow copies that `datasets` makes out of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "hf_datasets")


@pytest.fixture
def options(tiny_opt, films, tmp_path):
    """The documented command with the tiny model and data, in a folder of its own."""
    return [
        *("--config", str(CONFIG), "--model.model_name_or_path", str(tiny_opt), "--data.data_dir", str(films)),
        *("--data.num_train", "32", "--data.num_dev", "16", "--data.batch_size", "4"),
        *("--trainer.max_steps", "12", "--trainer.accelerator", "cpu", "--trainer.precision", "32"),
        *("--trainer.default_root_dir", str(tmp_path / "OUT"), "--trainer.log_every_n_steps", "1"),
    ]


def rows(folder: Path) -> list[dict[str, float]]:
    """All rows of all metrics.csv, without empty cells."""
    result = []
    for path in sorted(folder.glob("**/metrics.csv")):
        with path.open() as file:
            result += [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
    return result


def test_fit_and_test_on_the_kept_checkpoint(options, tmp_path, capsys):
    out = tmp_path / "OUT"
    main(["fit", *options])
    printed = capsys.readouterr().out
    assert "before" in printed
    assert "val/acc" in printed
    logged = rows(out)
    train = {"train/loss", "zo/lr", "zo/smoothing", "zo/curvature", "zo/gap", "zo/gain", "zo/forwards", "zo/skipped"}
    assert any(train <= set(row) for row in logged)
    validations = [row for row in logged if "val/loss" in row]
    assert [row["step"] for row in validations] == [2, 5, 8, 11]  # every ceil(12/5) steps; Lightning counts from 0
    assert all({"val/loss", "val/acc", "val/f1"} <= set(row) for row in validations)
    kept = list(out.glob("**/checkpoints/*"))
    assert sorted(path.name for path in kept) == ["best.ckpt", "last.ckpt"]
    kept = [path for path in kept if path.name == "best.ckpt"]
    stored = torch.load(kept[0], weights_only=True)
    best = min(validations, key=lambda row: row["val/loss"])
    assert stored["global_step"] == best["step"] + 1
    assert all(value.isfinite().all() for value in stored["state_dict"].values())

    main(["validate", *options, "--ckpt_path", "best"])
    again = [row for row in rows(out) if "val/loss" in row][-1]
    assert again["val/loss"] == pytest.approx(best["val/loss"], abs=1e-6)
    main(["test", *options, "--ckpt_path", str(kept[0])])
    tested = [row for row in rows(out) if "test/loss" in row]
    assert len(tested) == 1
    assert {"test/loss", "test/acc", "test/f1"} <= set(tested[0])


def test_predict_writes_a_row_per_example(options, tmp_path):
    main(["predict", *options])
    (path,) = (tmp_path / "OUT").glob("**/predictions.jsonl")
    predictions = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["index"] for row in predictions] == list(range(12))
    assert {row["class_name"] for row in predictions} <= {"negative", "positive"}
    assert all(len(row["scores"]) == 2 for row in predictions)
    assert all(row["prediction"] == row["scores"].index(max(row["scores"])) for row in predictions)


def test_zero_shot_validation(options, tmp_path):
    main(["validate", *options])
    (row,) = rows(tmp_path / "OUT")
    assert 0 <= row["val/acc"] <= 1
    assert math.isfinite(row["val/loss"])


def test_resume_in_the_middle_of_an_epoch_is_exact(options, tmp_path):
    """The best checkpoint of a run, wherever in an epoch it was kept, leads to the same end as the run itself."""
    main(["fit", *options, "--checkpoint.filename", "{step}", "--checkpoint.save_top_k", "-1"])
    (third,) = (tmp_path / "OUT").glob("**/step=3.ckpt")
    other = ["--trainer.default_root_dir", str(tmp_path / "AGAIN"), "--ckpt_path", str(third)]
    main(["fit", *options, *other])
    ends = [torch.load(next((tmp_path / name).glob("**/last.ckpt")), weights_only=True) for name in ("OUT", "AGAIN")]
    assert [end["global_step"] for end in ends] == [12, 12]
    assert all(torch.equal(value, ends[1]["state_dict"][name]) for name, value in ends[0]["state_dict"].items())
    assert ends[0]["callbacks"]["AdaNAGED"] == ends[1]["callbacks"]["AdaNAGED"]


# ---- going on ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def stops(monkeypatch):
    """Makes the loss of the step after a number of steps do something."""

    def arrange(step, action):
        loss = CausalLMClassificationModule.loss

        def stopping(self, batch):
            if self.trainer.training and self.trainer.global_step == step:
                action()
            return loss(self, batch)

        patch = pytest.MonkeyPatch()
        patch.setattr(CausalLMClassificationModule, "loss", stopping)
        patches.append(patch)

    patches: list[pytest.MonkeyPatch] = []
    yield arrange, lambda: [patch.undo() for patch in patches]
    for patch in patches:
        patch.undo()


def bug():
    raise KeyError("a bug")


def test_the_same_command_until_the_job_is_done(options, tmp_path, stops, caplog):
    """It begins where there is nothing, goes on in the same folder, and ends at once when all is done."""
    arrange, undo = stops
    out = tmp_path / "OUT"
    whole = [*options, "--trainer.default_root_dir", str(tmp_path / "WHOLE")]
    main(["fit", *whole])
    command = ["fit", *options, "--ckpt_path", "last"]
    for step in (4, 9):  # before and after a validation
        arrange(step, bug)
        with pytest.raises(KeyError, match="a bug"):
            main(command)
        undo()
    assert f"--ckpt_path last: there is none under '{out}', so the run starts afresh" in caplog.text
    main(command)
    table, expected = (next(root.glob("**/metrics.csv")).read_bytes() for root in (out, tmp_path / "WHOLE"))
    assert table == expected
    for name in ("best", "last"):
        ends = [torch.load(next(root.glob(f"**/{name}.ckpt")), weights_only=True) for root in (out, tmp_path / "WHOLE")]
        assert ends[0]["global_step"] == ends[1]["global_step"]
        assert all(torch.equal(value, ends[1]["state_dict"][key]) for key, value in ends[0]["state_dict"].items())
    caplog.clear()
    main(command)
    assert "`max_steps=12` reached" in caplog.text
    assert [path.name for path in (out / "lightning_logs").iterdir()] == ["version_0"]
    assert next(out.glob("**/metrics.csv")).read_bytes() == expected

    main([*command, "--trainer.max_steps", "15"])
    assert rows(out)[-1]["step"] == 14


def test_sigterm_is_no_success(options, tmp_path, stops):
    stops[0](4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *options])
    assert stopped.value.code == 143
    assert torch.load(next((tmp_path / "OUT").glob("**/last.ckpt")), weights_only=True)["global_step"] == 5


def test_last_in_other_commands(options, capsys, tmp_path):
    assert "no checkpoints/last.ckpt under" in fails(["test", *options, "--ckpt_path", "last"], capsys)
    main(["fit", *options, "--trainer.max_steps", "1"])
    main(["test", *options, "--ckpt_path", "last"])
    assert any("test/loss" in row for row in rows(tmp_path / "OUT"))


def test_checkpoint_to_go_on_from_by_another_name(options, tmp_path):
    place = ["--resume.dirpath", str(tmp_path / "here"), "--resume.filename", "state", "--ckpt_path", "last"]
    main(["fit", *options, *place, "--trainer.max_steps", "3"])
    main(["fit", *options, *place, "--trainer.max_steps", "5"])
    assert torch.load(tmp_path / "here" / "state.ckpt", weights_only=True)["global_step"] == 5
    assert not list((tmp_path / "OUT").glob("**/last.ckpt"))


@pytest.mark.parametrize("place", [{}, {"filename": "state"}, {"dirpath": "HERE"}], ids=["bare", "name", "folder"])
def test_last_is_that_of_a_listed_callback(place, options, tmp_path):
    """One in the configuration takes the place of ``--resume``."""
    if "dirpath" in place:
        place = {"dirpath": str(tmp_path / "HERE")}
    listed = [{"class_path": "ResumeCheckpoint", "init_args": {**place, "every_n_steps": 2}}, {"class_path": "AdaNAGED"}]
    command = ["fit", *options, "--trainer.callbacks", json.dumps(listed), "--ckpt_path", "last"]
    main([*command, "--trainer.max_steps", "3"])
    main([*command, "--trainer.max_steps", "5"])
    steps = [row["step"] for row in rows(tmp_path / "OUT") if "zo/lr" in row]
    assert steps == [0, 1, 2, 3, 4]


def test_configuration_wins_over_the_checkpoints_arguments(options, tmp_path):
    main(["fit", *options, "--trainer.max_steps", "1"])
    main(["test", *options, "--ckpt_path", "best", "--model.length_normalised", "false"])
    config = sorted((tmp_path / "OUT").glob("**/config.yaml"))[-1]
    assert yaml.safe_load(config.read_text())["model"]["init_args"]["length_normalised"] is False


def test_saved_configuration_runs_again(options, tmp_path):
    main(["fit", *options, "--trainer.max_steps", "2"])
    (config,) = (tmp_path / "OUT").glob("**/config.yaml")
    main(["fit", "--config", str(config)])
    first, second = (torch.load(path, weights_only=True) for path in (tmp_path / "OUT").glob("**/best.ckpt"))
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())


def test_tensorboard_by_a_flag(options, tmp_path):
    pytest.importorskip("tensorboard")
    main(["fit", *options, "--trainer.max_steps", "1", "--tensorboard", "true"])
    (events,) = (tmp_path / "OUT").glob("**/events.out.tfevents*")
    assert (events.parent / "metrics.csv").is_file()


def test_switches_of_the_trainer_are_respected(options, tmp_path):
    switches = [
        "--trainer.logger",
        "false",
        "--trainer.enable_checkpointing",
        "false",
        "--trainer.enable_progress_bar",
        "false",
    ]
    main(["fit", *options, *switches, "--trainer.max_steps", "1"])
    assert not list((tmp_path / "OUT").glob("**/*.ckpt"))
    assert not list((tmp_path / "OUT").glob("**/metrics.csv"))


# ---- mistakes -----------------------------------------------------------------------------------------------------------
def fails(arguments: list[str], capsys) -> str:
    """Run, expect exit code 2, and return the one line that says why."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    (line,) = [line for line in captured.err.splitlines() if line.startswith("zo-lightning: error:")]
    assert captured.err.rstrip().endswith(line)
    return line


ZO = ("--model.optimizer", "ZerothOrder")
MISTAKES = {
    "misspelt task": (["--data.task", "sst3"], r"unknown task 'sst3', did you mean 'sst2'"),
    "batch size of zero": (["--data.batch_size", "0"], r"batch_size must be at least 1, got 0"),
    "unknown geometry": (["--trainer.callbacks.geometry.matrix=spectal"], r"geometry\['matrix'\].*got 'spectal'"),
    "unknown geometry of the optimizer": (
        ["--model.optimizer", "ZerothOrder", "--model.optimizer.geometry.vector=sing"],
        r"geometry\['vector'\].*got 'sing'",
    ),
    "max_steps missing": (["--trainer.max_steps", "-1"], r"set max_steps \(--trainer\.max_steps\)"),
    "no such model": (["--model.model_name_or_path", "no/such"], r"cannot load the .*'no/such'"),
    "no such option": (["--data.batchsize", "3"], r"batchsize"),
    "not a number": (["--data.batch_size", "many"], r"batch_size.*many"),
    "no such checkpoint": (["--ckpt_path", "nowhere.ckpt"], r"nowhere\.ckpt"),
    "minutes of zero": (["--resume.every_minutes", "0"], r"every_minutes must be positive, or None, got 0"),
    "two writers of one file": (["--checkpoint.save_last", "true"], r"both write .*last\.ckpt"),
    "gradient clipping": (["--trainer.gradient_clip_val", "1"], r"clipping is not supported for manual optimization"),
    "no such directions": (
        ["--model.optimizer", "ZerothOrder", "--model.optimizer.directions", "guassian"],
        r"directions must be one of.*got 'guassian'",
    ),
    "update without unit norm": (
        ["--model.optimizer", "ZerothOrder", "--model.optimizer.update", "sgd"],
        r"AdaNAGED needs steps of unit norm",
    ),
}


def test_a_checkpoint_of_another_model_is_said_to_be_one(options, tmp_path, capsys):
    main(["fit", *options, "--trainer.max_steps", "1"])
    config = tiny_config("opt")
    config.ffn_dim = 48
    other = save_tiny_model(tmp_path / "other", config)
    line = fails(["test", *options, "--ckpt_path", "last", "--model.model_name_or_path", str(other)], capsys)
    assert re.search(r"the checkpoint is of another model.*fc1.*give the same model_name_or_path and peft", line), line


def test_a_file_that_is_cut_short_is_named(options, tmp_path, capsys):
    main(["fit", *options, "--trainer.max_steps", "1"])
    last = next((tmp_path / "OUT").glob("**/last.ckpt"))
    last.write_bytes(last.read_bytes()[:5000])
    line = fails(["export", "--checkpoint", str(last), "--out", str(tmp_path / "exported")], capsys)
    assert re.search(r"--checkpoint '.*last\.ckpt' cannot be read", line), line


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_line(mistake, options, capsys):
    extra, message = MISTAKES[mistake]
    line = fails(["fit", *options, *extra], capsys)
    assert re.search(message, line), line


def test_folder_without_the_column(options, tmp_path, capsys):
    folder = tmp_path / "other"
    folder.mkdir()
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text('{"text": "a film", "label": 0}\n' * 64)
    line = fails(["fit", *options, "--data.data_dir", str(folder)], capsys)
    assert "sentence" in line
    assert "train.jsonl" in line


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_model_that_is_not_a_decoder(kind, options, tmp_path, tiny_opt, capsys):
    folder = tmp_path / kind
    folder.mkdir()
    for path in tiny_opt.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    line = fails(["fit", *options, "--model.model_name_or_path", str(folder)], capsys)
    assert f"is a model of type '{kind}'" in line


def test_weights_with_a_nan(options, tmp_path, capsys):
    folder = save_tiny_model(tmp_path / "broken", tiny_config("opt"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.decoder.layers.0.fc1.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    line = fails(["fit", *options, "--model.model_name_or_path", str(folder)], capsys)
    assert "'model.model.decoder.layers.0.fc1.weight'" in line


def test_best_without_a_run(options, capsys):
    assert "run fit first" in fails(["test", *options, "--ckpt_path", "best"], capsys)


def test_no_subcommand(capsys):
    assert "{fit,validate,test,predict}" in fails([], capsys)


def test_debugging_shows_the_traceback(options, monkeypatch):
    monkeypatch.setenv("ZO_LIGHTNING_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown task"):
        main(["fit", *options, "--data.task", "sst3"])


def test_bugs_keep_their_traceback(options, monkeypatch):
    def broken(self, batch):
        raise KeyError("a bug")

    monkeypatch.setattr("zo_lightning.modules.CausalLMClassificationModule.loss", broken)
    with pytest.raises(KeyError, match="a bug"):
        main(["fit", *options])


def test_value_errors_from_deep_inside_keep_their_traceback(options, monkeypatch):
    # torch.compile, where an earlier test has used it, turns the validation of distributions off
    monkeypatch.setattr(
        "zo_lightning.modules.CausalLMClassificationModule.loss",
        lambda self, batch: torch.distributions.Normal(torch.nan, 1, validate_args=True),
    )
    with pytest.raises(ValueError, match="constraint"):
        main(["fit", *options])
