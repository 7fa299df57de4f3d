"""A module whose loss is a quadratic of its weights and the batch, for what does not need a language model."""

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader

from zo_lightning.modules import ZOModule

ROWS = 6  # of a batch


class Quadratic(ZOModule):
    """Least squares with 5 inputs and 3 outputs, a matrix and a vector; losses per example."""

    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        self.net = nn.Linear(5, 3)
        self.frozen = nn.Linear(5, 3).requires_grad_(False)
        with torch.no_grad():
            self.net.weight.copy_(torch.linspace(-1, 1, 15).view(3, 5))
            self.net.bias.fill_(0.5)
            self.frozen.weight.fill_(0.1)
            self.frozen.bias.fill_(0.2)
        self.evaluations = 0  # of single batches, of which a stacked one holds several

    def loss(self, batch):
        x, y = batch
        self.evaluations += len(x) // ROWS
        return (self.net(x) - y).square().mean(dim=1)


class Validated(Quadratic):
    """The same with a validation."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch).mean(), batch_size=len(batch[0]))


class StopAt(Callback):
    """Ends a run of unknown length."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= self.step


def batches(count: int = 4, size: int = ROWS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    source = torch.Generator().manual_seed(0)
    target = torch.randn(5, 3, generator=source)
    inputs = [torch.randn(size, 5, generator=source) for _ in range(count)]
    return [(x, x @ target) for x in inputs]


def loader(count: int = 4) -> DataLoader:
    return DataLoader(batches(count), batch_size=None)


def trainer(tmp_path, **arguments) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, **{"log_every_n_steps": 1, **quiet, **arguments})


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])
