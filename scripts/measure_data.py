"""What batching costs: padding, time of a step and of tokenising, and the wait for data, before and after, in one run.

The figures of docs/data.md come from::

    python scripts/measure_data.py --model MODEL --data DATA --json docs/results/data-opt-mini.json

``--data`` has a folder for each task, of its name. ``before`` is what a loader does by default: random batches, a row for
each candidate, rows padded to a multiple of 8. ``after`` is :class:`~zo_lightning.data.PromptDataModule` as it is: batches of
similar length, one row for all candidates of a token, candidates of several tokens packed behind one prompt; ``unpacked`` is
the same without packing. A step is that of a zeroth-order optimizer with low-rank directions: two forwards, as one of the
doubled batch. Padding is that of an epoch, under ``padding_by_multiple`` that of ``after`` if rows were rounded up to other
multiples. Steps are timed on a sample of the epoch's batches, evenly spaced by size. Of the repeats on a batch, which take
turns with those of the other variants, the least time counts. ``tokens_per_s`` leaves padding out.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

from zo_lightning.data import (
    Example,
    GenerationCollator,
    PromptDataModule,
    ScoringBatch,
    ScoringCollator,
    ShuffleSampler,
    TokenCache,
)
from zo_lightning.data.packing import row_lengths
from zo_lightning.data.padding import padding_share
from zo_lightning.modules import CausalLMClassificationModule, CausalLMGenerationModule, CausalLMMultipleChoiceModule
from zo_lightning.modules.prompted import PromptedModule
from zo_lightning.optim import ZerothOrder

TASKS = ["sst2", "rte", "boolq", "squad", "copa"]


class RowPerCandidate(ScoringCollator):
    """Feeds every candidate in a row of its own, whatever it shares with others."""

    def __call__(self, examples: Sequence[Example]) -> ScoringBatch:
        """Collate each candidate like an example that has no other, then say whose it is."""
        alone: list[Example] = [
            {**example, "candidate_ids": [ids], "label": 0, "gold": [0]}
            for example in examples
            for ids in example["candidate_ids"]
        ]
        owners = [(b, k) for b, example in enumerate(examples) for k in range(len(example["candidate_ids"]))]
        batch = super().__call__(alone)
        batch["candidate_example"] = torch.tensor([b for b, _ in owners])
        batch["candidate_index"] = torch.tensor([k for _, k in owners])
        batch["candidate_gold"] = torch.tensor([int(k in examples[b]["gold"]) for b, k in owners])
        batch["label"] = torch.tensor([example["label"] for example in examples])
        batch["index"] = torch.tensor([example["index"] for example in examples])
        return batch


class Variant:
    """One way to feed a task: its batches of an epoch, and steps on a sample of them."""

    def __init__(self, module: PromptedModule, loader: Iterable[Any], steps: int) -> None:
        self.module = module
        self.optimizer = ZerothOrder(module.named_parameters(), lr=1e-7).attach(module)
        epoch = sorted((scored(batch)["input_ids"].numel(), number, batch) for number, batch in enumerate(loader))
        self.tokens = sum(int(scored(batch)["attention_mask"].sum()) for _, _, batch in epoch)
        self.fed = sum(cells for cells, _, _ in epoch)
        self.sample = [epoch[int((i + 0.5) * len(epoch) / steps)][2] for i in range(steps)]
        self.seconds = [float("inf")] * steps

    def step(self, batch: Any) -> float:
        """The seconds of one step."""
        start = time.perf_counter()
        closure, stacked = self.module.closures(batch)
        self.optimizer.step(closure, stacked=stacked)
        return time.perf_counter() - start

    def figures(self) -> dict[str, float]:
        """What is reported."""
        seconds = sum(self.seconds)
        columns = [scored(batch) for batch in self.sample]
        return {
            "padding": round(1 - self.tokens / self.fed, 4),
            "fed_per_step": round(sum(batch["input_ids"].numel() for batch in columns) / len(columns), 1),
            "ms_per_step": round(1000 * seconds / len(columns), 2),
            "tokens_per_s": round(sum(int(batch["attention_mask"].sum()) for batch in columns) / seconds, 1),
            "examples_per_s": round(sum(len(batch["label"]) for batch in columns) / seconds, 2),
        }


def scored(batch: Any) -> dict[str, Tensor]:
    """The part of a batch that is trained on."""
    return batch.get("scoring", batch)


def make_module(data: PromptDataModule, model: str) -> PromptedModule:
    """The module for a task's kind; one that chooses among candidates is trained on all of them."""
    module: PromptedModule
    if data.task.kind == "generation":
        module = CausalLMGenerationModule(model)
    elif data.task.kind == "multiple_choice":
        module = CausalLMMultipleChoiceModule(model, train_on="classification")
    else:
        module = CausalLMClassificationModule(model, num_classes=data.num_classes)
    module.configure_model()
    module.eval()
    return module


