"""The DataModule of all tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, SequentialSampler
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from zo_lightning.assets import resolve
from zo_lightning.data.batching import LengthBatchSampler, ShuffleSampler
from zo_lightning.data.collate import ScoringCollator
from zo_lightning.data.dataset import PromptDataset
from zo_lightning.data.errors import DataError
from zo_lightning.data.loader import ResumableDataLoader
from zo_lightning.data.sources import SourceSplit, load_split
from zo_lightning.data.splits import Rows, sample_eval, split_train_dev
from zo_lightning.data.tasks import Task, get_task

Part = Literal["train", "dev", "eval"]


class PromptDataModule(LightningDataModule):
    """Prompts and what may follow them for one task, in the splits of the zeroth-order literature.

    ``fit`` trains on ``num_train`` rows of the training split and validates on ``num_dev`` others of the same split;
    ``validate`` uses those too. ``test`` and ``predict`` use ``num_eval`` rows of the evaluation split, which are never
    looked at before. Training splits too small for that are shared as :func:`~zo_lightning.data.split_train_dev` says;
    the counts are logged. The batches are :class:`~zo_lightning.data.ScoringBatch`.

    Args:
        task: The name of a task (``sst2``, ``rte``, ``cb``, ``boolq``, ``wic``, ``wsc``, ``multirc``, ``copa``, ``record``,
            ``winogrande``, ``squad``, ``drop``), a :class:`~zo_lightning.data.Task`, or its arguments: ``{template: ...}`` with
            ``verbalizers``, ``choices`` or ``answer_column``.
        data_dir: A folder with ``train`` and ``validation`` files (.jsonl, .json, .parquet, .csv or .tsv) with the
            column names of the hub dataset, which is downloaded otherwise; ``quickstart`` is the task of this package.
        tokenizer: A tokenizer, or its name or folder; by default that of the module's ``model_name_or_path``.
        batch_size: The number of examples in a training batch.
        eval_batch_size: The number of examples in any other batch; by default twice ``batch_size``.
        num_train: The number of training rows. One that exceeds the split stands for all but the development rows.
        num_dev: The number of development rows.
        num_eval: The number of evaluation rows. One that exceeds the split stands for all.
        max_length: The number of tokens of a prompt with its longest candidate, capped by the tokenizer's own limit;
            longer prompts lose their beginning.
        seed: The seed of the choice of rows.
        shuffle_seed: The seed of the order of the training batches; by default that of torch (``--seed_everything``).
        num_workers: The number of processes that prepare batches. The examples are tokenised once, so 0 is fast.
        pin_memory: Whether to copy batches to pinned memory; by default where there is a CUDA device.

    Raises:
        ValueError: If a number is out of its range.
        DataError: If there is no such task.
    """

    def __init__(
        self,
        task: Task | str | dict[str, Any] = "sst2",
        data_dir: str | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_train: int = 1000,
        num_dev: int = 500,
        num_eval: int = 1000,
        max_length: int = 2048,
        seed: int = 0,
        shuffle_seed: int | None = None,
        num_workers: int = 0,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__()
        eval_batch_size = 2 * batch_size if eval_batch_size is None else eval_batch_size
        shuffle_seed = torch.initial_seed() % 2**32 if shuffle_seed is None else shuffle_seed
        positive = {
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "num_train": num_train,
            "num_dev": num_dev,
            "num_eval": num_eval,
            "max_length": max_length,
        }
        for argument, number in positive.items():
            if number < 1:
                raise ValueError(f"{argument} must be at least 1, got {number}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        for argument, number in {"seed": seed, "shuffle_seed": shuffle_seed}.items():
            if not 0 <= number < 2**32:  # what NumPy's frozen generator takes
                raise ValueError(f"{argument} must be from 0 to 2**32 - 1, got {number}")
        self.task = get_task(task)
        self.data_dir = None if data_dir is None else resolve(data_dir, "data")
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_train = num_train
        self.num_dev = num_dev
        self.num_eval = num_eval
        self.max_length = max_length
        self.seed = seed
        self.shuffle_seed = shuffle_seed
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._datasets: dict[Part, PromptDataset] = {}

    @property
    def num_classes(self) -> int | None:
        """The number of classes of the task; None if it has none."""
        return getattr(self.task, "num_classes", None)

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes, in the order of the labels; None if the task has none."""
        return getattr(self.task, "class_names", None)

    def dataset(self, part: Part) -> PromptDataset:
        """The examples of one part, with their texts.

        Args:
            part: ``train``, ``dev`` or ``eval``.

        Returns:
            The dataset; its :meth:`~zo_lightning.data.PromptDataset.by_index` finds the example of a batch's ``index``.

        Raises:
            RuntimeError: If :meth:`setup` has not prepared this part.
        """
        if part not in self._datasets:
            raise RuntimeError(f"the part {part!r} is not prepared: call setup('{'test' if part == 'eval' else 'fit'}') first")
        return self._datasets[part]

    def prepare_data(self) -> None:
        """Download the dataset, and the tokenizer where it is given by name."""
        if self.data_dir is None:
            for split in (self.task.train_split, self.task.eval_split):
                load_split(self.task, split)
        if isinstance(self.tokenizer, str):
            _load_tokenizer(self.tokenizer, "--data.tokenizer")

    def setup(self, stage: str | None = None) -> None:
        """Choose the rows of a stage and tokenise them, once.

        Args:
            stage: ``fit``, ``validate``, ``test``, ``predict``, or None for all.

        Raises:
            DataError: If the data or the tokenizer cannot be used.
        """
        if stage in ("fit", "validate", None) and "dev" not in self._datasets:
            source = load_split(self.task, self.task.train_split, self.data_dir)
            try:
                train, dev = split_train_dev(len(source.rows), self.num_train, self.num_dev, self.seed, self.task.small_dev)
            except DataError as error:
                raise DataError(f"{source.origin}: {error}") from None
            rank_zero_info(
                f"{self.task.name}: {len(train)} training and {len(dev)} development rows of the {len(source.rows)} "
                f"of {source.origin}, seed {self.seed}"
            )
            self._datasets["train"] = self._encode(source, train)
            self._datasets["dev"] = self._encode(source, dev)
        if stage in ("test", "predict", None) and "eval" not in self._datasets:
            source = load_split(self.task, self.task.eval_split, self.data_dir)
            rows = sample_eval(len(source.rows), self.num_eval, self.seed)
            rank_zero_info(
                f"{self.task.name}: {len(rows)} evaluation rows of the {len(source.rows)} of {source.origin}, seed {self.seed}"
            )
            self._datasets["eval"] = self._encode(source, rows)

    def train_dataloader(self) -> ResumableDataLoader:
        """Training batches, shuffled (but for ``overfit_batches``), of similar length each."""
        dataset = self.dataset("train")
        # For overfit_batches Lightning turns shuffling off, but not that of a batch sampler of our own.
        overfit = getattr(self.trainer, "overfit_batches", 0)
        sampler = SequentialSampler(dataset) if overfit else ShuffleSampler(dataset, self.shuffle_seed)
        batches = LengthBatchSampler(sampler, self.batch_size, lengths=dataset.lengths)
        return ResumableDataLoader(dataset, batch_sampler=batches, **self._loader_arguments())

    def val_dataloader(self) -> DataLoader[Any]:
        """Development batches."""
        return self._eval_loader("dev")

    def test_dataloader(self) -> DataLoader[Any]:
        """Evaluation batches."""
        return self._eval_loader("eval")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Evaluation batches."""
        return self._eval_loader("eval")

    def _eval_loader(self, part: Part) -> DataLoader[Any]:
        dataset = self.dataset(part)
        batches = LengthBatchSampler(SequentialSampler(dataset), self.eval_batch_size, lengths=dataset.lengths, pool=None)
        return DataLoader(dataset, batch_sampler=batches, **self._loader_arguments())

    def _loader_arguments(self) -> dict[str, Any]:
        tokenizer = self._resolved_tokenizer()
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return {
            "collate_fn": ScoringCollator(pad if pad is not None else 0),
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
        }

    def _encode(self, source: SourceSplit, rows: Rows) -> PromptDataset:
        return PromptDataset.from_rows(self.task, source, rows, self._resolved_tokenizer(), self.max_length)

    def _resolved_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            module = getattr(self.trainer, "lightning_module", None)
            name = getattr(module, "model_name_or_path", None)
            if name is None:
                raise DataError(
                    "there is no tokenizer: the module has no `model_name_or_path` to take it from, give --data.tokenizer"
                )
            self.tokenizer = _load_tokenizer(str(name), "--model.model_name_or_path, or give --data.tokenizer")
        if isinstance(self.tokenizer, (str, Path)):
            self.tokenizer = _load_tokenizer(str(self.tokenizer), "--data.tokenizer")
        return self.tokenizer


def _load_tokenizer(name: str, argument: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(resolve(name))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"cannot load the tokenizer {name!r} ({reason}), check the name or folder in {argument}") from error
