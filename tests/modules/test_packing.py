"""Candidates that share a row, scored by real architectures: against rows of their own and against one candidate at a time."""

import copy
import json

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import BloomConfig, Gemma2Config, GPTNeoConfig, MambaConfig, MistralConfig

import zo_lightning.modules.packing as packing_module
from tests.data.test_collate import example
from tests.tiny import VOCABULARY_SIZE, save_tiny_model, tiny_config
from zo_lightning.callbacks import AdaNAGED
from zo_lightning.data import PromptDataModule, ScoringCollator
from zo_lightning.modules import CausalLMMultipleChoiceModule, ModelError
from zo_lightning.modules.packing import packed_mask
from zo_lightning.optim import ZerothOrder

KINDS = ["opt", "gpt2", "llama", "qwen2"]
COMMON = {"vocab_size": VOCABULARY_SIZE, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}

# two, four, one and three candidates, of one to four tokens, some of which begin alike, after prompts of two to seven tokens
EXAMPLES = [
    example([2, 3, 4, 5], [[10, 11, 12], [13, 14]], label=1),
    example([2, 3, 11, 4, 6, 7, 8], [[10], [11, 12, 13, 14], [11, 12, 7], [15, 16, 4]], label=2),
    example([2, 9], [[17, 18, 6, 5]]),
    example([2, 3, 9, 4, 4], [[12, 5], [13, 5], [14, 5]], label=0),
]


def make(folder, dtype=torch.float32, **options) -> CausalLMMultipleChoiceModule:
    module = CausalLMMultipleChoiceModule(str(folder), **{"train_on": "classification", **options})
    module.configure_model()
    return module.eval().to(dtype)


def batch(packed: bool) -> dict[str, torch.Tensor]:
    return ScoringCollator(1, packed=packed)(EXAMPLES)


@torch.no_grad()
def scores_one_at_a_time(module) -> torch.Tensor:
    """Every candidate alone, without padding, in float64."""
    model = copy.deepcopy(module.model).double()
    scores = torch.full((len(EXAMPLES), 4), -torch.inf, dtype=torch.float64)
    for i, item in enumerate(EXAMPLES):
        for k, ids in enumerate(item["candidate_ids"]):
            start = len(item["prompt_ids"])
            log_p = model(torch.tensor([item["prompt_ids"] + ids])).logits[0].log_softmax(dim=-1)
            scores[i, k] = sum(float(log_p[start - 1 + j, token]) for j, token in enumerate(ids)) / len(ids)
    return scores


# ---- the mask ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask(dtype):
    segment = torch.tensor([[-1, -1, 0, 0, 1, 1, 2], [0, 1, 2, 2, 3, 3, 3]])
    mask = packed_mask(segment, dtype)
    assert mask.shape == (2, 1, 7, 7)
    assert mask.dtype == dtype
    for row, segments in enumerate(segment.tolist()):
        for query in range(7):
            for key in range(7):
                seen = key <= query and (segments[key] in (0, segments[query]))
                assert float(mask[row, 0, query, key]) == (0 if seen else torch.finfo(dtype).min)


# ---- scores ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_scores_are_those_of_one_candidate_at_a_time(kind, attention, tmp_path):
    module = make(save_tiny_model(tmp_path, tiny_config(kind)), attn_implementation=attention)
    assert module.allows_packing
    packed, alone = batch(packed=True), batch(packed=False)
    assert packed["input_ids"].shape[0] == 4 < alone["input_ids"].shape[0]
    assert bool((packed["attention_mask"] == 0).any())
    expected = scores_one_at_a_time(module)
    assert expected.isfinite().sum(dim=1).tolist() == [2, 4, 1, 3]
    torch.testing.assert_close(module(packed).double(), expected, rtol=0, atol=3e-6)
    torch.testing.assert_close(module(packed), module(alone), rtol=0, atol=3e-6)
    torch.testing.assert_close(module.loss(packed), module.loss(alone), rtol=0, atol=3e-6)
    exact = make(tmp_path, torch.float64, attn_implementation=attention)
    # eager attention takes its softmax in float32 in any case
    torch.testing.assert_close(exact(packed), expected, rtol=0, atol=1e-12 if attention == "sdpa" else 1e-6)
    assert exact.allows_packing or attention == "eager"  # which in float64 makes NaN of rows with padding, packed or not
    without = {key: column for key, column in packed.items() if key != "segment"}
    assert float((module(without) - module(packed)).nan_to_num().abs().max()) > 0.05, "the mask does something"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_in_half_precision(kind, tmp_path):
    module = make(save_tiny_model(tmp_path, tiny_config(kind)), torch.bfloat16)
    assert module.allows_packing
    expected = scores_one_at_a_time(module)  # of the rounded weights
    deviations = [(module(batch(packed)).double() - expected).nan_to_num(0).abs().max() for packed in (True, False)]
    assert max(deviations) < 0.1
    assert deviations[0] < 3 * deviations[1] + 0.01, "no more than rounding makes of any batch"


