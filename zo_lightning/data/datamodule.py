"""The DataModule of all tasks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, SequentialSampler
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from zo_lightning.assets import resolve
from zo_lightning.data.batching import LengthBatchSampler, ShuffleSampler
from zo_lightning.data.cache import TokenCache
from zo_lightning.data.chat import ChatPrompting
from zo_lightning.data.collate import ScoringCollator
from zo_lightning.data.collate_generation import GenerationCollator
from zo_lightning.data.dataset import PromptDataset
from zo_lightning.data.errors import DataError
from zo_lightning.data.loader import PreparedDataLoader, ResumableDataLoader
from zo_lightning.data.packing import row_lengths
from zo_lightning.data.padding import padding_share
from zo_lightning.data.prompting import NO_DEMONSTRATIONS, PLAIN, Demonstrations, Prompting, draw_demonstrations
from zo_lightning.data.sources import SourceSplit, load_split
from zo_lightning.data.splits import Rows, sample_eval, sample_shots, split_train_dev
from zo_lightning.data.tasks import CandidateTask, GenerationTask, Task, get_task

Part = Literal["train", "dev", "eval"]

NUM_TRAIN, NUM_DEV = 1000, 500


class PromptDataModule(LightningDataModule):
    """Prompts and what may follow them for one task, in the splits of the zeroth-order literature.

    ``fit`` trains on ``num_train`` rows of the training split and validates on ``num_dev`` others of the same split;
    ``validate`` uses those too. ``test`` and ``predict`` use ``num_eval`` rows of the evaluation split, which are never
    looked at before. Training splits too small for that are shared as :func:`~zo_lightning.data.split_train_dev` says;
    the counts are logged. The batches are :class:`~zo_lightning.data.ScoringBatch`, those of a generation task
    :class:`~zo_lightning.data.GenerationBatch`.

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
        num_shots: For few-shot learning, the number of training rows of each class, and as many development rows of each
            (LM-BFF's split, which MeZO has with 16 and 512); for tasks without classes, the number of rows in all. It takes
            the place of ``num_train`` and ``num_dev``.
        num_eval: The number of evaluation rows. One that exceeds the split stands for all.
        max_length: The number of tokens of a prompt with its longest candidate, and with what the model may write, capped by
            the limits of the tokenizer and of the model; longer prompts lose their beginning, in a chat the beginning of the
            user's turn.
        num_demonstrations: For in-context learning, the number of training rows that are shown with their answers in front of
            every prompt, the same for all; a training prompt never shows its own row. As many whole ones as fit into
            ``max_length`` are kept, the first ones; the counts are logged.
        demonstration_seed: The seed of the choice of demonstrations; by default the first training rows are taken, which are
            in random order (those that MeZO shows).
        chat_template: For instruction-tuned models: whether a prompt becomes the user's turn of a chat as the tokenizer's
            chat template writes it, demonstrations becoming earlier turns; candidates then follow without a space in
            front, unless the template has one there.
        system_prompt: What such a chat begins with; by default what the template writes by itself, if anything.
        calibrated: Whether evaluations compare each candidate with itself after a neutral prompt, as in surface-form
            competition: what the module predicts, and its accuracy, then follow the difference, see
            :class:`~zo_lightning.modules.CandidateModule`. Training and losses do not change.
        seed: The seed of the choice of rows.
        shuffle_seed: The seed of the order of the training batches; by default that of torch (``--seed_everything``).
        num_workers: The number of processes that prepare batches. The examples are tokenised once, so 0 is fast.
        pin_memory: Whether to copy batches to pinned memory; by default where there is a CUDA device.
        packing: Whether the candidates of an example share a row, and with it the computation of the prompt, where there are
            several of more than one token; by default where the model computes the same so, which is tried on it once.
        pad_to_multiple_of: What the length of rows is rounded up to; by default a number that adds little, 8 for long rows.
        cache: Whether token ids are kept on the disk, and found again there by the content of texts and tokenizer.
        cache_dir: Where they are kept; by default the folder ``zo_lightning`` beside the cache of Hugging Face datasets.

    Raises:
        ValueError: If a number is out of its range.
        DataError: If there is no such task, or ``calibrated`` has no meaning for it.
    """

    def __init__(
        self,
        task: Task | str | dict[str, Any] = "sst2",
        data_dir: str | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_train: int = NUM_TRAIN,
        num_dev: int = NUM_DEV,
        num_eval: int = 1000,
        max_length: int = 2048,
        num_shots: int | None = None,
        num_demonstrations: int = 0,
        demonstration_seed: int | None = None,
        chat_template: bool = False,
        system_prompt: str | None = None,
        calibrated: bool = False,
        seed: int = 0,
        shuffle_seed: int | None = None,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        packing: bool | None = None,
        pad_to_multiple_of: int | None = None,
        cache: bool = True,
        cache_dir: str | None = None,
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
            "pad_to_multiple_of": 1 if pad_to_multiple_of is None else pad_to_multiple_of,
        }
        for argument, number in positive.items():
            if number < 1:
                raise ValueError(f"{argument} must be at least 1, got {number}")
        for argument, number in {"num_workers": num_workers, "num_demonstrations": num_demonstrations}.items():
            if number < 0:
                raise ValueError(f"{argument} must be at least 0, got {number}")
        if num_shots is not None and num_shots < 1:
            raise ValueError(f"num_shots must be at least 1, got {num_shots}")
        if num_shots is not None and (num_train, num_dev) != (NUM_TRAIN, NUM_DEV):
            raise ValueError("num_shots takes the place of num_train and num_dev, leave these out")
        if system_prompt is not None and not chat_template:
            raise ValueError("system_prompt is for chats only, give chat_template=True too")
        for argument, number in {
            "seed": seed,
            "shuffle_seed": shuffle_seed,
            "demonstration_seed": demonstration_seed or 0,
        }.items():
            if not 0 <= number < 2**32:  # what NumPy's frozen generator takes
                raise ValueError(f"{argument} must be from 0 to 2**32 - 1, got {number}")
        self.task = get_task(task)
        if calibrated and not isinstance(self.task, CandidateTask):
            raise DataError(f"calibrated=True compares candidates, and task {self.task.name!r} has none to choose from")
        self.data_dir = None if data_dir is None else resolve(data_dir, "data")
        self.tokenizer = tokenizer
        self._tokenizer_of: str | None = None  # the model that it was taken from, where it was not given
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_train = num_train
        self.num_dev = num_dev
        self.num_eval = num_eval
        self.num_shots = num_shots
        self.num_demonstrations = num_demonstrations
        self.demonstration_seed = demonstration_seed
        self.chat_template = chat_template
        self.system_prompt = system_prompt
        self.max_length = max_length
        self.calibrated = calibrated
        self.seed = seed
        self.shuffle_seed = shuffle_seed
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.packing = packing
        self.pad_to_multiple_of = pad_to_multiple_of
        self.cache = cache
        self.cache_dir = cache_dir
        self._datasets: dict[Part, PromptDataset] = {}

    @property
    def num_classes(self) -> int | None:
        """The number of classes of the task; None if it has none."""
        return getattr(self.task, "num_classes", None)

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes, in the order of the labels; None if the task has none."""
        return getattr(self.task, "class_names", None)

    @property
    def tokenizer_in_use(self) -> PreTrainedTokenizerBase:
        """The tokenizer itself, whether it was given, named, or is that of the module's model."""
        return self._resolved_tokenizer()

    @property
    def prompting(self) -> Prompting:
        """How prompts are put to the model."""
        return ChatPrompting(self._resolved_tokenizer(), self.system_prompt) if self.chat_template else PLAIN

    @property
    def end_of_turn(self) -> str | None:
        """What ends the model's turn of a chat, as text; None without a chat template."""
        return self.prompting.end_of_turn

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
        name = self._model_name
        if self._tokenizer_of is not None and name is not None and name != self._tokenizer_of:
            self.tokenizer = self._tokenizer_of = None  # another model, whose token ids are others
            self._datasets.clear()
        if stage in ("fit", "validate", None) and "dev" not in self._datasets:
            source, train, dev = self._training_split()
            each = "" if self.num_shots is None or source.labels is None else f", {self.num_shots} of each class,"
            rank_zero_info(
                f"{self.task.name}: {len(train)} training and {len(dev)} development rows{each} of the {len(source.rows)} "
                f"of {source.origin}, seed {self.seed}"
            )
            shown = self._demonstrations(source, train)
            self._datasets["train"] = self._encode(source, train, shown)
            self._datasets["dev"] = self._encode(source, dev, shown, self.calibrated)
        if stage in ("test", "predict", None) and "eval" not in self._datasets:
            source = load_split(self.task, self.task.eval_split, self.data_dir)
            rows = sample_eval(len(source.rows), self.num_eval, self.seed)
            rank_zero_info(
                f"{self.task.name}: {len(rows)} evaluation rows of the {len(source.rows)} of {source.origin}, seed {self.seed}"
            )
            shown = self._demonstrations(*self._training_split()[:2]) if self.num_demonstrations else NO_DEMONSTRATIONS
            self._datasets["eval"] = self._encode(source, rows, shown, self.calibrated)

    def train_dataloader(self) -> ResumableDataLoader:
        """Training batches, shuffled (but for ``overfit_batches``), of similar length each.

        They hold the candidate to train on alone where the module says that its loss reads no other (``reads_gold_only``).
        """
        dataset = self.dataset("train")
        if getattr(self._module, "reads_gold_only", False):
            dataset = dataset.gold_only()
        # For overfit_batches Lightning turns shuffling off, but not that of a batch sampler of our own.
        overfit = getattr(self.trainer, "overfit_batches", 0)
        sampler = SequentialSampler(dataset) if overfit else ShuffleSampler(dataset, self.shuffle_seed)
        batches = LengthBatchSampler(sampler, self.batch_size, lengths=dataset.lengths)
        return ResumableDataLoader(dataset, batch_sampler=batches, **self._loader_arguments(dataset, training=True))

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
        return PreparedDataLoader(dataset, batch_sampler=batches, **self._loader_arguments(dataset))

    def _loader_arguments(self, dataset: PromptDataset, training: bool = False) -> dict[str, Any]:
        tokenizer = self._resolved_tokenizer()
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        scoring = ScoringCollator(pad if pad is not None else 0, self.pad_to_multiple_of)
        return {
            "collate_fn": GenerationCollator(scoring) if isinstance(self.task, GenerationTask) else scoring,
            "prepare": partial(self._prepare, dataset, scoring, training),
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
        }

    def _prepare(self, dataset: PromptDataset, collator: ScoringCollator, training: bool, loader: DataLoader[Any]) -> None:
        """Decide on packing, now that there is a model; the order of the batches waits for the lengths that follow from it."""
        collator.packed = dataset.packable and self._packs()
        dataset.measure(collator.packed)
        if training:
            rows = [row_lengths(example, collator.packed) for example in dataset.examples]
            assert loader.batch_sampler is not None
            share = padding_share(loader.batch_sampler, rows, collator.multiple)
            packed = "candidates packed, " if collator.packed else ""
            rank_zero_info(f"{self.task.name}: {packed}padding {100 * share:.1f} % of the tokens fed")

    def _packs(self) -> bool:
        if self.packing is False:
            return False
        module = self._module
        if self.packing:
            if not hasattr(module, "check_packing"):
                raise DataError(
                    "packing=True: nothing can tell whether the model allows it but a module of zo_lightning under a Trainer; "
                    "leave packing out"
                )
            module.check_packing()
            return True
        return bool(getattr(module, "allows_packing", False))

    def _training_split(self) -> tuple[SourceSplit, Rows, Rows]:
        """The training split, its training rows, and its development rows."""
        source = load_split(self.task, self.task.train_split, self.data_dir)
        try:
            if self.num_shots is None:
                chosen = split_train_dev(len(source.rows), self.num_train, self.num_dev, self.seed, self.task.small_dev)
            else:
                chosen = sample_shots(len(source.rows), self.num_shots, self.seed, source.labels, self.class_names)
        except DataError as error:
            raise DataError(f"{source.origin}: {error}") from None
        return source, *chosen

    def _demonstrations(self, source: SourceSplit, train: Rows) -> Demonstrations:
        if not self.num_demonstrations:
            return NO_DEMONSTRATIONS
        return draw_demonstrations(self.task, source, train, self.num_demonstrations, self.demonstration_seed)

    def _encode(self, source: SourceSplit, rows: Rows, shown: Demonstrations, calibrated: bool = False) -> PromptDataset:
        return PromptDataset.from_rows(
            self.task,
            source,
            rows,
            self._resolved_tokenizer(),
            self._length_limit(),
            calibrated,
            prompting=self.prompting,
            demonstrations=shown,
            cache=TokenCache(self.cache_dir) if self.cache else None,
        )

    def _length_limit(self) -> int:
        """``max_length``, capped by the model's number of positions: beyond them a lookup fails, on a GPU without a message."""
        longest = getattr(self._module, "longest_input", None)
        return self.max_length if longest is None else min(self.max_length, longest)

    @property
    def _module(self) -> Any:
        """The module that is fed; None without a Trainer."""
        return getattr(self.trainer, "lightning_module", None)

    @property
    def _model_name(self) -> str | None:
        name = getattr(self._module, "model_name_or_path", None)
        return None if name is None else str(name)

    def _resolved_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            name = self._model_name
            if name is None:
                raise DataError(
                    "there is no tokenizer: the module has no `model_name_or_path` to take it from, give --data.tokenizer"
                )
            self.tokenizer = _load_tokenizer(name, "--model.model_name_or_path, or give --data.tokenizer")
            self._tokenizer_of = name
        if isinstance(self.tokenizer, (str, Path)):
            self.tokenizer = _load_tokenizer(str(self.tokenizer), "--data.tokenizer")
        return self.tokenizer


def _load_tokenizer(name: str, argument: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(resolve(name))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"cannot load the tokenizer {name!r} ({reason}), check the name or folder in {argument}") from error
