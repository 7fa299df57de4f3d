"""Every shipped configuration parses through the real CLI, and runs with a tiny model and data."""

import csv
import importlib.util
import json
import re
from pathlib import Path
from statistics import fmean

import pytest
import torch
import yaml

from tests.tiny import save_tiny_model, tiny_config
from zo_lightning.callbacks import AdaNAGED
from zo_lightning.cli import cli, main
from zo_lightning.data import PromptDataModule, get_task, list_tasks
from zo_lightning.modules import CausalLMClassificationModule, CausalLMGenerationModule, CausalLMMultipleChoiceModule
from zo_lightning.optim.methods import METHODS as METHOD_CLASSES

FOLDER = Path(__file__).parents[1] / "configs"
METHODS = sorted(FOLDER.glob("methods/*.yaml"))
CONFIGS = sorted(FOLDER.glob("*.yaml")) + sorted(FOLDER.glob("opt-*/*.yaml"))
PARAMETER_FREE = {"adanaged", *(f"parameter_free_{name}" for name in ("jaguar", "lozo", "zo_muon", "fzoo", "ldsd"))}
SIZES = ("1.3b", "13b")
KINDS = {
    CausalLMClassificationModule: ("sst2", "rte", "cb", "boolq", "wic", "wsc", "multirc"),
    CausalLMMultipleChoiceModule: ("copa", "record", "winogrande"),
    CausalLMGenerationModule: ("squad", "drop"),
}
MODULES = {task: module for module, tasks in KINDS.items() for task in tasks}
# The published results that the files quote: OPT-13B without training, and with the best of MeZO's variants.
PUBLISHED = {
    **{"sst2": (58.8, 91.4), "rte": (59.6, 70.8), "cb": (46.4, 69.6), "boolq": (59.0, 73.8), "wsc": (38.5, 64.4)},
    **{"wic": (55.0, 61.1), "multirc": (46.9, 63.7), "copa": (80.0, 88.0), "record": (81.2, 81.7)},
    **{"squad": (46.2, 84.7), "drop": (14.6, 31.4)},
}


def name(path: Path) -> str:
    return str(path.relative_to(FOLDER).with_suffix(""))


