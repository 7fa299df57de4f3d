"""Train a local model on objectives without a gradient, beside random signs, and print one JSON line for each run.

    python scripts/measure_objective.py --model MODEL --data DATA --json docs/results/objectives.jsonl

Trained for are the accuracy on SST-2 and the token F1 of the answers to SQuAD, of a few training rows, all of them in every
batch; given is the mean score of these rows before and after. The control takes the steps of the same sizes from as many
forwards, each to the side that a coin says. A model that never answers has an F1 of zero all around it: for SQuAD it is first
tuned on the answers of other rows, by backpropagation. Runs whose line is in the file already are not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything
from measure_task import RandomSigns
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from zo_lightning.callbacks import AdaNAGED
from zo_lightning.data import SST2, PromptDataModule, SQuAD
from zo_lightning.modules import CausalLMClassificationModule, CausalLMGenerationModule
from zo_lightning.optim import ZerothOrder

ARMS = ("objective", "random_signs")


@dataclass(frozen=True)
class Case:
    """What is trained for, on how many rows of how many tokens at most, and the steps by backpropagation that come first."""

    module: type[Any]
    objective: str
    task: Any
    rows: int
    max_length: int = 2048
    warm_up: int = 0


CASES = {
    "sst2": Case(CausalLMClassificationModule, "accuracy", SST2(), rows=32),
    "squad": Case(CausalLMGenerationModule, "f1", SQuAD(max_new_tokens=8), rows=16, max_length=96, warm_up=200),
}


class TrainingRows(PromptDataModule):
    """Validates on the rows that are trained on."""

    def val_dataloader(self) -> DataLoader[Any]:
        """The training batches."""
        return self.train_dataloader()


def measure(name: str, arm: str, seed: int, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one arm with one seed: the score of the training rows before and after."""
    case = CASES[name]
    rows = args.rows or case.rows
    seed_everything(seed, verbose=False)
    update: dict[str, Any] = {"update": RandomSigns(seed)} if arm == "random_signs" else {}
    module = case.module(model, objective=case.objective, optimizer=partial(ZerothOrder, seed=seed, **update))
    # one seed of the split for all: the same rows
    data = TrainingRows(
        case.task, str(args.data / name), batch_size=rows, num_train=rows, num_dev=1, max_length=case.max_length
    )
    trainer = quiet_trainer(args.steps, args, AdaNAGED())
    before = score(trainer, module, data)
    start = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - start
    forwards = trainer.optimizers[0].forwards  # type: ignore[attr-defined]
    return {
        "task": name,
        "objective": case.objective,
        "arm": arm,
        "seed": seed,
        "steps": args.steps,
        "rows": rows,
        "forwards": forwards,
        "before": round(before, 4),
        "after": round(score(trainer, module, data), 4),
        "seconds": round(seconds, 1),
    }


def warmed_up(name: str, args: argparse.Namespace, folder: Path) -> str:
    """The folder of the model that both arms begin with, tuned on other rows where the case says so."""
    case = CASES[name]
    if not case.warm_up:
        return str(args.model)
    seed_everything(0, verbose=False)
    module = case.module(str(args.model), first_order=True, optimizer=partial(AdamW, lr=3e-4))
    # rows of another seed: of two thousand, few are the same
    data = PromptDataModule(case.task, str(args.data / name), num_train=512, num_dev=1, max_length=case.max_length, seed=1)
    trainer = quiet_trainer(case.warm_up, args)
    trainer.fit(module, data)
    module.base.save_pretrained(folder / name)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(folder / name)
    return str(folder / name)


def quiet_trainer(steps: int, args: argparse.Namespace, *callbacks: Callback) -> Trainer:
    """A Trainer that writes nothing and validates nothing by itself."""
    return Trainer(
        accelerator=args.accelerator,
        devices=1,
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


def score(trainer: Trainer, module: Any, data: PromptDataModule) -> float:
    """The mean score of the training rows: the loss is what it lacks to 1."""
    trainer.limit_val_batches = 1.0  # the fit itself validates nothing
    (found,) = trainer.validate(module, data, verbose=False)
    trainer.limit_val_batches = 0
    return 1 - float(found["val/loss"])


def main() -> None:
    """Run what is asked for and not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder for each task")
    parser.add_argument("--tasks", nargs="+", default=list(CASES), choices=list(CASES), help="which tasks")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="the objective and its control")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of directions and coins")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of each run")
    parser.add_argument("--rows", type=int, help="training rows, all in each batch; by default 32 of SST-2, 16 of SQuAD")
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="cpu", help="of the Trainer")
    parser.add_argument("--json", type=Path, help="append the lines to this file, and skip those that it has")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    keys = ("task", "arm", "seed", "steps", "rows")
    done: set[tuple[Any, ...]] = set()
    if args.json is not None and args.json.exists():
        done = {tuple(json.loads(line)[key] for key in keys) for line in args.json.read_text().splitlines()}
    with TemporaryDirectory() as folder:
        for name in args.tasks:
            rows = args.rows or CASES[name].rows
            missing = [
                (seed, arm) for seed in args.seeds for arm in args.arms if (name, arm, seed, args.steps, rows) not in done
            ]
            model = warmed_up(name, args, Path(folder)) if missing else ""
            for seed, arm in missing:
                line = json.dumps(measure(name, arm, seed, model, args))
                print(line, flush=True)
                if args.json is not None:
                    with args.json.open("a") as file:
                        file.write(line + "\n")


if __name__ == "__main__":
    main()
