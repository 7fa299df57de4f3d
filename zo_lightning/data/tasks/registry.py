"""Finding a task by its name, by its description, or as it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, TypeVar

from zo_lightning.data.errors import DataError
from zo_lightning.data.tasks.base import ClassificationTask

_TASKS: dict[str, Callable[[], ClassificationTask]] = {}

_Factory = TypeVar("_Factory", bound=Callable[[], ClassificationTask])


def register_task(name: str) -> Callable[[_Factory], _Factory]:
    """Make a task available under a name, as ``task: <name>`` in YAML and ``--data.task <name>`` on the command line.

    Args:
        name: The name; upper and lower case are not told apart.

    Returns:
        A decorator for a subclass of :class:`ClassificationTask` (or any function) that takes no arguments.

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


def get_task(task: ClassificationTask | str | dict[str, Any]) -> ClassificationTask:
    """Turn what a user wrote for ``task`` into a task.

    Args:
        task: A task; the name of a registered one; or the arguments of :class:`ClassificationTask` as a dictionary.

    Returns:
        The task.

    Raises:
        DataError: If no task has this name (the message lists all), or the dictionary does not describe one.
    """
    if isinstance(task, ClassificationTask):
        return task
    if isinstance(task, dict):
        return _task_from_dict(task)
    factory = _TASKS.get(task.lower())
    if factory is None:
        raise DataError(f"unknown task {task!r}{_suggestion(task.lower(), _TASKS)}; the tasks are {list_tasks()}")
    return factory()


def _task_from_dict(arguments: dict[str, Any]) -> ClassificationTask:
    parameters = inspect.signature(ClassificationTask).parameters
    for key in arguments:
        if key == "class_path":
            raise DataError(f"task: {arguments[key]!r} is no importable subclass of ClassificationTask, or its init_args fail")
        if key not in parameters:
            raise DataError(f"task: unknown key {key!r}{_suggestion(key, parameters)}; the keys are {list(parameters)}")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in arguments:
            raise DataError(f"task: the key {key!r} is missing, got {list(arguments)}")
    return ClassificationTask(**arguments)


def _suggestion(word: str, known: Any) -> str:
    close = get_close_matches(str(word), list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
