"""Tasks: prompt templates with their verbalizers, and where their rows come from."""

from zo_lightning.data.tasks.base import ClassificationTask
from zo_lightning.data.tasks.catalog import CB, RTE, SST2, WSC, BoolQ, MultiRC, WiC
from zo_lightning.data.tasks.registry import get_task, list_tasks, register_task

__all__ = [
    "CB",
    "RTE",
    "SST2",
    "WSC",
    "BoolQ",
    "ClassificationTask",
    "MultiRC",
    "WiC",
    "get_task",
    "list_tasks",
    "register_task",
]
