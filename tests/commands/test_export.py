"""zo-lightning export: a folder that transformers or peft load, with the logits of the checkpoint."""

import json

import pytest
import torch
from lightning.pytorch import seed_everything
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.modules.test_adapters import ADAPTERS, LORA, offloaded_to_cpu, quantised
from tests.modules.test_classification import loader, trainer
from tests.tiny import CANDIDATES, PROMPTS, plan, save_tiny_model, tiny_config
from zo_lightning.callbacks import AdaNAGED
from zo_lightning.cli import main
from zo_lightning.commands.export import export
from zo_lightning.modules import CausalLMClassificationModule, ModelError, language_model
from zo_lightning.optim import ZerothOrder

ROW = {"input_ids": torch.tensor([[2, 3, 4, 5, 9]]), "attention_mask": torch.ones(1, 5, dtype=torch.int64)}


def train(folder, tmp_path, steps=5, precision="32-true", rule=True, **arguments):
    """A run that stops inside an interval of the directions; its module as it was when the checkpoint was written."""
    seed_everything(0)
    module = CausalLMClassificationModule(str(folder), num_classes=2, **arguments)
    batch = plan(PROMPTS, CANDIDATES, [0, 1, 0])
    run = trainer(tmp_path, max_steps=steps, precision=precision, callbacks=[AdaNAGED()] if rule else [])
    run.fit(module, loader(batch, 8), loader(batch, 1))
    run.save_checkpoint(tmp_path / "x.ckpt")
    return module.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(**ROW, use_cache=False).logits


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16)])
@pytest.mark.parametrize("kind", ["opt", "gpt2"])  # gpt2 stores its weights transposed, and both tie their embeddings
def test_whole_model(kind, precision, dtype, tmp_path):
    folder = save_tiny_model(tmp_path / "model", tiny_config(kind))
    module = train(folder, tmp_path, precision=precision)
    export(str(tmp_path / "x.ckpt"), str(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(module.model))
    assert not torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)))
    assert (tmp_path / "out" / "generation_config.json").exists()
    text = "a good film"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text) == AutoTokenizer.from_pretrained(folder)(text)


def test_checkpoint_in_the_middle_of_an_interval(tiny_opt, tmp_path):
    """What is pending of the update is in it: the optimizer writes the weights every 50 steps only."""

    class Keep(AdaNAGED):
        def on_train_batch_end(self, trainer, module, *rest):
            super().on_train_batch_end(trainer, module, *rest)
            if trainer.global_step == 3:
                assert trainer.optimizers[0]._made_path.dirty
                trainer.save_checkpoint(tmp_path / "mid.ckpt")
                self.seen = logits(module.model)

    seed_everything(0)
    batch = plan(PROMPTS, CANDIDATES, [0, 1, 0])
    module = CausalLMClassificationModule(str(tiny_opt), num_classes=2)
    trainer(tmp_path, max_steps=5, callbacks=[keep := Keep()]).fit(module, loader(batch, 8), loader(batch, 1))
    export(str(tmp_path / "mid.ckpt"), str(tmp_path / "out"))
    # the forward adds C Vᵀ x to W x, the export has W + C Vᵀ
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), keep.seen, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*(low-rank direction cannot follow|is used by flatten)")  # ia3 multiplies by its matrices
@pytest.mark.parametrize("name", ["lora", "lora and biases", "ia3"])
def test_merged_adapter_needs_no_peft(name, tiny_opt, tmp_path):
    module = train(tiny_opt, tmp_path, rule=False, peft=ADAPTERS[name])
    export(str(tmp_path / "x.ckpt"), str(tmp_path / "out"))
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert names == load_file(tiny_opt / "model.safetensors").keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == "OPTForCausalLM"
    torch.testing.assert_close(logits(loaded), logits(module.model), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*(low-rank direction cannot follow|is used by flatten)")  # ia3 multiplies by its matrices
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_by_itself(name, tiny_opt, tmp_path):
    """Bit for bit: nothing is added up."""
    module = train(tiny_opt, tmp_path, rule=False, peft=ADAPTERS[name])
    merge = None if "VIRTUAL" in str(ADAPTERS[name]).upper() else False  # virtual tokens cannot be merged
    export(str(tmp_path / "x.ckpt"), str(tmp_path / "out"), merge=merge)
    base = AutoModelForCausalLM.from_pretrained(tiny_opt)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "out")), logits(module.model))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_opt)
    assert not list((tmp_path / "out").glob("model*"))
    if merge is None:
        with pytest.raises(ModelError, match=f"--merge: an adapter of type {ADAPTERS[name]['peft_type']} cannot be merged"):
            export(str(tmp_path / "x.ckpt"), str(tmp_path / "other"), merge=True)


def test_adapter_of_a_quantised_base(tiny_opt, tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "load_causal_lm", quantised)
    module = train(tiny_opt, tmp_path, peft=LORA)
    export(str(tmp_path / "x.ckpt"), str(tmp_path / "out"), merge=False)
    base = quantised(str(tiny_opt), torch.float32)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "out")), logits(module.model))


def test_offloaded_base_is_not_loaded_for_its_adapter(tiny_opt, tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "load_causal_lm", offloaded_to_cpu)
    module = train(tiny_opt, tmp_path, peft=LORA)
    monkeypatch.setattr(language_model, "load_causal_lm", None)
    export(str(tmp_path / "x.ckpt"), str(tmp_path / "out"), merge=False)
    base = AutoModelForCausalLM.from_pretrained(tiny_opt)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "out")), logits(module.model))


