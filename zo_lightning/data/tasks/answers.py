r"""The question-answering tasks of MeZO, whose answers the model writes, in its prompt shapes.

Source: the tasks and templates of https://github.com/princeton-nlp/MeZO (large_models). The columns are those of ``squad``
and ``drop``.
"""

from __future__ import annotations

from typing import Any

from zo_lightning.data.tasks.generation import GenerationTask
from zo_lightning.data.tasks.registry import register_task

__all__ = ["DROP", "SQuAD"]


@register_task("squad")
class SQuAD(GenerationTask):
    """SQuAD 1.1: the answer to a question is a part of a paragraph of Wikipedia.

    A title's underscores are written as spaces, which MeZO does not do.

    Args:
        max_new_tokens: See :class:`GenerationTask`.
    """

    def __init__(self, max_new_tokens: int = 50) -> None:
        super().__init__(
            name="squad",
            template="Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
            answer_column="answers",
            max_new_tokens=max_new_tokens,
            hub="rajpurkar/squad",
        )

    def prepare(self, row: dict[str, Any]) -> dict[str, Any]:
        """Strip the question, and write the title as text."""
        row["title"] = row["title"].replace("_", " ")
        row["question"] = row["question"].strip()
        return row


@register_task("drop")
class DROP(GenerationTask):
    """DROP: the answer to a question takes a calculation over a passage, or is one or more of its parts.

    A row lists texts without saying whether they are parts of one answer or answers by different people. As in MeZO, the first
    is trained on and the best match with any of them counts; DROP's own metric would match all parts of an answer.

    Args:
        max_new_tokens: See :class:`GenerationTask`.
    """

    def __init__(self, max_new_tokens: int = 50) -> None:
        super().__init__(
            name="drop",
            template="Passage: {passage}\nQuestion: {question}\nAnswer:",
            answer_column="answers_spans",
            max_new_tokens=max_new_tokens,
            hub="ucinlp/drop",
        )

    def prepare(self, row: dict[str, Any]) -> dict[str, Any]:
        """Strip the question."""
        row["question"] = row["question"].strip()
        return row
