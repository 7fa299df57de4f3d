"""Tasks: prompt templates with what may follow them, and where their rows come from."""

from zo_lightning.data.tasks.answers import DROP, SQuAD
from zo_lightning.data.tasks.catalog import CB, RTE, SST2, WSC, BoolQ, MultiRC, WiC
from zo_lightning.data.tasks.choices import COPA, ReCoRD, WinoGrande
from zo_lightning.data.tasks.classification import ClassificationTask
from zo_lightning.data.tasks.generation import GenerationTask
from zo_lightning.data.tasks.multiple_choice import MultipleChoiceTask
from zo_lightning.data.tasks.registry import get_task, list_tasks, register_task
from zo_lightning.data.tasks.task import CandidateTask, Task

__all__ = [
    "CB",
    "COPA",
    "DROP",
    "RTE",
    "SST2",
    "WSC",
    "BoolQ",
    "CandidateTask",
    "ClassificationTask",
    "GenerationTask",
    "MultiRC",
    "MultipleChoiceTask",
    "ReCoRD",
    "SQuAD",
    "Task",
    "WiC",
    "WinoGrande",
    "get_task",
    "list_tasks",
    "register_task",
]