@torch.no_grad()
def test_under_autocast(tmp_path):
    module = make(save_tiny_model(tmp_path, tiny_config("llama")))
    expected = scores_one_at_a_time(module)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(batch(packed=True)).double(), expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_neutral_prompts(kind, tmp_path):
    module = make(save_tiny_model(tmp_path, tiny_config(kind)))
    items = [{**e, "neutral_ids": [2, 7], "neutral_candidate_ids": e["candidate_ids"]} for e in EXAMPLES]
    packed, alone = (ScoringCollator(1, packed=p)(items) for p in (True, False))
    assert "segment" in packed["neutral"]
    torch.testing.assert_close(module(packed), module(alone), rtol=0, atol=1e-5)
    assert float((module(packed) - module(batch(packed=True))).nan_to_num(0).abs().max()) > 0.1


def test_an_adapter_of_weights_is_no_hindrance(tiny_opt):
    module = make(
        tiny_opt, peft={"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    )
    assert module.allows_packing
    with torch.no_grad():
        torch.testing.assert_close(module(batch(packed=True)), module(batch(packed=False)), rtol=0, atol=3e-6)


# ---- probes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("probes", ["stacked", "sequential"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_rows_of_their_own(kind, probes, tmp_path):
    """Low-rank directions on all weights, three steps: the same losses at the probes, the same weights."""
    folder = save_tiny_model(tmp_path, tiny_config(kind))
    losses, weights = [], []
    for packed in (True, False):
        module = make(folder)
        optimizer = ZerothOrder(module.named_parameters(), lr=1e-2, smoothing=1e-3, rank=2, interval=2, probes=probes).attach(
            module
        )
        closure, stacked = module.closures(batch(packed))
        losses.append([float(optimizer.step(closure, stacked=stacked)) for _ in range(3)])
        optimizer.fold()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert len(set(losses[0])) == 3
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
    start = torch.cat([parameter.detach().flatten() for parameter in make(folder).parameters()])
    moved = weights[0] - start, weights[1] - start
    assert float(moved[0].norm()) > 0
    # the step is along the slope, a difference of two losses of float32 over 2e-3
    assert float((moved[0] - moved[1]).norm() / moved[1].norm()) < 2e-2


# ---- what is not allowed -----------------------------------------------------------------------------------------------
OTHERS = {
    "bloom": (BloomConfig(hidden_size=16, n_layer=2, n_head=2, **COMMON), "takes no position_ids"),
    "mamba": (MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, **COMMON), "takes no position_ids"),
    "mistral": (MistralConfig(sliding_window=8, **LLAMA, **COMMON), r"attends to a part of the text only \(sliding_window=8\)"),
    "gemma2": (Gemma2Config(head_dim=8, **LLAMA, **COMMON), r"has layers that are no full attention \(.*sliding_attention\)"),
    "gpt_neo": (
        GPTNeoConfig(hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], **COMMON),
        r"attends to a part of the text only \(window_size=256\)",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_do_not_pack(kind, tmp_path):
    config, message = OTHERS[kind]
    module = make(save_tiny_model(tmp_path, config))
    assert not module.allows_packing
    with pytest.raises(ModelError, match=rf"packing=True: the model '.*' {message}; leave packing out"):
        module.check_packing()


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING"])
def test_virtual_tokens_do_not_pack(tiny_opt, kind):
    module = make(tiny_opt, peft={"peft_type": kind, "num_virtual_tokens": 3})
    assert not module.allows_packing
    with pytest.raises(ModelError, match="has virtual tokens in front of the prompt"):
        module.check_packing()


def test_an_attention_without_masks_of_ones_own(tiny_opt):
    module = make(tiny_opt)
    module.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="has the attention 'flash_attention_2', which takes no mask of one's own"):
        module.check_packing()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lost", ["attention_mask", "position_ids"])
def test_a_model_that_ignores_what_it_is_told(tmp_path, lost, dtype):
    """A wrapper that takes the mask or the positions, and does without: only the numbers tell."""
    module = make(save_tiny_model(tmp_path, tiny_config("opt")), dtype)

    def forget(model, args, kwargs):
        columns = torch.arange(kwargs["input_ids"].shape[1]).expand_as(kwargs["input_ids"])
        plain = {"attention_mask": None, "position_ids": columns}
        return args, {**kwargs, lost: plain[lost]} if kwargs["attention_mask"].dim() == 4 else kwargs

    module.model.register_forward_pre_hook(forget, with_kwargs=True)
    assert not module.allows_packing
    with pytest.raises(ModelError, match=r"computes other logits for packed candidates: they deviate by \d"):
        module.check_packing()


@pytest.mark.parametrize("broken", [RuntimeError("first line\nsecond"), ValueError()])
def test_a_model_that_fails(tiny_opt, broken):
    module = make(tiny_opt)

    def fail(model, args, kwargs):
        if kwargs["attention_mask"].dim() == 4:
            raise broken

    module.model.register_forward_pre_hook(fail, with_kwargs=True)
    assert not module.allows_packing
    with pytest.raises(ModelError, match=r"fails with one mask per row \((RuntimeError: first line|ValueError: -)\)"):
        module.check_packing()


def test_a_model_that_context_does_not_reach_tells_nothing(tiny_opt):
    """What the mask is there to prevent makes no difference: rounding errors decide, so nothing is packed."""
    module = make(tiny_opt)
    with torch.no_grad():
        for layer in module.model.model.decoder.layers:
            layer.self_attn.out_proj.weight.zero_()
    with pytest.raises(ModelError, match=r"and \S+ is what they would deviate by without the mask"):
        module.check_packing()


def test_nan_does_not_pack(tiny_opt):
    module = make(tiny_opt)
    with torch.no_grad():
        next(module.model.parameters())[:] = torch.nan
    assert not module.allows_packing


def test_it_is_tried_once_and_leaves_no_trace(tmp_path, monkeypatch):
    module = make(save_tiny_model(tmp_path, tiny_config("opt", dropout=0.5)))
    assert not CausalLMMultipleChoiceModule(str(tmp_path)).allows_packing, "without a model"
    module.train()
    module.model.model.decoder.layers[0].eval()
    modes = [part.training for part in module.modules()]
    state, calls = torch.get_rng_state(), []
    module.model.register_forward_pre_hook(lambda model, args: calls.append(model.training))
    assert module.allows_packing
    assert calls == [False] * 3
    assert module.allows_packing
    assert len(calls) == 3
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not module.model.get_output_embeddings()._forward_pre_hooks


# ---- a whole run -------------------------------------------------------------------------------------------------------
@pytest.fixture
def choices(tmp_path):
    rows = [
        {
            "premise": "a film" + " with no plot" * (i % 3),
            "one": "film was good" if i % 2 else "No plot",
            "two": "It was terrible ." + " with no plot" * (i % 2),
            "label": i % 2,
        }
        for i in range(32)
    ]
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


def fit(module, folder, tmp_path, limits=None, **options):
    task = {"template": "{premise}", "choices": ["one", "two"]}
    data = PromptDataModule(
        task, str(folder), batch_size=4, num_train=24, num_dev=8, shuffle_seed=0, pin_memory=False, **options
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(
        accelerator="cpu", default_root_dir=tmp_path, callbacks=[AdaNAGED()], **quiet, **(limits or {"max_steps": 6})
    )
    trainer.fit(module, data)
    return trainer


class Watching(CausalLMMultipleChoiceModule):
    """Writes down how the batches of training and evaluation were fed."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.fed = {True: [], False: []}

    def scored_logits(self, batch):
        if self.trainer.state.fn == "fit" and self._packing_fault is not None:
            self.fed[self.trainer.training].append("segment" in batch)
        return super().scored_logits(batch)


@pytest.mark.parametrize("limits", [{"max_steps": 6}, {"max_epochs": 1}])
@pytest.mark.parametrize("train_on", ["classification", "lm"])
def test_a_run_packs_by_itself(tiny_opt, choices, tmp_path, limits, train_on):
    """Also where the number of steps is that of an epoch, for which Lightning makes the loader before the model."""
    module = Watching(str(tiny_opt), train_on=train_on)
    metrics = fit(module, choices, tmp_path, limits).callback_metrics
    assert module._packing_fault == ""
    assert set(module.fed[False]) == {True}
    # the loss of `lm` reads one candidate
    assert set(module.fed[True]) == ({True} if train_on == "classification" else {False})
    other = Watching(str(tiny_opt), train_on=train_on)
    fit(other, choices, tmp_path, limits, packing=False)
    assert other.fed == {True: [], False: []}, "nothing is tried"
    start = [make(tiny_opt, train_on=train_on), make(tiny_opt, train_on=train_on)]
    values, predictions = [], []
    for fresh, packing in zip(start, (None, False), strict=True):
        data = PromptDataModule(
            {"template": "{premise}", "choices": ["one", "two"]}, str(choices), packing=packing, pin_memory=False
        )
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet)
        values.append(trainer.test(fresh, data, verbose=False)[0])
        rows = [row for found in trainer.predict(fresh, data) for row in found]
        predictions.append(torch.tensor([row["scores"] for row in sorted(rows, key=lambda row: row["index"])]))
        assert fresh._packing_fault == ("" if packing is None else None)
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    torch.testing.assert_close(*predictions, rtol=0, atol=1e-5)
    assert metrics["val/loss"].isfinite()


def test_packing_that_is_forced(tiny_opt, choices, tmp_path, monkeypatch):
    module = Watching(str(tiny_opt), train_on="classification")
    fit(module, choices, tmp_path, packing=True)
    assert set(module.fed[True]) == {True}
    monkeypatch.setattr(packing_module, "_TOLERANCE", {torch.float32: 0.0})
    module = Watching(str(tiny_opt), train_on="classification")
    with pytest.raises(ModelError, match="computes other logits for packed candidates"):
        fit(module, choices, tmp_path, packing=True)
