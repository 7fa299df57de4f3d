"""A task whose answer is written by the model: a template, and the column that holds the right answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from zo_lightning.data.errors import DataError
from zo_lightning.data.tasks.task import Task
from zo_lightning.data.tasks.template import label_key, template_columns

__all__ = ["GenerationTask"]

# Where a column holds a mapping, the key of its texts: in SQuAD, and in DROP.
_KEYS = ("text", "spans")


class GenerationTask(Task):
    r"""Generation: the model continues the filled-in template, up to a line break, and the text is compared with the answers.

    A task is data, so most are written in YAML alone::

        task:
          template: "{passage}\nQuestion: {question}\nAnswer:"
          answer_column: answer

    Args:
        template: See :class:`Task`.
        answer_column: The column of the right answers: a text or a number, a list of them, or a mapping that holds them under
            ``text`` (as in SQuAD) or ``spans`` (as in DROP).
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
        DataError: If the template, the candidate or a number makes no sense.
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
        if not isinstance(answer_column, str) or not answer_column:
            raise DataError(f"task {name!r}: answer_column must be the name of one column, got {answer_column!r}")
        if template_columns(candidate, name, "candidate") != ["answer"]:
            raise DataError(f"task {name!r}: the candidate {candidate!r} must name {{answer}} and nothing else")
        if "\n" in candidate.partition("{")[0]:
            raise DataError(
                f"task {name!r}: the candidate {candidate!r} has a line break before {{answer}}, where the model is stopped; "
                "put it at the end of the template"
            )
        if max_new_tokens < 1:
            raise DataError(f"task {name!r}: max_new_tokens must be at least 1, got {max_new_tokens}")
        self.answer_column = answer_column
        self.candidate = candidate
        self.max_new_tokens = max_new_tokens

    @property
    def target_columns(self) -> list[str]:
        """The column of the answers."""
        return [self.answer_column]

    def answers(self, row: Mapping[str, Any]) -> list[str]:
        """All right answers of a row, each once, in the order of the data.

        White space around them is removed, and a line break within one is a space: the model's answer is a single line.

        Args:
            row: One row of the data, holding at least :attr:`answer_column`.

        Returns:
            One text or more; the first is trained on.

        Raises:
            DataError: If there is none, or the column holds anything else.
        """
        found = row[self.answer_column]
        if isinstance(found, Mapping):
            key = next((key for key in _KEYS if key in found), None)
            if key is None:
                raise self._unreadable(found)
            found = found[key]
        items = list(found) if isinstance(found, (list, tuple)) else [found]
        texts = [self._text(item) for item in items if item is not None and item == item]  # NaN is a gap in a CSV file
        answers = list(dict.fromkeys(text for text in texts if text))
        if not answers:
            raise DataError(f"no answer in column {self.answer_column!r}, fill it or remove the row")
        return answers

    def candidates(self, row: Mapping[str, Any]) -> Sequence[str]:
        """The continuation to train on."""
        return [self.candidate.format(answer=self.answers(row)[0])]

    def gold(self, row: Mapping[str, Any]) -> list[int]:
        """The only candidate."""
        return [0]

    def _text(self, answer: object) -> str:
        if not isinstance(answer, (str, int, float)):
            raise self._unreadable(answer)
        return re.sub(r"\s*\n\s*", " ", label_key(answer))

    def _unreadable(self, found: object) -> DataError:
        return DataError(
            f"the answers in column {self.answer_column!r} must be texts or numbers, or a list of them, alone or under "
            f"{' or '.join(map(repr, _KEYS))}, got {found!r}"
        )
