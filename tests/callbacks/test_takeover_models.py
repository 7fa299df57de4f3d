"""Kinds of modules and models that a take-over meets."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.callbacks.foreign import BATCHES, Classifier, batches, loader, make_trainer, mean_loss, seeded, weights
from zo_lightning.callbacks import AdaNAGED


def fit(folder, module, steps, zo=None, data=None, callbacks=(), **arguments):
    zo = zo or AdaNAGED()
    torch.manual_seed(7)
    trainer = make_trainer(folder, max_steps=steps, callbacks=[zo, *callbacks], limit_val_batches=0, **arguments)
    trainer.fit(module, data or loader(), *([loader()] if isinstance(module, Classifier) else []))
    return zo


def changed(module, before) -> set[str]:
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


def values(module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


# ---- which parameters --------------------------------------------------------------------------------------------------
def test_frozen_parameters_stay(tmp_path):
    module = seeded(Classifier)
    module.body[0].requires_grad_(False)
    before = values(module)
    fit(tmp_path, module, 3)
    assert changed(module, before) == {"body.1.weight", "body.1.bias", "body.4.weight", "body.4.bias"}


def test_what_the_modules_optimizer_does_not_hold_stays(tmp_path):
    class Head(Classifier):
        def configure_optimizers(self):
            return torch.optim.Adam(self.body[4].parameters())

    module = seeded(Head)
    before = values(module)
    zo = fit(tmp_path, module, 3)
    assert changed(module, before) == {"body.4.weight", "body.4.bias"} == set(zo.optimizer.named_parameters())
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_no_optimizer_means_all_parameters(tmp_path):
    class Without(Classifier):
        def configure_optimizers(self):
            return None

    module = seeded(Without)
    before = values(module)
    fit(tmp_path, module, 3)
    assert changed(module, before) == set(before)


def test_tied_weights_stay_tied(tmp_path):
    class Tied(Classifier):
        def __init__(self):
            super().__init__(dropout=0.0, norm=False)
            self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))
            self.body[2].weight = self.body[0].weight

    module = seeded(Tied)
    zo = fit(tmp_path, module, 3)
    assert module.body[2].weight is module.body[0].weight
    assert "body.2.weight" not in zo.optimizer.named_parameters()


# ---- what training_step takes and returns ------------------------------------------------------------------------------
class WithoutIndex(Classifier):
    def training_step(self, batch):
        return super().training_step(batch, 0)


class Dictionary(Classifier):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "index": batch_idx}


class Keyworded(Classifier):
    def training_step(self, batch, batch_idx, dataloader_idx=0):
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [WithoutIndex, Dictionary, Keyworded])
def test_every_signature_gives_the_same_run(kind, tmp_path):
    outputs = []

    class Seen(Callback):
        def on_train_batch_end(self, trainer, pl_module, output, batch, batch_idx):
            outputs.append(output)

    plain, module = seeded(Classifier), seeded(kind)
    fit(tmp_path, plain, 3)
    fit(tmp_path, module, 3, callbacks=[Seen()])
    # a callback looks on: the update is written at each step rather than once, which rounds differently
    torch.testing.assert_close(weights(module), weights(plain), rtol=1e-6, atol=1e-6)
    if kind is Dictionary:
        assert [output["index"] for output in outputs] == [0, 1, 2]


class Skipping(Classifier):
    """Gives no loss for some batches."""

    skipped = (1, 4)

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.passed = []

    def training_step(self, batch, batch_idx):
        if batch_idx in self.skipped:
            self.passed.append(batch_idx)
            return None
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize("skipped", [(1, 4), (0, 1)], ids=["later", "the first ones"])
def test_batches_without_a_loss_take_no_step(skipped, tmp_path):
    module = seeded(Skipping, dropout=0.0)
    module.skipped = skipped
    zo, ordinary = AdaNAGED(total_steps=9), seeded(Skipping)
    fit(tmp_path, module, BATCHES, zo)
    assert zo.optimizer.step_index == BATCHES - 2
    assert module.passed == list(skipped), "what the user's own code did there stays"
    # the same as a run on the other batches
    rest = seeded(Classifier, dropout=0.0)
    kept = DataLoader([b for k, b in enumerate(batches()) if k not in skipped], batch_size=None)
    fit(tmp_path, rest, BATCHES - 2, AdaNAGED(total_steps=9), data=kept)
    torch.testing.assert_close(weights(module), weights(rest), rtol=1e-6, atol=1e-7)
    assert ordinary.passed == []


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize("every", [2, 3])
def test_a_batch_without_a_loss_leaves_the_rest_of_its_window(every, tmp_path):
    module, zo = seeded(Skipping, dropout=0.0), AdaNAGED()
    fit(tmp_path, module, BATCHES // every, zo, accumulate_grad_batches=every)
    assert zo.optimizer.step_index == BATCHES // every
    assert module.passed == [1, 4]


# ---- models ------------------------------------------------------------------------------------------------------------
def test_the_boring_model(tmp_path):
    """Its loss is the distance of the outputs from one, and its learning rate a tenth after each epoch."""
    module = seeded(BoringModel)
    x = list(torch.randn(64, 32).split(16))
    data = DataLoader(x * 30, batch_size=None)

    def loss() -> float:
        with torch.no_grad():
            return float(F.mse_loss(module(torch.cat(x)), torch.ones(64, 2)))

    before, zo = loss(), AdaNAGED()
    trainer = make_trainer(tmp_path, max_epochs=1, callbacks=[zo], num_sanity_val_steps=0, limit_val_batches=1)
    trainer.fit(module, data, data)
    assert loss() < 0.9 * before
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


class Convolutional(LightningModule):
    """In the style of torchvision: convolutions, batch normalisation, pooling, a fully connected head."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1, groups=2),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
        )
        self.fc = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.fc(torch.flatten(self.features(x), 1)), y, label_smoothing=0.1)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 30)}


