"""The training phase of ZO Fine-tuner in a Trainer, and on the command line."""

import copy
import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.modules.test_classification import loader, trainer
from tests.optim.reference import bits, same_bits
from tests.tiny import CANDIDATES, PROMPTS, plan, save_tiny_model, tiny_config
from zo_lightning.cli import main
from zo_lightning.data import DataError, MultiTaskDataModule, PromptDataModule
from zo_lightning.modules import FineTunerTraining
from zo_lightning.optim import LearnedScales, NonFiniteLossError, ScaleLearner, ScaleNetworks

CONFIGS = Path(__file__).parents[2] / "configs"


# ---- the module ----------------------------------------------------------------------------------------------------------
class Weights(Callback):
    """The model's weights before each batch, and the rate and momentum of its optimizer after it."""

    def __init__(self):
        self.before, self.rates = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.before.append(copy.deepcopy(module.model.state_dict()))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def train(folder, tmp_path, epochs, batches, data=None, **arguments):
    module = FineTunerTraining(str(folder), num_classes=2, **{"dropout": False, **arguments})
    seen = Weights()
    run = trainer(tmp_path, max_epochs=epochs, callbacks=[seen], limit_val_batches=0)
    batch = plan(PROMPTS, CANDIDATES, [0, 1, 0])
    run.fit(module, loader(batch, batches) if data is None else data, loader(batch, 1))
    return module, seen


def test_model_moves_by_its_true_gradient_and_restarts(tiny_opt, tmp_path):
    arguments = {"lr_llm": 0.05, "epochs_per_restart": 2, "momentum": 0.8, "max_grad_norm": 0.5}
    module, seen = train(tiny_opt, tmp_path, 5, 3, **arguments)
    assert seen.rates == pytest.approx(
        [0.05 * (1 - t / 6) for t in (0, 1, 2, 3, 4, 5)] * 2 + [0.05 * (1 - t / 6) for t in (0, 1, 2)]
    )
    other = FineTunerTraining(str(tiny_opt), num_classes=2, **arguments)
    other.configure_model()
    other.eval()
    start = copy.deepcopy(other.model.state_dict())
    batch = plan(PROMPTS, CANDIDATES, [0, 1, 0])
    for step in range(15):
        if step % 6 == 0:
            other.model.load_state_dict(start)
            buffers = [torch.zeros_like(p) for p in other.model.parameters()]
        if step == 0 or step % 6:  # the callback looks before the batch, and the module restarts within it
            for key, value in other.model.state_dict().items():
                torch.testing.assert_close(seen.before[step][key], value, rtol=0, atol=2e-6)
        gradients = torch.autograd.grad(other.loss(batch).mean(), list(other.model.parameters()))
        factor = min(1.0, 0.5 / float(torch.cat([g.flatten() for g in gradients]).norm()))
        with torch.no_grad():
            for p, g, buffer in zip(other.model.parameters(), gradients, buffers, strict=True):
                buffer.mul_(0.8).add_(g * factor)
                p.sub_(0.05 * (1 - step % 6 / 6) * buffer)
    assert not torch.equal(seen.before[5]["model.decoder.layers.0.fc1.weight"], start["model.decoder.layers.0.fc1.weight"])
    assert module.learner.networks.names == tuple(name for name, _ in module.model.named_parameters())


def test_networks_move(tiny_opt, tmp_path):
    module, _ = train(tiny_opt, tmp_path, 2, 4, lr_update=1e-3, lr_mlp=0.1, lr_llm=0.0, seed=4)
    begun = ScaleNetworks(module.learner.networks.names, seed=4).double()
    change = (module.learner.networks.w2 - begun.w2).norm() / begun.w2.norm()
    assert 1e-6 < float(change.detach()) < 0.5
    start = FineTunerTraining(str(tiny_opt), num_classes=2)
    start.configure_model()
    assert same_bits(bits(module.model), bits(start.model))  # at a rate of zero the model stays


def test_any_decoder(tmp_path):
    for kind in ("llama", "gpt2", "qwen2"):
        module, _ = train(save_tiny_model(tmp_path / kind, tiny_config(kind)), tmp_path, 1, 2)
        assert len(module.learner.networks.names) == len(list(module.model.parameters()))


def test_an_adapter_alone(tiny_opt, tmp_path):
    lora = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    module, _ = train(tiny_opt, tmp_path, 1, 2, peft=lora, lr_llm=0.1)
    assert len(module.learner.networks.names) == 4
    assert all("lora_" in name for name in module.learner.networks.names)