def test_what_is_shipped():
    assert {name(path) for path in CONFIGS} == {
        *("quickstart", "opt-125m/sst2", "opt-1.3b/sst2_lora"),
        *(f"opt-{size}/{task}" for size in SIZES for task in MODULES),
        *(f"opt-6.7b/sst2_{kind}" for kind in ("8bit", "4bit", "offload")),
    }
    assert set(MODULES) == set(list_tasks())


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_instantiates(path, tmp_path):
    made = cli(["--config", str(path), "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)], run=False)
    task, _, kind = path.stem.partition("_")
    assert type(made.model) is MODULES.get(task, CausalLMClassificationModule)
    assert isinstance(made.datamodule, PromptDataModule)
    assert made.datamodule.batch_size == 16
    assert sum(isinstance(callback, AdaNAGED) for callback in made.trainer.callbacks) == 1
    if path.parent.name in ("opt-1.3b", "opt-6.7b", "opt-13b"):
        assert made.datamodule.task.name == task
        assert made.model.model_name_or_path == f"facebook/{path.parent.name}"
        assert made.trainer.precision == ("16-true" if kind == "8bit" else "bf16-true")
    assert (made.model.peft is None) == (kind == "")
    # what transformers and accelerate take, number of the GPU included
    expected = {
        "8bit": {"load_in_8bit": True},
        "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    }
    assert made.model.quantization == expected.get(kind)
    placement = {"device_map": "auto", "max_memory": {0: "8GiB", "cpu": "24GiB"}, "offload_folder": "runs/offload"}
    assert made.model.placement.options() == (placement if kind == "offload" else {})


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_nothing_to_tune(path):
    """No learning rate and no smoothing anywhere, and the head says how to run it."""
    text = path.read_text()
    settings = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert not {"lr", "learning_rate", "smoothing", "optimizer"} & set(keys(yaml.safe_load(settings)))
    assert f"zo-lightning fit --config configs/{path.relative_to(FOLDER)}" in text


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("task", MODULES)
def test_what_is_known_of_a_run(task, size):
    """Nothing is claimed that was not measured; what others have published is said to be theirs."""
    head = [line for line in (FOLDER / f"opt-{size}/{task}.yaml").read_text().splitlines() if line.startswith("#")]
    score = "F1" if MODULES[task] is CausalLMGenerationModule else "Accuracy"
    assert head[3] == f"# {score} unmeasured, hours unmeasured, memory unmeasured."
    quoted = [line for line in head if line.startswith("# MeZO's paper: ")]
    assert len(quoted) == (size == "13b" and task in PUBLISHED)
    for line in quoted:
        without, best = PUBLISHED[task]
        assert line.endswith(
            f"zero-shot {without}, MeZO {best} (the best of its variants), {score.replace('A', 'a')} in percent."
        )


@pytest.mark.parametrize("task", ["squad", "drop"])
@pytest.mark.parametrize(("size", "layers", "hidden"), [("1.3b", 24, 2048), ("13b", 40, 5120)])
def test_the_memory_of_writing(size, layers, hidden, task):
    """The comment's figures follow from the model's shape: a key and a value of two bytes per number."""
    text = (FOLDER / f"opt-{size}/{task}.yaml").read_text()
    found = re.search(r"eval_batch_size: (\d+) # ([\d.]+) MB .* at most ([\d.]+) GB for (\d+) prompts of 2048", text)
    rows, each, most, prompts = map(float, found.groups())
    assert rows == prompts
    assert each == pytest.approx(4 * layers * hidden / 1e6, abs=0.05)
    assert most - 0.5 < 4 * layers * hidden * 2048 * rows / 1e9 <= most


def keys(node) -> list[str]:
    if isinstance(node, dict):
        return [*node, *(key for value in node.values() for key in keys(value))]
    return [key for value in node for key in keys(value)] if isinstance(node, list) else []


def stand_ins(path, folder) -> list[str]:
    """What a tiny model on a CPU cannot have as the configuration says it."""
    if path.stem.endswith("bit") and importlib.util.find_spec("bitsandbytes") is None:
        return ["--model.quantization", "null"]  # the adapter's run alone; tests/modules has the mechanism
    if path.stem.endswith("_offload"):  # there is no GPU to place parts on: the layers on the disk, the rest in memory
        parts = ("embed_tokens", "embed_positions", "final_layer_norm")
        map_ = {**{f"model.decoder.{part}": "cpu" for part in parts}, "model.decoder.layers": "disk", "lm_head": "cpu"}
        offload = ["--model.max_memory", "null", "--model.offload_folder", str(folder / "offload")]
        return ["--model.device_map", json.dumps(map_), *offload]
    return []


def small(model: Path, data: Path, root: Path, *more: str) -> list[str]:
    """A tiny model, few rows and two steps in place of what a configuration says."""
    return [
        *("--model.model_name_or_path", str(model), "--data.data_dir", str(data), "--data.batch_size", "4"),
        *("--data.num_train", "20", "--data.num_dev", "12", "--trainer.max_steps", "2", "--trainer.log_every_n_steps", "1"),
        *("--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(root), "--trainer.enable_progress_bar", "false"),
        *more,
    ]


def kind_options(task: str) -> list[str]:
    """The tiny model has 64 positions, fewer than a prompt and 50 tokens of an answer."""
    return ["--model.max_new_tokens", "4"] if MODULES[task] is CausalLMGenerationModule else []


def logged(root: Path, column: str) -> list[float]:
    """The values of a column of all ``metrics.csv`` of a folder."""
    files = [list(csv.DictReader(path.read_text().splitlines())) for path in sorted(root.glob("**/metrics.csv"))]
    return [float(row[column]) for rows in files for row in rows if row.get(column)]


@pytest.mark.parametrize("task", sorted(MODULES))
def test_every_task_is_learned(task, tiny_opt, rows_of, tmp_path):
    """The objective of the same rows, all of them in each batch, falls."""
    steps = ["--trainer.precision", "32-true", "--trainer.max_steps", "60", "--data.batch_size", "20", "--data.num_dev", "4"]
    options = small(tiny_opt, rows_of(task), tmp_path, *steps, *kind_options(task))
    once = ["--validation.times", "1", "--trainer.num_sanity_val_steps", "0"]
    main(["fit", "--config", str(FOLDER / f"opt-1.3b/{task}.yaml"), *options, *once])
    losses = logged(tmp_path, "train/loss")
    assert len(losses) == 60
    assert fmean(losses[-5:]) < fmean(losses[:5]) * 0.95


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem != "quickstart"], ids=name)
def test_runs(path, tiny_opt, rows_of, tmp_path):
    """Two steps in the configuration's own precision, and the evaluation of the checkpoint that was kept."""
    if "_" in path.stem:
        config = tiny_config("opt")
        config.hidden_size = config.word_embed_proj_dim = config.ffn_dim = 64  # bitsandbytes on a CPU takes blocks of 64
        tiny_opt = save_tiny_model(tmp_path / "model", config)
    task = yaml.safe_load(path.read_text())["data"]["init_args"]["task"]
    metric = "f1" if MODULES[task] is CausalLMGenerationModule else "acc"
    more = [*kind_options(task), *stand_ins(path, tmp_path)]
    options = ["--config", str(path), *small(tiny_opt, rows_of(task), tmp_path, *more)]
    main(["fit", *options])
    assert len(logged(tmp_path, "zo/lr")) == 2
    validations = logged(tmp_path, f"val/{metric}")
    assert len(validations) >= 2  # before and after, at least
    assert all(0 <= value <= 1 for value in validations)
    if path.parent.name != "opt-13b":  # the same but for the model's size
        main(["test", *options, "--ckpt_path", "best"])
        [value] = logged(tmp_path, f"test/{metric}")
        assert 0 <= value <= 1


# ---- methods, each over a task's configuration -------------------------------------------------------------------------
def test_every_method_has_a_configuration():
    assert {path.stem for path in METHODS} == {*METHOD_CLASSES, "first_order"} | PARAMETER_FREE


def with_method(path: Path, *more: str, config: str = "opt-125m/sst2") -> list[str]:
    return ["--config", str(FOLDER / f"{config}.yaml"), "--config", str(path), *more]


@pytest.mark.parametrize("path", METHODS, ids=name)
@pytest.mark.parametrize("task", ["sst2", "copa", "squad"])
def test_a_method_replaces_the_optimizer(task, path, tiny_opt, tmp_path):
    """One optimizer and, where nothing is to be tuned, one AdaNAGED; the task stays what it is."""
    options = ["--model.model_name_or_path", str(tiny_opt), "--trainer.default_root_dir", str(tmp_path)]
    options += ["--trainer.accelerator", "cpu"]
    made = cli(with_method(path, *options, config=f"opt-1.3b/{task}"), run=False)
    free = path.stem in PARAMETER_FREE
    assert sum(isinstance(callback, AdaNAGED) for callback in made.trainer.callbacks) == free
    assert made.datamodule.task.name == task
    assert type(made.model) is MODULES[task]
    made.model.configure_model()
    optimizer = made.model.configure_optimizers()
    if path.stem == "first_order":
        assert type(optimizer) is torch.optim.AdamW
    elif path.stem in METHOD_CLASSES:
        assert type(optimizer) is METHOD_CLASSES[path.stem]
    settings = yaml.safe_load(path.read_text())["model"]["init_args"]["optimizer"].get("init_args", {})
    assert ("lr" in settings) == (not free)
    assert not free or optimizer.update.normalised
    text = path.read_text()
    assert f"--config configs/opt-1.3b/sst2.yaml --config configs/methods/{path.name}" in text


@pytest.mark.parametrize("config", [f"opt-{size}/{task}" for size in SIZES for task in MODULES])
def test_a_task_combines_with_methods(config, tmp_path):
    for method, free in (("zo_sgd", False), ("parameter_free_lozo", True)):
        options = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)]
        made = cli(with_method(FOLDER / f"methods/{method}.yaml", *options, config=config), run=False)
        assert sum(isinstance(callback, AdaNAGED) for callback in made.trainer.callbacks) == free
        assert made.datamodule.task.name == config.partition("/")[2]
        assert made.trainer.max_steps == 20000


