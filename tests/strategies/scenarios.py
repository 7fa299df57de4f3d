"""What both of two processes run; each function gets the process's rank and a folder, and returns what it saw."""

import gc
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.strategies.problems import (
    Normed,
    Odd,
    Plain,
    Regression,
    Shards,
    Unused,
    fit,
    optimizer_of,
    seeded,
    weights,
    whole_loss,
)
from zo_lightning.callbacks import AdaNAGED
from zo_lightning.optim import ZerothOrder
from zo_lightning.strategies import ZODDPStrategy

TWO = {"devices": 2, "strategy": "zo_ddp"}


def seen(record, trainer) -> dict:
    """What a run amounts to."""
    optimizer = optimizer_of(trainer)
    return {
        "losses": record.losses,
        "slopes": record.slopes,
        "finite": record.finite,
        "stacking": record.stacking,
        "weights": weights(trainer.lightning_module),
        "steps": trainer.global_step,
        "bytes": getattr(optimizer.ranks, "bytes_sent", 0),
        "seed": optimizer.param_groups[0]["seed"],
        "callbacks": {k: v for k, v in trainer.callback_metrics.items() if k.startswith("zo/")},
    }


class Counter(TorchDispatchMode):
    """Counts every collective that goes through torch's dispatcher, and the bytes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.calls[func.name()] = self.calls.get(func.name(), 0) + 1
            # the first argument of those that send is what is sent or written, the second of a gathering what is sent
            sent = args[1] if "gather" in func.name() else args[0]
            for tensor in torch.utils._pytree.tree_leaves(sent):
                if isinstance(tensor, torch.Tensor):
                    self.bytes += tensor.numel() * tensor.element_size()
        return func(*args, **(kwargs or {}))


class CountSteps(Callback):
    """Counts what is sent from the first batch's start to the last one's end, step by step."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, int], int]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.counter = Counter()
        self.counter.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.counter.__exit__(None, None, None)
        self.steps.append((self.counter.calls, self.counter.bytes))


# ---- the joint batch ----------------------------------------------------------------------------------------------------
def _long(rank: int, folder: Path, steps: int = 1000, module=None, sizes=(4, 4), **arguments) -> dict:
    module = Regression(seed=1 + rank) if module is None else module
    record, trainer = fit(folder, module, Shards(steps, rank, sizes), steps, **{**TWO, **arguments})
    return {**seen(record, trainer), "whole": whole_loss(module)}


def per_example(rank: int, folder: Path) -> dict:
    return _long(rank, folder)


def scalar(rank: int, folder: Path) -> dict:
    return _long(rank, folder, module=Regression(scalar=True, seed=1 + rank))


def taken_over(rank: int, folder: Path) -> dict:
    return _long(rank, folder, steps=100, module=Plain(seed=1 + rank))


def uneven(rank: int, folder: Path) -> dict:
    return _long(rank, folder, steps=50, sizes=(5, 3))


def counted(rank: int, folder: Path) -> dict:
    """What StrategyRanks says is what goes through torch."""
    result = {}
    for name, module in (("module", Regression()), ("plain", Plain())):
        count = CountSteps()
        callbacks = [AdaNAGED(**({} if name == "module" else {"optimizer": seeded})), count]
        record, trainer = fit(folder, module, Shards(30, rank), 30, callbacks=callbacks, **TWO)
        result[name] = {"sent": count.steps, **seen(record, trainer)}
    return result


def half(rank: int, folder: Path) -> dict:
    module = Regression(seed=1 + rank)
    record, trainer = fit(folder, module, Shards(120, rank, dtype=torch.bfloat16), 120, precision="bf16-true", **TWO)
    return seen(record, trainer)


# ---- the weights at the beginning ---------------------------------------------------------------------------------------
class Beginning(Callback):
    def on_train_start(self, trainer, pl_module):
        self.everything = pl_module.everything()


