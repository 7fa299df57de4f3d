"""Fine-tune a local model on SST-2 in several variants and seeds, with the controls, and print one JSON line for each.

The figures of docs/measurements.md come from::

    python scripts/measure_sst2.py --model MODEL_FOLDER --data SST2_FOLDER --seeds 0 1 2 --json results.jsonl

Each variant is the run of ``zo-lightning fit --config configs/opt-125m/sst2.yaml`` and ``test --ckpt_path best``, but
for what its name says. Runs whose line is in the file already are not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from zo_lightning.callbacks import AdaNAGED, SpacedValidation
from zo_lightning.data import PromptClassificationDataModule
from zo_lightning.modules import CausalLMClassificationModule
from zo_lightning.optim import LMO, ZerothOrder


class RandomSigns(LMO):
    """A control: the sign of a coin in place of that of the slope."""

    def __init__(self, seed: int) -> None:
        self._coins = torch.Generator().manual_seed(seed)

    def coefficient(self, slope: float) -> float:
        """Plus or minus one."""
        return 2.0 * torch.randint(0, 2, (), generator=self._coins).item() - 1.0


class Still(LMO):
    """A control: γ = 0."""

    def coefficient(self, slope: float) -> float:
        """No step."""
        return 0.0


# what each variant changes: of the optimizer, and of AdaNAGED
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "low_rank": ({}, {}),
    "dense": ({"directions": "gaussian"}, {}),
    "vectors_only": ({}, {"geometry": {"matrix": None, "embedding": None}}),
    "matrices_only": ({}, {"geometry": {"vector": None}}),
    "random_signs": ({"update": RandomSigns}, {}),
    "no_step": ({"update": Still}, {}),
    "loss_gap": ({}, {"attainable": 1.0}),
    "low_rank_scaled": ({"scaling": "output"}, {}),
    "dense_scaled": ({"directions": "gaussian", "scaling": "output"}, {}),
    "dense_loss_gap": ({"directions": "gaussian"}, {"attainable": 1.0}),
}


def measure(variant: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run one variant with one seed: the losses and accuracies of the best checkpoint and of the last weights."""
    changes, adanaged = VARIANTS[variant]
    options = dict(changes)
    if options.get("update") is RandomSigns:
        options["update"] = RandomSigns(seed)
    elif options.get("update") is Still:
        options["update"] = Still()
    seed_everything(seed, verbose=False)
    module = CausalLMClassificationModule(args.model, optimizer=partial(ZerothOrder, **options))
    data = PromptClassificationDataModule("sst2", data_dir=args.data)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="val/loss", mode="min", save_weights_only=True)
        trainer = Trainer(
            accelerator="cpu",
            max_steps=args.steps,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=folder,
            callbacks=[AdaNAGED(**adanaged), SpacedValidation(), best],
        )
        trainer.fit(module, data)
        seconds = time.perf_counter() - start
        dev = {key.removeprefix("val/"): float(value) for key, value in trainer.callback_metrics.items() if "val/" in key}
        forwards = trainer.optimizers[0].forwards  # type: ignore[attr-defined]
        last = trainer.test(module, data, verbose=False)[0]
        kept = trainer.test(module, data, ckpt_path=best.best_model_path, verbose=False)[0]
    return {
        "variant": variant,
        "seed": seed,
        "steps": args.steps,
        "forwards": forwards,
        "test_loss": round(kept["test/loss"], 4),
        "test_acc": round(kept["test/acc"], 4),
        "last_test_loss": round(last["test/loss"], 4),
        "last_test_acc": round(last["test/acc"], 4),
        "last_dev_loss": round(dev["loss"], 4),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Run what is asked for and not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--data", required=True, help="folder with SST-2's train and validation files")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="which variants")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of directions and data order")
    parser.add_argument("--steps", type=int, default=1900, help="optimizer steps of each run")
    parser.add_argument("--json", type=Path, help="append the lines to this file, and skip those that it has")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    done: set[tuple[str, int, int]] = set()
    if args.json is not None and args.json.exists():
        rows = [json.loads(line) for line in args.json.read_text().splitlines()]
        done = {(row["variant"], row["seed"], row["steps"]) for row in rows}
    for variant in args.variants:
        for seed in args.seeds:
            if (variant, seed, args.steps) in done:
                continue
            line = json.dumps(measure(variant, seed, args))
            print(line, flush=True)
            if args.json is not None:
                with args.json.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
