"""Fine-tune a local model on a task in several variants and seeds, with the controls, and print one JSON line for each.

The figures of docs/measurements.md come from::

    python scripts/measure_task.py --model MODEL_FOLDER --data SST2_FOLDER --seeds 0 1 2 --json results.jsonl

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
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from zo_lightning.callbacks import AdaNAGED, SpacedValidation
from zo_lightning.data import PromptDataModule
from zo_lightning.modules import CausalLMClassificationModule
from zo_lightning.optim import LMO, ZerothOrder
from zo_lightning.optim.groups import parameter_kinds


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


class ReleasedMeZO(ZerothOrder):
    """A comparison: MeZO as released, which moves every weight in place, in its own dtype, and has a rate to tune."""

    epsilon, rate = 1e-3, 3e-5  # the best rate of a grid in float32

    def step(self, closure: Any = None, *, stacked: Any = None) -> Tensor:  # type: ignore[override]
        """θ ± εz and back by adding and subtracting, then the update, each rounded to the weight's dtype."""
        losses = []
        with torch.no_grad():
            for shift in (1, -2):
                self._add(shift * self.epsilon)
                losses.append(closure().detach().float().mean())
            slope = float(losses[0] - losses[1]) / (2 * self.epsilon)
            self._add(self.epsilon)
            self._add(-self.rate * slope)
        for group in self.param_groups:
            group["step"] += 1
            group["forwards"] += 2
        return torch.stack(losses).mean()

    def _add(self, factor: float) -> None:
        head = self.param_groups[0]
        source = torch.Generator().manual_seed(1000 * head["seed"] + head["step"])
        for parameter in self.named_parameters().values():
            z = torch.randn(parameter.shape, generator=source, dtype=parameter.dtype)
            parameter.data = parameter.data + factor * z


class SlowMeZO(ReleasedMeZO):
    """The same with a third of the rate, nearer to those in use for large models."""

    rate = 1e-5


class StillMeZO(ReleasedMeZO):
    """The same with a rate of zero: whatever moves is what adding and subtracting leaves behind."""

    rate = 0.0


def geometry(**radii: float | None) -> dict[str, Any]:
    """AdaNAGED with other radii of kinds; None leaves the kind out."""
    return {"geometry": {kind: None if radius is None else {"radius": radius} for kind, radius in radii.items()}}


# what each variant changes: of the optimizer, and of AdaNAGED
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "low_rank": ({}, {}),
    "dense": ({"directions": "gaussian"}, {}),
    "vectors_only": ({}, geometry(matrix=None, embedding=None)),
    "matrices_only": ({}, geometry(vector=None)),
    "random_signs": ({"update": RandomSigns}, {}),
    "no_step": ({"update": Still}, {}),
    "loss_gap": ({}, {"attainable": 1.0}),
    "low_rank_scaled": ({"scaling": "output"}, {}),
    "dense_scaled": ({"directions": "gaussian", "scaling": "output"}, {}),
    "dense_loss_gap": ({"directions": "gaussian"}, {"attainable": 1.0}),
    # how low-rank directions are made
    "rank_4": ({"rank": 4}, {}),
    "rank_16": ({"rank": 16}, {}),
    "interval_10": ({"interval": 10}, {}),
    "interval_200": ({"interval": 200}, {}),
    "momentum": ({"momentum": 0.9}, {}),
    "matrix_radius_0.5": ({}, geometry(matrix=0.5, embedding=0.5)),
    "matrix_radius_2": ({}, geometry(matrix=2.0, embedding=2.0)),
    "matrix_radius_4": ({}, geometry(matrix=4.0, embedding=4.0)),
    "embedding_radius_0": ({}, geometry(embedding=None)),
    "mezo": ({}, {}),
    "mezo_slow": ({}, {}),
    "mezo_still": ({}, {}),
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
    released = {"mezo": ReleasedMeZO, "mezo_slow": SlowMeZO, "mezo_still": StillMeZO}.get(variant)
    module = CausalLMClassificationModule(args.model, optimizer=partial(released or ZerothOrder, **options))
    rule = [] if released is not None else [AdaNAGED(**adanaged)]
    data = PromptDataModule(args.task, data_dir=args.data)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="val/loss", mode="min", save_weights_only=True)
        trainer = Trainer(
            accelerator="cpu",
            precision=args.precision,
            max_steps=args.steps,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=folder,
            callbacks=[*rule, SpacedValidation(), best, movement := Movement()],
        )
        trainer.fit(module, data)
        seconds = time.perf_counter() - start
        dev = {key.removeprefix("val/"): float(value) for key, value in trainer.callback_metrics.items() if "val/" in key}
        forwards = trainer.optimizers[0].forwards  # type: ignore[attr-defined]
        last = trainer.test(module, data, verbose=False)[0]
        kept = trainer.test(module, data, ckpt_path=best.best_model_path, verbose=False)[0]
    assert best.best_model_score is not None
    return {
        "task": args.task,
        "precision": args.precision,
        "variant": variant,
        "seed": seed,
        "steps": args.steps,
        "forwards": forwards,
        "test_loss": round(kept["test/loss"], 4),
        "test_acc": round(kept["test/acc"], 4),
        "last_test_loss": round(last["test/loss"], 4),
        "last_test_acc": round(last["test/acc"], 4),
        "dev_loss": round(float(best.best_model_score), 4),
        "last_dev_loss": round(dev["loss"], 4),
        "moved": movement.moved,
        "seconds": round(seconds, 1),
    }


class Movement(Callback):
    """How far each kind of parameter has moved at the end, relative to its own size, and the share of entries that did."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights."""
        self.start = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare with the weights that the run ends with."""
        kinds = parameter_kinds(pl_module)
        state = pl_module.state_dict()  # holds what is pending too
        self.moved = {}
        for kind in ("matrix", "embedding", "vector"):
            pairs = [(state[n].double(), s.double()) for n, s in self.start.items() if kinds[n] == kind]
            change = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
            size = sum(float(b.square().sum()) for _, b in pairs) ** 0.5
            entries = sum(int((a != b).sum()) for a, b in pairs) / sum(b.numel() for _, b in pairs)
            self.moved[kind] = {"relative": float(f"{change / size:.3g}"), "entries": round(entries, 4)}


def main() -> None:
    """Run what is asked for and not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--data", required=True, help="folder with the task's train and validation files")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="which variants")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of directions and data order")
    parser.add_argument("--task", default="sst2", help="name of the task, of which --data has the rows")
    parser.add_argument("--precision", default="32-true", help="of the Trainer, for example bf16-true")
    parser.add_argument("--steps", type=int, default=1900, help="optimizer steps of each run")
    parser.add_argument("--json", type=Path, help="append the lines to this file, and skip those that it has")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    done: set[tuple[str, str, str, int, int]] = set()
    if args.json is not None and args.json.exists():
        rows = [json.loads(line) for line in args.json.read_text().splitlines()]
        done = {(row["task"], row["precision"], row["variant"], row["seed"], row["steps"]) for row in rows}
    for variant in args.variants:
        for seed in args.seeds:
            if (args.task, args.precision, variant, seed, args.steps) in done:
                continue
            line = json.dumps(measure(variant, seed, args))
            print(line, flush=True)
            if args.json is not None:
                with args.json.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