def test_bitsandbytes_base_keeps_its_adapter_apart(tiny_opt, tmp_path):
    pytest.importorskip("bitsandbytes")
    module = train(tiny_opt, tmp_path, peft=LORA, quantization={"load_in_8bit": True})
    export(str(tmp_path / "x.ckpt"), str(tmp_path / "out"))
    base = CausalLMClassificationModule(str(tiny_opt), peft=LORA, quantization={"load_in_8bit": True}).load_base(
        torch.float32, None
    )
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "out")), logits(module.model))
    with pytest.raises(ModelError, match="trained on quantised weights"):
        export(str(tmp_path / "x.ckpt"), str(tmp_path / "other"), merge=True)


def test_dtype_and_command_line(tiny_opt, tmp_path, capsys):
    module = train(tiny_opt, tmp_path)
    main(["export", "--checkpoint", str(tmp_path / "x.ckpt"), "--out", str(tmp_path / "out"), "--dtype", "float16"])
    assert "AutoModelForCausalLM" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float16
    assert torch.equal(logits(loaded), logits(module.model.half()))


def test_a_checkpoint_of_the_command_line(tiny_opt, tmp_path):
    """Its hyperparameters hold what LightningCLI adds."""
    for split in ("train", "validation"):
        row = json.dumps({"sentence": "a film with no plot", "label": 1, "idx": 0}) + "\n"
        (tmp_path / f"{split}.jsonl").write_text(row * 40)
    options = ["--model", "CausalLMClassificationModule", "--model.model_name_or_path", str(tiny_opt)]
    options += ["--model.optimizer", "ZerothOrder", "--model.optimizer.momentum", "0.5"]
    options += ["--model.peft", json.dumps(LORA), "--data", "PromptDataModule", "--data.task", "sst2"]
    options += ["--data.data_dir", str(tmp_path), "--data.num_train", "20", "--data.num_dev", "12", "--data.batch_size", "4"]
    options += ["--trainer.max_steps", "3", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)]
    options += ["--trainer.callbacks+=AdaNAGED", "--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1"]
    main(["fit", *options])
    checkpoint = next(tmp_path.glob("**/best.ckpt"))
    export(str(checkpoint), str(tmp_path / "out"))
    module = CausalLMClassificationModule.load_from_checkpoint(checkpoint)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(module.model), rtol=1e-5, atol=1e-5)


class OwnModule(CausalLMClassificationModule):
    """A user's subclass, with an argument of its own."""

    def __init__(self, *args, extra=0, **kwargs):
        super().__init__(*args, **kwargs)
        self.save_hyperparameters("extra")


def test_subclass_is_exported_as_what_it_extends(tiny_opt, tmp_path):
    seed_everything(0)
    module = OwnModule(model_name_or_path=str(tiny_opt), num_classes=2, optimizer=ZerothOrder, extra=3)
    batch = plan(PROMPTS, CANDIDATES, [0, 1, 0])
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, loader(batch), loader(batch, 1))
    run.save_checkpoint(tmp_path / "x.ckpt")
    export(str(tmp_path / "x.ckpt"), str(tmp_path / "out"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(module.model))


# ---- mistakes --------------------------------------------------------------------------------------------------------------
def test_folder_that_is_not_empty(tiny_opt, tmp_path):
    train(tiny_opt, tmp_path, steps=1, peft=LORA)
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not an empty folder; give another one, or --overwrite true"):
        export(str(tmp_path / "x.ckpt"), str(out))
    export(str(tmp_path / "x.ckpt"), str(out), overwrite=True)
    assert (out / "model.safetensors").exists()
    export(str(tmp_path / "x.ckpt"), str(out), merge=False, overwrite=True)
    assert not (out / "model.safetensors").exists()  # it would be loaded in place of the adapter
    assert (out / "notes.txt").read_text() == "mine"


def test_what_is_no_checkpoint(tiny_opt, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        export(str(tmp_path / "none.ckpt"), str(tmp_path / "out"))
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(ModelError, match=r"text\.ckpt' cannot be read"):
        export(str(tmp_path / "text.ckpt"), str(tmp_path / "out"))
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ModelError, match="is not one of a run of zo-lightning"):
        export(str(tmp_path / "other.ckpt"), str(tmp_path / "out"))
    torch.save({"state_dict": {}, "hyper_parameters": {}, "zo_lightning": {"module": "os"}}, tmp_path / "odd.ckpt")
    with pytest.raises(ModelError, match="of the module 'os', which this version cannot export"):
        export(str(tmp_path / "odd.ckpt"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_base_that_has_gone(tmp_path):
    folder = save_tiny_model(tmp_path / "model", tiny_config("opt"))
    train(folder, tmp_path, steps=1, peft=LORA)
    folder.rename(tmp_path / "moved")
    for merge in (True, False):
        with pytest.raises(ModelError, match="cannot load the model"):
            export(str(tmp_path / "x.ckpt"), str(tmp_path / "out"), merge=merge)
    with pytest.raises(SystemExit):
        main(["export", "--checkpoint", str(tmp_path / "x.ckpt"), "--out", str(tmp_path / "out")])


def test_base_of_another_shape(tmp_path):
    folder = save_tiny_model(tmp_path / "model", tiny_config("opt"))
    train(folder, tmp_path, steps=1)
    config = tiny_config("opt")
    config.ffn_dim = 8
    save_tiny_model(folder, config)
    with pytest.raises(ModelError, match="size mismatch"):
        export(str(tmp_path / "x.ckpt"), str(tmp_path / "out"))


def test_merge_without_an_adapter(tiny_opt, tmp_path):
    train(tiny_opt, tmp_path, steps=1)
    with pytest.raises(ModelError, match="has no adapter to merge"):
        export(str(tmp_path / "x.ckpt"), str(tmp_path / "out"), merge=True)
