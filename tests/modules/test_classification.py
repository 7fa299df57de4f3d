"""The classification module against forwards of the whole model, and its life in a Trainer."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from tests.tiny import CANDIDATES, PROMPTS, plan, save_tiny_model, tiny_config
from zo_lightning.callbacks import AdaNAGED
from zo_lightning.modules import CausalLMClassificationModule, ModelError, candidate_scores

LABELS = [1, 0, 1]


@pytest.fixture
def batch():
    return plan(PROMPTS, CANDIDATES, LABELS)


def make(folder, **arguments) -> CausalLMClassificationModule:
    module = CausalLMClassificationModule(str(folder), num_classes=2, **arguments)
    module.configure_model()
    return module.eval()


def trainer(tmp_path, **arguments) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, **{**quiet, **arguments})


def loader(batch, count=4):
    return DataLoader([batch] * count, batch_size=None)


@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2", "qwen2"])
def test_scored_logits_equal_those_of_a_full_forward(kind, batch, tmp_path):
    module = make(save_tiny_model(tmp_path, tiny_config(kind)))
    with torch.no_grad():
        full = module.model(**{k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")}).logits
        expected = candidate_scores(full[batch["logit_row"], batch["logit_position"]], batch)
        torch.testing.assert_close(module(batch), expected, rtol=0, atol=1e-6)
    assert not module.model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2", "qwen2"])
def test_padding_changes_nothing(kind, batch, tmp_path):
    """A padded batch equals each example alone without padding."""
    module = make(save_tiny_model(tmp_path, tiny_config(kind)))
    with torch.no_grad():
        scores = module(batch)
        for i, (prompt, options) in enumerate(zip(PROMPTS, CANDIDATES, strict=True)):
            for k, tokens in enumerate(options):
                ids = torch.tensor([prompt + tokens])
                log_p = module.model(ids).logits.log_softmax(-1)[0]
                alone = torch.stack([log_p[len(prompt) - 1 + j, t] for j, t in enumerate(tokens)]).mean()
                torch.testing.assert_close(scores[i, k], alone, rtol=0, atol=2e-6)


def test_soft_capping_after_the_head_is_kept(batch, tmp_path):
    module = make(save_tiny_model(tmp_path, tiny_config("opt")))
    plain = module(batch)
    module.model.register_forward_hook(lambda model, args, output: setattr(output, "logits", output.logits.tanh()))
    assert not torch.allclose(module(batch), plain)


def test_a_head_that_is_not_used_is_an_error(batch, tiny_opt):
    module = make(tiny_opt)
    module.model.get_output_embeddings = lambda: torch.nn.Identity()
    with pytest.raises(RuntimeError, match=r"returned logits of shape \(6, .*its output head is not called once"):
        module(batch)


def test_length_normalisation_is_an_option(batch, tiny_opt):
    mean, total = make(tiny_opt)(batch), make(tiny_opt, length_normalised=False)(batch)
    length = batch["candidate_length"].view(3, 2)
    torch.testing.assert_close(mean * length, total)


def test_validation_metrics_and_weighted_mean(batch, tiny_opt, tmp_path):
    """Batches of 3 and 1 examples: the loss is the mean over examples, not over batches."""
    module = CausalLMClassificationModule(str(tiny_opt), num_classes=2)
    single = plan(PROMPTS[:1], CANDIDATES[:1], LABELS[:1])
    module.configure_model()
    module.eval()
    with torch.no_grad():
        losses = torch.cat([module.loss(batch), module.loss(single)])
        predicted = torch.cat([module(batch), module(single)]).argmax(1)
    labels = torch.tensor([*LABELS, LABELS[0]])
    metrics = trainer(tmp_path).validate(module, DataLoader([batch, single], batch_size=None), verbose=False)[0]
    assert metrics["val/loss"] == pytest.approx(float(losses.mean()), abs=1e-6)
    assert metrics["val/acc"] == pytest.approx(float((predicted == labels).float().mean()))
    f1 = []
    for k in {*labels.tolist(), *predicted.tolist()}:
        hit = int(((predicted == k) & (labels == k)).sum())
        f1.append(2 * hit / (int((predicted == k).sum()) + int((labels == k).sum())))
    assert metrics["val/f1"] == pytest.approx(sum(f1) / len(f1))


def test_half_precision_weights_give_full_precision_losses(batch, tiny_opt, tmp_path):
    module = CausalLMClassificationModule(str(tiny_opt), num_classes=2)
    metrics = trainer(tmp_path, precision="bf16-true").validate(module, loader(batch), verbose=False)[0]
    with torch.no_grad():
        losses = module.loss(batch)  # the module is in bfloat16 now
    assert losses.dtype == torch.float32
    exact = float(losses.mean())
    assert metrics["val/loss"] == pytest.approx(exact, abs=1e-6)


def test_predictions(batch, tiny_opt, tmp_path):
    module = CausalLMClassificationModule(str(tiny_opt))
    rows = trainer(tmp_path).predict(module, loader(batch, 1))[0]
    scores = module(batch)
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert [row["prediction"] for row in rows] == scores.argmax(1).tolist()
    torch.testing.assert_close(torch.tensor([row["scores"] for row in rows]), scores)


def test_dropout_is_off_in_training_unless_asked_for(batch, tmp_path):
    folder = save_tiny_model(tmp_path / "model", tiny_config("opt", dropout=0.5))
    modes = {}

    class Spy(CausalLMClassificationModule):
        def loss(self, batch):
            modes.setdefault(self.dropout, set()).add(self.model.training)
            return super().loss(batch)

    losses = {}
    for dropout in (False, True):
        module = Spy(str(folder), dropout=dropout, num_classes=2)
        fit = trainer(tmp_path, max_steps=3, callbacks=[AdaNAGED()])
        fit.fit(module, loader(batch), loader(batch, 1))
        losses[dropout] = float(fit.callback_metrics["train/loss"])
    assert modes == {False: {False}, True: {True}}
    assert losses[False] != losses[True]


def test_checkpoint_holds_all_weights(batch, tiny_opt, tmp_path):
    module = CausalLMClassificationModule(str(tiny_opt), num_classes=2, length_normalised=False)
    fit = trainer(tmp_path, max_steps=2, callbacks=[AdaNAGED()], limit_val_batches=0)
    fit.fit(module, loader(batch), loader(batch))
    fit.save_checkpoint(tmp_path / "x.ckpt")
    again = CausalLMClassificationModule.load_from_checkpoint(tmp_path / "x.ckpt")
    assert again.length_normalised is False
    trained, loaded = module.state_dict(), again.state_dict()
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(trained[name], loaded[name]) for name in trained)
    weights = dict(again.named_parameters())
    assert "model.lm_head.weight" not in weights  # still tied
    start = make(tiny_opt).state_dict()
    assert any(not torch.equal(start[name], trained[name]) for name in trained)


def test_unknown_number_of_classes(batch, tiny_opt, tmp_path):
    with pytest.raises(Exception, match="the number of classes is unknown"):
        trainer(tmp_path).validate(CausalLMClassificationModule(str(tiny_opt)), loader(batch))


def test_nan_weights_are_named(batch, tiny_opt, tmp_path):
    module = CausalLMClassificationModule(str(tiny_opt), num_classes=2)
    module.configure_model()
    with torch.no_grad():
        module.model.model.decoder.layers[1].fc1.bias[3] = torch.nan
    with pytest.raises(ModelError, match=r"'model\.model\.decoder\.layers\.1\.fc1\.bias'"):
        trainer(tmp_path, max_steps=2, callbacks=[AdaNAGED()]).fit(module, loader(batch), loader(batch))