def test_a_convolutional_network(tmp_path):
    source = torch.Generator().manual_seed(1)
    y = torch.arange(32) % 2
    x = torch.randn(32, 3, 8, 8, generator=source) * 0.5 + y[:, None, None, None] * torch.linspace(-1, 1, 8)
    module = seeded(Convolutional)

    def loss() -> float:
        with torch.no_grad():
            return float(F.cross_entropy(module.fc(torch.flatten(module.features(x), 1)), y, label_smoothing=0.1))

    before = loss()
    fit(tmp_path, module, 60, data=DataLoader(TensorDataset(x, y), batch_size=16))
    assert loss() < 0.95 * before
    assert int(module.features[1].num_batches_tracked) == 60 + 2  # and those of the two losses here


class Encoder(LightningModule):
    """A small BERT as it comes: in training mode, with dropout."""

    def __init__(self):
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=16, num_labels=2, initializer_range=0.2,
        )  # fmt: skip
        self.model = BertForSequenceClassification(config)

    def training_step(self, batch, batch_idx):
        ids, y = batch
        output = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=y)
        self.log("train_loss", output.loss)
        return output.loss

    def configure_optimizers(self):
        decay = [p for p in self.parameters() if p.dim() > 1]
        rest = [p for p in self.parameters() if p.dim() <= 1]
        return torch.optim.AdamW([{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=2e-5)


def sentences() -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 30, (32, 7), generator=source)
    y = torch.arange(32) % 2
    ids[:, 2] = 3 + y
    return ids, y


def encoder_loss(module) -> float:
    ids, y = sentences()
    module.eval()
    with torch.no_grad():
        return float(F.cross_entropy(module.model(input_ids=ids).logits, y))


def test_an_encoder_with_dropout(tmp_path):
    module = seeded(Encoder).train()
    before = encoder_loss(module)
    zo = fit(tmp_path, module.train(), 600, data=DataLoader(TensorDataset(*sentences()), batch_size=32))
    assert encoder_loss(module) < 0.9 * before
    geometries = {group["geometry"] for group in zo.optimizer.param_groups}
    assert geometries == {"spectral", "sign"}
    assert {group["follows"] for group in zo.optimizer.param_groups} == {0, 1}
    assert len(zo.optimizer.named_parameters()) == len(list(module.parameters()))


def test_adapters_of_peft(tmp_path):
    from peft import LoraConfig, get_peft_model

    class Adapted(Encoder):
        def __init__(self):
            super().__init__()
            config = LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"], modules_to_save=["classifier"])
            self.model = get_peft_model(self.model, config)

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    module = seeded(Adapted)
    before = values(module)
    fit(tmp_path, module.train(), 3, data=DataLoader(TensorDataset(*sentences()), batch_size=32))
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    assert changed(module, before) == trainable
    assert len(trainable) == 2 * 2 * 2 + 2
    assert all("lora" in name or "modules_to_save" in name for name in trainable)


def test_ordinary_modules_still_learn_here():
    """The threshold above is no accident: at chance the loss is that of two classes."""
    assert mean_loss(seeded(Classifier).eval()) == pytest.approx(1.1, abs=0.15)
