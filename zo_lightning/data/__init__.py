"""Tasks, their data, and batches for scoring candidates."""

from zo_lightning.data.batching import LengthBatchSampler, ShuffleSampler
from zo_lightning.data.collate import ScoringBatch, ScoringCollator, num_candidates
from zo_lightning.data.datamodule import PromptDataModule
from zo_lightning.data.dataset import Example, PromptDataset
from zo_lightning.data.errors import DataError
from zo_lightning.data.loader import ResumableDataLoader
from zo_lightning.data.multitask import MultiTaskDataModule
from zo_lightning.data.repeat import repeat_batch, repeat_scoring_batch
from zo_lightning.data.sources import SourceSplit, load_split
from zo_lightning.data.splits import sample_eval, split_train_dev
from zo_lightning.data.tasks import (
    CB,
    RTE,
    SST2,
    WSC,
    BoolQ,
    CandidateTask,
    ClassificationTask,
    GenerationTask,
    MultipleChoiceTask,
    MultiRC,
    Task,
    WiC,
    get_task,
    list_tasks,
    register_task,
)
from zo_lightning.data.tokenization import EncodedPrompt, encode_prompts

__all__ = [
    "CB",
    "RTE",
    "SST2",
    "WSC",
    "BoolQ",
    "CandidateTask",
    "ClassificationTask",
    "DataError",
    "EncodedPrompt",
    "Example",
    "GenerationTask",
    "LengthBatchSampler",
    "MultiRC",
    "MultiTaskDataModule",
    "MultipleChoiceTask",
    "PromptDataModule",
    "PromptDataset",
    "ResumableDataLoader",
    "ScoringBatch",
    "ScoringCollator",
    "ShuffleSampler",
    "SourceSplit",
    "Task",
    "WiC",
    "encode_prompts",
    "get_task",
    "list_tasks",
    "load_split",
    "num_candidates",
    "register_task",
    "repeat_batch",
    "repeat_scoring_batch",
    "sample_eval",
    "split_train_dev",
]