@pytest.mark.parametrize("path", METHODS, ids=name)
def test_a_method_runs(path, tiny_opt, rows_of, tmp_path):
    options = small(tiny_opt, rows_of("sst2"), tmp_path, "--trainer.max_steps", "3")
    main(["fit", *with_method(path, *options)])
    assert len(logged(tmp_path, "val/acc")) >= 2
    assert bool(logged(tmp_path, "zo/forwards")) == (path.stem != "first_order")


# ---- objectives and evaluations, each over a task's configuration ------------------------------------------------------
OBJECTIVES = {"accuracy": ("sst2", "copa"), "f1": ("squad", "drop"), "exact_match": ("squad", "drop")}


def test_every_objective_has_a_configuration():
    assert {path.stem for path in FOLDER.glob("objectives/*.yaml")} == set(OBJECTIVES)
    for objective, (task, _) in OBJECTIVES.items():
        how = f"--config configs/opt-1.3b/{task}.yaml --config configs/objectives/{objective}.yaml"
        assert how in (FOLDER / f"objectives/{objective}.yaml").read_text()


@pytest.mark.parametrize(("objective", "task"), [(name, task) for name, tasks in OBJECTIVES.items() for task in tasks])
def test_an_objective_runs(objective, task, rows_of, tmp_path):
    """What is minimised is what the score lacks to 1."""
    path = FOLDER / f"objectives/{objective}.yaml"
    one_word = ["--model.max_new_tokens", "1"] if task in ("squad", "drop") else []
    model = save_tiny_model(tmp_path / "model", tiny_config("opt"), seed=2)  # one that writes words
    options = small(model, rows_of(task), tmp_path, "--data.batch_size", "16", *one_word)
    args = with_method(path, *options, config=f"opt-1.3b/{task}")
    made = cli(args, run=False)
    assert sum(isinstance(callback, AdaNAGED) for callback in made.trainer.callbacks) == 1
    assert (made.model.score.best, made.model.f_high) == (1.0, 1.0)
    main(["fit", *args])
    scores = logged(tmp_path, {"accuracy": "val/acc", "f1": "val/f1", "exact_match": "val/em"}[objective])
    assert len(scores) >= 2
    assert any(0 < loss < 1 for loss in logged(tmp_path, "train/loss"))  # neither nothing is right nor everything
    assert logged(tmp_path, "val/loss") == pytest.approx([1 - score for score in scores], abs=1e-6)


