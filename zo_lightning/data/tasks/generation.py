"""A task whose answer is written by the model: a template, and the column that holds the right answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zo_lightning.data.errors import DataError
from zo_lightning.data.tasks.task import Task

__all__ = ["GenerationTask"]


class GenerationTask(Task):
    r"""Generation: the model continues the filled-in template, up to a line break, and the text is compared with the answers.

    A task is data, so most are written in YAML alone::

        task:
          template: "{passage}\nQuestion: {question}\nAnswer:"
          answer_column: answer

    Args:
        template: See :class:`Task`.
        answer_column: The column of the right answers: a text, a list of texts, or a mapping that holds a list under ``text``
            (as in SQuAD) or ``spans`` (as in DROP).
        candidate: What is trained on: the continuation for the first answer, ``{answer}``, with the end that stops the model.
        max_new_tokens: The number of tokens that the model may write.
        name: See :class:`Task`.
        columns: See :class:`Task`.
        hub: See :class:`Task`.
        hub_config: See :class:`Task`.
        train_split: See :class:`Task`.
        eval_split: See :class:`Task`.
        small_dev: See :class:`Task`.
        neutral_template: See :class:`Task`.

    Raises:
        DataError: If the template makes no sense.
    """

    kind = "generation"

    def __init__(
        self,
        template: str,
        answer_column: str = "answers",
        candidate: str = " {answer}\n",
        max_new_tokens: int = 50,
        name: str = "custom",
        columns: list[str] | None = None,
        hub: str | None = None,
        hub_config: str | None = None,
        train_split: str = "train",
        eval_split: str = "validation",
        small_dev: int | None = None,
        neutral_template: str | None = None,
    ) -> None:
        super().__init__(template, name, columns, hub, hub_config, train_split, eval_split, small_dev, neutral_template)
        self.answer_column = answer_column
        self.candidate = candidate
        self.max_new_tokens = max_new_tokens

    @property
    def target_columns(self) -> list[str]:
        """The column of the answers."""
        return [self.answer_column]

    def answers(self, row: Mapping[str, Any]) -> list[str]:
        """All right answers of a row, without white space around them."""
        found = row[self.answer_column]
        if isinstance(found, Mapping):
            found = next((found[key] for key in ("text", "spans") if key in found), [])
        texts = [str(text).strip() for text in ([found] if isinstance(found, (str, int, float)) else list(found or []))]
        if not any(texts):
            raise DataError(f"no answer in column {self.answer_column!r}")
        return list(dict.fromkeys(text for text in texts if text))

    def candidates(self, row: Mapping[str, Any]) -> Sequence[str]:
        """The continuation to train on."""
        return [self.candidate.format(answer=self.answers(row)[0])]

    def gold(self, row: Mapping[str, Any]) -> list[int]:
        """The only candidate."""
        return [0]