def test_tasks_in_shuffled_order(tiny_opt, tmp_path, monkeypatch):
    visits, original = [], ScaleLearner.step
    monkeypatch.setattr(ScaleLearner, "step", lambda self, closure, task: visits.append(task) or original(self, closure, task))
    batch = plan(PROMPTS, CANDIDATES, [0, 1, 0])
    tasks = [dict.fromkeys(("a", "b", "c"), batch)] * 6
    data = torch.utils.data.DataLoader(tasks, batch_size=None)
    module, seen = train(tiny_opt, tmp_path, 2, 6, data, lr_llm=0.03, epochs_per_restart=2)
    rounds = [tuple(visits[start : start + 3]) for start in range(0, len(visits), 3)]
    assert len(rounds) == 12
    assert all(sorted(visit) == ["a", "b", "c"] for visit in rounds)
    assert len(set(rounds)) > 2
    assert module.trainer.global_step == 12
    assert seen.rates[0] == pytest.approx(0.03 * (1 - 2 / 36))  # three steps of the model for each batch
    assert set(module.learner.state_dict()["histories"]) == {"a", "b", "c"}


def test_nan_ends_the_run(tiny_opt, tmp_path):
    class Broken(FineTunerTraining):
        def loss(self, batch):
            return super().loss(batch) * torch.nan

    module = Broken(str(tiny_opt), num_classes=2, max_nonfinite=2)
    start = FineTunerTraining(str(tiny_opt), num_classes=2)
    start.configure_model()
    batches = loader(plan(PROMPTS, CANDIDATES, [0, 1, 0]))
    with pytest.raises(NonFiniteLossError, match="in 2 batches in a row"):
        trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(module, batches, batches)
    assert same_bits(bits(module.model), bits(start.model))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_is_refused(precision, tiny_opt, tmp_path):
    module, batches = FineTunerTraining(str(tiny_opt), num_classes=2), loader(plan(PROMPTS, CANDIDATES, [0, 1, 0]))
    with pytest.raises(MisconfigurationException, match=f"precision '{precision}'.* use one of 32-true"):
        trainer(tmp_path, max_epochs=1, precision=precision).fit(module, batches, batches)


@pytest.mark.parametrize("arguments", [{"epochs_per_restart": 0}, {"max_nonfinite": 0}, {"lr_llm": -1.0}, {"momentum": 1.0}])
def test_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        FineTunerTraining("x", **arguments)


def test_tasks_need_names_of_their_own():
    with pytest.raises(DataError, match="two have the name 'sst2'"):
        MultiTaskDataModule([PromptDataModule(), PromptDataModule()])
    with pytest.raises(DataError, match="at least one"):
        MultiTaskDataModule([])
    with pytest.raises(DataError, match="'squad' is a generation task; give tasks with candidates"):
        MultiTaskDataModule([PromptDataModule("sst2"), PromptDataModule("squad")])
    assert MultiTaskDataModule([PromptDataModule("sst2"), PromptDataModule("cb")]).num_classes == 3


# ---- the command line ----------------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    """Keep the Arrow copies that `datasets` makes out of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "hf_datasets")


