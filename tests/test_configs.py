"""Every shipped configuration parses through the real CLI, and runs with a tiny model and data."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.tiny import save_tiny_model, tiny_config
from zo_lightning.callbacks import AdaNAGED
from zo_lightning.cli import cli, main
from zo_lightning.data import ClassificationTask, PromptDataModule, get_task
from zo_lightning.modules import CausalLMClassificationModule
from zo_lightning.optim.methods import METHODS as METHOD_CLASSES

FOLDER = Path(__file__).parents[1] / "configs"
METHODS = sorted(FOLDER.glob("methods/*.yaml"))
CONFIGS = sorted(FOLDER.glob("*.yaml")) + sorted(FOLDER.glob("opt-*/*.yaml"))
PARAMETER_FREE = {"adanaged", *(f"parameter_free_{name}" for name in ("jaguar", "lozo", "zo_muon", "fzoo", "ldsd"))}
TASKS = {"sst2", "rte", "cb", "boolq", "wic", "wsc", "multirc"}


def name(path: Path) -> str:
    return str(path.relative_to(FOLDER).with_suffix(""))


def test_what_is_shipped():
    assert {name(path) for path in CONFIGS} == {
        *("quickstart", "opt-125m/sst2", "opt-1.3b/sst2_lora"),
        *(f"opt-1.3b/{task}" for task in TASKS),
        *(f"opt-6.7b/sst2_{kind}" for kind in ("8bit", "4bit", "offload")),
    }


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_instantiates(path, tmp_path):
    made = cli(["--config", str(path), "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)], run=False)
    assert isinstance(made.model, CausalLMClassificationModule)
    assert isinstance(made.datamodule, PromptDataModule)
    assert sum(isinstance(callback, AdaNAGED) for callback in made.trainer.callbacks) == 1
    task, _, kind = path.stem.partition("_")
    if path.parent.name in ("opt-1.3b", "opt-6.7b"):
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


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem != "quickstart"], ids=name)
def test_runs(path, tiny_opt, tmp_path):
    """Two steps in the configuration's own precision, and the evaluation of the checkpoint that was kept."""
    if "_" in path.stem:
        config = tiny_config("opt")
        config.hidden_size = config.word_embed_proj_dim = config.ffn_dim = 64  # bitsandbytes on a CPU takes blocks of 64
        tiny_opt = save_tiny_model(tmp_path / "model", config)
    task = get_task(yaml.safe_load(path.read_text())["data"]["init_args"]["task"])
    save_rows(task, tmp_path / "data")
    options = [
        *("--config", str(path), "--model.model_name_or_path", str(tiny_opt), "--data.data_dir", str(tmp_path / "data")),
        *("--data.batch_size", "4", "--data.num_train", "20", "--data.num_dev", "12", "--trainer.max_steps", "2"),
        *("--trainer.log_every_n_steps", "1"),
        *stand_ins(path, tmp_path),
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


# ---- methods, each over a task's configuration -------------------------------------------------------------------------
def test_every_method_has_a_configuration():
    assert {path.stem for path in METHODS} == {*METHOD_CLASSES, "first_order"} | PARAMETER_FREE


def with_method(path: Path, *more: str) -> list[str]:
    return ["--config", str(FOLDER / "opt-125m/sst2.yaml"), "--config", str(path), *more]


@pytest.mark.parametrize("path", METHODS, ids=name)
def test_a_method_replaces_the_optimizer(path, tiny_opt, tmp_path):
    """One optimizer and, where nothing is to be tuned, one AdaNAGED; the task stays what it is."""
    options = ["--model.model_name_or_path", str(tiny_opt), "--trainer.default_root_dir", str(tmp_path)]
    made = cli(with_method(path, *options), run=False)
    free = path.stem in PARAMETER_FREE
    assert sum(isinstance(callback, AdaNAGED) for callback in made.trainer.callbacks) == free
    assert made.datamodule.task.name == "sst2"
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


@pytest.mark.parametrize("path", METHODS, ids=name)
def test_a_method_runs(path, tiny_opt, tmp_path):
    save_rows(get_task("sst2"), tmp_path / "data")
    options = [
        *("--model.model_name_or_path", str(tiny_opt), "--data.data_dir", str(tmp_path / "data"), "--data.batch_size", "4"),
        *("--data.num_train", "20", "--data.num_dev", "12", "--trainer.max_steps", "3", "--trainer.log_every_n_steps", "1"),
        *("--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)),
        *("--trainer.enable_progress_bar", "false"),
    ]
    main(["fit", *with_method(path, *options)])
    (logged,) = tmp_path.glob("**/metrics.csv")
    text = logged.read_text()
    assert "val/acc" in text
    assert ("zo/forwards" in text) == (path.stem != "first_order")


def save_rows(task: ClassificationTask, folder: Path) -> None:
    """Rows with the columns of ``task``: enough for the 100 development rows of CB."""
    folder.mkdir()
    for split, count in (("train", 130), ("validation", 6)):
        rows = [
            {**dict.fromkeys(task.columns, "a film with no plot"), "label": index % task.num_classes} for index in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