def odd_weights(rank: int, folder: Path) -> dict:
    """Nothing is seeded alike, directions neither."""
    module, beginning = Odd(seed=1 + rank), Beginning()
    module._make_optimizer = ZerothOrder
    mine = module.everything()
    record, trainer = fit(folder, module, Shards(5, rank), 5, callbacks=[AdaNAGED(), beginning], **TWO)
    with torch.no_grad():
        module.of_bool.fill_(rank)
    end, val = module.everything(), 0.0
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7):  # before, gloo did not know all dtypes that Lightning sends
        del module._buffers["expanded"]  # which Lightning cannot send either
        trainer.validate(module, torch.utils.data.DataLoader(Shards(2, rank), batch_size=None), verbose=False)
        end, val = module.everything(), float(trainer.callback_metrics["val/loss"])
    return {
        **seen(record, trainer),
        "mine": mine,
        "begin": beginning.everything,
        "end": end,
        "initial_seed": torch.initial_seed(),
        "val": val,
    }


def running_statistics(rank: int, folder: Path) -> dict:
    module = Normed(seed=1 + rank)
    validations = []

    class Look(Callback):
        def on_validation_end(self, trainer, pl_module):
            validations.append((module.net[1].running_mean.clone(), float(trainer.callback_metrics["val/loss"])))

    callbacks = [AdaNAGED(optimizer=seeded), Look()]
    record, trainer = fit(
        folder, module, Shards(20, rank), 20, callbacks=callbacks, val=Shards(4, rank), val_check_interval=10, **TWO
    )
    return {**seen(record, trainer), "validations": validations, "buffers": [b.clone() for b in module.buffers()]}