def options(config, folder, films, out) -> list[str]:
    """The documented command with the tiny model and data."""
    rows = {"data_dir": str(films), "batch_size": 4, "num_train": 20, "num_dev": 4}
    if config == "train_sst2":
        data = [word for key, value in rows.items() for word in (f"--data.{key}", str(value))]
    else:
        other = {"name": "other", "template": "{sentence} It was", "verbalizers": [" bad", " good"]}
        members = [{"task": "sst2", **rows}, {"task": other, **rows, "num_train": 12}]
        data = [
            "--data.tasks",
            json.dumps([{"class_path": "PromptDataModule", "init_args": member} for member in members]),
        ]
    return [
        *("--config", str(CONFIGS / "finetuner" / f"{config}.yaml"), "--model.model_name_or_path", str(folder), *data),
        *("--model.epochs_per_restart", "1", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"),
        *("--trainer.default_root_dir", str(out), "--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"),
    ]


def logged(out) -> list[dict[str, str]]:
    with next(out.glob("**/metrics.csv")).open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("config", ["train_sst2", "train_multi"])
def test_fit_stop_and_go_on(config, tiny_opt, films, tmp_path):
    whole, stopped = tmp_path / "WHOLE", tmp_path / "STOPPED"
    main(["fit", *options(config, tiny_opt, films, whole)])
    rows = logged(whole)
    assert len(rows) == 10
    assert all({"meta/loss", "meta/sigma_mean", "meta/sigma_min", "meta/sigma_max", "train/loss"} <= set(row) for row in rows)
    assert ("meta/loss/other" in rows[0]) == (config == "train_multi")
    assert all(0 < float(row["meta/sigma_min"]) < float(row["meta/sigma_mean"]) < float(row["meta/sigma_max"]) for row in rows)
    for steps in ("3", "7", "-1"):  # in the first epoch, and after a restart
        main(["fit", *options(config, tiny_opt, films, stopped), "--ckpt_path", "last", "--trainer.max_steps", steps])
    assert logged(stopped) == rows
    files = [next(out.glob("**/finetuner.safetensors")) for out in (whole, stopped)]
    assert files[0].read_bytes() == files[1].read_bytes()
    ends = [torch.load(next(out.glob("**/last.ckpt")), weights_only=True) for out in (whole, stopped)]
    assert all(torch.equal(value, ends[1]["state_dict"][key]) for key, value in ends[0]["state_dict"].items())
    main(["fit", *options(config, tiny_opt, films, tmp_path / "VAL"), "--trainer.limit_val_batches", "1.0"])
    names = ["val/loss/sst2", "val/loss/other"] if config == "train_multi" else ["val/loss", "val/acc"]
    assert all(any(row.get(name) for row in logged(tmp_path / "VAL")) for name in names)
    loaded = FineTunerTraining.load_from_checkpoint(next(whole.glob("**/last.ckpt")), weights_only=True)
    networks = ScaleNetworks.load(files[0])
    assert same_bits(bits(loaded.learner.networks), bits(networks))
    assert networks.names[0] == "model.decoder.embed_tokens.weight"
    assert networks.fingerprint() != ScaleNetworks(networks.names).double().fingerprint()


def test_learned_networks_in_use(tiny_opt, films, tmp_path):
    main(["fit", *options("train_sst2", tiny_opt, films, tmp_path / "LEARN"), "--trainer.max_steps", "2"])
    file = next(tmp_path.glob("LEARN/**/finetuner.safetensors"))
    use = [
        *("--config", str(CONFIGS / "opt-125m" / "sst2.yaml"), "--model.model_name_or_path", str(tiny_opt)),
        *("--data.data_dir", str(films), "--data.num_train", "20", "--data.num_dev", "4", "--trainer.callbacks", "null"),
        *("--trainer.accelerator", "cpu", "--trainer.max_steps", "2", "--trainer.default_root_dir", str(tmp_path / "USE")),
        *("--model.optimizer", "zo_lightning.optim.methods.zo_finetuner.ZOFineTuner", "--trainer.enable_progress_bar", "false"),
    ]
    main(["fit", *use, "--model.optimizer.networks", str(file)])
    config = yaml.safe_load(next(tmp_path.glob("USE/**/config.yaml")).read_text())
    assert config["model"]["init_args"]["optimizer"]["init_args"]["networks"] == str(file)
    state = torch.load(next(tmp_path.glob("USE/**/last.ckpt")), weights_only=True)["optimizer_states"][0]
    assert state["sampler"]["networks"] == ScaleNetworks.load(file).fingerprint() == LearnedScales(file)._signature()
    main(["fit", *use, "--model.optimizer.networks", "1.0", "--trainer.max_steps", "1"])
    config = yaml.safe_load(sorted(tmp_path.glob("USE/**/config.yaml"))[-1].read_text())
    assert config["model"]["init_args"]["optimizer"]["init_args"]["networks"] == 1.0


def test_a_checkpoint_of_another_module(tiny_opt, films, tmp_path, capsys):
    use = ["--config", str(CONFIGS / "opt-125m" / "sst2.yaml"), "--model.model_name_or_path", str(tiny_opt)]
    data = ["--data.data_dir", str(films), "--data.num_train", "20", "--data.num_dev", "4", "--data.batch_size", "4"]
    run = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--trainer.default_root_dir", str(tmp_path / "USE")]
    main(["fit", *use, *data, *run])
    other = next(tmp_path.glob("USE/**/last.ckpt"))
    with pytest.raises(SystemExit):
        main(["fit", *options("train_sst2", tiny_opt, films, tmp_path / "LEARN"), "--ckpt_path", str(other)])
    assert "not one of a training phase of ZO Fine-tuner" in capsys.readouterr().err