def make_data(task: str, args: argparse.Namespace, cache: str, **options: Any) -> tuple[PromptDataModule, PromptedModule]:
    """A datamodule that is set up, and a module that it can ask."""
    data = PromptDataModule(
        task,
        str(args.data / task),
        args.model,
        batch_size=args.batch_size,
        num_train=args.rows,
        shuffle_seed=args.seed,
        cache_dir=cache,
        **options,
    )
    module = make_module(data, args.model)
    data.trainer = SimpleNamespace(lightning_module=module, overfit_batches=0)  # type: ignore[assignment]
    data.setup("fit")
    return data, module


def measure(task: str, args: argparse.Namespace, cache: str) -> dict[str, Any]:
    """All figures of one task."""
    data, module = make_data(task, args, cache)
    dataset = data.dataset("train")
    after = data.train_dataloader()
    collator: Any = after.collate_fn
    batches: Any = after.batch_sampler
    scoring: ScoringCollator = getattr(collator, "scoring", collator)
    plain: Any = RowPerCandidate(scoring.pad_token_id, multiple=8)
    before = DataLoader(
        dataset,
        batch_size=args.batch_size,
        sampler=ShuffleSampler(dataset, args.seed),
        collate_fn=GenerationCollator(plain) if data.task.kind == "generation" else plain,
    )
    steps = min(args.steps, len(after))
    variants = {"before": Variant(make_module(data, args.model), before, steps)}
    if dataset.packable:
        unpacked, other = make_data(task, args, cache, packing=False)
        variants["unpacked"] = Variant(other, unpacked.train_dataloader(), steps)
    variants["after"] = Variant(module, after, steps)
    take_turns(list(variants.values()), args.repeats)
    result: dict[str, Any] = {
        "examples": len(dataset),
        "steps": steps,
        **{name: variant.figures() for name, variant in variants.items()},
        "speed_up": round(sum(variants["before"].seconds) / sum(variants["after"].seconds), 3),
        "padding_by_multiple": padding_by_multiple(data, batches, scoring.packed),
        "waiting": {str(workers): waiting(task, args, cache, steps, workers) for workers in (0, 2)},
        "tokenising_s": tokenising(data),
    }
    if "unpacked" in variants:
        result["speed_up_by_packing"] = round(sum(variants["unpacked"].seconds) / sum(variants["after"].seconds), 3)
    return result


def padding_by_multiple(data: PromptDataModule, batches: Iterable[Sequence[int]], packed: bool) -> dict[str, float]:
    """The padding of the same batches with widths rounded up to other multiples."""
    rows = [row_lengths(example, packed) for example in data.dataset("train").examples]
    order = list(batches)
    return {str(multiple): round(padding_share(order, rows, multiple), 4) for multiple in (1, 2, 4, 8)}


def take_turns(variants: Sequence[Variant], repeats: int) -> None:
    """Time the sample of every variant, one batch of each after the other."""
    for variant in variants:
        for _ in range(2):  # what the first steps look at in addition
            variant.step(variant.sample[0])
    for number in range(len(variants[0].sample)):
        for _ in range(repeats):
            for variant in variants:
                variant.seconds[number] = min(variant.seconds[number], variant.step(variant.sample[number]))


def waiting(task: str, args: argparse.Namespace, cache: str, steps: int, workers: int) -> float:
    """The share of the time of training that passes before the loader hands out a batch, after the first one."""
    data, module = make_data(task, args, cache, num_workers=workers)
    loader = data.train_dataloader()
    stepping = Variant(module, [next(iter(loader))], 1)
    waited = worked = 0.0
    batches = iter(loader)
    for number in range(steps):
        start = time.perf_counter()
        batch = next(batches)
        wait = time.perf_counter() - start
        work = stepping.step(batch)
        if number:
            waited, worked = waited + wait, worked + work
    return round(waited / (waited + worked), 5) if worked else 0.0


def tokenising(data: PromptDataModule) -> dict[str, float]:
    """Seconds for the training rows in an empty folder, and once more."""
    examples = data.dataset("train").examples
    texts = [example["prompt"] for example in examples], [example["candidates"] for example in examples]
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "cached"):
            start = time.perf_counter()
            TokenCache(folder).encode(data.tokenizer_in_use, *texts, data.max_length)
            seconds[name] = round(time.perf_counter() - start, 4)
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder of train and validation files per task")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="names of tasks, which are those of their folders")
    parser.add_argument("--rows", type=int, default=1000, help="training rows of each task")
    parser.add_argument("--batch-size", type=int, default=16, help="examples of a batch")
    parser.add_argument("--steps", type=int, default=16, help="batches that are timed, evenly spaced by size")
    parser.add_argument("--repeats", type=int, default=7, help="steps on each batch, of which the least time counts")
    parser.add_argument("--seed", type=int, default=0, help="of the order of batches")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        with tempfile.TemporaryDirectory() as cache:
            tasks = {task: measure(task, args, cache) for task in args.tasks}
    finally:
        torch.set_num_threads(threads)
    result = {
        "model": Path(args.model).name,
        "processor": platform.machine(),
        "threads": args.threads,
        "batch_size": args.batch_size,
        "repeats": args.repeats,
        "seed": args.seed,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "tasks": tasks,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
