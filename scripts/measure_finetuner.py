"""Learn ZO Fine-tuner's networks on one task of a local model, and use them on others beside their controls.

    python scripts/measure_finetuner.py --model MODEL --data DATA --tasks rte cb --json docs/results/finetuner.jsonl

DATA has a folder for each task. The arms differ in the scales alone: ``learned``; ``random``, the networks as they were before
they learned, of the same seed; ``constant``, one scale for all, which is MeZO. Each has as many forwards, and a grid of rates,
run with the first seed; the one with the lowest dev loss is taken for the others. Every run is a JSON line, and what has its
line is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from zo_lightning.callbacks import SpacedValidation
from zo_lightning.data import PromptDataModule
from zo_lightning.modules import CausalLMClassificationModule, FineTunerTraining
from zo_lightning.optim import NonFiniteLossError, ScaleNetworks
from zo_lightning.optim.methods.zo_finetuner import ZOFineTuner

ARMS = ("constant", "random", "learned")
Row = dict[str, Any]
SETTINGS = ("epochs", "epochs_per_restart", "lr_update", "lr_mlp", "lr_llm", "mlp_optimizer")
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def learn(order: Row) -> Row:
    """Learn on one task, write the networks, and say how far they are from how they began."""
    seed_everything(order["seed"], verbose=False)
    start = time.perf_counter()
    settings = {key: order[key] for key in ("lr_update", "lr_mlp", "lr_llm", "epochs_per_restart", "mlp_optimizer", "seed")}
    module = FineTunerTraining(order["model"], **settings)
    data = PromptDataModule(order["task"], data_dir=order["data"], batch_size=8, num_dev=50)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator=order["accelerator"],
            max_epochs=order["epochs"],
            limit_val_batches=0,
            enable_checkpointing=False,
            default_root_dir=folder,
            **QUIET,
        )
        trainer.fit(module, data)
    assert module.learner is not None
    networks = module.learner.networks
    networks.save(order["networks"])
    begun = ScaleNetworks(networks.names, order["seed"]).double()
    now, then = fixed_point(networks), fixed_point(begun)
    change = (networks.w2 - begun.w2).norm(dim=1) / begun.w2.norm(dim=1)
    return {
        "w2_moved": {"median": float(change.median().detach()), "max": float(change.max().detach())},
        "sigma_moved": {
            "median": float(((now - then).abs() / then).median()),
            "correlation": float(torch.corrcoef(torch.stack([now, then]))[0, 1]),
        },
        "steps": trainer.global_step,
        "seconds": round(time.perf_counter() - start, 1),
    }


@torch.no_grad()
def fixed_point(networks: ScaleNetworks) -> torch.Tensor:
    """σ where it has settled, at mean 0, variance 4e-4 and losses of 0.5."""
    sigma = torch.ones(len(networks.names), dtype=torch.float64)
    for _ in range(100):
        rows = torch.tensor([0.0, 4e-4, 0.5, 0.5], dtype=torch.float64).expand(len(sigma), 4)
        sigma = networks(torch.cat([rows, sigma.unsqueeze(1)], dim=1))
    return sigma


def use(order: Row) -> Row:
    """One run with one arm: the losses of the best checkpoint and of the last weights."""
    seed_everything(order["seed"], verbose=False)
    start = time.perf_counter()
    networks = {"constant": 1.0, "random": None, "learned": order["networks"]}[order["arm"]]
    optimizer = partial(ZOFineTuner, lr=order["rate"], networks=networks, network_seed=order["seed"])
    module = CausalLMClassificationModule(order["model"], optimizer=optimizer)
    data = PromptDataModule(order["task"], data_dir=order["data"])
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="val/loss", save_weights_only=True)
        trainer = Trainer(
            accelerator=order["accelerator"],
            precision=order["precision"],
            max_steps=order["forwards"] // 2,
            default_root_dir=folder,
            callbacks=[SpacedValidation(), best],
            **QUIET,
        )
        try:
            trainer.fit(module, data)
        except NonFiniteLossError as error:
            print(f"{order['task']} {order['arm']} {order['rate']:g}: {error}", file=sys.stderr)
            return {"diverged": True, "seconds": round(time.perf_counter() - start, 1)}
        dev = float(trainer.callback_metrics["val/loss"])
        last = trainer.test(module, data, verbose=False)[0]
        kept = trainer.test(module, data, ckpt_path=best.best_model_path, verbose=False)[0]
    assert best.best_model_score is not None
    found = {
        "test_loss": kept["test/loss"],
        "test_acc": kept["test/acc"],
        "last_test_loss": last["test/loss"],
        "last_test_acc": last["test/acc"],
        "dev_loss": float(best.best_model_score),
        "last_dev_loss": dev,
    }
    diverged = not all(math.isfinite(value) for value in found.values())
    rounded = {} if diverged else {key: round(value, 4) for key, value in found.items()}
    return {**rounded, "diverged": diverged, "seconds": round(time.perf_counter() - start, 1)}


def finished(action: Callable[[Row], Row], order: tuple[Row, Row]) -> Row:
    """The row of a run: what tells it from others, and its results."""
    return {**order[0], **action(order[1])}


class Runs:
    """The rows so far, and a pool for the others."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rows: list[Row] = []
        if args.json.exists():
            self.rows = [json.loads(line) for line in args.json.read_text().splitlines()]
        args.json.parent.mkdir(parents=True, exist_ok=True)

    def of(self, key: Row) -> Row | None:
        """The row of a run."""
        return next((row for row in self.rows if all(row.get(name) == value for name, value in key.items())), None)

    def do(self, action: Callable[[Row], Row], keys: list[Row]) -> None:
        """Run what has no row yet."""
        missing = [key for key in keys if self.of(key) is None]
        context = multiprocessing.get_context("spawn")
        # several runs of one thread each get further than one run of several threads that wait for each other
        jobs = self.args.jobs or (torch.get_num_threads() if self.args.accelerator == "cpu" else 1)
        threads = max(1, torch.get_num_threads() // jobs)
        orders = [(key, {**key, **self.places(key)}) for key in missing]
        with context.Pool(jobs, torch.set_num_threads, (threads,)) as pool:  # whose processes end with this one
            for number, row in enumerate(pool.imap_unordered(partial(finished, action), orders), 1):
                self.rows.append(row)
                with self.args.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{number}/{len(missing)} {json.dumps(row)}", flush=True)

    def places(self, key: Row) -> Row:
        """What is no part of a row: folders and devices."""
        args = self.args
        label = "-".join(str(value) for value in (key["seed"], *training_of(args).values()))
        file = args.json.with_suffix("") / f"{label}.safetensors"
        shared = {"accelerator": args.accelerator, "precision": args.precision, "networks": str(file)}
        return {**shared, "model": args.model, "data": str(Path(args.data) / key["task"])}


def training_of(args: argparse.Namespace) -> Row:
    """How the networks are learned."""
    return {"task": args.train_task, **{name: getattr(args, name) for name in SETTINGS}}


def measure(runs: Runs) -> None:
    """Learn, try the rates with the first seed, and run the others."""
    args = runs.args
    if "learned" in args.arms:
        runs.do(learn, [{"arm": "training", "seed": seed, **training_of(args)} for seed in args.seeds])
    pairs = [(task, arm) for task in args.tasks for arm in args.arms]
    runs.do(use, [key_of(runs, task, arm, args.seeds[0], rate) for task, arm in pairs for rate in args.rates])
    chosen = {(task, arm): best_rate(runs, task, arm) for task, arm in pairs}
    runs.do(use, [key_of(runs, *pair, seed, chosen[pair]) for pair in pairs for seed in args.seeds[1:]])
    print("\n".join(table(runs, chosen)))


def key_of(runs: Runs, task: str, arm: str, seed: int, rate: float) -> Row:
    """What tells a run from others."""
    args = runs.args
    training = training_of(args) if arm == "learned" else None
    return {"task": task, "arm": arm, "seed": seed, "rate": rate, "forwards": args.forwards, "training": training}


def best_rate(runs: Runs, task: str, arm: str) -> float:
    """The rate with the lowest dev loss at the first seed."""
    return min(
        runs.args.rates,
        key=lambda rate: (runs.of(key_of(runs, task, arm, runs.args.seeds[0], rate)) or {}).get("dev_loss", math.inf),
    )


def table(runs: Runs, chosen: dict[tuple[str, str], float]) -> Iterator[str]:
    """A line for each task and arm."""
    yield "| task | arm | rate | test loss, each seed | mean | last weights, mean | accuracy, mean |"
    yield "|---|---|---|---|---|---|---|"
    for (task, arm), rate in chosen.items():
        rows = [runs.of(key_of(runs, task, arm, seed, rate)) or {} for seed in runs.args.seeds]
        losses = [row.get("test_loss", math.inf) for row in rows]
        others = (mean(row.get(name, math.nan) for row in rows) for name in ("last_test_loss", "test_acc"))
        cells = [task, arm, f"{rate:g}", " / ".join(f"{x:.4f}" for x in losses), f"{mean(losses):.4f}"]
        yield "| " + " | ".join([*cells, *(f"{x:.4f}" for x in others)]) + " |"


def main() -> None:
    """Run what is asked for and not in the file yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--data", required=True, help="folder with a folder of rows for each task")
    parser.add_argument("--train-task", default="sst2", help="what the networks are learned on")
    parser.add_argument("--tasks", nargs="+", default=["rte", "cb"], help="what they are used on")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="which arms")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of networks, directions and order of the data")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-5, 3e-5], help="learning rates to choose from")
    parser.add_argument("--forwards", type=int, default=2000, help="batch losses of each run, two for a step")
    parser.add_argument("--epochs", type=int, default=15, help="of learning")
    parser.add_argument("--epochs-per-restart", type=int, default=5, help="see FineTunerTraining, as all that follows")
    parser.add_argument(
        "--lr-update", type=float, default=1e-6, help="as published; 3e-5 is about that of use on a small model"
    )
    parser.add_argument("--lr-mlp", type=float, default=0.1)
    parser.add_argument("--lr-llm", type=float, default=0.01)
    parser.add_argument("--mlp-optimizer", default="sgd", choices=["sgd", "adam"])
    parser.add_argument("--accelerator", default="cpu", help="of the Trainer")
    parser.add_argument("--precision", default="32-true", help="in use; learning is in float32")
    parser.add_argument("--jobs", type=int, help="runs at a time; by default one for each core, or one on a GPU")
    parser.add_argument("--json", type=Path, required=True, help="the file of lines; networks go into a folder beside it")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the pool is closed then too
    measure(Runs(parser.parse_args()))


if __name__ == "__main__":
    main()
