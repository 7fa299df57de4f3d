"""LightningModules as other people write them: nothing here imports the package under test."""

import csv
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

BATCHES = 6
ROWS = 8  # of a batch

SCHEDULES = {
    "none": lambda optimizer: optimizer,
    "step": lambda optimizer: (
        [optimizer],
        [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "interval": "step"}],
    ),
    "cosine": lambda optimizer: (
        [optimizer],
        [{"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12), "interval": "step", "frequency": 2}],
    ),
    "epoch": lambda optimizer: ([optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]),
    "plateau": lambda optimizer: {
        "optimizer": optimizer,
        "lr_scheduler": {
            # nothing is ever better by more than the threshold
            "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9, threshold_mode="abs"),
            "monitor": "val_loss",
        },
    },
    "one cycle": lambda optimizer: (
        [optimizer],
        [{"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=18), "interval": "step"}],
    ),
}


class Classifier(LightningModule):
    """A perceptron with batch normalisation and dropout, a metric, logs, and a schedule."""

    def __init__(self, schedule: str = "none", dropout: float = 0.1, norm: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(
            nn.Linear(6, 12), nn.BatchNorm1d(12) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(dropout), nn.Linear(12, 3)
        )
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.val_accuracy = MulticlassAccuracy(3, average="micro")
        self.epochs_ended = 0

    def forward(self, x):
        return self.body(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("train_acc", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.val_accuracy(logits, y)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_acc", self.val_accuracy)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))

    def on_train_epoch_end(self):
        self.epochs_ended += 1

    def configure_optimizers(self):
        return SCHEDULES[self.hparams.schedule](torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9))


def tensors(count: int = BATCHES, size: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(count * size, 6, generator=source)
    return x, (x @ torch.randn(6, 3, generator=source)).argmax(1)


def loader(count: int = BATCHES, size: int = ROWS) -> DataLoader:
    return DataLoader(TensorDataset(*tensors(count, size)), batch_size=size)


def batches(count: int = BATCHES, size: int = ROWS) -> list[list[torch.Tensor]]:
    return list(loader(count, size))


def seeded(make, *arguments, **named):
    """What ``make`` makes, with the same first weights each time."""
    torch.manual_seed(1)
    return make(*arguments, **named)


def make_trainer(folder: Path, **arguments) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", default_root_dir=folder, **{"log_every_n_steps": 1, **quiet, **arguments})


def mean_loss(module: nn.Module, data=None) -> float:
    with torch.no_grad():
        return float(torch.stack([F.cross_entropy(module(x), y) for x, y in data or batches()]).mean())


def rows(folder: Path) -> list[dict[str, str]]:
    """Of a CSVLogger's table: what is not empty."""
    (path,) = folder.rglob("metrics.csv")
    with open(path, newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def anatomy(module: nn.Module) -> dict[str, object]:
    """What a module consists of, values aside."""
    parts: dict[str, object] = {"state": list(module.state_dict())}
    for name, part in module.named_modules():
        own = vars(part)
        hooks = {key: len(value) for key, value in own.items() if "hook" in key and isinstance(value, dict)}
        functions = {key: value for key, value in own.items() if callable(value) and not isinstance(value, type)}
        slots = {key: type(value) for key, value in own["_parameters"].items()}
        parts[name] = sorted(own), hooks, sorted(functions), slots, part.training
    parts["requires_grad"] = [p.requires_grad for p in module.parameters()]
    return parts
