"""Adapters of peft: logits against batches of one, training, checkpoints; bases that are only read."""

import accelerate
import pytest
import torch
from lightning.pytorch import seed_everything
from safetensors.torch import load_file
from torch import nn
from transformers import BloomConfig

from tests.modules.test_classification import loader, trainer
from tests.tiny import CANDIDATES, PROMPTS, plan, save_tiny_model, tiny_config
from zo_lightning.callbacks import AdaNAGED
from zo_lightning.data import PromptDataModule
from zo_lightning.modules import CausalLMClassificationModule, ModelError, language_model
from zo_lightning.modules.pretrained import is_immovable, load_causal_lm
from zo_lightning.optim import ZerothOrder

LABELS = [0, 1, 0]
LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"]}
PREFIX = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}
PROMPT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}
ADAPTERS = {
    "lora": {**LORA, "init_lora_weights": False},
    "lora and biases": {**LORA, "init_lora_weights": False, "bias": "all"},
    "ia3": {"peft_type": "IA3"},
    "prefix": PREFIX,
    "projected prefix": {**PREFIX, "prefix_projection": True, "encoder_hidden_size": 8},
    "prompt": PROMPT,
    "p-tuning": {"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 8},
}


@pytest.fixture
def batch():
    return plan(PROMPTS, CANDIDATES, LABELS)


def make(folder, peft, **arguments) -> CausalLMClassificationModule:
    module = CausalLMClassificationModule(str(folder), num_classes=2, peft=peft, **arguments)
    module.configure_model()
    return module.eval()


def fit(module, batch, tmp_path, steps=40, **arguments):
    run = trainer(tmp_path, max_steps=steps, callbacks=[AdaNAGED()], **arguments)
    module.train()  # as configure_model leaves it
    run.fit(module, loader(batch, 8), loader(batch, 1))
    return run


def mean_loss(module, batch) -> float:
    with torch.no_grad():
        return float(module.loss(batch).mean())


def adapter(module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


# ---- what fits into the model ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("peft", "limit"), [(None, 64), (LORA, 64), (PROMPT, 61), (PREFIX, 61)])
def test_prompts_leave_room_for_virtual_tokens(peft, limit, tiny_opt, films, tmp_path):
    """The tiny OPT has 64 positions, of which its tokenizer knows nothing."""
    task = {"name": "long", "template": " ".join(["{sentence}"] * 20) + " It was", "verbalizers": [" bad", " good"]}
    data = PromptDataModule(task, data_dir=str(films), batch_size=4, num_train=8, num_dev=4, pin_memory=False)
    module = CausalLMClassificationModule(str(tiny_opt), num_classes=2, peft=peft)
    assert module.longest_input == limit
    run = trainer(tmp_path, max_steps=2, callbacks=[])
    run.fit(module, data)
    assert module.longest_input == limit
    lengths = [len(item["prompt_ids"]) + max(map(len, item["candidate_ids"])) for item in data.dataset("train").examples]
    assert max(lengths) == limit
    assert data.tokenizer_in_use.model_max_length > 64


def test_a_model_without_positions_has_no_limit(tmp_path):
    BloomConfig(hidden_size=16, n_layer=2, n_head=2).save_pretrained(tmp_path)
    assert CausalLMClassificationModule(str(tmp_path), num_classes=2).longest_input is None


# ---- what the adapter computes ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_scores_equal_those_of_each_row_alone(kind, name, batch, tmp_path):
    """peft's own forward of one row without padding, whose virtual tokens come right before the text."""
    peft = dict(ADAPTERS[name])
    if kind == "gpt2" and "target_modules" in peft:
        peft["target_modules"] = ["c_attn"]
    module = make(save_tiny_model(tmp_path, tiny_config(kind)), peft)
    with torch.no_grad():
        scores = module(batch)
        for i, (prompt, options) in enumerate(zip(PROMPTS, CANDIDATES, strict=True)):
            for k, tokens in enumerate(options):
                ids = torch.tensor([prompt + tokens])
                log_p = module.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.log_softmax(-1)[0]
                start = log_p.shape[0] - len(tokens) - 1
                alone = torch.stack([log_p[start + j, t] for j, t in enumerate(tokens)]).mean()
                torch.testing.assert_close(scores[i, k], alone, rtol=0, atol=4e-6)
    assert not module.base._forward_pre_hooks


@pytest.mark.parametrize("name", ["lora", "prefix", "prompt"])
def test_the_optimizer_probes_the_adapter(name, batch, tiny_opt):
    """The slope of a step is the directional derivative that autograd finds."""
    module = make(tiny_opt, ADAPTERS[name])
    module.double()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(module.loss(batch).mean(), list(trained.values()))
    before = adapter(module)
    optimizer = ZerothOrder(trained.items(), smoothing=1e-4, lr=1e-3, seed=0, probes="sequential").attach(module)
    optimizer.step(lambda: module.loss(batch))
    optimizer.fold()
    slope = sum(float((g * (p - before[name]).detach()).sum()) for g, (name, p) in zip(gradients, trained.items(), strict=True))
    # the step is -γ sign(ρ) u
    assert slope / 1e-3 == pytest.approx(-abs(optimizer.last.slopes[0]), rel=1e-4)


@pytest.mark.parametrize(("name", "stacking"), [("lora", "trusted"), ("prefix", "trusted"), ("prompt", "off")])
def test_training_lowers_the_loss_and_leaves_the_base(name, stacking, batch, tiny_opt, tmp_path):
    seed_everything(0)
    module = make(tiny_opt, ADAPTERS[name])
    with torch.no_grad():  # near a minimum, from where random directions lead up: else the smoothing is not found
        batch["label"] = module(batch).argmax(dim=1)
    base = {n: p.clone() for n, p in module.named_parameters() if not p.requires_grad}
    before, start = mean_loss(module, batch), adapter(module)
    run = fit(module, batch, tmp_path)
    assert mean_loss(module.eval(), batch) < before - 0.002
    assert all(not torch.equal(p, start[n]) for n, p in adapter(module).items())
    assert all(torch.equal(p, base[n]) for n, p in module.named_parameters() if n in base)
    assert run.optimizers[0].param_groups[0]["stacking"] == stacking


def test_the_start_depends_on_the_seed_alone(tiny_opt):
    seed_everything(3)
    first = make(tiny_opt, LORA)
    drawn = torch.rand(1)
    seed_everything(3)
    torch.rand(5)
    assert all(torch.equal(p, adapter(first)[n]) for n, p in adapter(make(tiny_opt, LORA)).items())
    seed_everything(3)
    assert torch.equal(torch.rand(1), drawn)  # and nothing else depends on it
    seed_everything(4)
    assert any(not torch.equal(p, adapter(first)[n]) for n, p in adapter(make(tiny_opt, LORA)).items())


def test_dtype_of_the_precision(batch, tiny_opt, tmp_path):
    module = CausalLMClassificationModule(str(tiny_opt), num_classes=2, peft=LORA)
    fit(module, batch, tmp_path, steps=2, precision="bf16-true")
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


# ---- mistakes --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("peft", "message"),
    [
        ({}, "peft_type must be one of .*LORA.*, got None"),
        ({"peft_type": "LORRA"}, "got 'LORRA'"),
        ({"peft_type": "LORA", "rank": 8}, "LORA has no argument 'rank'"),
        ({"peft_type": "LORA", "lora_alfa": 8}, "did you mean 'lora_alpha'"),
        ({**LORA, "task_type": "SEQ_CLS"}, "task_type must be 'CAUSAL_LM'"),
        ({**LORA, "init_lora_weights": "pissa"}, "got 'pissa', which changes the base's weights"),
        ({**LORA, "r": -1}, "r.*positive"),
        ({**LORA, "target_modules": ["nowhere"]}, "(?i)target modules"),
        ({"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "TEXT"}, "PROMPT_TUNING does not take these"),
    ],
)
def test_wrong_arguments(peft, message, tiny_opt):
    with pytest.raises(ModelError, match=message) as caught:
        make(tiny_opt, peft)
    assert "\n" not in str(caught.value)


def test_peft_is_optional(tiny_opt, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    make(tiny_opt, None)
    with pytest.raises(ModelError, match=r"pip install 'zo-lightning\[peft\]'"):
        make(tiny_opt, LORA)


@pytest.mark.parametrize("arguments", [{"quantization": {"load_in_8bit": True}}, {"device_map": "auto"}])
def test_a_base_that_is_only_read_needs_an_adapter(arguments, tiny_opt):
    with pytest.raises(ModelError, match=rf"^{next(iter(arguments))}=.* needs peft="):
        CausalLMClassificationModule(str(tiny_opt), **arguments)


# ---- checkpoints -----------------------------------------------------------------------------------------------------------
def test_checkpoint_holds_the_adapter_alone(batch, tiny_opt, tmp_path):
    module = CausalLMClassificationModule(str(tiny_opt), num_classes=2, peft=LORA)
    run = fit(module, batch, tmp_path, steps=3)
    run.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == adapter(module).keys()
    assert all("lora_" in name for name in state)
    again = CausalLMClassificationModule.load_from_checkpoint(tmp_path / "x.ckpt").eval()
    assert torch.equal(again(batch), module.eval()(batch))


def test_resumed_run_ends_where_an_uninterrupted_one_does(batch, tiny_opt, tmp_path):
    def run(steps, checkpoint=None):
        seed_everything(0)
        module = CausalLMClassificationModule(str(tiny_opt), num_classes=2, peft=LORA)
        made = trainer(tmp_path, max_steps=steps, callbacks=[AdaNAGED(total_steps=12)])
        made.fit(module, loader(batch, 4), loader(batch, 1), ckpt_path=checkpoint)
        return module, made

    whole, _ = run(12)
    _, half = run(8)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, made = run(12, tmp_path / "half.ckpt")
    # from there on the bits of the written weights decide, as fit has written them at its end
    for name, value in adapter(whole).items():
        torch.testing.assert_close(adapter(resumed)[name], value, rtol=1e-4, atol=1e-6)
    assert made.test(resumed, loader(batch, 1), ckpt_path=tmp_path / "half.ckpt", verbose=False)[0]["test/loss"] > 0


def test_biases_of_the_base_may_be_trained_too(batch, tiny_opt, tmp_path):
    seed_everything(0)
    module = make(tiny_opt, {**LORA, "bias": "all"})
    start = adapter(module)
    assert sum(name.endswith("bias") for name in start) > 10
    fit(module, batch, tmp_path, steps=5).save_checkpoint(tmp_path / "x.ckpt")
    assert all(not torch.equal(p, start[name]) for name, p in adapter(module).items())
    again = CausalLMClassificationModule.load_from_checkpoint(tmp_path / "x.ckpt").eval()
    assert torch.equal(again(batch), module.eval()(batch))


def test_checkpoint_of_another_adapter(batch, tiny_opt, tmp_path):
    run = fit(CausalLMClassificationModule(str(tiny_opt), num_classes=2, peft=LORA), batch, tmp_path, steps=2)
    run.save_checkpoint(tmp_path / "x.ckpt")
    other = {**LORA, "target_modules": ["q_proj", "k_proj"]}
    with pytest.raises(RuntimeError, match=r"is of another adapter \(.*k_proj.*give the same peft"):
        CausalLMClassificationModule.load_from_checkpoint(tmp_path / "x.ckpt", peft=other)


# ---- offloaded bases -------------------------------------------------------------------------------------------------------
DISK = {
    "model.decoder.embed_tokens": "cpu",
    "model.decoder.embed_positions": "cpu",
    "model.decoder.final_layer_norm": "cpu",
    "model.decoder.layers": "disk",
    "lm_head": "cpu",
}


def offloaded_to_cpu(*args, **kwargs):
    return accelerate.cpu_offload(load_causal_lm(*args, **kwargs), execution_device="cpu")


def offloaded_to_disk(folder):
    return lambda *args, **kwargs: accelerate.disk_offload(
        load_causal_lm(*args, **kwargs), folder, execution_device="cpu", offload_buffers=True
    )


@pytest.mark.parametrize("kind", ["opt", "llama"])  # llama has buffers
@pytest.mark.parametrize("where", ["cpu", "disk", "device_map"])
def test_offloaded_base_trains_the_same_adapter(kind, where, batch, tmp_path, monkeypatch):
    """Bit for bit what the base in memory gives, and not a byte of the base is written, in memory or on the disk."""
    folder = save_tiny_model(tmp_path / "model", tiny_config(kind))
    if where == "device_map" and kind != "opt":
        pytest.skip("one map of modules is enough")
    seed_everything(0)
    resident = CausalLMClassificationModule(str(folder), num_classes=2, peft=LORA)
    before = mean_loss(make(folder, LORA), batch)
    fit(resident, batch, tmp_path)
    arguments = {}
    if where == "device_map":
        arguments = {"device_map": DISK, "offload_folder": str(tmp_path / "offload")}
    else:
        load = offloaded_to_cpu if where == "cpu" else offloaded_to_disk(tmp_path / "offload")
        monkeypatch.setattr(language_model, "load_causal_lm", load)
    seed_everything(0)
    module = CausalLMClassificationModule(str(folder), num_classes=2, peft=LORA, **arguments)
    files = {path: path.read_bytes() for path in tmp_path.glob("model/*")}
    run = fit(module, batch, tmp_path)
    assert is_immovable(module.model)
    assert sum(p.is_meta for p in module.model.parameters()) > 5
    assert {p.device.type for p in module.parameters() if p.requires_grad} == {"cpu"}
    assert all(torch.equal(p, adapter(resident)[name]) for name, p in adapter(module).items())
    assert mean_loss(module.eval(), batch) == mean_loss(resident.eval(), batch) < before - 0.01
    plain = load_file(folder / "model.safetensors")
    held = {}
    for module_name, part in module.base.named_modules():
        if hasattr(part, "_hf_hook") and part._parameters:
            with accelerate.utils.align_module_device(part):
                held.update({f"{module_name}.{k}": p.clone() for k, p in part._parameters.items() if p is not None})
    held = {name.replace(".base_layer", ""): value for name, value in held.items()}
    compared = [name for name in held if name in plain]
    assert len(compared) > 5
    assert all(torch.equal(held[name], plain[name]) for name in compared)
    assert all(path.read_bytes() == content for path, content in files.items())
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = CausalLMClassificationModule.load_from_checkpoint(tmp_path / "x.ckpt").eval()
    assert torch.equal(again(batch), module(batch))


def test_adapters_that_start_from_offloaded_weights(tiny_opt, monkeypatch):
    monkeypatch.setattr(language_model, "load_causal_lm", offloaded_to_cpu)
    make(tiny_opt, PROMPT)
    with pytest.raises(ModelError, match="prompt_tuning_init starts from weights of the base"):
        make(tiny_opt, {**PROMPT, "prompt_tuning_init": "SAMPLE_VOCAB"})
    with pytest.raises(ModelError, match="modules_to_save starts from weights of the base"):
        make(tiny_opt, {**LORA, "modules_to_save": ["fc1"]})
    with pytest.raises(ModelError, match="offloaded cannot be trained; leave bias at 'none'"):
        make(tiny_opt, {**LORA, "bias": "all"})


def test_moving_the_module_leaves_the_base_where_it_is(tiny_opt, monkeypatch):
    monkeypatch.setattr(language_model, "load_causal_lm", offloaded_to_cpu)
    module = make(tiny_opt, LORA)
    module.probe = nn.Linear(2, 2)
    module.to(dtype=torch.float64).to("meta")
    assert module.probe.weight.dtype == torch.float64
    assert module.probe.weight.is_meta
    assert {p.dtype for p in module.model.parameters()} == {torch.float32}
    assert {p.device.type for p in module.model.parameters() if p.requires_grad} == {"cpu"}
    assert next(name for name, _ in module.named_children()) == "model"


def test_trainer_on_another_device_is_refused(tiny_opt, tmp_path, monkeypatch):
    elsewhere = lambda *a, **k: accelerate.cpu_offload(load_causal_lm(*a, **k), execution_device="meta")  # noqa: E731
    monkeypatch.setattr(language_model, "load_causal_lm", elsewhere)
    module = CausalLMClassificationModule(str(tiny_opt), peft=LORA)
    module.trainer = trainer(tmp_path)
    with pytest.raises(ModelError, match="the model runs on meta and the Trainer on cpu; change device_map"):
        module.configure_model()


# ---- quantised bases -------------------------------------------------------------------------------------------------------
class Int8Linear(nn.Linear):
    """A Linear whose weight is int8 with a scale for each row; writing either is an error."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int8Linear":
        made = cls(linear.in_features, linear.out_features, linear.bias is not None)
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        made.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        made.scale = nn.Parameter(scale, requires_grad=False)
        made.bias = linear.bias
        return made

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)

    def _apply(self, fn, recurse=True):
        raise AssertionError("the quantised layer was moved or cast")


def quantised(*args, **kwargs):
    model = load_causal_lm(*args, **kwargs)
    for layer in model.model.decoder.layers:
        for owner, key in [(layer, "fc1"), (layer, "fc2"), *((layer.self_attn, k) for k in ("q_proj", "k_proj", "v_proj"))]:
            setattr(owner, key, Int8Linear.of(getattr(owner, key)))
    return model


def versions(module) -> dict[str, int]:
    """torch counts every in-place write of a tensor."""
    return {name: p._version for name, p in module.named_parameters() if not p.requires_grad}


def test_quantised_base_trains_an_adapter(batch, tiny_opt, tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "load_causal_lm", quantised)
    seed_everything(0)
    module = make(tiny_opt, LORA)
    base = {name: p.clone() for name, p in module.named_parameters() if not p.requires_grad}
    counts, before = versions(module), mean_loss(module, batch)
    run = fit(module, batch, tmp_path, precision="32-true")
    assert mean_loss(module.eval(), batch) < before - 0.01
    assert versions(module) == counts
    assert all(torch.equal(p, base[name]) for name, p in module.named_parameters() if name in base)
    assert sum(p.dtype == torch.int8 for p in module.parameters()) == 10
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = CausalLMClassificationModule.load_from_checkpoint(tmp_path / "x.ckpt").eval()
    assert torch.equal(again(batch), module(batch))


def test_quantised_base_without_an_adapter(tiny_opt, monkeypatch):
    monkeypatch.setattr(language_model, "load_causal_lm", quantised)
    with pytest.raises(ModelError, match="is quantised or spread over devices: it needs peft="):
        make(tiny_opt, None)


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(bits, batch, tmp_path):
    """bitsandbytes' own layers on a CPU: loss falls, their weights stay, and the adapter alone is kept and loaded again."""
    pytest.importorskip("bitsandbytes")
    # its 4-bit product on a CPU takes blocks of 64
    config = tiny_config("opt")
    config.hidden_size = config.word_embed_proj_dim = config.ffn_dim = 64
    folder = save_tiny_model(tmp_path / "model", config)
    quantization = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    seed_everything(0)
    module = make(folder, LORA, quantization=quantization)
    layer = module.base.model.decoder.layers[0].fc1
    assert type(layer).__name__ == ("Linear8bitLt" if bits == 8 else "Linear4bit")
    before = mean_loss(module, batch)  # the first forward may repack the weights
    start = {name: p.clone() for name, p in module.named_parameters() if not p.requires_grad}
    run = fit(module, batch, tmp_path, steps=30)
    assert mean_loss(module.eval(), batch) < before - 0.005
    assert all(torch.equal(p, start[name]) for name, p in module.named_parameters() if name in start)
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"].keys() == adapter(module).keys()
    again = CausalLMClassificationModule.load_from_checkpoint(tmp_path / "x.ckpt").eval()
    with torch.no_grad():  # with gradients it multiplies otherwise
        assert torch.equal(again(batch), module(batch))
