"""Modules and joint batches that one process and two of them can train on alike."""

import json
from collections import defaultdict
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from zo_lightning.callbacks import AdaNAGED
from zo_lightning.modules import ZOModule
from zo_lightning.optim import ZerothOrder

JOINT = 8  # examples of a joint batch


def joint_batches(count: int = 16, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    source = torch.Generator().manual_seed(0)
    target = torch.randn(5, 3, generator=source)
    inputs = [torch.randn(JOINT, 5, generator=source) for _ in range(count)]
    return [(x.to(dtype), (x @ target).tanh().to(dtype)) for x in inputs]


class Shards(Dataset):
    """Each joint batch, cut by ``sizes``; the ``rank``-th piece of it, or all of it."""

    def __init__(self, steps: int, rank: int | None = None, sizes: tuple[int, ...] = (4, 4), dtype=torch.float32) -> None:
        self.joint, self.steps = joint_batches(dtype=dtype), steps
        self.rows = slice(0, JOINT) if rank is None else slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int):
        x, y = self.joint[step % len(self.joint)]
        return x[self.rows], y[self.rows]


def net(seed: int = 1) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


class Regression(ZOModule):
    """Losses per example, or their mean."""

    def __init__(self, scalar: bool = False, seed: int = 1, **arguments) -> None:
        super().__init__(**{"optimizer": seeded, **arguments})
        self.net, self.scalar = net(seed), scalar

    def loss(self, batch):
        x, y = batch
        losses = (self.net(x) - y).square().mean(dim=1)
        return losses.mean() if self.scalar else losses


class Plain(LightningModule):
    """A module that knows nothing of this package."""

    def __init__(self, seed: int = 1, **unused) -> None:
        super().__init__()
        self.net = net(seed)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)]


class Unused(Plain):
    """With a layer that no loss depends on."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__(seed)
        self.unused = nn.Linear(2, 2)
        with torch.no_grad():
            for parameter in self.unused.parameters():
                parameter.fill_(0.3)


class Normed(Plain):
    """With running statistics, which each process takes of its own data."""

    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        self.net.insert(1, nn.BatchNorm1d(8))

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", (self.net(x) - y).square().mean(), batch_size=len(x), sync_dist=True)


class Odd(Regression):
    """With parameters and buffers of all kinds; those that the loss does not read are frozen."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__(seed=seed)
        source = torch.Generator().manual_seed(seed)
        draw = torch.randn(4, 3, generator=source)
        self.scale = nn.Parameter(torch.tensor(1.0 + 0.1 * seed))  # without dimensions
        self.turned = nn.Parameter(draw.t().contiguous().t())  # not contiguous
        self.still = nn.Parameter(draw.clone().to(torch.bfloat16), requires_grad=False)
        self.whole = nn.Parameter((10 * draw).to(torch.int32), requires_grad=False)
        self.empty = nn.Parameter(torch.zeros(0, 3), requires_grad=False)
        for name, dtype in (("bool", torch.bool), ("half", torch.half), ("brain", torch.bfloat16), ("int8", torch.int8)):
            self.register_buffer(f"of_{name}", (10 * draw).to(dtype))
        self.register_buffer("of_bool_random", draw > 0)
        self.register_buffer("complex", torch.complex(draw, -draw))
        self.register_buffer("single", torch.tensor(seed, dtype=torch.int64))
        self.register_buffer("turned_buffer", draw.clone().t())
        self.register_buffer("expanded", draw[:1].clone().expand(6, 3), persistent=False)

    def loss(self, batch):
        x, y = batch
        return (self.scale * self.net(x) + self.turned.sum(0) - y).square().mean(dim=1)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch).mean(), batch_size=len(batch[0]), sync_dist=True)

    def everything(self) -> dict[str, torch.Tensor]:
        named = dict(self.named_parameters()) | dict(self.named_buffers())
        return {name: tensor.detach().clone() for name, tensor in named.items()}


class Record(Callback):
    """What each step was."""

    def __init__(self) -> None:
        self.losses, self.slopes, self.finite, self.stacking = [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        optimizer = optimizer_of(trainer)
        if optimizer.last is not None and optimizer.step_index > len(self.losses):
            self.losses.append(optimizer.last.loss)
            self.slopes.append(optimizer.last.slopes)
            self.finite.append(optimizer.last.finite)
            self.stacking.append(optimizer.param_groups[0]["stacking"])


def optimizer_of(trainer: Trainer) -> ZerothOrder:
    for callback in trainer.callbacks:
        if isinstance(callback, AdaNAGED):
            return callback.optimizer
    return trainer.optimizers[0]


def seeded(params, **arguments) -> ZerothOrder:
    return ZerothOrder(params, **{"seed": 7, **arguments})


def fit(folder, module, data: Dataset, steps: int, *, callbacks=None, ckpt_path=None, val=None, **arguments):
    """A quiet run; a recorder and the trainer come back."""
    record = Record()
    callbacks = (
        [AdaNAGED(**({} if isinstance(module, ZOModule) else {"optimizer": seeded}))] if callbacks is None else callbacks
    )
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_steps=steps,
        use_distributed_sampler=False,
        callbacks=[*callbacks, record],
        **{
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            **arguments,
        },
    )
    loader = DataLoader(data, batch_size=None)
    trainer.fit(module, loader, None if val is None else DataLoader(val, batch_size=None), ckpt_path=ckpt_path)
    return record, trainer


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in module.parameters()])


def whole_loss(module: nn.Module) -> float:
    with torch.no_grad():
        return sum(float((module.net(x) - y).square().mean()) for x, y in joint_batches()) / 16


class Rows(Callback):
    """For runs of the command line: the training rows that each process saw, and the metrics of each validation."""

    def __init__(self, folder: str) -> None:
        self.folder, self.rows, self.metrics = Path(folder), defaultdict(list), []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows[trainer.current_epoch] += batch["index"].tolist()

    def on_validation_end(self, trainer, pl_module):
        self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})

    def on_train_end(self, trainer, pl_module):
        optimizer = optimizer_of(trainer)
        result = {
            "rows": list(self.rows.values()),
            "metrics": self.metrics,
            "directions": len(optimizer.last.slopes),
            "weights": weights(pl_module).sum().item().hex(),
        }
        self.folder.mkdir(exist_ok=True)
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(result))
