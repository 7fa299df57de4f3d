"""Peak memory of an unmodified LightningModule: inference, AdaNAGED as a callback, and its own optimizer, in one run.

    python scripts/measure_takeover.py --preset cpu-125m --json out.json

The module is written for backpropagation and knows nothing of zeroth-order optimization. ``inference`` is
``Trainer.validate`` on the same batches; ``adanaged`` is ``Trainer.fit`` with the callback, for steps that include a
calibration, a curvature and a fold; ``sgd`` and ``adamw`` are ``Trainer.fit`` as the module was written. Bytes are beyond the
weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from benchmark_step import PRESETS, Problem, make_problem, peak_memory
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from zo_lightning.callbacks import AdaNAGED

STEPS = 52  # more than an interval of low-rank directions, so that a fold and a new V are among them


class Written(LightningModule):
    """A classifier as one would write it for backpropagation."""

    def __init__(self, problem: Problem, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.model = problem.model
        self._problem, self._make_optimizer = problem, optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The mean loss."""
        loss = self._problem.losses().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """The same loss."""
        self.log("val_loss", self._problem.losses().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The module's own."""
        return self._make_optimizer(self.parameters())


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu-125m", help="model shape, device, precision and batch")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each run")
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    text = json.dumps(measure(args.preset, args.steps), indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


def measure(preset: str, steps: int) -> dict[str, Any]:
    """All figures of one preset."""
    peaks = {name: peak_of(name, preset, steps) for name in ("inference", "adanaged", "sgd", "adamw")}
    weights = sum(p.numel() * p.element_size() for p in make_problem(preset).model.parameters())
    return {
        "preset": preset,
        "steps": steps,
        "versions": {"torch": torch.__version__, "lightning": lightning.__version__},
        "bytes": {"weights": weights, **peaks},
        "over_inference": {
            name: (weights + peak) / (weights + peaks["inference"]) for name, peak in peaks.items() if name != "inference"
        },
    }


def peak_of(name: str, preset: str, steps: int) -> int:
    """Most bytes beyond the weights of one kind of run."""
    problem = make_problem(preset)
    make = torch.optim.AdamW if name == "adamw" else torch.optim.SGD
    module = Written(problem, lambda parameters: make(parameters, 1e-6))
    # backpropagation needs as much in every step after the first
    count = steps if name in ("inference", "adanaged") else 2
    loader = DataLoader(TensorDataset(torch.zeros(count)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=count,
            accelerator="gpu" if problem.device.type == "cuda" else "cpu",
            devices=1,
            default_root_dir=folder,
            callbacks=[AdaNAGED(total_steps=1000)] if name == "adanaged" else [],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )

        def run() -> None:
            if name == "inference":
                trainer.validate(module, loader, verbose=False)
            else:
                trainer.fit(module, loader)

        return peak_memory(run, problem.device)


if __name__ == "__main__":
    main()
