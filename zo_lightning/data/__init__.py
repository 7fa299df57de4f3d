"""Tasks, their data, and batches for scoring candidates."""

from zo_lightning.data.batching import LengthBatchSampler, ShuffleSampler
from zo_lightning.data.cache import TokenCache
from zo_lightning.data.chat import ChatPrompting
from zo_lightning.data.collate import CalibratedBatch, PackedBatch, ScoringBatch, ScoringCollator, num_candidates
from zo_lightning.data.collate_generation import GenerationBatch, GenerationCollator
from zo_lightning.data.datamodule import PromptDataModule
from zo_lightning.data.dataset import Example, PromptDataset
from zo_lightning.data.errors import DataError
from zo_lightning.data.loader import ResumableDataLoader
from zo_lightning.data.multitask import MultiTaskDataModule
from zo_lightning.data.prompting import Demonstration, Demonstrations, PlainPrompting, Prompting
from zo_lightning.data.repeat import repeat_batch, repeat_generation_batch, repeat_scoring_batch
from zo_lightning.data.sources import SourceSplit, load_split
from zo_lightning.data.splits import sample_eval, sample_shots, split_train_dev
from zo_lightning.data.tasks import (
    CB,
    COPA,
    DROP,
    RTE,
    SST2,
    WSC,
    BoolQ,
    CandidateTask,
    ClassificationTask,
    GenerationTask,
    MultipleChoiceTask,
    MultiRC,
    ReCoRD,
    SQuAD,
    Task,
    WiC,
    WinoGrande,
    get_task,
    list_tasks,
    register_task,
)
from zo_lightning.data.tokenization import EncodedPrompt, FramedPrompt, encode_prompts

__all__ = [
    "CB",
    "COPA",
    "DROP",
    "RTE",
    "SST2",
    "WSC",
    "BoolQ",
    "CalibratedBatch",
    "CandidateTask",
    "ChatPrompting",
    "ClassificationTask",
    "DataError",
    "Demonstration",
    "Demonstrations",
    "EncodedPrompt",
    "Example",
    "FramedPrompt",
    "GenerationBatch",
    "GenerationCollator",
    "GenerationTask",
    "LengthBatchSampler",
    "MultiRC",
    "MultiTaskDataModule",
    "MultipleChoiceTask",
    "PackedBatch",
    "PlainPrompting",
    "PromptDataModule",
    "PromptDataset",
    "Prompting",
    "ReCoRD",
    "ResumableDataLoader",
    "SQuAD",
    "ScoringBatch",
    "ScoringCollator",
    "ShuffleSampler",
    "SourceSplit",
    "Task",
    "TokenCache",
    "WiC",
    "WinoGrande",
    "encode_prompts",
    "get_task",
    "list_tasks",
    "load_split",
    "num_candidates",
    "register_task",
    "repeat_batch",
    "repeat_generation_batch",
    "repeat_scoring_batch",
    "sample_eval",
    "sample_shots",
    "split_train_dev",
]
