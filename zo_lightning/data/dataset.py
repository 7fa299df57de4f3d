"""The tokenised examples of one split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from zo_lightning.data.errors import DataError
from zo_lightning.data.sources import SourceSplit
from zo_lightning.data.splits import Rows
from zo_lightning.data.tasks import GenerationTask, Task
from zo_lightning.data.tokenization import encode_prompts, length_limit


class _Scored(TypedDict):
    """What every example has."""

    prompt: str
    """The whole prompt, before truncation."""
    candidates: list[str]
    """The K texts that may continue it."""
    prompt_ids: list[int]
    """The tokens all candidates follow."""
    candidate_ids: list[list[int]]
    """The tokens of each candidate."""
    label: int
    """The index of the right candidate, the one to train on."""
    gold: list[int]
    """The indices of all right candidates."""
    index: int
    """The row number in the source split."""


class Example(_Scored, total=False):
    """One example, as text and as token ids."""

    neutral_ids: list[int]
    """For calibrated scores: the tokens of the neutral prompt."""
    neutral_candidate_ids: list[list[int]]
    """For calibrated scores: the tokens of each candidate after the neutral prompt."""
    generation_ids: list[int]
    """For generation: the tokens of the prompt alone, short enough for what is to be generated."""
    answers: list[str]
    """For generation: all right answers."""


def fed_length(example: Example) -> int:
    """The length of the longest row that an example puts into a batch: a candidate's last token is never fed."""
    return len(example["prompt_ids"]) + max(len(ids) for ids in example["candidate_ids"]) - 1


class PromptDataset(Dataset[Example]):
    """Examples in the order of the split, tokenised.

    Args:
        examples: The examples.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = list(examples)
        self.lengths = [fed_length(example) for example in self.examples]
        self._position = {example["index"]: position for position, example in enumerate(self.examples)}

    @classmethod
    def from_rows(
        cls,
        task: Task,
        source: SourceSplit,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        calibrated: bool = False,
    ) -> PromptDataset:
        """Fill the task's template with rows of a source, and tokenise.

        Args:
            task: The task.
            source: The source split.
            rows: The row numbers to take, shape (n,).
            tokenizer: The model's tokenizer.
            max_length: The number of tokens that a prompt and its longest candidate may have.
            calibrated: Whether neutral prompts are needed too.

        Returns:
            The dataset of n examples.

        Raises:
            DataError: If a row has no value in one of the task's columns, or cannot be tokenised.
        """

        def describe(position: int) -> str:
            return f"row {rows[position]} (from 0) of {source.origin}"

        examples: list[Example] = []
        neutral: list[str] = []
        for position, row in enumerate(source.rows.select(rows)):
            empty = [column for column in task.columns if row[column] is None]
            if empty:
                raise DataError(f"{describe(position)}: no value in {empty}, fill it or remove the row")
            try:
                gold = task.gold(row)
                example = Example(
                    prompt=task.prompt(row),
                    candidates=list(task.candidates(row)),
                    prompt_ids=[],
                    candidate_ids=[],
                    label=gold[0],
                    gold=gold,
                    index=int(rows[position]),
                )
                if isinstance(task, GenerationTask):
                    example["answers"] = task.answers(row)
                if calibrated:
                    neutral.append(task.neutral_prompt(row))
            except DataError as error:
                raise DataError(f"{describe(position)}: {error}") from None
            examples.append(example)
        prompts = [example["prompt"] for example in examples]
        candidates = [example["candidates"] for example in examples]
        limit = length_limit(tokenizer, max_length)
        encoded = encode_prompts(tokenizer, prompts, candidates, max_length, describe)
        for example, item in zip(examples, encoded, strict=True):
            example["prompt_ids"], example["candidate_ids"] = item.prompt_ids, item.candidate_ids
        cut = sum(item.dropped > 0 for item in encoded)
        if cut:
            rank_zero_info(f"{source.origin}: {cut} of {len(rows)} prompts lost their beginning to fit into {limit} tokens")
        if calibrated:
            for example, item in zip(
                examples, encode_prompts(tokenizer, neutral, candidates, max_length, describe), strict=True
            ):
                example["neutral_ids"], example["neutral_candidate_ids"] = item.prompt_ids, item.candidate_ids
        return cls(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: int) -> Example:
        return self.examples[position]

    def by_index(self, index: int) -> Example:
        """The example of a given row of the source split, the ``index`` of a batch.

        Args:
            index: The row number.

        Returns:
            The example.

        Raises:
            KeyError: If this row is not in the dataset.
        """
        return self.examples[self._position[index]]