def test_an_objective_of_another_kind_of_task(tiny_opt, rows_of, tmp_path, capsys):
    path = FOLDER / "objectives/accuracy.yaml"
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *with_method(path, *small(tiny_opt, rows_of("squad"), tmp_path), config="opt-1.3b/squad")])
    assert stopped.value.code == 2
    assert "objective='accuracy': CausalLMGenerationModule has 'loss', 'f1', 'exact_match'" in capsys.readouterr().err


def test_every_evaluation_says_how_to_run_it():
    paths = sorted(FOLDER.glob("evaluation/*.yaml"))
    assert [path.stem for path in paths] == ["calibrated", "icl"]
    for path in paths:
        assert f"zo-lightning test --config configs/opt-1.3b/sst2.yaml --config configs/{name(path)}.yaml" in path.read_text()


@pytest.mark.parametrize("task", MODULES)
def test_in_context_learning_runs(task, rows_of, tmp_path):
    """Demonstrations are in front of each prompt, as many as fit; without a checkpoint the model is as it was loaded."""
    config = tiny_config("opt")
    config.max_position_embeddings = 128  # for two prompts of the longest templates
    model = save_tiny_model(tmp_path / "model", config)
    options = small(model, rows_of(task), tmp_path, "--data.max_length", "128", "--data.num_train", "36", *kind_options(task))
    main(["test", *with_method(FOLDER / "evaluation/icl.yaml", *options, config=f"opt-1.3b/{task}")])
    prompts = [row["prompt"] for row in predictions(tmp_path)]
    alone = [get_task(task).prompt(row) for row in read(rows_of(task) / "validation.jsonl")]
    assert all(prompt.endswith(text) for prompt, text in zip(prompts, alone, strict=True))
    assert any(prompt != text for prompt, text in zip(prompts, alone, strict=True))


@pytest.mark.parametrize("task", ["sst2", "copa"])
def test_a_calibrated_evaluation_runs(task, tiny_opt, rows_of, tmp_path):
    """Other scores than without, the same loss."""
    options = small(tiny_opt, rows_of(task), tmp_path)
    main(["test", "--config", str(FOLDER / f"opt-1.3b/{task}.yaml"), *options])
    plain = [row["scores"] for row in predictions(tmp_path)]
    main(["test", *with_method(FOLDER / "evaluation/calibrated.yaml", *options, config=f"opt-1.3b/{task}")])
    calibrated = [row["scores"] for row in predictions(tmp_path)]
    assert calibrated != plain
    first, second = logged(tmp_path, "test/loss")
    assert first == pytest.approx(second)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def predictions(root: Path) -> list[dict]:
    """The rows of the newest predictions."""
    return read(max(root.glob("lightning_logs/*/predictions.jsonl"), key=lambda path: path.stat().st_mtime_ns))