def added_group(rank: int, folder: Path) -> dict:
    """Parameters that are thawed later get the seed of the others."""
    module = Regression(seed=1 + rank, optimizer=ZerothOrder)
    module.net[2].requires_grad_(False)

    class Thaw(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 5:
                optimizer = optimizer_of(trainer)
                optimizer.add_param_group({"params": [("net.2.bias", pl_module.net[2].bias)], "geometry": "sign"})

    record, trainer = fit(folder, module, Shards(10, rank), 10, callbacks=[AdaNAGED(), Thaw()], **TWO)
    return {**seen(record, trainer), "seeds": [group["seed"] for group in optimizer_of(trainer).param_groups]}


# ---- directions of each one's own ---------------------------------------------------------------------------------------
def split_low_rank(rank: int, folder: Path) -> dict:
    strategy = ZODDPStrategy(split_directions=True)
    module = Regression(optimizer=lambda params: seeded(params, lr=0.05, smoothing=0.01, probes="sequential"))
    record, trainer = fit(folder, module, Shards(5, rank), 5, callbacks=[], devices=2, strategy=strategy)
    return seen(record, trainer)


def split_gaussian(rank: int, folder: Path) -> dict:
    """In double precision, so that it can be computed by hand."""
    strategy = ZODDPStrategy(split_directions=True)
    settings = {"lr": 0.05, "smoothing": 0.01, "directions": "gaussian", "update": "sgd", "num_directions": 2}
    module = Regression(optimizer=lambda params: seeded(params, **settings))
    data = Shards(1, rank, dtype=torch.float64)
    record, trainer = fit(folder, module, data, 1, callbacks=[], devices=2, strategy=strategy, precision="64-true")
    return seen(record, trainer)


def split_with_the_rule(rank: int, folder: Path) -> dict:
    return _long(rank, folder, steps=300, strategy=ZODDPStrategy(split_directions=True))


def split_one_sided(rank: int, folder: Path) -> dict:
    module = Regression(optimizer=lambda params: seeded(params, sides=1, momentum=0.9))
    return _long(rank, folder, steps=50, module=module, strategy=ZODDPStrategy(split_directions=True))


# ---- where the processes differ -----------------------------------------------------------------------------------------
class Poisoned(Regression):
    """One process's loss is not finite in two steps."""

    def loss(self, batch):
        bad = {3: torch.nan, 6: torch.inf}.get(self.trainer.global_step, 0.0)
        return super().loss(batch) + (bad if self.trainer.global_rank == 1 else 0.0)


def not_finite(rank: int, folder: Path) -> dict:
    return _long(rank, folder, steps=10, module=Poisoned(seed=1 + rank))


def not_finite_split(rank: int, folder: Path) -> dict:
    return _long(rank, folder, steps=10, module=Poisoned(), strategy=ZODDPStrategy(split_directions=True))


class Unrepeatable(Regression):
    """One process cannot stack its batch."""

    def repeat_batch(self, batch, copies):
        return None if self.trainer.global_rank == 1 else super().repeat_batch(batch, copies)


def stacked_on_one(rank: int, folder: Path) -> dict:
    return _long(rank, folder, steps=50, module=Unrepeatable(seed=1 + rank))


class Breaks(Regression):
    """One process raises in the middle of a step."""

    def __init__(self, culprit: int) -> None:
        super().__init__()
        self.culprit = culprit

    def loss(self, batch):
        if self.trainer.global_step == 3 and self.trainer.global_rank == self.culprit:
            raise ArithmeticError("this process breaks")
        return super().loss(batch)


def dies_first(rank: int, folder: Path) -> dict:
    return _long(rank, folder, steps=10, module=Breaks(0))


def dies_second(rank: int, folder: Path) -> dict:
    return _long(rank, folder, steps=10, module=Breaks(1))


# ---- stock DDP, accumulation --------------------------------------------------------------------------------------------
STRATEGIES = {
    "zo_ddp": lambda: "zo_ddp",
    "ddp": lambda: "ddp",
    "ddp_unused": lambda: DDPStrategy(find_unused_parameters=True),
}


def strategies(rank: int, folder: Path) -> dict:
    """Every kind of module with every strategy."""
    result = {}
    for module in (Regression, Plain, Unused):
        for name, make in STRATEGIES.items():
            record, trainer = fit(folder, module(seed=1 + rank), Shards(20, rank), 20, devices=2, strategy=make())
            result[module.__name__, name] = seen(record, trainer)
    return result


def accumulated(rank: int, folder: Path) -> dict:
    result = {}
    for name in ("zo_ddp", "ddp"):
        for module, arguments in (
            (Regression(seed=1 + rank, accumulate_grad_batches=2), {}),
            (Plain(seed=1 + rank), {"accumulate_grad_batches": 2}),
        ):
            arguments = {"devices": 2, "strategy": name, **arguments}
            record, trainer = fit(folder, module, Shards(40, rank), 20, **arguments)
            result[type(module).__name__, name] = seen(record, trainer)
    return result


# ---- checkpoints --------------------------------------------------------------------------------------------------------
def checkpoints(rank: int, folder: Path) -> dict:
    result = {}
    for kind in (Regression, Plain):
        name = kind.__name__
        optimizer = {} if kind is Regression else {"optimizer": seeded}

        def run(steps: int, ckpt_path=None, keep=(), kind=kind, optimizer=optimizer):
            callbacks = [AdaNAGED(total_steps=60, **optimizer), *keep]
            arguments = {"callbacks": callbacks, "ckpt_path": ckpt_path, "enable_checkpointing": bool(keep), **TWO}
            return seen(*fit(folder, kind(seed=1 + rank), Shards(30, rank), steps, **arguments))

        half = ModelCheckpoint(folder, f"{name}-half", every_n_train_steps=30, save_top_k=-1)
        result[name] = {"whole": run(60), "first": run(30, keep=[half])}
        result[name]["second"] = run(60, ckpt_path=folder / f"{name}-half.ckpt")
    return result


# ---- memory -------------------------------------------------------------------------------------------------------------
class Wide(Regression):
    """Four megabytes of weights to train, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(1024, 1024, bias=False)
        self.frozen = nn.Linear(512, 512, bias=False).requires_grad_(False)

    def loss(self, batch):
        return super().loss(batch) + self.wide(batch[0].new_ones(len(batch[0]), 1024)).square().mean(dim=1)


def buckets(rank: int, folder: Path) -> dict:
    result = {}
    for name in ("zo_ddp", "ddp"):

        class Look(Callback):
            wrappers: list

            def on_train_end(self, trainer, pl_module):
                gc.collect()
                self.wrappers = [
                    x._get_ddp_logging_data()["bucket_sizes"]
                    for x in gc.get_objects()
                    if isinstance(x, DistributedDataParallel)
                ]
                self.gradients = sum(p.grad is not None for p in pl_module.parameters())
                self.wrapped = trainer.strategy.model is not pl_module

        look = Look()
        module = Wide()
        fit(folder, module, Shards(3, rank), 3, callbacks=[AdaNAGED(), look], devices=2, strategy=name)
        sizes = [int(size) for text in look.wrappers for size in text.split(",")]
        trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
        result[name] = {
            "bucket_bytes": sum(sizes),
            "trained_bytes": trained,
            "gradients": look.gradients,
            "wrapped": look.wrapped,
            "wrappers": len(look.wrappers),
        }
    return result
