"""Finding a task by its name, by its description, or as it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, TypeVar

from zo_lightning.data.errors import DataError
from zo_lightning.data.tasks.classification import ClassificationTask
from zo_lightning.data.tasks.generation import GenerationTask
from zo_lightning.data.tasks.multiple_choice import MultipleChoiceTask
from zo_lightning.data.tasks.task import Task

# The key that tells what kind of task a dictionary describes.
_KINDS: dict[str, type[ClassificationTask | MultipleChoiceTask | GenerationTask]] = {
    "verbalizers": ClassificationTask,
    "choices": MultipleChoiceTask,
    "answer_column": GenerationTask,
}
_TASKS: dict[str, Callable[[], Task]] = {}

_Factory = TypeVar("_Factory", bound=Callable[[], Task])


def register_task(name: str) -> Callable[[_Factory], _Factory]:
    """Make a task available under a name, as ``task: <name>`` in YAML and ``--data.task <name>`` on the command line.

    Args:
        name: The name; upper and lower case are not told apart.

    Returns:
        A decorator for a subclass of :class:`Task` (or any function) that takes no arguments.

    Raises:
        ValueError: If the name is taken.
    """

    def register(factory: _Factory) -> _Factory:
        key = name.lower()
        if key in _TASKS:
            raise ValueError(f"the task name {name!r} is taken by {_TASKS[key]!r}")
        _TASKS[key] = factory
        return factory

    return register


def list_tasks() -> list[str]:
    """The names of all registered tasks, in alphabetical order."""
    return sorted(_TASKS)


def get_task(task: Task | str | dict[str, Any]) -> Task:
    """Turn what a user wrote for ``task`` into a task.

    Args:
        task: A task; the name of a registered one; or the arguments of one as a dictionary: with
            ``verbalizers`` of a :class:`ClassificationTask`, with ``choices`` of a :class:`MultipleChoiceTask`, with
            ``answer_column`` of a :class:`GenerationTask`.

    Returns:
        The task.

    Raises:
        DataError: If no task has this name (the message lists all), or the dictionary does not describe one.
    """
    if isinstance(task, Task):
        return task
    if isinstance(task, dict):
        return _task_from_dict(task)
    factory = _TASKS.get(task.lower())
    if factory is None:
        raise DataError(f"unknown task {task!r}{_suggestion(task.lower(), _TASKS)}; the tasks are {list_tasks()}")
    return factory()


def _task_from_dict(arguments: dict[str, Any]) -> Task:
    if "class_path" in arguments:
        raise DataError(f"task: {arguments['class_path']!r} is no importable subclass of Task, or its init_args fail")
    kinds = [kind for key, kind in _KINDS.items() if key in arguments]
    if not kinds:
        # nearest to what was meant, where a key is misspelt
        kinds = [kind for key, kind in _KINDS.items() if get_close_matches(key, list(arguments), n=1)]
    if len(kinds) != 1:
        raise DataError(
            "task: give a `template` and one of `verbalizers` (classification), `choices` (multiple choice) and "
            f"`answer_column` (generation), got {list(arguments)}"
        )
    parameters = inspect.signature(kinds[0]).parameters
    for key in arguments:
        if key not in parameters:
            raise DataError(f"task: unknown key {key!r}{_suggestion(key, parameters)}; the keys are {list(parameters)}")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in arguments:
            raise DataError(f"task: the key {key!r} is missing, got {list(arguments)}")
    return kinds[0](**arguments)


def _suggestion(word: str, known: Any) -> str:
    close = get_close_matches(str(word), list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
