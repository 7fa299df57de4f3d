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
from zo_lightning.data.tasks import ClassificationTask
from zo_lightning.data.tokenization import encode_prompts, length_limit


class Example(TypedDict):
    """One example, as text and as token ids."""

    prompt: str
    """The whole prompt, before truncation."""
    candidates: list[str]
    """The K texts that may continue it."""
    prompt_ids: list[int]
    """The tokens all candidates follow."""
    candidate_ids: list[list[int]]
    """The tokens of each candidate."""
    label: int
    """The index of the right candidate."""
    index: int
    """The row number in the source split."""


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
        task: ClassificationTask,
        source: SourceSplit,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
    ) -> PromptDataset:
        """Fill the task's template with rows of a source, and tokenise.

        Args:
            task: The task.
            source: The source split.
            rows: The row numbers to take, shape (n,).
            tokenizer: The model's tokenizer.
            max_length: The number of tokens that a prompt and its longest candidate may have.

        Returns:
            The dataset of n examples.

        Raises:
            DataError: If a row has no value in one of the task's columns, or cannot be tokenised.
        """

        def describe(position: int) -> str:
            return f"row {rows[position]} (from 0) of {source.origin}"

        prompts: list[str] = []
        candidates: list[list[str]] = []
        for position, row in enumerate(source.rows.select(rows)):
            empty = [column for column in task.columns if row[column] is None]
            if empty:
                raise DataError(f"{describe(position)}: no value in {empty}, fill it or remove the row")
            prompts.append(task.prompt(row))
            candidates.append(list(task.candidates(row)))
        encoded = encode_prompts(tokenizer, prompts, candidates, max_length, describe)
        cut = sum(item.dropped > 0 for item in encoded)
        if cut:
            limit = length_limit(tokenizer, max_length)
            rank_zero_info(f"{source.origin}: {cut} of {len(rows)} prompts lost their beginning to fit into {limit} tokens")
        return cls(
            [
                Example(
                    prompt=prompt,
                    candidates=endings,
                    prompt_ids=item.prompt_ids,
                    candidate_ids=item.candidate_ids,
                    label=int(source.labels[row]),
                    index=int(row),
                )
                for prompt, endings, item, row in zip(prompts, candidates, encoded, rows, strict=True)
            ]
        )

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
